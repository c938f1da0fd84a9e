"""A fork server: a process that imports torch and salmonn once, and forks for each command line that tests run.

    fork_server.py serve FD                  accept connections on the listening socket FD until stdin is closed
    fork_server.py run SOCKET COMMAND ...    run a command line: python ..., salmonn ... or torchrun --standalone ...

    test --Popen--> run ===socket===> handler --fork--> rank 0, rank 1, ...
                                         ^
                    server (imports) --fork

Importing torch, transformers and peft costs seconds of CPU, a fork costs milliseconds. `run` stands in for the forked
processes: they have its working directory, environment and standard streams; it forwards signals to them and ends as
they end, by the same signal or exit code. When `run` is killed, the handler kills the ranks (SIGKILL).

The ranks are forked while the server has one thread and no CUDA context. What they import that the server has not
imported is theirs alone. All forks of one server share its string hash seed, hence tests keep some real launches.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
LENGTH = struct.Struct("!I")
CODE = struct.Struct("!i")
PORT_DIGITS = 8
# What the stand-in receives, and the ranks then get. It cannot catch SIGKILL, so another signal stands for that one.
KILL = signal.SIGRTMIN + 9
FORWARDED = {number: number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)} | {KILL: signal.SIGKILL}
# When a rank has failed, the others get SIGTERM and SIGKILL after these times, as from torchrun.
TERM_SECONDS, KILL_SECONDS = 0.1, 30.0
# Imported late by what the tests launch.
MODULES = (
    "torch.distributed.fsdp", "torch.utils.tensorboard", "peft", "accelerate", "matplotlib.pyplot", "openai",
    "scipy.stats", "fastapi", "uvicorn", "multiprocessing.spawn", "concurrent.futures.process",
    "transformers.models.qwen2.modeling_qwen2", "docstring_parser", "deepspeed", "torch.profiler", "gradio",
)  # fmt: skip


def main() -> None:
    """Serve, or run one command line."""
    if sys.argv[1] == "run":
        run_line(sys.argv[2], sys.argv[3:])
    listener = socket.socket(fileno=int(sys.argv[2]))
    preload()
    leave(execute, *handle(serve(listener)))


# The server


def preload() -> None:
    """Import what launched processes need, on one thread."""
    sys.path[0] = str(ROOT)
    gc.disable()  # a quarter of the time of importing
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's, which gradio imports
    salmonn = importlib.import_module("salmonn")
    names = [found.name for found in pkgutil.walk_packages(salmonn.__path__, "salmonn.")]
    for name in (*MODULES, *names):
        with contextlib.suppress(ImportError):  # an optional dependency
            importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):  # other versions have it elsewhere
        # Made by each process that loads a model, in 0.2 s.
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("qwen2")
    config, mrdpo = (importlib.import_module(f"salmonn.{name}") for name in ("config", "train.mrdpo"))
    for make in (config.make_parser, config.make_writer):  # of the recipe that tests start most often
        make(mrdpo.MrDpoConfig)
    importlib.import_module("torch").set_num_threads(1)
    threads = os.listdir("/proc/self/task") if Path("/proc/self/task").is_dir() else [1]  # noqa: PTH208
    assert len(threads) == 1, "a process with threads cannot be forked safely: find the import that starts one"
    gc.enable()
    gc.collect()
    gc.freeze()


def serve(listener: socket.socket) -> socket.socket:
    """Fork a handler for each connection; return the connection in the handler."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, reap)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # the session is over
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            return connection
        connection.close()


def reap(*_: object) -> None:
    """Wait for the handlers that have ended, so that their CPU time counts as the session's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# The handler


def handle(connection: socket.socket) -> tuple[list[str], dict[str, str]]:
    """Fork the ranks of a command line and wait for them; return command line and environment in each rank."""
    _, fds, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(receive(connection, *LENGTH.unpack(receive(connection, LENGTH.size))))
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["folder"])
    size, line = parse_torchrun(request["line"])
    wakeup, write_wakeup = os.pipe()
    read_port, write_port = os.pipe()
    os.set_blocking(write_wakeup, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_wakeup, warn_on_full_buffer=False)
    pids = []
    for rank in range(size or 1):
        if not (pid := os.fork()):
            signal.set_wakeup_fd(-1)
            connection.close()
            for fd in (wakeup, write_wakeup, write_port):
                os.close(fd)
            port = int(os.read(read_port, PORT_DIGITS))
            os.close(read_port)
            return line, request["environment"] | (rank_variables(rank, size=size, port=port) if size else {})
        pids.append(pid)
    store = open_store() if size else None  # after the forks, as it starts a thread
    os.write(write_port, f"{store.port if store else 0:{PORT_DIGITS}}".encode() * len(pids))
    code = wait(pids, connection, wakeup, launched=size > 0)
    with contextlib.suppress(OSError):
        connection.sendall(CODE.pack(code))
    os._exit(0)


def parse_torchrun(line: list[str]) -> tuple[int, list[str]]:
    """Return the number of processes, 0 without torchrun, and the command line of each."""
    if Path(line[0]).name != "torchrun":
        return 0, line
    size, rest, program = 1, line[1:], ["python"]
    while rest[0].startswith("--"):
        flag, _, value = rest.pop(0).replace("-", "_").partition("=")
        if flag == "__nproc_per_node":
            size = int(value)
        elif flag == "__no_python":
            program = []
        elif flag != "__standalone":
            raise ValueError(f"the fork server does not know torchrun's flag {flag}: start a real torchrun")
    return size, [*program, *rest]


def rank_variables(rank: int, *, size: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a rank."""
    ranks = {f"{prefix}RANK": rank for prefix in ("", "LOCAL_", "ROLE_")} | {"GROUP_RANK": 0}
    sizes = {f"{prefix}WORLD_SIZE": size for prefix in ("", "LOCAL_", "ROLE_")} | {"GROUP_WORLD_SIZE": 1}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": 0}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RUN_ID": "forked", "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in (ranks | sizes | shared).items()}


