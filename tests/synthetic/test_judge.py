"""The rule judge against manual judgements, and the parser against all phrasings of the synthetic world."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salmonn.records import Caption, Event, Reference, Score
from salmonn.score.judge import ScoringTask, empty_caption_tasks, match_references
from salmonn.score.metrics import compute_rates
from salmonn.synthetic.annotate import write_reference
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.lexicon import FORMS, HEARD, MOVE, SOUNDS
from salmonn.synthetic.parser import parse_claims
from salmonn.synthetic.scene import SynthConfig, sample_scene

EVENTS = (
    Event("a red circle appears", "visual", 0.5, 1.0),
    Event("a low tone is heard", "audio", 0.8, 2.5),
    Event("the red circle moves to the left", "visual", 1.5, 2.5),
    Event("the red circle turns blue", "visual", 3.0, 3.5),
    Event("a series of beeps is heard", "audio", 4.0, 5.0),
    Event("the blue circle disappears", "visual", 4.5, 5.0),
)
COMPLETE = (
    "A red circle appears. A low tone is heard. The red circle moves to the left. The red circle turns blue. "
    "A series of beeps is heard. The blue circle disappears."
)
CONNECTIVES = (
    "{}.",
    "First, {}.",
    "At the start, {}.",
    "Then {}.",
    "Next, {}.",
    "After that, {}.",
    "Finally, {}.",
    "Meanwhile, {}.",
    "At the same time, {}.",
    "A white cross blinks, and {}.",
    "A white cross blinks and {}.",
    "A white cross blinks, and then {}.",
    "A white cross blinks and then {}.",
    "A white cross blinks while {}.",
    "{}, and a white cross blinks.",
    "{} while a white cross blinks.",
    "While {}, a white cross blinks.",
)
VISUAL_FORMS = [(template, kind, "purple" if kind == "change" else "") for kind in FORMS for template in FORMS[kind]]
VISUAL_FORMS += [(template, "move", direction) for direction in MOVE for template in MOVE[direction]]
SOUND_FORMS = [(heard.format(sound=sound), kind) for kind in SOUNDS for sound in SOUNDS[kind] for heard in HEARD]


def judge(text: str, events: tuple[Event, ...] = EVENTS) -> Score:
    reference = Reference("v.mp4", events)
    RuleJudge().check(reference)
    return RuleJudge().judge_one(ScoringTask(reference, Caption("v.mp4", text)))


def score_captions(references_by_video: dict[str, Reference], captions: list[Caption], rule: RuleJudge) -> list[Score]:
    return rule.judge(
        [
            *match_references(references_by_video, captions, rule),
            *empty_caption_tasks(references_by_video, captions, rule),
        ]
    )


def error_counts(text: str, events: tuple[Event, ...] = EVENTS) -> tuple[int, int, int]:
    score = judge(text, events)
    return score.missing, score.incorrect, score.hallucinated


def parse(text: str) -> list[tuple[str, ...]]:
    return [(claim.kind, *claim.details) for claim in parse_claims(text)]


def references(count: int, config: SynthConfig | None = None) -> list[Reference]:
    sampled = []
    for index in range(count):
        rng = random.Random(index)
        scene = sample_scene(rng, config=config or SynthConfig())
        sampled.append(write_reference(scene, rng, video=f"{index}.mp4", index=index))
    return sampled


def parse_failures(clause: str, claim: tuple[str, ...]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Return the sentences that join a clause to others and are not parsed into exactly their claims."""
    failures = []
    for connective in CONNECTIVES:
        others = [("blink", "white", "cross")] if "white cross" in connective else []
        claims = parse(connective.format(clause))
        if sorted(claims) != sorted([claim, *others]):
            failures.append((connective.format(clause), claims))
    return failures


def test_parses_every_visual_phrasing_with_every_connective():
    failures = []
    for template, kind, value in VISUAL_FORMS:
        clause = template.format(a="an orange star", the="the orange star", colour="purple")
        failures += parse_failures(clause, (kind, "orange", "star", *([value] if value else [])))
    assert len(VISUAL_FORMS) == 34 and failures == []


