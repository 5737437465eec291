"""Ports and URLs."""

from __future__ import annotations

from urllib.parse import urlsplit

from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok, warn

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


@check(
    "net.urls",
    why="links, webhooks and file URLs are made from the base URL",
    upstream=("14232", "28534", "16309"),
    needs=("api.health",),
    dify=True,
)
def urls(deployment: Deployment) -> Finding:
    """The base URL reaches this very API, and the files' URLs are made from it."""
    import requests

    base = deployment.settings.dify.url
    parts = urlsplit(base)
    if parts.path not in ("", "/"):
        return fail(
            f"{base} has a path; Dify's API answers at the root", "remove it: dify.base_url"
        )
    try:
        answer = requests.get(f"{base}/health", timeout=5)
        pid = answer.json().get("pid")
    except (requests.RequestException, ValueError) as error:
        return fail(
            f"{base}/health: {type(error).__name__}",
            f"set dify.base_url to a URL that reaches port {deployment.settings.dify.port}",
        )
    if pid not in _api_pids(deployment):
        return fail(f"{base} is answered by another API (pid {pid})", "set dify.base_url")
    overridden = sorted(k for k in deployment.settings.dify.env if k.endswith("_URL"))
    if overridden:
        return warn(
            f"dify.env sets {', '.join(overridden)} apart from the base URL",
            "remove them from dify.env in difyops.yaml, unless you mean it",
        )
    return ok(base)


def _api_pids(deployment: Deployment) -> set[int]:
    import psutil

    from difyops.supervise import Supervisor

    pid = int(Supervisor(deployment).info("api")["pid"])
    return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
