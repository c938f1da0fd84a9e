"""Caption requests, and generators that answer them."""

import dataclasses
import subprocess
import sys

import salmonn
from salmonn.caption.captioner import Captioner, RequestOptions
from salmonn.caption.generator import CachedGenerator, CaptionRequest, Generator, Sampling
from salmonn.caption.limits import BatchLimits

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)


def test_requests_need_no_torch():
    """Worker processes and remote clients import these."""
    code = "import sys, salmonn, salmonn.caption.generator, salmonn.caption.loader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert salmonn.Captioner is Captioner


def test_options_are_the_fields_of_a_request():
    fields = {field.name for field in dataclasses.fields(CaptionRequest)}
    assert fields - {"path", "num_samples", "finished_starts"} == set(RequestOptions.__annotations__)


def test_generators_agree(captioner, videos):
    """The captioner reads files; with inputs or encoder features at hand, the captions are the same."""
    requests = [
        CaptionRequest(video, sampling=SAMPLING, seed=number, num_samples=1 + number)
        for number, video in enumerate(videos[:3])
    ]
    inputs = [captioner.processor.read(video) for video in videos[:3]]
    generators: list[Generator] = [
        captioner,
        CachedGenerator(captioner, dict(zip(videos, inputs, strict=False))),
        CachedGenerator(captioner, dict(zip(videos, captioner.encode(inputs), strict=False)), limits=BatchLimits(1)),
    ]
    expected, *others = [generator.generate(requests) for generator in generators]
    assert [[caption.sample for caption in captions] for captions in expected] == [[0], [0, 1], [0, 1, 2]]
    assert all(captions == expected for captions in others)
    assert expected[1][0] == captioner.caption(videos[1], sampling=SAMPLING, seed=1)
    assert {generator.name for generator in generators} == {captioner.name}


def test_mixed_requests_are_answered_in_order(captioner, videos):
    """Requests with different sampling parameters cannot share a batch."""
    requests = [
        CaptionRequest(videos[0], sampling=SAMPLING),
        CaptionRequest(videos[1]),
        CaptionRequest(videos[2], "Tell.", sampling=SAMPLING, seed=2),
    ]
    requests[1] = dataclasses.replace(requests[1], sampling=Sampling(max_new_tokens=5))
    separate = [captioner.generate([request])[0] for request in requests]
    num_done: list[int] = []
    assert captioner.generate(requests, on_progress=num_done.append) == separate and num_done == [1, 1, 1]
    assert captioner.generate([]) == []
