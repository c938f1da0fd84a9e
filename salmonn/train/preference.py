"""Preference training: batches of comparisons, log-probabilities of the reference policy, and the loss of a batch.

All answers about a clip share its prefix: the clip's tokens pass through the decoder once, the answers of every role
behind them. Which rows of a batch belong to which role is written in the batch (`PreferenceBatch.rows`).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from salmonn import dist
from salmonn.caption.processor import Processor, PromptRow
from salmonn.model.fingerprint import hash_values, hash_weights
from salmonn.model.layout import ClipFeatures, ModelInputs
from salmonn.model.network import Network
from salmonn.preference.losses import PreferenceLoss, Role, RoleLogps
from salmonn.records import Comparison, read_json, write_json
from salmonn.train.data import SftBatch, SftBatches, batch_at, sft_loss, split_evenly
from salmonn.train.feature_cache import hash_features, hash_tokenizer

log = logging.getLogger(__name__)
REFERENCE_LOGPS_NAME = "reference_logps.json"
REFERENCE_LOGPS_FORMAT = 1
Logps = Mapping[Role, float]  # of one comparison's answers


@dataclass(frozen=True)
class PreferenceExample:
    """A comparison with the features of its clip; examples about the same clip hold the same features object.

    Args:
        comparison: the comparison.
        features: features of its clip.
        other: a comparison about another clip, whose chosen caption is the mismatched answer.
    """

    comparison: Comparison
    features: ClipFeatures
    other: Comparison | None = None

    def answer(self, role: Role) -> str:
        """Return the answer of a role."""
        one, name = self._source(role)
        answer: str = getattr(one, name)
        return answer

    def is_finished(self, role: Role) -> bool:
        """Return whether the answer of a role has an end, and was not cut off at the token limit."""
        one, name = self._source(role)
        if role == "ground_truth":
            return bool(one.ground_truth)  # without one, there must be no end to learn either
        return bool(getattr(one, f"{name}_finished"))

    def _source(self, role: Role) -> tuple[Comparison, str]:
        if role != "mismatched":
            return self.comparison, role
        assert self.other is not None, "make_preference_examples adds another clip's comparison where a loss needs it"
        return self.other, "chosen"


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
            raise ValueError("loss.kind kto estimates the KL divergence from captions of other clips; give two or more")
        examples.append(PreferenceExample(one, features, other))
    return examples


@dataclass(frozen=True)
class PreferenceBatch:
    """A micro-batch of B comparisons.

    Args:
        inputs: inputs of the model, one row for each answer.
        rows: role -> its B rows of the inputs, in the order of the comparisons.
        reference_logps: role -> (B,) log-probabilities by the reference policy.
        mean_num_examples: number of comparisons of the whole step, divided by the number of ranks.
        clips: names of its clips, for error messages.
    """

    inputs: ModelInputs
    rows: Mapping[Role, slice]
    reference_logps: Mapping[Role, Tensor]
    mean_num_examples: float
    clips: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that pass through the decoder."""
        return self.inputs.num_tokens


@dataclass
class PreferenceBatches:
    """Batches of comparisons with their reference log-probabilities, in a new seeded order each epoch.

    Args:
        examples: all comparisons, the same on every rank.
        reference_logps: log-probabilities of their answers, as `compute_reference_logps` returns them.
        processor: processor of the model.
        roles: answers of a comparison that the loss needs.
        batch_size: comparisons per step over all ranks.
        seed: seed of the order.
        gradient_accumulation_steps: number of micro-batches of a rank, at most its number of comparisons.
    """

    examples: Sequence[PreferenceExample]
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
            reference = {role: torch.tensor([logps[role] for _, logps in part]) for role in part[0][1]}
            clips = tuple(example.comparison.video for example in examples)
            mean_num_examples = self.batch_size / dist.world_size()
            micro_batches.append(PreferenceBatch(inputs, rows, reference, mean_num_examples, clips))
        return micro_batches


def collate_roles(
    examples: Sequence[PreferenceExample], roles: Sequence[Role], processor: Processor
) -> tuple[ModelInputs, dict[Role, slice]]:
    """Collate the answers of B comparisons; returns the inputs and, for each role, its B rows."""
    clips = {id(example.features): example.features for example in examples}
    index_of = {key: index for index, key in enumerate(clips)}
    rows, slices = [], {}
    for number, role in enumerate(roles):
        slices[role] = slice(number * len(examples), (number + 1) * len(examples))
        for example in examples:
            one = example.comparison
            clip, is_finished = index_of[id(example.features)], example.is_finished(role)
            rows.append(PromptRow(clip, one.prompt, example.answer(role), one.history, finished=is_finished))
    return processor.collate(rows, list(clips.values())), slices


