"""Encoding, sampling, answering and judging in batches: equal on any number of processes, resumed after a kill."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.records import Caption, Event, Reference, read_records
from salmonn.synthetic.judge import RuleJudge
from salmonn.train.evaluate import (
    SampleConfig,
    answer_questions,
    cache_features,
    evaluate,
    judge_captions,
    make_batches,
    sample_captions,
)
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from tests.launch import forked

SAMPLING = SampleConfig(temperature=1.0, top_p=0.9, max_new_tokens=12, num_samples=2, batch_size=4)
SEED = 7


def test_batches_are_of_like_length():
    assert make_batches([3, 9, 9, 1, 5], size=2) == [[1], [2, 4], [0, 3]]
    assert make_batches([3, 9], size=0) == [[1], [0]]  # more samples of one clip than are generated at once
    assert make_batches([], size=4) == []


def work(captioner, clips, folder, name="work") -> dict[str, list]:
    """All that is spread over ranks; the folder takes the clips' tokens."""
    (uncached,) = cache_features(captioner, clips, name=name)
    for _ in ("cold", "warm"):
        cache = open_feature_cache(FeatureCacheConfig(folder), captioner)
        (clips,) = cache_features(captioner, clips, name=name, cache=cache)
        assert all(torch.equal(one.tokens, clips.features[clip].tokens) for clip, one in uncached.features.items())
    captions = sample_captions(captioner, clips, SAMPLING, name=name, seed=SEED)
    answers = answer_questions(captioner, clips, name=name, batch_size=3)
    scores = judge_captions(captions, clips.by_video, judge=RuleJudge().judge)
    assert judge_captions(captions[::-1], clips.by_video, judge=RuleJudge().judge) == scores[::-1]
    return {
        "tokens": [clips.features_of(reference).tokens.tolist() for reference in clips.references],
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
from salmonn.train.data import ClipSet
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

    def balance(given):
        told[:] = given
        return [list(range(len(given)))]

    monkeypatch.setattr(dist, "balance", balance)
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


def test_killed_sampling_resumes_from_its_finished_batches(
    captioner, clips, calls, costs, tmp_path, monkeypatch, caplog
):
    (clips,) = cache_features(captioner, clips, name="clips")
    folder = tmp_path / "round_1"
    partial = folder / "captions.parts"

    def sample(**given) -> list[Caption]:
        return sample_captions(captioner, clips, SAMPLING, name="sampling", **{"seed": SEED} | given)

    unbroken = sample()
    assert calls["answered"] == 3  # 5 clips, 2 captions of each, 4 at once
    calls["fatal"] = 5
    with pytest.raises(Killed):
        sample(folder=folder)
    assert sorted(path.name for path in partial.iterdir()) == ["part_00000.jsonl", "part_00001.jsonl", "parts.json"]
    calls.update(answered=-5, fatal=1000)

    def killed(path, records):
        raise Killed

    with monkeypatch.context() as patch:  # killed before the whole file is written
        patch.setattr("salmonn.train.run_folder.write_records", killed)
        with pytest.raises(Killed):
            sample(folder=folder)
    assert calls["answered"] == 1
    # Finished batches cost nothing; the last one has the two shortest clips, two captions of 12 tokens of each.
    lengths = sorted(len(features) for features in clips.features.values())
    assert costs == [0, 0, sum(lengths[:2]) + 2 * 24]
    paths = [partial / f"part_{number:05d}.jsonl" for number in range(3)]
    assert sorted((one for path in paths for one in read_records(path, Caption)), key=unbroken.index) == unbroken
    assert not caplog.records
    saved = tmp_path / "saved"
    shutil.copytree(partial, saved)
    assert sample(folder=folder) == unbroken and calls["answered"] == 1
    assert [path.name for path in folder.iterdir()] == ["captions.jsonl"]

    (folder / "captions.jsonl").unlink()
    shutil.copytree(saved, partial)  # batches with another seed are sampled again
    other = sample(folder=folder, seed=8)
    assert other != unbroken and calls["answered"] == 4
    assert "sampling again" in caplog.text
    shutil.copytree(saved, partial)  # a kill just after the whole file was written
    assert sample(folder=folder, seed=8) == other and calls["answered"] == 4 and not partial.exists()


def test_batches_have_different_seeds(captioner, clips):
    """The same clip several times: with equal seeds, two batches would have equal captions."""
    (clips,) = cache_features(captioner, clips.head(1), name="clips")
    (features,) = clips.features.values()
    references = [replace(clips.references[0], video=f"{number}.mp4") for number in range(3)]
    copies = replace(clips, references=references, features={clips.source(one): features for one in references})
    captions = sample_captions(captioner, copies, replace(SAMPLING, batch_size=2), name="sampling", seed=SEED)
    texts = [caption.text for caption in captions]
    assert len({tuple(texts[:2]), tuple(texts[2:4]), tuple(texts[4:])}) == 3


def test_reading_costs_what_the_files_last(captioner, clips, costs):
    cache_features(captioner, clips, name="clips")
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
    said = judge_captions(captions, references, judge=Echo().judge)
    assert said == [("b", "one"), ("a", "one two"), ("a", ""), ("b", "two")]
    # The events of b, two words, are read with each of its captions of one; those of a, five words, likewise.
    assert costs == [2 * (2 + 1), 2 + 5 + 0 + 5]


@torch.no_grad()
def test_captions_of_clips(captioner, clips, media):
    (clips,) = cache_features(captioner, clips, name="clips")
    for reference, alone in zip(clips.references, captioner.encode(media), strict=True):
        assert torch.allclose(clips.features_of(reference).tokens, alone.tokens, atol=1e-5)
    config = replace(SAMPLING, max_new_tokens=6)
    captions = sample_captions(captioner, clips, config, name="sampling", seed=1)
    assert [(caption.video, caption.sample) for caption in captions] == [
        (reference.video, sample) for reference in clips.references for sample in (0, 1)
    ]
    assert {caption.prompt for caption in captions} == {PLAIN_PROMPTS["both"]}
    assert {caption.model for caption in captions} == {captioner.name}
    assert not any(
        caption.finished and len(captioner.processor.tokenizer.encode(caption.text)) > 6 for caption in captions
    )


def test_evaluation(captioner, clips, monkeypatch):
    """A model that answers all questions and repeats the reference captions makes no error."""
    (clips,) = cache_features(captioner, clips, name="clips")
    right = {clips.features_of(reference).tokens.data_ptr(): reference for reference in clips.references}

    def generate(requests, *, clips, **_):
        captions = []
        for request, features in zip(requests, clips, strict=True):
            reference = right[features.tokens.data_ptr()]
            answers = {item.question: item.answer for item in reference.questions} | {None: reference.caption}
            prompt = request.prompt or PLAIN_PROMPTS["both"]
            captions.append([Caption(str(request.path), answers[request.prompt], prompt=prompt)])
        return captions

    monkeypatch.setattr(captioner, "generate", generate)
    result = evaluate(captioner, clips, judge=RuleJudge(), sampling=SampleConfig(), name="perfect")
    assert (result.rates.total, result.rates.qa_accuracy, result.rates.clips) == (0.0, 1.0, 5)
    assert len(result.answers) == sum(len(reference.questions) for reference in clips.references)
    assert [score.video for score in result.results] == [reference.video for reference in clips.references]


def test_clips_without_questions_are_evaluated_by_their_captions(captioner, clips):
    bare = [replace(reference, questions=()) for reference in clips.references[:2]]
    (clips,) = cache_features(captioner, replace(clips, references=bare), name="clips")
    sampling = SampleConfig(max_new_tokens=4)
    result = evaluate(captioner, clips, judge=RuleJudge(), sampling=sampling, name="bare")
    assert result.rates.qa_accuracy is None and not result.answers and len(result.results) == 2
