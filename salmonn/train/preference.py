"""Preference training: examples, batches, and the loss of a batch.

All answers about a clip share its prefix: the clip's tokens pass through the decoder once, the answers of every role
behind them. Which rows of a batch belong to which role is written in the batch (`PreferenceBatch.rows`). An example is
a comparison, or for GRPO a clip with all its samples, which have the role "sample".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from salmonn import dist
from salmonn.caption.processor import Processor, PromptRow
from salmonn.model.layout import ClipFeatures, ModelInputs
from salmonn.preference.groups import CaptionGroup
from salmonn.preference.losses import Advantages, Clauses, PreferenceLoss, Role, RoleLogps, TokenLogps
from salmonn.records import Comparison, Mark
from salmonn.train.data import ClipSet, ClipSource, ModelBatch, SftBatch, SftBatches, batch_at, sft_loss, split_evenly

# Of one example: the sum over the tokens of a role's only answer, or each answer's log-probabilities of single tokens.
Logps = Mapping[Role, float | list[list[float]]]


@dataclass(frozen=True)
class PreferenceExample:
    """A comparison with the features of its clip: one answer for each role.

    Args:
        comparison: the comparison.
        features: features of its clip.
        other: a comparison about another clip, whose chosen caption is the mismatched answer.
    """

    comparison: Comparison
    features: ClipFeatures
    other: Comparison | None = None

    @property
    def video(self) -> str:
        """Video of the clip."""
        return self.comparison.video

    @property
    def prompt(self) -> str:
        """Prompt that the answers are to."""
        return self.comparison.prompt

    @property
    def history(self) -> tuple[tuple[str, str], ...]:
        """Earlier turns of the conversation, (prompt, answer) each."""
        return self.comparison.history

    def answers(self, role: Role) -> list[tuple[str, bool]]:
        """Return the only answer of a role, and whether it has an end and was not cut off at the token limit."""
        one, name = self.comparison, str(role)
        if role == "ground_truth":
            return [(one.ground_truth, bool(one.ground_truth))]  # without one, there must be no end to learn either
        if role == "mismatched":
            assert self.other is not None, "make_preference_examples adds another clip's comparison for such losses"
            one, name = self.other, "chosen"
        return [(getattr(one, name), getattr(one, f"{name}_finished"))]


@dataclass(frozen=True)
class GroupExample:
    """All samples of a clip with their advantages: the roles "sample" and "ground_truth"."""

    group: CaptionGroup
    features: ClipFeatures
    history: tuple[tuple[str, str], ...] = ()

    @property
    def video(self) -> str:
        """Video of the clip."""
        return self.group.captions[0].video

    @property
    def prompt(self) -> str:
        """Prompt that the samples answer."""
        return self.group.captions[0].prompt

    def answers(self, role: Role) -> list[tuple[str, bool]]:
        """Return the samples or the ground truth, each with whether it is finished."""
        if role == "ground_truth":
            return [(self.group.ground_truth, True)]
        return [(caption.text, caption.finished) for caption in self.group.captions]


# Answers about a clip, by role. Examples about the same clip hold the same features object.
Example = PreferenceExample | GroupExample


def make_preference_examples(
    comparisons: Sequence[tuple[Comparison, ClipFeatures]], roles: Sequence[Role]
) -> list[PreferenceExample]:
    """Join comparisons with the data that a loss's roles need; the mismatched answer is that of the next other clip.

    Raises:
        ValueError: a loss needs captions of other clips, and there is only one clip.
    """
    if "mismatched" not in roles:
        return [PreferenceExample(one, features) for one, features in comparisons]
    examples = []
    for index, (one, features) in enumerate(comparisons):
        following = (other for other, _ in [*comparisons[index + 1 :], *comparisons[:index]])
        other = next((other for other in following if other.video != one.video and other.chosen), None)
        if other is None:
            raise ValueError(
                "loss.kind kto estimates the KL divergence from chosen captions of other clips, and fewer than two "
                "clips have one; add some (in feedback, captions rated good), or use loss.kind bco_pair"
            )
        examples.append(PreferenceExample(one, features, other))
    return examples


def make_pair_examples(
    pairs: Sequence[Comparison], clips: ClipSet, *, roles: Sequence[Role]
) -> list[PreferenceExample]:
    """Join pairs with the features of their clips, as `make_preference_examples`."""
    sources = [ClipSource.of_comparison(pair, root=clips.root) for pair in pairs]
    features = [clips.features[source] for source in sources]
    return make_preference_examples(list(zip(pairs, features, strict=True)), roles)


@dataclass(frozen=True)
class PreferenceBatch(ModelBatch):
    """A micro-batch of B examples.

    Args:
        inputs: inputs of the model, one row for each answer.
        rows: role -> its rows of the inputs, in the order of the examples: B, or A for the samples of B clips.
        reference_logps: role -> log-probabilities by the reference policy: (B,) sums, or (A, T) of single tokens.
        mean_num_examples: number of examples of the whole step, divided by the number of ranks.
        clips: names of its clips, for error messages.
        advantages: advantages of the samples, if the examples are groups.
        clauses: marked clauses of chosen and rejected answers, if the loss needs single tokens.
        margins: (B,) margins of comparisons; NaN where they are unknown.
    """

    rows: Mapping[Role, slice]
    reference_logps: Mapping[Role, Tensor]
    mean_num_examples: float
    clips: tuple[str, ...]
    advantages: Advantages | None = None
    clauses: Mapping[Role, Clauses] = field(default_factory=dict)
    margins: Tensor | None = None


@dataclass
class PreferenceBatches:
    """Batches of examples with their reference log-probabilities, in a new seeded order each epoch.

    Args:
        examples: all comparisons, or all groups; the same on every rank.
        reference_logps: log-probabilities of their answers, as `compute_reference_logps` returns them.
        processor: processor of the model.
        roles: answers of an example that the loss needs.
        batch_size: examples per step over all ranks.
        seed: seed of the order.
        gradient_accumulation_steps: number of micro-batches of a rank, at most its number of examples.
    """

    examples: Sequence[Example]
    reference_logps: Sequence[Logps]
    processor: Processor
    _: KW_ONLY
    roles: Sequence[Role]
    batch_size: int
    seed: int
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        self._scored = list(zip(self.examples, self.reference_logps, strict=True))

    def micro_batches(self, step: int) -> list[PreferenceBatch]:
        """Return this rank's micro-batches of a step."""
        mine = dist.shard(batch_at(self._scored, step, batch_size=self.batch_size, seed=self.seed))
        micro_batches = []
        for part in split_evenly(mine, self.gradient_accumulation_steps):
            examples = [example for example, _ in part]
            inputs, rows = collate_roles(examples, self.roles, self.processor)
            reference = {role: _to_tensor([logps[role] for _, logps in part]) for role in part[0][1]}
            clips = tuple(example.video for example in examples)
            mean_num_examples = self.batch_size / dist.world_size()
            advantages = _join_advantages([one.group for one in examples if isinstance(one, GroupExample)])
            clauses: dict[Role, Clauses] = {}
            pairs = [one.comparison for one in examples if isinstance(one, PreferenceExample)]
            if pairs and any(logps.ndim > 1 for logps in reference.values()):
                marked: dict[Role, list[tuple[str, Sequence[Mark]]]] = {
                    "chosen": [(one.chosen, one.chosen_marks) for one in pairs],
                    "rejected": [(one.rejected, one.rejected_marks) for one in pairs],
                }
                clauses = {
                    role: _find_clauses(answers, self.processor, num_tokens=reference[role].shape[1])
                    for role, answers in marked.items()
                }
            margins = torch.tensor([math.nan if one.margin is None else one.margin for one in pairs])
            micro_batches.append(
                PreferenceBatch(inputs, rows, reference, mean_num_examples, clips, advantages, clauses, margins)
            )
        return micro_batches


