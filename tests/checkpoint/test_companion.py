"""Fine-tuned weights and adapters beside an SLA checkpoint: put in with it, taken out with it, or refused."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dit_accel
from dit_accel import disable, enable, load_sla, save_sla, summary
from dit_accel.checkpoint.companion import Companion
from dit_accel.checkpoint.file import read_checkpoint, write_checkpoint
from dit_accel.checkpoint.identity import identity_of
from dit_accel.checkpoint.merge import merge
from dit_accel.checkpoint.save_load import own_file
from dit_accel.finetune.result import write_result
from dit_accel.runtime.install import installation_of, method_of, original_weights
from dit_accel.runtime.swap import WeightSwap

from ..offloading import copying_stream, group_offload
from ..pipelines.test_wan import same, snapshot
from ..random_pipelines import make, relative, run
from .test_save_load import RAS, SLA, absent, equal, tuned, weights

CLASSES = {"wan": dit_accel.SparseWanPipeline, "sd3": dit_accel.SparseStableDiffusion3Pipeline}
STEPS = 2


@torch.no_grad()
def train(pipe, kind):
    """Change weights as training would: adapters, or every weight of the transformer."""
    generator = torch.Generator().manual_seed(11)
    if kind == "lora":
        from peft import LoraConfig

        names = ["to_q", "to_v", "to_out.0"]
        pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=names))
    for name, x in pipe.transformer.named_parameters():
        if ".sla." not in name and (kind == "all" or "lora_" in name):
            x.add_(0.1 * torch.randn(x.shape, generator=generator))


class Result:
    """Result of a fine-tuning run: its folder, the base repository, and what the trained pipeline generates."""

    def __init__(self, family, kind, place):
        self.family, self.kind = family, kind
        self.base, self.folder = place / "base", place / "result"
        make(family).save_pretrained(self.base)
        # LoRA files are written by a pipeline class that has save_lora_weights; ours do.
        pipe = CLASSES[family].from_pretrained(self.base, sla=None, **absent(family))
        pipe.set_progress_bar_config(disable=True)
        self.dense = run(pipe, family, steps=STEPS)
        sparse = tuned(family, dense_steps=0)
        save_sla(sparse, place)
        load_sla(pipe, place)
        train(pipe, kind)
        config = {"pretrained_model_name_or_path": str(self.base), "train": kind, "merge": False}
        write_result(pipe, SimpleNamespace(**config), self.folder)
        self.sparse = run(pipe, family, steps=STEPS)
        enable(pipe, ras=RAS)
        self.both = run(pipe, family, steps=4)

    @property
    def companion(self):
        return {"all": "transformer", "lora": "pytorch_lora_weights.safetensors"}[self.kind]

    def plain(self, **arguments):
        pipe = CLASSES[self.family].from_pretrained(
            self.base, sla=None, **absent(self.family), **arguments
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe, **changed):
        return run(pipe, self.family, **{"steps": STEPS, **changed})

    def check_sparse(self, pipe):
        """Assert that the pipeline generates what the trained one did."""
        error = relative(self.run(pipe), self.sparse)
        assert error < (1e-5 if self.kind == "lora" else 1e-12)

    def check_dense(self, pipe):
        """Assert that the pipeline generates what the base model does, bit for bit."""
        disable(pipe)
        assert torch.equal(self.run(pipe), self.dense)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    made = {}

    def result(family, kind):
        if (family, kind) not in made:
            made[family, kind] = Result(family, kind, tmp_path_factory.mktemp("companion"))
        return made[family, kind]

    return result


CASES = [("wan", "all"), ("wan", "lora"), ("sd3", "all"), ("sd3", "lora")]
each_case = pytest.mark.parametrize(("family", "kind"), CASES)
each_kind = pytest.mark.parametrize("kind", ["all", "lora"])


@pytest.fixture
def wan(results, kind):
    return results("wan", kind)


@pytest.fixture
def copied(wan, tmp_path):
    """A copy of the folder of a result, to damage it."""
    return shutil.copytree(wan.folder, tmp_path / "copy")


# In and out


@each_case
def test_the_base_model_becomes_the_tuned_one_and_comes_back(family, kind, results):
    result = results(family, kind)
    assert relative(result.sparse, result.dense) > 1e-2
    loaded = CLASSES[family].from_pretrained(result.base, sla=result.folder, **absent(family))
    loaded.set_progress_bar_config(disable=True)
    result.check_sparse(loaded)
    result.check_dense(loaded)
    pipe = result.plain()
    result.run(pipe)  # diffusers notes something in the transformer's __dict__
    before, values = snapshot(pipe.transformer), values_of(pipe)
    for source in (result.folder, str(result.folder / "sla.safetensors")):
        load_sla(pipe, source)
        result.check_sparse(pipe)
        disable(pipe)
        assert same(snapshot(pipe.transformer), before)
        assert values_of(pipe) == values
    result.check_dense(pipe)


def values_of(pipe):
    """Values of the weights in bytes, and where they are in memory."""
    return {
        name: (x.data_ptr(), x.detach().numpy().tobytes())
        for name, x in pipe.transformer.state_dict(keep_vars=True).items()
    }


@each_case
def test_with_region_adaptive_sampling(family, kind, results):
    result = results(family, kind)
    for first in ("sla", "ras"):
        pipe = result.plain()
        enable(pipe, **({"sla": result.folder} if first == "sla" else {"ras": RAS}))
        enable(pipe, **({"ras": RAS} if first == "sla" else {"sla": result.folder}))
        assert relative(result.run(pipe, steps=4), result.both) < 1e-4
        enable(pipe, ras="none")
        result.check_sparse(pipe)
        enable(pipe, ras=RAS)
        enable(pipe, sla="none")
        assert not original_weights(pipe.transformer)
        result.check_dense(pipe)


@each_kind
def test_weights_that_come_in_mid_run_leave_nothing_stale(wan):
    """RAS keeps activations from step to step; those of other weights must not be used."""
    partly = {**RAS, "warmup": 2}
    outputs = {}
    for name, ras in (("cached", partly), ("complete", {**partly, "ratio": 1.0})):
        pipe = wan.plain()
        enable(pipe, ras=ras)

        def switch(pipe, i, t, kwargs):
            if i == 1:
                enable(pipe, sla=wan.folder)
            return {}

        outputs[name] = wan.run(pipe, steps=4, callback_on_step_end=switch)
    assert relative(outputs["cached"], outputs["complete"]) < 1e-5


@each_kind
def test_other_settings_bring_the_base_weights_back(wan):
    pipe = wan.plain()
    values = values_of(pipe)
    load_sla(pipe, wan.folder)
    same_settings = method_of(pipe, "sla").config
    enable(pipe, sla=same_settings)  # nothing changes
    wan.check_sparse(pipe)
    for other in ("fast", {**SLA, "combine": "proj", "topk": 0.7}):
        enable(pipe, sla=other)
        assert method_of(pipe, "sla").swap is None
        names = values.keys()
        assert {k: x for k, x in values_of(pipe).items() if k in names} == values
        enable(pipe, sla=wan.folder)
        wan.check_sparse(pipe)
    # A checkpoint of the base model fits while the tuned weights are in.
    load_sla(pipe, wan.folder.parent)
    assert not original_weights(pipe.transformer)
    load_sla(pipe, wan.folder)
    wan.check_sparse(pipe)
    wan.check_dense(pipe)


@each_kind
def test_the_files_are_not_needed_once_they_are_loaded(wan, copied):
    pipe = wan.plain()
    load_sla(pipe, copied)
    shutil.rmtree(copied)
    enable(pipe, ras=RAS)
    enable(pipe, ras="none")
    wan.check_sparse(pipe)
    wan.check_dense(pipe)


@each_kind
def test_a_copy_has_weights_of_its_own(wan):
    pipe = wan.plain()
    load_sla(pipe, wan.folder)
    other = copy.copy(pipe)
    other.transformer = copy.deepcopy(pipe.transformer)
    disable(other)
    wan.check_sparse(pipe)
    assert torch.equal(wan.run(other), wan.dense)
    wan.check_dense(pipe)


@each_kind
def test_precision_of_the_transformer_is_kept(wan):
    pipe = wan.plain().to(torch.bfloat16)
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    dtypes = {name: x.dtype for name, x in before.items()}
    load_sla(pipe, wan.folder)
    found = pipe.transformer.state_dict()
    assert {name: found[name].dtype for name in before} == dtypes
    assert not torch.equal(found["blocks.0.attn1.to_q.weight"], before["blocks.0.attn1.to_q.weight"])  # fmt: skip
    disable(pipe)
    assert equal(pipe.transformer.state_dict(), before)
    # A dtype that is chosen in between is that of the weights that come back.
    pipe = wan.plain()
    load_sla(pipe, wan.folder)
    pipe.to(torch.bfloat16)
    disable(pipe)
    assert equal(pipe.transformer.state_dict(), before)


@each_kind
def test_inference_mode(wan):
    with torch.inference_mode():
        pipe = wan.plain()
        load_sla(pipe, wan.folder)
    wan.check_sparse(pipe)
    with torch.inference_mode():
        disable(pipe)
    assert torch.equal(wan.run(pipe), wan.dense)
    pipe = wan.plain()
    with torch.inference_mode():
        load_sla(pipe, wan.folder)
    assert not next(pipe.transformer.parameters()).is_inference()
    wan.check_sparse(pipe)


# LoRA and offloading of the user


def style(seed=0):
    """Adapters of another LoRA, in the format of diffusers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(3):
        for part in ("to_q", "to_k"):
            where = f"transformer.blocks.{i}.attn1.{part}"
            found[f"{where}.lora_A.weight"] = torch.randn(2, 24, generator=generator)
            found[f"{where}.lora_B.weight"] = torch.randn(24, 2, generator=generator)
    return found


