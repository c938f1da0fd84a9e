"""The labels of the reward benchmark, derived from the clips' events without any judge.

Captions are split where the generator joins clauses, and each clause is looked up among all phrasings of the clip's
events; a clause that is not found there is an error, padding or a statement that something is missing.
"""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from salmonn.files import parse_record
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.preference.benchmark_items import SCENARIOS
from salmonn.records import Event
from salmonn.synthetic import lexicon
from salmonn.synthetic.annotate import write_events
from salmonn.synthetic.render import render_audio, sample_clip
from salmonn.synthetic.scene import SceneEvent, SynthConfig, objects_at

DATA = Path(__file__).parents[2] / "data"
FILE = DATA / "reward_pairs.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text().splitlines()]
SUBSETS = [subset for scenario, subsets in SCENARIOS.items() if scenario[0].islower() for subset in subsets]
ABOUT_CLIP = [one for one in SUBSETS if one not in ("when", "false_premise", "true_premise")]  # captions of a clip
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

    def __init__(self, text: str, scene_events: tuple[SceneEvent, ...]):
        self.text, self.clauses = text, split_clauses(text)
        forms = {text: index for index, event in enumerate(scene_events) for text in phrasings(event)}
        self.indices = [forms.get(text) for _, text in self.clauses]
        self.mentioned = [index for index in self.indices if index is not None]
        self.unmatched = [text for (_, text), index in zip(self.clauses, self.indices, strict=True) if index is None]


@lru_cache(maxsize=1024)
def scene_of(seed: int, index: int):
    return sample_clip(SynthConfig(seed=seed), index=index)[0]


def parse_row(row: dict) -> tuple[tuple[SceneEvent, ...], ParsedCaption, ParsedCaption]:
    """Return the clip's events, the better caption and the worse one."""
    scene_events = scene_of(row["seed"], row["index"]).events
    return scene_events, ParsedCaption(row["chosen"], scene_events), ParsedCaption(row["rejected"], scene_events)


def parsed(subset: str):
    """Yield each row of a subset with what `parse_row` returns."""
    rows = [row for row in ROWS if row["subset"] == subset]
    assert len(rows) == 100
    return [(row, *parse_row(row)) for row in rows]


def words_of(scene_events) -> set[str]:
    return {word for event in scene_events for word in (event.colour, event.shape, event.value)}


def joined_events(clause: str, scene_events) -> tuple[SceneEvent, SceneEvent]:
    """Return the action and the sound that a clause such as "as A, B" joins."""
    match = re.fullmatch(r"(?:just )?as (.+), (.+)", clause) or re.fullmatch(r"(.+?) (?:just )?as (.+)", clause)
    found = [event for part in match.groups() for event in scene_events if part in phrasings(event)]
    (visual,) = [event for event in found if event.kind != "sound"]
    (sound,) = [event for event in found if event.kind == "sound"]
    return visual, sound


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("reward_pairs")


def test_the_shipped_files_are_the_generators_output(tool, tmp_path):
    """The first rows of each subset; all of them would take 10 seconds."""
    assert [row["subset"] for row in ROWS] == [subset for subset in SUBSETS for _ in range(100)]
    for subset in SUBSETS:
        assert tool.generate_pairs(subset, seed=4, number=3) == [row for row in ROWS if row["subset"] == subset][:3]
    lines = (DATA / "reward_best_of_4.jsonl").read_text().splitlines(keepends=True)
    tool.write_rows(tmp_path / "b.jsonl", tool.generate_best_of_4(seed=4, number=3))
    assert (tmp_path / "b.jsonl").read_text() == "".join(lines[:3]) and len(lines) == 100
    assert tool.generate_pairs("colour", seed=5, number=1)[0]["chosen"] != ROWS[100]["chosen"]
    assert FILE.stat().st_size < 1.5e6


def test_one_row_per_clip_and_few_clips():
    assert len({(row["subset"], row["index"]) for row in ROWS}) == len(ROWS)
    assert len({row["index"] for row in ROWS}) == 254 and {row["seed"] for row in ROWS} == {4}


def test_lengths_are_balanced():
    """As documented, 1,872 of 1,900 pairs have equally many words, and no subset can be solved by length."""
    differences = {subset: Counter[int]() for subset in SUBSETS}
    for row in ROWS:
        difference = len(row["chosen"].split()) - len(row["rejected"].split())
        differences[row["subset"]][(difference > 0) - (difference < 0)] += 1
    assert sum(counts[0] for counts in differences.values()) == 1872
    assert all(abs(counts[1] - counts[-1]) <= 15 for counts in differences.values())


