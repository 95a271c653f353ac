"""Write a checkpoint as a folder that Hugging Face's transformers loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalite.errors import CommandError
from megalite.formats import hub
from megalite.log import command_parser, run_main

_EXAMPLES = """examples:
  python launcher/export.py --checkpoint runs/smoke --output exported/smoke --verify
  python launcher/export.py --checkpoint runs/7b --output exported/7b --dtype bfloat16

--verify loads the folder with transformers and with MegaLite, compares the scores of both, and ends
with 1 where they differ (pip install megalite[hf]).
"""


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a step folder, or a run folder"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="made by this; not there yet"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default 5)"
    )
    parser.add_argument("--verify", action="store_true", help="compare with transformers")
    parser.add_argument(
        "--adapter", action="store_true", help="write a run's adapters alone, as PEFT does"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if not arguments.max_shard_gb > 0:
        raise CommandError(f"--max-shard-gb {arguments.max_shard_gb}: give a size over 0")
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint", weights=False)
    from megalite.checkpoint import StoredCheckpoint, find_base, merged, open_checkpoint
    from megalite.checkpoint.huggingface import export, export_adapter
    from megalite.config import load_config
    from megalite.evaluate.verify import require_transformers, verify
    from megalite.formats.tokenizer import load_tokenizer

    if arguments.verify and arguments.adapter:
        raise CommandError("--verify compares a whole model: leave --adapter out")
    if arguments.verify:
        require_transformers()
    folder, manifest = open_checkpoint(checkpoint, weights_only=True)
    section = load_config(folder / "config.json").model
    if arguments.adapter:
        stored_adapter, base = StoredCheckpoint(folder, manifest), find_base(folder)
        family = export_adapter(stored_adapter, section, arguments.output, base=base)
        sys.stdout.write(f"{folder} -> {arguments.output} (adapters of {family.model_type})\n")
        return 0
    stored, model = merged(StoredCheckpoint(folder, manifest), section)
    template = folder / "tokenizer" / "chat_template.jinja"
    family = export(
        stored,
        model,
        load_tokenizer(folder / "tokenizer"),
        arguments.output,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.max_shard_gb * 10**9),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
    )
    sys.stdout.write(f"{folder} -> {arguments.output} ({family.architecture})\n")
    if not arguments.verify:
        return 0
    error, limit = verify(arguments.output)
    sys.stdout.write(f"largest difference of the scores: {error:.1e} (limit {limit:.0e})\n")
    return 0 if error <= limit else 1


if __name__ == "__main__":
    run_main(main)
