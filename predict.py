#!/usr/bin/env python3
"""Name new pictures with what retrain.py has trained.

    python predict.py --image photo.jpg holiday/ 'more/*.png'

Beside output_graph.pb lies output_graph.tflite, the same network for LiteRT, which needs no TensorFlow and starts in a
second. A graph that stands alone, ours or one of the classic script's, is run by TensorFlow. All flags: --help.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retrain import (
    BOTTLENECK_NODE,
    JPEG_NODE,
    RESIZED_NODE,
    Familiar,
    ImageError,
    LiteModel,
    OutputFiles,
    Parser,
    Reading,
    UserError,
    add_flag,
    check_lite,
    check_writable,
    core_count,
    end_process,
    exit_code,
    fold_batch_norm,
    graph_input_size,
    import_tensorflow,
    is_hidden,
    number,
    on_all_cores,
    printable,
    read_graph,
    read_image,
    resize_bilinear,
    sha256_of,
    switch,
    telling_of_damage,
    whole_file,
)

if TYPE_CHECKING:  # only to name them
    import numpy as np
    from tensorflow import Tensor

# A function from a picture's path to its scores, float32 [labels], and its bottleneck, float32 [n], or None where that
# can't be had. It raises ImageError.
Scorer = Callable[[Path], tuple]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier: its labels, a function for each picture that can be done at a time, what is familiar to it.

    familiar: None for a graph that has no measure of that.
    """

    labels: list[str]
    workers: list[Scorer]
    familiar: Familiar | None = None

    def unsure(self, scores: np.ndarray, bottleneck: np.ndarray | None) -> bool:
        """Tell whether a picture is not to be named, since it is unlike those of the training, or no score is high.

        scores: float32 [classes]; bottleneck: float32 [n]. Raises UserError if `familiar` is of another base model.
        """
        if self.familiar is None or bottleneck is None:
            return False
        if len(bottleneck) != self.familiar.exemplars.shape[1]:
            raise UserError("The .json beside the graph is damaged (its measure of what is familiar is another's).")
        return bool(self.familiar.unsure(bottleneck[None], scores[None])[0])


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one picture was taken for: (label, score), best first, and with what doubt; or why it could not be read."""

    path: Path
    scores: list[tuple[str, float]]
    error: str = ""
    unsure: bool = False


def load_classifier(graph: str, labels: str, pictures: int, cpu_threads: int = 0, trusted: bool = False) -> Classifier:
    """Return the classifier of a graph (or .tflite) file and a labels file, for so many pictures; 0 is all cores.

    trusted: whether the graph may hold operations that do other things than compute. Raises UserError for one that does
    though it may not, and for files that are missing or don't fit together.
    """
    files = OutputFiles.of(graph)
    names = read_labels(Path(labels))
    facts = read_facts(files)
    if not facts and not files.graph.is_file():
        raise UserError(f"--graph {files.lite}: the .json that belongs to it is not beside it, or is another graph's.")
    reading = Reading(facts.get("ignore_exif_orientation", False), facts.get("exact_decode", False))
    cores = min(core_count(), cpu_threads or core_count())
    workers = (
        lite_workers(files.lite, reading, pictures, cores)
        if facts.get("lite_is_whole")
        else [graph_worker(files.graph, reading, trusted)]
    )
    if facts and len(facts["labels"]) != len(names):
        raise UserError(
            f"--labels {labels}: it has {len(names)} lines for the {len(facts['labels'])} classes of the graph."
        )
    if facts and facts["labels"] != names:
        print(f"predict.py: {labels} holds other names than the training wrote; they are used.", file=sys.stderr)
    try:
        familiar = Familiar.from_facts(facts["familiar"]) if facts.get("familiar") else None
    except ValueError as error:
        raise UserError(f"{files.facts} is damaged ({error}); train again, or remove it.") from error
    return Classifier(names, workers, familiar)


def read_labels(path: Path) -> list[str]:
    """Return the labels of a file, a line each. Raises UserError if there is no such file."""
    try:
        return [line.rstrip("\r\n") for line in path.read_text("utf-8").split("\n") if line.rstrip("\r\n")]
    except OSError as error:
        raise UserError(f"--labels {path}: {error.strerror}; train first with retrain.sh, or name the file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {path}: it is no text in UTF-8; name the right file.") from error


def read_facts(files: OutputFiles) -> dict:
    """Return what retrain.py noted about the graph, or {} if that is another graph's.

    `lite_is_whole` tells whether the .tflite beside it is there, and the graph's. Raises UserError without a graph.
    """
    if not files.graph.is_file() and not files.lite.is_file():
        raise UserError(f"--graph {files.graph}: there is no such file; train first with retrain.sh, or name the file.")
    try:
        facts = json.loads(files.facts.read_text("utf-8"))
        tied = not files.graph.is_file() or facts["graph_sha256"] == sha256_of(files.graph)
        facts["lite_is_whole"] = files.lite.is_file() and facts["lite_sha256"] == sha256_of(files.lite)
        usable = files.graph.is_file() or facts["lite_is_whole"]
        return facts if tied and usable and isinstance(facts["labels"], list) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def lite_workers(path: Path, reading: Reading, pictures: int, cores: int) -> list[Scorer]:
    """Return functions from a picture to its scores by LiteRT: one of all cores for one picture, else one per core."""
    check_lite(path)
    models = [LiteModel(path, cores)] if pictures == 1 else [LiteModel(path) for _ in range(min(cores, pictures))]
    for model in models:  # now, since it silences stderr, where pictures that can't be read will be told
        model.prepare()

    def score(model: LiteModel, path: Path) -> tuple:
        scores, *bottleneck = model.run(resize_bilinear(read_image(path, reading, model.input_size), model.input_size))
        return scores, bottleneck[0] if bottleneck else None

    return [functools.partial(score, model) for model in models]


def graph_worker(path: Path, reading: Reading, trusted: bool = False) -> Scorer:
    """Return a function from a picture to its scores by TensorFlow, for a graph of ours or of the classic script's.

    Raises UserError for another kind of graph.
    """
    tf = import_tensorflow()
    graph = read_graph(path, trusted)
    used = {name.split(":")[0] for node in graph.node for name in node.input}
    outputs = [node.name for node in graph.node if node.op == "Softmax" and node.name not in used]
    if not outputs or not {JPEG_NODE, RESIZED_NODE} <= {node.name for node in graph.node}:
        raise UserError(f"--graph {path}: it is no graph of retrain.py's kind, from {JPEG_NODE!r} to a softmax layer.")
    with telling_of_damage(path):
        graph = fold_batch_norm(
            graph
        )  # in the classic script's it is an op that only TensorFlow 1's sessions still run

    wanted = [f"{outputs[-1]}:0", *(f"{node.name}:0" for node in graph.node if node.name == BOTTLENECK_NODE)]

    def imported(pixels: Tensor) -> list[Tensor]:
        return tf.import_graph_def(graph, {f"{JPEG_NODE}:0": pixels}, wanted, name="")

    # Fed behind its decoder, the graph sees the pictures as training saw them: all formats, upright.
    run = tf.compat.v1.wrap_function(imported, [tf.TensorSpec([None, None, 3], tf.uint8)])
    size = graph_input_size(graph)

    def score(path: Path) -> tuple:
        scores, *bottleneck = (value.numpy() for value in run(tf.constant(read_image(path, reading, size))))
        return scores[0], bottleneck[0].reshape(-1) if bottleneck else None

    return score


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Return the files that the arguments of --image name: files, folders (with those in them) and globs.

    What names nothing is returned as it is, to be told like a picture that can't be read, if others are found. Raises
    UserError if nothing is found at all.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        files = [file for match in matches for file in (files_below(match) if match.is_dir() else [match])]
        found += files or [path]
    if not any(path.is_file() for path in found):
        fault = "there is no such picture"
        if any(Path(pattern).is_dir() for pattern in patterns):
            fault = "there is no file in that folder, nor in those in it (links are not followed)"
        elif len(patterns) > 1:
            fault += "; put a name that has spaces into quotes"
        raise UserError(f"--image {', '.join(patterns)}: {fault}.")
    return list(dict.fromkeys(found))


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and the folders in it, by name; hidden ones are not read."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [path for path in (Path(where, name) for name in sorted(names)) if not is_hidden(path)]
    return found


def predict(classifier: Classifier, paths: Sequence[Path]) -> Iterator[Prediction]:
    """Yield what each picture is taken for, in the order of `paths`.

    Raises UserError if the graph gives another number of scores than there are labels.
    """

    def attempt(worker: Scorer, path: Path) -> Prediction:
        if not path.is_file():
            return Prediction(path, [], "there is no such picture, or none in that folder")
        try:
            scores, bottleneck = worker(path)
        except ImageError as error:
            return Prediction(path, [], str(error))
        if len(scores) != len(classifier.labels):
            raise UserError(f"The graph has {len(scores)} classes but --labels names {len(classifier.labels)}.")
        best_first = sorted(zip(classifier.labels, map(float, scores), strict=True), key=lambda pair: -pair[1])
        return Prediction(path, best_first, unsure=classifier.unsure(scores, bottleneck))

    workers = [lambda path, worker=worker: attempt(worker, path) for worker in classifier.workers]
    done: dict[Path, Prediction] = {}
    waiting = iter(paths)
    next_path = next(waiting, None)
    for path, prediction in on_all_cores(workers, paths):
        done[path] = prediction
        while next_path in done:
            yield done.pop(next_path)
            next_path = next(waiting, None)


def print_prediction(prediction: Prediction, top_k: int, headed: bool) -> None:
    """Print the classic lines of one picture, best first, under its name if there are several; or its line of error."""
    if prediction.error:
        print(f"predict.py: error: {printable(prediction.path)}: {prediction.error}", file=sys.stderr)
        return
    if headed:
        print(printable(prediction.path))
    if prediction.unsure:
        print("unsure: it is unlike the pictures of the training, or between the classes; the best guesses are")
    for label, score in prediction.scores[:top_k]:
        print(f"{printable(label)} (score = {score:.5f})")
    if headed:
        print(flush=True)


def as_text(path: Path) -> str:
    """Return a path as it is, but for bytes that are no text, which a file in UTF-8 can't hold."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def harmless(cell: str) -> str:
    """Return a cell of a table with an apostrophe before what a spreadsheet would take for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def write_csv(path: Path, predictions: Sequence[Prediction], labels: Sequence[str]) -> None:
    """Write a row per picture: its name, best label and score, error if any, every class's score, and any doubt.

    What could be a formula gets an apostrophe before it.
    """
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(harmless, ["image", "label", "score", "error", *labels, "unsure"]))
        for prediction in predictions:
            scores = {label: f"{score:.6f}" for label, score in prediction.scores}
            best = next(iter(scores.items()), ("", ""))
            cells = [*best, prediction.error, *(scores.get(name, "") for name in labels)]
            doubt = "unsure" if prediction.unsure else ""
            writer.writerow(map(harmless, [as_text(prediction.path), *cells, doubt]))


def write_json(path: Path, predictions: Sequence[Prediction], top_k: int) -> None:
    """Write a list with an object per picture: image, predictions (label and score, best first), unsure, error."""
    entries = [
        {
            "image": as_text(prediction.path),
            "predictions": [{"label": label, "score": score} for label, score in prediction.scores[:top_k]],
            "unsure": prediction.unsure,
            "error": prediction.error or None,
        }
        for prediction in predictions
    ]
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", "utf-8")


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(
        prog="predict.py", allow_abbrev=False, description="Name pictures with what retrain.py has trained."
    )
    pictures = "files, folders, globs (test_images)"
    parser.add_argument("pictures", nargs="*", metavar="FILE", help="the same as --image")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help=pictures)
    add_flag(parser, "--graph", "output_graph.pb", str, "FILE", "the trained graph, .pb or .tflite")
    add_flag(parser, "--labels", "output_labels.txt", str, "FILE", "its classes")
    add_flag(parser, "--trust_model", False, switch, "BOOL", "run the graph whatever it does: a graph is a program")
    add_flag(parser, "--top_k", 5, number(int, 1), "N", "how many classes to print for each picture")
    add_flag(parser, "--cpu_threads", 0, number(int, 1, also=[0]), "N", "how many cores to use; 0 for all")
    add_flag(parser, "--csv", "", str, "FILE", "also write a table, a row per picture")
    add_flag(parser, "--json", "", str, "FILE", "also write a list, an object per picture")
    return parser.parse_args(arguments)


def run(flags: argparse.Namespace) -> int:
    """Name the pictures; return 1 if one of them could not be read, else 0."""
    for name in ("csv", "json"):
        if getattr(flags, name):
            check_writable(name, Path(getattr(flags, name)), is_folder=False)
    paths = find_images(flags.pictures + flags.image or ["test_images"])
    classifier = load_classifier(flags.graph, flags.labels, len(paths), flags.cpu_threads, flags.trust_model)
    predictions = []
    for prediction in predict(classifier, paths):
        print_prediction(prediction, flags.top_k, headed=len(paths) > 1)
        predictions.append(prediction)
    if flags.csv:
        write_csv(Path(flags.csv), predictions, classifier.labels)
    if flags.json:
        write_json(Path(flags.json), predictions, flags.top_k)
    return int(any(prediction.error for prediction in predictions))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    flags = parse_flags(arguments)
    return exit_code("predict.py", lambda: run(flags))


if __name__ == "__main__":
    end_process(main())
