"""Encoding, sampling, question answering and judging of clips on all ranks, and evaluation on held-out clips.

Work is cut into batches of similar length, which are balanced over the ranks by cost. Batches and their seeds depend on
the clips and the batch size, so any number of processes gives the same results.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CachedGenerator, CaptionRequest, Sampling
from salmonn.caption.loader import length_buckets
from salmonn.config import MAY_CHANGE
from salmonn.media.container import ClipError, declared_shape
from salmonn.model.layout import ClipFeatures
from salmonn.preference.voter_reward import find_exploitability
from salmonn.records import Caption, Reference, Score, Unscored, read_json, read_records, write_json, write_records
from salmonn.score.formats import write_scores
from salmonn.score.judge import Judge, ScoringTask
from salmonn.score.metrics import Rates, compute_rates, qa_accuracy
from salmonn.score.scoring import make_judge_info
from salmonn.synthetic.raters import Rater
from salmonn.train.data import ClipCache, ClipSet, ClipSource
from salmonn.train.dry_run import count_clip_tokens
from salmonn.train.feature_cache import FeatureCache
from salmonn.train.left_out import LeftOut
from salmonn.train.memory import NumberSizes, Stack, kv_cache_bytes, largest_batch
from salmonn.train.run_folder import load_or_create

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ANSWER_TOKENS = 16  # for the answer to a question
CAPTIONS_NAME = "captions.jsonl"
PARTIAL_NAME = "captions.parts"  # folder of finished batches while captions are sampled
REQUEST_NAME = "parts.json"  # file in it that says what they are batches of
ANSWERS_NAME = "answers.jsonl"
SCORES_NAME = "scores.jsonl"
RATES_NAME = "rates.json"
MAX_PROMPT_TOKENS = 512  # of a prompt besides its clip, assumed for the size of the KV cache
KV_CACHE_SHARE = 0.6  # of the free memory of a GPU; prefill and decode steps need the rest
LAYOUT_BYTES_PER_TOKEN = 4 * 8  # its place in the order and its three positions


@dataclass(frozen=True)
class SampleConfig(Sampling):
    """Sampling of several captions of each clip.

    Args:
        num_samples: captions of each clip.
        temperatures: temperatures of equal shares of the samples, in place of `temperature`; such as [1.0, 0.7] for
            half and half. RLHF Workflow (arXiv 2405.07863) samples so, for a wider choice of best and worst.
        batch_size: captions generated at once; halved until their KV cache fits on the GPU.
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


@dataclass(frozen=True)
class Evaluation:
    """Captions of held-out clips with their scores, answers to the clips' questions, and the rates of both."""

    captions: list[Caption]
    answers: list[Caption]
    results: list[Score | Unscored]
    rates: Rates


def make_batches(lengths: Sequence[float], *, size: int) -> list[list[int]]:
    """Group indices into batches of at most `size` (at least 1) and of similar length, the longest first."""
    return length_buckets([-length for length in lengths], size=max(1, size))


def map_batches(
    compute: Callable[[int], list[T]], batches: Sequence[Sequence[int]], costs: Sequence[float], *, name: str, unit: str
) -> list[T]:
    """Compute all batches, balanced over the ranks, and return their items on every rank.

    Args:
        compute: number of a batch -> one item for each of its indices.
        batches: indices of the items.
        costs: estimated cost of each batch.
        name: title of the progress bar.
        unit: unit of the progress bar.

    Returns:
        Items in the order of their indices.
    """
    shares = dist.balance(costs)
    mine, computed = shares[dist.rank()], []
    total = sum(len(batches[number]) for number in mine)
    with tqdm(total=total, desc=name, unit=unit, disable=not dist.is_main()) as bar:
        for number in mine:
            computed.append(compute(number))
            bar.update(len(batches[number]))
    return dist.ungroup(dist.gather_balanced(computed, shares), batches)


