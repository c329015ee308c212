"""`write_card`: write the model card of a fine-tuned model."""

from pathlib import Path
from typing import Any

from dit_accel.checkpoint.file import FILE_NAME
from dit_accel.files import atomic_path
from dit_accel.finetune.curves import FILE_NAME as CURVES
from dit_accel.finetune.log import read_log
from dit_accel.finetune.result import MERGED

METRICS = {
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "latent_error": ("relative latent error", "{:.4f}"),
    "density": ("realised density", "{:.3f}"),
}
"""Title and number format of each validation metric."""
PRECISIONS = {"no": "fp32"}
TRAINED = {
    "all": "all weights of the transformer",
    "lora": "low-rank adapters and the weights of sparse attention",
    "sla": "the weights of sparse attention",
}


def write_card(
    folder: Path, config: Any, *, pipeline: str, base: str, counters: dict[str, Any]
) -> Path:
    """Write the model card README.md from the log of the run.

    Args:
        folder: output folder of the run, which holds the log and the result.
        config: settings of the run (`FinetuneConfig`).
        pipeline: public class that loads the result, such as "SparseWanPipeline".
        base: hub id or name of the base model.
        counters: counters of the run (`TrainingState.counters`).

    Returns:
        The path of the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base if "/" in base else None,
        library_name="diffusers",
        tags=[
            "dit-accel",
            "sparse-attention",
            "sla",
            *(["lora"] if config.train == "lora" else []),
        ],
    )
    records = read_log(folder / "log.jsonl")
    text = "\n".join(
        [
            f"# {folder.resolve().name}",
            "",
            f"Sparse-linear attention (SLA) for {base}, fine-tuned with `dit-accel finetune`. Trained parameters: "
            f"{TRAINED[config.train]}. Each query block reads {_density(config.sla['topk'])} exactly.",
            "",
            "## Use",
            "",
            "```python",
            *_usage(config, pipeline, base, folder),
            "```",
            "",
            *_metrics_table(records),
            "## Training",
            "",
            f"![Training curves]({CURVES})",
            "",
            *_training(config, records, counters),
        ]
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    with atomic_path(folder / "README.md") as temporary:
        card.save(temporary)
    return folder / "README.md"


def _density(topk: float | None) -> str:
    chosen = "the key blocks selected by top_p"
    return chosen if topk is None else f"about {100 * topk:g} % of the key blocks"


def _usage(config: Any, pipeline: str, base: str, folder: Path) -> list[str]:
    name = folder.resolve().name
    lines = [
        f"from dit_accel import {pipeline}",
        "",
        f'pipe = {pipeline}.from_pretrained("{base}", sla="{name}")',
    ]
    if config.merge:
        merged = f'pipe = {pipeline}.from_pretrained("{name}/{MERGED}")'
        lines += ["", "# or load the merged repository:", merged]
    return lines


def _metrics_table(records: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table with the first and the last validation; empty without validations."""
    rows = [x for x in records if "validation/psnr" in x]
    if not rows:
        return []
    names = [x for x in METRICS if any(f"validation/{x}" in row for row in rows)]
    lines = [
        "## Quality",
        "",
        "Samples of the sparse model compared with samples of the dense model before training, from the same seeds:",
        "",
        "| | " + " | ".join(METRICS[x][0] for x in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    shown = [("before training", rows[0])]
    if rows[-1] is not rows[0]:
        shown.append((f"after {rows[-1]['step']} steps", rows[-1]))
    for title, row in shown:
        values = [row.get(f"validation/{x}") for x in names]
        cells = [
            METRICS[x][1].format(value) if isinstance(value, int | float) else "-"
            for x, value in zip(names, values, strict=True)
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _training(config: Any, records: list[dict[str, Any]], counters: dict[str, Any]) -> list[str]:
    steps = [x for x in records if x["stage"] == "distillation" and "loss" in x]
    batch = config.train_batch_size * config.gradient_accumulation_steps
    lines = [
        "| | |",
        "|---|---|",
        f"| stages | {', '.join(config.stages)} |",
        f"| loss | {config.loss}, targets {config.targets} |",
        f"| steps | {len(steps)} |",
        f"| samples per step and process | {batch} |",
        f"| learning rate | {config.learning_rate:g} ({config.lr_scheduler}) |",
        f"| precision | {PRECISIONS.get(config.mixed_precision, config.mixed_precision)} |",
        f"| seed | {config.seed} |",
        f"| training time, seconds | {counters.get('seconds', 0.0):.0f} |",
    ]
    if steps:
        lines.append(f"| loss at the last step | {_number(steps[-1]['loss'])} |")
        if "density" in steps[-1]:
            lines.append(f"| realised density at the last step | {steps[-1]['density']:.3f} |")
    if skipped := counters.get("skipped_steps"):
        lines.append(f"| steps skipped because of non-finite values | {len(skipped)} |")
    return [
        *lines,
        "",
        f"`training_config.json` holds all settings, and `{FILE_NAME}` holds the settings of sparse attention.",
    ]
