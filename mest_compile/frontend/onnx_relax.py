"""TVM's ONNX importer, which goes on past operators that it cannot convert, and says of every variable which node it is
from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from tvm import relax
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, get_constant

from mest_compile.frontend.onnx_converters import NAMED, OWN, recurrent
from mest_compile.frontend.onnx_folding import shapes
from mest_compile.frontend.onnx_plain import opset, where
from mest_compile.frontend.onnx_recurrent import ORDERS
from mest_compile.frontend.refusals import Origin, unsupported

# What TVM's converters raise; its own errors are RuntimeErrors.
CONVERTER_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError)


def to_relax(model: Any, names: Mapping[str, str]) -> tuple[Any, dict[str, Origin]]:
    """The Relax main function of an ONNX model that `onnx_plain.plain` rewrote, and where each variable is from.

    names  name of a value -> what the file called it
    Of what the importer does not take there is a call of a function that there is none of, which no reader reads.
    Raises UnsupportedOperator where the type of such a value is unknown, what TVM raises outside of its converters.
    """
    importer = _Importer(model, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of sizes that are known by now
        module = importer.from_onnx(model.graph, opset(model))
    return module["main"], importer.origins


def trouble(error: Exception, names: Mapping[str, str]) -> str:
    """What TVM says, by the file's names."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return "TVM: " + re.sub(r"\bvalue\d+\b", lambda found: names.get(found[0], found[0]), line)


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    def __init__(self, model: Any, names: Mapping[str, str]):
        super().__init__({}, "float32", keep_params_in_input=True)
        self.origins: dict[str, Origin] = {}
        self.model = model
        self.names = names
        self.pending = iter(model.graph.node)  # in whose order they are converted
        self.shapes: dict[str, tuple[int, ...]] | None = None

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        """Each is met where it is converted."""

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        node, why = next(self.pending), ""
        try:
            made = recurrent(self.bb.emit, inputs[0], list(inputs)[1:], attrs) if op_name in ORDERS else None
            if op_name in OWN:
                held = [self._nodes, self._params]
                others = [
                    one if one is None or op_name in NAMED else get_constant(one, held) for one in list(inputs)[1:]
                ]
                made = OWN[op_name](inputs[0], others, attrs)
            theirs = made is None
            made = super()._convert_operator(op_name, inputs, attrs, opset) if theirs else self.bb.normalize(made)
        except CONVERTER_ERRORS as error:
            why = trouble(error, self.names)
            own = op_name in OWN or op_name in ORDERS
            if own or isinstance(error, NotImplementedError):
                why = str(error) if own else ""
            made = self._nothing(node, inputs, why, error)
        if isinstance(made, relax.Call) and not isinstance(made.ty, relax.ShapeType):
            made = self.bb.emit(made)
            self.origins[made.name] = Origin(where(node), op_name, True, why)
        elif op_name in ORDERS:
            self.origins |= {one.name: Origin(where(node), op_name, True) for one in made.fields}
        return made

    def _nothing(self, node: Any, inputs: Any, why: str, error: Exception) -> Any:
        """A value of the node's type, from what it takes, that nothing makes."""
        if self.shapes is None:
            self.shapes = shapes(self.model)
        types = [relax.TensorType(self.shapes[name], "float32") for name in node.output if name in self.shapes]
        if len(types) != len(node.output):
            what = f"{node.op_type} ({why})" if why else node.op_type
            raise unsupported(what, where(node), node.op_type) from error
        sources = [one for one in inputs if isinstance(one, relax.Expr) and not isinstance(one.ty, relax.ShapeType)]
        kind = types[0] if len(types) == 1 else relax.TupleType(types)
        return self.bb.normalize(relax.op.call_pure_packed("unknown", *sources, ty_args=kind))
