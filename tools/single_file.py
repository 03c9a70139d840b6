"""Make dreambooth_implementation.py, the program in one file, from the modules in dreambooth/.

    python tools/single_file.py

Modules come in the order of their floors: what one needs stands before it. Raises SystemExit where a module imports from its own
floor in a circle or from a higher one, and where two modules define the same name.
"""

import ast
import graphlib
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE, TARGET = REPOSITORY / "dreambooth", REPOSITORY / "dreambooth_implementation.py"
# A module imports from lower floors, or from its own. A folder is a floor, and so is a module beside the folders.
FLOORS = ("base", "device", "files", "images", "progress", "settings", "subjects", "models", "methods", "drawing", "data",
          "evaluation", "training", "memory", "output", "export", "infer", "evaluate", "train", "cli")
RULE = "# " + "-" * 118
HEADER = '''#!/usr/bin/env python3
"""DreamBooth in one file: teach a text-to-image diffusion model your subject, then draw it anywhere.

    python dreambooth_implementation.py --train --instance_data_dir ./instance_images --class_prompt "a dog"
    python dreambooth_implementation.py --infer --prompt "a [identifier] dog on the moon"
    python dreambooth_implementation.py --evaluate
    python dreambooth_implementation.py --export my_dog.safetensors --model_path ./output
    python dreambooth_implementation.py --help

Made from the modules in dreambooth/ by `make single`: change those, not this file. Each section is a module, named above it, and
needs only what stands before it.

Method: Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
arXiv 2208.12242. "Paper" below means this one.
"""
'''


def read_modules(package):
    """{name: (source, syntax tree)} of all modules but __init__ and __main__; a name is such as "training.loop"."""
    paths = [path for path in sorted(package.rglob("*.py")) if not path.name.startswith("__")]
    sources = {".".join(path.relative_to(package).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}
    return {name: (source, ast.parse(source)) for name, source in sources.items()}


def own_imports(tree):
    """The nodes of a module that import from the package, and the names of the modules they import from."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE.name]
    return nodes, {node.module.partition(".")[2] for node in nodes}


def floor(name):
    return FLOORS.index(name.split(".")[0])


def in_order(modules):
    """The names of modules so that each comes after what it imports. SystemExit for a circle or an import upward."""
    graph = {name: own_imports(tree)[1] for name, (_, tree) in modules.items()}
    if upward := [f"{name} from {other}" for name, others in graph.items() for other in others if floor(other) > floor(name)]:
        raise SystemExit(f"imports upward: {', '.join(upward)}")
    try:
        order = list(graphlib.TopologicalSorter({name: sorted(graph[name]) for name in sorted(graph)}).static_order())
    except graphlib.CycleError as problem:
        raise SystemExit(f"modules import each other: {' -> '.join(problem.args[1])}") from None
    return sorted(order, key=floor)  # stable: within a floor the order stays


def defined_names(tree):
    """Names that a module's own statements give something."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        yield from (part.id for part in ast.walk(node) if isinstance(node, ast.Assign)
                    and isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))


def section(name, source, tree):
    """(the imports of others' modules, a module without its docstring and imports, under a head)."""
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    gone = {line for node in (tree.body[0], *imports) for line in range(node.lineno, node.end_lineno + 1)}
    code = "\n".join(line for number, line in enumerate(source.splitlines(), 1) if number not in gone).strip("\n")
    head = "\n".join(f"# {line}".rstrip() for line in f"{name.replace('.', '/')}: {ast.get_docstring(tree)}".splitlines())
    return [node for node in imports if node not in own_imports(tree)[0]], f"\n\n{RULE}\n{head}\n\n\n{code}\n"


def single_file(package=PACKAGE):
    """The text of the program in one file."""
    modules, owners, imports, sections = read_modules(package), {}, {}, []
    for name in in_order(modules):
        for defined in defined_names(modules[name][1]):
            if owners.setdefault(defined, name) != name:
                raise SystemExit(f"{defined} is defined in {owners[defined]} and in {name}; give one another name")
        others, text = section(name, *modules[name])
        sections.append(text)
        for node in others:
            for alias in node.names:
                imports.setdefault(getattr(node, "module", alias.name) if isinstance(node, ast.ImportFrom) else None, set()).add(
                    alias.name)
    plain = [f"import {name}" for name in sorted(imports.pop(None))]
    froms = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    return "\n".join([HEADER, *plain, *froms]) + "\n" + "".join(sections) + '\n\nif __name__ == "__main__":\n    sys.exit(main())\n'


if __name__ == "__main__":
    part = TARGET.with_suffix(".part")
    part.write_text(single_file(), encoding="utf-8")
    os.replace(part, TARGET)
    print(f"made {TARGET.name}", file=sys.stderr)
