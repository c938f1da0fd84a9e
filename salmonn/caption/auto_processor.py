"""The processor as transformers' `AutoProcessor` loads it: prompts and files -> the inputs of a `Network`.

Files are read by `Processor`, so their inputs are the same, to the bit. transformers' own `generate` does not know
clips that several rows share; answers come from `Captioner(network, processor.processor)`, or from `generate` of
`salmonn.caption.generate`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from huggingface_hub import snapshot_download
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from salmonn.caption.processor import Processor
from salmonn.caption.streaming import collate
from salmonn.media.clip import Clip
from salmonn.model.config import SalmonnConfig
from salmonn.model.layout import ClipInputs
from salmonn.model.loading import CONFIG_NAME, load_config
from salmonn.records import Modality

FileOrClip = str | Path | Clip
# Arguments of from_pretrained that say where on the hub, and how, a model is found.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
# Keys of config.json that say nothing about the processor.
_OTHER_KEYS = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path", "torch_dtype"}


class SalmonnInputs(BatchFeature):
    """Arguments of a network's `forward`: `inputs`, a `ModelInputs`."""

    def to(self, *args: Any, **kwargs: Any) -> "SalmonnInputs":
        """Copy the tensors to a device; a dtype is ignored, since the network casts its inputs itself."""
        device = kwargs.get("device", next((one for one in args if type(one).__name__ != "dtype"), None))
        if device is not None:
            self.data["inputs"] = self.data["inputs"].to(device)
        return self


class SalmonnProcessor(ProcessorMixin):
    """Processor of a model of this project, or of a published one that it loads.

    Args:
        tokenizer: tokenizer of the language model.
        config: config of the network.

    Attributes:
        processor: the `Processor` that does the work.

    Example:
        >>> processor = AutoProcessor.from_pretrained(folder)
        >>> logps = network(**processor("What is heard?", videos="holiday.mp4"))
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SalmonnConfig) -> None:
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)
        self.processor = Processor(tokenizer, config=config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load the tokenizer and the config of a folder or of a model on the hub, without its weights.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            **kwargs: where on the hub the model is: `revision`, `cache_dir`, `token` and so on. `trust_remote_code` is
                ignored, since no code of the model is run.

        Raises:
            ValueError: there is no such model, or an argument is unknown.
        """
        path = Path(pretrained_model_name_or_path)
        unknown = kwargs.keys() - {*_HUB_OPTIONS, "trust_remote_code", "_from_auto", "_commit_hash"}
        if unknown:
            raise ValueError(f"SalmonnProcessor has no option {', '.join(sorted(unknown))}")
        if not path.is_dir():
            options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
            path = Path(
                snapshot_download(str(pretrained_model_name_or_path), allow_patterns=list(_SMALL_FILES), **options)
            )
        config = load_config(path)
        return cls(Processor.load(path, config=config).tokenizer, config)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the tokenizer, and the config where the folder has none yet.

        Raises:
            ValueError: the folder has the config of another model, or `push_to_hub` is set.
        """
        if push_to_hub:
            raise ValueError("a processor is pushed with its model: use `salmonn push`")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CONFIG_NAME).exists():
            self.processor.config.save_pretrained(str(folder))
        elif _comparable(load_config(folder)) != _comparable(self.processor.config):
            raise ValueError(f"{folder}/{CONFIG_NAME} is of another model; choose an empty folder")
        self.processor.save(folder)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: FileOrClip | Sequence[FileOrClip] | None = None,
        audio: str | Path | Sequence[str | Path] | None = None,
        *,
        images: None = None,
        modality: Modality | None = None,
        return_tensors: str = "pt",
    ) -> SalmonnInputs:
        """Convert prompts about clips to the inputs of a network; the chat format is added here.

        Args:
            text: prompt for each clip; None for the model's default.
            videos: video file of each prompt, or a clip that was read with `processor.read_spec`.
            audio: audio file of each prompt; with `videos` it replaces their sound, and without them is all there is.
            images: not supported.
            modality: what is read of the videos (default: what they have).
            return_tensors: "pt", the only framework.

        Raises:
            ValueError: the numbers of prompts and files differ, or an input is of a kind that is not supported.
            ClipError: a file cannot be read.
        """
        if images is not None or return_tensors != "pt":
            raise ValueError("SalmonnProcessor takes videos and audio, and returns tensors of PyTorch")
        pictures, sounds = _as_list(videos), _as_list(audio)
        if not pictures and not sounds:
            raise ValueError("SalmonnProcessor needs videos or audio: paths of files")
        count = len(pictures or sounds)
        used: Modality = modality or ("both" if pictures else "audio")
        prompts = [self.processor.config.default_prompt(used)] * count if text is None else _as_list(text)
        if len(prompts) != count or (pictures and sounds and len(sounds) != count):
            raise ValueError(
                f"there are {len(prompts)} prompts, {len(pictures)} videos and {len(sounds)} audio files; each prompt "
                "is about one clip"
            )
        for prompt in prompts:
            self.processor.check_prompt(prompt)
        none: list[Any] = [None] * count
        files = zip(pictures or none, sounds or none, strict=True)
        clips = [self._read(picture, sound, modality=used) for picture, sound in files]
        return SalmonnInputs({"inputs": collate(self.processor, clips, prompts)})

    def _read(self, video: FileOrClip | None, sound: str | Path | None, *, modality: Modality) -> ClipInputs:
        if isinstance(video, Clip):
            if sound is not None:
                raise ValueError("a clip that has been read has its own sound; pass the video as a path")
            return self.processor.clip_inputs(video)
        path = video if video is not None else sound
        if not isinstance(path, str | Path):
            raise ValueError(
                f"a {type(path).__name__} has no times of its frames, by which they are sampled; pass the path of the "
                "file, or a Clip of salmonn.media.clip"
            )
        return self.processor.read(path, sound=sound if video is not None else None, modality=modality)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the template alone does not say how many tokens a clip has."""
        raise ValueError(
            "SalmonnProcessor writes the chat format itself: call it with the prompt as `text` and paths as `videos`"
        )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str | Path | Clip) or not isinstance(value, Sequence) else list(value)


def _comparable(config: SalmonnConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _OTHER_KEYS}


AutoProcessor.register(SalmonnConfig, SalmonnProcessor)
