"""Random layers: forward, input gradient and weight gradient of a sparse convolution against torch in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile.hardware.target import find_target
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.scheme import SCHEMES as KNOWN

SCHEMES = [*(name for name in KNOWN.names() if name != "dense"), "block:1x4", "block:4x4", "block:8x1", "block:3x2"]


LANES = (4, 8, 16)  # of NEON, AVX2 and AVX-512


def draw(seed: int) -> tuple[nn.Module, tuple[int, int, int, int], str, float]:
    """(model, input shape, scheme, sparsity): a dense 1x1 convolution, the convolution under test, a dense classifier.

    The first layer's gradient is right only when the second layer's input gradient is; the logits only when its forward
    pass is.
    """
    rng = np.random.default_rng(seed)
    scheme = SCHEMES[seed % len(SCHEMES)]
    rows, columns = (
        (int(part) for part in scheme.split(":")[1].split("x"))
        if ":" in scheme
        else (4 if scheme == "block" else 1, 4 if scheme == "nm" else 1)
    )
    source, out = (int(rng.integers(1, 14 // block + 2)) * block for block in (columns, rows))
    taps = (3, 3) if scheme == "pattern" else tuple(int(rng.integers(1, 5)) for _ in "yx")
    stride, padding = tuple(int(rng.integers(1, 4)) for _ in "yx"), tuple(int(rng.integers(0, tap)) for tap in taps)
    size = tuple(int(rng.integers(max(1, tap - 2 * pad), 18)) for tap, pad in zip(taps, padding))
    batch = int(rng.choice([1, 2, 3, 4, 5, 6, 8, 12, 16, 19]))
    conv = nn.Conv2d(source, out, taps, stride, padding, bias=bool(rng.integers(2)))
    high, wide = ((extent + 2 * pad - tap) // step + 1 for extent, pad, tap, step in zip(size, padding, taps, stride))
    model = nn.Sequential(nn.Conv2d(2, source, 1), conv, nn.Flatten(), nn.Linear(out * high * wide, 5))
    low, most = (0.56, 0.99) if scheme == "pattern" else (0.0, 0.99)
    sparsity = float(rng.choice([low, rng.uniform(low, most), most]))
    fixed = parse_scheme(scheme).fixed
    return model, (batch, 2, *size), scheme, sparsity if fixed is None else fixed


@pytest.mark.parametrize("seed", range(27))
def test_a_random_layer_computes_what_torch_computes_in_float64(seed):
    check_random_layer(seed, "local")


def check_random_layer(seed: int, target: str) -> None:
    torch.manual_seed(seed)
    model, shape, scheme, sparsity = draw(seed)
    device = find_target(target)
    if device.gpu is None:
        device = replace(device, vector=LANES[seed % len(LANES)])
    said = f"seed {seed}: {model[1]}, input {shape}, {scheme}, sparsity {sparsity:.3f}, {device.vector} lanes"
    step = mest.compile(
        model, shape, scheme=scheme, sparsity=sparsity, dense_layers=["0", "3"], threads=2, target=device
    )
    rng = np.random.default_rng(seed)
    images, labels = rng.standard_normal(shape).astype(np.float32), rng.integers(0, 5, shape[0])
    mest.to_torch(step, model)
    twin = model.double()
    logits = twin(torch.from_numpy(images).double())
    nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    mask = step.masks()["1.weight"]
    # float32 sums of at most a few thousand terms, three layers deep
    terms = max(mask[0].size, mask.shape[0] * mask[0, 0].size, shape[0] * shape[2] * shape[3], model[3].in_features)
    tolerance = 8 * np.sqrt(terms) * np.finfo(np.float32).eps

    def check(got: np.ndarray, wanted: np.ndarray, what: str) -> None:
        error = np.abs(got - wanted).max()
        assert error <= tolerance * max(np.abs(wanted).max(), 1e-30) + 1e-12, f"{said}: {what} is off by {error}"

    check(step.predict(images), logits.detach().numpy(), "logits")
    gradients = step.gradients(images, labels)
    for name, parameter in twin.named_parameters():
        check(gradients[name], parameter.grad.numpy() * (mask if name == "1.weight" else 1), name)
