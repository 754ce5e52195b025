"""Shared libraries that we have linked: whether they fit the target."""

from mest_compile.hardware.target import Target, triple_of
from mest_compile.kernels.elf import Library, read_library
from mest_compile.kernels.linking import _LIBRARIES


def check_library(content: bytes, target: Target) -> Library:
    """Facts of a linked library, which is for the target's processor and needs what every device has alone."""
    found, (architecture, system) = read_library(content), triple_of(target)
    assert found.machine == architecture and set(found.needed) <= set(_LIBRARIES[system])
    return found
