"""Continue prompts with a trained model."""

from __future__ import annotations

import argparse
import io
import sys

from megalite import env
from megalite.errors import CommandError
from megalite.formats import hub
from megalite.log import command_parser, run_main

_EXAMPLES = """examples:
  python launcher/generate.py --checkpoint runs/smoke --prompt "def main("
  python launcher/generate.py --checkpoint runs/smoke/checkpoints/step_00000300 \\
      --prompt "import os" "class Node" --temperature 0 --max-new-tokens 40
  python launcher/generate.py --checkpoint runs/sft --chat --prompt "What is 2 plus 2?"
  torchrun --nproc-per-node 2 launcher/generate.py --checkpoint path/of/a/hugging-face-folder \\
      --prompt "Once upon a time" --top-p 0.9 --repetition-penalty 1.2

Prompts are continued together and printed in their order. Several ranks share the model.
"""


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, _EXAMPLES)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a step folder, a run folder, a model folder of Hugging Face's, or a model of the hub "
        "(ORG/NAME, ORG/NAME@REVISION)",
    )
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more")
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a user's turn; print the answer alone"
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="of a text")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest token"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest P")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="over 1: repeat less"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    launch = env.find_launch()
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint")  # before torch is imported
    from data_prep.chat import Chat, find_template
    from megalite.evaluate import Sampling, in_order, open_model, stream_texts
    from megalite.parallel import start

    sampling = Sampling(
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.seed,
        arguments.repetition_penalty,
    )
    if arguments.max_new_tokens < 0:
        raise CommandError(f"--max-new-tokens {arguments.max_new_tokens}: ask for 0 or more")
    if "" in arguments.stop:
        raise CommandError("--stop: an empty text would end everything at once; leave it out")
    ranks = launch.world_size
    opened = open_model(checkpoint, start(launch, tensor_parallel=ranks) if ranks > 1 else None)
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever the terminal says: text is UTF-8
        sys.stdout.reconfigure(encoding="utf-8")
    for prompt in arguments.prompt:
        opened.check_prompt(prompt)
    out = sys.stdout if launch.rank == 0 else io.StringIO()
    prompts, stop, starts = arguments.prompt, arguments.stop, arguments.prompt
    if arguments.chat:
        chat = Chat(find_template(None, None, opened.tokenizer_folder), opened.tokenizer)
        turns = [chat.ask(prompt) for prompt in prompts]
        prompts, starts = [asked for asked, _ in turns], [""] * len(turns)
        stop = [*stop, *{end for _, end in turns if end}]
    pieces = stream_texts(
        opened.reader(),
        opened.tokenizer,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=stop,
        controls=arguments.chat,
    )
    for piece in in_order(pieces, starts):
        out.write(piece)
        out.flush()


if __name__ == "__main__":
    run_main(main, ranks=True)
