"""Measuring a model on held-out clips: captions judged against events, questions against answers, on all ranks.

What is encoded, captioned and answered goes through the model in batches of like length, which are spread over the
ranks by what they cost. Batches and their seeds follow from the clips alone: any number of processes makes the same.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.loader import length_buckets
from salmonn.media.container import declared_seconds
from salmonn.model.layout import ClipFeatures
from salmonn.records import Caption, Reference, Score, Unscored, read_json, read_records, write_json, write_records
from salmonn.score.formats import write_scores
from salmonn.score.judge import Judge, ScoringTask
from salmonn.score.metrics import Rates, compute_rates, qa_accuracy
from salmonn.score.scoring import make_judge_info
from salmonn.train.data import ClipCache, Example
from salmonn.train.feature_cache import FeatureCache
from salmonn.train.references import ClipSet

log = logging.getLogger(__name__)
Item = TypeVar("Item")

SIDE_BY_SIDE = 128  # sequences that a toy model generates at once
ANSWER_TOKENS = 16  # of the answer to a question
REQUEST_NAME = "parts.json"
RATES_NAME = "rates.json"


@dataclass(frozen=True)
class SampleConfig:
    """What is drawn of each clip: so many captions, how, and from which seed."""

    sampling: Sampling
    seed: int = 0
    num_samples: int = 1


@dataclass(frozen=True)
class Evaluation:
    """A model's captions of clips and answers to their questions, what the judge said, and the rates over it all."""

    captions: list[Caption]
    answers: list[Caption]
    results: list[Score | Unscored]
    rates: Rates


def cut(lengths: Sequence[float], *, size: int) -> list[list[int]]:
    """Places of a list in even batches of at most `size` (at least 1) and of like length, the longest first."""
    return length_buckets([-length for length in lengths], size=max(1, size))


def _spread_out(
    make: Callable[[int], list[Item]], batches: Sequence[Sequence[int]], costs: Sequence[float], *, name: str, unit: str
) -> list[Item]:
    """What `make` gives of all batches, one item a place, in the order of places; each rank makes its share."""
    shares = dist.balance(costs)
    mine, made = shares[dist.rank()], []
    total = sum(len(batches[number]) for number in mine)
    with tqdm(total=total, desc=name, unit=unit, disable=not dist.is_main()) as bar:
        for number in mine:
            made.append(make(number))
            bar.update(len(batches[number]))
    placed = {
        place: item
        for places, items in zip(batches, dist.gather_balanced(made, shares), strict=True)
        for place, item in zip(places, items, strict=True)
    }
    return [placed[place] for place in range(len(placed))]


def encode_clips(
    captioner: Captioner, *sets: ClipSet, name: str, store: FeatureCache | None = None
) -> list[list[ClipFeatures]]:
    """The blocks of each set's clips from the frozen towers; see `encode_examples`."""
    examples = [[Example(clips.root / reference.video, ()) for reference in clips.references] for clips in sets]
    blocks = encode_examples(captioner, [one for each in examples for one in each], name=name, store=store)
    return [[blocks[example.clip] for example in each] for each in examples]


def encode_examples(
    captioner: Captioner, examples: Sequence[Example], *, name: str, store: FeatureCache | None = None
) -> dict[tuple[Any, ...], ClipFeatures]:
    """The block of each clip that examples are about, from the frozen towers, which it goes through alone.

    So its tokens do not depend on what other clips there are, to the last bit. Most of the time goes into reading: what
    a clip costs is how many seconds its file says that it lasts.

    Args:
        captioner: the model.
        examples: whose clips are meant.
        name: of the clips, for the progress bar.
        store: has the blocks of clips that were encoded before, and takes the others; without, all stay in memory.

    Raises:
        ClipError: a clip cannot be read, or lacks what is learnt from.
        ValueError: a process does not see the store's files.
    """
    clips = list({example.clip: example for example in examples}.values())
    keys = store.keys(clips) if store else [""] * len(clips)
    found = store.find_complete(keys) if store else set()
    seconds = dist.gather(
        [_to_read(clip, key in found) for clip, key in dist.shard(list(zip(clips, keys, strict=True)))]
    )
    batches, read = cut(seconds, size=1), ClipCache(captioner.processor, max_bytes=0)

    def encode(number: int) -> list[ClipFeatures | None]:
        """None where the block is in the store."""
        (place,) = batches[number]
        if keys[place] in found:
            return [None]
        (block,) = captioner.encode([read(clips[place])])
        return [None if store and store.save(keys[place], block) else block]

    costs = [seconds[place] for (place,) in batches]
    made = _spread_out(encode, batches, costs, name=f"reading {name}", unit="clip")
    blocks = store.load_missing(keys, made, name=name) if store else [block for block in made if block is not None]
    return {clip.clip: block for clip, block in zip(clips, blocks, strict=True)}


