"""The room 'bottlenecks': what is kept, when it is computed anew, and that killed runs do no harm."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
from conftest import ROOT, make_graph, make_image

import retrain
from retrain import Distortion, Reading

ENDING = "_inception_v3.txt"
IMAGES = 60  # in image_dir
AS_USUAL = Reading()
INDEX = "bottleneck/index_inception_v3.jsonl"

# Runs retrain.py as a process that is killed right before the 25th bottleneck file gets its final name.
DRIVER = """
import itertools, os, signal, sys
import retrain

replace, renamed = os.replace, itertools.count(1)

def deadly(source, target):
    if str(target).endswith(".txt") and next(renamed) == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = deadly
sys.exit(retrain.main())
"""


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """A list that gets one more entry for each image that goes through the network."""
    calls, compute = [], retrain.LiteModel.__call__

    def counted(self, pixels):
        calls.append(1)
        return compute(self, pixels)

    monkeypatch.setattr(retrain.LiteModel, "__call__", counted)
    return calls


def base_of(model_dir: Path) -> retrain.BaseModel:
    """Return the base model in a folder."""
    return retrain.load_base_model(retrain.inception_recipe(model_dir), model_dir, model_dir)


@pytest.fixture
def compute(image_dir, model_dir, tmp_path, computed):
    """A function that computes the missing bottlenecks of image_dir; returns how many went through the network."""

    def run(model: Path = model_dir, reading: Reading = AS_USUAL, **options) -> int:
        computed.clear()
        store = retrain.BottleneckStore(str(tmp_path / "bottleneck"), base_of(model), reading)
        retrain.compute_bottlenecks(store, retrain.list_images(str(image_dir)), **options)
        return len(computed)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the bottleneck files below a folder hold, by `<class folder>/<file name>`."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("bottleneck/*/*.txt")}


def raw_features(graph_path: Path, images: list[Path]) -> np.ndarray:
    """Return the features float32 [images, n] that a TensorFlow 1 session reads out of the graph as it is."""
    import tensorflow as tf

    graph_def = tf.compat.v1.GraphDef.FromString(graph_path.read_bytes())
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        tf.import_graph_def(graph_def, name="")
        feeds = [{"DecodeJpeg/contents:0": path.read_bytes()} for path in images]
        return np.array([session.run("pool_3/_reshape:0", feed)[0] for feed in feeds])


def check_features(folder: Path, graph_path: Path) -> None:
    """Assert that there is a bottleneck file for each image, which the classic script reads as the graph's features."""
    images = sorted(folder.glob("pictures/*/*"))
    found = contents(folder)
    assert set(found) == {f"{image.parent.name}/{image.name}{ENDING}" for image in images}
    kept = [[float(x) for x in found[f"{image.parent.name}/{image.name}{ENDING}"].split(b",")] for image in images]
    np.testing.assert_allclose(kept, raw_features(graph_path, images), atol=1e-4)


# Names, format, values


def test_files_are_those_of_the_contract_and_no_image_is_changed(train, image_dir, small_graph):
    def state() -> dict:
        files = sorted(path for path in image_dir.rglob("*") if path.is_file())
        return {path: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) for path in files}

    before = state()
    assert len(before) == IMAGES
    assert train() == 0
    check_features(image_dir.parent, small_graph)
    assert train("--flip_left_right", "--distortions_per_image", 2) == 0
    assert state() == before


def test_over_long_names_work(image_dir, compute):
    (image_dir / "blue/blue_00.jpg").rename(image_dir / "blue" / ("x" * 246 + ".jpg"))
    assert (compute(), compute()) == (IMAGES, 0)


# What is computed anew, and what is not


@pytest.mark.parametrize("age", [-100, 0, 7200], ids=["newer", "as old", "older"])
def test_only_a_changed_image_is_done_again(image_dir, small_graph, compute, tmp_path, age):
    assert compute() == IMAGES
    changed = image_dir / "blue/blue_03.jpg"
    made = changed.stat().st_mtime_ns
    make_image((250, 250, 0), 99, (70, 50)).save(changed)
    os.utime(changed, ns=(0, made - age * 10**9))
    untouched = {path: path.stat().st_mtime_ns for path in tmp_path.glob("bottleneck/green/*")}
    assert (compute(), compute()) == (1, 0)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    check_features(tmp_path, small_graph)


def test_another_base_model_or_reading_redoes_all(compute, model_dir, tmp_path):
    assert compute() == IMAGES
    for reading in (Reading(ignore_exif_orientation=True), Reading(exact_decode=True)):
        assert (compute(reading=reading), compute(reading=reading)) == (IMAGES, 0)
    other = make_graph(tmp_path / "other" / retrain.GRAPH_FILE, seed=1)
    assert compute(other.parent) == IMAGES
    check_features(tmp_path, other)


