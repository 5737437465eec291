"""The same answer whichever way it takes: with a cache, speculation, and others beside it."""

from __future__ import annotations

from difyops.checks.model import see_its_log
from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok, warn
from difyops.services import model

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
    found = exact.compare(
        url, settings.name, key, ways=exact.ways(settings.backend, url, settings.name, key)
    )
    if found.difference is None:
        return ok(f"{found.answers} answers are the same: {', '.join(found.seen)}")
    said = str(found.difference)
    if found.difference.near_tie:
        return ok(f"a near-tie, no fault: {said}")
    if found.difference.gap is None:
        return warn(
            said, f"{see_its_log(deployment)}; then ask it without a prefix cache or speculation"
        )
    return fail(
        f"the engine's cache, speculation or batching changes tokens: {said}",
        f"switch the engine's prefix cache and speculation off; {see_its_log(deployment)}",
    )
