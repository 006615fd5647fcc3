"""List the experiments with `python -m experiments`; run one with `python -m experiments NAME`."""

import ast
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import experiments
from experiments.harness.command import command
from experiments.harness.usage import UsageError


def list_experiments() -> dict[str, str]:
    """Return what each runnable module of this package does, by name, without importing it."""
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


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """List the experiments or run the named one, and return the exit status."""
    arguments = sys.argv[1:] if argv is None else [*argv]
    found = list_experiments()
    if arguments and arguments[0] not in ("-h", "--help"):
        name = f"experiments.{arguments[0].removeprefix('experiments.')}"
        if name not in found:
            names = ", ".join(each.removeprefix("experiments.") for each in found)
            raise UsageError(f"there is no experiment {arguments[0]}; choose one of: {names}")
        sys.argv[1:] = arguments[1:]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return 0
    width = max(map(len, found))
    for experiment, line in found.items():
        print(f"python -m {experiment:{width}}  {line}")
    print("\nRun one with --help to see its flags.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
