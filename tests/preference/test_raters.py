"""Raters: votes and agreement by rater, and deleting a rater's votes with `salmonn votes --forget`."""

import json
from dataclasses import asdict, replace

import pytest

from salmonn.caption.loader import MediaInfo
from salmonn.preference.raters import summarize_raters
from salmonn.preference.votes import Vote, VoteMedia, VoteStore
from salmonn.records import Comparison, read_records
from tests.preference.test_votes import LEFT, RIGHT, VOTE


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
        replace(cy, choice="both bad", start_seconds=1.0),
        replace(VOTE, choice="first"),  # without an id
    ]
    summary = summarize_raters(votes)
    assert [(one.rater, one.num_votes, one.num_ties, one.num_both_bad) for one in summary.raters] == [
        ("ann", 3, 0, 0), ("cy", 3, 1, 1), ("bob", 2, 0, 0), ("", 1, 0, 0),
    ]  # fmt: skip
    agreement = {one.rater: (one.agreement.count, one.agreement.total) for one in summary.raters}
    assert agreement == {"ann": (2, 3), "bob": (1, 3), "cy": (1, 2), "": (0, 0)}
    assert (summary.agreement.count, summary.agreement.total) == (2, 4)


def test_votes_without_a_rater_are_read(tmp_path):
    """Files from before raters."""
    old = asdict(VOTE)
    del old["rater"]
    (tmp_path / "votes.jsonl").write_text(json.dumps(old) + "\n")
    assert VoteStore(tmp_path).read() == [VOTE] and VOTE.rater == ""


@pytest.fixture
def store(tmp_path):
    """Two votes of ann, one on a video that bob voted on, too; and a copy, which has no rater."""
    store = VoteStore(tmp_path / "votes")
    for name, rater, edit in (("a", "ann", "A dog yawns."), ("b", "ann", ""), ("b", "bob", "A cat purrs.")):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(name.encode())
        store.add(
            replace(VOTE, rater=rater, edit=edit, video=path.name), VoteMedia(path, MediaInfo(3.0), may_keep=True)
        )
    store.log_copy(video="a.mp4", model="one", text="A dog barks.")
    return store


def contents(store):
    names = ("votes.jsonl", "pairs.jsonl", "log.jsonl")
    return {name: (store.folder / name).read_text() for name in names} | {
        path.name: path.read_bytes() for path in (store.folder / "videos").iterdir()
    }


def test_forget_deletes_all_traces_of_a_rater(store, call):
    votes = store.read()
    assert call("votes", store.folder, "--forget", "ann")[0] == 0
    assert store.read() == votes[2:]
    assert [(pair.rater, pair.ground_truth) for pair in read_records(store.folder / "pairs.jsonl", Comparison)] == [
        ("bob", "A cat purrs.")
    ]
    assert [(entry.action, entry.rater) for entry in store.read_log()] == [
        ("vote", "bob"),
        ("edit", "bob"),
        ("copy", ""),
    ]
    assert [path.name for path in (store.folder / "videos").iterdir()] == [votes[2].pair]
    assert not any(b"ann" in text.encode() for text in contents(store).values() if isinstance(text, str))


def test_a_killed_forget_is_completed(store, monkeypatch):
    """The kill comes before votes.jsonl is replaced."""

    def kill(path, records):
        if path.name == "votes.jsonl":
            raise KeyboardInterrupt
        write(path, records)

    write = store.forget.__globals__["write_records"]
    monkeypatch.setitem(store.forget.__globals__, "write_records", kill)
    with pytest.raises(KeyboardInterrupt):
        store.forget("ann")
    assert [vote.rater for vote in store.read()] == ["ann", "ann", "bob"]
    monkeypatch.undo()
    assert store.forget("ann") == 2
    assert [vote.rater for vote in store.read()] == ["bob"]


@pytest.mark.parametrize("rater", ["cy", ""])
def test_an_unknown_rater_is_not_forgotten(store, call, rater):
    before = contents(store)
    code, _, err = call("votes", store.folder, "--forget", rater)
    assert code == 2 and err.startswith("error: ") and f"no votes of the rater '{rater}'" in err
    assert contents(store) == before


def test_the_summary_of_votes(store, call, tmp_path):
    code, out, _ = call("votes", store.folder)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and "3 votes of 2 raters" in out
    assert [[cell for cell in row if cell != "│"][:4] for row in rows if "ann" in row or "bob" in row] == [
        ["ann", "2", "0", "0"],
        ["bob", "1", "0", "0"],
    ]
    assert "same two captions: 100.0 % of 1 (20.7 to 100.0)" in out  # Wilson: n / (n + 1.96^2) = 1 / 4.8415
    code, _, err = call("votes", tmp_path)
    assert code == 2 and "has no votes.jsonl" in err
    assert isinstance(store.read()[0], Vote)
