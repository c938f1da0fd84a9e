"""`salmonn events`: split reference captions into atomic events."""

import sys
from dataclasses import replace
from pathlib import Path

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.cli.codes import SOME_FAILED
from salmonn.cli.judge import add_judge, judge_config
from salmonn.config import FlagParser
from salmonn.records import Reference, read_records, write_records


def events_parser() -> FlagParser:
    """Arguments of `salmonn events`."""
    parser = FlagParser(
        description="Split the captions of references into atomic events: one fact each, seen, heard or said, with its "
        "time where the caption gives one. Events that are there already, in the references or in --out, stay as they "
        "are while the caption does, so that --out may be edited by hand and the command given again."
    )
    parser.add_argument("references", type=Path, help="JSONL of references with captions")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the references with their events")
    add_judge(parser)
    return parser


def run_events(values: Namespace) -> int:
    """Split captions into events; write all references."""
    from salmonn.preference.reward import make_llm_client
    from salmonn.score.events import list_events
    from salmonn.score.formats import read_references
    from salmonn.synthetic.parser import split_caption

    config = judge_config(values)
    references = read_references(values.references)
    if values.out.suffix == ".json":
        raise ValueError(f"{values.out} gets JSON lines: give it a name that ends in .jsonl")
    kept = {known.video: known for known in read_records(values.out, Reference)} if values.out.exists() else {}
    for video, reference in references.items():
        # A caption that was changed since is split anew.
        if not reference.events and video in kept and kept[video].caption == reference.caption:
            references[video] = replace(reference, events=kept[video].events)
    asked = sum(not reference.events for reference in references.values())
    with tqdm(total=asked, desc="splitting", unit=" captions", disable=config.kind == "rule" or not asked) as bar:
        found, failed = list_events(
            list(references.values()),
            client=make_llm_client(config) if config.kind == "openai" else None,
            rules=split_caption,
            attempts=config.attempts,
            progress=bar.update,
        )
    write_records(values.out, found)
    for one in failed:
        sys.stderr.write(f"failed: {one.video}: {one.reason}\n")
    num_events = sum(len(reference.events) for reference in found)
    sys.stderr.write(
        f"{num_events} events of {len(found) - len(failed)} videos in {values.out}, {len(failed)} videos failed\n"
    )
    return SOME_FAILED if failed else 0
