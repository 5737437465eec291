"""doctor's checks of the machine, the secrets and the ports, with faults planted in real ones."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from difyops import deployment as deployments
from difyops import files, secrets, text
from difyops.checks import host
from difyops.core import User
from difyops.services import valkey
from difyops.supervise import Supervisor
from tests.integration.conftest import free_ports, needs_root
from tests.integration.examine import examine, paste, set_to, with_secrets
from tests.integration.test_checks_services import poll, serve


@pytest.fixture
def fresh(new):
    """A deployment that was never brought up."""
    return deployments.load(new().root)


# --- host -----------------------------------------------------------------------------------------

Disk = namedtuple("Disk", "f_bavail f_frsize f_files f_favail f_flag")


def test_host_disk_by_phase(fresh, monkeypatch):
    def with_free(gib: float, inodes: int = 10**6, files: int = 10**7, **facts):
        disk = Disk(int(gib * 2**20), 1024, files, inodes, 0)
        monkeypatch.setattr(os, "statvfs", lambda path: disk)
        enabled = set_to(fresh, dify={"enabled": True})
        known = dataclasses.replace(enabled, facts=dataclasses.replace(enabled.facts, **facts))
        return examine(known, "host.disk")

    assert with_free(4).status == "fail"  # Dify is still to be installed
    assert with_free(4).evidence.endswith("5 GiB needed")
    assert with_free(8).status == "warn"
    assert with_free(4, environment="there").status == "ok"  # it is, and needs no more room
    assert with_free(1, environment="there").status == "warn"
    assert with_free(0.2, environment="there").status == "fail"
    assert "files can still be made" in with_free(20, inodes=1000).evidence
    assert with_free(20, inodes=0, files=0).status == "ok"  # a file system without inodes
    monkeypatch.undo()
    assert examine(fresh, "host.disk").status in ("ok", "warn")


def test_the_fix_for_a_full_disk_shows_what_fills_it(fresh, monkeypatch):
    (fresh.paths.root / "big").write_bytes(b"x" * 5_000_000)
    monkeypatch.setattr(host, "DISK_WITHOUT", (10**9, 10**9))
    found = examine(fresh, "host.disk")
    assert found.status == "fail"
    paste(found.fix.split("(what fills it: ")[1].removesuffix(")"))


def test_host_memory_asks_for_what_is_still_to_start(fresh, stack, monkeypatch):
    monkeypatch.setattr(host, "memory_available", lambda: (int(0.4 * 2**30), 2**33))
    assert examine(fresh, "host.memory").status == "warn"
    assert examine(stack, "host.memory").status == "ok"  # everything runs
    found = examine(set_to(fresh, dify={"enabled": True}), "host.memory")
    assert found.status == "fail" and "1.5 GiB needed for" in found.evidence


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_control_group_is_without_its_cache(tmp_path, version):
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text("1000000\n")
    (folder / names[1]).write_text("900000\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} 300000\n")
    assert host.memory_available(tmp_path) == (400_000, 1_000_000)
    (folder / names[0]).write_text("max\n")
    assert host.memory_available(tmp_path)[1] > 2**28


def test_host_cpu(fresh, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert host.cpu_quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host.cpu_quota(tmp_path) == float("inf")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert examine(fresh, "host.cpu").evidence.startswith("1 processor, ")
    assert examine(fresh, "host.cpu").status == "warn"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "getloadavg", lambda: (90.0, 0, 0))
    assert examine(fresh, "host.cpu").status == "ok"  # the load is of all 64
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert examine(fresh, "host.cpu").status == "warn"


NOBODY = User("nobody", 65534, 65534, "/nonexistent")


@needs_root
@pytest.mark.parametrize("user", [NOBODY, None], ids=["there", "still to be made"])
def test_host_write_sees_a_closed_folder_on_the_way(fresh, user):
    other = dataclasses.replace(fresh, user=user)
    assert examine(other, "host.write").status == "ok"
    fresh.paths.root.parent.chmod(0o700)
    found = examine(other, "host.write")
    assert found.status == "fail"
    assert found.evidence.endswith(f"cannot enter {fresh.paths.root.parent}")
    paste(found.fix.split(";")[0])
    assert examine(other, "host.write").status == "ok"


@needs_root
def test_host_write_sees_data_of_another_user(fresh):
    folder = fresh.paths.data / "valkey"
    folder.mkdir(parents=True)
    mine = dataclasses.replace(fresh, user=NOBODY)
    found = examine(mine, "host.write")
    assert found.status == "fail" and "belongs to uid 0" in found.evidence
    paste(found.fix)
    assert examine(mine, "host.write").status == "ok"


@pytest.mark.parametrize("fault", ["whole", "below"])
def test_storage_perm(fresh, fault):
    root = os.geteuid() == 0
    with_dify = dataclasses.replace(
        set_to(fresh, dify={"enabled": True}), user=NOBODY if root else None
    )
    storage = fresh.paths.data / "storage"
    found = examine(with_dify, "storage.perm")
    assert found.status == "fail" and "is missing" in found.evidence
    inner = storage / "upload_files" / "tenant"
    inner.mkdir(parents=True)
    if root:
        for folder in (storage, storage / "upload_files", inner):
            shutil.chown(folder, NOBODY.uid, NOBODY.gid)
    assert examine(with_dify, "storage.perm").status == "ok"
    assert sorted(storage.iterdir()) == [storage / "upload_files"]  # nothing is left there
    closed = storage if fault == "whole" else inner
    if root:
        shutil.chown(closed, 0, 0)
    closed.chmod(0o500)
    found = examine(with_dify, "storage.perm")
    assert found.status == "fail" and str(closed) in found.evidence
    if root:
        paste(found.fix)
        assert examine(with_dify, "storage.perm").status == "ok"
    closed.chmod(0o700)


def test_storage_elsewhere_is_not_looked_at(fresh):
    found = examine(
        set_to(fresh, dify={"enabled": True, "env": {"STORAGE_TYPE": "s3"}}), "storage.perm"
    )
    assert found.status == "skip" and "s3" in found.evidence


# --- secrets --------------------------------------------------------------------------------------


def put(deployment, name: str, value: str):
    """secrets.env with a line of a person's own."""
    path = deployment.paths.secrets
    kept = [x for x in path.read_text().splitlines() if not x.startswith(f"{name}=")]
    path.write_text("\n".join([*kept, f"{name}={value}"]) + "\n")
    return dataclasses.replace(deployment, secrets=secrets.Secrets.load(path))


