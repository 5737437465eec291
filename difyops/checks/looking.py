"""What several checks look at: processes, listeners; and the commands that fixes are made of."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difyops import plan
from difyops.core import Deployment

if TYPE_CHECKING:
    import psutil

UP = "difyops up --source"


@dataclass(frozen=True)
class Listener:
    """Who listens on a TCP port. `pid` is None where we may not see it."""

    address: str
    port: int
    pid: int | None

    def __str__(self) -> str:
        import psutil

        if self.pid is None:
            return "a process of another user"
        try:
            return f"{psutil.Process(self.pid).name()} (pid {self.pid})"
        except psutil.Error:
            return f"pid {self.pid}"


def listeners() -> list[Listener]:
    """Every TCP listener of this machine."""
    import psutil

    found = []
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr:
            address: Any = connection.laddr
            found.append(Listener(address[0], address[1], connection.pid))
    return found


def ours(deployment: Deployment) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """The processes of this deployment that we may see, each with its environment."""
    import psutil

    root = str(deployment.paths.root)
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if environment.get(plan.MARKER) == root:
            yield process, environment


def is_ours(deployment: Deployment, pid: int | None) -> bool:
    """Whether a process belongs to this deployment: by its environment, or that of one that started
    it; or, since a server may write its title over that, because supervisord runs it."""
    from difyops.supervise import Supervisor

    supervisor = Supervisor(deployment)
    return pid is not None and (supervisor.owns(pid) or pid in _supervised(deployment))


def _supervised(deployment: Deployment) -> set[int]:
    from xmlrpc.client import Fault

    from difyops.supervise import Supervisor

    supervisor = Supervisor(deployment)
    pids = set()
    if supervisor.running():
        for service in plan.build(deployment).services:
            with suppress(Fault):  # it is new, and supervisord does not know it yet
                pids.add(int(supervisor.info(service.name)["pid"]))
    return pids


def again(deployment: Deployment, service: str) -> str:
    """The command that gives a service the configuration it should have, and restarts it.

    A file that a person edited is kept by every command, so it is removed first: only that one.
    """
    from difyops import render

    wanted = plan.build(deployment)
    declared = wanted.service(service)
    own = {Path("etc/supervisord.conf"), Path(f"etc/{service}.env")}
    own |= {file.path for file in declared.files} if declared else set()
    kept = [
        quoted(deployment.paths.root / file.path)
        for file in render.write(deployment, wanted, dry=True)
        if file.verb == "kept" and file.path in own
    ]
    first = f"rm {' '.join(kept)} && " if kept else ""
    return f"{first}difyops restart {service}"


def as_root(command: str) -> str:
    """A command that only root may run, for whoever runs doctor."""
    return command if os.geteuid() == 0 else f"sudo {command}"


def quoted(path: Path) -> str:
    return shlex.quote(str(path))
