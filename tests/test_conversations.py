"""Parsing of published conversations; mistakes are reported with file and line."""

import gc
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salmonn import conversations
from salmonn.conversations import (
    Conversation,
    Preference,
    Turn,
    is_conversation_file,
    parse_conversation,
    read_conversations,
)
from salmonn.files import read_records
from salmonn.records import Reference

DATA = Path(__file__).parents[1] / "data"
HUMAN = {"from": "human", "value": "<image>\nWhat?"}
GPT = {"from": "gpt", "value": "This."}
ITEM = {"video": "a.mp4", "conversations": [HUMAN, GPT]}
TURN = Turn("What?", "This.")


def turn(speaker, text="words"):
    return {"from": speaker, "value": text}


def item(*turns, **keys):
    """Build an item about a video with these turns; keys with the value None are omitted."""
    values = {"video": "a.mp4", "conversations": list(turns) or [HUMAN, GPT], **keys}
    return {key: value for key, value in values.items() if value is not None}


def write(path, items):
    if path.suffix == ".json":
        path.write_text(json.dumps(items, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in items), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Conversation("a.mp4", modality="visual", turns=(TURN,))),
        ({"use_audio": False}, Conversation("a.mp4", modality="visual", turns=(TURN,))),
        ({"use_audio": True}, Conversation("a.mp4", modality="both", turns=(TURN,))),
        ({"audio": "a.wav"}, Conversation("a.mp4", "a.wav", modality="both", turns=(TURN,))),
        ({"audio": "a.wav", "use_audio": True}, Conversation("a.mp4", "a.wav", modality="both", turns=(TURN,))),
        ({"video": ["b.mp4"], "audio": ["b.wav"]}, Conversation("b.mp4", "b.wav", modality="both", turns=(TURN,))),
        ({"video": None, "audio": "a.wav"}, Conversation(audio="a.wav", modality="audio", turns=(TURN,))),
        ({"video": None, "image": ["a.png"]}, Conversation(image="a.png", modality="visual", turns=(TURN,))),
        (
            {"audio": "a.wav", "timestamps": [2, 4.5]},
            Conversation("a.mp4", "a.wav", start_seconds=2.0, end_seconds=4.5, turns=(TURN,)),
        ),
        (
            {"ce_only": False, "should_use": True, "id": 7, "num_tokens": 100},
            Conversation("a.mp4", modality="visual", turns=(TURN,)),
        ),
    ],
)
def test_clips(keys, expected):
    assert parse_conversation(item(**keys)) == expected


def test_null_counts_as_absent():
    nothing = dict.fromkeys(("audio", "image", "use_audio", "timestamps", "ce_only", "should_use", "id"))
    assert parse_conversation(ITEM | nothing) == Conversation("a.mp4", modality="visual", turns=(TURN,))


@pytest.mark.parametrize(
    ("prompt", "keys", "expected"),
    [
        ("Tell me.", {}, "Tell me."),
        ("<image>\nTell me.", {}, "Tell me."),
        ("<video>\nTell me.", {}, "Tell me."),
        ("<video>Tell me.", {}, "Tell me."),
        ("<video>\n\nTell me. ", {}, "\nTell me. "),  # one line break belongs to the tag, the rest is text
        ("Tell me.\n<video>", {}, "Tell me."),
        ("In <image> tell me.", {}, "In  tell me."),
        ("<audio>\nTell me.", {"video": None, "audio": "a.wav"}, "Tell me."),
        ("<image>\nTell me.", {"video": None, "audio": "a.wav"}, "Tell me."),
        ("<b>\nTell me.", {}, "<b>\nTell me."),
    ],
)
def test_the_tag_is_removed(prompt, keys, expected):
    assert parse_conversation(item(turn("human", prompt), GPT, **keys)).turns == (Turn(expected, "This."),)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (
            [HUMAN, GPT, turn("human", "Why?"), turn("gpt", "So."), turn("human", "When?"), turn("gpt", "Now.")],
            (
                TURN,
                Turn("Why?", "So.", (("What?", "This."),)),
                Turn("When?", "Now.", (("What?", "This."), ("Why?", "So."))),
            ),
        ),
        (
            [HUMAN, turn("history_gpt", "That."), turn("human", "Why?"), turn("gpt", "So.")],
            (Turn("Why?", "So.", (("What?", "That."),)),),
        ),
        ([turn("system", "Be kind."), HUMAN, GPT], (TURN,)),
        ([turn("gpt", "Hello!"), HUMAN, GPT], (TURN,)),
        ([{"role": "human", "content": "What?"}, {"role": "gpt", "content": "This.", "prefix": "Th"}], (TURN,)),
    ],
)
def test_turns(turns, expected):
    assert parse_conversation(item(*turns)).turns == expected


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (
            [HUMAN, turn("gpt", "good"), turn("reject_gpt", "bad"), turn("gt", "true")],
            Preference("What?", "good", "bad", "true"),
        ),
        (
            [HUMAN, turn("gpt", "true"), turn("chosen", "good"), turn("reject", "bad")],
            Preference("What?", "good", "bad", "true"),
        ),
        ([HUMAN, turn("gt", "true"), turn("reject_gpt", "bad"), GPT], Preference("What?", "This.", "bad", "true")),
        ([HUMAN, turn("gpt", "good"), turn("reject_gpt", "bad")], Preference("What?", "good", "bad", "")),
        ([HUMAN, turn("chosen", "good"), turn("reject", "bad")], Preference("What?", "good", "bad", "")),
        (
            [HUMAN, turn("history_gpt", "a"), turn("human", "Why?"), turn("gpt", "good"), turn("reject_gpt", "bad")],
            Preference("Why?", "good", "bad", "", (("What?", "a"),)),
        ),
        (
            [HUMAN, GPT, turn("human", "Why?"), turn("gpt", "true"), turn("chosen", "good"), turn("reject", "bad")],
            Preference("Why?", "good", "bad", "true", (("What?", "This."),)),
        ),
    ],
)
def test_preferences(turns, expected):
    assert parse_conversation(item(*turns)) == Conversation("a.mp4", modality="visual", preference=expected)


