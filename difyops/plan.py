"""Decide: a deployment's services, in start order, and the files they are run from. Pure."""

from __future__ import annotations

import shlex
from pathlib import Path

from difyops import text
from difyops.core import Deployment, File, Plan, Process, Service
from difyops.errors import UsageError
from difyops.files import digest, dotenv_text
from difyops.services import ALL

#: In the environment of every process of a deployment, so that it can be found.
MARKER = "DIFYOPS_DEPLOYMENT"


def build(deployment: Deployment) -> Plan:
    """Every service this deployment has, and every file to render."""
    declared = [declare(deployment) for declare in ALL]
    services = tuple(service for service in declared if service is not None)
    _check_ports(services)
    files = [file for service in services for file in service.files]
    for service in services:
        if service.process:
            files.append(_env_file(deployment, service, service.process))
    files.append(_supervisord(deployment, services, tuple(files)))
    _check_unique(files)
    return Plan(services, tuple(files))


def _check_ports(services: tuple[Service, ...]) -> None:
    taken: dict[int, str] = {}
    for service in services:
        if service.process is None or service.port is None:
            continue
        if service.port in taken:
            raise UsageError(
                f"difyops.yaml: {service.name} and {taken[service.port]} share port {service.port}",
                "give each its own",
            )
        taken[service.port] = service.name


def _check_unique(files: list[File]) -> None:
    paths = [file.path for file in files]
    double = {str(path) for path in paths if paths.count(path) > 1}
    if double:
        raise UsageError(f"two services render the same file: {', '.join(sorted(double))}")


def _env_file(deployment: Deployment, service: Service, process: Process) -> File:
    values = {**process.plain_env(), MARKER: str(deployment.paths.root)}
    return File(Path(f"etc/{service.name}.env"), dotenv_text(values), private=True)


def _supervisord(
    deployment: Deployment, services: tuple[Service, ...], files: tuple[File, ...]
) -> File:
    programs = [
        {
            "name": service.name,
            "command": _escaped(shlex.join(launcher(deployment, service, service.process))),
            "directory": _escaped(_relative(deployment, service.process.cwd)),
            "inputs": _inputs(service, service.process, files),
            "startsecs": service.process.settle_seconds,
            "stop_signal": service.process.stop_signal,
            "stop_seconds": service.process.stop_seconds,
        }
        for service in services
        if service.process
    ]
    content = text.render(
        "supervisord.conf",
        socket=_escaped(_relative(deployment, socket_path(deployment))),
        user=deployment.user.name if deployment.user else None,
        programs=programs,
    )
    return File(Path("etc/supervisord.conf"), content)


def launcher(deployment: Deployment, service: Service, process: Process) -> list[str]:
    """The command that supervisord runs: the exec wrapper, then the service's own."""
    paths = deployment.paths
    command = [deployment.facts.python, "-I", "-m", "difyops.launch"]
    command += ["--env", str(paths.etc / f"{service.name}.env")]
    command += ["--starts", str(starts_file(deployment, service.name))]
    command += ["--death-signal", process.death_signal or process.stop_signal]
    if deployment.user and runs_dropped(deployment, process):
        command += ["--user", deployment.user.name]
    return [*command, "--", *process.argv]


def runs_dropped(deployment: Deployment, process: Process) -> bool:
    """All services give up root, but our own interpreter where only root reaches it."""
    return deployment.facts.python_reachable or process.argv[0] != deployment.facts.python


def starts_file(deployment: Deployment, service: str) -> Path:
    """A line a start since `up` or `restart`: more than one means that it crashed."""
    return deployment.paths.run / f"{service}.starts"


def socket_path(deployment: Deployment) -> Path:
    """supervisord's socket: run/supervisor.sock. A path too long for one (107 bytes, and
    supervisord makes it under a longer name first) goes to a directory of its own below /tmp."""
    usual = deployment.paths.run / "supervisor.sock"
    if len(str(usual).encode()) <= 90:
        return usual
    return Path(f"/tmp/difyops-{digest(str(deployment.paths.root))}/supervisor.sock")  # noqa: S108


def _inputs(service: Service, process: Process, files: tuple[File, ...]) -> str:
    own = {Path(f"etc/{service.name}.env"), *(file.path for file in service.files)}
    return digest(process.inputs + "".join(f.text for f in files if f.path in own))


def _relative(deployment: Deployment, path: Path) -> str:
    """As seen from the deployment directory, where supervisord is at home. It expands some values
    twice, so that no escaping would get a % in the path of the directory itself through."""
    root = deployment.paths.root
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _escaped(value: str) -> str:
    """A value of supervisord.conf, which expands %(name)s and takes " #" for a comment's begin."""
    for begin in (" #", " ;", "\n"):
        if begin in value:
            raise UsageError(f"{begin!r} cannot stand in the path of a deployment", "rename it")
    return value.replace("%", "%%")
