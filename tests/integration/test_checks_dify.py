"""doctor's checks of Dify without a Dify: a small checkout, real tables, a real Celery worker on
the real Valkey, an interpreter with `requests`, and a stand-in for the API (fake_dify.py)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from difyops import checks, doctor, proof, wire
from difyops.core import Deployment, Facts
from difyops.plan import MARKER
from difyops.services import postgres, valkey
from tests.integration.conftest import free_ports
from tests.integration.examine import examine, set_to, with_secrets
from tests.integration.test_checks_services import poll, serve
from tests.unit.fake_dify import ERROR_EVENT, GOOD_STREAM, PASSWORD, FakeDify015, serve_fake, sse

QUEUES = ("dataset", "mail", "ops_trace", "app_deletion")
HEAD, BEFORE = "b2c3d4e5f6a7", "a1b2c3d4e5f6"
_MIGRATION = 'revision = "{}"\ndown_revision = {}\n'
_TREE = {
    "api/app.py": "",
    "api/pyproject.toml": "[project]\nname = 'a'\n",
    "api/docker/entrypoint.sh": f"celery worker -Q ${{CELERY_QUEUES:-{','.join(QUEUES)}}}\n",
    "api/migrations/versions/1_before.py": _MIGRATION.format(BEFORE, None),
    "api/migrations/versions/2_head.py": _MIGRATION.format(HEAD, repr(BEFORE)),
    ".difyops-checkout.json": json.dumps(
        {"version": "0.15.3", "commit": None, "source": "a test", "kind": "directory", "state": "1"}
    ),
}


@pytest.fixture(scope="module")
def with_dify(stack: Deployment) -> Iterator[Deployment]:
    """The stack with a small checkout and an interpreter where Dify's would be."""
    version = stack.release.version
    tree, python = stack.paths.source(version), stack.paths.dify_python(version)
    for name, text in _TREE.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    facts = dataclasses.replace(stack.facts, checkout="a test", queues=QUEUES)
    try:
        # Without `user`: the interpreter of the tests may be out of reach for the service's.
        yield dataclasses.replace(set_to(stack, dify={"enabled": True}), facts=facts, user=None)
    finally:
        shutil.rmtree(tree.parent)
        shutil.rmtree(python.parents[1])


# --- code and tables ------------------------------------------------------------------------------


def test_dify_source(with_dify, tmp_path):
    assert examine(with_dify, "dify.source").status == "ok"
    entrypoint = with_dify.paths.source("0.15.3") / "api/docker/entrypoint.sh"
    text = entrypoint.read_text()
    entrypoint.unlink()
    found = examine(with_dify, "dify.source")
    assert found.status == "fail" and "entrypoint.sh" in found.evidence
    assert found.fix.startswith(f"rm -r {with_dify.paths.source('0.15.3')} && ")
    entrypoint.write_text(text)
    nowhere = {"mirrors": {"git": [str(tmp_path / "no.git")]}}
    empty = dataclasses.replace(set_to(with_dify, **nowhere), source="0.15.3")
    manifest = with_dify.paths.source("0.15.3") / ".difyops-checkout.json"
    kept = manifest.read_text()
    manifest.unlink()
    found = examine(empty, "dify.source")
    manifest.write_text(kept)
    assert found.status == "fail" and "no repository of Dify answers" in found.evidence


def test_dify_python(with_dify):
    assert examine(with_dify, "dify.python").status == "ok"
    future = with_dify.release.model_copy(update={"python": ">=3.99"})
    found = examine(dataclasses.replace(with_dify, release=future), "dify.python")
    assert found.status == "fail" and ">=3.99" in found.evidence


@contextmanager
def table(deployment: Deployment, create: str, *values: str) -> Iterator[None]:
    """A table of Dify's in the real database, for a while."""
    name = create.split()[2]
    with postgres.connect(deployment) as session:
        session.execute(create)
        for value in values:
            session.execute(f"insert into {name} values (%s)", (value,))  # noqa: S608
        try:
            yield
        finally:
            session.execute(f"drop table {name}")


