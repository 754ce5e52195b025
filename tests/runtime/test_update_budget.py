"""A budget for a step: what is chosen trains as torch trains it, costs what was said, and is told."""

import json
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_frozen import BATCHES, OPTIMIZER, SHAPE, check, freeze, made
from torch import nn

import mest_compile as mest
from mest_compile import budgeting
from mest_compile.base.errors import BudgetError, DataError, InputError, UnknownName, UsageError
from mest_compile.devices import cycleprices
from mest_compile.planning.plan import Plan
from mest_compile.planning.prices import call_bytes
from mest_compile.records.log import Records
from mest_compile.runtime.step import TrainStep

DATA = tuple(np.concatenate(parts) for parts in zip(*BATCHES, strict=True))
OPTIONS = {
    "scheme": "block:1x4",
    "sparsity": 0.75,
    "optimizer": OPTIMIZER,
    "threads": 1,
    "dense_layers": ["conv1", "fc"],
}
DENSE = {"scheme": "dense", "sparsity": 0.0, "threads": 1}


@pytest.fixture
def clocked(monkeypatch):
    """Kernels that take a second a byte: times as noise would not have them. Counts the steps that are timed."""
    timed = []

    def profile(step, images, labels, repeats):
        facts = step._compiled.facts
        plan = Plan(facts, Records(facts.target))
        timed.append(facts.graph.trainable())
        return {call.name: float(call_bytes(call, plan)) for call in plan.train.calls if call.stage != "clip"} | {
            "rest": 0.0
        }

    monkeypatch.setattr(TrainStep, "profile", profile)
    return timed


MLP, FEATURES = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), (8, 16)
ROWS = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32), np.arange(32) % 4


def choose(budget, builder, **options):
    return mest.choose_trainable(MLP, FEATURES, ROWS, budget, **{**DENSE, **options}, builder=builder)


def test_a_share_of_the_time_is_kept_and_what_it_says_is_what_the_step_takes(builder, clocked):
    choice = choose(0.8, builder)
    assert 0.4 < choice.predicted <= 0.8 and choice.measured == pytest.approx(choice.predicted)
    assert choice.costs == "measured" and choice.importance == "fisher" and choice.budget == 0.8
    chosen = [unit.name for unit in choice.units if unit.chosen]
    assert "4" in chosen and len(chosen) < len(choice.units) == 3
    assert set(choice.trainable) == {name for unit in choice.units if unit.chosen for name in unit.parameters}
    assert choice.chosen_bytes < choice.full_bytes and choice.seconds > 0
    for unit in choice.units:
        assert unit.alone < 1 and 0 <= unit.cost < 1 and unit.importance > 0
    last = choice.units[-1]
    assert last.alone == min(unit.alone for unit in choice.units)
    document = json.loads(json.dumps(choice.to_dict()))
    assert document["units"][-1]["parameters"] == ["4.weight", "4.bias"] and document["predicted"] == choice.predicted


def test_what_not_even_the_cheapest_step_meets_is_refused_with_what_it_could(builder, clocked):
    with pytest.raises(BudgetError, match=r"update_budget is 0.1; the cheapest step .* use at least 0\.\d+$") as caught:
        choose(0.1, builder)
    least = float(str(caught.value).rpartition(" ")[2])
    assert [unit.name for unit in choose(least, builder).units if unit.chosen] == ["4"]
    with pytest.raises(BudgetError, match=r"needs (\d+): use at least that") as caught:
        choose(1000, builder)
    least = int(str(caught.value).partition("needs ")[2].partition(":")[0])
    choice = choose(least, builder)
    assert choice.chosen_bytes == least and choice.costs == "counted" and choice.measured is None
    with pytest.raises(BudgetError):
        choose(least - 1, builder)


def test_the_whole_budget_trains_everything(builder, clocked):
    choice = choose(1.0, builder)
    assert all(unit.chosen for unit in choice.units) and choice.predicted == choice.measured == 1


