"""Rows of the quality benchmarks of sparse attention."""

import pytest

from dit_accel.bench.sla_rows import RANDOM, attention_rows, sampled_rows
from dit_accel.config import SLAConfig


@pytest.mark.parametrize("kind", ["video", "still"])
@pytest.mark.parametrize("rows", [sampled_rows(), attention_rows()])
def test_rows_are_distinct_and_valid_settings(kind, rows):
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        config = SLAConfig(**row.sla(kind, top_p=0.9))
        assert (config.topk is None) == (row.router == "top-p")
        assert config.crossover == "never"


def test_every_density_has_a_pair_and_a_control():
    rows = sampled_rows()
    for density in {row.density for row in rows}:
        assert {"none", "shared_softmax"} <= {r.combine for r in rows if r.density == density}
    assert any(row.router == RANDOM for row in rows)
