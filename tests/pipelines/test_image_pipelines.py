"""The sparse image pipelines against their diffusers parents."""

import json

import diffusers
import pytest
import torch

import dit_accel

from ..checkpoint.test_save_load import absent
from ..random_pipelines import make, relative, run

CLASSES = {
    "sd3": "StableDiffusion3Pipeline",
    "lumina": "LuminaPipeline",
    "lumina2": "Lumina2Pipeline",
    "flux": "FluxPipeline",
    "qwenimage": "QwenImagePipeline",
}
every_family = pytest.mark.parametrize("family", CLASSES)
RAS = {"ratio": 0.5, "warmup": 2, "tail": 1}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folders = {}
    for family in CLASSES:
        folders[family] = tmp_path_factory.mktemp(family) / "repository"
        make(family).save_pretrained(folders[family])
    return folders


def sparse_class(family):
    return getattr(dit_accel, f"Sparse{CLASSES[family]}")


def load(family, repositories, **kwargs):
    pipe = sparse_class(family).from_pretrained(repositories[family], **absent(family), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@every_family
def test_loads_plain_repositories_and_equals_the_parent(family, repositories):
    pipe = load(family, repositories)
    assert isinstance(pipe, getattr(diffusers, CLASSES[family]))
    balanced = dit_accel.SLAConfig.load("balanced").to_dict()
    assert balanced["block_q"] == "auto"
    assert pipe.summary().config == balanced | {"block_q": 64}
    plain = run(make(family), family)
    # Weights from files lie at other addresses, and products then round otherwise.
    assert relative(run(pipe, family), plain) < 1e-6
    assert pipe.summary().sparse_calls == 0  # too short for it to pay
    assert not load(family, repositories, sla=None).summary().enabled
    accelerated = load(family, repositories, sla=None, ras=RAS)
    result = run(accelerated, family)
    assert (result - plain).abs().max() > 1e-6
    report = accelerated.summary(strict=True)
    assert report.ras.ras_steps == 5
    assert report.ras.config["ratio"] == 0.5
    accelerated.disable()
    assert relative(run(accelerated, family), plain) < 1e-6
    accelerated.enable(ras=RAS)
    torch.testing.assert_close(run(accelerated, family), result, rtol=0, atol=0)


@every_family
def test_what_is_saved_loads_in_plain_diffusers(family, repositories, tmp_path):
    pipe = load(family, repositories, ras="balanced")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == CLASSES[family]


@every_family
def test_from_pipe_shares_components_and_acceleration(family):
    plain = make(family)
    pipe = sparse_class(family).from_pipe(plain, sla=None, ras=RAS)
    assert pipe.transformer is plain.transformer
    run(plain, family)
    assert dit_accel.summary(plain, strict=True).ras.ras_steps == 5
    again = sparse_class(family).from_pipe(pipe)
    assert again.summary().ras.config == pipe.summary().ras.config
    sparse_class(family).from_pipe(pipe, ras="paper")
    assert pipe.summary().ras.config["selection"] == "std"
    assert not pipe.summary().config  # sparse attention stays off
    sparse_class(family).from_pipe(pipe, sla="fast")
    assert dit_accel.summary(plain).config["topk"] == 0.15
    assert pipe.summary().ras.config["selection"] == "std"
    sparse_class(family).from_pipe(pipe, sla=None)
    assert not pipe.summary().config
    assert pipe.summary().ras is not None
    sparse_class(family).from_pipe(pipe, sla="none", ras="none")
    assert not dit_accel.summary(plain).enabled


@every_family
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": 100}, "height=100: .*96 or 112"),
        ({"width": 8}, "width=8: .*16"),
    ],
    ids=str,
)
def test_sizes_are_refused(family, changed, message):
    pipe = sparse_class(family).from_pipe(make(family))
    with pytest.raises(ValueError, match=message):
        run(pipe, family, **changed)
    with pytest.raises(ValueError, match=r"num_frames=5: .*None"):
        pipe.check_sizes(num_frames=5)


@every_family
def test_other_repositories_and_settings_are_refused_before_loading(family, tmp_path, monkeypatch):
    def must_not_load(*args, **kwargs):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", must_not_load)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    cls = sparse_class(family)
    with pytest.raises(
        ValueError,
        match=f"PixArtSigmaPipeline.*{CLASSES[family]}",
    ):
        cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ras='papier'.*'paper'"):
        cls.from_pretrained(tmp_path, ras="papier")


@pytest.mark.parametrize(
    ("family", "old"),
    [("lumina", "LuminaText2ImgPipeline"), ("lumina2", "Lumina2Text2ImgPipeline")],
)
def test_repositories_under_their_older_names_are_accepted(family, old, repositories, tmp_path):
    import shutil

    folder = tmp_path / "old"
    shutil.copytree(repositories[family], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": old}))
    pipe = sparse_class(family).from_pretrained(folder, text_encoder=None, tokenizer=None)
    assert type(pipe) is sparse_class(family)


def test_image_to_video_with_and_without_an_image_encoder():
    """Keys of the image in cross-attention are computed once."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=20,
        added_kv_proj_dim=24,
    ).eval()
    pipe = make("wan")
    pipe.transformer = transformer
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(1, 512, 24, generator=generator) for _ in range(2)]
    image = torch.randn(1, 6, 20, generator=generator)
    start = torch.randn(1, 12, 3, 14, 18, generator=generator)

    @torch.no_grad()
    def denoise():
        pipe.scheduler.set_timesteps(10)
        latents = start.clone()
        for t in pipe.scheduler.timesteps:
            cond, uncond = (
                transformer(
                    hidden_states=latents,
                    timestep=t.expand(1),
                    encoder_hidden_states=text,
                    encoder_hidden_states_image=image,
                    return_dict=False,
                )[0]
                for text in texts
            )
            video = pipe.scheduler.step(
                uncond + 2 * (cond - uncond), t, latents[:, :4], return_dict=False
            )[0]
            latents = torch.cat([video, latents[:, 4:]], dim=1)
        return latents

    plain = denoise()
    calls = []
    transformer.blocks[1].attn2.add_k_proj.register_forward_hook(lambda m, a, o: calls.append(1))
    dit_accel.enable(pipe, ras={"ratio": 1.0, "warmup": 1})
    torch.testing.assert_close(denoise(), plain, rtol=1e-6, atol=1e-6)
    assert len(calls) == 2
    dit_accel.disable(pipe)
    dit_accel.enable(pipe, ras={**RAS, "selection": "std"})
    result = denoise()
    assert dit_accel.summary(pipe, strict=True).ras.ras_steps == 5
    assert 0 < float((result - plain).norm() / plain.norm()) < 0.2
