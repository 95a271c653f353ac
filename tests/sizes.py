"""Report of the size of each package in tokens, which does not depend on the layout of lines.

    python -m tests.sizes

The core has a budget, which `tests/unit/test_house.py` checks. All other packages are listed for
information.
"""

from __future__ import annotations

import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ("train", "engine", "model", "parallel", "arch", "optim", "data")
CORE_BUDGET = 68_000
_LAYOUT = (
    *(tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
)


def count_tokens(path: Path) -> int:
    """Return the tokens of a file. A docstring is one token; comments and layout are none."""
    with tokenize.open(path) as file:
        return sum(token.type not in _LAYOUT for token in tokenize.generate_tokens(file.readline))


def package_sizes() -> dict[str, int]:
    """Return the tokens of each package below megalite/, and of the other folders of sources."""
    sizes: dict[str, int] = {}
    for folder in ("megalite", "data_prep", "launcher"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT).parts
            name = inner[1] if inner[0] == "megalite" and len(inner) > 2 else inner[0]
            sizes[name] = sizes.get(name, 0) + count_tokens(path)
    return sizes


def core_size() -> int:
    """Return the tokens of the core, which is the code of every training step."""
    return sum(size for name, size in package_sizes().items() if name in CORE)


def main() -> None:
    sizes = package_sizes()
    lines = [f"core {core_size():9,} of {CORE_BUDGET:,} tokens"]
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        lines.append(f"{'core' if name in CORE else '':5}{size:9,}  {name}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