def test_secrets_default(fresh):
    assert examine(fresh, "secrets.default").status == "ok"
    found = examine(put(fresh, "REDIS_PASSWORD", "difyai123456"), "secrets.default")
    assert found.status == "fail" and found.evidence == "published default in REDIS_PASSWORD"
    paste(found.fix.split(" && ")[0])
    again = dataclasses.replace(fresh, secrets=secrets.Secrets.load(fresh.paths.secrets))
    assert examine(again, "secrets.default").status == "ok"
    assert again.secrets["REDIS_PASSWORD"] != fresh.secrets["REDIS_PASSWORD"]
    assert examine(with_secrets(fresh, ADMIN_PASSWORD="short1"), "secrets.default").status == "warn"
    # What another server was given is not ours to judge by its length.
    theirs = with_secrets(fresh, EXTERNAL_MODEL_API_KEY="EMPTY")
    assert examine(theirs, "secrets.default").status == "ok"
    # A user is no secret, a key is.
    named = set_to(fresh, dify={"env": {"DB_USERNAME": "postgres"}})
    assert examine(named, "secrets.default").status == "ok"
    keyed = set_to(fresh, dify={"env": {"CODE_EXECUTION_API_KEY": "dify-sandbox"}})
    assert examine(keyed, "secrets.default").status == "fail"


def test_the_published_list_is_what_dify_publishes():
    from difyops.checks.secrets import PUBLISHED

    assert {"difyai123456", "dify-sandbox"} <= PUBLISHED
    assert not any(secrets._token() in PUBLISHED for _ in range(20))


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("REDIS_PASSWORD", "abcdefgh #12345678", "is cut at the # in secrets.env"),
        ("DIFY_DB_PASSWORD", '"two\\nlines 1234567"', "does not survive an env file"),
        ("MODEL_API_KEY", "'with a blank 12345'", "cannot stand in an HTTP header"),
        ("REDIS_PASSWORD", "'with a blank 12345'", "the broker's URL or valkey.conf"),
    ],
)
def test_secrets_chars(fresh, name, line, said):
    found = examine(put(fresh, name, line), "secrets.chars")
    assert found.status == "fail" and said in found.evidence and name in found.evidence


