"""Networks from folders and back: our own config.json, or that of a published checkpoint."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from salmonn.model.network import PUBLISHED_KEYS, Network
from salmonn.model.settings import SalmonnConfig, from_published

CONFIG_NAME = "config.json"


def load_config(path: Path | str) -> SalmonnConfig:
    """Read a model folder's config.json.

    Raises:
        ValueError: the folder is no model of a known family; the message says what is missing or unknown.
    """
    values = _read(path)
    if not _is_ours(values):
        return from_published(values)
    if missing := [part for part in ("lm", "whisper", "qformer") if not values.get(part)]:
        raise ValueError(f"{path}/{CONFIG_NAME} lacks the sizes of {', '.join(missing)}: it is no whole config")
    return SalmonnConfig.from_dict(values)


def load_network(path: Path | str) -> Network:
    """Build the network that a folder describes and load its weights.

    Raises:
        ValueError: the folder or its weights do not fit; the message names missing and unexpected keys.
    """
    config = load_config(path)
    try:
        network, info = Network.from_pretrained(
            str(path),
            config=config,
            key_mapping=None if _is_ours(_read(path)) else PUBLISHED_KEYS[config.family],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
            local_files_only=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights in {path} are missing or damaged: {error}") from error
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        told = ", ".join(f"{kind} {keys or 'none'}" for kind, keys in wrong.items())
        raise ValueError(f"the weights in {path} do not fit its {CONFIG_NAME}: {told}")
    return network.eval()


def _read(path: Path | str) -> dict[str, Any]:
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"no model in {path}: there is no {CONFIG_NAME}. Give the folder of a saved model.")
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def _is_ours(values: dict[str, Any]) -> bool:
    return values.get("model_type") == SalmonnConfig.model_type


def save_network(network: Network, path: Path | str) -> None:
    """Write config.json and model.safetensors to a folder; the weights must carry no adapter."""
    network.save_pretrained(str(path), save_original_format=False)
