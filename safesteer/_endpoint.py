"""Requests to an OpenAI-compatible endpoint: a key that is kept nowhere, and patience.

Busy or failing servers (429, 5xx, no connection, timeouts) are asked again, after what the server says
or twice as long each time.
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
    """Where to ask. The key is read from the environment variable `key_variable` when it is needed."""

    url: str  # up to and with /v1
    model: str
    key_variable: str = "OPENAI_API_KEY"
    at_once: int = 4
    retries: int = 5
    timeout_s: float = 60.0
    wait_s: float = 1.0

    def ask_all(self, path: str, bodies: Sequence[dict]) -> list[Any]:
        """Answers in the order of the requests, `at_once` of them under way."""
        with httpx.Client(timeout=self.timeout_s) as client, ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(lambda body: self._ask(client, path, body), bodies))

    def unlike(self) -> SafeSteerError:
        """The error for an answer of another shape."""
        return SafeSteerError(f"{self.url} does not answer as an OpenAI-compatible endpoint does.")

    def _ask(self, client: httpx.Client, path: str, body: dict) -> Any:
        key = os.environ.get(self.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        wait, problem = self.wait_s, ""
        for attempt in range(self.retries + 1):
            try:
                got = client.post(
                    f"{self.url.rstrip('/')}/{path}", json={"model": self.model, **body}, headers=headers
                )
            except httpx.HTTPError as error:
                problem = type(error).__name__
            else:
                if got.status_code == 200:
                    try:
                        return got.json()
                    except ValueError as error:
                        raise self.unlike() from error
                problem = f"status {got.status_code}"
                if got.status_code != 429 and got.status_code < 500:
                    break
                after = got.headers.get("retry-after", "")
                wait = float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else wait
            if attempt < self.retries:
                time.sleep(wait)
                wait *= 2
        raise SafeSteerError(f"{self.url} does not answer ({problem}): see its log, or retry.")
