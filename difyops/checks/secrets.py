"""Secrets: none that is published, none that breaks a URL or an env file."""

from __future__ import annotations

import re

from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok
from difyops.files import digest

check = Registry()

#: SHA-256 prefixes of passwords and keys that Dify's own example files publish, so that they are
#: not repeated here: of the database, the sandbox, the plugin daemon, the vector stores…
PUBLISHED = frozenset(
    digest(value)
    for value in (
        "difyai123456",
        "dify-sandbox",
        "sk-9f73s3ljTXVcMT3Blb3ljTqtsKiGHXVcMT3BlbkFJLK7U",
        "lYkiYYT6owG+71oLerGzA7GXCgOT++6ovaezWAjpCjf+Sjc3ZtU+qUEi",
        "QaHbTe77CtuXmsfyhR7+vRjI/+XbV1AaFy691iy+kGDv2Jvy0/eAh8Y1",
        "WVF5YThaHlkYwhGUSmCRgsX3tD5ngdN8pkih",
        "postgres",
        "password",
    )
)


@check(
    "secrets.default",
    why="who knows a published default gets in",
    upstream=("34321", "41750"),
    preflight=True,
)
def default(deployment: Deployment) -> Finding:
    values = {name: deployment.secrets[name].reveal() for name in deployment.secrets.names()}
    values |= {f"dify.env {k}": v for k, v in deployment.settings.dify.env.items() if v}
    public = sorted(name for name, value in values.items() if digest(value) in PUBLISHED)
    if public:
        return fail(
            f"published default in {', '.join(public)}",
            "replace it (openssl rand -hex 16), then: difyops secrets apply && difyops up --source",
        )
    short = sorted(n for n in deployment.secrets.names() if len(values[n]) < 12)
    if short:
        return fail(f"shorter than 12 characters: {', '.join(short)}", "replace it likewise")
    return ok(f"{len(deployment.secrets.names())} of our own")


@check(
    "secrets.chars",
    why="a password with @, #, % or quotes breaks the broker's URL or an env file",
    upstream=("23035",),
    preflight=True,
)
def chars(deployment: Deployment) -> Finding:
    """Letters, digits and what every URL, env file and configuration passes unquoted."""
    odd = sorted(
        name
        for name in deployment.secrets.names()
        if not re.fullmatch(r"[A-Za-z0-9._~-]+", deployment.secrets[name].reveal())
    )
    if odd:
        return fail(
            f"characters that need quoting in {', '.join(odd)}",
            "use letters, digits, . _ ~ - in secrets.env, then: difyops secrets apply",
        )
    return ok("URL-safe")
