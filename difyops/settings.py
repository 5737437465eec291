"""difyops.yaml as typed settings; an error carries the key path, what was expected, the remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from difyops.errors import UsageError

Port = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("should be an http:// or https:// URL")
    if parts.username or parts.password:
        raise ValueError("should not carry a password; secrets belong in secrets.env")
    return value.rstrip("/")


def _server_url(value: str, schemes: tuple[str, ...]) -> str:
    parts = urlsplit(value)
    if parts.scheme not in schemes or not parts.hostname:
        raise ValueError(f"should look like {schemes[0]}://user@host:port/name")
    if parts.password:
        raise ValueError("should not carry a password; put it in secrets.env")
    return value


class Dify(_Section):
    enabled: bool = Field(True, description="false: only Postgres, Valkey and the model server.")
    version: str = Field("0.15.3", description="The Dify release; `releases.yaml` lists them.")
    source: str | None = Field(
        None,
        description="Where its code comes from: a directory, a tarball, `git-url@ref`, or a tag. "
        "Without it: the tag of `version` from the first of `mirrors.git` that answers.",
    )
    port: Port = Field(5001, description="The port of Dify's API.")
    base_url: str | None = Field(
        None,
        description="The URL people open; every other URL of Dify is made from it. "
        "Without it: http://localhost:<port>.",
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Further environment variables for API and worker."
    )

    _url = field_validator("base_url")(lambda v: v if v is None else _http_url(v))

    @property
    def url(self) -> str:
        return self.base_url or f"http://localhost:{self.port}"


class Model(_Section):
    backend: Literal["llamacpp", "external"] = Field(
        "llamacpp", description="llamacpp: served here. external: any OpenAI-compatible URL."
    )
    name: str = Field("smollm2-135m", description="A catalog name; for `external` its model id.")
    context: Annotated[int, Field(ge=256)] | None = Field(
        None,
        description="Context length in tokens. Without it: 4096, or what the model has; for "
        "`external` what the server says.",
    )
    port: Port = Field(8090, description="The port of the local model server.")
    url: str | None = Field(None, description="For `external`: the base URL, ending in /v1.")

    _url = field_validator("url")(lambda v: v if v is None else _http_url(v))

    @model_validator(mode="after")
    def _external_needs_url(self) -> Model:
        if self.backend == "external" and not self.url:
            raise ValueError("backend external needs model.url (ending in /v1)")
        if self.backend != "external" and self.url:
            raise ValueError("model.url is only for backend external")
        return self


class Embedding(_Section):
    name: str = Field("minilm-l6", description="A catalog name; with `url` its model id there.")
    url: str | None = Field(None, description="An OpenAI-compatible base URL instead of ours.")
    context: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most tokens of one input, where `url` does not tell."
    )

    _url = field_validator("url")(lambda v: v if v is None else _http_url(v))


class Postgres(_Section):
    provider: Literal["wheel", "system", "tarball", "external"] = Field(
        "wheel",
        description="wheel: from the package index. system: pg_ctl found here. tarball: compiled "
        "binaries. external: a server that somebody else runs.",
    )
    port: Port = Field(5442, description="The port on 127.0.0.1.")
    bin: str | None = Field(None, description="For `system`: the folder that holds pg_ctl.")
    tarball: str | None = Field(None, description="For `tarball`: its path or URL.")
    dsn: str | None = Field(
        None,
        description="For `external`: postgresql://user@host:port/database, without a password "
        "(DIFY_DB_PASSWORD in secrets.env).",
    )

    _dsn = field_validator("dsn")(
        lambda v: v if v is None else _server_url(v, ("postgresql", "postgres"))
    )

    @model_validator(mode="after")
    def _provider_has_its_key(self) -> Postgres:
        for provider, key in (("tarball", "tarball"), ("external", "dsn")):
            if self.provider == provider and not getattr(self, key):
                raise ValueError(f"provider {provider} needs postgres.{key}")
            if self.provider != provider and getattr(self, key):
                raise ValueError(f"postgres.{key} is only for provider {provider}")
        if self.bin and self.provider != "system":
            raise ValueError("postgres.bin is only for provider system")
        return self


class Redis(_Section):
    provider: Literal["wheel", "system", "external"] = Field(
        "wheel", description="wheel: Valkey from the package index. system, external: as above."
    )
    port: Port = Field(6389, description="The port on 127.0.0.1.")
    url: str | None = Field(
        None, description="For `external`: redis://host:port (REDIS_PASSWORD in secrets.env)."
    )

    _url = field_validator("url")(lambda v: v if v is None else _server_url(v, ("redis",)))

    @model_validator(mode="after")
    def _external_needs_url(self) -> Redis:
        if (self.provider == "external") != bool(self.url):
            raise ValueError("redis.url belongs to provider external, and it needs one")
        return self


class Admin(_Section):
    email: Annotated[str, Field(pattern=r"^[^@\s]+@([\w-]+\.)+[\w-]{2,}$")] = Field(
        "admin@difyops.local", description="The first account; password: ADMIN_PASSWORD."
    )
    name: Annotated[str, Field(min_length=1, max_length=30)] = Field("admin")


class Mirrors(_Section):
    pypi: str | None = Field(None, description="A package index (simple API) to use instead.")
    git: list[str] = Field(
        ["https://github.com/langgenius/dify"],
        min_length=1,
        description="Git repositories of Dify, tried in this order.",
    )

    _url = field_validator("pypi")(lambda v: v if v is None else _http_url(v))


class Settings(_Section):
    """What a person asked for. Everything is optional."""

    mode: Literal["compose", "source"] = Field("source", description="How services are run.")
    dify: Dify = Field(default_factory=Dify)
    model: Model = Field(default_factory=Model)
    embedding: Embedding | None = Field(
        default_factory=Embedding, description="null: no knowledge bases."
    )
    vector_store: Literal["pgvector"] = Field("pgvector")
    postgres: Postgres = Field(default_factory=Postgres)
    redis: Redis = Field(default_factory=Redis)
    admin: Admin = Field(default_factory=Admin)
    mirrors: Mirrors = Field(default_factory=Mirrors)
    run_as: str | None = Field(
        None,
        description="Started by root: the user that services run as. Without it: the owner of the "
        "directory, or else `difyops`, which is created.",
    )


def load(path: Path) -> Settings:
    """Read and check difyops.yaml. Raises UsageError naming the key path and what was expected."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} is missing", "run `difyops init` here first") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path.name}: not UTF-8 at byte {error.start}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UsageError(f"{path.name}:{where} {problem}", "mend the YAML there") from None
    return parse({} if data is None else data, path.name)


