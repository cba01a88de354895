"""Bottlenecks on a Ray cluster: several real raylets on this machine, each with a processor of its own."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script

import retrain

IMAGES = 60  # in image_dir
POISON = b"\xff\xd8 a picture whose decoder crashes"


@pytest.fixture(scope="module")
def cluster():
    """A cluster of a head without processors, where the command runs, and two nodes of one processor each."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")
    retrain.import_ray()
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 200 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        add_node(started)
    yield started
    started.shutdown()


@pytest.fixture(autouse=True)
def few_helpers(monkeypatch):
    """One process that reads and one that writes: each takes seconds to start."""
    monkeypatch.setattr(retrain, "MOST_HELPERS", 1)


def add_node(cluster):
    """Add a node of one processor to the cluster, and return it."""
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    return node


@pytest.fixture
def on_cluster(train, cluster):
    """A function like `train` that computes the bottlenecks on the cluster."""
    return lambda *flags: train("--ray_address", cluster.address, *flags)


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the bottleneck files below a folder hold, by `<class folder>/<file name>`."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*.txt")}


def skipped(folder: Path) -> dict[str, str]:
    """Return the list of skipped pictures in a folder of bottlenecks: {path: reason}."""
    lines = (folder / "skipped_inception_v3.tsv").read_text("utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def replace_worker(monkeypatch, before: callable) -> None:
    """Have the cluster's workers call `before(picture's bytes)` ahead of each picture."""

    class Worker(retrain.ClusterWorker):  # a local class travels by value, so that the workers need no test files
        def compute(self, read):
            before(read)
            return super().compute(read)

    monkeypatch.setattr(retrain, "ClusterWorker", Worker)


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """A list of the keys of the pictures whose features come back from the cluster, each time they do."""
    keys, kept = [], retrain.kept

    def noted(store, job, result):
        keys.append(job[0].key)
        return kept(store, job, result)

    monkeypatch.setattr(retrain, "kept", noted)
    return keys


# The same as on one machine


@pytest.mark.parametrize("shared", [False, True], ids=["bytes travel", "shared files"])
def test_files_are_the_same_as_one_machines(train, on_cluster, tmp_path, image_dir, done, shared):
    (image_dir / "blue/broken.jpg").write_bytes(b"no picture")
    distorted = () if shared else ("--flip_left_right", "--random_crop", 20, "--distortions_per_image", 2)
    assert train("--bottleneck_dir", "here", *distorted) == 0
    assert on_cluster("--bottleneck_dir", "there", *distorted, *["--ray_shared_files"] * shared) == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert (len(contents(tmp_path / "there")) > 2 * IMAGES) is bool(distorted)
    assert skipped(tmp_path / "there") == skipped(tmp_path / "here")
    done.clear()
    assert train("--bottleneck_dir", "there", *distorted) == 0  # either takes what the other has kept
    assert on_cluster("--bottleneck_dir", "here", *distorted) == 0
    assert done == ["blue/broken.jpg"]


def test_what_was_done_is_not_done_again(on_cluster, tmp_path, image_dir, done):
    assert on_cluster() == 0
    before = contents(tmp_path / "bottleneck")
    (tmp_path / "bottleneck/green/green_03.jpg_inception_v3.txt").unlink()
    shutil.copy(image_dir / "blue/blue_00.jpg", image_dir / "blue/blue_07.jpg")
    done.clear()
    assert on_cluster() == 0
    assert sorted(done) == ["blue/blue_07.jpg", "green/green_03.jpg"]
    after = contents(tmp_path / "bottleneck")
    assert [name for name in after if after[name] != before[name]] == ["blue/blue_07.jpg_inception_v3.txt"]


@pytest.mark.parametrize("tries", [retrain.TRIES_OF_BLOCK, 0], ids=["Ray does it again", "left for the second round"])
def test_400_photographs_and_a_node_that_is_lost(shared, cluster, tmp_path, done, monkeypatch, tries):
    """Byte for byte the features of one machine, although a node is killed after a quarter of the pictures."""
    monkeypatch.setattr(retrain, "TRIES_OF_BLOCK", tries)
    monkeypatch.setattr(retrain, "MOST_HELPERS", 2)
    base = retrain.load_base_model(retrain.efficientnet_recipe("efficientnet_lite2"), tmp_path, tmp_path)
    images = retrain.list_images(str(shared / "photos/cats_dogs"))
    assert len(images) == 400
    here, there = (retrain.BottleneckStore(str(tmp_path / name), base, retrain.Reading()) for name in ("here", "there"))
    expected, _ = retrain.compute_bottlenecks(here, images)
    replace_worker(monkeypatch, lambda read: time.sleep(0.02))  # else it is over before a node is missed
    node = add_node(cluster)

    def kill() -> None:
        while len(done) < 100:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)  # which a failure would leave waiting
    killer.start()
    with retrain.ray_cluster(cluster.address):
        extract_all = retrain.functools.partial(retrain.extract_on_cluster, shared_files=False)
        features, unusable = retrain.compute_bottlenecks(there, images, extract_all=extract_all)
    killer.join()
    assert not unusable
    np.testing.assert_array_equal(features, expected)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert sorted(done) == sorted(image.key for image in images)  # nothing is missing, nothing is there twice


