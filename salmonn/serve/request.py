"""The context of one HTTP request: the resources that it holds and releases however it ends, and its metrics."""

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from salmonn.caption.engine import Engine, GenerationHandle, Overloaded
from salmonn.caption.generator import CaptionRequest
from salmonn.caption.streaming import TextDelta
from salmonn.model.adapters import Adapter
from salmonn.serve.body import Body, BodyScanner
from salmonn.serve.fetch import TooLargeError
from salmonn.serve.metrics import Metrics
from salmonn.serve.schema import Usage

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_SMALL_BYTES = 64 << 10  # bodies up to this size are not counted: stalled large uploads block only large ones
_BLOCK_BYTES = 1 << 20  # of a body, to decode at a time


class UploadSpace:
    """The space that the large bodies of all requests take together, almost all of it on disk.

    Args:
        max_bytes: maximum total size.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count more bytes; raises Overloaded if that exceeds the maximum."""
        if self.used_bytes + num_bytes > self.max_bytes:
            raise Overloaded("the space for uploads is full; try again later")
        self.used_bytes += num_bytes


class RequestContext:
    """One request; call `close` once, however it ends.

    Args:
        engine: engine that answers it.
        metrics: metrics in which its end is counted.
        owner: who sends it; only their uploaded files can be used.
        uploads: folder in which it may have its own folder.
        upload_space: space that is shared by all request bodies.
        seconds: time limit.

    Attributes:
        outcome: how the request ended, for the log and the metrics.
        num_bytes: size of its file, if that came over the network.
        source: where the file came from.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        owner: str,
        uploads: Path,
        upload_space: UploadSpace,
        seconds: float,
    ) -> None:
        self.owner = owner
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.started_at = time.monotonic()
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.outcome = "failed"
        self.num_bytes = 0
        self.source = "none"
        self._uploads = uploads
        self._folder: Path | None = None
        self._engine = engine
        self._metrics = metrics
        self._upload_space = upload_space
        self._body_bytes = 0
        self._handle: GenerationHandle | None = None
        metrics.active.inc()

    async def read_body(self, request: Request, *, max_bytes: int, max_file_bytes: int) -> Body:
        """Return the request's body, which is rejected as soon as it is too large.

        Args:
            request: the request.
            max_bytes: maximum size of the body.
            max_file_bytes: maximum size of a file in it.

        Raises:
            TooLargeError: the body, or a file in it, is too large.
            Overloaded: the bodies of other requests take up all space.
            ClientDisconnect: the client has closed the connection.
            OSError: a file cannot be written.
        """
        scanner = BodyScanner(self.make_folder, max_bytes=max_file_bytes)
        size, block = 0, bytearray()
        declared = request.headers.get("content-length", "")
        if declared.isdecimal():
            _check_size(int(declared), max_bytes)
        async for chunk in request.stream():
            size += len(chunk)
            _check_size(size, max_bytes)
            if size > _SMALL_BYTES:
                self._upload_space.add(size - self._body_bytes)
                self._body_bytes = size
            block += chunk
            if len(block) >= _BLOCK_BYTES:
                await _run_to_end(scanner.feed, bytes(block))
                block.clear()
        if len(block) > _SMALL_BYTES:
            await _run_to_end(scanner.feed, bytes(block))
        else:
            scanner.feed(bytes(block))
        return scanner.finish()

    def make_folder(self) -> Path:
        """Return the folder for files that come over the network; raises an OSError if the disk is full."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(dir=self._uploads))
        return self._folder

    def submit(
        self, request: CaptionRequest, *, adapter: Adapter | None = None
    ) -> AsyncIterator[tuple[int, TextDelta]]:
        """Submit a request to the engine and yield its events (number of the sample, text delta).

        Raises what `Engine.submit` raises; the iterator also raises TimeoutError.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, TextDelta | Exception]] = asyncio.Queue()

        def on_event(sample: int, event: TextDelta | Exception) -> None:
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(events.put_nowait, (sample, event))

        self._handle = self._engine.submit(request, on_event=on_event, adapter=adapter)
        return self._receive(events, request.num_samples)

    async def _receive(
        self, events: "asyncio.Queue[tuple[int, TextDelta | Exception]]", num_unfinished: int
    ) -> AsyncIterator[tuple[int, TextDelta]]:
        is_first = True
        while num_unfinished:
            async with asyncio.timeout_at(self.deadline):
                sample, event = await events.get()
            if isinstance(event, Exception):
                raise event
            if is_first:
                is_first = False
                self._metrics.time_to_first_token.observe(time.monotonic() - self.started_at)
                self._remove_files()
            num_unfinished -= event.completion is not None
            yield sample, event

    @property
    def usage(self) -> Usage:
        """Tokens that the request has used so far."""
        handle = self._handle
        return Usage(handle.num_prompt_tokens, handle.num_completion_tokens) if handle else Usage(0, 0)

    def close(self) -> None:
        """Release all resources, and record how the request ended."""
        seconds, usage = time.monotonic() - self.started_at, self.usage
        if self._handle is not None:
            self._handle.cancel()
            if self._handle.reading_seconds:
                self._metrics.reading.observe(self._handle.reading_seconds)
        self._remove_files()
        metrics = self._metrics
        metrics.active.dec()
        metrics.requests.labels(self.outcome).inc()
        metrics.seconds.observe(seconds)
        metrics.tokens.labels("prompt").inc(usage.num_prompt_tokens)
        metrics.tokens.labels("completion").inc(usage.num_completion_tokens)
        metrics.received_bytes.labels(self.source).inc(self.num_bytes)
        logger.info(
            "%s %s in %.2f s: %d bytes (%s), %d tokens in, %d tokens out",
            self.id,
            self.outcome,
            seconds,
            self.num_bytes,
            self.source,
            usage.num_prompt_tokens,
            usage.num_completion_tokens,
        )

    def _remove_files(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._upload_space.used_bytes -= self._body_bytes
        self._body_bytes = 0


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TooLargeError(f"the request is larger than the maximum of {max_bytes / (1 << 20):.0f} MiB")


async def _run_to_end(work: Callable[[bytes], None], data: bytes) -> None:
    """Run work in a thread; a cancellation waits for its end, after which no more files are created."""
    task = asyncio.create_task(asyncio.to_thread(work, data))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run work after the body was read, and cancel it if the client closes the connection.

    Raises:
        ClientDisconnect: the client closed the connection.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return await race(work, against=disconnect(), error=ClientDisconnect())


async def race(work: Coroutine[Any, Any, Result], *, against: Coroutine[Any, Any, object], error: Exception) -> Result:
    """Run work, but cancel it and raise the error if another coroutine ends first."""
    task, other = asyncio.create_task(work), asyncio.create_task(against)
    try:
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise error
        return task.result()
    finally:
        task.cancel()
        other.cancel()
        await asyncio.gather(task, other, return_exceptions=True)
