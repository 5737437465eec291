"""Processes through supervisord: started in order with readiness, surviving the CLI, reaped.

supervisord owns the processes; difyops talks to it over its unix socket (XML-RPC) and finds what
an abruptly killed one may have left behind by the marker in each process's environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difyops import identity, logs, releases
from difyops.core import Deployment, NotReady, Paths, Plan, Progress, Service
from difyops.errors import DifyopsError, PrerequisiteError, StepError
from difyops.files import tail
from difyops.plan import MARKER, socket_path, starts_file
from difyops.secrets import Secrets
from difyops.settings import Settings

if TYPE_CHECKING:
    import psutil

#: A service that was launched this often without getting ready is not going to.
LAUNCHES = 4


@dataclass(frozen=True)
class State:
    """One service as it stands. Times in seconds, memory in bytes (children included)."""

    name: str
    state: str  # running, starting, backoff, stopping, stopped, exited, fatal, external
    pid: int | None = None
    uptime: float | None = None
    memory: int | None = None
    restarts: int | None = None
    port: int | None = None


class Supervisor:
    """The supervisord of one deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.socket = socket_path(deployment)
        #: Where logs ended when a service was launched: what is behind is of no run before it.
        self._marks: dict[str, tuple[int, int]] = {}

    # --- supervisord itself -----------------------------------------------------------------------

    def _call(self, method: str, *arguments: object) -> Any:
        from xmlrpc.client import ServerProxy

        from supervisor.xmlrpc import SupervisorTransport

        with contextlib.closing(SupervisorTransport(None, None, f"unix://{self.socket}")) as way:
            server = ServerProxy("http://127.0.0.1", transport=way)
            return getattr(server.supervisor, method)(*arguments)

    def running(self) -> bool:
        """Whether supervisord answers."""
        if not self.socket.exists():
            return False
        try:
            return bool(self._call("getState")["statename"] == "RUNNING")
        except (OSError, ConnectionError, ValueError):
            return False
        except Exception as error:  # xmlrpc has several kinds of "somebody else answered"
            if type(error).__module__.startswith(("xmlrpc", "http")):
                return False
            raise

    def start(self) -> bool:
        """Start supervisord if it does not run, after ending what a killed one left. -> started."""
        if self.running():
            return False
        self.reap()
        self._make_socket_folder()
        self.socket.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c",
             str(self.deployment.paths.etc / "supervisord.conf")],
            cwd=self.deployment.paths.root,
            # The marker, so that one whose socket was lost is found and ended, too.
            env={**_clean_environment(), MARKER: str(self.deployment.paths.root)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        log = self.deployment.paths.logs / "supervisord.log"
        if done.returncode:
            raise StepError(
                f"supervisord did not start: {(done.stderr or done.stdout).strip()}",
                log=log, tail=tail(log),
            )  # fmt: skip
        deadline = time.monotonic() + 15
        while not self.running():
            if time.monotonic() > deadline:
                raise StepError("supervisord does not answer", log=log, tail=tail(log))
            time.sleep(0.05)
        return True

    def _make_socket_folder(self) -> None:
        folder = self.socket.parent
        if folder == self.deployment.paths.run:
            return
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
        if info.st_uid != os.geteuid() or info.st_mode & 0o077 or folder.is_symlink():
            raise PrerequisiteError(f"{folder} belongs to somebody else", "use a shorter path")

    def shutdown(self) -> None:
        """End supervisord (its services are stopped already) and wait until it is gone."""
        try:
            pid = int(self._call("getPID"))
            self._call("shutdown")
        except OSError:
            return
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            _after(30, [psutil.Process(pid)])

    def reap(self) -> list[str]:
        """End processes of this deployment that no supervisord owns. -> what was ended."""
        import psutil

        left = self.strays()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                # INT is Postgres' fast shutdown; the others end on TERM.
                postgres = process.name() == "postgres"
                process.send_signal(signal.SIGINT if postgres else signal.SIGTERM)
                process.send_signal(signal.SIGCONT)  # a stopped one would not hear it
        for process in _after(20, left):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _after(5, left)
        return sorted(f"{p.pid}" for p in left)

    def strays(self) -> list[psutil.Process]:
        """Processes of this deployment, whoever started them."""
        import psutil

        me = os.getpid()
        return [p for p in psutil.process_iter() if p.pid != me and self._marked(p)]

    def _marked(self, process: psutil.Process) -> bool:
        import psutil

        try:
            return process.environ().get(MARKER) == str(self.deployment.paths.root)
        except (psutil.Error, OSError):
            return False

    def owns(self, pid: int) -> bool:
        """Whether a process, or one that started it, is of this deployment."""
        import psutil

        try:
            process = psutil.Process(pid)
            return any(self._marked(p) for p in (process, *process.parents()))
        except psutil.Error:
            return False

    # --- services ---------------------------------------------------------------------------------

    def sync(self) -> list[str]:
        """Take over etc/supervisord.conf; what changed or went is stopped. -> what was stopped."""
        added, changed, removed = self._call("reloadConfig")[0]
        for name in (*changed, *removed):
            self._call("stopProcessGroup", name)
            self._call("removeProcessGroup", name)
        for name in (*added, *changed):
            self._call("addProcessGroup", name)
        return [*changed, *removed]

    def info(self, name: str) -> dict[str, Any]:
        return dict(self._call("getProcessInfo", name))

    def launch(self, name: str) -> bool:
        """Start a process if it is not running; its start count begins anew. -> started."""
        if self.info(name)["statename"] in ("RUNNING", "STARTING"):
            return False
        starts_file(self.deployment, name).unlink(missing_ok=True)
        self._mark(name)
        with contextlib.suppress(_fault()):  # it began or failed meanwhile: the state tells
            self._call("startProcess", name, False)
        return True

    def stop(self, name: str, *, wait: bool = True) -> None:
        """Stop a process, and wait for its end unless told not to."""
        state = self.info(name)["statename"]
        if state not in ("STOPPED", "EXITED", "FATAL", "STOPPING"):
            with contextlib.suppress(_fault()):
                self._call("stopProcess", name, wait)
        while wait and self.info(name)["statename"] == "STOPPING":
            time.sleep(0.05)

    def await_ready(self, service: Service, progress: Progress) -> str:
        """Wait until a service's probe is content. -> the probe's detail.

        Raises StepError with the last lines of its log.
        """
        began = time.monotonic()
        before = max(0, self._launches(service.name) - 1)  # crashes of another day do not count
        if service.name not in self._marks:
            self._mark(service.name)
        while True:
            try:
                return service.ready(self.deployment) if service.ready else ""
            except NotReady as reason:
                waited = time.monotonic() - began
                self._give_up_if_hopeless(service, str(reason), waited, before)
                progress.detail(service.name, f"{reason}, {waited:.0f} s")
            time.sleep(0.1 if waited < 2 else 0.4)

    def _launches(self, name: str) -> int:
        return len(tail(starts_file(self.deployment, name), 10_000))

    def _give_up_if_hopeless(
        self, service: Service, reason: str, waited: float, before: int
    ) -> None:
        log, said = self._logs(service.name)[0], self._said(service.name)
        problem = None
        if service.process:
            launches = self._launches(service.name) - before
            if self._ended_with(service.name, service.process.in_vain):
                problem = f"{service.name} cannot start: {logs.last_error(said) or 'see its log'}"
            elif self.info(service.name)["statename"] == "FATAL" or launches >= LAUNCHES:
                problem = f"{service.name} ended {max(launches, 1)} times at its start"
            if problem:
                self.stop(service.name)
        if problem is None and waited > service.ready_seconds:
            problem = f"{service.name} is not ready after {waited:.0f} s: {reason}"
        if problem:
            if service.process is None:
                raise StepError(
                    problem, f"is it up, and is {service.address} in difyops.yaml its address?"
                )
            raise StepError(problem, log=log, tail=said[-12:])

    def _logs(self, name: str) -> tuple[Path, Path]:
        """The log of a service, and that of supervisord."""
        folder = self.deployment.paths.logs
        return folder / f"{name}.log", folder / "supervisord.log"

    def _mark(self, name: str) -> None:
        own, supervisord = (logs.size(log) for log in self._logs(name))
        self._marks[name] = own, supervisord

    def _said(self, name: str) -> tuple[str, ...]:
        """The last lines of a service's log, none of a run before the launch."""
        return logs.since(self._logs(name)[0], self._marks[name][0])

    def _ended_with(self, name: str, codes: Iterable[int]) -> bool:
        """Whether the service has ended with one of these exit codes since its launch.

        supervisord forgets the code of a process that ends early; only its log has it.
        """
        lines = logs.since(self._logs(name)[1], self._marks[name][1])
        ends = [f"exited: {name} (exit status {code};" for code in codes]
        return any(end in line for line in lines for end in ends)

    def states(self, plan: Plan) -> list[State]:
        """Every service of the plan as it stands."""
        if not self.running():
            infos = {}
        else:
            infos = {info["name"]: info for info in self._call("getAllProcessInfo")}
        return [self._state(service, infos.get(service.name)) for service in plan.services]

    def _state(self, service: Service, info: dict[str, Any] | None) -> State:
        if service.process is None:
            return State(service.name, "external", port=service.port)
        if info is None:
            return State(service.name, "stopped", port=service.port)
        state = str(info["statename"]).lower()
        if state not in ("running", "starting", "stopping"):
            return State(service.name, state, port=service.port)
        if state == "starting" and self._ready(service):
            state = "running"  # supervisord says so only seconds later, when it did not crash
        launches = self._launches(service.name)
        return State(
            service.name,
            state,
            pid=int(info["pid"]),
            uptime=float(info["now"] - info["start"]),
            memory=_memory(int(info["pid"])),
            restarts=max(0, launches - 1),
            port=service.port,
        )

    def _ready(self, service: Service) -> bool:
        try:
            return service.ready is None or bool(service.ready(self.deployment))
        except (NotReady, DifyopsError):
            return False


def make_folders(deployment: Deployment) -> None:
    """The folders services write to, given to their user; the ones above stay enterable."""
    paths, user = deployment.paths, deployment.user
    for folder in (paths.etc, paths.opt, paths.data, paths.logs, paths.step_logs):
        folder.mkdir(parents=True, exist_ok=True)
        if user:
            folder.chmod(0o755)  # a strict umask must not lock the service's user out
    for name in ("valkey", "storage", "home", "tmp"):
        identity.hand_over(paths.data / name, user)
    identity.hand_over(paths.data, user, 0o755)
    # Only we write here: the socket that commands supervisord is in it.
    paths.run.mkdir(parents=True, exist_ok=True)
    paths.run.chmod(0o711 if user else 0o700)


def stop_all(deployment: Deployment, plan: Plan, progress: Progress) -> None:
    """Stop every service, last started first, then supervisord; nothing is left behind."""
    supervisor = Supervisor(deployment)
    if supervisor.running():
        known = {info["name"] for info in supervisor._call("getAllProcessInfo")}
        planned = {service.name for service in plan.services}
        stop(supervisor, sorted(known - planned), progress)
        stop_waves(supervisor, [s for s in plan.services if s.name in known], progress)
        supervisor.shutdown()
    elif not supervisor.strays():
        progress.note("nothing of this deployment is running")
    for pid in supervisor.reap():
        progress.note(f"ended a left-over process, pid {pid}")


def stop_unread(root: Path) -> None:
    """Stop what runs in a directory whose settings or secrets cannot be read: all at once."""
    paths = Paths(root)
    if not paths.run.exists():
        return
    nobody = Secrets({}, paths.secrets)
    release = releases.get(Settings().dify.version)
    supervisor = Supervisor(Deployment(paths, Settings(), nobody, release, None))
    supervisor.shutdown()
    supervisor.reap()


def stop(supervisor: Supervisor, names: Sequence[str], progress: Progress) -> None:
    """Stop services at the same time and wait for each to end."""
    began = time.monotonic()
    for name in names:
        supervisor.stop(name, wait=False)
    for name in names:
        progress.started(name)
        supervisor.stop(name)
        progress.finished(name, "stopped", time.monotonic() - began)


def stop_waves(supervisor: Supervisor, services: Iterable[Service], progress: Progress) -> None:
    """Stop services, each before what it needs: requests and tasks are finished, not cut off."""
    for wave in reversed(waves(services)):
        stop(supervisor, [service.name for service in reversed(wave)], progress)


def waves(services: Iterable[Service]) -> list[list[Service]]:
    """Services in the order of their needs: those of one wave can start at the same time.

    What a service needs and is not among `services` is taken to be up.
    """
    rest = list(services)
    result = []
    while rest:
        waiting = {service.name for service in rest}
        wave = [service for service in rest if not waiting.intersection(service.needs)]
        if not wave:
            raise ValueError(f"services need each other: {', '.join(sorted(waiting))}")
        result.append(wave)
        rest = [service for service in rest if service not in wave]
    return result


def _fault() -> type[Exception]:
    from xmlrpc.client import Fault

    return Fault


def _memory(pid: int) -> int | None:
    """Resident bytes of a process and its children, shared pages counted once by PSS if we may."""
    import psutil

    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(_resident(p) for p in family)
    except psutil.Error:
        return None


def _resident(process: psutil.Process) -> int:
    import psutil

    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _after(seconds: float, processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that have not ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while (alive := [p for p in processes if _alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _alive(process: psutil.Process) -> bool:
    """Not a zombie either: in a container, process 1 may never collect it."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _clean_environment() -> dict[str, str]:
    kept = ("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ}
