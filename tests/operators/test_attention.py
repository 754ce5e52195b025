"""Attention in whole nets, however it is written."""

import numpy as np
import pytest
import torch
from test_frontend import KEEP, assert_same, export, run_graph
from test_step import make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest
from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend import from_onnx, from_torch

SHAPE = (3, 3, 12, 8)


class Block(nn.Module):
    """A transformer's: attention and two linear layers, each behind a norm, added to what they read."""

    def __init__(self, attend, width=8, **layers):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.attend = nn.Linear(width, 12), nn.Linear(12, width), attend
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        x = x + self.attend(self, self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


def at_once(self, x, heads=2):
    """timm's: one linear layer for all three."""
    batch, tokens, width = x.shape
    q, k, v = self.qkv(x).reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


def written_out(self, x, heads=4):
    """transformers': three layers, a product and a softmax."""
    batch, tokens, width = x.shape
    q, k, v = (f(x).view(batch, tokens, heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
    shares = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
    return self.proj((shares @ v).permute(0, 2, 1, 3).reshape(batch, tokens, width))


def causal(self, x):
    """One head, of which no token sees those behind it."""
    q, k, v = self.qkv(x)[:, None].chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)[:, 0]


def in_windows(self, x, heads=2):
    """Swin's: of 3x2 patches each column is a window."""
    batch, tokens, width = x.shape
    x = x.view(batch, 3, 2, width).transpose(1, 2).reshape(batch * 2, 3, width)
    q, k, v = self.qkv(x).view(batch * 2, 3, 3, heads, -1).permute(2, 0, 3, 1, 4)
    x = (F.softmax(q * 0.7 @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).reshape(batch * 2, 3, width)
    return self.proj(x).view(batch, 2, 3, width).transpose(1, 2).reshape(batch, tokens, width)


def biased(self, x, heads=2):
    """LeViT's: what is learned for each distance is added to scores."""
    batch, tokens, width = x.shape
    q, k, v = self.qkv(x).view(batch, tokens, heads, -1).transpose(1, 2).split([4, 4, 4], 3)
    shares = (q @ k.transpose(-1, -2) * 0.5 + self.table[:, self.distances[:tokens, :tokens]]).softmax(-1)
    return self.proj((shares @ v).transpose(1, 2).reshape(batch, tokens, width))


def masked(self, x):
    """No token sees its neighbour on the right, nor the first one itself; queries of two heads share a head of keys."""
    batch, tokens, width = x.shape
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    seen[torch.arange(tokens - 1), torch.arange(1, tokens)] = False
    seen[0, 0], seen[0, 1] = False, True
    q, k, v = self.qkv(x).view(batch, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    x = F.scaled_dot_product_attention(x, k[:, :1], v[:, :1], enable_gqa=True)
    x = F.scaled_dot_product_attention(x, k[:, 1:], v[:, :1])
    scores = (x @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


def shifted(self, x, heads=2):
    """Swin's: windows of 2x1 of 2x3 patches that were rolled by one, what was at an end apart from the others."""
    batch, tokens, width = x.shape
    place = torch.zeros(1, 2, 3, 1)
    place[:, -1:] = 1
    place = place.transpose(1, 2).reshape(3, 2)
    mask = (place[:, None] - place[:, :, None]).masked_fill(place[:, None] != place[:, :, None], -100.0)
    x = torch.roll(x.view(batch, 2, 3, width), (-1, 1), (1, 2))
    x = x.view(batch, 1, 2, 3, 1, width).permute(0, 1, 3, 2, 4, 5).reshape(batch * 3, 2, width)
    q, k, v = self.qkv(x).view(batch * 3, 2, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = q * 0.7 @ k.transpose(-2, -1) + self.table[self.index.view(-1)].view(2, 2, heads).permute(2, 0, 1)[None]
    scores = (scores.view(batch, 3, heads, 2, 2) + mask[:, None][None]).view(-1, heads, 2, 2)
    x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, 1, 3, 2, 1, width)
    x = torch.roll(x.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2, 3, width), (1, -1), (1, 2))
    return self.proj(x.reshape(batch, tokens, width))


def over_channels(self, x, heads=2):
    """EdgeNeXt's: channels attend to channels, as far as a number that is learned says; then MobileViTv2's, in which
    one number a token says how much of it all tokens are given."""
    batch, tokens, width = x.shape
    q, k, v = self.qkv(x).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 4, 1)
    shares = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.heat).softmax(-1)
    x = v.transpose(-2, -1) @ shares.transpose(-2, -1)  # as SHViT has it
    x = self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
    return x * (self.weigh(x).softmax(1) * x).sum(1, keepdim=True)


def without(self, x, heads=2):
    """No attention as it is known: EfficientViT's without a softmax, whose last channel says what to divide by, then
    EfficientFormer's, whose heads talk to each other, with queries that share what they have of a key."""
    batch, tokens, width = x.shape
    q, k, v = self.qkv(x).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    found = q.relu() @ (k.relu().transpose(-1, -2) @ F.pad(v, (0, 1), value=1.0))
    found = found[..., :-1] / (found[..., -1:] + 1)
    scores = q @ k.transpose(-1, -2) * 0.5 + self.table[:, self.distances[:tokens, :tokens]]
    shares = self.after(self.before(scores).softmax(-1)) + scores.transpose(-1, -2).softmax(-1).transpose(-1, -2)
    return self.proj((found + shares @ v).transpose(1, 2).reshape(batch, tokens, width))


def mixing(x):
    """Examples attend to examples."""
    return (x @ x.transpose(1, 2)) @ x


def torchs(self, x):
    return self.heads(x, x, x, need_weights=False)[0]


def linears(**sizes):
    return {name: nn.Linear(8, size) for name, size in sizes.items()}


def table(*sizes):
    return nn.Parameter(torch.randn(sizes))


DISTANCES = (torch.arange(7)[:, None] - torch.arange(7)).abs()
WAYS = {
    "biased": lambda: Block(biased, **linears(qkv=24, proj=8), table=table(2, 7), distances=DISTANCES),
    "masked": lambda: Block(masked, **linears(qkv=24, proj=8)),
    "shifted": lambda: Block(
        shifted, **linears(qkv=24, proj=8), table=table(4, 2), index=torch.tensor([[1, 0], [3, 1]])
    ),
    "at once": lambda: Block(at_once, **linears(qkv=24, proj=8)),
    "written out": lambda: Block(written_out, **linears(query=8, key=8, value=8, proj=8)),
    "causal": lambda: Block(causal, **linears(qkv=24)),
    "in windows": lambda: Block(in_windows, **linears(qkv=24, proj=8)),
    "over channels": lambda: Block(
        over_channels, **linears(qkv=24, proj=8), weigh=nn.Linear(8, 1, bias=False), heat=table(2, 1, 1)
    ),
    "without": lambda: Block(
        without,
        **linears(qkv=24, proj=8),
        table=table(2, 7),
        distances=DISTANCES,
        before=nn.Conv2d(2, 2, 1, bias=False),
        after=nn.Conv2d(2, 2, 1),
    ),
    "torch's": lambda: Block(torchs, heads=nn.MultiheadAttention(8, 2, batch_first=True)),
}


AGAIN = (
    "in windows",
    "shifted",
    "masked",
    "biased",
    "over channels",
    "without",
)  # do not lie as wanted


class Encoder(nn.Module):
    """Patches, positions, blocks, a norm, the mean of all tokens, or a token that is learned."""

    def __init__(self, *ways, token=False):
        super().__init__()
        self.stem, self.positions = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 6, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8)) if token else None
        self.blocks = nn.Sequential(*(WAYS[way]() for way in ways))
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        if self.token is None:
            return self.last(self.norm(self.blocks(x)).mean(1))
        return self.last(self.norm(self.blocks(torch.cat([x, self.token.expand(len(x), -1, -1)], 1)))[:, -1])


