"""Distil a small base model, the starter, from Inception-v3.

    python inception_model/distill.py --teacher inception_model/classify_image_graph_def.pb \
        --image_dir photos/imagenet_one_each photos/cats_dogs photos/flowers_small photos/tiny_imagenet \
        --drawn_dir drawn/1 drawn/2 --output inception_model/starter_graph_def.pb --work_dir distill_work

1. Views: random crops, turns, colour changes, mixes and collages of the photographs, and drawn images, each put through
   the teacher; a view's pixels and the teacher's 2,048 features of it (pool_3) are kept on disk.
2. Training: a small convolutional network, the student, learns to tell the leading principal components of the
   teacher's features from the pixels (function matching: no label is used, and every view has its own exact target).
3. Second stage, with --drawn_dir: the student learns the same of views of drawn pictures (tests/draw_data.py) as well,
   half of each batch; or else its features would tell little of the pictures in data/, which are drawn. Seed 0 drew
   data/ and test_images/: give pictures of other seeds, so that those remain an examination.
4. Export: its layers up to the last pooling become a graph with the node names of the Inception graph.
5. The table: tests/probe.py examines the result on photographs that it never saw.

In a second a core with AVX-512 and bfloat16 makes 28 views, or trains on 85; other processors are slower. Stopped at
any time, the same command goes on from there; with another --samples, on another schedule. The defaults are what the
bundled starter was made with (its README tells the rest).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import retrain  # noqa: E402  (it lies in the folder above)

os.environ["KERAS_BACKEND"] = "tensorflow"
tf = retrain.import_tensorflow()
import keras  # noqa: E402  (after the messages of TensorFlow were quieted)

VIEW = 320  # side of a view, and of the starter's input, in pixels
STORED = 160  # side of a view as it lies on disk and as the student's first layer gets it: the means of 2x2 pixels
SHARD = 512  # views in one file
TEACHER_BATCH = 8  # views that the teacher takes at a time
VALIDATION = 1024  # the first views, which are not trained on
LEAST_CROP, NEARLY_WHOLE = 0.08, 0.6  # of a photograph's area; the latter for half of the crops of drawn pictures
SQUARE_NORM = 400.0  # of the exported features, in the mean: it sets how fast a new layer learns from them
SECOND_RATE = 1 / 3  # the peak of the learning rate in the second stage, as a part of that in the first
SUFFIXES = (".jpg", ".jpeg", ".png")
# What is kept out of the distillation, by the name of a folder above the photograph: see held_out.
NEVER, HALVED = ("ants_bees",), ("cats_dogs", "flowers_small")
# The network: channels of the stem; of the three stages, with the number and the width of their bottleneck blocks; and
# of the output. Found as good per step as one of wide 3x3 convolutions, at three quarters of its cost.
STEM, STAGES, FEATURES = 48, ((128, 3, 64), (256, 4, 128), (384, 1, 192)), 768
# Keeps the variance of activations through a ReLU: 1 / std(relu(normal)).
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
MEAN, SPREAD = 128.0, 64.0  # the student gets (pixels - MEAN) / SPREAD


# ======================================================================================================================
# Flags
# ======================================================================================================================


def has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 numbers; where it doesn't, they are slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def parse_flags() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = retrain.Parser(
        prog="distill.py",
        allow_abbrev=False,
        description="Distil a small base model from Inception-v3.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole, real = (lambda low: retrain.number(int, low)), (lambda low: retrain.number(float, low))
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="the graph to learn from")
    add("--image_dir", type=Path, nargs="+", required=True, help="folders of photographs, folders in them included")
    add("--drawn_dir", type=Path, nargs="*", default=[], help="drawn pictures, not of seed 0, for the second stage")
    add("--output", type=Path, default=Path("starter_graph_def.pb"), help="the graph to write")
    add("--work_dir", type=Path, default=Path("distill_work"), help="views, targets and checkpoints: 80 KB a view")
    add("--views", type=whole(3 * SHARD), default=98_304, help=f"views to make, in files of {SHARD}")
    add("--drawn_views", type=whole(3 * SHARD), default=12_288, help="views to make of the drawn pictures")
    add("--workers", type=whole(1), default=retrain.core_count(), help="processes that make views")
    add("--samples", type=whole(1), default=576_000, help="views to train on in all, the same ones many times")
    add("--second_samples", type=whole(1), default=144_000, help="the same for the second stage")
    add("--batch_size", type=whole(2), default=64, help="views in one training step")
    add("--learning_rate", type=real(0), default=2e-3, help="its peak; it rises for a while, then falls as a cosine")
    add("--weight_decay", type=real(0), default=0.05, help="of AdamW")
    add("--components", type=whole(1), default=384, help="principal components of pool_3 to learn")
    add("--checkpoint_every", type=whole(1), default=1000, help="steps between two checkpoints")
    add("--seed", type=whole(0), default=0, help="of views, first weights and order")
    add(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=has_bfloat16(),
        help="compute in bfloat16, the default where the processor knows it",
    )
    add("--photos", type=Path, help="the folder that holds ants_bees and so on, to print the table of tests/probe.py")
    add("--worker", type=int, help=argparse.SUPPRESS)  # the number of a process that makes views
    flags = parser.parse_args()
    if not flags.teacher.is_file():
        parser.error(f"--teacher {flags.teacher}: there is no such file")
    for name in ("image_dir", "drawn_dir"):
        for folder in getattr(flags, name):
            if not folder.is_dir():
                parser.error(f"--{name} {folder}: there is no such folder")
    return flags


# ======================================================================================================================
# Photographs
# ======================================================================================================================


def held_out(path: str | os.PathLike) -> bool:
    """Tell whether the student must never see a photograph: all of the sets in NEVER are kept out, and of the sets in
    HALVED those photographs whose file name has an odd SHA-1."""
    folders = os.path.normpath(path).split(os.sep)[:-1]
    if any(name in folders for name in NEVER):
        return True
    digest = hashlib.sha1(os.path.basename(path).encode("utf-8")).digest()
    return any(name in folders for name in HALVED) and digest[-1] % 2 == 1


def list_photographs(folders: list[Path]) -> tuple[list[str], np.ndarray]:
    """Return the paths of the photographs to learn from and the chance of each to be drawn, float [n].

    A photograph is drawn in proportion to its pixels, counted up to a full view, so that ten thousand tiny pictures
    don't drown a thousand real ones. Raises UserError if there is none.
    """
    paths, pixels = [], []
    for folder in folders:
        for parent, subfolders, names in os.walk(folder):
            subfolders.sort()
            for name in sorted(names):
                path = os.path.join(os.path.abspath(parent), name)
                if name.lower().endswith(SUFFIXES) and not held_out(path):
                    with Image.open(path) as image:  # reads the header only
                        pixels.append(min(image.width * image.height, VIEW * VIEW))
                    paths.append(path)
    if not paths:
        raise retrain.UserError(f"--image_dir {' '.join(map(str, folders))}: there are no photographs to learn from.")
    chances = np.array(pixels, np.float64)
    return paths, chances / chances.sum()


# ======================================================================================================================
# Drawn images
# ======================================================================================================================


def random_colours(random: np.random.Generator, count: int) -> np.ndarray:
    """Return [count, 3] float colours in 0-255, around one base colour half of the time."""
    colours = random.uniform(0, 255, (count, 3))
    if random.random() < 0.5:
        colours = np.clip(random.uniform(0, 255, 3) + random.normal(0, 50, (count, 3)), 0, 255)
    return colours


def paint(field: np.ndarray, random: np.random.Generator) -> Image.Image:
    """Return a [height, width] field of numbers coloured with a random palette of a few colours."""
    field = (field - field.min()) / (np.ptp(field) + 1e-9)
    palette = random_colours(random, random.integers(2, 7))
    stops = np.linspace(0, 1, len(palette))
    channels = [np.interp(field, stops, palette[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def draw_clouds(random: np.random.Generator) -> Image.Image:
    """Draw clouds: noise of several octaves."""
    total = np.zeros((VIEW, VIEW), np.float32)
    roughness = random.uniform(0.3, 0.9)
    for octave in range(1, 8):
        noise = random.normal(size=(2**octave + 1, 2**octave + 1)).astype(np.float32)
        total += roughness**octave * np.asarray(Image.fromarray(noise).resize((VIEW, VIEW), Image.BICUBIC))
    return paint(np.abs(total) if random.random() < 0.3 else total, random)


def draw_waves(random: np.random.Generator) -> Image.Image:
    """Draw sums of sine waves, a little bent: stripes, checks, moire."""
    y, x = np.mgrid[0:VIEW, 0:VIEW].astype(np.float32) / VIEW
    field = np.zeros_like(x)
    for _ in range(random.integers(1, 5)):
        angle, waves = random.uniform(0, 2 * math.pi), math.exp(random.uniform(0.5, 4.0))
        bend = random.normal(0, 0.1) * np.sin(random.uniform(2, 20) * (x if random.random() < 0.5 else y))
        field += np.sin(2 * math.pi * waves * (x * math.cos(angle) + y * math.sin(angle) + bend))
    return paint(np.sign(field) if random.random() < 0.3 else field, random)


def draw_julia(random: np.random.Generator) -> Image.Image:
    """Draw a Julia set around a random point, at half size."""
    half = VIEW // 2
    y, x = np.mgrid[0:half, 0:half].astype(np.float32) / half - 0.5
    zoom, angle = math.exp(random.uniform(-1.5, 1.2)), random.uniform(0, 2 * math.pi)
    z = ((x + 1j * y) * zoom + random.normal(0, 0.3) + 1j * random.normal(0, 0.3)).astype(np.complex64)
    c = np.complex64(random.uniform(0.6, 0.9) * np.exp(1j * angle))
    count = np.zeros(z.shape, np.float32)
    for _ in range(40):
        inside = np.abs(z) < 4
        count += inside
        z = np.where(inside, z * z + c, z)
    return paint(count, random).resize((VIEW, VIEW), Image.BILINEAR)


def draw_shapes(random: np.random.Generator) -> Image.Image:
    """Draw random ellipses, polygons, lines and boxes on a plain or cloudy ground."""
    colours = random_colours(random, 16).astype(int)
    image = draw_clouds(random) if random.random() < 0.4 else Image.new("RGB", (VIEW, VIEW), tuple(colours[0].tolist()))
    pen = ImageDraw.Draw(image)
    size = math.exp(random.uniform(2.3, 5.3))
    for _ in range(random.integers(3, 60)):
        colour = tuple(colours[random.integers(16)].tolist())
        centre = random.uniform(0, VIEW, 2)
        kind = random.integers(4)
        corners = centre + random.normal(0, size / 2, (random.integers(3, 7), 2))
        low, high = corners.min(0), corners.max(0)
        if kind == 0:
            pen.ellipse([*low.tolist(), *high.tolist()], fill=colour)
        elif kind == 1:
            pen.polygon([tuple(p) for p in corners.tolist()], fill=colour)
        elif kind == 2:
            pen.line([tuple(p) for p in corners.tolist()], fill=colour, width=int(random.integers(1, 12)))
        else:
            pen.rectangle([*low.tolist(), *high.tolist()], fill=colour)
    return image


DRAWERS = (draw_clouds, draw_waves, draw_julia, draw_shapes)


# ======================================================================================================================
# Views
# ======================================================================================================================


def crop(image: Image.Image, random: np.random.Generator, side: int, least: float) -> Image.Image:
    """Return a random part of `least` to 100 % of a photograph's area (not under 48x48 pixels of it), sometimes turned
    a little, squeezed into a square of `side` pixels. One in four is the whole photograph."""
    width, height = image.size
    least = min(1.0, max(least, 48 * 48 / (width * height)))
    area = width * height * math.exp(random.uniform(math.log(least), 0))
    aspect = math.exp(random.uniform(-0.4, 0.4)) * (width / height) ** random.uniform(0, 1)
    w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    if random.random() < 0.25:
        w, h = width, height
    left, top = random.uniform(0, width - w), random.uniform(0, height - h)
    if random.random() < 0.2:
        image = image.rotate(
            random.normal(0, 12), Image.BICUBIC, center=(left + w / 2, top + h / 2), fillcolor=(128, 128, 128)
        )
    kernel = (Image.BILINEAR, Image.BICUBIC, Image.BILINEAR, Image.LANCZOS)[random.integers(4)]
    view = image.resize((side, side), kernel, box=(left, top, left + w, top + h))
    return ImageOps.mirror(view) if random.random() < 0.5 else view


def recolour(view: Image.Image, random: np.random.Generator) -> Image.Image:
    """Change light and colour; now and then make it grey, negative, blurred, grainy or badly compressed."""
    if random.random() < 0.5:
        for enhance in random.permutation((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
            view = enhance(view).enhance(random.uniform(0.6, 1.4))
    if random.random() < 0.3:
        gains = np.repeat(random.uniform(0.8, 1.2, 3), 256) * np.tile(np.arange(256), 3)
        view = view.point(np.clip(gains, 0, 255).astype(int).tolist())
    dice = random.random()
    if dice < 0.03:
        view = ImageOps.grayscale(view).convert("RGB")
    elif dice < 0.04:
        view = ImageOps.invert(view)
    elif dice < 0.10:
        view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 3)))
    elif dice < 0.14:
        noise = random.normal(0, random.uniform(3, 25), (VIEW, VIEW, 3))
        view = Image.fromarray(np.clip(np.asarray(view) + noise, 0, 255).astype(np.uint8))
    elif dice < 0.20:
        packed = io.BytesIO()
        view.save(packed, "JPEG", quality=int(random.integers(15, 70)))
        view = Image.open(packed)
    return view


class Photographs(NamedTuple):
    """Photographs, or drawn pictures, to make views of."""

    paths: list[str]
    chances: np.ndarray  # of each to be drawn, float [n]
    drawn: bool  # half of the crops are then nearly whole, since a figure is the whole picture's matter


def picture(photographs: Photographs, random: np.random.Generator, side: int = VIEW) -> Image.Image:
    """Return one plain view: a crop of a random photograph, or (4 %) a drawing."""
    if random.random() < 0.04:
        return DRAWERS[random.integers(len(DRAWERS))](random).resize((side, side))
    with Image.open(photographs.paths[random.choice(len(photographs.paths), p=photographs.chances)]) as image:
        least = NEARLY_WHOLE if photographs.drawn and random.random() < 0.5 else LEAST_CROP
        return crop(image.convert("RGB"), random, side, least)


def collage(photographs: Photographs, random: np.random.Generator) -> Image.Image:
    """Return 2x2 or 3x3 pictures side by side, or one picture laid over a part of another."""
    if random.random() < 0.5:
        ground, box = picture(photographs, random), random.uniform(0.25, 0.75, 2) * VIEW
        patch = picture(photographs, random).resize((int(box[0]), int(box[1])), Image.BILINEAR)
        ground.paste(patch, (int(random.uniform(0, VIEW - box[0])), int(random.uniform(0, VIEW - box[1]))))
        return ground
    cells = int(random.choice([2, 2, 3]))
    side = -(-VIEW // cells)
    ground = Image.new("RGB", (VIEW, VIEW))
    for cell in range(cells * cells):
        ground.paste(picture(photographs, random, side), (cell % cells * side, cell // cells * side))
    return ground


def make_view(photographs: Photographs, random: np.random.Generator) -> np.ndarray:
    """Return one random view, uint8 [VIEW, VIEW, 3]: 80 % plain, 10 % collages, 10 % two seen through each other."""
    dice = random.random()
    if dice < 0.8:
        view = picture(photographs, random)
    elif dice < 0.9:
        view = collage(photographs, random)
    else:
        view = Image.blend(picture(photographs, random), picture(photographs, random), random.uniform(0.2, 0.5))
    return np.asarray(recolour(view, random).convert("RGB"))


def halve(views: np.ndarray) -> np.ndarray:
    """Return the means of 2x2 pixels, uint8 [n, VIEW, VIEW, 3] to uint8 [n, STORED, STORED, 3]."""
    n, side = len(views), VIEW // 2
    return ((views.reshape(n, side, 2, side, 2, 3).sum((2, 4), dtype=np.uint16) + 2) // 4).astype(np.uint8)


# ======================================================================================================================
# The teacher, and the shards of views and targets on disk
# ======================================================================================================================


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy, whole or not at all."""
    with retrain.whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def load_teacher(path: Path, bfloat16: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from views, uint8 [TEACHER_BATCH, VIEW, VIEW, 3], to pool_3, float32 [TEACHER_BATCH, 2048]."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if bfloat16:  # changes the features by 1 %, far less than the student is wrong, and takes half the time
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision_onednn_bfloat16": True})
    graph = retrain.load_graph(path)
    size = retrain.graph_input_size(graph)
    network = retrain.graph_function(graph, retrain.BOTTLENECK_NODE)

    @tf.function
    def features(views):
        return network(tf.compat.v1.image.resize_bilinear(tf.cast(views, tf.float32), size))

    return lambda views: features(tf.constant(views)).numpy()


def shard_path(work_dir: Path, kind: str, shard: int) -> Path:
    """Return the file of the shard-th views (uint8 [SHARD, STORED, STORED, 3]) or targets (float16 [SHARD, 2048])."""
    return work_dir / f"{kind}_{shard:05d}.npy"


class Collection(NamedTuple):
    """Views to make of the pictures in some folders, and where they lie."""

    folders: list[Path]
    work_dir: Path
    shards: int
    seed: list[int]
    drawn: bool

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not on disk."""
        return [s for s in range(self.shards) if not shard_path(self.work_dir, "targets", s).exists()]

    def load(self) -> tuple[list, np.ndarray]:
        """Return the views, memory-mapped [SHARD, STORED, STORED, 3] each, and all the targets, float32 [n, 2048]."""
        views = [np.load(shard_path(self.work_dir, "views", s), mmap_mode="r") for s in range(self.shards)]
        targets = [np.load(shard_path(self.work_dir, "targets", s)) for s in range(self.shards)]
        return views, np.concatenate(targets).astype(np.float32)


def collections(flags: argparse.Namespace) -> list[Collection]:
    """Return the views of the photographs and, if there are such pictures, those of the drawn ones."""
    drawn = Collection(flags.drawn_dir, flags.work_dir / "drawn", flags.drawn_views // SHARD, [flags.seed, 1], True)
    photographs = Collection(flags.image_dir, flags.work_dir, flags.views // SHARD, [flags.seed], False)
    return [photographs, drawn] if flags.drawn_dir else [photographs]


def make_shards(flags: argparse.Namespace) -> None:
    """Make those shards of this worker that are not on disk. A shard depends on the seed and its number alone."""
    teacher = load_teacher(flags.teacher, flags.bfloat16)
    for views_of in collections(flags):
        photographs = Photographs(*list_photographs(views_of.folders), views_of.drawn)
        for shard in range(flags.worker, views_of.shards, flags.workers):
            if shard_path(views_of.work_dir, "targets", shard).exists():
                continue
            random, views, targets, start = np.random.default_rng([*views_of.seed, shard]), [], [], time.time()
            for _ in range(SHARD // TEACHER_BATCH):
                batch = np.stack([make_view(photographs, random) for _ in range(TEACHER_BATCH)])
                targets.append(teacher(batch))
                views.append(halve(batch))
            save_array(shard_path(views_of.work_dir, "views", shard), np.concatenate(views))
            save_array(shard_path(views_of.work_dir, "targets", shard), np.concatenate(targets).astype(np.float16))
            print(f"views: shard {shard} of {views_of.shards}, {SHARD / (time.time() - start):.1f}/s", flush=True)


def make_views(flags: argparse.Namespace) -> None:
    """Make all the shards that are not on disk, in processes of one thread each: this command again, with --worker."""
    todo = 0
    for views_of in collections(flags):
        views_of.work_dir.mkdir(parents=True, exist_ok=True)
        pictures, missing = len(list_photographs(views_of.folders)[0]), len(views_of.missing())
        print(f"views: {missing * SHARD:,} to make from {pictures:,} pictures", flush=True)
        todo += missing
    if not todo:
        return
    command = [sys.executable, *sys.argv, "--workers", str(flags.workers)]
    workers = [subprocess.Popen([*command, "--worker", str(k)]) for k in range(flags.workers)]
    try:
        failed = [code for code in [worker.wait() for worker in workers] if code]
    finally:
        for worker in workers:
            worker.terminate()
    if failed:
        raise retrain.UserError(f"a process that made views ended with code {failed[0]}; the reason stands above.")


# ======================================================================================================================
# The student
# ======================================================================================================================


class StandardizedConv(keras.layers.Layer):
    """A convolution with a bias whose filters are standardised (mean 0, norm `gain`, which is learned).

    It takes the place of batch normalisation: after 40,000 views the error was a little lower (0.922, not 0.936), a
    step took three quarters of the time, and there is nothing to fold away afterwards.
    """

    def __init__(self, filters: int, kernel: int, stride: int, gain: float):
        super().__init__()
        self.filters, self.side, self.stride, self.first_gain = filters, kernel, stride, gain

    def build(self, shape):
        start = keras.initializers.Constant(self.first_gain)
        size = (self.side, self.side, shape[-1], self.filters)
        self.kernel = self.add_weight(shape=size, initializer="he_normal", name="kernel", autocast=False)
        self.gain = self.add_weight(shape=(self.filters,), initializer=start, name="gain", autocast=False)
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias", autocast=False)

    def weights_in_use(self):
        """Return the standardised filters, float32 [height, width, inputs, filters]."""
        kernel = tf.convert_to_tensor(self.kernel)
        mean, variance = tf.nn.moments(kernel, [0, 1, 2], keepdims=True)
        inputs = math.prod(kernel.shape[:3])
        return (kernel - mean) * tf.math.rsqrt(variance * inputs + 1e-6) * tf.convert_to_tensor(self.gain)

    def call(self, x):
        y = tf.nn.conv2d(x, tf.cast(self.weights_in_use(), x.dtype), self.stride, "SAME")
        return tf.nn.bias_add(y, tf.cast(tf.convert_to_tensor(self.bias), x.dtype))


def network(x, conv: Callable):
    """Take [n, STORED, STORED, 3] through the layers of the student to [n, STORED / 32, STORED / 32, FEATURES].

    `conv(x, filters, kernel, stride, gain)` is a layer to train, or the finished weights of one: so the network is
    written down once, for training and for export. Residual branches start at zero (gain 0).
    """
    relu = keras.ops.relu
    x = relu(conv(x, STEM, 8, 4, RELU_GAIN))  # 40x40
    y = relu(conv(x, STEM, 3, 1, RELU_GAIN))
    x = relu(x + conv(y, STEM, 3, 1, 0.0))
    for channels, blocks, width in STAGES:  # 20x20, 10x10, 5x5
        x = relu(conv(x, channels, 3, 2, RELU_GAIN))
        for _ in range(blocks):
            y = relu(conv(x, width, 1, 1, RELU_GAIN))
            y = relu(conv(y, width, 3, 1, RELU_GAIN))
            x = relu(x + conv(y, channels, 1, 1, 0.0))
    return relu(conv(x, FEATURES, 1, 1, RELU_GAIN))


def build_student(components: int) -> tuple[keras.Model, list[StandardizedConv]]:
    """Return the student, uint8 [n, STORED, STORED, 3] to features [n, FEATURES] and components [n, components], and
    its convolutions in the order in which `network` asks for them."""
    layers = []

    def conv(x, *shape):
        layers.append(StandardizedConv(*shape))
        return layers[-1](x)

    views = keras.Input((STORED, STORED, 3))
    maps = network((views - MEAN) / SPREAD, conv)
    features = keras.layers.GlobalAveragePooling2D(dtype="float32")(maps)
    return keras.Model(views, [features, keras.layers.Dense(components, dtype="float32")(features)]), layers


# ======================================================================================================================
# Training
# ======================================================================================================================


class Components(NamedTuple):
    """What makes principal components of the teacher's features."""

    mean: np.ndarray  # [2048]
    directions: np.ndarray  # [2048, components]

    def of(self, targets: np.ndarray) -> np.ndarray:
        """Return the components of targets [n, 2048], float32 [n, components]."""
        return ((targets - self.mean) @ self.directions).astype(np.float32)


def principal_components(targets: np.ndarray, count: int) -> Components:
    """Return the leading components of the targets [n, 2048].

    They are whitened half way (divided by the square root of their standard deviation), so that the first few don't
    drown the others, nor the last ones, mostly noise, weigh as much; and scaled to a mean square of 1.
    """
    mean = targets.mean(0)
    covariance = np.cov((targets - mean).T)  # [2048, 2048]
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1][:count], directions[:, ::-1][:, :count]
    scale = np.maximum(variances, 1e-9) ** -0.25 / np.sqrt(np.sqrt(np.maximum(variances, 1e-9)).mean())
    return Components(mean, directions * scale)


