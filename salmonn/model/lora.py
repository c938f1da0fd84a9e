"""LoRA on the language model: attach, merge, save. The reference policy is the same weights with the adapter off."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from salmonn.model.network import Network


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapter of the attention's query, key and value projections (arXiv 2506.15220: r 128, alpha 256)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


def attach(network: Network, config: LoraConfig, *, seed: int) -> None:
    """Put a fresh adapter on the language model in place; all other weights are frozen."""
    if isinstance(network.lm, PeftModel):
        raise ValueError("the model carries an adapter already: merge it before attaching another")
    network.requires_grad_(False)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.lm = get_peft_model(network.lm, peft_config)


def merge(network: Network) -> None:
    """Add the adapter to the weights in place and take it off (merged = base + alpha / r * B A)."""
    network.lm = network.lm.merge_and_unload(safe_merge=True)
    network.requires_grad_(False)


@contextmanager
def adapter_off(network: Network) -> Iterator[None]:
    """Within this context the network is the reference policy."""
    with network.lm.disable_adapter():
        yield


def load_adapter(network: Network, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Put a published adapter on the language model.

    Args:
        network: without an adapter.
        tensors: as PEFT saved them, by the published model's names.
        config: of the adapter.

    Raises:
        ValueError: the tensors are of another model; the message names what is missing and unexpected.
    """
    attach(network, config, seed=0)
    # The published 2+ has its decoder where transformers now keeps decoder and tower.
    inner = "model.language_model." if network.config.family == "salmonn2-plus" else "model."
    ours = {
        key.replace("base_model.model.model.", f"base_model.model.{inner}", 1).replace(".default.", "."): tensor
        for key, tensor in tensors.items()
    }
    wanted = get_peft_model_state_dict(network.lm).keys()
    if missing := sorted(wanted ^ ours.keys()):
        raise ValueError(f"the adapter is of another model: missing or unexpected are {missing[:8]}")
    set_peft_model_state_dict(network.lm, ours)


def save_adapter(network: Network, path: Path | str) -> None:
    """Write the adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors)."""
    network.lm.save_pretrained(str(path))
