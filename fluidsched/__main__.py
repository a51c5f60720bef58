"""`python -m fluidsched`, and the `fluidsched` command: the command line.

The command line is imported inside `main`, so that Ctrl-C while it loads also ends with a sentence.
"""

import sys


def main() -> None:
    """Run the command line; an interrupt at any moment, also during imports, is exit status 130."""
    try:
        from fluidsched.cli import main as run

        run()
    except KeyboardInterrupt:
        print("fluidsched: interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
