"""What was measured, for people to look at: sheets of pictures and a table of scores."""

from pathlib import Path

from dreambooth.decode import load_image
from dreambooth.evaluation.scores import SCORES, mean_scores
from dreambooth.images import labelled_rows, load_square


def contact_sheet(folder, subjects):
    """One image of what measure_trial() measured: each subject's photos, and below them the pictures beside their prompt."""
    rows = []
    for entry in subjects:
        rows.append((f"{entry['name']}: the photos", [load_square(Path(path)) for path in entry["photos"]]))
        rows += [(row["prompt"], [load_image(folder / entry["name"] / file) for file in row["files"]])
                 for row in entry["prompts"]]
    return labelled_rows(rows)


def comparison_sheet(candidates, results):
    """One image of several models of the same subjects: the photos, and below them for each prompt the first picture of each
    model, in the order of `results`."""
    rows = []
    for entries in zip(*(result["subjects"] for result in results)):
        photos = [load_square(Path(path)) for path in entries[0]["photos"]]
        rows.append((f"{entries[0]['name']}: the photos; below, in this order: {', '.join(c.name for c in candidates)}", photos))
        for same in zip(*(entry["prompts"] for entry in entries)):
            files = [candidate.folder / entry["name"] / row["files"][0]
                     for candidate, entry, row in zip(candidates, entries, same)]
            rows.append((" / ".join(dict.fromkeys(row["caption"] for row in same)), list(map(load_image, files))))
    return labelled_rows(rows)


def score_table(results):
    """Lines of a table: the photos compared with each other, then every model."""
    subjects = {tuple(entry["photos"]): entry for result in results for entry in result["subjects"]}  # same photos, same row
    rows = [("real photos", mean_scores([entry["real"] for entry in subjects.values()])),
            ("  each with itself, too", mean_scores([entry["real_with_self_pairs"] for entry in subjects.values()]))]
    rows += [(result["model_path"], result["scores"]) for result in results]
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{title:>12}" for title in SCORES.values())]
    for name, scores in rows:
        values = ["-" if (value := scores.get(key)) is None else f"{value:.3f}" for key in SCORES]
        lines.append(name.ljust(width) + "".join(f"{value:>12}" for value in values))
    return lines
