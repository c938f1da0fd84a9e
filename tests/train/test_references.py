"""Where clips come from, and measuring a model on them."""

import shutil
from dataclasses import replace

import pytest
import torch

from salmonn.caption.generator import Sampling
from salmonn.model.config import PLAIN_PROMPTS
from salmonn.records import Caption, Question, Reference, write_records
from salmonn.synthetic.judge import RuleJudge
from salmonn.synthetic.render import SynthConfig
from salmonn.train.evaluate import SampleConfig, encode_clips, evaluate, sample_captions
from salmonn.train.references import ClipSet, all_texts, heldout_config, read_clips, render_clips

DESCRIBE = PLAIN_PROMPTS["both"]

ONE = SynthConfig(
    clips=1, seed=4, min_seconds=3.0, max_seconds=3.0, min_visual=1, max_visual=1, max_sounds=1, min_sounds=1
)


def test_heldout_clips_are_of_the_same_kind_but_another_seed():
    held = heldout_config(ONE, clips=7)
    assert (held.clips, held.max_seconds, held.max_visual) == (7, 3.0, 1)
    assert held.seed != ONE.seed and held != heldout_config(SynthConfig(seed=5), clips=7)


def test_rendered_clips_are_kept_by_seed_and_number(tmp_path):
    first = render_clips(tmp_path, ONE)
    assert first.root == tmp_path / "seed4-1" and (first.root / first.references[0].video).is_file()
    made = (first.root / first.references[0].video).stat().st_mtime_ns
    assert render_clips(tmp_path, ONE) == first
    assert (first.root / first.references[0].video).stat().st_mtime_ns == made


def test_own_references(clips, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(clips.root / clips.references[0].video, folder / "mine.mp4")
    write_records(folder / "refs.jsonl", [Reference("mine.mp4", caption="a star")])
    held = read_clips(folder / "refs.jsonl")
    assert held.references == [Reference("mine.mp4", caption="a star")] and held.root == folder


def test_mistakes_in_own_references(tmp_path):
    path = tmp_path / "refs.jsonl"
    with pytest.raises(FileNotFoundError, match=r"refs\.jsonl"):
        read_clips(path)
    write_records(path, [])
    with pytest.raises(ValueError, match="holds no reference"):
        read_clips(path)
    write_records(path, [Reference("gone.mp4"), Reference("lost.mp4")])
    with pytest.raises(FileNotFoundError, match=r"2 videos that are not there, gone\.mp4 first"):
        read_clips(path)


def test_all_texts():
    reference = Reference(
        "a", caption="c", human_caption="h", visual_caption="v", audio_caption="s", questions=(Question("q", "a"),)
    )
    assert sorted(filter(None, all_texts([reference, Reference("b")]))) == ["a", "c", "h", "q", "s", "v"]


@torch.no_grad()
def test_captions_of_clips(captioner, clips, media):
    (blocks,) = encode_clips(captioner, clips, name="clips")
    assert all(torch.allclose(block.tokens, alone.tokens, atol=1e-5)
               for block, alone in zip(blocks, captioner.encode(media), strict=True))  # fmt: skip
    drawn = Sampling(temperature=1.0, max_new_tokens=6)
    draw = SampleConfig(drawn, seed=1, num_samples=2)
    captions = sample_captions(captioner, clips.references, blocks, draw=draw, name="drawing", side_by_side=4)
    assert [(caption.video, caption.sample) for caption in captions] == [
        (reference.video, sample) for reference in clips.references for sample in (0, 1)
    ]
    assert {caption.prompt for caption in captions} == {DESCRIBE} and {caption.model for caption in captions} == {
        captioner.name
    }
    assert not any(caption.finished and len(captioner.processor.tokenizer.encode(caption.text)) > 6
                   for caption in captions)  # fmt: skip


def test_evaluation(captioner, clips, monkeypatch):
    """A model that answers all questions right and says the reference captions makes no error."""
    (blocks,) = encode_clips(captioner, clips, name="clips")
    right = {block.tokens.data_ptr(): reference for reference, block in zip(clips.references, blocks, strict=True)}

    def generate(requests, *, clips, **_):
        captions = []
        for request, block in zip(requests, clips, strict=True):
            reference = right[block.tokens.data_ptr()]
            known = {item.question: item.answer for item in reference.questions} | {None: reference.caption}
            captions.append([Caption(str(request.path), known[request.prompt], prompt=request.prompt or DESCRIBE)])
        return captions

    monkeypatch.setattr(captioner, "generate", generate)
    result = evaluate(captioner, clips.references, blocks, judge=RuleJudge(), sampling=Sampling(), name="perfect")
    assert (result.rates.total, result.rates.qa_accuracy, result.rates.clips) == (0.0, 1.0, 5)
    assert len(result.answers) == sum(len(reference.questions) for reference in clips.references)
    assert [score.video for score in result.results] == [reference.video for reference in clips.references]


def test_clips_without_questions_are_measured_by_their_captions(captioner, clips):
    bare = [replace(reference, questions=()) for reference in clips.references[:2]]
    (blocks,) = encode_clips(captioner, ClipSet(bare, clips.root), name="clips")
    sampling = Sampling(max_new_tokens=4)
    result = evaluate(captioner, bare, blocks, judge=RuleJudge(), sampling=sampling, name="bare")
    assert result.rates.qa_accuracy is None and not result.answers and len(result.results) == 2
