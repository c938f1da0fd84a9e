"""Merge a PEFT adapter into its model and save the result as a model folder for captioning and training.

    python tools/merge.py --model tsinghua-ee/video_SALMONN2plus_7B_audioAlign --adapter ADAPTER --out FOLDER

MODEL and ADAPTER are folders or hub ids. FOLDER is written atomically.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from salmonn.caption.captioner import Captioner
from salmonn.config import run_recipe
from salmonn.files import atomic_folder
from salmonn.model.loading import Placement


@dataclass(frozen=True)
class MergeConfig:
    """Model, adapter and output.

    Args:
        out: new folder for the merged model.
        model: folder or hub id of the model that the adapter was trained on.
        adapter: folder or hub id of the adapter.
        dtype: type of all saved weights.
    """

    out: Path
    model: str
    adapter: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


def main(config: MergeConfig) -> None:
    """Merge and save."""
    with atomic_folder(config.out) as folder:
        placement = Placement(device="cpu", dtype=config.dtype)
        Captioner.load(config.model, placement=placement, adapter=config.adapter).save(folder)
    sys.stderr.write(f"merged {config.adapter} into {config.model} ({config.dtype}): {config.out}\n")


if __name__ == "__main__":
    run_recipe(main, MergeConfig, description=__doc__)
