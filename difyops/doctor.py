"""Run checks in order; what depends on a failure is skipped, naming it.

A check is a function with a stable ID that looks and answers `ok`, `warn`, `fail` or `skip` with
evidence. `preflight` checks also run before `up`, when nothing is running yet, and have no effect.
"""

from __future__ import annotations

import difflib
import re
import shlex
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from difyops.core import Deployment
from difyops.errors import DifyopsError, UsageError
from difyops.secrets import REDACTED

Status = Literal["ok", "warn", "fail", "skip"]
JSON_VERSION = 1


@dataclass(frozen=True)
class Finding:
    """What a check saw. `fix` is a command to paste, or the one thing to change."""

    status: Status
    evidence: str
    fix: str | None = None


@dataclass(frozen=True)
class Result:
    """A finding with what is known of its check. `seconds` is how long the check took."""

    id: str
    status: Status
    evidence: str
    why: str | None = None
    fix: str | None = None
    upstream: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Check:
    id: str
    look: Callable[[Deployment], Finding]
    why: str  # why it matters, in a line
    needs: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()  # issues it comes from: dify#123, vllm#45
    preflight: bool = False
    dify: bool = False  # only where Dify is part of the deployment
    answers: tuple[Status, ...] = ("fail",)  # what it may say besides ok and skip

    @property
    def topic(self) -> str:
        return self.id.split(".")[0]


def ok(evidence: str) -> Finding:
    return Finding("ok", evidence)


def warn(evidence: str, fix: str) -> Finding:
    return Finding("warn", evidence, fix)


def fail(evidence: str, fix: str) -> Finding:
    return Finding("fail", evidence, fix)


def skip(reason: str) -> Finding:
    """The check could not look, and why. Never the same as `ok`."""
    return Finding("skip", reason)


@dataclass
class Registry:
    """The checks, in the order in which they are declared."""

    checks: list[Check] = field(default_factory=list)

    def __call__(
        self,
        id: str,
        *,
        why: str,
        needs: Iterable[str] = (),
        upstream: Iterable[str] = (),
        preflight: bool = False,
        dify: bool = False,
        answers: tuple[Status, ...] = ("fail",),
    ) -> Callable[[Callable[[Deployment], Finding]], Callable[[Deployment], Finding]]:
        def register(look: Callable[[Deployment], Finding]) -> Callable[[Deployment], Finding]:
            if any(known.id == id for known in self.checks):
                raise ValueError(f"two checks are called {id}")
            self.checks.append(
                Check(id, look, why, tuple(needs), tuple(upstream), preflight, dify, answers)
            )
            return look

        return register


@dataclass(frozen=True)
class Report:
    results: tuple[Result, ...]
    seconds: float

    def count(self, status: Status) -> int:
        return sum(r.status == status for r in self.results)

    @property
    def healthy(self) -> bool:
        return not self.count("fail")

    def summary(self) -> str:
        warnings = self.count("warn")
        return (
            f"{self.count('fail')} failed, {warnings} warning{'' if warnings == 1 else 's'}, "
            f"{self.count('ok')} ok, {self.count('skip')} skipped in {self.seconds:.1f} s"
        )

    def as_json(self) -> dict[str, Any]:
        """The pinned shape of `doctor --json`."""
        return {
            "version": JSON_VERSION,
            "healthy": self.healthy,
            "seconds": round(self.seconds, 3),
            "counts": {s: self.count(s) for s in ("ok", "warn", "fail", "skip")},
            "checks": [
                {
                    "id": r.id,
                    "status": r.status,
                    "evidence": r.evidence,
                    "why": r.why,
                    "fix": r.fix,
                    "upstream": list(r.upstream),
                    "seconds": round(r.seconds, 3),
                }
                for r in self.results
            ],
        }


def select(checks: Sequence[Check], only: Sequence[str]) -> list[Check]:
    """The checks named by `only` (an ID, or a topic such as `pg`) and what they need.

    Raises UsageError for a name that no check has.
    """
    known = {check.id for check in checks} | {check.topic for check in checks}
    for name in only:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            topics = ", ".join(dict.fromkeys(check.topic for check in checks))
            raise UsageError(f"no check is called {name!r}", f"{hint}topics: {topics}")
    chosen = {check.id for check in checks if check.id in only or check.topic in only}
    for check in reversed(checks):
        if check.id in chosen:
            chosen.update(check.needs)
    return [check for check in checks if check.id in chosen]


def run(
    deployment: Deployment,
    checks: Sequence[Check],
    tell: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run the checks in order. `tell` hears the ID of each before it runs."""
    began = time.monotonic()
    results: dict[str, Result] = {}
    redact = _redactor(deployment)
    for check in checks:
        tell(check.id)
        started = time.monotonic()
        finding = _look(deployment, check, results)
        results[check.id] = Result(
            id=check.id,
            status=finding.status,
            evidence=redact(finding.evidence),
            why=check.why,
            fix=redact(_here(finding.fix, deployment.paths.root)) if finding.fix else None,
            upstream=check.upstream,
            seconds=time.monotonic() - started,
        )
    return Report(tuple(results.values()), time.monotonic() - began)


def _look(deployment: Deployment, check: Check, results: dict[str, Result]) -> Finding:
    if check.dify and not deployment.settings.dify.enabled:
        return skip("no Dify here yet: difyops up --source --dify <directory | tarball | git@ref>")
    for need in check.needs:
        if need in results and results[need].status in ("fail", "skip"):
            return skip(f"needs {need}")
    try:
        return check.look(deployment)
    except DifyopsError as error:
        return fail(error.message, error.hint or "difyops logs")
    except Exception as error:  # one broken check must not hide the others
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}".strip().rstrip(":")
        return fail(
            f"could not be checked: {said} ({Path(frame.filename).name}:{frame.lineno})",
            f"a fault of this check; please report: difyops doctor --json --only {check.id}",
        )


_COMMAND = re.compile(r"\bdifyops (?=(?:up|down|restart|status|logs|render|wire|doctor|secrets)\b)")


def _here(fix: str, root: Path) -> str:
    """The commands of a fix as they can be pasted where doctor was run."""
    if root == Path.cwd():
        return fix
    return _COMMAND.sub(lambda match: f"difyops -C {shlex.quote(str(root))} ", fix)


#: Names in dify.env whose values are credentials.
CREDENTIAL = re.compile(r"(PASSWORD|SECRET|TOKEN|APIKEY|_KEY|_KEYS)$")


def _redactor(deployment: Deployment) -> Callable[[str], str]:
    """What takes every secret out of a text: libraries write the messages that checks pass on."""
    values = {deployment.secrets[name].reveal() for name in deployment.secrets.names()}
    for name, value in deployment.settings.dify.env.items():
        if CREDENTIAL.search(name):
            values.add(value)
        elif "@" in value and "://" in value:
            values.add(urlsplit(value).password or "")
    values |= {quote(value, safe="") for value in values}
    # A shorter one, "dify" say, is also an ordinary word; secrets.default tells about it.
    hidden = sorted((value for value in values if len(value) >= 6), key=len, reverse=True)

    def redact(text: str) -> str:
        for value in hidden:
            text = text.replace(value, REDACTED)
        return text

    return redact