def test_an_error_that_ray_data_logs_keeps_no_frames_and_stays_in_its_log():
    """A handler that keeps records, as pytest's does, would keep processes, and those processors."""
    retrain.import_ray()
    logger, kept, text = logging.getLogger("ray.data"), [], io.StringIO()
    handlers = [logging.StreamHandler(text), logging.Handler()]
    handlers[1].emit = kept.append
    for handler in handlers:
        logger.addHandler(handler)
    try:
        raise ValueError("a block is lost")
    except ValueError as error:
        logging.getLogger("ray.data.some.module").error("Ignored: %s", error, exc_info=error)
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
    assert not kept[0].exc_info and not kept[0].args
    assert text.getvalue().startswith("Ignored: a block is lost\nTraceback")


@pytest.mark.parametrize(
    ("count", "cores", "size", "together"),
    [
        (1, 4, 1000, 1),
        (64, 4, 1000, 4),  # four blocks for each processor
        (512, 4, 1000, 16),  # eight for each at first
        (10_000, 4, 1000, 64),
        (200_000, 4, 1000, 256),  # a hundred and more blocks for each
        (200_000, 20, 1000, 100),
        (200_000, 4, 4 << 20, 15),  # of large photographs fewer
        (10_000, 4, 1 << 30, 1),
    ],
)
def test_so_many_pictures_travel_together(count, cores, size, together):
    path = retrain.StoredPath("s3://bucket/photos", "bucket/photos/blue/0.jpg", size)
    sizes = retrain.block_sizes([(retrain.Image(path, "blue"), "", {})] * count, cores, 2048)
    assert sum(sizes) == count
    assert sizes[0] == pytest.approx(together, abs=1)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= 8  # so that all processors end at about one time


# What goes wrong


def test_a_picture_that_kills_its_worker_is_skipped(on_cluster, tmp_path, image_dir, monkeypatch):
    (image_dir / "blue/poison.jpg").write_bytes(POISON)

    def crash(read: bytes) -> None:
        if POISON in read:
            os.kill(os.getpid(), signal.SIGKILL)

    replace_worker(monkeypatch, crash)
    monkeypatch.setattr(retrain, "TRIES_OF_BLOCK", 1)  # each takes seconds
    monkeypatch.setattr(retrain, "TRIES_OF_PICTURE", 1)
    assert on_cluster() == 0
    reason = "the process that decodes it dies, again and again"
    assert skipped(tmp_path / "bottleneck") == {"pictures/blue/poison.jpg": reason}
    assert len(contents(tmp_path / "bottleneck")) == IMAGES


def test_a_worker_that_fails_ends_the_run_with_a_sentence(on_cluster, tmp_path, monkeypatch, capsys):
    def fail(read: bytes) -> None:
        raise ZeroDivisionError("no such luck")

    replace_worker(monkeypatch, fail)
    assert on_cluster() == 1
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("retrain.py: "))
    assert said == "retrain.py: error: a worker of the cluster failed (ZeroDivisionError('no such luck'))."


def test_a_network_that_no_worker_can_load_ends_the_run_with_a_sentence(on_cluster, monkeypatch, capsys):
    class Worker(retrain.ClusterWorker):
        def __init__(self, parcel):
            raise retrain.UserError("LiteRT can't be loaded here.")

    monkeypatch.setattr(retrain, "ClusterWorker", Worker)
    assert on_cluster() == 1
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("retrain.py: "))
    assert said.startswith("retrain.py: error: --ray_address: the cluster at ")
    assert "LiteRT can't be loaded here." in said


