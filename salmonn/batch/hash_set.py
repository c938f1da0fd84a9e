"""Sets of ten million keys: 16 bytes each, in one sorted array."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

KEY_BYTES = 16
_LEAST_RECENT = 1 << 16


def hash_key(*parts: str | float | None) -> bytes:
    """16 bytes that stand for some values; two of ten million are alike by chance once in 10^24 times."""
    return blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=KEY_BYTES).digest()


def to_array(digests: bytes | bytearray) -> np.ndarray:
    """Digests that stand one after the other as an array of them, (N,), which shares a bytearray's memory."""
    return np.frombuffer(digests, f"S{KEY_BYTES}")


class HashSet:
    """A set of digests, for many.

    What is added stands in a Python set at first, and goes into the array by and by: in that a digest takes 16 bytes
    and is found in a microsecond or two, in the set it takes 100.

    Args:
        digests: the first ones, one after the other; the memory of a bytearray is taken over.
    """

    def __init__(self, digests: bytes | bytearray = b"") -> None:
        self._sorted = to_array(bytearray(digests) if isinstance(digests, bytes) else digests)
        self._sorted.sort()
        self._recent: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        if key in self._recent:
            return True
        # numpy takes zeros at the end of a byte string for padding, in its arrays and in what it gives back.
        bare = key.rstrip(b"\0")
        place = int(np.searchsorted(self._sorted, np.bytes_(bare)))
        return place < len(self._sorted) and self._sorted[place] == bare

    def add(self, key: bytes) -> None:
        """Put one in."""
        self._recent.add(key)
        if len(self._recent) > max(_LEAST_RECENT, len(self._sorted) // 8):
            self._settle(self._recent)

    def _settle(self, keys: Iterable[bytes]) -> None:
        merged = np.concatenate([self._sorted, to_array(b"".join(keys))])
        merged.sort()
        self._sorted = merged
        self._recent = set()
