"""Search: a head that needs a pattern gets it, a search that was stopped goes on, and its file is a setting."""

import itertools
import json
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import llm
from dit_accel.config import PrefillConfig
from dit_accel.llm.bench.retrieval import TASKS
from dit_accel.llm.bench.texts import START, read_text
from dit_accel.llm.bench.wired import HEAD, HEADS, wired_model
from dit_accel.llm.control import attention_layers
from dit_accel.llm.loading import read_source
from dit_accel.llm.prefill import Prompt, pattern_of
from dit_accel.llm.quality import outputs
from dit_accel.llm.search import layers as layers_module
from dit_accel.llm.search.allocate import DENSE, allocate
from dit_accel.llm.search.cost import head_densities
from dit_accel.llm.search.heads import choose_heads, measure_heads
from dit_accel.llm.search.journal import Journal
from dit_accel.llm.search.layers import last_log_probabilities
from dit_accel.llm.search.measure import contribution_errors, measure_sample, output_gram
from dit_accel.llm.search.run import Search, journal_path
from dit_accel.llm.search.samples import Sample, make_samples
from dit_accel.llm.search.settings import SearchSettings, default_candidates

from ..cli.command import run
from .models import make, prompt
from .prompts import causal, prompts
from .small import tokenizer

NEAR = {"pattern": "triangle", "options": {"sink": 16, "window": 32}}
FAR = {"pattern": "hybrid", "options": {"top_p": 0.9, "columns": 0.05}}
SMALL = {"length": 300, "samples": 1, "block": 16, "tail": 16}
CANDIDATES = {"near": NEAR, "far": FAR}


# -- allocation --------------------------------------------------------------------------------------


def test_the_head_whose_error_falls_most_comes_first():
    costs, errors = [[0.1, 0.5]] * 3, [[4.0, 1.0], [9.0, 1.0], [2.0, 1.0]]
    assert allocate(costs, errors, 0.1) == [0, 0, 0]
    assert allocate(costs, errors, 0.7 / 3) == [0, 1, 0]
    assert allocate(costs, errors, 0.5) == [1, 1, 1]
    assert allocate(costs, errors, 1.0) == [DENSE] * 3


def test_a_poor_candidate_does_not_hide_a_good_one():
    assert allocate([[0.1, 0.2, 0.3]], [[10.0, 9.9, 0.1]], 0.3) == [2]


def test_a_layer_without_candidates_stays_dense():
    assert allocate([[], [0.2]], [[], [1.0]], 0.6) == [DENSE, 0]


def test_a_budget_below_the_cheapest_candidates_is_named():
    with pytest.raises(ValueError, match=r"density=0.1\b.*0.200"):
        allocate([[0.2], [0.2]], [[1.0], [1.0]], 0.1)


@given(st.data())
def test_no_choice_at_the_same_cost_is_much_better(data):
    """Greedy on hulls misses the optimum by less than the one change that did not fit."""
    number = st.integers(1, 100).map(lambda x: x / 100)
    heads = data.draw(st.lists(st.lists(st.tuples(number, number), min_size=1, max_size=3), min_size=1, max_size=4))  # fmt: skip
    budget = data.draw(st.integers(5, 10).map(lambda x: x / 10))
    costs, errors = ([[x[i] for x in head] for head in heads] for i in (0, 1))
    tables = [[*head, (1.0, 0.0)] for head in heads]
    try:
        found = allocate(costs, errors, budget)
    except ValueError:
        assert sum(min(c) for c in costs) > budget * len(heads) - 1e-9
        return
    total = [sum(t[i][k] for t, i in zip(tables, found, strict=True)) for k in (0, 1)]
    assert total[0] <= budget * len(heads) + 1e-6
    best = min(
        sum(x[1] for x in choice)
        for choice in itertools.product(*tables)
        if sum(x[0] for x in choice) <= budget * len(heads) + 1e-9
    )
    assert total[1] <= best + max(max(e) for e in errors) + 1e-6


