"""The DeepSpeed engine: ZeRO stages 0 to 3 in fp32, bf16 and fp16.

DeepSpeed partitions, reduces and keeps the fp32 masters; the loss's divisor, the learning rate and
the optimizer's mathematics stay MegaLite's. Its own scaling is kept out: gradients are summed over
ranks and the loss is divided once, by the targets of the whole global batch.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from megalite import arch
from megalite.config import Precision, RunConfig
from megalite.data import Batch
from megalite.engine.deepspeed import settings as deepspeed_settings
from megalite.engine.base import (
    WEIGHT,
    Accept,
    StepLoss,
    StepResult,
    finite,
    freeze,
    has_dropout,
    seed_dropout,
)
from megalite.engine.deepspeed.partitions import fragment, fragments
from megalite.engine.reference import (
    clip_gradients,
    create_states,
    group_numbers,
    join_whole,
    plain_gradient,
    read_plain,
    set_updates,
    updates_taken,
)
from megalite.model import (
    LanguageModel,
    LossTerms,
    Objective,
    build,
    initialize,
    last_scores,
    make_objective,
)
from megalite.optim import Fragment, Muon, make_optimizer, orthogonalize
from megalite.parallel import (
    Grid,
    apply_recompute_and_compile,
    apply_tensor_parallel,
    make_regions,
)


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which every engine asks for and none here uses, uncompiled.

    It decorates functions with torch.compile, and that alone imports the compiler: 0.8 s.
    """
    whole = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = whole


_import_muon()


