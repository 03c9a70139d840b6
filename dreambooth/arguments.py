"""Reading the command line: a parser made from `settings` and `compatible`, and Settings or one line from what it gets.

Whatever is wrong with the flags of a command is told together, before anything slow is imported.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from pathlib import Path

from dreambooth.base import UserError, own_command, say
from dreambooth.compatible import EFFECTIVE, FOREIGN_FLAGS, GIVEN, LORA_SIGNS, SCRIPT_METHODS
from dreambooth.settings import CONCEPT_FLAGS, DESCRIPTION, MODES, Settings, _value_type, given_value

FIELDS = {field.name: field for field in dataclasses.fields(Settings)[1:]}
HELP_HINT = "--help lists the flags"
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # as editors of text make them of - and --
TEXT_FLAGS = ("prompt", "negative_prompt", "validation_prompt", "class_prompt", "instance_prompt", "identifier", "initializer_token")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def build_parser():
    """The argparse parser of all flags. One that was not given leaves no attribute; others' flags have their own names."""
    parser = _Parser(description=DESCRIPTION, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     formatter_class=argparse.RawDescriptionHelpFormatter, prog=own_command() if __package__ else None,
                     usage="%(prog)s (--train | --infer | --evaluate | --export FILE) [flags]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", dest="mode", action="store_const", const="train", help="teach a model the subject")
    what.add_argument("--infer", dest="mode", action="store_const", const="infer", help="draw with a trained model")
    what.add_argument("--evaluate", dest="mode", action="store_const", const="evaluate",
                      help="measure a trained model with the paper's metrics")
    groups = {name: parser.add_argument_group("with " + " and ".join(f"--{mode}" for mode in modes))
              for name, modes in MODES.items()}
    for name, field in FIELDS.items():
        groups[field.metadata["mode"]].add_argument(f"--{name}", help=help_of(field), **options_of(field))
    lines = [f"--{name}{f' {each.takes}' * bool(each.takes)}: {each.here}" for name, each in FOREIGN_FLAGS.items()]
    group = parser.add_argument_group("with --train, for commands of diffusers' scripts and others", "\n".join(lines))
    for name, foreign in FOREIGN_FLAGS.items():
        group.add_argument(f"--{name}", help=argparse.SUPPRESS, **foreign_options(foreign))
    return parser


def help_of(field):
    """A flag's help: what it is, and its default in words."""
    default = field.metadata.get("shown", "off" if field.default is False else "on" if field.default is True else field.default)
    return f"{field.metadata['help']} (default: {'none' if default == '' else default})".replace("%", "%%")


def options_of(field):
    """What argparse wants to know of a flag."""
    meta, (kind, is_list) = field.metadata, _value_type(field.type)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    options = {"type": meta.get("parse", kind), "choices": meta.get("choices"), "action": "append" if is_list else "store",
               "metavar": None if meta.get("choices") else kind.__name__.upper()}
    return options | ({"nargs": "?", "const": meta["const"]} if "const" in meta else {})


def foreign_options(foreign):
    """What argparse wants to know of another program's flag: as the setting of the same meaning has it, or what it takes."""
    if same := next((name for name, value in foreign.sets.items() if value is GIVEN), None):
        return options_of(FIELDS[same])
    if foreign.takes is None:
        return {"action": "store_true"}
    return {"nargs": "+" if foreign.takes.endswith("...") else None}


def parse_settings(argv=None):
    """Settings from the command line; says what it made of another program's flags. UserError for whatever is wrong with it."""
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    script = Path(argv[0]).name if argv and Path(argv[0]).name in SCRIPT_METHODS else None
    given = read_flags(argv[1:] if script else argv)
    foreign = {name: value for name, each in FOREIGN_FLAGS.items() if name in given and (value := given.pop(name)) != each.off}
    spelling = translate(given, foreign)
    notes = complete(given, foreign, spelling, script)
    notes += [f"--{name}: {FOREIGN_FLAGS[name].here}" for name in foreign if GIVEN not in FOREIGN_FLAGS[name].sets.values()]
    settings = Settings(**{name: given_value(value, name) for name, value in given.items()})
    check_settings(settings, given, spelling)
    if foreign and settings.mode != "train" and (stray := foreign.keys() - set(spelling.values())):
        raise UserError(f"--{min(stray)} belongs to --train and has no meaning with --{settings.mode}")
    notes += [f"--{name}: no effect, it needs {needs}" for name, (needs, has_effect) in EFFECTIVE.items()
              if name in given and not has_effect(settings)]
    for name in foreign:
        if variable := FOREIGN_FLAGS[name].environment:
            os.environ[variable] = foreign[name]
    if notes:
        say(f"Flags: {'; '.join(notes)}.")
    return settings


