"""The same answer whichever way it takes: with a cache, speculation, and others beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from difyops.checks.model import see_its_log
from difyops.core import Deployment, Progress
from difyops.doctor import Finding, Registry, Report, Result, fail, ok, skip, warn
from difyops.errors import DifyopsError, UsageError
from difyops.secrets import REDACTED, Secret
from difyops.services import model

if TYPE_CHECKING:
    from difyops.backends.exact import Comparison
    from difyops.openai_client import Endpoint

check = Registry()

_ID = "model.exact"


@check(
    _ID,
    why="caches, speculation and batching must not change an answer; where they do, every long "
    "conversation is wrong, and nothing says so",
    needs=("model.up", "model.chat"),
    answers=("fail", "warn"),
)
def exact_answers(deployment: Deployment) -> Finding:
    """The same greedy requests by every way through the server."""
    from difyops.backends import exact

    settings = deployment.settings.model
    url, key = model.llm_url(deployment), model.llm_key(deployment)
    known = exact.ways(settings.backend, url, settings.name, key)
    return _finding(exact.compare(url, settings.name, key, ways=known), see_its_log(deployment))


def of_server(url: str, name: str | None, progress: Progress) -> Report:
    """The same of a server that belongs to no deployment; without a name, of its first chat model.

    Raises UsageError for what is no http URL.
    """
    from difyops.openai_client import key_for

    began, key = time.monotonic(), key_for(url)
    progress.started(_ID)
    try:
        endpoint = _endpoint(url, name, key)
    except UsageError:
        raise
    except DifyopsError as error:
        up = fail(error.message, error.hint or "see its log")
        found = {"model.up": up, _ID: skip("needs model.up")}
    else:
        found = {_ID: _compared(endpoint, progress)}
    seconds = time.monotonic() - began
    return Report(tuple(_result(id, each, key, seconds) for id, each in found.items()), seconds)


def _endpoint(url: str, name: str | None, key: Secret | None) -> Endpoint:
    # Imported here: of a deployment nothing is asked this way.
    import httpx

    from difyops.openai_client import Endpoint, chat_models, connection

    with httpx.Client(**connection(url, key)) as client:
        there = chat_models(client, url)
    if not there:
        raise DifyopsError(f"{url} serves no chat model", "load one there")
    if name is not None and name not in there:
        raise DifyopsError(f"{url} has no model {name!r}", f"--model {there[0]}")
    return Endpoint(url, name or there[0], key)


def _compared(endpoint: Endpoint, progress: Progress) -> Finding:
    from difyops.backends import exact

    server = (endpoint.url, endpoint.model, endpoint.key)
    try:
        known = exact.ways("external", *server)
        found = exact.compare(
            *server, ways=known, tell=lambda way: progress.detail(_ID, f"asking: {way}")
        )
    except DifyopsError as error:
        return fail(f"could not be compared: {error.message}", "see its log, then ask again")
    return _finding(found, f"see the log of the server at {endpoint.url}")


def _result(id: str, found: Finding, key: Secret | None, seconds: float) -> Result:
    evidence = found.evidence
    if key:  # servers repeat what they were sent
        evidence = evidence.replace(key.reveal(), REDACTED)
    why = next((known.why for known in check.checks if known.id == id), None)
    return Result(id, found.status, evidence, why, found.fix, seconds=seconds)


def _finding(found: Comparison, see: str) -> Finding:
    if found.difference is None:
        return ok(f"{found.answers} answers are the same: {', '.join(found.seen)}")
    said = str(found.difference)
    if found.difference.near_tie:
        return ok(f"a near-tie, no fault: {said}")
    if found.difference.gap is None:
        return warn(said, f"{see}; then ask it without a prefix cache or speculation")
    return fail(
        f"the engine's cache, speculation or batching changes tokens: {said}",
        f"switch the engine's prefix cache and speculation off; {see}",
    )
