"""The house rules, checked in the sources: layers, imports, sizes, and forbidden calls and words.

CONTRIBUTING.md states the reason of each rule. A rule is a function that yields the faults of a
source. The last tests check that each rule detects a fault.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.sizes import CORE_BUDGET, core_size

ROOT = Path(__file__).resolve().parents[2]

# From the lowest layer to the highest. A module imports only lower layers. Peers, which do not
# import each other, are separated by a bar.
LAYERS = (
    *("errors", "launchers", "env", "log", "files", "registry", "mesh", "cli|spawn", "config"),
    *("arch", "plan"),
    *("hub", "tokenizers"),
    *("formats", "model", "parallel", "data|optim", "engine", "checkpoint", "observe"),
    *("evaluate|report", "train", "parity|doctor", "workflows|isolation", "api|commands"),
    "__main__",
)
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split("|")}
TORCH_FREE = [name for line in LAYERS[: LAYERS.index("formats") + 1] for name in line.split("|")]
PREPARES_DATA = ("workflows", "api", "commands")  # may import data_prep, like launchers
TORCH_IN_A_PROPERTY = (
    "megalite/config/precision.py"  # the callers of the property have imported torch
)

# Pieces of parameters' names.
PARAMETER = re.compile(
    r"_proj\b|[qk]_norm|layernorm\.|embed_|lm_head|lm_transform|lora_[AB]|_attn\b|\bmlp\.|\.layers"
    r"|\bscore\.|\.(weight|bias)\b|\bmodel\.(encoder|decoder|norm)\b"
)

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TENSOR_FILES = 400, 60, 14

PROJECT = sorted(
    path
    for folder in ("megalite", "data_prep", "launcher")
    for path in (ROOT / folder).rglob("*.py")
)
PYTHON = PROJECT + sorted(
    path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
TEXTS = sorted(
    path
    for folder in (".", ".ci", "configs", "docs", "slurm", "tests", "benchmarks")
    for path in (ROOT.iterdir() if folder == "." else (ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix not in (".pyc", ".png", ".bin", ".idx", ".gz")
)

# These words are written in halves, because this file must not contain them either.
WORDS = (
    *(r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bXX" + r"X\b", "raise NotImpl" + "emented"),
    *("/wo" + "rk/", r"\.\./sha" + "red", "con" + r"tract\.md", "(this|another) sess" + "ion"),
    *("issue" + r" [A-J]\b", "(this|next) iss" + "ue", r"\bClau" + r"de\b", r"\bChat" + r"GPT\b"),
)


def where(path: Path) -> str:
    """Return a path relative to the root."""
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer_of(file: str) -> str:
    """Return the layer of a file: `config` for megalite/config/load.py, else the first folder."""
    parts = Path(file).with_suffix("").parts
    return parts[1] if parts[0] == "megalite" else parts[0]


def layer_faults(file: str, tree: ast.AST) -> Iterator[str]:
    layer = layer_of(file)
    if layer == "__init__":
        yield from init_faults(file, tree)
        return
    limits = {"data_prep": RANK["formats"] + 1, "launcher": len(LAYERS)}
    limit = limits.get(layer, RANK.get(layer))
    if limit is None:
        yield f"{file}: {layer} is not in the list of layers"
        return
    for line, name in imports(tree):
        first, second = (*name.split("."), "")[:2]
        if first == "megalite" and second not in ("", layer, "__version__"):
            if second not in RANK:
                yield f"{file}:{line} {name} is not in the list of layers"
            elif RANK[second] >= limit:
                yield f"{file}:{line} {layer} imports {name}, which is not below it"
        elif first in ("", "launcher", "tests") or (
            first == "data_prep" and layer in RANK and layer not in PREPARES_DATA
        ):
            yield f"{file}:{line} imports {name}"


def init_faults(file: str, tree: ast.AST) -> Iterator[str]:
    """Yield imports of `megalite/__init__.py` other than small modules of the standard library."""
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typed = [node for node in branches if ast.unparse(node.test) == "TYPE_CHECKING"]
    lines = {line for node in typed for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    for line, name in imports(tree):
        if line not in lines and name.split(".")[0] not in ("__future__", "importlib", "typing"):
            yield f"{file}:{line} imports {name}"


def torch_faults(file: str, tree: ast.AST) -> Iterator[str]:
    if layer_of(file) in (*TORCH_FREE, "data_prep", "__init__"):
        for line, name in imports(tree):
            package = name.split(".")[0]
            if package == "torch" and file == TORCH_IN_A_PROPERTY:
                continue
            if package in ("torch", "deepspeed", "transformers"):
                yield f"{file}:{line} imports {name} below the line"


def deepspeed_faults(file: str, tree: ast.AST) -> Iterator[str]:
    if not file.startswith("megalite/engine/"):
        for line, name in imports(tree):
            if name.split(".")[0] == "deepspeed":
                yield f"{file}:{line} imports {name}; only megalite/engine may"


def environment_faults(file: str, tree: ast.AST) -> Iterator[str]:
    readers = ("environ", "environb", "getenv", "putenv", "unsetenv")
    if file == "megalite/env.py":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in [f"os.{r}" for r in readers]:
            yield f"{file}:{node.lineno} {ast.unparse(node)}; only megalite/env.py may"
    for line, name in imports(tree):
        if name in [f"os.{r}" for r in readers]:
            yield f"{file}:{line} imports {name}; only megalite/env.py may"


def unsafe_faults(file: str, tree: ast.AST) -> Iterator[str]:
    """Yield calls that could run untrusted code: unpickling, eval and exec."""
    for line, name in imports(tree):
        if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"):
            yield f"{file}:{line} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("torch.load", "torch.save", "eval", "exec"):
                yield f"{file}:{node.lineno} calls {name}"
            for keyword in node.keywords:
                unsafe = keyword.arg in ("allow_pickle", "trust_remote_code")
                if unsafe and ast.unparse(keyword.value) != "False":
                    yield f"{file}:{node.lineno} {keyword.arg}"


def print_faults(file: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "builtins.print"):
            yield f"{file}:{node.lineno} prints; use megalite.log.logger or sys.stdout.write"


def parameter_faults(file: str, tree: ast.AST) -> Iterator[str]:
    """Yield names of parameters in the planner, which must only sum over the parts of a model."""
    if not file.startswith("megalite/plan/"):
        return
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and PARAMETER.search(text):
            yield f"{file} names a parameter in {text!r}; use a sum over the parts (megalite/arch)"


def size_faults(file: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{file}: {lines} lines, over {MAX_FILE_LINES}; split it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{file}:{node.lineno} {node.name}: {length} lines, over {MAX_FUNCTION_LINES}"


def empty_test_faults(file: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            body = ast.unparse(node.body)
            if not re.search(r"\b(assert|raises|warns|check_|expect_)", body):
                yield f"{file}:{node.lineno} {node.name} asserts nothing"


def word_faults(file: str, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), 1):
        for word in WORDS:
            if re.search(word, line):
                yield f"{file}:{number} contains {word!r}: {line.strip()}"


def rebinding_faults(file: str, tree: ast.AST) -> Iterator[str]:
    """Yield assignments of a forward, and of a model's attributes from outside."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in (part for whole in targets for part in ast.walk(whole)):
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                owner = ast.unparse(target.value).rpartition(".")[2]
                if target.attr == "forward" or owner in ("model", "module", "block", "layer"):
                    yield f"{file}:{node.lineno} sets {ast.unparse(target)} from outside"


