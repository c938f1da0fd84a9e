"""Variants of mrDPO that `ablation.py` trains, the rows of its table, and the differences that the papers suggest."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """A training run that differs from mrDPO in some flags.

    Args:
        flags: recipe flags that differ from the base configuration.
        copied: glob patterns of the results that are copied from the seed's mrDPO run.
        one_round: run a single round with the steps of all rounds.
        retrain_last: copy only the pairs of the last round and train it again.
    """

    flags: dict[str, object]
    copied: tuple[str, ...] = ("sft",)
    one_round: bool = False
    retrain_last: bool = False


FIRST_SAMPLES = ("sft", "round_1/captions.jsonl", "round_1/scores.jsonl")
FIRST_PAIRS = (*FIRST_SAMPLES, "round_1/pairs.jsonl")
NO_REBIRTH: dict[str, object] = {"rebirth": "null"}
FIXED_PAIRS = NO_REBIRTH | {"fresh_pairs": "false"}
# More cross-entropy at a higher rate, on the best pairs: docs/lab.md, part B.
MORE_CE: dict[str, object] = {"subset.keep": 0.25, "loss.ce_weight": 1.0, "fit.learning_rate": 7e-4}
BASE = "mrdpo"
# With a fresh LoRA the start of a round is its reference policy, so the first round of several variants is the same.
VARIANTS = {
    BASE: Variant({}, ()),
    "no_ce": Variant(NO_REBIRTH | {"loss.ce_weight": 0.0}, FIRST_PAIRS),
    "long_dpo": Variant(NO_REBIRTH | {"loss.ce_weight": 0.0}, FIRST_PAIRS, one_round=True),
    "long_gdpo": Variant(NO_REBIRTH, FIRST_PAIRS, one_round=True),
    "fixed_reference": Variant(FIXED_PAIRS | {"reference_policy": "run_start"}, ("sft", "round_1")),
    "fixed_pairs": Variant(FIXED_PAIRS, ("sft", "round_1")),
    "qa_last_round": Variant(NO_REBIRTH | {"qa_fraction": 0.25}, ("sft", "round_*"), retrain_last=True),
    "tune_best": Variant({"rebirth.start": "best"}, ("sft", "round_*", "rebirth/captions.jsonl")),
    "more_ce": Variant(MORE_CE, FIRST_SAMPLES),
    "ce_alone": Variant(NO_REBIRTH | MORE_CE | {"loss.beta": 1e-6}, FIRST_SAMPLES),
}


@dataclass(frozen=True)
class TableRow:
    """A row of the results table: a stage of a run, with the Total (%) that the papers report for it, if any."""

    title: str
    variant: str
    stage: Literal["sft", "last", "rebirth"] = "last"
    published_total: float | None = None


ROWS = {
    "sft": TableRow("SFT", BASE, "sft", 41.8),
    "long_dpo": TableRow("DPO, one long round", "long_dpo", published_total=37.8),
    "long_gdpo": TableRow("guided DPO, one long round", "long_gdpo", published_total=39.7),
    "fixed_reference": TableRow("+ LoRA merged and renewed", "fixed_reference", published_total=33.7),
    "fixed_pairs": TableRow("+ reference policy renewed", "fixed_pairs"),
    "mrdpo": TableRow("+ new pairs: mrDPO", BASE, published_total=22.9),
    "no_ce": TableRow("mrDPO without CE", "no_ce"),
    "qa_last_round": TableRow("mrDPO, QA in the last round", "qa_last_round"),
    "rebirth": TableRow("rebirth", BASE, "rebirth"),
    "tune_best": TableRow("rebirth from the mrDPO model", "tune_best", "rebirth"),
    "more_ce": TableRow("best pairs, more CE, higher rate", "more_ce"),
    "ce_alone": TableRow("more CE, higher rate, without DPO", "ce_alone"),
    "more_ce_rebirth": TableRow("rebirth after best pairs, more CE", "more_ce", "rebirth"),
}


@dataclass(frozen=True)
class Hypothesis:
    """A difference that the papers suggest: the measure falls or rises from the first row to the second."""

    text: str
    first: str
    second: str
    measure: str
    direction: Literal["falls", "rises"]


HYPOTHESES = (
    Hypothesis("long DPO vs. SFT", "sft", "long_dpo", "total", "falls"),
    Hypothesis("guided vs. plain long DPO", "long_dpo", "long_gdpo", "total", "rises"),
    Hypothesis("LoRA merged and renewed", "long_gdpo", "fixed_reference", "total", "falls"),
    Hypothesis("reference policy renewed", "fixed_reference", "fixed_pairs", "total", "falls"),
    Hypothesis("new pairs each round", "fixed_pairs", "mrdpo", "total", "falls"),
    Hypothesis("mrDPO vs. long guided DPO", "long_gdpo", "mrdpo", "total", "falls"),
    Hypothesis("CE vs. none in mrDPO: Total", "no_ce", "mrdpo", "total", "falls"),
    Hypothesis("CE vs. none in mrDPO: QA", "no_ce", "mrdpo", "qa_accuracy", "rises"),
    Hypothesis("QA in the last round: QA", "mrdpo", "qa_last_round", "qa_accuracy", "rises"),
    Hypothesis("rebirth vs. mrDPO: QA", "mrdpo", "rebirth", "qa_accuracy", "rises"),
    Hypothesis("rebirth from SFT vs. from mrDPO: QA", "tune_best", "rebirth", "qa_accuracy", "rises"),
    Hypothesis("rebirth from SFT vs. from mrDPO: Total", "tune_best", "rebirth", "total", "falls"),
    Hypothesis("best pairs, more CE: Total", "mrdpo", "more_ce", "total", "falls"),
    Hypothesis("best pairs, more CE: Repetition", "mrdpo", "more_ce", "repetition", "falls"),
    Hypothesis("best pairs, more CE, rebirth: Total", "rebirth", "more_ce_rebirth", "total", "falls"),
    Hypothesis("pairs vs. CE alone: Total", "ce_alone", "more_ce", "total", "falls"),
    Hypothesis("pairs vs. CE alone: Repetition", "ce_alone", "more_ce", "repetition", "falls"),
)
