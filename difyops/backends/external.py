"""Any OpenAI-compatible server that someone else runs: nothing to start, only a URL to ask."""

from __future__ import annotations

from urllib.parse import urlsplit

from difyops.backends import Backend, Spec, capabilities
from difyops.errors import UsageError


def build(spec: Spec) -> Backend:
    """Raises UsageError for a base URL that is absent or is not http(s)."""
    if spec.base_url is None:
        raise UsageError("external: a base URL is needed", "for example http://gpu-box:8000/v1")
    parts = urlsplit(spec.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"external: {spec.base_url!r} is not an http(s) URL",
            "for example http://gpu-box:8000/v1",
        )
    if parts.username or parts.password:
        raise UsageError("external: a key does not belong in the URL", "give it as the API key")
    return Backend(
        name="external",
        command=(),
        base_url=spec.base_url.rstrip("/"),
        # Servers differ (and gateways have none); describing the models is the common proof.
        health_url=None,
        capabilities=capabilities(spec),
    )
