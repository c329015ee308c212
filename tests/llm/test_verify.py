"""Sparse against dense prefill: figures equal those of whole logits, and bounds decide the exit code."""

import json

import pytest
import torch

from dit_accel.llm.attention import POLICY
from dit_accel.llm.control import disable, enable
from dit_accel.llm.quality import LAST, compare, outputs

from ..cli.command import run
from .models import make, prompt

SMALL = {"block": 16, "tail": 16, "crossover": 0, "dense_layers": 0}
SPARSE = {"pattern": "blocks", "options": {"topk": 0.1, "top_p": None}, **SMALL}
FULL = {"pattern": "blocks", "options": {"top_p": 1.0}, **SMALL}


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3"])
def test_outputs_are_those_of_all_logits(name):
    """Gemma 2 caps its logits, so its output head alone does not give them."""
    model, ids = make(name), prompt(rows=1, length=200)
    logits = model(ids).logits[0].float()
    found = outputs(model, ids)
    nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    assert found.nll == pytest.approx(nll.item(), rel=1e-5)
    assert found.perplexity == pytest.approx(nll.exp().item(), rel=1e-5)
    torch.testing.assert_close(found.last, logits[-LAST:].log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_figures_are_those_of_the_definitions():
    model, ids = make("Llama", initializer_range=0.3), prompt(rows=1, length=300)
    with torch.no_grad():
        dense = model(ids).logits[0].log_softmax(-1)
        sparse = enable(model, prefill=SPARSE)(ids).logits[0].log_softmax(-1)
    disable(model)
    found = compare(model, ids, SPARSE)
    last = slice(-LAST, None)
    kl = (dense.exp() * (dense - sparse)).sum(-1)[last].mean()
    assert found.kl == pytest.approx(kl.item(), rel=1e-3)
    assert found.kl > 0
    same = dense.argmax(-1)[last] == sparse.argmax(-1)[last]
    assert found.top1 == pytest.approx(same.float().mean().item())
    losses = [-x[:-1].gather(-1, ids[0, 1:, None]).mean() for x in (dense, sparse)]
    change = 100 * ((losses[1] - losses[0]).exp() - 1)
    assert found.perplexity_percent == pytest.approx(change.item(), abs=1e-3)
    assert found.tokens == 300
    assert found.sparse_calls == 3
    assert 0 < found.density < 0.6
    assert not any(hasattr(x, POLICY) for x in model.modules())


def test_a_full_budget_changes_nothing():
    found = compare(make("Llama"), prompt(rows=1, length=200), FULL)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert (found.top1, found.density) == (1, pytest.approx(1))
    assert found.perplexity_percent == pytest.approx(0, abs=1e-3)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ValueError, match="ids: 1 tokens"):
        compare(make("Llama"), prompt(rows=1, length=1), SPARSE)


@pytest.fixture
def verify(small_llama, tmp_path, capsys):
    """`verify(settings, *options)`: exit code, stdout and stderr of the command on the tiny model."""

    def call(settings, *options):
        path = tmp_path / "prefill.yaml"
        path.write_text(json.dumps({"prefill": settings}))  # JSON is YAML
        capsys.readouterr()
        code = run(
            "llm", "verify", "--model", small_llama, "--prefill", path, "--length", "300", *options
        )
        return code, *capsys.readouterr()

    return call


def test_good_settings_pass(verify):
    code, out, err = verify(FULL)
    assert (code, err) == (0, "")
    assert "density 1.000" in out


def test_a_bound_that_is_exceeded_exits_with_3(verify):
    code, out, err = verify(
        SPARSE, "--max-kl", "0", "--max-ppl-percent", "1000", "--format", "json"
    )
    assert code == 3
    assert "kl=" in err
    assert "max_kl=0" in err
    found = json.loads(out)
    assert found["kl"] > 0
    assert len(found["failed"]) == 1


def test_a_run_without_sparse_calls_verifies_nothing(verify):
    code, _, err = verify({**SPARSE, "crossover": 400})
    assert code == 3
    assert "--crossover 0" in err