@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        ((HEAD,), "ok", f"at head {HEAD}"),
        ((BEFORE,), "fail", f"the database is at {BEFORE}, the code at {HEAD}"),
        ((), "fail", f"the database is at no revision, the code at {HEAD}"),
        (("ffff00001111",), "fail", "a newer release migrated it"),
        ((HEAD, BEFORE), "fail", f"the database is at {BEFORE}, {HEAD}, the code at {HEAD}"),
    ],
)
def test_db_migrated(with_dify, rows, status, said):
    with table(with_dify, "create table alembic_version (version_num varchar(32))", *rows):
        found = examine(with_dify, "db.migrated")
    assert found.status == status and said in found.evidence


def test_db_migrated_before_the_first_migration_and_without_code(with_dify):
    assert "no revision" in examine(with_dify, "db.migrated").evidence
    found = examine(dataclasses.replace(with_dify, facts=Facts()), "db.migrated")
    assert found.status == "skip" and "no Dify code" in found.evidence
    locked_out = with_secrets(with_dify, DIFY_DB_PASSWORD="another")
    assert examine(locked_out, "db.migrated").evidence == "needs pg.hba"


# --- the worker -----------------------------------------------------------------------------------

_APP = """
import os, time
from celery import Celery
app = Celery(broker=os.environ["CELERY_BROKER_URL"])
@app.task(name="hold")
def hold(seconds):
    open(os.environ["HELD"], "w").close()
    time.sleep(seconds)
"""


@contextmanager
def worker(deployment: Deployment, folder: Path, queues: tuple[str, ...]) -> Iterator[None]:
    """A real Celery worker of this deployment; a task holds all of it (pool `solo`)."""
    from difyops.services import api

    (folder / "held_app.py").write_text(_APP)
    environment = {
        **os.environ,
        **api.process(deployment, "celery").plain_env(),
        "PATH": os.environ["PATH"],
        "HELD": str(folder / "held"),
        MARKER: str(deployment.paths.root),
    }
    log = (folder / "worker.log").open("w")
    child = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "held_app", "worker", "-P", "solo",
         "-Q", ",".join(queues), "--loglevel", "INFO"],
        cwd=folder, env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        poll(lambda: " ready." in (folder / "worker.log").read_text(), 60)
        yield
    finally:
        child.kill()
        child.wait()
        log.close()
        with valkey.client(deployment, valkey.BROKER_DB) as broker:
            broker.flushdb()


def send(deployment: Deployment, folder: Path, seconds: int) -> None:
    from difyops.services import api

    subprocess.run(
        [sys.executable, "-c", "import sys, held_app\n"
         "held_app.hold.apply_async((int(sys.argv[1]),), queue='dataset')", str(seconds)],
        cwd=folder, check=True, timeout=60,
        env={**os.environ, **api.process(deployment, "x").plain_env(), "PATH": os.environ["PATH"]},
    )  # fmt: skip


def test_celery_without_any_worker(with_dify):
    found = examine(with_dify, "celery.queues")
    assert found.status == "fail" and found.evidence == "no worker answers, and none runs"
    assert examine(with_dify, "celery.stuck").evidence == "nothing waits"
    with valkey.client(with_dify, valkey.BROKER_DB) as broker:
        broker.lpush("mail", "{}", "{}")
        found = examine(with_dify, "celery.stuck")
        broker.flushdb()
    assert found.status == "fail" and found.evidence == "waiting with no worker: mail 2"
    no_code = dataclasses.replace(with_dify, facts=Facts())
    assert examine(no_code, "celery.queues").status == "skip"
    assert examine(no_code, "celery.stuck").status == "skip"
    down = set_to(with_dify, redis={"port": free_ports(1)[0]})
    assert examine(down, "celery.queues").evidence == "needs redis.up"


def test_celery_with_a_worker_that_lacks_queues(with_dify, tmp_path):
    with worker(with_dify, tmp_path, ("dataset", "ops_trace")):
        found = examine(with_dify, "celery.queues")
        assert found.status == "fail"
        assert found.evidence == "worker does not take: mail, app_deletion"
        assert found.fix.endswith("restart worker")
        with valkey.client(with_dify, valkey.BROKER_DB) as broker:
            broker.lpush("mail", "{}")
        found = examine(with_dify, "celery.stuck")
        assert found.status == "fail" and found.evidence == "waiting where no worker looks: mail 1"


