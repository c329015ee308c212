"""The files of a result: what they hold, and that they load again."""

import errno
import fnmatch
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import ModelCard
from safetensors import SafetensorError

import dit_accel
from dit_accel import SparseWanPipeline
from dit_accel.checkpoint.file import read_checkpoint
from dit_accel.checkpoint.identity import identity_of
from dit_accel.finetune.card import write_card
from dit_accel.finetune.log import RunLog
from dit_accel.finetune.result import PUBLISHED, check_hub, push_result, write_result
from dit_accel.runtime.install import method_of

SPARSE = {"combine": "proj", "topk": 0.2, "dense_layers": 0, "dense_steps": 0}


def settings(model, train, **changed):
    return SimpleNamespace(
        **{
            "pretrained_model_name_or_path": str(model),
            "revision": None,
            "cache_dir": None,
            "train": train,
            "merge": False,
            "push_to_hub": True,
            "hub_token": None,
            "hub_model_id": None,
            "sla": {"topk": 0.2},
            "stages": ("regression", "distillation"),
            "loss": "distillation",
            "targets": "mixed",
            "train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4,
            "lr_scheduler": "constant",
            "mixed_precision": "no",
            "seed": 0,
        }
        | changed
    )


@torch.no_grad()
def trained(sparse_wan, train):
    """A pipeline whose parameters are not what they were."""
    pipe = sparse_wan(sla=SPARSE)
    generator = torch.Generator().manual_seed(5)
    if train == "lora":
        from peft import LoraConfig

        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    for name, x in pipe.transformer.named_parameters():
        if ".sla." in name or "lora_" in name or (train == "all" and "ffn" in name):
            x.add_(0.1 * torch.randn(x.shape, generator=generator))
    for module_ in method_of(pipe, "sla").attention.values():
        module_.calibrated = True
    return pipe


def same(pipe, other, call):
    a, b = pipe(**call()).frames, other(**call()).frames
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("train", ["sla", "lora", "all"])
def test_result_loads_into_the_base_model(sparse_wan, wan_repository, wan, call, tmp_path, train):
    pipe, config = trained(sparse_wan, train), settings(wan_repository, train)
    names = write_result(pipe, config, tmp_path)
    expected = {
        "sla": ["sla.safetensors"],
        "lora": ["pytorch_lora_weights.safetensors", "sla.safetensors"],
        "all": ["transformer", "sla.safetensors"],
    }
    assert names == expected[train]
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(names)
    stored = read_checkpoint(tmp_path / "sla.safetensors")
    assert torch.equal(stored.base.fingerprint, identity_of(wan.transformer).fingerprint)
    assert (stored.companion is None) == (train == "sla")
    loaded = SparseWanPipeline.from_pretrained(wan_repository, sla=tmp_path)
    assert same(pipe, loaded, call) < (1e-6 if train == "lora" else 1e-12)
    loaded.disable()
    assert torch.equal(loaded(**call()).frames, wan(**call()).frames)


def test_the_fingerprint_of_the_base_outlives_training(sparse_wan, wan_repository, wan, tmp_path):
    pipe = trained(sparse_wan, "all")
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            torch.nn.init.normal_(block.attn1.to_v.weight)
    write_result(pipe, settings(wan_repository, "all"), tmp_path)
    dit_accel.load_sla(pipe := sparse_wan(sla=None), tmp_path)
    stored = read_checkpoint(tmp_path / "sla.safetensors").base
    stored.check(identity_of(pipe.transformer, original=True))
    with pytest.raises(ValueError, match="another base model"):
        stored.check(identity_of(pipe.transformer))


def test_a_base_model_that_is_gone_leaves_the_earlier_result(sparse_wan, wan_repository, tmp_path):
    pipe = trained(sparse_wan, "all")
    write_result(pipe, settings(wan_repository, "all"), tmp_path)
    before = {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()}
    with pytest.raises(RuntimeError, match=r"gone: the base model .*'latest'"):
        write_result(pipe, settings(tmp_path / "gone", "all"), tmp_path)
    assert {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()} == before


