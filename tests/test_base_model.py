"""The room 'base model': found or downloaded, checked, folded, converted once."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_graph, picture

import retrain
from retrain import BOTTLENECK_NODE, GRAPH_FILE, Reading, UserError

BLOCK = 1 << 16  # downloads are written in blocks of so many bytes


@pytest.fixture(scope="module")
def tf():
    """TensorFlow, which runs the graph as it came."""
    return retrain.import_tensorflow()


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch):
    """Let no test write into the captured output of an earlier one."""
    monkeypatch.setattr(retrain.log, "handlers", [])


def make_files_of(folder: Path, content: bytes, *names: str) -> Path:
    """Write files of one content below a folder, and return the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """An --image_dir that is good enough to come to the base model."""
    return make_files_of(tmp_path / "pictures", b"x", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")


def main_fails(capsys, *flags) -> str:
    """Run retrain.py's main, which must fail with exit code 1 and one sentence; return the sentence."""
    assert retrain.main(["--architecture", "inception_v3", *map(str, flags)]) == 1
    lines = capsys.readouterr().err.splitlines()
    *progress, sentence = lines
    assert sentence.startswith("retrain.py: error: ") and sentence.endswith(".")
    assert all(line.startswith("Download: ") for line in progress)
    return sentence


# ----------------------------------------------------------------------------------------------------------------------
# Folding
# ----------------------------------------------------------------------------------------------------------------------


def jpeg(colour: tuple[int, int, int], seed: int) -> bytes:
    """Return the file of a picture."""
    file = io.BytesIO()
    picture(colour, seed).save(file, "JPEG")
    return file.getvalue()


JPEGS = [jpeg((40 + 60 * i, 160, 200 - 60 * i), seed=i) for i in range(3)]


def raw_graph(tf, path: Path):
    """Return the GraphDef as it lies in the file."""
    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(path.read_bytes())
    return graph


def run_graph(tf, graph, feed: str, value, fetch: str = f"{BOTTLENECK_NODE}:0") -> np.ndarray:
    """Run a GraphDef as the classic script does."""
    with tf.Graph().as_default() as imported, tf.compat.v1.Session(graph=imported) as session:
        tf.import_graph_def(graph, name="")
        return session.run(fetch, {feed: value})


def changed(path: Path, to: Path, change) -> Path:
    """Write the graph of `path` to `to` after `change` was done to it, with its nodes by name."""
    graph = raw_graph(retrain.import_tensorflow(), path)
    change(graph, {node.name: node for node in graph.node})
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(graph.SerializeToString())
    return to


def placeholder_for_contents(graph, nodes) -> None:
    """Let the bytes of the picture be a Placeholder, as in some copies of the graph."""
    node = nodes["DecodeJpeg/contents"]
    dtype = node.attr["dtype"].type
    node.Clear()
    node.name, node.op, node.attr["dtype"].type = "DecodeJpeg/contents", "Placeholder", dtype


def test_pooling_after_convolving_keeps_the_features(small_graph):
    graph = retrain.load_graph(small_graph)
    swapped = retrain.pool_after_convolving(graph)
    inputs = {node.name: list(node.input) for node in swapped.node}
    assert inputs["mixed/pool"] == ["mixed/conv/Conv2D"]
    assert inputs["mixed/conv/Conv2D"][0] == "conv"
    assert inputs["mixed/conv/batchnorm"][0] == "mixed/pool"
    assert inputs["pool_3"] == ["pool_3/control_dependency"]
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 33, 33, 3)).astype(np.float32)
    before, after = (retrain.graph_function(g, retrain.BOTTLENECK_NODE)(pixels).numpy() for g in (graph, swapped))
    assert np.abs(before).max() > 0.1
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.fixture(params=["Const", "Placeholder"])
def graph_path(request, small_graph, tmp_path) -> Path:
    """The small base model, with its contents node of either kind."""
    if request.param == "Const":
        return small_graph
    return changed(small_graph, tmp_path / "placeholder" / GRAPH_FILE, placeholder_for_contents)


def test_the_graph_of_the_tests_is_like_the_release(tf, small_graph):
    """What is folded away must have been there: otherwise these tests prove nothing."""
    graph = raw_graph(tf, small_graph)
    assert graph.versions.producer == 8
    assert {"BatchNormWithGlobalNormalization", "CheckNumerics"} <= {node.op for node in graph.node}
    assert any(name.startswith("^") for node in graph.node for name in node.input)
    features = np.stack([run_graph(tf, graph, "DecodeJpeg/contents:0", data)[0] for data in JPEGS])
    assert features.std(axis=0).max() > 0.01


def test_folding_keeps_the_features_of_an_encoded_picture(tf, graph_path):
    raw, folded = raw_graph(tf, graph_path), retrain.load_graph(graph_path)
    for data in JPEGS:
        expected = run_graph(tf, raw, "DecodeJpeg/contents:0", data)
        np.testing.assert_allclose(run_graph(tf, folded, "DecodeJpeg/contents:0", data), expected, rtol=0, atol=1e-4)


