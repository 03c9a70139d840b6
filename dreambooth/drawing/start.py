"""Pictures that the untouched model begins together with the trained one: --subject_start.

The first denoising steps settle where things are, what surrounds them and in which colours; the later ones what they look like. A
model that was trained on a few photos knows the latter of its subject, and has lost something of the former. So in the first steps
the model as it was before, told the prompt without the subject's word, takes turns with the trained one, which does all the others.

Nothing has to be known of how a pipeline works: the untouched one is called for its first step, and what its denoiser was told is
kept. Then the trained one is called, and at every turn of the other its denoiser lets that one answer: what changes from step to
step is the trained one's, and what does not, such as the prompt, is the untouched one's.
"""

import contextlib
import functools
import re
import typing
from dataclasses import dataclass
from pathlib import Path

from dreambooth.base import HERE, UserError, default, say
from dreambooth.drawing.draw import placed
from dreambooth.drawing.merged import merged_type
from dreambooth.models.families.family import text_encoders_of
from dreambooth.models.families.known import family_of
from dreambooth.models.find import find_model
from dreambooth.models.load import load_pipeline
from dreambooth.models.parts import is_same_sample, sample_weights
from dreambooth.subjects.nouns import article_of, noun_of


@dataclass(frozen=True)
class Start:
    """How pictures begin."""

    share: float  # of the denoising steps in which the two take turns, the untouched one first
    untouched: typing.Any  # the other pipeline; None: the one that is trained, without what stands beside its weights
    subjects: tuple  # whose words the untouched model does not know

    @property
    def note(self):
        """What a picture's text chunk says of it."""
        return {"Subject start": f"{self.share:g}"}

    def plain(self, prompt):
        """A prompt as the untouched model is told it."""
        return without_words(prompt, self.subjects)

    def steps(self, total):
        """In how many of `total` steps the two take turns."""
        return round(self.share * total)

    @contextlib.contextmanager
    def begun(self, pipeline, total, prompts, call):
        """Within the block, the two take turns in the first of `total` steps of a call of `pipeline`.

        `call(pipeline, prompts, **options)` calls one of the two with these prompts and the noise of the pictures to be.
        """
        if not (count := self.steps(total)):
            yield
            return
        other = default(self.untouched, pipeline)
        its_denoiser, apart = family_of(other).denoiser_of(other), self.untouched is not None
        compute = its_denoiser if apart else its_denoiser.forward
        with contextlib.nullcontext() if apart else beside_off(pipeline):
            told, outputs = first_step(other, its_denoiser, list(map(self.plain, prompts)), call)

        def untouched(*given, **named):
            with contextlib.nullcontext() if apart else beside_off(pipeline):
                return compute(*given, **named)
        with taking_turns(family_of(pipeline).denoiser_of(pipeline), untouched, count, told, outputs):
            yield


def first_step(pipeline, denoiser, prompts, call):
    """([(arguments, named ones)], [output]) of each call of a pipeline's denoiser in the first step of drawing."""
    told, outputs = [], []

    def stop(pipeline, number, timestep, tensors):
        pipeline._interrupt = True  # as diffusers has it; the pipeline itself resets it
        return tensors

    def keep(module, given, named, output):
        told.append((given, named))
        outputs.append(output)
    hook = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        call(pipeline, prompts, output_type="latent", callback_on_step_end=stop)
    finally:
        hook.remove()
    return told, outputs


@contextlib.contextmanager
def taking_turns(denoiser, untouched, count, told, outputs):
    """Within the block, every other one of a denoiser's first `count` steps, from the first on, is what `untouched` answers.

    `told` and `outputs` are of first_step(); a step has as many calls as that.
    """
    compute, own, number, first = denoiser.forward, vars(denoiser).get("forward"), -1, []

    def forward(*given, **named):
        nonlocal number
        number += 1
        step, turn = divmod(number, len(told))
        if step == 0:
            first.append((given, named))
            return outputs[turn]
        if step >= count or step % 2:
            return compute(*given, **named)
        return untouched(*map(kept_or_new, first[turn][0], given, told[turn][0]),
                         **{name: kept_or_new(first[turn][1][name], value, told[turn][1][name]) for name, value in named.items()})
    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
        if own is not None:  # such as of what moves parts to the GPU when it is their turn
            denoiser.forward = own


