"""A block of every family of nets that people use and no other file trains, in little: three steps of each are torch's
in float64. What is in a net's forward is written as the family writes it."""

import numpy as np
import pytest
import torch
from test_frontend import randomised
from test_step import make_batches
from torch import nn
from torch.nn import functional as F

import mest_compile as mest

WIDTH, CLASSES = 8, 5
FEW, GAPS = (3, 3, 12, 12), (9, 3, 16, 16)  # maps of 6x6; of 8x8, which lie with gaps between channels, in slices


def conv(inputs, outputs, kernel=1, stride=1, groups=1, act=nn.ReLU):
    sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
    around = tuple(size // 2 for size in sizes)
    layers = [nn.Conv2d(inputs, outputs, sizes, stride, around, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Res2(nn.Module):
    """Res2Net's: a quarter of the channels after the other, each with what became of the one before added."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(WIDTH, 16), conv(16, WIDTH, act=None)
        self.parts = nn.ModuleList(conv(4, 4, 3) for _ in range(3))

    def forward(self, x):
        first, *others = self.first(x).split(4, 1)
        made = []
        for part, one in zip(self.parts, others, strict=True):
            made.append(part(one + made[-1] if made else one))
        return F.relu(self.last(torch.cat([*made, F.avg_pool2d(first, 3, 1, 1)], 1)) + x)


class Mixed(nn.Module):
    """MixNet's: parts of the channels by depthwise kernels of several sizes, between normalisations; a gate; 1x1
    convolutions of parts."""

    def __init__(self):
        super().__init__()
        self.wide, self.norm, self.out = conv(WIDTH, 16, act=nn.SiLU), nn.BatchNorm2d(16), nn.BatchNorm2d(WIDTH)
        self.deep = nn.ModuleList(nn.Conv2d(8, 8, k, padding=k // 2, groups=8, bias=False) for k in (3, 5))
        self.back = nn.ModuleList(nn.Conv2d(8, WIDTH // 2, 1, bias=False) for _ in range(2))
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x):
        y = self.wide(x)
        y = F.silu(self.norm(torch.cat([f(one) for f, one in zip(self.deep, y.split(8, 1), strict=True)], 1)))
        y = y * self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.out(torch.cat([f(one) for f, one in zip(self.back, y.chunk(2, 1), strict=True)], 1))


class InceptionNext(nn.Module):
    """InceptionNeXt's: some channels stay, others go through a square, a flat and a tall depthwise kernel."""

    def __init__(self):
        super().__init__()
        self.deep = nn.ModuleList(
            nn.Conv2d(2, 2, size, padding=(size[0] // 2, size[1] // 2), groups=2) for size in ((3, 3), (1, 5), (5, 1))
        )
        self.norm, self.scale = nn.BatchNorm2d(WIDTH), nn.Parameter(torch.full((WIDTH,), 0.5))
        self.wide, self.narrow = nn.Conv2d(WIDTH, 16, 1), nn.Conv2d(16, WIDTH, 1)

    def forward(self, x):
        kept, *others = torch.split(x, (2, 2, 2, 2), 1)
        y = torch.cat([kept, *(f(one) for f, one in zip(self.deep, others, strict=True))], 1)
        y = self.narrow(F.gelu(self.wide(self.norm(y))))
        return y * self.scale.reshape(1, -1, 1, 1) + x


class Faster(nn.Module):
    """FasterNet's: a quarter of the channels is convolved and put back before the others."""

    def __init__(self):
        super().__init__()
        self.part, self.wide = nn.Conv2d(2, 2, 3, padding=1, bias=False), conv(WIDTH, 16)
        self.narrow = nn.Conv2d(16, WIDTH, 1, bias=False)

    def forward(self, x):
        first, others = torch.split(x, [2, 6], 1)
        return x + self.narrow(self.wide(torch.cat((self.part(first), others), 1)))


class HighResolution(nn.Module):
    """HRNet's: two sizes side by side, each with the other added."""

    def __init__(self):
        super().__init__()
        self.down, self.high, self.low = conv(WIDTH, 16, 3, 2), conv(WIDTH, WIDTH, 3), conv(16, 16, 3)
        self.up, self.over = conv(16, WIDTH, act=None), conv(WIDTH, 16, 3, 2, act=None)
        self.join = conv(16, WIDTH, act=None)

    def forward(self, x):
        high, low = self.high(x), self.low(self.down(x))
        first = F.relu(high + F.interpolate(self.up(low), scale_factor=2.0, mode="nearest"))
        second = F.relu(self.over(high) + low)
        return first + F.interpolate(self.join(second), scale_factor=2.0, mode="nearest")


class Aggregated(nn.Module):
    """VoVNet's and DLA's: what every layer gives is joined at the end; a gate by one layer and a hard sigmoid."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([conv(WIDTH, 4, 3), conv(4, 4, 3), conv(4, 4, 3)])
        self.join, self.gate = conv(WIDTH + 12, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        made = [x]
        for layer in self.layers:
            made.append(layer(made[-1]))
        y = self.join(torch.cat(made, 1))
        return y * F.hardsigmoid(self.gate(y.mean((2, 3), keepdim=True))) + x


class CrossStage(nn.Module):
    """CSPDarknet's: one half of the channels goes through blocks, the other waits."""

    def __init__(self):
        super().__init__()
        act = lambda: nn.LeakyReLU(0.1)  # noqa: E731
        self.wide, self.narrow, self.deep = conv(WIDTH, 16, act=act), conv(8, 4, act=act), conv(4, 8, 3, act=act)
        self.after, self.join = conv(8, 8, act=act), conv(16, WIDTH, act=act)

    def forward(self, x):
        waits, y = self.wide(x).chunk(2, 1)
        y = y + self.deep(self.narrow(y))
        return self.join(torch.cat([self.after(y), waits], 1))


class Neighbours(nn.Module):
    """ECA-ResNet's: a gate of which each channel's is made of its neighbours' means, by a convolution over channels."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(WIDTH, WIDTH, 3), conv(WIDTH, WIDTH, 3, act=None))
        self.over = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.body(x)
        gate = self.over(y.mean((2, 3)).view(len(y), 1, -1)).sigmoid().view(len(y), -1, 1, 1)
        return F.relu(y * gate.expand_as(y) + x)


class ConvMixer(nn.Module):
    """ConvMixer's: normalised behind the activation."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(WIDTH, WIDTH, 5, groups=WIDTH, padding="same")
        self.point, self.norms = nn.Conv2d(WIDTH, WIDTH, 1), nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(2))

    def forward(self, x):
        x = self.norms[0](F.gelu(self.deep(x))) + x
        return self.norms[1](F.gelu(self.point(x)))


class Tokens(nn.Module):
    """What is behind it sees the pixels as tokens."""

    def forward(self, x):
        batch, channels, height, width = x.shape
        return self.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(batch, channels, height, width)


class GatedTokens(Tokens):
    """gMLP's: one half of the features is multiplied with the other, mixed over tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.wide, self.over, self.narrow = nn.Linear(WIDTH, 16), nn.Linear(tokens, tokens), nn.Linear(8, WIDTH)

    def mix(self, x):
        u, v = F.gelu(self.wide(self.norms[0](x))).chunk(2, -1)
        return x + self.narrow(u * self.over(self.norms[1](v).transpose(-1, -2)).transpose(-1, -2))


class AffineTokens(Tokens):
    """ResMLP's: scales and shifts in the place of norms."""

    def __init__(self, tokens):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.full((WIDTH,), size)) for size in (0.9, 0.5, 1.1, 0.4))
        self.shifts = nn.ParameterList(nn.Parameter(torch.full((1, 1, WIDTH), size)) for size in (0.1, -0.1))
        self.over, self.wide, self.narrow = nn.Linear(tokens, tokens), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def mix(self, x):
        a, b, c, d = self.scales
        y = torch.addcmul(self.shifts[0], a, x)
        x = x + b * self.over(y.transpose(1, 2)).transpose(1, 2)
        return x + d * self.narrow(F.gelu(self.wide(torch.addcmul(self.shifts[1], c, x))))


class Universal(nn.Module):
    """MobileNetV4's: a depthwise layer without an activation before the expansion, one behind it, a learned scale."""

    def __init__(self):
        super().__init__()
        self.start, self.wide = conv(WIDTH, WIDTH, 3, groups=WIDTH, act=None), conv(WIDTH, 16)
        self.middle, self.narrow = conv(16, 16, 5, groups=16), conv(16, WIDTH, act=None)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x):
        return x + self.narrow(self.middle(self.wide(self.start(x)))) * self.scale.view(1, -1, 1, 1)


class Fused(nn.Module):
    """EfficientNetV2's and MobileNet EdgeTPU's: expanded by a whole kernel; RexNet's: what is added is some of its
    channels."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = conv(WIDTH, 16, 3, act=nn.SiLU), conv(16, 12, act=None)
        self.back = conv(12, WIDTH, act=nn.SiLU)

    def forward(self, x):
        y = self.narrow(self.wide(x))
        return self.back(torch.cat([y[:, :WIDTH] + x, y[:, WIDTH:]], 1))


class Reparametrised(nn.Module):
    """RepVGG's: a 3x3 and a 1x1 kernel and none side by side, then FastViT's: what is mixed less what is only
    normalised, scaled."""

    def __init__(self):
        super().__init__()
        self.large, self.small, self.none = conv(WIDTH, WIDTH, 3, act=None), conv(WIDTH, WIDTH, act=None), self.norm()
        self.deep, self.both, self.less = conv(WIDTH, WIDTH, 3, groups=WIDTH, act=None), self.norm(), self.norm()
        self.scale = nn.Parameter(torch.full((WIDTH, 1, 1), 0.5))

    @staticmethod
    def norm():
        return nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        x = F.relu(self.none(x) + self.large(x) + self.small(x))
        return x + self.scale * (self.both(x) + self.deep(x) - self.less(x))


class RepGhost(nn.Module):
    """RepGhostNet's: cheap layers are added and not joined, beside a normalisation of what they read."""

    def __init__(self):
        super().__init__()
        self.primary, self.cheap = conv(WIDTH, 16), conv(16, 16, 3, groups=16, act=None)
        self.none, self.second = nn.BatchNorm2d(16), conv(16, WIDTH, act=None)
        self.cheaper, self.last = conv(WIDTH, WIDTH, 3, groups=WIDTH, act=None), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        y = self.primary(x)
        y = self.second(F.relu(self.cheap(y) + self.none(y)))
        return x + self.cheaper(y) + self.last(y)


class FarGate(nn.Module):
    """GhostNetV3's: a gate of pixels, made in little by flat and tall depthwise kernels."""

    def __init__(self):
        super().__init__()
        self.primary, self.cheap = conv(WIDTH, 4), conv(4, 4, 3, groups=4)
        flat, tall = (conv(WIDTH, WIDTH, size, groups=WIDTH, act=None) for size in ((1, 5), (5, 1)))
        self.gate = nn.Sequential(conv(WIDTH, WIDTH, act=None), flat, tall)

    def forward(self, x):
        gate = self.gate(F.avg_pool2d(x, 2, 2)).sigmoid()
        y = self.primary(x)
        y = torch.cat([y, self.cheap(y)], 1)
        return y * F.interpolate(gate, size=y.shape[-2:], mode="nearest")


class Towers(nn.Module):
    """Inception's: flat and tall kernels one behind the other, one layer read twice, pools that keep the size."""

    def __init__(self):
        super().__init__()
        self.point, self.pooled = conv(WIDTH, 2), conv(WIDTH, 2)
        self.narrow, self.flat, self.tall = conv(WIDTH, 4), conv(4, 2, (1, 5)), conv(4, 2, (5, 1))

    def forward(self, x):
        y = self.narrow(x)
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1) + F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([self.point(x), torch.cat([self.flat(y), self.tall(y)], 1), pooled], 1)


