"""The HTML page of a captions file: thumbnails, captions, lengths and failures, to look through, search and filter.

It is one self-contained file: `salmonn report captions.jsonl --out report.html`. The page builds the rows that are
shown from JSON inside it, a screenful at a time, so that it opens with ten thousand captions, too.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from salmonn import __version__
from salmonn.batch.review import ISSUE_MEANINGS, ReviewRow, find_video, word_histogram
from salmonn.batch.thumbnails import describe_missing, submit_thumbnail, to_data_url
from salmonn.caption.loader import ClipReader
from salmonn.files import write_text
from salmonn.media.container import ClipError
from salmonn.records import Caption, Modality
from salmonn.score import report as score_report
from salmonn.templates import load_template

_FOLDER = Path(__file__).parent
_IMAGES_PER_BLOCK = 200  # the page parses a block of thumbnails when it first shows one of them
_SEEN_AND_HEARD: Mapping[Modality, str] = {"both": "video and audio", "visual": "video only", "audio": "audio only"}


@dataclass(frozen=True)
class Thumbnails:
    """The thumbnails of rows.

    Args:
        images: JPEG files as data URLs.
        numbers: for each row the number of its image, or why it has none.
        links: address of each row's video for the page; "" where there is no file.
    """

    images: Sequence[str]
    numbers: Sequence[int | str]
    links: Sequence[str]


def make_thumbnails(
    rows: Sequence[ReviewRow],
    *,
    reader: ClipReader,
    page: Path,
    root: Path,
    captions_dir: Path,
    limit: int,
    progress: Callable[[], object] = lambda: None,
) -> Thumbnails:
    """Make a thumbnail of each clip; a file that cannot be read affects only its own.

    Args:
        rows: captions and failures.
        reader: worker processes.
        page: path of the page, which links to the videos.
        root, captions_dir: see `find_video`.
        limit: maximum number of clips that get a thumbnail, the first ones.
        progress: called after each clip.
    """
    futures: dict[tuple[object, ...], Future[bytes]] = {}
    paths: dict[int, Path] = {}
    pending: list[Future[bytes] | str] = []
    links = []
    for row in rows:
        one, link = row.record, ""
        key = (one.video, one.start_seconds, one.end_seconds)
        result: Future[bytes] | str | None = None
        try:
            path = find_video(one.video, root=root, captions_dir=captions_dir)
            link = score_report.link_to_video(path, page=page)
            if key not in futures and len(futures) < limit:
                futures[key] = submit_thumbnail(
                    reader, path, start_seconds=one.start_seconds, end_seconds=one.end_seconds
                )
                paths[id(futures[key])] = path
            result = futures.get(key)
        except ValueError as error:
            result = str(error)
        pending.append(result or f"only the first {limit} clips have pictures (--thumbnails)")
        links.append(link)
    images: list[str] = []
    done: dict[int, int | str] = {}
    for future in futures.values():
        try:
            images.append(to_data_url(future.result()))
            done[id(future)] = len(images) - 1
        except ClipError as error:
            done[id(future)] = describe_missing(error, paths[id(future)])
        progress()
    return Thumbnails(images, [one if isinstance(one, str) else done[id(one)] for one in pending], links)


def write_report(
    path: Path, rows: Sequence[ReviewRow], thumbnails: Thumbnails, *, title: str, notes: Sequence[str] = ()
) -> None:
    """Write the page atomically.

    Args:
        path: the page.
        rows: captions and failures.
        thumbnails: their thumbnails.
        title: heading of the page.
        notes: sentences shown first.
    """
    captions = [row for row in rows if isinstance(row.record, Caption)]
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    styles = [Path(score_report.__file__).with_name("report.css"), _FOLDER / "report.css"]
    histogram = word_histogram(rows)
    issues = Counter(issue for row in rows for issue in row.issues)
    given = Counter(row.record.modality for row in captions if isinstance(row.record, Caption))
    page = load_template(_FOLDER / "report.html.jinja").render(
        title=title,
        version=__version__,
        notes=notes,
        num_captions=len(captions),
        num_videos=len({row.record.video for row in rows}),
        num_words=sum(row.num_words for row in captions),
        median_words=median([row.num_words for row in captions] or [0]),
        histogram=histogram,
        highest=max([bar.count for bar in histogram] or [1]),
        issues=[(issue, ISSUE_MEANINGS[issue], issues[issue]) for issue in ISSUE_MEANINGS],
        given=[(name, given[modality]) for modality, name in _SEEN_AND_HEARD.items() if given[modality]],
        models=Counter(
            row.record.model for row in captions if isinstance(row.record, Caption) and row.record.model
        ).most_common(),
        num_rows=len(rows),
        rows=_to_json([_to_values(*one) for one in zip(rows, thumbnails.numbers, thumbnails.links, strict=True)]),
        blocks=[
            _to_json(thumbnails.images[start : start + _IMAGES_PER_BLOCK])
            for start in range(0, len(thumbnails.images), _IMAGES_PER_BLOCK)
        ],
        images_per_block=_IMAGES_PER_BLOCK,
        style=Markup("\n".join(style.read_text(encoding="utf-8") for style in styles)),
        script=Markup(script),
        # The browser runs only the script with this hash, whatever a caption contains.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(path, page)


def _to_values(row: ReviewRow, image: int | str, link: str) -> Mapping[str, Any]:
    """Return a row as the page's script reads it, without empty values."""
    one = row.record
    sample = one.sample if isinstance(one, Caption) else 0
    values = {
        "video": one.video,
        "text": row.text if isinstance(one, Caption) else row.text.removeprefix(f"{one.video}: "),
        "words": row.num_words,
        "issues": row.issues,
        "notes": row.notes,
        "sample": sample,
        "span": score_report.format_span(one),
        "start": one.start_seconds,
        "image": image if isinstance(image, int) else None,
        "reason": "" if isinstance(image, int) else image.removeprefix(f"{one.video}: "),
        "link": link,
    }
    return {name: value for name, value in values.items() if value or (value == 0 and name in ("image", "words"))}


def _to_json(values: Any) -> Markup:
    """Return JSON for a script element, which "</script>" or "<!--" would end or change."""
    return Markup(json.dumps(values, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
