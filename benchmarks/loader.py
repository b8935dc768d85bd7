"""Images a second that the training's loader gives with the model removed, beside timm's own loader with the same transform.

    python benchmarks/loader.py FOLDER --img-size 224 --workers 0 2

FOLDER is an image folder; without one, 2,000 JPEGs of 500 x 375 pixels are made. Both loaders are timed in turn, several times. Above 64 px the transforms are the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_loader
from timm.data.dataset import ImageDataset

from s2h_cli.config import Recipe, configure
from s2h_cli.data import ImageSet, make_loader, open_splits

IMAGES, SIZE, CLASSES = 2000, (500, 375), ("class0", "class1")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--recipe", help="whose augmentation to use, such as imagenet")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or make_images(Path(made))
        recipe = configure({"model": "", "data": folder, "flops": 0.5}, args.recipe) if args.recipe else Recipe()
        images = open_splits(folder).train
        print(f"{len(images)} images of '{args.folder or 'made JPEGs, 500 x 375'}', to {args.img_size} px, recipe {args.recipe}")
        for workers in args.workers:
            found = speeds(images, folder, recipe, img_size=args.img_size, batch_size=args.batch_size, workers=workers, repeat=args.repeat)
            print(f"{workers} workers  " + "  ".join(f"{name} {statistics.median(each):.0f} images/s ({min(each):.0f} to {max(each):.0f})"
                                                    for name, each in found.items()))


def speeds(images: ImageSet, folder: str, recipe: Recipe, *, img_size: int, batch_size: int, workers: int, repeat: int) -> dict[str, list[float]]:
    """Images a second of each epoch, of s2h's loader of `images` and of timm's of the folder that they are from."""
    ours = make_loader(images, train=True, input_size=(3, img_size, img_size), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=0.95,
                       batch_size=batch_size, workers=workers, flip=True, recipe=recipe)
    theirs = create_loader(ImageDataset(folder), (3, img_size, img_size), batch_size, is_training=True, use_prefetcher=False,
                           num_workers=workers, mean=MEAN, std=STD, interpolation="bicubic", auto_augment=recipe.aa, re_prob=recipe.reprob,
                           re_mode="pixel", color_jitter=0.4 if recipe.color_jitter is None else recipe.color_jitter,
                           scale=(recipe.crop_min or 0.08, 1.0), persistent_workers=False)
    found = {"s2h": [], "timm": []}
    for epoch in range(repeat):
        ours.set_epoch(epoch)
        for name, loader in (("s2h", ours), ("timm", theirs)):
            started, seen = time.perf_counter(), 0
            for batch, _ in loader:
                seen += len(batch)
            found[name].append(seen / (time.perf_counter() - started))
    return found


def make_images(folder: Path, count: int = IMAGES) -> str:
    """JPEGs of smooth noise, in two classes: to decode they cost what photographs do."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)

    def make(i: int) -> None:
        small = Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8))
        small.resize(SIZE, Image.Resampling.BICUBIC).save(folder / CLASSES[i % 2] / f"{i}.jpg", quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow works outside of Python's lock
        list(pool.map(make, range(count)))
    return str(folder)


if __name__ == "__main__":
    main()
