#!/usr/bin/env python3
"""Examine a base model with linear probes, and print the table of inception_model/README.md.

    python tests/probe.py --teacher inception_model/classify_image_graph_def.pb \\
        --starter inception_model/starter_graph_def.pb --photos ../shared/photos

A linear probe is a logistic regression on features that stay as they are: what it gets right, the features told apart.
Four kinds of features of the same photographs, the same regression for all of them. No photograph here was seen by the
starter: distill.held_out is the rule that kept them away from it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "inception_model")]
import retrain  # noqa: E402  (it lies in the folder above)

PENALTY = 1.0  # on the squared weights of the regression, beside the mean loss
ITERATIONS = 500
RAW_SIZE = (32, 32)  # of the raw pixels
FOLDS = 4
EXACT = retrain.Reading(exact_decode=True)


def list_photographs(photos: Path) -> dict[str, tuple[list[Path], list[np.ndarray]]]:
    """Return, for each set that is there, its photographs and the probes to train: which are trained on (bool [n]).

    ants_bees comes in two parts, one to train and one to test. Of the other sets, only the half that was kept out of
    the distillation is used, in four parts by the first byte of the name's SHA-1: each is tested once, with a probe
    trained on the other three.
    """
    from distill import HALVED, held_out

    sets = {}
    paths = sorted(photos.glob("ants_bees/*/*/*.jp*g"))
    if paths:
        sets["ants_bees"] = paths, [np.array([path.parts[-3] == "train" for path in paths])]
    for name in HALVED:
        paths = sorted(path for path in photos.glob(f"{name}/*/*.jp*g") if held_out(path))
        parts = np.array([hashlib.sha1(path.name.encode()).digest()[0] % FOLDS for path in paths])
        if paths:
            sets[name] = paths, [parts != part for part in range(FOLDS)]
    if not sets:
        raise retrain.UserError(f"--photos {photos}: it holds neither ants_bees nor {' nor '.join(HALVED)}.")
    return sets


def extract(paths: list[Path], run: Callable, input_size: tuple[int, int]) -> np.ndarray:
    """Return the features [n, size] of photographs, with `run` taking the resized pixels of one; one thread a core.

    `run` is one function for each thread: [function, ...].
    """

    def worker(network: Callable) -> Callable:
        return lambda k: network(retrain.resize_bilinear(retrain.read_image(paths[k], EXACT, input_size), input_size))

    features = dict(retrain.on_all_cores([worker(network) for network in run], range(len(paths))))
    return np.stack([features[k] for k in range(len(paths))])


def probe(features: np.ndarray, classes: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return what a logistic regression on [n, size] features, trained where `training`, gets right elsewhere: bool.

    The features are centred and brought to a mean square of 1 by one number. Full-batch gradient descent with
    Nesterov's momentum, at the step that the largest singular value allows: it needs no library and no luck.
    """
    x = features - features[training].mean(0)
    x = x / np.sqrt((x[training] ** 2).mean())
    x = np.hstack([x, np.ones((len(x), 1))]).astype(np.float64)
    wanted = np.eye(classes.max() + 1)[classes[training]]  # [n, classes]
    a = x[training]
    step = 1 / (0.5 * np.linalg.norm(a, 2) ** 2 / len(a) + PENALTY)
    weights = ahead = np.zeros((x.shape[1], wanted.shape[1]))
    for k in range(ITERATIONS):
        guess = retrain.Head(ahead, np.zeros(len(wanted[0]))).probabilities(a)  # [n, classes]
        gradient = a.T @ (guess - wanted) / len(a) + PENALTY * ahead
        weights, before = ahead - step * gradient, weights
        ahead = weights + k / (k + 3) * (weights - before)
    return ((x @ weights).argmax(1) == classes)[~training]


