"""Dify wired to this deployment's models; the proof: a chat and a search through Dify."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from difyops.core import Deployment, Progress
from difyops.errors import DifyopsError, UsageError
from difyops.secrets import Secret
from difyops.services import model
from difyops.wire import ChatProof, ModelTarget, WireReport, WireTarget

if TYPE_CHECKING:
    from difyops.backends.probe import ModelInfo

#: Most tokens of an answer that Dify may ask for.
MAX_OUTPUT = 2048


def target(deployment: Deployment) -> WireTarget:
    """What to wire. Contexts are those the servers say they have, not what was hoped for.

    Raises DifyopsError when a server does not answer or lacks the model.
    """
    settings = deployment.settings
    if not settings.dify.enabled:
        raise UsageError("there is no Dify in this deployment", "set dify.enabled: true")
    return WireTarget(
        base_url=f"http://127.0.0.1:{settings.dify.port}",
        admin_email=settings.admin.email,
        admin_name=settings.admin.name,
        admin_password=deployment.secrets["ADMIN_PASSWORD"],
        llm=_llm(deployment),
        embedding=_embedding(deployment),
    )


def _llm(deployment: Deployment) -> ModelTarget:
    wanted = deployment.settings.model
    url, key = model.llm_url(deployment), model.llm_key(deployment)
    about = _described(url, key, wanted.name)
    contexts = [value for value in (wanted.context, about.context) if value]
    if not contexts:
        raise UsageError(
            f"{url} does not tell the context length of {wanted.name}",
            "set model.context in difyops.yaml to what that server was started with",
        )
    context = min(contexts)
    return ModelTarget(
        wanted.name,
        url,
        key or Secret(""),
        context,
        min(MAX_OUTPUT, context // 2),
        tools=bool(about.tools),
    )


def _embedding(deployment: Deployment) -> ModelTarget | None:
    wanted, url = deployment.settings.embedding, model.embedding_url(deployment)
    if wanted is None or url is None:
        return None
    key = model.embedding_key(deployment)
    has = _described(url, key, wanted.name).context
    context = min(value for value in (wanted.context, has, 8192) if value)
    return ModelTarget(wanted.name, url, key or Secret(""), context)


def _described(url: str, key: Secret | None, name: str) -> ModelInfo:
    from difyops.backends import probe

    found = {info.id: info for info in probe.describe(url, key)}
    if name not in found:
        raise DifyopsError(f"{url} has no model {name!r}", f"it has: {', '.join(found) or 'none'}")
    return found[name]


def wire(deployment: Deployment, progress: Progress) -> WireReport:
    """Account, models, defaults, sample app and key; then a chat, then a search, proved."""
    from difyops import knowledge
    from difyops import wire as wiring
    from difyops.console import BearerConsole

    def tell(step: str, text: str) -> None:
        progress.detail("wire", f"{step}: {text}")

    began = time.monotonic()
    progress.started("wire")
    wanted = target(deployment)
    try:
        report = wiring.run(wanted, tell)
        if wanted.embedding:
            with BearerConsole(wanted.base_url) as console:
                console.login(wanted.admin_email, wanted.admin_password)
                found = knowledge.prove_knowledge(console, wanted.embedding.name, tell)
            report.changes["knowledge"] = found.change
    except DifyopsError as error:
        progress.failed("wire", error.message, time.monotonic() - began)
        raise
    changed = [name for name, change in report.changes.items() if change != "same"]
    same = len(report.changes) - len(changed)
    detail = f"{len(changed)} objects made or changed, {same} as they were"
    progress.finished("wire", detail, time.monotonic() - began)
    return report


def app_key(deployment: Deployment) -> Secret:
    """The key of the sample app, as Dify keeps it. Raises DifyopsError without one."""
    from difyops import wire as wiring

    return wiring.existing(target(deployment)).api_key


def chat(deployment: Deployment) -> ChatProof:
    """The sample app's chat, asked anew; nothing is made or changed. Raises DifyopsError."""
    from difyops import wire as wiring

    wanted = target(deployment)
    return wiring.prove(wanted, wiring.existing(wanted))


def stored_credentials(deployment: Deployment) -> dict[str, Any] | None:
    """What Dify keeps about the chat model; None when it is not registered."""
    from difyops.console import BearerConsole

    wanted = target(deployment)
    with BearerConsole(wanted.base_url) as console:
        console.login(wanted.admin_email, wanted.admin_password)
        return console.model_credentials("llm", wanted.llm.name)


def calls_tools(deployment: Deployment) -> bool:
    """Whether the chat model calls a tool when a request obliges it to."""
    from difyops.backends import probe

    wanted = target(deployment).llm
    return probe.calls_tool(wanted.endpoint_url, wanted.name, wanted.api_key)
