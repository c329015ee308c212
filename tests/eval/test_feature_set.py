"""Feature sets: sums and kept rows, in one piece or in many."""

import numpy as np
import pytest
import torch

from dit_accel.eval.metrics.distances import FeatureSet

EXTRACTOR = {"id": "random", "sha256": "0" * 64, "resize": None}


@pytest.fixture
def rows(generator):
    return torch.rand(200, 12, generator=generator) + 5.0


def filled(rows, first=0, step=1, batch=16, **options):
    out = FeatureSet(EXTRACTOR, rows.shape[1], **options)
    places = range(first, len(rows), step)
    for i in range(0, len(places), batch):
        chosen = list(places[i : i + batch])
        out.add(rows[chosen], [f"sample {j}" for j in chosen])
    return out


def test_mean_and_covariance_are_those_of_numpy(rows):
    found = filled(rows)
    wide = rows.double().numpy()
    np.testing.assert_allclose(found.mean(), wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        found.covariance(), np.cov(wide, rowvar=False), rtol=1e-9, atol=1e-12
    )


def test_many_parts_are_the_whole(rows):
    whole = filled(rows, keep=50)
    parts = [filled(rows, i, 3, batch=5, keep=50) for i in range(3)]
    parts[0].merge(parts[2])
    parts[0].merge(parts[1])
    assert parts[0].count == whole.count == 200
    torch.testing.assert_close(parts[0].covariance(), whole.covariance(), rtol=1e-9, atol=1e-12)
    assert torch.equal(parts[0].rows(), whole.rows())  # to the last bit, in the same order


def test_memory_does_not_grow_beyond_the_kept_rows(rows):
    found = filled(rows.repeat(20, 1), keep=30)
    assert found.rows().shape == (30, 12)
    assert sum(x.numel() for x in found.state().values()) < 31 * 13 + 13 * 12 + 2
    found.add(rows, [f"more {i}" for i in range(200)])
    assert sum(len(x) for x, _ in found._kept) <= 30 + 256


def test_kept_rows_do_not_depend_on_the_order(rows):
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(3)).tolist()
    other = FeatureSet(EXTRACTOR, 12, keep=20)
    for i in shuffled:
        other.add(rows[[i]], [f"sample {i}"])
    assert torch.equal(other.rows(), filled(rows, keep=20).rows())


def test_kept_rows_are_spread_evenly(rows):
    kept = filled(rows, keep=100).rows()
    places = (kept[:, None] == rows).all(2).nonzero()[:, 1].double()
    assert 80 < places.mean() < 120


def test_none_are_kept_for_sums_alone(rows):
    assert filled(rows, keep=0).rows().shape == (0, 12)


def test_state_gives_the_set_back(rows):
    whole = filled(rows, keep=40)
    again = FeatureSet.from_state(whole.state(), EXTRACTOR, keep=40)
    assert again.count == 200
    assert torch.equal(again.covariance(), whole.covariance())
    assert torch.equal(again.rows(), whole.rows())


def test_features_that_are_not_finite_are_refused(rows):
    rows[5, 3] = torch.nan
    with pytest.raises(ValueError, match=r"features.*'sample 5'"):
        filled(rows)


def test_features_of_another_number_are_refused(rows):
    with pytest.raises(ValueError, match=r"12 features.*7 features"):
        filled(rows).merge(FeatureSet(EXTRACTOR, 7))
