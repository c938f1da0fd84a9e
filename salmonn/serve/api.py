"""The HTTP API: OpenAI's chat completions about clips, health and metrics, and a server with graceful shutdown.

POST /v1/chat/completions   GET /v1/models   GET /v1/models/NAME   GET /health, /ping   GET /metrics   GET /version
GET /openapi.json
"""

import asyncio
import hmac
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from salmonn import __version__
from salmonn.caption.engine import SHUTTING_DOWN, Engine, Overloaded
from salmonn.caption.streaming import TextDelta
from salmonn.serve.errors import EXPECTED_ERRORS, ApiError, RequestError, to_api_error
from salmonn.serve.metrics import Metrics
from salmonn.serve.request import BodyMemory, RequestContext, race, until_disconnect
from salmonn.serve.schema import (
    DONE,
    ChatCompletion,
    ChatLimits,
    ChatRequest,
    ResponseBuilder,
    parse_chat_request,
    to_event,
)
from salmonn.serve.sources import MediaSources, resolve_media

_ANY_MODEL = ("", "salmonn")
_EXTRA_BODY_BYTES = 1 << 20  # for the parts of a request beside its file
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies forward each event at once
_MAX_BODIES = 2  # number of bodies of the maximum size that fit into memory at a time
_FINAL_EVENT_SECONDS = 1.0  # beyond a request's time limit, to send the event that reports it
_MAX_CONNECTIONS = 1000
_IDLE_SECONDS = 20.0  # for a connection without a complete request
_IDLE_SECONDS_CROWDED = 1.0  # the same, once half of the connections are taken
_CLOSE_SECONDS = 5  # for data that is still to be sent when the grace period is over


