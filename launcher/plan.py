"""`megalite plan` as a file, for launchers that start files."""

from __future__ import annotations

from megalite.commands import run_program

if __name__ == "__main__":
    run_program("plan")