class DeepSpeedEngine:
    """One rank's engine.

    Args:
        settings: the DeepSpeed JSON with every value filled in (`deepspeed_settings.fill_defaults`).
        objective: computes the loss. The default is the run file's.
    Raises:
        EngineError: DeepSpeed uses another value than `settings` says.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        grid: Grid,
        precision: Precision,
        settings: Mapping[str, Any],
        objective: Objective | None = None,
    ) -> None:
        self.config, self._grid = config, grid
        self.device, self.settings = grid.device, dict(settings)
        self.stage = int(settings["zero_optimization"]["stage"])
        self.fp16 = precision is Precision.FP16
        self.objective = objective or make_objective(config)
        self._dropout = has_dropout(config.model)
        deepspeed_settings.init_deepspeed()
        # ZeRO-3 refuses "sum" and averages over the ranks: undone in the loss
        averages = settings["gradient_allreduce_op"] == "mean"
        self._loss_scale = float(grid.mesh.zero) if averages else 1.0
        dtype = precision.torch
        sequence = config.parallel.sequence
        regions = make_regions(config.model, grid, sequence=sequence)
        with self._building(grid), grid.device:
            self.model: LanguageModel = build(config.model, regions)
        self.model.to(device=grid.device, dtype=dtype)
        initialize(
            self.model,
            config.model,
            seed=config.training.seed,
            gather=self._writable,
            at=grid.at,
        )
        freeze(self.model, config)
        apply_tensor_parallel(self.model, config.model, grid, sequence=sequence)
        apply_recompute_and_compile(
            self.model.blocks,
            recompute=config.training.activation_checkpointing,
            compile_blocks=config.training.compile,
        )
        if config.training.compile and self.stage == 3:
            # a compiled block cannot fetch its parts one by one: fetch it whole (no graph breaks)
            deepspeed.utils.set_z3_leaf_modules(self.model, [type(next(iter(self.model.blocks)))])
        optimizer = make_optimizer(config, self.model.named_parameters())
        self._groups = group_numbers(optimizer)  # before DeepSpeed puts its own tensors there
        with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory to it
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=optimizer,
                config=self.settings,
                mpu=deepspeed_settings.Mpu(grid),
                dist_init_required=False,
            )
        deepspeed_settings.verify_effective(self.settings, self.engine)
        self._create_states()
        if self.stage > 0:
            self._gate_steps()
        self._holders = self._find_holders() if self.stage in (1, 2) else {}

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        divisor: float,
        lr: float,
        step: int,
        inspect: Callable[[], None] | None = None,
        accept: Accept = finite,
    ) -> StepResult:
        self.engine.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        samples = self.config.training.global_batch_size
        losses = StepLoss(self.device, count=divisor, samples=samples)
        for index, batch in enumerate(batches):
            if self._dropout:
                seed_dropout(self.config.training.seed, step, batch.place)
            # through the engine, so that ZeRO-3 gathers what the objective's loss needs
            mean = losses.add(self.engine(self.objective.loss, batch.to(self.device).tensors))
            self.engine.backward(mean * self._loss_scale, scale_wrt_gas=False)
            if index < len(batches) - 1:
                self.engine.step()  # which counts, no more
        if inspect is not None:
            inspect()
        norm = self._update(losses.loss, accept)
        return StepResult(loss=losses.loss, grad_norm=norm, extra=losses.extra)

    def _update(self, loss: Tensor, accept: Accept) -> Tensor:
        """Clip and update, if that is accepted; returns the norm before clipping."""
        if self.stage == 0:
            # stage 0 clips without reporting the norm: done here, DeepSpeed's own is off
            parameters = list(self.model.parameters())
            limit = self.config.optimizer.clip_grad_norm
            norm = clip_gradients(parameters, limit, self._grid)
            if not accept(loss, norm):
                for parameter in parameters:  # an optimizer passes over what has no gradient
                    parameter.grad = None
            self.engine.step()
            return norm
        self._norm, self._accepts = None, partial(accept, loss)
        self.engine.step()
        if self._norm is None:  # DeepSpeed met a number that is not finite, and gave up
            self._norm = torch.full_like(loss, torch.inf)
            accept(loss, self._norm)
        return self._norm

    @torch.no_grad()
    def eval_loss(self, batch: Batch) -> Tensor:
        self.engine.eval()
        terms: LossTerms = self.engine(self.objective.loss, batch.to(self.device).tensors)
        return terms.total

    @torch.no_grad()
    def eval_scores(self, batch: Batch) -> Tensor:
        self.engine.eval()
        scores: Tensor = self.engine(last_scores, batch.to(self.device).tensors)
        return scores

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        if self.stage != 3:
            return nullcontext()
        context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=None
        )
        return context

    def read_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        if not parameter.requires_grad:
            with self.gathered([parameter]):
                return parameter.detach().float().clone()
        if self.stage == 0:
            return read_plain(self.optimizer, parameter, key)
        if key == WEIGHT:
            value: Tensor = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        return value.view(getattr(parameter, "ds_shape", parameter.shape))

    def owner_rank(self, parameter: nn.Parameter) -> int | None:
        return self._holders.get(id(parameter))

    def read_local(self, parameter: nn.Parameter, key: str) -> Tensor:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        value: Tensor = mapping.get_hp_fragment(None if key == WEIGHT else key)
        return value.detach().view(parameter.shape)

    def read_gradient(self, parameter: nn.Parameter) -> Tensor:
        if self.stage == 0 or not parameter.requires_grad:
            return plain_gradient(parameter)
        value: Tensor = safe_get_full_grad(parameter)
        return value.view(getattr(parameter, "ds_shape", parameter.shape))

    def write_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 0:
            read_plain(self.optimizer, parameter, key).copy_(value)
        elif key == WEIGHT:
            if not parameter.requires_grad:
                pass  # it has no master
            elif self.stage == 3:
                safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
            else:
                safe_set_full_fp32_param(parameter, value)
            # the call above reaches the fp32 master alone, not the copy the next forward reads
            with torch.no_grad(), self._writable(parameter):
                if parameter.numel():
                    parameter.copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """What of a whole value this rank keeps under ZeRO-3.

        DeepSpeed's own cut fails where ranks do not divide the elements and the last part is short.
        """
        size = parameter.ds_tensor.ds_numel
        padded = value.new_zeros(size * self._grid.mesh.zero)
        padded[: value.numel()] = value.flatten()
        return padded[self._grid.at.zero_rank * size :][:size]

    def group(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        group: Mapping[str, Any] = self._inner().param_groups[self._groups[id(parameter)]]
        return group

    def progress(self) -> dict[str, Any]:
        progress: dict[str, Any] = {"updates": updates_taken(self._inner())}
        if self.fp16:
            scaler = self.optimizer.loss_scaler
            progress["loss_scaler"] = {name: getattr(scaler, name) for name in _SCALER_STATE}
        return progress

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        set_updates(self._inner(), progress["updates"])
        if self.fp16 and progress.get("loss_scaler"):
            for name in _SCALER_STATE:
                setattr(self.optimizer.loss_scaler, name, progress["loss_scaler"][name])

    def _gate_steps(self) -> None:
        """Ask for acceptance where DeepSpeed, with the gradient's norm, steps the inner optimizer.

        It does so once for each group or part of one; what is refused changes nothing. It has just
        waited for the device by then, to see whether the norm is finite.
        """
        inner, zero = self._inner(), self.optimizer
        step = inner.step

        def gated() -> None:
            if self._norm is None:
                norm = zero._global_grad_norm
                self._norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
                self._accepted = self._accepts(self._norm)
            if self._accepted:
                step()

        inner.step = gated  # type: ignore[method-assign, assignment]

    def _create_states(self) -> None:
        """Make the optimizer's states now: a checkpoint may be read into them before any step.

        Directly, since a step with zero gradients would count, and overflow in fp16. And before the
        first step, since there DeepSpeed links the states of the first group alone.
        """
        inner, zero = self._inner(), self.optimizer
        if self.stage == 3:
            flat: list[list[Tensor]] = [[] for _ in inner.param_groups]
            for number, tensor in enumerate(zero.fp32_partitioned_groups_flat):
                flat[zero.sub_group_to_group_id[number]].append(tensor)
            create_states(inner, flat)
        else:
            create_states(inner)
            if self.stage > 0:
                zero._lazy_init_hp_params_optimizer_state()
        if isinstance(inner, Muon):
            self._join_matrices(inner)

    def _find_holders(self) -> dict[int, int]:
        """The ranks that have all of a parameter's partition; of those that were cut, none."""
        parameters = list(self.model.parameters())
        held = [fragment(p)[1] if p.numel() else 0 for p in parameters]
        found = torch.zeros(self._grid.mesh.zero, len(parameters), dtype=torch.int64)
        found[self._grid.at.zero_rank] = torch.tensor(held)
        found = found.to(self.device)
        dist.all_reduce(found, group=self._grid.zero_group)
        whole = found == torch.tensor([p.numel() for p in parameters], device=self.device)
        return {id(parameters[index]): rank for rank, index in whole.nonzero().tolist()}

    def _join_matrices(self, muon: Muon) -> None:
        """Tell Muon where DeepSpeed keeps the parts of each matrix."""
        if self.stage == 0:
            join_whole(muon, self.model, self.config.model, self._grid)
            return
        rows = {row.name: row for row in arch.parameters(self.config.model)}
        named = {id(p): rows[name] for name, p in self.model.named_parameters()}
        held = fragments(self.optimizer, self.stage, self._grid)
        by_master = {
            key: [Fragment(named[id(p)], *place) for p, place in parts]
            for key, parts in held.items()
        }
        muon.orthogonalize = lambda master, update: orthogonalize(
            update, by_master[id(master)], self._grid, replicas=False
        )

    def _inner(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self.optimizer.optimizer if self.stage else self.optimizer
        return inner

    def _building(self, grid: Grid) -> AbstractContextManager[object]:
        """Under ZeRO-3 each parameter is partitioned as it is created.

        The dtype comes from the settings: given as an argument, fp32 becomes bf16 on a device
        without fp16 (an operator's precedence in DeepSpeed 0.19.8).
        """
        if self.stage != 3:
            return nullcontext()
        context: AbstractContextManager[object] = deepspeed.zero.Init(
            data_parallel_group=grid.zero_group,
            config_dict_or_path=self.settings,
            mpu=deepspeed_settings.Mpu(grid),
        )
        return context

    def _writable(self, parameter: nn.Parameter) -> AbstractContextManager[object]:
        """A context in which rank 0 of the data group writes a whole parameter for all."""
        if self.stage != 3:
            return nullcontext()
        context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0
        )
        return context


_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