@pytest.mark.parametrize(
    "answers",
    [
        [turn("gpt", "good"), turn("reject_gpt", "bad"), turn("gt", "true")],
        [turn("gpt", "true"), turn("chosen", "good"), turn("reject", "bad")],
    ],
)
def test_ce_only_learns_the_ground_truth(answers):
    expected = Conversation("a.mp4", modality="visual", turns=(Turn("What?", "true"),))
    assert parse_conversation(item(HUMAN, *answers, ce_only=True)) == expected
    assert parse_conversation(item(ce_only=True)).turns == (TURN,)


MISTAKES = [
    (5, "expected a JSON object with conversations, got int"),
    (item(vidoe="b.mp4"), "unknown key vidoe; an item has video, audio, image, use_audio"),
    (item(video=None), "there is no clip: add a video, an audio or an image"),
    (item(video=["a.mp4", "b.mp4"]), "video lists 2 paths: several clips in one conversation are not supported"),
    (item(video=[]), "video lists 0 paths"),
    (item(video=5), "video must be a path, got 5"),
    (item(audio=""), "audio must be a path, got ''"),
    (item(image="a.png"), "an image together with video: several clips"),
    (item(image="a.png", audio="a.wav"), "an image together with video and audio"),
    (item(use_audio=1), "use_audio must be true or false, got 1"),
    (item(should_use=0), "should_use must be true or false, got 0"),
    (item(use_audio=False, audio="a.wav"), "use_audio is false although audio names a file"),
    (item(video=None, image="a.png", use_audio=True), "an image has no audio"),
    (item(timestamps=[3, 3]), "timestamps must start at 0 or later and end after their start, got [3, 3]"),
    (item(timestamps=[-1, 3]), "timestamps must start at 0 or later"),
    (item(timestamps=[0, float("nan")]), "timestamps must start at 0 or later"),
    (item(timestamps=[0, float("inf")]), "timestamps must start at 0 or later"),
    (item(timestamps=[3]), "timestamps must be [start, end] in seconds, got [3]"),
    (item(timestamps=[False, 3]), "timestamps must be [start, end] in seconds, got [False, 3]"),
    (item(timestamps=["0", 3]), "timestamps must be [start, end] in seconds, got ['0', 3]"),
    (item(video=None, image="a.png", timestamps=[0, 3]), "an image has no timestamps"),
    ({"video": "a.mp4"}, "conversations is missing"),
    (item(conversations={}), "conversations must be a list of turns, got dict"),
    (item(conversations=[]), "conversations has no human turn"),
    (item(GPT), "conversations has no human turn"),
    (item(GPT, GPT, HUMAN), "conversations must start with a human turn, not gpt"),
    (item(turn("gt"), HUMAN, GPT), "conversations must start with a human turn, not gt"),
    (item(HUMAN, "This."), "turn 2 must be a JSON object, got str"),
    (item(HUMAN, {"from": "gpt"}), "turn 2 must have from and value (or role and content), got from"),
    (
        item(HUMAN, {"from": "gpt", "content": "x"}),
        "turn 2 must have from and value (or role and content), got from, c",
    ),
    (item(HUMAN, GPT | {"loss": 0}), "turn 2 must have from and value (or role and content), got from, value, loss"),
    (item(HUMAN, turn("assistant")), "turn 2 has an unknown speaker 'assistant'; known are system, human, gpt"),
    (item(turn([1]), GPT), "turn 1 has an unknown speaker [1]"),
    (item(HUMAN, turn("gpt", None)), "turn 2 must be text, got None"),
    (item(HUMAN, turn("gpt", " \n")), "turn 2 (gpt) is empty"),
    (item(turn("human", "<image>\n "), GPT), "the first prompt has only the tag <image>"),
    (item(turn("human", "<image><image>\nx"), GPT), "the first prompt has 2 tags (<image>, <image>)"),
    (item(turn("human", "<video>\n<audio>\nx"), GPT), "the first prompt has 2 tags (<video>, <audio>)"),
    (item(turn("human", "<audio>\nx"), GPT), "the first prompt has the tag <audio>, but the clip is video: write <v"),
    (item(turn("human", "<video>\nx"), GPT, video=None, audio="a.wav"), "tag <video>, but the clip is audio"),
    (item(HUMAN, GPT, turn("human", "<image>\nx"), GPT), "a later turn (human) has a tag"),
    (item(HUMAN, turn("gpt", "a <video> b")), "a later turn (gpt) has a tag"),
    (item(HUMAN, turn("system"), GPT), "a system turn may only come first"),
    (item(HUMAN), "the prompt 'What?' needs one answer, gpt or history_gpt; it has none"),
    (item(HUMAN, GPT, turn("human", "Why?")), "the prompt 'Why?' needs one answer, gpt or history_gpt; it has none"),
    (item(HUMAN, HUMAN | {"value": "b"}, GPT), "the prompt 'What?' needs one answer"),
    (item(HUMAN, GPT, GPT), "needs one answer, gpt or history_gpt; it has gpt, gpt"),
    (item(HUMAN, turn("history_gpt")), "there is no gpt turn"),
    (item(HUMAN, GPT, turn("reject_gpt"), turn("chosen")), "reject_gpt of the salmonn2 format together with chosen of"),
    (item(HUMAN, GPT, turn("gt"), turn("reject")), "gt of the salmonn2 format together with reject of the 2+ format"),
    (item(HUMAN, GPT, turn("gt")), "a preference needs reject_gpt after the last prompt"),
    (item(HUMAN, turn("reject_gpt")), "a preference needs gpt after the last prompt"),
    (item(HUMAN, GPT, turn("chosen")), "a preference needs reject after the last prompt"),
    (item(HUMAN, turn("reject")), "a preference needs chosen after the last prompt"),
    (item(HUMAN, GPT, turn("reject_gpt"), turn("reject_gpt")), "reject_gpt answers the last prompt twice"),
    (
        item(HUMAN, turn("history_gpt"), turn("chosen"), turn("reject")),
        "history_gpt may not answer the last prompt of a pr",
    ),
    (
        item(HUMAN, turn("chosen"), turn("reject"), turn("human", "b"), turn("chosen"), turn("reject")),
        "the prompt 'What?' needs one answer, gpt or history_gpt; it has chosen, reject",
    ),
    (
        item(HUMAN, turn("chosen"), turn("reject"), ce_only=True),
        "ce_only learns the ground truth, which is missing: a",
    ),
    (item(HUMAN, GPT, turn("reject_gpt"), ce_only=True), "which is missing: add gt"),
]


