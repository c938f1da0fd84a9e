"""Locks, limits and waiting without `fcntl`, `resource`, SIGALRM and `poll`, as on Windows, and with them.

Windows is simulated: `msvcrt` is a stand-in that checks what it is called with, and locks by the system's own means.
"""

import errno
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from salmonn import system
from salmonn.caption import worker as worker_module
from salmonn.caption.worker import Worker, WorkerDied, WorkerLimits
from salmonn.media.container import ClipError
from salmonn.model.loading import Placement
from tests.launch import forked
from tests.limits import RUN_SECONDS, STEP_SECONDS

HOLDER = """\
import os, sys, time
from pathlib import Path
from salmonn import system
path = Path(sys.argv[1])
handle = system.open_folder(path) if path.is_dir() else os.open(path, os.O_RDWR)
system.lock(handle)
print("locked", flush=True)
time.sleep(600)
"""
# Every module of the package but the web UI, whose library is slow to import, and one caption, without the modules that
# Windows lacks.
WITHOUT_POSIX = """\
import importlib, pkgutil, sys
from types import SimpleNamespace
import fcntl
real = fcntl.flock
def locking(handle, mode, count):
    real(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
for name in [name for name in sys.modules if name.partition(".")[0] == "salmonn"]:
    del sys.modules[name]
sys.modules |= dict.fromkeys(("fcntl", "resource", "termios", "pwd", "grp"))
sys.modules["msvcrt"] = SimpleNamespace(locking=locking, LK_NBLCK=2)
import salmonn
for module in pkgutil.walk_packages(salmonn.__path__, "salmonn."):
    if module.name in ("salmonn.lmms_eval.model", "salmonn.caption.vllm_model"):  # these need another package
        continue
    if module.name.split(".")[1] not in ("__main__", "webui"):
        importlib.import_module(module.name)
assert not sys.modules["salmonn.system"].FOLDERS_CAN_BE_LOCKED
sys.exit(sys.modules["salmonn.cli"].main(sys.argv[1:]))
"""


def lock_as_msvcrt(handle, mode, count):
    """Lock one byte where no file has data; Windows reports a held lock as EACCES."""
    assert mode == 2 and count == 1 and os.lseek(handle, 0, os.SEEK_CUR) == 0x7FFFFFF0
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "held") from error


@pytest.fixture(params=["fcntl", "msvcrt"])
def locks(request, monkeypatch):
    """`salmonn.system` with the locks of this system, and as on Windows."""
    if request.param == "msvcrt":
        monkeypatch.setattr(system, "fcntl", None)
        monkeypatch.setattr(system, "msvcrt", SimpleNamespace(locking=lock_as_msvcrt, LK_NBLCK=2))
    return system


def test_a_lock_of_another_process_ends_with_it(locks, tmp_path):
    path = tmp_path / "file"
    path.write_text("text")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with path.open("r+") as file:
        file.seek(2)
        assert not locks.try_lock(file.fileno())
        holder.send_signal(signal.SIGKILL)
        holder.wait(STEP_SECONDS)
        locks.lock(file.fileno())
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 2
        with path.open("r+") as other:
            assert not locks.try_lock(other.fileno())
    with path.open("r+") as other:
        assert locks.try_lock(other.fileno())


def test_a_file_stands_for_a_folder_that_cannot_be_locked(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "FOLDERS_CAN_BE_LOCKED", False)
    handle = system.open_folder(tmp_path)
    assert system.try_lock(handle) and (tmp_path / ".lock").is_file()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError("it is open")))
    system.remove_locked(tmp_path / ".lock")
    system.flush(tmp_path)
    monkeypatch.setattr(system, "FOLDERS_CAN_BE_LOCKED", True)
    with pytest.raises(PermissionError):
        system.remove_locked(tmp_path / ".lock")
    os.close(handle)


def test_without_locks_there_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "fcntl", None)
    with (tmp_path / "file").open("w") as file, pytest.raises(OSError, match="has no file locks"):
        system.try_lock(file.fileno())


@pytest.fixture
def worker(monkeypatch):
    """A worker and its reader without SIGALRM, `resource` and `poll`."""
    monkeypatch.setattr(system, "HAS_POLL", False)
    code = (
        "import psutil, signal, sys; del signal.setitimer, signal.SIGALRM, signal.SIGPIPE; "
        "sys.modules['resource'] = None; "
    )
    monkeypatch.setattr(worker_module, "_WORKER_CODE", code + worker_module._WORKER_CODE)
    monkeypatch.delattr(signal, "SIGALRM")
    one = Worker(WorkerLimits(seconds=1.0))
    yield one
    one.close()


def test_a_worker_without_signals(worker):
    """Jobs succeed and fail one after the other; one that takes too long ends the process."""
    for number in range(3):
        worker.start_job(partial(abs, -number))
        assert worker.result() == number
    worker.start_job(partial(int, "a.mp4"))  # functions that the process finds without our folder
    with pytest.raises(ClipError, match=r"a\.mp4"):
        worker.result()
    worker.start_job(partial(time.sleep, 60))
    with pytest.raises(WorkerDied, match="took more than 1 s"):
        worker.result()


def test_figures_of_this_process(monkeypatch):
    assert system.num_cpus() == len(os.sched_getaffinity(0))
    by_resource = system.peak_memory_bytes()
    monkeypatch.setattr(system, "resource", None)
    assert by_resource / 20 < system.peak_memory_bytes() < 20 * by_resource  # now, where the peak is not known
    system.limit_memory(1)  # has no effect
    monkeypatch.delattr(os, "sched_getaffinity")
    assert system.num_cpus() == os.cpu_count()
    assert hasattr(select, "poll") == system.HAS_POLL


def test_no_other_module_imports_what_a_system_lacks():
    pattern = re.compile(r"^\s*(import|from) (fcntl|resource|termios|pwd|grp|msvcrt)\b", re.MULTILINE)
    package = Path(system.__file__).parent
    found = [path.name for path in package.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == ["system.py"]


def test_captions_without_posix(videos, tmp_path):
    """Every module can be imported, and a clip is captioned, its ledger locked, by the command line."""
    out = tmp_path / "captions.jsonl"
    line = [sys.executable, "-c", WITHOUT_POSIX, "caption", videos[0], "--out", out, "--workers", "1", "--quiet"]
    result = subprocess.run(forked(*line), capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.returncode == 0, result.stderr
    assert videos[0].name in out.read_text()


def test_apple_gpus(monkeypatch):
    with pytest.raises(ValueError, match="no device mps: torch finds no GPU of Apple here"):
        Placement(device="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    arguments = Placement(device="mps").to_transformers()
    assert (arguments["dtype"], arguments["attn_implementation"]) == (torch.float32, "sdpa")
    assert arguments["device_map"] == {"": torch.device("mps")}
    assert Placement(device="mps", dtype="bfloat16").to_transformers()["dtype"] == torch.bfloat16
