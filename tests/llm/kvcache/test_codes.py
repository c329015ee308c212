"""Tokens as codes: attention on codes, bytes, files, and whatever is done to a cache of them."""

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dit_accel import llm
from dit_accel.llm.kvcache.cache import KVCache, model_sizes
from dit_accel.llm.kvcache.calibrate import frequencies_of
from dit_accel.llm.kvcache.codebooks import CodebookForm, Codebooks, read_codebooks, write_codebooks
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.rotation import Rotation
from dit_accel.llm.kvcache.store import ModelSizes, store_of

from ..models import make, prompt
from .store_cases import OPERATIONS, check_operations, check_reading, decoded, tokens

SIZES = ModelSizes(3, 2, 16)
ZONES = {"sink": 4, "recent": 8, "flush": 4}
PAIRS = {"sub_vectors": 8, "bits": 8}


def codebooks(sizes=SIZES, seed=0, **form):
    """Return random codebooks."""
    form = CodebookForm(**{**PAIRS, **form})
    layers = tuple(range(sizes.layers))
    n = 1 if form.scope == "model" else sizes.layers
    heads = sizes.kv_heads if form.scope == "head" else 1
    width = sizes.head_dim // form.sub_vectors
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 3 * torch.randn(shape, generator=generator)

    tensors = {x: random(n, heads, form.sub_vectors, 2**form.bits, width) for x in "kv"}
    if form.centred:
        means = {f"{x}_mean": random(sizes.layers, sizes.kv_heads, sizes.head_dim) for x in "kv"}
        tensors |= means
    if form.rope == "before":
        tensors["frequencies"] = 1e4 ** -torch.linspace(0, 1, sizes.head_dim // 2)
    return Codebooks(form=form, sizes=sizes, layers=layers, tensors=tensors, model="a model")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A function that writes codebooks, and returns the name of the file."""
    folder, count = tmp_path_factory.mktemp("books"), itertools.count()

    def write(books):
        path = folder / f"{next(count)}.safetensors"
        write_codebooks(path, books)
        return str(path)

    return write


def store(path, layer=1, sizes=SIZES):
    found = store_of("pq", {"codebooks": path})
    found.prepare(layer, sizes)
    return found


FORMS = [
    {},
    {"scope": "model", "bits": 6},
    {"scope": "head", "centred": True},
    {"scope": "layer", "pairing": "planes", "bits": 4, "centred": True},
    {"sub_vectors": 4},
    {"sub_vectors": 4, "pairing": "planes", "scope": "head"},
    {"sub_vectors": 16, "bits": 2},
    {"sub_vectors": 2, "bits": 8},
]
UNROTATED = [
    {"rope": "before", "pairing": "planes"},
    {"rope": "before", "pairing": "planes", "scope": "head", "centred": True},
    {"rope": "before", "pairing": "planes", "sub_vectors": 4, "centred": True},
]
"""Forms whose keys are coded before RoPE."""


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_are_those_of_the_nearest_centroids(form, file):
    books = codebooks(**form)
    part, found = tokens(20), store(file(books))
    found.append(part)
    width = 16 // books.form.sub_vectors
    order = torch.arange(16)
    if books.form.pairing == "planes":
        order = torch.arange(16).view(2, 8).T.flatten()
    for name, x, y, at in (("k", part.k, decoded(found).k, order), ("v", part.v, decoded(found).v, torch.arange(16))):  # fmt: skip
        at_layer = 0 if books.form.scope == "model" else 1
        for head, start in itertools.product(range(2), range(0, 16, width)):
            mean = books.tensors[f"{name}_mean"][1, head] if books.form.centred else torch.zeros(16)
            channels = at[start : start + width]
            book = books.tensors[name][at_layer, head if books.form.scope == "head" else 0, start // width]  # fmt: skip
            vectors = x[:, head, :, channels] - mean[channels]
            nearest = torch.cdist(vectors.flatten(0, 1), book).argmin(-1)
            want = book[nearest].view_as(vectors) + mean[channels]
            torch.testing.assert_close(y[:, head, :, channels], want)


@settings(max_examples=15, deadline=None)
@given(
    operations=OPERATIONS,
    form=st.sampled_from(FORMS + UNROTATED),
    padding=st.sampled_from([0, 1, 2]),
)
def test_operations_in_any_order(operations, form, padding, file):
    check_operations(store(file(codebooks(**form))), operations, padding)


@settings(max_examples=12, deadline=None)
@given(
    form=st.sampled_from(FORMS + UNROTATED),
    count=st.integers(1, 70),
    padding=st.integers(0, 70),
    values=st.sampled_from([64, 2**19]),
)
def test_attention_is_that_over_decoded_tokens(form, count, padding, values, file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_accel.llm.kvcache.store.CPU_VALUES", values)
        found = store(file(codebooks(**form)))
        found.append(tokens(count, padding=min(padding, count)))
        check_reading(found, decoded(found))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, file):
    found = store(file(codebooks(centred=True)))
    found.append(tokens(30, dtype=dtype))
    k, v = found.decode(found.parts[0].tensors)
    assert k.dtype == v.dtype == dtype
    q = torch.randn(2, 2, 3, 1, 16).to(dtype)
    o, lse = found.attend(q, 0.1)
    assert o.dtype == dtype
    scores = q.float() @ k.float()[:, :, None].mT * 0.1
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0.02, atol=0.02)
    want = scores.softmax(-1) @ v.float()[:, :, None]
    torch.testing.assert_close(o.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"sub_vectors": 64, "bits": 8}, 128),
        ({"sub_vectors": 64, "bits": 6}, 96),
        ({"sub_vectors": 32, "bits": 8}, 64),
        ({"sub_vectors": 32, "bits": 4}, 32),
    ],
)
def test_bytes_of_a_token(form, expected, file):
    """512 bytes a token and head at fp16: 4 bits a value are four times smaller."""
    sizes = ModelSizes(1, 2, 128)
    found = store(file(codebooks(sizes, **form)), 0, sizes)
    found.append(tokens(10, head_dim=128, dtype=torch.float16))
    assert found.nbytes == 2 * 2 * 10 * expected


def test_positions_take_four_bytes_for_all_heads(file):
    found = store(file(codebooks(**UNROTATED[0])))
    found.append(tokens(10))
    assert found.nbytes == 2 * 10 * (2 * 16 + 4)


def test_keys_are_the_same_at_every_position(file):
    """A key that is rotated to other positions has the same codes."""
    found, part = store(file(codebooks(**UNROTATED[1]))), tokens(9)
    rotation = found.books.rotation(torch.device("cpu"))
    positions = torch.arange(9).expand(2, 1, 9)
    parts = [
        Part.of(rotation.turned(part.k, at), part.v, None, at)
        for at in (positions, 3 * positions + 1000)
    ]
    codes = [found.encode(x) for x in parts]
    assert torch.equal(codes[0]["k"], codes[1]["k"])


def exact(model, ids, file, **form):
    """Return a file of codebooks that hold every key and value of some tokens exactly."""
    sizes = model_sizes(model.config)
    cache = model(ids, use_cache=True).past_key_values
    form = CodebookForm(**{**PAIRS, "scope": "layer", **form})
    tensors = {}
    rotation = None
    if form.rope == "before":
        tensors["frequencies"] = frequencies_of(model, sizes.head_dim)
        rotation = Rotation(tensors["frequencies"])
    for name in "kv":
        books = []
        for layer in cache.layers:
            x = {"k": layer.keys, "v": layer.values}[name]
            if rotation is not None and name == "k":
                x = rotation.unturned(x, torch.arange(x.shape[2])[None, None])
            x = x.flatten(0, 2)
            if form.pairing == "planes" and name == "k":
                x = x.unflatten(-1, (2, -1)).mT.flatten(-2)
            x = x.unflatten(-1, (form.sub_vectors, -1)).movedim(1, 0)
            assert x.shape[1] <= 256
            books.append(torch.cat([x, x[:, :1].expand(-1, 256 - x.shape[1], -1)], 1)[None])
        tensors[name] = torch.stack(books)
    books = Codebooks(form=form, sizes=sizes, layers=tuple(range(sizes.layers)), tensors=tensors)
    return file(books)


@pytest.mark.parametrize(
    "form",
    [{}, {"pairing": "planes"}, {"pairing": "planes", "rope": "before"}],
    ids=["neighbours", "planes", "before RoPE"],
)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_generate_gives_the_tokens_of_dense_attention_where_codebooks_hold_them(family, form, file):
    model, ids = make(family), prompt(rows=1, length=100)
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    kv = {
        **ZONES,
        "store": "pq",
        "store_options": {"codebooks": exact(model, want, file, **form)},
    }
    llm.enable(model, kv=kv)
    found = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences, want)
    assert found.past_key_values.layers[0].stored == 104


@pytest.mark.parametrize("form", [{}, UNROTATED[1]], ids=["after RoPE", "before RoPE"])
def test_beams_turns_and_padding(form, file):
    model = make("Llama")
    kv = {**ZONES, "store": "pq", "store_options": {"codebooks": file(codebooks(**form))}}
    ids = prompt(length=60)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    llm.enable(model, kv=kv)
    both = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    alone = model.generate(ids[1:, 30:], max_new_tokens=10, do_sample=False)
    assert torch.equal(both[1:, 30:], alone)
    model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    cache = KVCache(model, kv)
    with torch.no_grad():
        for part in ids.split([30, 1, 29], 1):
            model(part, past_key_values=cache)
        cache.crop(-20)
        model(ids[:, 40:], past_key_values=cache.fork())
    assert cache.get_seq_length() == 40


def test_clusters_of_padding_alone(file):
    """A short prompt behind much padding: the best clusters have no token."""
    model = make("Llama")
    kv = {**ZONES, "store": "pq", "store_options": {"codebooks": file(codebooks(**UNROTATED[0]))}}
    kv |= {"select": "wave", "select_options": {"retrieve": 0.2}}
    ids = prompt(rows=1, length=64)
    mask = torch.ones_like(ids)
    mask[:, :54] = 0
    llm.enable(model, kv=kv)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    alone = model.generate(ids[:, 54:], max_new_tokens=5, do_sample=False)
    assert torch.equal(found[:, 54:], alone)


def test_a_file_comes_back(file):
    books = codebooks(scope="head", centred=True)
    path = file(dataclasses.replace(books, notes={"errors": {"keys": 0.1}}))
    found = read_codebooks(path)
    assert (found.form, found.sizes, found.layers) == (books.form, books.sizes, books.layers)
    assert (found.model, found.notes) == ("a model", {"errors": {"keys": 0.1}})
    assert all(torch.equal(found.tensors[k], x) for k, x in books.tensors.items())
    assert read_codebooks(path) is found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"a model.*layers=3.*layers=4"),
        ({"num_key_value_heads": 4}, "kv_heads=2"),
        ({"head_dim": 32}, "head_dim=16"),
        ({"vocab_size": 98}, "codebooks=.*another model"),
    ],
)
def test_another_model(changes, message, file):
    sizes = model_sizes(make("Llama").config)
    path = file(codebooks(sizes))
    llm.enable(make("Llama"), kv={"store": "pq", "store_options": {"codebooks": path}})
    other = make("Llama", **changes)
    with pytest.raises(ValueError, match=message):
        llm.enable(other, kv={"store": "pq", "store_options": {"codebooks": path}})
    assert other.config._attn_implementation == "sdpa"


def rewritten(path, tmp_path, header=(), tensors=()):
    with safe_open(path, framework="pt") as opened:
        meta = opened.metadata()
        meta["dit_accel"] = json.dumps({**json.loads(meta["dit_accel"]), **dict(header)})
        found = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    target = tmp_path / "changed.safetensors"
    save_file({**found, **dict(tensors)}, target, metadata=meta)
    return str(target)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"kind": "mush"}, "'mush'"),
        ({"format_version": 2}, r"format_version=2.*\b1\b"),
        ({"model": "another"}, "digest"),
    ],
)
def test_files_of_another_kind(header, message, file, tmp_path):
    path = rewritten(file(codebooks()), tmp_path, header)
    with pytest.raises(ValueError, match=f"codebooks=.*{message}"):
        store_of("pq", {"codebooks": path})


def test_files_that_are_no_codebooks(tmp_path):
    with pytest.raises(ValueError, match=r"codebooks=None.*dit-accel llm calibrate"):
        llm.enable(make("Llama"), kv={"store": "pq"})
    with pytest.raises(ValueError, match=r"codebooks='.*none.safetensors'"):
        store_of("pq", {"codebooks": str(tmp_path / "none.safetensors")})
    text = tmp_path / "text.safetensors"
    text.write_text("<html>")
    with pytest.raises(ValueError, match=r"codebooks='.*text\.safetensors'.*web page"):
        store_of("pq", {"codebooks": str(text)})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"sub_vectors": 3}, "sub_vectors=3.*head_dim=16"),
        ({"sub_vectors": 2, "bits": 6}, r"sub_vectors=2\b.*multiple of 4"),
        ({"sub_vectors": 16, "pairing": "planes"}, "sub_vectors=16.*even.*planes"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 1}, "bits=1"),
        ({"scope": "mush"}, "scope='mush'"),
        ({"pairing": "mush"}, "pairing='mush'"),
        ({"rope": "mush"}, "rope='mush'"),
        ({"rope": "before"}, "pairing='neighbours'"),
    ],
)
def test_forms(form, message):
    with pytest.raises(ValueError, match=message):
        codebooks(**form)


def test_tensors_that_do_not_fit():
    books = codebooks()
    with pytest.raises(ValueError, match=r"codebooks: .*\bk\b.*shape"):
        dataclasses.replace(books, tensors={**books.tensors, "k": books.tensors["k"][:, :, :4]})
    with pytest.raises(ValueError, match=r"codebooks: .*missing.*\bv\b"):
        dataclasses.replace(books, tensors={"k": books.tensors["k"]})
    with pytest.raises(ValueError, match=r"^v: .*fp32"):
        dataclasses.replace(books, tensors={**books.tensors, "v": books.tensors["v"] * torch.inf})


def test_layers_without_codebooks(file):
    books = codebooks()
    tensors = {k: x[:2] for k, x in books.tensors.items()}
    path = file(dataclasses.replace(books, layers=(0, 2), tensors=tensors))
    store(path, 2)
    with pytest.raises(ValueError, match=r"layer 1\b.*0, 2"):
        store(path, 1)


def test_no_tokens(file):
    found = store(file(codebooks()))
    part = tokens(0)
    assert found.decode(found.encode(part))[0].shape == (2, 2, 0, 16)
    found.append(part)
    assert found.slots == 0
    assert isinstance(found.crop(3), Part | None)
