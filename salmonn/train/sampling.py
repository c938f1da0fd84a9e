"""Sampling of captions and answering of questions on all ranks.

The clips are cut into parts, which are balanced over the ranks by cost. Within a part, further captions join the batch
as others end; each part begins and ends with an empty batch. Rounding depends on what is decoded together, and parts on
the clips and the batch size alone: any number of processes gives the same captions to the last bit, also after a kill.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CachedGenerator, CaptionRequest, Generator, Sampling
from salmonn.caption.limits import BatchLimits
from salmonn.config import MAY_CHANGE
from salmonn.files import read_json, read_records, write_json, write_records
from salmonn.records import Caption
from salmonn.train.batches import make_batches, make_parts, map_batches
from salmonn.train.data import ClipSet
from salmonn.train.run_folder import load_or_create

log = logging.getLogger(__name__)

MAX_ANSWER_TOKENS = 16  # for the answer to a question
CAPTIONS_NAME = "captions.jsonl"
PARTIAL_NAME = "captions.parts"  # folder of finished parts while captions are sampled
REQUEST_NAME = "parts.json"  # file in it that says what they are parts of


@dataclass(frozen=True)
class SampleConfig(Sampling):
    """Sampling of several captions of each clip.

    Args:
        num_samples: captions of each clip.
        temperatures: temperatures of equal shares of the samples, instead of `temperature`; such as [1.0, 0.7] for
            half and half. RLHF Workflow (arXiv 2405.07863) samples so, for a wider choice of best and worst.
        batch_size: captions generated at once; on a GPU fewer where their KV cache would not fit.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    num_samples: int = 8
    temperatures: tuple[float, ...] | None = None
    batch_size: int = field(default=128, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(
                f"num_samples and batch_size must be at least 1, got {self.num_samples} and {self.batch_size}"
            )
        if self.temperatures is not None:
            count = len(self.temperatures)
            if not (count and all(Sampling(one).temperature for one in self.temperatures)) or self.num_samples % count:
                raise ValueError(
                    f"temperatures must be above 0, and num_samples {self.num_samples} a multiple of their number, got "
                    f"{list(self.temperatures)}"
                )

    def shares(self) -> tuple[float, ...]:
        """Return the temperatures of equal shares of the samples."""
        return self.temperatures or (self.temperature,)

    def greedy(self) -> "SampleConfig":
        """Return the same limits for the most likely caption of each clip."""
        return replace(self, temperature=0.0, temperatures=None, num_samples=1)


def sample_captions(
    captioner: Captioner,
    clips: ClipSet,
    config: SampleConfig,
    *,
    name: str,
    seed: int = 0,
    folder: Path | None = None,
    on_part: Callable[[Sequence[Caption]], object] | None = None,
) -> list[Caption]:
    """Sample captions of clips; all captions of a clip are consecutive.

    Args:
        captioner: the model.
        clips: clips with their features.
        config: sampling parameters.
        name: title of the progress bar.
        seed: random seed; each clip's own seed is derived from it and the clip's index.
        folder: folder that gets captions.jsonl, and each part as soon as it is finished, so that a killed run resumes
            from there; none to keep the captions in memory.
        on_part: called with the captions of each part of this rank once it is sampled, or found.
    """
    sample = partial(_sample, captioner, clips, config, name=name, seed=seed, on_part=on_part)
    if folder is None:
        return sample()
    parts_folder = folder / PARTIAL_NAME
    captions = load_or_create(folder / CAPTIONS_NAME, Caption, partial(sample, folder=parts_folder))
    if dist.is_main():
        shutil.rmtree(parts_folder, ignore_errors=True)
    return captions


def _sample(
    captioner: Captioner,
    clips: ClipSet,
    config: SampleConfig,
    *,
    name: str,
    seed: int,
    folder: Path | None = None,
    on_part: Callable[[Sequence[Caption]], object] | None,
) -> list[Caption]:
    references = clips.references
    lengths = [len(clips.features_of(reference)) for reference in references]
    limits = _limits(captioner, config.batch_size)
    if folder:
        request = {
            "model": captioner.name,
            "prompt": captioner.default_prompt(),
            "sampling": asdict(config),
            "seed": seed,
            "clips": [[reference.video, length] for reference, length in zip(references, lengths, strict=True)],
        }
        limits = _resume(folder, request, limits=limits)
    parts = make_parts(lengths, size=limits.num_rows // config.num_samples)
    finished = _find_finished(folder, num_parts=len(parts)) if folder else {}
    generator = _make_generator(captioner, clips, limits=limits)

    def sample(number: int) -> list[list[Caption]]:
        if number in finished:
            captions = read_records(finished[number], Caption)
        else:
            captions = _sample_part(generator, clips, parts[number], config, seed=seed)
            if folder:
                write_records(_part_path(folder, number), captions)
        if on_part:
            on_part(captions)
        return [captions[start : start + config.num_samples] for start in range(0, len(captions), config.num_samples)]

    num_generated = config.num_samples * config.max_new_tokens
    costs = [
        0 if number in finished else sum(lengths[index] + num_generated for index in indices)
        for number, indices in enumerate(parts)
    ]
    return [one for group in map_batches(sample, parts, costs, name=name, unit="clip") for one in group]


def _sample_part(
    generator: Generator, clips: ClipSet, indices: Sequence[int], config: SampleConfig, *, seed: int
) -> list[Caption]:
    """Sample captions of the clips of a part, in an order that depends on nothing else."""
    size = config.num_samples // len(config.shares())
    requests = [
        CaptionRequest(
            Path(clips.references[index].video),
            sampling=replace(config, temperature=temperature, temperatures=None),
            seed=seed * 1_000_003 + index + (share << 40),  # the same would correlate the shares
            num_samples=size,
        )
        for share, temperature in enumerate(config.shares())
        for index in indices
    ]
    captions = generator.generate(requests)
    return [
        replace(one, sample=share * size + one.sample)
        for place in range(len(indices))
        for share, of_clip in enumerate(captions[place :: len(indices)])
        for one in of_clip
    ]


def _limits(captioner: Captioner, batch_size: int) -> BatchLimits:
    """Return what every rank can decode together: all ranks share the same parts."""
    every = dist.gather([captioner.limits(batch_size)])
    return min(every, key=lambda one: math.inf if one.num_tokens is None else one.num_tokens)


def _make_generator(captioner: Captioner, clips: ClipSet, *, limits: BatchLimits) -> CachedGenerator:
    features = {Path(reference.video): clips.features_of(reference) for reference in clips.references}
    return CachedGenerator(captioner, features, limits=limits)


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"part_{number:05d}.jsonl"


def _resume(folder: Path, request: Mapping[str, Any], *, limits: BatchLimits) -> BatchLimits:
    """Return the limits of a killed run with this request, whose parts are kept, or else the given ones."""
    if dist.is_main():  # only rank 0 looks, as NFS shows files late
        path = folder / REQUEST_NAME
        request = dict(json.loads(json.dumps(request)))  # with lists for tuples, as in the file
        before = read_json(path) if path.is_file() else {}
        stored = before.pop("limits", None)
        if before == request and stored:
            limits = BatchLimits(**stored)
        elif folder.is_dir():
            log.warning("%s contains captions of other clips, or from another model or config; sampling again", folder)
            shutil.rmtree(folder)
        write_json(path, request | {"limits": asdict(limits)})
    return dist.gather([limits])[0]


def _find_finished(folder: Path, *, num_parts: int) -> dict[int, Path]:
    """Return the files of the parts that a killed run finished."""
    paths = {number: _part_path(folder, number) for number in range(num_parts)}
    finished = [number for number, path in paths.items() if dist.is_main() and path.is_file()]
    return {number: paths[number] for number in dist.gather([finished])[0]}


def answer_questions(captioner: Captioner, clips: ClipSet, *, name: str, batch_size: int = 256) -> list[Caption]:
    """Answer all questions about clips; the prompt of each answer is its question."""
    questions = [(reference, item.question) for reference in clips.references for item in reference.questions]
    lengths = [len(clips.features_of(reference)) for reference, _ in questions]
    batches = make_batches(lengths, size=batch_size)
    generator = _make_generator(captioner, clips, limits=_limits(captioner, batch_size))

    def answer(number: int) -> list[Caption]:
        batch = [questions[index] for index in batches[number]]
        sampling = Sampling(max_new_tokens=MAX_ANSWER_TOKENS)
        requests = [CaptionRequest(Path(reference.video), question, sampling) for reference, question in batch]
        return [caption for (caption,) in generator.generate(requests)]

    costs = [sum(lengths[index] + MAX_ANSWER_TOKENS for index in indices) for indices in batches]
    return map_batches(answer, batches, costs, name=name, unit="question")
