"""Requests to an engine whose model is a `GatedCaptioner`."""

from functools import cache

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.streaming import TextDelta
from tests.limits import wait_until


@cache
def expected_text(model: Captioner, request: CaptionRequest) -> str:
    """Return the answer of a separate run, which is computed once for all tests."""
    ((caption,),) = model.generate([request])
    return caption.text


def stream_text(engine, request):
    return "".join(delta.text for delta in engine.stream(request))


def make_steps(model, count):
    """Let the blocked model make a number of decode steps."""
    model.close_gate_at = model.num_steps + count
    model.gate.set()
    wait_until(lambda: not model.gate.is_set())


class EventRecorder(list):
    """Collects the events of a request."""

    def __call__(self, sample, delta):
        self.append((sample, delta))

    def texts(self):
        return {
            sample: delta.completion.text for sample, delta in self if isinstance(delta, TextDelta) and delta.completion
        }