def test_a_node_without_our_packages_ends_the_run_with_a_sentence(cluster, image_dir, model_dir, tmp_path):
    script = (ROOT / "retrain.py").read_text("utf-8")
    missing = "    if not os.environ.get('ON_THE_DRIVER'):\n        raise ImportError('No module named simplejpeg')\n"
    (tmp_path / "retrain.py").write_text(script.replace("    import simplejpeg\n", missing, 1), "utf-8")
    shutil.copytree(ROOT / "inception_model", tmp_path / "inception_model")
    flags = ["--ray_address", cluster.address, "--image_dir", "pictures", "--model_dir", model_dir]
    command = [sys.executable, "retrain.py", *map(str, flags)]
    environment = os.environ | {"ON_THE_DRIVER": "1"}
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1
    said = failed.stderr.splitlines()[-1]
    assert said.startswith(f"retrain.py: error: --ray_address: the cluster at {cluster.address} gave up on ")
    assert "No module named simplejpeg" in said


def test_a_head_that_is_lost_ends_the_process_with_a_sentence():
    """That of a socket here, since Ray takes a minute to lose one; the process itself is busy elsewhere."""
    watch = "import retrain, sys, threading, time; over = threading.Event(); print(flush=True)\n"
    watch += "threading.Thread(target=retrain.watch_head, args=(sys.argv[1], over, 0.1)).start(); time.sleep(60)"
    with socket.create_server(("127.0.0.1", 0), backlog=100) as head:
        address = "{}:{}".format(*head.getsockname())
        command = [sys.executable, "-c", watch, address]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(2)
        assert process.poll() is None
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert f"error: --ray_address: the cluster's head {address} is out of reach" in said
    over = threading.Event()
    over.set()
    retrain.watch_head(address, over, 60)  # returns at once when it isn't needed any more


