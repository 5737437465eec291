"""The whole flow on a real Dify: up, wire, doctor, and what breaks.

Each test leaves the deployment as it found it: up and healthy.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from difyops import dify_tree, proof, wire
from difyops.console import BearerConsole, ServiceApi
from difyops.core import Deployment
from difyops.knowledge import DATASET
from difyops.plan import MARKER
from difyops.services import api, postgres, valkey
from tests.e2e.conftest import SOURCE
from tests.integration.conftest import Cli


def states(cli: Cli) -> dict[str, dict[str, Any]]:
    return {s["name"]: s for s in json.loads(cli("status", "--json").stdout)["services"]}


def wait(
    what: Callable[[], bool], seconds: float = 120, seen: Callable[[], object] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"took too long: {seen()}"
        time.sleep(0.3)


def doctor(cli: Cli, *arguments: str) -> dict[str, dict[str, Any]]:
    found = json.loads(cli("doctor", "--json", *arguments).stdout)["checks"]
    return {check["id"]: check for check in found}


def processes(deployment: Deployment) -> list[psutil.Process]:
    """Every process of the deployment, whoever its parent is."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == str(deployment.paths.root):
                found.append(process)
        except psutil.Error:
            continue
    return found


def mark(deployment: Deployment) -> None:
    """A row and a key that must survive every fault."""
    with postgres.connect(deployment) as session:
        session.execute("create table if not exists e2e_mark (at int primary key)")
        session.execute("insert into e2e_mark values (1) on conflict do nothing")
    valkey.client(deployment).set("e2e", "mark")
    time.sleep(1.1)  # the append-only file is synced every second


def assert_marked(deployment: Deployment) -> None:
    with postgres.connect(deployment) as session:
        assert session.execute("select count(*) from e2e_mark").fetchone()[0] == 1
    assert valkey.client(deployment).get("e2e") == "mark"


def test_everything_is_healthy(cli: Cli) -> None:
    checks = doctor(cli)
    assert {c["id"]: c["evidence"] for c in checks.values() if c["status"] != "ok"} == {}
    assert "answered in" in checks["chat.end-to-end"]["evidence"]


def test_a_second_up_changes_nothing(cli: Cli) -> None:
    before = states(cli)
    again = cli("up", "--source", "--json")
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["healthy"]
    assert set(result["wired"]["changes"].values()) == {"same"}
    assert {n: s["pid"] for n, s in states(cli).items()} == {n: s["pid"] for n, s in before.items()}


def test_wire_twice_leaves_one_of_everything(cli: Cli, dify: Deployment) -> None:
    for _ in range(2):
        assert cli("wire").returncode == 0
    target = proof.target(dify)
    with BearerConsole(target.base_url) as console:
        console.login(target.admin_email, target.admin_password)
        [app] = console.apps(target.app_name)
        assert len(console.app_keys(app["id"])) == 1
        assert len(console.models()) == 2
        [dataset] = console.datasets(DATASET)
        assert len(console.documents(dataset["id"])) == 1
        stored = console.model_credentials("llm", target.llm.name)
    assert stored is not None
    assert int(stored["context_size"]) == target.llm.context == 4096


def test_chat_by_hand(dify: Deployment) -> None:
    """What an application of a user does: its key, a question, an answer, another turn."""
    target = proof.target(dify)
    key = wire.existing(target).api_key
    with ServiceApi(target.base_url, key) as service:
        reply = service.chat("What is two plus two?", user="somebody")
        assert reply.answer.strip()
        assert reply.completion_tokens > 0
        events = [e.event for e in service.chat_stream("Name a colour.", user="somebody")]
    assert events[-1] == "message_end"
    assert "error" not in events


def test_a_proof_leaves_no_conversation(cli: Cli, dify: Deployment) -> None:
    assert cli("doctor", "--only", "chat").returncode == 0
    target = proof.target(dify)
    with ServiceApi(target.base_url, wire.existing(target).api_key) as service:
        left = service._call("GET", "/conversations", params={"user": wire.USER})
    assert left["data"] == []


def test_a_damaged_checkout_can_still_be_stopped_and_looked_at(cli: Cli, dify: Deployment) -> None:
    script = dify.paths.source(dify.release.version) / "api/docker/entrypoint.sh"
    whole = script.read_text()
    script.unlink()
    try:
        assert cli("status").returncode == 0
        assert doctor(cli, "--only", "dify.source")["dify.source"]["status"] == "fail"
    finally:
        script.write_text(whole)


def test_migrated_to_the_head_of_the_checkout(dify: Deployment) -> None:
    tree = dify.paths.source(dify.release.version)
    assert api.database_revision(dify) == dify_tree.migration_head(tree)


