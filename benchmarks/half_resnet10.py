"""The network of most tables of `accuracy.py`: timm's resnet10t at half its widths, so that many runs fit into an hour of a CPU."""

import timm


def half_resnet10(num_classes: int = 1000):
    return timm.create_model("resnet10t", channels=(32, 64, 128, 256), stem_width=16, num_classes=num_classes)
