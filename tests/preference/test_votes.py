"""Votes: what is kept, which pairs come of them, and that a recipe reads these."""

import errno
import fcntl
import json
import os
import resource
import threading
from dataclasses import replace

import pytest

from salmonn.caption.probe import MediaInfo
from salmonn.conversations import read_conversations
from salmonn.preference.votes import Candidate, Vote, VoteMedia, VoteStore, keep_video, why_no_pair
from salmonn.train.data import conversation_examples

LEFT = Candidate("one", "A dog barks.", "Describe it.", temperature=0.8, seed=3, total=0.25)
RIGHT = Candidate("two", "A cat sleeps.", "Tell it.", seed=4, total=0.75)
VOTE = Vote("2026-11-22T10:00:00+00:00", "holiday.mp4", LEFT, RIGHT, "second")


@pytest.fixture
def store(tmp_path):
    return VoteStore(tmp_path / "votes")


@pytest.fixture
def footage(tmp_path):
    path = tmp_path / "a visitor's [1].MP4"
    path.write_bytes(b"pictures")
    return VoteMedia(path, MediaInfo(12.5), may_keep=True)


def read_pairs(store):
    """The file of pairs as `recipes/dpo.py` reads it; the files that it names are there."""
    pairs = read_conversations(store.folder / "pairs.jsonl")
    conversation_examples(pairs, root=store.folder)
    return pairs


def test_a_vote_becomes_a_pair_that_a_recipe_reads(store, footage, load_recipe, tmp_path):
    cast = store.add(VOTE, footage)
    # The first 24 digits of sha256("pictures"), and the ending in small letters.
    assert cast.pair == "752f502ee3ac574467c34d28.mp4"
    assert (cast.ground_truth, cast.why_no_pair) == ("chosen", "")
    assert store.read() == [cast]
    (pair,) = read_pairs(store)
    assert (pair.video, pair.modality, pair.preference.prompt) == (f"videos/{cast.pair}", "both", "Tell it.")
    assert (pair.preference.chosen, pair.preference.rejected) == (RIGHT.text, LEFT.text)
    assert pair.preference.ground_truth == RIGHT.text
    assert (store.folder / "videos" / cast.pair).read_bytes() == b"pictures"
    dpo = load_recipe("dpo")
    config = dpo.OfflineDpoConfig(preferences=store.folder / "pairs.jsonl", model="none", out=tmp_path / "out")
    examples, pairs = dpo.read_preferences(config)
    assert (len(examples), pairs[0].chosen) == (1, RIGHT.text)


@pytest.mark.parametrize(
    ("changes", "outline", "expected"),
    [
        ({}, MediaInfo(9.0), {"modality": "both"}),
        ({}, MediaInfo(9.0, has_audio=False), {"modality": "visual"}),
        ({}, MediaInfo(9.0, has_video=False), {"modality": "audio", "video": None}),
        ({"modality": "visual"}, MediaInfo(9.0), {"modality": "visual"}),
        ({"modality": "audio"}, MediaInfo(9.0), {"modality": "audio", "video": None}),
        ({"start_seconds": 2.0}, MediaInfo(9.0), {"start_seconds": 2.0, "end_seconds": 9.0}),
        ({"end_seconds": 3.5}, MediaInfo(9.0), {"start_seconds": 0.0, "end_seconds": 3.5}),
    ],
)
def test_a_pair_asks_for_what_is_there(store, footage, changes, outline, expected):
    store.add(replace(VOTE, **changes), replace(footage, outline=outline))
    (pair,) = read_pairs(store)
    assert {name: getattr(pair, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "reference", "expected"),
    [
        ({"edit": " A dog yawns. "}, "Known.", ("edit", "A dog yawns.")),
        ({}, "Known.", ("reference", "Known.")),
        ({"start_seconds": 1.0}, "Known.", ("chosen", RIGHT.text)),
        ({}, " ", ("chosen", RIGHT.text)),
    ],
)
def test_whose_words_are_the_truth(store, footage, changes, reference, expected):
    cast = store.add(replace(VOTE, **changes), replace(footage, reference=reference))
    (pair,) = read_pairs(store)
    assert (cast.ground_truth, pair.preference.ground_truth) == expected


@pytest.mark.parametrize(
    ("changes", "may_keep", "reason"),
    [
        ({"choice": "tie"}, True, "neither of the two was preferred"),
        ({"choice": "both bad"}, True, "neither of the two was preferred"),
        ({}, False, "the video may not be kept"),
        ({"first": replace(LEFT, text=" ")}, True, "one of the two is empty"),
        ({"first": replace(LEFT, finished=False)}, True, "one of the two ran into its limit of length"),
        ({"first": replace(LEFT, text="A cat  sleeps.")}, True, "both say the same"),
    ],
)
def test_votes_that_are_not_trained_on(store, footage, changes, may_keep, reason):
    footage = replace(footage, may_keep=may_keep)
    vote = replace(VOTE, **changes)
    assert why_no_pair(vote, footage) == reason
    cast = store.add(vote, footage)
    assert (cast.why_no_pair, cast.pair, cast.ground_truth) == (reason, "", "")
    assert store.read() == [cast] and not (store.folder / "pairs.jsonl").exists()
    assert not list((store.folder / "videos").iterdir())


