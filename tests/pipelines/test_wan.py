"""The sparse Wan pipelines against their diffusers parents."""

import json

import numpy as np
import pytest
import torch

from dit_accel import SLAConfig, SparseWanPipeline, disable, enable, summary

from ..tiny_wan import random_wan


def snapshot(module):
    """Return the __dict__ of every module, with containers by content."""
    return {
        name: {key: dict(x) if isinstance(x, dict) else x for key, x in vars(m).items()}
        for name, m in module.named_modules()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys()
        and all(
            a[n][k] is b[n][k] or (isinstance(a[n][k], dict | int | bool) and a[n][k] == b[n][k])
            for k in a[n]
        )
        for n in a
    )


def test_topk_one_equals_dense_and_disable_restores_exactly(sparse_wan, call):
    pipe = sparse_wan(sla=None)
    dense = pipe(**call()).frames
    before = snapshot(pipe.transformer)
    pipe.enable(sla={"topk": 1.0, "block_q": 32, "block_k": 32, "crossover": "never"})
    sparse = pipe(**call()).frames
    pipe.summary(strict=True)
    np.testing.assert_allclose(sparse, dense, atol=1e-5)
    pipe.disable()
    assert same(snapshot(pipe.transformer), before)
    np.testing.assert_array_equal(pipe(**call()).frames, dense)


def test_dense_pipeline_equals_the_diffusers_parent(sparse_wan, wan_repository, call):
    from diffusers import WanPipeline

    parent = WanPipeline.from_pretrained(wan_repository)
    parent.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(sparse_wan(sla=None)(**call()).frames, parent(**call()).frames)


def test_sparse_differs_from_dense_and_counts_follow_the_schedule(sparse_wan, call):
    pipe = sparse_wan(sla={"topk": 0.2, "dense_steps": 1, "dense_layers": [0]})
    sparse = pipe(**call()).frames
    report = pipe.summary(strict=True)
    first, *others = report.layers
    assert (first.sparse_calls, first.dense_calls) == (0, {"dense layer": 8})
    assert all((x.sparse_calls, x.dense_calls) == (6, {"dense step": 2}) for x in others)
    assert report.density == pytest.approx(2 / 10)  # ceil(.2 * 10) of 10 blocks
    assert report.overall_density == pytest.approx((12 * 0.2 + 12) / 24)
    pipe.disable()
    assert (sparse - pipe(**call()).frames).abs().max() > 1e-4


def test_counts_start_anew_with_each_run(sparse_wan, call):
    pipe = sparse_wan(sla={})
    pipe(**call())
    first = pipe.summary().to_dict()
    pipe(**call())
    assert pipe.summary().to_dict() == first


@pytest.mark.parametrize(
    "sla",
    [
        {"combine": "none"},
        {"order": (2, 4, 4)},
        {"order": (4, 4, 2), "combine": "none"},
        {"topk_by_layer": {2: 1.0}},
    ],
    ids=str,
)
def test_every_setting_runs_and_is_deterministic(sparse_wan, call, sla):
    pipe = sparse_wan(sla=sla)
    np.testing.assert_array_equal(pipe(**call()).frames, pipe(**call()).frames)
    assert pipe.summary(strict=True).sparse_calls > 0


def test_a_tile_order_with_topk_one_equals_dense(sparse_wan, call):
    pipe = sparse_wan(sla={"topk": 1.0, "order": (2, 4, 4)})  # 5 latent frames: ragged tiles
    sparse = pipe(**call()).frames
    assert pipe.summary(strict=True).density == pytest.approx(1.0)
    pipe.disable()
    np.testing.assert_allclose(sparse, pipe(**call()).frames, atol=1e-5)


@pytest.mark.combines("sla", "batch > 1")
def test_batches_give_what_single_prompts_give(sparse_wan, call):
    pipe = sparse_wan(sla={})
    prompts = ["a red circle moving right", "a blue square moving up"]

    def seeds():
        return [torch.Generator().manual_seed(i) for i in range(2)]

    both = pipe(**call(prompt=prompts, generator=seeds())).frames
    for i, prompt in enumerate(prompts):
        one = pipe(**call(prompt=prompt, generator=seeds()[i])).frames[0]
        np.testing.assert_allclose(both[i], one, atol=2e-4)


def test_two_videos_per_prompt(sparse_wan, call):
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    frames = sparse_wan(sla={})(**call(num_videos_per_prompt=2, generator=generators)).frames
    assert frames.shape[0] == 2
    assert (frames[0] - frames[1]).abs().max() > 1e-3


def test_callbacks_see_each_step_and_may_interrupt(sparse_wan, call):
    pipe = sparse_wan(sla={"dense_steps": 0, "dense_layers": 0})
    steps = []

    def stop_after_two(pipe, step, timestep, kwargs):
        steps.append(step)
        pipe._interrupt = step == 1
        return kwargs

    pipe(**call(callback_on_step_end=stop_after_two))
    assert steps == [0, 1]
    assert pipe.summary().layers[0].sparse_calls == 4  # two steps, two guidance halves
    pipe(**call())
    assert pipe.summary().layers[0].sparse_calls == 8


