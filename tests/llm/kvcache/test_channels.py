"""Keys without some channels: the store against masked dense attention, files, and how masks are learned."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from dit_accel import llm
from dit_accel.llm.control import attention_layers
from dit_accel.llm.kvcache.cache import KVCache, model_sizes
from dit_accel.llm.kvcache.learn_mask import MaskSettings, _context, hard_mask, learn_mask
from dit_accel.llm.kvcache.model_file import ModelFile, fingerprint_of
from dit_accel.llm.kvcache.stores.channels import KIND, Channels

from ...cli.command import run
from ..models import make, prompt
from .store_cases import OPERATIONS, check_operations, tokens

HEADS, HEAD_DIM = 2, 16


def saved(path, model, mask):
    """Write a mask for a model."""
    sizes, found = model_sizes(model.config), fingerprint_of(attention_layers(model))
    ModelFile(KIND, {"mask": mask}, sizes, found, "tiny").save(path)
    return {
        "store": "channels",
        "store_options": {"mask": str(path)},
        "sink": 4,
        "recent": 8,
        "flush": 4,
    }


def mask_of(*widths, layers=3, seed=0):
    """Return a mask whose heads keep so many channels."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(layers, len(widths), HEAD_DIM, generator=generator).argsort(-1).argsort(-1)
    return rank < torch.tensor(widths)[:, None]


def store_of(mask):
    store = Channels(mask="none.safetensors")
    store.kept = mask
    return store


@settings(max_examples=12, deadline=None)
@given(
    operations=OPERATIONS,
    widths=st.tuples(st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16])),
    padding=st.integers(0, 1),
)
def test_the_store_is_a_list_of_tokens_with_zeros(operations, widths, padding):
    check_operations(store_of(mask_of(*widths)[0]), operations, padding)


@pytest.mark.parametrize("widths", [(4, 16), (0, 8), (0, 0)])
def test_attention_is_that_of_masked_keys(widths):
    mask, part = mask_of(*widths)[0], tokens(50)
    store = store_of(mask)
    store.append(part)
    q = torch.randn(2, HEADS, 3, 2, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    found = store.attend(q, 0.3)
    scores = torch.einsum("bhgld,bhnd->bhgln", q, part.k * mask[None, :, None]) * 0.3
    want = scores.softmax(-1) @ part.v[:, :, None]
    empty = ~mask.any(1)
    torch.testing.assert_close(found.o[:, ~empty], want[:, ~empty])
    torch.testing.assert_close(found.lse[:, ~empty], scores.logsumexp(-1)[:, ~empty])
    assert (found.lse[:, empty] == -torch.inf).all()
    assert (found.o[:, empty] == 0).all()
    index = torch.arange(50).expand(2, HEADS, 2, 50)
    some = store.attend_at(q, index, None, 0.3)
    torch.testing.assert_close(some.o, found.o)
    torch.testing.assert_close(some.lse, found.lse)


def test_bytes_are_those_of_the_channels():
    store = store_of(mask_of(4, 0)[0])
    store.append(tokens(10))
    assert store.nbytes == 2 * 10 * (4 + HEAD_DIM) * 4


def llama_mask():
    """Return the widths of LeanK's mask of Llama-3.1-8B, the 256 heads of all layers in one: 69 % of the channels go."""
    widths = [0] * 47 + [32] * 120 + [64] * 67 + [96] * 22
    return (torch.arange(128) < torch.tensor(widths)[:, None])[None]


def test_bytes_at_the_geometry_of_llama():
    mask = llama_mask()
    assert mask.float().mean() == 0.3125
    store = store_of(mask[0])
    store.append(tokens(64, rows=1, heads=256, head_dim=128, dtype=torch.float16))
    assert 64 * 256 * 128 * 2 * 2 / store.nbytes > 1.7


def test_all_channels_change_nothing(tmp_path):
    model, ids = make("Llama"), prompt()
    kv = saved(tmp_path / "all.safetensors", model, mask_of(16, 16))
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    llm.enable(model, kv=kv)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), want)


