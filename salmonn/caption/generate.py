"""Batched generation: greedy decoding or nucleus sampling with continuous batching.

A clip is prefilled once for all its samples and questions, which share its KV cache. Each sample has random numbers of
its own, so that it does not depend on the other rows of the batch, which may come and go at any time.
"""

from collections.abc import Collection, Sequence
from itertools import compress, starmap
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from salmonn.caption.constraint import Constraints, JsonGrammars
from salmonn.caption.generator import Sampling
from salmonn.caption.nucleus import HostCopy, TokenDraft
from salmonn.model.decode_graph import GraphDecoder
from salmonn.model.kv_cache import KVCache
from salmonn.model.layout import ModelInputs
from salmonn.model.network import Network

# Finished rows stay in the batch until they are this fraction of it: evicting them moves tokens of the others in the KV
# cache, which costs more than computing a few dead rows.
EVICT_FRACTION = 1 / 8
NUM_SORTED_STEPS = 16  # steps after a nucleus was too large for a draft, in which all tokens are sorted at once


class SampledToken(NamedTuple):
    """A generated token.

    Args:
        id: token id.
        logprob: natural logarithm of its probability under the model, before temperature, nucleus, repetition
            penalty and JSON schema; None unless `Sampling.logprobs` asks for it.
        top: (token id, log-probability) of the most likely tokens, in descending order.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class DecodeBatch:
    """Rows that are decoded together, one token per step; rows can be added between steps. False once all have ended.

    On a GPU, the memory of the KV cache and the recorded decode steps are kept for rows that are added later.

    Args:
        network: network in evaluation mode.
        stop_ids: token ids that end a row.
        grammars: compiler of JSON schemas, for sampling parameters that have one.
        is_ahead: start the decode step of the next tokens before these are read from the device, so that it does not
            wait for the host; a row that has ended computes one token too many, which is dropped (default: on a GPU).

    Attributes:
        decoder: what runs the decode steps.
    """

    def __init__(
        self,
        network: Network,
        *,
        stop_ids: Sequence[int],
        grammars: JsonGrammars | None = None,
        is_ahead: bool | None = None,
    ) -> None:
        self.network = network
        self.stop_ids = stop_ids
        self.grammars = grammars
        self._is_ahead = network.device.type == "cuda" if is_ahead is None else is_ahead
        self.decoder = GraphDecoder(network)
        self._is_decoded = False  # whether the logits after the last tokens are computed
        self._num_added = 0
        self._groups: list[_PrefillGroup] = []  # their rows, in this order, are those of the cache
        self._cache: KVCache | None = None

    def __bool__(self) -> bool:
        return any(group.is_active for group in self._groups)

    @torch.no_grad()
    def add(
        self,
        inputs: ModelInputs,
        *,
        sampling: Sampling,
        num_samples: int = 1,
        seeds: Sequence[int | tuple[int, int]] | None = None,
    ) -> range:
        """Prefill prompts and add them to the batch; if that fails, the batch is unchanged.

        Args:
            inputs: B prompts, padded on the right.
            sampling: sampling parameters.
            num_samples: number N of samples per prompt.
            seeds: (B,) random seeds, or seeds with the number of the first sample; not needed for greedy decoding.

        Returns:
            B * N row numbers, which `step` uses; the samples of a prompt in succession.
        """
        inputs = inputs.select([row for row in range(len(inputs.input_ids)) for _ in range(num_samples)])
        constraints = self._constraints(len(inputs.input_ids), sampling)
        logits, cache, order = self.network.prefill(inputs)
        uniforms = _uniform_numbers(seeds, num_samples=num_samples, num_rows=len(order), sampling=sampling)[order]
        rows = range(self._num_added, self._num_added + len(order))
        group = _PrefillGroup(
            rows=[rows[number] for number in order],
            logits=logits,
            penalty=_repetition_penalty(self.network, inputs, order, sampling=sampling),
            uniforms=uniforms.to(logits.device),
            sampling=sampling,
            stop_ids=self.stop_ids,
            constraints=constraints,
        )
        tokens = sampling.max_new_tokens
        if self._cache is None:
            cache.expected_tokens = tokens
            self._cache = cache
        else:
            self._cache.expected_tokens = max(self._cache.expected_tokens, tokens)
            self._cache.extend(cache)  # the last that may fail
        self._groups.append(group)
        self._num_added = rows.stop
        return rows

    def _constraints(self, num_rows: int, sampling: Sampling) -> Constraints | None:
        if sampling.json_schema is None:
            return None
        assert self.grammars is not None
        return Constraints([self.grammars.matcher(sampling.json_schema) for _ in range(num_rows)])

    @torch.no_grad()
    def step(self, cancelled: Collection[int] = ()) -> dict[int, SampledToken]:
        """Generate one token for each active row.

        Args:
            cancelled: numbers of rows to end without a further token.

        Returns:
            The token of each active row, by row number.
        """
        for group in self._groups:
            group.cancel(cancelled)
        self._evict_finished()
        if not self._is_decoded and any(group.is_active and not group.is_waiting for group in self._groups):
            self._decode()
        self._is_decoded = False
        active = [group for group in self._groups if group.is_active]
        for group in active:
            group.sample()
        for group in self._groups:
            group.is_waiting = False
        # The next tokens of a JSON schema depend on these, on the host.
        if self._is_ahead and self and not any(group.constraints is not None for group in active):
            self._decode()
            self._is_decoded = True
        is_corrected = [group.correct() for group in active]
        if self._is_decoded and any(is_corrected):
            assert self._cache is not None
            self._cache.rewind()
            self._decode()
        sampled = {row: token for group in active for row, token in group.read_tokens().items()}
        if not self:
            self.clear()
        return sampled

    @property
    def num_stored_tokens(self) -> int:
        """Number of tokens that the KV cache has memory for, in use or not."""
        return 0 if self._cache is None else self._cache.num_stored_tokens

    def clear(self) -> None:
        """Remove all rows."""
        self._groups, self._is_decoded = [], False
        if self._cache is not None and self._cache.is_static:
            self._cache.clear()
        else:
            self._cache = None

    def release_unused(self) -> None:
        """Release memory of the KV cache if at most half of it is in use."""
        if self._cache is not None:
            self._cache.release_unused()

    def _decode(self) -> None:
        """Compute the logits after the last tokens of all rows."""
        assert self._cache is not None
        # Groups that were added since the last step have the logits of their first tokens from prefill.
        started = [group for group in self._groups if not group.is_waiting]
        num_waiting = sum(len(group) for group in self._groups if group.is_waiting)
        tokens = torch.cat([group.tokens for group in self._groups])
        logits = self.decoder.step(tokens, self._cache, num_waiting=num_waiting)
        for group, part in zip(started, logits.split([*map(len, started), num_waiting]), strict=False):
            group.logits = part

    def _evict_finished(self) -> None:
        """Drop finished rows once they exceed `EVICT_FRACTION`."""
        active = [active for group in self._groups for active in group.active]
        if any(active) and active.count(False) >= EVICT_FRACTION * len(active):
            assert self._cache is not None
            self._cache.evict(torch.tensor(active))
            for group in self._groups:
                group.evict_finished()
            self._groups = [group for group in self._groups if len(group)]


class _PrefillGroup:
    """Rows that were prefilled together and share sampling parameters.

    Args:
        rows: (R,) row numbers.
        logits: (R, V) logits of the next tokens.
        penalty: repetition penalty.
        uniforms: (R, L) uniform random numbers, one per token.
        sampling: sampling parameters.
        stop_ids: token ids that end a row.
        constraints: constraints of the R rows, if any.
    """

    def __init__(
        self,
        *,
        rows: Sequence[int],
        logits: Tensor,
        penalty: "_RepetitionPenalty",
        uniforms: Tensor,
        sampling: Sampling,
        stop_ids: Sequence[int],
        constraints: Constraints | None = None,
    ) -> None:
        self.logits = logits
        self.tokens = torch.zeros(len(rows), dtype=torch.long, device=logits.device)  # (R,) last sampled tokens
        self.is_waiting = True  # for its first tokens
        self._num_sampled = 0
        self._num_sorted_steps = 0
        self._draft: TokenDraft | None = None
        self._unread: _UnreadTokens | None = None
        self._rows = list(rows)
        self._penalty = penalty
        self._uniforms = uniforms
        self._sampling = sampling
        self._stop_ids = frozenset(stop_ids)
        self.constraints = constraints
        self.active = [True] * len(rows)  # on the host: reading it from the device would wait for the device
        self._sampled_active = self.active  # rows that were active before the last sampled tokens

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_active(self) -> bool:
        """Whether any row has not ended."""
        return any(self.active)

    def cancel(self, rows: Collection[int]) -> None:
        """End rows by their numbers."""
        self.active = [active and row not in rows for row, active in zip(self._rows, self.active, strict=True)]

    def evict_finished(self) -> None:
        """Drop finished rows."""
        if all(self.active):
            return
        # By indices: the device would have to be waited for to count the rows of a mask.
        rows = torch.tensor([row for row, active in enumerate(self.active) if active], dtype=torch.long)
        self.tokens, self.logits, self._uniforms, self._penalty.history = (
            tensor.index_select(0, rows.to(tensor.device, non_blocking=True))
            for tensor in (self.tokens, self.logits, self._uniforms, self._penalty.history)
        )
        if self.constraints is not None:
            self.constraints.evict(self.active)
        self._rows = list(compress(self._rows, self.active))
        self.active = [True] * len(self._rows)

    def sample(self) -> None:
        """Sample the next token of all rows; `correct` and `read_tokens` must follow."""
        if self._num_sampled:
            self._penalty.append(self.tokens)
        logits = self._penalty(self.logits)
        if self.constraints is not None:
            logits = self.constraints.mask(logits, self.active)
        self._draft = TokenDraft(logits, self._uniforms[:, self._num_sampled], sampling=self._sampling)
        if self._num_sorted_steps:
            self._num_sorted_steps -= 1
            self._draft.correct()
        self.tokens, self._sampled_active = self._draft.tokens, self.active
        self._unread = _UnreadTokens(self.tokens, self.logits, self._sampling.logprobs)
        self._num_sampled += 1
        if self._num_sampled == self._sampling.max_new_tokens:
            self.active = [False] * len(self.active)

    def correct(self) -> bool:
        """Correct the last sampled tokens if necessary, and return whether it was; waits for the device."""
        assert self._draft is not None and self._unread is not None
        if self._draft.is_final:
            return False
        self._num_sorted_steps = NUM_SORTED_STEPS
        self._draft.correct()
        self.tokens = self._draft.tokens
        self._unread = _UnreadTokens(self.tokens, self._unread.logits, self._sampling.logprobs)
        return True

    def read_tokens(self) -> dict[int, SampledToken]:
        """Return the last sampled tokens by row number, and end rows with a stop token."""
        assert self._unread is not None
        sampled, is_active = self._unread.read(), self._sampled_active
        self._unread = self._draft = None
        if self.constraints is not None:
            self.constraints.advance([token.id for token in sampled], is_active)
        returned = dict(compress(zip(self._rows, sampled, strict=True), is_active))
        self.cancel({row for row, token in returned.items() if token.id in self._stop_ids})
        return returned


class _UnreadTokens:
    """Sampled tokens on their way from the device to the host.

    Args:
        tokens: (R,) token ids.
        logits: (R, V) logits that they were sampled from.
        logprobs: see `Sampling`.
    """

    def __init__(self, tokens: Tensor, logits: Tensor, logprobs: int | None) -> None:
        self.logits = logits
        figures = () if logprobs is None else compute_logprobs(tokens, logits, num_top=logprobs)
        self._copies = [HostCopy(one) for one in (tokens, *figures)]

    def read(self) -> list[SampledToken]:
        """Wait for the copies and return the tokens."""
        tokens, *figures = (copy.read() for copy in self._copies)
        return to_sampled_tokens(tokens, *figures) if figures else [SampledToken(one) for one in tokens.tolist()]


def compute_logprobs(tokens: Tensor, logits: Tensor, *, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities in float32.

    Args:
        tokens: (R,) token ids.
        logits: (R, V) logits of the model.
        num_top: number of the most likely tokens to add.

    Returns:
        (R,) log-probabilities of the tokens; (R, num_top) ids and log-probabilities of the most likely ones.
    """
    logprobs = logits.float().log_softmax(-1)
    top_logprobs, top_ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1), top_ids, top_logprobs


