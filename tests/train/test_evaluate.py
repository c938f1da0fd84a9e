"""Sampling, answering and judging in batches: the same on any number of processes, and gone on with after a kill."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling
from salmonn.records import Caption, Event, Reference, read_records
from salmonn.synthetic.judge import RuleJudge
from salmonn.train.evaluate import (
    SampleConfig,
    answer_questions,
    clear_parts,
    cut,
    encode_clips,
    judge_captions,
    sample_captions,
)
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from tests.launch import forked

DRAW = SampleConfig(Sampling(temperature=1.0, max_new_tokens=12), seed=7, num_samples=2)


def test_batches_are_of_like_length():
    assert cut([3, 9, 9, 1, 5], size=2) == [[1], [2, 4], [0, 3]]
    assert cut([3, 9], size=0) == [[1], [0]]  # more samples of one clip than are generated at once
    assert cut([], size=4) == []


def work(captioner, clips, folder, name="work") -> dict[str, list]:
    """All that is spread over ranks; the folder takes the clips' tokens."""
    (blocks,) = encode_clips(captioner, clips, name=name)
    for _ in ("cold", "warm"):
        (stored,) = encode_clips(
            captioner, clips, name=name, store=open_feature_cache(FeatureCacheConfig(folder), captioner)
        )
        assert all(torch.equal(one.tokens, two.tokens) for one, two in zip(blocks, stored, strict=True))
    captions = sample_captions(captioner, clips.references, blocks, draw=DRAW, name=name, side_by_side=4)
    by_video = {reference.video: reference for reference in clips.references}
    answers = answer_questions(captioner, clips.references, blocks, name=name, side_by_side=3)
    scores = judge_captions(captions, by_video, judge=RuleJudge())
    assert judge_captions(captions[::-1], by_video, judge=RuleJudge()) == scores[::-1]
    return {
        "tokens": [block.tokens.tolist() for block in blocks],
        "captions": [asdict(caption) for caption in captions],
        "answers": [asdict(answer) for answer in answers],
        "scores": [asdict(score) for score in scores],
    }


SCRIPT = """
import json, sys
from pathlib import Path
from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.records import Reference, read_records
from salmonn.train.references import ClipSet
from tests.train.test_evaluate import work

out, model, root = map(Path, sys.argv[1:])
dist.setup(threads=1)
clips = ClipSet(read_records(root / "clips.jsonl", Reference), root)
(out / f"{dist.rank()}.json").write_text(json.dumps(work(Captioner.load(model), clips, out / "tokens")))
"""


def test_two_processes_make_the_same(captioner, clips, random_model, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = Path(sys.executable).with_name("torchrun")
    arguments = [tmp_path / "script.py", tmp_path, random_model, clips.root]
    line = forked(launcher, "--standalone", "--nproc_per_node=2", *arguments)
    root = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False, env=root)
    assert result.returncode == 0, result.stderr
    alone = json.loads(json.dumps(work(captioner, clips, tmp_path / "tokens")))
    assert len(alone["captions"]) == 10 and len(alone["answers"]) > 3
    assert len(list((tmp_path / "tokens").iterdir())) == 5  # one process found those of two
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


@pytest.fixture
def costs(monkeypatch):
    """What the pieces of work cost that were last spread, in this one process."""
    told = []

    def spread(given):
        told[:] = given
        return [list(range(len(given)))]

    monkeypatch.setattr(dist, "spread", spread)
    return told


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def calls(monkeypatch):
    """Counts the batches that a model answers; from the number `fatal` on, it is killed there."""
    counted = Counter(answered=0, fatal=1000)
    generate = Captioner.generate

    def counting(*args, **given):
        if counted["answered"] == counted["fatal"]:
            raise Killed
        counted["answered"] += 1
        return generate(*args, **given)

    monkeypatch.setattr(Captioner, "generate", counting)
    return counted


def test_a_killed_draw_goes_on_from_its_parts(captioner, clips, calls, costs, tmp_path, caplog):
    (blocks,) = encode_clips(captioner, clips, name="clips")
    parts = tmp_path / "round_1" / "captions.parts"

    def draw(drawn: SampleConfig = DRAW, **given) -> list[Caption]:
        return sample_captions(captioner, clips.references, blocks, draw=drawn, name="draw", side_by_side=4, **given)

    unbroken = draw()
    assert calls["answered"] == 3  # 5 clips, 2 captions of each, 4 at once
    calls["fatal"] = 5
    with pytest.raises(Killed):
        draw(parts=parts)
    assert sorted(path.name for path in parts.iterdir()) == ["part_00000.jsonl", "part_00001.jsonl", "parts.json"]
    calls.update(answered=-5, fatal=1000)
    assert draw(parts=parts) == unbroken and calls["answered"] == 1
    # What is there costs nothing; the last batch is of the two shortest clips, two captions of 12 tokens of each.
    assert costs == [0, 0, sum(sorted(map(len, blocks))[:2]) + 2 * 24]
    assert draw(parts=parts) == unbroken and calls["answered"] == 1  # killed before the whole was written
    assert not caplog.records
    kept = [caption for number in range(3) for caption in read_records(parts / f"part_{number:05d}.jsonl", Caption)]
    assert sorted(kept, key=unbroken.index) == unbroken

    other = draw(replace(DRAW, seed=8), parts=parts)
    assert other != unbroken and calls["answered"] == 4
    assert "made anew" in caplog.text
    clear_parts(parts)
    clear_parts(parts)
    assert not parts.exists() and parts.parent.is_dir()


def test_batches_draw_from_seeds_of_their_own(captioner, clips):
    """The same clip again and again: were two batches' seeds the same, so would be their captions."""
    block = encode_clips(captioner, clips, name="clips")[0][0]
    references = [replace(clips.references[0], video=f"{number}.mp4") for number in range(3)]
    texts = [
        caption.text
        for caption in sample_captions(captioner, references, [block] * 3, draw=DRAW, name="draw", side_by_side=2)
    ]
    assert len({tuple(texts[:2]), tuple(texts[2:4]), tuple(texts[4:])}) == 3


def test_reading_costs_what_the_files_last(captioner, clips, costs):
    encode_clips(captioner, clips, name="clips")
    lasting = sorted((reference.duration_seconds for reference in clips.references), reverse=True)
    assert costs == pytest.approx([1 + seconds for seconds in lasting], abs=0.2)


class Echo:
    """Judges nothing, and says what it was given."""

    def judge(self, tasks):
        return [(task.reference.video, task.caption.text) for task in tasks]


def test_judging_costs_words(costs):
    references = {
        "a": Reference("a", events=(Event("a star moves", "visual"), Event("a bell", "audio"))),
        "b": Reference("b", events=(Event("it rains", "visual"),)),
    }
    captions = [Caption("b", "one"), Caption("a", "one two"), Caption("a", ""), Caption("b", "two")]
    said = judge_captions(captions, references, judge=Echo())
    assert said == [("b", "one"), ("a", "one two"), ("a", ""), ("b", "two")]
    # The events of b, two words, are read with each of its captions of one; those of a, five words, likewise.
    assert costs == [2 * (2 + 1), 2 + 5 + 0 + 5]
