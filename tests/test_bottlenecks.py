"""The room 'bottlenecks': what is kept, when it is computed anew, and that killed and parallel runs do no harm."""

from __future__ import annotations

import csv
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
from conftest import COLOURS, ROOT, make_graph, make_image

import retrain

ENDING = "_inception_v3.txt"
IMAGES = 60  # in image_dir

# Runs retrain.py as a process that can be killed in its middle: SLOW seconds more for each picture, and, if DIES_AT
# names a number, a kill right before that many-th bottleneck file gets its final name.
DRIVER = """
import itertools, os, signal, sys, time
import retrain

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
compute, replace, renamed = retrain.LiteModel.__call__, os.replace, itertools.count(1)

def slow(self, pixels):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return compute(self, pixels)

def deadly(source, target):
    if str(target).endswith(".txt") and next(renamed) == int(os.environ.get("DIES_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

retrain.LiteModel.__call__, os.replace = slow, deadly
retrain.core_count = lambda: 2  # on many cores all would be done at once
sys.exit(retrain.main())
"""


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """A list that gets one more entry for each picture that goes through the network."""
    calls, compute = [], retrain.LiteModel.__call__

    def counted(self, pixels):
        calls.append(1)
        return compute(self, pixels)

    monkeypatch.setattr(retrain.LiteModel, "__call__", counted)
    return calls


