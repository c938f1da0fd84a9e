"""Captions of clips as they are read: others join as captions end; or, in a shape, batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from salmonn.caption.encode_ahead import TimedInputs, encode_ahead, make_encoder
from salmonn.caption.generator import CaptionRequest, SegmentResult, to_failure
from salmonn.caption.limits import BatchLimits
from salmonn.caption.loader import ClipJob, ReadResult
from salmonn.caption.shape import Shape, shape_captions
from salmonn.caption.streaming import Completion
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.records import Caption

if TYPE_CHECKING:
    from salmonn.caption.captioner import Captioner, RequestedSequence
    from salmonn.caption.scheduler import Scheduler


def caption_clips(
    captioner: "Captioner", clips: Iterable[ReadResult[TimedInputs]], *, limits: BatchLimits
) -> Iterator[list[SegmentResult]]:
    """Caption clips; each is taken when there is room for it, and then waited for.

    What is decoded together hence depends on the order of the clips, and not on the time that reading takes. On a GPU
    the next clips are encoded meanwhile.

    Args:
        captioner: local model.
        clips: clips, or why they cannot be read.
        limits: limits of the batch.

    Yields:
        The results that became ready together.
    """
    scheduler, jobs, encoder = captioner.scheduler(limits), dict[int, ClipJob](), make_encoder(captioner)

    def advance() -> Iterator[list[SegmentResult]]:
        ended = [(jobs.pop(sequence.index), sequence.request, outcome) for sequence, outcome in scheduler.advance()]
        if ended:
            yield [_to_result(job, _to_text(captioner, request, outcome)) for job, request, outcome in ended]

    num_failed = 0  # in a row
    for number, (job, clip) in enumerate(encode_ahead(clips, encoder)):
        if encoder:
            scheduler.limits = replace(limits, reserved_bytes=encoder.reserved_bytes)
        if isinstance(clip, ValueError):
            yield [_to_result(job, clip)]
            num_failed += 1
            # Failures in a row are counted in the order of the clips: those before them must not remain unfinished.
            while jobs and num_failed >= limits.num_rows:
                yield from advance()
            continue
        num_failed = 0
        jobs[number] = job
        sequences = captioner.sequences(job.request, clip.inputs, index=number)
        for one in sequences:
            one.must_run_alone = clip.must_run_alone
        scheduler.waiting += sequences
        while not scheduler.has_room:
            yield from advance()
    while jobs:
        yield from advance()


def caption_in_shape(
    captioner: "Captioner",
    batch: Sequence[ReadResult[TimedInputs]],
    shape: Shape,
    scheduler: "Scheduler[RequestedSequence]",
) -> list[SegmentResult]:
    """Caption a batch of clips in a shape; the encoders run once for all questions about a clip.

    Args:
        captioner: local model.
        batch: clips, or why they cannot be read.
        shape: shape of the captions.
        scheduler: scheduler of all batches; all questions of one are decoded together as far as memory allows.
    """
    readable = [(job, clip) for job, clip in batch if not isinstance(clip, ValueError)]
    held: Sequence[ClipInputs | ClipFeatures] = [clip.inputs for _, clip in readable]
    if shape.may_ask_again:
        # Clips that do not fit into memory together are encoded with each question, one by one.
        with suppress(torch.OutOfMemoryError):
            held = captioner.encode([one for one in held if isinstance(one, ClipInputs)])

    def answer(asked: Sequence[tuple[int, CaptionRequest]]) -> list[Caption | str]:
        answers = [_prompt_error(captioner, request) for _, request in asked]
        usable = [number for number, error in enumerate(answers) if error is None]
        requests, clips = [asked[number][1] for number in usable], [held[asked[number][0]] for number in usable]
        scheduler.limits = replace(scheduler.limits, num_rows=max(len(requests), 1))
        for sequence, outcome in scheduler.run(captioner.groups(requests, clips)):
            answers[usable[sequence.index]] = _to_text(captioner, sequence.request, outcome)
        return [one for one in answers if one is not None]

    requests = [
        replace(job.request, prompt=job.request.prompt or captioner.default_prompt(job.request.modality))
        for job, _ in readable
    ]
    clips = [(request, clip.seconds) for request, (_, clip) in zip(requests, readable, strict=True)]
    captions = iter(shape_captions(shape, clips, answer=answer))
    return [_to_result(job, clip if isinstance(clip, ValueError) else next(captions)) for job, clip in batch]


def _prompt_error(captioner: "Captioner", request: CaptionRequest) -> Caption | str | None:
    """Return what is wrong with a prompt, whose fields may hold any text."""
    try:
        captioner.processor.check_prompt(captioner.resolve_prompt(request))
    except ValueError as error:
        return str(error)
    return None


def _to_text(captioner: "Captioner", request: CaptionRequest, outcome: Completion | Exception) -> Caption | str:
    return str(outcome) if isinstance(outcome, Exception) else captioner.to_caption(request, outcome)


def _to_result(job: ClipJob, outcome: Caption | str | ValueError) -> SegmentResult:
    """Return the result of a segment: its caption, why it has none, or why its file cannot be read."""
    if isinstance(outcome, ValueError):
        return SegmentResult(job.index, job.num_segments, to_failure(job.request, str(outcome), stage="read"))
    if isinstance(outcome, str):
        failure = to_failure(job.request, f"{job.request.path}: {outcome}", stage="caption")
        return SegmentResult(job.index, job.num_segments, failure)
    return SegmentResult(job.index, job.num_segments, outcome)
