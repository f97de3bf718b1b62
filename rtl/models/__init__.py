"""The networks of the experiments. Each says by `prunable(name, module)` which of its weights tickets choose from,
and by `recipe` how to make another: the function here and its arguments.
"""

from rtl.models.ghostnet import GhostNet, ghostnet
from rtl.models.inr import INR, inr
from rtl.models.small import MLP, SmallConv, mlp, small_conv
from rtl.models.speech import SpeechUNet, speech_unet

__all__ = [
    "INR",
    "MLP",
    "GhostNet",
    "SmallConv",
    "SpeechUNet",
    "ghostnet",
    "inr",
    "mlp",
    "small_conv",
    "speech_unet",
]