_FORWARDING = ("format", "submit", "apply")  # functions that forward positional arguments


def call_faults(file: str, tree: ast.AST) -> Iterator[str]:
    """Yield calls with more than five positional arguments; name them instead."""
    variadic = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.args.vararg
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > 5:
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if last not in (*_FORWARDING, *variadic) and not name.startswith("logger."):
                yield f"{file}:{node.lineno} {name} has {len(node.args)} positional arguments"


def packing_faults(file: str, tree: ast.AST) -> Iterator[str]:
    """Yield tuple assignments of unrelated values: not a swap, and of different forms."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        if isinstance(node.targets[0], ast.Tuple):
            targets, values = node.targets[0].elts, node.value.elts
            swap = {*map(ast.unparse, targets)} == {*map(ast.unparse, values)}
            if not swap and len({*map(_form, values)}) > 1:
                yield f"{file}:{node.lineno} packs unrelated values; write one line for each"


def _form(value: ast.expr) -> str:
    """Return an expression's form, without its names and constants."""
    bare = ast.parse(ast.unparse(value), mode="eval")
    for node in ast.walk(bare):
        for field in ("id", "attr", "arg", "value"):
            if not isinstance(getattr(node, field, None), ast.AST | None):
                setattr(node, field, "")
    return ast.dump(bare)


