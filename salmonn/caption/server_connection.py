"""Connect to a server that captions: find the model, choose what it is sent, and test that it hears.

    captioner = connect_captioner(ServerOptions("http://localhost:8000/v1", "Qwen/Qwen3-Omni-30B-A3B-Instruct"))

Whatever is wrong with address, key, model or modalities is reported in one sentence before the first clip.
"""

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from salmonn.caption.generator import CaptionRequest, Sampling
from salmonn.caption.hearing import Hearing, probe_hearing, write_probe_clips
from salmonn.caption.in_flight import AnswerError
from salmonn.caption.server import DEFAULT_TOKENS, ServerCaptioner
from salmonn.caption.server_messages import Part, audio_part, image_part
from salmonn.caption.server_options import ServerInput, ServerOptions
from salmonn.records import Modality
from salmonn.score.budget import Budget
from salmonn.score.chat_client import LLMRejectedError, LLMStoppedError, SpendCapError
from salmonn.score.llm_protocol import ChatRequest

logger = logging.getLogger(__name__)

_OWN = "salmonn"  # owner of the models of `salmonn serve`, and a name that it takes for any of them
_MAX_INTERNAL_ERROR_SECONDS = 4.0
_PROBE_TOKENS = 32
_MAX_LISTED = 10  # models in an error message
_REMEDIES = {
    ("images",): "choose a model that takes images, or caption the audio alone with --modality audio",
    ("audio",): "choose a model that takes audio, or caption the frames alone with --modality visual",
    ("images", "audio"): "choose a model that takes both",
}


def connect_captioner(
    options: ServerOptions,
    *,
    modality: Modality = "both",
    cuts_files: bool = False,
    max_new_tokens: int | None = None,
    reader: str = "pyav",
    budget: Budget | None = None,
) -> ServerCaptioner:
    """Connect to a server, and test with short clips that it takes what the requests will need.

    Args:
        options: server and limits.
        modality: modality of the requests to come.
        cuts_files: whether they need a part of a file, or a number of frames.
        max_new_tokens: token limit of their captions; None for the captioner's own.
        reader: decoder of video frames, see `read_clip`.
        budget: see `ServerCaptioner`.

    Raises:
        ValueError: the server is unreachable or of another kind, refuses the key, lacks the model, or does not take the
            clips; or the model does not hear.
    """
    captioner = ServerCaptioner(options, reader=reader, budget=budget)
    models = captioner.client.list_models()
    # A model that is served by `salmonn serve` may also be called salmonn.
    captioner.is_own = any(one.owner == _OWN and options.server_model in (one.name, _OWN) for one in models or [])
    client = captioner.client
    # A server that cannot process a kind of clip may say so with status 500.
    client.internal_error_seconds = min(_MAX_INTERNAL_ERROR_SECONDS, options.retry_seconds)
    try:
        _choose_input(captioner, modality, cuts_files=cuts_files, token_limit=max_new_tokens or DEFAULT_TOKENS)
    except (LLMStoppedError, LLMRejectedError) as error:
        names = [model.name for model in models or []]
        # Some servers load models that they do not list.
        if models is None or captioner.is_own or options.server_model in names or isinstance(error, SpendCapError):
            raise
        raise ValueError(
            f"{client.address} has no model {options.server_model!r}; it offers "
            f"{_list_names(names, options.server_model or '')}"
        ) from error
    client.internal_error_seconds = options.retry_seconds
    return captioner


def _choose_input(captioner: ServerCaptioner, modality: Modality, *, cuts_files: bool, token_limit: int) -> None:
    """Take the first input that the server accepts and with which the model hears.

    Raises:
        ValueError: there is none.
    """
    rejected: LLMRejectedError | None = None
    deaf: dict[ServerInput, str] = {}
    for candidate in _candidates(captioner, modality, cuts_files=cuts_files):
        captioner.input = candidate
        try:
            hearing = _probe(captioner, modality, token_limit=token_limit)
        except LLMRejectedError as error:
            rejected = error
            continue
        if hearing.heard is not False:
            return
        deaf[candidate] = hearing.answers[0]
    if not deaf:
        assert rejected is not None
        raise _describe_rejection(captioner, rejected, modality) from rejected
    captioner.input = next(iter(deaf))
    message = (
        f"{captioner.name} does not hear: two clips that differ in sound alone get the same answer "
        f"({deaf[captioner.input][:80]!r}), sent as {' and as '.join(deaf)}"
    )
    if not captioner.options.allow_deaf:
        raise ValueError(
            f"{message}; choose a model that takes audio, caption without sound (--modality visual), or go ahead with "
            "--allow-deaf"
        )
    logger.warning("%s", message)


