"""Speech recognition: a tiny real Whisper, scripted segments, torchaudio, and a script in its place."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from salmonn.caption.read_spec import AudioReadSpec
from salmonn.caption.transcribe import (
    Transcription,
    WhisperConfig,
    WhisperTranscriber,
    is_silent,
    language_code,
    to_speech,
)
from salmonn.media.container import ClipError
from salmonn.speech import SpeechEvent, SpokenWord

RATE = 16_000
SCRIPT = "<|0.00|> Good morning, everyone.<|2.00|><|2.40|> We leave at nine.<|3.80|>"


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def segment(text, start, end, *, no_speech=0.0, compression=1.0, words=None) -> dict:
    words = [{"word": text, "start": start, "end": end, "probability": 0.9}] if words is None else words
    return dict(text=text, start=start, end=end, words=words, no_speech_prob=no_speech, compression_ratio=compression)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("whisper", reason="openai-whisper is not installed (the extra speech)")
    from whisper import timing

    from tests.whisper_model import write_whisper

    path = tmp_path_factory.mktemp("whisper") / "tiny.pt"
    write_whisper(path, SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dtw_cpu", "backtrace"):  # numba takes seconds to compile them
            patch.setattr(timing, name, getattr(timing, name).py_func)
        yield path


def test_whisper_writes_words_with_times(checkpoint):
    transcriber = WhisperTranscriber.load(WhisperConfig(str(checkpoint)))
    before = torch.random.get_rng_state()
    found = transcriber.transcribe(noise(5), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [one.text for one in found.speech] == ["Good morning, everyone.", "We leave at nine."]
    assert (found.language, found.warnings) == ("en", ())
    words = [word for one in found.speech for word in one.words]
    assert [word.text for word in words] == ["Good", "morning,", "everyone.", "We", "leave", "at", "nine."]
    # The model attends to 0 s at the first word and to 2.4 s at the fourth; Whisper smooths over some 0.4 s.
    assert words[0].start_seconds == pytest.approx(0.0, abs=0.5) and words[3].start_seconds == pytest.approx(
        2.4, abs=0.5
    )
    assert all(word.start_seconds <= word.end_seconds for word in words)
    assert found.speech[1].start_seconds == words[3].start_seconds
    assert transcriber.transcribe(np.zeros(RATE, np.float32)) == Transcription()
    assert transcriber.transcribe(noise(0)) == Transcription()


def test_the_language_is_detected_or_given(tmp_path, checkpoint):
    from tests.whisper_model import write_whisper

    write_whisper(tmp_path / "fr.pt", "<|0.00|> Bonjour.<|1.50|>", language="fr")
    transcriber = WhisperTranscriber.load(WhisperConfig(str(tmp_path / "fr.pt")))
    found = transcriber.transcribe(noise(2))
    assert (found.language, [one.text for one in found.speech]) == ("fr", ["Bonjour."])
    assert (
        WhisperTranscriber.load(WhisperConfig(str(checkpoint), language="English")).transcribe(noise(5)).language
        == "en"
    )
    write_whisper(tmp_path / "en.pt", "<|0.00|> Hello.<|1.50|>", language=None)
    assert WhisperTranscriber.load(WhisperConfig(str(tmp_path / "en.pt"))).transcribe(noise(2)).language == "en"
    with pytest.raises(ValueError, match="English only; omit language french"):
        WhisperTranscriber.load(WhisperConfig(str(tmp_path / "en.pt"), language="french"))


def test_what_is_probably_not_spoken_is_dropped_and_counted():
    """Speech from 0 to 2 s, then silence with two sentences that Whisper likes to write there, and a loop."""
    waveform = np.concatenate([noise(2), np.zeros(4 * RATE, np.float32), noise(4)])
    segments = [
        segment(" Hello.", 0.2, 1.0),
        segment(" Thanks for watching!", 3.0, 5.0),  # whatever its probability, nothing is heard
        segment(" Thank you.", 6.5, 7.0, no_speech=0.9),
        segment(" and so on and so on and so on", 7.0, 8.0, compression=3.1),
        segment(" ", 8.0, 8.5),
        segment(" Bye.", 9.0, 9.9, no_speech=0.6),
    ]
    found = to_speech(segments, waveform, language="en", threshold=0.6)
    assert [(one.text, one.start_seconds, one.end_seconds) for one in found.speech] == [
        ("Hello.", 0.2, 1.0),
        ("Bye.", 9.0, 9.9),
    ]
    assert found.warnings == ("dropped 3 recognized sentences: a loop (1), probably no speech (1), silence (1)",)
    kept = to_speech(segments[2:3], waveform, language="en", threshold=1.0)
    assert [one.text for one in kept.speech] == ["Thank you."] and kept.warnings == ()
    nothing = to_speech(segments[1:2], waveform, language="en", threshold=0.6)
    assert (nothing.speech, nothing.language) == ((), "")


def test_words_define_the_time_of_a_sentence():
    words = [
        {"word": " Go", "start": np.float64(0.51), "end": 0.8, "probability": 0.95},
        {"word": " home.", "start": 0.8, "end": 0.79, "probability": np.float64(0.5)},
        {"word": " ", "start": 1.0, "end": 1.1, "probability": 0.1},
    ]
    (one,) = to_speech([segment(" Go home.", 0.0, 3.0, words=words)], noise(3), language="en", threshold=0.6).speech
    expected = (SpokenWord("Go", 0.51, 0.8, 0.95), SpokenWord("home.", 0.8, 0.8, 0.5))
    assert one == SpeechEvent("Go home.", 0.51, 0.8, expected)
    (untimed,) = to_speech([segment(" Go.", 1.0, 2.0, words=[])], noise(3), language="en", threshold=0.6).speech
    assert untimed == SpeechEvent("Go.", 1.0, 2.0)


def test_silence_is_below_a_level():
    assert is_silent(np.zeros(0)) and is_silent(np.full(RATE, 10 ** (-56 / 20)))
    assert not is_silent(np.full(RATE, 10 ** (-54 / 20)))
    click = np.zeros(RATE)
    click[RATE // 2 : RATE // 2 + 480] = 0.1
    assert not is_silent(click)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whisper_model": "huge"}, "huge is neither a file nor a known name; the names are .*large-v3"),
        ({"language": "klingon"}, "does not know the language klingon"),
        ({"device": "cpu", "dtype": "float16"}, "float16 on a CPU; use dtype float32 or auto"),
        ({"word_times": "torchaudio"}, "word_times torchaudio needs torchaudio"),
    ],
)
def test_impossible_settings(checkpoint, monkeypatch, options, message):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(ValueError, match=message):
        WhisperTranscriber.load(WhisperConfig(**{"whisper_model": str(checkpoint)} | options))
    with pytest.raises(ValueError, match=r"at most 1, got 2\.0"):
        WhisperConfig(no_speech_threshold=2.0)


def test_models_that_cannot_be_loaded(checkpoint, tmp_path, monkeypatch):
    import whisper

    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(ValueError, match=r"cannot be loaded .*; pass a checkpoint of openai-whisper"):
            WhisperTranscriber.load(WhisperConfig(str(tmp_path / name)))
    # Nothing listens there: as without a network.
    monkeypatch.setitem(whisper._MODELS, "tiny", f"http://127.0.0.1:9/{'0' * 64}/tiny.pt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"tiny cannot be downloaded .*copy its checkpoint here"):
        WhisperTranscriber.load(WhisperConfig("tiny"))


def test_without_whisper_or_with_another_package_of_that_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper", None)
    with pytest.raises(ValueError, match=r"needs openai-whisper: pip install 'salmonn\[speech\]'"):
        WhisperTranscriber.load(WhisperConfig())
    monkeypatch.setitem(sys.modules, "whisper", SimpleNamespace(create=None))
    with pytest.raises(ValueError, match="is another one; transcribing needs openai-whisper"):
        WhisperTranscriber.load(WhisperConfig())


def test_language_codes(checkpoint):
    assert [language_code(name) for name in ("en", "English", " mandarin ", "zh")] == ["en", "en", "zh", "zh"]


def test_a_video_without_audio_is_a_clip_without_waveform(tmp_path, videos):
    import av

    with av.open(str(tmp_path / "silent.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=5, width=64, height=64, pix_fmt="yuv420p")
        for _ in range(5):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        file.mux(stream.encode(None))
    clip = AudioReadSpec().read(tmp_path / "silent.mp4")
    assert not clip.has_audio and not clip.has_video and clip.is_complete
    assert AudioReadSpec().read(videos[0]).has_audio and not AudioReadSpec().read(videos[0]).has_video
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ClipError, match="is not a video"):
        AudioReadSpec().read(tmp_path / "text.mp4")


class ScriptedAlignment:
    """torchaudio with one frame per 1,600 samples; each word takes as many frames as it has letters."""

    __version__ = "2.8.0"

    def __init__(self):
        self.pipelines = SimpleNamespace(MMS_FA=self)
        self.heard = []

    def get_model(self, *, with_star):
        assert with_star is False
        return self

    def to(self, device):
        assert device == "cpu"
        return self

    def __call__(self, waveform):
        self.heard.append(waveform.shape[1] / RATE)
        return torch.zeros(1, waveform.shape[1] // 1600, 3), None

    def get_dict(self, *, star):
        return {"-": 0, "a": 1, "b": 2, "'": 3}

    def get_tokenizer(self):
        return lambda words: [list(word) for word in words]

    def get_aligner(self):
        def align(emissions, tokens):
            if sum(map(len, tokens)) > len(emissions):
                raise RuntimeError("targets length is too long for CTC")
            spans, frame = [], 1
            for word in tokens:
                spans.append(
                    [SimpleNamespace(start=frame + place, end=frame + place + 1) for place in range(len(word))]
                )
                frame += len(word)
            return spans

        return align


def test_forced_alignment_by_a_scripted_torchaudio(checkpoint, monkeypatch):
    """Words "ab" and "ba!" from 1 to 2 s are heard from 0.7 to 2.3 s, in 16 frames of 0.1 s."""
    from salmonn.caption.forced_alignment import ForcedAligner

    scripted = ScriptedAlignment()
    monkeypatch.setitem(sys.modules, "torchaudio", scripted)
    aligner = WhisperTranscriber.load(WhisperConfig(str(checkpoint), word_times="torchaudio"))._aligner
    words = (SpokenWord("Ab", 1.0, 1.5, 0.9), SpokenWord("ba!", 1.5, 2.0, 0.8))
    spoken = SpeechEvent("Ab ba!", 1.0, 2.0, words)
    digits = SpeechEvent("a 9", 1.0, 2.0, (SpokenWord("a", 1.0, 1.2), SpokenWord("9", 1.2, 2.0)))
    long = SpeechEvent("a" * 20, 1.0, 2.0, (SpokenWord("a" * 20, 1.0, 2.0),))
    found = aligner.align(noise(5), Transcription((spoken, digits, long), "en"))
    aligned = (SpokenWord("Ab", 0.8, 1.0, 0.9), SpokenWord("ba!", 1.0, 1.2, 0.8))
    assert found.speech == (SpeechEvent("Ab ba!", 0.8, 1.2, aligned), digits, long)
    assert found.warnings == ("2 of 3 sentences keep Whisper's times, since torchaudio cannot align their words",)
    assert scripted.heard == [pytest.approx(1.6), pytest.approx(1.6)]
    scripted.pipelines = SimpleNamespace()
    with pytest.raises(ValueError, match=r"torchaudio 2\.8\.0 has no forced alignment"):
        ForcedAligner.load("cpu")


class LettersAtFrames(torch.nn.Module):
    """A CTC model, of 50 frames a second as torchaudio's, that reads letters at given frames and nothing else."""

    def __init__(self, letters, ids):
        super().__init__()
        self.letters, self.ids = letters, ids

    def forward(self, waveform):
        logits = torch.full((1, waveform.shape[1] // 320, len(self.ids)), -10.0)
        logits[..., 0] = 0.0  # the blank
        for frame, letter in self.letters.items():
            if frame < logits.shape[1]:
                logits[0, frame] = -10.0
                logits[0, frame, self.ids[letter]] = 0.0
        return logits.log_softmax(-1), None


def test_forced_alignment_by_torchaudio_itself(monkeypatch):
    """With its tokenizer, letters and aligner, and emissions that are written by hand; its weights are a download."""
    torchaudio = pytest.importorskip("torchaudio", reason="torchaudio is not installed")
    from salmonn.caption.forced_alignment import ForcedAligner

    bundle = torchaudio.pipelines.MMS_FA
    letters = dict(zip((20, 24, 40, 44, 48, 52, 56, 80, 84), "weleaveat", strict=True))
    model = LettersAtFrames(letters, bundle.get_dict(star=None))
    monkeypatch.setattr(type(bundle), "get_model", lambda self, with_star: model)
    aligner = ForcedAligner.load("cpu")
    texts = [("We", 0.4, 0.5), ("leave", 0.8, 1.14), ("at.", 1.6, 1.7)]
    spoken = SpeechEvent("We leave at.", 0.3, 2.0, tuple(SpokenWord(text, 0.3, 2.0, 0.9) for text, *_ in texts))
    digits = SpeechEvent("9", 0.3, 2.0, (SpokenWord("9", 0.3, 2.0),))
    long = SpeechEvent("abc" * 40, 0.3, 0.5, (SpokenWord("abc" * 40, 0.3, 0.5),))  # more letters than frames
    found = aligner.align(noise(3), Transcription((spoken, digits, long), "en"))
    assert [(word.text, word.start_seconds, word.end_seconds) for word in found.speech[0].words] == texts
    assert found.speech[1:] == (digits, long)
    assert found.warnings == ("2 of 3 sentences keep Whisper's times, since torchaudio cannot align their words",)