def test_layers_with_windows_keep_all_channels():
    model, texts = make("Gemma3"), [prompt(rows=1, length=120)]
    windows = [x.is_sliding for x in DynamicCache(config=model.config).layers]
    assert True in windows
    assert False in windows
    for steps in (0, 2):
        options = MaskSettings(steps=steps, sink=4, recent=8)
        mask, alpha = learn_mask(model, texts, options, follow=16)
        assert alpha.isfinite().all()
        for kept, sliding in zip(mask, windows, strict=True):
            assert kept.all() == sliding
    context, _ = _context(model, texts[0], 16, options, ~torch.tensor(windows))
    want = model.get_decoder()(texts[0]).last_hidden_state[:, -16:]
    torch.testing.assert_close(context.states, want, rtol=1e-4, atol=1e-4)


def test_a_mask_of_a_model_in_half_precision():
    model = make("Llama").bfloat16()
    mask, _ = learn_mask(
        model, [prompt(rows=1, length=80)], MaskSettings(steps=2, sink=4, recent=8), follow=16
    )
    assert 0 < mask.float().mean() < 1


def test_energies_are_shares_of_their_head():
    """Keys of a head that are five times as large keep the same channels."""
    model, texts = make("Llama", num_hidden_layers=1), [prompt(rows=1, length=80)]
    options = MaskSettings(steps=0, sink=4, recent=8)
    mask, energies = learn_mask(model, texts, options, follow=16)
    torch.testing.assert_close(energies.sum(-1), torch.ones(1, HEADS))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[:HEAD_DIM] *= 5
    again, _ = learn_mask(model, texts, options, follow=16)
    assert torch.equal(again, mask)


def test_heads_without_keys_read_the_first_and_last_tokens(tmp_path):
    model, ids = make("Llama"), prompt(length=60)
    nothing = {"select": "none", "sink": 4, "recent": 8, "flush": 4}
    kv = saved(tmp_path / "none.safetensors", model, mask_of(0, 0))
    found = []
    for settings_ in (nothing, kv):
        llm.enable(model, kv=settings_)
        cache = KVCache(model, settings_)
        with torch.no_grad():
            model(ids[:, :50], past_key_values=cache)
            found.append(model(ids[:, 50:], past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0])


