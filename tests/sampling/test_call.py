"""Arguments of a pipeline call."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dit_accel.sampling.call import run_latents
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompts import number_prompts
from dit_accel.sampling.settings import Sampling


class Pipe:
    _execution_device = "cpu"

    def __init__(self, distilled):
        self.transformer = nn.Identity()
        self.transformer.config = SimpleNamespace(guidance_embeds=distilled)

    def __call__(self, prompt, generator, output_type, guidance_scale=None, true_cfg_scale=4.0):
        self.scales = guidance_scale, true_cfg_scale
        return SimpleNamespace(images=torch.zeros(1, 3, 4))


@pytest.mark.parametrize(("distilled", "scales"), [(True, (2.0, 4.0)), (False, (None, 2.0))])
def test_guidance_has_another_name_where_it_was_not_distilled_into_the_model(distilled, scales):
    """The model is distilled for guidance, as FLUX.1-dev, or not, as Qwen-Image."""
    pipe, sampling = Pipe(distilled), Sampling(guidance_scale=2.0)
    run_latents(pipe, plan_samples(number_prompts(["a"]), sampling, seed=0, count=1, layout="ids"))
    assert pipe.scales == scales
