"""Benches import one another by their file names, as scripts in one folder do; so do their tests."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).parents[2] / "tools" / "bench"


def load(name: str) -> ModuleType:
    """A bench by its file name."""
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    return importlib.import_module(name)