def test_celery_with_a_whole_worker_idle_and_busy(with_dify, tmp_path):
    with worker(with_dify, tmp_path, QUEUES):
        assert examine(with_dify, "celery.queues").evidence == ", ".join(QUEUES)
        assert examine(with_dify, "celery.stuck").status == "ok"
        send(with_dify, tmp_path, 60)
        poll(lambda: (tmp_path / "held").exists())
        found = examine(with_dify, "celery.queues")
        assert found.status == "ok" and "too busy to answer" in found.evidence
        with valkey.client(with_dify, valkey.BROKER_DB) as broker:
            broker.lpush("dataset", "{}")
        found = examine(with_dify, "celery.stuck")
        assert found.status == "warn" and "it is busy, or hangs" in found.evidence


# --- the model, from where Dify calls it ----------------------------------------------------------


def test_model_from_caller(with_dify):
    assert examine(with_dify, "model.from-caller").status == "ok"
    proxy = f"http://me:proxy-pass@127.0.0.1:{free_ports(1)[0]}"
    captured = set_to(with_dify, dify={"env": {"HTTP_PROXY": proxy, "no_proxy": "nothing"}})
    found = examine(captured, "model.from-caller")
    assert found.status == "fail" and "ProxyError" in found.evidence
    assert "remove HTTP_PROXY, no_proxy from dify.env" in found.fix
    assert "proxy-pass" not in found.evidence
    exempt = set_to(with_dify, dify={"env": {"HTTP_PROXY": proxy}})
    assert examine(exempt, "model.from-caller").status == "ok"
    python = with_dify.paths.dify_python("0.15.3")
    text = python.read_text()
    python.write_text("#!/bin/sh\necho No module named requests >&2\nexit 1\n")
    found = examine(with_dify, "model.from-caller")
    assert found.status == "fail" and "No module named requests" in found.evidence
    python.unlink()
    assert examine(with_dify, "model.from-caller").status == "skip"
    python.write_text(text)
    python.chmod(0o755)


# --- the API, by its stand-in ---------------------------------------------------------------------


@pytest.fixture
def fake() -> Iterator[FakeDify015]:
    with serve_fake() as dify:
        yield dify


@pytest.fixture
def wired(with_dify, fake) -> Deployment:
    """The stack with the stand-in as its API, wired to the real model server."""
    port = int(fake.url.rsplit(":", 1)[1])
    deployment = with_secrets(set_to(with_dify, dify={"port": port}), ADMIN_PASSWORD=PASSWORD)
    fake.secret_key = deployment.secrets["SECRET_KEY"].reveal()
    wire.run(proof.target(deployment), lambda step, text: None)
    fake.calls.clear()
    return deployment


def test_api_health(wired, fake, with_dify):
    assert examine(wired, "api.health").evidence.startswith("dify 0.15.3")
    fake.health = {"version": "1.12.1"}
    found = examine(wired, "api.health")
    assert found.status == "fail" and "answered by dify 1.12.1, not 0.15.3" in found.evidence
    fake.health = {"hello": "world"}
    assert "is not Dify" in examine(wired, "api.health").evidence
    assert examine(with_dify, "api.health").evidence == "waiting for /health"
    assert examine(with_dify, "chat.end-to-end").evidence == "needs api.login"


@contextmanager
def process_of(deployment: Deployment, **environment: str) -> Iterator[int]:
    """A process of this deployment: its pid."""
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nimport time\ntime.sleep(600)"],
        stdout=subprocess.PIPE,
        env={MARKER: str(deployment.paths.root), **environment},
    )
    assert child.stdout
    child.stdout.readline()
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


_FILES = "create table upload_files (id uuid, created_at timestamp default now())"


def test_net_urls(wired, fake):
    with process_of(wired) as fake.pid, table(wired, _FILES, "0" * 32):
        assert examine(wired, "net.urls").status == "ok"
        assert fake.calls[f"GET /files/{'0' * 8}-0000-0000-0000-{'0' * 12}/file-preview"] == 1

        fake.secret_key = "of another deployment"
        found = examine(wired, "net.urls")
        assert found.status == "fail" and "answers 404 to the signed URL" in found.evidence
        fake.secret_key = wired.secrets["SECRET_KEY"].reveal()

        lost = set_to(wired, dify={"base_url": f"http://localhost:{free_ports(1)[0]}"})
        assert "does not answer" in examine(lost, "net.urls").evidence
        below = set_to(wired, dify={"base_url": f"{fake.url}/dify"})
        assert "has a path" in examine(below, "net.urls").evidence
        apart = set_to(wired, dify={"env": {"APP_WEB_URL": "http://elsewhere"}})
        assert examine(apart, "net.urls").status == "warn"
        harmless = set_to(wired, dify={"env": {"MARKETPLACE_API_URL": "http://elsewhere"}})
        assert examine(harmless, "net.urls").status == "ok"

        with process_of(wired, FILES_URL="http://old:1") as pid:
            found = examine(wired, "net.urls")
        assert found.status == "fail"
        assert f"what runs (pid {pid}) has FILES_URL=http://old:1" in found.evidence

    fake.pid = os.getpid()
    assert "another API" in examine(wired, "net.urls").evidence


