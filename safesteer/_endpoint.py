"""Requests to an OpenAI-compatible endpoint, with retries; the key is stored nowhere.

A server that is busy or fails (429, 5xx, no connection, timeouts) is asked again with exponential
backoff, or after the time that it names.
"""

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from safesteer._errors import SafeSteerError


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers. The key is read from the environment variable `key_variable` when needed."""

    url: str  # up to and with /v1
    model: str
    key_variable: str = "OPENAI_API_KEY"
    at_once: int = 4  # requests under way
    retries: int = 5
    timeout_s: float = 60.0
    wait_s: float = 1.0  # before the first retry; doubled each time

    def ask_all(self, path: str, bodies: Sequence[dict]) -> list[Any]:
        """Post `bodies` and return the replies in their order: JSON values, or the text of other replies.

        Raises:
            SafeSteerError: Where a request is still without an answer after all retries.
        """
        with httpx.Client(timeout=self.timeout_s) as client, ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(lambda body: self._ask(client, path, body), bodies))

    def unlike(self) -> SafeSteerError:
        """Make the error for replies of another shape."""
        return SafeSteerError(f"{self.url} does not answer as an OpenAI-compatible endpoint does.")

    def _ask(self, client: httpx.Client, path: str, body: dict) -> Any:
        key = os.environ.get(self.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        wait, problem = self.wait_s, ""
        for attempt in range(self.retries + 1):
            try:
                reply = client.post(
                    f"{self.url.rstrip('/')}/{path}", json={"model": self.model, **body}, headers=headers
                )
            except httpx.HTTPError as error:
                problem = type(error).__name__
            else:
                if reply.status_code == 200:
                    try:
                        return reply.json()
                    except ValueError:
                        return reply.text
                problem = f"status {reply.status_code}"
                if reply.status_code != 429 and reply.status_code < 500:
                    break
                after = reply.headers.get("retry-after", "")
                wait = float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else wait
            if attempt < self.retries:
                time.sleep(wait)
                wait *= 2
        raise SafeSteerError(f"{self.url} does not answer ({problem}): see its log, or retry.")
