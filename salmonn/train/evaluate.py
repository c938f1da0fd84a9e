"""Encoding of clips and judging of captions on all ranks, and evaluation on held-out clips."""

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.media.container import ClipError, declared_shape
from salmonn.model.layout import ClipFeatures
from salmonn.preference.voter_reward import find_exploitability
from salmonn.records import Caption, Reference, Score, Unscored, write_json, write_records
from salmonn.score.formats import write_scores
from salmonn.score.judge import Judge, ScoringTask
from salmonn.score.metrics import Rates, compute_rates, qa_accuracy
from salmonn.score.scoring import make_judge_info
from salmonn.synthetic.raters import Rater
from salmonn.train.batches import make_batches, map_batches
from salmonn.train.data import ClipCache, ClipSet, ClipSource
from salmonn.train.dry_run import count_clip_tokens
from salmonn.train.feature_cache import FeatureCache
from salmonn.train.left_out import LeftOut
from salmonn.train.sampling import CAPTIONS_NAME, SampleConfig, answer_questions, sample_captions

log = logging.getLogger(__name__)
T = TypeVar("T")

ANSWERS_NAME = "answers.jsonl"
SCORES_NAME = "scores.jsonl"
RATES_NAME = "rates.json"
LAYOUT_BYTES_PER_TOKEN = 4 * 8  # its place in the order and its three positions


@dataclass(frozen=True)
class Evaluation:
    """Captions of held-out clips with their scores, answers to the clips' questions, and the rates of both."""

    captions: list[Caption]
    answers: list[Caption]
    results: list[Score | Unscored]
    rates: Rates


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
