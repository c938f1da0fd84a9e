"""Checkpoints of a training stage: trained weights, optimizer state and step as safetensors.

    checkpoints/step_000100.safetensors    written under a temporary name, flushed, renamed
    checkpoints/step_000100.json           its size and sha256, written last: marks the checkpoint as complete

The last two are kept. No random state is saved, since each step derives its seed from the run's seed and its number.
"""

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from salmonn import dist, system
from salmonn.files import read_json, write_json
from salmonn.model.sharding import copy_rows

log = logging.getLogger(__name__)
MAX_CHECKPOINTS = 2
SPACE_MARGIN = 1.02  # of the size to be written, for file system overhead
GIB = 1 << 30
CHECKPOINTS_DIR = "checkpoints"  # in the folder of a stage


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its file and the number of finished steps."""

    path: Path
    step: int


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file by name, each read on access."""

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
        """Return a tensor's shape without reading the tensor."""
        return list(self._file.get_slice(key).get_shape())


class Checkpoints:
    """Checkpoints of one stage.

    Args:
        folder: folder of the checkpoints; created on the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, tensors: Mapping[str, Tensor], *, step: int) -> None:
        """Write a checkpoint and delete all but the last two.

        Args:
            tensors: tensors by name, on the CPU.
            step: number of finished steps.

        Raises:
            ValueError: the disk is too full; earlier checkpoints are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        require_free_space(self.folder, size, what=f"the checkpoint of step {step}")
        path = self.folder / f"step_{step:06}.safetensors"
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(dict(tensors), str(temporary), metadata={"step": json.dumps(step)})
            system.flush(temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if _is_out_of_space(error):
                raise ValueError(
                    _out_of_space_message(self.folder, size, what=f"the checkpoint of step {step}")
                ) from error
            raise
        system.flush(self.folder)
        write_json(_marker(path), {"step": step, "bytes": path.stat().st_size, "sha256": _sha256(path)})
        for old in sorted(self.folder.glob("step_*.safetensors"))[:-MAX_CHECKPOINTS]:
            _marker(old).unlink(missing_ok=True)
            old.unlink()

    def latest(self) -> Checkpoint | None:
        """Return the last complete checkpoint on every rank; skip damaged ones with a warning."""
        found = None
        for path in sorted(self.folder.glob("step_*.safetensors"), reverse=True) if dist.is_main() else []:
            if reason := _damage(path):
                log.warning("skipping checkpoint %s: %s", path, reason)
            else:
                found = Checkpoint(path, int(path.stem.removeprefix("step_")))
                break
        return dist.gather([found])[0]


@contextmanager
def checkpointed(folder: Path) -> Iterator[Checkpoints]:
    """Yield a stage's checkpoints; delete them when the stage completes without an exception."""
    checkpoints = Checkpoints(folder / CHECKPOINTS_DIR)
    yield checkpoints
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(checkpoints.folder, ignore_errors=True)


def load_trained(network: nn.Module, checkpoint: Checkpoint) -> LazyTensors:
    """Copy a checkpoint's weights into a network, whose trained parameters may be sharded by FSDP2.

    Returns:
        All tensors of the checkpoint.

    Raises:
        ValueError: the checkpoint holds another set of trained weights.
    """
    tensors = LazyTensors(checkpoint.path)
    trained = {f"model.{name}": value for name, value in network.named_parameters() if value.requires_grad}
    shapes = {key: tensors.shape(key) for key in tensors if key.startswith("model.")}
    if shapes != {key: list(value.shape) for key, value in trained.items()}:
        raise ValueError(
            f"{checkpoint.path} was written by a run with other trained weights; delete it or choose another folder"
        )
    for key, value in trained.items():
        copy_rows(value, tensors[key])
    return tensors


def require_free_space(folder: Path, num_bytes: int, *, what: str) -> None:
    """Raise ValueError if the disk of an existing folder has less than `num_bytes` free."""
    if shutil.disk_usage(folder).free < num_bytes * SPACE_MARGIN:
        raise ValueError(_out_of_space_message(folder, num_bytes, what=what))


def _out_of_space_message(folder: Path, num_bytes: int, *, what: str) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"{what} needs {num_bytes / GIB:.2f} GiB, but the disk of {folder} has {free / GIB:.2f} GiB free; free some "
        "space and run the same command to resume"
    )


def _is_out_of_space(error: Exception) -> bool:
    # safetensors reports the operating system's error in its message only.
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        f"os error {code}" in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def _damage(path: Path) -> str | None:
    """Return why a checkpoint cannot be used; None if it is complete."""
    if not _marker(path).is_file():
        return "it is incomplete"
    try:
        marker = read_json(_marker(path))
        size, sha256 = marker["bytes"], marker["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"{_marker(path).name} cannot be read"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size} of {size} bytes"
    return None if _sha256(path) == sha256 else "its checksum does not match"


def _marker(path: Path) -> Path:
    return path.with_suffix(".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
