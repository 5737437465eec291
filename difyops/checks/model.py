"""The model server, and the way to it."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from difyops import logs
from difyops.checks.looking import UP, again, is_ours, listeners
from difyops.core import Deployment, NotReady
from difyops.doctor import Finding, Registry, fail, ok, skip, warn
from difyops.errors import DifyopsError
from difyops.files import tail
from difyops.loopback import is_loopback
from difyops.services import model

check = Registry()


@check(
    "model.url",
    why="everything would be installed, and then wait for a model that does not answer",
    preflight=True,
)
def url(deployment: Deployment) -> Finding:
    """The model that somebody else serves: it has to be there before we begin."""
    if deployment.settings.model.backend != "external":
        return ok(f"{deployment.settings.model.name}, served here")
    try:
        return ok(model.ready_elsewhere(deployment))
    except NotReady as reason:
        fix = "start that server, or set model.url in difyops.yaml"
        # A server that answers 503 is loading: `up` waits for it.
        return warn(str(reason), fix) if " answered 503" in str(reason) else fail(str(reason), fix)


@check("model.up", why="Dify has nothing to answer from without its model")
def up(deployment: Deployment) -> Finding:
    try:
        if model.local_spec(deployment):
            model.ready(deployment)
        return ok(model.ready_elsewhere(deployment))
    except NotReady as reason:
        if deployment.settings.model.backend == "external":
            return fail(str(reason), f"curl -sS {model.llm_url(deployment)}/models")
        if said := logs.last_error(tail(deployment.paths.logs / "model.log", 200)):
            return fail(f"it ended: {said}", f"{_mend(deployment)}; then: {UP}")
        return fail(str(reason), f"{UP}; if it ends again: difyops logs model")


def _mend(deployment: Deployment) -> str:
    if source := deployment.settings.model.source:
        return f"mend or replace model.source ({source}) in difyops.yaml"
    return "difyops logs model"


@check(
    "model.proxy",
    why="an HTTP proxy cannot reach a model on this machine or in your network",
    upstream=("dify#14070",),
)
def proxy(deployment: Deployment) -> Finding:
    """As Dify's HTTP library decides it, in the environment that Dify gets."""
    from requests.utils import should_bypass_proxies

    from difyops.services import api

    environment = {k: str(v) for k, v in api.environment(deployment).items()}
    # Of two spellings the lower one wins.
    exempt = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    through: list[str] = []
    for url in dict.fromkeys((model.llm_url(deployment), model.embedding_url(deployment))):
        name = _proxy_for(url, environment) if url else None
        if not url or not name or should_bypass_proxies(url, no_proxy=exempt):
            continue
        host = urlsplit(url).hostname or ""
        if _is_near(host):
            return fail(
                f"{name} captures calls to {host}: no_proxy has {exempt}",
                f"remove no_proxy from dify.env (difyops then sets it), or add {host}; then: {UP}",
            )
        through.append(f"{host} through {name}")
    return ok(", ".join(through) or "none on the way to the model")


def _proxy_for(url: str, environment: dict[str, str]) -> str | None:
    """The variable that sends this URL to a proxy."""
    for name in (f"{urlsplit(url).scheme}_proxy", "all_proxy"):
        for spelling in (name, name.upper()):
            if environment.get(spelling):
                return spelling
    return None


def _is_near(host: str) -> bool:
    """On this machine or in this network, where a proxy has no business."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".lan", ".internal", ".home.arpa"))


@check(
    "model.bind",
    why="a server open to the network is everybody's; one that is not ours is nobody's",
    upstream=("dify#2854",),
    needs=("model.up",),
)
def bind(deployment: Deployment) -> Finding:
    """The listener of our own server: on loopback, and a process of this deployment."""
    if model.local_spec(deployment) is None:
        return skip("the model server is somebody else's")
    port = deployment.settings.model.port
    heard = [listener for listener in listeners() if listener.port == port]
    if not heard:
        return skip(f"the listener on port {port} cannot be seen from here")
    if any(listener.pid is None for listener in heard):
        return skip(f"port {port} is listened on by {heard[0]}")
    foreign = [listener for listener in heard if not is_ours(deployment, listener.pid)]
    if foreign:
        return fail(
            f"port {port} is answered by {foreign[0]}, not by this deployment",
            f"kill {foreign[0].pid}; then: {UP}",
        )
    beyond = [h.address for h in heard if not is_loopback(h.address)]
    if beyond:
        return fail(f"listens on {', '.join(beyond)}, port {port}", again(deployment, "model"))
    return ok(f"127.0.0.1:{port}")


@check("model.chat", why="a server can be up and answer nothing", needs=("model.up",))
def chat(deployment: Deployment) -> Finding:
    from difyops.backends import probe

    try:
        answer = probe.chat_once(
            model.llm_url(deployment),
            deployment.settings.model.name,
            model.llm_key(deployment),
            prompt="Say hello.",
            max_tokens=8,
        )
    except DifyopsError as error:
        return fail(error.message, error.hint or see_its_log(deployment))
    return ok(f"answered in {answer.seconds:.1f} s, first token {answer.first_token:.2f} s")


def see_its_log(deployment: Deployment) -> str:
    if deployment.settings.model.backend == "external":
        return f"see the log of the server at {model.llm_url(deployment)}"
    return "difyops logs model; then: difyops restart model"


@check("model.embedding", why="knowledge bases are searched with it", needs=("model.up",))
def embedding(deployment: Deployment) -> Finding:
    from difyops.backends import probe

    url = model.embedding_url(deployment)
    if url is None or deployment.settings.embedding is None:
        return skip("no embedding model is set (embedding: null)")
    name = deployment.settings.embedding.name
    try:
        vector = probe.embed_once(url, name, model.embedding_key(deployment))
    except DifyopsError as error:
        local = deployment.settings.embedding.url is None
        see = "difyops logs model; then: difyops restart model"
        return fail(error.message, error.hint or (see if local else f"see the log of {url}"))
    return ok(f"{name}, {len(vector)} dimensions")
