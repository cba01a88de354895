"""The room 'images': what is read from a folder, how each format decodes, and who trains and who tests."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import retrain
from retrain import Image, ImageError, Reading, UserError

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as retrain.py has it; pytest sets filters of its own

INPUT = (20, 20)  # the input of the network for which the images are read
WIDTH, HEIGHT = 61, 43
UNREDUCED, REDUCED = Reading(exact_decode=True), Reading()


def pixels(width: int = WIDTH, height: int = HEIGHT, seed: int = 0, noise: float = 25) -> np.ndarray:
    """Return uint8 [height, width, 3]: slopes of colour, so that no turn of it is like another, and noise."""
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    slopes += np.random.default_rng(seed).normal(0, noise, slopes.shape)
    return slopes.clip(0, 255).astype(np.uint8)


def picture(*arguments, **options) -> PIL.Image.Image:
    """Return the picture of `pixels`."""
    return PIL.Image.fromarray(pixels(*arguments, **options))


def encoded(image: PIL.Image.Image, form: str, **options) -> bytes:
    """Return the file of a picture."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(data: bytes, reading: Reading = UNREDUCED) -> np.ndarray:
    """Return what retrain.py sees in a file."""
    return retrain.decode_image(data, reading, INPUT)


@pytest.fixture(scope="module")
def tf():
    """TensorFlow, the judge of the decoders and of the resize."""
    return retrain.import_tensorflow()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int, colour_type: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def png_of_16_bits(channels: int) -> bytes:
    """Return a PNG of 16 bits per channel."""
    values = np.random.default_rng(channels).integers(0, 1 << 16, (HEIGHT, WIDTH, channels))
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)  # 0: the line is not filtered
    header = png_header(WIDTH, HEIGHT, 16, {1: 0, 4: 6}[channels])
    return header + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")


def claiming_png(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that claims a size."""
    data = zlib.compress(bytes(1000))
    return png_header(width, height, 8, 2) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def with_exif(data: bytes, block: bytes) -> bytes:
    """Return a JPEG with an EXIF block of any content."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + data[2:]


def before_marker(data: bytes, marker: bytes, stray: bytes) -> bytes:
    """Return a JPEG with stray bytes before a marker."""
    place = data.index(marker)
    return data[:place] + stray + data[place:]


def claiming_jpeg(width: int, height: int) -> bytes:
    """Return a JPEG of a few bytes that claims a size."""
    data = encoded(picture(), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def without_adobe(data: bytes) -> bytes:
    """Return a JPEG without its Adobe marker segment."""
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] :]


SECOND_FRAME = picture(seed=1)
CMYK = encoded(picture().convert("CMYK"), "JPEG")

JPEGS = {
    "colour": encoded(picture(), "JPEG"),
    "full colour resolution": encoded(picture(), "JPEG", subsampling=0, quality=97),
    "grey": encoded(picture().convert("L"), "JPEG"),
    "progressive": encoded(picture(), "JPEG", progressive=True),
    "progressive grey": encoded(picture().convert("L"), "JPEG", progressive=True),
    "CMYK of Adobe": CMYK,
    "CMYK": without_adobe(CMYK),
    "several pictures in one, as phones make": encoded(picture(), "MPO", save_all=True, append_images=[SECOND_FRAME]),
}
PALETTE = picture().quantize(17)
OTHERS = {
    "PNG": encoded(picture(), "PNG"),
    "PNG black and white": encoded(picture().convert("1"), "PNG"),
    "PNG grey alpha": encoded(PIL.Image.merge("LA", picture().split()[:2]), "PNG"),
    "PNG palette": encoded(PALETTE, "PNG", transparency=bytes(range(0, 170, 10))),
    "PNG 16-bit grey": png_of_16_bits(1),
    "PNG 16-bit colour alpha": png_of_16_bits(4),
    "GIF": encoded(PALETTE, "GIF"),
}


