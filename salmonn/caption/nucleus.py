"""Nucleus sampling from given random numbers, without waiting for the device.

A nucleus rarely has more than 1,024 tokens, and selecting these takes much less time than sorting 152,000. Whether they
suffice is known on the device only. So tokens are drafted from them, and what depends on these tokens is started; the
few rows with a larger nucleus are corrected later, from all tokens.
"""

import torch
from torch import Tensor

from salmonn.caption.generator import Sampling

NUCLEUS_TOKENS = 1024  # most likely tokens in which a nucleus is looked for before all are sorted


class HostCopy:
    """A tensor on its way to main memory.

    It arrives when the work that was started before is done; `tolist` on the device would wait for later work, too.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def read(self) -> Tensor:
        """Wait for the tensor and return it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


class TokenDraft:
    """One token per row, sampled from the most likely tokens, or the most likely one at temperature 0.

    Args:
        logits: (R, V) logits.
        uniforms: (R,) uniform random numbers from [0, 1).
        sampling: temperature and nucleus.

    Attributes:
        tokens: (R,) token ids; final once `is_final` or after `correct`.
    """

    def __init__(self, logits: Tensor, uniforms: Tensor, *, sampling: Sampling) -> None:
        self._uniforms, self._top_p = uniforms, sampling.top_p
        self._has_nucleus: Tensor | None = None  # (R,) rows whose nucleus is among the most likely tokens
        self._are_final: HostCopy | None = None
        if not sampling.temperature:
            self.tokens = logits.argmax(-1)
            return
        self._probabilities = (logits / sampling.temperature).softmax(-1)
        if logits.shape[-1] <= 4 * NUCLEUS_TOKENS or sampling.top_p >= 1:
            self.tokens = self._sample_sorted()
            return
        top, ids = self._probabilities.topk(NUCLEUS_TOKENS, dim=-1)
        self.tokens = _sample_nucleus(top, ids, uniforms, top_p=sampling.top_p)
        self._has_nucleus = top.sum(-1) >= sampling.top_p
        self._are_final = HostCopy(self._has_nucleus.all())

    @property
    def is_final(self) -> bool:
        """Whether no token needs correction; waits for the device."""
        return self._are_final is None or bool(self._are_final.read())

    def correct(self) -> None:
        """Sample the tokens of rows with a larger nucleus from all tokens; does not wait for the device."""
        if self._has_nucleus is not None:
            self.tokens = self.tokens.where(self._has_nucleus, self._sample_sorted())
        self._are_final = None

    def _sample_sorted(self) -> Tensor:
        probabilities, ids = self._probabilities.sort(dim=-1, descending=True)
        return _sample_nucleus(probabilities, ids, self._uniforms, top_p=self._top_p)


def _sample_nucleus(probabilities: Tensor, ids: Tensor, uniforms: Tensor, *, top_p: float) -> Tensor:
    """Sample one token per row from the nucleus.

    Args:
        probabilities: (R, K) in descending order.
        ids: (R, K) token ids.
        uniforms: (R,) uniform random numbers from [0, 1).
        top_p: probability of the nucleus.

    Returns:
        (R,) token ids.
    """
    cumulative = probabilities.cumsum(-1)
    # A token belongs to the nucleus if the more likely tokens together do not reach top_p; the first always does. The
    # clamp is for NaN logits, for which no token would: an index out of range would abort all work on a GPU.
    sizes = (cumulative - probabilities < top_p).sum(-1, keepdim=True).clamp(min=1)
    nucleus = cumulative.gather(-1, sizes - 1)
    index = torch.searchsorted(cumulative, uniforms[:, None] * nucleus, right=True)
    return ids.gather(-1, index.minimum(sizes - 1)).squeeze(-1)