@pytest.fixture
def start(train, image_dir, model_dir):
    """A function that starts retrain.py in a process of its own, slowed or deadly by its environment."""
    model_ready(model_dir, image_dir.parent)
    driver = image_dir.parent / "driver.py"
    driver.write_text(DRIVER)
    processes = []

    def run(**environment) -> subprocess.Popen:
        command = [sys.executable, driver, "--image_dir", image_dir, "--model_dir", model_dir]
        command += ["--how_many_training_steps", "1", "--logging_verbosity", "WARN"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in environment.items()}
        process = subprocess.Popen(
            command, cwd=image_dir.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def model_ready(model_dir: Path, folder: Path) -> retrain.BaseModel:
    """Return the base model, converted."""
    return retrain.load_base_model(retrain.inception_recipe(model_dir), model_dir, folder)


def bottlenecks(folder: Path) -> dict[str, Path]:
    """Return the bottleneck files below a folder, by `<class folder>/<file name>`."""
    return {f"{path.parent.name}/{path.name}": path for path in folder.glob("bottleneck/*/*.txt")}


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the bottleneck files below a folder hold."""
    return {name: path.read_bytes() for name, path in bottlenecks(folder).items()}


def read_classic(path: Path) -> list[float]:
    """Read a bottleneck file as the classic script does."""
    with open(path) as file:
        return [float(x) for x in file.read().split(",")]


def raw_features(graph_path: Path, images: list[Path]) -> np.ndarray:
    """Return the features float32 [images, n] that a TensorFlow 1 session reads out of the graph as it is."""
    import tensorflow as tf

    graph_def = tf.compat.v1.GraphDef.FromString(graph_path.read_bytes())
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        tf.import_graph_def(graph_def, name="")
        feeds = [{"DecodeJpeg/contents:0": path.read_bytes()} for path in images]
        return np.array([session.run("pool_3/_reshape:0", feed)[0] for feed in feeds])


def check_features(folder: Path, graph_path: Path) -> None:
    """Assert that there is a bottleneck file for each picture, and that all hold what the graph gives for it."""
    images = sorted(folder.glob("pictures/*/*"))
    kept = [read_classic(folder / "bottleneck" / image.parent.name / (image.name + ENDING)) for image in images]
    np.testing.assert_allclose(kept, raw_features(graph_path, images), atol=1e-4)
    assert len(bottlenecks(folder)) == len(images)


def other_picture(path: Path) -> None:
    """Change what a picture shows."""
    make_image((250, 250, 0), 99, (70, 50)).save(path)


# Names, format, values


def test_files_are_those_of_the_contract(train, image_dir, small_graph):
    assert train() == 0
    assert set(bottlenecks(image_dir.parent)) == {
        f"{label}/{label}_{i:02}.jpg{ENDING}" for label in COLOURS for i in range(20)
    }
    check_features(image_dir.parent, small_graph)


def test_over_long_names_work(train, image_dir, computed):
    name = "x" * 246 + ".jpg"
    (image_dir / "blue/blue_00.jpg").rename(image_dir / "blue" / name)
    assert train() == 0
    assert len(bottlenecks(image_dir.parent)) == len(computed) == IMAGES
    assert train() == 0
    assert len(computed) == IMAGES


def test_no_picture_is_changed(train, image_dir):
    def state() -> dict:
        files = sorted(path for path in image_dir.rglob("*") if path.is_file())
        return {path: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) for path in files}

    (image_dir / "blue/broken.jpg").write_bytes(b"no picture")
    before = state()
    assert train("--flip_left_right", "--distortions_per_image", 2) == 0
    assert state() == before


# What is computed anew, and what is not


def test_second_run_computes_nothing(train, image_dir, computed):
    assert train() == 0
    assert len(computed) == IMAGES
    before = {path: path.stat().st_mtime_ns for path in bottlenecks(image_dir.parent).values()}
    assert train() == 0
    assert len(computed) == IMAGES
    assert before == {path: path.stat().st_mtime_ns for path in bottlenecks(image_dir.parent).values()}


@pytest.mark.parametrize("age", [-100, 0, 7200], ids=["newer", "as old", "older"])
def test_changed_picture_is_done_again(train, image_dir, small_graph, computed, age):
    assert train() == 0
    changed = image_dir / "blue/blue_03.jpg"
    before = changed.stat().st_mtime_ns
    other_picture(changed)
    os.utime(changed, ns=(0, before - age * 10**9))
    computed.clear()
    assert train() == 0
    assert len(computed) == 1
    check_features(image_dir.parent, small_graph)


def test_other_base_model_redoes_all(train, image_dir, tmp_path, computed):
    assert train() == 0
    other = make_graph(tmp_path / "other" / retrain.GRAPH_FILE, seed=1)
    computed.clear()
    assert train("--model_dir", other.parent) == 0
    assert len(computed) == IMAGES
    check_features(image_dir.parent, other)


@pytest.mark.parametrize("flag", ["--ignore_exif_orientation", "--exact_decode"])
def test_other_reading_redoes_all(train, computed, flag):
    assert train() == 0
    computed.clear()
    assert train(flag) == 0
    assert len(computed) == IMAGES
    assert train(flag) == 0
    assert len(computed) == IMAGES


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text + ",0.5",
        lambda text: text.rsplit(",", 1)[0],
        lambda text: text.rsplit(",", 1)[0] + ",nan",
        lambda text: text.rsplit(",", 1)[0] + ",inf",
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", ",,", 1),
        lambda text: "\0" * len(text),
        lambda text: "é" + text,
        lambda text: "not a number," * 16,
    ],
    ids=["empty", "half", "too many", "too few", "nan", "inf", "semicolons", "gap", "zeros", "no ASCII", "words"],
)
def test_damaged_file_is_done_again(train, image_dir, computed, damage):
    assert train() == 0
    before = contents(image_dir.parent)
    path = image_dir.parent / "bottleneck/blue" / f"blue_07.jpg{ENDING}"
    path.write_text(damage(path.read_text()))
    computed.clear()
    assert train() == 0
    assert len(computed) == 1
    assert contents(image_dir.parent) == before


@pytest.mark.parametrize("age, used", [(-60, True), (60, False)], ids=["younger", "older"])
def test_classic_file_is_used_if_younger_than_its_picture(train, image_dir, computed, age, used):
    classic = ",".join(["0.5"] * 16)
    path = image_dir.parent / "bottleneck/green" / f"green_01.jpg{ENDING}"
    path.parent.mkdir(parents=True)
    path.write_text(classic)
    made = (image_dir / "green/green_01.jpg").stat().st_mtime
    os.utime(path, (made - age, made - age))
    assert train() == 0
    assert len(computed) == IMAGES - used
    assert (path.read_text() == classic) is used


@pytest.mark.parametrize("kept", [1, 30, -1], ids=["one byte", "half", "without its line end"])
def test_half_written_index_line_is_ignored(train, image_dir, tmp_path, computed, kept):
    """A run killed while it wrote a record leaves half a line and no bottleneck file."""
    assert train() == 0
    index = image_dir.parent / "bottleneck/index_inception_v3.jsonl"
    *lines, last = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines) + last[:kept])
    (image_dir.parent / "bottleneck" / json.loads(last)[0]).unlink()
    computed.clear()
    assert train() == 0
    assert len(computed) == 1
    assert train() == 0
    assert len(computed) == 1
    # What was recorded behind the half line counts: another base model makes all out of date.
    other = make_graph(tmp_path / "other" / retrain.GRAPH_FILE, seed=1)
    computed.clear()
    assert train("--model_dir", other.parent) == 0
    assert len(computed) == IMAGES
    check_features(image_dir.parent, other)


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"7\n", b"[]\n", b"[[], 1, 2]\n", b"{}\n", b"null\n", b"\n"])
def test_spoilt_index_line_is_ignored(train, image_dir, computed, line):
    assert train() == 0
    index = image_dir.parent / "bottleneck/index_inception_v3.jsonl"
    index.write_bytes(line + index.read_bytes())
    computed.clear()
    assert train() == 0
    assert not computed


def test_a_journal_outlives_half_a_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    values = [["\udcff é \u2028\n", 1], {"a": None}, 3]
    for value in values[:2]:
        retrain.Journal(path).append(value)
    with open(path, "ab") as file:
        file.write(b'["half')
    journal = retrain.Journal(path)
    assert journal.read() == values[:2]
    journal.append(values[2])
    assert retrain.Journal(path).read() == values


# What can't be used


def test_unusable_pictures_are_skipped_and_listed(train, image_dir, capsys):
    good = (image_dir / "blue/blue_00.jpg").read_bytes()
    bad = {"empty.jpg": b"", "half.jpg": good[: len(good) // 2], "words.jpg": b"hello"}
    for name, data in bad.items():
        (image_dir / "blue" / name).write_bytes(data)
    assert train() == 0
    with open(image_dir.parent / "bottleneck/skipped_inception_v3.tsv", encoding="utf-8") as file:
        listed = {Path(path).name: reason for path, reason in csv.reader(file, delimiter="\t")}
    assert listed == {
        "empty.jpg": "the file is empty",
        "half.jpg": "the file is truncated",
        "words.jpg": "not an image in JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC format",
    }
    said = capsys.readouterr().err
    assert "3 of the files could not be used" in said
    assert all(f"{name}: {reason}" in said for name, reason in listed.items())
    assert len(bottlenecks(image_dir.parent)) == IMAGES

    for name in bad:
        (image_dir / "blue" / name).write_bytes(good)
    assert train() == 0
    assert not (image_dir.parent / "bottleneck/skipped_inception_v3.tsv").exists()
    assert "skipped" not in capsys.readouterr().err
    assert len(bottlenecks(image_dir.parent)) == IMAGES + 3


@pytest.mark.parametrize("usable", [0, 1])
def test_class_with_too_few_usable_pictures(train, image_dir, capsys, usable):
    for path in sorted((image_dir / "Red Things").iterdir())[usable:]:
        path.write_bytes(b"damaged")
    assert train("--logging_verbosity", "ERROR") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("retrain.py: error: ")
    assert f"too few usable images of 'red things' ({usable});" in said
    assert not (image_dir.parent / "output_graph.pb").exists()


# Killed, stopped, two at once


def check_resumed(train, folder: Path, graph_path: Path, computed: list[int]) -> None:
    """Assert that there are whole files only, and that the next run computes those that are missing, and no others."""
    done = bottlenecks(folder)
    assert all(len(read_classic(path)) == 16 for path in done.values())
    before = contents(folder)
    computed.clear()
    assert train() == 0
    assert len(computed) == IMAGES - len(done)
    assert {name: data for name, data in contents(folder).items() if name in before} == before
    check_features(folder, graph_path)


@pytest.mark.parametrize("number", [1, 25])
def test_killed_before_a_file_gets_its_name(train, start, image_dir, small_graph, computed, number):
    process = start(DIES_AT=number)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(bottlenecks(image_dir.parent)) < IMAGES
    check_resumed(train, image_dir.parent, small_graph, computed)


def test_old_temporary_files_are_removed(train, image_dir):
    old, young = time.time() - 3700, time.time() - 3500
    expected = {}
    for folder in ("bottleneck", "bottleneck/blue"):
        (image_dir.parent / folder).mkdir(exist_ok=True)
        for name, made in ((".retrain-0.tmp", old), (".retrain-1.tmp", young), ("mine.tmp", old)):
            path = image_dir.parent / folder / name
            path.write_text("0.5,0.5")
            os.utime(path, (made, made))
            expected[path] = name != ".retrain-0.tmp"
    assert train() == 0
    assert {path: path.exists() for path in expected} == expected


# Distortions


PIXELS = np.asarray(make_image((90, 120, 60), 5))
SIZE = (33, 33)
SEEDS = [f"seed {i}" for i in range(20)]
PLAIN = retrain.resize_bilinear(PIXELS, SIZE)


def windows(enlarged: np.ndarray) -> list[np.ndarray]:
    """Return every window of SIZE in the pixels [height, width, 3]."""
    height, width = SIZE
    return [
        enlarged[top : top + height, left : left + width]
        for top in range(enlarged.shape[0] - height + 1)
        for left in range(enlarged.shape[1] - width + 1)
    ]


def test_no_distortion_is_the_picture_itself():
    np.testing.assert_array_equal(retrain.Distortion().apply(PIXELS, SIZE, "any"), PLAIN)


def test_flip_is_the_mirror_for_some():
    variants = [retrain.Distortion(flip_left_right=True).apply(PIXELS, SIZE, seed) for seed in SEEDS]
    mirrored = [np.array_equal(variant, PLAIN[:, ::-1]) for variant in variants]
    assert all(m or np.array_equal(variant, PLAIN) for m, variant in zip(mirrored, variants, strict=True))
    assert 3 < sum(mirrored) < 17


def test_brightness_scales():
    variants = [retrain.Distortion(random_brightness=30).apply(PIXELS, SIZE, seed) for seed in SEEDS]
    factors = [np.median(variant / PLAIN) for variant in variants]
    for variant, factor in zip(variants, factors, strict=True):
        np.testing.assert_allclose(variant, PLAIN * factor, rtol=1e-5)
    assert 0.7 <= min(factors) < 0.85 and 1.15 < max(factors) <= 1.3


def test_rotation_turns_about_the_middle_and_fills_with_the_mean():
    """By up to so many degrees: of a bright half some rows' brightness moves, and the mean stays."""
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32] = 200
    for seed in SEEDS[:5]:
        variant = retrain.Distortion(random_rotation=20).apply(half, (64, 64), seed)
        assert not np.array_equal(variant, half) and abs(variant.mean() - half.mean()) < 5
        assert variant[6:16, 26:38].min() > 190 and variant[-16:-6, 26:38].max() < 10
        np.testing.assert_array_equal(variant, retrain.Distortion(random_rotation=20).apply(half, (64, 64), seed))


