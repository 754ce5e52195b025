"""Every error a caller can meet. Each message says what was wanted, what came and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


class MestError(Exception):
    """Base of all errors that are the caller's to mend. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(MestError):
    """An argument or option that cannot be meant: unknown name, value out of range."""

    exit_code = 2


class UnknownName(UsageError):
    """A scheme, operator, schedule, target, model or data set that is not registered."""


class DuplicateName(MestError):
    """Two plug-in files register the same name."""


class SpecError(UsageError):
    """Facts about a model or layer that contradict each other."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something of a model that cannot be trained here.

    what      it is: "max_pool2d with ceil_mode=True", or a whole sentence where it is no operator
    where     in the model: "in layer 'act' (GELU)"; "" where nobody knows
    operator  name that the model's author called; "" where it is no operator
    """

    what: str
    where: str = ""
    operator: str = ""

    @property
    def layer(self) -> str:
        """The module's dotted path or the ONNX node's name; "" outside of any."""
        found = re.match("in (?:layer|node) '(.*?)'", self.where)
        return found[1] if found else ""


class UnsupportedOperator(MestError):
    """The model holds operators that have no training form here. `refused`: each of them, in the model's order."""

    def __init__(self, message: str, refused: Sequence[Refusal] = ()):
        super().__init__(message)
        self.refused = tuple(refused) or (Refusal(message),)


class SparsityError(UsageError):
    """A sparsity, scheme or distribution that the layer cannot have."""


class BudgetError(UsageError):
    """A budget, of memory or of time, that no step can meet."""


class CapacityError(MestError):
    """More units are asked for than a layer has room for."""


class InputError(UsageError):
    """A batch, label or array of the wrong shape, type or content."""


class StateError(MestError):
    """A state_dict, mask or checkpoint that does not fit the step."""


class DataError(MestError):
    """A data set that is missing or damaged."""


class BuildError(MestError):
    """A kernel could not be compiled, or its cache could not be written."""


class TargetError(UsageError):
    """A target that this machine cannot compile for or run."""


class DeviceError(MestError):
    """A device that refused or lost its work while a step ran; what the step held there is lost."""


class DeviceLost(DeviceError):
    """A device behind a link that is gone: killed, cut off or silent. Another one may take its place."""


class NotInstalled(MestError):
    """Another program that a comparison or target needs and this machine does not have."""
