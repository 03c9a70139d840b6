"""Prompts that are not English, told without a dictionary: by their letters, and by the articles of some languages."""

import re
import unicodedata

from dreambooth.base import say

# Those that are no English words: un chien, ein Hund, una foto, um cachorro, een hond. In capitals they would be names.
ARTICLES = """un une mon ein eine einen einem einer mein meine meinen meinem meiner una um uma een mijn""".split()
WITH_ARTICLE = re.compile(rf"^(.*[ '’]|)((?:{'|'.join(ARTICLES)}) )(.+)$", re.DOTALL)


def is_latin(text):
    """Whether the letters of a text are those of English, accents aside; no more than a third of them may be others."""
    letters = [letter for letter in text if letter.isalpha()]
    return 3 * sum("LATIN" not in unicodedata.name(letter, "") for letter in letters) <= len(letters)


def tell_language(prompts, reads_english_alone):
    """Say that prompts are not English, if a model's text encoder reads nothing else."""
    strange = [prompt for prompt in dict.fromkeys(prompts) if not is_latin(prompt) or WITH_ARTICLE.match(prompt)]
    if strange and reads_english_alone:
        say(f'Note: "{strange[0][:60]}"{f" (and {len(strange) - 1} more)" if strange[1:] else ""} is not English, and this model learnt '
            f"from English captions alone: it hardly knows what is meant. Say it in English, such as \"a dog\".")
