"""Sample sets on disk: reading, invalid folders, and pairs of samples."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dit_accel.sampling.sets import SampleSet, pair_ids


def picture(path, value=0, size=(6, 4), mode="RGB"):
    """Write a noisy image of this width and height, and return its pixels."""
    rng = np.random.default_rng(value)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def clip(folder, length=3, **kwargs):
    return np.stack([picture(folder / f"{i:04d}.png", i, **kwargs) for i in range(length)])


def write_manifest(folder, **changed):
    samples = {"a": {"prompt": "a cat", "files": ["a.png"]}}
    data = {"format_version": 1, "kind": "images", "samples": samples, **changed}
    (folder / "manifest.json").write_text(json.dumps(data))


def test_plain_folder_of_images(tmp_path):
    a = picture(tmp_path / "b.png", 1)
    picture(tmp_path / "a.JPG", 2, size=(5, 5))
    picture(tmp_path / "sub" / "c.webp", 3)
    picture(tmp_path / "000123.png", 4)  # numbers mean frames in sub-folders only
    picture(tmp_path / ".hidden" / "d.png", 5)
    (tmp_path / "notes.txt").write_text("x")
    images = SampleSet.open(tmp_path)
    assert (images.kind, images.ids) == ("images", ("000123", "a", "b", "sub/c"))
    assert images.prompts == {}
    assert images.manifest is None
    np.testing.assert_array_equal(images.frames("b"), a[None])
    assert images.frames("a").shape == (1, 5, 5, 3)
    assert images.media("b") == tmp_path / "b.png"


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_other_kinds_of_pictures_are_read_as_rgb(tmp_path, mode):
    picture(tmp_path / "a.png", mode=mode)
    frames = SampleSet.open(tmp_path).frames("a")
    assert (frames.shape, frames.dtype) == ((1, 4, 6, 3), np.uint8)


def deep_rgb(path):
    """Write a PNG file with 16 bits per channel, which Pillow cannot write."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress((b"\0" + b"\x12\x34" * 18) * 4)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(data)


LOST = {
    "16 bits": lambda path: Image.fromarray(np.full((4, 6), 300, np.uint16)).save(path),
    "16 bits of RGB": deep_rgb,
    "floats": lambda path: Image.fromarray(np.ones((4, 6), np.float32)).save(path, "TIFF"),
    "alpha": lambda path: Image.new("RGBA", (6, 4), (1, 2, 3, 254)).save(path),
    "grey and alpha": lambda path: Image.new("LA", (6, 4), (1, 0)).save(path),
    "a transparent colour": lambda path: Image.new("RGB", (6, 4)).save(path, transparency=(0,) * 3),
    "a transparent place of the palette": lambda path: Image.new("P", (6, 4)).save(
        path, transparency=0
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_pictures_that_rgb_cannot_hold_are_refused(tmp_path, what):
    LOST[what](tmp_path / "a.png")
    lost = "8 bits per channel" if "bits" in what or what == "floats" else "transparent"
    message = rf"a\.png: .*{lost}.* \(mode \w+.*\)"
    with pytest.raises(ValueError, match=message):
        SampleSet.open(tmp_path).frames("a")


def test_plain_folder_of_clips(tmp_path):
    frames = clip(tmp_path / "x", 12)
    picture(tmp_path / "deep" / "y" / "1.png", 7)
    (tmp_path / "x.mp4").write_bytes(b"for looking")
    clips = SampleSet.open(tmp_path)
    assert (clips.kind, clips.ids) == ("clips", ("deep/y", "x"))
    np.testing.assert_array_equal(clips.frames("x"), frames)
    assert clips.media("x") == tmp_path / "x.mp4"
    assert clips.media("deep/y").name == "1.png"


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for i in (8, 9, 10, 11):
        picture(tmp_path / "x" / f"{i}.png", i)
    assert [x.name for x in SampleSet.open(tmp_path).files("x")] == [
        "8.png",
        "9.png",
        "10.png",
        "11.png",
    ]


def broken(tmp_path, what):
    if what == "empty":
        return
    if what == "video":
        (tmp_path / "a.mp4").write_bytes(b"x")
    elif what == "gap":
        clip(tmp_path / "x")
        (tmp_path / "x" / "0001.png").unlink()
    elif what == "twice":
        clip(tmp_path / "x")
        picture(tmp_path / "x" / "1.png")
    elif what == "both kinds":
        clip(tmp_path / "x")
        picture(tmp_path / "a.png")
    elif what == "one id":
        picture(tmp_path / "a.png")
        picture(tmp_path / "a.jpg")
    elif what == "unfinished":
        picture(tmp_path / "a.png")
        (tmp_path / "manifest.rank0.jsonl").write_text("")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", r"no \.png"),
        ("video", r"a\.mp4: .*0000\.png"),
        ("gap", "x: .* 1 is missing"),
        ("twice", "x: .* 1 occurs twice"),
        ("both kinds", r"images \('a'\).* clips \('x'\)"),
        ("one id", r"a\.(png|jpg): .*id 'a'"),
        ("unfinished", r"path=.*manifest\.rank0\.jsonl"),
    ],
)
def test_folders_that_are_no_sample_set(tmp_path, what, message):
    broken(tmp_path, what)
    with pytest.raises(ValueError, match=message):
        SampleSet.open(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"path='.*none'"):
        SampleSet.open(tmp_path / "none")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone"])
