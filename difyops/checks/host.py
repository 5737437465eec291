"""The machine: disk, memory, processors, and what its user may write."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from difyops import identity
from difyops.checks.looking import UP, as_root, quoted
from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok, skip, warn
from difyops.identity import as_user

check = Registry()

GIB = 2**30
#: Free disk in GiB: below the first nothing is started, below the second a warning. Dify's Python
#: environment is 2.5 GB, its checkout 0.1, the wheel cache of its build as much again.
DISK_DIFY = (5.0, 10.0)
DISK_WITHOUT = (0.5, 2.0)
#: Free inodes, likewise: Dify's Python environment has 100,000 files.
INODES_DIFY = 200_000
INODES_WITHOUT = 5_000
#: Memory in GiB that must be available: API and worker are 0.4-0.9 each.
MEMORY_DIFY = (1.5, 3.0)
MEMORY_WITHOUT = (0.3, 0.6)
MEMORY_RUNNING = 0.25


@check(
    "host.disk",
    why="a full disk stops Postgres and loses queued work",
    upstream=("dify#27730",),
    preflight=True,
    answers=("fail", "warn"),
)
def disk(deployment: Deployment) -> Finding:
    """The disk of the deployment, and that of its data where they differ."""
    installed = deployment.facts.environment is not None
    fresh = deployment.settings.dify.enabled and not installed
    said = []
    low: Finding | None = None
    for folder, new in _disks(deployment, fresh):
        least, advised = DISK_DIFY if new else DISK_WITHOUT
        state = os.statvfs(folder)
        free = state.f_bavail * state.f_frsize / GIB
        said.append(f"{free:.1f} GiB free at {folder}")
        fix = f"free space (what fills it: du -xhd2 {quoted(folder)} | sort -h | tail)"
        files = INODES_DIFY if new else INODES_WITHOUT
        if free < least:
            return fail(f"{said[-1]}, {least:g} GiB needed", fix)
        if state.f_files and state.f_favail < files:  # a file system without inodes says 0
            return fail(f"{state.f_favail} files can still be made at {folder}", fix)
        if free < advised:
            low = low or warn(f"{said[-1]}, {advised:g} GiB advised", fix)
    return low or ok(", ".join(said))


def _disks(deployment: Deployment, fresh: bool) -> Iterator[tuple[Path, bool]]:
    """Folders on different disks, and whether Dify is still to be installed there."""
    root, data = deployment.paths.root, deployment.paths.data
    yield root, fresh
    if data.exists() and data.stat().st_dev != root.stat().st_dev:
        yield data, False


@check(
    "host.memory",
    why="the kernel ends the largest process, most often the API or Postgres",
    upstream=("dify#12991",),
    preflight=True,
    answers=("fail", "warn"),
)
def memory(deployment: Deployment) -> Finding:
    """What is still needed depends on what runs already."""
    from difyops import plan
    from difyops.supervise import Supervisor

    free, total = (value / GIB for value in memory_available())
    said = f"{free:.1f} of {total:.1f} GiB available"
    fix = "stop something (what uses it: ps -eo rss,pid,args --sort -rss | head), or add memory"
    services = Supervisor(deployment).states(plan.build(deployment))
    down = {s.name for s in services if s.state not in ("running", "starting", "external")}
    if not down:
        return warn(f"{said}, with everything running", fix) if free < MEMORY_RUNNING else ok(said)
    least, advised = MEMORY_DIFY if down & {"api", "worker"} else MEMORY_WITHOUT
    if free < least:
        return fail(f"{said}, {least:g} GiB needed for {', '.join(sorted(down))}", fix)
    if free < advised:
        return warn(f"{said}, {advised:g} GiB advised", fix)
    return ok(said)


def memory_available(cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Bytes that can still be used, and in all: the machine's, or our control group's if less."""
    import psutil

    machine = psutil.virtual_memory()
    available, total = int(machine.available), int(machine.total)
    for limit, used in _limits(cgroups):
        if limit < total:
            total = limit
        available = min(available, max(0, limit - used))
    return available, total


