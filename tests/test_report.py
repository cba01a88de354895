"""The report: that its numbers hold, its lists name what is wrong, and it comes out of any set of pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import make_image_dir, picture

import predict
import retrain
from retrain import Image, Rows, Share, TrainingSettings

FILES = ("output_report.png", "output_report.json", "output_report.tsv")


def clusters(count: int, class_count: int = 3, size: int = 20, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return features float32 [count * class_count, size] around a middle for each class, and the classes."""
    random = np.random.default_rng(5)
    classes = np.repeat(np.arange(class_count), count)
    middles = random.normal(size=(class_count, size)) * 2
    return (middles[classes] + spread * random.normal(size=(len(classes), size))).astype(np.float32), classes


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**{"how_many_training_steps": 100, "random_seed": 0, **changes})


def validate(features, classes, groups=None, **changes) -> retrain.CrossValidation:
    groups = np.arange(len(classes)) if groups is None else groups
    return retrain.cross_validate(features, classes, groups, int(classes.max()) + 1, settings(**changes))


# How good it is


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(22, 22, 0.8513, 1), (8, 10, 0.4902, 0.9433), (0, 5, 0, 0.4345), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval(right, count, low, high):
    assert Share(right / count, count).interval == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("normalise", [False, True])
def test_heads_trained_together_are_what_is_trained_one_by_one(normalise):
    features, classes = clusters(10)
    members = [np.arange(30), np.r_[0:8, 10:18, 20:28]]
    # With all rows in each batch nothing is drawn, so both must come to the same, but for weights of 0.001 at first.
    chosen = settings(train_batch_size=-1, normalise=normalise)
    together = retrain.train_heads(features, classes, members, 3, chosen)
    for rows, logits in zip(members, together, strict=True):
        some = Rows(features, rows, classes[rows])
        head, _ = retrain.train_head(some, Rows(features, rows[:0], rows[:0]), 3, chosen)
        np.testing.assert_allclose(retrain.softmax(logits), head.probabilities(features), atol=0.01)


@pytest.mark.parametrize("astray", [np.nan, np.inf, -np.inf])
def test_a_head_that_went_astray_has_no_opinion(monkeypatch, astray):
    features, classes = clusters(10)
    monkeypatch.setattr(retrain, "train_members", lambda *given: np.full((len(given[2]), 30, 3), [0, 1, astray]))
    np.testing.assert_allclose(validate(features, classes).probabilities(0.1), 1 / 3)


def test_fewer_components_leave_the_head_as_it_is():
    features, classes = clusters(40, size=300)
    some = np.arange(0, 120, 2)
    whole, less = (
        retrain.softmax(retrain.train_heads(matrix, classes, [some], 3, settings())[0])
        for matrix in (features, retrain.reduced(features))
    )
    assert retrain.reduced(features).shape == (120, 120)
    np.testing.assert_allclose(whole, less, atol=1e-3)
    many = np.concatenate([features] * 3)
    assert retrain.reduced(many).shape == (360, retrain.ENOUGH_COMPONENTS)


def test_copies_never_lie_on_both_sides():
    """With labels drawn at random nothing can be learnt, unless a copy of the held-out row was trained on."""
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(size=(100, 200)), 2, axis=0).astype(np.float32)
    classes = np.repeat(random.integers(2, size=100), 2)
    torn = validate(features, classes, learning_rate=0.1).accuracy.value
    whole = validate(features, classes, np.repeat(np.arange(100), 2), learning_rate=0.1).accuracy.value
    assert torn > 0.8
    assert 0.3 < whole < 0.7


def test_copies_make_no_interval_narrower():
    features, classes = clusters(12, spread=6)
    alone = validate(features, classes).accuracy
    groups = np.repeat(np.arange(len(classes)), 10)
    many = validate(features[groups], classes[groups], groups).accuracy
    assert many.count == 10 * alone.count
    assert many.interval == Share(many.value, alone.count).interval


