"""A web server with graceful shutdown, and limits on idle connections."""

import logging
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from salmonn.serve.api import Service, make_app

log = logging.getLogger(__name__)
_MAX_CONNECTIONS = 1000
_IDLE_SECONDS = 20.0  # for a connection without a complete request
_IDLE_SECONDS_CROWDED = 1.0  # the same, once half of the connections are taken
_CLOSE_SECONDS = 5  # for data that is still to be sent when the grace period is over


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
        """Shut down and close idle connections if it is time; uvicorn calls this ten times a second.

        Files that have expired are deleted, too.
        """
        if self.service.is_closing and not self.should_exit:
            self._closing_since = self._closing_since or self.clock()
            if not self.service.num_requests or self.clock() - self._closing_since >= self.grace_seconds:
                await self.service.abort()
                self.should_exit = True
        try:
            self.service.files.remove_expired()
        except OSError as error:  # such as a disk that has become read-only; requests are still answered
            log.warning("expired files could not be deleted: %s", error)
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