def random_starter(starter: Path, path: Path) -> None:
    """Write the starter's graph with random filters (He) and zero biases."""
    tf = retrain.import_tensorflow()
    graph, random = retrain.load_graph(starter), np.random.default_rng(0)
    for node in graph.node:
        if node.op == "Const" and node.attr["dtype"].type in (tf.float16.as_datatype_enum, tf.float32.as_datatype_enum):
            value = tf.make_ndarray(node.attr["value"].tensor)
            if value.ndim == 4:
                value = random.normal(0, np.sqrt(2 / np.prod(value.shape[:3])), value.shape).astype(value.dtype)
            elif value.ndim == 1:
                value = np.zeros_like(value)
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    path.write_bytes(graph.SerializeToString())


def load(graph: Path, cache: Path) -> list[retrain.LiteModel]:
    """Return the network of a graph as one interpreter of one thread for each core."""
    model = retrain.load_base_model(graph, cache)
    return [retrain.LiteModel(model.lite_path) for _ in range(retrain.core_count())]


def speed(run: list[retrain.LiteModel], seconds: float) -> float:
    """Return how many images a second the networks take, all cores at work, from resized pixels to features."""
    pixels = np.random.default_rng(0).uniform(0, 255, (*run[0].input_size, 3)).astype(np.float32)

    def until(network: retrain.LiteModel, end: float) -> int:
        count = 0
        while time.perf_counter() < end:
            network(pixels)
            count += 1
        return count

    for network in run:
        network(pixels)
    start = time.perf_counter()
    workers = [lambda end, network=network: until(network, end) for network in run]
    counts = retrain.on_all_cores(workers, [start + seconds] * len(run))
    return sum(count for _, count in counts) / (time.perf_counter() - start)


def parse_flags() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = retrain.Parser(prog="probe.py", description="Examine a base model with linear probes.")
    parser.add_argument("--teacher", type=Path, required=True, help="the graph of Inception-v3")
    parser.add_argument("--starter", type=Path, required=True, help="the graph to examine")
    parser.add_argument("--photos", type=Path, required=True, help="a folder with ants_bees, cats_dogs, flowers_small")
    flags = parser.parse_args()
    for name in ("teacher", "starter"):
        if not getattr(flags, name).is_file():
            parser.error(f"--{name} {getattr(flags, name)}: there is no such file")
    return flags


def main() -> int:
    """Print the table, in Markdown, and the speeds; return the exit code."""
    flags = parse_flags()
    sets = list_photographs(flags.photos)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        random_starter(flags.starter, scratch / "random.pb")
        starter, teacher = load(flags.starter, scratch), load(flags.teacher, scratch)
        rows = {
            "raw pixels, 32x32": ([np.ravel] * retrain.core_count(), RAW_SIZE),
            "random network of the starter's shape": (load(scratch / "random.pb", scratch), starter[0].input_size),
            "**starter**": (starter, starter[0].input_size),
            "Inception-v3": (teacher, teacher[0].input_size),
        }
        print("| features | " + " | ".join(sets) + " |\n| --- |" + " --- |" * len(sets))
        for row, (run, size) in rows.items():
            scores = []
            for paths, trainings in sets.values():
                classes = np.unique([path.parent.name for path in paths], return_inverse=True)[1]
                features = extract(paths, run, size)
                right = np.concatenate([probe(features, classes, training) for training in trainings])
                scores.append(f"{right.mean():.1%}")
            print(f"| {row} | " + " | ".join(scores) + " |", flush=True)
        rates = np.median([(speed(starter, 2), speed(teacher, 4)) for _ in range(3)], axis=0)
    parts = [
        f"{name} {np.mean([t.sum() for t in trainings]):.0f} and {sum((~t).sum() for t in trainings)}"
        for name, (_, trainings) in sets.items()
    ]
    print(f"\nPhotographs that a probe is trained on, and that are tested: {', '.join(parts)}.")
    print(
        f"Images per second, {retrain.core_count()} threads, network alone: starter {rates[0]:.0f}, Inception-v3 "
        f"{rates[1]:.1f}; {rates[0] / rates[1]:.1f} times as many."
    )
    return 0


if __name__ == "__main__":
    sys.exit(retrain.exit_code("probe.py", main))