@each_kind
def test_a_lora_on_top(wan):
    outputs = []
    for order in ("lora first", "lora last"):
        pipe = wan.plain()
        if order == "lora first":
            pipe.load_lora_weights(style(), adapter_name="style")
        load_sla(pipe, wan.folder)
        if order == "lora last":
            wan.check_sparse(pipe)
            pipe.load_lora_weights(style(), adapter_name="style")
        outputs.append(wan.run(pipe))
        assert relative(outputs[-1], wan.sparse) > 1e-2
        pipe.disable_lora()
        wan.check_sparse(pipe)
        pipe.enable_lora()
        disable(pipe)
        styled = wan.plain()
        styled.load_lora_weights(style(), adapter_name="style")
        assert torch.equal(wan.run(pipe), wan.run(styled))
        pipe.unload_lora_weights()
        wan.check_dense(pipe)
    assert relative(*outputs) < 1e-6


@each_kind
def test_a_fused_lora_has_to_be_unfused_before(wan):
    pipe = wan.plain()
    pipe.load_lora_weights(style(), adapter_name="style")
    pipe.fuse_lora()
    before = snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=r"a LoRA is fused .*unfuse_lora.*save_pretrained"):
        load_sla(pipe, wan.folder)
    assert same(snapshot(pipe.transformer), before)
    pipe.unfuse_lora()
    load_sla(pipe, wan.folder)


