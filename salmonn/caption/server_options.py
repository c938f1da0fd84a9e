"""Options of captioning through an OpenAI-compatible server, read by command lines before anything slow is imported."""

from dataclasses import dataclass, field
from typing import Any, Literal

from salmonn.config import MAY_CHANGE
from salmonn.media.frame_sampling import UniformSampler
from salmonn.score.budget import Budget
from salmonn.score.config import LLMConfig

# What a clip is sent as: the video file with its sound, the file and its sound as a WAV, or frames and the WAV.
ServerInput = Literal["video", "video+audio", "frames"]
TOKEN_CAP_FLAG = "--max-tokens-total"
KEY_FLAG = "--server-api-key-env"
# Parameters that follow from options, and would be overwritten.
_OWN_PARAMETERS = {
    "model", "messages", "n", "seed", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "stream",
    "logprobs", "top_logprobs", "repetition_penalty", "response_format",
}  # fmt: skip


@dataclass(frozen=True)
class ServerOptions:
    """How to caption through an OpenAI-compatible server.

    Args:
        server: address of an OpenAI-compatible server that captions instead of a local model, such as
            http://localhost:8000/v1.
        server_model: name of the model on the server.
        server_api_key_env: name of the environment variable with the server's API key. By default, OPENAI_API_KEY is
            sent to OpenAI, or to the address in OPENAI_BASE_URL, and no key to any other server.
        server_input: what the server is sent: frames (JPEG images with their times, and the audio as WAV), video (the
            file with its sound), video+audio (the file, and its audio as WAV); auto tries video, video+audio and
            frames, and takes the first that the server accepts and with which the model hears.
        server_frame_format: format of frames.
        server_max_pixels: maximum area of a frame in pixels.
        server_parameters: further parameters of each request, as a JSON object, such as vLLM's
            {"mm_processor_kwargs": {"use_audio_in_video": true}}.
        concurrency: maximum number of concurrent requests to the server; it is approached step by step.
        timeout_seconds: time limit per request to the server.
        retry_seconds: how long a request is retried while the server is busy, failing or unreachable.
        max_requests: spend cap: maximum number of requests in a run, retries included, to all servers: also those of
            text models and judges.
        max_tokens_total: spend cap: maximum number of tokens in a run, in prompts and replies of all servers.
        allow_deaf: caption even if the model does not hear.
    """

    server: str | None = None
    server_model: str | None = None
    server_api_key_env: str | None = field(default=None, metadata=MAY_CHANGE)
    server_input: Literal["auto", "video", "video+audio", "frames"] = "auto"
    server_frame_format: Literal["jpeg", "png"] = "jpeg"
    server_max_pixels: int = 200_704
    server_parameters: dict[str, Any] | None = None
    concurrency: int = field(default=16, metadata=MAY_CHANGE)
    timeout_seconds: float = field(default=600.0, metadata=MAY_CHANGE)
    retry_seconds: float = field(default=600.0, metadata=MAY_CHANGE)
    max_requests: int | None = field(default=None, metadata=MAY_CHANGE)
    max_tokens_total: int | None = field(default=None, metadata=MAY_CHANGE)
    allow_deaf: bool = False

    def __post_init__(self) -> None:
        if self.server is None:
            return
        self.llm_config()
        if self.server_max_pixels < UniformSampler.min_pixels:
            raise ValueError(
                f"server_max_pixels must be at least {UniformSampler.min_pixels}, got {self.server_max_pixels}"
            )
        if wrong := sorted(_OWN_PARAMETERS & set(self.server_parameters or {})):
            raise ValueError(f"server_parameters has {', '.join(wrong)}, which other options set; leave it out there")

    def llm_config(self) -> LLMConfig:
        """Return the settings of the client; raises a ValueError if one is invalid."""
        return LLMConfig(
            model=self.server_model or "",
            base_url=self.server,
            api_key_env=self.server_api_key_env,
            concurrency=self.concurrency,
            structured="always",
            timeout_seconds=self.timeout_seconds,
            retry_seconds=self.retry_seconds,
            max_requests=self.max_requests,
            max_tokens=self.max_tokens_total,
        )

    def budget(self) -> Budget:
        """Return a budget with the spend caps."""
        return Budget(self.max_requests, self.max_tokens_total, token_cap_flag=TOKEN_CAP_FLAG)