# -- measurements ------------------------------------------------------------------------------------


PLANS = [
    ("hybrid", {"top_p": 0.4, "columns": 7}),
    ("hybrid", {"top_p": 0.4, "columns": 5, "per_group": True}),
    ("triangle", {"window": 0.2}),
    ("vertical_slash", {"columns": 0.05, "slashes": 0.1}),
    ("grid", {"stride": 7, "phase": 2, "window": 20, "rows": True}),
]


@pytest.mark.parametrize(("name", "options"), PLANS)
@given(prompt=prompts())
def test_densities_are_those_of_the_mask(name, options, prompt):
    heads = prompt.q.shape[1]
    plan = pattern_of(name, options).plan(prompt)
    mask = plan.for_heads(heads).to_dense_mask().expand(len(prompt.q), heads, -1, -1)
    expected = mask.double().sum((-1, -2)).mean(0) / causal(prompt).sum()
    found = head_densities(plan, heads)
    torch.testing.assert_close(found, expected)
    assert found.mean().item() == pytest.approx(plan.density())


def test_an_error_is_what_a_head_adds_wrongly_to_the_hidden_states():
    torch.manual_seed(0)
    heads, d, hidden = 3, 4, 20
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(heads * d, hidden, bias=False)
    dense, sparse = torch.randn(2, 1, heads, 7, d)
    residual = torch.rand(1, 7) + 0.5
    found = contribution_errors(sparse, dense, output_gram(module, heads, d), residual)
    for h in range(heads):
        part = module.o_proj.weight[:, h * d : (h + 1) * d]
        change = (sparse - dense)[0, h] @ part.T
        expected = (change.square().sum(-1) / residual[0]).mean()
        torch.testing.assert_close(found[h], expected)
    assert output_gram(module, heads, 5) is None


def test_measuring_leaves_the_model_as_it_was():
    model, ids = make("Qwen3"), prompt(rows=1, length=200)
    before = model(ids).logits
    found = {}
    patterns = [pattern_of(x["pattern"], x["options"]) for x in CANDIDATES.values()]
    measure_sample(model, ids, patterns, {0, 2}, block=16, tail=16, on_layer=found.__setitem__)
    assert sorted(found) == [0, 2]
    assert all(len(x["errors"]) == 2 and len(x["errors"][0]) == 4 for x in found.values())
    assert torch.equal(model(ids).logits, before)
    assert not any(x._forward_pre_hooks for x in model.modules())


def test_a_layer_with_a_window_has_no_candidates():
    model, found = make("Gemma3"), {}
    pattern = pattern_of("triangle", {})
    ids = prompt(rows=1, length=200)
    measure_sample(model, ids, [pattern], {0, 1}, block=16, tail=0, on_layer=found.__setitem__)
    assert found[0]["costs"] == []
    assert found[1]["costs"] != []


def planted_model():
    """The retrieval model; in its second layer, one head alone finds what the next token needs."""
    model = wired_model()
    weight = attention_layers(model)[1].o_proj.weight
    with torch.no_grad():
        weight[:, 2 * HEAD : 3 * HEAD] *= HEADS
        for head in (0, 1, 3):
            weight[:, head * HEAD : (head + 1) * HEAD] = 0
    return model