@pytest.mark.parametrize("way", WAYS)
def test_the_graph_is_the_model(way):
    torch.manual_seed(0)
    module = Encoder(way)
    graph, state = from_torch(module, SHAPE)
    assert_same(module, graph, state, SHAPE)
    if way == "without":
        assert [node.op for node in graph.nodes].count("matmul") == 4
        return
    node, *more = [node for node in graph.nodes if node.op == "attention"]
    assert len(more) == 3 * (way == "masked") and node.attrs.get("causal", False) == (way == "causal")
    assert not [other for other in graph.nodes if other.op == "rearrange"] or way in AGAIN
    assert ("bias" in node.params) == (way in ("biased", "shifted"))


def test_a_token_that_is_learned_stands_beside_those_of_every_example():
    torch.manual_seed(0)
    module = Encoder("at once", token=True)
    graph, state = from_torch(module, SHAPE)
    assert_same(module, graph, state, SHAPE)
    (node,) = [node for node in graph.nodes if not node.inputs]
    assert node.params == {"x0": "token"} and "token" in graph.trainable()
    module.token = nn.Parameter(torch.randn(3, 1, 8))
    with pytest.raises(UnsupportedOperator, match=r"cat of token, \(3, 1, 8\), and values of 3 axes"):
        from_torch(module, SHAPE)


