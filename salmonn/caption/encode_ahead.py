"""Encode the next clips of a folder on a GPU while earlier ones are decoded.

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


def encode_ahead(
    captioner: "Captioner", clips: Iterable[ReadResult[TimedInputs]], *, is_ahead: bool | None = None
) -> Iterator[ReadResult[TimedInputs]]:
    """Yield clips in order, with features, which the device may still be computing, instead of inputs.

    Args:
        captioner: local model.
        clips: clips, or why they cannot be read.
        is_ahead: whether to encode up to `NUM_AHEAD` further clips in a thread (default: on a GPU); otherwise clips
            are yielded unchanged, and encoded with their prompts.
    """
    if is_ahead is None:
        is_ahead = captioner.network.device.type == "cuda"
    if not is_ahead:
        yield from clips
        return
    encoder, waiting = _Encoder(captioner), deque[tuple[ReadResult[TimedInputs], Future[_Encoded] | None]]()

    def take() -> ReadResult[TimedInputs]:
        (job, clip), future = waiting.popleft()
        if future is None or isinstance(clip, ValueError):
            return job, clip
        inputs = encoder.join(*future.result())
        return job, replace(clip, inputs=inputs, must_run_alone=isinstance(inputs, ClipInputs))

    pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
    try:
        for job, clip in clips:
            future = None if isinstance(clip, ValueError) else pool.submit(encoder.encode, clip.inputs)
            waiting.append(((job, clip), future))
            if len(waiting) > NUM_AHEAD:
                yield take()
        while waiting:
            yield take()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, clips that wait are not encoded


class _Encoder:
    """Copies and encodes clips while the main stream works.

    Args:
        captioner: local model.
    """

    def __init__(self, captioner: "Captioner") -> None:
        device = captioner.network.device
        self._captioner, self._stream, self._copies = captioner, SideStream(device), CopyStream(device)

    def encode(self, inputs: ClipInputs | ClipFeatures) -> "_Encoded":
        """Start encoding a clip; if memory is short, return its inputs unchanged."""
        assert isinstance(inputs, ClipInputs)
        try:
            with self._stream.use():
                (features,) = self._captioner.encode_on_device([self._copies.to_device(inputs)])
        except torch.OutOfMemoryError:
            return inputs, None
        return features, self._stream.mark()

    def join(self, clip: ClipInputs | ClipFeatures, computed: torch.cuda.Event | None) -> ClipInputs | ClipFeatures:
        """Let the main stream wait for the features of a clip, where it uses them."""
        if isinstance(clip, ClipFeatures):
            self._stream.join(clip.tokens, computed)
        return clip
