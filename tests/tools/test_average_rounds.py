"""tools/lab/average_rounds.py: averages of the models of rounds against the mean of the models themselves."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from salmonn.files import write_json


@pytest.fixture
def run(tmp_path):
    """A run folder with three rounds whose adapters of rank 1 change one or two projections by twice B A."""
    for number in (1, 2, 3):
        folder = tmp_path / f"round_{number}" / "adapter"
        folder.mkdir(parents=True)
        write_json(folder / "adapter_config.json", {"r": 1, "lora_alpha": 2})
        tensors = {}
        for key in ("q", "v") if number < 3 else ("q",):
            tensors[f"base_model.model.{key}.lora_A.weight"] = torch.tensor([[1.0, float(number)]])
            tensors[f"base_model.model.{key}.lora_B.weight"] = torch.tensor([[0.5], [-number / 10]])
        save_file(tensors, str(folder / "adapter_model.safetensors"))
    return tmp_path


def test_mean_of_models(load_tool, run):
    """The weights of an average are the mean of the models' weights; its control is as far from the start."""
    tool = load_tool("lab/average_rounds")
    config = tool.AverageConfig(run=run, weights=((0.0, 0.0, 1.0, 1.0), (1.0, 2.0, 0.0, 5.0), (0.0, 1.0)))
    updates = tool.list_updates(config)
    assert [name for name in updates if "control" not in name] == ["0 0 1 1", "1 2 0 5", "0 1"]

    lm = nn.ModuleDict({"q": nn.Linear(2, 2, bias=False), "v": nn.Linear(2, 2, bias=False)})
    start = {name: weight.detach().clone() for name, weight in lm.named_parameters()}
    captioner = SimpleNamespace(network=SimpleNamespace(lm=lm))
    models, sums = [start], {name: weight.clone() for name, weight in start.items()}
    for number in (1, 2, 3):
        delta = 2 * torch.outer(torch.tensor([0.5, -number / 10]), torch.tensor([1.0, float(number)]))
        for key in ("q", "v") if number < 3 else ("q",):
            sums[f"{key}.weight"] = sums[f"{key}.weight"] + delta
        models.append(dict(sums))
    for weights in config.weights:
        tool.set_weights(captioner, start, updates[" ".join(f"{weight:g}" for weight in weights)])
        for name, value in lm.named_parameters():
            total = sum(weight * model[name] for weight, model in zip(weights, models, strict=False))
            torch.testing.assert_close(value.detach(), total / sum(weights))

    distances = [tool.norm_of(update) for update in updates.values()]
    assert distances[0::2] == pytest.approx(distances[1::2])
    assert distances[0] != pytest.approx(tool.norm_of(tool.sum_adapters([run / "round_3" / "adapter"], [1.0])))
    # The control is the last model on the line through the start.
    (control,) = [update for name, update in updates.items() if name.endswith("control of 0 0 1 1")]
    last = {name: models[3][name] - start[name] for name in start}
    factor = distances[0] / tool.norm_of(last)
    torch.testing.assert_close(dict(control), {name: factor * last[name] for name in control})


def test_weights_without_a_sum_are_refused(load_tool):
    with pytest.raises(ValueError, match=r"must have a sum above 0, got \[1.0, -1.0\]"):
        load_tool("lab/average_rounds").AverageConfig(weights=((1.0, -1.0),))
