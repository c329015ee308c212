"""Outcomes of diffusers' own pipeline tests on plain, replaced and enabled pipelines (pipelines/diffusers_tests.py)."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.bench.outcomes import Allowed, Records, compare, markdown, read_records
from dit_accel.environment import machine, versions
from dit_accel.files import atomic_path, write_json

FOLDERS = (
    "wan",
    "stable_diffusion_3",
    "lumina",
    "lumina2",
    "flux",
    "qwenimage",
    "hunyuan_video",
    "ltx",
)
_MEGAPIXEL = (
    "the VAE reads a megapixel of the picture in every call: minutes for each test on a CPU"
)
LEFT_OUT = {
    "wan/test_wan_animate.py": "WanAnimateTransformer3DModel is not supported",
    "flux/test_pipeline_flux_redux.py": "a pipeline without transformer",
    "qwenimage/test_qwenimage_edit.py": _MEGAPIXEL,
    "qwenimage/test_qwenimage_edit_plus.py": _MEGAPIXEL,
    "hunyuan_video/test_hunyuan_video_framepack.py": "HunyuanVideoFramepackTransformer3DModel is not supported",
    "ltx/test_ltx_latent_upsample.py": "a pipeline without transformer",
}
PLUGINS = ("diffusers_tests_plugin.py", "diffusers_tests_hub.py")
"""Modules that run beside the copied tests: a pytest plugin, and the repositories that stand in for the hub."""

# Imported by modules of which the tests here use only helpers.
STAND_INS = {
    "parameterized": "class parameterized:\n    expand = staticmethod(lambda *a, **k: lambda f: f)\n",
    "requests_mock": "",
}
ALLOWED = (
    Allowed("test_fused_qkv", "after enable", "enable|sparse", "fusing after enable is refused"),
    Allowed(
        "cache|pyramid_attention",
        "a step cache of diffusers is on",
        "enable|sparse",
        "a step cache of diffusers together with ras is refused",
    ),
    Allowed(
        "test_ip_adapter$",
        "load_ip_adapter .* disable",
        "enable|sparse",
        "loading an IP-Adapter after enable is refused",
    ),
    Allowed(
        "test_flux_image_output_shape",
        "accepted are multiples of",
        "classes",
        "our classes refuse sizes that diffusers rounds",
    ),
    Allowed(
        "lumina2.*batch_single_identical",
        "",
        "sparse",
        "prompts of different lengths: masked calls of Lumina2 run dense",
    ),
)


_BLOCKS = {"crossover": "never", "block_q": 16, "block_k": 16, "dense_steps": 0, "dense_layers": 0}
_SPARSE = {
    "sla": {**_BLOCKS, "topk": 0.5},
    "ras": {"ratio": 0.5, "warmup": 1, "tail": 0, "resets": []},
}


@dataclass(frozen=True)
class Variant:
    """Variant of the pipelines that the tests run on."""

    text: str
    """Description, for tables."""
    against: str = "plain"
    """Baseline: name of a variant with plain pipelines."""
    ours: bool = False
    """Replace the pipeline classes of diffusers by those of this package."""
    settings: dict[str, Any] | None = None
    """Arguments of `dit_accel.enable` for every pipeline that a test makes."""

    @property
    def large(self) -> bool:
        """True if the tests run with larger inputs (LARGE)."""
        return self.against == "plain-large"


VARIANTS = {
    "plain": Variant("diffusers' classes"),
    "classes": Variant("our classes, as they come", ours=True),
    "enable": Variant(
        'enable(pipe, ras="balanced", sla="balanced")',
        settings={"ras": "balanced", "sla": "balanced"},
    ),
    "plain-large": Variant("diffusers' classes, larger inputs", "plain-large"),
    "classes-sparse": Variant(
        "our classes, larger inputs, as enable-sparse", "plain-large", ours=True, settings=_SPARSE
    ),
    "enable-exact": Variant(
        "larger inputs, sparse attention that reads every block",
        "plain-large",
        settings={"sla": {**_BLOCKS, "topk": 1.0}},
    ),
    "enable-sparse": Variant(
        "larger inputs, half of the blocks and half of the tokens from step 2 on",
        "plain-large",
        settings=_SPARSE,
    ),
}


@dataclass
class DiffusersTests:
    """Compare the outcome of diffusers' pipeline tests between variants."""

    diffusers: Path
    """A git repository of diffusers: a checkout, or a bare one."""
    revision: str | None = None
    """Commit or tag whose tests are taken. Default: HEAD."""
    output: Path | None = None
    """JSON file. A Markdown file with the same data is written next to it. Default: print only."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to run, in addition to their baselines with plain pipelines."""
    folders: tuple[str, ...] = FOLDERS
    """Folders of `tests/pipelines` that run."""
    tests: str = ""
    """Only the tests that this expression of pytest's -k selects."""
    work: Path | None = None
    """Folder of the records of finished variants, from which a stopped run resumes. Default: none."""

    def run(self, plugins: Path) -> int:
        """Run the tests, print and write the report, and return the exit code.

        Args:
            plugins: folder of PLUGINS.
        """
        unknown = set(self.variants) - set(VARIANTS)
        if unknown:
            raise SystemExit(f"--variants {', '.join(unknown)}: accepted are {', '.join(VARIANTS)}")
        if other := set(self.folders) - set(FOLDERS):
            raise SystemExit(f"--folders {', '.join(other)}: accepted are {', '.join(FOLDERS)}")
        asked = {x: VARIANTS[x].against for x in self.variants}
        variants = [x for x in VARIANTS if x in asked or x in asked.values()]
        with tempfile.TemporaryDirectory(prefix="diffusers-tests-") as folder:
            revision = take_tests(self.diffusers, self.revision, Path(folder), plugins)
            results = {x: self.records(Path(folder), x) for x in variants}
        texts = {x: VARIANTS[x].text for x in variants}
        report = compare(results, {x: VARIANTS[x].against for x in variants}, ALLOWED)
        report |= {"diffusers_tests": revision, "variants": texts, "left_out": LEFT_OUT}
        report |= {"folders": self.folders, "tests_selected": self.tests}
        report |= {"versions": versions(), "machine": machine()}
        text = markdown(report, texts)
        print(text)
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.output, report)
            with atomic_path(self.output.with_suffix(".md")) as path:
                path.write_text(text, encoding="utf-8")
        return 1 if report["unexpected"] else 0

    def records(self, folder: Path, variant: str) -> Records:
        """Return the record of each test, read from the work folder or run now."""
        kept = None if self.work is None else self.work / f"{variant}.jsonl"
        if kept is None or not kept.exists():
            found = run_variant(folder, variant, self.folders, self.tests)
            if kept is None:
                return read_records(found)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(kept) as path:
                path.write_bytes(found.read_bytes())
        return read_records(kept)


