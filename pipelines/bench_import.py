"""Time `import dit_accel` against `import torch`, in fresh processes and in turns.

python pipelines/bench_import.py --output pipelines/results/import.json
"""

import tyro

from dit_accel.bench.import_time import ImportTime

if __name__ == "__main__":
    tyro.cli(ImportTime, description=__doc__).run()
