"""Fused captions of a run, `captions.fused.jsonl`: one line for each video, made from the captions of its segments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path

from salmonn.batch.containers import source_path
from salmonn.batch.discovery import VideoFile
from salmonn.batch.export import LatestCaptions
from salmonn.batch.fetch import Fetcher
from salmonn.batch.ledger_files import append_records, hash_key, read_complete, repair_last_line
from salmonn.caption.fields import clip_fields, find_fields
from salmonn.caption.fusion import FactCheck, FusionError, Writer, fuse
from salmonn.caption.shape import CaptionShape
from salmonn.files import write_records
from salmonn.records import Caption


@dataclass
class FusionStats:
    """Counts of a run: videos fused and skipped as fused before, failures, and facts in all fused captions."""

    fused: int = 0
    fused_before: int = 0
    failed: int = 0
    facts: int = 0
    lost: int = 0
    changed: int = 0
    added: int = 0

    def add(self, caption: Caption) -> None:
        """Count the facts of a fused caption."""
        if (fusion := caption.fusion) is not None:
            self.facts += fusion.num_facts or 0
            self.lost += len(fusion.lost)
            self.changed += len(fusion.changed)
            self.added += len(fusion.added)


def fuse_captions(
    captions: LatestCaptions,
    out: Path,
    *,
    settings: str,
    load: Callable[[], tuple[Writer | None, FactCheck | None]],
    on_failure: Callable[[str], object],
    fetcher: Fetcher | None = None,
    shape: CaptionShape | None = None,
) -> FusionStats:
    """Write one caption for each video; those whose segments and settings are the same as before are kept.

    Args:
        captions: captions of segments.
        out: file of the fused captions, appended to after each video.
        settings: identifies writer and check.
        load: returns writer and check, see `fuse`; called once there is a video to fuse.
        on_failure: called with the reason of each failure; a later run tries these videos again.
        fetcher: fetches remote videos for a writer that sees them; None for one that does not.
        shape: shape of the captions, whose trigger and templates a fused caption gets once; None for none.

    Raises:
        LLMStoppedError: the server of the writer or the judge takes no further request.
    """
    stats = FusionStats()
    repair_last_line(out)
    # What each video's latest fused caption was made from, by the hash of its path.
    latest = read_complete(out, Caption) if out.exists() else ()
    before = {hash_key(one.video): one.fusion.source for one in latest if one.fusion is not None}
    has_outdated = False
    load = cache(load)
    for group in captions.by_video():
        source = _source(group, settings)
        key = hash_key(group[0].video)
        if before.get(key) == source:
            del before[key]
            stats.fused_before += 1
            continue
        try:
            fused = _finish(_fuse(group, *load(), fetcher), shape)
        except FusionError as error:
            stats.failed += 1
            on_failure(f"{group[0].video} is not fused: {error}")
            continue
        assert fused.fusion is not None
        append_records(out, [replace(fused, fusion=replace(fused.fusion, source=source))])
        stats.fused += 1
        has_outdated = True
        before.pop(key, None)
    if out.exists() and (has_outdated or before):  # also of videos that failed: their captions have changed
        _drop_outdated(out, set(before))
    for caption in read_complete(out, Caption) if out.exists() else ():
        stats.add(caption)
    return stats


def _fuse(group: Sequence[Caption], writer: Writer | None, check: FactCheck | None, fetcher: Fetcher | None) -> Caption:
    if fetcher is None:
        return fuse(group, writer=writer, check=check)
    first = group[0]
    video = VideoFile(first.video, first.size_bytes, first.modified_ns, first.etag)
    ((_, _, path),) = fetcher.ahead([(0, video)])
    try:
        return fuse(group, writer=writer, check=check, path=path)
    except FusionError as error:
        raise FusionError(fetcher.explain(video, str(error))) from error
    finally:
        fetcher.release(video)


def _finish(fused: Caption, shape: CaptionShape | None) -> Caption:
    """Add the trigger and the templates; raises a FusionError for a {sidecar} that cannot be read."""
    if shape is None:
        return fused
    source = source_path(fused.video)
    seconds = (fused.end_seconds or 0.0) - (fused.start_seconds or 0.0)
    place, names = source or Path(fused.video), {name for text in shape.output_templates for name in find_fields(text)}
    try:
        values = clip_fields(names, place, seconds=seconds, is_local=source is None)
    except ValueError as error:
        raise FusionError(str(error)) from error
    return replace(fused, text=shape.finish(fused.text, values))


def _source(group: Sequence[Caption], settings: str) -> str:
    state = blake2b(settings.encode(), digest_size=16)
    for one in group:
        state.update(
            repr((one.video, one.start_seconds, one.end_seconds, one.text, one.modified_ns, one.etag)).encode()
        )
    return state.hexdigest()


def _drop_outdated(out: Path, gone: set[bytes]) -> None:
    """Rewrite the file with the last line of each video that still has captions."""
    last = {hash_key(one.video): number for number, one in enumerate(read_complete(out, Caption))}
    kept = {number for key, number in last.items() if key not in gone}
    lines = enumerate(read_complete(out, Caption))
    write_records(out, (one for number, one in lines if number in kept))
