"""Pictures that the untouched model begins and the trained one ends: --subject_start.

The first denoising steps settle where things are, what surrounds them and in which colours; the later ones what they look like. A
model that was trained on a few photos knows the latter of its subject, and has lost something of the former. So the model as it was
before takes the first steps, told the prompt without the subject's word, and the trained one the rest.

No step is computed twice, and nothing has to be known of how a pipeline works: the untouched one is called first, and what its
denoiser puts out is kept; then the trained one is called, whose denoiser answers with that for so many steps.
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
from dreambooth.models.find import family_at, find_model
from dreambooth.models.load import load_pipeline
from dreambooth.models.parts import is_same_sample, sample_weights
from dreambooth.subjects.nouns import article_of, noun_of


@dataclass(frozen=True)
class Start:
    """How pictures begin."""

    share: float  # of the denoising steps
    untouched: typing.Any  # the pipeline that begins them; None: the one that ends them, without what stands beside its weights
    subjects: tuple  # whose words the untouched model does not know

    @property
    def note(self):
        """What a picture's text chunk says of it."""
        return {"Subject start": f"{self.share:g}"}

    def plain(self, prompt):
        """A prompt as the untouched model is told it."""
        return without_words(prompt, self.subjects)

    def steps(self, total):
        """How many of `total` steps the untouched model takes."""
        return round(self.share * total)

    @contextlib.contextmanager
    def begun(self, pipeline, total, prompts, call):
        """Within the block, the first of `total` steps of a call of `pipeline` are those of the untouched model.

        `call(pipeline, prompts, **options)` calls one of the two with these prompts and the noise of the pictures to be.
        """
        if not (count := self.steps(total)):
            yield
            return
        with beside_off(pipeline) if self.untouched is None else contextlib.nullcontext():
            steps, plain = count if count < total else None, list(map(self.plain, prompts))
            outputs = first_outputs(default(self.untouched, pipeline), steps, plain, call)
        with answering(family_of(pipeline).denoiser_of(pipeline), outputs):
            yield


def first_outputs(pipeline, count, prompts, call):
    """What a pipeline's denoiser puts out, call by call, in the first `count` steps of drawing, or in all."""
    outputs = []

    def stop(pipeline, number, timestep, tensors):
        pipeline._interrupt = number + 1 == count  # as diffusers has it; the pipeline itself resets it
        return tensors
    hook = family_of(pipeline).denoiser_of(pipeline).register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        call(pipeline, prompts, output_type="latent", callback_on_step_end=stop)
    finally:
        hook.remove()
    return outputs


@contextlib.contextmanager
def answering(denoiser, outputs):
    """Within the block, a denoiser answers its first calls with `outputs`, one each."""
    compute, own, left = denoiser.forward, vars(denoiser).get("forward"), iter(outputs)

    def forward(*given, **named):
        output = next(left, None)
        return compute(*given, **named) if output is None else output
    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
        if own is not None:  # such as of what moves parts to the GPU when it is their turn
            denoiser.forward = own


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


def begun_as(s, base, subjects, prompts):
    """Prompts as the untouched model is told them, where it begins the pictures of the model at `base`."""
    share = default(s.subject_start, family_at(base, "--model_path").subject_start)
    return [without_words(prompt, subjects) for prompt in prompts] if share else []


def start_of(s, base, trained, adapters, pipeline, plan):
    """The Start of pictures of a loaded pipeline with everything in it, by --subject_start or as its family has it; None for none.

    UserError, or a line where nobody asked for it, if the model that was trained on is not at hand.
    """
    share = default(s.subject_start, family_of(pipeline).subject_start)
    learnt = [each for each in (trained, *(each for each, _ in adapters)) if each.is_adapter or each.record]
    if not learnt and s.subject_start:
        say(f"Note: --subject_start {share:g} changes nothing: {trained.source} has no record of a training.")
    if not (share and learnt):
        return None
    try:
        untouched = another_pipeline(base, trained, adapters, plan.dtype)
    except UserError as problem:
        if s.subject_start is not None:
            raise
        say(f"Note: {problem}; so the trained model draws all by itself.")
        return None
    return Start(share, untouched and placed(untouched, plan.device), tuple(subject for each in learnt for subject in each.subjects))


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
