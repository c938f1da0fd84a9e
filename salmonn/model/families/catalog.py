"""Checkpoints that are known to fit a family: where they are, what they are based on, and under which licence.

Sizes are not listed: they follow from the config of the base (`Family.published_configs`).
"""

from dataclasses import dataclass

from salmonn.model.families import PUBLISHED_CONFIGS

SEE_ITS_PAGE = "see its page"  # for licences that were not read on the model's page
_OMNI_3B, _OMNI_7B = "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B"

# Read on the pages of the models, November 2026.
_LICENCES = {
    "AVoCaDO-Captioner/AVoCaDO": "apache-2.0",
    "AudioVisual-Caption/ASID-Captioner-3B": "apache-2.0",
    "Qwen/Qwen3-VL-8B-Instruct": "apache-2.0",
    "openinterx/UGC-VideoCaptioner": "mit",
}
# Captioners that were made from a model in `PUBLISHED_CONFIGS`, with its sizes.
_CAPTIONERS = {
    "NJU-LINK/AVSCap-7B": _OMNI_7B,
    "AudioVisual-Caption/ASID-Captioner-3B": _OMNI_3B,
    "AudioVisual-Caption/ASID-Captioner-7B": _OMNI_7B,
    "openinterx/UGC-VideoCaptioner": _OMNI_3B,
    "NJU-LINK/OmniCaptioner-IF-3B": _OMNI_3B,
    "NJU-LINK/OmniCaptioner-IF-7B": _OMNI_7B,
}


@dataclass(frozen=True)
class KnownModel:
    """A checkpoint on the hub.

    Args:
        name: hub id.
        base: hub id in `PUBLISHED_CONFIGS` whose config it has.
        licence: SPDX identifier, or `SEE_ITS_PAGE`.
    """

    name: str
    base: str
    licence: str


def known_models() -> list[KnownModel]:
    """Return all known checkpoints, by family."""
    bases = {name: name for name in PUBLISHED_CONFIGS} | _CAPTIONERS
    return [KnownModel(name, base, _LICENCES.get(name, SEE_ITS_PAGE)) for name, base in bases.items()]
