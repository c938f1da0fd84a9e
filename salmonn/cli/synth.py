"""`salmonn synth`: render synthetic clips whose events are known exactly."""

from dataclasses import asdict
from pathlib import Path

from jsonargparse import Namespace
from tqdm import tqdm

from salmonn.config import FlagParser
from salmonn.synthetic.render import SynthConfig, make_clips


def synth_parser() -> FlagParser:
    """Return the arguments of `salmonn synth`."""
    parser = FlagParser(
        description="Render synthetic MP4 clips (H.264 and AAC); clips.jsonl lists their events, captions and "
        "questions. The same seed gives the same clips. After an interruption, run the same command to resume."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips")
    parser.add_class_arguments(SynthConfig)
    return parser


def run_synth(values: Namespace) -> int:
    """Render synthetic clips."""
    names = set(asdict(SynthConfig()))
    config = SynthConfig(**{name: value for name, value in vars(values).items() if name in names})
    with tqdm(total=config.clips, desc="rendering", unit="clip") as bar:
        make_clips(values.out, config, progress=bar.update)
    return 0
