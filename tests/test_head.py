"""The room 'head': that it learns, repeats itself, counts classes alike, and prints what the classic script printed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import retrain
from retrain import Rows, TrainingSettings

FEATURES = 6
NOTHING = Rows(np.empty((0, FEATURES), np.float32), np.array([], np.intp), np.array([], np.intp))


def separable(count: int, class_count: int = 3) -> Rows:
    """Return rows of classes that lie well apart, `count` of each."""
    random = np.random.default_rng(7)
    classes = np.repeat(np.arange(class_count), count)
    matrix = np.eye(class_count, FEATURES)[classes] * 3 + random.normal(size=(len(classes), FEATURES)) * 0.3
    return Rows(matrix.astype(np.float32), np.arange(len(classes)), classes)


def learn(rows: Rows, class_count: int = 3, **settings) -> retrain.Head:
    """Return a head trained on the rows."""
    return retrain.train_head(rows, NOTHING, class_count, TrainingSettings(**settings))[0]


def accuracy(head: retrain.Head, rows: Rows) -> float:
    """Return the share of rows that the head gets right."""
    return (head.logits(rows.features()).argmax(axis=1) == rows.classes).mean()


def cross_entropy(weights: np.ndarray, biases: np.ndarray, rows: Rows) -> float:
    """Return the mean cross entropy over all rows, in float64."""
    logits = rows.matrix.astype(np.float64) @ weights + biases
    likelihoods = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -likelihoods[np.arange(len(rows.classes)), rows.classes].mean()


# Learning


@pytest.mark.parametrize("batch_size", [-1, 1, 100])
def test_learns_separable_data(batch_size):
    rows = separable(30)
    head = learn(rows, how_many_training_steps=400, learning_rate=0.1, train_batch_size=batch_size, random_seed=0)
    assert accuracy(head, rows) == 1
    untrained = learn(rows, how_many_training_steps=1, learning_rate=0, random_seed=0)
    assert accuracy(untrained, rows) < 0.9


# Of a training of 100 steps with the seed 5, after every tenth.
GOLDEN = [1.0806781, 0.9034145, 0.7594660, 0.6548198, 0.5571780, 0.4840420, 0.4235802, 0.3909411, 0.3496376, 0.3089412]


def test_a_seeded_training_gives_the_numbers_it_always_gave():
    settings = TrainingSettings(how_many_training_steps=100, random_seed=5)
    history = retrain.train_head(separable(30), NOTHING, 3, settings)[1]
    assert [scores.cross_entropy for scores in history[:10]] == pytest.approx(GOLDEN, abs=1e-6)


def test_weights_start_small_and_biases_at_zero():
    rows = Rows(np.zeros((3, 2000), np.float32), np.arange(3), np.arange(3))
    head = learn(rows, how_many_training_steps=1, learning_rate=0, random_seed=0)
    assert head.weights.shape == (2000, 3) and head.weights.dtype == head.biases.dtype == np.float32
    assert np.abs(head.weights).max() <= 0.002  # truncated at two standard deviations
    assert head.weights.std() == pytest.approx(0.00088, rel=0.05)  # of what is left of a normal of 0.001
    assert abs(head.weights.mean()) < 0.0001
    assert not head.biases.any()


def test_step_follows_the_gradient_of_the_cross_entropy():
    rate, nudge, rows = 0.5, 1e-6, separable(6)
    uneven = slice(4, None)  # two of the first class, six of each other
    rows = Rows(rows.matrix[uneven], np.arange(14), rows.classes[uneven])
    start = learn(rows, how_many_training_steps=1, learning_rate=0, random_seed=3)
    after = learn(rows, how_many_training_steps=1, learning_rate=rate, train_batch_size=-1, random_seed=3)
    for name in ("weights", "biases"):
        values = {"weights": start.weights.astype(np.float64), "biases": start.biases.astype(np.float64)}
        gradient = np.zeros_like(values[name])
        for place in np.ndindex(gradient.shape):
            losses = []
            for change in (nudge, -nudge):
                values[name][place] += change
                losses.append(cross_entropy(**values, rows=rows))
                values[name][place] -= change
            gradient[place] = (losses[0] - losses[1]) / (2 * nudge)
        stepped = (getattr(start, name) - getattr(after, name)) / rate
        np.testing.assert_allclose(stepped, gradient, atol=1e-5)
        assert np.abs(gradient).max() > 0.01


def test_probabilities_are_a_softmax_that_large_logits_do_not_break():
    head = retrain.Head(np.array([[1, 0], [0, 1000]], np.float32), np.array([0, 1], np.float32))
    given = retrain.softmax(head.logits(np.array([[2, 0], [0, 1], [0, -1]], np.float32)))
    odds = np.exp(2 - 1)
    np.testing.assert_allclose(given, [[odds / (1 + odds), 1 / (1 + odds)], [0, 1], [1, 0]], atol=1e-6)


def test_after_step_sees_every_step_that_is_to_be_stored():
    seen = []
    settings = TrainingSettings(how_many_training_steps=5, intermediate_store_frequency=1, random_seed=0)
    head, _ = retrain.train_head(separable(3), NOTHING, 3, settings, lambda step, head: seen.append((step, head)))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    np.testing.assert_array_equal(seen[-1][1].weights, head.weights)
    assert not np.array_equal(seen[0][1].weights, seen[1][1].weights)


# --head logistic


@pytest.mark.parametrize("class_count", [2, 3])
def test_logistic_head_gives_the_probabilities_of_the_regression(class_count):
    from sklearn.linear_model import LogisticRegression

    rows = separable(30, class_count)
    rows = Rows(rows.matrix * 7 + 5, rows.rows, rows.classes)  # neither centred nor of a scale of one
    train, rest = (
        Rows(rows.matrix, rows.rows[part], rows.classes[part]) for part in (slice(0, None, 2), slice(1, None, 2))
    )
    head, history = retrain.train_head(train, rest, class_count, TrainingSettings(head="logistic"))
    centred = rows.matrix - rows.matrix.mean(axis=0)
    model = LogisticRegression(C=retrain.LOGISTIC_C).fit(centred / np.sqrt((centred**2).mean()), rows.classes)
    expected = model.predict_proba(centred / np.sqrt((centred**2).mean()))
    np.testing.assert_allclose(retrain.softmax(head.logits(rows.matrix)), expected, atol=2e-3)  # trained on both parts
    assert head.weights.dtype == head.biases.dtype == np.float32
    assert [scores.split for scores in history] == ["train"]


def test_logistic_head_never_answers_a_class_without_images():
    rows = separable(20)
    few = Rows(rows.matrix, rows.rows[:40], rows.classes[:40])
    assert retrain.softmax(learn(few, head="logistic").logits(rows.matrix))[:, 2].max() < 1e-6


def test_logistic_head_from_photographs_to_predictions(train, capsys):
    assert train("--head", "logistic") == 0
    said = capsys.readouterr().out
    assert "Step 0: Train accuracy" in said and "Validation accuracy" not in said
    assert float(re.search(r"Final test accuracy = ([\d.]+)%", said)[1]) > 70


# Drawing


def test_classes_count_alike_when_drawn():
    classes = np.array([0] * 5 + [2] * 500)  # and none of class 1
    drawn = next(retrain.draw_batches(classes, 20_000, np.random.default_rng(0)))
    assert (classes[drawn] == 0).mean() == pytest.approx(0.5, abs=0.02)
    counts = np.bincount(drawn, minlength=505)
    assert counts.min() > 0
    assert counts[:5] == pytest.approx(2000, rel=0.15)
    assert counts[5:].max() < 60


@pytest.mark.parametrize(
    "flags, train_n, final_n",
    [
        ((), 100, 4),
        (("--validation_batch_size", -1), 9, 4),
        (("--validation_batch_size", 7, "--test_batch_size", 11, "--train_batch_size", -1), 7, 11),
    ],
)
def test_batch_sizes_of_the_flags(train, capsys, flags, train_n, final_n):
    assert train(*flags) == 0
    said = capsys.readouterr().out
    assert "Images: 47 to train, 9 to validate, 4 to test." in said
    assert set(re.findall(r"Validation accuracy = .*\(N=(\d+)\)", said)) == {str(train_n)}
    assert re.findall(r"Final test accuracy = \d+\.\d% \(N=(\d+)\)", said) == [str(final_n)]


# Repeating


def trained_bytes(train, *flags) -> bytes:
    """Return the .tflite of a run, in which the head's numbers lie."""
    assert train(*flags) == 0
    return Path("output_graph.tflite").read_bytes()