def test_what_forward_keeps_in_a_dictionary_is_as_it_was():
    """timm's nets keep the biases that they picked, in evaluation mode."""

    def keeping(self, x):
        kept = self.table * 1
        if not self.training:
            self.kept["biases"] = kept
        return biased(self, x)

    layers = {**linears(qkv=24, proj=8), "table": table(2, 7), "distances": DISTANCES}
    module = Encoder("biased")
    module.blocks[0] = Block(keeping, kept={"before": 1}, **layers)
    from_torch(module, SHAPE)
    assert module.blocks[0].kept == {"before": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["at once", "written out", "in windows"])
def test_a_file_says_the_same(way, tmp_path):
    torch.manual_seed(0)
    module = Encoder(way).eval()
    graph, state = from_onnx(export(module, SHAPE, tmp_path / "net.onnx", **KEEP), SHAPE)
    assert [node.op for node in graph.nodes].count("attention") == 1
    images = torch.randn(SHAPE)
    np.testing.assert_allclose(run_graph(graph, state, images), module(images).detach(), rtol=0, atol=1e-5)


STEPS = [
    (("at once", "in windows"), "local", "unstructured"),
    (("written out", "causal"), "local", "block:2x1"),
    (("written out", "causal"), "opencl", "block:2x1"),
    (("biased", "shifted"), "local", "unstructured"),
    (("biased", "masked"), "opencl", "unstructured"),
    (("over channels", "without"), "local", "unstructured"),
]


@pytest.mark.parametrize(("ways", "target", "scheme"), STEPS)
def test_three_steps_equal_torchs(ways, target, scheme, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    model, optimizer = Encoder(*ways, token="causal" in ways), mest.SGD(lr=0.01, momentum=0.9)
    named = {"scheme": scheme, "sparsity": 0.5, "dense_layers": ["last"]}
    step = mest.compile(model, SHAPE, optimizer=optimizer, target=target, **named)
    batches = make_batches(SHAPE, 5, 3)
    found = step.gradients(*batches[0])
    losses, gradients = masked_steps(model, step.masks(), batches, 0.01, optimizer)
    for key, wanted in gradients.items():
        if not key.endswith("key.bias"):  # which moves all scores of a query alike: its gradient is rounding
            assert relative(found[key], wanted) < 1e-4, key
    np.testing.assert_allclose([step(*batch, lr=0.01).loss for batch in batches], losses, rtol=1e-5)
    model.eval()
    wanted = model(torch.from_numpy(batches[0][0])).detach().numpy()
    assert relative(step.predict(batches[0][0]), wanted) < 1e-4
    if target == "local":
        mest.to_onnx(step, tmp_path / "out.onnx")
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"input": batches[0][0]})
        assert relative(logits, wanted) < 1e-4