class Stage(NamedTuple):
    """One of the two trainings: of the photographs' views alone, and then of those and the drawn ones in halves."""

    name: str
    sources: list[tuple]  # (views, components [n, components]); each gives as many views to a step
    samples: int
    peak: float  # of the learning rate


def batches(stage: Stage, flags: argparse.Namespace, first: int) -> Iterator[tuple]:
    """Yield (views uint8 [batch, STORED, STORED, 3], targets float32 [batch, components]) for the steps from `first`.

    Each epoch has its own order, and each view is mirrored half of the times, which hardly changes its features. The
    order depends on the seed and the step alone, so that a stopped run goes on as if it had not been stopped.
    """
    count = flags.batch_size // len(stage.sources)

    def load(step: int) -> tuple:
        pixels, wanted = [], []
        for views, targets in stage.sources:
            epoch, place = divmod(step, (len(targets) - VALIDATION) // count)
            order = np.random.default_rng([flags.seed, 1, epoch]).permutation(len(targets) - VALIDATION) + VALIDATION
            picked = order[place * count : (place + 1) * count]
            pixels += [views[k // SHARD][k % SHARD] for k in picked]
            wanted.append(targets[picked])
        batch = np.stack(pixels)
        mirrored = np.random.default_rng([flags.seed, 2, step]).random(len(batch)) < 0.5
        batch[mirrored] = batch[mirrored, :, ::-1]
        return batch, np.concatenate(wanted)

    with ThreadPoolExecutor(2) as pool:  # two batches ahead of the training
        waiting = [pool.submit(load, first), pool.submit(load, first + 1)]
        for step in range(first + 2, 2**62):
            waiting.append(pool.submit(load, step))
            yield waiting.pop(0).result()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: a straight rise over 500 steps (a tenth of a short run), then half a cosine to 0."""
    rise = min(500, steps // 10)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def errors(guess, target):
    """Return the mean squared error and the mean cosine between components [batch, components]."""
    cosine = tf.reduce_sum(guess * target, 1) / (tf.norm(guess, axis=1) * tf.norm(target, axis=1) + 1e-6)
    return tf.reduce_mean((guess - target) ** 2), tf.reduce_mean(cosine)


def save_checkpoint(path: Path, step: int, variables: list) -> None:
    """Write all the variables of model and optimizer, and how many steps were done."""
    with retrain.whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, step=step, **{f"v{k}": variable.numpy() for k, variable in enumerate(variables)})


def load_checkpoint(path: Path, variables: list) -> int:
    """Set the variables as they were saved, if they were; return how many steps were done."""
    if not path.exists():
        return 0
    with np.load(path) as saved:
        if len(saved.files) != len(variables) + 1 or any(
            saved[f"v{k}"].shape != tuple(variable.shape) for k, variable in enumerate(variables)
        ):
            raise retrain.UserError(f"{path} belongs to another student; delete it to train anew.")
        for k, variable in enumerate(variables):
            variable.assign(saved[f"v{k}"])
        return int(saved["step"])


def train(student: keras.Model, stage: Stage, flags: argparse.Namespace) -> None:
    """Train the student for a stage, from the stage's last checkpoint if there is one."""
    optimizer = keras.optimizers.AdamW(stage.peak, weight_decay=flags.weight_decay, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gain"])
    optimizer.build(student.trainable_variables)
    checkpoint, variables = flags.work_dir / f"{stage.name}.npz", [*student.variables, *optimizer.variables]
    first, steps = load_checkpoint(checkpoint, variables), stage.samples // flags.batch_size

    @tf.function
    def train_step(pixels, target):
        with tf.GradientTape() as tape:
            square, cosine = errors(student(pixels, training=True)[1], target)
            loss = square + 1 - cosine
        gradients = tape.gradient(loss, student.trainable_variables)
        optimizer.apply_gradients(zip(gradients, student.trainable_variables, strict=True))
        return square, cosine

    @tf.function
    def validate(pixels, target):
        return errors(student(pixels, training=False)[1], target)

    def validation(views: list, targets: np.ndarray) -> str:
        pixels = np.concatenate([np.asarray(views[k]) for k in range(VALIDATION // SHARD)])
        parts = [slice(k, k + 64) for k in range(0, VALIDATION, 64)]
        return "{:.4f}, {:.4f}".format(
            *np.mean([validate(pixels[p].astype(np.float32), targets[p]) for p in parts], axis=0)
        )

    start, recent = time.time(), []
    for step, (pixels, target) in zip(range(first, steps), batches(stage, flags, first), strict=False):
        optimizer.learning_rate.assign(learning_rate(step, steps, stage.peak))
        recent.append(train_step(tf.cast(pixels, tf.float32), target))
        if (step + 1) % flags.checkpoint_every == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, variables)
            valid = "; ".join(validation(*source) for source in stage.sources)
            square, cosine = np.mean([[float(x) for x in pair] for pair in recent], axis=0)
            rate = (step + 1 - first) * flags.batch_size / (time.time() - start)
            print(
                f"{time.strftime('%H:%M:%S')} step {step + 1} of {steps}: squared error {square:.4f}, cosine "
                f"{cosine:.4f}; on validation views {valid}; {rate:.0f} views/s",
                flush=True,
            )
            recent = []


# ======================================================================================================================
# Export
# ======================================================================================================================


def finished_weights(layers: list, student: keras.Model, views: np.ndarray, square_norm: float) -> list[tuple]:
    """Return (filters, biases) of every convolution as they are used, float32.

    The last one is scaled by one number, to features whose squared norm is `square_norm` in the mean of the views. (A
    scale passes through ReLU and mean.)
    """
    pairs = [(layer.weights_in_use().numpy(), layer.bias.numpy()) for layer in layers]
    parts = [views[k : k + 64].astype(np.float32) for k in range(0, len(views), 64)]
    features = np.concatenate([student(part, training=False)[0].numpy() for part in parts])  # [views, FEATURES]
    scale = math.sqrt(square_norm / (features**2).sum(1).mean())
    pairs[-1] = (pairs[-1][0] * scale, pairs[-1][1] * scale)
    return pairs


def starter_graph(pairs: list[tuple]):
    """Return the GraphDef from the bytes of a JPEG to the features, with the node names of the Inception graph.

    Pictures are resized to VIEW pixels, as Inception's are to 299, and then averaged 2x2: the bilinear kernel reads
    only 4 pixels for each that it makes and would miss most of a photograph if it went to STORED at once. Filters are
    stored as float16 and widened by a Cast.
    """
    with tf.Graph().as_default() as graph:
        contents = tf.compat.v1.placeholder(tf.string, [], "DecodeJpeg/contents")
        pixels = tf.cast(tf.io.decode_jpeg(contents, channels=3, name="DecodeJpeg"), tf.float32, name="Cast")
        x = tf.expand_dims(pixels, 0, name="ExpandDims")
        x = tf.compat.v1.image.resize_bilinear(x, [VIEW, VIEW], name="ResizeBilinear")
        x = tf.multiply(tf.subtract(x, MEAN, name="Sub"), 1 / SPREAD, name="Mul")
        x = tf.nn.avg_pool2d(x, VIEW // STORED, VIEW // STORED, "VALID", name="halve")
        rest = iter(enumerate(pairs))

        def conv(x, filters, kernel, stride, gain):
            k, (weights, biases) = next(rest)
            stored = tf.constant(weights.astype(np.float16), name=f"conv_{k}/filters")
            y = tf.nn.conv2d(x, tf.cast(stored, tf.float32, name=f"conv_{k}/Cast"), stride, "SAME", name=f"conv_{k}")
            return tf.nn.bias_add(y, tf.constant(biases, tf.float32, name=f"conv_{k}/biases"), name=f"conv_{k}/BiasAdd")

        maps = network(x, conv)
        pooled = tf.nn.avg_pool2d(maps, STORED // 32, 1, "VALID", name="pool_3")
        tf.reshape(pooled, tf.constant([-1, FEATURES], name="pool_3/_reshape/shape"), name=retrain.BOTTLENECK_NODE)
        graph_def = tf.compat.v1.train.export_meta_graph(graph=graph, strip_default_attrs=True).graph_def
    graph_def.ClearField("library")
    graph_def.versions.producer = 21  # nothing in it is newer; TensorFlow 1 reads it
    return graph_def


# ======================================================================================================================
# Main
# ======================================================================================================================


def main() -> int:
    """Make views, train, export, print the table; return the exit code."""
    flags = parse_flags()
    flags.work_dir.mkdir(parents=True, exist_ok=True)
    if flags.worker is not None:
        make_shards(flags)
        return 0
    make_views(flags)

    views, targets = collections(flags)[0].load()
    components = principal_components(targets, flags.components)
    sources = [(views, components.of(targets))]
    keras.utils.set_random_seed(flags.seed)
    keras.mixed_precision.set_global_policy("mixed_bfloat16" if flags.bfloat16 else "float32")
    student, layers = build_student(flags.components)
    print(f"training: {len(targets):,} views, {student.count_params():,} parameters", flush=True)
    train(student, Stage("checkpoint", sources, flags.samples, flags.learning_rate), flags)
    if flags.drawn_dir:
        drawn, targets = collections(flags)[1].load()
        sources.append((drawn, components.of(targets)))
        print(f"training: {len(targets):,} views more, of drawn pictures", flush=True)
        train(student, Stage("second", sources, flags.second_samples, flags.learning_rate * SECOND_RATE), flags)

    views = sources[-1][0]
    graph = starter_graph(finished_weights(layers, student, np.concatenate([views[2], views[-1]]), SQUARE_NORM))
    with retrain.whole_file(flags.output) as temporary:
        temporary.write_bytes(graph.SerializeToString(deterministic=True))
    print(f"written: {flags.output}, {flags.output.stat().st_size:,} bytes", flush=True)
    if not flags.photos:
        return 0
    probe = [sys.executable, str(PROJECT / "tests" / "probe.py"), "--photos", str(flags.photos)]
    return subprocess.call([*probe, "--teacher", str(flags.teacher), "--starter", str(flags.output)])


if __name__ == "__main__":
    sys.exit(retrain.exit_code("distill.py", main))
