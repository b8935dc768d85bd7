"""Labels: which channels of which tensors stand or fall together.

A dimension of a tensor is either `None` (unlabelled: never cut) or an integer array with one *label* per index. A label is
`FIXED` (never cut), an *atom* (one prunable channel), or a *composite*, which is cut when any of its parts is cut: that is
how a flattened (head, channel) axis follows both. Rules only record facts here (`join`, `freeze`, `merge`, `split`);
`solve` then finds, for the whole network at once, what they mean together. Everything is an array operation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

#: The label of an index that is never cut.
FIXED = -1

Dim = np.ndarray | None


@dataclass
class Labels:
    """Facts about labels, collected by the rules while they walk through the graph."""

    count: int = 0
    _joins: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _composites: list[tuple[np.ndarray, list[np.ndarray]]] = field(default_factory=list)  # (labels, their parts)

    def mark(self) -> tuple[int, ...]:
        """How much is recorded now, for `take_back`."""
        return self.count, len(self._joins), len(self._frozen), len(self._composites)

    def take_back(self, mark: tuple[int, ...]) -> None:
        """Forgets what was recorded since."""
        self.count, joins, frozen, composites = mark
        del self._joins[joins:], self._frozen[frozen:], self._composites[composites:]

    def fresh(self, n: int) -> np.ndarray:
        """`n` new labels."""
        self.count += n
        return np.arange(self.count - n, self.count)

    def join(self, a: Dim, b: Dim, reason: str = "combined with a tensor that cannot be cut") -> Dim:
        """Ties index i of `a` to index i of `b`, and returns the labels of both. A label tied to nothing is frozen."""
        if a is None or b is None:
            self.freeze(a if b is None else b, reason)
            return None
        labelled = (a >= 0) & (b >= 0)
        self._joins.append((a[labelled], b[labelled]))
        self.freeze(np.where(labelled, FIXED, np.maximum(a, b)), reason)
        return a

    def freeze(self, a: Dim, reason: str) -> None:
        """Never cut these; `reason` is what `s2h inspect` shows."""
        if a is not None and (a >= 0).any():
            self._frozen.append((a[a >= 0], reason))

    def merge(self, dims: list[Dim], sizes: list[int]) -> Dim:
        """Labels of one axis that several axes are flattened into, the last varying fastest."""
        labelled = [i for i, dim in enumerate(dims) if dim is not None]
        if not labelled:
            return None
        grid = [np.broadcast_to(dims[i].reshape([-1 if j == i else 1 for j in range(len(sizes))]), sizes).reshape(-1)
                for i in labelled]
        if len(grid) == 1:
            return grid[0]
        labels = self.fresh(math.prod(sizes))
        self._composites.append((labels, grid))
        return labels

    def split(self, dim: Dim, sizes: list[int], reason: str = "reshaped together with fixed indices") -> list[Dim]:
        """Labels of the axes that one axis is unfolded into, the last varying fastest; the inverse of `merge`."""
        out: list[Dim] = [None] * len(sizes)
        if dim is None:
            return out
        if (dim < 0).any():
            self.freeze(dim, reason)
            return out
        grid = dim.reshape(sizes)
        for axis in range(len(sizes)):  # an axis along which nothing changes was merged in as an unlabelled one
            first = grid.take([0], axis)
            if grid.shape[axis] > 1 and (grid == first).all():
                grid = first
        axes = [i for i in range(len(sizes)) if grid.shape[i] > 1]
        if len(axes) == 1:
            out[axes[0]] = grid.reshape(-1)
        elif axes:
            for i in axes:
                out[i] = self.fresh(sizes[i])
            self.join(grid.reshape(-1), self.merge([out[i] for i in axes], [sizes[i] for i in axes]))
        else:
            self.freeze(dim, reason)
        return out

    def solve(self) -> "Solved":
        """What all recorded facts mean together."""
        a = np.concatenate([j[0] for j in self._joins] or [np.zeros(0, int)])
        b = np.concatenate([j[1] for j in self._joins] or [np.zeros(0, int)])
        width = max((len(parts) for _, parts in self._composites), default=1)
        owners = np.concatenate([labels for labels, _ in self._composites] or [np.zeros(0, int)])
        parts = np.full((len(owners), width), FIXED)
        start = 0
        for labels, columns in self._composites:
            parts[start:start + len(labels), :len(columns)] = np.stack(columns, 1)
            start += len(labels)

        clash = np.zeros(0, int)  # labels whose two readings cannot both hold
        while True:
            root = _components(self.count, a, b)
            owner = root[owners]
            definition = np.full(self.count, -1)
            definition[owner[::-1]] = np.arange(len(owners))[::-1]  # the first composite of each component
            expanded, cyclic = _expand(parts, root, definition)
            clash = np.union1d(clash, expanded[cyclic][expanded[cyclic] >= 0])
            other = expanded[definition[owner]]  # what the component is defined as: each composite in it must agree
            same_arity = (expanded >= 0).sum(1) == (other >= 0).sum(1)
            clash = np.union1d(clash, np.concatenate([expanded[~same_arity], other[~same_arity]]).ravel())
            clash = clash[clash >= 0]
            differ = same_arity[:, None] & (expanded >= 0) & (expanded != other)
            if not differ.any():
                break
            a, b = np.concatenate([a, expanded[differ]]), np.concatenate([b, other[differ]])

        reasons: dict[int, str] = {}
        for labels, reason in [*self._frozen, (clash, "reshaped in two ways that do not fit together")]:
            for r in np.unique(root[labels]).tolist():
                reasons.setdefault(r, reason)
        stack = list(reasons)
        while stack:  # a frozen composite freezes its parts
            r = stack.pop()
            if definition[r] >= 0:
                for part in expanded[definition[r]].tolist():
                    if part >= 0 and part not in reasons:
                        reasons[part] = reasons[r]
                        stack.append(part)
        return Solved(root, definition, expanded, reasons)


@dataclass
class Solved:
    """The meaning of every label: atoms of label x are `atoms_of(x)`; `reasons` maps a frozen atom to why, `frozen` is the
    same as a boolean array over labels."""

    root: np.ndarray
    definition: np.ndarray
    parts: np.ndarray
    reasons: dict[int, str]

    @cached_property
    def frozen(self) -> np.ndarray:
        frozen = np.zeros(len(self.root), bool)
        frozen[list(self.reasons)] = True
        return frozen

    def atoms_of(self, dim: np.ndarray) -> np.ndarray:
        """The atoms of each index: an array (n, k), padded with `FIXED`. Frozen atoms are among them."""
        out = np.full((len(dim), max(self.parts.shape[1], 1)), FIXED)
        root = np.where(dim >= 0, self.root[dim], FIXED)
        out[:, 0] = root
        row = np.where(root >= 0, self.definition[root], -1)
        out[row >= 0] = self.parts[row[row >= 0]]
        return out


def _components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root (the least member) of each of `n` items under the equalities a[i] = b[i]: hooking and pointer jumping."""
    root = np.arange(n)
    while True:
        x, y = root[a], root[b]
        if (x == y).all():
            return root
        np.minimum.at(root, np.maximum(x, y), np.minimum(x, y))
        while (root != root[root]).any():
            root = root[root]


def _expand(parts: np.ndarray, root: np.ndarray, definition: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts as atoms: composites inside composites are written out. Also the rows that contain themselves."""
    rows = flat = _compact(np.where(parts >= 0, root[parts], FIXED))
    for _ in range(4):
        inner = np.where(flat >= 0, definition[flat], -1)
        if not (inner >= 0).any():
            break
        block = np.where((inner >= 0)[:, :, None], rows[inner], FIXED)  # (n, k, width): the parts of each part
        block[:, :, 0] = np.where(inner >= 0, block[:, :, 0], flat)
        flat = _compact(block.reshape(len(flat), -1))
    # Still composite after four levels: a label that is a part of itself. The caller freezes what is in it.
    return flat, ((flat >= 0) & (definition[flat] >= 0)).any(1)


def _compact(rows: np.ndarray) -> np.ndarray:
    """Each row's entries moved to the left in order, the padding to the right, unused columns dropped."""
    order = np.argsort(rows < 0, axis=1, kind="stable")
    rows = np.take_along_axis(rows, order, 1)
    return rows[:, :max(int((rows >= 0).sum(1).max(initial=0)), 1)]
