"""Tools are not a package: tests import them by file."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def load_tool():
    """Import a tool by its file."""

    sys.path.append(str(ROOT / "tools"))  # a tool may import another one beside it

    def load(name: str):
        module = f"tool_{name}"
        if module not in sys.modules:
            spec = importlib.util.spec_from_file_location(module, ROOT / "tools" / f"{name}.py")
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        return sys.modules[module]

    return load
