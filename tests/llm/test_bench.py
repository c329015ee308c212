"""The table: retrieval on the hand-written model, passkeys, texts, and rows that a later run keeps."""

import json

import pytest
import torch

from dit_accel import llm
from dit_accel.config import PrefillConfig
from dit_accel.llm.bench import retrieval
from dit_accel.llm.bench.passkey import make_passkeys, score_passkeys
from dit_accel.llm.bench.retrieval import TASKS, accuracy
from dit_accel.llm.bench.run import BenchSettings, prepare, read_rows, run_bench
from dit_accel.llm.bench.table import HEADS, table_lines
from dit_accel.llm.bench.texts import TEXTS, read_text
from dit_accel.llm.bench.wired import FIRST_VALUE, KEYS, START, wired_model
from dit_accel.llm.loading import read_source
from dit_accel.llm.prefill import pattern_names

from .small import save, tokenizer

SMALL = {"block": 16, "tail": 16, "crossover": 0}
BLOCKS = PrefillConfig(pattern="blocks", **SMALL)
WINDOW = PrefillConfig(pattern="a_shape", options={"window": 64}, **SMALL)


@pytest.fixture(scope="module")
def wired():
    return wired_model()


@pytest.mark.parametrize(("length", "prompts"), [(1_000, 2), (2_501, 1)])
@pytest.mark.parametrize("task", TASKS)
def test_the_handwritten_model_finds_everything(wired, task, length, prompts):
    assert accuracy(llm.disable(wired), task, length, prompts=prompts) == 1


def test_it_finds_keys_in_long_prompts(wired):
    assert accuracy(llm.disable(wired), "key_value", 6_000, prompts=1) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_window_does_not_reach_the_answers(wired, task):
    """A pattern that cannot see the keys must fail, or the tests below would show nothing."""
    prefill = {"pattern": "a_shape", "options": {"window": 256}, "dense_layers": 0, **SMALL}
    llm.enable(wired, prefill=prefill)
    assert accuracy(wired, task, 1_500, prompts=2) == 0


@pytest.mark.parametrize("name", [x for x in pattern_names() if x != "a_shape"])
def test_patterns_with_dense_last_rows_find_everything(wired, name):
    llm.enable(wired, prefill={"pattern": name, "dense_layers": 0, "crossover": 0})
    for task in ("key_value", "multi_needle", "variable_tracing"):
        assert accuracy(wired, task, 1_200, prompts=1) == 1
    assert llm.summary(wired).sparse_calls == 6


def test_the_model_generates_a_chain_of_references(wired):
    names, value = [3, 7, 11], FIRST_VALUE + 5
    noise = list(range(FIRST_VALUE + 20, FIRST_VALUE + 40))
    ids = [START, *noise]
    for key, target in zip(names, [KEYS + 7, KEYS + 11, value], strict=True):
        ids += [key, target, *noise]
    llm.disable(wired)
    out = wired.generate(torch.tensor([[*ids, 3]]), max_new_tokens=3, do_sample=False)
    assert out[0, -3:].tolist() == [KEYS + 7, KEYS + 11, value]


@pytest.mark.parametrize("task", TASKS)
def test_questions_have_their_length_and_their_answers(task):
    rng = retrieval.random.Random(0)
    question = TASKS[task](1_000, rng)
    assert len(question.ids) == 1_000
    assert len(question.positions) == len(question.answers) > 0
    assert max(question.ids) <= START


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "keys", "length": 2_000}, "task='keys'.*key_value"),
        ({"task": "key_value", "length": 500}, "length=500.*>= 800"),
    ],
    ids=["task", "length"],
)
def test_bad_questions_are_named(wired, arguments, message):
    with pytest.raises(ValueError, match=message):
        accuracy(wired, **arguments)


def test_a_model_for_more_positions_than_it_can_tell_apart_is_refused():
    with pytest.raises(ValueError, match="max_length=40000"):
        wired_model(40_000)


def test_passkeys_are_hidden_at_spread_depths():
    words = tokenizer()
    made = make_passkeys(words, 400, 4)
    assert made == make_passkeys(words, 400, 4)
    assert len({x.digits for x in made}) == 4
    depths = []
    for x in made:
        text = words.decode(x.ids)
        assert len(x.ids) + len(x.answer) == 400
        assert text.count(x.digits) == 2
        assert text.endswith("The pass key is")
        assert words.decode(x.answer) == f" {x.digits}"
        depths.append(text.index(x.digits))
    assert depths == sorted(depths)


def test_the_real_model_finds_a_passkey(smollm2):
    model, words = smollm2
    found = score_passkeys(model, make_passkeys(words, 256, 1))
    assert (found.exact, found.prompts, found.token_accuracy) == (1, 1, 1)


@pytest.mark.parametrize("name", TEXTS)
def test_built_in_texts_are_long(name):
    assert len(read_text(name)) > 200_000


def test_texts_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in (("prosa", "text='prosa'"), (str(tmp_path / "empty.txt"), "empty.txt")):
        with pytest.raises(ValueError, match=message):
            read_text(name)


@pytest.fixture(scope="module")
def prepared(small_llama):
    settings = BenchSettings(
        length=300, passkeys=1, retrieval_lengths=(1_000,), retrieval_prompts=1
    )
    source = read_source(str(small_llama))
    return source, prepare(source, settings, dtype="float32", device="cpu")


class Loads:
    """Loads a model and counts how often."""

    def __init__(self, source):
        self.source, self.count = source, 0

    def __call__(self):
        self.count += 1
        return self.source.load(dtype=torch.float32, device="cpu")


