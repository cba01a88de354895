"""Training in two stages: what is carried over, what is reported, and that all of it ends in the usual graph."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import make_image_dir
from test_export import FINAL, bytes_of, predicted, session_run
from test_head import separable

import retrain
from retrain import Rows, TrainingSettings

SETTINGS = TrainingSettings(40, 0.05, hidden_units=(8,), dropout=0.4, random_seed=1)


@pytest.fixture
def coarse(tmp_path) -> Path:
    """A folder of many pictures, with the labels of a few swapped."""
    folder = make_image_dir(tmp_path / "train_old", 30)
    for i in range(5):
        paths = [folder / label / f"{label}_{i:02}.jpg" for label in ("green", "blue")]
        paths[0].rename(folder / "kept.jpg")
        paths[1].rename(paths[0])
        (folder / "kept.jpg").rename(paths[1])
    return folder


def stages(same: bool = True, classes: int = 3, **changes) -> retrain.TwoStages:
    """Return what training in two stages gives on separable rows, stage two with some settings changed."""
    rows = separable(20)
    settings = {"base": SETTINGS, "alone": SETTINGS}
    settings["refined"] = TrainingSettings(**{**SETTINGS.__dict__, "learning_rate": 0.005, **changes})
    few = Rows(rows.matrix, rows.rows[::5], rows.classes[::5] if classes == 3 else rows.classes[::5] // 2)
    return retrain.train_two_stages(rows, few, few, (3, classes), same, settings)


def test_from_photographs_to_predictions(train, coarse, image_dir, tmp_path, capsys):
    import tensorflow as tf

    flags = ("--coarse_image_dir", "train_old", "--coarse_training_steps", 150, "--saved_model_dir", "saved")
    assert train(*flags, "--coarse_learning_rate", 0.05, "--random_seed", 2) == 0
    said = capsys.readouterr().out
    assert "Pictures: 47 to train, 9 to validate, 4 to test." in said
    assert (
        re.search("Stage one, on 7[0-9] coarse pictures:", said)
        and "from the weights of stage one on those 47 pictures" in said
    )
    assert "On the same 4 pictures, that none of them was trained on:" in said
    told = dict(re.findall(r"^  (base model|trained|refined).*: ([\d.]+)%$", said, re.MULTILINE))
    assert set(told) == {"base model", "trained", "refined"} and float(told["refined"]) >= 75
    assert f"Final test accuracy = {told['refined']}% (N=4)" in said
    with PIL.Image.open("output_two_stage.png") as image:
        assert image.format == "PNG" and min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    paths = sorted(image_dir.glob("*/*_0[0-3].jpg"))
    scores = session_run(Path("output_graph.pb"), FINAL, bytes_of(paths))
    np.testing.assert_allclose(predicted(tmp_path, paths), scores, atol=1e-3)
    given = tf.constant([path.read_bytes() for path in paths])
    served = tf.saved_model.load("saved").signatures["serving_default"](image_bytes=given)
    np.testing.assert_allclose(served["scores"], scores, atol=1e-3)
    hidden = [n for n in retrain.read_graph(Path("output_graph.pb")).node if n.name.endswith("hidden_0/weights")]
    assert retrain.import_tensorflow().make_ndarray(hidden[0].attr["value"].tensor).shape == (16, 256)


def test_stage_two_goes_on_from_the_weights_of_stage_one():
    trained = stages(learning_rate=0)
    base, refined, alone = (trained.heads[name] for name in ("base", "refined", "alone"))
    for name, values in base.variables().items():
        np.testing.assert_array_equal(refined.variables()[name], values)
        assert np.abs(alone.variables()[name] - values).max() > 1e-3
    assert np.abs(stages().heads["refined"].weights - base.weights).max() > 1e-4


def test_with_other_classes_the_hidden_layer_is_carried_over_and_the_output_begins_anew():
    trained = stages(same=False, classes=2, learning_rate=0)
    same = stages(learning_rate=0).heads["base"]
    assert "base" not in trained.heads
    refined = trained.heads["refined"]
    for ours, theirs in zip(refined.hidden[0], same.hidden[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert refined.weights.shape == (8, 2) and not refined.biases.any()
    assert {scores.split for scores in trained.histories["base"]} == {"train"}


def test_batch_normalisation_is_carried_over_too():
    settings = TrainingSettings(40, 0.05, hidden_units=(8,), batch_norm=True, dropout=0.2, random_seed=1)
    rows = separable(20)
    model = retrain.build_layers(rows.matrix, 3, settings)
    retrain.train_layers(rows, rows, 3, settings, model=model)
    fresh = retrain.with_new_output(model, rows.matrix, 2, settings)
    ours, theirs = retrain.head_of(fresh), retrain.head_of(model)
    for mine, yours in zip(ours.hidden[0], theirs.hidden[0], strict=True):
        np.testing.assert_array_equal(mine, yours)


def test_other_classes_are_told(train, coarse, capsys):
    (coarse / "blue").rename(coarse / "violet")
    assert train("--coarse_image_dir", "train_old", "--refine_training_steps", 200) == 0
    said = capsys.readouterr().out
    assert "base model, stage one alone: other classes, so it can't tell" in said
    assert "Classes: red things 20, blue 20, green 20." in said
    assert Path("output_labels.txt").read_text().split("\n")[:3] == ["red things", "blue", "green"]


def test_labels_count_not_the_names_of_folders(train, coarse, capsys):
    (coarse / "Red Things").rename(coarse / "red_things")  # comes last in the order of names
    assert train("--coarse_image_dir", "train_old", "--coarse_learning_rate", 0.05) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"stage one alone: ([\d.]+)%", said)[1]) >= 75


def test_without_pictures_to_test_with_those_to_validate_with_are_held_out(train, coarse, capsys):
    assert train("--coarse_image_dir", "train_old", "--testing_percentage", 0) == 0
    assert re.search(r"On the same (9|1\d) pictures", capsys.readouterr().out)


@pytest.mark.parametrize("size", [-1, 100])
def test_rehearsed_rows_count_by_their_share(size):
    few, many = separable(2), separable(40)
    settings = TrainingSettings(train_batch_size=size, rehearsal=0.25)
    batch, features, classes, weights = retrain.batch_mixer([(few, 0.75), (many, 0.25)], 3, settings)()
    assert len(features) == len(classes) == len(weights) == (126 if size == -1 else 200)
    np.testing.assert_array_equal(features[: len(batch)], few.matrix[batch])
    assert weights.mean() == pytest.approx(1) and weights[: len(batch)].sum() / weights.sum() == pytest.approx(0.75)


def test_stage_two_rehearses_what_stage_one_knows():
    """A class of which stage two has no pictures is still known after it, if it is rehearsed."""
    rows = separable(20)
    few = Rows(rows.matrix, rows.rows[:40:5], rows.classes[:40:5])  # of the first two classes
    known = {}
    for rehearsal in (0, 0.5):
        base = TrainingSettings(200, 0.05, hidden_units=(8,), random_seed=1)
        refined = TrainingSettings(400, 0.5, hidden_units=(8,), random_seed=1, rehearsal=rehearsal)
        settings = {"base": base, "alone": base, "refined": refined}
        head = retrain.train_two_stages(rows, few, few, (3, 3), True, settings).heads["refined"]
        known[rehearsal] = head.probabilities(rows.matrix[40:])[:, 2].mean()
    assert known[0] < known[0.5] > 0.9


def test_copies_of_held_out_pictures_are_left_out(train, coarse, image_dir, capsys):
    for i in range(20):
        shutil.copy(image_dir / f"green/green_{i:02}.jpg", coarse / f"green/copy_{i:02}.jpg")
    assert train("--coarse_image_dir", "train_old", "--write_split_file", "split.tsv") == 0
    held_out = re.findall(r"^green/.*(?:validation|testing)$", Path("split.tsv").read_text(), re.MULTILINE)
    said = capsys.readouterr()
    left_out = int(re.search(r"(\d+) coarse pictures are left out", said.err)[1])
    assert left_out >= len(held_out) > 0
    assert f"Stage one, on {110 - left_out} coarse pictures" in said.out


def test_a_coarse_folder_that_is_none(train, capsys):
    assert train("--coarse_image_dir", "nowhere", "--logging_verbosity", "ERROR") == 1
    assert "--coarse_image_dir nowhere: there is no such folder" in capsys.readouterr().err


def test_matplotlib_is_asked_for_by_name_before_the_work(train, coarse, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert train("--coarse_image_dir", "train_old", "--logging_verbosity", "ERROR") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "pip install matplotlib" in said
    assert not Path("bottleneck").exists()


def test_the_defaults_are_those_published():
    flags = retrain.parse_flags(["--coarse_image_dir", "x"])
    assert (flags.hidden_units, flags.dropout) == ((256,), 0.4)
    flags = retrain.parse_flags(["--coarse_image_dir", "x", "--hidden_units", "64,32", "--dropout", "0"])
    assert (flags.hidden_units, flags.dropout) == ((64, 32), 0)
    with pytest.raises(SystemExit):
        retrain.parse_flags(["--coarse_image_dir", "x", "--hidden_units", ""])