def test_killed_api_and_worker_come_back(cli: Cli, dify: Deployment) -> None:
    mark(dify)
    before = states(cli)
    for name in ("api", "worker"):
        os.kill(before[name]["pid"], signal.SIGKILL)
    wait(lambda: cli("doctor", "--only", "celery", "--only", "api").returncode == 0, 240)
    after = states(cli)
    for name in ("api", "worker"):
        assert after[name]["pid"] != before[name]["pid"]
        assert after[name]["restarts"] == before[name]["restarts"] + 1
    assert doctor(cli)["chat.end-to-end"]["status"] == "ok"
    assert_marked(dify)


def test_killed_database_and_broker_under_a_running_dify(cli: Cli, dify: Deployment) -> None:
    mark(dify)
    before = states(cli)
    for name in ("postgres", "valkey", "model"):
        os.kill(before[name]["pid"], signal.SIGKILL)
    wait(lambda: all(s["state"] == "running" for s in states(cli).values()))
    wait(lambda: doctor(cli)["chat.end-to-end"]["status"] == "ok", 180)
    assert_marked(dify)
    assert cli("up", "--source").returncode == 0


def test_killed_supervisord_leaves_no_orphan(cli: Cli, dify: Deployment) -> None:
    mark(dify)
    pid = int((dify.paths.run / "supervisord.pid").read_text())
    assert len(processes(dify)) >= 5
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not processes(dify), 60, lambda: [p.cmdline() for p in processes(dify)])
    again = cli("up", "--source", timeout=400)
    assert again.returncode == 0, again.stderr
    assert_marked(dify)


def test_a_dead_model_is_found_by_doctor_with_the_fix(cli: Cli, dify: Deployment) -> None:
    from difyops.supervise import Supervisor

    Supervisor(dify).stop("model")
    checks = doctor(cli)
    assert checks["model.up"]["status"] == "fail"
    assert checks["chat.end-to-end"]["status"] == "skip"
    assert checks["chat.end-to-end"]["evidence"] == "needs model.chat"
    assert cli("up", "--source").returncode == 0
    assert doctor(cli)["chat.end-to-end"]["status"] == "ok"


def test_a_missing_queue_is_found_and_mended(cli: Cli, dify: Deployment) -> None:
    conf = dify.paths.etc / "supervisord.conf"
    whole = conf.read_text()
    assert ",app_deletion" in whole
    conf.write_text(whole.replace(",app_deletion", ""))
    from difyops.supervise import Supervisor

    supervisor = Supervisor(dify)
    supervisor.sync()
    supervisor.launch("worker")
    wait(
        lambda: (
            "app_deletion" in doctor(cli, "--only", "celery.queues")["celery.queues"]["evidence"]
        )
    )
    assert doctor(cli, "--only", "celery.queues")["celery.queues"]["status"] == "fail"
    conf.write_text(whole)
    assert cli("up", "--source", timeout=400).returncode == 0
    assert doctor(cli, "--only", "celery.queues")["celery.queues"]["status"] == "ok"


def test_down_and_up_again(cli: Cli, dify: Deployment) -> None:
    mark(dify)
    down = cli("down")
    assert down.returncode == 0, down.stderr
    assert processes(dify) == []
    log = (dify.paths.logs / "postgres.log").read_text()
    assert "received fast shutdown request" in log
    assert log.rstrip().endswith("database system is shut down")
    assert cli("status").returncode == 1
    again = cli("up", "--source", timeout=400)
    assert again.returncode == 0, again.stderr
    assert_marked(dify)


def test_a_checkout_of_an_unsupported_release_is_refused(cli: Cli, tmp_path: Path) -> None:
    """Before anything is done: the running one stays."""
    other = tmp_path / "dify"
    tree = Path(SOURCE)
    if not tree.is_dir():
        tree = cli.root / "src" / "dify-0.15.3"
    shutil.copytree(tree / "api", other / "api", ignore=shutil.ignore_patterns("tests", ".venv"))
    packaging = other / dify_tree.PACKAGING
    packaging.write_text(packaging.read_text().replace("0.15.3", "0.14.1"))
    before = states(cli)
    refused = cli("up", "--source", "--dify", str(other))
    assert refused.returncode == 3, refused.stderr
    assert "0.14.1 is not supported" in refused.stderr
    assert "0.15.3" in refused.stderr
    assert states(cli)["api"]["pid"] == before["api"]["pid"]


def test_secrets_stay_out_of_sight(cli: Cli, dify: Deployment) -> None:
    """No secret in an argument list, in a log of ours, or in a file that others can read."""
    secrets = [dify.secrets[name].reveal() for name in dify.secrets.names()]
    lists = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    texts = [lists, cli("doctor", "--json").stdout, cli("up", "--source", "--json").stdout]
    readable = [
        path
        for path in dify.paths.root.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o044
    ]
    small = [p for p in readable if p.stat().st_size < 2_000_000 and "opt" not in p.parts]
    texts += [path.read_text(errors="replace") for path in small if "src" not in path.parts]
    assert not [s[:4] for s in secrets for text in texts if s in text]