def _to_read(example: Example, is_found: bool) -> float:
    """Seconds of a clip that is to be read, and one for opening it: all that is known of one that states no length."""
    return 0.0 if is_found else 1 + declared_seconds(example.video)


def sample_captions(
    captioner: Captioner,
    references: Sequence[Reference],
    blocks: Sequence[ClipFeatures],
    *,
    draw: SampleConfig,
    name: str,
    side_by_side: int = SIDE_BY_SIDE,
    parts: Path | None = None,
) -> list[Caption]:
    """Captions of clips, a clip's captions one after the other.

    Args:
        captioner: the model.
        references: of the clips.
        blocks: of the clips, as `encode_clips` gives them.
        draw: what is drawn; each clip's seed follows from its seed and the clip's place.
        name: for the progress bar.
        side_by_side: captions that are generated at once.
        parts: folder that takes each batch's captions as soon as they are made, so that a killed run goes on from
            there; `clear_parts` removes it once the whole is written.
    """
    lengths = [len(block) for block in blocks]
    batches = cut(lengths, size=side_by_side // draw.num_samples)
    videos = [reference.video for reference in references]
    request = _to_request(captioner, draw, [[videos[place] for place in places] for places in batches])
    done = _find_parts(parts, request) if parts else {}

    def caption(number: int) -> list[list[Caption]]:
        if number in done:
            captions = read_records(done[number], Caption)
        else:
            places = batches[number]
            chosen = [videos[place] for place in places], [blocks[place] for place in places]
            seeds = [draw.seed * 1_000_003 + place for place in places]
            captions = _caption_batch(captioner, *chosen, draw=draw, seeds=seeds)
            if parts:
                write_records(_part(parts, number), captions)
        return [captions[start : start + draw.num_samples] for start in range(0, len(captions), draw.num_samples)]

    generated = draw.num_samples * draw.sampling.max_new_tokens
    costs = [
        0 if number in done else sum(lengths[place] + generated for place in places)
        for number, places in enumerate(batches)
    ]
    groups = _spread_out(caption, batches, costs, name=name, unit="clip")
    return [caption for group in groups for caption in group]


def _caption_batch(
    captioner: Captioner,
    videos: Sequence[str],
    blocks: Sequence[ClipFeatures],
    *,
    draw: SampleConfig,
    seeds: Sequence[int],
) -> list[Caption]:
    requests = [
        CaptionRequest(Path(video), sampling=draw.sampling, seed=seed, num_samples=draw.num_samples)
        for video, seed in zip(videos, seeds, strict=True)
    ]
    samples = captioner.generate(requests, clips=blocks, batch_size=len(blocks) * draw.num_samples)
    return [caption for captions in samples for caption in captions]


def _to_request(captioner: Captioner, draw: SampleConfig, batches: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What the parts are parts of."""
    return {"model": captioner.name, "prompt": captioner.default_prompt(), "draw": asdict(draw), "batches": batches}


def _part(parts: Path, number: int) -> Path:
    return parts / f"part_{number:05d}.jsonl"


def _find_parts(parts: Path, request: Mapping[str, Any]) -> dict[int, Path]:
    """The parts of a request that a run before finished, as rank 0 finds them: others may see a shared disk later."""
    found: list[int] = []
    if dist.is_main():
        path = parts / REQUEST_NAME
        if parts.is_dir() and not (path.is_file() and read_json(path) == request):
            log.warning("%s holds captions of other clips, of another model or draw: they are made anew", parts)
            shutil.rmtree(parts)
        write_json(path, request)
        found = [number for number in range(len(request["batches"])) if _part(parts, number).is_file()]
    return {number: _part(parts, number) for number in dist.gather([found])[0]}


def clear_parts(parts: Path) -> None:
    """Remove the parts of captions that are written as a whole, or that were never begun."""
    if dist.is_main():
        shutil.rmtree(parts, ignore_errors=True)


def judge_captions(
    captions: Sequence[Caption], references: Mapping[str, Reference], *, judge: Judge
) -> list[Score | Unscored]:
    """What the judge says, in the captions' order.

    The clips are spread over the ranks by the words that the judge reads; equal captions of one are asked about once.
    """
    by_video: dict[str, list[int]] = {}
    for place, caption in enumerate(captions):
        by_video.setdefault(caption.video, []).append(place)
    groups = list(by_video.values())
    shares = dist.balance([_count_words([captions[place] for place in group], references) for group in groups])
    mine = [groups[number] for number in shares[dist.rank()]]
    tasks = [ScoringTask(references[captions[place].video], captions[place]) for group in mine for place in group]
    results = iter(judge.judge(tasks))
    judged = dist.gather_balanced([[next(results) for _ in group] for group in mine], shares)
    placed = {
        place: result
        for group, part in zip(groups, judged, strict=True)
        for place, result in zip(group, part, strict=True)
    }
    return [placed[place] for place in range(len(captions))]


def _count_words(captions: Sequence[Caption], references: Mapping[str, Reference]) -> int:
    """Words that a judge reads: of the captions, and with each of them those of the events."""
    texts = [
        text for caption in captions for text in (caption.text, *(e.text for e in references[caption.video].events))
    ]
    return sum(len(text.split()) for text in texts)


def require_scores(results: Sequence[Score | Unscored], *, name: str) -> list[Score]:
    """The scores among the results; what could not be scored is told, and left out.

    Raises:
        ValueError: there is no score.
    """
    unscored = [result for result in results if isinstance(result, Unscored)]
    if unscored:
        first = unscored[0]
        words = f"{name}: {len(unscored)} of {len(results)} captions are unscored, first {first.video}: {first.reason}"
        if len(unscored) == len(results):
            raise ValueError(words)
        log.warning(words)
    return [result for result in results if isinstance(result, Score)]


def answer_questions(
    captioner: Captioner,
    references: Sequence[Reference],
    blocks: Sequence[ClipFeatures],
    *,
    name: str,
    side_by_side: int = 2 * SIDE_BY_SIDE,
) -> list[Caption]:
    """The model's answers to all the references' questions, each with its question as prompt."""
    asked = [
        (reference.video, item.question, block)
        for reference, block in zip(references, blocks, strict=True)
        for item in reference.questions
    ]
    lengths = [len(block) for _, _, block in asked]
    batches = cut(lengths, size=side_by_side)

    def answer(number: int) -> list[Caption]:
        batch = [asked[place] for place in batches[number]]
        sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
        requests = [CaptionRequest(Path(video), question, sampling) for video, question, _ in batch]
        answers = captioner.generate(requests, clips=[block for _, _, block in batch], batch_size=len(batch))
        return [answer for (answer,) in answers]

    costs = [sum(lengths[place] + ANSWER_TOKENS for place in places) for places in batches]
    return _spread_out(answer, batches, costs, name=name, unit="question")


def write_evaluation(folder: Path, result: Evaluation, *, judge: Judge) -> None:
    """Write captions.jsonl, answers.jsonl, scores.jsonl and, last of all, rates.json. Rank 0 alone calls it."""
    write_records(folder / "captions.jsonl", result.captions)
    write_records(folder / "answers.jsonl", result.answers)
    write_scores(folder / "scores.jsonl", make_judge_info(judge, totals=[result.rates.total]), result.results)
    write_json(folder / RATES_NAME, asdict(result.rates))


def evaluate(
    captioner: Captioner,
    references: Sequence[Reference],
    blocks: Sequence[ClipFeatures],
    *,
    judge: Judge,
    sampling: Sampling,
    name: str,
    side_by_side: int = SIDE_BY_SIDE,
) -> Evaluation:
    """Captions (one a clip), their scores and rates, and the accuracy of answers to the clips' questions, if any."""
    captions = sample_captions(
        captioner, references, blocks, draw=SampleConfig(sampling), name=f"{name}: captions", side_by_side=side_by_side
    )
    answers = answer_questions(captioner, references, blocks, name=f"{name}: questions", side_by_side=side_by_side)
    by_video = {reference.video: reference for reference in references}
    results = judge_captions(captions, by_video, judge=judge)
    scores = require_scores(results, name=name)
    accuracy = qa_accuracy(by_video, answers) if any(reference.questions for reference in references) else None
    return Evaluation(captions, answers, results, compute_rates(scores, qa_accuracy=accuracy))
