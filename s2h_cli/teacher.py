"""`--teacher`: a trained network of the same classes, whose logits are learnt beside the targets."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from . import artifacts, hub
from .errors import UserError, why
from .source import Source, is_run, load_source, on_blank
from .train.evaluate import top1
from .train.loop import first_batches

#: The network that a run starts from, and no one, as teachers.
START, NO_ONE = "start", "none"
#: Training images on which is seen whether the start knows the classes.
TRIED_IMAGES = 1024

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")


class Teacher(nn.Module):
    """A network behind another preprocessing: takes images (N, C, H, W) as its pupil sees them, gives logits (N, classes)."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float], pupil: Source):
        super().__init__()
        self.network = network
        theirs, ours = [[torch.tensor(v).view(-1, 1, 1) for v in pair] for pair in ((mean, std), (pupil.mean, pupil.std))]
        self.register_buffer("scale", ours[1] / theirs[1])
        self.register_buffer("shift", (ours[0] - theirs[0]) / theirs[1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images * self.scale + self.shift)


def start(network: nn.Module) -> nn.Module:
    """A network as it is now, to learn from."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def knows(network: nn.Module, train: DataLoader, batch_size: int, classes: int, device: torch.device) -> float | None:
    """Accuracy in percent of a network in eval mode on the first training images, where it is above chance by five standard errors."""
    count = max(1, TRIED_IMAGES // batch_size)
    found, chance = top1(network, first_batches(train, count), device), 100 / classes
    images = min(count * batch_size, len(train.dataset))
    return found if found > chance + 5 * (chance * (100 - chance) / images) ** 0.5 else None


def load_teacher(spec: str, pupil: Source, classes: list[str], device: torch.device) -> Teacher:
    """Loads what `--teacher` names: the folder of a run, a file of weights of the pupil's own model, or a model with trained weights.

    Raises:
        UserError: it cannot be loaded, has no trained weights, or is of other classes.
    """
    path = Path(spec)
    if is_run(spec):
        path = hub.local(spec)
        plan, network, _ = artifacts.read(path, needs=("data",))
        data = plan["data"]
        if data["classes"] != classes:
            raise UserError(f"the teacher '{spec}' knows other classes ({', '.join(data['classes'][:5])}, ...); give one trained on these")
        mean, std = data["mean"], data["std"]
    else:
        if path.suffix in WEIGHTS:
            source = load_source(pupil.spec, num_classes=len(classes), weights=path, img_size=pupil.input_size[1])
        else:
            source = load_source(spec, img_size=pupil.input_size[1])
        if not source.may_know:
            raise UserError(f"the teacher '{spec}' has no trained weights for these classes; give a file of weights, or a run's folder")
        network, mean, std = source.module, source.mean, source.std
    try:
        found = on_blank(network.eval(), pupil.input_size).shape[-1]
    except Exception as error:  # whatever a model's own code raises
        size = "x".join(map(str, pupil.input_size))
        raise UserError(f"the teacher '{spec}' cannot take images of {size} ({why(error)}); give the --img-size that it was trained at") from error
    if found != len(classes):
        raise UserError(f"the teacher '{spec}' gives {found} classes, the data has {len(classes)}; give one trained on this data")
    return Teacher(network, mean, std, pupil).eval().requires_grad_(False).to(device)
