"""Captions by vLLM: one more generator, for video-SALMONN 2 and 2+.

1. Files are read, processed and encoded as for the local model: `VLLMCaptioner` is a `Captioner` without decoder.
2. The tokens of a clip go to vLLM as soon as they are computed (`vllm_prompt.py`), with many requests in flight. vLLM
   batches them in processes of its own, where the plugin of this package runs the language model (`vllm_model.py`).
3. Its answers become completions, which are handled as those of the local model.

vLLM is imported when it is started: it needs an environment of its own.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import fields
from hashlib import blake2b
from importlib.metadata import entry_points
from itertools import count, groupby
from pathlib import Path
from typing import Any, Unpack, cast

import torch

from salmonn.caption.captioner import Captioner, RequestedSequence, RequestOptions
from salmonn.caption.generate import SampledToken
from salmonn.caption.generator import SHIPPED_MODEL, CaptionRequest
from salmonn.caption.limits import GPU_BATCH_SIZE, BatchLimits
from salmonn.caption.processor import Processor
from salmonn.caption.scheduler import OUT_OF_MEMORY, Scheduler, memory_error
from salmonn.caption.streaming import Completion, to_completion
from salmonn.caption.vllm_export import LM, TOWERS, split_model
from salmonn.caption.vllm_prompt import ARCHITECTURE, to_vllm_prompt
from salmonn.model.layout import ClipFeatures, ClipInputs
from salmonn.model.loading import Placement
from salmonn.model.network import Network

MEMORY_SHARE = 0.8  # of each GPU, by default; the towers need the rest
Ended = list[tuple[RequestedSequence, Completion | Exception]]


class VLLMStoppedError(ValueError):
    """vLLM does not start, or has stopped."""


class VLLMEngine:
    """A running vLLM.

    Args:
        model: folder of the language model.
        dtype: type of the weights.
        max_num_seqs: maximum number of sequences decoded together.
        arguments: further arguments of vLLM's engine.

    Raises:
        VLLMStoppedError: vLLM does not start.
        ValueError: vLLM has no such argument, or would not find the plugin.
    """

    def __init__(self, model: Path, *, dtype: str, max_num_seqs: int, arguments: Mapping[str, Any]) -> None:
        set_environment()
        from vllm import AsyncEngineArgs  # noqa: PLC0415
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        if unknown := sorted(arguments.keys() - {field.name for field in fields(AsyncEngineArgs)}):
            raise ValueError(f"vllm_args has {', '.join(unknown)}, which vLLM's engine does not know")
        if not any(plugin.value.startswith("salmonn.") for plugin in entry_points(group="vllm.general_plugins")):
            raise ValueError("vLLM would not find the model: install this package into the environment of vLLM")
        own = dict(
            model=str(model), dtype=dtype, max_num_seqs=max_num_seqs, enable_mm_embeds=True, generation_config="vllm",
            hf_overrides={"architectures": [ARCHITECTURE]}, disable_log_stats=True,
        )  # fmt: skip
        try:
            args = AsyncEngineArgs(**{"gpu_memory_utilization": MEMORY_SHARE, **arguments, **own})
            self._engine = AsyncLLM.from_engine_args(args)
        except (ValueError, RuntimeError, TypeError) as error:
            raise VLLMStoppedError(f"vLLM does not start: {' '.join(str(error).split())}") from error
        self._numbers = count()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="vllm").start()
        atexit.register(self.close)

    def submit(self, prompt: Mapping[str, Any], params: Any) -> "Future[Any]":
        """Start a request; the result is vLLM's output."""
        return asyncio.run_coroutine_threadsafe(self._answer(prompt, params), self._loop)

    async def _answer(self, prompt: Mapping[str, Any], params: Any) -> Any:
        outputs = [output async for output in self._engine.generate(prompt, params, str(next(self._numbers)))]
        return outputs[-1]

    def close(self) -> None:
        """End vLLM's processes."""
        self._engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)


