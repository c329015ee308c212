"""Codes without some channels: the store against codes of all channels with zeros, bytes, and whole models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import llm
from dit_accel.llm.control import attention_layers
from dit_accel.llm.kvcache.cache import model_sizes
from dit_accel.llm.kvcache.codebooks import write_codebooks
from dit_accel.llm.kvcache.model_file import ModelFile, fingerprint_of
from dit_accel.llm.kvcache.store import ModelSizes, store_of
from dit_accel.llm.kvcache.stores.channels import KIND

from ..models import make, prompt
from .store_cases import OPERATIONS, check_operations, decoded, tokens
from .test_channels import llama_mask, mask_of
from .test_codes import SIZES, codebooks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def options(folder, mask, sizes=SIZES, fingerprint=None, **form):
    """Write a mask and codebooks; return the options of the store."""
    name = f"{abs(hash(str(mask.tolist()) + str(form) + str(sizes)))}"
    mask_path, codes_path = folder / f"m{name}.safetensors", folder / f"c{name}.safetensors"
    print_ = torch.zeros(sizes.layers, 64) if fingerprint is None else fingerprint
    ModelFile(KIND, {"mask": mask}, sizes, print_).save(mask_path)
    write_codebooks(codes_path, codebooks(sizes, **form))
    return {"mask": str(mask_path), "codebooks": str(codes_path)}


def made(folder, mask, **form):
    store = store_of("channels_pq", options(folder, mask, **form))
    store.prepare(1, SIZES)
    return store


FORMS = [
    {},
    {"centred": True},
    {"pairing": "planes"},
    {"pairing": "planes", "rope": "before"},
    {"pairing": "planes", "rope": "before", "centred": True},
]


@settings(max_examples=15, deadline=None)
@given(
    operations=OPERATIONS,
    widths=st.tuples(st.sampled_from([2, 8, 16]), st.sampled_from([2, 8, 16])),
    scope=st.sampled_from(["model", "layer", "head"]),
    form=st.sampled_from(FORMS),
    padding=st.integers(0, 1),
)
def test_the_store_is_a_list_of_tokens(folder, operations, widths, scope, form, padding):
    check_operations(made(folder, mask_of(*widths), scope=scope, **form), operations, padding)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_kept_has_the_codes_of_all(folder, form):
    mask = mask_of(6, 16)
    store = made(folder, mask, **form)
    whole = store_of("pq", {"codebooks": store.codebooks})
    whole.prepare(1, SIZES)
    for x in (store, whole):
        x.append(tokens(30))
    found, want = decoded(store), decoded(whole)
    assert torch.equal(found.v, want.v)
    channels = torch.arange(16)
    parts = channels % 8 if "pairing" in form else channels // 2
    kept = torch.stack(
        [mask[1, head][parts == parts[c]].any() for head in range(2) for c in range(16)]
    )
    kept = kept.view(2, 16)
    assert torch.equal(found.k, want.k * kept[None, :, None])


def test_heads_without_channels_store_nothing(folder):
    store = made(folder, mask_of(0, 4))
    store.append(tokens(20))
    q = torch.randn(2, 2, 3, 1, 16)
    found = store.attend(q, 0.3)
    assert (found.lse[:, 0] == -torch.inf).all()
    assert found.lse[:, 1].isfinite().all()
    assert store.nbytes == 2 * 20 * (int(store.kept[1].sum()) + 8)


def test_bytes_at_the_geometry_of_llama(folder):
    """Llama-3.1-8B, channels in planes: more than 6.5 times smaller than fp16."""
    sizes = ModelSizes(1, 256, 128)
    half = llama_mask()[..., ::2]
    given = options(folder, torch.cat([half, half], -1), sizes, sub_vectors=64, pairing="planes")
    store = store_of("channels_pq", given)
    store.prepare(0, sizes)
    store.append(tokens(64, rows=1, heads=256, head_dim=128))
    stored = int(half.any(-1).sum())
    assert store.nbytes == 64 * (int(half.sum()) + stored * 64)
    assert 64 * 256 * 128 * 2 * 2 / store.nbytes > 6.5


def test_generate_goes_on(folder):
    model, ids = make("Llama"), prompt(length=60)
    sizes, print_ = model_sizes(model.config), fingerprint_of(attention_layers(model))
    kv = {
        "store": "channels_pq",
        "store_options": options(folder, mask_of(8, 16), sizes, print_),
        "sink": 4,
        "recent": 8,
    }
    llm.enable(model, kv=kv)
    found = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert found.sequences.shape == (2, 80)
    assert found.past_key_values.read_share == pytest.approx(1.0)


def test_codes_that_do_not_fit_a_mask(folder):
    with pytest.raises(ValueError, match=r"codebooks=.*4 bits"):
        store_of("channels_pq", options(folder, mask_of(8, 8), bits=4))


def test_both_files_are_needed(folder):
    given = options(folder, mask_of(8, 8))
    with pytest.raises(ValueError, match="mask=None"):
        store_of("channels_pq", {"codebooks": given["codebooks"]})
    with pytest.raises(ValueError, match="codebooks=None"):
        store_of("channels_pq", {"mask": given["mask"]})