class Attending(nn.Module):
    """Six tokens, shares (x) of theirs."""

    def __init__(self, attend):
        super().__init__()
        self.stem, self.last, self.attend = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5), attend

    def forward(self, x):
        return self.last(self.attend(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    "softmax",
    [lambda scores: scores.mT.softmax(-1).mT, lambda scores: scores.softmax(-2), lambda scores: scores.softmax(1)],
    ids=["transposed twice", "last but one", "second"],
)
def test_a_softmax_over_queries_is_none_over_keys(softmax):
    """However it is written."""
    torch.manual_seed(0)
    module = Attending(lambda x: softmax(x @ x.mT) @ x)
    graph, state = from_torch(module, SHAPE)
    assert_same(module, graph, state, SHAPE)
    assert "attention" not in {node.op for node in graph.nodes}


def test_what_is_added_is_the_same_for_every_example():
    added = torch.randn(6, 6).expand(3, 6, 6).clone()
    module = Attending(lambda x: (x @ x.mT + added).softmax(-1) @ x)
    graph, state = from_torch(module, SHAPE)
    assert_same(module, graph, state, SHAPE)
    assert [node.op for node in graph.nodes].count("attention") == 1
    added[2, 5, 5] += 1
    with pytest.raises(UnsupportedOperator, match="something else is added for each example"):
        from_torch(module, SHAPE)


@pytest.mark.parametrize(("queries", "keys"), [(6, 1), (1, 6), (1, 1)])
def test_one_query_or_one_key_is_attention_too(queries, keys):
    module = Attending(lambda x: (x[:, :queries] @ x[:, 6 - keys :].mT).softmax(-1) @ x[:, 6 - keys :])
    graph, state = from_torch(module, SHAPE)
    assert_same(module, graph, state, SHAPE)
    assert [node.op for node in graph.nodes].count("attention") == 1


@pytest.mark.parametrize("value", [-1e5, -1e4])
def test_scores_replaced_by_what_is_as_good_as_none_are_a_mask(value):
    hidden = torch.ones(6, 6).triu(1).bool()
    module = Attending(lambda x: (x @ x.mT).masked_fill(hidden, value).softmax(-1) @ x)
    graph, state = from_torch(module, SHAPE)
    assert_same(module, graph, state, SHAPE)
    assert [node.op for node in graph.nodes].count("attention") == 1


@pytest.mark.parametrize("value", [-9e3, -3.0, 0.0, 2.0])
def test_scores_replaced_by_what_counts_are_no_mask(value):
    hidden = torch.ones(6, 6).triu(1).bool()
    with pytest.raises(UnsupportedOperator, match="where of constant places"):
        from_torch(Attending(lambda x: (x @ x.mT).masked_fill(hidden, value).softmax(-1) @ x), SHAPE)


def test_a_value_that_is_all_three():
    """Gradients of a value that stands in three places are added up."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)[:, None]
            return self.last(F.scaled_dot_product_attention(x, x, x).mean((1, 2)))

    torch.manual_seed(0)
    model = Net()
    step = mest.compile(model, SHAPE, scheme="dense", sparsity=0)
    ((images, labels),) = make_batches(SHAPE, 5, 1)
    found = step.gradients(images, labels)
    F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels)).backward()
    for name, parameter in model.named_parameters():
        assert relative(found[name], parameter.grad.numpy()) < 1e-4, name


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=q[..., :6] > 0), "a mask that is computed from"),
        (lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(6, 6) < 0), "hides all keys of a q"),
        (lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.1), "dropout_p=0.1, set it to 0"),
        (lambda q: F.scaled_dot_product_attention(*[q.transpose(0, 2)] * 3).transpose(0, 2), r"attention of \(6, 1"),
        (lambda q: F.scaled_dot_product_attention(*[q.transpose(0, 3)] * 3).transpose(0, 3), r"attention of \(8, 1"),
        (lambda q: mixing(q[:, 0].transpose(0, 1)).transpose(0, 1)[:, None], r"matmul of \(6, 3, 8\) and \(6, 8, 3\)"),
    ],
)
def test_what_is_not_supported_is_refused(attend, words):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

        def forward(self, x):
            return self.last(attend(self.stem(x).flatten(2).transpose(1, 2)[:, None])[:, 0].mean(1))

    with pytest.raises(UnsupportedOperator, match=words):
        from_torch(Net(), SHAPE)