def test_color_changes_saturation_and_contrast_but_not_the_mean():
    spreads = []
    for seed in SEEDS:
        variant = retrain.Distortion(random_color=50).apply(PIXELS, SIZE, seed)
        np.testing.assert_allclose(variant.mean(), PLAIN.mean(), rtol=1e-4)
        grey = variant.mean(axis=2, keepdims=True)
        spreads.append((grey.std() / PLAIN.mean(axis=2).std(), (variant - grey).std()))
    contrasts, saturations = np.array(spreads).T
    assert 0.5 <= contrasts.min() < 0.75 and 1.25 < contrasts.max() <= 1.5
    assert saturations.max() > 2 * saturations.min()


def test_crop_is_a_window_of_the_enlarged_picture():
    places = windows(retrain.resize_bilinear(PIXELS, (39, 39)))  # a margin of 20 %: int(33 * 1.2)
    found = set()
    for seed in SEEDS:
        variant = retrain.Distortion(random_crop=20).apply(PIXELS, SIZE, seed)
        (place,) = [i for i, window in enumerate(places) if np.array_equal(window, variant)]
        found.add(place)
    assert len(found) > 10


def test_scale_enlarges_by_up_to_so_much():
    sizes = set()
    for seed in SEEDS:
        variant = retrain.Distortion(random_scale=30).apply(PIXELS, SIZE, seed)
        fitting = [
            side
            for side in range(33, 43)  # int(33 * 1.3) is 42
            if any(np.array_equal(window, variant) for window in windows(retrain.resize_bilinear(PIXELS, (side, side))))
        ]
        assert fitting, "it is no window of the picture at a size that --random_scale 30 allows"
        sizes.add(fitting[0])
    assert len(sizes) > 4