def compute_reference_logps(
    network: Network,
    examples: Sequence[PreferenceExample],
    processor: Processor,
    *,
    roles: Sequence[Role],
    batch_size: int,
    folder: Path | None = None,
) -> list[dict[Role, float]]:
    """Compute the log-probabilities of answers by the reference policy: the network with its adapter disabled.

    Comparisons are balanced over ranks. With a folder, results are written to reference_logps.json; a later call uses
    them again if everything that they depend on is unchanged and each rank reproduces its first batch.

    Args:
        network: model with an adapter.
        examples: comparisons, the same on every rank.
        processor: processor of the model.
        roles: answers that the loss compares with the reference policy.
        batch_size: comparisons of a forward pass.
        folder: folder of the cached file; none to compute without a cache.

    Returns:
        For each comparison the summed log-probability of each role's answer.
    """
    groups: dict[int, list[int]] = {}  # comparisons about the same clip, whose prefix they share
    for index, example in enumerate(examples):
        groups.setdefault(id(example.features), []).append(index)
    by_clip = list(groups.values())
    costs = [
        len(examples[group[0]].features)
        + sum(len(examples[index].answer(role).split()) for index in group for role in roles)
        for group in by_clip
    ]
    shares = dist.balance(costs)
    mine = [index for number in shares[dist.rank()] for index in by_clip[number]]
    score = partial(_score_roles, network, processor=processor, roles=roles, batch_size=batch_size)
    fingerprint = ""
    if folder:
        fingerprint = _fingerprint(network, examples, by_clip, processor, roles=roles)
        cached = _read_cached(folder / REFERENCE_LOGPS_NAME, fingerprint)
        probe = mine[:batch_size]
        if cached and _matches_cached(
            score([examples[index] for index in probe]), [cached[index] for index in probe], network
        ):
            return cached
    computed = dict(zip(mine, score([examples[index] for index in mine]), strict=True))
    shards = [[computed[index][0] for index in by_clip[number]] for number in shares[dist.rank()]]
    logps = dist.ungroup(dist.gather_balanced(shards, shares), by_clip)
    if folder and dist.is_main():
        values = {"format": REFERENCE_LOGPS_FORMAT, "fingerprint": fingerprint, "logps": logps}
        write_json(folder / REFERENCE_LOGPS_NAME, values)
    return logps


def _score_roles(
    network: Network,
    examples: Sequence[PreferenceExample],
    *,
    processor: Processor,
    roles: Sequence[Role],
    batch_size: int,
) -> list[tuple[dict[Role, float], int]]:
    """Return the reference policy's log-probability of each role's answer, and the tokens of all roles' answers."""
    results = []
    with network.lm.disable_adapter(), torch.no_grad():
        starts = range(0, len(examples), batch_size)
        for start in tqdm(starts, desc="reference log-probabilities", disable=not dist.is_main()):
            part = examples[start : start + batch_size]
            inputs, rows = collate_roles(part, roles, processor)
            logps = role_logps(network(inputs.to(network.device)).cpu(), inputs.labels, rows)
            for number in range(len(part)):
                values = {role: one.policy[number].item() for role, one in logps.items()}
                results.append((values, sum(int(one.num_tokens[number]) for one in logps.values())))
    return results


def role_logps(
    token_logps: Tensor,
    labels: Tensor,
    rows: Mapping[Role, slice],
    reference_logps: Mapping[Role, Tensor] | None = None,
) -> dict[Role, RoleLogps]:
    """Sum log-probabilities over the tokens of each answer (arXiv 2305.18290).

    Args:
        token_logps: (R, L - 1) log-probabilities of the answers' tokens, 0 elsewhere.
        labels: (R, L) ids of the answers' tokens, -100 elsewhere.
        rows: role -> its B rows.
        reference_logps: role -> (B,) log-probabilities by the reference policy, if any.
    """
    num_tokens = (labels[:, 1:] != -100).sum(-1)
    reference = {role: logps.to(token_logps.device) for role, logps in (reference_logps or {}).items()}
    return {
        role: RoleLogps(token_logps[part].sum(-1), num_tokens[part], reference.get(role)) for role, part in rows.items()
    }


def _fingerprint(
    network: Network,
    examples: Sequence[PreferenceExample],
    by_clip: Sequence[Sequence[int]],
    processor: Processor,
    *,
    roles: Sequence[Role],
) -> str:
    """Hash everything that the reference log-probabilities depend on."""
    hashes = dist.gather([hash_features(examples[group[0]].features) for group in dist.shard(by_clip)])
    weights = ((name, value) for name, value in network.named_parameters() if ".lora_" not in name)
    # All ranks have the same weights.
    weights_hash = dist.gather([hash_weights(weights) if dist.is_main() else ""])[0]
    prompts = [
        (
            one.comparison.video,
            one.comparison.prompt,
            one.comparison.history,
            {role: [one.answer(role), one.is_finished(role)] for role in roles},
        )
        for one in examples
    ]
    attention = network.config._attn_implementation
    clips = list(zip(hashes, by_clip, strict=True))
    return hash_values(weights_hash, clips, prompts, hash_tokenizer(processor), attention, _compute_dtype(network))


def _read_cached(path: Path, fingerprint: str) -> list[dict[Role, float]] | None:
    """Return cached log-probabilities if they are current; only rank 0 reads, as NFS shows new files late."""
    cached = None
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
        allowed = _rounding_error(list(logps.values()), num_tokens, dtype=_compute_dtype(network))
        errors += [abs(value - before[role]) / allowed for role, value in logps.items()]
    matches = all(error <= 1 for error in dist.gather(errors))  # NaN does not match
    if not matches and dist.is_main():
        log.warning("cached reference log-probabilities differ by more than rounding error; recomputing")
    return matches


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
    """Computes a preference loss on micro-batches: their share of the mean over the step's comparisons."""

    loss: PreferenceLoss

    def __call__(self, model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss, and its parts for the log."""
        inputs = batch.inputs.to(dist.device())
        output = self.loss.compute(role_logps(model(inputs), inputs.labels, batch.rows, batch.reference_logps))
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
