"""Encoding, sampling, answering and judging in batches: equal on any number of processes, and resumable."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from salmonn import dist
from salmonn.media.container import ClipError
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.records import Caption, Event, Reference
from salmonn.synthetic.judge import RuleJudge
from salmonn.train.data import ClipSet
from salmonn.train.encoding import cache_features
from salmonn.train.evaluate import evaluate, judge_captions
from salmonn.train.feature_cache import FeatureCacheConfig, open_feature_cache
from salmonn.train.left_out import LeftOut
from salmonn.train.sampling import SampleConfig, answer_questions, sample_captions
from salmonn.train.server_sampling import ServerSampler
from salmonn.train.stages import Run, measure
from tests.launch import forked
from tests.limits import RUN_SECONDS

SAMPLING = SampleConfig(temperature=1.0, top_p=0.9, max_new_tokens=12, num_samples=2, batch_size=4)
SEED = 7


def run_all_work(captioner, clips, folder, name="work") -> dict[str, list]:
    """Run all work that is distributed over ranks; features are cached in the folder."""
    # Only a single process may have all features in its memory.
    uncached = cache_features(captioner, clips, name=name)[0].features if dist.world_size() == 1 else {}
    for _ in ("cold", "warm"):
        cache = open_feature_cache(FeatureCacheConfig(folder), captioner)
        (clips,) = cache_features(captioner, clips, name=name, cache=cache)
        assert all(torch.equal(features.tokens, clips.features[clip].tokens) for clip, features in uncached.items())
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
from salmonn.files import read_records
from salmonn.records import Reference
from salmonn.train.data import ClipSet
from tests.train.test_evaluate import run_all_work

out, model, root = map(Path, sys.argv[1:])
dist.setup(threads=1)
clips = ClipSet(read_records(root / "clips.jsonl", Reference), root)
(out / f"{dist.rank()}.json").write_text(json.dumps(run_all_work(Captioner.load(model), clips, out / "tokens")))
"""


def test_two_processes_give_the_same_results(captioner, clips, random_model, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = Path(sys.executable).with_name("torchrun")
    arguments = [tmp_path / "script.py", tmp_path, random_model, clips.root]
    command = forked(launcher, "--standalone", "--nproc_per_node=2", *arguments)
    root = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False, env=root)
    assert result.returncode == 0, result.stderr
    expected = json.loads(json.dumps(run_all_work(captioner, clips, tmp_path / "tokens")))
    assert len(expected["captions"]) == 10 and len(expected["answers"]) > 3
    assert len(list((tmp_path / "tokens").iterdir())) == 5  # one process found the features of two
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_the_cost_of_reading_is_the_duration(captioner, clips, costs):
    cache_features(captioner, clips, name="clips")
    durations = [reference.duration_seconds for reference in clips.references]
    assert costs == pytest.approx([1 + seconds for seconds in durations], abs=0.2)


class EchoJudge:
    """Returns the video and text of each caption instead of a score."""

    def judge(self, tasks):
        return [(task.reference.video, task.caption.text) for task in tasks]


def test_the_cost_of_judging_is_the_number_of_words(costs):
    references = {
        "a": Reference("a", events=(Event("a star moves", "visual"), Event("a bell", "audio"))),
        "b": Reference("b", events=(Event("it rains", "visual"),)),
    }
    captions = [Caption("b", "one"), Caption("a", "one two"), Caption("a", ""), Caption("b", "two")]
    results = judge_captions(captions, references, judge=EchoJudge().judge)
    assert results == [("b", "one"), ("a", "one two"), ("a", ""), ("b", "two")]
    # The events of b have two words, its captions one each; the events of a have five, its captions two and none.
    assert costs == [2 * (2 + 1), 2 + 5 + 0 + 5]


