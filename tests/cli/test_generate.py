"""Command `dit-accel generate`: files, sidecars, and invalid input."""

import json

import numpy as np
import pytest
from PIL import Image

from dit_accel.cli.options import SamplingOptions

from ..tiny_wan import random_wan
from .command import SMALL, run


def test_generate_writes_clip_and_sidecar_and_the_same_seed_gives_the_same_frames(
    wan_repository, tmp_path, small_blocks, capsys
):
    import imageio.v3 as iio

    out = tmp_path / "out"
    for _ in range(2):
        code = run(
            "generate", "a red circle", "--model", wan_repository, *SMALL,
            "--sla", small_blocks, "--seed", 3, "--output-dir", out, "--format", "json",
        )  # fmt: skip
        assert code == 0
    records = json.loads(capsys.readouterr().out.split("]\n[")[0].rstrip().removesuffix("]") + "]")
    assert sorted(p.name for p in out.iterdir()) == [
        "0000.json",
        "0000.mp4",
        "0001.json",
        "0001.mp4",
    ]
    sidecar = json.loads((out / "0000.json").read_text())
    assert sidecar["prompt"] == records[0]["prompt"] == "a red circle"
    assert sidecar["seed"] == 3
    assert sidecar["sampling"]["num_frames"] == 5
    assert sidecar["frames"] == [5, 32, 32, 3]
    assert set(sidecar["seconds"]) == {"text", "denoise", "decode", "total"}
    assert 0 < sidecar["acceleration"]["density"] < 1
    assert sidecar["versions"]["torch"]
    np.testing.assert_array_equal(*(iio.imread(out / f"000{i}.mp4") for i in range(2)))


def test_generate_reads_a_prompts_file(wan_repository, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle", "seed": 9}\n{"prompt": "a blue square"}\n')
    out = tmp_path / "out"
    assert run("generate", "--prompts-file", prompts, "--model", wan_repository, *SMALL, "--kind", "png",
               "--sla", "none", "--output-dir", out) == 0  # fmt: skip
    assert len(list(out.glob("0001-*.png"))) == 5
    seeds = [json.loads((out / f"000{i}.json").read_text())["seed"] for i in range(2)]
    assert seeds == [9, 1]
    assert "a blue square" in capsys.readouterr().out


def test_prompts_have_sizes_of_their_own(wan_repository, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.csv", tmp_path / "out"
    call = ["generate", "--prompts-file", prompts, "--model", wan_repository, *SMALL]
    call += ["--sla", "none", "--output-dir", out]
    prompts.write_text("prompt,height,num_frames\na red circle,,\na blue square,48,1\n")
    assert run(*call) == 0
    frames = [json.loads((out / f"000{i}.json").read_text())["frames"] for i in range(2)]
    assert frames == [[5, 32, 32, 3], [1, 48, 32, 3]]
    before = sorted(out.iterdir())
    prompts.write_text("prompt,height\na red circle,\na blue square,50\n")
    assert run(*call) == 2
    assert "height=50" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


def test_generate_with_region_adaptive_sampling_and_its_pictures(wan_repository, tmp_path, capsys):
    out = tmp_path / "out"
    settings = tmp_path / "ras.yaml"
    settings.write_text("ras:\n  ratio: 0.5\n  warmup: 1\n  tail: 1\n  resets: []\n")
    size = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "4"]
    size += ["--guidance-scale", "1", "--max-sequence-length", "16"]
    call = ["generate", "a red circle", "--model", wan_repository, *size, "--output-dir", out]
    assert run(*call, "--sla", "none", "--ras", settings, "--save-focus") == 0
    assert "cost of 3.0 of 4 steps" in capsys.readouterr().out
    names = ["0000-focus.mp4", "0000-focus.png", "0000.json", "0000.mp4"]
    assert sorted(p.name for p in out.iterdir()) == names
    record = json.loads((out / "0000.json").read_text())["acceleration"]["ras"]
    assert [step["mode"] for step in record["steps"]] == ["dense", "partial", "partial", "dense"]
    assert run(*call, "--save-focus") == 2
    assert "save_focus=True" in capsys.readouterr().err
    assert run(*call, "--ras", "papr") == 2
    assert "'paper'" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "side"), [("tiny-sd3", 64), ("tiny-lumina2", 128)])
