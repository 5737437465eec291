"""Ports."""

from __future__ import annotations

from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok

check = Registry()


@check(
    "net.ports",
    why="a service whose port is taken ends at its start",
    upstream=("1760", "17510"),
    preflight=True,
)
def ports(deployment: Deployment) -> Finding:
    from difyops import plan
    from difyops.init import is_free
    from difyops.supervise import Supervisor

    supervisor = Supervisor(deployment)
    mine = [s for s in plan.build(deployment).services if s.process and s.port]
    for service in mine:
        port = service.port or 0
        if is_free(port):
            continue
        pid = _listener(port)
        if pid and supervisor.owns(pid):  # the service itself, or a left-over that `up` ends
            continue
        free = next((p for p in range(port + 1, port + 100) if is_free(p)), port + 1)
        return fail(
            f"port {port}, for {service.name}, is taken{_named(pid)}",
            f"stop it, or set {_KEYS[service.name]}: {free} in difyops.yaml",
        )
    return ok(", ".join(f"{s.name} {s.port}" for s in mine))


_KEYS = {
    "postgres": "postgres.port",
    "valkey": "redis.port",
    "model": "model.port",
    "api": "dify.port",
}


def _listener(port: int) -> int | None:
    """The process that listens on a port; 0 where we may not see it, None where there is none."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr[1] == port and connection.status == "LISTEN":
                return connection.pid or 0
    except psutil.Error:
        pass
    return None


def _named(pid: int | None) -> str:
    """` by NAME (pid N)`, where we may see it."""
    import psutil

    if pid is None:
        return ""
    try:
        return f" by {psutil.Process(pid).name()} (pid {pid})" if pid else " by another user"
    except psutil.Error:
        return ""
