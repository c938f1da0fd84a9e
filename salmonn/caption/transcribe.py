"""Speech recognition with Whisper (openai-whisper, the extra `speech`).

    transcriber = WhisperTranscriber.load(WhisperConfig("large-v3"))
    transcriber.transcribe(read_clip("talk.mp4", sampler, video=False).waveform)

Whisper writes fluent sentences over silence and noise. `to_speech` drops what is probably not spoken, and counts it.
Neither torch nor whisper is imported before a model is loaded: the command line imports this module for its flags.
"""

import importlib
import math
import pickle
import urllib.error
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.speech import SpeechEvent, SpokenWord

if TYPE_CHECKING:
    from salmonn.caption.forced_alignment import ForcedAligner

NOT_INSTALLED = "transcribing needs openai-whisper: pip install 'salmonn[speech]'"
# Limits of Whisper's own decoder: text above this compression ratio is a loop.
MAX_COMPRESSION_RATIO = 2.4
# Below this level, in dB relative to full scale, nothing can be understood; room tone is at about -60.
SILENCE_DB = -55.0
_FRAME_SAMPLES = SAMPLE_RATE_HZ * 30 // 1000
_HALLUCINATION_SECONDS = 2.0  # Whisper's own test: anomalous words between silences of this length are dropped


@dataclass(frozen=True)
class WhisperConfig:
    """Speech recognition.

    Args:
        whisper_model: name of a published model, which is downloaded once, or path of a checkpoint (.pt).
        language: language that is spoken, as a name or code; none detects it in the first 30 seconds of each file.
        device: cpu, cuda, ...; none is cuda if there is a GPU.
        dtype: data type of the computation; auto is float16 on a GPU and float32 on a CPU.
        word_times: "whisper" takes the times of words from Whisper's attention, "torchaudio" aligns the words to the
            audio with a CTC model (MMS_FA), which needs torchaudio and reads Latin letters only.
        no_speech_threshold: a 30-second window whose probability of no speech is above this is dropped, even where
            Whisper is sure of its text; 1 keeps all.
    """

    whisper_model: str = "large-v3"
    language: str | None = None
    device: str | None = None
    dtype: Literal["auto", "float32", "float16"] = "auto"
    word_times: Literal["whisper", "torchaudio"] = "whisper"
    no_speech_threshold: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.no_speech_threshold <= 1:
            raise ValueError(f"no_speech_threshold must be above 0 and at most 1, got {self.no_speech_threshold}")


@dataclass(frozen=True)
class Transcription:
    """What was recognized in an audio track.

    Args:
        speech: utterances by time.
        language: code of the language; "" if nothing was recognized.
        warnings: what was left out, one sentence each.
    """

    speech: tuple[SpeechEvent, ...] = ()
    language: str = ""
    warnings: tuple[str, ...] = ()


class Transcriber(Protocol):
    """A speech recognizer."""

    name: str

    def transcribe(self, waveform: np.ndarray, *, seed: int = 0) -> Transcription:
        """Recognize the speech in a waveform (S,) at 16 kHz; the seed is that of samples, where greedy decoding fails.

        Raises:
            RuntimeError: the device failed, for example for lack of memory.
        """
        ...


