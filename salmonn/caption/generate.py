"""Generation: greedy or nucleus sampling of answers, many side by side.

A clip is read once for all its samples and questions, and its keys and values are kept once. What an answer draws
depends on its own seed alone, so its neighbours may end, and leave, whenever they do.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from salmonn.model.kv_cache import KVCache
from salmonn.model.layout import ModelInputs
from salmonn.model.network import Network

# Rows that have ended go on unheard until they are this share of the batch: to leave, what the others keep is copied.
_LEAVING = 1 / 8


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        temperature: 0 takes the most likely token each time (greedy).
        top_p: nucleus: the smallest set of tokens with this probability.
        max_new_tokens: limit of an answer's length.
        repetition_penalty: above 1, tokens that stand in the prompt (salmonn2-plus) or in the answer already are made
            less likely by this factor; none takes the model's own.
    """

    temperature: float = 0.0
    top_p: float = 0.9
    max_new_tokens: int = 160
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        # Written so that NaN, which compares false with everything, is refused too.
        if self.temperature and not 0.01 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy), or 0.01 or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}")


def sample_tokens(logits: Tensor, chance: Tensor, *, sampling: Sampling) -> Tensor:
    """One token a row: the most likely one, or one of the nucleus.

    Args:
        logits: (R, V).
        chance: (R,) even draws from [0, 1).
        sampling: temperature and nucleus.

    Returns:
        (R,) ids.
    """
    if not sampling.temperature:
        return logits.argmax(-1)
    probabilities, ids = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
    reached = probabilities.cumsum(-1)
    # A token is of the nucleus if those before it do not reach top_p; the first always is.
    # Where a model's numbers have gone wrong none is: on a GPU a place outside the row would end all that runs there.
    sizes = (reached - probabilities < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)
    whole = reached.gather(-1, sizes - 1)
    places = torch.searchsorted(reached, chance[:, None] * whole, right=True)
    return ids.gather(-1, places.minimum(sizes - 1)).squeeze(-1)


class _Penalty:
    """The repetition penalty of transformers, over the prompts too where they are given.

    The published 2+ generates from ids, and so its penalty sees them; video-SALMONN 2 generates from embeddings.

    Args:
        penalty: above 1 makes what was said less likely.
        said: (R, L) ids that count from the start.
    """

    def __init__(self, penalty: float, said: Tensor) -> None:
        self.penalise = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None
        self.said = said

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (R, V) of which those of what was said are less likely."""
        if self.penalise is None or not self.said.shape[1]:
            return logits
        penalised: Tensor = self.penalise(self.said.to(logits.device), logits)
        return penalised

    def hear(self, tokens: Tensor) -> None:
        """Take note of one more token (R,) of each row."""
        if self.penalise is not None:
            self.said = torch.cat([self.said, tokens[:, None].to(self.said)], dim=1)

    def leave(self, going_on: Tensor) -> None:
        """Forget the rows that do not go on, (R,) true for those that do."""
        self.said = self.said[going_on.to(self.said.device)]


def _penalty(network: Network, inputs: ModelInputs, rows: Sequence[int], *, sampling: Sampling) -> _Penalty:
    asked = sampling.repetition_penalty
    penalty = network.config.repetition_penalty if asked is None else asked
    ids = inputs.input_ids[rows]
    if not network.family.penalizes_prompt:
        return _Penalty(penalty, ids[:, :0])
    # In the place of a row's padding, which nobody said, its first token.
    return _Penalty(penalty, ids.where(inputs.attention_mask[rows].bool(), ids[:, :1]))


def generate(
    network: Network,
    inputs: ModelInputs,
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    num_samples: int = 1,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Answer each row; takes what `Generation` and its `join` take.

    Returns:
        B * N lists of token ids, a row's samples one after the other; each ends with an end token if it is finished.
    """
    generation = DecodeBatch(network, stop_ids=stop_ids)
    answers: list[list[int]] = [
        [] for _ in generation.join(inputs, sampling=sampling, num_samples=num_samples, seeds=seeds)
    ]
    while generation:
        for row, token in generation.step().items():
            answers[row].append(token)
    return answers


