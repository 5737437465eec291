"""Tarballs of Dify's code: reading one member, and unpacking without leaving the target."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from difyops.errors import UsageError
from difyops.steplog import StepLog

_HINT = "is the file whole? Make or download it again"


def is_name(name: str) -> bool:
    """Whether a file is a tarball by its name."""
    return bool(re.search(r"\.(tar|tgz|tar\.(gz|xz|bz2))$", name))


def read(path: Path, wanted: Collection[str]) -> dict[str, str]:
    """The texts of some members, by their path below the tarball's top folder (if it has one).

    Stops as soon as all were seen. Raises UsageError for a file that is no tarball.
    """
    found: dict[str, str] = {}
    with _opened(path) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            key = name if name in wanted else name.partition("/")[2]
            content = tar.extractfile(member) if key in wanted and member.isreg() else None
            if content:
                found[key] = content.read().decode("utf-8", "replace")
                if len(found) == len(wanted):
                    break
    return found


def extract(path: Path, tree: Path, log: StepLog) -> str | None:
    """Unpack to `tree`, without the one top folder if there is one.

    Returns the commit that `git archive` (and so every forge) notes in the tarball. Raises
    UsageError for a damaged tarball, and for a member that would be written elsewhere.
    """
    tree.mkdir(parents=True)
    count = 0
    with _opened(path) as tar:
        for member in tar:
            _tame(member, tree, path)
            # Not in every 3.11 (Debian 12's lacks it), hence a second line of defence only.
            options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extract(member, tree, **options)
            count += 1
            if count % 500 == 0:
                log.detail(f"{count} files")
        noted = tar.pax_headers.get("comment", "")
    log.write(f"unpacked {count} members of {path}")
    _strip_top(tree)
    return noted if re.fullmatch(r"[0-9a-f]{40}", noted) else None


def _tame(member: tarfile.TarInfo, tree: Path, path: Path) -> None:
    """Refuse what leaves the tree; ignore owners and odd modes.

    Paths are resolved against what is unpacked already: a link made earlier counts.
    """
    root = os.path.realpath(tree)

    def leaves(*parts: str) -> bool:
        name = os.path.join(*parts)  # noqa: PTH118 - joined as the kernel would
        real = os.path.realpath(os.path.join(root, name))  # noqa: PTH118
        return name.startswith("/") or (real != root and not real.startswith(root + "/"))

    bad = leaves(member.name) or ".." in member.name.split("/")
    if member.issym():
        bad = bad or leaves(os.path.dirname(member.name), member.linkname)  # noqa: PTH120
    elif member.islnk():
        bad = bad or leaves(member.linkname)
    elif not member.isreg() and not member.isdir():
        raise UsageError(f"{path}: {member.name} is a device or pipe", _HINT)
    if bad:
        raise UsageError(f"{path}: {member.name} would be unpacked or point elsewhere", _HINT)
    member.uid, member.gid, member.uname, member.gname = os.geteuid(), os.getegid(), "", ""
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644


def _strip_top(tree: Path) -> None:
    entries = list(tree.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink():
        if entries[0].name == "api":
            return
        aside = tree.with_name(f"{tree.name}.top")
        entries[0].rename(aside)
        shutil.rmtree(tree)
        aside.rename(tree)


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # a full disk is not a damaged tarball
            raise
        raise UsageError(f"{path} is not a tarball, or is damaged: {error}", _HINT) from None
