#!/usr/bin/env python3
"""Measure retrain.py against the limit of the machine and against other ways, side by side in one run.

    python tests/benchmark.py --image_dir ../shared/photos/ants_bees/train --graph ../shared/inception_model/\
classify_image_graph_def.pb

Every way is measured in turn, several rounds long, and medians are told, since machines are noisy. The limit is
what one-thread matrix products (numpy's SGEMM) reach on all cores, in units of an Inception-v3 image, 11.43 GFLOP.
LiteRT's kernels may exceed it where numpy's don't use all that the processor has. Nothing of the user's is written to.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the limit is measured with one thread; before numpy is loaded

import numpy as np
import PIL.Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import retrain  # noqa: E402

GFLOP_PER_IMAGE = 11.43
VGG16_GFLOP_PER_IMAGE = 30.9


def seconds(work: Callable[[], object]) -> float:
    """Return how long the work took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sgemm_limit(gflop_per_image: float = GFLOP_PER_IMAGE) -> float:
    """Return the images per second that one-thread SGEMM times the cores allows."""
    a, b = (np.random.default_rng(i).random((2048, 2048), np.float32) for i in (1, 2))
    a @ b
    return 5 * 2 * 2048**3 / 1e9 / seconds(lambda: [a @ b for _ in range(5)]) * retrain.core_count() / gflop_per_image


def our_extraction(base: retrain.BaseModel, images: list[retrain.Image], reading: retrain.Reading) -> float:
    """Return our images per second from files to bottleneck files, in an empty folder.

    As with the other ways, the network is loaded and has run once before the clock starts.
    """
    models = [retrain.LiteModel(base.lite_path) for _ in range(retrain.core_count())]
    for model in models:
        model(np.zeros([*base.input_size, 3], np.float32))
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(retrain, "LiteModel", side_effect=models):
        store = retrain.BottleneckStore(folder, base, reading)
        took = seconds(lambda: retrain.compute_bottlenecks(store, images))
    return len(images) / took


def random_vgg16(model_dir: Path) -> retrain.BaseModel:
    """Return VGG16 up to its last maps, with random weights, which cost what the trained ones cost."""
    keras = retrain.import_tensorflow().keras
    model = keras.applications.VGG16(include_top=False, weights=None, input_shape=(224, 224, 3))
    model.save(model_dir / next(iter(retrain.VGG16_FILES)))
    return retrain.load_vgg16("avg_pool", model_dir, model_dir)


def print_vgg16(folder: Path, images: list[retrain.Image], count: int) -> None:
    """Print how fast VGG16's features are computed, beside the limit that matrix products set."""
    base = random_vgg16(folder)
    ways = {
        "limit, VGG16": lambda: sgemm_limit(VGG16_GFLOP_PER_IMAGE),
        "retrain.py --architecture vgg16": lambda: our_extraction(base, images, retrain.Reading()),
    }
    limits, rates = rounds(ways, count).values()
    share = statistics.median(rate / limit for rate, limit in zip(rates, limits, strict=True))
    print(f"\nVGG16: {statistics.median(rates):.1f} images per second, {share:.2f} of the limit")


def tensorflow_batches(graph, images: list[retrain.Image], batch: int = 8) -> float:
    """Return the images per second of plain TensorFlow on the folded graph: decoded, then run eight at a time."""
    import tensorflow as tf

    size = retrain.graph_input_size(graph)
    network = retrain.graph_function(graph, retrain.BOTTLENECK_NODE)

    def run() -> None:
        for start in range(0, len(images), batch):
            pixels = [tf.io.decode_jpeg(image.path.read_bytes(), 3) for image in images[start : start + batch]]
            resized = [tf.raw_ops.ResizeBilinear(images=tf.cast(p, tf.float32)[None], size=size)[0] for p in pixels]
            network(tf.stack(resized)).numpy()

    network(tf.zeros([batch, *size, 3]))
    network(tf.zeros([len(images) % batch or batch, *size, 3]))
    return len(images) / seconds(run)


