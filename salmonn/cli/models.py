"""`salmonn models`: families, and known checkpoints with sizes and memory that are computed from their configs."""

import json
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from salmonn.cli.options import garbage_kept, new_table
from salmonn.config import FlagParser

if TYPE_CHECKING:
    from salmonn.model.families.base import Family
    from salmonn.model.families.catalog import KnownModel


def models_parser() -> FlagParser:
    """Return the arguments of `salmonn models`."""
    parser = FlagParser(
        description="List the families of models, and known checkpoints with their number of parameters, what they "
        "perceive, the GPU memory that a caption of a 51 s clip needs in bfloat16 (computed, as by --dry-run of the "
        "recipes), and their licence. Nothing is downloaded. Other checkpoints of these families work as well."
    )
    parser.add_argument("names", nargs="*", type=str, help="only models whose family or hub id contains one of these")
    parser.add_argument("--json", action="store_true", help="print one JSON line per model")
    return parser


def run_models(values: Namespace) -> int:
    """Print the table; returns the exit code."""
    with garbage_kept():
        from rich.console import Console

        from salmonn.model.families.catalog import known_models
        from salmonn.model.memory import GIB

    chosen = []
    for model in known_models():
        family = _family_of(model.base)
        if not values.names or any(name.lower() in f"{family.name} {model.name}".lower() for name in values.names):
            chosen.append(model)
    if not chosen:
        raise ValueError(f"no known model or family has {' or '.join(values.names)} in its name; see salmonn models")
    rows = [_describe(model) for model in chosen]
    if values.json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
        return 0
    table = new_table("Known models", ["family", "perceives", "parameters", "GiB on a GPU", "licence"])
    for row in rows:
        memory = f"{row['gpu_bytes'] / GIB:.1f}"
        table.add_row(
            row["model"], row["family"], "+".join(row["perceives"]), f"{row['parameters'] / 1e9:.2f} B", memory,
            row["licence"],
        )  # fmt: skip
    console = Console(width=128)
    console.print(table)
    console.print(
        "GiB: one caption of 51 s of 1280x720 video, in bfloat16, with 1 GiB for the framework. "
        "salmonn caption also takes other models that transformers loads (docs/published.md).",
        highlight=False,
    )
    return 0


def _describe(model: "KnownModel") -> dict[str, Any]:
    family = _family_of(model.base)
    parameters, gpu_bytes = _measure(model.base)
    return {
        "model": model.name,
        "family": family.name,
        "perceives": ["video", "sound"] if family.hears else ["video"],
        "parameters": parameters,
        "gpu_bytes": gpu_bytes,
        "licence": model.licence,
    }


@cache
def _family_of(base: str) -> "Family":
    from salmonn.model.families import get_family
    from salmonn.model.loading import offline_config

    return get_family(offline_config(base))


@cache
def _measure(base: str) -> tuple[int, int]:
    """Return the number of parameters, and the bytes on a GPU for one caption; no weights are loaded."""
    from salmonn.model.loading import Placement
    from salmonn.train.dry_run import LIBRARY_BYTES, MemoryPlan, Workload, build_on_meta
    from salmonn.train.loop import FitConfig

    config = _family_of(base).config
    network = build_on_meta(config)
    work = Workload(clips=1, answers=1)
    plan = MemoryPlan(network, config, placement=Placement(dtype="bfloat16"), fit=FitConfig(), work=work)
    memory = plan.captioning(max_new_tokens=config.max_new_tokens)
    return sum(value.numel() for value in network.parameters()), memory.peak + LIBRARY_BYTES
