"""What recipes train on: comparisons from votes, ratings, edits and marks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from salmonn.preference.export import export_rows
from salmonn.preference.feedback import Candidate
from salmonn.preference.feedback_pairs import deal_pairs, describe_comparisons, last_ratings, to_comparisons
from salmonn.preference.feedback_report import summarize_feedback
from salmonn.records import Mark
from tests.preference.feedback_examples import KEPT, LEFT, PAIR, RIGHT, VOTE, rate


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


def test_pairs_are_dealt_evenly_over_raters():
    """Ann votes on everything, first; Bob on clips a and b; somebody without an id on b."""

    def pairs(video, *raters):
        return [replace(PAIR, video=video, rater=rater, chosen=f"{number}") for number, rater in enumerate(raters)]

    everything = [*pairs("a", "ann", "ann", "ann", "bob"), *pairs("b", "ann", "", "ann", "bob"), *pairs("c", "ann")]

    def kept(limit):
        return [(one.video, one.rater, one.chosen) for one in deal_pairs(everything, limit)]

    # On clip a the first of them; then Bob and the unknown have none yet, and the unknown one comes first.
    assert kept(1) == [("a", "ann", "0"), ("b", "", "1"), ("c", "ann", "0")]
    # On clip b Ann and Bob have one each, so the unknown is first, and Ann, of these two the first, is next.
    assert kept(2) == [("a", "ann", "0"), ("a", "bob", "3"), ("b", "ann", "0"), ("b", "", "1"), ("c", "ann", "0")]
    # Ann has two of clip a, and Bob one: on clip b all three have a turn.
    assert kept(3)[:3] == [("a", "ann", "0"), ("a", "ann", "1"), ("a", "bob", "3")]
    assert kept(3)[3:6] == [("b", "ann", "0"), ("b", "", "1"), ("b", "bob", "3")]
    assert deal_pairs(everything, 4) == everything
    other = [replace(PAIR, prompt="What is heard?"), *pairs(PAIR.video, "ann")]
    assert deal_pairs(other, 1) == other  # of each prompt


def test_the_number_of_pairs_left_out_is_told(load_recipe, tmp_path, caplog):
    dpo = load_recipe("dpo")
    caplog.set_level("INFO")
    comparisons = [(replace(PAIR, rater=rater), None) for rater in ("ann", "ann", "bob")]
    config = dpo.OfflineDpoConfig(feedback=tmp_path, model="none", out=tmp_path)
    assert dpo.limit_pairs(comparisons, config) is comparisons and not caplog.text
    limited = dpo.limit_pairs(comparisons, replace(config, max_pairs_per_video=2))
    assert limited == [comparisons[0], comparisons[2]]
    assert "left out 1 of 3 comparisons: at most 2 of a clip, dealt evenly over 2 raters" in caplog.text
    with pytest.raises(ValueError, match="max_pairs_per_video must be at least 1, or none, got 0"):
        replace(config, max_pairs_per_video=0)


def test_votes_get_margins_for_a_subset(load_recipe, store, tmp_path, caplog):
    """All votes are for B: by its model, since each side of a caption has one. Without a subset nothing changes."""
    dpo = load_recipe("dpo")
    caplog.set_level("INFO")
    for number in range(8):
        (tmp_path / "clip.mp4").write_bytes(b"frames %d" % number)
        captions = {"first": LEFT, "second": RIGHT} if number % 2 else {"first": RIGHT, "second": LEFT}
        choice = "second" if number % 2 else "first"
        store.add(replace(VOTE, choice=choice, **captions), tmp_path / "clip.mp4")
    config = dpo.OfflineDpoConfig(feedback=store.folder, model="none", out=tmp_path / "out")
    assert {one.margin for one, _ in dpo.load_feedback(config)} == {None} and "taste" not in caplog.text
    subset = replace(config, subset=replace(config.subset, keep=4))
    assert all(one.margin > 0 for one, _ in dpo.load_feedback(subset))
    assert "Total in 8 of 8 votes), fitted to votes on other videos, predicts 100.0 %" in caplog.text


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
