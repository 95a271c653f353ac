"""The `logging` section of a run file: the run folder, TensorBoard, W&B, samples and sinks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megalite import registry
from megalite.config.fields import Count, PathText, PositiveOrZero, Section, SmallCount, Text
from megalite.config.names import NameOf


class SamplesConfig(Section):
    """Sample texts that the model generates during training."""

    prompts: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] = Field(
        description="Prompts that the model continues. With task sft, each is a user's turn, which "
        "the model answers.",
        examples=[["Once upon a time", "def main("]],
    )
    every: Count | None = Field(
        default=None,
        description="Steps between samples; they are also generated at the start and at the end. "
        "null means with every evaluation.",
    )
    max_new_tokens: SmallCount = Field(
        default=64,
        description="Longest sample, in tokens; each token costs a forward pass on all ranks.",
    )
    temperature: PositiveOrZero = Field(
        default=0.8,
        description="Sampling temperature. 0 means greedy decoding. Sampling is seeded by "
        "training.seed.",
    )


class WandbConfig(Section):
    """Logging to Weights & Biases, in addition to the run folder."""

    project: Text = Field(description="W&B project.", examples=["megalite"])
    entity: Text | None = Field(
        default=None,
        description="W&B team or user that owns the project. null means the account's default.",
    )
    mode: Literal["online", "offline", "disabled"] = Field(
        default="online",
        description="online: upload during the run. offline: write to wandb/ in the run folder, "
        "for `wandb sync`. disabled: write nothing.",
    )
    tags: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(), description="Tags of the run in W&B."
    )


class LoggingConfig(Section):
    """The run folder, `directory`/`name`, and further outputs of metrics."""

    directory: PathText = Field(
        default="runs",
        description="Folder that contains the run folder, relative to the working directory.",
    )
    tensorboard: bool = Field(default=True, description="Whether to write TensorBoard files.")
    samples: SamplesConfig | None = Field(
        default=None,
        description="Sample texts that the model generates during training. null means none.",
    )
    wandb: WandbConfig | None = Field(
        default=None, description="Logging to Weights & Biases. null means none."
    )
    sinks: Annotated[tuple[Annotated[str, NameOf(registry.sinks)], ...], Field(strict=False)] = (
        Field(
            default=(),
            description="Names of further outputs of metrics, which installed packages register.",
        )
    )
