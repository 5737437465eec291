"""Started by root, and by an ordinary user from an installed wheel."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from difyops import identity
from tests.integration.conftest import Cli, make, needs_root
from tests.integration.faults import (
    eventually,
    left,
    load,
    nothing_lost,
    states,
    supervisord,
    without_model,
)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def _private(root: Path) -> None:
    """What holds a secret is for its user only; nothing is open to be written by others."""
    secret = [root / "secrets.env", root / "etc/valkey.conf", *(root / "etc").glob("*.env")]
    assert len(secret) >= 4
    for path in secret:
        assert _mode(path) == 0o600, path
    values = [load(root).secrets[name].reveal() for name in load(root).secrets.names()]
    for path in (p for top in ("etc", "run", "logs") for p in (root / top).rglob("*")):
        if path.is_file() and _mode(path) & 0o077:
            text = path.read_text(errors="replace")
            assert not any(value in text for value in values), path
    for path in root.rglob("*"):
        if not path.is_symlink() and not path.is_socket():
            assert not _mode(path) & 0o002, path
    for process in left(root):
        assert not any(value in " ".join(process.cmdline()) for value in values)


@needs_root
@pytest.mark.root
def test_root_gives_up_root(light):
    user = identity.find("difyops")
    assert user
    for name in ("postgres", "valkey"):
        for process in _family(states(light)[name].pid):
            assert set(process.uids()) == {user.uid}, (name, process)
            assert set(process.gids()) == {user.gid}
            groups = Path(f"/proc/{process.pid}/status").read_text().split("Groups:")[1]
            assert groups.splitlines()[0].split() == []
    assert set(psutil.Process(supervisord(light.root)).uids()) == {0}
    data = light.root / "data"
    for path in (data / "postgres", data / "postgres/PG_VERSION", data / "valkey"):
        assert path.stat().st_uid == user.uid, path
    assert _mode(data / "postgres") == 0o700
    assert _mode(data / "valkey") == 0o700
    assert (light.root / "etc/valkey.conf").stat().st_uid == user.uid
    for path in ("secrets.env", "etc/supervisord.conf", "opt/postgres", "run", "logs"):
        assert (light.root / path).stat().st_uid == 0, path
    _private(light.root)
    socket = light.root / "run/supervisor.sock"
    assert _mode(socket) == 0o700
    assert socket.stat().st_uid == 0
    done = subprocess.run(
        ["/usr/bin/env", "cat", light.root / "secrets.env"],
        user=user.uid, group=user.gid, extra_groups=[], capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0, "the services' user reads the secrets"


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@needs_root
@pytest.mark.root
def test_root_refused_as_the_services_user(new, standin):
    cli = new(run_as="root", **without_model(standin))
    result = cli("up", "--source")
    assert result.returncode == 2
    assert "Postgres refuses to run as root" in result.stderr


# --- an ordinary user, and the wheel --------------------------------------------------------------


def _reachable_python() -> Path:
    """An interpreter that every user of this machine may run."""
    nobody = identity.find("nobody")
    names = [f"/usr/{d}bin/python3.{n}" for d in ("", "local/") for n in range(14, 10, -1)]
    for path in map(Path, (os.path.realpath(sys.executable), *names)):
        if path.exists() and identity.can(nobody, "x", path):
            return path
    pytest.skip("no Python 3.11+ that an ordinary user can run")


@pytest.fixture(scope="module")
def installed():
    """difyops from its built wheel, in an environment that everybody can enter."""
    folder = Path(tempfile.mkdtemp(prefix="difyops-wheel-"))
    folder.chmod(0o755)
    try:
        yield _install(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install(folder: Path) -> Path:
    checkout = Path(__file__).parents[2]
    _pip("wheel", "--no-deps", "--wheel-dir", folder, checkout)
    (wheel,) = folder.glob("*.whl")
    venv = folder / "venv"
    subprocess.run([_reachable_python(), "-m", "venv", "--without-pip", venv], check=True)
    _pip("--python", venv / "bin/python", "install", f"difyops[source] @ {wheel.as_uri()}")
    return venv / "bin/difyops"


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "-q", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, umask=0o022)
    if done.returncode and "Connection" in done.stderr + done.stdout:
        pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def account(workspace):
    """An ordinary user, for the time of the test."""
    name = f"dfo{os.getpid()}"
    home = workspace / "home"
    subprocess.run(["useradd", "--create-home", "--home-dir", home, name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True)
        assert name not in [group.gr_name for group in grp.getgrall()]


@needs_root
@pytest.mark.root
def test_ordinary_user_with_the_wheel(installed, workspace, account, standin):
    class Person(Cli):
        def start(self, *arguments, **options):
            return subprocess.Popen(
                [installed, "-C", str(self.root), *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, cwd=account.pw_dir, umask=0o022,
                env={"PATH": "/usr/bin:/bin", "HOME": account.pw_dir, "LANG": "C.UTF-8"},
                user=account.pw_uid, group=account.pw_gid, extra_groups=[], **options,
            )  # fmt: skip

    root = Path(account.pw_dir) / "dify"
    make(root, without_model(standin))
    for path in (root, *root.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid)
    person = Person(root)
    result = person("up", "--source")
    assert result.returncode == 0, result.stderr
    assert "started by root" not in result.stderr
    try:
        for process in left(root):
            assert set(process.uids()) == {account.pw_uid}, process
        for path in (root, *root.rglob("*")):
            assert path.lstat().st_uid == account.pw_uid, path
        _private(root)
        assert _mode(root / "run") == 0o700
        assert _mode(root / "run/supervisor.sock") == 0o700
        with nothing_lost(root):
            os.kill(supervisord(root), 9)
            result = person("up", "--source")
            assert result.returncode == 0, result.stderr
        assert person("render", "--check").returncode == 0
        assert person("doctor").returncode == 0
    finally:
        assert person("down").returncode == 0
        eventually(lambda: left(root) == [])
