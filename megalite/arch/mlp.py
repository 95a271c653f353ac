"""The MLP of a block. The letters are those of `megalite.arch.part`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalite.arch.norms import in_forward_order, norm_rows
from megalite.arch.part import Cost, Flow, Grads, SavedBytes, Workload
from megalite.arch.products import KERNELS, RESIDUAL_PASSES, ProductMessages, product_flops
from megalite.arch.table import Init, ParameterSpec, Sees, Split, specify
from megalite.config import ModelConfig


@dataclass(frozen=True)
class MLP:
    """The MLP, gated or plain, and the norm of its residual branch, which ends a block."""

    def rows(self, model: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
        """Yield the parameters; gate and up are fused into one matrix."""
        width, inner = model.hidden_size, model.intermediate_size
        yield from norm_rows(model, f"{prefix}post_attention_layernorm")
        name = f"{prefix}mlp.up_proj"
        parts = ["up_proj"]
        if model.gated:
            name = f"{prefix}mlp.gate_up_proj"
            parts = ["gate_proj", "up_proj"]
        weights = {part: (inner, width) for part in parts}
        yield specify(f"{name}.weight", weights, Split.OUTPUT_DIM)
        if model.mlp_bias:
            biases = {part: (inner,) for part in parts}
            yield specify(f"{name}.bias", biases, Split.OUTPUT_DIM)
        down = f"{prefix}mlp.down_proj"
        yield specify(f"{down}.weight", (width, inner), Split.INPUT_DIM, Init.SCALED_NORMAL)
        if model.mlp_bias:
            yield specify(f"{down}.bias", (width,), sees=Sees.OWN_TOKENS)

    def follow(self, model: ModelConfig, specs: Sequence[ParameterSpec], flow: Flow) -> None:
        """Update `flow` by norm and MLP."""
        ordered = in_forward_order(model, specs, "post_attention_layernorm")
        flow.hidden = flow.through(ordered, flow.hidden)

    def cost(
        self, model: ModelConfig, specs: Sequence[ParameterSpec], load: Workload, grads: Grads
    ) -> Cost:
        """Return the cost of one block's MLP."""
        messages = ProductMessages(specs, model.hidden_size, load, grads)
        stream = load.stream_width(model)
        element = load.element
        inner = model.intermediate_size // load.tensor
        parts = 2 if model.gated else 1
        # if an operation after a block's last all-reduce saves its input, the recompute repeats
        # that all-reduce
        follows = model.norm_position == "post" or model.hidden_dropout > 0
        repeats = load.recompute and (follows or "mlp.down_proj" in messages.low)
        up = "mlp.gate_up_proj" if model.gated else "mlp.up_proj"
        # outputs of the first product, and of the activation times the other half
        activated = (parts + 1) * inner
        moved = RESIDUAL_PASSES[load.compiled] * stream + model.hidden_size + activated
        moved += activated if load.compiled else 2 * activated
        first = element * parts * inner
        return Cost(
            products=product_flops(specs, load.tokens, grads),
            messages=(
                *messages.column(up, load.batch_tokens),
                *messages.row("mlp.down_proj", load.batch_tokens, again=repeats),
            ),
            saved=SavedBytes(
                norm=stream * load.norm_bytes,
                values=2 * first + stream * load.dropout_bytes(model),
                outputs=element * stream + first,
                work=element * (2 * model.hidden_size + activated),
                large=(first, *[element * inner] * parts),
            ),
            moved=element * load.batch_tokens * moved,
            kernels=KERNELS[load.compiled],
        )
