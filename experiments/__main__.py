"""List the experiments: `python -m experiments`."""

import ast
import pkgutil
from importlib.util import find_spec
from pathlib import Path

import experiments


def list_experiments() -> dict[str, str]:
    """What each runnable module of this package does, by its name; none of them is imported."""
    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        name = f"experiments.{module.name}"
        spec = find_spec(f"{name}.__main__" if module.ispkg else name)
        if module.name == "__main__" or spec is None or spec.origin is None:
            continue
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
        if f"python -m {name}" in docstring:
            found[name] = docstring.splitlines()[0]
    return found


if __name__ == "__main__":
    experiments_found = list_experiments()
    width = max(map(len, experiments_found))
    for experiment, line in experiments_found.items():
        print(f"python -m {experiment:{width}}  {line}")
    print("\nEach explains its flags with --help.")
