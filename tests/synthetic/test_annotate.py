"""Captions and questions: content, order, and the error rates of hasty captions."""

import random
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from salmonn.synthetic.annotate import QUESTION_KINDS, write_caption, write_events, write_human_caption, write_questions
from salmonn.synthetic.lexicon import COLOURS, FORMS, SHAPES, SOUNDS
from salmonn.synthetic.render import sample_clip
from salmonn.synthetic.scene import Scene, SceneEvent, SynthConfig

STORY = (
    SceneEvent("appear", 0.5, 1.0, shape="star", colour="orange", position=(48, 80)),
    SceneEvent("sound", 0.8, 1.8, value="low tone"),
    SceneEvent("move", 1.0, 2.0, shape="star", colour="orange", value="up", position=(48, 48)),
    SceneEvent("appear", 2.0, 2.7, shape="cross", colour="white", position=(80, 16)),
    SceneEvent("change", 2.7, 3.7, shape="star", colour="orange", value="blue"),
    SceneEvent("blink", 3.7, 5.2, shape="cross", colour="white"),
    SceneEvent("sound", 5.0, 6.5, value="beeps"),
    SceneEvent("leave", 5.7, 6.5, shape="star", colour="blue"),
)
SCENE = Scene(7.6, STORY)
# A pattern that identifies each event of STORY in any phrasing.
PATTERNS = (
    "appears|shows up|comes into view|pops up|can now be seen",
    "low|deep",
    "up|upwards|top",
    "appears|shows up|comes into view|pops up|can now be seen",
    "blue",
    "blinks|flashes|flickers",
    "beeps",
    "disappears|vanishes|goes away|is gone|leaves",
)
ANSWERS = {
    "Where does the star appear?": "bottom",
    "Where does the cross appear?": "top right",
    "Where is the cross at the end?": "top right",
    "What colour is the star when it appears?": "orange",
    "What colour is the star at the end?": "blue",
    "What colour is the cross when it appears?": "white",
    "How many shapes appear?": "two",
    "How many sounds are heard?": "two",
    "How many shapes disappear?": "one",
    "How many times does a shape move?": "one",
    "How many shapes blink?": "one",
    "Which shape appears first?": "the star",
    "Which shape appears last?": "the cross",
    "Which shape disappears first?": "the star",
    "What does the star do last?": "it disappears",
    "What does the cross do last?": "it blinks",
    "Which sound is heard first?": "a low tone",
    "Which sound is heard last?": "a series of beeps",
    "Which sound is heard when the star moves up?": "a low tone",
    "Which sound is heard when the star disappears?": "a series of beeps",
    # The middle is 3.8: events that end by 3.3 are early, those that start from 4.3 on are late.
    "Which way does the star move?": "up",
    "When is a low tone heard, in the first half or in the second half?": "in the first half",
    "When does the star move up, in the first half or in the second half?": "in the first half",
    "When does the cross appear, in the first half or in the second half?": "in the first half",
    "When is a series of beeps heard, in the first half or in the second half?": "in the second half",
    "When does the star disappear, in the first half or in the second half?": "in the second half",
}


@pytest.fixture(scope="module")
def sampled():
    """Scenes and references of 600 clips."""
    return [sample_clip(SynthConfig(clips=600, seed=2), index=index) for index in range(600)]


def clauses(caption):
    """Split a caption into clauses, without connectives."""
    parts = re.split(r"(?:,)? and then |, and | while |\. ", caption.rstrip("."))
    openers = r"^(Then|Next,|After that,|Finally,|First,|At the start,|Meanwhile,|At the same time,) "
    return [re.sub(openers, "", part) for part in parts]


def test_events_are_the_canonical_clauses():
    assert [event.text for event in write_events(STORY)] == [
        "an orange star appears",
        "a low tone is heard",
        "the orange star moves up",
        "a white cross appears",
        "the orange star turns blue",
        "the white cross blinks",
        "a series of beeps is heard",
        "the blue star disappears",
    ]
    assert [event.modality for event in write_events(STORY)].count("audio") == 2


