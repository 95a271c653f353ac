"""The DeepSpeed engine: ZeRO stages 0 to 3 in fp32, bf16 and fp16.

DeepSpeed partitions states, reduces gradients and holds the fp32 master weights. MegaLite sets the
loss's divisor, the learning rate and the optimizer. DeepSpeed's scaling is off: gradients are
summed over ranks, and the loss is divided once, by the number of targets in the global batch.

Files that comments name are those of DeepSpeed 0.19.8, below deepspeed/.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
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

from megalite.config import Precision, RunConfig
from megalite.data import Batch
from megalite.engine.base import (
    WEIGHT,
    Accept,
    EngineBase,
    StepResult,
    finite,
    freeze,
    has_dropout,
    seed_dropout,
)
from megalite.engine.deepspeed.partitions import local_partition, name_partitions, zero_partitions
from megalite.engine.deepspeed.process import ProcessState
from megalite.engine.deepspeed.settings import Mpu, init_deepspeed, verify_effective
from megalite.engine.reference import (
    clip_gradients,
    connect_muon,
    create_states,
    group_numbers,
    set_update_count,
    torch_gradient,
    torch_state,
    update_count,
)
from megalite.model import (
    LanguageModel,
    Objective,
    build,
    initialize,
    make_objective,
)
from megalite.optim import Muon, make_optimizer, orthogonalize
from megalite.parallel import (
    Grid,
    apply_recompute_and_compile,
    apply_tensor_parallel,
    make_regions,
)


class DeepSpeedEngine(EngineBase):
    """A rank's engine, which wraps DeepSpeed's.

    Args:
        settings: the DeepSpeed JSON with all defaults filled in (`settings.fill_defaults`).
        objective: computes the loss. The default is the run file's.
    Raises:
        EngineError: DeepSpeed uses another value than `settings` contains.
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
        self.config = config
        self._grid = grid
        self.device = grid.device
        self.settings = dict(settings)
        self.stage = int(settings["zero_optimization"]["stage"])
        self.fp16 = precision is Precision.FP16
        self.objective = objective or make_objective(config)
        self._dropout = has_dropout(config.model)
        self._process = ProcessState()
        try:
            self._open(precision)
        except BaseException:
            self._process.restore()
            raise

    def _open(self, precision: Precision) -> None:
        """Build the model and start DeepSpeed."""
        settings = self.settings
        init_deepspeed()
        # ZeRO-3 refuses "sum" (runtime/config.py: _do_error_check) and averages over the ZeRO
        # ranks; a factor in the loss cancels this
        averages = settings["gradient_allreduce_op"] == "mean"
        self._loss_scale = float(self._grid.mesh.zero) if averages else 1.0
        self.model = self._build_model(precision)
        self.engine, self.optimizer = self._initialize()
        self.wrapped = self.engine  # DeepSpeed's forward gathers the parameters of ZeRO-3
        verify_effective(settings, self.engine)
        self._create_states()
        if self.stage > 0:
            self._gate_steps()
        self._owner_ranks = self._find_owner_ranks() if self.stage in (1, 2) else {}

    def _build_model(self, precision: Precision) -> LanguageModel:
        """Build, initialise, freeze and wrap this rank's part of the model."""
        config, grid = self.config, self._grid
        sequence = config.parallel.sequence
        regions = make_regions(config.model, grid, sequence=sequence)
        with self._init_context(grid), grid.device:
            model = build(config.model, regions)
        model.to(device=grid.device, dtype=precision.torch)
        initialize(
            model,
            config.model,
            seed=config.training.seed,
            gather=self._writable,
            at=grid.at,
        )
        freeze(model, config)
        apply_tensor_parallel(model, config.model, grid, sequence=sequence)
        apply_recompute_and_compile(
            model.blocks,
            recompute=config.training.activation_checkpointing,
            compile_blocks=config.training.compile,
        )
        if config.training.compile and self.stage == 3:
            # In a compiled block the hooks that fetch each submodule's parameters
            # (runtime/zero/parameter_offload.py) would break the graph. DeepSpeed fetches all
            # parameters of a leaf module before its forward.
            deepspeed.utils.set_z3_leaf_modules(model, [type(next(iter(model.blocks)))])
        return model

    def _initialize(self) -> tuple[Any, Any]:
        """Return DeepSpeed's engine and optimizer."""
        optimizer = make_optimizer(self.config, self.model.named_parameters())
        self._groups = group_numbers(optimizer)  # before DeepSpeed replaces the groups' tensors
        # runtime/bf16_optimizer.py prints its memory usage (see_memory_usage with force)
        with redirect_stdout(io.StringIO()):
            engine, zero, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=optimizer,
                config=self.settings,
                mpu=Mpu(self._grid),
                dist_init_required=False,
            )
        return engine, zero

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
        losses = self.begin_step(divisor=divisor, lr=lr)
        for index, batch in enumerate(batches):
            if self._dropout:
                seed_dropout(self.config.training.seed, step, batch.place)
            # DeepSpeed's engine gathers the parameters that the objective's loss needs (ZeRO-3)
            mean = losses.add(self.engine(self.objective.loss, batch.to(self.device).tensors))
            self.engine.backward(mean * self._loss_scale, scale_wrt_gas=False)
            if index < len(batches) - 1:
                self.engine.step()  # only counts micro-batches (runtime/engine.py: step)
        if inspect is not None:
            inspect()
        norm = self._update(losses.loss, accept)
        return StepResult(loss=losses.loss, grad_norm=norm, extra=losses.extra)

    def _update(self, loss: Tensor, accept: Accept) -> Tensor:
        """Clip, and update if `accept` returns true. Return the norm before clipping."""
        if self.stage == 0:
            # without ZeRO, DeepSpeed clips without reporting the norm (runtime/engine.py:
            # clip_fp32_gradients), so its clipping is off and MegaLite clips here
            parameters = list(self.model.parameters())
            limit = self.config.optimizer.clip_grad_norm
            norm = clip_gradients(parameters, limit, self._grid)
            if not accept(loss, norm):
                for parameter in parameters:  # torch's optimizers skip parameters without gradient
                    parameter.grad = None
            self.engine.step()
            return norm
        self._norm = None
        self._accepts = partial(accept, loss)
        self.engine.step()
        if self._norm is None:  # an overflow: DeepSpeed did not call the optimizer's step
            self._norm = torch.full_like(loss, torch.inf)
            accept(loss, self._norm)
        return self._norm

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
            return torch_state(self.optimizer, parameter, key)
        if key == WEIGHT:
            value: Tensor = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        return value.view(getattr(parameter, "ds_shape", parameter.shape))

    def owner_rank(self, parameter: nn.Parameter) -> int | None:
        return self._owner_ranks.get(id(parameter))

    def read_local(self, parameter: nn.Parameter, key: str) -> Tensor:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        value: Tensor = mapping.get_hp_fragment(None if key == WEIGHT else key)
        return value.detach().view(parameter.shape)

    def read_gradient(self, parameter: nn.Parameter) -> Tensor:
        if self.stage == 0 or not parameter.requires_grad:
            return torch_gradient(parameter)
        value: Tensor = safe_get_full_grad(parameter)
        return value.view(getattr(parameter, "ds_shape", parameter.shape))

    def write_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 0:
            torch_state(self.optimizer, parameter, key).copy_(value)
        elif key == WEIGHT:
            if not parameter.requires_grad:
                pass  # frozen parameters have no master weights
            elif self.stage == 3:
                safe_set_local_fp32_param(parameter, self._local_shard(parameter, value))
            else:
                safe_set_full_fp32_param(parameter, value)
            # utils/tensor_fragment.py sets only the fp32 master weight. Set the copy that the
            # next forward reads as well.
            with torch.no_grad(), self._writable(parameter):
                if parameter.numel():
                    parameter.copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._local_shard(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _local_shard(self, parameter: Any, value: Tensor) -> Tensor:
        """Return this rank's shard of a whole value under ZeRO-3.

        DeepSpeed's own division (utils/tensor_fragment.py) fails if the last shard is shorter.
        """
        size = parameter.ds_tensor.ds_numel
        padded = value.new_zeros(size * self._grid.mesh.zero)
        padded[: value.numel()] = value.flatten()
        return padded[self._grid.at.zero_rank * size :][:size]

    def group(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        group: Mapping[str, Any] = self._torch_optimizer().param_groups[self._groups[id(parameter)]]
        return group

    def progress(self) -> dict[str, Any]:
        progress: dict[str, Any] = {"updates": update_count(self._torch_optimizer())}
        if self.fp16:
            scaler = self.optimizer.loss_scaler
            progress["loss_scaler"] = {name: getattr(scaler, name) for name in _SCALER_STATE}
        return progress

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        set_update_count(self._torch_optimizer(), progress["updates"])
        if self.fp16 and progress.get("loss_scaler"):
            for name in _SCALER_STATE:
                setattr(self.optimizer.loss_scaler, name, progress["loss_scaler"][name])

    def close(self, *, failed: bool = False) -> None:
        self._process.restore()
        if not failed or self._grid.world_size == 1:
            with suppress(RuntimeError):  # raised if a failed device ended the run
                self.engine.destroy()  # waits for the device
        super().close()

    def _gate_steps(self) -> None:
        """Make the torch optimizer's step call `accept` first, and do nothing if it returns false.

        DeepSpeed calls this step once per group or part of a group (runtime/zero/stage_1_and_2.py:
        _optimizer_step, stage3.py: _optimizer_step). `accept` is called once. It adds no wait for
        the device, because DeepSpeed has just checked whether the norm is finite.
        """
        inner = self._torch_optimizer()
        zero = self.optimizer
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
        """Create the optimizer's states, so that a checkpoint can be loaded before any step.

        A step with zero gradients would create them, but also count as a step and overflow in
        fp16. DeepSpeed's first step would link only the states of the first group
        (runtime/zero/stage_1_and_2.py: _lazy_init_hp_params_optimizer_state).
        """
        inner = self._torch_optimizer()
        zero = self.optimizer
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
            self._connect_muon(inner)

    def _find_owner_ranks(self) -> dict[int, int]:
        """Return the ZeRO rank that has the whole of a parameter, for each undivided parameter."""
        parameters = list(self.model.parameters())
        local = [local_partition(p)[1] if p.numel() else 0 for p in parameters]
        lengths = torch.zeros(self._grid.mesh.zero, len(parameters), dtype=torch.int64)
        lengths[self._grid.at.zero_rank] = torch.tensor(local)
        lengths = lengths.to(self.device)
        dist.all_reduce(lengths, group=self._grid.zero_group)
        whole = lengths == torch.tensor([p.numel() for p in parameters], device=self.device)
        return {id(parameters[index]): rank for rank, index in whole.nonzero().tolist()}

    def _connect_muon(self, muon: Muon) -> None:
        """Set Muon's `orthogonalize` for the engine's partitions."""
        if self.stage == 0:
            connect_muon(muon, self.model, self.config.model, self._grid)
            return
        partitions = zero_partitions(self.optimizer, self.stage, self._grid)
        by_master = name_partitions(partitions, self.model, self.config.model)
        muon.orthogonalize = lambda master, update: orthogonalize(
            update, by_master[id(master)], self._grid, replicas=False
        )

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self.optimizer.optimizer if self.stage else self.optimizer
        return inner

    def _init_context(self, grid: Grid) -> AbstractContextManager[object]:
        """Return a context that partitions parameters at their creation, under ZeRO-3.

        The dtype comes from the settings. As an argument, fp32 would become bf16 on devices
        without fp16, because of an operator's precedence in _set_dtype
        (runtime/zero/partition_parameters.py).
        """
        if self.stage != 3:
            return nullcontext()
        context: AbstractContextManager[object] = deepspeed.zero.Init(
            data_parallel_group=grid.zero_group,
            config_dict_or_path=self.settings,
            mpu=Mpu(grid),
        )
        return context

    def _writable(self, parameter: nn.Parameter) -> AbstractContextManager[object]:
        """Return a context in which rank 0 of the ZeRO group writes a whole parameter for all."""
        if self.stage != 3:
            return nullcontext()
        context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0
        )
        return context


# the state of a DynamicLossScaler (runtime/fp16/loss_scaler.py)
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
