"""Python in the documentation runs and says what the text around it says."""

import json
import math
import re
from pathlib import Path

import budget
import depthwise
import frozen
import numpy as np
import opencl_loads
import pruned
import pytest
import roofline
import safetensors
import torch
from nets import short_resnet
from torch.nn.utils import prune

import mest_compile as mest
from mest_compile import compiling
from mest_compile.models.catalog import build_model

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_memory_page_meets_its_budget_by_computing_again(capsys):
    code = re.search(r"```python\n(.*?)```", (DOCS / "memory.md").read_text(), re.S)[1]
    exec(compile(code, "docs/memory.md", "exec"), {})
    total, recomputed = map(int, capsys.readouterr().out.split())
    assert total <= 2_800_000 and recomputed > 0


def test_the_page_on_own_models_tells_how_models_come_out_again(tmp_path, monkeypatch):
    section = (DOCS / "own-model.md").read_text().partition("## Out again")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    options = {"scheme": "unstructured", "sparsity": 0.5, "dense_layers": []}
    made = mest.compile(model, (2, 8), **options)
    mest.to_onnx(made, "net.onnx")
    step = mest.compile("net.onnx", (2, 8), **options)
    step(x, torch.arange(2))
    exec(blocks[0], {"mest": mest, "step": step, "model": model})
    other = mest.compile("new.onnx", (2, 8), **options)
    np.testing.assert_array_equal(other.predict(x), step.predict(x))
    np.testing.assert_allclose(model(x).detach(), step.predict(x), rtol=0, atol=1e-6)
    exec(blocks[1], {"step": made, "mest": mest})
    mest.to_safetensors(step, "small.safetensors", compressed=True)
    told = {"json": json, "math": math, "np": np, "safetensors": safetensors}
    exec(blocks[2], told)
    state = step.state_dict()
    assert told["held"].keys() == state.keys() and list(told["shapes"]) == list(step.masks())
    assert all(np.array_equal(told["held"][name], array) for name, array in state.items())
    assert len(blocks) == 3 and made.state_dict().keys() == step.state_dict().keys()
    for part in ("state_dict", "masks"):
        for name, array in getattr(step, part)().items():
            np.testing.assert_array_equal(getattr(made, part)()[name], array)


def test_the_memory_page_quotes_the_recorded_figures():
    entries = json.loads((ROOT / "benchmarks" / "results" / "full.json").read_text())["entries"]
    for limit, key in ("none", ""), ("135000000 bytes", " in 135000000 bytes"):
        found = entries[f"resnet32 width 32 64x3x32x32 block:4x1 0.9 threads 1{key} vs torch"]
        ours, rival = found["ours"], found["rival"]
        figures = [
            f"{side / 2**20:.0f}"
            for side in (ours["planned_bytes"], ours["training_peak_bytes"], rival["training_peak_bytes"])
        ]
        assert f"| {limit} | {' | '.join(figures)} | {found['ratio']:.2f} |" in (DOCS / "memory.md").read_text()


def test_the_finetuning_page_trains_what_it_says():
    page = (DOCS / "finetuning.md").read_text()
    code, known = re.search(r"```python\n(.*?)```", page, re.S)[1], {"mest": mest}
    exec(compile(code, "docs/finetuning.md", "exec"), known)
    trained = known["step"].describe()["trainable"]
    assert "layer3.1.conv1.weight" in trained and "conv1.weight" not in trained and "bn1.bias" in trained
    table = frozen.table(json.loads(frozen.FILE.read_text()))
    assert page == frozen.embed(page, table), "run python benchmarks/frozen.py"


def test_the_page_on_schemes_says_them_layer_by_layer(monkeypatch):
    section, made = (DOCS / "schemes.md").read_text().partition("## Layer by layer")[2], []
    monkeypatch.setattr(compiling, "make_step", lambda plan, *others: made.append(plan.layers))
    exec(compile(re.search(r"```python\n(.*?)```", section, re.S)[1], "docs/schemes.md", "exec"), {"mest": mest})
    found = {name.removesuffix(".weight"): (str(layer.scheme), layer.sparsity) for name, layer in made[0].items()}
    assert found["layer1.2.conv2"] == ("pattern", 0.8) and found["layer3.0.conv1"] == ("block:4x1", 0.95)
    assert found["layer2.0.conv1"] == ("block:4x1", 0.9) and found["fc"] == found["conv1"] == ("dense", 0.0)


