"""Measure what is claimed of reward models on several seeds, each claim with its control: `make lab-rewards`.

    python tools/lab_rewards.py --seeds 2 3 4 --jobs 2 --out run/lab --document docs/lab.md

Runs the tools of lab/ and recipes/mrdpo.py for each seed, and writes one table between the marks of the document.
Finished parts are skipped: run the same command again to resume.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import correlation

from lab_driver import (
    OUT,
    Lab,
    Part,
    Results,
    Row,
    copy_results,
    difference,
    recipe_flags,
    recipe_part,
    run_folder,
    run_lab,
)

from salmonn.files import atomic_folder, write_text
from salmonn.train.run_steps import SETTINGS_NAME

NUM_LABELLED = 39  # of 230 clips in all three rounds: as many of the judge's calls as the reward model takes
# 58 * 8 + 2 * (23 * 8 + 14 * 4) = 944 of 5,520 ratings.
MODEL = ("--reward.kind=model", "--reward.seed_clips=58", "--reward.refresh_clips=23", "--reward.audit_clips=14")


def lab_flags(seed: int, out: Path) -> list[str]:
    """Return the flags of a tool that samples captions, which all of them share."""
    return [f"--out={out}", f"--clips_dir={out / 'clips'}", f"--seed={seed}"]


def labelled_flags(seed: int, out: Path) -> Sequence[str]:
    """Return the flags of a run on the labelled clips alone."""
    folder, heldout = out / "clips" / f"seed{200 + seed}-230", out / "clips" / f"seed{1000200 + seed}-160"
    files = (f"--references={folder / 'labelled.jsonl'}", f"--heldout_references={heldout / 'clips.jsonl'}")
    return recipe_flags("labelled", *files)(seed, out)


def write_labelled(seed: int, out: Path) -> None:
    """Write the references of the labelled clips."""
    folder = out / "clips" / f"seed{200 + seed}-230"
    lines = sorted((folder / "clips.jsonl").read_text(encoding="utf-8").splitlines())
    chosen = random.Random(f"{seed}-labels").sample(lines, NUM_LABELLED)
    write_text(folder / "labelled.jsonl", "".join(f"{line}\n" for line in chosen))


def copy_judged(seed: int, out: Path) -> None:
    """Copy what a run with a reward model shares with the judge's: the start's evaluation and its captions."""
    target = run_folder("model", seed, out)
    if not target.exists():
        with atomic_folder(target) as folder:
            copy_results(run_folder("recipe", seed, out), folder, (SETTINGS_NAME, "sft", "round_1/captions.jsonl"))


PARTS = {
    "heads": Part("tools/lab/reward_model.py", lab_flags, "seed_{seed}/reward_model.json"),
    "gate": Part("tools/lab/gate.py", lab_flags, "seed_{seed}/gate.json"),
    "raters": Part(
        "tools/lab/rater_groups.py",
        lambda seed, out: [*lab_flags(seed, out), f"--clips_seed={seed}", "--num_prototypes=[1,2,3]", "--num_folds=3"],
        "seed_{seed}/raters_{seed}_50_usual_score.json",
    ),
    "benchmark": Part(
        "tools/lab/reward_benchmark.py",
        lambda seed, out: [
            *lab_flags(seed, out / f"seed_{seed}"),
            f"--clips_dir={out / 'clips'}",
            f"--synth.seed={100 + seed}",
            "--synth.questions=3",
            f"--benchmark_dir={out / 'benchmark'}",
        ],
        "seed_{seed}/benchmark.json",
    ),
    "judge": recipe_part(),
    "model": Part(
        "recipes/mrdpo.py",
        recipe_flags("model", *MODEL),
        "loop/seed_{seed}/model/summary.json",
        ("judge",),
        copy_judged,
    ),
    "labelled": Part(
        "recipes/mrdpo.py", labelled_flags, "loop/seed_{seed}/labelled/summary.json", ("judge",), write_labelled
    ),
}


def last_rate(results: Results, part: str, rate: str = "total") -> float:
    """Return a held-out rate of a run after its last round, in %."""
    return 100 * float(results[part]["rounds"][-1][rate])


def more_repetition(part: str) -> Callable[[Results], float]:
    """Return by how many points the held-out Repetition of a run after its last round is above the start's."""
    return lambda results: last_rate(results, part, "repetition") - 100 * float(results[part]["sft"]["repetition"])


def judge_gain(results: Results) -> float:
    """Return the share of the judge's gain in Total that the reward model reaches, in %."""
    start, judge = 100 * results["judge"]["sft"]["total"], last_rate(results, "judge")
    return 100 * (start - last_rate(results, "model")) / (start - judge)


def label_share(results: Results) -> float:
    """Return the share of captions that the judge rated in the run with a reward model, in %."""
    rounds = results["model"]["reward"]
    return 100 * sum(one["num_judged"] for one in rounds) / sum(one["num_captions"] for one in rounds)


