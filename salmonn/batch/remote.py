"""Files on object stores, web servers and the Hugging Face Hub: list them, look them up, and explain what fails.

fsspec opens them: `s3://` with s3fs, `gs://` with gcsfs, `http(s)://` with aiohttp, `hf://` with huggingface_hub.
"""

import re
import string
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote_plus

from salmonn.media.clip import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from salmonn.records import Failure

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

# Schemes, and the package that each needs. fsspec knows further ones, such as sftp and az.
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
LOCAL_PREFIX = "file://"
ATTEMPTS = 3
LOOKUPS_AHEAD = 32  # of the files in a list that are looked up at the same time
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or run `aws configure`; for a public bucket set "
    "FSSPEC_S3_ANON=true",
    "gs": "run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "run `hf auth login` or set HF_TOKEN, and accept the terms of a gated repository on its page",
}
_DENIED_NAMES = {"NoCredentialsError", "PartialCredentialsError", "GatedRepoError", "DefaultCredentialsError"}
_MISSING_NAMES = {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "NoSuchBucket"}
# Query parameters of HTTP URLs: signatures of S3, CloudFront, Google, Azure, Alibaba, Tencent and Akamai, and secrets.
_SIGNATURE = re.compile(
    r"signature|sig|(aws|oss)accesskeyid|googleaccessid|security-token|key-pair-id|hmac|hdnts|hdnea|__token__|__gda__|"
    r"(x-amz|x-goog|x-oss|x-obs|x-cos-security)-.*|q-(sign-.*|ak|key-time|header-list|url-param-list|signature)|"
    r"password|secret|api[_-]?key",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"token|(access|auth)_?token|auth|jwt", re.IGNORECASE)
# Parameters that belong to one of these three, and otherwise may be the server's own.
_WITH_OTHERS = re.compile(r"signature|sig|token", re.IGNORECASE)
_OTHERS = re.compile(
    r"expires|expiry|exp|policy|hash-algorithm|token_path|"
    r"sv|ss|srt|sp|se|st|spr|sip|si|sr|skoid|sktid|skt|ske|sks|skv|sdd|saoid|suoid|scid|ses",
    re.IGNORECASE,
)
_HASHED = "hash-"


@dataclass(frozen=True)
class RemoteFile:
    """A file or folder on a remote store.

    Args:
        url: its URL.
        is_folder: whether it is a folder, or a prefix of an object store.
        size_bytes, modified_ns, etag: its version, as in `Caption`: the time only where the store reports no ETag.
    """

    url: str
    is_folder: bool = False
    size_bytes: int | None = None
    modified_ns: int | None = None
    etag: str | None = None


class RemoteError(ValueError):
    """A remote file is not available; the message says why and what to do."""


