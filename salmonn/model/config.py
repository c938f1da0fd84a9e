"""Config of a network: sizes, sampling of clips and defaults for captions, saved as config.json."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from salmonn.records import Modality

CONFIG_FORMAT = 1  # of config.json; changes with the meaning of its keys
# Default prompts of models that were trained by this project.
PLAIN_PROMPTS: dict[Modality, str] = {
    "both": "Describe the video and its sounds in detail.",
    "visual": "Describe what can be seen in detail.",
    "audio": "Describe what can be heard in detail.",
}
STEPS_PER_SECOND = 50  # of Whisper's encoder


class SalmonnConfig(PreTrainedConfig):
    """Everything needed to build a network.

    Args:
        format: version of this format.
        family: name of a family in `salmonn.model.families`.
        lm: arguments of the language model's config, with the vision_config where the vision tower comes with it.
        vision: arguments of the vision tower's config, unless it comes with the language model.
        whisper: arguments of WhisperConfig; None for a model without hearing.
        qformer: arguments of Blip2QFormerConfig; None for a model without hearing.
        num_queries: Q-Former queries per window.
        window_seconds: duration of a Q-Former window.
        stride_seconds: distance between the starts of windows; None for the duration of a window.
        tail_tolerance_seconds: audio that exceeds whole Whisper chunks by at most this gets no further chunk.
        pool: salmonn2: side length of the squares of patches that are pooled to one token.
        placeholder_ids: token ids that stand for visual and audio tokens in the text.
        frames: arguments of the family's frame sampler.
        timestamp_tokens: salmonn2: whether timestamps follow the frames of clips without audio.
        system_prompt: default system message; "" for none.
        prompts: default prompt for each modality; None for `PLAIN_PROMPTS`.
        max_new_tokens: default length limit of an answer.
        batch_size: default number of clips in a batch of captions.
        repetition_penalty: default of generation.
        initializer_range: standard deviation of fresh weights outside the towers and the language model.
    """

    model_type = "salmonn"

    format: int = CONFIG_FORMAT
    family: str = "salmonn2-plus"
    # Dictionaries. None is allowed since transformers creates an empty config of every class.
    lm: Any = None
    vision: Any = None
    whisper: Any = None
    qformer: Any = None
    num_queries: int = 1
    window_seconds: float = 0.5
    stride_seconds: float | None = None
    tail_tolerance_seconds: float = 0.004
    pool: int = 2
    placeholder_ids: tuple[int, int] = (-200, -200)
    frames: Any = None
    timestamp_tokens: bool = True
    system_prompt: str = "You are a helpful assistant."
    prompts: Any = None
    max_new_tokens: int = 160
    batch_size: int = 8
    repetition_penalty: float = 1.0
    initializer_range: float = 0.02

    def default_prompt(self, modality: Modality = "both") -> str:
        """Return the prompt that requests a caption."""
        prompt: str = (self.prompts or PLAIN_PROMPTS)[modality]
        return prompt

    @property
    def max_positions(self) -> int:
        """Number of tokens that the language model was trained for."""
        return int((self.lm.get("text_config") or self.lm).get("max_position_embeddings", 32768))

    @property
    def chunk_seconds(self) -> int:
        """Duration of the audio chunks that Whisper's encoder takes."""
        return int(self.whisper["max_source_positions"]) // STEPS_PER_SECOND

    @property
    def window_steps(self) -> int:
        """Encoder steps in a Q-Former window."""
        return round(1500 * self.window_seconds / 30)  # as published; another order of operations rounds differently

    @property
    def stride_steps(self) -> int:
        """Encoder steps between the starts of windows."""
        return round(1500 * (self.stride_seconds or self.window_seconds) / 30)

    @property
    def tokens_per_chunk(self) -> int:
        """Audio tokens of a chunk: `num_queries` for each window that fits into it."""
        steps = int(self.whisper["max_source_positions"])
        return ((steps - self.window_steps) // self.stride_steps + 1) * self.num_queries


# For transformers' tokenizer loading, which reads the model's config.json.
AutoConfig.register(SalmonnConfig.model_type, SalmonnConfig)
