"""Networks from folders and from the hub, and back: our own config.json, or that of a published checkpoint."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig
from transformers.utils import cached_file, is_flash_attn_2_available

from salmonn import dist
from salmonn.model.config import SalmonnConfig, from_published
from salmonn.model.lora import ADAPTER_CONFIG_NAME, load_adapter, merge_adapter
from salmonn.model.network import PUBLISHED_KEYS, Network

logger = logging.getLogger(__name__)
CONFIG_NAME = "config.json"
TOLD_KEYS = 8  # of a checkpoint that does not fit, by name; the rest by number


@dataclass(frozen=True)
class Placement:
    """Where and how a model's weights are kept.

    Args:
        device: that all of it lives on: cpu, cuda, cuda:1, ...; none takes this process's GPU, or the CPU without one.
        device_map: "auto" splits it over all GPUs instead, and over the CPU where they do not suffice; without device.
        dtype: of the weights; auto is bfloat16 on a GPU and float32 on a CPU. Quantised weights compute in it.
        attention: implementation in the towers; auto is flash attention on a GPU where it is installed, else SDPA. The
            language model's rows share what they begin with, by SDPA's kernels (`salmonn.model.attention`).
        bits: 8 or 4 quantises the language model's matrices with bitsandbytes; none leaves them as they are.
    """

    device: str | None = None
    device_map: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    bits: Literal[4, 8] | None = None

    def __post_init__(self) -> None:
        if self.device and self.device_map:
            raise ValueError(
                f"device {self.device} puts all of the model on one device, device_map {self.device_map} splits it: "
                "give one of them"
            )
        try:
            device = torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise ValueError(f"there is no device {self.device}: give cpu, cuda, or cuda:1 and the like") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"torch sees {torch.cuda.device_count()} GPUs here, and no {self.device}: give cpu")

    def require_trainable(self) -> None:
        """Raise ValueError where the weights would lie as training cannot have them."""
        if self.bits:
            raise ValueError("training merges its adapter into the weights, which bits would round: leave bits out")
        if self.device or self.device_map:
            raise ValueError(
                "each process of a training keeps the whole model on a GPU of its own, or on the CPU where torch sees "
                "none: leave device and device_map out (CUDA_VISIBLE_DEVICES hides GPUs)"
            )

    def to_transformers(self) -> dict[str, Any]:
        """The same as arguments of from_pretrained."""
        device = torch.device(self.device) if self.device else dist.device()
        on_gpu = device.type == "cuda"
        dtype = getattr(torch, {"auto": "bfloat16" if on_gpu else "float32"}.get(self.dtype, self.dtype))
        short = dtype != torch.float32  # flash attention takes nothing longer
        if self.attention == "flash_attention_2" and not short:
            raise ValueError("flash attention computes in 16 bits: choose dtype bfloat16 or float16, or attention sdpa")
        best = "flash_attention_2" if on_gpu and short and is_flash_attn_2_available() else "sdpa"
        arguments: dict[str, Any] = dict(
            dtype=dtype,
            attn_implementation={"auto": best}.get(self.attention, self.attention),
            device_map=self.device_map or {"": device},
        )
        if self.bits:
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=self.bits == 8,
                load_in_4bit=self.bits == 4,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                # The towers are small beside the language model, and what they give is what captions rest on.
                llm_int8_skip_modules=["vision", "audio", "lm_head"],
            )
        return arguments


def load_config(path: Path | str) -> SalmonnConfig:
    """Read the config.json of a model folder or of a model on the hub.

    Raises:
        ValueError: it is no model of a known family; the message says what is missing or unknown.
    """
    values = _read(path)
    if not _is_ours(values):
        config = from_published(values)
        # The published code generates with what the checkpoint says of generation, and lets it draw where asked to.
        config.repetition_penalty = _read_optional(path, "generation_config.json").get("repetition_penalty") or 1.0
        return config
    if missing := [part for part in ("lm", "whisper", "qformer") if not values.get(part)]:
        raise ValueError(f"{path}/{CONFIG_NAME} lacks the sizes of {', '.join(missing)}: it is no whole config")
    return SalmonnConfig.from_dict(values)


def load_network(path: Path | str, *, placement: Placement | None = None, adapter: Path | str | None = None) -> Network:
    """Build the network that a folder or a model on the hub describes, and load its weights to where they will live.

    Args:
        path: folder, or id on the hub.
        placement: device, type and the like (default: the GPU where there is one).
        adapter: PEFT folder or id on the hub, put on top and merged; quantised weights keep it beside them.

    Raises:
        ValueError: the model or its weights do not fit; the message names missing and unexpected keys.
    """
    placement = placement or Placement()
    config = load_config(path)
    try:
        network, info = Network.from_pretrained(
            str(path),
            config=config,
            key_mapping=None if _is_ours(_read(path)) else PUBLISHED_KEYS[config.family],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
            use_safetensors=True,
            **placement.to_transformers(),
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the weights in {path} are missing or damaged: {error}. Only safetensors are read: pickled weights (.bin, "
            ".pt) are turned into them by tools/convert.py"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{path} does not fit on the device: give bits 8 or 4, or device_map auto to split it ({error})"
        ) from error
    except ImportError as error:  # what a placement needs beside torch
        raise ValueError(f"this way of loading needs a package that is not installed: {error}") from error
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        told = ", ".join(f"{kind} {_some(keys)}" for kind, keys in wrong.items())
        raise ValueError(
            f"the weights in {path} do not fit its {CONFIG_NAME}: {told} (by the names that they have here)"
        )
    if adapter is not None:
        load_adapter(network, adapter)
        if not placement.bits:
            merge_adapter(network)
    return network.eval()


def _some(keys: list[str]) -> str:
    left = len(keys) - TOLD_KEYS
    return f"{keys[:TOLD_KEYS] or 'none'}" + (f" and {left} more" if left > 0 else "")


def _read(path: Path | str) -> dict[str, Any]:
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        file = _from_hub(path)
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def _read_optional(path: Path | str, name: str) -> dict[str, Any]:
    try:
        file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:  # not that it is not there, but that nobody could be asked
        logger.warning("%s: %s is neither on disk nor to be had, and counts as absent: %s", path, name, error)
        return {}
    values: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return values


def _from_hub(path: Path | str) -> Path:
    name = str(path)
    if Path(path).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(
            f"no model in {path}: there is no {CONFIG_NAME}. Give the folder of a saved model, or an id on the hub "
            "such as tsinghua-ee/video-SALMONN2_plus_7B_full."
        )
    try:
        file = cached_file(name, CONFIG_NAME)
    except OSError as error:
        raise ValueError(f"no model {name}: there is no such folder here, and the hub gave none: {error}") from error
    if file is None and _is_adapter(name):
        raise ValueError(
            f"{name} is an adapter, and no model on its own: give it with --adapter, and with --model the model that "
            "it was trained on (the published ones: tsinghua-ee/video_SALMONN2plus_7B_audioAlign and its like)"
        )
    if file is None:
        raise ValueError(f"no model {name}: the hub has it, but without a {CONFIG_NAME}")
    return Path(file)


def _is_adapter(name: str) -> bool:
    return cached_file(name, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None


def _is_ours(values: dict[str, Any]) -> bool:
    return values.get("model_type") == SalmonnConfig.model_type


def save_network(network: Network, path: Path | str) -> None:
    """Write config.json and safetensors to a folder; the weights must carry no adapter."""
    assert not isinstance(network.lm, PeftModel), "an adapter must be merged before its network is saved"
    network.save_pretrained(str(path), save_original_format=False)
