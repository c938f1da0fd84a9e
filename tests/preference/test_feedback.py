"""People's feedback: what is saved and deleted, what recipes train on, and the report."""

import errno
import fcntl
import json
import math
import os
import resource
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from salmonn.preference.export import export_rows
from salmonn.preference.feedback import (
    Candidate,
    Feedback,
    FeedbackStore,
    find_unused_reason,
    keep_video,
    read_feedback,
)
from salmonn.preference.feedback_pairs import describe_comparisons, last_ratings, to_comparisons
from salmonn.preference.feedback_report import Matchup, Proportion, summarize_feedback, summarize_raters
from salmonn.preference.ratings import fit_ratings
from salmonn.records import Comparison, Mark

LEFT = Candidate("one", "A dog barks.", "Describe it.", temperature=0.8, seed=3, total=0.25)
RIGHT = Candidate("two", "A cat sleeps.", "Describe it.", seed=4, total=0.75)
VOTE = Feedback("2026-11-22T10:00:00+00:00", "vote", "holiday.mp4", LEFT, RIGHT, "second")
KEPT = replace(VOTE, kept_video="v.mp4")
PAIR = Comparison("videos/v.mp4", "Describe it.", RIGHT.text, LEFT.text, source="vote")


@pytest.fixture
def store(tmp_path):
    return FeedbackStore(tmp_path / "votes")


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "a visitor's [1].MP4"
    path.write_bytes(b"frames")
    return path


def test_a_vote_becomes_a_comparison_that_a_recipe_reads(store, video, load_recipe, tmp_path):
    saved = store.add(VOTE, video)
    # The first 24 digits of sha256("frames"), and the suffix in lower case.
    assert saved.kept_video == "594cfd2607d4f09e1ce62412.mp4" and store.read() == [saved]
    path = store.folder / "videos" / saved.kept_video
    assert path.read_bytes() == b"frames"
    dpo = load_recipe("dpo")
    config = dpo.OfflineDpoConfig(feedback=store.folder, model="none", out=tmp_path / "out")
    ((comparison, clip),) = dpo.load_feedback(config)
    assert comparison == replace(PAIR, video=f"videos/{saved.kept_video}")
    assert (clip.video, clip.modality) == (path, "both")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 1 files do not exist"):
        dpo.load_feedback(config)


@pytest.mark.parametrize(
    ("changes", "truth"),
    [
        ({"text": " A dog yawns. ", "reference": "Known."}, "A dog yawns."),
        ({"reference": "Known."}, "Known."),
        ({"reference": "Known.", "start_seconds": 1.0}, ""),  # a reference describes the whole video
        ({}, ""),
    ],
)
def test_the_ground_truth_of_a_vote(changes, truth):
    ((comparison,), unused) = to_comparisons([replace(KEPT, modality="audio", **changes)])
    assert (comparison.ground_truth, comparison.modality, not unused) == (truth, "audio", True)
    assert comparison.start_seconds == changes.get("start_seconds")


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


def rate(action, caption, rater="", **changes):
    """A rating of one caption of the clip v.mp4."""
    return replace(
        KEPT, action=action, first=replace(LEFT, text=caption), second=None, choice=None, rater=rater, **changes
    )


def test_ratings_become_pairs_of_each_clip():
    """Good: a (ann), d (accepted); bad: b (ann and bob against cy), c (ann, who changed her mind). Unclear: e."""
    feedback = [
        rate("good", "a", "ann"), rate("bad", "b", "ann"), rate("bad", "b", "bob"), rate("good", "b", "cy"),
        rate("good", "c", "ann"), rate("bad", "c", "ann"), rate("accept", "d", "bob"),
        rate("bad", "e", "ann"), rate("good", "e", "bob"),
        rate("good", "f", "ann", start_seconds=1.0),  # another clip
        replace(KEPT, kept_video="w.mp4", choice="both bad", rater="ann"),
    ]  # fmt: skip
    comparisons, unused = to_comparisons(feedback)
    assert [(one.chosen, one.rejected, one.rater) for one in comparisons] == [("a", "b", ""), ("d", "c", "")]
    assert {one.source for one in comparisons} == {"rating"}
    assert unused == {
        "people disagree whether the caption is good": 1,
        "no caption of the clip with the opposite rating": 1 + 2,
    }
    alone, unused = to_comparisons(feedback, unpaired=True)
    assert [(one.chosen, one.rejected) for one in alone] == [
        ("a", ""), ("", "b"), ("", "c"), ("d", ""), ("f", ""), ("", LEFT.text), ("", RIGHT.text),
    ]  # fmt: skip
    assert all(one.chosen_finished == bool(one.chosen) and one.rejected_finished == bool(one.rejected) for one in alone)
    assert [one.rater for one in alone] == ["ann", "", "ann", "bob", "ann", "ann", "ann"]


