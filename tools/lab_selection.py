"""Measure what is claimed of pairs, losses, votes, Nash learning, rebirth and feedback, with controls: `make lab`.

    python tools/lab_selection.py --seeds 2 3 4 --jobs 2 --out run/lab --document docs/lab.md
    python tools/lab_selection.py --parts subset losses      # some of the parts

Each arm is a run of recipes/mrdpo.py, of the ablation's size, or of a tool of lab/. Arms of a seed share the clips, the
start's evaluation, and the captions and ratings of the first round. Finished arms are skipped: run the same command
again to resume. One table of claims and one of arms are written between the marks of the document.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab_driver import (
    OUT,
    Lab,
    Part,
    Results,
    Row,
    copy_results,
    difference,
    loop_flags,
    recipe_flags,
    recipe_part,
    run_folder,
    run_lab,
)

from salmonn.files import atomic_folder
from salmonn.train.data import CLIPS_NAME
from salmonn.train.run_steps import SETTINGS_NAME

BASE = "all"  # plain mrDPO for one round, whose results the other arms share
CAPTIONS = ("sft", "round_1/captions.jsonl", "round_1/scores.jsonl")
PAIRS = (*CAPTIONS, "round_1/pairs.jsonl")
Value = Callable[[Results], float]


def copied_from(source: str, name: str, patterns: Sequence[str], *, pairs: bool = False) -> Callable[[int, Path], None]:
    """Return what creates an arm's folder with results of another arm, and with its own pairs if `pairs`."""

    def prepare(seed: int, out: Path) -> None:
        target = run_folder(name, seed, out)
        if target.exists():
            return
        with atomic_folder(target) as folder:
            # With its settings, so that the run checks that it has them too.
            copy_results(run_folder(source, seed, out), folder, (SETTINGS_NAME, *patterns))
            if pairs:
                copy_results(pairs_folder(seed, out), folder, (f"{name}.jsonl",))
                (folder / f"{name}.jsonl").rename(folder / "round_1" / "pairs.jsonl")

    return prepare


def arm(
    name: str,
    *flags: str,
    shared: Sequence[str] = CAPTIONS,
    source: str = BASE,
    rounds: int = 1,
    pairs: bool = False,
    rebirth: bool = False,
    recipe: bool = False,
) -> dict[str, Part]:
    """Return an arm that is a run of mrDPO.

    Args:
        name: name of the arm and of its folder.
        flags: flags of the recipe.
        shared: glob patterns of the results that it shares with another arm.
        source: that arm.
        rounds: number of rounds.
        pairs: train the first round on the pairs of this name that vote_pairs.py has written.
        rebirth: run rebirth.
        recipe: run three rounds of the default recipe.
    """
    needs = (source, "pairs") if pairs else (source,)
    make_flags = recipe_flags(name, *flags) if recipe else loop_flags(name, *flags, rounds=rounds, rebirth=rebirth)
    result = f"loop/seed_{{seed}}/{name}/summary.json"
    return {name: Part("recipes/mrdpo.py", make_flags, result, needs, copied_from(source, name, shared, pairs=pairs))}


def continued(name: str, *flags: str) -> Part:
    """Return three rounds that follow those of the recipe's CE alone, with further decay of the learning rate."""

    def make(seed: int, out: Path) -> list[str]:
        model = run_folder("recipe_ce", seed, out) / "round_3" / "merged"
        return [*recipe_flags(name, "--fit.learning_rate=2.4e-4", *flags)(seed, out), f"--model={model}"]

    return Part("recipes/mrdpo.py", make, f"loop/seed_{{seed}}/{name}/summary.json", ("recipe_ce",))


def voted(name: str, voter: str, num_votes: int, *flags: str) -> dict[str, Part]:
    """Return an arm that is trained on votes alone."""

    def make(seed: int, out: Path) -> list[str]:
        shared = {
            "captions": run_folder(BASE, seed, out) / "round_1" / "captions.jsonl",
            "clips_dir": out / "clips",
            "features": out / "features",
            "voter": voter,
            "votes": num_votes,
            "seed": seed,
            "out": out / "votes" / f"seed_{seed}" / name,
        }
        return [*(f"--{key}={value}" for key, value in shared.items()), *flags]

    return {name: Part("tools/lab/votes.py", make, f"votes/seed_{{seed}}/{name}/rates.json", (BASE,))}


def pairs_folder(seed: int, out: Path) -> Path:
    """Return the folder of the chosen pairs of a seed."""
    return out / "pairs" / f"seed_{seed}"


