"""Recipes: the paper's schedule, learning rates, files, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mest_compile as mest
from mest_compile.base.errors import MestError, SparsityError, UnknownName, UsageError
from mest_compile.options import StepOptions
from mest_compile.sparsity.mutation import Phase
from mest_compile.training.methods import METHODS
from mest_compile.training.recipe import Recipe
from mest_compile.training.sieve import SieveRule


def preset(method, sparsity, epochs, lr=0.1, **settings):
    """A method's recipe, resolved."""
    return Recipe(epochs, method, lr, **settings).resolved(sparsity)


@pytest.mark.parametrize(
    ("method", "sparsity", "table"),
    [
        ("em", 0.90, [(0.92, 0.90), (0.91, 0.90), (0.90, 0.90)]),
        ("em", 0.95, [(0.96, 0.95), (0.955, 0.95), (0.95, 0.95)]),
        ("em_s", 0.90, [(0.90, 0.85), (0.90, 0.875), (0.90, 0.90)]),
        ("em_s", 0.95, [(0.95, 0.90), (0.95, 0.925), (0.95, 0.95)]),
    ],
)
def test_preset_gives_the_papers_table(method, sparsity, table):
    recipe = preset(method, sparsity, 160)
    assert recipe.mutate_every == 5
    assert [(phase.prune_to, phase.grow_to) for phase in recipe.phases] == table
    assert [phase.until_epoch for phase in recipe.phases] == [90, 120, 160]


@pytest.mark.parametrize("method", ["em", "em_s"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 7, 10, 32, 200])
def test_preset_of_any_length_ends_at_its_target(method, epochs):
    recipe = preset(method, 0.9, epochs)
    last = [phase for epoch in range(epochs) if (phase := recipe.mutation_at(epoch))][-1:]
    assert recipe.phases[-1] == Phase(epochs, 0.9, 0.9)
    assert last in ([], [recipe.phases[-1]])
    assert last or epochs == 1
    assert recipe.meets_target(epochs - 1)


def test_set_replaces_the_same_share_and_rigl_less_and_less_until_three_quarters():
    recipe = preset("set", 0.9, 160)
    assert recipe.phases == (Phase(160, 0.93, 0.9),) and recipe.mutate_every == 5
    recipe = preset("rigl", 0.9, 160)
    mutations = {epoch: phase for epoch in range(160) if (phase := recipe.mutation_at(epoch))}
    assert list(mutations) == list(range(5, 160, 5)) and all(phase.grow_to == 0.9 for phase in mutations.values())
    assert mutations[60].prune_to == pytest.approx(0.9 + 0.1 * 0.15, abs=1e-6)  # half way to epoch 120 half of 30%
    dropped = [phase.prune_to for phase in mutations.values()]
    assert dropped == sorted(dropped, reverse=True) and mutations[115].prune_to > 0.9
    assert all(phase.prune_to == 0.9 for epoch, phase in mutations.items() if epoch >= 120)
    assert preset("rigl", 0.9, 1).phases == (Phase(1, 0.93, 0.9),)


