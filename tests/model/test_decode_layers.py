"""Decode steps with fewer kernels equal those of transformers' layers; Qwen3-VL is in its own file."""

import pytest
import torch

from salmonn.caption.processor import PromptRow
from salmonn.model import decode_layers
from salmonn.model.decode_layers import DecodeLayers, LayerSizes, compile_functions, make_decode_layers
from salmonn.model.lora import LoraConfig, attach_lora
from tests.completions import decode_difference

ROWS = [PromptRow(clip, text) for clip in (0, 1) for text in ("Tell.", "Say it.")]


@pytest.mark.parametrize("model", ["captioner", "plus"])
def test_steps_equal_those_of_transformers(request, videos, fill_adapter, model):
    """Also with an adapter."""
    captioner = request.getfixturevalue(model)
    if model == "captioner":
        attach_lora(captioner.network, LoraConfig(rank=4), seed=0)
        fill_adapter(captioner.network.eval())
    inputs = captioner.processor.collate(ROWS, [captioner.processor.read(video) for video in videos[:2]])
    layers = make_decode_layers(captioner.network)
    assert isinstance(layers, DecodeLayers) and decode_difference(captioner.network, inputs, layers) < 1e-5


def test_compiled_functions_equal_plain_ones():
    """Also for another number of rows than the one they were compiled for; tools/bench/decode_ops.py tries inductor."""
    functions = compile_functions("aot_eager")
    sizes = LayerSizes(width=24, inner=40, heads=4, kv_heads=2, head_width=8)
    for num_rows in (2, 5):
        difference = decode_layers.largest_difference(
            functions, torch.device("cpu"), torch.float32, sizes, num_rows=num_rows
        )
        assert difference < 1e-5


@pytest.mark.parametrize("broken", ["wrong", "failing"])
def test_compiled_functions_are_checked(monkeypatch, caplog, broken):
    """Those that fail or are wrong are replaced by plain ones, with a sentence in the log."""

    def function(*arguments):
        if broken == "failing":
            raise RuntimeError("cannot find a C compiler")
        return decode_layers.gate(*arguments) + 0.1

    plain, sizes = decode_layers.Pointwise(), LayerSizes(width=24, inner=40, heads=4, kv_heads=2, head_width=8)
    monkeypatch.setattr(decode_layers, "compile_functions", lambda: plain._replace(gate=function))
    choose = decode_layers.pointwise_functions.__wrapped__
    assert choose(torch.device("cpu"), torch.float32, sizes, can_compile=True) == plain
    assert {"wrong": "are off by", "failing": "cannot find a C compiler"}[broken] in caplog.text
