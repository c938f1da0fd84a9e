"""`salmonn serve`: a service that speaks OpenAI's interface."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from salmonn.cli.model import add_model, load_captioner
from salmonn.cli.options import add_door, add_reading, is_loopback
from salmonn.config import FlagParser

if TYPE_CHECKING:
    import socket

    from salmonn.caption.captioner import Captioner
    from salmonn.serve.api import ServerConfig
    from salmonn.serve.sources import MediaSources

_SHORTEST_KEY = 16


def serve_parser() -> FlagParser:
    parser = FlagParser(
        description="Answer chat completions about clips, as OpenAI's interface has them: POST /v1/chat/completions "
        "with a video_url, image_url or input_audio; GET /v1/models, /health and /metrics. Ends at SIGTERM or Ctrl-C, "
        "once what is under way is answered; a second one cuts that off."
    )
    add_door(parser, port=8000)
    parser.add_argument("--name", type=str | None, default=None, help="of the model in requests (default: its own)")
    add_model(parser)
    _add_doors(parser)
    _add_limits(parser)
    return parser


def _add_doors(parser: FlagParser) -> None:
    """Who may ask, and where files may come from."""
    parser.add_argument("--api-key-file", type=Path | None, default=None, help="keys, one a line: any opens the door")
    parser.add_argument("--no-auth", action="store_true", help="no key, though other machines reach --host")
    parser.add_argument(
        "--server-names", nargs="+", type=str, default=[], help="names that clients have for this machine"
    )
    parser.add_argument(
        "--allowed-dirs", nargs="+", type=Path, default=[], help="folders whose files may be asked about"
    )
    parser.add_argument(
        "--allow-hosts",
        nargs="+",
        type=str,
        default=[],
        help="hosts to fetch from: example.org *.example.org host:port",
    )
    parser.add_argument(
        "--allow-private", action="store_true", help="fetch from addresses of this network too: for your own server"
    )
    parser.add_argument("--ca-file", type=Path | None, default=None, help="trusted beside the machine's: PEM")


def _add_limits(parser: FlagParser) -> None:
    parser.add_argument("--max-upload-mib", type=float, default=512.0, help="of a file that is sent or fetched")
    parser.add_argument("--max-seconds", type=float, default=3600.0, help="of a clip, or of the part asked about")
    parser.add_argument("--max-waiting", type=int, default=64, help="answers waited for at a time; more: 429")
    parser.add_argument("--max-answer-tokens", type=int, default=4096, help="that a request may ask for")
    parser.add_argument("--request-seconds", type=float, default=600.0, help="that a request may take")
    parser.add_argument("--fetch-seconds", type=float, default=300.0, help="that fetching a file may take")
    add_reading(parser, seconds=300.0)
    parser.add_argument("--grace-seconds", type=float, default=30.0, help="for what is under way at the end")
    parser.add_argument("--batch-size", type=int | None, default=None, help="clips side by side (default: the model's)")


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

    _require_sense(values)
    keys, sources = _read_keys(values), _sources(values)
    logging.getLogger("salmonn.serve").setLevel(logging.INFO)
    limits = WorkerLimits(values.read_seconds, values.read_gib)
    # Workers start before the model is read, so that they are ready when it is.
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
                server = Server(Service(engine, settings, uploads), grace_seconds=values.grace_seconds)
                sys.stderr.write(f"{settings.name} is served at {_address(listener)}\n")
                sys.stderr.flush()
                server.run(sockets=[listener])
        finally:
            engine.close(grace_seconds=0)
    return 0


def _address(listener: "socket.socket") -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


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
    from salmonn.serve.schema import ChatLimits

    name, usual = captioner.name, ChatLimits(captioner.default_sampling().max_new_tokens)
    return ServerConfig(
        # Where a model lies on this machine is nobody's business.
        name=values.name or (Path(name).name if Path(name).is_dir() else name),
        sources=sources,
        limits=ChatLimits(
            min(usual.default_tokens, values.max_answer_tokens),
            max_tokens=values.max_answer_tokens,
            max_choices=min(usual.max_choices, values.max_waiting),
        ),
        request_seconds=values.request_seconds,
        keys=keys,
        hosts=tuple(host.lower() for host in (values.host, *values.server_names)),
    )


def _require_sense(values: Namespace) -> None:
    """Raise a ValueError where a flag makes no sense."""
    for name in ("max_upload_mib", "max_seconds", "max_waiting", "max_answer_tokens", "request_seconds", "workers"):
        if not values[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {values[name]}")
    if values.batch_size is not None and values.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {values.batch_size}")
    if not (is_loopback(values.host) or values.api_key_file or values.no_auth):
        raise ValueError(
            f"at {values.host} other machines reach this server: give --api-key-file FILE, so that only those ask who "
            "have a key, or --no-auth if anybody may"
        )


def _read_keys(values: Namespace) -> tuple[str, ...]:
    if values.api_key_file is None:
        return ()
    lines = values.api_key_file.read_text(encoding="utf-8").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys or min(map(len, keys)) < _SHORTEST_KEY:
        raise ValueError(
            f"{values.api_key_file} must hold keys of {_SHORTEST_KEY} letters or more, one a line: "
            "openssl rand -hex 32 makes one"
        )
    return keys
