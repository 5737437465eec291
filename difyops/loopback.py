"""HTTP to what runs on this machine, past the proxy of the shell that difyops was started from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests


def get(url: str, seconds: float = 3) -> requests.Response:
    """Raises requests.RequestException."""
    import requests

    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=seconds)
