"""Decode steps that are recorded once as a CUDA graph and replayed, which costs the host one launch a token.

Launching the 1,600 kernels of a step takes the host longer than a GPU needs to run them. The first steps after a change
of the cache's layout run as they are; then one is recorded. All steps do the same: tensors of the cache are changed in
place, and the host only counts tokens and makes room.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from salmonn.model.kv_cache import KVCache
from salmonn.model.network import Network

logger = logging.getLogger(__name__)
# Recording takes as long as some steps, and layouts change as rows end. These steps also load all kernels.
STEPS_BEFORE_RECORDING = 4

Run = Callable[[], Tensor]
Record = Callable[[Run], tuple[Callable[[], object], Tensor]]


class GraphDecoder:
    """Runs the decode steps of one cache after another.

    Args:
        network: network in evaluation mode.
        record: function that records what a function does, without doing it, and returns the replay and the tensor that
            holds the result after each; None to record nothing (default: CUDA graphs, where the model allows them).
    """

    def __init__(self, network: Network, *, record: Record | None = None) -> None:
        self.network = network
        self._record = record or (record_cuda_graph if _is_on_one_gpu(network) else None)
        self._layout: tuple[KVCache, int] | None = None
        self._num_steps = 0
        self._replay: Callable[[], object] | None = None
        self._tokens = self._logits = torch.empty(0)

    @property
    def is_replaying(self) -> bool:
        """Whether a recorded step is in use."""
        return self._replay is not None

    def step(self, tokens: Tensor, cache: KVCache, *, num_waiting: int = 0) -> Tensor:
        """Do the same as `Network.decode_step`."""
        if self._record is None or num_waiting:
            return self.network.decode_step(tokens, cache, num_waiting=num_waiting)
        cache.reserve()
        if self._layout is None or self._layout[0] is not cache or self._layout[1] != cache.layout_version:
            # The recorded step refers to tensors that are gone.
            self._layout, self._num_steps, self._replay = (cache, cache.layout_version), 0, None
        if self._replay is None and self._num_steps >= STEPS_BEFORE_RECORDING:
            self._record_step(self._record, tokens, cache)
        self._num_steps += 1
        if self._replay is None:
            return self.network.decode_step(tokens, cache)
        cache.count_step()
        with torch.cuda.device_of(tokens):
            self._tokens.copy_(tokens)
            self._replay()
            return self._logits.clone()

    def _record_step(self, record: Record, tokens: Tensor, cache: KVCache) -> None:
        self._tokens = tokens.clone()
        run = lambda: self.network.decode_tokens(self._tokens, cache.start_step(), cache)  # noqa: E731
        try:
            with torch.cuda.device_of(tokens):
                self._replay, self._logits = record(run)
        except Exception as error:  # noqa: BLE001, whatever the reason, steps also work unrecorded
            logger.warning("decode steps cannot be recorded as a CUDA graph (%s); captions take longer", error)
            self._record = None


def record_cuda_graph(run: Run) -> tuple[Callable[[], object], Tensor]:
    """Record what a function does on the GPU as a CUDA graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Other threads, which decode files or encode clips, may allocate memory meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result


def _is_on_one_gpu(network: Network) -> bool:
    """Return whether all weights are whole on one GPU: neither split, sharded nor offloaded."""
    weights = list(network.parameters())  # also of a model of another library, which has no `lm`
    return all(type(one.data) is torch.Tensor and one.is_cuda and one.device == weights[0].device for one in weights)
