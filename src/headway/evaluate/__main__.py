"""`python -m headway.evaluate …`: the harness's own command, which knows `--model headway`."""

from __future__ import annotations

import sys

from headway.errors import HeadwayError
from headway.evaluate import register


def main() -> None:
    """Passes all arguments on to the harness; errors made on purpose print one line and exit with 1."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except HeadwayError as error:
        sys.stderr.write(f"headway: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