def test_the_sieve_of_a_recipe_file_drops_when_the_paper_does(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("epochs = 160\nlabel_smoothing = 0.1\nclip_norm = 2\n[sieve]\ndrop = 0.24\n")
    recipe = Recipe.from_file(file)
    assert recipe.sieve == SieveRule(drop=0.24) and Recipe.from_dict(recipe.to_dict()) == recipe
    assert [epoch for epoch in range(160) if recipe.sieve.due(epoch, 160)] == [70]


def test_mutations_come_at_their_interval_and_where_a_phase_begins():
    recipe = Recipe(10, "em", mutate_every=3, phases=(Phase(5, 0.92, 0.9), Phase(10, 0.9, 0.9))).resolved(0.9)
    assert [epoch for epoch in range(10) if recipe.mutation_at(epoch)] == [3, 5, 6, 9]
    assert recipe.mutation_at(3) == recipe.phases[0] and recipe.mutation_at(5) == recipe.phases[1]
    assert [preset("static", 0.9, 10).mutation_at(epoch) for epoch in range(10)] == [None] * 10


def test_a_model_denser_than_its_target_does_not_meet_it():
    recipe = Recipe(6, "em_s", mutate_every=2, phases=(Phase(4, 0.9, 0.85), Phase(6, 0.9, 0.9))).resolved(0.9)
    assert [recipe.meets_target(epoch) for epoch in range(6)] == [True, True, False, False, True, True]
    assert all(preset("em", 0.9, 20).meets_target(epoch) for epoch in range(20))


def test_cosine_runs_from_lr_to_lr_final_by_iteration():
    recipe = Recipe(10, "static", lr=0.2, lr_final=0.002)
    assert recipe.lr_at(0, 0, 50) == 0.2
    assert recipe.lr_at(5, 0, 50) == pytest.approx(0.101)
    rates = [recipe.lr_at(epoch, iteration, 50) for epoch in range(10) for iteration in range(50)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 500
    assert rates[-1] == pytest.approx(0.002 + 0.198 * 0.5 * (1 + math.cos(math.pi * 499 / 500)))


def test_warm_up_rises_to_lr_and_the_schedule_covers_the_rest():
    recipe = Recipe(10, "static", lr=0.1, warmup_epochs=2)
    assert recipe.lr_at(0, 0, 4) == pytest.approx(0.1 / 8)
    assert recipe.lr_at(1, 3, 4) == pytest.approx(0.1)
    assert recipe.lr_at(2, 0, 4) == pytest.approx(0.1)
    assert recipe.lr_at(6, 0, 4) == pytest.approx(0.05, rel=1e-5)


def test_step_and_constant_rates():
    step = Recipe(8, "static", lr=1.0, lr_schedule="step")
    assert [step.lr_at(epoch, 0, 1) for epoch in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    constant = Recipe(8, "static", lr=0.3, lr_schedule="constant")
    assert {constant.lr_at(epoch, 0, 1) for epoch in range(8)} == {0.3}


def test_a_recipe_survives_its_dict_and_a_toml_file(tmp_path):
    recipe = preset("em_s", 0.9, 20, lr=0.05, seed=3)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "recipe.toml"
    path.write_text(
        'epochs = 4\nmethod = "em"\nlr = 1\n[[phases]]\nuntil_epoch = 2\nprune_to = 0.92\ngrow_to = 0.9\n'
        "[[phases]]\nuntil_epoch = 4\nprune_to = 0.9\ngrow_to = 0.9\n"
    )
    assert Recipe.from_file(path) == Recipe(4, "em", lr=1, phases=(Phase(2, 0.92, 0.9), Phase(4, 0.9, 0.9)))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("epochs = 4\nmethdo = 'em'", UsageError, "did you mean 'method'"),
        ("epochs = 4\nzzz = 1", UsageError, "unknown key 'zzz'; did you mean"),
        ("method = 'em'", UsageError, "'epochs' is missing"),
        ("epochs = '4'", UsageError, "recipe.toml: epochs is '4'; wanted a whole number of 1 or more"),
        ("epochs = 4\nlr = 'high'", UsageError, "recipe.toml: lr is 'high'; wanted a finite number"),
        ("epochs = 4\nphases = 3", UsageError, "phases must be a list"),
        ("epochs = 4\n[[phases]]\nuntil = 4", UsageError, "did you mean 'until_epoch'"),
        (
            "epochs = 4\n[[phases]]\nuntil_epoch = 4\nprune_to = '0.9'\ngrow_to = 0.9",
            UsageError,
            "prune_to is '0.9'; wanted a finite number",
        ),
        ("epochs = 4\nsieve = 0.2", UsageError, "sieve must be a table"),
        ("epochs = 4\n[sieve]\ndorp = 0.2", UsageError, "'dorp'; did you mean 'drop'"),
        ("epochs = 4\n[sieve]\nafter_epoch = 2", UsageError, "either drop"),
        (
            "epochs = 4\nmomentum = 0.9",
            UsageError,
            r"unknown key 'momentum'; it belongs to the optimizer: mest.SGD\(momentum",
        ),
        ("epochs = 4\nmodel = 'mlp'", UsageError, r"'model'; it belongs into the table \[run\]"),
        ("epochs = ", UsageError, "is not TOML"),
    ],
)
def test_bad_recipe_files_say_what_is_wrong(tmp_path, text, error, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        Recipe.from_file(path)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="none.toml cannot be read"):
        Recipe.from_file(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"epochs": 0}, UsageError),
        ({"epochs": True}, UsageError),
        ({"lr": 0}, UsageError),
        ({"lr": math.nan}, UsageError),
        ({"lr": 0.1, "lr_final": 0.2}, UsageError),
        ({"warmup_epochs": 10}, UsageError),
        ({"mutate_every": 0}, UsageError),
        ({"seed": -1}, UsageError),
        ({"eval_every": 0}, UsageError),
        ({"augment": 1}, UsageError),
        ({"importance_lambda": -1}, UsageError),
        ({"method": "snip"}, UnknownName),
        ({"label_smoothing": 1.0}, UsageError),
        ({"clip_norm": 0}, UsageError),
        ({"sieve": 0.2}, UsageError),
        ({"lr_schedule": "linear"}, UnknownName),
        ({"phases": (Phase(9, 0.9, 0.9),)}, UsageError),
        ({"phases": (Phase(10, 0.9, 0.8), Phase(10, 0.9, 0.9))}, UsageError),
        ({"phases": (Phase(5, 0.9, 0.9), Phase(10, 0.8, 0.8))}, SparsityError),
        ({"phases": ((10, 0.9, 0.9),)}, UsageError),
        ({"mutate_every": 10}, UsageError),
        ({"sieve": SieveRule(drop=0.1, after_epoch=10)}, UsageError),
        ({"sieve": SieveRule(drop=0.1, after_epoch=5, every=5)}, UsageError),
        ({"epochs": 1, "sieve": SieveRule(drop=0.1)}, UsageError),
        ({"augment": False, "mirror": True}, UsageError),
        ({"mirror": 1}, UsageError),
        ({"lr": 1e39}, UsageError),
        ({"epochs": 10**400}, UsageError),
        ({"seed": 10**400}, UsageError),
        ({"method": "static", "phases": (Phase(10, 0.9, 0.9),)}, UsageError),
    ],
)
def test_settings_that_cannot_be_are_refused(change, error):
    with pytest.raises(error):
        replace(Recipe(10, "em"), **change)


