"""Encoding of clips with the frozen encoders: files are read ahead by workers, each clip is encoded alone.

Clips are balanced over the ranks by the duration that their files declare, since reading takes most of the time.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from salmonn import dist
from salmonn.caption.captioner import Captioner
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.loader import ClipJob, ClipReader, default_num_workers
from salmonn.caption.read_spec import ReadSpec, SeparateAudioSpec
from salmonn.caption.worker import WorkerLimits
from salmonn.media.container import ClipError, declared_shape
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.model.transfer import CopyStream
from salmonn.preference.benchmark_items import BenchmarkItem, SyntheticClip, clip_name
from salmonn.records import Caption
from salmonn.synthetic.render import make_clips
from salmonn.synthetic.scene import SynthConfig
from salmonn.train.data import ClipSet, ClipSource, require_streams
from salmonn.train.dry_run import count_clip_tokens
from salmonn.train.feature_cache import FeatureCache
from salmonn.train.left_out import LeftOut

LAYOUT_BYTES_PER_TOKEN = 4 * 8  # its place in the order and its three positions
MIN_SECONDS_FOR_WORKERS = 600.0  # of video; for less, starting processes takes longer than they save
LIMITS = WorkerLimits(seconds=3600.0, memory_gib=16.0)  # of a file; beyond them, it counts as unreadable


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

    A clip is encoded alone, so that its features do not depend on other clips to the last bit.

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
    left_out_sources, may_fail = left_out.sources, left_out.max_failures > 0
    clips = [clip for clip in dict.fromkeys(sources) if clip not in left_out_sources]
    keys = cache.keys(clips) if cache else [""] * len(clips)
    found = cache.find_complete(keys) if cache else set()
    costs = _plan_encoding(captioner, clips, keys, found, name=name, cache=cache, may_fail=may_fail)
    shares = dist.balance(costs)
    mine = shares[dist.rank()]
    missing = {index: clips[index] for index in mine if keys[index] not in found}
    # The features of a clip, None if the cache holds them, or why it cannot be read.
    computed: dict[int, ClipFeatures | str | None] = dict.fromkeys(mine)
    num_workers = _num_workers([costs[index] for index in missing])
    with (
        tqdm(total=len(mine), desc=f"encoding {name}", unit="clip", disable=not dist.is_main()) as bar,
        closing(_read_ahead(captioner, missing, num_workers=num_workers)) as inputs,
    ):
        bar.update(len(mine) - len(missing))
        for index, result in _encode_each(captioner, inputs):
            if isinstance(result, ClipError):
                if not may_fail:
                    raise result
                computed[index] = str(result)
            elif cache is None or not _save(cache, keys[index], result, clips[index]):
                computed[index] = result
            bar.update()
    everything = dist.gather_balanced([computed[index] for index in mine], shares)
    unreadable = {clip: one for clip, one in zip(clips, everything, strict=True) if isinstance(one, str)}
    left_out.add(unreadable, num_clips=len(clips), name=name)
    kept = [
        (clip, key, one) for clip, key, one in zip(clips, keys, everything, strict=True) if not isinstance(one, str)
    ]
    features = [one for _, _, one in kept]
    if cache:
        features = [*cache.load_missing([key for _, key, _ in kept], features, name=name)]
    return {clip: one for (clip, _, _), one in zip(kept, features, strict=True) if one is not None}


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


def _save(cache: FeatureCache, key: str, features: ClipFeatures, clip: ClipSource) -> bool:
    """Save features; return False if they stay in memory, which only a single process may do."""
    is_saved = cache.save(key, features)
    if not is_saved and dist.world_size() > 1:
        raise ValueError(
            f"the feature cache has no room for the features of {clip.video}; raise feature_cache.max_gib or free "
            "space on its disk, and start again: the clips encoded so far are kept"
        )
    return is_saved


def _num_workers(costs: Sequence[float]) -> int:
    """Return the number of worker processes for clips; 0 to read them in a thread of this process."""
    if sum(costs) < MIN_SECONDS_FOR_WORKERS:
        return 0
    return default_num_workers(len(costs), num_processes=dist.local_world_size())


def _read_ahead(
    captioner: Captioner, clips: Mapping[int, ClipSource], *, num_workers: int
) -> Generator[tuple[int, ClipInputs | ClipError]]:
    """Yield the inputs of clips, or why they cannot be read; as many more than there are workers are read ahead."""
    jobs = (ClipJob(index, CaptionRequest(clip.video), _read_spec(captioner, clip)) for index, clip in clips.items())
    with ClipReader(workers=num_workers, limits=LIMITS) as reader:
        for ((job, result),) in reader.batches(jobs, size=1, finish=captioner.prepare):
            if isinstance(result, ValueError):
                if not isinstance(result, ClipError):
                    raise result
                yield job.index, result
                continue
            try:
                require_streams(clips[job.index], result, captioner.processor)
            except ClipError as error:
                yield job.index, error
            else:
                yield job.index, result


def _read_spec(captioner: Captioner, clip: ClipSource) -> ReadSpec:
    """Return what the model reads of a clip."""
    spec = captioner.processor.read_spec(clip.modality, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds)
    spec = captioner.place_reader(spec)
    return SeparateAudioSpec(**vars(spec), sound=clip.audio) if clip.audio else spec


def _encode_each(
    captioner: Captioner, clips: Iterable[tuple[int, ClipInputs | ClipError]]
) -> Iterator[tuple[int, ClipFeatures | ClipError]]:
    """Encode clips one by one, in their order, and pass errors on.

    The encoding of a clip is started before the features of the one before are yielded: a GPU computes while these are
    copied and saved.
    """
    stream = CopyStream(captioner.network.device)
    started: Callable[[], tuple[int, ClipFeatures]] | None = None

    def fetch(index: int, features: ClipFeatures, computed: torch.cuda.Event | None) -> tuple[int, ClipFeatures]:
        return index, replace(features, tokens=stream.to_host(features.tokens, computed))

    for index, inputs in clips:
        if isinstance(inputs, ClipError):
            yield index, inputs
            continue
        before = started
        (features,) = captioner.encode_on_device([stream.to_device(inputs)])
        started = partial(fetch, index, features, stream.mark())
        if before:
            yield before()
    if started:
        yield started()


def encode_benchmark_clips(
    captioner: Captioner, items: Sequence[BenchmarkItem], *, clips_dir: Path, cache: FeatureCache | None
) -> Callable[[Caption], ClipFeatures]:
    """Encode the clips of items; return a function from the captions of `rate_items` to the features of their clips.

    Each clip is also encoded with picture and sound, which the blind reward is shown.

    Args:
        captioner: model with the encoders.
        items: items that all have a clip.
        clips_dir: folder for the rendered clips, which are kept.
        cache: feature cache, or none.

    Raises:
        ClipError: a clip cannot be read.
    """
    paths = _render_clips(items, clips_dir=clips_dir)
    sources = {}
    for item in items:
        for use in (item.use, "both"):
            sources[clip_name(item), use] = ClipSource(paths[clip_name(item)], use)
    features = encode_clips(captioner, list(sources.values()), name="clips", cache=cache)
    return lambda caption: features[sources[caption.video, caption.modality or "both"]]


def _render_clips(items: Sequence[BenchmarkItem], *, clips_dir: Path) -> dict[str, Path]:
    """Return the files of all clips by their names, after rendering the synthetic ones that are missing."""
    paths, by_seed = {}, dict[int, dict[int, str]]()
    for item in items:
        if isinstance(item.clip, SyntheticClip):
            by_seed.setdefault(item.clip.seed, {})[item.clip.index] = clip_name(item)
        elif item.clip:
            paths[clip_name(item)] = item.clip
    for seed, names in by_seed.items():
        folder = clips_dir / f"seed_{seed}"
        references = make_clips(folder, SynthConfig(clips=max(names) + 1, seed=seed), indices=list(names))
        paths |= {name: folder / one.video for name, one in zip(names.values(), references, strict=True)}
    return paths