@each_kind
def test_a_lora_that_is_fused_afterwards_stays_fused(wan):
    pipe = wan.plain()
    load_sla(pipe, wan.folder)
    pipe.load_lora_weights(style(), adapter_name="style")
    styled = wan.run(pipe)
    pipe.fuse_lora()
    assert relative(wan.run(pipe), styled) < 1e-5
    enable(pipe, ras=RAS)
    enable(pipe, ras="none")
    assert relative(wan.run(pipe), styled) < 1e-5
    disable(pipe)
    fused = wan.plain()
    fused.load_lora_weights(style(), adapter_name="style")
    fused.fuse_lora()
    assert equal(pipe.transformer.state_dict(), fused.transformer.state_dict())
    assert torch.equal(wan.run(pipe), wan.run(fused))


def model_offload(pipe):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


def group_offloaded(pipe):
    group_offload(pipe.transformer)


@pytest.fixture
def streams(monkeypatch):
    stream = copying_stream(monkeypatch)
    return lambda pipe: group_offload(pipe.transformer, stream)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("all", "model"), ("lora", "group"), ("all", "streams"), ("lora", "streams")],
)
def test_offloading_before_and_after(how, wan, streams):
    offload = {"model": model_offload, "group": group_offloaded, "streams": streams}[how]
    for first in ("enable", "offload"):
        pipe = wan.plain()
        if first == "offload":
            offload(pipe)
        load_sla(pipe, wan.folder)
        if first == "enable":
            offload(pipe)
        for _ in range(2):
            wan.check_sparse(pipe)
        wan.check_dense(pipe)
        load_sla(pipe, wan.folder)
        wan.check_sparse(pipe)