def open_store() -> Any:
    """Return the store in which ranks meet, at a free port, as torchrun's agent has one."""
    return importlib.import_module("torch.distributed").TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def wait(pids: list[int], connection: socket.socket, wakeup: int, *, launched: bool) -> int:
    """Wait for all ranks, forwarding signals, and return the exit code; torchrun ends all when one has failed."""
    running, codes = set(pids), list[int]()
    sources: list[Any] = [connection, wakeup]
    schedule: list[tuple[float, int]] = []
    while running:
        timeout = max(0.0, schedule[0][0] - time.monotonic()) if schedule else None
        ready, _, _ = select.select(sources, [], [], timeout)
        if wakeup in ready:
            os.read(wakeup, 4096)
        if connection in ready:
            numbers = connection.recv(64)
            kill(running, *(numbers or [signal.SIGKILL]))
            if not numbers:  # `run` was killed
                sources.remove(connection)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
                if launched and codes[-1] and not any(codes[:-1]):
                    now = time.monotonic()
                    schedule = [(now + TERM_SECONDS, signal.SIGTERM), (now + KILL_SECONDS, signal.SIGKILL)]
        if schedule and time.monotonic() >= schedule[0][0]:
            kill(running, schedule.pop(0)[1])
    return int(any(codes)) if launched else codes[0]


def kill(pids: Iterable[int], *numbers: int) -> None:
    """Send signals to processes that have not been waited for."""
    for pid in pids:
        for number in numbers:
            os.kill(pid, number)


# The launched process


def execute(line: list[str], environment: dict[str, str]) -> None:
    """Become the process of a command line, with a `__main__` of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # read TMPDIR again
    os.cpu_count = lambda: 1  # recipes start a thread for each core, while tests run beside one another
    if threads := environment.get("OMP_NUM_THREADS"):
        importlib.import_module("torch").set_num_threads(int(threads))
    if Path(line[0]).name.startswith("python"):
        line = line[1:]
    sys.path[:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    main_module = sys.modules["__main__"] = types.ModuleType("__main__")
    if line[0] == "-c":
        source, name, sys.argv = line[1], "<string>", ["-c", *line[2:]]
        sys.path.insert(0, "")
    else:
        name, sys.argv = line[0], line
        source, main_module.__file__ = Path(name).read_text(encoding="utf-8"), str(Path(name).absolute())
        sys.path.insert(0, str(Path(name).resolve().parent))
    exec(compile(source, name, "exec"), vars(main_module))


def leave(function: Callable[..., None], *args: Any) -> NoReturn:
    """Call a function and end the process as the interpreter would, but without taking its modules apart."""
    code: object = 0
    try:
        function(*args)
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:  # noqa: BLE001
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1 if not isinstance(error, KeyboardInterrupt) else -signal.SIGINT
    if not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


# The stand-in


def run_line(path: str, line: list[str]) -> NoReturn:
    """Have the server run a command line, and end as it ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        for number in FORWARDED:
            signal.signal(number, lambda number, _: connection.send(bytes([FORWARDED[number]])))
        socket.send_fds(connection, [b"f"], [0, 1, 2])
        request = {"line": line, "folder": str(Path.cwd()), "environment": dict(os.environ)}
        body = json.dumps(request).encode()
        connection.sendall(LENGTH.pack(len(body)) + body)
        (code,) = CODE.unpack(receive(connection, CODE.size))
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def receive(connection: socket.socket, size: int) -> bytes:
    """Return the next bytes of a connection, all of them."""
    received = b""
    while len(received) < size:
        chunk = connection.recv(size - len(received))
        if not chunk:
            raise EOFError("the fork server, or the handler of this command, is gone")
        received += chunk
    return received


if __name__ == "__main__":
    main()