def test_images_of_the_embedded_models(tmp_path, capsys, model, side):
    out = tmp_path / "out"
    call = ["generate", "a red circle on a teal background", "--model", model]
    call += ["--num-inference-steps", "8", "--ras", "partial", "--output-dir", out]
    assert run(*call, "--save-focus", "--format", "json") == 0
    assert sorted(p.name for p in out.iterdir()) == ["0000-focus.png", "0000.json", "0000.png"]
    record = json.loads((out / "0000.json").read_text())
    assert record["frames"] == [1, side, side, 3]
    reasons = list(record["acceleration"]["dense_calls"])
    assert any(reason.startswith("crossover='auto': 256 tokens") for reason in reasons)
    assert run(*call, "--num-frames", "5") == 2
    assert "num_frames=5" in capsys.readouterr().err
    if model == "tiny-lumina2":  # one image model is enough for the next command
        return
    compared = tmp_path / "compared"
    options = ["--num-inference-steps", "8", "--ras", "partial", "--output-dir", compared]
    assert run("compare", *call[1:4], *options) == 0
    names = ["contact_sheet.png", "dense.png", "results.json", "side_by_side.png", "sparse.png"]
    assert sorted(p.name for p in compared.iterdir()) == names


def test_a_clip_begins_with_a_picture(tmp_path, capsys):
    from diffusers import WanImageToVideoPipeline

    model, out = tmp_path / "model", tmp_path / "out"
    WanImageToVideoPipeline(**random_wan(image_to_video=True)).save_pretrained(model)
    size = SMALL[4:]
    outputs = []
    for i, colour in enumerate(["red", "blue"]):
        picture = tmp_path / f"{colour}.png"
        Image.new("RGB", (40, 20), colour).save(picture)
        call = [
            "generate",
            "a circle",
            "--model",
            model,
            *size,
            "--image",
            picture,
            "--kind",
            "png",
        ]
        assert run(*call, "--height", 32, "--width", 64, "--output-dir", out) == 0
        record = json.loads((out / f"000{i}.json").read_text())
        assert record["sampling"]["image"] == str(picture)
        assert record["frames"] == [5, 32, 64, 3]
        outputs.append(np.asarray(Image.open(out / f"000{i}-004.png")))
    assert (outputs[0] != outputs[1]).any()


def test_without_a_size_a_clip_has_the_shape_of_its_picture(refused, tmp_path, monkeypatch):
    from diffusers import WanImageToVideoPipeline

    from dit_accel.cli.generate import Generate

    WanImageToVideoPipeline(**random_wan(image_to_video=True)).save_pretrained(tmp_path / "model")
    Image.new("RGB", (100, 200)).save(tmp_path / "tall.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.jpg")
    assert "image=None" in refused("generate", "x", "--model", "model")
    for name in ("tall.png", "small.jpg"):
        options = Generate(model="model", sampling=SamplingOptions(image=name, num_frames=5))
        sizes = options.check()[1]
        assert sizes.height == {"tall.png": 2, "small.jpg": 1}[name] * sizes.width or (
            sizes.height / sizes.width == pytest.approx(2, rel=0.05)
        )
    own = Generate(
        model="model", sampling=SamplingOptions(image="tall.png", num_frames=5, height=32, width=48)
    )
    assert (own.check()[1].height, own.check()[1].width) == (32, 48)