# Refusals


def sequential_offload(pipe):
    from accelerate import cpu_offload

    for module in (pipe.transformer, pipe.vae):
        cpu_offload(module, execution_device=torch.device("cpu"))


def quantise(pipe):
    class Quantised(torch.nn.Parameter):
        pass

    layer = pipe.transformer.blocks[0].attn1.to_q
    del layer._parameters["weight"]
    layer._parameters["weight"] = Quantised(torch.zeros(24, 24), requires_grad=False)


OBSTACLES = {
    "sequential offload": (sequential_offload, r"sequential offloading .*remove_all_hooks"),
    "quantised": (quantise, r"to_q.weight: quantised or sharded \(Quantised"),
    "fused": (lambda x: x.transformer.fuse_qkv_projections(), r"fused; .*unfuse_qkv_projections"),
    "disk": (lambda x: group_offload(x.transformer, path=x.place), r"group offloading to a disk"),
}


@pytest.mark.parametrize(
    ("kind", "case"), [*(("all", x) for x in OBSTACLES), ("lora", "quantised")]
)
def test_weights_that_cannot_be_exchanged_are_refused_by_name(case, wan, tmp_path):
    prepare, message = OBSTACLES[case]
    pipe = wan.plain()
    pipe.place = str(tmp_path)
    enable(pipe, ras=RAS)
    prepare(pipe)
    on = installation_of(pipe)
    with pytest.raises(ValueError, match=rf"{message}.*or a repository with the other weights"):
        load_sla(pipe, wan.folder)
    assert installation_of(pipe).methods == on.methods
    assert method_of(pipe, "sla") is None


@each_kind
def test_sequential_offload_afterwards(wan):
    pipe = wan.plain()
    load_sla(pipe, wan.folder)
    sequential_offload(pipe)
    wan.check_sparse(pipe)
    with pytest.raises(RuntimeError, match=r"changed after enable.*remove_all_hooks"):
        disable(pipe)
    with pytest.raises(RuntimeError, match=r"changed after enable.*remove_all_hooks"):
        enable(pipe, sla="fast")
    wan.check_sparse(pipe)
    enable(pipe, ras=RAS)
    enable(pipe, ras="none")
    wan.check_sparse(pipe)
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(pipe.transformer)
    remove_hook_from_submodules(pipe.vae)
    wan.check_sparse(pipe)
    wan.check_dense(pipe)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_projections_that_are_fused_afterwards_hold_the_base_weights(family, kind, results):
    result = results(family, kind)
    pipe = result.plain()
    load_sla(pipe, result.folder)
    pipe.transformer.fuse_qkv_projections()
    disable(pipe)
    fused = result.plain()
    fused.transformer.fuse_qkv_projections()
    assert equal(pipe.transformer.state_dict(), fused.transformer.state_dict())
    assert torch.equal(result.run(pipe), result.run(fused))
    pipe.transformer.unfuse_qkv_projections()
    result.check_dense(pipe)


