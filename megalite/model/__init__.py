"""The models as single-device mathematics: no rank, no group, no environment."""

from megalite.model.cache import Cache
from megalite.model.heads import head_loss
from megalite.model.init import initialize
from megalite.model.transformer import EncoderDecoder, LanguageModel, build

__all__ = ["Cache", "EncoderDecoder", "LanguageModel", "build", "head_loss", "initialize"]