@dataclass(frozen=True)
class ServerConfig:
    """Configuration of a server.

    Args:
        name: name of the model in `/v1/models`.
        sources: where files may come from.
        limits: limits of a chat request.
        request_seconds: time limit of a request.
        keys: accepted API keys; none disables the check.
        hosts: names by which clients may address the server, besides localhost and IP addresses. This protects against
            DNS rebinding: a web page whose own name resolves to this server cannot use it from a visitor's browser.
        origins: origins of web pages that may use the server from a visitor's browser (CORS); "*" allows all.
    """

    name: str
    sources: MediaSources
    limits: ChatLimits
    request_seconds: float = 600.0
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Service:
    """The state of a server.

    Args:
        engine: engine that answers requests.
        config: configuration.
        uploads: private folder for uploaded and fetched files.

    Attributes:
        is_closing: set when the server shuts down; from then on, new requests are rejected.
        num_requests: number of requests in progress.
    """

    def __init__(self, engine: Engine, config: ServerConfig, uploads: Path) -> None:
        self.engine = engine
        self.config = config
        self.uploads = uploads
        self.metrics = Metrics(engine)
        self.max_body_bytes = (
            config.sources.fetch_policy.max_bytes * 10 // 7 + _EXTRA_BODY_BYTES
        )  # base64, with line breaks
        self.body_memory = BodyMemory(self.max_body_bytes * _MAX_BODIES)
        self.is_closing = False
        self.num_requests = 0
        self._created = int(time.time())
        self._aborted = asyncio.Event()

    async def abort(self) -> None:
        """End the requests in progress with an error."""
        self._aborted.set()
        await asyncio.to_thread(self.engine.close, grace_seconds=0)

    async def check_access(self, request: Request) -> None:
        """Raise an HTTPException if the Host header or the API key is not accepted."""
        host = _host(request)
        if not (host in ("localhost", *self.config.hosts) or _is_ip_address(host)):
            raise HTTPException(403, f"host {host[:100]!r} is not allowed; add it with --server-names")
        if not self.config.keys or request.url.path in ("/health", "/ping"):
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        # All keys are compared, in constant time, so that the duration reveals nothing about them.
        matches = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in self.config.keys]
        if kind.lower() != "bearer" or not any(matches):
            raise HTTPException(401, "the API key is missing or wrong; send Authorization: Bearer KEY")

    async def complete(self, request: Request) -> Response:
        """Answer a chat completion request."""
        if self.is_closing:
            return self._to_error(Overloaded(SHUTTING_DOWN)).to_response()
        context = RequestContext(
            self.engine,
            self.metrics,
            uploads=self.uploads,
            body_memory=self.body_memory,
            seconds=self.config.request_seconds,
        )
        self.num_requests += 1
        is_streaming = False
        try:
            response = await race(
                self._answer(request, context), against=self._aborted.wait(), error=Overloaded(SHUTTING_DOWN)
            )
            is_streaming = isinstance(response, _EventStream)
        except EXPECTED_ERRORS as error:
            api_error = self._to_error(error)
            context.outcome = api_error.outcome
            response = api_error.to_response()
        finally:
            if not is_streaming:  # an event stream closes its context itself
                self._close(context)
        response.headers["X-Request-Id"] = context.id
        return response

    def _close(self, context: RequestContext) -> None:
        context.close()
        self.num_requests -= 1

    def _to_error(self, error: Exception) -> ApiError:
        return to_api_error(error, seconds=self.config.request_seconds)

    async def _answer(self, request: Request, context: RequestContext) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RequestError("the Content-Type must be application/json", status=415)
        async with asyncio.timeout_at(context.deadline):
            body = await context.read_body(request, max_bytes=self.max_body_bytes)
        chat, events = await until_disconnect(request, self._submit(body, context))
        builder = ResponseBuilder(context.id, self.config.name, int(time.time()), chat.include_usage)
        if not chat.stream:

            async def gather() -> dict[str, Any]:
                completions = {sample: event.completion async for sample, event in events if event.completion}
                in_order = [completions[sample] for sample in range(chat.request.num_samples)]
                return builder.response(in_order, usage=context.usage)

            content = await until_disconnect(request, gather())
            context.outcome = "answered"
            return JSONResponse(content)

        async def first_event() -> tuple[int, TextDelta]:
            return await anext(events)

        # Awaited before the response starts, so that an error before the first text gets a status of its own.
        first = await until_disconnect(request, first_event())
        stream = self._stream(context, chat, builder, first, events)
        return _EventStream(stream, context=context, close=lambda: self._close(context))

    async def _submit(
        self, body: bytearray, context: RequestContext
    ) -> tuple[ChatRequest, AsyncIterator[tuple[int, TextDelta]]]:
        """Parse a request, get its file, and submit it to the engine."""
        async with asyncio.timeout_at(context.deadline):
            chat, url = await asyncio.to_thread(parse_chat_request, body, limits=self.config.limits)
            if chat.model not in (*_ANY_MODEL, self.config.name):
                raise self._model_not_found(chat.model)
            body.clear()  # it may be as large as a video, as may the URL, which is freed on return
            media = await resolve_media(url, context.make_folder(), sources=self.config.sources)
        context.num_bytes, context.source = media.num_bytes, media.source
        context.release_body()
        events = context.submit(replace(chat.request, path=media.path))
        # Errors name the file as the client knows it, and not by its path on this machine.
        name = url if media.source == "local" else f"the {chat.kind}"
        return chat, _replace_in_errors(events, str(media.path), name)

    async def _stream(
        self,
        context: RequestContext,
        chat: ChatRequest,
        builder: ResponseBuilder,
        first: tuple[int, TextDelta],
        events: AsyncIterator[tuple[int, TextDelta]],
    ) -> AsyncIterator[str]:
        """Yield the server-sent events of a stream."""
        for sample in range(chat.request.num_samples):
            yield builder.start(sample)
        context.outcome = "cancelled"  # unless the end is reached
        try:
            for event in builder.deltas(*first):
                yield event
            async for sample, delta in events:
                for event in builder.deltas(sample, delta):
                    yield event
        except EXPECTED_ERRORS as error:
            api_error = self._to_error(error)
            context.outcome = api_error.outcome
            yield to_event(api_error.to_json())
            return
        if chat.include_usage:
            yield builder.usage(context.usage)
        context.outcome = "answered"
        yield DONE

    def health(self) -> JSONResponse:
        """Return whether requests are being answered, with status 503 if not."""
        status = "closing" if self.is_closing else "failing" if self.engine.failure else "ok"
        content = {"status": status, "model": self.config.name, "version": __version__}
        return JSONResponse(content, status_code=200 if status == "ok" else 503)

    def models(self) -> dict[str, Any]:
        """Return the list of models, which has one entry."""
        return {"object": "list", "data": [self._model_json()]}

    def model(self, name: str) -> Response:
        """Return the model of a name."""
        if name != self.config.name:
            return self._to_error(self._model_not_found(name)).to_response()
        return JSONResponse(self._model_json())

    def _model_json(self) -> dict[str, Any]:
        return {"id": self.config.name, "object": "model", "created": self._created, "owned_by": "salmonn"}

    def _model_not_found(self, name: str) -> RequestError:
        return RequestError(
            f"model {name[:100]!r} not found; available: {self.config.name}",
            param="model",
            status=404,
            code="model_not_found",
        )