def read_flags(argv):
    """{flag without its dashes: value} of what was given. UserError, all in one line, for flags unknown or not to be had."""
    switches = [f"no-{name}" for name, field in FIELDS.items() if _value_type(field.type)[0] is bool]
    known = [*FIELDS, *switches, *FOREIGN_FLAGS, "train", "infer", "evaluate", "help"]
    words = [word.partition("=")[0] for word in argv if word.startswith("--") and word != "--"]
    names = dict.fromkeys(word.removeprefix("--") for word in words if len(word.split()) == 1)
    wrong = [f"--{name} is unknown{nearest(name, known)}" for name in names if name not in known]
    wrong += [f"--{name}: {FOREIGN_FLAGS[name].here}" for name in names
              if name in FOREIGN_FLAGS and not FOREIGN_FLAGS[name].can_be_had]
    wrong += [alone(word.partition("=")[0]) for word in argv if "=" in word and is_switch(word.partition("=")[0])]
    given = {}
    try:
        namespace, rest = build_parser().parse_known_args(argv)
        given = vars(namespace)
        if rest and not wrong:
            wrong.append(stray(rest[0], argv[:argv.index(rest[0])]))
    except UserError as problem:
        if "ignored explicit argument" not in str(problem):  # which is among the wrong already
            wrong.append(str(problem))
    wrong += [f"--{name} {given[name]}: not to be had: {foreign.here.removeprefix('needless: ')}; {foreign.otherwise}"
              for name, foreign in FOREIGN_FLAGS.items() if name in given and foreign.is_refused(given[name])]
    for name, value in given.items():
        if value == "" and name not in TEXT_FLAGS:
            wrong.append(f"--{name} is empty: a variable such as $MODEL_NAME that is not set? Give a value, or leave it out")
        if value == [] or isinstance(value, list) and [] in value:  # what argparse makes of --flag=--
            wrong.append(f"--{name}: expected one argument")
    if not str(given.get("hub_token", "")).isprintable():
        wrong.append("--hub_token: this is no token of the hub")
    if wrong:
        raise UserError(printable(f"{'; '.join(wrong)}; {HELP_HINT}"))
    return given


def printable(text):
    """`text` in one line, without what would not be seen."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def is_switch(word):
    """Whether this is a flag that is given alone."""
    name = word.removeprefix("--")
    if name in FOREIGN_FLAGS:
        return foreign_options(FOREIGN_FLAGS[name]).get("action") == "store_true"
    field = FIELDS.get(name.removeprefix("no-"))
    return word.startswith("--") and field is not None and _value_type(field.type)[0] is bool


def alone(switch):
    """What to tell of a value given to a switch."""
    name = switch.removeprefix("--").removeprefix("no-")
    return f"{switch}: takes no value; give it alone, or leave it out" + f" (--no-{name} is off)" * (name in FIELDS)


def stray(word, before=()):
    """What to tell of a word that belongs to no flag, and of those before it: it comes from how commands are copied."""
    shown = printable(word)[:60]
    if before and is_switch(before[-1]) and (word[:1].isdigit() or word.lower() in ("true", "false", "yes", "no", "on", "off")):
        return alone(before[-1])
    if not word.strip("\\^`\r\n\t "):
        return "a line of the command ends in more than its mark: \\ (in PowerShell `, in cmd ^) must be the very last character"
    if word.startswith(tuple(DASHES)):
        return f'"{shown}" begins with a printed dash; type --'
    if word.endswith(".py"):
        return f"{shown}: no script whose flags are known; those of {', '.join(SCRIPT_METHODS)} are, named first"
    return f'"{shown}" belongs to no flag; put quotes around a text of several words'


def nearest(name, known):
    """The end of a sentence: which of the known flags was probably meant, if any."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, 1) or [word for word in known if len(name) > 3 and name in word]
    return f", is --{near[0]} meant?" if near else ""


def translate(given, foreign):
    """Put what others' flags mean into `given`; returns {setting: the flag that it was given by}."""
    spelling = {}
    for name, value in foreign.items():
        for setting, meant in FOREIGN_FLAGS[name].sets.items():
            meant = value if meant is GIVEN else meant
            if given.get(setting, meant) not in (meant, *FOREIGN_FLAGS[name].beside):
                raise UserError(f"--{name}: {FOREIGN_FLAGS[name].here}, but --{spelling.get(setting, setting)} "
                                f"{given[setting]} is given as well; leave one out")
            given[setting] = meant
            spelling[setting] = name
    for name, value in foreign.items():
        for setting, implied in FOREIGN_FLAGS[name].implies.items():
            implied = implied.get(value) if isinstance(implied, dict) else [value] if implied is GIVEN else implied
            if implied is not None and setting not in given:
                given[setting] = implied
                spelling[setting] = name
    return spelling