def test_coarse_pictures_that_show_what_is_held_out_are_left_out(tmp_path):
    random, images = np.random.default_rng(0), []
    for i in range(6):
        scene = PIL.Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize((240, 180))
        split = ("validation", "testing", "training")[i % 3]
        scene.save(tmp_path / f"{i}.jpg", quality=95)
        scene.resize((180, 135)).save(tmp_path / f"copy{i}.jpg", quality=60)
        images += [Image(tmp_path / f"{i}.jpg", "x", split), Image(tmp_path / f"copy{i}.jpg", "x", "coarse")]
    features = np.repeat(np.eye(6, dtype=np.float32), 2, axis=0)
    coarse = retrain.Rows(features, np.arange(1, 12, 2), np.zeros(6, np.intp))
    assert retrain.without_twins(coarse, features, images).rows.tolist() == [5, 11]  # the copies of training pictures


def test_coarse_pictures_are_compared_by_features_and_by_looks(tmp_path, monkeypatch):
    """Those of the very features go unseen; those of features that are alike only go if they show the same."""
    random, images = np.random.default_rng(0), [Image(tmp_path / "gone.jpg", "x", "testing")]
    for i in range(2):
        scene = PIL.Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize((240, 180))
        scene.save(tmp_path / f"{i}.jpg", quality=95)
        scene.resize((180, 135)).save(tmp_path / f"copy{i}.jpg", quality=60)
        images.append(Image(tmp_path / f"{i}.jpg", "x", "validation"))
    names = ["gone, too.jpg"] * 5 + ["copy0.jpg", "other.jpg", "copy1.jpg"]
    PIL.Image.fromarray(random.integers(0, 256, (180, 240, 3), np.uint8)).save(tmp_path / "other.jpg")
    images += [Image(tmp_path / name, "x", "coarse") for name in names]
    features = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 1, 1, 1, 1, 2, 2]]
    features[8:] += np.float32(0.1) * random.normal(size=(3, 3)).astype(np.float32)
    coarse = retrain.Rows(features, np.arange(3, 11), np.zeros(8, np.intp))
    told = []
    monkeypatch.setattr(retrain.log, "warning", lambda *given: told.append(given[1:]))
    assert retrain.without_twins(coarse, features, images).rows.tolist() == [9]
    assert told == [(7,)]


def test_a_pair_is_found_once():
    """Though its cosine, computed in two products of matrices, may differ in the last bit."""
    features = np.maximum(np.random.default_rng(0).standard_normal((2100, 64), dtype=np.float32), 0)
    pairs = [pair for _, *pair in retrain.alike_pairs(features)]
    assert pairs and len(set(map(tuple, pairs))) == len(pairs)


def test_groups_are_of_near_duplicates_and_of_names_before_nohash():
    names = ["a/tom_nohash_1.jpg", "a/tom_nohash_2.jpg", "a/other.jpg", "b/tom_nohash_1.jpg", "b/x.jpg"]
    groups = retrain.groups_of([Image(Path(name), name[0]) for name in names], [(2, 4)])
    assert groups[0] == groups[1]
    assert groups[2] == groups[4]
    assert len(set(groups.tolist())) == 3


def test_every_row_is_held_out_once_in_each_repeat_and_classes_are_spread():
    _, classes = clusters(20)
    folds = retrain.held_out_folds(classes, np.arange(60), 2, 0)
    assert folds.shape == (2, 60)
    for repeat in folds:
        assert np.array_equal(np.bincount(repeat * 3 + classes), [4] * 15)
    assert not np.array_equal(folds[0], folds[1])
    assert retrain.held_out_folds(np.array([0, 1]), np.arange(2), 1, 0) is None


def test_calibration_error_and_temperature():
    random = np.random.default_rng(0)
    logits = random.normal(size=(1, 4000, 3)) * 2
    classes = np.array([random.choice(3, p=p) for p in retrain.softmax(logits[0])])
    honest, boasting = retrain.softmax(logits[0]), retrain.softmax(3 * logits[0])
    assert retrain.calibration_error(honest, classes) < 0.02 < 0.1 < retrain.calibration_error(boasting, classes)
    assert retrain.fit_temperature(3 * logits, classes) == pytest.approx(3, rel=0.1)
    sure = np.eye(3)[[0, 1, 2]][None] * 5  # three pictures, no mistake: no reason to be sure without end
    assert retrain.softmax(sure / retrain.fit_temperature(sure, np.arange(3))).max() < 0.95


