"""Built-in models: torchvision's names, the sizes that the papers state, weights that follow from the seed alone."""

import math
import sys

import pytest
import torch
from torch import nn

from mest_compile.base.errors import NotInstalled, SpecError, UnknownName
from mest_compile.models.catalog import build_model, model_names


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "width", "millions"),
    [
        ("resnet8", 16, 0.08),
        ("resnet20", 16, 0.27),
        ("resnet32", 16, 0.47),
        ("resnet32", 32, 1.86),  # MEST states 1.86 M for its wide ResNet-32
        ("resnet18", 64, 11.17),
        ("vgg11", 64, 9.23),
        ("vgg19", 64, 20.04),
        ("cct", 256, 3.76),
    ],
)
def test_parameter_counts_are_the_published_ones(name, width, millions):
    assert count(build_model(name, (1, 3, 32, 32), width=width)) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("resnet18", 64, 11_689_512),  # torchvision's resnet18
        ("resnet50", 64, 25_557_032),  # torchvision's resnet50
        ("mobilenetv1", 32, 4_231_976),  # timm's mobilenetv1_100
        ("mobilenetv2", 32, 3_504_872),  # torchvision's mobilenet_v2
        ("efficientnet-lite0", 32, 4_652_008),  # timm's efficientnet_lite0
        ("efficientnet-lite1", 1.0, 5_416_680),  # timm's
        ("efficientnet-lite2", 32, 6_092_072),  # timm's
        ("mobilenetv2", 0.35, 1_677_128),  # torchvision's, of that width_mult
        ("mobilenetv2", 1.4, 6_108_776),
        ("mobilenetv3-small", 16, 2_542_856),  # torchvision's mobilenet_v3_small
        ("efficientnet-b0", 32, 5_288_548),  # torchvision's efficientnet_b0
        ("deit-tiny", 192, 5_717_416),  # timm's deit_tiny_patch16_224
    ],
)
def test_nets_have_as_many_parameters_as_those_of_other_packages(name, width, parameters):
    assert count(build_model(name, (1, 3, 224, 224), 1000, width)) == parameters


def test_a_share_of_a_models_own_width_is_told_by_a_float():
    for name, share, width in (("mobilenetv1", 0.25, 8), ("resnet20", 2.0, 32), ("mobilenetv3-small", 1.0, 16)):
        shapes = [
            [parameter.shape for parameter in build_model(name, (1, 3, 32, 32), 10, one).parameters()]
            for one in (share, width)
        ]
        assert shapes[0] == shapes[1]
    with pytest.raises(SpecError, match="width 0.3 of resnet20 is 4.8 channels, its own are 16; wanted a whole number"):
        build_model("resnet20", (1, 3, 32, 32), 10, 0.3)
    with pytest.raises(SpecError, match="width 0.01 of mobilenetv2 is 0.32 channels.*wanted 1 or more"):
        build_model("mobilenetv2", (1, 3, 32, 32), 10, 0.01)


def test_mlperf_tinys_nets_are_its_nets_without_what_batch_normalisation_makes_idle():
    keywords = build_model("ds-cnn", (1, 1, 49, 10), 12)
    biases, statistics = 9 * 64, 2 * 9 * 64  # Keras counts running statistics
    assert count(keywords) + biases + statistics == 24_908
    sizes = []
    keywords.blocks.register_forward_hook(lambda part, inputs, output: sizes.append(tuple(output.shape)))
    assert keywords(torch.randn(2, 1, 49, 10)).shape == (2, 12) and sizes == [(2, 64, 25, 5)]
    people = build_model("mobilenetv1", (1, 3, 96, 96), 2, 8)
    channels = [block[3].out_channels for block in people.blocks]
    assert channels == [16, 32, 32, 64, 64, *[128] * 6, 256, 256] and people.fc.weight.shape == (2, 256)


def test_mlperf_tinys_autoencoder_is_its_autoencoder():
    module = build_model("autoencoder", (1, 640), 640)
    assert count(module) == 267_928 and [part.out_features for part in module if isinstance(part, nn.Linear)] == [
        *[128] * 4,
        8,
        *[128] * 4,
        640,
    ]
    assert module(torch.randn(3, 640)).shape == (3, 640)


def test_large_images_shrink_by_four_in_a_resnets_stem():
    sizes = []
    for size in (32, 64, 96):
        module = build_model("resnet50", (1, 3, size, size), width=4).eval()
        module.layer1.register_forward_hook(lambda part, inputs, output: sizes.append(tuple(output.shape)))
        module(torch.randn(1, 3, size, size))
    assert sizes == [(1, 16, 32, 32), (1, 16, 16, 16), (1, 16, 24, 24)]
    assert build_model("resnet50", (1, 3, 64, 64), width=4).layer2[0].conv2.stride == (2, 2)


