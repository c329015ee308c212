"""Trained models as subjects of quality benchmarks."""

import numpy as np
import pytest
import torch

from dit_accel import control
from dit_accel.bench.subjects import METRICS, Subject, mean_interval, random_router
from dit_accel.files import EMBEDDED_MODELS


@pytest.mark.parametrize("model", EMBEDDED_MODELS)
def test_a_subject_samples_the_same_latents_again_and_scores_them(model):
    subject = Subject(model, 2)
    assert subject.still == (model != "tiny-wan")
    subject.set_solver("unipc")
    dense, report = subject.latents(range(1), 3)
    again, _ = subject.latents(range(1), 3)
    assert report is None
    assert torch.equal(dense, again)
    (scores,) = subject.score(dense, dense, range(1))
    found = dict(zip(METRICS, scores, strict=True))
    assert found["psnr_db"] > 100
    assert found["ssim"] == pytest.approx(1)
    assert found["latent_error"] == 0
    seen = []
    sparse, report = subject.latents(
        range(1), 3, sla={"topk": 0.25, "crossover": "never"}, prepare=seen.append
    )
    assert set(seen[0]) == {"sla"}
    assert report.density < 1
    assert not torch.equal(dense, sparse)
    assert not control.summary(subject.pipe).enabled


def test_a_random_router_has_the_shapes_of_block_scores():
    q, k = torch.zeros(2, 3, 100, 8), torch.zeros(2, 3, 70, 8)
    a, b, other = (random_router(seed)(q, k, block_q=16, block_k=32) for seed in (0, 0, 1))
    assert a.shape == (2, 3, 7, 3)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


def test_an_interval_holds_the_mean():
    found = mean_interval(np.arange(20.0))
    low, high = found["interval_95"]
    assert low < found["mean"] == 9.5 < high
    assert mean_interval(np.array([3.0])) == {"mean": 3.0, "interval_95": [3.0, 3.0]}
