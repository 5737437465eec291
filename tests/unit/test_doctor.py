"""The runner: order, needs, crashes, selection, and what doctor shows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from difyops import checks, cli, doctor, init, releases, report, settings
from difyops import deployment as deployments
from difyops.core import Deployment, Paths
from difyops.doctor import Check, Registry, fail, ok, skip, warn
from difyops.errors import DifyopsError, UsageError
from difyops.secrets import Secret, Secrets

GOLDEN = Path(__file__).with_name("golden") / "doctor.schema.json"
KEYS = ["version", "healthy", "seconds", "counts", "checks"]
CHECK_KEYS = ["id", "status", "evidence", "why", "fix", "upstream", "seconds"]
PLANTED = "planted-pa55word"


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    wanted = settings.parse({"dify": {"enabled": False, "env": {"API_TOKEN": "planted-token-1"}}})
    secrets = Secrets({"REDIS_PASSWORD": Secret(PLANTED)}, tmp_path / "secrets.env")
    return Deployment(Paths(tmp_path), wanted, secrets, releases.get("0.15.3"), None)


def planted(*entries: tuple[str, object, tuple[str, ...]]) -> list[Check]:
    """Checks of (ID, what it answers or raises, what it needs)."""
    registry = Registry()
    for name, answer, needs in entries:

        def look(deployment, answer=answer):
            if isinstance(answer, Exception):
                raise answer
            return answer

        registry(name, why="a reason", needs=needs, upstream=("dify#1",))(look)
    return registry.checks


def statuses(found: doctor.Report) -> dict[str, str]:
    return {r.id: r.status for r in found.results}


def test_checks_run_in_the_order_in_which_they_are_declared(deployment):
    heard = []
    doctor.run(
        deployment, planted(("b.x", ok("1"), ()), ("a.x", ok("2"), ()), ("b.y", ok("3"), ())),
        heard.append,
    )  # fmt: skip
    assert heard == ["b.x", "a.x", "b.y"]


def test_what_depends_on_a_failure_is_skipped_naming_it(deployment):
    found = doctor.run(
        deployment,
        planted(
            ("a.root", fail("down", "start it"), ()),
            ("a.next", ok("never asked"), ("a.root",)),
            ("a.last", ok("never asked"), ("a.next",)),
            ("a.other", ok("fine"), ()),
        ),
    )
    said = {r.id: (r.status, r.evidence) for r in found.results}
    assert said["a.next"] == ("skip", "needs a.root")
    assert said["a.last"] == ("skip", "needs a.next")
    assert said["a.other"] == ("ok", "fine")


@pytest.mark.parametrize(
    ("answer", "after"),
    [(warn("low", "more"), "ok"), (skip("cannot look"), "skip"), (ok("yes"), "ok")],
)
def test_a_warning_hides_nothing_and_a_skip_does(deployment, answer, after):
    found = doctor.run(
        deployment, planted(("a.first", answer, ()), ("a.second", ok("yes"), ("a.first",)))
    )
    assert statuses(found)["a.second"] == after


def test_a_crashing_check_is_a_failure_that_names_the_exception(deployment):
    found = doctor.run(
        deployment,
        planted(("a.crash", ZeroDivisionError("by zero"), ()), ("a.next", ok("asked"), ())),
    )
    crash = found.results[0]
    assert crash.status == "fail"
    assert "ZeroDivisionError: by zero (test_doctor.py:" in crash.evidence
    assert crash.fix.endswith("doctor --json --only a.crash")
    assert statuses(found)["a.next"] == "ok"


def test_an_explained_error_is_a_failure_with_its_own_remedy(deployment):
    found = doctor.run(deployment, planted(("a.x", DifyopsError("no room", "make some"), ())))
    assert (found.results[0].evidence, found.results[0].fix) == ("no room", "make some")


def test_checks_of_dify_are_skipped_without_it(deployment):
    found = doctor.run(deployment, [c for c in checks.ALL if c.dify])
    assert set(statuses(found).values()) == {"skip"}
    assert all("no Dify here" in r.evidence for r in found.results)


def test_a_fix_can_be_pasted_from_any_folder(deployment, monkeypatch):
    entries = planted(("a.x", fail("down", "difyops render && difyops restart api"), ()))
    root = deployment.paths.root
    assert doctor.run(deployment, entries).results[0].fix == (
        f"difyops -C {root} render && difyops -C {root} restart api"
    )
    monkeypatch.chdir(root)
    assert doctor.run(deployment, entries).results[0].fix == (
        "difyops render && difyops restart api"
    )


# --- selection ------------------------------------------------------------------------------------


def test_only_by_id_or_topic_brings_what_is_needed():
    assert [c.id for c in doctor.select(checks.ALL, ["pg.ext"])] == ["pg.up", "pg.hba", "pg.ext"]
    redis = [c.id for c in doctor.select(checks.ALL, ["redis"])]
    assert redis == [c.id for c in checks.ALL if c.topic == "redis"]
    chat = {c.id for c in doctor.select(checks.ALL, ["chat"])}
    assert {"pg.up", "api.health", "api.login", "model.up", "chat.end-to-end"} <= chat


def test_an_unknown_name_is_a_usage_error_with_the_nearest_one():
    with pytest.raises(UsageError) as error:
        doctor.select(checks.ALL, ["pg.hbo"])
    assert error.value.exit_code == 2
    assert "did you mean `pg.hba`?" in error.value.hint
    assert "celery" in error.value.hint


# --- the checks themselves ------------------------------------------------------------------------


def test_every_check_needs_only_what_was_looked_at_before():
    seen: set[str] = set()
    for check in checks.ALL:
        assert set(check.needs) <= seen, check.id
        seen.add(check.id)


def test_every_check_says_why_and_where_it_comes_from():
    for check in checks.ALL:
        assert re.fullmatch(r"[a-z]+\.[a-z-]+", check.id)
        assert check.why and not check.why.endswith(".")
        assert all(re.fullmatch(r"(dify|vllm|plugins)#\d+", i) for i in check.upstream)
        assert set(check.answers) <= {"fail", "warn"} and check.answers


def test_the_ids_of_the_design_that_apply_to_source_mode_are_there():
    assert {
        *("model.from-caller", "model.proxy", "model.bind", "model.context", "model.tools"),
        *("net.ports", "net.urls", "host.disk", "host.memory", "host.cpu", "storage.perm"),
        *("secrets.default", "secrets.chars", "pg.version", "pg.ext", "pg.conn", "pg.hba"),
        *("db.migrated", "celery.queues", "celery.stuck", "chat.end-to-end"),
    } <= {check.id for check in checks.ALL}


def test_preflight_needs_nothing_that_runs():
    for check in checks.PREFLIGHT:
        assert not check.needs, check.id


def test_the_table_names_every_check():
    lines = checks.table().splitlines()
    assert len(lines) == len(checks.ALL) + 2
    assert {line.count(" | ") for line in lines} == {6}
    for check, line in zip(checks.ALL, lines[2:], strict=True):
        assert f"`{check.id}`" in line and check.why in line
        assert all(f"[{issue}](https://github.com/" in line for issue in check.upstream)


# --- what is shown --------------------------------------------------------------------------------


@pytest.fixture
def mixed(deployment) -> doctor.Report:
    long = "a very long explanation of what was seen " * 6
    return doctor.run(
        deployment,
        planted(
            ("host.a", ok("fine"), ()),
            ("host.b", warn(long, "difyops restart worker " + "--and-more " * 12), ()),
            ("pg.a", RuntimeError(f"postgresql://dify:{PLANTED}@here planted-token-1"), ()),
            ("pg.b", ok("x"), ("pg.a",)),
        ),
    )


def test_json_has_the_pinned_shape(mixed):
    shown = json.loads(json.dumps(mixed.as_json()))
    jsonschema.validate(shown, json.loads(GOLDEN.read_text()))
    assert list(shown) == KEYS
    assert [list(check) for check in shown["checks"]] == [CHECK_KEYS] * 4
    assert shown["counts"] == {"ok": 1, "warn": 1, "fail": 1, "skip": 1}
    assert shown["healthy"] is False


def test_no_secret_is_shown(mixed, capsys):
    report.doctor(mixed)
    report.emit_json(mixed.as_json())
    shown = "".join(capsys.readouterr())
    assert "RuntimeError" in shown and "********" in shown
    assert PLANTED not in shown and "planted-token-1" not in shown


def test_a_password_inside_a_url_of_dify_env_is_not_shown(deployment):
    env = {"HTTPS_PROXY": "http://me:proxy-pass@proxy.example:3128"}
    with_proxy = replace(deployment, settings=settings.parse({"dify": {"env": env}}))
    text = "proxy.example refused proxy-pass"
    found = doctor.run(with_proxy, planted(("a.x", RuntimeError(text), ())))
    assert "proxy-pass" not in found.results[0].evidence
    assert "proxy.example" in found.results[0].evidence


def test_piped_output_has_no_escape_codes_and_a_line_a_finding(mixed, capsys):
    report.doctor(mixed)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.splitlines()[0] == "host       ok    fine"
    assert re.search(r"^host       WARN  host\.b  a very long", shown, re.M)
    assert "skip  pg.b: needs pg.a" in shown
    assert shown.splitlines()[-1].startswith("1 failed, 1 warning, 1 ok, 1 skipped in ")


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_shows_at_most_100_columns_and_whole_commands(mixed, monkeypatch, no_color):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    shown = on_a_terminal(monkeypatch, lambda: report.doctor(mixed))
    assert ("\x1b" in shown) is not no_color
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert all(len(line) <= 100 for line in lines if "fix:" not in line)
    assert any("fix: difyops" in line and line.count("--and-more") == 12 for line in lines)


def on_a_terminal(monkeypatch, show) -> str:
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        show()
        monkeypatch.undo()
    shown = b""
    with contextlib.suppress(OSError):  # how the end of a terminal reads
        while chunk := os.read(reader, 4096):
            shown += chunk
    os.close(reader)
    return shown.decode()


@pytest.mark.parametrize(
    ("answer", "code"), [(ok("x"), 0), (warn("x", "y"), 0), (fail("x", "y"), 1)]
)
def test_exit_codes(tmp_path, monkeypatch, capsys, answer, code):
    (tmp_path / "difyops.yaml").write_text("dify: {enabled: false}\n")
    init.run(tmp_path, {}, dict)
    monkeypatch.setattr(checks, "ALL", tuple(planted(("a.x", answer, ()))))
    with pytest.raises(SystemExit) as ended:
        cli.main(["-C", str(tmp_path), "doctor", "--json"])
    assert ended.value.code == code
    jsonschema.validate(json.loads(capsys.readouterr().out), json.loads(GOLDEN.read_text()))
    with pytest.raises(SystemExit) as ended:
        cli.main(["-C", str(tmp_path), "doctor", "--only", "nothing"])
    assert ended.value.code == 2
    assert deployments.load(tmp_path).settings.dify.enabled is False
