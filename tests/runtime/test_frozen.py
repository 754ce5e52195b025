"""Steps of which parts stay as they are, against torch that trains the same: what moves, by how much, and nothing
else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_schemes_step import Small
from test_step import make_batches, relative
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import SparsityError, SpecError, StateError, UsageError
from mest_compile.training.recipe import Recipe

SHAPE, RATE = (8, 3, 8, 8), 0.01
OPTIMIZER = mest.SGD(lr=RATE, momentum=0.9, weight_decay=1e-3)
BATCHES = make_batches(SHAPE, 10, 10)


def freeze(model, *paths):
    for name, parameter in model.named_parameters():
        if name.startswith(paths):
            parameter.requires_grad_(False)


def every_kind(model):
    """What ends its convolution without a gradient, with one, and behind a sum; what trains in part in either mode;
    gradients through frozen layers of all kinds."""
    freeze(model, "conv1", "bn1", "bn2", "conv3", "bn3.weight", "bn4", "shortcut", "bn5.bias", "fc.weight")
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.eval()


def front(model):
    freeze(model, "conv1", "bn1", "conv2", "bn2")
    model.bn1.eval(), model.bn2.eval()


def norms_in_eval(model):
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def biases(model):
    freeze(model, *(name for name, _ in model.named_parameters() if not name.endswith("bias")))
    norms_in_eval(model)


def head(model):
    freeze(model, "conv", "bn", "shortcut")


class Cut(Small):
    """Its first block sends no gradient back, its shortcut's input none either."""

    def forward(self, x):
        with torch.no_grad():
            x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + x).relu()
        y = self.bn3(self.conv3(x)).relu()
        x = (self.bn4(self.conv4(y)) + self.bn5(self.shortcut(x.detach()))).relu()
        return self.fc(x.mean((2, 3)))


class Hard(Small):
    """An activation whose slope its result does not tell."""

    def forward(self, x):
        x = F.hardswish(self.bn1(self.conv1(x)))
        x = F.hardswish(self.bn3(self.conv3(F.hardswish(self.bn2(self.conv2(x))))))
        return self.fc(F.hardswish(self.bn4(self.conv4(x))).mean((2, 3)))


def made(prepare, kind=Small):
    torch.manual_seed(3)
    model = kind(8).train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(0.5, 1.5), part.bias.data.normal_()
    prepare(model)
    return model


def compiled(model, scheme, **options):
    share = {"sparsity": 0.0} if scheme == "dense" else {"sparsity": 0.75}
    dense = None if scheme in ("pattern", "dense") else ["conv1", "fc"]
    chosen = {"scheme": scheme, **share, "dense_layers": dense, "optimizer": OPTIMIZER, "threads": 1}
    return mest.compile(model, SHAPE, **chosen | options)


