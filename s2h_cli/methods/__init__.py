"""Pruning methods, one file each, against one small interface.

The training loop knows nothing of a method. It uses:

    method = Method(network, space, budget,            over a captured network; `network`'s parameters are what is trained
                    compile=, sync_bn=)                `compile`: networks go through torch.compile once their shapes stand still;
                                                       `sync_bn`: batch-norm statistics of all processes' images, while training
    method.start_step(progress)                        before a batch, and at the end; progress through the schedule, 0 to 1. True where
                                                       what trains is another network from here on: the optimizer forgets the gradients
                                                       of the one before
    method.passes                                      what a step computes one after the other: functions of (images, targets,
                                                       criterion) that give {name: term of the loss}
    method.backward(terms)                             accumulates the gradients of a pass, before the next one starts
    method.optimizers()                                of parameters of its own, beside the network's, as long as they train
    method.state_dict(), method.load_state_dict(state) for checkpoints: all but the network
    method.parts                                       {ending of its columns: part}, one for each budget: {"": method} for one

and of each part:

    part.networks()                                    {name: module} to evaluate; "hard" is the small one
    part.plan                                          the plan that the hard network follows now
    part.budget                                        what it has to meet in the end
    part.result()                                      the small network with weights of its own
    part.expected_widths(), part.gates_now()           arrays (groups,) and (atoms,) to draw

A method without training has `network` and `parts` alone, and its parts no widths and gates to draw.
"""

from functools import partial

from . import cut
from .epsd import EPSD
from .s2h import DMP, S2H, TRAINED
from .stp import STP

#: By the names of `--method`.
METHODS = {"s2h": S2H, "stp": STP, "epsd": EPSD, "dmp": DMP,
           "dense": cut.Dense, "uniform": cut.Uniform, "random": cut.Random, "magnitude": cut.Magnitude}
#: The same where the network that they start from is trained, and teaches.
FROM_TRAINED = METHODS | {"s2h": partial(S2H, settings=TRAINED)}
