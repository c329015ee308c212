"""lm-evaluation-harness: the model type enables sparse prefill; a stub stands for lm_eval, which is not installed."""

import sys

import pytest
import torch

from dit_accel.llm import harness, summary

from .models import make, prompt

STUB = {
    "__init__.py": "",
    "__main__.py": "def cli_evaluate():\n    print('lm_eval runs')\n",
    "models/__init__.py": "",
    "models/huggingface.py": """
class HFLM:
    def __init__(self, pretrained, **more):
        self.model, self.more = pretrained, more

    def get_model_info(self):
        return {"model_dtype": "float32"}
""",
    "api/__init__.py": "",
    "api/registry.py": """
kinds = {}

def get_model(name):
    if name not in kinds:
        raise ValueError(name)
    return kinds[name]

def register_model(name):
    return lambda kind: kinds.setdefault(name, kind)
""",
}


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """Have a stub of lm_eval imported, whether or not the real one is installed."""
    for name, text in STUB.items():
        path = tmp_path / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in [x for x in sys.modules if x.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [x for x in sys.modules if x.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def test_the_model_type_enables_sparse_prefill(lm_eval):
    kind = harness.register()
    assert harness.register() is kind
    model = make("Llama")
    made = kind(model, prefill="a_shape", crossover="0", batch_size=2)
    assert made.more == {"batch_size": 2}
    with torch.no_grad():
        model(prompt())
    assert summary(model).sparse_calls == 2
    info = made.get_model_info()
    assert info["model_dtype"] == "float32"
    assert info["prefill"]["pattern"] == "a_shape"
    assert info["prefill"]["crossover"] == 0
    assert "2 sparse calls" in info["prefill_calls"]


def test_none_stays_dense(lm_eval):
    model = make("Llama")
    made = harness.register()(model, prefill="none")
    assert made.get_model_info()["prefill"] is None
    with pytest.raises(ValueError, match="model: not enabled"):
        summary(model)


def test_bad_settings_are_named_before_a_model_is_loaded(lm_eval):
    with pytest.raises(ValueError, match=r"prefill='blokcs'.*'blocks'"):
        harness.register()("no/such-model", prefill="blokcs")


def test_the_command_line_is_that_of_lm_eval(lm_eval, capsys):
    harness.main()
    assert capsys.readouterr().out == "lm_eval runs\n"


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        harness.main()
    assert stopped.value.code == 2
    assert "pip install 'dit-accel[lm-eval]'" in capsys.readouterr().err
