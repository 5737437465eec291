"""difyops.yaml as typed settings; an error carries the key path, what was expected, the remedy."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from difyops import catalog, strict_yaml
from difyops.errors import UsageError

Port = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    # strict: `port: yes` is a mistake, not the port 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _split(value: str, shape: str) -> SplitResult:
    """The parts of a URL without a password. It is never repeated in an error."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError(f"should look like {shape}") from None
    if not parts.hostname or re.search(r"\s", value) or port == 0:
        raise ValueError(f"should look like {shape}")
    if parts.password is not None:
        raise ValueError("should not carry a password; secrets belong in secrets.env")
    if parts.query or parts.fragment:
        raise ValueError(f"should look like {shape}: what stands after ? or # is not read")
    return parts


def _http_url(value: str) -> str:
    if value.split("://")[0].lower() not in ("http", "https"):
        raise ValueError("should be an http:// or https:// URL")
    if _split(value, "https://host/path").username is not None:
        raise ValueError("should not carry a login; secrets belong in secrets.env")
    return value.rstrip("/")


def _dsn(value: str) -> str:
    shape = "postgresql://user@host:port/database"
    if _split(value, shape).scheme not in ("postgresql", "postgres"):
        raise ValueError(f"should look like {shape}")
    return value


def _redis_url(value: str) -> str:
    shape = "redis://user@host:port"
    parts = _split(value, shape)
    if parts.scheme != "redis" or parts.path.strip("/"):
        raise ValueError(f"should look like {shape}, without a database number")
    return value