def test_captions_describe_every_event_in_order():
    captions = {write_caption(STORY, random.Random(seed)) for seed in range(300)}
    assert len(captions) > 295
    for caption in captions:
        described = clauses(caption)
        assert len(described) == len(STORY), caption
        for clause, pattern, event in zip(described, PATTERNS, STORY, strict=True):
            assert re.search(rf"\b({pattern})\b", clause), (clause, caption)
            if event.shape:
                assert re.search(rf"\b({event.colour} {event.shape}|it|It)\b", clause), (clause, caption)


def test_it_refers_to_the_subject_of_the_previous_clause():
    # In STORY no two consecutive events share a subject; the star's events all do.
    star = [event for event in STORY if event.shape == "star"]
    for seed in range(100):
        assert not re.search(r"\bit\b", write_caption(STORY, random.Random(seed)), re.IGNORECASE)
    later_clauses = [clause for seed in range(100) for clause in clauses(write_caption(star, random.Random(seed)))[1:]]
    assert 0.4 < sum(clause.lower().startswith("it ") for clause in later_clauses) / len(later_clauses) < 0.6


def test_sentences_are_well_formed():
    for seed in range(300):
        caption = write_caption(STORY, random.Random(seed))
        assert re.fullmatch(r"([A-Z][a-z ,-]*[a-z]\. ?)+", caption), caption
        assert not re.search(r"\ba orange|\ban [^o]|repeated beeps (is|plays)|there is repeated| ,|  ", caption)


def test_while_and_meanwhile_join_only_overlapping_events():
    disjoint = (STORY[0], STORY[6])
    captions = [write_caption(pair, random.Random(seed)) for pair in (disjoint, STORY[:2]) for seed in range(100)]
    is_joined = [bool(re.search(r"while|same time", caption)) for caption in captions]
    assert not any(is_joined[:100]) and 20 < sum(is_joined[100:]) < 80


def test_visual_and_audio_captions_describe_one_modality(sampled):
    for scene, reference in sampled:
        number = sum(event.kind != "sound" for event in scene.events)
        assert len(clauses(reference.visual_caption)) == number
        assert len(clauses(reference.audio_caption)) == len(scene.events) - number
        assert not re.search(r"\b(heard?|plays|there)\b", reference.visual_caption)
        assert not re.search(rf"\b({'|'.join((*COLOURS, *SHAPES))})\b", reference.audio_caption)


def test_hasty_captions_omit_a_third(sampled):
    described = sum(len(clauses(reference.human_caption)) for _, reference in sampled)
    # Hallucinations and repetitions add 0.2 + 0.05 = 0.25 clauses per caption.
    share = (described - 0.25 * len(sampled)) / sum(len(scene.events) for scene, _ in sampled)
    assert share == pytest.approx(2 / 3, abs=0.03)
    assert all(reference.human_caption for _, reference in sampled)


def test_error_rates_of_hasty_captions():
    """Details that are not in STORY are hallucinations (20 %) or mistakes (10 %); a repetition repeats a clause."""
    not_in_story = [colour for colour in COLOURS if colour not in ("orange", "white", "blue")]
    not_in_story += [
        "circle",
        "square",
        "triangle",
        "high",
        "shrill",
        "rising",
        "falling",
        "drops",
        "climbs",
        "clicks",
        "noise",
        "static",
        "leftwards",
        "rightwards",
        "downwards",
        "left",
        "right",
        "down",
        "bottom",
        "cross (moves|slides|drifts|rises|sinks)",
    ]
    wrong = re.compile(rf"\b({'|'.join(not_in_story)})\b")
    captions = [write_human_caption(STORY, random.Random(seed)) for seed in range(3000)]
    assert sum(bool(wrong.search(caption)) for caption in captions) / 3000 == pytest.approx(0.28, abs=0.025)
    share_repeated = sum(len(re.findall("beeps", caption)) > 1 for caption in captions) / 3000
    assert 0.002 < share_repeated < 0.02  # 5 % divided among the eight events


