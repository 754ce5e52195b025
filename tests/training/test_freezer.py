"""Progressive freezing: the schedule that saves what was asked, and runs that follow it, are stopped and go on."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from test_kill import assert_same, outcome
from test_training import TEST, TRAIN, Interrupter, interrupt

import mest_compile as mest
from mest_compile import budgeting
from mest_compile.base.errors import MestError, UsageError
from mest_compile.models.catalog import build_model
from mest_compile.training.freezer import Freezer
from mest_compile.training.freezing import FreezeRule, schedule
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe
from mest_compile.training.reporting import write_report
from mest_compile.training.sieve import SieveRule

SHAPE = (16, 1, 8, 8)


def saved_by(found, costs, weights):
    """Share of the run that a schedule saves, epoch by epoch."""
    depths = [max((depth for at, depth in found if at <= epoch), default=0) for epoch in range(len(weights))]
    total = sum(weight * costs[0] for weight in weights)
    return sum(weight * (costs[0] - costs[depth]) for weight, depth in zip(weights, depths, strict=True)) / total


def test_a_schedule_saves_its_share_within_a_part_and_rises_evenly():
    assert schedule([100, 80, 60, 40, 20], [1] * 10, [5, 6, 7, 8], 0.2) == [(6, 1), (7, 2), (8, 4)]
    assert schedule([100, 80, 60, 40, 20], [1] * 10, [5, 6, 7, 8], 0.28) == [(5, 1), (6, 2), (7, 3), (8, 4)]
    assert schedule([3, 2, 1], [1] * 4, [1], 0.2) == [(1, 1)]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        costs = np.sort(rng.uniform(0.3, 3, rng.integers(2, 12)))[::-1].tolist()
        epochs = int(rng.integers(2, 40))
        when = np.flatnonzero(rng.random(epochs - 1) < 0.7) + 1
        when = [*when.tolist(), epochs - 1] if epochs - 1 not in when else when.tolist()
        weights = rng.choice([0.8, 1.0], epochs).tolist()
        most = saved_by([(when[0], len(costs) - 1)], costs, weights)
        share = most * rng.uniform(0.05, 0.99)
        found = schedule(costs, weights, when, share)
        assert {epoch for epoch, _ in found} <= set(when), seed
        assert all(one[0] < other[0] and one[1] < other[1] for one, other in pairwise(found)), seed
        grain = max(costs[depth] - costs[depth + 1] for depth in range(len(costs) - 1)) / costs[0]
        spans = [sum(weights[start:end]) for start, end in zip(when, [*when[1:], epochs])]
        got = saved_by(found, costs, weights)
        assert share - 1e-6 <= got <= share + grain * max(spans) / sum(weights), seed
        with pytest.raises(UsageError, match=f"saves {most:.3f} of the run even from epoch {when[0] + 1} on"):
            schedule(costs, weights, when, most + 0.01)


def test_a_sieve_makes_late_epochs_count_less():
    costs, when = [10, 8, 6, 4], [4, 5, 6, 7, 8, 9]
    whole, short = (schedule(costs, [1] * 4 + [late] * 6, when, 0.15) for late in (1, 0.5))
    assert saved_by(whole, costs, [1] * 4 + [0.5] * 6) < 0.15 <= saved_by(short, costs, [1] * 4 + [0.5] * 6) < 0.2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"share": 0}, "share between 0 and 1, not 0"),
        ({"share": 1.0}, "share between 0 and 1"),
        ({"share": True}, "share between 0 and 1, not True"),
        ({"share": 0.2, "of": "memory"}, "of is 'memory'; wanted 'flops' or 'time'"),
        ({"share": 0.2, "begin": 0.9, "end": 0.5}, "wanted begin <= end <= 1"),
        ({"share": 0.2, "end": 1.5}, "wanted begin <= end <= 1"),
        ({"share": 0.2, "begin": -0.1}, "begin is -0.1"),
    ],
)
def test_a_rule_checks_itself(settings, said):
    with pytest.raises(UsageError, match=said):
        FreezeRule(**settings)


def test_a_recipe_says_it_in_a_table_and_refuses_what_would_never_act(tmp_path):
    (tmp_path / "a.toml").write_text('epochs = 20\n[freeze]\nshare = 0.2\nof = "time"\nbegin = 0.5\n')
    recipe = Recipe.from_file(tmp_path / "a.toml")
    assert recipe.freeze == FreezeRule(0.2, "time", 0.5, 0.9) and Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict({"epochs": 3}).freeze is None
    for table, said in (
        ({"epochs": 1, "freeze": {"share": 0.2}}, "nothing would freeze: from 0.4 to 0.9 of 1 epochs"),
        ({"epochs": 9, "freeze": 0.2}, r"freeze must be a table, for example \[freeze\] with share = 0.2"),
        ({"epochs": 9, "freeze": {"shard": 0.2}}, "unknown key 'shard'; did you mean 'share'"),
        ({"epochs": 9, "freeze": {}}, "the key 'share' is missing"),
        ({"epochs": 9, "method": "gradual", "freeze": {"share": 0.2}}, "'gradual' prunes all layers by and by"),
        ({"epochs": 9, "warmup_epochs": 8, "freeze": {"share": 0.2}}, "after the warm-up"),
    ):
        with pytest.raises(UsageError, match=said):
            Recipe.from_dict(table)
    with pytest.raises(UsageError, match="freeze must be a FreezeRule or None"):
        Recipe(9, freeze=0.2)


def test_parts_freeze_where_masks_mutate_or_as_often():
    def epochs(method, **settings):
        return Recipe(20, method, 0.1, freeze=FreezeRule(0.2), **settings).resolved(0.9).freezing_epochs()

    assert epochs("em_s", mutate_every=3) == [9, 11, 12, 15, 18]  # phases begin at 11 and 15
    assert epochs("static", mutate_every=4) == [8, 12, 16] and epochs("static") == list(range(8, 19))
    assert epochs("set", mutate_every=3, warmup_epochs=12) == [15, 18]
    with pytest.raises(UsageError, match="of 20 epochs masks never mutate, with mutate_every 19; lower it"):
        epochs("set", mutate_every=19)
    assert not Recipe(20, "static", mutate_every=4, freeze=FreezeRule(0.2)).idle()


def test_a_rate_ends_where_its_part_freezes():
    for name in ("cosine", "step", "constant"):
        recipe, whole = (
            Recipe(10, lr=0.1, lr_schedule=name, lr_final=0.001),
            Recipe(5, lr=0.1, lr_schedule=name, lr_final=0.001),
        )
        rates = [recipe.lr_at(epoch, place, 4, until=5) for epoch in range(5) for place in range(4)]
        assert rates == [whole.lr_at(epoch, place, 4) for epoch in range(5) for place in range(4)]
        assert recipe.lr_at(7, 1, 4, until=5) == recipe.lr_at(5, 0, 4, until=5) == whole.lr_at(5, 0, 4)
    recipe = Recipe(10, lr=0.1, warmup_epochs=2)
    assert recipe.lr_at(1, 0, 2, until=6) == recipe.lr_at(1, 0, 2)
    assert recipe.lr_at(4, 0, 2, until=6) == pytest.approx(0.05, rel=1e-6)


RECIPE = Recipe(
    6,
    "em_s",
    0.05,
    mutate_every=1,
    freeze=FreezeRule(0.25, begin=0.3),
    sieve=SieveRule(drop=0.2, after_epoch=2, every=2),
    drop_last=True,
)


def perceptron(**options):
    model = build_model("mlp", SHAPE, 10, 32, 0)
    chosen = {"scheme": "unstructured", "sparsity": 0.8, "dense_layers": ["fc3"], "threads": 1, "grow_to": 0.75}
    return mest.compile(model, SHAPE, **chosen | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    step = perceptron()
    return folder, step, Trainer(step, RECIPE, folder).fit(TRAIN, TEST)


def test_a_run_freezes_front_to_back_and_ends_at_its_sparsity(whole):
    folder, step, run = whole
    told = [metrics["freeze"] for metrics in run.history]
    assert [one["now"] for one in told if one["now"]] == [["fc1"], ["fc2"]]
    assert [one["parts"] for one in told] == sorted(one["parts"] for one in told) and told[-1]["parts"] == 2
    spent = [metrics["iterations"] * (1 - metrics["freeze"]["saved"]) for metrics in run.history]
    saved = 1 - sum(spent) / sum(metrics["iterations"] for metrics in run.history)
    assert 0.22 < saved < 0.4  # a net of three layers has a coarse grain; an epoch has 12 or 10 steps
    assert step.describe()["trainable"] == ["fc3.weight", "fc3.bias"]
    last = run.history[-1]
    assert last["freeze"]["weights"] == pytest.approx(1 - 330 / 3466)
    # Layers that froze while others were denser are as sparse as they were to be.
    assert {name: round(share, 2) for name, share in last["sparsity"].items()} == {"fc1.weight": 0.8, "fc2.weight": 0.8}
    # They are so from the mutation before, and train an epoch at the masks that they keep; the others are denser.
    shares = [[round(share, 2) for share in metrics["sparsity"].values()] for metrics in run.history]
    assert told[2]["now"] == ["fc1"] and told[3]["now"] == ["fc2"]
    assert shares[:3] == [[0.8, 0.8], [0.8, 0.75], [0.8, 0.8]]
    memory = [metrics["memory_bytes"]["total"] for metrics in run.history]
    assert memory[-1] < 0.8 * memory[1]
    assert [metrics["sieve"] is not None for metrics in run.history] == [False, False, True, False, True, False]
    facts = write_report(folder)
    assert facts["freeze"]["saved_overall"] == pytest.approx(saved) and facts["freeze"]["parts"] == 2
    page = (folder / "report" / "report.html").read_text()
    assert "2 parts, 90.5% of the parameters" in page and (folder / "report" / "freeze.svg").is_file()


@pytest.mark.parametrize("epoch", [1, 3, 4, 6])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(whole, tmp_path, epoch):
    """In the epoch before the first freeze, of each of the two, and after the last."""
    step = perceptron()
    with pytest.raises(KeyboardInterrupt):
        Trainer(step, RECIPE, tmp_path / "run", Interrupter(epoch, 5, interrupt)).fit(TRAIN, TEST)
    given = step if epoch % 2 else None  # a step that has frozen more than the checkpoint, or one out of it
    Trainer.resume(tmp_path / "run", given).fit(TRAIN, TEST)
    assert_same(outcome(tmp_path / "run"), outcome(whole[0]))


def test_a_fresh_step_takes_a_run_that_has_frozen(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Trainer(perceptron(), RECIPE, tmp_path / "run", Interrupter(6, 2, interrupt)).fit(TRAIN, TEST)
    Trainer.resume(tmp_path / "run", perceptron()).fit(TRAIN, TEST)
    assert_same(outcome(tmp_path / "run"), outcome(whole[0]))


def test_a_finished_run_goes_on_for_longer_with_what_has_frozen(whole, tmp_path):
    import shutil

    shutil.copytree(whole[0], tmp_path / "run")
    trainer = Trainer.resume(tmp_path / "run", epochs=8, batch=8)
    run = trainer.fit(TRAIN, TEST)
    assert [metrics["freeze"]["parts"] for metrics in run.history] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert trainer.step.describe()["trainable"] == ["fc3.weight", "fc3.bias"] and trainer.step.batch == 8


def test_a_share_of_the_time_is_measured_when_the_run_begins():
    recipe = replace(RECIPE, sieve=None, epochs=4, freeze=FreezeRule(0.1, "time", begin=0.25))
    trainer = Trainer(perceptron(), recipe)
    assert not trainer._freezer.freezes
    run = trainer.fit(TRAIN, TEST)
    assert run.history[-1]["freeze"]["parts"] and trainer._freezer.of == "time"
    assert "of time shorter in the end" in trainer._freezer.about()[0]


def test_static_masks_stay_and_dense_models_freeze():
    step = perceptron(scheme="dense", sparsity=0.0, dense_layers=None, grow_to=None)
    run = Trainer(step, Recipe(4, "static", 0.05, freeze=FreezeRule(0.2))).fit(TRAIN, TEST)
    assert run.history[-1]["freeze"]["parts"] and step.describe()["frozen"]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    step = perceptron()
    with pytest.raises(UsageError, match=r"share is 0.8, but all that may freeze, 2 parts, saves 0\.\d+ of the run"):
        Trainer(step, replace(RECIPE, freeze=FreezeRule(0.8)), tmp_path / "run")
    with pytest.raises(UsageError, match="fc3 is the only part of the model that trains; leave freeze out"):
        Trainer(perceptron(trainable="fc3.*"), replace(RECIPE, method="static"), tmp_path / "run")
    step.export(tmp_path / "artifact")
    with pytest.raises(UsageError, match="this step has no compiler to freeze with"):
        Trainer(mest.open_artifact(tmp_path / "artifact"), RECIPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_freezer_comes_back_out_of_its_document(whole):
    document = json.loads((whole[0] / "metrics.jsonl").read_text().splitlines()[0])
    assert document["freeze"] == {"now": [], "parts": 0, "saved": 0.0, "weights": 0.0, "seconds": 0.0}
    freezer = Freezer.of_run(RECIPE.resolved(0.8), perceptron())
    again = Freezer.from_json(json.loads(json.dumps(freezer.to_json())))
    assert json.dumps(again.to_json()) == json.dumps(freezer.to_json()) and again.about() == freezer.about()
    assert Freezer.from_json(None) is None and not Freezer()
    with pytest.raises(MestError):
        Freezer.of_run(replace(RECIPE, freeze=FreezeRule(0.9)).resolved(0.8), perceptron())


def test_the_command_line_freezes_and_plans_it(mest_compile_command, tmp_path):
    shared = ["--model", "mlp", "--width", 32, "--sparsity", 0.5, "--epochs", 4, "--json"]
    ran = mest_compile_command("train", *shared, "--freeze", 0.2, "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    epochs = ran.document["epochs"]
    assert ran.document["recipe"]["freeze"] == {"share": 0.2, "of": "flops", "begin": 0.4, "end": 0.9}
    assert epochs[-1]["freeze"]["parts"] and "froze fc1" in ran.err and "parts freeze, after epoch" in ran.err
    ran = mest_compile_command("train", *shared, "--freeze", 0.9, "--out", tmp_path / "b")
    assert ran.code == 2 and "lower share, or let it begin earlier" in ran.err and not (tmp_path / "b").exists()
    (tmp_path / "a.toml").write_text('epochs = 8\nmethod = "em_s"\n[freeze]\nshare = 0.2\n')
    ran = mest_compile_command("plan", "--model", "mlp", "--batch", 16, "--recipe", tmp_path / "a.toml", "--json")
    assert ran.code == 0, ran.err
    told = ran.document["freezing"]
    assert told[0]["parts"] == [] and [name for one in told for name in one["parts"]] == ["fc1", "fc2"]
    assert [one["memory_bytes"] for one in told] == sorted((one["memory_bytes"] for one in told), reverse=True)
    assert list(ran.document["bytes_by_microbatch"]) == ["16", "8", "4", "2", "1"]
    (tmp_path / "a.toml").write_text("epochs = 8\n")
    ran = mest_compile_command("plan", "--model", "mlp", "--recipe", tmp_path / "a.toml")
    assert ran.code == 2 and "the recipe has no table [freeze]" in ran.err


BUDGET = Recipe(4, "em_s", 0.05, mutate_every=1, budget_at_mutations="24KiB", drop_last=True)


def test_what_trains_within_a_budget_is_chosen_again_at_mutations(tmp_path, monkeypatch):
    """By the weights and masks of then; a run that is stopped goes on with the same choice, bit for bit."""
    step = perceptron(scheme="block:4x1")
    full = step.memory()["total"]
    chosen, budget = [], full - 2000
    recipe = replace(BUDGET, budget_at_mutations=budget)
    importances = budgeting.importances

    def spied(step, units, batches, importance):
        """As they are, but that each layer in turn matters most."""
        found = importances(step, units, batches, importance)
        chosen.append({name: mask.mean() for name, mask in step.masks().items()})
        return found | {units[len(chosen) % 2].name: 1e9}

    monkeypatch.setattr(budgeting, "importances", spied)
    run = Trainer(step, recipe, tmp_path / "whole").fit(TRAIN, TEST)
    told = [metrics["budget"] for metrics in run.history]
    assert [one["since"] for one in told] == [1, 2, 3, 4] and {one["of"] for one in told} == {3}
    assert all(("fc2" in one["layers"]) != ("fc1" in one["layers"]) for one in told), told
    assert ["fc2" in one["layers"] for one in told] == [True, False, True, False]
    assert all(metrics["memory_bytes"]["total"] <= budget < full for metrics in run.history)
    # What stops training is pruned to the target, however dense it was.
    assert {name: round(share, 2) for name, share in step.sparsity().items()} == {"fc1.weight": 0.8, "fc2.weight": 0.8}
    assert run.history[1]["sparsity"]["fc1.weight"] == 0.75 and run.history[2]["sparsity"]["fc1.weight"] > 0.79
    chosen.clear()
    with pytest.raises(KeyboardInterrupt):
        Trainer(perceptron(scheme="block:4x1"), recipe, tmp_path / "run", Interrupter(3, 5, interrupt)).fit(TRAIN, TEST)
    Trainer.resume(tmp_path / "run").fit(TRAIN, TEST)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_choosing_again_is_refused_where_it_cannot_be(tmp_path, mest_compile_command):
    for settings, said in (
        ({"method": "static"}, "'static' never mutates; use method 'em_s', or update_budget, which chooses once"),
        ({"method": "gradual"}, "'gradual' prunes all layers by and by"),
        ({"freeze": FreezeRule(0.2)}, "what freezes stays frozen; leave one of the two out"),
        ({"budget_at_mutations": 1.5}, "budget_at_mutations is 1.5; wanted a share"),
    ):
        with pytest.raises(UsageError, match=said):
            replace(BUDGET, **settings)
    assert Recipe.from_dict(json.loads(json.dumps(BUDGET.to_dict()))) == BUDGET
    step = perceptron()
    step.export(tmp_path / "artifact")
    with pytest.raises(UsageError, match="no compiler to freeze with"):
        Trainer(mest.open_artifact(tmp_path / "artifact"), BUDGET)
    with pytest.raises(UsageError, match=r"fc9\.weight is not among what the step was compiled to train"):
        step.train_only(["fc9.weight"])
    (tmp_path / "a.toml").write_text('epochs = 4\nmethod = "em_s"\nbudget_at_mutations = "1MiB"\n')
    command = ["--model", "mlp", "--width", 16, "--batch", 16, "--recipe", tmp_path / "a.toml"]
    ran = mest_compile_command("build", *command, "--out", tmp_path / "b", "--image", "1x8x8")
    assert ran.code == 2 and "an artifact has no compiler" in ran.err
    ran = mest_compile_command("plan", *command, "--data", "digits", "--json")
    assert ran.code == 0 and ran.document["update_budget"]["budget"] == 2**20 and ran.document["freezing"] == []
    with pytest.raises(UsageError, match="compiled with an update_budget, and the recipe has budget_at_mutations"):
        Trainer(perceptron(data=TRAIN, update_budget=10**6), BUDGET)
