"""DreamBooth in one file: teach a text-to-image diffusion model your subject, then draw it anywhere.

    python dreambooth_implementation.py --train --instance_data_dir ./instance_images --class_prompt "a dog"
    python dreambooth_implementation.py --infer --prompt "a [identifier] dog on the moon"
    python dreambooth_implementation.py --evaluate
    python dreambooth_implementation.py --export my_dog.safetensors --model_path ./output
    python dreambooth_implementation.py --help

Three to five photos of one subject fine-tune every layer of the UNet (and, with --train_text_encoder, of the text
encoders) of a Stable Diffusion 1.x, 2.x or XL model. Pictures of the subject's class, drawn by the model before it is
tuned, are trained beside the photos so that the class is not forgotten. The result is an ordinary diffusers pipeline.
With --method lora, textual_inversion or pivotal a small file is trained instead, and the model itself stays as it is.

Method: Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
arXiv 2208.12242. "Paper" below means this one.

torch, diffusers and transformers take seconds to import: each function that needs one imports it, so that --help
and every complaint about the input answer at once.
"""
