"""Errors a person sees: what went wrong, where, and the remedy. Exit codes are part of the CLI."""

from __future__ import annotations

from pathlib import Path

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CANNOT_START = 3


class DifyopsError(Exception):
    """Something failed or is unhealthy.

    `message` says what and where in one line; `hint` is the remedy, best a command to paste.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DifyopsError):
    """The command line, difyops.yaml or another input is wrong."""

    exit_code = EXIT_USAGE


class PrerequisiteError(DifyopsError):
    """Nothing was started, because the machine lacks something that is needed."""

    exit_code = EXIT_CANNOT_START


class StepError(DifyopsError):
    """A step failed; `log` is its log file and `tail` the last lines of it."""

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        log: Path | None = None,
        tail: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint)
        self.log = log
        self.tail = tail