def test_damaged_files_are_done_again(compute, tmp_path):
    """Empty, cut off, with a number too many or too few, with what is no number, with other signs, no ASCII, zeros."""
    assert compute() == IMAGES
    before = contents(tmp_path)
    path, *others = sorted((tmp_path / "bottleneck/blue").iterdir())
    text, most = path.read_text(), path.read_text().rsplit(",", 1)[0]
    damaged = ["", text[: len(text) // 2], text + ",0.5", most, most + ",nan", most + ",inf", "not a number," * 16]
    damaged += [text.replace(",", ";"), text.replace(",", ",,", 1), "é" + text, "\0" * len(text)]
    for other, content in zip(others, damaged, strict=False):
        other.write_text(content)
    assert compute() == len(damaged)
    assert contents(tmp_path) == before


def test_classic_file_is_used_if_younger_than_its_image_and_older_than_the_run(image_dir, compute, tmp_path):
    """One that is younger is of a run beside this one, which may have computed it otherwise."""
    classic, now = ",".join(["0.5"] * 16), time.time()
    paths = [tmp_path / f"bottleneck/green/green_{i:02}.jpg{ENDING}" for i in (1, 2, 3)]
    paths[0].parent.mkdir(parents=True)
    for path, written in zip(paths, (now - 60, now - 180, now + 60), strict=True):
        path.write_text(classic)
        os.utime(path, (written, written))
        os.utime(image_dir / "green" / path.name.removesuffix(ENDING), (now - 120, now - 120))
    assert compute() == IMAGES - 1
    assert [path.read_text() == classic for path in paths] == [True, False, False]


@pytest.mark.parametrize("kept", [1, 30, -1], ids=["one byte", "half", "without its line end"])
def test_half_written_index_line_is_ignored(compute, tmp_path, kept):
    """A run killed while it wrote a record leaves half a line and no bottleneck file."""
    assert compute() == IMAGES
    *lines, last = (tmp_path / INDEX).read_bytes().splitlines(keepends=True)
    older = b'["green/green_01.jpg.txt", 1, 2, "recipe"]\n'  # as written before the cues were measured
    (tmp_path / INDEX).write_bytes(b"\xff\xfe\n\n" + older + b"".join(lines) + last[:kept])
    (tmp_path / "bottleneck" / json.loads(last)[0]).unlink()
    assert (compute(), compute()) == (1, 0)
    # What was recorded behind the half line counts: another base model makes all out of date.
    other = make_graph(tmp_path / "other" / retrain.GRAPH_FILE, seed=1)
    assert compute(other.parent) == IMAGES


def test_an_index_from_before_the_cues_is_no_stumbling_block(compute, tmp_path):
    assert compute() == IMAGES
    lines = [json.dumps(json.loads(line)[:4]) + "\n" for line in (tmp_path / INDEX).read_text("utf-8").splitlines()]
    (tmp_path / INDEX).write_text("".join(lines), "utf-8")
    compute()  # those that are known by their times are good
    assert compute() == 0


def test_a_journal_outlives_half_a_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    values = [["\udcff é \u2028\n", 1], {"a": None}, 3]
    for value in values[:2]:
        retrain.add_to_journal(path, value)
    with open(path, "ab") as file:
        file.write(b'["half')
    assert retrain.read_journal(path) == values[:2]
    retrain.add_to_journal(path, values[2])
    assert retrain.read_journal(path) == values


# What can't be used


def test_unusable_images_are_skipped_and_listed(train, image_dir, tmp_path, capsys):
    good = (image_dir / "blue/blue_00.jpg").read_bytes()
    bad = {"empty.jpg": b"", "half.jpg": good[: len(good) // 2], "words.jpg": b"hello"}
    for name, data in bad.items():
        (image_dir / "blue" / name).write_bytes(data)
    assert train() == 0
    with open(tmp_path / "bottleneck/skipped_inception_v3.tsv", encoding="utf-8") as file:
        listed = {Path(path).name: reason for path, reason in csv.reader(file, delimiter="\t")}
    assert listed == {
        "empty.jpg": "the file is empty",
        "half.jpg": "the file is truncated",
        "words.jpg": "not an image in JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC format",
    }
    said = capsys.readouterr().err
    assert "3 of the files could not be used" in said
    assert all(f"{name}: {reason}" in said for name, reason in listed.items())
    assert len(contents(tmp_path)) == IMAGES

    for name in bad:
        (image_dir / "blue" / name).write_bytes(good)
    assert train() == 0
    assert not (tmp_path / "bottleneck/skipped_inception_v3.tsv").exists()
    assert "could not be used" not in capsys.readouterr().err
    assert len(contents(tmp_path)) == IMAGES + 3


def test_class_without_a_usable_image(train, image_dir, capsys):
    for path in (image_dir / "Red Things").iterdir():
        path.write_bytes(b"damaged")
    assert train("--logging_verbosity", "ERROR") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("retrain.py: error: ")
    assert "no usable images of 'red things' to train on" in said
    assert not (image_dir.parent / "output_graph.pb").exists()


# Killed


def test_killed_before_a_file_gets_its_name(compute, image_dir, model_dir, small_graph, tmp_path):
    """There are whole files only, and the next run computes those that are missing, and no others."""
    base_of(model_dir)  # converted
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "driver.py", "--image_dir", image_dir, "--model_dir", model_dir]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert died.returncode == -signal.SIGKILL
    before = contents(tmp_path)
    assert len(before) == 24
    assert all(text.count(b",") == 15 for text in before.values())
    assert compute() == IMAGES - 24
    assert before.items() <= contents(tmp_path).items()
    check_features(tmp_path, small_graph)


def test_old_temporary_files_are_removed(compute, tmp_path):
    old, young = time.time() - 3700, time.time() - 3500
    expected = {}
    for folder in ("bottleneck", "bottleneck/blue", "bottleneck/others-01234567/blue"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, made in ((".retrain-0.tmp", old), (".retrain-1.tmp", young), ("mine.tmp", old)):
            path = tmp_path / folder / name
            path.write_text("0.5,0.5")
            os.utime(path, (made, made))
            expected[path] = name != ".retrain-0.tmp"
    compute()
    assert {path: path.exists() for path in expected} == expected


# Distortions


PIXELS = np.asarray(make_image((90, 120, 60), 5))
SIZE = (33, 33)
SEEDS = [f"seed {i}" for i in range(20)]
PLAIN = retrain.resize_bilinear(PIXELS, SIZE)


def variants(**settings) -> list[np.ndarray]:
    """Return a variant of PIXELS for each of SEEDS."""
    return [Distortion(**settings).apply(PIXELS, SIZE, seed) for seed in SEEDS]


def test_no_distortion_is_the_image_itself():
    np.testing.assert_array_equal(Distortion().apply(PIXELS, SIZE, "any"), PLAIN)


def test_flip_is_the_mirror_for_some():
    found = variants(flip_left_right=True)
    mirrored = [np.array_equal(variant, PLAIN[:, ::-1]) for variant in found]
    assert all(m or np.array_equal(variant, PLAIN) for m, variant in zip(mirrored, found, strict=True))
    assert 3 < sum(mirrored) < 17


def test_brightness_scales():
    factors = []
    for variant in variants(random_brightness=30):
        factors.append(np.median(variant / PLAIN))
        np.testing.assert_allclose(variant, PLAIN * factors[-1], rtol=1e-5)
    assert 0.7 <= min(factors) < 0.85 and 1.15 < max(factors) <= 1.3


def test_rotation_turns_about_the_middle_and_fills_with_the_mean():
    """By up to so many degrees: of a bright half some rows' brightness moves, and the mean stays."""
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32] = 200
    for seed in SEEDS[:5]:
        variant = Distortion(random_rotation=20).apply(half, (64, 64), seed)
        assert not np.array_equal(variant, half) and abs(variant.mean() - half.mean()) < 5
        assert variant[6:16, 26:38].min() > 190 and variant[-16:-6, 26:38].max() < 10
        np.testing.assert_array_equal(variant, Distortion(random_rotation=20).apply(half, (64, 64), seed))


def test_color_changes_saturation_and_contrast_but_not_the_mean():
    spreads = []
    for variant in variants(random_color=50):
        np.testing.assert_allclose(variant.mean(), PLAIN.mean(), rtol=1e-4)
        grey = variant.mean(axis=2, keepdims=True)
        spreads.append((grey.std() / PLAIN.mean(axis=2).std(), (variant - grey).std()))
    contrasts, saturations = np.array(spreads).T
    assert 0.5 <= contrasts.min() < 0.75 and 1.25 < contrasts.max() <= 1.5
    assert saturations.max() > 2 * saturations.min()


@pytest.mark.parametrize(
    "settings, sides, places", [({"random_crop": 20}, [39], 10), ({"random_scale": 30}, range(33, 43), 4)]
)
def test_crop_and_scale_are_windows_of_the_enlarged_image(settings, sides, places):
    found = set()
    for variant in variants(**settings):
        for side in sides:  # up to int(33 * 1.2) and int(33 * 1.3)
            windows = np.lib.stride_tricks.sliding_window_view(
                retrain.resize_bilinear(PIXELS, (side, side)), (*SIZE, 3)
            )
            where = np.argwhere((windows == variant).all(axis=(3, 4, 5)))
            if len(where):
                break
        assert len(where) == 1, "it is no window of the image at a size that the flag allows"
        found.add((side, *where[0]) if len(sides) == 1 else side)
    assert len(found) > places


def test_variants_have_files_of_training_images_only(train, image_dir, tmp_path, computed):
    flags = ("--random_brightness", 20, "--distortions_per_image")
    images = retrain.assign_splits(retrain.list_images(str(image_dir)), 10, 10)
    keys = [image.key for image in images if image.split == "training"]
    assert 0 < len(keys) < IMAGES
    assert train(*flags, 3) == 0
    assert len(computed) == IMAGES + 3 * len(keys)
    variants = {f"{key}_inception_v3_distorted_{i}.txt" for key in keys for i in range(3)}
    found = contents(tmp_path)
    assert {name for name in found if "distorted" in name} == variants
    assert len({found[name] for name in variants}) == len(variants)
    computed.clear()
    assert train(*flags, 5) == 0
    assert len(computed) == 2 * len(keys)
    assert train(*flags, 3) == 0
    assert len(computed) == 2 * len(keys)


def test_other_settings_redo_the_variants_only(compute):
    assert compute() == IMAGES
    for other in ({}, {"flip_left_right": True}, {"random_crop": 1}, {"random_rotation": 1}):
        distortion = Distortion(random_brightness=20, **other)
        assert compute(distortion=distortion, count=2) == 2 * IMAGES
        assert compute(distortion=distortion, count=2) == 0
    assert compute() == 0


def test_matrix_in_a_file_gives_the_same_classifier(train, tmp_path, monkeypatch):
    """As one does that has more features than the memory should hold."""
    made, memmap = [], np.memmap

    def counted(*arguments, **options):
        made.extend([1] * ("w+" in arguments))
        return memmap(*arguments, **options)

    monkeypatch.setattr(np, "memmap", counted)
    flags = ("--random_seed", 1, "--flip_left_right", "--distortions_per_image", 2)
    assert train(*flags) == 0
    assert not made
    expected = Path("output_graph.pb").read_bytes()
    monkeypatch.setattr(retrain, "MOST_IN_MEMORY", 1000)
    assert train(*flags) == 0
    assert len(made) == 3
    assert Path("output_graph.pb").read_bytes() == expected
    assert not list((tmp_path / "bottleneck").glob("*tmp*"))


# Cues


def test_cues_are_kept_beside_the_features(image_dir, model_dir, tmp_path, computed):
    images = retrain.list_images(str(image_dir))
    open_store = functools.partial(retrain.BottleneckStore, str(tmp_path / "kept"), base_of(model_dir), Reading())
    _, cues, _ = retrain.compute_bottlenecks(open_store(), images)
    assert (cues[:, 3:] == (60, 48)).all() and np.isfinite(cues).all()
    computed.clear()
    np.testing.assert_array_equal(retrain.compute_bottlenecks(open_store(), images)[1], cues)
    open_store().index.unlink()  # as beside files of the classic script, from before this run
    for age, folder in ((120, image_dir), (60, tmp_path / "kept")):
        for path in folder.rglob("*.*"):
            os.utime(path, (time.time() - age,) * 2)
    images = retrain.list_images(str(image_dir))
    assert np.isnan(retrain.compute_bottlenecks(open_store(), images)[1]).all()
    assert not computed


def test_cues_say_what_they_are_named_for():
    def cues(pixels: np.ndarray) -> dict[str, float]:
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        return dict(zip(retrain.CUES, retrain.cues_of(file.getvalue(), pixels[::2, ::2]), strict=True))

    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3)).astype(np.uint8)
    smooth = np.asarray(PIL.Image.fromarray(noise).filter(PIL.ImageFilter.GaussianBlur(3)))
    white = np.full((200, 300, 3), 255, np.uint8)
    assert cues(white) == {"brightness": 1, "contrast": 0, "sharpness": 0, "width": 300, "height": 200}
    assert (cues(noise)["width"], cues(noise)["height"]) == (200, 300)
    assert cues(noise)["sharpness"] > 10 * cues(smooth)["sharpness"] > 0
    assert cues(noise)["contrast"] > cues(smooth)["contrast"] > 0


def test_an_image_that_is_gone_when_its_variants_are_made_is_told(train, image_dir, capsys):
    assert train() == 0
    path = image_dir / "green/green_00.jpg"
    stamp = path.stat()
    path.write_bytes(bytes(stamp.st_size))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert train("--flip_left_right", "--distortions_per_image", 2, "--testing_percentage", 0) == 1
    assert "was changed or removed meanwhile" in capsys.readouterr().err
