"""Bottlenecks on a Ray cluster: several real raylets on this machine, each with a processor of its own."""

from __future__ import annotations

import contextlib
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

import pytest
from conftest import ROOT, run_script

import retrain

IMAGES = 60  # in image_dir
POISON = b"\xff\xd8 a picture whose decoder crashes"


@pytest.fixture(scope="module")
def s3():
    """A client of an S3 server on this machine, which the environment names to whatever is started after it."""
    server_of = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -r requirements-ray.txt")
    import boto3

    server = server_of.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    settings = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield boto3.client("s3")
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3):
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


def add_node(cluster):
    """Add a node of one processor to the cluster, and return it."""
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    return node


@pytest.fixture
def on_cluster(train, cluster):
    """A function like `train` that computes the bottlenecks on the cluster."""
    return lambda *flags: train("--ray_address", cluster.address, *flags)


def replace_worker(monkeypatch, before: callable) -> None:
    """Have the cluster's workers call `before(image's bytes)` ahead of each image."""

    class Worker(retrain.ClusterWorker):  # a local class travels by value, so that the workers need no test files
        def compute(self, read):
            before(read[1])
            return super().compute(read)

    monkeypatch.setattr(retrain, "ClusterWorker", Worker)


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """A list of the keys of the images that come back from the cluster, each time they do."""
    keys, on_cluster = [], retrain.extract_on_cluster

    def noted(store, jobs, **options):
        for job, result in on_cluster(store, jobs, **options):
            keys.append(job.key)
            yield job, result

    monkeypatch.setattr(retrain, "extract_on_cluster", noted)
    return keys


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the bottleneck files below a folder hold, by `<class folder>/<file name>`."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*.txt")}


def skipped(folder: Path) -> dict[str, str]:
    """Return the list of skipped pictures in a folder of bottlenecks: {path: reason}."""
    lines = (folder / "skipped_inception_v3.tsv").read_text("utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


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
def test_a_node_is_lost_and_nothing_with_it(train, on_cluster, cluster, tmp_path, image_dir, done, monkeypatch, tries):
    """Byte for byte the features of one machine, although a node is killed after a part of the images."""
    monkeypatch.setattr(retrain, "TRIES_OF_BLOCK", tries)
    for path in list(image_dir.glob("*/*.jpg")):
        for i in range(4):
            shutil.copy(path, path.with_name(f"{i}{path.name}"))
    assert train("--bottleneck_dir", "here", "--no_report") == 0
    replace_worker(monkeypatch, lambda data: time.sleep(0.05))  # else it is over before a node is missed
    node = add_node(cluster)

    def kill() -> None:
        while len(done) < 30:
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)  # which a failure would leave waiting
    killer.start()
    assert on_cluster("--bottleneck_dir", "there", "--no_report") == 0
    killer.join()
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert len(done) == len(set(done)) == 5 * IMAGES  # nothing is missing, nothing is there twice


# What goes wrong


def test_a_picture_that_kills_its_worker_is_skipped(on_cluster, tmp_path, image_dir, monkeypatch):
    (image_dir / "blue/poison.jpg").write_bytes(POISON)

    def crash(data: bytes) -> None:
        if POISON in data:
            os.kill(os.getpid(), signal.SIGKILL)

    replace_worker(monkeypatch, crash)
    monkeypatch.setattr(retrain, "TRIES_OF_BLOCK", 1)  # each takes seconds
    monkeypatch.setattr(retrain, "TRIES_OF_IMAGE", 1)
    assert on_cluster() == 0
    reason = "the process that decodes it dies, again and again"
    assert skipped(tmp_path / "bottleneck") == {"pictures/blue/poison.jpg": reason}
    assert len(contents(tmp_path / "bottleneck")) == IMAGES


