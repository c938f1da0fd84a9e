"""How long `salmonn caption` takes on one long clip, and how much memory: start-up, decoding and model together.

    python tools/bench/caption.py [--seconds 5 30 120] [--model FOLDER_OR_ID]

The clips are 1280 x 720 at 30 frames a second, H.264 and AAC, a moving texture that no codec makes small. Each is
captioned by a process of its own, whose wall time, processor time and peak of resident memory are printed.
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
    """Render, caption, print."""
    parser = ArgumentParser(description="Time and memory of `salmonn caption` on long 720p clips.")
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 30, 120], help="lengths of the clips")
    parser.add_argument("--model", type=str | None, default=None, help="another model than the shipped one")
    values = parser.parse_args()
    table = Table("clip, s", "wall, s", "processor, s", "peak memory, MiB", title="salmonn caption, 1280 x 720")
    with tempfile.TemporaryDirectory() as folder:
        for seconds in values.seconds:
            clip = Path(folder) / f"{seconds}.mp4"
            render(clip, seconds=seconds)
            table.add_row(str(seconds), *caption(clip, values.model))
    Console().print(table)


def caption(clip: Path, model: str | None) -> list[str]:
    """Wall seconds, processor seconds and peak MiB of a process that captions the clip."""
    command = [str(Path(sys.executable).with_name("salmonn")), "caption", str(clip), "--out", str(clip) + ".jsonl"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, *(["--model", model] if model else [])], stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} failed: run it to see why")
    return [f"{wall:.1f}", f"{used.ru_utime + used.ru_stime:.1f}", f"{used.ru_maxrss / MIB_IN_KIB:.0f}"]


if __name__ == "__main__":
    main()
