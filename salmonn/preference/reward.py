"""Rewards of the recipes, and the factories that build them and their judges from configuration.

To add a reward, write a subclass of `Reward` (salmonn/preference/rating.py) in a separate file, and name it in
`RewardConfig.kind` and `make_reward`; sampling, selection and training do not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, assert_never

from salmonn.preference.llm_voter import LLMVoterReward
from salmonn.preference.rating import Rating, Reward
from salmonn.preference.voter_reward import JudgeVoterReward, SimulatedVoterReward
from salmonn.records import Reference, Score, Unscored
from salmonn.score.api_keys import API_KEY_FLAG
from salmonn.score.budget import Budget
from salmonn.score.config import JudgeConfig
from salmonn.score.formats import read_scores, write_scores
from salmonn.score.judge import Judge, ScoringTask
from salmonn.score.llm_client import LLMClient
from salmonn.score.llm_judge import EventPrompt, LLMJudge
from salmonn.score.published import TEMPLATES
from salmonn.score.scoring import make_judge_info
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.raters import VoterKind, make_voter


@dataclass(frozen=True)
class RewardConfig:
    """Reward that captions are rated by.

    Args:
        kind: "judge" rates by the judge's event counts, as -(Total + repetition_weight * repetition), plus
            dialogue_weight * dialogue accuracy; "model" lets the judge label a few clips and rates all captions by a
            reward model trained on them (docs/reward.md); "voter" rates a caption by how often a voter prefers it to
            the clip's other samples.
        voter: for kind "voter": "judge" prefers the caption that kind "judge" rates higher; "llm" is the judge's
            language model, asked about each pair of captions in both orders; the others are simulated, for synthetic
            clips (docs/raters.md).
        repetition_weight: penalty for a caption that consists of repeated clauses alone. A reward model learns Total
            alone; there repetition is counted in the text, and the weight is in standard deviations of the reward.
        dialogue_weight: weight, 0 or more, of the dialogue accuracy (docs/metrics.md) where references quote their
            speech; 0 leaves it out.
        model: folder of a reward model for the first round; none trains one on labels. Only with kind "model", as all
            of the following.
        prototype: of an ideal-point model: number, from 1, of the prototype that rates, or "worst" for the smallest of
            all prototypes' rewards; none for the mean rater. The model must be given, and refresh_clips be 0, since the
            judge's labels would train one reward for all.
        seed_clips: clips whose captions the judge labels in the first round.
        refresh: later rounds in which the judge labels further clips and the model is trained again: "always" for all,
            "on_demand" for those whose audit finds an agreement below min_agreement, or one whose 95 % interval
            reaches below one half.
        refresh_clips: number of these clips in a round; 0 keeps the first model.
        audit_clips, audit_samples: clips, and captions of each, on which every later round compares model and judge.
            Half of the clips are those on which an ensemble (reward_training.ensemble) disagrees most, if there is one.
        min_agreement: agreement with the judge below which the model is trained again with refresh "on_demand". Where
            refresh_clips is 0, a warning asks for more labels instead.
        min_confidence: smallest probability, by the model, that the chosen caption of a pair is better.
        length_penalty: subtracted from the reward for each character, in standard deviations.
        caution: multiple of the rating's spread that is subtracted from the reward, so that captions on which the heads
            of an ensemble (reward_training.ensemble) disagree are chosen less.
    """

    kind: Literal["judge", "model", "voter"] = "judge"
    voter: Literal[VoterKind, "judge", "llm"] = "metric"
    repetition_weight: float = 1.0
    dialogue_weight: float = 0.0
    model: Path | None = None
    prototype: int | Literal["worst"] | None = None
    seed_clips: int = 100
    refresh: Literal["always", "on_demand"] = "always"
    refresh_clips: int = 40
    audit_clips: int = 24
    audit_samples: int = 4
    min_agreement: float = 0.65
    min_confidence: float = 0.7
    length_penalty: float = 0.0
    caution: float = 0.0

    def __post_init__(self) -> None:
        if self.repetition_weight < 0 or self.dialogue_weight < 0:
            raise ValueError(
                "repetition_weight and dialogue_weight must be at least 0, got "
                f"{self.repetition_weight} and {self.dialogue_weight}"
            )
        if self.model and self.kind != "model":
            raise ValueError(f"reward.model {self.model} is only used with --reward.kind model")
        only_with = (
            ("model", "length_penalty", self.length_penalty, 0.0),
            ("model", "caution", self.caution, 0.0),
            ("model", "refresh", self.refresh, "always"),
            ("voter", "voter", self.voter, "metric"),
        )
        for kind, name, value, default in only_with:
            if kind != self.kind and value != default:
                raise ValueError(f"reward.{name} {value} has no effect with reward.kind {self.kind}; leave it out")
        if self.dialogue_weight and not self.rates_by_judge:
            voter = f" and reward.voter {self.voter}" if self.kind == "voter" else ""
            raise ValueError(
                f"reward.dialogue_weight {self.dialogue_weight} has no effect with reward.kind {self.kind}{voter}; "
                "leave it out"
            )
        if self.prototype is not None and (self.model is None or self.refresh_clips):
            raise ValueError(
                f"reward.prototype {self.prototype} needs --reward.model with an ideal-point model, and "
                "--reward.refresh-clips 0, since the judge's labels would train one reward for all"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Raise ValueError if a number is out of range, or one of clips contradicts `refresh`."""
        if self.refresh == "on_demand" and not self.refresh_clips:
            raise ValueError(
                "reward.refresh on_demand has no effect with reward.refresh_clips 0, which keeps the first model; "
                "leave one of them out"
            )
        if self.seed_clips < 2 or self.refresh_clips < 0 or self.audit_clips < 1 or self.audit_samples < 2:
            raise ValueError(
                "seed_clips and audit_samples must be at least 2, audit_clips at least 1 and refresh_clips at least 0, "
                f"got {self.seed_clips}, {self.audit_samples}, {self.audit_clips} and {self.refresh_clips}"
            )
        if not (0.5 <= self.min_confidence < 1 and 0 <= self.min_agreement <= 1):
            raise ValueError(
                "min_confidence must be from 0.5 to below 1 and min_agreement from 0 to 1, got "
                f"{self.min_confidence} and {self.min_agreement}"
            )
        if self.length_penalty < 0 or self.caution < 0:
            raise ValueError(
                f"length_penalty and caution must be at least 0, got {self.length_penalty} and {self.caution}"
            )

    @property
    def rates_by_judge(self) -> bool:
        """Whether all captions are rated by the judge's scores alone."""
        return self.kind == "judge" or (self.kind == "voter" and self.voter == "judge")

    @property
    def is_simulated(self) -> bool:
        """Whether a simulated voter rates."""
        return self.kind == "voter" and self.voter not in ("judge", "llm")


