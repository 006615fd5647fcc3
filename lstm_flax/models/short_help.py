"""Two screens of `help` for a class of modules.

`help(cls)` prints the docstring of every name in `dir(cls)`. A Linen module has a thousand lines of
Flax's own methods, and the hooks of its bases. Python lets a metaclass say what `dir(cls)` names.
"""

import abc
import inspect
import re
from types import FunctionType

CALLED = ("__call__", "initialize_carry", "why_not_native")
"""Methods that `help` shows wherever they are defined: those that are there to be called."""

_METHODS = (FunctionType, classmethod, staticmethod, property)

# In the text of a default or an annotation: what Python writes, and what a reader wants to see.
_SHORTER = {
    r"<(?:function |class ')([\w.]+).*?>": r"\1",
    r"<[\w.]*?(\w+) object at \w+>": r"\1",
    r"\bjax\.jaxlib\._jax\.": "jax.",
}


class ShortHelp(abc.ABCMeta):
    """The type of module classes whose `help` is short. Their instances are as any module's.

    `dir(cls)` names `CALLED`, and the methods that the class adds to its bases. All attributes are
    there nonetheless, and `dir` of an instance names them. `abc.ABCMeta` lets subclasses be
    abstract classes as well.
    """

    def __dir__(cls) -> list[str]:
        called = {name for name in CALLED if hasattr(cls, name)}
        methods = {name for name, value in vars(cls).items() if isinstance(value, _METHODS)}
        inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
        fields = cls.__annotations__.keys()  # the default of one may be a function
        return list(called | (methods - inherited - fields))

    @property
    def __signature__(cls) -> inspect.Signature:
        """The class's call, whose text has names in place of addresses."""
        call = inspect.signature(cls.__init__)  # type: ignore[misc]  # cls is no instance
        _self, *parameters = call.parameters.values()
        return call.replace(parameters=[_Parameter.like(p) for p in parameters])


class _Parameter(inspect.Parameter):
    """A parameter whose text is short; its default and its annotation are what they are."""

    @classmethod
    def like(cls, other: inspect.Parameter) -> "_Parameter":
        return cls(other.name, other.kind, default=other.default, annotation=other.annotation)

    def __str__(self) -> str:
        text = super().__str__()
        for long, short in _SHORTER.items():
            text = re.sub(long, short, text)
        return text
