"""The room 'export': the files that a run leaves, and that every kind of reader gets the same scores out of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image

import predict
import retrain

JPEG, FINAL, FED = "DecodeJpeg/contents:0", "final_result:0", "input/BottleneckInputPlaceholder:0"
FEATURES = "pool_3/_reshape:0"


@pytest.fixture(scope="module")
def base(model_dir, tmp_path_factory) -> retrain.BaseModel:
    """The small base model, converted."""
    return retrain.load_base_model(retrain.inception_recipe(model_dir), model_dir, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory) -> list[Path]:
    """Some JPEGs of several sizes and colours."""
    folder = tmp_path_factory.mktemp("unseen")
    looks = {(200, 40, 40): (60, 48), (40, 180, 60): (33, 33), (40, 60, 210): (120, 200), (128, 128, 0): (21, 90)}
    for i, (colour, size) in enumerate(looks.items()):
        make_image(colour, 1000 + i, size).save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.iterdir())


def graph_in(path: Path):
    """Return the GraphDef in a file, as any reader of TensorFlow's gets it."""
    import tensorflow as tf

    return tf.compat.v1.GraphDef.FromString(path.read_bytes())


def session_run(path: Path, fetch: str, feeds: list[dict]) -> np.ndarray:
    """Return what a TensorFlow 1 session fetches from a frozen graph for each of the feeds, one after another."""
    import tensorflow as tf

    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        tf.import_graph_def(graph_in(path), name="")
        return np.array([session.run(fetch, feed)[0] for feed in feeds])


def signature(folder: Path, name: str):
    """Return a signature of a SavedModel, with its one input."""
    import tensorflow as tf

    serve = tf.saved_model.load(str(folder)).signatures[name]
    (given,) = serve.structured_input_signature[1].values()
    return serve, given


def served(folder: Path, paths: list[Path]) -> np.ndarray:
    """Return a SavedModel's scores of files, float32 [paths, labels]."""
    serve, _ = signature(folder, "image_bytes")
    return serve(image_bytes=np.array([path.read_bytes() for path in paths], object))["prediction"].numpy()


def predicted(folder: Path, paths: list[Path]) -> np.ndarray:
    """Return predict.py's scores, float32 [paths, labels], in the order of the labels."""
    classifier = predict.Classifier(str(folder / "output_graph.pb"), str(folder / "output_labels.txt"), len(paths))
    found = [dict(prediction.scores) for prediction in predict.predict(classifier, paths)]
    return np.array([[scores[label] for label in classifier.labels] for scores in found])


def bytes_of(paths: list[Path]) -> list[dict]:
    """Return what to feed a graph with for each of the files."""
    return [{JPEG: path.read_bytes()} for path in paths]


# The graph


def test_readers_of_tensorflow_1_and_2_run_the_graph_and_agree_with_predict(trained, unseen):
    import tensorflow as tf

    scores = session_run(trained / "output_graph.pb", FINAL, bytes_of(unseen))
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(predicted(trained, unseen), scores, atol=1e-3)
    assert scores[:3].argmax(axis=1).tolist() == [0, 2, 1]  # red things, green, blue
    graph = graph_in(trained / "output_graph.pb")
    assert (graph.node[-1].name, graph.node[-1].op) == ("final_result", "Softmax")  # the last node
    wrapped = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(graph, name=""), [])
    run = wrapped.prune(wrapped.graph.get_tensor_by_name(JPEG), wrapped.graph.get_tensor_by_name(FINAL))
    np.testing.assert_allclose([run(tf.constant(path.read_bytes()))[0] for path in unseen], scores, atol=1e-5)


def test_graph_can_be_fed_with_bottlenecks(trained, unseen):
    """As the classic script's evaluation did: the features of an image in, its scores out; several at once, too."""
    graph = trained / "output_graph.pb"
    features = session_run(graph, FEATURES, bytes_of(unseen))
    assert features.shape == (len(unseen), 16)
    scores = session_run(graph, FINAL, bytes_of(unseen))
    np.testing.assert_allclose(session_run(graph, FINAL, [{FED: row[None]} for row in features]), scores, atol=1e-5)
    firsts = session_run(graph, FINAL, [{FED: features[i:]} for i in range(len(features))])  # of a batch
    np.testing.assert_allclose(firsts, scores, atol=1e-5)


@pytest.mark.parametrize("name", ["prediction", "my/scores.2", "Mu"])
def test_final_tensor_name(train, tmp_path, unseen, name):
    assert train("--final_tensor_name", name) == 0
    scores = session_run(tmp_path / "output_graph.pb", f"{name}:0", bytes_of(unseen))
    np.testing.assert_allclose(predicted(tmp_path, unseen), scores, atol=1e-3)
    assert json.loads((tmp_path / "output_graph.json").read_text())["final_tensor_name"] == name


