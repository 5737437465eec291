"""The shared nouns: a deployment, a service, a step, a rendered file, a plan.

Data flows one way: settings and releases (know) -> Plan (decide) -> steps and processes (act) ->
results (report). Nothing here does I/O.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from difyops.releases import Release
    from difyops.secrets import Secret, Secrets
    from difyops.settings import Settings
    from difyops.steplog import StepLog


@dataclass(frozen=True)
class Paths:
    """Where things are in a deployment directory."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "difyops.yaml"

    @property
    def lock(self) -> Path:
        return self.root / "difyops.lock.yaml"

    @property
    def secrets(self) -> Path:
        return self.root / "secrets.env"

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def opt(self) -> Path:
        """Installed software: database binaries, Dify's Python environment, model files."""
        return self.root / "opt"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def step_logs(self) -> Path:
        return self.logs / "steps"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def source(self, version: str) -> Path:
        """The Dify checkout of one version."""
        return self.root / "src" / f"dify-{version}"

    def dify_python(self, version: str) -> Path:
        """The interpreter of the virtual environment that runs Dify's API and worker."""
        return self.opt / f"dify-{version}" / "bin" / "python"


@dataclass(frozen=True)
class User:
    """The unprivileged user that services run as when difyops was started by root."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class Facts:
    """What a deployment directory holds already. Empty before the first `up`."""

    postgres: str | None = None  # version and provider of the programs in opt/
    valkey: str | None = None
    checkout: str | None = None  # identity of Dify's code: commit, or fingerprint of a directory
    queues: tuple[str, ...] = ()  # Celery queues, read from the checkout
    environment: str | None = None  # identity of Dify's Python environment
    server: str = ""  # versions of the programs that serve models
    python: str = sys.executable  # our own interpreter
    python_reachable: bool = True  # `user` can execute it


@dataclass(frozen=True)
class Deployment:
    """Everything known about one deployment directory before anything is decided."""

    paths: Paths
    settings: Settings
    secrets: Secrets
    release: Release
    user: User | None  # None: services run as whoever runs difyops
    facts: Facts = Facts()
    source: str | None = None  # where Dify's code comes from, when not from what is there

    @property
    def owner(self) -> tuple[int, int] | None:
        return (self.user.uid, self.user.gid) if self.user else None


class NotReady(Exception):
    """A readiness probe's answer while the service is still starting; the text says why."""


@dataclass(frozen=True)
class File:
    """A rendered file. `private` files hold secrets: mode 0600."""

    path: Path  # relative to the deployment directory
    text: str = field(repr=False)
    private: bool = False
    for_service: bool = False  # read by the service after privileges were dropped


@dataclass(frozen=True)
class Step:
    """A named, idempotent piece of work.

    `done` answers what is there already (a detail for the report), or None when `run` is needed.
    It must be quick and without effect; `run` returns the detail and leaves nothing half-made: it
    builds beside the target and renames.
    """

    name: str
    done: Callable[[Deployment], str | None]
    run: Callable[[Deployment, StepLog], str]


@dataclass(frozen=True)
class Process:
    """How a service runs as an ordinary process. No secret may stand in `argv`."""

    argv: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str | Secret] = field(default_factory=dict)
    stop_signal: str = "TERM"
    death_signal: str | None = None  # when supervisord is gone; without it: stop_signal
    stop_seconds: int = 15
    settle_seconds: int = 2  # an end before that is a failed start: supervisord backs off
    in_vain: tuple[int, ...] = ()  # exit codes that say: another start would end alike
    inputs: str = ""  # a digest of what is read at start besides env and files: changed = restart

    def plain_env(self) -> dict[str, str]:
        """The environment with its secrets, for starting a program or its 0600 env file."""
        return {k: v if isinstance(v, str) else v.reveal() for k, v in self.env.items()}


@dataclass(frozen=True)
class Service:
    """A service, declared once: what it needs, how it runs, when it is ready."""

    name: str
    needs: tuple[str, ...] = ()
    process: Process | None = None  # None: run by somebody else (an `external` provider)
    port: int | None = None
    address: str = ""
    files: tuple[File, ...] = ()
    ready: Callable[[Deployment], str] | None = None  # raises NotReady; returns a detail
    ready_seconds: float = 60.0
    install: tuple[Step, ...] = ()  # needs nothing running
    prepare: tuple[Step, ...] = ()  # before its process starts; what it needs is running
    finish: tuple[Step, ...] = ()  # after it is ready


@dataclass(frozen=True)
class Plan:
    """What is to be: services in start order and every file to render."""

    services: tuple[Service, ...]
    files: tuple[File, ...]

    def service(self, name: str) -> Service | None:
        return next((s for s in self.services if s.name == name), None)


class Progress(Protocol):
    """What the acting code tells about its work; report.py shows it, tests record it."""

    def started(self, name: str, log: Path | None = None) -> None: ...
    def detail(self, name: str, text: str) -> None: ...
    def finished(self, name: str, detail: str, seconds: float | None) -> None: ...
    def failed(self, name: str, message: str, seconds: float) -> None: ...
    def note(self, text: str) -> None: ...
