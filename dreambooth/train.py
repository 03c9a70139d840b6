"""--train: teach a model a subject. `train` is the story of one run, from photos and flags to ./output."""

import contextlib
import dataclasses
import functools
import math
import time

from dreambooth.base import default, own_command, say
from dreambooth.data.class_images import class_image_plan, class_pools
from dreambooth.data.describe import check_describing, described
from dreambooth.data.latents import cache_latents
from dreambooth.data.quality import tell_photos
from dreambooth.data.segment import check_drawing_masks, with_drawn_masks
from dreambooth.data.views import USUAL_FLOOR, views_of
from dreambooth.device import machine_name, plan_device
from dreambooth.drawing.trained import find_trained
from dreambooth.evaluation.networks import metric_models
from dreambooth.export import check_export, write_export
from dreambooth.files import check_writable
from dreambooth.memory.plan import naming_next_plan, set_course
from dreambooth.memory.plans import check_levers, is_late
from dreambooth.methods.adapters import check_adapter
from dreambooth.methods.groups import check_sound
from dreambooth.methods.table import METHODS, has_class_images, parameter_groups, preserves_prior
from dreambooth.models.encoding import check_length, embed_ends
from dreambooth.models.find import check_undistilled, check_variant, default_model, family_at, find_model
from dreambooth.models.late import load_late, with_denoiser
from dreambooth.models.load import load_models
from dreambooth.models.parts import take_apart
from dreambooth.output.card import CARD, for_other_programs
from dreambooth.output.folder import (
    check_apart,
    check_output_dir,
    check_space,
    clear,
    finish_renaming,
    is_complete,
    logs_in,
    new_output,
    unfinished,
    workplace,
)
from dreambooth.output.needed import check_needed
from dreambooth.output.pictures import LOSS_PLOT, save_photo_sheet
from dreambooth.output.publish import check_publishing, publish
from dreambooth.output.save import draw_samples, save_output
from dreambooth.subjects.class_folders import check_class_folders
from dreambooth.subjects.concepts import captioned, read_concepts
from dreambooth.subjects.identifier import choose_identifiers
from dreambooth.subjects.languages import tell_language
from dreambooth.subjects.nouns import noun_of
from dreambooth.subjects.words import Subject, fill_identifier, usual_prompts_of
from dreambooth.training.checkpoints import find_checkpoint, load_checkpoint
from dreambooth.training.course import check_rates, recipe_for
from dreambooth.training.loop import optimize
from dreambooth.training.loss import loss_means
from dreambooth.training.origin import origin_of, pictures_digest, what_was_given
from dreambooth.training.prepare import prepare_training
from dreambooth.training.processes import check_shared, clear_environment, make_accelerator, with_configuration
from dreambooth.training.samples import make_viewer
from dreambooth.training.selection import bring_best
from dreambooth.training.unused import tell_unseen, tell_unused


