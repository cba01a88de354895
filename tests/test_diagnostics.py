"""The diagnostics: that their numbers hold, and that their lists name what is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import make_image, make_image_dir

import predict
import retrain
from retrain import Dataset, HeldOut, Image, Proportion, Rows, TrainingSettings

SETTINGS = TrainingSettings(100, 0.01, random_seed=0, eval_step_interval=0)


def clusters(count: int, class_count: int = 3, size: int = 20, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return features float32 [count * class_count, size] around a middle for each class, and the classes."""
    random = np.random.default_rng(5)
    classes = np.repeat(np.arange(class_count), count)
    middles = random.normal(size=(class_count, size)) * 2
    return (middles[classes] + spread * random.normal(size=(len(classes), size))).astype(np.float32), classes


def rows_of(features: np.ndarray, classes: np.ndarray) -> Rows:
    return Rows(features, np.arange(len(classes)), classes)


def validate(features, classes, groups=None, train=retrain.train_head) -> HeldOut:
    groups = np.arange(len(classes)) if groups is None else groups
    return retrain.cross_validate(rows_of(features, classes), groups, SETTINGS, train)


def held_out(logits: np.ndarray, classes: np.ndarray) -> HeldOut:
    return HeldOut(np.arange(len(classes)), classes, logits, np.arange(len(classes)), np.zeros(len(classes), np.intp))


def diagnose(features, classes, split: str = "", cues=None) -> retrain.Diagnostics:
    """Return the diagnostics of images that are nowhere; split: a letter for each, t for testing."""
    labels = [f"label {c}" for c in range(classes.max() + 1)]
    names = {"t": "testing", "v": "validation"}
    splits = [names.get(letter, "training") for letter in split.ljust(len(classes))]
    images = [Image(Path(f"{labels[c]}/{i}.jpg"), labels[c], splits[i]) for i, c in enumerate(classes)]
    is_test = np.array([name == "testing" for name in splits])
    known, testing = (Rows(features, np.flatnonzero(some), classes[some]) for some in (~is_test, is_test))
    head, history = retrain.train_head(known, testing, len(labels), SETTINGS)
    cues = np.tile(np.float32([0.5, 0.2, 0.01, 300, 200]), (len(images), 1)) if cues is None else cues
    nothing = Rows(features, known.rows[:0], known.classes[:0])
    data = Dataset(images, labels, features, cues, known, nothing, testing, known, None)
    return retrain.diagnose(data, head, SETTINGS, {"head": history}, retrain.train_head)


def told(found: retrain.Diagnostics) -> str:
    return "\n".join(retrain.findings(found))


# How good it is


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(22, 22, 0.8513, 1), (8, 10, 0.4902, 0.9433), (0, 5, 0, 0.4345), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval(right, count, low, high):
    share = Proportion.of(np.arange(count) < right, np.arange(count))
    assert (share.low, share.high) == pytest.approx((low, high), abs=1e-4)


