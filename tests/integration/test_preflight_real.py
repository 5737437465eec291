"""A taken port stops `up` before anything is started or written."""

from __future__ import annotations

import os
import re
import socket

import pytest
import yaml

from difyops.init import is_free
from tests.integration.faults import states, without_model

KEYS = {"postgres": "postgres.port", "redis": "redis.port", "model": "model.port"}


def _change(root, section, **values):
    path = root / "difyops.yaml"
    content = yaml.safe_load(path.read_text())
    content[section] = {**content[section], **values}
    path.write_text(yaml.safe_dump(content))
    return content


def _everything(root):
    return {
        path.relative_to(root): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
        if path.relative_to(root).parts[0] != "run"  # the lock
    }


@pytest.mark.parametrize("section", KEYS)
@pytest.mark.parametrize("host", ["127.0.0.1", ""], ids=["loopback", "every"])
def test_taken_port(new, section, host):
    cli = new()
    port = yaml.safe_load((cli.root / "difyops.yaml").read_text())[section]["port"]
    before = _everything(cli.root)
    with socket.create_server((host, port)):
        result = cli("up", "--source")
    assert result.returncode == 3
    said = result.stdout + result.stderr
    assert f"port {port}" in said
    assert re.search(rf"taken by \S+ \(pid {os.getpid()}\)", said), said
    offered = re.search(rf"{KEYS[section]}: (\d+)", said)
    assert offered, said
    assert int(offered[1]) != port
    assert is_free(int(offered[1]))
    assert _everything(cli.root) == before
    assert sorted(p.name for p in (cli.root / "run").iterdir()) == ["lock"]


def test_port_changed_to_a_taken_one(light):
    """What runs is not touched for a change that cannot work."""
    before = states(light)
    kept = (light.root / "difyops.yaml").read_text()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        _change(light.root, "redis", port=port)
        try:
            result = light("up", "--source")
        finally:
            (light.root / "difyops.yaml").write_text(kept)
    assert result.returncode == 3
    assert f"port {port}, for valkey, is taken" in result.stdout + result.stderr
    assert {n: s.pid for n, s in states(light).items()} == {n: s.pid for n, s in before.items()}


def test_changed_port_restarts_just_that_service(light):
    from tests.integration.conftest import free_ports
    from tests.integration.faults import nothing_lost

    with nothing_lost(light.root):
        before = states(light)
        (port,) = free_ports(1)
        _change(light.root, "redis", port=port)
        result = light("up", "--source")
        assert result.returncode == 0, result.stderr
        assert "valkey: its configuration changed" in result.stderr
        after = states(light)
        assert after["valkey"].pid != before["valkey"].pid
        assert after["valkey"].port == port
        assert after["postgres"].pid == before["postgres"].pid


def test_two_services_on_one_port(new, standin):
    cli = new(**without_model(standin))
    content = yaml.safe_load((cli.root / "difyops.yaml").read_text())
    _change(cli.root, "redis", port=content["postgres"]["port"])
    result = cli("up", "--source")
    assert result.returncode == 2
    assert "redis.port and postgres.port are both" in result.stderr
