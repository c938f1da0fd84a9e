"""Command lines of tests, run by a fork server: real processes without the seconds of importing torch."""

import atexit
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fork_server import KILL
from tests.limits import STEP_SECONDS

SHARED_SOCKET = "FORK_SERVER_SOCKET"  # environment variable
SERVER = Path(__file__).with_name("fork_server.py")


def forked(*line: object) -> list[str]:
    """Return a command line that runs `line` in a fork of a process that has imported torch and salmonn.

    It can be given to subprocess, with any working directory, environment and streams. To kill it, call `kill`.

    Args:
        line: python or a script of the virtual environment with its arguments, or torchrun --standalone with those.
    """
    return [sys.executable, "-ISE", str(SERVER), "run", str(socket_path()), *map(str, line)]


def kill(process: subprocess.Popen) -> None:
    """Kill what a `forked` command line has started by SIGKILL, and wait for it; it ends by SIGKILL too."""
    process.send_signal(KILL)
    process.wait(timeout=STEP_SECONDS)


@cache
def socket_path() -> Path:
    """Start this test session's fork server, and return the path of its socket.

    The workers of pytest-xdist share the one that their controller has started.
    """
    if SHARED_SOCKET in os.environ:
        return Path(os.environ[SHARED_SOCKET])
    folder = TemporaryDirectory(prefix="fork_")
    path = Path(folder.name) / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        command = [sys.executable, str(SERVER), "serve", str(listener.fileno())]
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()],
            start_new_session=True,
        )  # fmt: skip

    def stop() -> None:
        server.stdin.close()
        server.wait(timeout=STEP_SECONDS)
        folder.cleanup()

    atexit.register(stop)
    return path
