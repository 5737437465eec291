"""Dify's background work: its worker takes every queue, and nothing waits for nobody."""

from __future__ import annotations

from dataclasses import dataclass

from difyops.checks.looking import UP, again, ours
from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok, skip, warn
from difyops.services import valkey, worker

check = Registry()

#: More waiting tasks than this are worth a word, even while they are taken.
MANY = 100


@dataclass(frozen=True)
class Workers:
    """The queues that workers take. One that is busy does not answer: then its command line says
    which it was started for."""

    queues: frozenset[str]
    answered: bool


def _workers(deployment: Deployment) -> Workers | None:
    """None: no worker answers, and none of this deployment runs."""
    if _may_answer(deployment) and (said := worker.active_queues(deployment)):
        return Workers(frozenset(said), True)
    running = [queues for process, _ in ours(deployment) if (queues := _queues(process.cmdline()))]
    return Workers(frozenset().union(*running), False) if running else None


def _may_answer(deployment: Deployment) -> bool:
    """Whether it is worth asking: waiting for nobody takes seconds."""
    import redis

    try:
        return worker.connections(deployment) > 0
    except redis.ResponseError:  # a server of somebody else's that does not let us look
        return True


def _queues(command: list[str]) -> set[str]:
    """What follows -Q in the command line of a Celery worker."""
    if "worker" not in command or "-Q" not in command[:-1]:
        return set()
    return set(command[command.index("-Q") + 1].split(","))


_NO_CODE = "there is no Dify code here yet, which names the queues"
_START = f"{UP}; if it ends again: difyops logs worker"


@check(
    "celery.queues",
    why="tasks on a queue that no worker takes wait forever",
    upstream=("dify#27769",),
    needs=("redis.up",),
    dify=True,
)
def queues(deployment: Deployment) -> Finding:
    """What the running workers take, against this release's own list."""
    if not deployment.facts.queues:
        return skip(_NO_CODE)
    found = _workers(deployment)
    if found is None:
        return fail("no worker answers, and none runs", _START)
    missing = [queue for queue in deployment.facts.queues if queue not in found.queues]
    if missing:
        return fail(f"worker does not take: {', '.join(missing)}", again(deployment, "worker"))
    busy = "" if found.answered else " (the worker is too busy to answer: from its command line)"
    return ok(f"{', '.join(deployment.facts.queues)}{busy}")


@check(
    "celery.stuck",
    why="indexing and deletions wait behind a worker that does not work",
    upstream=("dify#28513",),
    needs=("redis.up",),
    dify=True,
    answers=("fail", "warn"),
)
def stuck(deployment: Deployment) -> Finding:
    """Tasks that wait, against who takes them. A busy worker is no stuck one."""
    if not deployment.facts.queues:
        return skip(_NO_CODE)
    with valkey.client(deployment, valkey.BROKER_DB) as broker:
        lengths = {queue: int(broker.llen(queue)) for queue in deployment.facts.queues}
    waiting = {queue: count for queue, count in lengths.items() if count}
    if not waiting:
        return ok("nothing waits")
    said = ", ".join(f"{queue} {count}" for queue, count in waiting.items())
    found = _workers(deployment)
    if found is None:
        return fail(f"waiting with no worker: {said}", _START)
    untaken = [f"{q} {count}" for q, count in waiting.items() if q not in found.queues]
    if untaken:
        return fail(
            f"waiting where no worker looks: {', '.join(untaken)}", again(deployment, "worker")
        )
    if not found.answered:
        return warn(
            f"waiting: {said}; the worker runs, and does not answer: it is busy, or hangs",
            "difyops logs worker; when it says nothing new: difyops restart worker",
        )
    if sum(waiting.values()) > MANY:
        return warn(f"waiting: {said}", "difyops logs worker")
    return ok(f"waiting, and being taken: {said}")
