"""Caption with models that have no family here, through their own processor and `generate` of transformers.

Frames and audio come from our reader; everything behind it is the model's. It is slower than a family: one clip at a
time, without shared prefixes. Such a model cannot be trained.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.video_utils import VideoMetadata

from salmonn.caption.captioner import Captioner, RequestedSequence, RequestOptions
from salmonn.caption.generate import SampledToken, compute_logprobs, to_sampled_tokens
from salmonn.caption.generator import Sampling
from salmonn.caption.hearing import probe_hearing
from salmonn.caption.limits import BatchLimits, check_batch_size
from salmonn.caption.processor import Processor
from salmonn.caption.prompt import Prompt
from salmonn.caption.read_spec import ReadSpec
from salmonn.caption.scheduler import OUT_OF_MEMORY, Scheduler, memory_error
from salmonn.caption.streaming import Completion, to_completion
from salmonn.media.audio import SAMPLE_RATE_HZ
from salmonn.media.clip import Clip
from salmonn.media.frame_sampling import BudgetSampler
from salmonn.model.config import SalmonnConfig
from salmonn.model.layout import ClipInfo, ClipInputs
from salmonn.model.loading import Placement, read_model_type
from salmonn.records import Modality

logger = logging.getLogger(__name__)
MAX_NEW_TOKENS = 1024
# Frames are scaled by the model's processor; these only bound what is read. Of a video that is taken as images, each is
# hundreds of tokens.
_SAMPLER = BudgetSampler(min_pixels=1, max_pixels=64 * 786_432, max_frames=64, factor=2)
_IMAGES = BudgetSampler(frames_per_second=1.0, min_pixels=1, max_pixels=16 * 786_432, max_frames=16, factor=2)


class ModelCodeError(ValueError):
    """The code of a model failed on a clip."""


@dataclass(frozen=True)
class GenericClip:
    """A clip as it was read, and what is known about its source."""

    clip: Clip
    info: ClipInfo


class GenericProcessor(Processor):
    """What `Captioner` needs of a processor, around one of transformers.

    Args:
        processor: processor of the model, with a video processor, or an image processor that takes a video as images.
        reader: decoder of video frames, see `read_clip`.

    Attributes:
        hears: whether the model takes audio.

    Raises:
        ValueError: it takes no frames, or audio at another rate than 16 kHz.
    """

    def __init__(self, processor: Any, *, name: str, stop_ids: Sequence[int], reader: str = "pyav") -> None:
        self.of_transformers = processor
        self.tokenizer = processor.tokenizer
        self.config = SalmonnConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=1)
        self.stop_ids = list(stop_ids)
        self.reader = reader
        self.is_shipped_toy = False
        self.name = name
        self.takes_video = getattr(processor, "video_processor", None) is not None
        if not self.takes_video and getattr(processor, "image_processor", None) is None:
            raise ValueError(f"{name} takes neither videos nor images; use a model that sees")
        audio = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.hears = audio is not None
        if audio is not None and audio.sampling_rate != SAMPLE_RATE_HZ:
            raise ValueError(f"{name} takes audio at {audio.sampling_rate} Hz; only {SAMPLE_RATE_HZ} Hz is supported")

    def read_spec(
        self, modality: Modality, *, start_seconds: float | None = None, end_seconds: float | None = None
    ) -> ReadSpec:
        """See `Processor`: of "both", what the model perceives."""
        self.check_modality(modality)
        return ReadSpec(
            _SAMPLER if self.takes_video else _IMAGES,
            start_seconds,
            end_seconds,
            video=modality != "audio",
            audio=modality != "visual" and self.hears,
            reader=self.reader,
        )

    def check_modality(self, modality: Modality) -> None:
        """See `Processor`."""
        if modality == "audio" and not self.hears:
            raise ValueError(f"modality audio: {self.name} has no audio input; use --modality visual")

    def clip_inputs(self, clip: Clip) -> ClipInputs:
        """Keep a clip for the model's own processor, which converts it together with the prompt."""
        return cast(ClipInputs, GenericClip(clip, ClipInfo(clip.modality, clip.is_complete, clip.warnings)))

    def count_tokens(self, clip: Any, prompt: Prompt) -> int:
        """Return 0: the number is only known once the model's processor has converted the clip."""
        return 0

    def model_inputs(self, clip: Clip, prompt: Prompt) -> Any:
        """Convert a clip and a conversation about it to the model's inputs, a batch of one."""
        content: list[dict[str, str]] = []
        media: dict[str, Any] = {}
        if clip.has_video and self.takes_video:
            content.append({"type": "video"})
            # Frames at any times are those of a video with a frame each millisecond.
            numbers = ((clip.frame_times - clip.frame_times[0]) * 1000).round().astype(int).tolist()
            total = max(round(clip.video_seconds * 1000), numbers[-1] + 1)
            metadata = VideoMetadata(
                total_num_frames=total, fps=1000.0, frames_indices=numbers, duration=clip.video_seconds
            )
            frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
            media |= dict(videos=[frames], video_metadata=[metadata], do_sample_frames=False)
        elif clip.has_video:
            content += [{"type": "image"}] * len(clip.frames)
            media["images"] = [list(clip.frames)]
        if clip.waveform is not None:
            content.append({"type": "audio"})
            media["audio"] = [clip.waveform]
        text = self.of_transformers.apply_chat_template(
            _to_messages(prompt, content), add_generation_prompt=True, tokenize=False
        )
        return self.of_transformers(text=[text], return_tensors="pt", **media)


