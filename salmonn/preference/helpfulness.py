"""Does help follow the metric? Rank correlations of a metric with what people do, and differences of models.

After RealHumanEval (arXiv 2404.02806), where preferences did not follow the benchmark and time saved hardly did.
Correlations are Spearman's, by model (of the means) and by caption. Intervals are estimate -+ t * standard error, from
a bootstrap over raters as for the ratings; by caption, never narrower than for independent captions (Bonett and Wright,
2000). By model, they are about other raters, not about other models. Imports no torch.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, spearmanr
from scipy.stats import t as student_t

from salmonn.preference.feedback import Feedback
from salmonn.preference.feedback_pairs import last_ratings
from salmonn.preference.ratings import Array, Estimate, Ratings
from salmonn.records import Score
from salmonn.score.metrics import compute_measures
from salmonn.score.persistence import share_kept

NO_DRAFT = "(no draft)"
METRICS = ("total", "missing", "hallucination")
MIN_MODELS, MIN_CAPTIONS, MIN_RATERS = 3, 10, 2
RESAMPLES = 200
Level = Literal["model", "caption"]
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """Value of one measure of helpfulness for one caption and one person.

    Args:
        measure: "rated good", "accepted", "kept of draft", "final Total" or "seconds".
        model: name of the model that wrote the caption; `NO_DRAFT` for a text without a draft.
        rater: id of the person; "" for none, as if all of those were one.
        clip: video and part.
        value: value of the measure; 0 or 1 for the first two.
        metrics: metrics of the caption; empty if it was not scored.
    """

    measure: str
    model: str
    rater: str
    clip: Hashable
    value: float
    metrics: Metrics


@dataclass(frozen=True)
class Correlation:
    """Spearman's correlation of a metric with a measure over models or captions.

    Args:
        measure: measure of an `Outcome`, or "rating" (of votes).
        metric: one of `METRICS`.
        level: what the correlation is over.
        number: number of models or captions.
        num_raters: number of raters.
        rho: the correlation; None if there are too few models, captions or raters, or all values are equal.
    """

    measure: str
    metric: str
    level: Level
    number: int
    num_raters: int
    rho: Estimate | None


@dataclass(frozen=True)
class Difference:
    """Difference of two models in a measure, by least squares.

    Args:
        measure: measure.
        first, second: names of the models.
        value: mean of the first - mean of the second.
        p_value: p-value by Student's t distribution.
        numbers: number of outcomes of the first and of the second.
        num_raters: number of raters.
        effects: what else has effects in the model of least squares: "rater", "clip".
        adjusted_p: p-value after Benjamini and Hochberg, over all differences of the report.
    """

    measure: str
    first: str
    second: str
    value: Estimate
    p_value: float
    numbers: tuple[int, int]
    num_raters: int
    effects: tuple[str, ...]
    adjusted_p: float = math.nan


@dataclass(frozen=True)
class HelpSummary:
    """Whether help follows the metric.

    Args:
        metrics: model -> its metrics: of its scores if they are given, else Total as recorded with its captions.
        correlations: correlations of all metrics and measures that are known.
        differences: differences of any two models.
        uncompared: measures of several models with too few data for differences.
    """

    metrics: Mapping[str, Metrics]
    correlations: tuple[Correlation, ...]
    differences: tuple[Difference, ...]
    uncompared: tuple[str, ...]


def summarize_help(
    feedback: Sequence[Feedback], ratings: Ratings | None, *, scores: Mapping[str, Sequence[Score]] | None = None
) -> HelpSummary:
    """Relate what people do with captions to the metric.

    Args:
        feedback: all feedback.
        ratings: ratings from its votes.
        scores: model -> scores of its captions of any clips, by one judge. They replace the Totals that were recorded,
            which may be another judge's: a caption then has the score of the model's first sample of the same clip.
    """
    metrics = _metrics_of_models(feedback, scores)
    by_measure: dict[str, list[Outcome]] = {}
    for outcome in list_outcomes(feedback, scores):
        by_measure.setdefault(outcome.measure, []).append(outcome)
    correlations = [_correlate_ratings(ratings, metrics, metric) for metric in METRICS] if ratings else []
    for own in by_measure.values():
        for metric in METRICS:
            correlations += [_correlate_means(own, metrics, metric), _correlate_captions(own, metric)]
    differences = {measure: _compare_models(own) for measure, own in by_measure.items()}
    several = [measure for measure, own in by_measure.items() if len({one.model for one in own}) > 1]
    return HelpSummary(
        metrics,
        tuple(one for one in correlations if one.number),
        tuple(_adjust([one for own in differences.values() for one in own])),
        tuple(measure for measure in several if not differences[measure]),
    )


def list_outcomes(feedback: Sequence[Feedback], scores: Mapping[str, Sequence[Score]] | None = None) -> list[Outcome]:
    """Return the outcomes of all texts that people wrote, and of all captions that they rated good or bad."""
    by_clip = {
        (model, Path(one.video).name, one.start_seconds, one.end_seconds): _metrics_of([one])
        for model, own in (scores or {}).items()
        for one in own
        if one.sample == 0
    }

    def outcome_of(one: Feedback, measure: str, value: float | None) -> list[Outcome]:
        if value is None:
            return []
        model, part = one.first.name or NO_DRAFT, (one.start_seconds, one.end_seconds)
        recorded = {} if scores or one.first.total is None else {"total": one.first.total}
        metrics = by_clip.get((model, Path(one.video).name, *part), {}) if scores else recorded
        return [Outcome(measure, model, one.rater, (one.kept_video or one.video, *part), value, metrics)]

    outcomes = []
    for one in last_ratings(feedback):
        if one.tab == "caption":
            outcomes += outcome_of(one, "rated good", float(one.action == "good"))
    for one in feedback:
        if one.tab == "write" and one.action in ("accept", "edit", "finish"):
            draft = one.first.text.strip()
            outcomes += outcome_of(one, "accepted", float(one.action == "accept") if draft else None)
            outcomes += outcome_of(one, "kept of draft", share_kept(draft, one.text) if draft else None)
            outcomes += outcome_of(one, "final Total", one.total)
            outcomes += outcome_of(one, "seconds", one.seconds)
    return outcomes


def _metrics_of(scores: Sequence[Score]) -> Metrics:
    measures = compute_measures(scores)
    return {name: measures[name] for name in METRICS}


def _metrics_of_models(
    feedback: Sequence[Feedback], scores: Mapping[str, Sequence[Score]] | None
) -> Mapping[str, Metrics]:
    """Return model -> its metrics; by recorded Totals, each caption of a clip counts once."""
    if scores:
        return {model: _metrics_of(own) for model, own in scores.items()}
    totals: dict[str, dict[Hashable, float]] = {}
    for one in feedback:
        for caption in one.captions:
            if caption.total is not None:
                key = (one.kept_video or one.video, one.start_seconds, one.end_seconds, caption.text)
                totals.setdefault(caption.name, {})[key] = caption.total
    return {model: {"total": fmean(own.values())} for model, own in totals.items()}


def _correlate_ratings(ratings: Ratings, metrics: Mapping[str, Metrics], metric: str) -> Correlation:
    """Correlate the ratings of models with a metric."""
    columns = [index for index, name in enumerate(ratings.models) if metric in metrics.get(name, {})]
    values = np.array([metrics[name][metric] for name in ratings.models if metric in metrics.get(name, {})])
    fitted = np.array([one.value for one in ratings.models.values()])
    rho = _estimate_rho(
        _spearman(values, fitted[columns]),
        lambda: [_spearman(values, drawn[columns]) for drawn in ratings.draws[:RESAMPLES]],
        num_raters=ratings.num_raters,
        is_enough=len(columns) >= MIN_MODELS,
    )
    return Correlation("rating", metric, "model", len(columns), ratings.num_raters, rho)


def _correlate_means(outcomes: Sequence[Outcome], metrics: Mapping[str, Metrics], metric: str) -> Correlation:
    """Correlate the means of a measure of the models with a metric."""
    known = [one for one in outcomes if metric in metrics.get(one.model, {})]
    names, model = np.unique([one.model for one in known], return_inverse=True)
    values, helped = np.array([metrics[name][metric] for name in names]), np.array([one.value for one in known])

    def correlate(rows: NDArray[np.int_]) -> float:
        counts = np.bincount(model[rows], minlength=len(names))
        if not counts.all():
            return math.nan
        return _spearman(values, np.bincount(model[rows], helped[rows], minlength=len(names)) / counts)

    raters = _rows_of_raters(known)
    rho = _estimate_rho(
        correlate(np.arange(len(known))),
        lambda: _resample(correlate, raters),
        num_raters=len(raters),
        is_enough=len(names) >= MIN_MODELS,
    )
    return Correlation(outcomes[0].measure, metric, "model", len(names), len(raters), rho)


def _correlate_captions(outcomes: Sequence[Outcome], metric: str) -> Correlation:
    """Correlate a measure with a metric over captions."""
    known = [one for one in outcomes if metric in one.metrics]
    values, helped = (np.array(row) for row in ([one.metrics[metric] for one in known], [one.value for one in known]))

    def correlate(rows: NDArray[np.int_]) -> float:
        return _spearman(values[rows], helped[rows])

    raters, number, everything = _rows_of_raters(known), len(known), correlate(np.arange(len(known)))
    shrunk = everything * (1 - 2 / max(number, 2))  # at 1 the error would be 0, whatever the number
    rho = _estimate_rho(
        everything,
        lambda: _resample(correlate, raters),
        num_raters=len(raters),
        is_enough=number >= MIN_CAPTIONS,
        # Of Fisher's z, by Bonett and Wright, in units of the correlation.
        least_error=(1 - shrunk**2) * math.sqrt((1 + shrunk**2 / 2) / max(number - 3, 1)),
    )
    return Correlation(outcomes[0].measure, metric, "caption", number, len(raters), rho)


def _spearman(values: Array, others: Array) -> float:
    """Return Spearman's correlation; nan if it is not defined."""
    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(others) == 0:
        return math.nan
    return float(spearmanr(values, others).statistic)


