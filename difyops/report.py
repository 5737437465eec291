"""The only module that prints. Payload to stdout, progress and errors to stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from difyops.errors import DifyopsError, StepError
from difyops.secrets import REDACTED, Secret

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from difyops.bench import gpu as gpu_bench
    from difyops.bench import spec
    from difyops.bench.serve import Comparison
    from difyops.bringup import BroughtUp
    from difyops.chat import Answer
    from difyops.doctor import Report, Result
    from difyops.engine import sizing
    from difyops.openai_client import Event
    from difyops.render import Rendered
    from difyops.supervise import State
    from difyops.wire import WireReport

WIDTH = 100
_STYLES = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Piped output is read by programs and logs: it is not cut to a terminal's width.
    width = None if stream.isatty() else 10_000
    # rich would keep bold and dim with NO_COLOR; it asks for none of these codes.
    colors: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(
        stderr=stderr,
        color_system=colors,
        highlight=False,
        width=width,
        soft_wrap=True,
        emoji=False,
    )


def emit(text: str) -> None:
    """Payload."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()  # `logs -f` into a pipe is read line by line


def emit_json(value: object) -> None:
    """Payload for machines; secrets are redacted, whatever they are in."""
    emit(json.dumps(value, default=_plain, indent=2))


def _plain(value: object) -> Any:
    if isinstance(value, Secret):
        return REDACTED
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def error(problem: DifyopsError, *, resume: str | None = None) -> None:
    """What, where, and the remedy. For a step, the end of its log first: it belongs to the line
    that said which step failed; and last, the command that goes on from there."""
    console = _console(stderr=True)
    step = problem if isinstance(problem, StepError) else None
    for line in step.tail if step else ():
        console.print(f"      {line}", markup=False, style="dim")
    console.print("[red]error:[/red]", end=" ")
    console.print(problem.message, markup=False)
    if problem.hint:
        console.print(f"  Fix: {problem.hint}", markup=False)
    if step and step.log:
        console.print(f"  Log: {_short(step.log, None)}", markup=False)
    if step and resume and resume not in (problem.hint or ""):
        console.print(f"  Then: {resume}", markup=False)


def bug(problem: Exception, arguments: Sequence[str]) -> None:
    """The last resort: a mistake of ours, in a line, and how to get its traceback."""
    said = next(iter(str(problem).splitlines()), "")
    console = _console(stderr=True)
    console.print("[red]error:[/red]", end=" ")
    console.print(
        f"this is a bug in difyops: {type(problem).__name__}{': ' if said else ''}{said[:200]}",
        markup=False,
    )
    command = shlex.join(["difyops", "--debug", *arguments])
    console.print(f"  Fix: report it with what this prints: {command}", markup=False)


def _short(path: Path, root: Path | None) -> str:
    with suppress(ValueError):
        return str(path.relative_to(root or Path.cwd()))
    return str(path)


class Lines:
    """Progress: a line a finished step. On a terminal a spinner for the one at work; elsewhere a
    sign of life now and then, since a log that is silent for minutes looks hung. Both end with the
    `with` that it is used in, or with `close`."""

    def __init__(self, root: Path | None = None, *, silence: float = 15.0) -> None:
        self._console = _console(stderr=True)
        self._root = root
        self._silence = silence
        self._status: Status | None = None
        self._log: Path | None = None
        self._text = ""
        self._over = threading.Event()
        self._pulse: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def started(self, name: str, log: Path | None = None) -> None:
        self._stop()
        self._log, self._text = log, ""
        if self._console.is_terminal:
            self._status = self._console.status(self._working(name), spinner="dots")
            self._status.start()
        else:
            self._over.clear()
            self._pulse = threading.Thread(
                target=self._show_life, args=(name, time.monotonic()), daemon=True
            )
            self._pulse.start()

    def detail(self, name: str, text: str) -> None:
        self._text = text
        if self._status:
            self._status.update(self._working(name))

    def finished(self, name: str, detail: str, seconds: float | None) -> None:
        self._stop()
        took = "" if seconds is None else f"{seconds:6.1f} s"
        self._console.print("  [green]✓[/green] ", end="")
        self._console.print(f"{name:<14} {detail:<60} {took}".rstrip(), markup=False)

    def failed(self, name: str, message: str, seconds: float) -> None:
        """Only which step and when: what was wrong is said once, by `error`."""
        self._stop()
        self._console.print("  [red]✗[/red] ", end="")
        self._console.print(f"{name:<14} failed after {seconds:.1f} s", markup=False)

    def note(self, text: str) -> None:
        self._console.print(f"  - {text}", markup=False)

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._status:
            self._status.stop()
            self._status = None
        if self._pulse:
            self._over.set()
            self._pulse.join()
            self._pulse = None

    def _show_life(self, name: str, began: float) -> None:
        while not self._over.wait(self._silence):
            said = self._text or f"at work for {time.monotonic() - began:.0f} s"
            where = f"  {_short(self._log, self._root)}" if self._log else ""
            self._console.print(f"  . {name:<14} {said}{where}", markup=False)

    def _working(self, name: str) -> str:
        from rich.markup import escape

        where = f"  [dim]{escape(_short(self._log, self._root))}[/dim]" if self._log else ""
        return f"{escape(name):<14} {escape(self._text)}{where}"