# Runs retrain.py in a process of its own, whose workers take their time.
SLOW_SCRIPT = """
import sys, time
import retrain

class Worker(retrain.ClusterWorker):
    def compute(self, read):
        time.sleep(0.1)
        return super().compute(read)

retrain.ClusterWorker = Worker
retrain.end_process(retrain.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_an_orderly_way(cluster, on_cluster, model_dir, image_dir, tmp_path, done, how, code):
    """One sentence, and no half files under their names; the processors are free again; the same command goes on.

    Ray ends its processes as SIGKILL does, so a temporary file of one that was writing may stay.
    """
    flags = ["--image_dir", "pictures", "--model_dir", model_dir, "--ray_address", cluster.address]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SCRIPT, *map(str, flags)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(contents(tmp_path / "bottleneck")) < 5:
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be stopped"
        time.sleep(0.02)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code
    said = [line for line in said.splitlines() if not line.startswith("Bottlenecks: ")]
    assert said == ["retrain.py: stopped; what is done is kept, and the same command goes on from there."]
    time.sleep(1)  # whoever writes for it may finish a file
    kept = contents(tmp_path / "bottleneck")
    assert len(kept) < IMAGES
    assert all(text.count(b",") == 15 for text in kept.values())
    assert on_cluster() == 0
    assert len(done) == IMAGES - len(kept)
    assert kept.items() <= contents(tmp_path / "bottleneck").items()


def test_bottlenecks_that_cannot_be_written_end_the_run_with_a_sentence(on_cluster, tmp_path, capsys):
    (tmp_path / "bottleneck").mkdir()
    (tmp_path / "bottleneck/green").write_text("a file where a folder should be")
    assert on_cluster() == 1
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("retrain.py: "))
    assert "bottleneck/green/green_" in said
    assert "could not be written (" in said


def test_ray_that_is_missing_is_asked_for_by_name(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert train("--ray_address", "auto") == 1
    said = capsys.readouterr().err
    assert said.startswith("retrain.py: error: --ray_address needs Ray (")
    assert said.endswith(f"{sys.executable} -m pip install -r requirements-ray.txt\n")


def test_a_cluster_that_is_not_there(cluster, train, capsys):
    assert train("--ray_address", "127.0.0.1:9") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("retrain.py: error: --ray_address 127.0.0.1:9: there is no cluster to connect to (")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image_dir", "s3://bucket/photos"], "--image_dir: an object store is read by a Ray cluster"),
        (
            ["--image_dir", "s3://bucket/photos", "--ray_address", "auto", "--split_file", "splits.tsv"],
            "--split_file: it needs an --image_dir that is a folder",
        ),
        (
            ["--image_dir", "s3://b/x", "--crawl_dir", "s3://b/x", "--crawl", "n", "--crawl_count", "1"]
            + ["--ray_address", "auto"],
            "--crawl_dir: pictures are crawled into a folder",
        ),
        (["--ray_shared_files"], "--ray_shared_files: there are no nodes without --ray_address"),
        (["--ray_address", "ray://head:10001"], "--ray_address: give host:port of the cluster's head"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, sentence, tmp_path):
    failed = run_script("retrain.py", *arguments, cwd=tmp_path)
    assert failed.returncode == 2
    assert sentence in failed.stderr


# Object stores


@pytest.fixture
def bucket(image_dir):
    """A folder of a bucket on an S3 server of this machine that holds what image_dir does, and a file that is none."""
    server_of = pytest.importorskip("moto.server", reason="moto is not installed")
    import boto3

    server = server_of.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    place = "{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{place}",
        region_name="us-east-1",
        aws_access_key_id="someone",
        aws_secret_access_key="secret",
    )
    client.create_bucket(Bucket="bucket")
    for path in sorted(path for path in image_dir.rglob("*") if path.is_file()):
        key = f"photos/pictures/{path.relative_to(image_dir).as_posix()}"
        client.put_object(Bucket="bucket", Key=key, Body=path.read_bytes())
    client.put_object(Bucket="bucket", Key="photos/pictures/blue/broken.jpg", Body=b"no picture")
    yield f"s3://someone:secret@bucket/photos/pictures?endpoint_override={place}&scheme=http&region=us-east-1"
    server.stop()


def test_pictures_in_an_object_store(train, on_cluster, bucket, tmp_path, capfd, done):
    assert train("--bottleneck_dir", "here") == 0
    capfd.readouterr()
    assert on_cluster("--bottleneck_dir", "there", "--image_dir", bucket) == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    reason = "not an image in JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC format"
    assert skipped(tmp_path / "there") == {"s3://bucket/photos/pictures/blue/broken.jpg": reason}
    assert "secret" not in "".join(capfd.readouterr())
    done.clear()
    assert on_cluster("--bottleneck_dir", "there", "--image_dir", bucket) == 0
    assert done == ["blue/broken.jpg"]


@pytest.fixture
def copies(image_dir) -> bytes:
    """A picture that lies in image_dir twice more: in its class, and in another."""
    blue = (image_dir / "blue/blue_00.jpg").read_bytes()
    for name in ("blue/copy.jpg", "green/wrong.jpg"):
        (image_dir / name).write_bytes(blue)
    return blue


def test_report_on_pictures_in_an_object_store(on_cluster, copies, bucket, tmp_path):
    """Copies are found, mistakes drawn and doubtful pictures copied as if they lay in a folder."""
    flags = ("--image_dir", bucket, "--quarantine", "doubtful", "--how_many_training_steps", 200)
    assert on_cluster(*flags, "--learning_rate", 0.1, "--random_seed", 1) == 0
    report = json.loads((tmp_path / "output_report.json").read_text("utf-8"))
    same = [{pair["first"], pair["second"]} for pair in report["duplicates"] if pair["same_file"]]
    assert {"blue/blue_00.jpg", "green/wrong.jpg"} in same or {"blue/copy.jpg", "green/wrong.jpg"} in same
    assert "green/wrong.jpg" in [doubt["picture"] for doubt in report["doubtful"]]
    assert (tmp_path / "doubtful/green/wrong.jpg").read_bytes() == copies
    assert (tmp_path / "output_report.png").stat().st_size > 10_000


def test_a_stored_file_that_is_too_large(copies, bucket, monkeypatch):
    path = retrain.StoredPath(bucket, f"{retrain.open_store(bucket)[1]}/blue/copy.jpg")
    monkeypatch.setattr(retrain, "MOST_BYTES", len(copies))
    assert retrain.read_bytes(path) == copies
    monkeypatch.setattr(retrain, "MOST_BYTES", len(copies) - 1)
    with pytest.raises(retrain.ImageError, match="larger than"):
        retrain.read_bytes(path)


def test_an_object_store_that_is_not_there(on_cluster, bucket, capfd):
    assert on_cluster("--image_dir", bucket.replace("bucket/photos", "bucket/nothing")) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("retrain.py: error: --image_dir: s3://bucket/nothing/pictures could not be listed (")
    assert on_cluster("--image_dir", "nosuch://bucket/photos") == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert "there is no way to such an object store (" in said


def test_a_change_in_a_store_that_fsspec_knows_is_noticed():
    """Such stores tell the time of a change, or else an ETag, under keys that pyarrow doesn't look for."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec comes with requirements-ray.txt")
    folder = retrain.StoredPath("memory://photos/blue", "/photos/blue")
    changed = []
    for content in (b"one", b"two"):
        fsspec.filesystem("memory").pipe("/photos/blue/a.jpg", content)
        (((path, kind),)) = retrain.stored_entries(folder)
        assert (path.name, path.size, kind) == ("a.jpg", 3, "file")
        changed.append(path.changed)
    assert abs(changed[0] / 1e9 - time.time()) < 3600 and changed[0] < changed[1]
    assert retrain.time_in({"mtime": 12.5}) == 12_500_000_000
    assert 0 < retrain.time_in({"ETag": "a"}) != retrain.time_in({"ETag": "b"}) > 0
    assert retrain.time_in({"size": 3}) == 0


