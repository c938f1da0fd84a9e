"""People's feedback as comparisons to train on: votes, edits, what is missing, and ratings. Imports no torch."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from salmonn.preference.feedback import COUNTED_ONLY, Candidate, Feedback, find_unused_reason
from salmonn.records import Comparison, Modality
from salmonn.score.repetition import remove_clauses

PEOPLE = ("vote", "edit", "missing", "rating")  # sources of comparisons that people made
ClipKey = tuple[str, Modality, float | None, float | None, str]  # video, modality, start, end, prompt


def to_comparisons(
    feedback: Sequence[Feedback], *, unpaired: bool = False, margins: Mapping[Feedback, float] | None = None
) -> tuple[list[Comparison], Counter[str]]:
    """Return feedback as comparisons, and reason -> number of records that cannot be used.

    - A vote prefers one of two captions. The ground truth is the person's text.
    - An edit prefers the text to the draft, and is the ground truth.
    - Where a person wrote what a caption lacks, the caption with that text appended and its wrong clauses removed is
      preferred to the original. Marks alone make no such pair: a captioner that only learns what to leave out falls
      silent.
    - Ratings: the good captions of a clip are preferred to the bad ones, each used at least once. An accepted draft is
      good, and both captions of a vote for neither ("both bad") are bad. Of several ratings by one person, the last one
      counts; captions that equally many people find good and bad are left out.

    The last text that a person wrote about a clip, else its reference caption, is the ground truth of its other
    comparisons. A person's later rating of a caption replaces the marks and what is missing of the one before; of the
    marks of several people, the last count.

    Args:
        feedback: feedback; the videos of the comparisons are relative to its folder.
        unpaired: return each rated caption separately, for losses that need no pairs.
        margins: vote -> margin of its comparison (`salmonn.preference.taste`); without, votes have none.
    """
    unused = Counter(reason for one in feedback if (reason := find_unused_reason(one)))
    usable = [one for one in feedback if one.action not in COUNTED_ONLY and not find_unused_reason(one)]
    margins = margins or {}
    comparisons = [comparison for one in usable for comparison in _own_comparisons(one, margins.get(one))]
    ratings = last_ratings(usable)
    comparisons += [_correct(one) for one in ratings if one.missing]
    rated = _collect_ratings(usable)
    if disagreed := sum(not one.balance for one in rated):
        unused["people disagree whether the caption is good"] += disagreed
    comparisons += _unpaired(rated) if unpaired else _pairs(rated, unused)
    truths = {_key(one): one.ground_truth for one in usable if one.ground_truth}
    truths |= {_key(one): one.own_text for one in usable if one.own_text}
    marks = {(_key(one), one.first.text): one.marks for one in ratings if one.marks}
    known = {_comparison_key(one) for one in comparisons}
    if spare := sum(one.action == "finish" and _key(one) not in known for one in usable):
        unused["a text without a draft, and no other feedback on the clip"] += spare
    return [
        replace(
            one,
            ground_truth=one.ground_truth or truths.get(_comparison_key(one), ""),
            chosen_marks=marks.get((_comparison_key(one), one.chosen), ()),
            rejected_marks=marks.get((_comparison_key(one), one.rejected), ()),
        )
        for one in comparisons
    ], unused


def last_ratings(feedback: Sequence[Feedback]) -> list[Feedback]:
    """Return each person's last good or bad rating of each caption, in order; no id means a different person each time.

    Captions of a clip count as one if they differ in white space only.
    """
    last = {}
    for number, one in enumerate(feedback):
        if one.action in ("good", "bad"):
            last[one.rater or number, one.video, _key(one), " ".join(one.first.text.split())] = number
    return [feedback[number] for number in sorted(last.values())]


def deal_pairs(comparisons: Sequence[Comparison], max_pairs_per_video: int) -> list[Comparison]:
    """Return at most `max_pairs_per_video` comparisons of each clip and prompt, dealt evenly to their raters, in order.

    Raters take turns: next is the one with the fewest comparisons of the clip, and then of all clips, so that a person
    who votes on everything does not outvote the others. All comparisons without an id, and those that several people's
    ratings make, count as one rater's.
    """
    waiting: dict[ClipKey, dict[str, list[int]]] = {}
    for index, one in enumerate(comparisons):
        waiting.setdefault(_comparison_key(one), {}).setdefault(one.rater, []).append(index)
    kept, num_kept = list[int](), Counter[str]()
    for by_rater in waiting.values():
        turns = Counter[str]()
        while by_rater and turns.total() < max_pairs_per_video:
            rater = min(by_rater, key=lambda one: (turns[one], num_kept[one]))
            kept.append(by_rater[rater].pop(0))
            turns[rater] += 1
            num_kept[rater] += 1
            if not by_rater[rater]:
                del by_rater[rater]
    return [comparisons[index] for index in sorted(kept)]


def describe_comparisons(comparisons: Sequence[Comparison], unused: Counter[str]) -> str:
    """Return the numbers as a sentence: what the comparisons are from, and what could not be used."""
    counts = Counter(one.source for one in comparisons)
    sources = ", ".join(f"{count} from {source}" for source, count in counts.items())
    text = f"{len(comparisons)} comparisons ({sources})" if comparisons else "no comparisons"
    reasons = ", ".join(f"{reason} ({count})" for reason, count in unused.items())
    return f"{text}; not used: {reasons}" if reasons else text


def _own_comparisons(one: Feedback, margin: float | None) -> list[Comparison]:
    """Return the comparisons that a single vote or edit makes."""
    if one.chosen and one.rejected:
        pair = _compare(one, one.chosen.text, one.rejected.text, source="vote", ground_truth=one.own_text)
        return [replace(pair, margin=margin)]
    if one.action == "edit" and one.own_text.split() != one.first.text.split():
        pair = _compare(one, one.own_text, one.first.text, source="edit", ground_truth=one.own_text)
        return [replace(pair, rejected_finished=one.first.finished)]
    return []


def _correct(one: Feedback) -> Comparison:
    """Prefer the caption with the missing text, and without its wrong clauses."""
    wrong = [(mark.start, mark.end) for mark in one.marks if not mark.is_right]
    corrected = f"{remove_clauses(one.first.text, wrong)} {one.missing}".strip()
    return _compare(one, corrected, one.first.text, source="missing")


def _compare(one: Feedback, chosen: str, rejected: str, *, source: str, ground_truth: str = "") -> Comparison:
    video, modality, start, end, prompt = _key(one)
    return Comparison(
        video=video,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        ground_truth=ground_truth,
        source=source,
        modality=modality,
        start_seconds=start,
        end_seconds=end,
        rater=one.rater,
    )


def _key(one: Feedback) -> ClipKey:
    prompt = (one.chosen or one.first).prompt
    return f"videos/{one.kept_video}", one.modality, one.start_seconds, one.end_seconds, prompt


def _comparison_key(one: Comparison) -> ClipKey:
    return one.video, one.modality, one.start_seconds, one.end_seconds, one.prompt


@dataclass
class _RatedCaption:
    """A caption of a clip with the last rating by each person: +1 for good, -1 for bad."""

    feedback: Feedback  # one that rates it
    text: str
    ratings: dict[object, int] = field(default_factory=dict)

    @property
    def balance(self) -> int:
        return sum(self.ratings.values())


def _collect_ratings(feedback: Sequence[Feedback]) -> list[_RatedCaption]:
    rated: dict[object, _RatedCaption] = {}
    for number, one in enumerate(feedback):
        for caption, rating in _ratings_of(one):
            key = (_key(one), " ".join(caption.text.split()))
            # People without an id are different ones.
            rated.setdefault(key, _RatedCaption(one, caption.text)).ratings[one.rater or number] = rating
    return list(rated.values())


def _ratings_of(one: Feedback) -> Iterator[tuple[Candidate, int]]:
    if one.action in ("good", "accept"):
        yield one.first, 1
    elif one.action == "bad" or one.choice == "both bad":
        yield from ((caption, -1) for caption in one.captions)


def _unpaired(rated: Sequence[_RatedCaption]) -> list[Comparison]:
    comparisons = []
    for one in rated:
        if one.balance > 0:
            pair = _compare(one.feedback, one.text, "", source="rating")
            comparisons.append(replace(pair, rejected_finished=False, rater=_rater([one])))
        elif one.balance < 0:
            pair = _compare(one.feedback, "", one.text, source="rating")
            comparisons.append(replace(pair, chosen_finished=False, rater=_rater([one])))
    return comparisons


def _pairs(rated: Sequence[_RatedCaption], unused: Counter[str]) -> list[Comparison]:
    """Pair good and bad captions of each clip, and count those of clips with only one kind."""
    by_clip: dict[ClipKey, list[_RatedCaption]] = {}
    for one in rated:
        by_clip.setdefault(_key(one.feedback), []).append(one)
    comparisons = []
    for captions in by_clip.values():
        good, bad = [one for one in captions if one.balance > 0], [one for one in captions if one.balance < 0]
        if not (good and bad):
            if good or bad:
                unused["no caption of the clip with the opposite rating"] += len(good or bad)
            continue
        for number in range(max(len(good), len(bad))):
            better, worse = good[number % len(good)], bad[number % len(bad)]
            pair = _compare(better.feedback, better.text, worse.text, source="rating")
            comparisons.append(replace(pair, rater=_rater([better, worse])))
    return comparisons


def _rater(captions: Sequence[_RatedCaption]) -> str:
    """Return the person who rated all of them; "" if there were several."""
    raters = {rater for one in captions for rater in one.ratings}
    (rater,) = raters if len(raters) == 1 else [""]
    return rater if isinstance(rater, str) else ""