def train(s):
    """Fine-tune a model on a subject and write it to --output_dir."""
    s = with_configuration(s)
    concepts, name, metric_names, plan = settle_beforehand(s)
    clear_environment()
    accelerator = make_accelerator(s, plan)
    started = time.monotonic()
    with accelerator.main_process_first():
        concepts = described(s, with_drawn_masks(s, concepts, plan.device), plan.device)
    if accelerator.is_main_process:
        tell_photos(concepts)
    given = what_was_given(s, concepts, has_class_images(s), name)
    with accelerator.main_process_first():
        finish_renaming(s)
        is_done = s.resume == "latest" and is_complete(s, given)
        checkpoint = None if is_done else find_checkpoint(s, unfinished(s))
    if is_done:
        say(f"--resume: {s.output_dir} is complete already, with these very settings; nothing is left to do.")
        return publish(s) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()  # all have looked for checkpoints before the first tidies up
    with new_output(s) if accelerator.is_main_process else contextlib.nullcontext(workplace(s)) as folder:
        subjects, views, run = prepare(s, name, concepts, plan, accelerator)
        if run.hollow:
            check_shared(folder, accelerator)
        if checkpoint:
            load_checkpoint(run, checkpoint)
        viewer = make_viewer(run, concepts, subjects, metric_names)
        if accelerator.is_main_process:
            clear(folder, checkpoint, s.overwrite, logs_in(s))
            if run.scores:
                bring_best(run, checkpoint, folder)
            save_photo_sheet(folder, s, concepts, views)
        prepared = time.monotonic()
        with naming_next_plan(s, run.models.family, run.course.levers, plan, folder):
            optimize(run, folder, viewer)
        seconds = {"preparing": round(prepared - started, 1), "training": round(time.monotonic() - prepared, 1)}
        accelerator.free_memory()
        models = dataclasses.replace(take_apart(run.models.name, run.models.pipeline), book=run.models.book)  # without their wrappers
        if accelerator.is_main_process:
            save_output(folder, run, models, subjects, seconds, given)
    report_training(s, models.family, subjects, run.history, seconds)
    if accelerator.is_main_process:
        if s.export:
            write_export(s, find_trained(s.output_dir, "--output_dir"), models.pipeline)
        if s.samples:
            draw_samples(s, models, subjects, viewer, plan)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish(s)


def settle_beforehand(s):
    """(concepts, model's name, names of the metric networks or None, Plan): what can be told, and refused, before anything is
    loaded."""
    concepts = read_concepts(s, preserves_prior(s), METHODS[s.method].names_class)
    check_output_dir(s)
    check_apart(s, concepts)
    tell_unused(s, concepts)
    if has_class_images(s):
        check_class_folders(concepts)
        for concept in concepts:
            check_writable(concept.class_data_dir, "--class_data_dir")
    if s.mask == "auto":
        check_writable(s.mask_dir, "--mask_dir")
        check_drawing_masks(s, concepts)
    check_describing(s, concepts)
    if s.export:
        check_export(s)
    check_publishing(s)
    check_adapter(s)
    name = find_model(s.model_name or default_model(), "--model_name", s.revision)
    check_variant(name, s.variant)
    check_undistilled(name, "--model_name")
    family_at(name, "--model_name").check_flags(s)
    check_needed(s, name, concepts)
    metric_names = metric_models(s, [name]) if s.select_best else None
    plan = plan_device(s)
    check_levers(s, family_at(name, "--model_name"), plan)
    if has_class_images(s):
        class_image_plan(s, plan)  # for its complaint alone
    return concepts, name, metric_names, plan