def test_an_interval_counts_scenes_not_frames():
    share = Proportion.of(np.arange(108) < 36, np.arange(108) // 12)
    assert share.effective == pytest.approx(9)
    assert str(share) == "33.3 % on 108 images, about 9 independent ones (95 % confidence interval 12 to 65 %)"
    uneven = Proportion.of(np.ones(60, bool), np.maximum(np.arange(60) - 50, 0))  # a scene of 51 frames, nine of one
    assert uneven.effective == pytest.approx(60**2 / (51**2 + 9))
    assert "independent" not in str(Proportion.of(np.ones(5, bool), np.arange(5)))


def test_recall_precision_and_confusion():
    found = held_out(np.eye(3)[[0, 0, 1, 1]], np.array([0, 0, 0, 1]))
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    recall, precision = ([found.share(named == c) for c in range(3)] for named in (found.classes, found.predicted))
    assert recall[0].value == pytest.approx(2 / 3) and precision[1].value == 0.5
    assert recall[2].count == precision[2].count == 0
    assert (recall[2].low, recall[2].high) == (0, 1)


def test_every_row_is_held_out_once_classes_are_spread_and_scenes_stay_whole():
    _, classes = clusters(20)
    folds = retrain.held_out_folds(classes, np.arange(60), 0)
    assert np.array_equal(np.bincount(folds * 3 + classes), [4] * 15)
    scenes = np.arange(60) // 2
    folds = retrain.held_out_folds(classes, scenes, 0)
    assert len(set(zip(folds.tolist(), scenes.tolist(), strict=True))) == 30
    assert set(retrain.held_out_folds(classes, classes, 0)) == set(range(5))  # all of a class show one scene


def test_so_many_rows_that_the_first_of_a_group_speaks_for_it():
    classes = np.arange(60_000) % 2
    groups = np.arange(60_000) // 2 % 25_000
    folds = retrain.held_out_folds(classes, groups, 0)
    assert len(set(zip(folds.tolist(), groups.tolist(), strict=True))) == 25_000
    assert np.bincount(folds).min() > 10_000


def test_scenes_of_classes_by_chance_promise_nothing():
    """Frames of a scene are told by another of the same scene, which is never on the other side."""
    random = np.random.default_rng(1)
    scenes, classes = np.repeat(np.arange(30), 20), random.integers(2, size=30)
    features = random.normal(size=(30, 50))[scenes] + 0.05 * random.normal(size=(600, 50))
    found = diagnose(features.astype(np.float32), classes[scenes], split="   t" * 150)
    accuracy = found.validated.accuracy
    assert len(np.unique(found.groups)) == 30 and accuracy.effective == pytest.approx(30)
    assert accuracy.low < 0.5 < accuracy.high < 0.85
    assert found.test is None and found.test_duplicates == 150 and found.classic_accuracy > 0.9
    assert found.believed.source == "cross-validation"
    assert "near duplicates of training or validation images: 150;" in told(found)


def test_the_test_is_believed_once_it_is_worth_enough():
    features, classes = clusters(200, spread=3)
    assert diagnose(features, classes, split="t    " * 120).believed.source == "test"
    few = diagnose(features, classes, split="t" + " " * 199 + "t" + " " * 199 + "t")
    assert few.believed.source == "cross-validation" and few.test.accuracy.count == 3
    assert few.believed.accuracy.count == 597


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_head_that_went_astray_has_no_opinion():
    features, classes = clusters(10)
    astray = retrain.Head(np.full((20, 3), np.nan, np.float32), np.zeros(3, np.float32))
    found = validate(features, classes, train=lambda *given: (astray, []))
    np.testing.assert_allclose(found.scores, 1 / 3)


def test_no_class_is_behind_where_all_are_right():
    features, classes = clusters(20, spread=0.1)
    assert "less often" not in told(diagnose(features, classes))


def test_two_images_are_too_few():
    found = diagnose(np.eye(2, dtype=np.float32), np.arange(2))
    assert found.validated is None and found.believed is None
    assert "There is no cross-validation: too few images." in told(found)


def test_a_small_set_is_told_to_spare_no_image():
    features, classes = clusters(20)
    assert "--testing_percentage 0" in told(diagnose(features, classes, split="  t v " * 10))
    assert "--testing_percentage 0" not in told(diagnose(features, classes))


# Would more images help?


def test_the_learning_curve_is_of_nested_parts_that_keep_the_rare_class():
    features, classes = clusters(200, class_count=2)
    classes = classes[:215]
    seen = []

    def train(training, *others):
        seen.append(training)
        return retrain.train_head(training, *others)

    known = rows_of(features[:215], classes)
    made = retrain.cross_validate(known, np.arange(215), SETTINGS, retrain.train_head)
    curve = retrain.learning_curve(known, made, SETTINGS, train)
    assert curve.sizes == [24, 44, 86, 172] or curve.sizes == sorted(curve.sizes)
    assert curve.accuracies[-1] == made.accuracy and all(each.count == 215 for each in curve.accuracies)
    assert all((training.classes == 1).any() for training in seen)
    parts = [set(training.rows.tolist()) for training in seen]
    assert all(parts[i] < parts[i + 5] < parts[i + 10] for i in range(5))
    assert curve.gain[1] < retrain.HARDLY


def test_many_steps_and_hidden_layers_leave_less_of_the_curve():
    features, classes = clusters(40)
    known, made = rows_of(features, classes), validate(features, classes)

    def points(**changes) -> int:
        settings = TrainingSettings(**{"how_many_training_steps": 10, "eval_step_interval": 0, **changes})
        curve = retrain.learning_curve(known, made, settings, lambda *given: (retrain.Head(*start), []))
        return len(curve.sizes) if curve else 0

    start = np.zeros((20, 3), np.float32), np.zeros(3, np.float32)
    assert [points(how_many_training_steps=n) for n in (200, 4000, 10_000)] == [4, 3, 0]
    assert points(hidden_units=(8,)) == 0


def test_twice_the_images():
    right = [np.arange(2000) < count for count in (1200, 1600, 1800)]  # mistakes halve each time
    low, high = retrain.expected_gain([10, 20, 40], right, 2000)
    assert low < 0.05 < high and high - low < 0.03
    low, high = retrain.expected_gain([10, 20, 40], [right[2]] * 3, 2000)
    assert -0.01 < low < 0 < high < 0.01


# How sure it is


def test_calibration_error_and_temperature():
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 3)) * 2
    classes = np.array([random.choice(3, p=p) for p in retrain.softmax(logits)])
    assert held_out(logits, classes).calibration_error < 0.02
    boasting = held_out(3 * logits, classes)
    assert boasting.cooled(3).calibration_error < 0.02 < 0.1 < boasting.calibration_error
    assert retrain.fit_temperature(3 * logits, classes) == pytest.approx(3, rel=0.1)
    sure = np.eye(3) * 5  # three images, no mistake: no reason to be sure without end
    assert retrain.softmax(sure / retrain.fit_temperature(sure, np.arange(3))).max() < 0.95