@pytest.mark.parametrize("name", [*JPEGS, *OTHERS])
def test_an_image_decodes_as_tensorflow_decodes_it(tf, name):
    data = (JPEGS | OTHERS)[name]
    np.testing.assert_array_equal(decoded(data), tf.io.decode_jpeg(data, channels=3))  # which takes PNG and GIF, too


@pytest.mark.parametrize("name", ["B.JPG", "d.gif", "none", "ü 1.Png.txt"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_the_content_tells_the_format_and_not_the_ending(tmp_path, form, name):
    data = encoded(picture(), form)
    (tmp_path / name).write_bytes(data)
    np.testing.assert_array_equal(retrain.read_image(tmp_path / name, UNREDUCED, INPUT), decoded(data))


@pytest.mark.parametrize("size", [(33, 33), (299, 299), (31, 50), (1, 1)], ids=str)
@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (33, 33), (29, 20), (298, 300), (601, 799), (1, 50)])
def test_the_resize_is_that_of_tensorflow_1(tf, height, width, size):
    """The largest error is that of rounding a value up to 255 to float32."""
    source = pixels(width, height, noise=60)
    expected = tf.raw_ops.ResizeBilinear(
        images=source[None].astype(np.float32), size=size, align_corners=False, half_pixel_centers=False
    )[0]
    found = retrain.resize_bilinear(source, size)
    assert (found.shape, found.dtype) == ((*size, 3), np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


UPRIGHT = pixels(noise=0)
# How a camera stores an upright picture, for each value of the tag.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}
KEPT = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}


