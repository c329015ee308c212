"""FID's network against torch-fidelity and torchmetrics, on random weights, and its weights file."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dit_accel.eval.metrics.distances import FeatureSet, compare_features
from dit_accel.eval.metrics.features import INCEPTION_SHA256, load_inception

pytest.importorskip("torch_fidelity")  # `make install` has it


@pytest.fixture
def weights(inception_weights):
    return inception_weights


@pytest.fixture
def images(rng):
    """Smooth pictures: random ones of a few pixels, enlarged."""
    small = torch.from_numpy(rng.integers(0, 256, (16, 3, 6, 6), dtype=np.uint8)).float()
    large = nn.functional.interpolate(small, (48, 40), mode="bicubic").clamp(0, 255)
    return large.byte().permute(0, 2, 3, 1).contiguous().numpy()


def features_of(extractor, images):
    return extractor([extractor.prepare(x) for x in images])


def test_features_are_those_of_torch_fidelity(weights, images):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("a", ["2048"], feature_extractor_weights_path=weights)
    (theirs,) = network(torch.from_numpy(images[:2]).permute(0, 3, 1, 2))
    ours = features_of(
        load_inception(weights, resize="tf-legacy", allow_other_weights=True), images[:2]
    )
    assert theirs.shape == (2, 2048)
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_fid_is_that_of_torchmetrics(weights, images):
    """Bytes to the metric value, with 64 features, because torchmetrics takes long for all."""
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

    class First(NoTrainInceptionV3):
        num_features = 64

        def forward(self, x):
            return super().forward(x)[:, :64]

    network = First("a", ["2048"], feature_extractor_weights_path=str(weights))
    theirs = FrechetInceptionDistance(network)
    inception = load_inception(weights, resize="torch-antialias", allow_other_weights=True)
    sets = []
    for half, real in ((images[:8], True), (images[8:], False)):
        theirs.update(torch.from_numpy(half).permute(0, 3, 1, 2), real=real)
        sets.append(FeatureSet(inception.record, 64))
        sets[-1].add(features_of(inception, half)[:, :64], list(map(str, range(8))))
    found = compare_features("frechet", *sets, flags=inception.flags)
    assert found["value"] == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert found["flags"] == ["other-weights", "rank-deficient"]
    assert found["extractor"]["id"] == "inception-v3-2015-12-05:2048"
    assert found["extractor"]["resize"] == "torch-antialias"


def test_unknown_weights_need_permission(weights):
    with pytest.raises(ValueError, match=rf"inception=.*sha256 [0-9a-f]{{64}}.*{INCEPTION_SHA256}"):
        load_inception(weights)


def test_files_of_something_else_are_refused(tmp_path, weights):
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match=r"inception=.*weights.pth.*read"):
        load_inception(path)
    path.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"inception=.*weights.pth.*weights file"):
        load_inception(path, allow_other_weights=True)
    for damaged in (np.random.default_rng(0).bytes(500), b"Not Found", b"\x80\x02X", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"inception=.*weights.pth.*weights file"):
            load_inception(path, allow_other_weights=True)
    torch.save({"fc.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"inception=.*weights.pth.*Inception"):
        load_inception(path, allow_other_weights=True)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"inception=.*weights.pth.*tensors"):
        load_inception(path, allow_other_weights=True)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    path = tmp_path / "weights.pth"
    torch.save({"fc.bias": Evil()}, path)
    with pytest.raises(ValueError, match=r"inception=.*weights.pth.*weights file"):
        load_inception(path, allow_other_weights=True)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"inception=.*weights.pth.*weights file"):
        load_inception(path, allow_other_weights=True)
    assert not (tmp_path / "was here").exists()


def test_a_missing_library_says_what_to_install(weights, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"torch-fidelity.*dit-accel\[eval\]"):
        load_inception(weights, allow_other_weights=True)
