"""Steps that freeze while they train: against torch that does the same, bit for bit where nothing changes, and with
what it spares given back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_frozen import BATCHES, OPTIMIZER, RATE, compiled, made
from test_step import relative
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import InputError, SpecError, StateError, UnknownName, UsageError
from mest_compile.runtime import checkpoint
from mest_compile.runtime.state import HeldState

FRONT = ["conv1.*", "bn1.*", "conv2.*", "bn2.*"]
MORE = ["conv3.*", "bn3.*", "conv4.*", "bn4.*", "shortcut.*", "bn5.*"]


def nothing(model):
    pass


def run(step, batches, **settings):
    return [step(*batch, **settings).loss for batch in batches]


def held(step, path):
    """What a step holds, by name."""
    step.save(path)
    arrays, _ = checkpoint.read(path)
    return arrays


def torch_freezes(model, patterns):
    """What users of torch do: no gradient, and BatchNorm in evaluation mode."""
    names = tuple(pattern.removesuffix("*") for pattern in patterns)
    for name, parameter in model.named_parameters():
        if name.startswith(names):
            parameter.requires_grad_(False)
    for name, part in model.named_modules():
        if isinstance(part, nn.BatchNorm2d) and f"{name}.".startswith(names):
            part.eval()


@pytest.mark.parametrize(
    ("scheme", "optimizer"),
    [
        ("block:1x4", OPTIMIZER),
        ("pattern", OPTIMIZER),
        ("channel", mest.AdamW(lr=RATE, eps=1e-4, weight_decay=1e-2)),
    ],
)
def test_training_that_freezes_twice_is_torchs(scheme, optimizer):
    model, kind = made(nothing), type(optimizer).__name__
    step = compiled(model, scheme, optimizer=optimizer)
    masks = {name: torch.from_numpy(mask) for name, mask in step.masks().items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name] *= mask
    settings = {"momentum": 0.9, "weight_decay": 1e-3} if kind == "SGD" else {"eps": 1e-4, "weight_decay": 1e-2}
    rule = getattr(torch.optim, kind)(model.parameters(), lr=RATE, **settings)
    for number, (images, labels) in enumerate(BATCHES):
        for at, patterns in ((3, FRONT), (6, MORE)):
            if number == at:
                torch_freezes(model, patterns)
                step.freeze(patterns)
        rule.zero_grad()
        loss = F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels))
        loss.backward()
        for name, mask in masks.items():
            if parameters[name].grad is not None:
                parameters[name].grad *= mask
        rule.step()
        assert step(images, labels).loss == pytest.approx(loss.item(), rel=1e-3), number
    there = model.state_dict()
    for name, array in step.state_dict().items():
        assert relative(array, there[name].numpy()) < 1e-3, name
    assert step.describe()["trainable"] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("scheme", ["block:1x4", "filter"])
def test_the_same_step_goes_on_with_its_state_and_less_memory(scheme, tmp_path):
    step = compiled(made(nothing), scheme)
    run(step, BATCHES[:3])
    before, memory, masks = held(step, tmp_path / "a"), step.memory(), step.masks()
    state = step.state_dict()
    assert step.freeze(FRONT) is None
    after = held(step, tmp_path / "b")
    gone = {name for name in before.keys() - after.keys() if name.startswith("held/") and "+" not in name}
    front = {f"held/{layer}.weight:{part}" for layer in ("conv1", "conv2") for part in ("gradient", "momentum")}
    assert gone == front
    assert all(np.array_equal(before[name], after[name]) for name in before.keys() & after.keys())
    assert all(np.array_equal(mask, step.masks()[name]) for name, mask in masks.items())
    assert all(np.array_equal(array, step.state_dict()[name]) for name, array in state.items())
    for kind in ("activations", "gradients", "optimizer", "total"):
        assert step.memory()[kind] < memory[kind], kind
    run(step, BATCHES[3:6])
    moved = {name for name, array in step.state_dict().items() if not np.array_equal(array, state[name])}
    assert all(name.startswith(("conv1", "bn1", "conv2", "bn2")) for name in state.keys() - moved)
    assert moved == {name for name in state if not name.startswith(("conv1", "bn1", "conv2", "bn2"))}
    assert "bn1.running_mean" not in moved and "bn5.running_var" in moved
    names = ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"]
    assert step.describe()["frozen"] == dict.fromkeys(names, "frozen while training")
    state, frozen = step.state_dict(), held(step, tmp_path / "c")
    step.train_only([*names, *step.describe()["trainable"]])  # all trains again, what was frozen with state 0
    assert step.memory() == memory and not step.describe()["frozen"]
    assert all(np.array_equal(array, step.state_dict()[name]) for name, array in state.items())
    back = held(step, tmp_path / "d")
    assert all(np.array_equal(array, back[name]) for name, array in frozen.items())
    assert before["held/conv1.weight:momentum"].any() and not back["held/conv1.weight:momentum"].any()
    run(step, BATCHES[:1])
    assert not np.array_equal(step.state_dict()["conv1.weight"], state["conv1.weight"])


def test_a_step_compiled_so_computes_the_same_bits(tmp_path):
    """What freezes later is the step that `trainable` gives."""
    step = compiled(made(nothing), "block:1x4")
    run(step, BATCHES[:2])
    step.freeze(FRONT)
    other = compiled(made(nothing), "block:1x4", trainable=[*MORE, "fc.*"])
    other.set_masks(step.masks())
    other.load_state_dict(step.state_dict())
    step.load_state_dict(step.state_dict())
    assert np.array_equal(step.predict(BATCHES[0][0]), other.predict(BATCHES[0][0]))
    gradients = step.gradients(*BATCHES[0])
    assert all(np.array_equal(gradients[name], array) for name, array in other.gradients(*BATCHES[0]).items())


def test_checkpoints_of_before_and_after_are_taken_by_every_step_of_the_model(tmp_path):
    step = compiled(made(nothing), "block:1x4")
    run(step, BATCHES[:2])
    memory = step.memory()
    step.save(tmp_path / "before")
    step.freeze(FRONT)
    run(step, BATCHES[2:4])
    step.save(tmp_path / "after")
    frozen, wanted = step.memory(), run(step, BATCHES[4:])
    for other in (mest.load(tmp_path / "after"), compiled(made(nothing), "block:1x4")):
        other.restore(tmp_path / "after")
        assert other.memory() == frozen and run(other, BATCHES[4:]) == wanted
    step.restore(tmp_path / "before")
    assert step.memory() == memory and not step.describe()["frozen"]
    run(step, BATCHES[2:3])
    step.freeze(FRONT)
    other = compiled(made(nothing), "filter")
    with pytest.raises(StateError, match="another sparsity scheme"):
        other.restore(tmp_path / "after")


def test_parts_have_rates_of_their_own():
    step = compiled(made(nothing), "block:1x4", optimizer=mest.SGD(lr=RATE, weight_decay=1e-3))
    other = compiled(made(nothing), "block:1x4", optimizer=mest.SGD(lr=RATE, weight_decay=1e-3))
    names, *_ = parts = list(step.freezing_parts().values())
    assert names == ("conv1.weight", "bn1.weight", "bn1.bias") and len(parts) == 6
    step.plan_freezing(parts[:2])
    assert run(step, BATCHES[:2], lr=[RATE] * 3) == run(other, BATCHES[:2], lr=RATE)
    before = step.state_dict()
    step(*BATCHES[2], lr=[0.0, RATE, RATE])
    moved = {name for name, array in step.state_dict().items() if not np.array_equal(array, before[name])}
    assert not moved & set(names) and set(parts[1]) <= moved and set(parts[-1]) <= moved
    with pytest.raises(InputError, match="lr has 2 numbers; wanted one for each of 2 parts that freeze"):
        step(*BATCHES[2], lr=[RATE] * 2)
    with pytest.raises(InputError, match="wanted a finite number"):
        other(*BATCHES[2], lr=[RATE] * 2)


def test_what_freezes_is_pruned_to_the_target_first():
    step = compiled(made(nothing), "block:1x4")
    run(step, BATCHES[:2])
    step.mutate(0.75, 0.5, rng=np.random.default_rng(0))
    run(step, BATCHES[2:4])
    state, masks = step.state_dict(), step.masks()
    step.freeze(["conv2.*", "conv1.*"], prune_to=0.75, rng=np.random.default_rng(1))
    share = step.sparsity()
    assert share["conv2.weight"] == 0.75 and share["conv3.weight"] == 0.5
    now = step.masks()
    assert not (now["conv2.weight"] & ~masks["conv2.weight"]).any()
    kept, gone = (
        np.abs(state["conv2.weight"])[mask]
        for mask in (now["conv2.weight"], masks["conv2.weight"] & ~now["conv2.weight"])
    )
    assert kept.mean() > gone.mean()
    assert np.array_equal(step.state_dict()["conv2.weight"], state["conv2.weight"] * now["conv2.weight"])
    step.mutate(0.75, 0.75, rng=np.random.default_rng(2))
    assert np.array_equal(step.masks()["conv2.weight"], now["conv2.weight"])
    assert step.sparsity()["conv3.weight"] == 0.75


def test_specialized_kernels_go_on(tmp_path):
    step, plain = compiled(made(nothing), "filter"), compiled(made(nothing), "filter")
    step.specialize()
    losses = []
    for one in (step, plain):
        losses.append(run(one, BATCHES[:2]))
        one.freeze(FRONT)
        losses[-1] += run(one, BATCHES[2:5])
    assert losses[0] == losses[1]


def test_an_exchange_that_is_interrupted_is_finished_by_the_next_call(monkeypatch):
    step, other = compiled(made(nothing), "block:1x4"), compiled(made(nothing), "block:1x4")
    for one in (step, other):
        run(one, BATCHES[:2])
    take, pressed = HeldState.take, []

    def interrupted(self, snapshot):
        take(self, snapshot)
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(HeldState, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.freeze(FRONT)
    other.freeze(FRONT)
    assert run(step, BATCHES[2:4]) == run(other, BATCHES[2:4])
    assert step.memory() == other.memory() and step.describe()["frozen"]


def test_memory_goes_back_to_the_system():
    """What is planned to go is what goes, beside what little else a process does meanwhile."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    shape = (64, 3, 48, 48)
    step = mest.compile(model, shape, scheme="dense", sparsity=0, threads=1)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal(shape).astype(np.float32), rng.integers(0, 10, 64)
    step.plan_freezing([["0.weight", "0.bias"], ["2.weight", "2.bias"]])

    def resident():
        step(*batch)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before, arena = resident(), step.program.arena_bytes
    step.freeze("0.*,2.*")
    gone = arena - step.program.arena_bytes
    assert gone > 8 * 2**20
    assert before - resident() > 0.7 * gone


