import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from experiments.digit_image import as_mnist
from experiments.predict import main
from experiments.restored import classify, restore_run
from lstm_flax import data


@pytest.fixture(scope="module")
def digits(data_dir):
    """The first test digits."""
    split = data.read_split(data.prepare("mnist5k", data_dir, None), "test")
    return data.Split(split.images[:200], split.labels[:200])


def as_photo(digit, seed):
    """A digit in another size and somewhere on a larger sheet, uint8, dark on light or not."""
    rng = np.random.default_rng(seed)
    side = int(rng.integers(60, 200))
    sheet = Image.new("L", (320, 260))
    sheet.paste(
        Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC),
        tuple(int(rng.integers(0, room - side + 1)) for room in sheet.size),
    )
    strokes = np.asarray(sheet, np.float32) / 255
    return np.uint8(230 - 200 * strokes if seed % 2 else 20 + 180 * strokes)


def inked(image):
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def test_any_drawing_is_scaled_and_centred_as_mnist_is():
    ink = np.zeros((200, 300), np.float32)
    ink[20:180, 200:240] = 1  # an upright bar
    image = as_mnist(ink)
    assert (image.shape, image.dtype, image.max()) == ((28, 28), np.uint8, 255)
    assert inked(image) == (20, 5)
    assert all(13.5 <= at <= 14.5 for at in ndimage.center_of_mass(image))
    assert inked(as_mnist(ink.T)) == (5, 20)
    # Its mass counts, not its box: a foot pulls an L up and to the right.
    ink[140:180, 100:240] = 1
    assert all(13.5 <= at <= 14.5 for at in ndimage.center_of_mass(as_mnist(ink)))
    assert not as_mnist(np.zeros((50, 50))).any()


def test_mnists_own_images_stay_what_they_are(digits):
    changed = [np.abs(np.int32(as_mnist(i / 255)) - i).mean() for i in digits.images]
    # Of 255; moved by one pixel they would differ by 20 and more.
    assert np.median(changed) < 2
    assert np.max(changed) < 25


def test_pictures_of_all_sorts_are_read_as_well_as_the_originals(reader, digits, tmp_path, capsys):
    for k, digit in enumerate(digits.images):
        ending = ("png", "jpg")[k // 2 % 2]
        Image.fromarray(as_photo(digit, k)).save(tmp_path / f"{k:03}.{ending}")
    capsys.readouterr()
    assert main(["--workdir", str(reader), "--json", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_name = sorted(lines, key=lambda line: line["file"])
    assert [line["file"] for line in by_name] == [str(f) for f in sorted(tmp_path.iterdir())]

    plain = classify(restore_run(reader), digits.images).argmax(-1)
    read = np.array([line["label"] for line in by_name])
    assert (plain == digits.labels).mean() > 0.9
    assert (read == digits.labels).mean() > (plain == digits.labels).mean() - 0.03
    for line in lines:
        assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-5)
        first, second = sorted(line["probabilities"])[:-3:-1]
        assert line["probability"] == line["probabilities"][line["label"]] == first
        assert line["probabilities"][line["runner_up"]] == second


def test_a_line_for_a_person_and_files_that_are_no_pictures(reader, digits, tmp_path, capsys):
    good, text, cut, blank = (tmp_path / name for name in ("good.png", "a.txt", "cut.png", "b.png"))
    Image.fromarray(digits.images[0]).save(good)
    text.write_text("no picture")
    cut.write_bytes(good.read_bytes()[:150])
    Image.new("L", (40, 40), "white").save(blank)
    empty = tmp_path / "empty"
    empty.mkdir()
    capsys.readouterr()
    pictures = [text, cut, good, blank, tmp_path / "none.png", empty]
    assert main(["--workdir", str(reader), *map(str, pictures)]) == 2
    output, error = capsys.readouterr()
    (line,) = output.splitlines()
    path, label, probability, _, runner_up, its_probability = line.split()
    assert (path, label) == (str(good), str(digits.labels[0]))
    assert float(probability.rstrip("%")) > float(its_probability.rstrip("%"))
    assert runner_up.rstrip(",") != label
    skipped = error.splitlines()
    assert len(skipped) == 5
    for path, because in zip(
        (text, cut, blank, tmp_path / "none.png", empty),
        ("is no picture", "can't be read", "shows nothing", "No such file", "no pictures"),
        strict=True,
    ):
        (said,) = (line for line in skipped if str(path) in line)
        assert said.startswith("warning: skipped")
        assert because in said


def test_how_the_camera_was_held_and_what_is_transparent_make_no_difference(
    reader, digits, tmp_path, capsys
):
    digit = as_photo(digits.images[0], 1)
    turned, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be shown a quarter turn clockwise from how it is stored
    Image.fromarray(np.rot90(digit)).save(turned, exif=orientation, quality=95)
    strokes = np.zeros((*digit.shape, 4), np.uint8)
    strokes[..., 3] = 230 - digit  # black strokes on nothing
    Image.fromarray(strokes).save(clear)
    capsys.readouterr()
    assert main(["--workdir", str(reader), str(turned), str(clear)]) == 0
    labels = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert labels == [str(digits.labels[0])] * 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--workdir", "nowhere", "x.png"], "there is no run in nowhere"), ([], "name the pictures")],
)
def test_what_can_not_be_done_is_said_in_one_line(capsys, flags, says):
    assert main(flags) == 2
    output, error = capsys.readouterr()
    assert not output
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