def test_the_better_caption_is_correct_and_often_incomplete():
    num_incomplete, num_captions = 0, 0
    missing = re.compile(
        r"no (?:sound|shape) can be seen|no sound can be heard|nothing .*|there is (?:no sound|nothing .*)"
    )
    for row in ROWS:
        if row["subset"] not in ABOUT_CLIP:
            continue
        scene_events, better, _ = parse_row(row)
        assert better.mentioned == sorted(set(better.mentioned)), "each event once, in temporal order"
        others = [clause for clause in better.unmatched if not missing.fullmatch(clause)]
        assert len(others) == (row["subset"] in ("count", "source", "together"))
        assert row["prompt"].startswith(PLAIN_PROMPTS["both"])
        if "use" not in row and not others:
            num_captions += 1
            num_incomplete += len(better.mentioned) < len(scene_events)
    assert 0.5 < num_incomplete / num_captions < 0.9


def test_then_and_while_are_true():
    """Except in the worse caption of an `order` pair."""
    counts = Counter()
    for row in ROWS:
        if row["subset"] not in ABOUT_CLIP:
            continue
        scene_events, better, worse = parse_row(row)
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
            assert num_false == (row["subset"] == "order" and caption is worse)
    assert min(counts[conjunction] for conjunction in (*LATER, *SIMULTANEOUS)) > 100


def test_events_are_given_where_they_differ_from_those_of_the_clip():
    """In one event, which states the number or the source."""
    for row in ROWS:
        given = "events" in row
        assert given == (row["subset"] in ("count", "together", "source"))
        if given:
            expected = write_events(scene_of(row["seed"], row["index"]).events)
            events = [parse_record(event, Event) for event in row["events"]]
            differing = [pair for pair in zip(events, expected, strict=True) if pair[0] != pair[1]]
            ((event, original),) = differing
            assert replace(event, text=original.text) == original


def test_left_out():
    for _, _, better, worse in parsed("left_out"):
        assert not worse.unmatched and set(worse.mentioned) < set(better.mentioned)
        assert len(better.mentioned) - len(worse.mentioned) in (1, 2)
        assert worse.mentioned == sorted(worse.mentioned)


def assert_altered(row, scene_events, better, worse, vocabulary):
    """All mentions of one object have one wrong word, which the clip does not have; return the better clauses."""
    missing = [index for index in better.mentioned if index not in worse.mentioned]
    assert len(worse.unmatched) == len(missing) > 0 and len(better.indices) == len(worse.indices)
    altered = []
    for place, (right, wrong) in enumerate(zip(better.indices, worse.indices, strict=True)):
        if wrong is not None:
            assert wrong == right
            continue
        clause = worse.clauses[place][1]
        (word,) = {
            word for word in vocabulary if word not in words_of(scene_events) and re.search(rf"\b{word}\b", clause)
        }
        # With one word corrected, the clause mentions the same event as the better caption.
        repairs = (clause.replace(word, other) for other in vocabulary)
        assert {article(repair) for repair in repairs} & phrasings(scene_events[right])
        altered.append(scene_events[right])
    assert len({event.shape for event in altered}) == 1
    return altered


@pytest.mark.parametrize(("subset", "vocabulary"), [("colour", tuple(lexicon.COLOURS)), ("object", lexicon.SHAPES)])
def test_wrong_colour_and_object(subset, vocabulary):
    for row, scene_events, better, worse in parsed(subset):
        altered = assert_altered(row, scene_events, better, worse, vocabulary)
        own = [scene_events[index] for index in better.mentioned if scene_events[index].shape == altered[0].shape]
        # The same in all mentions, so that no caption contradicts itself.
        assert altered == own if subset == "object" else all(event in own for event in altered)


@pytest.mark.parametrize("subset", ["hint_wrong", "hint_right"])
def test_the_note_follows_one_of_the_captions(subset):
    for row, scene_events, better, worse in parsed(subset):
        assert_altered(row, scene_events, better, worse, tuple(lexicon.COLOURS))
        note = re.fullmatch(r'Describe .* in detail\. A viewer noted: "(.*)\."', row["prompt"])[1]
        note = note[0].lower() + note[1:]
        canonical = {event.text for event in write_events(scene_events)}
        # Only one of the captions has an object of the note's colour.
        colours = set(re.findall("|".join(lexicon.COLOURS), note))
        assert (note in canonical) == (subset == "hint_right")
        followed, other = (better, worse) if subset == "hint_right" else (worse, better)
        assert colours <= set(re.findall(r"\w+", followed.text.lower()))
        assert subset == "hint_right" or not colours <= set(re.findall(r"\w+", other.text.lower()))


