#!/usr/bin/env python3
"""Name images with what retrain.py has trained.

  python3 predict.py photo.jpg                           what is it?
  python3 predict.py holiday --csv holiday.csv           a whole folder, into a table
  python3 predict.py holiday --sort_into sorted          copies in a folder for each class

LiteRT runs output_graph.tflite, which lies beside output_graph.pb; a graph that stands alone is run by TensorFlow.
"""
# This file needs none of the project's others, and numpy, Pillow, simplejpeg and ai-edge-litert only.

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import csv
import glob
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

# Where every default lies, wherever the scripts are started from.
HOME = Path(os.environ.get("RETRAIN_HOME") or Path(__file__).resolve().parent)
INSTALL = ('"{}"' if " " in sys.executable else "{}").format(sys.executable) + " -m pip install"

try:
    import numpy as np
    import PIL.Image
    import PIL.ImageOps
    import simplejpeg
except ImportError as missing:
    if Path(sys.argv[0]).name not in ("retrain.py", "predict.py"):
        raise
    # retrain.sh installs into .venv: go on with the Python that lies there.
    environment = Path(__file__).resolve().with_name(".venv")
    own_python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if Path(sys.prefix) == environment or not own_python.exists():
        remedy = f"run retrain.sh (retrain.bat), or {INSTALL} numpy pillow simplejpeg ai-edge-litert"
        sys.exit(f"{missing}: {remedy}; if that does not help, remove {environment} first")
    if os.name == "nt":
        sys.exit(subprocess.call([own_python, *sys.argv]))
    os.execv(own_python, [str(own_python), *sys.argv])

# None: there is none. Else pandas, which TensorFlow and gradio load, takes our folder for the package.
sys.modules.setdefault("bottleneck", None)  # type: ignore[arg-type]

# ======================================================================================================================
# Common ground: errors, whole files, all cores
# ======================================================================================================================

Array = np.ndarray


class UserError(Exception):
    """Something the user can put right: a sentence that names the file or flag and what to do."""


class ImageError(Exception):
    """An image that can't be used, and why, in a few words."""


def exit_code(program: str, work: Callable[[], int | None]) -> int:
    """Do the work of a program and return its exit code, after a sentence on stderr about whatever stopped it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # a label may have letters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 1
    try:
        done = work() or 0
        print(end="", flush=True)  # while there are still words for what goes wrong
        return done
    except BrokenPipeError:  # whoever reads it, `head` for one, has seen enough
        return 141
    except KeyboardInterrupt:
        code = 130
        message = "stopped; what is done is kept."
    except (UserError, MemoryError) as error:
        message = f"error: {str(error) or 'there is not enough memory'}"
    except OSError as error:
        message = f"error: {error.filename or 'the system'}: {error.strerror or error}."
    except ImportError as error:
        message = f"error: {error}; install it with: {INSTALL} {error.name}, or all with -r requirements.txt"
    print(f"{program}: {printable(message)}", file=sys.stderr)
    return code


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path, which gets the name `path` when the block ends well. Raises UserError if it can't."""
    target = Path(path).resolve()  # a link stays one, to the new file
    temporary = target.with_name(f".retrain-{os.urandom(16).hex()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def core_count(at_most: int = 0) -> int:
    """Return how many cores this process may use, but at most so many, if any."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on Windows and macOS
        cores = len(os.sched_getaffinity(0))
    return min(cores, at_most) if at_most > 0 else cores


def on_all_cores(workers: Sequence[Callable], items: Sequence) -> Iterator:
    """Yield the results for items, in their order; a worker is a function of one item, for one thread at a time."""
    idle = list(workers)
    thread = threading.local()

    def begin() -> None:
        thread.work = idle.pop()

    with concurrent.futures.ThreadPoolExecutor(len(workers), initializer=begin) as pool:
        yield from pool.map(lambda item: thread.work(item), items)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):  # twice as fast as the whole at once
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what native code prints off stderr, where TensorFlow and LiteRT announce themselves."""
    with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(2), "w") as stderr:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), 2)