def is_url(path: str) -> bool:
    """Return whether a path is a URL of a remote file."""
    return _SCHEME.match(path) is not None and not path.startswith(LOCAL_PREFIX)


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case."""
    match = _SCHEME.match(url)
    assert match is not None
    return match[1].lower()


def name_of(url: str) -> str:
    """Return the file name at the end of a URL, without the query of an HTTP URL."""
    path = re.split(r"[?#]", url)[0] if scheme_of(url) in ("http", "https") else url
    return path.rstrip("/").rpartition("/")[2]


def without_secrets(url: str) -> str:
    """Return a URL as it is recorded: without user, password, and the parameters of signatures and access tokens.

    So a newly signed URL names the same video. Where an HTTP URL does not end in the name of a video, an access token
    may be all that distinguishes two videos, and its hash remains. Paths that are not URLs stay as they are.
    """
    if not is_url(url):
        return url
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in ("http", "https"):
        host, slash, path = rest.partition("/")
        user, at, host = host.rpartition("@")
        return f"{scheme}://{user.partition(':')[0]}{at}{host}{slash}{path}"
    address, hash_sign, fragment = rest.partition("#")
    address, question, query = address.partition("?")
    host, slash, path = address.partition("/")
    fields = [(unquote_plus(one.partition("=")[0]), one) for one in query.split("&")]
    has_others = any(_WITH_OTHERS.fullmatch(name) for name, _ in fields)
    suffix = f".{path.rpartition('/')[2].rpartition('.')[2].lower()}"
    is_named = suffix in VIDEO_SUFFIXES | AUDIO_SUFFIXES | {".tar", ".parquet"}
    kept = []
    for name, field in fields:
        if _TOKEN.fullmatch(name):
            kept += [] if is_named else [_hash_value(field)]
        elif not (_SIGNATURE.fullmatch(name) or (has_others and _OTHERS.fullmatch(name))):
            kept.append(field)
    query = question + "&".join(kept) if kept else ""
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{query}{hash_sign}{fragment}"


def _hash_value(field: str) -> str:
    name, _, value = field.partition("=")
    if re.fullmatch(rf"{_HASHED}[0-9a-f]{{16}}", value):
        return field
    return f"{name}={_HASHED}{blake2b(value.encode(errors='surrogateescape'), digest_size=8).hexdigest()}"


def redact(text: str, url: str = "") -> str:
    """Return a message with its URLs, among them `url`, as they are recorded; see `without_secrets`."""
    if url:
        text = text.replace(url, without_secrets(url))
    return re.sub(r"(https?://[^\s'\"<>]+?)(?=[:;,.)]*(?:[\s'\"<>]|$))", lambda found: without_secrets(found[1]), text)


@lru_cache
def filesystem(scheme: str) -> "AbstractFileSystem":
    """Return the file system of a scheme, which always asks the store: a long run must see what changes.

    Raises:
        RemoteError: the scheme is unknown, or its package is not installed.
    """
    import fsspec  # noqa: PLC0415 - only for remote files

    package = SCHEMES.get(scheme, "")
    if package and find_spec(package) is None:
        extra = "gcs" if package == "gcsfs" else "remote"
        raise RemoteError(f"{scheme}:// needs {package}: pip install 'salmonn[{extra}]' or pip install {package}")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout  # noqa: PLC0415 - an extra

        # Without a limit on the total time, which `Fetcher` has.
        options |= {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
        options["encoded"] = True  # see `store_of`
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise RemoteError(f"{scheme}:// needs another package ({error})") from error
    except ValueError as error:
        known = ", ".join(f"{name}:// (package {package})" for name, package in SCHEMES.items())
        raise RemoteError(f"{scheme}:// is not a known URL scheme; use one of {known}") from error


def store_of(url: str) -> tuple["AbstractFileSystem", str]:
    """Return the file system of a URL, and its path there; raises RemoteError."""
    scheme = scheme_of(url)
    store = filesystem(scheme)
    if scheme in ("http", "https"):  # signed URLs stay as they are; a list may have spaces and letters of any script
        return store, quote(url, safe=string.ascii_letters + string.digits + string.punctuation)
    return store, store._strip_protocol(url)


def explain(url: str, error: BaseException) -> str:
    """Say in one sentence why a remote file is not available, and what to do."""
    error = _origin(error)
    detail = " ".join(redact(str(error), url).split())[:200] or type(error).__name__
    url = without_secrets(url)
    scheme, names = scheme_of(url), {kind.__name__ for kind in type(error).__mro__}
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, PermissionError) or names & _DENIED_NAMES or status in (401, 403):
        bucket = "/".join(url.partition("://")[2].split("/")[: 3 if scheme == "hf" else 1])
        remedy = _CREDENTIALS.get(scheme, "check the URL and its signature or access token, which are not recorded")
        return f"{url}: access to {scheme}://{bucket} was denied ({detail}); {remedy}"
    if isinstance(error, FileNotFoundError) or names & _MISSING_NAMES:
        private = f"; if it is private, {_CREDENTIALS['hf']}" if scheme == "hf" else ""
        return f"{url}: there is no such file or folder; check the URL{private}"
    return f"{url}: the store cannot be read ({detail}); check the connection and retry with --retry-failed"


def _origin(error: BaseException) -> BaseException:
    """Return the error that a store reported: for web files, fsspec reports every error as a missing file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        return error if getattr(cause, "status", None) in (404, 410) else cause or error
    return error