def complete(given, foreign, spelling, script):
    """Give `given` a mode and what a pasted command leaves open; returns what to say of it. UserError if the mode is open."""
    notes = [f"--{spelling['method']} means --method {given['method']}"] if "method" in spelling else []
    if script or "mode" not in given:
        given.setdefault("mode", "train" if script else settle_mode(given))
        if given["mode"] == "train":
            notes.insert(0, complete_pasted(given, foreign, script))
    notes += settle_words_rate(given, foreign, spelling)
    texts = {"class_prompt", "instance_prompt", "concepts"}
    if "placeholder_token" in foreign and "initializer_token" in given and not texts & given.keys():
        given["instance_prompt"] = "a [identifier]"
    return notes


def settle_words_rate(given, foreign, spelling):
    """Take the rate that diffusers' scripts train new words with for the new words' own; returns what to say of it."""
    if given.get("method") == "textual_inversion":
        rate, where = "learning_rate", "--method textual_inversion"
    elif "train_text_encoder_ti" in foreign and not given.get("train_text_encoder"):
        rate, where = "text_encoder_lr", "--train_text_encoder_ti"
    else:
        return []
    if rate not in given:
        return []
    if "embedding_lr" in given:
        raise UserError(f"--{rate} is --embedding_lr with {where}; leave one out")
    given["embedding_lr"] = given.pop(rate)
    spelling["embedding_lr"] = rate
    return [f"--{rate} is that of the new word, --embedding_lr"]


def settle_mode(given):
    """The mode of a command that names none, if its flags leave no doubt. UserError if they do."""
    names_photos = bool({"instance_data_dir", "concepts"} & given.keys())
    able = [mode for mode in ("train", "infer", "evaluate") if all(mode in MODES[FIELDS[name].metadata["mode"]] for name in given)]
    if able == ["train"] and names_photos:
        return "train"
    if "export" in given:
        return "export"
    raise UserError("say what to do: --train, --infer, --evaluate or --export FILE"
                    + (f" (the flags given are of --{' and --'.join(able)})" if given and able else "") + f"; {HELP_HINT}")


def complete_pasted(given, foreign, script):
    """Settle what a training command without --train leaves open as diffusers' scripts do; returns what to say of it."""
    is_guess = not script and "method" not in given
    signs = LORA_SIGNS & {*given, *foreign}
    method = given.setdefault("method", SCRIPT_METHODS[script] if script else "lora" if signs else "full")
    taken = f"taken as --train --method {method}"
    if not {"with_prior_preservation", "class_prompt", "concepts"} & given.keys() and "instance_prompt" in given:
        given["with_prior_preservation"] = False
        taken += " --no-with_prior_preservation"
    if is_guess:
        taken += f" (by --{min(signs)})" if signs else " (for a command of train_dreambooth_lora.py add --method lora)"
    if given.pop("guidance_scale", None) is not None:
        taken += "; --guidance_scale: of training there, which is guided by 1 here; pictures are drawn with the model's own"
    return taken


def check_settings(settings, given, spelling):
    """UserError for a flag without meaning in this mode or with this method, and for a number out of bounds."""
    for name, field in FIELDS.items():
        value, meta, flag = getattr(settings, name), field.metadata, f"--{spelling.get(name, name)}"
        if name in given and settings.mode not in MODES[meta["mode"]]:
            raise UserError(f"{flag} belongs to --{' and --'.join(MODES[meta['mode']])} and has no meaning with "
                            f"--{settings.mode}")
        if name in given and settings.mode == "train" and settings.method not in meta.get("methods", [settings.method]):
            raise UserError(f"{flag} has no meaning with --method {settings.method}; it belongs to "
                            f"{' and '.join(meta['methods'])}: give --method {meta['methods'][0]}, or leave it out")
        if name in given and settings.concepts and name in CONCEPT_FLAGS:
            raise UserError(f"{flag}: with --concepts, each entry of {settings.concepts} has its own; leave one out")
        if value is not None and (bounds := out_of_bounds(value, meta)):
            raise UserError(f"{flag} {value}: must be a number {bounds}")
    for name in ("resolution", "height", "width"):
        if (getattr(settings, name) or 0) % 8:
            raise UserError(f"--{name} {getattr(settings, name)}: must be a multiple of 8")


def out_of_bounds(value, meta):
    """Which numbers a flag takes, in words, if this is none of them; else None."""
    limits = (("minimum", "of at least", lambda limit: value >= limit), ("above", "above", lambda limit: value > limit),
              ("maximum", "at most", lambda limit: value <= limit), ("below", "below", lambda limit: value < limit))
    limits = [(words, meta[key], fits) for key, words, fits in limits if key in meta]
    if not limits or (all(fits(limit) for _, limit, fits in limits) and value <= sys.float_info.max):
        return None
    return " and ".join(f"{words} {limit}" for words, limit, _ in limits)
