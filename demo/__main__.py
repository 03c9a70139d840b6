"""Make the bundled model again, with all that belongs to it.

    python demo            # hours
    python demo --quick    # minutes: a few steps of everything, into demo/work/quick, to see that it runs

Each step resumes where it was interrupted and skips what is done; run one alone with its own options.
"""

import runpy
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent
MODEL, METRICS, SHEET = DEMO / "work" / "quick" / "model", DEMO / "work" / "quick" / "metrics", DEMO / "work" / "quick" / "sheet.png"
STEPS = {
    "world.py": [],
    "train.py": ["--vae_steps", 20, "--unet_steps", 20, "--output", MODEL, "--sheet", SHEET],
    "metrics.py": ["--clip_steps", 5, "--vit_steps", 5, "--output", METRICS],
    "measure.py": ["--judge_steps", 20, "--pictures", 1, "--model", MODEL, "--metrics", METRICS, "--sheet", SHEET],
}

if sys.argv[1:] not in ([], ["--quick"]):
    sys.exit(__doc__)
quick = sys.argv[1:] == ["--quick"]
MODEL.parent.mkdir(parents=True, exist_ok=True)
for script, quick_options in STEPS.items():
    sys.argv[:] = [script, *(map(str, quick_options) if quick else [])]
    runpy.run_path(str(DEMO / script), run_name="__main__")
