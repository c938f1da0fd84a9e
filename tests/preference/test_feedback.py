"""People's feedback: what is saved, read from earlier versions, kept after a crash, and deleted."""

import errno
import fcntl
import json
import os
import resource
import threading
from dataclasses import replace

import pytest

from salmonn.preference.feedback import FeedbackStore, find_unused_reason, keep_video, read_feedback
from salmonn.preference.feedback_pairs import to_comparisons
from tests.preference.feedback_examples import KEPT, LEFT, PAIR, RIGHT, VOTE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"choice": "tie"}, "neither caption was preferred"),
        ({"first": replace(LEFT, text=" ")}, "one of the captions is empty"),
        ({"first": replace(LEFT, finished=False)}, "one of the captions was cut off at the token limit"),
        ({"first": replace(LEFT, text="A cat  sleeps.")}, "both captions are equal"),
        ({"action": "edit", "second": None, "choice": None, "text": " "}, "the text is empty"),
        ({"action": "bad", "second": None, "choice": None, "first": replace(LEFT, text="")}, "the caption is empty"),
    ],
)
def test_unused_feedback(store, video, changes, reason):
    saved = store.add(replace(VOTE, **changes), video)
    assert find_unused_reason(saved) == reason and saved.kept_video == ""
    assert store.read() == [saved] and not list((store.folder / "videos").iterdir())
    assert to_comparisons([saved]) == ([], {reason: 1})


def test_a_video_is_kept_only_if_allowed(store, video):
    saved = store.add(VOTE)
    assert to_comparisons([saved]) == ([], {"the video was not kept": 1})
    for action in ("shown", "copy"):
        assert store.add(replace(VOTE, action=action, second=None, choice=None), video).kept_video == ""
    assert to_comparisons(store.read()) == ([], {"the video was not kept": 1})  # nothing else is meant for training
    video.unlink()
    assert store.add(VOTE, video).kept_video == "" and len(store.read()) == 4


OLD_VOTE = {
    "date": VOTE.date, "video": "holiday.mp4", "first": vars(LEFT), "second": vars(RIGHT), "choice": "second",
    "modality": "both", "start_seconds": None, "end_seconds": None, "edit": "", "ground_truth": "reference",
    "pair": "v.mp4", "unused_reason": "", "rater": "ann",
}  # fmt: skip


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_folders_of_earlier_versions_are_read(store, video):
    """The reference caption of a vote was in its training pair only; log.jsonl repeats votes and edits."""
    votes = [
        OLD_VOTE,
        OLD_VOTE | {"choice": "tie", "pair": "", "ground_truth": "", "rater": "bob"},
        OLD_VOTE | {"edit": "A dog yawns.", "ground_truth": "edit"},
        {name: value for name, value in OLD_VOTE.items() if name != "rater"} | {"ground_truth": "chosen"},
    ]
    write_lines(store.folder / "votes.jsonl", votes)
    truths = ("A dog sings.", "A dog yawns.", RIGHT.text)
    write_lines(store.folder / "pairs.jsonl", [vars(PAIR) | {"ground_truth": one} for one in truths])
    copied = {"date": "d", "action": "copy", "video": "holiday.mp4", "model": "one", "text": "A dog barks."}
    write_lines(store.folder / "log.jsonl", [copied | {"action": "vote"}, copied | {"rater": ""}])
    new = store.add(replace(VOTE, rater="bob"), video)
    expected = replace(KEPT, rater="ann")
    *read, copy, last = store.read()
    assert read == [
        replace(expected, reference="A dog sings."),
        replace(expected, choice="tie", kept_video="", rater="bob"),
        replace(expected, text="A dog yawns."),
        KEPT,
    ]
    assert (copy.action, copy.first.model, last) == ("copy", "one", new)
    assert store.forget("ann") == 2
    assert [(one.action, one.rater) for one in store.read()] == [
        ("vote", "bob"),
        ("vote", ""),
        ("copy", ""),
        ("vote", "bob"),
    ]
    # A server was killed: the pair of the second vote is lost, and the third vote is cut off.
    cat = OLD_VOTE | {"second": vars(RIGHT) | {"text": "A cat purrs."}}
    write_lines(store.folder / "votes.jsonl", [cat, OLD_VOTE])
    write_lines(store.folder / "pairs.jsonl", [vars(PAIR) | {"ground_truth": "A dog sings."}])
    with (store.folder / "votes.jsonl").open("a") as file:
        file.write('{"date": "2026-11')
    assert [one.reference for one in FeedbackStore(store.folder).read()[:3]] == ["", "A dog sings.", ""]
    write_lines(store.folder / "votes.jsonl", [OLD_VOTE | {"colour": 1}])
    with pytest.raises(ValueError, match=r"votes\.jsonl, line 1: unknown field colour"):
        store.read()


def test_the_text_of_a_vote_differs_from_its_captions(store, video):
    assert store.add(replace(VOTE, text="A dog\nbarks. "), video).text == ""
    assert store.add(replace(VOTE, text="As <video> shows."), video).text == "As <video> shows."


