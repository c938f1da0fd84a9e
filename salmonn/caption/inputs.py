"""Clip + words -> Inputs: pictures and log-mel chunks as the towers take them, text with placeholders, in batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, WhisperFeatureExtractor

from salmonn.caption.prompt import answer_ids, prompt_ids
from salmonn.media.clip import Clip, read_clip
from salmonn.model.network import Block, Inputs, Media
from salmonn.model.settings import SalmonnConfig
from salmonn.model.splice import Layout, by_seconds, text_positions
from salmonn.model.vision import to_patches
from salmonn.records import Use

SAMPLE_HZ = 16_000
MIN_SOUND_SECONDS = 1.0  # shorter sound is padded with silence to this, as the published models were trained


@dataclass(frozen=True)
class Row:
    """One line of a batch: a prompt on clip number `clip` of the batch, and its answer where it is known."""

    clip: int
    prompt: str
    answer: str | None = None


class Processor:
    """Turns clips and words into what the network takes.

    Args:
        tokenizer: of the language model.
        config: of the network.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, config: SalmonnConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.mel = WhisperFeatureExtractor(
            feature_size=config.whisper["num_mel_bins"], chunk_length=config.chunk_seconds
        )

    @classmethod
    def load(cls, path: Path | str, *, config: SalmonnConfig) -> "Processor":
        """Read the tokenizer of a model folder."""
        return cls(AutoTokenizer.from_pretrained(str(path)), config=config)

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to a model folder."""
        self.tokenizer.save_pretrained(str(path))

    def read(self, path: Path | str, *, start_seconds: float | None = None, end_seconds: float | None = None) -> Media:
        """Read a video (or a span of it) at the rate and size of this model.

        Raises:
            ClipError: the file cannot be read.
        """
        clip = read_clip(
            path,
            self.config.frame_rule,
            start_seconds=start_seconds,
            end_seconds=end_seconds,
        )
        return self.media(clip)

    def media(self, clip: Clip) -> Media:
        """One clip as the towers take it, its frames chosen and scaled by the model's rule."""
        count = len(clip.frames)
        media = Media(torch.zeros(0, dtype=torch.uint8), self._hear(clip))
        if not count:
            return media
        frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
        vision = self.config.lm["vision_config"]
        pixels, grid = to_patches(frames, patch=vision["patch_size"], merge=vision["spatial_merge_size"])
        # Rounded, since a step of 0.4999999 s would come to stand half a second too early.
        return replace(media, pixels=pixels, grid=grid, num_frames=count, seconds=round(clip.picture_seconds, 6))

    def _hear(self, clip: Clip) -> Tensor:
        chunk = self.config.chunk_seconds * SAMPLE_HZ
        if clip.waveform is None:
            return torch.zeros(0, self.mel.feature_size, self.mel.nb_max_frames)
        seconds = max(len(clip.waveform) / SAMPLE_HZ, MIN_SOUND_SECONDS)
        # Rounded before the ceiling: 8.0001 s of sound is one chunk, not two.
        num_chunks = math.ceil(round(seconds / self.config.chunk_seconds, 3))
        pieces = [clip.waveform[number * chunk : (number + 1) * chunk] for number in range(num_chunks)]
        return self.mel(pieces, sampling_rate=SAMPLE_HZ, return_tensors="pt").input_features

    def lay_out(self, media: Media) -> Layout:
        """The order and positions of the tokens that a clip becomes."""
        steps, rows, columns = media.grid
        merge = self.config.lm["vision_config"]["spatial_merge_size"]
        return by_seconds(
            (steps, rows // merge, columns // merge) if media.num_frames else None,
            num_heard=len(media.mel) * self.config.windows_per_chunk,
            second_per_grid=2 * media.seconds / max(media.num_frames, 1),
        )

    def inputs(self, rows: Sequence[Row], clips: Sequence[Media | Block], *, pad_left: bool = False) -> Inputs:
        """Collate rows about clips into one batch.

        Args:
            rows: prompts, with answers for training.
            clips: the clips as media, or as blocks that the towers gave before.
            pad_left: for generation the prompts must end together.
        """
        layouts = [clip.layout if isinstance(clip, Block) else self.lay_out(clip) for clip in clips]
        placeholders = [self._placeholders(layout) for layout in layouts]
        input_ids, labels = [], []
        for row in rows:
            prompt = prompt_ids(
                self.tokenizer, row.prompt, placeholders=placeholders[row.clip], system=self.config.system_prompt
            )
            answer = [] if row.answer is None else answer_ids(self.tokenizer, row.answer)
            input_ids.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
        ids = _pad(input_ids, self.tokenizer.pad_token_id, left=pad_left)
        mask = _pad([[1] * len(line) for line in input_ids], 0, left=pad_left)
        is_clip = torch.isin(ids, torch.tensor(self.config.placeholder_ids))
        return Inputs(
            input_ids=ids,
            attention_mask=mask,
            position_ids=text_positions(is_clip, mask, [layouts[row.clip] for row in rows]),
            labels=_pad(labels, -100, left=pad_left),
            clip_index=tuple(row.clip for row in rows),
            layouts=tuple(layouts),
            media=tuple(clip for clip in clips if isinstance(clip, Media)),
            blocks=tuple(clip.tokens for clip in clips if isinstance(clip, Block)),
        )

    def _placeholders(self, layout: Layout) -> list[int]:
        seen, heard = self.config.placeholder_ids
        return torch.where(layout.is_seen, seen, heard).tolist()


def _pad(rows: Sequence[list[int]], value: int, *, left: bool) -> Tensor:
    width = max(map(len, rows))
    if left:
        return torch.tensor([[value] * (width - len(row)) + row for row in rows])
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def restrict_media(media: Media, use: Use) -> Media:
    """One clip's picture alone or sound alone.

    Raises:
        ValueError: nothing would be left.
    """
    if use == "visual":
        media = replace(media, mel=media.mel[:0])
    elif use == "audio":
        media = Media(media.pixels[:0], media.mel)
    if not media.num_frames and not len(media.mel):
        raise ValueError(f"the clip has nothing left for use '{use}': it lacks picture or sound")
    return media
