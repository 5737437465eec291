"""The log of one step, and the programs it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from difyops.core import User
from difyops.errors import StepError
from difyops.files import tail


class StepLog:
    """Appends what a step and its programs say to `path`. Use as a context manager.

    `detail` is called with a short text now and then, for a progress line.
    """

    def __init__(self, path: Path, detail: Callable[[str], None] = lambda text: None) -> None:
        self.path = path
        self.detail = detail
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> StepLog:
        self.write(time.strftime("--- %Y-%m-%d %H:%M:%S"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, text: str) -> None:
        self._file.write(text.rstrip("\n") + "\n")
        self._file.flush()

    def call(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        user: User | None = None,
        inherit: bool = True,
        timeout: float | None = None,
        what: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Run a program with its output in the log; `env` is added to ours, or with `inherit=False`
        is all it gets (but PATH and LANG): what our shell holds is not a service's business.

        The program gets a process group of its own, which is ended with it when we are interrupted:
        a child that outlives Ctrl-C would go on writing into a half-made directory.
        Raises StepError (with the log's last lines) on a non-zero exit or after `timeout` seconds.
        """
        name = what or Path(argv[0]).name
        self.write("$ " + " ".join(str(a) for a in argv))
        started = time.monotonic()
        try:
            child = subprocess.Popen(
                [*wrapper(user), *(str(a) for a in argv)],
                cwd=cwd,
                env={**(_environment(user) if inherit else _LEAST), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=self._file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise self.error(f"{name} could not be started: {error}", hint) from error
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            _end_group(child)
            raise self.error(f"{name} took longer than {timeout:.0f} s", hint) from None
        except BaseException:
            _end_group(child)
            raise
        self.write(f"exit {code} after {time.monotonic() - started:.1f} s")
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"exit {code}"
            raise self.error(f"{name}: {how} after {time.monotonic() - started:.1f} s", hint)

    def error(self, message: str, hint: str | None = None) -> StepError:
        self._file.flush()
        return StepError(message, hint, log=self.path, tail=tail(self.path))


_LEAST = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}


def wrapper(user: User | None = None) -> list[str]:
    """Gives up root, and ends the program with us even when we are killed: another `up` must not
    meet a program that is still at work here."""
    command = [sys.executable, "-I", "-m", "difyops.launch", "--death-signal", "KILL"]
    command += ["--parent", str(os.getpid())]
    return [*command, *(("--user", user.name) if user else ()), "--"]


def _environment(user: User | None) -> dict[str, str]:
    environment = dict(os.environ)
    if user:
        environment.update(HOME=user.home, USER=user.name, LOGNAME=user.name)
    return environment


def _end_group(child: subprocess.Popen[bytes]) -> None:
    for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(child.pid, sign)
        except ProcessLookupError:
            return
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return
