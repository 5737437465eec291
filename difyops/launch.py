"""The exec wrapper around what difyops starts: `python -I -m difyops.launch … -- argv`.

It gives up root, asks the kernel to end the process when its parent dies (so that none is
orphaned), and becomes the program: same pid, nothing in between. For a service, whose parent is
supervisord, it also notes the start and reads the service's 0600 env file, so that no secret stands
in an argument list.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pwd
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="difyops.launch")
    parser.add_argument("--env", type=Path, help="instead of what was inherited")
    parser.add_argument("--starts", type=Path, help="a line is added to it")
    parser.add_argument("--user")
    parser.add_argument("--parent", type=int, help="the pid that started this, where it is known")
    parser.add_argument("--death-signal", default="TERM")
    parser.add_argument("argv", nargs="+")
    args = parser.parse_args()
    parent = args.parent or os.getppid()
    environment = _environment(args.env)
    if args.starts:
        with args.starts.open("a") as file:
            file.write(f"{time.time():.3f} {os.getpid()}\n")
    if args.user:
        account = pwd.getpwnam(args.user)
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
    # After setuid, which clears it; the check closes the gap before the call.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.Signals[f"SIG{args.death_signal}"].value)
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    if args.env:
        os.umask(0o077)
    try:
        os.execvpe(args.argv[0], args.argv, environment)  # noqa: S606 - no shell is the point
    except OSError as error:
        sys.exit(f"{args.argv[0]}: {error.strerror}")


def _environment(file: Path | None) -> dict[str, str]:
    if file is None:
        return dict(os.environ)
    # Imported here: a program of a step has no use for it.
    from dotenv import dotenv_values

    return {k: v for k, v in dotenv_values(file, interpolate=False).items() if v is not None}


if __name__ == "__main__":
    main()