def test_folding_keeps_the_features_of_batches_of_pixels(tf, graph_path):
    raw, folded = raw_graph(tf, graph_path), retrain.load_graph(graph_path)
    batch = np.random.default_rng(0).uniform(-1, 1, (5, 33, 33, 3)).astype(np.float32)
    expected = np.concatenate([run_graph(tf, raw, "Mul:0", one[None]) for one in batch])
    one_by_one = np.concatenate([run_graph(tf, folded, "Mul:0", one[None]) for one in batch])
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=1e-4)

    together = retrain.graph_function(folded, BOTTLENECK_NODE)(tf.constant(batch * 128 + 128))
    assert together.shape == (5, 16)
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-4)


def test_the_conversion_keeps_the_features(tf, graph_path, tmp_path):
    """Our own way, decoding and resizing included, against the graph as it came."""
    base = retrain.load_base_model(graph_path, tmp_path)
    assert (base.input_size, base.bottleneck_size, base.name) == ((33, 33), 16, "inception_v3")
    lite, raw = retrain.LiteModel(base.lite_path), raw_graph(tf, graph_path)
    for data in JPEGS:
        pixels = retrain.decode_image(data, Reading(), base.input_size)
        found = lite(retrain.resize_bilinear(pixels, base.input_size))
        expected = run_graph(tf, raw, "DecodeJpeg/contents:0", data)[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_what_was_folded_is_gone(graph_path):
    graph = retrain.load_graph(graph_path)
    assert not {"BatchNormWithGlobalNormalization", "CheckNumerics"} & {node.op for node in graph.node}
    assert not [name for node in graph.node for name in node.input if name.startswith("^")]
    assert not [node.name for node in graph.node if node.name.startswith("softmax")]
    (contents,) = (node for node in graph.node if node.name == "DecodeJpeg/contents")
    assert contents.op == "Placeholder"


def test_loading_leaves_the_file_as_it_was(small_graph):
    before = small_graph.read_bytes()
    retrain.load_graph(small_graph)
    assert small_graph.read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------
# The conversion is kept
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_graph(small_graph, tmp_path) -> Path:
    """A copy of the small base model in a folder of its own, where nothing is converted yet."""
    (tmp_path / "model").mkdir()
    return Path(shutil.copy(small_graph, tmp_path / "model"))


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """The conversions that were made, in their order."""
    made, in_child = [], retrain.in_child

    def counted(what: str, seconds: float, forked: bool, work, *arguments):
        made.append(arguments[1])
        in_child(what, seconds, forked, work, *arguments)

    monkeypatch.setattr(retrain, "in_child", counted)
    return made


def features_of(base: retrain.BaseModel) -> np.ndarray:
    """Return the features of some pixels."""
    return retrain.LiteModel(base.lite_path)(np.full((33, 33, 3), 50, np.float32))


def test_the_conversion_is_kept_beside_the_graph_under_its_fingerprint(own_graph, tmp_path, conversions):
    first, second = (retrain.load_base_model(own_graph, tmp_path / "cache") for _ in range(2))
    assert first == second and conversions == [first.lite_path]
    assert first.fingerprint == hashlib.sha256(own_graph.read_bytes()).hexdigest()
    assert first.lite_path.parent == own_graph.parent and first.fingerprint[:12] in first.lite_path.name
    assert sorted(own_graph.parent.iterdir()) == sorted([own_graph, first.lite_path])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda good: b"", id="empty"),
        pytest.param(lambda good: b"<html></html>" * 100, id="HTML"),
        pytest.param(lambda good: good[: len(good) // 2], id="half"),
        pytest.param(lambda good: good[:-10], id="nearly all"),
        pytest.param(lambda good: bytes(len(good)), id="zeros"),
    ],
)
def test_a_damaged_conversion_is_made_again(own_graph, tmp_path, conversions, damage):
    base = retrain.load_base_model(own_graph, tmp_path)
    features = features_of(base)
    base.lite_path.write_bytes(damage(base.lite_path.read_bytes()))
    assert retrain.load_base_model(own_graph, tmp_path) == base
    assert len(conversions) == 2
    np.testing.assert_array_equal(features_of(base), features)


def test_another_graph_gets_another_conversion(own_graph, tmp_path, conversions):
    before = retrain.load_base_model(own_graph, tmp_path)
    features = features_of(before)
    make_graph(own_graph, seed=1)
    after = retrain.load_base_model(own_graph, tmp_path)
    assert conversions == [before.lite_path, after.lite_path] and before.lite_path != after.lite_path
    assert before.fingerprint != after.fingerprint
    assert not np.allclose(features_of(after), features)


@pytest.fixture
def read_only(own_graph):
    """A function that takes the right to write from the folder of `own_graph`."""
    if sys.platform == "win32":
        pytest.skip("folders have no such mode on Windows")
    yield lambda: own_graph.parent.chmod(0o555)
    own_graph.parent.chmod(0o755)


def test_beside_a_read_only_graph_the_cache_folder_takes_the_conversion(own_graph, tmp_path, conversions, read_only):
    read_only()
    first, second = (retrain.load_base_model(own_graph, tmp_path / "cache") for _ in range(2))
    assert first == second and conversions == [first.lite_path]
    assert first.lite_path.parent == tmp_path / "cache"
    assert list(own_graph.parent.iterdir()) == [own_graph]


def test_a_conversion_in_a_read_only_folder_is_used(own_graph, tmp_path, conversions, read_only):
    before = retrain.load_base_model(own_graph, tmp_path / "cache")
    read_only()
    assert retrain.load_base_model(own_graph, tmp_path / "cache") == before
    assert len(conversions) == 1


