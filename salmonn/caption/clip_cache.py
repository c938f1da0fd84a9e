"""Features of the most recently used clips, in memory: a further question about a clip need not read it again."""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from salmonn.caption.read_spec import ReadSpec
from salmonn.model.layout import ClipFeatures


@dataclass(frozen=True)
class ClipKey:
    """A version of a file, and the part of it that is read."""

    path: Path
    size_bytes: int
    modified_ns: int
    read_spec: ReadSpec


class ClipCache:
    """Clip features by `ClipKey`; the least recently used ones are evicted. Any thread may use it.

    Args:
        max_bytes: maximum size of all features; 0 stores nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._features: OrderedDict[ClipKey, ClipFeatures] = OrderedDict()

    def key(self, path: Path, read_spec: ReadSpec) -> ClipKey | None:
        """Return the key of a file as it is now; None if nothing is stored, or the file is absent."""
        if not self.max_bytes:
            return None
        try:
            status = os.stat(path)  # noqa: PTH116 - also raises for a name with a null character
        except (OSError, ValueError):
            return None
        return ClipKey(path, status.st_size, status.st_mtime_ns, read_spec)

    def get(self, key: ClipKey | None) -> ClipFeatures | None:
        """Return the features of a clip if they are stored."""
        with self._lock:
            if key is None or key not in self._features:
                return None
            self._features.move_to_end(key)
            return self._features[key]

    def put(self, key: ClipKey, features: ClipFeatures) -> None:
        """Store features, evicting others; features that alone exceed the maximum are not stored."""
        with self._lock:
            self._features[key] = features
            self._features.move_to_end(key)
            while sum(one.tokens.nbytes for one in self._features.values()) > self.max_bytes:
                self._features.popitem(last=False)
