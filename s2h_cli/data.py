"""Opens image data sets and feeds them to training and evaluation."""

import copy
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate, get_worker_info

from .config import Recipe
from .errors import UserError, why
from .folders import describe_left_out, find_layout, identical, listed, scan
from .pixels import decode

TIMM_PREFIXES = ("torch/", "hfds/")
STREAM_PREFIXES = ("hfids/", "wds/", "tfds/")  # timm reads them, but in no order that repeats
DIGITS_VAL_FRACTION = 0.2
SMALL_IMAGE = 64  # pixels; images up to this side are cropped gently and keep their colours
SEED_RANGE = 2**62


@dataclass
class Splits:
    """A data set split for training and validation.

    Attributes:
        train: Images to train on; pass it to make_loader.
        val: Images to evaluate on; pass it to make_loader.
        class_names: Name of each class, by target.
        notes: What the user should know about how the data was read.
        flip: Whether a mirrored image still shows its class (not so for digits).
    """

    train: "ImageSet"
    val: "ImageSet"
    class_names: list[str]
    notes: list[str]
    flip: bool


class ImageSet(Dataset):
    """Labelled images, of which one that cannot be read is named and never replaced by another.

    An item is the transformed image with its target. For an unreadable image it is None with
    skip_bad, else the message of the error, which the loader raises in the main process.
    """

    transform = None
    mode = "RGB"
    epoch_seed = 0
    reading = None  # for each worker the image that it reads

    def __init__(self, source: Sequence, origin: str, skip_bad: bool):
        """Wraps a sequence of images.

        Args:
            source: Pairs of an image (a path, an open file or a PIL image) and its target.
            origin: What to call the source in messages.
            skip_bad: Leave unreadable images out, and count them, in place of stopping.
        """
        self.source = source
        self.origin = origin
        self.skip_bad = skip_bad
        self.bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # also set by workers

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Names an image: its path, if it is a file."""
        return str(self.source[index][0]) if isinstance(self.source, list) else f"{self.origin} image {index}"

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | str | None:
        worker = get_worker_info()
        if worker:
            self.reading[worker.id] = index
        try:
            image, target = self.source[index]
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            with image:
                image = decode(image, self.mode)
        except Exception as error:  # Pillow's decoders raise errors of many types
            self.bad[index] = True
            if self.skip_bad:
                return None
            return f"cannot read image '{self.name(index)}' ({why(error)}); mend it or pass --skip-bad-images"
        with _randomness(self.epoch_seed + index):
            return self.transform(image), int(target)


@contextmanager
def _randomness(seed: int) -> Iterator[None]:
    """Runs a block with its own random numbers, and leaves those of the training untouched."""
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # timm's augmentation policies draw from all three
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)


def some(images: ImageSet, count: int) -> ImageSet:
    """So many images of a set, drawn at random, always the same; all where there are fewer."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    source = [images.source[i] for i in chosen] if isinstance(images.source, list) else Subset(images.source, chosen)
    return ImageSet(source, images.origin, images.skip_bad)


def bad_images(dataset: ImageSet) -> list[str]:
    """Names the images of a set that could not be read so far, each once, in the set's order."""
    return [dataset.name(index) for index in dataset.bad.nonzero().flatten().tolist()]