def training_images(image_dir: Path) -> list[str]:
    """Return the keys of the pictures that are trained on, at the usual percentages."""
    images = retrain.assign_splits(retrain.list_images(str(image_dir)), 10, 10)
    return [image.key for image in images if image.split == "training"]


def test_variants_have_files_of_training_pictures_only(train, image_dir, computed):
    flags = ("--random_brightness", 20, "--distortions_per_image", 3)
    keys = training_images(image_dir)
    assert 0 < len(keys) < IMAGES
    assert train(*flags) == 0
    assert len(computed) == IMAGES + 3 * len(keys)
    variants = {f"{key}_inception_v3_distorted_{i}.txt" for key in keys for i in range(3)}
    assert {name for name in bottlenecks(image_dir.parent) if "distorted" in name} == variants
    assert len({contents(image_dir.parent)[name] for name in variants}) == len(variants)

    computed.clear()
    assert train(*flags) == 0
    assert not computed
    assert train("--random_brightness", 20, "--distortions_per_image", 5) == 0
    assert len(computed) == 2 * len(keys)
    computed.clear()
    assert train() == 0
    assert not computed


@pytest.mark.parametrize(
    "other",
    [
        ("--random_brightness", 21),
        ("--random_brightness", 20, "--flip_left_right"),
        ("--random_brightness", 20, "--random_crop", 1),
        ("--random_brightness", 20, "--random_scale", 1),
    ],
    ids=lambda flags: flags[-1] if isinstance(flags[-1], str) else flags[-2],
)
def test_other_settings_redo_the_variants_only(train, image_dir, computed, other):
    assert train("--random_brightness", 20, "--distortions_per_image", 2) == 0
    computed.clear()
    assert train(*other, "--distortions_per_image", 2) == 0
    assert len(computed) == 2 * len(training_images(image_dir))


