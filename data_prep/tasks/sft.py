"""Supervised fine-tuning: a truncated conversation, in which assistant's turns are targets."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.chat import Chat
from data_prep.messages import OPTIONAL_COLUMNS, read_conversation
from data_prep.records import Unusable
from data_prep.row import SourceRow
from data_prep.split_arrays import Example, Fields
from data_prep.tasks.base import ExampleTask, TaskContext
from megalite.config import ExamplesConfig
from megalite.tokenizers.tokenizer import Tokenizer


class SupervisedFineTuning(ExampleTask):
    """The task "sft": a decoder learns the assistant's turns of conversations."""

    def __init__(self, context: TaskContext) -> None:
        super().__init__(context)
        self.optional = [name for name in OPTIONAL_COLUMNS if name not in self.columns]

    @classmethod
    def columns_of(cls, data: ExamplesConfig) -> list[str]:
        if data.prompt_column and data.response_column:
            return [data.prompt_column, data.response_column]
        return [data.messages_column]

    def read(self, row: SourceRow) -> Fields:
        messages, tools = read_conversation(row, self.columns)
        return Fields(row, (), messages=messages, tools=tools)

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        assert self.context.template is not None
        self.chat = Chat(self.context.template, tokenizer)
        super().set_tokenizer(tokenizer)

    def encode(self, fields: Fields, texts: Sequence[list[int]]) -> Example:
        del texts
        most = self.context.data.max_length
        ids, loss_mask = self.chat.encode(fields.messages, fields.tools)
        if not any(loss_mask):
            raise Unusable(
                "nothing of it is learned: the chat template omits the assistant's turns, or each "
                "of them has weight 0"
            )
        if not any(loss_mask[:most]):
            raise Unusable(f"none of the assistant's tokens is among the first {most}")
        return Example(ids[:most], loss_mask[:most], is_cut=len(ids) > most)

    def report(self, title: str) -> None:
        self.chat.report(title)
