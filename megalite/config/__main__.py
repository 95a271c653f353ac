"""Write the schema of run files and its page, or print the run folder of a run file.

python -m megalite.config                                           writes configs/schema.json and
                                                                    docs/configuration.md
python -m megalite.config --run-folder CONFIG [--set KEY=VALUE]...  checks CONFIG and prints its
                                                                    run folder
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megalite.cli import run_main
from megalite.config.deepspeed_tables import deepspeed_schema
from megalite.config.load import SHIPPED, load_config
from megalite.config.model import example_model
from megalite.config.page import configuration_page
from megalite.config.schema import RunConfig
from megalite.files import write_atomic, write_json

SCHEMA = SHIPPED / "schema.json"
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a run file: type, bounds, choices and description of every key.

    No key is required, because a file that this file extends may contain it. Loading reports
    the keys that are missing in all of them.
    """
    schema = RunConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        _tidy(section)
    schema["properties"] = {
        "$schema": {
            "type": "string",
            "description": "Path of configs/schema.json, from which editors complete keys.",
        },
        "extends": {
            "type": "string",
            "description": "Path of the run file that this file changes, relative to this file. "
            "Sections are merged key by key; a list replaces a list.",
        },
        **schema["properties"],
        "deepspeed": deepspeed_schema()
        | {"description": schema["properties"]["deepspeed"]["description"]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "MegaLite run file",
        **schema,
    }


def _tidy(section: dict[str, Any]) -> None:
    """Remove titles and `required`, and allow null for keys with a computed default."""
    section.pop("title", None)
    section.pop("required", None)
    for name, field in section["properties"].items():
        field.pop("title", None)
        if name in ("num_key_value_heads", "head_dim", "attention_output_bias"):
            field["type"] = [field["type"], "null"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-folder", metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    # a job script passes all arguments of its launcher
    arguments, others = parser.parse_known_args()
    if arguments.run_folder is None:
        write_json(SCHEMA, json_schema())
        write_atomic(PAGE, configuration_page(json_schema()))
        sys.stdout.write(f"wrote {SCHEMA} and {PAGE}\n")
        return
    # --init-from may supply the model section, which the name of the run folder does not need
    has_start = any(word.startswith("--init-from") for word in others)
    config = load_config(
        arguments.run_folder, arguments.set, model=example_model() if has_start else None
    )
    sys.stdout.write(f"{Path(config.logging.directory) / config.name}\n")


if __name__ == "__main__":
    run_main(main, find_rank=lambda: 0)