def test_files_know_their_model(tmp_path):
    model, path = make("Llama"), tmp_path / "mask.safetensors"
    kv = saved(path, model, mask_of(8, 8))
    llm.enable(model, kv=kv)
    other = make("Llama")
    with torch.no_grad():
        for x in other.parameters():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match=r"mask=.*weights"):
        llm.enable(other, kv=kv)
    llm.enable(make("Llama").bfloat16(), kv=kv)
    with pytest.raises(ValueError, match="layers=3"):
        llm.enable(make("Llama", num_hidden_layers=2), kv=kv)
    for wrong, message in (
        ({"mask": str(tmp_path / "missing.safetensors")}, "missing.safetensors"),
        ({}, "mask=None"),
        ({"mask": __file__}, "mask=.*test_channels.py.*channel mask"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.enable(model, kv={**kv, "store_options": wrong})
    sizes, print_ = model_sizes(model.config), fingerprint_of(attention_layers(model))
    ModelFile("codebooks", {}, sizes, print_).save(path)
    with pytest.raises(ValueError, match=r"mask=.*'codebooks'"):
        llm.enable(model, kv=kv)


def test_the_hard_mask_against_numpy():
    numpy = pytest.importorskip("numpy")
    alpha = torch.rand(5, 3, 32, generator=torch.Generator().manual_seed(0))
    for keep in (0.1, 0.37, 0.5, 1.0):
        found = hard_mask(alpha, keep, 8).numpy()
        values = numpy.sort(alpha.numpy().ravel())[::-1]
        threshold = values[max(1, round(keep * values.size)) - 1]
        for layer in range(5):
            for head in range(3):
                row = alpha[layer, head].numpy()
                count = int(numpy.floor((row >= threshold).sum() / 8 + 0.5)) * 8
                assert found[layer, head].sum() == count
                assert set(found[layer, head].nonzero()[0]) == set(numpy.argsort(-row)[:count])


def planted(dead):
    """Return a model whose queries are 0 in some channels: their keys cannot matter."""
    model = make("Llama", num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            rows = layer.self_attn.q_proj.weight.view(4, HEAD_DIM, -1)
            rows[:, dead] = 0
    return model


@pytest.mark.parametrize("steps", [0, 40])
def test_planted_channels_are_found(steps):
    """RoPE turns channel i with i + 8, so planes are dead."""
    dead = [1, 9, 4, 12, 6, 14, 7, 15]
    model = planted(dead)
    before = copy.deepcopy(model.state_dict())
    texts = [prompt(rows=1, length=120, seed=i) for i in range(3)]
    given = MaskSettings(keep=0.5, multiple=1, steps=steps, rate=0.05, sink=4, recent=8)
    losses = []
    mask, alpha = learn_mask(model, texts, given, follow=40, on_step=lambda i, x: losses.append(x))
    kept = mask.clone()
    kept[..., dead] = False
    assert kept.sum() >= 0.9 * mask.sum()
    assert alpha[..., dead].mean() < 0.5 * alpha.mean()
    assert len(losses) == (44 if steps else 0)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    assert all(x.requires_grad for x in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_a_learned_mask_is_better_than_a_random_one():
    model = make("Llama", num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
    texts = [prompt(rows=1, length=120, seed=i) for i in range(2)]
    settings_ = MaskSettings(keep=0.5, multiple=2, sink=2, recent=8, steps=16, rate=0.1)
    mask = learn_mask(model, texts, settings_, follow=40)[0]
    random = mask_of(8, 8, layers=2)
    ids = prompt(rows=1, length=110, seed=9)
    assert mask_error(model, mask, ids) < mask_error(model, random, ids)


def mask_error(model, mask, ids):
    """Return the mean square of what a mask changes in the logits of the second half of a text."""
    llm.disable(model)
    with torch.no_grad():
        want = model(ids).logits[:, 90:]
        llm.enable(model, kv={"sink": 2, "recent": 8, "flush": 1})
        cache = KVCache(model, {"sink": 2, "recent": 8, "flush": 1})
        for layer, kept in zip(cache.layers, mask, strict=True):
            layer.store = store_of(kept)
        model(ids[:, :90], past_key_values=cache)
        found = [model(x, past_key_values=cache).logits for x in ids[:, 90:].split(1, 1)]
    llm.disable(model)
    return float((torch.cat(found, 1) - want).square().mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, "keep=0"),
        ({"steps": -1}, "steps=-1"),
        ({"rate": 0}, "rate=0"),
        ({"multiple": 0}, "multiple=0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskSettings(**changes)


def test_texts_are_checked():
    model = make("Llama")
    with pytest.raises(ValueError, match=r"texts: 100 tokens"):
        learn_mask(model, [prompt(rows=1, length=100)], MaskSettings(), follow=20)
    with pytest.raises(ValueError, match="multiple=5"):
        learn_mask(model, [prompt(rows=1)], MaskSettings(multiple=5, sink=2, recent=8), follow=20)


def test_the_command(small_llama, tmp_path, capsys):
    output = tmp_path / "made" / "mask.safetensors"
    small = (
        "--length",
        300,
        "--samples",
        1,
        "--sink",
        4,
        "--recent",
        8,
        "--follow",
        20,
        "--texts",
        "prose",
    )
    assert (
        run("llm", "learn-mask", "--model", small_llama, *small, "--steps", 3, "--output", output)
        == 0
    )
    assert "of the channels kept" in capsys.readouterr().out
    before = output.read_bytes()
    again = ("llm", "learn-mask", "--model", small_llama, *small, "--steps", 0, "--output", output)
    assert run(*again) != 0
    assert "overwrite" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert run(*again, "--overwrite") == 0
    assert output.read_bytes() != before
    capsys.readouterr()
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(
        f"kv: {{store: channels, store_options: {{mask: {output}}}, sink: 4, recent: 8}}\n"
    )
    bench = (
        "--texts",
        "prose",
        "--length",
        300,
        "--tasks",
        "--lookups",
        "--caches",
        yaml,
        "--output",
        tmp_path / "b.json",
    )
    assert run("llm", "bench-kv", "--model", small_llama, *bench) == 0
    assert "| mine |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", 2), "keep=2"),
        (("--output", "mask.bin"), "mask.bin"),
        (("--length", 600), "600 tokens"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(refused, small_llama, arguments, message):
    assert message in refused("learn-mask", "--model", small_llama, *arguments)