def prepare(s, name, concepts, plan, accelerator):
    """(subjects, {photo: View}, Run): models, identifiers, what the training will be, pictures, latents, what trains."""
    import torch

    is_adapter = METHODS[s.method].is_adapter
    late = is_late(s, family_at(name, "--model_name"))
    models = load_late(name, plan.dtype, s.variant) if late else load_models(name, plan.dtype, is_adapter, s.variant)
    family, recipe = models.family, recipe_for(models.family, s, concepts)
    side = default(s.resolution, models.resolution)
    say(f"Model: {models.name} ({family.name}, {family.noise(s, models.pipeline, side).predicts}), {side} px")
    say(f"Machine: {machine_name(plan.device)}; arithmetic {'float32' if plan.precision == 'no' else plan.precision}")
    subjects = settle_subjects(s, models, concepts)
    course = set_course(s, models, subjects, recipe, plan)
    views = views_of(s, concepts, course.resolution, models.family.multiple(models.pipeline))
    if preserves_prior(s) and not METHODS[s.method].changes_class:
        say(f"Note: --method {s.method} leaves the class as it is; class images, or --prior frozen, cost time and change nothing.")

    photos = [captioned(concept, subject) for concept, subject in zip(concepts, subjects)]
    if late:
        drawn = {*usual_prompts_of(subjects), family.usual_negative}
        models.book.learn(models, sorted({caption for pool in photos for _, caption in pool} | drawn), plan.device)
        models = with_denoiser(models, plan.dtype if is_adapter else torch.float32, course.levers.base_precision,
                               plan.device if course.levers.offload_blocks else None)
    class_images, of_class = [], []
    if has_class_images(s):
        class_images, class_views = class_pools(s, models, concepts, views, class_image_plan(s, plan), accelerator)
        of_class, views = class_images, class_views | views
    elif preserves_prior(s):  # what the model makes of the photos themselves
        of_class = [[(path, subject.class_prompt) for path, _ in pool] for pool, subject in zip(photos, subjects)]
    fingerprint = models.fingerprint  # of the weights as they were loaded
    torch.manual_seed(s.seed)
    groups = parameter_groups(s, models, subjects, recipe)
    check_sound(groups, models.name)
    check_rates(s, groups)
    check_space(s, course, models, groups)
    cache = cache_latents(models, photos, of_class, course.resolution, plan.device, s.random_flip, views,
                          default(s.unmasked_weight, USUAL_FLOOR))
    check_length(models.pipeline, cache.prompts)
    for group in groups:
        say(f"Trains: {group.name}, {sum(p.numel() for p in group.parameters):,} weights, learning rate {group.lr:g}, "
            f"{math.ceil(min(group.until, 1) * course.steps)} steps, {course.lr_scheduler}")
    tell_unseen(s, course, photos, class_images, accelerator.num_processes)
    origin = origin_of(s, course, groups, fingerprint, pictures_digest(photos, class_images, views), accelerator.num_processes)
    return subjects, views, prepare_training(s, course, models, groups, cache, accelerator, origin)


def settle_subjects(s, models, concepts):
    """The Subjects of these concepts: every identifier is chosen or checked, and said."""
    if METHODS[s.method].adds_words:
        words = [f"<{c.name}>" if c.identifier == "auto" else c.identifier for c in concepts]
    else:
        words = choose_identifiers(models, concepts, s.seed, functools.partial(embed_ends, models))
    captions = [caption for concept in concepts for _, caption in concept.photos if caption]
    tell_language([text for c in concepts for text in (c.class_prompt or "", c.instance_prompt)] + captions, models.family.reads_english_alone)
    subjects = []
    for concept, word in zip(concepts, words):
        bare = Subject(word, concept.class_prompt or "", "", concept.name)
        subject = dataclasses.replace(bare, instance_prompt=fill_identifier(concept.instance_prompt, [bare], "--instance_prompt"))
        source = "" if has_class_images(s) else ", as the frozen model predicts the photos"
        prior = f'class: "{subject.class_prompt}", weight {s.prior_loss_weight:g}{source}' if preserves_prior(s) else "no class images"
        say(f'Subject "{subject.name}": "{subject.instance_prompt}", {len(concept.photos)} photos; {prior}')
        subjects.append(subject)
    return subjects


def report_training(s, family, subjects, history, seconds):
    """Say how the losses went, what was learnt, where it is and what to do next."""
    stretches = {"first 100": history[:100], "last 100": history[-100:]} if len(history) > 100 else {f"{len(history)}": history}
    for which, stretch in stretches.items():
        losses = ", ".join(f"{k} {v:.4f}" for k, v in loss_means(stretch).items() if v is not None)
        say(f"Mean loss of the {which} step{'s' * (which != '1')}: {losses}")
    say(f"Trained in {seconds['training']:.0f} s after {seconds['preparing']:.0f} s of preparation. The model is in "
        f"{s.output_dir}, with its losses in {LOSS_PLOT} and its use in {CARD}.")
    for subject in subjects:
        noun = noun_of(subject.class_prompt or subject.name)
        say(f'Learnt "{subject.name}": "{subject.instance_prompt}" is the {noun} of the photos.')
    if text := for_other_programs(s, family):
        say(text)
    say(f"Try next: {own_command()}"
        f' --infer --model_path "{s.output_dir}" --prompt "{subjects[0].instance_prompt} on the moon"')