def _no_password(value: str) -> str:
    """Of a path or any URL that git reads; its credential helper is the place for a password."""
    if "://" in value and re.match(r"[^/]*:[^/]*@", value.split("://", 1)[1]):
        raise ValueError("should not carry a password; give it to git's credential helper")
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
        default_factory=dict,
        description="Further environment variables for API and worker. `secret:NAME` stands "
        "for NAME in secrets.env: a password does not belong here.",
    )

    _url = field_validator("base_url")(lambda v: v if v is None else _http_url(v))
    _source = field_validator("source")(lambda v: v if v is None else _no_password(v))

    @field_validator("env")
    @classmethod
    def _env_file_can_hold_it(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
            if re.search(r"[\r\n\0]", value):
                raise ValueError(f"{name}: should be one line")
        return env

    @property
    def url(self) -> str:
        return self.base_url or f"http://localhost:{self.port}"


class Model(_Section):
    backend: Literal["llamacpp", "native", "external"] = Field(
        "llamacpp",
        description="Who serves it. llamacpp and native (difyops' own engine): here. external: "
        "any OpenAI-compatible URL.",
    )
    name: str = Field(
        "smollm2-135m",
        description="A catalog name, for `native` also `tiny`; for `external` its model id; with "
        "`source` what to call it.",
    )
    source: str | None = Field(
        None,
        description="For `native`: a model that is not in the catalog. A directory, a .gguf file, "
        "hf:OWNER/NAME, modelscope:OWNER/NAME or pypi:NAME==VERSION.",
    )
    context: Annotated[int, Field(ge=256)] | None = Field(
        None,
        description="Context length in tokens. Without it: 4096, or what the model has; for "
        "`external` what the server says.",
    )
    slots: Annotated[int, Field(ge=1, le=1024)] = Field(
        2, description="Chats at a time; each has the whole context. Not of an `external` one."
    )
    port: Port = Field(8090, description="The port of the local model server.")
    url: str | None = Field(None, description="For `external`: the base URL, ending in /v1.")

    _url = field_validator("url")(lambda v: v if v is None else _http_url(v))

    @model_validator(mode="before")
    @classmethod
    def _bundled_is_its_own_source(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("backend") == "native":
            name = given.get("name")
            if name in catalog.bundled_names() and given.get("source") is None:
                return {**given, "source": name}
        return given

    @model_validator(mode="after")
    def _keys_fit_the_backend(self) -> Model:
        if self.backend == "external" and not self.url:
            raise ValueError("backend external needs model.url (ending in /v1)")
        if self.backend != "external" and self.url:
            raise ValueError("model.url is only for backend external")
        if self.backend != "native" and self.source:
            raise ValueError("model.source is only for backend native")
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
    port: Port = Field(5442, description="The port on 127.0.0.1; not of an `external` one.")
    bin: str | None = Field(None, description="For `system`: the folder that holds pg_ctl.")
    tarball: str | None = Field(None, description="For `tarball`: its path or URL.")
    dsn: str | None = Field(
        None,
        description="For `external`: postgresql://user@host:port/database, without a password "
        "(DIFY_DB_PASSWORD in secrets.env).",
    )

    _dsn = field_validator("dsn")(lambda v: v if v is None else _dsn(v))

    _tarball = field_validator("tarball")(
        lambda v: _http_url(v) if v and v.startswith(("http://", "https://")) else v
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
    port: Port = Field(6389, description="The port on 127.0.0.1; not of an `external` one.")
    url: str | None = Field(
        None, description="For `external`: redis://host:port (REDIS_PASSWORD in secrets.env)."
    )

    _url = field_validator("url")(lambda v: v if v is None else _redis_url(v))

    @model_validator(mode="after")
    def _external_needs_url(self) -> Redis:
        if (self.provider == "external") != bool(self.url):
            raise ValueError("redis.url belongs to provider external, and it needs one")
        return self


class Admin(_Section):
    email: Annotated[str, Field(pattern=r"^[^@\s]+@([\w-]+\.)+[\w-]{2,}$")] = Field(
        "admin@difyops.local", description="The first account; password: ADMIN_PASSWORD."
    )
    name: Annotated[str, Field(min_length=1, max_length=30)] = Field(
        "admin", description="Its name in Dify."
    )


class Mirrors(_Section):
    pypi: str | None = Field(None, description="A package index (simple API) to use instead.")
    git: list[str] = Field(
        ["https://github.com/langgenius/dify"],
        min_length=1,
        description="Git repositories of Dify, tried in this order.",
    )

    _url = field_validator("pypi")(lambda v: v if v is None else _http_url(v))
    _git = field_validator("git")(lambda urls: [_no_password(url) for url in urls])


class Settings(_Section):
    """What a person asked for. Everything is optional."""

    mode: Literal["compose", "source"] = Field("source", description="How services are run.")
    dify: Dify = Field(default_factory=Dify)
    model: Model = Field(default_factory=Model)
    embedding: Embedding | None = Field(
        default_factory=Embedding, description="null: no knowledge bases."
    )
    vector_store: Literal["pgvector"] = Field(
        "pgvector", description="Where the vectors of knowledge bases are kept."
    )
    postgres: Postgres = Field(default_factory=Postgres)
    redis: Redis = Field(default_factory=Redis)
    admin: Admin = Field(default_factory=Admin)
    mirrors: Mirrors = Field(default_factory=Mirrors)
    run_as: str | None = Field(
        None,
        description="Started by root: the user that services run as. Without it: `difyops`, which "
        "is made. Not the owner of the directory.",
    )

    @model_validator(mode="after")
    def _ports_differ(self) -> Settings:
        local = self.embedding is not None and self.embedding.url is None
        ports = {
            "dify.port": self.dify.port if self.dify.enabled else None,
            "model.port": self.model.port if local or self.model.backend != "external" else None,
            "postgres.port": None if self.postgres.provider == "external" else self.postgres.port,
            "redis.port": None if self.redis.provider == "external" else self.redis.port,
        }
        taken: dict[int, str] = {}
        for key, port in ports.items():
            if port in taken:
                raise ValueError(f"{key} and {taken[port]} are both {port}; each needs its own")
            if port is not None:
                taken[port] = key
        return self


def _elsewhere(folder: Path) -> str:
    """Where a person may have meant: a deployment above or below, or else a new one."""
    near = [p for p in folder.resolve().parents if (p / "difyops.yaml").exists()]
    if folder.is_dir():
        near += sorted(p.parent for p in folder.glob("*/difyops.yaml"))
    if near:
        return f"did you mean `difyops -C {near[0]} …`?"
    return f"go to your deployment directory, or make one: difyops init {folder}"


def load(path: Path) -> Settings:
    """Read and check difyops.yaml. Raises UsageError naming the key path and what was expected."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} is missing", _elsewhere(path.parent)) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path.name}: not UTF-8 at byte {error.start}", "save it as UTF-8"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    data = strict_yaml.load(text, path.name)
    return parse({} if data is None else data, path.name)


def parse(data: Any, source: str = "difyops.yaml") -> Settings:
    """Settings from plain data; `source` is named in errors."""
    if not isinstance(data, dict):
        raise UsageError(
            f"{source}: should be a mapping of keys, not {_said(data)}",
            "a line a key, such as  mode: source",
        )
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        found = [_explain(dict(e), source) for e in error.errors()]
    lines = [line for line, _ in found[:3]]
    if len(found) > 3:
        lines.append(f"{source}: and {len(found) - 3} more")
    raise UsageError("\n".join(lines), next((hint for _, hint in found if hint), None))


def _explain(error: dict[str, Any], source: str) -> tuple[str, str | None]:
    """One wrong setting -> where and what, and the remedy."""
    kind, given = error["type"], error["input"]
    path = ".".join(str(part) for part in error["loc"])
    where = f"{source}: {path}" if path else source
    last = str(error["loc"][-1]) if error["loc"] else ""
    if kind == "extra_forbidden":
        known = _keys(error["loc"][:-1])
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key", hint
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        near = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", expected), 1)
        said = f"{where}: should be {expected}, not {_said(given)}"
        return said, f"did you mean `{near[0]}`?" if near else None
    if kind == "value_error":
        return f"{where}: {error['ctx']['error']}", None
    if kind == "string_type" and error["loc"][:2] == ("dify", "env"):
        # Not repeated here: it may be a password.
        return f"{where}: should be text, in quotes", f'{last}: "…"'
    if kind == "string_type" and isinstance(given, bool | int | float):
        return f"{where}: should be text, not {_said(given)}", f'put it in quotes: {last}: "…"'
    if kind in ("model_type", "dict_type"):
        remedy = f"give it keys, or remove `{last}:`" if given is None else None
        return f"{where}: should be a mapping of keys, not {_said(given)}", remedy
    message = str(error["msg"])
    for noise in ("Input ", "Value "):
        message = message.removeprefix(noise)
    return f"{where}: {message[:1].lower()}{message[1:]}, not {_said(given)}", None


def _said(value: Any) -> str:
    """What stands there, briefly and in the words of YAML."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:39] + "…")
    return str(value)[:40]


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