def pairs_flags(seed: int, out: Path) -> list[str]:
    """Return the flags of vote_pairs.py."""
    references = out / "clips" / f"seed{200 + seed}-230" / CLIPS_NAME
    folder = run_folder(BASE, seed, out) / "round_1"
    return [f"--round={folder}", f"--references={references}", f"--seed={seed}", f"--out={pairs_folder(seed, out)}"]


LOSSES: Mapping[str, Sequence[str]] = {
    "ce_alone": ("--loss.beta=1e-6",),  # Adam makes up for the size of the gradient that is left, that of the CE
    "ipo": ("--loss.kind=ipo",),
    "apo_zero": ("--loss.kind=apo_zero",),
    "robust": ("--loss.kind=robust", "--loss.label_smoothing=0.1"),
    "bco_pair": ("--loss.kind=bco_pair",),
    "nca_pair": ("--loss.kind=nca_pair", "--loss.beta=0.01"),
    "kto": ("--loss.kind=kto",),
    "sppo_hard": ("--loss.kind=sppo_hard", "--loss.beta=0.001"),
}
NASH = ("--reward.kind=voter", "--reward.voter=cycle", "--loss.ce_weight=0")
EXPLOITABILITY = tuple(f"round_{number}/heldout/exploitability.json" for number in (1, 2, 3))
PARTS: dict[str, Part] = {
    BASE: Part("recipes/mrdpo.py", loop_flags(BASE, rounds=1), f"loop/seed_{{seed}}/{BASE}/summary.json"),
    "pairs": Part("tools/lab/vote_pairs.py", pairs_flags, "pairs/seed_{seed}/facts.json", (BASE,)),
    **arm("best_quarter", "--subset.keep=0.25"),
    **arm("random_quarter", shared=CAPTIONS, pairs=True),
    **arm("margin_quarter", "--subset.keep=0.25", "--subset.quality_weight=0", "--subset.diversity_weight=0"),
    **arm("votes_random", pairs=True),
    **arm("votes_full", pairs=True),
    **arm("votes_one_a_clip", pairs=True),
    **arm("votes_margin", pairs=True),
    **arm("votes_diverse", pairs=True),
    **{name: part for kind, flags in LOSSES.items() for name, part in arm(kind, *flags, shared=PAIRS).items()},
    **arm("clause", "--loss.per=clause"),
    **arm("all_rounds", shared=("sft", "round_1"), rounds=3),
    **arm("best_rounds", "--subset.keep=0.25", shared=("sft", "round_1"), source="best_quarter", rounds=3),
    **{
        name: part
        for tailor in ("none", "teacher", "random")
        for name, part in arm(
            f"tailor_{tailor}", f"--rebirth.tailor={tailor}", shared=("sft", "round_*"), source="all_rounds", rounds=3,
            rebirth=True,
        ).items()
    },
    "recipe": recipe_part(),
    **arm("recipe_ce", "--loss.beta=1e-6", source="recipe", shared=PAIRS, recipe=True),
    **arm("recipe_dpo", "--loss.ce_weight=0", source="recipe", shared=PAIRS, recipe=True),
    "ce_recipe": continued("ce_recipe"),
    "ce_ce": replace(
        continued("ce_ce", "--loss.beta=1e-6"), needs=("ce_recipe",), prepare=copied_from("ce_recipe", "ce_ce", PAIRS)
    ),
    **voted("noisy_50", "noisy", 50),
    **voted("noisy_130", "noisy", 130),
    **voted("noisy_400", "noisy", 400),
    **voted("noisy_400_robust", "noisy", 400, "--loss.kind=robust", "--loss.label_smoothing=0.3"),
    **voted("long_400", "long", 400),
    "game": Part(
        "tools/lab/cyclic_game.py",
        lambda seed, out: [
            f"--facts={pairs_folder(seed, out) / 'facts.json'}", f"--seed={seed}", f"--out={out / f'game_{seed}.json'}"
        ],
        "game_{seed}.json",
        ("pairs",),
    ),
    **{
        name: replace(part, further=EXPLOITABILITY)
        for name, flags in (("nash", ("--loss.kind=nash", "--reference_policy=mixed")), ("cycle_dpo", ()))
        for part in arm(name, *NASH, *flags, shared=("round_1/captions.jsonl",), rounds=3).values()
    },
    **arm("no_ce", "--loss.ce_weight=0", shared=PAIRS),
    **arm("grpo", "--loss.kind=grpo", "--loss.beta=0.04", "--loss.ce_weight=0", "--fit.batch_size=8"),
    "feedback": Part(
        "tools/lab/feedback.py",
        lambda seed, out: [f"--seeds={seed}", "--folders=40", f"--out={out / f'feedback_{seed}.json'}"],
        "feedback_{seed}.json",
    ),
}  # fmt: skip
GROUPS: dict[str, Sequence[str]] = {
    "subset": (BASE, "pairs", "best_quarter", "random_quarter", "votes_random", "votes_full", "votes_one_a_clip",
               "votes_margin"),
    "feedback": ("feedback",),
    "game": ("game",),
    "losses": (*LOSSES, "clause"),
    "terms": ("votes_diverse", "margin_quarter"),
    "grpo": ("no_ce", "grpo"),
    "votes": ("noisy_400", "noisy_130", "noisy_50", "noisy_400_robust", "long_400"),
    "rounds": ("all_rounds", "best_rounds"),
    "recipe": ("recipe", "recipe_ce", "recipe_dpo", "ce_recipe", "ce_ce"),
    "tailor": ("tailor_none", "tailor_teacher", "tailor_random"),
    "nash": ("game", "nash", "cycle_dpo"),
}  # fmt: skip
MEASURES = {
    "total": "Total", "missing": "Missing", "hallucination": "Hallucination", "repetition": "Repetition",
    "qa_accuracy": "QA accuracy", "words": "words", "kl": "KL, nats per token",
}  # fmt: skip
TITLES = {
    BASE: "all pairs of a round, guided DPO (`sigmoid`)",
    "best_quarter": "best quarter of these (`--subset.keep 0.25`)",
    "random_quarter": "control: random quarter",
    "margin_quarter": "quarter with the largest margins",
    "votes_random": "votes: 128 random pairs",
    "votes_full": "votes: 128 by margin, quality, diversity",
    "votes_one_a_clip": "votes: 128 by margin, one of each clip",
    "votes_margin": "votes: 128 by margin alone",
    "votes_diverse": "votes: 128 by margin and diversity",
    "ce_alone": "control: CE alone, without DPO",
    **{kind: f"`{kind}`" for kind in LOSSES if kind != "ce_alone"},
    "clause": "`sigmoid`, and each clause that the judge marks (`--loss.per clause`)",
    "no_ce": "DPO, no CE",
    "all_rounds": "all pairs, three rounds",
    "best_rounds": "best quarter, three rounds",
    "recipe": "default recipe (`mrdpo.yaml`), three rounds",
    "recipe_ce": "control: its CE alone, without DPO",
    "recipe_dpo": "control: its DPO without CE",
    "ce_recipe": "three rounds of CE alone, then three of the default recipe",
    "ce_ce": "control: six rounds of CE alone",
    "tailor_none": "rebirth",
    "tailor_teacher": "rebirth, `teacher`",
    "tailor_random": "rebirth, control `random`",
    "noisy_50": "50 votes alone, no CE",
    "noisy_130": "130 votes alone, no CE",
    "noisy_400": "400 votes alone, no CE",
    "noisy_400_robust": "the same, `robust` 0.3",
    "long_400": "control: 400 votes for length",
    "nash": "voter `cycle`: `nash`, mixed reference policy, three rounds",
    "cycle_dpo": "control: voter `cycle`, three plain rounds",
    "grpo": "GRPO, no CE",
}


