"""Sequence to sequence: [BOS] text [EOS], truncated to fit, and target [EOS], truncated."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.split_arrays import Example, Fields
from data_prep.tasks.base import ExampleTask
from data_prep.tasks.texts import require_tokens, surround
from megalite.config import ExamplesConfig
from megalite.tokenizers.tokenizer import Tokenizer


class Seq2Seq(ExampleTask):
    """The task "seq2seq": an encoder-decoder learns to write a target for a text."""

    @classmethod
    def columns_of(cls, data: ExamplesConfig) -> list[str]:
        return [data.text_column, data.target_column]

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        super().set_tokenizer(tokenizer)
        eos = tokenizer.eos_id
        # A target ends with EOS, even if the tokenizer has another suffix.
        self.target_end = self.after if eos is None else [eos]

    def encode(self, fields: Fields, texts: Sequence[list[int]]) -> Example:
        require_tokens(texts)
        data = self.context.data
        source, is_cut = surround(texts[0], self.before, self.after, data.max_length)
        target = texts[-1] + self.target_end
        limit = data.max_target_length
        loss_mask = [False] * len(source) + [True] * min(len(target), limit)
        return Example(source + target[:limit], loss_mask, is_cut=is_cut or len(target) > limit)