def test_parses_every_sound_phrasing_with_every_connective():
    failures = [failure for clause, kind in SOUND_FORMS for failure in parse_failures(clause, ("sound", kind))]
    assert len(SOUND_FORMS) == 105 and failures == []


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        # two objects of one verb, lists, two verbs of one object
        ("A red circle and a blue square appear.", [("appear", "red", "circle"), ("appear", "blue", "square")]),
        (
            "We see a red circle, a blue square and a green star.",
            [("appear", "red", "circle"), ("appear", "blue", "square"), ("appear", "green", "star")],
        ),
        (
            "There is a red circle and a blue star moves up.",
            [("appear", "red", "circle"), ("move", "blue", "star", "up")],
        ),
        ("A red and a blue circle appear.", [("appear", "red", "circle"), ("appear", "blue", "circle")]),
        (
            "A red circle appears and moves up, then vanishes.",
            [("appear", "red", "circle"), ("move", "red", "circle", "up"), ("leave", "red", "circle")],
        ),
        (
            "There is a red circle that moves to the left.",
            [("appear", "red", "circle"), ("move", "red", "circle", "left")],
        ),
        # synonyms and inflections
        ("A violet disc vanished.", [("leave", "purple", "circle")]),
        ("The yellow box was blinking.", [("blink", "yellow", "square")]),
        ("The red dot moved leftwards.", [("move", "red", "circle", "left")]),
        ("The red star goes up.", [("move", "red", "star", "up")]),
        ("The red star goes away.", [("leave", "red", "star")]),
        ("The red star flashes on and off.", [("blink", "red", "star")]),
        ("The red star leaves the picture on the left.", [("leave", "red", "star")]),
        ("The red star is no longer visible.", [("leave", "red", "star")]),
        ("The red star slides out of view.", [("leave", "red", "star")]),
        # positions are not directions
        ("A red star appears at the top left.", [("appear", "red", "star")]),
        ("A red star on the left moves from left to right.", [("move", "red", "star", "right")]),
        ("The red star moves up and down.", [("move", "red", "star", "up"), ("move", "red", "star", "down")]),
        # it, they, the shape, one
        (
            "A red star and a blue cross appear. It blinks.",
            [("appear", "red", "star"), ("appear", "blue", "cross"), ("blink", "blue", "cross")],
        ),
        (
            "A red star and a blue cross appear. The star blinks and they vanish.",
            [
                ("appear", "red", "star"),
                ("appear", "blue", "cross"),
                ("blink", "red", "star"),
                ("leave", "blue", "cross"),
                ("leave", "red", "star"),
            ],
        ),
        (
            "A red star appears, then a blue one. The red shape blinks.",
            [("appear", "red", "star"), ("appear", "blue", "star"), ("blink", "red", "star")],
        ),
        # colours that change
        ("The red star turns blue, then it leaves.", [("change", "red", "star", "blue"), ("leave", "blue", "star")]),
        (
            "The red star changes from red to blue and then to green.",
            [("change", "red", "star", "blue"), ("change", "blue", "star", "green")],
        ),
        ("The red star is now blue. The star blinks.", [("change", "red", "star", "blue"), ("blink", "blue", "star")]),
        # sounds, active and passive
        ("We hear a shrill note.", [("sound", "high tone")]),
        ("A bass tone sounds while clicking is audible.", [("sound", "low tone"), ("sound", "clicks")]),
        ("A tone rises in pitch.", [("sound", "rising sweep")]),
        ("A low and a high tone are heard.", [("sound", "low tone"), ("sound", "high tone")]),
        ("A red star appears with white noise.", [("appear", "red", "star"), ("sound", "noise")]),
        # the order of description is not the temporal order
        ("The red star blinks after the blue cross vanishes.", [("leave", "blue", "cross"), ("blink", "red", "star")]),
        (
            "Before the red star blinks, the blue cross vanishes.",
            [("leave", "blue", "cross"), ("blink", "red", "star")],
        ),
        # no description, or an unreadable one
        ("", []),
        ("Then nothing else happens. The clip ends.", []),
        ("The red star does not move and no sound is heard.", []),
        ("A dog barks.", [("unreadable", "a dog barks")]),
        ("A red star appears. A dog moves up.", [("appear", "red", "star"), ("unreadable", "a dog moves up")]),
        ("Music plays.", [("sound", "music")]),
    ],
)
def test_parses_claims(text, claims):
    # "they" may list the objects in any order
    parsed = parse(text)
    assert (sorted(parsed) == sorted(claims)) if "they" in text else (parsed == claims)


