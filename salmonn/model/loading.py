"""Load networks from folders and from the Hugging Face hub, in our own format or in that of published checkpoints."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from salmonn import dist
from salmonn.model.config import CONFIG_FORMAT, SalmonnConfig
from salmonn.model.families import FAMILIES, PUBLISHED_CONFIGS, from_published, get_family
from salmonn.model.lora import ADAPTER_CONFIG_NAME, load_adapter, merge_adapter
from salmonn.model.network import Network

logger = logging.getLogger(__name__)
CONFIG_NAME = "config.json"
MAX_NAMED_KEYS = 8  # weights that an error message lists by name


@dataclass(frozen=True)
class Placement:
    """Device, type and quantization of a model's weights.

    Args:
        device: device of the whole model: cpu, cuda, cuda:1, mps (Apple), ...; None for this process's CUDA GPU, or the
            CPU without one.
        device_map: "auto" splits the model over all GPUs instead, and over the CPU where these have too little memory.
        dtype: type of the weights; auto is bfloat16 on a CUDA GPU and float32 elsewhere. Quantized weights compute in
            it.
        attention: attention of the towers; auto is flash attention on a GPU where it is installed, else SDPA. The
            language model always uses SDPA's kernels, since its rows share prefixes (`salmonn.model.attention`).
        bits: 8 or 4 to quantize the language model's matrices with bitsandbytes; None for no quantization.
    """

    device: str | None = None
    device_map: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    bits: Literal[4, 8] | None = None

    def __post_init__(self) -> None:
        if self.device and self.device_map:
            raise ValueError(
                f"device {self.device} places the whole model on one device, device_map {self.device_map} splits it; "
                "use only one of them"
            )
        try:
            device = torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise ValueError(f"unknown device {self.device}; use cpu, cuda, cuda:1, mps, ...") from error
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ValueError(f"no device {self.device}: torch finds no GPU of Apple here; use cpu")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"no device {self.device}: torch finds {torch.cuda.device_count()} GPUs; use another one, or cpu"
            )

    def require_trainable(self) -> None:
        """Raise a ValueError if training does not support this placement."""
        if self.bits:
            raise ValueError(
                f"training does not support quantized weights, as it merges adapters into them; remove bits {self.bits}"
            )
        if self.device or self.device_map:
            raise ValueError(
                "device and device_map are not supported in training, where each process has the whole model on a GPU "
                "of its own, or on the CPU without GPUs; remove them (CUDA_VISIBLE_DEVICES selects GPUs)"
            )
        if self.dtype == "float16":
            raise ValueError(
                "training does not support dtype float16, in which small gradients become 0; use dtype bfloat16, or "
                "float32"
            )

    def to_transformers(self) -> dict[str, Any]:
        """Convert to arguments of from_pretrained."""
        device = torch.device(self.device) if self.device else dist.device()
        on_gpu = device.type == "cuda"
        dtype = getattr(torch, {"auto": "bfloat16" if on_gpu else "float32"}.get(self.dtype, self.dtype))
        is_16_bit = dtype != torch.float32
        if self.attention == "flash_attention_2" and not is_16_bit:
            raise ValueError("flash attention needs 16-bit weights; use dtype bfloat16 or float16, or attention sdpa")
        best = "flash_attention_2" if on_gpu and is_16_bit and is_flash_attn_2_available() else "sdpa"
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
                # The towers are small compared with the language model, and every caption depends on their output.
                llm_int8_skip_modules=["vision", "audio", "lm_head"],
            )
        return arguments


def hide_progress() -> None:
    """Show no progress bars of downloads and of loading weights in this process."""
    disable_progress_bars()
    disable_progress_bar()


def load_config(path: Path | str, *, frames: Mapping[str, float] | None = None) -> SalmonnConfig:
    """Read the config.json of a model folder or of a model on the hub.

    Args:
        path: model folder, or hub id.
        frames: arguments of the family's frame sampler to use instead of the model's own.

    Raises:
        ValueError: the model is of no known family or format, parts of its config are missing, or `frames` has an
            unknown option.
    """
    values = _read_config_file(path)
    if not _is_ours(values):
        config = from_published(values)
        # Published generation uses the checkpoint's own defaults, except for sampling.
        config.repetition_penalty = _read_generation_config(path).get("repetition_penalty") or 1.0
        return get_family(config).with_frames(frames)
    if (found := values.get("format")) != CONFIG_FORMAT:
        raise ValueError(
            f"{path}/{CONFIG_NAME} has format {found}, but this version of salmonn reads format {CONFIG_FORMAT}; "
            "use the version that saved it"
        )
    family = get_family(SalmonnConfig.from_dict(values))
    if missing := [part for part in family.config_parts if not values.get(part)]:
        raise ValueError(f"{path}/{CONFIG_NAME} is incomplete: it has no {', '.join(missing)} section")
    return family.with_frames(frames)


def offline_config(model: str, *, frames: Mapping[str, float] | None = None) -> SalmonnConfig:
    """Return the config of a model folder, or of a published model by its hub id, without a network connection.

    Args:
        model: model folder, or hub id of a published model.
        frames: see `load_config`.

    Raises:
        ValueError: the model is neither, or `frames` has an unknown option.
    """
    if model in PUBLISHED_CONFIGS:
        return get_family(from_published(PUBLISHED_CONFIGS[model])).with_frames(frames)
    if not Path(model).is_dir():
        raise ValueError(
            f"unknown model {model}: it is neither a folder nor one of the published models "
            f"({', '.join(PUBLISHED_CONFIGS)})"
        )
    return load_config(model, frames=frames)


def load_network(path: Path | str, *, placement: Placement | None = None, adapter: Path | str | None = None) -> Network:
    """Build a network and load its weights directly to their final devices.

    Args:
        path: model folder, or hub id.
        placement: device, type and quantization (default: the GPU if there is one).
        adapter: PEFT folder or hub id of an adapter to merge; on quantized weights it stays separate.

    Raises:
        ValueError: the weights cannot be read, or do not fit the config; the message names missing and unexpected ones.
    """
    placement = placement or Placement()
    config = load_config(path)
    try:
        network, info = Network.from_pretrained(
            str(path),
            config=config,
            key_mapping=published_names(path) or None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            use_safetensors=True,
            **placement.to_transformers(),
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the weights in {path} are missing or damaged: {error}. Only safetensors are supported; tools/convert.py "
            "converts pickled weights (.bin, .pt)"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{path} does not fit on the device; use bits 8 or 4, or device_map auto to split it ({error})"
        ) from error
    except ImportError as error:  # of a package that the placement needs
        raise ValueError(f"this placement needs a package that is not installed: {error}") from error
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        details = ", ".join(
            f"{kind} {keys[:MAX_NAMED_KEYS] or 'none'}"
            + (f" and {len(keys) - MAX_NAMED_KEYS} more" if len(keys) > MAX_NAMED_KEYS else "")
            for kind, keys in wrong.items()
        )
        raise ValueError(f"the weights in {path} do not match its {CONFIG_NAME}: {details} (converted names)")
    if adapter is not None:
        load_adapter(network, adapter)
        if not placement.bits:
            merge_adapter(network)
    return network.eval()


def published_names(path: Path | str) -> dict[str, str]:
    """Return patterns of the names of a model's weights in its files, with our names; none for a model of this project.

    Raises:
        ValueError: there is no model in the path, or it is of no known family.
    """
    return {} if _is_ours(_read_config_file(path)) else dict(get_family(load_config(path)).weight_names)


def read_model_type(path: Path | str) -> tuple[str | None, bool]:
    """Return the model type in the config.json of a model, and whether it belongs to a family here.

    Raises:
        ValueError: there is no model in the path.
    """
    values = _read_config_file(path)
    is_known = _is_ours(values) or any(family.can_read(values) for family in FAMILIES)
    return values.get("model_type"), is_known


def is_own_layout(path: Path | str) -> bool:
    """Return whether a model has our names of weights, and not those of a published checkpoint."""
    return _is_ours(_read_config_file(path))


def _read_config_file(path: Path | str) -> dict[str, Any]:
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        file = _fetch_config(path)
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def _read_generation_config(path: Path | str) -> dict[str, Any]:
    try:
        file = cached_file(str(path), GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    except OSError as error:  # the hub could not be reached, so the file may exist
        logger.warning("%s: cannot fetch %s, continuing without it: %s", path, GENERATION_CONFIG_NAME, error)
        return {}
    values: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return values


def _fetch_config(path: Path | str) -> Path:
    """Download the config.json of a model on the hub, or find it in the cache."""
    name = str(path)
    if Path(path).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(
            f"no model in {path}: there is no {CONFIG_NAME}. Use the folder of a saved model, or a hub id such as "
            "tsinghua-ee/video-SALMONN2_plus_7B_full"
        )
    try:
        # A download retries for half a minute if there is no connection; this request fails at once.
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
            with suppress(EntryNotFoundError):
                get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME))
        file = cached_file(name, CONFIG_NAME)
    except Exception as error:  # of the HTTP client, which depends on the version of huggingface_hub, or an OSError
        raise ValueError(
            f"no model {name}: there is no such folder, and it cannot be fetched from the hub: {error}"
        ) from error
    if file is None and cached_file(name, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None:
        raise ValueError(
            f"{name} is an adapter, not a model; pass it with --adapter, and the model that it was trained on with "
            "--model (for published adapters tsinghua-ee/video_SALMONN2plus_7B_audioAlign or another size)"
        )
    if file is None:
        raise ValueError(f"no model {name}: it is on the hub, but has no {CONFIG_NAME}")
    return Path(file)


def _is_ours(values: dict[str, Any]) -> bool:
    return values.get("model_type") == SalmonnConfig.model_type


def save_network(network: Network, path: Path | str) -> None:
    """Write config.json and safetensors to a folder; no adapter may be attached."""
    assert not hasattr(network.lm, "peft_config"), "merge the adapter before saving the network"
    network.save_pretrained(str(path), save_original_format=False)