def test_unlike_images_are_unfamiliar():
    features, classes = clusters(50, size=40, spread=0.5)
    validated = validate(features, classes)
    familiar = retrain.become_familiar(features, validated, 0.9)
    strange = np.random.default_rng(9).normal(size=(100, 40)).astype(np.float32) * 3
    scores = [("a", 0.98), ("b", 0.01), ("c", 0.01)]

    def unsure(made: retrain.Familiar, matrix: np.ndarray) -> float:
        return np.mean([made.reason(likeness, scores) != "" for likeness in made.likeness(matrix)])

    assert unsure(familiar, strange) > 0.9 and unsure(familiar, features) < 0.2
    kept = retrain.Familiar(**json.loads(json.dumps(dataclasses.asdict(familiar))))
    np.testing.assert_array_equal(kept.exemplars, familiar.exemplars)
    assert unsure(retrain.become_familiar(features, validated, 1), strange) == 0


# Which images are wrong


def test_flipped_labels_are_doubted_worst_first():
    features, classes = clusters(60, spread=2)
    flipped = np.arange(0, 180, 12)
    classes[flipped] = (classes[flipped] + 1) % 3
    doubts = diagnose(features, classes).doubts
    found = {doubt.row for doubt in doubts}
    assert len(found & set(flipped.tolist())) >= 10 and len(found - set(flipped.tolist())) <= 3
    assert [doubt.own_score for doubt in doubts] == sorted(doubt.own_score for doubt in doubts)
    right = [doubt for doubt in doubts if doubt.row in flipped]
    assert all(doubt.reason == f"looks like label {(classes[doubt.row] - 1) % 3}" for doubt in right)


def test_a_head_that_errs_too_often_doubts_no_label():
    features, classes = clusters(60, spread=20)
    assert "It errs too often to tell which images lie in the wrong folder" in told(diagnose(features, classes))


def test_blurred_dark_and_tiny_images_are_doubted_for_that():
    features, classes = clusters(20, spread=0.5)
    cues = np.tile(np.float32([0.5, 0.2, 0.01, 300, 200]), (60, 1))
    cues[3, 3:], cues[30, :2], cues[50, 2], cues[51] = (40, 30), (0.02, 0.01), 0.0001, np.nan
    found = diagnose(features, classes, cues=cues)
    reasons = {doubt.row: doubt.reason for doubt in found.doubts if "looks" not in doubt.reason}
    assert reasons == {3: "tiny", 30: "nearly black", 50: "blurred"}
    assert all(doubt.proposed == classes[doubt.row] for doubt in found.doubts if doubt.row in reasons)


@pytest.mark.parametrize(("columns", "factor", "cue"), [([0], 0.5, "brightness"), ([3, 4], 3, "size"), ([], 1, "")])
def test_a_class_that_is_told_by_its_circumstances_alone_raises_the_alarm(columns, factor, cue):
    features, classes = clusters(50, spread=2)
    random = np.random.default_rng(0)
    cues = (np.float32([0.5, 0.2, 0.01, 300, 200]) * random.normal(1, 0.05, (150, 5))).astype(np.float32)
    cues[np.ix_(classes == 1, columns)] *= factor
    found = diagnose(features, classes, cues=cues)
    assert found.cue == cue
    assert ("alone tells a class" in told(found)) == bool(cue)


