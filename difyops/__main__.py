"""`python -m difyops` is the same as `difyops`."""

from difyops.cli import main

main()
