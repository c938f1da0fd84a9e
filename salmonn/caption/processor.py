"""Processor: clips and prompts -> model inputs (pixels, log-mel chunks, token ids, labels, rotary positions)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from salmonn.caption.constraint import JsonGrammars
from salmonn.caption.generator import History
from salmonn.caption.prompt import Prompt, answer_ids, prompt_ids, refuse_special_tokens
from salmonn.caption.read_spec import ReadSpec, SeparateAudioSpec
from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.clip import Clip
from salmonn.media.readers import load_reader
from salmonn.model.config import SalmonnConfig
from salmonn.model.families import get_family
from salmonn.model.layout import ClipFeatures, ClipInfo, ClipInputs, Layout, ModelInputs, text_positions
from salmonn.records import Modality

logger = logging.getLogger(__name__)
SYNTHETIC_CONFIG = "synth.json"  # next to the folder of synthetic clips
MAX_PROMPT_CHARS = 20_000  # some thousand tokens, next to a clip's tens of thousands
MAX_CONVERSATION_CHARS = 200_000  # with all earlier messages


@dataclass(frozen=True)
class PromptRow:
    """Row of a batch: a prompt about a clip, and in training its answer.

    Args:
        clip: index of the clip in the batch.
        prompt: the user message.
        answer: the answer, if known.
        history: earlier prompts and answers.
        system: system message, "" for none; None for the model's default.
        finished: False for an answer that was cut off at the token limit, which has no end token.
        clip_turn: number of the prompt that shows the clip.
    """

    clip: int
    prompt: str
    answer: str | None = None
    history: History = ()
    system: str | None = None
    finished: bool = True
    clip_turn: int = 0


class Processor:
    """Converter of clips and prompts to a network's inputs.

    Args:
        tokenizer: tokenizer of the language model.
        config: config of the network.
        published_positions: number positions as the published inference code does, to compare scores with published
            ones.
        reader: decoder of video frames, see `read_clip`.

    Raises:
        ValueError: the tokenizer lacks a token of the chat format, the family has no published positions, or the
            reader is not installed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: SalmonnConfig,
        published_positions: bool = False,
        reader: str = "pyav",
    ) -> None:
        if reader != "pyav":
            load_reader(reader)
        self.tokenizer = tokenizer
        self.config = config
        self.family = get_family(config)
        self.published_positions = published_positions
        self.is_shipped_toy = False  # the built-in model, which warns once about a file that is not a synthetic clip
        self.reader = reader
        if published_positions and not self.family.has_published_positions:
            raise ValueError(f"published positions are not defined for a {config.family} model; use the default ones")
        placeholders = self.family.placeholder_tokens if config.placeholder_ids[1] >= 0 else ()
        needed = [*self.family.required_tokens, *placeholders]
        if missing := [token for token in needed if token not in tokenizer.get_vocab()]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}; it does not belong to a {config.family} model")
        self.pad_id: int = tokenizer.convert_tokens_to_ids(self.family.pad_token)
        self.stop_ids: list[int] = tokenizer.convert_tokens_to_ids([self.family.turn_end, self.family.pad_token])

    @classmethod
    def load(
        cls, path: Path | str, *, config: SalmonnConfig, published_positions: bool = False, reader: str = "pyav"
    ) -> "Processor":
        """Read the tokenizer of a model folder or of a model on the hub.

        Raises:
            ValueError: there is no tokenizer, or it belongs to another model.
        """
        # It reads config.json and checks the parts that are not used here, such as Qwen-Omni's talker.
        logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} has no readable tokenizer: {error}") from error
        return cls(tokenizer, config=config, published_positions=published_positions, reader=reader)

    @property
    def frames(self) -> dict[str, int | float | None]:
        """Arguments of the frame sampler."""
        return dict(vars(self.family.frame_sampler))

    def set_frames(self, frames: Mapping[str, int | float | None]) -> None:
        """Change arguments of the frame sampler; raises ValueError if it has no such argument."""
        self.config = self.family.with_frames(frames)
        self.family = get_family(self.config)

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to a model folder."""
        self.tokenizer.save_pretrained(str(path))

    @cached_property
    def json_grammars(self) -> JsonGrammars:
        """Compiler of JSON schemas; raises a ValueError if the package that it needs is not installed."""
        return JsonGrammars(self.tokenizer, end_id=self.stop_ids[0])

    def read(
        self,
        path: Path | str,
        *,
        sound: Path | str | None = None,
        modality: Modality = "both",
        start_seconds: float | None = None,
        end_seconds: float | None = None,
    ) -> ClipInputs:
        """Read a video, or a span of it, with this model's frame rate and frame size.

        Args:
            path: video file.
            sound: audio file, where the audio is not in the video file.
            modality: streams to decode: video, audio or both.
            start_seconds, end_seconds: the span; None for the start or the end of the video.

        Raises:
            ClipError: a file cannot be read, or lacks a stream that `modality` needs.
        """
        spec = self.read_spec(modality, start_seconds=start_seconds, end_seconds=end_seconds)
        if sound is not None:
            spec = SeparateAudioSpec(**vars(spec), sound=Path(sound))
        return self.clip_inputs(spec.read(path))

    def read_spec(
        self, modality: Modality, *, start_seconds: float | None = None, end_seconds: float | None = None
    ) -> ReadSpec:
        """Return what this model reads of a file, or of a span of it: of "both", what it perceives.

        Raises:
            ValueError: the modality is audio, and the model does not hear.
        """
        self.check_modality(modality)
        return ReadSpec(
            self.family.frame_sampler,
            start_seconds,
            end_seconds,
            video=modality != "audio",
            audio=modality != "visual" and self.family.hears,
            reader=self.reader,
        )

    def check_modality(self, modality: Modality) -> None:
        """Raise a ValueError if the modality is audio, and the model does not hear."""
        if modality == "audio" and not self.family.hears:
            raise ValueError(f"modality audio: a {self.config.family} model has no audio input; use --modality visual")

    def check_prompt(self, prompt: str | Prompt) -> None:
        """Raise a ValueError if a prompt is too long or contains forbidden characters or tokens."""
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        if (count := len(prompt.text)) > MAX_PROMPT_CHARS:
            raise ValueError(f"the prompt has {count:,} characters; the maximum is {MAX_PROMPT_CHARS:,}")
        texts = prompt.texts
        if (count := sum(map(len, texts))) > MAX_CONVERSATION_CHARS:
            raise ValueError(
                f"the conversation has {count:,} characters, more than {MAX_CONVERSATION_CHARS:,}; drop the oldest "
                "messages"
            )
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise ValueError("the prompt contains an unpaired surrogate; type it again")
        refuse_special_tokens(self.tokenizer, texts, what="prompt", placeholders=self.config.placeholder_ids)

    def clip_inputs(self, clip: Clip) -> ClipInputs:
        """Convert a clip, which was read with `read_spec`, to the towers' inputs."""
        if self.is_shipped_toy and not (Path(clip.path).parent.parent / SYNTHETIC_CONFIG).is_file():
            self.is_shipped_toy = False
            logger.warning(
                "%s: the built-in toy model only knows synthetic clips of coloured shapes and tones; for other videos, "
                "choose a model with --model",
                clip.path,
            )
        mel, notices = self._log_mel(clip)
        info = ClipInfo(clip.modality, clip.is_complete, (*clip.warnings, *notices))
        if not clip.has_video:
            return ClipInputs(torch.zeros(0, dtype=torch.uint8), mel, info=info)
        # Rounded, since positions of a grid step of 0.4999999 s would be half a second too low.
        seconds = round(clip.video_seconds, 6)
        inputs = self.family.clip_inputs(torch.from_numpy(clip.frames).permute(0, 3, 1, 2), mel, seconds=seconds)
        times = (clip.frame_times - clip.frame_times[0]).round(6).tolist()
        return replace(inputs, info=info, times=tuple(times))

    def _log_mel(self, clip: Clip) -> tuple[Tensor, list[str]]:
        """Compute log-mel chunks (C, M, T) of the audio, cut to the family's maximum duration; also say what is cut."""
        notices: list[str] = []
        if not self.family.hears:
            return torch.zeros(0), notices
        if clip.waveform is None:
            return torch.zeros(0, *self.family.mel_shape(0.0)[1:]), notices
        waveform = clip.waveform
        if (limit := self.family.max_audio_seconds(clip.video_seconds)) is not None:
            waveform = waveform[: max(round(limit * SAMPLE_RATE_HZ), 1)]
            if (lost := (len(clip.waveform) - len(waveform)) / SAMPLE_RATE_HZ) >= 1:
                notices.append(f"ignoring the last {lost:.1f} s of audio; this model takes {limit:.1f} s")
                logger.warning("%s: %s", clip.path, notices[0])
        return self.family.log_mel(waveform), notices

    def make_layout(self, clip: ClipInputs) -> Layout:
        """Return order and positions of a clip's tokens."""
        timestamps = self.family.timestamps(clip)
        return self.family.layout(
            clip,
            timestamp_ids=[self.tokenizer.encode(text, add_special_tokens=False) for text in timestamps],
            published_positions=self.published_positions,
        )

    def count_tokens(self, clip: ClipInputs | ClipFeatures, prompt: Prompt) -> int:
        """Return the number of tokens of a clip and a prompt together."""
        layout = clip.layout if isinstance(clip, ClipFeatures) else self.make_layout(clip)
        return len(self._prompt_ids(prompt, [-1] * len(layout)))

    def _prompt_ids(self, prompt: Prompt, placeholders: Sequence[int]) -> list[int]:
        return prompt_ids(
            self.tokenizer,
            prompt.text,
            placeholders=placeholders,
            family=self.family,
            system=self.config.system_prompt if prompt.system is None else prompt.system,
            history=prompt.history,
            clip_turn=prompt.clip_turn,
        )

    def token_offsets(self, answer: str) -> list[tuple[int, int]]:
        """Return the characters, start and end, of each token of an answer, without the end of the message."""
        encoded = self.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        return [(start, end) for start, end in encoded["offset_mapping"]]

    def answer_ids(self, answer: str, *, finished: bool = True) -> list[int]:
        """Tokenize an answer and, if it is finished, the end of its message; raises what `prompt.answer_ids` raises."""
        return answer_ids(self.tokenizer, answer, end=self.family.turn_end if finished else None)

    def collate(self, rows: Sequence[PromptRow], clips: Sequence[ClipInputs | ClipFeatures]) -> ModelInputs:
        """Collate rows about clips into a batch, padded on the right.

        Args:
            rows: prompts, with answers for training.
            clips: clips as inputs of the towers, or as features that the towers have computed.
        """
        layouts = [clip.layout if isinstance(clip, ClipFeatures) else self.make_layout(clip) for clip in clips]
        visual_id, audio_id = self.config.placeholder_ids
        placeholders = [torch.where(layout.is_visual, visual_id, audio_id).tolist() for layout in layouts]
        input_ids, labels = [], []
        for row in rows:
            prompt = Prompt(row.prompt, row.history, row.system, row.clip_turn)
            ids = self._prompt_ids(prompt, placeholders[row.clip])
            answer = [] if row.answer is None else self.answer_ids(row.answer, finished=row.finished)
            input_ids.append(ids + answer)
            labels.append([-100] * len(ids) + answer)
        longest = max(map(len, input_ids))
        if longest > self.config.max_positions:
            logger.warning(
                "%d tokens exceed the %d that the language model was trained for, so the caption may be poor; use a "
                "part of the video (start, end)",
                longest,
                self.config.max_positions,
            )
        ids_tensor = _pad(input_ids, self.pad_id)
        mask = _pad([[1] * len(ids) for ids in input_ids], 0)
        is_clip = torch.isin(ids_tensor, torch.tensor(self.config.placeholder_ids))
        return ModelInputs(
            input_ids=ids_tensor,
            attention_mask=mask,
            position_ids=text_positions(is_clip, mask, [layouts[row.clip] for row in rows]),
            labels=_pad(labels, -100),
            clip_index=tuple(row.clip for row in rows),
            layouts=tuple(layouts),
            clip_inputs=tuple(clip for clip in clips if isinstance(clip, ClipInputs)),
            clip_features=tuple(clip.read_tokens() for clip in clips if isinstance(clip, ClipFeatures)),
        )


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def select_modality(clip: ClipInputs, modality: Modality) -> ClipInputs:
    """Remove the audio or the video of a clip.

    Raises:
        ValueError: nothing would remain.
    """
    if modality == "visual":
        clip = replace(clip, mel=clip.mel[:0], info=replace(clip.info, modality=modality))
    elif modality == "audio":
        clip = ClipInputs(clip.pixels[:0], clip.mel, info=replace(clip.info, modality=modality))
    if not clip.num_frames and not len(clip.mel):
        raise ValueError(f"modality '{modality}' is not available: the clip has no such stream")
    return clip
