"""Pictures from a pipeline: one for each prompt and seed, as many at once as memory allows.

Knows nothing of subjects or training.
"""

import contextlib
import itertools

from dreambooth.base import UserError, is_first_process, say, slug
from dreambooth.images import image_grid, is_flat, save_picture
from dreambooth.mishaps import mishap
from dreambooth.models.families.known import family_of, guidance_scale
from dreambooth.progress import progress
from dreambooth.threads import threads_that_help


def draw(pipeline, jobs, *, steps, guidance_scale, height, width, batch_size, negative_prompt="", title="drawing", models=None,
         start=None):
    """Yield one PIL image per (prompt, seed) in `jobs`, in order, `batch_size` at a time; None: as many as fit.

    Late `models` give the pipeline their prompts' conditioning, as its text encoders are not there. By a Start another model begins them, too.
    Each picture's noise comes from its own seed on the CPU, so it depends neither on its neighbours nor on the device.
    Where memory is full all the same, the pipeline is offloaded and stays so until its remove_all_hooks().
    """
    import torch

    look = dict(num_inference_steps=steps, height=height, width=width)
    size = batch_size or (16 if pipeline._execution_device.type == "cuda" or height * width <= 128**2 else 4)
    told = prompts_given(pipeline, models, guidance_scale, negative_prompt)
    drawn = draw_batches(pipeline, jobs, size, batch_size is None, told, look, start)
    drawn = progress(drawn, title, "image", len(jobs), hidden=not is_first_process(), weigh=len)
    for picture, (prompt, _) in zip(itertools.chain.from_iterable(drawn), jobs):
        if is_flat(picture):
            check_weights(pipeline)
        if is_flat(picture) and pipeline.dtype != torch.float32:
            raise UserError(f'"{prompt}" came out in one flat colour, as happens when {pipeline.dtype} overflows; give '
                            f"--mixed_precision no")
        yield picture


def check_weights(pipeline):
    """UserError if a part of a pipeline holds what is no number, as merges and trainings that overflowed leave it.

    Parts in fewer bits are not looked at: they are whole numbers.
    """
    import torch

    parts = {part: module for part, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    for part, module in parts.items():
        if not getattr(module, "is_quantized", False) and not all(p.float().isfinite().all() for p in module.parameters()):
            raise UserError(f"{pipeline.name_or_path}: weights of its {part} are no numbers (NaN or infinite), so that it draws "
                            f"nothing; give another copy of the model, or another model")


def draw_batches(pipeline, jobs, size, may_halve, told, look, start=None):
    """Yield lists of the pictures of draw(), `size` in each. Once memory is full: fewer, if they may be, then by parts in turn."""
    import torch

    threads = threads_that_help(pipeline._execution_device)  # where it computes; offloaded, its parts wait on the CPU
    done, precision, all_there = 0, pipeline.vae.dtype, pipeline.device.type == "cuda"
    while done < len(jobs):
        prompts, seeds = zip(*jobs[done:done + size])
        try:
            pictures = draw_batch(pipeline, prompts, seeds, told, look, start, threads)
        except torch.OutOfMemoryError:
            can_halve, pictures = may_halve and size > 1, []  # what follows waits until the error is gone, and what it holds
            if not (can_halve or all_there):
                raise
        if pictures:
            yield pictures
            done += size
            continue
        pipeline.maybe_free_model_hooks()  # parts that take turns: the one that found no room is there still
        pipeline.vae.to(precision)  # SDXL's fp16 one is in float32 while it decodes
        if can_halve:
            size //= 2
            say(f"Memory is full: pictures are drawn {size} at a time from here.")
        else:
            take_turns(pipeline, pipeline.device)
            all_there = False


def draw_batch(pipeline, prompts, seeds, told, look, start, threads):
    """The pictures of these prompts, each with the noise of its seed."""
    import torch

    def call(pipeline, prompts, **options):
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        return called(pipeline, generator=noise, **told(prompts), **look, **options).images
    total = look["num_inference_steps"]
    with start.begun(pipeline, total, prompts, call) if start else contextlib.nullcontext():
        return call(pipeline, prompts, **counting(threads, len(prompts), 1 if start and start.steps(total) else 0))


def prompts_given(pipeline, models, scale, negative_prompt):
    """A function from prompts to what a pipeline's call is given of them and of the guidance."""
    family, book = family_of(pipeline), models and models.book
    negative = negative_prompt or family.usual_negative

    def told(prompts):
        negatives = [negative] * len(prompts)
        if not book:
            return {"prompt": list(prompts)} | family.call_options(scale, negatives if negative else None)
        device = pipeline._execution_device
        rows = (book.rows(models, texts, device) for texts in (prompts, negatives))
        return family.call_options(scale, None) | family.book_options(*rows)
    return told


def called(pipeline, **options):
    """What a pipeline returns. UserError for whatever its code finds wrong with the model, as where its configs disagree."""
    import torch

    try:
        return pipeline(**options)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        if mishap(problem):  # the machine's fault
            raise
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"{pipeline.name_or_path}: it cannot be drawn with ({type(problem).__name__}: {reason}); its scheduler, or "
                        f"another of its configs, is damaged or of another model") from None


