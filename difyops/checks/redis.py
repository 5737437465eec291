"""Valkey or Redis."""

from __future__ import annotations

from difyops.checks.looking import UP, again, quoted
from difyops.core import Deployment, NotReady
from difyops.doctor import Finding, Registry, fail, ok, skip, warn
from difyops.services import valkey

check = Registry()


def _external(deployment: Deployment) -> bool:
    return deployment.settings.redis.provider == "external"


@check("redis.up", why="it is Dify's cache, its locks, and the broker of every background task")
def up(deployment: Deployment) -> Finding:
    try:
        return ok(valkey.ready(deployment))
    except NotReady as reason:
        fix = f"start that server, or mend redis.url in difyops.yaml; then: {UP}"
        return fail(str(reason), fix if _external(deployment) else UP)


@check(
    "redis.durable",
    why="queued tasks must survive a crash, and a full memory",
    needs=("redis.up",),
    answers=("fail", "warn"),
)
def durable(deployment: Deployment) -> Finding:
    import redis

    try:
        with valkey.client(deployment) as session:
            about = {**session.info("persistence"), **session.info("memory")}
    except redis.ResponseError as error:
        return skip(f"the server does not let us ask: {error}")
    there = "on that server"
    fix = f"{there}: CONFIG SET" if _external(deployment) else again(deployment, "valkey")
    if about.get("aof_last_write_status", "ok") != "ok":
        return fail(
            "its append-only file cannot be written",
            f"free space there: df -h {quoted(deployment.paths.data)}",
        )
    if not int(about.get("aof_enabled", 0)):
        return warn(
            "the append-only file is off: a crash loses queued tasks",
            f"{fix} appendonly yes" if _external(deployment) else fix,
        )
    policy = about.get("maxmemory_policy", "noeviction")
    if int(about.get("maxmemory", 0)) and policy != "noeviction":
        return warn(
            f"maxmemory-policy {policy}: queued tasks are thrown away when its memory is full",
            f"{fix} maxmemory-policy noeviction" if _external(deployment) else fix,
        )
    return ok("append-only file on")


@check(
    "redis.password",
    why="who reaches an open broker runs code in the worker",
    needs=("redis.up",),
)
def password(deployment: Deployment) -> Finding:
    import redis

    try:
        with valkey.connect(deployment, valkey.CACHE_DB, None) as session:
            session.ping()
    except redis.AuthenticationError:
        return ok("asks for a password")
    except redis.RedisError as error:
        return skip(f"it did not say: {type(error).__name__}: {error}")
    fix = f"set requirepass there, and REDIS_PASSWORD in {quoted(deployment.secrets.path)}"
    return fail(
        "answers without a password",
        fix if _external(deployment) else again(deployment, "valkey"),
    )
