"""Requests and tokens that a run spends on servers, and their caps."""

import threading
from dataclasses import dataclass


@dataclass
class Spending:
    """Requests to a server, retries included, and their tokens by its count."""

    requests: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.requests} request{'' if self.requests == 1 else 's'}, {self.tokens} tokens"


class Budget:
    """Requests and tokens that all clients of a run may use together; threads may share it.

    Args:
        max_requests, max_tokens: the caps; None for none.
        token_cap_flag: flag that sets `max_tokens`.

    Attributes:
        spent: requests and tokens by model and server.
    """

    def __init__(
        self, max_requests: int | None = None, max_tokens: int | None = None, *, token_cap_flag: str = "--max-tokens"
    ) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.token_cap_flag = token_cap_flag
        self.spent: dict[str, Spending] = {}
        self._lock = threading.Lock()

    def take_request(self, name: str) -> str:
        """Count a request to a model on a server; return which cap forbids it instead, "" if none does."""
        with self._lock:
            for cap, spent, unit, flag in (
                (self.max_requests, sum(one.requests for one in self.spent.values()), "requests", "--max-requests"),
                (self.max_tokens, sum(one.tokens for one in self.spent.values()), "tokens", self.token_cap_flag),
            ):
                if cap is not None and spent >= cap:
                    return (
                        f"the cap of {cap} {unit} is reached ({self._describe()} in this run). {{saved}}; run the same "
                        f"command again to resume with {cap} more {unit}, or raise {flag}"
                    )
            self.spent.setdefault(name, Spending()).requests += 1
        return ""

    def add_tokens(self, name: str, num_tokens: int) -> None:
        """Count the tokens of a reply."""
        with self._lock:
            self.spent.setdefault(name, Spending()).tokens += num_tokens

    def describe(self) -> str:
        """Return what was spent, by model and server; "" if nothing was."""
        with self._lock:
            return "; ".join(f"{spent} by {name}" for name, spent in self.spent.items())

    def _describe(self) -> str:
        if len(self.spent) > 1:
            return "; ".join(f"{spent} by {name}" for name, spent in self.spent.items())
        return str(next(iter(self.spent.values()), Spending()))