def photograph(orientation: int, form: str) -> bytes:
    """Return the file of the upright picture as a camera stores it."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(PIL.Image.fromarray(np.ascontiguousarray(STORED[orientation])), form, exif=exif, **KEPT[form])


@pytest.mark.parametrize("form", KEPT)
@pytest.mark.parametrize("orientation", STORED)
def test_photographs_are_turned_upright_unless_they_should_not(orientation, form):
    data, few = photograph(orientation, form), 8 if form == "JPEG" else 0  # levels
    np.testing.assert_allclose(decoded(data).astype(int), UPRIGHT, atol=few)
    as_stored = decoded(data, Reading(ignore_exif_orientation=True, exact_decode=True))
    np.testing.assert_allclose(as_stored.astype(int), STORED[orientation], atol=few)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"garbage" * 5, id="garbage"),
        pytest.param(b"MM\0*\xff\xff\xff\xff", id="a directory beyond the end"),
        pytest.param(b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\xff\xff\xff\xff\1\0\0\0", id="too many entries"),
        pytest.param(b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0", id="a word for the orientation"),
    ],
)
def test_a_broken_exif_block_does_no_harm(block):
    np.testing.assert_array_equal(decoded(with_exif(JPEGS["colour"], block)), decoded(JPEGS["colour"]))


@pytest.mark.parametrize(
    "width, height, scale",
    [
        pytest.param(80, 300, 1, id="four times the input is not more than that"),
        pytest.param(400, 159, 2, id="a quarter would be less than twice the input"),
        pytest.param(160, 400, 4, id="a quarter is twice the input"),
        pytest.param(1001, 801, 8, id="an eighth is the least there is"),
    ],
)
@pytest.mark.parametrize("kind", ["colour", "grey", "CMYK", "progressive"])
def test_a_large_jpeg_is_decoded_at_reduced_scale(tf, kind, width, height, scale):
    mode = {"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB")
    data = encoded(picture(width, height).convert(mode), "JPEG", progressive=kind == "progressive")
    found = decoded(data, REDUCED)
    assert found.shape == (-(-height // scale), -(-width // scale), 3)
    assert scale == 1 or min(found.shape[:2]) >= 2 * max(INPUT)
    np.testing.assert_array_equal(found, tf.io.decode_jpeg(data, channels=3, ratio=scale))
    np.testing.assert_array_equal(decoded(data, UNREDUCED), tf.io.decode_jpeg(data, channels=3))


NO_IMAGE = "not an image in JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC format"


def cut(data: bytes, share: float) -> bytes:
    """Return the first part of a file."""
    return data[: int(len(data) * share)]


@pytest.mark.parametrize(
    "data, reason",
    [
        pytest.param(b"", "the file is empty", id="empty"),
        *(
            pytest.param(cut(data, share), "the file is truncated", id=f"{share:.0%} of {name}")
            for name, data in list(JPEGS.items())[:7] + list(OTHERS.items())[::3]
            for share in (0.5, 0.95)
        ),
        pytest.param(cut(encoded(picture(500, 320), "JPEG"), 0.5), "truncated", id="half a large JPEG"),
        pytest.param(cut(encoded(picture(), "WEBP"), 0.5), "can't be decoded", id="half a WebP"),
        pytest.param(b"<!DOCTYPE html><html><body>404</body></html>", NO_IMAGE, id="HTML"),
        pytest.param(encoded(picture(), "PPM"), NO_IMAGE, id="another format"),
        pytest.param(bytes(5000), NO_IMAGE, id="zeros, as a full disk leaves them"),
        pytest.param(b"\xff\xd8\xff", NO_IMAGE, id="the first bytes of a JPEG alone"),
        pytest.param(OTHERS["PNG"][:60] + b"\0\xff" * 20 + OTHERS["PNG"][100:], "decoded", id="a PNG overwritten"),
        pytest.param(claiming_png(60_000, 60_000), "more pixels", id="PNG bomb"),
        pytest.param(claiming_png(15_000, 14_000), "more pixels", id="a PNG larger than phones' largest JPEGs"),
        pytest.param(claiming_jpeg(20_000, 16_000), "more pixels", id="JPEG bomb"),
    ],
)
def test_damage_gives_its_reason(tmp_path, data, reason):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=reason):
        retrain.read_image(tmp_path / "x.jpg", REDUCED, INPUT)


def test_a_photograph_of_200_megapixels_is_read(monkeypatch):
    monkeypatch.setattr("predict.decode_jpeg", lambda data, image, scale: np.zeros((1, scale, 3), np.uint8))
    assert decoded(claiming_jpeg(16_320, 12_240), REDUCED).shape == (1, 8, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows, where modes mean little")
@pytest.mark.parametrize(
    "make", [Path.absolute, Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.touch(0)]
)
def test_a_file_that_cannot_be_read_says_so(tmp_path, make):
    make(tmp_path / "x.jpg")
    if os.access(tmp_path / "x.jpg", os.R_OK) and (tmp_path / "x.jpg").is_file():
        pytest.skip("the administrator may read every file")
    with pytest.raises(ImageError, match=r"it can't be read \(.+\)"):
        retrain.read_image(tmp_path / "x.jpg", REDUCED, INPUT)


def test_more_bytes_than_an_image_has_are_not_read(tmp_path):
    with open(tmp_path / "x.jpg", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ImageError, match="larger than 150 MB"):
        retrain.read_image(tmp_path / "x.jpg", REDUCED, INPUT)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(JPEGS["colour"] + b"stray" * 100, id="behind the end"),
        pytest.param(before_marker(JPEGS["colour"], b"\xff\xd9", bytes(range(200))), id="before the end marker"),
        pytest.param(before_marker(JPEGS["colour"], b"\xff\xda", b"\0\x11\x22"), id="before the scan"),
        pytest.param(before_marker(JPEGS["colour"], b"\xff\xdb", b"\0\x11"), id="between two tables"),
        pytest.param(before_marker(CMYK, b"\xff\xda", b"\0\x11"), id="before the scan of Adobe's CMYK"),
        pytest.param(JPEGS["colour"].replace(b"JFIF\0\1", b"JFIF\0\5", 1), id="a revision of JFIF that there is not"),
    ],
)
def test_a_jpeg_with_a_blemish_that_is_whole_is_used(tf, data):
    """The decoder that forgives them may round otherwise, by a few levels of the 256."""
    expected = tf.io.decode_jpeg(data, channels=3).numpy().astype(int)
    np.testing.assert_allclose(decoded(data), expected, atol=4)


@pytest.mark.parametrize("reading", [UNREDUCED, REDUCED])
def test_stray_bytes_before_the_end_change_few_levels(reading):
    data = encoded(picture(200, 180), "JPEG")
    blemished = before_marker(data, b"\xff\xd9", bytes(range(18)))
    np.testing.assert_allclose(decoded(blemished, reading), decoded(data, reading).astype(int), rtol=0, atol=4)


# Folders and labels


def make_files(root: Path, *names: str) -> Path:
    """Write a file of each name below `root`; whether it is an image doesn't matter yet."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_files_are_listed_by_the_names_of_their_folders_and_their_own(tmp_path):
    names = ["b/2.jpg", "b/10.jpg", "a b/ö ü.jpg", "a b/z.jpg", "a b/日本.PNG", "a b/A.jpg", "C/no ending", "C/y.JPG"]
    found = retrain.list_images(str(make_files(tmp_path, *names)))
    assert [image.path.relative_to(tmp_path).as_posix() for image in found] == sorted(names)
    assert [image.key for image in found] == sorted(names)
    assert [image.label for image in found] == ["c"] * 2 + ["a b"] * 4 + ["b"] * 2


