"""Replies of language models on disk, so that no question is paid for twice: one SQLite file, safe for many writers."""

import json
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LLMResponse:
    """What a model answered.

    Args:
        text: the answer.
        is_cut_off: whether it ran into its token limit.
        num_tokens: of prompt and answer, as the server counts them; None where it does not say.
    """

    text: str
    is_truncated: bool = False
    num_tokens: int | None = None


class ResponseCache:
    """Replies by the hash of what was asked. Threads and processes may share a file; a kill loses no finished reply."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._path = path
        # The default rollback journal, since write-ahead logs do not work on network file systems.
        self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
        self._execute(
            "CREATE TABLE IF NOT EXISTS replies ("
            "key TEXT PRIMARY KEY, judge TEXT, asked TEXT, reply TEXT, is_cut_off INTEGER, num_tokens INTEGER, "
            "date TEXT DEFAULT CURRENT_TIMESTAMP)"
        )

    def find(self, key: str) -> LLMResponse | None:
        """The reply to a question, if it was ever asked."""
        row = self._execute("SELECT reply, is_cut_off, num_tokens FROM replies WHERE key = ?", (key,)).fetchone()
        return LLMResponse(row[0], bool(row[1]), row[2]) if row else None

    def keep(self, key: str, reply: LLMResponse, *, judge: str, asked: object) -> None:
        """Write a reply, beside who was asked what, so that people can read the file too."""
        row = (key, judge, json.dumps(asked, ensure_ascii=False), reply.text, reply.is_truncated, reply.num_tokens)
        columns = "key, judge, asked, reply, is_cut_off, num_tokens"
        self._execute(f"INSERT OR REPLACE INTO replies ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            with self._lock:
                return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise ValueError(
                f"{self._path} cannot be used to keep replies ({error}): give another file by --cache"
            ) from error
