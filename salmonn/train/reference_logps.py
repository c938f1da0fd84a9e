"""Log-probabilities of answers by the reference policy: computed once, kept in a file, and checked before reuse."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.files import read_json, write_json
from salmonn.model.fingerprint import hash_values, hash_weights
from salmonn.model.network import Network
from salmonn.preference.losses import PreferenceLoss, Role
from salmonn.train.feature_cache import hash_features, hash_tokenizer
from salmonn.train.loop import FitConfig, autocast
from salmonn.train.preference import Example, Logps, PreferenceBatches, collate_roles, role_logps, split_tokens

log = logging.getLogger(__name__)
REFERENCE_LOGPS_NAME = "reference_logps.json"
START_LOGPS_NAME = "start_logps.json"  # by the run's start, where the reference policy is a mixture with it
REFERENCE_LOGPS_FORMAT = 1


@dataclass(frozen=True)
class ReferencePolicy:
    """The policy that rewards are relative to; by default the trained model without its adapter.

    Args:
        load: loads another network with an adapter, which is disabled.
        load_anchor: loads a network that the reference policy is mixed with (`mix_logps`).
        eta: weight of that network.
    """

    load: Callable[[], Network] | None = None
    load_anchor: Callable[[], Network] | None = None
    eta: float = 0.0


def make_preference_batches(
    captioner: Captioner,
    examples: Sequence[Example],
    loss: PreferenceLoss,
    fit_config: FitConfig,
    *,
    seed: int,
    folder: Path,
    reference_policy: ReferencePolicy = ReferencePolicy(),
    num_questions: int = 0,
) -> PreferenceBatches:
    """Score the answers of examples by the reference policy, once and in advance, and return batches with the results.

    Args:
        captioner: model to train, with an adapter.
        examples: comparisons or groups, the same on every rank.
        loss: loss, which says which answers are needed.
        fit_config: precision and size of the batches.
        seed: seed of the order of the examples.
        folder: folder that keeps the log-probabilities.
        reference_policy: policy that rewards are relative to.
        num_questions: number of examples of each batch that questions take the place of.
    """
    score = partial(
        compute_reference_logps,
        examples=examples,
        processor=captioner.processor,
        roles=loss.reference_roles,
        batch_size=fit_config.micro_batch_size,
        per_token=loss.per_token,
    )
    load, load_anchor = reference_policy.load, reference_policy.load_anchor
    with autocast(fit_config.precision):
        logps = score(load() if load else captioner.network, path=folder / REFERENCE_LOGPS_NAME)
        if load_anchor:
            logps = mix_logps(score(load_anchor(), path=folder / START_LOGPS_NAME), logps, eta=reference_policy.eta)
    return PreferenceBatches(
        examples,
        logps,
        captioner.processor,
        roles=loss.roles,
        batch_size=fit_config.batch_size - num_questions,
        seed=seed,
        gradient_accumulation_steps=fit_config.gradient_accumulation_steps,
    )


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
    by_clip, costs = _group_by_clip(examples, roles)
    shares = dist.balance(costs)
    mine = [index for number in shares[dist.rank()] for index in by_clip[number]]
    score = partial(
        _score_roles,
        network,
        processor=processor,
        roles=roles,
        batch_size=batch_size,
        per_token=per_token,
        filler=examples[0],
    )
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


def _group_by_clip(examples: Sequence[Example], roles: Sequence[Role]) -> tuple[list[list[int]], list[int]]:
    """Return the indices of the examples about each clip, whose prefix they share, and the cost of each clip."""
    groups: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(id(example.features), []).append(index)
    costs = [
        len(examples[group[0]].features)
        + sum(len(text.split()) for index in group for role in roles for text, _ in examples[index].answers(role))
        for group in groups.values()
    ]
    return list(groups.values()), costs


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
    filler: Example,
) -> list[tuple[Logps, int]]:
    """Return the reference policy's log-probabilities of each role's answers, and the tokens of all roles' answers.

    Ranks that share a sharded network call it equally often, those with fewer examples on `filler`.
    """
    results: list[tuple[Logps, int]] = []
    starts = range(0, len(examples), batch_size)
    with network.lm.disable_adapter(), torch.no_grad():
        if isinstance(network, FSDPModule):  # each call gathers weights from all ranks
            for _ in range(max(dist.gather([len(starts)])) - len(starts)):
                network(collate_roles([filler], roles, processor)[0].to(network.device))
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
    if isinstance(network, FSDPModule):
        shards = ((name, value.to_local() if isinstance(value, DTensor) else value) for name, value in weights)
        weights_hash = hash_values(dist.gather([hash_weights(shards)]))
    else:  # all ranks have the same weights
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
    matches = all(error <= 1 for of_rank in dist.gather([errors]) for error in of_rank)  # NaN does not match
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