def to_sampled_tokens(tokens: Tensor, chosen: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> list[SampledToken]:
    """Convert tokens (R,) and the results of `compute_logprobs`."""
    tops = [tuple(zip(*row, strict=True)) for row in zip(top_ids.tolist(), top_logprobs.tolist(), strict=True)]
    return list(starmap(SampledToken, zip(tokens.tolist(), chosen.tolist(), tops, strict=True)))


class _RepetitionPenalty:
    """The repetition penalty of transformers, with a history that grows by a token per step.

    Args:
        penalty: factor above 1 that makes tokens of the history less likely.
        history: (R, L) token ids to penalize from the start.
    """

    def __init__(self, penalty: float, history: Tensor) -> None:
        self.history = history
        self._process = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits (R, V) with those of the history's tokens lowered."""
        if self._process is None or not self.history.shape[1]:
            return logits
        penalized: Tensor = self._process(self.history.to(logits.device), logits)
        return penalized

    def append(self, tokens: Tensor) -> None:
        """Add the last token (R,) of each row to the history."""
        if self._process is not None:
            self.history = torch.cat([self.history, tokens[:, None].to(self.history)], dim=1)


def _repetition_penalty(
    network: Network, inputs: ModelInputs, rows: Sequence[int], *, sampling: Sampling
) -> _RepetitionPenalty:
    """Return the penalty as the published code of each family applies it.

    The published 2+ and Qwen3-VL generate from ids, so their penalty includes the prompt and the text within the clip;
    video-SALMONN 2 generates from embeddings, so its penalty does not.
    """
    penalty = sampling.repetition_penalty
    if penalty is None:
        penalty = network.config.repetition_penalty
    ids = inputs.input_ids[rows]
    if not network.family.penalizes_prompt:
        return _RepetitionPenalty(penalty, ids[:, :0])
    # Padding is not part of the prompt: it is replaced by the row's first token.
    history = ids.where(inputs.attention_mask[rows].bool(), ids[:, :1])
    texts = [torch.tensor(inputs.layouts[inputs.clip_index[row]].timestamp_ids, dtype=torch.long) for row in rows]
    longest = max(map(len, texts))
    within = torch.stack([F.pad(text, (0, longest - len(text)), value=-1) for text in texts]).to(ids.device)
    return _RepetitionPenalty(penalty, torch.cat([history, within.where(within >= 0, ids[:, :1])], dim=1))


def _uniform_numbers(
    seeds: Sequence[int | tuple[int, int]] | None, *, num_samples: int, num_rows: int, sampling: Sampling
) -> Tensor:
    """Return (B * N, L) uniform random numbers, one for each token of each sample."""
    if not sampling.temperature:
        return torch.zeros(num_rows, 1).expand(-1, sampling.max_new_tokens)
    assert seeds is not None and len(seeds) * num_samples == num_rows
    # NumPy, since its shorter sequence is a prefix of the longer one with the same seed; torch does not promise that.
    numbers = [
        np.random.default_rng([seed % (1 << 64), first + sample]).random(sampling.max_new_tokens, dtype=np.float32)
        for seed, first in (one if isinstance(one, tuple) else (one, 0) for one in seeds)
        for sample in range(num_samples)
    ]
    return torch.from_numpy(np.stack(numbers))
