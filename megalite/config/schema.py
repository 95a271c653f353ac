"""The run file, field by field: types, units and defaults.

Sections are frozen. They refuse unknown keys and values of another type (`"3"` is not 3, `true` is
not 1, but 3 may stand for 3.0). Rules between fields are in `megalite.config.rules`. The public
entry point is `megalite.config.load_config`.
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
    TokenCount,
)
from megalite.config.finetune import FinetuneConfig
from megalite.config.logging import LoggingConfig
from megalite.config.model import ModelConfig
from megalite.config.names import NameOf


class ObjectiveConfig(Section):
    """The pretraining objective: what the model predicts from a window of text."""

    name: Annotated[str, NameOf(registry.objectives)] = Field(
        default="causal",
        description="causal: the next token (decoder). masked: masked tokens, as in BERT "
        "(encoder). span_corruption: removed spans, as in T5 (encoder_decoder).",
    )
    mask_probability: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.15, description="Fraction of tokens that are masked or removed."
    )
    mask_token_id: CountOrZero | None = Field(
        default=None, description="masked: token id that replaces a masked token."
    )
    whole_words: bool = Field(
        default=False, description="masked: whether to mask all tokens of a word together."
    )
    mean_span_length: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=3.0, description="span_corruption: mean length of a span, in tokens."
    )


class SourceConfig(Section):
    """One folder of shards and its weight in the mixture."""

    path: PathText = Field(
        description="Folder of shards, relative to the working directory.", examples=["data/train"]
    )
    weight: Positive | None = Field(
        default=None,
        description="Weight in the mixture, relative to the other sources of the list. null for "
        "all of them means in proportion to their sizes.",
    )


class DataConfig(Section):
    """Training and validation data, the length of a sample, and the order."""

    train: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = Field(
        description="Sources of training samples. Remove it when fine-tuning; finetune.data sets "
        "the data.",
        examples=[[{"path": "data/train"}]],
    )
    valid: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = Field(
        default=(), description="Sources of validation samples. Empty means no validation."
    )
    sequence_length: Count = Field(
        description="Length of a sample, in tokens that the model reads.", examples=[2048]
    )
    mask_documents: bool = Field(
        default=False,
        description="Whether to separate the documents of a sample: attention stays within a "
        "document, positions restart at each, and a document's last token does not predict the "
        "next document.",
    )
    seed: Seed = Field(default=1234, description="Seed of the data order.")
    verify: bool = Field(
        default=False, description="Whether to verify the hash of each shard before its first use."
    )


class ParallelConfig(Section):
    """How one replica of the model is split over ranks."""

    tensor: Count = Field(
        default=1,
        description="Tensor-parallel size: ranks that share each layer. It must divide the "
        "key/value heads and model.intermediate_size.",
    )
    sequence: bool = Field(
        default=False,
        description="Whether to split norms, dropout and residuals along the sequence over the "
        "tensor-parallel ranks (sequence parallelism). This saves memory and changes no result.",
    )


class OptimizerConfig(Section):
    """The optimizer. Norms and biases have no weight decay."""

    name: Annotated[str, NameOf(registry.optimizers)] = Field(
        default="adamw",
        description="Update rule. muon updates the matrices of the blocks, and AdamW all other "
        "parameters.",
    )
    lr: Positive = Field(description="Peak learning rate.", examples=[3e-4])
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        default=(0.9, 0.95),
        description="AdamW's beta1 and beta2: decay per step of the first and second moment.",
    )
    eps: Positive = Field(
        default=1e-8, description="AdamW's epsilon, added to the root of the second moment."
    )
    momentum: Share = Field(default=0.9, description="Momentum of SGD and Muon.")
    weight_decay: PositiveOrZero = Field(
        default=0.1,
        description="Decoupled weight decay (L2): each step subtracts lr x weight_decay x weight.",
    )
    l1: PositiveOrZero = Field(
        default=0.0,
        description="Decoupled L1 decay: each step subtracts lr x l1 x sign(weight).",
    )
    clip_grad_norm: PositiveOrZero = Field(
        default=1.0,
        description="Largest global L2 norm of the gradient; larger gradients are scaled down to "
        "it. 0 means no clipping.",
    )


class ScheduleConfig(Section):
    """The learning-rate schedule: a linear warmup from 0, then the shape that `name` states."""

    name: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="Shape after the warmup. wsd (warmup-stable-decay) stays at the peak, then "
        "decays.",
    )
    warmup_steps: CountOrZero = Field(
        default=0, description="Steps of the linear warmup from 0 to the peak."
    )
    decay_steps: Count | None = Field(
        default=None,
        description="Steps of the decay. cosine and linear decay after the warmup; null means "
        "until the end. wsd decays at the end; null means a tenth of training.steps.",
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.1, description="Last learning rate, as a fraction of the peak."
    )


class TrainingConfig(Section):
    """The length of the run, its batch sizes and its numerics."""

    steps: CountOrZero = Field(
        description="Total optimizer steps. Remove it when fine-tuning; finetune.epochs sets it.",
        examples=[100000],
    )
    tokens: TokenCount | None = Field(
        default=None,
        description="Total tokens; an alternative to steps. The run then takes tokens / "
        "(global_batch_size x data.sequence_length) steps, rounded up. A whole number such as 20e9 "
        "is allowed.",
        examples=[20_000_000_000],
    )
    global_batch_size: Count = Field(
        description="Samples of one optimizer step, over all ranks.", examples=[512]
    )
    micro_batch_size: Count = Field(
        description="Samples of one forward pass of a rank.", examples=[4]
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Type of weights and activations in forward and backward. auto means bf16 on "
        "GPUs, and on CPUs with AMX or AVX512-BF16 under ZeRO 1 to 3; otherwise fp32. A resumed "
        "run keeps its first choice. Master weights and moments are fp32.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations that the backward recomputes. none: none of them. selective: all "
        "except matrix products and attention. full: whole blocks.",
    )
    compile: bool = Field(
        default=False, description="Whether to compile blocks and loss with torch.compile."
    )
    profile: Annotated[tuple[Count, Count], Field(strict=False)] | None = Field(
        default=None,
        description="First and last step of a profiler trace, which is written to profile/ in the "
        "run folder. null means none.",
        examples=[[10, 15]],
    )
    seed: Seed = Field(default=1234, description="Seed of initial weights and of dropout.")
    log_every: Count = Field(default=10, description="Steps between rows of metrics.jsonl.")
    eval_every: CountOrZero = Field(
        default=1000,
        description="Steps between validations. 0 means only at the start and at the end.",
    )
    replica_check_every: CountOrZero = Field(
        default=100,
        description="Steps between comparisons of the values that ranks must hold identically. 0 "
        "means never; otherwise each checkpoint is also preceded by one.",
    )
    eval_batches: Count = Field(
        default=50, description="Length of a validation, in global batches."
    )


class CheckpointConfig(Section):
    """When checkpoints are saved, and how many are kept."""

    every: CountOrZero = Field(
        default=1000, description="Steps between checkpoints. 0 means only at the end."
    )
    keep: Count = Field(default=3, description="Number of newest checkpoints to keep.")
    keep_every: CountOrZero = Field(
        default=0,
        description="Steps between checkpoints that are never deleted. 0 means none.",
    )
    keep_best: bool = Field(
        default=False,
        description="Whether to keep the checkpoint with the best validation score as well: the "
        "lowest loss, or the best finetune.metric.",
    )
    background: bool = Field(
        default=False,
        description="Whether to continue training while a checkpoint is written. Each rank then "
        "needs host memory for a copy of its part: 12 bytes per parameter over all ranks.",
    )
    stop_grace_seconds: PositiveOrZero = Field(
        default=90.0,
        description="Seconds between a stop signal and the kill. If a save would take longer, it "
        "is not started.",
    )


class GuardsConfig(Section):
    """Reactions to loss spikes, non-finite values and hanging ranks."""

    spike: Literal["off", "log", "skip", "rollback"] = Field(
        default="log",
        description="Reaction to a spike of the loss or the gradient norm. off: none. log: log an "
        "event. skip: skip the update. rollback: return to the checkpoint before the spike and "
        "skip the data around it.",
    )
    spike_threshold: Positive = Field(
        default=10.0,
        description="Robust z-score from which a value is a spike: its distance above the median "
        "of the last `spike_window` steps, over 1.4826 times their median absolute deviation.",
    )
    spike_window: Annotated[int, Field(ge=16, le=10**4)] = Field(
        default=128,
        description="Number of previous steps that a step is compared with. Detection starts after "
        "half as many steps, and after at least 16.",
    )
    skip_window: Count = Field(
        default=100, description="Global batches skipped around a spike after a rollback."
    )
    max_skips: Count = Field(
        default=10,
        description="Updates in a row that may be skipped, for spikes or non-finite values, before "
        "the run ends.",
    )
    max_rollbacks: CountOrZero = Field(
        default=3, description="Rollbacks of a run; the next spike ends the run."
    )
    hang_seconds: Positive = Field(
        default=300.0,
        description="Seconds without progress that count as a hang. If ten times the usual "
        "duration of the phase (step, validation, save) is longer, that counts instead.",
    )
    hang_setup_seconds: Positive = Field(
        default=1800.0,
        description="The same before the first step, and for a phase without a usual duration.",
    )


_DEFAULT_OBJECTIVES = {"encoder": "masked", "encoder_decoder": "span_corruption"}


class RunConfig(Section):
    """A checked run file; `megalite.config.load_config` returns it."""

    name: Text = Field(
        description="Name of the run, and of its folder in logging.directory.",
        examples=["smoke"],
    )
    model: ModelConfig = Field(description="The network.")
    data: DataConfig = Field(description="Training and validation data.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="How the model is split over ranks."
    )
    objective: ObjectiveConfig = Field(
        default_factory=ObjectiveConfig,
        description="The pretraining objective. The default depends on the architecture.",
    )
    optimizer: OptimizerConfig = Field(description="The optimizer.")
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="The learning-rate schedule."
    )
    training: TrainingConfig = Field(description="Length, batch sizes and numerics.")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="When to save, and what to keep."
    )
    guards: GuardsConfig = Field(
        default_factory=GuardsConfig, description="Loss spikes, non-finite values and hangs."
    )
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig, description="The run folder and other outputs."
    )
    finetune: FinetuneConfig | None = Field(
        default=None, description="Fine-tuning on labelled data. null means pretraining."
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=lambda: {"zero_optimization": {"stage": 1}},
        description="DeepSpeed's own JSON, passed through. Values that other sections decide are "
        "filled in, and must not be contradicted.",
    )
    plugins: dict[str, str] = Field(
        default={},
        description="Package and version of each name that an installed package registers. Filled "
        "in, and stored with the run and its checkpoints.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_finetune(cls, data: Any) -> Any:
        """Fill in the keys of other sections that the finetune section decides."""
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
        if "model" not in data:  # reported as missing as a whole
            del filled["model"]
        for name, values in filled.items():
            section = data.get(name, {})
            if isinstance(section, dict):
                data = {**data, name: {**values, **section}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _steps_from_tokens(cls, data: Any) -> Any:
        """Replace `training.tokens` with the number of steps that process them."""
        training, source = data.get("training"), data.get("data")
        if not isinstance(training, dict) or not isinstance(source, dict):
            return data
        tokens = training.get("tokens")
        if isinstance(tokens, float) and tokens.is_integer():
            tokens = int(tokens)  # JSON reads 20e9 as a float
        if tokens is None or training.get("steps") is not None or "finetune" in data:
            return {**data, "training": {**training, "tokens": tokens}}
        batch, length = training.get("global_batch_size"), source.get("sequence_length")
        filled = {"tokens": tokens, "steps": 1}  # if a size is invalid, only that is reported
        if type(tokens) is type(batch) is type(length) is int and min(tokens, batch, length) > 0:
            filled = {"tokens": None, "steps": -(-tokens // (batch * length))}
        return {**data, "training": {**training, **filled}}

    @model_validator(mode="before")
    @classmethod
    def _objective_from_architecture(cls, data: Any) -> Any:
        """Fill in the objective of an architecture that is not a decoder."""
        model = data.get("model")
        objective = data.get("objective") or {}
        if not isinstance(model, dict) or not isinstance(objective, dict):
            return data
        kind = model.get("architecture")
        if objective.get("name") is None and isinstance(kind, str) and kind in _DEFAULT_OBJECTIVES:
            return {**data, "objective": {**objective, "name": _DEFAULT_OBJECTIVES[kind]}}
        return data
