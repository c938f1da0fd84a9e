"""Hearing probe: find out if a model, or the server that runs it, uses the audio of a clip.

Servers drop audio silently: a chat template has no slot for it, a video reader extracts the frames alone, or an option
is not forwarded. The probe captions two clips that differ in sound alone, each twice, at temperature 0. A model that
hears answers them differently; one that does not receives the same input four times.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from salmonn.caption.generator import CaptionRequest, Generator, Sampling
from salmonn.records import Caption, Modality
from salmonn.synthetic.render import write_video
from salmonn.synthetic.scene import SynthConfig

_PROMPT = "Which sounds can be heard in this video? Describe the sounds only."
_SECONDS, _SIDE = 3, 224
# Log-probabilities of an answer differ between batches by rounding; a sound changes them by far more.
_MIN_LOGPROB_GAP, _NOISE_FACTOR = 0.01, 10.0


@dataclass(frozen=True)
class Hearing:
    """Result of a hearing probe.

    Args:
        heard: whether the sound changes the answers; None if identical requests are answered differently, so that it
            cannot be measured.
        answers: answers to the beeps, the noise, the beeps again and the noise again.
    """

    heard: bool | None
    answers: tuple[str, ...]


def probe_hearing(generator: Generator, *, modality: Modality = "both", max_new_tokens: int = 32) -> Hearing:
    """Measure whether a generator hears: with log-probabilities where it gives them, else by its answers alone.

    Args:
        generator: local model or client of a server.
        modality: what the model is given of the clips.
        max_new_tokens: token limit of an answer.

    Raises:
        ValueError: as `generator.generate`.
    """
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, logprobs=0)
    with TemporaryDirectory(prefix="salmonn-probe-") as folder:
        beeps, noise = write_probe_clips(Path(folder))
        requests = [CaptionRequest(path, _PROMPT, sampling, modality=modality) for path in (beeps, noise, beeps, noise)]
        captions = [captions[0] for captions in generator.generate(requests)]
    return Hearing(_is_heard(captions), tuple(caption.text for caption in captions))


def write_probe_clips(folder: Path) -> tuple[Path, Path]:
    """Write two clips with the same frames, one with beeps and one with noise, and return their paths."""
    config = SynthConfig(size_pixels=_SIDE, fps=5)
    rate = config.sample_rate_hz
    ramp = np.linspace(60, 200, _SIDE).astype(np.uint8)
    image = np.stack([np.broadcast_to(ramp, (_SIDE, _SIDE)), np.broadcast_to(ramp[:, None], (_SIDE, _SIDE))], axis=-1)
    image = np.concatenate([image, np.full((_SIDE, _SIDE, 1), 120, np.uint8)], axis=-1)
    frames = np.broadcast_to(image, (_SECONDS * config.fps, *image.shape))
    seconds = np.arange(_SECONDS * rate) / rate
    beeps = 0.5 * np.sin(2 * np.pi * 880 * seconds) * (seconds % 0.5 < 0.25)
    noise = 0.2 * np.random.default_rng(0).standard_normal(len(seconds))
    paths = folder / "beeps.mp4", folder / "noise.mp4"
    for path, audio in zip(paths, (beeps, noise), strict=True):
        write_video(path, frames, np.clip(audio, -1, 1).astype(np.float32), config=config)
    return paths


def _is_heard(captions: list[Caption]) -> bool | None:
    """Compare the captions of beeps, noise, beeps and noise."""
    beeps, noise, beeps_again, noise_again = captions
    if beeps.text != beeps_again.text or noise.text != noise_again.text:
        return None
    if beeps.text != noise.text:
        return True
    first, other, *again = (caption.logprob for caption in captions)
    if first is None or other is None or None in again:
        return False
    rounding = max(abs(first - again[0]), abs(other - again[1]))  # type: ignore[operator]
    return abs(first - other) > max(_MIN_LOGPROB_GAP, _NOISE_FACTOR * rounding)
