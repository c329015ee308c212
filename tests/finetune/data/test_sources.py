"""Sources of training data: captioned files to buckets and clips."""

import numpy as np
import pytest
from PIL import Image

from dit_accel.finetune.data.buckets import Bucket, SizeRules
from dit_accel.finetune.data.captions import Item, read_captions
from dit_accel.finetune.data.reader import BrokenFileError
from dit_accel.finetune.data.sources import Source, find_sources, read_clip, size_choice

from .videos import number_of, picture, write_clip

WAN, IMAGES = SizeRules(16, 4), SizeRules(16, 0)


def items_of(folder):
    return [Item(x.name, x, "caption") for x in sorted(folder.iterdir())]


def found(folder, rules=WAN, **sizes):
    sources, _ = find_sources(items_of(folder), size_choice(rules, **sizes))
    return {x.item.id: str(x.bucket) for x in sources}


@pytest.fixture
def mixed(tmp_path):
    """Clips of several sizes and lengths, a still and an animation."""
    write_clip(tmp_path / "long.mp4", 30, height=48, width=64)
    write_clip(tmp_path / "short.webm", 10, codec="libvpx-vp9", height=64, width=48)
    write_clip(tmp_path / "wide.mkv", 17, height=50, width=130)
    Image.fromarray(picture(0, 40, 80)).save(tmp_path / "still.png")
    frames = [Image.fromarray(picture(i, 32, 32)) for i in range(6)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    return tmp_path


def test_one_bucket_for_each_size(mixed):
    assert found(mixed) == {
        "long.mp4": "29x48x64",
        "short.webm": "9x64x48",
        "wide.mkv": "17x48x128",
        "still.png": "1x32x80",
        "moving.gif": "5x32x32",
    }


def test_one_size_with_the_length_of_each_file(mixed):
    assert set(found(mixed, height=32, width=32).values()) == {
        "29x32x32",
        "9x32x32",
        "17x32x32",
        "1x32x32",
        "5x32x32",
    }


def test_buckets_are_chosen_by_shape_and_length(mixed):
    assert found(mixed, buckets="17,48,64;9,64,48;1,32,80;5,32,32") == {
        "long.mp4": "17x48x64",
        "short.webm": "9x64x48",
        "wide.mkv": "17x48x64",
        "still.png": "1x32x80",
        "moving.gif": "5x32x32",
    }


def test_frame_rates(tmp_path):
    write_clip(tmp_path / "clip.mp4", 30, fps=10)
    assert found(tmp_path, fps=5) == {"clip.mp4": "13x48x64"}
    assert found(tmp_path, fps=20) == {"clip.mp4": "57x48x64"}
    (source,), _ = find_sources(items_of(tmp_path), size_choice(WAN, num_frames=5, fps=5))
    clip = read_clip(source, 5)
    assert [number_of(x) for x in clip] == [0, 2, 4, 6, 8]


def test_models_of_images_take_the_first_frame(mixed):
    assert found(mixed, IMAGES)["long.mp4"] == "1x48x64"
    sources, _ = find_sources(items_of(mixed), size_choice(IMAGES, height=16, width=16))
    for source in sources:
        assert read_clip(source, None).shape == (1, 16, 16, 3)


def test_clips_are_cut_to_their_bucket(mixed):
    sources, _ = find_sources(items_of(mixed), size_choice(WAN, buckets="9,32,48;1,32,48;5,16,16"))
    for source in sources:
        clip = read_clip(source, None)
        assert clip.dtype == np.uint8
        assert clip.shape == (source.bucket.frames, source.bucket.height, source.bucket.width, 3)
        assert [number_of(x) for x in clip] == list(range(source.bucket.frames))


def test_what_cannot_be_used_is_an_error_or_listed(mixed):
    (mixed / "text.mp4").write_text("hello")
    (mixed / "tiny.png").write_bytes(b"")
    Image.fromarray(picture(0, 8, 8)).save(mixed / "small.png")
    with pytest.raises(
        ValueError,
        match=r"3 of 8 files .*small.png: 1 frames of 8 x 8; .*16 pixels.*--skip-broken",
    ) as error:
        find_sources(items_of(mixed), size_choice(WAN))
    assert "\n" not in str(error.value)
    sources, broken = find_sources(items_of(mixed), size_choice(WAN), skip_broken=True)
    assert len(sources) == 5
    assert list(broken) == ["small.png", "text.mp4", "tiny.png"]
    assert "text.mp4: " in broken["text.mp4"]


def test_clips_that_are_too_short_are_named(mixed):
    message = r"short.webm: 10 frames of 64 x 48; .*13 frames"
    with pytest.raises(ValueError, match=message):
        find_sources(items_of(mixed), size_choice(WAN, num_frames=13))
    with pytest.raises(ValueError, match=r"long.mp4: .* 1 frames per second; .*9 frames"):
        find_sources(items_of(mixed), size_choice(WAN, buckets="9,48,64", fps=1))
    with pytest.raises(ValueError, match=r"none of the 5 files"):
        find_sources(items_of(mixed), size_choice(WAN, num_frames=81), skip_broken=True)


def test_a_bucket_without_samples_is_an_error(mixed):
    message = r"buckets: .* 5x640x16 .* 1x48x64, 5x48x64"
    with pytest.raises(ValueError, match=message):
        find_sources(items_of(mixed), size_choice(WAN, buckets="1,48,64;5,640,16;5,48,64"))


def test_long_videos_need_a_number_of_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_accel.finetune.data.sources.MOST_FRAMES", 16)
    write_clip(tmp_path / "clip.mp4", 30)
    with pytest.raises(ValueError, match=r"clip.mp4: .*16 frames.*--num-frames"):
        find_sources(items_of(tmp_path), size_choice(WAN))
    assert found(tmp_path, num_frames=29) == {"clip.mp4": "29x48x64"}


def test_damage_behind_the_first_frames_is_noticed_when_decoding(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 40)
    data = bytearray(path.read_bytes())
    first, last = data.index(b"mdat") + 4, data.index(b"moov") - 4
    at = first + int(0.8 * (last - first))
    data[at : at + 30] = bytes(30)
    path.write_bytes(data)
    (source,), _ = find_sources(items_of(tmp_path), size_choice(WAN, num_frames=37))
    with pytest.raises(BrokenFileError, match=r"clip.mp4: .*\d+ of 37 frames"):
        read_clip(source, None)
    assert len(read_clip(Source(source.item, Bucket(5, 16, 16)), None)) == 5


def test_parts_of_one_file(tmp_path):
    write_clip(tmp_path / "clip.mp4", 40, options={"g": "8"})
    rows = '{"file_name": "clip.mp4", "text": "x", "start_seconds": %s, "end_seconds": %s}\n'
    (tmp_path / "metadata.jsonl").write_text(rows % (0, 1) + rows % (1.6, 3))
    sources, _ = find_sources(read_captions(tmp_path), size_choice(WAN, fps=10))
    assert [str(x.bucket) for x in sources] == ["9x48x64", "13x48x64"]
    assert [number_of(x) for x in read_clip(sources[1], 10)] == list(range(16, 29))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"buckets": "5,48,64", "height": 48, "width": 64},
            "buckets='5,48,64', height=48, width=64",
        ),
        ({"buckets": "5,48,64", "num_frames": 5}, "buckets='5,48,64', num_frames=5"),
        ({"height": 48}, "height=48, width=None"),
        ({"height": 40, "width": 64}, "height 40 of 1x40x64 .*16"),
        ({"num_frames": 6}, r"num_frames: .*frames 6 of .*4k \+ 1, such as 5"),
        ({"fps": 0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        size_choice(WAN, **options)
