"""Clip sets, training examples, the order of batches, and the loss of a batch."""

import shutil
from collections import Counter
from pathlib import Path

import av
import pytest
import torch

from salmonn.conversations import Conversation, Turn, parse_conversation
from salmonn.files import write_records
from salmonn.media.container import ClipError
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.model.families.salmonn2_plus import interleave_by_time
from salmonn.model.layout import ClipFeatures
from salmonn.records import Comparison, Question, Reference
from salmonn.synthetic.render import SynthConfig
from salmonn.train.data import (
    ClipCache,
    ClipSet,
    ClipSource,
    SftBatches,
    TrainingExample,
    all_texts,
    batch_at,
    conversation_examples,
    heldout_config,
    make_examples,
    read_clips,
    render_clips,
    sft_loss,
)

DESCRIBE, DESCRIBE_VISUAL, DESCRIBE_AUDIO = PLAIN_PROMPTS["both"], PLAIN_PROMPTS["visual"], PLAIN_PROMPTS["audio"]

FULL = Reference(
    "a.mp4",
    caption="all",
    human_caption="some",
    visual_caption="seen",
    audio_caption="heard",
    questions=(Question("How many?", "two"), Question("Which?", "the star")),
)
A, ALL, SOME = Path("root/a.mp4"), Turn(DESCRIBE, "all"), Turn(DESCRIBE, "some")
TWO, STAR = Turn("How many?", "two"), Turn("Which?", "the star")
VISUAL = TrainingExample(ClipSource(A, "visual"), (Turn(DESCRIBE_VISUAL, "seen"),))
AUDIO = TrainingExample(ClipSource(A, "audio"), (Turn(DESCRIBE_AUDIO, "heard"),))


def example(*turns: Turn) -> TrainingExample:
    """Make an example with turns about the whole clip."""
    return TrainingExample(ClipSource(A), turns)


def clip_set(*references: Reference) -> ClipSet:
    return ClipSet(list(references), Path("root"))


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (["caption"], [example(ALL)]),
        (["human_caption"], [example(SOME)]),
        (["questions"], [example(TWO, STAR)]),
        (["caption", "questions"], [example(ALL, TWO, STAR)]),
        (["human_caption", "questions"], [example(SOME, TWO, STAR)]),
        (["visual_caption"], [VISUAL]),
        (["audio_caption", "caption"], [example(ALL), AUDIO]),
        (
            ["caption", "questions", "visual_caption", "audio_caption"],
            [example(ALL, TWO, STAR), VISUAL, AUDIO],
        ),
    ],
)
def test_examples_of_tasks(tasks, expected):
    assert make_examples(clip_set(FULL), tasks) == expected


def test_single_modality_examples_of_some_clips():
    tasks = ["caption", "visual_caption", "audio_caption"]
    examples = make_examples(clip_set(*[FULL] * 5), tasks, single_modality_every=3)
    assert [example.clip.modality for example in examples] == [
        "both",
        "visual",
        "audio",
        "both",
        "both",
        "both",
        "visual",
        "audio",
        "both",
    ]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_examples(clip_set(FULL), tasks, single_modality_every=0)


def test_missing_fields_of_a_reference_give_no_example():
    incomplete = Reference("a.mp4", caption="all")
    tasks = ["caption", "human_caption", "questions", "visual_caption", "audio_caption"]
    assert make_examples(clip_set(incomplete), tasks) == [example(ALL)]
    assert make_examples(clip_set(Reference("a.mp4")), tasks) == []


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(5, 3, 5), (4, 4, 3), (3, 7, 3)])
def test_every_epoch_has_each_item_once(count, batch_size, steps):
    items = list("abcde"[:count])
    sequence = [item for step in range(steps) for item in batch_at(items, step, batch_size=batch_size, seed=0)]
    epochs = [sequence[start : start + count] for start in range(0, len(sequence), count)]
    assert len(epochs) > 2 and all(sorted(epoch) == items for epoch in epochs)


def test_batches_depend_only_on_the_seed():
    items = list(range(50))
    first = [batch_at(items, step, batch_size=8, seed=3) for step in range(20)]
    # Again, in reverse order.
    assert [batch_at(items, step, batch_size=8, seed=3) for step in reversed(range(20))] == first[::-1]
    assert [batch_at(items, step, batch_size=8, seed=4) for step in range(20)] != first
    flat = [item for batch in first for item in batch]
    assert flat[:50] != flat[50:100] and flat[:50] != items  # each epoch has its own order


@pytest.fixture
def examples(clips):
    return make_examples(clips, ("caption", "questions"))


def rows_of(batch) -> Counter:
    """Count the rows without their padding."""
    return Counter(
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batch.inputs.input_ids, batch.inputs.attention_mask, strict=True)
    )