@pytest.mark.parametrize("url", ["dir://x", "nosuch://x"])
def test_a_store_that_cannot_be_opened_is_told_in_a_sentence(url):
    pytest.importorskip("pyarrow", reason="pyarrow comes with requirements-ray.txt")
    with pytest.raises(retrain.UserError, match=f"--image_dir {url}: there is no way to such an object store"):
        retrain.open_store(url)


@pytest.fixture
def started_by_hand(tmp_path) -> Iterator[str]:
    """Run the README's two `ray start`, each for as long as the test takes; yields the address of the head."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")
    head, node = re.findall(r"^ray (start .*?)  +#", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    limits = ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats", "--block"]
    with contextlib.ExitStack() as stack:
        started: list[subprocess.Popen] = []
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))  # is short

        def start(*arguments: object) -> None:
            command = [ray, *map(str, arguments), *limits]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            started.append(process)

        start(*head.split(), "--port", port, "--temp-dir", place, "--include-dashboard", "false")
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.2)
        start(*node.replace("HEAD:6379", f"127.0.0.1:{port}").split())
        wait = f"import ray, time; ray.init('127.0.0.1:{port}')\nwhile len(ray.nodes()) < 2: time.sleep(0.2)"
        subprocess.run([sys.executable, "-c", wait], env=environment, capture_output=True, timeout=90, check=True)
        yield f"127.0.0.1:{port}"
        for entry in Path("/proc").glob("[0-9]*/cmdline"):  # what they have started, for which they would wait long
            with contextlib.suppress(OSError):
                if place.encode() in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
        for process in started:
            process.kill()
            process.wait()


def test_the_commands_of_the_readme(started_by_hand, image_dir, model_dir):
    environment = os.environ | {"RAY_ADDRESS": started_by_hand, "RAY_AUTH_MODE": "disabled"}  # where `auto` looks first
    flags = ("--image_dir", image_dir, "--model_dir", model_dir, "--how_many_training_steps", 20, "--no_report")
    done = run_script("retrain.py", "--ray_address", "auto", *flags, cwd=image_dir.parent, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(contents(image_dir.parent / "bottleneck")) == IMAGES


def test_passwords_in_an_address_are_not_told(cluster, train, capsys):
    for url in ("s3://me:secret@bucket/x?bogus=1", "nonsense://me:secret@bucket/x?key=secret"):
        assert train("--image_dir", url, "--ray_address", cluster.address) == 1
        said = capsys.readouterr().err
        assert f"--image_dir {url.partition(':')[0]}://bucket/x: there is no way" in said
        assert "secret" not in said
    assert retrain.shown("s3://key:sec/ret+1@bucket/x") == "s3://bucket/x"
    assert retrain.shown("hdfs://me@head:8020/a@b/c") == "hdfs://head:8020/a@b/c"
    assert retrain.shown("hdfs://head:8020/a@b/c") == "hdfs://head:8020/a@b/c"
    assert retrain.shown("s3://bucket/a@b/c") == "s3://bucket/a@b/c"
    assert retrain.shown("C:/pictures?") == "C:/pictures?"


def test_large_files_and_variants_count_in_a_block():
    def job(size: int, variants: int = 1) -> tuple:
        path = retrain.StoredPath("s3://bucket/photos", "bucket/photos/blue/0.jpg", size)
        return retrain.Image(path, "blue"), "", dict.fromkeys(range(variants))

    sizes = retrain.block_sizes([job(100 << 20)] * 10 + [job(1000)] * 2000, 4, 2048)
    assert sizes[:10] == [1] * 10 and sizes[10] > 30
    assert max(retrain.block_sizes([job(1000, variants=1000)] * 100, 1, 2048)) <= 2


def test_a_stored_file_that_is_too_large_is_not_fetched():
    path = retrain.StoredPath("s3://nowhere/photos", "nowhere/photos/blue/film.mp4", 1 << 40)
    with pytest.raises(retrain.ImageError, match="larger than 150 MB"):
        retrain.read_bytes(path)
