"""Nets that tests train."""

from torch import nn

from mest_compile.models.catalog import build_model


class Mobile(nn.Module):
    """A mobile net in little: a block with a shortcut, one with a 5x5 kernel and a stride, then a grouped convolution,
    a dilated one in groups, and a depthwise one with two results a channel. 10 classes.

    No biases before batch_norm, as in test_schemes_step's net, nor a batch_norm right before another's convolution: its
    bias would have no gradient but rounding.
    """

    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.first, self.second = self.block(width, width, 3, 1), self.block(width, 2 * width, 5, 2)
        self.grouped = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2, groups=2)
        self.twice = nn.Conv2d(2 * width, 4 * width, 3, 2, padding=1, groups=2 * width)
        self.fc = nn.Linear(4 * width, 10)

    @staticmethod
    def block(inputs, outputs, kernel, stride):
        wide = 2 * inputs
        return nn.Sequential(
            *(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False),
            *(nn.BatchNorm2d(wide), nn.ReLU6(), nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.second((x + self.first(x)).relu())
        x = self.dilated(self.grouped(x).relu()).relu()
        return self.fc(self.twice(x).relu().mean((2, 3)))


def short_resnet(shape, width=8):
    """ResNet-20 with one block a stage in the place of three: the others have the same problems, and take their time to
    read, plan and compile. 10 classes."""
    model = build_model("resnet20", shape, 10, width)
    for stage in (model.layer1, model.layer2, model.layer3):
        del stage[1:]
    return model
