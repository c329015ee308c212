#!/usr/bin/env bash
# Builds the wheel, installs it in an empty environment with nothing but its declared dependencies, and uses it from
# outside the source tree: a forgotten dependency or data file fails here. Called by `make wheel-check`.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$root/.venv/bin/python" -m build --wheel --outdir "$work/dist" "$root" > "$work/build.log" 2>&1 ||
	{ cat "$work/build.log"; exit 1; }
"$python" -m venv "$work/venv"
# torch first: the versions that the tests run on, the CPU build of torch where the index has one.
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" torch
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" "$work"/dist/*.whl
"$work/venv/bin/python" -m pip check

mkdir "$work/elsewhere"
cd "$work/elsewhere"
unset PYTHONPATH
export PATH="$work/venv/bin:$PATH" HF_HUB_OFFLINE=1
dit-accel --version
dit-accel generate "a red circle moving right" --num-inference-steps 6 --ras balanced --output-dir clips
test -s clips/*.mp4
dit-accel generate "a red circle" --model tiny-sd3 --num-inference-steps 4 --sla balanced --crossover never --output-dir stills
test -s stills/*.png
dit-accel eval generate --prompts smoke --limit 1 --num-inference-steps 2 --output-dir samples
dit-accel finetune --config tiny-wan-sla --dry-run --output-dir my-run > /dev/null
python - <<'PYTHON'
import pathlib

import dit_accel

assert pathlib.Path(dit_accel.__file__).parts[-3] == "site-packages", dit_accel.__file__
for name in dit_accel.__all__:
    getattr(dit_accel, name)
print(f"all {len(dit_accel.__all__)} public names load from the wheel")
PYTHON
