"""A recipe's pieces, all of them timm's: optimizer, schedule, mixing of images, loss, moving average."""

from __future__ import annotations

import difflib
import math
from typing import Callable

import torch
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from .. import distributed, ranges
from ..config import Recipe
from ..errors import UserError, why

#: The schedules of timm that move step by step.
SCHEDULES = ("cosine", "tanh", "poly", "step", "multistep")
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check(recipe: Recipe) -> None:
    """Raises UserError for a setting out of its range, for an optimizer or a schedule that timm does not have."""
    ranges.check(vars(recipe))
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % (2 * distributed.WORLD):
        raise UserError(f"--mixup and --cutmix mix pairs of images; make --batch-size {recipe.batch_size} a multiple of {2 * distributed.WORLD}")
    if recipe.amp_dtype not in AMP_DTYPES:
        raise UserError(f"no --amp-dtype {recipe.amp_dtype}; choose from {', '.join(AMP_DTYPES)}")
    if recipe.opt.lower() not in list_optimizers():
        near = difflib.get_close_matches(recipe.opt.lower(), list_optimizers(), 3) or ["adamw", "sgd", "lamb"]
        raise UserError(f"no optimizer {recipe.opt!r}; timm has {', '.join(near)} and others")
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    try:
        create_optimizer_v2([weight], opt=recipe.opt, lr=0.1, momentum=recipe.momentum).step()
    except Exception as error:  # packages that are missing, second derivatives, a GPU: each says so in its own way
        raise UserError(f"--opt {recipe.opt} with --momentum {recipe.momentum:g} does not work here ({why(error)}); take another, such as adamw") from error
    if recipe.sched not in SCHEDULES:
        raise UserError(f"no schedule {recipe.sched!r}; choose from {', '.join(SCHEDULES)}")
    if recipe.aa:
        if recipe.color_jitter and not recipe.aa.startswith("3a"):
            raise UserError(f"--aa {recipe.aa} takes the place of --color-jitter; leave one of them away")
        try:
            create_transform(32, is_training=True, auto_augment=recipe.aa)
        except Exception as error:  # asserts and key errors of timm's parser
            raise UserError(f"--aa {recipe.aa} is no augmentation policy of timm; try rand-m9-mstd0.5-inc1 or original") from error


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of a captured network. What a timm model says of its layers, the network says too.

    Raises:
        UserError: the layers of the model are in no order, so that their rates cannot decay.
    """
    if recipe.layer_decay and not hasattr(network, "group_matcher"):
        raise UserError("--layer-decay needs a model that tells the order of its layers (group_matcher), as timm's do; leave it away, or take it out of the recipe")
    return create_optimizer_v2(network, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum,
                               layer_decay=recipe.layer_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, updates: int) -> Scheduler:
    """The schedule over `updates` updates of the weights an epoch; a twentieth of the epochs warms up, a hundredth of the rate stays. `step` falls to
    a tenth after each third of the epochs, `multistep` after one half and three quarters."""
    warmup = recipe.epochs // 20 if recipe.warmup_epochs is None else min(recipe.warmup_epochs, recipe.epochs)
    least = recipe.lr * 0.01 if recipe.min_lr is None else recipe.min_lr
    scheduler, _ = create_scheduler_v2(optimizer, sched=recipe.sched, num_epochs=recipe.epochs, step_on_epochs=False,
                                       warmup_epochs=warmup, warmup_lr=recipe.lr * 0.01, min_lr=least, updates_per_epoch=updates,
                                       decay_epochs=max(1, recipe.epochs // 3), decay_milestones=[recipe.epochs // 2, recipe.epochs * 3 // 4])
    return scheduler


def make_mixup(recipe: Recipe, classes: int) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """Mixes images (N, C, H, W) in pairs and turns their classes (N,) into shares (N, classes); None where the recipe asks for none.

    Where N is odd, since an image cannot be read or the whole set is smaller than a batch, the last image has no partner and is left out.
    """
    if not (recipe.mixup or recipe.cutmix):
        return None
    mixup = Mixup(mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)

    def mix(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = len(images) // 2
        if pairs == 0:
            raise UserError("--mixup and --cutmix mix pairs of images, and a batch holds one; raise --batch-size, or leave them away")
        return mixup(images[:2 * pairs], targets[:2 * pairs])

    return mix


def make_criterion(recipe: Recipe) -> nn.Module:
    """The task's loss of logits (N, classes) and what the loader, or the mixing, gives as targets."""
    mixes = recipe.mixup or recipe.cutmix
    return SoftTargetCrossEntropy() if mixes else nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)


def make_ema(network: nn.Module, recipe: Recipe) -> ModelEmaV3 | None:
    """A moving average of the weights, of a decay that grows to the recipe's; None where the recipe asks for none."""
    return ModelEmaV3(network, decay=recipe.ema, use_warmup=True) if recipe.ema else None


def default_lr(batch_size: int) -> float:
    """Peak learning rate of AdamW: 0.001 at 64 images a step, times the root of their number; from trained weights too, since what is left
    of a network learns anew (docs/method.md)."""
    return 1e-3 * math.sqrt(batch_size / 64)