def test_a_choice_whose_kernels_were_not_timed_is_timed_and_chosen_anew(builder, monkeypatch):
    """On a clock by which kernels that neither the full step nor the one of the lowest layer has are dear."""
    seen, cheap = [], set()

    def profile(step, images, labels, repeats):
        if step not in seen:
            seen.append(step)
        keys = {call.name: (call.kernel, call.problem) for call in step.program.calls if call.stage != "clip"}
        if len(seen) < 3:
            cheap.update(keys.values())
        return {name: 1.0 if key in cheap else 20.0 for name, key in keys.items()} | {"rest": 0.0}

    monkeypatch.setattr(TrainStep, "profile", profile)
    choice = mest.choose_trainable(made(lambda model: None), SHAPE, DATA, 0.75, **OPTIONS, builder=builder)
    shares = [sum(profile(step, None, None, 1).values()) for step in seen]
    assert shares[2] / shares[0] > 0.75  # what was chosen first
    assert choice.measured == pytest.approx(choice.predicted) == shares[-1] / shares[0] and choice.measured <= 0.75


def test_within_bytes_what_is_chosen_trains_as_in_torch(builder):
    budget = 110_000
    step = mest.compile(made(lambda model: None), SHAPE, **OPTIONS, builder=builder, update_budget=budget, data=DATA)
    choice = step.describe()["update_budget"]
    stays = [unit["name"] for unit in choice["units"] if not unit["chosen"]]
    assert step.memory()["total"] == choice["chosen_bytes"] <= budget < choice["full_bytes"] and 0 < len(stays) < 6

    def prepare(model):
        norm_of = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "conv4": "bn4", "shortcut": "bn5"}
        norms = [norm_of[name] for name in stays if name in norm_of]
        freeze(model, *stays, *norms)
        for name in norms:
            getattr(model, name).eval()

    check(step, made(prepare), made(prepare))


def test_importance_is_of_torchs_gradients(builder, clocked):
    model, batches = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)), 3
    rng = np.random.default_rng(1)
    images, labels = rng.standard_normal((8 * batches, 6)).astype(np.float32), rng.integers(0, 4, 8 * batches)
    drawn = budgeting.sampled((images, labels), (8, 6), budgeting.StepOptions(seed=0))
    wanted = {"fisher": np.zeros(2), "saliency": np.zeros(2)}
    for some, right in drawn:
        model.zero_grad()
        F.cross_entropy(model(torch.from_numpy(some)), torch.from_numpy(right)).backward()
        for place, layer in enumerate((model[0], model[2])):
            for weight in layer.parameters():
                wanted["fisher"][place] += float((weight.grad**2).sum()) / batches
                wanted["saliency"][place] += float((weight.grad * weight.detach()).abs().sum()) / batches
    assert sorted(np.concatenate([some for some, _ in drawn]).ravel()) == sorted(images.ravel())
    for importance, values in wanted.items():
        choice = mest.choose_trainable(
            model, (8, 6), (images, labels), 1.0, importance=importance, builder=builder, **DENSE
        )
        np.testing.assert_allclose([unit.importance for unit in choice.units], values, rtol=1e-5)


def test_there_is_to_choose_from_what_trainable_lets(builder, clocked):
    choice = choose(0.95, builder, trainable=["2.weight", "4.*"])
    assert [(unit.name, unit.parameters) for unit in choice.units] == [
        ("2", ("2.weight",)),
        ("4", ("4.weight", "4.bias")),
    ]


