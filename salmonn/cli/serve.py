"""`salmonn serve`: serve a model over HTTP with an OpenAI-compatible API."""

import logging
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from salmonn.cli.options import add_batch_size, add_model_options, add_server_options, is_loopback, load_captioner
from salmonn.config import FlagParser

if TYPE_CHECKING:
    from salmonn.caption.captioner import Captioner
    from salmonn.serve.api import ServerConfig
    from salmonn.serve.sources import MediaSources

MIN_KEY_CHARS = 16


def serve_parser() -> FlagParser:
    """Return the arguments of `salmonn serve`."""
    parser = FlagParser(
        description="Answer chat completions about clips with an OpenAI-compatible API: POST /v1/chat/completions with "
        "a video, image or audio file; POST /v1/files; GET /v1/models, /health, /metrics, and /docs, which lists all. "
        "SIGTERM or Ctrl-C stops the server once pending requests are answered; a second one stops it at once."
    )
    names = "model name in the API (default: its own)"
    parser.add_argument("--name", "--served_model_name", type=str | None, default=None, help=names)
    add_server_options(parser, port=8000, read_seconds=300.0)
    _add_access_options(parser)
    _add_limit_options(parser)
    add_model_options(parser)
    return parser


def _add_access_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Access")
    group.add_argument("--api_key_file", type=Path | None, default=None, help="file of accepted API keys, one per line")
    group.add_argument("--no_auth", action="store_true", help="accept requests without a key, even from other machines")
    names = "further host names under which clients reach this server"
    group.add_argument("--server_names", nargs="+", type=str, default=[], help=names)
    origins = "origins of web pages that may use this server (CORS), such as https://example.org; * allows all"
    group.add_argument("--allowed_origins", nargs="+", type=str, default=[], help=origins)
    group.add_argument("--ssl_certfile", type=Path | None, default=None, help="PEM file of a certificate: serves HTTPS")
    group.add_argument("--ssl_keyfile", type=Path | None, default=None, help="PEM file of its private key")
    group.add_argument(
        "--allowed_dirs", nargs="+", type=Path, default=[], help="folders whose files requests may refer to"
    )
    group.add_argument(
        "--lora_dirs",
        nargs="+",
        type=Path,
        default=[],
        help="folders from which clients may load LoRA adapters with POST /v1/load_lora_adapter",
    )
    hosts = "hosts from which files may be fetched, such as example.org, *.example.org or host:port"
    group.add_argument("--allow_hosts", nargs="+", type=str, default=[], help=hosts)
    group.add_argument(
        "--allow_private", action="store_true", help="also fetch from private addresses, such as your own file server"
    )
    group.add_argument(
        "--ca_file",
        type=Path | None,
        default=None,
        help="PEM file of further certificates to trust",
    )


def _add_limit_options(parser: FlagParser) -> None:
    group = parser.add_argument_group("Limits")
    group.add_argument("--max_upload_mib", type=float, default=512.0, help="maximum size of a sent or fetched file")
    group.add_argument("--max_files_gib", type=float, default=4.0, help="maximum size of all files of /v1/files")
    group.add_argument("--file_hours", type=float, default=24.0, help="time after which such a file is deleted")
    group.add_argument(
        "--max_seconds", type=float, default=3600.0, help="maximum duration of a clip, or of its requested part"
    )
    group.add_argument(
        "--max_waiting",
        type=int,
        default=64,
        help="maximum number of answers queued or being generated (above: HTTP 429)",
    )
    group.add_argument("--max_answer_tokens", type=int, default=4096, help="maximum tokens per answer")
    group.add_argument("--request_seconds", type=float, default=600.0, help="time limit per request")
    group.add_argument("--fetch_seconds", type=float, default=300.0, help="time limit for fetching a file")
    group.add_argument("--grace_seconds", type=float, default=30.0, help="time to finish requests on shutdown")
    add_batch_size(group)


