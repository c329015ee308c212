"""Spans of images and videos: found in what a model is called with, and used by grid and boundary."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from dit_accel import llm
from dit_accel.llm.attention import POLICY
from dit_accel.llm.prefill import Prompt, pattern_of
from dit_accel.llm.prefill.boundary import Boundary
from dit_accel.llm.prefill.grid import Grid
from dit_accel.llm.spans import SpanTracker, cut, given_spans, spans_of

from .models import make as language_model
from .models import prompt
from .prompts import check_plan, prompts
from .test_attention import CLOSE, SMALL
from .vision import IMAGE, PARTS, VIDEO, inputs, make

every_model = pytest.mark.parametrize("name", PARTS)
ROWS = [
    [20, ("image", 1, 4, 4), 5, ("video", 9, 4, 6), 40],
    [30, ("video", 12, 4, 4), 7, ("video", 3, 4, 6), 30],
    [90],
]
GRID = {"pattern": "grid", "options": {"sink": 8, "window": 16, "min_gain": 0.0}, **SMALL}
SHARES = {"video": {"video": 0.2}, "text": {"video": 0.4}}
BOUNDARY = {"pattern": "boundary", "options": {"share": 0.6, "shares": SHARES}, **SMALL}
both_patterns = pytest.mark.parametrize("prefill", [GRID, BOUNDARY], ids=["grid", "boundary"])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def seen(monkeypatch):
    """The spans that patterns got, one list a call of layer 0."""
    found = []
    for kind in (Grid, Boundary):
        plan = kind.plan

        def note(self, prompt, plan=plan):
            if prompt.layer == 0:
                found.append(prompt.spans)
            return plan(self, prompt)

        monkeypatch.setattr(kind, "plan", note)
    return found


def expected(name, row, shift=0):
    """Return the spans of a prompt from its parts."""
    found, at = [], shift
    for part in row:
        if isinstance(part, int):
            at += part
            continue
        kind, t, h, w = part
        size, apart = h * w // 4, name == "Qwen3VL" and kind == "video"
        at += 0 if apart else 1
        for _ in range(t if kind == "video" else 1):
            at += 3 if apart else 0
            found.append((at, at + size, kind))
            at += size + apart
        at += 0 if apart else 1
    return tuple(found)


# -- in models ---------------------------------------------------------------------------------------


@every_model
@both_patterns
@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_are_found_by_row_and_rows_give_what_they_give_alone(name, prefill, side, seen):
    model = make(name)
    plain = model(**inputs(name, ROWS[0])).logits
    llm.enable(model, prefill=prefill)
    given = inputs(name, *ROWS, side=side)
    logits = model(**given).logits
    assert [x for (x,) in seen] == [expected(name, row) for row in ROWS]
    for i, row in enumerate(ROWS):
        alone = model(**inputs(name, row)).logits
        real = given["attention_mask"][i].bool()
        torch.testing.assert_close(logits[i : i + 1, real], alone, **CLOSE)
        if i == 0:
            assert not torch.allclose(alone, plain, **CLOSE)
    assert [x for (x,) in seen[3:]] == [expected(name, row) for row in ROWS]
    layers = llm.summary(model).layers
    assert all((x.sparse_calls, x.without_spans) == (4, 0) for x in layers)


@every_model
def test_rows_of_equal_length_share_a_call(name, seen):
    rows = [ROWS[0], [25, ("image", 1, 4, 4), 5, ("video", 9, 4, 6), 35]]
    model, given = make(name), inputs(name, *rows)
    llm.enable(model, prefill=GRID)
    model(**given)
    assert seen == [tuple(expected(name, row) for row in rows)]


@every_model
@both_patterns
@pytest.mark.parametrize("size", [40, 50])
def test_chunks_of_generate_keep_their_positions(name, prefill, size, seen):
    """Chunks cut frames."""
    model, given = make(name), inputs(name, ROWS[1])
    whole = expected(name, ROWS[1])
    llm.enable(model, prefill=prefill)
    model.generate(**given, max_new_tokens=1, prefill_chunk_size=size)
    length = given["input_ids"].shape[1]
    ends = [min(x + size, length) for x in range(0, length, size)]
    assert [tuple(x) for x in seen] == [(cut(whole, 0, end),) for end in ends]
    assert llm.summary(model).layers[0].without_spans == 0


@every_model
@pytest.mark.parametrize("kind", ["dynamic", "static", "its own", "copied"])
def test_later_turns_know_the_videos_of_earlier_ones(name, kind, seen):
    model = make(name)
    llm.enable(model, prefill=BOUNDARY)
    config = model.config.get_text_config()
    cache = None
    if kind != "its own":
        cache = DynamicCache(config=config)
    if kind == "static":
        cache = StaticCache(config=config, max_cache_len=300)
    given = inputs(name, ROWS[0])
    cache = model(**given, past_key_values=cache).past_key_values
    if kind == "copied":
        cache = copy.deepcopy(cache)
    first = given["input_ids"].shape[1]
    for token in (5, 6, 7):
        model(torch.tensor([[token]]), past_key_values=cache)
    later = inputs(name, [10, ("video", 3, 4, 4), 20])
    # transformers makes such positions in generate only.
    positions, _ = model.model.get_rope_index(**later)
    model(**later, past_key_values=cache, position_ids=positions + first)
    there = expected(name, [10, ("video", 3, 4, 4), 20], shift=first + 3)
    first = expected(name, ROWS[0])
    assert [tuple(x) for x in seen] == [(first,), (first + there,)]
    assert llm.summary(model).layers[0].without_spans == 0


@every_model
@both_patterns
def test_embeddings_and_unknown_caches_have_no_spans_and_are_counted(name, prefill, seen):
    model, given = make(name), inputs(name, ROWS[0])
    later = inputs(name, [30])["input_ids"]
    embeds = model.get_input_embeddings()(given["input_ids"])
    unseen = model(**given).past_key_values
    llm.enable(model, prefill=prefill)
    cache = model(inputs_embeds=embeds).past_key_values
    model(later, past_key_values=cache)
    model(later, past_key_values=unseen)
    model.model.language_model(inputs_embeds=embeds)
    assert seen == [None] * 4
    assert llm.summary(model).layers[1].without_spans == 4
    assert "4 x spans not known" in str(llm.summary(model))
    model(**given)
    assert seen[-1] == (expected(name, ROWS[0]),)


def test_calls_that_return_tuples_or_take_arguments_by_position_are_followed(seen):
    model, given = make("Qwen2_5_VL"), inputs("Qwen2_5_VL", ROWS[0])
    llm.enable(model, prefill=GRID)
    cache = DynamicCache(config=model.config.get_text_config())
    ids = given.pop("input_ids")
    model.model(ids, **given, past_key_values=cache, return_dict=False)
    model.model(inputs("Qwen2_5_VL", [30])["input_ids"], past_key_values=cache)
    whole = expected("Qwen2_5_VL", ROWS[0])
    assert seen == [(whole,), (whole,)]


@every_model
def test_what_a_cache_got_while_the_model_was_dense_is_not_known(name, seen):
    model, given = make(name), inputs(name, ROWS[0])
    llm.enable(model, prefill=GRID)
    cache = model(**given).past_key_values
    llm.disable(model)
    model(**inputs(name, [20, ("video", 3, 4, 4)]), past_key_values=cache)
    llm.enable(model, prefill=GRID)
    model(inputs(name, [30])["input_ids"], past_key_values=cache)
    assert seen == [(expected(name, ROWS[0]),), None]


@every_model
@both_patterns
def test_generation_and_beam_search_know_their_spans(name, prefill, seen):
    model, given = make(name), inputs(name, *ROWS[:2])
    llm.enable(model, prefill=prefill)
    ask = {"max_new_tokens": 3, "do_sample": False}
    alone = model.generate(**inputs(name, ROWS[0]), **ask)[:, -3:]
    assert seen == [(expected(name, ROWS[0]),)]
    assert torch.equal(model.generate(**given, **ask)[:1, -3:], alone)
    model.generate(**given, **ask, num_beams=2)
    assert llm.summary(model).layers[2].without_spans == 0


def test_options_of_the_user_win(seen):
    model, given = make("Qwen2_5_VL"), inputs("Qwen2_5_VL", ROWS[0])
    for prefill in (
        {**SMALL, "pattern": "grid", "options": {"stride": 6, "phase": 2, "window": 16}},
        {**SMALL, "pattern": "boundary", "options": {"spans": [(26, 80, "film")]}},
        {**SMALL, "pattern": "triangle"},
    ):
        llm.enable(model, prefill=prefill)
        assert not model.model._forward_pre_hooks
        model(**given)
        assert llm.summary(model).layers[0].without_spans == 0
    assert seen == [None, None]


def test_hooks_go_with_disable_and_copies_have_their_own():
    model, given = make("Qwen2_5_VL"), inputs("Qwen2_5_VL", ROWS[0])
    llm.enable(model, prefill=GRID)
    llm.enable(model, prefill=GRID)
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    sparse = model(**given).logits
    twin = copy.deepcopy(model)
    llm.disable(model)
    inner = model.model
    for hooked in (inner, inner.language_model):
        for kind in ("pre_hooks", "hooks", "pre_hooks_with_kwargs", "hooks_always_called"):
            assert not getattr(hooked, f"_forward_{kind}")
    torch.testing.assert_close(twin(**given).logits, sparse, rtol=0, atol=0)
    assert llm.summary(twin).layers[0].without_spans == 0
    llm.disable(twin)
    assert not twin.model._forward_pre_hooks
    llm.enable(model, prefill={**SMALL, "pattern": "triangle", "by_layer": {1: "grid"}})
    assert len(model.model._forward_pre_hooks) == 1


def test_a_failed_call_leaves_no_spans():
    model, given = make("Qwen2_5_VL"), inputs("Qwen2_5_VL", ROWS[0])
    llm.enable(model, prefill=GRID)
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        model(**{**given, "pixel_values": given["pixel_values"][:4], "image_grid_thw": torch.tensor([[1, 2, 2]])})  # fmt: skip
    tracker = vars(model.model.language_model.layers[0].self_attn)[POLICY].tracker
    assert tracker.rows is None


# -- labels ------------------------------------------------------------------------------------------


class Config:
    """Config of a model with images and videos."""

    image_token_id, video_token_id = IMAGE, VIDEO


@settings(max_examples=25)
@given(data=st.data())
def test_chunks_find_the_frames_that_the_whole_prompt_has(data):
    tracker = SpanTracker(Config)
    number = st.integers(1, 3)
    rows, spans = [], []
    for _ in range(data.draw(number)):
        tokens, found, gaps = [(3, 0, 0), (4, 1, 1)], [], data.draw(st.booleans())
        for height, width in data.draw(st.lists(st.tuples(number, number), min_size=1, max_size=6)):
            tokens += [(5, 9, 9)] * gaps
            found.append((len(tokens), len(tokens) + height * width, "video"))
            tokens += [(VIDEO, 2 + h, 2 + w) for h in range(height) for w in range(width)]
        rows.append([*tokens, (6, 7, 7), (IMAGE, 8, 8), (IMAGE, 8, 9), (7, 9, 9)])
        spans.append((*found, (len(tokens) + 1, len(tokens) + 3, "image")))
    longest = max(map(len, rows))
    table = torch.tensor([x + [(8, 0, 0)] * (longest - len(x)) for x in rows])
    ids, positions = table[..., 0], torch.stack([table[..., 0], table[..., 1], table[..., 2]])
    cuts = sorted(data.draw(st.sets(st.integers(1, longest - 1), max_size=4)))
    noted = tracker.nothing(len(rows))
    for start, stop in zip([0, *cuts], [*cuts, longest], strict=True):
        noted = tracker.extended(noted, ids[:, start:stop], positions[..., start:stop])
    assert spans_of(noted.labels) == tuple(spans)


@pytest.mark.parametrize("positions", [None, torch.arange(7)[None]], ids=["none", "of text"])
def test_without_m_rope_a_run_of_video_tokens_is_one_span(positions):
    tracker = SpanTracker(Config)
    ids = torch.tensor([[3, *[VIDEO] * 5, 4], [*[VIDEO] * 6, 5]])
    noted = tracker.extended(tracker.nothing(2), ids, positions)
    assert spans_of(noted.labels) == (((1, 6, "video"),), ((0, 6, "video"),))


def test_spans_may_be_given(seen):
    model, ids = language_model("Llama"), prompt(1)
    with given_spans(model, [()]):  # a model that is not enabled
        model(ids)
    llm.enable(model, prefill=GRID)
    frames = tuple((20 + 9 * i, 29 + 9 * i, "video") for i in range(10))
    with given_spans(model, [frames]):
        model(ids)
    model(ids)
    assert seen == [[frames], None]
    assert llm.summary(model).layers[0].without_spans == 0


# -- in patterns -------------------------------------------------------------------------------------


@given(prompt=prompts(), data=st.data())
def test_rows_have_spans_of_their_own_in_boundary(prompt, data):
    bounds = st.lists(st.integers(0, 200), min_size=4, max_size=4, unique=True).map(sorted)
    rows = [
        ((a, b, "image"), (c, d, "video"))
        for a, b, c, d in (data.draw(bounds) for _ in range(len(prompt.q)))
    ]
    options = {"share": 0.5, "shares": {"video": {"video": 0.1, "text": 1.0}, "text": 0.3}}
    _, mask = check_plan(pattern_of("boundary", options), replace(prompt, spans=rows))
    for b, spans in enumerate(rows):
        named = pattern_of("boundary", {**options, "spans": spans})
        alone = Prompt(prompt.q[b : b + 1], prompt.k[b : b + 1], prompt.scale, prompt.block, prompt.tail)  # fmt: skip
        assert torch.equal(mask[b : b + 1], named.plan(alone).to_dense_mask().expand_as(mask[:1]))


def planted(frames, place, length=1200, strength=9.0, seed=0):
    """Return a prompt whose two heads attend to one place of each frame, and evenly."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 2, length, 16, generator=g) * 0.3 for _ in range(2))
    q[..., 0] = 4
    k[..., 0] = 0.1 * torch.randn(1, 2, length, generator=g)
    for start, _, _ in frames:
        k[0, 0, start + place, 0] = strength / 4
    return Prompt(q, k, scale=1.0, block=16, tail=16, spans=[frames])