def classic_loop(graph_path: Path, images: list[retrain.Image]) -> float:
    """Return the images per second of the classic way: the graph as it is, one file at a time, features as text."""
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(graph_path.read_bytes())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session, tempfile.TemporaryDirectory() as folder:
        (bottleneck,) = tf.import_graph_def(graph, return_elements=["pool_3/_reshape:0"], name="")

        def features(image: retrain.Image) -> None:
            values = session.run(bottleneck, {"DecodeJpeg/contents:0": image.path.read_bytes()})
            Path(folder, "bottleneck.txt").write_text(",".join(str(x) for x in np.squeeze(values)))

        features(images[0])
        return len(images) / seconds(lambda: [features(image) for image in images])


def large_photographs(images: list[retrain.Image], folder: Path) -> list[retrain.Image]:
    """Return photographs of 4,000 x 3,000 pixels with a camera's noise, 3 MB each, made of ordinary ones."""
    noise = np.random.default_rng(0).normal(0, 6, (3000, 4000, 1)).astype(np.float32)
    made = []
    for i, image in enumerate(images):
        with PIL.Image.open(image.path) as small:
            pixels = np.asarray(small.convert("RGB").resize((4000, 3000), PIL.Image.Resampling.BICUBIC))
        path = folder / "large" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(path, quality=85)
        made.append(retrain.Image(path, image.label))
    return made


def features_of(base: retrain.BaseModel, images: list[retrain.Image], reading: retrain.Reading) -> np.ndarray:
    """Return the features of photographs, float32 [images, n]."""
    with tempfile.TemporaryDirectory() as folder:
        store = retrain.BottleneckStore(folder, base, reading)
        return retrain.compute_bottlenecks(store, images)[0][:, 0]


def print_effect_of_reduced_decoding(base, learnt: list[retrain.Image], tried: list, large: list) -> None:
    """Train on some photographs, and print the accuracy on others: as they are, and large, in full and reduced."""
    labels = sorted({image.label for image in learnt})

    def rows(images: list[retrain.Image], reading: retrain.Reading) -> retrain.Rows:
        classes = np.array([labels.index(image.label) for image in images])
        return retrain.Rows(features_of(base, images, reading), np.arange(len(images)), classes)

    reduced, exact = retrain.Reading(), retrain.Reading(exact_decode=True)
    training, small = rows(learnt, reduced), rows(tried, reduced)
    settings = retrain.TrainingSettings(how_many_training_steps=1000, random_seed=0)
    head, _ = retrain.train_head(training, small, len(labels), settings)
    tests = {"ordinary": small, "4000x3000, in full": rows(large, exact), "4000x3000, reduced": rows(large, reduced)}
    print(f"\naccuracy, trained on {len(learnt)} photographs, on {len(tried)} others:")
    for name, test in tests.items():
        print(f"  {name}: {100 * (head.logits(test.features()).argmax(axis=1) == test.classes).mean():.1f} %")
    full, less = (tests[name].matrix for name in ("4000x3000, in full", "4000x3000, reduced"))
    change = np.abs(full - less).mean() / np.abs(full).mean()
    print(f"  reduced decoding changes a feature by {100 * change:.1f} % of the mean feature")


def training_seconds() -> float:
    """Return how long 4,000 steps of batch 100 take on 2,500 x 2,048 features of five classes."""
    random = np.random.default_rng(0)
    features = random.random((2500, 2048), np.float32)
    rows = retrain.Rows(features, np.arange(2500), random.integers(5, size=2500))
    return seconds(lambda: retrain.train_head(rows, rows, 5, retrain.TrainingSettings()))