@pytest.mark.combines("sla", "fused QKV")
def test_fused_projections_before_enable(sparse_wan, call):
    pipe = sparse_wan(sla=None)
    plain = pipe(**call()).frames
    pipe.transformer.fuse_qkv_projections()
    pipe.enable(sla={"topk": 1.0, "block_q": 32, "block_k": 32, "crossover": "never"})
    np.testing.assert_allclose(pipe(**call()).frames, plain, atol=1e-5)
    assert pipe.summary(strict=True).sparse_calls > 0


@pytest.mark.combines("sla", "LoRA")
def test_lora_loaded_and_fused(sparse_wan, call, tmp_path):
    from peft import LoraConfig

    pipe = sparse_wan(sla={"topk": 1.0})
    base = pipe(**call()).frames
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="demo")
    loaded = pipe(**call()).frames
    assert (loaded - base).abs().max() > 1e-3
    pipe.disable()
    np.testing.assert_allclose(pipe(**call()).frames, loaded, atol=1e-5)
    pipe.fuse_lora()
    pipe.enable(sla={"topk": 1.0, "block_q": 32, "block_k": 32, "crossover": "never"})
    np.testing.assert_allclose(pipe(**call()).frames, loaded, atol=1e-4)


@pytest.mark.parametrize("enable_first", [True, False], ids=["enable-offload", "offload-enable"])
@pytest.mark.combines("sla", "model offload")
def test_offload_hooks_in_either_order(sparse_wan, call, enable_first):
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    pipe = sparse_wan(sla=None)
    settings = {"topk": 1.0, "block_q": 32, "block_k": 32, "crossover": "never"}
    dense = pipe(**call()).frames
    if enable_first:
        pipe.enable(sla=settings)
    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    if not enable_first:
        pipe.enable(sla=settings)
    for _ in range(2):
        np.testing.assert_allclose(pipe(**call()).frames, dense, atol=1e-5)
        assert pipe.summary(strict=True).sparse_calls > 0
    remove_hook_from_module(pipe.transformer)
    np.testing.assert_allclose(pipe(**call()).frames, dense, atol=1e-5)
    assert pipe.summary(strict=True).sparse_calls > 0


def test_set_attention_backend_is_honoured_by_dense_calls_and_kept_after_disable(sparse_wan, call):
    from diffusers.models.attention_dispatch import attention_backend

    pipe = sparse_wan(sla={})
    with attention_backend("native"):  # puts back what is set for the whole process, too
        pipe.transformer.set_attention_backend("_native_math")
        pipe(**call())
    pipe.disable()
    backends = {str(p._attention_backend.value) for p in pipe.transformer.attn_processors.values()}
    assert backends == {"_native_math"}


def test_plain_diffusers_loads_what_was_saved(sparse_wan, call, tmp_path):
    from diffusers import DiffusionPipeline, WanPipeline

    pipe = sparse_wan(sla=None)
    dense = pipe(**call()).frames
    pipe.enable(sla="balanced")
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is WanPipeline
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(again(**call()).frames, dense, atol=1e-4)
    assert type(SparseWanPipeline.from_pretrained(tmp_path / "saved")) is SparseWanPipeline


def test_from_pipe_shares_components_and_acceleration(wan_repository, call):
    from diffusers import WanPipeline

    plain = WanPipeline.from_pretrained(wan_repository)
    plain.set_progress_bar_config(disable=True)
    sparse = SparseWanPipeline.from_pipe(
        plain, sla={"crossover": "never", "block_q": 32, "block_k": 32}
    )
    assert sparse.transformer is plain.transformer
    plain(**call())
    assert summary(plain).sparse_calls > 0
    again = SparseWanPipeline.from_pipe(sparse)
    assert again.summary().config == sparse.summary().config
    SparseWanPipeline.from_pipe(sparse, sla="fast")
    for pipe in (plain, sparse, again):
        assert summary(pipe).config["topk"] == 0.15


def test_separately_loaded_pipelines_do_not_touch_each_other(sparse_wan, call):
    sparse, dense = sparse_wan(sla={}), sparse_wan(sla=None)
    sparse(**call())
    assert sparse.summary().sparse_calls > 0
    assert not dense.summary().enabled


def test_a_replaced_scheduler_still_starts_runs(sparse_wan, call):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = sparse_wan(sla={"dense_steps": 1, "dense_layers": 0})
    pipe(**call())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for _ in range(2):
        pipe(**call())
        assert pipe.summary().layers[0].dense_calls == {"dense step": 2}


