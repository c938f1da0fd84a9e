"""Feature cache: clip features on disk, so that the frozen encoders run once per clip for all stages and later runs.

    run/features/KEY.safetensors    features of one clip; written under a temporary name, then renamed

The key is a hash of everything that the features depend on: the clip's files and span, frame sampling and token layout,
the encoders' weights, and the device and type that they are computed with. Files are memory-mapped: a page is read from
disk when it is first used, and each process verifies a file's checksum at that time.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.processor import Processor
from salmonn.config import MAY_CHANGE, MAY_CHANGE_BUT_NOT_TO_NONE
from salmonn.files import parse_json
from salmonn.model.fingerprint import hash_values, hash_weights, update_hash
from salmonn.model.layout import ClipFeatures, ClipInfo, Layout
from salmonn.train.data import ClipSource

log = logging.getLogger(__name__)
GIB = 1 << 30
FORMAT = 3  # of the files; part of each key, so that files of another format are never read
SUFFIX = ".safetensors"
HEADER_BYTES = 4096  # upper bound of a file's size beyond its tensors and metadata
RESCAN_SHARE = 0.01  # share of the size limit that all processes together may write before they rescan the folder
STALE_SECONDS = 3600.0  # age from which a temporary file counts as abandoned
# Packages whose code determines the features.
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

# In the language model's section: of towers that come with it, and of the layout.
LM_KEYS = ("vision_config", "audio_config", "position_id_per_seconds", "seconds_per_chunk")


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Location and size of the feature cache.

    Args:
        folder: folder of the files, one per clip. It must be visible to all machines of a run, and runs may share it.
            None keeps all features in the memory of the process, which must be the only one.
        max_gib: size limit in GiB, None for all of the disk. The least recently used files are evicted. A run whose
            features need more does not start, unless it has a single process with enough memory for the rest.
    """

    folder: Path | None = field(default=Path("run/features"), metadata=MAY_CHANGE_BUT_NOT_TO_NONE)
    max_gib: float | None = field(default=20.0, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        if self.max_gib is not None and self.max_gib <= 0:
            raise ValueError(f"max_gib must be above 0, got {self.max_gib}; use folder null to keep features in memory")


class FeatureCache:
    """Clip features of one model in a folder.

    Args:
        folder: folder of the files.
        max_bytes: size limit, kept to within 1 % where several processes write.
        model: hash of the model's encoders, see `hash_encoders`.
    """

    def __init__(self, folder: Path, *, max_bytes: float, model: str) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.model = model
        self._in_use: set[str] = set()
        self._verified: set[str] = set()
        self._allowance = 0.0  # bytes that this process may write before it rescans the folder

    def keys(self, clips: Sequence[ClipSource]) -> list[str]:
        """Return the cache key of each clip, on every rank."""
        return dist.gather([self._key(clip) for clip in dist.shard(clips)])

    def _key(self, clip: ClipSource) -> str:
        files = []
        for file in (clip.video, clip.audio):
            if file:
                stat = file.stat()
                files.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
        span = [clip.start_seconds, clip.end_seconds]
        return hash_values(FORMAT, self.model, files, bool(clip.audio), clip.modality, span, clip.needs_both)

    def find_complete(self, keys: Sequence[str]) -> set[str]:
        """Return the keys that have a file with a complete header and of the right length; ranks share the reading.

        All given keys count as in use by this run from now on and are not evicted.
        """
        self._in_use.update(keys)
        # Only rank 0 lists the folder: network file systems on other ranks would cache negative lookups.
        listed = {path.stem for path in self._files()} if dist.is_main() else set()
        present = sorted(dist.gather([listed & set(keys)])[0])
        complete = dist.gather([self._is_complete(key) for key in dist.shard(present)])
        return {key for key, is_complete in zip(present, complete, strict=True) if is_complete}

    def _is_complete(self, key: str) -> bool:
        path = self._path(key)
        try:
            self._read(key)
            with suppress(PermissionError):  # owned by another user of the shared folder
                os.utime(path)
            return True
        except (FileNotFoundError, PermissionError):  # evicted by another run, or not readable for this user
            return False
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); encoding the clip again", path, error)
            return False

    def require_room(self, size: int, *, num_clips: int, name: str) -> None:
        """Refuse to start to encode clips whose features do not fit; called on all ranks.

        Args:
            size: estimated bytes of the features that are still to be computed.
            num_clips: number of these clips.
            name: what the clips are, for the message.

        Raises:
            ValueError: neither the folder nor, for a single process, the main memory has room for them.
        """
        if not num_clips or not any(dist.gather([dist.is_main() and size > self._room()])):
            return
        limit = "" if self.max_bytes == math.inf else f" (feature_cache.max_gib is {self.max_bytes / GIB:.1f})"
        raise ValueError(
            f"the features of {num_clips} {name} take about {size / GIB:.1f} GiB, which do not fit in {self.folder}"
            f"{limit}: raise feature_cache.max_gib (null for all of the disk), free space there, or choose a "
            "feature_cache.folder on a larger disk"
        )

    def _room(self) -> float:
        """Return the bytes that this run may still write, after eviction of idle files, or keep in memory."""
        files = self._files()
        total = sum(stat.st_size for stat in files.values())
        used = sum(stat.st_size for path, stat in files.items() if path.stem in self._in_use)
        room = min(self.max_bytes, total + shutil.disk_usage(self.folder).free) - used
        return room if dist.world_size() > 1 else room + psutil.virtual_memory().available

    def save(self, key: str, features: ClipFeatures) -> bool:
        """Write features of a clip; return False if they do not fit."""
        layout = features.layout
        tensors = {
            "tokens": features.tokens.contiguous(),
            "order": layout.order.contiguous(),
            "positions": layout.positions.contiguous(),
        }
        size = sum(tensor.nbytes for tensor in tensors.values())
        metadata = {
            "digest": compute_digest(features),
            "num_visual": str(layout.num_visual),
            "timestamp_ids": json.dumps(layout.timestamp_ids),
            "text_start": json.dumps(layout.text_start),
            "info": json.dumps(asdict(features.info)),
        }
        if not self._make_room(size + HEADER_BYTES + 2 * sum(map(len, metadata.values()))):  # quotes are escaped
            return False
        temporary = self.folder / f".{key}.{uuid.uuid4().hex}.tmp"
        try:
            save_file(tensors, str(temporary), metadata=metadata)
            temporary.replace(self._path(key))
        except (OSError, SafetensorError) as error:  # a quota, or a disk that other programs have filled
            log.warning("cannot write to %s: %s", self.folder, error)
            temporary.unlink(missing_ok=True)
            return False
        self._verified.add(key)
        return True

    def load_missing(
        self, keys: Sequence[str], features: Sequence[ClipFeatures | None], *, name: str
    ) -> list[ClipFeatures]:
        """Load the features that are None from their files, and warn about those that stay in memory.

        Args:
            keys: cache keys of the clips.
            features: features that are in memory, None for those in the folder.
            name: name of the clips for the warning.
        """
        in_memory = [one for one in features if one is not None]
        if in_memory and dist.is_main():
            size = sum(one.tokens.nbytes for one in in_memory) / GIB
            log.warning(
                "the features of %d of %d %s (%.2f GiB) do not fit in %s and stay in memory; raise "
                "feature_cache.max_gib (%.2f) or free space on that disk",
                len(in_memory),
                len(features),
                name,
                size,
                self.folder,
                self.max_bytes / GIB,
            )
        return [self.load(key) if one is None else one for key, one in zip(keys, features, strict=True)]

    def load(self, key: str) -> ClipFeatures:
        """Return the features of a key, memory-mapped; `read_tokens` verifies their checksum.

        Raises:
            ValueError: this process cannot see the file.
        """
        try:
            return self._read(key)
        except FileNotFoundError as error:
            raise ValueError(
                f"process {dist.rank()} cannot see {self._path(key).resolve()}, which this run has written or read; "
                "share the folder between all machines, raise feature_cache.max_gib so that it holds all runs that "
                "use it, or set feature_cache.folder to null to keep features in memory"
            ) from error

    def _read(self, key: str) -> "CachedFeatures":
        with safe_open(str(self._path(key)), framework="pt") as file:
            metadata = file.metadata()
            tokens, order, positions = (file.get_tensor(name) for name in ("tokens", "order", "positions"))
        num_visual, timestamp_ids, text_start = (
            json.loads(metadata[name]) for name in ("num_visual", "timestamp_ids", "text_start")
        )
        layout = Layout(order, positions, num_visual, tuple(timestamp_ids), text_start)
        info = parse_json(metadata["info"], ClipInfo)
        return CachedFeatures(tokens, layout, info, cache=self, key=key, digest=metadata["digest"])

    def verify(self, features: "CachedFeatures") -> None:
        """Compare features with their checksum, once in each process.

        Raises:
            ValueError: they differ. The file is removed, so that the next start encodes the clip again.
        """
        if features.key in self._verified:
            return
        if compute_digest(features) != features.digest:
            path = self._path(features.key)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise ValueError(
                    f"{path} is damaged: its checksum does not match. Delete it, which this process cannot "
                    f"({error.strerror}), and start this run again to encode the clip again"
                ) from error
            raise ValueError(
                f"{path} is damaged (its checksum does not match) and has been removed; start this run again, which "
                "encodes the clip again and resumes"
            )
        self._verified.add(features.key)

    def _make_room(self, size: int) -> bool:
        """Evict least recently used files of other runs until `size` bytes may be written; return whether they may."""
        if size <= self._allowance:
            self._allowance -= size
            return True
        files = self._files()
        total = sum(stat.st_size for stat in files.values())
        limit = min(self.max_bytes, total + shutil.disk_usage(self.folder).free)
        needed = size * dist.world_size()  # every process may be writing as much at this moment
        idle = sorted(
            (path for path in files if path.stem not in self._in_use), key=lambda path: files[path].st_mtime_ns
        )
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
        self._allowance = max(0.0, min(limit - total, limit * RESCAN_SHARE) / dist.world_size() - size)
        return True

    def _files(self) -> dict[Path, os.stat_result]:
        files = {}
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # just evicted by another process
                files[path] = path.stat()
        return files

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def open_feature_cache(config: FeatureCacheConfig, captioner: Captioner) -> FeatureCache | None:
    """Open the feature cache of a run on all ranks; None if features are kept in memory.

    Raises:
        ValueError: a machine of this run cannot see the folder, or there is none for several processes.
    """
    if config.folder is None:
        if dist.world_size() > 1:
            raise ValueError(
                f"feature_cache.folder null keeps features in the memory of one process, and this run has "
                f"{dist.world_size()}; set a folder that all of them see"
            )
        return None
    if dist.is_main():
        config.folder.mkdir(parents=True, exist_ok=True)
        remove_stale(config.folder)
    model = dist.gather([hash_encoders(captioner) if dist.is_main() else ""])[0]
    if not config.folder.is_dir():
        raise ValueError(
            f"process {dist.rank()} cannot see {config.folder.resolve()}, which process 0 has created; share the "
            "folder between all machines, or set feature_cache.folder to null to keep features in memory"
        )
    return FeatureCache(
        config.folder, max_bytes=math.inf if config.max_gib is None else config.max_gib * GIB, model=model
    )