class _EventStream(StreamingResponse):
    """Server-sent events; `close` is called at the end, even if none was sent."""

    def __init__(self, events: AsyncIterator[str], *, context: RequestContext, close: Callable[[], object]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._context = context
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # A client that does not read the stream would otherwise hold its request forever.
            async with asyncio.timeout_at(self._context.deadline + _FINAL_EVENT_SECONDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # the web server closes the connection
            self._context.outcome = "timed_out"
        finally:
            self._close()


async def _replace_in_errors(
    events: AsyncIterator[tuple[int, TextDelta]], old: str, new: str
) -> AsyncIterator[tuple[int, TextDelta]]:
    """Yield events; in the message of a ValueError, replace one text by another."""
    try:
        async for event in events:
            yield event
    except ValueError as error:
        raise ValueError(str(error).replace(old, new)) from error


def _host(request: Request) -> str:
    """Return the name or IP address of the Host header, without the port."""
    try:
        return (urlsplit(f"//{request.headers.get('host', '')}").hostname or "").lower()
    except ValueError:
        return ""


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def handle_http_error(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), "rejected").to_response()

    @app.exception_handler(Exception)
    async def handle_bug(_: Request, error: Exception) -> Response:
        message = f"internal server error ({type(error).__name__}); see the server's log"
        return ApiError(500, message, "failed").to_response()


def make_app(service: Service) -> FastAPI:
    """Return the ASGI application of a service."""
    app = FastAPI(
        title="salmonn",
        version=__version__,
        # Their pages load scripts from other hosts. FastAPI's own route of the schema would not check access.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(service.check_access)],
    )
    if service.config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )

    _add_error_handlers(app)
    body = {"required": True, "content": {"application/json": {"schema": ChatCompletion.model_json_schema()}}}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": body})
    async def complete(request: Request) -> Response:
        return await service.complete(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return service.models()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return service.model(name)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    @app.get("/ping", include_in_schema=False)
    async def health() -> Response:
        return service.health()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/openapi.json", include_in_schema=False)
    async def schema() -> dict[str, Any]:
        return app.openapi()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class Server(uvicorn.Server):
    """A web server with graceful shutdown: at SIGTERM or SIGINT it rejects new requests and finishes the active ones.

    A second signal ends the grace period.

    Args:
        service: service.
        grace_seconds: maximum time to finish active requests.
        certificate: PEM files of a certificate and its private key, to serve HTTPS.

    Attributes:
        clock: source of the time in seconds.
    """

    def __init__(
        self, service: Service, *, grace_seconds: float, certificate: tuple[Path, Path | None] | None = None
    ) -> None:
        certfile, keyfile = certificate or (None, None)
        config = uvicorn.Config(
            make_app(service),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            ssl_certfile=certfile,
            ssl_keyfile=keyfile,
        )
        super().__init__(config)
        self.service = service
        self.grace_seconds = grace_seconds
        self.clock = time.monotonic
        self._closing_since: float | None = None
        self._idle_since: dict[tuple[Any, Any], float] = {}

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Record a signal, and do nothing else: it may interrupt any code."""
        if self.service.is_closing:
            self.grace_seconds = 0.0
        self.service.is_closing = True

    async def on_tick(self, counter: int) -> bool:
        """Shut down and close idle connections if it is time; uvicorn calls this ten times a second."""
        if self.service.is_closing and not self.should_exit:
            self._closing_since = self._closing_since or self.clock()
            if not self.service.num_requests or self.clock() - self._closing_since >= self.grace_seconds:
                await self.service.abort()
                self.should_exit = True
        self._close_idle_connections()
        return await super().on_tick(counter)

    def _close_idle_connections(self) -> None:
        """Close connections that have not sent a complete request for a while.

        uvicorn itself waits without limit for the head of a request, and for the client to read a response.
        """
        connections: set[Any] = set(self.server_state.connections)
        is_crowded = len(connections) > _MAX_CONNECTIONS // 2
        limit = _IDLE_SECONDS_CROWDED if is_crowded else _IDLE_SECONDS
        now = self.clock()
        # The last request is a part of the key: another may arrive and be answered between two ticks.
        idle = [
            (connection, connection.cycle)
            for connection in connections
            if connection.cycle is None or connection.cycle.response_complete or connection.transport.is_closing()
        ]
        self._idle_since = {key: self._idle_since.get(key, now) for key in idle}
        for (connection, _), since in self._idle_since.items():
            if now - since >= limit:
                connection.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; call it before loading the model, so that errors appear at once.

    Raises:
        ValueError: the address is in use, or does not belong to this machine.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose another --host or --port"
        ) from error
    return bound
