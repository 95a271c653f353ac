"""Train with your own objective: next-token loss, plus a penalty on large hidden states.

Run pretrain.py first: it tokenizes the data.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import megalite
from megalite import registry
from megalite.model import LanguageModel
from megalite.model.objectives import ExtraTerm, LossTerms, TokenObjective


class SmallStates(TokenObjective):
    """Objective with a penalty that is a mean over the target tokens."""

    def loss(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> LossTerms:
        hidden_BTD = model.hidden(batch)
        squares_BT = hidden_BTD.float().square().mean(dim=-1)
        penalty = ExtraTerm(0.01 * (squares_BT * batch["loss_mask"]).sum(), "count")
        return LossTerms(model.token_loss(hidden_BTD, batch), {"penalty": penalty})


registry.objectives.register("small_states", architectures=("decoder",))(lambda _: SmallStates())
changes = {"name": "small_states", "objective.name": "small_states"}
run = megalite.pretrain(Path(__file__).with_name("tiny.json"), overrides=changes)
print([(row["step"], row["loss"]) for row in run.metrics if row["kind"] == "train"])
