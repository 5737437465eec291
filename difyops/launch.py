"""The exec wrapper that supervisord starts for each service: `python -I -m difyops.launch …`.

It notes the start, reads the service's env file, gives up root, asks the kernel to end the process
when supervisord dies (so that none is orphaned), and becomes the service: same pid, no parent in
between. Secrets reach the service through its 0600 env file and never stand in an argument list.
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

from dotenv import dotenv_values

PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="difyops.launch")
    parser.add_argument("--env", type=Path, required=True)
    parser.add_argument("--starts", type=Path, required=True)
    parser.add_argument("--user")
    parser.add_argument("--death-signal", default="TERM")
    parser.add_argument("argv", nargs="+")
    args = parser.parse_args()
    parent = os.getppid()
    environment = {
        k: v for k, v in dotenv_values(args.env, interpolate=False).items() if v is not None
    }
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
        sys.exit("supervisord is gone")
    os.umask(0o077)
    os.execvpe(args.argv[0], args.argv, environment)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main()