@pytest.mark.parametrize(("kind", "on"), [("all", False), ("all", True), ("lora", True)])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(wan, on, monkeypatch):
    pipe = wan.plain()
    if on:
        load_sla(pipe, wan.folder)
    before, values = snapshot(pipe.transformer), values_of(pipe)
    change, calls = WeightSwap._change, []

    def fail_once(self, name, x, how):
        calls.append(name)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("out of memory")
        change(self, name, x, how)

    monkeypatch.setattr(WeightSwap, "_change", fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        disable(pipe) if on else load_sla(pipe, wan.folder)
    monkeypatch.undo()
    assert same(snapshot(pipe.transformer), before)
    assert values_of(pipe) == values
    assert summary(pipe).enabled == on
    if not on:
        load_sla(pipe, wan.folder)
    wan.check_sparse(pipe)
    wan.check_dense(pipe)


@each_kind
def test_another_model_is_refused(wan):
    pipe = wan.plain()
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            torch.nn.init.normal_(block.attn1.to_v.weight)
    before, values = snapshot(pipe.transformer), values_of(pipe)
    with pytest.raises(ValueError, match="another base model"):
        load_sla(pipe, wan.folder)
    with pytest.raises(ValueError, match=r"WanTransformer3DModel.*SD3"):
        load_sla(make("sd3"), wan.folder)
    assert same(snapshot(pipe.transformer), before)
    assert values_of(pipe) == values


def lora_file(folder):
    return folder / "pytorch_lora_weights.safetensors"


def weights_file(folder):
    return folder / "transformer/diffusion_pytorch_model.safetensors"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def rewrite(path, tensors=lambda x: x, metadata=lambda x: x):
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    save_file(tensors(load_file(path)), path, metadata=metadata(about))


def other_settings(**changed):
    """A function that changes settings of PEFT in the header."""

    def change(about):
        settings = json.loads(about["lora_adapter_metadata"])
        settings |= {f"transformer.{name}": x for name, x in changed.items()}
        return about | {"lora_adapter_metadata": json.dumps(settings)}

    return change


def first(change):
    def changed(tensors):
        name = sorted(tensors)[0]
        return tensors | {name: change(tensors[name])}

    return changed


def without_first(tensors):
    return {name: tensors[name] for name in sorted(tensors)[1:]}


DAMAGED = {
    ("all", "missing"): (lambda x: shutil.rmtree(x / "transformer"), r"fine-tuned weights .*transformer; .*dit-accel finetune"),
    ("all", "no weights"): (lambda x: weights_file(x).unlink(), r"transformer.*safetensors: .*file"),
    ("all", "pickle"): (lambda x: (weights_file(x).unlink(), torch.save({}, weights_file(x).with_suffix(".bin"))), r"transformer.*safetensors: .*file"),
    ("all", "truncated"): (lambda x: truncate(weights_file(x)), "truncated|damaged"),
    ("all", "other values"): (lambda x: rewrite(weights_file(x), first(lambda y: y + 1)), "digest"),
    ("all", "less"): (lambda x: rewrite(weights_file(x), without_first), "digest"),
    ("all", "integers"): (lambda x: rewrite(weights_file(x), first(lambda y: y.int())), "torch.int32.*floating-point"),
    ("lora", "missing"): (lambda x: lora_file(x).unlink(), "adapters .*pytorch_lora_weights.safetensors"),
    ("lora", "truncated"): (lambda x: truncate(lora_file(x)), "truncated|damaged"),
    ("lora", "pickle"): (lambda x: torch.save({}, lora_file(x)), r"pytorch_lora_weights.*zip"),
    ("lora", "other values"): (lambda x: rewrite(lora_file(x), first(lambda y: y + 1)), "digest"),
    ("lora", "half"): (lambda x: rewrite(lora_file(x), without_first), "A and B of rank 4"),
    ("lora", "other name"): (lambda x: rewrite(lora_file(x), lambda y: {f"unet.{k}": v for k, v in y.items()}), "unet.* not an adapter"),
    ("lora", "no settings"): (lambda x: rewrite(lora_file(x), metadata=lambda y: {"format": "pt"}), "rank and alpha.*lora_adapter_metadata"),
    ("lora", "alpha"): (lambda x: rewrite(lora_file(x), metadata=other_settings(lora_alpha=7)), "digest"),
    ("lora", "rank"): (lambda x: rewrite(lora_file(x), metadata=other_settings(r=2)), "A and B of rank 2"),
    ("lora", "dora"): (lambda x: rewrite(lora_file(x), metadata=other_settings(use_dora=True)), "use_dora=True"),
    ("lora", "pattern"): (lambda x: rewrite(lora_file(x), metadata=other_settings(rank_pattern={"to_q": 2})), "rank_pattern="),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), DAMAGED)
