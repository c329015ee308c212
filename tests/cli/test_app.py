"""Command line `dit-accel`: help, version, exit codes."""

import json
import re
import subprocess
import sys
import textwrap

import pytest

import dit_accel

from .command import run

COMMANDS = (
    [],
    ["generate"],
    ["compare"],
    ["eval"],
    ["eval", "generate"],
    ["eval", "score"],
    ["eval", "report"],
    ["eval", "run"],
    ["precompute"],
    ["finetune"],
    ["merge"],
    ["convert"],
    ["env"],
    ["demo"],
    ["demo", "make-data"],
    ["demo", "train"],
    ["demo", "judge"],
    ["llm"],
    ["llm", "generate"],
    ["llm", "verify"],
    ["llm", "bench"],
    ["llm", "demo"],
)
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy", "huggingface_hub")


def python(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_no_help_and_no_version_loads_a_heavy_package_and_options_have_dashes():
    done = python(f"""
        import contextlib, io, json, sys
        from dit_accel.cli import main
        for command in {[*([*x, "--help"] for x in COMMANDS), ["--version"]]!r}:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    main(command)
                except SystemExit as stop:
                    assert not stop.code, (command, stop.code)
            print(json.dumps([command, out.getvalue(), sorted(set({HEAVY!r}) & set(sys.modules))]))
    """)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in done.stdout.splitlines()]
    assert len(lines) == len(COMMANDS) + 1
    for command, text, heavy in lines:
        assert heavy == [], command
        assert re.findall(r"--\w+_\w*", text) == [], command
        assert ("--help" in text) == (command != ["--version"]), command
        assert text, command


def test_the_version_is_that_of_the_package(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"dit-accel {dit_accel.__version__}\n"


@pytest.mark.parametrize("arguments", [[], *(["eval", x] for x in ("score", "report", "run"))])
def test_help_says_what_exit_codes_mean(arguments, capsys):
    assert run(*arguments, "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"Exit codes: 0 .* 1 .* 2 .* 3 .*--fail-if.* 130 ", text)


@pytest.mark.parametrize("module", ["tyro", "dit_accel.config.sla", "torch"])
def test_an_interrupt_while_modules_load_exits_with_130(module):
    done = python(f"""
        import sys

        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == {module!r}:
                    raise KeyboardInterrupt

        from dit_accel.cli import main
        sys.meta_path.insert(0, Interrupt())
        main(["generate", "a red circle"])
    """)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("seed=-1: must be >= 0"), 2, "error: seed=-1: must be >= 0"),
        (RuntimeError("out of memory"), 1, "failed: out of memory"),
        (MemoryError(), 1, "failed: MemoryError"),
        (OSError("disk full"), 1, "failed: disk full"),
        (ImportError("no lpips"), 1, "failed: no lpips"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_errors_are_one_line_and_an_exit_code(error, code, line, capsys, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr("dit_accel.cli.env.Env.run", fail)
    assert run("env") == code
    assert capsys.readouterr().err == f"{line}\n"


def test_an_unknown_option_is_refused_with_a_suggestion(capsys):
    assert run("generate", "x", "--num-inference-stepz", "3") == 2
    assert "--num-inference-steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(
            (["generate", "x"], "--num-inference-steps", value)
            for value in ("nan", "inf", "1e3", "1.5", "", "0x10", "x" * 40)
        ),
        (["generate", "x"], "--seed", "many"),
        (["compare", "x"], "--repeats", "1.5"),
        (["eval", "run"], "--limit", "nan"),
        (["eval", "score", "x"], "--workers", ""),
        (["demo", "train", "--output-dir", "x"], "--vae-steps", "1e3"),
        (["finetune"], "--max-train-steps", "x" * 40),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_one_line(command, option, value, capsys):
    assert run(*command, option, value) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert option in lines[0]
    assert repr(value) in lines[0]
