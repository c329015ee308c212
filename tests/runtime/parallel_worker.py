"""Scenarios of context parallelism in two processes, run by torchrun. Each rank writes its results to a JSON file."""

import copy
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import dit_accel
from dit_accel.bench.collectives import Collectives
from dit_accel.runtime.install import installation_of, method_of
from tests.random_pipelines import (
    FAMILIES,
    MORE,
    compile_blocks,
    embeddings,
    liven,
    lumina,
    lumina2,
    make,
    more,
    randomise,
    relative,
    run,
    state_of,
    wan,
)

SLA = {"topk": 0.3, "block_q": 16, "block_k": 16, "order": (2, 2, 4), "crossover": "never"}
SLA |= {"dense_steps": 0, "dense_layers": 0}
RAS = {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": (6,), "kv_predictor": "linear"}
FORECAST = {"budget": 0.6, "warmup": 2, "tail": 1}
METHODS = {
    "sla": {"sla": SLA},
    "ras": {"ras": RAS},
    "both": {"sla": {**SLA, "combine": "proj", "linear_scope": "all"}, "ras": RAS},
    "alpha": {"sla": {**SLA, "combine": "alpha", "order": "raster"}},
    "learned": {"sla": {**SLA, "router": "learned"}},
    "top_p": {"sla": {**SLA, "topk": None, "top_p": 0.5}},
    "mixed": {"ras": {"budget": 0.65, "ratio": 0.2, "warmup": 2, "tail": 1}},
    "forecast": {"ras": FORECAST},
    "control": {"ras": {"control": 1.0, "warmup": 2, "tail": 1}},
}
EVERY = {
    "wan": tuple(METHODS),
    # Joint attention: text is among the tokens that are split.
    "sd3": ("both", "alpha", "learned", "top_p", "mixed", "forecast"),
    "lumina2": ("both", "forecast"),
    "wan22": ("both", "forecast"),
}
"""Methods that are tested in a family. The default is "both"."""
DEGREE = 2


def build(family):
    """Return a pipeline whose heads can be split between two processes."""
    if family != "lumina":
        return make(family)
    pipe = lumina(heads=4, kv_heads=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def accelerated(family, methods):
    pipe = build(family)
    dit_accel.enable(pipe, **METHODS[methods])
    if methods in ("both", "learned"):
        randomise(pipe)
    return pipe


def parallel(pipe, **options):
    config = ContextParallelConfig(ulysses_degree=DEGREE, **options)
    dit_accel.enable_parallelism(pipe, config=config)
    return pipe


def equal_to_one_process():
    found = {}
    for family in (*FAMILIES, *MORE):
        for methods in EVERY.get(family, ("both",)):
            expected = run(accelerated(family, methods), family, (0, 1), steps=6)
            pipe = parallel(accelerated(family, methods))
            with Collectives(DEGREE) as seen:
                latents = run(pipe, family, (0, 1), steps=6)
            report = dit_accel.summary(pipe, strict=True)
            found[f"{family}/{methods}"] = {
                "error": relative(latents, expected),
                "exchanges": sum(n for name, n in seen.calls.items() if "all_to_all" in name),
                "sum": float(latents.double().sum()),
                "cost": None if report.ras is None else report.ras.cost,
            }
    return found


def training_step():
    """Compare the gradients of sparse attention and of the model with those of one process."""
    found = {}
    for family in ("wan", "sd3", "lumina2"):
        for methods in ("both", "alpha", "learned"):
            gradients = []
            for processes in (1, DEGREE):
                pipe = build(family)
                dit_accel.enable(pipe, sla=METHODS[methods]["sla"])
                randomise(pipe)
                arguments = arguments_of_a_call(pipe, family)
                if processes > 1:
                    parallel(pipe)
                output = pipe.transformer(**arguments)[0]
                (
                    output * torch.linspace(-1, 1, output[0].numel()).view(output[0].shape)
                ).sum().backward()
                gradients.append(
                    {
                        k: x.grad
                        for k, x in pipe.transformer.named_parameters()
                        if x.grad is not None
                    }
                )
            one, shared = gradients
            assert one.keys() == shared.keys()
            ours = {k for k in one if ".sla." in k}
            assert ours
            for k in [x for x in shared if x not in ours]:
                dist.all_reduce(shared[k])
            scale = max(float(x.norm()) for x in one.values())
            found[f"{family}/{methods}"] = {
                "ours": max(relative(shared[k], one[k]) for k in ours),
                "model": max(float((shared[k] - one[k]).norm()) for k in one) / scale,
            }
    return found


def arguments_of_a_call(pipe, family):
    kept = {}

    def keep(module, args, kwargs):
        kept.update({k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()})
        kept.update(zip(("hidden_states", "timestep"), args, strict=False))

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    run(pipe, family, steps=1)
    handle.remove()
    return kept


def three_heads_of_keys(family):
    """Return a pipeline whose heads are split unevenly between two processes. In Lumina 2, two query heads share a key head."""
    if family == "wan":
        pipe = wan(heads=3)
    else:
        pipe = lumina2()
        heads = {"num_attention_heads": 6, "num_kv_heads": 3, "hidden_size": 72}
        config = {**pipe.transformer.config, **heads}
        pipe.transformer = liven(type(pipe.transformer).from_config(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def uneven_heads():
    found = {}
    for family, methods in (
        ("wan", "both"),
        ("lumina2", "both"),
        ("lumina2", "alpha"),
        ("lumina2", "learned"),
    ):
        plain = three_heads_of_keys(family)
        latents = []
        for processes in (1, DEGREE):
            pipe = copy.deepcopy(plain)
            dit_accel.enable(pipe, **METHODS[methods])
            if methods != "alpha":  # which measures its weights in the first call
                randomise(pipe)
            if processes > 1:
                parallel(pipe, ulysses_anything=True)
            latents.append(run(pipe, family, steps=6))
        found[f"{family}/{methods}"] = relative(latents[1], latents[0])
    return found


def short_text():
    """Run a call with one text token, so that the second process has none."""
    errors = []
    for family in ("sd3", "flux", "qwenimage", "cogvideox"):
        texts = more(family).embeddings if family in MORE else partial(embeddings, family)
        one = {
            f"{sign}{name}": x[:, :1]
            for sign, prompt in (("", 0), ("negative_", -3))
            for name, x in texts([prompt]).items()
            if name in ("prompt_embeds", "prompt_embeds_mask", "prompt_attention_mask")
        }
        expected, latents = (
            run(pipe, family, steps=6, **one)
            for pipe in (accelerated(family, "both"), parallel(accelerated(family, "both")))
        )
        errors.append(relative(latents, expected))
    pipe = parallel(accelerated("hunyuan_video", "sla"))
    texts = more("hunyuan_video").embeddings([0])
    one = {name: x[:, :1] for name, x in texts.items() if "pooled" not in name}
    return max(errors), message_of(lambda: run(pipe, "hunyuan_video", steps=2, **one))


def other_settings():
    """Enable methods while context parallelism is on."""
    found = {}
    for family in ("wan", "sd3"):
        pipe = build(family)
        dit_accel.enable(pipe, sla=SLA, ras=RAS)
        expected = run(pipe, family, steps=6)
        pipe = build(family)
        dit_accel.enable(pipe, ras=RAS)
        parallel(pipe)
        dit_accel.enable(pipe, sla=SLA)
        refused = message_of(
            lambda pipe=pipe: dit_accel.enable(pipe, ras={**RAS, "kv_cache": "fp8"})
        )
        with Collectives(DEGREE) as seen:
            latents = run(pipe, family, steps=6)
        found[family] = {
            "refused": refused,
            "error": relative(latents, expected),
            "exchanges": seen.calls["all_to_all_single"],
        }
    return found


def adapters():
    """Load a LoRA on a module whose output diffusers gathers, before and after parallelism is switched on."""
    from peft import LoraConfig

    targets = ["to_q", "proj_out"]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    found = {}
    size = {"height": 128, "width": 128, "steps": 4}
    for when in ("before", "after", "gone"):
        latents = []
        for processes in (1, DEGREE):
            pipe = build("wan")
            if when != "after":
                torch.manual_seed(5)
                pipe.transformer.add_adapter(config)
            dit_accel.enable(pipe, **METHODS["ras"])
            if processes > 1:
                parallel(pipe)
            if when == "after":
                torch.manual_seed(5)
                pipe.transformer.add_adapter(config)
            latents.append(run(pipe, "wan", **size))
            if when == "gone":
                pipe.transformer.unload_lora()
            dit_accel.disable(pipe)
            latents.append(run(pipe, "wan", **size))
        accelerated, plain, *shared = latents
        found[when] = max(relative(shared[0], accelerated), relative(shared[1], plain))
    return found


def before_and_after():
    """Call `enable_parallelism` of diffusers before and after `enable`, and then `disable`."""
    found = {}
    size = {"height": 128, "width": 128}  # tokens that diffusers, too, can share
    plain = run(make("wan"), "wan", steps=6, **size)
    pipe = make("wan")
    dit_accel.enable(pipe, ras=RAS, sla=SLA)
    expected = run(pipe, "wan", steps=6, **size)
    for order in ("before", "after", "between runs"):
        pipe = make("wan")
        if order != "before":
            dit_accel.enable(pipe, ras=RAS, sla=SLA)
        if order == "between runs":
            run(pipe, "wan", steps=6, **size)
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        if order == "before":
            before = state_of(pipe.transformer)
            dit_accel.enable(pipe, ras=RAS, sla=SLA)
        errors = [relative(run(pipe, "wan", steps=6, **size), expected) for _ in range(2)]
        dit_accel.disable(pipe)
        errors.append(relative(run(pipe, "wan", steps=6, **size), plain))
        found[order] = max(errors)
        if order == "before":
            after = state_of(pipe.transformer)
            found["same attributes"] = {k: set(x) for k, x in before.items()} == {
                k: set(x) for k, x in after.items()
            }
    pipe = make("sd3")
    plain = run(pipe, "sd3", steps=6)
    dit_accel.enable(pipe, ras=FORECAST)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    run(pipe, "sd3", steps=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dit_accel.disable(pipe)
    other = parallel(accelerated("sd3", "both"))
    run(other, "sd3", steps=6)
    other.transformer._parallel_config = None  # diffusers has no function for it
    with Collectives(DEGREE) as seen:
        latents = run(other, "sd3", steps=6)
    expected = run(accelerated("sd3", "both"), "sd3", steps=6)
    found["switched off"] = relative(latents, expected), sum(seen.calls.values())
    found["sd3 afterwards"] = relative(run(pipe, "sd3", steps=6), plain)
    found["sd3 warning"] = [str(x.message) for x in said]
    return found


def message_of(work):
    try:
        work()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals():
    rank = dist.get_rank()
    found = {
        f"plain {family}": message_of(partial(parallel, make(family)))
        for family in ("sd3", "hunyuan_video")
    }

    def heads():
        dit_accel.enable(pipe := make("lumina"), sla=SLA)
        parallel(pipe)

    def ring():
        dit_accel.enable(pipe := make("wan"), sla=SLA)
        dit_accel.enable_parallelism(pipe, config=ContextParallelConfig(ring_degree=2))

    def ring_through_diffusers():
        pipe = make("wan")
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        dit_accel.enable(pipe, sla=SLA)

    def degree():
        dit_accel.enable(pipe := make("wan"), sla=SLA)
        dit_accel.enable_parallelism(pipe, config=ContextParallelConfig(ulysses_degree=4))

    def twice():
        parallel(parallel(accelerated("wan", "sla")))

    def in_mid_run():
        pipe = accelerated("wan", "both")

        def switch(pipe, step, timestep, kwargs):
            if step == 2:
                parallel(pipe)
            return kwargs

        try:
            run(pipe, "wan", callback_on_step_end=switch)
        finally:
            found["a run after that"] = float(run(pipe, "wan", steps=4).double().sum())

    def settings():
        pipe = build("wan")
        dit_accel.enable(pipe, sla={**SLA, "topk": 0.3 + 0.1 * rank})
        run(parallel(pipe), "wan", steps=4)

    def long_values():
        pipe = parallel(accelerated("wan", "sla"))
        group = installation_of(pipe).group
        same = {f"field {i}": "x" * 500 for i in range(60)}
        group.agree(same, torch.device("cpu"), None)
        group.agree({**same, "field 7": "x" * 500 + str(rank)}, torch.device("cpu"), None)

    def prompts():
        run(parallel(accelerated("wan", "both")), "wan", (rank,), steps=4)

    def steps():
        run(parallel(accelerated("wan", "ras")), "wan", steps=6 + rank)

    def sizes():
        run(parallel(accelerated("sd3", "both")), "sd3", height=176 + 16 * rank)

    def a_failure():
        pipe = parallel(accelerated("sd3", "sla"))
        if rank == 1:  # somebody set a processor in one process
            attn = pipe.transformer.transformer_blocks[0].attn
            attn.set_processor(attn.processor.stock)
        run(pipe, "sd3", steps=4)

    def mesh():
        across = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("ring", "ulysses"))
        dit_accel.enable(pipe := make("wan"), sla=SLA)
        config = ContextParallelConfig(ulysses_degree=2, mesh=across)
        dit_accel.enable_parallelism(pipe, config=config)

    def a_call(**changed):
        """Call the transformer outside of any loop."""
        arguments = arguments_of_a_call(make("sd3"), "sd3")
        with torch.no_grad():
            parallel(accelerated("sd3", "sla")).transformer(**arguments | changed)

    def a_refused_call():
        refused = {"ip_adapter_image_embeds": torch.zeros(1)} if rank else {}
        a_call(joint_attention_kwargs=refused)

    def timesteps():
        a_call(timestep=torch.full((2,), 500.0 + rank))

    def few_tokens():
        run(parallel(accelerated("sd3", "sla")), "sd3", height=16, width=16)

    for case in (
        *(heads, ring, ring_through_diffusers, degree, mesh, twice),
        *(in_mid_run, settings, long_values, prompts, steps, sizes, a_failure),
        *(a_refused_call, timesteps, few_tokens),
    ):
        found[case.__name__] = message_of(case)
    return found


def compiled():
    """Compare compiled blocks with plain ones, for token counts that the processes divide and do not divide."""
    found = {}
    for family in ("wan", "sd3"):
        expected = run(accelerated(family, "both"), family, steps=8)
        pipe = parallel(accelerated(family, "both"))
        # AOTAutograd takes as long again as tracing, and is tested with one family.
        graphs = compile_blocks(pipe, family, "aot_eager" if family == "wan" else "eager")
        error = relative(run(pipe, family, steps=8), expected)
        found[family] = {"error": error, "graphs": graphs.frame_count}
    return found


class Counting:
    """Counts of the collectives of every call of a transformer."""

    def __init__(self):
        self.steps = []

    def before(self, module, args):
        self.mode = Collectives(DEGREE)
        self.mode.__enter__()

    def after(self, module, args, output):
        self.mode.__exit__(None, None, None)
        self.steps.append((dict(self.mode.calls), dict(self.mode.nbytes)))


def traffic():
    """Collectives and bytes of each step, by family: dense and accelerated."""
    found = {}
    for family, methods in (("wan", "sla"), ("wan", "ras"), ("sd3", "sla")):
        pipe = accelerated(family, methods)
        parallel(pipe)
        counting = Counting()
        pipe.transformer.register_forward_pre_hook(counting.before)
        pipe.transformer.register_forward_hook(counting.after)
        run(pipe, family, steps=8, guidance=1.0)
        found[f"{family}/{methods}"] = {
            "steps": counting.steps,
            "active": [x.active for x in dit_accel.summary(pipe).ras.steps]
            if methods == "ras"
            else None,
            "layers": len(installation_of(pipe).layers),
            "own": method_of(pipe, methods) is not None,
        }
    return found


def main(folder, names):
    torch.set_num_threads(1)
    # diffusers asks for the number of accelerators and divides by it; a CPU has none.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")
    found = {name: globals()[name]() for name in names}
    Path(folder, f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