def torch_steps(model, masks, count=10):
    """Losses of dense torch, weights and gradients masked, of whatever `model` trains."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name] *= torch.from_numpy(mask)
    rule = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-3)
    for images, labels in BATCHES[:count]:
        rule.zero_grad()
        loss = F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels))
        loss.backward()
        for name, mask in masks.items():
            if parameters[name].grad is not None:
                parameters[name].grad *= torch.from_numpy(mask)
        rule.step()
        yield loss.item()


def check(step, model, prepared):
    """Ten steps; then everything that is frozen as it was, and all else as torch has it."""
    before, facts = step.state_dict(), step.describe()
    wanted = list(torch_steps(model, step.masks()))
    gradients = step.gradients(*BATCHES[0])
    assert sorted(gradients) == sorted(facts["trainable"])
    assert all(np.array_equal(before[name], array) for name, array in step.state_dict().items())
    np.testing.assert_allclose([step(*batch).loss for batch in BATCHES], wanted, rtol=1e-4)
    after, there = step.state_dict(), model.state_dict()
    norms = {name: part for name, part in prepared.named_modules() if isinstance(part, nn.BatchNorm2d)}
    evaluating = [name for name, part in norms.items() if not part.training]
    statistics = "running_mean", "running_var", "num_batches_tracked"
    kept = {*facts["frozen"], *(f"{name}.{part}" for name in evaluating for part in statistics)}
    for name, array in after.items():
        if name in kept:
            assert np.array_equal(array, before[name]), name
        else:
            assert not np.array_equal(array, before[name]), name
        assert relative(array, there[name].numpy()) < 1e-4, name
    model.eval()
    with torch.no_grad():
        wanted = model(torch.from_numpy(BATCHES[0][0])).numpy()
    assert relative(step.predict(BATCHES[0][0]), wanted) < 1e-4


@pytest.mark.parametrize("prepare", [front, norms_in_eval, biases, head, every_kind])
def test_ten_steps_train_what_torch_trains(prepare):
    model = made(prepare)
    check(compiled(model, "block:1x4"), model, made(prepare))


@pytest.mark.parametrize("scheme", ["unstructured", "pattern", "filter", "channel", "dense"])
def test_ten_steps_of_every_scheme(scheme):
    model = made(every_kind)
    step = compiled(model, scheme)
    check(step, model, made(every_kind))
    kernels = {call.kernel for call in step.program.calls}
    assert {"frozen_norm.scaling", "frozen_norm.backward", "values.part", "batch_norm.backward"} <= kernels


@pytest.mark.parametrize("kind", [Cut, Hard])
def test_gradients_that_forward_cuts_and_slopes_that_need_the_input(kind):
    prepare = norms_in_eval if kind is Hard else (lambda model: None)
    model = made(prepare, kind)
    unused = ("shortcut", "bn5") if kind is Hard else ()
    step = compiled(model, "block:1x4")
    before = step.state_dict()
    wanted = list(torch_steps(model, step.masks()))
    np.testing.assert_allclose([step(*batch).loss for batch in BATCHES], wanted, rtol=1e-4)
    for name, array in step.state_dict().items():
        assert relative(array, model.state_dict()[name].numpy()) < 1e-4, name
        if kind is Cut and name in ("conv1.weight", "bn1.weight"):
            assert np.array_equal(array, before[name])
        if name.startswith(unused):
            assert np.array_equal(array, before[name])
    if kind is Cut:
        assert {"conv1.weight", "bn1.weight", "bn1.bias"} == step.describe()["frozen"].keys()


def test_patterns_train_what_flags_would_have_trained():
    """The norms of what stays as it is are in evaluation mode."""
    trained = "conv[34].*,bn[345].*,shortcut.*,fc.*"
    by_pattern = compiled(made(lambda model: None), "block:1x4", trainable=trained)
    by_flag = compiled(made(front), "block:1x4")
    for batch in BATCHES[:3]:
        assert by_pattern(*batch).loss == by_flag(*batch).loss
    assert [call.name for call in by_pattern.program.calls] == [call.name for call in by_flag.program.calls]


def test_what_is_frozen_costs_nothing():
    full, part = (compiled(made(prepare), "block:1x4") for prepare in (lambda model: None, front))
    calls = {name: [call for call in part.program.calls if call.layer == name] for name in part.layers}
    for name in ("conv1.weight", "conv2.weight"):
        assert [call.phase for call in calls[name]] == ["forward"]
    assert {call.phase for call in calls["conv3.weight"]} == {"forward", "grad_weight", ""}  # no input gradient
    held = {buffer.name for buffer in part.program.held() if buffer.layer in ("conv1.weight", "conv2.weight")}
    assert {name.partition(":")[2] for name in held} == {"", "pointers", "offsets"}
    whole, less = full.memory(), part.memory()
    for kind in ("activations", "gradients", "optimizer", "indices", "total"):
        assert less[kind] < whole[kind], kind
    assert less["values"] == whole["values"]  # the weights, and the array that all layers turn theirs in
    live = full.live_weights()
    spared = sum(4 * live[f"conv{number}.weight"] for number in (1, 2)) + 4 * 2 * 8 * 2
    assert whole["optimizer"] - less["optimizer"] == whole["gradients"] - less["gradients"] == spared


def test_a_gradient_passes_through_a_frozen_layer_with_transposed_values_alone():
    step = compiled(made(lambda model: freeze(model, "conv3", "conv4")), "block:1x4")
    held = {buffer.name.partition(":")[2] for buffer in step.program.held() if buffer.layer == "conv3.weight"}
    assert held == {"", "pointers", "offsets", "transposed", "transposed_pointers", "transposed_offsets"}


def test_mutations_leave_frozen_masks_alone_unless_they_are_set():
    step = compiled(made(front), "block:1x4")
    before = step.masks()
    report = step.mutate(prune_to=0.85, grow_to=0.65, rng=np.random.default_rng(1))
    after = step.masks()
    assert np.array_equal(before["conv2.weight"], after["conv2.weight"])
    assert report.layers["conv2.weight"] == "unchanged"
    assert after["conv4.weight"].mean() > before["conv4.weight"].mean()
    keep = np.zeros_like(before["conv2.weight"])
    keep[:, :4] = before["conv2.weight"][:, :4]
    step.set_masks({"conv2.weight": keep})
    assert np.array_equal(step.masks()["conv2.weight"], keep)
    assert np.array_equal(step.state_dict()["conv2.weight"] != 0, keep)
    assert np.isfinite(step(*BATCHES[0]).loss)


def test_clipping_counts_what_trains():
    model = made(front)
    step = compiled(model, "dense")
    norm = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in step.gradients(*BATCHES[0]).values()))
    loss = F.cross_entropy(model(torch.from_numpy(BATCHES[0][0])), torch.from_numpy(BATCHES[0][1]))
    loss.backward()
    rule = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-3)
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), norm / 3).item() == pytest.approx(norm, rel=1e-4)
    rule.step()
    step(*BATCHES[0], clip_norm=norm / 3)
    for name, array in step.state_dict().items():
        assert relative(array, model.state_dict()[name].numpy()) < 1e-4, name


def only_some(trained):
    return torch.optim.AdamW(trained, lr=RATE, weight_decay=0.5)


def test_an_optimizer_of_torch_may_leave_out_what_is_frozen_and_nothing_else():
    model = made(front)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = compiled(model, "dense", optimizer=only_some(trained))
    assert step.optimizer == mest.AdamW(RATE, weight_decay=0.5)
    model = made(lambda model: None)
    patterns = {"trainable": "fc.*,conv4.*,bn4.*"}
    some = [parameter for name, parameter in model.named_parameters() if name.startswith(("fc", "conv4", "bn4"))]
    assert set(compiled(model, "dense", optimizer=only_some(some), **patterns).gradients(*BATCHES[0])) == {
        name for name, _ in model.named_parameters() if name.startswith(("fc", "conv4", "bn4"))
    }
    with pytest.raises(UsageError, match="AdamW leaves fc.weight as it is, and 1 more; a step updates all that trains"):
        compiled(model, "dense", optimizer=only_some(some[:-2]), **patterns)


def test_groups_are_of_parameters_that_train():
    with pytest.raises(SpecError, match=r"no parameter that trains is called \*1.\*, as a group of SGD has it"):
        compiled(made(front), "dense", optimizer=mest.SGD(lr=RATE, groups=[mest.Group("*1.*", 3.0)]))
    model = made(biases)
    step = compiled(model, "dense", optimizer=mest.SGD(lr=RATE, groups=[mest.Group("bn4.bias", 0.0)]))
    before = step.state_dict()
    step(*BATCHES[0])
    moved = {name for name, array in step.state_dict().items() if not np.array_equal(array, before[name])}
    assert moved == {name for name, part in model.named_parameters() if part.requires_grad} - {"bn4.bias"}


def test_an_onnx_file_has_what_is_frozen_as_prediction_computes_it(tmp_path):
    import onnxruntime

    model = made(every_kind, Cut)
    step = compiled(model, "block:1x4")
    step(*BATCHES[0])
    mest.to_onnx(step, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": BATCHES[1][0]})
    assert relative(found, step.predict(BATCHES[1][0])) < 1e-5


def test_checkpoints_and_artifacts_go_on_with_what_is_frozen(tmp_path):
    step = compiled(made(every_kind), "filter")
    step(*BATCHES[0])
    step.save(tmp_path / "a.safetensors")
    step.export(tmp_path / "artifact")
    others = mest.load(tmp_path / "a.safetensors"), mest.open_artifact(tmp_path / "artifact")
    started = step.state_dict()
    for other in others:
        assert all(np.array_equal(started[name], array) for name, array in other.state_dict().items())
    losses = [step(*batch).loss for batch in BATCHES[1:4]]
    for other in others:
        assert [other(*batch).loss for batch in BATCHES[1:4]] == losses
        assert other.describe()["frozen"] == step.describe()["frozen"]
        for name, array in other.state_dict().items():
            assert np.array_equal(array, step.state_dict()[name])
    with pytest.raises(StateError, match="of a step that trains other parameters"):
        compiled(made(lambda model: None), "filter").restore(tmp_path / "a.safetensors")


def test_the_module_gets_its_frozen_parts_back_bit_for_bit():
    model = made(front)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = compiled(model, "dense")
    step(*BATCHES[0])
    mest.to_torch(step, model)
    for name, value in model.state_dict().items():
        stays = name.startswith(("conv1", "conv2", "bn1", "bn2"))
        assert torch.equal(value, before[name]) == stays, name


def test_a_method_that_would_mutate_nothing_is_refused():
    step = compiled(made(head), "block:1x4")
    with pytest.raises(SparsityError, match="every sparse layer is frozen"):
        mest.Trainer(step, Recipe(epochs=2, method="em"))


def test_recipe_and_command_line_say_what_trains(mest_compile_command, tmp_path):
    (tmp_path / "recipe.toml").write_text('epochs = 1\nmethod = "static"\n[run]\ntrainable = "fc3.*"\n')
    shared = ["--model", "mlp", "--width", 16, "--recipe", tmp_path / "recipe.toml", "--sparsity", 0.5, "--json"]
    ran = mest_compile_command("train", *shared, "--out", tmp_path / "a")
    assert ran.code == 0, ran.err
    step = mest.load(tmp_path / "a" / "checkpoint.safetensors")
    assert step.describe()["trainable"] == ["fc3.weight", "fc3.bias"]
    ran = mest_compile_command("train", *shared, "--trainable", "*.bias", "--out", tmp_path / "b")
    assert ran.code == 0, ran.err
    ran = mest_compile_command("train", *shared, "--trainable", "fc9.*", "--out", tmp_path / "c")
    assert ran.code != 0 and "no parameter matches 'fc9.*'" in ran.err and not (tmp_path / "c").exists()


def test_plan_says_what_trains_and_what_memory_that_needs(mest_compile_command):
    options = ["--model", "resnet20", "--width", 4, "--batch", 8, "--scheme", "block"]
    full = mest_compile_command("plan", *options, "--json").document
    part = mest_compile_command("plan", *options, "--trainable", "last:2", "--json").document
    assert part["trainable"][0] == "layer3.1.conv1.weight" and part["frozen"]["conv1.weight"] == "not in trainable"
    for kind in ("activations", "gradients", "optimizer"):
        assert part["memory"][kind] < full["memory"][kind]
    said = mest_compile_command("plan", *options, "--trainable", "last:2").out
    assert "14 of 65 parameters train: layer3.1.*, layer3.2.*, fc.*" in said