def test_net_urls_through_a_front_end_that_does_not_hand_on_health(wired, fake):
    """Dify's own gateway gives the API /v1, /files, /console/api, and the rest to the web front."""
    with serve(_GATEWAY.replace("API", fake.url)) as port:
        behind = set_to(wired, dify={"base_url": f"http://127.0.0.1:{port}"})
        assert examine(behind, "net.urls").status == "ok"
    with serve(_GATEWAY.replace("API", fake.url).replace("/v1/", "/v9/")) as port:
        behind = set_to(wired, dify={"base_url": f"http://127.0.0.1:{port}"})
        assert "something else than dify 0.15.3" in examine(behind, "net.urls").evidence


_GATEWAY = """
from urllib.request import urlopen
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = urlopen("API" + self.path).read() if self.path.startswith("/v1/") else b"<html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
"""


def test_a_wrong_password_is_tried_once_by_the_whole_of_doctor(wired, fake):
    assert examine(wired, "api.login").status == "ok"
    fake.calls.clear()
    report = doctor.run(with_secrets(wired, ADMIN_PASSWORD="wrong-Passw0rd"), checks.ALL)
    said = {r.id: r for r in report.results}
    assert said["api.login"].status == "fail"
    assert "with another password" in said["api.login"].evidence
    assert "a day" in said["api.login"].fix
    for name in ("model.registered", "chat.end-to-end"):
        assert said[name].evidence == "needs api.login"
    # Six of them lock the account out for a day.
    assert fake.calls["POST /login"] == 1


def test_a_dify_that_nobody_set_up_is_not_logged_in_to(wired, fake):
    fake.is_set_up = False
    found = examine(wired, "api.login")
    assert found.status == "fail" and found.evidence == "Dify has no account yet"
    assert fake.calls["POST /login"] == 0 and fake.calls["POST /setup"] == 0


def test_model_registered_context_and_tools(wired, fake):
    stored = fake.models["llm", "smollm2-135m"]
    good = dict(stored)
    for name in ("model.registered", "model.context", "model.tools"):
        assert examine(wired, name).status == "ok"

    def planted(name, **values):
        stored.clear()
        stored.update({**good, **values})
        found = examine(wired, name)
        return found.status, found.evidence

    status, said = planted("model.registered", endpoint_url="http://127.0.0.1:1/v1")
    assert status == "fail" and said.startswith("Dify calls http://127.0.0.1:1/v1, not ")
    assert planted("model.registered", api_key="another-key-of-it")[0] == "fail"
    assert planted("model.context", context_size="32768") == (
        "fail",
        "Dify believes 32768 tokens, the server has 4096",
    )
    assert planted("model.context", context_size="2048")[0] == "warn"
    assert planted("model.context", context_size="")[0] == "fail"
    # The real model server has no tools for this model.
    status, said = planted("model.tools", function_calling_type="tool_call")
    assert status == "fail" and said.startswith("registered with tools, but")

    fake.models.clear()
    assert examine(wired, "model.registered").evidence == "smollm2-135m is not registered in Dify"
    assert examine(wired, "model.context").evidence == "needs model.registered"


def test_chat_end_to_end(wired, fake):
    assert examine(wired, "chat.end-to-end").status == "ok"
    fake.stream = sse(ERROR_EVENT)  # with HTTP 200
    found = examine(wired, "chat.end-to-end")
    assert found.status == "fail" and "HTTP 200 and held an error event" in found.evidence
    fake.stream, fake.answer = GOOD_STREAM, " "
    assert "the blocking answer is empty" in examine(wired, "chat.end-to-end").evidence
    fake.apps.clear()
    found = examine(wired, "chat.end-to-end")
    assert "has no app" in found.evidence and found.fix.endswith("wire")
