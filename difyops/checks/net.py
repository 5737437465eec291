"""Ports."""

from __future__ import annotations

import socket
from pathlib import Path

from difyops.checks.looking import UP, is_ours, listeners
from difyops.core import Deployment, Service
from difyops.doctor import Finding, Registry, fail, ok

check = Registry()

_KEYS = {
    "postgres": "postgres.port",
    "valkey": "redis.port",
    "model": "model.port",
    "api": "dify.port",
}


@check(
    "net.ports",
    why="a service whose port is taken ends at its start",
    upstream=("dify#1760", "dify#17510"),
    preflight=True,
)
def ports(deployment: Deployment) -> Finding:
    """Each port is free, or held by this deployment: also by what a crash left, which `up` ends."""
    from difyops import plan

    mine = [s for s in plan.build(deployment).services if s.process and s.port]
    heard = listeners()
    taken: list[tuple[Service, str]] = []
    for service in mine:
        holders = [h for h in heard if h.port == service.port and _in_the_way(h.address)]
        if any(is_ours(deployment, holder.pid) for holder in holders):
            continue
        reason = _refused(service.port or 0)
        if holders:
            taken.append((service, f"taken by {holders[0]}"))
        elif reason:
            taken.append((service, reason))
    if not taken:
        return ok(", ".join(f"{s.name} {s.port}" for s in mine))
    wanted = {service.port for service in mine if service.port}
    fixes = []
    for service, _ in taken:
        free = _free(service.port or 0, wanted)
        wanted.add(free)
        fixes.append(f"{_KEYS.get(service.name, f'{service.name}.port')}: {free}")
    said = ", ".join(f"port {s.port}, for {s.name}, is {reason}" for s, reason in taken)
    return fail(said, f"stop it, or set {', '.join(fixes)} in difyops.yaml; then: {UP}")


def _in_the_way(address: str) -> bool:
    return address in ("127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1")  # noqa: S104


def _refused(port: int) -> str | None:
    """Why an unprivileged server could not listen on a port; None if it could."""
    lowest = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if lowest.exists() and port < int(lowest.read_text()):
        return "one that only root may listen on, and no service runs as root"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            return "not allowed here"
        except OSError:
            return "taken"
    return None


def _free(port: int, wanted: set[int]) -> int:
    """The next port that nobody has or wants."""
    start = max(1024, port) + 1
    for candidate in range(start, min(start + 500, 65536)):
        if candidate not in wanted and _refused(candidate) is None:
            return candidate
    return start
