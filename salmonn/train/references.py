"""Where a recipe's clips come from: references to one's own videos, or synthetic clips rendered on the spot."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from salmonn import dist
from salmonn.records import Reference, read_records
from salmonn.synthetic.render import SynthConfig, make_clips

CLIPS_NAME = "clips.jsonl"
HELDOUT_SEED_OFFSET = 1_000_000  # between the seeds of training and of held-out clips


def heldout_config(synth: SynthConfig, *, clips: int) -> SynthConfig:
    """Clips to measure on: of the training clips' kind, from a seed of their own that follows from theirs."""
    return replace(synth, clips=clips, seed=synth.seed + HELDOUT_SEED_OFFSET)


@dataclass(frozen=True)
class ClipSet:
    """References, and the folder that their video paths start from."""

    references: list[Reference]
    root: Path


def render_clips(clips_dir: Path, synth: SynthConfig) -> ClipSet:
    """The synthetic clips of a config; rank 0 renders those that are not there yet.

    Raises:
        ValueError: the folder holds clips of other sizes.
    """
    folder = clips_dir / f"seed{synth.seed}-{synth.clips}"
    if dist.is_main():
        with tqdm(total=synth.clips, desc=f"rendering {folder}", unit="clip") as bar:
            make_clips(folder, synth, progress=bar.update)
    dist.barrier()
    return ClipSet(read_records(folder / CLIPS_NAME, Reference), folder)


def read_clips(path: Path) -> ClipSet:
    """References of one's own videos, a JSONL file beside or above them.

    Raises:
        FileNotFoundError: there is no such file, or a video that it names is not there.
        ValueError: it holds no reference.
    """
    references = read_records(path, Reference)
    if not references:
        raise ValueError(f"{path} holds no reference: it needs one JSON line a video")
    absent = [reference.video for reference in references if not (path.parent / reference.video).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{path} names {len(absent)} videos that are not there, {absent[0]} first: "
            f"paths are taken from {path.parent.resolve()}"
        )
    return ClipSet(references, path.parent)


def load_clips(path: Path | None, *, clips_dir: Path, synth: SynthConfig) -> ClipSet:
    """References of one's own videos; without any, the synthetic clips of a config."""
    return read_clips(path) if path else render_clips(clips_dir, synth)


def all_texts(references: Sequence[Reference]) -> list[str]:
    """Every word that a tokenizer made for these references should know."""
    captions = [
        text
        for reference in references
        for text in (reference.caption, reference.human_caption, reference.visual_caption, reference.audio_caption)
    ]
    return captions + [
        text for reference in references for item in reference.questions for text in (item.question, item.answer)
    ]
