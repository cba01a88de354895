#!/usr/bin/env python3
"""Measure --ray_address on a cluster of several raylets on this machine, and what the driver can keep up with.

    python tests/benchmark_ray.py --image_dir ../shared/photos/ants_bees/train --graph ../shared/inception_model/\
classify_image_graph_def.pb

Three questions: what k nodes of one processor do against one of them; what the cluster costs on one machine against the
ordinary way; how many pictures a second can be scheduled, sent back and written when the network costs nothing. Nothing
of the user's is written to; $TMPDIR says where the files are.

The machine sets limits of its own. Its processors share memory and clock, so k plain processes of one thread, which
know nothing of each other, are no k times as fast as one either: they are timed in the same round, as the measure. And
the driver, its helpers and the raylets need a part of a processor: k nodes on k processors have to share them with it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import retrain  # noqa: E402


@contextlib.contextmanager
def cluster(nodes: int, cpus: int = 1, store_size: int = 250 << 20) -> Iterator[None]:
    """Be connected to a cluster of so many nodes of so many processors each, beside a head without any.

    store_size: bytes of each node's object store, of which the head has twice as much.
    """
    retrain.import_ray()
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2 * store_size})
    try:
        for _ in range(nodes):
            started.add_node(num_cpus=cpus, object_store_memory=store_size)
        started.wait_for_nodes()
        with retrain.ray_cluster(started.address):
            yield
    finally:
        started.shutdown()


def clocked_worker(clock: Path) -> type:
    """Return a ClusterWorker that appends to a file of this machine when each picture was computed."""

    class Clocked(retrain.ClusterWorker):
        def compute(self, job):
            result = super().compute(job)
            with open(clock, "ab") as file:
                file.write(np.float64(time.time()).tobytes())
            return result

    return Clocked


@contextlib.contextmanager
def busy_clock() -> Iterator[list[tuple[float, float]]]:
    """Note while the block runs the time, and how many seconds all processors of the machine were busy until then."""
    notes, over = [], threading.Event()

    def note() -> None:
        tick = os.sysconf("SC_CLK_TCK")
        while True:
            user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:8])
            notes.append((time.time(), (user + nice + system + sum(interrupts)) / tick))
            if over.wait(0.2):
                return

    thread = threading.Thread(target=note)
    thread.start()
    try:
        yield notes
    finally:
        over.set()
        thread.join()


def rate(base: retrain.BaseModel, images: list[retrain.Image], extract_all, warm_up: int) -> tuple[float, float]:
    """Return images per second, and processors that were busy, from `warm_up` pictures computed to the last one's file.

    So all processes have started and loaded the network. When pictures come back says little of when they were
    computed, since they come in blocks, late at first and together at the end: that made one processor look faster
    than its network alone. So the clock starts in the workers.
    """
    with tempfile.TemporaryDirectory() as folder:
        store, clock = retrain.BottleneckStore(f"{folder}/bottleneck", base, retrain.Reading()), Path(folder, "clock")
        came = []

        def timed(store: retrain.BottleneckStore, jobs: list) -> Iterator[tuple]:
            for finished in extract_all(store, jobs):
                came.append(time.time())
                yield finished

        worker, retrain.ClusterWorker = retrain.ClusterWorker, clocked_worker(clock)
        try:
            with busy_clock() as notes:
                retrain.compute_bottlenecks(store, images, extract_all=timed)
        finally:
            retrain.ClusterWorker = worker
        computed = np.sort(np.frombuffer(clock.read_bytes())) if clock.exists() else came
    assert len(came) == len(computed) == len(images)
    start, end = computed[warm_up - 1], came[-1]
    busy = np.diff(np.interp([start, end], *zip(*notes, strict=True))).item() / (end - start)
    return (len(came) - warm_up) / (end - start), busy


def plain_process(base: retrain.BaseModel, images: list[retrain.Image], barrier, times) -> None:
    """Compute features in one thread, as a worker does, from when all such processes are ready; tell when that was."""
    (network,) = retrain.networks(base, retrain.choose_engine("litert", cpu_threads=1), len(images))
    network(np.zeros([*base.input_size, 3], np.float32))
    barrier.wait()
    start = time.time()
    for image in images:
        pixels = retrain.read_image(image.path, retrain.Reading(), base.input_size)
        network(retrain.resize_bilinear(pixels, base.input_size))
    times.put((start, time.time()))


def plain_rate(base: retrain.BaseModel, images: list[retrain.Image], count: int) -> float:
    """Return the images per second of so many processes of one thread, without a cluster and without files."""
    spawn = multiprocessing.get_context("spawn")
    barrier, times = spawn.Barrier(count), spawn.Queue()
    processes = [
        spawn.Process(target=plain_process, args=(base, images[i::count], barrier, times)) for i in range(count)
    ]
    for process in processes:
        process.start()
    starts, ends = zip(*[times.get() for _ in processes], strict=True)
    for process in processes:
        process.join()
    return len(images) / (max(ends) - min(starts))


def plain_files(folder: Path, text: bytes, count: int) -> float:
    """Return how many files per second can be made here under a temporary name and renamed, and nothing else."""
    folder.mkdir()
    start = time.perf_counter()
    for i in range(count):
        file = os.open(f"{folder}/.{i}.tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(file, text)
        os.close(file)
        os.rename(f"{folder}/.{i}.tmp", f"{folder}/{i}.txt")
    return count / (time.perf_counter() - start)


def repeated(images: list[retrain.Image], count: int, folder: Path) -> list[retrain.Image]:
    """Return `count` pictures in a folder, links to those given."""
    made = []
    (folder / "many").mkdir()
    for i, image in zip(range(count), itertools.cycle(images), strict=False):
        path = folder / "many" / f"{i}{image.path.suffix}"
        path.symlink_to(image.path.resolve())
        made.append(retrain.Image(path, "many"))
    return made


def resident() -> int:
    """Return the resident size of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


