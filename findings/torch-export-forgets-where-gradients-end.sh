#!/usr/bin/env bash
# torch 2.13.0: torch.export keeps inference_mode of a forward pass nowhere in its graph, and no_grad only until run_decompositions and only where the
# caller computes gradients; detach becomes aten.alias, which an importer reads as nothing. What forward froze so trains in whatever is made of the graph.
# Seen: operators that tell of the mode, exported with gradients and without, then after decomposition.
#   no_grad         wrap_with_set_grad_enabled / none    none / none
#   inference_mode  none / none                          none / none
#   detach          aten.detach / aten.detach            aten.alias / aten.alias
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.3
"$folder/venv/bin/python" - <<'PYTHON'
import torch


class Net(torch.nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode, self.one, self.two = mode, torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, x):
        if self.mode == "no_grad":
            with torch.no_grad():
                y = self.one(x)
        elif self.mode == "inference_mode":
            with torch.inference_mode():
                y = self.one(x)
            y = y.clone()
        else:
            y = self.one(x).detach()
        return self.two(y)


def telling(program):
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if any(word in name for word in ("grad", "inference", "detach", "alias"))]


seen = {}
for mode in ("no_grad", "inference_mode", "detach"):
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(Net(mode), (torch.ones(2, 3),))
        seen[mode, grad] = telling(program), telling(program.run_decompositions())
        print(mode, grad, *seen[mode, grad])
assert seen["inference_mode", True] == seen["inference_mode", False] == ([], [])
assert seen["no_grad", True] == (["wrap_with_set_grad_enabled"], []) and seen["no_grad", False] == ([], [])
assert seen["detach", True] == seen["detach", False] == (["aten.detach.default"], ["aten.alias.default"])
PYTHON
