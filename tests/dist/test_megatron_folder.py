"""Training on Megatron-LM's shards, which have no manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, run_file, train


def test_run_on_shards_without_a_manifest_gives_the_same_numbers(
    shards: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "megatron"
    folder.mkdir()
    for path in sorted(Path(shards["train"]).glob("shard_*")):
        number = path.stem.removeprefix("shard_")
        shutil.copy(path, folder / f"corpus_{number}_text_document{path.suffix}")
    runs = []
    for name, source in (("ours", shards["train"]), ("theirs", str(folder))):
        data = {"train": source, "valid": shards["valid"]}
        raw = run_file(data, tmp_path / name, training={"steps": 4})
        run_ranks(train, 1, raw)
        runs.append(curve(raw))
    assert len(runs[0]) == 4
    assert runs[0] == runs[1]