def test_a_damaged_base_model_of_ours_gets_one_sentence(train, tmp_path, model_dir, error_of, capsys):
    folder = shutil.copytree(model_dir, tmp_path / "own")
    assert train("--model_dir", folder, "--no_report") == 0
    (tmp_path / "output_graph.pb").unlink()
    (kept,) = folder.glob("inception_v3.*.tflite")
    kept.write_bytes(kept.read_bytes()[:3000])
    capsys.readouterr()
    assert f"{kept} is damaged; remove it" in error_of("--model_dir", folder)


@pytest.mark.parametrize("name", ["a b", "", "final_result:0"])
def test_final_tensor_name_that_can_not_be(train, capsys, tmp_path, name):
    with pytest.raises(SystemExit):
        train("--final_tensor_name", name)
    (said,) = capsys.readouterr().err.splitlines()
    assert "--final_tensor_name" in said
    assert not (tmp_path / "output_graph.pb").exists()


# The .tflite and the facts


def test_facts_tie_the_files_together(trained, model_dir):
    facts = json.loads((trained / "output_graph.json").read_text("utf-8"))
    files = {"graph": trained / "output_graph.pb", "lite": trained / "output_graph.tflite"}
    for name, path in (files | {"base_model": model_dir / retrain.GRAPH_FILE}).items():
        assert facts[f"{name}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (trained / "output_labels.txt").read_bytes() == b"red things\nblue\ngreen\n"  # in the order of the scores
    assert facts["labels"] == ["red things", "blue", "green"]
    assert (facts["architecture"], facts["input_size"]) == ("inception_v3", [33, 33])
    assert facts["test_images"] == 4 and 0 <= facts["test_accuracy"] <= 1


def test_tflite_agrees_with_the_graph(trained, unseen):
    lite = retrain.LiteModel(trained / "output_graph.tflite")
    assert lite.input_size == (33, 33)
    pixels = [retrain.read_image(path, retrain.Reading(), (33, 33)) for path in unseen]
    scores = [lite(retrain.resize_bilinear(each, (33, 33)))[0] for each in pixels]
    np.testing.assert_allclose(scores, session_run(trained / "output_graph.pb", FINAL, bytes_of(unseen)), atol=1e-4)


@pytest.mark.parametrize("class_count", [1, 2, 1000])
def test_tflite_with_any_number_of_classes(base, tmp_path, class_count):
    """Random heads, against the graph with the same head and against the head itself."""
    random = np.random.default_rng(class_count)
    head = retrain.Head(
        random.normal(size=(16, class_count)).astype(np.float32), random.normal(size=class_count).astype(np.float32)
    )
    retrain.write_lite(tmp_path / "headed.tflite", base.lite_path, head)
    lite, features = retrain.LiteModel(tmp_path / "headed.tflite"), retrain.LiteModel(base.lite_path)
    retrain.write_graph(tmp_path / "headed.pb", base, head, "final_result")
    run = retrain.graph_function(graph_in(tmp_path / "headed.pb"), "final_result")
    for _ in range(3):
        pixels = random.uniform(0, 255, (33, 33, 3)).astype(np.float32)
        scores, _ = lite(pixels)
        assert scores.shape == (class_count,)
        np.testing.assert_allclose(scores, run(pixels[None])[0].numpy()[0], atol=1e-4)
        np.testing.assert_allclose(scores, retrain.softmax(head.logits(features(pixels)[0])), atol=1e-4)


# SavedModel


def test_saved_model_serves_batches(trained, unseen):
    _, given = signature(trained / "saved_model", "image_bytes")
    assert (given.name, given.dtype.name, given.shape.as_list()) == ("image_bytes", "string", [None])
    scores = served(trained / "saved_model", unseen)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, predicted(trained, unseen), atol=1e-3)
    np.testing.assert_allclose(served(trained / "saved_model", unseen[:1]), scores[:1], atol=1e-5)


def test_saved_model_takes_pixels_as_that_of_tf_hub_did(trained, unseen):
    serve, given = signature(trained / "saved_model", "serving_default")
    assert (given.name, given.dtype.name) == ("image", "float32")
    size = tuple(given.shape[1:3])
    pixels = [retrain.resize_bilinear(retrain.read_image(path, retrain.Reading(), size), size) for path in unseen]
    predictions = serve(image=np.stack(pixels) / 255)["prediction"]
    np.testing.assert_allclose(predictions, predicted(trained, unseen), atol=1e-3)


@pytest.mark.parametrize("kind, mode", [("PNG", "RGB"), ("PNG", "L"), ("PNG", "RGBA"), ("BMP", "RGB"), ("GIF", "P")])
def test_saved_model_reads_other_formats(trained, tmp_path, kind, mode):
    path = tmp_path / "image"
    make_image((40, 180, 60), 77).convert(mode).save(path, kind)
    np.testing.assert_allclose(served(trained / "saved_model", [path]), predicted(trained, [path]), atol=1e-3)