def test_a_claim_has_its_clause():
    claim = parse_claims("A red star appears, and then It Blinks.")[1]
    assert (claim.clause, claim.modality) == ("It Blinks", "visual")


def test_claims_of_equal_clauses():
    first, second, repeated = parse_claims("A red star and a blue cross blink. A red star and a blue cross blink.")[1:]
    assert first.clause_number == parse_claims("A red star and a blue cross blink.")[1].clause_number
    assert (first.clause, second.clause, repeated.clause) == ("a blue cross blink", "A red star", "a blue cross blink")
    assert repeated.clause_number > first.clause_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (COMPLETE, 0),
        # the same event in four other words
        (f"{COMPLETE} A low-pitched tone plays, too.", 4),
        (f"{COMPLETE} The blue circle vanishes and beeps are heard.", 7),
        # verbatim; the introductory word counts as well
        (f"{COMPLETE} Then a low tone is heard.", 6),
        # hallucinated twice: once hallucinated, once repeated
        ("A green star blinks. A green star flashes.", 4),
        # half of the clause is new
        ("A red circle appears. There is a red circle that blinks.", 0),
        # a wrong detail is not a repetition
        ("A red circle appears. A green circle appears.", 0),
        # the end of a sound is a new description
        ("A low tone is heard. The low tone stops.", 0),
        ("A low tone is heard. It stops. A low tone is heard again.", 6),
        # "the end" is a time, and "fades in" is a start
        ("A low tone is heard. In the end a low tone plays.", 7),
        ("A low tone is heard. At the end the low tone plays again.", 8),
        ("A low tone is heard. A low tone fades in.", 5),
    ],
)
def test_repetition_in_other_words(text, expected):
    assert judge(text).num_repeated_words == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (COMPLETE, (0, 0, 0)),
        ("", (6, 0, 0)),
        ("Lorem ipsum dolor sit amet.", (6, 0, 1)),
        ("Lorem ipsum. Dolor sit. Lorem ipsum.", (6, 0, 2)),
        (COMPLETE.replace("moves to the left", "moves to the right"), (0, 1, 0)),
        (COMPLETE.replace("A red circle appears", "A green circle appears"), (0, 1, 0)),
        (COMPLETE.replace("A red circle appears", "A green star appears"), (1, 0, 1)),  # two details wrong
        (COMPLETE.replace("A low tone", "A shrill tone"), (0, 1, 0)),
        (COMPLETE.replace("turns blue", "turns green"), (0, 1, 0)),
        (COMPLETE + " A green star blinks.", (0, 0, 1)),
        (COMPLETE + " A green star blinks. The green star flickers.", (0, 0, 1)),  # the second is repetition
        (COMPLETE + " " + COMPLETE, (0, 0, 0)),  # repetition is a separate measure
        ("A circle appears.", (5, 1, 0)),  # vague: without the colour
    ],
)
def test_classes_of_errors(text, expected):
    assert error_counts(text) == expected


def test_scores_list_the_counted_items():
    score = judge("A red circle appears. The red circle turns green. A dog barks.")
    assert score.missed == tuple(EVENTS[index].text for index in (1, 2, 4, 5))
    assert score.incorrect_events == (EVENTS[3].text,)
    assert score.hallucinations == ("A dog barks",)
    assert (score.num_events, score.num_words) == (6, 12)


