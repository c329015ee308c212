"""`save_sla`, `load_sla`: what was saved runs again bit for bit, and nothing else is let in."""

import contextlib
import shutil

import diffusers
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from dit_accel import SparseWanPipeline, disable, enable, load_sla, save_sla, summary
from dit_accel.checkpoint.file import read_checkpoint
from dit_accel.runtime.install import installation_of, method_of

from ..pipelines.test_wan import same, snapshot
from ..random_pipelines import FAMILIES, make, run

SLA = {
    "topk": 0.3,
    "block_q": 16,
    "block_k": 16,
    "dense_steps": 0,
    "dense_layers": 0,
    "crossover": "never",
}
RAS = {"ratio": 0.5, "warmup": 1, "tail": 1, "resets": []}
STEPS = 2


def tuned(family="wan", combine="proj", **settings):
    """A pipeline whose sparse attention has random weights."""
    pipe = make(family)
    enable(pipe, sla={**SLA, "combine": combine, **settings})
    generator = torch.Generator().manual_seed(7)
    for module in method_of(pipe, "sla").attention.values():
        weights = module.state_dict()
        if weights:
            module.load_state_dict(
                {
                    name: torch.randn(x.shape, generator=generator) * 0.3
                    for name, x in weights.items()
                }
            )
    return pipe