def test_twice_the_pictures():
    sizes = np.array([10.0, 20, 40])
    assert retrain.doubled(sizes, np.array([0.6, 0.8, 0.9]), 200) == pytest.approx(0.95)
    assert retrain.doubled(sizes, np.array([0.9, 0.9, 0.9]), 200) == pytest.approx(0.9)
    assert retrain.doubled(sizes, np.array([0.9, 0.95, 1]), 200) == 1
    features, classes = clusters(60, spread=5)
    curve = retrain.learning_curve(features, np.arange(180), validate(features, classes), settings())
    assert curve.sizes.tolist() == [5, 10, 20, 48]
    assert curve.accuracies[0].mean() + 0.1 < curve.accuracies[-1].mean()


def test_auto_leaves_the_classic_head_where_nothing_is_proven_better():
    features, classes = clusters(30)
    material = retrain.Material(Rows(features, np.arange(90), classes), features, np.arange(90), [])
    assert retrain.choose_settings(material, 3, settings()) == settings()


def test_auto_finds_what_is_better():
    features, classes = clusters(100, spread=2, size=60)
    features[:, :3] += np.random.default_rng(0).normal(size=(300, 3)) * 20  # noise that takes many steps to unlearn
    material = retrain.Material(Rows(features, np.arange(300), classes), features, np.arange(300), [])
    assert retrain.choose_settings(material, 3, settings(learning_rate=1e-4)).how_many_training_steps == 400
    layers = settings(hidden_units=(4,))
    assert retrain.choose_settings(material, 3, layers) == layers


# Which pictures are wrong


def test_flipped_labels_are_doubted_worst_first():
    features, classes = clusters(60, spread=2)
    flipped = np.arange(0, 180, 12)
    classes[flipped] = (classes[flipped] + 1) % 3
    validated = validate(features, classes)
    doubts = retrain.doubtful_labels(validated.probabilities(), classes)
    found = {doubt.row for doubt in doubts}
    assert len(found & set(flipped.tolist())) >= 12
    assert len(found - set(flipped.tolist())) <= 3
    assert [doubt.own_score for doubt in doubts] == sorted(doubt.own_score for doubt in doubts)
    assert all(doubt.looks_like == (classes[doubt.row] - 1) % 3 for doubt in doubts if doubt.row in flipped)


def test_copies_are_found_and_the_merely_alike_are_not(tmp_path):
    random = np.random.default_rng(0)

    def scene() -> PIL.Image.Image:
        return PIL.Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize((240, 180))

    one, other = scene(), scene()
    saved = {
        "one.jpg": one, "smaller.jpg": one.resize((144, 108)), "mirrored.png": one.transpose(PIL.Image.Transpose(0)),
        "cropped.jpg": one.crop((12, 5, 235, 176)), "other.jpg": other, "again.jpg": one,
    }  # fmt: skip
    for name, image in saved.items():
        image.save(tmp_path / name, quality=90)
    images = [Image(tmp_path / name, "x") for name in [*saved, "gone.jpg"]]
    features = np.ones((7, 4), np.float32)  # the base model takes them all for the like
    features[:, 0] += np.linspace(0, 0.01, 7)
    alike = {(0, 1), (0, 2), (0, 3), (0, 5), (1, 2), (1, 3), (1, 5), (2, 3), (2, 5), (3, 5)}
    pairs = retrain.near_duplicates(features, images)
    assert {(pair.first, pair.second) for pair in pairs} <= alike
    assert {row for pair in pairs for row in (pair.first, pair.second)} == {0, 1, 2, 3, 5}
    features[[0, 5]] = 1, 0, 0, 0
    assert [(p.first, p.second) for p in retrain.near_duplicates(features, images) if p.exact] == [(0, 5)]
    assert retrain.near_duplicates(np.eye(7, dtype=np.float32), images) == []


