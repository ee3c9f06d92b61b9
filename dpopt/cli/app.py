# SPDX-License-Identifier: Apache-2.0
"""The entry point of the command `dpopt`."""

import sys

EXIT_INPUT = 2


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from dpopt.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        print(
            f"dpopt: expected the packages of the command line; got no {error.name!r}; pip install 'dpopt[hf]'",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_INPUT) from error
    app(prog_name="dpopt")


if __name__ == "__main__":
    main()
