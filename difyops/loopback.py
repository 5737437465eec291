"""What runs on this machine: which hosts these are, and HTTP past the proxy of the shell that
difyops was started from."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests


def is_loopback(host: str | None) -> bool:
    """Whether `host`, as `urlsplit(url).hostname` gives it, is reached only from this machine. Of
    names, that is `localhost` alone: none is looked up."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def get(url: str, seconds: float = 3) -> requests.Response:
    """Raises requests.RequestException."""
    import requests

    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=seconds)
