"""The plugin for lmms-eval: with lmms-eval where it is installed, else with what the model uses of its base class."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import Sampling

IS_INSTALLED = importlib.util.find_spec("lmms_eval") is not None
TASK = """\
task: salmonn_clips
dataset_path: json
dataset_kwargs:
  data_files: {{test: {documents}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.doc_to_visual
doc_to_text: "What moves?"
doc_to_target: caption
generation_kwargs: {{max_new_tokens: 6}}
process_results: !function functions.process_results
metric_list: [{{metric: has_text, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """\
def doc_to_visual(doc):
    return [doc["video"]]

def process_results(doc, results):
    return {"has_text": float(bool(results[0]))}
"""


class StubBase:
    """What `SalmonnModel` uses of lmms_eval.api.model.lmms."""

    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
        self.task_dict = {}


@pytest.fixture
def model_class(monkeypatch):
    """The model's class, on lmms-eval's base class where it is installed."""
    if not IS_INSTALLED:
        module = ModuleType("lmms_eval.api.model")
        module.lmms = StubBase
        for name in ("lmms_eval", "lmms_eval.api"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "lmms_eval.api.model", module)
    monkeypatch.delitem(sys.modules, "salmonn.lmms_eval.model", raising=False)
    yield importlib.import_module("salmonn.lmms_eval.model").SalmonnModel
    sys.modules.pop("salmonn.lmms_eval.model", None)


def requests_for(model, documents, *, options, text="What moves?"):
    """Return requests as lmms-eval makes them, about documents whose media are their values."""
    model.task_dict = {"task": {"test": documents}}
    return [
        SimpleNamespace(args=(text, options, lambda media: media, number, "task", "test"))
        for number in range(len(documents))
    ]


def test_answers_are_those_of_the_captioner(model_class, random_model, videos):
    model = model_class(str(random_model), device="cpu", batch_size="2")
    documents = [[str(video)] for video in videos[:3]]
    options = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "num_beams": 1, "until": ["\n\n"]}
    answers = model.generate_until(requests_for(model, documents, options=options, text="<video>\nWhat moves?"))
    captioner = Captioner.load(random_model)
    sampling = Sampling(max_new_tokens=6)
    expected = [captioner.caption(video, prompt="What moves?", sampling=sampling).text for video in videos[:3]]
    assert answers == expected and all(answers)
    # A stop string ends an answer; a modality and a number of frames are passed on.
    stop = expected[0].strip()[2]
    (cut,) = model.generate_until(requests_for(model, documents[:1], options=options | {"until": stop}))
    assert cut == expected[0].partition(stop)[0].rstrip()
    model = model_class(str(random_model), device="cpu", modality="visual", num_frames=1)
    request = model._to_request(*requests_for(model, documents, options=options)[0].args)
    assert request.modality == "visual" and request.frames.num_frames == 1
    assert request.sampling == Sampling(max_new_tokens=6, top_p=1.0)
    sampled = model._to_request(*requests_for(model, documents, options={"temperature": 0.5, "top_p": 0.9})[0].args)
    assert sampled.sampling.temperature == 0.5 and sampled.sampling.top_p == 0.9


def test_what_is_not_supported_is_refused(model_class, random_model, videos, tmp_path, monkeypatch):
    model = model_class(str(random_model), device="cpu")
    for documents, options, message in (
        ([[object()]], {}, "takes the path of one video or audio file, and the task gives object"),
        ([[str(videos[0]), str(videos[1])]], {}, "gives str, str"),
        ([None], {}, "gives nothing"),
        ([[str(videos[0])]], {"num_beams": 4}, "num_beams 4 is not supported"),
        ([[str(tmp_path / "none.mp4")]], {}, "on_failure=empty"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_until(requests_for(model, documents, options=options))
    tolerant = model_class(str(random_model), device="cpu", on_failure="empty")
    documents = [[str(tmp_path / "none.mp4")], [str(videos[0])]]
    answers = tolerant.generate_until(requests_for(tolerant, documents, options={"max_new_tokens": 3}))
    assert answers[0] == "" and answers[1]
    for function, message in (
        (model.loglikelihood, "no log-likelihoods"),
        (model.generate_until_multi_round, "one question at a time"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            function([])
    for arguments, message in (
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"on_failure": "skip"}, "on_failure must be"),
        ({"fps": 2}, "has no argument fps"),
    ):
        with pytest.raises(ValueError, match=message):
            model_class(str(random_model), **arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        model_class(str(random_model))


@pytest.mark.skipif(not IS_INSTALLED, reason="lmms-eval is not installed (pip install lmms_eval)")
def test_a_task_through_the_command_line(random_model, videos, tmp_path):
    """lmms-eval finds the model by its entry point, runs a task of two clips, and writes a result."""
    documents = tmp_path / "documents.jsonl"
    lines = [{"video": str(video), "caption": "x"} for video in videos[:2]]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "clips.yaml").write_text(TASK.format(documents=documents))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    result = subprocess.run(
        [
            sys.executable, "-m", "lmms_eval", "--model", "salmonn", "--model_args",
            f"pretrained={random_model},device=cpu", "--tasks", "salmonn_clips", "--include_path", str(tmp_path),
            "--log_samples", "--output_path", str(tmp_path / "out"),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    (samples,) = (tmp_path / "out").rglob("*_samples_*.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    captioner, sampling = Captioner.load(random_model), Sampling(max_new_tokens=6)
    assert answers == [
        captioner.caption(video, prompt="What moves?", sampling=sampling).text for video in videos[:2]
    ], result.stderr[-2000:]
