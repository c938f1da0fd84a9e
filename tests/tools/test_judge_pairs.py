"""The labels of the judge benchmark, derived from the clips' events without any judge.

Captions are split where the generator joins clauses, and each clause is looked up among all phrasings of the clip's
events; a clause that is not found there is an error or padding.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from salmonn.preference.benchmark import LabelledPair, read_labelled_pairs
from salmonn.synthetic import lexicon
from salmonn.synthetic.annotate import write_events
from salmonn.synthetic.render import render_audio, sample_clip
from salmonn.synthetic.scene import SceneEvent, SynthConfig

FILE = Path(__file__).parents[2] / "data" / "judge_pairs.jsonl"
PAIRS = read_labelled_pairs(FILE)
KINDS = ("left_out", "colour", "object", "number", "invented", "order", "source", "repetition", "padding")
LATER, SIMULTANEOUS = ("then", "next", "after that"), ("while", "meanwhile", "at the same time")
JOINT = re.compile(r"(\. |, and then | and then |, and | while )")
OPENER = re.compile(r"(First, |Then |Next, |After that, |Meanwhile, |At the same time, )(.*)")
OBJECT = re.compile(rf"\b({'|'.join(lexicon.COLOURS)}) ({'|'.join(lexicon.SHAPES)})\b")
COUNTED = re.compile(r"(\w+) (beeps|clicks|shapes) (?:are heard|can be heard|appear in all|show up in all)")
NUMBERS = ("", "one", "two", "three", "four", "five", "six")


def expected_pulses(sound: SceneEvent) -> int:
    """Return the number of beeps (3 below 1.2 s, else 4) or clicks (one for each 0.25 s, 4 to 6)."""
    seconds = sound.end_seconds - sound.start_seconds
    if sound.value == "beeps":
        return 3 if seconds < 1.2 else 4
    return min(max(round(4 * seconds), 4), 6)


def phrasings(scene_event: SceneEvent) -> set[str]:
    if scene_event.kind == "sound":
        return {form.format(sound=sound) for sound in lexicon.SOUNDS[scene_event.value] for form in lexicon.HEARD}
    forms = {
        "appear": lexicon.FORMS["appear"],
        "leave": lexicon.FORMS["leave"],
        "blink": lexicon.FORMS["blink"],
        "change": lexicon.FORMS["change"],
        "move": lexicon.MOVE.get(scene_event.value),
    }[scene_event.kind]
    name = f"{scene_event.colour} {scene_event.shape}"
    a = ("an " if name.startswith("o") else "a ") + name
    return {form.format(a=a, the="the " + name, colour=scene_event.value) for form in forms}


def article(text: str) -> str:
    """Return the text with "an" before "orange", and "a" before all other colours."""
    return re.sub(r"^an? (?=(\w))", lambda match: "an " if match[1] == "o" else "a ", text)


def split_clauses(text: str) -> list[tuple[str, str]]:
    """Return lower-case clauses with their conjunctions; "it" is replaced by the previous clause's object."""
    parts = ["", *JOINT.split(text.removesuffix("."))]
    clauses, last_object = [], ""
    for joint, part in zip(parts[::2], parts[1::2], strict=True):
        opener = OPENER.fullmatch(part)
        conjunction, clause = opener.groups() if opener else (joint, part)
        clause = clause[0].lower() + clause[1:]
        if clause.startswith("it ") and last_object:
            clause = last_object + clause[2:]
        match = OBJECT.search(clause)
        last_object = f"the {match[0]}" if match else ""
        clauses.append((conjunction.strip(" ,.").removeprefix("and ").lower(), clause))
    return clauses


class ParsedCaption:
    """A parsed caption: the indices of the events that it mentions, in its order, and the clauses that mention none."""

    def __init__(self, pair: LabelledPair, text: str, scene_events: tuple[SceneEvent, ...]):
        self.clauses = split_clauses(text)
        self.text, self.events = text, pair.events
        forms = {text: index for index, event in enumerate(scene_events) for text in phrasings(event)}
        self.indices = [forms.get(text) for _, text in self.clauses]
        self.mentioned = [index for index in self.indices if index is not None]
        self.unmatched = [text for (_, text), index in zip(self.clauses, self.indices, strict=True) if index is None]


