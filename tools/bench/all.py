"""All benches, each in a process of its own: bench.json, and the table of docs/performance.md.

    python tools/bench/all.py [--out bench.json] [--document docs/performance.md] [--parts step sampling] [--quick]

Meanwhile nothing else should keep the machine busy. A part that fails is told at the end; the others' rows stand. Of
parts that are not run, or fail, what the file holds stays, with the machine and the commit that it was measured on.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rows import BenchRow, machine, put_table, to_markdown, write_rows

PARTS = ("step", "trl_step", "sampling", "folder", "decoders", "growth")
HERE = Path(__file__).parent


def run_part(name: str, *, quick: bool) -> list[BenchRow] | None:
    """A part's rows, which say of which part and which machine they are; None where it failed."""
    cores = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), *(["--quick"] if quick else [])]
        environment = os.environ | {"OMP_NUM_THREADS": cores, "TQDM_DISABLE": "1"}
        if subprocess.run(command, check=False, env=environment).returncode:
            return None
        rows: list[BenchRow] = json.loads(out.read_text(encoding="utf-8"))
    return [{"part": name, "machine": machine()} | row | {"bench": name} for row in rows]


def collect(parts: Sequence[str], *, quick: bool) -> tuple[list[BenchRow], list[str]]:
    """Rows of all parts, and which parts failed."""
    rows = {name: run_part(name, quick=quick) for name in parts}
    return [row for each in rows.values() for row in each or []], [name for name, each in rows.items() if each is None]


def renew(before: Sequence[BenchRow], rows: Sequence[BenchRow]) -> list[BenchRow]:
    """All rows in the benches' order; of those that were run, what was measured anew, however its tables are named."""
    anew = {row["bench"] for row in rows}
    kept = [row for row in before if row["bench"] not in anew]
    return sorted([*kept, *rows], key=lambda row: PARTS.index(row["bench"]))


def main() -> None:
    """Run, write, and tell what failed."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=str, nargs="+", default=list(PARTS), help="which, in this order")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="file of rows")
    parser.add_argument("--document", type=Path | None, default=None, help="file whose table is put in place")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    values = parser.parse_args()
    if unknown := sorted(set(values.parts) - set(PARTS)):
        parser.error(f"there is no part {', '.join(unknown)}, but {', '.join(PARTS)}")
    is_there = values.out.exists() and not values.quick  # what is quick stands beside nothing else
    before: list[BenchRow] = json.loads(values.out.read_text(encoding="utf-8")) if is_there else []
    rows, failed = collect(values.parts, quick=values.quick)
    rows = renew(before, rows)
    write_rows(values.out, rows)
    if values.document and rows:
        put_table(values.document, to_markdown(rows))
    if failed:
        sys.stderr.write(f"{', '.join(failed)} failed, as told above\n")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
