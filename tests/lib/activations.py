"""torch's functions for the activations of the table."""

from functools import partial


def function_of(activation):
    from torch.nn import functional

    return (
        partial(functional.gelu, approximate="tanh") if activation == "gelu_tanh" else getattr(functional, activation)
    )
