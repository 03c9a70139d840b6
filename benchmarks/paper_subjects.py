"""Train the program on every subject of the paper's dataset and tabulate losses and times.

    python benchmarks/paper_subjects.py --dataset PATH/TO/dreambooth/dataset --model_name demo/model

The dataset (github.com/google/dreambooth) is one folder of photos per subject and prompts_and_classes.txt, which tells each
subject's class. Results go to --output_dir: a model folder per subject and results.md; flags this script does not know
are passed on to --train.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def class_nouns(dataset):
    """{subject: class noun} from the dataset's prompts_and_classes.txt."""
    text = next(p for p in (dataset / "prompts_and_classes.txt", dataset.parent / "prompts_and_classes.txt") if p.exists()).read_text()
    rows = (line.strip().split(",") for line in text.split("Prompts")[0].splitlines() if "," in line)
    return {subject: noun for subject, noun in rows if subject != "subject_name"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("output-paper-subjects"))
    args, passed_on = parser.parse_known_args()

    table = ["| subject | class | photos | instance loss, first 100 steps | last 100 | prior loss, first 100 | last 100 | preparing, s "
             "| training, s |", "|---|---|---|---|---|---|---|---|---|"]
    for subject, noun in class_nouns(args.dataset).items():
        if not (folder := args.dataset / subject).is_dir():
            continue
        output = args.output_dir / subject
        subprocess.run([sys.executable, REPOSITORY / "dreambooth_implementation.py", "--train", "--instance_data_dir", folder,
                        "--class_prompt", f"a {noun}", "--output_dir", output, "--overwrite", *passed_on], check=True)
        record = json.loads((output / "dreambooth.json").read_text())
        first, last = record["loss"]["first_100_steps"], record["loss"]["last_100_steps"]
        photos = sum(p.suffix.lower() in (".jpg", ".jpeg", ".png") for p in folder.iterdir())
        table.append(f"| {subject} | {noun} | {photos} | {first['instance']:.4f} | {last['instance']:.4f} | {first['prior']:.4f} "
                     f"| {last['prior']:.4f} | {record['seconds']['preparing']:.0f} | {record['seconds']['training']:.0f} |")
        (args.output_dir / "results.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
