"""One command at a time changes a deployment. The lock dies with its holder, however that ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from difyops.core import Paths
from difyops.errors import DifyopsError, PrerequisiteError


@contextlib.contextmanager
def held(paths: Paths, command: str) -> Iterator[None]:
    """Hold the deployment's lock. Raises DifyopsError saying who holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(paths.run / "lock")
    holder = paths.run / "lock.holder"
    try:
        paths.run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise DifyopsError(
            f"{paths.root} is busy: {_who(holder)}", "wait for it to end, then run this again"
        ) from None
    except OSError as error:
        raise PrerequisiteError(
            f"{paths.run} cannot be written: {error.strerror}",
            f"run difyops as the owner of {paths.root}, or give it to you: "
            f"sudo chown -R {os.getuid()} {paths.root}",
        ) from None
    try:
        holder.write_text(
            f"pid {os.getpid()}, `difyops {command}`, since {time.strftime('%H:%M:%S')}"
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _who(holder: Path) -> str:
    try:
        return holder.read_text() or "another difyops is at work"
    except FileNotFoundError:
        return "another difyops is at work"
