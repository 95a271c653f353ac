# covers: megalite/spawn.py megalite/engine/preload.py
"""Ranks of a function or a command on this host: results, failures, output and exit."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalite import env
from megalite.env import Launch
from megalite.spawn import RankError, run_command, run_ranks, start_ranks

PRELOAD = ("megalite.spawn",)


def describe(launch: Launch, word: str) -> tuple[Any, ...]:
    return launch.rank, launch.world_size, launch.local_rank, word, env.variable("SHADE")


def fail(launch: Launch) -> None:
    if launch.rank == 1:
        raise ValueError("a bug of rank 1")
    time.sleep(60)


def leave(launch: Launch, code: int) -> None:
    sys.stdout.write(f"rank {launch.rank} leaves\n")
    if launch.rank == 1:
        sys.exit(code)


def wait(_launch: Launch) -> None:
    time.sleep(60)


@pytest.mark.parametrize("preload", [(), PRELOAD])
def test_results_are_in_order_of_ranks(preload: tuple[str, ...]) -> None:
    results = run_ranks(describe, 3, "red", preload=preload, environment={"SHADE": "dark"})
    assert results == [(rank, 3, rank, "red", "dark") for rank in range(3)]


def test_exception_of_a_rank_ends_all_ranks_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1:\n.*ValueError: a bug of rank 1") as caught:
        run_ranks(fail, 2, preload=PRELOAD)
    assert caught.value.code is None
    assert time.monotonic() - start < 30


def test_exit_code_is_reported_with_the_last_lines_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 ended with exit code 3:\nrank 1 leaves") as caught:
        run_ranks(leave, 2, 3, preload=PRELOAD, logs=tmp_path)
    assert caught.value.code == 3
    assert (tmp_path / "rank_1.log").read_text() == "rank 1 leaves\n"


def test_exit_code_0_is_success_without_a_result() -> None:
    assert run_ranks(leave, 2, 0, preload=PRELOAD) == [None, None]


def test_ranks_that_exceed_the_timeout_are_killed() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] were not done after 1 s"):
        run_ranks(wait, 2, timeout=1, preload=PRELOAD)


def test_started_ranks_can_be_killed() -> None:
    (rank,) = start_ranks(wait, 1, preload=PRELOAD)
    assert rank.process.is_alive()
    rank.process.kill()
    rank.process.join()
    assert rank.process.exitcode == -9


def test_command_runs_once_per_environment(tmp_path: Path) -> None:
    program = "import os, pathlib; pathlib.Path(os.environ['RANK']).touch()"
    environments = [env.rank_environment(rank, 2, 1) for rank in range(2)]
    run_command([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {program}"],
                environments)  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_command_that_fails_on_a_rank_ends_the_others() -> None:
    program = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(5); time.sleep(60)"
    environments = [env.rank_environment(rank, 2, 1) for rank in range(2)]
    with pytest.raises(RankError, match=r"rank 1 of .* ended with exit code 5") as caught:
        run_command([sys.executable, "-c", program], environments, quiet=True)
    assert caught.value.code == 5


def test_command_that_exceeds_the_timeout_is_killed() -> None:
    with pytest.raises(RankError, match="was not done after 0 s"):
        run_command([sys.executable, "-c", "import time; time.sleep(60)"], [os.environ], timeout=0)
