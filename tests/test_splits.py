"""Who trains and who tests by other rules than the hash: folders of one's own, and split files."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import COLOURS, make_image, make_image_dir

import predict
import retrain


@pytest.fixture
def others(tmp_path) -> Path:
    """A folder with the class folders and file names of `image_dir`, and other pictures: the colours swapped."""
    folder = make_image_dir(tmp_path / "others", 4)
    (folder / "green").rename(folder / "was green")
    (folder / "blue").rename(folder / "green")
    (folder / "was green").rename(folder / "blue")
    for name, other in (("green", "blue"), ("blue", "green")):
        for path in (folder / name).iterdir():
            path.rename(path.with_name(path.name.replace(other, name)))
    return folder


def error_of(train, capsys, *flags) -> str:
    """Return the one sentence with which a run ends."""
    assert train(*flags, "--logging_verbosity", "ERROR") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert not Path("output_graph.pb").exists()
    return said


# Folders of one's own


def test_validation_dir_and_test_dir_take_the_place_of_the_split(train, others, capsys):
    few = make_image_dir(others.parent / "few", 2)
    assert train("--validation_dir", others, "--test_dir", few) == 0
    assert "Images: 60 to train, 12 to validate, 6 to test." in capsys.readouterr().out
    assert train("--test_dir", few) == 0
    trained, validated, tested = map(
        int, re.search(r"(\d+) to train, (\d+) to v\w+, (\d+)", capsys.readouterr().out).groups()
    )
    assert (trained + validated, tested) == (60, 6) and validated > 0


def test_the_accuracy_is_that_of_the_folder(train, others, capsys):
    """Two of its three classes are swapped, so what is told rightly elsewhere is told wrongly there."""
    assert train("--test_dir", others, "--how_many_training_steps", 300, "--learning_rate", 0.1) == 0
    assert "Final test accuracy = 33.3% (N=12)" in capsys.readouterr().out


def test_pictures_of_the_same_name_keep_their_own_features(train, others, image_dir, capsys):
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


@pytest.mark.parametrize("flag", ["--validation_dir", "--test_dir"])
def test_each_class_that_is_missing_or_extra_is_named(train, others, capsys, flag):
    shutil.rmtree(others / "green")
    (others / "blue").rename(others / "Violet!")
    make_image(COLOURS["blue"], 1).save(others / "Violet!/one.jpg")
    said = error_of(train, capsys, flag, others)
    assert said.endswith(
        f"{flag} {others}: its class folders must be those of --image_dir (missing: 'blue', 'green'; extra: 'violet ')."
    )


@pytest.mark.parametrize("flag", ["--validation_dir", "--test_dir", "--coarse_image_dir"])
def test_the_folder_itself_is_no_other(train, image_dir, capsys, flag):
    Path("link").symlink_to(image_dir)
    assert f"{flag} link: it is the same folder as --image_dir" in error_of(train, capsys, flag, "link")


def test_pictures_do_not_both_validate_and_test(train, others, capsys):
    said = error_of(train, capsys, "--validation_dir", others, "--test_dir", others)
    assert f"--test_dir {others}: it is the same folder as --validation_dir" in said


def test_a_folder_that_is_not_there_is_named_with_its_flag(train, capsys):
    assert "--test_dir nowhere: there is no such folder" in error_of(train, capsys, "--test_dir", "nowhere")


def test_one_picture_of_a_class_is_enough_to_validate_with(train, others):
    for path in others.glob("green/*_0[1-9].jpg"):
        path.unlink()
    assert train("--validation_dir", others) == 0


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


def test_pictures_from_elsewhere_come_in_the_order_of_the_file(image_dir, others, tmp_path):
    """Not in one that changes with the seed of Python's hashes, and with it what is learnt."""
    folder = next(path for path in others.rglob("*") if path.is_dir() and any(path.glob("*.jpg")))
    own, outside = retrain.list_images(str(image_dir)), sorted(folder.glob("*.jpg"))[::-1]
    label = retrain.label_of(folder.name)
    lines = [f"{image.path.parent.name}/{image.path.name}\t{image.label}\ttraining" for image in own]
    lines += [f"{path}\t{label}\ttraining" for path in outside]
    (tmp_path / "split.tsv").write_text("\ufeff" + "\n".join(lines), "utf-8")  # as Excel writes it
    images = retrain.read_split_file(str(tmp_path / "split.tsv"), str(image_dir), own)
    assert [image.path for image in images[len(own) :]] == outside