def import_tensorflow() -> Any:
    """Import TensorFlow, which takes seconds, without its start-up messages."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with quiet_stderr():
        import tensorflow
    tensorflow.get_logger().setLevel("ERROR")
    return tensorflow


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".:") or type(error).__name__


def printable(text: object) -> str:
    """Return a path, or other text, with control characters and undecodable bytes escaped."""
    odd = r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(odd, lambda found: found[0].encode("unicode_escape").decode(), str(text))


def at_home(name: str) -> str:
    return name if Path.cwd() == HOME else str(HOME / name)


# ======================================================================================================================
# Images: read, decoded, upright, resized
# ======================================================================================================================

FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"]
with suppress(ImportError):  # for HEIC
    import pi_heif

    pi_heif.register_heif_opener()
    FORMATS.insert(0, "HEIF")
MOST_BYTES = 150_000_000
PIL.Image.MAX_IMAGE_PIXELS = 101_000_000  # Pillow refuses more than twice as many; phones take 201 million
warnings.filterwarnings("ignore", module="PIL")  # of large images and broken EXIF blocks
NOT_IMAGES = {"thumbs.db", "desktop.ini", "crawl.jsonl"}  # of operating systems, and of --crawl
# Raw photographs hold a small preview, which a reader of TIFF takes for the image.
RAW_NAMES = (".dng", ".nef", ".nrw", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")


@dataclass(frozen=True)
class Reading:
    ignore_exif_orientation: bool = False
    exact_decode: bool = False  # of very large photographs, too


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in NOT_IMAGES


def label_of(folder: str) -> str:
    """Return a folder's label: its name in lower case, every run of other than letters and digits as one space."""
    # Marks, too, are parts of letters in many alphabets: L, M and N.
    letters = (letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folder.lower())
    return re.sub(" +", " ", "".join(letters))


def read_bytes(path: Any) -> bytes:
    """Return the content of a file. Raises ImageError for one that can't be read."""
    if path.name.lower().endswith(RAW_NAMES):
        raise ImageError("a raw photograph, which is not read; save it as JPEG")
    try:
        if path.stat().st_size > MOST_BYTES:  # films and archives, too, lie in folders of images
            raise ImageError(f"larger than {MOST_BYTES // 10**6} MB, as no honest image is")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"it can't be read ({error.strerror})") from None


def read_image(path: Any, reading: Reading, input_size: tuple[int, int]) -> Array:
    """Return the uint8 pixels [height, width, 3] of a file. Raises ImageError."""
    return decode_image(read_bytes(path), reading, input_size)


