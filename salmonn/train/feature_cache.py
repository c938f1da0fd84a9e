"""Clips' tokens on disk: the frozen towers run once on a clip, and runs that come after read what they gave.

    run/features/KEY.safetensors    one clip's block, written under another name, then renamed

The key follows from all that the tokens do: the clip's files and span, how the model samples and lays out frames and
sound, its towers' weights, and what they were computed on. Blocks are mapped to memory: a page is read when it is used.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.model.layout import ClipFeatures, Layout
from salmonn.model.network import Network
from salmonn.train.data import Example

log = logging.getLogger(__name__)
GIB = 1 << 30
SUFFIX = ".safetensors"
HEADER_BYTES = 4096  # of a file beside its tensors and the times that are told, at most
TOLD_BYTES = 12  # of an id of those
LOOK_EVERY = 0.01  # of the cap: what the processes write together before they look again how large the folder is
STALE_SECONDS = 3600.0  # a half-written file that is older has nobody who writes it
# What the tokens depend on besides the code of these.
PACKAGES = ("salmonn", "torch", "transformers", "av")
CONFIG_KEYS = (
    "family",
    "vision",
    "whisper",
    "qformer",
    "num_queries",
    "window_seconds",
    "stride_seconds",
    "tail_tolerance_seconds",
    "pool",
    "timestamp_tokens",
)


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Where clips' tokens are kept, which the frozen towers give once for all runs.

    Args:
        folder: for the files, one a clip; all machines of a run must see it, and runs may share it; none keeps all
            tokens in the memory of each process.
        max_gib: size up to which it may grow. Files that were used least recently make room; what this run uses and
            does not fit stays in memory.
    """

    folder: Path | None = Path("run/features")
    max_gib: float = 20.0

    def __post_init__(self) -> None:
        if self.max_gib <= 0:
            raise ValueError(f"max_gib must be more than 0, got {self.max_gib}: folder null keeps tokens in memory")