def test_ranks_share_a_batch(examples, processor, monkeypatch):
    batches = SftBatches(examples, processor, ClipCache(processor), batch_size=4, seed=0)
    (batch,) = batches.micro_batches(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        parts += batches.micro_batches(2)
    assert rows_of(parts[0]) + rows_of(parts[1]) == rows_of(batch) and sum(rows_of(batch).values()) == 16
    # Both ranks divide by half of all tokens, so that the mean of their losses is the loss of the batch.
    assert parts[0].mean_num_tokens == parts[1].mean_num_tokens == batch.mean_num_tokens / 2


@torch.no_grad()
def test_loss_is_the_mean_over_all_answer_tokens(captioner, examples):
    processor = captioner.processor
    batches = SftBatches(examples, processor, ClipCache(processor), batch_size=3, seed=0)
    (batch,) = batches.micro_batches(0)
    labels = batch.inputs.labels
    assert batch.mean_num_tokens == (labels != -100).sum()
    logps = captioner.network(batch.inputs)
    by_token = [logps[row, index - 1].item() for row, index in (labels != -100).nonzero().tolist()]
    value, _ = sft_loss(captioner.network, batch)
    assert value.item() == pytest.approx(-sum(by_token) / len(by_token), rel=1e-5)


def test_turns_on_a_clip_share_it(examples, processor):
    (batch,) = SftBatches(examples, processor, ClipCache(processor), batch_size=2, seed=0).micro_batches(0)
    assert batch.inputs.clip_index == (0, 0, 0, 0, 1, 1, 1, 1)
    assert len(batch.inputs.clip_inputs) == 2


def test_features_in_place_of_clips(examples, plus):
    processor = plus.processor
    features = ClipFeatures(torch.zeros(7, 128), interleave_by_time((1, 1, 4), num_audio=3, second_per_grid=1.0))
    (batch,) = SftBatches(examples, processor, lambda _: features, batch_size=2, seed=0).micro_batches(0)
    assert batch.inputs.clip_inputs == () and len(batch.inputs.clip_features) == 2
    for placeholder, count in zip(processor.config.placeholder_ids, (4, 3), strict=True):
        assert (batch.inputs.input_ids == placeholder).sum(1).eq(count).all()


def test_an_empty_training_set_is_rejected(processor):
    with pytest.raises(ValueError, match="no training examples"):
        SftBatches([], processor, ClipCache(processor), batch_size=2, seed=0)


def test_the_cache_reads_each_clip_once(examples, processor, monkeypatch):
    from dataclasses import replace

    paths = []
    read = type(processor).read
    monkeypatch.setattr(
        type(processor), "read", lambda self, path, **span: paths.append(path) or read(self, path, **span)
    )
    cache = ClipCache(processor)
    clip = examples[0].clip
    both = cache(clip)
    assert cache(clip) is both and len(paths) == 1
    visual = cache(replace(clip, modality="visual"))
    assert len(paths) == 2 and torch.equal(both.pixels, visual.pixels) and len(visual.mel) == 0
    small = ClipCache(processor, max_bytes=10)
    assert torch.equal(small(clip).pixels, both.pixels)
    small(clip)
    assert len(paths) == 4 and not small.clips


def test_examples_of_conversations(clips, processor):
    name = clips.references[0].video
    one_turn = [{"from": "human", "value": "<video>\nFirst?"}, {"from": "gpt", "value": "one"}]
    two_turns = [*one_turn, {"from": "human", "value": "Second?"}, {"from": "gpt", "value": "two"}]
    items = [
        {"video": name, "use_audio": True, "conversations": two_turns},
        {"video": name, "conversations": one_turn, "timestamps": [1, 3]},
        {"audio": name, "conversations": [{"from": "human", "value": "<audio>\nHear?"}, one_turn[1]]},
        {"video": name, "audio": clips.references[1].video, "conversations": one_turn},
    ]
    conversations = [parse_conversation(item) for item in items]
    both, part, audio, dubbed = conversation_examples(conversations, root=clips.root)
    assert both == TrainingExample(
        ClipSource(clips.root / name, needs_both=True),
        (Turn("First?", "one"), Turn("Second?", "two", (("First?", "one"),))),
    )
    assert (part.clip.modality, part.clip.start_seconds, part.clip.end_seconds) == ("visual", 1.0, 3.0)
    assert (audio.clip.video, audio.clip.modality, audio.clip.audio) == (clips.root / name, "audio", None)
    assert dubbed.clip.audio == clips.root / clips.references[1].video
    cache = ClipCache(processor)
    media = [cache(example.clip) for example in (both, part, audio, dubbed)]
    assert [(inputs.seconds > 0, len(inputs.mel) > 0) for inputs in media] == [
        (True, True),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert media[1].seconds == 2.0
    assert torch.equal(media[3].pixels, media[0].pixels) and not torch.equal(media[3].mel, media[0].mel)
    # The second turn's prompt contains the first turn; only its answer is learned.
    (batch,) = SftBatches([both], processor, cache, batch_size=1, seed=0).micro_batches(0)
    texts = [processor.tokenizer.decode(ids[ids >= 0]) for ids in batch.inputs.input_ids]  # placeholders are below 0
    assert texts[1].count("one<|im_end|>\n<|im_start|>user\nSecond?<|im_end|>") == 1
    learned = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch.inputs.labels]
    assert learned == ["one<|im_end|>", "two<|im_end|>"]


def test_missing_files_of_conversations_are_reported(tmp_path):
    messages = [{"from": "human", "value": "<video>\nFirst?"}, {"from": "gpt", "value": "one"}]
    with pytest.raises(FileNotFoundError, match=r"1 of \d files do not exist, first .*gone\.mp4"):
        conversation_examples([parse_conversation({"video": "gone.mp4", "conversations": messages})], root=tmp_path)


def test_a_conversation_about_missing_audio_is_rejected(processor, tmp_path):
    """Otherwise a model would be trained on text about audio that it does not get."""
    with av.open(str(tmp_path / "silent.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            file.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        file.mux(stream.encode(None))
    messages = [{"from": "human", "value": "<video>\nFirst?"}, {"from": "gpt", "value": "one"}]
    for item, is_rejected in (({"use_audio": True}, True), ({}, False)):
        conversation = parse_conversation({"video": "silent.mp4", "conversations": messages, **item})
        (example_of_clip,) = conversation_examples([conversation], root=tmp_path)
        if is_rejected:
            with pytest.raises(ClipError, match=r"silent\.mp4 has no audio, .*change its modality"):
                ClipCache(processor)(example_of_clip.clip)
        else:
            assert ClipCache(processor)(example_of_clip.clip).num_frames


ONE_CLIP = SynthConfig(
    clips=1, seed=4, min_seconds=3.0, max_seconds=3.0, min_visual=1, max_visual=1, max_sounds=1, min_sounds=1
)


def test_paths_of_a_conversation_start_from_its_folder():
    video = Conversation("a.mp4", "sound/a.wav", start_seconds=1.0, end_seconds=2.0)
    expected = ClipSource(Path("/data/a.mp4"), "both", Path("/data/sound/a.wav"), 1.0, 2.0, needs_both=True)
    assert ClipSource.of_conversation(video, root=Path("/data")) == expected
    image = Conversation(image="/else/a.png")
    assert ClipSource.of_conversation(image, root=Path("/data")).video == Path("/else/a.png")


def test_the_clip_of_a_comparison():
    comparison = Comparison(
        "v.mp4", "p", "a", "b", modality="visual", audio="a.wav", start_seconds=1.0, end_seconds=2.0
    )
    expected = ClipSource(Path("root/v.mp4"), "visual", Path("root/a.wav"), 1.0, 2.0)
    assert ClipSource.of_comparison(comparison, root=Path("root")) == expected
    source = ClipSource.of_comparison(Comparison("a.mp4", "p", "a", "b"), root=Path("root"))
    assert source == clip_set(FULL).source(FULL)  # a pair of mrDPO uses the features of its training clip


def test_heldout_clips_are_of_the_same_kind_but_another_seed():
    heldout = heldout_config(ONE_CLIP, clips=7)
    assert (heldout.clips, heldout.max_seconds, heldout.max_visual) == (7, 3.0, 1)
    assert heldout.seed != ONE_CLIP.seed and heldout != heldout_config(SynthConfig(seed=5), clips=7)


def test_rendered_clips_are_cached_by_seed_and_number(tmp_path):
    first = render_clips(tmp_path, ONE_CLIP)
    assert first.root == tmp_path / "seed4-1" and (first.root / first.references[0].video).is_file()
    modified_ns = (first.root / first.references[0].video).stat().st_mtime_ns
    assert render_clips(tmp_path, ONE_CLIP) == first
    assert (first.root / first.references[0].video).stat().st_mtime_ns == modified_ns


def test_own_references(clips, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(clips.root / clips.references[0].video, folder / "mine.mp4")
    write_records(folder / "refs.jsonl", [Reference("mine.mp4", caption="a star")])
    heldout = read_clips(folder / "refs.jsonl")
    assert heldout.references == [Reference("mine.mp4", caption="a star")] and heldout.root == folder


def test_invalid_reference_files(tmp_path):
    path = tmp_path / "refs.jsonl"
    with pytest.raises(FileNotFoundError, match=r"refs\.jsonl"):
        read_clips(path)
    write_records(path, [])
    with pytest.raises(ValueError, match="holds no reference"):
        read_clips(path)
    write_records(path, [Reference("gone.mp4"), Reference("lost.mp4")])
    with pytest.raises(FileNotFoundError, match=r"2 of \d files do not exist, first .*gone\.mp4"):
        read_clips(path)


def test_all_texts():
    reference = Reference(
        "a", caption="c", human_caption="h", visual_caption="v", audio_caption="s", questions=(Question("q", "a"),)
    )
    assert sorted(filter(None, all_texts([reference, Reference("b")]))) == ["a", "c", "h", "q", "s", "v"]
