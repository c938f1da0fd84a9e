"""Rule-based judge of synthetic clips: parse captions and events into claims, and match them, without a model."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from salmonn.records import Event, Mention, Reference, Score, Unscored
from salmonn.score.judge import ProgressCallback, ScoringTask, make_score
from salmonn.score.repetition import count_repeated_words
from salmonn.synthetic.parser import Claim, parse_claims

OUT_OF_ORDER = "out of order"
# Increase with any change of parsing or matching that changes a score; score files hold it as the judge's prompt_hash.
RULES_VERSION = 1


class RuleJudge:
    """Scores captions of synthetic clips by matching the claims of a caption with those of the reference events.

    Each event is in exactly one class, N = missing + incorrect + correct: *correct* if a claim states the same, at its
    place in time; *incorrect* if a claim differs in one detail (a vague claim, "a circle appears", differs in the
    detail that it omits), or violates the order of time within its modality; *missing* otherwise. A claim without an
    event is *hallucinated*, unless it repeats another claim: then its words count as repeated. Repetition is found in
    other words, too ("a high tone is heard", "a shrill tone plays"), which `count_repeated_words` alone does not find.
    """

    name = "rule"
    is_deterministic = True
    prompt_hash = f"rules {RULES_VERSION}"

    def check(self, reference: Reference) -> None:
        """Raise ValueError if the reference has no events, or an event that cannot be parsed."""
        if not reference.events:
            raise ValueError(
                f"the reference of {reference.video} has no event list: make one from its caption by `salmonn events`"
            )
        for event in reference.events:
            _parse_event(event.text)

    def judge(
        self, tasks: Sequence[ScoringTask], *, seed: int = 0, progress: ProgressCallback | None = None
    ) -> list[Score | Unscored]:
        """Score captions; `seed` has no effect."""
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
            ValueError: an event of the reference cannot be parsed.
        """
        events = task.reference.events
        expected = [_parse_event(event.text) for event in events]
        claims = parse_claims(task.caption.text)
        # Both map the index of a claim to the index of its event.
        exact = _match_exact(claims, expected)
        close = _match_close(claims, expected, exact=exact)
        unordered = _find_out_of_order(events, expected, order=[exact[claim] for claim in sorted(exact)])
        matched = exact | close
        unmatched = [index for index in range(len(claims)) if index not in matched]
        repeats = [index for index in unmatched if _is_repeat(claims, index, exact=exact)]
        return make_score(
            task,
            missed=[event for index, event in enumerate(events) if index not in matched.values()],
            mentions=[
                Mention(
                    events[event],
                    claims[claim].clause,
                    is_correct=event not in unordered and claim not in close,
                    reason=OUT_OF_ORDER if event in unordered else "",
                )
                for claim, event in sorted(matched.items())
            ],
            hallucinations=[claims[index].clause for index in unmatched if index not in repeats],
            repeated=[claims[index].clause for index in repeats],
            num_repeated_words=_count_repeated_words(claims, repeats),
        )


@lru_cache(maxsize=65536)
def _parse_event(text: str) -> Claim:
    claims = parse_claims(text)
    if len(claims) != 1 or claims[0].kind == "unreadable":
        raise ValueError(
            f"the rule judge cannot read the event {text!r} as one claim: it only knows synthetic clips; "
            "use another judge for other videos"
        )
    return claims[0]


def _fact(claim: Claim) -> tuple[str, tuple[str, ...]]:
    return claim.kind, claim.details


def _is_repeat(claims: Sequence[Claim], index: int, *, exact: Mapping[int, int]) -> bool:
    """Return whether a claim states the same as an earlier one, or as a later one that is matched with an event."""
    return any(
        _fact(claims[index]) == _fact(claim) and (other < index or other in exact)
        for other, claim in enumerate(claims)
        if other != index
    )