def test_saved_model_replaces_its_own_and_nothing_else(train, tmp_path, unseen):
    flags = ("--saved_model_dir", "model/1", "--random_seed")
    assert train(*flags, 1) == 0
    first = served(tmp_path / "model/1", unseen)
    for name in ("notes.txt", "variables/mine"):
        (tmp_path / "model/1" / name).write_text("mine")
    there = {path.name for path in (tmp_path / "model").rglob("*")}
    assert train(*flags, 2, "--learning_rate", 0.3) == 0
    assert np.abs(served(tmp_path / "model/1", unseen) - first).max() > 0.01
    assert {path.name for path in (tmp_path / "model").rglob("*")} == there
    assert (tmp_path / "model/1/notes.txt").read_text() == (tmp_path / "model/1/variables/mine").read_text() == "mine"


# Intermediate graphs


def test_intermediate_graphs_are_runnable_and_on_the_way(trained, unseen):
    graphs = trained / "intermediate_graph"
    assert sorted(path.name for path in graphs.iterdir()) == ["intermediate_100.pb", "intermediate_200.pb"]
    early, late = (session_run(graphs / f"intermediate_{step}.pb", FINAL, bytes_of(unseen)) for step in (100, 200))
    final = session_run(trained / "output_graph.pb", FINAL, bytes_of(unseen))
    np.testing.assert_allclose(early.sum(axis=1), 1, atol=1e-5)
    assert np.abs(early - late).max() > 1e-3
    heated = final ** json.loads((trained / "output_graph.json").read_text())["temperature"]  # which only it has
    final = heated / heated.sum(axis=1, keepdims=True)
    assert np.abs(late - final).mean() < np.abs(early - final).mean()


@pytest.mark.parametrize("frequency, steps", [(0, []), (7, [7, 14]), (1, list(range(1, 20))), (50, [])])
def test_intermediate_store_frequency(train, frequency, steps):
    assert train("--intermediate_store_frequency", frequency, "--intermediate_output_graphs_dir", "on/the/way") == 0
    assert {path.name for path in Path("on/the/way").glob("*")} == {f"intermediate_{step}.pb" for step in steps}


# Where outputs go


def test_output_folders_are_made(train, unseen):
    assert train("--output_graph", "a/b/graph.pb", "--output_labels", "c/names.txt") == 0
    assert {path.name for path in Path("a/b").iterdir()} >= {"graph.pb", "graph.tflite", "graph.json"}
    assert Path("c/names.txt").is_file()
    assert predict.main(["--graph", "a/b/graph.pb", "--labels", "c/names.txt", "--image", str(unseen[0])]) == 0


def write_old_outputs(folder: Path) -> None:
    for name in ("output_graph.pb", "output_graph.tflite", "output_graph.json", "output_labels.txt"):
        (folder / name).write_text(f"the old {name}")


def outputs(folder: Path) -> dict[str, bytes]:
    """Return the files that a run leaves in a folder, images, features and logs aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "flags",
    [
        ("--output_graph", "file/graph.pb"),
        ("--output_graph", "taken.pb"),
        ("--output_labels", "file/labels.txt"),
        ("--output_labels", "taken.pb"),
        ("--saved_model_dir", "file/model"),
        ("--saved_model_dir", "file"),
        ("--summaries_dir", "file"),
        ("--checkpoint_path", "file/head"),
        ("--bottleneck_dir", "file"),
        ("--intermediate_store_frequency", "5", "--intermediate_output_graphs_dir", "file"),
    ],
    ids=lambda flags: " ".join(flags[-2:]),
)
def test_unwritable_output_is_told_and_nothing_is_lost(train, tmp_path, capsys, flags):
    write_old_outputs(tmp_path)
    (tmp_path / "taken.pb").mkdir()
    (tmp_path / "file").write_text("mine")
    before = outputs(tmp_path)
    assert train("--logging_verbosity", "ERROR", *flags) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("retrain.py: error: ")
    assert any(name in said for name in ("file", "taken.pb"))
    assert outputs(tmp_path) == before
    assert not [*tmp_path.rglob(".retrain-*"), *tmp_path.glob(".*.tmp")]


def test_full_disk_leaves_the_old_outputs(train, tmp_path, capsys, monkeypatch):
    """No space for the .tflite: neither the graph nor the labels are replaced."""
    write_old_outputs(tmp_path)
    before = outputs(tmp_path)

    def no_space(path, lite_path, head):
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(retrain, "write_lite", no_space)
    assert train("--logging_verbosity", "ERROR") == 1
    said = capsys.readouterr().err
    assert said == "retrain.py: error: output_graph.tflite could not be written (No space left on device).\n"
    assert outputs(tmp_path) == before
