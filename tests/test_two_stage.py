"""Training in two stages: what is carried over, what is rehearsed, and that all of it ends in the usual graph."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image_dir
from test_export import FINAL, bytes_of, predicted, session_run
from test_head import separable

import retrain
from retrain import Rows, TrainingSettings

SETTINGS = TrainingSettings(40, 0.05, hidden_units=(8,), batch_norm=True, random_seed=1, refine_training_steps=400)
NO_STEP = TrainingSettings(1, 0.0, hidden_units=(8,), random_seed=1)
ROWS = separable(20)
FEW = Rows(ROWS.matrix, ROWS.rows[:40:5], ROWS.classes[:40:5])  # of the first two classes


@pytest.fixture(scope="module")
def base() -> retrain.Head:
    """The head of stage one."""
    return retrain.train_head(ROWS, ROWS, 3, SETTINGS)[0]


@pytest.fixture
def coarse(tmp_path) -> Path:
    """A folder of many images, with the labels of a few swapped."""
    folder = make_image_dir(tmp_path / "train_old", 30)
    for i in range(5):
        paths = [folder / label / f"{label}_{i:02}.jpg" for label in ("green", "blue")]
        paths[0].rename(folder / "kept.jpg")
        paths[1].rename(paths[0])
        (folder / "kept.jpg").rename(paths[1])
    return folder


def test_stage_two_goes_on_from_what_stage_one_has_learnt(base):
    head, _ = retrain.train_head(FEW, FEW, 3, NO_STEP, base=base, coarse=ROWS)
    np.testing.assert_allclose(head.logits(ROWS.matrix), base.logits(ROWS.matrix), atol=1e-4)


def test_with_other_classes_the_hidden_layers_are_carried_over_and_the_output_begins_anew(base):
    head, _ = retrain.train_head(FEW, FEW, 2, NO_STEP, base=base)
    for ours, theirs in zip(head.hidden[0], base.hidden[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert head.weights.shape == (8, 2) and not head.biases.any()


def test_stage_two_rehearses_what_stage_one_knows(base):
    """A class of which stage two has no images is still known after it, if it is rehearsed."""
    known = {}
    for rehearsal in (0, 0.5):
        settings = TrainingSettings(400, 0.3, hidden_units=(8,), random_seed=1, rehearsal=rehearsal)
        head, _ = retrain.train_head(FEW, FEW, 3, settings, base=base, coarse=ROWS)
        known[rehearsal] = retrain.softmax(head.logits(ROWS.matrix[40:]))[:, 2].mean()
    assert known[0] < known[0.5] > 0.9


@pytest.mark.parametrize("size", [-1, 100])
def test_rehearsed_rows_count_by_their_share(size):
    few, many, random = separable(2), separable(40), np.random.default_rng(0)
    settings = TrainingSettings(train_batch_size=size)
    sources = [retrain.training_batches(rows, settings, random) for rows in (few, many)]
    batch, features, classes, weights = next(retrain.rehearsed(*sources, 0.25))
    assert len(features) == len(classes) == len(weights) == (126 if size == -1 else 200)
    np.testing.assert_array_equal(features[: len(batch)], few.matrix[batch])
    assert weights.sum() == pytest.approx(1) and weights[: len(batch)].sum() == pytest.approx(0.75)


def test_the_settings_of_the_stages():
    settings = TrainingSettings(coarse_learning_rate=0.1, coarse_training_steps=5, refine_training_steps=7)
    first, second = settings.stages(same_classes=True)
    assert (first.learning_rate, first.how_many_training_steps) == (0.1, 5)
    assert (second.learning_rate, second.how_many_training_steps) == (pytest.approx(0.03), 7)
    assert settings.stages(same_classes=False)[1].learning_rate == 0.1
    given = TrainingSettings(coarse_learning_rate=0.1, refine_learning_rate=0.5)
    assert given.stages(same_classes=True)[1].learning_rate == 0.5


def test_from_photographs_to_predictions(train, coarse, image_dir, tmp_path, capsys):
    flags = ("--coarse_image_dir", "train_old", "--coarse_training_steps", 150)
    assert train(*flags, "--coarse_learning_rate", 0.05, "--random_seed", 2) == 0
    said = capsys.readouterr().out
    assert "Images: 47 to train, 9 to validate, 4 to test." in said
    assert re.search("Stage one trains on [1-3][0-9] coarse images, stage two on 47 others.", said)
    told = dict(re.findall(r"^  (stage one|without stage one|both stages): ([\d.]+)% of the 4", said, re.MULTILINE))
    assert len(told) == 3 and float(told["both stages"]) >= 75
    assert f"Final test accuracy = {told['both stages']}% (N=4)" in said
    paths = sorted(image_dir.glob("*/*_0[0-3].jpg"))
    scores = session_run(Path("output_graph.pb"), FINAL, bytes_of(paths))
    np.testing.assert_allclose(predicted(tmp_path, paths), scores, atol=1e-3)
    hidden = [n for n in retrain.read_graph(Path("output_graph.pb")).node if n.name.endswith("hidden_0/weights")]
    assert retrain.import_tensorflow().make_ndarray(hidden[0].attr["value"].tensor).shape == (16, 256)


def test_other_classes_are_not_compared(train, coarse, capsys):
    (coarse / "blue").rename(coarse / "violet")
    assert train("--coarse_image_dir", "train_old", "--refine_training_steps", 200) == 0
    said = capsys.readouterr().out
    assert "  stage one: " not in said and "  both stages: " in said
    assert Path("output_labels.txt").read_text().split("\n")[:3] == ["red things", "blue", "green"]


def test_labels_count_not_the_names_of_folders(train, coarse, capsys):
    (coarse / "Red Things").rename(coarse / "red_things")  # comes last in the order of names
    assert train("--coarse_image_dir", "train_old", "--coarse_learning_rate", 0.05, "--testing_percentage", 0) == 0
    assert float(re.search(r"  stage one: ([\d.]+)% of the", capsys.readouterr().out)[1]) >= 75


def test_copies_of_held_out_images_are_left_out(train, coarse, image_dir, capsys):
    for i in range(20):
        shutil.copy(image_dir / f"green/green_{i:02}.jpg", coarse / f"green/copy_{i:02}.jpg")
    assert train("--coarse_image_dir", "train_old", "--write_split_file", "split.tsv") == 0
    held_out = re.findall(r"^green/.*(?:validation|testing)$", Path("split.tsv").read_text(), re.MULTILINE)
    said = capsys.readouterr()
    left_out = int(re.search(r"(\d+) coarse \w+ are left out", said.err)[1])
    assert left_out >= len(held_out) > 0
    assert f"Stage one trains on {110 - left_out} coarse images" in said.out


def test_the_defaults_are_those_published():
    flags = retrain.parse_flags(["--coarse_image_dir", "x"])
    assert (flags.hidden_units, flags.dropout) == ((256,), 0.4)
    flags = retrain.parse_flags(["--coarse_image_dir", "x", "--hidden_units", "64,32", "--dropout", "0"])
    assert (flags.hidden_units, flags.dropout) == ((64, 32), 0)
