"""What `salmonn caption` writes at its end besides the captions file: folders of shards."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from salmonn.batch.ledger_files import LedgerFiles
    from salmonn.records import Failure


def write_folders(values: Namespace, files: "LedgerFiles") -> int:
    """Write the folders of shards that --export asks for beside --out; return the number of videos left out."""
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
