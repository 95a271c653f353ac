"""The models as single-device mathematics, without ranks, groups or environment."""

from megalite.model.cache import Cache
from megalite.model.heads import head_loss
from megalite.model.init import initialize
from megalite.model.objectives import (
    ExtraTerm,
    LossTerms,
    Objective,
    make_objective,
    plain_objective,
)
from megalite.model.regions import ONE_DEVICE, Regions
from megalite.model.transformer import EncoderDecoder, LanguageModel, build, last_scores

__all__ = [
    "ONE_DEVICE",
    "Cache",
    "EncoderDecoder",
    "ExtraTerm",
    "LanguageModel",
    "LossTerms",
    "Objective",
    "Regions",
    "build",
    "head_loss",
    "initialize",
    "last_scores",
    "make_objective",
    "plain_objective",
]