def stub_worker(size: int) -> type:
    """Return a ClusterWorker whose network costs nothing, and gives `size` features."""

    class Stub(retrain.ClusterWorker):
        def __init__(self, parcel):
            values = np.random.default_rng(0).random(size, np.float32)
            self.result = [values], [",".join(map(str, values))], [0.0] * len(retrain.CUES)
            self.readers = self.computers = concurrent.futures.ThreadPoolExecutor(1)

        def compute(self, job):
            return job.row, self.result

    return Stub


def flood(base: retrain.BaseModel, count: int, size: int, folder: Path, shared_files: bool) -> None:
    """Print how fast `count` pictures go through a stub network on one node of all processors, and the memory."""
    base = retrain.dataclasses.replace(base, bottleneck_size=size)
    picture = folder / "picture.jpg"
    picture.write_bytes(b"x" * 1000)
    images = repeated([retrain.Image(picture, "many")], count, folder)
    sizes = []
    text = b"0.12345678," * size
    alone = plain_files(folder / "plain", text, count // 10)
    print(f"the file system alone, one thread: {alone:.0f} files/s", flush=True)
    shutil.rmtree(folder / "plain")
    worker, retrain.ClusterWorker = retrain.ClusterWorker, stub_worker(size)
    extract_all = functools.partial(retrain.extract_on_cluster, shared_files=shared_files)
    times = []

    def timed(store: retrain.BottleneckStore, jobs: list) -> Iterator[tuple]:
        for finished in extract_all(store, jobs):
            times.append(time.perf_counter())
            if len(times) % (count // 10) == 0:
                sizes.append(resident())
            yield finished

    with cluster(1, retrain.core_count(), 1 << 30):
        store = retrain.BottleneckStore(str(folder / "bottleneck"), base, retrain.Reading())
        cpu, start = time.process_time(), time.perf_counter()
        retrain.compute_bottlenecks(store, images, extract_all=timed)
        cpu, whole = time.process_time() - cpu, time.perf_counter() - start
    retrain.ClusterWorker = worker
    steady = (len(times) - count // 10) / (times[-1] - times[count // 10 - 1])
    print(
        f"{count} pictures of {size} features: {steady:.0f} images/s ({count / whole:.0f} with all starts), "
        f"the driver's processor time {1e6 * cpu / count:.0f} us a picture; its memory at each tenth, MB: {sizes}",
        flush=True,
    )


def tell(measured: dict[str, list[float]], cores: int) -> None:
    """Print the medians of what was measured in all rounds, and what the machine allowed."""

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(measured[above], measured[below], strict=True))

    for k in range(2, cores + 1):
        nodes = ratio(f"{k} nodes, images/s", "1 nodes, images/s")
        plain = ratio(f"{k} plain processes, images/s", "1 plain processes, images/s")
        beside = statistics.median(measured[f"{k} nodes, processors busy"]) - k
        print(
            f"{k} nodes against 1: {nodes:.2f} ({nodes / k:.2f} k); {k} plain processes against 1: {plain:.2f} "
            f"({plain / k:.2f} k), so {nodes / plain:.2f} of what the machine allows; beside the nodes, {beside:.1f} "
            f"of {cores - k} other processors were busy{'' if k < cores else ': the driver had none of its own'}"
        )
    overhead = 100 * (ratio("ordinary, images/s", "--ray_address local, images/s") - 1)
    print(f"--ray_address local costs {overhead:.1f} % more time")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_dir", type=Path, required=True, help="class folders of photographs")
    parser.add_argument("--graph", type=Path, required=True, help="the Inception-v3 graph")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200, help="photographs for each processor in every round")
    parser.add_argument(
        "--flood", type=int, default=200_000, help="synthetic pictures for the stub network; 0 for none"
    )
    parser.add_argument("--features", type=int, default=2048, help="features that the stub network gives")
    flags = parser.parse_args()
    cores = retrain.core_count()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder, "model")
        model_dir.mkdir()
        (model_dir / retrain.GRAPH_FILE).symlink_to(flags.graph.resolve())
        base = retrain.load_base_model(retrain.inception_recipe(model_dir), model_dir, model_dir)
        on_cluster = functools.partial(retrain.extract_on_cluster, shared_files=False)
        photographs = retrain.list_images(str(flags.image_dir))
        images = repeated(photographs, cores * flags.images, Path(folder))
        measured = {}

        def note(name: str, value: float) -> None:
            measured.setdefault(name, []).append(value)
            print(f"  {name}: {value:.2f}", flush=True)

        for i in range(flags.rounds if flags.images else 0):
            print(f"round {i + 1}:")
            for k in range(1, cores + 1):
                part = images[: k * flags.images]
                note(f"{k} plain processes, images/s", plain_rate(base, part, k))
                with cluster(k):
                    speed, busy = rate(base, part, on_cluster, len(part) // 4)
                note(f"{k} nodes, images/s", speed)
                note(f"{k} nodes, processors busy", busy)
            note("ordinary, images/s", rate(base, images, retrain.extract_here, len(images) // 4)[0])
            with retrain.ray_cluster("local"):
                note("--ray_address local, images/s", rate(base, images, on_cluster, len(images) // 4)[0])
        if measured:
            tell(measured, cores)
        if flags.flood:
            with tempfile.TemporaryDirectory() as flooded:
                flood(base, flags.flood, flags.features, Path(flooded), shared_files=True)


if __name__ == "__main__":
    main()
