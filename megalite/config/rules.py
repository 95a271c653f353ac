"""Rules between fields of a run file: what each one allows, the two together may not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from megalite import registry
from megalite.config.deepspeed_keys import zero_stage
from megalite.config.faults import Fault, fault, show
from megalite.config.finetune import ExamplesConfig, FinetuneConfig
from megalite.config.model import ModelConfig
from megalite.config.objective import source_length, spans, target_length
from megalite.config.schema import RunConfig
from megalite.config.tasks import TaskSpec, find_task, optional_keys, tasks_with_key


def rule_faults(config: RunConfig) -> Iterator[Fault]:
    """Yield every broken rule between fields of a config whose fields are sound one by one."""
    yield from _heads(config)
    yield from _shares(config)
    yield from _families(config)
    yield from _layer_types(config)
    yield from _finetune(config) if config.finetune else _pretraining(config)
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


def _heads(config: RunConfig) -> Iterator[Fault]:
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
            f"rope turns pairs of elements, but a head is {model.head_dim} wide; make it even",
        )
    if heads % groups:
        yield fault(
            "model.num_key_value_heads model.num_attention_heads",
            f"{groups} does not divide num_attention_heads {heads}; try "
            f"{', '.join(str(n) for n in _divisors(heads))}",
        )


def allowed_tensor_sizes(model: ModelConfig) -> list[int]:
    """Return the tensor-parallel sizes a model can be split by: they divide key/value heads and
    MLP.
    """
    shared = model.num_attention_heads, model.num_key_value_heads, model.intermediate_size
    return _divisors(math.gcd(*shared))


def _shares(config: RunConfig) -> Iterator[Fault]:
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
    """Return the key that says how long a sample is."""
    tuning = config.finetune
    length = config.data.sequence_length
    own = tuning is not None and tuning.data.max_length == length
    return "finetune.data.max_length" if own else "data.sequence_length"


def _positions(config: RunConfig) -> Iterator[Fault]:
    model = config.model
    length = config.data.sequence_length
    if length > model.max_position_embeddings:
        yield fault(
            f"{_length_key(config)} data.sequence_length model.max_position_embeddings",
            f"{length} is over model.max_position_embeddings {model.max_position_embeddings}; "
            "lower the one or raise the other",
        )
    if model.position_embedding == "sinusoidal" and model.hidden_size % 2:
        yield fault(
            "model.hidden_size model.position_embedding",
            f"sinusoidal positions come in pairs, but hidden_size is {model.hidden_size}; "
            "make it even",
        )


def _families(config: RunConfig) -> Iterator[Fault]:
    """Yield the keys that an architecture does not have."""
    model = config.model
    kind, scaling = model.architecture, model.rope_scaling
    for key, found, needs in (
        ("num_decoder_layers", model.num_decoder_layers, kind == "encoder_decoder"),
        ("sliding_window", model.sliding_window, kind == "decoder"),
        ("layer_types", model.layer_types, kind == "decoder"),
        ("type_vocab_size", model.type_vocab_size, kind == "encoder"),
        ("rope_scaling", scaling, model.position_embedding == "rope"),
    ):
        if found and not needs:
            where = {"num_decoder_layers": "encoder_decoder", "type_vocab_size": "encoder"}
            wanted = f"architecture {where.get(key, 'decoder')}"
            wanted = "position_embedding rope" if scaling is found else wanted
            yield fault(f"model.{key}", f"it only applies to {wanted}; remove it")
    if scaling and scaling.rope_type != "linear" and not scaling.original_max_position_embeddings:
        yield fault(
            "model.rope_scaling.original_max_position_embeddings",
            f"{scaling.rope_type} stretches what a model was made for; say for how many tokens",
        )


def _layer_types(config: RunConfig) -> Iterator[Fault]:
    """Yield what is wrong with a list of the layers' kinds of attention."""
    model = config.model
    kinds, layers = model.layer_types, model.num_hidden_layers
    if kinds is None:
        return
    if layers % len(kinds):
        possible = ", ".join(str(n) for n in _divisors(layers))
        yield fault(
            "model.layer_types model.num_hidden_layers",
            f"a list of {len(kinds)} does not divide the {layers} layers; give one of {possible}",
        )
    if "sliding_attention" in kinds and model.sliding_window is None:
        yield fault(
            "model.layer_types model.sliding_window",
            "sliding_attention needs a window; set model.sliding_window, in tokens",
        )
    if "sliding_attention" not in kinds and model.sliding_window is not None:
        yield fault(
            "model.sliding_window model.layer_types",
            "no layer slides; add sliding_attention to model.layer_types, or remove sliding_window",
        )