def test_edits_and_what_is_missing():
    """The person's text is the ground truth of all comparisons of the clip."""
    draft = "A dog barks, and a cat sleeps."
    mark = Mark(13, 30)
    assert draft[13:30] == "and a cat sleeps."
    feedback = [
        rate("bad", draft, "ann", marks=(mark,), missing="A bird sings."),
        rate("edit", draft, "bob", text="A dog barks."),
        replace(
            KEPT, action="finish", first=Candidate("", "", "Describe it."), second=None, choice=None, text="A dog."
        ),
        replace(KEPT, action="finish", kept_video="w.mp4", second=None, choice=None, text="Alone."),
    ]
    comparisons, unused = to_comparisons(feedback)
    assert [(one.source, one.chosen, one.rejected) for one in comparisons] == [
        ("edit", "A dog barks.", draft),
        ("missing", "A dog barks. A bird sings.", draft),
    ]
    assert [one.ground_truth for one in comparisons] == ["A dog barks.", "A dog."]
    assert all(one.rejected_marks == (mark,) and one.chosen_marks == () for one in comparisons)
    assert describe_comparisons(comparisons, unused) == (
        "2 comparisons (1 from edit, 1 from missing); not used: no caption of the clip with the opposite rating (1), "
        "a text without a draft, and no other feedback on the clip (1)"
    )


def test_what_counts_as_ground_truth():
    """What a person wrote, before references, also of votes; never a model's draft that was accepted."""
    written = rate("edit", "A dog barks.", text="A dog barks twice.")
    accepted = rate("accept", "A cat sleeps.", text="A cat sleeps.", reference="Known.")
    vote = replace(KEPT, reference="Known.")
    comparisons, _ = to_comparisons([written, accepted, vote])
    assert {one.ground_truth for one in comparisons if one.video == PAIR.video} == {"A dog barks twice."}
    assert to_comparisons([accepted, vote])[0] == [replace(PAIR, ground_truth="Known.")]
    assert summarize_feedback([written, accepted]).num_edits == 1


def test_a_later_rating_replaces_the_one_before():
    """With its marks and what was missing, in training and in the report."""
    other = rate("bad", "A cat.", "ann")
    first = rate("bad", "A dog.", "ann", marks=(Mark(0, 6),), missing="A bird sings.", tab="caption")
    feedback = [first, first, other, replace(first, action="good", marks=(), missing="")]
    ((pair,), _) = to_comparisons(feedback)
    assert (pair.chosen, pair.rejected, pair.chosen_marks) == ("A dog.", "A cat.", ())
    assert [one.missing for one in last_ratings([first, *feedback[::-1]])] == ["", "A bird sings."]
    copies = [rate("copy", "A dog.", tab="caption")] * 5  # of an earlier version, which did not count captions shown
    shown = [rate("shown", "", tab="caption")] * 2
    (model, *_) = summarize_feedback([*feedback, *copies, *shown]).models
    assert (model.rated_good.count, model.rated_good.total) == (1, 1)
    assert (model.copied.count, model.copied.total) == (0, 2)


def test_marks_alone_prefer_no_silence():
    assert to_comparisons([rate("bad", "A dog barks.", marks=(Mark(0, 12),))])[0] == []


def test_feedback_trains_on_what_it_has(load_recipe, store, video, caplog):
    """Ratings are paired or not, as the loss needs; texts that the model cannot learn are left out with a warning."""
    dpo = load_recipe("dpo")
    caplog.set_level("INFO")

    def check(comparison):
        if "<|" in comparison.rejected:
            raise ValueError("the text contains a special token")

    for one in (rate("good", "a"), rate("bad", "b"), rate("bad", "<|im_end|>")):
        store.add(one, video)
    config = dpo.OfflineDpoConfig(feedback=store.folder, model="none", out=store.folder / "out")
    ((pair, _),) = dpo.load_feedback(config, check=check)
    assert (pair.chosen, pair.rejected) == ("a", "b")
    assert "1 comparisons (1 from rating); not used: the text contains a special token (1)" in caplog.text
    unpaired = replace(config, loss=replace(config.loss, kind="bco_pair"))
    assert [(one.chosen, one.rejected) for one, _ in dpo.load_feedback(unpaired, check=check)] == [("a", ""), ("", "b")]
    with pytest.raises(ValueError, match="has them of fewer than two clips"):
        dpo.load_feedback(replace(config, loss=replace(config.loss, kind="kto")), check=check)
    with pytest.raises(ValueError, match=r"nothing to train on: no comparisons; not used: .* \(2\)"):
        dpo.load_feedback(config, check=lambda _: (_ for _ in ()).throw(ValueError("no")))


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
    with path.open("a") as file:
        file.write('{"text": "é", "rater": "bob"')
    assert FeedbackStore(store.folder).read() == [first, second]
    parts = store.folder / "feedback.jsonl.partial"
    assert parts.read_text() == '{"date": "2026-11\n{"rater": "ann\n{"text": "é", "rater": "bob"\n'
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


