"""Times of words by CTC forced alignment with torchaudio's multilingual model (MMS_FA, arXiv 2305.13516).

torchaudio is not a dependency: its wheels link CUDA, and it announced in 2.8 that the functions used here would go.
"""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.speech import SpeechEvent

if TYPE_CHECKING:
    from salmonn.caption.transcribe import Transcription

_MARGIN_SECONDS = 0.3  # around an utterance, whose times are rough


class ForcedAligner:
    """A CTC model with its tokenizer and aligner, as `torchaudio.pipelines.MMS_FA` makes them.

    Args:
        model: maps a waveform (1, S) to emissions (1, T, V) and lengths.
        tokenizer: maps words to token ids.
        aligner: maps emissions (T, V) and the words' ids to the token spans of each word, in frames.
        letters: characters that the model reads.
        device: device of the model.
    """

    def __init__(self, model: Any, tokenizer: Any, aligner: Any, *, letters: Sequence[str], device: str) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._aligner = aligner
        self._letters = frozenset(letters)
        self._device = device

    @classmethod
    def load(cls, device: str) -> "ForcedAligner":
        """Load the model, which is downloaded once; raises a ValueError if torchaudio cannot do it."""
        try:
            torchaudio = importlib.import_module("torchaudio")
        except (ImportError, OSError) as error:  # OSError: its wheel is for another build of torch
            raise ValueError(
                f"word_times torchaudio needs torchaudio of the same version and build as torch ({error}); use "
                "word_times whisper"
            ) from error
        bundle = getattr(getattr(torchaudio, "pipelines", None), "MMS_FA", None)
        if bundle is None:
            raise ValueError(
                f"torchaudio {torchaudio.__version__} has no forced alignment; install another version, or use "
                "word_times whisper"
            )
        try:
            model = bundle.get_model(with_star=False).to(device)
        except OSError as error:  # URLError is one
            raise ValueError(f"torchaudio's alignment model cannot be loaded: {error}") from error
        letters = [letter for letter in bundle.get_dict(star=None) if len(letter) == 1 and letter not in "-*"]
        return cls(model, bundle.get_tokenizer(), bundle.get_aligner(), letters=letters, device=device)

    def align(self, waveform: np.ndarray, transcription: "Transcription") -> "Transcription":
        """Return a transcription with the aligned times of its words.

        Utterances with a word that the model cannot read, such as digits or Chinese, or that cannot be aligned, keep
        their times; a warning counts them.

        Args:
            waveform: (S,) audio at 16 kHz.
            transcription: utterances with rough times of words.
        """
        speech = [self._align_one(waveform, one) for one in transcription.speech]
        count = sum(one is None for one in speech)
        kept = tuple(new or old for new, old in zip(speech, transcription.speech, strict=True))
        note = f"{count} of {len(speech)} sentences keep Whisper's times, since torchaudio cannot align their words"
        return replace(transcription, speech=kept, warnings=(*transcription.warnings, *([note] if count else [])))

    def _align_one(self, waveform: np.ndarray, speech: SpeechEvent) -> SpeechEvent | None:
        import torch  # noqa: PLC0415

        words = ["".join(letter for letter in word.text.lower() if letter in self._letters) for word in speech.words]
        if not words or not all(words):
            return None
        first = max(0.0, (speech.start_seconds or 0.0) - _MARGIN_SECONDS)
        last = (speech.end_seconds or 0.0) + _MARGIN_SECONDS
        part = waveform[int(first * SAMPLE_RATE_HZ) : int(last * SAMPLE_RATE_HZ)]
        try:
            with torch.inference_mode():
                emissions, _ = self._model(torch.from_numpy(np.ascontiguousarray(part))[None].to(self._device))
                spans = self._aligner(emissions[0], self._tokenizer(words))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # more tokens than frames
            return None
        frame_seconds = len(part) / SAMPLE_RATE_HZ / emissions.shape[1]
        aligned = tuple(
            replace(
                word,
                start_seconds=round(first + found[0].start * frame_seconds, 3),
                end_seconds=round(first + found[-1].end * frame_seconds, 3),
            )
            for word, found in zip(speech.words, spans, strict=True)
        )
        start, end = aligned[0].start_seconds, aligned[-1].end_seconds
        return replace(speech, words=aligned, start_seconds=start, end_seconds=end)
