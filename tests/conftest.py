"""What the tests share: a small base model with the nodes and ops of the real one, images, and ways to run us."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ["RETRAIN_HOME"] = "."  # so that each test finds what it wrote in the folder that it runs in

import retrain  # noqa: E402  (it lies in the folder above)

COLOURS = {"Red Things": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 210)}


def run_script(name: str, *arguments, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Run one of our scripts in a process of its own; return it with stdout and stderr as text."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", **options)


def make_image(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (60, 48)) -> PIL.Image.Image:
    """Return a noisy image of one colour with a lighter disc somewhere in it: easy to tell by its colour."""
    random = np.random.default_rng(seed)
    pixels = np.asarray(colour) + random.integers(-30, 31, (size[1], size[0], 3))
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    x, y = random.integers(0, size[0] - 20), random.integers(0, size[1] - 20)
    light = tuple(min(255, value + 40) for value in colour)
    PIL.ImageDraw.Draw(image).ellipse([int(x), int(y), int(x) + 18, int(y) + 18], fill=light)
    return image


def make_image_dir(folder: Path, count: int = 20) -> Path:
    """Write `count` JPEGs for each of three classes, and return the folder."""
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            make_image(colour, i).save(folder / label / f"{label}_{i:02}.jpg", quality=95)
    return folder


class GraphBuilder:
    """Adds nodes to a GraphDef as old as the 2015 release."""

    def __init__(self, seed: int):
        import tensorflow as tf

        self.tf, self.random, self.graph = tf, np.random.default_rng(seed), tf.compat.v1.GraphDef()
        self.graph.versions.producer = 8  # BatchNormWithGlobalNormalization is refused from 9 on

    def add(self, op: str, name: str, *inputs: str, **attributes) -> str:
        """Add a node and return its name; the type of each attribute is that of its value."""
        node = self.graph.node.add(op=op, name=name, input=inputs)
        for key, value in attributes.items():
            if isinstance(value, list):
                node.attr[key].list.i.extend(value)
            elif isinstance(value, self.tf.DType):
                node.attr[key].type = value.as_datatype_enum
            else:
                setattr(node.attr[key], {bool: "b", int: "i", float: "f", bytes: "s"}[type(value)], value)
        return name

    def const(self, name: str, value, kind=None) -> str:
        """Add a constant, of float32 unless told otherwise."""
        kind = kind or self.tf.float32
        node = self.graph.node.add(op="Const", name=name)
        node.attr["dtype"].type = kind.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(self.tf.make_tensor_proto(value, kind))
        return name

    def conv(self, name: str, inputs: str, shape: tuple[int, ...], stride: int, gamma: bool) -> str:
        """Add a convolution with the batch normalisation, checks and control dependencies of the release."""
        float32, count = self.tf.float32, shape[-1]
        self.const(f"{name}/conv2d_params", self.random.normal(size=shape) * 0.5)
        parts = {
            "moving_mean": self.random.normal(size=count),
            "moving_variance": self.random.uniform(0.5, 2, count),
            "beta": self.random.normal(size=count),
            "gamma": self.random.uniform(0.5, 2, count),
        }
        names = [self.const(f"{name}/batchnorm/{part}", values) for part, values in parts.items()]
        self.add(
            "Conv2D", f"{name}/Conv2D", inputs, f"{name}/conv2d_params",
            T=float32, strides=[1, stride, stride, 1], padding=b"SAME", use_cudnn_on_gpu=True,
        )  # fmt: skip
        self.add(
            "BatchNormWithGlobalNormalization", f"{name}/batchnorm", f"{name}/Conv2D", *names,
            T=float32, variance_epsilon=0.001, scale_after_normalization=gamma,
        )  # fmt: skip
        self.add("CheckNumerics", f"{name}/CheckNumerics", f"{name}/batchnorm", T=float32, message=b"Inf or NaN")
        self.add("Identity", f"{name}/control_dependency", f"{name}/batchnorm", f"^{name}/CheckNumerics", T=float32)
        return self.add("Relu", name, f"{name}/control_dependency", T=float32)


def make_graph(path: Path, seed: int = 0) -> Path:
    """Write a graph with the node names and ops of the 2015 Inception-v3 release, for 33x33 pixels and 16 features."""
    builder = GraphBuilder(seed)
    tf, add, const, conv = builder.tf, builder.add, builder.const, builder.conv
    const("DecodeJpeg/contents", b"", tf.string)
    add("DecodeJpeg", "DecodeJpeg", "DecodeJpeg/contents", channels=3, fancy_upscaling=True, ratio=1)
    add("Cast", "Cast", "DecodeJpeg", SrcT=tf.uint8, DstT=tf.float32)
    add("ExpandDims", "ExpandDims", "Cast", const("ExpandDims/dim", 0, tf.int32), T=tf.float32)
    size = const("ResizeBilinear/size", [33, 33], tf.int32)
    add("ResizeBilinear", "ResizeBilinear", "ExpandDims", size, T=tf.float32, align_corners=False)
    add("Sub", "Sub", "ResizeBilinear", const("Sub/y", 128.0), T=tf.float32)
    add("Mul", "Mul", "Sub", const("Mul/y", 1 / 128), T=tf.float32)
    stem = conv("conv", "Mul", (3, 3, 3, 8), 2, gamma=False)
    around = {"ksize": [1, 3, 3, 1], "strides": [1, 1, 1, 1], "padding": b"SAME"}
    pooled = add("AvgPool", "mixed/pool", stem, T=tf.float32, **around)
    one = conv("mixed/conv", pooled, (1, 1, 8, 8), 1, gamma=True)
    two = conv("mixed/tower/conv", stem, (3, 3, 8, 8), 1, gamma=False)
    add("Concat", "mixed/join", const("mixed/join/concat_dim", 3, tf.int32), one, two, N=2, T=tf.float32)
    add("CheckNumerics", "pool_3/CheckNumerics", "mixed/join", T=tf.float32, message=b"Inf or NaN")
    add("Identity", "pool_3/control_dependency", "mixed/join", "^pool_3/CheckNumerics", T=tf.float32)
    add(
        "AvgPool", "pool_3", "pool_3/control_dependency",
        T=tf.float32, ksize=[1, 17, 17, 1], strides=[1, 1, 1, 1], padding=b"VALID",
    )  # fmt: skip
    add("Reshape", "pool_3/_reshape", "pool_3", const("pool_3/_reshape/shape", [1, 16], tf.int32), T=tf.float32)
    const("softmax/weights", builder.random.normal(size=(16, 4)))
    add("MatMul", "softmax/logits/MatMul", "pool_3/_reshape", "softmax/weights", T=tf.float32)
    add("Softmax", "softmax", "softmax/logits/MatMul", T=tf.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(builder.graph.SerializeToString())
    return path


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory) -> Path:
    """A folder with what all workers of a session share: model/ (the small base model, converted) and trained/."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "session"
    with filelock.FileLock(f"{folder}.lock"):  # the first to come fills it
        if not folder.exists():
            make_graph(folder / "model/classify_image_graph_def.pb")
            make_image_dir(folder / "trained/pictures")
            done = run_script(
                "retrain.py", "--image_dir", "pictures", "--model_dir", folder / "model", "--random_seed", 1,
                "--how_many_training_steps", 300, "--learning_rate", 0.1, "--print_misclassified_test_images",
                "--saved_model_dir", "saved_model", "--checkpoint_path", "checkpoints/head",
                "--intermediate_store_frequency", 100, "--coverage", 1, cwd=folder / "trained",
            )  # fmt: skip
            (folder / "trained/stdout.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture(scope="session")
def trained(session_dir) -> Path:
    """A folder in which `retrain.py --image_dir pictures` has run on the small base model; not to be changed."""
    assert (session_dir / "trained/output_graph.pb").exists(), (session_dir / "trained/stdout.txt").read_text()
    return session_dir / "trained"


@pytest.fixture(scope="session")
def model_dir(session_dir, tmp_path_factory) -> Path:
    """A --model_dir that holds the small base model and its conversion."""
    return Path(shutil.copytree(session_dir / "model", tmp_path_factory.mktemp("own") / "model"))


@pytest.fixture(scope="session")
def small_graph(model_dir) -> Path:
    """The small base model, in a folder of its own where its conversion may be kept."""
    return model_dir / "classify_image_graph_def.pb"


@pytest.fixture
def image_dir(tmp_path) -> Path:
    """An --image_dir of three classes, 20 images each, which the test may change."""
    return make_image_dir(tmp_path / "pictures")


@pytest.fixture
def train(image_dir, model_dir, monkeypatch, request):
    """A function that runs retrain.py on `image_dir` in this process, in the folder above it; returns its exit code.

    Without the report, which takes most of the time of so small a run, but in the tests that are about it.
    """
    monkeypatch.chdir(image_dir.parent)
    monkeypatch.setattr(retrain.log, "handlers", [])  # main's write to the stdout of one test
    no_report = request.node.path.stem not in ("test_report", "test_diagnostics")

    def run(*flags) -> int:
        usual = ["--image_dir", "pictures", "--model_dir", model_dir, "--how_many_training_steps", 20]
        return retrain.main([str(argument) for argument in (*usual, f"--no_report={no_report}", *flags)])

    return run


@pytest.fixture
def error_of(train, capsys):
    """A function that runs `train` and returns the one sentence with which it ends, before anything is trained."""

    def run(*flags) -> str:
        assert train(*flags, "--logging_verbosity", "ERROR") == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert not Path("output_graph.pb").exists()
        return said.removeprefix("retrain.py: error: ")

    return run


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the big test data, which lies beside a checkout where the project is developed."""
    if not (SHARED / "photos").is_dir() or not os.access(SHARED, os.R_OK):
        pytest.skip("the photographs and the Inception-v3 graph in ../shared are not on this machine")
    return SHARED
