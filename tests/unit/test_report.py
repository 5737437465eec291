"""Progress and errors as they are read: in a log, on a terminal, without colours."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from difyops import report
from difyops.errors import DifyopsError, StepError

SCRIPT = """
import time
from pathlib import Path
from difyops.errors import StepError
from difyops.report import Lines, error
lines = Lines(Path("/srv/d"))
lines.started("python", Path("/srv/d/logs/steps/python.log"))
lines.detail("python", "3 of [red]412")
time.sleep(0.3)
lines.finished("python", "412 packages", 32.1)
lines.started("migrations")
lines.failed("migrations", "not said here", 2.1)
error(StepError("flask db upgrade: exit 1", "mend it", tail=("a line", "the last")))
"""


def on_a_terminal(**environment: str) -> str:
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs,
                             env={**os.environ, "TERM": "xterm", **environment})  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # its end
        pass
    assert child.wait(20) == 0
    os.close(ours)
    return shown.decode()


def test_a_spinner_with_the_log_on_a_terminal() -> None:
    shown = on_a_terminal()
    assert "3 of [red]412" in shown
    assert "logs/steps/python.log" in shown
    assert "\x1b[32m✓" in shown
    assert "\x1b[31m" in shown
    assert "412 packages" in shown


def test_no_color() -> None:
    shown = on_a_terminal(NO_COLOR="1")
    assert "✓" in shown
    assert "\x1b[3" not in shown  # no colour
    assert "\x1b[2m" not in shown  # nor dim
    assert "\x1b[1m" not in shown


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report.Lines(Path("/srv/d"))
    lines.started("python", Path("/srv/d/logs/steps/python.log"))
    lines.detail("python", "3 of 412")
    lines.finished("python", "412 packages", 32.1)
    lines.started("source")
    lines.finished("source", "dify 0.15.3", None)
    lines.note("made the user")
    lines.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f"  ✓ python         {'412 packages':<60}   32.1 s",
        "  ✓ source         dify 0.15.3",
        "  - made the user",
    ]


def test_a_sign_of_life_of_a_silent_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.Lines()._silence <= 15
    lines = report.Lines(Path("/srv/d"), silence=0.05)
    lines.started("python", Path("/srv/d/logs/steps/python.log"))
    time.sleep(0.13)
    lines.detail("python", "3 of 412")
    time.sleep(0.1)
    lines.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "  . python         at work for 0 s  logs/steps/python.log"
    assert said[-1] == "  . python         3 of 412  logs/steps/python.log"
    time.sleep(0.12)
    assert capsys.readouterr().err == ""  # over means over


def test_a_silent_step_that_fails_gives_no_sign_of_life_after_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(DifyopsError), report.Lines(silence=0.02) as lines:
        lines.started("python")
        raise DifyopsError("the disk is full")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_failed_step_reads_from_its_log_to_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "logs" / "steps" / "migrations.log"
    lines = report.Lines(tmp_path)
    lines.started("migrations", log)
    lines.failed("migrations", "exit 1", 2.1)
    problem = StepError("flask db upgrade: exit 1 [x]", "mend it", log=log, tail=("a", "[b]"))
    report.error(problem, resume="difyops up --source")
    assert capsys.readouterr().err.splitlines() == [
        "  ✗ migrations     failed after 2.1 s",
        "      a",
        "      [b]",
        "error: flask db upgrade: exit 1 [x]",
        "  Fix: mend it",
        "  Log: logs/steps/migrations.log",
        "  Then: difyops up --source",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0s"), (59.9, "59s"), (60, "1m 0s"), (3600, "1h 0m"), (90061, "1d 1h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert report._duration(seconds) == said


def test_json_of_something_strange() -> None:
    with pytest.raises(TypeError, match="object is not JSON"):
        report.emit_json(object())
