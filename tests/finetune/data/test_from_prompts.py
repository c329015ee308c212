"""Training data that the dense model samples from prompts."""

import functools

import pytest
import torch

import dit_accel
from dit_accel.finetune.data.buckets import Bucket
from dit_accel.finetune.data.from_prompts import teacher_samples
from dit_accel.finetune.data.samples import load_batch
from dit_accel.finetune.stop import CutShort
from dit_accel.sampling.prompts import PromptRecord, number_prompts
from dit_accel.sampling.settings import Sampling

PROMPTS = number_prompts(["a red circle", "a blue square"])
SMALL = Sampling(
    height=32,
    width=32,
    num_frames=5,
    num_inference_steps=2,
    max_sequence_length=16,
    guidance_scale=2.0,
)


class Wan:
    """A real pipeline of tiny random weights."""

    frames_rule, size_multiple = (4, 1), 16

    def __init__(self, pipe):
        self.pipe = pipe

    def latent_shape(self, height, width, num_frames):
        return (4, (num_frames - 1) // 4 + 1, height // 8, width // 8)

    def encode_prompts(self, prompts):
        text, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=16
        )
        return {"encoder_hidden_states": text}

    def encode_pixels(self, pixels):
        raise AssertionError("prompts have no pixels")


@pytest.fixture
def model(wan):
    return Wan(wan)


@pytest.fixture
def calls(wan, monkeypatch):
    """Prompts of each pipeline call."""
    noted = []
    real = type(wan).__call__

    @functools.wraps(real)
    def call(self, *args, **kwargs):
        noted.append(kwargs["prompt"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(wan), "__call__", call)
    return noted


def test_a_signal_ends_it_between_two_calls_and_keeps_what_is_made(tmp_path, model, calls):
    with pytest.raises(CutShort):
        teacher_samples(
            model,
            PROMPTS,
            tmp_path / "t",
            sampling=SMALL,
            num_samples=3,
            stopping=lambda: len(calls) == 2,
        )
    assert len(calls) == 2
    store = teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL, num_samples=3)
    assert len(calls) == 3
    assert store.ids == ["00000/0", "00001/0", "00000/1"]


def test_latents_are_those_of_the_pipeline(tmp_path, model, wan):
    store = teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL, num_samples=3, seed=7)
    assert store.ids == ["00000/0", "00001/0", "00000/1"]
    assert store.buckets == ["5x32x32"] * 3
    arguments = {**SMALL.call_arguments(), "output_type": "latent"}
    for i, prompt in enumerate(["a red circle", "a blue square", "a red circle"]):
        generator = torch.Generator().manual_seed(7 + i)
        expected = wan(prompt=prompt, generator=generator, **arguments).frames[0]
        latents, conditions = store.sample(i)
        assert latents.shape == model.latent_shape(32, 32, 5)
        assert torch.equal(latents, expected.float())
        text = model.encode_prompts([prompt])["encoder_hidden_states"][0]
        assert torch.equal(conditions["encoder_hidden_states"], text)
    assert load_batch(store, [0, 2]).latents.shape == (2, 4, 2, 4, 4)


def test_a_second_call_samples_nothing_and_a_larger_number_the_rest(tmp_path, model, calls):
    teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL)
    assert len(calls) == 2
    teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL)
    assert len(calls) == 2
    store = teacher_samples(
        model, PROMPTS, tmp_path / "t", sampling=SMALL, num_samples=5, batch_size=2
    )
    assert calls[2:] == [["a red circle", "a blue square"], ["a red circle"]]
    assert len(store.ids) == 5


def test_a_run_that_failed_goes_on(tmp_path, model, monkeypatch, calls):
    from dit_accel.finetune.data import from_prompts

    real = from_prompts.run_latents

    def failing(pipe, batch):
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(pipe, batch)

    with monkeypatch.context() as patch:
        patch.setattr(from_prompts, "run_latents", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL, num_samples=4)
    resumed = teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL, num_samples=4)
    assert len(calls) == 4
    whole = teacher_samples(model, PROMPTS, tmp_path / "whole", sampling=SMALL, num_samples=4)
    for i in range(4):
        assert torch.equal(resumed.sample(i)[0], whole.sample(i)[0])


