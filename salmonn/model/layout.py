"""Model inputs: clips, batches of rows of text, and where each clip token is placed in them.

The towers encode a clip to visual and audio tokens. A `Layout` has the order in which these are inserted into the text,
together with timestamp tokens, and their rotary positions. It needs no weights: the number of placeholders in the text
is known before anything is encoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from salmonn.records import Modality


@dataclass(frozen=True)
class Layout:
    """Order and positions of the N tokens of a clip.

    Args:
        order: (N,) index of each token in the S source tokens: visual ones, then audio, then text. S stands for a zero
            vector.
        positions: (3, N) rotary positions (time, row, column) from the start of the clip; all three are equal for
            decoders with plain rotary embeddings.
        num_visual: number of visual source tokens.
        timestamp_ids: token ids of the text within the clip: timestamps, and markers of frames.
        text_start: position of the text behind the clip, from the start of the clip; None for the published rule of
            video-SALMONN 2, see `next_position`.
    """

    order: Tensor
    positions: Tensor
    num_visual: int
    timestamp_ids: tuple[int, ...] = ()
    text_start: int | None = None

    @property
    def next_position(self) -> int:
        """Position of the text behind the clip, from the start of the clip.

        In video-SALMONN 2 it follows the greatest time, or without audio the greatest of all positions.
        """
        if self.text_start is not None:
            return self.text_start
        counted = self.positions if self.num_visual == len(self) else self.positions[0]
        return int(counted.max()) + 1

    @property
    def is_visual(self) -> Tensor:
        """(N,) true for visual tokens."""
        return self.order < self.num_visual

    def __len__(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class ClipInfo:
    """What is known about the source of a clip's inputs; it goes into each caption.

    Args:
        modality: what the clip has: frames, audio or both; None if not recorded.
        is_complete, warnings: as in `salmonn.media.clip.Clip`; also a warning of audio that the model cannot take.
    """

    modality: Modality | None = None
    is_complete: bool = True
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClipInputs:
    """The towers' inputs for one clip.

    Args:
        pixels: uint8: frames (F, 3, H, W), or patches (T h w, C * 2 * p * p) of a grid. Empty without video.
        mel: (C, M, T) log-mel chunks; empty without audio.
        num_frames: F.
        seconds: duration of the video.
        times: (F,) seconds from the first frame to each frame.
        grid: numbers of steps T, patch rows h and patch columns w; zeros where frames are not cut into patches.
        info: what is known about the source.
    """

    pixels: Tensor
    mel: Tensor
    num_frames: int = 0
    seconds: float = 0.0
    times: tuple[float, ...] = ()
    grid: tuple[int, int, int] = (0, 0, 0)
    info: ClipInfo = ClipInfo()

    def to(self, device: torch.device | str) -> "ClipInputs":
        """Copy the tensors to a device; from pinned memory without waiting for the copies."""
        return replace(self, pixels=_copy(self.pixels, device), mel=_copy(self.mel, device))

    def pin_for(self, device: torch.device) -> "ClipInputs":
        """Return the clip in pinned memory if the device is a GPU, which copies it from there while it computes."""
        if device.type != "cuda":
            return self
        return replace(self, pixels=self.pixels.pin_memory(), mel=self.mel.pin_memory())


@dataclass(frozen=True)
class ClipFeatures:
    """Encoded clip: tokens in their final order, their layout, and what is known about the source.

    Args:
        tokens: (N, (1 + K) D): the embedding of each token, then what is added to its hidden states after each of the
            decoder's first K layers. K is `Family.num_deep_layers`, mostly 0.
        layout: order and positions.
        info: what is known about the source.
    """

    tokens: Tensor
    layout: Layout
    info: ClipInfo = ClipInfo()

    def __len__(self) -> int:
        return len(self.tokens)

    def read_tokens(self) -> Tensor:
        """Return the tokens; a subclass whose tokens lie on disk verifies them first."""
        return self.tokens


def no_clip(width: int) -> ClipFeatures:
    """Return features without tokens, of this width: a prompt about them is text alone."""
    empty = torch.zeros(0, dtype=torch.long)
    return ClipFeatures(torch.zeros(0, width), Layout(empty, torch.zeros(3, 0, dtype=torch.long), num_visual=0))


@dataclass(frozen=True)
class ModelInputs:
    """Batch of B rows of text, each about one clip.

    Args:
        input_ids: (B, L), with a placeholder id for each clip token.
        attention_mask: (B, L), 0 for padding.
        position_ids: (3, B, L) rotary positions.
        labels: (B, L) token ids to be predicted, -100 elsewhere.
        clip_index: (B,) index of each row's clip.
        layouts: layout of each clip.
        clip_inputs: clips that are still to be encoded; or
        clip_features: (N_i, (1 + K) D) tokens of clips that frozen towers have encoded before, see `ClipFeatures`.
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
        """Number of tokens in the decoder: each row's text, and each clip once."""
        lengths = [len(layout) for layout in self.layouts]
        repeated = sum(lengths[index] for index in self.clip_index) - sum(lengths)
        return int(self.attention_mask.sum()) - repeated

    def select(self, rows: Sequence[int]) -> "ModelInputs":
        """Return the given rows, which may be repeated, with all clips."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            position_ids=self.position_ids[:, rows],
            labels=self.labels[rows],
            clip_index=tuple(self.clip_index[row] for row in rows),
        )

    def to(self, device: torch.device | str) -> "ModelInputs":
        """Copy the tensors to a device; from pinned memory without waiting for the copies."""
        return replace(
            self,
            input_ids=_copy(self.input_ids, device),
            attention_mask=_copy(self.attention_mask, device),
            position_ids=_copy(self.position_ids, device),
            labels=_copy(self.labels, device),
            clip_inputs=tuple(clip.to(device) for clip in self.clip_inputs),
            clip_features=tuple(_copy(tokens, device) for tokens in self.clip_features),
        )

    def pin_for(self, device: torch.device) -> "ModelInputs":
        """Return the clips in pinned memory if the device is a GPU; features on disk are read for that."""
        if device.type != "cuda":
            return self
        return replace(
            self,
            clip_inputs=tuple(clip.pin_for(device) for clip in self.clip_inputs),
            clip_features=tuple(tokens.pin_memory() for tokens in self.clip_features),
        )


def _copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device, non_blocking=tensor.is_pinned())


def text_positions(is_clip: Tensor, mask: Tensor, layouts: Sequence[Layout]) -> Tensor:
    """Compute the rotary positions of rows of text with one clip each.

    Args:
        is_clip: (B, L) true for the clip's placeholders.
        mask: (B, L) 0 for padding, on either side.
        layouts: (B,) layouts of the rows' clips.

    Returns:
        (3, B, L); 0 for padding.

    Raises:
        ValueError: a row's number of placeholders differs from its clip's number of tokens.
    """
    positions = torch.zeros(3, *mask.shape, dtype=torch.long)
    for row, layout in enumerate(layouts):
        real = mask[row].bool().nonzero().flatten()
        clip = is_clip[row].nonzero().flatten()
        if len(clip) != len(layout):
            raise ValueError(f"the text has {len(clip)} placeholders, but the clip has {len(layout)} tokens")
        if not len(clip):
            positions[:, row, real] = torch.arange(len(real))
            continue
        before = real[real < clip[0]]
        after = real[real > clip[-1]]
        positions[:, row, before] = torch.arange(len(before))
        positions[:, row, clip] = layout.positions + len(before)
        positions[:, row, after] = torch.arange(len(after)) + len(before) + layout.next_position
    return positions


def insert_clip_tokens(embeds: Tensor, is_placeholder: Tensor, tokens: Tensor) -> Tensor:
    """Replace the placeholders in embedded text by clip tokens.

    Args:
        embeds: (B, L, D) embedded text.
        is_placeholder: (B, L) true for placeholders.
        tokens: (N, D) clip tokens of all rows, concatenated.

    Returns:
        (B, L, D).

    Raises:
        ValueError: the number of placeholders is not N.
    """
    count = int(is_placeholder.sum())
    if count != len(tokens):
        raise ValueError(f"the text has {count} placeholders, but the clips have {len(tokens)} tokens")
    return embeds.masked_scatter(is_placeholder.unsqueeze(-1), tokens.to(embeds.dtype))
