"""What `up --source` without Dify brings up, as a person sees it."""

from __future__ import annotations

import json

from difyops.services import postgres, valkey
from tests.integration.conftest import Cli


def test_status_and_second_up(stack):
    cli = Cli(stack.paths.root)
    states = json.loads(cli("status", "--json").stdout)["services"]
    assert {s["name"]: s["state"] for s in states} == {
        "postgres": "running",
        "valkey": "running",
        "model": "running",
    }
    again = cli("up", "--source")
    assert again.returncode == 0, again.stderr
    after = json.loads(cli("status", "--json").stdout)["services"]
    assert [s["pid"] for s in after] == [s["pid"] for s in states], again.stderr


def test_databases_have_their_extensions(stack):
    with postgres.connect(stack) as session:
        assert session.execute("select uuid_generate_v4() <> uuid_nil()").fetchone()[0]
    with postgres.connect(stack, database="dify_vector") as session:
        assert session.execute("select '[1,2]'::vector <-> '[1,3]'::vector").fetchone()[0] == 1


def test_valkey_keeps_a_password_and_an_append_only_file(stack):
    assert valkey.client(stack).config_get("appendonly")["appendonly"] == "yes"
