"""Rules between fields of a run file that are valid one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from megalite import registry
from megalite.config.deepspeed_keys import zero_stage
from megalite.config.faults import ConfigFault, fault, show
from megalite.config.finetune_rules import finetune_faults, has_held_out
from megalite.config.model import ModelConfig
from megalite.config.objective import source_length, spans, target_length
from megalite.config.schema import RunConfig
from megalite.config.tasks import find_task


def rule_faults(config: RunConfig) -> Iterator[ConfigFault]:
    """Yield the faults of all rules, for a config whose fields are valid one by one."""
    yield from _heads(config)
    yield from _shares(config)
    yield from _families(config)
    yield from _layer_types(config)
    yield from finetune_faults(config) if config.finetune else _pretraining(config)
    yield from _positions(config)
    yield from _tokens_of_ranks(config)
    yield from _sources(config)
    yield from _batches(config)
    yield from _length(config)
    yield from _schedule(config)
    yield from _retention(config)
    yield from _names(config)
    yield from _precision(config)
    yield from _profile(config)
    yield from _samples(config)


def _heads(config: RunConfig) -> Iterator[ConfigFault]:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if "head_dim" not in model.model_fields_set and model.hidden_size % heads:
        near = [model.hidden_size // heads * heads, (model.hidden_size // heads + 1) * heads]
        yield fault(
            "model.hidden_size model.num_attention_heads",
            f"{model.hidden_size} is not a multiple of num_attention_heads {heads}; try "
            f"{' or '.join(str(n) for n in near if n)}, or set model.head_dim",
        )
    elif model.position_embedding == "rope" and model.head_dim % 2:
        yield fault(
            "model.head_dim model.hidden_size model.num_attention_heads model.position_embedding",
            f"rope needs an even head width, got {model.head_dim}; make it even",
        )
    if heads % groups:
        yield fault(
            "model.num_key_value_heads model.num_attention_heads",
            f"{groups} does not divide num_attention_heads {heads}; try "
            f"{', '.join(str(n) for n in _divisors(heads))}",
        )


def allowed_tensor_sizes(model: ModelConfig) -> list[int]:
    """Return the valid tensor-parallel sizes: the common divisors of key/value heads and MLP."""
    shared = model.num_attention_heads, model.num_key_value_heads, model.intermediate_size
    return _divisors(math.gcd(*shared))


def _shares(config: RunConfig) -> Iterator[ConfigFault]:
    model = config.model
    tensor = config.parallel.tensor
    allowed = allowed_tensor_sizes(model)
    if tensor not in allowed:
        yield fault(
            "parallel.tensor model.num_attention_heads model.num_key_value_heads "
            "model.intermediate_size",
            f"{tensor} does not divide the key/value heads ({model.num_key_value_heads}) and the "
            f"MLP ({model.intermediate_size}); try {' or '.join(map(str, allowed))}",
        )


def _length_key(config: RunConfig) -> str:
    """Return the key that sets the length of a sample."""
    tuning = config.finetune
    length = config.data.sequence_length
    is_filled = tuning is not None and tuning.data.max_length == length
    return "finetune.data.max_length" if is_filled else "data.sequence_length"


def _positions(config: RunConfig) -> Iterator[ConfigFault]:
    model = config.model
    length = config.data.sequence_length
    if length > model.max_position_embeddings:
        yield fault(
            f"{_length_key(config)} data.sequence_length model.max_position_embeddings",
            f"{length} is over model.max_position_embeddings {model.max_position_embeddings}; "
            "lower the first or raise the second",
        )
    if model.position_embedding == "sinusoidal" and model.hidden_size % 2:
        yield fault(
            "model.hidden_size model.position_embedding",
            f"sinusoidal positions need an even hidden_size, got {model.hidden_size}; make it even",
        )


def _families(config: RunConfig) -> Iterator[ConfigFault]:
    """Yield keys that do not apply to the architecture or the position embedding."""
    model = config.model
    kind, scaling = model.architecture, model.rope_scaling
    for key, value, applies, scope in (
        (
            "num_decoder_layers",
            model.num_decoder_layers,
            kind == "encoder_decoder",
            'architecture "encoder_decoder"',
        ),
        ("sliding_window", model.sliding_window, kind == "decoder", 'architecture "decoder"'),
        ("layer_types", model.layer_types, kind == "decoder", 'architecture "decoder"'),
        ("type_vocab_size", model.type_vocab_size, kind == "encoder", 'architecture "encoder"'),
        (
            "rope_scaling",
            scaling,
            model.position_embedding == "rope",
            'position_embedding "rope"',
        ),
    ):
        if value and not applies:
            yield fault(f"model.{key}", f"only applies to {scope}; remove it")
    if scaling and scaling.rope_type != "linear" and not scaling.original_max_position_embeddings:
        yield fault(
            "model.rope_scaling.original_max_position_embeddings",
            f"{scaling.rope_type} needs the original context length; set it, in tokens",
        )


def _layer_types(config: RunConfig) -> Iterator[ConfigFault]:
    """Yield the faults of `layer_types`."""
    model = config.model
    kinds, layers = model.layer_types, model.num_hidden_layers
    if kinds is None:
        return
    if layers % len(kinds):
        possible = ", ".join(str(n) for n in _divisors(layers))
        yield fault(
            "model.layer_types model.num_hidden_layers",
            f"its length {len(kinds)} does not divide the {layers} layers; use a list of "
            f"{possible}",
        )
    if "sliding_attention" in kinds and model.sliding_window is None:
        yield fault(
            "model.layer_types model.sliding_window",
            "sliding_attention needs a window; set model.sliding_window, in tokens",
        )
    if "sliding_attention" not in kinds and model.sliding_window is not None:
        yield fault(
            "model.sliding_window model.layer_types",
            "no layer has sliding_attention; add it to model.layer_types, or remove sliding_window",
        )


def _pretraining(config: RunConfig) -> Iterator[ConfigFault]:
    if not config.data.train:
        yield fault("data.train", "got an empty list; name a folder of shards")
    if config.training.steps == 0:
        yield fault("training.steps", "got 0; set it to 1 or more")
    if config.model.adapter or config.model.num_labels:
        key = "adapter" if config.model.adapter else "num_labels"
        yield fault(f"model.{key}", "only applies to fine-tuning, which fills it in; remove it")
    yield from _objective(config)


def _objective(config: RunConfig) -> Iterator[ConfigFault]:
    objective = config.objective
    kind = config.model.architecture
    expected = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "span_corruption"}[
        kind
    ]
    if kind not in registry.objectives.facts(objective.name).get("architectures", (kind,)):
        yield fault(
            "objective.name model.architecture",
            f"{show(objective.name)} does not apply to architecture {show(kind)}; set it to "
            f"{show(expected)}, or remove it",
        )
    elif objective.name == "masked" and not _is_id(objective.mask_token_id, config):
        yield fault(
            "objective.mask_token_id model.vocab_size",
            f"got {show(objective.mask_token_id)}; set it to the tokenizer's mask token or to an "
            f"unused id, below model.vocab_size {config.model.vocab_size}",
        )
    elif objective.name == "span_corruption" and config.data.mask_documents:
        yield fault(
            "data.mask_documents objective.name",
            f"objective {show(expected)} cannot separate documents; set it to false",
        )
    elif objective.name == "span_corruption" and spans(config)[1] >= config.model.vocab_size:
        yield fault(
            "objective.mean_span_length model.vocab_size",
            f"{spans(config)[1]} spans need as many sentinel ids, but model.vocab_size is "
            f"{config.model.vocab_size}; raise one of the two",
        )


def _is_id(token: int | None, config: RunConfig) -> bool:
    return token is not None and token < config.model.vocab_size


def _tokens_of_ranks(config: RunConfig) -> Iterator[ConfigFault]:
    ranks, length = config.parallel.tensor, config.data.sequence_length
    if not config.parallel.sequence:
        return
    lengths = {f"{length} tokens": length}
    if config.objective.name == "span_corruption" and not config.finetune:
        source, target = source_length(config), target_length(config)
        lengths = {
            f"{source} encoder tokens (of {length})": source,
            f"{target} decoder tokens (of {length})": target,
        }
    for name, number in lengths.items():
        if number % ranks:
            near = [n for n in (length // ranks * ranks, (length // ranks + 1) * ranks) if n]
            is_whole = number == length
            advice = f"try {' or '.join(map(str, near))}" if is_whole else "try another length"
            yield fault(
                f"{_length_key(config)} data.sequence_length parallel.sequence parallel.tensor",
                f"parallel.sequence splits {name} over the ranks, but parallel.tensor {ranks} does "
                f"not divide them; {advice}, or set parallel.sequence to false",
            )


def _sources(config: RunConfig) -> Iterator[ConfigFault]:
    for name, sources in (("train", config.data.train), ("valid", config.data.valid)):
        without = [source.path for source in sources if source.weight is None]
        if without and len(without) < len(sources):
            yield fault(
                f"data.{name}",
                f"{len(sources) - len(without)} of {len(sources)} sources have a weight, but not "
                f"{', '.join(show(path) for path in without[:3])}; set weight for all or for none",
            )


def _batches(config: RunConfig) -> Iterator[ConfigFault]:
    whole, micro = config.training.global_batch_size, config.training.micro_batch_size
    if whole % micro:
        near = [whole // micro * micro, (whole // micro + 1) * micro]
        yield fault(
            "training.global_batch_size training.micro_batch_size",
            f"{whole} is not a multiple of micro_batch_size {micro}; try "
            f"{' or '.join(str(n) for n in near if n)}",
        )


def _length(config: RunConfig) -> Iterator[ConfigFault]:
    tokens, steps = config.training.tokens, config.training.steps
    text = f"{tokens} tokens, but training.steps is also set, to {steps}; remove one of the two"
    if config.finetune:
        text = "only applies to pretraining; remove it and set finetune.epochs"
    if tokens is not None:
        yield fault("training.tokens training.steps", text)


def _schedule(config: RunConfig) -> Iterator[ConfigFault]:
    schedule = config.schedule
    steps = config.training.steps
    keys = "schedule.decay_steps schedule.warmup_steps training.steps schedule.name"
    if schedule.decay_steps is None:
        return  # a warmup longer than the run is valid: a short trial of a long run
    if schedule.name == "constant":
        yield fault(keys, "a constant schedule has no decay; remove it or change schedule.name")
    elif steps and schedule.warmup_steps + schedule.decay_steps > steps:
        yield fault(
            keys,
            f"warmup_steps {schedule.warmup_steps} + decay_steps {schedule.decay_steps} is over "
            f"training.steps {steps}; shorten one, or remove decay_steps",
        )


def _retention(config: RunConfig) -> Iterator[ConfigFault]:
    every, keep = config.checkpoint.every, config.checkpoint.keep_every
    if keep and (not every or keep % every):
        saved = f"every {every} steps" if every else "only at the end"
        near = [keep // every * every, (keep // every + 1) * every] if every else []
        advice = " or ".join(str(n) for n in near if n) or "remove it, or set checkpoint.every"
        yield fault(
            "checkpoint.keep_every checkpoint.every",
            f"{keep}, but the run is saved {saved}; {'try ' if every else ''}{advice}",
        )
    if config.checkpoint.keep_best and not has_held_out(config):
        cause = "data.valid is empty; name held-out shards in it"
        if config.finetune:
            cause = "finetune.data has no held-out split; set valid_split or valid_fraction"
        yield fault(
            "checkpoint.keep_best data.valid",
            f"needs a validation score, but {cause}, or set keep_best to false",
        )


def _names(config: RunConfig) -> Iterator[ConfigFault]:
    if not re.fullmatch(r"\w[\w.-]{0,99}", config.name, re.ASCII):
        yield fault(
            "name",
            f"{show(config.name)} is not a valid folder name on every system; use up to 100 "
            "letters, digits, points, dashes and underscores, beginning with a letter or digit",
        )
    paths = {"logging.directory": config.logging.directory}
    for name, sources in (("train", config.data.train), ("valid", config.data.valid)):
        paths |= {f"data.{name}.{i}.path": source.path for i, source in enumerate(sources)}
    for key, path in paths.items():
        if not path.isprintable():
            yield fault(key, f"{show(path)} contains unprintable characters; remove them")


def _precision(config: RunConfig) -> Iterator[ConfigFault]:
    precision = config.training.precision
    if precision in ("bf16", "fp16") and zero_stage(config) == 0:
        yield fault(
            "training.precision deepspeed.zero_optimization.stage",
            f"{precision} with ZeRO stage 0 has no fp32 master weights; set "
            "deepspeed.zero_optimization.stage to 1",
        )


def _profile(config: RunConfig) -> Iterator[ConfigFault]:
    if config.training.profile is None:
        return
    (first, last), steps = config.training.profile, config.training.steps
    if not first <= last <= (steps or last):
        yield fault(
            "training.profile training.steps",
            f"[{first}, {last}] is not a range of steps of the run; set it to a first and a last "
            f"step, up to training.steps {steps}",
        )


def _samples(config: RunConfig) -> Iterator[ConfigFault]:
    encodes = config.model.architecture == "encoder"
    classifies = config.finetune is not None and find_task(config.finetune.task).has_labels
    if config.logging.samples and (encodes or classifies):
        model = "an encoder" if encodes else "a classifier"
        yield fault("logging.samples", f"{model} generates no text; remove it")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
