"""Wan2.2 with two transformers: settings, steps, summary and saved files."""

import json
import shutil

import pytest
import torch

import dit_accel
from dit_accel import SparseWanImageToVideoPipeline, SparseWanPipeline
from dit_accel.runtime.install import installation_of, installations_of, method_of

from ..random_families import wan22
from ..random_pipelines import make, randomise, relative, run, state_of

STEPS = 7  # twice as many are run, half of them by each transformer
SLA = {
    "topk": 0.3,
    "block_q": 16,
    "block_k": 16,
    "crossover": "never",
    "dense_steps": 2,
    "dense_layers": 0,
}
RAS = {"ratio": 0.5, "warmup": 2, "tail": 1, "resets": []}


@pytest.fixture
def pipe():
    return make("wan22")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan22")
    make("wan22").save_pretrained(folder)
    return folder


@pytest.fixture
def load(repository):
    def loaded(folder=repository, cls=SparseWanPipeline, **settings):
        parts = {"text_encoder": None, "tokenizer": None}
        pipe = cls.from_pretrained(folder, **parts, **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return loaded


def steps_of(pipe):
    first = int((pipe.scheduler.timesteps >= 800).sum())
    return [first, 2 * STEPS - first]


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_schedules_count_the_steps_of_each_transformer(solver):
    pipe = make("wan22", solver)
    dit_accel.enable(pipe, ras=RAS, sla=SLA)
    run(pipe, "wan22", steps=STEPS)
    report = dit_accel.summary(pipe, strict=True)
    steps = steps_of(pipe)
    assert min(steps) > 4
    for part, n in zip(report.parts.values(), steps, strict=True):
        modes = ["dense", "dense", *["partial"] * (n - 3), "dense"]
        assert [x.mode for x in part.ras.steps] == modes
        assert all(
            (x.dense_calls, x.sparse_calls) == ({"dense step": 4}, 2 * (n - 2)) for x in part.layers
        )


def test_the_summary_of_both_is_their_sum(pipe):
    dit_accel.enable(pipe, ras=RAS, sla={"transformer": SLA, "transformer_2": {**SLA, "topk": 0.6}})
    run(pipe, "wan22", steps=STEPS)
    report = dit_accel.summary(pipe, strict=True)
    high, low = report.parts.values()
    assert [x.step for x in report.ras.steps] == list(range(2 * STEPS))
    assert report.ras.cost == pytest.approx(high.ras.cost + low.ras.cost)
    n = steps_of(pipe)
    mean = (n[0] * high.ras.mean_cost + n[1] * low.ras.mean_cost) / sum(n)
    assert report.ras.mean_cost == pytest.approx(mean)
    assert report.ras.kv_bytes == max(high.ras.kv_bytes, low.ras.kv_bytes) > 0
    assert report.sparse_calls == high.sparse_calls + low.sparse_calls
    calls = [high.sparse_calls, low.sparse_calls]
    density = (calls[0] * high.density + calls[1] * low.density) / sum(calls)
    assert report.density == pytest.approx(density)
    assert low.density > high.density
    assert [x.name for x in report.layers] == [
        f"{name}.blocks.{i}.attn1" for name in report.parts for i in range(3)
    ]
    assert report.dense_calls == {"dense step": 24}
    both = high.cross_attention_dense_calls + low.cross_attention_dense_calls
    assert report.cross_attention_dense_calls == both == 3 * 2 * 2 * STEPS
    assert {k: x["topk"] for k, x in report.config.items()} == {
        "transformer": 0.3,
        "transformer_2": 0.6,
    }
    values = json.loads(json.dumps(report.to_dict()))
    assert values["ras"]["mean_cost"] == pytest.approx(mean)
    assert values["transformers"]["transformer_2"]["density"] == pytest.approx(low.density)
    text = str(report)
    assert text.startswith("transformer\n\n")
    assert "\n\ntransformer_2\n\n" in text
    assert f"both transformers: density {report.density:.3f}" in text


def test_one_setting_for_both_has_one_config(pipe):
    dit_accel.enable(pipe, ras=RAS, sla=SLA)
    report = dit_accel.summary(pipe)
    assert report.config["topk"] == 0.3
    assert report.ras.config["ratio"] == 0.5


@pytest.mark.parametrize("off", ["transformer", "transformer_2"])
def test_a_method_on_one_transformer_leaves_the_other_alone(pipe, off):
    on = "transformer_2" if off == "transformer" else "transformer"
    plain = make("wan22")
    alone = {"transformer": plain.transformer, "transformer_2": plain.transformer_2}[on]
    dit_accel.enable(alone, ras=RAS, sla=SLA)
    expected = run(plain, "wan22", steps=STEPS)
    run(pipe, "wan22", steps=2)  # diffusers itself adds attributes in the first call
    before = state_of(getattr(pipe, off))
    settings = {"sla": {on: SLA, off: "none"}, "ras": {on: RAS}}
    dit_accel.enable(pipe, **settings)
    torch.testing.assert_close(run(pipe, "wan22", steps=STEPS), expected, rtol=0, atol=0)
    after = state_of(getattr(pipe, off))
    assert before.keys() == after.keys()
    assert all(x.keys() == after[name].keys() for name, x in before.items())
    report = dit_accel.summary(pipe, strict=True)
    assert not report.parts[off].enabled
    n = dict(zip(("transformer", "transformer_2"), steps_of(pipe), strict=True))
    # What runs without the method counts as dense.
    assert report.ras.cost == pytest.approx(report.parts[on].ras.cost + n[off])
    assert len(report.ras.steps) == 2 * STEPS
    assert report.dense_calls == {"dense step": 12, "off": 3 * 2 * n[off]}
    assert report.overall_density > report.parts[on].overall_density
    assert report.config[off] is None
    # The second pass knows the scheduler; the transformer that was enabled alone counts its steps all the same.
    torch.testing.assert_close(run(plain, "wan22", steps=STEPS), expected, rtol=0, atol=0)


def test_a_run_that_ends_before_the_boundary_reports_no_older_steps(pipe):
    dit_accel.enable(pipe, ras=RAS, sla=SLA)
    run(pipe, "wan22", steps=STEPS)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 3
        return kwargs

    run(pipe, "wan22", steps=STEPS, callback_on_step_end=stop)
    report = dit_accel.summary(pipe)
    assert len(report.ras.steps) == 4
    assert report.parts["transformer_2"].sparse_calls == 0
    assert not report.parts["transformer_2"].ras.steps


def test_enabling_again_changes_what_is_named_only(pipe):
    dit_accel.enable(pipe, sla=SLA, ras=RAS)
    dit_accel.enable(pipe, sla={"transformer_2": "none"})
    kept = installation_of(pipe.transformer)
    assert list(kept.methods) == ["ras", "sla"]
    assert list(installation_of(pipe.transformer_2).methods) == ["ras"]
    dit_accel.enable(pipe, ras={"transformer_2": {**RAS, "ratio": 0.25}})
    assert installation_of(pipe.transformer) is kept
    assert method_of(pipe.transformer_2, "ras").config.ratio == 0.25
    dit_accel.disable(pipe)
    assert not installations_of(pipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sla": {"transformer": "fast", "topk": 0.2}},
            "sla: key 'topk'",
        ),
        ({"ras": {"transformer_2": "papre"}}, "ras='papre'.*'paper'"),
        ({"sla": {"transformer_2": {"dense_layers": [9]}}}, "dense_layers=9"),
        ({"sla": {"transformer": None}}, "ras=None, sla=None"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_and_change_nothing(pipe, settings, message):
    dit_accel.enable(pipe, sla={"topk": 0.5})
    with pytest.raises(ValueError, match=message):
        dit_accel.enable(pipe, **settings)
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert method_of(transformer, "sla").config.topk == 0.5


def test_the_first_transformer_goes_back_where_the_second_is_refused(pipe):
    dit_accel.enable(pipe, sla={"topk": 0.5})
    settings = {"transformer": {"topk": 0.2}, "transformer_2": {"topk": 0.2, "dense_layers": [9]}}
    with pytest.raises(ValueError, match="dense_layers=9"):
        dit_accel.enable(pipe, sla=settings)
    assert method_of(pipe.transformer, "sla").config.topk == 0.5


def test_a_method_of_ones_own_belongs_to_one_transformer(pipe):
    from dit_accel.runtime.method import Method

    class Rows:
        def to_dict(self):
            return {}

    class Own(Method):
        name = "own"

        def rows(self, host, run):
            return Rows()

    with pytest.raises(ValueError, match="two transformers"):
        dit_accel.enable(pipe, own=Own())
    dit_accel.enable(pipe, own={"transformer": Own(), "transformer_2": Own()})
    assert list(dit_accel.summary(pipe).methods) == ["own of transformer", "own of transformer_2"]


def test_a_pipeline_with_the_second_transformer_alone(load):
    whole = make("wan22", "unipc")
    whole.transformer = None
    whole.register_to_config(boundary_ratio=1.0)
    plain = run(whole, "wan22", steps=4)
    dit_accel.enable(whole, ras={**RAS, "ratio": 1.0}, sla={**SLA, "topk": 1.0})
    assert relative(run(whole, "wan22", steps=4), plain) < 1e-5
    report = dit_accel.summary(whole)
    assert len(report.ras.steps) == 8
    assert report.sparse_calls > 0
    assert dit_accel.estimate_memory(whole, height=112, width=144, num_frames=9).fits
    dit_accel.disable(whole)
    torch.testing.assert_close(run(whole, "wan22", steps=4), plain, rtol=0, atol=0)


def test_memory_is_that_of_the_transformer_that_keeps_more(pipe):
    size = {"height": 112, "width": 144, "num_frames": 9, "num_inference_steps": 2 * STEPS}
    ras = {**RAS, "kv_predictor": "hold"}
    one = dit_accel.estimate_memory(pipe, **size, ras={"transformer": ras})
    both = dit_accel.estimate_memory(
        pipe, **size, ras={"transformer": ras, "transformer_2": {**ras, "kv_predictor": "linear"}}
    )
    assert both.kv_bytes == 2 * one.kv_bytes
    dit_accel.enable(pipe, ras=ras)
    run(pipe, "wan22", steps=STEPS)
    assert dit_accel.summary(pipe).ras.kv_bytes == one.kv_bytes


def test_a_loop_by_hand_declared_for_the_pipeline(pipe):
    dit_accel.enable(pipe, sla=SLA)
    scheduler, text = pipe.scheduler, wan22.embeddings([0])["prompt_embeds"]
    scheduler.set_timesteps(10)
    latents = torch.randn(1, 4, 3, 14, 18, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), dit_accel.sampling_loop(pipe, scheduler):
        for i, t in enumerate(scheduler.timesteps):
            model = pipe.transformer if i < 5 else pipe.transformer_2
            velocity = model(latents, t.expand(1), text, return_dict=False)[0]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    for part in dit_accel.summary(pipe, strict=True).parts.values():
        assert {x.sparse_calls for x in part.layers} == {3}


def test_lora_on_both_transformers(pipe):
    from peft import LoraConfig

    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0})
    base = run(pipe, "wan22", steps=3)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    for transformer in (pipe.transformer, pipe.transformer_2):
        transformer.add_adapter(config, adapter_name="demo")
    tuned = run(pipe, "wan22", steps=3)
    assert relative(tuned, base) > 1e-3
    dit_accel.disable(pipe)
    assert relative(run(pipe, "wan22", steps=3), tuned) < 1e-5