def states(found: Sequence[State]) -> None:
    """The table of `difyops status`."""
    rows = [("service", "state", "pid", "uptime", "memory", "restarts", "port")]
    for s in found:
        rows.append(
            (
                s.name,
                s.state,
                str(s.pid or "-"),
                "-" if s.uptime is None else _duration(s.uptime),
                "-" if s.memory is None else f"{s.memory / 2**20:.0f} MiB",
                "-" if s.restarts is None else str(s.restarts),
                str(s.port or "-"),
            )
        )
    _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {rest}s" if minutes else f"{rest}s"


def rendered(files: Iterable[Rendered], *, diff: bool) -> None:
    for file in files:
        emit(f"{file.verb:<8} {file.path}")
        if diff and file.diff:
            emit(file.diff)


def doctor(report: Report, *, stderr: bool = False) -> None:
    """Results a topic: one line where all is well, one a finding with evidence, reason and fix."""
    console = _console(stderr=stderr)
    skipped = _reasons(report)
    for topic in dict.fromkeys(r.id.split(".")[0] for r in report.results):
        mine = [r for r in report.results if r.id.split(".")[0] == topic]
        fine = [r for r in mine if r.status == "ok"]
        if fine:
            said = fine[0].evidence if len(fine) == 1 else f"{len(fine)} checks"
            _line(console, topic, "ok", said)
        for r in mine:
            if r.status in ("warn", "fail"):
                _finding(console, topic, r)
    for reason, names in skipped.items():
        said = ", ".join(names) if len(names) <= 4 else f"{len(names)} checks"
        _line(console, "", "skip", f"{said}: {reason}")
    console.print(report.summary(), markup=False)


def _finding(console: Console, topic: str, r: Result) -> None:
    _line(console, topic, r.status, f"{r.id}  {r.evidence}")
    why = f"{r.why} ({', '.join(r.upstream)})" if r.upstream else r.why
    if why:
        console.print(f"{'':<17}why: {_folded(console, why, 22)}", markup=False)
    # On one line, however long: a command that is folded cannot be pasted.
    console.print(f"{'':<17}fix: {r.fix}", markup=False)


def _folded(console: Console, text: str, indent: int) -> str:
    """On a terminal, lines of at most 100 columns below each other; elsewhere one line."""
    text = " ".join(text.splitlines())
    width = min(console.width, WIDTH) - indent
    if not console.is_terminal or width < 20:
        return text
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return f"\n{'':<{indent}}".join(lines)


def _reasons(report: Report) -> dict[str, list[str]]:
    """Why checks did not look -> their IDs: a reason that many share is said once."""
    reasons: dict[str, list[str]] = {}
    for r in report.results:
        if r.status == "skip":
            reasons.setdefault(r.evidence, []).append(r.id)
    return reasons


def _line(console: Console, topic: str, status: str, text: str) -> None:
    word = status.upper() if status in ("fail", "warn") else status
    console.print(f"{topic:<11}", end="", markup=False)
    console.print(f"{word:<5}", end=" ", style=_STYLES[status])
    console.print(_folded(console, text, 17), markup=False)


def preflight(report: Report) -> None:
    """One line when all is well; else every finding, as doctor shows it."""
    console = _console(stderr=True)
    warnings = report.count("warn")
    findings = [r for r in report.results if r.status in ("warn", "fail")]
    console.print(
        f"Preflight   {len(report.results)} checks, {report.count('fail')} failed, "
        f"{warnings} warning{'' if warnings == 1 else 's'}",
        markup=False,
    )
    for r in findings:
        _finding(console, r.id.split(".")[0], r)


