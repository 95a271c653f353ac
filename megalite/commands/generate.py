"""Generate text from prompts, or chat, with a trained model."""

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

All prompts are generated as one batch and printed in their order. With --chat, but without --prompt
and --messages, each line of standard input is a user turn of one conversation. On a terminal,
`exit` or Ctrl-D ends the conversation.
"""


def make_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__, _EXAMPLES, first="--checkpoint")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="step folder, run folder, Hugging Face model folder, or model of the hub (ORG/NAME, "
        "ORG/NAME@REVISION)",
    )
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue")
    parser.add_argument(
        "--chat", action="store_true", help="read each prompt as a user turn; print only the answer"
    )
    parser.add_argument(
        "--messages",
        metavar="FILE",
        help='with --chat: file of conversations to answer, one per line: {"messages": [...]}',
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="with --chat: system turn (default: that of the chat template)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=100,
        metavar="N",
        help="maximum number of tokens to generate per text (default: 100)",
    )
    _add_sampling(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per text, each on its own line"
    )
    add_ranks(parser, "one; several share the model by tensor parallelism")
    return parser


def _add_sampling(parser: CommandParser) -> None:
    add = parser.add_argument
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="sampling temperature; 0 takes the most likely token (default: 1)",
    )
    add("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the fewest tokens whose probabilities sum to P",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="penalty on tokens that occur in the text; above 1 repeats less (default: 1)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a text before TEXT; may be repeated",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other or have no effect.

    Raises:
        CommandError: the first invalid option.
    """
    if arguments.max_new_tokens < 0:
        raise CommandError(f"--max-new-tokens {arguments.max_new_tokens}: give 0 or more")
    if "" in arguments.stop:
        raise CommandError("--stop: an empty text would end every text at once; remove it")
    if not arguments.chat:
        if arguments.messages is not None or arguments.system is not None:
            raise CommandError("--messages and --system only apply to a chat; add --chat")
        if arguments.prompt is None:
            raise CommandError("--prompt is missing; add --prompt TEXT, or add --chat to talk")
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
    loaded = open_model(checkpoint, grid)
    for stream in (sys.stdin, sys.stdout):  # text is UTF-8 in every locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    out = sys.stdout if launch.rank == 0 else io.StringIO()
    pieces = (
        converse(loaded, arguments, sampling, questions, grid)
        if arguments.chat
        else continue_prompts(loaded, arguments, sampling)
    )
    for piece in printable_pieces(pieces, terminal=out.isatty()):
        out.write(piece)
        out.flush()


def continue_prompts(
    loaded: LoadedModel, arguments: argparse.Namespace, sampling: Sampling
) -> Iterator[str]:
    """Yield the output: prompts with their continuations, or JSON lines."""
    from megalite.evaluate import in_order, json_lines, stream_texts

    for prompt in arguments.prompt:
        loaded.check_prompt(prompt)
    pieces = stream_texts(
        loaded.decoder(),
        loaded.tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=arguments.stop,
    )
    if arguments.json:
        return json_lines(pieces, [{"prompt": prompt} for prompt in arguments.prompt])
    return in_order(pieces, arguments.prompt)


def converse(
    loaded: LoadedModel,
    arguments: argparse.Namespace,
    sampling: Sampling,
    questions: list[Conversation] | None,
    grid: Grid | None,
) -> Iterator[str]:
    """Yield the output of a chat: only the answers, or JSON lines."""
    from data_prep.conversations import Conversation, replace_system
    from megalite.evaluate import in_order, json_lines, read_turns

    answerer = make_answerer(
        loaded,
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
    conversations = questions or [
        Conversation([*system, {"role": "user", "content": prompt}]) for prompt in prompts
    ]
    pieces = answerer.answers(conversations)
    if arguments.json:
        inputs = [{"messages": conversation.messages} for conversation in conversations]
        yield from json_lines(pieces, inputs)
    else:
        yield from in_order(pieces, [""] * len(conversations))
