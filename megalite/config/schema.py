"""The run file, field by field: types, units, bounds and defaults.

Sections are frozen. They refuse unknown keys and other types (`"3"` is not 3, `true` is not 1; a
whole number is accepted as a real one). `megalite.config.rules` has the rules between fields;
`megalite.config.load_config` reads a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megalite import registry
from megalite.config.fields import (
    Count,
    CountOrZero,
    PathText,
    Positive,
    PositiveOrZero,
    Section,
    Seed,
    Share,
    Text,
)
from megalite.config.finetune import FinetuneConfig
from megalite.config.logging import LoggingConfig
from megalite.config.model import ModelConfig
from megalite.config.names import NameOf


class ObjectiveConfig(Section):
    """The training objective."""

    name: Annotated[str, NameOf(registry.objectives)] = Field(
        default="causal",
        description="The next token (decoder); tokens that are hidden (encoder; BERT); or spans "
        "that are cut out (encoder_decoder; T5).",
    )
    mask_probability: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.15, description="Share of tokens that are hidden or cut out."
    )
    mask_token_id: CountOrZero | None = Field(
        default=None, description="masked: the id in place of a hidden token."
    )
    whole_words: bool = Field(
        default=False, description="masked: whether all tokens of a word are hidden together."
    )
    mean_span_length: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=3.0, description="span_corruption: mean length of a span, in tokens."
    )


class SourceConfig(Section):
    """One folder of shards and its part in the mixture."""

    path: PathText = Field(
        description="Folder of shards, relative to the working directory.", examples=["data/train"]
    )
    weight: Positive | None = Field(
        default=None,
        description="Share of samples, relative to the other sources of the list (null on all "
        "of them: by their windows).",
    )


class DataConfig(Section):
    """The data, its windows and its order."""

    train: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = Field(
        description="Sources of training samples. Leave empty when fine-tuning; finetune.data has "
        "the examples.",
        examples=[[{"path": "data/train"}]],
    )
    valid: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = Field(
        default=(), description="Sources of held-out samples (none: no validation)."
    )
    sequence_length: Count = Field(
        description="Tokens of one sample the model reads.", examples=[2048]
    )
    mask_documents: bool = Field(
        default=False,
        description="If true, the documents of one window are separate: attention does not cross "
        "their boundaries, positions restart, and a target across a boundary does not count.",
    )
    seed: Seed = Field(default=1234, description="Seed of the data order.")
    verify: bool = Field(
        default=False, description="Whether each shard is hashed before its first use."
    )


class ParallelConfig(Section):
    """How one replica of the model is split over ranks."""

    tensor: Count = Field(
        default=1,
        description="Ranks that share each layer (tensor parallelism). The number must divide the "
        "key/value heads.",
    )
    sequence: bool = Field(
        default=False,
        description="Whether norms, dropout and residuals are split along tokens over the "
        "tensor ranks (sequence parallelism); saves memory, changes no result.",
    )


class OptimizerConfig(Section):
    """The optimizer; norms and biases are never decayed."""

    name: Annotated[str, NameOf(registry.optimizers)] = Field(
        default="adamw",
        description="Update rule. muon updates the blocks' matrices, AdamW everything else.",
    )
    lr: Positive = Field(description="Peak learning rate.", examples=[3e-4])
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="Decay of AdamW's first and second moment, a step."
    )
    eps: Positive = Field(default=1e-8, description="Added to the root of AdamW's second moment.")
    momentum: Share = Field(default=0.9, description="Decay of SGD's and Muon's momentum, a step.")
    weight_decay: PositiveOrZero = Field(
        default=0.1,
        description="Decoupled L2 decay: lr x this x weight is taken off a weight each step.",
    )
    l1: PositiveOrZero = Field(
        default=0.0,
        description="Decoupled L1 decay: lr x this x sign(weight) is taken off a weight each step.",
    )
    clip_grad_norm: PositiveOrZero = Field(
        default=1.0, description="Largest L2 norm of the whole gradient (0: no clipping)."
    )


class ScheduleConfig(Section):
    """The learning rate over the run: warmup from 0, then what `name` says."""

    name: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="Shape after the warmup; wsd stays flat, then decays."
    )
    warmup_steps: CountOrZero = Field(
        default=0, description="Steps of the linear rise to the peak."
    )
    decay_steps: Count | None = Field(
        default=None,
        description="Steps of the decay: after the warmup for cosine and linear (null: to the "
        "end), at the end for wsd (null: a tenth of the steps).",
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.1, description="Last learning rate as a part of the peak."
    )


class TrainingConfig(Section):
    """The length of the run, its batches and its numerics."""

    steps: CountOrZero = Field(
        description="Total optimizer steps. Leave at 0 when fine-tuning; finetune.epochs sets "
        "them.",
        examples=[100000],
    )
    tokens: Count | None = Field(
        default=None,
        description="Total tokens, in place of steps, which then are tokens / (global_batch_size x "
        "data.sequence_length), rounded up. A whole number such as 20e9 is allowed.",
        examples=[20_000_000_000],
    )
    global_batch_size: Count = Field(
        description="Samples of one optimizer step, over all ranks.", examples=[512]
    )
    micro_batch_size: Count = Field(
        description="Samples a rank holds in memory at once.", examples=[4]
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Type of weights and activations in forward and backward. auto: bf16 on GPUs, "
        "and on CPUs with AMX or AVX512-BF16 under ZeRO 1 to 3; else fp32. A run keeps what auto "
        "was when it began. Masters and moments are fp32.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What the backward recomputes: nothing, all but matrix products and "
        "attention, or whole blocks.",
    )
    compile: bool = Field(
        default=False, description="Whether blocks and the loss are compiled with torch.compile."
    )
    profile: Annotated[tuple[Count, Count], Field(strict=False)] | None = Field(
        default=None,
        description="First and last step of a trace, written to profile/ of the run folder.",
        examples=[[10, 15]],
    )
    seed: Seed = Field(default=1234, description="Seed of initial weights and of dropout.")
    log_every: Count = Field(default=10, description="Steps between rows of metrics.jsonl.")
    eval_every: CountOrZero = Field(
        default=1000, description="Steps between validations (0: at the start and the end alone)."
    )
    replica_check_every: CountOrZero = Field(
        default=100,
        description="Steps between comparisons of the ranks' replicas, which also precede each "
        "checkpoint. 0 means never.",
    )
    eval_batches: Count = Field(
        default=50, description="Length of a validation, in global batches."
    )


class CheckpointConfig(Section):
    """When the run is saved, and how much of it is kept."""

    every: CountOrZero = Field(
        default=1000, description="Steps between checkpoints (0: at the end alone)."
    )
    keep: Count = Field(default=3, description="Newest checkpoints kept.")
    keep_every: CountOrZero = Field(
        default=0,
        description="Steps between checkpoints that are kept permanently (0: none are).",
    )
    keep_best: bool = Field(
        default=False,
        description="Whether the checkpoint of the lowest validation loss is kept as well.",
    )
    background: bool = Field(
        default=False,
        description="Whether training goes on while a checkpoint is written; each rank then "
        "holds a copy of its share in host memory, 12 bytes a parameter over all ranks.",
    )
    stop_grace_seconds: PositiveOrZero = Field(
        default=90.0,
        description="Seconds between a stop signal and the kill: a save that takes longer is "
        "not begun.",
    )


class GuardsConfig(Section):
    """Reactions to bad numbers and to ranks that hang."""

    spike: Literal["off", "log", "skip", "rollback"] = Field(
        default="log",
        description="Reaction to a jump of the loss or the gradient norm. off: none. log: an "
        "event. skip: the update is omitted. rollback: the run returns to an earlier checkpoint "
        "and omits the data.",
    )
    spike_threshold: Positive = Field(
        default=10.0,
        description="Robust z-score of a jump: distance above the median of the last "
        "`spike_window` steps, over 1.4826 times their median absolute deviation.",
    )
    spike_window: Annotated[int, Field(ge=16, le=10**4)] = Field(
        default=128, description="Steps a loss is compared with; the first of them are not judged."
    )
    skip_window: Count = Field(
        default=100, description="Global batches omitted around a jump that is rolled back."
    )
    max_skips: Count = Field(
        default=10,
        description="Updates in a row that may be omitted (a number that is not finite, or a "
        "jump) before the run ends.",
    )
    max_rollbacks: CountOrZero = Field(
        default=3, description="Rollbacks of a run; a jump after them ends it."
    )
    hang_seconds: Positive = Field(
        default=300.0,
        description="Least time without progress, in seconds, that is taken for a hang; longer "
        "where ten times the run's own steps, validations or saves are.",
    )
    hang_setup_seconds: Positive = Field(
        default=1800.0,
        description="The same before the first step, and for what was not yet timed.",
    )


_MADE_FOR = {"encoder": "masked", "encoder_decoder": "span_corruption"}


class RunConfig(Section):
    """One run: `megalite.config.load_config` makes it from a run file."""

    name: Text = Field(
        description="Name of the run, and of its folder under logging.directory.",
        examples=["smoke"],
    )
    model: ModelConfig = Field(description="The network.")
    data: DataConfig = Field(description="The data.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="How the model is split over ranks."
    )
    objective: ObjectiveConfig = Field(
        default_factory=ObjectiveConfig,
        description="The training objective. Without a name, the architecture's own.",
    )
    optimizer: OptimizerConfig = Field(description="The update rule.")
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="The learning rate over the run."
    )
    training: TrainingConfig = Field(description="Length, batches and numerics.")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="When and what to save."
    )
    guards: GuardsConfig = Field(
        default_factory=GuardsConfig, description="Bad numbers and hanging ranks."
    )
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig, description="Files and services that record the run."
    )
    finetune: FinetuneConfig | None = Field(
        default=None, description="Fine-tuning on labelled data (null: pretraining)."
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=lambda: {"zero_optimization": {"stage": 1}},
        description="DeepSpeed's own JSON, passed through; what MegaLite owns is filled in and "
        "may not be contradicted.",
    )
    plugins: dict[str, str] = Field(
        default={},
        description="Package and version of each name that an installed package registers; "
        "filled in, and kept by the run and its checkpoints.",
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_by_finetuning(cls, data: Any) -> Any:
        """Fill in windows, steps and the adapter of the model from the finetune section."""
        tuning = data.get("finetune")
        if not isinstance(tuning, dict):
            return data
        examples = tuning.get("data")
        length = examples.get("max_length") if isinstance(examples, dict) else None
        filled: dict[str, dict[str, Any]] = {"training": {"steps": 0}}
        filled["data"] = {"train": []} | ({} if length is None else {"sequence_length": length})
        model = data.get("model")
        kind = model.get("architecture") if isinstance(model, dict) else None
        pooling = {"encoder": "mean", "encoder_decoder": "first"}.get(str(kind), "last")
        filled["model"] = {"classifier_pooling": tuning.get("pooling") or pooling}
        if tuning.get("adapter") is not None:
            filled["model"]["adapter"] = tuning["adapter"]
        if "model" not in data:  # said to be missing as a whole
            del filled["model"]
        for name, own in filled.items():
            section = data.get(name, {})
            if isinstance(section, dict):
                data = {**data, name: {**own, **section}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _steps_of_tokens(cls, data: Any) -> Any:
        """Replace `training.tokens` by the steps that they take."""
        training, source = data.get("training"), data.get("data")
        if not isinstance(training, dict) or not isinstance(source, dict):
            return data
        tokens = training.get("tokens")
        if isinstance(tokens, float) and tokens.is_integer():
            tokens = int(tokens)  # JSON has no integer 20e9
        if tokens is None or training.get("steps") is not None or "finetune" in data:
            return {**data, "training": {**training, "tokens": tokens}}
        batch, length = training.get("global_batch_size"), source.get("sequence_length")
        filled = {"tokens": tokens, "steps": 1}  # if a size is at fault, not the steps
        if type(tokens) is type(batch) is type(length) is int and min(tokens, batch, length) > 0:
            filled = {"tokens": None, "steps": -(-tokens // (batch * length))}
        return {**data, "training": {**training, **filled}}

    @model_validator(mode="before")
    @classmethod
    def _objective_of_the_architecture(cls, data: Any) -> Any:
        model = data.get("model")
        objective = data.get("objective") or {}
        if not isinstance(model, dict) or not isinstance(objective, dict):
            return data
        kind = model.get("architecture")
        if objective.get("name") is None and isinstance(kind, str) and kind in _MADE_FOR:
            return {**data, "objective": {**objective, "name": _MADE_FOR[kind]}}
        return data
