"""Votes: what is saved, the training pairs that a recipe reads, and the summary."""

import errno
import fcntl
import json
import os
import resource
import threading
from dataclasses import replace

import pytest

from salmonn.caption.loader import MediaInfo
from salmonn.preference.votes import (
    Candidate,
    LogEntry,
    Matchup,
    Proportion,
    Vote,
    VoteMedia,
    VoteStore,
    find_unused_reason,
    keep_video,
    summarize_votes,
)  # fmt: skip
from salmonn.records import Comparison, read_records

LEFT = Candidate("one", "A dog barks.", "Describe it.", temperature=0.8, seed=3, total=0.25)
RIGHT = Candidate("two", "A cat sleeps.", "Tell it.", seed=4, total=0.75)
VOTE = Vote("2026-11-22T10:00:00+00:00", "holiday.mp4", LEFT, RIGHT, "second")


@pytest.fixture
def store(tmp_path):
    return VoteStore(tmp_path / "votes")


@pytest.fixture
def media(tmp_path):
    path = tmp_path / "a visitor's [1].MP4"
    path.write_bytes(b"frames")
    return VoteMedia(path, MediaInfo(12.5), may_keep=True)


def read_pairs(store):
    """The training pairs, whose videos exist."""
    pairs = read_records(store.folder / "pairs.jsonl", Comparison)
    assert all((store.folder / pair.video).is_file() for pair in pairs)
    return pairs


def test_a_vote_becomes_a_pair_that_a_recipe_reads(store, media, load_recipe, tmp_path):
    saved = store.add(VOTE, media)
    # The first 24 digits of sha256("frames"), and the suffix in lower case.
    assert saved.pair == "594cfd2607d4f09e1ce62412.mp4"
    assert (saved.ground_truth, saved.unused_reason) == ("chosen", "")
    assert store.read() == [saved]
    (pair,) = read_pairs(store)
    video = f"videos/{saved.pair}"
    assert pair == Comparison(video, "Tell it.", RIGHT.text, LEFT.text, ground_truth=RIGHT.text, source="vote")
    assert (store.folder / "videos" / saved.pair).read_bytes() == b"frames"
    dpo = load_recipe("dpo")
    config = dpo.OfflineDpoConfig(preferences=store.folder / "pairs.jsonl", model="none", out=tmp_path / "out")
    ((comparison, clip),) = dpo.load_comparisons(config)
    assert comparison == pair and (clip.video, clip.modality) == (store.folder / video, "both")


@pytest.mark.parametrize(
    ("changes", "info", "expected"),
    [
        ({}, MediaInfo(9.0), {"modality": "both"}),
        ({}, MediaInfo(9.0, has_audio=False), {"modality": "visual"}),
        ({}, MediaInfo(9.0, has_video=False), {"modality": "audio"}),
        ({"modality": "visual"}, MediaInfo(9.0), {"modality": "visual"}),
        ({"modality": "audio"}, MediaInfo(9.0), {"modality": "audio"}),
        ({"start_seconds": 2.0}, MediaInfo(9.0), {"start_seconds": 2.0, "end_seconds": None}),
        ({"end_seconds": 3.5}, MediaInfo(9.0), {"start_seconds": None, "end_seconds": 3.5}),
    ],
)
def test_modality_and_span_of_a_pair(store, media, changes, info, expected):
    store.add(replace(VOTE, **changes), replace(media, info=info))
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
def test_the_source_of_the_ground_truth(store, media, changes, reference, expected):
    saved = store.add(replace(VOTE, **changes), replace(media, reference=reference))
    (pair,) = read_pairs(store)
    assert (saved.ground_truth, pair.ground_truth) == expected


@pytest.mark.parametrize(
    ("changes", "may_keep", "reason"),
    [
        ({"choice": "tie"}, True, "neither caption was preferred"),
        ({"choice": "both bad"}, True, "neither caption was preferred"),
        ({}, False, "you did not agree to keep the video"),
        ({"first": replace(LEFT, text=" ")}, True, "one of the captions is empty"),
        ({"first": replace(LEFT, finished=False)}, True, "one of the captions was cut off at the token limit"),
        ({"first": replace(LEFT, text="A cat  sleeps.")}, True, "both captions are equal"),
    ],
)
def test_unused_votes(store, media, changes, may_keep, reason):
    media = replace(media, may_keep=may_keep)
    vote = replace(VOTE, **changes)
    assert find_unused_reason(vote, media) == reason
    saved = store.add(vote, media)
    assert (saved.unused_reason, saved.pair, saved.ground_truth) == (reason, "", "")
    assert store.read() == [saved] and not (store.folder / "pairs.jsonl").exists()
    assert not list((store.folder / "videos").iterdir())


def test_tags_of_published_conversations_are_plain_text(store, media):
    saved = store.add(replace(VOTE, edit="As <video> shows."), media)
    (pair,) = read_pairs(store)
    assert saved.unused_reason == "" and pair.ground_truth == "As <video> shows."


def test_the_log(store, media):
    store.log_copy(video="holiday.mp4", model="one", text="A dog barks.")
    store.add(replace(VOTE, edit="A dog yawns."), media)
    store.add(replace(VOTE, choice="tie"), media)
    entries = [(entry.action, entry.video, entry.model, entry.text) for entry in store.read_log()]
    assert entries == [
        ("copy", "holiday.mp4", "one", "A dog barks."),
        ("vote", "holiday.mp4", "two", "second"),
        ("edit", "holiday.mp4", "", "A dog yawns."),
        ("vote", "holiday.mp4", "", "tie"),
    ]