def test_what_cannot_freeze_is_refused_and_nothing_changes(tmp_path):
    step = compiled(made(nothing), "block:1x4")
    memory = step.memory()
    with pytest.raises(SpecError, match="nothing would be left to train"):
        step.freeze("*")
    with pytest.raises(UnknownName, match=r"freeze: no parameter matches 'conv9\.\*'; there are, for example"):
        step.freeze("conv9.*")
    with pytest.raises(UnknownName, match="conv9.weight does not train"):
        step.plan_freezing([["conv9.weight"]])
    for parts in ([["conv1.weight"], []], [["conv1.weight"], ["conv1.weight"]]):
        with pytest.raises(UsageError, match="a name twice"):
            step.plan_freezing(parts)
    with pytest.raises(UsageError, match="a list a part"):
        step.plan_freezing(["conv1.weight"])
    step.freeze("conv1.*")
    with pytest.raises(UnknownName, match="frozen while training, which cannot train"):
        step.freeze("conv1.*")
    step.export(tmp_path / "artifact")
    other = mest.open_artifact(tmp_path / "artifact")
    assert other.describe()["frozen"] == {"conv1.weight": "frozen while training"}
    for call in (lambda: other.freeze("conv2.*"), lambda: other.freezing_costs([["conv2.weight"]])):
        with pytest.raises(UsageError, match="no compiler to freeze with"):
            call()
    assert memory["total"] > step.memory()["total"]
