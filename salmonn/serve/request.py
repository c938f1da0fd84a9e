"""One request under way: what it holds and must give back however it ends, and what is noted of it."""

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from salmonn.caption.engine import CaptionRequest, Engine, GenerationHandle, Overloaded
from salmonn.caption.streaming import TextDelta
from salmonn.serve.fetch import TooLargeError
from salmonn.serve.metrics import Metrics
from salmonn.serve.schema import Usage

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_SMALL_BYTES = 64 << 10  # of a body, which is not counted among those held: large ones that stall refuse large ones


class BodyMemory:
    """Bytes of large request bodies in memory, of all requests together.

    Args:
        most: that may be held.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = 0

    def add(self, count: int) -> None:
        """Hold more; raises Busy where that is too much."""
        if self.now + count > self.most:
            raise Overloaded("other uploads take all the memory there is for them: try again in a while")
        self.now += count


class RequestContext:
    """One request: to be closed once, however it ends.

    Args:
        engine: that answers.
        metrics: in which its end is noted.
        uploads: folder in which it has one of its own.
        held: bytes in memory.
        seconds: that it may take.

    Attributes:
        outcome: how it ended, for the log and the metrics.
        num_bytes: of its file, if that came over the network.
        whence: the file came.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, uploads: Path, held: BodyMemory, seconds: float) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.begun = time.monotonic()
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.outcome = "failed"
        self.num_bytes = 0
        self.whence = "none"
        self._uploads = uploads
        self._folder: Path | None = None
        self._engine = engine
        self._metrics = metrics
        self._held = held
        self._num_held = 0
        self._answering: GenerationHandle | None = None
        metrics.present.inc()

    async def body(self, request: Request, *, max_bytes: int) -> bytearray:
        """The request's body, refused as soon as it is too large.

        Raises:
            TooLargeError: it is.
            Busy: the others' bodies take all the memory there is.
            ClientDisconnect: nobody is there any more.
        """
        declared = request.headers.get("content-length", "")
        body = bytearray()
        if declared.isdecimal():
            _require_small(int(declared), max_bytes)
        async for chunk in request.stream():
            size = len(body) + len(chunk)
            _require_small(size, max_bytes)
            if size > _SMALL_BYTES:
                self._held.add(size - self._num_held)
                self._num_held = size
            body += chunk
        return body

    def forget_body(self) -> None:
        """Note that the body is in memory no more."""
        self._held.now -= self._num_held
        self._num_held = 0

    def make_folder(self) -> Path:
        """A folder of its own, for what comes over the network; raises an OSError where there is no room."""
        self._folder = Path(tempfile.mkdtemp(dir=self._uploads))
        return self._folder

    def begin(self, query: CaptionRequest, *, num_samples: int) -> AsyncIterator[tuple[int, TextDelta]]:
        """Ask the engine; the answers come as `Engine.begin` tells them. Raises what it raises, and TimeoutError."""
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[tuple[int, TextDelta | Exception]] = asyncio.Queue()

        def tell(sample: int, piece: TextDelta | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever listened
                loop.call_soon_threadsafe(told.put_nowait, (sample, piece))

        self._answering = self._engine.begin(query, tell=tell, num_samples=num_samples)
        return self._listen(told, num_samples)

    async def _listen(
        self, told: "asyncio.Queue[tuple[int, TextDelta | Exception]]", num_open: int
    ) -> AsyncIterator[tuple[int, TextDelta]]:
        is_first = True
        while num_open:
            async with asyncio.timeout_at(self.deadline):
                sample, piece = await told.get()
            if isinstance(piece, Exception):
                raise piece
            if is_first:
                is_first = False
                self._metrics.first_word.observe(time.monotonic() - self.begun)
                self._remove_files()
            num_open -= piece.answer is not None
            yield sample, piece

    @property
    def usage(self) -> Usage:
        """Tokens that it cost so far."""
        answering = self._answering
        return Usage(answering.num_prompt_tokens, answering.num_answer_tokens) if answering else Usage(0, 0)

    def close(self) -> None:
        """Give back what it holds, and note how it ended."""
        seconds, usage = time.monotonic() - self.begun, self.usage
        if self._answering is not None:
            self._answering.drop()
            if self._answering.reading_seconds:
                self._metrics.reading.observe(self._answering.reading_seconds)
        self._remove_files()
        self.forget_body()
        metrics = self._metrics
        metrics.present.dec()
        metrics.requests.labels(self.outcome).inc()
        metrics.seconds.observe(seconds)
        metrics.tokens.labels("prompts").inc(usage.num_prompt_tokens)
        metrics.tokens.labels("answers").inc(usage.num_answer_tokens)
        metrics.received_bytes.labels(self.whence).inc(self.num_bytes)
        logger.info(
            "%s %s in %.2f s: %d bytes (%s), %d tokens in, %d tokens out",
            self.id,
            self.outcome,
            seconds,
            self.num_bytes,
            self.whence,
            usage.num_prompt_tokens,
            usage.num_answer_tokens,
        )

    def _remove_files(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _require_small(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TooLargeError(f"the request is larger than the {max_bytes / (1 << 20):.0f} MiB that are taken here")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work as long as whoever asked is there, once the body is read.

    Raises:
        ClientDisconnect: they are not.
    """
    return await race(_until_gone(request), work, ClientDisconnect())


async def race(end: Coroutine[Any, Any, object], work: Coroutine[Any, Any, Result], error: Exception) -> Result:
    """Do some work, but give it up and raise the error where `end` is done before."""
    job, other = asyncio.create_task(work), asyncio.create_task(end)
    try:
        await asyncio.wait({job, other}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise error
        return job.result()
    finally:
        job.cancel()
        other.cancel()
        await asyncio.gather(job, other, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