def test_what_is_no_image_of_a_class_is_not_listed_and_told_unless_it_is_hidden(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(retrain.log, "propagate", True)
    caplog.set_level("WARNING", "retrain")
    images = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]
    hidden = ["a/.hidden.jpg", ".hidden/1.jpg", "a/Thumbs.db", "b/desktop.ini"]
    make_files(tmp_path, *images, *hidden, "a/deeper/1.jpg", "beside.jpg")
    assert [image.key for image in retrain.list_images(str(tmp_path))] == images
    (message,) = {record.getMessage() for record in caplog.records}
    assert f"not read: 2, such as {tmp_path / 'a/deeper'}." in message


def test_the_label_of_a_folder():
    labels = {"roses": "roses", "Red Roses": "red roses", "a__-  b": "a b", "Café_au-lait!!": "café au lait "}
    labels |= {"(x)2": " x 2", "日本_語": "日本 語", "ΑΘΗΝΑ&Σία": "αθηνα σία", "Ещё-раз": "ещё раз"}
    labels |= {"हिन्दी_शब्द": "हिन्दी शब्द", "ภาษาไทย.ที่นี่": "ภาษาไทย ที่นี่", "Cafe\u0301": "cafe\u0301", "😀cat🐈": " cat "}
    assert {folder_name: retrain.label_of(folder_name) for folder_name in labels} == labels


@pytest.mark.parametrize(
    "names, said",
    [
        ("", "there is no such folder"),
        ("1.jpg 2.jpg", "or name the folder above if it is that of one."),
        (".git/1.jpg .git/2.jpg", "a classifier needs the folders of two classes or more, and it holds none;"),
        ("Roses/1.jpg Roses/2.jpg", "and it holds roses;"),
        ("a/1.jpg a/2.jpg None/.1.jpg", "no usable images of 'none' to train on; add some, or remove the class."),
        ("a/1.jpg a/2.jpg b/deeper/1.jpg", "no usable images of 'b' to train on"),
        ("a-b/1.jpg A_B/1.jpg c/1.jpg", "the folders 'A_B' and 'a-b' both give the label 'a b'"),
    ],
)
def test_folders_that_cannot_be_trained_on_get_one_sentence(tmp_path, capsys, names, said):
    root = make_files(tmp_path / "my images", *names.split())
    assert retrain.main(["--image_dir", str(root), "--model_dir", str(tmp_path / "none")]) == 1
    *warnings, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"retrain.py: error: --image_dir {root}: ") and said in sentence
    assert all(line.startswith("WARNING: Only the files directly in a class's folder are read") for line in warnings)


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "photos.zip").touch()
    with pytest.raises(UserError, match="photos.zip: there is no such folder .*; an archive has to be unpacked first"):
        retrain.list_images(str(tmp_path / "photos.zip"))