@given(
    size=st.integers(2, 60),
    data=st.data(),
    seed=st.integers(0, 2**16),
)
def test_the_place_in_the_frame_is_found_at_any_distance(size, data, seed):
    """Timestamps may have different lengths: the distance of frames need not be constant."""
    gaps = data.draw(st.lists(st.integers(0, 6), min_size=4, max_size=12))
    place, at, frames = data.draw(st.integers(0, size - 1)), 70, []
    for gap in gaps:
        frames.append((at + gap, at + gap + size, "video"))
        at += gap + size
    prompt = planted(tuple(frames), place, seed=seed)
    columns = pattern_of("grid", {"window": 64}).columns(prompt)
    lists = [[int(j) for j in x if j < 1200] for x in columns[0]]
    assert lists == [[start + place for start, _, _ in frames], []]


def test_frames_of_one_distance_are_a_stride():
    frames = tuple((100 + 40 * i, 140 + 40 * i, "video") for i in range(20))
    prompt = planted(frames, 7)
    columns = pattern_of("grid", {"window": 64}).columns(prompt)[0, 0]
    stride = pattern_of("grid", {"stride": 40, "phase": (100 + 7) % 40}).columns(prompt)[0, 0]
    assert set(columns.tolist()) - {1200} == {j for j in stride.tolist() if 100 <= j < 900}


@given(prompt=prompts(), data=st.data())
def test_grids_of_frames_are_valid_plans(prompt, data):
    rows = []
    for _ in range(len(prompt.q)):
        size, start = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 60))
        count = data.draw(st.integers(0, 8))
        ends = [(start + i * size, start + (i + 1) * size, "video") for i in range(count)]
        rows.append(cut(tuple(ends), 0, prompt.kv_len))
    options = {"sink": 4, "window": 8, "min_gain": 0.0}
    check_plan(pattern_of("grid", options), replace(prompt, spans=rows))


def test_images_and_single_frames_leave_the_grid_to_detection():
    frames = tuple((100 + 40 * i, 140 + 40 * i, "video") for i in range(20))
    prompt = planted(frames, 7)
    pattern = pattern_of("grid", {"window": 64})
    free = pattern.columns(replace(prompt, spans=None))
    for spans in ((), ((0, 9, "image"), (100, 900, "video"))):
        assert torch.equal(pattern.columns(replace(prompt, spans=[spans])), free)


def test_spans_are_cut_to_a_range():
    spans = ((2, 5, "image"), (8, 12, "video"))
    assert cut(spans, 3, 10) == ((0, 2, "image"), (5, 7, "video"))
    assert cut(spans, 5, 8) == ()
