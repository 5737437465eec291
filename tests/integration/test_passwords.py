"""Data that was made with other passwords than secrets.env has."""

from __future__ import annotations

import shutil

import pytest
import redis
import yaml

from difyops import secrets
from difyops.services import postgres, valkey
from tests.integration.conftest import make
from tests.integration.faults import load, nothing_lost, without_model


def test_regenerated_secrets_and_apply(light):
    with nothing_lost(light.root):
        file = light.root / "secrets.env"
        shutil.move(file, light.root / "secrets.old")
        secrets.ensure(file)
        result = light("up", "--source")
        assert result.returncode == 1
        assert result.stderr.count("error:") == 1
        assert "data/postgres was made with another password" in result.stderr
        assert "difyops secrets apply" in result.stderr
        assert "Traceback" not in result.stderr
        applied = light("secrets", "apply")
        assert applied.returncode == 0, applied.stderr
        for secret in load(light.root).secrets.names():
            value = load(light.root).secrets[secret].reveal()
            assert value not in applied.stderr + applied.stdout
            for log in (light.root / "logs").rglob("*.log"):
                assert value not in log.read_text(), (secret, log)
        assert light("up", "--source").returncode == 0


def test_old_secrets_put_back_work_too(light):
    with nothing_lost(light.root):
        file = light.root / "secrets.env"
        kept = file.read_text()
        file.unlink()
        secrets.ensure(file)
        assert light("up", "--source").returncode == 1
        file.write_text(kept)
        assert light("up", "--source").returncode == 0


def test_only_the_roles_password_changed(light):
    """The superuser's is right, so `up` itself mends the role's."""
    file = light.root / "secrets.env"
    old = load(light.root).secrets["DIFY_DB_PASSWORD"].reveal()
    file.write_text(file.read_text().replace(old, old[::-1]))
    result = light("up", "--source")
    assert result.returncode == 0, result.stderr
    postgres.connect(load(light.root)).close()


def test_secrets_apply_before_there_is_data(new, standin):
    cli = new(**without_model(standin))
    result = cli("secrets", "apply")
    assert result.returncode in (1, 3)
    assert "difyops up" in result.stderr
    assert "Traceback" not in result.stderr


def test_valkey_of_another_password_answers(light, workspace, standin):
    """An external server that has another password: said once, with the remedy."""
    other = load(light.root)
    where = valkey.address(other)
    changes = without_model(standin)
    changes["redis"] = {"provider": "external", "url": f"redis://127.0.0.1:{where.port}"}
    cli = make(workspace / "second", changes)
    content = yaml.safe_load((cli.root / "difyops.yaml").read_text())
    content["redis"].pop("port")
    (cli.root / "difyops.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(redis.AuthenticationError):
        valkey.client(load(cli.root)).ping()
    result = cli("up", "--source")
    assert result.returncode == 3
    assert "refuses the password in secrets.env (REDIS_PASSWORD)" in result.stderr
    assert result.stderr.count("error:") == 1
    file = cli.root / "secrets.env"
    mine, right = (d.secrets["REDIS_PASSWORD"].reveal() for d in (load(cli.root), other))
    file.write_text(file.read_text().replace(mine, right))
    result = cli("up", "--source")
    assert result.returncode == 0, result.stdout + result.stderr
