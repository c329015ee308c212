"""A small network for the features of the demo's pictures."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

ASSET = "tiny-extractor.safetensors"
SIZE = 64
"""Side of the pictures that the network reads, in pixels."""
FEATURES = 64


class TinyExtractor(nn.Module):
    """Network for the demo's pictures: values in [0, 1] to 64 features, about 115,000 parameters.

    `eval/train_extractor.py` trains it to name shape, colours, place and size, and to measure blur and noise.
    The judge's CNN reads one normalised mask, so it does not see colour, background, place and texture.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, 16, 32, 48, 64)
        for i, (before, after) in enumerate(pairwise(channels)):
            width = 3 if i else 5
            layers += [nn.Conv2d(before, after, width, stride=2, padding=width // 2), nn.GELU()]
        last = nn.Linear(channels[-1] * (SIZE // 16) ** 2, FEATURES)
        self.layers = nn.Sequential(*layers, nn.Flatten(), last)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        return self.layers(2 * images - 1)
