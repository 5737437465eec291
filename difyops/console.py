"""Dify over HTTP: the console API (what the web front end calls) and the service API (`/v1`).

One class per auth style. `BearerConsole` speaks 0.15; what its successors share with it stands in
`Console`. Importing this module does not import `requests`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from difyops.errors import DifyopsError
from difyops.secrets import Secret
from difyops.transport import (
    DifyApiError,
    DifyUnreachable,
    Http,
    Json,
    lines_until,
    parse_sse,
)

__all__ = [
    "BearerConsole",
    "Change",
    "ChatEvent",
    "ChatReply",
    "Console",
    "DifyApiError",
    "DifyUnreachable",
    "Json",
    "ModelType",
    "ServiceApi",
    "completion_tokens",
    "masked",
]

ModelType = Literal["llm", "text-embedding"]
#: What an idempotent call did.
Change = Literal["created", "same", "updated"]

#: Saving a model makes Dify call it, and a first call may load the weights; Dify itself gives up
#: after 300 s.
MODEL_SECONDS = 310.0


@dataclass(frozen=True)
class ChatReply:
    """A blocking chat answer."""

    answer: str
    conversation_id: str
    completion_tokens: int


@dataclass(frozen=True)
class ChatEvent:
    """One event of a streamed answer; `at` is in seconds since the request was sent."""

    event: str
    data: Json
    at: float


def masked(key: str) -> str | None:
    """What Dify shows of a stored secret, or None where that says nothing about its value."""
    return key[:6] + "*" * 12 + key[-2:] if len(key) > 8 else None


class Console(Http, ABC):
    """The console API. Call `login` first; everything but the setup calls needs it."""

    #: How this release names the provider of OpenAI-compatible models.
    provider: str

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url.rstrip("/") + "/console/api")

    # --- account

    def is_set_up(self) -> bool:
        """Whether the first account exists."""
        return self._call("GET", "/setup").get("step") == "finished"

    def setup(self, email: str, name: str, password: Secret) -> None:
        """Make the first account, the owner. Dify refuses a second time (`already_setup`)."""
        body = {"email": email, "name": name, "password": self._keep_out(password).reveal()}
        self._call("POST", "/setup", json=body)

    @abstractmethod
    def login(self, email: str, password: Secret) -> None:
        """Log in. Six wrong passwords lock an account out for a day: do not retry."""

    # --- models

    @abstractmethod
    def model_credentials(self, kind: ModelType, name: str) -> Json | None:
        """What is stored for a model, secrets masked; None if it is not registered."""

    @abstractmethod
    def save_model(self, kind: ModelType, name: str, credentials: Json) -> None:
        """Register a model or replace its credentials. Dify calls the model to validate them."""

    def models(self) -> list[Json]:
        """The models of the provider, with their context and whether they are usable."""
        path = f"/workspaces/current/model-providers/{self.provider}/models"
        return list(self._call("GET", path)["data"])

    def ensure_model(
        self, kind: ModelType, name: str, settings: Mapping[str, str], api_key: Secret
    ) -> Change:
        """Register a model unless it is there with the same settings and the same key.

        Dify shows six characters of a key's beginning and two of its end, and that is compared.
        Nothing is shown of a key of eight characters or fewer: such a model is saved every time.
        Settings that a person added are kept.
        """
        stored = self.model_credentials(kind, name)
        wanted = dict(settings)
        if stored is not None:
            shown = stored.pop("api_key", None) or None
            same_key = shown == masked(api_key.reveal()) if api_key else shown is None
            if same_key and all(stored.get(k) == v for k, v in wanted.items()):
                return "same"
            wanted = {**stored, **wanted}
        if api_key:
            wanted["api_key"] = self._keep_out(api_key).reveal()
        self.save_model(kind, name, wanted)
        return "created" if stored is None else "updated"

    def default_model(self, kind: ModelType) -> tuple[str, str] | None:
        """(provider, model). With none set, asking makes Dify 0.15 choose the first it finds."""
        path = "/workspaces/current/default-model"
        data = self._call("GET", path, params={"model_type": kind})["data"]
        return (data["provider"]["provider"], data["model"]) if data else None

    def set_default_model(self, kind: ModelType, name: str) -> None:
        setting = {"model_type": kind, "provider": self.provider, "model": name}
        body = {"model_settings": [setting]}
        self._call("POST", "/workspaces/current/default-model", json=body)

    # --- apps

    def apps(self, name: str) -> list[Json]:
        """The apps with exactly this name, oldest first (Dify's own filter is a substring)."""
        return self._by_name("/apps", "name", name)

    def create_app(self, name: str, mode: str, description: str) -> Json:
        look = {"icon_type": "emoji", "icon": "\N{SPEECH BALLOON}", "icon_background": "#D5F5F6"}
        body = {"name": name, "mode": mode, "description": description, **look}
        return self._call("POST", "/apps", json=body)

    def model_config(self, app_id: str) -> Json:
        return dict(self._call("GET", f"/apps/{app_id}")["model_config"] or {})

    def set_model_config(self, app_id: str, config: Json) -> None:
        """Replace the configuration: what `config` leaves out goes back to Dify's default."""
        self._call("POST", f"/apps/{app_id}/model-config", json=config)

    def app_keys(self, app_id: str) -> list[Secret]:
        """The service API keys of an app, oldest first."""
        rows = self._call("GET", f"/apps/{app_id}/api-keys")["data"]
        rows = sorted(rows, key=lambda row: row["created_at"] or 0)
        return [self._keep_out(Secret(row["token"])) for row in rows]

    def create_app_key(self, app_id: str) -> Secret:
        return self._keep_out(Secret(self._call("POST", f"/apps/{app_id}/api-keys")["token"]))

    # --- knowledge

    def datasets(self, name: str) -> list[Json]:
        """The datasets with exactly this name, oldest first."""
        return self._by_name("/datasets", "keyword", name)

    def create_dataset(self, name: str) -> Json:
        """An empty dataset. Dify refuses a name that exists (`dataset_name_duplicate`)."""
        return self._call("POST", "/datasets", json={"name": name})

    def update_dataset(self, dataset_id: str, changes: Json) -> None:
        self._call("PATCH", f"/datasets/{dataset_id}", json=changes)

    def upload_file(self, name: str, content: bytes, mime: str = "text/plain") -> str:
        """Upload a file for a dataset and return its id."""
        form = {"files": {"file": (name, content, mime)}, "data": {"source": "datasets"}}
        return str(self._call("POST", "/files/upload", **form)["id"])

    def add_document(self, dataset_id: str, file_id: str, embedding: str, separator: str) -> str:
        """Start to index an uploaded file, cut at `separator`; return the document's id."""
        files = {"data_source_type": "upload_file", "file_info_list": {"file_ids": [file_id]}}
        cut = {"separator": separator, "max_tokens": 500, "chunk_overlap": 0}
        rules = {"pre_processing_rules": [], "segmentation": cut}
        body = {
            "indexing_technique": "high_quality",
            "data_source": {"type": "upload_file", "info_list": files},
            "process_rule": {"mode": "custom", "rules": rules},
            "doc_form": "text_model",
            "doc_language": "English",
            "embedding_model": embedding,
            "embedding_model_provider": self.provider,
        }
        reply = self._call("POST", f"/datasets/{dataset_id}/documents", json=body)
        return str(reply["documents"][0]["id"])

    def documents(self, dataset_id: str) -> list[Json]:
        """The first hundred documents of a dataset."""
        path = f"/datasets/{dataset_id}/documents"
        return list(self._call("GET", path, params={"limit": 100})["data"])

    def delete_document(self, dataset_id: str, document_id: str) -> None:
        """Remove a document; the worker then removes its vectors."""
        self._call("DELETE", f"/datasets/{dataset_id}/documents/{document_id}")

    def indexing_status(self, dataset_id: str, document_id: str) -> Json:
        """`indexing_status` (waiting … completed, or error), `error`, and the segments done."""
        path = f"/datasets/{dataset_id}/documents/{document_id}/indexing-status"
        return self._call("GET", path)

    def hit_testing(self, dataset_id: str, question: str, top_k: int = 3) -> list[Json]:
        """What retrieval finds, best first: records with `segment` and `score`."""
        how = {"search_method": "semantic_search", "reranking_enable": False, "top_k": top_k}
        body = {"query": question, "retrieval_model": {**how, "score_threshold_enabled": False}}
        path = f"/datasets/{dataset_id}/hit-testing"
        return list(self._call("POST", path, json=body, read_seconds=120.0)["records"])

    def _by_name(self, path: str, filter_name: str, name: str) -> list[Json]:
        found: list[Json] = []
        page, more = 1, True
        while more:
            params = {filter_name: name, "page": page, "limit": 100}
            reply = self._call("GET", path, params=params)
            found += [row for row in reply["data"] if row["name"] == name]
            page, more = page + 1, bool(reply["has_more"])
        return sorted(found, key=lambda row: row["created_at"] or 0)


class BearerConsole(Console):
    """Dify 0.15: the password in plain text, and a Bearer token back in the body."""

    provider = "openai_api_compatible"

    def login(self, email: str, password: Secret) -> None:
        body = {"email": email, "password": self._keep_out(password).reveal()}
        reply = self._call("POST", "/login", json=body)
        data = reply.get("data")
        if reply.get("result") != "success" or not isinstance(data, dict):
            # Such as an account without a workspace: HTTP 200, the reason in `data`.
            raise DifyopsError(f"login as {email} failed: {reply.get('code') or data}")
        token = self._keep_out(Secret(data["access_token"]))
        self._session.headers["Authorization"] = f"Bearer {token.reveal()}"

    def model_credentials(self, kind: ModelType, name: str) -> Json | None:
        path = f"/workspaces/current/model-providers/{self.provider}/models/credentials"
        params = {"model": name, "model_type": kind}
        credentials = self._call("GET", path, params=params)["credentials"]
        return None if credentials is None else dict(credentials)

    def save_model(self, kind: ModelType, name: str, credentials: Json) -> None:
        path = f"/workspaces/current/model-providers/{self.provider}/models"
        body = {"model": name, "model_type": kind, "credentials": credentials}
        self._call("POST", path, json=body, read_seconds=MODEL_SECONDS)


class ServiceApi(Http):
    """The service API of one app, `/v1`, with the app's key."""

    def __init__(self, base_url: str, key: Secret) -> None:
        super().__init__(base_url.rstrip("/") + "/v1")
        self._session.headers["Authorization"] = f"Bearer {self._keep_out(key).reveal()}"

    def chat(self, query: str, *, user: str, seconds: float = 120.0) -> ChatReply:
        """Ask in a new conversation and wait for the whole answer."""
        body = self._question(query, user, "blocking")
        reply = self._call("POST", "/chat-messages", json=body, read_seconds=seconds)
        answer = reply.get("answer")
        return ChatReply(
            answer=answer if isinstance(answer, str) else "",
            conversation_id=str(reply.get("conversation_id", "")),
            completion_tokens=completion_tokens(reply),
        )

    def chat_stream(self, query: str, *, user: str, seconds: float = 120.0) -> Iterator[ChatEvent]:
        """Ask in a new conversation and yield the events as they come.

        An `error` event is yielded, not raised: Dify sends it with HTTP 200, and the caller has to
        look. `seconds` bounds the whole answer, since Dify's pings keep a stuck one open.
        """
        import requests

        body = self._question(query, user, "streaming")
        start = time.monotonic()
        response = self._send(
            "POST", "/chat-messages", json=body, read_seconds=seconds, stream=True
        )
        with response:
            kind = response.headers.get("Content-Type", "no content type")
            if not kind.startswith("text/event-stream"):
                raise DifyopsError(f"POST /chat-messages: answered with {kind}, not with a stream")
            try:
                for event, data in parse_sse(lines_until(response, start + seconds)):
                    yield ChatEvent(event, data, time.monotonic() - start)
            except requests.exceptions.RequestException:
                late = time.monotonic() - start
                raise DifyUnreachable(
                    f"the stream broke off after {late:.1f} s", "see the API's log"
                ) from None

    def forget(self, conversation_id: str, *, user: str) -> None:
        """Delete a conversation of `user`."""
        self._call("DELETE", f"/conversations/{conversation_id}", json={"user": user})

    def _question(self, query: str, user: str, mode: str) -> Json:
        # auto_generate_name would make Dify ask the model for a title: a second call per question.
        return {
            "inputs": {},
            "query": query,
            "user": user,
            "response_mode": mode,
            "auto_generate_name": False,
        }


def completion_tokens(message: Mapping[str, Any]) -> int:
    """The completion tokens that a blocking answer or a `message_end` event reports, or 0."""
    metadata = message.get("metadata") or {}
    usage = metadata.get("usage") or {}
    return int(usage.get("completion_tokens") or 0)