@pytest.mark.parametrize("train", ["lora", "all"])
def test_merged_repository_loads_alone(sparse_wan, wan_repository, call, tmp_path, train):
    pipe = trained(sparse_wan, train)
    before = pipe(**call()).frames
    names = write_result(pipe, settings(wan_repository, train, merge=True), tmp_path)
    assert names[-1] == "merged"
    loaded = SparseWanPipeline.from_pretrained(tmp_path / "merged")
    after = loaded(**call()).frames
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert method_of(loaded, "sla").config.topk == 0.2
    assert read_checkpoint(tmp_path / "merged/sla.safetensors").companion is None
    assert not any(x.name.startswith(".tmp") for x in tmp_path.iterdir())


def test_result_is_replaced(sparse_wan, wan_repository, tmp_path):
    config = settings(wan_repository, "all")
    write_result(trained(sparse_wan, "sla"), config, tmp_path)
    first = (tmp_path / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    write_result(trained(sparse_wan, "all"), config, tmp_path)
    second = (tmp_path / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    assert first != second
    assert sorted(x.name for x in tmp_path.iterdir()) == ["sla.safetensors", "transformer"]


def test_full_disk_leaves_the_earlier_result(sparse_wan, wan_repository, tmp_path, monkeypatch):
    config, pipe = settings(wan_repository, "all"), trained(sparse_wan, "all")
    write_result(pipe, config, tmp_path)
    before = {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(pipe.transformer, "save_pretrained", full)
    with pytest.raises(RuntimeError, match=r"No space left on device.*checkpoints of the run"):
        write_result(pipe, config, tmp_path)
    assert {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()} == before


def test_error_of_safetensors_is_one_of_the_disk(sparse_wan, wan_repository, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    pipe = trained(sparse_wan, "all")
    monkeypatch.setattr(pipe.transformer, "save_pretrained", full)
    with pytest.raises(RuntimeError, match=r"No space left on device.*checkpoints of the run"):
        write_result(pipe, settings(wan_repository, "all"), tmp_path)


def test_weights_are_on_the_disk_before_they_get_their_name(
    sparse_wan, wan_repository, tmp_path, monkeypatch
):
    synced, missing = [], []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked_replace(source, target):
        source = Path(source)
        files = [source, *source.rglob("*")] if source.is_dir() else [source]
        if Path(target).parent == tmp_path:
            missing.extend(x.name for x in files if x.stat().st_ino not in synced)
        replace(source, target)

    pipe = trained(sparse_wan, "all")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", checked_replace)
    write_result(pipe, settings(wan_repository, "all", merge=True), tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) > 3
    assert missing == []


def test_weights_are_those_of_the_plain_model(sparse_wan, wan_repository, tmp_path):
    write_result(trained(sparse_wan, "all"), settings(wan_repository, "all"), tmp_path)
    plain = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert not any(".sla." in name for name in plain.state_dict())


# The hub ----------------------------------------------------------------------------------------------


class FakeHub:
    def __init__(self, token=None, fail=None):
        self.token, self.fail, self.calls = token, fail, []

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, name, exist_ok):
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, **arguments):
        if self.fail:
            raise self.fail
        self.calls.append(arguments)


def published(folder):
    """Return the files that `upload_folder` would upload, with fnmatch as it does."""
    names = [str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()]
    taken = [x for x in names if any(fnmatch.fnmatch(x, p) for p in PUBLISHED)]
    return sorted(x for x in taken if not any(fnmatch.fnmatch(x, p) for p in (".*", "**/.*")))


def test_upload(tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    folder = tmp_path / "my-sla"
    files = [
        "sla.safetensors",
        "README.md",
        "curves.png",
        "log.jsonl",
        "training_config.json",
        "transformer/config.json",
        "merged/vae/config.json",
        "validation/distillation-000000/00000-sparse.mp4",
        ".lock",
        "checkpoint-3/state.json",
        "logs/fake/events",
        "nonfinite-3.json",
        ".tmp-checkpoint-3/x",
        "teacher-samples/manifest.json",
    ]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    config = settings("x", "sla", hub_token="secret")
    assert push_result(folder, config) == "https://huggingface.co/someone/my-sla"
    [call] = hub.calls
    assert hub.token == "secret"
    assert (call["repo_id"], call["folder_path"]) == ("someone/my-sla", folder)
    assert call["allow_patterns"] == list(PUBLISHED)
    assert published(folder) == sorted(files[:8])


def test_failed_upload_says_where_the_result_is(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(fail=OSError("no route to host")))
    with pytest.raises(
        RuntimeError, match=rf"no route to host.*{re.escape(str(tmp_path))}.*hf upload"
    ):
        push_result(tmp_path, settings("x", "sla", hub_model_id="a/b"))


def test_upload_without_hub_is_refused_before_training():
    with pytest.raises(ValueError, match=r"push_to_hub=True: .*`hf auth login`"):
        check_hub(settings("x", "sla"))  # tests run offline


# The card ---------------------------------------------------------------------------------------------


def log(folder):
    log = RunLog(folder)
    metrics = {"psnr": 20.0, "ssim": 0.5, "latent_error": 0.4, "density": 0.1}
    for step, better in ((0, 1.0), (10, 1.5)):
        values = {f"validation/{name}": x * better for name, x in metrics.items()}
        log.write("distillation", step, values)
    log.write("distillation", 10, {"loss": 0.125, "density": 0.1})
    log.close()


@pytest.mark.parametrize("train", ["sla", "lora", "all"])
def test_card(tmp_path, train):
    folder = tmp_path / "my-sla"
    folder.mkdir()
    log(folder)
    config = settings("owner/model", train, merge=train == "all")
    write_card(
        folder, config, pipeline="SparseWanPipeline", base="owner/model", counters={"seconds": 61.2}
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "owner/model"
    assert "sla" in card.data.tags
    assert "| before training | 20.00 | 0.5000 | 0.4000 | 0.100 |" in card.text
    assert "| after 10 steps | 30.00 | 0.7500 | 0.6000 | 0.150 |" in card.text
    assert "| loss at the last step | 0.125 |" in card.text
    use = 'pipe = SparseWanPipeline.from_pretrained("owner/model", sla="my-sla")'
    assert use in card.text
    assert ("my-sla/merged" in card.text) == (train == "all")


@pytest.mark.parametrize("train", ["sla", "lora", "all"])
def test_code_of_the_card_runs(sparse_wan, wan_repository, tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(wan_repository)
    folder = tmp_path / "my-sla"
    config = settings("base", train, merge=train != "sla")
    write_result(trained(sparse_wan, train), config, folder)
    log(folder)
    write_card(folder, config, pipeline="SparseWanPipeline", base="base", counters={})
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert dit_accel.summary(names["pipe"]).enabled


def test_full_disk_leaves_the_earlier_card(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("earlier")
    RunLog(tmp_path).close()

    def full(self, path):
        Path(path).write_text("hal")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(ModelCard, "save", full)
    config = settings("x", "sla")
    with pytest.raises(OSError, match="No space left"):
        write_card(tmp_path, config, pipeline="SparseWanPipeline", base="x", counters={})
    assert (tmp_path / "README.md").read_text() == "earlier"


@pytest.mark.parametrize(
    ("topk", "text"),
    [
        (0.05, "about 5 % of the key blocks"),
        (None, "the key blocks selected by top_p"),
    ],
)
def test_card_without_validation(tmp_path, topk, text):
    RunLog(tmp_path).close()
    write_card(
        tmp_path,
        settings("tiny-wan", "sla", sla={"topk": topk}),
        pipeline="SparseWanPipeline",
        base="tiny-wan",
        counters={},
    )
    card = (tmp_path / "README.md").read_text()
    assert text in card
    assert "## Quality" not in card
    assert ModelCard(card).data.base_model is None
