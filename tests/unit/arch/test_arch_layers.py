# covers: megalite/arch/network.py megalite/arch/part.py
"""Models with `layer_types`: their parameters, outputs and costs, and the rules of the list."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite import arch
from megalite.config import ModelConfig, RunConfig, parse_config
from megalite.errors import ConfigError
from megalite.model.cache import Cache
from megalite.plan import flops_per_token, make_plan
from tests.helpers.models import make_model, model_config
from tests.helpers.runs import BASE

FULL, SLIDING = "full_attention", "sliding_attention"
MIXED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "layer_types": [SLIDING, FULL],
}


def run_of(**model: Any) -> RunConfig:
    return parse_config(BASE | {"model": BASE["model"] | model})


def windows(model: ModelConfig) -> list[int | None]:
    [layers] = arch.stacks(model).values()
    return arch.layer_windows(model, layers)


def test_layer_types_are_repeated_over_the_layers() -> None:
    assert windows(model_config(**MIXED)) == [5, None, 5, None]
    assert windows(model_config(**MIXED | {"layer_types": None})) == [5, 5, 5, 5]
    assert windows(model_config(num_hidden_layers=2)) == [None, None]


def test_layer_types_change_no_parameter() -> None:
    plain = model_config(num_hidden_layers=4)
    assert arch.parameters(model_config(**MIXED)) == arch.parameters(plain)


@pytest.mark.parametrize("position", ["rope", "relative"])
@pytest.mark.parametrize(("kind", "window"), [(SLIDING, 5), (FULL, None)])
def test_layer_types_of_one_kind_are_the_model_without_a_list(
    position: str, kind: str, window: int | None
) -> None:
    ids = torch.arange(20)[None] % 61
    shape = {"num_hidden_layers": 4, "position_embedding": position}
    listed, plain, mixed = (
        make_model(model_config(**shape | changes))
        for changes in (
            {"sliding_window": window, "layer_types": [kind]},
            {"sliding_window": window},
            MIXED,
        )
    )
    with torch.no_grad():
        assert torch.equal(listed.logits(ids), plain.logits(ids))
        assert not torch.equal(mixed.logits(ids), plain.logits(ids))


def test_layer_types_keep_their_windows_in_decoding_with_a_cache() -> None:
    config = model_config(**MIXED)
    model = make_model(config).eval()
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    cache = Cache(config, 4, batch=2, tokens=20, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        expected = model.logits(ids)
        steps = [ids[:, :7], *ids[:, 7:].split(1, dim=1)]
        logits = [model.scores(model.hidden({"input_ids": part}, cache)) for part in steps]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_costs_of_mixed_layers_lie_between_those_of_their_kinds() -> None:
    """FLOPs are the mean of both kinds. Half of the layers save a mask."""
    length, sizes = 64, {"num_hidden_layers": 4, "sliding_window": 8}
    mixed, sliding = run_of(**sizes, layer_types=[SLIDING, FULL]), run_of(**sizes)
    full = run_of(num_hidden_layers=4)
    flops = [flops_per_token(run.model, length) for run in (full, mixed, sliding)]
    assert flops[0] - flops[1] == flops[1] - flops[2] > 0
    saved = [
        make_plan(run, world_size=1, device="cpu").memory_bytes["activations"]
        for run in (full, mixed, sliding)
    ]
    mask = length**2  # one shared bool mask; each sliding layer saves it in fp32
    assert saved[1] - saved[0] == mask + 2 * 4 * mask
    assert saved[2] - saved[0] == mask + 4 * 4 * mask


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"layer_types": ["sliding_atention"]}, 'did you mean "sliding_attention"?'),
        (
            {"layer_types": [FULL] * 3},
            "its length 3 does not divide the 2 layers; use a list of 1, 2",
        ),
        ({"layer_types": [SLIDING, FULL]}, "set model.sliding_window"),
        ({"layer_types": [FULL], "sliding_window": 4}, "no layer has sliding_attention"),
        ({"layer_types": []}, "expected a list of 1 or more"),
        ({"layer_types": [FULL], "architecture": "encoder_decoder"}, 'architecture "decoder"'),
    ],
)
def test_layer_types_that_do_not_fit_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(**section)
    assert message in str(caught.value)
