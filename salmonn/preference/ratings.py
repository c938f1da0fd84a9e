"""Ratings of models from votes by Bradley and Terry's model, with the effects of side and length. Imports no torch.

P(A wins) = sigmoid(theta_A - theta_B + side + length * (words of A - words of B))

As in Chatbot Arena's style control (FastChat, `rating_systems.py`): ties and votes for neither count half, a ridge of
0.5 on the parameters, and the Elo scale. Arena divides the difference of lengths by their sum; a plain difference has a
unit. Intervals are from a bootstrap over raters, since the votes of one person are alike; they are never narrower than
those of independent votes, since a few raters may agree by chance.

Where all Totals are known, the effects of side and length are of a second fit, which also has the difference of Totals:
what else differs between two captions would shrink all logits. So the effect of length is that at equal Total.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import t as student_t

from salmonn.preference.feedback import Candidate, Feedback

Array = NDArray[np.float64]
RIDGE = 0.5
ELO_PER_LOGIT = 400 / math.log(10)
MEAN_ELO = 1000.0
RESAMPLES = 1000
SIDE = -2  # column of the inputs
_STEPS = 50  # of Newton's method, at most
_CHUNK = 2**22  # weights of resampled votes in memory at once


@dataclass(frozen=True)
class Estimate:
    """An estimate with its 95 % interval, which is infinite for a single rater."""

    value: float
    low: float
    high: float

    def scale(self, factor: float, shift: float) -> "Estimate":
        """Return the estimate in other units."""
        return Estimate(*(shift + factor * value for value in (self.value, self.low, self.high)))


@dataclass(frozen=True)
class Ratings:
    """Ratings of models.

    Args:
        models: model -> rating on the Elo scale, the best first, of those voted on against another. Their mean is 1000.
        side: preference for the caption on the left (A), in logits.
        length: preference for a caption with 10 words more, in logits; at equal Total where all Totals are known.
        num_votes, num_raters: votes that were used, and people who gave them; all those without an id count as one.
        votes_of: model -> number of its votes against others.
        draws: ratings (R, models) of R resamples of the raters, in logits, in the order of `models`; none of one rater.
    """

    models: Mapping[str, Estimate]
    side: Estimate
    length: Estimate
    num_votes: int
    num_raters: int
    votes_of: Mapping[str, int]
    draws: Array = field(repr=False, compare=False)


def fit_ratings(feedback: Sequence[Feedback], *, resamples: int = RESAMPLES) -> Ratings | None:
    """Fit ratings to the votes among feedback; None without votes on two whole captions.

    Intervals are estimate -+ t * standard error, the larger one of the bootstrap and of independent votes, with t of
    Student's distribution, as there may be few raters: percentiles would be too narrow.
    """
    votes = find_votes(feedback)
    if not votes:
        return None
    names, inputs, outcome = encode_votes(votes)
    raters: dict[str, int] = {}
    cluster = np.array([raters.setdefault(vote.rater, len(raters)) for vote, _ in votes])
    estimates, draws = _estimate(inputs, outcome, cluster, resamples=resamples)
    effects = estimates
    totals = [[caption.total for caption in vote.captions] for vote, _ in votes]
    if all(total is not None for pair in totals for total in pair):
        difference = np.array(totals, dtype=np.float64) @ [-1, 1]
        scaled = difference / max(float(difference.std()), 1e-9)  # for the ridge
        effects, _ = _estimate(np.insert(inputs, 0, scaled, axis=1), outcome, cluster, resamples=resamples)
    num_votes = np.count_nonzero(inputs, axis=0)  # in the column of a model that has met itself only all are 0
    compared = [index for index in range(len(names)) if num_votes[index]]
    best_first = sorted(compared, key=lambda index: -estimates[index].value)
    return Ratings(
        {names[index]: estimates[index].scale(ELO_PER_LOGIT, MEAN_ELO) for index in best_first},
        side=effects[SIDE],
        length=effects[-1],
        num_votes=len(votes),
        num_raters=len(raters),
        votes_of={names[index]: int(num_votes[index]) for index in best_first},
        draws=draws[:, best_first],
    )


def find_votes(feedback: Sequence[Feedback]) -> list[tuple[Feedback, Candidate]]:
    """Return the votes on two whole captions, each with its second caption."""
    return [
        (one, one.second)
        for one in feedback
        if one.action == "vote" and one.second and one.first.finished and one.second.finished
    ]


def encode_votes(votes: Sequence[tuple[Feedback, Candidate]]) -> tuple[list[str], Array, Array]:
    """Return the names of the models (M), the inputs of the fit (N, M + 2) and the outcomes of the votes (N,).

    The columns are the models, +1 for that of A and -1 for that of B, the side, and the difference of the lengths in 10
    words. The outcome is 1 for A, 0 for B and 0.5 for neither.
    """
    names = sorted({caption.name for vote, _ in votes for caption in vote.captions})
    column = {name: index for index, name in enumerate(names)}
    inputs = np.zeros((len(votes), len(names) + 2))
    for row, (vote, second) in enumerate(votes):
        inputs[row, column[vote.first.name]] += 1
        inputs[row, column[second.name]] -= 1
        inputs[row, SIDE] = 1
        inputs[row, -1] = (len(vote.first.text.split()) - len(second.text.split())) / 10
    outcome = np.array([{"first": 1.0, "second": 0.0}.get(vote.choice or "", 0.5) for vote, _ in votes])
    return names, inputs, outcome


def _estimate(
    inputs: Array, outcome: Array, cluster: NDArray[np.int_], *, resamples: int
) -> tuple[list[Estimate], Array]:
    """Fit all parameters (P,) of inputs (N, P); return them with their intervals, and resampled ones (R, P)."""
    fitted = fit_logits(inputs, outcome, np.ones((1, len(inputs))), start=np.zeros(inputs.shape[1]))[0]
    error, draws = _bootstrap_error(inputs, outcome, cluster, fitted, resamples=resamples)
    estimates = [
        Estimate(float(value), float(value - reach), float(value + reach))
        for value, reach in zip(fitted, error, strict=True)
    ]
    return estimates, draws


def _bootstrap_error(
    inputs: Array, outcome: Array, cluster: NDArray[np.int_], fitted: Array, *, resamples: int
) -> tuple[Array, Array]:
    """Resample clusters of votes: return half the width of the 95 % interval of each parameter, and the fits (R, P)."""
    num_clusters = int(cluster.max()) + 1
    if num_clusters < 2:
        return np.full(inputs.shape[1], np.inf), np.empty((0, inputs.shape[1]))
    rng = np.random.default_rng(0)
    fits = []
    chunk = max(_CHUNK // len(inputs), 1)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=size)
        fits.append(fit_logits(inputs, outcome, counts[:, cluster].astype(np.float64), start=fitted, tolerance=1e-4))
    # Resampling G clusters has the variance of G - 1.
    draws = np.concatenate(fits)
    deviation = draws.std(axis=0) * math.sqrt(num_clusters / (num_clusters - 1))
    chance = expit(inputs @ fitted)
    curvature = (inputs.T * (chance * (1 - chance))) @ inputs + RIDGE * np.eye(inputs.shape[1])
    independent = np.sqrt(np.diag(np.linalg.inv(curvature)))
    return np.maximum(deviation, independent) * student_t.ppf(0.975, num_clusters - 1), draws


def fit_logits(inputs: Array, outcome: Array, weights: Array, *, start: Array, tolerance: float = 1e-9) -> Array:
    """Maximize the penalized likelihood for each row of weights (B, N) by Newton's method; returns (B, P)."""
    num_rows, num_parameters = inputs.shape
    products = (inputs[:, :, None] * inputs[:, None, :]).reshape(num_rows, -1)
    ridge = RIDGE * np.eye(num_parameters)
    fitted = np.tile(start, (len(weights), 1))
    for _ in range(_STEPS):
        chance = expit(fitted @ inputs.T)
        gradient = (weights * (outcome - chance)) @ inputs - RIDGE * fitted
        curvature = ((weights * chance * (1 - chance)) @ products).reshape(-1, num_parameters, num_parameters) + ridge
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        step *= np.minimum(1, 2 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))  # never far at once
        fitted += step
        if np.abs(step).max() < tolerance:
            break
    return fitted
