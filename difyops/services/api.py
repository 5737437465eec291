"""Dify's API: gunicorn in the checkout's api folder, after the migrations."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from difyops import checkout, dify_python, dify_tree, loopback
from difyops.core import Deployment, NotReady, Process, Service, Step
from difyops.errors import PrerequisiteError
from difyops.files import digest
from difyops.identity import as_user
from difyops.secrets import Secret
from difyops.services import postgres, valkey

if TYPE_CHECKING:
    from difyops.steplog import StepLog


def declare(deployment: Deployment) -> Service | None:
    if not deployment.settings.dify.enabled:
        return None
    port = deployment.settings.dify.port
    program, *arguments = deployment.release.api
    return Service(
        "api",
        needs=("postgres", "valkey", "model"),
        port=port,
        address=deployment.settings.dify.url,
        process=process(deployment, program, *arguments, "--bind", f"127.0.0.1:{port}"),
        ready=ready,
        ready_seconds=180,
        install=(
            Step("source", checkout.checkout_done, checkout.checkout_run),
            Step("python", dify_python.environment_done, dify_python.environment_run),
        ),
        prepare=(Step("migrations", migrated, migrate),),
    )


def process(deployment: Deployment, program: str, *arguments: str) -> Process:
    """A program of Dify's environment, in the checkout's api folder, with Dify's settings."""
    paths, version = deployment.paths, deployment.release.version
    return Process(
        argv=(str(paths.dify_python(version).with_name(program)), *arguments),
        cwd=paths.source(version) / "api",
        env=environment(deployment),
        stop_seconds=30,
        settle_seconds=10,
        inputs=digest(f"{deployment.facts.checkout} {deployment.facts.environment}"),
    )


