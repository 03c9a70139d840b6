"""Make dreambooth_implementation.py, the program in one file, from the modules in dreambooth/: python tools/single_file.py

SystemExit where modules import each other in a circle or from a higher floor, or where two define the same name.
"""

import ast
import graphlib
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE, TARGET = REPOSITORY / "dreambooth", REPOSITORY / "dreambooth_implementation.py"
# A module imports from lower floors or its own. A floor is a folder, or a module beside the folders.
FLOORS = ("base", "console", "mishaps", "device", "files", "colours", "profiles", "hdr", "decode", "images", "progress", "threads",
          "settings", "compatible", "arguments", "subjects", "models", "methods", "drawing",
          "data", "evaluation", "training", "memory", "output", "export", "infer", "evaluate", "train", "cli")
NOTE = "Made from the modules in dreambooth/ by `make single`: change those, not this file. Each section is a module."
TAIL = '\n\n\nif __name__ == "__main__":\n    sys.exit(main())\n'


def read_modules(package):
    """{name, such as "training.loop": (source, syntax tree)} of the modules in a folder, but for __init__ and __main__."""
    paths = [path for path in sorted(package.rglob("*.py")) if not path.name.startswith("__")]
    sources = {".".join(path.relative_to(package).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}
    return {name: (source, ast.parse(source)) for name, source in sources.items()}


def needs(tree):
    """Names of the modules of the package that a module imports from, wherever in it."""
    sources = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return sorted(source.removeprefix("dreambooth.") for source in sources if source.startswith("dreambooth."))


def in_order(modules):
    """Names of modules, each after those that it needs, floor by floor."""
    def floor(name):
        return FLOORS.index(name.split(".")[0])
    graph = {name: needs(tree) for name, (_, tree) in modules.items()}
    if upward := [f"{name} from {other}" for name in graph for other in graph[name] if floor(other) > floor(name)]:
        raise SystemExit(f"imports upward: {', '.join(upward)}")
    try:
        return sorted(graphlib.TopologicalSorter(graph).static_order(), key=floor)  # equals keep their order
    except graphlib.CycleError as problem:
        raise SystemExit(f"modules import each other: {' -> '.join(problem.args[1])}") from None


def section(name, source, tree):
    """(pairs (module, name) that it imports, its text without docstring and imports, the docstring above it as comments)."""
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    gone = {line for node in (tree.body[0], *imports) for line in range(node.lineno, node.end_lineno + 1)}
    code = "\n".join(line for number, line in enumerate(source.splitlines(), 1) if number not in gone).strip("\n")
    head = "\n".join(f"# {line}".rstrip() for line in f"{name.replace('.', '/')}: {ast.get_docstring(tree)}".splitlines())
    others = {(getattr(node, "module", ""), ast.unparse(alias)) for node in imports for alias in node.names}
    return others, f"\n\n# {'-' * 126}\n{head}\n\n\n{code}"


def single_file(package=PACKAGE):
    """The text of the program in one file."""
    modules, owners = read_modules(package), {}
    order = in_order(modules)
    for name in order:
        for node in modules[name][1].body:
            defined = [node.name] if hasattr(node, "name") else [
                part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)
            ] if isinstance(node, ast.Assign) else []
            if taken := [word for word in defined if owners.setdefault(word, name) != name]:
                raise SystemExit(f"{taken[0]} is defined in {owners[taken[0]]} and in {name}; give one another name")
    imports, sections = zip(*(section(name, *modules[name]) for name in order))
    names = {}
    for module, name in sorted(set().union(*imports)):
        if not module.startswith("dreambooth."):
            names.setdefault(module, []).append(name)
    lines = [f"import {name}" for name in names.pop("")] + [f"from {module} import {', '.join(names[module])}" for module in names]
    about = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    return "\n".join(["#!/usr/bin/env python3", f'"""{about}\n\n{NOTE}\n"""', "", *lines, *sections]) + TAIL


if __name__ == "__main__":
    part = TARGET.with_suffix(".part")
    part.write_text(single_file(), encoding="utf-8")
    os.replace(part, TARGET)