@pytest.mark.parametrize(("count", "class_count"), [(5, 2), (10, 2), (10, 6), (5, 20)])
def test_few_images_raise_no_alarm(count, class_count):
    features, classes = clusters(count, class_count)
    for seed in range(20):
        cues = np.random.default_rng(seed).random((len(classes), 5), np.float32)
        assert retrain.spurious_cue(cues, validate(features, classes))[0] == ""


def test_measures_that_are_unknown_raise_no_alarm():
    features, classes = clusters(20)
    assert diagnose(features, classes, cues=np.full((60, 5), np.nan, np.float32)).cue == ""


# What shows the same


def scene(random: np.random.Generator) -> PIL.Image.Image:
    return PIL.Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize((240, 180))


def test_copies_are_found_and_the_merely_alike_are_not(tmp_path):
    random = np.random.default_rng(0)
    one, other = scene(random), scene(random)
    saved = {
        "one.jpg": one, "smaller.jpg": one.resize((144, 108)), "mirrored.png": one.transpose(PIL.Image.Transpose(0)),
        "cropped.jpg": one.crop((12, 5, 235, 176)), "other.jpg": other, "again.jpg": one,
    }  # fmt: skip
    for name, image in saved.items():
        image.save(tmp_path / name, quality=90)
    images = [Image(tmp_path / name, "x") for name in [*saved, "gone.jpg"]]
    features = np.eye(7, dtype=np.float32) + 1.2  # the base model takes them all for the like
    alike = {(0, 1), (0, 2), (0, 3), (0, 5), (1, 2), (1, 3), (1, 5), (2, 3), (2, 5), (3, 5)}
    groups, pairs = retrain.find_groups(features, images)
    assert {(pair.first, pair.second) for pair in pairs} <= alike
    assert {row for pair in pairs for row in (pair.first, pair.second)} == {0, 1, 2, 3, 5}
    assert len(set(groups[[0, 1, 2, 3, 5]])) == 1 and len(set(groups)) == 3
    features[5] = features[0]
    assert [(p.first, p.second) for p in retrain.find_groups(features, images)[1] if p.cosine > 0.9999] == [(0, 5)]
    assert retrain.find_groups(np.eye(7, dtype=np.float32), images)[1] == []


def test_groups_hang_together_by_features_and_by_names_before_nohash(monkeypatch):
    monkeypatch.setattr(retrain, "same_images", lambda alike, images: [])
    names = ["a/tom_nohash_1.jpg", "a/tom_nohash_2.jpg", "a/other.jpg", "b/tom_nohash_1.jpg", "b/x.jpg"]
    features = np.eye(5, dtype=np.float32)
    features[4] = features[2] * 3  # the same direction
    groups, _ = retrain.find_groups(features, [Image(Path(name), name[0]) for name in names])
    assert groups[0] == groups[1] and groups[2] == groups[4] and len(set(groups)) == 3
    elsewhere = [Image(Path(name), name[0], place=f"{i}/") for i, name in enumerate(names)]  # of the same names only
    groups, _ = retrain.find_groups(np.eye(5, dtype=np.float32), elsewhere)
    assert len(set(groups)) == 5


def test_a_scene_is_a_group_across_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(retrain, "same_images", lambda alike, images: [])
    features = np.random.default_rng(0).normal(size=(2500, 8)).astype(np.float32)
    features = np.concatenate([features, features])  # more than are looked at together
    groups, _ = retrain.find_groups(features, [Image(Path(f"a/{i}.jpg"), "a") for i in range(5000)])
    np.testing.assert_array_equal(groups[:2500], groups[2500:])


def test_a_class_of_one_scene_is_told():
    features, classes = clusters(20, spread=2)
    features[classes == 0] = features[0] + 0.01
    found = told(diagnose(features, classes))
    assert "of one scene only: 20 of the 20 images of label 0;" in found


def test_coarse_images_that_show_what_another_shows_are_all_left_out(tmp_path, monkeypatch):
    random, images = np.random.default_rng(0), []
    shown = [scene(random) for _ in range(3)]
    for i, split in enumerate(("validation", "training")):
        shown[i].save(tmp_path / f"{i}.jpg", quality=95)
        images.append(Image(tmp_path / f"{i}.jpg", "x", split))
    for i, name in enumerate(("copy0.jpg", "copy1.jpg", "other.jpg")):
        shown[i].resize((180, 135)).save(tmp_path / name, quality=60)
    names = ["copy0.jpg"] * 10 + ["copy1.jpg", "other.jpg"]
    images += [Image(tmp_path / name, "x", "coarse") for name in names]
    features = np.eye(3, dtype=np.float32)[[0, 1, *[0] * 10, 1, 1]]
    features[-2:, 2] = 0.6, -0.6  # alike, but not the same
    warned = []
    monkeypatch.setattr(retrain.log, "warning", lambda *given: warned.append(given[1]))
    coarse = Rows(features, np.arange(2, 14), np.zeros(12, np.intp))
    assert retrain.without_copies(coarse, features, images).rows.tolist() == [13]
    assert warned == [11]


