"""The audio-visual language model: towers see and hear, their tokens are spliced into the text, the decoder speaks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from salmonn.model.attention import (
    AttentionBackend,
    BatchedKVCache,
    KVCache,
    PackedAttention,
    PrefillAttention,
    use_packed_attention,
)
from salmonn.model.build import build_parts
from salmonn.model.config import SalmonnConfig
from salmonn.model.layout import Layout, insert_clip_tokens
from salmonn.model.packing import PackedBatch, pack

# Keys of the published checkpoints -> ours, which saved models have.
PUBLISHED_KEYS = {
    "salmonn2": {
        r"^model\.vision_tower\.vision_tower\.vision_model\.": "vision.encoder.",
        r"^model\.mm_projector\.": "vision.projector.",
        r"^model\.image_newline": "vision.newline",
        r"^model\.(layers|norm|embed_tokens)\.": r"lm.model.\1.",
        r"^lm_head\.": "lm.lm_head.",
        r"^speech_encoder\.": "audio.encoder.",
        r"^ln_speech\.": "audio.norm.",
        r"^speech_query_tokens": "audio.qformer.queries",
        r"^speech_llama_proj\.": "audio.projector.0.",
        r"^final_linear\.0\.": "audio.projector.1.",
        r"^final_linear\.2\.": "audio.projector.3.",
        r"^speech_Qformer\.bert\.embeddings\.LayerNorm\.": "audio.qformer.qformer.layernorm.",
        r"^speech_Qformer\.bert\.encoder\.layer\.(\d+\.(?:attention|crossattention))\.self\.": (
            r"audio.qformer.qformer.encoder.layer.\1.attention."
        ),
        r"^speech_Qformer\.bert\.encoder\.layer\.(\d+\.(?:\w+\.output|intermediate_query|output_query))\.": (
            r"audio.qformer.qformer.encoder.layer.\1."
        ),
    },
    "salmonn2-plus": {
        r"^visual\.": "vision.encoder.",
        r"^model\.": "lm.model.language_model.",
        r"^lm_head\.": "lm.lm_head.",
        r"^audio\.(conv1|conv2|embed_positions|layers|layer_norm)\.": r"audio.encoder.\1.",
        r"^audio\.q_tokens": "audio.qformer.queries",
        r"^audio\.audio_proj\.": "audio.projector.",
        r"^audio\.qformer\.bert\.embeddings\.LayerNorm\.": "audio.qformer.qformer.layernorm.",
        r"^audio\.qformer\.bert\.encoder\.layer\.(\d+\.(?:attention|crossattention))\.self\.": (
            r"audio.qformer.qformer.encoder.layer.\1.attention."
        ),
        r"^audio\.qformer\.bert\.encoder\.layer\.(\d+\.(?:\w+\.output|intermediate_query|output_query))\.": (
            r"audio.qformer.qformer.encoder.layer.\1."
        ),
    },
}


LOGIT_BYTES = 256 << 20  # of logits that are held at once in training
# Tokens of prompts that go through together, whole clips. More is no faster, and takes memory; on a CPU it is slower by
# a sixth, since what a layer makes is then so large that the system hands out each of its pages anew.
PREFILL_CHUNK_TOKENS, PREFILL_CHUNK_TOKENS_CPU = 8192, 1024


@dataclass(frozen=True)
class ClipInputs:
    """One clip as the towers take it.

    Args:
        pixels: uint8. salmonn2: frames (F, 3, H, W); 2+: patches (T h w, C * 2 * p * p). Empty without picture.
        mel: (C, M, T) chunks of log-mel features; empty without sound.
        num_frames: F.
        seconds: length of the picture.
        grid: 2+: steps T, rows h and columns w of patches.
    """

    pixels: Tensor
    mel: Tensor
    num_frames: int = 0
    seconds: float = 0.0
    grid: tuple[int, int, int] = (0, 0, 0)

    def to(self, device: torch.device | str) -> "ClipInputs":
        """The same on another device."""
        return replace(self, pixels=self.pixels.to(device), mel=self.mel.to(device))


@dataclass(frozen=True)
class ClipFeatures:
    """A clip's tokens (N, D) as frozen towers gave them, and their layout."""

    tokens: Tensor
    layout: Layout

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInputs:
    """A batch of B rows of text, each about one clip.

    Args:
        input_ids: (B, L), with a placeholder id wherever a clip's token goes.
        attention_mask: (B, L), 0 where padded.
        position_ids: (3, B, L) rotary positions.
        labels: (B, L), the ids to be predicted, -100 elsewhere.
        clip_index: (B,) which clip each row is about.
        layouts: the clips' layouts.
        media: the clips, to be encoded; or
        blocks: the clips' tokens, (N_i, D) each, where the towers are frozen and have run already.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    clip_index: tuple[int, ...]
    layouts: tuple[Layout, ...]
    clip_inputs: tuple[ClipInputs, ...] = ()
    clip_features: tuple[Tensor, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the decoder: each row's text, and each clip once."""
        lengths = [len(layout) for layout in self.layouts]
        again = sum(lengths[index] for index in self.clip_index) - sum(lengths)
        return int(self.attention_mask.sum()) - again

    def to(self, device: torch.device | str) -> "ModelInputs":
        """The same on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
            clip_inputs=tuple(clip.to(device) for clip in self.clip_inputs),
            clip_features=tuple(block.to(device) for block in self.clip_features),
        )


class Network(PreTrainedModel):
    """Vision tower, audio tower and decoder in one, of either family.

    Args:
        config: sizes and family.
    """

    config_class = SalmonnConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules: ClassVar[list[str]] = [
        "Qwen2DecoderLayer",
        "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLVisionBlock",
        "SiglipEncoderLayer",
        "WhisperEncoderLayer",
        "Blip2QFormerLayer",
    ]
    _supports_sdpa = _supports_flash_attn = True
    # The published towers carry weights that their features do not go through.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"post_layernorm", r"position_ids"]

    def __init__(self, config: SalmonnConfig) -> None:
        super().__init__(config)
        parts = build_parts(config, attn_implementation=config._attn_implementation)
        self.vision = parts.vision
        self.audio = parts.audio
        self.lm: Any = parts.lm  # a transformers model, or PEFT's wrapper of it while it carries an adapter
        use_packed_attention(self.lm.get_decoder().config)
        self.chunks_logits = True  # not where each call of a layer is an appointment of all processes (ZeRO-3)
        self.post_init()

    def checkpoint_layers(self, on: bool) -> None:
        """In training keep each layer's input alone, and compute the rest again for the gradient."""
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = on
                # Not reentrant: gradients reach an adapter though no input of its layer needs any.
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def encode(self, media: Sequence[ClipInputs], layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
        """Encode clips to their blocks, picture and sound in the layouts' order: (N_i, D) each."""
        return self.assemble_features(self._see(media), self._hear(media), layouts)

    def assemble_features(
        self, seen: Sequence[Tensor], heard: Sequence[Tensor], layouts: Sequence[Layout]
    ) -> tuple[Tensor, ...]:
        """Put what was seen (V_i, D) and heard (A_i, D) of each clip in the layouts' order."""
        embed = self.lm.get_input_embeddings()
        blocks = []
        for pictures, sounds, layout in zip(seen, heard, layouts, strict=True):
            told = embed(torch.tensor(layout.timestamp_ids, dtype=torch.long, device=self.device))
            zeros = told.new_zeros(1, told.shape[-1])
            # A model that is split over devices has its towers elsewhere than its embeddings.
            tokens = torch.cat([pictures.to(told), sounds.to(told), told, zeros])
            blocks.append(tokens.index_select(0, layout.order.to(tokens.device)))
        return tuple(blocks)

    def _see(self, media: Sequence[ClipInputs]) -> list[Tensor]:
        shown = [clip for clip in media if clip.num_frames]
        tokens = iter(self.vision([clip.pixels for clip in shown], [clip.grid for clip in shown]) if shown else [])
        return [next(tokens) if clip.num_frames else self._nothing() for clip in media]

    def _hear(self, media: Sequence[ClipInputs]) -> list[Tensor]:
        loud = [clip.mel for clip in media if len(clip.mel)]
        tokens = iter(self.audio(loud) if loud else [])
        return [next(tokens) if len(clip.mel) else self._nothing() for clip in media]

    def _nothing(self) -> Tensor:
        # Not beside the embeddings: where they are offloaded, their weight is on no device between two calls.
        return torch.zeros(0, self.lm.get_input_embeddings().embedding_dim, dtype=self.dtype, device=self.device)

    def embed(self, inputs: ModelInputs) -> Tensor:
        """Text with the clips' tokens in their places, (B, L, D)."""
        blocks = self._blocks(inputs, range(len(inputs.layouts)))
        return self._embed(inputs.input_ids, self._is_clip(inputs.input_ids), blocks, inputs.clip_index)

    def _is_clip(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.config.placeholder_ids, device=ids.device))

    def _blocks(self, inputs: ModelInputs, clips: Sequence[int]) -> Sequence[Tensor]:
        if inputs.clip_features:
            return [inputs.clip_features[clip] for clip in clips]
        return self.encode([inputs.clip_inputs[clip] for clip in clips], [inputs.layouts[clip] for clip in clips])

    def _embed(self, ids: Tensor, is_clip: Tensor, blocks: Sequence[Tensor], clip_index: Sequence[int]) -> Tensor:
        # A placeholder need not be in the vocabulary.
        embeds = self.lm.get_input_embeddings()(ids.masked_fill(is_clip, 0))
        parts = [blocks[index].to(embeds.device) for index in clip_index]
        tokens = torch.cat([embeds.new_zeros(0, embeds.shape[-1]), *parts])
        # Where the model is split over devices, the embeddings may be on another than the first.
        return insert_clip_tokens(embeds, is_clip.to(embeds.device), tokens)

    def positions(self, position_ids: Tensor) -> Tensor:
        """What the decoder takes of (3, B, L) positions: all, or the first where its rotary embedding is plain."""
        return position_ids if self.config.family == "salmonn2-plus" else position_ids[0]

    def forward(self, inputs: ModelInputs, *, distributions: bool = False) -> Tensor:
        """Log-probability of every label; the rows are padded on the right.

        What a clip's rows begin with alike, its tokens above all, goes through the decoder once. Only positions with a
        label go through the vocabulary, some at a time.

        Args:
            inputs: the rows.
            distributions: give log-probabilities of all words where there is a label. This stands here, not in a
                method of its own, since what wraps a network (for several GPUs) acts when it is called.

        Returns:
            (B, L - 1): at [b, i] log p(labels[b, i + 1] | everything before it), 0 where there is no label; or
            (N, V) at each of the N labels, row by row, log p(each word | everything before it).
        """
        packed = pack(inputs.input_ids, inputs.attention_mask, inputs.clip_index)
        hidden = self._read(inputs, packed, PackedAttention(packed))
        # Where the model is split over devices, what it gives is on the last of them.
        targets = inputs.labels[:, 1:].to(hidden.device)
        counted = targets != -100
        places = packed.places[:, :-1].to(hidden.device)[counted]
        # Rows share their beginning's last place. Indexing would add up its gradients in an order that threads choose.
        said = hidden.index_select(0, places)
        if distributions:
            return self._logits(said).log_softmax(-1)
        picked = self._pick(said, targets[counted])
        return picked.new_zeros(targets.shape).masked_scatter(counted, picked)

    @property
    def prefill_chunk_tokens(self) -> int:
        """Tokens of prompts that `begin` reads together, or one clip that has more."""
        return PREFILL_CHUNK_TOKENS_CPU if self.device.type == "cpu" else PREFILL_CHUNK_TOKENS

    def prefill(self, inputs: ModelInputs) -> tuple[Tensor, KVCache, list[int]]:
        """Read rows that are to go on.

        Args:
            inputs: B rows, padded on the right.

        Returns:
            (B, V) logits of the token after each row, the memory to go on from, and which row is which: both are in
            the order in which the rows were packed.
        """
        packed = pack(inputs.input_ids, inputs.attention_mask, inputs.clip_index, own=1)
        memory = KVCache(packed, inputs.position_ids.flatten(1)[:, packed.source].unsqueeze(1))
        said = []
        for piece in packed.pieces(self.prefill_chunk_tokens):
            hidden = self._read(inputs, piece, PrefillAttention(piece, memory))
            said.append(hidden[piece.ends.to(hidden.device)])
        memory.settle()
        return self._logits(torch.cat(said)), memory, packed.rows

    def decode_step(self, tokens: Tensor, memories: Sequence[KVCache]) -> Tensor:
        """One more token (R,) of each row that the memories hold -> (R, V) logits of the token after it."""
        memory = memories[0] if len(memories) == 1 else BatchedKVCache(memories)
        embeds = self.lm.get_input_embeddings()(tokens[:, None])
        return self._logits(self._decode(embeds, memory.advance(), memory)[:, 0])

    def _read(self, inputs: ModelInputs, packed: PackedBatch, rows: AttentionBackend) -> Tensor:
        """(T, D) hidden states of a packed sequence."""
        ids = inputs.input_ids.flatten()[packed.source].unsqueeze(0)
        clips = [group.clip for group in packed.groups]
        embeds = self._embed(ids, self._is_clip(ids), self._blocks(inputs, clips), range(len(clips)))
        return self._decode(embeds, inputs.position_ids.flatten(1)[:, packed.source].unsqueeze(1), rows)[0]

    def _decode(self, embeds: Tensor, position_ids: Tensor, rows: AttentionBackend) -> Tensor:
        """(B, T, D) embedded tokens at (3, B, T) positions -> (B, T, D)."""
        output = self.lm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask={"full_attention": None},  # so that transformers makes none: `rows` know who sees whom
            position_ids=self.positions(position_ids),
            use_cache=False,
            rows=rows,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm.get_output_embeddings()(hidden).float()
        return logits

    def _pick(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities (N,) of the targets (N,) after hidden states (N, D).

        A vocabulary is far wider than a model: beyond one chunk, logits are made again for the gradient, not kept.
        """
        size = max(1, LOGIT_BYTES // (4 * self.lm.get_output_embeddings().out_features))
        if len(targets) <= size or not self.chunks_logits:
            return self._pick_chunk(hidden, targets)
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(self._pick_chunk, *chunk, use_reentrant=False) for chunk in chunks])

    def _pick_chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(hidden)
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