def test_count():
    answers = Counter()
    for row, scene_events, better, worse in parsed("count"):
        (right,), (wrong,) = better.unmatched, worse.unmatched
        (number, noun), (wrong_number, same) = (COUNTED.fullmatch(clause).groups() for clause in (right, wrong))
        (sound,) = [event for event in scene_events if event.value == noun]
        assert number == NUMBERS[expected_pulses(sound)] and noun == same and number != wrong_number
        assert better.mentioned == worse.mentioned
        assert f"{number} {noun} are heard" in [event["text"] for event in row["events"]]
        answers[noun, number, wrong_number] += 1
    # The number cannot be guessed: of any two, both are right equally often.
    assert all(abs(count - answers[noun, wrong, right]) <= 1 for (noun, right, wrong), count in list(answers.items()))
    assert {right for _, right, _ in answers} == {"three", "four", "five", "six"}


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
    for _, scene_events, better, worse in parsed("invented"):
        assert worse.mentioned == better.mentioned and len(worse.unmatched) in (1, 2)
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
                is_blink = any(word in clause for word in ("blink", "flash", "flick"))
                assert is_blink or "move" not in {event.kind for event in omitted if event in same_shape}
            else:
                assert clause in phrasings(SceneEvent("appear", 0, 0, shape=match[2], colour=match[1]))


def test_order():
    for _, scene_events, better, worse in parsed("order"):
        assert not worse.unmatched and sorted(worse.mentioned) == better.mentioned
        first, second = (index for index, event in enumerate(better.mentioned) if event != worse.mentioned[index])
        assert second == first + 1
        early, late = (scene_events[index] for index in better.mentioned[first : first + 2])
        assert "sound" not in (early.kind, late.kind) and early.end_seconds <= late.start_seconds
        # The wrong order is possible.
        kinds = {early.kind, late.kind}
        assert early.shape != late.shape or not kinds & {"appear", "change", "leave"}
        for caption in (better, worse):
            assert caption.clauses[second][0] in LATER


@pytest.mark.parametrize("subset", ["source", "together"])
def test_sounds_with_an_action(subset):
    """`source` has a right and a wrong action for a sound, `together` a right and a wrong sound for an action."""
    for row, scene_events, better, worse in parsed(subset):
        (right,), (wrong,) = better.unmatched, worse.unmatched
        action, sound = joined_events(right, scene_events)
        wrong_action, wrong_sound = joined_events(wrong, scene_events)
        if subset == "source":
            assert sound == wrong_sound and action.shape != wrong_action.shape
        else:
            assert action == wrong_action and sound != wrong_sound
        assert sound.start_seconds < action.start_seconds < sound.end_seconds
        assert wrong_action.overlap_seconds(wrong_sound) < 0
        joined = [
            sorted([*caption.mentioned, *map(scene_events.index, pair)])
            for caption, pair in ((better, (action, sound)), (worse, (wrong_action, wrong_sound)))
        ]
        assert joined[0] == joined[1]
        action_text, sound_text = (write_events([one])[0].text for one in (action, sound))
        assert f"{sound_text} as {action_text}" in [event["text"] for event in row["events"]]


def test_who():
    for row, scene_events, better, worse in parsed("who"):
        (clause,) = worse.unmatched
        (missing,) = set(better.mentioned) - set(worse.mentioned)
        event = scene_events[missing]
        colour, shape = OBJECT.search(clause).groups()
        assert clause in phrasings(replace(event, colour=colour, shape=shape)) and shape != event.shape
        present = objects_at(scene_of(row["seed"], row["index"]), event.start_seconds)
        assert (shape, colour, True) in [(one.shape, one.colour, one.visible) for one in present]
        assert not any((one.shape, one.kind, one.value) == (shape, event.kind, event.value) for one in scene_events)


def test_when():
    answers = Counter()
    pattern = re.compile(r"(.*) in the (first|second) half\.")
    for row in [row for row in ROWS if row["subset"] == "when"]:
        scene = scene_of(row["seed"], row["index"])
        (clause, right), (same, wrong) = (pattern.fullmatch(row[name]).groups() for name in ("chosen", "rejected"))
        clause = clause[0].lower() + clause[1:]
        (event,) = [event for event in scene.events if clause in phrasings(event)]
        assert same.lower() == clause and {right, wrong} == {"first", "second"}
        middle = scene.duration_seconds / 2
        assert event.end_seconds < middle if right == "first" else event.start_seconds > middle
        assert row["prompt"].endswith(", in the first half or in the second half?")
        assert (event.shape or "heard") in row["prompt"]
        answers[event.value if event.kind == "sound" else event.kind, right] += 1
    assert all(
        abs(count - answers[kind, "second"]) <= 1 for (kind, right), count in answers.items() if right == "first"
    )


