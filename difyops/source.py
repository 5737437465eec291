"""Source mode: install, render, start in order, each as a named idempotent step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from difyops import deployment as deployments
from difyops import dify_tree, identity, plan, render, supervise
from difyops.core import Deployment, Plan, Progress, Service, Step
from difyops.errors import DifyopsError, UsageError
from difyops.files import write_atomic
from difyops.services import postgres
from difyops.steplog import StepLog


def up(root: Path, source: str | None, progress: Progress) -> Deployment:
    """Bring everything up, or find that it is up. -> the deployment as it is now.

    Raises StepError from the first step that fails; what was done stays done, and `up` resumes.
    """
    deployment = _with_user(root, source, progress)
    supervise.make_folders(deployment)
    wanted = plan.build(deployment)
    for service in wanted.services:
        _run(deployment, service.install, progress)
    # Only now is known what was installed: queues from the checkout, versions of the programs.
    deployment = deployments.load(root, source)
    if deployment.settings.dify.enabled:
        dify_tree.queues(deployment.paths.source(deployment.release.version))  # or says why not
    wanted = plan.build(deployment)
    _tell(render.write(deployment, wanted), progress)
    write_lock(deployment)
    start(deployment, wanted.services, progress)
    return deployment


def _with_user(root: Path, source: str | None, progress: Progress) -> Deployment:
    deployment = deployments.load(root, source)
    name = identity.wanted(deployment.settings.run_as, deployment.paths.root)
    if name and deployment.user is None:
        identity.create(name)
        progress.note(f"made the system user {name}")
        deployment = deployments.load(root, source)
    if name:
        progress.note(f"started by root: services run as {name}")
        if not deployment.facts.python_reachable:
            progress.note(
                f"the model server stays root: {name} cannot reach this Python (install difyops "
                "where others can enter, such as /opt, to change that)"
            )
    return deployment


def start(deployment: Deployment, services: Iterable[Service], progress: Progress) -> None:
    """Start services, what does not wait for another at the same time."""
    supervisor = supervise.Supervisor(deployment)
    supervisor.start()
    for name in supervisor.sync():
        progress.note(f"{name}: its configuration changed, restarting it")
    for wave in supervise.waves(services):
        for service in wave:
            _run(deployment, service.prepare, progress)
        began = time.monotonic()
        launched = {s.name for s in wave if s.process and supervisor.launch(s.name)}
        for service in wave:
            _await(service, supervisor, progress, began if service.name in launched else None)
            _run(deployment, service.finish, progress)


def _await(
    service: Service, supervisor: supervise.Supervisor, progress: Progress, launched: float | None
) -> None:
    deployment = supervisor.deployment
    log = deployment.paths.logs / f"{service.name}.log" if service.process else None
    began = launched or time.monotonic()
    progress.started(service.name, log)
    try:
        detail = supervisor.await_ready(service, progress)
    except DifyopsError as error:
        progress.failed(service.name, error.message, time.monotonic() - began)
        raise
    progress.finished(service.name, detail, time.monotonic() - launched if launched else None)


def _run(deployment: Deployment, steps: Iterable[Step], progress: Progress) -> None:
    for step in steps:
        run_step(deployment, step, progress)


def run_step(deployment: Deployment, step: Step, progress: Progress) -> None:
    """Skip a step that is done; else run it with its log. Raises StepError naming the step."""
    path = deployment.paths.step_logs / f"{step.name.replace(' ', '-')}.log"
    began = time.monotonic()
    progress.started(step.name, path)
    try:
        detail = step.done(deployment)
        if detail is not None:
            progress.finished(step.name, detail, None)
            return
        with StepLog(path, lambda text: progress.detail(step.name, text)) as log:
            try:
                detail = step.run(deployment, log)
            except OSError as error:  # a full disk, most often
                where = f": {error.filename}" if error.filename else ""
                raise log.error(f"{error.strerror or error}{where}") from error
    except DifyopsError as error:
        progress.failed(step.name, error.message, time.monotonic() - began)
        raise
    progress.finished(step.name, detail, time.monotonic() - began)


def restart(deployment: Deployment, names: list[str], progress: Progress) -> None:
    """Stop the named services (all, if none is named), last first, and start them in order."""
    wanted: Plan = plan.build(deployment)
    known = [s.name for s in wanted.services if s.process]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no service {unknown[0]!r} runs here", f"services: {', '.join(known)}")
    supervise.make_folders(deployment)
    _tell(render.write(deployment, wanted), progress)
    supervisor = supervise.Supervisor(deployment)
    names = names or known
    if supervisor.running():
        # A changed configuration stops its service: then that one is started again, too.
        names = [*names, *supervisor.sync()]
    chosen = [s for s in wanted.services if s.process and s.name in names]
    if supervisor.running():
        supervise.stop_waves(supervisor, chosen, progress)
    start(deployment, chosen, progress)


def apply_passwords(deployment: Deployment, progress: Progress) -> None:
    """Stop everything, give Postgres the superuser password of today's secrets.env, start again.

    The role of Dify gets its own from the step `databases`, when Postgres is up.
    """
    postgres.check_own(deployment)
    wanted = plan.build(deployment)
    supervise.stop_all(deployment, wanted, progress)
    render.write(deployment, wanted)
    step = Step("passwords", lambda d: None, postgres.apply_passwords)
    run_step(deployment, step, progress)
    start(deployment, wanted.services, progress)


def _tell(rendered: list[render.Rendered], progress: Progress) -> None:
    for file in rendered:
        if file.verb == "kept":
            progress.note(
                f"{file.path}: kept as you edited it (difyops render --diff shows how, "
                "difyops render --force overwrites)"
            )


def write_lock(deployment: Deployment) -> None:
    """difyops.lock.yaml: what was chosen. Written only when that changed."""
    import yaml

    facts, settings = deployment.facts, deployment.settings
    chosen = {
        "dify": {"version": deployment.release.version, "source": facts.checkout}
        if settings.dify.enabled
        else None,
        "postgres": facts.postgres or settings.postgres.provider,
        "valkey": facts.valkey or settings.redis.provider,
        "model": settings.model.name,
        "embedding": settings.embedding.name if settings.embedding else None,
    }
    text = "# What was installed, written by difyops.\n" + yaml.safe_dump(chosen, sort_keys=False)
    path = deployment.paths.lock
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)
