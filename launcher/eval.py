"""Measure a trained model on shards: loss, perplexity, bits per byte."""

from __future__ import annotations

import json
import sys

from megalite.errors import CommandError
from megalite.log import command_parser, run_main

_EXAMPLES = """examples:
  python launcher/eval.py --checkpoint runs/smoke
  python launcher/eval.py --checkpoint runs/smoke --data data/smoke/valid --json
"""


def main() -> None:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a step folder, or a run folder"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="a shard folder (default: the run file's data.valid)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    from megalite.config import SourceConfig
    from megalite.data import open_valid
    from megalite.evaluate import open_model, score

    opened = open_model(arguments.checkpoint)
    config = opened.config
    data = config.data
    if arguments.data:
        data = data.model_copy(update={"valid": (SourceConfig(path=arguments.data),)})
    dataset = open_valid(data, vocab_size=config.model.vocab_size)
    if dataset is None:
        raise CommandError("the run file names no data.valid: say what to measure with --data DIR")
    if dataset.tokenizer_sha256 not in ("", opened.manifest.tokenizer_sha256):
        raise CommandError(
            f"{dataset.sources[0].folder} was made with another tokenizer than the model's; "
            f"tokenize it again with --tokenizer {opened.folder / 'tokenizer'}"
        )
    result = score(
        opened.loss,
        dataset,
        opened.tokenizer,
        samples=dataset.windows,
        micro_batch_size=config.training.micro_batch_size,
    )
    result["tasks"] = None
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name in ("loss", "perplexity", "bits_per_byte", "tokens"):
        value = result[name]
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if value else "-"
        sys.stdout.write(f"{name:<14} {text}\n")


if __name__ == "__main__":
    run_main(main)
