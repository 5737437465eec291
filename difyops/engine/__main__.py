"""`python -m difyops.engine --config FILE`: serve what the file names until told to stop.

Exit codes: 0 stopped by a signal, 1 the engine died in service, 2 a wrong configuration,
3 never became ready.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from difyops.engine.config import load
from difyops.errors import DifyopsError
from difyops.serving.process import log_error, log_to_stderr


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m difyops.engine", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="a JSON file of mode 0600")
    arguments = parser.parse_args()
    log_to_stderr()
    try:
        config = load(arguments.config)
        from difyops.engine.serve import serve

        return serve(config)
    except DifyopsError as error:
        log_error(logging.getLogger("difyops.engine"), error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
