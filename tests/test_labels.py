"""Labels against a plain reading of their meaning: whatever is removed, every recorded fact must hold."""

import numpy as np
import pytest

from s2h_cli.labels import FIXED, Labels, Solved

TRIALS = range(150)


class Facts:
    """Labels together with a plain list of what was said about them."""

    def __init__(self):
        self.labels = Labels()
        self.equal: list[tuple[int, int]] = []
        self.any_of: list[tuple[int, list[int]]] = []
        self.never: list[int] = []

    def join(self, a, b):
        self.equal += zip(a.tolist(), b.tolist())
        return self.labels.join(a, b)

    def freeze(self, a):
        self.never += a.tolist()
        self.labels.freeze(a, "told to")

    def merge(self, dims, sizes):
        out = self.labels.merge(dims, sizes)
        self._folded(out, dims, sizes)
        return out

    def split(self, dim, sizes):
        out = self.labels.split(dim, sizes)
        if all(axis is None for axis in out):
            self.never += dim.tolist()
        self._folded(dim, out, sizes)
        return out

    def _folded(self, flat, dims, sizes):
        for i, at in enumerate(np.ndindex(*sizes)):
            if flat is not None:
                self.any_of.append((int(flat[i]), [int(dim[j]) for dim, j in zip(dims, at) if dim is not None]))

    def check(self, generator):
        solved = self.labels.solve()
        cut = random_cut(solved, generator)
        for a, b in self.equal:
            assert cut(a) == cut(b), ("equal", a, b)
        for label, parts in self.any_of:
            assert cut(label) == any(map(cut, parts)), ("any", label, parts)
        for label in self.never:
            assert not cut(label), ("never", label)
        return solved


def atoms(solved: Solved, label: int) -> set[int]:
    found = solved.atoms_of(np.array([label])).ravel()
    return set(found[found >= 0].tolist())


def random_cut(solved: Solved, generator):
    """A random choice of removed atoms, as a function that tells whether a label is cut."""
    removed = set(np.flatnonzero(generator.random(len(solved.root)) < 0.3).tolist()) - set(solved.reasons)
    return lambda label: label != FIXED and bool(atoms(solved, label) & removed)


def free_atoms(solved: Solved) -> set[int]:
    return set().union(*(atoms(solved, label) for label in range(len(solved.root)))) - set(solved.reasons)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", TRIALS)
def test_joins_are_the_components_of_a_graph(seed):
    generator = np.random.default_rng(seed)
    labels = Labels()
    n = int(generator.integers(2, 30))
    labels.fresh(n)
    sets = {i: {i} for i in range(n)}
    for _ in range(int(generator.integers(0, 12))):
        a, b = (generator.integers(0, n, 3) for _ in range(2))
        labels.join(a, b)
        for x, y in zip(a.tolist(), b.tolist()):
            union = sets[x] | sets[y]
            sets.update(dict.fromkeys(union, union))
    frozen = generator.integers(0, n, 2)
    labels.freeze(frozen, "told to")
    solved = labels.solve()
    assert all((solved.root[i] == solved.root[j]) == (j in sets[i]) for i in range(n) for j in range(n))
    assert [bool(solved.frozen[solved.root[i]]) for i in range(n)] == [bool(sets[i] & set(frozen.tolist())) for i in range(n)]


