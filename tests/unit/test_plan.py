"""What is decided: whole rendered trees (golden/), and rules that hold for every deployment."""

from __future__ import annotations

import builtins
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from difyops import plan, text
from difyops.core import Deployment, Plan
from difyops.errors import UsageError
from difyops.plan import launcher
from tests.unit.conftest import SECRETS, USER, deployment

GOLDEN = Path(__file__).parent / "golden" / "source-0.15.3"
EXTERNAL: dict[str, Any] = {
    "dify": {"base_url": "https://ai.example", "env": {"HTTP_PROXY": "http://proxy:3128"}},
    "model": {"backend": "external", "url": "http://gpu.example:8000/v1", "name": "qwen3.5-4b"},
    "embedding": {"url": "http://embed.example/v1", "name": "bge-m3"},
    "postgres": {"provider": "external", "dsn": "postgresql://me@db.example:5433/dify"},
    "redis": {"provider": "external", "url": "redis://cache.example"},
}
VARIANTS: dict[str, Deployment] = {
    "user": deployment(),
    "root": deployment(user=USER),
    "external": deployment(EXTERNAL, EXTERNAL_MODEL_API_KEY="goldenexternal1"),
    "without-dify": deployment({"dify": {"enabled": False}}),
}
AWKWARD = '/srv/50% of it\'s "mine" %(x)s'
every = pytest.mark.parametrize("variant", VARIANTS)


def rendered(built: Plan) -> dict[str, str]:
    """Path (`.private` added where it is 0600) -> text, with this Python's own path replaced."""
    return {
        f"{file.path}{'.private' if file.private else ''}": file.text.replace(
            sys.executable, "/opt/difyops/bin/python"
        )
        for file in built.files
    }


@every
def test_golden(variant: str, request: pytest.FixtureRequest) -> None:
    folder, made = GOLDEN / variant, rendered(plan.build(VARIANTS[variant]))
    if request.config.getoption("--update-golden"):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        for name, content in made.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
    kept = {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }
    # `make golden` renews them; then read the difference as you would read code.
    assert made == kept


@every
def test_a_plan_is_made_without_looking(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan.build(VARIANTS[variant])  # templates and catalog are read once

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"I/O while planning: {args}")

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        patch.setattr(subprocess, "Popen", refuse)
        patch.setattr(socket, "socket", refuse)
        for name in ("open", "stat", "exists", "mkdir", "iterdir", "read_text", "is_file"):
            patch.setattr(Path, name, refuse)
        # A template's loader looks whether its file is still the same; that is not the machine's.
        patch.setattr(text._environment(), "auto_reload", False)
        built = plan.build(VARIANTS[variant])
    assert built == plan.build(VARIANTS[variant])


@every
def test_secrets_are_in_private_files_only_and_in_no_command(variant: str) -> None:
    built = plan.build(VARIANTS[variant])
    values = [*SECRETS.values(), "goldenexternal1"]
    for file in built.files:
        assert file.private or not any(value in file.text for value in values), file.path
    for service in built.services:
        if service.process:
            command = " ".join(launcher(VARIANTS[variant], service, service.process))
            assert not any(value in command for value in values), service.name
    assert any(value in file.text for file in built.files for value in values) or not built.files


@every
def test_services_start_after_what_they_need_and_say_when_they_are_ready(variant: str) -> None:
    seen: set[str] = set()
    for service in plan.build(VARIANTS[variant]).services:
        assert set(service.needs) <= seen, service.name
        seen.add(service.name)
        assert service.ready is not None
        assert service.ready_seconds > 0
        for step in (*service.install, *service.prepare, *service.finish):
            assert re.fullmatch(r"[a-z][a-z ]*", step.name)


def environment(changes: dict[str, Any]) -> dict[str, str]:
    service = plan.build(deployment(changes)).service("api")
    assert service and service.process
    return service.process.plain_env()


def test_every_url_comes_from_the_one_base_url() -> None:
    base = "https://one.example/dify"
    found = environment({"dify": {"base_url": base}})
    urls = {k: v for k, v in found.items() if k.endswith("_URL") and k != "CELERY_BROKER_URL"}
    assert len(urls) >= 5
    assert {k: v for k, v in urls.items() if v != base} == {"CHECK_UPDATE_URL": ""}
    assert found["CONSOLE_CORS_ALLOW_ORIGINS"] == base
    assert "localhost:" not in "".join(found.values())


def test_no_proxy_for_what_runs_here_or_for_the_models() -> None:
    found = environment(EXTERNAL)
    hosts = found["NO_PROXY"].split(",")
    assert {"localhost", "127.0.0.1", "gpu.example", "embed.example"} <= set(hosts)
    assert found["no_proxy"] == found["NO_PROXY"]
    assert found["HTTP_PROXY"] == "http://proxy:3128"


