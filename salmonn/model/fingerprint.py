"""Hashes of weights and settings, by which a file is recognised as one of this model."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def hash_weights(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, types, shapes and bytes of named weights."""
    sha = hashlib.sha256()
    for name, value in parameters:
        update_hash(sha, name, value)
    return sha.hexdigest()


def hash_model(network: nn.Module) -> str:
    """Hash the weights of a network without adapter and head, rounded to bfloat16 so that any placement gives the same.

    Raises:
        ValueError: the weights are quantized.
    """
    weights = [
        (name, value)
        for name, value in network.named_parameters()
        if ".lora_" not in name and not name.startswith("head.")
    ]
    if any(not value.is_floating_point() for _, value in weights):
        raise ValueError("a reward model needs the exact weights of its base; load it without bits")
    return hash_weights((name, value.to(torch.bfloat16)) for name, value in weights)


def hash_values(*values: Any) -> str:
    """Hash values by their JSON form."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def update_hash(sha: Any, name: str, value: Tensor) -> None:
    """Add a named tensor to a hash: its type, shape and bytes."""
    sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
    sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
