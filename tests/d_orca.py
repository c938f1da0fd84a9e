"""A tiny D-ORCA with random weights, in the published layout."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from salmonn.model.families import from_published
from salmonn.model.families.base import AUDIO_PAD, VIDEO_PAD
from salmonn.model.network import Network
from tests.qwen3_vl import TEXT, VISION

WHISPER = dict(num_mel_bins=16, d_model=24, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32)
QFORMER = dict(
    hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, encoder_width=24,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
PUBLISHED_NAMES = (
    (r"^vision\.encoder\.", "model.visual."),
    (r"^lm\.model\.language_model\.", "model.language_model."),
    (r"^lm\.", ""),
    (r"^audio\.encoder\.", "model.audio."),
    (r"^audio\.projector\.", "model.audio.audio_proj."),
    (r"^audio\.qformer\.queries", "model.audio.q_tokens"),
    (r"^audio\.qformer\.qformer\.layernorm\.", "model.audio.qformer.bert.embeddings.LayerNorm."),
    (r"^audio\.qformer\.qformer\.", "model.audio.qformer.bert."),
    (r"(attention)\.attention\.", r"\1.self."),
)


def published_name(name: str) -> str:
    """Return the name of a weight in the published checkpoint."""
    for pattern, published in PUBLISHED_NAMES:
        name = re.sub(pattern, published, name)
    return name


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save a model with the published names of weights, and the tokenizer, to a folder."""
    tokenizer.save_pretrained(str(folder))
    video_id, audio_id = tokenizer.convert_tokens_to_ids([VIDEO_PAD, AUDIO_PAD])
    values = dict(
        model_type="qwen3_vl", text_config=TEXT | dict(vocab_size=len(tokenizer)), vision_config=VISION,
        video_token_id=video_id, audio_token_id=audio_id, tie_word_embeddings=False,
        audio_config=WHISPER | dict(qformer_config=QFORMER),
    )  # fmt: skip
    torch.manual_seed(0)
    weights = {
        published_name(name): value + 0.1 * torch.randn_like(value)
        for name, value in Network(from_published(values)).state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder
