"""Wire Dify to the local model: account, models, defaults, a sample app, and proof that it answers.

Every step looks first and changes only what differs, so a second run changes nothing.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from difyops.console import (
    BearerConsole,
    Change,
    Console,
    DifyApiError,
    Json,
    ModelType,
    ServiceApi,
    completion_tokens,
)
from difyops.errors import DifyopsError
from difyops.secrets import REDACTED, Secret

Progress = Callable[[str, str], None]

QUESTION = "Write one short sentence that says hello."
PROMPT = "You are a helpful assistant. Answer briefly."
#: Enough for a sentence, and for the first thoughts of a model that thinks aloud; few enough that
#: a small model that does not stop by itself is soon stopped.
MAX_TOKENS = 256
USER = "difyops"


@dataclass(frozen=True)
class ModelTarget:
    """A model as Dify shall call it: `endpoint_url`, with /v1, is seen from the API process."""

    name: str
    endpoint_url: str
    api_key: Secret
    context: int
    max_output: int = MAX_TOKENS
    tools: bool = False
    vision: bool = False


@dataclass(frozen=True)
class WireTarget:
    """Which Dify, who owns it, and what it shall answer from."""

    base_url: str
    admin_email: str
    admin_name: str
    admin_password: Secret
    llm: ModelTarget
    embedding: ModelTarget | None = None
    app_name: str = "difyops sample chat"


@dataclass(frozen=True)
class ChatProof:
    """What the model answered through Dify, blocking and streaming, in two conversations."""

    answer: str
    seconds: float
    streamed: str
    stream_seconds: float
    first_token_seconds: float
    completion_tokens: int


class ProofError(DifyopsError):
    """Dify is up and does not do its work; `evidence` is what was asked and what came back."""

    def __init__(self, message: str, hint: str | None, evidence: tuple[str, ...]) -> None:
        super().__init__(message, hint)
        self.evidence = evidence


@dataclass
class WireReport:
    """The result of `run`; `changes` says of each object: created, updated or the same."""

    app_id: str
    api_key: Secret
    models: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    chat: ChatProof | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON, without the key."""
        return {
            "app_id": self.app_id,
            "api_key": REDACTED,
            "models": dict(self.models),
            "changes": dict(self.changes),
            "chat": None if self.chat is None else dict(vars(self.chat)),
        }


def run(target: WireTarget, progress: Progress) -> WireReport:
    """Wire everything and prove it. Raises DifyopsError at the first step that fails."""
    changes: dict[str, Change] = {}
    with BearerConsole(target.base_url) as console:
        changes["account"] = ensure_account(console, target)
        progress("account", f"{target.admin_email} {changes['account']}")
        models = _models(target)
        for kind, model in models.items():
            progress("models", f"{kind} {model.name} at {model.endpoint_url}")
            changes[f"model {kind}"] = _ensure_model(console, kind, model)
            progress("models", f"{kind} {model.name} {changes[f'model {kind}']}")
        for kind, model in models.items():
            changes[f"default {kind}"] = _ensure_default(console, kind, model.name)
            progress("defaults", f"{kind} {model.name} {changes[f'default {kind}']}")
        app_id, changes["app"] = _ensure_app(console, target.app_name)
        written = _ensure_config(console, app_id, target.llm)
        fresh = changes["app"] == "created"
        changes["app config"] = "same" if not written else "created" if fresh else "updated"
        progress("app", f"{target.app_name} {changes['app']}, config {changes['app config']}")
        keys = console.app_keys(app_id)
        changes["app key"] = "same" if keys else "created"
        key = keys[0] if keys else console.create_app_key(app_id)
        progress("key", changes["app key"])
    names = {str(kind): model.name for kind, model in models.items()}
    report = WireReport(app_id, key, names, changes)
    progress("proof", "asking, blocking and streaming")
    report.chat = prove(target, report)
    progress(
        "proof",
        f"chat answered in {report.chat.seconds:.1f} s, "
        f"streaming first token {report.chat.first_token_seconds:.1f} s",
    )
    return report


def existing(target: WireTarget) -> WireReport:
    """The sample app and its key as an earlier `run` left them. Raises DifyopsError without one."""
    with BearerConsole(target.base_url) as console:
        console.login(target.admin_email, target.admin_password)
        for app in console.apps(target.app_name):
            keys = console.app_keys(str(app["id"])) if app["mode"] == "chat" else []
            if keys:
                return WireReport(str(app["id"]), keys[0])
    raise DifyopsError(f"Dify has no app {target.app_name!r} with a key", "difyops wire")


