"""Keep the files of a run on a remote store: `--out s3://bucket/captions.jsonl`.

A run works on local files, so that it resumes exactly after a kill. They are uploaded at intervals and at the end, each
as a whole: a reader of the store sees either the old or the new file. A run on another machine begins with the uploaded
files; one on the same machine with its own, which are ahead of those if it was killed.
"""

import logging
import re
import shutil
import threading
from contextlib import AbstractContextManager, suppress
from hashlib import blake2b
from pathlib import Path

from salmonn.batch.ledger_files import JOB_SUFFIX, LedgerFiles
from salmonn.batch.remote import SCHEMES, RemoteError, attempt, list_folder, look_up, name_of, scheme_of, store_of

logger = logging.getLogger(__name__)

WORKING_FOLDER = Path("~/.cache/salmonn/out")
_ATOMIC = ("s3", "gs", "hf")  # stores on which a file appears when it is complete
_BLOCK_BYTES = 1 << 20


def working_path(url: str) -> Path:
    """Return the local captions file of a run whose captions go to a URL.

    Raises:
        ValueError: files cannot be written there.
    """
    if scheme_of(url) in ("http", "https"):
        raise ValueError(f"--out {url}: captions cannot be written to a web server; use s3://, gs://, hf:// or a file")
    if not name_of(url) or url.endswith("/"):
        raise ValueError(f"--out {url} must name a file, such as {url.rstrip('/')}/captions.jsonl")
    folder = blake2b(url.rpartition(".")[0].encode(), digest_size=8).hexdigest()
    return WORKING_FOLDER.expanduser() / folder / name_of(url)


class RemoteOutput(AbstractContextManager["RemoteOutput"]):
    """The remote copies of a run's files; in a `with` statement they are uploaded at intervals and at the end.

    Args:
        url: URL of the captions.
        files: names of the local files.
        seconds: time between two uploads.

    Raises:
        RemoteError: the store is not available.
    """

    def __init__(self, url: str, files: LedgerFiles, *, seconds: float = 600.0) -> None:
        if not seconds > 0:
            raise ValueError(f"--upload-seconds must be above 0, got {seconds:g}")
        self._parent = url.rpartition("/")[0]
        self._files = files
        self._seconds = seconds
        self._folder = files.out.parent
        self._uploaded: dict[str, tuple[int, int] | None] = {}  # size and time of what is there; None if unknown
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._upload_at_intervals, name="uploading", daemon=True)
        scheme, _, path = url.partition("://")
        if scheme in SCHEMES:  # a bucket or repository that does not exist is found before hours of work
            look_up(f"{scheme}://{'/'.join(path.split('/')[: 3 if scheme == 'hf' else 1])}")

    def __enter__(self) -> "RemoteOutput":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        try:
            self.upload()
        except RemoteError as error:
            raise RemoteError(
                f"{error}. The captions are in {self._files.captions}; run the same command to upload"
            ) from error

    def download(self, *, overwrite: bool = False) -> None:
        """Fetch the files of the run that the store has, where they are ahead of the local ones.

        Args:
            overwrite: fetch only what is missing, since the run starts over.

        Raises:
            RemoteError: the store is not available, or both have captions that the other lacks.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = re.escape(self._files.out.stem)
        pattern = re.compile(rf"{stem}(-\d+-of-\d+)?((\.\d{{5}})?|\.[a-z]+)\.jsonl|{stem}{re.escape(JOB_SUFFIX)}")
        captions = re.compile(rf"{stem}(-\d+-of-\d+)?(\.\d{{5}})?\.jsonl")
        try:
            names = [name_of(one.url) for one in list_folder(self._parent) if not one.is_folder]
        except RemoteError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            names = []
        for name in filter(pattern.fullmatch, names):
            self._download(name, is_captions=captions.fullmatch(name) is not None and not overwrite)

    def _download(self, name: str, *, is_captions: bool) -> None:
        local = self._folder / name
        if self._is_ours(name):
            self._uploaded[name] = None
        if local.exists() and not is_captions:
            return
        fetched = self._folder / f".{name}.fetched"
        store, path = store_of(f"{self._parent}/{name}")
        attempt(f"{self._parent}/{name}", lambda: store.get_file(path, str(fetched)))
        try:
            if not local.exists():
                fetched.replace(local)
            elif _is_prefix(fetched, local):
                pass  # not all of it has been uploaded
            elif _is_prefix(local, fetched):
                fetched.replace(local)
            else:
                raise RemoteError(
                    f"{self._parent}/{name} and its working copy {local} each have captions that the other lacks; "
                    "delete or move one of them"
                )
        finally:
            fetched.unlink(missing_ok=True)

    def upload(self) -> None:
        """Upload what has changed, and delete what this run has deleted; raises RemoteError."""
        found = {}
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and self._is_ours(name):
                found[name] = path
        # The job file first, and the captions before the failures.
        for name in sorted(found, key=lambda name: (not name.endswith(JOB_SUFFIX), ".failed." in name, name)):
            with suppress(FileNotFoundError):  # renamed, since it was full
                self._upload(name, found[name])
        for name in [name for name in self._uploaded if name not in found]:
            store, remote_path = store_of(f"{self._parent}/{name}")
            with suppress(FileNotFoundError):
                store.rm_file(remote_path)
            del self._uploaded[name]

    def _upload(self, name: str, path: Path) -> None:
        state = path.stat()
        version = (state.st_size, state.st_mtime_ns)
        if self._uploaded.get(name) == version:
            return
        snapshot = self._folder / f".{path.name}.upload"
        try:
            shutil.copyfile(path, snapshot)  # the run may be appending; a torn last line is cut off by the next run
            url = f"{self._parent}/{name}"
            store, remote_path = store_of(url)
            if scheme_of(url) in _ATOMIC:
                attempt(url, lambda: store.put_file(str(snapshot), remote_path))
            else:
                store.makedirs(remote_path.rpartition("/")[0], exist_ok=True)
                attempt(url, lambda: store.put_file(str(snapshot), f"{remote_path}.part"))
                attempt(url, lambda: store.mv(f"{remote_path}.part", remote_path))
            self._uploaded[name] = version
        finally:
            snapshot.unlink(missing_ok=True)

    def _is_ours(self, name: str) -> bool:
        """Return whether this process writes a file, rather than another shard."""
        parts = name.split("/")
        if any(part.startswith(".") for part in parts) or parts[-1].endswith((".tmp", ".subtitles.jsonl")):
            return False
        return parts[0].startswith(f"{self._files.captions.stem}.") or name == self._files.job.name

    def _upload_at_intervals(self) -> None:
        while not self._is_over.wait(self._seconds):
            try:
                self.upload()
            except (RemoteError, OSError) as error:  # the next one may succeed
                logger.warning("captions are not uploaded now: %s", error)


def _is_prefix(path: Path, other: Path) -> bool:
    """Return whether a file is the beginning of another one, or equal to it."""
    if path.stat().st_size > other.stat().st_size:
        return False
    with path.open("rb") as short, other.open("rb") as long:
        while block := short.read(_BLOCK_BYTES):
            if long.read(len(block)) != block:
                return False
    return True
