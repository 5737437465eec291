"""The services' logs: their ends, then what is added, across rotation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from difyops.core import Paths
from difyops.files import tail


def read(paths: Paths, services: Sequence[str], lines: int, follow: bool) -> Iterator[str]:
    """The last `lines` of each service's log; with `follow`, then every new line, forever."""
    prefix = max(map(len, services)) if len(services) > 1 else 0
    files = {name: paths.logs / f"{name}.log" for name in services}
    opened = {name: _Follower(path) for name, path in files.items()} if follow else {}
    for name, path in files.items():
        for line in tail(path, lines, 1_000_000) if lines else ():
            yield _named(name, line, prefix)
    while follow:
        for name, follower in opened.items():
            for line in follower.new():
                yield _named(name, line, prefix)
        time.sleep(0.25)


def _named(name: str, line: str, width: int) -> str:
    return f"{name:<{width}} | {line}" if width else line


class _Follower:
    """New lines of one file from its end on; a file that was rotated is read anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._inode = 0
        self._partial = ""
        self._open(at_end=True)

    def _open(self, *, at_end: bool) -> None:
        try:
            self._file = self.path.open(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        self._inode = self.path.stat().st_ino
        if at_end:
            self._file.seek(0, 2)

    def new(self) -> Iterator[str]:
        if self._file is None:
            self._open(at_end=False)
        if self._file is None:
            return
        # Asked before reading: what was written until the rotation is in the file that is open.
        rotated = self._rotated()
        for part in self._file:
            self._partial += part
            if part.endswith("\n"):
                yield self._partial.rstrip("\n")
                self._partial = ""
        if rotated:
            self._file.close()
            self._file = None

    def _rotated(self) -> bool:
        try:
            return self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            return False