def parse_pair(pair: LabelledPair) -> tuple[tuple[SceneEvent, ...], ParsedCaption, ParsedCaption]:
    """Return the clip's events, the better caption and the worse one."""
    scene_events = sample_clip(SynthConfig(seed=pair.seed), index=pair.index)[0].events
    better, worse = (pair.first, pair.second) if pair.better == "first" else (pair.second, pair.first)
    return scene_events, ParsedCaption(pair, better, scene_events), ParsedCaption(pair, worse, scene_events)


def pairs_of_kind(kind: str) -> list[LabelledPair]:
    return [pair for pair in PAIRS if pair.kind == kind]


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("judge_pairs")


def test_the_shipped_file_equals_the_generators_output(tool, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["judge_pairs.py", "--out", str(tmp_path / "pairs.jsonl")])
    tool.main()
    assert (tmp_path / "pairs.jsonl").read_bytes() == FILE.read_bytes()
    assert FILE.stat().st_size < 1.5e6


def test_seed_and_number(tool):
    assert tool.generate_pairs(seed=4, number=2) == PAIRS[:18]
    assert tool.generate_pairs(seed=5, number=1) != PAIRS[:9]


def test_kinds_and_positions_are_balanced():
    assert Counter(pair.kind for pair in PAIRS) == dict.fromkeys(KINDS, 135)
    # a fair coin shows 45 to 55 % heads in 1215 throws, except once in 2000
    assert 0.45 < sum(pair.better == "first" for pair in PAIRS) / len(PAIRS) < 0.55
    assert len({(pair.seed, pair.index) for pair in PAIRS}) == len(PAIRS)
    assert min(Counter(pair.where for pair in PAIRS).values()) > len(PAIRS) / 5
    gaps = {kind: {pair.gap for pair in pairs_of_kind(kind)} for kind in KINDS}
    assert gaps["left_out"] == {1, 2, 3} and gaps["invented"] == {1, 2} and {1, 2} < gaps["colour"]
    assert all(gaps[kind] == {1} for kind in ("number", "order", "source"))
    assert gaps["repetition"] == gaps["padding"] == {0}


def test_the_better_caption_is_correct_and_often_incomplete():
    num_incomplete = 0
    for pair in PAIRS:
        scene_events, better, _ = parse_pair(pair)
        assert better.mentioned == sorted(set(better.mentioned)), "each event once, in temporal order"
        allowed = pair.kind in ("number", "source")
        assert len(better.unmatched) == allowed
        num_incomplete += len(better.mentioned) + (pair.kind == "source") < len(scene_events)
    assert 0.5 < num_incomplete / len(PAIRS) < 0.9


def test_then_and_while_are_true():
    """Except in the worse caption of an `order` pair."""
    counts = Counter()
    for pair in PAIRS:
        scene_events, better, worse = parse_pair(pair)
        for caption in (better, worse):
            num_false = 0
            for (conjunction, _), index, previous in zip(
                caption.clauses[1:], caption.indices[1:], caption.indices, strict=False
            ):
                if index is None or previous is None:
                    continue
                first, second = scene_events[previous], scene_events[index]
                counts[conjunction] += 1
                if conjunction in LATER:
                    num_false += first.end_seconds > second.start_seconds
                elif conjunction in SIMULTANEOUS:
                    assert first.overlap_seconds(second) >= 0
            assert num_false == (pair.kind == "order" and caption is worse)
    assert min(counts[conjunction] for conjunction in (*LATER, *SIMULTANEOUS)) > 100


def test_events():
    """The labels list the clip's events, except for the event that `number` and `source` pairs change."""
    for pair in PAIRS:
        scene_events, *_ = parse_pair(pair)
        expected = write_events(scene_events)
        assert len(pair.events) - len(expected) in ((0, 1) if pair.kind == "number" else (0,))
        differing = [
            (event, original) for event, original in zip(pair.events, expected, strict=False) if event != original
        ]
        assert len(differing) + len(pair.events) - len(expected) == (pair.kind in ("number", "source"))
        assert all(replace(event, text=original.text) == original for event, original in differing)


