"""Run the whole loop over several seeds, each on clips of its own, and print what the README's results report.

    python tools/proof.py --seeds 2 3 4

Writes `run/proof/seed_K/` (as `make mrdpo` writes `run/`) and `run/proof/results.json`. 10 minutes a seed on
2 cores. Seeds that are done are not run again.
"""

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

log = logging.getLogger("proof")
ROOT = Path(__file__).parent.parent
COLUMNS = ("missing", "hallucination", "total", "repetition", "qa_accuracy")


def run_seed(seed: int, out: Path, extra: list[str], *, processes: int) -> dict:
    """One run of mrDPO: training seed `seed`, clips of seed 100 + `seed`; its summary."""
    command = [
        str(Path(sys.executable).parent / "torchrun"),
        "--standalone",
        f"--nproc_per_node={processes}",
        str(ROOT / "recipes" / "mrdpo.py"),
        f"--config={ROOT / 'recipes' / 'configs' / 'mrdpo.yaml'}",
        f"--out={out}",
        f"--clips_dir={out.parent / 'clips'}",
        f"--feature_cache.folder={out.parent / 'features'}",
        f"--seed={seed}",
        f"--synth.seed={100 + seed}",
        *extra,
    ]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)  # the run has said why
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def judge(summary: dict) -> dict[str, bool]:
    """What mrDPO and rebirth promise, seen or not seen in one run."""
    sft, last, rebirth = summary["sft"], summary["rounds"][-1], summary["rebirth"]
    return {
        "total falls by 45 %": last["total"] <= 0.55 * sft["total"],
        "missing falls": last["missing"] < sft["missing"],
        "hallucination falls": last["hallucination"] < sft["hallucination"],
        "repetition does not rise": last["repetition"] <= sft["repetition"],
        "rebirth keeps 90 % of the gain": sft["total"] - rebirth["total"] >= 0.9 * (sft["total"] - last["total"]),
        "rebirth's questions within 1 point": rebirth["qa_accuracy"] >= sft["qa_accuracy"] - 0.01,
    }


def report(results: dict[str, dict]) -> None:
    """Print every run's stages, and which promises it kept."""
    console = Console(width=110)
    table = Table(title="mrDPO, held-out clips, %")
    for title in ("seed", "stage", *COLUMNS):
        table.add_column(title, justify="left" if title in ("seed", "stage") else "right")
    for seed, result in results.items():
        summary = result["summary"]
        stages = {"SFT": summary["sft"]}
        stages |= {f"round {number}": rates for number, rates in enumerate(summary["rounds"], start=1)}
        for stage, rates in (stages | {"rebirth": summary["rebirth"]}).items():
            table.add_row(seed, stage, *(f"{100 * rates[key]:.1f}" for key in COLUMNS))
        table.add_section()
    console.print(table)
    for seed, result in results.items():
        for promise, seen in result["promises"].items():
            console.print(f"seed {seed}: {promise}: {'yes' if seen else 'NO'}")


def main() -> None:
    """Run, judge and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], help="seeds of training; clips: 100 + seed")
    parser.add_argument("--out", type=Path, default=Path("run/proof"), help="folder for the runs")
    parser.add_argument("--processes", type=int, default=2, help="of one run; a GPU holds one")
    values, extra = parser.parse_known_args()
    results = {}
    for seed in values.seeds:
        summary = run_seed(seed, values.out / f"seed_{seed}", extra, processes=values.processes)
        results[str(seed)] = {"summary": summary, "promises": judge(summary)}
    (values.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report(results)


if __name__ == "__main__":
    main()
