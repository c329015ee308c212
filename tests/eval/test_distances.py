"""Distances of feature sets against scipy, torch-fidelity and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.eval.metrics import distances
from dit_accel.eval.metrics.distances import (
    FeatureSet,
    compare_features,
    coverage,
    frechet_distance,
    kernel_distances,
)

EXTRACTOR = {"id": "random", "sha256": "0" * 64, "resize": None}


def feature_set(rows, **options):
    out = FeatureSet(EXTRACTOR, rows.shape[1], **options)
    for i in range(0, len(rows), 7):
        out.add(rows[i : i + 7], [f"{j}" for j in range(i, min(i + 7, len(rows)))])
    return out


def correlated(count, dims, seed, shift=0.0):
    """Rows like a network's: correlated, not negative, far from mean 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=torch.Generator().manual_seed(99)) / dims**0.5
    rows = torch.randn(count, dims, generator=generator) * torch.logspace(0, -2, dims)
    return (rows @ mixing + 0.5 + shift).relu()


@pytest.fixture
def rows():
    return correlated(300, 48, 0), correlated(260, 48, 1, shift=0.2)


def by_scipy(a, b):
    from scipy.linalg import sqrtm

    a, b = a.double().numpy(), b.double().numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_frechet_distance_is_that_of_scipy(rows):
    found = frechet_distance(*map(feature_set, rows))
    assert found == pytest.approx(by_scipy(*rows), rel=1e-6)


def test_frechet_distance_is_that_of_torch_fidelity(rows):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(x.double()) for x in rows]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)
    found = frechet_distance(*map(feature_set, rows))
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics(rows):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Same(torch.nn.Module):
        num_features = 48

        def forward(self, x):
            return x

    fid = FrechetInceptionDistance(Same()).set_dtype(torch.float64)
    fid.update(rows[0].double(), real=True)
    fid.update(rows[1].double(), real=False)
    found = frechet_distance(*map(feature_set, rows))
    assert found == pytest.approx(fid.compute().item(), rel=1e-6)


@pytest.mark.parametrize("counts", [(20, 25), (20, 300), (300, 20)])
def test_fewer_samples_than_features(counts, rows):
    """The covariances have no full rank, so scipy's root is inexact there."""
    a, b = (x[:count] for x, count in zip(rows, counts, strict=True))
    found = compare_features("frechet", *map(feature_set, (a, b)), [])
    assert found["value"] == pytest.approx(by_scipy(a, b), rel=1e-3)
    assert found["flags"] == ["rank-deficient"]


def test_a_constant_feature_changes_nothing(rows):
    whole = frechet_distance(*map(feature_set, rows))
    a, b = (torch.cat([x, torch.full((len(x), 1), 3.0)], 1) for x in rows)
    assert frechet_distance(feature_set(a), feature_set(b)) == pytest.approx(whole, rel=1e-9)


def test_known_gaussians():
    """Commuting covariances: the distance is that of the means plus that of the standard deviations, squared."""

    def corners(mean, stds):
        signs = torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)]) * 0.75**0.5
        return feature_set(torch.tensor(mean) + signs * torch.tensor(stds))

    found = frechet_distance(corners([1.0, 2.0], [1.0, 3.0]), corners([4.0, -2.0], [2.0, 0.5]))
    assert found == pytest.approx(25 + 1 + 2.5**2, rel=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(2, 30))
def test_frechet_distance_is_one(seed, dims, count):
    """A distance: symmetric, not negative, zero to itself."""
    a, b = correlated(count, dims, seed), correlated(count + 3, dims, seed + 1, 0.1)
    sets = feature_set(a), feature_set(b)
    there, back = frechet_distance(*sets), frechet_distance(*sets[::-1])
    scale = sum(x.covariance().trace().item() for x in sets)
    assert there == pytest.approx(back, rel=1e-6, abs=1e-6 * scale)
    assert there >= 0
    assert frechet_distance(sets[0], sets[0]) == pytest.approx(0, abs=1e-6 * scale)


def test_metric_says_what_it_rests_on(rows):
    found = compare_features("frechet", *map(feature_set, rows), flags=["other-weights"])
    assert (found["n"], found["n_reference"], found["features"]) == (300, 260, 48)
    assert found["extractor"] == EXTRACTOR
    assert found["interval_95"] is None
    assert found["flags"] == ["other-weights"]


def test_features_of_two_networks_are_refused(rows):
    other = FeatureSet({**EXTRACTOR, "sha256": "1" * 64}, 48)
    other.add(rows[1][:5], list("abcde"))
    for distance in ("frechet", "kernel", "precision"):
        with pytest.raises(ValueError, match=r"0000.*1111.*sha256"):
            compare_features(distance, feature_set(rows[0]), other, [])


def test_kernel_distance_is_that_of_torch_fidelity(rows):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = rows[0][:260], rows[1]
    theirs = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=1, kid_subset_size=260, verbose=False
    )
    found = kernel_distances(a, b)
    assert len(found) == 1  # a subset of all is all
    assert found[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)


def test_kernel_distance_of_subsets_is_that_of_torch_fidelity(rows, monkeypatch):
    """The other implementation's random numbers give equal subsets, mean and spread."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_kid import kid_features_to_metric

    theirs = kid_features_to_metric(
        *(x.double() for x in rows),
        kid_subsets=20,
        kid_subset_size=50,
        verbose=False,
        rng_seed=2020,
    )
    monkeypatch.setattr(np.random, "default_rng", lambda _: np.random.RandomState(2020))
    values = kernel_distances(*rows, subsets=20, size=50)
    assert values.mean() == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert values.std() == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)


def test_kernel_distance_of_a_set_to_itself_is_small(rows):
    itself = kernel_distances(rows[0][:150], rows[0][150:])
    other = kernel_distances(rows[0][:150], rows[1][:150])
    assert abs(itself.mean()) < 0.1 * other.mean()


def test_kernel_distance_has_a_spread_only_over_subsets(rows, monkeypatch):
    sets = [feature_set(x) for x in rows]
    few = compare_features("kernel", *sets, [])
    assert (few["n"], few["subsets"], few["subset_size"]) == (300, 100, 260)
    assert few["flags"] == ["subsets of 260"]
    assert few["std"] > 0
    equal = compare_features("kernel", sets[1], sets[1], [])
    assert (equal["subsets"], equal["std"]) == (1, None)
    monkeypatch.setattr(distances, "SUBSET_SIZE", 260)
    assert "flags" not in compare_features("kernel", *sets, [])


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_torch_fidelity(rows, neighbours):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = rows[0], rows[1] - 0.13  # nearer, so that neither share is 0
    theirs = calculate_precision_recall_full(a.double(), b.double(), neighborhood=neighbours)
    found = [coverage(*x, neighbours=neighbours) for x in ((a, b), (b, a))]
    assert found == pytest.approx(theirs, rel=1e-5)
    assert 0 < min(found) < max(found) < 1


def test_a_set_covers_itself(rows):
    assert coverage(rows[0], rows[0]) == 1.0


def test_blocks_change_nothing(rows, monkeypatch):
    whole = coverage(*rows)
    monkeypatch.setattr(distances, "_BLOCK", 17)
    assert coverage(*rows) == whole
