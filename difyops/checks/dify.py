"""Dify itself: its API, migrations, worker and queues."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from difyops import checkout, dify_source, dify_tree, releases
from difyops.core import Deployment, NotReady
from difyops.doctor import Finding, Registry, fail, ok, warn
from difyops.services import api, valkey, worker
from difyops.services import model as models

check = Registry()

#: Tasks that wait in a queue before it counts as stuck, when nobody takes them.
WAITING = 1


@check(
    "dify.source",
    why="without its code of the right release there is no Dify to run",
    preflight=True,
    dify=True,
)
def source(deployment: Deployment) -> Finding:
    """The code that is there, or whether it can be had: nothing is fetched."""
    version = deployment.release.version
    present = checkout.checkout_done(deployment)
    if present:
        return ok(present)
    wanted = dify_source.parse(deployment.source or version, deployment.paths.root)
    found = checkout.peek(wanted)
    if found is not None and found != version:
        releases.get(found)
        return fail(
            f"{wanted} is dify {found}, difyops.yaml asks for {version}",
            f"set dify.version: {found}, or give a source of {version}",
        )
    if found is not None or wanted.kind != "tag":
        return ok(f"dify {version} from {wanted}")
    mirror = checkout.reachable(deployment.settings.mirrors.git)
    if mirror is None:
        return fail(
            f"no repository of Dify answers: {', '.join(deployment.settings.mirrors.git)}",
            "difyops up --source --dify <directory | tarball>, or set mirrors.git",
        )
    return ok(f"dify {version} from {mirror}")


@check("api.health", why="nothing of Dify works without its API", needs=("pg.up",), dify=True)
def health(deployment: Deployment) -> Finding:
    try:
        return ok(api.ready(deployment))
    except NotReady as reason:
        return fail(str(reason), "difyops logs api; then: difyops up --source")


@check(
    "net.urls",
    why="links, webhooks and file URLs are made from the base URL",
    upstream=("14232", "28534", "16309"),
    needs=("api.health",),
    dify=True,
)
def urls(deployment: Deployment) -> Finding:
    """The base URL reaches this very API, and the files' URLs are made from it."""
    import requests

    base = deployment.settings.dify.url
    parts = urlsplit(base)
    if parts.path not in ("", "/"):
        return fail(
            f"{base} has a path; Dify's API answers at the root", "remove it: dify.base_url"
        )
    try:
        answer = requests.get(f"{base}/health", timeout=5)
        pid = answer.json().get("pid")
    except (requests.RequestException, ValueError) as error:
        return fail(
            f"{base}/health: {type(error).__name__}",
            f"set dify.base_url to a URL that reaches port {deployment.settings.dify.port}",
        )
    if pid not in _api_pids(deployment):
        return fail(f"{base} is answered by another API (pid {pid})", "set dify.base_url")
    overridden = sorted(k for k in deployment.settings.dify.env if k.endswith("_URL"))
    if overridden:
        return warn(
            f"dify.env sets {', '.join(overridden)} apart from the base URL",
            "remove them from dify.env in difyops.yaml, unless you mean it",
        )
    return ok(base)


def _api_pids(deployment: Deployment) -> set[int]:
    import psutil

    from difyops.supervise import Supervisor

    pid = int(Supervisor(deployment).info("api")["pid"])
    return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}


@check(
    "db.migrated",
    why="code and tables of different releases fail in odd places",
    upstream=("32021", "32297"),
    needs=("pg.hba",),
    dify=True,
)
def migrated(deployment: Deployment) -> Finding:
    head = dify_tree.migration_head(deployment.paths.source(deployment.release.version))
    current = api.database_revision(deployment)
    if current != head:
        return fail(
            f"the database is at {current or 'no revision'}, the code at {head}",
            "difyops up --source",
        )
    return ok(f"at head {head}")


@check(
    "celery.queues",
    why="tasks on a queue that no worker takes wait forever",
    upstream=("27769",),
    needs=("redis.up",),
    dify=True,
)
def queues(deployment: Deployment) -> Finding:
    """Ask the running workers which queues they take; compare with the release's own list."""
    taken = worker.active_queues(deployment)
    if not taken:
        return fail("no worker answers", "difyops restart worker; difyops logs worker")
    missing = [queue for queue in deployment.facts.queues if queue not in taken]
    if missing:
        return fail(
            f"worker does not take: {', '.join(missing)}",
            "difyops render && difyops restart worker",
        )
    return ok(", ".join(deployment.facts.queues))


