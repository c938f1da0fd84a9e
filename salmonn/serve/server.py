"""Runs the service until a signal ends it: what is under way is finished first, for a while."""

import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from salmonn.serve.api import Service, make_app

_MOST_CONNECTIONS = 1000
_SILENT_SECONDS = 20.0  # that a connection may be without a request
_SILENT_SECONDS_CROWDED = 1.0  # the same, once half of the connections are taken
_CLOSE_SECONDS = 5  # for what is still to be sent when the grace is over


class Server(uvicorn.Server):
    """A web server that, at SIGTERM or SIGINT, refuses what is new and ends when nothing is under way.

    A second signal ends the grace.

    Args:
        service: what it serves.
        grace_seconds: for what is under way.
    """

    def __init__(self, service: Service, *, grace_seconds: float) -> None:
        config = uvicorn.Config(
            make_app(service),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        super().__init__(config)
        self.service = service
        self.grace_seconds = grace_seconds
        self._closing_since: float | None = None
        self._silent: dict[tuple[Any, Any], float] = {}

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal, and no more: it may come in the middle of anything."""
        if self.service.is_closing:
            self.grace_seconds = 0.0
        self.service.is_closing = True

    async def on_tick(self, counter: int) -> bool:
        """What is done ten times a second."""
        if self.service.is_closing and not self.should_exit:
            self._closing_since = self._closing_since or time.monotonic()
            if not self.service.num_requests or time.monotonic() - self._closing_since >= self.grace_seconds:
                await self.service.cut_off()
                self.should_exit = True
        self._cut_silent()
        return await super().on_tick(counter)

    def _cut_silent(self) -> None:
        """Close the connections that take a place, and on which no request has come whole for a while.

        uvicorn waits for a request's head, and for what was sent to be read, as long as the other side likes.
        """
        connections: set[Any] = set(self.server_state.connections)
        is_crowded = len(connections) > _MOST_CONNECTIONS // 2
        now, seconds = time.monotonic(), _SILENT_SECONDS_CROWDED if is_crowded else _SILENT_SECONDS
        silent = [(one, one.cycle) for one in connections if _is_silent(one)]
        # By the last request as well: one may come and be answered between two looks.
        self._silent = {key: self._silent.get(key, now) for key in silent}
        for (connection, _), since in self._silent.items():
            if now - since >= seconds:
                connection.transport.abort()


def _is_silent(connection: Any) -> bool:
    """Whether no request is under way on a connection of uvicorn's."""
    return connection.cycle is None or connection.cycle.response_complete or connection.transport.is_closing()


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, before the model is loaded: an address that is taken is told at once.

    Raises:
        ValueError: it is taken, or none of this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen at {host}, port {port} ({error.strerror}): choose another --host or --port"
        ) from error
    return bound