def _finetune(config: RunConfig) -> Iterator[Fault]:
    """Yield the broken rules of fine-tuning: its architecture, its keys, its data."""
    tuning = config.finetune
    kind = config.model.architecture
    assert tuning is not None
    task = find_task(tuning.task)
    data = tuning.data
    if task.architectures and kind not in task.architectures:
        meant = " or ".join(map(show, task.architectures))
        yield fault(
            "finetune.task model.architecture",
            f"{show(tuning.task)} needs an architecture {meant}, found {show(kind)}; name another "
            "task or model",
        )
    yield from _task_keys(tuning, task)
    if tuning.pooling and kind == "encoder_decoder":
        yield fault("finetune.pooling", "an encoder_decoder writes one token; remove it")
    if tuning.class_weights and tuning.balance_classes:
        yield fault("finetune.class_weights", "balance_classes makes them; give one of the two")
    if tuning.metric not in (None, *task.metrics):
        yield fault("finetune.metric", f"{show(tuning.metric)} is of a classification; write loss")
    if (data.prompt_column is None) != (data.response_column is None):
        yield fault("finetune.data.prompt_column", "it goes with response_column: give both")
    yield from _splits(data)
    if tuning.early_stopping and not has_held_out(config):
        yield fault("finetune.early_stopping", "it needs a valid or a test split to look at")
    if config.data.train or config.data.valid:
        yield fault("data.train", "examples come from finetune.data; remove the sources")
    if config.data.sequence_length != data.max_length:
        yield fault(
            "data.sequence_length finetune.data.max_length",
            f"{config.data.sequence_length}, but examples have {data.max_length}; remove it",
        )
    if task.has_labels and config.parallel.sequence and kind == "encoder_decoder":
        yield fault("parallel.sequence finetune.task", "one written token cannot be shared; false")


def _task_keys(tuning: FinetuneConfig, task: TaskSpec) -> Iterator[Fault]:
    """Yield the keys that are set and do not apply to the task."""
    for key in optional_keys():
        *inner, last = key.split(".")
        value = getattr(tuning.data if inner else tuning, last)
        if value and key not in task.keys:
            having = " and ".join(tasks_with_key(key))
            yield fault(f"finetune.{key}", f"it only applies to {having}; remove it")


def _splits(data: ExamplesConfig) -> Iterator[Fault]:
    """Yield splits that are given twice, and fractions that leave nothing to train on."""
    for split in ("valid", "test"):
        if getattr(data, f"{split}_split") and getattr(data, f"{split}_fraction"):
            key = f"finetune.data.{split}"
            yield fault(f"{key}_split {key}_fraction", f"give it or {split}_fraction, not both")
    if (data.valid_fraction or 0) + (data.test_fraction or 0) >= 1:
        yield fault("finetune.data.valid_fraction", "with test_fraction it leaves no row to learn")


def has_held_out(config: RunConfig) -> bool:
    """Return whether there is what a checkpoint can be measured on."""
    if config.finetune is None:
        return bool(config.data.valid)
    data = config.finetune.data
    return any((data.valid_split, data.valid_fraction, data.test_split, data.test_fraction))


def _pretraining(config: RunConfig) -> Iterator[Fault]:
    if not config.data.train:
        yield fault("data.train", "found nothing; name a folder of shards")
    if config.training.steps == 0:
        yield fault("training.steps", "found 0; give 1 or more")
    if config.model.adapter or config.model.num_labels:
        key = "adapter" if config.model.adapter else "num_labels"
        yield fault(f"model.{key}", "fine-tuning fills it in; remove it")
    yield from _objective(config)


def _objective(config: RunConfig) -> Iterator[Fault]:
    objective = config.objective
    kind = config.model.architecture
    meant = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "span_corruption"}[kind]
    if kind not in registry.objectives.facts(objective.name).get("architectures", (kind,)):
        yield fault(
            "objective.name model.architecture",
            f"{show(objective.name)} is not what an architecture {show(kind)} is trained for; "
            f"write {show(meant)}, or remove it",
        )
    elif objective.name == "masked" and not _is_id(objective.mask_token_id, config):
        yield fault(
            "objective.mask_token_id model.vocab_size",
            f"found {show(objective.mask_token_id)}; give the tokenizer's mask token, or an id of "
            f"its own, under model.vocab_size {config.model.vocab_size}",
        )
    elif objective.name == "span_corruption" and config.data.mask_documents:
        yield fault(
            "data.mask_documents objective.name",
            f"documents cannot be masked under {show(meant)}; set it to false",
        )
    elif objective.name == "span_corruption" and spans(config)[1] >= config.model.vocab_size:
        yield fault(
            "objective.mean_span_length model.vocab_size",
            f"each of {spans(config)[1]} spans needs an id of its own at the vocabulary's end",
        )


def _is_id(found: int | None, config: RunConfig) -> bool:
    return found is not None and found < config.model.vocab_size