# Who trains, validates and tests


def classic_place(folder_name: str, file_name: str) -> float:
    """Return the percentage of the classic rule, from `<folder>/<file name up to _nohash_>`."""
    hashed = hashlib.sha1(f"{folder_name}/{file_name.split('_nohash_')[0]}".encode()).hexdigest()
    return int(hashed, 16) % (1 << 27) * (100.0 / ((1 << 27) - 1))


def images_of(folder_name: str, names: list[str], root: str = "/somewhere") -> list[Image]:
    """Return unsplit images of one class; the files need not be there."""
    return [Image(Path(root, folder_name, name), retrain.label_of(folder_name)) for name in names]


def names_between(folder_name: str, low: float, high: float, count: int) -> list[str]:
    """Return file names that the classic rule places from `low` to below `high`, by their places."""
    candidates = (f"{i}.jpg" for i in range(10_000))
    found = [name for name in candidates if low <= classic_place(folder_name, name) < high]
    return sorted(found[:count], key=lambda name: classic_place(folder_name, name))


def splits_of(images: list[Image], testing: int = 10, validation: int = 10) -> dict[str, str]:
    """Return the split of each image by its key."""
    return {image.key: image.split for image in retrain.assign_splits(images, testing, validation)}


MANY = images_of("Red Roses", [f"ü {i}.jpg" for i in range(200)]) + images_of("日本", [f"{i}.PNG" for i in range(200)])


@pytest.mark.parametrize("testing, validation", [(10, 10), (30, 60), (0, 10), (10, 0)])
def test_the_split_is_that_of_the_classic_script_wherever_the_folder_lies(testing, validation):
    expected = {}
    for image in MANY:
        place = classic_place(image.path.parent.name, image.path.name)
        trained = "testing" if place < validation + testing else "training"
        expected[image.key] = "validation" if place < validation else trained
    moved = [Image(Path("elsewhere/x_nohash_y") / image.key, image.label) for image in MANY]
    assert splits_of(MANY, testing, validation) == splits_of(moved, testing, validation) == expected


@pytest.mark.parametrize(
    "places, expected",
    [
        ([(20, 100, 1)], "R"),
        ([(20, 100, 2)], "TR"),  # the nearest tests,
        ([(20, 100, 5)], "TVRRR"),  # the next validates
        ([(0, 10, 1), (20, 100, 3)], "VTRR"),
        ([(0, 10, 3)], "VVR"),  # the furthest is taken back
        ([(10, 20, 3)], "TTR"),
    ],
)
def test_a_class_lends_what_it_lacks_as_long_as_it_trains_on_some(places, expected):
    names = [name for low, high, count in places for name in names_between("small", low, high, count)]
    splits = splits_of(MANY + images_of("small", names))
    letter = {"testing": "T", "validation": "V", "training": "R"}
    assert "".join(letter[splits[f"small/{name}"]] for name in names) == expected
    assert set(splits_of(images_of("small", names), 0, 0).values()) == {"training"}


def test_a_nohash_group_stays_together_and_is_lent_as_a_whole_or_not_at_all():
    names = [f"{group}_nohash_{i}.jpg" for group in range(60) for i in range(4)]
    splits = splits_of(images_of("a", names))
    assert all(len({splits[f"a/{group}_nohash_{i}.jpg"] for i in range(4)}) == 1 for group in range(60))
    assert set(splits.values()) == {"training", "validation", "testing"}

    alone = splits_of(images_of("a", [f"x_nohash_{i}.jpg" for i in range(5)]))
    assert set(alone.values()) == {"training"}
    names = [f"{stem}_nohash_{i}.jpg" for stem in names_between("small", 20, 100, 2) for i in range(3)]
    assert list(splits_of(images_of("small", names)).values()) == ["testing"] * 3 + ["training"] * 3