def decode_image(data: bytes, reading: Reading, input_size: tuple[int, int]) -> Array:
    """Return the uint8 pixels [height, width, 3] of an image, of its first frame. Raises ImageError.

    A JPEG of more than four times the network's input is decoded at 1/2, 1/4 or 1/8, at least twice the input on its
    shorter side. As in TensorFlow, 16-bit values keep their upper byte, and transparency is dropped, not blended.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format in ("JPEG", "MPO"):
            scale, shorter = 1, min(image.size)
            if shorter > 4 * max(input_size) and not reading.exact_decode:
                scale = next(scale for scale in (8, 4, 2) if shorter / scale >= 2 * max(input_size))
            pixels = decode_jpeg(data, image, scale)
        elif image.mode.startswith("I"):
            grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
            pixels = np.dstack([grey, grey, grey])
        else:
            pixels = np.asarray(image.convert("RGB"))
    except PIL.UnidentifiedImageError:
        told = "not an image in JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC format"
        remedy = "" if "HEIF" in FORMATS else f"; HEIC needs pi-heif: {INSTALL} pi-heif"
        raise ImageError(told + remedy) from None
    except PIL.Image.DecompressionBombError:
        raise ImageError("more pixels than any honest image has") from None
    except Exception as error:  # decoders raise many kinds of errors on damaged data
        if "truncated" in str(error).lower():
            raise ImageError("the file is truncated") from None
        raise ImageError(f"it can't be decoded ({first_line(error)})") from None
    if not reading.ignore_exif_orientation:
        with suppress(Exception):  # a broken EXIF block is no reason to lose the image
            orientation = image.getexif().get(0x0112, 1)  # Pillow has turned TIFF and HEIC already
            if orientation != 1:
                turned = PIL.Image.fromarray(pixels)
                turned.getexif()[0x0112] = orientation
                pixels = np.asarray(PIL.ImageOps.exif_transpose(turned))
    return pixels


def decode_jpeg(data: bytes, image: PIL.Image.Image, scale: int) -> Array:
    """Return the uint8 pixels [height, width, 3] of a JPEG at 1/scale (1, 2, 4, 8), as TensorFlow's DecodeJpeg does.

    That uses libjpeg-turbo's fast DCT, which Pillow can't: simplejpeg's pixels are the same to the bit.
    """
    height, width = image.height // scale, image.width // scale
    space = "CMYK" if image.mode == "CMYK" else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(data, space, fastdct=True, min_height=height, min_width=width)
    except ValueError:  # Pillow forgives blemishes, and is a few levels off
        image.draft("RGB", (width, height))
        return np.asarray(image.convert("RGB"))
    if space == "CMYK":
        inks = pixels.astype(np.uint16)
        if "adobe" not in image.info:  # Adobe's own files hold the inks inverted, 255 for none
            inks = 255 - inks
        pixels = (inks[:, :, :3] * inks[:, :, 3:] // 255).astype(np.uint8)
    return pixels


def resize_bilinear(pixels: Array, size: tuple[int, int]) -> Array:
    """Return uint8 pixels [height, width, 3] resized to float32 [*size, 3], values in [0, 255].

    As TensorFlow 1's ResizeBilinear with align_corners false: the source of output x is x * scale.
    """
    height, width, _ = pixels.shape

    def neighbours(source: int, target: int, values: int) -> tuple[Array, Array, Array]:
        place = np.arange(target, dtype=np.float32) * np.float32(source / target)
        low = place.astype(int)
        both = np.stack([low, np.minimum(low + 1, source - 1)])
        first, second = (both[..., None] * values + np.arange(values)).reshape(2, -1)
        return first, second, np.repeat(place % 1, values)

    def between(start: Array, end: Array, share: Array) -> Array:
        end -= start  # in place: more memory would be given back and asked for again
        end *= share
        end += start
        return end

    def lines(rows: Array) -> Array:
        picked = pixels.reshape(height, width * 3)[rows]
        start, end = (picked[:, columns].astype(np.float32) for columns in (left, right))
        return between(start, end, across)

    top, bottom, down = neighbours(height, size[0], 1)
    left, right, across = neighbours(width, size[1], 3)  # by value: faster than by pixel
    return between(lines(top), lines(bottom), down[:, None]).reshape(*size, 3)


# ======================================================================================================================
# The classifier: a graph for LiteRT or TensorFlow, its labels, and what it is familiar with
# ======================================================================================================================

RESIZED_NODE, BOTTLENECK_NODE = "ResizeBilinear", "pool_3/_reshape"

# A graph is a program: it could read and write files, or call Python. One of somebody else's may hold only these
# operations, of image networks, which compute. They were picked by hand: TensorFlow calls even ReadFile stateless.
PURE_OPS = """
Abs Add AddN AddV2 All ArgMax Assert AvgPool BatchMatMul BatchMatMulV2 BatchNormWithGlobalNormalization BatchToSpaceND
BiasAdd BroadcastTo Cast CheckNumerics ClipByValue Concat ConcatV2 Const Conv2D DecodeJpeg DepthToSpace
DepthwiseConv2dNative Div Einsum Elu EnsureShape Equal Erf Erfc Exp ExpandDims ExtractImagePatches
FakeQuantWithMinMaxVars FakeQuantWithMinMaxVarsPerChannel Fill Floor FloorDiv FloorMod FusedBatchNorm FusedBatchNormV2
FusedBatchNormV3 Gather GatherNd GatherV2 Greater GreaterEqual Identity IdentityN If L2Loss LRN LeakyRelu Less LessEqual
LogicalAnd LogicalNot MatMul Max MaxPool Maximum Mean Merge Min Minimum MirrorPad Mul Neg NoOp NotEqual OnesLike Pack
Pad PadV2 PartitionedCall Placeholder PlaceholderWithDefault Pow Prod RandomUniform Range Rank RealDiv Relu Relu6
Reshape ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor Roll Rsqrt Select SelectV2 Shape ShapeN Sigmoid
Slice Softmax Softplus SpaceToBatchND SpaceToDepth Split SplitV Sqrt Square SquaredDifference Squeeze
StatefulPartitionedCall StatelessIf StatelessRandomGetKeyCounter StatelessRandomUniformV2 StopGradient StridedSlice Sub
Sum Switch Tanh Tile Transpose TruncatedNormal Unpack ZerosLike
"""


@contextmanager
def telling_of_damage(path: Path, fault: str = "a damaged graph") -> Iterator[None]:
    """Turn whatever comes of a file's content that is not as it must be into a UserError."""
    try:
        yield
    except Exception as error:  # of TensorFlow, of protobuf
        raise UserError(f"{path} is {fault} ({first_line(error)}).") from error


