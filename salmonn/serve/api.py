"""The HTTP API: OpenAI's chat completions about clips, uploaded files, health and metrics.

POST /v1/chat/completions   GET /v1/models   GET /v1/models/NAME   GET /health, /ping   GET /metrics   GET /version
GET /docs, /openapi.json   POST, GET, DELETE /v1/files (see `files.py`)
POST /v1/load_lora_adapter, /v1/unload_lora_adapter (see `adapters.py`)
"""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from salmonn import __version__
from salmonn.caption.engine import SHUTTING_DOWN, Engine, Overloaded
from salmonn.caption.streaming import TextDelta
from salmonn.model.adapters import Adapter
from salmonn.serve.adapters import AdapterStore, adapter_routes
from salmonn.serve.body import Body
from salmonn.serve.content import ClipPart
from salmonn.serve.docs import render_docs
from salmonn.serve.errors import EXPECTED_ERRORS, ApiError, RequestError, to_api_error
from salmonn.serve.fetch import SourceError, TooLargeError
from salmonn.serve.files import FileLimits, FileStore, file_routes
from salmonn.serve.logprobs import LogprobsFormat
from salmonn.serve.metrics import Metrics
from salmonn.serve.request import RequestContext, UploadSpace, race, until_disconnect
from salmonn.serve.schema import (
    DONE,
    JSON_SCHEMA_PARAM,
    ChatCompletion,
    ChatLimits,
    ChatRequest,
    ResponseBuilder,
    parse_chat_request,
    to_event,
)
from salmonn.serve.sources import MediaSources, ResolvedMedia, resolve_media

_ANY_MODEL = ("", "salmonn")
_OPEN_PATHS = ("/health", "/ping", "/docs", "/openapi.json")  # for which no key is needed
_DESCRIPTION = """Captions of videos, audio files and images, and answers about them, with OpenAI's API.

Clients send `Authorization: Bearer KEY` if the server was started with keys. Errors have the form `{"error": \
{"message": "...", "type": "...", "param": "messages[0].content[0].type", "code": null}}`."""
_COMPLETION = """A message of the user has the clip, as a part such as `{"type": "video_url", "video_url": \
{"url": "data:video/mp4;base64,..."}}` or `{"type": "file", "file": {"file_id": "..."}}`, and text. With \
`stream: true`, the answer is sent as server-sent events while it is generated."""
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}
_EXTRA_BODY_BYTES = 1 << 20  # for the parts of a request other than its file
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies forward each event at once
_MAX_BODIES = 4  # number of bodies of the maximum size that are stored at a time
_FINAL_EVENT_SECONDS = 1.0  # beyond a request's time limit, to send the event that reports it


