"""Replies of a language model on disk, so that no request is paid for twice."""

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from salmonn.score.llm_protocol import LLMResponse

_CACHE_FORMAT = 1


class ResponseCache:
    """Replies by request hash in an SQLite file. Threads and processes may share it; a kill loses no finished reply.

    The hash is of the model's name and of all that it is sent, and not of its address: a server that moves to another
    one is not paid again. So two models need two names, or two files.

    Args:
        path: SQLite file, created if missing.

    Raises:
        ValueError: the file is not a cache of this format.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._path = path
        # The default rollback journal, because write-ahead logs do not work on network file systems.
        self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        if self._format() != _CACHE_FORMAT:
            self._execute("BEGIN IMMEDIATE")  # other processes may be creating the same file
            if self._format() != _CACHE_FORMAT and self._execute("SELECT 1 FROM sqlite_master"):
                self._connection.close()
                raise ValueError(f"{path} is not a reply cache of format {_CACHE_FORMAT}: pass another file as --cache")
            self._execute(
                "CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, model TEXT, request TEXT, reply TEXT, "
                "is_truncated INTEGER, num_tokens INTEGER, date TEXT DEFAULT CURRENT_TIMESTAMP)"
            )
            self._execute(f"PRAGMA user_version = {_CACHE_FORMAT}")
            self._execute("COMMIT")

    def get(self, key: str) -> LLMResponse | None:
        """Return the reply to a request, or None if it is not cached."""
        rows = self._execute("SELECT reply, is_truncated, num_tokens FROM responses WHERE key = ?", (key,))
        return next((LLMResponse(text, bool(is_truncated), number) for text, is_truncated, number in rows), None)

    def put(self, key: str, response: LLMResponse, *, model: str, request: object) -> None:
        """Store a reply; the model with its address, and the request, are for people who read the file."""
        self._execute(
            "INSERT OR REPLACE INTO responses (key, model, request, reply, is_truncated, num_tokens) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                key,
                model,
                json.dumps(request, ensure_ascii=False),
                response.text,
                response.is_truncated,
                response.num_tokens,
            ),
        )

    def _format(self) -> int:
        return int(self._execute("PRAGMA user_version")[0][0])

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            # All rows are read under the lock: an open cursor of one thread would hold a read lock on the file, and
            # SQLite refuses another thread's write at once, without the timeout, if another process waits to write.
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(
                f"{self._path} cannot be used as reply cache ({error}): pass another file as --cache"
            ) from error