def _tokens_of_ranks(config: RunConfig) -> Iterator[Fault]:
    ranks, length = config.parallel.tensor, config.data.sequence_length
    if not config.parallel.sequence:
        return
    lengths = {f"{length} tokens": length}
    if config.objective.name == "span_corruption" and not config.finetune:
        source, target = source_length(config), target_length(config)
        lengths = {
            f"what {length} tokens leave the encoder, {source},": source,
            f"what is cut out of them, {target},": target,
        }
    for told, number in lengths.items():
        if number % ranks:
            near = [n for n in (length // ranks * ranks, (length // ranks + 1) * ranks) if n]
            usual = number == length
            advice = f"try {' or '.join(map(str, near))}" if usual else "try another length"
            yield fault(
                f"{_length_key(config)} data.sequence_length parallel.sequence parallel.tensor",
                f"{told} cannot be shared evenly by parallel.tensor {ranks} ranks, as "
                f"parallel.sequence asks; {advice}, or set it to false",
            )


def _sources(config: RunConfig) -> Iterator[Fault]:
    for name, sources in (("train", config.data.train), ("valid", config.data.valid)):
        without = [source.path for source in sources if source.weight is None]
        if without and len(without) < len(sources):
            yield fault(
                f"data.{name}",
                f"{len(sources) - len(without)} of {len(sources)} sources have a weight, but not "
                f"{', '.join(show(path) for path in without[:3])}; give all of them one, or none",
            )


def _batches(config: RunConfig) -> Iterator[Fault]:
    whole, micro = config.training.global_batch_size, config.training.micro_batch_size
    if whole % micro:
        near = [whole // micro * micro, (whole // micro + 1) * micro]
        yield fault(
            "training.global_batch_size training.micro_batch_size",
            f"{whole} is not a multiple of micro_batch_size {micro}; try "
            f"{' or '.join(str(n) for n in near if n)}",
        )


def _length(config: RunConfig) -> Iterator[Fault]:
    tokens, steps = config.training.tokens, config.training.steps
    lengths = f"{tokens} tokens and {steps} steps are two lengths of one run; remove one"
    if config.finetune:
        lengths = "it only applies to pretraining; remove it and set finetune.epochs"
    if tokens is not None:
        yield fault("training.tokens training.steps", lengths)


def _schedule(config: RunConfig) -> Iterator[Fault]:
    schedule = config.schedule
    steps = config.training.steps
    keys = "schedule.decay_steps schedule.warmup_steps training.steps schedule.name"
    if schedule.decay_steps is None:
        return  # a warmup longer than the run is a short trial of a long run, and sound
    if schedule.name == "constant":
        yield fault(keys, "a constant schedule does not decay; remove it or name another")
    elif steps and schedule.warmup_steps + schedule.decay_steps > steps:
        yield fault(
            keys,
            f"warmup_steps {schedule.warmup_steps} + decay_steps {schedule.decay_steps} is over "
            f"training.steps {steps}; shorten one, or remove decay_steps",
        )


def _retention(config: RunConfig) -> Iterator[Fault]:
    every, keep = config.checkpoint.every, config.checkpoint.keep_every
    if keep and (not every or keep % every):
        saved = f"every {every} steps" if every else "at the end alone"
        near = [keep // every * every, (keep // every + 1) * every] if every else []
        advice = " or ".join(str(n) for n in near if n) or "remove it, or set checkpoint.every"
        yield fault(
            "checkpoint.keep_every checkpoint.every",
            f"{keep}, but the run is saved {saved}; {'try ' if every else ''}{advice}",
        )
    if config.checkpoint.keep_best and not has_held_out(config):
        held = "data.valid is empty; name held-out shards there"
        if config.finetune:
            held = "finetune.data holds nothing out; give it a valid_split or a valid_fraction"
        yield fault(
            "checkpoint.keep_best data.valid",
            f"the best is the one of the lowest validation loss, but {held}, or set keep_best to "
            "false",
        )


def _names(config: RunConfig) -> Iterator[Fault]:
    if not re.fullmatch(r"\w[\w.-]{0,99}", config.name, re.ASCII):
        yield fault(
            "name",
            f"{show(config.name)} cannot be a folder's name everywhere; use up to 100 letters, "
            "digits, points, dashes and underscores, beginning with a letter or digit",
        )
    paths = {"logging.directory": config.logging.directory}
    for name, sources in (("train", config.data.train), ("valid", config.data.valid)):
        paths |= {f"data.{name}.{i}.path": source.path for i, source in enumerate(sources)}
    for key, path in paths.items():
        if not path.isprintable():
            yield fault(key, f"{show(path)} holds characters a path cannot; check the text")


def _precision(config: RunConfig) -> Iterator[Fault]:
    precision = config.training.precision
    if precision in ("bf16", "fp16") and zero_stage(config) == 0:
        yield fault(
            "training.precision deepspeed.zero_optimization.stage",
            f"{precision} with ZeRO stage 0 keeps no fp32 master weights; set "
            "deepspeed.zero_optimization.stage to 1",
        )


def _profile(config: RunConfig) -> Iterator[Fault]:
    if config.training.profile is None:
        return
    (first, last), steps = config.training.profile, config.training.steps
    if not first <= last <= (steps or last):
        yield fault(
            "training.profile training.steps",
            f"[{first}, {last}] are the first and the last step of a trace; give two steps in "
            f"order, up to training.steps {steps}",
        )


def _samples(config: RunConfig) -> Iterator[Fault]:
    encodes = config.model.architecture == "encoder"
    classifies = config.finetune is not None and find_task(config.finetune.task).has_labels
    if config.logging.samples and (encodes or classifies):
        what = "an encoder" if encodes else "a classifier"
        yield fault("logging.samples", f"{what} writes no text; remove it")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
