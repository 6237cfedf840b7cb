"""`Trainer(strategy="reversible_deepspeed_stage_2")`, 1 and 3: reversible stacks under DeepSpeed's ZeRO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.deepspeed import _DEEPSPEED_AVAILABLE
from typing_extensions import override

from lightning_revlib.strategies.base import ReversibleStrategyMixin
from lightning_revlib.strategies.setup import MemoryBudget, Targets, check_arguments, refuse_overlap

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ReversibleDeepSpeedStrategy(ReversibleStrategyMixin, DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy, on CUDA devices, with reversible stacks.

    >>> Trainer(strategy="reversible_deepspeed_stage_3", precision="bf16-mixed", devices=8)
    >>> Trainer(strategy=ReversibleDeepSpeedStrategy(stage=2, offload_optimizer=True), precision="bf16-mixed")

    Names: "reversible_deepspeed_stage_1", "_2" and "_3", and each with "_offload" after it.

    Args:
        targets, memory_budget, restore: see `ReversibleStrategyMixin`. There is no optimizer_in_backward, since
            DeepSpeed steps its own optimizer after backward.
        stage: 1 shards the optimizer's state, 2 also gradients, 3 also parameters.
        offload_optimizer: keep and step the optimizer's state on the host.
        offload_parameters: at stage 3, keep parameters on the host.
        **kwargs: as in `DeepSpeedStrategy`.

    Raises:
        ModuleNotFoundError: without deepspeed; the error says how to install it.
        TypeError: for an unknown argument.
        ValueError: for any other stage; at setup, if nothing can be swapped or a target is wrong.

    Source: ZeRO, https://arxiv.org/abs/1910.02054
    """

    strategy_name = "reversible_deepspeed"

    def __init__(
        self,
        targets: Targets | None = None,
        *,
        memory_budget: MemoryBudget | None = None,
        restore: bool = False,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), kwargs, ReversibleDeepSpeedStrategy, DeepSpeedStrategy)
        if stage not in (1, 2, 3):
            raise ValueError(f"stage={stage!r}: DeepSpeed's ZeRO has stages 1, 2 and 3")
        if offload_parameters and stage != 3:
            raise ValueError(f"offload_parameters=True with stage={stage}: only stage=3 shards parameters")
        if not _DEEPSPEED_AVAILABLE:
            raise ModuleNotFoundError(
                f"strategy='{self.strategy_name}_stage_{stage}' needs deepspeed 0.16 or later, which is not installed:"
                " pip install deepspeed; without it, strategy='reversible_fsdp' shards as stage 3 does"
            )
        super().__init__(
            targets,
            memory_budget=memory_budget,
            restore=restore,
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            **kwargs,
        )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if self.zero_stage_3:
            assert self.lightning_module is not None
            refuse_overlap(self.lightning_module, "ZeRO-3")
