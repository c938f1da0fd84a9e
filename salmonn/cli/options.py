"""Flags that several commands share, and what their output has in common."""

import gc
import ipaddress
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jsonargparse import Namespace
from rich.table import Table

from salmonn.config import FlagParser
from salmonn.score.config import JudgeConfig, JudgeKind

if TYPE_CHECKING:
    from salmonn.caption.captioner import Captioner
    from salmonn.model.loading import Placement

# Exit codes; 0: everything succeeded. After SOME_FAILED, the results of the other videos or captions are written.
SOME_FAILED, WRONG_USAGE = 1, 2


def add_model_options(parser: FlagParser) -> None:
    """Add --model and how it is loaded."""
    dtypes = Literal["auto", "float32", "bfloat16", "float16"]
    attentions = Literal["auto", "eager", "sdpa", "flash_attention_2"]
    group = parser.add_argument_group("Model")
    group.add_argument("--model", type=str | None, default=None, help="folder or Hub id (default: the toy model)")
    group.add_argument("--adapter", type=str | None, default=None, help="LoRA adapter (PEFT), a folder or Hub id")
    group.add_argument(
        "--published_positions", action="store_true", help="position ids as in the published 2+ inference code"
    )
    group.add_argument("--device", type=str | None, default=None, help="cpu, cuda, mps, ... (default: cuda, or cpu)")
    group.add_argument("--device_map", type=str | None, default=None, help="auto: split the model over all GPUs")
    group.add_argument("--dtype", type=dtypes, default="auto", help="dtype of the weights (auto: bfloat16 with cuda)")
    group.add_argument(
        "--attention",
        type=attentions,
        default="auto",
        help="attention of the encoders (auto: flash if installed)",
    )
    readers = "decoder of video frames: pyav, decord or torchcodec, the latter two also on a GPU (torchcodec:cuda)"
    group.add_argument("--reader", type=str, default="pyav", help=readers)
    group.add_argument("--bits", type=Literal[4, 8] | None, default=None, help="quantize the language model")


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Import without garbage collection, which would take a quarter of the time; what is imported stays anyway."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def model_placement(values: Namespace) -> "Placement":
    """Return where and how the weights are placed."""
    from salmonn.model.loading import Placement

    return Placement(**{field.name: values[field.name] for field in fields(Placement)})


def load_captioner(values: Namespace) -> "Captioner":
    """Load the model that the flags describe; raises like `Captioner.load`."""
    with garbage_kept():
        from salmonn.caption.captioner import SHIPPED_MODEL, Captioner
        from salmonn.model.loading import hide_progress

        if values.model is None or values.get("quiet"):  # the toy model is loaded in no time
            hide_progress()
        return Captioner.load(
            values.model or SHIPPED_MODEL,
            placement=model_placement(values),
            adapter=values.adapter,
            published_positions=values.published_positions,
            reader=values.reader,
        )


def load_batch_captioner(values: Namespace) -> "Captioner":
    """Load the model that the flags describe, also one without a family here; raises like `load_captioner`."""
    with garbage_kept():
        from salmonn.caption.generic import is_generic, load_generic

    if values.model is None or not is_generic(values.model):
        return load_captioner(values)
    own = {"--adapter": values.adapter, "--bits": values.bits, "--published-positions": values.published_positions}
    if used := [flag for flag, value in own.items() if value]:
        raise ValueError(f"{used[0]} needs a model with a family (see salmonn models); {values.model} has none")
    return load_generic(
        values.model,
        placement=model_placement(values),
        reader=values.reader,
        needs_sound=values.modality != "visual",
    )


def add_judge_options(
    parser: FlagParser, *, seed: int, judge: JudgeKind | None = "rule", model_help: str | None = None
) -> None:
    """Add --judge and the settings of an LLM judge.

    Args:
        parser: parser of the command.
        seed: default of --seed.
        judge: default of --judge; None where another flag can take its place.
        model_help: help of --model, if it has another use, too.
    """
    kinds = ", ".join(get_args(JudgeKind))
    parser.add_argument("--judge", type=JudgeKind | None, default=judge, help=f"judge of the captions: {kinds}")
    parser.add_argument(
        "--seed", type=int | None, default=seed, help="random seed of the judge, in its first pass; null sends no seeds"
    )
    if model_help:
        parser.add_argument("--model", type=str, default="", help=model_help)
    parser.add_class_arguments(JudgeConfig, skip={"kind", "seed", *(["model"] if model_help else [])})


def judge_config(values: Namespace) -> JudgeConfig:
    """Return the judge that the flags describe; commands add `values.seed` to their requests themselves."""
    if values.seed is not None and not 0 <= values.seed < 2**31:
        raise ValueError(f"--seed must be from 0 to {2**31 - 1}, or null, got {values.seed}")
    names = {field.name for field in fields(JudgeConfig)} - {"kind", "seed"}
    seed = None if values.seed is None else 0
    return JudgeConfig(kind=values.judge or "rule", seed=seed, **{name: values[name] for name in names})


def add_server_options(parser: FlagParser, *, port: int, read_seconds: float) -> None:
    """Add the address to listen on, and the limits for reading files that clients send."""
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=port, help="port to listen on (0: any free port)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode files, at least 1")
    parser.add_argument("--read_seconds", type=float, default=read_seconds, help="time limit for decoding a file")
    parser.add_argument("--read_gib", type=float, default=4.0, help="memory limit for decoding a file")


def add_batch_size(parser: Any) -> None:
    """Add --batch-size to a parser or group."""
    parser.add_argument(
        "--batch_size",
        type=int | None,
        default=None,
        help="maximum number of sequences decoded together (default: the model's own, on a GPU at least 64; on a GPU, "
        "never more than fit into its memory)",
    )


def add_subtitle_options(parser: Any) -> None:
    """Add the folder of subtitle files, and whether they may overwrite existing ones, to a parser or group."""
    parser.add_argument(
        "--subtitle_dir", type=Path | None, default=None, help="folder for txt, srt and vtt files (default: next to "
        "each video)"
    )  # fmt: skip
    parser.add_argument("--replace_subtitles", action="store_true", help="overwrite existing subtitle files, too")


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def new_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table with a column of names, then right-aligned columns with these headings."""
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 video" or "2 videos"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