def _find_clauses(answers: Sequence[tuple[str, Sequence[Mark]]], processor: Processor, *, num_tokens: int) -> Clauses:
    """Return the tokens of the marked clauses of answers: those that overlap with a clause by a character."""
    size = max(len(marks) for _, marks in answers)
    tokens = torch.zeros(len(answers), size, num_tokens, dtype=torch.bool)
    signs = torch.zeros(len(answers), size, dtype=torch.long)
    for row, (text, marks) in enumerate(answers):
        starts, ends = torch.tensor(processor.token_offsets(text), dtype=torch.long).reshape(-1, 2).unbind(-1)
        for column, mark in enumerate(marks):
            signs[row, column] = 1 if mark.is_right else -1
            tokens[row, column, : len(starts)] = (starts < mark.end) & (mark.start < ends)
    return Clauses(tokens, signs)


def _to_tensor(logps: Sequence[float | list[list[float]]]) -> Tensor:
    """Return the log-probabilities of one role in several examples: (B,) sums, or (A, T) of single tokens."""
    if all(isinstance(one, float | int) for one in logps):
        return torch.tensor(logps)
    answers = [answer for one in logps if isinstance(one, list) for answer in one]
    return pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True)


def _join_advantages(groups: Sequence[CaptionGroup]) -> Advantages | None:
    if not groups:
        return None
    values = torch.tensor([value for group in groups for value in group.advantages])
    return Advantages(values, [len(group.captions) for group in groups])