def random_facts(generator, fixed: bool) -> Facts:
    facts = Facts()
    dims = [facts.labels.fresh(n) for n in (2, 2, 3, 4, 6, 6, 12)]
    for _ in range(int(generator.integers(2, 9))):
        dim = dims[generator.integers(len(dims))]
        match generator.integers(6):
            case 0:
                others = [d for d in dims if len(d) == len(dim)]
                dims.append(facts.join(dim, others[generator.integers(len(others))]))
            case 1:
                other = dims[generator.integers(len(dims))]
                if len(dim) * len(other) <= 48:
                    dims.append(facts.merge([dim, other], [len(dim), len(other)]))
            case 2 | 3:
                if len(dim) in (4, 6, 12, 24):
                    low = int(generator.choice([k for k in (2, 3, 4) if len(dim) % k == 0]))
                    dims += [d for d in facts.split(dim, [low, len(dim) // low]) if d is not None]
            case 4:
                dims.append(facts.merge([None, dim], [2, len(dim)]))
            case 5 if fixed:
                dim = dim.copy()
                dim[generator.integers(len(dim))] = FIXED
                dims.append(dim)
    if generator.random() < 0.3:
        facts.freeze(dims[generator.integers(len(dims))][:1])
    return facts


@pytest.mark.parametrize("seed", TRIALS)
def test_every_fact_holds(seed):
    generator = np.random.default_rng(seed)
    random_facts(generator, fixed=False).check(generator)


@pytest.mark.parametrize("seed", TRIALS)
def test_every_fact_holds_with_fixed_indices(seed):
    generator = np.random.default_rng(1000 + seed)
    random_facts(generator, fixed=True).check(generator)


def test_split_inverts_merge():
    facts = Facts()
    a, b = facts.labels.fresh(3), facts.labels.fresh(4)
    heads, channels = facts.split(facts.merge([a, b], [3, 4]), [3, 4])
    solved = facts.check(np.random.default_rng(0))
    assert (solved.root[a] == solved.root[heads]).all() and (solved.root[b] == solved.root[channels]).all()
    assert not solved.reasons


def test_a_split_axis_has_a_product_of_atoms():
    facts = Facts()
    flat = facts.labels.fresh(12)
    heads, channels = facts.split(flat, [3, 4])
    solved = facts.check(np.random.default_rng(0))
    assert atoms(solved, int(flat[5])) == {int(solved.root[heads[1]]), int(solved.root[channels[1]])}
    assert len(free_atoms(solved)) == 7


def test_an_unlabelled_axis_repeats_labels():
    labels = Labels()
    a = labels.fresh(3)
    assert labels.merge([None, a], [2, 3]).tolist() == [0, 1, 2, 0, 1, 2]
    assert labels.merge([a, None], [3, 2]).tolist() == [0, 0, 1, 1, 2, 2]


def test_an_unlabelled_axis_splits_off_again():
    labels = Labels()
    a = labels.fresh(3)
    outer, inner = labels.split(labels.merge([a, None], [3, 2]), [3, 2])
    assert outer.tolist() == a.tolist() and inner is None


def test_joining_with_nothing_freezes():
    labels = Labels()
    a = labels.fresh(2)
    assert labels.join(a, None, "why") is None
    assert labels.solve().reasons == {0: "why", 1: "why"}


def test_joining_with_a_fixed_index_freezes_that_index():
    labels = Labels()
    a = labels.fresh(2)
    labels.join(a, np.array([FIXED, 1]))
    assert set(labels.solve().reasons) == {0}


def test_a_frozen_composite_freezes_its_parts():
    labels = Labels()
    flat = labels.fresh(4)
    labels.split(flat, [2, 2])
    labels.freeze(flat[:1], "why")
    solved = labels.solve()
    assert atoms(solved, 0) <= set(solved.reasons)
    assert len(free_atoms(solved)) == 2


def test_a_frozen_part_leaves_the_other_free():
    facts = Facts()
    flat = facts.labels.fresh(6)
    heads, channels = facts.split(flat, [2, 3])
    facts.freeze(channels)
    solved = facts.check(np.random.default_rng(0))
    assert free_atoms(solved) == set(solved.root[heads].tolist())


def test_a_label_that_is_part_of_itself_is_frozen():
    facts = Facts()
    a, b = facts.labels.fresh(2), facts.labels.fresh(2)
    facts.join(facts.merge([a, b], [2, 2])[:2], a)
    assert not free_atoms(facts.check(np.random.default_rng(0))) & {0}


def test_two_foldings_of_one_axis_hold_together():
    facts = Facts()
    flat = facts.labels.fresh(12)
    facts.split(flat, [3, 4])
    facts.split(flat, [2, 6])
    facts.check(np.random.default_rng(0))


def test_a_fixed_part_on_one_side_does_not_touch_other_labels():
    facts = Facts()
    a, b, stranger = facts.labels.fresh(2), facts.labels.fresh(2), facts.labels.fresh(1)
    holed = np.array([FIXED, a[1]])
    left = facts.merge([holed, b], [2, 2])
    right = facts.merge([b, holed], [2, 2])
    facts.join(left[:1], right[:1])
    last = facts.labels.fresh(1)
    solved = facts.check(np.random.default_rng(0))
    for other in (stranger, last):
        assert atoms(solved, int(other[0])) == set(other.tolist()) and int(other[0]) not in solved.reasons