def test_the_head_that_looks_far_gets_the_budget():
    model = planted_model()
    rng = random.Random(0)
    ids = [torch.tensor([TASKS["key_value"](1_000, rng).ids]) for _ in range(2)]
    samples = [Sample("keys", i, "", x, False) for i, x in enumerate(ids)]
    settings = SearchSettings(candidates=CANDIDATES, density=0.3, **SMALL)
    journal = Journal(None, {})
    steps = []
    measure_heads(lambda: model, samples, settings, 2, journal, lambda: steps.append(1))
    assert len(steps) == 4
    found = choose_heads(samples, settings, 2, {"head": 4, "group": 2}, journal)
    rows = found["chosen"]
    assert rows[1][2] != "near"  # all other heads see enough in a window, or say nothing
    assert rows[1][:2] + rows[1][3:] == ["near"] * 3
    assert found["density"] <= 0.3
    lazy = choose_heads(samples, SearchSettings(candidates=CANDIDATES, density=0.18, **SMALL), 2, {"head": 4, "group": 2}, journal)  # fmt: skip
    assert lazy["error"] > 10 * found["error"]
    groups = SearchSettings(find="groups", candidates=CANDIDATES, density=0.4, **SMALL)
    rows = choose_heads(samples, groups, 2, {"head": 4, "group": 2}, journal)["chosen"]
    assert [len(x) for x in rows] == [2, 2]
    assert rows[1][0] == "near" != rows[1][1]


# -- samples -----------------------------------------------------------------------------------------


def test_samples_are_other_windows_than_those_of_the_benchmark():
    settings = SearchSettings(length=3_000, samples=2, checks=2)
    samples = make_samples(tokenizer(), settings)
    assert len({x.name for x in samples}) == 8
    assert [x.held_out for x in samples] == [False, False, True, True] * 2
    for name in settings.texts:
        starts = [x.start for x in samples if x.text == name]
        assert starts[0] >= len(read_text(name)) // 2 > START
        assert min(b - a for a, b in itertools.pairwise(starts)) > 12 * 3_000
    assert all(x.ids.shape == (1, 3_000) for x in samples)


def test_a_text_that_is_too_short_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 400)
    settings = SearchSettings(length=300, samples=3, checks=1, texts=(str(tmp_path / "a.txt"),))
    with pytest.raises(ValueError, match=r"length=300\b.* 4 samples"):
        make_samples(tokenizer(), settings)


# -- runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(small_llama):
    return read_source(str(small_llama))


def search(source, **changes):
    settings = SearchSettings(**{"candidates": CANDIDATES, "density": 0.7, **SMALL, **changes})
    return Search(source, settings, dtype="float32", device="cpu")


def loader(source):
    return lambda: source.load(dtype=torch.float32, device="cpu")


def loaded():
    raise AssertionError("a model was loaded")


def without_times(result):
    return {k: x for k, x in result.items() if k != "seconds_over_dense"}


class StopError(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"find": "layers", "candidates": {"near": NEAR}, "max_kl": 1.0}], ids=["heads", "layers"])  # fmt: skip
def test_a_search_that_was_stopped_goes_on(source, tmp_path, monkeypatch, changes):
    whole = search(source, **changes).run(loader(source), output=tmp_path / "whole.json")
    write, count = Journal.__setitem__, itertools.count()

    def stop(self, name, value):
        write(self, name, value)
        if next(count) == 3:
            raise StopError

    monkeypatch.setattr(Journal, "__setitem__", stop)
    output = tmp_path / "stopped.json"
    with pytest.raises(StopError):
        search(source, **changes).run(loader(source), output=output)
    assert not output.exists()
    monkeypatch.setattr(Journal, "__setitem__", write)
    first = json.loads(journal_path(output).read_text())["values"]
    assert len(first) == 4
    result = search(source, **changes).run(loader(source), output=output)
    assert without_times(result) == without_times(whole)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    after = json.loads(journal_path(output).read_text())["values"]
    assert {k: after[k] for k in first} == first

    again = search(source, **changes).run(loaded, output=output)
    assert again == result


def test_another_density_needs_no_measurements(source, tmp_path):
    output = tmp_path / "a.json"
    low = search(source, density=0.6, checks=0).run(loader(source), output=output)
    high = search(source, density=0.9, checks=0).run(loaded, output=output)
    assert low["density"] <= 0.6 < high["density"] <= 0.9
    assert high["error"] < low["error"]
    with pytest.raises(ValueError, match=r"density=0.01\b"):
        search(source, density=0.01, checks=0).run(loaded, output=output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 290}, r"length=300\b.*\b290\b"),
        ({"candidates": {"near": NEAR}}, r"far=\{.*None"),
    ],
)
def test_a_journal_of_other_settings_is_refused(source, tmp_path, changes, message):
    output = tmp_path / "a.json"
    Journal(journal_path(output), search(source).header)["a"] = 1
    assert "a" in search(source).journal(output)
    with pytest.raises(ValueError, match=message):
        search(source, **changes).journal(output)
    assert "a" not in search(source, **changes).journal(output, overwrite=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "llm-search"}'])