def cache_features(
    captioner: Captioner, *sets: ClipSet, name: str, cache: FeatureCache | None = None, left_out: LeftOut | None = None
) -> list[ClipSet]:
    """Return sets of clips with the features of their clips, without clips that cannot be read; see `encode_clips`."""
    sources = [clips.source(reference) for clips in sets for reference in clips.references]
    features = encode_clips(captioner, sources, name=name, cache=cache, left_out=left_out)
    return [
        replace(clips, features=features, references=[one for one in clips.references if clips.source(one) in features])
        for clips in sets
    ]


def encode_clips(
    captioner: Captioner,
    sources: Sequence[ClipSource],
    *,
    name: str,
    cache: FeatureCache | None = None,
    left_out: LeftOut | None = None,
) -> dict[ClipSource, ClipFeatures]:
    """Compute the features of clips with the frozen encoders, each distinct clip once.

    A clip is encoded alone, so that its features do not depend on other clips to the last bit. Reading takes most of
    the time, so the cost of a clip is the duration that its file declares.

    Args:
        captioner: model with frozen encoders.
        sources: clips.
        name: what the clips are, for the progress bar.
        cache: feature cache on disk; none to keep all features in memory.
        left_out: clips that are left out of the result, and how many more may be; by default, the first clip that
            cannot be read raises an error.

    Raises:
        ClipError: a clip cannot be read, or lacks the video or audio that is needed.
        ValueError: more clips fail than may, a process does not see the files of the cache, or the features do not
            fit.
    """
    left_out = left_out or LeftOut(None, max_failures=0)
    left_out_sources, max_failures = left_out.sources, left_out.max_failures
    clips = [clip for clip in dict.fromkeys(sources) if clip not in left_out_sources]
    keys = cache.keys(clips) if cache else [""] * len(clips)
    found = cache.find_complete(keys) if cache else set()
    seconds = _plan_encoding(captioner, clips, keys, found, name=name, cache=cache, may_fail=max_failures > 0)
    batches, read = make_batches(seconds, size=1), ClipCache(captioner.processor, max_bytes=0)

    def encode(number: int) -> list[ClipFeatures | str | None]:
        """Return the features of one clip, None if the cache holds them, or why it cannot be read."""
        (index,) = batches[number]
        if keys[index] in found:
            return [None]
        try:
            (features,) = captioner.encode([read(clips[index])])
        except ClipError as error:
            if not max_failures:
                raise
            return [str(error)]
        is_saved = cache is not None and cache.save(keys[index], features)
        if not is_saved and dist.world_size() > 1:
            raise ValueError(
                f"the feature cache has no room for the features of {clips[index].video}; raise "
                "feature_cache.max_gib or free space on its disk, and start again: the clips encoded so far are kept"
            )
        return [None if is_saved else features]

    costs = [seconds[index] for (index,) in batches]
    computed = map_batches(encode, batches, costs, name=f"encoding {name}", unit="clip")
    unreadable = {clip: one for clip, one in zip(clips, computed, strict=True) if isinstance(one, str)}
    left_out.add(unreadable, num_clips=len(clips), name=name)
    readable = [clip for clip in clips if clip not in unreadable]
    features = [one for one in computed if not isinstance(one, str)]
    if cache:
        kept = [key for key, one in zip(keys, computed, strict=True) if not isinstance(one, str)]
        return dict(zip(readable, cache.load_missing(kept, features, name=name), strict=True))
    return dict(zip(readable, (one for one in features if one is not None), strict=True))


def _plan_encoding(
    captioner: Captioner,
    clips: Sequence[ClipSource],
    keys: Sequence[str],
    found: Set[str],
    *,
    name: str,
    cache: FeatureCache | None,
    may_fail: bool,
) -> list[float]:
    """Return the cost of encoding each clip on all ranks, 0 where the cache holds it.

    Raises:
        ValueError: the features do not fit in the cache.
    """
    mine = dist.shard(list(zip(clips, keys, strict=True)))
    estimates = dist.gather(
        [(0.0, 0) if key in found else _estimate(clip, captioner, may_fail=may_fail) for clip, key in mine]
    )
    if cache:
        num_missing = sum(key not in found for key in keys)
        cache.require_room(sum(size for _, size in estimates), num_clips=num_missing, name=name)
    return [cost for cost, _ in estimates]