def run_serve(values: Namespace) -> int:
    """Serve until a signal ends it."""
    from salmonn.caption.engine import Engine
    from salmonn.caption.loader import ClipReader
    from salmonn.caption.worker import WorkerLimits

    try:
        from salmonn.serve.api import Service
        from salmonn.serve.server import Server, bind
        from salmonn.serve.sources import upload_folder
    except ImportError as error:
        raise ValueError("salmonn serve needs a web server: pip install 'salmonn[serve]'") from error

    _check_values(values)
    certificate = (values.ssl_certfile, values.ssl_keyfile) if values.ssl_certfile else None
    keys, sources = _read_keys(values), _sources(values)
    logging.getLogger("salmonn.serve").setLevel(logging.INFO)
    limits = WorkerLimits(values.read_seconds, values.read_gib)
    # Workers start before the model is loaded, so that they are ready when it is.
    with bind(values.host, values.port) as listener, ClipReader(workers=values.workers, limits=limits) as reader:
        captioner = load_captioner(values)
        settings = _settings(values, captioner, sources=sources, keys=keys)
        engine = Engine(
            captioner,
            reader,
            max_waiting=values.max_waiting,
            batch_size=values.batch_size,
            max_seconds=values.max_seconds,
        )
        try:
            with upload_folder() as uploads:
                server = Server(
                    Service(engine, settings, uploads), grace_seconds=values.grace_seconds, certificate=certificate
                )
                host, port = listener.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                scheme = "https" if certificate else "http"
                sys.stderr.write(f"serving {settings.name} at {scheme}://{host}:{port}/v1\n")
                sys.stderr.flush()
                server.run(sockets=[listener])
        finally:
            engine.close(grace_seconds=0)
    return 0


def _sources(values: Namespace) -> "MediaSources":
    from salmonn.serve.fetch import FetchPolicy
    from salmonn.serve.sources import MediaSources

    fetch_policy = FetchPolicy(
        hosts=tuple(values.allow_hosts),
        private=values.allow_private,
        max_bytes=round(values.max_upload_mib * (1 << 20)),
        seconds=values.fetch_seconds,
        ca_file=values.ca_file,
    )
    return MediaSources(tuple(values.allowed_dirs), fetch_policy)


def _settings(
    values: Namespace, captioner: "Captioner", *, sources: "MediaSources", keys: tuple[str, ...]
) -> "ServerConfig":
    from salmonn.serve.api import ServerConfig
    from salmonn.serve.files import FileLimits
    from salmonn.serve.schema import ChatLimits

    name, usual = captioner.name, ChatLimits(captioner.default_sampling().max_new_tokens)
    return ServerConfig(
        # Do not show clients where the model is stored.
        name=values.name or (Path(name).name if Path(name).is_dir() else name),
        sources=sources,
        limits=ChatLimits(
            min(usual.default_tokens, values.max_answer_tokens),
            max_tokens=values.max_answer_tokens,
            max_choices=min(usual.max_choices, values.max_waiting),
        ),
        files=FileLimits(
            sources.fetch_policy.max_bytes, round(values.max_files_gib * (1 << 30)), 3600 * values.file_hours
        ),
        request_seconds=values.request_seconds,
        keys=keys,
        hosts=tuple(host.lower() for host in (values.host, *values.server_names)),
        origins=tuple(values.allowed_origins),
        adapter_dirs=tuple(values.lora_dirs),
    )


def _check_values(values: Namespace) -> None:
    """Raise a ValueError if the value of a flag makes no sense."""
    positive = ["max_upload_mib", "max_files_gib", "file_hours", "max_seconds", "max_waiting", "max_answer_tokens"]
    for name in (*positive, "request_seconds", "workers"):
        if not values[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, got {values[name]}")
    if values.batch_size is not None and values.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {values.batch_size}")
    if missing := [folder for folder in values.lora_dirs if not folder.is_dir()]:
        raise ValueError(f"--lora-dirs {missing[0]} is not a folder")
    _check_certificate(values.ssl_certfile, values.ssl_keyfile)
    if not (is_loopback(values.host) or values.api_key_file or values.no_auth):
        raise ValueError(
            f"other machines can reach this server at {values.host}; require a key with --api-key-file FILE, or allow "
            "everyone with --no-auth"
        )


def _check_certificate(certfile: Path | None, keyfile: Path | None) -> None:
    """Raise a ValueError if the files are not a certificate and its key: uvicorn would fail after the model loads."""
    if certfile is None:
        if keyfile is not None:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"--ssl-certfile {certfile} and its key cannot be used ({error})") from error


def _read_keys(values: Namespace) -> tuple[str, ...]:
    if values.api_key_file is None:
        return ()
    lines = values.api_key_file.read_text(encoding="utf-8").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys or min(map(len, keys)) < MIN_KEY_CHARS:
        raise ValueError(
            f"{values.api_key_file} must contain keys of at least {MIN_KEY_CHARS} characters, one per line; "
            "`openssl rand -hex 32` makes one"
        )
    return keys