def prove(target: WireTarget, report: WireReport, *, seconds: float = 120.0) -> ChatProof:
    """Ask the sample app, blocking and streaming, and look at what came back.

    Asserted is what every working chain shows and no broken one does: words in both answers, no
    error event, a `message_end`, completion tokens. A status code proves nothing, for a streamed
    failure comes with HTTP 200. Nothing is asserted of the answer's meaning: a model of 135M
    parameters may greet, repeat the question or wander off, and Dify's chain is no less sound.
    Each question opens its own conversation, since two turns within a second may garble one.
    """
    with ServiceApi(target.base_url, report.api_key) as api:
        start = time.monotonic()
        try:
            reply = api.chat(QUESTION, user=USER, seconds=seconds)
        except DifyApiError as error:
            evidence = (f"asked, blocking: {QUESTION}", f"answered: {error.message}")
            raise ProofError(error.message, _model_hint(target.llm), evidence) from None
        blocking_seconds = time.monotonic() - start
        _forget(api, reply.conversation_id)
        _check_words("blocking", reply.answer, reply.completion_tokens, target)
        stream = _listen(api, target, seconds)
        _check_words("streaming", stream.text, stream.tokens, target)
    return ChatProof(
        answer=reply.answer,
        seconds=round(blocking_seconds, 3),
        streamed=stream.text,
        stream_seconds=round(stream.ended, 3),
        first_token_seconds=round(stream.first, 3),
        completion_tokens=reply.completion_tokens,
    )


@dataclass
class _Stream:
    """A streamed answer; times in seconds since the question."""

    text: str = ""
    first: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    conversation: str = ""


def _listen(api: ServiceApi, target: WireTarget, seconds: float) -> _Stream:
    stream = _Stream()
    try:
        for event in api.chat_stream(QUESTION, user=USER, seconds=seconds):
            stream.conversation = str(event.data.get("conversation_id") or stream.conversation)
            if event.event == "error":
                raise _stream_error(event.data, stream.text, target)
            if event.event == "message":
                part = str(event.data.get("answer") or "")
                stream.first = stream.first or (event.at if part else 0.0)
                stream.text += part
            elif event.event == "message_replace":
                stream.text = str(event.data.get("answer") or "")
            elif event.event == "message_end":
                stream.ended, stream.tokens = event.at, completion_tokens(event.data)
    finally:
        _forget(api, stream.conversation)
    if not stream.ended:
        raise ProofError(
            "the streamed answer ended without message_end",
            "a proxy or the API's worker cut it: see the API's log for a timeout or a restart",
            (f"asked, streaming: {QUESTION}", f"answered: {stream.text!r}"),
        )
    return stream


def _forget(api: ServiceApi, conversation: str) -> None:
    """A proof is not a user's conversation: doctor may ask every minute. What cannot be deleted
    stays, and is no failure of the chat."""
    if conversation:
        with contextlib.suppress(DifyopsError):
            api.forget(conversation, user=USER)


def ensure_account(console: Console, target: WireTarget) -> Change:
    """Make the owner's account if Dify has none, and log in."""
    change: Change = "same"
    if not console.is_set_up():
        try:
            console.setup(target.admin_email, target.admin_name, target.admin_password)
        except DifyApiError as error:
            if error.code != "not_init_validated":
                raise
            raise error.explained(
                "this Dify has INIT_PASSWORD set: enter it once at /init"
            ) from None
        change = "created"
    log_in(console, target.admin_email, target.admin_password)
    return change


def log_in(console: Console, email: str, password: Secret) -> None:
    """Log in, once. Raises DifyApiError with the remedy when Dify refuses."""
    try:
        console.login(email, password)
    except DifyApiError as error:
        hint = _LOGIN_HINTS.get(error.code, "").format(email=email) or error.hint
        message: str | None = None
        if error.code == "email_or_password_mismatch":
            message = f"Dify has the account {email} with another password"
        raise error.explained(hint, message) from None


_LOGIN_HINTS = {
    "email_or_password_mismatch": (
        "put its password into secrets.env (ADMIN_PASSWORD), or set a new one: in Dify's api/ with "
        "its environment, `flask reset-password --email {email}` asks for it. "
        "After six wrong tries Dify refuses this account for a day"
    ),
    "account_not_found": (
        "this Dify was set up with another address: use the one of its owner as the admin's e-mail"
    ),
    "email_code_login_limit": (
        "too many wrong passwords: Dify refuses this account for LOGIN_LOCKOUT_DURATION (a day), "
        "or until the key login_error_rate_limit:{email} is deleted from Redis database 0"
    ),
}


