import contextlib
import io
import json
import os
import struct

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from experiments.predict.__main__ import main
from experiments.predict.digit_image import DigitImageError, as_mnist, read_digit_image
from experiments.training_run.restored import classify, restore_run
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
    line, nothing = output.splitlines()
    assert nothing.split() == [str(blank), "no", "digit"]
    path, label, probability, _, runner_up, its_probability, *_ = line.split()
    assert (path, label) == (str(good), str(digits.labels[0]))
    assert float(probability.rstrip("%")) > float(its_probability.rstrip("%"))
    assert runner_up.rstrip(",") != label
    skipped = error.splitlines()
    assert len(skipped) == 4
    for path, because in zip(
        (text, cut, tmp_path / "none.png", empty),
        ("is no picture", "can't be read", "No such file", "no pictures"),
        strict=True,
    ):
        (said,) = (line for line in skipped if str(path) in line)
        assert said.startswith("warning: skipped")
        assert because in said


def pen(mode):
    """A 7, dark on light, in a mode of Pillow's; 16 bits use a small part of their range."""
    paper = np.full((120, 90), 230, np.uint8)
    paper[20:30, 20:70] = 40
    paper[30:100, 55:70] = 40
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray((np.int32(paper) * 9 + 300).astype(dtype))
    picture = Image.fromarray(paper)
    return picture.point(lambda shade: 255 * (shade > 99)) if mode == "1" else picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "endings"),
    [
        ("L", "png jpg jpeg bmp gif tif tiff"),
        ("RGB", "png jpg webp bmp tif"),
        ("RGBA", "png webp tif"),
        ("LA", "png"),
        ("P", "png gif bmp"),
        ("1", "png bmp tif"),
        ("CMYK", "jpg tif"),
        ("I;16", "png tif"),
        ("I", "tif"),
        ("F", "tif"),
    ],
)
def test_every_kind_of_picture_shows_the_same(tmp_path, mode, endings):
    expected = as_mnist(np.asarray(pen("L")) < 99).astype(int)
    for ending in endings.split():
        pen(mode).save(tmp_path / f"7.{ending}")
        read = read_digit_image(tmp_path / f"7.{ending}")
        assert np.abs(read - expected).mean() < 1, ending


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_how_the_camera_was_held_makes_no_difference(tmp_path, ending):
    expected = as_mnist(np.asarray(pen("L")) < 99).astype(int)
    turns = {3: 2, 6: 1, 8: 3}  # by orientation, quarter turns from how it is shown to how it lies
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        lying = Image.fromarray(np.rot90(np.asarray(pen("RGB")), turn))
        lying.save(tmp_path / f"7.{ending}", exif=exif)
        assert np.abs(read_digit_image(tmp_path / f"7.{ending}") - expected).mean() < 3


def test_what_is_transparent_is_paper(tmp_path):
    strokes = np.zeros((120, 90, 4), np.uint8)
    strokes[..., 3] = 255 - np.asarray(pen("L"))  # black strokes on nothing
    Image.fromarray(strokes).save(tmp_path / "7.png")
    pen("L").save(tmp_path / "paper.png")
    read = [read_digit_image(tmp_path / name).astype(int) for name in ("7.png", "paper.png")]
    assert np.abs(read[0] - read[1]).mean() < 1


