"""Summary of a run in Markdown, from the data of its JSON file."""

from collections.abc import Iterator
from typing import Any

from dit_accel.bench.gpu.bounds import verdicts


def markdown(data: dict[str, Any]) -> str:
    """Return the summary of a run."""
    steps = data["steps"]
    results = {name: x["result"] for name, x in steps.items() if x["status"] == "done"}
    lines = ["# GPU check", ""]
    if data.get("dry"):
        lines += ["**Dry run: nothing was measured, every number is a placeholder.**", ""]
    lines += [*_facts(data, results), ""]
    lines += ["## Bounds", "", "| bound | least | measured | |", "|---|---|---|---|"]
    for x in verdicts(results):
        value = "" if x["value"] is None else f"{x['value']:.3g}"
        lines.append(f"| {x['bound']} | {x['least']} | {value} | {x['verdict']} |")
    lines += ["", *_checks(results), "", *_trouble(steps)]
    for title, part in (
        ("Forward, times flash (and milliseconds)", _speed(results)),
        ("Backward, times flash (and milliseconds)", _times(results, "backward")),
        ("Tiles", _tiles(results)),
        ("Times faster than the best dense attention of torch, by length", _lengths(results)),
        ("Sparse prefill, milliseconds", _times(results, "prefill")),
        ("Host, microseconds of a call", _host(results)),
        ("Peak memory over flash", _memory(results)),
        ("Backend flex", _times(results, "flex")),
    ):
        rows = list(part)
        if rows:
            lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"


def _of(results: dict[str, Any], step: str) -> dict[str, Any]:
    prefix = f"{step}/"
    return {n.removeprefix(prefix): x for n, x in results.items() if n.startswith(prefix)}


def _facts(data: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
    versions = data.get("versions", {})
    yield f"{data.get('device')} (capability {data.get('capability')}), " + ", ".join(
        f"{n} {versions[n]}" for n in ("torch", "triton", "python") if n in versions
    )
    yield f"Source {data.get('source')}, commit {data.get('commit') or 'unknown'}."
    for name, key, unit in (
        ("matmul", "tflops", "TFLOP/s in bf16"),
        ("bandwidth", "tb_per_s", "TB/s copied"),
    ):
        if f"ceilings/{name}" in results:
            yield f"{results[f'ceilings/{name}'][key]:.3g} {unit}."


def _checks(results: dict[str, Any]) -> Iterator[str]:
    checks = _of(results, "checks")
    bad = {n: x for n, x in checks.items() if not x["passed"]}
    yield f"## Correctness: {len(checks) - len(bad)} of {len(checks)} problems passed"
    yield ""
    for name, x in bad.items():
        worst = {n: f"{e:.2g} > {a:.2g}" for n, (e, a) in x.get("errors", {}).items() if not e <= a}
        shown = worst or {n: v for n, v in x.items() if n != "passed"}
        yield f"- {name}: {shown}" + ("" if x.get("repeats", True) else ", repeats differ")


def _trouble(steps: dict[str, Any]) -> Iterator[str]:
    for status in ("failed", "crashed", "skipped"):
        found = {n: x for n, x in steps.items() if x["status"] == status}
        if found:
            yield f"## {status.capitalize()}: {len(found)}"
            yield ""
            yield from (f"- {n}: {x.get('error') or x.get('reason', '')}" for n, x in found.items())
            yield ""


def _cell(row: dict[str, Any], times: dict[str, Any], name: str) -> str:
    if name not in times:
        return ""
    ratio = row.get("ratios", {}).get(name, {}).get("x_flash")
    ms = f"{times[name]['p50']:.3f} ms"
    return ms if ratio is None else f"{ratio:.2f}x ({ms})"


def _speed(results: dict[str, Any]) -> Iterator[str]:
    columns = ("flash", "cudnn", "dense triton", "kernel", "attention", "eager", "graph")
    for i, (name, x) in enumerate(_of(results, "speed").items()):
        if i == 0:
            yield f"| | density | {' | '.join(columns)} | kernel / yardstick |"
            yield "|---" * (len(columns) + 3) + "|"
        of = x["ratios"].get("kernel", {}).get("of_yardstick")
        cells = " | ".join(_cell(x, x["ms"], n) for n in columns)
        yield f"| {name} | {x['density']:.3f} | {cells} | {'' if of is None else f'{of:.0%}'} |"


def _times(results: dict[str, Any], step: str) -> Iterator[str]:
    for name, x in _of(results, step).items():
        shown = [f"{n} {_cell(x, x['ms'], n)}" for n in x["ms"] if n != "refused"]
        refused = {**x.get("refused", {}), **x["ms"].get("refused", {})}
        shown += [f"{n} refused ({text})" for n, text in refused.items()]
        yield f"- {name}: {', '.join(shown)}"


def _tiles(results: dict[str, Any]) -> Iterator[str]:
    for name, x in _of(results, "tiles").items():
        wrong = f"; WRONG: {x['wrong']}" if x.get("wrong") else ""
        yield f"- {name}: default {x['default']}, best {x['best']} ({x['gain']:.2f}x){wrong}"


def _lengths(results: dict[str, Any]) -> Iterator[str]:
    for name, x in _of(results, "crossover").items():
        yield f"- {name}: " + ", ".join(f"{n} {r:.2f}x" for n, r in x["x_best_dense"].items())


def _host(results: dict[str, Any]) -> Iterator[str]:
    for name, x in _of(results, "profile").items():
        parts = ", ".join(f"{n} {t['p50']:.0f}" for n, t in x["host_us"].items())
        yield f"- {name}: {parts}; {x['triton_launches']} Triton launches"


def _memory(results: dict[str, Any]) -> Iterator[str]:
    for name, x in _of(results, "memory").items():
        yield f"- {name}: forward {x['of_flash_forward']:.2f}, with gradients {x['of_flash_with_gradients']:.2f}"
