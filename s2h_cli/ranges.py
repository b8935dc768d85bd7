"""Which values the options take: a table of ranges by name, and what no text may hold. Nothing is imported or loaded to know it."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError

#: The longest text, in characters: that of a path.
LONGEST_TEXT = 4096
#: The most of what is counted, where nothing else limits it.
MANY = 1_000_000
#: The largest float32.
LARGEST = 3.4e38


class Range(NamedTuple):
    """From `least` to `most`; without the ends that `open` names. `example`: what many use."""

    least: float
    most: float
    example: float
    open: str = ""  #: "least", "most" or "both"

    def holds(self, value: float) -> bool:
        above = value > self.least if self.open in ("least", "both") else value >= self.least
        below = value < self.most if self.open in ("most", "both") else value <= self.most
        return above and below  # nothing that is no number is above or below

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.open in ("least", "both") else f"at least {self.least:g}"
        most = f"below {self.most:.10g}" if self.open in ("most", "both") else f"at most {self.most:.10g}"
        return f"{least} and {most}"


#: By the names of options and settings.
RANGES = {
    "epochs": Range(0, MANY, 100),
    "batch_size": Range(1, MANY, 64),
    "grad_accum_steps": Range(1, MANY, 2),
    "lr": Range(0, LARGEST, 0.001, "least"),
    "min_lr": Range(0, LARGEST, 1e-5),
    "weight_decay": Range(0, 1, 0.05, "most"),
    "momentum": Range(0, 1, 0.9, "most"),
    "layer_decay": Range(0, 1, 0.75, "least"),
    "clip_grad": Range(0, LARGEST, 1.0, "least"),
    "warmup_epochs": Range(0, MANY, 5),
    "smoothing": Range(0, 1, 0.1, "most"),
    "mixup": Range(0, 1000, 0.2),
    "cutmix": Range(0, 1000, 1.0),
    "color_jitter": Range(0, 1000, 0.4),
    "reprob": Range(0, 1, 0.25),
    "crop_min": Range(0, 1, 0.08, "least"),
    "hflip": Range(0, 1, 0.5),
    "drop": Range(0, 1, 0.1, "most"),
    "drop_path": Range(0, 1, 0.1, "most"),
    "ema": Range(0, 1, 0.9998, "most"),
    "img_size": Range(1, 8192, 224),
    "divisor": Range(1, 65536, 8),
    "latency_batch": Range(1, MANY, 1),
    "val_fraction": Range(0, 1, 0.1, "both"),
    "seed": Range(0, 2**32 - 1, 0),
    "workers": Range(0, 512, 4),
    "checkpoint_every": Range(1, 2**31 - 1, 1000),
    "opset": Range(1, 100, 18),
    "batch": Range(1, MANY, 1),
    "threads": Range(1, 1024, 4),
    "seconds": Range(0.1, 86400, 2),
}


def check(values: dict[str, Any], names: dict[str, str] | None = None) -> None:
    """Checks values of options or settings, by name. None, and what is in no table, passes.

    Args:
        names: what the user calls them, where that is not the option of the name.

    Raises:
        UserError: a number is outside its range; a text or one of a list is empty, too long or has control characters.
    """
    for name, value in values.items():
        shown = (names or {}).get(name) or flag(name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (str, Path)):
                _check_text(str(item), shown)
            elif isinstance(item, (int, float)) and not isinstance(item, bool) and name in RANGES and not RANGES[name].holds(item):
                raise UserError(f"{shown} {_brief(item)} is out of range: it must be {RANGES[name]}; try {RANGES[name].example:g}")


def whole_number(text: str, name: str, or_else: str = "") -> int:
    """The number that a text holds, in the range of this name. `or_else`: what the option takes besides, such as ", or auto".

    Raises:
        UserError: it is no number, or out of range.
    """
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"{flag(name)} {_brief(text)} is no whole number; give one such as {RANGES[name].example:g}{or_else}") from None
    check({name: number})
    return number


def flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")


def _check_text(text: str, shown: str) -> None:
    if not text.strip():
        raise UserError(f"{shown} is empty; give it a value or leave it away")
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{shown} has {len(text)} characters; give at most {LONGEST_TEXT}")
    if control := next((letter for letter in text if unicodedata.category(letter) == "Cc"), None):
        raise UserError(f"{shown} holds the control character {control!r}; leave it away")


def _brief(value: Any) -> str:
    """A value as the user gave it, a long one shortened."""
    try:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    except ValueError:  # a number with more digits than Python prints
        return "that large"
    return text if len(text) <= 50 else f"{text[:50]}…"
