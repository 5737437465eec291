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

    Celery's own `inspect`, which reaches them through the broker. It always waits as long as it is
    told to, so the patient second question is only asked when the quick one brings no answer.
    """
    return _inspect(deployment, 1) or _inspect(deployment, 5)


def _inspect(deployment: Deployment, seconds: int) -> set[str]:
    process = api.process(
        deployment, "celery", "inspect", "active_queues", "--json", "-t", str(seconds)
    )
    environment = process.plain_env()
    done = subprocess.run(
        process.argv,
        # Its URL holds a password: the environment, not the command line.
        env={**environment, "BROKER_URL": environment["CELERY_BROKER_URL"]},
        cwd=deployment.paths.root,  # not the checkout: Celery would import all of Dify
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    try:
        answers = json.loads(done.stdout)
    except ValueError:
        return set()
    return {queue["name"] for queues in answers.values() for queue in queues}
