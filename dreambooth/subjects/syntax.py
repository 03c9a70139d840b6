"""What people write in prompts for other programs: said, since here it is read as plain words."""

import re

from dreambooth.base import say

# What is seen -> what to do instead. One line each, however many prompts have it.
ELSEWHERE = {
    r"<(?:lora|lyco|hypernet):[^<>]*>": "is read as plain words; add a LoRA with --adapter PATH=STRENGTH when drawing",
    r"\bembedding:\S+": "is read as plain words; add an embedding with --adapter when drawing, and write its word",
    r"\([^()]*:\s*[-+]?\d*\.?\d+\s*\)|\[[^\[\]]*:\s*\d*\.?\d+\s*\]|\(\([^()]+\)\)|\b\w+\+\+|\)(?:\d\.\d|\+|-)(?![\w.])":
        "is read as plain words; there are no weights of words here: leave brackets and number out",
    r"(?<!\S)(?:BREAK|AND)(?!\S)": "is read as a plain word; a prompt is one piece here",
    r"(?<!\S)--?[a-z]+ \d+(?::\d+)?(?!\S)|(?<!\S)--[a-z]+(?: [\w.:]+)?":
        "is read as plain words; what is not in the picture belongs in flags, such as --width, --seed, --negative_prompt",
    r"__[\w/-]+__|\{[^{}]*\|[^{}]*\}": "is read as it stands; nothing is chosen at random here: give several prompts",
    r"\\[()\[\]]": "is read with its backslash; brackets need none here"}
BRACKETS = re.compile(r"\[[^\[\]]+\]|<[^<>]+>|\{[^{}]+\}")
RARE_ELSEWHERE = "sks ohwx zwx tok xjy".split()  # that tutorials and other trainers use


def tell_syntax(prompts, words=(), source=""):
    """Say what in these prompts is of other programs. `words` are the identifiers, which are known whatever they look like."""
    prompts, seen = list(dict.fromkeys(prompts)), {}
    for prompt in prompts:
        rest = re.sub(r"\[(?:identifier(?::[^\]]*)?|class)\]", "", prompt)
        for word in words:
            rest = rest.replace(word, "")
        for pattern, remedy in ELSEWHERE.items():
            for match in re.finditer(pattern, rest):
                seen.setdefault(remedy, []).append(match[0])
            rest = re.sub(pattern, " ", rest)
        for match in BRACKETS.finditer(rest):
            seen.setdefault("is read letter by letter; the place of the rare word is written [identifier]", []).append(match[0])
    for remedy, found in seen.items():
        say(f'Note: {source}"{found[0]}"{f" (and {len(found) - 1} more)" if found[1:] else ""} {remedy}.')


def foreign_words(prompt):
    """The rare words of tutorials and other trainers that a prompt has."""
    return [word for word in re.findall(r"\w+", prompt) if word.lower() in RARE_ELSEWHERE]


def tell_prompts(prompts, subjects):
    """Say what in prompts to draw is of other programs, or is the rare word of another tutorial and not of these subjects."""
    words = [subject.identifier for subject in subjects]
    tell_syntax(prompts, words)
    strange = [word for prompt in prompts for word in foreign_words(prompt) if word.lower() not in map(str.lower, words)]
    if strange and words:
        say(f'Note: "{strange[0]}" is not the word of this model\'s subject; that is "{words[0]}", written [identifier].')
