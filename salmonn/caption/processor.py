"""Clip + words -> Inputs: pictures and log-mel chunks as the towers take them, text with placeholders, in batches."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, WhisperFeatureExtractor

from salmonn.caption.loader import ReadSpec
from salmonn.caption.prompt import History, Prompt, answer_ids, prompt_ids, refuse_special_tokens
from salmonn.caption.tokenizer import AUDIO_PAD, CLIP_END, CLIP_START, PAD, TURN_END, TURN_START, VIDEO_PAD
from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.clip import Clip
from salmonn.media.frame_sampling import FixedRateSampler
from salmonn.model.config import SalmonnConfig
from salmonn.model.layout import Layout, interleave_by_frame, interleave_by_time, text_positions
from salmonn.model.network import ClipFeatures, ClipInputs, ModelInputs
from salmonn.model.vision import to_patches
from salmonn.records import Modality

logger = logging.getLogger(__name__)
MAX_PROMPT_CHARS = 20_000  # of a prompt: some thousand tokens, beside a clip's tens of thousands
MAX_CONVERSATION_CHARS = 200_000  # of all that is said before it, too
MIN_SOUND_SECONDS = 1.0  # shorter sound is padded with silence to this, as the published models were trained


@dataclass(frozen=True)
class PromptRow:
    """One line of a batch: a prompt on clip number `clip` of the batch, and its answer where it is known."""

    clip: int
    prompt: str
    answer: str | None = None
    history: History = ()
    system: str | None = None  # in place of the model's own


class Processor:
    """Turns clips and words into what the network takes.

    Args:
        tokenizer: of the language model.
        config: of the network.
        published_positions: number positions as the published inference code of 2+ does, to compare with its scores.

    Raises:
        ValueError: the tokenizer lacks a token of the chat format.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, config: SalmonnConfig, published_positions: bool = False
    ) -> None:
        if published_positions and config.family != "salmonn2-plus":
            raise ValueError(f"published positions are those of salmonn2-plus; the model is a {config.family}")
        needed = [PAD, TURN_START, TURN_END, *([CLIP_START, CLIP_END] if config.family == "salmonn2-plus" else [])]
        if config.placeholder_ids[1] >= 0:
            needed += [VIDEO_PAD, AUDIO_PAD]
        if missing := [token for token in needed if token not in tokenizer.get_vocab()]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}: it is not that of a {config.family} model")
        self.tokenizer = tokenizer
        self.config = config
        self.published_positions = published_positions
        self.pad_id: int = tokenizer.convert_tokens_to_ids(PAD)
        self.stop_ids: list[int] = tokenizer.convert_tokens_to_ids([TURN_END, PAD])
        self.mel = WhisperFeatureExtractor(
            feature_size=config.whisper["num_mel_bins"], chunk_length=config.chunk_seconds
        )

    @classmethod
    def load(cls, path: Path | str, *, config: SalmonnConfig, published_positions: bool = False) -> "Processor":
        """Read the tokenizer of a model folder or of a model on the hub.

        Raises:
            ValueError: there is none, or it is another model's.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds no tokenizer that can be read: {error}") from error
        return cls(tokenizer, config=config, published_positions=published_positions)

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to a model folder."""
        self.tokenizer.save_pretrained(str(path))

    def read(
        self,
        path: Path | str,
        *,
        sound: Path | str | None = None,
        modality: Modality = "both",
        start_seconds: float | None = None,
        end_seconds: float | None = None,
    ) -> ClipInputs:
        """Read a video (or a span of it) at the rate and size of this model.

        Args:
            path: of the video.
            sound: file that its sound is in, where it is not in the video.
            use: picture, sound or both; what is not used is not decoded.
            start_seconds, end_seconds: the span; None is the beginning or the end.

        Raises:
            ClipError: a file cannot be read, or lacks what is used of it.
        """
        read_spec = self.read_spec(modality, start_seconds=start_seconds, end_seconds=end_seconds)
        if sound is None:
            return self.clip_inputs(read_spec.read(path))
        if not read_spec.video:
            return self.clip_inputs(read_spec.read(sound))
        clip = replace(read_spec, audio=False).read(path)
        waveform = replace(read_spec, video=False).read(sound).waveform if read_spec.audio else None
        return self.clip_inputs(replace(clip, waveform=waveform))

    def read_spec(
        self, modality: Modality, *, start_seconds: float | None = None, end_seconds: float | None = None
    ) -> ReadSpec:
        """What this model reads of a file, or of a span of it."""
        sampler = self.config.frame_sampler
        return ReadSpec(sampler, start_seconds, end_seconds, video=modality != "audio", audio=modality != "visual")

    def check(self, prompt: str | Prompt) -> None:
        """Raise a ValueError where a prompt cannot be asked: for what it holds, or for its length."""
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        if (letters := len(prompt.words)) > MAX_PROMPT_CHARS:
            raise ValueError(f"the prompt has {letters:,} letters: ask in at most {MAX_PROMPT_CHARS:,}")
        texts = prompt.texts
        if (letters := sum(map(len, texts))) > MAX_CONVERSATION_CHARS:
            raise ValueError(
                f"the conversation has {letters:,} letters, of which {MAX_CONVERSATION_CHARS:,} are taken at most: "
                "leave out the eldest questions and answers"
            )
        if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
            raise ValueError("the prompt holds half of a Unicode character: type it anew")
        refuse_special_tokens(self.tokenizer, texts, what="prompt", placeholders=self.config.placeholder_ids)

    def clip_inputs(self, clip: Clip) -> ClipInputs:
        """One clip as the towers take it, its frames chosen and scaled by the model's rule."""
        count = len(clip.frames)
        mel = self._hear(clip)
        if not count:
            return ClipInputs(torch.zeros(0, dtype=torch.uint8), mel)
        # Rounded, since a step of 0.4999999 s would come to stand half a second too early.
        seconds = round(clip.video_seconds, 6)
        return to_clip_inputs(self.config, torch.from_numpy(clip.frames).permute(0, 3, 1, 2), mel, seconds=seconds)

    def _hear(self, clip: Clip) -> Tensor:
        chunk = self.config.chunk_seconds * SAMPLE_RATE_HZ
        if clip.waveform is None:
            return torch.zeros(0, self.mel.feature_size, self.mel.nb_max_frames)
        waveform = self._heard_part(clip, clip.waveform)
        num_chunks = count_chunks(self.config, len(waveform) / SAMPLE_RATE_HZ)
        pieces = [waveform[number * chunk : (number + 1) * chunk] for number in range(num_chunks)]
        return self.mel(pieces, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features

    def _heard_part(self, clip: Clip, waveform: np.ndarray) -> np.ndarray:
        """2+ hears all of it, salmonn2 what lasts as long as the picture, or as the longest picture that it sees."""
        sampler = self.config.frame_sampler
        if not isinstance(sampler, FixedRateSampler):
            return waveform
        limit = clip.video_seconds or sampler.max_seconds
        part = waveform[: max(round(limit * SAMPLE_RATE_HZ), 1)]
        if (lost := (len(waveform) - len(part)) / SAMPLE_RATE_HZ) >= 1:
            logger.warning("%s: the last %.1f s of sound are not heard; this model hears %.1f", clip.path, lost, limit)
        return part

    def make_layout(self, media: ClipInputs) -> Layout:
        """The order and positions of the tokens that a clip becomes."""
        told = [self.tokenizer.encode(time, add_special_tokens=False) for time in frame_timestamps(self.config, media)]
        return make_layout(self.config, media, told=told, published_positions=self.published_positions)

    def count_tokens(self, media: ClipInputs, prompt: Prompt) -> int:
        """Of a clip and what is asked of it together."""
        places = [-1] * len(self.make_layout(media))  # which token stands there does not matter
        return len(self._prompt_ids(prompt, places))

    def _prompt_ids(self, prompt: Prompt, placeholders: Sequence[int]) -> list[int]:
        return prompt_ids(
            self.tokenizer,
            prompt.words,
            placeholders=placeholders,
            family=self.config.family,
            system=self.config.system_prompt if prompt.system is None else prompt.system,
            history=prompt.history,
        )

    def collate(self, rows: Sequence[PromptRow], clips: Sequence[ClipInputs | ClipFeatures]) -> ModelInputs:
        """Collate rows about clips into one batch.

        Args:
            rows: prompts, with answers for training.
            clips: the clips as media, or as blocks that the towers gave before.
        """
        layouts = [clip.layout if isinstance(clip, ClipFeatures) else self.make_layout(clip) for clip in clips]
        placeholders = [self._placeholders(layout) for layout in layouts]
        input_ids, labels = [], []
        for row in rows:
            asked = Prompt(row.prompt, history=row.history, system=row.system)
            prompt = self._prompt_ids(asked, placeholders[row.clip])
            answer = [] if row.answer is None else answer_ids(self.tokenizer, row.answer)
            input_ids.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
        longest = max(map(len, input_ids))
        if longest > self.config.max_positions:
            logger.warning(
                "%d tokens are more than the %d that the language model was made for, and it may ramble: take a part "
                "of the video (start, end)",
                longest,
                self.config.max_positions,
            )
        ids = _pad(input_ids, self.pad_id)
        mask = _pad([[1] * len(line) for line in input_ids], 0)
        is_clip = torch.isin(ids, torch.tensor(self.config.placeholder_ids))
        return ModelInputs(
            input_ids=ids,
            attention_mask=mask,
            position_ids=text_positions(is_clip, mask, [layouts[row.clip] for row in rows]),
            labels=_pad(labels, -100),
            clip_index=tuple(row.clip for row in rows),
            layouts=tuple(layouts),
            clip_inputs=tuple(clip for clip in clips if isinstance(clip, ClipInputs)),
            clip_features=tuple(clip.tokens for clip in clips if isinstance(clip, ClipFeatures)),
        )

    def _placeholders(self, layout: Layout) -> list[int]:
        seen, heard = self.config.placeholder_ids
        return torch.where(layout.is_visual, seen, heard).tolist()


def to_clip_inputs(config: SalmonnConfig, frames: Tensor, mel: Tensor, *, seconds: float) -> ClipInputs:
    """Chosen and scaled frames (F, 3, H, W) and log-mel chunks as a family's towers take them."""
    if config.family == "salmonn2":
        return ClipInputs(frames.contiguous(), mel, num_frames=len(frames), seconds=seconds)
    vision = config.lm["vision_config"]
    pixels, grid = to_patches(frames, patch=vision["patch_size"], merge=vision["spatial_merge_size"])
    return ClipInputs(pixels, mel, num_frames=len(frames), seconds=seconds, grid=grid)


def count_chunks(config: SalmonnConfig, seconds: float) -> int:
    """Chunks that so many seconds of sound are heard in."""
    return math.ceil((max(seconds, MIN_SOUND_SECONDS) - config.tail_tolerance_seconds) / config.chunk_seconds)


def frame_timestamps(config: SalmonnConfig, media: ClipInputs) -> list[str]:
    """Each frame's time, seconds since the beginning up to its end; salmonn2 tells it where nothing is heard."""
    if config.family != "salmonn2" or not config.timestamp_tokens or len(media.mel):
        return []
    step = media.seconds / max(media.num_frames, 1)
    return [str(round(step * number, 1)) for number in range(1, media.num_frames + 1)]


def make_layout(
    config: SalmonnConfig, media: ClipInputs, *, told: Sequence[Sequence[int]] = (), published_positions: bool = False
) -> Layout:
    """The layout of a clip's block.

    Args:
        config: of the network.
        media: the clip.
        told: salmonn2: ids of each frame's time, where nothing is heard.
        released: 2+: see `Processor`.
    """
    num_audio = len(media.mel) * config.tokens_per_chunk
    if config.family == "salmonn2":
        num_during_video = round(media.seconds * 50)  # the published count of steps, though a second has two tokens
        return interleave_by_frame(
            media.num_frames, config.tokens_per_frame, num_audio=num_audio, num_during_video=num_during_video, told=told
        )
    steps, rows, columns = media.grid
    merge = config.lm["vision_config"]["spatial_merge_size"]
    return interleave_by_time(
        (steps, rows // merge, columns // merge) if media.num_frames else None,
        num_audio=num_audio,
        second_per_grid=2 * media.seconds / max(media.num_frames, 1),
        published_positions=published_positions,
    )


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def select_modality(media: ClipInputs, modality: Modality) -> ClipInputs:
    """One clip's picture alone or sound alone.

    Raises:
        ValueError: nothing would be left.
    """
    if modality == "visual":
        media = replace(media, mel=media.mel[:0])
    elif modality == "audio":
        media = ClipInputs(media.pixels[:0], media.mel)
    if not media.num_frames and not len(media.mel):
        raise ValueError(f"the clip has nothing left for use '{modality}': it lacks picture or sound")
    return media
