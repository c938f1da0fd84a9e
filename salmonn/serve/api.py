"""The service: chat completions on clips as OpenAI's interface has them, health and metrics.

POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics
"""

import asyncio
import hmac
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from salmonn import __version__
from salmonn.caption.engine import SHUTTING_DOWN, CaptionRequest, Engine, Overloaded
from salmonn.caption.streaming import Completion, TextDelta
from salmonn.serve.errors import EXPECTED_ERRORS, ApiError, to_api_error
from salmonn.serve.metrics import Metrics
from salmonn.serve.request import BodyMemory, RequestContext, race, until_disconnect
from salmonn.serve.schema import (
    DONE,
    ChatLimits,
    ChatRequest,
    RequestError,
    ResponseBuilder,
    parse_chat_request,
    to_event,
)
from salmonn.serve.sources import MediaSources, resolve_media

_ANY_MODEL = ("", "salmonn")
_SPARE_BYTES = 1 << 20  # of a request, beside its file
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies hand on each piece as it comes
_BODIES_HELD = 2  # as many of the largest may be in memory at a time
_LAST_SECONDS = 1.0  # beyond a request's time, for the event that says that it is over


@dataclass(frozen=True)
class ServerConfig:
    """How a server behaves.

    Args:
        name: of the model, as it is listed.
        sources: where files may come from.
        limits: what a request may ask for.
        request_seconds: that a request may take.
        keys: any of which a request must show; none for no check.
        hosts: names by which the server may be addressed, beside localhost and addresses in numbers. A page elsewhere
            that has its own name point here cannot ask in a visitor's stead.
    """

    name: str
    sources: MediaSources
    limits: ChatLimits
    request_seconds: float = 600.0
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


class Service:
    """A server's state.

    Args:
        engine: that answers.
        settings: how it behaves.
        uploads: private folder for what strangers send.

    Attributes:
        is_closing: set once the server is to end; no new request is taken from then on.
        num_visits: requests under way.
    """

    def __init__(self, engine: Engine, settings: ServerConfig, uploads: Path) -> None:
        self.engine = engine
        self.settings = settings
        self.uploads = uploads
        self.metrics = Metrics(engine)
        self.max_bytes = settings.sources.fetch_policy.max_bytes * 4 // 3 + _SPARE_BYTES
        self.held = BodyMemory(self.max_bytes * _BODIES_HELD)
        self.is_closing = False
        self.num_requests = 0
        self._begun = int(time.time())
        self._cut = asyncio.Event()

    async def cut_off(self) -> None:
        """End what is under way; those who asked are told."""
        self._cut.set()
        await asyncio.to_thread(self.engine.close, grace_seconds=0)

    async def complete(self, request: Request) -> Response:
        """Answer a chat completion."""
        if self.is_closing:
            return self._refuse(Overloaded(SHUTTING_DOWN)).respond()
        visit = RequestContext(
            self.engine,
            self.metrics,
            uploads=self.uploads,
            held=self.held,
            seconds=self.settings.request_seconds,
        )
        self.num_requests += 1
        is_handed_on = False
        try:
            response = await race(self._cut.wait(), self._answer(request, visit), Overloaded(SHUTTING_DOWN))
            is_handed_on = isinstance(response, _Events)
        except EXPECTED_ERRORS as error:
            refusal = self._refuse(error)
            visit.outcome = refusal.outcome
            response = refusal.respond()
        finally:
            if not is_handed_on:
                self._end(visit)
        response.headers["X-Request-Id"] = visit.id
        return response

    def _end(self, visit: RequestContext) -> None:
        visit.close()
        self.num_requests -= 1

    def _refuse(self, error: Exception) -> ApiError:
        return to_api_error(error, seconds=self.settings.request_seconds)

    async def _answer(self, request: Request, visit: RequestContext) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RequestError("send the request as Content-Type: application/json", status=415)
        async with asyncio.timeout_at(visit.deadline):
            body = await visit.body(request, max_bytes=self.max_bytes)
        ask, pieces = await until_disconnect(request, self._begin(body, visit))
        speaker = ResponseBuilder(visit.id, self.settings.name, int(time.time()), ask.include_usage)
        if not ask.stream:
            answers = await until_disconnect(request, _gather(pieces, ask.num_choices))
            visit.outcome = "answered"
            return JSONResponse(speaker.whole(answers, usage=visit.usage))
        # Waited for, so that what goes wrong before the first word has a status of its own.
        first = await until_disconnect(request, _next(pieces))
        return _Events(self._speak(visit, ask, speaker, first, pieces), visit=visit, close=lambda: self._end(visit))

    async def _begin(
        self, body: bytearray, visit: RequestContext
    ) -> tuple[ChatRequest, AsyncIterator[tuple[int, TextDelta]]]:
        """Understand a request, have its file and ask the engine."""
        settings = self.settings
        async with asyncio.timeout_at(visit.deadline):
            ask, url = await asyncio.to_thread(parse_chat_request, body, limits=settings.limits)
            if ask.model not in (*_ANY_MODEL, settings.name):
                raise RequestError(
                    f"the model {ask.model[:100]!r} is not here: this server has {settings.name}",
                    param="model",
                    status=404,
                    code="model_not_found",
                )
            body.clear()  # which may be as large as a video, as is what was parsed
            obtained = await resolve_media(url, visit.make_folder(), sources=settings.sources)
        visit.num_bytes, visit.whence = obtained.num_bytes, obtained.whence
        visit.forget_body()
        query = CaptionRequest(
            path=obtained.path,
            prompt=ask.prompt,
            history=ask.history,
            system=ask.system,
            sampling=ask.sampling,
            span=ask.span,
            modality=ask.modality,
            seed=secrets.randbits(32) if ask.seed is None else ask.seed,
        )
        named = url if obtained.whence == "root" else f"the {ask.kind}"
        return ask, _naming(visit.begin(query, num_samples=ask.num_choices), obtained.path, named)

    async def _speak(
        self,
        visit: RequestContext,
        ask: ChatRequest,
        speaker: ResponseBuilder,
        first: tuple[int, TextDelta],
        pieces: AsyncIterator[tuple[int, TextDelta]],
    ) -> AsyncIterator[str]:
        """The events of a stream."""
        for number in range(ask.num_choices):
            yield speaker.begin(number)
        visit.outcome = "dropped"  # unless it comes to its end
        try:
            for event in _tell(speaker, *first):
                yield event
            async for number, piece in pieces:
                for event in _tell(speaker, number, piece):
                    yield event
        except EXPECTED_ERRORS as error:
            refusal = self._refuse(error)
            visit.outcome = refusal.outcome
            yield to_event(refusal.to_json())
            return
        if ask.include_usage:
            yield speaker.usage(visit.usage)
        visit.outcome = "answered"
        yield DONE

    def health(self) -> JSONResponse:
        """Whether requests are answered."""
        state = "closing" if self.is_closing else "failing" if self.engine.failure else "ok"
        told = {"status": state, "model": self.settings.name, "version": __version__}
        return JSONResponse(told, status_code=200 if state == "ok" else 503)

    def models(self) -> dict[str, Any]:
        """The one model that there is."""
        model = {"id": self.settings.name, "object": "model", "created": self._begun, "owned_by": "salmonn"}
        return {"object": "list", "data": [model]}

    async def admit(self, request: Request) -> None:
        """Raise an HTTPException for who may not ask."""
        settings = self.settings
        host = _host(request)
        if not (host in ("localhost", *settings.hosts) or _is_address(host)):
            raise HTTPException(403, f"this server is not {host[:100]}: start it with --server-names if it is")
        if not settings.keys or request.url.path == "/health":
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        # All are compared, and each to its end, so that the time tells nothing of them.
        matches = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in settings.keys]
        if kind.lower() != "bearer" or not any(matches):
            raise HTTPException(401, "the API key is missing or wrong: send Authorization: Bearer KEY")


