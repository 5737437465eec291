"""`kill -9` of every process that we run, one after the other: it comes back, nothing is lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from difyops import plan
from difyops.core import NotReady
from difyops.plan import MARKER
from difyops.services import model
from difyops.supervise import Supervisor
from tests.integration.conftest import Cli
from tests.integration.faults import eventually, left, load, nothing_lost, states, supervisord
from tests.recorder import Recorder


def comes_back(cli, name, seconds=30):
    """Kill a service; wait until it runs again and is ready."""
    before = states(cli)
    os.kill(before[name].pid, signal.SIGKILL)

    def back():
        now = states(cli)[name]
        return now.state == "running" and now.pid != before[name].pid and now

    now = eventually(back, seconds, 0.1)
    assert now.restarts == before[name].restarts + 1
    deployment = load(cli.root)
    service = plan.build(deployment).service(name)
    eventually(lambda: service.ready(deployment), seconds, 0.1)
    for other, state in states(cli).items():
        assert other == name or state.pid == before[other].pid


@pytest.mark.parametrize("name", ["postgres", "valkey"])
def test_killed_service_is_restarted(light, name):
    with nothing_lost(light.root):
        comes_back(light, name)


def test_restarts_are_counted_in_status(light):
    counts = [s["restarts"] for s in json.loads(light("status", "--json").stdout)["services"]]
    comes_back(light, "valkey")
    said = light("status", "--json")
    assert said.returncode == 0
    now = [s["restarts"] for s in json.loads(said.stdout)["services"]]
    assert now == [counts[0], counts[1] + 1, None]  # postgres, valkey, the model elsewhere


def test_killed_model_server_is_restarted_without_orphans(stack):
    cli = Cli(stack.paths.root)
    family = psutil.Process(states(cli)["model"].pid).children(recursive=True)
    assert family, "llama.cpp runs in a child"
    with nothing_lost(cli.root):
        comes_back(cli, "model", 60)
    assert model.ready(stack)
    eventually(lambda: not any(p.is_running() for p in family), 10)


def test_service_that_cannot_start_is_tried_with_back_off_then_given_up(light):
    with nothing_lost(light.root):
        Supervisor(load(light.root)).stop("valkey")
        manifest = light.root / "data/valkey/appendonlydir/appendonly.aof.manifest"
        good = manifest.read_bytes()
        manifest.write_bytes(b"nonsense\n")
        try:
            result = light("up", "--source")
        finally:
            manifest.write_bytes(good)
        assert result.returncode == 1
        assert "valkey ended 4 times at its start" in result.stderr
        assert "logs/valkey.log" in result.stderr
        assert "manifest" in result.stderr  # the service's own last words
        starts = (light.root / "run/valkey.starts").read_text().splitlines()
        times = [float(line.split()[0]) for line in starts]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert gaps[-1] > gaps[0] + 0.5, gaps
        assert light("up", "--source").returncode == 0


def test_killed_supervisord_leaves_no_orphan(light):
    os.kill(supervisord(light.root), signal.SIGKILL)
    eventually(lambda: not left(light.root), 10)
    assert all(s.state in ("stopped", "external") for s in states(light).values())
    assert _cluster_state(light.root) == "shut down"  # by itself, not crashed


def _cluster_state(root):
    """As Postgres itself notes it; its log went with supervisord, which writes it."""
    program = [root / "opt/postgres/bin/pg_controldata", root / "data/postgres"]
    said = subprocess.run(program, env={"LC_ALL": "C"}, capture_output=True, text=True, check=True)
    (line,) = (x for x in said.stdout.splitlines() if x.startswith("Database cluster state"))
    return line.partition(":")[2].strip()


def test_up_right_after_supervisord_was_killed_brings_all_back(light):
    with nothing_lost(light.root):
        before = states(light)
        os.kill(supervisord(light.root), signal.SIGKILL)
        # At once: the services are still ending, and may hold their ports.
        result = light("up", "--source")
        assert result.returncode == 0, result.stderr
        after = states(light)
        for name in ("postgres", "valkey"):
            assert after[name].state == "running"
            assert after[name].pid != before[name].pid


def test_supervisord_whose_socket_was_lost_is_ended_by_up(light):
    """Or two of them would fight over the same services."""
    with nothing_lost(light.root):
        assert light("up", "--source").returncode == 0
        lost = supervisord(light.root)
        (light.root / "run/supervisor.sock").unlink()
        result = light("up", "--source")
        assert result.returncode == 0, result.stderr
        assert not psutil.pid_exists(lost) or psutil.Process(lost).status() == "zombie"
        assert supervisord(light.root) != lost
        parents = {p.ppid() for p in left(light.root) if p.name() in ("postgres", "valkey-server")}
        assert supervisord(light.root) in parents and lost not in parents


def test_crashes_of_another_day_do_not_stop_a_service_that_is_loading(light):
    starts = light.root / "run/valkey.starts"
    starts.write_text(starts.read_text() * 6)
    supervisor = Supervisor(load(light.root))
    service = plan.build(load(light.root)).service("valkey")
    answers = iter([NotReady("loading"), NotReady("loading"), None])

    def slow(deployment):
        answer = next(answers)
        if answer:
            raise answer
        return "ready"

    assert supervisor.await_ready(dataclasses.replace(service, ready=slow), Recorder()) == "ready"
    assert states(light)["valkey"].state == "running"
    starts.write_text(starts.read_text().splitlines()[0] + "\n")


def test_services_that_survived_supervisord_are_ended_by_up(light):
    """As if the kernel had not ended them: they hold the ports and the data."""
    with nothing_lost(light.root):
        assert light("down").returncode == 0
        deployment = load(light.root)
        survivors = [_by_hand(deployment, name) for name in ("postgres", "valkey")]
        try:
            for name in ("postgres", "valkey"):
                service = plan.build(deployment).service(name)
                eventually(lambda service=service: service.ready(deployment))
            result = light("up", "--source")
            assert result.returncode == 0, result.stderr
            assert all(child.poll() is not None for child in survivors)
        finally:
            for child in survivors:
                child.kill()
                child.wait()


def _by_hand(deployment, name):
    """A service as supervisord would have started it, without supervisord."""
    process = plan.build(deployment).service(name).process
    user = deployment.user
    return subprocess.Popen(
        process.argv,
        cwd=process.cwd,
        env={**process.plain_env(), MARKER: str(deployment.paths.root)},
        user=user.uid if user else None,
        group=user.gid if user else None,
        extra_groups=[] if user else None,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        umask=0o077,
    )


@pytest.mark.parametrize("path", ["", "2"], ids=["ours", "another deployment's"])
def test_stray_process(light, path):
    stray = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env={**os.environ, MARKER: f"{light.root}{path}"},
    )
    try:
        eventually(lambda: psutil.Process(stray.pid).environ().get(MARKER))
        result = light("down")
        assert result.returncode == 0, result.stderr
        if path:
            assert stray.poll() is None
            assert "left-over" not in result.stderr
        else:
            assert stray.wait(5) == -signal.SIGTERM
            assert f"pid {stray.pid}" in result.stderr
    finally:
        stray.kill()
        stray.wait()
