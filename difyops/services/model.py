"""The model server: chat and embeddings behind one OpenAI-compatible `/v1`, here or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from difyops import backends, catalog, identity, loopback, modelsource
from difyops.backends import EmbeddingSpec, LlmSpec, Spec
from difyops.core import Deployment, File, NotReady, Process, Service, Step
from difyops.errors import (
    EXIT_CANNOT_START,
    EXIT_USAGE,
    DifyopsError,
    PrerequisiteError,
    UsageError,
)
from difyops.files import digest

if TYPE_CHECKING:
    from difyops.secrets import Secret
    from difyops.steplog import StepLog

CONFIG = Path("etc/model.json")
#: Tokens of context unless model.context says otherwise: a processor reads a longer prompt for
#: minutes, in which Dify gives up.
USUAL_CONTEXT = 4096


def declare(deployment: Deployment) -> Service:
    spec = local_spec(deployment)
    if spec is None:
        return Service(
            "model", address=llm_url(deployment), ready=ready_elsewhere, ready_seconds=20
        )
    # Embeddings without a chat model of ours are llamacpp's server without llama.cpp.
    wanted = deployment.settings.model.backend
    backend = backends.build("llamacpp" if wanted == "external" else wanted, spec)
    content = next(iter(backend.files.values())).reveal()
    return Service(
        "model",
        port=deployment.settings.model.port,
        address=backend.base_url,
        process=Process(
            argv=backend.command,
            cwd=deployment.paths.root,
            env={
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "HOME": str(deployment.paths.data / "home"),
            },
            in_vain=(EXIT_USAGE, EXIT_CANNOT_START),
            inputs=digest(
                deployment.facts.server
                + str(deployment.settings.model.source)
                + "".join(file.sha256 for file in _files(_cataloged(deployment)))
            ),
        ),
        files=(File(CONFIG, content, private=True, for_service=True),),
        ready=ready,
        ready_seconds=120,
        install=(Step("model files", files_done, fetch_files),),
    )


def local_spec(deployment: Deployment) -> Spec | None:
    """What is served here; None when both models are somebody else's."""
    settings = deployment.settings
    folder = models_folder(deployment)
    llm = embedding = None
    if settings.model.backend != "external":
        llm = _llm_spec(deployment)
    if settings.embedding and settings.embedding.url is None:
        name = settings.embedding.name
        about = catalog.get_embedding(name)
        embedding = EmbeddingSpec(
            id=name,
            model=folder / name / about.weights.file,
            tokenizer=folder / name / about.tokenizer.file,
            max_tokens=about.max_tokens,
        )
    if llm is None and embedding is None:
        return None
    return Spec(
        llm=llm,
        embedding=embedding,
        api_key=deployment.secrets["MODEL_API_KEY"],
        port=settings.model.port,
        config=deployment.paths.root / CONFIG,
        python=deployment.facts.python,
    )


def _llm_spec(deployment: Deployment) -> LlmSpec:
    wanted = deployment.settings.model
    if wanted.source is not None:
        # What the model can, only the engine will know, once it has read it.
        return LlmSpec(wanted.name, source_link(deployment), wanted.context, wanted.slots)
    entry = catalog.get_llm(wanted.name)
    context = wanted.context or min(entry.trained_context, USUAL_CONTEXT)
    if context > entry.trained_context:
        raise UsageError(
            f"difyops.yaml: model.context: {context} is more than {wanted.name} was trained for "
            f"({entry.trained_context})",
            f"set model.context to {entry.trained_context} or less",
        )
    path = models_folder(deployment) / wanted.name / entry.weights.file
    return LlmSpec(
        wanted.name, path, context, wanted.slots, tools=entry.tools, sampling=entry.sampling
    )


def source_link(deployment: Deployment) -> Path:
    """Where `model.source` is found: a link that the install step makes, one per source."""
    return models_folder(deployment) / f"source-{digest(str(deployment.settings.model.source))}"


def models_folder(deployment: Deployment) -> Path:
    return deployment.paths.opt / "models"


def llm_url(deployment: Deployment) -> str:
    """The base URL of the chat model, ending in /v1."""
    settings = deployment.settings.model
    return settings.url or f"http://127.0.0.1:{settings.port}/v1"


def llm_key(deployment: Deployment) -> Secret | None:
    if deployment.settings.model.backend == "external":
        return deployment.secrets.get("EXTERNAL_MODEL_API_KEY")
    return deployment.secrets["MODEL_API_KEY"]


def embedding_url(deployment: Deployment) -> str | None:
    """The base URL of the embedding model; None without one."""
    settings = deployment.settings
    if settings.embedding is None:
        return None
    return settings.embedding.url or f"http://127.0.0.1:{settings.model.port}/v1"


def embedding_key(deployment: Deployment) -> Secret | None:
    """The key of the embedding model. Elsewhere that is EXTERNAL_EMBEDDING_API_KEY: the chat
    model's key goes only to the server it was given for."""
    embedding, chat = deployment.settings.embedding, deployment.settings.model
    if embedding is None or embedding.url is None:
        return deployment.secrets["MODEL_API_KEY"]
    own = deployment.secrets.get("EXTERNAL_EMBEDDING_API_KEY")
    if own is None and chat.url and urlsplit(chat.url)[:2] == urlsplit(embedding.url)[:2]:
        return deployment.secrets.get("EXTERNAL_MODEL_API_KEY")
    return own


