"""Who trains and who tests by other rules than the hash: folders of one's own, and split files."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import COLOURS, make_image, make_image_dir

import retrain
from retrain import Image


@pytest.fixture
def others(tmp_path) -> Path:
    """A folder with the class folders and file names of `image_dir`, and other images: the colours swapped."""
    folder = make_image_dir(tmp_path / "others", 4)
    (folder / "green").rename(folder / "was green")
    (folder / "blue").rename(folder / "green")
    (folder / "was green").rename(folder / "blue")
    for name, other in (("green", "blue"), ("blue", "green")):
        for path in (folder / name).iterdir():
            path.rename(path.with_name(path.name.replace(other, name)))
    return folder


# Folders of one's own


def test_validation_dir_and_test_dir_take_the_place_of_the_split(train, others, capsys):
    few = make_image_dir(others.parent / "few", 2)
    for path in few.glob("green/*_0[1-9].jpg"):  # one image is enough to test with
        path.unlink()
    assert train("--validation_dir", others, "--test_dir", few) == 0
    assert "Images: 60 to train, 12 to validate, 5 to test." in capsys.readouterr().out
    assert train("--test_dir", few) == 0
    trained, validated = re.search(r"(\d+) to train, (\d+) to validate, 5 to test", capsys.readouterr().out).groups()
    assert int(trained) + int(validated) == 60 and int(validated) > 0


def test_the_accuracy_is_that_of_the_folder(train, others, capsys):
    """Two of its three classes are swapped, so what is told rightly elsewhere is told wrongly there."""
    assert train("--test_dir", others, "--how_many_training_steps", 300, "--learning_rate", 0.1) == 0
    assert "Final test accuracy = 33.3% (N=12)" in capsys.readouterr().out


def test_images_of_the_same_name_keep_their_own_features(train, others, image_dir, capsys):
    for _ in range(2):
        assert train("--validation_dir", others, "--bottleneck_dir", "kept") == 0
        said = capsys.readouterr().out
    assert "to compute" not in said
    (theirs,) = Path("kept").glob("others-????????/green")
    ours = Path("kept/green")
    names = [f"green_{i:02}.jpg_inception_v3.txt" for i in range(4)]
    assert sorted(path.name for path in theirs.iterdir()) == names
    for name in names:
        assert (theirs / name).read_text() != (ours / name).read_text()
    assert train("--bottleneck_dir", "fresh") == 0  # and those of image_dir lie where they always did
    assert (Path("fresh/green") / names[0]).read_text() == (ours / names[0]).read_text()


def test_other_folders_have_the_same_classes(others, error_of):
    shutil.rmtree(others / "green")
    (others / "blue").rename(others / "Violet!")
    told = "its class folders must be those of --image_dir, and differ in 'blue', 'green', 'violet '."
    assert error_of("--test_dir", others) == f"--test_dir {others}: {told}"


def test_no_image_trains_and_tests(image_dir, others, error_of):
    Path("link").symlink_to(image_dir)
    for flag in ("--validation_dir", "--test_dir", "--coarse_image_dir"):
        assert error_of(flag, "link") == f"{flag} link: it is the same folder as --image_dir; name another."
    said = error_of("--validation_dir", others, "--test_dir", others)
    assert said == f"--test_dir {others}: it is the same folder as --validation_dir; name another."


def test_a_folder_that_is_not_there_is_named_with_its_flag(error_of):
    assert error_of("--test_dir", "nowhere").startswith("--test_dir nowhere: there is no such folder (looked for /")


# Split files


def test_a_split_that_was_written_is_read_again(train, image_dir, capsys, tmp_path):
    assert train("--write_split_file", "lists/split.tsv", "--random_seed", 1) == 0
    first, graph = capsys.readouterr().out, Path("output_graph.pb").read_bytes()
    rows = [line.split("\t") for line in Path("lists/split.tsv").read_text().splitlines()]
    assert rows[0] == ["path", "label", "split"] and len(rows) == 61
    assert rows[1][:2] == ["Red Things/Red Things_00.jpg", "red things"]
    assert Counter(row[2] for row in rows[1:]) == {"training": 47, "validation": 9, "testing": 4}
    image_dir.rename(tmp_path / "moved")
    assert train("--image_dir", "moved", "--split_file", "lists/split.tsv", "--random_seed", 1) == 0
    again = capsys.readouterr().out
    pattern = r"(Images: .*|Final .*)"
    assert re.findall(pattern, first) == re.findall(pattern, again)
    assert Path("output_graph.pb").read_bytes() == graph


def test_a_split_with_folders_of_ones_own_is_read_again(train, others, capsys):
    assert train("--test_dir", others, "--write_split_file", "split.tsv", "--random_seed", 1) == 0
    graph = Path("output_graph.pb").read_bytes()
    assert "../others/green/green_00.jpg\tgreen\ttesting" in Path("split.tsv").read_text()
    capsys.readouterr()
    assert train("--split_file", "split.tsv", "--random_seed", 1) == 0
    said = capsys.readouterr().out
    assert ", 12 to test." in said and "to compute" not in said
    assert Path("output_graph.pb").read_bytes() == graph


def test_images_from_elsewhere_come_in_the_order_of_the_file(image_dir, others, tmp_path):
    """Not in one that changes with the seed of Python's hashes, and with it what is learnt."""
    folder = next(path for path in others.rglob("*") if path.is_dir() and any(path.glob("*.jpg")))
    own, outside = retrain.list_images(str(image_dir)), sorted(folder.glob("*.jpg"))[::-1]
    label = retrain.label_of(folder.name)
    lines = [f"{image.path.parent.name}/{image.path.name}\t{image.label}\ttraining" for image in own]
    lines += [f"{path}\t{label}\ttraining" for path in outside]
    (tmp_path / "split.tsv").write_text("\ufeff" + "\n".join(lines), "utf-8")  # as Excel writes it
    images = retrain.read_split_file(str(tmp_path / "split.tsv"), str(image_dir), own)
    assert [image.path for image in images[len(own) :]] == outside


