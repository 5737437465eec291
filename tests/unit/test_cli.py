"""The command line as a person or a program meets it: exit codes, streams, JSON, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main

from difyops import __version__, bringup, cli, init, supervise
from difyops.errors import DifyopsError, PrerequisiteError

COMMAND = [sys.executable, "-m", "difyops"]
HEAVY = ["torch", "docker", "psycopg", "requests", "redis", "pydantic", "jinja2", "yaml", "rich",
         "supervisor", "httpx"]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    init.run(tmp_path, {"dify": {"enabled": False}}, dict)
    return tmp_path


def main(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def commands() -> list[list[str]]:
    found = []
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [[name, child] for child in inner] if inner else [[name]]
    return found


def test_nothing_heavy_is_imported_for_the_help() -> None:
    code = (
        "import sys, difyops.cli\n"
        "try: difyops.cli.main(['--help'])\n"
        f"except SystemExit: print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--version") == 0
    assert capsys.readouterr().out == f"difyops {__version__}\n"


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert f"difyops {' '.join(command)}" in " ".join(shown.split()) or "difyops -C" in shown
    assert all(len(line) <= 100 for line in shown.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [["-C", "{}/missing", "status"], ["-C", "{}/missing", "up"], ["-C", "{}/f", "status"],
     ["nonsense"], ["status", "--nonsense"], ["-C", "{}", "logs", "nobody"], ["logs", "-n", "-1"],
     ["-C", "{}", "secrets", "show", "NOPE"], ["-C", "{}", "doctor", "--only", "nope"],
     ["-C", "{}", "init", "--model", "x"], ["-C", "{}", "up", "--source", "--dify", "/nowhere"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "f").write_text("")
    assert main(*(a.format(root) for a in arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert 1 <= len(shown.err.splitlines()) <= 7
    assert "Traceback" not in shown.err


def test_a_missing_directory_says_how_to_make_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("-C", tmp_path / "missing", "status") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path}/missing/difyops.yaml is missing",
        f"  Fix: go to your deployment directory, or make one: difyops init {tmp_path}/missing",
    ]


@pytest.mark.parametrize("here", [".", "mine/etc"])
def test_a_deployment_nearby_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: str
) -> None:
    (tmp_path / "mine" / "etc").mkdir(parents=True)
    (tmp_path / "mine" / "difyops.yaml").write_text("")
    assert main("-C", tmp_path / here, "status") == 2
    assert f"did you mean `difyops -C {tmp_path}/mine …`?" in capsys.readouterr().err


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def states(self: object, plan: object) -> None:
        raise error

    monkeypatch.setattr(supervise.Supervisor, "states", states)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DifyopsError("it broke", "mend it"), 1, ["error: it broke", "  Fix: mend it"]),
        (PrerequisiteError("no disk"), 3, ["error: no disk"]),
        (KeyboardInterrupt(), 130, None),
        (SystemExit(143), 143, []),
        (OSError(28, "No space left on device", "/x"), 1, ["error: /x: No space left on device"]),
        (
            ZeroDivisionError("one\ntwo"),
            1,
            [
                "error: this is a bug in difyops: ZeroDivisionError: one",
                "  Fix: report it with what this prints: difyops --debug -C {} status",
            ],
        ),
    ],
    ids=repr,
)
def test_exit_codes(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: list[str] | None,
) -> None:
    fail_with(monkeypatch, error)
    assert main("-C", root, "status") == code
    shown = capsys.readouterr()
    assert shown.out == ""
    if said is None:
        assert "interrupted" in shown.err
    else:
        assert shown.err.splitlines() == [line.format(root) for line in said]


def test_debug_gives_the_traceback(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "-C", str(root), "status"])


def test_sigterm_ends_with_143(root: Path) -> None:
    (root / "logs").mkdir()
    (root / "logs" / "model.log").write_text("here\n")
    command = [*COMMAND, "-C", str(root), "logs", "-f", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"}) as child:  # fmt: skip
        try:
            assert child.stdout and child.stdout.readline() == "here\n"
            child.terminate()
            assert child.wait(10) == 143
        finally:
            child.kill()


def test_a_reader_that_goes_away_is_no_error(root: Path) -> None:
    (root / "logs").mkdir()
    (root / "logs" / "model.log").write_text("x" * 99 + "\n" + ("y" * 99 + "\n") * 9000)
    line = f"{' '.join(COMMAND)} -C {root} logs model -n 9001 | head -1"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith(("x", "y"))


# --- JSON -----------------------------------------------------------------------------------------


def payload(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["version"] == 1
    return found


def test_json_of_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("init", tmp_path, "--yes", "--json") == 0
    found = payload(capsys)
    assert list(found) == ["version", "root", "settings", "secrets"]
    assert (found["root"], found["settings"]) == (str(tmp_path), "created")


def test_json_of_status(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("-C", root, "status", "--json") == 1  # nothing runs
    found = payload(capsys)
    assert [s["name"] for s in found["services"]] == ["postgres", "valkey", "model"]
    for service in found["services"]:
        assert list(service) == ["name", "state", "pid", "uptime", "memory", "restarts", "port"]
        assert service["state"] == "stopped"


def test_json_of_render(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("-C", root, "render", "--json", "--check") == 1
    assert not (root / "etc").exists()
    found = payload(capsys)
    assert list(found) == ["version", "files"]
    assert {tuple(file) for file in found["files"]} == {("path", "verb", "diff")}
    assert main("-C", root, "render") == 0
    capsys.readouterr()
    assert main("-C", root, "render", "--check", "--json") == 0
    assert {file["verb"] for file in payload(capsys)["files"]} == {"same"}


def test_json_of_a_failed_preflight(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from difyops import doctor

    bad = doctor.Check("host.test", lambda d: doctor.fail("no disk", "buy one"), "because")
    monkeypatch.setattr("difyops.checks.PREFLIGHT", (bad,))
    monkeypatch.setattr(bringup.source, "up", lambda *a: pytest.fail("started all the same"))
    assert main("-C", root, "up", "--source", "--json") == 3
    shown = capsys.readouterr()
    assert "1 failed" in shown.err
    assert "fix: buy one" in shown.err
    found = json.loads(shown.out)
    assert list(found) == ["version", "healthy", "preflight", "wired", "doctor"]
    assert list(found["preflight"]) == ["version", "healthy", "seconds", "counts", "checks"]
    assert list(found["preflight"]["checks"][0]) == [
        "id", "status", "evidence", "why", "fix", "upstream", "seconds"
    ]  # fmt: skip
    assert (found["healthy"], found["wired"], found["doctor"]) == (False, None, None)


def test_a_secret_is_shown_when_asked_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("-C", root, "secrets", "show", "admin") == 0
    assert f"ADMIN_PASSWORD={capsys.readouterr().out}" in (root / "secrets.env").read_text()


def test_no_escape_codes_in_a_pipe(root: Path) -> None:
    began = time.monotonic()
    done = subprocess.run([*COMMAND, "-C", str(root / "no"), "status"], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    assert time.monotonic() - began < 10
