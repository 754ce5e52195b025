#!/usr/bin/env bash
# apache-tvm 0.27.0.post1, ONNX importer with keep_params_in_input=True: "onnx::", with which torch's classic exporter begins the names of folded weights,
# is dropped from initializers' names, so that "onnx::w" and "w" of a valid model become one: one weight is lost and the module refers to a variable that
# it does not have. Without keep_params_in_input the same file is right.
# Seen: one parameter instead of two; compiling then fails with "Var w is not defined"; the right answer is -3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1 numpy==2.3.3 onnx==1.19.0
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

weights = {"onnx::w": np.full((3, 2), 1, np.float32), "w": np.full((3, 2), 2, np.float32)}
nodes = [helper.make_node("MatMul", ["x", "onnx::w"], ["p"]), helper.make_node("MatMul", ["x", "w"], ["q"]), helper.make_node("Sub", ["p", "q"], ["y"])]
graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, [1, 3])], [helper.make_tensor_value_info("y", 1, [1, 2])],
                          [numpy_helper.from_array(array, name) for name, array in weights.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model)
x = tvm.runtime.tensor(np.ones((1, 3), np.float32))


def run(module, *parameters):
    return relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())["main"](x, *parameters).numpy()


assert (run(from_onnx(model)) == -3).all()
module, parameters = relax.frontend.detach_params(from_onnx(model, keep_params_in_input=True))
print("parameters:", len(parameters["main"]), "of 2")
assert len(parameters["main"]) == 1
try:
    run(module, *parameters["main"])
except Exception as error:
    print(str(error).strip().splitlines()[-1])
    assert "is not defined" in str(error)
else:
    raise SystemExit("it compiles now")
PYTHON