def weights(pipe):
    modules = method_of(pipe, "sla").attention
    return {name: x for m, y in modules.items() for name, x in y.state_dict(prefix=m).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def absent(family):
    """Arguments of from_pretrained: components that the tiny pipelines do without."""
    count = 3 if family.startswith("sd3") else 2 if family == "flux" else 1
    names = [f"{name}{'' if i == 1 else f'_{i}'}" for i in range(1, count + 1)
             for name in ("text_encoder", "tokenizer")]  # fmt: skip
    return dict.fromkeys(names)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family) / "base-model"
        make(family).save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a checkpoint for the tiny Wan, and return the output that it gives."""
    pipe, folder = tuned(), tmp_path_factory.mktemp("sla")
    save_sla(pipe, folder)
    return folder, run(pipe, "wan", steps=STEPS)


@pytest.mark.parametrize(
    ("family", "combine"),
    [
        *((family, "proj") for family in FAMILIES),
        *(("wan", combine) for combine in ("alpha", "shared_softmax", "none")),
        ("lumina2", "alpha"),
    ],
)
def test_saved_then_loaded_into_a_plain_pipeline_is_the_same(
    family, combine, repositories, tmp_path
):
    pipe = tuned(family, combine)
    expected = run(pipe, family, steps=STEPS)
    assert summary(pipe).sparse_calls
    assert save_sla(pipe, tmp_path / "new" / "folder") == tmp_path / "new/folder/sla.safetensors"
    plain = type(pipe).from_pretrained(repositories[family], **absent(family))
    plain.set_progress_bar_config(disable=True)
    load_sla(plain, tmp_path / "new" / "folder")
    assert torch.equal(run(plain, family, steps=STEPS), expected)
    assert method_of(plain, "sla").config == method_of(pipe, "sla").config
    # Saved once more, it is the same SLA checkpoint of the same model, which now has a name.
    save_sla(plain, tmp_path)
    found = read_checkpoint(tmp_path / "sla.safetensors")
    assert equal(found.weights, read_checkpoint(tmp_path / "new/folder/sla.safetensors").weights)
    assert found.base.model == "base-model"


def test_alpha_is_saved_once_it_was_measured(tmp_path):
    pipe = make("wan")
    enable(pipe, sla={**SLA, "combine": "alpha", "dense_layers": 1})
    with pytest.raises(ValueError, match=r"^pipe: blocks\.1\.attn1 .*combine='alpha'"):
        save_sla(pipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    run(pipe, "wan", steps=1)
    expected = run(pipe, "wan", steps=STEPS)
    plain = make("wan")
    load_sla(plain, save_sla(pipe, tmp_path))
    assert torch.equal(run(plain, "wan", steps=STEPS), expected)


def test_weights_of_any_dtype_are_saved_in_fp32(tmp_path):
    pipe = tuned()
    before = weights(pipe)
    pipe.to(torch.bfloat16)
    save_sla(pipe, tmp_path)
    load_sla(plain := make("wan"), tmp_path)
    assert equal(weights(plain), before)


@pytest.mark.parametrize(("capability", "expected"), [(None, 64), ((9, 0), 128)])
def test_the_query_block_of_the_device_is_saved_as_a_number(
    capability, expected, tmp_path, monkeypatch
):
    pipe = tuned(block_q="auto", block_k=64)
    monkeypatch.setattr(
        "dit_accel.sla.schedule.query_block", lambda config, device: config.query_block(capability)
    )
    assert read_checkpoint(save_sla(pipe, tmp_path)).config.block_q == expected
    assert summary(pipe).sla.config["block_q"] == expected


def test_saving_needs_sparse_attention_and_a_folder(tmp_path):
    pipe = make("wan")
    with pytest.raises(ValueError, match=r"^pipe: sparse attention is disabled"):
        save_sla(pipe, tmp_path / "new")
    enable(pipe, ras=RAS)
    with pytest.raises(ValueError, match=r"^pipe: sparse attention is disabled"):
        save_sla(pipe, tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory="):
        save_sla(tuned(), tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_hub_repository(checkpoint, monkeypatch):
    calls = []

    def download(repo_id, filename, **arguments):
        calls.append((repo_id, filename, arguments))
        if repo_id == "org/other":
            raise EntryNotFoundError("404: sla.safetensors is not in org/other\nmore")
        return str(checkpoint[0] / filename)

    monkeypatch.setattr("dit_accel.checkpoint.save_load.hf_hub_download", download)
    pipe = make("wan")
    with pytest.raises(ValueError, match=r"dir_or_id='org/other': .* \(404: sla.safetensors is not in org/other\)"):  # fmt: skip
        load_sla(pipe, "org/other")
    load_sla(pipe, "org/sla", revision="v1", token="secret")
    assert calls[-1] == ("org/sla", "sla.safetensors", {"revision": "v1", "token": "secret"})
    assert torch.equal(run(pipe, "wan", steps=STEPS), checkpoint[1])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"pipe": "org/model"}, ("org/model", "")),
        ({"pipe": "/home/me/secret/my-model/"}, ("my-model", "")),
        ({"pipe": r"C:\Users\me\my-model"}, ("my-model", "")),
        ({"transformer": "/home/me/my-model/transformer"}, ("my-model", "")),
        (
            {"transformer": f"/c/models--org--model--x/snapshots/{'a' * 40}/transformer", "pipe": "y"},
            ("org/model--x", "a" * 40),
        ),
        ({}, ("", "")),
    ],
)  # fmt: skip
def test_the_file_names_the_base_model_but_no_path(names, expected, tmp_path):
    pipe = tuned(combine="none")
    for owner, name in names.items():
        (pipe if owner == "pipe" else pipe.transformer).register_to_config(_name_or_path=name)
    save_sla(pipe, tmp_path)
    base = read_checkpoint(tmp_path / "sla.safetensors").base
    assert (base.model, base.revision) == expected
    assert b"home" not in (tmp_path / "sla.safetensors").read_bytes()


def as_lora(transformer):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer.add_adapter(config)


def offloaded(transformer):
    from accelerate import cpu_offload

    cpu_offload(transformer, execution_device=torch.device("cpu"))


VARIANTS = {
    "bf16": lambda x: x.to(torch.bfloat16),
    "fp16": lambda x: x.to(torch.float16),
    "fp8": lambda x: x.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "fused": lambda x: x.fuse_qkv_projections(),
    "lora": as_lora,
    "fused-lora": lambda x: (as_lora(x), x.fuse_lora(lora_scale=0.1)),
    "offloaded": offloaded,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_base_is_accepted_in_every_form(variant, checkpoint, tmp_path):
    pipe = make("wan")
    VARIANTS[variant](pipe.transformer)
    load_sla(pipe, checkpoint[0])
    expected = read_checkpoint(checkpoint[0] / "sla.safetensors")
    assert equal(read_checkpoint(save_sla(pipe, tmp_path)).weights, expected.weights)
    # What is saved from it fits the plain model.
    load_sla(make("wan"), tmp_path)


def test_weights_are_saved_from_where_offloading_keeps_them(tmp_path):
    pipe = tuned()
    before = {name: x.clone() for name, x in weights(pipe).items()}
    offloaded(pipe.transformer)
    assert next(iter(weights(pipe).values())).is_meta
    save_sla(pipe, tmp_path)
    load_sla(plain := make("wan"), tmp_path)
    assert equal(weights(plain), before)


@pytest.mark.parametrize("family", ["wan", "sd3", "lumina2"])
def test_region_adaptive_sampling_stays_on_and_weights_stay_when_it_comes(family, tmp_path):
    pipe = tuned(family)
    save_sla(pipe, tmp_path)
    first, second = make(family), make(family)
    enable(first, ras=RAS)
    load_sla(first, tmp_path)
    load_sla(second, tmp_path)
    enable(second, ras=RAS)
    for x in (first, second):
        assert method_of(x, "ras") is not None
        assert equal(weights(x), weights(pipe))
    assert torch.equal(run(first, family, steps=4), run(second, family, steps=4))
    # A failed attempt leaves the weights too.
    with pytest.raises(ValueError, match="kv_cache='fp8'"):
        enable(pipe, ras={**RAS, "kv_cache": "fp8"})
    assert equal(weights(pipe), weights(first))


def _other_base(tmp_path):
    generator = torch.Generator().manual_seed(9)
    pipe = tuned()
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.to_v.weight.normal_(generator=generator)
    save_sla(pipe, tmp_path)


def _fewer_layers(tmp_path):
    pipe = make("wan")
    del pipe.transformer.blocks[-1]
    enable(pipe, sla={**SLA, "combine": "proj"})
    save_sla(pipe, tmp_path)


def _other_heads(tmp_path):
    from diffusers import WanTransformer3DModel

    pipe = make("wan")
    config = {**pipe.transformer.config, "num_attention_heads": 1, "attention_head_dim": 24}
    pipe.transformer = WanTransformer3DModel(**config)
    enable(pipe, sla={**SLA, "combine": "proj"})
    save_sla(pipe, tmp_path)


def _truncated(tmp_path):
    path = save_sla(tuned(), tmp_path)
    path.write_bytes(path.read_bytes()[:-10])


def _pickle(tmp_path):
    torch.save({"blocks.0.attn1.proj_l.weight": torch.zeros(2)}, tmp_path / "sla.safetensors")


REFUSED = {
    "other base": (_other_base, r"^sla: .*another base model"),
    "fewer layers": (_fewer_layers, r"^sla: .*2 attention layers.* 3"),
    "other heads": (_other_heads, r"^sla: .*head_dim 24.*head_dim 12"),
    "other class": (
        lambda path: save_sla(tuned("sd3"), path),
        r"^sla: .*SD3Transformer2DModel.*WanTransformer3DModel",
    ),
    "truncated": (_truncated, r"sla\.safetensors: .*damaged"),
    "pickle": (_pickle, r"sla\.safetensors: .*zip"),
    "nothing": (lambda path: None, r"^sla='.*sla\.safetensors'"),
    "no folder": (lambda path: path.rmdir(), "^dir_or_id="),
}


@pytest.mark.parametrize(
    ("case", "ras"),
    [*((case, False) for case in REFUSED), ("other base", True), ("truncated", True)],
)
def test_wrong_files_are_refused_and_leave_the_pipeline_as_it_was(case, ras, tmp_path):
    write, message = REFUSED[case]
    write(tmp_path)
    pipe = make("wan")
    if ras:
        enable(pipe, ras=RAS)
    before, session = snapshot(pipe.transformer), installation_of(pipe)
    with pytest.raises(ValueError, match=message):
        load_sla(pipe, tmp_path)
    assert same(snapshot(pipe.transformer), before)
    assert installation_of(pipe) is session
    if case == "other base":
        disable(pipe)
        plain = run(make("wan"), "wan", steps=1)
        assert torch.equal(run(pipe, "wan", steps=1), plain)


@pytest.mark.parametrize("ras", [False, True], ids=["plain", "ras"])
@pytest.mark.parametrize("combine", ["none", "proj", "alpha"])
def test_other_sparse_attention_is_replaced(combine, ras, checkpoint):
    pipe = tuned(combine=combine, topk=0.7)
    if ras:
        enable(pipe, ras=RAS)
    load_sla(pipe, checkpoint[0])
    assert (method_of(pipe, "ras") is not None) == ras
    expected = read_checkpoint(checkpoint[0] / "sla.safetensors")
    assert method_of(pipe, "sla").config == expected.config
    assert weights(pipe).keys() == {name.replace("attn1.", "attn1") for name in expected.weights}
    if not ras:
        assert torch.equal(run(pipe, "wan", steps=STEPS), checkpoint[1])


def test_wrong_pipelines_are_refused_and_stay_as_they_were(checkpoint):
    class Other(diffusers.models.transformers.transformer_wan.WanAttnProcessor):
        pass

    pipe = make("wan")
    pipe.transformer.blocks[1].attn1.set_processor(Other())
    before = snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=r"Other.*WanAttnProcessor"):
        load_sla(pipe, checkpoint[0])
    assert same(snapshot(pipe.transformer), before)

    pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"pipe.transformer: Linear.*Wan"):
        load_sla(pipe, checkpoint[0])


def test_a_failure_while_loading_leaves_the_pipeline_as_it_was(checkpoint, monkeypatch):
    pipe = make("wan")
    enable(pipe, ras=RAS)
    expected = run(pipe, "wan", steps=4)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("dit_accel.sla.SparseLinearAttention.load_state_dict", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            load_sla(pipe, checkpoint[0])
    assert method_of(pipe, "sla") is None
    assert method_of(pipe, "ras") is not None
    assert not any("sla" in name.split(".") for name, _ in pipe.transformer.named_modules())
    assert torch.equal(run(pipe, "wan", steps=4), expected)


@pytest.fixture
def repository(repositories, checkpoint, tmp_path):
    """A diffusers repository that brings its SLA checkpoint along."""
    folder = shutil.copytree(repositories["wan"], tmp_path / "repository")
    shutil.copy(checkpoint[0] / "sla.safetensors", folder)
    return folder


def sparse(folder, **arguments):
    pipe = SparseWanPipeline.from_pretrained(folder, **absent("wan"), **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipelines_load_the_sla_checkpoint_of_their_repository(repository, checkpoint):
    pipe = sparse(repository)
    assert torch.equal(run(pipe, "wan", steps=STEPS), checkpoint[1])
    assert not sparse(repository, sla=None).summary().enabled
    assert method_of(sparse(repository, sla="fast"), "sla").config.topk == 0.15
    (repository / "sla.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sla\.safetensors: empty"):
        sparse(repository)


def test_a_folder_stands_where_a_preset_could(repositories, checkpoint):
    folder, expected = checkpoint
    pipes = [sparse(repositories["wan"], sla=folder), sparse(repositories["wan"], sla=None)]
    pipes[1].enable(sla=str(folder / "sla.safetensors"))
    pipes.append(SparseWanPipeline.from_pipe(make("wan"), sla=folder))
    pipes[-1].set_progress_bar_config(disable=True)
    for pipe in pipes:
        assert torch.equal(run(pipe, "wan", steps=STEPS), expected)
    shared = SparseWanPipeline.from_pipe(pipes[0])
    assert installation_of(shared) is installation_of(pipes[0])
    SparseWanPipeline.from_pipe(pipes[0], sla="fast")
    assert method_of(pipes[0], "sla").config.topk == 0.15
    with pytest.raises(ValueError, match=r"sla=.*: .*sla\.safetensors"):
        sparse(repositories["wan"], sla=repositories["wan"])


def test_repositories_on_the_hub_may_bring_an_sla_checkpoint(repositories, checkpoint, monkeypatch):
    from dit_accel.checkpoint.save_load import own_file

    def download(repo_id, filename, **arguments):
        if repo_id == "org/plain":
            raise EntryNotFoundError("404")
        return str(checkpoint[0] / filename)

    monkeypatch.setattr("dit_accel.checkpoint.save_load.hf_hub_download", download)
    assert (
        own_file("org/tuned", "sla.safetensors", "sla", revision="v1")
        == checkpoint[0] / "sla.safetensors"
    )
    assert own_file("org/plain", "sla.safetensors", "sla") is None
    assert own_file(repositories["wan"], "sla.safetensors", "sla") is None


@pytest.mark.parametrize("known", [True, False], ids=["known to be absent", "unknown"])
def test_without_the_hub_a_possible_sla_checkpoint_is_not_passed_over_in_silence(known, tmp_path):
    """Make a cache of huggingface_hub as it is after a download of the other files."""
    from dit_accel.checkpoint.save_load import own_file

    commit = "0" * 40
    cache = tmp_path / "models--org--plain"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    if known:
        (cache / ".no_exist" / commit).mkdir(parents=True)
        (cache / ".no_exist" / commit / "sla.safetensors").touch()
    warned = contextlib.nullcontext() if known else pytest.warns(UserWarning, match="org/plain: .*sla.safetensors.*sla=")  # fmt: skip
    with warned:
        assert (
            own_file(
                "org/plain", "sla.safetensors", "sla", cache_dir=tmp_path, local_files_only=True
            )
            is None
        )


@pytest.mark.parametrize("wrong", ["mysla", "/no/such/folder", "a/b/c", "./here"])
def test_what_cannot_be_a_repository_is_not_looked_for_on_the_hub(wrong, monkeypatch):
    monkeypatch.setattr("dit_accel.checkpoint.save_load.hf_hub_download", None)
    with pytest.raises(ValueError, match=f"^dir_or_id='{wrong}'"):
        load_sla(make("wan"), wrong)


def test_a_pickle_where_settings_could_stand(tmp_path):
    torch.save({}, tmp_path / "sla.pt")
    with pytest.raises(ValueError, match=r"sla.pt: .*(pickle|zip)"):
        enable(make("wan"), sla=tmp_path / "sla.pt")
    with pytest.raises(ValueError, match=r"sla='.*none.yaml'"):
        enable(make("wan"), sla=str(tmp_path / "none.yaml"))


def test_another_base_is_refused_where_offloading_keeps_its_weights(checkpoint):
    pipe = make("wan")
    torch.nn.init.normal_(pipe.transformer.blocks[0].attn1.to_v.weight)
    offloaded(pipe.transformer)
    with pytest.raises(ValueError, match="another base model"):
        load_sla(pipe, checkpoint[0])


def test_a_base_that_cannot_be_read_is_said(checkpoint, monkeypatch):
    monkeypatch.setattr("dit_accel.checkpoint.identity._values", lambda layer: torch.zeros(64))
    with pytest.warns(UserWarning, match="cannot be checked"):
        load_sla(make("wan"), checkpoint[0])


def test_from_pipe_replaces_weights_that_differ(checkpoint):
    pipe = make("wan")
    load_sla(pipe, checkpoint[0])
    expected = {name: x.clone() for name, x in weights(pipe).items()}
    with torch.no_grad():
        next(x for name, x in pipe.transformer.named_parameters() if ".sla." in name).add_(1)
    assert SparseWanPipeline.from_pipe(pipe).transformer is pipe.transformer
    assert not equal(weights(pipe), expected)  # without settings, what is on stays
    SparseWanPipeline.from_pipe(pipe, sla=checkpoint[0])
    assert equal(weights(pipe), expected)


def test_a_saved_pipeline_is_a_plain_repository_with_an_sla_checkpoint(
    repositories, checkpoint, tmp_path
):
    pipe = sparse(repositories["wan"], sla=checkpoint[0])
    pipe.save_pretrained(tmp_path / "saved")
    assert equal(weights(pipe), weights(sparse(tmp_path / "saved")))
    assert "blocks.0.attn1.sla.proj_l.weight" in pipe.transformer.state_dict()  # still there
    assert torch.equal(run(pipe, "wan", steps=STEPS), checkpoint[1])
    with safe_open(
        tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors", framework="pt"
    ) as file:
        assert set(file.keys()) == set(make("wan").transformer.state_dict())
    plain, info = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "saved/transformer", output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    vanilla = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", **absent("wan"))
    assert type(vanilla) is diffusers.WanPipeline
    assert torch.equal(plain.proj_out.weight, vanilla.transformer.proj_out.weight)
    assert torch.equal(run(sparse(tmp_path / "saved"), "wan", steps=STEPS), checkpoint[1])


def test_settings_without_weights_are_saved_too_but_for_the_default(repositories, tmp_path):
    sparse(repositories["wan"], sla="balanced").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "sla.safetensors").exists()
    sparse(repositories["wan"], sla={"topk": 0.1}).save_pretrained(tmp_path / "saved")
    assert sparse(tmp_path / "saved").summary().config["topk"] == 0.1
    sparse(repositories["wan"], sla="balanced").save_pretrained(tmp_path / "saved")
    assert sparse(tmp_path / "saved").summary().config["topk"] == 0.25


def test_a_folder_with_an_sla_checkpoint_is_not_saved_into_without_one(
    repositories, checkpoint, tmp_path
):
    pipe = sparse(repositories["wan"], sla=checkpoint[0])
    pipe.save_pretrained(tmp_path)
    before = (tmp_path / "sla.safetensors").read_bytes()
    pipe.disable()
    with pytest.raises(ValueError, match=r"save_directory=.*sla.safetensors"):  # fmt: skip
        pipe.save_pretrained(tmp_path)
    assert (tmp_path / "sla.safetensors").read_bytes() == before


def test_alpha_is_measured_before_it_is_saved(repositories, tmp_path):
    pipe = sparse(repositories["wan"], sla={**SLA, "combine": "alpha"})
    with pytest.raises(ValueError, match=r"^pipe: .*combine='alpha'"):
        pipe.save_pretrained(tmp_path / "alpha")
    assert not (tmp_path / "alpha").exists()
