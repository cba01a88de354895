"""Bottlenecks on a Ray cluster: several real raylets on this machine, each with a processor of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, make_image_dir, run_script

import retrain

POISON = b"\xff\xd8 an image whose decoder crashes"
NEEDS_RAY = "Ray is not installed: pip install -r requirements-ray.txt"


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
    """A cluster of a head without processors, where the command runs, and a node of one processor."""
    pytest.importorskip("ray", reason=NEEDS_RAY)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 200 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    add_node(started)
    yield started
    started.shutdown()


def add_node(cluster):
    """Add a node of one processor to the cluster, and return it."""
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    return node


@pytest.fixture(scope="module")
def connected(cluster):
    """The cluster, to which this process is connected."""
    with retrain.ray_cluster(cluster.address):
        yield cluster


@pytest.fixture
def few(tmp_path) -> Path:
    """An --image_dir with four images of each of three classes, and one that can't be read."""
    folder = make_image_dir(tmp_path / "few", 4)
    (folder / "blue/broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def compute(model_dir, tmp_path):
    """A function that computes what is missing of the bottlenecks of an --image_dir below `name`.

    It returns those files, {name: content}, and the reasons by the file names of the images that were skipped.
    """
    base = retrain.load_base_model(retrain.inception_recipe(model_dir), model_dir, model_dir)

    def run(image_dir: object, name: str, extract_all: Callable = retrain.extract_here, **options) -> tuple:
        store = retrain.BottleneckStore(str(tmp_path / name), base, retrain.Reading())
        images = retrain.list_images(str(image_dir))
        skipped = retrain.compute_bottlenecks(store, images, extract_all=extract_all, **options)[2]
        return contents(tmp_path / name), {path.name: reason for path, reason in skipped.items()}

    return run


by_bytes = functools.partial(retrain.extract_on_cluster, shared_files=False)
by_paths = functools.partial(retrain.extract_on_cluster, shared_files=True)


def nothing_to_do(store, jobs):
    """Stand for extract_on_cluster where no image may be asked for but the broken one."""
    assert [job.path.name for job in jobs] == ["broken.jpg"]
    yield jobs[0], "it is as broken as before"


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the bottleneck files below a folder hold, by `<class folder>/<file name>`."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*.txt")}


def before_each(monkeypatch, before: Callable) -> None:
    """Have the cluster's processes call `before(image's bytes)` for the images of a block ahead of it."""
    whole = retrain.extract_block

    def extract_block(parcels, jobs):  # a local function travels by value, so that the nodes need no test files
        for job in jobs:
            before(job.data or job.path.read_bytes())
        return whole(parcels, jobs)

    monkeypatch.setattr(retrain, "extract_block", extract_block)


# The same as on one machine


@pytest.mark.parametrize("extract", [by_bytes, by_paths], ids=["bytes travel", "shared files"])
def test_files_are_the_same_as_one_machines(connected, compute, few, extract):
    options = {"distortion": retrain.Distortion(flip_left_right=True), "count": 2} if extract is by_bytes else {}
    here = compute(few, "here", **options)
    assert compute(few, "there", extract, **options) == here
    assert len(here[0]) == (24 if options else 12) and list(here[1]) == ["broken.jpg"]
    for name in ("here", "there"):  # either takes what the other has kept
        assert compute(few, name, nothing_to_do, **options)[0] == here[0]


def test_a_node_is_lost_and_nothing_with_it(connected, compute, image_dir, monkeypatch):
    """Byte for byte the features of one machine, although a node is killed after a part of the images."""
    before_each(monkeypatch, lambda data: time.sleep(0.05))  # else it is over before a node is missed
    node, done = add_node(connected), []

    def extract(store, jobs):
        for job, result in by_bytes(store, jobs):
            done.append(job.row)
            if len(done) == 10:
                connected.remove_node(node, allow_graceful=False)
            yield job, result

    assert compute(image_dir, "there", extract) == compute(image_dir, "here")
    assert len(done) == len(set(done)) == 60  # nothing is missing, nothing is there twice


# What goes wrong


def test_an_image_that_kills_its_worker_is_skipped(connected, compute, image_dir, monkeypatch):
    """And no other: those of its block are left for the second round."""
    (image_dir / "blue/poison.jpg").write_bytes(POISON)

    def crash(data: bytes) -> None:
        if POISON in data:
            os.kill(os.getpid(), signal.SIGKILL)

    before_each(monkeypatch, crash)
    monkeypatch.setattr(retrain, "RETRIES", 0)  # each takes seconds
    files, skipped = compute(image_dir, "there", by_paths)
    assert skipped == {"poison.jpg": "the process that decodes it dies, again and again"}
    assert len(files) == 60


def test_a_process_that_fails_ends_the_run(connected, compute, few, monkeypatch):
    def fail(data: bytes) -> None:
        raise ZeroDivisionError("no such luck")

    before_each(monkeypatch, fail)
    with pytest.raises(pytest.importorskip("ray").exceptions.RayTaskError, match="ZeroDivisionError: no such luck$"):
        compute(few, "there", by_paths)