def test_a_worker_that_fails_ends_the_run_with_a_sentence(on_cluster, tmp_path, monkeypatch, capsys):
    def fail(data: bytes) -> None:
        raise ZeroDivisionError("no such luck")

    replace_worker(monkeypatch, fail)
    assert on_cluster() == 1
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("retrain.py: "))
    assert said == "retrain.py: error: a worker of the cluster failed (ZeroDivisionError('no such luck'))."


def test_a_node_without_our_packages_ends_the_run_with_a_sentence(cluster, image_dir, model_dir, tmp_path):
    shutil.copy(ROOT / "retrain.py", tmp_path)
    script = (ROOT / "predict.py").read_text("utf-8")
    missing = "    if not os.environ.get('ON_THE_DRIVER'):\n        raise ImportError('No module named simplejpeg')\n"
    (tmp_path / "predict.py").write_text(script.replace("    import simplejpeg\n", missing, 1), "utf-8")
    flags = ["--ray_address", cluster.address, "--image_dir", "pictures", "--model_dir", model_dir]
    command = [sys.executable, "retrain.py", *map(str, flags)]
    environment = os.environ | {"ON_THE_DRIVER": "1"}
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1
    said = failed.stderr.splitlines()[-1]
    assert said.startswith(f"retrain.py: error: --ray_address: the cluster {cluster.address} gave up on ")
    assert "No module named simplejpeg" in said


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


def test_stopped_in_an_orderly_way(cluster, on_cluster, model_dir, image_dir, tmp_path, done):
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
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    said = [line for line in said.splitlines() if line and not line.startswith("Bottlenecks: ")]
    assert said == ["retrain.py: stopped; what is done is kept, and the same command goes on from there."]
    time.sleep(1)  # whoever writes for it may finish a file
    kept = contents(tmp_path / "bottleneck")
    assert len(kept) < IMAGES
    assert all(text.count(b",") == 15 for text in kept.values())
    assert on_cluster() == 0
    assert len(done) == IMAGES - len(kept)
    assert kept.items() <= contents(tmp_path / "bottleneck").items()


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


# Object stores


def test_images_in_an_object_store(s3, train, on_cluster, image_dir, tmp_path, done):
    """They give the same files; what lies there is read for the report; a change there is noticed."""
    s3.create_bucket(Bucket="bucket")
    for path in sorted(path for path in image_dir.rglob("*") if path.is_file()):
        s3.upload_file(str(path), "bucket", f"photos/pictures/{path.relative_to(image_dir).as_posix()}")
    s3.put_object(Bucket="bucket", Key="photos/pictures/blue/broken.jpg", Body=b"no picture")
    assert train("--bottleneck_dir", "here", "--no_report") == 0
    assert on_cluster("--bottleneck_dir", "there", "--image_dir", "s3://bucket/photos/pictures") == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    (place,) = skipped(tmp_path / "there")
    assert place == "s3://bucket/photos/pictures/blue/broken.jpg"
    done.clear()
    other = (image_dir / "green/green_00.jpg").read_bytes()
    s3.put_object(Bucket="bucket", Key="photos/pictures/blue/blue_00.jpg", Body=other)
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # another process would not remember the listing
    assert on_cluster("--bottleneck_dir", "there", "--image_dir", "s3://bucket/photos/pictures", "--no_report") == 0
    assert sorted(done) == ["blue/blue_00.jpg", "blue/broken.jpg"]


def test_an_object_store_that_is_not_there(on_cluster, capsys):
    for url in ("s3://none/x", "nosuch://me:secret@none/x"):
        assert on_cluster("--image_dir", url) == 1
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("retrain.py: error: "))
        assert "could not be listed" in line and "secret" not in line


@pytest.fixture
def started_by_hand(tmp_path) -> Iterator[str]:
    """Run the two `ray start` of tests/README.md for as long as the test takes; yields the address of the head."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")
    head, node = re.findall(r"^ray (start .*?)  +#", (ROOT / "tests/README.md").read_text("utf-8"), re.MULTILINE)
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
