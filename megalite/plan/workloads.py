"""The workload of one rank in a micro-batch, and its cost."""

from __future__ import annotations

from megalite import arch, registry
from megalite.arch.norms import is_block_norm
from megalite.arch.part import Workload
from megalite.config import FinetuneConfig, ModelConfig, RunConfig, target_fraction
from megalite.plan.costs import ModelCosts, model_costs, workloads
from megalite.plan.devices import Kind
from megalite.plan.gradients import gradients
from megalite.plan.sizes import Plan


def run_costs(
    config: RunConfig, plan: Plan, device: Kind = "cuda", *, document_tokens: float | None = None
) -> ModelCosts:
    """Return the costs of a run on one rank, for one micro-batch.

    Args:
        device: affects only the bytes saved for the backward.
        document_tokens: mean length of documents that do not attend to each other. None means no
            document masks.
    """
    model, training, tuning = config.model, config.training, config.finetune
    eager_cpu = device == "cpu" and not training.compile
    element = plan.precision.bytes
    common = Workload(
        tokens=0,
        samples=plan.micro_batch_size,
        tensor=plan.mesh.tensor,
        sequence=config.parallel.sequence,
        recompute=training.activation_checkpointing != "none",
        compiled=training.compile,
        eager_cpu=eager_cpu,
        cpu=device == "cpu",
        document_tokens=document_tokens,
        element=element,
        norm_bytes=_norm_bytes(model, tuning, element, eager_cpu=eager_cpu),
        target_fraction=target_fraction(config),
        label_smoothing=bool(tuning and tuning.label_smoothing),
    )
    documents = tuning.data.packing if tuning else config.data.mask_documents
    padded = tuning is not None and model.architecture != "decoder"
    return model_costs(
        model, tuning, workloads(model, arch.lengths(config), common, masks=documents or padded)
    )


def _norm_bytes(
    model: ModelConfig, tuning: FinetuneConfig | None, element: int, *, eager_cpu: bool
) -> float:
    """Return the bytes that a block's norm saves per element, for its input and output.

    PyTorch has no CPU kernel for RMS norm (rms_norm in aten/src/ATen/native/layer_norm.cpp). Its
    decomposition saves the input in fp32, and the normalized input if the gain is trained.
    """
    if not eager_cpu or not registry.norms.facts(model.norm).get("composite"):
        return 2 * element
    trained = gradients(model, tuning).trained
    norms = [spec.name for spec in arch.parameters(model) if is_block_norm(spec)]
    return element + 4 + 4 * sum(name in trained for name in norms) / len(norms)
