"""Clips of the reward benchmark: synthetic ones are rendered once, and all are encoded once for all rewards."""

from collections.abc import Callable, Sequence
from pathlib import Path

from salmonn.caption.captioner import Captioner
from salmonn.model.layout import ClipFeatures
from salmonn.preference.benchmark_items import BenchmarkItem, SyntheticClip, clip_name
from salmonn.records import Caption
from salmonn.synthetic.render import SynthConfig, make_clips
from salmonn.train.data import ClipSource
from salmonn.train.encoding import encode_clips
from salmonn.train.feature_cache import FeatureCache


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
    paths = _render(items, clips_dir=clips_dir)
    sources = {}
    for item in items:
        for use in (item.use, "both"):
            sources[clip_name(item), use] = ClipSource(paths[clip_name(item)], use)
    features = encode_clips(captioner, list(sources.values()), name="clips", cache=cache)
    return lambda caption: features[sources[caption.video, caption.modality or "both"]]


def _render(items: Sequence[BenchmarkItem], *, clips_dir: Path) -> dict[str, Path]:
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