@pytest.mark.parametrize("more", [(), ("--flip_left_right", "--random_brightness", 10)], ids=["plain", "distorted"])
def test_random_seed_repeats_to_the_bit(train, more):
    first = trained_bytes(train, "--random_seed", 5, *more)
    assert trained_bytes(train, "--random_seed", 5, *more) == first
    assert trained_bytes(train, "--random_seed", 6, *more) != first
    assert len({trained_bytes(train, *more) for _ in range(2)} | {first}) == 3


def test_evaluating_more_often_changes_nothing(train):
    assert trained_bytes(train, "--random_seed", 5) == trained_bytes(
        train, "--random_seed", 5, "--eval_step_interval", 1, "--validation_batch_size", 3
    )


# The classic lines, and what stands in their place


def test_classic_lines(train, capsys):
    assert train("--how_many_training_steps", 25, "--eval_step_interval", 10, "--learning_rate", 0.1) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "Step" in line]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+"
    patterns = [
        rf"{stamp}: Step %d: Train accuracy = (\d+\.\d)%%",
        rf"{stamp}: Step %d: Cross entropy = (\d+\.\d{{6}})",
        rf"{stamp}: Step %d: Validation accuracy = (\d+\.\d)%% \(N=100\)",
    ]
    wanted = [pattern % step for step in (0, 10, 20, 24) for pattern in patterns]
    assert len(lines) == len(wanted)
    values = [float(re.fullmatch(pattern, line)[1]) for pattern, line in zip(wanted, lines, strict=True)]
    assert values[-2] < values[1]  # the cross entropy went down
    assert all(0 <= value <= 100 for value in values)


