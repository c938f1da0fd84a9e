"""Synthetic clips: decoded video and audio match the annotation; runs are reproducible and resumable."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest

from salmonn.files import read_records
from salmonn.records import Reference
from salmonn.synthetic.lexicon import COLOURS, SOUNDS
from salmonn.synthetic.render import make_clips, render_audio, render_frames, sample_clip, write_video
from salmonn.synthetic.scene import Scene, SceneEvent, SynthConfig, objects_at

CONFIG = SynthConfig(clips=3, seed=5)
# One event of each kind, so that the expected frames and audio are obvious.
SCENE = Scene(
    8.0,
    (
        SceneEvent("appear", 0.5, 1.0, shape="circle", colour="red", position=(60, 30)),
        SceneEvent("sound", 1.0, 2.0, value="low tone", amplitude=0.5),
        SceneEvent("move", 1.5, 2.5, shape="circle", colour="red", value="left", position=(24, 30)),
        SceneEvent("appear", 2.5, 3.0, shape="square", colour="green", position=(70, 70)),
        SceneEvent("sound", 2.5, 3.5, value="high tone", amplitude=0.5),
        SceneEvent("blink", 3.0, 4.5, shape="square", colour="green", position=(70, 70)),
        SceneEvent("sound", 4.0, 5.0, value="rising sweep", amplitude=0.5),
        SceneEvent("change", 5.0, 6.0, shape="circle", colour="red", value="blue", position=(24, 30)),
        SceneEvent("sound", 5.5, 6.5, value="beeps", amplitude=0.5),
        SceneEvent("leave", 6.0, 7.0, shape="circle", colour="blue", position=(24, 30)),
        SceneEvent("sound", 7.0, 7.9, value="noise", amplitude=0.5),
    ),
    diameter=28,
)


def decode(path):
    """Decode frames (F, height, width, 3) and audio (samples,), which must start at zero."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        audio_frames = list(container.decode(audio=0))
    assert audio_frames[0].pts == 0
    return frames, np.concatenate([frame.to_ndarray()[0] for frame in audio_frames])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The decoded frames and audio of SCENE."""
    path = tmp_path_factory.mktemp("scene") / "scene.mp4"
    frames, audio = render_frames(SCENE, config=CONFIG), render_audio(SCENE, np.random.default_rng(0), config=CONFIG)
    write_video(path, frames, audio, config=CONFIG)
    return decode(path)


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory):
    """Folder and references of three clips."""
    folder = tmp_path_factory.mktemp("made")
    return folder, make_clips(folder, CONFIG, workers=1)


def colour_at(frames, *, seconds, x, y):
    """Return the shape colour within 40 of the patch around (x, y), since encoding changes it a little, or "dark"."""
    patch = frames[round(seconds * CONFIG.fps), y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3).mean(axis=0)
    nearest = min(COLOURS, key=lambda name: math.dist(COLOURS[name], patch))
    if math.dist(COLOURS[nearest], patch) < 40:
        return nearest
    assert patch.max() < 110, f"neither a colour nor background: {patch}"
    return "dark"


@pytest.mark.parametrize(
    ("seconds", "x", "y", "colour"),
    [
        (0.4, 60, 30, "dark"),
        (0.5, 60, 30, "red"),
        (1.4, 60, 30, "red"),  # appears at 0.5
        (2.0, 42, 30, "red"),
        (2.0, 60, 30, "dark"),
        (2.5, 24, 30, "red"),  # midway at 2.0, at its end at 2.5
        (2.4, 70, 70, "dark"),
        (2.5, 70, 70, "green"),
        (3.0, 70, 70, "dark"),
        (3.4, 70, 70, "dark"),
        (3.5, 70, 70, "green"),
        (4.2, 70, 70, "dark"),
        (4.5, 70, 70, "green"),
        (4.9, 24, 30, "red"),
        (5.0, 24, 30, "blue"),
        (5.9, 24, 30, "blue"),
        (6.0, 24, 30, "dark"),
        (7.9, 70, 70, "green"),
    ],
)
def test_frames_show_each_colour_at_its_position_and_time(rendered, seconds, x, y, colour):
    assert rendered[0].shape == (80, 96, 96, 3)
    assert colour_at(rendered[0], seconds=seconds, x=x, y=y) == colour


@pytest.mark.parametrize(("start", "end", "hertz"), [(1.0, 2.0, 250), (2.5, 3.5, 1800), (5.5, 6.5, 1000)])
def test_a_tone_has_its_pitch_in_its_span(rendered, start, end, hertz):
    part = rendered[1][round(start * 16_000) : round(end * 16_000)]
    assert np.abs(np.fft.rfft(part)).argmax() / (end - start) == pytest.approx(hertz, rel=0.03)


def test_a_rising_sweep_rises_from_300_to_2500_hz(rendered):
    pitches = [
        np.abs(np.fft.rfft(rendered[1][start : start + 1600])).argmax() * 10 for start in range(64_000, 80_000, 1600)
    ]
    assert pitches == sorted(pitches)
    assert pitches[0] < 400 and pitches[-1] > 2000


def test_noise_is_loud_and_fills_the_spectrum(rendered):
    power = np.abs(np.fft.rfft(rendered[1][round(7.1 * 16_000) : round(7.8 * 16_000)])) ** 2
    assert power.max() < 0.02 * power.sum()
    assert np.abs(rendered[1][round(7.1 * 16_000) : round(7.8 * 16_000)]).max() > 0.3


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.95), (2.05, 2.45), (3.55, 3.95), (5.05, 5.45), (6.55, 6.95)])
def test_silence_between_sounds(rendered, start, end):
    assert np.abs(rendered[1][round(start * 16_000) : round(end * 16_000)]).max() < 0.01


@pytest.mark.parametrize("kind", SOUNDS)
def test_every_sound_exceeds_the_noise_at_the_lowest_amplitude(kind):
    scene = Scene(2.0, (SceneEvent("sound", 0.5, 1.3, value=kind, amplitude=0.2),), noise_amplitude=0.003)
    audio = render_audio(scene, np.random.default_rng(0), config=CONFIG)
    assert audio[8000:20_800].std() > 5 * audio[:8000].std()


def test_number_of_beeps_and_clicks():
    counts = {}
    for kind, length in itertools.product(("beeps", "clicks"), (0.8, 1.0, 1.6)):
        scene = Scene(2.0, (SceneEvent("sound", 0.2, 0.2 + length, value=kind, amplitude=0.5),))
        loud = np.abs(render_audio(scene, np.random.default_rng(0), config=CONFIG)).reshape(-1, 160).max(axis=1) > 0.05
        counts[kind, length] = int(np.count_nonzero(loud[1:] & ~loud[:-1]))
    assert list(counts.values()) == [3, 3, 4, 4, 4, 6]


def test_scenes_are_consistent_and_objects_do_not_overlap():
    for index in range(150):
        scene, reference = sample_clip(replace(CONFIG, clips=150), index=index)
        visual = [event for event in scene.events if event.kind != "sound"]
        sounds = [event for event in scene.events if event.kind == "sound"]
        assert 4 <= len(visual) <= 5 and 3 <= len(sounds) <= 4 and 7 <= scene.duration_seconds <= 8
        assert visual[0].kind == "appear" and len({sound.value for sound in sounds}) == len(sounds)
        for before, after in [*itertools.pairwise(visual), *itertools.pairwise(sounds)]:
            assert before.end_seconds <= after.start_seconds
        assert all(0.69 < event.end_seconds - event.start_seconds < 1.61 for event in scene.events)
        assert len({event.text for event in reference.events}) == len(reference.events)
        starts = [event.start_seconds for event in reference.events]
        assert starts == sorted(starts) and reference.events[-1].end_seconds <= scene.duration_seconds
        half = scene.diameter / 2
        for frame in range(round(scene.duration_seconds * 10)):
            objects = objects_at(scene, frame / 10)
            assert all(half <= value <= 96 - half for item in objects for value in item.position)
            assert len({item.colour for item in objects}) == len({item.shape for item in objects}) == len(objects)
            for first, second in itertools.combinations(objects, 2):
                assert max(abs(a - b) for a, b in zip(first.position, second.position, strict=True)) >= scene.diameter


def test_frames_at_2_per_second_show_every_blink():
    times = [2.5 + step / 10 + 1e-6 for step in range(40)]
    is_visible = [item.visible for seconds in times for item in objects_at(SCENE, seconds) if item.shape == "square"]
    for offset in range(5):
        runs = [visible for visible, _ in itertools.groupby(is_visible[offset::5])]
        assert runs == [True, False, True, False, True]


def test_moves_have_a_minimum_length():
    for index in range(100):
        scene, _ = sample_clip(replace(CONFIG, clips=100), index=index)
        for event in scene.events:
            if event.kind == "move":
                before = {item.shape: item.position for item in objects_at(scene, event.start_seconds - 0.05)}
                assert math.dist(before[event.shape], event.position) >= 20


def test_the_annotation_on_disk_equals_the_returned_one(clip_set):
    folder, references = clip_set
    assert read_records(folder / "clips.jsonl", Reference) == references
    assert [reference.video for reference in references] == [f"videos/clip_0000{index}.mp4" for index in range(3)]
    for reference in references:
        frames, audio = decode(folder / reference.video)
        assert len(frames) == round(reference.duration_seconds * 10)
        assert len(audio) / 16_000 == pytest.approx(reference.duration_seconds, abs=0.07)  # AAC pads its last frame
    assert not list((folder / "videos").glob("*.tmp*"))


def test_same_seed_same_clips_in_sets_of_different_size(clip_set, tmp_path):
    folder, _ = clip_set
    # 17 clips are two chunks, which two processes render.
    make_clips(tmp_path, replace(CONFIG, clips=17), workers=2)
    lines = (tmp_path / "clips.jsonl").read_bytes().splitlines()
    assert len(lines) == 17 and lines[:3] == (folder / "clips.jsonl").read_bytes().splitlines()
    for name in ("clip_00000.mp4", "clip_00001.mp4", "clip_00002.mp4"):
        for one, other in zip(decode(folder / "videos" / name), decode(tmp_path / "videos" / name), strict=True):
            assert np.array_equal(one, other)


def test_another_seed_gives_other_clips(clip_set):
    other = [sample_clip(replace(CONFIG, seed=6), index=index)[1] for index in range(3)]
    assert all(one.events != another.events for one, another in zip(clip_set[1], other, strict=True))


def test_resuming_renders_only_missing_clips(tmp_path):
    counts = []
    make_clips(tmp_path, CONFIG, indices=[0, 2], workers=1, progress=counts.append)
    before = (tmp_path / "videos/clip_00002.mp4").stat().st_mtime_ns
    references = make_clips(tmp_path, CONFIG, workers=1, progress=counts.append)
    assert counts == [2, 2, 1]  # two rendered; two found; one rendered
    assert (tmp_path / "videos/clip_00002.mp4").stat().st_mtime_ns == before
    assert len(references) == len(list((tmp_path / "videos").iterdir())) == 3


def test_a_folder_of_another_config_is_rejected(tmp_path):
    make_clips(tmp_path, CONFIG, indices=[])
    with pytest.raises(ValueError, match=r"another config .*fps 10 instead of 5, seed 5 instead of 6"):
        make_clips(tmp_path, replace(CONFIG, seed=6, fps=5))
    make_clips(tmp_path, replace(CONFIG, clips=9), indices=[])


def test_an_index_beyond_the_set_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="clip 3 is out of range: the config has 3 clips"):
        make_clips(tmp_path, CONFIG, indices=[3])


@pytest.mark.parametrize(
    "values",
    [
        {"clips": -1},
        {"seed": -1},
        {"size_pixels": 95},
        {"min_seconds": 9.0},
        {"max_visual": 7},
        {"max_sounds": 7},
        {"min_sounds": 0},
        {"max_shapes": 0},
        {"max_shapes": 6},
        {"questions": -1},
        {"kinds": ()},
    ],
)
def test_impossible_configs_are_rejected(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SynthConfig(**values)


def test_one_shape_in_all_events():
    config = SynthConfig(max_shapes=1, min_visual=3, max_visual=3)
    for index in range(50):
        events = [event for event in sample_clip(config, index=index)[0].events if event.kind != "sound"]
        assert len(events) == 3 and len({event.shape for event in events}) == 1
        assert [event.kind == "appear" for event in events] == [True, False, False]


def test_kinds_of_events_and_number_of_questions():
    config = SynthConfig(kinds=("move", "move", "change"), questions=6)
    counts = Counter()
    for index in range(100):
        scene, reference = sample_clip(config, index=index)
        counts.update(event.kind for event in scene.events)
        assert 3 < len(reference.questions) == len({question.kind for question in reference.questions})
    assert counts.keys() == {"appear", "move", "change", "sound"}
    assert counts["move"] > 1.5 * counts["change"]
    assert not sample_clip(replace(config, questions=0), index=0)[1].questions


def test_a_clip_may_have_all_shapes():
    """A hasty caption then cannot hallucinate a further object."""
    config = SynthConfig(max_shapes=5, min_visual=6, max_visual=6, min_seconds=14, max_seconds=16)
    shapes = [{event.shape for event in sample_clip(config, index=index)[0].events} - {""} for index in range(100)]
    assert max(map(len, shapes)) == 5


def test_more_events_than_fit_the_duration_are_rejected():
    with pytest.raises(ValueError, match="allow more seconds"):
        sample_clip(SynthConfig(min_seconds=2, max_seconds=2), index=0)
