"""End all processes of a run when one of them fails, on all machines and whatever the others are doing.

Each process has a thread that waits for a message from the previous rank and passes it on to the next one:

    rank 0 --> rank 1 --> rank 2 --> rank 3        rank 1 fails: "out of disk" travels 1 -> 2 -> 3 -> 0;
       ^                                |          each rank prints it and exits.
       +--------------------------------+          At the end of the run every rank sends an empty message.

A rank that is killed sends nothing: the next one notices the closed connection and passes that on. The main threads are
not involved, since they may score captions for hours, or wait on a GPU for a collective that never completes.
"""

import atexit
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import TracebackType

import torch
import torch.distributed as torch_dist

ERROR_DELAY_SECONDS = 5.0  # after a connection error, for the message with its real cause to arrive
REPORT_SECONDS = 0.5  # for torchrun to notice the process that failed first, so that it reports that one
EXIT_SECONDS = 10.0  # for the previous rank's last message at the end of the run
MESSAGE_BYTES = 2000
MESSAGE_TAG = 1  # separates these messages from others between the ranks
LOST_CONNECTION = (
    "process {} of this run ended without a message (killed, or out of memory?): "
    "torchrun's report below shows its signal. Run the same command again to resume."
)


class FailureRing:
    """This process's place in the ring: the thread that listens, and the hooks for uncaught errors and for the exit.

    Args:
        group: process group for the messages, with a timeout longer than any run.
    """

    def __init__(self, group: torch_dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = torch_dist.get_rank(group), torch_dist.get_world_size(group)
        self._listener = threading.Thread(target=self._listen, name="failure ring", daemon=True)
        self._listener.start()
        sys.excepthook = self._on_uncaught_error
        atexit.register(self._on_exit)

    def abort(self, reason: str, *, code: int) -> None:
        """Exit with this code, and make all other processes print the reason and exit."""
        self._send(f"process {self._rank} of this run failed: {reason}")
        sys.stdout.flush()
        # Skips the interpreter's shutdown: the listener waits outside of Python and would crash if woken during it.
        os._exit(code)

    def _listen(self) -> None:
        """Wait for the previous rank's message or loss; pass it on and exit, unless the run has ended normally."""
        previous = (self._rank - 1) % self._size
        message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        try:
            torch_dist.recv(message, src=previous, group=self._group, tag=MESSAGE_TAG)
            reason = bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")
        except RuntimeError:  # the connection is closed
            reason = LOST_CONNECTION.format(previous)
        if reason:
            self._send(reason)
            sys.stderr.write(f"error: {reason}\n")
            sys.stderr.flush()
            time.sleep(REPORT_SECONDS)
            os._exit(1)

    def _send(self, reason: str) -> None:
        """Send a message to the next rank; an empty one means that this process has ended normally."""
        data = reason.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
        message = torch.tensor(list(data), dtype=torch.uint8)
        with suppress(RuntimeError):  # the next rank has ended already
            torch_dist.send(message, dst=(self._rank + 1) % self._size, group=self._group, tag=MESSAGE_TAG)

    def _on_uncaught_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, RuntimeError):
            # It may come from a connection that another rank's end broke: the listener then exits with the cause.
            self._listener.join(ERROR_DELAY_SECONDS)
        sys.__excepthook__(kind, error, trace)
        self.abort("".join(traceback.format_exception_only(error)).strip(), code=1)

    def _on_exit(self) -> None:
        self._send("")
        self._listener.join(EXIT_SECONDS)
        torch_dist.destroy_process_group()