@check(
    "celery.stuck",
    why="indexing and deletions wait behind a worker that does not work",
    upstream=("28513",),
    needs=("redis.up",),
    dify=True,
)
def stuck(deployment: Deployment) -> Finding:
    broker = valkey.client(deployment, valkey.BROKER_DB)
    waiting = {queue: int(broker.llen(queue)) for queue in deployment.facts.queues}
    total = sum(waiting.values())
    consumers = worker.consumers(deployment)
    longest = ", ".join(f"{queue} {count}" for queue, count in waiting.items() if count)
    if total >= WAITING and not consumers:
        return fail(f"waiting with no worker: {longest}", "difyops restart worker")
    if total > 100:
        return warn(f"waiting: {longest}", "difyops logs worker; is a task slow or failing?")
    return ok(f"{total} waiting, {consumers} consumer{'s' if consumers != 1 else ''}")


@check(
    "model.from-caller",
    why="what counts is whether Dify reaches the model, not whether we do",
    upstream=("17664", "14782"),
    needs=("model.up",),
    dify=True,
)
def from_caller(deployment: Deployment) -> Finding:
    """Ask with the API's own interpreter, environment and HTTP library."""
    import subprocess

    process = api.process(deployment, "python", "-c", _ASK, models.llm_url(deployment))
    key = models.llm_key(deployment)
    done = subprocess.run(
        process.argv,
        env={**process.plain_env(), "DIFYOPS_PROBE_KEY": key.reveal() if key else ""},
        cwd=process.cwd,
        user=deployment.user.uid if deployment.user else None,
        group=deployment.user.gid if deployment.user else None,
        extra_groups=[] if deployment.user else None,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return fail(f"the API's Python could not ask: {last}", "difyops up --source")
    if "error" in answer:
        return fail(
            f"from the API's environment, {models.llm_url(deployment)}: {answer['error']}",
            "look at model.url and the proxy variables in dify.env (difyops.yaml)",
        )
    if deployment.settings.model.name not in answer["models"]:
        return fail(f"it has only {', '.join(answer['models'])}", "set model.name in difyops.yaml")
    return ok(f"{models.llm_url(deployment)} from the API's environment")


_ASK = """
import json, os, sys, requests
key = os.environ.get("DIFYOPS_PROBE_KEY")
try:
    answer = requests.get(
        sys.argv[1] + "/models",
        headers={"Authorization": "Bearer " + key} if key else {},
        timeout=10,
    )
    answer.raise_for_status()
    print(json.dumps({"models": [m["id"] for m in answer.json()["data"]]}))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}))
"""


@check(
    "model.context",
    why="long prompts are cut, or refused, when Dify believes in more context than there is",
    upstream=("20409", "1750"),
    needs=("model.up", "api.health"),
    dify=True,
)
def context(deployment: Deployment) -> Finding:
    from difyops import proof

    wanted = proof.target(deployment).llm
    stored = proof.stored_credentials(deployment)
    if stored is None:
        return fail(f"{wanted.name} is not registered in Dify", "difyops wire")
    believed = int(stored.get("context_size") or 0)
    if believed > wanted.context:
        return fail(
            f"Dify believes {believed} tokens, the server has {wanted.context}", "difyops wire"
        )
    if believed < wanted.context:
        return warn(f"Dify uses {believed} of the server's {wanted.context} tokens", "difyops wire")
    return ok(f"{believed} tokens, as the server has")


@check(
    "model.tools",
    why="an agent with a model that cannot call tools answers nonsense",
    upstream=("16005",),
    needs=("model.up", "api.health"),
    dify=True,
)
def tools(deployment: Deployment) -> Finding:
    """What Dify was told, against what the model does when it is asked to call a tool."""
    from difyops import proof

    stored = proof.stored_credentials(deployment)
    if stored is None:
        return fail("the model is not registered in Dify", "difyops wire")
    told = stored.get("function_calling_type", "no_call") != "no_call"
    if not told:
        return ok("registered without tools: Dify prompts agents in ReAct style")
    if not proof.calls_tools(deployment):
        return fail("registered with tools, but a request for a call brought none", "difyops wire")
    return ok("calls tools")
