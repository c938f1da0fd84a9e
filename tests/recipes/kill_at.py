"""Run a recipe that kills itself by SIGKILL at a chosen point.

    kill_at.py POINT RECIPE.py FLAGS...

Writes `killed` to stdout first. A recipe that does not reach the point runs to its end.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from salmonn.caption import captioner
from salmonn.model import lora
from salmonn.preference import rating, reward, reward_model
from salmonn.train import checkpoint, evaluate, feature_cache, reference_logps, reward_rounds, run_folder, sampling


def kill() -> None:
    sys.stdout.write("killed\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str, *, when: Callable[..., bool] = lambda *_, **__: True, calls: int = 1) -> None:
    """Kill before the `calls`-th call for which `when` is true."""
    original, matching_calls = getattr(module, name), []

    def wrapped(*args: Any, **options: Any) -> Any:
        if when(*args, **options):
            matching_calls.append(1)
            if len(matching_calls) == calls:
                kill()
        return original(*args, **options)

    setattr(module, name, wrapped)


def after(module: Any, name: str) -> None:
    """Kill after a call has returned."""
    original = getattr(module, name)

    def wrapped(*args: Any, **options: Any) -> None:
        original(*args, **options)
        kill()

    setattr(module, name, wrapped)


def while_writing(module: Any, name: str) -> None:
    """Kill after half of a file is written."""

    def wrapped(_: Any, path: str, **__: Any) -> None:
        Path(path).write_bytes(b"partial")
        kill()

    setattr(module, name, wrapped)


def has_name(name: str) -> Callable[..., bool]:
    return lambda path, *_, **__: Path(path).name == name


POINTS: dict[str, Callable[[], None]] = {
    "features": lambda: while_writing(feature_cache, "save_file"),
    # The second part of the captions is sampled but not written, the first one is.
    "sampling": lambda: before(sampling, "write_records", when=lambda path, _: "parts" in str(path), calls=2),
    "captions": lambda: before(run_folder, "write_records", when=has_name("captions.jsonl")),
    "judging": lambda: before(reward, "write_scores"),
    "pairing": lambda: before(run_folder, "write_records", when=has_name("pairs.jsonl")),
    "wins": lambda: before(run_folder, "write_records", when=has_name("wins.jsonl")),
    "reference": lambda: before(reference_logps, "write_json"),
    "step": lambda: before(torch.optim.AdamW, "step", calls=2),
    "checkpoint": lambda: while_writing(checkpoint, "save_file"),
    "checkpoint_json": lambda: before(checkpoint, "write_json"),
    "adapter": lambda: before(lora, "write_json"),
    "merge": lambda: after(captioner, "save_network"),
    "merged": lambda: before(checkpoint.shutil, "rmtree", when=has_name("checkpoints")),
    "reward": lambda: before(reward_model, "write_json", when=has_name("reward.json")),
    "rating": lambda: before(rating, "write_records", when=has_name("ratings.jsonl")),
    "audit": lambda: before(reward, "write_scores", when=lambda path, *_: Path(path).parent.name == "audit"),
    "audited": lambda: before(reward_rounds, "write_json", when=has_name("audit.json")),
    "measuring": lambda: before(evaluate, "write_json", when=has_name("rates.json")),
}


if __name__ == "__main__":
    POINTS[sys.argv[1]]()
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