def _models(target: WireTarget) -> dict[ModelType, ModelTarget]:
    models: dict[ModelType, ModelTarget] = {"llm": target.llm}
    if target.embedding is not None:
        models["text-embedding"] = target.embedding
    return models


def credentials(kind: ModelType, model: ModelTarget) -> dict[str, str]:
    """What Dify stores about a model, but for its key. Dify keeps every value as text."""
    common = {"endpoint_url": model.endpoint_url, "context_size": str(model.context)}
    if kind == "text-embedding":
        return common
    return common | {
        "mode": "chat",
        "max_tokens_to_sample": str(model.max_output),
        # Four characters, not two line breaks: Dify decodes the escapes itself.
        "stream_mode_delimiter": r"\n\n",
        "function_calling_type": "tool_call" if model.tools else "no_call",
        "stream_function_calling": "supported" if model.tools else "not_supported",
        "vision_support": "support" if model.vision else "no_support",
    }


def _ensure_model(console: Console, kind: ModelType, model: ModelTarget) -> Change:
    try:
        return console.ensure_model(kind, model.name, credentials(kind, model), model.api_key)
    except DifyApiError as error:
        raise error.explained(_model_hint(model)) from None


def _ensure_default(console: Console, kind: ModelType, name: str) -> Change:
    present = console.default_model(kind)
    if present == (console.provider, name):
        return "same"
    console.set_default_model(kind, name)
    return "updated" if present else "created"


def _ensure_app(console: Console, name: str) -> tuple[str, Change]:
    for app in console.apps(name):
        if app["mode"] == "chat":
            return str(app["id"]), "same"
    app = console.create_app(name, "chat", "Made by difyops to prove that the model answers.")
    return str(app["id"]), "created"


def _ensure_config(console: Console, app_id: str, llm: ModelTarget) -> bool:
    """Point the app at our model; a prompt or parameters that a person set are kept.

    Returns whether anything was written.
    """
    stored = console.model_config(app_id)
    present = stored.get("model") or {}
    params = dict(present.get("completion_params") or {})
    wanted = {"provider": console.provider, "name": llm.name, "mode": "chat"}
    fits = 0 < params.get("max_tokens", 0) <= llm.max_output
    if fits and all(present.get(k) == v for k, v in wanted.items()):
        return False
    if not fits:
        params["max_tokens"] = min(MAX_TOKENS, llm.max_output)
    params.setdefault("temperature", 0.1)
    # Audit fields are not configuration, and Dify's validation has no use for a null.
    config: Json = {
        k: v
        for k, v in stored.items()
        if v is not None and not k.startswith(("created_", "updated_"))
    }
    config["model"] = {**wanted, "completion_params": params}
    config.setdefault("pre_prompt", PROMPT)
    console.set_model_config(app_id, config)
    return True


def _check_words(mode: str, answer: str, tokens: int, target: WireTarget) -> None:
    evidence = (
        f"asked, {mode}: {QUESTION}",
        f"answered: {answer!r}",
        f"completion tokens: {tokens}",
    )
    if not answer.strip():
        raise ProofError(
            f"the {mode} answer is empty",
            f"ask {target.llm.name} at {target.llm.endpoint_url} directly: an empty answer there "
            "means a wrong chat template, or a thinking model that ran out of tokens",
            evidence,
        )
    letters = sum(c.isalpha() for c in answer)
    if not re.search(r"[^\W\d_]{2}", answer) or letters * 2 < len(re.sub(r"\s", "", answer)):
        raise ProofError(
            f"the {mode} answer is not made of words: {answer[:80]!r}",
            "a damaged model file or a wrong chat template: ask the model server directly",
            evidence,
        )
    if tokens <= 0:
        raise ProofError(
            f"the {mode} answer reports no completion tokens",
            "see the API's log: Dify did not finish this message",
            evidence,
        )


def _stream_error(data: Json, so_far: str, target: WireTarget) -> ProofError:
    code, message = data.get("code", "unknown"), str(data.get("message", ""))[:600]
    return ProofError(
        f"the stream was HTTP 200 and held an error event, {code}: {message}",
        _model_hint(target.llm),
        (f"asked, streaming: {QUESTION}", f"answered: {so_far!r}", f"error event: {message}"),
    )


def _model_hint(model: ModelTarget) -> str:
    return (
        f"{model.name} has to answer at {model.endpoint_url} from where Dify's API runs: "
        f"try `curl {model.endpoint_url}/models` there. A status 401 means another model key"
    )
