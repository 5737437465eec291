"""Postgres, as each role that uses it."""

from __future__ import annotations

from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok, warn
from difyops.services import postgres

check = Registry()

_START = "difyops up --source"


@check("pg.up", why="everything that Dify keeps is in Postgres")
def up(deployment: Deployment) -> Finding:
    from difyops.core import NotReady

    try:
        return ok(postgres.ready(deployment))
    except NotReady as reason:
        return fail(str(reason), _START)


@check(
    "pg.version",
    why="dify's migrations fail on Postgres 18",
    upstream=("36907",),
    needs=("pg.up",),
)
def version(deployment: Deployment) -> Finding:
    with _superuser_or_role(deployment) as session:
        number = session.execute("show server_version_num").fetchone()[0]
    low, high = deployment.release.postgres
    major = int(number) // 10_000
    if not low <= major <= high:
        return fail(f"Postgres {major}; {low}-{high} are supported", "set postgres.provider: wheel")
    return ok(f"{major}, supported {low}-{high}")


def _superuser_or_role(deployment: Deployment):  # type: ignore[no-untyped-def]
    external = deployment.settings.postgres.provider == "external"
    return postgres.connect(deployment, role="service" if external else "superuser")


@check(
    "pg.hba",
    why="without a matching pg_hba.conf entry and password, API and worker do not get in",
    upstream=("14567",),
    needs=("pg.up",),
)
def hba(deployment: Deployment) -> Finding:
    import psycopg

    where = postgres.address(deployment)
    for database in dict.fromkeys((where.database, where.vector_database)):
        try:
            postgres.connect(deployment, database=database).close()
        except psycopg.OperationalError as error:
            said = str(error).strip().splitlines()[-1].split("FATAL: ")[-1].strip()
            fix = (
                "difyops secrets apply"
                if "password" in said
                else "difyops render && difyops restart postgres"
            )
            if "does not exist" in said:
                fix = _START
            return fail(f"{where.user}@{database}: {said}", fix)
    return ok(f"{where.user} gets into its databases")


@check(
    "pg.ext",
    why="without uuid-ossp no table, without vector no knowledge base",
    upstream=("40987",),
    needs=("pg.hba",),
)
def extensions(deployment: Deployment) -> Finding:
    where = postgres.address(deployment)
    missing = []
    versions = []
    for database in dict.fromkeys((where.database, where.vector_database)):
        with postgres.connect(deployment, database=database) as session:
            found = dict(session.execute("select extname, extversion from pg_extension").fetchall())
        for name in postgres.extensions_of(where, database):
            if name in found:
                versions.append(f"{name} {found[name]}")
            else:
                missing.append(f"{name} in {database}")
    if missing:
        return fail(f"missing: {', '.join(missing)}", _START)
    return ok(", ".join(versions))


@check(
    "pg.conn",
    why="out of connections, API and worker answer 500",
    upstream=("14567",),
    needs=("pg.hba",),
)
def connections(deployment: Deployment) -> Finding:
    with postgres.connect(deployment) as session:
        used, most = session.execute(
            "select count(*), current_setting('max_connections')::int from pg_stat_activity"
            " where backend_type = 'client backend'"
        ).fetchone()
    said = f"{used} of {most} used"
    if used > 0.9 * most:
        return fail(said, "see who holds them: pg_stat_activity; raise max_connections")
    if most < 100 or used > 0.7 * most:
        return warn(said, "raise max_connections in etc/postgresql.conf to 200, then restart")
    return ok(said)