def run_python(
    deployment: Deployment, script: str, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a few lines with the API's interpreter, user and environment (`env` is added to it), for
    at most 30 s. Not in the checkout: an import would find all of Dify there."""
    asked = process(deployment, "python", "-c", script, *arguments)
    user = deployment.user
    return subprocess.run(
        asked.argv,
        env={**asked.plain_env(), **(env or {})},
        cwd="/",
        **as_user(user),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def environment(deployment: Deployment) -> dict[str, str | Secret]:
    """Dify's settings. Every URL comes from the one base URL."""
    settings, paths, secrets = deployment.settings, deployment.paths, deployment.secrets
    database, broker = postgres.address(deployment), valkey.address(deployment)
    base = settings.dify.url
    local = _environment_of_a_process(deployment)
    urls = ("CONSOLE_API_URL", "CONSOLE_WEB_URL", "SERVICE_API_URL", "APP_WEB_URL", "FILES_URL")
    redis_password = secrets["REDIS_PASSWORD"]
    login = f"{quote(broker.user)}:{quote(redis_password.reveal(), safe='')}"
    return {
        **local,
        **dict.fromkeys(urls, base),
        "EDITION": "SELF_HOSTED",
        "DEPLOY_ENV": "PRODUCTION",
        "FLASK_APP": "app.py",
        "LOG_LEVEL": "INFO",
        "CHECK_UPDATE_URL": "",  # no calls home
        "MIGRATION_ENABLED": "false",  # migrations are a step of their own
        "CONSOLE_CORS_ALLOW_ORIGINS": base,
        "WEB_API_CORS_ALLOW_ORIGINS": "*",
        "SECRET_KEY": secrets["SECRET_KEY"],
        "DB_HOST": database.host,
        "DB_PORT": str(database.port),
        "DB_USERNAME": database.user,
        "DB_PASSWORD": secrets["DIFY_DB_PASSWORD"],
        "DB_DATABASE": database.database,
        "REDIS_HOST": broker.host,
        "REDIS_PORT": str(broker.port),
        "REDIS_USERNAME": broker.user,
        "REDIS_PASSWORD": redis_password,
        "REDIS_DB": str(valkey.CACHE_DB),
        "CELERY_BROKER_URL": Secret(
            f"redis://{login}@{broker.host}:{broker.port}/{valkey.BROKER_DB}"
        ),
        "STORAGE_TYPE": "opendal",
        "OPENDAL_SCHEME": "fs",
        "OPENDAL_FS_ROOT": str(paths.data / "storage"),
        "VECTOR_STORE": settings.vector_store,
        "PGVECTOR_HOST": database.host,
        "PGVECTOR_PORT": str(database.port),
        "PGVECTOR_USER": database.user,
        "PGVECTOR_PASSWORD": secrets["DIFY_DB_PASSWORD"],
        "PGVECTOR_DATABASE": database.vector_database,
        **{name: _own_value(deployment, value) for name, value in settings.dify.env.items()},
    }


def _own_value(deployment: Deployment, value: str) -> str | Secret:
    """A value of dify.env; `secret:NAME` stands for NAME in secrets.env."""
    return deployment.secrets[value[7:]] if value.startswith("secret:") else value


def _environment_of_a_process(deployment: Deployment) -> dict[str, str | Secret]:
    """What any program needs. Nothing is inherited from the shell that ran `up`: a restart from
    another shell must give the same process. A proxy is set in dify.env, and is never used for what
    runs here or for the model (upstream issue 14070)."""
    version = deployment.release.version
    hosts = ["localhost", "127.0.0.1", "::1"]
    for url in (deployment.settings.model.url, getattr(deployment.settings.embedding, "url", None)):
        host = urlsplit(url).hostname if url else None
        if host and host not in hosts:
            hosts.append(host)
    return {
        "PATH": f"{deployment.paths.dify_python(version).parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(deployment.paths.data / "home"),
        # The environment in opt/ is not the service's to write to; compiled code is kept here.
        "PYTHONPYCACHEPREFIX": str(deployment.paths.data / "home" / "pycache"),
        "TMPDIR": str(deployment.paths.data / "tmp"),
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "NO_PROXY": ",".join(hosts),
        "no_proxy": ",".join(hosts),
    }


def ready(deployment: Deployment) -> str:
    """`/health` answers, with the version that this deployment should run."""
    import requests

    port = deployment.settings.dify.port
    try:
        answer = loopback.get(f"http://127.0.0.1:{port}/health")
    except requests.RequestException:
        raise NotReady("waiting for /health") from None
    if answer.status_code != 200:
        raise NotReady(f"/health answers {answer.status_code}")
    try:
        version = dict(answer.json())["version"]
    except (ValueError, TypeError, KeyError):
        raise NotReady(f"what answers on port {port} is not Dify") from None
    if version != deployment.release.version:
        raise PrerequisiteError(
            f"port {port} is answered by dify {version}, not {deployment.release.version}",
            "stop the other one, or set dify.port in difyops.yaml",
        )
    return f"dify {version}, port {port}"


# --- migrations ------------------------------------------------------------------------


def migrated(deployment: Deployment) -> str | None:
    head = dify_tree.migration_head(deployment.paths.source(deployment.release.version))
    return f"head {head}" if database_revision(deployment) == head else None


def database_revision(deployment: Deployment) -> str | None:
    """The Alembic revision of Dify's database; None before the first migration."""
    import psycopg

    try:
        with postgres.connect(deployment) as session:
            row = session.execute("select version_num from alembic_version").fetchone()
    except psycopg.errors.UndefinedTable:
        return None
    except psycopg.OperationalError as error:
        said = str(error).strip().splitlines()[0]
        raise PrerequisiteError(
            f"Postgres does not let us in: {said}", "difyops up --source"
        ) from None
    return row[0] if row else None


def migrate(deployment: Deployment, log: StepLog) -> str:
    """`flask db upgrade`, whose failure is seen (the container's `upgrade-db` swallows it), and
    the head checked afterwards."""
    tree = deployment.paths.source(deployment.release.version)
    head = dify_tree.migration_head(tree)
    before = database_revision(deployment)
    if before is not None and not dify_tree.knows_migration(tree, before):
        raise log.error(
            f"the database is at revision {before}, which dify {deployment.release.version} "
            "does not know: it was migrated by a newer release",
            "set dify.version back to that release; data is never migrated down",
        )
    flask = process(deployment, "flask", "db", "upgrade")
    log.call(
        flask.argv,
        cwd=flask.cwd,
        env=flask.plain_env(),
        user=deployment.user,
        inherit=False,
        what="flask db upgrade",
    )
    after = database_revision(deployment)
    if after != head:
        raise log.error(f"migrations ended at {after}, not at the head {head}")
    with postgres.connect(deployment) as session:
        tables = session.execute(
            "select count(*) from information_schema.tables where table_schema = 'public'"
        ).fetchone()[0]
    return f"{tables} tables, head {head}"
