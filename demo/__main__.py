"""Make the bundled model again, with all that belongs to it: python demo

Each step resumes where it was interrupted and skips what is done; run one alone with its own options.
"""

import runpy
import sys
from pathlib import Path

for step in ("world.py", "train.py", "metrics.py", "measure.py"):
    sys.argv[:] = [step]
    runpy.run_path(str(Path(__file__).with_name(step)), run_name="__main__")