TREE_RULES: dict[str, Callable[[str, ast.AST], Iterator[str]]] = {
    "layers": layer_faults,
    "torch": torch_faults,
    "deepspeed": deepspeed_faults,
    "environment": environment_faults,
    "unsafe": unsafe_faults,
    "print": print_faults,
    "calls": call_faults,
    "packing": packing_faults,
    "rebinding": rebinding_faults,
    "parameters": parameter_faults,
}


@pytest.mark.parametrize("rule", TREE_RULES)
def test_sources_follow_the_rule(rule: str) -> None:
    faults = []
    for path in PROJECT:
        faults += TREE_RULES[rule](where(path), ast.parse(path.read_text(encoding="utf-8")))
    assert faults == []


def test_files_and_functions_stay_small() -> None:
    faults = [f for path in PYTHON for f in size_faults(where(path), path.read_text("utf-8"))]
    assert faults == []


def test_few_files_name_the_tensor_axis() -> None:
    # other files pass a coordinate (megalite/mesh.py), so that a new axis changes few files
    words = re.compile("tensor_rank|tensor_parallel")
    files = [where(p) for p in PROJECT if words.search(p.read_text("utf-8"))]
    assert len([file for file in files if file.startswith("megalite/")]) <= MAX_TENSOR_FILES, files


def test_core_keeps_its_budget() -> None:
    assert core_size() <= CORE_BUDGET, "remove unneeded code; see `python -m tests.sizes`"


def test_tests_assert_something() -> None:
    faults = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        faults += empty_test_faults(where(path), ast.parse(path.read_text(encoding="utf-8")))
    assert faults == []


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_texts_have_no_forbidden_words() -> None:
    texts = sorted({*TEXTS, *PYTHON} - {ROOT / "LICENSE", ROOT / ".git"})
    assert [f for path in texts for f in word_faults(where(path), path.read_text("utf-8"))] == []


def test_launchers_shadow_no_module() -> None:
    """A script's folder is first on sys.path, so launcher/profile.py would replace `profile`."""
    taken = sys.stdlib_module_names | packages_distributions().keys()
    assert [path.name for path in (ROOT / "launcher").glob("*.py") if path.stem in taken] == []


