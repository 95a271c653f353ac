"""`python -m megalite` is the `megalite` command."""

from __future__ import annotations

from megalite.commands import main

if __name__ == "__main__":
    main()