def _rows_of_raters(outcomes: Sequence[Outcome]) -> list[NDArray[np.int_]]:
    rater = np.array([one.rater for one in outcomes])
    return [np.flatnonzero(rater == name) for name in np.unique(rater)]


def _resample(statistic: Callable[[NDArray[np.int_]], float], raters: Sequence[NDArray[np.int_]]) -> list[float]:
    """Return a statistic of the rows of resampled raters."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(raters), size=(RESAMPLES, len(raters)))
    return [statistic(np.concatenate([raters[index] for index in drawn])) for drawn in draws]


def _estimate_rho(
    rho: float, draw: Callable[[], list[float]], *, num_raters: int, is_enough: bool, least_error: float = 0.0
) -> Estimate | None:
    """Return a correlation with its interval by resampled ones; None if it cannot be told."""
    if not is_enough or num_raters < MIN_RATERS or math.isnan(rho):
        return None
    draws = np.array(draw())
    # Where few resamples have values of all models, nothing is known of the error.
    error = np.nanstd(draws) if np.isfinite(draws).mean() > 0.5 else math.inf
    # Resampling G raters has the variance of G - 1.
    error = max(float(error) * math.sqrt(num_raters / (num_raters - 1)), least_error)
    reach = error * student_t.ppf(0.975, num_raters - 1)
    return Estimate(rho, max(-1.0, rho - reach), min(1.0, rho + reach))


def _compare_models(outcomes: Sequence[Outcome]) -> list[Difference]:
    """Return the differences of any two models in a measure; none if there are too few data.

    Raters and clips have effects if each has two outcomes or more on average: a rater who takes long with whatever
    draft then says nothing about the drafts. The standard error is the larger one of independent outcomes and of the
    jackknife over raters, in the closed form CR3 (Cameron and Miller, 2015): people differ in what helps them.
    """
    models, model = np.unique([one.model for one in outcomes], return_inverse=True)
    raters, rater = np.unique([one.rater for one in outcomes], return_inverse=True)
    clip = np.unique([repr(one.clip) for one in outcomes], return_inverse=True)[1]
    number, num_raters = len(outcomes), len(raters)
    if len(models) < 2 or num_raters < MIN_RATERS or number < MIN_CAPTIONS:
        return []
    groups = {"rater": rater, "clip": clip}
    effects = tuple(name for name, group in groups.items() if number >= 2 * (group.max() + 1))
    columns = (model, *(groups[name] for name in effects))
    inputs = np.hstack([np.eye(group.max() + 1)[group] for group in columns])
    inverse, values = np.linalg.pinv(inputs), np.array([one.value for one in outcomes])
    residual = values - inputs @ (inverse @ values)
    freedom = number - np.linalg.matrix_rank(inputs)
    pairs = list(combinations(range(len(models)), 2))
    contrasts = np.array([np.eye(inputs.shape[1])[first] - np.eye(inputs.shape[1])[second] for first, second in pairs])
    if freedom < 1 or not np.allclose(contrasts @ inverse @ inputs, contrasts, atol=1e-6):
        return []  # for example, each rater has had the drafts of one model only
    weights = contrasts @ inverse  # (pairs, N)
    independent = (weights**2).sum(axis=1) * (residual @ residual) / freedom
    jackknife = np.zeros(len(pairs))
    for rows in (np.flatnonzero(rater == index) for index in range(num_raters)):
        remaining = np.eye(len(rows)) - inputs[rows] @ inverse[:, rows]
        left_out = np.linalg.pinv(remaining, rcond=1e-9, hermitian=True)
        if not np.allclose(weights[:, rows] @ left_out @ remaining, weights[:, rows], atol=1e-6):
            return []  # without this rater nothing is left to compare
        jackknife += (weights[:, rows] @ left_out @ residual[rows]) ** 2 * (num_raters - 1) / num_raters
    errors = np.sqrt(np.maximum(independent, jackknife))
    counts = np.bincount(model)
    differences = []
    for (first, second), value, error in zip(pairs, weights @ values, errors, strict=True):
        reach = error * student_t.ppf(0.975, num_raters - 1)
        differences.append(
            Difference(
                outcomes[0].measure,
                str(models[first]),
                str(models[second]),
                Estimate(float(value), float(value - reach), float(value + reach)),
                p_value=float(2 * student_t.sf(abs(value) / max(error, 1e-12), num_raters - 1)),
                numbers=(int(counts[first]), int(counts[second])),
                num_raters=num_raters,
                effects=effects,
            )
        )
    return differences


def _adjust(differences: Sequence[Difference]) -> list[Difference]:
    """Adjust p-values for the number of differences."""
    if not differences:
        return []
    adjusted = false_discovery_control([one.p_value for one in differences])
    return [replace(one, adjusted_p=float(p)) for one, p in zip(differences, adjusted, strict=True)]