def _estimate(clip: ClipSource, captioner: Captioner, *, may_fail: bool) -> tuple[float, int]:
    """Return the cost of reading a clip in seconds of video, and the bytes of its features, from its file's header."""
    try:
        shape = declared_shape(clip.video)
    except ClipError:
        if may_fail:  # it fails again when it is read
            return 1.0, 0
        raise
    end = min(shape.seconds, clip.end_seconds or shape.seconds)
    seconds = max(0.0, end - (clip.start_seconds or 0.0))
    network = captioner.network
    width, itemsize = network.feature_width, network.dtype.itemsize
    tokens = count_clip_tokens(captioner.processor.config, replace(shape, seconds=seconds), modality=clip.modality)
    # An opened file costs as much as a second of video, whose duration may be unknown.
    return 1 + shape.seconds, tokens * (width * itemsize + LAYOUT_BYTES_PER_TOKEN)


def sample_captions(
    captioner: Captioner,
    clips: ClipSet,
    config: SampleConfig,
    *,
    name: str,
    seed: int = 0,
    folder: Path | None = None,
) -> list[Caption]:
    """Sample captions of clips; all captions of a clip are consecutive.

    Args:
        captioner: the model.
        clips: clips with their features.
        config: sampling parameters.
        name: title of the progress bar.
        seed: random seed; each clip's own seed is derived from it and the clip's index.
        folder: folder that gets captions.jsonl, and each batch as soon as it is finished, so that a killed run resumes
            from there; none to keep the captions in memory.
    """
    if folder is None:
        return _sample(captioner, clips, config, name=name, seed=seed)
    partial = folder / PARTIAL_NAME
    captions = load_or_create(
        folder / CAPTIONS_NAME,
        Caption,
        lambda: _sample(captioner, clips, config, name=name, seed=seed, partial=partial),
    )
    if dist.is_main():
        shutil.rmtree(partial, ignore_errors=True)
    return captions