def test_a_damaged_conversion_in_a_read_only_folder_is_replaced_by_one_in_the_cache(
    own_graph, tmp_path, conversions, read_only
):
    before = retrain.load_base_model(own_graph, tmp_path / "cache")
    features = features_of(before)
    before.lite_path.write_bytes(b"damaged")
    read_only()
    after = retrain.load_base_model(own_graph, tmp_path / "cache")
    assert after.lite_path.parent == tmp_path / "cache"
    assert before.lite_path.read_bytes() == b"damaged"
    np.testing.assert_array_equal(features_of(after), features)


# ----------------------------------------------------------------------------------------------------------------------
# Files that are no such graph
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "is no TensorFlow graph"),
        (b"", "is no graph of the Inception-v3 kind"),
        (bytes(range(256)), "is no TensorFlow graph"),
    ],
    ids=["HTML", "empty", "bytes"],
)
def test_a_file_that_is_no_graph_gets_one_sentence(tmp_path, pictures, capsys, content, said):
    (path,) = make_files_of(tmp_path / "model", content, GRAPH_FILE).iterdir()
    with pytest.raises(UserError, match=said):
        retrain.load_graph(path)
    sentence = main_fails(
        capsys, "--image_dir", pictures, "--model_dir", path.parent, "--bottleneck_dir", tmp_path / "b"
    )
    assert str(path) in sentence and said in sentence


@pytest.mark.parametrize("name", retrain.EXPECTED_NODES)
def test_a_graph_without_an_expected_node_gets_one_sentence(tmp_path, small_graph, pictures, capsys, name):
    def rename(graph, nodes):
        nodes[name].name = "another"

    path = changed(small_graph, tmp_path / "model" / GRAPH_FILE, rename)
    sentence = main_fails(
        capsys, "--image_dir", pictures, "--model_dir", path.parent, "--bottleneck_dir", tmp_path / "b"
    )
    assert str(path) in sentence and f"no node '{name}'" in sentence


# ----------------------------------------------------------------------------------------------------------------------
# A release of our own, and a server that can misbehave
# ----------------------------------------------------------------------------------------------------------------------