def _limits(cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of our control groups, version 2 then 1. Cached files that the kernel
    gives up when it must are no use."""
    for folder, most, now, cache in (
        (cgroups, "memory.max", "memory.current", "inactive_file"),
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
         "total_inactive_file"),
    ):  # fmt: skip
        try:
            limit = (folder / most).read_text().strip()
            if limit == "max":
                continue
            used = int((folder / now).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            stat = dict(line.split() for line in lines)
            yield int(limit), used - int(stat.get(cache, 0))
        except (OSError, ValueError):
            continue


@check(
    "host.cpu",
    why="below two processors the first chat takes minutes",
    preflight=True,
    answers=("warn",),
)
def cpu(deployment: Deployment) -> Finding:
    count = min(float(len(os.sched_getaffinity(0))), cpu_quota())
    machine = os.cpu_count() or 1
    load = os.getloadavg()[0]  # of the whole machine, also inside a container
    said = f"{count:g} processor{'s' if count != 1 else ''}, load {load:.1f}"
    if count < 2:
        return warn(f"{said}, 2 advised", "give this machine another processor")
    if load > 4 * machine:
        return warn(f"{said} on {machine}", "see what keeps it busy: top -bn1 -o %CPU | head -20")
    return ok(said)


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """How many processors our control group may use; infinite without a quota."""
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
        return float(quota) / float(period)  # "max" is no number
    except (OSError, ValueError):
        return float("inf")


@check(
    "host.write",
    why="services write below the deployment directory, as their own user",
    preflight=True,
)
def write(deployment: Deployment) -> Finding:
    root, user = deployment.paths.root, deployment.user
    paths = deployment.paths
    mine = (root, paths.etc, paths.opt, paths.data, paths.logs, paths.run)
    for folder in mine:
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            return fail(f"{folder} is not writable", _writable(folder))
    closed = _closed(deployment)
    if closed:
        name = user.name if user else identity.DEFAULT_USER
        return fail(
            f"user {name}, as which services run, cannot enter {closed}",
            f"chmod o+x {quoted(closed)}; or deploy where others can enter, such as /srv",
        )
    uid = user.uid if user else os.geteuid()
    for name in ("postgres", "valkey", "home"):
        folder = paths.data / name
        if folder.is_dir() and folder.stat().st_uid != uid and (user or os.geteuid()):
            return fail(
                f"{folder} belongs to uid {folder.stat().st_uid}, its service runs as {uid}",
                as_root(f"chown -R {uid}:{user.gid if user else os.getegid()} {quoted(folder)}"),
            )
    return ok(f"writable{f', entered by {user.name}' if user else ''}")


def _writable(folder: Path) -> str:
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "its file system is mounted read-only: deploy on another disk"
    if folder.stat().st_uid == os.geteuid():
        return f"chmod u+wx {quoted(folder)}"
    return as_root(f"chown -R {os.geteuid()} {quoted(folder)}")


def _closed(deployment: Deployment) -> Path | None:
    """The first folder on the way to the deployment that its services' user cannot enter."""
    root, user = deployment.paths.root, deployment.user
    way = [*reversed(root.parents), root]
    if user:
        if identity.can(user, "x", root):
            return None
        return next((p for p in way if not identity.can(user, "x", p)), root)
    if os.geteuid() != 0:
        return None
    # The user is still to be made: it will be neither owner nor in the group of any of them.
    return next((p for p in way if not p.stat().st_mode & 0o001), None)


@check(
    "storage.perm",
    why="uploads and knowledge fail when the storage folder is not the service user's",
    upstream=("dify#28791", "dify#29098"),
    dify=True,
)
def storage(deployment: Deployment) -> Finding:
    """Write a file as the service's user and remove it; the folders below are only looked at."""
    from difyops.services import api

    env = {**api.environment(deployment)}
    if (env["STORAGE_TYPE"], env["OPENDAL_SCHEME"]) != ("opendal", "fs"):
        return skip(f"files are kept elsewhere (dify.env: STORAGE_TYPE {env['STORAGE_TYPE']})")
    folder = deployment.paths.source(deployment.release.version) / "api"
    folder /= str(env["OPENDAL_FS_ROOT"])  # an absolute one stands alone
    if not folder.is_dir():
        return fail(f"{folder} is missing", UP)
    user = deployment.user
    done = subprocess.run(
        ["sh", "-c", _TRY, "sh", str(folder)],
        **as_user(user),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode == 0:
        return ok(f"{folder.name} was written to by {user.name if user else 'the service user'}")
    what = done.stdout.strip() or str(folder)
    said = done.stderr.strip().rsplit(": ", 1)[-1] or "Permission denied"
    uid, gid = (user.uid, user.gid) if user else (os.geteuid(), os.getegid())
    owner = user.name if user else f"uid {uid}"
    if said not in ("Permission denied", "Operation not permitted"):
        return fail(f"{what} cannot be written by {owner}: {said}", f"df -h {quoted(folder)}")
    return fail(
        f"{what} cannot be written by {owner}",
        as_root(f"chown -R {uid}:{gid} {quoted(folder)}")
        + f" && {as_root(f'chmod -R u+rwX {quoted(folder)}')}",
    )


#: Folders of tenants and kinds of files are two levels down; a restored backup leaves root's there.
_TRY = """
for d in "$1" "$1"/*/ "$1"/*/*/; do
  [ -d "$d" ] || continue
  if [ ! -w "$d" ] || [ ! -x "$d" ]; then echo "$d"; exit 1; fi
done
f=$(mktemp "$1/.difyops-doctor.XXXXXX") && echo written > "$f" && rm "$f"
"""