@pytest.fixture
def votes(store, tmp_path):
    """Two votes of ann, one on a video that bob voted on, too; and a copy, which has no rater."""
    for name, rater, text in (("a", "ann", "A dog yawns."), ("b", "ann", ""), ("b", "bob", "A cat purrs.")):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(name.encode())
        store.add(replace(VOTE, rater=rater, text=text, video=path.name), path)
    store.add(replace(VOTE, action="copy", second=None, choice=None))
    return store


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


def test_the_report_on_the_command_line(votes, call, tmp_path):
    code, out, _ = call("votes", votes.folder)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and "3 votes of 2 raters" in out
    assert [[cell for cell in row if cell != "│"][:4] for row in rows if "ann" in row or "bob" in row] == [
        ["ann", "2", "0", "0"],
        ["bob", "1", "0", "0"],
    ]
    assert "same two captions: 100.0 % of 1 (20.7 to 100.0)" in out  # Wilson: n / (n + 1.96^2) = 1 / 4.8415
    code, _, err = call("votes", tmp_path)
    assert code == 2 and "has no feedback.jsonl" in err


def test_agreement_of_raters():
    """Ann and Bob decided two common pairs and agree on one; Cy shares one with each, and agrees with Ann."""
    ann, bob, cy = (replace(VOTE, rater=name) for name in ("ann", "bob", "cy"))
    swapped = {"first": RIGHT, "second": LEFT}
    votes = [
        replace(ann, choice="first"),
        replace(bob, choice="second", **swapped),  # LEFT again, on the other side
        replace(ann, video="b.mp4", choice="second"),
        replace(ann, video="b.mp4", choice="first"),  # changed her mind: the last vote counts
        replace(bob, video="b.mp4", choice="second"),
        replace(cy, video="b.mp4", choice="first"),
        replace(cy, choice="tie"),
        *[replace(one, second=LEFT, choice="first") for one in (ann, bob)],  # equal captions
        replace(cy, choice="both bad", start_seconds=1.0),
        replace(VOTE, choice="first"),  # without an id
    ]
    summary = summarize_raters(votes)
    assert [(one.rater, one.num_votes, one.num_ties, one.num_both_bad) for one in summary.raters] == [
        ("ann", 4, 0, 0), ("bob", 3, 0, 0), ("cy", 3, 1, 1), ("", 1, 0, 0),
    ]  # fmt: skip
    agreement = {one.rater: (one.agreement.count, one.agreement.total) for one in summary.raters}
    assert agreement == {"ann": (2, 3), "bob": (1, 3), "cy": (1, 2), "": (0, 0)}
    assert (summary.agreement.count, summary.agreement.total) == (2, 4)


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


ONE_SAMPLED = replace(LEFT, model="one", temperature=0.8)


def test_summary():
    """One wins as A and as B, two once; LEFT has the lower Total, 0.25 against 0.75."""
    feedback = [
        replace(VOTE, choice="first", kept_video="a.mp4"),  # one wins, and agrees with the Totals
        replace(VOTE, first=RIGHT, second=LEFT, choice="second", kept_video="b.mp4"),  # one wins, and agrees
        replace(VOTE, choice="second"),  # two wins, against the Totals
        replace(VOTE, choice="tie"),
        replace(VOTE, choice="both bad"),
        replace(VOTE, choice="first", first=replace(LEFT, total=0.75)),  # one wins, of equal Totals
        replace(
            VOTE, choice="first", first=ONE_SAMPLED, second=replace(ONE_SAMPLED, total=None)
        ),  # two samples of one model
        rate("good", "a"), rate("bad", "b"), rate("edit", "a", text="c"), rate("copy", "a"), rate("copy", "b"),
        replace(VOTE, action="shown"), replace(VOTE, action="shown"), replace(VOTE, action="shown", tab="write"),
    ]  # fmt: skip
    summary = summarize_feedback(feedback)
    assert (summary.num_votes, summary.num_compared) == (7, 2)
    assert summary.matchups == (Matchup("one (temperature 0.8)", "two", wins=3, losses=1, ties=1, both_bad=1),)
    assert (summary.matchups[0].win_rate.count, summary.matchups[0].win_rate.total) == (3, 4)
    # Of five votes for one of the two, A got the first, the sixth and the last.
    assert (summary.first_preferred.count, summary.first_preferred.total) == (3, 5)
    assert (summary.agreement.count, summary.agreement.total, summary.num_equal_totals) == (2, 3, 1)
    assert summary.num_comparisons == 2 + 1 + 1  # votes, ratings, the edit
    assert (summary.num_ratings, summary.num_edits, summary.num_copies) == (2, 1, 2)


