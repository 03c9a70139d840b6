"""What is to be measured: models, their subjects, the photos of these and the prompts.

Nothing is loaded here, so that whatever is missing is said at once.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dreambooth.base import HERE, UserError, default, say, short_path, slug
from dreambooth.drawing.pipeline import find_base
from dreambooth.drawing.trained import Trained, find_trained, model_paths
from dreambooth.evaluation.prompts import fill_template, read_prompts, usual_prompts
from dreambooth.methods.table import METHODS
from dreambooth.settings import SAMPLE_PHOTOS
from dreambooth.subjects.concepts import Concept, read_concept_file
from dreambooth.subjects.masks import find_masks
from dreambooth.subjects.nouns import noun_of
from dreambooth.subjects.photos import find_photos
from dreambooth.subjects.words import Subject


@dataclass(frozen=True)
class Trial:
    """One model on one of its subjects."""

    subject: Subject
    photos: tuple
    prompts: tuple  # (prompt as drawn, the same without identifier) each
    masks: dict = dataclasses.field(default_factory=dict, compare=False)  # photo: "L" picture, white where the subject is


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    trained: Trained
    base: str
    folder: Path  # for its pictures
    trials: tuple

    @property
    def name(self):
        return self.trained.source


def find_candidates(s):
    """The Candidates of --model_path. Raises UserError for whatever is missing or wrong, before anything is loaded."""
    if s.prompts_file and s.subject_type != "auto":
        raise UserError(f"--subject_type {s.subject_type}: it chooses the paper's prompts, and --prompts_file gives others; "
                        f"leave one out")
    templates = read_prompts(s.prompts_file, "--prompts_file") if s.prompts_file else None
    candidates = []
    for path in dict.fromkeys(model_paths(s)):
        trained = find_trained(path, "--model_path")
        base, names = find_base(s, trained), {candidate.folder.name for candidate in candidates}
        name = next(name for n in range(1, 10**6) if (name := f"{slug(path)}{f'-{n}' if n > 1 else ''}") not in names)
        trials = tuple(find_trial(s, trained, base, subject, templates) for subject in subjects_of(s, trained))
        candidates.append(Candidate(trained, base, Path(s.eval_dir) / name, trials))
    return candidates


def subjects_of(s, trained):
    """The Subjects of a model: as recorded, with what the flags say instead; without a record those of the flags alone."""
    if trained.lora and not trained.record:
        raise UserError(f"--model_path {trained.source}: no dreambooth.json beside it tells what it was trained on; "
                        f"--evaluate takes an output folder of --train")
    subjects = trained.subjects or [Subject("", "", "")]
    given = {flag: value for flag in ("identifier", "class_prompt") if (value := getattr(s, flag)) not in (None, "auto")}
    if given and len(subjects) > 1:
        raise UserError(f"--{min(given)}: {trained.source} has several subjects, each with its own; leave it out")
    return [dataclasses.replace(subject, **given) for subject in subjects]


def photo_folder(s, trained, subject):
    """(where a subject's photos are, how complaints about it begin): by the flags, else where training found them."""
    recorded = {} if s.instance_data_dir or s.concepts else trained.record.get("settings", {})
    if concepts := s.concepts or recorded_place(recorded.get("concepts")):
        folders = {entry["name"]: entry["instance_data_dir"] for entry in read_concept_file(concepts)}
        if subject.name not in folders:
            raise UserError(f'--concepts {concepts}: no entry has the name of {trained.source}\'s subject, "{subject.name}"')
        return folders[subject.name], f'{concepts}, "{subject.name}": instance_data_dir'
    if len(trained.subjects) > 1:
        raise UserError(f"--model_path {trained.source}: it has several subjects; tell their photos with --concepts")
    if s.instance_data_dir:
        return s.instance_data_dir, "--instance_data_dir"
    if not trained.record:
        raise UserError(f"--model_path {trained.source}: no dreambooth.json tells of its photos; give --instance_data_dir")
    folder = recorded_place(default(recorded.get("instance_data_dir"), SAMPLE_PHOTOS))
    if not Path(folder).is_dir():
        raise UserError(f"--model_path {trained.source}: its photos in {folder} are gone; give --instance_data_dir")
    return folder, "--instance_data_dir"


def recorded_place(path):
    """A path as training recorded it, from the working folder or else from the program's; None for none."""
    return path and next((place for place in (path, short_path(HERE / path)) if Path(place).exists()), path)


def find_trial(s, trained, base, subject, templates):
    """The Trial of a model on a subject."""
    folder, flag = photo_folder(s, trained, subject)
    photos, class_prompt = find_photos(Concept(folder, "", 0, class_prompt=subject.class_prompt or None), flag)
    if not class_prompt:
        raise UserError(f'--class_prompt is missing: say what kind of thing is in {folder}, such as "a dog"')
    subject = dataclasses.replace(subject, class_prompt=class_prompt, name=subject.name or slug(noun_of(class_prompt)))
    if not subject.identifier:
        say(f"{trained.source} has no dreambooth.json: its prompts go without an identifier; --identifier gives it one.")
    if templates is None:
        templates = usual_prompts(s, base, subject)
    method = trained.record.get("method", "textual_inversion" if trained.words else "full")
    names_class = METHODS[method].names_class
    paths = [path for path, _ in photos]
    masks = {} if trained.record.get("settings", {}).get("mask") == "none" else find_masks(Path(folder), paths)
    return Trial(subject, tuple(paths), tuple(fill_template(template, subject, names_class) for template in templates), masks)
