"""Outputs of `salmonn caption` besides local captions: remote ones, and folders of shards written at its end."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from salmonn.batch.discovery import Shard
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.records import Failure


def out_path(text: Path | str) -> Path | str:
    """Parse --out: a URL stays a string. The parser calls this again with the result."""
    from salmonn.batch.remote import is_url

    return text if isinstance(text, str) and is_url(text) else Path(text)


def require_local(*outs: Path | str) -> None:
    """Raise a ValueError for an output that is a URL, for commands that write local files."""
    from salmonn.batch.remote import is_url

    for out in outs:
        if isinstance(out, str) and is_url(out):
            raise ValueError(f"{out} is a URL, and this command writes local files; write one and upload it")


def resolve_out(values: Namespace) -> None:
    """Replace an --out that is a URL by its working copy; raises a ValueError for one that cannot be written to."""
    values.remote_out = None
    if isinstance(values.out, str):
        from salmonn.batch.remote_output import working_path

        values.remote_out, values.out = values.out, working_path(values.out)


@contextmanager
def remote_output(values: Namespace, shard: "Shard") -> Iterator[None]:
    """Begin with the uploaded files of a run whose --out is a URL, and upload them at intervals and at the end."""
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.batch.remote_output import RemoteOutput

    if values.remote_out is None:
        yield
        return
    output = RemoteOutput(values.remote_out, LedgerFiles(values.out, shard), seconds=values.upload_seconds)
    output.download(overwrite=values.overwrite)
    if values.dry_run:
        yield
        return
    with output:
        yield
    if not values.quiet:
        sys.stderr.write(f"uploaded to {values.remote_out}\n")


def write_folders(values: Namespace, files: "LedgerFiles") -> int:
    """Write the folders of shards that --export asks for next to --out; return the number of videos left out."""
    from salmonn.batch.export import LatestCaptions
    from salmonn.batch.folders import FOLDERS, export_folder
    from salmonn.cli.caption_options import fetch_config

    suffixes = [suffix for suffix in FOLDERS if suffix.removeprefix(".") in values.export]
    if not suffixes:
        return 0
    latest, number = LatestCaptions(files.own_captions() if files.shard.count > 1 else files.all_captions()), 0
    for suffix in suffixes:
        folder = files.captions.with_suffix(suffix)
        number += report_unwritten(export_folder(latest, folder, fetch=fetch_config(values)))
        if not values.quiet:
            sys.stderr.write(f"wrote {folder}\n")
    return number


def report_unwritten(failures: "Sequence[Failure]") -> int:
    """Print why videos are left out of a folder; return their number."""
    sys.stderr.writelines(f"failed: {failure.reason}\n" for failure in failures)
    return len(failures)