def test_left_out():
    for pair in pairs_of_kind("left_out"):
        _, better, worse = parse_pair(pair)
        assert not worse.unmatched and set(worse.mentioned) < set(better.mentioned)
        assert len(better.mentioned) - len(worse.mentioned) == pair.gap
        assert worse.mentioned == sorted(worse.mentioned)


@pytest.mark.parametrize(("kind", "vocabulary"), [("colour", tuple(lexicon.COLOURS)), ("object", lexicon.SHAPES)])
def test_wrong_colour_and_object(kind, vocabulary):
    for pair in pairs_of_kind(kind):
        scene_events, better, worse = parse_pair(pair)
        used = {word for event in scene_events for word in (event.colour, event.shape, event.value)}
        assert len(worse.unmatched) == len(better.mentioned) - len(worse.mentioned) == pair.gap
        for index, missing in zip(worse.indices, better.mentioned, strict=True):
            clause = worse.clauses[better.mentioned.index(missing)][1]
            if index is not None:
                assert index == missing
                continue
            # With one word corrected, the clause mentions the same event as the better caption.
            (wrong,) = {word for word in vocabulary if word not in used and re.search(rf"\b{word}\b", clause)}
            repairs = (clause.replace(wrong, right) for right in vocabulary)
            assert {article(repair) for repair in repairs} & phrasings(scene_events[missing])


def test_number():
    subjects = Counter()
    for pair in pairs_of_kind("number"):
        scene_events, better, worse = parse_pair(pair)
        (right,), (wrong,) = better.unmatched, worse.unmatched
        (number, noun), (wrong_number, same) = (COUNTED.fullmatch(clause).groups() for clause in (right, wrong))
        sound = next((event for event in scene_events if event.value == noun), None)
        expected = expected_pulses(sound) if sound else sum(event.kind == "appear" for event in scene_events)
        assert number == NUMBERS[expected] and noun == same and 0 < abs(NUMBERS.index(wrong_number) - expected) <= 2
        assert better.mentioned == worse.mentioned
        assert f"{number} {noun} " in " ".join(event.text for event in pair.events) + " "
        subjects[noun] += 1
    assert min(subjects[noun] for noun in ("beeps", "clicks", "shapes")) > 20


@pytest.mark.parametrize("kind", ["beeps", "clicks"])
def test_the_waveform_has_the_expected_number_of_pulses(kind):
    """Count segments of the waveform above a tenth of the amplitude, separated by 40 ms of silence."""
    counted = set()
    for index in range(60):
        scene, _ = sample_clip(SynthConfig(seed=4), index=index)
        sound_event = next((event for event in scene.events if event.value == kind), None)
        if sound_event is None or len(counted) == 20:
            continue
        isolated = replace(scene, noise_amplitude=0.0, events=(sound_event,))
        wave = np.abs(render_audio(isolated, np.random.default_rng(index), config=SynthConfig()))
        loud = np.flatnonzero(wave > 0.1 * sound_event.amplitude)
        num_pulses = 1 + int((np.diff(loud) > 0.04 * 16_000).sum())
        assert num_pulses == expected_pulses(sound_event)
        counted.add((index, num_pulses))
    assert len({num_pulses for _, num_pulses in counted}) > 1


def test_invented():
    for pair in pairs_of_kind("invented"):
        scene_events, better, worse = parse_pair(pair)
        assert worse.mentioned == better.mentioned and len(worse.unmatched) == pair.gap
        omitted = [event for index, event in enumerate(scene_events) if index not in better.mentioned]
        for clause in worse.unmatched:
            match = OBJECT.search(clause)
            if match is None:
                kinds = [kind for kind in lexicon.SOUNDS if clause in phrasings(SceneEvent("sound", 0, 0, value=kind))]
                assert len(kinds) == 1 and kinds[0] not in {event.value for event in scene_events}
                # It cannot be mistaken for a sound that both captions omit.
                assert not any(event.kind == "sound" for event in omitted)
            elif any(event.shape == match[2] for event in scene_events):
                same_shape = [event for event in scene_events if event.shape == match[2]]
                assert match[1] in {word for event in same_shape for word in (event.colour, event.value)}
                # It does not happen at another time, and cannot be mistaken for an event that both captions omit.
                assert not any(clause in phrasings(event) for event in same_shape)
                assert (
                    "move" not in {event.kind for event in omitted if event in same_shape}
                    or "blink" in clause
                    or "flash" in clause
                    or "flick" in clause
                )
            else:
                assert clause in phrasings(SceneEvent("appear", 0, 0, shape=match[2], colour=match[1]))