def _to_messages(prompt: Prompt, content: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a conversation in the format of transformers, with the clip's content in the turn that shows it."""

    def text(value: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": value}]

    messages: list[dict[str, Any]] = []
    if prompt.system:
        messages.append({"role": "system", "content": text(prompt.system)})
    for number, (question, answer) in enumerate([*prompt.history, (prompt.text, None)]):
        shown = content if number == prompt.clip_turn else []
        messages.append({"role": "user", "content": [*shown, *text(question)]})
        if answer is not None:
            messages.append({"role": "assistant", "content": text(answer)})
    return messages


class GenericCaptioner(Captioner):
    """A captioner whose inputs and tokens are made by transformers' own code.

    Args:
        model: model in evaluation mode, on its device.
        processor: its processor.
        name: folder or hub id, written into each `Caption`.
    """

    processor: GenericProcessor

    def __init__(self, model: Any, processor: GenericProcessor, *, name: str = "") -> None:
        super().__init__(model, processor, name=name)

    def stream(self, path: Path | str, **options: Unpack[RequestOptions]) -> Iterator[str]:
        """Yield the text of `caption` at once."""
        yield self.caption(path, **options).text

    def encode(self, clips: Any, **_: Any) -> Any:
        """Return the clips: the model encodes them with each question."""
        return list(clips)

    def prepare(self, clip: Clip) -> ClipInputs:
        """See `Captioner`; a clip is not copied to a GPU before it is converted."""
        return self.processor.clip_inputs(clip)

    def limits(self, batch_size: int | None = None) -> BatchLimits:
        """See `Captioner`; one sequence at a time."""
        check_batch_size(batch_size)
        return BatchLimits(1)

    def scheduler(self, limits: BatchLimits | None = None) -> "Scheduler[RequestedSequence]":
        """See `Captioner`."""
        return _OneByOne(self, limits=limits or self.limits())

    def complete(self, sequence: RequestedSequence) -> Completion:
        """Generate one sample.

        Raises:
            ModelCodeError: the model's code fails on the clip.
        """
        sampling, clip = sequence.sampling, cast(GenericClip, sequence.clip)
        model = cast(Any, self.network)
        options = _to_options(sampling, self.processor.tokenizer)
        # Transformers samples with the global generators.
        with torch.random.fork_rng(), torch.no_grad(), self._model_code():
            inputs = self.processor.model_inputs(clip.clip, sequence.prompt).to(model.device, model.dtype)
            torch.manual_seed(hash(sequence.seed) % (1 << 63))
            output = model.generate(**inputs, **options)
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
        sampled = _sampled_tokens(tokens, output.logits, sampling)
        return to_completion(self.processor, sampled, clip.info, sampling=sampling)

    @contextmanager
    def _model_code(self) -> Iterator[None]:
        """Turn errors of the model's code into a ModelCodeError, except those after which the GPU fails for all."""
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelCodeError(f"the code of {self.name} in transformers fails on this clip ({reason})") from error


class _OneByOne(Scheduler[RequestedSequence]):
    """Completes one sequence after the other; an error of the model's code ends only the sequence."""

    def __init__(self, captioner: GenericCaptioner, *, limits: BatchLimits) -> None:
        super().__init__(captioner.streaming_generator, limits=limits)
        self._captioner = captioner

    @property
    def has_room(self) -> bool:
        """See `Scheduler`."""
        return not self.waiting

    def advance(self) -> list[tuple[RequestedSequence, Completion | Exception]]:
        """See `Scheduler`; completes the first sequence."""
        sequence, completions = self.waiting.pop(0), list[Completion]()
        try:
            reason = memory_error(lambda: completions.append(self._captioner.complete(sequence)), num_rows=1)
        except ModelCodeError as error:
            return [(sequence, error)]
        if reason:
            return [(sequence, torch.OutOfMemoryError(f"{OUT_OF_MEMORY} ({reason})"))]
        return [(sequence, completions[0])]


def _to_options(sampling: Sampling, tokenizer: Any) -> dict[str, Any]:
    """Convert sampling parameters to arguments of `generate` in transformers.

    Raises:
        ValueError: there is a JSON schema.
    """
    if sampling.json_schema is not None:
        raise ValueError("a JSON schema needs a model with a family (see salmonn models); ask for JSON in the prompt")
    options: dict[str, Any] = dict(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        return_dict_in_generate=True,
        output_logits=sampling.logprobs is not None,
    )
    if sampling.temperature > 0:
        options |= dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    if sampling.repetition_penalty is not None:
        options["repetition_penalty"] = sampling.repetition_penalty
    if sampling.stop:
        options |= dict(stop_strings=list(sampling.stop), tokenizer=tokenizer)
    return options


def _sampled_tokens(tokens: Tensor, logits: Sequence[Tensor] | None, sampling: Sampling) -> list[SampledToken]:
    """Return generated tokens (L,), with log-probabilities from L logits (1, V) if the sampling asks for them."""
    if sampling.logprobs is None or logits is None:
        return [SampledToken(token) for token in tokens.tolist()]
    return to_sampled_tokens(tokens, *compute_logprobs(tokens, torch.cat(list(logits)), num_top=sampling.logprobs))


def is_generic(path: Path | str) -> bool:
    """Return whether a model belongs to no family here, but to a kind that transformers loads with images or video.

    Raises:
        ValueError: there is no model in the path.
    """
    model_type, is_known = read_model_type(path)
    names = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", None)
    names = names or modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return not is_known and model_type in names


def load_generic(
    path: Path | str, *, placement: Placement | None = None, reader: str = "pyav", needs_sound: bool = True
) -> GenericCaptioner:
    """Load a model of transformers, and probe whether sound reaches it.

    Args:
        path: folder or hub id.
        placement: device and dtype.
        reader: decoder of video frames, see `read_clip`.
        needs_sound: probe whether the model hears, if its processor takes audio; a deaf one is given frames alone.

    Raises:
        ValueError: the model or its processor cannot be loaded.
    """
    try:
        processor = transformers.AutoProcessor.from_pretrained(str(path))
        auto = getattr(transformers, "AutoModelForMultimodalLM", transformers.AutoModelForImageTextToText)
        model = auto.from_pretrained(str(path), **(placement or Placement()).to_transformers())
    except (ImportError, OSError, ValueError) as error:
        if "torchvision" in str(error).lower():
            raise ValueError(
                f"the processor of {path} needs torchvision, which is not installed; install the version that belongs "
                f"to torch {torch.__version__}, for the same CUDA (pytorch.org)"
            ) from error
        raise ValueError(f"transformers cannot load {path}: {error}") from error
    captioner = make_generic(model.eval(), processor, name=str(path), reader=reader)
    logger.warning("%s has no family here; it runs through transformers' own code, one clip at a time", path)
    if needs_sound and captioner.processor.hears:
        check_hearing(captioner)
    return captioner


def make_generic(model: Any, processor: Any, *, name: str, reader: str = "pyav") -> GenericCaptioner:
    """Return the captioner of a model of transformers and its processor; raises as `GenericProcessor`."""
    end = model.generation_config.eos_token_id
    stop_ids = end if isinstance(end, list) else [] if end is None else [end]
    return GenericCaptioner(model, GenericProcessor(processor, name=name, stop_ids=stop_ids, reader=reader), name=name)


def check_hearing(captioner: GenericCaptioner) -> None:
    """Probe whether sound reaches a model; a deaf one is reported, and given frames alone from now on."""
    heard = probe_hearing(captioner).heard
    if heard is None:
        logger.warning(
            "%s: could not measure whether it hears: it answers identical requests differently", captioner.name
        )
    elif not heard:
        captioner.processor.hears = False
        logger.warning(
            "%s does not hear: two clips that differ in sound alone get the same answer; its captions are about what "
            "can be seen (--modality visual hides this message)",
            captioner.name,
        )
