"""Real Postgres, real Valkey and the real model server, in a deployment of the test session."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from difyops import deployment as deployments
from difyops import init, plan, supervise
from difyops.core import Deployment
from tests.integration.faults import ModelStandIn, Server, without_model
from tests.recorder import Recorder


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.fixture
def workspace() -> Iterator[Path]:
    """A folder that an unprivileged service user can enter (pytest's own are 0700 for root)."""
    folder = Path(tempfile.mkdtemp(prefix="difyops-test-"))
    folder.chmod(0o755)
    yield folder
    end(folder)
    shutil.rmtree(folder, ignore_errors=True)


def end(folder: Path) -> None:
    """Stop whatever deployments below `folder` still run."""
    for settings in folder.glob("**/difyops.yaml"):
        try:
            deployment = deployments.load(settings.parent)
            supervise.stop_all(deployment, plan.build(deployment), Recorder())
        except Exception as error:
            print(f"could not stop {settings.parent}: {error}")


@dataclass(frozen=True)
class Cli:
    """Runs the CLI as a person does, as a program of its own."""

    root: Path

    def start(self, *arguments: str, **options: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "difyops", "-C", str(self.root), *arguments]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def __call__(
        self, *arguments: str, timeout: float = 180, **options: object
    ) -> subprocess.CompletedProcess[str]:
        child = self.start(*arguments, **options)
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, child.returncode, out, err)


def make(root: Path, changes: dict[str, object] | None = None) -> Cli:
    """A deployment directory without Dify, on free ports, with `changes` to its settings."""
    postgres, valkey, model, api = free_ports(4)
    content: dict[str, object] = {
        "dify": {"enabled": False, "port": api},
        "model": {"port": model},
        "postgres": {"provider": "wheel", "port": postgres},
        "redis": {"provider": "wheel", "port": valkey},
    }
    for key, value in (changes or {}).items():
        old = content.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        content[key] = {**old, **value} if both else value  # type: ignore[dict-item]
    root.mkdir(parents=True, exist_ok=True)
    (root / "difyops.yaml").write_text(yaml.safe_dump(content))
    init.run(root, {}, dict)
    return Cli(root)


@pytest.fixture
def new(workspace: Path) -> Callable[..., Cli]:
    """Makes deployment directories that are stopped and removed after the test."""

    def build(name: str = "d", **changes: object) -> Cli:
        return make(workspace / name, changes)

    return build


@pytest.fixture(scope="session")
def stack() -> Iterator[Deployment]:
    """Postgres, Valkey and the model server, up for the whole session. Leave it as you find it."""
    folder = Path(tempfile.mkdtemp(prefix="difyops-stack-"))
    folder.chmod(0o755)
    cli = make(folder / "d")
    try:
        result = cli("up", "--source", timeout=300)
        assert result.returncode == 0, result.stderr
        yield deployments.load(cli.root)
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def standin() -> Iterator[str]:
    """The URL of a stand-in for a model server: for tests of everything else."""
    with Server(ModelStandIn) as server:
        yield server.url


@pytest.fixture(scope="session")
def _light(standin: str) -> Iterator[Cli]:
    folder = Path(tempfile.mkdtemp(prefix="difyops-light-"))
    folder.chmod(0o755)
    try:
        yield make(folder / "d", without_model(standin))
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def light(_light: Cli) -> Cli:
    """Postgres and Valkey, up; shared by the tests whose fault leaves nothing behind."""
    if _light("status").returncode:
        result = _light("up", "--source")
        assert result.returncode == 0, result.stderr
    return _light


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop privileges")
