"""sparsity="as-given": the zeros of a model's weights are its masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mest_compile.base.errors import SparsityError
from mest_compile.ir.graph import ForwardGraph, LayerSpec
from mest_compile.options import AS_GIVEN, StepOptions
from mest_compile.planning.layers import layer_schemes, layer_specs, scheme_of
from mest_compile.planning.patterns import weight_name
from mest_compile.sparsity.scheme import SCHEMES, Scheme
from mest_compile.sparsity.schemes.dense import Dense

Masks = dict[str, np.ndarray]

_ALIKE = 0.01  # a mask much sparser than 2:4 may be one by chance, and is none


def first_masks(
    model: Any, graph: ForwardGraph, state: Mapping[str, np.ndarray], options: StepOptions
) -> tuple[StepOptions, dict[str, np.ndarray]]:
    """(options, masks that the step begins with; of layers that are not named they are by magnitude). Raises as
    `as_given` does, and SparsityError where masks are attached that `options` would not keep."""
    from mest_compile.frontend import attached_to

    attached = attached_to(model)
    if options.sparsity == AS_GIVEN:
        return as_given(graph, state, options, attached)
    if attached:
        raise SparsityError(
            f"{attached[0]} has a mask attached, which sparsity {options.sparsity} would not keep: pass "
            f"sparsity={AS_GIVEN!r}, or make it permanent first (torch.nn.utils.prune.remove, "
            "torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return options, {}


def as_given(
    graph: ForwardGraph, state: Mapping[str, np.ndarray], options: StepOptions, attached: Collection[str]
) -> tuple[StepOptions, Masks]:
    """(options that name each sparse layer's sparsity, {weight name: mask (out, in, kh, kw) bool}) of options whose
    sparsity is "as-given".

    A weight that is 0, or -0, is dead; a layer without any is dense, whatever `dense_layers` would be by default, and
    so are those that `dense_layers` names.
    attached  parameters whose masks are attached to the model, and promise that zeros stay zeros
    Raises SparsityError where the scheme cannot have a mask, UnknownName.
    """
    specs = layer_specs(graph)
    known = [spec.name for spec in specs]
    schemes = layer_schemes(specs, options)
    dense = [weight_name(name, known, "dense_layers") for name in options.dense_layers or ()]
    dense += [name for name, (scheme, _) in schemes.items() if isinstance(scheme, Dense)]
    if lost := [name for name in attached if name not in known or name in dense]:
        why = "it is to be dense" if lost[0] in dense else "is not the weight of a convolution or linear layer"
        raise SparsityError(
            f"{lost[0]} has a mask that nothing would keep: {why}; make it permanent first "
            "(torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)"
        )
    masks = {spec.name: state[spec.name].reshape(spec.weight_shape) != 0 for spec in specs if spec.name not in dense}
    masks = {name: mask for name, mask in masks.items() if not mask.all()}
    if not masks:
        raise SparsityError(
            f"sparsity is {AS_GIVEN!r}, but no weight of the model{' outside of dense layers' if dense else ''} is 0; "
            "prune it first, or give sparsity a number"
        )
    chosen, each = {name: scheme_of(name, schemes) for name in masks}, isinstance(options.scheme, Mapping)
    _check([spec for spec in specs if spec.name in masks], masks, chosen, each)
    share = {name: 1.0 - int(mask.sum()) / mask.size for name, mask in masks.items()}
    scheme = chosen if each else options.scheme
    return replace(options, scheme=scheme, sparsity=share, dense_layers=None), masks


def _check(specs: Sequence[LayerSpec], masks: Masks, schemes: Mapping[str, Scheme], each: bool) -> None:
    """each: whether each layer may have a scheme of its own."""
    for spec in specs:
        name, mask = spec.name, masks[spec.name]
        if not mask.any():
            raise SparsityError(
                f"{name}: all of its weights are 0, a sparse layer needs one that is not; list it in dense_layers"
            )
        if why := _fault(spec, mask, schemes[name]):
            able = {name: nearest([spec], {name: mask})} if each else nearest(specs, masks)
            raise SparsityError(f"{name}: the mask given {why}; pass scheme={able!r}")


def nearest(specs: Sequence[LayerSpec], masks: Masks) -> str:
    """The text of the scheme of largest units that can have all these masks; "unstructured" always can."""
    zeros = 1.0 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.size for mask in masks.values())
    fitting = [
        scheme
        for kind in SCHEMES.load().values()
        for scheme in kind.variants()
        if (scheme.fixed is None or abs(zeros - scheme.fixed) < _ALIKE)
        and not any(_fault(spec, masks[spec.name], scheme) for spec in specs)
    ]

    def order(scheme: Scheme) -> tuple[int, str]:
        return -sum(scheme.unit_cells(spec) * scheme.cell_elems(spec) for spec in specs), str(scheme)

    return str(min(fitting, key=order))


def _fault(spec: LayerSpec, mask: np.ndarray, scheme: Scheme) -> str | None:
    if why := scheme.misfit(spec):
        return f"is not of scheme {scheme}: that {why}"
    return scheme.fault(spec, mask)
