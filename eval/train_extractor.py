"""Train the shipped feature extractor from scratch; about three minutes on one CPU core.

python eval/train_extractor.py --output assets/tiny-extractor.safetensors
"""

import tyro

from dit_accel.bench.train_extractor import ExtractorTraining

if __name__ == "__main__":
    tyro.cli(ExtractorTraining, description=__doc__).run()
