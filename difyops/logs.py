"""The services' logs: their ends, then what is added, across rotation."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from difyops.core import Paths
from difyops.files import tail


def read(paths: Paths, services: Sequence[str], lines: int, follow: bool) -> Iterator[str]:
    """The last `lines` of each service's log; with `follow`, then every new line, forever."""
    prefix = max(map(len, services)) if len(services) > 1 else 0
    files = {name: paths.logs / f"{name}.log" for name in services}
    with contextlib.ExitStack() as stack:
        opened = {}
        for name, path in files.items() if follow else ():
            opened[name] = stack.enter_context(contextlib.closing(_Follower(path)))
        for name, path in files.items():
            for line in tail(path, lines, 1_000_000) if lines else ():
                yield _named(name, line, prefix)
        while follow:
            for name, follower in opened.items():
                for line in follower.new():
                    yield _named(name, line, prefix)
            time.sleep(0.25)


def size(path: Path) -> int:
    """Bytes of a log; 0 while there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def since(path: Path, mark: int, most: int = 64_000) -> tuple[str, ...]:
    """The non-empty lines behind the first `mark` bytes; of a log rotated since then, its lines."""
    end = size(path)
    if mark == end:
        return ()
    return tail(path, most, most if mark > end else min(most, end - mark))


def last_error(lines: Sequence[str]) -> str | None:
    """What the last ERROR line of a server of ours says, unless it listened again after that."""
    for line in reversed(lines):
        if " INFO ready after " in line or " INFO listening on " in line:
            return None
        before, found, said = line.partition(" ERROR ")
        if found and before[:4].isdigit():
            return said
    return None


def _named(name: str, line: str, width: int) -> str:
    return f"{name:<{width}} | {line}" if width else line


class _Follower:
    """New lines of one file from its end on, each when it is whole; a file that was rotated is
    finished, and its successor read from the start; one that was emptied is read anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._rest = b""
        self._open(at_end=True)

    def _open(self, *, at_end: bool) -> None:
        try:
            self._file = self.path.open("rb")
        except FileNotFoundError:
            return
        if at_end:
            self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def new(self) -> Iterator[str]:
        if self._file is None:
            self._open(at_end=False)
        if self._file is None:
            return
        rotated = self._rotated(self._file)  # before reading: what came until then is still read
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0)
            self._rest = b""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        if rotated:
            lines += [self._rest] if self._rest else []
            self._rest = b""
            self._file.close()
            self._file = None
        yield from (line.decode("utf-8", "replace").rstrip("\r") for line in lines)
        if rotated:
            yield from self.new()

    def _rotated(self, file: BinaryIO) -> bool:
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:  # between the two renames
            return False