def test_the_finetuning_page_trains_pruned_models():
    page = (DOCS / "finetuning.md").read_text()
    given, gradual = re.findall(r"```python\n(.*?)```", page.partition("## Masks that come with a model")[2], re.S)
    model = short_resnet((16, 3, 32, 32), 4)
    layers = [(part, "weight") for part in model.modules() if isinstance(part, torch.nn.Conv2d)]
    known = {"mest": mest, "model": model, "layers": layers}
    exec(compile(given, "docs/finetuning.md", "exec"), known)
    for name, mask in known["step"].masks().items():
        assert torch.equal(torch.from_numpy(mask), model.get_submodule(name.removesuffix(".weight")).weight_mask != 0)
    for part, name in layers:
        prune.remove(part, name)
    rng = np.random.default_rng(0)
    data = rng.standard_normal((16, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, 16)
    exec(compile(gradual, "docs/finetuning.md", "exec"), known | {"train_set": data, "test_set": data})
    table = pruned.table(json.loads(pruned.FILE.read_text()))
    assert page == pruned.embed(page, table), "run python benchmarks/pruned.py"


def test_the_finetuning_page_says_what_was_found_of_pruned_models():
    recorded = json.loads(pruned.FILE.read_text())
    for model in recorded["models"]:
        assert all(model["given_back_untrained"].values()) and not any(model["weights_outside_after_training"].values())
        assert all(abs(share - 0.95) < 1e-3 for share in model["sparsity"].values())
    assert recorded["gradual"]["as_sparse_as_compiled"]


def test_pruned_models_are_measured_in_turns(monkeypatch):
    monkeypatch.setattr(pruned, "GRADUAL", ("resnet20", 8))
    monkeypatch.setattr(pruned, "PRUNED", {"4x1 blocks": pruned.PRUNED["4x1 blocks"]})
    shape = (8, 3, 16, 16)
    one = pruned.measure("resnet20", 8, shape, rounds=1)
    results = {"models": [one], "gradual": pruned.measure_gradual(shape, 1, (0.0, 0.8))}
    assert all(one["given_back_untrained"].values()) and not any(one["weights_outside_after_training"].values())
    assert results["gradual"]["as_sparse_as_compiled"]
    rows = pruned.table(results).splitlines()[2:]
    assert len(rows) == 3 and rows[0].startswith("| resnet20, width 8 | 4x1 blocks | ")
    assert rows[-1].startswith("| resnet20, width 8 | gradually, 4x1 blocks, at 0.8 | ")


def test_the_finetuning_page_keeps_to_its_budgets(capsys):
    page, rng = (DOCS / "finetuning.md").read_text(), np.random.default_rng(0)
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "update_budget" in block)
    code = code.replace("(16, 3, 96, 96)", "(8, 16)")
    images, labels = rng.standard_normal((32, 16)).astype(np.float32), rng.integers(0, 10, 32)
    known = {"mest": mest, "model": build_model("mlp", (8, 16), 10, 8), "images": images, "labels": labels}
    exec(compile(code.replace("0.5", "1.0"), "docs/finetuning.md", "exec"), known)
    assert known["step"].memory()["total"] == known["choice"].chosen_bytes <= 24 * 2**20
    results = json.loads(budget.FILE.read_text())
    assert page == budget.embed(page, budget.table(results)), "run python benchmarks/budget.py"
    for row in budget.rows(results):
        shares = [row["predicted"]] if row["measured"] is None else [row["predicted"], row["measured"]]
        assert all(0.9 * row["budget"] <= share <= 1.1 * row["budget"] for share in shares)


def test_a_budget_is_measured_in_turns(monkeypatch):
    monkeypatch.setattr(frozen, "MODELS", {"small": lambda: build_model("mlp", (8, 3, 4, 4), 10, 8)})
    monkeypatch.setattr(budget, "BUDGET", 1.0)
    (row,) = budget.rows({"measure": {"models": {"small": budget.measure("small", (8, 3, 4, 4), rounds=1)}}})
    assert row["predicted"] == 1 and row["chosen"] == row["layers"] == 3 and row["measured"] > 0


def test_frozen_blocks_are_measured_in_turns(monkeypatch):
    small = {"small": lambda: build_model("resnet20", (8, 3, 16, 16), 10, 4)}
    monkeypatch.setattr(frozen, "MODELS", small)
    rows = frozen.rows({"models": {"small": frozen.measure("small", (8, 3, 16, 16), rounds=1)}})
    assert [row["trained"] for row in rows] == ["all", "last:5", "last:3"]
    assert rows[0]["time_share"] == rows[0]["activations_share"] == 1 > rows[1]["activations_share"]
    assert rows[1]["optimizer_share"] > rows[2]["optimizer_share"]