def _probe(captioner: ServerCaptioner, modality: Modality, *, token_limit: int) -> Hearing:
    """Test whether the model hears, or, if the captions are to be about frames alone, whether it accepts a clip.

    Raises:
        LLMRejectedError: the server does not take the clip.
    """
    if modality == "visual":
        with TemporaryDirectory(prefix="salmonn-probe-") as folder, suppress(AnswerError):
            sampling = Sampling(temperature=0.0, max_new_tokens=_PROBE_TOKENS)
            captioner.generate([CaptionRequest(write_probe_clips(Path(folder))[0], None, sampling, modality=modality)])
        return Hearing(None, ())
    reason = "it answers identical requests differently"
    hearing = Hearing(None, ())
    for limit in (_PROBE_TOKENS, token_limit):  # a model that reasons before it answers needs more
        try:
            hearing = probe_hearing(captioner, modality=modality, max_new_tokens=limit)
            break
        except AnswerError as error:
            reason = str(error)
    if hearing.heard is None:
        logger.warning("%s cannot be tested if it hears: %s", captioner.name, reason)
    return hearing


def _candidates(captioner: ServerCaptioner, modality: Modality, *, cuts_files: bool) -> Sequence[ServerInput]:
    """Return what may be sent, the preferred first; raises a ValueError if the chosen input does not fit."""
    chosen = captioner.options.server_input
    needs_frames = (cuts_files or modality != "both") and not captioner.is_own
    if chosen == "auto":
        return ("video",) if captioner.is_own else ("frames",) if needs_frames else ("video", "video+audio", "frames")
    if captioner.is_own and chosen != "video":
        raise ValueError(
            f"{captioner.name} is `salmonn serve`, which takes one file per request, not {chosen}; use "
            "--server-input video"
        )
    if chosen != "frames" and needs_frames:
        raise ValueError(
            f"--server-input {chosen} sends whole files, and --start, --end, --segments, --frames and "
            "--modality need a part of them; use --server-input frames"
        )
    return (chosen,)


def _describe_rejection(captioner: ServerCaptioner, error: LLMRejectedError, modality: Modality) -> ValueError:
    """Return an error that names what the server does not take: images, audio, or the file."""
    image = image_part(np.full((64, 64, 3), 128, np.uint8), captioner.options.server_frame_format)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    parts = {"images": image} if modality != "audio" else {}
    parts |= {"audio": audio_part(tone.astype(np.float32))} if modality != "visual" else {}
    refused = tuple(name for name, part in parts.items() if _rejection(captioner, part))
    extra = captioner.options.server_parameters
    if extra and not refused and str(error) in {_rejection(captioner, part, extra) for part in parts.values()}:
        return ValueError(
            f"{captioner.name} rejects requests with --server-parameters {json.dumps(extra)}: {error}; start the "
            "server so that it takes them, or leave them out"
        )
    if captioner.input != "frames" and not refused:
        return ValueError(
            f"{captioner.name} does not take clips sent as {captioner.input}: {error}; use --server-input frames"
        )
    if not refused:
        return ValueError(f"{captioner.name} rejects frames and audio together: {error}")
    return ValueError(f"{captioner.name} does not take {' and '.join(refused)}: {error}; {_REMEDIES[refused]}")


def _rejection(captioner: ServerCaptioner, part: Part, parameters: Mapping[str, Any] | None = None) -> str:
    """Return why the server rejects a message with a single image or recording; "" if it does not."""
    content = [part, {"type": "text", "text": "Describe it."}]
    messages = [{"role": "user", "content": content}]
    try:
        captioner.client.send(ChatRequest(messages, temperature=0.0, token_limit=16, parameters=dict(parameters or {})))
    except LLMRejectedError as error:
        return str(error)
    return ""


def _list_names(names: Sequence[str], wanted: str) -> str:
    """Return the names of a server's models, those similar to a wanted one first."""
    similar = difflib.get_close_matches(wanted, names, n=_MAX_LISTED, cutoff=0.3)
    shown = list(dict.fromkeys([*similar, *names]))[:_MAX_LISTED]
    more = len(names) - len(shown)
    return (", ".join(shown) or "none") + (f" and {more} more" if more else "")
