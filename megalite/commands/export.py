"""Export a checkpoint as a model folder of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path

from megalite import hub
from megalite.cli import CommandParser, command_parser
from megalite.config.tasks import find_task
from megalite.errors import CommandError, DataError
from megalite.log import logger, write_report
from megalite.tokenizers.tokenizer import Tokenizer, load_tokenizer

_EXAMPLES = """examples:
  megalite export runs/smoke --output exported/smoke --verify
  megalite export runs/7b --output exported/7b --dtype bfloat16

--verify loads the folder with transformers and with MegaLite. It compares logits, token ids, and
the tokens that end a text, and exits with 1 if they differ. It needs: pip install megalite[hf].
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--checkpoint")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="step folder or run folder"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="new folder to create"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="data type of the weights (default: float32)",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="maximum size of a weight file, in 10^9 bytes (default: 5)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the exported model with transformers"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="export only the LoRA adapter, in PEFT's format"
    )
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    if not arguments.max_shard_gb > 0:
        raise CommandError(f"--max-shard-gb {arguments.max_shard_gb}: give a size above 0")
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint", weights=False)
    from megalite.checkpoint import StoredCheckpoint, find_base, merge_lora, open_checkpoint
    from megalite.checkpoint.huggingface import export, export_adapter
    from megalite.config import load_stored
    from megalite.evaluate.verify import require_transformers, verify, verify_text

    if arguments.verify and arguments.adapter:
        raise CommandError("--verify compares a whole model; remove --verify or --adapter")
    if arguments.verify:
        require_transformers()
    folder, manifest = open_checkpoint(checkpoint, weights_only=True)
    run = load_stored(folder / "config.json")
    if arguments.adapter:
        stored_adapter = StoredCheckpoint(folder, manifest)
        base = find_base(folder)
        family = export_adapter(stored_adapter, run.model, arguments.output, base=base)
        write_report(f"{folder} -> {arguments.output} (adapters of {family.model_type})\n")
        return 0
    stored, model = merge_lora(StoredCheckpoint(folder, manifest), run.model)
    tokenizer_folder = folder / "tokenizer"
    template = tokenizer_folder / "chat_template.jinja"
    tokenizer = load_tokenizer(tokenizer_folder)
    chat = run.finetune is not None and find_task(run.finetune.task).uses_template
    family = export(
        stored,
        model,
        tokenizer,
        arguments.output,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.max_shard_gb * 10**9),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        ends=_end_of_turn(tokenizer_folder, tokenizer) if chat else (),
    )
    write_report(f"{folder} -> {arguments.output} ({family.architecture})\n")
    if not arguments.verify:
        return 0
    error, limit = verify(arguments.output)
    write_report(f"largest difference of the logits: {error:.1e} (limit {limit:.0e})\n")
    faults = verify_text(arguments.output)
    write_report(
        "".join(f"{fault}\n" for fault in faults) or "texts: the same token ids and end tokens\n"
    )
    return 0 if error <= limit and not faults else 1


def _end_of_turn(tokenizer_folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the token that ends an answer in the chat template. The list is empty without one."""
    from data_prep.chat import ask

    try:
        _, end = ask(tokenizer_folder, tokenizer, "x")
    except DataError as error:
        logger.warning("the exported folder does not define the end of a turn: %s", error)
        return []
    ids, _ = tokenizer.encode_with_offsets(end)
    if len(ids) > 1:
        logger.warning(
            "the chat template ends a turn with %r, which is %d tokens; give it to other programs "
            "as a stop string, because they stop only at one token",
            *(end, len(ids)),
        )
    return ids if len(ids) == 1 else []
