# covers: megalite/evaluate/loading.py
"""A tokenizer with more ids than its model: a warning at loading, and an error on use."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from megalite.data import Batch
from megalite.errors import CommandError
from megalite.evaluate import open_model
from tests.unit.huggingface.test_huggingface_families import exported


def test_ids_beyond_the_vocabulary_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported("llama", 0, tmp_path, vocab_size=120)  # the byte tokenizer has 258 ids
    with caplog.at_level(logging.WARNING, logger="megalite"):
        loaded = open_model(tmp_path)
    assert "the tokenizer has 258 ids, the model 120" in caplog.text
    reader = loaded.decoder()
    assert reader.begin([[7, 119]], 1).shape == (1, 120)
    message = r"token .* of id 200, but the model has 120 ids, .*fine-tune the model"
    with pytest.raises(CommandError, match=message):
        reader.begin([[7], [200, 3]], 1)
    ids = torch.tensor([[5, 200]])
    with pytest.raises(CommandError, match=message):
        loaded.last_logits(ids)
    mask = torch.ones_like(ids).bool()
    tensors = {"input_ids": ids, "labels": ids.clamp(max=9), "loss_mask": mask}
    with pytest.raises(CommandError, match=message):
        loaded.loss(Batch(tensors, 0, 2, 2))
    tensors["input_ids"] = ids.clamp(max=119)
    assert loaded.loss(Batch(tensors, 0, 2, 2)).isfinite()


def test_model_that_has_every_id_is_loaded_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported("llama", 0, tmp_path, vocab_size=300)
    with caplog.at_level(logging.WARNING, logger="megalite"):
        open_model(tmp_path)
    assert not caplog.records