@pytest.mark.parametrize(("subset", "use"), [("silent", "visual"), ("dark", "audio")])
def test_a_missing_modality(subset, use):
    num_silent = 0
    for row, scene_events, better, worse in parsed(subset):
        assert row["use"] == use
        given = {index for index, event in enumerate(scene_events) if (event.kind == "sound") == (use == "audio")}
        assert better.mentioned == worse.mentioned and set(better.mentioned) <= given
        (invented,) = worse.unmatched
        match = OBJECT.search(invented)
        if use == "audio":
            assert invented in phrasings(SceneEvent("appear", 0, 0, shape=match[2], colour=match[1]))
            assert not {match[1], match[2]} & words_of(scene_events)
        else:
            kinds = [kind for kind in lexicon.SOUNDS if invented in phrasings(SceneEvent("sound", 0, 0, value=kind))]
            assert len(kinds) == 1 and kinds[0] not in words_of(scene_events)
        assert all(clause.split()[0] in ("no", "nothing", "there") for clause in better.unmatched)
        num_silent += not better.unmatched
    assert 30 < num_silent < 70


@pytest.mark.parametrize("subset", ["false_premise", "true_premise"])
def test_the_premise(subset):
    for row in [row for row in ROWS if row["subset"] == subset]:
        scene_events = scene_of(row["seed"], row["index"]).events
        colour, shape = re.fullmatch(r"What does the (\w+) (\w+) do last\?", row["prompt"]).groups()
        yes, no = (row["rejected"], row["chosen"]) if subset == "false_premise" else (row["chosen"], row["rejected"])
        assert re.match(rf"(There is no|No|We never see an?) {colour} {shape}\b", no) and yes.startswith("The ")
        clause = yes[0].lower() + yes[1:-1]
        if subset == "false_premise":
            assert not {colour, shape} & words_of(scene_events)
        else:
            own = [event for event in scene_events if event.shape == shape]
            assert clause in phrasings(own[-1]) and own[-1].colour == colour


def test_repetition():
    num_verbatim_captions = 0
    for _, _, better, worse in parsed("repetition"):
        assert not worse.unmatched and sorted(set(worse.mentioned)) == better.mentioned
        assert len(worse.mentioned) - len(better.mentioned) in (1, 2)
        repeated = [worse.clauses[at][1] for at, index in enumerate(worse.indices) if worse.mentioned.count(index) == 2]
        num_verbatim = len(repeated) - len(set(repeated))
        assert num_verbatim in (0, len(repeated) // 2)
        num_verbatim_captions += num_verbatim > 0
    assert 35 < num_verbatim_captions < 65


def test_padding():
    words = {*lexicon.COLOURS, *lexicon.SHAPES, "tone", "sweep", "sound", "beeps", "clicks", "noise", "heard", "seen"}
    for _, _, better, worse in parsed("padding"):
        (padding,) = worse.unmatched
        assert worse.mentioned == better.mentioned and not words & set(padding.split())


def test_cut():
    for _, scene_events, better, worse in parsed("cut"):
        assert not worse.text.endswith(".") and worse.mentioned == better.mentioned[:-1]
        (rest,) = worse.unmatched
        assert worse.indices[-1] is None and len(rest.split()) == 2
        assert any(text.startswith(rest + " ") for text in phrasings(scene_events[better.mentioned[-1]]))


def test_best_of_4():
    faults = Counter()
    for line in (DATA / "reward_best_of_4.jsonl").read_text().splitlines():
        row = json.loads(line)
        metadata = row["additional_metadata"]
        scene_events = scene_of(metadata["seed"], metadata["index"]).events
        (chosen,) = row["chosen"]
        better = ParsedCaption(chosen, scene_events)
        assert not better.unmatched and better.mentioned == sorted(set(better.mentioned))
        assert len(row["rejected"]) == len(set(metadata["faults"])) == 3 and row["total_completions"] == 4
        for text, fault in zip(row["rejected"], metadata["faults"], strict=True):
            worse = ParsedCaption(text, scene_events)
            if fault in ("left_out", "order"):
                assert not worse.unmatched and worse.mentioned != better.mentioned
            else:
                assert worse.unmatched
            faults[fault] += 1
    assert min(faults.values()) > 10 and len(faults) == 6
