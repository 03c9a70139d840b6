"""The prompts that are evaluated: the paper's two lists of 25, the bundled world's, or a person's own."""

import re

from dreambooth.base import HERE, UserError, say, short_path
from dreambooth.evaluation.networks import knows_only_emoji
from dreambooth.files import read_text
from dreambooth.subjects.nouns import article_of, head_of, noun_of, singular
from dreambooth.subjects.syntax import tell_syntax
from dreambooth.subjects.words import fill_identifier, mentions, with_places

# The paper's prompts: google/dreambooth, dataset/prompts_and_classes.txt.
PLACES = (
    "in the jungle, in the snow, on the beach, on a cobblestone street, on top of pink fabric, on top of a wooden floor, "
    "with a city in the background, with a mountain in the background, with a blue house in the background, "
    "on top of a purple rug in a forest")
OTHER_PLACES = (
    "with a wheat field in the background, with a tree and autumn leaves in the background, "
    "with the Eiffel Tower in the background, floating on top of water, floating in an ocean of milk, "
    "on top of green grass with sunflowers around it, on top of a mirror, on top of the sidewalk in a crowded street, "
    "on top of a dirt road, on top of a white rug")
ACCESSORIES = (
    "wearing a red hat, wearing a santa hat, wearing a rainbow scarf, wearing a black top hat and a monocle, "
    "in a chef outfit, in a firefighter outfit, in a police outfit, wearing pink glasses, wearing a yellow shirt, "
    "in a purple wizard outfit")
PROPERTIES = "red, purple, shiny, wet, cube shaped"
PROMPTS = {kind: [f"a [identifier] [class] {how}" for how in f"{PLACES}, {more}".split(", ")]
                 + [f"a {what} [identifier] [class]" for what in PROPERTIES.split(", ")]
           for kind, more in (("object", OTHER_PLACES), ("live", ACCESSORIES))}
BUNDLED_PROMPTS = HERE / "demo" / "prompts.txt"  # for the bundled model: of the places and colours that it knows
LIVE = """dog puppy cat kitten horse pony rabbit bunny hamster mouse fox wolf bear lion tiger elephant monkey cow goat sheep
    pig bird parrot owl duck penguin chicken fish turtle frog lizard pet person man woman boy girl child""".split()
NOT_LIVE = re.compile(r"\b(toy|teddy|stuffed|plush|rubber)\b")  # the paper's plushies and its toy duck are objects


def is_live(class_prompt):
    """Whether a class is of living things, by its noun."""
    noun = noun_of(class_prompt).lower()
    return singular(head_of(noun)) in LIVE and not NOT_LIVE.search(noun)


def usual_prompts(s, base, subject):
    """The 25 prompts for a subject; says which."""
    if s.subject_type == "auto" and knows_only_emoji(base) and BUNDLED_PROMPTS.is_file():
        say(f'Prompts for "{subject.name}": those of the bundled model\'s world, {short_path(BUNDLED_PROMPTS)}.')
        return read_prompts(BUNDLED_PROMPTS, "--prompts_file")
    kind = s.subject_type if s.subject_type != "auto" else "live" if is_live(subject.class_prompt) else "object"
    say(f'Prompts for "{subject.name}": the paper\'s for {kind} subjects; --subject_type chooses.')
    return PROMPTS[kind]


def read_prompts(path, flag):
    """The prompts of a text file, one a line. Raises UserError if one has no [identifier]."""
    lines = [with_places(line.strip()) for line in read_text(path, flag).splitlines() if line.strip()]
    if not lines:
        raise UserError(f'{flag} {path}: no prompts; write one a line, such as "a [identifier] [class] on the moon"')
    for number, line in enumerate(lines, 1):
        if "[identifier]" not in line:
            raise UserError(f'{flag} {path}: prompt {number}, "{line}", has no [identifier] where the subject belongs')
    tell_syntax(lines, source=f"{flag} {path}: ")
    return lines


def fill_template(template, subject, names_class):
    """(the prompt as drawn, the prompt without the identifier, which CLIP compares a picture with).

    'a [identifier] [class] on the moon' gives 'a phol owl on the moon' and 'an owl on the moon'. A word that stands for the
    noun as well is drawn without it; a model that has no word for the subject draws the second.
    """
    noun, article = noun_of(subject.class_prompt), article_of(subject.class_prompt)
    if not article:  # "phol glasses", not "a phol glasses"
        template = re.sub(r"\ba (?=(?:[\w-]+ )*\[identifier\])", "", template)
    names_noun = "[class]" in template or mentions(template.replace("[identifier]", ""), noun)
    caption = template if names_noun else template.replace("[identifier]", "[identifier] [class]")
    caption = re.sub(r"\ba \[identifier\] \[class\]", f"{article} [class]", caption)
    caption = re.sub(r"\[identifier\] ?", "", caption).replace("[class]", noun)
    if not subject.identifier:
        return caption, caption
    drawn = template.replace("[class]", noun) if names_class else template.replace(" [class]", "")
    return fill_identifier(drawn, [subject], "--prompts_file"), caption
