"""The `finetune` section of a run file: the task, its data, and which parameters are trained."""

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
    """The labelled data: its path, splits and columns, and how it is tokenized."""

    path: PathText = Field(
        description="A data set of the Hugging Face hub (NAME or NAME@CONFIG), a local JSONL, CSV "
        "or Parquet file, or a folder with one such file per split.",
        examples=["stanfordnlp/imdb"],
    )
    train_split: Text = Field(
        default="train", description="Training split. If path is a file, all of it is this split."
    )
    valid_split: Text | None = Field(
        default=None,
        description="Validation split, measured every epoch. null means that valid_fraction "
        "applies.",
    )
    test_split: Text | None = Field(
        default=None,
        description="Test split, measured at the end. null means that test_fraction applies.",
    )
    valid_fraction: _Part | None = Field(
        default=None,
        description="Fraction of the training split that is held out for validation, drawn by "
        "data.seed. null means none.",
    )
    test_fraction: _Part | None = Field(
        default=None,
        description="Fraction of the training split that is held out as the test split, drawn by "
        "data.seed. null means none.",
    )
    text_column: Text = Field(
        default="text",
        description="classification, language_modeling, seq2seq: column of the input text.",
    )
    label_column: Text = Field(
        default="label", description="classification: column of the label, a number or a name."
    )
    target_column: Text = Field(default="target", description="seq2seq: column of the target text.")
    messages_column: Text = Field(
        default="messages",
        description='sft: column of the conversation, [{"role": "user", "content": "..."}, ...].',
    )
    prompt_column: Text | None = Field(
        default=None,
        description="sft: column of the user's only turn; replaces messages_column, together with "
        "response_column.",
    )
    response_column: Text | None = Field(
        default=None, description="sft: column of the assistant's only turn."
    )
    labels: Annotated[tuple[Text, ...], Field(strict=False)] | None = Field(
        default=None,
        description="classification: the labels in order. null means those of the training split.",
    )
    max_length: Count = Field(
        description="Longest example, in tokens; longer ones are truncated.", examples=[512]
    )
    max_target_length: Count = Field(
        default=128, description="seq2seq: longest target, in tokens; longer ones are truncated."
    )
    packing: bool = Field(
        default=False,
        description="sft, language_modeling: whether to pack several examples into a window of "
        "max_length (best fit) instead of padding. Attention stays within an example.",
    )
    tokenizer: PathText | None = Field(
        default=None,
        description='A tokenizer\'s file or folder, a model of the hub (ORG/NAME), or "bytes". '
        "null means the tokenizer of the initial model; without an initial model, one with "
        "model.vocab_size pieces is trained on the training split.",
    )
    chat_template: PathText | None = Field(
        default=None,
        description="sft: file with a Jinja template. null means the tokenizer's template, or "
        "ChatML if it has none.",
    )
    max_bad_rows: CountOrZero = Field(
        default=0, description="Invalid rows that may be skipped, per split."
    )
    cache: PathText = Field(
        default="data/finetune",
        description="Folder for tokenized examples, which later runs reuse; relative to the "
        "working directory.",
    )


class AdapterConfig(Section):
    """Small trained matrices added to frozen ones (LoRA, arXiv 2106.09685)."""

    name: Literal["lora"] = Field(
        default="lora", description="lora: W x + (alpha / rank) B A x, with a frozen W."
    )
    rank: Count = Field(default=8, description="Rank of B A: rows of A and columns of B.")
    alpha: Positive | None = Field(
        default=None, description="Numerator of the factor alpha / rank. null means 2 x rank."
    )
    dropout: Share = Field(default=0.0, description="Probability of dropping an input of A.")
    targets: Annotated[tuple[_Projection, ...], Field(min_length=1, strict=False)] = Field(
        default=PROJECTIONS, description="Projections that get an adapter."
    )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return (self.alpha or 2 * self.rank) / self.rank


class FinetuneConfig(Section):
    """The fine-tuning task, its data, and the parameters that are trained."""

    task: Annotated[str, NameOf(registry.tasks)] = Field(
        description="classification: predict a label. sft: predict the assistant's turns of "
        "conversations. language_modeling: predict all of a text. seq2seq: predict a target text.",
        examples=["classification"],
    )
    data: ExamplesConfig = Field(description="The labelled data.")
    pooling: Literal["last", "first", "mean"] | None = Field(
        default=None,
        description="classification: hidden state that the label is predicted from: the last or "
        "the first token's, or the mean of all. null means last for a decoder and mean for an "
        "encoder. An encoder_decoder uses its only target token.",
    )
    epochs: Count = Field(
        default=3, description="Passes over the training split; sets training.steps."
    )
    metric: Literal["loss", "accuracy", "precision", "recall", "f1"] | None = Field(
        default=None,
        description="Metric that selects the best checkpoint, on the validation split, or on the "
        "test split if there is none. null means accuracy for classification, otherwise loss.",
    )
    early_stopping: Count | None = Field(
        default=None,
        description="Epochs without a better metric after which the run ends. null means that all "
        "epochs are run.",
    )
    adapter: AdapterConfig | None = Field(
        default=None,
        description="Adapters to train while the model is frozen. null means that the model is "
        "trained.",
    )
    freeze: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Patterns of parameters that are not trained.",
        examples=[["model.embed_tokens.*", "model.layers.[0-3].*"]],
    )
    label_smoothing: Share = Field(
        default=0.0,
        description="Fraction of a target's probability that is spread over all classes (arXiv "
        "1512.00567).",
    )
    class_weights: Annotated[tuple[Positive, ...], Field(strict=False)] | None = Field(
        default=None,
        description="classification: factor of each label's loss, in the order of the labels. null "
        "means 1 for all.",
    )
    balance_classes: bool = Field(
        default=False,
        description="classification: whether to weight each label's loss by rows / (labels x rows "
        "of the label).",
    )
    eval_train: bool = Field(
        default=False,
        description="Whether to also measure the whole training split every epoch, which takes "
        "about a third of the time of training on it.",
    )
