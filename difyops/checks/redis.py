"""Valkey or Redis."""

from __future__ import annotations

from difyops.core import Deployment, NotReady
from difyops.doctor import Finding, Registry, fail, ok, warn
from difyops.services import valkey

check = Registry()


@check("redis.up", why="it is Dify's cache, its locks, and the broker of every background task")
def up(deployment: Deployment) -> Finding:
    try:
        return ok(valkey.ready(deployment))
    except NotReady as reason:
        return fail(str(reason), "difyops up --source")


@check("redis.durable", why="queued tasks must survive a crash", needs=("redis.up",))
def durable(deployment: Deployment) -> Finding:
    about = valkey.client(deployment).info("persistence")
    if not int(about.get("aof_enabled", 0)):
        return warn(
            "the append-only file is off: a crash loses queued tasks",
            "set appendonly yes in the server's configuration",
        )
    if about.get("aof_last_write_status") != "ok":
        return fail("its append-only file cannot be written", "free space on its disk")
    return ok("append-only file on")


@check(
    "redis.password",
    why="who reaches an open broker runs code in the worker",
    needs=("redis.up",),
)
def password(deployment: Deployment) -> Finding:
    import redis

    session = valkey.connect(deployment, valkey.CACHE_DB, None)
    try:
        session.ping()
    except redis.AuthenticationError:
        return ok("asks for a password")
    return fail(
        "answers without a password", "set requirepass there, and REDIS_PASSWORD in secrets.env"
    )