def test_no_feedback():
    summary = summarize_feedback([])
    assert summary.matchups == () and summary.agreement.total == 0 and summary.first_preferred.value == 0.0


def test_use_of_captions():
    """Of four captions shown, one was copied; of three drafts, one was taken as it is, one edited and one left."""
    draft = "A dog barks, and a cat sleeps."
    written = {"tab": "write", "seconds": 8.0}
    no_draft = Candidate("", "", "Describe it.")
    feedback = [
        *[rate("shown", "", tab="caption")] * 4, rate("copy", "", tab="caption"),
        rate("good", "a", tab="caption"), rate("good", "b", tab="caption"), rate("bad", "c", tab="caption"),
        *[rate("shown", "", tab="write")] * 3,
        replace(rate("accept", draft, **written), text=draft, total=0.5),
        replace(rate("edit", draft, **written), text="A dog barks. A bird sings.", total=0.25, seconds=20.0),
        replace(rate("shown", "", tab="write"), first=no_draft),
        replace(rate("finish", "", **written), first=no_draft, text="A dog."),
        KEPT,
    ]  # fmt: skip
    nothing, model = summarize_feedback(feedback).models
    assert (nothing.name, nothing.num_texts, nothing.seconds) == ("(no draft)", 1, 8.0)
    assert nothing.persistence is None and nothing.total is None and nothing.accepted.total == 0
    counts = [(one.count, one.total) for one in (model.copied, model.rated_good, model.accepted, model.edited)]
    assert counts == [(1, 4), (2, 3), (1, 3), (1, 3)]
    # One of two clauses is left after the edit, and both without one.
    assert (model.persistence, model.seconds, model.total, model.num_texts) == (0.75, 14.0, 0.375, 2)


def test_ratings_by_hand():
    """Two models, one rater each: A wins 3 of 4 on either side, at equal lengths; the ridge pulls the logit to 0."""
    one, two = Candidate("one", "a b", "p"), Candidate("two", "c d", "p")
    wins = ["first", "first", "first", "second"]
    votes = [replace(VOTE, first=one, second=two, choice=choice, rater=str(n)) for n, choice in enumerate(wins)]
    swapped = {"first": "second", "second": "first"}
    votes += [replace(one_, first=two, second=one, choice=swapped[one_.choice], rater="x") for one_ in votes]
    ratings = fit_ratings(votes)
    # theta and -theta: 8 (6 / 8 - sigmoid(2 theta)) = 0.5 theta.
    theta = (ratings.models["one"].value - 1000) * math.log(10) / 400
    assert 8 * (0.75 - 1 / (1 + math.exp(-2 * theta))) == pytest.approx(0.5 * theta, abs=1e-6)
    assert list(ratings.models) == ["one", "two"] and ratings.models["two"].value == pytest.approx(
        2000 - ratings.models["one"].value
    )
    assert ratings.side.value == pytest.approx(0, abs=1e-9) and ratings.length.value == pytest.approx(0, abs=1e-9)
    assert (ratings.num_votes, ratings.num_raters) == (8, 5)
    assert ratings.models["one"].low < ratings.models["one"].value < ratings.models["one"].high
    assert fit_ratings(votes[4:]).side.high == math.inf  # of one rater
    assert fit_ratings([replace(VOTE, first=replace(one, finished=False))]) is None


