"""Language modeling: [BOS] text [EOS], truncated; every token except BOS is a target."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.split_arrays import Example, Fields
from data_prep.tasks.base import ExampleTask
from data_prep.tasks.texts import require_tokens
from megalite.config import ExamplesConfig


class LanguageModeling(ExampleTask):
    """The task "language_modeling": a decoder learns to write texts."""

    @classmethod
    def columns_of(cls, data: ExamplesConfig) -> list[str]:
        return [data.text_column]

    def encode(self, fields: Fields, texts: Sequence[list[int]]) -> Example:
        require_tokens(texts)
        most = self.context.data.max_length
        ids = self.before + texts[0] + self.after
        loss_mask = [number >= len(self.before) for number in range(min(len(ids), most))]
        return Example(ids[:most], loss_mask, is_cut=len(ids) > most)
