"""A stage's checkpoints on disk: what is trained, the optimiser's state and the step, as safetensors.

    checkpoints/step_000100.safetensors    written under another name, flushed, renamed
    checkpoints/step_000100.json           its size and sha256, written last: the mark that it is whole

The last two are kept. Nothing random is, since every step seeds its own draws from the run's seed and its number.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from salmonn import dist
from salmonn.records import read_json, write_json

log = logging.getLogger(__name__)
KEPT = 2
ROOM = 1.02  # of what is written, for the file system's own
GIB = 1 << 30


@dataclass(frozen=True)
class Checkpoint:
    """A whole one: its file, and how many steps it had done."""

    path: Path
    step: int


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(str(path), framework="pt")
        self._file.__enter__()
        self._keys = list(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, key: str) -> list[int]:
        """Without reading it."""
        return list(self._file.get_slice(key).get_shape())


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: that they are kept in; it need not be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, tensors: Mapping[str, Tensor], *, step: int) -> None:
        """Write a checkpoint, and let go of all but the last two.

        Args:
            tensors: names -> what is to be kept, on the CPU.
            step: how many steps are done.

        Raises:
            ValueError: the disk has no room for it; those before are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        require_free_space(self.folder, size, what=f"the checkpoint of step {step}")
        path = self.folder / f"step_{step:06}.safetensors"
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(dict(tensors), str(temporary), metadata={"step": json.dumps(step)})
            _flush(temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if _is_full(error):
                raise ValueError(_no_room(self.folder, size, what=f"the checkpoint of step {step}")) from error
            raise
        _flush(self.folder)
        write_json(_mark(path), {"step": step, "bytes": path.stat().st_size, "sha256": _sha256(path)})
        for old in sorted(self.folder.glob("step_*.safetensors"))[:-KEPT]:
            _mark(old).unlink(missing_ok=True)
            old.unlink()

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that is whole; damaged ones are passed over with a warning. All ranks get rank 0's."""
        found = self._newest() if dist.is_main() else None
        return dist.gather([found])[0]

    def _newest(self) -> Checkpoint | None:
        for path in sorted(self.folder.glob("step_*.safetensors"), reverse=True):
            if reason := _damage(path):
                log.warning("%s is passed over: %s", path, reason)
            else:
                return Checkpoint(path, int(path.stem.removeprefix("step_")))
        return None

    def clear(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def checkpointed(folder: Path) -> Iterator[Checkpoints]:
    """A stage's checkpoints, cleared once the stage has come to its end."""
    checkpoints = Checkpoints(folder / "checkpoints")
    yield checkpoints
    dist.barrier()
    if dist.is_main():
        checkpoints.clear()


def load_trained(network: nn.Module, checkpoint: Checkpoint) -> LazyTensors:
    """Read a checkpoint's weights into a network whose trained parameters are whole.

    Returns:
        All of the checkpoint's tensors.

    Raises:
        ValueError: the checkpoint is of another set of trained weights.
    """
    tensors = LazyTensors(checkpoint.path)
    trained = {f"model.{name}": value for name, value in network.named_parameters() if value.requires_grad}
    shapes = {key: tensors.shape(key) for key in tensors if key.startswith("model.")}
    if shapes != {key: list(value.shape) for key, value in trained.items()}:
        raise ValueError(
            f"{checkpoint.path} is the checkpoint of another configuration: delete it or choose another folder"
        )
    with torch.no_grad():
        for key, value in trained.items():
            value.copy_(tensors[key])
    return tensors


def require_free_space(folder: Path, num_bytes: int, *, what: str) -> None:
    """Raise ValueError where the disk of an existing folder has no room for so many bytes."""
    if shutil.disk_usage(folder).free < num_bytes * ROOM:
        raise ValueError(_no_room(folder, num_bytes, what=what))


def _no_room(folder: Path, num_bytes: int, *, what: str) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"{what} needs {num_bytes / GIB:.2f} GiB, and the disk of {folder} has {free / GIB:.2f} GiB left: make room, "
        "and start the same command, which goes on from what is there"
    )


def _is_full(error: Exception) -> bool:
    # safetensors tells the system's error by its text alone.
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        f"os error {code}" in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; none if it is whole."""
    if not _mark(path).is_file():
        return "it was not finished"
    try:
        said = read_json(_mark(path))
        size, sha256 = said["bytes"], said["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"{_mark(path).name} cannot be read"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size} bytes of {size}"
    return None if _sha256(path) == sha256 else "its content is not what was written"


def _mark(path: Path) -> Path:
    return path.with_suffix(".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
