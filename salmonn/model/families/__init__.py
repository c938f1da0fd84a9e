"""Registry of model families."""

from typing import Any

from salmonn.model.config import SalmonnConfig
from salmonn.model.families.base import Family
from salmonn.model.families.d_orca import DOrca
from salmonn.model.families.qwen2_5_omni import Qwen2_5Omni
from salmonn.model.families.qwen3_omni import Qwen3Omni
from salmonn.model.families.qwen3_vl import Qwen3VL
from salmonn.model.families.salmonn2 import Salmonn2
from salmonn.model.families.salmonn2_plus import Salmonn2Plus

FAMILIES: tuple[type[Family], ...] = (Salmonn2, Salmonn2Plus, Qwen3VL, DOrca, Qwen2_5Omni, Qwen3Omni)
PUBLISHED_CONFIGS = {name: values for family in FAMILIES for name, values in family.published_configs.items()}


def get_family(config: SalmonnConfig) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: the config names an unknown family.
    """
    for family in FAMILIES:
        if family.name == config.family:
            return family(config)
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"config.json has the unknown family {config.family!r}; known families are {known}")


def from_published(values: dict[str, Any]) -> SalmonnConfig:
    """Convert the config.json of a published checkpoint.

    Raises:
        ValueError: it belongs to no known family.
    """
    for family in FAMILIES:
        if family.can_read(values):
            return family.read_config(values)
    model_type = values.get("config", values).get("model_type")
    known = ", ".join(family.title for family in FAMILIES)
    raise ValueError(
        f"model type {model_type!r} is not supported; supported are {known}, and models saved by this project "
        "(salmonn); salmonn caption also takes other models that transformers loads, but they cannot be trained "
        "(docs/published.md)"
    )
