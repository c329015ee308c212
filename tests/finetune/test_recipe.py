"""Recipes: found by name, checked, and overridden without contradictions."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from dit_accel.cli.finetune import DEFAULT_RECIPE, Finetune
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.recipe import (
    REPLACES,
    TEACHER_OPTIONS,
    find_recipe,
    load_config,
    override,
    read_recipe,
    recipe_folder,
    recipe_names,
)

ROOT = Path(__file__).parents[2]
NAMES = ("lumina2-sla", "sd3-sla", "tiny-wan-sla", "wan2.1-1.3b-sla", "wan2.1-14b-sla")


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def test_all_recipes_are_found_and_described():
    assert tuple(recipe_names()) == NAMES
    assert DEFAULT_RECIPE in NAMES
    help_text = Path(Finetune.__module__.replace(".", "/") + ".py")
    text = (ROOT / help_text).read_text()
    assert all(name in text for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_for_its_family_and_commented(name):
    config = load_config(name)
    assert config.family is not None
    model = config.pretrained_model_name_or_path.lower()
    assert {"wan": "wan", "sd3": "stable-diffusion-3", "lumina2": "lumina-image-2"}[
        config.family
    ] in model
    text = find_recipe(name).read_text()
    assert text.startswith("# ")
    values = yaml.safe_load(text)
    for line in text.splitlines():
        if re.match(r"\s*\w+:", line) and not line.rstrip().endswith(":"):
            assert "  # " in line, f"{name}: no comment: {line}"
    assert set(values) <= {x.name for x in dataclasses.fields(FinetuneConfig)}


def test_the_wheel_ships_every_recipe():
    import tomllib

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    targets = data["tool"]["hatch"]["build"]["targets"]
    included = targets["wheel"]["force-include"]
    shipped = {k: x for k, x in included.items() if k.startswith("finetune/")}
    assert shipped == {
        f"finetune/{name}.yaml": f"dit_accel/assets/recipes/{name}.yaml" for name in NAMES
    }
    assert "finetune" in targets["sdist"]["include"]


def test_recipes_of_a_wheel_are_among_the_assets(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "dit_accel"
    recipes = package / "assets" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "one.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(
        "dit_accel.finetune.recipe.__file__", str(package / "finetune" / "recipe.py")
    )
    monkeypatch.setattr("dit_accel.files.__file__", str(package / "files.py"))
    assert recipe_folder() == recipes
    assert load_config("one").seed == 1


def test_a_file_goes_before_a_name_and_unknown_names_get_a_suggestion(write, monkeypatch):
    path = write("seed: 3\n")
    assert load_config(path).seed == 3
    monkeypatch.chdir(path.parent)
    path.rename(path.parent / "sd3-sla")
    assert load_config("sd3-sla").seed == 3
    with pytest.raises(ValueError, match=r"^config='sd3_sla': .*'sd3-sla'"):
        find_recipe("sd3_sla")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1e-4\n", r"mine.yaml: .*'learning_rte' .*'learning_rate'"),
        ("sla:\n  topkk: 0.1\n", r"mine.yaml: sla: .*'topkk' .*'topk'"),
        ("seed: 1\nseed: 2\n", r"mine.yaml: .*'seed' .*line 2"),
        ("learning_rate: fast\n", r"mine.yaml: learning_rate='fast'"),
        ("sla: balanced\n", r"mine.yaml: sla='balanced': .*SLAConfig"),
        ("- seed\n", r"mine.yaml: .*mapping"),
        ("seed: [\n", r"mine.yaml: .*YAML"),
        ("train: sla\nsla: {combine: none}\nstages: [distillation]\n", r"mine.yaml: train='sla': .*sla.combine='none'"),
    ],
)  # fmt: skip
def test_bad_recipes_name_file_and_key(text, message, write, unchecked):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(text))


def test_numbers_with_exponents_are_numbers(write):
    assert load_config(write("learning_rate: 1e-4\n")).learning_rate == 1e-4


def test_single_fields_of_sparse_attention_are_overridden(write):
    path = write("sla: {topk: 0.2, combine: proj}\nseed: 4\n")
    config = load_config(path, {"sla": {"topk": 0.05}, "learning_rate": 1e-3})
    assert (config.sla["topk"], config.sla["combine"]) == (0.05, "proj")
    assert (config.seed, config.learning_rate) == (4, 1e-3)


RECIPE = {
    "prompts": "demo",
    "num_teacher_samples": 8,
    "teacher_guidance_scale": 2.0,
    "height": 64,
    "width": 64,
    "num_frames": 33,
    "max_sequence_length": 16,
    "router": "learned",
    "sla_learning_rate": 1e-3,
    "train": "lora",
    "lora_alpha": 8,
    "loss": "mix",
    "diffusion_weight": 0.2,
    "targets": "mixed",
    "caption_dropout": 0.2,
    "sla": {"combine": "alpha"},
    "stages": ("regression", "distillation"),
    "regression_topk": (0.25, 0.5),
    "topk_start": 0.5,
    "anneal_steps": 10,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 5,
}


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        ({"instance_data_dir": "a"}, {"prompts", "num_teacher_samples", "teacher_guidance_scale"}),
        (
            {"precomputed_dir": "a"},
            {
                "prompts",
                *TEACHER_OPTIONS[::2],
                "height",
                "width",
                "num_frames",
                "max_sequence_length",
            },
        ),
        ({"router": "fixed"}, {"sla_learning_rate"}),
        ({"prompts": "smoke"}, set()),
        ({"prompts": None}, {"num_teacher_samples", "teacher_guidance_scale"}),
        ({"buckets": "33,64,64"}, {"height", "width", "num_frames"}),
        ({"train": "all"}, {"lora_alpha"}),
        ({"loss": "distillation"}, {"diffusion_weight"}),
        ({"targets": "conditional"}, {"caption_dropout"}),
        ({"stages": ("distillation",)}, {"regression_topk", "topk_start", "anneal_steps"}),
        ({"lr_scheduler": "constant"}, {"lr_warmup_steps"}),
        ({"height": 128, "width": 128}, set()),
        ({"seed": 3}, set()),
    ],
    # The printed order of a set differs between processes, and workers must agree on names.
    ids=lambda value: str(value if isinstance(value, dict) else sorted(value)),
)
def test_an_override_takes_along_what_belongs_to_it(given, gone):
    FinetuneConfig.from_dict(RECIPE)
    merged = override(RECIPE, given)
    FinetuneConfig.from_dict(merged)
    assert set(RECIPE) - set(merged) == gone
    assert given.items() <= merged.items()
    assert RECIPE["prompts"] == "demo"  # the recipe itself stays


def test_fewer_steps_shorten_warmup_and_annealing_of_the_recipe():
    merged = override(RECIPE, {"max_train_steps": 2})
    assert (merged["lr_warmup_steps"], merged["anneal_steps"]) == (2, 2)
    FinetuneConfig.from_dict(merged)
    assert override(RECIPE, {"max_train_steps": 100})["anneal_steps"] == 10
    with pytest.raises(ValueError, match=r"lr_warmup_steps=5: .*max_train_steps=2"):
        FinetuneConfig.from_dict(override(RECIPE, {"max_train_steps": 2, "lr_warmup_steps": 5}))
    with pytest.raises(ValueError, match="max_train_steps=0"):
        FinetuneConfig.from_dict(override(RECIPE, {"max_train_steps": 0}))


def test_options_that_are_given_are_never_discarded(unchecked):
    with pytest.raises(ValueError, match="num_teacher_samples=3"):
        FinetuneConfig.from_dict(
            override(RECIPE, {"instance_data_dir": "a", "num_teacher_samples": 3})
        )


def test_options_of_the_table_exist():
    names = {x.name for x in dataclasses.fields(FinetuneConfig)}
    assert {*REPLACES, *TEACHER_OPTIONS} | {y for x in REPLACES.values() for y in x} <= names