@pytest.mark.parametrize(("invalid_item", "message"), MISTAKES, ids=range(len(MISTAKES)))
@pytest.mark.parametrize(("name", "line"), [("data.json", 15), ("data.jsonl", 2)])
def test_errors_have_file_and_line(tmp_path, name, line, invalid_item, message):
    # Indented, the list's first item takes lines 2 to 14.
    path = write(tmp_path / name, [ITEM, invalid_item, ITEM])
    with pytest.raises(ValueError) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ") and message in str(caught.value)


GOOD = json.dumps(ITEM)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "line 1: expected a list of items: put [ ] around them"),
        ("a.json", f"\n\n{GOOD}\n", "line 3: expected a list of items"),
        ("a.json", "[\n]", " holds no conversation"),
        ("a.json", f"[{json.dumps(item(should_use=False))}]", " holds no conversation"),
        ("a.json", f"[{GOOD},\n\n{{not json}}]", "line 3: not JSON at column 2"),
        ("a.json", f'[{GOOD},\n{{"video":\n5 5}}]', "line 3: not JSON at column 3"),
        ("a.json", f"[{GOOD},\n\n]", "line 3: not JSON at column 1"),
        ("a.json", f"[{GOOD}\n{GOOD}]\n\n", "line 2: unfinished list"),
        ("a.json", f"[{GOOD}\nx\n\n{GOOD}]\n", "line 2: unfinished list"),
        ("a.json", f"[\n{GOOD}\n", "line 3: unfinished list"),
        ("a.json", "[\n", "line 2: not JSON at column 1"),
        ("a.json", f"[{GOOD}]\n \n[]", "line 3: remove the text after the end of the list"),
        ("a.json", f"[{GOOD},\n{GOOD},\n5]\x00", "line 3: expected a JSON object"),
        ("a.jsonl", "", " holds no conversation"),
        ("a.jsonl", "\n \n", " holds no conversation"),
        ("a.jsonl", f"{GOOD}\n\n{{not json}}\n", "line 3: not JSON at column 2"),
        (
            "a.jsonl",
            f"[\n{GOOD}\n]",
            "line 1: not JSON at column 2: Expecting value; a file that holds a list must be named",
        ),
        ("a.jsonl", f"[{GOOD}]", "line 1: expected a JSON object with conversations, got list"),
        ("a.txt", GOOD, " must be named .json (a list of items) or .jsonl"),
    ],
)
def test_malformed_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_conversations(path)
    assert re.match(rf"{re.escape(str(path))}(, )?{re.escape(message)}", str(caught.value)), caught.value