def test_words_that_the_recipe_would_refuse_spoil_no_file(store, footage):
    cast = store.add(replace(VOTE, edit="As <video> shows."), footage)
    assert "it cannot be trained on" in cast.why_no_pair and "tag" in cast.why_no_pair
    assert store.read() == [cast] and not (store.folder / "pairs.jsonl").exists()


def test_the_log(store, footage):
    store.log_copy(video="holiday.mp4", model="one", text="A dog barks.")
    store.add(replace(VOTE, edit="A dog yawns."), footage)
    store.add(replace(VOTE, choice="tie"), footage)
    told = [(entry.action, entry.video, entry.model, entry.text) for entry in store.read_log()]
    assert told == [
        ("copy", "holiday.mp4", "one", "A dog barks."),
        ("vote", "holiday.mp4", "two", "second"),
        ("edit", "holiday.mp4", "", "A dog yawns."),
        ("vote", "holiday.mp4", "", "tie"),
    ]


def test_a_torn_line_is_cut_off_and_the_rest_goes_on(store, footage, caplog):
    first = store.add(VOTE, footage)
    with (store.folder / "votes.jsonl").open("a") as file:
        file.write('{"date": "2026-11')
    again = VoteStore(store.folder)
    assert "votes.jsonl ends within a line" in caplog.text
    second = again.add(replace(VOTE, choice="first"), footage)
    assert again.read() == [first, second]


@pytest.mark.parametrize("name", ["votes.jsonl", "pairs.jsonl", "log.jsonl"])
def test_a_full_disk_keeps_all_of_a_vote_or_nothing(store, footage, name):
    """No file may grow longer than `name` is already and half a line: the others are made to be shorter."""
    first = store.add(VOTE, footage)
    before = {path.name: path.read_text() for path in store.folder.glob("*.jsonl")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    lengthy = store.folder / name
    blank = " " * 10_000 + "\n"
    lengthy.write_text(before[name] + blank)
    resource.setrlimit(resource.RLIMIT_FSIZE, (lengthy.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(OSError):
            store.add(VOTE, footage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lengthy.read_text() == before[name] + blank
    lengthy.write_text(before[name])
    assert {path.name: path.read_text() for path in store.folder.glob("*.jsonl")} == before
    second = store.add(replace(VOTE, choice="first"), footage)
    assert store.read() == [first, second] and len(read_pairs(store)) == 2


def test_a_first_vote_that_is_not_written_leaves_nothing(store, footage, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.add(replace(VOTE, choice="tie"), footage)
    monkeypatch.undo()
    assert store.read() == [] and store.read_log() == []


def test_a_vote_counts_though_the_video_is_gone(store, footage):
    footage.path.unlink()
    cast = store.add(VOTE, footage)
    assert (cast.why_no_pair, cast.pair) == ("the video is gone", "")
    assert store.read() == [cast] and not (store.folder / "pairs.jsonl").exists()


def test_two_pages_write_one_after_the_other(store, footage):
    """A lock of another process, as a second page holds it while it writes."""
    folder = os.open(store.folder, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    voter = threading.Thread(target=store.add, args=[VOTE, footage])
    voter.start()
    voter.join(0.5)
    assert voter.is_alive() and not (store.folder / "votes.jsonl").exists()
    os.close(folder)
    voter.join(10)
    assert len(store.read()) == 1


def test_votes_of_many_at_once_are_whole(store, footage):
    voters = [threading.Thread(target=store.add, args=[VOTE, footage]) for _ in range(16)]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join()
    assert len(store.read()) == 16 and len(read_pairs(store)) == 16 and len(store.read_log()) == 16
    assert len(list((store.folder / "videos").iterdir())) == 1  # the same bytes


def test_names_of_kept_videos_are_ours(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    names = set()
    for name in ("a.mp4", "b.WEBM", "c.mp4;rm -rf", "d"):
        (tmp_path / name).write_bytes(b"same")
        names.add(keep_video(tmp_path / name, folder))
    stems = {name.split(".")[0] for name in names}
    assert len(stems) == 1 and all(letter in "0123456789abcdef" for letter in stems.pop())
    assert {name.split(".")[1] for name in names} == {"mp4", "webm"}


def test_records_are_plain_json(store, footage):
    store.add(VOTE, footage)
    (line,) = (store.folder / "votes.jsonl").read_text().splitlines()
    assert json.loads(line)["first"]["model"] == "one"