class _Events(StreamingResponse):
    """Server-sent events; `close` is called in the end, though not one was sent."""

    def __init__(self, events: AsyncIterator[str], *, visit: RequestContext, close: Callable[[], object]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._visit = visit
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Whoever does not read what is sent would hold the visit for ever.
            async with asyncio.timeout_at(self._visit.deadline + _LAST_SECONDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # the web server closes the connection
            self._visit.outcome = "timed_out"
        finally:
            self._close()


def _host(request: Request) -> str:
    """The name or address by which the request has this server."""
    try:
        return (urlsplit(f"//{request.headers.get('host', '')}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _tell(speaker: ResponseBuilder, number: int, piece: TextDelta) -> list[str]:
    events = [speaker.piece(number, piece.text)] if piece.text else []
    return events if piece.answer is None else [*events, speaker.end(number, piece.answer)]


async def _next(pieces: AsyncIterator[tuple[int, TextDelta]]) -> tuple[int, TextDelta]:
    return await anext(pieces)


async def _gather(pieces: AsyncIterator[tuple[int, TextDelta]], count: int) -> list[Completion]:
    answers = {number: piece.answer async for number, piece in pieces if piece.answer is not None}
    return [answers[number] for number in range(count)]


async def _naming(
    pieces: AsyncIterator[tuple[int, TextDelta]], path: Path, named: str
) -> AsyncIterator[tuple[int, TextDelta]]:
    """The pieces; an error names the file as whoever asked knows it, and not by its place on this machine."""
    try:
        async for number, piece in pieces:
            yield number, piece
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), named)) from error


def make_app(service: Service) -> FastAPI:
    """The application that a web server runs."""
    app = FastAPI(
        title="salmonn",
        version=__version__,
        # Their pages load scripts from elsewhere, and bodies are read by hand, which they do not see.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(service.admit)],
    )

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), "refused").respond()

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return ApiError(
            500, f"a mistake in the server ({type(error).__name__}); its log tells more", "failed"
        ).respond()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await service.complete(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return service.models()

    @app.get("/health")
    async def health() -> Response:
        return service.health()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