# Repositories ---------------------------------------------------------------------------------------


def test_loading_accelerates_both(load):
    pipe = load()
    assert {x.methods["sla"].config.topk for x in installations_of(pipe).values()} == {0.25}
    assert not dit_accel.summary(load(sla=None)).enabled
    mixed = load(sla={"transformer": "fast", "transformer_2": None}, ras={"transformer_2": "fast"})
    assert list(installation_of(mixed.transformer).methods) == ["sla"]
    assert list(installation_of(mixed.transformer_2).methods) == ["ras"]
    # A transformer that is not named has the default.
    partly = load(sla={"transformer": "fast"})
    assert [
        method_of(partly.transformer, "sla").config.topk,
        method_of(partly.transformer_2, "sla").config.topk,
    ] == [0.15, 0.25]
    # Loaded without its second transformer it is a pipeline with one.
    one = load(transformer_2=None, sla="fast")
    assert list(dit_accel.summary(one).parts) == []
    with pytest.raises(ValueError, match="'transformer_2'"):
        load(transformer_2=None, sla={"transformer_2": "fast"})


def test_image_to_video(tmp_path, load):
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    source = make("wan22")
    torch.manual_seed(1)
    config = dict(source.transformer.config) | {"in_channels": 12}
    transformers = [WanTransformer3DModel.from_config(config) for _ in range(2)]
    WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=source.vae,
        scheduler=source.scheduler,
        transformer=transformers[0],
        transformer_2=transformers[1],
        boundary_ratio=0.8,
    ).save_pretrained(tmp_path)
    pipe = load(tmp_path, SparseWanImageToVideoPipeline, sla=None)
    picture = torch.rand(1, 3, 112, 144, generator=torch.Generator().manual_seed(5))
    plain = run(pipe, "wan22", steps=STEPS, image=picture)
    pipe.enable(sla={**SLA, "topk": 1.0}, ras={**RAS, "ratio": 1.0})
    assert relative(run(pipe, "wan22", steps=STEPS, image=picture), plain) < 1e-5
    report = pipe.summary()
    assert report.sparse_calls > 0
    for part, n in zip(report.parts.values(), steps_of(pipe), strict=True):
        assert [not x.dense_calls for x in part.ras.steps] == [False] * 2 + [True] * (n - 3) + [
            False
        ]
    again = SparseWanImageToVideoPipeline.from_pipe(pipe)
    assert again.summary().config == pipe.summary().config


