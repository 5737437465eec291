"""Directory trees that appear whole or not at all, and that a service's user can read."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from difyops.files import sync_dir


@contextmanager
def replacing(destination: Path) -> Iterator[Path]:
    """A scratch folder beside `destination`: what was built as `tree` in it takes its place.

    Invariant: `destination` is a whole tree or is not there. After an error it is as it was; a
    killed run leaves only a scratch folder, which the next one removes (so a destination has one
    writer at a time: the deployment's lock sees to that).
    """
    missing = [p for p in destination.parents if not p.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        folder.chmod(0o755)  # a strict umask must not lock the service's user out
    prefix = f".{destination.name}.partial-"
    for left in destination.parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    try:
        yield work
        if destination.exists():
            destination.rename(work / "replaced")
        (work / "tree").rename(destination)
        sync_dir(destination.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_readable(root: Path) -> None:
    """Everyone may read, only the owner may write; what was executable by its owner stays so."""
    root.chmod(0o755)
    for here, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(here, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                continue
            wanted = 0o755 if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0o644
            if stat.S_IMODE(mode) != wanted:
                path.chmod(wanted)