def test_few_raters_have_wide_intervals():
    """Of those who agree by chance, too. A model that only met itself has no rating; no id is one rater."""
    one, two = Candidate("one", "a b", "p"), Candidate("two", "c d", "p")
    twin = fit_ratings([replace(VOTE, first=one, second=two, choice="first", rater=name) for name in "ab"])
    # Independent votes: 1 / sqrt(0.5 + 2 p (1 - p)) at most, for side; t of one degree of freedom is 12.7062.
    chance = 1 / (1 + math.exp(-twin.side.value - 2 * (twin.models["one"].value - 1000) * math.log(10) / 400))
    fisher = 2 * chance * (1 - chance)  # of side, "one" and minus "two", which are equal
    curvature = np.full((3, 3), fisher) + 0.5 * np.eye(3)
    error = math.sqrt(np.linalg.inv(curvature)[0, 0])
    assert twin.side.high - twin.side.value == pytest.approx(12.7062 * error, rel=1e-4)
    itself = [replace(VOTE, first=one, second=one, choice=choice) for choice in ("first", "first", "second")]
    ratings = fit_ratings(itself)
    assert ratings.models == {} and ratings.side.value > 0
    assert ratings.num_raters == 1 and ratings.side.high == math.inf


def test_effects_of_side_and_length():
    """One model against another of equal captions but for a word: ties are half a win, and words are preferred."""
    short, long = (Candidate(model, text, "p", total=0.5) for model, text in (("one", "a b"), ("two", "c d e")))
    ties = [replace(VOTE, first=short, second=long, choice=choice) for choice in ("tie", "both bad")]
    tied = fit_ratings(ties)
    assert tied.side.value == tied.length.value == 0 and tied.models["one"].value == 1000
    votes = [replace(VOTE, first=short, second=long, choice="first")] * 3
    first = fit_ratings([*votes, *(replace(one, first=long, second=short) for one in votes)])  # always A
    # 6 (1 - sigmoid(side)) = 0.5 side.
    assert 6 / (1 + math.exp(first.side.value)) == pytest.approx(0.5 * first.side.value, abs=1e-6)
    assert first.length.value == pytest.approx(0, abs=1e-9)
    same = [replace(one, second=replace(long, model="one"), choice="second") for one in votes]
    longer = fit_ratings([*same, *(replace(one, first=one.second, second=one.first, choice="first") for one in same)])
    # Of 10 words a tenth: 6 * 0.1 (1 - sigmoid(0.1 length)) = 0.5 length.
    assert 0.6 / (1 + math.exp(0.1 * longer.length.value)) == pytest.approx(0.5 * longer.length.value, abs=1e-6)
    # At equal Total, the votes for the lower one say nothing about length.
    better = [replace(one, first=replace(one.first, total=0.9), second=replace(one.second, total=0.1)) for one in same]
    at_equal = fit_ratings(
        [*better, *(replace(one, first=one.second, second=one.first, choice="first") for one in better)]
    )
    assert at_equal.length.value < longer.length.value / 2


def test_exports(votes, call, tmp_path):
    """Three votes for B, of the sampled model "one" and of "two"; and a rating."""
    votes.add(replace(rate("bad", "A dog."), kept_video="", rater="cy"), tmp_path / "a.mp4")
    out = tmp_path / "out.jsonl"
    rows = {}
    for kind in ("arena", "unpaired", "trl"):
        code, _, err = call("votes", votes.folder, "--export", kind, "--out", out)
        assert code == 0, err
        text = out.read_text()
        rows[kind] = json.loads(text) if kind == "arena" else [json.loads(line) for line in text.splitlines()]
    assert [row["judge"] for row in rows["arena"]] == ["ann", "ann", "bob"]
    assert rows["arena"][0] == {
        "model_a": "one (temperature 0.8)", "model_b": "two", "winner": "model_b", "judge": "ann",
        "turn": 1, "anony": True, "language": "unknown", "tstamp": 1795341600.0,
    }  # fmt: skip
    (rated,) = rows["unpaired"]
    (path,) = rated["videos"]
    assert path == str(votes.folder / "videos" / votes.read()[0].kept_video)
    assert export_rows(votes.folder / "feedback.jsonl", out, kind="unpaired")[0] == 1
    assert json.loads(out.read_text())["videos"] == [path]
    assert (rated["completion"], rated["label"]) == ([{"role": "assistant", "content": "A dog."}], False)
    assert [row["chosen"][0]["content"] for row in rows["trl"]] == [RIGHT.text] * 3
    Path(path).unlink()
    assert export_rows(votes.folder, out, kind="unpaired")[1]["no video"] == 1
    code, _, err = call("votes", votes.folder, "--export", "trl")
    assert code == 2 and "give both, or neither" in err
    code, _, err = call("votes", votes.folder, "--export", "trl", "--out", out, "--forget", "ann")
    assert code == 2 and "--forget deletes and --export writes" in err and len(votes.read()) == 5
