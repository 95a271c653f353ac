"""Continue prompts with a trained model."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalite import env, hub
from megalite.cli import CommandParser, add_ranks, command_parser
from megalite.errors import CommandError
from megalite.log import printable_pieces
from megalite.workflows import make_answerer

if TYPE_CHECKING:
    from data_prep.conversations import Conversation
    from megalite.evaluate import LoadedModel, Sampling
    from megalite.parallel import Grid

_EXAMPLES = """examples:
  megalite generate runs/smoke --prompt "def main("
  megalite generate runs/smoke/checkpoints/step_00000300 \\
      --prompt "import os" "class Node" --temperature 0 --max-new-tokens 40
  megalite generate runs/sft --chat --prompt "What is 2 plus 2?"
  megalite generate runs/sft --chat --system "Answer in one word."
  megalite generate runs/sft --chat --messages talks.jsonl --json
  torchrun --nproc-per-node 2 --no-python megalite generate path/of/a/hugging-face-folder \\
      --prompt "Once upon a time" --top-p 0.9 --repetition-penalty 1.2

Prompts are continued together and printed in their order. Several ranks share the model.
With --chat, and neither --prompt nor --messages, each line of standard input is a turn of one
conversation; on a terminal `exit` or Ctrl-D ends it.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--checkpoint")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a step folder, a run folder, a model folder of Hugging Face's, or a model of the hub "
        "(ORG/NAME, ORG/NAME@REVISION)",
    )
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more")
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a user's turn; print the answer alone"
    )
    parser.add_argument(
        "--messages",
        metavar="FILE",
        help='--chat: answer the conversations of a file, a line each: {"messages": [...]}',
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="--chat: the system turn (default: the template's own)"
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
    parser.add_argument("--json", action="store_true", help="a JSON object a line for each text")
    add_ranks(parser, "one; more share the model")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other or have no effect.

    Raises:
        CommandError: the first of them.
    """
    if arguments.max_new_tokens < 0:
        raise CommandError(f"--max-new-tokens {arguments.max_new_tokens}: give 0 or more")
    if "" in arguments.stop:
        raise CommandError("--stop: an empty text would end everything at once; remove it")
    if not arguments.chat:
        if arguments.messages is not None or arguments.system is not None:
            raise CommandError("--messages and --system only apply to a chat; add --chat")
        if arguments.prompt is None:
            raise CommandError("--prompt is missing; give a text to continue, or --chat to talk")
    if arguments.prompt is not None and arguments.messages is not None:
        raise CommandError("--prompt and --messages are both given; remove one")


def main() -> None:
    arguments = make_parser().parse_args()
    launch = env.find_launch()
    check(arguments)
    checkpoint = hub.find_model(arguments.checkpoint, "--checkpoint")  # before torch is imported
    from data_prep.conversations import read_questions
    from megalite.evaluate import Sampling, open_model
    from megalite.parallel import start

    sampling = Sampling(
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.seed,
        arguments.repetition_penalty,
    )
    questions = None
    if arguments.messages is not None:
        questions = read_questions(arguments.messages, arguments.system)
    ranks = launch.world_size
    grid = start(launch, tensor=ranks) if ranks > 1 else None
    opened = open_model(checkpoint, grid)
    for stream in (sys.stdin, sys.stdout):  # whatever the terminal says: text is UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    out = sys.stdout if launch.rank == 0 else io.StringIO()
    pieces = (
        converse(opened, arguments, sampling, questions, grid)
        if arguments.chat
        else continue_prompts(opened, arguments, sampling)
    )
    for piece in printable_pieces(pieces, terminal=out.isatty()):
        out.write(piece)
        out.flush()


def continue_prompts(
    opened: LoadedModel, arguments: argparse.Namespace, sampling: Sampling
) -> Iterator[str]:
    """Yield what is printed: prompts with their continuations, or JSON lines."""
    from megalite.evaluate import in_order, json_lines, stream_texts

    for prompt in arguments.prompt:
        opened.check_prompt(prompt)
    pieces = stream_texts(
        opened.decoder(),
        opened.tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=arguments.stop,
    )
    if arguments.json:
        return json_lines(pieces, [{"prompt": prompt} for prompt in arguments.prompt])
    return in_order(pieces, arguments.prompt)


def converse(
    opened: LoadedModel,
    arguments: argparse.Namespace,
    sampling: Sampling,
    questions: list[Conversation] | None,
    grid: Grid | None,
) -> Iterator[str]:
    """Yield what is printed of a chat: answers alone, or JSON lines."""
    from data_prep.conversations import Conversation, replace_system
    from megalite.evaluate import in_order, json_lines, read_turns

    answerer = make_answerer(
        opened,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=arguments.stop,
    )
    system = replace_system([], arguments.system)
    if arguments.prompt is None and questions is None:
        share = None if grid is None else (lambda line: grid.all_gather_objects(line)[0])
        turns = read_turns(sys.stdin, sys.stdout, first=grid is None or grid.rank == 0, share=share)
        for text, answer in answerer.talk(turns, system):
            if arguments.json:
                yield from json_lines(((0, piece) for piece in answer), [{"prompt": text}])
            else:
                yield from answer
                yield "\n"
        return
    prompts = arguments.prompt or []
    asked = questions or [
        Conversation([*system, {"role": "user", "content": prompt}]) for prompt in prompts
    ]
    pieces = answerer.answers(asked)
    if arguments.json:
        given = [{"messages": question.messages} for question in asked]
        yield from json_lines(pieces, given)
    else:
        yield from in_order(pieces, [""] * len(asked))
