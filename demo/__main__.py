"""Make the bundled models again, with all that belongs to them.

    python demo            # hours
    python demo --quick    # minutes: a few pictures and steps of everything, into demo/work/quick, to see that it runs

Each step resumes where it was interrupted and skips what is done; run one alone with its own options.
"""

import sys

import measure
import metrics
import train
import train_flow
import world

QUICK = world.WORK / "quick"
MODEL, METRICS, SHEET = QUICK / "model", QUICK / "metrics", QUICK / "sheet.png"
STEPS = {  # each with its options in a quick run
    world: [],
    train: ["--vae_steps", 20, "--unet_steps", 20, "--output", MODEL, "--sheet", QUICK / "samples.png"],
    train_flow: ["--steps", 5, "--vae", MODEL, "--no-compile", "--output", QUICK / "model-flow", "--sheet", QUICK / "flow.png"],
    metrics: ["--clip_steps", 5, "--vit_steps", 5, "--output", METRICS],
    measure: ["--judge_steps", 20, "--pictures", 1, "--model", MODEL, "--metrics", METRICS, "--sheet", SHEET],
}

if sys.argv[1:] not in ([], ["--quick"]):
    sys.exit(__doc__)
quick = sys.argv[1:] == ["--quick"]
if quick:  # its own pictures, checkpoints and subjects, or it would skip what the full run has done, and that skip its own
    world.WORK, world.SUBJECTS = QUICK, QUICK / "subjects"
    world.PICTURES, world.VALIDATION = 1000, 64
for script, quick_options in STEPS.items():
    sys.argv[:] = [f"{script.__name__}.py", *(map(str, quick_options) if quick else [])]
    script.main()
