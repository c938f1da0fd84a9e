"""Copies between main memory and a GPU while it computes. On a CPU the same calls copy nothing.

reader threads    pin clip 3 ...
copy stream            clip 2 to the GPU    features of clip 1 to main memory
main stream       encode clip 1             encode clip 2
"""

from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor

from salmonn.model.layout import ClipInputs


@cache
def own_stream(device: torch.device, purpose: str) -> torch.cuda.Stream | None:
    """Return the stream of a GPU for a purpose; None on a CPU.

    PyTorch has 32 streams for each GPU and hands them out in turn. If each recording of a decode step asked for one, it
    would get that of the encoders in the end, and record what another thread starts there.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class CopyStream:
    """A stream of a GPU for copies; without a GPU all copies are made at once.

    Args:
        device: device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = own_stream(device, "copies")

    def to_device(self, clip: ClipInputs) -> ClipInputs:
        """Copy a clip to the device; later computations wait for it, and those already started do not."""
        with torch.cuda.stream(self._stream):
            copied = clip.to(self.device)
        if self._stream is not None:
            main = torch.cuda.current_stream(self.device)
            main.wait_stream(self._stream)
            for tensor in (copied.pixels, copied.mel):
                tensor.record_stream(main)  # else this stream could reuse its memory for the next clip
        return copied

    def mark(self) -> torch.cuda.Event | None:
        """Return the point that the computations have been started up to, for `to_host`; None on a CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None

    def to_host(self, tensor: Tensor, computed: torch.cuda.Event | None) -> Tensor:
        """Copy a result to main memory and wait for it, but not for computations started after it.

        Args:
            tensor: result.
            computed: `mark` after it was started.
        """
        with torch.cuda.stream(self._stream):
            if self._stream is not None and computed is not None:
                self._stream.wait_event(computed)
            return tensor.cpu()


class SideStream:
    """A stream of a GPU for computations alongside those of the main stream; without a GPU they are done at once.

    Args:
        device: device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = own_stream(device, "encoders")
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which may still be loading weights

    def use(self) -> AbstractContextManager[None]:
        """Start all work of this thread within the block on the stream."""
        context: AbstractContextManager[None] = torch.cuda.stream(self._stream)
        return context

    def mark(self) -> torch.cuda.Event | None:
        """Return the point that work has been started up to, for `join`; None on a CPU."""
        return self._stream.record_event() if self._stream is not None else None

    def join(self, tensor: Tensor, computed: torch.cuda.Event | None) -> None:
        """Let later computations on the main stream wait for a result.

        Args:
            tensor: result.
            computed: `mark` after it was started.
        """
        if computed is not None:
            main = torch.cuda.current_stream(self.device)
            main.wait_event(computed)
            tensor.record_stream(main)  # else this stream could reuse its memory while the main one reads it
