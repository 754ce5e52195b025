"""Small vision transformers: DeiT-tiny under timm's names, CCT-7/3x1 under those of Compact-Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def _heads(width: int) -> int:
    """Of 64 channels, or more where these would not come out even."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


def _attention(width: int, bias: bool) -> nn.Module:
    import torch
    from torch import nn

    heads = _heads(width)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))

    return Attention()


def _positions(*shape: int) -> nn.Parameter:
    import torch
    from torch import nn

    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *shape), std=0.02))


def _initialised(module: nn.Module) -> nn.Module:
    """With linear layers as both papers begin them."""
    from torch import nn

    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def _deit_tiny(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
    """Touvron et al., "Training data-efficient image transformers", arXiv:2012.12877. Patches of 16 pixels, of images
    below 64 pixels 4."""
    import torch
    from torch import nn

    _, channels, *size = input_shape
    patch = 16 if min(size) >= 64 else 4
    tokens = (size[0] // patch) * (size[1] // patch)

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(channels, width, patch, patch)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x).flatten(2).transpose(1, 2)

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.act(self.fc1(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.attn = nn.LayerNorm(width, 1e-6), _attention(width, True)
            self.norm2, self.mlp = nn.LayerNorm(width, 1e-6), Mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class VisionTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token, self.pos_embed = _positions(1, width), _positions(tokens + 1, width)
            self.patch_embed, self.blocks = Patches(), nn.Sequential(*(Block() for _ in range(12)))
            self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1) + self.pos_embed
            return self.head(self.norm(self.blocks(x))[:, 0])

    return _initialised(VisionTransformer())


def _cct(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
    """CCT-7/3x1 of Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers", arXiv:2104.05704,
    without stochastic depth. Tokens are pooled by weights that they give themselves."""
    from torch import nn

    _, channels, *size = input_shape
    tokens = ((size[0] + 1) // 2) * ((size[1] + 1) // 2)

    class Tokenizer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convolution = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            self.conv_layers = nn.Sequential(nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(3, 2, 1)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv_layers(x).flatten(2).transpose(1, 2)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre_norm, self.self_attn = nn.LayerNorm(width), _attention(width, False)
            self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.norm1, self.activation = nn.LayerNorm(width), nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm1(x + self.self_attn(self.pre_norm(x)))
            return x + self.linear2(self.activation(self.linear1(x)))

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_pool, self.positional_emb = nn.Linear(width, 1), _positions(tokens, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(7)))
            self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.blocks(x + self.positional_emb))
            return self.fc((self.attention_pool(x).softmax(1) * x).sum(1))

    class CCT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer, self.classifier = Tokenizer(), Classifier()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.tokenizer(x))

    return _initialised(CCT())
