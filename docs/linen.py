"""What griffe, which reads the sources and runs nothing, has to know of Flax."""

from collections.abc import Iterator
from typing import Any

import griffe

BASES = {"flax.linen.Module", "flax.linen.RNNCellBase"}
DECORATOR = "flax.struct.dataclass"


class Linen(griffe.Extension):
    """Tells griffe which classes Flax makes dataclasses of, so that pages show their signatures."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Decorate these classes; griffe's own extension for dataclasses comes after this one."""
        for cls in classes(pkg):
            bases = {base.canonical_path for c in (cls, *cls.mro()) for base in c.bases}
            decorators = [decorator.callable_path for decorator in cls.decorators]
            if bases & BASES or DECORATOR in decorators:
                name = griffe.ExprName("dataclasses.dataclass")
                cls.decorators.append(griffe.Decorator(name, lineno=None, endlineno=None))


def classes(within: griffe.Object) -> Iterator[griffe.Class]:
    """The classes of a package or a module, in any depth."""
    for member in within.members.values():
        if not member.is_alias and (member.is_module or member.is_class):
            yield from [member] if member.is_class else ()
            yield from classes(member)