def test_mutating_methods_need_a_sparse_step():
    with pytest.raises(SparsityError, match="use method 'static'"):
        preset("em", 0.0, 10)
    with pytest.raises(SparsityError, match="starts sparser"):
        Recipe(10, "em", phases=(Phase(10, 0.8, 0.8),)).resolved(0.9)
    assert preset("static", 0.0, 10).phases == ()


def test_evaluation_always_includes_the_last_epoch():
    recipe = Recipe(7, "static", eval_every=3)
    assert [epoch for epoch in range(7) if recipe.evaluates(epoch)] == [2, 5, 6]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_preset_that_checks_itself(method):
    assert Recipe.from_dict(preset(method, 0.5, 12).to_dict()).method == method


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_can_be_read_and_say_what_they_run_on(path):
    options = Recipe.run_options(path)
    assert {"model", "data", "scheme", "sparsity"} <= set(options)
    recipe = Recipe.from_file(path).resolved(options["sparsity"])
    assert recipe.sieve is not None and recipe.meets_target(recipe.epochs - 1)


def test_the_paper_recipe_is_the_preset_written_out():
    path = RECIPES[0].with_name("cifar10-resnet32.toml")
    wanted = preset("em_s", 0.9, 160, sieve=SieveRule(drop=0.24, after_epoch=70))
    assert Recipe.from_file(path) == wanted
    assert [wanted.sieve.due(epoch, 160) for epoch in (69, 70, 71)] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run = 3", "run must be a table"),
        ("[run]\nmodle = 'mlp'", "unknown key 'modle'; did you mean 'model'"),
        ("[run]\nwidth = 1.5", "width must be a whole number, not 1.5"),
        ("[run]\nsparsity = true", "sparsity must be a number, not True"),
        ("[run]\nmodel = 3", "model must be a string, not 3"),
        ('[run]\ndense_layers = "fc1"', "dense_layers must be a list of names, not 'fc1'"),
    ],
)
def test_a_table_run_that_says_nonsense_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(f"epochs = 1\n{text}")
    with pytest.raises(UsageError, match=message):
        Recipe.run_options(path)