class FeatureCache:
    """The blocks of clips in a folder, as one model gives them.

    Args:
        folder: of the files.
        max_bytes: size up to which it may grow, to within a hundredth where several processes write.
        model: what is the same for all clips, as `hash_encoders` gives it.
    """

    def __init__(self, folder: Path, *, max_bytes: float, model: str) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.model = model
        self._used: set[str] = set()
        self._room = 0.0  # what this process may write before it looks again how large the folder is

    def keys(self, examples: Sequence[Example]) -> list[str]:
        """The examples' clips as they are named in the folder, on every rank."""
        return dist.gather([self._key(example) for example in dist.shard(examples)])

    def _key(self, example: Example) -> str:
        files = [_identity(file) for file in (example.video, example.sound) if file]
        span = [example.start_seconds, example.end_seconds]
        return hash_values(self.model, files, bool(example.sound), example.modality, span, example.needs_both)

    def find_complete(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys whose blocks are there and whole; ranks share the reading.

        All of them count as used from now on: no file of theirs makes room for another.
        """
        self._used.update(keys)
        # Rank 0 alone looks what is there: others' disks would remember what was not.
        listed = {path.stem for path in self._files()} if dist.is_main() else set()
        there = sorted(dist.gather([listed & set(keys)])[0])
        whole = dist.gather([self._is_whole(key) for key in dist.shard(there)])
        return {key for key, is_whole in zip(there, whole, strict=True) if is_whole}

    def _is_whole(self, key: str) -> bool:
        path = self._path(key)
        try:
            block, said = _read(path)
            if hash_features(block) == said:
                with suppress(PermissionError):  # another user's, who shares the folder
                    os.utime(path)
                return True
            reason = "its content is not what was written"
        except (FileNotFoundError, PermissionError):  # another run has just made room, or keeps its own to itself
            return False
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = str(error)
        log.warning("%s is damaged, and the clip is encoded anew: %s", path, reason)
        return False

    def save(self, key: str, block: ClipFeatures) -> bool:
        """Write a block; False where there is no room for it."""
        layout = block.layout
        tensors = {
            "tokens": block.tokens.contiguous(),
            "order": layout.order.contiguous(),
            "positions": layout.positions.contiguous(),
        }
        size = sum(tensor.nbytes for tensor in tensors.values())
        if not self._make_room(size + HEADER_BYTES + TOLD_BYTES * len(layout.timestamp_ids)):
            return False
        said = {
            "digest": hash_features(block),
            "num_visual": str(layout.num_visual),
            "timestamp_ids": json.dumps(layout.timestamp_ids),
        }
        temporary = self.folder / f".{key}.{uuid.uuid4().hex}.tmp"
        try:
            save_file(tensors, str(temporary), metadata=said)
            temporary.replace(self._path(key))
        except (OSError, SafetensorError) as error:  # a quota, or others have filled the disk
            log.warning("%s takes no more: %s", self.folder, error)
            temporary.unlink(missing_ok=True)
            return False
        return True

    def load_missing(
        self, keys: Sequence[str], blocks: Sequence[ClipFeatures | None], *, name: str
    ) -> list[ClipFeatures]:
        """Blocks, of which those that are in the folder are still to be opened (None); tells of those that are not."""
        left = [block for block in blocks if block is not None]
        if left and dist.is_main():
            size = sum(block.tokens.nbytes for block in left) / GIB
            log.warning(
                "the tokens of %d of %d %s (%.2f GiB) do not fit in %s, and stay in the memory of each process: raise "
                "feature_cache.max_gib (%.2f), or make room on that disk",
                len(left),
                len(blocks),
                name,
                size,
                self.folder,
                self.max_bytes / GIB,
            )
        return [self.load(key) if block is None else block for key, block in zip(keys, blocks, strict=True)]

    def load(self, key: str) -> ClipFeatures:
        """A block that is there, its tensors mapped to memory.

        Raises:
            ValueError: this process does not see its file.
        """
        try:
            return _read(self._path(key))[0]
        except FileNotFoundError as error:
            raise ValueError(
                f"process {dist.rank()} does not see {self._path(key).resolve()}, which this run's processes have "
                "written or read: all machines of a run must share that folder, and runs that share it need a "
                "feature_cache.max_gib that is enough for all of them (feature_cache.folder null keeps them in memory)"
            ) from error

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes may be written; files that this run does not use go, the least recently used first."""
        if size <= self._room:
            self._room -= size
            return True
        files = self._files()
        total = sum(stat.st_size for stat in files.values())
        limit = min(self.max_bytes, total + shutil.disk_usage(self.folder).free)
        needed = size * dist.world_size()  # as if each process wrote as much at this moment
        idle = sorted((path for path in files if path.stem not in self._used), key=lambda path: files[path].st_mtime_ns)
        if total - sum(files[path].st_size for path in idle) + needed > limit:
            return False
        for path in idle:
            if total + needed <= limit:
                break
            with suppress(PermissionError):
                path.unlink(missing_ok=True)
                total -= files[path].st_size
        if total + needed > limit:
            return False
        self._room = max(0.0, min(limit - total, limit * LOOK_EVERY) / dist.world_size() - size)
        return True

    def _files(self) -> dict[Path, os.stat_result]:
        files = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process has just made room
                    if entry.name.endswith(SUFFIX):
                        files[Path(entry.path)] = entry.stat()
        return files

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def open_feature_cache(config: FeatureCacheConfig, captioner: Captioner) -> FeatureCache | None:
    """The store of a run, on all ranks; none where tokens are kept in memory.

    Args:
        config: where it is, and how large.
        captioner: whose towers give the tokens.

    Raises:
        ValueError: a machine of this run does not see its folder.
    """
    if config.folder is None:
        return None
    if dist.is_main():
        config.folder.mkdir(parents=True, exist_ok=True)
        clear_stale(config.folder)
    model = dist.gather([hash_encoders(captioner) if dist.is_main() else ""])[0]
    if not config.folder.is_dir():
        raise ValueError(
            f"process {dist.rank()} does not see {config.folder.resolve()}, which process 0 has made: all machines of "
            "a run must share the folder of tokens (or feature_cache.folder null, for tokens in memory)"
        )
    return FeatureCache(config.folder, max_bytes=config.max_gib * GIB, model=model)


def clear_stale(folder: Path) -> None:
    """Remove what killed processes left half written; runs that share the folder may be writing now."""
    for path in folder.glob(".*.tmp"):
        if path.stat().st_mtime < time.time() - STALE_SECONDS:
            path.unlink(missing_ok=True)


def hash_encoders(captioner: Captioner) -> str:
    """A hash of all that a clip's tokens depend on but the clip: weights, sizes, frame rule, words, machine."""
    network, processor = captioner.network, captioner.processor
    embeddings = network.lm.get_input_embeddings().weight
    towers = [(name, value) for name, value in network.named_parameters() if name.startswith(("vision.", "audio."))]
    config = processor.config.to_dict()
    return hash_values(
        hash_weights([*towers, ("embeddings", embeddings)]),  # the embeddings tell the time
        {key: config.get(key) for key in CONFIG_KEYS},
        config["lm"].get("vision_config"),
        str(processor.family.frame_sampler),
        processor.published_positions,
        hash_tokenizer(processor),
        numerics_key(network),
        [importlib.metadata.version(package) for package in PACKAGES],
    )


def hash_tokenizer(processor: Processor) -> str:
    """A hash of what text becomes: the tokenizer, and what stands around a prompt."""
    config = processor.config
    return hash_values(processor.tokenizer.backend_tokenizer.to_str(), config.system_prompt, config.placeholder_ids)


def numerics_key(network: Network) -> list[Any]:
    """What sums are rounded by: device, threads, attention and type."""
    on_gpu = network.device.type == "cuda"
    where = torch.cuda.get_device_name(network.device) if on_gpu else f"{torch.get_num_threads()} threads"
    return [network.device.type, where, network.config._attn_implementation, str(network.dtype)]


def hash_weights(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named weights: names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, value in parameters:
        _put(sha, name, value)
    return sha.hexdigest()


def hash_features(block: ClipFeatures) -> str:
    """A hash of a block: its tokens and their layout."""
    sha, layout = hashlib.sha256(), block.layout
    for name, value in (("tokens", block.tokens), ("order", layout.order), ("positions", layout.positions)):
        _put(sha, name, value)
    sha.update(json.dumps([layout.num_visual, layout.timestamp_ids]).encode())
    return sha.hexdigest()


def _put(sha: Any, name: str, value: Tensor) -> None:
    sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
    sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def hash_values(*values: Any) -> str:
    """A hash of values as JSON has them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _identity(file: Path) -> list[Any]:
    """What tells a file from any other, and from what it was before."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def _read(path: Path) -> tuple[ClipFeatures, str]:
    """A block, its tensors mapped to memory, and the digest that was written with it."""
    with safe_open(str(path), framework="pt") as file:
        said = file.metadata()
        tokens, order, positions = (file.get_tensor(name) for name in ("tokens", "order", "positions"))
    layout = Layout(order, positions, int(said["num_visual"]), tuple(json.loads(said["timestamp_ids"])))
    return ClipFeatures(tokens, layout), said["digest"]