class JudgeReward(Reward):
    """Rates captions by a judge's event counts: -(Total + repetition_weight * repetition).

    With a dialogue_weight, dialogue_weight * dialogue accuracy is added. A caption that quotes no speech has accuracy 1
    where there is none, and where the reference does not quote its speech all captions have.
    """

    file_name = "scores.jsonl"

    def __init__(self, judge: Judge, *, repetition_weight: float, dialogue_weight: float = 0.0) -> None:
        self.judge = judge
        self.repetition_weight = repetition_weight
        self.dialogue_weight = dialogue_weight

    @property
    def name(self) -> str:
        """Name of the judge."""
        return self.judge.name

    def check(self, reference: Reference) -> None:
        """Raise ValueError if the judge cannot use this reference."""
        self.judge.check(reference)

    def rate(self, tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Judge captions and rate them by their scores."""
        results = self.judge.judge(tasks)
        return [result if isinstance(result, Unscored) else self.to_rating(result) for result in results]

    def save(self, path: Path, ratings: Sequence[Rating | Unscored]) -> None:
        """Write the judge's scores as a score file."""
        results = [result if isinstance(result, Unscored) else result.score for result in ratings]
        write_scores(path, make_judge_info(self.judge), [result for result in results if result])

    def load(self, path: Path) -> list[Rating]:
        """Read a score file and rate its captions by their scores."""
        return [self.to_rating(score) for score in read_scores(path).scores]

    def to_rating(self, score: Score) -> Rating:
        """Convert a judge's score to a rating."""
        parts = {"total": score.total, "repetition": score.repetition}
        weights = {"total": -1.0, "repetition": -self.repetition_weight}
        if self.dialogue_weight:
            parts["dialogue"] = score.dialogue.accuracy if score.dialogue else 1.0
            weights["dialogue"] = self.dialogue_weight
        return Rating(
            video=score.video,
            parts=parts,
            weights=weights,
            sample=score.sample,
            score=score,
        )


def make_reward(config: RewardConfig, *, judge: Judge) -> Reward:
    """Build the reward by the judge; with kind "model" it labels the clips that the model learns from.

    Args:
        config: kind and weights.
        judge: judge of the run, which the judge reward uses.

    Raises:
        ValueError: the voter llm has no language model.
    """
    if config.kind == "voter":
        return _make_voter_reward(config, judge)
    return _make_judge_reward(config, judge)


def _make_judge_reward(config: RewardConfig, judge: Judge) -> JudgeReward:
    return JudgeReward(judge, repetition_weight=config.repetition_weight, dialogue_weight=config.dialogue_weight)


def _make_voter_reward(config: RewardConfig, judge: Judge) -> Reward:
    if config.voter == "judge":
        return JudgeVoterReward(_make_judge_reward(config, judge))
    if config.voter == "llm":
        if not isinstance(judge, LLMJudge):
            raise ValueError(
                f"reward.voter llm asks the judge's language model, and judge.kind {judge.name} has none; use "
                "--judge.kind openai, or --reward.voter judge"
            )
        return LLMVoterReward(judge.client, attempts=len(judge.templates))
    return SimulatedVoterReward(judge, make_voter(config.voter))


def make_judge(
    config: JudgeConfig, *, published: bool = False, processes: int = 1, client: LLMClient | None = None
) -> Judge:
    """Build the judge that the configuration names.

    Args:
        config: kind of judge and, for a language model, its server and limits.
        published: ask a language model, and parse its replies, as the published scorer does.
        processes: number of processes that share the request caps and the concurrency.
        client: client of the language model; None makes one.
    """
    match config.kind:
        case "rule":
            return RuleJudge()
        case "openai":
            client = client or make_llm_client(config, processes=processes)
            if published:
                return LLMJudge(client, templates=TEMPLATES, as_published=True)
            return LLMJudge(client, templates=[EventPrompt()] * config.attempts)
        case _:
            assert_never(config.kind)


def make_llm_client(
    config: JudgeConfig, *, processes: int = 1, budget: Budget | None = None, key_flag: str = API_KEY_FLAG
) -> LLMClient:
    """Build the client of a language model with one process's share of the caps and the concurrency.

    Args:
        config: server and limits.
        processes: number of processes that share them.
        budget, key_flag: see `ChatClient`.

    Raises:
        ValueError: a cap is smaller than the number of processes.
    """

    def share(cap: int | None) -> int | None:
        if cap is not None and cap < processes:
            raise ValueError(f"{processes} processes cannot share a cap of {cap}: raise max_requests or max_tokens")
        return None if cap is None else cap // processes

    return LLMClient(
        replace(
            config,
            concurrency=max(1, config.concurrency // processes),
            max_requests=share(config.max_requests),
            max_tokens=share(config.max_tokens),
        ),
        budget=budget,
        key_flag=key_flag,
    )
