"""Measure seconds and memory of scoring, next to torchmetrics.

python eval/bench_score.py --output eval/results/score_cpu.json

Images: demo stills and noisy copies as png files. Both use the shipped extractor; torchmetrics reads the files
with Pillow in the same batches. Fréchet: the step from statistics of 2,048 features to the distance. Every
part runs in its own process, the parts in turn. Times are medians.
"""

import tyro

from dit_accel.bench.scoring import ScoringSpeed

if __name__ == "__main__":
    tyro.cli(ScoringSpeed, description=__doc__).run()