class LiteModel:
    """A .tflite network, for one thread at a time: from pixels float32 [*input_size, 3] to a list of float32 [n]."""

    def __init__(self, path: Path, threads: int = 1):
        from ai_edge_litert.interpreter import Interpreter

        with telling_of_damage(path, "no model that LiteRT can run"), quiet_stderr():
            self.interpreter = Interpreter(str(path), num_threads=threads)
            self.interpreter.allocate_tensors()
        (self.input,) = self.interpreter.get_input_details()
        self.outputs = self.interpreter.get_output_details()
        self.input_size = tuple(self.input["shape"][1:3].tolist())

    def __call__(self, pixels: Array) -> list[Array]:
        self.interpreter.set_tensor(self.input["index"], pixels[None])
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(output["index"])[0] for output in self.outputs]


def check_ops(graph: Any, path: Path, also: str = "") -> None:
    """Raise UserError if a GraphDef, or a function in it, holds an operation that is neither in PURE_OPS nor `also`."""
    from tensorflow.python.framework import op_def_registry

    nodes = list(graph.node)
    allowed = {*PURE_OPS.split(), *also.split()}
    for function in graph.library.function:  # which a node may call, unless it goes by an operation's name
        nodes += function.node_def
        if op_def_registry.get(function.signature.name) is None:
            allowed.add(function.signature.name)
    for node in nodes:
        if node.op not in allowed:
            told = f"its node {node.name!r} is a {node.op}, which may do more than compute, such as write your files"
            raise UserError(f"{path}: {told}; if you trust whoever made it, add --trust_model.")


def read_graph(path: Path, trusted: bool = False) -> Any:
    """Return the GraphDef of a file. Raises UserError for none, and, unless trusted, for one that may do harm."""
    graph = import_tensorflow().compat.v1.GraphDef()
    with telling_of_damage(path, "no TensorFlow graph, or not a whole one"):
        graph.ParseFromString(path.read_bytes())
    if not trusted:
        check_ops(graph, path)
    return graph


class GraphModel:
    """A trained graph of ours or of the classic script's, run by TensorFlow as a LiteModel is by LiteRT."""

    def __init__(self, path: Path, trusted: bool):
        graph = read_graph(path, trusted)
        tf = import_tensorflow()
        with telling_of_damage(path, f"no graph of retrain.py's kind, from {RESIZED_NODE!r} to a softmax"):
            softmax = [node.name for node in graph.node if node.op == "Softmax"][-1]
            with tf.Graph().as_default() as imported:
                tf.import_graph_def(graph, name="")
            names = RESIZED_NODE, softmax, BOTTLENECK_NODE
            self.input, *self.outputs = (imported.get_tensor_by_name(f"{name}:0") for name in names)
            self.input_size = tuple(self.input.shape[1:3])
        self.session = tf.compat.v1.Session(graph=imported)

    def __call__(self, pixels: Array) -> list[Array]:
        return [output[0] for output in self.session.run(self.outputs, {self.input: pixels[None]})]


class OutputFiles:
    """Where a graph, x.pb, and what belongs to it lie: the same for LiteRT, x.tflite, and x.json, which ties them."""

    def __init__(self, graph: str | Path):
        stem = str(Path(graph)).removesuffix(".pb").removesuffix(".tflite")
        self.graph = Path(f"{stem}.pb" if str(graph).endswith(".tflite") else graph)
        self.lite = Path(f"{stem}.tflite")
        self.facts = Path(f"{stem}.json")
        stem = stem.removesuffix("_graph")  # output_labels.txt, but ants_labels.txt for ants.pb
        self.labels = Path(f"{stem}_labels.txt")
        self.report = Path(f"{stem}_report.html")

    def read_facts(self) -> dict:
        """Return what retrain.py noted about the graph, or {} if that is another's."""
        try:
            facts = json.loads(self.facts.read_text("utf-8"))
            known = facts["graph_sha256"], facts["lite_sha256"]
            return facts if sha256_of(self.graph if self.graph.is_file() else self.lite) in known else {}
        except Exception:  # there is no such file, or one that is none of ours
            return {}