def test_what_was_saved_is_loaded_for_each_transformer(tmp_path, load):
    pipe = load(
        sla={"transformer": {**SLA, "combine": "proj"}, "transformer_2": None},
        ras={"transformer": RAS, "transformer_2": "balanced"},
    )
    for module in method_of(pipe.transformer, "sla").attention.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        module.calibrated = True
    latents = run(pipe, "wan22", steps=STEPS)
    pipe.save_pretrained(tmp_path / "saved")
    found = sorted(str(x.relative_to(tmp_path / "saved")) for x in tmp_path.rglob("*a*.*"))
    assert "transformer/sla.safetensors" in found
    assert "transformer_2/sla.safetensors" not in found
    assert {"transformer/ras.json", "transformer_2/ras.json"} <= set(found)
    again = load(tmp_path / "saved")
    assert relative(run(again, "wan22", steps=STEPS), latents) < 1e-5
    assert dit_accel.summary(again).config == dit_accel.summary(pipe).config
    assert dit_accel.summary(again).ras.config == dit_accel.summary(pipe).ras.config
    again.disable()
    with pytest.raises(ValueError, match=r"save_directory=.*transformer/sla.safetensors"):
        again.save_pretrained(tmp_path / "saved")
    from diffusers import WanPipeline

    plain = WanPipeline.from_pretrained(tmp_path / "saved", text_encoder=None, tokenizer=None)
    assert plain.transformer_2 is not None


