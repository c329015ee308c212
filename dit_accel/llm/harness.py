"""Sparse prefill in lm-evaluation-harness (tasks `ruler`, `niah_single_1`, ...).

    python -m dit_accel.llm.harness run --model dit_accel --tasks niah_single_1 \\
        --model_args pretrained=Qwen/Qwen2.5-0.5B-Instruct,prefill=balanced,max_length=32768

All other options are options of lm_eval.
"""

import importlib.util
import sys
from typing import Any

from dit_accel.llm.control import enable, summary
from dit_accel.llm.report import summary_line
from dit_accel.llm.settings import prefill_settings

NAME = "dit_accel"
"""Name of the model type in lm_eval."""


def model_class() -> type:
    """Return the model type that `register` adds: lm_eval's "hf" with the additional arguments `prefill` and `crossover`.

    Raises:
        ValueError: lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval: not installed; run pip install 'dit-accel[lm-eval]'")
    from lm_eval.models.huggingface import HFLM

    class SparsePrefillLM(HFLM):
        """Language model of transformers with sparse prefill."""

        def __init__(
            self, *args: Any, prefill: Any = "balanced", crossover: Any = None, **more: Any
        ) -> None:
            # Check the settings before loading the weights, which takes long.
            config = prefill_settings(prefill, None if crossover is None else int(crossover))
            super().__init__(*args, **more)
            self.prefill = config
            if config is not None:
                enable(self.model, prefill=config)

        def get_model_info(self) -> dict[str, Any]:
            """Return the model entry of lm_eval's results, with the settings and attention calls of sparse prefill."""
            info: dict[str, Any] = super().get_model_info()
            if self.prefill is None:
                return {**info, "prefill": None}
            found = summary(self.model)
            return {**info, "prefill": self.prefill.to_dict(), "prefill_calls": summary_line(found)}

    return SparsePrefillLM


def register() -> type:
    """Add the model type "dit_accel" to lm_eval and return it. Safe to call more than once.

    Raises:
        ValueError: lm_eval is not installed.
    """
    kind = model_class()
    from lm_eval.api.registry import get_model, register_model

    try:
        return get_model(NAME)
    except (KeyError, ValueError):  # no such model type yet
        return register_model(NAME)(kind)


def main() -> None:
    """Run the command line of lm_eval with the model type "dit_accel" added."""
    try:
        register()
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