WRONG = [
    [],
    {},
    "",
    "1",
    b"1",
    None,
    1,
    2,
    -1,
    0.5,
    -0.5,
    True,
    math.nan,
    math.inf,
    10**30,
    1j,
    object(),
    [[]],
    [{}],
    [{"until_epoch": []}],
    {"drop": []},
    {"drop": 0.1, "every": "a"},
    [{"until_epoch": 10, "prune_to": [], "grow_to": 0.5}],
]


@pytest.mark.parametrize("key", [*Recipe.__dataclass_fields__, "drop", "forgets_at_most", "after_epoch", "every"])
def test_whatever_stands_under_a_key_is_a_recipe_or_one_line_that_names_the_key(key):
    rule = {"after_epoch": 3} if key in ("drop", "forgets_at_most") else {"after_epoch": 3, "drop": 0.1}
    for value in WRONG:
        given = (
            {"epochs": 10, key: value}
            if key in Recipe.__dataclass_fields__
            else {"epochs": 10, "sieve": rule | {key: value}}
        )
        try:
            recipe = Recipe.from_dict(given, where="a.toml")
        except MestError as error:
            assert str(error).startswith("a.toml") and "\n" not in str(error)
            assert key in str(error) or isinstance(value, (dict, list)) or key in ("drop", "forgets_at_most"), (
                value,
                str(error),
            )
        else:
            assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_numbers_of_numpy_are_numbers():
    recipe = Recipe(
        np.int64(10),
        lr=np.float32(0.5),
        seed=np.uint8(3),
        sieve=SieveRule(drop=np.float64(0.5), after_epoch=np.int32(2)),
        phases=(Phase(np.int64(10), np.float32(0.5), np.float32(0.5)),),
    )
    assert (
        json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
        and recipe.lr == 0.5
        and recipe.sieve.after_epoch == 2
    )


def test_a_recipe_without_a_rate_takes_the_steps():
    assert (
        Recipe(4, "static").resolved(0.9, 1e-4).lr == 1e-4 and Recipe(4, "static", lr=0.5).resolved(0.9, 1e-4).lr == 0.5
    )
    with pytest.raises(UsageError, match="the recipe has no lr"):
        Recipe(4, "static").lr_at(0, 0, 1)
    for given, lr in ((mest.SGD(), 0.5), (mest.SGD(lr=0.2), 0.2)):
        assert Recipe(4, "static", lr=0.5).step_options(StepOptions("2:4", optimizer=given)).optimizer.lr == lr


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(10, "static", mutate_every=2), "mutate_every is 2, but the method 'static' never mutates"),
        (Recipe(10, "static", importance_lambda=0.5), "importance_lambda is 0.5, but"),
        (Recipe(1, "em"), "in 1 epoch it never does"),
        (
            Recipe(10, mutate_every=5, phases=(Phase(4, 0.92, 0.9), Phase(10, 0.9, 0.9))),
            "the phase until epoch 4 never acts",
        ),
    ],
)
def test_what_never_happens_is_said(recipe, said):
    (line,) = recipe.idle()
    assert said in line
    assert (
        not Recipe(10, "static").idle()
        and not Recipe(10, mutate_every=3, phases=(Phase(4, 0.92, 0.9), Phase(10, 0.9, 0.9))).idle()
    )