def test_a_damaged_companion_is_refused_before_anything_changes(kind, case, wan, copied):
    damage, message = DAMAGED[kind, case]
    damage(copied)
    pipe = wan.plain()
    enable(pipe, sla={**SLA, "combine": "proj"}, ras=RAS)
    before, on = values_of(pipe), installation_of(pipe)
    for use in (load_sla, lambda pipe, x: enable(pipe, sla=x)):
        with pytest.raises(ValueError, match=rf"sla\.safetensors: .*({message})"):
            use(pipe, copied)
    assert installation_of(pipe) is on
    assert values_of(pipe) == before


@pytest.mark.parametrize("kind", ["all"])
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("[]", "companion: .*digest, kind, name"),
        ("{}", "companion: .*digest, kind, name"),
        ("nonsense", "Expecting value"),
        ({"kind": "pickle"}, "kind='pickle'.*weights or lora"),
        ({"kind": ["lora"]}, "kind="),
        ({"name": "../elsewhere"}, r"name='\.\./elsewhere'"),
        ({"name": ".."}, r"name='\.\.'"),
        ({"name": ""}, "name=''"),
        ({"name": "/etc"}, "name='/etc'"),
        ({"name": 1}, "name=1"),
        ({"digest": "0"}, "digest"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_refused(wan, copied, entry, message):
    from .test_file import forge

    path = copied / "sla.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["format_version"] == "2"
    assert json.loads(header["companion"])["name"] == wan.companion
    if isinstance(entry, dict):
        entry = json.dumps(json.loads(header["companion"]) | entry)
    forge(path, {"companion": entry})
    with pytest.raises(ValueError, match=rf"sla\.safetensors: .*({message})"):
        read_checkpoint(path)


def test_weights_of_another_architecture_are_refused(results, tmp_path):
    """The digest fits, the transformer does not."""
    result = results("wan", "all")
    folder = shutil.copytree(result.folder, tmp_path / "x")
    rewrite(weights_file(folder), without_first)
    stored = read_checkpoint(result.folder / "sla.safetensors")
    companion = Companion.open(folder / "transformer", "weights")
    write_checkpoint(folder / "sla.safetensors", type(stored)(
        config=stored.config, base=stored.base, weights=stored.weights, companion=companion
    ))  # fmt: skip
    for on in (False, True):
        pipe = result.plain()
        if on:
            load_sla(pipe, result.folder)
        with pytest.raises(ValueError, match=r"transformer: missing: blocks\.0"):
            load_sla(pipe, folder)
        if on:
            result.check_sparse(pipe)
        result.check_dense(pipe)


def test_weights_in_several_files(results, tmp_path):
    result = results("wan", "all")
    folder = shutil.copytree(result.folder, tmp_path / "x")
    transformer = type(result.plain().transformer).from_pretrained(result.folder / "transformer")
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    pipe = result.plain()
    load_sla(pipe, folder)
    result.check_sparse(pipe)
    next((folder / "transformer").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"00002-of.*: .*file"):
        load_sla(pipe, folder)


# The hub, saving, merging


@each_kind
def test_a_hub_repository_brings_the_companion_of_the_same_commit(wan, tmp_path, monkeypatch):
    commit = "a" * 40
    snapshot_folder = tmp_path / "models--org--sla" / "snapshots" / commit
    snapshot_folder.mkdir(parents=True)
    asked = []

    def download(repo_id, filename, **arguments):
        asked.append((repo_id, filename, arguments))
        shutil.copy(wan.folder / filename, snapshot_folder)
        return str(snapshot_folder / filename)

    def download_all(repo_id, allow_patterns, **arguments):
        asked.append((repo_id, allow_patterns, arguments))
        source = wan.folder / wan.companion
        copy_one = shutil.copytree if source.is_dir() else shutil.copy
        copy_one(source, snapshot_folder / wan.companion)
        return str(snapshot_folder)

    monkeypatch.setattr("dit_accel.checkpoint.save_load.hf_hub_download", download)
    monkeypatch.setattr("dit_accel.checkpoint.save_load.snapshot_download", download_all)
    pipe = wan.plain()
    load_sla(pipe, "org/sla", revision="v1", token="secret")
    assert asked == [
        ("org/sla", "sla.safetensors", {"revision": "v1", "token": "secret"}),
        ("org/sla", [wan.companion, f"{wan.companion}/*"], {"revision": commit, "token": "secret"}),
    ]
    wan.check_sparse(pipe)
    wan.check_dense(pipe)

    def fail(*_, **__):
        raise EntryNotFoundError("404")

    monkeypatch.setattr("dit_accel.checkpoint.save_load.snapshot_download", fail)
    for ask in (
        lambda: load_sla(pipe, "org/sla"),
        lambda: own_file("org/sla", "sla.safetensors", "sla"),
    ):
        with pytest.raises(ValueError, match=rf"org/sla: {wan.companion}.*\(404\)"):
            ask()


@each_kind
def test_a_saved_pipeline_has_the_tuned_weights(wan, tmp_path):
    pipe = wan.plain()
    load_sla(pipe, wan.folder)
    expected = wan.run(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    stored = read_checkpoint(tmp_path / "saved/sla.safetensors")
    assert stored.companion is None
    with safe_open(tmp_path / "saved/sla.safetensors", framework="pt") as file:
        assert file.metadata()["format_version"] == "1"
    again = CLASSES["wan"].from_pretrained(tmp_path / "saved", **absent("wan"))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(stored.base.fingerprint, identity_of(again.transformer).fingerprint)
    assert not original_weights(again.transformer)
    assert torch.equal(wan.run(again), expected)
    vanilla = DiffusionPipeline.from_pretrained(tmp_path / "saved", **absent("wan"))
    assert torch.equal(
        vanilla.transformer.blocks[0].attn1.to_q.weight,
        pipe.transformer.blocks[0].attn1.to_q.weight,
    )
    wan.check_sparse(pipe)
    wan.check_dense(pipe)


@each_kind
def test_an_sla_checkpoint_without_the_tuned_weights_is_not_saved(wan, tmp_path):
    pipe = wan.plain()
    load_sla(pipe, wan.folder)
    with pytest.raises(ValueError, match=r"^pipe: .*fine-tuned weights.*save_pretrained"):
        save_sla(pipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_merging_takes_the_tuned_weights_whatever_their_distance(results, tmp_path):
    result = results("wan", "all")
    merge(result.base, result.folder / "transformer", tmp_path / "merged", sla_checkpoint=result.folder)  # fmt: skip
    stored = read_checkpoint(tmp_path / "merged/sla.safetensors")
    assert stored.companion is None
    pipe = CLASSES["wan"].from_pretrained(tmp_path / "merged", **absent("wan"))
    pipe.set_progress_bar_config(disable=True)
    result.check_sparse(pipe)


def test_files_without_a_companion_keep_their_format(tmp_path):
    path = save_sla(pipe := tuned(), tmp_path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format_version"] == "1"
    load_sla(plain := make("wan"), Path(path))
    assert method_of(plain, "sla").swap is None
    assert equal(weights(plain), weights(pipe))


def test_records_tell_tuned_weights_apart(results):
    from dit_accel.sampling.acceleration import acceleration_settings

    found = []
    for kind in ("all", "lora"):
        pipe = results("wan", kind).plain()
        load_sla(pipe, results("wan", kind).folder)
        found.append(acceleration_settings(pipe)["sla"]["transformer_sha256"])
    assert len(set(found)) == 2
    load_sla(pipe, results("wan", "all").folder.parent)
    assert "transformer_sha256" not in acceleration_settings(pipe)["sla"]
