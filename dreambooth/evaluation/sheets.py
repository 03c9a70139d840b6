"""What was measured, for people to look at: sheets of pictures and a table of scores."""

from dreambooth.data.views import photo_square
from dreambooth.decode import load_image
from dreambooth.evaluation.scores import SCORES, mean_scores
from dreambooth.images import labelled_rows


def photos_of(trial):
    """A Trial's photos, as squares with the subject in them."""
    return [photo_square(path, trial.masks.get(path)) for path in trial.photos]


def contact_sheet(candidate, subjects):
    """One image of what measure_trial() measured: each subject's photos, and below them the pictures beside their prompt."""
    rows = []
    for trial, entry in zip(candidate.trials, subjects):
        rows.append((f"{entry['name']}: the photos", photos_of(trial)))
        rows += [(row["prompt"], [load_image(candidate.folder / entry["name"] / file) for file in row["files"]])
                 for row in entry["prompts"]]
    return labelled_rows(rows)


def comparison_sheet(candidates, results):
    """One image of several models of the same subjects: the photos, and below them for each prompt the first picture of each
    model, in the order of `results`."""
    rows = []
    for trial, *entries in zip(candidates[0].trials, *(result["subjects"] for result in results)):
        order = ", ".join(candidate.name for candidate in candidates)
        rows.append((f"{entries[0]['name']}: the photos; below, in this order: {order}", photos_of(trial)))
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
