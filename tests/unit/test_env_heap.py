# covers: megalite/env.py
"""Heap settings of a process on a CPU, and its restart with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.env import heap_settings


def test_heap_settings_are_added_once_and_keep_those_of_the_user() -> None:
    settings = heap_settings({}, gpus=False)
    assert settings is not None
    assert "glibc.malloc.tcache_count=0:" in settings
    assert heap_settings({"GLIBC_TUNABLES": settings}, gpus=False) is None
    assert heap_settings({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, gpus=False) is None
    assert heap_settings({}, gpus=True) is None
    other = "glibc.pthread.rseq=0"
    assert heap_settings({"GLIBC_TUNABLES": other}, gpus=False) == f"{other}:{settings}"


SCRIPT = """
import os, sys
from megalite import env
print(os.getpid(), flush=True)
env.restart_with_heap()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.dev_mode)
"""


def lines(*arguments: str) -> list[str]:
    """Return the lines that a Python program prints without heap settings in its environment."""
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names or Path("/dev/nvidiactl").exists():
        pytest.skip("a process restarts only with glibc and without GPUs")
    environ = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    line = [sys.executable, "-X", "dev", *arguments]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_process_restarts_once_and_keeps_its_arguments_and_id(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    first, second, rest = lines(str(script), "a b", "--c")
    assert first == second
    assert rest == f"{heap_settings({}, gpus=False)} ['a b', '--c'] True"


def test_program_that_runs_a_launcher_is_not_restarted(tmp_path: Path) -> None:
    script, caller = tmp_path / "script.py", tmp_path / "caller.py"
    script.write_text(SCRIPT)
    caller.write_text(
        "import runpy, sys\n"
        f"sys.argv = [{str(script)!r}, *sys.argv[1:]]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    _, rest = lines(str(caller), "a b")
    assert rest == "None ['a b'] True"