def test_torch_free_layers_import_no_torch() -> None:
    """One new interpreter imports the modules, and names the first module that imports torch."""
    modules = [
        where(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in PROJECT
        if layer_of(where(path)) in (*TORCH_FREE, "data_prep") and path.name != "__main__.py"
    ]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'torch', 'deepspeed', 'transformers'} & sys.modules.keys()\n"
        "    if loaded: sys.exit(f'{name} loads {sorted(loaded)}')\n"
    )
    command = [sys.executable, "-c", program, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(modules) >= len(TORCH_FREE)


@pytest.mark.parametrize(
    ("rule", "file", "source", "faults"),
    [
        ("layers", "megalite/config/a.py", "from megalite.plan import Plan", 1),
        ("layers", "megalite/config/a.py", "from megalite import errors, train", 1),
        ("layers", "megalite/config/a.py", "import megalite.errors\nimport megalite.config.b", 0),
        ("layers", "megalite/model/a.py", "def f():\n    from megalite.data.batch import Batch", 1),
        ("layers", "megalite/files.py", "from megalite.log import logger", 0),
        ("layers", "megalite/log.py", "from megalite import files, __version__", 1),
        ("layers", "megalite/train/a.py", "from . import b\nimport data_prep", 2),
        ("layers", "megalite/extras/a.py", "", 1),
        ("layers", "megalite/train/a.py", "import megalite.extras", 1),
        ("layers", "megalite/__init__.py", "import importlib\nfrom megalite import errors", 1),
        ("layers", "megalite/__init__.py", "if TYPE_CHECKING:\n    from megalite import api", 0),
        ("layers", "megalite/api.py", "import data_prep.chat\nimport launcher.eval", 1),
        ("layers", "data_prep/a.py", "import megalite.formats\nimport megalite.parallel", 1),
        ("layers", "launcher/a.py", "import megalite.train.loop\nfrom launcher import b", 1),
        ("torch", "megalite/plan.py", "def f():\n    from torch import nn", 1),
        ("torch", "megalite/parallel/a.py", "import torch", 0),
        ("deepspeed", "megalite/train/a.py", "from deepspeed.utils import groups", 1),
        ("deepspeed", "megalite/engine/a.py", "import deepspeed", 0),
        ("environment", "launcher/a.py", "import os\nos.environ['A'] = os.getenv('B')", 2),
        ("environment", "megalite/train/a.py", "from os import environ", 1),
        ("environment", "megalite/env.py", "import os\nos.environ", 0),
        (
            "unsafe",
            "megalite/a.py",
            "import pickle\ntorch.load(f)\nnp.load(f, allow_pickle=True)",
            3,
        ),
        ("unsafe", "megalite/a.py", "model.eval()\nnp.load(f, allow_pickle=False)", 0),
        ("print", "launcher/a.py", "print(1)\nconsole.print(1)", 1),
        ("calls", "megalite/a.py", "f(1, 2, 3, 4, 5, 6)\nf(1, 2, 3, 4, 5, six=6)", 1),
        ("calls", "megalite/a.py", "logger.info(1, 2, 3, 4, 5, 6)\nText.format(*a)", 0),
        ("packing", "megalite/a.py", "a, b = 1, f(x)\nself.a, b = c.d, {}", 2),
        ("packing", "megalite/a.py", "a, b = b, a\na, b = x.a, y.b\na, b = f()", 0),
        ("rebinding", "megalite/a.py", "x.forward = y\nself.model.loss, a = 1, 2", 2),
        ("rebinding", "megalite/a.py", "self.model = build()\nself._forward = y", 0),
        ("parameters", "megalite/plan/a.py", "a = 'q_proj'\nb = f'{c}.layers.0'", 2),
        ("parameters", "megalite/arch/a.py", "a = 'q_proj'", 0),
    ],
)
def test_tree_rule_detects_its_faults(rule: str, file: str, source: str, faults: int) -> None:
    assert len(list(TREE_RULES[rule](file, ast.parse(source)))) == faults


def test_other_rules_detect_their_faults() -> None:
    long = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert len(list(size_faults("megalite/a.py", long))) == 1
    assert len(list(size_faults("megalite/a.py", "x = 1\n" * (MAX_FILE_LINES + 1)))) == 1
    assert len(list(empty_test_faults("tests/a.py", ast.parse("def test_a():\n    f()")))) == 1
    assert len(list(word_faults("a.md", "TO" + "DO: more\nfine\nsee /wo" + "rk/main"))) == 2
