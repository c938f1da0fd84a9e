"""The GPU check, on a CPU: it finds scores that are rounded before the softmax, and reports a failed check."""

import pytest
import torch

from salmonn.model import partial_attention
from tests.tools.benches import load


@pytest.fixture(scope="module")
def gpu_check():
    return load("gpu_check")


@pytest.fixture(scope="module")
def small(gpu_check):
    return gpu_check.GpuCheck(load("model").BenchConfig(shape="small", family="salmonn2-plus", repeats=1))


def test_rounded_scores_are_found(gpu_check, small, monkeypatch):
    """Key biases of several hundred make the difference."""
    assert gpu_check.check_agreement(small)["nats a token, largest"] < 1e-5
    product = partial_attention.float32_product
    monkeypatch.setattr(partial_attention, "float32_product", lambda *args: product(*args).to(torch.bfloat16).float())
    monkeypatch.setattr(partial_attention, "attention_kernel", lambda *_: partial_attention.plain_attention)
    monkeypatch.setattr(gpu_check, "MAX_LOGP_DIFFERENCE", 1e-3)
    with pytest.raises(ValueError, match=r"differ by more than 0.001 nats a token"):
        gpu_check.check_agreement(small)


def test_a_failed_check_is_reported_and_the_others_run(gpu_check, small, monkeypatch, tmp_path, capsys):
    def fail(check):
        raise RuntimeError("no kernel image")

    checks = {"broken": fail, "decoding": gpu_check.measure_decoding}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.setattr(gpu_check, "DECODE_STEPS", 4)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--quick", "--out", str(tmp_path / "gpu.json")])
    assert gpu_check.main() == 1
    assert "RuntimeError: no kernel image" in capsys.readouterr().out
    assert '"64 rows"' in (tmp_path / "gpu.json").read_text()
