"""salmonn: open audio-visual video captioning that improves itself (video-SALMONN 2 and mrDPO)."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salmonn.caption.captioner import Captioner

__version__ = "0.1.0"
__all__ = ["Captioner", "__version__"]

# PEFT imports bitsandbytes if it is installed, which on some CPUs then warns about a package that is not needed here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import `Captioner` on first use: it needs torch, and `salmonn.records`, `score` and `media` do not."""
    if name == "Captioner":
        return importlib.import_module("salmonn.caption.captioner").Captioner
    raise AttributeError(f"module 'salmonn' has no attribute {name!r}")