class Even(nn.Module):
    """HGNetV2's stem: kernels and pools of 2x2 that keep the size, as one more row and column are there."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.join = (
            conv(WIDTH, 4, act=None),
            nn.Conv2d(WIDTH, 4, 2, bias=False),
            conv(8, WIDTH),
        )
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))
        y = self.norm(self.second(x)).relu()
        return self.join(torch.cat([self.first(F.max_pool2d(x, 2, 1, ceil_mode=True)), y], 1))


class Response(nn.Module):
    """ConvNeXtV2's: features as large as a channel's norm is beside the others'."""

    def __init__(self):
        super().__init__()
        self.deep, self.norm = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH), nn.LayerNorm(WIDTH, 1e-6)
        self.wide, self.narrow = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.weight, self.bias = nn.Parameter(torch.full((16,), 0.5)), nn.Parameter(torch.full((16,), 0.1))

    def forward(self, x):
        y = F.gelu(self.wide(self.norm(self.deep(x).permute(0, 2, 3, 1))))
        size = y.norm(p=2, dim=(1, 2), keepdim=True)
        size = size / (size.mean(-1, keepdim=True) + 1e-6)
        y = y + torch.addcmul(self.bias.view(1, 1, 1, -1), self.weight.view(1, 1, 1, -1), y * size)
        return x + self.narrow(y).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """MobileViT's: pixels at the same place of every 2x2 patch attend to each other."""

    def __init__(self):
        super().__init__()
        self.into, self.back, self.join = nn.Conv2d(WIDTH, 8, 1, bias=False), conv(8, WIDTH), conv(16, WIDTH, 3)
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        batch, _, height, width = x.shape
        y = self.into(x).reshape(batch * 8 * (height // 2), 2, width // 2, 2).transpose(1, 2)
        y = y.reshape(batch, 8, height * width // 4, 4).transpose(1, 3).reshape(batch * 4, height * width // 4, 8)
        q, k, v = self.qkv(self.norm(y)).reshape(batch * 4, -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = y + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(y.shape))
        y = y.reshape(batch, 4, -1, 8).transpose(1, 3).reshape(batch * 8 * (height // 2), width // 2, 2, 2)
        return self.join(torch.cat([x, self.back(y.transpose(1, 2).reshape(batch, 8, height, width))], 1))


class Halved(nn.Module):
    """LeViT's: linear layers normalised over all tokens, queries of every second row and column."""

    def __init__(self):
        super().__init__()
        self.kv, self.q, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(16, 16)
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for size in (24, 8, 16))

    @staticmethod
    def normed(norm, x):
        return norm(x.flatten(0, 1)).reshape_as(x)

    def forward(self, x):
        batch, width, rows, columns = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        k, v = self.normed(self.norms[0], self.kv(tokens)).view(batch, -1, 2, 12).split([4, 8], 3)
        few = tokens.view(batch, rows, columns, width)[:, ::2, ::2].reshape(batch, -1, width)
        q = self.normed(self.norms[1], self.q(few)).view(batch, -1, 2, 4).permute(0, 2, 1, 3)
        shares = (q @ k.permute(0, 2, 3, 1) * 0.5).softmax(-1)
        y = F.hardswish((shares @ v.permute(0, 2, 1, 3)).transpose(1, 2).reshape(batch, -1, 16))
        y = self.normed(self.norms[2], self.proj(y))
        return y.transpose(1, 2).reshape(batch, 16, rows // 2, columns // 2)


class SingleHead(nn.Module):
    """SHViT's: one head on some of the channels, by 1x1 convolutions, before the others."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.GroupNorm(1, 4), conv(4, 12, act=None), conv(WIDTH, WIDTH, act=None)

    def forward(self, x):
        batch, _, height, width = x.shape
        first, others = torch.split(x, [4, 4], 1)
        q, k, v = (one.flatten(2) for one in self.qkv(self.norm(first)).split([4, 4, 4], 1))
        shares = (q.transpose(-2, -1) @ k * 0.5).softmax(-1)
        y = (v @ shares.transpose(-2, -1)).reshape(batch, 4, height, width)
        return x + self.proj(F.relu(torch.cat([y, others], 1)))


class Grids(nn.Module):
    """MaxViT's: pixels of a window, then those that lie a window apart, attend to each other, with a learned table."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkvs = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(2))
        self.projs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(9, 2) * 0.3) for _ in range(2))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None] + 1
        self.register_buffer("index", (3 * apart[0] + apart[1]).flatten())

    def attend(self, place, x):  # (batch, windows, 4 pixels, channels)
        batch, windows = x.shape[:2]
        q, k, v = self.qkvs[place](self.norms[place](x)).reshape(batch, windows, 4, 3, 2, 4).permute(3, 0, 1, 4, 2, 5)
        bias = self.tables[place][self.index].view(4, 4, 2).permute(2, 0, 1)
        shares = (q * 0.5 @ k.transpose(-2, -1) + bias[None]).softmax(-1)
        return x + self.projs[place]((shares @ v).permute(0, 1, 3, 2, 4).reshape(x.shape))

    def forward(self, x):
        batch, width, rows, columns = x.shape
        sizes = batch, width, rows // 2, 2, columns // 2, 2
        y = self.attend(0, x.reshape(sizes).permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, 4, width))
        y = y.reshape(batch, rows // 2, columns // 2, 2, 2, width).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        sizes = batch, width, 2, rows // 2, 2, columns // 2
        y = self.attend(1, y.reshape(sizes).permute(0, 3, 5, 2, 4, 1).reshape(batch, -1, 4, width))
        return y.reshape(batch, rows // 2, columns // 2, 2, 2, width).permute(0, 5, 3, 1, 4, 2).reshape(x.shape)


class Cascade(nn.Module):
    """EfficientViT's other kind: each head reads what became of the one before, too; queries through a depthwise
    layer."""

    def __init__(self):
        super().__init__()
        self.qkvs = nn.ModuleList(conv(4, 12, act=None) for _ in range(2))
        self.deep = nn.ModuleList(conv(4, 4, 3, groups=4, act=None) for _ in range(2))
        self.proj = conv(WIDTH, WIDTH, act=None)

    def forward(self, x):
        (batch, _, height, width), made = x.shape, []
        for head, one in enumerate(x.chunk(2, 1)):
            one = one + made[-1] if made else one
            q, k, v = self.qkvs[head](one).view(batch, -1, height, width).split([4, 4, 4], 1)
            q, k, v = self.deep[head](q).flatten(2), k.flatten(2), v.flatten(2)
            shares = (q.transpose(-2, -1) @ k * 0.5).softmax(-1)
            made.append((v @ shares.transpose(-2, -1)).view(batch, 4, height, width))
        return x + self.proj(F.relu(torch.cat(made, 1)))


class Local(nn.Module):
    """TinyViT's: tokens attend to each other, are an image again for a depthwise layer, then tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(WIDTH, WIDTH)
        self.deep, self.behind = conv(WIDTH, WIDTH, 3, groups=WIDTH, act=None), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        batch, width, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).view(batch, -1, 2, 12).split([4, 4, 4], 3)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        x = self.deep(x.transpose(1, 2).reshape(batch, width, rows, columns)).view(batch, width, -1).transpose(1, 2)
        x = x + self.narrow(F.gelu(self.wide(self.behind(x))))
        return x.transpose(1, 2).reshape(batch, width, rows, columns)


class Family(nn.Module):
    def __init__(self, kind, pixels):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTH))
        self.block = kind(pixels) if issubclass(kind, Tokens) else kind()
        self.last = nn.Linear(16 if kind is Halved else WIDTH, CLASSES)

    def forward(self, x):
        return self.last(self.block(self.stem(x)).mean((2, 3)))


KINDS = {  # a block, images, the scheme
    "fasternet": (Faster, GAPS, "unstructured"),
    "ecaresnet": (Neighbours, GAPS, "block"),
    "convmixer": (ConvMixer, GAPS, "block"),
    "gmlp": (GatedTokens, FEW, "block"),
    "resmlp": (AffineTokens, FEW, "unstructured"),
    "mobilenet v4": (Universal, GAPS, "block"),
    "repghostnet": (RepGhost, GAPS, "unstructured"),
}
FURTHER = {
    "res2net": (Res2, GAPS, "block"),
    "mixnet": (Mixed, GAPS, "unstructured"),
    "inception_next": (InceptionNext, FEW, "unstructured"),
    "hrnet": (HighResolution, FEW, "block"),
    "vovnet, dla": (Aggregated, FEW, "unstructured"),
    "cspdarknet": (CrossStage, FEW, "block"),
    "efficientnetv2, rexnet": (Fused, GAPS, "block"),
    "repvgg, fastvit": (Reparametrised, GAPS, "unstructured"),
    "ghostnetv3": (FarGate, GAPS, "unstructured"),
    "inception": (Towers, FEW, "unstructured"),
    "hgnetv2": (Even, FEW, "block"),
    "convnextv2": (Response, FEW, "block"),
    "mobilevit": (Patches, FEW, "block"),
    "levit": (Halved, FEW, "block"),
    "shvit": (SingleHead, FEW, "unstructured"),
    "maxvit": (Grids, FEW, "block"),
    "efficientvit": (Cascade, FEW, "unstructured"),
    "tiny_vit": (Local, FEW, "unstructured"),
}


def of_torch(model, start, masks, batches, rule):
    """({parameter: gradient of the first batch}, {tensor: what the steps changed}), in float64."""
    model = model.double().train()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
    optimizer = torch.optim.SGD(model.parameters(), rule.lr, rule.momentum, weight_decay=rule.weight_decay)
    first = {}
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(torch.from_numpy(images).double()), torch.from_numpy(labels)).backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, mask in masks.items():
            found[name] *= torch.from_numpy(mask)
        first = first or {name: gradient.numpy().copy() for name, gradient in found.items()}
        optimizer.step()
    return first, {name: array.numpy() - start[name] for name, array in model.state_dict().items()}


def assert_near(found, wanted, most):
    """Tensor by tensor; what is 0 but for rounding is measured by the largest."""
    sizes = {name: np.linalg.norm(array) for name, array in wanted.items()}
    for name, array in wanted.items():
        size = max(sizes[name], 1e-2 * max(sizes.values()))
        assert np.linalg.norm(found[name] - array) <= most * size, name


def check(kind, shape, scheme, builder):
    """Gradients, what three steps change, and predictions behind them."""
    torch.manual_seed(0)
    model, rule = randomised(Family(kind, shape[2] * shape[3] // 4)), mest.SGD(lr=0.01, momentum=0.9, weight_decay=1e-3)
    step = mest.compile(model, shape, scheme=scheme, sparsity=0.5, optimizer=rule, threads=1, builder=builder)
    assert step.masks()
    start, batches = step.state_dict(), make_batches(shape, CLASSES, 3)
    gradients = step.gradients(*batches[0])
    for batch in batches:
        step(*batch)
    state = step.state_dict()
    wanted, changed = of_torch(model, start, step.masks(), batches, rule)
    assert_near(gradients, wanted, 2e-5)
    assert_near({name: state[name].astype(np.float64) - start[name] for name in changed}, changed, 1e-3)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(batches[0][0]).double()).numpy()
    assert np.abs(step.predict(batches[0][0]) - outputs).max() <= 1e-5 * np.abs(outputs).max()


@pytest.mark.parametrize("family", KINDS)
def test_three_steps_equal_torchs(family, builder):
    check(*KINDS[family], builder)


@pytest.mark.parametrize("family", FURTHER)
def test_three_steps_of_further_families_equal_torchs(family, builder):
    check(*FURTHER[family], builder)
