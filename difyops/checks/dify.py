"""Dify itself: its code, API, URLs and tables, and the model as its API sees it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from difyops import checkout, dify_source, dify_tree, releases
from difyops.checks.looking import UP, is_ours, ours, quoted
from difyops.core import Deployment, NotReady
from difyops.doctor import Finding, Registry, fail, ok, skip, warn
from difyops.errors import UsageError
from difyops.loopback import is_loopback
from difyops.services import api, postgres
from difyops.services import model as models

if TYPE_CHECKING:
    import requests

check = Registry()


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
        tree = deployment.paths.source(version)
        try:
            dify_tree.require(tree, str(tree))
        except UsageError as error:
            return fail(error.message, f"rm -r {quoted(tree)} && {UP}")
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
            f"{UP} --dify <directory | tarball>, or set mirrors.git",
        )
    return ok(f"dify {version} from {mirror}")


@check(
    "dify.python",
    why="Dify runs on the Python versions that its release names, and no other",
    preflight=True,
    dify=True,
)
def python(deployment: Deployment) -> Finding:
    """Its environment, or an interpreter and uv to make it with. Nothing is made."""
    from difyops import dify_python, interpreters

    made = dify_python.environment_done(deployment)
    if made:
        return ok(made)
    found = interpreters.probe_all(
        deployment.release.python, deployment.user, dify_python.find_uv()
    )
    return ok(f"Python {found.text} at {found.path}")


@check("api.health", why="nothing of Dify works without its API", needs=("pg.up",), dify=True)
def health(deployment: Deployment) -> Finding:
    try:
        return ok(api.ready(deployment))
    except NotReady as reason:
        return fail(str(reason), f"{UP}; if it ends again: difyops logs api")


@check(
    "net.urls",
    why="links, webhooks and file URLs are made from the base URL",
    upstream=("dify#14232", "dify#28534", "dify#16309"),
    needs=("api.health", "pg.hba"),
    dify=True,
    answers=("fail", "warn"),
)
def urls(deployment: Deployment) -> Finding:
    """The base URL leads to this very API, a signed file comes back through it, and what runs was
    started with it."""
    base = deployment.settings.dify.url
    if urlsplit(base).path not in ("", "/"):
        return fail(
            f"{base} has a path; Dify's API answers at the root",
            f"remove the path from dify.base_url in difyops.yaml, then: {UP}",
        )
    wrong = _other_api(deployment, base) or _lost_file(deployment)
    if wrong:
        return fail(wrong, f"set dify.base_url to a URL that reaches this API, then: {UP}")
    wanted = api.environment(deployment)
    for process, environment in ours(deployment):
        for name in _URLS:
            if name in environment and environment[name] != wanted.get(name):
                return fail(
                    f"what runs (pid {process.pid}) has {name}={environment[name]}, "
                    f"difyops.yaml says {wanted.get(name)}",
                    UP,
                )
    apart = sorted(
        name
        for name, value in deployment.settings.dify.env.items()
        if name in _URLS and value.rstrip("/") != base
    )
    if apart:
        return warn(
            f"dify.env sets {', '.join(apart)} apart from the base URL {base}",
            f"remove them from dify.env in difyops.yaml unless you mean it, then: {UP}",
        )
    return ok(base)


_URLS = ("CONSOLE_API_URL", "CONSOLE_WEB_URL", "SERVICE_API_URL", "APP_WEB_URL", "FILES_URL")


def _get(url: str) -> requests.Response:
    import requests

    with requests.Session() as session:
        # A proxy of our shell is not on the way of a browser to this machine.
        session.trust_env = not is_loopback(urlsplit(url).hostname)
        return session.get(url, timeout=5, allow_redirects=False)


def _other_api(deployment: Deployment, base: str) -> str | None:
    """What answers at the base URL, if it is not our API."""
    import requests

    try:
        said = _json(_get(f"{base}/health"))
        if "pid" in said:
            if is_ours(deployment, int(said["pid"])):
                return None
            return f"{base} is answered by another API (pid {said['pid']})"
        # A front end that hands on only what Dify's own gateway does.
        if _json(_get(f"{base}/v1/")).get("server_version") == deployment.release.version:
            return None
    except requests.RequestException as error:
        return f"{base} does not answer: {type(error).__name__}"
    return f"{base} is answered by something else than dify {deployment.release.version}"


def _json(answer: requests.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _lost_file(deployment: Deployment) -> str | None:
    """Why an uploaded file does not come back through its signed URL; None also without one."""
    import psycopg
    import requests

    try:
        with postgres.connect(deployment) as session:
            row = session.execute(
                "select id::text from upload_files order by created_at desc limit 1"
            ).fetchone()
    except psycopg.errors.UndefinedTable:
        return None  # db.migrated tells
    if row is None:
        return None
    files = str(api.environment(deployment)["FILES_URL"])
    secret = api.environment(deployment)["SECRET_KEY"]
    key = secret if isinstance(secret, str) else secret.reveal()
    try:
        answer = _get(f"{files}{signed(row[0], key)}")
    except requests.RequestException as error:
        return f"{files} does not answer: {type(error).__name__}"
    if answer.status_code == 200:
        return None
    return f"{files} answers {answer.status_code} to the signed URL of an uploaded file"


def signed(file: str, key: str) -> str:
    """The path of an uploaded file, signed as Dify 0.15 does."""
    now, nonce = str(int(time.time())), os.urandom(16).hex()
    text = f"file-preview|{file}|{now}|{nonce}"
    sign = hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()
    query = f"timestamp={now}&nonce={nonce}&sign={base64.urlsafe_b64encode(sign).decode()}"
    return f"/files/{file}/file-preview?{query}"


@check(
    "db.migrated",
    why="code and tables of different releases fail in odd places",
    upstream=("dify#32021", "dify#32297"),
    needs=("pg.hba",),
    dify=True,
)
def migrated(deployment: Deployment) -> Finding:
    import psycopg

    if deployment.facts.checkout is None:
        return skip("there is no Dify code here yet, which names the newest migration")
    tree = deployment.paths.source(deployment.release.version)
    head = dify_tree.migration_head(tree)
    try:
        with postgres.connect(deployment) as session:
            rows = session.execute("select version_num from alembic_version").fetchall()
    except psycopg.errors.UndefinedTable:
        rows = []
    at = sorted(row[0] for row in rows)
    if at == [head]:
        return ok(f"at head {head}")
    strange = [revision for revision in at if not dify_tree.knows_migration(tree, revision)]
    if strange:
        return fail(
            f"the database is at {strange[0]}, which dify {deployment.release.version} does not "
            "know: a newer release migrated it",
            f"set dify.version to that release in difyops.yaml, then: {UP}",
        )
    return fail(f"the database is at {', '.join(at) or 'no revision'}, the code at {head}", UP)


@check(
    "model.from-caller",
    why="what counts is whether Dify reaches the model, not whether we do",
    upstream=("dify#17664", "dify#14782"),
    needs=("model.up",),
    dify=True,
)
def from_caller(deployment: Deployment) -> Finding:
    """Ask with the API's own interpreter, environment, user and HTTP library."""
    import subprocess

    version = deployment.release.version
    if not deployment.paths.dify_python(version).exists():
        return skip("Dify's Python environment is not installed yet")
    asked = {models.llm_url(deployment): deployment.settings.model.name}
    keys = {models.llm_url(deployment): models.llm_key(deployment)}
    url = models.embedding_url(deployment)
    if url and url not in asked and deployment.settings.embedding:
        asked[url] = deployment.settings.embedding.name
        keys[url] = models.embedding_key(deployment)
    probe = {
        "DIFYOPS_PROBE_KEYS": json.dumps({u: k.reveal() if k else "" for u, k in keys.items()})
    }
    try:
        done = api.run_python(deployment, _ASK, *asked, env=probe)
        answers = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return fail("the API's Python did not answer within 30 s", "difyops logs api")
    except OSError as error:
        return fail(f"the API's Python cannot be started: {error.strerror}", UP)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        tree = quoted(deployment.paths.dify_python(version).parents[1])
        return fail(f"the API's Python cannot ask: {last}", f"rm -r {tree} && {UP}")
    for url, name in asked.items():
        answer = answers[url]
        if "error" in answer:
            return fail(f"from the API's environment, {url}: {answer['error']}", _way(deployment))
        if name not in answer["models"]:
            return fail(
                f"{url} has {', '.join(answer['models']) or 'no model'}, not {name}",
                f"set its name in difyops.yaml, then: {UP}",
            )
    return ok(f"{', '.join(asked)} from the API's environment")


def _way(deployment: Deployment) -> str:
    proxies = sorted(k for k in deployment.settings.dify.env if k.lower().endswith("_proxy"))
    if proxies:
        return f"remove {', '.join(proxies)} from dify.env in difyops.yaml, then: {UP}"
    return f"see model.url in difyops.yaml and the firewall; then: {UP}"


_ASK = """
import json, os, sys, requests
keys = json.loads(os.environ["DIFYOPS_PROBE_KEYS"])
found = {}
for url in sys.argv[1:]:
    try:
        answer = requests.get(
            url + "/models",
            headers={"Authorization": "Bearer " + keys[url]} if keys[url] else {},
            timeout=10,
        )
        answer.raise_for_status()
        found[url] = {"models": [m["id"] for m in answer.json()["data"]]}
    except Exception as error:
        found[url] = {"error": f"{type(error).__name__}: {error}"[:300]}
print(json.dumps(found))
"""