def test_a_partial_line_is_moved_aside(store, video, caplog):
    """Also one that another process leaves while this one runs, and those of old files; the part is kept."""
    first = store.add(replace(VOTE, rater="ann"), video)
    path = store.folder / "feedback.jsonl"
    with path.open("a") as file:
        file.write('{"date": "2026-11')
    second = store.add(replace(VOTE, choice="first"), video)
    assert "feedback.jsonl ended with a part of a line" in caplog.text and store.read() == [first, second]
    with path.open("a") as file:
        file.write('{"rater": "ann')
    assert FeedbackStore(store.folder).read() == [first, second]
    for part in ('{"text": "é", "rater": "bob"', '{"text": "é", "rater": "ann"'):
        with path.open("a") as file:
            file.write(part)
        assert FeedbackStore(store.folder).read() == [first, second]
    parts = store.folder / "feedback.jsonl.partial"
    assert parts.read_text() == (
        '{"date": "2026-11\n{"rater": "ann\n{"text": "é", "rater": "bob"\n{"text": "é", "rater": "ann"\n'
    )
    store.forget("ann")  # with parts that end before the rater's id
    assert store.read() == [second] and parts.read_text() == '{"text": "é", "rater": "bob"\n'


def test_a_whole_record_without_a_line_end_is_kept(store, video):
    first, second = store.add(VOTE, video), store.add(replace(VOTE, choice="first"), video)
    path = store.folder / "feedback.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    third = store.add(replace(VOTE, choice="tie"), video)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert FeedbackStore(store.folder).read() == [first, second, third] and path.read_bytes().endswith(b"}\n")
    assert not (store.folder / "feedback.jsonl.partial").exists()


def test_feedback_is_written_completely_or_not_at_all(store, video):
    """The file-size limit is the size of the file plus half a line."""
    first = store.add(VOTE, video)
    path = store.folder / "feedback.jsonl"
    before = path.read_text()
    other = video.with_name("other.mp4")
    other.write_bytes(b"other frames")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    padding = " " * 10_000 + "\n"
    path.write_text(before + padding)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(OSError):
            store.add(VOTE, other)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == before + padding
    assert [one.name for one in (store.folder / "videos").iterdir()] == [first.kept_video]
    path.write_text(before)
    second = store.add(replace(VOTE, choice="first"), video)
    assert store.read() == [first, second]


def test_first_feedback_that_cannot_be_written_leaves_nothing(store, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.add(VOTE)
    monkeypatch.undo()
    assert store.read() == []


def test_two_servers_write_one_after_the_other(store):
    """Another process has the lock, like a second server that is writing."""
    folder = os.open(store.folder, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    voter = threading.Thread(target=store.add, args=[VOTE])
    voter.start()
    voter.join(0.2)
    assert voter.is_alive() and not (store.folder / "feedback.jsonl").exists()
    os.close(folder)
    voter.join(10)
    assert len(store.read()) == 1


def test_concurrent_feedback_is_complete(store, video):
    voters = [threading.Thread(target=store.add, args=[VOTE, video]) for _ in range(16)]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join()
    assert len(to_comparisons(store.read())[0]) == 16
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


def contents(store):
    return {path.name: path.read_bytes() for path in store.folder.rglob("*.*")}


def test_forget_deletes_all_traces_of_a_rater(votes, call):
    before = votes.read()
    code, _, err = call("votes", votes.folder, "--forget", "ann")
    assert code == 0 and "deleted 2 records of ann" in err
    assert votes.read() == before[2:]
    assert [path.name for path in (votes.folder / "videos").iterdir()] == [before[2].kept_video]
    assert not any(b"ann" in content for content in contents(votes).values())


def test_forget_with_line_separators_and_without_kept_videos(store, video, caplog):
    """U+2028 and U+0085 end no line; a byte order mark and blank lines are skipped, and so is a line being written."""
    store.add(replace(VOTE, rater="ann", text="A dog\u2028barks\u0085loudly."))
    bob = store.add(replace(VOTE, rater="bob", text="A cat\u2028purrs."), video)
    path = store.folder / "feedback.jsonl"
    ann, its = path.read_bytes().split(b"\n")[:2]
    path.write_bytes(b"\xef\xbb\xbf" + ann + b"\n\n" + its + '\n{"text": "\u2028'.encode()[:-1])
    assert read_feedback(store.folder)[1:] == [bob] and "ends with a partial line" in caplog.text
    assert FeedbackStore(store.folder).forget("ann") == 1
    assert store.read() == [bob] and (store.folder / "videos" / bob.kept_video).is_file()


def test_a_killed_forget_is_completed(votes, monkeypatch):
    """The kill comes before feedback.jsonl is replaced."""

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(votes.forget.__globals__, "write_text", kill)
    with pytest.raises(KeyboardInterrupt):
        votes.forget("ann")
    assert [one.rater for one in votes.read()] == ["ann", "ann", "bob", ""]
    monkeypatch.undo()
    assert votes.forget("ann") == 2 and [one.rater for one in votes.read()] == ["bob", ""]


@pytest.mark.parametrize("rater", ["cy", ""])
def test_an_unknown_rater_is_not_forgotten(votes, call, rater):
    before = contents(votes)
    code, _, err = call("votes", votes.folder, "--forget", rater)
    assert code == 2 and err.startswith("error: ") and f"no feedback of the rater '{rater}'" in err
    assert contents(votes) == before
