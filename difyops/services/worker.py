"""Dify's worker: Celery, on exactly the queues that this release's own entrypoint names."""

from __future__ import annotations

import dataclasses
import json
import subprocess

from difyops.core import Deployment, NotReady, Service
from difyops.services import api, valkey


def declare(deployment: Deployment) -> Service | None:
    if not deployment.settings.dify.enabled:
        return None
    program, *arguments = deployment.release.worker
    return Service(
        "worker",
        needs=("postgres", "valkey", "model"),
        process=dataclasses.replace(
            api.process(deployment, program, *arguments, "-Q", ",".join(deployment.facts.queues)),
            # A warm shutdown waits for the broker, which is gone then too: it would never end.
            death_signal="KILL",
        ),
        ready=ready,
        ready_seconds=180,
    )


def consumers(deployment: Deployment) -> int:
    """How many clients of the broker are waiting for a task (a blocking pop on its database)."""
    listed = valkey.client(deployment, valkey.BROKER_DB).client_list()
    return sum(
        1 for entry in listed if entry["cmd"] == "brpop" and entry["db"] == str(valkey.BROKER_DB)
    )


def connections(deployment: Deployment) -> int:
    """How many clients the broker's database has besides us: without any there is no worker."""
    with valkey.client(deployment, valkey.BROKER_DB) as session:
        me = session.client_id()
        listed = session.client_list()
    return sum(1 for c in listed if c["db"] == str(valkey.BROKER_DB) and int(c["id"]) != me)


def ready(deployment: Deployment) -> str:
    import redis

    try:
        waiting = consumers(deployment)
    except redis.RedisError as error:
        raise NotReady(str(error)) from None
    if not waiting:
        raise NotReady("waiting for it to take tasks")
    return f"{len(deployment.facts.queues)} queues"


def active_queues(deployment: Deployment) -> set[str]:
    """The queues that running workers say they take; empty when none answers.

    The first answer comes at once and is most often the only one. Waiting for all of them takes as
    long as it is told to, so that is only done when the first leaves a queue out.
    """
    first = _ask(deployment, seconds=3, answers=1)
    if not first or set(deployment.facts.queues) <= first:
        return first
    return first | _ask(deployment, seconds=1, answers=0)


def _ask(deployment: Deployment, seconds: float, answers: int) -> set[str]:
    try:
        # The broker's URL holds a password: it is in the environment, never an argument.
        done = api.run_python(deployment, _INSPECT, str(seconds), str(answers))
        replies = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return set()
    return {queue["name"] for queues in replies.values() for queue in queues}


_INSPECT = """
import json, os, sys, celery
app = celery.Celery(broker=os.environ["CELERY_BROKER_URL"])
ask = app.control.inspect(timeout=float(sys.argv[1]), limit=int(sys.argv[2]) or None)
print(json.dumps(ask.active_queues() or {}))
"""
