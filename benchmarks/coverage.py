"""Which of 160 models that people use are taken, and what the others are refused for.

    benchmarks/environments.sh coverage
    python benchmarks/coverage.py [--only PATTERN] [--verify]

writes benchmarks/results/coverage.json and the table in docs/models.md: 30 classifiers and 3 segmentation nets of
torchvision, 82 models of timm, 14 of transformers from small random configs, 31 nets of benchmarks/boards.py, with
random weights and 10 classes. Every model is imported in a process of its own; a run goes on where one of the same
versions was stopped.
--verify also trains the smallest model of every family that is taken for three steps beside torch, in float32 and in
float64, with the same masks and without dropping: as far as torch in float64 says, one is as good as the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = HERE / "environments" / "coverage"
RESULT, DOCUMENT = HERE / "results" / "coverage.json", HERE.parent / "docs" / "models.md"
CLASSES, LIMIT_SECONDS = 10, 600.0
STEPS, SCHEMES, SPARSITY = 3, ("unstructured", "block"), 0.5
AS_GOOD, TOLERANCE = 10.0, 1e-3  # times torch's own error in float32, and an error that is none

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


OPTIONS: dict[str, dict[str, Any]] = {  # of mest.compile, for models that give several values
    "torchvision:googlenet": {"output": "logits"},
    "torchvision:inception_v3": {"output": "logits"},
    "boards:two heads": {"output": 0},
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

    sys.path.insert(0, str(HERE))
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


def packages() -> None:
    """What the models need, found behind our own packages."""
    import torch

    if not PACKAGES.is_dir():
        sys.exit(f"{PACKAGES} is missing: benchmarks/environments.sh coverage makes it")
    sys.path.append(str(PACKAGES))
    for name in (
        "nms",
        "qnms",
    ):  # a torchvision for another torch than ours has its compiled part, which no model needs
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.set_num_threads(1)


def examine(case: Case) -> dict[str, Any]:
    """Whether the model is taken; {operator: layers} of what is refused."""
    import torch

    import mest_compile as mest

    torch.manual_seed(0)
    net, shape = case.make()
    start = time.perf_counter()
    found: dict[str, Any] = {
        "family": case.family,
        "source": case.source,
        "input_shape": list(shape),
        "parameters": sum(one.numel() for one in net.parameters()),
    }
    try:
        checked = mest.check(net, shape, **OPTIONS.get(case.name, {}))
    except mest.MestError as error:
        short = re.sub(r"\(.*?\)|'.*?'|[;:].*", "", str(error)).strip()
        found |= {"refused": {f"({short[:60]})": 1}, "words": str(error)}
    else:
        if not checked.taken:
            refused = Counter(one.operator or f"({one.what[:60]})" for one in checked.refused)
            found |= {"refused": dict(refused), "words": checked.words}
    return found | {"taken": "refused" not in found, "seconds": round(time.perf_counter() - start, 1)}


def verify(case: Case) -> dict[str, Any]:
    """{"verified": whether three steps of every scheme are as good as torch's, "errors": {scheme: [ours, torch's]}};
    errors of all weights and statistics together, relative to those of torch in float64."""
    import torch

    torch.manual_seed(0)
    net, shape = case.make()
    for part in net.modules():  # torch would draw other elements
        for name in ("p", "drop_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    errors = {scheme: _errors(net.train(), shape, scheme, OPTIONS.get(case.name, {})) for scheme in SCHEMES}
    good = all(ours <= max(TOLERANCE, AS_GOOD * theirs) for ours, theirs in errors.values())
    return {"verified": good, "errors": errors}


def _errors(net: Any, shape: tuple[Any, ...], scheme: str, options: dict[str, Any]) -> list[float]:
    import copy

    import numpy as np
    import torch

    import mest_compile as mest

    rule = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
    step = mest.compile(net, shape, scheme, SPARSITY, optimizer=mest.SGD(**rule), threads=1, **options)
    masks = {name: torch.from_numpy(mask) for name, mask in step.masks().items()}
    twins = [copy.deepcopy(net).to(kind) for kind in (torch.float32, torch.float64)]
    optimizers = [torch.optim.SGD(twin.parameters(), **rule) for twin in twins]
    for twin in twins:
        twin.load_state_dict({name: torch.from_numpy(array) for name, array in step.state_dict().items()})
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        several = shape if isinstance(shape[0], tuple) else (shape,)
        inputs = tuple(rng.standard_normal(one, dtype=np.float32) for one in several)
        if any(isinstance(part, torch.nn.Embedding) for part in net.modules()):
            inputs = tuple(np.abs(one) for one in inputs)  # of which it takes the whole part
        labels = rng.integers(0, step.classes, (several[0][0], *step.output_shape[2:]))
        step(inputs if len(inputs) > 1 else inputs[0], labels)
        for twin, optimizer in zip(twins, optimizers):
            optimizer.zero_grad()
            output = twin(*(torch.from_numpy(one).to(next(twin.parameters()).dtype) for one in inputs))
            output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
            torch.nn.functional.cross_entropy(output, torch.from_numpy(labels)).backward()
            optimizer.step()
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    if name in masks:
                        parameter *= masks[name]
    theirs, exact = ({name: value.double().numpy() for name, value in twin.state_dict().items()} for twin in twins)
    size = sum(float((value**2).sum()) for value in exact.values()) ** 0.5
    return [
        sum(float(((one[name] - value) ** 2).sum()) for name, value in exact.items()) ** 0.5 / size
        for one in (step.state_dict(), theirs)
    ]


def apart(work: Callable[[Case], dict[str, Any]], case: Case, limit_seconds: float) -> dict[str, Any]:
    """What `work` finds in a process of its own; {"failed": why} where that ends without a result."""
    context = multiprocessing.get_context("fork")  # torch and tvm are loaded once
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            theirs.send(work(case))
        except BaseException as error:
            theirs.send({"failed": f"{type(error).__name__}: {error}"[:300]})

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(limit_seconds) else {"failed": f"not done in {limit_seconds:g} s"}
    except EOFError:
        process.join()
        found = {"failed": f"ended with {process.exitcode}"}
    process.kill()
    process.join()
    return {"family": case.family, "source": case.source, "taken": False} | found


def versions() -> dict[str, str]:
    """Of what decides the answers."""
    names = ("apache-tvm", "torch", "timm", "torchvision", "transformers")
    return {name: metadata.version(name) for name in names}


def missing(models: dict[str, dict[str, Any]]) -> list[tuple[str, int, int, int]]:
    """(operator, models that lack it, those that lack nothing else, those that lack at most two others), most wanted
    first."""
    needs: dict[str, list[int]] = defaultdict(list)
    for model in models.values():
        lacks = set(model.get("refused", ()))
        if "failed" in model:
            lacks.add(f"({model['failed'].partition(':')[0]})")
        for operator in lacks:
            needs[operator].append(len(lacks))
    rows = [(name, len(n), n.count(1), sum(one <= 3 for one in n)) for name, n in needs.items()]
    return sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))


def summary(models: dict[str, dict[str, Any]]) -> str:
    taken = [model for model in models.values() if model["taken"]]
    families = {model["family"] for model in models.values()}
    lines = [
        f"taken: {len(taken)} of {len(models)} models, "
        f"{len({model['family'] for model in taken})} of {len(families)} families",
        "",
        "operator                       needs  alone  <=3",
    ]
    lines += [f"{name[:60]:30} {needs:5} {alone:6} {few:4}" for name, needs, alone, few in missing(models)]
    lines += ["", "model: what it lacks"]
    for name, model in models.items():
        if not model["taken"]:
            lines.append(f"{name}: {model.get('failed') or ', '.join(model['refused'])}")
    return "\n".join(lines)


def table(models: dict[str, dict[str, Any]]) -> str:
    """In Markdown: by source, then what the others lack."""
    lines = ["| models of | taken | families taken | not taken, and what is refused |", "|---|---:|---:|---|"]
    for source in dict.fromkeys(model["source"] for model in models.values()):
        there = {name: model for name, model in models.items() if model["source"] == source}
        taken = [model for model in there.values() if model["taken"]]
        families = [len({model["family"] for model in some}) for some in (taken, there.values())]
        others = "; ".join(
            f"{name.partition(':')[2]}: {model.get('failed') or ', '.join(model['refused'])}"
            for name, model in there.items()
            if not model["taken"]
        )
        lines.append(f"| {source} | {len(taken)} of {len(there)} | {families[0]} of {families[1]} | {others} |")
    return "\n".join([summary(models).partition("\n")[0].capitalize() + ".", "", *lines])


def write_table(models: dict[str, dict[str, Any]]) -> None:
    before, after = "<!-- coverage table: begin -->\n", "<!-- coverage table: end -->"
    text = DOCUMENT.read_text()
    start, end = text.index(before) + len(before), text.index(after)
    DOCUMENT.write_text(f"{text[:start]}\n{table(models)}\n\n{text[end:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="shell pattern of models, timm:* for instance")
    parser.add_argument("--verify", action="store_true", help="train every family's smallest model beside torch, too")
    parser.add_argument("--fresh", action="store_true", help="ask again what is known already")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for a model")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    packages()
    import timm  # noqa: F401  # before processes are made
    import tvm.relax.frontend.torch  # noqa: F401

    held = json.loads(given.out.read_text()) if given.out.exists() else {}
    if held.get("versions") != versions():
        held = {"versions": versions(), "models": {}}
    for case in cases():
        if fnmatch(case.name, given.only) and (given.fresh or case.name not in held["models"]):
            held["models"][case.name] = found = apart(examine, case, given.limit)
            words = found.get("failed") or ", ".join(found.get("refused", ())) or "taken"
            print(f"{case.name}: {words}", file=sys.stderr)
            given.out.write_text(json.dumps(held, indent=1) + "\n")
    models = held["models"]
    smallest: dict[str, str] = {}
    for name in sorted(models, key=lambda name: models[name].get("parameters", 0)):
        if models[name]["taken"]:
            smallest.setdefault(models[name]["family"], name)
    for case in cases() if given.verify else ():
        if (
            smallest.get(case.family) == case.name
            and fnmatch(case.name, given.only)
            and "verified" not in models[case.name]
        ):
            found = {"verified": False} | apart(verify, case, given.limit)
            models[case.name] |= {name: found[name] for name in ("verified", "errors", "failed") if name in found}
            print(f"{case.name}: {'as torch' if found['verified'] else found}", file=sys.stderr)
            given.out.write_text(json.dumps(held, indent=1) + "\n")
    print(summary(models))
    if given.out == RESULT and {case.name for case in cases()} <= models.keys():
        write_table({case.name: models[case.name] for case in cases()})


if __name__ == "__main__":
    main()