def test_scores_are_those_of_the_head():
    rows = separable(10)
    settings = TrainingSettings(how_many_training_steps=30, train_batch_size=-1, validation_batch_size=-1)
    head, history = retrain.train_head(rows, rows, 3, settings)
    assert [(scores.step, scores.split) for scores in history] == [
        (step, split) for step in (0, 10, 20, 29) for split in ("train", "validation")
    ]
    for scores in history[-2:]:
        assert scores.accuracy == accuracy(head, rows)
        assert scores.cross_entropy == pytest.approx(cross_entropy(head.weights, head.biases, rows), abs=1e-5)


def test_nothing_to_test_with(train, capsys):
    assert train("--testing_percentage", 0) == 0
    said = capsys.readouterr()
    assert "Final test accuracy" not in said.out
    assert Path("output_graph.pb").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rate", ["1e38", "3e37"])
def test_too_large_learning_rate_gives_a_sentence(train, capsys, rate):
    code = train("--learning_rate", rate, "--how_many_training_steps", 200, "--logging_verbosity", "ERROR")
    said = capsys.readouterr().err.splitlines()
    assert (code, len(said)) == (1, 1)
    assert re.fullmatch(r"retrain\.py: error: The training diverged.*smaller --learning_rate\.", said[0])
    assert not Path("output_graph.pb").exists()


# TensorBoard and checkpoint


def events(folder: Path) -> list:
    """Return the events in the one event file of a folder."""
    import tensorflow as tf

    (path,) = folder.glob("events.out.tfevents.*")
    return list(tf.compat.v1.train.summary_iterator(str(path)))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tensorboard_reads_the_summaries(trained, split):
    found = {}
    for event in events(trained / "retrain_logs" / split):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    assert set(found) == {"accuracy", "cross_entropy"}
    assert all(sorted(by_step) == [*range(0, 300, 10), 299] for by_step in found.values())
    assert found["accuracy"][299] > 0.9
    assert 0 < found["cross_entropy"][299] < found["cross_entropy"][0]


def test_next_run_replaces_the_summaries_and_nothing_else(train, tmp_path):
    logs = tmp_path / "logs"
    assert train("--summaries_dir", logs, "--how_many_training_steps", 30) == 0
    foreign = [logs / "notes.txt", logs / "train/notes.txt", logs / "other" / "events.out.tfevents.1"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert train("--summaries_dir", logs, "--how_many_training_steps", 5) == 0
    assert max(event.step for event in events(logs / "train")) == 4
    assert [path.read_text() for path in foreign] == ["mine"] * 3


def test_checkpoint_has_the_classic_names_and_the_head(trained):
    import tensorflow as tf

    path = str(trained / "checkpoints/head")
    reader = tf.train.load_checkpoint(path)
    weights, biases = "final_training_ops/weights/final_weights", "final_training_ops/biases/final_biases"
    assert reader.get_variable_to_shape_map() == {weights: [16, 3], biases: [3]}
    assert tf.train.load_checkpoint(str(trained / "checkpoints")).has_tensor(weights)  # the folder names its latest
    graph = tf.compat.v1.GraphDef.FromString((trained / "output_graph.pb").read_bytes())
    constants = {node.name: node.attr["value"].tensor for node in graph.node if node.op == "Const"}
    for name in (weights, biases):
        np.testing.assert_array_equal(reader.get_tensor(name), tf.make_ndarray(constants[name]))
