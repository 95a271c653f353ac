# covers: data_prep/__main__.py
"""`python -m data_prep` as a process: exit codes, output streams, and the duration of --help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_prep", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_commands_work_from_a_corpus_to_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text {number}, and more of it\n" * 30)
    files = [str(tmp_path / f"{number}.txt") for number in range(4)]
    tok, out = str(tmp_path / "tok"), str(tmp_path / "out")
    train = ["train-tokenizer", "--input", *files[:2], "--input", *files[2:], "--output", tok]
    assert main([*train, "--vocab-size", "280"]) == 0
    encode = ["tokenize", "--input", str(tmp_path / "*.txt"), "--tokenizer", tok, "--output", out]
    assert main(encode) == 0
    assert main(["verify", out]) == 0
    capsys.readouterr()
    assert main(["inspect", out, "--document", "2"]) == 0
    assert capsys.readouterr().out == "text 2, and more of it\n" * 30 + "\n"


def test_help_has_examples_and_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["train-tokenizer"], ["tokenize"], ["verify"], ["inspect"]):
        with pytest.raises(SystemExit) as left:
            main([*command, "--help"])
        assert left.value.code == 0
        assert f"megalite data {(command or ['tokenize'])[0]} " in capsys.readouterr().out
    program = (
        "import sys, data_prep.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'datasets', 'sentencepiece', 'pydantic'}\n"
        "sys.exit(f'{heavy & sys.modules.keys()}' if heavy & sys.modules.keys() else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_errors_are_one_line_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "cut')
    out = tmp_path / "out"
    done = run("tokenize", "--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--output", out)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'a.jsonl'} line 2: not valid JSON")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_verify_exits_with_1_for_a_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    out = tmp_path / "out"
    assert main(["tokenize", "--input", f"{tmp_path}/a.txt", "--tokenizer", "bytes",
                 "--output", str(out)]) == 0  # fmt: skip
    (out / "shard_00000.idx").write_bytes(b"MMIDIDX")
    done = run("verify", out)
    assert done.returncode == 1
    assert "shard_00000.idx: got 7 bytes, but the header alone has 34" in done.stdout
    assert "Traceback" not in done.stderr
    assert run("verify", tmp_path / "none").returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tokenise"],
        ["tokenize", "--input", "a"],
        ["verify"],
        ["inspect", "x", "--document", "-1"],
        ["tokenize", "--input", "a", "--tokenizer", "bytes", "--output", "b", "--workers", "0"],
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
