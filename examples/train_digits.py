"""A first sparse training from Python: ResNet-20 on handwritten digits, 90% of the weights zero in 4x1 blocks, the mask
mutating.

python examples/train_digits.py            # 40 epochs
python examples/train_digits.py --quick    # 1 epoch of a narrow net, for the tests
"""

import argparse

import mest_compile as mest
from mest_compile.data import load
from mest_compile.models.catalog import build_model


class PrintEpochs:
    """What a Trainer tells about its progress."""

    def on_batch(self, epoch, epochs, batch, batches, loss, correct):
        pass

    def on_epoch(self, metrics):
        print(
            f"epoch {metrics['epoch']}: loss {metrics['loss']:.4f}, test accuracy {metrics['test_accuracy']:.2%}, "
            f"{metrics['images_per_second']:.0f} images/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch of a narrow net")
    quick = parser.parse_args().quick

    digits = load("digits")
    shape = (64, *digits.train.images.shape[1:])
    model = build_model("resnet20", shape, digits.train.classes, width=8 if quick else 16, seed=0)
    step = mest.compile(
        model, shape, scheme=mest.Block(4, 1), sparsity=0.9, optimizer=mest.SGD(momentum=0.9, weight_decay=1e-4)
    )
    recipe = mest.Recipe(epochs=1 if quick else 40, method="em", lr=0.1)
    run = mest.Trainer(step, recipe, progress=PrintEpochs()).fit(digits.train, digits.test)

    mest.to_torch(step, model)
    live = sum(mask.sum() for mask in step.masks().values())
    elems = sum(mask.size for mask in step.masks().values())
    print(f"test accuracy {run.test_accuracy:.2%} with {live} of {elems} weights alive in the masked layers")


if __name__ == "__main__":
    main()
