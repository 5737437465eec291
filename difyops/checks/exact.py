"""The same answer whichever way it takes: with a cache, speculation, and others beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from difyops.checks.model import see_its_log
from difyops.core import Deployment, Progress
from difyops.doctor import Finding, Registry, Report, Result, fail, ok, skip, warn
from difyops.errors import DifyopsError, UsageError
from difyops.secrets import REDACTED
from difyops.services import model

if TYPE_CHECKING:
    from difyops.backends.exact import Comparison
    from difyops.openai_client import Endpoint

check = Registry()


@check(
    "model.exact",
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
    began = time.monotonic()
    progress.started("model.exact")
    try:
        endpoint = _endpoint(url, name)
    except UsageError:
        raise
    except DifyopsError as error:
        up = fail(error.message, error.hint or "see its log")
        results = [_result("model.up", up, began), _result(_ID, skip("needs model.up"), began)]
    else:
        found = _compared(endpoint, progress)
        results = [_result(_ID, found, began, endpoint)]
    return Report(tuple(results), time.monotonic() - began)


_ID = "model.exact"


def _endpoint(url: str, name: str | None) -> Endpoint:
    # Imported here: of a deployment nothing is asked this way.
    import httpx

    from difyops.openai_client import Endpoint, chat_models, connection, key_for

    key = key_for(url)
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


def _result(id: str, found: Finding, began: float, endpoint: Endpoint | None = None) -> Result:
    evidence = found.evidence
    if endpoint is not None and endpoint.key:  # servers repeat what they were sent
        evidence = evidence.replace(endpoint.key.reveal(), REDACTED)
    why = next((known.why for known in check.checks if known.id == id), None)
    return Result(id, found.status, evidence, why, found.fix, seconds=time.monotonic() - began)


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