class DecodeBatch:
    """Answers under way side by side, token by token; more may join between two tokens. False when all have ended.

    Args:
        network: in evaluation mode.
        stop_ids: an answer ends with any of these.
    """

    def __init__(self, network: Network, *, stop_ids: Sequence[int]) -> None:
        self.network = network
        self.stop_ids = stop_ids
        self._count = 0  # of rows that have joined so far
        self._cohorts: list[_Cohort] = []

    def __bool__(self) -> bool:
        return bool(self._cohorts)

    @torch.no_grad()
    def join(
        self, inputs: ModelInputs, *, sampling: Sampling, num_samples: int = 1, seeds: Sequence[int] | None = None
    ) -> range:
        """Read rows, which go on beside those that are there; where that fails these are as they were.

        Args:
            inputs: B prompts, padded on the right.
            sampling: how their answers are drawn.
            num_samples: N answers to each row.
            seeds: (B,) of the rows' draws: a sample's follow from its row's seed and its number; needed unless
                sampling is greedy.

        Returns:
            B * N numbers by which `step` knows the answers, a row's samples one after the other.
        """
        inputs = _repeat(inputs, num_samples)
        logits, memory, order = self.network.prefill(inputs)
        chances = _chances(seeds, num_samples=num_samples, num_rows=len(order), sampling=sampling)[order]
        rows = range(self._count, self._count + len(order))
        cohort = _Cohort(
            rows=[row + rows.start for row in order],
            memory=memory,
            logits=logits,
            penalty=_penalty(self.network, inputs, order, sampling=sampling),
            chances=chances.to(logits.device),
            sampling=sampling,
            stop_ids=self.stop_ids,
        )
        self._cohorts.append(cohort)
        self._count = rows.stop
        return rows

    @torch.no_grad()
    def step(self, dropped: Collection[int] = ()) -> dict[int, int]:
        """The next token of each answer that has not ended, by its number.

        Args:
            dropped: answers that nobody waits for any more; they end here.
        """
        if dropped:
            for cohort in self._cohorts:
                cohort.drop(dropped)
            self._cohorts = [cohort for cohort in self._cohorts if cohort.goes_on]
        if begun := [cohort for cohort in self._cohorts if cohort.num_drawn]:
            for cohort in begun:
                cohort.leave()
            logits = self.network.decode_step(
                torch.cat([cohort.tokens for cohort in begun]), [cohort.memory for cohort in begun]
            )
            for cohort, part in zip(begun, logits.split([len(cohort.tokens) for cohort in begun]), strict=True):
                cohort.logits = part
        drawn = {row: token for cohort in self._cohorts for row, token in cohort.sample_tokens().items()}
        self._cohorts = [cohort for cohort in self._cohorts if cohort.goes_on]
        return drawn


class _Cohort:
    """Rows that were read together.

    Args:
        rows: their R numbers.
        memory: of what was read.
        logits: (R, V) of their first tokens.
        penalty: for what was said.
        chances: (R, T) even draws for each token.
        sampling: how tokens are drawn.
        stop_ids: an answer ends with any of these.
    """

    def __init__(
        self,
        *,
        rows: Sequence[int],
        memory: KVCache,
        logits: Tensor,
        penalty: _Penalty,
        chances: Tensor,
        sampling: Sampling,
        stop_ids: Sequence[int],
    ) -> None:
        self.memory = memory
        self.logits = logits
        self.tokens = torch.empty(0, dtype=torch.long)  # that were drawn last
        self.num_drawn = 0
        self._rows = list(rows)
        self._penalty = penalty
        self._chances = chances
        self._sampling = sampling
        self._stop_ids = frozenset(stop_ids)
        self._going_on = [True] * len(rows)  # not on the device, which would have to be waited for

    @property
    def goes_on(self) -> bool:
        """Whether any answer has not ended."""
        return self.num_drawn < self._sampling.max_new_tokens and any(self._going_on)

    def drop(self, dropped: Collection[int]) -> None:
        """End answers by their numbers."""
        self._end(row in dropped for row in self._rows)

    def leave(self) -> None:
        """Let go of rows that have ended, where they are many."""
        self._penalty.hear(self.tokens)
        if self._going_on.count(False) >= _LEAVING * len(self._going_on):
            going_on = torch.tensor(self._going_on, device=self.tokens.device)
            self.memory.evict(going_on)
            self._penalty.leave(going_on)
            self.tokens, self._chances = self.tokens[going_on], self._chances[going_on]
            self._rows = list(compress(self._rows, self._going_on))
            self._going_on = [True] * len(self._rows)

    def sample_tokens(self) -> dict[int, int]:
        """A token of each answer that has not ended."""
        self.tokens = sample_tokens(
            self._penalty(self.logits), self._chances[:, self.num_drawn], sampling=self._sampling
        )
        self.num_drawn += 1
        drawn = self.tokens.tolist()
        counted = dict(compress(zip(self._rows, drawn, strict=True), self._going_on))
        self._end(token in self._stop_ids for token in drawn)
        return counted

    def _end(self, ended: Iterable[bool]) -> None:
        self._going_on = [goes_on and not ends for goes_on, ends in zip(self._going_on, ended, strict=True)]


def _repeat(inputs: ModelInputs, times: int) -> ModelInputs:
    """Each row so many times; the clips stay as they are."""
    return replace(
        inputs,
        input_ids=inputs.input_ids.repeat_interleave(times, dim=0),
        attention_mask=inputs.attention_mask.repeat_interleave(times, dim=0),
        position_ids=inputs.position_ids.repeat_interleave(times, dim=1),
        labels=inputs.labels.repeat_interleave(times, dim=0),
        clip_index=tuple(clip for clip in inputs.clip_index for _ in range(times)),
    )


def _chances(seeds: Sequence[int] | None, *, num_samples: int, num_rows: int, sampling: Sampling) -> Tensor:
    """(B * N, T) even draws for each token of each answer."""
    if not sampling.temperature:
        return torch.zeros(num_rows, 1).expand(-1, sampling.max_new_tokens)
    assert seeds is not None and len(seeds) * num_samples == num_rows
    # Of numpy: fewer numbers from a seed are the first of more, which torch does not promise.
    drawn = [
        np.random.default_rng([seed % (1 << 64), sample]).random(sampling.max_new_tokens, dtype=np.float32)
        for seed in seeds
        for sample in range(num_samples)
    ]
    return torch.from_numpy(np.stack(drawn))
