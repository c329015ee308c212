"""Fixtures of the tests of metrics: a torchvision that can be imported, small sets of pictures."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# torchvision built for CUDA cannot load its operators beside a CPU torch, and without the names of two
# of them it cannot be imported, nor lpips and torch-fidelity, nor transformers where it is installed.
# `make install` therefore puts such a build into a folder of its own, which only these tests look into.
if (_FOLDER := Path(sys.prefix) / "torchvision").is_dir():
    sys.path.append(str(_FOLDER))
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Write random weights of FID's network, which keep the size of activations, as a torch file."""
    pytest.importorskip("torch_fidelity")  # `make install` has it
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Fresh("inception", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 6**0.5  # torch draws them for a network without ReLU
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    path = folder / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def alexnet(tmp_path_factory):
    """LPIPS' backbone of random weights, as a file."""
    pytest.importorskip("lpips")
    from torchvision.models import alexnet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(alexnet(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP repository as on the Hub: random weights, a text encoder of 16 tokens, a token a letter."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    words = ["a", "red", "blue", "circle", "square", "on", "the", "moving"]
    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    letters = sorted(set("".join(words)))
    ends = [f"{x}</w>" for x in letters]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *ends]
    CLIPTokenizer(
        vocab={x: i for i, x in enumerate(vocabulary)}, merges=[], model_max_length=16
    ).save_pretrained(path)
    torch.manual_seed(2)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {
        **size,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 16,
        "num_hidden_layers": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {**size, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(path)
    return path
