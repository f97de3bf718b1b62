"""The networks of the experiments. Each says by `prunable(name, module)` which of its weights tickets choose from,
and by `recipe` how to make another: the function here and its arguments.
"""

from rtl.models.ghostnet import GhostNet, ghostnet
from rtl.models.small import MLP, SmallConv, mlp, small_conv

__all__ = ["MLP", "GhostNet", "SmallConv", "ghostnet", "mlp", "small_conv"]
