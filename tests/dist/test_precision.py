"""The ranks of a run agree on `precision: auto`, record the result, and keep it at a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalite.env import Launch
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train


def _train(launch: Launch, raw: dict[str, Any], units: list[str | None], steps: int) -> None:
    """Train with `units` as the bf16 units of each rank's processor."""
    from megalite.train import precision

    precision.bf16_units = lambda: units[launch.rank]
    raw["training"]["steps"] = steps
    train(launch, raw)


def _recorded(raw: dict[str, Any]) -> list[str]:
    """Return the precision in the run's config.json and in that of its newest checkpoint."""
    run = Path(raw["logging"]["directory"]) / raw["name"]
    newest = max((run / "checkpoints").glob("step_*"))
    files = (run / "config.json", newest / "config.json")
    return [json.loads(path.read_text())["training"]["precision"] for path in files]


def _bf16(raw: dict[str, Any]) -> bool:
    path = Path(raw["logging"]["directory"]) / raw["name"] / "deepspeed.json"
    return bool(json.loads(path.read_text())["bf16"]["enabled"])


def _auto(shards: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return run_file(shards, tmp_path, training={"precision": "auto", "eval_every": 0})


def test_precision_auto_is_fp32_if_one_rank_has_no_units(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = _auto(shards, tmp_path)
    run_ranks(_train, 2, raw, ["AMX", None], 2)
    assert (_recorded(raw), _bf16(raw)) == (["fp32", "fp32"], False)


def test_precision_auto_is_kept_at_a_resume_on_other_hardware(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = _auto(shards, tmp_path)
    run_ranks(_train, 2, raw, ["AVX512-BF16", "AVX512-BF16"], 2)
    assert (_recorded(raw), _bf16(raw)) == (["bf16", "bf16"], True)
    run_ranks(_train, 1, raw, [None], 3)  # another machine, without units
    assert (_recorded(raw), _bf16(raw)) == (["bf16", "bf16"], True)
    raw["training"]["precision"] = "fp32"
    run_ranks(_train, 1, raw, [None], 4)
    assert (_recorded(raw), _bf16(raw)) == (["fp32", "fp32"], False)
    changes = [row["changes"] for row in rows(raw, "event") if row["name"] == "resume"]
    assert "training.precision" not in changes[0]
    assert changes[1]["training.precision"] == {"before": "bf16", "after": "fp32"}


def test_precision_auto_of_a_checkpoint_of_the_first_version_is_fp32(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """MegaLite 0.1 recorded "auto", and trained in fp32 on all CPUs."""
    raw = _auto(shards, tmp_path)
    run_ranks(_train, 1, raw, [None], 2)
    run = tmp_path / raw["name"]
    for path in (run / "config.json", run / "checkpoints/step_00000002/config.json"):
        content = json.loads(path.read_text())
        content["training"]["precision"] = "auto"
        path.write_text(json.dumps(content))
    _reseal(run / "checkpoints/step_00000002")
    run_ranks(_train, 1, raw, ["AMX"], 3)
    assert (_recorded(raw), _bf16(raw)) == (["fp32", "fp32"], False)


def _reseal(folder: Path) -> None:
    """Write the manifest again after a file of the folder has changed."""
    from megalite import files
    from megalite.formats import checkpoint as disk

    manifest = disk.read_manifest(folder)
    path = folder / "config.json"
    entry = disk.FileEntry(bytes=path.stat().st_size, sha256=files.sha256_file(path))
    whole = manifest.model_copy(update={"files": {**manifest.files, "config.json": entry}})
    disk.write_manifest(folder, whole)