def open_splits(spec: str, *, val_fraction: float = 0.1, skip_bad_images: bool = False) -> Splits:
    """Opens the data set that a DATA string names.

    Args:
        spec: A folder with ``train/`` and ``val/`` (by any name of `folders.SPLIT_NAMES`), each with one
            folder per class; a folder with one folder per class; ``digits``; or a timm data set
            such as ``torch/cifar100`` or ``hfds/NAME``. A folder by such a name is ``./digits``.
        val_fraction: Share of each class to validate on, where a folder has no split of its own: always the same images, so that no run
            validates on what the network that it starts from, or learns from, was trained on.
        skip_bad_images: Leave unreadable images out, and count them, in place of stopping.

    Returns:
        The two sets with their class names.

    Raises:
        UserError: The data cannot be found, or is not fit to train on.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"the share of images to validate on is {val_fraction}; give one between 0 and 1")
    if spec == "digits":
        return _open_digits()
    if spec.lower().startswith(STREAM_PREFIXES):
        raise UserError(
            f"'{spec}' is a stream, which cannot be read in an order that repeats; use hfds/, torch/ or an image folder"
        )
    if spec.lower().startswith(TIMM_PREFIXES):
        return _open_timm(spec, skip_bad_images)
    return _open_folder(spec, val_fraction, skip_bad_images)


def _open_folder(spec: str, val_fraction: float, skip_bad: bool) -> Splits:
    layout = find_layout(spec)
    roots = [layout.train] if layout.val is None else [layout.train, layout.val]
    found = scan(roots)
    left_out = describe_left_out(found.left_out)
    notes = [*found.notes, *([f"left out: {left_out}"] if left_out else []), *layout.notes]
    for root, classes in zip(roots, found.classes):
        if not any(classes.values()):
            raise UserError(f"no images in class folders of '{root}'; put each class's images into a folder of its own"
                            f" ({f'left out: {left_out}' if left_out else 'it has no files'})")
    train = found.classes[0]
    if empty := [name for name in train if not train[name]]:
        raise UserError(f"no images in class folder {listed(empty)} of '{layout.train}'; add some or remove the folder")
    if len(train) == 1:
        raise UserError(f"'{layout.train}' has one class, '{listed(train)}'; give a folder with two or more class folders")
    class_names = sorted(train)
    if layout.val is None:
        if lonely := [name for name in class_names if len(train[name]) < 2]:
            raise UserError(f"'{layout.train}' has only 1 image of class {listed(lonely)}, too few to split; add more images")
        samples = _split(_samples(train, class_names), val_fraction)
        notes.append(f"'{layout.train}' was split: {len(samples[0])} images to train on, {len(samples[1])} to validate on")
    else:
        val = {name for name, paths in found.classes[1].items() if paths}
        lacks = set(class_names) - val
        if more := val - set(class_names):
            raise UserError(f"'{layout.train}' and '{layout.val}' differ in classes: only the first has {listed(lacks)}, "
                            f"only the second {listed(more)}; give both the same class folders")
        if lacks:
            notes.append(f"'{layout.val}' has no images of class {listed(lacks)}: accuracy says nothing about it")
        samples = [_samples(classes, class_names) for classes in found.classes]
    return Splits(*(ImageSet(part, spec, skip_bad) for part in samples), class_names, notes, True)


def _samples(classes: dict[str, list[str]], class_names: list[str]) -> list[tuple[str, int]]:
    """(path, target) pairs, by class and path."""
    return [(path, target) for target, name in enumerate(class_names) for path in classes.get(name, [])]


def class_sizes(images: ImageSet) -> tuple[int, int] | None:
    """The least and most images of a class, where the targets are known without reading the images."""
    if not isinstance(images.source, list):
        return None
    counts = Counter(target for _, target in images.source).values()
    return min(counts), max(counts)


def shared_images(splits: Splits) -> list[str]:
    """Notes on validation files that are training files too, by their content."""
    train, val = ([item for item, _ in part.source if isinstance(item, str)] if isinstance(part.source, list) else []
                  for part in (splits.train, splits.val))
    twins = identical(train, val)
    notes = []
    if twins.pairs:
        notes.append(f"{len(twins.pairs)} validation images are training images too, byte for byte, such as '{twins.pairs[0][0]}' and "
                     f"'{twins.pairs[0][1]}': accuracy comes out too high")
    if not twins.complete:
        notes.append("not all training and validation images were compared with each other: there are too many for the time")
    return notes


def _split(samples: list, val_fraction: float) -> tuple[list, list]:
    """Splits (image, target) pairs so that each class has the share, but at least one, in both parts."""
    by_class = {}
    for sample in samples:
        by_class.setdefault(sample[1], []).append(sample)
    shuffler = random.Random(0)
    train, val = [], []
    for target in sorted(by_class):
        members = by_class[target]
        shuffler.shuffle(members)
        count = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        val += members[:count]
        train += members[count:]
    return train, val


def _open_digits() -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits need scikit-learn; install it with: pip install scikit-learn") from None
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), from 0..16
    samples = [(Image.fromarray(image).convert("RGB"), int(target)) for image, target in zip(images, digits.target)]
    train, val = _split(samples, DIGITS_VAL_FRACTION)
    class_names = [str(name) for name in digits.target_names]
    return Splits(ImageSet(train, "digits", False), ImageSet(val, "digits", False), class_names, [], False)


def _open_timm(spec: str, skip_bad: bool) -> Splits:
    train, val = _create(spec, "train"), _create(spec, "validation", "test")
    if isinstance(train, ImageDataset):  # its reader does not put another image in place of a bad one
        train, val = train.reader, val.reader
        class_names = sorted(train.class_to_idx, key=train.class_to_idx.get)
    else:
        class_names = getattr(train, "classes", None)
    if not class_names:
        raise UserError(f"'{spec}' does not tell the names of its classes; use another data set or an image folder")
    flip = "mnist" not in spec.lower()
    return Splits(
        ImageSet(train, f"{spec} train", skip_bad), ImageSet(val, f"{spec} val", skip_bad),
        [str(name) for name in class_names], [], flip,
    )  # fmt: skip


def _create(spec: str, *splits: str) -> Dataset:
    """Opens the first of the named splits that a timm data set has, downloading it if need be."""
    root = os.path.join(os.path.dirname(torch.hub.get_dir()), "datasets") if spec.lower().startswith("torch/") else None
    for split in splits:
        try:
            return create_dataset(spec, root=root, split=split, download=True)
        except Exception as error:
            if isinstance(error, ValueError) and "split" in str(error) and split != splits[-1]:
                continue  # the next name may be the right one
            raise UserError(
                f"timm cannot open '{spec}' split '{split}' ({why(error)}); check the name, the network and its package"
            ) from error


class _Batches(Sampler[list[int]]):
    """The images of each batch. Those of training are drawn anew each epoch, and every process takes its share of a batch; those
    of evaluation come in their order, and every process takes its share of the set."""

    def __init__(self, size: int, batch_size: int, train: bool, seed: int, rank: int, world: int):
        self.size, self.batch_size, self.train, self.seed, self.rank, self.world = size, batch_size, train, seed, rank, world
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        self.epoch_seed = int(np.random.SeedSequence([self.seed % 2**32, epoch]).generate_state(1, np.uint64)[0] % SEED_RANGE)
        self.skip = skip

    def __len__(self) -> int:
        if self.train:  # the last incomplete batch is left out, unless it is the only one
            return max(1, self.size // self.batch_size)
        return -(-len(range(self.rank, self.size, self.world)) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.train:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch_seed))
            batches = [batch[self.rank :: self.world] for batch in order.split(self.batch_size)]
        else:
            batches = torch.arange(self.rank, self.size, self.world).split(self.batch_size)
        for batch in batches[self.skip : len(self)]:
            yield batch.tolist()


class _Loader(DataLoader):
    """Batches whose order and augmentation follow from the seed and the epoch alone, not from the workers.

    Attributes:
        position: Batches of the epoch that were given out, or left out since none of their images could be read.
    """

    def __init__(self, dataset: ImageSet, batches: _Batches, **options):
        super().__init__(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
        self.position = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Says which epoch the next iteration is of, and how many of its batches are left out."""
        self.batch_sampler.set_epoch(epoch, skip)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.dataset.epoch_seed = self.batch_sampler.epoch_seed
        self.dataset.reading = torch.full((max(1, self.num_workers),), -1).share_memory_()
        self.position = self.batch_sampler.skip
        empty = True
        for batch in super().__iter__():
            self.position += 1
            if isinstance(batch, str):
                raise UserError(batch)
            if batch is not None:
                empty = False
                yield batch
            elif self.batch_sampler.world > 1:
                raise UserError(f"no image of a batch of '{self.dataset.origin}' can be read, and the other processes wait; check the files")
        if empty and self.position > self.batch_sampler.skip:
            raise UserError(f"no image of '{self.dataset.origin}' can be read; check the files")


