"""What methods keep from step to step is dropped when weights change in mid-run."""

import pytest
import torch

import dit_accel

from ..random_pipelines import make, run

RAS = {"ratio": 0.5, "warmup": 2, "tail": 1, "resets": ()}
CHANGED_AFTER = 4


def lora(*targets):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


def load(transformer):
    transformer.load_state_dict({k: x * 1.01 for k, x in transformer.state_dict().items()})


def replace(transformer):
    module = transformer.proj_out
    module.weight = torch.nn.Parameter(module.weight * 1.01)


def set_data(transformer):
    transformer.proj_out.weight.data = transformer.proj_out.weight.data * 1.01


CHANGES = {
    "replaced": replace,
    "data set": set_data,
    "scaled": lambda x: x.set_adapters(["style"], [0.3]),
    "switched": lambda x: x.set_adapters(["other"]),
    "off": lambda x: x.disable_adapters(),
    "deleted": lambda x: x.delete_adapters("style"),
    "added": lambda x: x.add_adapter(lora("to_v"), adapter_name="third"),
    "fused": lambda x: x.fuse_lora(),
    "loaded": load,
    "written in place": lambda x: next(x.parameters()).mul_(1.01),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("family", ["wan", "sd3"])
@pytest.mark.parametrize("change", [None, *CHANGES])
def test_the_call_after_a_change_is_computed_anew(change, family):
    pipe = make(family)
    pipe.transformer.add_adapter(lora("to_q", "to_k"), adapter_name="other")
    pipe.transformer.add_adapter(lora("to_q", "to_k"), adapter_name="style")
    pipe.transformer.set_adapters(["style"])
    dit_accel.enable(pipe, ras=RAS)

    @torch.no_grad()
    def between(pipe, step, timestep, tensors):
        if change is not None and step == CHANGED_AFTER:
            CHANGES[change](pipe.transformer)
        return {}

    run(pipe, family, steps=9, callback_on_step_end=between)
    reasons = [x.dense_calls for x in dit_accel.summary(pipe).ras.steps]
    calls = 2 if family == "wan" else 1
    expected = [{}] * 9
    for step in (0, 1, 8):
        expected[step] = {"dense step": calls}
    if change is not None:
        expected[CHANGED_AFTER + 1] = {"first call of a context": calls}
    assert reasons == expected
