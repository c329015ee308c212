import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dit_accel.demo import ShapesDataset
from dit_accel.demo.clips import ANYWHERE, centres, coverage, describe_clips, draw_clips, render
from dit_accel.demo.judge import centroids
from dit_accel.demo.vocabulary import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    COLOURS,
    MOTIONS,
    SHAPES,
    caption,
    combinations,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_vocabulary_is_as_large_as_promised():
    assert len(SHAPES) >= 4
    assert len(COLOURS) >= 8
    assert len(MOTIONS) >= 6


def test_a_tenth_of_the_combinations_is_held_out_and_every_pair_of_values_is_trained_on():
    everything, train, heldout = (combinations(s) for s in ("all", "train", "heldout"))
    assert sorted(train + heldout) == everything
    assert len(heldout) == round(0.1 * len(everything))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert {(c[first], c[second]) for c in train} == {(c[first], c[second]) for c in everything}


def test_colours_are_well_apart():
    shapes, backgrounds = torch.tensor(COLOUR_RGB), torch.tensor(BACKGROUND_RGB)
    assert torch.pdist(shapes).min() > 0.35
    assert torch.cdist(shapes, backgrounds).min() > 0.45


def test_distinct_combinations_have_distinct_captions():
    captions = {caption(c, b, t) for c in combinations() for b in range(6) for t in range(5)}
    # templates 0 and 1 leave the background open
    assert len(captions) == 192 * (2 + 3 * 6)


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(1, 9),
    height=st.integers(16, 80),
    width=st.integers(16, 80),
    seed=st.integers(0, 10**6),
)
def test_any_size_renders_and_the_object_stays_in_frame(frames, height, width, seed):
    clips = draw_clips(8, _generator(seed), "all", ANYWHERE)
    mask = coverage(clips, frames, height, width)
    assert mask.shape == (8, frames, height, width)
    edge = torch.cat([mask[..., 0, :], mask[..., -1, :], mask[..., 0], mask[..., -1]], -1)
    assert (
        edge.max() < 0.75
    )  # a margin of .02 of 16 pixels is less than the half pixel of anti-aliasing
    if min(height, width) >= 48:
        assert edge.max() == 0


def test_edges_are_anti_aliased():
    mask = coverage(draw_clips(32, _generator(), "all"), 5, 64, 64)
    partial = ((mask > 0.02) & (mask < 0.98)).flatten(1).sum(1)
    assert (partial > 0).all()
    video = render(draw_clips(4, _generator()), 3)
    assert video.min() >= -1
    assert video.max() <= 1


def test_sizes_span_a_factor_of_two():
    clips = describe_clips([combinations()[0]] * 400, _generator())  # circles
    radius = (coverage(clips, 1, 128, 128).sum((1, 2, 3)) / torch.pi).sqrt()
    assert radius.max() / radius.min() == pytest.approx(2, rel=0.03)


def test_speeds_span_a_factor_of_two():
    for motion in range(len(MOTIONS)):
        chosen = next(c for c in combinations() if c.motion == motion)
        path = centres(describe_clips([chosen] * 400, _generator()), 33, 64, 64)
        speed = path.diff(dim=1).norm(dim=-1).mean(1)
        assert speed.max() / speed.min() == pytest.approx(2, rel=0.03), MOTIONS[motion]


def test_the_mask_is_where_the_path_says():
    clips = describe_clips([c for c in combinations() if c.shape != 2][:64], _generator())
    found = centroids(coverage(clips, 5, 64, 64))
    torch.testing.assert_close(found, centres(clips, 5, 64, 64), atol=0.1, rtol=0)


def test_dataset_depends_on_seed_and_index_only():
    first, again = ShapesDataset(size=8, num_frames=5), ShapesDataset(size=100, num_frames=5)
    other = ShapesDataset(size=8, num_frames=5, seed=1)
    for i in range(4):
        torch.testing.assert_close(first[i]["video"], again[i]["video"], atol=0, rtol=0)
        assert first[i]["caption"] == again[i]["caption"]
        assert not torch.equal(first[i]["video"], other[i]["video"])
    assert not torch.equal(first[0]["video"], first[1]["video"])
    torch.testing.assert_close(first[-1]["video"], first[7]["video"], atol=0, rtol=0)


def test_dataset_items_and_stills():
    item = ShapesDataset("heldout", num_frames=1, height=48, width=80, size=3)[2]
    assert item["video"].shape == (3, 1, 48, 80)
    assert item["video"].dtype == torch.float32
    assert (item["shape"], item["colour"], item["motion"]) in combinations("heldout")
    assert SHAPES[item["shape"]] in item["caption"]
    assert (
        len(list(torch.utils.data.DataLoader(ShapesDataset(size=4, num_frames=2), batch_size=2)))
        == 2
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("split", "test"), ("size", 0), ("seed", -1), ("num_frames", 0), ("height", 8), ("width", 12)],
)
def test_bad_dataset_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ShapesDataset(**{name: value})


def test_index_out_of_range():
    with pytest.raises(IndexError, match="index=4"):
        ShapesDataset(size=4)[4]
