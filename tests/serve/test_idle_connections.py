"""Clients that block a server: idle connections, and streams that are not read."""

import asyncio
import json
import socket
from contextlib import ExitStack, closing

import pytest

from salmonn.serve import api, server
from tests.limits import STEP_SECONDS, wait_until
from tests.serve.running import HEAD, chat, read_metrics, user_message


def connect(running) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", running.port))
    connection.settimeout(STEP_SECONDS)
    return connection


def is_closed(connection) -> bool:
    """Wait for the server to close the connection; return False if it sends something instead."""
    try:
        return not connection.recv(100)
    except ConnectionResetError:
        return True


def is_healthy(connection) -> bool:
    """Request /health on a keep-alive connection and return whether the status is 200."""
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    response = connection.recv(1000)
    while not response.endswith(b"}"):  # head and body may arrive separately
        response += connection.recv(1000)
    return response.startswith(b"HTTP/1.1 200 ")


class Clock:
    """A clock for a server; it moves only when a test sets it."""

    def __init__(self, running) -> None:
        self.now = 1000.0
        self.num_ticks = 0
        self._server = running.server
        self._tick = running.server._close_idle_connections
        running.server._close_idle_connections = self._count
        running.server.clock = lambda: self.now
        self.wait_for_tick()

    def _count(self) -> None:
        self._tick()
        self.num_ticks += 1

    def wait_for_tick(self) -> None:
        """Wait until the server has checked all connections; the first of two checks may have started already."""
        before = self.num_ticks
        wait_until(lambda: self.num_ticks >= before + 2)


def test_connections_without_a_complete_request_are_closed(start):
    """One sends nothing, one never completes a head, one does not complete its second request."""
    running = start()
    clock = Clock(running)
    with connect(running) as silent, connect(running) as slow, connect(running) as second:
        assert is_healthy(second)
        for connection in (slow, second):
            connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        wait_until(lambda: len(running.server.server_state.connections) == 3)
        clock.wait_for_tick()
        clock.now += 0.9 * server._IDLE_SECONDS
        for connection in (slow, second):
            connection.sendall(b"and so on, ")  # the head never ends
        clock.wait_for_tick()
        assert len(running.server.server_state.connections) == 3
        clock.now += 0.2 * server._IDLE_SECONDS
        assert all(map(is_closed, (silent, slow, second)))
    wait_until(lambda: not running.server.server_state.connections)


def test_active_connections_are_not_idle(start, model, videos):
    """One sends a request before each time limit ends; another waits for its answer for longer than the limit."""
    running = start()
    clock = Clock(running)
    model.gate.clear()
    body = json.dumps({"messages": user_message(videos[0].name), "max_tokens": 5}).encode()
    with connect(running) as waiting, connect(running) as busy:
        waiting.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: running.service.num_requests == 1)
        for _ in range(2):
            assert is_healthy(busy)
            clock.wait_for_tick()
            clock.now += 0.9 * server._IDLE_SECONDS
            clock.wait_for_tick()
        model.gate.set()
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_idle_connections_do_not_block_others(start, videos, monkeypatch):
    """19 of 20 allowed connections are idle; near the limit their timeout is shorter."""
    monkeypatch.setattr(server, "_MAX_CONNECTIONS", 20)
    running = start()
    clock = Clock(running)
    with ExitStack() as stack:
        for _ in range(19):
            stack.enter_context(connect(running))
        wait_until(lambda: len(running.server.server_state.connections) == 19)
        clock.wait_for_tick()
        clock.now += 2 * server._IDLE_SECONDS_CROWDED
        wait_until(lambda: not running.server.server_state.connections)
        assert chat(running.client(), videos[0].name).choices


@pytest.mark.parametrize("is_closing", [False, True])
def test_a_stream_that_is_not_read_times_out(start, own_engine, videos, monkeypatch, is_closing):
    """Each event has 2 MB: a few are more than all buffers between server and client hold."""
    monkeypatch.setattr(server, "_IDLE_SECONDS", 0.1)
    monkeypatch.setattr(server, "_CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(api, "_FINAL_EVENT_SECONDS", 0.1)
    padding = " " * 2_000_000
    monkeypatch.setattr("salmonn.serve.schema.to_event", lambda value: f"data: {padding}{json.dumps(value)}\n\n")
    open_stream = api._EventStream.__init__

    def open_with_deadline(stream, events, *, context, close):
        context.deadline = asyncio.get_running_loop().time() + 0.5  # from here on: reading may take longer
        open_stream(stream, events, context=context, close=close)

    monkeypatch.setattr(api._EventStream, "__init__", open_with_deadline)
    running = start(own_engine, grace_seconds=2 * STEP_SECONDS)
    request = {"messages": user_message(videos[0].name), "max_tokens": 500, "stream": True, "temperature": 1, "n": 2}
    body = json.dumps(request).encode()
    with closing(connect(running)) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        assert running.service.num_requests == 1
        running.service.is_closing = is_closing
        wait_until(lambda: not running.service.num_requests)
        if is_closing:
            running.thread.join(STEP_SECONDS)  # long before the grace period ends
            assert not running.thread.is_alive()
        else:
            wait_until(lambda: not running.server.server_state.connections)
            assert read_metrics(running)["salmonn_requests_totaltimed_out"] == 1
    wait_until(lambda: not own_engine.num_active)
