"""Accelerated diffusion transformers and language models on the command line.

Results go to stdout, progress and errors to stderr. Exit codes: 0 success, 1 error while running,
2 invalid input (nothing was written) or a --fail-if condition without a value, 3 a --fail-if
condition holds or a bound of llm verify is exceeded, 130 interrupted. --version prints the version.
"""

import contextlib
import functools
import io
import itertools
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from dit_accel.cli import (
    demo,
    eval_generate,
    eval_report,
    eval_run,
    eval_score,
    llm_bench,
    llm_bench_kv,
    llm_calibrate,
    llm_demo,
    llm_generate,
    llm_learn_mask,
    llm_search,
    llm_verify,
)
from dit_accel.cli.compare import Compare
from dit_accel.cli.convert import Convert
from dit_accel.cli.env import Env
from dit_accel.cli.finetune import Finetune, with_recipe
from dit_accel.cli.generate import Generate
from dit_accel.cli.merge import Merge
from dit_accel.cli.precompute import Precompute
from dit_accel.cli.printing import print_line


@dataclass(kw_only=True)
class Eval:
    """Evaluate acceleration: sample sets, metrics, a table and a report page."""

    command: (
        Annotated[eval_generate.Generate, subcommand("generate")]
        | Annotated[eval_score.Score, subcommand("score")]
        | Annotated[eval_report.Report, subcommand("report")]
        | Annotated[eval_run.Run, subcommand("run")]
    )

    def run(self) -> None:
        self.command.run()


@dataclass(kw_only=True)
class Demo:
    """Create the procedural data set, train the embedded models on it, and judge their samples."""

    command: (
        Annotated[demo.MakeData, subcommand("make-data")]
        | Annotated[demo.Train, subcommand("train")]
        | Annotated[demo.Judge, subcommand("judge")]
    )

    def run(self) -> None:
        self.command.run()


@dataclass(kw_only=True)
class Llm:
    """Run language models with sparse prefill and with compressed caches of keys and values."""

    command: (
        Annotated[llm_generate.Generate, subcommand("generate")]
        | Annotated[llm_verify.Verify, subcommand("verify")]
        | Annotated[llm_bench.Bench, subcommand("bench")]
        | Annotated[llm_bench_kv.BenchKV, subcommand("bench-kv")]
        | Annotated[llm_search.Search, subcommand("search")]
        | Annotated[llm_learn_mask.LearnMask, subcommand("learn-mask")]
        | Annotated[llm_calibrate.Calibrate, subcommand("calibrate")]
        | Annotated[llm_demo.Demo, subcommand("demo")]
    )

    def run(self) -> None:
        self.command.run()


def _commands(recipe: Finetune | None = None) -> Any:
    """Return the union type of all commands.

    Args:
        recipe: default options of `dit-accel finetune`. Default: the defaults of its class.
    """
    finetune = subcommand("finetune") if recipe is None else subcommand("finetune", default=recipe)
    return (
        Annotated[Generate, subcommand("generate")]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Eval, subcommand("eval")]
        | Annotated[Precompute, subcommand("precompute")]
        | Annotated[Finetune, finetune]
        | Annotated[Merge, subcommand("merge")]
        | Annotated[Convert, subcommand("convert")]
        | Annotated[Env, subcommand("env")]
        | Annotated[Demo, subcommand("demo")]
        | Annotated[Llm, subcommand("llm")]
    )


def run(argv: list[str] | None = None) -> None:
    """Parse the arguments and run the command. Errors become one line on stderr and an exit code.

    Args:
        argv: command line arguments. Default: `sys.argv[1:]`.

    Raises:
        SystemExit: the exit code is not 0.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments == ["--version"]:
        from dit_accel import __version__

        print_line(f"dit-accel {__version__}")
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        command = _parsed(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
            command.run()
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RuntimeError, OSError, ImportError, MemoryError) as error:
        sys.stderr.write(f"failed: {str(error) or type(error).__name__}\n")
        raise SystemExit(1) from None


def _show_warning(
    usual: Any, message: Warning | str, category: type, filename: str, *args: Any, **kwargs: Any
) -> None:
    """Print a warning of dit_accel as one line without file and line number; pass others on to `usual`."""
    if "dit_accel" in Path(filename).parts:
        sys.stderr.write(f"warning: {' '.join(str(message).split())}\n")
    else:
        usual(message, category, filename, *args, **kwargs)


def _parsed(arguments: Sequence[str]) -> Any:
    """Return the command object for the arguments.

    tyro prints a box of many lines for a value of the wrong type. Such an error is shortened to one line, like errors of
    other invalid values. Messages about unknown or missing options are not changed.

    Raises:
        ValueError: the recipe of `dit-accel finetune`, which gives the defaults of its options, is invalid.
        SystemExit: the arguments are invalid, or --help is given.
    """
    shown = io.StringIO()
    recipe = with_recipe(arguments) if arguments[:1] == ["finetune"] else None
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                _commands(recipe),
                prog="dit-accel",
                description=__doc__,
                args=arguments,
                config=(OmitSubcommandPrefixes,),
            )
    except SystemExit as stop:
        text = shown.getvalue()
        if stop.code == 2 and "Error parsing" in text:
            lines = [x.strip("│| ") for x in text[text.index("Error parsing") :].splitlines()]
            # The first paragraph ends at an empty line or a horizontal rule.
            first = itertools.takewhile(lambda x: x.strip("─-"), lines)
            text = f"error: {' '.join(first)}\n"
        sys.stderr.write(text)
        raise
