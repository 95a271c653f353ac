"""Write a checkpoint as a folder that Hugging Face's transformers loads."""

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

--verify loads the folder with transformers and with MegaLite, compares scores, the ids of texts and
what ends a text, and ends with 1 if they differ (pip install megalite[hf]).
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--checkpoint")
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
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    if not arguments.max_shard_gb > 0:
        raise CommandError(f"--max-shard-gb {arguments.max_shard_gb}: give a size over 0")
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint", weights=False)
    from megalite.checkpoint import StoredCheckpoint, find_base, merge_lora, open_checkpoint
    from megalite.checkpoint.huggingface import export, export_adapter
    from megalite.config import load_stored
    from megalite.evaluate.verify import require_transformers, verify, verify_text

    if arguments.verify and arguments.adapter:
        raise CommandError("--verify compares a whole model: leave --adapter out")
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
    place = folder / "tokenizer"
    template = place / "chat_template.jinja"
    tokenizer = load_tokenizer(place)
    chat = run.finetune is not None and find_task(run.finetune.task).uses_template
    family = export(
        stored,
        model,
        tokenizer,
        arguments.output,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.max_shard_gb * 10**9),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        ends=_end_of_turn(place, tokenizer) if chat else (),
    )
    write_report(f"{folder} -> {arguments.output} ({family.architecture})\n")
    if not arguments.verify:
        return 0
    error, limit = verify(arguments.output)
    write_report(f"largest difference of the scores: {error:.1e} (limit {limit:.0e})\n")
    faults = verify_text(arguments.output)
    write_report("".join(f"{fault}\n" for fault in faults) or "texts: the same ids and ends\n")
    return 0 if error <= limit and not faults else 1


def _end_of_turn(place: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the token that ends an answer by the chat template in a tokenizer's folder."""
    from data_prep.chat import ask

    try:
        _, end = ask(place, tokenizer, "x")
    except DataError as error:
        logger.warning("the end of a turn is not known to the exported folder: %s", error)
        return []
    ids, _ = tokenizer.encode_with_offsets(end)
    if len(ids) > 1:
        logger.warning(
            "the chat template ends a turn with %r, which is %d tokens: other programs stop there "
            "only if they are given it as a stop string",
            *(end, len(ids)),
        )
    return ids if len(ids) == 1 else []
