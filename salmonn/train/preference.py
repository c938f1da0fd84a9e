"""Preference training: batches of comparisons, log-probabilities of the reference policy, and the loss of a batch.

All answers about a clip share its prefix: the clip's tokens pass through the decoder once, the answers of every role
behind them. Which rows of a batch belong to which role is written in the batch (`PreferenceBatch.rows`). An example is
a comparison, or for GRPO a clip with all its samples, which have the role "sample".
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from salmonn import dist
from salmonn.caption.processor import Processor, PromptRow
from salmonn.model.fingerprint import hash_values, hash_weights
from salmonn.model.layout import ClipFeatures, ModelInputs
from salmonn.model.network import Network
from salmonn.preference.groups import CaptionGroup
from salmonn.preference.losses import Advantages, Clauses, PreferenceLoss, Role, RoleLogps, TokenLogps
from salmonn.records import Comparison, Mark, read_json, write_json
from salmonn.train.data import ClipSet, ClipSource, SftBatch, SftBatches, batch_at, sft_loss, split_evenly
from salmonn.train.feature_cache import hash_features, hash_tokenizer

log = logging.getLogger(__name__)
REFERENCE_LOGPS_NAME = "reference_logps.json"
START_LOGPS_NAME = "start_logps.json"  # by the run's start, where the reference policy is a mixture with it
REFERENCE_LOGPS_FORMAT = 1
# Of one example: the sum over the tokens of a role's only answer, or each answer's log-probabilities of single tokens.
Logps = Mapping[Role, float | list[list[float]]]


class Example(Protocol):
    """Answers about a clip, by role; examples about the same clip hold the same features object."""

    @property
    def features(self) -> ClipFeatures: ...

    @property
    def video(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    @property
    def history(self) -> tuple[tuple[str, str], ...]: ...

    def answers(self, role: Role) -> Sequence[tuple[str, bool]]:
        """Return each answer of a role, and whether it has an end and was not cut off at the token limit."""
        ...


@dataclass(frozen=True)
class PreferenceExample:
    """A comparison with the features of its clip, an `Example` with one answer for each role.

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
        """Return the only answer of a role, and whether it is finished."""
        one, name = self.comparison, str(role)
        if role == "ground_truth":
            return [(one.ground_truth, bool(one.ground_truth))]  # without one, there must be no end to learn either
        if role == "mismatched":
            assert self.other is not None, "make_preference_examples adds another clip's comparison for such losses"
            one, name = self.other, "chosen"
        return [(getattr(one, name), getattr(one, f"{name}_finished"))]


@dataclass(frozen=True)
class GroupExample:
    """All samples of a clip with their advantages, an `Example` with the roles "sample" and "ground_truth"."""

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


def make_preference_examples(
    comparisons: Sequence[tuple[Comparison, ClipFeatures]], roles: Sequence[Role]
) -> list[PreferenceExample]:
    """Join comparisons with what a loss's roles need; the mismatched answer is that of the next other clip.

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
class PreferenceBatch:
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

    inputs: ModelInputs
    rows: Mapping[Role, slice]
    reference_logps: Mapping[Role, Tensor]
    mean_num_examples: float
    clips: tuple[str, ...]
    advantages: Advantages | None = None
    clauses: Mapping[Role, Clauses] = field(default_factory=dict)
    margins: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens that pass through the decoder."""
        return self.inputs.num_tokens


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


def compute_reference_logps(
    network: Network,
    examples: Sequence[Example],
    processor: Processor,
    *,
    roles: Sequence[Role],
    batch_size: int,
    per_token: bool = False,
    path: Path | None = None,
) -> list[Logps]:
    """Compute the log-probabilities of answers by the reference policy: the network with its adapter disabled.

    Clips are balanced over ranks. With a path, results are written to that file; a later call uses
    them again if everything that they depend on is unchanged and each rank reproduces its first batch.

    Args:
        network: model with an adapter.
        examples: examples, the same on every rank.
        processor: processor of the model.
        roles: answers that the loss compares with the reference policy.
        batch_size: examples of a forward pass.
        per_token: return the log-probabilities of single tokens; otherwise each role must have one answer.
        path: file of the results; none to compute without a cache.

    Returns:
        For each example the summed log-probability of each role's answer, or those of the tokens of all its answers.
    """
    groups: dict[int, list[int]] = {}  # examples about the same clip, whose prefix they share
    for index, example in enumerate(examples):
        groups.setdefault(id(example.features), []).append(index)
    by_clip = list(groups.values())
    costs = [
        len(examples[group[0]].features)
        + sum(len(text.split()) for index in group for role in roles for text, _ in examples[index].answers(role))
        for group in by_clip
    ]
    shares = dist.balance(costs)
    mine = [index for number in shares[dist.rank()] for index in by_clip[number]]
    score = partial(_score_roles, network, processor=processor, roles=roles, batch_size=batch_size, per_token=per_token)
    fingerprint = ""
    if path:
        fingerprint = _fingerprint(network, examples, by_clip, processor, roles=roles, per_token=per_token)
        cached = _read_cached(path, fingerprint)
        probe = mine[:batch_size]
        if cached and _matches_cached(
            score([examples[index] for index in probe]), [cached[index] for index in probe], network
        ):
            return cached
    computed = dict(zip(mine, score([examples[index] for index in mine]), strict=True))
    shards = [[computed[index][0] for index in by_clip[number]] for number in shares[dist.rank()]]
    logps = dist.ungroup(dist.gather_balanced(shards, shares), by_clip)
    if path and dist.is_main():
        values = {"format": REFERENCE_LOGPS_FORMAT, "fingerprint": fingerprint, "logps": logps}
        write_json(path, values, indent=None)
    return logps


