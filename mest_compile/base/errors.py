"""Every error a caller can meet. Each message says what was wanted, what came and what to do."""


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


class UnsupportedOperator(MestError):
    """The model holds an operator that has no training form here."""


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
