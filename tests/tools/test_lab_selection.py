"""The measurement of pairs, losses, votes, Nash learning and rebirth: its arms, chosen pairs, game and table."""

import numpy as np
import pytest

from salmonn.config import parse_config
from salmonn.files import write_json
from salmonn.preference.losses import LossConfig
from salmonn.records import Caption, Event, Reference, Score
from salmonn.train.mrdpo import MrDpoConfig


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("lab_selection")


def test_arms_have_configurations(tool, tmp_path):
    """Flags of runs of mrDPO are accepted, and arms differ in what they are about."""
    losses = [
        parse_config(LossConfig, description="", args=[flag.replace("--loss.", "--") for flag in flags])
        for flags in tool.LOSSES.values()
    ]
    assert [loss.kind for loss in losses] == ["sigmoid", *list(tool.LOSSES)[1:]] and losses[0].beta == 1e-6
    best, teacher, nash, grpo = (
        parse_config(MrDpoConfig, description="", args=tool.PARTS[name].flags(2, tmp_path))
        for name in ("best_quarter", "tailor_teacher", "nash", "grpo")
    )
    assert best.subset.keep == 0.25 and best.rounds == 1 and best.rebirth is None and best.fit.steps == 50
    assert teacher.rebirth.tailor == "teacher" and teacher.rounds == 3 and teacher.subset.keep is None
    assert (nash.round_loss.beta, nash.reference_policy) == (pytest.approx(0.3), "mixed")
    assert (grpo.loss.kind, grpo.fit.batch_size, grpo.loss.ce_weight) == ("grpo", 8, 0)
    assert {name for group in tool.GROUPS.values() for name in group} == set(tool.PARTS)
    assert set(tool.TITLES) == {name for name in tool.PARTS if name not in ("pairs", "game", "feedback")}