@pytest.mark.parametrize(
    "action, true, misreading, described",
    [
        (SceneEvent("blink", 2.7, 4.2, "star", "orange"), "blinks|flashes|flickers", PATTERNS[-1], 0.7),
        (
            SceneEvent("change", 2.7, 3.7, "star", "orange", "blue"),
            "(turns|becomes|changes) .*blue",
            f"blue star ({PATTERNS[0]})",
            0.8,
        ),
    ],
    ids=["a blink misread as a disappearance", "a change of colour misread as another shape"],
)
def test_hasty_captions_have_systematic_errors(action, true, misreading, described):
    """70 % of the descriptions of an action are misreadings."""
    captions = [write_human_caption((STORY[0], action), random.Random(seed)) for seed in range(3000)]
    share_true, share_misread = (
        sum(bool(re.search(pattern, text)) for text in captions) / 3000 for pattern in (true, misreading)
    )
    assert share_misread == pytest.approx(0.7 * described, abs=0.06)
    assert share_true == pytest.approx(0.3 * described, abs=0.06)


def test_at_least_one_event_remains():
    one_event = STORY[:1]
    assert all(
        any(verb.split(" ", 1)[1] in write_human_caption(one_event, random.Random(seed)) for verb in FORMS["appear"])
        for seed in range(50)
    )


def test_answers_for_a_scene_by_hand():
    answers = {}
    for seed in range(300):
        for question in write_questions(SCENE, random.Random(seed), index=seed):
            answers[question.question] = question.answer
    assert answers == ANSWERS


def test_kinds_of_questions_rotate(sampled):
    for index, (scene, reference) in enumerate(sampled):
        rotated = [QUESTION_KINDS[(3 * index + step) % 7] for step in range(7)]
        if all(event.kind != "move" for event in scene.events):
            rotated.remove("direction")
        assert [question.kind for question in reference.questions] == rotated[:3]


def test_no_answer_is_right_for_most_questions_of_a_kind(sampled):
    answers = defaultdict(Counter)
    for _, reference in sampled:
        for question in reference.questions:
            answers[question.kind][question.answer] += 1
    assert all(max(counts.values()) < 0.6 * counts.total() for counts in answers.values())


def test_directions_of_moves():
    moves = [replace(STORY[2], start_seconds=second, value=value) for second, value in ((1, "left"), (3, "down"))]
    scene = Scene(7.0, (STORY[0], STORY[1], *moves))
    answers = {}
    for index in range(100):
        for question in write_questions(scene, random.Random(index), index=index):
            if question.kind == "direction":
                answers[question.question] = question.answer
    assert answers == {
        "Which way does the star move first?": "to the left",
        "Which way does the star move last?": "down",
    }


def test_the_nine_positions():
    answers = {}
    for x in (10, 48, 90):
        for y in (10, 48, 90):
            moved = SceneEvent("move", 1.0, 2.0, shape="star", colour="blue", value="up", position=(x, y))
            scene = Scene(7.0, (replace(STORY[0], position=(x, 48)), replace(moved, colour="orange"), STORY[1]))
            for index in range(60):
                for question in write_questions(scene, random.Random(index), index=index):
                    if question.question == "Where is the star at the end?":
                        answers[x, y] = question.answer
    assert list(answers.values()) == [
        "top left", "left", "bottom left", "top", "middle", "bottom", "top right", "right", "bottom right"
    ]  # fmt: skip


def test_a_kind_without_questions_is_replaced():
    # The only sound spans the middle, so "when" has no clear answer.
    scene = Scene(7.0, (STORY[0], SceneEvent("sound", 3.0, 4.0, value="noise")))
    for index in range(5):
        kinds = [question.kind for question in write_questions(scene, random.Random(0), index=index)]
        assert len(kinds) == 3 and "when" not in kinds


def test_the_vocabulary_is_small(sampled):
    words = Counter()
    for _, reference in sampled:
        texts = [reference.caption, reference.human_caption, reference.visual_caption, reference.audio_caption]
        words.update(re.findall(r"[a-z-]+", " ".join(texts).lower()))
    assert {*COLOURS, *SHAPES, "it"} <= set(words)
    assert {word for kind in SOUNDS for word in SOUNDS[kind][0].split()} <= set(words)
    assert len(words) < 200
