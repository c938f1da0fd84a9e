"""Run all benchmarks, each in its own process, and write bench.json and the tables of docs/performance.md.

    python tools/bench/all.py [--out bench.json] [--document docs/performance.md] [--parts step sampling] [--quick]

Nothing else should run on the machine meanwhile. Parts that fail are listed at the end and do not affect the others.
Rows of parts that were not run, or failed, keep their old values in the file with the machine and commit they were
measured on.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rows import BenchRow, machine, replace_table, to_markdown, write_rows

PARTS = ("step", "trl_step", "sampling", "folder", "decoders", "growth")
HERE = Path(__file__).parent


def run_part(name: str, *, quick: bool) -> list[BenchRow] | None:
    """Run a benchmark; return its rows with part and machine, or None if it failed."""
    cores = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), *(["--quick"] if quick else [])]
        environment = os.environ | {"OMP_NUM_THREADS": cores, "TQDM_DISABLE": "1"}
        if subprocess.run(command, check=False, env=environment).returncode:
            return None
        rows: list[BenchRow] = json.loads(out.read_text(encoding="utf-8"))
    return [{"part": name, "machine": machine()} | row | {"bench": name} for row in rows]


def merge_rows(before: Sequence[BenchRow], rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Return old and new rows in the order of PARTS; new rows replace all old rows of the same benchmark."""
    measured_now = {row["bench"] for row in rows}
    kept = [row for row in before if row["bench"] not in measured_now]
    return sorted([*kept, *rows], key=lambda row: PARTS.index(row["bench"]))


def main() -> None:
    """Run the benchmarks, write their rows, and report failures."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=str, nargs="+", default=list(PARTS), help="benchmarks to run, in this order")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON file of rows to update")
    parser.add_argument("--document", type=Path | None, default=None, help="document whose tables are replaced")
    parser.add_argument("--quick", action="store_true", help="small sizes, for testing")
    values = parser.parse_args()
    if unknown := sorted(set(values.parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    is_update = values.out.exists() and not values.quick  # rows of --quick runs are not mixed with others
    before: list[BenchRow] = json.loads(values.out.read_text(encoding="utf-8")) if is_update else []
    by_part = {name: run_part(name, quick=values.quick) for name in values.parts}
    rows = merge_rows(before, [row for part in by_part.values() for row in part or []])
    write_rows(values.out, rows)
    if values.document and rows:
        replace_table(values.document, to_markdown(rows))
    if failed := [name for name, part in by_part.items() if part is None]:
        sys.stderr.write(f"{', '.join(failed)} failed, see the output above\n")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
