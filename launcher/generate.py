"""Continue prompts with a trained model."""

from __future__ import annotations

import io
import sys

from megalite.errors import CommandError
from megalite.log import command_parser, run_main

_EXAMPLES = """examples:
  python launcher/generate.py --checkpoint runs/smoke --prompt "def main("
  python launcher/generate.py --checkpoint runs/smoke/checkpoints/step_00000300 \\
      --prompt "import os" "class Node" --temperature 0 --max-new-tokens 40
"""


def main() -> None:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a step folder, or a run folder"
    )
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the likeliest token"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest P")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    from megalite.evaluate import Sampling, open_model, stream_text

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if arguments.max_new_tokens < 0:
        raise CommandError(f"--max-new-tokens {arguments.max_new_tokens}: ask for 0 or more")
    if "" in arguments.stop:
        raise CommandError("--stop: an empty text would end everything at once; leave it out")
    opened = open_model(arguments.checkpoint)
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever the terminal says: text is UTF-8
        sys.stdout.reconfigure(encoding="utf-8")
    for prompt in arguments.prompt:
        opened.check_prompt(prompt)
        sys.stdout.write(prompt)
        for piece in stream_text(
            opened.last_logits,
            opened.tokenizer,
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            stop=arguments.stop,
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


if __name__ == "__main__":
    run_main(main)