class StopError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_with_the_missing_rows(prepared, tmp_path):
    source, bench = prepared
    output, loads, patterns = (
        tmp_path / "bench.json",
        Loads(source),
        {"blocks": BLOCKS, "window": WINDOW},
    )

    def stop(row):
        if row["name"] == "blocks":
            raise StopError

    with pytest.raises(StopError):
        run_bench(loads, bench, patterns, output=output, on_row=stop)
    assert [x["name"] for x in json.loads(output.read_text())["rows"]] == ["dense", "blocks"]
    made = []
    results = run_bench(
        loads,
        bench,
        patterns,
        output=output,
        rows=read_rows(output, bench.header),
        on_row=made.append,
    )
    assert [x["name"] for x in made] == ["window"]
    assert loads.count == 2
    assert json.loads(output.read_text()) == json.loads(json.dumps(results))
    again = run_bench(loads, bench, {"window": WINDOW}, rows=results["rows"])
    assert [x["name"] for x in again["rows"]] == ["dense", "window", "blocks"]
    assert loads.count == 2

    dense, blocks, window = results["rows"]
    assert dense["density"] == 1
    assert set(dense["retrieval"]["1000"].values()) == {1.0}
    assert blocks["retrieval"]["1000"]["key_value"] == 1
    assert window["retrieval"]["1000"]["key_value"] == 0
    assert 0 < window["retrieval"]["1000"]["density"] < 0.5
    assert 0 < window["density"] < 0.9
    assert set(window["texts"]) == set(TEXTS)
    assert results["versions"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    lines = table_lines(results)
    assert lines[0].split()[0] == "pattern"
    assert lines[0].endswith("video 1000  density 1000")
    assert all(f"{x} 1000" in lines[0] for x in HEADS.values())
    assert [x.split()[0] for x in lines[1:4]] == ["dense", "blocks", "window"]


def test_other_settings_of_a_row_replace_it(prepared):
    source, bench = prepared
    loads = Loads(source)
    rows = [{"name": "dense", "prefill": None}, {"name": "blocks", "prefill": WINDOW.to_dict()}]
    results = run_bench(loads, bench, {"blocks": BLOCKS}, rows=rows)
    assert loads.count == 1
    assert results["rows"][1]["prefill"]["pattern"] == "blocks"


def test_a_pattern_that_cannot_read_a_text_fails_alone(prepared, monkeypatch):
    source, bench = prepared

    def refuse(self, prompt):
        raise ValueError("grid: accepted are videos")

    monkeypatch.setattr("dit_accel.llm.prefill.triangle.Triangle.plan", refuse)
    triangle = PrefillConfig(pattern="triangle", **SMALL)
    results = run_bench(Loads(source), bench, {"triangle": triangle, "blocks": BLOCKS})
    assert "error" in results["rows"][1]
    assert "error" not in results["rows"][2]
    assert table_lines(results)[-1] == "triangle: grid: accepted are videos"


def test_retrieval_is_not_claimed_where_nothing_was_sparse(prepared):
    """The hand-written model has two layers; from two thirds on there is none."""
    source, bench = prepared
    deep = PrefillConfig(pattern="dense", by_layer={0.7: "triangle"}, **SMALL)
    results = run_bench(Loads(source), bench, {"deep": deep})
    assert set(results["rows"][1]["retrieval"]["1000"].values()) == {None}


def test_retrieval_alone_loads_no_language_model(prepared, monkeypatch):
    monkeypatch.setattr(retrieval, "TASKS", {"key_value": TASKS["key_value"]})
    source, _ = prepared
    settings = BenchSettings(
        texts=(), passkeys=0, retrieval_lengths=(800, 1_000), retrieval_prompts=1
    )
    loads = Loads(source)
    bench = prepare(source, settings, dtype="float32", device="cpu")
    results = run_bench(loads, bench, {"window": WINDOW})
    assert loads.count == 0
    _, window = results["rows"]
    assert list(window["retrieval"]) == ["800", "1000"]
    assert [x["key_value"] for x in window["retrieval"].values()] == [0, 0]
    head, dense, row = (line.split("  ") for line in table_lines(results))
    assert head[0] == "pattern"
    assert "keys 800" in " ".join(head)
    assert dense[0] == "dense"
    assert row[0] == "window"


def test_results_of_other_settings_are_kept_apart(prepared, tmp_path):
    _, bench = prepared
    path = tmp_path / "bench.json"
    changed = {**bench.header, "settings": {**bench.header["settings"], "length": 500}, "rows": []}
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"length=500\b.*\b300\b"):
        read_rows(path, bench.header)
    for text, message in (("{", "output=.*bench.json"), ("{}", "output=.*llm bench")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(path, bench.header)


@pytest.mark.parametrize(
    "bad",
    [
        {"length": 100},
        {"texts": ("code", "code")},
        {"passkeys": -1},
        {"retrieval_lengths": (700,)},
        {"retrieval_lengths": (1_000, 40_000)},
        {"retrieval_lengths": (1_000, 1_000)},
        {"retrieval_lengths": ()},
        {"retrieval_prompts": 1.5},
        {"seed": None},
    ],
    ids=lambda x: str(x),
)
def test_bad_settings_are_named(bad, unchecked):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        BenchSettings(**bad)


def test_a_length_that_the_model_does_not_accept_is_named(tmp_path):
    source = read_source(str(save(tmp_path / "model", max_position_embeddings=300)))
    with pytest.raises(ValueError, match=r"length: 400 tokens.*\b300\b"):
        prepare(source, BenchSettings(length=400), dtype="float32", device="cpu")
