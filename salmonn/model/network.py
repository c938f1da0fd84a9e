"""The audio-visual language model: towers see and hear, their tokens are spliced into the text, the decoder speaks.

A `Network` receives built parts; sizes stand in `build.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from salmonn.model.audio import AudioTower
from salmonn.model.pack import PADDING, pack
from salmonn.model.splice import interleave, place, time_order
from salmonn.model.vision import VisionTower


@dataclass(frozen=True)
class Media:
    """What the towers take: all clips of a batch, one after the other.

    Args:
        frames: (F, 3, H, W) uint8.
        mel: (C, M, T) chunks of log-mel features.
        frame_times: for each clip (F_i,), seconds from the clip's start; F_i sums to F.
        num_windows: for each clip the windows of sound that are not padding; 0 without sound.
    """

    frames: Tensor
    mel: Tensor
    frame_times: tuple[Tensor, ...]
    num_windows: tuple[int, ...]

    def to(self, device: torch.device | str) -> "Media":
        """The same on another device (times stay where they are: they only order tokens)."""
        return replace(self, frames=self.frames.to(device), mel=self.mel.to(device))


@dataclass(frozen=True)
class Inputs:
    """A batch of B rows of text, each about one clip.

    Args:
        input_ids: (B, L), with the placeholder id wherever a clip's token goes.
        attention_mask: (B, L), 0 where padded.
        labels: (B, L), the ids to be predicted, -100 elsewhere.
        clip_index: (B,) which clip each row is about.
        media: the clips, to be encoded; or
        blocks: the clips' tokens, (N_i, D) each, where the towers are frozen and have run already.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    clip_index: tuple[int, ...]
    media: Media | None = None
    blocks: tuple[Tensor, ...] | None = None

    def to(self, device: torch.device | str) -> "Inputs":
        """The same on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            media=self.media.to(device) if self.media else None,
            blocks=tuple(block.to(device) for block in self.blocks) if self.blocks else None,
        )


class Network(nn.Module):
    """Vision tower, audio tower and decoder in one.

    Args:
        vision: frames to tokens.
        audio: sound to tokens.
        lm: a transformers causal language model.
        placeholder_id: the token id that stands for a clip's token in the text.
        window_seconds: length of a Q-Former window.
    """

    def __init__(
        self, vision: VisionTower, audio: AudioTower, lm: Any, *, placeholder_id: int, window_seconds: float
    ) -> None:
        super().__init__()
        self.vision = vision
        self.audio = audio
        self.lm: Any = lm  # a transformers model, or PEFT's wrapper of it while it carries an adapter
        self.placeholder_id = placeholder_id
        self.window_seconds = window_seconds

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision.encoder.device

    def encode(self, media: Media) -> tuple[Tensor, ...]:
        """Encode clips to their tokens, picture and sound in the order of time: (N_i, D) for each clip."""
        lengths = [len(times) for times in media.frame_times]
        frames = self._see(media.frames, lengths).split(lengths)
        windows = self._hear(media)
        return tuple(
            interleave(
                clip_frames,
                clip_windows,
                time_order(times, num_windows=len(clip_windows), window_seconds=self.window_seconds),
            )
            for clip_frames, clip_windows, times in zip(frames, windows, media.frame_times, strict=True)
        )

    def _see(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        if len(frames) == 0:
            return torch.zeros(0, self.vision.tokens_per_frame, self.lm.config.hidden_size, device=frames.device)
        return self.vision(frames, lengths)

    def _hear(self, media: Media) -> Sequence[Tensor]:
        num_queries = self.audio.qformer.queries.shape[1]
        if len(media.mel) == 0:
            empty = media.mel.new_zeros(0, num_queries, self.lm.config.hidden_size)
            return [empty] * len(media.num_windows)
        tokens = self.audio(media.mel)
        windows_per_chunk = tokens.shape[1]
        chunks = [-(-count // windows_per_chunk) for count in media.num_windows]
        # A clip's chunks follow one another, so their windows form one run; what pads the last chunk is cut off.
        return [
            chunk.flatten(0, 1)[:count] for chunk, count in zip(tokens.split(chunks), media.num_windows, strict=True)
        ]

    def embed(self, inputs: Inputs) -> Tensor:
        """Text with the clips' tokens in their places, (B, L, D)."""
        is_clip = inputs.input_ids == self.placeholder_id
        return self._embed(inputs.input_ids, is_clip, self._blocks(inputs), inputs.clip_index)

    def _blocks(self, inputs: Inputs) -> Sequence[Tensor]:
        if inputs.blocks is not None:
            return inputs.blocks
        assert inputs.media is not None, "inputs carry neither media nor blocks"
        return self.encode(inputs.media)

    def _embed(self, ids: Tensor, is_clip: Tensor, blocks: Sequence[Tensor], clip_index: Sequence[int]) -> Tensor:
        embeds = self.lm.get_input_embeddings()(ids)
        tokens = torch.cat([embeds.new_zeros(0, embeds.shape[-1]), *(blocks[index] for index in clip_index)])
        return place(embeds, is_clip, tokens)

    def forward(self, inputs: Inputs) -> Tensor:
        """Log-probability of every label; the rows are padded on the right.

        What a clip's rows begin with alike, its tokens above all, goes through the decoder once. Only positions with a
        label go through the vocabulary.

        Returns:
            (B, L - 1): at [b, i] log p(labels[b, i + 1] | everything before it), 0 where there is no label.
        """
        packed = pack(inputs.input_ids, inputs.attention_mask, inputs.clip_index)
        ids = inputs.input_ids.flatten()[packed.source]
        is_clip = (ids == self.placeholder_id) & (packed.segments != PADDING)
        mask = packed.mask
        hidden = self.lm.get_decoder()(
            inputs_embeds=self._embed(ids, is_clip, self._blocks(inputs), packed.clips),
            attention_mask=mask,
            # Without a mask transformers would take positions that begin anew for sequences that were packed.
            position_ids=None if mask is None else packed.positions,
            use_cache=False,
        ).last_hidden_state
        targets = inputs.labels[:, 1:]
        counted = targets != -100
        # Rows share their beginning's last place. Indexing would add up its gradients in an order that threads choose.
        said = hidden.flatten(0, 1).index_select(0, packed.places[:, :-1][counted])
        logits = self.lm.get_output_embeddings()(said).float()
        picked = logits.gather(-1, targets[counted].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        return picked.new_zeros(targets.shape).masked_scatter(counted, picked)