def rates(results: Results, name: str) -> Mapping[str, Any]:
    """Return the held-out rates of the last stage of an arm, with its KL divergence; the start's of "start".

    Raises:
        KeyError: the arm has not been run, or has no rebirth although it should.
    """
    if name == "start":
        return results[BASE]["sft"]
    found = results[name]
    if "sft" not in found:  # of votes.py
        return found
    if name.startswith("tailor_"):
        if not found["rebirth"]:
            raise KeyError(name)
        return found["rebirth"] | {"kl": found["kl"]["rebirth"]}
    return found["rounds"][-1] | {"kl": found["kl"][f"round {len(found['rounds'])}"]}


def percent(name: str, measure: str = "total") -> Value:
    """Return a measure of an arm, in %."""
    return lambda results: 100 * float(rates(results, name)[measure])


def below(one: str, other: str, measure: str = "total") -> Value:
    """Return by how many points a measure of an arm is below that of another."""
    return difference(percent(other, measure), percent(one, measure))


def both(one: str, other: str) -> Value:
    """Return by how many points the sum of Total and Repetition of an arm is below that of another."""
    return lambda results: below(one, other)(results) + below(one, other, "repetition")(results)


def fact(name: str, key: str, scale: float = 100) -> Value:
    """Return a fact about chosen pairs."""
    return lambda results: scale * float(results["pairs"][name][key])


