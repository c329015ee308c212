"""Safe file names for arbitrary text."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dit_accel.sampling.names import MAX_BYTES, name_key, safe_name, unique_names

TEXT = st.text(st.characters(), max_size=60) | st.text("aA./\\ -CONcon\u00e9", max_size=12)


@given(TEXT)
@example("../../etc/passwd")
@example("..")
@example("a\x00b\n")
@example("\u202egnp.exe")
@example("con.txt")
@example("é" * 200)
@example("x" * 178 + ".mp4")
@example("\ud800")
@example("a\u00a0.")
@example("x" * 179 + "\u3000y")
@example("con" + " " * 200 + "x")
@example("con." + "x" * 171 + ".png.y")
def test_safe_names_are_safe(tmp_path_factory, text):
    name = safe_name(text)
    assert 0 < len(name.encode()) <= MAX_BYTES
    assert not set(name) & set('/\\:*?"<>|\0\n')
    assert not name.startswith(".")
    assert not name.endswith((" ", "."))
    assert name.split(".")[0].strip().lower() not in ("con", "nul", "com1", "lpt9")
    assert safe_name(name) == name
    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert os.listdir(folder) == [name]
    (folder / name).unlink()


@given(TEXT | st.text(st.sampled_from("a. \u00a0\u3000\u0301/"), max_size=200), st.integers(8, 40))
@example("a\u00a0.", 40)
@example("aaaaa\u3000aaa", 8)
@example("nul     x", 8)
@example("nul.aaa.gifx", 12)
def test_a_safe_name_is_its_own_safe_name(text, max_bytes):
    for ending in ("", "-0", "-12"):
        name = safe_name(text, ending=ending, max_bytes=max_bytes)
        assert len(name.encode()) <= max_bytes
        assert name.endswith(ending)
        assert safe_name(name) == safe_name(name, max_bytes=max_bytes) == name


@given(st.lists(TEXT | st.sampled_from(["a", "A", "a-2", "a/2", "x" * 300]), max_size=12))
def test_unique_names_differ_on_every_file_system(texts):
    for ending in ("", "-0"):
        names = unique_names(texts, ending=ending)
        assert len({name_key(x) for x in names}) == len(texts)
        assert all(len(x.encode()) <= MAX_BYTES and x.endswith(ending) for x in names)


def test_names_that_are_safe_stay():
    for text in ("a cat, 3.5 m tall", "00012", "Fireworks.-0", "naïve café (2)"):
        assert safe_name(text) == text
    assert unique_names(["a b", "c"]) == ["a b", "c"]
    assert unique_names(["A x", "a x"], ending="-1", fold_case=False) == ["A x-1", "a x-1"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", "a_b"),
        ("../up", "_._up"),
        ("x.mp4", "x_mp4"),  # the clip of x
        ("manifest.json", "manifest_json"),
        ("Aux", "_Aux"),
        ("", "_"),
    ],
)
def test_what_is_changed(text, name):
    assert safe_name(text) == name
