"""`from_pretrained(..., tp_plan="auto")` for block-sparse checkpoints.

transformers shards a weight while it loads it: as a `DTensor` whose rows or columns are cut evenly, which neither
packed blocks nor a division by what is stored can be (decision 0014). So its plan is made to say that all of these
layers are ours, under a style that does nothing; they are loaded whole, and `sparsify.parallelize` divides them by the
plan that was there before.
"""

from __future__ import annotations

from typing import Any

from sparsify.checkpoint.format import QUANT_METHOD
from sparsify.errors import ConfigError


def take_over(model: Any) -> dict[str, str]:
    """Leaves a model's layers to us, before it is distributed.

    Returns:
        The plan that the model had.

    Raises:
        ConfigError: If another plan than the model's own is asked for, or its experts are to be distributed.
    """
    _check(model)
    plan = dict(model._tp_plan or {})
    if plan:
        _register()
        model._tp_plan = dict.fromkeys(plan, QUANT_METHOD)
    return plan


def divide(model: Any, plan: dict[str, str]) -> None:
    """Divides a model that has been loaded, if it was to be distributed by tensors.

    Raises:
        ConfigError: As `take_over`, or if nothing in the model can be divided.
    """
    if plan:
        model._tp_plan = plan
    if (getattr(model, "_tp_size", None) or 1) == 1 or getattr(model, "_device_mesh", None) is None:
        return
    _check(model)
    from sparsify.parallel.model import parallelize

    parallelize(model, model._device_mesh, plan=plan)


def _check(model: Any) -> None:
    """Newer versions of transformers tell of the request before the weights are loaded, all of them after it."""
    asked = getattr(model.config, "distributed_config", None)
    plan = getattr(asked, "tp_plan", None)
    if isinstance(plan, dict) and plan:
        raise ConfigError(
            "block-sparse checkpoints are divided by the model's own plan: pass tp_plan='auto', or load the model "
            "whole and call sparsify.parallelize(model, plan=...)"
        )
    if (getattr(asked, "ep_size", None) or 1) > 1 or getattr(asked, "enable_expert_parallel", False):
        raise ConfigError("block-sparse experts are not distributed: leave expert parallelism out")


def _register() -> None:
    """Makes the style known to transformers; safe to call again."""
    from transformers.distributed import tensor_parallel

    class LeftWhole(tensor_parallel.TensorParallelLayer):
        """Shards nothing and wraps nothing."""

        def install_forward(self, module: Any, mesh: Any) -> Any:
            return module

    styles: Any = tensor_parallel.ALL_PARALLEL_STYLES  # pyright: ignore[reportPrivateImportUsage]
    if QUANT_METHOD not in styles:
        styles.register(QUANT_METHOD, LeftWhole())
