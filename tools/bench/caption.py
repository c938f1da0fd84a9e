"""Measure time and memory of `salmonn caption` on one long clip: start-up, decoding and model together.

    python tools/bench/caption.py [--seconds 5 30 120] [--model FOLDER_OR_ID]

The clips are 1280 x 720 at 30 fps, H.264 and AAC, and compress badly. Each is captioned by its own process, whose wall
time, CPU time and peak resident memory are printed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clips import render
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

MIB_IN_KIB = 1024


def main() -> None:
    """Render and caption the clips, print a table."""
    parser = ArgumentParser(description="Time and memory of `salmonn caption` on long 720p clips.")
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 30, 120], help="lengths of the clips")
    parser.add_argument("--model", type=str | None, default=None, help="folder or hub id (default: the toy model)")
    values = parser.parse_args()
    table = Table("clip, s", "wall, s", "CPU, s", "peak memory, MiB", title="salmonn caption, 1280 x 720")
    with tempfile.TemporaryDirectory() as folder:
        for seconds in values.seconds:
            clip = Path(folder) / f"{seconds}.mp4"
            render(clip, seconds=seconds)
            table.add_row(str(seconds), *caption(clip, values.model))
    Console().print(table)


def caption(clip: Path, model: str | None) -> list[str]:
    """Caption a clip in a new process; return wall seconds, CPU seconds and peak MiB."""
    command = [str(Path(sys.executable).with_name("salmonn")), "caption", str(clip), "--out", str(clip) + ".jsonl"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, *(["--model", model] if model else [])], stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} failed; run it to see why")
    return [f"{wall:.1f}", f"{used.ru_utime + used.ru_stime:.1f}", f"{used.ru_maxrss / MIB_IN_KIB:.0f}"]


if __name__ == "__main__":
    main()
