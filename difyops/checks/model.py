"""The model server, and the way to it."""

from __future__ import annotations

from urllib.parse import urlsplit

from difyops.core import Deployment, NotReady
from difyops.doctor import Finding, Registry, fail, ok, skip
from difyops.services import model

check = Registry()

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@check("model.up", why="Dify has nothing to answer from without its model")
def up(deployment: Deployment) -> Finding:
    try:
        if model.local_spec(deployment):
            model.ready(deployment)
        return ok(model.ready_elsewhere(deployment))
    except NotReady as reason:
        return fail(str(reason), "difyops logs model; then: difyops up --source")


@check(
    "model.proxy",
    why="an HTTP proxy cannot reach a model on this machine or in your network",
    upstream=("14070",),
)
def proxy(deployment: Deployment) -> Finding:
    environment = deployment.settings.dify.env
    used = sorted(name for name in _PROXIES if environment.get(name))
    if not used:
        return ok("no proxy in dify.env")
    urls = [model.llm_url(deployment), model.embedding_url(deployment)]
    hosts = sorted({urlsplit(url).hostname or "" for url in urls if url})
    for name in ("NO_PROXY", "no_proxy"):
        if name not in environment:
            continue  # then it is ours, which covers them
        listed = [part.strip().lstrip(".") for part in environment[name].split(",")]
        open_hosts = [
            h for h in hosts if not any(h == p or h.endswith(f".{p}") for p in listed if p)
        ]
        if open_hosts and "*" not in listed:
            return fail(
                f"{', '.join(used)} captures calls to {', '.join(open_hosts)}: {name} lacks it",
                f"remove {name} from dify.env (difyops then sets it), or add {open_hosts[0]}",
            )
    return ok(f"{', '.join(used)}; NO_PROXY covers {', '.join(hosts)}")


@check(
    "model.bind",
    why="a server open to the network is everybody's; one on another port is nobody's",
    upstream=("2854",),
    needs=("model.up",),
)
def bind(deployment: Deployment) -> Finding:
    """The listener of our own server: on loopback, and in our own process."""
    import psutil

    from difyops.supervise import Supervisor

    if model.local_spec(deployment) is None:
        return skip("the model server is somebody else's")
    port = deployment.settings.model.port
    supervisor = Supervisor(deployment)
    if not supervisor.running():
        return skip("supervisord does not run, so its process is not known")
    pid = int(supervisor.info("model")["pid"])
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        listens = [
            c.laddr for p in family for c in p.net_connections("tcp") if c.status == "LISTEN"
        ]
    except psutil.Error as error:
        return skip(f"its sockets cannot be seen: {type(error).__name__}")
    mine = [address.ip for address in listens if address.port == port]
    if not mine:
        return fail(f"port {port} is answered by another process", "difyops restart model")
    beyond = [ip for ip in mine if not ip.startswith("127.") and ip != "::1"]
    if beyond:
        return fail(
            f"listens on {', '.join(beyond)}:{port}", "difyops render && difyops restart model"
        )
    return ok(f"127.0.0.1:{port}")


@check("model.chat", why="a server can be up and answer nothing", needs=("model.up",))
def chat(deployment: Deployment) -> Finding:
    from difyops.backends import probe

    answer = probe.chat_once(
        model.llm_url(deployment),
        deployment.settings.model.name,
        model.llm_key(deployment),
        prompt="Say hello in one sentence.",
        max_tokens=24,
    )
    return ok(f"answered in {answer.seconds:.1f} s, first token {answer.first_token:.2f} s")


@check("model.embedding", why="knowledge bases are searched with it", needs=("model.up",))
def embedding(deployment: Deployment) -> Finding:
    from difyops.backends import probe

    url = model.embedding_url(deployment)
    if url is None or deployment.settings.embedding is None:
        return skip("no embedding model is set (embedding: null)")
    name = deployment.settings.embedding.name
    vector = probe.embed_once(url, name, model.embedding_key(deployment))
    return ok(f"{name}, {len(vector)} dimensions")
