# covers: megalite/config/load.py megalite/config/secrets.py megalite/config/strict.py
# covers: megalite/config/model.py megalite/config/schema.py
"""Load, extend and set run files, and report the faults of invalid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import RunConfig, find_file, load_config, parse_config
from megalite.config.load import SHIPPED
from megalite.errors import ConfigError
from tests.helpers.runs import BASE, merge_sections

SMALL = merge_sections(
    BASE,
    {
        "name": "small",
        "data": {"train": [{"path": "data/train"}], "sequence_length": 32},
        "training": {"steps": 10, "precision": "auto"},
    },
)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def faults(path: Path, *sets: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, sets)
    return caught.value.faults


def test_defaults_are_filled_and_the_dump_loads_again(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "a.json", SMALL | {"$schema": "schema.json"}))
    assert (config.model.num_key_value_heads, config.model.head_dim) == (4, 8)
    assert config.deepspeed == {"zero_optimization": {"stage": 1}}
    assert (config.checkpoint.background, config.training.compile) == (False, False)
    dumped = config.model_dump(mode="json")
    assert load_config(write(tmp_path / "b.json", dumped)) == config
    assert parse_config(dumped) == config


def test_null_means_the_computed_default() -> None:
    model = SMALL["model"] | {"head_dim": None, "num_key_value_heads": None}
    assert parse_config(SMALL | {"model": model}) == parse_config(SMALL)


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(SMALL).training.steps = 3


def test_whole_number_is_accepted_as_a_real_one() -> None:
    config = parse_config(SMALL | {"optimizer": {"lr": 1, "betas": [0, 0.5]}})
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)


# --- extends and --set -----------------------------------------------------------------------


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    data = SMALL["data"] | {"train": [{"path": "one"}, {"path": "two"}]}
    write(tmp_path / "base" / "root.json", SMALL | {"data": data})
    write(tmp_path / "base" / "mid.json", {"extends": "root.json", "training": {"steps": 20}})
    top = {
        "extends": "base/mid.json",
        "name": "top",
        "data": {"train": [{"path": "three"}]},
        "training": {"micro_batch_size": 4},
    }
    config = load_config(write(tmp_path / "top.json", top))
    assert config.name == "top"
    assert [source.path for source in config.data.train] == ["three"]
    assert config.data.sequence_length == 32
    training = config.training
    assert (training.steps, training.global_batch_size, training.micro_batch_size) == (20, 8, 4)


def held_out(path: Path, *sets: str) -> dict[str, Any]:
    tuning = load_config(path, sets).finetune
    assert tuning is not None
    names = [f"{split}_{way}" for split in ("valid", "test") for way in ("split", "fraction")]
    return {name: value for name in names if (value := getattr(tuning.data, name)) is not None}


@pytest.mark.parametrize("split", ["valid", "test"])
def test_fraction_of_a_child_replaces_the_split_of_its_parent(tmp_path: Path, split: str) -> None:
    def tuning(**data: Any) -> dict[str, Any]:
        data = {"path": "x", "max_length": 8, **data}
        return {"finetune": {"task": "classification", "data": data}}

    base = {key: value for key, value in SMALL.items() if key != "data"}
    base["training"] = {"global_batch_size": 8, "micro_batch_size": 2}
    by_name, by_fraction = {f"{split}_split": "held"}, {f"{split}_fraction": 0.2}
    write(tmp_path / "name.json", base | tuning(**by_name))
    write(tmp_path / "fraction.json", base | tuning(**by_fraction))
    for parent, keys in (("name", by_fraction), ("fraction", by_name)):
        child = {"extends": f"{parent}.json", "finetune": {"data": keys}}
        path = write(tmp_path / "child.json", child)
        assert held_out(path) == keys
        ((key, value),) = keys.items()
        sets = f"finetune.data.{key}={json.dumps(value)}"
        assert held_out(tmp_path / f"{parent}.json", sets) == keys
        whole = f"finetune.data={json.dumps(keys)}"
        assert held_out(tmp_path / f"{parent}.json", whole) == keys
        empty = {"extends": f"{parent}.json", "finetune": {"data": {key: None}}}
        expected = by_name if parent == "name" else by_fraction
        assert held_out(write(tmp_path / "child.json", empty)) == expected
    both = {"extends": "name.json", "finetune": {"data": by_name | by_fraction}}
    [fault] = faults(write(tmp_path / "both.json", both))
    assert fault.startswith(f"{tmp_path / 'both.json'}: finetune.data.{split}_split")
    assert f"{split}_fraction is also set; remove one of the two" in fault
    sets = [f"finetune.data.{split}_split=held", f"finetune.data.{split}_fraction=0.2"]
    [fault] = faults(tmp_path / "fraction.json", *sets)
    assert fault.startswith("--set finetune.data")


def test_circular_extends_is_reported_with_its_files(tmp_path: Path) -> None:
    write(tmp_path / "a.json", SMALL | {"extends": "b.json"})
    write(tmp_path / "b.json", {"extends": "./c.json"})
    write(tmp_path / "c.json", {"extends": "a.json"})
    [fault] = faults(tmp_path / "a.json")
    assert "extends is circular" in fault
    assert "a.json -> " in fault
    assert fault.count("a.json") >= 2


@pytest.mark.parametrize("value", [3, None, ["a.json"], "a\u0000b"])
def test_extends_takes_one_path(tmp_path: Path, value: Any) -> None:
    [fault] = faults(write(tmp_path / "a.json", SMALL | {"extends": value}))
    assert "extends: expected one path" in fault


def test_missing_parent_is_reported_with_the_extending_file(tmp_path: Path) -> None:
    [fault] = faults(write(tmp_path / "a.json", SMALL | {"extends": "gone.json"}))
    assert "gone.json: no such run file" in fault
    assert f"extended by {tmp_path / 'a.json'}" in fault


def test_fault_names_the_file_that_contains_it(tmp_path: Path) -> None:
    write(tmp_path / "base.json", SMALL | {"training": SMALL["training"] | {"stepz": 1}})
    path = write(tmp_path / "a.json", {"extends": "base.json", "nam": "x"})
    lines = faults(path, "optimizer.lr=-1")
    assert sorted(lines) == [
        "--set optimizer.lr: expected a number above 0, got -1; correct the value; its meaning: "
        "Peak learning rate.",
        f'{path}: nam: unknown key; did you mean "name"?',
        f'{tmp_path / "base.json"}: training.stepz: unknown key; did you mean "steps"?',
    ]
    lines = faults(write(tmp_path / "good.json", SMALL), 'logging={"directori": "x"}')
    assert lines[0].startswith("--set logging.directori: unknown key")
    lines = faults(tmp_path / "good.json", 'model.rope_scaling={"rope_type":"yarn","factor":2.0}')
    assert lines[0].startswith("--set model.rope_scaling.original_max_position_embeddings: yarn")


@pytest.mark.parametrize("key", ["logging.wandb.api_key", "training.hf_token", "data.password"])
def test_unknown_key_of_a_secret_is_answered_with_environment_variables(
    tmp_path: Path, key: str
) -> None:
    path = write(tmp_path / "a.json", SMALL)
    [fault] = faults(path, "logging.wandb.project=x", f"{key}=hunter2")
    assert f"--set {key}: unknown key; remove it, and pass secrets in environment" in fault


def test_set_parses_json_and_takes_other_values_as_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", SMALL)
    config = load_config(
        path,
        [
            "training.steps=30",
            "name=other",
            'logging.directory="out=dir"',
            'data.train=[{"path": "x", "weight": 2}]',
            "deepspeed.zero_optimization.stage=3",
            'checkpoint={"every": 5}',
            "checkpoint.keep=7",
        ],
    )
    assert (config.training.steps, config.name, config.logging.directory) == (
        30,
        "other",
        "out=dir",
    )
    assert config.data.train[0].weight == 2.0
    assert config.deepspeed["zero_optimization"]["stage"] == 3
    assert (config.checkpoint.every, config.checkpoint.keep) == (5, 7)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("training.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("training..steps=3", "expected key=value"),
        ("extends=a.json", "only a run file may contain it"),
        ("name.first=x", 'name is "small", not a section'),
        ("data.train.path=x", "not a section"),
        ("training.stpes=3", 'training.stpes: unknown key; did you mean "steps"?'),
        ("trainin.steps=3", '--set trainin: unknown key; did you mean "training"?'),
        ("training.mico=3", '--set training.mico: unknown key; did you mean "micro_batch_size"?'),
        ("data.micro_batch_sice=3", 'unknown key; did you mean "training.micro_batch_size"?'),
        ("model.zzz=3", "model.zzz: unknown key; remove it, or write one of architecture"),
        ("warmup_steps=3", 'did you mean "schedule.warmup_steps"?'),
        ("training=null", "training: expected a section {...}, got null"),
        ("training.steps=NaN", 'training.steps: expected a whole number, got "NaN"'),
        ("optimizer.lr=1e999", '"1e999" is out of range; write a number below 1e308'),
        ('training.steps="3"', 'got "3"; write it without quotes'),
        ("training.steps=3.0", "got 3.0; write 3"),
        ("training.steps=true", "training.steps: expected a whole number, got true"),
        ("name=7", 'name: expected text in quotes, got 7; write "7" in quotes'),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected a list of 2"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1]: expected a number below 1"),
        ("data.train=[]", "data.train: got an empty list; name a folder of shards"),
        ('data.train=[{"path": "a", "wieght": 1}]', "data.train[0].wieght: unknown key; did you"),
        ("training.precision=bf61", 'did you mean "bf16"?'),
        ("model=3", "model: expected a section {...}, got 3"),
    ],
)
def test_set_fault_states_value_and_remedy(tmp_path: Path, item: str, message: str) -> None:
    [fault] = faults(write(tmp_path / "a.json", SMALL), item)
    assert message in fault


# --- files that are not run files ------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 column 1: not JSON"),
        (b'{"name": "x",\n }', "line 2 column 2: not JSON"),
        (b'\xef\xbb\xbf{"name": "x"}', "line 1 column 1: a byte order mark"),
        (b'{"name":\n "\xff"}', "line 2 column 3: byte 0xff is not UTF-8"),
        ('{"name": "x"}'.encode("utf-16"), "line 1 column 1: byte 0xff is not UTF-8"),
        (b"[1, 2]", "expected one JSON object {...}, got [1, 2]"),
        (b"null", "expected one JSON object {...}, got null"),
        (b"[" * 5000, "more than 30 deep"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "more than 30 deep"),
    ],
)
def test_file_that_cannot_be_parsed_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    [fault] = faults(path)
    assert fault.startswith(f"{path}: ")
    assert message in fault


def test_folder_and_missing_file_are_refused(tmp_path: Path) -> None:
    assert "cannot be read: Is a directory" in faults(tmp_path)[0]
    assert "no such run file; check the path" in faults(tmp_path / "gone.json")[0]
    assert "cannot be read" in faults(tmp_path / "nul\0.json")[0]


def test_json_faults_are_all_noted(tmp_path: Path) -> None:
    text = json.dumps(SMALL)[:-1] + ', "name": "again", "x": NaN, "y": -Infinity, "z": 1e400, '
    text += '"big": 99999999999999999999999999}'
    path = write(tmp_path / "a.json", text)
    notes = [line.removeprefix(f"{path}: ") for line in faults(path)]
    assert notes[:5] == [
        "NaN is not a JSON number; write a finite number or null",
        "-Infinity is not a JSON number; write a finite number or null",
        '"1e400" is out of range; write a number below 1e308',
        '"99999999999999999999999999" is out of range; write a whole number below 2^63',
        '"name" occurs twice in one section, with "small" and "again"; remove one',
    ]


# --- several faults --------------------------------------------------------------------------


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    wrong = {
        "name": "../up",
        "model": SMALL["model"] | {"num_key_value_heads": 3, "norm": "rms", "hiden_size": 1},
        "data": SMALL["data"] | {"sequence_length": 65},
        "optimizer": {"lr": 1e-3, "clip_grad_norm": 0.5},
        "training": {"steps": 10, "global_batch_size": 7, "micro_batch_size": 2},
        "deepspeed": {"gradient_clipping": 1.0, "gradient_cliping": 1.0},
    }
    lines = faults(write(tmp_path / "a.json", wrong))
    keys = [line.removeprefix(f"{tmp_path / 'a.json'}: ").split(":")[0] for line in lines]
    assert sorted(keys) == [
        "data.sequence_length",
        "deepspeed.gradient_cliping",
        "deepspeed.gradient_clipping",
        "model.hiden_size",
        "model.norm",
        "model.num_key_value_heads",
        "name",
        "training.global_batch_size",
    ]
    assert all("\n" not in line for line in lines)


def test_missing_key_is_reported_with_an_example() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "x", "model": {}, "training": {"steps": 3}})
    lines = caught.value.faults
    assert (
        'the run file: model.vocab_size: is missing; add it, for example "vocab_size": 32000'
        in lines
    )
    assert 'the run file: data: is missing; add it, for example "data": {}' in lines
    assert len(lines) == 6 + 1 + 1 + 2  # six of the model, data, optimizer, two batch sizes


def test_rule_about_an_invalid_key_reports_nothing() -> None:
    data = SMALL["data"] | {"sequence_length": 100}
    model = SMALL["model"] | {"max_position_embeddings": "64"}
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL | {"data": data, "model": model})
    assert [fault.split(":")[1].strip() for fault in caught.value.faults] == [
        "model.max_position_embeddings"
    ]


def test_missing_file_is_searched_among_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="megalite"):
        shipped = load_config("configs/125m.json")
    shipped_path = SHIPPED / "125m.json"
    assert caplog.messages == [
        f"configs/125m.json does not exist; using the shipped {shipped_path}"
    ]
    assert load_config("finetune/imdb.json").name == "imdb"
    for parent in ("125m.json", "configs/125m.json"):
        child = write(tmp_path / "mine.json", {"extends": parent, "name": "mine"})
        assert load_config(child).model == shipped.model
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs/125m.json", SMALL)
    assert load_config("configs/125m.json").name == "small"
    for name in ("configs/../125m.json", "../configs/125m.json", "none.json", "", "a\0b"):
        assert find_file(name) == Path(name)
    assert "none.json: no such run file" in faults(Path("configs/none.json"))[0]


def test_load_config_accepts_a_path_as_text(tmp_path: Path) -> None:
    assert isinstance(load_config(str(write(tmp_path / "a.json", SMALL))), RunConfig)
