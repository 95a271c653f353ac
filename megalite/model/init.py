"""Initial weights as a function of (seed, tensor name, block of rows).

Every tensor is divided into blocks of `ROWS` rows of its canonical [out, in] shape. Each block has
its own generator, on the CPU in fp32. So a rank draws only the blocks that it holds, and every
layout, precision and device starts from the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from megalite import arch
from megalite.config import ModelConfig
from megalite.mesh import WHOLE, Coordinate

ROWS = 128


def initialize(
    model: nn.Module,
    config: ModelConfig,
    *,
    seed: int,
    gather: Callable[[nn.Parameter], AbstractContextManager[object]],
    at: Coordinate = WHOLE,
) -> None:
    """Initialise the parameters of `model`, one at a time.

    Args:
        gather: returns a context in which a parameter is whole and may be written. Engines that
            shard parameters need it.
    """
    table = {parameter.name: parameter for parameter in arch.parameters(config)}
    for name, parameter in model.named_parameters():
        row = table[name]
        std = config.initializer_range
        if row.init is arch.Init.SCALED_NORMAL:  # GPT-2: residual sums keep their variance
            std /= math.sqrt(2 * config.num_hidden_layers)
        with torch.no_grad(), gather(parameter):
            if parameter.numel() == 0:  # gathered on another rank only, which writes it for all
                continue
            parameter.zero_()  # padding and biases stay zero
            for piece in arch.pieces(row, at):
                if row.init is arch.Init.ONES:
                    parameter[piece.target].fill_(1.0)
                elif row.init is not arch.Init.ZEROS:
                    if row.init is arch.Init.ADAPTER:
                        std = 1 / math.sqrt(3 * piece.tensor.shape[1])
                    _fill(parameter[piece.target], piece, std=std, seed=seed)


def _fill(target: Tensor, piece: arch.Piece, *, std: float, seed: int) -> None:
    """Draw the blocks that overlap the piece's rows, and copy the piece out of them."""
    shape = piece.tensor.shape
    rows, *columns = piece.source
    first, last = rows.start, rows.stop
    for block in range(first // ROWS, math.ceil(last / ROWS)):
        base = block * ROWS
        height = min(ROWS, shape[0] - base)
        generator = torch.Generator().manual_seed(_key(seed, piece.tensor.name, block))
        values = torch.randn((height, *shape[1:]), generator=generator)
        low = max(first, base)
        high = min(last, base + height)
        box = (slice(low - base, high - base), *columns)
        target[low - first : high - first].copy_(values[box].mul_(std))


def _key(seed: int, name: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # manual_seed takes 63 bits
