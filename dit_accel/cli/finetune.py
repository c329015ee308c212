"""Command `dit-accel finetune`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tyro.conf import OmitArgPrefixes, Suppress

from dit_accel.cli.options import Format
from dit_accel.cli.printing import print_json, print_line
from dit_accel.config import SLAConfig
from dit_accel.config.base import as_lists
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.recipe import override, read_recipe

DEFAULT_RECIPE = "tiny-wan-sla"


@dataclass(frozen=True, kw_only=True)
class SparseAttentionOptions(SLAConfig):
    """Settings of the sparse attention to train."""

    def __post_init__(self) -> None:
        pass  # checked in `Finetune.resolve`, so that the command prints errors in one line


@dataclass(frozen=True, kw_only=True)
class Options(FinetuneConfig):
    """Options of a run. The defaults come from the recipe."""

    sla: Suppress[dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pass


@dataclass(kw_only=True)
class Finetune:
    """Fine-tune a model so that it keeps its quality with sparse attention.

    Options have the names of the training scripts of diffusers. Their defaults come from the recipe.
    """

    config: str = DEFAULT_RECIPE
    """Recipe: a name (tiny-wan-sla, wan2.1-1.3b-sla, wan2.1-14b-sla, sd3-sla, lumina2-sla) or a YAML file."""
    dry_run: bool = False
    """Print the resolved options, trained parameters, memory and steps. Loads no weights and trains nothing."""
    format: Format = "human"
    """Format of the result on stdout."""
    options: OmitArgPrefixes[Options] = field(default_factory=Options)
    sla: SparseAttentionOptions = field(default_factory=SparseAttentionOptions)

    def resolve(self) -> FinetuneConfig:
        """Return the config: the recipe with the options of the command line.

        Raises:
            ValueError: if the recipe or an option is invalid.
        """
        recipe = read_recipe(self.config)
        before = FinetuneConfig.from_dict(recipe)
        given = changed(vars(before), vars(self.options))
        if sla := changed(vars(SparseAttentionOptions(**before.sla)), vars(self.sla)):
            given["sla"] = sla
        return FinetuneConfig.from_dict(override(recipe, given))

    def run(self) -> None:
        config = self.resolve()
        if self.dry_run:
            from dit_accel.finetune.dry_run import dry_run

            found = dry_run(config)
            if self.format == "json":
                print_json(found.to_dict())
            else:
                print_line(str(found))
            return
        from dit_accel.finetune.trainer import finetune

        result = finetune(config)
        if self.format == "json":
            print_json({"output_dir": str(result), "config": config.to_dict()})
        else:
            print_line(str(result))


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `after` that differ from `before`. 1 and 1.0 differ: a number and a fraction of steps."""
    return {
        name: x for name, x in after.items() if repr(as_lists(x)) != repr(as_lists(before[name]))
    }


def with_recipe(arguments: Sequence[str]) -> Finetune:
    """Return the command whose defaults are the options of the recipe named in the arguments.

    Args:
        arguments: command-line arguments.

    Raises:
        ValueError: if the recipe is invalid.
    """
    source = DEFAULT_RECIPE
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            source = argument.partition("=")[2]
        elif argument == "--config" and i + 1 < len(arguments):
            source = arguments[i + 1]
    config = FinetuneConfig.from_dict(read_recipe(source))
    return Finetune(
        config=source, options=Options(**vars(config)), sla=SparseAttentionOptions(**config.sla)
    )
