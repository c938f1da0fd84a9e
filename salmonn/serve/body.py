"""Read the JSON body of a request without holding the files in it in memory.

A file may be a string of hundreds of megabytes of base64. Such strings are decoded into files while they arrive, and
a short reference takes the place of each in the text that is parsed.
"""

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salmonn.caption.processor import MAX_CONVERSATION_CHARS
from salmonn.serve.fetch import SourceError, TooLargeError
from salmonn.serve.sources import Base64File, split_data_url

# Longer than any text that is accepted: a character takes up to 12 bytes, as two escape sequences.
LONG_STRING_BYTES = 12 * MAX_CONVERSATION_CHARS
MAX_TEXT_BYTES = 2 * LONG_STRING_BYTES  # of a body without its long strings
# A part of a string: up to its end, or up to an escape sequence that is incomplete. One that its string's end cuts off
# is wrong, and not incomplete: the rest of the body would otherwise be kept in memory as the start of its end.
_STRING_PART = re.compile(rb'[^"\\]*+(?:\\(?:u[^"]{4}|u(?=[^"]{0,3}")|[^u])[^"\\]*+)*+')


@dataclass(frozen=True)
class StringFile:
    """The file that a long string was decoded into.

    Args:
        path: path of the file.
        num_bytes: its size.
        error: why there is no such file: the string is not base64.
    """

    path: Path
    num_bytes: int
    error: SourceError | None = None


@dataclass(frozen=True)
class Body:
    """The body of a request.

    Args:
        text: JSON, with references instead of long strings.
        files: the long strings by reference.
    """

    text: bytes
    files: dict[str, StringFile] = field(default_factory=dict)

    def check_references(self, used: str) -> None:
        """Raise a TooLargeError if the text has a reference other than `used`: a long string that is not a file."""
        if set(self.files) - {used}:
            self._check_value(json.loads(self.text), used, "")

    def _check_value(self, value: Any, used: str, where: str) -> None:
        if isinstance(value, str) and value != used and value in self.files:
            limit = f"the maximum is {LONG_STRING_BYTES:,} bytes for text"
            raise TooLargeError(f"{where or 'the body'}: the string is too long, and no file's data; {limit}")
        if isinstance(value, dict):
            for name, inner in value.items():
                self._check_value(name, used, where)
                self._check_value(inner, used, f"{where}.{name[:60]}".removeprefix("."))
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                self._check_value(inner, used, f"{where}[{number}]")


class _LongString:
    """A long string, which is decoded part by part; after an error, the rest of it is skipped."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._file = Base64File(path, max_bytes=max_bytes)
        self._error: SourceError | None = None

    def add(self, part: bytes, *, is_first: bool = False, is_last: bool = False) -> None:
        if self._error is not None:
            return
        try:
            text = json.loads(b'"%b"' % part) if b"\\" in part else part.decode("ascii")
            if is_first and text[:5].lower() == "data:":
                text = split_data_url(text)
            self._file.write(text, is_last=is_last)
        except TooLargeError:
            raise
        except SourceError as error:
            self._error = error
        except ValueError as error:  # of JSON, or of the encoding
            self._error = SourceError(f"the file's data is not valid base64: {error}")
        if self._error is not None:
            self._file.remove()

    def end(self) -> StringFile:
        self.add(b"", is_last=True)
        return StringFile(self._file.path, self._file.num_bytes, self._error)

    def close(self) -> None:
        self._file.remove()


class BodyScanner:
    """A JSON text that arrives in parts, whose long strings are decoded from base64 into files.

    Only strings are looked at: whether the text is valid JSON shows when it is parsed.

    Args:
        make_folder: returns the folder for the files.
        max_bytes: maximum size of a file.
    """

    def __init__(self, make_folder: Callable[[], Path], *, max_bytes: int) -> None:
        self._make_folder = make_folder
        self._max_bytes = max_bytes
        self._secret = secrets.token_hex(16)  # so that no client can write a reference
        self._text = bytearray()
        self._files: dict[str, StringFile] = {}
        self._incomplete = b""  # an escape sequence whose end has not arrived
        self._is_in_string = False
        self._string = bytearray()  # the string so far, until it is long
        self._long: _LongString | None = None  # the string so far, once it is long

    def feed(self, data: bytes) -> None:
        """Add the next part of the text.

        Raises:
            TooLargeError: a file, or the text without files, is larger than the maximum.
            OSError: a file cannot be written.
        """
        data, position = self._incomplete + data, 0
        self._incomplete = b""
        while position < len(data):
            if not self._is_in_string:
                end = data.find(b'"', position) + 1 or len(data)
                self._text += data[position:end]
                self._is_in_string = data.endswith(b'"', position, end)
            else:
                match = _STRING_PART.match(data, position)
                assert match is not None  # it may be empty
                end = match.end()
                self._add(data[position:end])
                if data.startswith(b"\\", end):
                    self._incomplete = data[end:]
                    break
                if end < len(data):
                    end += 1
                    self._end_string()
            if len(self._text) > MAX_TEXT_BYTES:
                raise TooLargeError(f"the request has more than {MAX_TEXT_BYTES:,} bytes in addition to its file")
            position = end

    def _add(self, part: bytes) -> None:
        """Add a part of a string."""
        if self._long is not None:
            self._long.add(part)
            return
        self._string += part
        if len(self._string) > LONG_STRING_BYTES:
            path = self._make_folder() / f"string-{len(self._files)}"
            self._long = _LongString(path, max_bytes=self._max_bytes)
            self._long.add(bytes(self._string), is_first=True)
            self._string.clear()

    def _end_string(self) -> None:
        """Put a string, or the reference to its file, into the text."""
        self._is_in_string = False
        if self._long is not None:
            reference = f"string:{self._secret}:{len(self._files)}"
            self._files[reference] = self._long.end()
            self._string += reference.encode()
            self._long = None
        self._text += self._string + b'"'
        self._string.clear()

    def finish(self) -> Body:
        """Return the body."""
        self.close()
        return Body(bytes(self._text + self._string + self._incomplete), self._files)

    def close(self) -> None:
        """Remove the file of a string that has not ended."""
        if self._long is not None:
            self._long.close()