def feedback(results: Results) -> Any:
    """Return the results of lab/feedback.py for the only seed of its file."""
    (of_seed,) = results["feedback"].values()
    return of_seed


# What is planted in the votes of lab/feedback.py -> its name there.
PLANTED = {
    "**Feedback**: planted preference for caption A": "side of hasty",
    "control: no preference for caption A": "side of noisy",
    "planted preference for length": "length of long",
    "planted agreement with Total": "agreement of noisy",
}


def covered(name: str) -> Value:
    """Return the share of simulated folders whose interval has the planted value, in %; see lab/feedback.py."""
    return lambda results: 100 / 40 * float(feedback(results)["coverage"][name])


def final_total(draft: str) -> Value:
    """Return the Total of what is written in 60 seconds from a draft of some quality, in %."""
    return lambda results: (
        100 * float(next(iter(results["feedback"].values()))["writing"]["60.0"][draft]["final Total"])
    )


def game(method: str, round_number: int) -> Value:
    """Return the exploitability of a method after a round of the game."""
    return lambda results: float(results["game"][method][round_number - 1])


def exploited(name: str, round_number: int) -> Value:
    """Return the exploitability of an arm's captions of held-out clips after a round."""
    return lambda results: float(results[f"{name}/{EXPLOITABILITY[round_number - 1]}"]["exploitability"])