def test_a_file_that_is_no_journal_is_refused(source, tmp_path, text):
    journal_path(tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"output=.*a\.journal\.json"):
        search(source).journal(tmp_path / "a.json")


@pytest.mark.parametrize("find", ["heads", "groups"])
def test_the_file_is_a_setting(source, tmp_path, find):
    output = tmp_path / "a.json"
    result = search(source, find=find).run(loader(source), output=output)
    assert result["format_version"] == 1
    entries = {"heads": 4, "groups": 2}[find]
    assert [len(x) for x in result["chosen"]] == [entries] * 3
    (check, other) = result["checks"]
    assert check["sample"].startswith("prose:")
    assert other["sparse_calls"] > 0
    config = PrefillConfig.load(str(output))
    assert config.num_layers == 3
    assert PrefillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = loader(source)()
    sparse = PrefillConfig.from_dict({**vars(config), "crossover": 0})
    llm.enable(model, prefill=sparse)
    outputs(model, search(source).samples[0].ids)
    found = [x.density for x in llm.summary(model).layers]
    expected = [1.0 if set(x) == {"dense"} else y for x, y in zip(result["chosen"], result["density_by_layer"], strict=True)]  # fmt: skip
    for density, promised in zip(found, expected, strict=True):
        # Promised is a mean over two samples, this is one of them.
        assert (density or 1.0) == pytest.approx(promised, abs=0.1)


def test_the_least_sensitive_layers_are_found(source, monkeypatch):
    worth = [0.5, 0.001, 0.1]

    def divergence(model, sample, dense, settings, layers):
        return sum(worth[i] for i in layers) * (2 if sample.held_out else 1)

    monkeypatch.setattr(layers_module, "_divergence", divergence)
    near = {"find": "layers", "candidates": {"near": NEAR}, "max_layers": 3}
    result = search(source, max_kl=0.3, **near).run(loader(source))
    assert result["layers_found"] == [1, 2]
    assert result["sensitivity"] == pytest.approx(worth)
    assert result["held_out_kl"] == pytest.approx({"3": 1.202, "2": 0.202})
    assert result["chosen"] == ["dense", "near", "near"]
    none = search(source, max_kl=0.0, **near).run(loader(source))
    assert none["chosen"] == ["dense"] * 3


def test_divergences_are_those_of_the_last_positions():
    model, ids = make("Llama", initializer_range=0.3), prompt(rows=1, length=300)
    settings = SearchSettings(find="layers", candidates={"near": NEAR}, **SMALL)
    sample = Sample("a", 0, "", ids, False)
    dense = last_log_probabilities(model, ids)
    torch.testing.assert_close(dense, outputs(model, ids).last)
    one, all_ = (layers_module._divergence(model, sample, dense, settings, x) for x in ([1], range(3)))  # fmt: skip
    assert 0 < one < all_
    torch.testing.assert_close(last_log_probabilities(model, ids), dense)


# -- settings and command ----------------------------------------------------------------------------


@pytest.mark.parametrize("find", ["heads", "groups", "layers"])
def test_default_candidates_are_patterns(find):
    assert SearchSettings(find=find).candidates == default_candidates(find)