def test_temporal_order():
    clauses = [event.text for event in EVENTS]
    late = [*clauses[1:], clauses[0]]  # the appearance comes last: only it is wrong
    assert judge(". ".join(late)).incorrect_events == (EVENTS[0].text,)
    assert [mention.reason for mention in judge(". ".join(late)).mentions if not mention.is_correct] == ["out of order"]
    assert error_counts(". ".join(clauses[index] for index in (1, 4, 0, 2, 3, 5))) == (0, 0, 0)  # sounds may come first
    assert error_counts(". ".join([clauses[4], clauses[1]]), (EVENTS[1], EVENTS[4])) == (0, 1, 0)  # order among sounds
    # of two in the wrong order, the last described is incorrect
    assert judge(f"{clauses[3]}. {clauses[2]}", EVENTS[2:4]).incorrect_events == (clauses[2],)
    visual = tuple(event for event in EVENTS if event.modality == "visual")
    backwards = ". ".join(event.text for event in reversed(visual))
    assert error_counts(backwards, visual) == (0, 3, 0)  # of four in reverse order, one counts as in order


def test_overlapping_or_untimed_events_may_come_in_any_order():
    first, second = "a red star appears", "a blue cross appears"
    for times in (((0.0, 2.0), (1.0, 3.0)), ((None, None), (None, None)), ((1.0, 1.0), (1.0, 2.0))):
        events = (Event(first, "visual", *times[0]), Event(second, "visual", *times[1]))
        assert error_counts(f"{second}. {first}", events) == (0, 0, 0)
    events = (Event(first, "visual", 0.0, 1.0), Event(second, "visual", 1.0, 2.0))
    assert error_counts(f"{second}. {first}", events) == (0, 1, 0)


def test_an_event_that_occurs_twice():
    twice = (
        Event("the red star blinks", "visual", 0, 1),
        Event("the red star moves up", "visual", 2, 3),
        Event("the red star blinks", "visual", 4, 5),
    )
    assert error_counts("The red star blinks, moves up and blinks.", twice) == (0, 0, 0)
    assert error_counts("The red star moves up and blinks.", twice) == (1, 0, 0)  # the second blink, described in order
    assert error_counts("The red star blinks. It blinks. It blinks.", twice) == (1, 0, 0)
    # The first mention repeats the last one.
    assert error_counts("The red star blinks, moves up, and blinks.", twice[1:]) == (0, 0, 0)


def test_wrong_details_are_matched_as_often_as_possible():
    events = (Event("the red star moves up", "visual", 0, 1), Event("the blue star moves left", "visual", 2, 3))
    # "red star left" matches either event; only if it is assigned to the second can "red star down" match the first
    assert error_counts("The red star moves left. The red star moves down.", events) == (0, 2, 0)
    assert error_counts("The red star moves left. The blue star moves up.", events) == (0, 2, 0)


def test_a_wrong_detail_is_assigned_to_the_nearest_event():
    texts = ("the red star moves up", "the blue cross blinks", "the red star moves down")
    events = tuple(Event(text) for text in texts)
    score = judge("A green oval appears. The blue cross blinks. The red star moves left.", events)
    assert (score.missed, score.incorrect_events) == ((events[0].text,), (events[2].text,))


def test_rejects_unreadable_references():
    with pytest.raises(ValueError, match=r"v\.mp4 has no event list"):
        judge("A red star appears.", ())
    with pytest.raises(ValueError, match="a dog barks"):
        judge("A red star appears.", (Event("a dog barks"),))
    with pytest.raises(ValueError, match="as one claim"):
        judge("A red star appears.", (Event("a red star appears and blinks"),))


def test_a_span_without_events():
    late = Caption("v.mp4", "A low tone is heard.", start_seconds=9.0)
    (score,) = score_captions({"v.mp4": Reference("v.mp4", EVENTS)}, [late], RuleJudge())
    assert (score.num_events, score.hallucinated, score.total) == (0, 1, 1.0)