@dataclass(frozen=True)
class ServerConfig:
    """Configuration of a server.

    Args:
        name: name of the model in `/v1/models`.
        sources: where files may come from.
        limits: limits of a chat request.
        files: limits of uploaded files.
        request_seconds: time limit of a request.
        keys: accepted API keys; none disables the check.
        hosts: names by which clients may address the server, besides localhost and IP addresses. This protects against
            DNS rebinding: a web page whose own name resolves to this server cannot use it from a visitor's browser.
        origins: origins of web pages that may use the server from a visitor's browser (CORS); "*" allows all.
        adapter_dirs: folders that clients may load adapters from; none disables loading.
    """

    name: str
    sources: MediaSources
    limits: ChatLimits
    files: FileLimits = field(default_factory=FileLimits)
    request_seconds: float = 600.0
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    adapter_dirs: tuple[Path, ...] = ()


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
        self.upload_space = UploadSpace(self.max_body_bytes * _MAX_BODIES)
        self.is_closing = False
        self.num_requests = 0
        self.files = FileStore(uploads / "files", config.files)
        self.adapters = AdapterStore(engine.captioner.network, config.adapter_dirs, base_name=config.name)
        self._created = int(time.time())
        self._logprobs = LogprobsFormat(engine.captioner.processor)
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
        request.state.owner = ""
        # Not the path of `request.url`, which older versions of Starlette parse from the Host header and the path.
        if not self.config.keys or request.scope["path"] in _OPEN_PATHS:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        # All keys are compared, in constant time, so that the duration reveals nothing about them.
        matches = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in self.config.keys]
        if kind.lower() != "bearer" or not any(matches):
            raise HTTPException(401, "the API key is missing or wrong; send Authorization: Bearer KEY")
        request.state.owner = str(matches.index(True))

    async def check_origin(self, request: Request) -> None:
        """Raise an HTTPException for a web page of another origin: browsers send its forms without asking (CORS)."""
        origin = request.headers.get("origin")
        if origin is None or origin.partition("://")[2] == request.headers.get("host"):
            return
        if not {"*", origin} & set(self.config.origins):
            raise HTTPException(403, f"pages of {origin[:100]!r} are not allowed; add them with --allowed-origins")

    async def check_open(self) -> None:
        """Raise Overloaded while the server shuts down: what is uploaded then would be lost."""
        if self.is_closing:
            raise Overloaded(SHUTTING_DOWN)

    async def complete(self, request: Request) -> Response:
        """Answer a chat completion request."""
        if self.is_closing:
            return self._to_error(Overloaded(SHUTTING_DOWN)).to_response()
        context = RequestContext(
            self.engine,
            self.metrics,
            owner=request.state.owner,
            uploads=self.uploads,
            upload_space=self.upload_space,
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
            body = await context.read_body(
                request, max_bytes=self.max_body_bytes, max_file_bytes=self.config.sources.fetch_policy.max_bytes
            )
        chat, events = await until_disconnect(request, self._submit(body, context))
        name = self.config.name if chat.model in _ANY_MODEL else chat.model
        builder = ResponseBuilder(context.id, name, int(time.time()), self._logprobs, include_usage=chat.include_usage)
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

        # Awaited before the response starts, so that an error before the first text gets its own status.
        first = await until_disconnect(request, first_event())
        stream = self._stream(context, chat, builder, first, events)
        return _EventStream(stream, context=context, close=lambda: self._close(context))

    async def _submit(
        self, body: Body, context: RequestContext
    ) -> tuple[ChatRequest, AsyncIterator[tuple[int, TextDelta]]]:
        """Parse a request, get its file, and submit it to the engine."""
        async with asyncio.timeout_at(context.deadline):
            chat = await asyncio.to_thread(self._parse, body)
            media = await self._resolve(chat.clip, body, context)
        context.num_bytes, context.source = media.num_bytes, media.source
        events = context.submit(replace(chat.request, path=media.path), adapter=self._find_adapter(chat.model))
        # Errors name the file as the client knows it, and not by its path on this machine.
        name = chat.clip.url if media.source == "local" else f"the {chat.clip.kind}"
        return chat, _replace_in_errors(events, str(media.path), name)

    def _parse(self, body: Body) -> ChatRequest:
        chat = parse_chat_request(body.text, limits=self.config.limits)
        body.check_references(chat.clip.url)
        self._find_adapter(chat.model)
        schema = chat.request.sampling.json_schema if chat.request.sampling else None
        if schema is not None:  # here, and not in the event loop: compiling it may take a second
            try:
                self.engine.captioner.processor.json_grammars.check(schema)
            except ValueError as error:
                raise RequestError(str(error), param=JSON_SCHEMA_PARAM) from error
        return chat

    def _find_adapter(self, model: str) -> Adapter | None:
        """Return the adapter that a request's model names, if any; raises a RequestError for an unknown model."""
        adapter = self.adapters.find(model)
        if adapter is None and model not in (*_ANY_MODEL, self.config.name):
            raise self._model_not_found(model)
        return adapter

    async def _resolve(self, clip: ClipPart, body: Body, context: RequestContext) -> ResolvedMedia:
        """Return the file of a clip; errors name its place in the request."""
        try:
            if clip.is_uploaded:
                return ResolvedMedia(self.files.link(clip.url, context.owner, context.make_folder()), "file")
            if (found := body.files.get(clip.url)) is None:
                return await resolve_media(clip.url, context.make_folder(), sources=self.config.sources)
            if found.error is not None:
                raise found.error
            return ResolvedMedia(found.path, "upload", found.num_bytes)
        except TooLargeError:
            raise
        except (SourceError, RequestError) as error:
            status = error.status if isinstance(error, RequestError) else 400
            raise RequestError(f"{clip.where}: {error}", param=clip.where, status=status) from error

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
        """Return the list of models: the model itself, and its adapters."""
        adapters = [self.adapters.describe(name) for name in self.adapters.names]
        return {"object": "list", "data": [self._model_json(), *adapters]}

    def model(self, name: str) -> Response:
        """Return the model of a name."""
        if self.adapters.find(name):
            return JSONResponse(self.adapters.describe(name))
        if name != self.config.name:
            return self._to_error(self._model_not_found(name)).to_response()
        return JSONResponse(self._model_json())

    def _model_json(self) -> dict[str, Any]:
        return {"id": self.config.name, "object": "model", "created": self._created, "owned_by": "salmonn"}

    def _model_not_found(self, name: str) -> RequestError:
        return RequestError(
            f"model {name[:100]!r} not found; available: {', '.join([self.config.name, *self.adapters.names])}",
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
    """Return the name or IP address of the Host header, without the port; "" if it has anything else."""
    header = request.headers.get("host", "")
    if set(header) & set("/?#@\\"):
        return ""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _add_error_handlers(app: FastAPI, *, seconds: float) -> None:
    @app.exception_handler(RequestError)
    @app.exception_handler(TooLargeError)
    @app.exception_handler(TimeoutError)
    @app.exception_handler(OSError)
    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(Overloaded)
    async def handle_expected_error(_: Request, error: Exception) -> Response:
        return to_api_error(error, seconds=seconds).to_response()

    @app.exception_handler(RequestValidationError)
    async def handle_wrong_parameter(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return ApiError(400, f"{name}: {first['msg']}", "rejected", name).to_response()

    @app.exception_handler(HTTPException)
    async def handle_http_error(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), "rejected").to_response()

    @app.exception_handler(Exception)
    async def handle_bug(_: Request, error: Exception) -> Response:
        message = f"internal server error ({type(error).__name__}); see the server's log"
        return ApiError(500, message, "failed").to_response()


def _add_information_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that report the model, the health, the version and the metrics."""

    @app.get("/v1/models", summary="List the served model")
    async def models() -> dict[str, Any]:
        return service.models()

    @app.get("/v1/models/{name:path}", summary="Describe the model")
    async def model(name: str) -> Response:
        return service.model(name)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="Report whether requests are being answered")
    @app.get("/ping", include_in_schema=False)
    async def health() -> Response:
        return service.health()

    @app.get("/version", summary="Report the version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", summary="Export Prometheus metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def make_app(service: Service) -> FastAPI:
    """Return the ASGI application of a service."""
    app = FastAPI(
        title="salmonn",
        description=_DESCRIPTION,
        version=__version__,
        # FastAPI's pages load scripts from other hosts, and its routes would not check the Host header.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(service.check_access)],
    )
    if service.config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )

    _add_error_handlers(app, seconds=service.config.request_seconds)
    body_schema = ChatCompletion.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = body_schema.pop("$defs")
    body = {"required": True, "content": {"application/json": {"schema": body_schema}}}

    @app.post(
        "/v1/chat/completions",
        openapi_extra={"requestBody": body},
        summary="Describe a clip, or answer a question about it",
        description=_COMPLETION,
    )
    async def complete(request: Request) -> Response:
        return await service.complete(request)

    app.include_router(
        file_routes(service.files, service.metrics, seconds=service.config.request_seconds),
        dependencies=[Depends(service.check_origin), Depends(service.check_open)],
    )

    if service.adapters.is_enabled:
        app.include_router(
            adapter_routes(service.adapters), dependencies=[Depends(service.check_origin), Depends(service.check_open)]
        )
    _add_information_routes(app, service)

    @app.get("/openapi.json", include_in_schema=False)
    async def schema() -> dict[str, Any]:
        found = app.openapi()
        found.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
        return found

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(render_docs(await schema()), headers=_PAGE_HEADERS)

    return app