def test_processors_changed_after_enable_are_noticed(sparse_wan, call):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    pipe = sparse_wan(sla={})
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    with pytest.raises(RuntimeError, match=r"attn1.*changed"):
        pipe(**call())
    pipe.disable()
    pipe(**call())


def test_unknown_processors_are_refused_by_name(sparse_wan):
    pipe = sparse_wan(sla=None)

    class MyProcessor:
        pass

    pipe.transformer.blocks[1].attn1.set_processor(MyProcessor())
    before = snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1: .*MyProcessor"):
        pipe.enable(sla="balanced")
    assert same(snapshot(pipe.transformer), before)


def test_enabling_again_replaces_the_settings(sparse_wan):
    pipe = sparse_wan(sla="balanced")
    enable(pipe, sla="fast")
    assert pipe.summary().config["topk"] == 0.15
    pipe.enable(sla={"topk": 0.5})
    assert pipe.summary().config["topk"] == 0.5
    disable(pipe)
    disable(pipe)  # off already: nothing to do
    pipe.enable(sla="fast")
    assert pipe.summary().config["topk"] == 0.15


def test_crossover_auto_says_why_it_went_dense(sparse_wan, call):
    pipe = sparse_wan(sla="balanced")
    pipe.disable()
    dense = pipe(**call()).frames
    pipe.enable(sla="balanced")
    np.testing.assert_allclose(pipe(**call()).frames, dense, atol=1e-6)
    assert any("crossover" in reason for reason in pipe.summary().dense_calls)
    assert "crossover" in str(pipe.summary())
    with pytest.raises(RuntimeError, match=r"sla: .*crossover"):
        pipe.summary(strict=True)


def test_layers_that_the_model_lacks_are_refused(sparse_wan):
    with pytest.raises(ValueError, match=r"dense_layers=7: .*3 layers"):
        sparse_wan(sla={"dense_layers": [7]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": 60}, "height=60: .*48 or 64"),
        ({"width": 8}, "width=8: .*16"),
        ({"num_frames": 16}, "num_frames=16: .*13 or 17"),
        ({"num_frames": 0}, r"num_frames=0: .*4k\+1"),
    ],
    ids=str,
)
def test_sizes_are_refused_not_rounded(sparse_wan, call, changed, message):
    with pytest.raises(ValueError, match=message):
        sparse_wan(sla=None)(**call(**changed))


def write_index(folder, **content):
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(content))
    return folder


def test_bad_repositories_are_refused_before_loading(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    def must_not_load(*args, **kwargs):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", must_not_load)
    load = SparseWanPipeline.from_pretrained
    other = write_index(tmp_path / "sd3", _class_name="StableDiffusion3Pipeline")
    with pytest.raises(
        ValueError,
        match=r"StableDiffusion3Pipeline.* WanPipeline",
    ):
        load(other)
    two = write_index(
        tmp_path / "wan21",
        _class_name="WanPipeline",
        transformer=["diffusers", "WanTransformer3DModel"],
        transformer_2=[None, None],
    )
    with pytest.raises(ValueError, match=r"sla: .*'transformer_2'.* transformer$"):
        load(two, sla={"transformer_2": "balanced"})
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="absent"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"sla=.*'balanced'"):
        load(two, sla="balanecd")
    with pytest.raises(ValueError, match=r"ras='papre'.*'paper'"):
        load(two, ras="papre")


def test_enable_refuses_what_it_cannot_accelerate(sparse_wan):
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="SimpleNamespace"):
        enable(SimpleNamespace(), sla="balanced")
    with pytest.raises(ValueError, match=r"Linear.*WanTransformer3DModel"):
        enable(SimpleNamespace(transformer=torch.nn.Linear(2, 2)), sla="balanced")
    with pytest.raises(ValueError, match="ras=None, sla=None"):
        enable(sparse_wan(sla=None))
    with pytest.raises(ValueError, match=r"sla: .*'transformer_2'"):
        enable(sparse_wan(sla=None), sla={"transformer_2": SLAConfig()})


def test_image_to_video_matches_its_parent_and_runs_sparse(tmp_path, call):
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    from dit_accel import SparseWanImageToVideoPipeline

    WanImageToVideoPipeline(**random_wan(image_to_video=True)).save_pretrained(tmp_path / "i2v")
    pipe = SparseWanImageToVideoPipeline.from_pretrained(
        tmp_path / "i2v", sla={"topk": 1.0, "crossover": "never", "block_q": 32, "block_k": 32}
    )
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    sparse = pipe(image=image, **call()).frames
    assert pipe.summary(strict=True).sparse_calls > 0
    pipe.disable()
    dense = pipe(image=image, **call()).frames
    np.testing.assert_allclose(sparse, dense, atol=1e-5)
    with pytest.raises(ValueError, match="num_frames=16"):
        pipe(image=image, **call(num_frames=16))
    pipe.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"]
        == "WanImageToVideoPipeline"
    )