def test_an_arm_starts_from_shared_results_and_its_own_pairs(tool, tmp_path):
    base, pairs = tmp_path / "loop" / "seed_2" / "all", tmp_path / "pairs" / "seed_2"
    files = ("settings.json", "sft/heldout/rates.json", "round_1/captions.jsonl", "round_1/pairs.jsonl", "summary.json")
    for path in (*(base / name for name in files), pairs / "votes_full.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    for name, own in (("votes_full", "votes_full.jsonl"), ("ipo", "pairs.jsonl"), ("best_quarter", None)):
        tool.PARTS[name].prepare(2, tmp_path)
        folder = tmp_path / "loop" / "seed_2" / name
        found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
        assert found == {one: one.rpartition("/")[2] for one in files[:3]} | ({files[3]: own} if own else {}), name


def caption(video: str, sample: int, text: str, total: float) -> tuple[Caption, Score]:
    """A caption that misses as many of 10 events as Total says."""
    score = Score(
        video=video, num_events=10, missing=round(10 * total), incorrect=0, hallucinated=0, num_words=len(text.split()),
        sample=sample,
    )  # fmt: skip
    return Caption(video, text, sample=sample), score


def test_choices_among_votes(load_tool):
    """A clip with gaps of 0.6, 0.4 and 0.2 between its captions, and one with a gap of 0.3."""
    tool = load_tool("lab/vote_pairs")
    references = {name: Reference(name, (Event("a dog barks", "audio"),), f"truth {name}") for name in ("a", "b")}
    judged = [
        caption("a", 0, "A cat.", 0.2), caption("a", 1, "A dog.", 0.8), caption("a", 2, "A cow.", 0.6),
        caption("a", 3, "A  cow.", 0.6), caption("b", 0, "One.", 0.5), caption("b", 1, "Two.", 0.8),
    ]  # fmt: skip
    captions, scores = zip(*judged, strict=True)

    class First:
        name = "first"

        def prefers(self, first, second):
            return 1.0 if first.total > second.total else 0.0  # always the worse caption

    votes = tool.cast_votes(captions, scores, references, voter=First(), seed=0)
    assert len(votes) == 4 and all(tool.error(chosen) > tool.error(rejected) for chosen, rejected in votes)
    pairs = [tool.to_pair(*vote, references[vote[0].caption.video], source="first") for vote in votes]
    assert sorted(round(pair.margin, 6) for pair in pairs) == [0.2, 0.3, 0.4, 0.6]
    chosen = tool.choose(pairs, [0.0] * 4, keep=2, seed=0)
    assert [(pair.video, round(pair.margin, 6)) for pair in chosen["votes_margin"]] == [("a", 0.6), ("a", 0.4)]
    assert [(pair.video, round(pair.margin, 6)) for pair in chosen["votes_one_a_clip"]] == [("a", 0.6), ("b", 0.3)]
    assert {pair.video for pair in chosen["votes_diverse"]} == {"a", "b"}
    assert tool.describe(pairs[:2], [-0.5, 0.0])["right"] == 0.0


def test_exploitability_and_rounds_of_the_game(load_tool):
    tool = load_tool("lab/cyclic_game")
    assert tool.exploitability(np.array([1.0, 0, 0, 0])) == pytest.approx(0.4)
    assert tool.exploitability(np.array([1 / 3, 1 / 3, 1 / 3, 0])) == pytest.approx(0)
    # eta 0.5 and beta 0.1: a third of the start's log-probability, two thirds of the policy's, 10/3 of the win rate.
    start, policy, wins = np.array([0.5, 0.5]), np.array([0.2, 0.8]), np.array([0.9, 0.3])
    logits = np.log(start) / 3 + 2 * np.log(policy) / 3 + 10 / 3 * wins
    expected = np.exp(logits) / np.exp(logits).sum()
    assert tool.proximal(start, policy, wins) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    mix = np.array([0.5, 0.5, 0.0, 0.0])
    # Half of the opponents have the same form. Against the other one, "plays" wins 0.9 and "is heard" 0.1.
    assert tool.win_rates(mix, mix, rng)[:2] == pytest.approx([0.7, 0.3], abs=0.03)
    skewed = np.array([0.6, 0.2, 0.15, 0.05])
    renewed, mixed = (tool.play(tool.METHODS[name], skewed, seed=0)[-1] for name in ("renewed", "mixed"))
    assert renewed > 0.2 and mixed < 0.1


def run(total: float, repetition: float = 0.02, **others: object) -> dict:
    rates = {"total": total, "repetition": repetition, "qa_accuracy": 0.7, "words": 30.0}
    return {"sft": rates | {"total": 0.6}, "rounds": [rates], "rebirth": None, "kl": {"round 1": 0.05}} | others


def test_claims_and_arms(tool, load_tool):
    """The best quarter is 5 and 1 points below all pairs; a teacher wins 2 of the 4 points back that rebirth loses."""
    reborn = {"rebirth": {"total": 0.24, "qa_accuracy": 0.7}, "kl": {"rebirth": 0.1}}
    aligned = {"rebirth": {"total": 0.22, "qa_accuracy": 0.69}, "kl": {"rebirth": 0.1}}
    results = {
        2: {"all": run(0.35), "best_quarter": run(0.30, 0.025), "all_rounds": run(0.20),
            "tailor_none": run(0.2, **reborn), "tailor_teacher": run(0.2, **aligned)},
        3: {"all": run(0.40), "best_quarter": run(0.39, 0.035), "tailor_none": run(0.2),
            "long_400": {"total": 0.5, "words": 33.0}},
    }  # fmt: skip
    lines = load_tool("lab_driver").make_table(tool.ROWS, results)
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    assert rows["best quarter below all, points: >= 2"] == [
        "5.0", "1.0", "3.0 (-22.4 to 28.4)", "in the mean, on 1 of 2 seeds",
    ]  # fmt: skip
    assert rows["Repetition on the best quarter above all, points: <= 1"][:2] == ["0.5", "1.5"]
    # The third seed's run stopped without rebirth, so that nothing is known of it.
    (won,) = [row for text, row in rows.items() if text.startswith("`teacher` below `none`, points: >= 1.1")]
    assert won == ["2.0", "", "", "yes (1 of 2 seeds)"]
    assert rows["control: above the last round, points"][:2] == ["4.0", ""]
    assert rows["QA accuracy of `teacher` below `none`, points: <= 0.5"][-1] == "**no** (1 of 2 seeds)"
    assert rows["control: their captions' words above the start's: > 0"][1] == "3.0"
    assert rows["after three rounds, best quarter below all, points: >= 0"][-1] == "not run"
    assert "| **GRPO** | | | | not run |" in lines
    arms = tool.arms_table(results)
    assert "| start (SFT) | 60.0 / 60.0 | - / - | - / - | 2.0 / 2.0 | 70.0 / 70.0 | 30.0 / 30.0 | - / - |" in arms
    (quarter,) = [line for line in arms if line.startswith("| best quarter of these")]
    assert quarter.split(" | ")[1] == "30.0 / 39.0" and quarter.endswith("| 0.050 / 0.050 |")
    (rebirth,) = [line for line in arms if line.startswith("| rebirth |")]
    assert rebirth.split(" | ")[1] == "24.0 / -"


def test_further_results_are_read(tool, load_tool, tmp_path):
    folder = tmp_path / "loop" / "seed_2" / "nash"
    write_json(folder / "summary.json", run(0.4))
    (folder / "round_3" / "heldout").mkdir(parents=True)
    write_json(folder / "round_3" / "heldout" / "exploitability.json", {"exploitability": 0.08})
    results = load_tool("lab_driver").read_results(tool.LAB, seeds=(2,), out=tmp_path)
    assert tool.exploited("nash", 3)(results[2]) == 0.08
    with pytest.raises(KeyError):
        tool.exploited("nash", 2)(results[2])
