"""Write a model with a PEFT adapter merged into it, as a folder that everything here reads: captioning and training.

    python tools/merge.py --model tsinghua-ee/video_SALMONN2plus_7B_audioAlign --adapter ADAPTER --out FOLDER

MODEL and ADAPTER are folders or hub ids. Nothing is drawn at random; FOLDER appears whole or not at all.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from salmonn.caption.captioner import Captioner
from salmonn.config import run_recipe
from salmonn.model.loading import Placement
from salmonn.records import atomic_folder


@dataclass(frozen=True)
class MergeConfig:
    """What is merged.

    Args:
        out: new folder for the model.
        model: folder or hub id of the model that the adapter was trained on.
        adapter: folder or hub id of the adapter.
        dtype: of all weights written.
    """

    out: Path
    model: str
    adapter: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


def main(config: MergeConfig) -> None:
    """Merge and write."""
    with atomic_folder(config.out) as folder:
        captioner = Captioner.load(
            config.model, placement=Placement(device="cpu", dtype=config.dtype), adapter=config.adapter
        )
        captioner.save(folder)
    sys.stderr.write(f"{config.out} holds {config.model} with {config.adapter} merged, in {config.dtype}\n")


if __name__ == "__main__":
    run_recipe(main, MergeConfig, description=__doc__)
