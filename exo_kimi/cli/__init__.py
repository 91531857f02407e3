"""The command line: arguments in, one command called, one clear message out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from exo_kimi.errors import ExoKimiError, UsageError, machine_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words == ["--version"]:  # scripts ask it often, and typer takes longer to import than to answer
            print_version()
            return 0
        from exo_kimi.cli.app import run

        return run(words)
    except ExoKimiError as error:
        print(f"exo-kimi: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = machine_error(error)
        if known is None:
            raise
        print(f"exo-kimi: {known}", file=sys.stderr)
        return 1


def print_version() -> None:
    """Print the package's name and version."""
    import exo_kimi

    print(f"exo-kimi {exo_kimi.__version__}")