def set_environment() -> None:
    """Let vLLM log warnings alone, to stderr, and send no usage statistics, unless the user has set this."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # captions may go to stdout
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class VLLMCaptioner(Captioner):
    """A captioner whose language model runs in vLLM; see `load_vllm`.

    Args:
        network: network whose language model has no layers, on its device.
        processor: processor of the same model.
        name: folder or hub id, written into each `Caption`.
        engine: vLLM with the language model.
        max_num_seqs: maximum number of sequences in flight.
    """

    def __init__(
        self, network: Network, processor: Processor, *, name: str = "", engine: VLLMEngine, max_num_seqs: int
    ) -> None:
        super().__init__(network, processor, name=name)
        self.engine = engine
        self._max_num_seqs = max_num_seqs

    def stream(self, path: Path | str, **options: Unpack[RequestOptions]) -> Iterator[str]:
        """Yield the text of `caption` at once."""
        yield self.caption(path, **options).text

    def sequences(
        self, request: CaptionRequest, clip: ClipInputs | ClipFeatures, *, index: int
    ) -> list[RequestedSequence]:
        """See `Captioner`; raises a ValueError for a JSON schema."""
        if request.sampling is not None and request.sampling.json_schema is not None:
            raise ValueError("captions by vLLM cannot follow a JSON schema; use the local engine")
        return super().sequences(request, clip, index=index)

    def limits(self, batch_size: int | None = None) -> BatchLimits:
        """See `Captioner`; what does not fit into the KV cache waits in vLLM."""
        return BatchLimits(self._max_num_seqs if batch_size is None else batch_size)

    def scheduler(self, limits: BatchLimits | None = None) -> "Scheduler[RequestedSequence]":
        """See `Captioner`."""
        return _VLLMScheduler(self, limits=limits or self.limits())


class _NoBatch:
    """Takes the place of the local engine's batch, since vLLM has the batch."""

    def restart(self) -> None:
        """Do nothing."""


class _VLLMScheduler(Scheduler[RequestedSequence]):
    """Hands sequences to vLLM as they come, and waits for answers only where no others can be handed over.

    `running` has all sequences in flight; the samples of a request end together.
    """

    def __init__(self, captioner: VLLMCaptioner, *, limits: BatchLimits) -> None:
        super().__init__(cast(Any, _NoBatch), limits=limits)
        self._captioner = captioner
        self._requests: dict[Future[Any], list[RequestedSequence]] = {}

    @property
    def has_room(self) -> bool:
        """See `Scheduler`."""
        return not self.waiting and len(self.running) < self.limits.num_rows

    def advance(self) -> Ended:
        """See `Scheduler`."""
        waiting, self.waiting = self.waiting, []
        ended: Ended = []
        for _, group in groupby(waiting, key=lambda one: id(one.prompt)):
            ended += self._submit(list(group))
        must_wait = not ended and (not waiting or not self.has_room)
        answered, _ = wait(self._requests, timeout=None if must_wait else 0, return_when=FIRST_COMPLETED)
        for future in [one for one in self._requests if one in answered]:
            samples = self._requests.pop(future)
            for one in samples:
                del self.running[id(one)]
            ended += self._complete(samples, future)
        return ended

    def clear(self) -> list[RequestedSequence]:
        """See `Scheduler`; cancels the requests."""
        for future in self._requests:
            future.cancel()
        self._requests.clear()
        return super().clear()

    def _submit(self, samples: list[RequestedSequence]) -> Ended:
        """Encode the clip of a request and hand it to vLLM; returns the samples only if memory runs out."""
        first, captioner = samples[0], self._captioner
        clips = [] if isinstance(first.clip, ClipInputs) else [first.clip]
        if isinstance(first.clip, ClipInputs):
            inputs = first.clip
            if reason := memory_error(lambda: clips.extend(captioner.encode([inputs])), num_rows=len(samples)):
                return [(one, torch.OutOfMemoryError(f"{OUT_OF_MEMORY} ({reason})")) for one in samples]
        penalty = first.sampling.repetition_penalty or captioner.network.config.repetition_penalty
        prompt = to_vllm_prompt(captioner, first.prompt, clips[0], is_penalized=penalty != 1)
        params = to_sampling_params(samples, repetition_penalty=penalty, stop_ids=captioner.processor.stop_ids)
        self._requests[captioner.engine.submit(prompt, params)] = samples
        self.running |= {id(one): one for one in samples}
        return []

    def _complete(self, samples: Sequence[RequestedSequence], future: "Future[Any]") -> Ended:
        """Return the samples of an answer; raises a VLLMStoppedError if vLLM has stopped."""
        from vllm.exceptions import VLLMClientError  # noqa: PLC0415

        try:
            texts = future.result().outputs
        except (VLLMClientError, ValueError) as error:  # such as a prompt that is too long
            return [(one, ValueError(f"vLLM refuses this clip: {error}")) for one in samples]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise VLLMStoppedError(f"vLLM has stopped ({reason}); run the same command to resume") from error
        # Greedy samples have one text for all.
        return [(one, self._to_completion(one, texts[place % len(texts)])) for place, one in enumerate(samples)]

    def _to_completion(self, sequence: RequestedSequence, text: Any) -> Completion:
        num_top = sequence.sampling.logprobs
        found = [None] * len(text.token_ids) if num_top is None else text.logprobs
        tokens = []
        for token, logprobs in zip(text.token_ids, found, strict=True):
            ranked = sorted((logprobs or {}).items(), key=lambda one: one[1].rank)
            top = tuple((other, one.logprob) for other, one in ranked if one.rank <= (num_top or 0))
            tokens.append(SampledToken(token, logprobs[token].logprob if logprobs else None, top))
        return to_completion(self._captioner.processor, tokens, sequence.clip.info, sampling=sequence.sampling)


