"""Write the language model of a video-SALMONN 2 model as a plain Qwen2ForCausalLM, which servers of Qwen2 load.

    python tools/export_lm.py --model tsinghua-ee/video-SALMONN-2 --out FOLDER
    vllm serve FOLDER --enable-prompt-embeds

The towers are left out: a client encodes the clip with the whole model, and sends the prompt as the embeddings
`network.embed(inputs)[0]`, (L, D), without its padding. FOLDER is written atomically.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import Qwen2ForCausalLM

from salmonn.caption.captioner import Captioner
from salmonn.config import run_recipe
from salmonn.model.loading import Placement
from salmonn.records import atomic_folder


@dataclass(frozen=True)
class ExportConfig:
    """Model and output.

    Args:
        out: new folder for the language model and its tokenizer.
        model: folder or hub id of the model.
        adapter: folder or hub id of an adapter to merge first.
        dtype: type of the saved weights.
    """

    out: Path
    model: str
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


def main(config: ExportConfig) -> None:
    """Load the model and save its language model.

    Raises:
        ValueError: its positions are not those of a plain Qwen2.
    """
    with atomic_folder(config.out) as folder:
        placement = Placement(device="cpu", dtype=config.dtype)
        captioner = Captioner.load(config.model, placement=placement, adapter=config.adapter)
        lm, family = captioner.network.lm, captioner.network.family
        if not isinstance(lm, Qwen2ForCausalLM):
            raise ValueError(
                f"{config.model} is a {family.name} model, whose tokens have positions in time, height and width; a "
                "prompt of embeddings does not carry them, so only video-SALMONN 2 can be exported"
            )
        lm.save_pretrained(str(folder))
        captioner.processor.save(folder)
    sys.stderr.write(f"wrote the language model of {config.model} ({config.dtype}): {config.out}\n")


if __name__ == "__main__":
    run_recipe(main, ExportConfig, description=__doc__)