# More features than the memory should hold


@pytest.mark.parametrize("flags", [(), ("--flip_left_right", "--distortions_per_image", 2)], ids=["plain", "distorted"])
def test_matrix_in_a_file_gives_the_same_classifier(train, tmp_path, monkeypatch, flags):
    made, memmap = [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda *arguments, **options: made.append(1) or memmap(*arguments, **options))
    flags = ("--no_report", "--random_seed", 1, *flags)
    assert train(*flags) == 0
    assert not made
    expected = Path("output_graph.pb").read_bytes()
    monkeypatch.setattr(retrain, "MOST_IN_MEMORY", 1000)
    assert train(*flags) == 0
    assert made
    assert Path("output_graph.pb").read_bytes() == expected
    assert not list((tmp_path / "bottleneck").glob("*tmp*"))


# Cues


def test_cues_are_kept_beside_the_features(image_dir, model_dir, tmp_path, computed):
    base, images = model_ready(model_dir, tmp_path), retrain.list_images(str(image_dir))
    store = retrain.BottleneckStore(str(tmp_path / "kept"), base, retrain.Reading())
    _, cues, _ = retrain.compute_bottlenecks(store, images)
    assert (cues[:, 3:] == (60, 48)).all() and np.isfinite(cues).all()
    computed.clear()
    again = retrain.BottleneckStore(str(tmp_path / "kept"), base, retrain.Reading())
    np.testing.assert_array_equal(retrain.compute_bottlenecks(again, images)[1], cues)
    assert not computed
    for name, record in again.records.items():  # as an index has it that was written before there were cues
        again.records[name] = record[:3]
    assert np.isnan(retrain.compute_bottlenecks(again, images)[1]).all()
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