def collate_roles(
    examples: Sequence[Example], roles: Sequence[Role], processor: Processor
) -> tuple[ModelInputs, dict[Role, slice]]:
    """Collate the answers of B examples; returns the inputs and, for each role, its rows."""
    clips = {id(example.features): example.features for example in examples}
    index_of = {key: index for index, key in enumerate(clips)}
    rows: list[PromptRow] = []
    slices: dict[Role, slice] = {}
    for role in roles:
        first = len(rows)
        rows += [
            PromptRow(index_of[id(one.features)], one.prompt, answer, one.history, finished=is_finished)
            for one in examples
            for answer, is_finished in one.answers(role)
        ]
        slices[role] = slice(first, len(rows))
    return processor.collate(rows, list(clips.values())), slices


def split_tokens(token_logps: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the log-probabilities of each answer's tokens alone; arguments as in `role_logps`."""
    is_answer = labels[:, 1:] != -100
    return [row[mask] for row, mask in zip(token_logps, is_answer, strict=True)]


def role_logps(
    token_logps: Tensor,
    labels: Tensor,
    rows: Mapping[Role, slice],
    reference_logps: Mapping[Role, Tensor] | None = None,
    advantages: Advantages | None = None,
    clauses: Mapping[Role, Clauses] | None = None,
) -> dict[Role, RoleLogps]:
    """Sum log-probabilities over the tokens of each answer (arXiv 2305.18290).

    Args:
        token_logps: (R, L - 1) log-probabilities of the answers' tokens, 0 elsewhere.
        labels: (R, L) ids of the answers' tokens, -100 elsewhere.
        rows: role -> its rows.
        reference_logps: role -> log-probabilities by the reference policy, if any: (B,) sums, or (A, T) of single
            tokens, which are then returned too.
        advantages: advantages of the samples.
        clauses: role -> marked clauses.
    """
    num_tokens = (labels[:, 1:] != -100).sum(-1)
    reference = {role: logps.to(token_logps.device) for role, logps in (reference_logps or {}).items()}
    result: dict[Role, RoleLogps] = {}
    for role, part in rows.items():
        sums, count, before = token_logps[part].sum(-1), num_tokens[part], reference.get(role)
        if before is None or before.ndim == 1:
            result[role] = RoleLogps(sums, count, before)
            continue
        policy = pad_sequence(split_tokens(token_logps[part], labels[part]), batch_first=True)
        mask = torch.arange(policy.shape[1], device=count.device) < count.unsqueeze(-1)
        tokens = TokenLogps(policy, before, mask)
        of_samples = advantages.to(policy.device) if advantages and role == "sample" else None
        marked = clauses[role].to(policy.device) if clauses and role in clauses else None
        result[role] = RoleLogps(sums, count, before.sum(-1), tokens, of_samples, marked)
    return result


@dataclass(frozen=True)
class PreferenceBatchLoss:
    """Computes a preference loss on micro-batches: their share of the mean over the step's examples."""

    loss: PreferenceLoss

    def __call__(self, model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss, and its parts for the log."""
        inputs = batch.inputs.to(dist.device())
        logps = role_logps(
            model(inputs), inputs.labels, batch.rows, batch.reference_logps, batch.advantages, batch.clauses
        )
        if "chosen" in logps and batch.margins is not None:
            logps["chosen"] = replace(logps["chosen"], margins=batch.margins.to(inputs.labels.device))
        output = self.loss.compute(logps)
        count = batch.mean_num_examples
        return output.loss.sum() / count, {name: part.sum().item() / count for name, part in output.parts.items()}


@dataclass(frozen=True)
class MixedBatches:
    """Batches of comparisons with questions among them.

    Args:
        preferences: batches of comparisons.
        questions: batches of questions, from the rank that follows the last comparison's.
    """

    preferences: PreferenceBatches
    questions: SftBatches

    def micro_batches(self, step: int) -> list[PreferenceBatch | SftBatch]:
        """Return this rank's micro-batches of a step."""
        return [*self.preferences.micro_batches(step), *self.questions.micro_batches(step)]


@dataclass(frozen=True)
class MixedBatchLoss:
    """Computes a preference loss on comparisons and cross-entropy on questions, each weighted by its share."""

    loss: PreferenceLoss
    qa_fraction: float

    def __call__(self, model: nn.Module, batch: PreferenceBatch | SftBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss, and for the log the parts of the preference loss or the cross-entropy `qa`."""
        if isinstance(batch, SftBatch):
            value, _ = sft_loss(model, batch)
            return self.qa_fraction * value, {"qa": value.item()}
        value, parts = PreferenceBatchLoss(self.loss)(model, batch)
        return (1 - self.qa_fraction) * value, parts