ROWS = (
    Row("**Subset, exact pairs**: Total after one round on the best quarter, %", percent("best_quarter")),
    Row("control: all pairs", percent(BASE)),
    Row("control: a random quarter", percent("random_quarter")),
    Row("best quarter below all, points: >= 2", below("best_quarter", BASE), lambda points: points >= 2),
    Row("best quarter below a random one, points: >= 2", below("best_quarter", "random_quarter"), lambda one: one >= 2),
    Row("control: best quarter below the quarter with the largest margins", below("best_quarter", "margin_quarter")),
    Row("Repetition on the best quarter above all, points: <= 1",
        difference(percent("best_quarter", "repetition"), percent(BASE, "repetition")), lambda points: points <= 1),
    Row("after three rounds, best quarter below all, points: >= 0", below("best_rounds", "all_rounds"),
        lambda points: points >= 0),
    Row("**Default recipe**: Total after three rounds, %", percent("recipe")),
    Row("below its CE alone, without DPO, points: >= 2", below("recipe", "recipe_ce"), lambda points: points >= 2),
    Row("below its CE alone in Total + Repetition, points: >= 2", both("recipe", "recipe_ce"),
        lambda points: points >= 2),
    Row("below its DPO without CE, points: >= 0", below("recipe", "recipe_dpo"), lambda points: points >= 0),
    Row("three rounds of it after three of CE alone, below six of CE alone, points: >= 2", below("ce_recipe", "ce_ce"),
        lambda points: points >= 2),
    Row("**Subset, noisy votes**: Total after one round on 128 of all pairs, %", percent("votes_full")),
    Row("control: 128 random ones", percent("votes_random")),
    Row("below random ones, points: >= 8", below("votes_full", "votes_random"), lambda points: points >= 8),
    Row("below margin alone in Total + Repetition, points: >= 0", both("votes_full", "votes_margin"),
        lambda points: points >= 0),
    Row("control: margin and one pair of each clip, below the full choice by at most 1 point",
        below("votes_one_a_clip", "votes_full"), lambda points: points <= 1),
    Row("control: without quality, which looks at errors of the chosen caption", percent("votes_diverse")),
    Row("QA accuracy below random ones, points: <= 1", below("votes_full", "votes_random", "qa_accuracy"),
        lambda points: points <= 1),
    Row("votes that agree with Total among random ones, %", fact("votes_random", "right")),
    Row("votes that agree with Total in the full choice, %", fact("votes_full", "right")),
    Row("**Losses**: control: CE alone above guided DPO, points: >= 2", below(BASE, "ce_alone"),
        lambda points: points >= 2),
    *(Row(f"`{kind}` below guided DPO, points: >= 2", below(kind, BASE), lambda points: points >= 2)
      for kind in LOSSES if kind != "ce_alone"),
    Row("`sigmoid` with each marked clause below guided DPO, points: >= 2", below("clause", BASE),
        lambda points: points >= 2),
    Row("**GRPO** below guided DPO at equal samples and steps, points: >= 0", below("grpo", BASE),
        lambda points: points >= 0),
    Row("control: below DPO, also without CE", below("grpo", "no_ce")),
    Row("**Votes alone**: Total of 130 votes, %: <= 48", percent("noisy_130"), lambda total: total <= 48),
    Row("Total of 400 votes, %: <= 55", percent("noisy_400"), lambda total: total <= 55),
    Row("control: Total of 50 votes, %", percent("noisy_50")),
    Row("`robust` above `sigmoid` at 400 votes, points: <= 1", below("noisy_400", "noisy_400_robust"),
        lambda points: points <= 1),
    Row("control: voters who like length, above these at 400 votes, points: >= 2", below("noisy_400", "long_400"),
        lambda points: points >= 2),
    Row("control: their captions' words above the start's: > 0", difference(
        lambda one: float(rates(one, "long_400")["words"]), lambda one: float(rates(one, "start")["words"])),
        lambda words: words > 0),
    Row("**Nash, on a table**: exploitability of plain rounds after round 3: >= 0.2", game("renewed", 3),
        lambda value: value >= 0.2, digits=3),
    Row("mixed reference policy: <= 0.1", game("mixed", 3), lambda value: value <= 0.1, digits=3),
    Row("Nash Mirror Prox below the mixed reference policy, after round 3: >= 0.005",
        difference(game("mixed", 3), game("extrapolated", 3)), lambda value: value >= 0.005, digits=3),
    Row("**Nash, on the model**: exploitability after round 3: <= 0.1", exploited("nash", 3),
        lambda value: value <= 0.1, digits=3),
    Row("control: plain rounds, largest exploitability after rounds 2 and 3: >= 0.2",
        lambda results: max(exploited("cycle_dpo", number)(results) for number in (2, 3)), lambda value: value >= 0.2,
        digits=3),
    Row("Total above plain rounds, points: <= 2", below("cycle_dpo", "nash"),
        lambda points: points <= 2),
    Row("**Rebirth**: Total, %", percent("tailor_none")),
    Row("control: above the last round, points", below("all_rounds", "tailor_none")),
    Row("`teacher` below `none`, points: >= 1.1, a third of the 3.3 that rebirth lost when this goal was set",
        below("tailor_teacher", "tailor_none"), lambda points: points >= 1.1),
    Row("control: `random` below `none`, points", below("tailor_random", "tailor_none")),
    Row("Repetition of `teacher` above `none`, points: <= 1", below("tailor_none", "tailor_teacher", "repetition"),
        lambda points: points <= 1),
    Row("QA accuracy of `teacher` below `none`, points: <= 0.5", below("tailor_teacher", "tailor_none", "qa_accuracy"),
        lambda points: points <= 0.5),
    *(Row(f"{title} in the interval, % of 40 folders: >= 90 (nominal 95)", covered(name), lambda share: share >= 90)
      for title, name in PLANTED.items()),
    Row("final Total with the best draft below that with the poor one, points: >= 5",
        difference(final_total("poor"), final_total("best")), lambda points: points >= 5),
    Row("control: final Total without a draft, %", final_total("no draft")),
)  # fmt: skip


def arms_table(results: Mapping[int, Results]) -> list[str]:
    """Return the lines of a table of all arms that have been run, each with the values of all seeds."""
    seeds = " / ".join(map(str, results))
    lines = ["", f"Held-out rates of each arm in %, seeds {seeds} (-: not run):", ""]
    lines += ["| arm | " + " | ".join(MEASURES.values()) + " |", "| --- |" + " ---: |" * len(MEASURES)]
    for name, title in {"start": "start (SFT)", **TITLES}.items():
        found: list[Mapping[str, Any]] = []
        for one in results.values():
            try:
                found.append(rates(one, name))
            except KeyError:
                found.append({})
        if any(found):
            cells = (" / ".join(format_value(measure, one.get(measure)) for one in found) for measure in MEASURES)
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def format_value(measure: str, value: float | None) -> str:
    """Return a measure as text: rates in %."""
    if value is None:
        return "-"
    return f"{value:.3f}" if measure == "kl" else f"{value:.1f}" if measure == "words" else f"{100 * value:.1f}"


LAB = Lab("lab", OUT, PARTS, GROUPS, ROWS, arms_table)


def main(args: Sequence[str] | None = None) -> None:
    """Run all parts, print the tables and write them to the document."""
    run_lab(LAB, args, description=__doc__ or "")


if __name__ == "__main__":
    main()
