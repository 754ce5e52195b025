#!/usr/bin/env bash
# torch 2.13.0: where a NaN comes before them, operators that are the same elsewhere have different gradients. relu and relu6 pass the gradient on behind a NaN,
# clamp(min=0) and maximum with zeros, the first of which gives equal values everywhere, do not agree with them or each other at 0 and NaN.
# max_pool2d gives the whole gradient of a window with several NaN to the last of them; without NaN to the first of equal ones.
# Seen, for inputs NaN, -1, 0, 2: relu 1 0 0 1, relu6 1 0 0 1, clamp 0 0 1 1, maximum 1 0 0.5 1; pool over 1, NaN, NaN, 2: 0 0 1 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.3
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn import functional

nan = float("nan")


def gradient(function, values):
    x = torch.tensor(values, requires_grad=True)
    function(x).sum().backward()
    return x.grad.flatten().tolist()


values = [nan, -1.0, 0.0, 2.0]
seen = {"relu": gradient(torch.relu, values), "relu6": gradient(functional.relu6, values),
        "clamp": gradient(lambda x: x.clamp(min=0), values), "maximum": gradient(lambda x: torch.maximum(x, torch.zeros(4)), values),
        "pool": gradient(lambda x: functional.max_pool2d(x, (1, 4)), [[[[1.0, nan, nan, 2.0]]]]),
        "pool of equals": gradient(lambda x: functional.max_pool2d(x, (1, 4)), [[[[1.0, 3.0, 3.0, 2.0]]]])}
print(seen)
assert seen == {"relu": [1, 0, 0, 1], "relu6": [1, 0, 0, 1], "clamp": [0, 0, 1, 1], "maximum": [1, 0, 0.5, 1], "pool": [0, 0, 1, 0],
                "pool of equals": [0, 1, 0, 0]}
PYTHON
