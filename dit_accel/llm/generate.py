"""`generate`: greedy generation from a prompt, with timing and attention statistics."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.config import KVConfig
from dit_accel.llm.control import PrefillSummary, disable, enable, summary
from dit_accel.llm.kvcache.cache import KVCache, nbytes_of
from dit_accel.llm.report import dense_reasons, prompt_density
from dit_accel.llm.settings import read_prefill


@dataclass(frozen=True)
class Generation:
    """A generated text, with timing and attention statistics."""

    text: str
    """The generated text, without the prompt."""
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    """Seconds from the start of the call to the first token."""
    tokens_per_second: float | None
    """Tokens per second after the first token; None if only one token was generated."""
    prefill: PrefillSummary | None
    """Calls of the attention layers; None for dense prefill."""
    cache_bytes: int | None = None
    """Bytes of the KV cache at the end; None if no cache was used."""
    read_share: float | None = None
    """Mean share of the cached tokens that a call read; None for transformers' own cache, which reads all."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {k: x for k, x in vars(self).items() if k != "prefill"}
        if self.prefill is None:
            return {**values, "density": 1.0, "dense_reasons": {}, "prefill": None}
        return {
            **values,
            "density": prompt_density(self.prefill),
            "dense_reasons": dense_reasons(self.prefill),
            "prefill": self.prefill.to_dict(),
        }


def encode(tokenizer: Any, prompt: str, *, chat: bool = False) -> Tensor:
    """Return the token ids of a prompt, `[1, L]`.

    Args:
        tokenizer: tokenizer of transformers.
        prompt: the text.
        chat: wrap the prompt as a user message in the chat template of the tokenizer.

    Raises:
        ValueError: `chat` is True and the tokenizer has no chat template.
    """
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids.long()
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat=True: must be False, because the tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.long()


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Tensor,
    *,
    prefill: Any = "balanced",
    kv: Any = None,
    max_new_tokens: int = 128,
    chat: bool = False,
) -> Generation:
    """Generate text greedily with sparse prefill, a KV cache method, or both.

    Afterwards the model is disabled (see `disable`).

    Args:
        model: causal language model of transformers.
        tokenizer: tokenizer of the model.
        prompt: text, or token ids `[1, L]`.
        prefill: see `enable`; None or "none": dense.
        kv: see `enable`; None or "none": transformers' own cache.
        max_new_tokens: maximum number of generated tokens.
        chat: see `encode`.

    Raises:
        ValueError: an argument is not valid, or the prompt is empty.
    """
    from transformers import GenerationConfig

    check_new_tokens(max_new_tokens)
    config = read_prefill(prefill)
    kv = KVConfig.load(kv)
    ids = encode(tokenizer, prompt, chat=chat) if isinstance(prompt, str) else prompt
    if ids.numel() == 0:
        raise ValueError(f"prompt={prompt!r}: must be a text of at least one token")
    ids = ids.to(model.device)
    own = model.generation_config
    # The generation config of the model may enable sampling, which would make runs with different settings incomparable.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=_pad(own, tokenizer),
    )
    clock = _Clock()
    disable(model)
    if config is not None or kv is not None:
        enable(model, prefill=config, kv=kv)
    try:
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy,
            streamer=clock,
            return_dict_in_generate=True,
        )
        found = None if config is None else summary(model)
    finally:
        disable(model)
    new, cache = out.sequences[0, ids.shape[1] :], out.past_key_values
    first, last = clock.times[1], clock.times[-1]
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        first_token_seconds=first - start,
        tokens_per_second=(len(new) - 1) / (last - first) if len(new) > 1 else None,
        prefill=found,
        cache_bytes=None if cache is None else nbytes_of(cache),
        read_share=cache.read_share if isinstance(cache, KVCache) else None,
    )


def check_new_tokens(value: int) -> None:
    """Check the number of tokens to generate.

    Raises:
        ValueError: the value is not a positive int.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"max_new_tokens={value!r}: must be an int >= 1")


class _Clock:
    """Streamer that records the time of each token. The first call of `put` passes the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _pad(own: Any, tokenizer: Any) -> int | None:
    """Return a padding token. transformers warns without one even if nothing is padded."""
    ends = own.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    for token in (own.pad_token_id, tokenizer.pad_token_id, end):
        if token is not None:
            return int(token)
    return None