def test_damaged_pictures_are_named(tmp_path, damage):
    path = tmp_path / "x" / "0001.png"
    clip(tmp_path / "x", size=(64, 64))
    clips = SampleSet.open(tmp_path)
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-200], "text": b"hello"}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=r"x/0001\.png"):
        clips.frames("x")


def test_mixed_sizes_inside_a_clip(tmp_path):
    clip(tmp_path / "x")
    picture(tmp_path / "x" / "0002.png", size=(8, 4))
    with pytest.raises(ValueError, match=r"0002\.png: 8x4 .*0000\.png .*6x4"):
        SampleSet.open(tmp_path).frames("x")
    with pytest.raises(ValueError, match="id='y'"):
        SampleSet.open(tmp_path).frames("y")


def test_manifests_say_what_belongs(tmp_path):
    pixels = picture(tmp_path / "a.png")
    picture(tmp_path / "stray.png")
    write_manifest(tmp_path)
    images = SampleSet.open(tmp_path)
    assert (images.ids, images.prompts) == (("a",), {"a": "a cat"})
    assert images.manifest["kind"] == "images"
    np.testing.assert_array_equal(images.frames("a")[0], pixels)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 2}, "format_version=2; .* 1"),
        ({"kind": "sounds"}, "kind='sounds'; .*images.*clips"),
        ({"samples": {}}, r"samples=\{\}"),
        ({"samples": {"a": {"files": "a.png"}}}, "sample 'a' .*list"),
        ({"samples": {"a": {"files": ["a.mp4"]}}}, "sample 'a' .*frames"),
        ({"samples": {"a": {"files": ["b.png"]}}}, r"b\.png: .*missing"),
        ({"samples": {"a": {"files": ["../a.png"]}}}, r"'\.\./a\.png' of 'a'"),
        ({"samples": {"a": {"files": ["/etc/a.png"]}}}, "'/etc/a.png' of 'a'"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_bad_manifests(tmp_path, changed, message):
    write_manifest(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        SampleSet.open(tmp_path)


def test_a_manifest_that_is_not_json(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format_version": 1')
    with pytest.raises(ValueError, match=r"manifest\.json: .*JSON"):
        SampleSet.open(tmp_path)


def sets(tmp_path, *ids):
    found = []
    for i, names in enumerate(ids):
        for name in names:
            picture(tmp_path / str(i) / f"{name}.png")
        found.append(SampleSet.open(tmp_path / str(i)))
    return found


def test_pairs_are_matched_by_id(tmp_path, capsys):
    assert pair_ids(*sets(tmp_path, "cab", "bac")) == ("a", "b", "c")
    assert capsys.readouterr().err == ""


def test_missing_and_extra_ids_are_errors_unless_allowed(tmp_path, capsys):
    a, b = sets(tmp_path, "abc", "bcdefghi")
    with pytest.raises(
        ValueError,
        match=r"1 only in .*0 \('a'\); 6 only in .*1 \('d', .*'h', and 1 more\).*allow_partial",
    ):
        pair_ids(a, b)
    assert pair_ids(a, b, allow_partial=True) == ("b", "c")
    assert "note: 2 pairs; ignored: 1 only in" in capsys.readouterr().err


def test_sets_that_cannot_be_paired(tmp_path):
    a, b = sets(tmp_path, "a", "b")
    with pytest.raises(ValueError, match=r"no common ids.*'a'.*'b'"):
        pair_ids(a, b, allow_partial=True)
    clip(tmp_path / "clips" / "a")
    with pytest.raises(ValueError, match=r"images.*clips"):
        pair_ids(a, SampleSet.open(tmp_path / "clips"))
