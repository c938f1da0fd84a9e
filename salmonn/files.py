"""Files of a run: written atomically; records as JSON lines, validated when read."""

import dataclasses
import json
import os
import re
import shutil
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from salmonn.records import Caption, Comparison, Reference

Record = TypeVar("Record")


def write_records(path: Path | str, records: Iterable[Any]) -> None:
    """Write dataclass records as JSONL, atomically."""
    lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in records)
    write_text(path, "".join(line + "\n" for line in lines))


def append_record(path: Path | str, record: Any) -> None:
    """Append one record to a JSONL file and flush it to disk."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path | str, value: Any, *, indent: int | None = 2) -> None:
    """Write one JSON value atomically; with indent None in one line, for large ones."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read one JSON value."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def temporary_path(path: Path) -> Path:
    """Return a hidden name next to `path` for this process, short even if the name of `path` has the maximum length."""
    return path.with_name(f".{blake2b(os.fsencode(path.name), digest_size=8).hexdigest()}.{os.getpid()}.tmp")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, through a temporary name, so that a kill leaves the old or the new file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that is flushed and renamed to `path` if the context ends without an error.

    Raises:
        ValueError: `path` exists and is not an empty folder.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty: choose another folder, or delete that one")
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same id
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed already on success


def read_records(path: Path | str, record_type: type[Record]) -> list[Record]:
    """Read a JSONL file of `record_type`; blank lines are skipped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not JSON, or has a missing, unknown or invalid field; the message names file and line.
    """
    return [record for _, record in iter_numbered_records(path, record_type)]


def iter_numbered_records(
    path: Path | str, record_type: type[Record], *, check: Callable[[Record], None] | None = None
) -> Iterator[tuple[int, Record]]:
    """Yield (line number, record) of a JSONL file; see `read_records`.

    Args:
        path: the file.
        record_type: dataclass of its lines.
        check: raises a ValueError for a record that cannot be used; the message gets file and line.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {problem}: expected a file with JSON lines of {record_type.__name__} records")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Some tools start a file with a byte order mark.
                record = parse_json(line.decode("utf-8-sig").rstrip(), record_type)
                if check:
                    check(record)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text: save the file as UTF-8") from error
            except ValueError as error:
                hint = "; write one object per line, not a list" if line.lstrip().startswith(b"[") else ""
                raise ValueError(f"{path}, line {number}: {error}{hint}") from error
            yield number, record


def parse_record(value: Any, record_type: type[Record]) -> Record:
    """Build a record from parsed JSON; see `parse_json`."""
    return parse_json(json.dumps(value), record_type)


def parse_json(text: str, record_type: type[Record]) -> Record:
    """Build a record from JSON, checking field names and types at all levels.

    Integers are accepted as floats; nothing else is converted. NaN, infinity and unpaired surrogates are refused.

    Raises:
        ValueError: the text is not JSON, or a field is missing, unknown or invalid; the message names it.
    """
    try:
        return _adapter(record_type).validate_json(text)  # type: ignore[arg-type]
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise ValueError("; ".join(_describe_errors(errors, text, record_type)[:3])) from error


@cache
def _adapter(record_type: Any) -> Any:
    for nested in _dataclasses_in(record_type):
        nested.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
    return TypeAdapter(record_type)


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(hint):
        yield hint
        parts: Iterable[Any] = typing.get_type_hints(hint).values()
    else:
        parts = typing.get_args(hint)
    for part in parts:
        yield from _dataclasses_in(part)


def _describe_errors(errors: Sequence[Any], text: str, record_type: type) -> list[str]:
    """Return a message for each of pydantic's errors: the field, what is wrong, and the value."""
    messages: list[str] = []
    for error in errors:
        *outer, last = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]] or [""]
        where, message = record_type.__name__ + "".join(outer), error["msg"].removeprefix("Value error, ")
        if error["type"] == "json_invalid":
            problem = re.sub(r"Invalid JSON: (.*) at line 1 column (\d+)", r"invalid JSON at column \2: \1", message)
            if "hex escape" in problem:
                return [f"{problem} (half of a Unicode character, which cannot be written)"]
            return [f"{problem} (cut off?)" if "EOF" in problem else problem]
        if error["type"] == "unexpected_keyword_argument":
            known = f"; it has {', '.join(field.name for field in dataclasses.fields(record_type))}"
            guess = _guess_type(json.loads(text))
            messages.insert(0, f"unknown field {last[1:]} in {where}{'' if outer else known + guess}")
        elif error["type"] == "missing":
            messages.append(f"{where}{last} is missing")
        elif message.startswith("Input should be "):
            expected = message.removeprefix("Input should be ").replace("an object", "a JSON object")
            messages.append(f"{where}{last} must be {expected}, got {error['input']!r:.80}")
        else:
            messages.append(f"{where}{last}: {message}")
    return messages


def _guess_type(value: dict[str, Any]) -> str:
    """Return a guess of a record's actual type, for error messages."""
    for other, plural in ((Caption, "captions"), (Reference, "references"), (Comparison, "comparisons")):
        names = {field.name for field in dataclasses.fields(other)}
        required = {field.name for field in dataclasses.fields(other) if field.default is dataclasses.MISSING}
        if required <= set(value) <= names:
            return f". These are {plural}: is it the right file?"
    return ". This is a score file: is it the right one?" if "judge_info" in value else ""


def fingerprint_folder(folder: Path) -> str:
    """Hash the configs of a model or an adapter in a folder, and the names, sizes and times of its weights."""
    state = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "adapter_config.json"):
            state.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".pt"):
            found = path.stat()
            state.update(repr((path.name, found.st_size, found.st_mtime_ns)).encode())
    return state.hexdigest()
