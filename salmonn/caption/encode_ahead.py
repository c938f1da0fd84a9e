"""Encode the next clips on a GPU while earlier ones are decoded.

reader        read clip 4
thread            copy and encode clip 3, on separate streams
main stream       decode captions of clips 1 and 2
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from salmonn.caption.loader import ReadResult
from salmonn.media.clip import Clip
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.model.memory import NumberSizes, encoder_workspace
from salmonn.model.network import Network
from salmonn.model.transfer import CopyStream, SideStream

if TYPE_CHECKING:
    from salmonn.caption.captioner import Captioner

_Encoded = tuple[ClipInputs | ClipFeatures, torch.cuda.Event | None]
NUM_AHEAD = 2  # clips whose features wait in the memory of the GPU


@dataclass(frozen=True)
class TimedInputs:
    """The inputs of a clip, or its features, and its length in seconds.

    Args:
        inputs: inputs or features.
        seconds: length.
        must_run_alone: whether memory was too short to encode it while others were decoded.
    """

    inputs: ClipInputs | ClipFeatures
    seconds: float
    must_run_alone: bool = False

    @classmethod
    def of(cls, prepare: Callable[[Clip], ClipInputs], clip: Clip) -> "TimedInputs":
        """Convert a clip that was read by `Captioner.prepare`."""
        return cls(prepare(clip), clip.duration_seconds)


class ClipEncoder:
    """Copies and encodes clips in a thread, on separate streams, while the main stream works.

    Args:
        captioner: local model.

    Attributes:
        reserved_bytes: memory that the largest clip so far has needed, with the features of `NUM_AHEAD` that wait.
    """

    def __init__(self, captioner: "Captioner") -> None:
        device = captioner.network.device
        self.reserved_bytes = 0
        self._captioner, self._stream, self._copies = captioner, SideStream(device), CopyStream(device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._started: dict[int, tuple[ClipInputs, Future[_Encoded]]] = {}  # by id of the clip

    def start(self, clip: ClipInputs | ClipFeatures) -> None:
        """Start encoding a clip, unless that has been started, or it has features."""
        if isinstance(clip, ClipInputs) and id(clip) not in self._started:
            self._started[id(clip)] = clip, self._pool.submit(self._encode, clip)

    def start_first(self, clips: Iterable[ClipInputs | ClipFeatures]) -> None:
        """Start encoding the first `NUM_AHEAD` of waiting clips, and forget the features of all that do not wait."""
        waiting = {id(clip): clip for clip in clips}
        for key in [key for key in self._started if key not in waiting]:
            self._started.pop(key)[1].cancel()
        for clip in waiting.values():
            if len(self._started) >= NUM_AHEAD:
                break
            self.start(clip)

    def is_ready(self, clip: ClipInputs | ClipFeatures) -> bool:
        """Return whether a clip need not be waited for, by the host or the main stream."""
        if not isinstance(clip, ClipInputs):
            return True
        if id(clip) not in self._started:
            return False
        future = self._started[id(clip)][1]
        if not future.done() or future.exception() is not None:
            return future.done()
        computed = future.result()[1]
        return computed is None or computed.query()

    def take(self, clip: ClipInputs | ClipFeatures) -> ClipInputs | ClipFeatures:
        """Return the features of a clip, which the main stream waits for; if memory was short, the clip unchanged."""
        if id(clip) not in self._started:
            return clip
        encoded, computed = self._started.pop(id(clip))[1].result()
        if isinstance(encoded, ClipFeatures):
            self._stream.join(encoded.tokens, computed)
        return encoded

    def copy_to_host(self, features: ClipFeatures, use: Callable[[ClipFeatures], object]) -> None:
        """Copy features of this encoder to main memory in its thread, and pass them on."""

        def copy() -> None:
            with self._stream.use():
                use(replace(features, tokens=features.tokens.cpu()))

        self._pool.submit(copy)

    def close(self) -> None:
        """End the thread; clips that wait for it, as after an error, are not encoded."""
        self._pool.shutdown(cancel_futures=True)

    def _encode(self, clip: ClipInputs) -> _Encoded:
        captioner = self._captioner
        try:
            with self._stream.use():
                (features,) = captioner.encode_on_device([self._copies.to_device(clip)])
        except torch.OutOfMemoryError:
            return clip, None
        size = captioner.network.dtype.itemsize
        workspace = encoder_workspace(captioner.network, clip, NumberSizes(size, size))
        self.reserved_bytes = max(self.reserved_bytes, workspace + (NUM_AHEAD + 1) * features.tokens.nbytes)
        return features, self._stream.mark()


def make_encoder(captioner: "Captioner") -> ClipEncoder | None:
    """Return what encodes clips ahead on a GPU; on a CPU, and with models without a family, prompts encode them."""
    network = captioner.network
    return ClipEncoder(captioner) if isinstance(network, Network) and network.device.type == "cuda" else None


def encode_ahead(
    clips: Iterable[ReadResult[TimedInputs]], encoder: ClipEncoder | None
) -> Iterator[ReadResult[TimedInputs]]:
    """Yield clips in order, with features, which the device may still be computing, instead of inputs.

    Args:
        clips: clips, or why they cannot be read.
        encoder: encoder of the `NUM_AHEAD` clips after each, which is closed in the end; without one, clips are yielded
            unchanged.
    """
    if encoder is None:
        yield from clips
        return
    waiting = deque[ReadResult[TimedInputs]]()

    def take() -> ReadResult[TimedInputs]:
        job, clip = waiting.popleft()
        if isinstance(clip, ValueError):
            return job, clip
        inputs = encoder.take(clip.inputs)
        return job, replace(clip, inputs=inputs, must_run_alone=isinstance(inputs, ClipInputs))

    try:
        for job, clip in clips:
            if not isinstance(clip, ValueError):
                encoder.start(clip.inputs)
            waiting.append((job, clip))
            if len(waiting) > NUM_AHEAD:
                yield take()
        while waiting:
            yield take()
    finally:
        encoder.close()
