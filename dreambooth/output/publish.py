"""--push_to_hub: a finished output goes to the Hugging Face hub, without the photos.

The client finds the token by itself: hf auth login keeps one, --hub_token puts one into the environment. None is kept here.
"""

from pathlib import Path

from dreambooth.base import UserError, say
from dreambooth.output.folder import logs_in
from dreambooth.output.pictures import PHOTO_SHEET


def repository_of(s):
    """The id of the hub repository that an output is uploaded to, without an owner if that is whom the token belongs to."""
    return s.hub_model_id or Path(s.output_dir).resolve().name


def check_publishing(s):
    """UserError if an output could not be uploaded under its name; says so if there is no token yet."""
    if not s.push_to_hub:
        return
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository_of(s))
    except ValueError:
        raise UserError(f"--push_to_hub: {repository_of(s)} is no name of a repository; give --hub_model_id, such as me/my-dog"
                        ) from None
    if not huggingface_hub.get_token():
        say("Note: --push_to_hub: this machine has no token for the hub yet; until training is over, log in: hf auth login")


def publish(s):
    """Upload the complete --output_dir, if that is wanted. UserError if it fails: the output stays as it is."""
    if not s.push_to_hub:
        return
    import huggingface_hub

    left_out = [PHOTO_SHEET, f"{logs_in(s)}/**", "checkpoints/**"]
    try:
        repository = huggingface_hub.create_repo(repository_of(s), exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository.repo_id, folder_path=s.output_dir, ignore_patterns=left_out,
                                      commit_message="DreamBooth")
    except Exception as problem:  # whatever the client raises, the output is complete and the remedy is the same
        reason = " ".join(str(problem).replace(huggingface_hub.get_token() or "\0", "(the token)").split())[:200]
        raise UserError(f"--push_to_hub: the upload to {repository_of(s)} failed ({reason}); the output is complete in "
                        f"{s.output_dir}; log in with hf auth login and give the same command with --resume, which only "
                        f"uploads") from None
    say(f"Uploaded to {repository} (without {', '.join(left_out)}).")
