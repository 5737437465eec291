"""The machine: disk, memory, processors, and what its user may write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from difyops import identity
from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok, warn

check = Registry()

GIB = 2**30
#: Free disk in GiB: below the first nothing is started, below the second a warning. Dify's Python
#: environment is 2.5 GB, its checkout 0.1, the wheel cache of its build as much again.
DISK_DIFY = (5.0, 10.0)
DISK_WITHOUT = (0.5, 2.0)
#: Memory in GiB that must be available: API and worker are 0.4-0.9 each.
MEMORY_DIFY = (1.5, 3.0)
MEMORY_WITHOUT = (0.3, 0.6)


@check(
    "host.disk",
    why="a full disk stops Postgres and loses queued work",
    upstream=("27730",),
    preflight=True,
)
def disk(deployment: Deployment) -> Finding:
    usage = shutil.disk_usage(deployment.paths.root)
    installed = deployment.facts.environment is not None
    fresh = deployment.settings.dify.enabled and not installed
    least, advised = DISK_DIFY if fresh else DISK_WITHOUT
    free = usage.free / GIB
    said = f"{free:.1f} GiB free for {deployment.paths.root.name}"
    if free < least:
        return fail(f"{said}, {least:g} GiB needed", "free space, or deploy on another disk")
    if free < advised:
        return warn(f"{said}, {advised:g} GiB advised", "free space, or deploy on another disk")
    return ok(said)


@check(
    "host.memory",
    why="the kernel ends the largest process, most often the API or Postgres",
    upstream=("12991",),
    preflight=True,
)
def memory(deployment: Deployment) -> Finding:
    import psutil

    available = memory_available() / GIB
    total = psutil.virtual_memory().total / GIB
    said = f"{available:.1f} of {total:.1f} GiB available"
    if _is_up(deployment):
        if available < 0.25:
            return warn(f"{said}, with everything running", "stop something, or add memory")
        return ok(said)
    least, advised = MEMORY_DIFY if deployment.settings.dify.enabled else MEMORY_WITHOUT
    if available < least:
        return fail(f"{said}, {least:g} GiB needed", "stop something, or add memory")
    if available < advised:
        return warn(f"{said}, {advised:g} GiB advised", "stop something, or add memory")
    return ok(said)


def memory_available() -> int:
    """Bytes that can still be used: of the machine, or of our control group if that has less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - int(used)))


def _is_up(deployment: Deployment) -> bool:
    from difyops.supervise import Supervisor

    return Supervisor(deployment).running()


@check("host.cpu", why="below two processors the first chat takes minutes", preflight=True)
def cpu(deployment: Deployment) -> Finding:
    count = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    said = f"{count} processor{'s' if count > 1 else ''}, load {load:.1f}"
    if count < 2:
        return warn(f"{said}, 2 advised", "give this machine another processor")
    if load > 4 * count:
        return warn(said, "see what keeps it busy: top")
    return ok(said)


@check(
    "host.write",
    why="services write below the deployment directory, as their own user",
    preflight=True,
)
def write(deployment: Deployment) -> Finding:
    root, user = deployment.paths.root, deployment.user
    if not os.access(root, os.W_OK):
        return fail(f"{root} is not writable", f"sudo chown -R {os.getuid()} {root}")
    if user and not identity.can(user, "x", root):
        closed = next(
            (p for p in reversed((root, *root.parents)) if not identity.can(user, "x", p)), root
        )
        return fail(
            f"user {user.name}, as which services run, cannot enter {closed}",
            f"deploy where it can, such as /srv/difyops; or: chmod o+x {closed}",
        )
    return ok(f"writable{f', entered by {user.name}' if user else ''}")


@check(
    "storage.perm",
    why="uploads and knowledge fail when the storage folder is not the service user's",
    upstream=("28791", "29098"),
    dify=True,
)
def storage(deployment: Deployment) -> Finding:
    folder = deployment.paths.data / "storage"
    if not folder.is_dir():
        return fail(f"{folder} is missing", "difyops up --source")
    if not identity.can(deployment.user, "w", folder):
        owner = deployment.user.name if deployment.user else str(os.getuid())
        return fail(f"{folder} cannot be written by {owner}", f"sudo chown -R {owner} {folder}")
    return ok("data/storage is writable by the service's user")