def _count_repeated_words(claims: Sequence[Claim], repeats: Sequence[int]) -> int:
    """Count the words of clauses that consist of repeated claims only."""
    clauses = {(claims[index].clause_number, claims[index].clause) for index in repeats}
    others = {(claim.clause_number, claim.clause) for index, claim in enumerate(claims) if index not in repeats}
    return sum(count_repeated_words(clause)[1] for _, clause in clauses - others)


def _match_exact(claims: Sequence[Claim], events: Sequence[Claim]) -> dict[int, int]:
    """Match claims with equal events, one to one: index of claim -> index of event.

    If an event occurs twice, as many claims as possible are matched in order: by a longest common subsequence within
    each modality first; the others are matched in sequence.
    """
    matched: dict[int, int] = {}
    for modality in ("visual", "audio"):
        rows = [index for index, claim in enumerate(claims) if claim.modality == modality]
        columns = [index for index, event in enumerate(events) if event.modality == modality]
        common = _common_subsequence(
            [_fact(claims[row]) for row in rows], [_fact(events[column]) for column in columns]
        )
        matched.update({rows[row]: columns[column] for row, column in common})
    free = [index for index in range(len(events)) if index not in matched.values()]
    for index, claim in enumerate(claims):
        equal = [event for event in free if _fact(events[event]) == _fact(claim)]
        if index not in matched and equal:
            matched[index] = equal[0]
            free.remove(equal[0])
    return matched


def _common_subsequence(first: Sequence[object], second: Sequence[object]) -> list[tuple[int, int]]:
    """Return index pairs of a longest common subsequence; among equals, the one with the earliest items of `first`."""
    longest = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in range(len(first) - 1, -1, -1):
        for j in range(len(second) - 1, -1, -1):
            common = 1 + longest[i + 1][j + 1] if first[i] == second[j] else 0
            longest[i][j] = max(common, longest[i + 1][j], longest[i][j + 1])
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
    """Match as many other claims as possible with events that differ in one detail: index of claim -> index of event.

    Kuhn's algorithm (augmenting paths): claims in order, each with its nearest event first. Repeated claims are not
    matched, as they say nothing about a second event (Total is the same either way).
    """
    free = [event for event in range(len(events)) if event not in exact.values()]
    candidates: dict[int, list[int]] = {}
    for index, claim in enumerate(claims):
        if index not in exact and not _is_repeat(claims, index, exact=exact):
            near = [
                event
                for event in free
                if claim.kind == events[event].kind
                and sum(a != b for a, b in zip(claim.details, events[event].details, strict=True)) == 1
            ]
            candidates[index] = sorted(near, key=lambda event: (abs(event - index), event))
    holders: dict[int, int] = {}  # event -> claim

    def augment(claim: int, visited: set[int]) -> bool:
        """Match a claim, rematching earlier claims if necessary; return whether it succeeded."""
        for event in candidates[claim]:
            if event not in visited:
                visited.add(event)
                if event not in holders or augment(holders[event], visited):
                    holders[event] = claim
                    return True
        return False

    for index in candidates:
        augment(index, set())
    return {index: event for event, index in holders.items()}


def _find_out_of_order(events: Sequence[Event], claims: Sequence[Claim], *, order: Sequence[int]) -> set[int]:
    """Return a small set of events without which the others are described in order of time within each modality.

    Removes the event with the most violations until there is none; among equals, the one described last. Events that
    overlap, or whose times are unknown, may be in any order.

    Args:
        events: events of the reference.
        claims: the same events, parsed.
        order: indices of the events that are described, in order of description.
    """
    violations = {event: set[int]() for event in order}
    for place, earlier in enumerate(order):
        for later in order[place + 1 :]:
            if claims[earlier].modality == claims[later].modality and events[later].precedes(events[earlier]):
                violations[earlier].add(later)
                violations[later].add(earlier)
    removed: set[int] = set()
    while any(violations.values()):
        worst = max(reversed(order), key=lambda event: len(violations[event]))
        removed.add(worst)
        for other in violations.pop(worst):
            violations[other].discard(worst)
        order = [event for event in order if event != worst]
    return removed
