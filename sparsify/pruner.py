"""The pruner contract: what an algorithm sees (`PrunableLayer`), what it implements (`Pruner`), how it is named.

A pruner scores blocks. Which blocks go is the budget's business (`sparsify.allocation.budget`), how a model is trained
under a mask that of `sparsify.masking`. `docs/pruners.md` shows a custom pruner in fifteen lines.
"""
# ruff: noqa: B027 -- the optional hooks of the contract are empty on purpose

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from sparsify import custom
from sparsify.blocks import BlockMask, BlockShape
from sparsify.conv_weight import ConvWeight
from sparsify.errors import PrunerError, SparsifyError

if TYPE_CHECKING:
    from sparsify.allocation.budget import Budget

STATISTICS = frozenset({"input_sq", "hessian"})
RECONSTRUCT_STEPS = 300
SCHEDULES = ("auto", "cubic", "once")
# The methods of a pruner that others call.
HOOKS = ("score", "calibrate", "update_weights", "begin", "before_step", "after_step", "masks")


@dataclass(eq=False)
class PrunableLayer:
    """One weight matrix that can be pruned in blocks: of a linear layer or `Conv1D`, one expert's, a convolution's.

    Attributes:
        name: Unique name of the matrix; the module's name, or `<module>.<parameter>.<expert>` for an expert.
        module_name: Name of the module that owns the parameter, as in `model.named_modules()`.
        parameter: The dense parameter that holds the matrix, in the layout the module keeps it in.
        block: Block shape `(bo, bi)`.
        index: Which slice of a 3-D parameter the matrix is (the expert's number), or which of a convolution's matrices;
            `None` where the parameter is one matrix.
        transposed: Whether the parameter holds the matrix as `(K, N)`, as GPT-2's `Conv1D` does.
        module_class: Class name of the module.
        statistics: Tensors a pruner gathered about the layer, by name. Calibration fills in what the pruner
            requires (see `Pruner.requires`); a pruner may keep its own here, and then a resumed run has them back.
        conv: How a convolution's weight `(O, I / groups, *kernel)` is seen as matrices; `None` for all others. Where
            kernel positions share a mask, columns are input channels times positions, and so is `block.cols`.
    """

    name: str
    module_name: str
    parameter: nn.Parameter
    block: BlockShape
    index: int | None = None
    transposed: bool = False
    module_class: str = ""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    conv: ConvWeight | None = None

    def matrix(self, tensor: Tensor) -> Tensor:
        """The view `(N, K)` of the layer in a tensor that is laid out as `parameter` is."""
        if self.conv is not None:
            return self.conv.matrix(tensor, self.index or 0)
        matrix = tensor if self.index is None else tensor[self.index]
        return matrix.t() if self.transposed else matrix

    @property
    def key(self) -> str:
        """Key of the layer in dictionaries of scores and masks; its `name`."""
        return self.name

    @property
    def weight(self) -> Tensor:
        """The matrix `(N, K)` = `(out_features, in_features)`, detached; writing to it writes to the parameter."""
        if self.conv is not None and not self.parameter.is_contiguous():
            self.parameter.data = self.parameter.data.contiguous()  # in channels-last memory it is no matrix
        return self.matrix(self.parameter.detach())

    @property
    def grad(self) -> Tensor | None:
        """The gradient of `weight`, `(N, K)`, or `None` where there is none.

        Under a mask it is the gradient of the effective (masked) weight, pruned blocks included.
        """
        grad = self.parameter.grad
        if grad is None:
            return None
        return self.matrix(grad if self.conv is None else grad.contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` = `(out_features, in_features)`."""
        if self.conv is not None:
            return self.conv.shape
        rows, cols = self.parameter.shape[-2:]
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns `(R, C)`."""
        return self.block.grid(self.shape)


class Pruner(ABC):
    """An algorithm that says which blocks of a weight matter.

    Only `score` is required. Options are the constructor's keyword arguments, as in a recipe's `options`.

    Attributes:
        name: Registered name; the name of its module in `sparsify.pruners`. A custom pruner needs none.
        requires: Calibration statistics that `score` or `update_weights` read from `layer.statistics`:
            `"input_sq"`, the mean square of each input feature, `(K,)` float32; `"hessian"`, `X^T X / tokens` of the
            inputs `X` `(tokens, K)`, `(K, K)` float32. `"tokens"`, their number, comes with either.
        in_training: Whether it works while the network trains and in no other way; pruning at once is refused then.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    in_training: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Lets mistakes in the hooks of a class of one's own be told in one line that names class, hook and layer."""
        super().__init_subclass__(**keywords)
        if not cls.__module__.startswith("sparsify."):
            for hook in HOOKS:
                if hook in vars(cls) and not getattr(vars(cls)[hook], "__isabstractmethod__", False):
                    setattr(cls, hook, _told(vars(cls)[hook], hook))

    @property
    def compensates(self) -> bool:
        """Whether `update_weights` does anything; by default, whether the class defines it."""
        return type(self).update_weights is not Pruner.update_weights

    @property
    def compares(self) -> bool:
        """Whether `update_weights` reads the statistic `cross`; by default not.

        `cross` `(K, K)` float32 is `D^T X / tokens`, with `D` the layer's inputs in the dense model and `X` those that
        the pruned layers before it give. Only `update_weights` gets it, in a walk with calibration data, and not for
        fused experts.
        """
        return False

    @property
    def gradual(self) -> bool:
        """Whether it prunes little by little by itself; by default, whether the class defines `after_step` or `masks`.

        All others are pruned in training by the cubic ramp (see `sparsify.training.pruning_loop`).
        """
        return any(getattr(type(self), hook) is not getattr(Pruner, hook) for hook in ("after_step", "masks"))

    @abstractmethod
    def score(self, layer: PrunableLayer) -> Tensor:
        """Importance of each block.

        Args:
            layer: The layer, with its weight `(N, K)` and the statistics asked for.

        Returns:
            `(R, C)` floating point, finite; blocks with higher scores are kept first. Under a global budget the
            scores of different layers are compared with each other.
        """

    def calibrate(self, layer: PrunableLayer, inputs: Tensor) -> None:
        """Takes in one batch of a layer's inputs; by default adds it to the statistics in `requires`.

        Args:
            layer: The layer; its `statistics` are updated. What a pruner wants to remember belongs there, because
                another object of the class may do the scoring.
            inputs: `(tokens, K)`, padding tokens left out.
        """
        if not self.requires:
            return
        inputs = inputs.detach().float()
        seen = layer.statistics.setdefault("tokens", torch.zeros((), dtype=torch.int64))
        if "input_sq" in self.requires:
            mean = layer.statistics.setdefault("input_sq", inputs.new_zeros(inputs.shape[1]))
            _add_to_mean(mean, inputs.square().sum(0), int(seen), inputs.shape[0])
        if "hessian" in self.requires:
            mean = layer.statistics.setdefault("hessian", inputs.new_zeros(inputs.shape[1], inputs.shape[1]))
            _add_to_mean(mean, inputs.t() @ inputs, int(seen), inputs.shape[0])
        seen += inputs.shape[0]

    def update_weights(self, layer: PrunableLayer, mask: BlockMask) -> None:
        """Adjusts kept weights for what `mask` is about to remove, by writing to `layer.weight`. Default: nothing."""

    def begin(self, layers: Sequence[PrunableLayer], budget: Budget, progress: float = 0.0) -> None:
        """Starts a pruning phase of training, or takes it up again after a resume. Default: nothing.

        Args:
            layers: Every layer of the phase.
            budget: The sparsity to arrive at; `budget.masks(scores, layers)` gives the masks it would make now.
            progress: Share of the phase already done, 0 to 1; above 0 after a resume.
        """

    def before_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        """Called before every optimizer step, when `layer.grad` is complete (all micro-batches, all ranks)."""

    def after_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        """Called after every optimizer step, under `torch.no_grad`. Default: nothing.

        Args:
            layers: Every layer of the phase; `layer.weight` may be written to.
            progress: Share of the pruning phase done with this step, 0 to 1.
        """

    def masks(self, layers: Sequence[PrunableLayer], progress: float) -> dict[str, BlockMask] | None:
        """The masks to train under from now on, asked for before every forward pass; `None` leaves them as they are.

        What is masked this way keeps its weights and its gradient, and may come back. Default: no masks.

        Args:
            layers: Every layer of the phase.
            progress: Share of the pruning phase done, 0 to 1; 1 is never asked for, the budget's own masks end it.
        """


def ramped(budget: Budget, share: float) -> Budget:
    """The budget at a point of a phase that prunes little by little: sparsity `S * (1 - (1 - share)^3)`.

    Source: Zhu & Gupta, "To prune, or not to prune" (2017).

    Args:
        budget: The budget to arrive at; its ceiling is never exceeded.
        share: Share of the ramp that is done, 0 to 1.
    """
    return replace(budget, sparsity=max(budget.sparsity * (1.0 - (1.0 - share) ** 3), 1.0 - budget.ceiling))


def is_cubic(pruner: Pruner, schedule: str = "auto", every: int | None = None) -> bool:
    """Whether a pruner follows the cubic ramp, and not a schedule of its own or a single cut.

    Raises:
        PrunerError: If the schedule is unknown, or is one that the pruner does not take.
    """
    if schedule not in SCHEDULES:
        raise PrunerError(f"unknown schedule {schedule!r}: known are {', '.join(SCHEDULES)}")
    name = pruner.name or type(pruner).__qualname__
    if schedule != "auto" and pruner.gradual:
        raise PrunerError(f"pruner {name!r} prunes by a schedule of its own: leave out schedule: {schedule}")
    cubic = not pruner.gradual if schedule == "auto" else schedule == "cubic"
    if every is not None and not cubic:
        raise PrunerError(
            f"every {every} is for the cubic schedule, which pruner {name!r} does not follow here"
        )
    if every is not None and every < 1:
        raise PrunerError(f"every {every} is out of range: it is a number of optimizer steps, at least 1")
    return cubic


def _add_to_mean(mean: Tensor, total: Tensor, seen: int, new: int) -> None:
    if new:
        mean.add_((total - new * mean) / (seen + new))


def default_method(with_data: bool, method: Method | None, reconstruct: int | None) -> tuple[Method, int]:
    """Which pruner and how many steps of reconstruction are meant where the user names none.

    Chosen by measurement, see docs/benchmarks/pruners.md.

    Args:
        with_data: Whether there is calibration data.
        method: What the user names, if anything.
        reconstruct: Steps that the user asks for, if any.
    """
    if method is None:
        method, steps = ("block_obs", RECONSTRUCT_STEPS) if with_data else ("magnitude", 0)
    else:
        steps = 0
    return method, steps if reconstruct is None else reconstruct


def available() -> list[str]:
    """Names of the registered pruners, sorted: the modules of `sparsify.pruners`."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name("pruners"))]))


Method: TypeAlias = str | type[Pruner]


def name_of(method: Method) -> str:
    """A pruner's name, for people and for files: `package.module:Class` of a class."""
    return method if isinstance(method, str) else f"{method.__module__}:{method.__qualname__}"


def find_pruner(method: Method) -> type[Pruner]:
    """The class that is meant.

    Args:
        method: A registered name (see `available`), `package.module:Class` for a class of your own, or that class.

    Raises:
        PrunerError: If there is no such pruner.
    """
    if isinstance(method, str) and ":" not in method:
        return _registered(method)
    cls = custom.find(method, "pruner", PrunerError) if isinstance(method, str) else method
    if isinstance(cls, Pruner):
        name = type(cls).__qualname__
        raise PrunerError(f"got a {name} as pruner: give the class, method={name}, and its options by name")
    if not (isinstance(cls, type) and issubclass(cls, Pruner)):
        raise PrunerError(f"{method!r} is not a pruner: it must be a class derived from sparsify.Pruner")
    if inspect.isabstract(cls):
        raise PrunerError(
            f"pruner {name_of(method)!r} has no score method: a pruner must define score(self, layer)"
        )
    return cls


def create_pruner(method: Method, **options: object) -> Pruner:
    """Makes a pruner from its name and options.

    Args:
        method: A registered name (see `available`), `package.module:Class` for a class of your own, or that class.
        **options: Keyword arguments of the class's constructor.

    Raises:
        PrunerError: If the name or an option is unknown, or an option's value is refused.
    """
    cls, method = find_pruner(method), name_of(method)
    if not isinstance(cls.requires, (set, frozenset)) or not cls.requires <= STATISTICS:
        raise PrunerError(
            f"pruner {method!r} has requires = {cls.requires!r}: it must be a set of {', '.join(sorted(STATISTICS))}"
        )
    _check_options(method, cls, options)
    try:
        return cls(**options)
    except (SparsifyError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if ":" not in method:
            raise
        raise PrunerError(f"pruner {method!r} cannot be made: {custom.described(error)}") from error


def _told(function: Callable[..., Any], hook: str) -> Callable[..., Any]:
    """The method `hook` of a pruner, with errors that say where they come from."""

    @functools.wraps(function)
    def wrapper(self: Pruner, *args: Any, **keywords: Any) -> Any:
        given = [*args, *keywords.values()]
        layer = f" of layer {given[0].name}" if given and isinstance(given[0], PrunableLayer) else ""
        name = f"{type(self).__module__}:{type(self).__qualname__}"
        try:
            result = function(self, *args, **keywords)
        except (SparsifyError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PrunerError(
                f"pruner {name!r} failed in {hook}{layer}: {custom.described(error)}"
            ) from error
        if hook == "score" and not isinstance(result, Tensor):
            raise PrunerError(
                f"pruner {name!r} returned {type(result).__name__} as score{layer}: it must be a tensor of one number "
                f"for each block, (R, C)"
            )
        return result

    return wrapper


def _registered(method: str) -> type[Pruner]:
    if method not in available():
        close = difflib.get_close_matches(method, available(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PrunerError(
            f"unknown pruner {method!r}: {hint}known are {', '.join(available())}; "
            f"name a class of your own as package.module:Class"
        )
    module = importlib.import_module(f"sparsify.pruners.{method}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Pruner) and value.name == method:
            return value
    raise PrunerError(f"pruners/{method}.py has no Pruner class with name = {method!r}")


def _check_options(method: str, cls: type[Pruner], options: dict[str, object]) -> None:
    parameters = inspect.signature(cls).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in parameters:
                close = difflib.get_close_matches(option, parameters, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                known = f"known are {', '.join(parameters)}" if parameters else "it has none"
                raise PrunerError(f"pruner {method!r} has no option {option!r}: {hint}{known}")
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if not optional and name not in options:
            raise PrunerError(f"pruner {method!r} needs the option {name!r}")