def test_small_images_keep_their_size_in_a_mobile_nets_stem():
    for name in ("mobilenetv1", "mobilenetv2", "efficientnet-lite0"):
        strides = [
            next(part for part in build_model(name, (1, 3, size, size)).modules() if isinstance(part, nn.Conv2d)).stride
            for size in (32, 64, 96)
        ]
        assert strides == [(1, 1), (2, 2), (2, 2)]


def test_mobile_nets_have_the_names_of_other_packages():
    names = set(build_model("mobilenetv2", (1, 3, 96, 96), width=8).state_dict())
    assert {
        "features.0.0.weight",
        "features.1.conv.0.1.running_var",
        "features.1.conv.1.weight",
        "features.2.conv.1.0.weight",
        "features.17.conv.3.bias",
        "features.18.1.weight",
        "classifier.1.bias",
    } <= names
    names = set(build_model("efficientnet-lite0", (1, 3, 96, 96), width=8).state_dict())
    assert {"conv_stem.weight", "blocks.0.0.conv_pw.weight", "blocks.6.0.bn3.bias", "bn2.weight"} <= names


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8)])
def test_every_model_takes_small_images(name, shape):
    module = build_model(name, (4, *shape), classes=7, width=4).eval()
    assert module(torch.randn(3, *shape)).shape == (3, 7)


def test_resnet_halves_an_8x8_image_twice():
    module = build_model("resnet20", (1, 1, 8, 8)).eval()
    sizes = []
    module.layer3.register_forward_hook(lambda part, inputs, output: sizes.append(tuple(output.shape)))
    module(torch.randn(1, 1, 8, 8))
    assert sizes == [(1, 64, 2, 2)]


def test_names_are_torchvisions():
    names = set(build_model("resnet20", (1, 3, 32, 32)).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer1.0.bn2.bias",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.running_var",
        "layer3.2.conv2.weight",
        "fc.weight",
        "fc.bias",
    } <= names
    assert "layer1.0.downsample.0.weight" not in names
    assert not [name for name in names if "conv" in name and name.endswith("bias")]
    assert build_model("resnet18", (1, 3, 32, 32), width=4).layer4[1].conv1.weight.shape == (32, 32, 3, 3)


def test_mlp_takes_features_or_images_and_any_width():
    assert build_model("mlp", (2, 30), classes=3, width=8)(torch.randn(2, 30)).shape == (2, 3)
    module = build_model("mlp", (2, 1, 28, 28))
    assert [tuple(layer.weight.shape) for layer in (module.fc1, module.fc2, module.fc3)] == [
        (1024, 784),
        (1024, 1024),
        (10, 1024),
    ]


def test_convolutions_start_kaiming_normal_fan_out():
    weight = build_model("resnet20", (1, 3, 32, 32), width=64).layer2[0].conv1.weight  # 64 -> 128 channels
    want = math.sqrt(2 / (128 * 9))
    # the sample deviation of n values is off by 1 / sqrt(2 n) of itself; 5 of these is beyond chance, fan-in is off by
    # 41%
    assert weight.std().item() == pytest.approx(want, rel=5 / math.sqrt(2 * weight.numel()))


def test_depthwise_convolutions_start_as_wide_as_what_one_input_gives():
    weight = build_model("mobilenetv1", (1, 3, 32, 32), width=64).blocks[12][0].weight  # 2048 channels
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=5 / math.sqrt(2 * weight.numel()))


def test_weights_follow_from_the_seed_and_torch_random_state_stays():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (build_model("resnet20", (1, 3, 8, 8), width=4, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_every_parameter_gets_a_gradient():
    for name in model_names():
        module = build_model(name, (4, 3, 16, 16), width=4).train()
        nn.functional.cross_entropy(module(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3])).backward()
        assert not [key for key, parameter in module.named_parameters() if parameter.grad is None], name


def test_bad_arguments_are_named():
    with pytest.raises(
        UnknownName,
        match="no model 'lenet'; there are: autoencoder, cct, deit-tiny, ds-cnn, .*, mlp, .*, vgg11, vgg19",
    ):
        build_model("lenet", (1, 3, 8, 8))
    with pytest.raises(SpecError, match=r"resnet20 takes an input_shape of \(N, C, H, W\), got \(2, 30\)"):
        build_model("resnet20", (2, 30))
    with pytest.raises(SpecError, match="width is 0; wanted a whole number of 1 or more"):
        build_model("vgg11", (1, 3, 8, 8), width=0)
    with pytest.raises(SpecError, match="classes is 0; wanted"):
        build_model("vgg11", (1, 3, 8, 8), classes=0)


def test_a_built_in_model_without_torch_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        NotInstalled, match=r"the built-in model mlp is made with torch.* pip install torch .*\.onnx file"
    ):
        build_model("mlp", (1, 3, 8, 8))