def test_a_node_without_our_packages_ends_the_run_with_a_sentence(cluster, few, model_dir, tmp_path):
    shutil.copy(ROOT / "retrain.py", tmp_path)
    script = (ROOT / "predict.py").read_text("utf-8")
    missing = "    if not os.environ.get('ON_THE_DRIVER'):\n        raise ImportError('No module named simplejpeg')\n"
    (tmp_path / "predict.py").write_text(script.replace("    import simplejpeg\n", missing, 1), "utf-8")
    flags = ["--ray_address", cluster.address, "--image_dir", few, "--model_dir", model_dir]
    command = [sys.executable, "retrain.py", *map(str, flags)]
    environment = os.environ | {"ON_THE_DRIVER": "1"}
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1
    said = failed.stderr.splitlines()[-1]
    assert said.startswith(f"retrain.py: error: --ray_address: the cluster {cluster.address} gave up on ")
    assert "No module named simplejpeg" in said


# Runs retrain.py in a process of its own, whose workers take their time.
SLOW_SCRIPT = """
import os, sys, time
import retrain

whole = retrain.extract_block

def extract_block(parcels, jobs):
    time.sleep(0.1 * len(jobs))
    return whole(parcels, jobs)

retrain.extract_block = extract_block
os._exit(retrain.main(sys.argv[1:]))
"""


def test_stopped_in_an_orderly_way(connected, model_dir, image_dir, tmp_path):
    """One sentence, no half files under their names, and the processors are free again."""
    import ray

    flags = ["--ray_address", "auto", "--image_dir", "pictures", "--model_dir", model_dir]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SCRIPT, *map(str, flags)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": connected.address},  # where `auto` looks first
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(contents(tmp_path / "bottleneck")) < 5:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    said = [line for line in said.splitlines() if line and not line.startswith("Bottlenecks: ")]
    assert said == ["retrain.py: stopped; what is done is kept."]
    kept = contents(tmp_path / "bottleneck")
    assert len(kept) < 60
    assert all(text.count(b",") == 15 for text in kept.values())
    while ray.available_resources().get("CPU", 0) < 1:
        time.sleep(0.1)


def test_ray_that_is_missing_is_asked_for_by_name(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert train("--ray_address", "auto") == 1
    said = capsys.readouterr().err
    assert said.startswith("retrain.py: error: --ray_address needs Ray (")
    assert said.endswith(f"{sys.executable} -m pip install -r requirements-ray.txt\n")


def test_a_cluster_that_is_not_there(train, capsys):
    pytest.importorskip("ray", reason=NEEDS_RAY)
    assert train("--ray_address", "127.0.0.1:9") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("retrain.py: error: --ray_address 127.0.0.1:9: there is no cluster to connect to (")


# Object stores


def test_images_in_an_object_store(s3, connected, compute, few):
    """They give the same files, and a change there is noticed."""
    s3.create_bucket(Bucket="bucket")
    for path in few.glob("*/*"):
        s3.upload_file(str(path), "bucket", f"photos/few/{path.relative_to(few).as_posix()}")
    url = "s3://bucket/photos/few"
    assert compute(url, "there", by_bytes) == compute(few, "here")
    s3.put_object(Bucket="bucket", Key="photos/few/blue/blue_00.jpg", Body=(few / "green/green_00.jpg").read_bytes())
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # another process would not remember the listing
    asked = []
    compute(url, "there", lambda store, jobs: (asked.append(job.path.name) or (job, "not now") for job in jobs))
    assert asked == ["blue_00.jpg", "broken.jpg"]


def test_an_object_store_that_is_not_there(s3):
    for url in ("s3://none/x", "nosuch://me:secret@none/x"):
        with pytest.raises(retrain.UserError, match="could not be listed") as refused:
            retrain.list_images(url)
        assert "secret" not in str(refused.value)


def test_the_commands_of_tests_readme(tmp_path, model_dir):
    """Both `ray start`, and the command with `--ray_address auto`, as they stand there."""
    pytest.importorskip("ray", reason=NEEDS_RAY)
    head, node = re.findall(r"^ray (start .*?)  +#", (ROOT / "tests/README.md").read_text("utf-8"), re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address}  # where `auto` looks first
    limits = ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats"]
    flags = ["--image_dir", make_image_dir(tmp_path / "images", 4), "--model_dir", model_dir, "--no_report"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:  # a socket's path is short
        more = ["--port", address.rpartition(":")[2], "--temp-dir", place, "--include-dashboard", "false"]
        try:
            for words in ([*head.split(), *more], node.replace("HEAD:6379", address).split()):
                command = [Path(sys.executable).with_name("ray"), *words, *limits]
                subprocess.run(command, env=environment, capture_output=True, check=True, timeout=90)
            done = run_script("retrain.py", "--ray_address", "auto", *flags, cwd=tmp_path, env=environment)
        finally:
            for entry in Path("/proc").glob("[0-9]*/cmdline"):  # `ray stop` would end other clusters as well
                with contextlib.suppress(OSError):
                    if place.encode() in entry.read_bytes():
                        os.kill(int(entry.parent.name), signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("bottleneck/*/*.txt"))) == 12