def test_prompts_bring_sizes_and_seeds(tmp_path, model):
    prompts = [
        PromptRecord(
            "own", "a red circle", seed=3, height=48, num_frames=9, negative_prompt="blurry"
        ),
        PromptRecord("plain", "a blue square"),
    ]
    store = teacher_samples(model, prompts, tmp_path / "t", sampling=SMALL, num_samples=3)
    assert list(zip(store.ids, store.buckets, strict=True)) == [
        ("own/0", "9x48x32"),
        ("plain/0", "5x32x32"),
        ("own/1", "9x48x32"),
    ]
    sources = [x["source"] for x in store.contents.samples.values()]
    assert [x["seed"] for x in sources] == [3, 1, 4]
    assert [x["negative_prompt"] for x in sources] == ["blurry", None, "blurry"]


def test_buckets_in_turn(tmp_path, model):
    sampling = Sampling(num_inference_steps=1, max_sequence_length=16, guidance_scale=1.0)
    buckets = [Bucket(5, 32, 32), Bucket(1, 48, 32)]
    store = teacher_samples(
        model, PROMPTS, tmp_path / "t", sampling=sampling, buckets=buckets, num_samples=4
    )
    assert list(zip(store.ids, store.buckets, strict=True)) == [
        ("00000/0", "5x32x32"),
        ("00001/0", "1x48x32"),
        ("00000/1", "1x48x32"),
        ("00001/1", "5x32x32"),
    ]


def test_images(tmp_path, sd3):
    class Images(Wan):
        frames_rule = (0, 1)

        def encode_prompts(self, prompts):
            text, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts), None, None, do_classifier_free_guidance=False
            )
            return {"encoder_hidden_states": text, "pooled_projections": pooled}

    sampling = Sampling(height=32, width=32, num_inference_steps=2, guidance_scale=2.0)
    store = teacher_samples(Images(sd3), PROMPTS, tmp_path / "t", sampling=sampling, batch_size=2)
    assert store.buckets == ["1x32x32"] * 2
    assert load_batch(store, [0, 1]).conditions.keys() == {
        "encoder_hidden_states",
        "pooled_projections",
    }


def test_other_settings_or_weights_need_another_folder(tmp_path, model, wan):
    teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL)
    with pytest.raises(ValueError, match=r"num_inference_steps was 2 and is 1"):
        teacher_samples(
            model, PROMPTS, tmp_path / "t", sampling=SMALL.overridden(num_inference_steps=1)
        )
    with pytest.raises(ValueError, match=r"00000/0 \(seed was 0 and is 5\)"):
        teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL, seed=5)
    weight = wan.transformer.blocks[0].ffn.net[2].weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            for parameter in wan.transformer.parameters():
                parameter.mul_(1.1)
        with pytest.raises(ValueError, match=r"models .*transformer has other weights"):
            teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL)
    finally:
        with torch.no_grad():
            for parameter in wan.transformer.parameters():
                parameter.div_(1.1)
    assert torch.allclose(weight, before)


def test_the_teacher_is_dense(tmp_path, model, wan):
    dit_accel.enable(wan, sla={"crossover": "never", "block_q": 16, "block_k": 16})
    try:
        with pytest.raises(RuntimeError, match=r"pipe: .*acceleration is enabled"):
            teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL)
    finally:
        dit_accel.disable(wan)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": None}, "height=None"),
        ({"num_frames": None}, "num_frames=None"),
        ({"height": 40}, r"prompt '00000': height 40 of 5x40x32 .*16"),
        ({"num_frames": 6}, r"prompt '00000': .*frames 6 "),
    ],
)
def test_bad_sizes_are_refused_before_sampling(tmp_path, model, calls, changes, message):
    with pytest.raises(ValueError, match=message):
        teacher_samples(model, PROMPTS, tmp_path / "t", sampling=SMALL.overridden(**changes))
    assert calls == []
    assert not (tmp_path / "t").exists()
