"""What differs between operating systems: locks of files, limits of a process and its figures.

`fcntl` and `resource` exist on Linux and macOS, `msvcrt` on Windows; no other module of the package imports them.
Locks belong to the process that holds them, and end with it, however it ends.
"""

import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

fcntl: Any = None
resource: Any = None
msvcrt: Any = None
with suppress(ImportError):
    import fcntl
with suppress(ImportError):
    import resource
with suppress(ImportError):
    import msvcrt

# Folders can be opened, locked, and renamed while they are locked; not on Windows.
FOLDERS_CAN_BE_LOCKED = fcntl is not None
HAS_POLL = hasattr(select, "poll")
TIMEOUT_EXIT_CODE = 124  # of a process that a `Deadline` ended without a signal
_LOCKED = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
# On Windows, no other process can read a locked byte, so one is locked that no file of ours reaches, within 32 bits.
_LOCKED_BYTE = 0x7FFFFFF0
_WAIT_SECONDS = 0.05  # between two attempts where the system cannot wait for a lock
_FOLDER_LOCK_NAME = ".lock"
O_BINARY: int = getattr(os, "O_BINARY", 0)  # for os.open: Windows would write its own line ends


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file, or a folder by `open_folder`, until its handle is closed.

    Args:
        handle: file descriptor.
        shared: allow other shared locks; on Windows every lock is exclusive.

    Returns:
        False if another process, or another handle of this one, holds it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif msvcrt is not None:
            position = os.lseek(handle, 0, os.SEEK_CUR)
            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(handle, position, os.SEEK_SET)
        else:
            raise OSError(errno.ENOLCK, "this operating system has no file locks; use Linux, macOS or Windows")
    except OSError as error:
        if error.errno in _LOCKED:
            return False
        raise
    return True


def lock(handle: int) -> None:
    """Lock an open file or folder, and wait for it; raises what `try_lock` does."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    while not try_lock(handle):
        time.sleep(_WAIT_SECONDS)


def open_folder(folder: Path, *, follows_links: bool = True) -> int:
    """Open a folder to lock it: itself, or on Windows a file in it."""
    if FOLDERS_CAN_BE_LOCKED:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (0 if follows_links else os.O_NOFOLLOW))
    return os.open(folder / _FOLDER_LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)


def remove_locked(path: Path) -> None:
    """Remove a file that this process has locked; on Windows, an open file is kept instead, and locked again later."""
    with suppress(*([] if FOLDERS_CAN_BE_LOCKED else [PermissionError])):
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk; on Windows folders cannot be flushed."""
    if path.is_dir() and not FOLDERS_CAN_BE_LOCKED:
        return
    handle = os.open(path, os.O_RDONLY if FOLDERS_CAN_BE_LOCKED else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def limit_memory(num_bytes: int) -> None:
    """Limit the data segment of this process; macOS does not enforce it, and Windows has no such limit."""
    if resource is not None and sys.platform != "darwin":
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def peak_memory_bytes() -> int:
    """Return the most memory that this process has had resident."""
    if resource is not None:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def num_cpus() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def was_killed(exit_code: int | None) -> bool:
    """Return whether an exit code is that of `Popen.kill`: minus the signal, or 1 on Windows."""
    return exit_code == (-signal.SIGKILL if hasattr(signal, "SIGKILL") else 1)


class Deadline:
    """Ends this process if it is not cancelled in time, even in the middle of native code.

    By the signal SIGALRM, or where there is none, by a thread, with the exit code `TIMEOUT_EXIT_CODE`; native code that
    keeps Python's lock then runs on, and the parent process has to end it.
    """

    def __init__(self) -> None:
        self._has_alarm = hasattr(signal, "setitimer")
        self._timer: threading.Timer | None = None
        if self._has_alarm:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def start(self, seconds: float) -> None:
        """End the process after this time."""
        if self._has_alarm:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return
        self._timer = threading.Timer(seconds, os._exit, [TIMEOUT_EXIT_CODE])
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Cancel the deadline."""
        if self._has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        elif self._timer is not None:
            self._timer.cancel()


def timed_out(exit_code: int) -> bool:
    """Return whether an exit code is that of a process that a `Deadline` ended."""
    return exit_code == (-signal.SIGALRM if hasattr(signal, "SIGALRM") else TIMEOUT_EXIT_CODE)


def watch(stream: "io.BufferedReader[Any]") -> Callable[[float], bool]:
    """Return a function that waits some seconds for output of a pipe, or its end, and returns whether there is any.

    Without `select.poll`, which Windows lacks, a thread waits, and what it reads is in the buffer of the stream.
    """
    if HAS_POLL:
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        return lambda seconds: bool(poll.poll(seconds * 1000))
    has_output = threading.Event()

    def peek() -> None:
        with suppress(OSError, ValueError):  # closed
            stream.peek(1)
        has_output.set()

    threading.Thread(target=peek, daemon=True).start()
    return has_output.wait


def enlarge_pipe(pipe: Any, num_bytes: int) -> None:
    """Enlarge the buffer of a pipe where the system can, and grants it; a small one is only slower."""
    with suppress(OSError, AttributeError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, num_bytes)


def ignore_broken_pipes() -> None:
    """End this process silently when it writes to a pipe whose reader is gone; on Windows, it is an error."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
