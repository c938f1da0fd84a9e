"""Write the language model of video-SALMONN 2 or 2+ as a Qwen2 model for vLLM.

    python tools/export_lm.py --model tsinghua-ee/video-SALMONN-2 --out FOLDER

That of video-SALMONN 2 is a plain Qwen2ForCausalLM, which transformers and servers of Qwen2 load, too. That of 2+ needs
the plugin of this package, since its tokens have positions in time, height and width. The towers are left out: a client
encodes the clip with the whole model, see `salmonn.caption.vllm_prompt`. FOLDER is written atomically.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from salmonn.caption.captioner import Captioner
from salmonn.caption.vllm_prompt import ARCHITECTURE
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
    with atomic_folder(config.out) as folder:
        placement = Placement(device="cpu", dtype=config.dtype)
        captioner = Captioner.load(config.model, placement=placement, adapter=config.adapter)
        lm, family = captioner.network.lm, captioner.network.family
        if isinstance(lm, Qwen2_5_VLForConditionalGeneration):
            lm = to_qwen2(lm)
        if not isinstance(lm, Qwen2ForCausalLM):
            raise ValueError(f"{config.model} is a {family.name} model; only video-SALMONN 2 and 2+ can be exported")
        lm.save_pretrained(str(folder))
        if uses_three_dimensions(lm):
            name_plugin(folder / "config.json")
        captioner.processor.save(folder)
    sys.stderr.write(f"wrote the language model of {config.model} ({config.dtype}): {config.out}\n")


def to_qwen2(lm: Qwen2_5_VLForConditionalGeneration) -> Qwen2ForCausalLM:
    """Return the decoder of Qwen2.5-VL as a Qwen2 with the same weights; its config keeps 3-D positions."""
    text = lm.config.get_text_config().to_dict()
    drop = ("model_type", "architectures", "vision_config", "audio_config")
    qwen2 = Qwen2Config(**{key: value for key, value in text.items() if key not in drop})
    with torch.device("meta"):
        plain = Qwen2ForCausalLM(qwen2)
    weights = {name.replace("model.language_model.", "model."): one for name, one in lm.state_dict().items()}
    if qwen2.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    plain.load_state_dict(weights, assign=True)
    return plain


def uses_three_dimensions(lm: Qwen2ForCausalLM) -> bool:
    """Return whether the positions are in time, height and width."""
    return "mrope_section" in (lm.config.rope_parameters or {})


def name_plugin(path: Path) -> None:
    """Name the plugin's class in a config.json, so that no server takes the model for a Qwen2 with 1-D positions."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"architectures": [ARCHITECTURE]}, indent=2) + "\n")


if __name__ == "__main__":
    run_recipe(main, ExportConfig, description=__doc__)