def _sample(
    captioner: Captioner, clips: ClipSet, config: SampleConfig, *, name: str, seed: int, partial: Path | None = None
) -> list[Caption]:
    references = clips.references
    lengths = [len(clips.features_of(reference)) for reference in references]
    batch_size = _batch_size(captioner, lengths, config)
    if partial:
        request = {
            "model": captioner.name,
            "prompt": captioner.default_prompt(),
            "sampling": asdict(config),
            "seed": seed,
            "clips": [[reference.video, length] for reference, length in zip(references, lengths, strict=True)],
        }
        batch_size = _resume(partial, request, batch_size=batch_size)
    batches = make_batches(lengths, size=batch_size // config.num_samples)
    finished = _find_finished(partial, num_batches=len(batches)) if partial else {}
    generator = _make_generator(captioner, clips, batch_size=max(batch_size, config.num_samples))

    size = config.num_samples // len(config.shares())

    def sample(number: int) -> list[list[Caption]]:
        if number in finished:
            captions = read_records(finished[number], Caption)
        else:
            shares = [
                generator.generate(
                    [
                        CaptionRequest(
                            Path(references[index].video),
                            sampling=replace(config, temperature=temperature, temperatures=None),
                            seed=seed * 1_000_003 + index + (share << 40),  # the same would correlate the shares
                            num_samples=size,
                        )
                        for index in batches[number]
                    ]
                )
                for share, temperature in enumerate(config.shares())
            ]
            captions = [
                replace(one, sample=share * size + one.sample)
                for of_clip in zip(*shares, strict=True)
                for share, group in enumerate(of_clip)
                for one in group
            ]
            if partial:
                write_records(_partial_path(partial, number), captions)
        return [captions[start : start + config.num_samples] for start in range(0, len(captions), config.num_samples)]

    num_generated = config.num_samples * config.max_new_tokens
    costs = [
        0 if number in finished else sum(lengths[index] + num_generated for index in indices)
        for number, indices in enumerate(batches)
    ]
    return [one for group in map_batches(sample, batches, costs, name=name, unit="clip") for one in group]


def _batch_size(captioner: Captioner, lengths: Sequence[int], config: SampleConfig) -> int:
    """Return the number of captions to generate at once: as configured, or as many as fit on each rank's GPU."""
    device = captioner.network.device
    if device.type != "cuda" or not lengths:
        return config.batch_size
    numbers = NumberSizes(captioner.network.dtype.itemsize, captioner.network.dtype.itemsize)
    bytes_of = partial(kv_cache_bytes, Stack.of(captioner.network.lm.config.get_text_config()), numbers)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for reuse
    size = largest_batch(
        config.batch_size,
        num_samples=config.num_samples,
        prefix_bytes=bytes_of(tokens=max(lengths) + MAX_PROMPT_TOKENS),
        caption_bytes=bytes_of(tokens=config.max_new_tokens),
        budget=KV_CACHE_SHARE * (torch.cuda.mem_get_info(device)[0] + cached),
    )
    return min(dist.gather([size]))  # all ranks share the same batches


def _make_generator(captioner: Captioner, clips: ClipSet, *, batch_size: int) -> CachedGenerator:
    features = {Path(reference.video): clips.features_of(reference) for reference in clips.references}
    return CachedGenerator(captioner, features, batch_size=batch_size)


def _partial_path(partial: Path, number: int) -> Path:
    return partial / f"part_{number:05d}.jsonl"


def _resume(partial: Path, request: Mapping[str, Any], *, batch_size: int) -> int:
    """Return the batch size of a killed run with this request, whose batches are kept, or else the given one."""
    if dist.is_main():  # only rank 0 looks, as NFS shows files late
        path = partial / REQUEST_NAME
        request = dict(json.loads(json.dumps(request)))  # with lists for tuples, as in the file
        before = read_json(path) if path.is_file() else {}
        stored = before.pop("batch_size", None)
        if before == request and stored:
            batch_size = stored
        elif partial.is_dir():
            log.warning("%s contains captions of other clips, or from another model or config; sampling again", partial)
            shutil.rmtree(partial)
        write_json(path, request | {"batch_size": batch_size})
    return dist.gather([batch_size])[0]


def _find_finished(partial: Path, *, num_batches: int) -> dict[int, Path]:
    """Return the files of the batches that a killed run finished."""
    paths = {number: _partial_path(partial, number) for number in range(num_batches)}
    finished = [number for number, path in paths.items() if dist.is_main() and path.is_file()]
    return {number: paths[number] for number in dist.gather([finished])[0]}


def judge_captions(
    captions: Sequence[Caption],
    references: Mapping[str, Reference],
    *,
    judge: Callable[[Sequence[ScoringTask]], Sequence[T]],
) -> list[T]:
    """Judge captions on all ranks; results in the order of the captions.

    The clips are balanced over the ranks by the number of words to read. All captions of a clip are judged by one rank,
    so that equal ones are judged once.

    Args:
        captions: captions of any clips.
        references: annotations by video.
        judge: tasks -> a result for each; a judge's or a reward's method.
    """
    by_video: dict[str, list[int]] = {}
    for index, caption in enumerate(captions):
        by_video.setdefault(caption.video, []).append(index)
    groups = list(by_video.values())

    def count_words(index: int) -> int:
        """Return the words that a judge reads: the caption, and the events with it."""
        events = references[captions[index].video].events
        return sum(len(text.split()) for text in (captions[index].text, *(event.text for event in events)))

    shares = dist.balance([sum(map(count_words, group)) for group in groups])
    mine = [groups[number] for number in shares[dist.rank()]]
    tasks = [ScoringTask(references[captions[index].video], captions[index]) for group in mine for index in group]
    results = iter(judge(tasks))
    return dist.ungroup(dist.gather_balanced([[next(results) for _ in group] for group in mine], shares), groups)


def drop_unscored(results: Sequence[T | Unscored], *, name: str) -> list[T]:
    """Return the results other than `Unscored`, and log how many captions are unscored and why.

    Raises:
        ValueError: all captions are unscored.
    """
    unscored = [result for result in results if isinstance(result, Unscored)]
    if unscored:
        first = unscored[0]
        text = f"{name}: {len(unscored)} of {len(results)} captions are unscored, first {first.video}: {first.reason}"
        if len(unscored) == len(results):
            raise ValueError(text)
        log.warning(text)
    return [result for result in results if not isinstance(result, Unscored)]


def answer_questions(captioner: Captioner, clips: ClipSet, *, name: str, batch_size: int = 256) -> list[Caption]:
    """Answer all questions about clips; the prompt of each answer is its question."""
    questions = [(reference, item.question) for reference in clips.references for item in reference.questions]
    lengths = [len(clips.features_of(reference)) for reference, _ in questions]
    sampling = SampleConfig(max_new_tokens=MAX_ANSWER_TOKENS, num_samples=1, batch_size=batch_size)
    batch_size = _batch_size(captioner, lengths, sampling)
    batches = make_batches(lengths, size=batch_size)
    generator = _make_generator(captioner, clips, batch_size=batch_size)

    def answer(number: int) -> list[Caption]:
        batch = [questions[index] for index in batches[number]]
        sampling = Sampling(max_new_tokens=MAX_ANSWER_TOKENS)
        requests = [CaptionRequest(Path(reference.video), question, sampling) for reference, question in batch]
        return [caption for (caption,) in generator.generate(requests)]

    costs = [sum(lengths[index] + MAX_ANSWER_TOKENS for index in indices) for indices in batches]
    return map_batches(answer, batches, costs, name=name, unit="question")


def evaluate(captioner: Captioner, clips: ClipSet, *, judge: Judge, sampling: SampleConfig, name: str) -> Evaluation:
    """Evaluate a model on held-out clips: one greedy caption of each, judged, and answers to the clips' questions.

    Raises:
        ValueError: no caption could be judged.
    """
    captions = sample_captions(captioner, clips, sampling.greedy(), name=f"{name}: captions")
    answers = answer_questions(captioner, clips, name=f"{name}: questions", batch_size=sampling.batch_size)
    results = judge_captions(captions, clips.by_video, judge=judge.judge)
    scores: list[Score] = drop_unscored(results, name=name)
    has_questions = any(reference.questions for reference in clips.references)
    accuracy = qa_accuracy(clips.by_video, answers) if has_questions else None
    return Evaluation(captions, answers, results, compute_rates(scores, qa_accuracy=accuracy))


def write_evaluation(folder: Path, result: Evaluation, *, judge: Judge) -> None:
    """Write captions.jsonl, answers.jsonl, scores.jsonl and, last of all, rates.json; only rank 0 calls it."""
    write_records(folder / CAPTIONS_NAME, result.captions)
    write_records(folder / ANSWERS_NAME, result.answers)
    write_scores(folder / SCORES_NAME, make_judge_info(judge, totals=[result.rates.total]), result.results)
    write_json(folder / RATES_NAME, asdict(result.rates))


def write_exploitability(folder: Path, voter: Rater, result: Evaluation, clips: ClipSet) -> None:
    """Log how far held-out captions are from those that no others beat, and write exploitability.json."""
    found = find_exploitability(voter, result.captions, result.results, clips.by_video)
    write_json(folder / "exploitability.json", asdict(found) if found else None)
    log.info("%s: %s", folder.parent.name, found)