def test_sla_checkpoints_of_both(tmp_path, pipe):
    settings = {**SLA, "combine": "proj"}
    dit_accel.enable(
        pipe, sla={"transformer": settings, "transformer_2": {**settings, "topk": 0.6}}
    )
    randomise(pipe)
    latents = run(pipe, "wan22", steps=STEPS)
    assert dit_accel.save_sla(pipe, tmp_path / "both") == tmp_path / "both"
    other = make("wan22")
    dit_accel.load_sla(other, tmp_path / "both")
    torch.testing.assert_close(run(other, "wan22", steps=STEPS), latents, rtol=0, atol=0)
    for sla in (
        tmp_path / "both",
        {name: tmp_path / "both" / name for name in ("transformer", "transformer_2")},
    ):
        dit_accel.disable(other)
        dit_accel.enable(other, sla=sla)
        torch.testing.assert_close(run(other, "wan22", steps=STEPS), latents, rtol=0, atol=0)
    # One of the files for one transformer.
    dit_accel.load_sla(other.transformer_2, tmp_path / "both" / "transformer_2")
    with pytest.raises(ValueError, match=r"sla: .*two transformers"):
        dit_accel.load_sla(other, tmp_path / "both" / "transformer")
    # A file of an earlier save would be loaded with a later one.
    dit_accel.enable(other, sla={"transformer_2": "none"})
    with pytest.raises(ValueError, match=r"transformer_2/sla.safetensors"):
        dit_accel.save_sla(other, tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "transformer_2")
    dit_accel.save_sla(other, tmp_path / "both")
    third = make("wan22")
    dit_accel.load_sla(third, tmp_path / "both")
    assert list(installations_of(third)) == ["transformer"]