def counting(threads, pictures, begun=0):
    """Options of a pipeline's call that tell `threads`, if there are any to choose, of each denoising step of so many pictures, but
    for those that are `begun`, of which nothing is computed."""
    if threads is None:
        return {}

    def count(pipeline, number, timestep, tensors):
        threads.lap(pictures) if number >= begun else threads.start()
        return tensors
    threads.start()
    return {"callback_on_step_end": count}


def in_precision(pipeline, dtype):
    """`pipeline` with its parts in this precision, but for those in fewer bits, which stay as they are."""
    import torch

    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and not getattr(part, "is_quantized", False):
            part.to(dtype)
    return pipeline


def placed(pipeline, device):
    """`pipeline` with all its parts on the device; where memory is too small for that, they are to take turns there."""
    import torch

    try:
        return pipeline.to(device)
    except torch.OutOfMemoryError:
        pass  # the error holds what filled the memory until here
    take_turns(pipeline, device)
    return pipeline


def take_turns(pipeline, device):
    """Have each part of the pipeline come to the device when it is its turn, until remove_all_hooks()."""
    say("Memory is full: the parts of the model take turns on the GPU from here, which is slower.")
    pipeline.enable_model_cpu_offload(device=device)


def draw_pictures(folder, pipeline, s, prompts, seeds, model, size, models=None, start=None):
    """Draw every prompt with every seed into `folder`, one PNG each and a grid of all; returns the grid's path.

    `model` is what the pictures' text chunks say of the model, `size` is (width, height).
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    guidance, pictures, common = guidance_scale(s, pipeline), [], sampling_settings(s, pipeline, start)
    negative = [f"Negative prompt: {s.negative_prompt}"] if s.negative_prompt else []
    drawn = draw(pipeline, jobs, steps=s.num_inference_steps, guidance_scale=guidance, height=size[1], width=size[0],
                 batch_size=s.sample_batch_size, negative_prompt=s.negative_prompt, models=models, start=start)
    for picture, (prompt, seed) in zip(drawn, jobs):
        settings = {**common, "Seed": seed, "Size": f"{picture.width}x{picture.height}", **model}
        lines = [prompt, *negative, ", ".join(f"{key}: {value}" for key, value in settings.items())]
        save_picture(folder, f"{slug(prompt)}-{seed}", picture, "\n".join(lines))
        pictures.append(picture)
    return save_picture(folder, f"grid-{slug(prompts[0])}-{seeds[0]}", image_grid(pictures, columns=len(seeds)),
                        "\n".join([*prompts, *negative, f"Seeds: {seeds[0]} to {seeds[-1]}, {common | model}"]))


def sampling_settings(s, pipeline, start=None):
    """What a picture's text chunk says of how it was drawn, beside prompt, seed, size and model."""
    return {"Steps": s.num_inference_steps, "Sampler": type(pipeline.scheduler).__name__.removesuffix("Scheduler"),
            "CFG scale": guidance_scale(s, pipeline)} | (start.note if start else {})