def tar_gz(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """Return a .tgz of files (name, content) and of other members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """Return an archive's member that is a link."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


LICENSE, PANDA = ("LICENSE", b"Apache"), ("cropped_panda.jpg", JPEGS[0])


@dataclasses.dataclass(frozen=True)
class Release:
    """What the server offers in place of the release of 2015: a graph of some blocks, and its archive."""

    graph: bytes
    archive: bytes


@pytest.fixture(scope="module")
def release(small_graph, tmp_path_factory) -> Release:
    def padded(graph, nodes):
        node = graph.node.add(name="padding", op="Const")
        node.attr["value"].tensor.tensor_content = np.random.default_rng(0).bytes(7 * BLOCK)

    graph = changed(small_graph, tmp_path_factory.mktemp("release") / GRAPH_FILE, padded).read_bytes()
    return Release(graph, tar_gz(LICENSE, (GRAPH_FILE, graph), PANDA))


@dataclasses.dataclass(frozen=True)
class Reply:
    """How the server answers one request."""

    data: bytes = b""
    status: int = 200
    sends: int | None = None  # so many bytes of what was asked for, then the connection is cut
    claims: int | None = None  # the Content-Length that is told; -1: none
    ranges: bool = True  # whether a Range is honoured
    stalls: bool = False  # hold the connection instead of cutting it
    silent: bool = False  # say nothing at all


class Server(http.server.ThreadingHTTPServer):
    """A server on this machine that answers each path with its replies in turn, the last one again and again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, list[Reply]] = {}
        self.asked: list[tuple[str, str | None]] = []  # (path, Range)
        self.sent: list[tuple[int, int]] = []  # from and to which byte of the file
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def ranges(self, path: str) -> list[str | None]:
        """Return the Range of each request for a path."""
        return [asked_range for asked, asked_range in self.asked if asked == path]

    def reply(self, path: str, asked_range: str | None) -> Reply:
        self.asked.append((path, asked_range))
        replies = self.replies.get(path, [Reply(status=404)])
        if len(self.asked) > 30:  # a client that never gives up is told so
            return Reply(status=404)
        return replies.pop(0) if len(replies) > 1 else replies[0]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked_range = self.headers.get("Range")
        reply = self.server.reply(self.path, asked_range)
        start = int(asked_range.removeprefix("bytes=").rstrip("-")) if asked_range and reply.ranges else 0
        if reply.silent:
            self.server.closing.wait(8)
            return
        beyond = bool(start) and start >= len(reply.data) and reply.status == 200
        partial = bool(start) and not beyond and reply.status == 200
        body = b"" if beyond else reply.data[start:]
        self.send_response(416 if beyond else 206 if partial else reply.status)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(reply.data) - 1}/{len(reply.data)}")
        if reply.claims != -1:
            self.send_header("Content-Length", str(len(body) if reply.claims is None else reply.claims))
        self.end_headers()
        sent = body[: reply.sends]
        if sent:  # noted before it is sent: the client may be done with it before this thread runs again
            self.server.sent.append((start, start + len(sent)))
        self.wfile.write(sent)
        if reply.stalls:
            self.wfile.flush()
            self.server.closing.wait(8)

    def log_message(self, *arguments):
        """Say nothing."""


ARCHIVE, GRAPH, MIRROR = "/inception.tgz", "/graph.pb", "/mirror"


@pytest.fixture
def server(release, monkeypatch):
    """A server in place of the two addresses of the release."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(retrain, "ARCHIVE_URL", server.url(ARCHIVE))
    monkeypatch.setattr(retrain, "GRAPH_URL", server.url(GRAPH))
    monkeypatch.setattr(retrain, "ARCHIVE_SIZE", len(release.archive))
    monkeypatch.setattr(retrain, "GRAPH_SIZE", len(release.graph))
    monkeypatch.setattr(retrain, "GRAPH_MD5", hashlib.md5(release.graph).hexdigest())
    monkeypatch.setattr(retrain, "TIMEOUTS", (5, 5))
    monkeypatch.setattr(retrain, "PAUSES", (0, 0))
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def model(tmp_path) -> Path:
    """An empty --model_dir, the only thing in a folder of its own, so that what climbs out of it is seen."""
    folder = tmp_path / "around" / "model"
    folder.mkdir(parents=True)
    return folder


def assert_holds_only_the_graph(model: Path, graph: bytes) -> None:
    """The graph lies there whole, nothing is left of the way there, and nothing climbed out."""
    assert [path.name for path in model.iterdir()] == [GRAPH_FILE]
    assert not (model / GRAPH_FILE).is_symlink()
    assert (model / GRAPH_FILE).read_bytes() == graph
    assert list(model.parent.iterdir()) == [model]


# ----------------------------------------------------------------------------------------------------------------------
# Found
# ----------------------------------------------------------------------------------------------------------------------


def test_the_graph_in_the_folder_comes_before_the_archive_and_the_download(server, release, model):
    make_files_of(model, b"not looked at", retrain.ARCHIVE_FILE)
    (model / GRAPH_FILE).write_bytes(release.graph)
    assert retrain.find_graph(model, server.url(MIRROR)) == model / GRAPH_FILE
    assert (model / GRAPH_FILE).read_bytes() == release.graph
    assert (model / retrain.ARCHIVE_FILE).read_bytes() == b"not looked at"
    assert server.asked == []


CLIMBING = ("../evil.txt", b"climbed")
ABSOLUTE = "/tmp/evil-of-retrain-tests/evil.txt"


@pytest.mark.parametrize(
    "before, name",
    [
        pytest.param([LICENSE, PANDA], GRAPH_FILE, id="the members of the release"),
        pytest.param([], f"./{GRAPH_FILE}", id="packed as ./"),
        pytest.param([CLIMBING, (f"../{GRAPH_FILE}", b"climbed")], GRAPH_FILE, id="climbing"),
        pytest.param([(ABSOLUTE, b"absolute"), (f"/{GRAPH_FILE}", b"absolute")], GRAPH_FILE, id="absolute"),
        pytest.param([link(GRAPH_FILE, "../evil.txt")], GRAPH_FILE, id="a symbolic link of its name"),
        pytest.param([link(GRAPH_FILE, "LICENSE", tarfile.LNKTYPE)], GRAPH_FILE, id="a hard link of its name"),
        pytest.param([link("x", "..", tarfile.SYMTYPE), ("x/evil.txt", b"evil")], GRAPH_FILE, id="through a link"),
        pytest.param([(f"deeper/{GRAPH_FILE}", b"another")], GRAPH_FILE, id="one of its name in a folder"),
    ],
)
def test_only_the_graph_is_taken_out_of_the_archive_lying_there(server, release, model, before, name):
    archive = model / retrain.ARCHIVE_FILE
    archive.write_bytes(tar_gz(*before, (name, release.graph), ("last.txt", b"extra")))
    packed = archive.read_bytes()
    assert retrain.find_graph(model, server.url(MIRROR)) == model / GRAPH_FILE
    assert archive.read_bytes() == packed
    archive.unlink()
    assert_holds_only_the_graph(model, release.graph)
    assert not Path(ABSOLUTE).exists()
    assert server.asked == []


@pytest.mark.parametrize(
    "make, said",
    [
        pytest.param(lambda release: b"<html></html>", "no whole .tgz archive", id="HTML"),
        pytest.param(lambda release: release.archive[: len(release.archive) // 2], "no whole .tgz archive", id="half"),
        pytest.param(
            lambda release: release.archive[:BLOCK] + bytes(BLOCK) + release.archive[2 * BLOCK :],
            "no whole .tgz archive|no graph of the Inception-v3 kind",
            id="overwritten",
        ),
        pytest.param(lambda release: tar_gz(LICENSE), f"holds no {GRAPH_FILE}", id="without a graph"),
        pytest.param(
            lambda release: tar_gz((f"../{GRAPH_FILE}", release.graph)), f"holds no {GRAPH_FILE}", id="climbing"
        ),
        pytest.param(lambda release: tar_gz(link(GRAPH_FILE, "x")), f"holds no {GRAPH_FILE}", id="link"),
        pytest.param(
            lambda release: tar_gz((GRAPH_FILE, b"<html>")), "no graph of the Inception-v3 kind", id="no graph"
        ),
    ],
)
def test_an_archive_lying_there_that_is_of_no_use_gets_one_sentence(
    server, release, model, pictures, capsys, make, said
):
    archive = model / retrain.ARCHIVE_FILE
    archive.write_bytes(make(release))
    with pytest.raises(UserError, match=said):
        retrain.find_graph(model, "")
    sentence = main_fails(capsys, "--image_dir", pictures, "--model_dir", model)
    assert str(archive) in sentence
    assert list(model.iterdir()) == [archive] and list(model.parent.iterdir()) == [model]


# ----------------------------------------------------------------------------------------------------------------------
# Downloaded
# ----------------------------------------------------------------------------------------------------------------------


def test_the_archive_is_downloaded_once(server, release, model):
    server.replies[ARCHIVE] = [Reply(release.archive)]
    for _ in range(2):
        assert retrain.find_graph(model, "") == model / GRAPH_FILE
    assert_holds_only_the_graph(model, release.graph)
    assert server.asked == [(ARCHIVE, None)]


def test_the_folder_is_made(server, release, model):
    server.replies[ARCHIVE] = [Reply(release.archive)]
    retrain.find_graph(model / "deeper" / "still", "")
    assert_holds_only_the_graph(model / "deeper" / "still", release.graph)


@pytest.mark.parametrize("packed", [False, True], ids=["graph", "archive"])
def test_another_address_needs_only_the_expected_nodes(server, small_graph, model, packed):
    other = small_graph.read_bytes()  # another size and sum than the release's
    server.replies[MIRROR] = [Reply(tar_gz(CLIMBING, (GRAPH_FILE, other)) if packed else other)]
    assert retrain.find_graph(model, server.url(MIRROR)) == model / GRAPH_FILE
    assert_holds_only_the_graph(model, other)
    assert server.asked == [(MIRROR, None)]


@pytest.mark.parametrize(
    "failing, ranges",
    [
        pytest.param([{"silent": True}], [None], id="says nothing"),
        pytest.param([{"sends": 2 * BLOCK, "stalls": True}], [None, 2 * BLOCK], id="stalls"),
        pytest.param([{"sends": 2 * BLOCK}], [None, 2 * BLOCK], id="breaks off"),
        pytest.param(
            [{"sends": BLOCK}] * 5, [None, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK, 5 * BLOCK], id="again and again"
        ),
        pytest.param([{"sends": BLOCK}, {"status": 503}, {"sends": BLOCK}], [None, BLOCK, BLOCK, 2 * BLOCK], id="503"),
        pytest.param([{"sends": BLOCK, "claims": -1}], [None, BLOCK], id="breaks off without having told a length"),
    ],
)
def test_a_download_goes_on_where_it_stopped(server, release, model, monkeypatch, failing, ranges):
    """Every byte is fetched once, and progress renews the number of tries."""
    if any("stalls" in reply or "silent" in reply for reply in failing):
        monkeypatch.setattr(retrain, "TIMEOUTS", (5, 0.5))
    server.replies[ARCHIVE] = [
        *(Reply(b"" if "status" in reply else release.archive, **reply) for reply in failing),
        Reply(release.archive),
    ]
    retrain.find_graph(model, "")
    assert_holds_only_the_graph(model, release.graph)
    expected = [start and f"bytes={start}-" for start in ranges]
    assert server.ranges(ARCHIVE) == expected + [None] * ("silent" in failing[0])
    assert server.ranges(GRAPH) == []
    starts, ends = zip(*server.sent, strict=True)
    assert (starts[0], *ends) == (*starts, len(release.archive))


@pytest.mark.parametrize(
    "failing, ranges",
    [
        pytest.param([Reply(status=500)], [None, None], id="500"),
        pytest.param([Reply(status=503), Reply(status=429)], [None, None, None], id="503 and 429"),
    ],
)
def test_a_server_in_trouble_is_asked_again(server, release, model, failing, ranges):
    server.replies[ARCHIVE] = [*failing, Reply(release.archive)]
    retrain.find_graph(model, "")
    assert_holds_only_the_graph(model, release.graph)
    assert server.ranges(ARCHIVE) == ranges and server.ranges(GRAPH) == []


def test_a_server_that_knows_no_ranges_sends_all_again(server, release, model):
    server.replies[ARCHIVE] = [Reply(release.archive, sends=2 * BLOCK), Reply(release.archive, ranges=False)]
    retrain.find_graph(model, "")
    assert_holds_only_the_graph(model, release.graph)
    assert server.ranges(ARCHIVE) == [None, f"bytes={2 * BLOCK}-"]


def test_a_refused_range_begins_anew(server, release, model):
    server.replies[ARCHIVE] = [
        Reply(release.archive, sends=2 * BLOCK),
        Reply(status=416),
        Reply(release.archive),
    ]
    retrain.find_graph(model, "")
    assert_holds_only_the_graph(model, release.graph)
    assert server.ranges(ARCHIVE) == [None, f"bytes={2 * BLOCK}-", None]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_address_that_is_gone_leads_to_the_second_at_once(server, release, model, status):
    server.replies = {ARCHIVE: [Reply(status=status)], GRAPH: [Reply(release.graph)]}
    retrain.find_graph(model, "")
    assert_holds_only_the_graph(model, release.graph)
    assert server.asked == [(ARCHIVE, None), (GRAPH, None)]


def test_what_came_of_an_address_that_is_gone_meanwhile_is_not_left_behind(server, release, model):
    server.replies[ARCHIVE] = [Reply(release.archive, sends=2 * BLOCK), Reply(status=404)]
    with pytest.raises(UserError, match="404.*404"):
        retrain.find_graph(model, "")
    assert list(model.iterdir()) == []


HTML = b"<!DOCTYPE html><html><body>Please log in to the hotel's network</body></html>"


def other_sum(release: Release) -> bytes:
    """Return an archive with a graph of the right size that is not the release's."""
    return tar_gz((GRAPH_FILE, release.graph[:-1] + bytes([release.graph[-1] ^ 1])))


WRONG_ANSWERS = {
    "HTML": lambda release: Reply(HTML),
    "HTML of no known length": lambda release: Reply(HTML, claims=-1, ranges=False),
    "tells too great a length": lambda release: Reply(release.archive, claims=len(release.archive) + 1),
    "tells too small a length": lambda release: Reply(release.archive, claims=len(release.archive) - 1),
    "longer than it should be": lambda release: Reply(release.archive + bytes(BLOCK), claims=-1),
    "always breaks off": lambda release: Reply(release.archive, sends=BLOCK, ranges=False),
    "nothing": lambda release: Reply(),
}
WRONG_ARCHIVES = {
    "no archive": lambda release: bytes(len(release.archive)),
    "a graph with another MD5": other_sum,
    "no graph in it": lambda release: tar_gz(LICENSE, PANDA),
    "climbing": lambda release: tar_gz(CLIMBING, (f"../{GRAPH_FILE}", release.graph)),
    "absolute": lambda release: tar_gz((ABSOLUTE, b"evil"), (f"/{GRAPH_FILE}", release.graph)),
    "a link": lambda release: tar_gz(CLIMBING, link(GRAPH_FILE, "../evil.txt")),
    "half an archive, but of the right length": lambda release: release.archive[:BLOCK] + bytes(BLOCK),
}


# A connection or a sum may be right the next time; what was not meant for us never will be.
WORTH_ANOTHER_TRY = {
    "HTML of no known length", "always breaks off", "nothing",
    "no archive", "a graph with another MD5", "half an archive, but of the right length",
}  # fmt: skip


@pytest.fixture(params=[*WRONG_ANSWERS, *WRONG_ARCHIVES])
def wrong_archive(request, server, release, monkeypatch) -> str:
    """The first address gives what it should not; the value says what."""
    if request.param in WRONG_ANSWERS:
        server.replies[ARCHIVE] = [WRONG_ANSWERS[request.param](release)]
    else:
        wrong = WRONG_ARCHIVES[request.param](release)
        monkeypatch.setattr(retrain, "ARCHIVE_SIZE", len(wrong))
        server.replies[ARCHIVE] = [Reply(wrong)]
    return request.param


def test_a_first_address_that_gives_something_else_leads_to_the_second(server, release, model, wrong_archive):
    server.replies[GRAPH] = [Reply(release.graph)]
    assert retrain.find_graph(model, "") == model / GRAPH_FILE
    assert_holds_only_the_graph(model, release.graph)
    assert not Path(ABSOLUTE).exists()
    assert len(server.ranges(ARCHIVE)) == (3 if wrong_archive in WORTH_ANOTHER_TRY else 1)


def assert_says_what_to_do(sentence: str, model: Path, *urls: str) -> None:
    """The sentence names the addresses, the folder, and the two ways out."""
    for part in (*urls, str(model.resolve()), GRAPH_FILE, "download", "--model_url"):
        assert part in sentence


@pytest.mark.parametrize(
    "replies, said",
    [
        pytest.param([Reply(status=404)], "answered 404", id="404"),
        pytest.param([Reply(status=500)], "answered 500", id="500"),
        pytest.param([Reply(HTML)], "bytes where", id="HTML"),
        pytest.param([Reply(silent=True)], "did not answer in time", id="says nothing"),
    ],
)
def test_when_no_address_helps_a_sentence_says_what_to_do(server, model, pictures, capsys, monkeypatch, replies, said):
    if replies[0].silent:
        monkeypatch.setattr(retrain, "TIMEOUTS", (5, 0.2))
    server.replies = {ARCHIVE: list(replies), GRAPH: list(replies)}
    sentence = main_fails(capsys, "--image_dir", pictures, "--model_dir", model)
    assert_says_what_to_do(sentence, model, retrain.ARCHIVE_URL, retrain.GRAPH_URL)
    assert sentence.count(said) == 2
    assert list(model.iterdir()) == []


def test_without_a_network_a_sentence_says_what_to_do(server, model, pictures, capsys, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(retrain, "ARCHIVE_URL", f"{nobody}/a.tgz")
        monkeypatch.setattr(retrain, "GRAPH_URL", f"{nobody}/g.pb")
        sentence = main_fails(capsys, "--image_dir", pictures, "--model_dir", model)
    assert_says_what_to_do(sentence, model, f"{nobody}/a.tgz", f"{nobody}/g.pb")
    assert sentence.count("could not be reached") == 2
    assert list(model.iterdir()) == []


@pytest.mark.parametrize(
    "reply, said",
    [
        pytest.param(Reply(HTML), "no graph of the Inception-v3 kind", id="HTML"),
        pytest.param(Reply(tar_gz(CLIMBING)), f"holds no {GRAPH_FILE}", id="climbing archive"),
        pytest.param(Reply(tar_gz((GRAPH_FILE, HTML))), "no graph of the Inception-v3 kind", id="HTML in an archive"),
        pytest.param(Reply(status=404), "404", id="404"),
    ],
)
def test_another_address_that_does_not_help_gets_one_sentence(server, model, pictures, capsys, reply, said):
    server.replies[MIRROR] = [reply]
    url = server.url(MIRROR)
    sentence = main_fails(capsys, "--image_dir", pictures, "--model_dir", model, "--model_url", url)
    assert_says_what_to_do(sentence, model, url)
    assert said in sentence and retrain.ARCHIVE_URL not in sentence
    assert server.asked == [(MIRROR, None)]
    assert list(model.iterdir()) == [] and list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("off", [-BLOCK, BLOCK], ids=["too small", "too great"])
def test_another_address_that_lies_about_its_length_ends_in_a_sentence(server, release, model, pictures, capsys, off):
    """However often the file comes, its length is never as told: that must end."""
    server.replies[MIRROR] = [Reply(release.graph, claims=len(release.graph) + off)]
    url = server.url(MIRROR)
    sentence = main_fails(capsys, "--image_dir", pictures, "--model_dir", model, "--model_url", url)
    assert_says_what_to_do(sentence, model, url)
    assert len(server.asked) <= 6


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/x", "http://", "http://[::1"])
def test_an_address_that_is_none_gets_one_sentence(server, model, pictures, capsys, url):
    sentence = main_fails(capsys, "--image_dir", pictures, "--model_dir", model, "--model_url", url)
    assert_says_what_to_do(sentence, model, url)
    assert server.asked == []


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted, and gone on with
# ----------------------------------------------------------------------------------------------------------------------


def test_a_failed_run_keeps_what_came_and_the_next_run_goes_on(server, release, model):
    server.replies[ARCHIVE] = [Reply(release.archive, sends=2 * BLOCK), Reply(status=503)]
    with pytest.raises(UserError):
        retrain.find_graph(model, "")
    (part,) = model.iterdir()
    assert part.read_bytes() == release.archive[: 2 * BLOCK]

    server.replies[ARCHIVE] = [Reply(release.archive)]
    server.asked.clear()
    retrain.find_graph(model, "")
    assert_holds_only_the_graph(model, release.graph)
    assert server.asked == [(ARCHIVE, f"bytes={2 * BLOCK}-")]
    assert server.sent == [(0, 2 * BLOCK), (2 * BLOCK, len(release.archive))]


def test_a_run_stopped_between_the_last_byte_and_the_check_fetches_nothing_again(server, release, model, monkeypatch):
    def ctrl_c(path: Path) -> None:
        raise KeyboardInterrupt

    server.replies[ARCHIVE] = [Reply(release.archive)]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(retrain, "check_release", ctrl_c)
        retrain.find_graph(model, "")
    assert len(list(model.iterdir())) == 1
    retrain.find_graph(model, "")
    assert_holds_only_the_graph(model, release.graph)
    assert server.asked == [(ARCHIVE, None)]


def hear_ctrl_c() -> None:
    """Undo what a shell does to what it starts in the background, these tests for one: have it ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM kills at once on Windows")
@pytest.mark.parametrize("signal_number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_stopped_while_downloading_keeps_what_came(server, release, model, pictures, signal_number, code):
    server.replies[MIRROR] = [Reply(release.graph, sends=2 * BLOCK, stalls=True), Reply(release.graph)]
    url = server.url(MIRROR)
    flags = ["--image_dir", pictures, "--model_dir", model, "--model_url", url, "--architecture", "inception_v3"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "retrain.py"), *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=model.parent,
        preexec_fn=hear_ctrl_c,
    ) as run:  # fmt: skip
        for _ in range(1000):  # until what the server sends before it stalls has come
            if run.poll() is not None or sum(path.stat().st_size for path in model.iterdir()) == 2 * BLOCK:
                break
            time.sleep(0.02)
        run.send_signal(signal_number)
        errors = run.communicate(timeout=20)[1]
    assert run.returncode == code, errors
    assert "Traceback" not in errors
    (part,) = model.iterdir()
    assert part.read_bytes() == release.graph[: 2 * BLOCK]

    retrain.find_graph(model, url)
    assert_holds_only_the_graph(model, release.graph)
    assert server.ranges(MIRROR) == [None, f"bytes={2 * BLOCK}-"]


# ----------------------------------------------------------------------------------------------------------------------
# Which base model: at one's word, or what can be had
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def starter(model, small_graph) -> Path:
    """A starter in `model`: another one than the small graph that stands for Inception-v3."""
    return make_graph(model / retrain.STARTER_FILE, seed=7)


def test_auto_takes_inception_that_lies_there_without_asking_anybody(server, model, starter, small_graph):
    (model / GRAPH_FILE).write_bytes(small_graph.read_bytes())
    assert retrain.choose_graph("auto", model, "") == ("inception_v3", model / GRAPH_FILE, "")
    assert server.asked == []


@pytest.mark.parametrize("url", [False, True], ids=["release", "--model_url"])
def test_auto_downloads_inception_from_a_server_that_answers(server, release, model, starter, url):
    server.replies = {ARCHIVE: [Reply(release.archive)], MIRROR: [Reply(release.graph)]}
    chosen = retrain.choose_graph("auto", model, server.url(MIRROR) if url else "")
    assert chosen == ("inception_v3", model / GRAPH_FILE, "")
    assert (model / GRAPH_FILE).read_bytes() == release.graph


def test_auto_takes_the_second_address_if_the_first_fails(server, release, model, starter):
    server.replies = {ARCHIVE: [Reply(status=500)], GRAPH: [Reply(release.graph)]}
    assert retrain.choose_graph("auto", model, "")[0] == "inception_v3"
    assert server.ranges(ARCHIVE) == [None]  # asked once, not again after a pause


def test_auto_falls_back_on_the_starter_and_says_why(server, model, starter):
    name, path, warning = retrain.choose_graph("auto", model, "")
    assert (name, path) == ("starter", starter)
    assert f"{retrain.ARCHIVE_URL} (the server answered 404" in warning
    assert f"put it into the folder {model.resolve()}" in warning
    assert [path for path, _ in server.asked] == [ARCHIVE, GRAPH]


def test_auto_does_not_wait_for_a_server_that_says_nothing(server, model, starter, monkeypatch):
    monkeypatch.setattr(retrain, "SHORT_TIMEOUT", 0.3)
    server.replies = {ARCHIVE: [Reply(silent=True)], GRAPH: [Reply(silent=True)]}
    name, _, warning = retrain.choose_graph("auto", model, "")
    assert name == "starter" and "did not answer in time" in warning
    assert [path for path, _ in server.asked] == [ARCHIVE]  # the second would be waited for as well


def test_auto_falls_back_when_a_download_breaks_off_for_good(server, release, model, starter):
    server.replies = {ARCHIVE: [Reply(release.archive, sends=BLOCK, ranges=False)], GRAPH: [Reply(status=404)]}
    assert retrain.choose_graph("auto", model, "")[0] == "starter"
    assert not (model / GRAPH_FILE).exists()


def test_starter_is_taken_at_its_word(server, model, starter, small_graph):
    (model / GRAPH_FILE).write_bytes(small_graph.read_bytes())
    assert retrain.choose_graph("starter", model, "") == ("starter", starter, "")
    assert server.asked == []


def test_inception_is_taken_at_its_word(server, model, starter):
    with pytest.raises(UserError, match="There is no base model"):
        retrain.choose_graph("inception_v3", model, "")


def test_the_starter_that_comes_with_the_script_is_found(tmp_path):
    path = retrain.find_starter(tmp_path)
    assert path == ROOT / "inception_model" / retrain.STARTER_FILE
    assert path.stat().st_size <= 8_000_000


def test_a_run_on_the_starter_warns_twice_and_names_its_files(server, model, starter, image_dir, capsys, monkeypatch):
    monkeypatch.chdir(image_dir.parent)
    assert (
        retrain.main(["--image_dir", str(image_dir), "--model_dir", str(model), "--how_many_training_steps", "5"]) == 0
    )
    said = capsys.readouterr()
    warnings = [
        line for line in said.err.splitlines() if line.startswith("WARNING: The base model is the small starter")
    ]
    assert len(warnings) == 2
    kept = {path.name.split("_")[-1] for path in (image_dir.parent / "bottleneck").glob("*/*.txt")}
    assert kept == {"starter.txt"}
    assert json.loads((image_dir.parent / "output_graph.json").read_text())["architecture"] == "starter"


def test_a_network_without_outputs_is_refused(small_graph, tmp_path):
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    base = retrain.load_base_model(small_graph, tmp_path)
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytearray(base.lite_path.read_bytes())))
    model.subgraphs[0].outputs = np.array([], np.int32)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    path = tmp_path / "x.tflite"
    path.write_bytes(bytes(builder.Output()))
    with pytest.raises(UserError, match=r"x\.tflite is no model"):
        retrain.LiteModel(path)


@pytest.mark.parametrize("damage", ["a name", "a number", "a shape"])
def test_a_graph_whose_nodes_do_not_fit_together_is_refused(tf, small_graph, tmp_path, damage):
    graph = tf.compat.v1.GraphDef.FromString(small_graph.read_bytes())
    nodes = {node.name: node for node in graph.node}
    if damage == "a name":
        nodes["conv/batchnorm"].input[1] = "nobody"
    elif damage == "a number":
        nodes["conv/batchnorm/beta"].attr["value"].tensor.tensor_content = b"odd"
    else:
        nodes["pool_3/_reshape/shape"].attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.int32(1)))
    path = tmp_path / GRAPH_FILE
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(UserError, match=f"{GRAPH_FILE} is a damaged graph"):
        retrain.load_graph(path)


SLEEPS_IN_A_CHILD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import retrain

def sleep():
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    retrain.in_child("nothing", 60, sys.argv[2] == "forked", sleep)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it asks /proc")
@pytest.mark.parametrize("how", ["forked", "spawned"])
def test_a_process_that_works_for_another_ends_with_it(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SLEEPS_IN_A_CHILD)
    with subprocess.Popen([sys.executable, script, ROOT, how], stdout=subprocess.PIPE, text=True) as parent:
        child = Path("/proc", parent.stdout.readline().strip(), "stat")
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while child.exists() and " Z " not in child.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not child.exists() or " Z " in child.read_text()
