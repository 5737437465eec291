"""Secrets: none that is published, none that another program would read differently."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from difyops.checks.looking import UP, quoted
from difyops.core import Deployment
from difyops.doctor import CREDENTIAL, Finding, Registry, fail, ok, warn

check = Registry()

#: Passwords and keys in the example files of Dify's releases, and what people take instead.
PUBLISHED = frozenset(
    (
        "sk-9f73s3ljTXVcMT3Blb3ljTqtsKiGHXVcMT3BlbkFJLK7U",  # SECRET_KEY
        "difyai123456",  # DB_PASSWORD, REDIS_PASSWORD, QDRANT_API_KEY and more
        "dify-sandbox",  # CODE_EXECUTION_API_KEY
        "lYkiYYT6owG+71oLerGzA7GXCgOT++6ovaezWAjpCjf+Sjc3ZtU+qUEi",  # PLUGIN_DAEMON_KEY
        "QaHbTe77CtuXmsfyhR7+vRjI/+XbV1AaFy691iy+kGDv2Jvy0/eAh8Y1",  # INNER_API_KEY
        "WVF5YThaHlkYwhGUSmCRgsX3tD5ngdN8pkih",  # WEAVIATE_API_KEY
        "Qazwsxedc!@#123",  # OPENSEARCH_INITIAL_ADMIN_PASSWORD
        *("minioadmin", "Milvus", "elastic", "lindorm", "difyai", "difypassword", "testpassword"),
        *("dify", "postgres", "password", "admin", "changeme", "12345678", "123456"),
    )
)
#: Others chose it, and its length with it.
_THEIRS = "EXTERNAL_MODEL_API_KEY"
_SHORT = 12


@check(
    "secrets.default",
    why="who knows a published default gets in",
    upstream=("dify#34321", "dify#41750"),
    preflight=True,
    answers=("fail", "warn"),
)
def default(deployment: Deployment) -> Finding:
    own = {name: deployment.secrets[name].reveal() for name in deployment.secrets.names()}
    given = {
        name: value
        for name, value in deployment.settings.dify.env.items()
        if CREDENTIAL.search(name)
    }
    public = sorted(name for name, value in own.items() if value in PUBLISHED)
    if public:
        return fail(f"published default in {', '.join(public)}", replace(deployment, public[0]))
    public = sorted(name for name, value in given.items() if value in PUBLISHED)
    if public:
        return fail(
            f"published default in dify.env: {', '.join(public)}",
            f"put another value there (openssl rand -hex 16), then: {UP}",
        )
    short = sorted(n for n, v in own.items() if len(v) < _SHORT and n != _THEIRS)
    if short:
        return warn(
            f"shorter than {_SHORT} characters: {', '.join(short)}", replace(deployment, short[0])
        )
    return ok(f"{len(own)} of our own")


def replace(deployment: Deployment, name: str) -> str:
    """The command that gives a secret a new value, everywhere it is known."""
    path = quoted(deployment.secrets.path)
    new = f'sed -i "s/^{name}=.*/{name}=$(openssl rand -hex 16)/" {path}'
    settings = deployment.settings
    theirs = {
        "DIFY_DB_PASSWORD": settings.postgres.provider == "external",
        "REDIS_PASSWORD": settings.redis.provider == "external",
        _THEIRS: True,
    }
    if theirs.get(name):
        return f"change it on that server, then {name} in {path}, then: {UP}"
    if name == "ADMIN_PASSWORD" and deployment.facts.environment:
        return f"change it in Dify (your account there), then {name} in {path}"
    made = (deployment.paths.data / "postgres" / "PG_VERSION").exists()
    if name == "POSTGRES_SUPERUSER_PASSWORD" and made:
        return f"{new} && difyops secrets apply"
    return f"{new} && {UP}"


@check(
    "secrets.chars",
    why="a password that one program reads differently keeps another one out",
    upstream=("dify#23035",),
    preflight=True,
)
def chars(deployment: Deployment) -> Finding:
    """Each secret through the parser of everything that will read it, and compared."""
    broken = list(_broken(deployment))
    if not broken:
        return ok("the same in every file and URL")
    name = broken[0][0]
    said = ", ".join(f"{name} {what}" for name, what in broken)
    return fail(said, replace(deployment, name))


def _broken(deployment: Deployment) -> Iterator[tuple[str, str]]:
    misread = list(_misread(deployment))
    if misread:
        yield from misread
        return
    for name in deployment.secrets.names():
        value = deployment.secrets[name].reveal()
        if not _survives_env_file(name, value):
            yield name, "does not survive an env file"
        elif name in ("MODEL_API_KEY", _THEIRS) and not re.fullmatch(r"[!-~]+", value):
            yield name, "cannot stand in an HTTP header"
        elif name == "REDIS_PASSWORD" and not _survives_broker(deployment, value):
            yield name, "does not survive the broker's URL or valkey.conf"


def _misread(deployment: Deployment) -> Iterator[tuple[str, str]]:
    """What stands in secrets.env, against what was read from it: ` #` begins a comment there."""
    text = deployment.secrets.path.read_text(encoding="utf-8")
    for name, raw in re.findall(r"^[ \t]*(?:export[ \t]+)?(\w+)[ \t]*=[ \t]*(.*)$", text, re.M):
        read = deployment.secrets.get(name)
        if read and raw[0] not in "'\"" and raw.strip() != read.reveal():
            yield name, "is cut at the # in secrets.env"


def _survives_env_file(name: str, value: str) -> bool:
    from io import StringIO

    from dotenv import dotenv_values

    from difyops.errors import UsageError
    from difyops.files import dotenv_text

    try:
        text = dotenv_text({name: value})
    except UsageError:
        return False
    return dotenv_values(stream=StringIO(text), interpolate=False).get(name) == value


def _survives_broker(deployment: Deployment, value: str) -> bool:
    from redis.connection import parse_url

    from difyops.secrets import Secret
    from difyops.services import api

    url = api.environment(deployment)["CELERY_BROKER_URL"]
    parse: Callable[[str], dict[str, object]] = parse_url
    if isinstance(url, Secret) and parse(url.reveal()).get("password") != value:
        return False
    # Valkey splits the lines of its configuration at blanks, and takes quotes for its own.
    external = deployment.settings.redis.provider == "external"
    return external or not re.search(r"[\s'\"]", value)
