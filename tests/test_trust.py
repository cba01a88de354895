"""What a graph may do: only what computes is run, unless --trust_model. torture.py tries every operation there is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import predict

GRAPH_FILE = "classify_image_graph_def.pb"


@pytest.fixture(scope="module")
def tf():
    return predict.import_tensorflow()


def with_node(tf, path: Path, op: str, in_function: bool = False) -> None:
    """Add a node of an operation to a graph file, in a function of its if need be."""
    graph = tf.compat.v1.GraphDef.FromString(path.read_bytes())
    nodes = graph.node
    if in_function:
        function = graph.library.function.add()
        function.signature.name = "harmless"
        nodes = function.node_def
    nodes.add(op=op, name="odd\x1b[2J")
    path.write_bytes(graph.SerializeToString())


@pytest.fixture
def own_model(small_graph, tmp_path) -> Path:
    """The small base model's graph, to be changed."""
    (tmp_path / "own").mkdir()
    return Path(shutil.copy(small_graph, tmp_path / "own" / GRAPH_FILE))


@pytest.fixture
def bare(trained, tmp_path, monkeypatch) -> Path:
    """A trained graph by itself, which TensorFlow runs, to be changed; the working folder is its, with an image."""
    monkeypatch.chdir(tmp_path)
    for name in ("output_graph.pb", "output_labels.txt"):
        shutil.copy(trained / name, tmp_path)
    shutil.copy(next((trained / "pictures/green").iterdir()), tmp_path / "green.jpg")
    return tmp_path / "output_graph.pb"


@pytest.mark.parametrize("op, in_function", [("ReadFile", False), ("PyFunc", True), ("NobodysOwn", False)])
def test_a_base_model_that_may_do_more_than_compute_is_refused(train, tf, own_model, capsys, op, in_function):
    with_node(tf, own_model, op, in_function)
    assert train("--model_dir", own_model.parent) == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert str(own_model) in said and f"is a {op}," in said and "--trust_model" in said
    assert r"'odd\x1b[2J'" in said
    assert [path.name for path in own_model.parent.iterdir()] == [own_model.name]  # it was not converted either


def test_a_trusted_base_model_is_used(train, tf, own_model):
    with_node(tf, own_model, "ReadFile")
    assert train("--model_dir", own_model.parent, "--trust_model") == 0


def test_a_trained_graph_that_may_do_more_than_compute_is_run_only_if_trusted(tf, bare, capsys):
    graph = tf.compat.v1.GraphDef.FromString(bare.read_bytes())
    graph.node.add(op="ReadFile", name="odd", input=["DecodeJpeg/contents"])
    bare.write_bytes(graph.SerializeToString())
    assert predict.main(["green.jpg"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "output_graph.pb: its node " in said and "is a ReadFile," in said and "--trust_model" in said
    assert predict.main(["green.jpg", "--trust_model"]) == 0
    assert capsys.readouterr().out.startswith("green (score")


def test_a_damaged_graph_gets_one_sentence(tf, bare, capsys):
    graph = tf.compat.v1.GraphDef.FromString(bare.read_bytes())
    next(node for node in graph.node if node.op == "ResizeBilinear").input.pop()
    bare.write_bytes(graph.SerializeToString())
    assert predict.main(["green.jpg"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("predict.py: error: output_graph.pb is no graph of retrain.py's kind, ")


def test_a_function_may_be_called_by_a_name_that_is_no_operations(tf):
    graph = tf.compat.v1.GraphDef()
    graph.node.add(op="own", name="call")
    graph.library.function.add().signature.name = "own"
    predict.check_ops(graph, Path("own.pb"))
    graph.node[0].op = graph.library.function[0].signature.name = "ReadFile"
    with pytest.raises(predict.UserError, match="is a ReadFile"):
        predict.check_ops(graph, Path("own.pb"))


def test_a_module_that_writes_files_is_refused_before_it_does(tf, train, tmp_path, capsys):
    module = tf.Module()
    path = str(tmp_path / "touched.txt")

    def call(images):
        with tf.control_dependencies([tf.io.write_file(path, "x")]):
            return tf.reduce_mean(images, [1, 2])

    module.__call__ = tf.function(call, input_signature=[tf.TensorSpec([None, 20, 20, 3], tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "module"))
    assert train("--tfhub_module", "module", "--model_dir", "own") == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert "is a WriteFile," in said and "--trust_model" in said
    assert not Path(path).exists() and not list(tmp_path.glob("own/*"))


def test_no_operation_on_the_list_touches_files_or_runs_other_code(tf):
    from tensorflow.python.framework import op_def_registry

    ops = predict.PURE_OPS.split()
    assert [op for op in ops if op_def_registry.get(op) is None] == []
    # TensorFlow calls stateful what touches something, but also random numbers, and whatever calls.
    stateful = {
        op for op in ops if op_def_registry.get(op).is_stateful and not op.startswith(("TensorArray", "Random"))
    }
    known = "Assert Case CheckNumerics CheckNumericsV2 GuaranteeConst If While StatefulPartitionedCall"
    assert stateful <= {*known.split(), "FractionalAvgPool", "TruncatedNormal"}
    harmful = "ReadFile MatchingFiles ImmutableConst DebugIdentity PyFuncStateless XlaCustomCall XlaCustomCallV2"
    assert not {*harmful.split()} & {*ops}


def test_a_network_of_everyday_layers_needs_no_trust(tf):
    with tf.Graph().as_default() as graph:
        features = tf.nn.conv2d(tf.random.uniform([1, 8, 8, 3]), tf.ones([3, 3, 3, 4]), 1, "SAME")
        features = tf.nn.relu6(tf.nn.depthwise_conv2d(features, tf.ones([3, 3, 4, 1]), [1, 1, 1, 1], "VALID"))
        tf.nn.softmax(tf.reduce_mean(tf.nn.max_pool2d(tf.nn.silu(features), 2, 2, "VALID"), [1, 2]))
    predict.check_ops(graph.as_graph_def(), Path("own.pb"))
