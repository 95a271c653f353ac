"""The `finetune` section of a run file: labelled data, and what is learned from it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from megalite import registry
from megalite.config.fields import Count, CountOrZero, PathText, Positive, Section, Share, Text
from megalite.config.names import NameOf

_Part = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
_Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[_Projection, ...] = get_args(_Projection)


class ExamplesConfig(Section):
    """Source of the examples, with the names of its columns."""

    path: PathText = Field(
        description="A data set of the Hugging Face hub (NAME or NAME@CONFIG), a local JSONL, CSV "
        "or Parquet file, or a folder with one such file a split.",
        examples=["stanfordnlp/imdb"],
    )
    train_split: Text = Field(
        default="train", description="The split learned from; of a single file, all of it."
    )
    valid_split: Text | None = Field(
        default=None, description="The split that choices are made on (null: see valid_fraction)."
    )
    test_split: Text | None = Field(
        default=None, description="The split measured last (null: see test_fraction)."
    )
    valid_fraction: _Part | None = Field(
        default=None,
        description="Share of the training split that is cut off by data.seed, to choose on.",
    )
    test_fraction: _Part | None = Field(
        default=None, description="Share of the training split that is cut off by data.seed."
    )
    text_column: Text = Field(
        default="text",
        description="What is read (classification, language_modeling, seq2seq).",
    )
    label_column: Text = Field(
        default="label", description="classification: the label, a number or a name."
    )
    target_column: Text = Field(default="target", description="seq2seq: what is written.")
    messages_column: Text = Field(
        default="messages",
        description='sft: a conversation, [{"role": "user", "content": "..."}, ...].',
    )
    prompt_column: Text | None = Field(
        default=None, description="sft: the user's one turn, in place of messages_column."
    )
    response_column: Text | None = Field(
        default=None, description="sft: the assistant's one turn, next to prompt_column."
    )
    labels: Annotated[tuple[Text, ...], Field(strict=False)] | None = Field(
        default=None,
        description="classification: the labels in order (null: those of the training split).",
    )
    max_length: Count = Field(
        description="Tokens of an example; what is longer is cut off.", examples=[512]
    )
    max_target_length: Count = Field(
        default=128, description="seq2seq: tokens that are written; what is longer is cut off."
    )
    packing: bool = Field(
        default=False,
        description="sft, language_modeling: if true, examples share windows of max_length in "
        "place of padding (best fit); attention does not cross between them.",
    )
    tokenizer: PathText | None = Field(
        default=None,
        description='A tokenizer\'s file or folder, a model of the hub (ORG/NAME), or "bytes" '
        "(null: that of the model started from; without one it is learned from the training split, "
        "with model.vocab_size pieces).",
    )
    chat_template: PathText | None = Field(
        default=None,
        description="sft: a file with a Jinja template (null: the tokenizer's own, else ChatML).",
    )
    max_bad_rows: CountOrZero = Field(
        default=0, description="Rows that may be omitted for a fault, each split counted alone."
    )
    cache: PathText = Field(
        default="data/finetune",
        description="Folder of tokenized examples, which are made once; relative to the working "
        "directory.",
    )


class AdapterConfig(Section):
    """Small trained matrices next to frozen ones (LoRA, arXiv 2106.09685)."""

    name: Literal["lora"] = Field(default="lora", description="W x + alpha / rank x B (A x).")
    rank: Count = Field(default=8, description="Rows of A and columns of B.")
    alpha: Positive | None = Field(
        default=None, description="Numerator of the adapter's factor (null: twice the rank)."
    )
    dropout: Share = Field(default=0.0, description="Probability of dropping an input of A.")
    targets: Annotated[tuple[_Projection, ...], Field(min_length=1, strict=False)] = Field(
        default=PROJECTIONS, description="The projections that have one."
    )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return (self.alpha or 2 * self.rank) / self.rank


class FinetuneConfig(Section):
    """The fine-tuning task, its examples, and the trained part of the model."""

    task: Annotated[str, NameOf(registry.tasks)] = Field(
        description="A label; the assistant's turns of conversations; all of a text; or another "
        "text.",
        examples=["classification"],
    )
    data: ExamplesConfig = Field(description="The examples.")
    pooling: Literal["last", "first", "mean"] | None = Field(
        default=None,
        description="classification: the token, or the mean of all, that the label is read from "
        "(null: last of a decoder, mean of an encoder; an encoder_decoder writes one token).",
    )
    epochs: Count = Field(
        default=3, description="Times the training split is read; sets training.steps."
    )
    metric: Literal["loss", "accuracy", "precision", "recall", "f1"] | None = Field(
        default=None,
        description="What the best checkpoint is chosen by, on valid, else test (null: accuracy "
        "of a classification, else loss).",
    )
    early_stopping: Count | None = Field(
        default=None, description="Epochs without a better metric before the run ends (null: all)."
    )
    adapter: AdapterConfig | None = Field(
        default=None, description="Adapters learn and the model is frozen (null: it learns)."
    )
    freeze: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Patterns of parameters that do not learn.",
        examples=[["model.embed_tokens.*", "model.layers.[0-3].*"]],
    )
    label_smoothing: Share = Field(
        default=0.0, description="Share of a target that is spread over all (arXiv 1512.00567)."
    )
    class_weights: Annotated[tuple[Positive, ...], Field(strict=False)] | None = Field(
        default=None, description="classification: a factor of each label's loss (null: 1)."
    )
    balance_classes: bool = Field(
        default=False,
        description="classification: whether a label's factor is rows / (labels x its rows).",
    )
    eval_train: bool = Field(
        default=False,
        description="If true, each epoch also measures the whole training split, which costs about "
        "a third of training on it.",
    )