def test_evaluation(captioner, clips, monkeypatch):
    """A model that answers all questions and repeats the reference captions makes no error."""
    (clips,) = cache_features(captioner, clips, name="clips")
    reference_of = {clips.features_of(reference).tokens.data_ptr(): reference for reference in clips.references}

    def generate(requests, *, clips, **_):
        captions = []
        for request, features in zip(requests, clips, strict=True):
            reference = reference_of[features.tokens.data_ptr()]
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
    references = [replace(reference, questions=()) for reference in clips.references[:2]]
    (clips,) = cache_features(captioner, replace(clips, references=references), name="clips")
    sampling = SampleConfig(max_new_tokens=4)
    result = evaluate(captioner, clips, judge=RuleJudge(), sampling=sampling, name="clips")
    assert result.rates.qa_accuracy is None and not result.answers and len(result.results) == 2


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_few_unreadable_clips_are_left_out(captioner, clips, tmp_path, caplog, on_disk):
    root = tmp_path / "clips"
    shutil.copytree(clips.root, root)
    for reference in (clips.references[1], clips.references[3]):
        (root / reference.video).write_bytes(b"no video")
    train, heldout = (ClipSet(part, root) for part in (clips.references[:3], clips.references[3:]))
    cache = open_feature_cache(FeatureCacheConfig(tmp_path / "features" if on_disk else None), captioner)

    def encode(max_failures):
        left_out = LeftOut(tmp_path, max_failures=max_failures)
        return cache_features(captioner, train, heldout, name="clips", cache=cache, left_out=left_out)

    with pytest.raises(ClipError, match="clip_0000"):
        encode(0)
    with pytest.raises(ValueError, match=r"2 of 5 clips .*clip_00001.*clip_00003.*--max-failures \(1\)"):
        encode(1)
    train, heldout = encode(2)
    assert train.references == [clips.references[0], clips.references[2]] and heldout.references == clips.references[4:]
    (expected,) = captioner.encode([captioner.processor.read(root / clips.references[4].video)])
    assert torch.equal(heldout.features_of(clips.references[4]).tokens, expected.tokens)
    assert "2 of 5 clips cannot be read" in caplog.text and "They are left out" in caplog.text
    # A resumed run leaves out the same ones, even if they can be read by now.
    for reference in (clips.references[1], clips.references[3]):
        shutil.copy(clips.root / reference.video, root / reference.video)
    train, heldout = ClipSet(clips.references[:3], root), ClipSet(clips.references[3:], root)
    train, heldout = encode(0)
    assert train.references == [clips.references[0], clips.references[2]] and heldout.references == clips.references[4:]
    assert re.search(r"left out as before: \S+, \S+; delete \S+left_out\.jsonl to read them again", caplog.text)


def test_captions_of_a_server_that_were_sampled_before_a_kill(clips, tmp_path):
    """Held-out captions have one file, which the evaluation writes again with the same content."""
    num_sampled, captions = [], [Caption(one.video, one.caption) for one in clips.references]

    class Server(ServerSampler):
        """Samples reference captions."""

        def __init__(self) -> None: ...

        def connect(self):
            return SimpleNamespace(client=SimpleNamespace(use_model=lambda _: None))

        @contextmanager
        def _serve(self, adapters):
            yield "m"

        def _sample(self, *args, **options):
            num_sampled.append(1)
            return captions

    class Killed(RuleJudge):
        """Does not judge."""

        def judge(self, tasks):
            raise InterruptedError

    kl = SimpleNamespace(num_clips=0)
    config = SimpleNamespace(load_sharded=True, sampling=SAMPLING, seed=1, out=tmp_path, kl=kl)
    folder = tmp_path / "sft" / "heldout"
    with pytest.raises(InterruptedError):
        measure("m", folder.parent, Run(config, clips, clips, Killed(), None, Server()))
    before = (folder / "captions.jsonl").read_bytes()
    run = Run(config, clips, clips, RuleJudge(), None, Server())
    rates = measure("m", folder.parent, run)
    assert rates == measure("m", folder.parent, run) and rates.clips == len(captions)
    assert len(num_sampled) == 1 and (folder / "captions.jsonl").read_bytes() == before
    names = ["answers.jsonl", "captions.jsonl", "rates.json", "scores.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