def test_an_absolute_path_is_the_image_that_a_relative_image_dir_lists(train, image_dir, capsys):
    """Else one image would count twice, once to train and once to test."""
    images = retrain.assign_splits(retrain.list_images("pictures"), 10, 10)
    retrain.write_split_file(Path("split.tsv"), "pictures", images)
    first = images[0]
    lines = Path("split.tsv").read_text().splitlines()
    lines[1] = f"{image_dir.resolve() / first.key}\t{first.label}\t{first.split}"
    Path("split.tsv").write_text("\n".join(lines))
    assert retrain.read_split_file("split.tsv", "pictures", images) == images
    Path("split.tsv").write_text("\n".join([*lines, f"{first.key}\t{first.label}\ttesting"]))
    with pytest.raises(retrain.UserError, match="is named twice"):
        retrain.read_split_file("split.tsv", "pictures", images)


def test_odd_names_survive(train, image_dir, capsys):
    for name in ('a "quoted"\tname.jpg', "line\nbreak.jpg", "\udcff\udcfe.jpg", "кошка.jpg"):
        make_image(COLOURS["green"], 3).save(image_dir / "green" / name, "JPEG")
    assert train("--write_split_file", "split.tsv") == 0
    assert train("--split_file", "split.tsv") == 0
    assert "are left out" not in capsys.readouterr().err


def test_pictures_that_it_does_not_name_are_left_out(train, capsys):
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
        (lambda text: text + "green/none.jpg\tgreen\ttraining\n", "line 62: there is no image green/none.jpg in"),
        (lambda text: text + text.splitlines()[5] + "\n", "line 62: Red Things/Red Things_04.jpg is named twice"),
        (lambda text: text.replace("\tblue\t", "\tgreen\t", 1), "is not of the class 'green'"),
        (lambda text: text.replace("testing", "tested", 1), "is not: path, label and training, validation or testing"),
        (lambda text: text.replace("\t", ",", 4), "line 1 is not: path, label"),
        (lambda text: re.sub("green\ttraining", "green\ttesting", text), "it leaves nothing to train on to 'green'"),
        (lambda text: "", "it leaves nothing to train on to 'red things', 'blue', 'green'"),
    ],
)
def test_a_wrong_split_file_gets_one_sentence(train, capsys, change, said):
    images = retrain.assign_splits(retrain.list_images("pictures"), 10, 10)
    retrain.write_split_file(Path("split.tsv"), "pictures", images)
    Path("split.tsv").write_text(change(Path("split.tsv").read_text()))
    sentence = error_of(train, capsys, "--split_file", "split.tsv")
    assert sentence.startswith("retrain.py: error: --split_file split.tsv: ") and said in sentence


def test_a_split_file_that_is_not_there(train, capsys):
    assert "--split_file none.tsv: it can't be read (" in error_of(train, capsys, "--split_file", "none.tsv")


def test_a_split_file_and_folders_contradict_each_other(capsys):
    with pytest.raises(SystemExit):
        retrain.parse_flags(["--split_file", "a.tsv", "--test_dir", "b"])
    assert "--split_file says what every image does" in capsys.readouterr().err


def test_predict_names_what_was_trained_so(train, others, capsys):
    assert train("--validation_dir", others) == 0
    capsys.readouterr()
    assert predict.main(["--image", "pictures/green/green_00.jpg"]) == 0
    assert "(score = " in capsys.readouterr().out