# Lists: what is left out, what has another label

LISTED = images_of("blue", ["xab12.jpg", "a.jpg", "\udcff\n.jpg"]) + images_of("#green", ["1.jpg"])


@pytest.mark.parametrize(
    "line, gone",
    [
        ("blue/a.jpg\tgreen\t0.9", 1),  # as the report writes it
        ("/home/me/photos/blue/xab12.jpg", 0),
        ("C:\\photos\\blue\\xab12.jpg", 0),
        ("blue/\\udcff\\n.jpg", 2),
        ("photos/#green/1.jpg", 3),
    ],
)
def test_an_image_is_found_in_a_list_by_its_folder_and_name(tmp_path, line, gone):
    (tmp_path / "list.tsv").write_text(f"#blue/a.jpg\n# a comment\n\n{line}\n", "utf-8-sig")
    validated = [Image(Path("/elsewhere") / LISTED[gone].key, LISTED[gone].label, "validation")]  # under the same name
    assert retrain.leave_out(LISTED + validated, str(tmp_path / "list.tsv")) == LISTED[:gone] + LISTED[gone + 1 :]


@pytest.mark.parametrize("text", [None, "violet/a.jpg\n", "#blue/a.jpg\nblue/none.jpg\n"])
def test_a_list_that_names_no_image_gets_one_sentence(tmp_path, text):
    if text:
        (tmp_path / "list.tsv").write_text(text)
    with pytest.raises(UserError, match="--exclude .*list.tsv: it (can't be read|names none of the images)"):
        retrain.leave_out(LISTED, str(tmp_path / "list.tsv"))


def test_a_run_leaves_out_and_relabels_what_its_lists_name(train, tmp_path, error_of):
    (tmp_path / "gone.tsv").write_text("green/green_00.jpg\n")
    (tmp_path / "renamed.tsv").write_text("green/green_01.jpg\tviolet\n")
    assert "it gives green/green_01.jpg" in error_of("--relabel", "renamed.tsv")
    (tmp_path / "renamed.tsv").write_text("green/green_01.jpg\t Red Things \t0.8\n")
    assert train("--exclude", "gone.tsv", "--relabel", "renamed.tsv", "--write_split_file", "pictures/split.tsv") == 0
    rows = [line.split("\t") for line in (tmp_path / "pictures/split.tsv").read_text("utf-8").splitlines()]
    labels = {Path(row[0]).name: row[1] for row in rows}
    assert "green_00.jpg" not in labels
    assert (labels["green_01.jpg"], labels["green_02.jpg"]) == ("red things", "green")


# Object stores


def test_a_change_in_an_object_store_is_noticed():
    fsspec = pytest.importorskip("fsspec", reason="fsspec comes with requirements-ray.txt")
    pytest.importorskip("upath", reason="universal-pathlib comes with requirements-ray.txt")
    stamps = []
    for content in (b"one", None, b"two"):
        if content:
            fsspec.filesystem("memory").pipe({"/photos/blue/a.jpg": content, "/photos/green/a.jpg": content})
        image, _ = retrain.list_images("memory://photos")
        assert (image.key, retrain.read_anywhere(image.path)) == ("blue/a.jpg", content or b"one")
        stamps.append(image.stamp)
    assert stamps[0] == stamps[1] != stamps[2] and stamps[0][0] == 3
    with pytest.raises(ImageError, match="it can't be read"):
        retrain.read_anywhere(image.path.with_name("none.jpg"))


def test_passwords_in_an_address_are_not_told():
    assert retrain.shown("sftp://me:sec/ret@host/x?key=secret") == "sftp://host/x"
    assert retrain.shown("C:/images?") == "C:/images?"