# The whole


@pytest.mark.parametrize("flags", [[], ["--hidden_units", 8, "--learning_rate", 0.1], ["--testing_percentage", 0]])
def test_a_run_is_told_in_a_few_sentences(train, capsys, flags):
    assert train("--random_seed", 1, *flags) == 0
    said = capsys.readouterr().out
    assert said.count("The accuracy to believe") == 1 and "about 3 independent ones" in said
    assert 0 < json.loads(Path("output_graph.json").read_text())["temperature"] != 1


def test_two_stages_are_judged_like_any_other_head(train, tmp_path, capsys):
    make_image_dir(tmp_path / "coarse", 30)
    flags = "--coarse_image_dir", "coarse", "--coarse_training_steps", 5, "--refine_training_steps", 5
    assert train(*flags) == 0
    assert "The accuracy to believe" in capsys.readouterr().out


def test_predict_says_unsure_of_another_thing(train, tmp_path, capsys):
    assert train("--how_many_training_steps", 200, "--random_seed", 1) == 0
    noise = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    make_image((200, 40, 40), 99).save(tmp_path / "red.jpg", quality=95)
    capsys.readouterr()
    assert predict.main(["--image", "noise.png", "red.jpg", "--json", "named.json", "--csv", "named.csv"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[:2]
    assert first.splitlines()[1].startswith("unsure: ")
    assert second.splitlines()[1].startswith("red things (score = ")
    assert [entry["unsure"] for entry in json.loads(Path("named.json").read_text())] == [True, False]
    assert ",unsure,unlike the training images," in Path("named.csv").read_text("utf-8-sig").splitlines()[1]

    (tmp_path / "output_graph.tflite").unlink()  # the frozen graph alone is as doubtful
    predict.main(["--image", "noise.png", "red.jpg", "--json", "named.json"])
    assert [entry["unsure"] for entry in json.loads(Path("named.json").read_text())] == [True, False]


def test_temperature_leaves_the_classes_and_no_report_the_classic_graph(train, tmp_path):
    flags = "--random_seed", 3, "--head", "softmax"
    assert train(*flags, "--no_report") == 0
    plain, facts = Path("output_graph.pb").read_bytes(), json.loads(Path("output_graph.json").read_text())
    assert (facts["temperature"], facts["familiar"]) == (1.0, None)
    assert train(*flags, "--output_graph", "other.pb") == 0
    temperature = json.loads(Path("other.json").read_text())["temperature"]
    assert temperature != 1
    assert Path("other.pb").read_bytes() != plain
    paths = sorted(Path("pictures/green").iterdir())[:5]
    for path in paths:
        pixels = retrain.resize_bilinear(retrain.read_image(path, retrain.Reading(), (33, 33)), (33, 33))
        before, after = (retrain.LiteModel(Path(name))(pixels)[0] for name in ("output_graph.tflite", "other.tflite"))
        cooled = before ** (1 / temperature)
        np.testing.assert_allclose(after, cooled / cooled.sum(), atol=1e-4)
        assert before.argmax() == after.argmax()


def test_the_report_of_a_run_shows_near_duplicates(train, image_dir, tmp_path):
    for source, copy in (("green/green_00.jpg", "blue/copy.jpg"), ("blue/blue_00.jpg", "blue/again.jpg")):
        shutil.copy(image_dir / source, image_dir / copy)
    assert train("--random_seed", 1) == 0
    report = json.loads((tmp_path / "output_report.json").read_text("utf-8"))
    pairs = [{pair["first"], pair["second"]} for pair in report["duplicates"] if pair["cosine"] > 0.9999]
    assert {"green/green_00.jpg", "blue/copy.jpg"} in pairs and {"blue/blue_00.jpg", "blue/again.jpg"} in pairs
    assert "blue/copy.jpg" in (tmp_path / "output_report.html").read_text("utf-8")
