"""What a step is compiled with, said once: Python, the command line, recipes, tuning and benchmarks make one of these
and pass it on.

A further option is a field here with its check, an argument of `mest.compile`, an option of the commands that are to
have it, and whatever honours it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import SparsityError, TargetError, UsageError
from mest_compile.base.foreign import is_module, is_optimizer
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target, find_target, target_names
from mest_compile.ir.layouts.layout import ACTIVATIONS
from mest_compile.operators.losses import cross_entropy
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.operators.losses.loss import LOSSES, Loss, named_loss, read_loss
from mest_compile.operators.optimizers import sgd
from mest_compile.operators.optimizers.from_torch import from_torch
from mest_compile.operators.optimizers.optimizer import OPTIMIZERS, Optimizer, named_optimizer, read_optimizer
from mest_compile.sparsity import parse_schemes
from mest_compile.sparsity.distributions import check_distribution
from mest_compile.sparsity.scheme import Scheme
from mest_compile.sparsity.schemes.block import Block
from mest_compile.sparsity.schemes.dense import Dense

AUTO = "auto"  # as `microbatch`: the largest that a memory_budget has room for; as `activations`: see `deciding`
AS_GIVEN = "as-given"  # as `sparsity`: masks are the zeros of the model's weights


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The options of `mest.compile`, which says what each means. Checked when made, as far as that goes without the
    model.

    scheme  or its name, or {layer name or pattern: scheme}
    sparsity  None: the scheme's usual one
    target  as it was said: `find_target` reads it
    threads  None: all cores of the target
    update_budget  a share (float) or bytes (int), once it is read
    microbatch  a number, AUTO or None, once it is read
    Raises MestError: UnknownName, UsageError, SparsityError, TargetError.
    """

    scheme: Scheme | Mapping[str, Scheme] = field(default_factory=Block)
    sparsity: float | str | Mapping[str, float] | None = None
    distribution: str = "uniform"
    dense_layers: Sequence[str] | None = None
    optimizer: Optimizer = sgd.USUAL
    target: str | Path | Target = "local"
    threads: int | None = None
    seed: int = 0
    loss: Loss = cross_entropy.USUAL
    memory_budget: int | str | None = None
    lower_density: bool = False
    grow_to: float | None = None
    activations: str = "float32"
    trainable: str | Sequence[str] | None = None
    dense_start: bool = False
    update_budget: float | int | str | None = None
    output: str | int | None = None
    microbatch: int | str | None = None

    def __post_init__(self) -> None:
        self._set("scheme", parse_schemes(self.scheme))
        self._check_sparsity()
        check_optimizer(self.optimizer)
        check_loss(self.loss)
        check_activations(self.activations, find_target(self.target))
        if self.threads is not None:
            self._set("threads", check_threads(self.threads))
        self._set("seed", checks.whole("seed", self.seed))
        if self.memory_budget is not None:
            budget = checks.size("memory_budget", self.memory_budget, ", or None for no bound")
            self._set("memory_budget", budget)
        if checks.flag("lower_density", self.lower_density) and self.memory_budget is None:
            raise UsageError(
                "lower_density raises the sparsity to meet a memory_budget; give one, or leave lower_density out"
            )
        if self.microbatch is not None:
            self._set("microbatch", read_microbatch(self.microbatch))
            if self.microbatch == AUTO and self.memory_budget is None:
                raise UsageError(
                    f"microbatch {AUTO!r} is the largest that a memory_budget has room for; give one, or a number of "
                    "examples"
                )
        if self.grow_to is not None:
            self._set("grow_to", checks.number("grow_to", self.grow_to, below=1, also=", or None"))
        if self.trainable is not None:
            self._set("trainable", trainable_patterns(self.trainable))
        if checks.flag("dense_start", self.dense_start) and (self.grow_to is not None or self.lower_density):
            other = "lower_density" if self.lower_density else "grow_to"
            raise UsageError(f"dense_start has room for all weights, which {other} would change; leave one of them out")
        if self.output is not None and not isinstance(self.output, str):
            self._set("output", checks.whole("output", self.output, 0, ", an output's name, or None"))
        if self.update_budget is not None:
            self._set("update_budget", read_budget(self.update_budget))
            if self.memory_budget is not None:
                raise UsageError(
                    "update_budget and memory_budget do not go together: what is computed again costs time that the "
                    "choice does not know; leave one out, or choose first and compile with trainable and memory_budget"
                )

    def _check_sparsity(self) -> None:
        check_distribution(self.distribution)
        if self.dense_layers is not None:
            also = ", or None for the first convolution, the 1x1 convolutions of shortcuts and the classifier"
            self._set("dense_layers", tuple(checks.names("dense_layers", self.dense_layers, also)))
        if isinstance(self.sparsity, Mapping):
            self._set("sparsity", dict(self.sparsity))
            if self.distribution != "uniform":
                raise UsageError(
                    f"distribution {self.distribution!r} spreads one sparsity over the layers, but sparsity says each "
                    f"layer's; give sparsity as a number, or leave distribution out"
                )
            return
        if isinstance(self.sparsity, str) and self.sparsity == AS_GIVEN:
            self._check_as_given()
            return
        also = f", or {{layer name or pattern: number}}, or {AS_GIVEN!r}"
        said = None
        if self.sparsity is not None:
            if not isinstance(self.sparsity, str) and checks.is_number(self.sparsity) and 1 < self.sparsity < 100:
                also = f"; it is a share: did you mean {self.sparsity / 100:g}?"
            said = checks.number("sparsity", self.sparsity, below=1, also=also, error=SparsityError)
        if isinstance(self.scheme, Mapping):
            self._set("sparsity", _usual(self.scheme) if said is None else said)
        else:
            self._set("sparsity", self.scheme.asked(said))

    def _check_as_given(self) -> None:
        said = {"distribution": self.distribution != "uniform", "lower_density": self.lower_density is True}
        said["dense_start, as the method gradual needs it,"] = self.dense_start is True
        said["scheme dense"] = not self.sparse
        if others := [name for name, given in said.items() if given]:
            raise UsageError(
                f"sparsity {AS_GIVEN!r} takes the zeros of the weights as masks, and {others[0]} would have others; "
                "leave one of the two out"
            )

    @property
    def sparse(self) -> bool:
        """Whether any layer may be."""
        schemes = self.scheme.values() if isinstance(self.scheme, Mapping) else [self.scheme]
        return not all(isinstance(scheme, Dense) for scheme in schemes)

    @property
    def scheme_text(self) -> str:
        """The scheme's, in a word."""
        return "mixed" if isinstance(self.scheme, Mapping) else str(self.scheme)

    @property
    def one_sparsity(self) -> float | None:
        """That of all sparse layers together; None where each has its own."""
        return self.sparsity if isinstance(self.sparsity, float) else None

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` gives equal options back. Raises UsageError where the target is no name or file."""
        if isinstance(self.target, Target):
            raise UsageError(f"target {self.target.name!r} is an object; write it into a TOML file and give its path")
        return {one.name: getattr(self, one.name) for one in fields(self)} | {
            "scheme": {name: str(scheme) for name, scheme in self.scheme.items()}
            if isinstance(self.scheme, Mapping)
            else str(self.scheme),
            "dense_layers": None if self.dense_layers is None else list(self.dense_layers),
            "trainable": None if self.trainable is None else list(self.trainable),
            "optimizer": self.optimizer.to_json(),
            "target": str(self.target),
            "loss": self.loss.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StepOptions:
        """What a document does not say is as usual. Raises TypeError where it says more, and as the class does."""
        objects: dict[str, Any] = {"loss": read_loss(document)}
        if "optimizer" in document:
            objects["optimizer"] = read_optimizer(document["optimizer"])
        return cls(**{**document, **objects})

    def dense(self) -> StepOptions:
        """The same with all weights alive."""
        return replace(self, scheme=Dense(), sparsity=0.0, grow_to=None, dense_start=False)


def _usual(schemes: Mapping[str, Scheme]) -> float | dict[str, float]:
    """The sparsity of a model with those schemes when nobody says one: of all layers, or that of each."""
    each = {name: scheme.asked(None) for name, scheme in schemes.items() if not isinstance(scheme, Dense)}
    return next(iter(each.values()), 0.0) if len(set(each.values())) <= 1 else each


def check_threads(threads: int) -> int:
    """Raises UsageError."""
    return checks.whole("threads", threads, 1, ", or None for all cores")


def trainable_patterns(trainable: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns of a list, or of a text with commas between them. Raises UsageError."""
    also = ' such as "head.*" or "last:3", or None for what torch would train'
    listed = [trainable] if isinstance(trainable, str) else checks.names("trainable", trainable, also)
    found = tuple(part.strip() for text in listed for part in text.split(","))
    if not found or not all(found):
        raise UsageError(f"trainable is {checks.shown(trainable)}; wanted patterns{also}")
    return found


def read_budget(budget: Any, name: str = "update_budget") -> float | int:
    """A share of the full step's time, 0 < share <= 1, as a float; bytes, more than 1, as an int; a text of either:
    "0.5", "24MiB", "300000". name: what it was given as. Raises UsageError."""
    number, factor = budget, 1
    if isinstance(budget, str):
        found = checks.SIZE.fullmatch(budget.strip())
        number = float(found[1]) if found else None
        factor = checks.UNITS[found[2].lower()] if found else 1
    if checks.is_number(number):
        if factor == 1 and 0 < number <= 1:
            return float(number)
        if number * factor > 1 and (factor > 1 or float(number).is_integer()):
            return int(number * factor)
    raise UsageError(
        f"{name} is {checks.shown(budget)}; wanted a share of the full step's time above 0 and at most 1, such "
        'as 0.5, or bytes, such as "24MiB"'
    )


def read_microbatch(value: Any) -> int | str:
    """A number of examples, or AUTO; a text of either. Raises UsageError."""
    if isinstance(value, str):
        if value == AUTO:
            return AUTO
        value = int(value) if value.isascii() and value.isdecimal() else value
    return checks.whole("microbatch", value, 1, f" examples of a pass, {AUTO!r}, or None for one pass of all")


def check_optimizer(optimizer: Any) -> None:
    """Raises UsageError."""
    if not isinstance(optimizer, Optimizer):
        there = ", ".join(OPTIMIZERS.find(name).signature() for name in OPTIMIZERS.names())
        raise UsageError(f"optimizer is {checks.shown(optimizer)}; wanted one of {there}, or None for mest.SGD()")


def check_loss(loss: Any) -> None:
    """Raises UsageError."""
    if not isinstance(loss, Loss):
        there = ", ".join(LOSSES.find(name).signature() for name in LOSSES.names())
        raise UsageError(
            f"loss is {checks.shown(loss)}; wanted one of {there}, or {' or '.join(map(repr, LOSSES.names()))}"
        )


def find_loss(loss: str | Mapping[str, Any] | Loss, label_smoothing: float = 0.0) -> Loss:
    """A loss from its name with options, a table of them, or itself. label_smoothing: short for
    CrossEntropy(smoothing). Raises UnknownName, UsageError, SpecError."""
    share = checks.number("label_smoothing", label_smoothing, below=1)
    found = named_loss(loss) if isinstance(loss, str | Mapping) else loss
    check_loss(found)
    if not share:
        return found
    if found != CrossEntropy():
        raise UsageError(
            f"label_smoothing is short for loss=mest.CrossEntropy(smoothing=...), and the loss is {found}; leave one "
            "out"
        )
    return CrossEntropy(share)


def find_optimizer(optimizer: Any, model: Any = None) -> Optimizer:
    """An optimizer from its name with options, a table of them, one of torch of the model's parameters, or itself.
    Raises UnknownName, UsageError, SpecError."""
    if optimizer is None:
        return sgd.USUAL
    if isinstance(optimizer, str | Mapping):
        return named_optimizer(optimizer)
    if is_optimizer(optimizer):
        if not is_module(model):
            raise UsageError(
                "an optimizer of torch holds parameters of a torch module, which the model is not; give a "
                "mest optimizer"
            )
        from mest_compile.frontend import trained_parameters

        return from_torch(optimizer, trained_parameters(model))
    check_optimizer(optimizer)
    return optimizer


def check_activations(activations: str, target: Target) -> None:
    """Whether a target can store values so. Raises UsageError, TargetError."""
    if isinstance(activations, str) and activations == AUTO:
        return
    if not isinstance(activations, str) or activations not in ACTIVATIONS:
        wanted = " or ".join(map(repr, (*ACTIVATIONS, AUTO)))
        raise UsageError(f"activations is {checks.shown(activations)}; wanted {wanted}")
    if activations not in backend_of(target).activations:
        raise TargetError(
            f"target {target.name!r} has no kernels that store activations as {activations}: processors have; leave "
            "activations at float32"
        )
    if activations == "float16" and not target.float16:
        able = ", ".join(name for name in target_names() if find_target(name).float16)
        raise TargetError(
            f"target {target.name!r} has no instructions that turn float16 into float32 and back, or none that "
            f"are used; leave activations at float32, or compile for one of: {able}"
        )
