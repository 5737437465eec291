"""Postgres, as each role that uses it."""

from __future__ import annotations

from typing import Any

from difyops.checks.looking import UP, again, quoted
from difyops.core import Deployment, NotReady
from difyops.doctor import Finding, Registry, fail, ok, skip, warn
from difyops.errors import PrerequisiteError
from difyops.services import postgres

check = Registry()

#: API and worker hold about 40 connections each.
_ENOUGH = 100
_FULL = ("too many clients", "remaining connection slots", "too many connections")


def _external(deployment: Deployment) -> bool:
    return deployment.settings.postgres.provider == "external"


@check(
    "pg.binaries",
    why="there is no database without its programs, and dify wants certain versions of them",
    preflight=True,
)
def binaries(deployment: Deployment) -> Finding:
    """What is installed, or could be: nothing is copied."""
    from difyops.services import pg_binaries

    if deployment.settings.postgres.provider == "external":
        return ok(f"external, {postgres.address(deployment).host}")
    return ok(pg_binaries.installed(deployment) or pg_binaries.available(deployment))


@check("pg.up", why="everything that Dify keeps is in Postgres")
def up(deployment: Deployment) -> Finding:
    where = postgres.address(deployment)
    try:
        return ok(postgres.ready(deployment))
    except PrerequisiteError:  # it is up, and of a version of which pg.version tells
        return ok(f"port {where.port}")
    except NotReady as reason:
        said = str(reason)
        if any(word in said for word in _FULL):
            return ok(f"port {where.port}")
        fix = f"start that server, or mend postgres.dsn in difyops.yaml; then: {UP}"
        return fail(said, fix if _external(deployment) else UP)


def _any_role(deployment: Deployment) -> Any:
    """A session as whichever role gets in. Raises psycopg.OperationalError."""
    import psycopg

    if _external(deployment):
        return postgres.connect(deployment)
    try:
        return postgres.connect(deployment, role="superuser")  # has connections kept for it
    except psycopg.OperationalError:
        return postgres.connect(deployment)


@check(
    "pg.conn",
    why="out of connections, API and worker answer 500",
    upstream=("dify#14567",),
    needs=("pg.up",),
    answers=("fail", "warn"),
)
def connections(deployment: Deployment) -> Finding:
    import psycopg

    conf = quoted(deployment.paths.etc / "postgresql.conf")
    fix = f"sed -i 's/^max_connections.*/max_connections = 400/' {conf} && difyops restart postgres"
    if _external(deployment):
        fix = "there: ALTER SYSTEM SET max_connections = 200; then restart that server"
    try:
        with _any_role(deployment) as session:
            used, most = session.execute(
                "select count(*), current_setting('max_connections')::int from pg_stat_activity"
                " where backend_type = 'client backend'"
            ).fetchone()
            held = session.execute(
                "select coalesce(nullif(application_name, ''), usename), count(*)"
                " from pg_stat_activity where backend_type = 'client backend'"
                " group by 1 order by 2 desc limit 3"
            ).fetchall()
    except psycopg.OperationalError as error:
        if any(word in str(error) for word in _FULL):
            return fail(_said(error), fix)
        return skip(f"no role gets in: {_said(error)}")
    said = f"{used} of {most} used"
    who = ", ".join(f"{name} {count}" for name, count in held)
    if used > 0.9 * most:
        return fail(f"{said} ({who})", fix)
    if used > 0.7 * most:
        return warn(f"{said} ({who})", fix)
    if most < _ENOUGH:
        return warn(f"{said}; API and worker may want {_ENOUGH}", fix)
    return ok(said)


@check(
    "pg.version",
    why="dify's migrations fail on Postgres 18",
    upstream=("dify#36907",),
    needs=("pg.up",),
)
def version(deployment: Deployment) -> Finding:
    import psycopg

    try:
        with _any_role(deployment) as session:
            number = session.execute("show server_version_num").fetchone()[0]
    except psycopg.OperationalError as error:
        return skip(f"no role gets in: {_said(error)}")
    low, high = deployment.release.postgres
    major = int(number) // 10_000
    if not low <= major <= high:
        return fail(
            f"Postgres {major}; dify {deployment.release.version} works with {low}-{high}",
            f"set postgres.provider: wheel in difyops.yaml, then: {UP} (data is not moved)",
        )
    return ok(f"{major}, supported {low}-{high}")


@check(
    "pg.hba",
    why="without a matching pg_hba.conf entry and password, API and worker do not get in",
    upstream=("dify#14567",),
    needs=("pg.up",),
)
def hba(deployment: Deployment) -> Finding:
    """Every role into every database it uses."""
    import psycopg

    where = postgres.address(deployment)
    roles = [
        ("service", where.user, where.database),
        ("service", where.user, where.vector_database),
    ]
    if not _external(deployment):  # `up` makes roles and databases with it
        roles.insert(0, ("superuser", postgres.SUPERUSER, "postgres"))
    for role, name, database in dict.fromkeys(roles):
        try:
            postgres.connect(deployment, role=role, database=database).close()
        except psycopg.OperationalError as error:
            said = _said(error)
            if any(word in said for word in _FULL):
                return skip(f"out of connections: {said}")
            return fail(f"{name}@{database}: {said}", _entry(deployment, role, said))
    return ok(f"{', '.join(dict.fromkeys(name for _, name, _ in roles))} into their databases")


def _said(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].split("FATAL: ")[-1].strip()


def _entry(deployment: Deployment, role: str, said: str) -> str:
    """What lets a refused role in."""
    where, path = postgres.address(deployment), quoted(deployment.secrets.path)
    if _external(deployment):
        if "password" in said:
            return f"put that server's password for {where.user} into {path}, then: {UP}"
        if "does not exist" in said:
            return f"there: CREATE DATABASE {where.database} OWNER {where.user}; then: {UP}"
        return (
            f"in that server's pg_hba.conf: host {where.database} {where.user} <this machine>/32 "
            "scram-sha-256; then there: SELECT pg_reload_conf();"
        )
    if "password" in said and role == "superuser":
        return "difyops secrets apply"
    # Its own step mends Dify's role and databases, without stopping anything.
    mended = "password" in said or "does not exist" in said
    return UP if mended else again(deployment, "postgres")


@check(
    "pg.ext",
    why="without uuid-ossp no table, without vector no knowledge base",
    upstream=("dify#40987",),
    needs=("pg.hba",),
)
def extensions(deployment: Deployment) -> Finding:
    """The extensions are there, and a function of each works: its library can be missing."""
    import psycopg

    where = postgres.address(deployment)
    missing = []
    versions = []
    for database in dict.fromkeys((where.database, where.vector_database)):
        with postgres.connect(deployment, database=database) as session:
            found = dict(session.execute("select extname, extversion from pg_extension").fetchall())
            for name in postgres.extensions_of(where, database):
                if name not in found:
                    missing.append(f"{name} in {database}")
                    continue
                try:
                    session.execute(_USE[name])
                    versions.append(f"{name} {found[name]}")
                except psycopg.Error as error:
                    missing.append(f"{name} in {database} ({str(error).splitlines()[0]})")
    if not missing:
        return ok(", ".join(versions))
    names = "; ".join(f'CREATE EXTENSION IF NOT EXISTS "{n}"' for n in _USE)
    there = f"as a superuser, in {where.database} there: {names};"
    return fail(f"missing: {', '.join(missing)}", there if _external(deployment) else UP)


_USE = {"uuid-ossp": "select uuid_generate_v4()", "vector": "select '[1,2]'::vector"}
