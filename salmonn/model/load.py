"""Networks from folders and back: our own config.json, or that of a published checkpoint."""

import json
from pathlib import Path

from salmonn.model.network import PUBLISHED_KEYS, Network
from salmonn.model.settings import SalmonnConfig, from_published

CONFIG_NAME = "config.json"


def load_config(path: Path | str) -> SalmonnConfig:
    """Read a model folder's config.json.

    Raises:
        ValueError: the folder is no model of a known family; the message says what is missing or unknown.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"no model in {path}: there is no {CONFIG_NAME}. Give the folder of a saved model.")
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("model_type") == SalmonnConfig.model_type:
        return SalmonnConfig.from_dict(values)
    return from_published(values)


def load_network(path: Path | str) -> Network:
    """Build the network that a folder describes and load its weights.

    Raises:
        ValueError: the folder or its weights do not fit; the message names missing and unexpected keys.
    """
    config = load_config(path)
    is_ours = config.model_type == json.loads((Path(path) / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type")
    network, info = Network.from_pretrained(
        str(path),
        config=config,
        key_mapping=None if is_ours else PUBLISHED_KEYS[config.family],
        output_loading_info=True,
        local_files_only=True,
    )
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit its config: missing {missing or 'none'}, unexpected {unexpected or 'none'}"
        )
    return network.eval()


def save_network(network: Network, path: Path | str) -> None:
    """Write config.json and model.safetensors to a folder; the weights must carry no adapter."""
    network.save_pretrained(str(path), save_original_format=False)
