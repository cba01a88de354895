"""On real photographs, with the Inception-v3 graph in ../shared: features, accuracy, memory. Skipped without them."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script

import predict
import retrain


@pytest.fixture(scope="module")
def run_folder(shared, tmp_path_factory):
    """A folder in which retrain.py has run on ants_bees/train as retrain.sh would have."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "model").mkdir()  # of its own, so that the converted model isn't written into ../shared
    (folder / "model" / retrain.GRAPH_FILE).symlink_to(shared / "inception_model" / retrain.GRAPH_FILE)
    done = run_script(
        "retrain.py", "--image_dir", shared / "photos/ants_bees/train", "--model_dir", "model",
        "--how_many_training_steps", 200, "--random_seed", 0, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Final test accuracy = " in done.stdout
    return folder


def test_features_are_those_of_the_classic_script(shared, run_folder):
    reference = sorted((shared / "reference/ants_bees_bottlenecks").glob("*/*.txt"))
    assert len(reference) == 24
    for theirs in reference:
        ours = run_folder / "bottleneck" / theirs.parent.name / theirs.name
        values = [np.array([float(x) for x in path.read_text().split(",")]) for path in (theirs, ours)]
        assert np.abs(values[0] - values[1]).max() < 1e-4, theirs.name


def test_accuracy_on_the_validation_photographs(shared, run_folder, monkeypatch, capsys):
    monkeypatch.chdir(run_folder)
    assert predict.main(["--image", str(shared / "photos/ants_bees/val"), "--csv", "val.csv"]) == 0
    with open("val.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["label"] == row["image"].split("/")[-2] for row in rows)
    assert len(rows) == 153
    assert right / len(rows) >= 0.93


def test_a_tf1_reader_agrees_with_predict(shared, run_folder):
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString((run_folder / "output_graph.pb").read_bytes())
    paths = sorted((shared / "photos/ants_bees/val").glob("*/*.jpg"))[::15]
    classifier = predict.Classifier(
        str(run_folder / "output_graph.pb"), str(run_folder / "output_labels.txt"), len(paths)
    )
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(graph, name="")
        for prediction in predict.predict(classifier, paths):
            scores = session.run("final_result:0", {"DecodeJpeg/contents:0": prediction.path.read_bytes()})[0]
            ours = dict(prediction.scores)
            assert np.abs(scores - [ours[label] for label in classifier.labels]).max() < 1e-3


def test_jpegs_are_decoded_to_the_bit_as_tensorflow_does(shared):
    import tensorflow as tf

    paths = sorted((shared / "photos/imagenet_one_each").glob("*.jpg"))[::10]
    assert len(paths) >= 100
    for path in paths:
        ours = retrain.read_image(path, retrain.Reading(ignore_exif_orientation=True, exact_decode=True), (299, 299))
        assert np.array_equal(ours, tf.io.decode_jpeg(path.read_bytes(), 3).numpy()), path.name


def test_a_cached_run_stays_within_600_mb(shared, run_folder):
    from benchmark import MEASURED

    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc")
    flags = ["--image_dir", shared / "photos/ants_bees/train", "--model_dir", run_folder / "model"]
    command = [sys.executable, "-c", MEASURED, ROOT, *flags, "--how_many_training_steps", "200"]
    done = subprocess.run([*map(str, command)], cwd=run_folder, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) / 1024 <= 600


def test_the_pictures_that_come_with_the_project_are_learnt(shared, run_folder, tmp_path):
    done = run_script(
        "retrain.py", "--image_dir", ROOT / "data", "--model_dir", run_folder / "model",
        "--how_many_training_steps", 200, "--random_seed", 0, cwd=tmp_path,
    )  # fmt: skip
    accuracy = float(done.stdout.split("Final test accuracy = ")[1].split("%")[0])
    assert accuracy >= 90
    named = run_script("predict.py", "--image", ROOT / "test_images", "--csv", "named.csv", cwd=tmp_path)
    assert named.returncode == 0, named.stderr
    with open(tmp_path / "named.csv", encoding="utf-8-sig", newline="") as file:
        right = [row["image"].split("/")[-1].startswith(row["label"]) for row in csv.DictReader(file)]
    assert len(right) == 10
    assert sum(right) >= 8
