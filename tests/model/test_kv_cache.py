"""The KV cache in pages: decode steps equal plain attention of each row, whatever rows join and are evicted."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from salmonn.model import kv_cache, partial_attention
from salmonn.model.kv_cache import KVCache
from salmonn.model.packing import PackedBatch, PrefixGroup

HEADS, KV_HEADS, WIDTH, SCALE = 6, 2, 8, 0.3
# Prefix length and suffix lengths, for pages of 4 tokens: pages exactly full, a prefix shorter than a page, a long one.
GROUPS = [(8, [1, 2]), (3, [1]), (13, [3, 1, 1])]


@dataclass
class Row:
    """Keys and values (K, length, d) of a row so far, in float64."""

    keys: Tensor
    values: Tensor

    def attend(self, query: Tensor) -> Tensor:
        """Return plain attention of one query (H, d)."""
        keys, values = (one.repeat_interleave(HEADS // KV_HEADS, dim=0) for one in (self.keys, self.values))
        return ((SCALE * query[:, None] @ keys.transpose(1, 2)).softmax(-1) @ values)[:, 0]


class Cache:
    """A KV cache of one layer, beside the rows that it should have."""

    def __init__(self, groups, *, dtype=torch.float32, seed=0, bias: float = 0.0, is_static: bool = False) -> None:
        self.generator, self.dtype, self.bias = torch.Generator().manual_seed(seed), dtype, bias
        index, packed_groups, rows = 0, [], 0
        segments: tuple[list[Tensor], list[Tensor]] = [], []
        self.rows: list[Row] = []
        for number, (prefix, suffixes) in enumerate(groups):
            packed_groups.append(PrefixGroup(number, tuple(range(rows, rows + len(suffixes))), prefix, tuple(suffixes)))
            rows += len(suffixes)
            index += prefix + sum(suffixes)
            parts = [(self.keys(n), self.random(KV_HEADS, n)) for n in (prefix, *suffixes)]
            for tensors, of in zip(segments, zip(*parts, strict=True), strict=True):
                tensors += [one.unsqueeze(0).to(dtype) for one in of]
            self.rows += [Row(*(torch.cat(of, 1) for of in zip(parts[0], one, strict=True))) for one in parts[1:]]
        packed = PackedBatch(torch.arange(index), torch.zeros(0), tuple(packed_groups))
        self.cache = KVCache(packed, torch.arange(index).expand(3, 1, index))
        self.cache.append(0, *segments, is_suffix=packed.is_suffix)
        self.cache.finalize()
        self.cache.is_static = is_static

    def random(self, *shape: int) -> Tensor:
        """Return random numbers that the dtype represents exactly."""
        return torch.randn(*shape, WIDTH, generator=self.generator, dtype=torch.float64).to(self.dtype).double()

    def keys(self, *shape: int) -> Tensor:
        """Return random keys, one component of which has a bias."""
        keys = self.random(KV_HEADS, *shape)
        keys[..., 3] += self.bias
        return keys.to(self.dtype).double()

    def step(self, *, num_waiting: int = 0) -> float:
        """Decode a token of each row and return the largest error."""
        self.cache.advance(num_waiting=num_waiting)
        count = self.cache.shape.rows  # in a static cache, with rows that are not in use
        query, key, value = self.random(count, HEADS), self.keys(count).transpose(0, 1), self.random(count, KV_HEADS)
        if self.bias:
            query[..., 3] = 8.0
        output = self.cache.attend(0, *(one.unsqueeze(2).to(self.dtype) for one in (query, key, value)), scale=SCALE)
        started = self.rows[: len(self.rows) - num_waiting]
        for row, new_key, new_value in zip(started, key, value, strict=False):
            row.keys, row.values = (
                torch.cat([row.keys, new_key[:, None]], 1),
                torch.cat([row.values, new_value[:, None]], 1),
            )
        expected = torch.stack([row.attend(one) for row, one in zip(started, query, strict=False)])
        return float((output[: len(started), :, 0].double() - expected).abs().max())

    def evict(self, keep) -> None:
        """Keep the given rows."""
        self.cache.evict(torch.tensor([number in keep for number in range(len(self.rows))]))
        self.rows = [self.rows[number] for number in keep]


@pytest.fixture(autouse=True)
def _short_pages(monkeypatch):
    monkeypatch.setattr(kv_cache, "PAGE_LENGTH", 4)
    monkeypatch.setattr(kv_cache, "GROWTH_STATIC", 2)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("keep", [keep for n in range(1, 6) for keep in itertools.combinations(range(6), n)])
def test_ragged_prefixes_and_any_eviction(keep, is_static):
    one = Cache(GROUPS, is_static=is_static)
    assert one.step() < 1e-6
    one.evict(keep)
    assert max(one.step() for _ in range(4)) < 1e-6


@pytest.mark.parametrize("is_static", [False, True])
def test_rows_join_and_leave(is_static):
    """Two caches join, the second while its rows have no token yet; pages that were freed are used again."""
    one, other = Cache(GROUPS, is_static=is_static), Cache([(9, [2, 1]), (4, [1])], seed=1)
    one.step()
    one.evict([0, 1, 3, 4, 5])  # the prefix of 3 tokens ends
    one.step()
    one.cache.extend(other.cache)
    one.rows += other.rows
    assert one.step(num_waiting=3) < 1e-6
    for keep in (range(8), [2, 3, 4, 5, 7], [0, 1, 2, 4], [1, 3]):
        one.evict(keep)
        assert one.step() < 1e-6


@pytest.mark.parametrize("is_static", [False, True])
def test_a_step_is_undone(is_static):
    """Also one in which the last rows have no token yet: those keep their length."""
    one = Cache(GROUPS, is_static=is_static)
    one.cache.extend(Cache([(9, [2, 1])], seed=1).cache)
    other = Cache([(9, [2, 1])], seed=1)
    one.rows += other.rows
    for num_waiting in (2, 0):
        lengths, rows = list(one.cache._lengths), [Row(row.keys, row.values) for row in one.rows]
        assert one.step(num_waiting=num_waiting) < 1e-6
        one.cache.rewind()
        assert one.cache._lengths == lengths
        one.rows = rows
        assert one.step(num_waiting=num_waiting) < 1e-6
    assert one.step() < 1e-6


def test_a_cleared_cache_is_used_again():
    """Other rows find its tensors, and nothing in them: NaN would spread to every row."""
    one = Cache(GROUPS, is_static=True)
    assert max(one.step() for _ in range(2)) < 1e-6
    for pool in one.cache._layers[0].pools:
        pool.keys.fill_(torch.nan)
        pool.values.fill_(torch.nan)
    version, num_stored = one.cache.storage_version, one.cache.num_stored_tokens
    one.cache.clear()
    other = Cache([(9, [2, 1]), (4, [1])], seed=1)
    one.cache.extend(other.cache)
    one.rows = other.rows
    assert max(one.step() for _ in range(3)) < 1e-6
    assert (one.cache.storage_version, one.cache.num_stored_tokens) == (version, num_stored)
    one.cache.evict(torch.tensor([False, False, True]))
    one.rows = one.rows[2:]
    one.cache.release_unused()
    assert one.cache.num_stored_tokens < num_stored / 2 and one.step() < 1e-6


def test_padding_changes_nothing_else():
    """Rows that are not in use write to their own places; tensors stay where they are while rows come and go."""
    one = Cache(GROUPS, is_static=True)
    one.step()
    one.evict([0, 1, 2])
    cache = one.cache._layers[0]
    version, used = one.cache.storage_version, len(one.rows)
    before = [tensor.clone() for pool in cache.pools for tensor in (pool.keys, pool.values)]
    columns = list(one.cache._lengths)
    assert one.step() < 1e-6 and one.cache.shape.rows == 4
    for old, new in zip(before[:4], (one for pool in cache.pools[:2] for one in (pool.keys, pool.values)), strict=True):
        assert torch.equal(old, new)
    for old, new in zip(before[4:], (cache.own.keys, cache.own.values), strict=True):
        changed = (old != new).any(-1).any(1).nonzero().tolist()  # rows and columns
        assert [place for place in changed if place[0] < used] == [list(one) for one in enumerate(columns)]
    one.cache.extend(Cache([(3, [1])], seed=1).cache)
    assert one.cache.storage_version == version and one.cache.shape.rows == 4


def test_no_memory_for_rows_that_join(monkeypatch):
    """The rows that were there are decoded as before; steps that were recorded with other tensors are void."""
    one, other = Cache(GROUPS), Cache([(9, [70])], seed=1)
    one.step()
    version, calls, make_room = one.cache.storage_version, [], kv_cache._Pool.make_room

    def fail_at_last(*args, **options):
        calls.append(1)
        make_room(*args, **options)
        if len(calls) == 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(kv_cache._Pool, "make_room", fail_at_last)
    with pytest.raises(torch.OutOfMemoryError):
        one.cache.extend(other.cache)
    assert len(one.cache) == 6 and one.cache.storage_version > version
    assert one.step() < 1e-6 and one.step() < 1e-6


def test_eviction_copies_few_pages():
    """Of pages 0 to 4 the first two are freed: pages 3 and 4 take their places, and nothing else is copied."""
    one = Cache(GROUPS)
    pages = one.cache._layers[0].pages
    before, address = pages.keys.clone(), pages.keys.data_ptr()
    one.evict([2, 3, 4, 5])
    assert [prefix.pages for prefix in one.cache._prefixes] == [[], [2, 0, 1]]
    assert pages.keys.data_ptr() == address
    assert torch.equal(pages.keys[:3], before[[3, 4, 2]])
    one.evict([0])
    assert len(pages.keys) == 0  # memory is released


def test_large_key_biases_in_16_bits():
    """Scores are some thousands, where bfloat16 has steps of 16; their differences, which decide, are of order 1."""
    one = Cache(GROUPS, dtype=torch.bfloat16, bias=640.0)
    assert max(one.step() for _ in range(3)) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kernel_is_checked(monkeypatch, caplog, dtype):
    """A kernel that fails or is wrong is replaced by plain products, with a sentence in the log."""
    device, choose = torch.device("cpu"), partial_attention.attention_kernel.__wrapped__
    kernel = partial_attention._cpu_kernel
    assert choose(device, dtype, 16) is kernel

    def wrong(*args, **options):
        output, total = kernel(*args, **options)
        return output, total / 0.9

    def failing(*args, **options):
        raise RuntimeError("no kernel image is available")

    for broken, message in ((wrong, "are off by"), (failing, "no kernel image is available")):
        monkeypatch.setattr(partial_attention, "_cpu_kernel", broken)
        assert choose(device, dtype, 16) is partial_attention.plain_attention
        assert message in caplog.text
        monkeypatch.setattr(partial_attention, "attention_kernel", choose)
        one = Cache(GROUPS)
        assert one.step() < 1e-6
