"""Weights of a saved or published model in its safetensors files, read by name and in parts."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_NAMED_KEYS = 8  # weights that an error message lists by name


class WeightFiles:
    """Tensors of a model by the names of our network.

    Args:
        path: model folder, or hub id.
        names: pattern of a published name -> ours; empty for a model that was saved here.
        ignored: patterns of names that the network does not have.
    """

    def __init__(self, path: Path | str, *, names: Mapping[str, str], ignored: tuple[str, ...]) -> None:
        self.path = path
        index = cached_file(str(path), INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is None:
            files = [_find(path, WEIGHTS_NAME)]
        else:
            stored = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            files = [_find(path, name) for name in dict.fromkeys(stored.values())]
        self._places: dict[str, tuple[Path, str]] = {}
        for file in files:
            with safe_open(str(file), framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a mapping
                    name = _rename(key, names)
                    if not any(re.search(pattern, name) for pattern in ignored):
                        self._places[name] = (file, key)

    def require(self, expected: Mapping[str, Tensor], *, allowed: Collection[str] = ()) -> None:
        """Raise a ValueError unless the files hold these tensors, with their shapes, and no others.

        Args:
            expected: tensors by name.
            allowed: names of further tensors, which are not read.
        """
        found = self._places.keys()
        wrong = {
            "missing": expected.keys() - found,
            "unexpected": found - expected.keys() - set(allowed),
            "mismatched": {name for name in expected.keys() & found if self.shape(name) != list(expected[name].shape)},
        }
        if any(wrong.values()):
            details = ", ".join(f"{kind} {sorted(names)[:MAX_NAMED_KEYS] or 'none'}" for kind, names in wrong.items())
            raise ValueError(f"the weights in {self.path} do not match its config.json: {details} (converted names)")

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor without reading it."""
        file, key = self._places[name]
        with safe_open(str(file), framework="pt") as tensors:
            return list(tensors.get_slice(key).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read rows of a tensor; nothing else is read from the disk."""
        file, key = self._places[name]
        with safe_open(str(file), framework="pt") as tensors:
            part = tensors.get_slice(key)
            value: Tensor = part[rows] if part.get_shape() else tensors.get_tensor(key)
        return value


def _find(path: Path | str, name: str) -> Path:
    try:
        found = cached_file(str(path), name)
    except OSError as error:
        raise ValueError(
            f"the weights in {path} are missing: {error}. Only safetensors are supported; tools/convert.py converts "
            "pickled weights (.bin, .pt)"
        ) from error
    return Path(str(found))


def _rename(key: str, names: Mapping[str, str]) -> str:
    """Return our name of a tensor; the first pattern that matches counts."""
    for pattern, ours in names.items():
        renamed, count = re.subn(pattern, ours, key)
        if count:
            return renamed
    return key
