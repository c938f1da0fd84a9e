"""A stage's state on disk: what is trained, the optimiser's moments and the step, as safetensors.

Nothing random is kept, since every step seeds its own draws from the run's seed and the step's number.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the trainable weights and Adam's moments; the file appears whole or not at all."""
    tensors = {}
    for name, parameter in _trainable(model):
        tensors[f"model.{name}"] = parameter.detach().contiguous()
        # A parameter that no batch has touched yet (the audio tower in a stage of picture alone) has no moments.
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = value.contiguous()
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, str(temporary), metadata={"step": json.dumps(step)})
    temporary.replace(path)


def load_checkpoint(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint into model and optimiser.

    Returns:
        The number of steps that it had done.

    Raises:
        ValueError: the checkpoint is of another set of trainable weights.
    """
    trainable = dict(_trainable(model))
    with safe_open(str(path), framework="pt") as file:
        keys = set(file.keys())
        shapes = {key: file.get_slice(key).get_shape() for key in keys if key.startswith("model.")}
        if shapes != {f"model.{name}": list(parameter.shape) for name, parameter in trainable.items()}:
            raise ValueError(f"{path} is the checkpoint of another configuration: delete it or choose another folder")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(file.get_tensor(f"model.{name}"))
                moments = [moment for moment in MOMENTS if f"{moment}.{name}" in keys]
                # Adam keeps its count of steps on the CPU, its moments beside the weights.
                optimizer.state[parameter] = {
                    moment: file.get_tensor(f"{moment}.{name}").to("cpu" if moment == "step" else parameter.device)
                    for moment in moments
                }
        return int(json.loads(file.metadata()["step"]))


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
