"""Hidden layers before the softmax: that they learn, fold, repeat themselves, and come out of every exported format."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from test_export import FINAL, bytes_of, predicted, session_run
from test_head import NOTHING, accuracy, separable

import retrain
from retrain import Rows, TrainingSettings

TOP = ("--hidden_units", "12,8,5", "--dropout", 0.4, "--batch_norm", "--optimizer", "adam", "--learning_rate", 0.01)


def ring(count: int = 300) -> Rows:
    """Return two classes that no straight line parts: points near the origin, and those around them."""
    random = np.random.default_rng(3)
    matrix = random.normal(size=(count, 6)).astype(np.float32)
    return Rows(matrix, np.arange(count), (np.linalg.norm(matrix, axis=1) > 2.3).astype(np.intp))


@pytest.mark.parametrize("optimizer, rate", [("sgd", 0.05), ("momentum", 0.01), ("adam", 0.01), ("rmsprop", 0.01)])
def test_hidden_layers_learn_what_a_softmax_layer_can_not(optimizer, rate):
    settings = TrainingSettings(600, rate, hidden_units=(32, 16), optimizer=optimizer, random_seed=0)
    head, _ = retrain.train_head(ring(), NOTHING, 2, settings)
    assert accuracy(head, ring()) > 0.9
    assert accuracy(retrain.train_head(ring(), NOTHING, 2, TrainingSettings(600, 0.3, random_seed=0))[0], ring()) < 0.75


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_folded_head_gives_what_the_keras_model_gives(monkeypatch, batch_norm):
    keras, made = retrain.import_tensorflow().keras, []
    sequential = keras.Sequential
    monkeypatch.setattr(keras, "Sequential", lambda layers: made.append(sequential(layers)) or made[0])
    rows = separable(20)
    settings = TrainingSettings(80, 0.01, hidden_units=(9, 4), dropout=0.3, batch_norm=batch_norm, optimizer="adam")
    head, _ = retrain.train_head(rows, NOTHING, 3, settings)
    np.testing.assert_allclose(head.logits(rows.matrix), made[0].predict(rows.matrix, verbose=0), atol=1e-4)
    assert [weights.shape for weights, _ in head.hidden] == [(6, 9), (9, 4)] and head.weights.shape == (4, 3)
    kinds = [type(layer).__name__ for layer in made[0].layers]
    assert (kinds.count("Dense"), kinds.count("Dropout"), kinds.count("BatchNormalization")) == (3, 2, 2 * batch_norm)


def test_all_formats_agree(train, image_dir, tmp_path, capsys):
    import tensorflow as tf

    more = ("--saved_model_dir", "saved", "--checkpoint_path", "kept/head", "--intermediate_store_frequency", 50)
    assert train(*TOP, *more, "--how_many_training_steps", 120, "--random_seed", 3) == 0
    paths = sorted(image_dir.glob("*/*_0[0-3].jpg"))
    scores = session_run(Path("output_graph.pb"), FINAL, bytes_of(paths))
    assert scores.std() > 0.1
    np.testing.assert_allclose(predicted(tmp_path, paths), scores, atol=1e-3)
    served = tf.saved_model.load("saved").signatures["image_bytes"]
    given = tf.constant([path.read_bytes() for path in paths])
    np.testing.assert_allclose(served(image_bytes=given)["prediction"], scores, atol=1e-3)
    nodes = retrain.read_graph(Path("output_graph.pb")).node
    assert [node.op for node in nodes][-12:].count("Relu") == 3 and nodes[-1].name == "final_result"
    shapes = tf.train.load_checkpoint("kept/head").get_variable_to_shape_map()
    assert shapes["final_training_ops/hidden_0/weights"] == [16, 12]
    assert shapes["final_training_ops/weights/final_weights"] == [5, 3] and len(shapes) == 8
    assert {path.name for path in Path("intermediate_graph").iterdir()} == {"intermediate_50.pb", "intermediate_100.pb"}
    lines = re.findall(r"Step (\d+): (Train accuracy|Cross entropy|Validation accuracy) = ", capsys.readouterr().out)
    assert [int(step) for step, _ in lines] == [step for step in [*range(0, 120, 10), 119] for _ in range(3)]


def test_random_seed_repeats():
    settings = TrainingSettings(10, 0.01, hidden_units=(12, 8), dropout=0.4, batch_norm=True, optimizer="adam")
    heads = []
    for seed in (5, 5, 6, None):
        heads.append(retrain.train_head(separable(20), NOTHING, 3, dataclasses.replace(settings, random_seed=seed))[0])
    first, again, other, unseeded = (b"".join(map(bytes, head.variables().values())) for head in heads)
    assert first == again
    assert len({first, other, unseeded}) == 3


@pytest.mark.parametrize("layers", [(), (8,)], ids=["softmax", "hidden"])
def test_balanced_class_weights_let_the_rare_class_count(layers):
    """Ninety of one class, ten of the other, with the same features: only their weights can tell what to answer."""
    rows = Rows(np.ones((100, 6), np.float32), np.arange(100), np.array([0] * 90 + [1] * 10))
    given = {}
    for name in ("none", "balanced"):
        settings = TrainingSettings(
            300, 0.1, train_batch_size=-1, hidden_units=layers, class_weights=name, random_seed=0
        )
        head, _ = retrain.train_head(rows, NOTHING, 2, settings)
        given[name] = retrain.softmax(head.logits(rows.matrix))[0, 1]
    assert given == {"none": pytest.approx(0.1, abs=0.02), "balanced": pytest.approx(0.5, abs=0.02)}


def test_a_too_large_learning_rate_gives_a_sentence(train, capsys):
    flags = ("--hidden_units", 8, "--learning_rate", 1e30, "--logging_verbosity", "ERROR", "--random_seed", 1)
    assert train(*flags) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "The training diverged" in said


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--hidden_units", "64,many"), "invalid whole_numbers value: '64,many'"),
        (("--hidden_units", "0"), "0 is out of range (1 or more)"),
        (("--dropout", "0.4"), "--dropout and --batch_norm are of the hidden layers; name those with --hidden_units"),
        (("--hidden_units", "8", "--dropout", "1"), "1 is out of range (0 to 0.99)"),
        (("--optimizer", "magic"), "invalid choice: 'magic' (choose from"),
        (("--class_weights", "heavy"), "invalid choice: 'heavy' (choose from"),
    ],
)
def test_wrong_flags_get_one_sentence(capsys, flags, said):
    with pytest.raises(SystemExit) as ended:
        retrain.parse_flags(flags)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_learning_rate_of_an_optimizer():
    assert retrain.parse_flags([]).learning_rate == 0.01
    assert retrain.parse_flags(["--optimizer", "adam"]).learning_rate == 0.001
    assert retrain.parse_flags(["--optimizer", "adam", "--learning_rate", "0.5"]).learning_rate == 0.5
