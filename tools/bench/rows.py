"""What every bench shares: interleaved repeats, memory of a side in a process of its own, rows, and their tables."""

import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

MIB = 1 << 20
# Between these lines of a document its table stands, and whatever stood there goes.
TABLE_START, TABLE_END = "<!-- bench: start -->", "<!-- bench: end -->"
BenchRow = dict[str, Any]  # name, ours_seconds, other_seconds, ratio, and what else is known


@dataclass(frozen=True)
class Timing:
    """How long a side took, medians of its repeats.

    Args:
        seconds: by the clock.
        cpu_seconds: of this process's cores, in its own code; less disturbed by what else runs on the machine.
    """

    seconds: float
    cpu_seconds: float

    def __add__(self, other: "Timing") -> "Timing":
        """One after the other."""
        return Timing(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


def interleave(sides: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, Timing]:
    """Run all sides in turn, again and again, so that what disturbs the machine disturbs all alike.

    Args:
        sides: name -> what is measured; it should have run once before.
        repeats: of each.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            taken[name].append(_clock(run))
    return {
        name: Timing(statistics.median(wall for wall, _ in each), statistics.median(cpu for _, cpu in each))
        for name, each in taken.items()
    }


def _clock(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    _finish()
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    run()
    _finish()
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_utime - before


def _finish() -> None:
    """A GPU works on after Python has asked it to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(name: str, ours: Timing, other: Timing, **more: object) -> BenchRow:
    """A row: ratio is how many times as long the other side takes."""
    return {
        "name": name,
        "ours_seconds": round(ours.seconds, 4),
        "other_seconds": round(other.seconds, 4),
        "ratio": round(other.seconds / ours.seconds, 3),
        "cpu_ratio": round(other.cpu_seconds / ours.cpu_seconds, 3),
        **more,
    }


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The p of cost = c * size ** p that fits best, by least squares of logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(costs), 1)
    return float(slope)


def held_mib(kind: str) -> float:
    """MiB that this process holds (VmRSS) or has held at most (VmHWM), as Linux counts."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024 / MIB


def peak_mib(run: Callable[[], object]) -> BenchRow:
    """The most that running it needs beside what is held before, and with it, in MiB: `step_mib`, `process_mib`.

    What was let go before is given back first, since it would hide what the run takes, and the peak begins anew.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        most = torch.cuda.max_memory_allocated()
        return {"step_mib": round((most - before) / MIB), "process_mib": round(most / MIB)}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before_mib = held_mib("VmRSS")
    run()
    most_mib = held_mib("VmHWM")
    return {"step_mib": round(most_mib - before_mib), "process_mib": round(most_mib)}


def alone(script: str, *arguments: str) -> Any:
    """What a bench that runs in a process of its own writes as its last line, in JSON."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed, as told above")
    return json.loads(done.stdout.splitlines()[-1])


def tell(value: object) -> None:
    """Write the last line that `alone` reads."""
    sys.stdout.write(json.dumps(value) + "\n")


def machine() -> str:
    """On what, with what, and which state of the code."""
    root = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, stdout=subprocess.PIPE, text=True, check=False
    ).stdout.strip()
    named = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (named or [platform.machine()])[0]
    return (
        f"{device}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, {torch.get_num_threads()} threads,"
        f" commit {commit or 'unknown'}, {datetime.now(UTC):%Y-%m-%d}"
    )


def _cpu_info() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines()


def write_rows(path: Path | str, rows: Sequence[BenchRow]) -> None:
    """Write rows as a JSON list, one a line, in place of what is there."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def hand_in(rows: Sequence[BenchRow], *, out: Path | None) -> None:
    """Print a part's rows, with the machine, and write them to a file if one is named."""
    signed = [row | {"machine": machine()} for row in rows]
    for part in dict.fromkeys(row["part"] for row in signed):
        show([row for row in signed if row["part"] == part], title=part)
    if out:
        write_rows(out, signed)


def show(rows: Sequence[BenchRow], *, title: str) -> None:
    """Print rows as a table."""
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    table = Table(*(COLUMNS[column] for column in columns), title=title)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console().print(table)


COLUMNS = {
    "name": "what",
    "ours_seconds": "ours, s",
    "other_seconds": "other, s",
    "ratio": "ratio",
    "ours_mib": "ours, MiB",
    "other_mib": "other, MiB",
    "note": "note",
}


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value}"


def to_markdown(rows: Sequence[BenchRow]) -> str:
    """The machine, and for each part of the bench a table of its rows."""
    text = f"Measured on {rows[0]['machine']}.\n"
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        columns = [column for column in COLUMNS if any(column in row for row in mine)]
        elsewhere = "" if mine[0]["machine"] == rows[0]["machine"] else f" (measured on {mine[0]['machine']})"
        text += f"\n**{part}**{elsewhere}\n\n| {' | '.join(COLUMNS[column] for column in columns)} |\n"
        text += f"|{'|'.join(' --- ' if column in ('name', 'note') else ' ---: ' for column in columns)}|\n"
        for row in mine:
            text += f"| {' | '.join(_cell(row.get(column)) for column in columns)} |\n"
    return text


def put_table(path: Path | str, text: str) -> None:
    """Put a table between the two marks of a document.

    Raises:
        ValueError: they are not there, once each and in order.
    """
    document = Path(path).read_text(encoding="utf-8")
    before, start, rest = document.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not start or not end:
        raise ValueError(f"{path} has no place for the table: put in the lines {TABLE_START} and {TABLE_END}")
    Path(path).write_text(f"{before}{start}\n{text}{end}{after}", encoding="utf-8")
