"""The package as a whole: light import, root folders, public names."""

import subprocess
import sys
from pathlib import Path

import pytest

import dit_accel

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "finetune", "eval"])
def test_root_folders_are_no_packages(folder):
    """An importable root folder `kernels` would shadow the Hugging Face package."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_import_loads_nothing_heavy():
    code = (
        "import sys, dit_accel; heavy = {'diffusers', 'transformers', 'triton', 'torchmetrics', 'imageio', 'tyro'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_kernels_know_neither_diffusers_nor_transformers():
    code = (
        "import sys, dit_accel.kernels, dit_accel.sla;"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_resolves_and_unknown_ones_do_not():
    for name in dit_accel.__all__:
        assert getattr(dit_accel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SparseWann'"):
        dit_accel.SparseWann  # noqa: B018
