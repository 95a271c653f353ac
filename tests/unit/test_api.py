# covers: megalite/api.py megalite/workflows.py
"""Public names of the library, cost of their import, and user errors before torch is imported."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megalite
from megalite.errors import CommandError, ConfigError, DataError
from tests.helpers.runs import BASE, merge_sections

ROOT = Path(__file__).resolve().parents[2]
TUNED = {
    "finetune": {"task": "sft", "data": {"path": "a", "max_length": 64}},
    "training": {"steps": 0},
    "data": {"train": []},
}

SIGNATURES = {
    "pretrain": "(config, *, overrides=(), hooks=())",
    "finetune": "(config, *, init_from=None, overrides=(), hooks=())",
    "load": "(path)",
    "make_plan": "(config, *, nodes=1, gpus_per_node=8, gpu='h100-80gb', overrides=())",
    "open_shards": "(path)",
    "Model.generate": (
        "(self, prompt, max_new_tokens=100, *, temperature=1.0, top_k=None, top_p=None, seed=0)"
    ),
    "Model.loss": "(self, text)",
    "Model.evaluate": "(self, data=None)",
}


def run_python(program: str, folder: Path = ROOT) -> str:
    """Run a program in a fresh interpreter, and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bare(function: Any) -> str:
    """Return a signature without annotations."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=empty))


def test_public_names_match_the_documented_list() -> None:
    functions = ["finetune", "load", "make_plan", "open_shards", "pretrain"]
    results = ["Model", "RunConfig", "RunResult", "Shards"]
    hooks = ["Hook", "Outcome", "SaveReport", "StepReport"]
    assert sorted(megalite.__all__) == sorted([*functions, *results, *hooks])
    assert set(megalite.__all__) <= set(dir(megalite))
    for name in megalite.__all__:
        assert getattr(megalite, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'train_model'"):
        _ = megalite.train_model


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_match_the_documented_list(name: str) -> None:
    function: Any = megalite
    for part in name.split("."):
        function = getattr(function, part)
    assert bare(function) == SIGNATURES[name]
    result = [name for name, value in vars(megalite.RunResult).items() if name[0] != "_"]
    assert sorted({*result, *megalite.RunResult.__dataclass_fields__}) == [
        *("checkpoint", "directory", "metrics", "state"),
    ]


def test_public_names_differ_from_module_names() -> None:
    """Importing `megalite.plan` would replace a function of that name."""
    modules = {path.stem for path in (ROOT / "megalite").iterdir()} | {"launcher", "configs"}
    assert modules & set(megalite.__all__) == set()
    assert {"train", "plan", "report"} <= modules


def test_import_of_the_library_is_fast_and_imports_no_other_module() -> None:
    program = (
        "import sys, time; began = time.perf_counter(); import megalite; "
        "seconds = time.perf_counter() - began; "
        "print(seconds, [name for name in sys.modules if name.startswith('megalite.')], "
        "{'torch', 'numpy', 'pydantic'} & sys.modules.keys())"
    )
    seconds, rest = run_python(program).split(maxsplit=1)
    assert float(seconds) < 0.1
    assert rest.strip() == "[] set()"


def test_plan_and_user_errors_import_no_torch() -> None:
    program = (
        "import sys, megalite\n"
        "from megalite.errors import UserError\n"
        "megalite.make_plan('configs/7b.json'), megalite.RunConfig\n"
        "for call in (lambda: megalite.pretrain({'name': 3}), lambda: megalite.load('no/such/x'),\n"
        "             lambda: megalite.open_shards('no/such')):\n"
        "    try: call()\n"
        "    except UserError: continue\n"
        "    sys.exit('no error')\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_python(program).strip() == "False"


def test_plan_has_the_keys_and_values_of_the_command() -> None:
    command = ("launcher/plan.py", "--config", "configs/7b.json", "--nodes", "4", "--json")
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    plan = megalite.make_plan(ROOT / "configs/7b.json", nodes=4)
    assert json.loads(json.dumps(plan)) == json.loads(done.stdout)


def test_overrides_are_strings_or_a_mapping() -> None:
    values = {"training.steps": 7, "name": "12", "data.train": [{"path": Path("a")}]}
    texts = ["training.steps=7", 'name="12"', 'data.train=[{"path": "a"}]']
    plans = [megalite.make_plan(BASE, gpus_per_node=1, overrides=o) for o in (values, texts)]
    assert plans[0] == plans[1]
    whole = megalite.make_plan(BASE, gpus_per_node=1)
    assert whole["run_seconds"] == pytest.approx(plans[0]["run_seconds"] * 100 / 7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: megalite.pretrain({**BASE, "nme": 1}), ConfigError, "nme: unknown key"),
        (
            lambda: megalite.pretrain(BASE, overrides=["training.stepz=1"]),
            ConfigError,
            "training.stepz: unknown key",
        ),
        (lambda: megalite.pretrain("no.json"), ConfigError, r"no\.json: no such run file"),
        (lambda: megalite.finetune(BASE), ConfigError, "the configuration: no finetune section"),
        (
            lambda: megalite.pretrain(merge_sections(BASE, TUNED)),
            ConfigError,
            "it has a finetune section",
        ),
        (lambda: megalite.pretrain(BASE, hooks=[3]), CommandError, "3 is no megalite.Hook"),  # type: ignore[list-item]
        (lambda: megalite.pretrain(BASE), DataError, "shard folder a does not exist"),
        (lambda: megalite.finetune(BASE, init_from="no/x/y"), CommandError, "no such folder"),
        (lambda: megalite.load("no/such/model"), CommandError, "no such folder"),
        (lambda: megalite.make_plan(BASE, gpu="h1000"), CommandError, "no such device"),
        (lambda: megalite.make_plan(BASE, nodes=0), CommandError, "set it to 1 to 1,000,000"),
        (lambda: megalite.open_shards("no/such"), DataError, "no/such"),
    ],
)
def test_user_error_is_raised_before_a_file_is_written(
    call: Any, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        call()
    assert list(tmp_path.iterdir()) == []


def test_documents_of_shards_are_tensors(shards: dict[str, str]) -> None:
    import torch

    opened = megalite.open_shards(shards["valid"])
    manifest = json.loads((Path(shards["valid"]) / "manifest.json").read_text())
    assert len(opened) == manifest["documents"]
    documents = list(opened)
    assert sum(len(document) for document in documents) == opened.tokens == manifest["tokens"]
    assert opened.vocab_size == manifest["vocab_size"]
    assert documents[0].dtype == torch.int64
    assert documents[0].ndim == 1
    assert torch.equal(opened[-1], documents[-1])
    for index in (len(opened), -len(opened) - 1):
        with pytest.raises(IndexError, match="document"):
            opened[index]


def test_messages_are_shown_unless_the_program_shows_them(
    shards: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from megalite.log import logger, show_messages

    with show_messages(rank=0):
        logger.info("a step")
    assert capsys.readouterr().err == "a step\n"
    assert (logger.handlers, logger.propagate) == ([], True)
    import logging

    handler = logging.NullHandler()
    logger.addHandler(handler)
    with show_messages(rank=0):
        logger.warning("a step")
        assert logger.handlers == [handler]
    assert capsys.readouterr().err == ""
