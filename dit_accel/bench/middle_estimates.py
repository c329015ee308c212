"""Analysis of the task "middle" of `dit-accel llm bench` (kernels/middle_estimates.py)."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_accel import llm
from dit_accel.kernels import SparsePlan, block_scores
from dit_accel.kernels.query_sums.torch_sums import attention_of
from dit_accel.llm.bench.retrieval import Question, middle
from dit_accel.llm.bench.wired import wired_model
from dit_accel.llm.policy import Policy
from dit_accel.llm.prefill import Prompt, pattern_of
from dit_accel.llm.prefill.xattention import antidiagonal_mass, blocks_of_mass

PATTERNS = ("hybrid", "xattention", "blocks", "flex_prefill", "vertical_slash")


@dataclass
class MiddleEstimates:
    """Ranks of the blocks with the looked-up keys, and number of looked-up keys that each pattern reads."""

    length: int = 4096
    """Tokens of a prompt."""
    prompts: int = 2
    """Number of prompts, with four look-ups each."""
    seed: int = 0

    @torch.inference_mode()
    def run(self) -> None:
        """Print a table of ranks, and a table of patterns."""
        torch.set_num_threads(1)
        model, rng = wired_model(), random.Random(self.seed)
        found: Counter[str] = Counter()
        densities: dict[str, float] = defaultdict(float)
        print(f"{'query':>6}{'key':>6}  rank of {'exact':>10}{'antidiagonal':>14}{'means':>7}")
        for _ in range(self.prompts):
            question = middle(self.length, rng)
            prompt = lookup_of(model, question)
            exact = exact_mass(prompt)
            means = block_scores(prompt.q, prompt.k, block_q=64, block_k=64, scale=prompt.scale)
            anti = antidiagonal_mass(prompt.q, prompt.k, block=64, stride=8, scale=prompt.scale)
            keys = []
            for row in question.positions:
                keys.append(int(next(attention_of(prompt.q, prompt.k, range(row, row + 1), prompt.scale))[1][0, 0, 0].argmax()))  # fmt: skip
                ranks = [rank(x, row // 64, keys[-1] // 64) for x in (exact, anti, means)]
                print(
                    f"{row:>6}{keys[-1]:>6}  {row // 64 + 1:>7}{ranks[0]:>10}{ranks[1]:>14}{ranks[2]:>7}"
                )
            plans = {"exact": SparsePlan.from_block_mask(blocks_of_mass(prompt, exact.log(), 0.9), **prompt.rules)}  # fmt: skip
            plans |= {name: pattern_of(name).plan(prompt) for name in PATTERNS}
            for name, plan in plans.items():
                mask = plan.to_dense_mask()[0, 0]
                found[name] += sum(
                    bool(mask[x]) for x in zip(question.positions, keys, strict=True)
                )
                densities[name] += plan.density()
        for name, count in found.items():
            share = densities[name] / self.prompts
            print(f"{name:<16}density {share:.2f}  keys read {count} of {4 * self.prompts}")


def lookup_of(model: Any, question: Question) -> Prompt:
    """Return the queries and keys of one head of the layer that looks up keys."""
    calls: list[Prompt] = []
    llm.enable(model, prefill={"pattern": "a_shape", "dense_layers": 0, "crossover": 1 << 20})
    attend = Policy.attend

    def record(
        self: Policy, layer: int, q: Tensor, k: Tensor, *more: Any, **options: Any
    ) -> Tensor:
        calls.append(Prompt(q[:, :1], k[:, :1], scale=options["scale"]))
        return attend(self, layer, q, k, *more, **options)

    Policy.attend = record  # type: ignore[method-assign]
    try:
        model(torch.tensor([question.ids]), use_cache=False, logits_to_keep=1)
    finally:
        Policy.attend = attend  # type: ignore[method-assign]
        llm.disable(model)
    return calls[1]


def exact_mass(prompt: Prompt) -> Tensor:
    """Return the mean attention of each query block to each key block, `[1, 1, T_q, T_k]`."""
    mass = torch.zeros(prompt.num_q_blocks, prompt.num_k_blocks)
    for rows, weights in attention_of(prompt.q, prompt.k, range(prompt.q_len), prompt.scale):
        by_block = pad(weights[0, 0], (0, prompt.num_k_blocks * 64 - weights.shape[-1]))
        by_block = by_block.unflatten(-1, (-1, 64)).sum(-1) / 64
        mass.index_add_(0, torch.tensor(rows) // 64, by_block)
    return mass[None, None]


def rank(scores: Tensor, row: int, column: int) -> int:
    """Return the rank of a block among the blocks up to the diagonal; 1 is the best."""
    seen = scores[0, 0, row, : row + 1]
    return int((seen > seen[column]).sum()) + 1
