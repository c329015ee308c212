"""`Processors`: the attention processors that acceleration puts on a transformer in place of those of diffusers."""

from collections.abc import Collection, Mapping
from typing import Any

from dit_accel.models import Family
from dit_accel.models.attention import SparseProcessor


def check_processors(family: Family, modules: Mapping[str, Any]) -> None:
    """Refuse attention modules whose processors cannot be replaced.

    Args:
        family: family of the transformer.
        modules: attention modules by name.

    Raises:
        ValueError: a processor is not one of `Family.stock_processors`.
    """
    for name, module in modules.items():
        kind = type(_stock(module.processor)).__name__
        if kind not in family.stock_processors:
            raise ValueError(
                f"transformer.{name}: processor {kind}; accepted: {', '.join(family.stock_processors)} "
                "(restore it before enable)"
            )


class Processors:
    """Installed attention processors of one transformer, by the name of the attention module."""

    def __init__(self) -> None:
        self.by_name: dict[str, SparseProcessor] = {}

    def put_on(
        self, family: Family, modules: Mapping[str, Any], self_attention: Collection[str]
    ) -> None:
        """Replace the processor of each module.

        Args:
            family: family of the transformer; it makes the processors.
            modules: attention modules by name.
            self_attention: names of the self-attention modules; all others are cross-attention.
        """
        for name, module in modules.items():
            stock = _stock(module.processor)
            ours = (
                family.processor(stock) if name in self_attention else family.cross_processor(stock)
            )
            module.set_processor(ours)
            self.by_name[name] = ours

    def check_unchanged(self, modules: Mapping[str, Any]) -> None:
        """Check that the modules still have the installed processors.

        Raises:
            RuntimeError: a processor was replaced, for example by `fuse_qkv_projections`.
        """
        for name, ours in self.by_name.items():
            if modules[name].processor is not ours:
                raise RuntimeError(
                    f"the processor of {name} was changed after enable: call disable() first"
                )

    def clear_text(self) -> None:
        """Drop the keys and values of the text that belong to the call that ended."""
        for processor in self.by_name.values():
            processor.text = None

    def clear_exchange(self) -> None:
        """Disconnect the processors from context parallelism."""
        for processor in self.by_name.values():
            processor.exchange = None

    def take_off(self, transformer: Any, modules: Mapping[str, Any]) -> None:
        """Put the processors of diffusers back. Processors that were set since installation stay.

        Args:
            transformer: the transformer.
            modules: attention modules by name.
        """
        stock = {id(x): x.release() for x in self.by_name.values()}
        for name, module in modules.items():
            ours = self.by_name.get(name)
            if ours is not None and module.processor is ours:
                module.set_processor(ours.stock)
        # fuse_qkv_projections saves the processors that it finds, and unfuse_qkv_projections sets them again.
        saved = getattr(transformer, "original_attn_processors", None)
        if isinstance(saved, dict) and any(id(x) in stock for x in saved.values()):
            transformer.original_attn_processors = {
                name: stock.get(id(x), x) for name, x in saved.items()
            }


def _stock(processor: Any) -> Any:
    """Return the processor of diffusers, also behind an installed one that outlived its installation."""
    while isinstance(processor, SparseProcessor):
        processor = processor.stock
    return processor