def unit(features: Array) -> Array:
    """Return vectors [..., n] brought to length 1."""
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Familiar:
    """What tells an image like those of the training from another, as output_graph.json holds it."""

    least_score: float
    least_similarity: float  # cosine with an exemplar: the middle of a cluster of the training's features
    exemplars_shape: Sequence[int]  # [k, n]
    exemplars_float16: str  # in base64
    coverage: float  # the share of right answers that these limits leave

    @cached_property
    def exemplars(self) -> Array:
        values = np.frombuffer(base64.b64decode(self.exemplars_float16), np.float16)
        return values.reshape(self.exemplars_shape).astype(np.float32)

    def likeness(self, features: Array) -> Array:
        """Return the greatest cosine with an exemplar, float32 [...], of features [..., n]."""
        return (unit(features) @ self.exemplars.T).max(axis=-1)

    def reason(self, likeness: float, scores: Sequence[tuple[str, float]]) -> str:
        """Tell why an image of this likeness and these (label, score), best first, is not to be named; "" if it is."""
        if likeness < self.least_similarity:
            return "unlike the training images"
        if scores[0][1] < self.least_score:
            return f"between {scores[0][0]} and {scores[1][0]}"
        return ""


class Classifier:
    """A trained classifier: its labels, how images are read for it, and as many models as run at the same time.

    A model is a function from pixels float32 [*input_size, 3] to [probabilities float32 [classes], features [n]].
    """

    def __init__(self, graph: str, labels: str = "", images: int = 99, cores: int = 0, trust: bool = False):
        """Open a graph (or .tflite) for so many images; labels: a file in place of those of the training, or ""."""
        files = OutputFiles(graph)
        facts = files.read_facts()
        names = Path(labels or files.labels)
        if not facts and not (files.graph.is_file() and names.is_file()):
            needed = f"there is no such file, or neither {files.facts} nor {names} that belongs to it"
            raise UserError(f"--graph {graph}: {needed}; train first with retrain.sh.")
        self.labels: list[str] = facts.get("labels", [])
        if labels or not facts:
            self.labels = [line for line in names.read_text("utf-8-sig", "replace").splitlines() if line]
        self.reading = Reading(facts.get("ignore_exif_orientation", False), facts.get("exact_decode", False))
        self.familiar = Familiar(**facts["familiar"]) if facts.get("familiar") else None
        if files.lite.is_file() and facts.get("lite_sha256") == sha256_of(files.lite):
            cores = core_count(cores)
            count = min(cores, images)
            self.models: list = [LiteModel(files.lite, cores // count) for _ in range(count)]
        else:
            self.models = [GraphModel(files.graph, trust)]
        self.input_size = self.models[0].input_size


# ======================================================================================================================
# Predictions: for files and folders, as text and tables, into folders, on a page
# ======================================================================================================================


@dataclass(frozen=True)
class Prediction:
    """What one image was taken for, "unsure" with its reason, or "not read" with the error."""

    path: Path
    outcome: str
    scores: list[tuple[str, float]]  # of all labels, best first
    error: str = ""
    reason: str = ""
    likeness: float | None = None  # to the training's images, at most 1


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Return the files that the arguments of --image name, and what names nothing. Raises UserError if nothing does."""
    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        for match in map(Path, matches or [pattern]):
            if not match.is_dir():
                found.append(match)
            for path in sorted(match.rglob("*")):
                inside = path.relative_to(match).parts
                if path.is_file() and not any(map(is_hidden, inside)):
                    found.append(path)
    if not any(path.is_file() for path in found):
        fault = "there is no such image, nor a folder with any; put a name that has spaces into quotes"
        raise UserError(f"--image {', '.join(patterns)}: {fault}.")
    return list(dict.fromkeys(found))


def predict(classifier: Classifier, paths: Sequence[Path]) -> Iterator[Prediction]:
    """Yield what each image is taken for, in the order of `paths`. Raises UserError if the labels are too few."""
    labels = classifier.labels

    def name(model: Callable, path: Path) -> Prediction:
        try:
            pixels = read_image(path, classifier.reading, classifier.input_size)
        except ImageError as error:
            return Prediction(path, "not read", [], str(error))
        probabilities, *features = model(resize_bilinear(pixels, classifier.input_size))
        count = len(probabilities)
        if len(labels) != count:
            raise UserError(f"--labels: there are {len(labels)} for the {count} classes of the graph.")
        rounded = [round(score, 6) for score in probabilities.tolist()]
        scores = sorted(zip(labels, rounded), key=lambda pair: -pair[1])
        if not classifier.familiar:
            return Prediction(path, scores[0][0], scores)
        likeness = float(classifier.familiar.likeness(features[0]))
        reason = classifier.familiar.reason(likeness, scores)
        outcome = "unsure" if reason else scores[0][0]
        return Prediction(path, outcome, scores, "", reason, min(1.0, round(likeness, 6)))

    return on_all_cores([partial(name, model) for model in classifier.models], paths)


def print_prediction(prediction: Prediction, top_k: int, headed: bool) -> None:
    """Print the classic lines of one image, best first, under its name if there are several; or its line of error."""
    if prediction.error:
        print(f"predict.py: error: {printable(prediction.path)}: {prediction.error}", file=sys.stderr)
        return
    lines = [str(prediction.path)] if headed else []
    if prediction.reason:
        lines.append(f"unsure: {prediction.reason}; the best guesses are")
    lines += [f"{label} (score = {score:.5f})" for label, score in prediction.scores[:top_k]]
    print(*map(printable, lines), sep="\n", end="\n\n" if headed else "\n", flush=True)


def print_summary(predictions: Sequence[Prediction], labels: Sequence[str]) -> None:
    """Print how many images were taken for each class, and how many rightly where folders are named like classes."""
    counts = Counter(each.outcome for each in predictions).most_common()
    told = ", ".join(f"{printable(outcome)} {count:,}" for outcome, count in counts)
    print(f"{len(predictions):,} images: {told}.")
    classes = {label_of(label) for label in labels}
    right = []
    for each in predictions:
        folder = label_of(each.path.absolute().parent.name)
        if each.scores and folder in classes:
            right.append(folder == label_of(each.scores[0][0]))
    if right:
        print(f"Accuracy on the {len(right):,} in folders named like classes: {np.mean(right):.1%}.")


def sort_into(folder: str, prediction: Prediction) -> None:
    """Copy an image into the folder of its class, or into unsure/; beside another of its name it gets one more."""
    path = prediction.path
    place = Path(folder, re.sub(r'[\\/:*?"<>|\0]|^\.', "_", prediction.outcome))
    copy = place / path.name
    if copy.exists() and copy.read_bytes() != path.read_bytes():
        copy = place / f"{path.stem}_{sha256_of(path)[:8]}{path.suffix}"
    if not copy.exists():
        with whole_file(copy) as temporary:
            shutil.copy2(path, temporary)


def write_csv(path: str, predictions: Sequence[Prediction], labels: Sequence[str]) -> None:
    """Write a table with a row per image. Excel takes it for UTF-8 by its first mark, and "=x" for a formula."""
    with whole_file(path) as temporary, temporary.open("w", -1, "utf-8-sig", "backslashreplace", "") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "score", "error", *labels, "unsure", "reason", "likeness"])
        for prediction in predictions:
            harmless = re.sub(r"^(?=[-=+@\t\r\n])", "'", str(prediction.path))
            best = prediction.scores[0] if prediction.scores else ("", "")
            scores = map(dict(prediction.scores).get, labels)
            doubt = "unsure" if prediction.reason else "", prediction.reason, prediction.likeness
            writer.writerow([harmless, *best, prediction.error, *scores, *doubt])


def write_json(path: str, predictions: Sequence[Prediction], top_k: int) -> None:
    entries = []
    for each in predictions:
        named = [{"label": label, "score": score} for label, score in each.scores[:top_k]]
        doubt = {"unsure": bool(each.reason), "reason": each.reason, "likeness": each.likeness}
        entries.append({"image": str(each.path), "predictions": named, **doubt, "error": each.error or None})
    with whole_file(path) as temporary:
        text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, "utf-8", "backslashreplace")


def serve_page(flags: argparse.Namespace) -> None:
    """Open a page that names what is dropped, pasted or photographed there; only this machine can reach it."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # before the import
    import gradio

    classifier = Classifier(flags.graph, flags.labels, 1, flags.cpu_threads, flags.trust_model)

    def name(file: str | None) -> tuple[dict[str, float], str]:
        if file is None:
            return {}, ""
        (prediction,) = predict(classifier, [Path(file)])
        return dict(prediction.scores), prediction.error or prediction.reason

    image = gradio.Image(type="filepath", image_mode=None, label="An image")
    scores = gradio.Label(num_top_classes=flags.top_k, label="What it is")
    told = [scores, gradio.Textbox(label="Doubt")]
    page = gradio.Interface(name, image, told, title="predict.py", live=True, flagging_mode="never")
    fonts = gradio.themes.Default(font=["system-ui"], font_mono=["monospace"])  # none from elsewhere
    local: dict[str, Any] = {"server_name": "127.0.0.1", "share": False}
    _, address, _ = page.launch(**local, inbrowser=True, prevent_thread_lock=True, quiet=True, theme=fonts)
    print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
    threading.Event().wait()


def run(flags: argparse.Namespace) -> int:
    """Name the images; return 1 if one of them could not be read, else 0."""
    paths = find_images(flags.images + flags.image or [at_home("test_images")])
    asked = {"csv": flags.csv, "json": flags.json, "sort_into": flags.sort_into}
    outputs = {name: Path(path) for name, path in asked.items() if path}
    for name, path in outputs.items():
        is_right = path.is_dir() if name == "sort_into" else path.is_file()
        if os.path.realpath(path) in map(os.path.realpath, paths) or (path.exists() and not is_right):
            raise UserError(f"--{name} {path}: what lies there must not be written over; name another.")
    classifier = Classifier(flags.graph, flags.labels, len(paths), flags.cpu_threads, flags.trust_model)
    predictions: list[Prediction] = []
    try:
        for prediction in predict(classifier, paths):
            print_prediction(prediction, flags.top_k, headed=len(paths) > 1)
            predictions.append(prediction)
            if flags.sort_into and not prediction.error:
                sort_into(flags.sort_into, prediction)
    finally:  # what was named until it was stopped is written all the same
        if predictions and flags.csv:
            write_csv(flags.csv, predictions, classifier.labels)
        if predictions and flags.json:
            write_json(flags.json, predictions, flags.top_k)
        if predictions and len(paths) > 1:
            print_summary(predictions, classifier.labels)
    if outputs:
        print(f"Wrote {printable(', '.join(map(str, outputs.values())))}.")
    return int(any(prediction.error for prediction in predictions))


def main(arguments: Sequence[str] | None = None) -> int:
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("predict.py", "predict.py [flags] [FILE ...]", __doc__, **layout)
    flag = parser.add_argument
    images = "files, folders or patterns such as 'a*.jpg' (default: the folder test_images)"
    flag("images", nargs="*", metavar="FILE", help=images)
    flag("--image", nargs="+", metavar="FILE", action="extend", default=[], help="the same")
    flag("--csv", metavar="FILE", help="also write a table, a row per image")
    flag("--json", metavar="FILE", help="also write a list for programs")
    flag("--sort_into", metavar="DIR", help="copy each image into DIR/<its class>, or DIR/unsure")
    flag("--page", action="store_true", help="open a page to drop images on")
    flag("--top_k", metavar="N", type=int, default=5, help="classes to print for each image (5)")
    flag("--graph", metavar="FILE", default=at_home("output_graph.pb"), help="what to use, .pb or .tflite")
    flag("--labels", metavar="FILE", default="", help="other names for its classes, a line each")
    flag("--cpu_threads", metavar="N", type=int, default=0, help="cores to use (default: all)")
    flag("--trust_model", action="store_true", help="run a .pb even if it could write files")
    flags = parser.parse_intermixed_args(arguments)
    return exit_code("predict.py", partial(serve_page if flags.page else run, flags))


if __name__ == "__main__":
    os._exit(main())  # now, before a late signal or a stuck thread can spoil the end
