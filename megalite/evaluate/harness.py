"""lm-evaluation-harness on a MegaLite model, over any number of ranks.

Each group of tensor ranks answers its share of the requests. Then every rank gets all answers, so
the harness runs as if there was one rank.

Requests are pairs of token lists, context and continuation. B rows   T tokens   V vocabulary
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalite.errors import CommandError, DataError
from megalite.evaluate.generate import Sampling, stream_texts
from megalite.evaluate.loading import LoadedModel
from megalite.parallel import Grid
from megalite.tokenizers.tokenizer import encode_text


def require() -> None:
    """Raise CommandError if the package lm_eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise CommandError("--tasks needs the package lm_eval: pip install megalite[eval]")


def run(
    loaded: LoadedModel,
    grid: Grid,
    tasks: Sequence[str],
    *,
    path: str | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Return the metrics of each task, as numbers by "name" or "name_stderr".

    Raises:
        CommandError: a task is unknown, or the model does not continue text.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    if loaded.config.architecture != "decoder":
        raise CommandError(
            f"--tasks: {loaded.folder} is an {loaded.config.architecture}; give a decoder"
        )
    manager = TaskManager(include_path=path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise CommandError(
            f"--tasks {unknown[0]}: lm-eval has no such task; choose one of `lm_eval ls tasks`"
        )
    try:
        evaluation = lm_eval.simple_evaluate(
            model=make_model(loaded, grid, batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
        )
    except (OSError, ConnectionError) as error:
        raise DataError(f"--tasks: the data of a task cannot be read: {error}") from error
    results = {}
    for task, metrics in (evaluation or {}).get("results", {}).items():  # empty but on rank 0
        numbers = {k.split(",")[0]: v for k, v in metrics.items() if isinstance(v, int | float)}
        results[task] = numbers
    return results


def make_model(loaded: LoadedModel, grid: Grid, batch_size: int) -> Any:
    """Return the model wrapped in the harness's class of models."""
    from lm_eval.api.model import LM

    class MegaLiteLM(LM):
        """Model that answers the three kinds of requests of the harness."""

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            pairs = [_pair(loaded, *request.args) for request in requests]
            return _share(grid, pairs, lambda part: log_likelihoods(loaded, part, batch_size))

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            texts = [_windows(loaded, request.args[0]) for request in requests]
            pairs = [pair for windows in texts for pair in windows]
            results = _share(grid, pairs, lambda part: log_likelihoods(loaded, part, batch_size))
            sums = list[float]()
            rest = iter(results)
            for windows in texts:
                sums.append(sum(next(rest)[0] for _ in windows))
            return sums

        def generate_until(self, requests: Any) -> list[str]:
            prompts = list[tuple[str, Mapping[str, Any], int]]()
            seen = Counter[str]()
            for context, settings in (request.args for request in requests):
                GenerationSettings.of(settings)
                prompts.append((context, settings, seen[context]))
                seen[context] += 1  # a task that needs several answers repeats the request
            return _share(grid, prompts, lambda part: [_write(loaded, *prompt) for prompt in part])

    return MegaLiteLM()


Pair = tuple[list[int], list[int]]
# names of the limit of new tokens; the first one that is set counts
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLED = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_USED = ("until", *_LENGTHS, *_SAMPLED)
# settings of other programs that are not supported, with their values that have no effect
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "typical_p": (1.0,),
    "min_p": (0.0,),
    "penalty_alpha": (0.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "early_stopping": (False, True),
    "use_cache": (True, False),
}


def log_likelihoods(
    loaded: LoadedModel, pairs: Sequence[Pair], batch_size: int
) -> list[tuple[float, bool]]:
    """Return each continuation's log-probability (nats), and whether greedy decoding gives it.

    Batches contain pairs of similar lengths. Tokens before the model's window are removed.
    """
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    window = loaded.config.max_position_embeddings
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [(pairs[i][0] + pairs[i][1])[-(window + 1) :] for i in chosen]
        ids_BT = torch.zeros(len(rows), max(len(row) - 1 for row in rows), dtype=torch.int64)
        for number, row in enumerate(rows):  # causal attention does not see the padding
            ids_BT[number, : len(row) - 1] = torch.tensor(row[:-1])
        with torch.inference_mode():
            hidden_BTD = loaded.model.hidden({"input_ids": ids_BT.to(loaded.device)})
            for number, (i, row) in enumerate(zip(chosen, rows, strict=True)):
                count = min(len(pairs[i][1]), len(row) - 1)
                place = slice(len(row) - 1 - count, len(row) - 1)
                logits_CV = loaded.model.scores(hidden_BTD[number, place])
                labels_C = torch.tensor(row[-count:], device=logits_CV.device)
                log_p = logits_CV.log_softmax(dim=-1).gather(1, labels_C[:, None])
                greedy = bool((logits_CV.argmax(dim=-1) == labels_C).all())
                results[i] = (float(log_p.double().sum()), greedy)
    return results


def _pair(loaded: LoadedModel, context: str, continuation: str) -> Pair:
    """Return the tokens of context and continuation, divided as in the harness's own model class.

    Spaces at the end of the context belong to the continuation. The continuation's tokens start
    after as many tokens as the context alone has.
    """
    if not context:
        before = _beginning(loaded)
        ids = loaded.tokenizer.encode(continuation)
        loaded.check_ids(ids)
        # a BOS at the start of the continuation is context and not scored
        return (ids[:1], ids[1:]) if ids[:1] == before else (before, ids)
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = encode_text(loaded.tokenizer, stripped + continuation)
    before = encode_text(loaded.tokenizer, stripped)
    loaded.check_ids(whole)
    return before, whole[len(before) :]


def _beginning(loaded: LoadedModel) -> list[int]:
    first = loaded.tokenizer.bos_id
    first = loaded.tokenizer.eos_id if first is None else first
    return [0 if first is None else first]


def _windows(loaded: LoadedModel, text: str) -> list[Pair]:
    """Return a text in parts that fill the window, each with the token before it as context.

    A BOS that the tokenizer adds is scored, too, as in the harness's own model class.
    """
    ids = encode_text(loaded.tokenizer, text)
    size = loaded.config.max_position_embeddings
    loaded.check_ids(ids)
    before = _beginning(loaded)
    pairs = list[Pair]()
    for first in range(0, len(ids), size):
        part = ids[first : first + size]
        # the context of the last part fills the rest of the window
        context = ids[max(0, first + len(part) - size - 1) : first] if first else before
        pairs.append((context, part))
    return pairs


def _write(loaded: LoadedModel, context: str, settings: Mapping[str, Any], repeat: int = 0) -> str:
    """Return the answer to a context. `repeat` is added to the seed."""
    parsed = GenerationSettings.of(settings)
    seed = parsed.sampling.get("seed", 0) + repeat
    pieces = stream_texts(
        loaded.decoder(),
        loaded.tokenizer,
        [context],
        max_new_tokens=parsed.max_new_tokens,
        sampling=Sampling(**{**parsed.sampling, "seed": seed}),
        stop=parsed.until,
    )
    return "".join(piece for _, piece in pieces)


@dataclass(frozen=True)
class GenerationSettings:
    """A task's `generation_kwargs`, with the meaning of the harness's own model class.

    Attributes:
        sampling: arguments of `Sampling`.
        until: strings that end an answer.
    """

    max_new_tokens: int
    sampling: Mapping[str, Any]
    until: Sequence[str]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> GenerationSettings:
        """Parse a task's settings.

        Raises:
            CommandError: a setting is not supported, or a value is invalid.
        """
        for key, value in settings.items():
            if key not in _USED and not (key in _NEUTRAL and value in (None, *_NEUTRAL[key])):
                if key in _NEUTRAL:
                    advice = f"only {_NEUTRAL[key][0]} is supported; set it to that"
                else:
                    advice = f"the key is not supported; use {', '.join(_USED)}"
                raise CommandError(
                    f"--tasks: generation_kwargs.{key}: {value!r}: {advice} in the task's file, or "
                    "remove the key"
                )
        lengths = [settings[key] for key in _LENGTHS if settings.get(key) is not None]
        length = _number("max_gen_toks", lengths[0] if lengths else 256)
        return cls(int(length), _sampling(settings), _until(settings.get("until")))


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `Sampling`: greedy unless the task sets a temperature over 0."""
    do_sample = settings.get("do_sample")
    temperature = settings.get("temperature")
    if do_sample not in (None, False, True):
        raise CommandError(
            f"--tasks: generation_kwargs.do_sample: {do_sample!r}; give true or false"
        )
    if temperature is None:
        temperature = 1.0 if do_sample else 0.0
    arguments: dict[str, Any] = {"temperature": _number("temperature", temperature)}
    if do_sample is False:
        arguments["temperature"] = 0.0
    for key in ("top_p", "top_k", "repetition_penalty", "seed"):
        if settings.get(key) is not None:
            arguments[key] = _number(key, settings[key])
    for key in ("top_k", "seed"):
        if key in arguments:
            arguments[key] = int(arguments[key])
    if arguments.get("top_k", 1) <= 0:  # some tasks write 0 or -1 for all tokens
        del arguments["top_k"]
    return arguments


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise CommandError(
            f"--tasks: generation_kwargs.{key}: {value!r} is no number; give one"
        ) from None


def _until(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    texts = [text for text in texts if text]
    if not all(isinstance(text, str) for text in texts):
        raise CommandError(f"--tasks: generation_kwargs.until: {value!r}; give texts")
    return texts


def _share(grid: Grid, requests: Sequence[Any], answer: Any) -> list[Any]:
    """Return the answers to all requests, each of which one data rank computes."""
    size = grid.mesh.data
    parts = grid.gather_once(answer(requests[grid.at.data_rank :: size]))
    answers: list[Any] = [None] * len(requests)
    for rank, part in enumerate(parts):
        answers[rank::size] = part
    return answers
