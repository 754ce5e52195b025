"""What a torch module asks for beyond its graph is honoured or refused by name."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mest_compile.base.errors import SpecError, UnsupportedOperator
from mest_compile.frontend import from_torch
from mest_compile.ir.graph import BUFFER, CUT, FLAG

SHAPE = (4, 8)


def net(*, last=4):
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, last))


class Net(nn.Module):
    """Two layers with BatchNorm between, and a function of its values."""

    def __init__(self, function):
        super().__init__()
        self.first, self.norm, self.side, self.last = (
            nn.Linear(8, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )
        self.function = function
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x):
        return self.last(self.function(self, self.norm(self.first(x))))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def without_gradient(context):
    def function(self, y):
        with context():
            side = self.side(y)
        return y + side

    return Net(function)


def frozen(*paths):
    module = net()
    for path in paths:
        module.get_parameter(path).requires_grad_(False)
    return module


def norm_in_eval():
    module = net().train()
    module[1].eval()
    return module


def new_head_on_an_evaluated_model():
    module = net().eval()
    module[3] = nn.Linear(16, 5)
    return module


class StaysInEval(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def train(self, mode=True):
        super().train(mode)
        self.inner[1].eval()
        return self

    def forward(self, x):
        return self.inner(x)


class OwnNorm(nn.Module):
    def __init__(self, training):
        super().__init__()
        self.first, self.norm, self.last, self.how = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4), training

    def forward(self, x):
        n = self.norm
        return self.last(
            F.batch_norm(self.first(x), n.running_mean, n.running_var, n.weight, n.bias, training=self.how)
        )


class EndsOtherwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        y = self.layer(x)
        return y if self.training else y.relu()


class FixedWeight(nn.Module):
    def __init__(self, persistent=True):
        super().__init__()
        self.register_buffer("filter", torch.randn(4, 8), persistent=persistent)

    def forward(self, x):
        return F.linear(x, self.filter)


def hooked(register):
    module = net()
    getattr(module[0], register)(lambda *_: None)
    return module


def tensor_hook(register):
    module = net()
    getattr(module[0].weight, register)(lambda gradient: None)
    return module


def hook_in_forward(self, y):
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0)
    return y


def one_memory():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    module[2].weight.data = module[0].weight.data
    return module


def counts(self, y):
    self.seen.add_(1)
    return y


def shaken(self, y):
    return y + self.side(y) if random.random() < 2 else y


STRANGE = nn.Identity()  # its mode decides what forward does
REFUSED = {
    "norm always trains": (OwnNorm(True), ["forward changes norm.running_mean"]),
    "cut in place": (Net(lambda self, y: y.detach_()), ["detach_ in the model's own forward", "use detach instead"]),
    "cut in training": (
        Net(lambda self, y: y + self.side(y.detach() if self.training else y)),
        ["in training mode", "detach"],
    ),
    "gradient in training": (
        without_gradient(lambda: torch.set_grad_enabled(not STRANGE.training)),
        ["in training mode", "linear in layer 'side' (Linear) with its gradient cut"],
    ),
    "own backward": (Net(lambda self, y: Doubled.apply(y)), ["Doubled", "backward"]),
    "hook in forward": (Net(hook_in_forward), ["register_hook", "take it out of forward"]),
    "forward hook": (hooked("register_forward_hook"), ["layer '0' has a forward hook", "remove()"]),
    "forward-pre hook": (hooked("register_forward_pre_hook"), ["layer '0' has a forward-pre hook"]),
    "backward hook": (hooked("register_full_backward_hook"), ["layer '0' has a backward hook"]),
    "backward-pre hook": (hooked("register_full_backward_pre_hook"), ["layer '0' has a backward-pre hook"]),
    "tensor hook": (tensor_hook("register_hook"), ["0.weight has a gradient hook"]),
    "accumulation hook": (
        tensor_hook("register_post_accumulate_grad_hook"),
        ["0.weight has a post-accumulate-grad hook"],
    ),
    "chance in training": (
        Net(lambda self, y: y if self.training and torch.rand(1) < 0.5 else y + self.side(y)),
        ["training mode", "chance"],
    ),
    "noise in training": (
        Net(lambda self, y: y + torch.randn_like(y) if self.training else y),
        ["in training mode", "randn_like"],
    ),
    "more in training": (
        Net(lambda self, y: y + self.side(y) if self.training else y),
        ["in training mode", "'side' (Linear)"],
    ),
    "less in training": (
        Net(lambda self, y: y if self.training else y + self.side(y)),
        ["in training mode", "other arguments"],
    ),
    "less at the end": (EndsOtherwise(), ["in training mode", "no relu", "evaluation does"]),
    "other value in training": (
        Net(lambda self, y: [side := self.side(y), y + (side if self.training else y)][1]),
        ["in training mode", "other arguments"],
    ),
    "other layer in training": (
        Net(lambda self, y: F.linear(y, *(self.side if self.training else self.last_but).parameters())),
        ["in training mode", "linear"],
    ),
    "chance in Python": (Net(shaken), ["random numbers in Python"]),
    "changes a buffer": (Net(counts), ["forward changes seen"]),
    "bernoulli": (Net(lambda self, y: torch.bernoulli(y, 0.5)), ["bernoulli", "random numbers"]),
    "rand": (Net(lambda self, y: y + torch.rand(4, 16)), ["rand", "random numbers"]),
    "in place": (Net(lambda self, y: (y.bernoulli_(0.5), y)[1]), ["bernoulli_", "random numbers"]),
    "one memory": (one_memory(), ["0.weight and 2.weight are one parameter"]),
}
REFUSED["other layer in training"][0].last_but = nn.Linear(16, 16)
REFUSED["gradient in training"][0].strange = STRANGE

SIDE = dict.fromkeys(("side.weight", "side.bias"), CUT)
HONOURED = {  # module, what is frozen and why, BatchNorms in evaluation mode
    "weight": (frozen("0.weight"), {"0.weight": FLAG}, []),
    "bias": (frozen("3.bias"), {"3.bias": FLAG}, []),
    "norm": (frozen("1.weight", "1.bias"), {"1.weight": FLAG, "1.bias": FLAG}, []),
    "norm in eval": (norm_in_eval(), {}, ["1"]),
    "new head": (new_head_on_an_evaluated_model(), {}, ["1"]),
    "norm stays in eval": (StaysInEval(), {}, ["inner.1"]),
    "norm never trains": (OwnNorm(False), {}, ["norm"]),
    "all in eval": (net().eval(), {}, []),
    "buffer as weight": (FixedWeight(), {"filter": BUFFER}, []),
    "detach": (Net(lambda self, y: y + self.side(y.detach())), {}, []),
    "data": (Net(lambda self, y: y + self.side(y.data)), {}, []),
    "detached weight": (
        Net(lambda self, y: F.linear(y, self.side.weight.detach(), self.side.bias)),
        {"side.weight": CUT},
        [],
    ),
    "no_grad": (without_gradient(torch.no_grad), SIDE, []),
    "inference mode": (without_gradient(torch.inference_mode), SIDE, []),
    "all before is cut": (
        Net(lambda self, y: self.side(y.detach())),
        dict.fromkeys(("first.weight", "first.bias", "norm.weight", "norm.bias"), CUT),
        [],
    ),
    "nested": (Net(lambda self, y: once_more(self, y)), SIDE, []),
}


def once_more(self, y):
    with torch.no_grad():
        with torch.no_grad():
            pass
        side = self.side(y)  # the inner one has not turned gradients on
    return y + side


@pytest.mark.parametrize("case", HONOURED)
def test_what_torch_does_not_train_is_frozen(case):
    module, frozen_there, evaluating = HONOURED[case]
    modes = [part.training for part in module.modules()]
    graph, _ = from_torch(module, SHAPE)
    assert graph.frozen == frozen_there
    assert [node.name for node in graph.nodes if node.attrs.get("evaluating")] == evaluating
    assert [part.training for part in module.modules()] == modes
    assert set(graph.trainable()) == graph.parameters().keys() - frozen_there.keys()


def test_a_cut_stands_where_forward_has_it():
    graph, _ = from_torch(HONOURED["detach"][0], SHAPE)
    side = next(node for node in graph.nodes if node.name == "side")
    (cut,) = (node for node in graph.nodes if node.op == "detach")
    assert side.inputs == (cut.name,) and cut.inputs == ("norm",)
    graph, _ = from_torch(HONOURED["no_grad"][0], SHAPE)
    (cut,) = (node for node in graph.nodes if node.op == "detach")
    assert cut.inputs == ("side",) and cut.name not in graph.moving() and "side" in graph.moving()


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_train_otherwise_than_torch_is_refused_by_name(case):
    module, words = REFUSED[case]
    with pytest.raises(UnsupportedOperator) as caught:
        from_torch(module, SHAPE)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hooks_of_every_module_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedOperator, match="global forward hook"):
            from_torch(net(), SHAPE)
    finally:
        handle.remove()


def looks_on(self, y):
    F.gelu(y.detach()).mean()
    torch.rand(3)
    self.noted = y
    return y


class CountsInTraining(nn.Module):
    """A train() that does more than set the flag."""

    def __init__(self):
        super().__init__()
        self.inner, self.trains = net(), 0

    def train(self, mode=True):
        self.trains += mode
        return super().train(mode)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "module",
    [net().train(), net().eval(), Net(looks_on), CountsInTraining().eval()],
    ids=["train", "eval", "aside", "own"],
)
def test_everyday_models_are_taken_and_left_as_they_were(module):
    def facts():
        return [
            {name: value for name, value in vars(part).items() if not name.startswith("_")} for part in module.modules()
        ]

    before = facts()
    graph, _ = from_torch(module, SHAPE)
    assert [node.op for node in graph.nodes].count("linear") == 2
    assert facts() == before


def test_gradient_modes_of_the_caller_do_not_matter():
    want, _ = from_torch(module := net(), SHAPE)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert from_torch(module, SHAPE)[0] == want


def test_default_types_and_devices_of_the_caller_do_not_matter():
    want, _ = from_torch(module := net(), SHAPE)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert from_torch(module, SHAPE)[0] == want
    finally:
        torch.set_default_dtype(torch.float32)


def exported():
    return torch.export.export(net().eval(), (torch.zeros(SHAPE),))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x, y):
        return self.layer(x) + y


def with_value(value):
    module = net()
    module[0].weight.data[1, 2] = value
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.jit.script(net()), "the model is a ScriptModule.*pass the module"),
        (lambda: torch.jit.trace(net().eval(), torch.zeros(SHAPE)), "the model is a ScriptModule"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(8, 4)), nn.ReLU()), "layer '0' is a ScriptModule"),
        (lambda: nn.Sequential(nn.LazyLinear(16), nn.ReLU()), "0.weight has no values yet.*lazy"),
        (lambda: nn.Sequential(nn.Linear(8, 4, device="meta")), "0.weight is on the meta device"),
        (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "nothing to train"),
        (lambda: net().double(), "0.weight is float64: call model.float"),
        (lambda: net().half(), "0.weight is float16"),
        (lambda: net().bfloat16(), "0.weight is bfloat16"),
        (lambda: with_value(float("nan")), "1 of 128 values of 0.weight are NaN or infinite"),
        (lambda: with_value(float("inf")), "1 of 128 values of 0.weight are NaN or infinite"),
        (Two, "input_shape is of one input, and the model's forward takes 2: x, y; give a shape for each"),
        (exported, "torch.nn.Module.*got ExportedProgram"),
        (lambda: exported().module(), "module of an ExportedProgram"),
    ],
)
def test_what_is_no_trainable_module_is_one_line(make, words):
    with pytest.raises(SpecError, match=words) as caught:
        from_torch(make(), SHAPE)
    assert "\n" not in str(caught.value)


def test_a_buffer_that_is_no_state_is_refused_as_a_weight():
    with pytest.raises(UnsupportedOperator, match="linear with a weight that is no parameter in the model's"):
        from_torch(FixedWeight(persistent=False), SHAPE)


class Pooled(nn.Module):
    def __init__(self, **stride):
        super().__init__()
        self.conv, self.last, self.stride = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(36, 3), stride

    def forward(self, x):
        return self.last(F.max_pool2d(self.conv(x), 3, padding=1, **self.stride).flatten(1))


def test_a_pool_without_stride_takes_it_from_its_window():
    want, _ = from_torch(Pooled(stride=3), (2, 1, 9, 9))
    assert from_torch(Pooled(), (2, 1, 9, 9))[0] == want


class Row(nn.Module):
    """Biases as rows and as images of one pixel."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.channel, self.row = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(1, 3))

    def forward(self, x):
        return self.last((self.conv(x) + self.channel).mean((2, 3))) + self.row


def test_biases_keep_the_shape_they_were_given():
    graph, state = from_torch(Row(), (2, 1, 5, 5))
    assert [dict(node.params) for node in graph.nodes if node.params] == [
        {"weight": "conv.weight", "bias": "channel"},
        {"weight": "last.weight", "bias": "row"},
    ]
    assert state["channel"].shape == (4, 1, 1) and state["row"].shape == (1, 3)


def test_a_number_is_no_bias_but_trains():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.shift = nn.Linear(8, 4, bias=False), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.layer(x) + self.shift

    graph, _ = from_torch(Shifted(), SHAPE)
    assert [dict(node.params) for node in graph.nodes] == [{"weight": "layer.weight"}, {"x1": "shift"}]
