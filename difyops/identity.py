"""Who services run as. Root is given up wherever the kernel lets us: Postgres refuses it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from difyops.core import User
from difyops.errors import PrerequisiteError, UsageError

DEFAULT_USER = "difyops"


def own_python() -> str:
    """The interpreter that runs difyops, under one name: `difyops` and `python3 -m difyops` must
    render the same files, or each would restart what the other started."""
    usual = Path(sys.prefix) / "bin" / "python"
    return str(usual) if usual.exists() else sys.executable


def wanted(run_as: str | None, root: Path) -> str | None:
    """The name of the user that services should run as; None when we are not root.

    Never the owner of the deployment directory: who runs Dify's code could replace the files that
    root's supervisord obeys. Raises UsageError for such a `run_as`.
    """
    if os.geteuid() != 0:
        return None
    name = run_as or DEFAULT_USER
    account = find(name)
    if name == "root" or (account and account.uid == 0):
        raise UsageError("run_as: root cannot be used", "Postgres refuses to run as root")
    if account and root.exists() and root.stat().st_uid == account.uid:
        raise UsageError(
            f"{root} belongs to {name}, as whom services would run: they could command root",
            f"run difyops as that user (sudo -u {name} difyops …), or chown the directory to root",
        )
    return name


def find(name: str | None) -> User | None:
    """The account `name`, or None when there is none (yet)."""
    if name is None:
        return None
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def create(name: str) -> User:
    """Make the system account that services run as. Only `difyops` is made; others must exist."""
    if name != DEFAULT_USER:
        raise UsageError(f"run_as: there is no user {name!r}", f"useradd --system {name}")
    if not shutil.which("useradd"):
        raise PrerequisiteError(
            "started by root, and there is no unprivileged user for Postgres (nor useradd)",
            "set run_as in difyops.yaml to an ordinary user of this machine",
        )
    done = subprocess.run(
        ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
         "--shell", "/usr/sbin/nologin", name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    user = find(name)
    if user is None:
        raise PrerequisiteError(f"useradd {name} failed: {done.stderr.strip()}", "set run_as")
    return user


def as_user(user: User | None) -> dict[str, Any]:
    """The arguments with which `subprocess` gives up root for `user`: its uid, its group, and none
    of root's further groups. Empty when there is no root to give up."""
    return {"user": user.uid, "group": user.gid, "extra_groups": []} if user else {}


def can(user: User | None, test: Literal["r", "w", "x"], path: Path) -> bool:
    """Whether `user` may read, write or execute (enter) a path, all parents included."""
    if user is None:
        return os.access(path, {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}[test])
    command = ["test", f"-{test}", str(path)]
    done = subprocess.run(command, **as_user(user), cwd="/", check=False)
    return done.returncode == 0


def hand_over(path: Path, user: User | None, mode: int = 0o700) -> None:
    """Make a directory that belongs to the service's user.

    Through a descriptor that follows no link: the folder above may be the service's own, and root
    must not be led to give away another one. Raises PrerequisiteError for a link or a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        raise PrerequisiteError(f"{path} is not a folder, or is a link", "move it away") from None
    try:
        os.fchmod(folder, mode)
        if user and os.fstat(folder).st_uid != user.uid:
            os.fchown(folder, user.uid, user.gid)
    finally:
        os.close(folder)