def test_an_absolute_path_is_the_image_that_a_relative_image_dir_lists(train, image_dir):
    """Else one image would count twice, once to train and once to test."""
    images = retrain.assign_splits(retrain.list_images("pictures"), 10, 10)
    rows = [f"{image.key}\t{image.label}\t{image.split}\n" for image in images]
    Path("split.tsv").write_text("".join([f"{image_dir.resolve()}/{rows[0]}", *rows[1:]]))
    assert retrain.read_split_file("split.tsv", "pictures", images) == images
    Path("split.tsv").write_text(f"{image_dir.resolve()}/{''.join([*rows, rows[0]])}")
    with pytest.raises(retrain.UserError, match="line 61: .* is named twice"):
        retrain.read_split_file("split.tsv", "pictures", images)


def test_odd_names_survive(train, image_dir, capsys):
    for name in ('a "quoted"\tname.jpg', "line\nbreak.jpg", "\udcff\udcfe.jpg", "кошка.jpg"):
        make_image(COLOURS["green"], 3).save(image_dir / "green" / name, "JPEG")
    assert train("--write_split_file", "split.tsv") == 0
    assert train("--split_file", "split.tsv") == 0
    assert "are left out" not in capsys.readouterr().err


def test_images_that_it_does_not_name_are_left_out(train, capsys):
    train("--write_split_file", "split.tsv")
    lines = Path("split.tsv").read_text().splitlines(keepends=True)
    Path("split.tsv").write_text("".join(line for line in lines if "green_03" not in line and "blue_07" not in line))
    capsys.readouterr()
    assert train("--split_file", "split.tsv") == 0
    said = capsys.readouterr()
    assert "Classes: red things 20, blue 19, green 19." in said.out
    assert "WARNING: 2 images of pictures are not in split.tsv, and are left out." in said.err


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: text + "green/none.jpg\tgreen\ttraining\n", "line 62: green/none.jpg is no image of the class"),
        (lambda text: text.replace("\tblue\t", "\tgreen\t", 1), "blue/blue_00.jpg is no image of the class 'green'"),
        (lambda text: text.replace("testing", "tested", 1), "is not: path, label and training, validation or testing"),
        (lambda text: text.replace("\t", ",", 4), "line 1 is not: path, label"),
        (lambda text: re.sub("green\ttraining", "green\ttesting", text), "no usable images of 'green' to train on"),
        (lambda text: "", "no usable images of 'blue', 'green', 'red things' to train on"),
    ],
)
def test_a_wrong_split_file_gets_one_sentence(train, error_of, change, said):
    images = retrain.assign_splits(retrain.list_images("pictures"), 10, 10)
    retrain.write_split_file(Path("split.tsv"), "pictures", images)
    Path("split.tsv").write_text(change(Path("split.tsv").read_text()))
    sentence = error_of("--split_file", "split.tsv")
    assert sentence.startswith("--split_file split.tsv") and said in sentence


def test_a_class_whose_training_image_is_damaged_trains_on_the_others(train, image_dir, capsys):
    for path in sorted((image_dir / "green").iterdir())[3:]:
        path.unlink()
    left = [Image(path, "green") for path in sorted((image_dir / "green").iterdir())]
    (damaged,) = (image.path for image in retrain.assign_splits(left, 10, 10) if image.split == "training")
    damaged.write_bytes(b"no image")
    assert train() == 0
    assert "green 2." in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_an_image_named_through_a_link_is_the_same_image(train, image_dir, capsys):
    assert train("--write_split_file", "split.tsv") == 0
    Path("link").symlink_to(image_dir)
    lines = Path("split.tsv").read_text().splitlines()
    path, label, _ = lines[-1].split("\t")
    Path("split.tsv").write_text("\n".join([*lines, f"../link/{path}\t{label}\ttesting"]))
    capsys.readouterr()
    assert train("--split_file", "split.tsv") == 1
    assert "is named twice" in capsys.readouterr().err
