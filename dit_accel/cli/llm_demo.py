"""`dit-accel llm demo`."""

from dataclasses import dataclass
from typing import Any

from dit_accel.cli.llm_options import PrefillOptions
from dit_accel.cli.printing import print_json, print_line
from dit_accel.config import PrefillConfig


@dataclass(kw_only=True)
class Demo(PrefillOptions):
    """Let the model find a number hidden in a long text, with dense and with sparse prefill. Prints the answer, the density
    and the time to the first token of both runs."""

    length: int = 8000
    """Number of tokens of the text."""
    max_new_tokens: int = 12
    """Maximum number of generated tokens."""
    seed: int = 0
    """Random seed of the number and its place in the text."""

    def run(self) -> None:
        from dit_accel.llm.bench.passkey import make_passkeys
        from dit_accel.llm.bench.run import MIN_LENGTH
        from dit_accel.llm.generate import check_new_tokens

        check_new_tokens(self.max_new_tokens)
        if self.length < MIN_LENGTH:
            raise ValueError(f"length={self.length}: must be an int >= {MIN_LENGTH}")
        config = self.prefill_config()
        if config is None:
            raise ValueError(
                "prefill='none': must be sparse settings, because the demo always runs dense prefill too"
            )
        place = self.place()
        source = self.source()
        source.check_prefill(config)
        source.check_length("length", self.length, self.max_new_tokens)
        (passkey,) = make_passkeys(source.tokenizer, self.length, 1, self.seed)
        done = self._both(source, source.load(**place), passkey.ids, config)
        if self.format == "json":
            print_json({"passkey": passkey.digits, **done})
            return
        print_line(f"A text of {len(passkey.ids)} tokens hides the pass key {passkey.digits}.")
        for name, found in done.items():
            answer = " ".join(found["text"].split())
            print_line(
                f"{name:<7} density {found['density']:.3f}  first token after "
                f"{found['first_token_seconds']:6.2f} s  answer: {answer}"
            )
        if reasons := done["sparse"]["dense_reasons"]:
            why = ", ".join(f"{n} x {reason}" for reason, n in reasons.items())
            print_line(f"dense calls of the sparse run: {why}")

    def _both(
        self, source: Any, model: Any, ids: list[int], config: PrefillConfig
    ) -> dict[str, Any]:
        import torch

        from dit_accel.llm.generate import generate

        prompt = torch.tensor([ids])
        # Warm-up: the first call of a process is slower than later calls.
        generate(model, source.tokenizer, prompt[:, :64], prefill=None, max_new_tokens=1)
        return {
            name: generate(
                model,
                source.tokenizer,
                prompt,
                prefill=prefill,
                max_new_tokens=self.max_new_tokens,
            ).to_dict()
            for name, prefill in (("dense", None), ("sparse", config))
        }
