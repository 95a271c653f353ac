"""The `logging` section of a run file: the run folder, and services that show the run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megalite import registry
from megalite.config.fields import Count, PathText, PositiveOrZero, Section, SmallCount, Text
from megalite.config.names import NameOf


class SamplesConfig(Section):
    """Texts that the model writes while it trains."""

    prompts: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] = Field(
        description="What it continues, or answers: of sft each is a user's turn.",
        examples=[["Once upon a time", "def main("]],
    )
    every: Count | None = Field(
        default=None,
        description="Steps between them; the start and the end have them, too (null: with every "
        "evaluation).",
    )
    max_new_tokens: SmallCount = Field(
        default=64, description="Tokens of a text; each costs a forward pass of all ranks."
    )
    temperature: PositiveOrZero = Field(
        default=0.8,
        description="What scores are divided by before a token is drawn, by training.seed "
        "(0: always the likeliest token).",
    )


class WandbConfig(Section):
    """The run in Weights & Biases, next to its own records."""

    project: Text = Field(description="Name of the project there.", examples=["megalite"])
    entity: Text | None = Field(
        default=None, description="The team or user it belongs to (null: the account's own)."
    )
    mode: Literal["online", "offline", "disabled"] = Field(
        default="online",
        description="Whether it is sent at once, or kept in wandb/ of the run folder for `wandb "
        "sync`, or not written.",
    )
    tags: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(), description="Words to find the run by."
    )


class LoggingConfig(Section):
    """The run folder, which is `directory`/`name`."""

    directory: PathText = Field(
        default="runs",
        description="Folder of run folders, relative to the working directory.",
    )
    tensorboard: bool = Field(default=True, description="Whether TensorBoard files are written.")
    samples: SamplesConfig | None = Field(
        default=None, description="Texts the model writes while it trains (null: none)."
    )
    wandb: WandbConfig | None = Field(
        default=None, description="Weights & Biases (null: nothing is sent there)."
    )
    sinks: Annotated[tuple[Annotated[str, NameOf(registry.sinks)], ...], Field(strict=False)] = (
        Field(default=(), description="Sinks of installed packages that the run is shown to.")
    )
