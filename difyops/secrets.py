"""Secrets: a type that does not print itself, and the 0600 file they live in."""

from __future__ import annotations

import secrets as entropy
import string
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import NoReturn

from dotenv.parser import parse_stream

from difyops.errors import UsageError
from difyops.files import dotenv_text, write_atomic

REDACTED = "********"


class Secret:
    """A value whose str, repr and format are redacted; only `reveal()` gives it away."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return f"Secret({REDACTED})"

    def __str__(self) -> str:
        return REDACTED

    def __format__(self, spec: str) -> str:
        return format(REDACTED, spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and entropy.compare_digest(
            self._value.encode(), other._value.encode()
        )

    def __hash__(self) -> int:
        return hash(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled")


def _token() -> str:
    # Letters and digits only: the value travels through URLs, env files, ini files and YAML.
    alphabet = string.ascii_letters + string.digits
    while True:
        value = "".join(entropy.choice(alphabet) for _ in range(32))
        # Dify wants a letter and a digit in a password; 32 random ones nearly always have both.
        if any(c.isdigit() for c in value) and any(c.isalpha() for c in value):
            return value


#: name -> generator. What a deployment needs; an existing value is never replaced.
GENERATORS: dict[str, Callable[[], str]] = {
    "SECRET_KEY": _token,
    "ADMIN_PASSWORD": _token,
    "POSTGRES_SUPERUSER_PASSWORD": _token,
    "DIFY_DB_PASSWORD": _token,
    "REDIS_PASSWORD": _token,
    "MODEL_API_KEY": _token,
}

HEADER = (
    "# Made by difyops init. Keep it: the databases were created with these values.\n"
    "# `difyops secrets show NAME` prints one.\n"
)


class Secrets:
    """The named secrets of one deployment."""

    def __init__(self, values: dict[str, Secret], path: Path) -> None:
        self._values = values
        self.path = path

    def __getitem__(self, name: str) -> Secret:
        try:
            return self._values[name]
        except KeyError:
            raise UsageError(
                f"{self.path.name}: {name} is missing",
                "difyops init adds what a deployment needs"
                if name in GENERATORS
                else f"there are: admin, app, {', '.join(self.names())}",
            ) from None

    def get(self, name: str) -> Secret | None:
        """A secret that a deployment may lack."""
        return self._values.get(name)

    def names(self) -> list[str]:
        return sorted(self._values)

    @classmethod
    def load(cls, path: Path) -> Secrets:
        """Read `secrets.env`. Raises UsageError when it is absent, readable by others or broken."""
        try:
            mode = path.stat().st_mode & 0o777
            if mode & 0o077:
                raise UsageError(
                    f"{path} can be read by others (mode {mode:04o})", f"chmod 600 {path}"
                )
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError(f"{path} is missing", f"difyops init {path.parent}") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path.name}: not UTF-8 at byte {error.start}", "save it as UTF-8"
            ) from None
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        return cls({k: Secret(v) for k, v in _parsed(text, path.name).items() if v}, path)


def _parsed(text: str, source: str) -> dict[str, str | None]:
    """A line that cannot be read is an error: its value would seem missing, and be made anew."""
    values = {}
    for entry in parse_stream(StringIO(text)):
        if entry.error:
            raise UsageError(
                f"{source}: line {entry.original.line} cannot be read",
                "write NAME=value there, or NAME='value'",
            )
        if entry.key is not None:
            values[entry.key] = entry.value
    return values


def ensure(path: Path, given: dict[str, str] | None = None) -> list[str]:
    """Add to `path` the secrets it lacks and return their names; values there are kept as they are.

    `given` supplies values a person chose (the key of an external model, say).
    """
    known = Secrets.load(path).names() if path.exists() else []
    text = path.read_text(encoding="utf-8") if path.exists() else HEADER
    missing = {k: v for k, v in (given or {}).items() if k not in known}
    missing |= {k: make() for k, make in GENERATORS.items() if k not in known and k not in missing}
    if missing:
        if not text.endswith("\n"):
            text += "\n"
        write_atomic(path, text + dotenv_text(missing), mode=0o600)
    return sorted(missing)