def test_exclude_leaves_out_what_a_list_names(tmp_path, caplog):
    images = [Image(tmp_path / name, "x") for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/\u8349 x.jpg")]
    listed = tmp_path / "list.tsv"
    listed.write_text("# a comment\nsome/where/a/2.jpg\tb\t0.9\nb/\u8349 x.jpg\n\nb/9.jpg\n", "utf-8")
    assert retrain.leave_out(images, listed) == [images[0], images[2]]
    listed.write_text("c/1.jpg\n")
    with pytest.raises(retrain.UserError, match="names none of the pictures"):
        retrain.leave_out(images, listed)
    with pytest.raises(retrain.UserError, match="No such file"):
        retrain.leave_out(images, tmp_path / "none")


# How sure it is


def test_unlike_pictures_are_unfamiliar():
    features, classes = clusters(50, size=40, spread=0.5)
    validated = validate(features, classes)
    familiar = retrain.become_familiar(features, validated, validated.probabilities(), 0.9)
    fresh, _ = clusters(50, size=40, spread=0.5)
    strange = np.random.default_rng(9).normal(size=(100, 40)).astype(np.float32) * 3
    scores = np.tile([0.98, 0.01, 0.01], (150, 1))
    assert familiar.unsure(strange, scores[:100]).mean() > 0.9
    assert familiar.unsure(fresh, scores).mean() < 0.2
    assert familiar.unsure(fresh, np.full((150, 3), 1 / 3)).all() or familiar.least_score < 1 / 3
    kept = retrain.Familiar.from_facts(json.loads(json.dumps(familiar.as_facts())))
    np.testing.assert_array_equal(kept.similarity(strange), familiar.similarity(strange))
    everything = retrain.become_familiar(features, validated, validated.probabilities(), 1)
    assert not everything.unsure(strange, scores[:100]).any()


def test_predict_says_unsure_of_another_thing(train, tmp_path, capsys):
    assert train("--how_many_training_steps", 200, "--random_seed", 1) == 0
    noise = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    picture((200, 40, 40), 99).save(tmp_path / "red.jpg", quality=95)
    capsys.readouterr()
    assert predict.main(["--image", "noise.png", "red.jpg", "--json", "named.json", "--csv", "named.csv"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[:2]
    assert first.splitlines()[1].startswith("unsure: ")
    assert second.splitlines()[1].startswith("red things (score = ")
    assert [entry["unsure"] for entry in json.loads(Path("named.json").read_text())] == [True, False]
    assert Path("named.csv").read_text().splitlines()[1].endswith(",unsure")

    (tmp_path / "output_graph.tflite").unlink()  # the frozen graph alone is as doubtful
    predict.main(["--image", "noise.png", "red.jpg", "--json", "named.json"])
    assert [entry["unsure"] for entry in json.loads(Path("named.json").read_text())] == [True, False]


@pytest.mark.parametrize(
    "change",
    [{"exemplars_shape": [0, 2]}, {"exemplars_float16": "!"}, {"least_score": "a"}, {"coverage": None}, None],
)
def test_a_damaged_measure_of_the_familiar_gets_one_sentence(train, tmp_path, capsys, change):
    assert train("--how_many_training_steps", 20) == 0
    facts = json.loads(Path("output_graph.json").read_text("utf-8"))
    facts["familiar"] = facts["familiar"] | change if change else "odd"
    Path("output_graph.json").write_text(json.dumps(facts), "utf-8")
    picture((200, 40, 40), 99).save(tmp_path / "red.jpg")
    capsys.readouterr()
    assert predict.main(["--image", "red.jpg"]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "output_graph.json is damaged" in sentence


# The report


def numbers() -> dict:
    return json.loads(Path("output_report.json").read_text("utf-8"))


def test_report_has_every_number(train, tmp_path, capsys):
    (tmp_path / "pictures/blue/odd.jpg").write_bytes(b"no picture")
    shutil.copy(tmp_path / "pictures/green/green_00.jpg", tmp_path / "pictures/blue/stray.jpg")
    assert train("--random_seed", 1, "--how_many_training_steps", 100) == 0
    told = capsys.readouterr().out
    report = numbers()
    assert "\nFinal test accuracy = " in told
    assert f"Cross-validated accuracy = {report['cross_validation']['accuracy']['value']:.1%}" in told
    assert "in two classes: " in told and "blue/stray.jpg" in told
    assert report["headline"]["from"] == "cross-validation"
    assert (
        report["pictures"] == {"training": 48, "validation": 9, "testing": 4} or sum(report["pictures"].values()) == 61
    )
    confusion = np.array(report["cross_validation"]["confusion"])
    assert confusion.sum() == pytest.approx(report["cross_validation"]["accuracy"]["pictures"], abs=0.1)
    assert confusion.trace() / confusion.sum() == pytest.approx(report["headline"]["value"], abs=0.01)
    (twin,) = [pair for pair in report["duplicates"] if pair["same_file"]]
    assert {twin["first"], twin["second"]} == {"blue/stray.jpg", "green/green_00.jpg"} and twin["across_classes"]
    with PIL.Image.open("output_report.png") as image:
        assert image.width == 1200
    logs = {path.name.split(".")[0] for path in Path("retrain_logs/evaluation").iterdir()}
    assert logs == {"events", "bottlenecks", "metadata", "projector_config", "sprite"}
    assert len(Path("retrain_logs/evaluation/metadata.tsv").read_text().splitlines()) == 62


def test_each_test_picture_counts_once_whatever_the_batch(train, capsys):
    assert train("--how_many_training_steps", 20, "--test_batch_size", 500) == 0
    assert "(N=500)" in capsys.readouterr().out
    assert numbers()["test"]["accuracy"]["pictures"] == numbers()["pictures"]["testing"] < 500


def test_temperature_leaves_the_classes_and_no_report_the_classic_graph(train, tmp_path):
    flags = "--random_seed", 3, "--head", "softmax"
    assert train(*flags, "--no_report") == 0
    assert not any(Path(name).exists() for name in FILES)
    plain, facts = Path("output_graph.pb").read_bytes(), json.loads(Path("output_graph.json").read_text())
    assert (facts["temperature"], facts["familiar"]) == (1.0, None)
    assert train(*flags, "--output_graph", "other.pb") == 0
    temperature = json.loads(Path("other.json").read_text())["temperature"]
    assert temperature != 1
    assert Path("other.pb").read_bytes() != plain
    paths = sorted(Path("pictures/green").iterdir())[:5]
    for path in paths:
        pixels = retrain.resize_bilinear(retrain.read_image(path, retrain.Reading(), (33, 33)), (33, 33))
        before, after = (retrain.LiteModel(Path(name))(pixels) for name in ("output_graph.tflite", "other.tflite"))
        cooled = before ** (1 / temperature)
        np.testing.assert_allclose(after, cooled / cooled.sum(), atol=1e-4)
        assert before.argmax() == after.argmax()


def test_no_report_tells_that_the_one_lying_there_is_of_an_earlier_run(train, capsys):
    assert train("--no_report") == 0
    assert "earlier run" not in capsys.readouterr().err
    assert train() == 0
    assert "earlier run" not in capsys.readouterr().err
    before = {name: Path(name).read_bytes() for name in FILES}
    assert train("--no_report") == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "earlier run" in line]
    assert f"({FILES[0]}, {FILES[1]} and {FILES[2]}) is of an earlier run" in told
    assert {name: Path(name).read_bytes() for name in FILES} == before
    for name in FILES:
        Path(name).unlink()
    assert train("--no_report", "--output_graph", "output_report.pb") == 0  # with facts in output_report.json
    assert "earlier run" not in capsys.readouterr().err


def test_a_quarantine_needs_the_report(train, capsys):
    with pytest.raises(SystemExit) as caught:
        train("--no_report", "--quarantine", "look")
    assert caught.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "--quarantine" in said and "leave out --no_report" in said


def test_doubtful_pictures_are_copied_and_can_be_left_out(train, tmp_path, capsys):
    for i in range(3):
        picture((40, 180, 60), 50 + i).save(tmp_path / f"pictures/Red Things/wrong_{i}.jpg", quality=95)
    before = {path: path.read_bytes() for path in (tmp_path / "pictures").rglob("*.jpg")}
    flags = "--random_seed", 1, "--how_many_training_steps", 300, "--testing_percentage", 0, "--quarantine", "look"
    assert train(*flags) == 0
    wrong = {f"Red Things/wrong_{i}.jpg" for i in range(3)}
    listed = [line.split("\t")[0] for line in Path("output_report.tsv").read_text().splitlines() if line[0] != "#"]
    assert wrong <= set(listed)
    assert {path.relative_to("look").as_posix() for path in Path("look").rglob("*.jpg")} == set(listed)
    assert {path: path.read_bytes() for path in (tmp_path / "pictures").rglob("*.jpg")} == before
    Path("look/Red Things/wrong_0.jpg").write_bytes(b"somebody's")
    assert train(*flags) == 0
    assert Path("look/Red Things/wrong_0.jpg").read_bytes() == b"somebody's"
    assert train(*flags, "--exclude", "output_report.tsv") == 1
    assert "this run would replace it; save the list under another name" in capsys.readouterr().err
    shutil.copy("output_report.tsv", "exclude.tsv")
    assert train(*flags, "--exclude", "exclude.tsv") == 0
    assert sum(numbers()["pictures"].values()) == 63 - len(listed)
    assert train("--quarantine", "pictures/look") == 1


@pytest.mark.parametrize("counts", [(2, 2, 2), (2, 40, 5), (3, 3, 3)])
def test_sets_that_are_small_or_uneven(train, tmp_path, counts):
    for folder, keep in zip(sorted((tmp_path / "pictures").iterdir()), counts, strict=True):
        have = sorted(folder.iterdir())
        for path in have[keep:]:
            path.unlink()
        for i in range(keep - len(have)):
            shutil.copy(have[i], folder / f"copy_{i}.jpg")
    assert train("--random_seed", 1) == 0
    assert all(Path(name).stat().st_size for name in FILES)
    numbers()


def test_without_a_test_and_with_pictures_gone(train, tmp_path, monkeypatch):
    tested = retrain.examine
    shutil.copy(tmp_path / "pictures/green/green_00.jpg", tmp_path / "pictures/blue/stray.jpg")

    def and_then_gone(*arguments):
        for path in (tmp_path / "pictures/blue").iterdir():
            path.unlink()
        return tested(*arguments)

    monkeypatch.setattr(retrain, "examine", and_then_gone)
    assert train("--testing_percentage", 0, "--how_many_training_steps", 100, "--quarantine", "look") == 0
    assert numbers()["test"] is None
    assert numbers()["mistakes"]


def test_a_thousand_classes_and_odd_names(tmp_path):
    features, classes = clusters(2, class_count=1000, size=16)
    labels = [f"a very long name of class {i} that goes on $and on$ \u8349" for i in range(1000)]
    images = [Image(tmp_path / str(c) / f"{i}.jpg", labels[c]) for i, c in enumerate(classes)]
    rows = Rows(features, np.arange(2000), classes)
    chosen = settings(how_many_training_steps=5)
    head, history = retrain.train_head(rows, rows, 1000, chosen)
    examination = retrain.examine(retrain.gather_material(images, features, rows, chosen), 1000, chosen, 0.95)
    report = retrain.make_report(labels, images, history, examination, head, rows, None)
    retrain.draw_report(report, {}, tmp_path / "report.png")
    json.dumps(retrain.report_as_json(report), allow_nan=False)
    list(retrain.about_doubts(report, Path("x")))
    with PIL.Image.open(tmp_path / "report.png") as image:
        assert image.width == 1200


def test_long_names_are_shortened_in_the_middle():
    assert retrain.shortened("short") == "short"
    assert retrain.shortened("a very long name of a class n01443537") == "a very lo\u202601443537"
    assert retrain.shortened("\u84b2\u516c\u82f1" * 6) == "\u84b2\u516c\u82f1\u84b2\u2026\u82f1\u84b2\u516c\u82f1"


def test_hidden_layers_are_cross_validated_too(train):
    assert train("--hidden_units", 8, "--learning_rate", 0.1, "--random_seed", 1) == 0
    report = numbers()["cross_validation"]
    assert (report["folds"], report["repeats"]) == (5, 1)
    assert report["accuracy"]["value"] > 0.8


def test_two_stages_have_a_report_without_cross_validation(train, tmp_path, capsys):
    make_image_dir(tmp_path / "coarse", 8)
    assert train("--coarse_image_dir", "coarse", "--coarse_training_steps", 5, "--refine_training_steps", 5) == 0
    assert "There is no cross-validation: training in two stages" in capsys.readouterr().out
    assert numbers()["cross_validation"] is None