def test_ports_are_those_of_the_settings() -> None:
    ports = {"dify": 7001, "model": 7002, "postgres": 7003, "redis": 7004}
    built = plan.build(deployment({name: {"port": port} for name, port in ports.items()}))
    assert {s.name: s.port for s in built.services if s.port} == {
        "api": 7001, "model": 7002, "postgres": 7003, "valkey": 7004
    }  # fmt: skip
    files = {str(file.path): file.text for file in built.files}
    api = built.service("api")
    assert api and api.process
    assert api.process.argv[-2:] == ("--bind", "127.0.0.1:7001")
    assert '"port": 7002' in files["etc/model.json"]
    assert "\nport = 7003\n" in files["etc/postgresql.conf"]
    assert "\nport 7004\n" in files["etc/valkey.conf"]
    for line in ("DB_PORT=7003", "PGVECTOR_PORT=7003", "REDIS_PORT=7004"):
        assert line in files["etc/api.env"].splitlines()
    everything = "".join(files.values())
    assert not re.search(r"\b(5001|8090|5442|6389)\b", everything)


def test_api_and_worker_have_the_same_environment() -> None:
    built = plan.build(deployment())
    api, worker = built.service("api"), built.service("worker")
    assert api and api.process and worker and worker.process
    assert api.process.plain_env() == worker.process.plain_env()
    assert worker.process.argv[-2:] == ("-Q", "dataset,generation,mail")


def test_a_password_in_a_broker_url_is_quoted() -> None:
    built = plan.build(deployment(REDIS_PASSWORD="a/b@c:d"))
    api = built.service("api")
    assert api and api.process
    assert api.process.plain_env()["CELERY_BROKER_URL"] == "redis://:a%2Fb%40c%3Ad@127.0.0.1:6389/1"


# --- supervisord.conf, read by supervisor itself --------------------------------------------------


def options(where: Path, content: str) -> Any:
    from supervisor.options import ServerOptions

    where.write_text(content)
    found = ServerOptions()
    found.realize(["-c", str(where)], doc="")
    return found


@pytest.mark.filterwarnings("ignore")  # supervisor's own, of root and of pkg_resources
@pytest.mark.parametrize("root", ["/srv/dify", AWKWARD])
def test_supervisor_reads_what_was_meant(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = deployment(root=Path(root))
    content = next(f.text for f in plan.build(wanted).files if f.path.name == "supervisord.conf")
    # Its paths are relative; it wants the folders of its logs and services to be there.
    monkeypatch.chdir(tmp_path)
    for folder in ("logs", "run", *re.findall(r"^directory=(.+)$", content, re.M)):
        (tmp_path / folder.replace("%%", "%")).mkdir(parents=True, exist_ok=True)
    found = options(tmp_path / "supervisord.conf", content)
    programs = {c.name: c for group in found.process_group_configs for c in group.process_configs}
    for service in plan.build(wanted).services:
        assert service.process
        config = programs.pop(service.name)
        assert shlex.split(config.command) == launcher(wanted, service, service.process)
        assert not config.autostart
        assert config.stopwaitsecs == service.process.stop_seconds
        assert not any(value in str(config.environment) for value in SECRETS.values())
    assert programs == {}


def test_what_a_service_reads_restarts_it_and_no_other() -> None:
    def inputs(**secrets: str) -> dict[str, str]:
        content = next(
            f.text for f in plan.build(deployment(**secrets)).files
            if f.path.name == "supervisord.conf"
        )  # fmt: skip
        names = re.findall(r"^\[program:(\w+)\]", content, re.M)
        return dict(zip(names, re.findall(r'DIFYOPS_INPUTS="(\w+)"', content), strict=True))

    before, after = inputs(), inputs(MODEL_API_KEY="another")
    assert {name for name in before if before[name] != after[name]} == {"model"}


def test_postgresql_conf_quotes_its_paths() -> None:
    wanted = deployment(root=Path("/srv/it's"))
    content = next(f.text for f in plan.build(wanted).files if f.path.name == "postgresql.conf")
    assert "hba_file = '/srv/it''s/etc/pg_hba.conf'\n" in content


def test_root_is_given_up_where_the_service_can_run_our_python() -> None:
    def commands(reachable: bool) -> dict[str, bool]:
        from dataclasses import replace

        wanted = deployment(user=USER)
        wanted = replace(wanted, facts=replace(wanted.facts, python_reachable=reachable))
        return {
            s.name: "--user" in launcher(wanted, s, s.process)
            for s in plan.build(wanted).services
            if s.process
        }

    assert all(commands(True).values())
    assert [name for name, drops in commands(False).items() if not drops] == ["model"]


def test_a_long_root_has_its_socket_elsewhere() -> None:
    short, long = deployment(), deployment(root=Path("/srv") / ("d" * 90))
    assert plan.socket_path(short) == Path("/srv/dify/run/supervisor.sock")
    assert len(str(plan.socket_path(long))) <= 90
    other = deployment(root=Path("/srv") / ("e" * 90))
    assert plan.socket_path(long) != plan.socket_path(other)


def test_a_context_longer_than_the_model_has_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model\.context: 9000 is more than smollm2-135m was"):
        plan.build(deployment({"model": {"context": 9000}}))


def test_golden_files_hold_no_path_of_this_machine() -> None:
    for path in GOLDEN.rglob("*"):
        assert path.is_dir() or sys.prefix not in path.read_text(encoding="utf-8")
