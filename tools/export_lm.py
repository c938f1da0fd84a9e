"""Write the language model of video-SALMONN 2 or 2+ as a Qwen2 model for vLLM.

    python tools/export_lm.py --model tsinghua-ee/video-SALMONN-2 --out FOLDER

That of video-SALMONN 2 is a plain Qwen2ForCausalLM, which transformers and servers of Qwen2 load, too. That of 2+ needs
the plugin of this package, since its tokens have positions in time, height and width. The towers are left out: a client
encodes the clip with the whole model, see `salmonn.caption.vllm_prompt`. FOLDER is written atomically.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from salmonn.caption.captioner import Captioner
from salmonn.caption.vllm_export import require_qwen2, write_language_model
from salmonn.config import run_recipe
from salmonn.files import atomic_folder
from salmonn.model.loading import Placement


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
        ValueError: it is not a Qwen2.
    """
    require_qwen2(config.model)
    with atomic_folder(config.out) as folder:
        placement = Placement(device="cpu", dtype=config.dtype)
        write_language_model(Captioner.load(config.model, placement=placement, adapter=config.adapter), folder)
    sys.stderr.write(f"wrote the language model of {config.model} ({config.dtype}): {config.out}\n")


if __name__ == "__main__":
    run_recipe(main, ExportConfig, description=__doc__)
