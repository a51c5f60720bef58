"""`python -m fluidsched` is the command line."""

from fluidsched.cli import main

main()