def test_the_benchmarks_page_has_the_recorded_times_of_mobile_nets_measured_so(monkeypatch):
    page, recorded = depthwise.DOCUMENT.read_text(), json.loads(depthwise.FILE.read_text())
    assert page == depthwise.embed(page, depthwise.tables(recorded)), "run python benchmarks/depthwise.py"
    nets = {"ds-cnn": ("ds-cnn", (8, 1, 16, 16), 1), "mlp": ("mlp", (8, 1, 4, 4), 1)}
    monkeypatch.setattr(depthwise, "NETS", nets)
    monkeypatch.setattr(depthwise, "CHAINS", "ds-cnn")
    chains = depthwise.measure_chains(rounds=1, working_bytes=0)
    assert [(one["phase"], one["input"]) for one in chains] == [(phase, (64, 9, 8)) for phase in depthwise.PHASES]
    assert [one["bytes"] for one in chains] == [4 * arrays * 64 * 9 * 8 * 8 for arrays in (2, 4)]
    assert min(min(row.values()) for row in depthwise.chain_rows(chains).values()) > 0
    steps = depthwise.measure_steps("mlp", rounds=1)
    assert steps.keys() == recorded["nets"]["mobilenetv2"]["seconds"].keys() and min(map(min, steps.values())) > 0


def test_the_opencl_page_has_the_tables_that_the_plan_gives():
    page = roofline.DOCUMENT.read_text()
    assert page == roofline.embed(page, roofline.table()), "run python benchmarks/roofline.py"
    found = roofline.rows(roofline.find_target("mali-g78"))
    conv = found["gather.conv", "forward"]
    dense, sparse = 2 * 3 * 9 * 32 * 32**2 * 64, 2 * 64 * 0.1 * 9 * (10 * 32**4 + 9 * 64**2 * 16**2 + 9 * 128**2 * 8**2)
    assert conv.flop == pytest.approx(dense + sparse + 2 * 64 * 9 * 0.1 * (32 * 64 * 16**2 + 64 * 128 * 8**2), rel=0.05)
    row = roofline.Row(1, 10**9, 10**8)
    assert row.seconds(roofline.find_target("mali-g78")) == (10**8 / 51.2e9, "bytes") and row.intensity == 10
    assert roofline.Row(1, 10**12, 10**8).seconds(roofline.find_target("mali-g78"))[1] == "operations"


BODY = """
    int way = staged_offsets_ptr[turn];
    met_ptr[0] = source_ptr[(way + from_where_ptr[0])];
    sums_ptr[0] = (sums_ptr[0] + (values_ptr[((turn * 2) + 1)] * met_ptr[0]));
    met_ptr[0] = source_ptr[((way + from_where_ptr[0]) + 34)];
    sums_ptr[1] = (sums_ptr[1] + (weights_ptr[0] * source_ptr[(way + from_where_ptr[0])]));
    weights_ptr[0] = vload4(0, values_ptr + (turn * 4));
"""


def test_loads_of_a_loop_are_counted_to_the_bracket_that_closes_them():
    assert sorted(size for _, size in opencl_loads.loads(BODY)) == [
        4,
        16,
        16,
        16,
    ]  # a value, two places of source, a vload4 of values
    source = "for (int turn = 0; turn < 3; ++turn) {" + BODY + "}"
    assert opencl_loads.counted(source) == (52, 2 * 2 * opencl_loads.LANES)


def test_the_opencl_page_has_the_loads_that_the_code_has():
    recorded, page = json.loads(opencl_loads.RESULT.read_text()), opencl_loads.DOCUMENT.read_text()
    assert page == opencl_loads.embed(page, opencl_loads.table(recorded)), "run python benchmarks/opencl_loads.py"
    assert opencl_loads.rows(("pattern",)) == [row for row in recorded["now"] if row["scheme"] == "pattern"]


def test_the_opencl_page_quotes_the_recorded_times():
    page = opencl_loads.DOCUMENT.read_text()
    recorded = json.loads((ROOT / "benchmarks" / "results" / "opencl-pocl.json").read_text())
    assert "PoCL" in recorded["opencl"] and recorded["command"].startswith("mest-compile table")
    for row in recorded["rows"]:
        interval = f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
        figures = f"{row['step_seconds'] * 1e3:.1f} | {row['baseline_seconds'] * 1e3:.1f} | {interval}"
        assert f"| {row['scheme']} | {figures} |" in page


def test_the_page_on_training_a_part_freezes_what_it_says():
    section = (DOCS / "finetuning.md").read_text().partition("## While it trains")[2].partition("\n## ")[0]
    frozen_now, planned = re.findall(r"```python\n(.*?)```", section, re.S)
    shape = (8, 3, 8, 8)
    step = mest.compile(short_resnet(shape), shape, sparsity=0.5, threads=1)
    names = {"step": step, "images": np.zeros(shape, np.float32), "labels": np.arange(8)}
    exec(planned, names)
    assert np.isfinite(names["result"].loss) and not step.describe()["frozen"]
    exec(frozen_now, names)
    assert all(name.startswith(("conv1", "bn1", "layer1")) for name in step.describe()["frozen"])
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv2.weight"} <= step.describe()["frozen"].keys()
