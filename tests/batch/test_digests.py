"""A set of ten million keys: what it holds, what it costs, and that it grows."""

import time
import tracemalloc

from salmonn.batch.digests import DIGEST_BYTES, Digests, digest


def test_a_digest_is_of_its_values():
    """The same in each process; a text is no number, and parts do not run together."""
    keys = {digest("a", 1), digest("a", "1"), digest("a1"), digest("a", None), digest("a", 1.0), digest("a", 2)}
    assert len(keys) == 6 and all(len(key) == DIGEST_BYTES for key in keys)
    assert digest("a", 1) == digest("a", 1)


def test_zeros_at_the_end_are_no_padding():
    """numpy drops them: one key in 256 ends in one."""
    some = [b"\1" * 15 + b"\0", b"\1" * 14 + b"\0\0", b"\0" * 16, b"\0" * 15 + b"\1"]
    digests = Digests(b"".join(some))
    assert all(key in digests for key in some)
    assert b"\1" * 16 not in digests and b"\0" * 14 + b"\1\0" not in digests
    assert b"\0" * 16 not in Digests()


def test_a_million_keys():
    """16 MB, and none is lost; ten million are ten times that."""
    keys = bytearray(b"".join(digest(number) for number in range(1_000_000)))
    tracemalloc.start()
    begin = time.perf_counter()
    digests = Digests(keys)
    assert time.perf_counter() - begin < 20
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert all(digest(number) in digests for number in range(0, 1_000_000, 100))
    assert not any(digest(number) in digests for number in range(1_000_000, 1_010_000))


def test_what_is_added_is_found_and_goes_into_the_array():
    digests = Digests(digest("first"))
    for number in range(200_000):
        digests.add(digest(number))
    assert digest("first") in digests and digest(-1) not in digests
    assert all(digest(number) in digests for number in range(200_000))
    # 65537 at a time, three times; the rest waits.
    assert len(digests._recent) == 200_000 - 3 * 65_537
