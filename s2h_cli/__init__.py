"""s2h prunes image classifiers: soft-to-hard, on one labelled graph."""

__version__ = "0.1.0"

#: How every figure of cost is counted.
CONVENTION = "MACs as fvcore counts them: one multiply-add is one; whole network, one image"


def load(path, trust=False):
    """Loads the small network of a run folder, or of `hf://user/name`, in eval mode; see `s2h_cli.artifacts.load`.

    `trust=True` also takes operators that are on no list: for results of people you know, with a library of operators that you imported."""
    from .artifacts import load as load_network
    from .hub import local

    return load_network(local(path), trust)