def test_order():
    for pair in pairs_of_kind("order"):
        scene_events, better, worse = parse_pair(pair)
        assert not worse.unmatched and sorted(worse.mentioned) == better.mentioned
        first, second = (index for index, event in enumerate(better.mentioned) if event != worse.mentioned[index])
        assert second == first + 1
        early, late = (scene_events[index] for index in better.mentioned[first : first + 2])
        assert "sound" not in (early.kind, late.kind) and early.end_seconds <= late.start_seconds
        for caption in (better, worse):
            assert caption.clauses[second][0] in LATER


def test_source():
    for pair in pairs_of_kind("source"):
        scene_events, better, worse = parse_pair(pair)
        events = []
        for caption in (better, worse):
            (clause,) = caption.unmatched
            match = re.fullmatch(r"(?:just )?as (.+), (.+)", clause) or re.fullmatch(r"(.+?) (?:just )?as (.+)", clause)
            joined = [
                index for part in match.groups() for index, event in enumerate(scene_events) if part in phrasings(event)
            ]
            (visual,) = [scene_events[index] for index in joined if scene_events[index].kind != "sound"]
            (sound,) = [scene_events[index] for index in joined if scene_events[index].kind == "sound"]
            assert sorted([*caption.mentioned, *joined]) == sorted({*better.mentioned, *worse.mentioned, *joined})
            events.append((visual, sound))
        (right_event, sound), (wrong_event, same) = events
        assert sound == same and right_event.shape != wrong_event.shape
        assert (
            sound.start_seconds < right_event.start_seconds < sound.end_seconds
            and wrong_event.overlap_seconds(sound) < 0
        )
        right_text, sound_text = (write_events([one])[0].text for one in (right_event, sound))
        assert f"{sound_text} as {right_text}" in [event.text for event in pair.events]


def test_repetition():
    num_verbatim_captions = 0
    for pair in pairs_of_kind("repetition"):
        _, better, worse = parse_pair(pair)
        assert not worse.unmatched and sorted(set(worse.mentioned)) == better.mentioned
        assert len(worse.mentioned) - len(better.mentioned) in (1, 2)
        repeated = [worse.clauses[at][1] for at, index in enumerate(worse.indices) if worse.mentioned.count(index) == 2]
        num_verbatim = len(repeated) - len(set(repeated))
        assert num_verbatim in (0, len(repeated) // 2)
        num_verbatim_captions += num_verbatim > 0
    assert 0.35 < num_verbatim_captions / 135 < 0.65


def test_padding():
    words = {*lexicon.COLOURS, *lexicon.SHAPES, "tone", "sweep", "sound", "beeps", "clicks", "noise", "heard", "seen"}
    for pair in pairs_of_kind("padding"):
        _, better, worse = parse_pair(pair)
        assert worse.mentioned == better.mentioned and 1 <= len(worse.unmatched) <= 3
        assert not words & set(" ".join(worse.unmatched).split())


@pytest.mark.parametrize("kind", ["colour", "object", "number", "invented", "source", "padding"])
def test_the_position_of_the_error(kind):
    for pair in pairs_of_kind(kind):
        _, _, worse = parse_pair(pair)
        errors = [at for at, index in enumerate(worse.indices) if index is None]
        # the mean position of the wrong clauses, in thirds of the caption
        position = (sum(errors) / len(errors) + 0.5) / len(worse.indices)
        assert pair.where == ("start", "middle", "end")[int(3 * position + 1e-9)]