class WhisperTranscriber:
    """A Whisper model.

    Args:
        model: `whisper.Whisper` on its device.
        config: settings.
        aligner: aligns words to the audio, if Whisper's own times of words are not wanted.
    """

    def __init__(self, model: Any, config: WhisperConfig, *, aligner: "ForcedAligner | None" = None) -> None:
        self.name = f"whisper {config.whisper_model}"
        self._model = model
        self._config = config
        self._aligner = aligner

    @classmethod
    def load(cls, config: WhisperConfig) -> "WhisperTranscriber":
        """Load a model.

        Raises:
            ValueError: whisper or torchaudio is not installed; there is no such model, language or device; or the model
                cannot be downloaded.
        """
        check_config(config)
        import torch  # noqa: PLC0415

        from salmonn.caption.forced_alignment import ForcedAligner  # noqa: PLC0415

        whisper = import_whisper()
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if config.dtype == "float16" and torch.device(device).type == "cpu":
            raise ValueError("Whisper cannot compute in float16 on a CPU; use dtype float32 or auto")
        aligner = ForcedAligner.load(device) if config.word_times == "torchaudio" else None
        name = config.whisper_model
        try:
            model = whisper.load_model(name, device=device)
        except (urllib.error.URLError, ConnectionError) as error:
            raise ValueError(
                f"the Whisper model {name} cannot be downloaded ({error}); copy its checkpoint here and pass the path "
                "as whisper_model"
            ) from error
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the Whisper model {name} cannot be loaded ({reason}); pass a checkpoint of openai-whisper or a name"
            ) from error
        if not model.is_multilingual and config.language and language_code(config.language) != "en":
            raise ValueError(f"the Whisper model {name} is English only; omit language {config.language}")
        return cls(model, config, aligner=aligner)

    def transcribe(self, waveform: np.ndarray, *, seed: int = 0) -> Transcription:
        """See `Transcriber`."""
        if is_silent(waveform):
            return Transcription()
        import torch  # noqa: PLC0415

        is_half = self._config.dtype == "float16" or (
            self._config.dtype == "auto" and self._model.device.type == "cuda"
        )
        with torch.random.fork_rng(devices=[self._model.device] if self._model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            found = import_whisper().transcribe(
                self._model,
                np.ascontiguousarray(waveform, np.float32),
                language=self._config.language and language_code(self._config.language),
                word_timestamps=True,
                condition_on_previous_text=False,  # a loop does not continue in the next window
                hallucination_silence_threshold=_HALLUCINATION_SECONDS,
                fp16=is_half,
            )
        transcription = to_speech(
            found["segments"], waveform, language=found["language"], threshold=self._config.no_speech_threshold
        )
        return self._aligner.align(waveform, transcription) if self._aligner else transcription


def to_speech(
    segments: Sequence[Mapping[str, Any]], waveform: np.ndarray, *, language: str, threshold: float
) -> Transcription:
    """Convert Whisper's segments to utterances, without those that are probably not spoken.

    Dropped are segments in whose time the audio is silent; segments of windows that are probably without speech, of
    which Whisper itself keeps those that it is sure of; and loops.

    Args:
        segments: segments with the words' times, in seconds.
        waveform: (S,) audio at 16 kHz.
        language: code of the language.
        threshold: highest probability of no speech.
    """
    speech: list[SpeechEvent] = []
    dropped = Counter[str]()
    for segment in segments:
        if not segment["text"].strip():
            continue
        words = tuple(_to_word(word) for word in segment.get("words", ()) if word["word"].strip())
        start = words[0].start_seconds if words else float(segment["start"])
        end = words[-1].end_seconds if words else float(segment["end"])
        if is_silent(waveform[_to_sample(start, math.floor) : max(_to_sample(end, math.ceil), 1)]):
            dropped["silence"] += 1
        elif segment["no_speech_prob"] > threshold:
            dropped["probably no speech"] += 1
        elif segment["compression_ratio"] > MAX_COMPRESSION_RATIO:
            dropped["a loop"] += 1
        else:
            speech.append(SpeechEvent(segment["text"].strip(), round(start, 3), round(end, 3), words))
    reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(dropped.items()))
    total = dropped.total()
    warnings = (f"dropped {total} recognized sentence{'s' if total > 1 else ''}: {reasons}",) if total else ()
    return Transcription(tuple(speech), language if speech else "", warnings)


def is_silent(waveform: np.ndarray) -> bool:
    """Return whether no 30 ms of a waveform (S,) reach `SILENCE_DB`; also of an empty one."""
    power = np.square(waveform, dtype=np.float64)
    sums = np.add.reduceat(power, np.arange(0, len(power), _FRAME_SAMPLES)) if len(power) else power
    return not bool((sums > _FRAME_SAMPLES * 10 ** (SILENCE_DB / 10)).any())


def import_whisper() -> ModuleType:
    """Import openai-whisper; raises a ValueError that says how to install it."""
    try:
        module = importlib.import_module("whisper")
    except ImportError as error:
        raise ValueError(f"{NOT_INSTALLED} ({error})") from error
    if not hasattr(module, "load_model"):
        raise ValueError(f"the package `whisper` that is installed is another one; {NOT_INSTALLED}")
    return module


def check_config(config: WhisperConfig) -> None:
    """Raise a ValueError if whisper is not installed, or has no such model or language."""
    names = import_whisper().available_models()
    if config.whisper_model not in names and not Path(config.whisper_model).is_file():
        raise ValueError(
            f"the Whisper model {config.whisper_model} is neither a file nor a known name; the names are "
            f"{', '.join(names)}"
        )
    if config.language is not None:
        language_code(config.language)


def language_code(language: str) -> str:
    """Return Whisper's code of a language that is given by name or code; raises a ValueError for an unknown one."""
    tokenizer = importlib.import_module("whisper.tokenizer")
    name = language.strip().lower()
    if name in tokenizer.LANGUAGES:
        return name
    if name not in tokenizer.TO_LANGUAGE_CODE:
        raise ValueError(f"Whisper does not know the language {language}; use a name or code such as english or en")
    return str(tokenizer.TO_LANGUAGE_CODE[name])


def _to_word(word: Mapping[str, Any]) -> SpokenWord:
    start = round(float(word["start"]), 3)
    return SpokenWord(
        word["word"].strip(), start, max(start, round(float(word["end"]), 3)), round(float(word["probability"]), 4)
    )


def _to_sample(seconds: float, rounded: Any) -> int:
    return max(0, int(rounded(seconds * SAMPLE_RATE_HZ)))