def test_large_pictures_are_read_up_to_a_limit(tmp_path):
    phone, bomb = tmp_path / "phone.jpg", tmp_path / "bomb.png"
    pen("L").resize((6124, 8165)).save(phone)
    pen("L").save(tmp_path / "7.png")
    expected = read_digit_image(tmp_path / "7.png").astype(int)
    assert np.abs(read_digit_image(phone) - expected).mean() < 3
    Image.new("1", (13300, 13300)).save(bomb)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(DigitImageError, match=r"bomb.png has more than 80 million pixels"):
        read_digit_image(bomb)
    # 100 x 100 pixels of 8 bits, compressed, in one tile of 40,000 x 40,000.
    sizes = [(256, 4, 1, 100), (257, 4, 1, 100), (322, 4, 1, 40_000), (323, 4, 1, 40_000)]
    kinds = [(258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (324, 4, 1, 200), (325, 4, 1, 500)]
    (tmp_path / "tile.tif").write_bytes(tiff([*sizes, *kinds], bytes(999)))
    with pytest.raises(DigitImageError, match=r"tile.tif has more than 80 million pixels"):
        read_digit_image(tmp_path / "tile.tif")
    os.truncate(phone, 2**33)  # a hole: it takes no room on the disk
    with pytest.raises(DigitImageError, match=r"can't be read \(it has more than 256 MiB\)"):
        read_digit_image(phone)


def tiff(entries, data=b""):
    """A TIFF's tags and their values, as in EXIF too: (tag, type, count, value or where it is)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + data


def test_odd_metadata_are_not_looked_at(tmp_path):
    pen("L").save(tmp_path / "plain.png")
    expected = read_digit_image(tmp_path / "plain.png").astype(int)
    lying = pen("RGB").transpose(Image.Transpose.ROTATE_180)
    end = 10 + 2 * 12 + 4
    for name, (odd, value) in {
        "zero": ((0x011A, 5, 1, end), struct.pack("<II", 1, 0)),  # a denominator
        "text": ((0x011A, 2, 4, 0x41414141), b""),  # for a resolution
        "float": ((0x9000, 11, 1, 0x3F800000), b""),  # for a version
        "signed": ((0x0100, 8, 1, 0xFFFF), b""),  # a width of -1
        "unknown": ((0x011A, 99, 1, 0), b""),  # type
        "far": ((0x011A, 5, 1, 2**31), b""),  # beyond the end
    }.items():
        exif = b"Exif\0\0" + tiff([(0x0112, 3, 1, 3), odd], value)  # 3: it lies upside down
        for ending in ("jpg", "png", "webp"):
            lying.save(tmp_path / f"{name}.{ending}", exif=exif, quality=95)
            read = read_digit_image(tmp_path / f"{name}.{ending}")
            assert np.abs(read - expected).mean() < 3, (name, ending)
    lying.save(tmp_path / "none.jpg", exif=b"Exif\0\0no such thing")
    assert read_digit_image(tmp_path / "none.jpg").any()


def test_damaged_files_are_read_or_refused(tmp_path):
    rng, refused = np.random.default_rng(0), 0
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 0.5
    for ending in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        file = tmp_path / f"7.{ending}"
        pen("RGB").save(file, **({} if ending in ("gif", "bmp") else {"exif": exif}))
        whole = np.fromfile(file, np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, min(300, len(whole)), 3)] = rng.integers(0, 256, 3)
            damaged.tofile(file)
            try:
                assert read_digit_image(file).shape == (28, 28)
            except DigitImageError:
                refused += 1
    assert refused > 20


def test_nothing_but_pictures_is_opened(reader, tmp_path, capsys, monkeypatch):
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    folder = tmp_path / "pictures"
    (folder / "x.png").mkdir(parents=True)
    pen("L").save(folder / "x.png" / "7.png")
    pen("L").save(folder / ".hidden.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "digit.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "icon.ppm").write_bytes(b"P5 2 2 255 abcd")
    capsys.readouterr()
    named = [folder / "pipe.png", folder / "zero.png", folder / "icon.ppm"]
    assert main(["--workdir", str(reader), str(folder), *map(str, named)]) == 2
    output, error = capsys.readouterr()
    assert [line.split()[0] for line in output.splitlines()] == [str(folder / "x.png" / "7.png")]
    said = [line.removeprefix("warning: skipped: ") for line in error.splitlines()]
    assert [line.split()[0] for line in said] == [str(folder / "digit.png"), *map(str, named)]
    becauses = ("is no picture", "not a regular file", "not a regular file", "is no picture")
    assert all(because in line for because, line in zip(becauses, said, strict=True))
    assert not (tmp_path / "started").exists()


def test_each_answer_comes_before_the_next_trouble(reader, tmp_path):
    for k in (1, 3, 4):
        pen("L").save(tmp_path / f"{k}.png")
    for k in (2, 5):
        (tmp_path / f"{k}.png").touch()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        assert main(["--workdir", str(reader), str(tmp_path)]) == 2
    lines = printed.getvalue().splitlines()
    assert [line.startswith("warning") for line in lines] == [False, True, False, False, True]


def test_names_are_printed_and_not_obeyed(reader, tmp_path, capsys):
    folder = os.fsencode(tmp_path)
    for name in (b"\x1b[31m\nred.png", b"\xff.png", "\u202egnp.png".encode()):
        pen("L").save(tmp_path / "7.png")
        os.rename(tmp_path / "7.png", os.path.join(folder, name))
    (tmp_path / "\x1b]0;title\x07.png").touch()
    capsys.readouterr()
    assert main(["--workdir", str(reader), str(tmp_path)]) == 2
    output, error = capsys.readouterr()
    lines = output.splitlines()
    assert len(lines) == 3
    assert error.count("\n") == 1
    for name in ("\\x1b[31m\\nred.png", "\\udcff.png", "\\u202egnp.png"):
        assert any(line.startswith(f"{tmp_path}/{name} ") for line in lines), name
    assert all(line.isprintable() for line in [*lines, error.rstrip()])
    assert main(["--workdir", str(reader), "--json", str(tmp_path)]) == 2
    files = [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()]
    assert f"{tmp_path}/\x1b[31m\nred.png" in files


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
