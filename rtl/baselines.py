"""What tickets are compared with: one pruned network for all data, one pruned network for each subset, and no pruning.

All start at the same θ0. Pruning methods are presented with the same number of samples: a multi-class network has no
negatives, so it trains twice the epochs of the one-vs-rest tickets. Dense has no rounds, only their last training.
Tickets that are multi-class themselves have no negatives either: leave `epochs=` out below.

`rtl run` compares with all of them. Beside tickets of your own (see README), each in a folder of its own of the run:

    whole_fit = dataclasses.replace(fit, epochs=2 * fit.epochs, task=rtl.tasks.MultiClass(), batch_norm="shared")
    own = run.child("imp_single")
    masks = rtl.baselines.imp_single(model, parts, plan, whole_fit, own).at(0.75)
    single = rtl.retrain(model, masks, rtl.partition.whole(parts.data), whole_fit, own)

    own = run.child("imp_multiple")
    multiple = [
        rtl.baselines.imp_multiple(model, tickets.at(0.75), parts, fit, own, name) for name in tickets.names
    ]
    dense = rtl.baselines.dense(model, parts, whole_fit, run.child("dense"))
    for network in (single, dense):
        print(rtl.evaluate(network, test).metrics)
    print(rtl.evaluate(multiple, parts.apply(test)).metrics)
"""

from __future__ import annotations

from torch import nn

from rtl.errors import expect
from rtl.extract import PrunePlan, extract
from rtl.fit import Fit
from rtl.partition import Partition, whole
from rtl.retrain import retrain
from rtl.run import Run, slug
from rtl.tickets import TicketMasks, TicketNetwork, Tickets


def imp_single(model: nn.Module, parts: Partition, plan: PrunePlan, fit: Fit, run: Run) -> Tickets:
    """IMP, single model: Algorithm 1 with all data in one subset. Retrain the result with `parts=whole(parts.data)`.

    Arguments and errors as for `extract`; `fit.task` has to be one that needs no second subset.
    """
    return extract(model, whole(parts.data), plan, fit, run)


def imp_multiple(
    model: nn.Module, tickets: TicketMasks, parts: Partition, fit: Fit, run: Run, name: str
) -> TicketNetwork:
    """IMP, multiple models: the ticket `name` retrained alone, from θ0, sharing nothing.

    Extraction is the same as the tickets': subsets are independent of one another in Algorithm 1.
    Arguments and errors as for `retrain`.
    """
    expect("tickets", tickets, TicketMasks, "masks at one sparsity, such as tickets.at(0.75)")
    return retrain(model, tickets.only(name), parts, fit, run.child(slug(name)))


def dense(model: nn.Module, parts: Partition, fit: Fit, run: Run) -> TicketNetwork:
    """The network without pruning, on all data: `retrain` with masks that keep everything."""
    everything = whole(parts.data)
    unpruned = extract(model, everything, PrunePlan(until=0.0), fit, run)
    return retrain(model, unpruned.at(0.0), everything, fit, run)
