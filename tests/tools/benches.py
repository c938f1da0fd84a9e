"""Benchmarks import one another by file name, as scripts in one folder do; their tests import them the same way."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).parents[2] / "tools" / "bench"


def load(name: str) -> ModuleType:
    """Import a benchmark by its file name."""
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    return importlib.import_module(name)
