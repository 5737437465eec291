"""`make bench`: how long a deployment takes, step by step, and what each process weighs.

Prints tables; asserts nothing. Without --dify it measures what there is without Dify.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.integration.conftest import Cli, end, make


def timed(call: Callable[[], object], runs: int) -> float:
    """The median of several runs, in seconds."""
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def row(name: str, value: str) -> None:
    print(f"{name:<44} {value:>12}")


def importing() -> None:
    subprocess.run([sys.executable, "-c", "import difyops.cli"], check=True)


def bare() -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def start_up(cli: Cli) -> None:
    row("python -c pass (the floor)", f"{timed(bare, 9) * 1000:.0f} ms")
    row("import difyops.cli", f"{timed(importing, 9) * 1000:.0f} ms")
    row("difyops --help", f"{timed(lambda: cli('--help'), 9) * 1000:.0f} ms")


def checked(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if result.returncode:
        sys.exit(f"{' '.join(result.args)}: {result.stderr}")
    return result


def first_up(cli: Cli, source: str | None) -> None:
    began = time.perf_counter()
    given = ("--dify", source) if source else ()
    result = checked(cli("up", "--source", *given, timeout=1800))
    print(f"\nfirst up: {time.perf_counter() - began:.1f} s")
    for line in result.stderr.splitlines():
        step = re.match(r"\s+✓ (.+?)\s{2,}.*?([\d.]+) s$", line)
        if step:
            row(f"  {step[1]}", f"{float(step[2]):.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dify", help="as for `difyops up --dify`")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="difyops-bench-"))
    folder.chmod(0o755)
    cli = make(folder / "d", {"dify": {"enabled": bool(arguments.dify)}})
    print(f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} processors")
    try:
        start_up(cli)
        first_up(cli, arguments.dify)
        print()
        row("no-op up", f"{timed(lambda: checked(cli('up', '--source')), arguments.runs):.1f} s")
        row("doctor", f"{timed(lambda: checked(cli('doctor')), arguments.runs):.1f} s")
        row("status", f"{timed(lambda: checked(cli('status')), arguments.runs) * 1000:.0f} ms")
        print("\nmemory (proportional, children included)")
        for state in json.loads(cli("status", "--json").stdout)["services"]:
            row(f"  {state['name']}", f"{state['memory'] / 2**20:.0f} MiB")
        print()
        row("down", f"{timed(lambda: checked(cli('down')), 1):.1f} s")
        row("up after down", f"{timed(lambda: checked(cli('up', '--source')), 1):.1f} s")
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