def test_a_partial_line_is_removed(store, media, caplog):
    first = store.add(VOTE, media)
    with (store.folder / "votes.jsonl").open("a") as file:
        file.write('{"date": "2026-11')
    reopened = VoteStore(store.folder)
    assert "votes.jsonl ends with a partial line" in caplog.text
    second = reopened.add(replace(VOTE, choice="first"), media)
    assert reopened.read() == [first, second]


@pytest.mark.parametrize("name", ["votes.jsonl", "pairs.jsonl", "log.jsonl"])
def test_a_vote_is_written_completely_or_not_at_all(store, media, name):
    """The file-size limit is the size of `name` plus half a line; the other files are shorter."""
    first = store.add(VOTE, media)
    before = {path.name: path.read_text() for path in store.folder.glob("*.jsonl")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = store.folder / name
    padding = " " * 10_000 + "\n"
    full.write_text(before[name] + padding)
    resource.setrlimit(resource.RLIMIT_FSIZE, (full.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(OSError):
            store.add(VOTE, media)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.read_text() == before[name] + padding
    full.write_text(before[name])
    assert {path.name: path.read_text() for path in store.folder.glob("*.jsonl")} == before
    second = store.add(replace(VOTE, choice="first"), media)
    assert store.read() == [first, second] and len(read_pairs(store)) == 2


def test_a_first_vote_that_cannot_be_written_leaves_no_records(store, media, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.add(replace(VOTE, choice="tie"), media)
    monkeypatch.undo()
    assert store.read() == [] and store.read_log() == []


def test_a_vote_on_a_deleted_video_counts(store, media):
    media.path.unlink()
    saved = store.add(VOTE, media)
    assert (saved.unused_reason, saved.pair) == ("the video has been deleted", "")
    assert store.read() == [saved] and not (store.folder / "pairs.jsonl").exists()


def test_two_servers_write_one_after_the_other(store, media):
    """Another process has the lock, like a second server that is writing."""
    folder = os.open(store.folder, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    voter = threading.Thread(target=store.add, args=[VOTE, media])
    voter.start()
    voter.join(0.5)
    assert voter.is_alive() and not (store.folder / "votes.jsonl").exists()
    os.close(folder)
    voter.join(10)
    assert len(store.read()) == 1


def test_concurrent_votes_are_complete(store, media):
    voters = [threading.Thread(target=store.add, args=[VOTE, media]) for _ in range(16)]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join()
    assert len(store.read()) == 16 and len(read_pairs(store)) == 16 and len(store.read_log()) == 16
    assert len(list((store.folder / "videos").iterdir())) == 1  # the same bytes


def test_kept_videos_are_renamed(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    names = set()
    for name in ("a.mp4", "b.WEBM", "c.mp4;rm -rf", "d"):
        (tmp_path / name).write_bytes(b"same")
        names.add(keep_video(tmp_path / name, folder))
    stems = {name.split(".")[0] for name in names}
    assert len(stems) == 1 and all(char in "0123456789abcdef" for char in stems.pop())
    assert {name.split(".")[1] for name in names} == {"mp4", "webm"}


def test_records_are_plain_json(store, media):
    store.add(VOTE, media)
    (line,) = (store.folder / "votes.jsonl").read_text().splitlines()
    assert json.loads(line)["first"]["model"] == "one"


ONE_SAMPLED = replace(LEFT, model="one", temperature=0.8)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # z = 1.96: z^2 / n = 0.38415; (0.8 + 0.19207 -+ 1.96 * sqrt(0.16 / 10 + 0.0096036)) / 1.38415.
        (8, 10, 0.4902, 0.9433),
        # From 0 to z^2 / (n + z^2) = 3.84146 / 13.84146.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(count, total, low, high):
    interval = Proportion(count, total).interval
    assert interval.low == pytest.approx(low, abs=5e-5) and interval.high == pytest.approx(high, abs=5e-5)


def test_summary_of_votes():
    """One wins as A and as B, two once; LEFT has the lower Total, 0.25 against 0.75."""
    votes = [
        replace(VOTE, choice="first", pair="a.mp4"),  # one wins, and agrees with the Totals
        replace(VOTE, first=RIGHT, second=LEFT, choice="second", pair="b.mp4"),  # one wins, and agrees
        replace(VOTE, choice="second"),  # two wins, against the Totals
        replace(VOTE, choice="tie"),
        replace(VOTE, choice="both bad"),
        replace(VOTE, choice="first", first=replace(LEFT, total=0.75)),  # one wins, of equal Totals
        replace(
            VOTE, choice="first", first=ONE_SAMPLED, second=replace(ONE_SAMPLED, total=None)
        ),  # two samples of one model
    ]
    log = [LogEntry("", action, "v", "", "") for action in ("vote", "edit", "copy", "copy")]
    summary = summarize_votes(votes, log)
    assert summary.num_votes == 7
    assert summary.matchups == (Matchup("one (temperature 0.8)", "two", wins=3, losses=1, ties=1, both_bad=1),)
    assert (summary.matchups[0].win_rate.count, summary.matchups[0].win_rate.total) == (3, 4)
    # Of five votes for one of the two, A got the first, the sixth and the last.
    assert (summary.first_preferred.count, summary.first_preferred.total) == (3, 5)
    assert (summary.agreement.count, summary.agreement.total, summary.num_equal_totals) == (2, 3, 1)
    assert (summary.num_pairs, summary.num_edits, summary.num_copies) == (2, 1, 2)


def test_no_votes():
    summary = summarize_votes([], [])
    assert summary.matchups == () and summary.agreement.total == 0 and summary.first_preferred.value == 0.0
