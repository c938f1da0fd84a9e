"""The captioner: one video, many videos, broken files, spans and modalities."""

import shutil
import threading
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from salmonn.caption import folder
from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
from salmonn.caption.encode_ahead import ClipEncoder
from salmonn.caption.generate import DecodeBatch, SampledToken
from salmonn.caption.generator import CaptionRequest, Sampling, Span
from salmonn.caption.limits import BatchLimits
from salmonn.caption.loader import ClipReader
from salmonn.caption.segments import FixedSegments
from salmonn.caption.streaming import StreamingGenerator
from salmonn.media.clip import read_clip
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.records import Caption, Failure
from tests.completions import complete
from tests.limits import STEP_SECONDS, wait_until

DESCRIBE = PLAIN_PROMPTS["both"]

SHORT = Sampling(max_new_tokens=6)


def requests(paths, **options):
    return [CaptionRequest(path, sampling=SHORT, **options) for path in paths]


def test_one_caption(captioner, videos, media, random_model):
    caption = captioner.caption(videos[0], sampling=SHORT)
    (answer,) = complete(captioner, [media[0]], [DESCRIBE], sampling=SHORT)
    assert caption == Caption(
        str(videos[0]),
        answer.text,
        prompt=DESCRIBE,
        model=str(random_model),
        finished=answer.finished,
        modality="both",
    )
    assert caption.text


