"""Clips that a run leaves out because they cannot be read: listed in the run folder, so that a resumed run agrees."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from salmonn import dist
from salmonn.files import read_records, write_records
from salmonn.media.container import ClipError
from salmonn.records import Modality
from salmonn.train.data import ClipCache, ClipSet, ClipSource

log = logging.getLogger(__name__)
LEFT_OUT_NAME = "left_out.jsonl"


@dataclass(frozen=True)
class LeftOutClip:
    """A clip that is left out.

    Args:
        video: file of the clip.
        reason: why it cannot be read.
        modality, audio, start_seconds, end_seconds, needs_both: as in `ClipSource`.
    """

    video: str
    reason: str
    modality: Modality = "both"
    audio: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    needs_both: bool = False

    @classmethod
    def of_source(cls, source: ClipSource, *, reason: str) -> "LeftOutClip":
        """Return the record of a clip."""
        values = {**asdict(source), "video": str(source.video), "audio": source.audio and str(source.audio)}
        return cls(reason=reason, **values)

    @property
    def source(self) -> ClipSource:
        """The clip."""
        return ClipSource(
            video=Path(self.video),
            modality=self.modality,
            audio=Path(self.audio) if self.audio else None,
            start_seconds=self.start_seconds,
            end_seconds=self.end_seconds,
            needs_both=self.needs_both,
        )


class LeftOut:
    """Clips that a run leaves out, and how many more may become unreadable.

    Args:
        folder: run folder, which gets left_out.jsonl; none to list the clips in the log alone.
        max_failures: number of clips that may be unreadable, those of earlier starts included; with 0 the first one
            raises its own error.
    """

    def __init__(self, folder: Path | None, *, max_failures: int) -> None:
        self.path = folder / LEFT_OUT_NAME if folder else None
        self.max_failures = max_failures
        known: list[LeftOutClip] = []
        if self.path and dist.is_main() and self.path.is_file():  # NFS shows files late on other machines
            known = read_records(self.path, LeftOutClip)
        self.clips = dist.gather(known)
        if self.clips:
            log.warning(
                "left out as before: %s; delete %s to read them again",
                ", ".join(clip.video for clip in self.clips),
                self.path,
            )

    def remove_from(self, clips: ClipSet) -> ClipSet:
        """Return a set of clips without those that are left out."""
        left_out = self.sources
        return replace(clips, references=[one for one in clips.references if clips.source(one) not in left_out])

    @property
    def sources(self) -> set[ClipSource]:
        """The clips that are left out."""
        return {clip.source for clip in self.clips}

    def add(self, reasons: Mapping[ClipSource, str], *, num_clips: int, name: str) -> None:
        """Log and list further clips that cannot be read; every rank passes the same ones.

        Args:
            reasons: clip -> why it cannot be read.
            num_clips: number of clips that were read, with these.
            name: what the clips are.

        Raises:
            ValueError: these are more than may be, or all.
        """
        if not reasons:
            return
        text = f"{len(reasons)} of {num_clips} {name} cannot be read: " + "; ".join(reasons.values())
        if len(self.clips) + len(reasons) > self.max_failures or len(reasons) == num_clips:
            raise ValueError(f"{text}. Replace them, or allow more with --max-failures ({self.max_failures})")
        log.warning("%s. They are left out", text)
        self.clips = [*self.clips, *(LeftOutClip.of_source(clip, reason=reason) for clip, reason in reasons.items())]
        if self.path and dist.is_main():
            write_records(self.path, self.clips)
        dist.barrier()


def leave_out_unreadable(clips: Iterable[ClipSource], read: ClipCache, left_out: LeftOut, *, name: str) -> None:
    """Read all clips once, shared by the ranks, and list those that cannot be read.

    Raises:
        ValueError: too many cannot be read.
    """
    left_out_sources = left_out.sources
    distinct = [clip for clip in dict.fromkeys(clips) if clip not in left_out_sources]

    def reason(clip: ClipSource) -> str:
        """Return why a clip cannot be read; "" if it can."""
        try:
            read(clip)
        except ClipError as error:
            return str(error)
        return ""

    reasons = dist.gather([reason(clip) for clip in dist.shard(distinct)])
    unreadable = {clip: text for clip, text in zip(distinct, reasons, strict=True) if text}
    left_out.add(unreadable, num_clips=len(distinct), name=name)
