"""The command line: `salmonn caption`, `salmonn score`, `salmonn synth`.

Exit codes: 0 all done, 1 some videos failed (the others' results are written), 2 wrong usage.
Heavy imports stand inside the commands, so that `--help` and scoring start at once and without torch.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, get_args

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from tqdm import tqdm

from salmonn.config import underscored
from salmonn.media.clip import find_videos
from salmonn.media.synth import SynthConfig, make_clips
from salmonn.records import Caption, Reference, Score, Use, append_record, read_records, write_records

SOME_FAILED, WRONG_USAGE = 1, 2


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = build_parser()
    values = parser.parse_args(underscored(args))
    command = {"caption": run_caption, "score": run_score, "synth": run_synth}[values.subcommand]
    try:
        sys.exit(command(values[values.subcommand]))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(WRONG_USAGE)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; what was finished is written\n")
        sys.exit(130)


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(prog="salmonn", description="Audio-visual video captioning that teaches itself.")
    commands = parser.add_subcommands(dest="subcommand")
    commands.add_subcommand("caption", _caption_parser(), help="describe videos, or ask anything about them")
    commands.add_subcommand("score", _score_parser(), help="score captions against reference events")
    commands.add_subcommand("synth", _synth_parser(), help="make synthetic clips with exactly known events")
    return parser


def _caption_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Describe videos (files, or folders searched recursively), one JSON line each. A file that cannot "
        "be read is reported and harms no other; then the exit code is 1."
    )
    parser.add_argument("paths", nargs="+", type=str, help="video or sound files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the captions")
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    parser.add_argument("--model", type=str | None, default=None, help="folder or hub id (default: the toy model)")
    parser.add_argument("--adapter", type=str | None, default=None, help="PEFT folder or hub id, put on the model")
    parser.add_argument("--prompt", type=str | None, default=None, help="what to ask (default: a full description)")
    parser.add_argument("--use", type=Use, default="both", help="picture, sound or both: " + ", ".join(get_args(Use)))
    parser.add_argument("--start", type=float | None, default=None, help="seconds from which on the video is taken")
    parser.add_argument("--end", type=float | None, default=None, help="seconds up to which the video is taken")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest words, 1 draws freely")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus that words are drawn from")
    parser.add_argument("--repetition_penalty", type=float | None, default=None, help="1: none (default: the model's)")
    parser.add_argument("--max_new_tokens", type=int | None, default=None, help="limit (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--batch_size", type=int | None, default=None, help="clips side by side (default: the model's)")
    parser.add_argument("--released_positions", action="store_true", help="2+: number as the published inference code")
    _add_placement(parser)
    return parser


def _add_placement(parser: ArgumentParser) -> None:
    dtypes = Literal["auto", "float32", "bfloat16", "float16"]
    attentions = Literal["auto", "eager", "sdpa", "flash_attention_2"]
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ... (default: cuda where present)")
    parser.add_argument("--device_map", type=str | None, default=None, help="auto: split the model over all GPUs")
    parser.add_argument("--dtype", type=dtypes, default="auto", help="of weights (auto: bfloat16 on a GPU)")
    parser.add_argument("--attention", type=attentions, default="auto", help="(auto: flash attention where installed)")
    parser.add_argument("--bits", type=Literal[4, 8] | None, default=None, help="quantise the language model")


def run_caption(values: Namespace) -> int:
    """Caption videos into a JSONL file, line by line."""
    from salmonn.caption.captioner import SHIPPED_MODEL, Captioner, Span
    from salmonn.caption.generate import Sampling
    from salmonn.model.load import Placement

    if values.out.exists() and not values.overwrite:
        raise ValueError(f"{values.out} exists: choose another --out, or give --overwrite to replace it")
    limit = {"max_new_tokens": values.max_new_tokens} if values.max_new_tokens is not None else {}
    sampling = Sampling(
        temperature=values.temperature, top_p=values.top_p, repetition_penalty=values.repetition_penalty, **limit
    )
    span = Span(values.start, values.end)
    videos = find_videos(values.paths)
    captioner = Captioner.load(
        values.model or SHIPPED_MODEL,
        placement=Placement(values.device, values.device_map, values.dtype, values.attention, values.bits),
        adapter=values.adapter,
        released_positions=values.released_positions,
    )
    results = captioner.caption_each(
        videos,
        prompt=values.prompt,
        sampling=sampling if limit else replace(sampling, max_new_tokens=captioner.greedy().max_new_tokens),
        span=span,
        use=values.use,
        seed=values.seed,
        batch_size=values.batch_size,
    )
    failures = []
    for number, result in enumerate(tqdm(results, total=len(videos), desc="captioning", unit="video")):
        if number == 0:  # not before, so that a mistake in the arguments leaves no empty file
            write_records(values.out, [])
        if isinstance(result, Caption):
            append_record(values.out, result)
        else:
            failures.append(result)
            tqdm.write(f"failed: {result.error}", file=sys.stderr)
    sys.stderr.write(f"{len(videos) - len(failures)} captions in {values.out}, {len(failures)} videos failed\n")
    return SOME_FAILED if failures else 0


def _score_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Score captions against the atomic events of their references: Missing, Hallucination, Total and "
        "Repetition over all clips. Every reference counts, also one without a caption."
    )
    parser.add_argument("captions", type=Path, help="JSONL of captions, as `salmonn caption` writes it")
    parser.add_argument("--references", type=Path, required=True, help="JSONL of references with events")
    parser.add_argument("--judge", type=str, default="rule", help="rule: reads synthetic clips, offline")
    parser.add_argument("--out", type=Path | None, default=None, help="JSONL file for each caption's score")
    return parser


def run_score(values: Namespace) -> int:
    """Print the rates of captions; write each caption's score where asked."""
    from salmonn.score.judge import score_captions
    from salmonn.score.rates import rates
    from salmonn.score.rule import RuleJudge

    if values.judge != "rule":
        raise ValueError(f"there is no judge named {values.judge}: the one there is so far is 'rule'")
    captions = read_records(values.captions, Caption)
    references = {reference.video: reference for reference in read_records(values.references, Reference)}
    by_path = {(values.references.parent / video).resolve(): video for video in references}
    # Captions name videos as they were typed, references relative to their own file: both are meant.
    named = [replace(caption, video=by_path.get(Path(caption.video).resolve(), caption.video)) for caption in captions]
    scores = [score for score in score_captions(references, named, RuleJudge()) if isinstance(score, Score)]
    if values.out:
        write_records(values.out, scores)
    console = Console()
    for name, value in asdict(rates(scores)).items():
        if value is not None:
            console.print(f"{name:15} {value:.4f}" if isinstance(value, float) else f"{name:15} {value}")
    return 0


def _synth_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Make synthetic MP4 clips (H.264 and AAC) with events, captions and questions in clips.jsonl. "
        "The same seed gives the same clips; an interrupted run goes on where it was."
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