@pytest.mark.parametrize("value", ["p@ss#w%rd/12+=:345", "$HOME-12345678", "ümläut-12345678"])
def test_secrets_chars_leaves_alone_what_survives(fresh, value):
    line = files.dotenv_text({"X": value}).strip().removeprefix("X=")
    put(fresh, "DIFY_DB_PASSWORD", line)
    odd = put(fresh, "REDIS_PASSWORD", line)
    assert odd.secrets["DIFY_DB_PASSWORD"].reveal() == value
    assert examine(odd, "secrets.chars").status == "ok"


@pytest.mark.parametrize("value", ["p@ss#w%rd/12+=:345", "ümläut$12345678", "a b", "a'b", 'a"b'])
def test_what_is_said_of_valkey_conf_is_what_valkey_does(stack, fresh, tmp_path, value):
    """A real server, started with the rendered file, lets the password in or does not."""
    port = free_ports(1)[0]
    line = files.dotenv_text({"X": value}).strip().removeprefix("X=")
    odd = put(set_to(fresh, redis={"port": port}), "REDIS_PASSWORD", line)
    rendered = text.render("valkey.conf", port=port, password=value, directory='"/tmp"')
    conf = tmp_path / "valkey.conf"
    files.write_atomic(conf, rendered.replace("appendonly yes", "appendonly no"), mode=0o600)
    server = subprocess.Popen(
        [valkey.program(stack), conf], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        let_in = _gets_in(server, odd)
    finally:
        server.kill()
        server.wait()
    assert (examine(odd, "secrets.chars").status == "ok") is let_in


def _gets_in(server: subprocess.Popen, deployment) -> bool:
    import redis

    while server.poll() is None:
        try:
            with valkey.client(deployment) as session:
                return bool(session.ping())
        except redis.AuthenticationError:
            return False
        except redis.ConnectionError:
            continue
    return False


# --- ports ----------------------------------------------------------------------------------------


def test_net_ports_when_nothing_runs(fresh):
    assert examine(fresh, "net.ports").status == "ok"
    with (
        socket.create_server(("127.0.0.1", fresh.settings.postgres.port)),
        socket.create_server(("", fresh.settings.model.port)),
    ):
        found = examine(fresh, "net.ports")
    assert found.status == "fail"
    assert f"for postgres, is taken by {Path('/proc/self/comm').read_text().strip()}" in (
        found.evidence
    )
    assert "for model, is taken" in found.evidence
    # What it proposes is free, and not what another service wants.
    assert f"postgres.port: {fresh.settings.redis.port}" not in found.fix
    assert "postgres.port: " in found.fix and "model.port: " in found.fix
    assert examine(fresh, "net.ports").status == "ok"


def test_net_ports_does_not_mind_what_is_ours(stack, fresh):
    assert examine(stack, "net.ports").status == "ok"
    assert f"valkey {stack.settings.redis.port}" in examine(stack, "net.ports").evidence
    # Left over from a crash: `up` ends it.
    with serve("class Handler(BaseHTTPRequestHandler): pass",
               DIFYOPS_DEPLOYMENT=str(fresh.paths.root)) as port:  # fmt: skip
        poll(lambda: examine(set_to(fresh, model={"port": port}), "net.ports").status == "ok")
    # The same process is in the way of another deployment.
    with serve("class Handler(BaseHTTPRequestHandler): pass") as port:
        assert examine(set_to(fresh, model={"port": port}), "net.ports").status == "fail"


def test_net_ports_knows_a_server_that_wrote_over_its_environment(stack, monkeypatch):
    monkeypatch.setattr(Supervisor, "owns", lambda self, pid: False)
    assert examine(stack, "net.ports").status == "ok"


def test_net_ports_below_1024(fresh):
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        pytest.skip("every port is open to everybody here")
    found = examine(set_to(fresh, redis={"port": lowest - 1}), "net.ports")
    assert found.status == "fail" and "only root may listen" in found.evidence
