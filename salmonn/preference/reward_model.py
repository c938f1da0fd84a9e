"""Reward models: a captioner whose decoder's states are read by a head that rates captions without knowing the events.

    model = RewardModel.load("run/reward")
    model.rewards([PromptRow(0, prompt, "A red circle ...")], [clip])

A folder holds reward.json, head.safetensors and, if the decoder was adapted, a PEFT adapter; the base model is loaded
from where it was trained, and must have the same weights.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import PromptRow
from salmonn.files import parse_json, temporary_path, write_json
from salmonn.model.fingerprint import hash_model
from salmonn.model.loading import Placement
from salmonn.model.lora import ADAPTER_CONFIG_NAME, load_adapter, merge_adapter
from salmonn.model.pooling import AnswerStates, Pooling, pooled_width
from salmonn.preference.agreement import Agreement
from salmonn.preference.comparisons import AnswerGroup, join_pair
from salmonn.preference.heads import Head, ObjectiveHead, ScalarHead
from salmonn.preference.mixture import (
    RATERS_NAME,
    MixtureHead,
    Prototype,
    PrototypeInfo,
    WorstHead,
    choose_weights,
    make_mixture,
)
from salmonn.preference.rating import Rating, Reward
from salmonn.preference.states import Clip, answer_rows, answer_states
from salmonn.records import Caption, Modality, Unscored
from salmonn.score.judge import ScoringTask
from salmonn.score.repetition import count_repeated_words

RewardKind = Literal["bradley-terry", "pairwise", "claims", "objectives", "ideal-point"]
RewardHead = Head | MixtureHead | WorstHead

INFO_NAME, HEAD_NAME, ADAPTER_DIR = "reward.json", "head.safetensors", "adapter"
REWARD_FORMAT = 3  # with 2, the gate of named objectives read the clip, too


@dataclass(frozen=True)
class RewardInfo:
    """Contents of reward.json.

    Args:
        kind: "bradley-terry" gives each caption a reward, "pairwise" reads two captions at once, "objectives" weighs
            named objectives, and "ideal-point" has a reward for each rater.
        pooling: states that the head reads.
        base: folder or hub id of the captioner.
        base_fingerprint: hash of its weights.
        frames, reader: arguments of its frame sampler, and the decoder of frames, in training; rated clips are read so.
        modalities: what of the clips the compared captions were about.
        mean, std: of the rewards of the training clips' captions, by which rewards are standardized.
        temperature: P(a over b) = sigmoid((r(a) - r(b)) / temperature), of rewards before standardization.
        source: source of the comparisons.
        num_comparisons, num_clips: size of the training set.
        agreement: measured on held-out clips.
        gate_widths: widths of the network that weighs the objectives; empty for other kinds.
        objectives: their names, in the order of the weights.
        max_words: number of words from which the objective `length` is 1; None without objectives.
        requests: prompts that a gate has learned weights for; empty if there is only one, which needs no gate.
        ensemble: number of heads whose disagreement is the spread of a rating; 0 for none.
        prototypes: what is known of the raters of an "ideal-point" model.
        format: version of the folder's format.
    """

    kind: RewardKind
    pooling: Pooling
    base: str
    base_fingerprint: str
    frames: Mapping[str, int | float | None] = field(default_factory=dict)
    reader: str = "pyav"
    modalities: tuple[Modality, ...] = ("both",)
    mean: float = 0.0
    std: float = 1.0
    temperature: float = 1.0
    source: str = ""
    num_comparisons: int = 0
    num_clips: int = 0
    agreement: Agreement | None = None
    gate_widths: tuple[int, ...] = ()
    objectives: tuple[str, ...] = ()
    max_words: float | None = None
    requests: tuple[str, ...] = ()
    ensemble: int = 0
    prototypes: PrototypeInfo | None = None
    format: int = REWARD_FORMAT

    def probability(self, margin: float) -> float:
        """Return the probability that belongs to a difference of standardized rewards."""
        return 1 / (1 + math.exp(-margin * self.std / self.temperature))

    def margin(self, probability: float) -> float:
        """Return the difference of standardized rewards that belongs to a probability."""
        return math.log(probability / (1 - probability)) * self.temperature / self.std


@dataclass(frozen=True)
class Contribution:
    """What an objective contributes to a reward: `weight` * `value`, both of this caption."""

    objective: str
    value: float
    weight: float


class RewardModel:
    """A captioner with a head.

    Args:
        captioner: base model, with the reward model's adapter merged or attached.
        head: head that fits the pooling.
        info: kind, pooling and scale.
        name: folder of the model.
    """

    def __init__(self, captioner: Captioner, head: RewardHead, info: RewardInfo, *, name: str = "") -> None:
        self.captioner = captioner
        self.head = head.cpu().double().eval().requires_grad_(False)
        self.info = info
        self.name = name

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        base: str | None = None,
        captioner: Captioner | None = None,
        placement: Placement | None = None,
        reader: str | None = None,
        kind: RewardKind | None = None,
        rater: str | None = None,
        prototype: Prototype | None = None,
    ) -> "RewardModel":
        """Load a reward model and its base, which samples the frames of a clip as in training.

        Args:
            folder: folder of the reward model.
            base: folder or hub id of the base, if it is not where it was in training.
            captioner: the base itself, if it has been loaded; it is changed, and must sample frames as in training.
            placement, reader: see `Captioner.load`; by default the reader of the training.
            kind: kind that the caller needs; None for any.
            rater, prototype: of an ideal-point model: whose reward, a rater's by id or a prototype's by its number from
                1, or "worst" for the smallest of all prototypes' (see `WorstHead`); by default the mean rater's.

        Raises:
            ValueError: the folder holds no complete reward model, or one of another kind, format or base, or it has no
                such rater or prototype.
        """
        folder = Path(folder)
        info = read_info(folder, kind=kind)
        weights = choose_weights(folder, info.prototypes, rater=rater, prototype=prototype)
        if captioner is None:
            captioner = Captioner.load(base or info.base, placement=placement, reader=reader or info.reader)
            require_base(folder, info, captioner)
            captioner.processor.set_frames(info.frames)
        else:
            require_base(folder, info, captioner)
            require_frames(folder, info, captioner)
        if (folder / ADAPTER_DIR / ADAPTER_CONFIG_NAME).is_file():
            load_adapter(captioner.network, folder / ADAPTER_DIR)
            merge_adapter(captioner.network)
        head = read_head(folder, info, width=head_width(captioner, info.pooling))
        if weights is not None and isinstance(head, MixtureHead):
            head.weights.copy_(weights)
        if prototype == "worst" and isinstance(head, MixtureHead) and info.prototypes:
            head = WorstHead(head.head, info.prototypes.means, info.prototypes.stds)
            # Its rewards are standardized already.
            info = replace(info, mean=0.0, std=1.0, temperature=info.temperature / info.std)
        return cls(captioner, head, info, name=str(folder))

    def rewards(self, rows: Sequence[PromptRow], clips: Sequence[Clip]) -> list[float]:
        """Return the standardized reward of each row's answer; a pairwise model reads the rows of a clip in pairs.

        Args:
            rows: prompts with answers.
            clips: clips that the rows are about, as inputs or as features of this base.
        """
        if not rows:  # a process that gets no clip
            return []
        is_pairwise = self.info.kind == "pairwise"
        values = self._round_robin(rows, clips) if is_pairwise else self._values(rows, clips).tolist()
        return [(value - self.info.mean) / self.info.std for value in values]

    def compare(self, first: PromptRow, second: PromptRow, clips: Sequence[Clip]) -> float:
        """Return the probability that the first row's answer is better; exchanging both gives 1 minus it."""
        rows = [first, second]
        if self.info.kind == "pairwise":
            rows = [_join(first, second), _join(second, first)]
        a, b = self._values(rows, clips).tolist()
        return float(torch.sigmoid(torch.tensor((a - b) / self.info.temperature, dtype=torch.float64)))

    def _round_robin(self, rows: Sequence[PromptRow], clips: Sequence[Clip]) -> list[float]:
        """Return each row's mean log-odds against the other rows with its clip and prompt; 0 if there is none."""
        groups: dict[tuple[int, str], list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault((row.clip, row.prompt), []).append(index)
        games = [pair for group in groups.values() for pair in permutations(group, 2)]
        values = [0.0] * len(rows)
        if not games:
            return values
        joined = self._values([_join(rows[first], rows[second]) for first, second in games], clips).tolist()
        for (first, second), value in zip(games, joined, strict=True):
            num_others = len(groups[rows[first].clip, rows[first].prompt]) - 1
            values[first] += value / num_others
            values[second] -= value / num_others
        return values

    def _values(self, rows: Sequence[PromptRow], clips: Sequence[Clip]) -> Tensor:
        """Return the head's output for each row, (B,) float64 on the CPU."""
        values: Tensor = self.head(answer_states(self.captioner, rows, clips, pooling=self.info.pooling))
        return values

    def explain(self, rows: Sequence[PromptRow], clips: Sequence[Clip]) -> list[list[Contribution]]:
        """Return the contributions of all objectives to each row's reward.

        Raises:
            ValueError: this kind of model has no objectives.
        """
        if not isinstance(self.head, ObjectiveHead):
            raise ValueError(
                f"{self.name} is a {self.info.kind} reward model, which has no objectives; train one with --kind "
                "objectives"
            )
        states = answer_states(self.captioner, rows, clips, pooling=self.info.pooling)
        values, weights = self.head.objectives(states).tolist(), self.head.weights(states).tolist()
        return [
            [Contribution(*one) for one in zip(self.info.objectives, *row, strict=True)]
            for row in zip(values, weights, strict=True)
        ]

    def group_states(self, group: AnswerGroup, clip: Clip) -> AnswerStates:
        """Compute the states of a group's answers to its prompt, or to the default one if it is empty."""
        prompt = group.example.prompt or self.captioner.default_prompt(group.example.modality)
        return answer_states(self.captioner, answer_rows(group, prompt=prompt), [clip], pooling=self.info.pooling)

    def rows_of(
        self, captions: Sequence[Caption], features: Callable[[Caption], Clip]
    ) -> tuple[list[PromptRow], list[Clip]]:
        """Return the rows of captions, and their clips."""
        by_clip: dict[int, tuple[int, Clip]] = {}
        rows = []
        for caption in captions:
            clip = features(caption)
            index, _ = by_clip.setdefault(id(clip), (len(by_clip), clip))
            prompt = caption.prompt or self.captioner.default_prompt(caption.modality or "both")
            rows.append(PromptRow(index, prompt, caption.text, finished=caption.finished or not caption.text))
        return rows, [clip for _, clip in by_clip.values()]

    def rate(
        self, captions: Sequence[Caption], features: Callable[[Caption], Clip], *, caution: float = 0.0
    ) -> list[Rating]:
        """Rate captions by their standardized reward; results in the order of the captions.

        Args:
            captions: captions.
            features: caption -> its clip, as input or as features of this base.
            caution: weight by which the spread of the ensemble's rewards is subtracted; without an ensemble there is
                none. Named objectives are parts of the ratings, without weight.
        """
        rows, clips = self.rows_of(captions, features)
        if not rows:
            return []
        parts = dict[str, list[float]]()
        if self.info.kind == "pairwise":
            parts["reward"] = self.rewards(rows, clips)
        else:
            states = answer_states(self.captioner, rows, clips, pooling=self.info.pooling)
            parts["reward"] = ((self.head(states) - self.info.mean) / self.info.std).tolist()
            if isinstance(self.head, ObjectiveHead):
                parts |= dict(zip(self.info.objectives, self.head.objectives(states).T.tolist(), strict=True))
            if isinstance(self.head, ScalarHead) and self.head.ensemble is not None:
                parts["spread"] = self.head.spread(states).tolist()
        weights = {name: {"reward": 1.0, "spread": 0.0 - caution}.get(name, 0.0) for name in parts}
        return [
            Rating(caption.video, dict(zip(parts, values, strict=True)), weights, caption.sample)
            for caption, *values in zip(captions, *parts.values(), strict=True)
        ]


def save_reward_model(folder: Path | str, head: RewardHead, info: RewardInfo) -> None:
    """Write head and, last, reward.json; the adapter, if there is one, must be in the folder already."""
    save_head(Path(folder), head)
    write_json(Path(folder) / INFO_NAME, asdict(info))


def save_head(folder: Path, head: RewardHead) -> None:
    """Write head.safetensors, which without reward.json is not yet a reward model."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.float().contiguous() for key, value in head.state_dict().items()}
    temporary = temporary_path(folder / HEAD_NAME)
    save_file(weights, str(temporary))
    temporary.replace(folder / HEAD_NAME)


def read_info(folder: Path, *, kind: RewardKind | None = None) -> RewardInfo:
    """Read reward.json.

    Raises:
        ValueError: the folder holds no complete reward model, or one of another kind or format.
    """
    if not (folder / INFO_NAME).is_file():
        raise ValueError(f"{folder} is not a reward model: it has no {INFO_NAME}; recipes/reward.py trains one")
    if not (folder / HEAD_NAME).is_file():
        raise ValueError(
            f"{folder} has no {HEAD_NAME}: without the trained head its rewards would be random; copy that file, or "
            "train the model again"
        )
    try:
        info = parse_json((folder / INFO_NAME).read_text(encoding="utf-8"), RewardInfo)
    except ValueError as error:
        raise ValueError(f"{folder / INFO_NAME}: {error}; another version of salmonn may have written it") from error
    if info.format != REWARD_FORMAT:
        raise ValueError(
            f"{folder} has format {info.format}, but this version of salmonn reads {REWARD_FORMAT}; train it again"
        )
    if kind and info.kind != kind:
        raise ValueError(f"{folder} is a {info.kind} reward model, but a {kind} one is needed")
    return info


def hash_reward_model(folder: Path) -> str:
    """Hash the files of a reward model, by which it is recognized in any place.

    Raises:
        ValueError: the folder holds no complete reward model.
    """
    read_info(folder)
    sha = hashlib.sha256()
    for path in sorted(
        path for name in (INFO_NAME, HEAD_NAME, RATERS_NAME, f"{ADAPTER_DIR}/*") for path in folder.glob(name)
    ):
        sha.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def require_base(folder: Path, info: RewardInfo, captioner: Captioner) -> None:
    """Raise ValueError if a reward model was trained on another captioner."""
    if hash_model(captioner.network) != info.base_fingerprint:
        raise ValueError(
            f"{folder} was trained on {info.base} with other weights than those of {captioner.name}; its rewards "
            "would be meaningless. Name the model that it was trained on as its base, or train it again"
        )


def require_frames(folder: Path, info: RewardInfo, captioner: Captioner) -> None:
    """Raise ValueError if a reward model was trained on other frames of a clip than a captioner samples."""
    now = captioner.processor.frames
    if changed := {name: value for name, value in info.frames.items() if value != now.get(name)}:
        before, others = (", ".join(f"{name} {values.get(name)}" for name in changed) for values in (info.frames, now))
        raise ValueError(
            f"{folder} was trained on frames that were sampled with {before}, but they are sampled with {others}: its "
            f"rewards would mean little. Pass --frames '{json.dumps(changed)}', or train it again"
        )


def read_head(folder: Path, info: RewardInfo, *, width: int) -> RewardHead:
    """Read head.safetensors; raises ValueError if its weights do not fit."""
    head: RewardHead = ScalarHead(width, info.ensemble)
    if info.kind == "objectives":
        head = ObjectiveHead(width, info.gate_widths)
    if info.prototypes:
        head = make_mixture(info.prototypes, width)
    tensors = load_file(folder / HEAD_NAME)
    shapes = {key: list(value.shape) for key, value in tensors.items()}
    expected = {key: list(value.shape) for key, value in head.state_dict().items()}
    if shapes != expected:
        raise ValueError(f"{folder / HEAD_NAME} does not fit its {INFO_NAME}: it has {shapes}, expected {expected}")
    head.load_state_dict(tensors)
    return head


def head_width(captioner: Captioner, pooling: Pooling) -> int:
    """Return the width of the states of a captioner."""
    config = captioner.network.lm.get_decoder().config
    return pooled_width(pooling, width=config.hidden_size, num_layers=config.num_hidden_layers)


def _join(first: PromptRow, second: PromptRow) -> PromptRow:
    text, finished = join_pair((first.answer or "", first.finished), (second.answer or "", second.finished))
    return replace(first, answer=text, finished=finished)


class ModelReward(Reward):
    """A reward model as the reward of a recipe; it needs no events.

    Args:
        model: the reward model.
        features: caption -> features of its clip by the model's base.
        length_penalty: subtracted from the reward for each character of a caption, in standard deviations.
        repetition_weight: subtracted for a caption that consists of repeated clauses alone, in standard deviations.
        caution: see `RewardModel.rate`.
    """

    def __init__(
        self,
        model: RewardModel,
        features: Callable[[Caption], Clip],
        *,
        length_penalty: float = 0.0,
        repetition_weight: float = 0.0,
        caution: float = 0.0,
    ) -> None:
        self.model = model
        self.features = features
        self.length_penalty = length_penalty
        self.repetition_weight = repetition_weight
        self.caution = caution

    @property
    def name(self) -> str:
        """Folder of the model."""
        return self.model.name

    def rate(self, tasks: Sequence[ScoringTask]) -> list[Rating | Unscored]:
        """Rate captions."""
        captions = [task.caption for task in tasks]
        weights = {"characters": -self.length_penalty, "repetition": -self.repetition_weight}
        weights = {name: weight for name, weight in weights.items() if weight}
        rated = list[Rating | Unscored]()
        ratings = self.model.rate(captions, self.features, caution=self.caution)
        for rating, caption in zip(ratings, captions, strict=True):
            num_repeated, num_words = count_repeated_words(caption.text)
            parts = {"characters": float(len(caption.text)), "repetition": num_repeated / max(num_words, 1)}
            parts = {name: parts[name] for name in weights}
            rated.append(replace(rating, parts={**rating.parts, **parts}, weights={**rating.weights, **weights}))
        return rated
