# covers: megalite/commands.py megalite/__main__.py
"""The `megalite` command: names, ranks, help, completion, and the exit codes of its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite import __version__, commands, env, spawn

ROOT = Path(__file__).resolve().parents[2]


def megalite(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megalite", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_every_launcher_is_a_sub_command() -> None:
    launchers = {path.stem for path in (ROOT / "launcher").glob("[a-z]*.py")}
    assert set(commands.PROGRAMS) == launchers - {"smoke"} | {"data"}


def test_help_and_version_load_no_torch() -> None:
    program = (
        "import sys; from megalite import commands; sys.argv = ['megalite', '--help']\n"
        "try: commands.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'pydantic'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout
    assert megalite("--version").stdout == f"megalite {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], 'pretrian: no such command; did you mean "pretrain"?'),
        (["completion", "tcsh"], "completion: expected a shell, bash, zsh, fish; got 'tcsh'"),
        (
            ["pretrain", "a.json", "--ranks", "x"],
            "--ranks: expected a number of processes, 1 or more",
        ),
        (["pretrain", "a.json", "--ranks=0"], "--ranks: expected a number of processes, 1 or more"),
        (["pretrain", "missing.json"], "missing.json: no such run file"),
    ],
)
def test_wrong_command_line_ends_in_2_with_a_remedy(arguments: list[str], message: str) -> None:
    done = megalite(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_no_argument_prints_the_help_and_ends_in_2() -> None:
    done = megalite()
    assert (done.returncode, done.stdout) == (2, commands.help_text())


def test_usage_names_the_sub_command() -> None:
    assert megalite("plan", "--help").stdout.startswith("usage: megalite plan")


def test_first_argument_is_the_run_file() -> None:
    done = megalite("plan", "configs/7b.json", "--json")
    assert done.returncode == 0, done.stderr
    assert '"parameters": 6738415616' in done.stdout


def test_rank_option_of_the_deepspeed_launcher_is_skipped() -> None:
    done = megalite("--local_rank=0", "plan", "configs/7b.json", "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_lists_commands_and_their_options(shell: str) -> None:
    script = megalite("completion", shell).stdout
    for word in ("tokenize", "max-new-tokens", "gpus-per-node", "ranks"):
        assert word in script


def test_bash_completes_a_command_and_an_option(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(megalite("completion", "bash").stdout)
    program = (
        f". {tmp_path}/script; COMP_WORDS=(megalite pl); COMP_CWORD=1; _megalite;"
        "echo ${COMPREPLY[@]}; COMP_WORDS=(megalite plan --gpus); COMP_CWORD=2; _megalite;"
        "echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["plan", "--gpus-per-node"], done.stderr


@pytest.mark.parametrize(
    ("listed", "count"),
    [(None, 3), ("0,2", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("MIG-a, MIG-b", 2)],
)
def test_visible_gpus_are_counted_without_torch(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int
) -> None:
    monkeypatch.setattr(
        env.glob, "glob", lambda _: ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2"]
    )
    monkeypatch.setattr(env, "version", lambda _: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert env.visible_gpus() == count
    monkeypatch.setattr(env, "version", lambda _: "2.13.0+cpu")
    assert env.visible_gpus() == 0


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(2 if rank == 0 else time.sleep(60))", 2),
        ("sys.exit(3 if rank else 0)", 3),
        ("os.kill(os.getpid(), 9)", 1),
    ],
)
def test_ranks_end_with_the_code_of_the_first_that_fails(program: str, code: int) -> None:
    source = f"import os, sys, time; rank = int(os.environ['RANK']); {program}"
    started = time.monotonic()
    assert spawn.supervise([sys.executable, "-c", source], 2) == code
    assert time.monotonic() - started < 30


def test_signal_is_passed_on_to_every_rank(tmp_path: Path) -> None:
    source = (
        "import os, pathlib, signal, sys, time\n"
        f"mine = pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "mine.touch()\n"
        "time.sleep(60)\n"
    )
    program = (
        "import sys; from megalite import spawn\n"
        f"sys.exit(spawn.supervise([sys.executable, '-c', {source!r}], 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=30) == 75