def head(name: str, column: int) -> Callable[[Results], float]:
    """Return the value of a row of reward_model.py, in %: 0 accuracy at a gap of 0.1, 2 Total of the best of 8."""
    return lambda results: 100 * float(results["heads"][name][column])


def rater(*keys: str) -> Callable[[Results], float]:
    """Return a value of rater_groups.py in %."""

    def value(results: Results) -> float:
        found = results["raters"]
        for key in keys:
            found = found[key]
        return 100 * float(found)

    return value


def gate(name: str) -> Callable[[Results], float]:
    """Return the mean accuracy of a reward of gate.py, in %."""
    return lambda results: 100 * float(results["gate"]["accuracies"][name]["mean"])


def pearson_of_rich(results: Results) -> float:
    """Return Pearson's r of accuracy and gain over the rewards that are fitted to `rich` states and see the clip."""
    rewards = [one for one in results["benchmark"]["rewards"] if one["reward"].startswith("rich")]
    return correlation([one["accuracy"] for one in rewards], [-one["total"] for one in rewards])


CLAIMS, BLIND = "claims", "claims, blind"
KNOWN, UNSEEN = ("K=2", "known", "mean"), ("K=2", "unseen", "20")
ROWS = (
    Row("**Instead of the judge**: Total after three rounds, %", lambda one: last_rate(one, "model")),
    Row("control: the judge on every caption", lambda one: last_rate(one, "judge")),
    Row("control: the judge's pairs of as many labelled captions, no model", lambda one: last_rate(one, "labelled")),
    Row("share of the judge's calls, %", label_share),
    Row("share of the judge's gain, %: >= 80", judge_gain, lambda mean: mean >= 80),
    Row(
        "points below the same labels without a model: >= 3",
        lambda one: last_rate(one, "labelled") - last_rate(one, "model"),
        lambda mean: mean >= 3,
    ),
    Row("Repetition above the start's, points: <= 1", more_repetition("model"), lambda mean: mean <= 1),
    Row("control: with the judge on every caption", more_repetition("judge")),
    Row("Hallucination, %", lambda one: last_rate(one, "model", "hallucination")),
    Row("control: Hallucination with the judge on every caption", lambda one: last_rate(one, "judge", "hallucination")),
    Row("**Heads that look**: pairs of held-out captions in the judge's order, 400 clips, %", head(CLAIMS, 0)),
    Row("control: trained and asked with another clip", head(BLIND, 0)),
    Row("control: the longer caption", head("longest", 0)),
    Row("points above the blind head: >= 5", difference(head(CLAIMS, 0), head(BLIND, 0)), lambda mean: mean >= 5),
    Row("Total of the best of 8, 400 clips, %: <= 40", head(CLAIMS, 2), lambda mean: mean <= 40),
    Row("control: a random one of 8", head("random", 2)),
    Row("control: the blind head's best of 8", head(BLIND, 2)),
    Row(
        "**Rater groups**: prototypes chosen: 2",
        lambda one: float(one["raters"]["chosen"]),
        lambda mean: mean == 2,
        digits=0,
    ),
    Row(
        "two prototypes above one, points: >= 10",
        difference(rater(*KNOWN), rater("K=1", "known", "mean")),
        lambda mean: mean >= 10,
    ),
    Row(
        "new raters with 20 votes below known ones, points: <= 5",
        difference(rater(*KNOWN), rater(*UNSEEN)),
        lambda mean: mean <= 5,
    ),
    Row(
        "control: prototypes chosen for raters who are all alike: 1",
        lambda one: float(one["raters"]["controls"]["alike"]["chosen"]),
        lambda mean: mean == 1,
        digits=0,
    ),
    Row(
        "control: two above one with shuffled ids, points: <= 2",
        difference(rater("controls", "shuffled", "K=2"), rater("controls", "shuffled", "K=1")),
        lambda mean: mean <= 2,
    ),
    Row("**Gate**: pairs right over three requests, %", gate("gate")),
    Row("control: fixed weights of any sign", gate("fixed weights of any sign")),
    Row("points above the best fixed weights: >= 8", lambda one: 100 * one["gate"]["gain"], lambda mean: mean >= 8),
    Row(
        "**Benchmark**: Pearson's r of accuracy and gain by the best of 8: >= 0.8",
        lambda one: float(one["benchmark"]["pearson"]),
        lambda mean: mean >= 0.8,
        digits=2,
    ),
    Row("the same for rewards on `rich` states alone: >= 0.8", pearson_of_rich, lambda mean: mean >= 0.8, digits=2),
)


LAB = Lab("lab-rewards", OUT, PARTS, {name: (name,) for name in PARTS}, ROWS)


def main(args: Sequence[str] | None = None) -> None:
    """Run all parts, print the table and write it to the document."""
    run_lab(LAB, args, description=__doc__ or "")


if __name__ == "__main__":
    main()
