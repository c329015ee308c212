"""Folders of captioned files, and what is wrong with them."""

import json
import os

import pytest

from dit_accel.finetune.data.captions import read_captions


@pytest.fixture
def folder(tmp_path):
    """`folder(*files, **texts)`: a folder with empty media files, and text files by name."""

    def make(files=(), texts=()):
        root = tmp_path / "data"
        for name, text in {**dict.fromkeys(files, ""), **dict(texts)}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        root.mkdir(exist_ok=True)
        return root

    return make


def lines(*rows):
    return "".join(json.dumps(x) + "\n" for x in rows)


ROWS = [{"file_name": "v/b.mp4", "text": "second"}, {"file_name": "a.png", "text": " first \n"}]
TABLES = {
    "metadata.jsonl": lines(*ROWS),
    "captions.jsonl": "\ufeff" + lines(*ROWS) + "\n\n",
    "other.jsonl": lines(*ROWS),
    "metadata.csv": 'file_name,text,more\nv/b.mp4,second,\n\na.png,"first",x\n',
    "captions.tsv": "text\tfile_name\nsecond\tv/b.mp4\nfirst\ta.png\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(folder, name):
    root = folder(
        ["v/b.mp4", "a.png", ".hidden.mp4", ".cache/c.mp4", "notes.txt"], {name: TABLES[name]}
    )
    items = read_captions(root)
    assert [(x.id, x.caption, x.path) for x in items] == [
        ("v/b.mp4", "second", root / "v/b.mp4"),
        ("a.png", "first", root / "a.png"),
    ]
    assert [x.is_picture for x in items] == [False, True]


def test_captions_with_commas_quotes_and_line_breaks(folder):
    table = 'text,file_name\n"a ""red"" ball,\nand a box",a.mp4\n'
    (item,) = read_captions(folder(["a.mp4"], {"metadata.csv": table}))
    assert item.caption == 'a "red" ball,\nand a box'
    root = folder(["a.mp4"], {"metadata.csv": "text,file_name\n", "metadata.tsv": ""})
    (root / "metadata.csv").unlink()
    (root / "metadata.tsv").write_text('file_name\ttext\na.mp4\t"Red" ball\n')
    assert read_captions(root)[0].caption == '"Red" ball'


def test_columns_have_other_names(folder):
    table = lines({"video_path": "a.mp4", "caption": "x", "text": "not this"})
    root = folder(["a.mp4"], {"metadata.jsonl": table})
    (item,) = read_captions(root, caption_column="caption", video_column="video_path")
    assert item.caption == "x"
    with pytest.raises(ValueError, match=r"line 1: .*'file_name'.*'video_path'.*--video_column"):
        read_captions(root)
    with pytest.raises(ValueError, match=r"'captoin' .*'caption'.*--caption_column"):
        read_captions(root, caption_column="captoin", video_column="video_path")


def test_text_files_beside_the_files(folder):
    root = folder(
        ["b.mp4", "x/a.webm", "x/c.PNG"], {"b.txt": "two\n", "x/a.txt": "one", "x/c.txt": "three"}
    )
    assert [(x.id, x.caption) for x in read_captions(root)] == [
        ("b.mp4", "two"),
        ("x/a.webm", "one"),
        ("x/c.PNG", "three"),
    ]


def test_parts_of_videos(folder):
    rows = [
        {"file_name": "a.mp4", "text": "x", "start_seconds": 1.5, "end_seconds": 4},
        {"file_name": "a.mp4", "text": "y", "start_seconds": "4"},
        {"file_name": "a.mp4", "text": "z", "start_seconds": None, "end_seconds": ""},
    ]
    items = read_captions(folder(["a.mp4"], {"metadata.jsonl": lines(*rows)}))
    assert [(x.id, x.start, x.end) for x in items] == [
        ("a.mp4@1.5-4", 1.5, 4.0),
        ("a.mp4@4-", 4.0, None),
        ("a.mp4", 0.0, None),
    ]


def test_metadata_goes_before_captions_and_other_tables(folder):
    tables = {
        "metadata.jsonl": lines({"file_name": "a.mp4", "text": "metadata"}),
        "captions.jsonl": lines({"file_name": "a.mp4", "text": "captions"}),
        "z.csv": "file_name,text\na.mp4,z\n",
    }
    root = folder(["a.mp4"], tables)
    assert read_captions(root)[0].caption == "metadata"
    (root / "metadata.jsonl").unlink()
    assert read_captions(root)[0].caption == "captions"


A = {"file_name": "a.mp4", "text": "x"}
BAD = {
    "no such folder": (None, {}, r"instance_data_dir='.*none'"),
    "empty folder": ([], {}, r"instance_data_dir='.*data': .*\.jsonl"),
    "no captions": (
        ["a.mp4", "b.mp4"],
        {},
        r"instance_data_dir=.* a.mp4, b.mp4; .*\.txt",
    ),
    "one caption missing": (
        ["a.mp4", "b.mp4"],
        {"a.txt": "x"},
        r"instance_data_dir='.*data': .* b.mp4; .*\.txt",
    ),
    "caption without file": (
        ["a.mp4"],
        {"a.txt": "x", "v/b.txt": "y"},
        r"instance_data_dir='.*data': .* v/b.txt",
    ),
    "one caption of two files": (
        ["a.mp4", "a.png"],
        {"a.txt": "x"},
        r"a.txt .*: a.mp4, a.png",
    ),
    "empty text file": (["a.mp4"], {"a.txt": " \n"}, r"a.txt: .*empty"),
    "row missing": (
        ["a.mp4", "b.mp4"],
        {"metadata.jsonl": lines(A)},
        r"metadata.jsonl: no row for b.mp4",
    ),
    "file missing": ([], {"metadata.jsonl": lines(A)}, r"metadata.jsonl: .*: a.mp4"),
    "empty table": (["a.mp4"], {"metadata.jsonl": "\n"}, r"metadata.jsonl: .*no rows"),
    "empty caption": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "text": " "})},
        r"line 1: text=' ': .*text",
    ),
    "number as caption": (["a.mp4"], {"m.jsonl": lines({**A, "text": 3})}, r"line 1: text=3"),
    "null caption": (["a.mp4"], {"m.jsonl": lines({**A, "text": None})}, r"line 1: text=None"),
    "twice": (["a.mp4"], {"m.jsonl": lines(A, A)}, r"m.jsonl, line 2: 'a.mp4' .*line 1"),
    "twice, other spelling": (
        ["a.mp4"],
        {"m.jsonl": lines(A, {**A, "file_name": "./a.mp4"})},
        r"line 2: 'a.mp4' .*line 1",
    ),
    "up": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "file_name": "../x.mp4"})},
        r"file_name='../x.mp4': outside",
    ),
    "up inside": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "file_name": "v/../a.mp4"})},
        r"file_name='v/../a.mp4': outside",
    ),
    "absolute": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "file_name": "/etc/x.mp4"})},
        r"file_name='/etc/x.mp4': outside",
    ),
    "backslash": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "file_name": "..\\x.mp4"})},
        r"x.mp4': outside",
    ),
    "null byte": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "file_name": "a\0.mp4"})},
        r"mp4': outside",
    ),
    "unknown suffix": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "file_name": "x.doc"})},
        r"file_name='x.doc': .*suffix.*\.mp4",
    ),
    "not JSON": (["a.mp4"], {"m.jsonl": lines(A) + "{"}, r"m.jsonl, line 2: not JSON"),
    "a list": (["a.mp4"], {"m.jsonl": "[]"}, r"line 1: .*JSON object"),
    "cells": (
        ["a.mp4"],
        {"m.csv": "file_name,text\na.mp4,x,y\n"},
        r"m.csv, line 2: 3 cells.* 2",
    ),
    "two columns": (
        ["a.mp4"],
        {"m.csv": "text,text\na,b\n"},
        r"m.csv, line 1: column.*text, text",
    ),
    "two tables": (
        ["a.mp4"],
        {"m.csv": "", "n.csv": ""},
        r"instance_data_dir=.*: m.csv, n.csv",
    ),
    "start": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "start_seconds": -1})},
        r"start_seconds=-1: .*>= 0",
    ),
    "clock": (["a.mp4"], {"m.jsonl": lines({**A, "end_seconds": "00:12"})}, r"end_seconds='00:12'"),
    "part of a picture": (
        ["a.png"],
        {"m.jsonl": lines({"file_name": "a.png", "text": "x", "end_seconds": 1})},
        r"line 1: start_seconds and end_seconds of 'a.png'",
    ),
    "backwards": (
        ["a.mp4"],
        {"m.jsonl": lines({**A, "start_seconds": 2, "end_seconds": 1})},
        r"end_seconds=1: .*start_seconds=2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_in_one_line(folder, tmp_path, case):
    files, texts, message = BAD[case]
    root = tmp_path / "none" if files is None else folder(files, texts)
    with pytest.raises(ValueError, match=message) as found:
        read_captions(root)
    assert "\n" not in str(found.value)


def test_long_lists_are_cut(folder):
    root = folder([f"{i}.mp4" for i in range(9)])
    with pytest.raises(ValueError, match=r" 0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 4 more"):
        read_captions(root)


def test_text_that_is_no_utf8_is_named(folder):
    root = folder(["a.mp4"])
    (root / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"a.txt: .*utf-8"):
        read_captions(root)
    (root / "m.csv").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"m.csv: .*utf-8"):
        read_captions(root)


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_are_followed(folder, tmp_path):
    (tmp_path / "elsewhere.mp4").touch()
    root = folder([], {"metadata.jsonl": lines(A)})
    (root / "a.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    assert read_captions(root)[0].path == root / "a.mp4"