def test_a_partly_saved_model_has_no_config(captioner, media, tmp_path, monkeypatch):
    """Recipes treat a folder with a config.json as a complete model, so an interrupted save must not write one."""

    def interrupt(_, path):
        (path / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("salmonn.caption.captioner.save_network", interrupt)
        with pytest.raises(KeyboardInterrupt):
            captioner.save(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()
    (tmp_path / "model" / ".half").mkdir(exist_ok=True)
    (tmp_path / "model" / ".half" / "stale.json").touch()  # as if it was killed while it moved files into place
    captioner.save(tmp_path / "model")
    reloaded = Captioner.load(tmp_path / "model")
    assert complete(reloaded, media[:1], ["Tell."], sampling=SHORT) == complete(
        captioner, media[:1], ["Tell."], sampling=SHORT
    )
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors"} < names and not names & {".half", "stale.json"}


def test_a_caption_at_the_token_limit_is_unfinished(captioner, media):
    (answer,) = complete(captioner, media[:1], ["Tell."], sampling=Sampling(max_new_tokens=1))
    assert not answer.finished


def test_a_caption_with_a_stop_token_is_finished(captioner, media, monkeypatch):
    """Generated ids: "a" and a stop token, "a" without one, and only a stop token."""
    tokenizer = captioner.processor.tokenizer
    (a,), stop = tokenizer.encode("a"), tokenizer.eos_token_id
    steps = iter([{0: a, 1: a, 2: stop}, {0: stop, 1: a}])
    monkeypatch.setattr(
        DecodeBatch, "step", lambda *_: {row: SampledToken(token) for row, token in next(steps).items()}
    )
    sampling = Sampling(temperature=1.0, max_new_tokens=2)
    answers = complete(captioner, media[:1], ["Tell."], sampling=sampling, num_samples=3)
    assert [(answer.text, answer.finished) for answer in answers] == [("a", True), ("aa", False), ("", True)]


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_broken_file_does_not_affect_others(captioner, videos, tmp_path, batch_size):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(videos[0].read_bytes()[:3000])
    empty = tmp_path / "empty.mp4"
    empty.touch()
    results = list(
        captioner.caption_many(requests([broken, videos[0], videos[1], empty, videos[2]]), batch_size=batch_size)
    )
    assert [type(result) for result in results] == [Failure, Caption, Caption, Failure, Caption]
    assert [result.video for result in results] == [
        str(path) for path in (broken, videos[0], videos[1], empty, videos[2])
    ]
    assert str(broken) in results[0].reason and str(empty) in results[3].reason
    expected = [captioner.caption(video, sampling=SHORT) for video in videos[:3]]
    assert [result for result in results if isinstance(result, Caption)] == expected
    assert len({caption.text for caption in expected}) == 3


def test_clips_are_encoded_ahead(captioner, videos, tmp_path, monkeypatch):
    """As on a GPU, in a thread; one for which there is no memory beside others is captioned alone."""
    (tmp_path / "a.mp4").touch()
    expected = [captioner.caption(video, sampling=SHORT) for video in videos[:4]]
    monkeypatch.setattr(folder, "make_encoder", ClipEncoder)
    encode, threads = captioner.network.encode, []

    def note(clips, layouts):
        threads.append(threading.current_thread().name.partition("_")[0])
        if len(threads) == 2:
            raise torch.OutOfMemoryError
        return encode(clips, layouts)

    monkeypatch.setattr(captioner.network, "encode", note)
    paths = [videos[0], tmp_path / "a.mp4", *videos[1:4]]
    results = list(captioner.caption_many(requests(paths), batch_size=2))
    assert [one for one in results if isinstance(one, Caption)] == expected and isinstance(results[1], Failure)
    assert sorted(threads) == ["MainThread", "encode", "encode", "encode", "encode"]
    assert threads.index("MainThread") > 2  # others are encoded before it is needed


def test_two_waiting_clips_are_encoded_ahead(captioner, media, monkeypatch):
    """The third is once one of them does not wait any more; clips that are not encoded are not ready."""
    may_encode, encoded, encode = threading.Event(), [], captioner.network.encode

    def note(clips, layouts):
        may_encode.wait(STEP_SECONDS)
        encoded.extend(id(clip.mel) for clip in clips)
        return encode(clips, layouts)

    monkeypatch.setattr(captioner.network, "encode", note)
    encoder, ids = ClipEncoder(captioner), [id(clip.mel) for clip in media[:3]]
    encoder.start_first(media[:3])
    assert not any(encoder.is_ready(clip) for clip in media[:3])
    may_encode.set()
    features = encoder.take(media[0])
    assert encoder.take(media[2]) is media[2] and encoder.is_ready(features)
    encoder.start_first(media[1:3])
    wait_until(lambda: all(encoder.is_ready(clip) for clip in media[1:3]))
    assert encoded == ids and torch.equal(features.tokens, captioner.encode(media[:1])[0].tokens)
    encoder.start_first([])
    assert encoder.take(media[1]) is media[1]
    encoder.close()


def test_only_broken_files(captioner, tmp_path):
    (tmp_path / "a.mp4").touch()
    results = list(captioner.caption_many(requests([tmp_path / "a.mp4"])))
    assert len(results) == 1 and isinstance(results[0], Failure)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_rejected(captioner, videos, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        list(captioner.caption_many(requests(videos[:1]), batch_size=batch_size))


def test_a_span_selects_the_frames(captioner, videos):
    span = Span(2.0, 4.0)
    caption = captioner.caption(videos[0], sampling=SHORT, span=span)
    part = captioner.processor.read(videos[0], start_seconds=2.0, end_seconds=4.0)
    assert caption.text == complete(captioner, [part], [DESCRIBE], sampling=SHORT)[0].text
    assert caption.text != captioner.caption(videos[0], sampling=SHORT).text
    assert next(captioner.caption_many(requests(videos[:1], span=span))) == caption


def test_a_span_beyond_the_end_is_a_failure(captioner, videos):
    (result,) = captioner.caption_many(requests(videos[:1], span=Span(100.0, None)))
    assert isinstance(result, Failure) and str(videos[0]) in result.reason
    with pytest.raises(ValueError, match=videos[0].name):
        captioner.caption(videos[0], span=Span(100.0, None))


@pytest.mark.parametrize(("start", "end"), [(3.0, 1.0), (3.0, 3.0), (-1.0, None), (None, 0.0)])
def test_an_empty_span_is_rejected(start, end):
    with pytest.raises(ValueError, match="span"):
        Span(start, end)


def test_modalities(captioner, videos, media):
    texts = {
        modality: captioner.caption(videos[0], sampling=SHORT, modality=modality).text
        for modality in ("both", "visual", "audio")
    }
    assert len(set(texts.values())) == 3
    audio_inputs = captioner.processor.read(videos[0], modality="audio")
    assert texts["audio"] == complete(captioner, [audio_inputs], [PLAIN_PROMPTS["audio"]], sampling=SHORT)[0].text


DAMAGE = ("lost 0.5 s of audio at 2.0 s", "2 frames do not decode")


@pytest.fixture
def damaged(videos, monkeypatch):
    """Path of the second clip, of which only the first 2 s are complete."""

    def read(path, sampler, *, end_seconds=None, **options):
        clip = read_clip(path, sampler, end_seconds=end_seconds, **options)
        if path != videos[1] or (end_seconds is not None and end_seconds <= 2):
            return clip
        return replace(clip, warnings=DAMAGE, is_complete=False)

    monkeypatch.setattr("salmonn.caption.read_spec.read_clip", read)
    return videos[1]


def test_captions_of_a_damaged_file_are_marked(captioner, videos, damaged):
    expected = [(True, ()), (False, DAMAGE), (True, ())]
    batches = captioner.generate(
        [CaptionRequest(path, sampling=SHORT, num_samples=2) for path in (videos[0], damaged, videos[2])]
    )
    for sample in (0, 1):
        assert [(one[sample].complete, one[sample].warnings) for one in batches] == expected
    many = list(captioner.caption_many(requests([videos[0], damaged, videos[2]])))
    assert [(one.complete, one.warnings) for one in many] == expected
    assert captioner.caption(damaged, sampling=SHORT) == many[1]
    (features,) = captioner.encode([captioner.processor.read(damaged)])
    ((caption,),) = captioner.generate(requests([damaged]), clips=[features])
    assert caption == many[1]


def test_only_segments_with_damage_are_marked(captioner, damaged):
    (results,) = captioner.caption_batches(requests([damaged]), segments=FixedSegments(2.0), batch_size=8)
    assert len(results) >= 3
    assert [one.result.complete for one in results] == [True] + [False] * (len(results) - 1)
    assert [one.result.warnings for one in results] == [()] + [DAMAGE] * (len(results) - 1)


def test_captions_tell_what_the_model_was_given(captioner, videos, tmp_path):
    """The file has no more, or no more was asked for."""
    silent = tmp_path / "silent.mp4"
    with av.open(str(videos[0])) as source, av.open(str(silent), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    assert captioner.caption(silent, sampling=SHORT).modality == "visual"
    for modality in ("both", "visual", "audio"):
        assert captioner.caption(videos[0], sampling=SHORT, modality=modality).modality == modality


def test_a_missing_modality_is_rejected(captioner, tmp_path):
    path = tmp_path / "tone.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 32_000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert captioner.caption(path, sampling=SHORT).video == str(path)
    with pytest.raises(ValueError, match=r"tone\.wav: has no video"):
        captioner.caption(path, sampling=SHORT, modality="visual")


def test_out_of_memory_is_a_failure_of_only_its_clip(captioner, videos, monkeypatch):
    """The third clip fits neither beside others nor alone."""
    add, sizes = StreamingGenerator.add, []
    third = captioner.processor.read(videos[2])

    def fail_third(self, clips, prompts, **options):
        sizes.append(len(clips))
        if any(torch.equal(clip.pixels, third.pixels) for clip in clips):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return add(self, clips, prompts, **options)

    monkeypatch.setattr(StreamingGenerator, "add", fail_third)
    results = list(captioner.caption_many(requests(videos[:4]), batch_size=4))
    assert [isinstance(result, Failure) for result in results] == [False, False, True, False]
    assert sizes == [4, 1, 1, 1, 1]
    assert "does not fit into GPU memory" in results[2].reason and "batch_size" in results[2].reason
    assert str(videos[2]) in results[2].reason and results[2].stage == "caption"


def test_clips_are_batched_by_length(captioner, videos, monkeypatch):
    """The files are short, long, short, long, short: two batches, of 2 and 3."""
    add, sizes = StreamingGenerator.add, []

    def record_lengths(self, clips, prompts, **options):
        sizes.append([round(clip.seconds) for clip in clips])
        return add(self, clips, prompts, **options)

    monkeypatch.setattr(StreamingGenerator, "add", record_lengths)
    seconds = {video: read_clip(video, captioner.processor.family.frame_sampler).video_seconds for video in videos}
    short, long = min(videos, key=seconds.get), max(videos, key=seconds.get)
    assert round(seconds[short]) < round(seconds[long])
    results = list(captioner.caption_many(requests([short, long, short, long, short]), batch_size=3))
    # Two of the short ones come first, the third after the long ones; a long one joins them, with the same limit, and
    # the others once these have reached it.
    assert sizes == [
        [*[round(seconds[short])] * 2, round(seconds[long])],
        [round(seconds[long]), round(seconds[short])],
    ]
    assert [result.video for result in results] == [str(path) for path in (short, long, short, long, short)]
    assert results[0] == results[2] == results[4] != results[1] == results[3]


def test_a_sample_depends_only_on_its_seed(captioner, videos):
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)
    videos = videos[:4]
    separate = [captioner.caption(video, sampling=sampling, seed=5 + index) for index, video in enumerate(videos)]
    assert len({caption.text for caption in separate}) == 4
    with ClipReader(workers=1) as reader:
        for batch_size in (1, 3):
            seeded = [CaptionRequest(video, sampling=sampling, seed=5 + index) for index, video in enumerate(videos)]
            assert list(captioner.caption_many(seeded, batch_size=batch_size, reader=reader)) == separate
        assert reader.waited_seconds > 0


def test_a_file_that_kills_its_worker_is_a_failure(captioner, videos, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os\nfrom salmonn.caption.read_spec import ReadSpec\n"
        "class Deadly(ReadSpec):\n def read(self, path):\n"
        "  return os.kill(os.getpid(), 9) if path.name == 'bad.mp4' else super().read(path)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import deadly

    monkeypatch.setattr("salmonn.caption.processor.ReadSpec", deadly.Deadly)
    paths = [videos[0], tmp_path / "bad.mp4", videos[1]]
    with ClipReader(workers=1) as reader:
        results = list(captioner.caption_many(requests(paths), reader=reader))
    assert [result.video for result in results] == list(map(str, paths))
    assert isinstance(results[1], Failure) and "SIGKILL" in results[1].reason and str(paths[1]) in results[1].reason
    assert [results[0], results[2]] == [captioner.caption(video, sampling=SHORT) for video in videos[:2]]


def test_samples_of_a_clip_are_adjacent(captioner, media):
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)
    num_done = []
    answers = complete(
        captioner,
        media[:3],
        ["Tell."] * 3,
        sampling=sampling,
        num_samples=2,
        seeds=[1, 2, 3],
        limits=BatchLimits(4),
        on_progress=num_done.append,
    )
    assert len(answers) == 6 and num_done == [1, 1, 1]
    # A clip's samples depend only on its own seed, not on its position.
    for index, seed in enumerate([1, 2, 3]):
        separate = complete(
            captioner, media[index : index + 1], ["Tell."], sampling=sampling, num_samples=2, seeds=[seed]
        )
        assert answers[2 * index : 2 * index + 2] == separate


def test_a_prompt_with_a_special_token_is_rejected(captioner, videos):
    with pytest.raises(ValueError, match="special token"):
        captioner.caption(videos[0], prompt="Tell <|video_pad|> me.")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="no model in"):
        Captioner.load(tmp_path)


def test_the_toy_model_warns_once_about_other_files(videos, tmp_path, caplog):
    toy = Captioner.load(SHIPPED_MODEL).processor
    toy.read(videos[0])
    assert not caplog.records
    for name in ("holiday.mp4", "other.mp4"):
        shutil.copy(videos[0], tmp_path / name)
        toy.read(tmp_path / name)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/holiday.mp4: the built-in toy model only knows synthetic clips of coloured shapes and tones; for "
        "other videos, choose a model with --model"
    ]
