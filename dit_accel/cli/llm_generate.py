"""`dit-accel llm generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from dit_accel.cli.llm_options import PrefillOptions
from dit_accel.cli.options import check_output
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Generate(PrefillOptions):
    """Continue a prompt with sparse prefill. Prints the text, the time to the first token and the tokens per second."""

    prompt: Positional[str | None] = None
    """Text of the prompt. Not allowed with --prompt-file."""
    prompt_file: Path | None = None
    """UTF-8 text file with the prompt."""
    kv: str = "none"
    """KV cache: the name of a preset (see docs/kvcache.md), a YAML file with the section kv:, or none for transformers' own
    cache."""
    max_new_tokens: int = 128
    """Maximum number of generated tokens."""
    chat: bool = False
    """Wrap the prompt as a user message in the chat template of the model."""
    output: Path | None = None
    """Write the generated text to this file, and a JSON record beside it: answer.txt and answer.json."""

    def run(self) -> None:
        from dit_accel.config import KVConfig
        from dit_accel.llm.generate import check_new_tokens, encode, generate
        from dit_accel.llm.kvcache.cache import zone_layers
        from dit_accel.llm.record import check_name, write_generation
        from dit_accel.llm.report import cache_line, summary_line

        check_new_tokens(self.max_new_tokens)
        prompt, config = self._prompt(), self.prefill_config()
        kv = KVConfig.load(self.kv)
        if self.output is not None:
            check_name(self.output)
            check_output(self.output.parent, "output")
        place = self.place()
        source = self.source()
        source.check_prefill(config)
        if kv is not None:
            zone_layers(source.config, kv)
        ids = encode(source.tokenizer, prompt, chat=self.chat)
        source.check_length("prompt", ids.shape[1], self.max_new_tokens)
        done = generate(
            source.load(**place),
            source.tokenizer,
            ids,
            prefill=config,
            kv=kv,
            max_new_tokens=self.max_new_tokens,
        )
        settings: dict[str, Any] = {
            "model": self.model,
            "revision": self.revision,
            "device": place["device"].type,
            "dtype": str(place["dtype"]).removeprefix("torch."),
            "kv": None if kv is None else kv.to_dict(),
            "prompt": prompt,
            "chat": self.chat,
            "max_new_tokens": self.max_new_tokens,
        }
        if self.output is not None:
            write_generation(self.output, done, settings)
        if self.format == "json":
            print_json({**settings, **done.to_dict()})
            return
        print_line(done.text)
        rate = done.tokens_per_second
        print_line(
            f"{done.prompt_tokens} prompt tokens, first token after {done.first_token_seconds:.2f} s; "
            f"{done.new_tokens} new tokens{'' if rate is None else f', {rate:.1f} tokens/s'}"
        )
        print_line(summary_line(done.prefill))
        print_line(cache_line(self.kv, done))

    def _prompt(self) -> str:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError(
                f"prompt={self.prompt!r}, prompt_file={None if self.prompt_file is None else str(self.prompt_file)!r}: "
                "pass either a prompt or --prompt-file"
            )
        if self.prompt_file is None:
            assert self.prompt is not None
            text, name = self.prompt, "prompt"
        else:
            name = "prompt_file"
            try:
                text = self.prompt_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"prompt_file={str(self.prompt_file)!r}: cannot be read "
                    f"({getattr(error, 'strerror', None) or error}); must be a text file in UTF-8"
                ) from None
        if not text.strip():
            raise ValueError(f"{name}: must not be empty")
        return text