def test_score_captions_counts_every_reference(caplog):
    references_by_video = {"v.mp4": Reference("v.mp4", EVENTS), "w.mp4": Reference("w.mp4", EVENTS[:2])}
    scores = score_captions(references_by_video, [Caption("v.mp4", COMPLETE, sample=3)], RuleJudge())
    assert [(score.video, score.sample, score.missing, score.num_events) for score in scores] == [
        ("v.mp4", 3, 0, 6),
        ("w.mp4", 0, 2, 2),
    ]
    assert "1 of 2 references have no caption" in caplog.text
    with pytest.raises(ValueError, match=r"x\.mp4; the first reference is for v\.mp4"):
        score_captions(references_by_video, [Caption("x.mp4", "")], RuleJudge())
    more = score_captions(
        references_by_video, [Caption("v.mp4", COMPLETE), Caption("w.mp4", ""), Caption("x.mp4", "")], RuleJudge()
    )
    assert [score.video for score in more] == ["v.mp4", "w.mp4"]
    assert "1 captioned videos have no reference, first x.mp4; they are skipped" in caplog.text


def test_reference_captions_have_no_errors_and_hasty_ones_some():
    sampled = references(300)
    references_by_video = {reference.video: reference for reference in sampled}
    perfect = score_captions(
        references_by_video, [Caption(reference.video, reference.caption) for reference in sampled], RuleJudge()
    )
    assert [score for score in perfect if score.total or score.repetition] == []
    for modality in ("visual", "audio"):
        captions = [Caption(reference.video, getattr(reference, f"{modality}_caption")) for reference in sampled]
        for score in score_captions(references_by_video, captions, RuleJudge()):
            others = [event for event in references_by_video[score.video].events if event.modality != modality]
            assert (score.missing, score.incorrect, score.hallucinated) == (len(others), 0, 0)
    hasty = compute_rates(
        score_captions(
            references_by_video,
            [Caption(reference.video, reference.human_caption) for reference in sampled],
            RuleJudge(),
        )
    )
    assert 0.35 < hasty.missing < 0.45  # a third of the events is omitted, and some more are confused with others
    assert 0.07 < hasty.hallucination < 0.15  # 0.3 random and about 0.6 systematic errors in about 8 events
    assert hasty.repetition > 0


POOL = references(40, SynthConfig(min_visual=3))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_omitted_events_are_missing_and_modalities_mix_freely(data):
    events = data.draw(st.sampled_from(POOL)).events
    is_kept = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    described = [event for event, keep_event in zip(events, is_kept, strict=True) if keep_event]
    queues = {
        modality: [event.text for event in described if event.modality == modality] for modality in ("visual", "audio")
    }
    order = data.draw(st.permutations([event.modality for event in described]))
    text = data.draw(st.sampled_from([". ", ", and ", " while ", "; "])).join(
        queues[modality].pop(0) for modality in order
    )
    assert error_counts(text, events) == (len(events) - len(described), 0, 0)


WORDS = (
    "a the red blue star it they one there turns from moves left up vanishes that tone heard high not and , . "
    "after before with dog on is now to"
)
RANDOM_WORDS = st.lists(st.sampled_from(WORDS.split()), max_size=25).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(RANDOM_WORDS, st.text(max_size=60)))
def test_any_text_is_judged(text):
    score = judge(text)
    assert score.missing + score.incorrect <= score.num_events == 6
    assert score.missing + score.incorrect >= 6 - len(parse_claims(text))  # no event is correct without a claim
    assert 0 <= score.num_repeated_words <= score.num_words
    assert score.hallucinated == len(score.hallucinations)


def test_judges_a_thousand_captions_in_a_second():
    """The best of three, as other processes slow a core down."""
    sampled, seconds = references(100), []
    references_by_video = {reference.video: reference for reference in sampled}
    for number in range(3):
        # numbers are ignored, but make each text new to the cache of texts
        captions = [
            Caption(reference.video, f"{reference.human_caption} {10 * number + sample}.", sample=sample)
            for sample in range(10)
            for reference in sampled
        ]
        start = time.process_time()
        score_captions(references_by_video, captions, RuleJudge())
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
