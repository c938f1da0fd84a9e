"""`HashSet`: a set of up to ten million keys, its memory and its speed."""

import tracemalloc

import pytest

from salmonn.batch.ledger_files import KEY_BYTES, HashSet, hash_key


def test_a_key_depends_on_its_values():
    """Types and boundaries of the values count."""
    keys = {
        hash_key("a", 1),
        hash_key("a", "1"),
        hash_key("a1"),
        hash_key("a", None),
        hash_key("a", 1.0),
        hash_key("a", 2),
    }
    assert len(keys) == 6 and all(len(key) == KEY_BYTES for key in keys)
    assert hash_key("a", 1) == hash_key("a", 1)


def test_zeros_at_the_end_of_a_key_count():
    """numpy drops them, and one key in 256 ends with one."""
    some = [b"\1" * 15 + b"\0", b"\1" * 14 + b"\0\0", b"\0" * 16, b"\0" * 15 + b"\1"]
    digests = HashSet(b"".join(some))
    assert all(key in digests for key in some)
    assert b"\1" * 16 not in digests and b"\0" * 14 + b"\1\0" not in digests
    assert b"\0" * 16 not in HashSet()


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_keys(count):
    """A million take 16 MB."""
    keys = bytearray(b"".join(hash_key(number) for number in range(count)))
    tracemalloc.start()
    digests = HashSet(keys)
    assert tracemalloc.get_traced_memory()[1] < 20 * count
    tracemalloc.stop()
    assert all(hash_key(number) in digests for number in range(0, count, 100))
    assert not any(hash_key(number) in digests for number in range(count, count + 2000))


def test_added_keys_are_merged_into_the_array(monkeypatch):
    monkeypatch.setattr("salmonn.batch.ledger_files._MIN_RECENT_KEYS", 1 << 10)
    digests = HashSet(hash_key("first"))
    for number in range(3500):
        digests.add(hash_key(number))
    assert hash_key("first") in digests and hash_key(-1) not in digests
    assert all(hash_key(number) in digests for number in range(3500))
    # Three times 1025 keys have been merged.
    assert len(digests._recent) == 3500 - 3 * 1025
