"""Report on people's feedback: use of each model's captions, ratings, agreement with the metric, and raters."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from salmonn.preference.feedback import Feedback
from salmonn.preference.feedback_pairs import last_ratings, to_comparisons
from salmonn.preference.helpfulness import NO_DRAFT, list_outcomes
from salmonn.preference.ratings import Ratings, fit_ratings
from salmonn.score.stats import Interval, wilson_interval


@dataclass(frozen=True)
class Proportion:
    """`count` of `total` votes, with the 95 % interval of the true proportion."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The proportion; 0 without votes."""
        return self.count / max(self.total, 1)

    @property
    def interval(self) -> Interval:
        """Wilson's interval; from 0 to 1 without votes."""
        return wilson_interval(self.count, self.total)


@dataclass(frozen=True)
class Matchup:
    """The votes between two models, or between two temperatures of one.

    Args:
        first, second: names of the candidates, sorted.
        wins, losses: votes for the first and for the second.
        ties: votes that both are equally good.
        both_bad: votes that neither is good.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    both_bad: int

    @property
    def win_rate(self) -> Proportion:
        """Votes for the first candidate, among the votes for one of the two."""
        return Proportion(self.wins, self.wins + self.losses)


@dataclass(frozen=True)
class ModelUse:
    """What people did with the captions of a model, or without a draft.

    Args:
        name: name of the model, with its temperature if it was sampled; `NO_DRAFT` for texts without a draft.
        copied: copies among the captions shown; without those of earlier versions, which did not count captions shown.
        rated_good: good ratings among all; for each person and caption, the last rating counts.
        accepted, edited: drafts that were accepted unchanged, or edited, among the drafts shown; the others were
            abandoned.
        num_texts: number of texts written, with this draft or without one.
        persistence: mean share of a draft's claims that the final text keeps (`share_kept`); None without drafts.
        seconds: median time until a text was done; None without texts.
        total: mean Total of the texts; None if none was scored.
    """

    name: str
    copied: Proportion
    rated_good: Proportion
    accepted: Proportion
    edited: Proportion
    num_texts: int
    persistence: float | None
    seconds: float | None
    total: float | None


@dataclass(frozen=True)
class FeedbackSummary:
    """Summary of all feedback.

    Args:
        num_votes: number of votes.
        num_compared: pairs of captions shown, with or without a vote; 0 for folders of earlier versions.
        matchups: matchups, most votes first.
        first_preferred: votes for caption A among the votes for A or B; far from one half, there is position bias.
        agreement: votes for the caption with the lower Total, among the votes for A or B with different Totals.
        num_equal_totals: votes for A or B with equal Totals.
        num_comparisons: comparisons to train on that all feedback makes.
        num_ratings, num_edits, num_copies: captions rated by each person, texts that people wrote or edited,
            and copies.
        raters: votes by person.
        models: use of each model's captions.
        ratings: ratings of models; None without votes.
    """

    num_votes: int
    num_compared: int
    matchups: tuple[Matchup, ...]
    first_preferred: Proportion
    agreement: Proportion
    num_equal_totals: int
    num_comparisons: int
    num_ratings: int
    num_edits: int
    num_copies: int
    raters: "RatersSummary"
    models: tuple[ModelUse, ...]
    ratings: Ratings | None


def summarize_feedback(feedback: Sequence[Feedback]) -> FeedbackSummary:
    """Summarize feedback."""
    votes = [one for one in feedback if one.action == "vote"]
    num_decided = sum(vote.chosen is not None for vote in votes)
    agreement, num_equal_totals = measure_agreement(votes)
    actions = Counter(one.action for one in feedback)
    return FeedbackSummary(
        num_votes=len(votes),
        num_compared=sum(one.action == "shown" and one.tab == "compare" for one in feedback),
        matchups=_count_matchups(votes),
        first_preferred=Proportion(sum(vote.choice == "first" for vote in votes), num_decided),
        agreement=agreement,
        num_equal_totals=num_equal_totals,
        num_comparisons=len(to_comparisons(feedback)[0]),
        num_ratings=len(last_ratings(feedback)),
        num_edits=sum(bool(one.own_text) for one in feedback),
        num_copies=actions["copy"],
        raters=summarize_raters(votes),
        models=_summarize_use(feedback),
        ratings=fit_ratings(votes),
    )


def measure_agreement(votes: Sequence[Feedback]) -> tuple[Proportion, int]:
    """Return votes for the caption with the lower Total, and the number of votes between equal Totals."""
    totals = [
        (vote.chosen.total, vote.rejected.total)
        for vote in votes
        if vote.chosen and vote.rejected and vote.chosen.total is not None and vote.rejected.total is not None
    ]
    different = [(chosen, rejected) for chosen, rejected in totals if chosen != rejected]
    lower = sum(chosen < rejected for chosen, rejected in different)
    return Proportion(lower, len(different)), len(totals) - len(different)


def _summarize_use(feedback: Sequence[Feedback]) -> tuple[ModelUse, ...]:
    by_model: dict[str, list[Feedback]] = {}
    for one in feedback:
        if one.tab != "compare":
            by_model.setdefault(one.first.name or NO_DRAFT, []).append(one)
    return tuple(_model_use(name, by_model[name]) for name in sorted(by_model))


def _model_use(name: str, feedback: Sequence[Feedback]) -> ModelUse:
    counts = Counter((one.tab, one.action) for one in feedback)
    num_drafts = counts["write", "shown"] * (name != NO_DRAFT)
    ratings = [one.action == "good" for one in last_ratings(feedback) if one.tab == "caption"]
    num_copied = sum(one.action == "copy" and not one.first.text for one in feedback)  # earlier versions saved the text
    values: dict[str, list[float]] = {}
    for one in list_outcomes(feedback):
        values.setdefault(one.measure, []).append(one.value)
    kept, seconds, totals = (values.get(measure) for measure in ("kept of draft", "seconds", "final Total"))
    return ModelUse(
        name,
        copied=Proportion(num_copied, counts["caption", "shown"]),
        rated_good=Proportion(sum(ratings), len(ratings)),
        accepted=Proportion(counts["write", "accept"], num_drafts),
        edited=Proportion(counts["write", "edit"], num_drafts),
        num_texts=sum(counts["write", action] for action in ("accept", "edit", "finish")),
        persistence=fmean(kept) if kept else None,
        seconds=median(seconds) if seconds else None,
        total=fmean(totals) if totals else None,
    )


def _count_matchups(votes: Sequence[Feedback]) -> tuple[Matchup, ...]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for vote in votes:
        first, second = sorted(one.name for one in vote.captions)
        if first != second:  # two samples of one candidate have no winner
            outcome = vote.chosen.name if vote.chosen else vote.choice or ""
            counts.setdefault((first, second), Counter())[outcome] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    return tuple(
        Matchup(first, second, count[first], count[second], count["tie"], count["both bad"])
        for (first, second), count in ordered
    )


@dataclass(frozen=True)
class RaterSummary:
    """The votes of one rater.

    Args:
        rater: id; "" for all votes without one.
        num_votes: number of votes.
        num_ties: votes that both captions are equally good.
        num_both_bad: votes that neither caption is good.
        agreement: same preferences among the captions that both this rater and another one preferred one of; each
            other rater counts.
    """

    rater: str
    num_votes: int
    num_ties: int
    num_both_bad: int
    agreement: Proportion


@dataclass(frozen=True)
class RatersSummary:
    """All raters, most votes first, and the agreement of any two of them.

    Args:
        raters: raters.
        agreement: same preferences among all cases in which two raters preferred one of the same two captions.
    """

    raters: tuple[RaterSummary, ...]
    agreement: Proportion


def summarize_raters(votes: Sequence[Feedback]) -> RatersSummary:
    """Count votes by rater, and compare the preferences of each two raters for the same two captions of a clip.

    Of several votes of a rater on the same captions, the last counts. Votes without an id, and on equal captions, are
    not compared.
    """
    # Two captions of a clip -> rater -> preferred text.
    preferences: dict[tuple[object, ...], dict[str, str]] = {}
    choices: dict[str, Counter[str]] = {}
    for vote in votes:
        choices.setdefault(vote.rater, Counter())[vote.choice or ""] += 1
        if vote.rater and vote.chosen:
            texts = frozenset(" ".join(one.text.split()) for one in vote.captions)
            if len(texts) < 2:  # nothing to prefer
                continue
            key = (vote.kept_video or vote.video, vote.start_seconds, vote.end_seconds, texts)
            preferences.setdefault(key, {})[vote.rater] = " ".join(vote.chosen.text.split())
    same, shared = Counter[str](), Counter[str]()
    for by_rater in preferences.values():
        for (one, its), (other, theirs) in combinations(by_rater.items(), 2):
            shared.update((one, other))
            same.update((one, other) if its == theirs else ())
    raters = [
        RaterSummary(rater, count.total(), count["tie"], count["both bad"], Proportion(same[rater], shared[rater]))
        for rater, count in choices.items()
    ]
    return RatersSummary(
        tuple(sorted(raters, key=lambda one: (-one.num_votes, one.rater))),
        Proportion(same.total() // 2, shared.total() // 2),  # each case counted for both raters
    )
