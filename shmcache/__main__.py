"""Entry point of the command `shmcache` and of `python -m shmcache`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without typer and rich say what to install and end with 2."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.stderr.write(f"shmcache: the package {error.name} wanted, none found: pip install 'shmcache[cli]'\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
