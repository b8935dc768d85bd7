"""s2h prunes image classifiers: soft-to-hard, on one labelled graph."""

__version__ = "0.1.0"

#: How every figure of cost is counted.
CONVENTION = "MACs as fvcore counts them: one multiply-add is one; whole network, one image"


def load(path):
    """Loads the small network of a run folder, or of `hf://user/name`, in eval mode; see `s2h_cli.artifacts.load`."""
    from .artifacts import load as load_network
    from .hub import local

    return load_network(local(path))
