"""The 160 models of benchmarks/coverage.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASSES = 10

TORCHVISION = """
alexnet: alexnet; convnext: convnext_tiny; densenet: densenet121; efficientnet: efficientnet_b0; efficientnetv2:
efficientnet_v2_s; googlenet: googlenet; inception: inception_v3; maxvit: maxvit_t; mnasnet: mnasnet0_5 mnasnet1_0;
mobilenet v2: mobilenet_v2; mobilenet v3: mobilenet_v3_small mobilenet_v3_large; regnet: regnet_x_400mf
regnet_y_400mf; resnet: resnet18 resnet34 resnet50 wide_resnet50_2; resnext: resnext50_32x4d; shufflenet:
shufflenet_v2_x0_5 shufflenet_v2_x1_0; squeezenet: squeezenet1_0 squeezenet1_1; swin: swin_t swin_v2_t; vgg: vgg11
vgg11_bn vgg16; vit: vit_b_16
"""
SEGMENTATION = """
deeplab: deeplabv3_mobilenet_v3_large; fcn: fcn_resnet50; lr-aspp: lraspp_mobilenet_v3_large
"""
TIMM = """
convmixer: convmixer_768_32; convnext: convnext_atto; convnextv2: convnextv2_atto; cspdarknet: cspdarknet53;
darknet: darknet53; deit: deit_tiny_patch16_224; densenet: densenet121; dla: dla34; ecaresnet: ecaresnet26t;
edgenext: edgenext_xx_small; efficientformerv2: efficientformerv2_s0; efficientnet: efficientnet_b0
tf_efficientnet_b0; efficientnet-lite: efficientnet_lite0 tf_efficientnet_lite0; efficientnetv2:
tf_efficientnetv2_b0 efficientnetv2_rw_t; efficientvit: efficientvit_b0 efficientvit_m0; ese_vovnet:
ese_vovnet19b_dw; fasternet: fasternet_t0; fastvit: fastvit_t8; fbnetc: fbnetc_100; fbnetv3: fbnetv3_b; gernet:
gernet_s; ghostnet: ghostnet_050 ghostnet_100; ghostnetv3: ghostnetv3_050; gmlp: gmlp_ti16_224; hardcorenas:
hardcorenas_a; hgnetv2: hgnetv2_b0; hrnet: hrnet_w18_small; inception_next: inception_next_atto; lcnet: lcnet_050
lcnet_100; levit: levit_128s; mixer: mixer_s32_224; mixnet: mixnet_s; mnasnet: mnasnet_small mnasnet_100;
mobilenet_edgetpu: mobilenet_edgetpu_100; mobilenet v1: mobilenetv1_100; mobilenet v2: mobilenetv2_050
mobilenetv2_100; mobilenet v3: mobilenetv3_small_050 mobilenetv3_small_100 mobilenetv3_large_100; mobilenet v4:
mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_hybrid_medium; mobileone: mobileone_s0; mobilevit:
mobilevit_xxs; mobilevitv2: mobilevitv2_050; poolformer: poolformer_s12; regnet: regnetx_002 regnety_002; regnetz:
regnetz_005; repghostnet: repghostnet_050; repvgg: repvgg_a0; repvit: repvit_m0_9; res2net: res2net50_14w_8s;
resmlp: resmlp_12_224; resnet: resnet10t resnet14t resnet18 resnet18d resnet26 test_resnet; resnext:
resnext50_32x4d; rexnet: rexnet_100; selecsls: selecsls42; semnasnet: semnasnet_075; seresnet: seresnet18; shvit:
shvit_s1; spnasnet: spnasnet_100; starnet: starnet_s1; swin: swin_tiny_patch4_window7_224; tiny_vit:
tiny_vit_5m_224; tinynet: tinynet_a tinynet_e; vit: vit_tiny_patch16_224; vovnet: vovnet39a
"""
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
SMALL_DEPTHS = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> (family, class, config)
    "resnet, basic": ("resnet", "ResNet", SMALL_DEPTHS | {"layer_type": "basic", "embedding_size": 16}),
    "resnet, bottleneck": ("resnet", "ResNet", SMALL_DEPTHS | {"layer_type": "bottleneck", "embedding_size": 16}),
    "regnet": ("regnet", "RegNet", SMALL_DEPTHS | {"groups_width": 8, "embedding_size": 16}),
    "mobilenet v1": ("mobilenet v1", "MobileNetV1", {"depth_multiplier": 0.25}),
    "mobilenet v2": ("mobilenet v2", "MobileNetV2", {"depth_multiplier": 0.35}),
    "efficientnet": (
        "efficientnet",
        "EfficientNet",
        {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    ),
    "convnext": ("convnext", "ConvNext", SMALL_DEPTHS),
    "convnext v2": ("convnextv2", "ConvNextV2", SMALL_DEPTHS),
    "vit": ("vit", "ViT", SMALL | {"patch_size": 8}),
    "deit": ("deit", "DeiT", SMALL | {"patch_size": 8}),
    "swin": (
        "swin",
        "Swin",
        {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    ),
    "poolformer": ("poolformer", "PoolFormer", SMALL_DEPTHS),
    "mobilevit": (
        "mobilevit",
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96]},
    ),
    "mobilevit v2": ("mobilevitv2", "MobileViTV2", {"image_size": 64, "width_multiplier": 0.25}),
}  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {  # of mest.compile, for models that give several values, or a number
    "torchvision:googlenet": {"output": "logits"},
    "torchvision:inception_v3": {"output": "logits"},
    "boards:two heads": {"output": 0},
    "boards:regression to one number": {"loss": "mse"},
}


@dataclass(frozen=True)
class Case:
    """A model; make() gives the module and input_shape."""

    name: str
    source: str
    family: str
    make: Callable[[], tuple[Any, tuple[int, ...]]]


def _named(text: str) -> list[tuple[str, str]]:
    """(name, family) of "family: name name; family: ..."."""
    parts = (part.partition(":") for part in text.replace("\n", " ").split(";"))
    return [(name, family.strip()) for family, _, names in parts for name in names.split()]


def cases() -> list[Case]:
    """All 160. Nothing is imported before one is made."""

    def torchvision(name: str) -> tuple[Any, tuple[int, ...]]:
        from torchvision import models

        sizes = {"inception_v3": 299, "maxvit_t": 224, "vit_b_16": 224}
        more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, num_classes=CLASSES, **more), (4, 3, *[sizes.get(name, 64)] * 2)

    def segmentation(name: str) -> tuple[Any, tuple[int, ...]]:
        import torch
        from torchvision import models

        class Maps(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = models.get_model(name, weights=None, weights_backbone=None, num_classes=4)

            def forward(self, x: Any) -> Any:
                return self.net(x)["out"]

        return Maps(), (2, 3, 64, 64)

    def timm(name: str) -> tuple[Any, tuple[int, ...]]:
        import timm

        net = timm.create_model(name, num_classes=CLASSES)
        fixed = net.pretrained_cfg.get("fixed_input_size", False)
        return net, (4, *(net.pretrained_cfg["input_size"] if fixed else (3, 64, 64)))

    def transformers(name: str) -> tuple[Any, tuple[int, ...]]:
        import transformers

        _, kind, config = TRANSFORMERS[name]
        settings = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **config)
        size = config.get("image_size", 64)
        return getattr(transformers, f"{kind}ForImageClassification")(settings), (4, 3, size, size)

    def own(name: str) -> tuple[Any, tuple[int, ...]]:
        _, shape, make = boards.BOARDS[name]
        return make(), shape

    sys.path.insert(0, str(Path(__file__).parent))
    import boards

    lists: list[tuple[str, list[tuple[str, str]], Any]] = [
        ("torchvision", _named(TORCHVISION), torchvision),
        ("torchvision segmentation", _named(SEGMENTATION), segmentation),
        ("timm", _named(TIMM), timm),
        ("transformers", [(name, family) for name, (family, _, _) in TRANSFORMERS.items()], transformers),
        ("boards", [(name, family) for name, (family, _, _) in boards.BOARDS.items()], own),
    ]
    return [
        Case(f"{source}:{name}", source, family, lambda make=make, name=name: make(name))  # type: ignore[misc]
        for source, listed, make in lists
        for name, family in listed
    ]
