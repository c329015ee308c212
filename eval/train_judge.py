"""Train the CNN of the demo's judge from scratch, which takes a few seconds on a CPU core.

python eval/train_judge.py --output assets/judge.safetensors
"""

import tyro

from dit_accel.bench.train_judge import JudgeTraining

if __name__ == "__main__":
    tyro.cli(JudgeTraining, description=__doc__).run()