@pytest.mark.parametrize(("name", "text"), [("a.json", f"[{GOOD},\n\n{GOOD}]"), ("a.jsonl", f"{GOOD}\n\n{GOOD}\n")])
def test_text_that_is_not_utf8(tmp_path, name, text):
    path = tmp_path / name
    raw = text.replace("This.", "Thìs.").encode("latin-1")
    path.write_bytes(raw.replace(b"\xec", b"i", 1))
    with pytest.raises(ValueError, match=r"line 3: not UTF-8 text: save the file as UTF-8"):
        read_conversations(path)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # the mark that some editors put before UTF-8 text
    assert len(read_conversations(path)) == 2 and is_conversation_file(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: expected a \.json or \.jsonl file"):
        read_conversations(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        is_conversation_file(tmp_path / "none.json")


@given(data=st.data(), gaps=st.lists(st.text(" \t\n\r", max_size=6), min_size=4, max_size=20), indent=st.booleans())
def test_the_line_is_where_the_item_starts(tmp_path_factory, data, gaps, indent):
    """The line is right with any white space between items, and with line breaks and brackets in strings."""
    invalid = data.draw(st.integers(0, len(gaps) - 4))
    path = tmp_path_factory.mktemp("lines") / "data.json"
    text = f"{gaps[0]}[{gaps[1]}"
    expected = 0
    for index, gap in enumerate(gaps[3:]):
        if index:
            text += "," + gap
        text_part = data.draw(st.text('a]},"\\\n{[', max_size=5))
        if index == invalid:
            expected = text.count("\n") + 1
        entry = item(HUMAN, turn("gpt", text_part + "x"), **({"typo": 1} if index == invalid else {}))
        text += json.dumps(entry, indent=2 if indent else None) + gaps[2]
    path.write_bytes(f"{text}]".encode())
    with pytest.raises(ValueError, match=f"line {expected}: unknown key typo"):
        read_conversations(path)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_both_file_kinds_keep_the_order(tmp_path, name):
    items = [item(video=f"{index}.mp4", should_use=index != 1) for index in range(4)]
    read = read_conversations(str(write(tmp_path / name, items)))
    assert read == [Conversation(f"{index}.mp4", modality="visual", turns=(TURN,)) for index in (0, 2, 3)]


class CountingText(str):
    """Text that adds up the number of characters searched for line breaks."""

    searched = 0

    def count(self, sub, start=0, end=None):
        CountingText.searched += len(self[start:end])
        return super().count(sub, start, len(self) if end is None else end)


def test_lines_of_a_list_are_counted_once(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text("[" + ",\n".join([GOOD] * 1000) + "]", encoding="utf-8")
    read = conversations._read_text
    monkeypatch.setattr(conversations, "_read_text", lambda path: CountingText(read(path)))
    monkeypatch.setattr(CountingText, "searched", 0)
    assert len(read_conversations(path)) == 1000
    # Counted from the start of the file for each item, it would be 500 times the file.
    assert path.stat().st_size * 0.9 < CountingText.searched <= path.stat().st_size


@pytest.mark.parametrize(("name", "between"), [("data.json", ",\n"), ("data.jsonl", "\n")])
def test_the_time_grows_with_the_number_of_items(tmp_path, name, between):
    seconds = []
    for count in (1000, 10_000):
        text = between.join([GOOD] * count)
        path = tmp_path / f"{count}_{name}"
        path.write_text(f"[{text}]" if between[0] == "," else text, encoding="utf-8")
        gc.disable()  # a collection takes longer with more objects of other tests
        try:
            start = time.process_time()
            assert len(read_conversations(path)) == count
            seconds.append(time.process_time() - start)
        finally:
            gc.enable()
    # Ten times the items: decoding the rest of the file for each of them would take a hundred times the time.
    assert seconds[1] < 30 * max(seconds[0], 0.01), seconds


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", f"\n [\n{GOOD}]", True),
        ("a.json", "[]", True),
        ("a.jsonl", f"\n{GOOD}\n", True),
        ("a.jsonl", '{"video": "a.mp4", "caption": "conversations"}\n' + GOOD, False),
        ("a.json", '{"video": "a.mp4"}\n', False),  # references may have this name
        ("a.json", '{\n"conversations": []}', True),
        ("a.jsonl", '{"video": "a.mp4\n', False),
        ("a.jsonl", "", False),
        ("a.jsonl", "5", False),
    ],
)
def test_conversations_are_distinguished_from_references(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert is_conversation_file(path) is expected


def test_the_samples():
    scene, horn = "Say what happens here, with what can be heard.", "How often does the horn sound?"
    truth = "A ferry enters the harbour and sounds its horn twice while gulls cry."
    ferry, lighthouse = "clips/harbour.mp4", "A white ferry comes in past a red lighthouse."
    tram = "A tram bell, then the chatter of people who get off."
    assert read_conversations(DATA / "published_sft.json") == [
        Conversation(ferry, "clips/harbour.wav", turns=(Turn(scene, truth),)),
        Conversation(
            ferry,
            start_seconds=4.0,
            end_seconds=9.5,
            turns=(Turn(horn, "Twice."), Turn("And what is heard besides?", "Gulls.", ((horn, "Twice."),))),
        ),
        Conversation(ferry, modality="visual", turns=(Turn("Say what can be seen.", lighthouse),)),
        Conversation(audio="clips/street.flac", modality="audio", turns=(Turn("What can be heard?", tram),)),
        Conversation(
            image="stills/market.jpg",
            modality="visual",
            turns=(Turn("What is on sale?", "Oranges, lemons and a crate of figs."),),
        ),
    ]
    preference = Preference(
        scene, "A ferry arrives and sounds its horn.", "A ferry leaves while a band plays.", ground_truth=truth
    )
    assert read_conversations(DATA / "published_dpo.json") == [
        Conversation(ferry, "clips/harbour.wav", preference=preference),
        Conversation(ferry, preference=preference),
    ]
    assert is_conversation_file(DATA / "published_sft.json") and not is_conversation_file(DATA / "sample.jsonl")


def test_the_examples_on_the_page(tmp_path):
    ours, *published = re.findall(
        r"```json\n(.*?)```", (DATA.parent / "docs" / "data.md").read_text(encoding="utf-8"), re.DOTALL
    )
    path = tmp_path / "a.jsonl"
    path.write_text(ours, encoding="utf-8")
    assert len(read_records(path, Reference)) == 1
    learnt = [parse_conversation(json.loads(text)) for text in published]
    assert [one.modality for one in learnt] == ["both", "both", "both", "both", "audio", "visual", "both"]
    assert (
        learnt[1].preference
        == learnt[3].preference
        == Preference("What happens?", "A dog barks.", "A dog sleeps.", "A dog barks at a cat.")
    )
    assert (learnt[6].start_seconds, learnt[6].end_seconds, len(learnt[6].turns)) == (12.0, 20.5, 2)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "brackets are nested too deeply"),
        ("1" + "0" * 5000, "a number has thousands of digits"),
        (f"[0, 1{'0' * 400}]", r"timestamps must start at 0 or later and end after their start, got \[0, 1000"),
    ],
)
def test_values_that_python_cannot_hold(tmp_path, name, value, message):
    path, good = tmp_path / name, json.dumps(item())
    bad = good.replace("{", f'{{"timestamps": {value}, ', 1)
    path.write_text(f"[{good},\n{bad}]" if name == "data.json" else f"{good}\n{bad}\n")
    with pytest.raises(ValueError, match=f"data.jsonl?, line 2: .*{message}"):
        read_conversations(path)
    path.write_text(bad)
    assert is_conversation_file(path) == (name == "data.json" or "timestamps" in message)
