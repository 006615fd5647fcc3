"""What reads files that anybody may have made: whatever they hold, it answers or refuses."""

import contextlib
import gzip
import hashlib
import io
import json
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.predict.digit_image import FORMATS, DigitImageError, read_digit_image
from experiments.report import recorded
from experiments.training_run import run_files
from experiments.training_run.config import Config, hyperparameters, stored_config
from experiments.training_run.loop_state import CheckpointMetadata
from experiments.training_run.run_files import RunFilesError
from lstm_flax import checkpoints
from lstm_flax.checkpoints import DamagedError
from lstm_flax.data.builders import read_idx

fuzz = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

RECORD = {
    "epoch": 1, "step": 14, "train_loss": 2.3, "train_accuracy": 0.1, "test_loss": 2.2,
    "test_accuracy": 0.2, "images_per_second": 1e4, "seconds": 1.0, "dataset": "mnist5k",
    "device": "1 x cpu",
}  # fmt: skip
START = {"step": 0, "time": "2026", "versions": {"jax": "0.10", "flax": None}, "processes": 1}
EVALUATION = {"step": 14, "correct": 2, "total": 4}
DESCRIPTION = {
    "about": {"config": hyperparameters(Config()), "records": [RECORD], "training_seconds": 0.0},
    "metrics": RECORD | {"validation_accuracy": 0.5},
    "leaves": {"w": {"shape": [2], "dtype": "float32", "fingerprint": 1}},
}

numbers = st.one_of(
    st.sampled_from([0, -1, 1.5, 1e999, float("nan"), 10**10, 10**400, 2**63, True]), st.floats()
)
values = st.recursive(
    st.one_of(st.none(), numbers, st.text(max_size=5), st.sampled_from(["evil", "rows"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def paths(tree, here=()):
    """The way to each part of some JSON."""
    yield here
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from paths(value, (*here, key))


def edited(tree):
    """The JSON with one part replaced by anything."""

    def edit(tree, path, value):
        if not path:
            return value
        copy = tree.copy()
        copy[path[0]] = edit(tree[path[0]], path[1:], value)
        return copy

    return st.builds(edit, st.just(tree), st.sampled_from(list(paths(tree))), values)


def texts(tree):
    """Lines of JSON, some of them edited or none at all."""
    line = st.one_of(st.just(tree), edited(tree)).map(lambda value: json.dumps(value).encode())
    return st.lists(st.one_of(line, st.binary(max_size=20)), max_size=3).map(b"\n".join)


@fuzz
@given(content=st.one_of(texts(hyperparameters(Config())), st.binary(max_size=40)))
def test_a_config_is_one_or_is_refused(tmp_path_factory, content):
    workdir = tmp_path_factory.mktemp("run")
    run_files.config_path(workdir).write_bytes(content)
    with contextlib.suppress(RunFilesError):
        assert isinstance(stored_config(Config(workdir=workdir)), Config)


@pytest.mark.parametrize(
    ("path", "read", "tree"),
    [
        (run_files.metrics_path, recorded.read_epochs, RECORD),
        (run_files.environment_path, recorded.read_starts, START),
        (run_files.eval_path, recorded.read_evaluation, EVALUATION),
    ],
)
def test_what_a_run_recorded_is_read_or_refused(tmp_path_factory, path, read, tree):
    @fuzz
    @given(content=texts(tree))
    def check(content):
        workdir = tmp_path_factory.mktemp("run")
        path(workdir).write_bytes(content)
        run_files.read_lines(path(workdir))
        with contextlib.suppress(RunFilesError):
            read(workdir)

    check()


@settings(fuzz, max_examples=300)
@given(values=edited(DESCRIPTION))
def test_a_checkpoints_description_is_one_or_is_damaged(tmp_path_factory, values):
    directory = tmp_path_factory.mktemp("checkpoints")
    (directory / "3" / "about").mkdir(parents=True)
    if isinstance(values, dict):
        text = json.dumps(values, sort_keys=True).encode()
        values = values | {"sha256": hashlib.sha256(text).hexdigest()}
    (directory / "3" / "about" / "metadata").write_text(json.dumps(values))
    with contextlib.suppress(DamagedError):
        description = checkpoints.read_description(directory, 3)
        assert checkpoints.best_fn(description["metrics"], 3) >= (-np.inf, 3)
        saved = CheckpointMetadata.parse(3, description["about"])
        assert sum(record["seconds"] for record in saved.records) >= 0


def harmed(content):
    """Bytes, cut off or with some of them replaced."""

    def harm(at, new, cut):
        at, end = at % len(content), len(content) - cut % len(content)
        return (content[:at] + new + content[at + len(new) :])[:end]

    return st.builds(
        harm,
        st.integers(0, 2**20) | st.integers(0, 40),
        st.binary(min_size=1, max_size=4),
        st.just(0) | st.integers(0, 2**20),
    )


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_is_read_or_refused(tmp_path, form):
    picture, file = Image.new("L", (32, 32), 255), io.BytesIO()
    picture.paste(0, (12, 6, 18, 26))
    picture.save(file, form)

    @settings(fuzz, max_examples=60)
    @given(content=harmed(file.getvalue()))
    def check(content):
        (tmp_path / "picture").write_bytes(content)
        with contextlib.suppress(DigitImageError):
            assert read_digit_image(tmp_path / "picture").shape == (28, 28)

    check()


@fuzz
@given(content=harmed(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(32)))
def test_an_idx_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("idx") / "images.gz"
    for stored in (gzip.compress(content), content):
        path.write_bytes(stored)
        with contextlib.suppress(ValueError, OSError, EOFError, zlib.error):
            assert read_idx(path, 4, 4).shape == (2, 4, 4)
