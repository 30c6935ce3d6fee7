"""The entry of `bulk-submit`, also as `python -m cli`. A setting that does not fit is named before anything else."""

from __future__ import annotations

import sys

from pydantic import ValidationError

from settings import settings


def main() -> None:
    """Run the command; exits with 2 where the environment is at fault."""
    try:
        settings()
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False, include_input=False):
            name = "_".join(str(part) for part in fault["loc"]).upper()
            print(f"BULK_SUBMIT_{name}: {fault['msg']}" if name else fault["msg"], file=sys.stderr)
        raise SystemExit(2) from None
    from cli.main import app

    app()


if __name__ == "__main__":
    main()