def to_sampling_params(
    samples: Sequence[RequestedSequence], *, repetition_penalty: float, stop_ids: Sequence[int]
) -> Any:
    """Return vLLM's parameters for the samples of a request; sample k depends on its seed and k alone."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    sampling, seed = samples[0].sampling, samples[0].seed
    base, first = seed if isinstance(seed, tuple) else (seed, 0)
    hashed = int.from_bytes(blake2b(str(base).encode(), digest_size=7).digest())  # vLLM adds the number of the sample
    return SamplingParams(
        n=len(samples) if sampling.temperature else 1,
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.temperature else 1.0,
        seed=hashed + first,
        max_tokens=sampling.max_new_tokens,
        repetition_penalty=repetition_penalty,
        logprobs=sampling.logprobs,
        stop=list(sampling.stop),
        stop_token_ids=list(stop_ids),
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def load_vllm(
    model: Path | str,
    *,
    placement: Placement | None = None,
    adapter: Path | str | None = None,
    published_positions: bool = False,
    reader: str = "pyav",
    batch_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> VLLMCaptioner:
    """Load the towers of a model here, and start vLLM with its language model, which is written for it once.

    Args:
        model: folder or hub id of a video-SALMONN 2 or 2+.
        placement: device of the towers, and type of all weights.
        adapter, published_positions, reader: see `Captioner.load`.
        batch_size: maximum number of sequences decoded together (default: the model's own, on a GPU at least 64).
        arguments: further arguments of vLLM's engine, such as tensor_parallel_size.

    Raises:
        VLLMStoppedError: vLLM does not start.
        ValueError: the model is of another family, or incomplete; or vLLM has no such argument.
    """
    placement = placement or Placement()
    dtype = str(placement.to_transformers()["dtype"]).removeprefix("torch.")
    folder = split_model(model, dtype=dtype, adapter=adapter)
    towers = Captioner.load(
        folder / TOWERS, placement=placement, published_positions=published_positions, reader=reader
    )
    towers.processor.is_shipped_toy = Path(model).resolve() == SHIPPED_MODEL.resolve()
    default = towers.processor.config.batch_size
    max_num_seqs = batch_size or (max(default, GPU_BATCH_SIZE) if towers.network.device.type == "cuda" else default)
    engine = VLLMEngine(folder / LM, dtype=dtype, max_num_seqs=max_num_seqs, arguments=arguments or {})
    return VLLMCaptioner(towers.network, towers.processor, name=str(model), engine=engine, max_num_seqs=max_num_seqs)
