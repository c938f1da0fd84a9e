"""The judge of synthetic clips: reads captions and events as claims, and matches them. No model is asked."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from salmonn.records import Event, Mention, Reference, Score, Unscored
from salmonn.score.judge import ProgressCallback, ScoringTask, make_score
from salmonn.score.repetition import count_repeated_words
from salmonn.synthetic.parser import Claim, parse_claims

RULES_VERSION = 1  # to be raised with every change to lexicon, parser, matching or repetition that changes scores
OUT_OF_ORDER = "told out of order"


class RuleJudge:
    """Judges captions of synthetic clips by reading both sides as claims.

    Each event is in exactly one class, N = missing + incorrect + correct:
    *correct* where a claim tells the same, in its place in time; *incorrect* where a claim differs from it in one
    detail (a vague claim, "a circle appears", differs in the detail that it leaves out), or where it is told against
    the order of time within its modality; *missing* otherwise. A claim that tells of no event is *hallucinated*, save
    that it repeats another claim: then its words count as repeated, also where they are other words ("a high tone is
    heard", "a shrill tone plays"), which `count_repeated_words` alone does not see.
    """

    name = "rule"
    prompt_hash = f"rules {RULES_VERSION}"
    is_deterministic = True

    def check(self, reference: Reference) -> None:
        """Raise ValueError where the reference has no event list, or an event that this judge cannot read."""
        if not reference.events:
            raise ValueError(
                f"the reference of {reference.video} has no event list: make one of its caption by `salmonn events`"
            )
        for event in reference.events:
            _read_event(event.text)

    def judge(
        self, tasks: Sequence[ScoringTask], *, seed: int = 0, progress: ProgressCallback | None = None
    ) -> list[Score | Unscored]:
        """Score captions; `seed` changes nothing."""
        del seed
        scores: list[Score | Unscored] = []
        for task in tasks:
            scores.append(self.judge_one(task))
            if progress:
                progress(1)
        return scores

    def judge_one(self, task: ScoringTask) -> Score:
        """Score one caption.

        Raises:
            ValueError: the reference has an event that this judge cannot read.
        """
        known = task.reference.events
        events = [_read_event(event.text) for event in known]
        claims = parse_claims(task.caption.text)
        exact = _match_exact(claims, events)
        close = _match_close(claims, events, exact=exact)
        unordered = _out_of_order(known, events, told=[exact[place] for place in sorted(exact)])
        wrong = {*unordered, *close.values()}
        told = sorted((exact | close).items())
        stray = [place for place in range(len(claims)) if place not in exact and place not in close]
        doubled = [place for place in stray if _repeats(claims, place, exact=exact)]
        return make_score(
            task,
            missed=[event for place, event in enumerate(known) if place not in (exact | close).values()],
            mentions=[
                Mention(
                    known[event], claims[place].clause, event not in wrong, OUT_OF_ORDER if event in unordered else ""
                )
                for place, event in told
            ],
            hallucinations=[claims[place].clause for place in stray if place not in doubled],
            repeated=[claims[place].clause for place in doubled],
            num_repeated_words=_doubled_words(claims, doubled),
        )


@lru_cache(maxsize=65536)
def _read_event(text: str) -> Claim:
    claims = parse_claims(text)
    if len(claims) != 1 or claims[0].kind == "unreadable":
        raise ValueError(
            f"the rule judge cannot read the event {text!r} as one claim: it knows synthetic clips only, "
            "use another judge for other videos"
        )
    return claims[0]


def _key(claim: Claim) -> tuple[str, tuple[str, ...]]:
    return claim.kind, claim.details


def _repeats(claims: Sequence[Claim], place: int, *, exact: Mapping[int, int]) -> bool:
    """Whether the claim says what an earlier one says, or a later one that is taken to tell the event."""
    return any(
        _key(claims[place]) == _key(claim) and (other < place or other in exact)
        for other, claim in enumerate(claims)
        if other != place
    )


def _doubled_words(claims: Sequence[Claim], doubled: Sequence[int]) -> int:
    """Words of the clauses that tell nothing but what is told elsewhere."""
    clauses = {(claims[place].clause_number, claims[place].clause) for place in doubled}
    news = {(claim.clause_number, claim.clause) for place, claim in enumerate(claims) if place not in doubled}
    return sum(count_repeated_words(clause)[1] for _, clause in clauses - news)


def _match_exact(claims: Sequence[Claim], events: Sequence[Claim]) -> dict[int, int]:
    """Place of claim -> place of event that it tells exactly, one to one.

    Where an event comes twice, the claims go to where most of the telling is in order: a longest common subsequence
    within each modality first, what is left over in order.
    """
    matched: dict[int, int] = {}
    for modality in ("visual", "audio"):
        rows = [place for place, claim in enumerate(claims) if claim.modality == modality]
        columns = [place for place, event in enumerate(events) if event.modality == modality]
        common = _common_subsequence([_key(claims[row]) for row in rows], [_key(events[column]) for column in columns])
        matched.update({rows[row]: columns[column] for row, column in common})
    free = [place for place in range(len(events)) if place not in matched.values()]
    for place, claim in enumerate(claims):
        same = [event for event in free if _key(events[event]) == _key(claim)]
        if place not in matched and same:
            matched[place] = same[0]
            free.remove(same[0])
    return matched


def _common_subsequence(first: Sequence[object], second: Sequence[object]) -> list[tuple[int, int]]:
    """Pairs of places of a longest common subsequence; the earliest places of `first` among equals."""
    longest = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in range(len(first) - 1, -1, -1):
        for j in range(len(second) - 1, -1, -1):
            same = 1 + longest[i + 1][j + 1] if first[i] == second[j] else 0
            longest[i][j] = max(same, longest[i + 1][j], longest[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        if first[i] == second[j] and longest[i][j] == 1 + longest[i + 1][j + 1]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i][j] == longest[i][j + 1]:
            j += 1
        else:
            i += 1
    return pairs


def _match_close(claims: Sequence[Claim], events: Sequence[Claim], *, exact: Mapping[int, int]) -> dict[int, int]:
    """Place of claim -> place of event of the same kind that differs in one detail: as many pairs as possible.

    Kuhn's augmenting paths, claims in order, each trying the nearest event first. A claim that repeats an earlier one
    takes no part: it says nothing new of another event (Total is the same either way).
    """
    free = [event for event in range(len(events)) if event not in exact.values()]
    wishes = {}
    for place, claim in enumerate(claims):
        if place not in exact and not _repeats(claims, place, exact=exact):
            near = [event for event in free if _is_close(claim, events[event])]
            wishes[place] = [event for _, event in sorted((abs(event - place), event) for event in near)]
    holder: dict[int, int] = {}
    for place in wishes:
        _augment(place, wishes=wishes, holder=holder, seen=set())
    return {place: event for event, place in holder.items()}


def _is_close(claim: Claim, event: Claim) -> bool:
    return claim.kind == event.kind and sum(a != b for a, b in zip(claim.details, event.details, strict=True)) == 1


def _augment(place: int, *, wishes: Mapping[int, Sequence[int]], holder: dict[int, int], seen: set[int]) -> bool:
    """Give the claim an event, moving earlier claims to their other wishes where need be; whether it worked."""
    for event in wishes[place]:
        if event not in seen:
            seen.add(event)
            if event not in holder or _augment(holder[event], wishes=wishes, holder=holder, seen=seen):
                holder[event] = place
                return True
    return False


def _out_of_order(events: Sequence[Event], read: Sequence[Claim], *, told: Sequence[int]) -> set[int]:
    """The few events without which the rest is told in order: the one in most violations goes, until none is left.

    Of equals the one told latest goes. Events that overlap in time, or whose times are unknown, may come in any order.
    """
    clashes = {event: set[int]() for event in told}
    for place, earlier in enumerate(told):
        for later in told[place + 1 :]:
            if read[earlier].modality == read[later].modality and events[later].precedes(events[earlier]):
                clashes[earlier].add(later)
                clashes[later].add(earlier)
    dropped: set[int] = set()
    while any(clashes.values()):
        most = max(reversed(told), key=lambda event: len(clashes[event]))
        dropped.add(most)
        for other in clashes.pop(most):
            clashes[other].discard(most)
        told = [event for event in told if event != most]
    return dropped
