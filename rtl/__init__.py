"""Routing the Lottery: adaptive tickets for the subsets of heterogeneous data, over one set of shared weights.

    parts = rtl.partition.by_label(train)
    tickets = rtl.extract(model, parts, plan, fit, run)             # Algorithm 1
    net = rtl.retrain(model, tickets.at(0.5), parts, fit, run)      # Algorithm 2

Method: Stefański, Presta, Byra, arXiv 2601.22141.
"""

from rtl import baselines, data, models, partition, route, semantics, tasks
from rtl.alignment import alignment
from rtl.collapse import CollapseWarning
from rtl.diagnose import diagnose
from rtl.errors import InputError
from rtl.evaluate import evaluate
from rtl.extract import PrunePlan, extract
from rtl.fit import Fit
from rtl.retrain import retrain
from rtl.run import Run
from rtl.tickets import TicketMasks, TicketNetwork, Tickets

__all__ = [
    "CollapseWarning",
    "Fit",
    "InputError",
    "PrunePlan",
    "Run",
    "TicketMasks",
    "TicketNetwork",
    "Tickets",
    "alignment",
    "baselines",
    "data",
    "diagnose",
    "evaluate",
    "extract",
    "models",
    "partition",
    "retrain",
    "route",
    "semantics",
    "tasks",
]