def kept_or_new(first, now, its):
    """An argument of the untouched denoiser's: `its` own where the trained one's is what it was in the first step, else the new one."""
    return its if is_same(first, now) else now


def is_same(one, other):
    """Whether two arguments of a denoiser are equal: tensors, numbers, or lists and dictionaries of them."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


@contextlib.contextmanager
def beside_off(pipeline):
    """Within the block, a pipeline is without the LoRAs that stand beside its weights, if there are any."""
    parts = [family_of(pipeline).denoiser_of(pipeline), *text_encoders_of(pipeline).values()]
    if not any(getattr(part, "peft_config", None) for part in parts):
        yield
        return
    pipeline.disable_lora()
    try:
        yield
    finally:
        pipeline.enable_lora()


def without_words(prompt, subjects):
    """A prompt of the classes of these subjects instead of them."""
    return functools.reduce(without_word, subjects, prompt)


def without_word(prompt, subject):
    """A prompt of a subject's class instead of it: "a phol owl on the moon" is "an owl on the moon"."""
    noun, article = (of(subject.class_prompt) if subject.class_prompt else "" for of in (noun_of, article_of))
    if not subject.identifier:
        return prompt
    word = rf"(?<!\w){re.escape(subject.identifier)}(?!\w)" + (rf"(?: {re.escape(noun)}(?!\w))?" if noun else " ?")
    return re.sub(rf"(\ban? )?{word}", lambda found: f"{article} {noun}".strip() if found[1] else noun, prompt, flags=re.IGNORECASE)


def begun_as(s, subjects, prompts):
    """Prompts as the untouched model is told them, where it begins pictures with the trained one."""
    return [without_words(prompt, subjects) for prompt in prompts] if s.subject_start else []


def start_of(s, base, trained, adapters, pipeline, plan):
    """The Start of pictures of a loaded pipeline with everything in it, by --subject_start; None for none.

    UserError if the model that was trained on is not at hand.
    """
    learnt = [each for each in (trained, *(each for each, _ in adapters)) if each.is_adapter or each.record]
    if s.subject_start and not learnt:
        say(f"Note: --subject_start {s.subject_start:g} changes nothing: {trained.source} has no record of a training.")
    if not (s.subject_start and learnt):
        return None
    untouched = another_pipeline(base, trained, adapters, plan.dtype)
    return Start(s.subject_start, untouched and placed(untouched, plan.device),
                 tuple(subject for each in learnt for subject in each.subjects))


def another_pipeline(base, trained, adapters, dtype):
    """The pipeline of the model that was trained on, where what was learnt is in the weights; None where it stands beside them.

    UserError if it is not at hand.
    """
    if trained.record and not trained.is_adapter:
        return base_of_full(trained, dtype)
    loras = [each.lora for each in (trained, *(each for each, _ in adapters)) if each.lora]
    return load_pipeline(base, dtype, "--model_path") if any(map(merged_type, loras)) else None


def base_of_full(trained, dtype):
    """The pipeline of the model that a whole model was trained from, by its record."""
    recorded = trained.record.get("base_model")
    whose = f"--subject_start: {trained.source} was trained on {recorded}, which begins its pictures, and"
    place = next((place for place in (recorded, str(HERE / recorded)) if Path(place).exists()), recorded)
    try:
        found = load_pipeline(find_model(place, "--subject_start"), dtype, "--subject_start",
                              variant=trained.record.get("settings", {}).get("variant"))
    except UserError as problem:
        raise UserError(f"{whose} that is not at hand ({problem}); bring it there, or give --subject_start 0") from None
    expected = trained.record.get("base_sample")
    if isinstance(expected, dict) and not is_same_sample(expected, sample_weights(found)):
        raise UserError(f"{whose} {place} has other weights now; bring the one it was back, or give --subject_start 0")
    return found
