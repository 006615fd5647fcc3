"""`help` of the public classes, which their metaclass makes short, and what that leaves alone."""

import abc
import copy
import dataclasses
import inspect
import pickle
import pydoc
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lstm_flax
from lstm_flax import GRUCell, LSTMStack

MODULES = [name for name in lstm_flax.__all__ if isinstance(getattr(lstm_flax, name), abc.ABCMeta)]
X = jnp.ones((2, 3, 4))


def help_of(thing):
    return pydoc.plain(pydoc.render_doc(thing))


def test_every_class_of_modules_is_here():
    found = {name for name in lstm_flax.__all__ if name.endswith(("Stack", "Cell", "Classifier"))}
    assert found - {"LSTMClassifier"} == set(MODULES)  # which is a function


@pytest.mark.parametrize("name", [*MODULES, "LSTMClassifier"])
def test_help_fits_two_screens(name):
    thing = getattr(lstm_flax, name)
    text = help_of(thing)
    # Since 3.13 each parameter has a line of its own, as one line would be too long.
    more = len(inspect.signature(thing).parameters) if sys.version_info >= (3, 13) else 0
    assert 10 < len(text.splitlines()) <= 100 + more
    assert " at 0x" not in text
    assert "inherited from flax" not in text
    if name in MODULES:
        assert text.count(" __call__(self, ") == 1


def test_help_names_defaults():
    text = help_of(LSTMStack)
    for name, default in {
        "kernel_init": "glorot_uniform",
        "bias_init": "forget_gate_ones",
        "activation": "tanh",
        "param_dtype": "jax.numpy.float32",
    }.items():
        (signature,) = [line for line in text.splitlines() if line.startswith(" |  LSTMStack(")]
        assert f", {name}: " in signature
        assert signature.partition(f", {name}: ")[2].partition(" = ")[2].startswith(f"{default},")


def test_the_signature_is_that_of_the_call():
    signature = inspect.signature(LSTMStack)
    fields = {field.name: field for field in dataclasses.fields(LSTMStack) if field.init}
    assert [*signature.parameters] == [*fields]
    assert signature.parameters["activation"].default is jax.lax.tanh
    for name, parameter in signature.parameters.items():
        if name != "hidden_size":
            assert parameter.default is fields[name].default
    assert signature.bind(8, num_layers=2).arguments == {"hidden_size": 8, "num_layers": 2}


def test_an_instance_names_everything():
    assert {"init", "apply", "make_cell", "run", "num_layers"} <= set(dir(LSTMStack(4)))
    assert callable(LSTMStack.init)
    named = {name for name in dir(LSTMStack) if not re.match("_[^_]", name)}
    assert named == {"__call__", "initialize_carry", "why_not_native"}


class Streaming(LSTMStack, abc.ABC):
    """A stack with a method and an attribute of its own, which is abstract besides."""

    seconds: float = 1.0

    @abc.abstractmethod
    def stream(self):
        """Say where x comes from."""


class FromFile(Streaming):
    """One that can be made."""

    def stream(self):
        """Read a file."""
        return self.seconds


def test_a_subclass_adds_to_help_and_may_be_abstract():
    assert "Say where x comes from." in help_of(Streaming)
    assert "seconds: float = 1.0" in help_of(FromFile)
    with pytest.raises(TypeError, match="abstract"):
        Streaming(4)
    stack = FromFile(4, seconds=2.0)
    assert stack.stream() == 2.0
    outputs, _ = stack.init_with_output(jax.random.key(0), X)[0]
    assert outputs.shape == (2, 3, 4)


@pytest.mark.parametrize("module", [LSTMStack(4, 2), GRUCell(4)], ids=["stack", "cell"])
def test_modules_and_their_classes_are_copied_and_pickled(module):
    for same in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same == module
        assert type(same) is type(module)
    for same in (copy.deepcopy(type(module)), pickle.loads(pickle.dumps(type(module)))):
        assert same is type(module)


def test_flax_transforms_the_classes():
    key = jax.random.key(0)
    (expected, _), variables = LSTMStack(4).init_with_output(key, X)
    outputs, _ = nn.remat(LSTMStack)(4).apply(variables, X)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    ensemble = nn.vmap(LSTMStack, variable_axes={"params": 0}, split_rngs={"params": True})
    (outputs, _), variables = ensemble(4).init_with_output(key, jnp.stack([X, X]))
    assert outputs.shape == (2, 2, 3, 4)
    assert variables["params"]["l0"]["kernel_hh"].shape == (2, 4, 16)
