"""The Inception network of FID, from torch-fidelity, with weights from a local file."""

import io
import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dit_accel.eval.metrics.features import Extractor, Resize, check_resize
from dit_accel.eval.metrics.weights import check_known, file_sha256, import_library, read_weights

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) and `pt_inception-2015-12-05-
6726825d.pth` (pytorch-fid), which are one file."""
SIZE = 299
KINDS = ("64", "192", "768", "2048", "spatial")
"""Features after the two max-pools, before the auxiliary classifier and at the end; "spatial" are the
first 7 channels of `mixed_6/conv`, place by place, as in ADM's sFID."""
_SPATIAL_CHANNELS = 7
_LAYERS = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    (
        "Mixed_5b",
        "Mixed_5c",
        "Mixed_5d",
        "Mixed_6a",
        "Mixed_6b",
        "Mixed_6c",
        "Mixed_6d",
        "Mixed_6e",
    ),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)
_AFTER = KINDS[:4]  # the kind of features that each group of layers ends in
_SPATIAL_BLOCK = "Mixed_6d"  # TensorFlow counts it as mixed_6, and its 1x1 branch as conv


class InceptionFeatures(nn.Module):
    """Several kinds of features in one pass, no deeper than they need.

    Args:
        network: torch-fidelity's `FeatureExtractorInceptionV3`; its own forward takes bytes only and
            resizes by itself.
        kinds: of `KINDS`.
    """

    def __init__(self, network: nn.Module, kinds: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.kinds = tuple(kinds)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> dict[str, Tensor]:
        """Pictures in [0, 1] at 299 x 299 -> features by kind."""
        x = (images * 255 - 128) / 128
        out: dict[str, Tensor] = {}
        for kind, names in zip(_AFTER, _LAYERS, strict=True):
            for name in names:
                layer = self.network.get_submodule(name)
                if name == _SPATIAL_BLOCK and "spatial" in self.kinds:
                    branch = layer.get_submodule("branch1x1")(x)
                    out["spatial"] = branch[:, :_SPATIAL_CHANNELS].flatten(1)
                    if len(out) == len(self.kinds):
                        return out
                x = layer(x)
            if kind in self.kinds:
                out[kind] = x.mean((2, 3))
                if len(out) == len(self.kinds):
                    return out
        return out


def load_inception(
    weights: str | os.PathLike,
    *,
    kinds: Sequence[str] = ("2048",),
    resize: Resize = "clean",
    allow_other_weights: bool = False,
    device: torch.device | str = "cpu",
) -> Extractor:
    """FID's Inception.

    Args:
        weights: the file of `SHA256`, or another with the same tensors (also safetensors) that
            `allow_other_weights` lets pass; figures then carry the flag "other-weights".
        kinds: which of `KINDS`.

    Raises:
        ValueError: unknown kinds or ways of resizing, or a file that does not hold the weights.
        ImportError: torch-fidelity cannot be imported.
    """
    check_resize(resize)
    wrong = sorted(set(kinds) - set(KINDS))
    if wrong or not kinds:
        raise ValueError(f"kinds={tuple(kinds)!r}: accepted are {', '.join(KINDS)}, at least one")
    sha256 = file_sha256(weights, "inception")
    known = check_known(
        "inception", weights, sha256, SHA256, "FID's Inception weights", allow_other_weights
    )
    state = read_weights(weights, "inception")
    library = import_library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    # The class reads its weights itself, and would run code found in the file; so it gets our bytes.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        network = library.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer
        )
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"inception={str(weights)!r}: does not hold Inception's weights ({first})"
        ) from None
    return Extractor(
        InceptionFeatures(network, kinds),
        name="inception",
        id="inception-v3-2015-12-05",
        sha256=sha256,
        size=SIZE,
        resize=resize,
        device=device,
        kinds=kinds,
        flags=() if known else ("other-weights",),
    )
