"""Decode steps that are recorded once as a CUDA graph and replayed, which costs the host one launch a token.

Launching all kernels of a step takes the host longer than a GPU needs to run them. So steps are padded to a few
shapes: 1, 2, 4 ... 128 rows, and pages in steps of an eighth (see `StepShape`). The first steps of a shape run as they
are; then one is recorded, and replayed for every later step of the shape, whatever rows have joined or ended meanwhile,
also after all have. All steps do the same: tensors of the cache are changed in place, and the host only counts tokens
and makes room.

What is computed for padding has no effect: it is written to rows of the cache that are not in use, no row attends to
it, and its logits are dropped before any token is sampled.
"""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salmonn.model.decode_layers import make_decode_layers
from salmonn.model.kv_cache import KVCache
from salmonn.model.kv_tables import StepShape
from salmonn.model.network import Network
from salmonn.model.transfer import own_stream

logger = logging.getLogger(__name__)
# Recording takes as long as some steps, and not every shape lasts. These steps also load all kernels.
STEPS_BEFORE_RECORDING = 4
MAX_RECORDED = 32  # steps that are kept; they share the memory of intermediate results and logits
MAX_UNRECORDED = 256  # shapes of other steps that are known
MAX_FAILED = 3  # attempts to record that run out of memory, after which no step is recorded

Key = tuple[StepShape, int]  # shape of a step, and the number of own tokens that its rows attend to
Run = Callable[[], Tensor]
Record = Callable[[Run], tuple[Callable[[], object], Tensor]]


@dataclass(frozen=True)
class _RecordedStep:
    """A recorded step: the tokens (R,) that it reads, what replays it, and the logits (R, V) that it writes."""

    tokens: Tensor
    replay: Callable[[], object]
    logits: Tensor


class GraphDecoder:
    """Runs the decode steps of a cache; steps are recorded for as long as the cache keeps its tensors.

    Args:
        network: network in evaluation mode.
        make_recorder: makes a function that records what a function does, without doing it, and returns the replay and
            the tensor that holds the result after each; None to record nothing (default: CUDA graphs, where the model
            allows them). A recorder is used for as long as the cache keeps its tensors.

    Attributes:
        layers: runs steps through the layers with fewer kernels; None for transformers' layers (default: on one GPU).
        num_recorded, num_replayed: numbers of steps so far.
    """

    def __init__(self, network: Network, *, make_recorder: Callable[[], Record] | None = None) -> None:
        self.network = network
        self.num_recorded = self.num_replayed = self._num_failed = 0
        is_on_gpu = is_on_one_gpu(network)
        self._make_recorder = make_recorder or (CudaGraphRecorder if is_on_gpu else None)
        self.layers = make_decode_layers(network) if is_on_gpu and isinstance(network, Network) else None
        self._record: Record | None = None
        self._storage: tuple[KVCache, int] | None = None  # that recorded steps refer to
        self._num_steps: Counter[Key] = Counter()
        self._recorded: dict[Key, _RecordedStep] = {}  # in the order of their last use
        self._logits: Tensor | None = None  # (R, V) of recorded steps

    def restart(self) -> None:
        """Run the first steps of each shape as they are, as at the start; recorded steps are kept for those after.

        So what is recorded does not depend on earlier batches, and neither do results, even if kernels rounded in
        another way when they are recorded.
        """
        self._num_steps.clear()

    def step(self, tokens: Tensor, cache: KVCache, *, num_waiting: int = 0) -> Tensor:
        """Do the same as `Network.decode_step`."""
        cache.is_static = self._make_recorder is not None
        if self._make_recorder is None or num_waiting:
            return self.network.decode_step(tokens, cache, num_waiting=num_waiting, layers=self.layers)
        cache.reserve()
        if self._storage is None or self._storage[0] is not cache or self._storage[1] != cache.storage_version:
            self._storage, self._record = (cache, cache.storage_version), self._make_recorder()
            self._num_steps.clear()
            self._recorded.clear()
        key = cache.shape, cache.num_columns
        is_due = self._num_steps[key] >= STEPS_BEFORE_RECORDING
        self._num_steps[key] += 1
        if not is_due:
            return self._run_step(tokens, cache)
        if key not in self._recorded and not self._record_step(key, tokens, cache):
            return self._run_step(tokens, cache)
        self._recorded[key] = recorded = self._recorded.pop(key)
        cache.count_step()
        self.num_replayed += 1
        with torch.cuda.device_of(tokens):
            recorded.tokens[: len(tokens)].copy_(tokens)
            recorded.replay()
            return recorded.logits[: len(tokens)].clone()

    def _run_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        if len(self._num_steps) > len(self._recorded) + MAX_UNRECORDED:
            # Of clips of any length there are many shapes. The tables of a step that is recorded must exist before.
            self._num_steps = Counter({key: self._num_steps[key] for key in self._recorded})
            cache.keep_tables({shape for shape, _ in self._recorded})
        return self.network.decode_step(tokens, cache, layers=self.layers)

    def _record_step(self, key: Key, tokens: Tensor, cache: KVCache) -> bool:
        """Record a step and return whether that was possible."""
        assert self._record is not None
        padded = tokens.new_zeros(key[0].rows)

        def run() -> Tensor:
            found = self.network.decode_tokens(padded, cache.start_step(), cache, layers=self.layers)
            return logits.copy_(found)

        try:
            logits = self._make_logits(padded)
            with torch.cuda.device_of(tokens):
                self._recorded[key] = _RecordedStep(padded, *self._record(run))
        except Exception as error:  # noqa: BLE001, whatever the reason, steps also work unrecorded
            # Recorded steps and their memory are released. A lack of memory may pass, so recording is tried again.
            self._recorded.clear()
            self._record = self._storage = None
            self._num_failed += 1
            # The runtime reports a lack of memory for the graph itself as another error.
            is_short = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
            if not is_short or self._num_failed >= MAX_FAILED:
                logger.warning("decode steps cannot be recorded as a CUDA graph (%s); captions take longer", error)
                self._make_recorder, cache.is_static = None, False
            return False
        self.num_recorded += 1
        if len(self._recorded) > MAX_RECORDED:
            del self._recorded[next(iter(self._recorded))]
        return True

    def _make_logits(self, tokens: Tensor) -> Tensor:
        """Return where a recorded step of tokens (R,) writes its logits (R, V); it is shared, as they are copied."""
        if self._logits is None or len(self._logits) < len(tokens):
            width = self.network.lm.get_output_embeddings().out_features
            self._logits = torch.empty(len(tokens), width, dtype=torch.float32, device=tokens.device)
        return self._logits[: len(tokens)]


class CudaGraphRecorder:
    """Records what a function does on the GPU as a CUDA graph; all graphs share the memory of intermediate results."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> tuple[Callable[[], object], Tensor]:
        """Record a function."""
        graph = torch.cuda.CUDAGraph()
        stream = own_stream(torch.device("cuda", torch.cuda.current_device()), "recording")
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Other threads, which decode files or encode clips, may allocate memory meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            except BaseException:
                with suppress(RuntimeError):  # it would hide the reason
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or graph.pool()
        return graph.replay, result


def is_on_one_gpu(network: Network) -> bool:
    """Return whether all weights are whole on one GPU: neither split, sharded nor offloaded."""
    weights = list(network.parameters())  # also of a model of another library, which has no `lm`
    return all(type(one.data) is torch.Tensor and one.is_cuda and one.device == weights[0].device for one in weights)
