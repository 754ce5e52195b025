#!/usr/bin/env bash
# apache-tvm 0.27.0.post1: the analyzer that simplifies expressions takes any two floats for ordered. A test for NaN written as a pair of comparisons, or as a
# negated one, is folded away: `a < b or a >= b` becomes true, `not a < b` becomes `b <= a`; with a NaN both are otherwise.
# Seen: a < b or a >= b -> T.bool(True); a < b and a >= b -> T.bool(False); not a < b -> b <= a.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1 numpy==2.3.3 psutil==7.1.0 cloudpickle==3.1.1
"$folder/venv/bin/python" - <<'PYTHON'
from tvm import tirx
from tvm.sym import Analyzer

a, b = tirx.Var("a", "float32"), tirx.Var("b", "float32")
simplify = Analyzer().simplify
seen = [str(simplify(test)) for test in (tirx.any(a < b, a >= b), tirx.all(a < b, a >= b), tirx.Not(a < b))]
print(seen)
assert seen == ["T.bool(True)", "T.bool(False)", "b <= a"]
PYTHON
