"""Conditions and settings for sampling loops over a bare transformer of each family."""

import torch

from ..random_pipelines import embeddings

RAS = {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": ()}
SLA = {"topk": 0.3, "block_q": 16, "block_k": 16, "crossover": "never", "dense_steps": 1}
BOTH = {"ras": RAS, "sla": SLA}


class Conditions:
    """Conditions of a bare transformer of a family, and initial latents.

    Args:
        family: name of the family.
        prompt: number of the prompt, or a list with the number of each row.
        rows: number of rows with this prompt.
    """

    def __init__(self, family, prompt=0, rows=1):
        self.family = family
        prompts = [prompt] * rows if isinstance(prompt, int) else list(prompt)
        text = embeddings(family, prompts)
        self.text = text["prompt_embeds"]
        self.arguments = {}
        if family in ("sd3", "sd35"):
            self.arguments["pooled_projections"] = text["pooled_prompt_embeds"]
        elif family == "lumina2":
            self.arguments["encoder_attention_mask"] = text["prompt_attention_mask"]
        elif family == "lumina":
            from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

            self.arguments |= {
                "encoder_mask": text["prompt_attention_mask"],
                "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 48, 48),
                "cross_attention_kwargs": {},
            }
        shape = {"wan": (4, 3, 14, 18), "lumina": (4, 22, 26), "lumina2": (4, 22, 26)}
        shape = shape.get(family, (16, 22, 26))
        generator = torch.Generator().manual_seed(min(prompts) + 40)
        self.latents = torch.randn(len(prompts), *shape, generator=generator)

    def velocity(self, transformer, latents, timestep, text=None, **changed):
        """Return the output of one call."""
        out = transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=self.text if text is None else text,
            return_dict=False,
            **{**self.arguments, **changed},
        )[0]
        return out[:, : latents.shape[1]]  # Lumina-Next predicts variances too


def batch_of(family, rows=2):
    """Return the arguments of one call on 8 x 8 latents of a video, or 16 x 16 of an image."""
    conditions = Conditions(family, range(rows))
    size = 8 if family == "wan" else 16
    return {
        "hidden_states": conditions.latents[..., :size, :size],
        "timestep": torch.full((rows,), 0.3 if family.startswith("lumina") else 300.0),
        "encoder_hidden_states": conditions.text,
        **conditions.arguments,
    }


def steps_of(report):
    """Return mode and active tokens of each step, and calls of each layer."""
    ras = [] if report.ras is None else report.ras.steps
    return (
        [(x.step, x.mode, x.active, x.dense_calls) for x in ras],
        [(x.sparse_calls, x.dense_calls) for x in report.layers],
    )
