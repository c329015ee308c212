"""Reading of prompts files."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.sampling.prompt_sets import SETS, load_prompts
from dit_accel.sampling.prompts import PromptRecord, number_prompts, prompts_sha256, read_prompts


def read(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_prompts(path)


def test_text_is_a_prompt_a_line(tmp_path):
    records = read(tmp_path, "p.txt", "\ufeffa cat\r\n\n  # 2 dogs  \n")
    assert records == [PromptRecord("00000", "a cat"), PromptRecord("00001", "# 2 dogs")]


def test_every_field_of_json_lines(tmp_path):
    line = {
        "id": "cat 1", "prompt": "a cat", "negative_prompt": "dog", "seed": 7, "height": 64, "width": 32,
        "num_frames": 5, "ref_path": "cats/1.png",
    }  # fmt: skip
    records = read(tmp_path, "p.jsonl", f'{json.dumps(line)}\n\n{{"prompt": "b", "seed": null}}\n')
    assert records == [PromptRecord(**line), PromptRecord("00001", "b")]
    assert records[0].sampling_arguments() == {
        "negative_prompt": "dog",
        "height": 64,
        "width": 32,
        "num_frames": 5,
    }


def test_tables(tmp_path):
    csv = read(tmp_path, "p.csv", 'Caption,seed,ID\n"a ""big"", red\ncat",3,x\n\nplain,,\n')
    assert csv == [PromptRecord("x", 'a "big", red\ncat', seed=3), PromptRecord("00001", "plain")]
    # As PartiPrompts is: quotation marks stand for themselves.
    header = "Prompt\tCategory\tChallenge\tNote\n"
    rows = 'a sign "STOP" in rain\tWorld\tText\t\n"A" and "B"\tAbstract\tBasic\t"x"\n'
    assert [x.prompt for x in read(tmp_path, "p.tsv", header + rows)] == [
        'a sign "STOP" in rain',
        '"A" and "B"',
    ]
    # As a spreadsheet writes it.
    assert read(tmp_path, "q.tsv", 'prompt\n"a ""B"""\n')[0].prompt == 'a "B"'


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1)))
def test_what_json_lines_hold_comes_back(tmp_path_factory, texts):
    prompts = [x.strip() for x in texts if x.strip()]
    if not prompts:
        return
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    lines = [json.dumps({"prompt": x, "id": f"n{i}"}) for i, x in enumerate(prompts)]
    path.write_text("\n".join(lines))
    records = read_prompts(path)
    assert [x.prompt for x in records] == prompts
    assert [x.id for x in records] == [f"n{i}" for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n  \n", r"prompts_file=.*p\.txt"),
        ("p.json", "[]", r"prompts_file=.*p\.json.*\.txt, \.jsonl, \.csv, \.tsv"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: .*JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n["b"]', "line 3: .*JSON object"),
        ("p.jsonl", '{"prompt": "  "}', "line 1: prompt=''"),
        ("p.jsonl", '{"prompt": 3}', "line 1: prompt=3"),
        ("p.jsonl", '{"prompt": "a\\ud800"}', r"line 1: prompt=.*\\ud800"),
        ("p.jsonl", '{"seed": 3}', "line 1: prompt=''"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', r"seed=1\.5"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "seed=-1"),
        ("p.jsonl", '{"prompt": "a", "height": true}', "height=True"),
        (
            "p.jsonl",
            '{"prompt": "a", "negativ_prompt": ""}',
            "'negativ_prompt'.*mean 'negative_prompt'",
        ),
        ("p.jsonl", '{"prompt": "a", "text": "b"}', "line 1: 'text': 'prompt'"),
        (
            "p.jsonl",
            '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}',
            "line 2: id='x': .*line 1",
        ),
        ("p.jsonl", '{"prompt": "a", "id": "00001"}\n{"prompt": "b"}', "line 2: id='00001'"),
        ("p.jsonl", '{"prompt": "a", "id": ""}', "id=''"),
        ("p.csv", "seed\n3\n", "line 1: header=seed: .*prompt"),
        ("p.csv", "prompt,sead\na,3\n", "line 1: .*'sead'.*mean 'seed'"),
        ("p.csv", "prompt,Prompt\na,b\n", "line 1: header=prompt, Prompt"),
        ("p.csv", "prompt,seed\na,3\nb,x\n", "line 3: seed='x'"),
        ("p.csv", "prompt,seed\na,3,4\n", "line 2: 3 cells.* 2"),
        ("p.csv", "prompt,seed\n,3\n", "line 2: prompt=''"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_files_are_one_error_with_the_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, text)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"prompts_file='.*none\.txt'"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"prompts_file='.*p\.txt'"):
        read_prompts(tmp_path / "p.txt")


def test_ids_become_safe_file_names(tmp_path):
    records = read(tmp_path, "p.jsonl", '{"prompt": "a", "id": "../a/b"}\n{"prompt": "b", "id": 7}')
    assert [x.id for x in records] == ["_._a_b", "7"]
    with pytest.raises(ValueError, match=r"id='\.\./x'"):
        PromptRecord("../x", "a")


def test_the_digest_is_of_the_records(tmp_path):
    records = number_prompts(["a", "b"])
    assert prompts_sha256(records) == prompts_sha256(read(tmp_path, "p.txt", "a\n\nb"))
    changed = [records[0], PromptRecord("00001", "b", seed=0)]
    assert prompts_sha256(records) != prompts_sha256(changed)


def test_shipped_sets():
    from dit_accel.demo.vocabulary import BACKGROUNDS, TEMPLATES, caption, combinations

    assert {name: len(load_prompts(name)) for name in SETS} == dict.fromkeys(SETS, 16)
    for name, motion in (("demo", True), ("demo-images", False)):
        known = {
            caption(c, b, t, motion)
            for c in combinations()
            for b in range(len(BACKGROUNDS))
            for t in range(len(TEMPLATES))
        }
        assert {x.prompt for x in load_prompts(name)} <= known
    assert len({x.prompt for x in load_prompts("smoke")}) == 16
    assert [x.id for x in load_prompts("demo", limit=2)] == ["train-00", "train-01"]


def test_load_prompts_names_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match=r"prompts=.*none\.txt.*smoke, demo, demo-images"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="limit=0"):
        load_prompts("smoke", limit=0)
