"""``python -m mpo_tn`` and the ``mpo-tn`` command: the command line, or one sentence if its packages are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from mpo_tn.app import cli

        cli.main()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mpo_tn"):
            raise
        sys.stderr.write(f"mpo-tn: {error.name} is not installed; this command needs: pip install 'mpo-tn[torch]'\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