def take_tests(source: Path, revision: str | None, folder: Path, plugins: Path) -> str:
    """Copy the tests folder and the files that it needs, and return the commit.

    Args:
        source: git repository of diffusers.
        revision: commit or tag. None: HEAD.
        folder: empty folder for the copy.
        plugins: folder of PLUGINS.

    Raises:
        SystemExit: there is no tests folder at this commit.
    """
    git = ["git", "-C", str(source)]

    def call(*arguments: str) -> bytes:
        return subprocess.run([*git, *arguments], check=True, capture_output=True).stdout

    if not source.is_dir():
        raise SystemExit(
            f"--diffusers {source}: no such folder; accepted is a diffusers repository"
        )
    try:
        commit = call("rev-parse", "--verify", f"{revision or 'HEAD'}^{{commit}}").decode().strip()
        archive = call("archive", "--format=tar", commit, "tests")
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"--diffusers {source}, --revision {revision}: {error.stderr.decode().strip()}; accepted is a git "
            "repository of diffusers with a tests folder at that commit"
        ) from None
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    for name in PLUGINS:
        text = (plugins / name).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "stand_ins").mkdir()
    for name, text in STAND_INS.items():
        (folder / "stand_ins" / f"{name}.py").write_text(text)
    return commit


def run_variant(folder: Path, variant: str, folders: tuple[str, ...], expression: str) -> Path:
    """Run the tests once and return the file with a JSON record per line."""
    records = folder / f"{variant}.jsonl"
    path = [str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "DIT_ACCEL_VARIANT": variant,
        "DIT_ACCEL_REPORT": str(records),
        "DIT_ACCEL_STAND_INS": str(folder / "stand_ins"),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # slices are compared with figures of a CPU
    }
    environment.pop("RUN_SLOW", None)
    environment.pop("RUN_NIGHTLY", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "diffusers_tests_plugin",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-q", "--no-header", "--tb=short", "--rootdir", str(folder), "-k", expression]
    command += [f"--ignore=tests/pipelines/{name}" for name in LEFT_OUT]
    command += [f"tests/pipelines/{name}" for name in folders]
    print(f"{variant}: {VARIANTS[variant].text}", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{variant}: pytest ended with {done.returncode}, see above")
    return records