def cached_seconds(base: retrain.BaseModel, images: list[retrain.Image], count: int = 2500) -> float:
    """Return how long it takes to load the cached features of `count` pictures."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = [
            retrain.Image(Path(folder, "many", f"{i}{image.path.suffix}"), "many")
            for i, image in zip(range(count), itertools.cycle(images), strict=False)
        ]
        Path(folder, "many").mkdir()
        for picture, image in zip(pictures, itertools.cycle(images), strict=False):
            shutil.copyfile(image.path, picture.path)
        reading = retrain.Reading()
        store = retrain.BottleneckStore(f"{folder}/bottleneck", base, reading)
        text = retrain.bottleneck_text(np.random.default_rng(0).random(base.bottleneck_size, np.float32))
        for picture in pictures:
            store.save(store.name(picture, ""), store.record(picture, ""), text)
        fresh = retrain.BottleneckStore(f"{folder}/bottleneck", base, reading)
        return seconds(lambda: retrain.compute_bottlenecks(fresh, pictures))


# Linux hands a process's peak down to the processes that it starts, so each is asked for its own.
MEASURED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import retrain
if retrain.main(sys.argv[1:]):
    sys.exit("the run failed")
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def peak_memory(image_dir: Path, model_dir: Path) -> int:
    """Return the peak resident size, in MB, of a whole run of retrain.py from an empty bottleneck folder."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--image_dir", image_dir.resolve(), "--model_dir", model_dir.resolve()]
        command = [sys.executable, "-c", MEASURED, ROOT, *flags]
        run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return int(run.stdout.split()[-1]) // 1024


def rounds(ways: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Return what each way measured in each of `count` rounds, all of them in every round."""
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(count):
        for name, way in ways.items():
            measured[name].append(way())
            print(f"  round {i + 1}: {name}: {measured[name][-1]:.1f}", flush=True)
    return measured


def print_table(measured: dict[str, list[float]]) -> None:
    """Print the medians of the rates, and of the ratios within a round: what disturbs a round disturbs all its ways."""
    print("\n| way | images per second | retrain.py is that many times as fast |\n| --- | --- | --- |")
    for name, rates in measured.items():
        ratios = [ours / rate for ours, rate in zip(measured["retrain.py"], rates, strict=True)]
        print(f"| {name} | {statistics.median(rates):.1f} | {statistics.median(ratios):.2f} |")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_dir", type=Path, required=True, help="class folders with 200 photographs or more")
    parser.add_argument("--graph", type=Path, required=True, help="the Inception-v3 graph")
    parser.add_argument("--vgg16_only", action="store_true", help="measure VGG16 and nothing else")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=240, help="photographs measured in every round")
    flags = parser.parse_args()
    images = retrain.list_images(str(flags.image_dir))[: flags.images]
    few = images[:: max(1, len(images) // 64)]
    with tempfile.TemporaryDirectory() as folder:
        print_vgg16(Path(folder), few, flags.rounds)
        if flags.vgg16_only:
            return
        model_dir = Path(folder, "model")
        model_dir.mkdir()
        (model_dir / retrain.GRAPH_FILE).symlink_to(flags.graph.resolve())
        base = retrain.load_base_model(model_dir / retrain.GRAPH_FILE, model_dir)
        graph = retrain.load_graph(flags.graph)
        large = large_photographs(images[::2], Path(folder))
        plain, exact = retrain.Reading(), retrain.Reading(exact_decode=True)
        print(f"{retrain.core_count()} cores, {len(images)} photographs; images per second:")
        ours = functools.partial(our_extraction, base)
        ways = {
            "limit: one-thread SGEMM x cores": sgemm_limit,
            "retrain.py": lambda: ours(images, plain),
            "TensorFlow, folded, batches of 8": lambda: tensorflow_batches(graph, few),
            "classic loop": lambda: classic_loop(flags.graph, few),
            "retrain.py, 4000x3000": lambda: ours(large, plain),
            "retrain.py, 4000x3000, --exact_decode": lambda: ours(large, exact),
        }
        print_table(rounds(ways, flags.rounds))
        print(f"\ntraining, 4,000 steps of batch 100 on 2,500 x 2,048: {training_seconds():.2f} s")
        print(f"cached features of 2,500 pictures: {cached_seconds(base, images):.2f} s")
        print_effect_of_reduced_decoding(base, images[1::2], images[::2], large)
        print(f"peak memory of a whole run: {peak_memory(flags.image_dir, model_dir)} MB")


if __name__ == "__main__":
    main()