def test_scheduler_and_lora_are_put_on_and_recorded(wan_repository, tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    lora, out = tmp_path / "style.safetensors", tmp_path / "out"
    where = "transformer.blocks.1.attn1.to_q"
    shapes = {f"{where}.lora_A.weight": (2, 32), f"{where}.lora_B.weight": (32, 2)}
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, lora)
    call = ["generate", "a red circle", "--model", wan_repository, *SMALL, "--kind", "png"]
    extras = [
        ["--scheduler", "FlowMatchEulerDiscreteScheduler"],
        ["--lora", f"{lora}:2", "--lora", lora],
        ["--scheduler", "FlowMatchEulerDiscreteScheduler", "--lora", lora, "--ras", "balanced"],
        [],
    ]
    for more in extras:
        assert run(*call, "--output-dir", out, *more) == 0
    records = [json.loads((out / f"000{i}.json").read_text()) for i in range(4)]
    assert records[0]["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert [x["scale"] for x in records[1]["lora"]] == [2.0, 1.0]
    assert set(records[2]) - set(records[3]) == {"scheduler", "lora"}
    pictures = [np.asarray(Image.open(out / f"000{i}-004.png")) for i in range(4)]
    for i in range(3):
        assert (pictures[i] != pictures[3]).any()


def test_region_adaptive_sampling_follows_the_scheduler_that_is_named(tmp_path, capsys):
    call = ["generate", "a red circle", "--model", "tiny-sd3", "--num-inference-steps", "9"]
    call += ["--height", "32", "--width", "32"]
    call += [
        "--scheduler",
        "UniPCMultistepScheduler",
        "--ras",
        "balanced",
        "--output-dir",
        tmp_path,
    ]
    assert run(*call) == 0
    steps = json.loads((tmp_path / "0000.json").read_text())["acceleration"]["ras"]["steps"]
    assert "forecast" in {x["mode"] for x in steps}


def test_blocks_are_compiled_once_the_pipeline_is_ready(wan_repository, tmp_path, monkeypatch):
    import torch

    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    call = ["generate", "x", "--model", wan_repository, *SMALL, "--output-dir", tmp_path]
    assert run(*call, "--compile") == 0
    assert len(compiled) == 3
    assert json.loads((tmp_path / "0000.json").read_text())["compile"] is True


@pytest.mark.parametrize(
    "command", [["compare", "x", "--ras", "forecast"], ["eval", "generate", "--limit", "1"]]
)
def test_other_commands_compile_too(wan_repository, tmp_path, monkeypatch, command):
    import torch

    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    call = [*command, "--model", wan_repository, *SMALL, "--output-dir", tmp_path, "--compile"]
    assert run(*call) == 0
    assert len(compiled) == 3


BAD = [
    ("--height", "60", "height=60"),
    ("--height", "0", "height=0"),
    ("--width", "-32", "width=-32"),
    ("--width", "99999999999999999999", "width=99999999999999999999"),
    ("--num-frames", "6", "num_frames=6"),
    ("--num-frames", "0", "num_frames=0"),
    ("--num-inference-steps", "0", "num_inference_steps=0"),
    ("--num-inference-steps", "-1", "num_inference_steps=-1"),
    ("--num-inference-steps", "1000000000", "num_inference_steps=1000000000"),
    ("--guidance-scale", "nan", "guidance_scale=nan"),
    ("--guidance-scale", "inf", "guidance_scale=inf"),
    ("--guidance-scale", "-inf", "guidance_scale=-inf"),
    ("--max-sequence-length", "0", "max_sequence_length=0"),
    ("--max-sequence-length", "1000000000", "max_sequence_length=1000000000"),
    ("--seed", "-1", "seed=-1"),
    ("--seed", str(2**63), f"seed={2**63}"),
    ("--seed", str(2**70), f"seed={2**70}"),
    ("--fps", "0", "fps=0.0"),
    ("--fps", "nan", "fps=nan"),
    ("--fps", "inf", "fps=inf"),
    ("--fps", "-16", "fps=-16.0"),
    ("--topk", "0", "topk=0.0"),
    ("--topk", "nan", "topk=nan"),
    ("--topk", "inf", "topk=inf"),
    ("--device", "cuda:99", "device='cuda:99'"),
    ("--device", "gpu", "device='gpu'"),
    ("--device", "", "device=''"),
    ("--model", "/no/such/folder", "model='/no/such/folder'"),
    ("--model", "", "model=''"),
    ("--sla", "fats", "sla='fats'"),
    ("--ras", "papr", "ras='papr'"),
    ("--output-dir", "/proc/none/out", "output_dir='/proc/none/out'"),
    ("--output-dir", "/dev/null", "output_dir='/dev/null'"),
    ("--scheduler", "UniPCMultistepSchedular", "scheduler='UniPCMultistepSchedular'"),
    ("--scheduler", "DDIMScheduler", "scheduler='DDIMScheduler'"),
    ("--scheduler", "DiffusionPipeline", "scheduler='DiffusionPipeline'"),
    ("--scheduler", "", "scheduler=''"),
    ("--lora", "none.safetensors", "lora='none.safetensors'"),
    ("--lora", "none.safetensors:0.5", "lora='none.safetensors:0.5'"),
    ("--lora", "style:nan", "lora='style:nan'"),
    ("--lora", "style:inf", "lora='style:inf'"),
    ("--lora", "nobody/nothing", "lora='nobody/nothing'"),
    ("--lora", "", "lora=''"),
    ("--image", "none.png", "image='none.png'"),
    ("--image", "", "image=''"),
    ("--prompts-file", "none.txt", "prompts_file='none.txt'"),
]


@pytest.mark.parametrize(("option", "value", "named"), BAD, ids=[f"{x[0]} {x[1]}" for x in BAD])
def test_a_bad_value_is_refused_before_the_model_is_loaded(
    refused, wan_repository, option, value, named
):
    prompt = [] if option == "--prompts-file" else ["a red circle"]
    call = ["generate", *prompt, "--model", wan_repository, *SMALL, "--output-dir", "out/deep"]
    assert named in refused(*call, option, value)


@pytest.mark.parametrize("prompt", ["", " ", "\t\n", "\ud800"])
def test_an_empty_prompt_is_refused(refused, wan_repository, prompt):
    assert f"prompt={prompt!r}" in refused("generate", prompt, "--model", wan_repository)


def test_exactly_one_kind_of_prompt_is_needed(refused, tmp_path):
    assert "prompts_file" in refused("generate")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    assert "'a blue square'" in refused(
        "generate", "a blue square", "--prompts-file", "prompts.txt"
    )


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("a red circle,50,5", "height=50"),
        ("a red circle,32,4", "num_frames=4"),
        ("a red circle,0,5", "height=0"),
        (",32,5", "prompt"),
    ],
)
def test_a_bad_size_in_a_prompts_file_is_refused(refused, wan_repository, tmp_path, row, named):
    (tmp_path / "prompts.csv").write_text(f"prompt,height,num_frames\na blue square,,\n{row}\n")
    call = ["generate", "--prompts-file", "prompts.csv", "--model", wan_repository, *SMALL]
    assert named in refused(*call)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sla:\n  topc: 0.5\n", "'topk'"),
        ("sla:\n  topk: 0.5\n  topk: 0.4\n", "'topk'"),
        ("sla: {topk: 2}", "topk=2"),
        ("sla: {topk: .nan}", "topk=nan"),
        ("ras: {}", "sla:"),
    ],
)
def test_bad_settings_in_a_file_are_refused(refused, tmp_path, text, named):
    (tmp_path / "bad.yaml").write_text(text)
    line = refused("generate", "x", "--sla", "bad.yaml")
    assert named in line
    assert "bad.yaml" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sla", "none", "--topk", ".5"], "sla='none'"),
        (["--sla", "none", "--crossover", "never"], "sla='none'"),
        (["--save-focus"], "save_focus=True"),
        (["--save-focus", "--ras", "none"], "save_focus=True"),
        (["--save-focus", "--ras", "balanced"], "save_focus=True"),
    ],
)
def test_options_that_exclude_each_other_are_refused(refused, arguments, named):
    assert named in refused("generate", "x", *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num-frames", "5"], "num_frames=5"),
        (["--max-sequence-length", "513"], "max_sequence_length=513"),
        (["--image", "picture.png"], "image='picture.png'"),
        (["--height", "35"], "height=35"),
    ],
)
def test_what_only_video_models_take_is_refused_of_an_image_model(
    refused, tmp_path, arguments, named
):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    assert named in refused("generate", "x", "--model", "tiny-sd3", *arguments)


def test_a_repository_of_another_pipeline_is_refused(refused, tmp_path):
    (tmp_path / "model").mkdir()
    for index in ('{"_class_name": "FluxPipeline"}', "{}", "["):
        (tmp_path / "model" / "model_index.json").write_text(index)
        assert "model='model'" in refused("generate", "x", "--model", "model")