def mix_logps(start: Sequence[Logps], own: Sequence[Logps], *, eta: float) -> list[Logps]:
    """Return the sums of the policy proportional to start^(eta / (1 + eta)) * own^(1 / (1 + eta)), up to a constant.

    The constant is the same for all answers to a prompt, so it cancels in losses of differences.
    """
    mixed: list[Logps] = []
    for of_start, of_own in zip(start, own, strict=True):
        values: dict[Role, float | list[list[float]]] = {}
        for role, value in of_own.items():
            other = of_start[role]
            assert isinstance(value, float) and isinstance(other, float), "a mixture is of sums over tokens"
            values[role] = (eta * other + value) / (1 + eta)
        mixed.append(values)
    return mixed


def _score_roles(
    network: Network,
    examples: Sequence[Example],
    *,
    processor: Processor,
    roles: Sequence[Role],
    batch_size: int,
    per_token: bool,
) -> list[tuple[Logps, int]]:
    """Return the reference policy's log-probabilities of each role's answers, and the tokens of all roles' answers."""
    results: list[tuple[Logps, int]] = []
    with network.lm.disable_adapter(), torch.no_grad():
        starts = range(0, len(examples), batch_size)
        for start in tqdm(starts, desc="reference log-probabilities", disable=not dist.is_main()):
            part = examples[start : start + batch_size]
            inputs, rows = collate_roles(part, roles, processor)
            token_logps = network(inputs.to(network.device)).cpu()
            sums = {role: one.policy.tolist() for role, one in role_logps(token_logps, inputs.labels, rows).items()}
            answers = split_tokens(token_logps, inputs.labels)
            of_role = {role: iter(answers[rows[role]]) for role in roles}
            for number, example in enumerate(part):
                tokens = {role: list(islice(of_role[role], len(example.answers(role)))) for role in roles}
                values: Logps = (
                    {role: [answer.tolist() for answer in tokens[role]] for role in roles}
                    if per_token
                    else {role: sums[role][number] for role in roles}
                )
                results.append((values, sum(len(answer) for role in roles for answer in tokens[role])))
    return results


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


def _fingerprint(
    network: Network,
    examples: Sequence[Example],
    by_clip: Sequence[Sequence[int]],
    processor: Processor,
    *,
    roles: Sequence[Role],
    per_token: bool,
) -> str:
    """Hash everything that the reference log-probabilities depend on."""
    hashes = dist.gather([hash_features(examples[group[0]].features) for group in dist.shard(by_clip)])
    weights = ((name, value) for name, value in network.named_parameters() if ".lora_" not in name)
    # All ranks have the same weights.
    weights_hash = dist.gather([hash_weights(weights) if dist.is_main() else ""])[0]
    prompts = [
        (
            one.video,
            one.prompt,
            one.history,
            {role: [value for answer in one.answers(role) for value in answer] for role in roles},
        )
        for one in examples
    ]
    attention = network.config._attn_implementation
    clips, form = list(zip(hashes, by_clip, strict=True)), ("per token",) if per_token else ()
    return hash_values(
        weights_hash, clips, prompts, hash_tokenizer(processor), attention, _compute_dtype(network), *form
    )


def _read_cached(path: Path, fingerprint: str) -> list[Logps] | None:
    """Return cached log-probabilities if they are current; only rank 0 reads, as NFS shows new files late."""
    cached: list[Logps] | None = None
    if dist.is_main() and path.is_file():
        try:
            values = read_json(path)
            if values["format"] == REFERENCE_LOGPS_FORMAT and values["fingerprint"] == fingerprint:
                cached = [dict(logps) for logps in values["logps"]]
            else:
                log.warning("%s is from different weights, clips, comparisons or tokens; recomputing", path)
        except (ValueError, KeyError, TypeError):
            log.warning("%s cannot be read; recomputing", path)
    return dist.gather([cached])[0]


def _matches_cached(computed: Sequence[tuple[Logps, int]], cached: Sequence[Logps], network: Network) -> bool:
    """Compare each rank's first batch with the cached values, up to rounding on another device or in other batches."""
    errors = []
    for (logps, num_tokens), before in zip(computed, cached, strict=True):
        sums, sums_before = _sum_roles(logps), _sum_roles(before)
        allowed = _rounding_error(list(sums.values()), num_tokens, dtype=_compute_dtype(network))
        errors += [abs(value - sums_before[role]) / allowed for role, value in sums.items()]
    matches = all(error <= 1 for error in dist.gather(errors))  # NaN does not match
    if not matches and dist.is_main():
        log.warning("cached reference log-probabilities differ by more than rounding error; recomputing")
    return matches


def _sum_roles(logps: Logps) -> dict[Role, float]:
    """Return the log-probability of each role's answers together."""
    return {role: math.fsum(chain.from_iterable(one)) if isinstance(one, list) else one for role, one in logps.items()}


def _compute_dtype(network: Network) -> str:
    kind = network.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else network.dtype
    return str(dtype).removeprefix("torch.")


def _rounding_error(logps: Sequence[float], num_tokens: int, *, dtype: str) -> float:
    """Return the largest difference, in nats, that other batches' rounding explains for the same answers.

    A token's error is a few units of the data type (in tests up to 0.3 in bfloat16, 0.4 in float32). Errors have either
    sign, so they grow with the square root of the number of tokens; the sums themselves are float32.
    """
    unit, exact = torch.finfo(getattr(torch, dtype)).eps, torch.finfo(torch.float32).eps
    return 8 * unit * math.sqrt(num_tokens) + 8 * exact * (num_tokens - sum(logps))


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
