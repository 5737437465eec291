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
    wanted = plan.build(deployment)
    up = {s.name for s in supervisor.states(wanted) if s.state in ("running", "starting")}
    mine = [s for s in wanted.services if s.process and s.port]
    for service in mine:
        port = service.port or 0
        if service.name in up or is_free(port):
            continue
        free = next((p for p in range(port + 1, port + 100) if is_free(p)), port + 1)
        return fail(
            f"port {port}, for {service.name}, is taken{_holder(port)}",
            f"stop it, or set {_KEYS[service.name]}: {free} in difyops.yaml",
        )
    return ok(", ".join(f"{s.name} {s.port}" for s in mine))


_KEYS = {
    "postgres": "postgres.port",
    "valkey": "redis.port",
    "model": "model.port",
    "api": "dify.port",
}


def _holder(port: int) -> str:
    """` by NAME (pid N)`, where we may see it."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr[1] == port and connection.status == "LISTEN":
                if connection.pid is None:
                    return " by another user's process"
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""