def remove_stale(folder: Path) -> None:
    """Remove temporary files that killed processes left behind; younger ones may belong to a running process."""
    for path in folder.glob(".*.tmp"):
        if path.stat().st_mtime < time.time() - STALE_SECONDS:
            path.unlink(missing_ok=True)


def hash_encoders(captioner: Captioner) -> str:
    """Hash everything that clip features depend on except the clip: weights, sizes, sampling, tokenizer, numerics."""
    network, processor = captioner.network, captioner.processor
    device, on_gpu = network.device, network.device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    embeddings = network.lm.get_input_embeddings().weight
    towers = [(name, value) for name, value in network.named_parameters() if name.startswith(("vision.", "audio."))]
    config = processor.config.to_dict()
    return hash_values(
        hash_weights([*towers, ("embeddings", embeddings)]),  # timestamp tokens are embedded as text
        {key: config.get(key) for key in CONFIG_KEYS},
        {key: config["lm"].get(key) for key in LM_KEYS},
        str(processor.family.frame_sampler),
        processor.published_positions,
        processor.reader,
        hash_tokenizer(processor),
        [device.type, chip, network.config._attn_implementation, str(network.dtype)],  # rounding depends on these
        [importlib.metadata.version(package) for package in PACKAGES],
    )


def hash_tokenizer(processor: Processor) -> str:
    """Hash everything that determines token ids: the tokenizer, the system prompt and the placeholders."""
    config = processor.config
    return hash_values(processor.tokenizer.backend_tokenizer.to_str(), config.system_prompt, config.placeholder_ids)


@dataclass(frozen=True)
class CachedFeatures(ClipFeatures):
    """Features in a file of a cache.

    Args:
        cache, key: where they lie.
        digest: checksum that was written with them.
    """

    _: KW_ONLY
    cache: FeatureCache
    key: str
    digest: str

    def read_tokens(self) -> Tensor:
        """Return the tokens, verified; see `FeatureCache.verify`."""
        self.cache.verify(self)
        return self.tokens


def hash_features(features: ClipFeatures) -> str:
    """Hash the tokens of a clip and their layout; those in a file have been hashed when it was written."""
    return features.digest if isinstance(features, CachedFeatures) else compute_digest(features)


def compute_digest(features: ClipFeatures) -> str:
    """Compute the SHA-256 of the tokens of a clip and their layout."""
    sha, layout = hashlib.sha256(), features.layout
    for name, value in (("tokens", features.tokens), ("order", layout.order), ("positions", layout.positions)):
        update_hash(sha, name, value)
    sha.update(json.dumps([layout.num_visual, layout.timestamp_ids, layout.text_start]).encode())
    return sha.hexdigest()