def parse(data: Any, source: str = "difyops.yaml") -> Settings:
    """Settings from plain data; `source` is named in errors."""
    if not isinstance(data, dict):
        raise UsageError(f"{source}: should be a mapping of keys, not {type(data).__name__}")
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        lines = [_explain(dict(e), source) for e in error.errors()]
        hint = next((hint for _, hint in lines if hint), None)
        raise UsageError("\n".join(line for line, _ in lines), hint) from None


def _explain(error: dict[str, Any], source: str) -> tuple[str, str | None]:
    path = ".".join(str(part) for part in error["loc"])
    where = f"{source}: {path}" if path else source
    if error["type"] == "extra_forbidden":
        known = _keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key", hint
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"]
        near = difflib.get_close_matches(str(error["input"]), expected.replace("'", "").split(), 1)
        said = f"{where}: should be {expected}, not {error['input']!r}"
        return said, f"did you mean `{near[0].strip(',')}`?" if near else None
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}", None
    message = error["msg"].removeprefix("Input ").strip()
    return f"{where}: {message}, not {error['input']!r}", None


def _keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys known at a path of the settings."""
    section: type[BaseModel] = Settings
    for part in path:
        for kind in _section_types(section.model_fields[str(part)].annotation):
            section = kind
    return list(section.model_fields)


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    options = getattr(annotation, "__args__", (annotation,))
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
