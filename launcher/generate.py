"""Continue prompts with a trained model: a checkpoint folder is all it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megalite.log import run_main

_EXAMPLES = """examples:
  python launcher/generate.py --checkpoint runs/smoke --prompt "def "
  python launcher/generate.py --checkpoint runs/1b/checkpoints/step_00001000 \\
      --prompt "Once" "Then" --temperature 0.7 --top-p 0.9 --stop "." --seed 1
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="a step folder, or a run folder: its newest")
    add(
        "--prompt",
        required=True,
        nargs="+",
        metavar="TEXT",
        help="each text is continued by itself",
    )
    add("--max-new-tokens", type=int, default=100, metavar="N", help="at most (default 100)")
    add("--temperature", type=float, default=1.0, help="0: always the likeliest (default 1.0)")
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="choose among the fewest that make up share P")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    add("--seed", type=int, default=0, metavar="N", help="the same seed, the same text (default 0)")
    return parser.parse_args()


def continuations(arguments: argparse.Namespace) -> Iterator[tuple[str, Iterator[str]]]:
    """Each prompt with the pieces of its continuation."""
    import torch

    from megalite.checkpoint import fill_model, open_checkpoint
    from megalite.config import load_config
    from megalite.evaluate import Sampling, stream_text
    from megalite.formats.tokenizer import load_tokenizer
    from megalite.model import build

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    folder, manifest = open_checkpoint(arguments.checkpoint)
    config = load_config(folder / "config.json").model
    tokenizer = load_tokenizer(folder / "tokenizer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(config).to(device).eval()
    fill_model(model, config, folder, manifest)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        window = ids[:, -config.max_position_embeddings :]
        return model.logits(window.to(device), last_only=True)

    for prompt in arguments.prompt:
        yield (
            prompt,
            stream_text(
                logits,
                tokenizer,
                prompt,
                max_new_tokens=arguments.max_new_tokens,
                sampling=sampling,
                stop=arguments.stop,
            ),
        )


def main() -> None:
    for prompt, pieces in continuations(parse()):
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


if __name__ == "__main__":
    run_main(main)
