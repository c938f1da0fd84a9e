"""Pooled hidden states of answers: the features that reward heads read.

    prompt state   the decoder's output at the last token of the prompt; it depends on clip and prompt alone
    request state  the mean of the output over the prompt's tokens, read without the clip: it depends on the text alone
    answer state   the outputs at the answer's tokens, pooled:
                   last    at the last token, which is the end token of a finished answer: as published reward models
                   mean    their mean
                   rich    means of the upper layers, then mean, sum and maximum of the output, then six figures of the
                           answer's log-probabilities under the captioner
                   clauses the sum over the answer's clauses of each one's state (salmonn.preference.claims)
                   tokens  not pooled: the upper layers, the output, log-probability and entropy at each token

Which words of a caption are right is in the states of these words. A small captioner does not carry it to its last
token, so that `rich` orders more pairs than `last` (docs/reward.md). States are float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["last", "mean", "rich", "clauses"]
NUM_LOGP_FIGURES, NUM_CLAUSE_FIGURES = 6, 4
UNLIKELY_NATS = -2.0  # log-probability below which a token counts as unlikely
SUM_SCALE = 1 / 30  # brings sums over an answer's tokens to the size of their mean


@dataclass(frozen=True)
class AnswerStates:
    """States of B rows.

    Args:
        prompt: (B, D) state at the last token of each prompt.
        answer: (B, P) pooled states of each answer; P is `pooled_width`.
        request: (B, D) state of each prompt without its clip (salmonn.preference.states); None if it is not needed.
    """

    prompt: Tensor
    answer: Tensor
    request: Tensor | None = None


def pooled_width(pooling: Pooling, *, width: int, num_layers: int) -> int:
    """Return the size P of an answer's state for a decoder of D = `width` and this number of layers."""
    num_upper = len(upper_layers(num_layers))
    if pooling == "clauses":
        return 1 + (2 * (num_upper + 1) + 1) * width + NUM_CLAUSE_FIGURES
    return (num_upper + 3) * width + NUM_LOGP_FIGURES if pooling == "rich" else width


def upper_layers(num_layers: int) -> range:
    """Return the layers, counted from 1, whose output is pooled: the upper half without the last, which is normed."""
    return range(num_layers // 2 + 1, num_layers)


def pool_last(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the state (B, D) at the last token of each answer, of states (N, D) of answers with these lengths."""
    return torch.stack([one[-1] for one in states.split(list(lengths))])


def pool_mean(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the mean state (B, D) of each answer; see `pool_last`."""
    return torch.stack([one.mean(0) for one in states.split(list(lengths))])


def pool_rich(
    states: Tensor, layers: Sequence[Tensor], logps: Tensor, entropies: Tensor, *, lengths: Sequence[int]
) -> Tensor:
    """Return the pools (B, P) of `rich`.

    Args:
        states: (N, D) output of the decoder at the tokens of B answers.
        layers: (N, D) output of each upper layer.
        logps, entropies: (N,) log-probability of each answer token, and entropy of its distribution, in nats.
        lengths: number of tokens of each answer.
    """
    parts = states.split(list(lengths))
    return torch.cat(
        [
            *(pool_mean(layer, lengths) for layer in layers),
            pool_mean(states, lengths),
            torch.stack([one.sum(0) * SUM_SCALE for one in parts]),
            torch.stack([one.amax(0) for one in parts]),
            torch.stack(
                [
                    _logp_figures(one, entropy)
                    for one, entropy in zip(logps.split(list(lengths)), entropies.split(list(lengths)), strict=True)
                ]
            ),
        ],
        dim=1,
    )


def _logp_figures(logps: Tensor, entropies: Tensor) -> Tensor:
    """Return sum, mean and minimum of log-probabilities, mean entropy, and numbers of all and of unlikely tokens."""
    count = logps.new_tensor(float(len(logps)))
    unlikely = (logps < UNLIKELY_NATS).sum().to(logps.dtype)
    return torch.stack([logps.sum(), logps.mean(), logps.min(), entropies.mean(), count, unlikely])
