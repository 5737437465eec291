"""What counts as this machine."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from difyops.loopback import is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.2.1", "::1"])
def test_this_machine(host: str) -> None:
    assert is_loopback(host)
    bracketed = f"[{host}]" if ":" in host else host
    assert is_loopback(urlsplit(f"http://{bracketed.upper()}:8090/v1").hostname)


@pytest.mark.parametrize(
    "host",
    [None, "", "0.0.0.0", "::", "10.0.0.5", "127.0.0.1.example.org", "localhost.example.org"],  # noqa: S104
)
def test_elsewhere_or_everywhere(host: str | None) -> None:
    assert not is_loopback(host)