@contextmanager
def naming_images(*loaders: _Loader) -> Iterator[None]:
    """Where a process that loads images dies, which torch reports wherever the program is at that moment, says which it was reading.

    Raises:
        UserError: a process died.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:  # the last two where it died while it handed a batch over
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        sets = [loader.dataset for loader in loaders if loader.dataset.reading is not None]
        read = [f"'{images.name(index)}'" for images in sets for index in images.reading.tolist() if index >= 0]
        raise UserError(f"a process that loads images died ({why(error)}); the images last read were {', '.join(read)}: one of them may "
                        "be at fault, or memory is short: try fewer --workers") from error


def _collate(items: list[tuple[torch.Tensor, int] | str | None]) -> list[torch.Tensor] | str | None:
    """Makes a batch of the readable images: an error's message if there is one, None if all are bad."""
    for item in items:
        if isinstance(item, str):
            return item
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None


def kept_crop(input_size: tuple[int, int, int], crop_pct: float) -> float:
    """Share of the side that the centre crop keeps: a model's own, but all of a small image."""
    return 1.0 if max(input_size[1:]) <= SMALL_IMAGE else crop_pct


def make_loader(
    dataset: ImageSet,
    *,
    input_size: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    crop_pct: float,
    train: bool,
    batch_size: int,
    workers: int,
    flip: bool,
    recipe: Recipe = Recipe(),
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Makes the loader for one of the sets of open_splits.

    The order and the augmentation of an epoch of training follow from the seed and from the epoch's
    number, which `set_epoch` of the loader says; so a loop can be resumed, in the middle of an
    epoch too. The number of workers changes nothing. The last incomplete batch is left out,
    unless the set is smaller than a batch.

    Args:
        dataset: The images; it is not changed, so one set may have several loaders.
        input_size: (C, H, W) of the batches, H and W in pixels.
        mean: Per-channel mean of the normalisation, on the 0..1 scale.
        std: Per-channel standard deviation of the normalisation, on the 0..1 scale.
        interpolation: Name of the resize filter.
        crop_pct: Share of the side that the centre crop keeps; all of it for inputs up to 64 px.
        train: Shuffle and augment.
        batch_size: Images per batch, of all processes together in training.
        workers: Processes that load images; 0 loads them in this one.
        flip: Mirror half of the training images, where the recipe does not say how many.
        recipe: Says how training images are augmented.
        seed: Decides the order and the augmentation of each epoch.
        rank: This process among those that share the images.
        world: Number of those processes.

    Returns:
        A loader of batches: float32 images (N, C, H, W) and int64 targets (N,).

    Raises:
        UserError: The model takes neither 1 nor 3 channels; while iterating: an image cannot be
            read, or with skip_bad_images none at all.
    """
    channels, *size = input_size
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise UserError(f"the model takes images with {channels} channels; use one that takes 1 or 3")
    small = max(size) <= SMALL_IMAGE
    dataset = copy.copy(dataset)  # still shares the record of bad images
    dataset.mode = modes[channels]
    least = recipe.crop_min or (0.6 if small else None)
    jitter = recipe.color_jitter if recipe.color_jitter is not None else None if small else 0.4
    dataset.transform = create_transform(
        input_size,
        is_training=train,
        scale=(least, 1.0) if least else None,
        hflip=recipe.hflip if recipe.hflip is not None else 0.5 if flip else 0.0,
        color_jitter=jitter,
        auto_augment=recipe.aa,
        re_prob=recipe.reprob if train else 0.0,
        re_mode="pixel",
        interpolation=interpolation,
        mean=mean,
        std=std,
        crop_pct=kept_crop(input_size, crop_pct),
    )
    return _Loader(
        dataset,
        _Batches(len(dataset), batch_size, train, seed, rank, world),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
