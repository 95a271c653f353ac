# covers: megalite/commands/completion.py megalite/__main__.py
"""The `megalite` command: names, ranks, help, completion, and exit codes of the ranks."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megalite import __version__, commands, env, spawn
from megalite.cli import run_parser
from megalite.commands import generate
from megalite.commands.completion import completion

ROOT = Path(__file__).resolve().parents[2]


def megalite(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megalite", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("name", commands.PROGRAMS)
def test_launcher_of_a_command_is_thin(name: str) -> None:
    text = (ROOT / "launcher" / f"{name}.py").read_text()
    assert f'run_program("{name}")' in text
    assert text.count("\n") < 10


def test_every_launcher_is_a_sub_command() -> None:
    launchers = {path.stem for path in (ROOT / "launcher").glob("[a-z]*.py")}
    assert set(commands.PROGRAMS) == launchers - {"smoke"}


@pytest.mark.parametrize("name", ["", *commands.PROGRAMS, "data"])
def test_help_loads_no_torch(name: str) -> None:
    absent = {"torch"} if name else {"torch", "pydantic"}
    program = (
        f"import sys; from megalite import commands; sys.argv = ['megalite', *{name.split()}, '-h']"
        "\ntry: commands.main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"assert not {absent} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: megalite {name}")


def test_version_is_printed() -> None:
    assert megalite("--version").stdout == f"megalite {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], 'pretrian: no such command; did you mean "pretrain"?'),
        (["completion", "tcsh"], "completion: got 'tcsh'; give one of bash, zsh, fish"),
        (
            ["pretrain", "a.json", "--ranks", "x"],
            "--ranks: expected a number of processes, 1 or more",
        ),
        (["pretrain", "a.json", "--ranks=0"], "--ranks: expected a number of processes, 1 or more"),
        (["pretrain", "a.json", "--ranks=2", "--dry-run"], "one process; use --dry-run 2"),
        (["data", "tokenise"], "got 'tokenise'; did you mean \"tokenize\"?"),
        (["pretrain", "missing.json"], "missing.json: no such run file"),
    ],
)
def test_wrong_command_line_exits_with_2_and_a_remedy(arguments: list[str], message: str) -> None:
    done = megalite(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_command_without_arguments_prints_the_help_and_exits_with_2() -> None:
    done = megalite()
    assert (done.returncode, done.stdout) == (2, commands.help_text())


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "the launch is incomplete"),
        (spawn.env.rank_environment(0, 4, 29500), "--ranks 2: torchrun has started this rank of 4"),
    ],
)
def test_ranks_option_under_a_launcher_is_refused(environ: dict[str, str], message: str) -> None:
    done = megalite("pretrain", "a.json", "--ranks", "2", **environ)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr


def test_launcher_starts_no_ranks() -> None:
    command = [sys.executable, "launcher/pretrain.py", "mine.json", "--ranks", "2"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)
    assert done.returncode == 2
    assert "only the command megalite starts ranks; use it, or torchrun" in done.stderr


def test_ranks_start_with_the_script_of_the_command(tmp_path: Path) -> None:
    """The option `-m` instead would import modules of the working directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "logging.py").write_text("raise SystemExit('the wrong module')")
    script = tmp_path / "megalite"  # the script that `pip install` puts on the PATH
    script.write_text("from megalite.commands import main\nmain()\n")
    command = [sys.executable, str(script), "pretrain", "missing.json", "--ranks", "2"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "cwd": tmp_path / "here", "env": environ}
    done = subprocess.run(command, **options)
    assert done.returncode == 2
    assert "missing.json: no such run file" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mine.json", "--config mine.json"),
        ("--set a=1 mine.json", "--set a=1 --config mine.json"),
        ("--se a=1 mine.json --dry-run", "--se a=1 --config mine.json --dry-run"),
        ("--dry-run mine.json", "--dry-run --config mine.json"),
        ("--dry-run 4 mine.json", "--dry-run 4 --config mine.json"),
        ("--set=a=1 --config mine.json", "--set=a=1 --config mine.json"),
        ("--resume --set a=1", "--resume --set a=1"),
        ("--set a=1", "--set a=1"),
    ],
)
def test_word_without_an_option_is_the_run_file(words: str, expected: str) -> None:
    parser = run_parser("a command", "")
    assert parser._name_first(words.split()) == expected.split()


def test_option_with_several_values_keeps_all_of_them() -> None:
    arguments = generate.make_parser().parse_args(["--prompt", "a", "b", "--seed", "1", "runs/x"])
    assert (arguments.prompt, arguments.checkpoint) == (["a", "b"], "runs/x")


def test_first_argument_of_plan_is_the_run_file() -> None:
    done = megalite("plan", "configs/7b.json", "--json")
    assert done.returncode == 0, done.stderr
    assert '"parameters": 6738415616' in done.stdout


def test_rank_option_of_the_deepspeed_launcher_is_skipped() -> None:
    done = megalite("--local_rank=0", "plan", "configs/7b.json", "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_lists_commands_and_their_options(shell: str) -> None:
    script = completion([shell])
    for word in ("tokenize", "max-new-tokens", "gpus-per-node", "ranks", "configs/7b.json"):
        assert word in script


def completed(*words: str, folder: Path) -> list[str]:
    """Return the completions that bash offers for the last word."""
    (folder / ".script").write_text(completion(["bash"]))
    program = (
        f". {folder}/.script; COMP_WORDS=({' '.join(map(shlex.quote, words))});"
        f"COMP_CWORD={len(words) - 1}; _megalite; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_bash_completes_commands_options_values_and_run_files(tmp_path: Path) -> None:
    for name in ("mine.json", "my own.yaml", "mine.txt", "configs"):
        (tmp_path / name).touch()
    (tmp_path / "models").mkdir()
    offers = partial(completed, "megalite", folder=tmp_path)
    assert offers("pl") == ["plan"]
    assert offers("plan", "--gpus") == ["--gpus-per-node"]
    assert offers("plan", "m") == ["mine.json", "models", "my own.yaml"]
    assert offers("plan", "configs/7b") == ["configs/7b.json"]
    assert offers("eval", "m") == ["mine.json", "mine.txt", "models", "my own.yaml"]
    assert offers("export", "--dtype", "b") == ["bfloat16"]
    assert offers("pretrain", "--resume", "n") == ["never"]
    assert offers("data", "tok") == ["tokenize"]
    assert offers("completion", "f") == ["fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_valid_in_its_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(completion([shell]))
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("listed", "count"),
    [
        *((None, 3), ("0,2", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("MIG-a, MIG-b", 2)),
        *(("0,1,3", 2), ("GPU-a", 1), ("nothing", 0)),
    ],
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
        ("os.kill(os.getpid(), 15)", 1),
        ("sys.exit(1) if rank else (time.sleep(1), sys.exit(75))", 75),
    ],
)
def test_ranks_end_with_one_exit_code(program: str, code: int) -> None:
    source = f"import os, sys, time; rank = int(os.environ['RANK']); {program}"
    started = time.monotonic()
    assert spawn.supervise([sys.executable, "-c", source], 2) == code
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("handler", "code"), [("lambda *_: sys.exit(75)", 75), ("0", 143)])
def test_signal_is_passed_on_to_every_rank(tmp_path: Path, handler: str, code: int) -> None:
    """A rank without a handler is killed by SIGTERM, and the exit code is 143."""
    source = (
        "import os, pathlib, signal, sys, time\n"
        f"mine = pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']\n"
        f"signal.signal(signal.SIGTERM, {handler})\n"
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
    assert parent.wait(timeout=30) == code
