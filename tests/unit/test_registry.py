# covers: megalite/observe/sinks.py
# covers: megalite/registry.py megalite/config/names.py
"""Names in a run file that are built in, registered in code, or declared by packages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalite import registry
from megalite.config import load_config, parse_config
from megalite.errors import ConfigError, UserError
from megalite.plan import make_plan
from megalite.registry import Registry
from tests.helpers.plugins import install_package
from tests.helpers.runs import BASE


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install the toy package on the module path of this process."""
    install_package(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    registry._points.cache_clear()
    yield tmp_path / "site"
    registry._points.cache_clear()
    for kind in (registry.norms, registry.optimizers, registry.readers, registry.sinks):
        for name in ("scaled", "lion", "csvz", "lines"):
            kind._entries.pop(name, None)
            kind._facts.pop(name, None)
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_parts"]:
        del sys.modules[name]


def with_lion(**sections: Any) -> dict[str, Any]:
    return BASE | {"optimizer": {"name": "lion", "lr": 1e-3}} | sections


def test_builtin_names_are_read_from_the_home_module() -> None:
    assert registry.optimizers.builtin == ("adamw", "muon", "sgd")
    facts = {"states": ("exp_avg", "exp_avg_sq"), "counts_steps": True}
    assert registry.optimizers.facts("adamw") == facts
    registry.optimizers.load("muon")
    assert set(registry.optimizers.builtin) <= set(registry.optimizers._entries)


def test_registry_accepts_a_name_once() -> None:
    kinds: Registry[Any] = Registry("kind", "kinds", None)
    kinds.register("first", cost=3)(len)
    assert (kinds.load("first"), kinds.facts("first")) == (len, {"cost": 3})
    with pytest.raises(UserError, match='kind "first" already exists'):
        kinds.register("first")(max)
    with pytest.raises(UserError, match=r'unknown kind "frist"; did you mean "first"\?; use one'):
        kinds.load("frist")


def test_registry_refuses_the_name_of_a_builtin_entry() -> None:
    with pytest.raises(UserError, match="already"):
        registry.optimizers.register("adamw")(len)


def test_package_adds_names_without_being_imported(installed: Path) -> None:
    config = parse_config(with_lion(logging={"sinks": ["lines"]}))
    assert config.plugins == {
        "optimizer.lion": "toy-parts 1.2",
        "sink.lines": "toy-parts 1.2",
    }
    assert not any(name.startswith("toy_parts") for name in sys.modules)
    assert registry.optimizers.facts("lion") == {"states": ("exp_avg",)}
    assert "toy_parts.optimizers" not in sys.modules


def test_name_of_two_packages_is_refused_when_it_is_used(installed: Path) -> None:
    other = installed / "other-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text("[megalite.plugins]\nsink.lines = other:Lines\n")
    registry._points.cache_clear()
    parse_config(with_lion())
    with pytest.raises(ConfigError, match=r"sink\.lines is declared twice"):
        parse_config(BASE | {"logging": {"sinks": ["lines"]}})


def test_package_with_a_builtin_name_is_refused_when_it_is_used(installed: Path) -> None:
    points = installed / "toy_parts-1.2.dist-info/entry_points.txt"
    points.write_text(points.read_text() + "optimizer.sgd = toy_parts.optimizers:lion\n")
    registry._points.cache_clear()
    parse_config(with_lion())
    with pytest.raises(ConfigError, match=r"by toy-parts 1\.2 and by this project"):
        parse_config(BASE | {"optimizer": {"name": "sgd", "lr": 1e-3}})


def test_optimizer_of_a_package_must_state_its_states(installed: Path) -> None:
    (installed / "toy_parts/facts.py").write_text("LION = {}\nSCALED = {}\n")
    config = parse_config(with_lion())
    with pytest.raises(UserError, match="its package does not list the optimizer's states"):
        make_plan(config, world_size=1, device="cpu")


def test_package_that_cannot_be_imported_is_named(installed: Path) -> None:
    (installed / "toy_parts/optimizers.py").write_text("import nothing_of_that_name")
    with pytest.raises(UserError, match=r"optimizer\.lion of the package toy-parts 1\.2 cannot"):
        registry.optimizers.load("lion")


def test_missing_package_is_named_if_the_run_recorded_it() -> None:
    with pytest.raises(ConfigError, match="expected one of adamw, muon, sgd, got"):
        parse_config(with_lion())
    recorded = with_lion(plugins={"optimizer.lion": "toy-parts 1.2"})
    with pytest.raises(ConfigError, match=r"of the package toy-parts 1\.2, which is not installed"):
        parse_config(recorded)


def test_missing_package_is_named_if_the_run_folder_records_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/run"
    folder.mkdir(parents=True)
    record = {"plugins": {"optimizer.lion": "toy-parts 1.2"}}
    (folder / "config.json").write_text(json.dumps(record))
    (tmp_path / "run.json").write_text(json.dumps(with_lion()))
    with pytest.raises(ConfigError, match=r"of the package toy-parts 1\.2, which is not installed"):
        load_config("run.json")


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match='did you mean "adamw"'):
        parse_config(BASE | {"optimizer": {"name": "adam", "lr": 1e-3}})


def test_plugin_is_checked_and_planned_without_torch(installed: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(with_lion(model=BASE["model"] | {"norm": "scaled"})))
    code = (
        "import sys; from megalite.config import load_config; from megalite.plan import make_plan\n"
        f"plan = make_plan(load_config({str(file)!r}), world_size=1, device='cpu')\n"
        "print(plan.memory_bytes['optimizer'], plan.parameters, 'torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{installed}:{root}"},
    )
    model = BASE["model"] | {"norm": "layernorm"}
    adamw = BASE | {"model": model, "optimizer": {"lr": 1e-3}}
    plan = make_plan(parse_config(adamw), world_size=1, device="cpu")
    states, parameters, torch_was_imported = done.stdout.split()
    assert torch_was_imported == "False"
    assert int(parameters) == plan.parameters  # a gain and a bias, like a layer norm
    # fp32 masters and one state instead of two
    assert int(states) * 3 == plan.memory_bytes["optimizer"] * 2


def test_reader_of_a_package_is_selected_by_the_file_ending(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.csvz").write_text("textzn\nhello worldz1\nmore textz2\n")
    root = Path(__file__).resolve().parents[2]
    command = ["tokenize", "--tokenizer", "bytes", "--input", "a.csvz", "--output", "shards"]
    subprocess.run(
        [sys.executable, "-m", "data_prep", *command],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        env={"PYTHONPATH": f"{installed}:{root}"},
    )
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    assert manifest["documents"] == 2
