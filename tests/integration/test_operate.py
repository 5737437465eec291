"""down, restart, logs, render: what a person does with a deployment that runs."""

from __future__ import annotations

import configparser
import queue
import socket
import threading

import psutil
import pytest
import yaml

from tests.integration.faults import eventually, left, load, nothing_lost, states, without_model


def test_down_stops_all_in_reverse_order(light):
    with nothing_lost(light.root):
        running = [s for s in states(light).values() if s.pid]
        result = light("down")
        assert result.returncode == 0
        stopped = [x.split()[1] for x in result.stderr.splitlines() if "stopped" in x]
        assert stopped == ["valkey", "postgres"]
        log = (light.root / "logs/postgres.log").read_text()
        assert log.rindex("received fast shutdown request") < log.rindex("system is shut down")
        assert left(light.root) == []
        for state in running:
            assert not psutil.pid_exists(state.pid)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", state.port), timeout=2)
        assert light("status").returncode == 1
        again = light("down")
        assert again.returncode == 0
        assert again.stderr.strip() == "- nothing of this deployment is running"
        assert light("up", "--source").returncode == 0
    assert light("status").returncode == 0


def test_restart_one(light):
    with nothing_lost(light.root):
        before = states(light)
        result = light("restart", "postgres")
        assert result.returncode == 0, result.stderr
        after = states(light)
        assert after["postgres"].pid != before["postgres"].pid
        assert after["valkey"].pid == before["valkey"].pid
        assert after["postgres"].restarts == 0


@pytest.mark.parametrize("command", [("restart",), ("logs",)])
def test_unknown_service(light, command):
    result = light(*command, "postgre")
    assert result.returncode in (1, 2)
    assert "no service 'postgre' runs here" in result.stderr
    assert "services: postgres, valkey" in result.stderr


# --- logs -----------------------------------------------------------------------------------------


def test_rotation_is_configured(light):
    parser = configparser.RawConfigParser()
    parser.read(light.root / "etc/supervisord.conf")
    for section in parser.sections():
        if section.startswith("program:"):
            assert parser[section]["stdout_logfile_maxbytes"] == "10MB"
            assert int(parser[section]["stdout_logfile_backups"]) >= 1
    assert parser["supervisord"]["logfile_maxbytes"] == "10MB"


def test_logs_follow_across_rotation(light):
    """Rotated as supervisord does it: renamed, and a new file of the old name."""
    log = light.root / "logs/valkey.log"
    child = light.start("logs", "-f", "-n", "1", "valkey", env=None)
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(x) for x in child.stdout], daemon=True)
    reader.start()

    def said(word):
        while word not in lines.get(timeout=10):
            pass
        return True

    try:
        lines.get(timeout=10)  # the last line of now
        with log.open("a") as file:
            file.write("before rotation\n")
        assert said("before rotation")
        with log.open("a") as file:
            file.write("with the rotation\n")
            old = log.rename(log.with_name("valkey.log.1"))
            file.write("just after it, by one who had the file open\n")
            file.flush()
            log.write_text("after rotation\n")
        assert said("with the rotation")
        assert said("just after it")
        assert said("after rotation")
        with log.open("a") as file:
            file.write("half a ")
            file.flush()
            file.write("line\n")
        assert said("half a line")
    finally:
        child.terminate()
        child.wait(10)
        reader.join(10)
        child.stdout.close()
        child.stderr.close()
        old.unlink(missing_ok=True)
        light("restart", "valkey")
    assert child.returncode == 143


# --- rendered files -------------------------------------------------------------------------------


def test_edited_file_is_kept_and_said_so(light):
    conf = light.root / "etc/postgresql.conf"
    rendered = conf.read_text()
    assert light("render", "--check").returncode == 0
    edited = rendered.replace("max_connections = 200", "max_connections = 150")
    conf.write_text(edited)
    try:
        check = light("render", "--check")
        assert check.returncode == 1
        assert "etc/postgresql.conf" in check.stdout
        result = light("up", "--source")
        assert result.returncode == 0, result.stderr
        assert "etc/postgresql.conf: kept as you edited it" in result.stderr
        assert conf.read_text() == edited
        assert light("restart", "postgres").returncode == 0
        from difyops.services import postgres

        with postgres.connect(load(light.root)) as session:
            assert session.execute("show max_connections").fetchone()[0] == "150"
    finally:
        assert light("render", "--force").returncode == 0
    assert conf.read_text() == rendered
    assert light("render", "--check").returncode == 0
    assert light("restart", "postgres").returncode == 0


def test_check_sees_drift_and_writes_nothing(light):
    path = light.root / "difyops.yaml"
    kept = path.read_text()
    content = yaml.safe_load(kept)
    content["redis"]["port"] += 1
    before = (light.root / "etc/valkey.conf").read_text()
    path.write_text(yaml.safe_dump(content))
    try:
        assert light("render", "--check").returncode == 1
        assert (light.root / "etc/valkey.conf").read_text() == before
    finally:
        path.write_text(kept)
    assert light("render", "--check").returncode == 0


# --- paths ----------------------------------------------------------------------------------------

ODD = "it's 100% mine;äö"


def test_path_that_initdb_cannot_have(new, standin):
    cli = new("$HOME", **without_model(standin))
    result = cli("up", "--source")
    assert result.returncode == 3
    assert "'$' in the path" in result.stderr


def test_path_that_supervisord_cannot_have(new, standin):
    cli = new("Dify #1", **without_model(standin))
    result = cli("up", "--source")
    assert result.returncode in (2, 3)
    assert "' #' cannot stand in the path" in result.stdout + result.stderr
    assert not (cli.root / "opt").exists()


@pytest.mark.parametrize("name", [ODD, "long/" + "n" * 60 + "/" + "m" * 60], ids=["odd", "long"])
def test_paths(new, standin, name):
    cli = new(name, **without_model(standin))
    assert name == ODD or len(str(cli.root)) > 108
    result = cli("up", "--source")
    assert result.returncode == 0, result.stderr
    assert cli("status").returncode == 0
    with nothing_lost(cli.root):
        assert cli("restart", "valkey").returncode == 0
        pid = states(cli)["valkey"].pid
        assert psutil.Process(pid).environ()["DIFYOPS_DEPLOYMENT"] == str(cli.root)
    assert cli("down").returncode == 0
    eventually(lambda: left(cli.root) == [])


def test_a_typo_in_the_settings_does_not_keep_services_running(new, standin):
    cli = new(**without_model(standin))
    assert cli("up", "--source").returncode == 0
    path = cli.root / "difyops.yaml"
    whole = path.read_text()
    path.write_text(whole + "typo: 1\n")
    result = cli("down")
    assert result.returncode == 2
    assert "typo: unknown key" in result.stderr
    eventually(lambda: not left(cli.root), 10)
    path.write_text(whole)
    result = cli("down")
    assert result.returncode == 0
    assert "nothing of this deployment is running" in result.stderr


def test_an_external_model_that_does_not_answer_is_said_before_anything_is_done(new):
    cli = new(**without_model("http://127.0.0.1:9"))
    result = cli("up", "--source")
    assert result.returncode == 3
    assert "model.url" in result.stderr and "set model.url in difyops.yaml" in result.stderr
    assert not (cli.root / "opt/postgres").exists()
