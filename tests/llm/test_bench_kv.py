"""Conversations on caches: sessions, modes, the table, rows that a later run keeps."""

import json
import random

import pytest
import torch

from dit_accel import llm
from dit_accel.llm.bench.kv import lookups, text_sessions
from dit_accel.llm.bench.kv.conversation import MODES, converse, own_cache
from dit_accel.llm.bench.kv.picture import draw
from dit_accel.llm.bench.kv.session import Session, Turn, read_sessions, tokenized
from dit_accel.llm.bench.kv.text_quality import distance, predict_rest
from dit_accel.llm.bench.wired import wired_model
from dit_accel.llm.kvcache.cache import KVCache

from ..cli.command import run
from .models import make, prompt
from .small import tokenizer


@pytest.fixture
def wired():
    return wired_model()


def rights(model, task, mode, kv=None, length=1000, sessions=1):
    rng, found = random.Random(3), []
    if kv is not None:
        llm.enable(model, kv=kv)
    for _ in range(sessions):
        session = lookups.TASKS[task](length, 3, rng)
        made = (lambda: own_cache(model)) if kv is None else (lambda: KVCache(model, kv))
        found.append(
            [x.right for x in converse(model, session, mode, new_cache=made, new_tokens=2)]
        )
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", lookups.TASKS)
def test_the_hand_written_model_answers_each_turn(wired, task, mode):
    assert all(all(x) for x in rights(wired, task, mode))


@pytest.mark.parametrize(
    ("mode", "want"),
    [("single", [True] * 3), ("multi_turn", [True, False, False]), ("multi_request", [False] * 3)],
)
def test_a_window_has_lost_the_answers(wired, mode, want):
    """Only a question that is processed with the context finds keys before the window; else the tasks would show nothing."""
    kv = {"select": "none", "recent": 128}
    assert rights(wired, "key_value", mode, kv) == [want]


def test_a_conversation_keeps_right_answers_and_no_others():
    model, seen = make("Llama"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].tolist()), with_kwargs=True
    )
    session = Session([5, 6, 7], [Turn([8], [9]), Turn([10, 11], [12]), Turn([13], [14])])
    cache = own_cache(model)
    figures = converse(model, session, "multi_turn", new_cache=lambda: cache, new_tokens=3)
    questions = [x[0] for x in seen[::3]]
    assert questions == [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
    assert [x.tokens for x in figures] == [4, 7, 9]
    assert cache.get_seq_length() == 9
    with torch.no_grad():
        whole = model(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]]))
        on = model(torch.tensor([[50]]), past_key_values=cache).logits
        want = model(torch.tensor([[50]]), past_key_values=whole.past_key_values).logits
    torch.testing.assert_close(on, want)


def test_each_request_finds_the_context_only():
    model = make("Llama")
    session = Session([5, 6, 7], [Turn([8], [9]), Turn([10, 11], [12])])
    figures = converse(model, session, "multi_request", new_cache=lambda: own_cache(model))
    assert [x.tokens for x in figures] == [4, 5]


@pytest.mark.parametrize("task", text_sessions.TASKS)
def test_sessions_in_words(task):
    made = text_sessions.TASKS[task](3000, 3, random.Random(0))
    again = text_sessions.TASKS[task](3000, 3, random.Random(0))
    assert made == again
    assert len(made.turns) == 3
    assert 1500 < len(made.context) < 6000
    for _, answer in made.turns:
        assert answer.startswith(" ")
        assert answer.strip() in made.context
    session = tokenized(made, tokenizer())
    assert session.turns[0].text == made.turns[0][1].strip()


def test_sessions_of_a_file(tmp_path):
    path = tmp_path / "some.jsonl"
    turns = [{"input": "Who?", "answer": ["me", "I"]}, {"input": "When?", "answer": "now"}]
    path.write_text(json.dumps({"context": "A text.", "multi_turns": turns}) + "\n\n")
    (found,) = read_sessions(path)
    assert found.turns == (("Who?", "me"), ("When?", "now"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "sessions=.*empty"),
        ("{", "line 1"),
        ('{"context": "a"}', "line 1: KeyError 'multi_turns'"),
        ('{"context": "a", "multi_turns": []}', "line 1"),
        ('{"context": "a", "multi_turns": [{"input": "b"}]}', "line 1: KeyError 'answer'"),
    ],
)
def test_files_that_hold_no_sessions(tmp_path, line, message):
    path = tmp_path / "some.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_sessions(path)
    with pytest.raises(ValueError, match=r"sessions=.*missing\.jsonl"):
        read_sessions(tmp_path / "missing.jsonl")


def test_reading_on_is_that_of_one_call():
    model, ids = make("Llama"), prompt(rows=1, length=120)
    found = predict_rest(model, ids, 90, own_cache(model), step=7)
    with torch.no_grad():
        logits = model(ids).logits[0, 89:-1]
    want = torch.nn.functional.cross_entropy(logits, ids[0, 90:])
    assert found.nll == pytest.approx(float(want), rel=1e-5)
    same = distance(found, found)
    assert same["kl"] == 0
    assert same["top1"] == 1
    assert same["perplexity_percent"] == 0


SMALL = (
    "--texts", "prose", "--length", 400, "--tasks", "--lookups", "key_value", "--lookup-length", 820,
    "--modes", "multi_turn", "--count", 1, "--turns", 2, "--new-tokens", 2,
)  # fmt: skip


def test_the_command(small_llama, tmp_path, capsys):
    output = tmp_path / "made" / "kv.json"
    common = ("llm", "bench-kv", "--model", small_llama, *SMALL, "--output", output)
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("kv: {sink: 8, recent: 16}\n")
    assert run(*common, "--caches", "window") == 0
    first = json.loads(output.read_text())
    assert [x["name"] for x in first["rows"]] == ["transformers", "window"]
    assert run(*common, "--caches", "window", yaml) == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows[:2] == first["rows"]
    mine = rows[2]
    assert mine["name"] == "mine"
    assert mine["texts"]["prose"]["kl"] == pytest.approx(0, abs=1e-5)
    assert mine["texts"]["prose"]["bytes_share"] == pytest.approx(1)
    assert set(mine["tasks"]) == {"lookup key_value"}
    assert "| mine | +0.00 |" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 5_000
    assert run(*common, "--seed", 4) == 2
    assert "seed" in capsys.readouterr().err
    assert json.loads(output.read_text())["rows"] == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--caches", "mush"), "kv='mush'"),
        (("--caches", "window", "window"), "caches: 'window'"),
        (("--turns", 17), "turns=17"),
        (("--length", 10), "length=10"),
        (("--lookup-length", 5), "lookup_length=5"),
        (("--texts", "missing.txt"), "missing.txt"),
        (("--sessions", "missing.jsonl"), "missing.jsonl"),
        (("--length", 600), "600 tokens"),
        (("--output", "."), "output='.'"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(refused, small_llama, arguments, message):
    assert message in refused("bench-kv", "--model", small_llama, *SMALL, *arguments)


def test_nothing_to_draw(tmp_path):
    assert not draw({"rows": []}, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
