"""Completions for clips that have been read or encoded before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.prompt import Prompt
from salmonn.caption.streaming import Completion
from salmonn.model.layout import ClipInfo


def complete(
    captioner: Captioner,
    clips: Sequence[Any],
    prompts: Sequence[str | Prompt],
    *,
    num_samples: int = 1,
    seeds: Sequence[int] | None = None,
    sampling: Any = None,
    **options: Any,
) -> list[Completion]:
    """Answer prompts[i] about clips[i]; seeds are 0, 1, 2, ... by default."""
    requests = [
        CaptionRequest(Path("clip"), prompt, sampling, seed=seed, num_samples=num_samples)
        if isinstance(prompt, str)
        else CaptionRequest(
            Path("clip"), prompt.text, sampling, seed=seed, history=prompt.history, system=prompt.system
        )
        for prompt, seed in zip(prompts, range(len(prompts)) if seeds is None else seeds, strict=True)
    ]
    samples = captioner.generate(requests, clips=clips, **options)
    return [
        Completion(caption.text, caption.finished, ClipInfo(caption.modality, caption.complete, caption.warnings))
        for captions in samples
        for caption in captions
    ]