def test_budgets_of_default_candidates_grow_with_the_prompt():
    g = torch.Generator().manual_seed(3)
    densities = []
    for length in (2_048, 4_096):
        q, k = (torch.randn(1, h, length, 16, generator=g) for h in (2, 1))
        options = default_candidates("heads")["window_25"]["options"]
        plan = pattern_of("triangle", options).plan(Prompt(q, k, scale=0.25, tail=0))
        densities.append(plan.density())
    assert densities[0] == pytest.approx(densities[1], abs=0.05)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"find": "head"}, "find='head'"),
        ({"density": 0}, "density=0"),
        ({"density": 1.5}, "density=1.5"),
        ({"max_layers": 0}, "max_layers=0.*>= 1"),
        ({"max_kl": -1}, "max_kl=-1.*>= 0"),
        ({"length": 100}, "length=100.*>= 256"),
        ({"texts": ()}, r"texts=\(\)"),
        ({"samples": 0}, "samples=0.*>= 1"),
        ({"checks": -1}, "checks=-1"),
        ({"find": "layers", "checks": 0}, "checks=0.*layers"),
        ({"block": 48}, "block=48"),
        ({"tail": -1}, "tail=-1"),
        ({"candidates": {"dense": NEAR}}, "candidates: 'dense'"),
        ({"candidates": {"a": "hybrid"}}, "candidates: 'a' is 'hybrid'"),
        ({"candidates": {"a": {"pattern": "hybrid", "options": {"top_q": 1}}}}, "hybrid.*'top_q'"),
        ({"find": "layers", "candidates": CANDIDATES}, "candidates=.*layers"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(bad, message, unchecked):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**bad)


def test_the_command_writes_a_setting_that_other_commands_take(small_llama, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(json.dumps(CANDIDATES))
    output = tmp_path / "new" / "found.json"
    options = ("--model", small_llama, "--length", 300)
    small = ("--samples", 1, "--block", 16, "--tail", 16, "--density", 0.7)
    assert run("llm", "search", *options, *small, "--candidates", tmp_path / "c.yaml", "--output", output) == 0  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("density 0.")
    assert lines[-1] == str(output)
    assert sorted(x.name for x in output.parent.iterdir()) == ["found.journal.json", "found.json"]
    bounds = ("--max-kl", 100, "--max-ppl-percent", 1000)
    assert run("llm", "verify", *options, "--prefill", output, "--crossover", 0, *bounds) == 0
    assert run("llm", "search", *options, *small, "--output", output) == 2
    assert "window_06=None" in capsys.readouterr().err
    bench = ("--passkeys", 0, "--retrieval-prompts", 1, "--output", tmp_path / "bench.json")
    assert run("llm", "bench", *options, *bench, "--patterns", output) == 0
    row = json.loads((tmp_path / "bench.json").read_text())["rows"][1]
    assert row["name"] == "found"
    assert {x for found in row["retrieval"].values() for x in found.values()} == {None}


def test_the_command_finds_layers(small_llama, tmp_path, capsys):
    options = ("--model", small_llama, "--length", 300, "--samples", 1, "--tail", 16)
    output = tmp_path / "layers.json"
    assert run("llm", "search", "--find", "layers", *options, "--output", output) == 0
    assert "triangle in 1 layers" in capsys.readouterr().out
    assert PrefillConfig.load(str(output)).by_layer[0] in ("dense", {"pattern": "triangle", "options": {}})  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--density", "2"), "density=2.0"),
        (("--length", "100"), "length=100"),
        (("--output", "a.txt"), r"output='a\.txt'.*\.json"),
        (("--output", "taken.json"), r"output='taken\.json'.*llm search"),
        (("--candidates", "none.yaml"), r"none\.yaml.*YAML"),
        (("--candidates", "list.yaml"), r"candidates='list\.yaml'.*mapping"),
        (("--texts", "prosa", "--length", "300"), "text='prosa'"),
        (("--length", "600"), r"length: 600 tokens.*\b512\b"),
    ],
)
def test_bad_commands_are_refused(small_llama, refused, tmp_path, arguments, message):
    (tmp_path / "taken.json").write_text("{}")
    (tmp_path / "list.yaml").write_text("[1]")
    line = refused("search", "--model", small_llama, *arguments)
    assert re.search(message, line), line