def brought_up(result: BroughtUp) -> None:
    """What there is now and what was proved; before it doctor's findings, if there are any."""
    if result.report is not None and (result.report.count("fail") or result.report.count("warn")):
        doctor(result.report, stderr=True)
    for line in result.lines():
        emit(line)


def wired(report: WireReport) -> None:
    for name, change in report.changes.items():
        emit(f"{change:<8} {name}")


class ChatView:
    """A conversation: answers to stdout; thoughts, counts and what went wrong to stderr.

    `silent` shows no answers: for JSON, which has them.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._aside = _console(stderr=True)
        self._lines = Lines()
        self._waits = False
        self._open: Literal["", "thought", "text"] = ""  # which line waits for its end

    def question(self) -> str | None:
        import readline  # noqa: F401  (input() then edits lines and recalls those of this session)

        try:
            return input("> ").encode("utf-8", "replace").decode()
        except EOFError:
            emit("")
            return None

    def waiting(self, seconds: float) -> None:
        if not self._waits:
            if self._aside.is_terminal:
                self.note("the server is loading its model; waiting for it")
            self._lines.started("model")
            self._waits = True
        self._lines.detail("model", f"loading, {seconds:.0f} s")

    def piece(self, event: Event) -> None:
        self.close()
        if self._silent:
            return
        if event.reasoning:
            thought = _harmless(event.reasoning)
            self._aside.print(thought, end="", style="dim", markup=False)
            self._open = "" if thought.endswith("\n") else "thought"
        if event.text:
            if self._open == "thought":
                self._aside.print()
            sys.stdout.write(_harmless(event.text) if sys.stdout.isatty() else event.text)
            sys.stdout.flush()
            self._open = "" if event.text.endswith("\n") else "text"

    def answered(self, answer: Answer) -> None:
        self._end_line()
        if answer.interrupted and answer.first is None:
            self.note("stopped")
            return
        about = "" if answer.usage is not None else "~"
        said = [f"{about}{answer.tokens} token{'' if answer.tokens == 1 else 's'}"]
        if answer.tokens_per_second is not None:
            said.append(f"{about}{answer.tokens_per_second:.1f} tokens/s")
        if answer.first is not None:
            said.append(f"first token after {answer.first:.2f} s")
        if answer.interrupted:
            said.append("stopped")
        elif answer.finish == "length":
            said.append("cut: --max-tokens or the context was reached")
        self.note(", ".join(said))

    def problem(self, problem: DifyopsError) -> None:
        self._end_line()
        error(problem)

    def note(self, text: str) -> None:
        self._aside.print(text, style="dim", markup=False)

    def close(self) -> None:
        if self._waits:
            self._lines.close()
            self._waits = False

    def _end_line(self) -> None:
        self.close()
        if self._open == "text":
            emit("")
        elif self._open == "thought":
            self._aside.print()
        self._open = ""


def _harmless(text: str) -> str:
    """Without control characters: a model's text must not command the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f"))


def benchmark(found: Comparison) -> None:
    """The table of `difyops bench serve`; below it what else one must know to read it."""
    from difyops.bench.serve import table

    _table(table(found))
    for line in found.remarks():
        emit(line)


def speculation(found: spec.Found) -> None:
    """The tables of `difyops bench spec`; below them what else one must know to read them."""
    from difyops.bench import spec

    _table(spec.table(found))
    emit("")
    _table(spec.conversation_table(found))
    for line in found.remarks():
        emit(line)


def gpu(found: gpu_bench.Found) -> None:
    """The table of `difyops bench gpu`; below it what else one must know to read it."""
    from difyops.bench.gpu import table

    _table(table(found))
    for line in found.remarks():
        emit(line)


def size(found: sizing.Sized, plan: sizing.Plan | None) -> None:
    """What `difyops size` found, and what fits."""
    from difyops.engine.sizing import gib
    from difyops.engine.state import PAGE_SIZE

    needs = found.needs
    _table(
        [
            [f"{found.family}, {found.parameters:,} parameters in {found.dtype}", ""],
            ["weights", gib(needs.weights)],
            ["each sequence: states and scores", gib(needs.slot)],
            ["each 1,000 tokens of context", gib(needs.page * 1000 // PAGE_SIZE)],
            [f"a sequence of {found.context:,} tokens", gib(needs.slot + needs.full * needs.page)],
            ["one step's work", gib(needs.work)],
        ]
    )
    if plan is not None:
        tokens = f", {plan.pages * PAGE_SIZE:,} tokens over all of them" if plan.pages else ""
        emit(f"fits: {plan.slots} sequences{tokens}, and {gib(plan.prefix_bytes)} of prefixes")
