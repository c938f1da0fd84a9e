"""Clip + words -> Inputs: frames and log-mel chunks as the towers take them, text with placeholders, padded batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, WhisperFeatureExtractor

from salmonn.caption.prompt import answer_ids, prompt_ids
from salmonn.media.clip import Clip, read_clip
from salmonn.model.build import ModelConfig, load_config
from salmonn.model.network import Inputs, Media
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, config: ModelConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.mel = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=config.chunk_seconds)
        self.tokens_per_frame = config.num_patches + 1

    @classmethod
    def load(cls, path: Path | str) -> "Processor":
        """Read the tokenizer and the config of a model folder."""
        config = load_config(path)
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
            frames_per_second=self.config.frames_per_second,
            max_frames=self.config.max_frames,
            start_seconds=start_seconds,
            end_seconds=end_seconds,
            frame_size=self.config.frame_size,
        )
        return self.media(clip)

    def media(self, clip: Clip) -> Media:
        """One clip as the towers take it.

        Raises:
            ValueError: the frames do not have the model's size.
        """
        size = self.config.frame_size
        if len(clip.frames) and clip.frames.shape[1:3] != (size, size):
            raise ValueError(f"{clip.path}: frames are {clip.frames.shape[1:3]}, this model takes {size} x {size}")
        frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).reshape(-1, 3, size, size).contiguous()
        mel, num_windows = self._hear(clip)
        times = torch.from_numpy(clip.frame_times - clip.start_seconds)
        return Media(frames=frames, mel=mel, frame_times=(times,), num_windows=(num_windows,))

    def _hear(self, clip: Clip) -> tuple[Tensor, int]:
        if clip.waveform is None:
            return torch.zeros(0, self.config.num_mel_bins, self.config.chunk_seconds * 100), 0
        seconds = max(len(clip.waveform) / SAMPLE_HZ, MIN_SOUND_SECONDS)
        # Rounded before the ceiling: 8.0001 s of sound is 16 windows and one chunk, not one more of each.
        num_windows = math.ceil(round(seconds / self.config.window_seconds, 3))
        num_chunks = math.ceil(num_windows * self.config.window_seconds / self.config.chunk_seconds)
        chunk = self.config.chunk_seconds * SAMPLE_HZ
        pieces = [clip.waveform[number * chunk : (number + 1) * chunk] for number in range(num_chunks)]
        mel = self.mel(pieces, sampling_rate=SAMPLE_HZ, return_tensors="pt").input_features
        return mel, num_windows

    def num_clip_tokens(self, media: Media) -> int:
        """Tokens N that one clip becomes."""
        return len(media.frames) * self.tokens_per_frame + sum(media.num_windows) * self.config.num_queries

    def inputs(self, rows: Sequence[Row], clips: Sequence[Media | Tensor], *, pad_left: bool = False) -> Inputs:
        """Collate rows about clips into one batch.

        Args:
            rows: prompts, with answers for training.
            clips: the clips as media, or as blocks (N_i, D) that the towers gave before.
            pad_left: for generation the prompts must end together.
        """
        media = [clip for clip in clips if isinstance(clip, Media)]
        blocks = [clip for clip in clips if isinstance(clip, Tensor)]
        lengths = [self.num_clip_tokens(clip) if isinstance(clip, Media) else len(clip) for clip in clips]
        input_ids, labels = [], []
        for row in rows:
            prompt = prompt_ids(self.tokenizer, row.prompt, num_clip_tokens=lengths[row.clip])
            answer = [] if row.answer is None else answer_ids(self.tokenizer, row.answer)
            input_ids.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
        mask = [[1] * len(ids) for ids in input_ids]
        return Inputs(
            input_ids=_pad(input_ids, self.tokenizer.pad_token_id, left=pad_left),
            attention_mask=_pad(mask, 0, left=pad_left),
            labels=_pad(labels, -100, left=pad_left),
            clip_index=tuple(row.clip for row in rows),
            media=join_media(media) if media else None,
            blocks=tuple(blocks) if blocks else None,
        )


def _pad(rows: Sequence[list[int]], value: int, *, left: bool) -> Tensor:
    width = max(map(len, rows))
    if left:
        return torch.tensor([[value] * (width - len(row)) + row for row in rows])
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def join_media(clips: Sequence[Media]) -> Media:
    """Several clips as one batch."""
    return Media(
        frames=torch.cat([clip.frames for clip in clips]),
        mel=torch.cat([clip.mel for clip in clips]),
        frame_times=tuple(times for clip in clips for times in clip.frame_times),
        num_windows=tuple(count for clip in clips for count in clip.num_windows),
    )


def restrict_media(media: Media, use: Use) -> Media:
    """One clip's picture alone or sound alone.

    Raises:
        ValueError: nothing would be left.
    """
    frames, times, mel, windows = media.frames, media.frame_times[0], media.mel, media.num_windows[0]
    if use == "visual":
        mel, windows = mel[:0], 0
    elif use == "audio":
        frames, times = frames[:0], times[:0]
    if not len(frames) and not windows:
        raise ValueError(f"the clip has nothing left for use '{use}': it lacks picture or sound")
    return Media(frames=frames, mel=mel, frame_times=(times,), num_windows=(windows,))
