"""`salmonn caption`: describe videos, or ask anything about them."""

import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from salmonn.cli.codes import SOME_FAILED
from salmonn.media.clip import find_videos
from salmonn.records import Caption, Use, append_record, write_records

if TYPE_CHECKING:
    from salmonn.caption.captioner import Failure


def caption_parser() -> ArgumentParser:
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
    parser.add_argument("--workers", type=int | None, default=None, help="processes that decode; 0: none but this one")
    parser.add_argument("--released_positions", action="store_true", help="2+: number as the published inference code")
    _add_placement(parser)
    return parser


def _add_placement(parser: ArgumentParser) -> None:
    dtypes = Literal["auto", "float32", "bfloat16", "float16"]
    attentions = Literal["auto", "eager", "sdpa", "flash_attention_2"]
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ... (default: cuda where present)")
    parser.add_argument("--device_map", type=str | None, default=None, help="auto: split the model over all GPUs")
    parser.add_argument("--dtype", type=dtypes, default="auto", help="of weights (auto: bfloat16 on a GPU)")
    parser.add_argument(
        "--attention", type=attentions, default="auto", help="of the towers (auto: flash attention where installed)"
    )
    parser.add_argument("--bits", type=Literal[4, 8] | None, default=None, help="quantise the language model")


def run_caption(values: Namespace) -> int:
    """Caption videos into a JSONL file, line by line."""
    from salmonn.caption.captioner import SHIPPED_MODEL, Captioner, Span
    from salmonn.caption.generate import Sampling
    from salmonn.caption.reading import ClipReader, sensible_workers
    from salmonn.model.load import Placement

    if values.out.exists() and not values.overwrite:
        raise ValueError(f"{values.out} exists: choose another --out, or give --overwrite to replace it")
    limit = {"max_new_tokens": values.max_new_tokens} if values.max_new_tokens is not None else {}
    sampling = Sampling(
        temperature=values.temperature, top_p=values.top_p, repetition_penalty=values.repetition_penalty, **limit
    )
    span = Span(values.start, values.end)
    videos = find_videos(values.paths)
    # Workers start first, so that they are ready when the model is.
    workers = sensible_workers(len(videos)) if values.workers is None else values.workers
    with ClipReader(workers=workers) as reader:
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
            reader=reader,
        )
        begin = time.perf_counter()
        num_failed = _write_results(results, values.out, total=len(videos))
        seconds = time.perf_counter() - begin
    sys.stderr.write(
        f"{len(videos) - num_failed} captions in {values.out}, {num_failed} videos failed; "
        f"{60 * len(videos) / seconds:.1f} clips a minute, and the model waited {reader.waited_seconds / seconds:.0%} "
        "of the time for them\n"
    )
    return SOME_FAILED if num_failed else 0


def _write_results(results: "Iterable[Caption | Failure]", out: Path, *, total: int) -> int:
    """Write captions as they come, tell failures, and count these."""
    num_failed = 0
    for number, result in enumerate(tqdm(results, total=total, desc="captioning", unit="video")):
        if number == 0:  # not before, so that a mistake in the arguments leaves no empty file
            write_records(out, [])
        if isinstance(result, Caption):
            append_record(out, result)
        else:
            num_failed += 1
            tqdm.write(f"failed: {result.error}", file=sys.stderr)
    return num_failed
