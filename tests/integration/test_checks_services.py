"""doctor's checks of Postgres, Valkey and the model server, with faults in the real ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import ExitStack

import jsonschema
import psycopg
import pytest

from difyops.core import Paths
from difyops.services import postgres, valkey
from tests.integration.conftest import Cli, free_ports
from tests.integration.examine import examine, paste, set_to, with_secrets
from tests.unit.test_doctor import GOLDEN


def test_a_healthy_stack_raises_no_alarm(stack):
    done = Cli(stack.paths.root)("doctor", "--json")
    found = json.loads(done.stdout)
    jsonschema.validate(found, json.loads(GOLDEN.read_text()))
    for check in found["checks"]:
        # The machine that runs the tests may be small or busy.
        assert check["status"] in ("ok", "skip") or check["id"].startswith("host."), check
    failed = [check["id"] for check in found["checks"] if check["status"] == "fail"]
    assert found["counts"]["fail"] == len(failed)
    assert found["healthy"] is not bool(failed), failed
    assert done.returncode == (1 if failed else 0), failed
    text = Cli(stack.paths.root)("doctor", "--only", "pg", "--only", "redis")
    assert text.stdout.splitlines()[:2] == [
        "pg         ok    6 checks",
        "redis      ok    3 checks",
    ]
    for shown in (done.stdout, text.stdout, text.stderr, done.stderr):
        assert "\x1b" not in shown
        for name in stack.secrets.names():
            assert stack.secrets[name].reveal() not in shown


# --- Postgres -------------------------------------------------------------------------------------


def test_pg_up_and_what_needs_it(stack):
    down = set_to(stack, postgres={"port": free_ports(1)[0]})
    found = examine(down, "pg.up")
    assert found.status == "fail" and "refused" in found.evidence
    assert examine(down, "pg.ext").evidence == "needs pg.hba"
    assert examine(stack, "pg.up").status == "ok"


def test_pg_version(stack):
    newer = stack.release.model_copy(update={"postgres": (17, 18)})
    found = examine(dataclasses.replace(stack, release=newer), "pg.version")
    assert found.status == "fail" and found.evidence == "Postgres 16; dify 0.15.3 works with 17-18"
    assert examine(stack, "pg.version").status == "ok"


def test_pg_version_without_any_password_cannot_look(stack):
    locked_out = with_secrets(stack, DIFY_DB_PASSWORD="x", POSTGRES_SUPERUSER_PASSWORD="x")
    assert examine(locked_out, "pg.version").status == "skip"
    assert examine(locked_out, "pg.conn").status == "skip"


def test_pg_ext_and_pg_hba_and_that_up_mends_both(stack):
    with postgres.connect(stack, role="superuser", database="dify_vector") as session:
        session.execute("drop extension vector")
        found = examine(stack, "pg.ext")
        assert found.status == "fail" and found.evidence == "missing: vector in dify_vector"
        assert found.fix.endswith("up --source")
        session.execute("alter role dify password 'another'")
    found = examine(stack, "pg.hba")
    assert found.status == "fail"
    assert found.evidence == 'dify@dify: password authentication failed for user "dify"'
    assert examine(stack, "pg.ext").evidence == "needs pg.hba"
    paste(found.fix)
    assert examine(stack, "pg.hba").status == "ok"
    assert examine(stack, "pg.ext").status == "ok"


def test_pg_hba_tells_the_superuser_apart(stack):
    found = examine(with_secrets(stack, POSTGRES_SUPERUSER_PASSWORD="another"), "pg.hba")
    assert found.status == "fail" and found.evidence.startswith("postgres@postgres: password")
    assert found.fix.endswith("secrets apply")


def test_pg_hba_sees_a_missing_entry_and_its_fix_restores_the_file(stack):
    path = stack.paths.etc / "pg_hba.conf"
    path.write_text("host all postgres 127.0.0.1/32 scram-sha-256\n")
    with postgres.connect(stack, role="superuser") as session:
        session.execute("select pg_reload_conf()")
    poll(lambda: examine(stack, "pg.hba").status == "fail")
    found = examine(stack, "pg.hba")
    assert "no pg_hba.conf entry" in found.evidence
    paste(found.fix)
    assert examine(stack, "pg.hba").status == "ok"


def test_pg_conn_counts_and_tells_who_holds_them(stack):
    assert examine(stack, "pg.conn").status == "ok"
    with ExitStack() as held:
        for _ in range(150):
            held.enter_context(postgres.connect(stack))
        found = examine(stack, "pg.conn")
        assert found.status == "warn" and "difyops 15" in found.evidence
        with pytest.raises(psycopg.OperationalError):
            while True:
                held.enter_context(postgres.connect(stack))
        found = examine(stack, "pg.conn")
        assert found.status == "fail" and "of 200 used" in found.evidence
        # Nobody is refused for the want of a password or an entry.
        assert examine(stack, "pg.hba").status == "skip"
    poll(lambda: examine(stack, "pg.conn").status == "ok")


# --- Valkey ---------------------------------------------------------------------------------------


def test_redis_up(stack):
    found = examine(set_to(stack, redis={"port": free_ports(1)[0]}), "redis.up")
    assert found.status == "fail" and "refused" in found.evidence
    found = examine(with_secrets(stack, REDIS_PASSWORD="another"), "redis.up")
    assert found.status == "fail" and "refuses the password" in found.evidence
    assert examine(stack, "redis.up").status == "ok"


def test_redis_durable(stack):
    with valkey.client(stack) as session:
        session.config_set("maxmemory", 2**30)
        session.config_set("maxmemory-policy", "allkeys-lru")
        found = examine(stack, "redis.durable")
        assert found.status == "warn" and "allkeys-lru" in found.evidence
        session.config_set("appendonly", "no")
        found = examine(stack, "redis.durable")
        assert found.status == "warn" and "append-only file is off" in found.evidence
    paste(found.fix)
    assert examine(stack, "redis.durable").status == "ok"


def test_redis_password(stack):
    with valkey.client(stack) as session:
        session.config_set("requirepass", "")
        found = examine(stack, "redis.password")
    assert found.status == "fail" and found.evidence == "answers without a password"
    paste(found.fix)
    assert examine(stack, "redis.password").status == "ok"


# --- the model server -----------------------------------------------------------------------------


def test_model_up(stack):
    found = examine(set_to(stack, model={"port": free_ports(1)[0]}), "model.up")
    assert found.status == "fail" and "waiting for it to listen" in found.evidence
    url = f"http://127.0.0.1:{stack.settings.model.port}/v1"
    elsewhere = set_to(stack, model={"backend": "external", "url": url, "name": "gpt-9"})
    keyed = with_secrets(elsewhere, EXTERNAL_MODEL_API_KEY=stack.secrets["MODEL_API_KEY"].reveal())
    found = examine(keyed, "model.up")
    assert found.status == "fail" and "has no model 'gpt-9'" in found.evidence
    assert "refuses the API key" in examine(elsewhere, "model.up").evidence
    assert examine(stack, "model.up").status == "ok"


def test_a_proxy_of_the_shell_does_not_hide_what_runs_here(stack):
    proxy = f"http://127.0.0.1:{free_ports(1)[0]}"
    shell = {**os.environ, "HTTP_PROXY": proxy, "http_proxy": proxy, "all_proxy": proxy}
    done = Cli(stack.paths.root)("doctor", "--only", "model.embedding", env=shell)
    assert done.returncode == 0, done.stdout


def test_model_bind_sees_an_open_listener_and_its_fix_closes_it(stack):
    path = stack.paths.root / "etc" / "model.json"
    path.write_text(path.read_text().replace('"127.0.0.1"', '"0.0.0.0"'))
    done = Cli(stack.paths.root)("restart", "model")
    assert done.returncode == 0, done.stderr
    found = examine(stack, "model.bind")
    assert found.status == "fail" and found.evidence.startswith("listens on 0.0.0.0")
    paste(found.fix)
    assert examine(stack, "model.bind").status == "ok"


def test_model_bind_sees_that_another_process_answers(stack, tmp_path):
    stranger = dataclasses.replace(stack, paths=Paths(tmp_path))
    found = examine(stranger, "model.bind")
    assert found.status == "fail" and "not by this deployment" in found.evidence


def test_model_chat_and_embedding(stack):
    with serve(_SILENT) as port:
        silent = {"backend": "external", "url": f"http://127.0.0.1:{port}/v1", "name": "silent"}
        found = examine(set_to(stack, model=silent), "model.chat")
    assert found.status == "fail" and "without any text" in found.evidence
    url = f"http://127.0.0.1:{stack.settings.model.port}/v1"
    wrong = with_secrets(
        set_to(stack, embedding={"name": "smollm2-135m", "url": url}),
        EXTERNAL_MODEL_API_KEY=stack.secrets["MODEL_API_KEY"].reveal(),
    )
    assert examine(wrong, "model.embedding").status == "fail"
    assert examine(set_to(stack, embedding=None), "model.embedding").status == "skip"
    assert examine(stack, "model.chat").status == "ok"
    assert examine(stack, "model.embedding").evidence == "minilm-l6, 384 dimensions"


def test_model_proxy(stack):
    def proxied(**env):
        return examine(set_to(stack, dify={"env": env}), "model.proxy")

    assert examine(stack, "model.proxy").status == "ok"
    assert proxied(HTTP_PROXY="http://proxy:3128").status == "ok"
    found = proxied(HTTP_PROXY="http://proxy:3128", no_proxy="example.org")
    assert found.status == "fail"
    assert found.evidence == "HTTP_PROXY captures calls to 127.0.0.1: no_proxy has example.org"
    assert proxied(HTTP_PROXY="http://proxy:3128", no_proxy="127.0.0.0/8").status == "ok"
    # A proxy for https alone does not see plain http; of two spellings the lower one is ours.
    assert proxied(HTTPS_PROXY="http://proxy:3128", no_proxy="example.org").status == "ok"
    assert proxied(HTTP_PROXY="http://proxy:3128", NO_PROXY="example.org").status == "ok"


# --- helpers --------------------------------------------------------------------------------------


def poll(happened, seconds: float = 10) -> None:
    import time

    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


_SILENT = """
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b'{"data": [{"id": "silent"}]}')
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b'data: {"choices": [{"delta": {"content": ""}}]}\\n\\ndata: [DONE]\\n\\n')
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
"""


def serve(handler: str, **environment: str):
    """A small HTTP server as a process of its own; its port."""
    from contextlib import contextmanager

    program = f"""
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
{handler}
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""

    @contextmanager
    def running():
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            assert child.stdout
            yield int(child.stdout.readline())
        finally:
            child.kill()
            child.wait()
            assert child.stdout
            child.stdout.close()

    return running()
