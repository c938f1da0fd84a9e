"""tools/raters.py: votes of simulated raters in the format of the web UI."""

from pathlib import Path

import pytest

from salmonn.files import read_records, write_records
from salmonn.preference.feedback import FeedbackStore
from salmonn.preference.feedback_pairs import to_comparisons
from salmonn.preference.feedback_report import summarize_raters
from salmonn.records import Caption, Reference
from salmonn.synthetic.raters import CaptionTraits, make_voter
from salmonn.synthetic.render import SynthConfig, make_clips


@pytest.fixture
def captions(tmp_path):
    """Three captions of each of two clips: the reference, its first sentence, and the reference again."""
    references = make_clips(tmp_path / "clips", SynthConfig(clips=2, seed=7), workers=1)
    texts = [(one.video, (one.caption, one.caption.split(".")[0] + ".", one.caption + " ")) for one in references]
    path = tmp_path / "captions.jsonl"
    write_records(
        path, [Caption(video, text, "Describe it.", sample=n) for video, all_ in texts for n, text in enumerate(all_)]
    )
    return path


def test_votes_are_like_those_of_people(captions, load_tool, tmp_path, capsys):
    tool = load_tool("raters")
    flags = ["--references", str(tmp_path / "clips/clips.jsonl"), "--raters", "4", "--votes", "30", "--noise", "clean"]
    tool.main([str(captions), *flags, "--groups", "complete", "short", "--out", str(tmp_path / "one")])
    tool.main([str(captions), *flags, "--groups", "complete", "short", "--out", str(tmp_path / "two")])
    one, two = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    message = capsys.readouterr().err
    assert one == two and "120 votes of 4 raters" in message
    assert "is cyclic for 0 of 0 triples of captions (0.00%)" in message  # there are two different captions of a clip
    votes = FeedbackStore(tmp_path / "one").read()
    whole = {one.caption for one in read_records(tmp_path / "clips/clips.jsonl", Reference)}
    for vote in votes:
        assert vote.first.text.split() != vote.second.text.split()
        assert (vote.chosen.text in whole) == vote.rater.startswith("complete")  # the others want it brief
    pairs, _ = to_comparisons(votes)
    assert [(pair.rater, pair.chosen) for pair in pairs] == [(vote.rater, vote.chosen.text) for vote in votes]
    assert all((tmp_path / "one" / pair.video).is_file() for pair in pairs)
    summary = summarize_raters(votes)
    assert [one.num_votes for one in summary.raters] == [30] * 4
    tool.main([str(captions), *flags, "--kind", "long", "noisy", "--out", str(tmp_path / "kinds")])
    raters = {vote.rater for vote in FeedbackStore(tmp_path / "kinds").read()}
    assert raters == {"long-0", "noisy-1", "long-2", "noisy-3"}
    with pytest.raises(SystemExit, match="exists and is not empty"):
        tool.main([str(captions), *flags, "--out", str(tmp_path / "one")])
    write_records(captions, [Caption("other.mp4", "A dog barks.")])
    with pytest.raises(SystemExit, match=r"error: other\.mp4 has no reference"):
        tool.main([str(captions), *flags, "--out", str(tmp_path / "three")])
    assert not Path(tmp_path / "three").exists()


def test_cyclic_triples_by_hand(load_tool):
    """eye: a > b > c, ear: b > c > a, doubter: c > a > b, so that two of three prefer a to b to c to a.

    d is worse than all in all respects, and e is equal to d.
    """
    a, b, c = CaptionTraits(0.9, 0.1, 0.4, 0, 1), CaptionTraits(0.5, 0.9, 0.9, 0, 1), CaptionTraits(0.1, 0.5, 0.1, 0, 1)
    d = CaptionTraits(0, 0, 2, 0, 1)
    count = load_tool("raters").count_cycles
    crowd, metric = make_voter("crowd"), make_voter("metric")
    clips = [{"a": a, "b": b, "c": c}, {"c": c, "b": b, "a": a, "d": d, "e": d}, {"a": a, "b": b}]
    assert count(crowd, clips) == (2, 1 + 10)
    assert count(metric, clips) == (0, 11)