def attempt(url: str, call: Callable[[], T]) -> T:
    """Call a function that asks a store, up to three times if the error may be temporary; raises RemoteError."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential  # noqa: PLC0415 - as fsspec

    def may_pass(error: BaseException) -> bool:
        lasting = (FileNotFoundError, IsADirectoryError, PermissionError, ValueError, ImportError)
        error = _origin(error)
        names = {kind.__name__ for kind in type(error).__mro__}
        if (status := getattr(error, "status", None)) is not None:  # of a web server
            return status == 429 or status >= 500
        return isinstance(error, Exception) and not (
            isinstance(error, lasting) or names & (_DENIED_NAMES | _MISSING_NAMES)
        )

    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=0.25, max=10),
        retry=retry_if_exception(may_pass),
        reraise=True,
    )
    try:
        return retrying(call)
    except RemoteError:
        raise
    except Exception as error:
        raise RemoteError(explain(url, error)) from error


def look_up(url: str) -> RemoteFile:
    """Return what a URL stands for; raises RemoteError."""
    store, path = store_of(url)
    return _remote_file(url, attempt(url, lambda: store.info(path)))


def list_folder(url: str) -> list[RemoteFile]:
    """List a remote folder, sorted by name; raises RemoteError."""
    store, path = store_of(url)
    # huggingface_hub keeps the listings of a repository whatever it is asked.
    options = {"refresh": True} if scheme_of(url) == "hf" else {}
    entries = attempt(url, lambda: store.ls(path, detail=True, **options))
    names = ((entry, entry["name"].rstrip("/").rpartition("/")[2]) for entry in entries)
    inside = [(entry, name) for entry, name in names if name and entry["name"].rstrip("/") != path.rstrip("/")]
    return sorted((_remote_file(f"{url.rstrip('/')}/{name}", one) for one, name in inside), key=lambda one: one.url)


def expand(url: str) -> list[RemoteFile]:
    """Return what a URL stands for: one file or folder, or, for a URL with `*`, the files that match it.

    Raises:
        RemoteError: there is no such file, or the store is not available.
    """
    if "*" not in url or scheme_of(url) in ("http", "https"):
        return [look_up(url)]
    store, path = store_of(url)
    found = attempt(url, lambda: store.glob(path, detail=True))
    if not found:
        raise RemoteError(f"{url}: no file matches this pattern; check it")
    return [_remote_file(store.unstrip_protocol(name), one) for name, one in sorted(found.items())]


def expand_ahead(paths: Iterable[str]) -> Iterator[tuple[str, list[RemoteFile] | Failure | None]]:
    """Yield each path with what it stands for on its store, or None if it is local; URLs are looked up ahead."""
    pending: deque[tuple[str, Future[list[RemoteFile]] | None]] = deque()
    paths = iter(paths)
    with ThreadPoolExecutor(LOOKUPS_AHEAD, thread_name_prefix="looking up") as threads:
        try:
            while True:
                # Nothing is taken ahead of a local path: a list may come through a slow pipe.
                if not pending or pending[0][1] is not None:
                    for path in islice(paths, LOOKUPS_AHEAD - len(pending)):
                        pending.append((path, threads.submit(expand, path) if is_url(path) else None))
                        if pending[0][1] is None:
                            break
                if not pending:
                    return
                path, future = pending.popleft()
                try:
                    yield path, None if future is None else future.result()
                except RemoteError as error:
                    yield path, Failure(without_secrets(path), redact(str(error), path))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand `{000..099}` and `{a,b}` as a shell does; other braces stay as they are."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    if match[1] is not None:
        first, last = int(match[1]), int(match[2])
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        width = max(len(match[1]), len(match[2])) if "0" in (match[1][0], match[2][0]) else 0
        choices: Iterable[str] = (f"{number:0{width}d}" for number in numbers)
    else:
        choices = match[3].split(",")
    tails = list(expand_braces(pattern[match.end() :]))
    yield from chain.from_iterable((pattern[: match.start()] + one + tail for tail in tails) for one in choices)


def _remote_file(url: str, info: dict[str, Any]) -> RemoteFile:
    """Convert what a store reports about a file; stores use different names."""
    if info.get("type") == "directory":
        return RemoteFile(url, is_folder=True)
    lfs = info.get("lfs") or {}
    etag = _first(info, ("ETag", "etag", "xet_hash"))
    etag = etag or lfs.get("sha256") or _first(info, ("blob_id", "Content-MD5", "md5Hash", "Last-Modified"))
    time = _first(info, ("LastModified", "last_modified", "mtime", "updated", "created")) if etag is None else None
    if isinstance(time, datetime):
        time = time.timestamp()
    modified_ns = int(time * 1e9) if isinstance(time, int | float) else None
    size = info.get("size")
    version = etag or (time if isinstance(time, str) else None)
    if version is not None and str(version).startswith('"'):  # weak ETags, W/"...", stay as they are
        version = version.strip('"')
    return RemoteFile(url, False, None if size is None else int(size), modified_ns, version)


def _first(info: dict[str, Any], names: Sequence[str]) -> Any:
    return next((info[name] for name in names if info.get(name)), None)