def test_for_another_machine_costs_are_counted_where_nothing_can_model_them(builder, monkeypatch, caplog):
    monkeypatch.setattr(cycleprices, "missing_tools", lambda target: ["qemu-aarch64"])
    step = mest.compile(MLP, FEATURES, **DENSE, target="arm_cpu", update_budget=0.8, data=ROWS, builder=builder)
    choice = step.describe()["update_budget"]
    assert choice["costs"] == "counted" and choice["measured"] is None and choice["predicted"] <= 0.8
    assert "counted, not modelled" in caplog.text and "qemu-aarch64" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"update_budget": 0.5}, UsageError, "give data="),
        ({"data": DATA}, UsageError, "leave data out"),
        ({"update_budget": 1.5, "data": DATA}, UsageError, "update_budget is 1.5; wanted a share"),
        ({"update_budget": "5 miles", "data": DATA}, UsageError, "wanted a share"),
        ({"update_budget": 0.5, "memory_budget": 10**9, "data": DATA}, UsageError, "do not go together"),
        ({"update_budget": 0.5, "loss": mest.Distill(), "data": DATA}, UsageError, "teacher"),
        ({"update_budget": 0.5, "data": (DATA[0][:4], DATA[1][:4])}, DataError, "4 examples do not fill one batch"),
        ({"update_budget": 0.5, "data": (DATA[0][:, :1], DATA[1])}, InputError, "takes images of shape"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused_before_anything_is_compiled(options, error, words):
    with pytest.raises(error, match=words) as caught:
        mest.compile(made(lambda model: None), SHAPE, **OPTIONS, **options)
    assert "\n" not in str(caught.value)


def test_gradients_that_are_not_finite_choose_nothing(builder):
    module = deepcopy(MLP)
    nn.init.constant_(module[0].weight, 1e38)
    with pytest.raises(InputError, match="those of . on this data hold NaN or infinity"):
        mest.choose_trainable(module, FEATURES, ROWS, 10**9, **DENSE, builder=builder)


def test_choosing_refuses_what_it_does_not_know():
    for options, error, words in (
        ({"importance": "luck"}, UnknownName, "no importance 'luck'; there are: fisher, saliency"),
        ({"colour": "red"}, UsageError, "colour.*takes the options of mest.compile"),
    ):
        with pytest.raises(error, match=words):
            mest.choose_trainable("mlp", (8, 4), (np.zeros((8, 4), np.float32), np.zeros(8, int)), 0.5, **options)


def test_commands_and_recipes_choose_by_their_data(mest_compile_command, tmp_path, monkeypatch):
    (tmp_path / "recipe.toml").write_text(
        'epochs = 1\nmethod = "static"\n[run]\nupdate_budget = 1.0\nmodel = "mlp"\nwidth = 8\n'
    )
    shared = ["--recipe", tmp_path / "recipe.toml", "--sparsity", 0.5, "--threads", 1, "--json"]
    ran = mest_compile_command("train", *shared, "--out", tmp_path / "a")
    assert ran.code == 0 and "update budget of 1 of the full step: 3 of 3 layers train" in ran.err, ran.err
    ran = mest_compile_command("train", *shared, "--update-budget", "1000", "--out", tmp_path / "b")
    assert ran.code == 2 and "use at least" in ran.err and not (tmp_path / "b").exists()
    model = ["--model", "mlp", "--width", 8, "--batch", 8, "--sparsity", 0.5, "--threads", 1]
    ran = mest_compile_command("build", *model, "--update-budget", "0.5", "--out", tmp_path / "c")
    assert ran.code == 2 and "give --data" in ran.err
    budget = ["--data", "digits", "--update-budget", "1MiB"]
    ran = mest_compile_command(
        "build", *model, *budget, "--image", "1x8x8", "--target", "local", "--out", tmp_path / "d"
    )
    assert ran.code == 0 and "update budget of 1048576 bytes" in ran.err, ran.err
    ran = mest_compile_command("plan", *model, *budget)
    assert ran.code == 0 and re.search(r"fc2 +\S+ +\S+ +\S+ +\d+ +yes", ran.out), ran.out + ran.err
    monkeypatch.setattr(budgeting, "ROUNDS", 1)
    choice = mest_compile_command("plan", *model, *budget[:3], "1.0", "--json").document["update_budget"]
    assert [unit["name"] for unit in choice["units"]] == ["fc1", "fc2", "fc3"] and choice["measured"] == 1


def test_what_is_frozen_does_not_begin_with_all_weights(builder):
    options = {**OPTIONS, "builder": builder, "update_budget": 180_000, "data": DATA}
    step = mest.compile(made(lambda model: None), SHAPE, **options, dense_start=True)
    frozen, alive = step.describe()["frozen"], {name: mask.mean() for name, mask in step.masks().items()}
    assert {name for name, share in alive.items() if share < 1} == set(alive) & set(frozen) and len(frozen) > 0
    assert any(share == 1 for share in alive.values()) and step.memory()["total"] <= 180_000