def ready(deployment: Deployment) -> str:
    """Our server's `/health`, and an external chat model too where the two are mixed."""
    import requests

    port = deployment.settings.model.port
    try:
        answer = loopback.get(f"http://127.0.0.1:{port}/health")
    except requests.RequestException:
        raise NotReady("waiting for it to listen") from None
    if answer.status_code != 200:
        raise NotReady("loading")
    if deployment.settings.model.backend == "external":
        return ready_elsewhere(deployment)
    names = [deployment.settings.model.name]
    if deployment.settings.embedding and deployment.settings.embedding.url is None:
        names.append(deployment.settings.embedding.name)
    return f"{', '.join(names)}, port {port}"


def ready_elsewhere(deployment: Deployment) -> str:
    """The server that somebody else runs answers, and has the model of that name."""
    from difyops.backends import probe

    name = deployment.settings.model.name
    try:
        found = probe.describe(llm_url(deployment), llm_key(deployment), timeout=5)
    except DifyopsError as error:
        raise NotReady(error.message) from None
    if name not in [model.id for model in found]:
        raise UsageError(
            f"difyops.yaml: model.name: {llm_url(deployment)} has no model {name!r}",
            f"it has: {', '.join(model.id for model in found) or 'none'}",
        )
    return f"{name} at {llm_url(deployment)}"


def _cataloged(deployment: Deployment) -> list[str]:
    """The models that are served here from the catalog."""
    spec = local_spec(deployment)
    names = [spec.embedding.id] if spec and spec.embedding else []
    if spec and spec.llm and deployment.settings.model.source is None:
        names.insert(0, spec.llm.id)
    return names


def _files(names: list[str]) -> list[catalog.ModelFile]:
    return [file for name in names for file in catalog.get(name).files().values()]


def files_done(deployment: Deployment) -> str | None:
    names = _cataloged(deployment)
    if deployment.settings.model.source and not _source_is_good(deployment):
        return None
    if all(modelsource.has_model(name, models_folder(deployment)) for name in names):
        return _told(deployment, names)
    return None


def fetch_files(deployment: Deployment, log: StepLog) -> str:
    folder = models_folder(deployment)
    names = _cataloged(deployment)
    for name in names:
        index = deployment.settings.mirrors.pypi
        modelsource.fetch_model(name, folder, index_url=index, log=log.path, tell=log.detail)
        _let_read(folder / name)
    if deployment.settings.model.source:
        _link_source(deployment, log)
    if folder.is_dir():
        folder.chmod(0o755)
    return _told(deployment, names)


def _source_is_good(deployment: Deployment) -> bool:
    """Whether what `model.source` links to is there and looks like a model still."""
    link = source_link(deployment)
    try:
        if link.exists():
            _look(deployment, link.readlink())
            return True
    except (DifyopsError, OSError):
        pass  # the step is done again, and says why
    return False


def _look(deployment: Deployment, found: Path) -> None:
    # Imported here: it brings the engine's readers.
    from difyops.engine import headers

    wanted = deployment.settings.model
    try:
        headers.look(found, wanted.name, wanted.context)
    except DifyopsError as error:
        hint = f"{error.hint}; " if error.hint else ""
        raise type(error)(
            f"difyops.yaml: model.source: {error.message}", f"{hint}nothing was stopped"
        ) from error


def _let_read(folder: Path) -> None:
    """Let the service's user read what we fetched, whatever our umask."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)


def _link_source(deployment: Deployment, log: StepLog) -> None:
    """Find `model.source`, downloading it if need be, and link to it.

    Raises UsageError when it means nothing, PrerequisiteError when it cannot be had, or not be
    read by the service's user.
    """
    # Imported here: it brings the engine's reader of model folders.
    from difyops.engine import sources

    source, link = str(deployment.settings.model.source), source_link(deployment)
    base = deployment.paths.root / Path(source).expanduser()  # as the service sees it
    found = sources.resolve(str(base) if base.exists() else source, link.parent, log.detail)
    if found.is_relative_to(link.parent):
        _let_read(link.parent / found.relative_to(link.parent).parts[0])
    _check_readable(deployment, found)
    _look(deployment, found)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(found.absolute())


def _check_readable(deployment: Deployment, found: Path) -> None:
    user = deployment.user if deployment.facts.python_reachable else None
    inside = [p for p in found.glob("*") if p.is_file()] if found.is_dir() else []
    for path in (found, *inside):
        if not identity.can(user, "r", path):
            who = user.name if user else "this user"
            raise PrerequisiteError(
                f"difyops.yaml: model.source: {who} cannot read {path}",
                "put it where others can enter (such as /srv), with chmod -R a+rX",
            )


def _told(deployment: Deployment, names: list[str]) -> str:
    size = sum(file.bytes for file in _files(names))
    parts = [f"{', '.join(names)}: {size / 1e6:.0f} MB, verified"] if names else []
    if source := deployment.settings.model.source:
        parts.insert(0, f"{deployment.settings.model.name} from {source}, header read")
    return "; ".join(parts)