def test_sla_checkpoints_of_both_on_the_hub(tmp_path, pipe, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    dit_accel.enable(pipe, sla={"transformer_2": {**SLA, "topk": 0.6}})
    dit_accel.save_sla(pipe, tmp_path / "hub" / "tuned")

    def download(repo_id, filename, subfolder=None, **arguments):
        path = tmp_path / "hub" / (subfolder or "") / filename
        if repo_id != "org/wan22":
            raise LocalEntryNotFoundError("no connection")
        if not path.exists():
            raise EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr("dit_accel.checkpoint.save_load.hf_hub_download", download)
    other = make("wan22")
    dit_accel.load_sla(other, "org/wan22", subfolder="tuned")
    assert list(installations_of(other)) == ["transformer_2"]
    assert method_of(other.transformer_2, "sla").config.topk == 0.6
    with pytest.raises(ValueError, match=r"dir_or_id=.org/wan22.: no sla\.safetensors"):
        dit_accel.load_sla(other, "org/wan22")
    with pytest.raises(ValueError, match=r"dir_or_id=.org/offline.: .*\(no connection\)"):
        dit_accel.load_sla(other, "org/offline")


def test_settings_in_a_repository_on_the_hub(tmp_path, pipe, monkeypatch):
    from dit_accel.checkpoint.file import FILE_NAME, read_checkpoint
    from dit_accel.checkpoint.save_load import own_settings

    dit_accel.enable(pipe, sla={"transformer": {"topk": 0.4}})
    dit_accel.save_sla(pipe, tmp_path)

    def download(repo_id, filename, **arguments):
        from huggingface_hub.errors import EntryNotFoundError

        if not (tmp_path / filename).exists():
            raise EntryNotFoundError("404")
        return str(tmp_path / filename)

    monkeypatch.setattr("dit_accel.checkpoint.save_load.hf_hub_download", download)
    names = ["transformer", "transformer_2"]
    found = own_settings("org/wan22", FILE_NAME, "sla", names, read_checkpoint)
    assert found["transformer"].config.topk == 0.4
    assert found["transformer_2"] is None
    assert own_settings("org/wan22", "ras.json", "ras", names, read_checkpoint) is None
