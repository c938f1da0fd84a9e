"""The scheduler: what is decoded together, with scripted lengths; and its captions, equal to those of separate runs."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from salmonn.caption import limits
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.limits import KV_CACHE_SHARE, BatchLimits, measure_limits
from salmonn.caption.processor import PromptRow
from salmonn.caption.prompt import Prompt
from salmonn.caption.scheduler import ScheduledSequence, Scheduler
from salmonn.caption.streaming import Completion, TextDelta
from tests.completions import generate

PROMPT = Prompt("Tell.")
SAMPLING = Sampling(max_new_tokens=100)


@dataclass
class ScriptedBatch:
    """Takes the length of a completion for its clip."""

    admitted: list[list[int]] = field(default_factory=list)  # lengths, by prefill
    num_active: list[int] = field(default_factory=list)  # rows, by step
    max_rows: int = 1000  # memory runs out above
    max_tokens: int = 10_000  # with memory that is kept
    left: dict[int, int] = field(default_factory=dict)
    num_stored_tokens: int = 0
    releases: list[str] = field(default_factory=list)  # after the first start

    def start(self):
        self.left, self.num_stored_tokens = {}, 0
        self.releases.append("all")
        return self

    def clear(self):
        self.left = {}

    def restart(self):
        pass

    def release_unused(self):
        self.releases.append("unused")

    def add(self, clips, prompts, *, sampling, seeds):
        if len(self.left) + len(clips) > self.max_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        if self.num_stored_tokens + 100 * len(clips) > self.max_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        self.num_stored_tokens = max(self.num_stored_tokens, 100 * (len(self.left) + len(clips)))
        first = sum(map(len, self.admitted))
        self.admitted.append(list(clips))
        self.left |= {first + number: length for number, length in enumerate(clips)}
        return range(first, first + len(clips))

    def step(self, cancelled):
        self.num_active.append(len(self.left))
        self.left = {row: left - 1 for row, left in self.left.items()}
        ended = [row for row, left in self.left.items() if not left]
        self.left = {row: left for row, left in self.left.items() if left}
        return {row: TextDelta("", Completion(str(row), True)) for row in ended}


def group(*lengths, sampling=SAMPLING, num_tokens=50):
    shared = object()
    return [
        ScheduledSequence(group=shared, clip=length, prompt=PROMPT, sampling=sampling, seed=0, num_tokens=num_tokens)
        for length in lengths
    ]


def run(groups, *, rows, num_tokens=None, **options):
    batch = ScriptedBatch(**options)
    outcomes = list(Scheduler(batch.start, limits=BatchLimits(rows, num_tokens)).run(groups))
    assert {id(one) for one, _ in outcomes} == {id(one) for members in groups for one in members}
    return batch, [outcome for _, outcome in outcomes]


def test_few_rows_idle_although_lengths_differ_strongly():
    """64 captions of 10 or 100 tokens in 8 rows: 440 steps without any idle row, 800 in batches of 8."""
    lengths = [10, 100] * 32
    batch, _ = run([group(length) for length in lengths], rows=8)
    # A row is only free when nothing waits, so that the last caption ends at most its own length later.
    assert sum(batch.num_active) == sum(lengths)
    assert sum(lengths) / 8 <= len(batch.num_active) <= sum(lengths) / 8 + 100 * 7 / 8
    assert max(batch.num_active) == 8


def test_an_eighth_of_the_rows_joins_together():
    """In 32 rows, 4 that have ended are replaced at once: a prefill interrupts all others."""
    batch, _ = run([group(length) for length in (*range(1, 33), *[50] * 6)], rows=32)
    assert [len(clips) for clips in batch.admitted] == [32, 4, 2]  # the last two need not wait for an eighth
    assert batch.num_active[:6] == [32, 31, 30, 29, 32, 31]


def test_samples_of_a_clip_join_together():
    batch, _ = run([group(1, 2, 3, 9), group(5, 5, 5, 5), group(1, 1, 1, 1)], rows=6)
    assert batch.admitted == [[1, 2, 3, 9], [5, 5, 5, 5], [1, 1, 1, 1]]
    assert batch.num_active == [4, 3, 6, 5, 5, 5, 5, 5, 1]


def test_more_samples_than_rows_are_decoded_in_parts():
    batch, _ = run([group(1, 2, 3, 4, 5), group(1)], rows=2)
    assert batch.admitted == [[1, 2], [3, 4], [5], [1]]


def test_the_kv_cache_has_room_for_all_that_is_decoded_together():
    """A clip has 50 tokens, and each of its captions 100 at most: 250 for two samples."""
    groups = [group(3, 3), group(5, 5), group(4, 4), group(4, 4)]
    assert run(groups, rows=100, num_tokens=2 * 250)[0].admitted == [[3, 3, 5, 5], [4, 4], [4, 4]]
    assert run(groups, rows=100, num_tokens=2 * 250 - 1)[0].admitted == [[3, 3], [5, 5], [4, 4], [4, 4]]
    assert run(groups, rows=100, num_tokens=1)[0].admitted == [[3, 3], [5, 5], [4, 4], [4, 4]]  # a clip is always tried
    batch, _ = run([group(1, num_tokens=5000), *groups], rows=100, num_tokens=1000)
    assert batch.admitted == [[1], [3, 3, 5, 5, 4, 4, 4, 4]]


@pytest.mark.parametrize(
    ("rows", "num_tokens", "max_tokens", "releases"),
    [
        (4, 600, 10_000, []),  # 400 of the first four, 100 of the last
        (4, 499, 10_000, ["all"]),
        (8, 499, 10_000, ["unused"]),  # others are still running
        (4, 600, 450, ["all"]),
    ],
)
def test_memory_is_kept_for_the_next_sequences(rows, num_tokens, max_tokens, releases):
    """It is released where both would not fit: beyond the limit, or as memory runs out."""
    first = [group(5, num_tokens=1, sampling=Sampling(max_new_tokens=1)) for _ in range(4)]
    last = group(9, num_tokens=100, sampling=Sampling(max_new_tokens=2))
    batch, outcomes = run([*first, last], rows=rows, num_tokens=num_tokens, max_tokens=max_tokens)
    assert all(isinstance(one, Completion) for one in outcomes)
    assert batch.admitted == [[5, 5, 5, 5], [9]] and batch.releases == ["all", *releases]


def test_only_equal_sampling_parameters_share_a_prefill():
    other = Sampling(max_new_tokens=7)
    batch, _ = run([group(5), group(6, sampling=other), group(7), group(8, sampling=other)], rows=8)
    assert batch.admitted == [[5, 7], [6, 8]] and batch.num_active[0] == 4


def test_sequences_that_do_not_fit_into_memory_together_run_alone():
    batch, outcomes = run([group(2), group(3), group(4)], rows=3, max_rows=1)
    assert batch.admitted == [[2], [3], [4]] and batch.num_active == [1] * 9
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    batch, outcomes = run([group(2), group(3)], rows=3, max_rows=0)
    assert not batch.admitted and len(outcomes) == 2
    for outcome in outcomes:
        assert isinstance(outcome, torch.OutOfMemoryError) and "batch_size" in str(outcome)
        assert str(outcome).endswith("(CUDA out of memory)")


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=40), Sampling(temperature=1.0, max_new_tokens=40)])
def test_captions_equal_those_of_separate_runs(captioner, videos, media, sampling, monkeypatch):
    """A fifth of all tokens are stop tokens, so that lengths differ: others join in float32 without any change."""
    processor = captioner.processor
    monkeypatch.setattr(processor, "stop_ids", list(range(1, 400, 5)))
    inputs = list(media[:4]) * 2
    requests = [
        CaptionRequest(videos[0], f"{number}?", sampling, seed=number, num_samples=2) for number in range(len(inputs))
    ]
    scheduler = captioner.scheduler(BatchLimits(6))
    completions = dict[tuple[int, int], str]()
    for sequence, outcome in scheduler.run(captioner.groups(requests, inputs)):
        completions[sequence.index, sequence.sample] = outcome.text
    lengths = []
    for index, (request, clip) in enumerate(zip(requests, inputs, strict=True)):
        rows = processor.collate([PromptRow(0, request.prompt)], [clip])
        separate = generate(
            captioner.network, rows, sampling=sampling, stop_ids=processor.stop_ids, num_samples=2, seeds=[index]
        )
        lengths += [len(tokens) for tokens in separate]
        for sample, tokens in enumerate(separate):
            text = processor.tokenizer.decode([token.id for token in tokens], skip_special_tokens=True).strip()
            assert completions[index, sample] == text
    assert len(set(lengths)) > 3
    batch, _ = run([group(*lengths[start : start + 2]) for start in range(0, len(lengths), 2)], rows=6)
    assert scheduler.num_steps == len(batch.num_active) and scheduler.num_prefills == len(batch.admitted) > 3


def test_the_kv_cache_is_limited_by_the_free_memory_of_a_gpu(captioner, monkeypatch):
    """PyTorch has reserved some of it for reuse."""
    network = captioner.network
    assert measure_limits(network, batch_size=None, default=1) == BatchLimits(1)  # no limit on a CPU
    fake = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, lm=network.lm, parameters=lambda: [])
    text = network.lm.config.get_text_config()
    token = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    needed = 1000 * token / KV_CACHE_SHARE
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: needed / 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: needed / 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0.751 * needed, 0))
    assert measure_limits(fake, batch_size=None, default=1) == BatchLimits(64, 1001, 256, True, token)
    assert measure_limits(fake, batch_size=None, default=100) == BatchLimits(100, 1001, 256, True, token)
    assert measure_limits(fake, batch_size=8, default=1) == BatchLimits(8, 1001, 256, True, token)


def test_the_gpu_with_least_room_for_its_layers_decides(captioner, monkeypatch):
    """The first GPU has one layer of three; the second has half as much memory and computes an offloaded layer, too."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    layers = [
        SimpleNamespace(parameters=lambda device=device: iter([SimpleNamespace(device=device)]), _hf_hook=hook)
        for device, hook in (
            (first, None), (second, None), (torch.device("meta"), SimpleNamespace(execution_device=1))
        )
    ]  # fmt: skip
    config = captioner.network.lm.config
    lm = SimpleNamespace(config=config, get_decoder=lambda: SimpleNamespace(layers=layers))
    weights = [SimpleNamespace(data=torch.zeros(0), is_cuda=True, device=device) for device in (first, second)]
    fake = SimpleNamespace(device=first, dtype=torch.bfloat16, lm=lm, parameters=lambda: weights)
    text = config.get_text_config()
    token_of_layer = 2 * 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    free = {first: 4000 * token_of_layer / KV_CACHE_SHARE, second: 2002 * token_of_layer / KV_CACHE_SHARE}
    monkeypatch.setattr(limits, "free_bytes", free.__getitem__)
    assert measure_limits(fake, batch_size=8, default=1) == BatchLimits(8, 1001, 64, False, 2 * token_of_layer)


def test_room_is_that_of_the_cache():
    """Rows have as many columns as the longest, in steps; a static cache pads pages, tails and rows."""
    assert BatchLimits(8, 100 + 2 * 128, growth=64).have_room([60, 40], [10, 65])
    assert not BatchLimits(8, 100 + 2 * 128 - 1, growth=64).have_room([60, 40], [10, 65])
    reserved = BatchLimits(8, 100 + 2 * 128 + 3, growth=64, token_bytes=10, reserved_bytes=30)
    assert reserved.have_room([60, 40], [10, 65])
    assert not replace(reserved, reserved_bytes=31).have_room([60, 40], [10, 65])
    needed = (18 + 4) * 512 + 4 * 272  # 17 pages are padded to 18, three tails and rows to four
    prefixes = [9 * 512 + 1, 5 * 512 + 7, 3 * 512 + 2]
    assert BatchLimits(8, needed, 256, True).have_room(prefixes, [200, 1, 1])
    assert not BatchLimits(8, needed - 1, 256, True).have_room(prefixes, [200, 1, 1])
