"""Shared parts of all benchmarks: interleaved repeats, memory measured in a separate process, rows and tables."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

MIB = 1 << 20
# Lines of a document between which its table is replaced.
TABLE_START, TABLE_END = "<!-- bench: start -->", "<!-- bench: end -->"
BenchRow = dict[str, Any]  # name, ours_seconds, other_seconds, ratio and further values


@dataclass(frozen=True)
class Timing:
    """Median times of one side over its repeats.

    Args:
        seconds: wall time.
        cpu_seconds: user CPU time of this process; less disturbed by other load on the machine.
    """

    seconds: float
    cpu_seconds: float

    def __add__(self, other: "Timing") -> "Timing":
        """Return the time of running both in sequence."""
        return Timing(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


def interleave(sides: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, Timing]:
    """Time all sides in alternation, so that other load on the machine affects all of them alike.

    Args:
        sides: functions to time by name; each should have run once before (warm-up).
        repeats: number of runs of each side.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            samples[name].append(_clock(run))
    return {
        name: Timing(statistics.median(wall for wall, _ in each), statistics.median(cpu for _, cpu in each))
        for name, each in samples.items()
    }


def _clock(run: Callable[[], object]) -> tuple[float, float]:
    """Return wall seconds and user CPU seconds of one run."""
    # The kernels of a GPU run asynchronously.
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    run()
    synchronize()
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_utime - before


def compare(name: str, ours: Timing, other: Timing, **more: object) -> BenchRow:
    """Make a row; `ratio` is the other side's time divided by ours."""
    return {
        "name": name,
        "ours_seconds": round(ours.seconds, 4),
        "other_seconds": round(other.seconds, 4),
        "ratio": round(other.seconds / ours.seconds, 3),
        "cpu_ratio": round(other.cpu_seconds / ours.cpu_seconds, 3),
        **more,
    }


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit cost = c * size ** p by least squares on logarithms; return p."""
    slope, _ = np.polyfit(np.log(sizes), np.log(costs), 1)
    return float(slope)


def process_mib_of(kind: str) -> float:
    """Return the current (VmRSS) or peak (VmHWM) resident memory of this process in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024 / MIB


def peak_mib(run: Callable[[], object]) -> BenchRow:
    """Measure the peak memory of a run in MiB: without (`step_mib`) and with (`process_mib`) what was held before.

    Freed memory is first returned to the system, since its reuse would hide what the run needs, and the peak is reset.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated()
        return {"step_mib": round((peak - before) / MIB), "process_mib": round(peak / MIB)}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before_mib = process_mib_of("VmRSS")
    run()
    most_mib = process_mib_of("VmHWM")
    return {"step_mib": round(most_mib - before_mib), "process_mib": round(most_mib)}


def run_isolated(script: str, *arguments: str, **flags: object) -> BenchRow:
    """Run a benchmark script in a separate process and return the JSON of its last line."""
    command = [sys.executable, script, *arguments, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed, see the output above")
    row: BenchRow = json.loads(done.stdout.splitlines()[-1])
    return row


def emit_json(value: object) -> None:
    """Write the line that `run_isolated` reads."""
    sys.stdout.write(json.dumps(value) + "\n")


def machine() -> str:
    """Describe the hardware, the versions and the commit."""
    root = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, stdout=subprocess.PIPE, text=True, check=False
    ).stdout.strip()
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in cpu_info if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (models or [platform.machine()])[0]
    return (
        f"{device}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, {torch.get_num_threads()} threads,"
        f" commit {commit or 'unknown'}, {datetime.now(UTC):%Y-%m-%d}"
    )


def write_rows(path: Path | str, rows: Sequence[BenchRow]) -> None:
    """Write rows as a JSON list with one row per line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def report_rows(rows: Sequence[BenchRow], *, out: Path | None) -> None:
    """Print the rows of a benchmark with the machine, and write them to `out` if given."""
    signed = [row | {"machine": machine()} for row in rows]
    for part, _, columns, cells in _tables(signed):
        table = Table(*(COLUMNS[column] for column in columns), title=part)
        for row in cells:
            table.add_row(*row)
        Console().print(table)
    if out:
        write_rows(out, signed)


COLUMNS = {
    "name": "what",
    "ours_seconds": "ours, s",
    "other_seconds": "other, s",
    "ratio": "ratio",
    "ours_mib": "ours, MiB",
    "other_mib": "other, MiB",
    "note": "note",
}


def _tables(rows: Sequence[BenchRow]) -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """Yield each part, its machine, the columns that it has, and the cells of its rows."""

    def cell(value: object) -> str:
        if value is None:
            return ""
        return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value}"

    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        columns = [column for column in COLUMNS if any(column in row for row in mine)]
        yield part, mine[0]["machine"], columns, [[cell(row.get(column)) for column in columns] for row in mine]


def to_markdown(rows: Sequence[BenchRow]) -> str:
    """Format rows as Markdown: the machine, and one table per part."""
    text = f"Measured on {rows[0]['machine']}.\n"
    for part, measured_on, columns, cells in _tables(rows):
        elsewhere = "" if measured_on == rows[0]["machine"] else f" (measured on {measured_on})"
        text += f"\n**{part}**{elsewhere}\n\n| {' | '.join(COLUMNS[column] for column in columns)} |\n"
        text += f"|{'|'.join(' --- ' if column in ('name', 'note') else ' ---: ' for column in columns)}|\n"
        for row in cells:
            text += f"| {' | '.join(row)} |\n"
    return text


def replace_table(path: Path | str, text: str) -> None:
    """Replace the table between the two marker lines of a document.

    Raises:
        ValueError: a marker is missing.
    """
    document = Path(path).read_text(encoding="utf-8")
    before, start, rest = document.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not start or not end:
        raise ValueError(
            f"{path} lacks the marker lines {TABLE_START} and {TABLE_END}; add them where the table belongs"
        )
    Path(path).write_text(f"{before}{start}\n{text}{end}{after}", encoding="utf-8")
