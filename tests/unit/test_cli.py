# covers: megalite/cli.py megalite/errors.py
"""Exit codes and messages of commands, for every kind of end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalite import cli, env, errors


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of launchers, and turn an immediate exit into an exception."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(key, raising=False)


def leave(result: int | BaseException | None) -> int:
    def main() -> int | None:
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as left:
        cli.run_main(main)
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("result", "code"),
    [
        (None, 0),
        (0, 0),
        (1, 1),
        (errors.ConfigError(["first fault", "second fault"]), 2),
        (errors.DataError("x"), 2),
        (errors.CommandError("x"), 2),
        (errors.LaunchError("x"), 2),
        (errors.UserError("x"), 2),
        (errors.CheckpointError("x"), 1),
        (errors.EngineError("x"), 1),
        (errors.MegaLiteError("x"), 1),
        (errors.Stopped("x"), 75),
        (errors.Superseded("x"), 3),
        (KeyboardInterrupt(), 130),
        (SystemExit(2), 2),  # argparse
    ],
)
def test_exit_code_follows_the_result_or_the_exception(
    result: Any, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(result) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    if isinstance(result, errors.Stopped):  # a requested stop is not an error
        assert shown.err == "x\n"
    elif isinstance(result, errors.MegaLiteError):
        assert shown.err == "".join(f"error: {line}\n" for line in str(result).splitlines())


@pytest.mark.usefixtures("quiet")
def test_unexpected_exception_is_logged_with_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert leave(ZeroDivisionError("a bug")) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("ZeroDivisionError: a bug\n")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("name", "code"), [("torch", 2), ("torch.gone", 1), ("langdetect", 1), ("megalite.gone", 1)]
)
def test_missing_dependency_is_a_user_error_and_another_package_is_not(
    name: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(ModuleNotFoundError(f"No module named {name!r}", name=name)) == code
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == (code == 1)
    assert (f"{sys.executable}, has no package torch; install" in shown) == (code == 2)


@pytest.mark.parametrize("ranks", [False, True])
def test_process_writes_all_its_output_before_it_ends(tmp_path: Path, ranks: bool) -> None:
    """The same holds if the interpreter's teardown is omitted."""
    program = (
        "import atexit, sys\n"
        "from pathlib import Path\n"
        "from megalite import cli, errors, log\n"
        "def main():\n"
        "    log.logger.info('progress')\n"
        "    log.add_file(Path(sys.argv[1]))\n"
        "    sys.stdout.write('report')\n"
        "    atexit.register(sys.stdout.write, ' and teardown')\n"
        "    raise errors.Superseded('over')\n"
        f"cli.run_main(main, ranks={ranks})\n"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    command = [sys.executable, "-c", program, str(tmp_path / "log.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert done.returncode == 3
    assert done.stdout == ("report" if ranks else "report and teardown")
    assert done.stderr == "progress\nerror: over\n"
    assert (tmp_path / "log.txt").read_text().endswith(" ERROR over\n")


@pytest.mark.usefixtures("quiet")
def test_user_errors_and_stops_are_printed_by_rank_0_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    launch = env.Launch(3, 4, 3, 4, "h", 1, "torchrun")
    monkeypatch.setattr(env, "find_launch", lambda: launch)
    assert leave(errors.ConfigError("raised by all ranks")) == 2
    assert waits == [10.0]
    assert capsys.readouterr().err == ""
    assert leave(errors.CheckpointError("raised by one rank")) == 1
    assert waits == [10.0]
    assert capsys.readouterr().err == "[rank 3] error: raised by one rank\n"
    assert leave(errors.Stopped("raised by all ranks")) == 75
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("quiet")
def test_incomplete_launch_is_reported_by_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")

    def main() -> int:
        env.find_launch()
        return 0

    with pytest.raises(SystemExit) as left:
        cli.run_main(main)
    assert left.value.code == 2
    assert "the launch is incomplete" in capsys.readouterr().err
