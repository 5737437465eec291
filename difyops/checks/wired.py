"""What Dify was told about the model, against what the model is."""

from __future__ import annotations

from typing import Any

from difyops.core import Deployment
from difyops.doctor import Finding, Registry, fail, ok, warn

check = Registry()

WIRE = "difyops wire"


@check(
    "api.login",
    why="difyops wires and proves Dify through the first account",
    needs=("api.health",),
    dify=True,
)
def login(deployment: Deployment) -> Finding:
    """One try: six wrong passwords lock the account out for a day. What logs in needs this."""
    from difyops import wire
    from difyops.console import BearerConsole

    email = deployment.settings.admin.email
    with BearerConsole(f"http://127.0.0.1:{deployment.settings.dify.port}") as console:
        if not console.is_set_up():
            return fail("Dify has no account yet", WIRE)
        wire.log_in(console, email, deployment.secrets["ADMIN_PASSWORD"])
    return ok(email)


@check(
    "model.registered",
    why="Dify calls the address and the key that it was told, not those in difyops.yaml",
    needs=("api.login", "model.up"),
    dify=True,
)
def registered(deployment: Deployment) -> Finding:
    from difyops import proof
    from difyops.console import masked

    wanted = proof.target(deployment).llm
    stored = proof.stored_credentials(deployment)
    if stored is None:
        return fail(f"{wanted.name} is not registered in Dify", WIRE)
    told = str(stored.get("endpoint_url", "")).rstrip("/")
    if told != wanted.endpoint_url.rstrip("/"):
        return fail(f"Dify calls {told or 'no address'}, not {wanted.endpoint_url}", WIRE)
    key = wanted.api_key.reveal()
    shown = masked(key) if key else None
    if shown and stored.get("api_key") != shown:
        return fail("Dify has another key of the model server", WIRE)
    return ok(f"{wanted.name} at {told}")


@check(
    "model.context",
    why="long prompts are cut, or refused, when Dify believes in more context than there is",
    upstream=("vllm#20409", "plugins#1750"),
    needs=("model.registered",),
    dify=True,
    answers=("fail", "warn"),
)
def context(deployment: Deployment) -> Finding:
    from difyops import proof

    server = proof.target(deployment).llm.context
    believed = _number((proof.stored_credentials(deployment) or {}).get("context_size"))
    if believed is None:
        return fail("Dify was told no context length", WIRE)
    if believed > server:
        return fail(f"Dify believes {believed} tokens, the server has {server}", WIRE)
    if believed < server:
        return warn(f"Dify uses {believed} of the server's {server} tokens", WIRE)
    return ok(f"{believed} tokens, as the server has")


def _number(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isdecimal() else None


@check(
    "model.tools",
    why="an agent with a model that cannot call tools answers nonsense",
    upstream=("dify#16005",),
    needs=("model.registered",),
    dify=True,
)
def tools(deployment: Deployment) -> Finding:
    """What Dify was told, against what the model does when it is asked to call a tool."""
    from difyops import proof
    from difyops.errors import DifyopsError

    stored = proof.stored_credentials(deployment) or {}
    if stored.get("function_calling_type", "no_call") == "no_call":
        return ok("registered without tools: Dify prompts agents in ReAct style")
    try:
        called = proof.calls_tools(deployment)
    except DifyopsError as error:
        return fail(f"registered with tools, but a call is refused: {error.message}", WIRE)
    if not called:
        return fail("registered with tools, but a request for a call brought none", WIRE)
    return ok("calls tools")
