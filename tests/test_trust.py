"""What a graph may do: only what computes is run, unless --trust_model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import predict
import retrain


@pytest.fixture(scope="module")
def tf():
    return retrain.import_tensorflow()


def with_node(tf, path: Path, op: str, in_function: bool = False) -> None:
    """Add a node of an operation to a graph file, in a function of its if need be."""
    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(path.read_bytes())
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
    return shutil.copy(small_graph, tmp_path / "own" / retrain.GRAPH_FILE)


@pytest.fixture
def bare(trained, tmp_path, monkeypatch) -> Path:
    """A trained graph by itself, which TensorFlow runs, to be changed; the working folder is its."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("output_graph.pb", "output_labels.txt"):
        shutil.copy(trained / name, folder)
    monkeypatch.chdir(folder)
    return folder / "output_graph.pb"


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("op", ["ReadFile", "WriteFile", "PyFunc", "MatchingFiles", "SaveV2", "NobodysOwn"])
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


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("op", ["ReadFile", "PyFuncStateless", "NobodysOwn"])
def test_a_trained_graph_that_may_do_more_than_compute_is_refused(tf, bare, trained, capsys, op, in_function):
    with_node(tf, bare, op, in_function)
    picture = str(next((trained / "pictures/green").iterdir()))
    assert predict.main([picture]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "output_graph.pb: its node " in said and f"is a {op}," in said and "--trust_model" in said


def test_a_trusted_trained_graph_is_run(tf, bare, trained, capsys):
    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(bare.read_bytes())
    graph.node.add(op="ReadFile", name="odd", input=["DecodeJpeg/contents"])
    bare.write_bytes(graph.SerializeToString())
    picture = str(next((trained / "pictures/green").iterdir()))
    assert predict.main([picture]) == 1
    assert predict.main([picture, "--trust_model"]) == 0
    assert capsys.readouterr().out.startswith("green (score")


@pytest.mark.parametrize("op", ["ReadFile", "WriteFile"])
def test_a_module_that_may_do_more_than_compute_is_refused(tf, train, tmp_path, capsys, op):
    module = tf.Module()
    path = str(tmp_path / "touched.txt")

    def call(images):
        touched = tf.io.read_file(path) if op == "ReadFile" else tf.io.write_file(path, "x")
        with tf.control_dependencies([touched]):
            return tf.reduce_mean(images, [1, 2])

    module.__call__ = tf.function(call, input_signature=[tf.TensorSpec([None, 20, 20, 3], tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "module"))
    assert train("--tfhub_module", "module", "--model_dir", "kept") == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"is a {op}," in said and "--trust_model" in said
    assert not Path(path).exists() and not list(tmp_path.glob("kept/*"))


def test_a_function_can_not_borrow_the_name_of_an_operation(tf, bare, trained, capsys):
    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(bare.read_bytes())
    graph.library.function.add().signature.name = "ReadFile"
    graph.node.add(op="ReadFile", name="odd")
    bare.write_bytes(graph.SerializeToString())
    assert predict.main([str(next((trained / "pictures/green").iterdir()))]) == 1
    assert "is a ReadFile," in capsys.readouterr().err


def test_every_op_on_the_list_is_one_of_tensorflow(tf):
    from tensorflow.python.framework import op_def_registry

    assert [op for op in predict.PURE_OPS.split() if op_def_registry.get(op) is None] == []


def test_no_op_on_the_list_touches_files_or_runs_other_code(tf):
    from tensorflow.python.framework import op_def_registry

    # TensorFlow calls stateful what touches something, but also lists of tensors, random numbers, and whatever calls.
    stateful = {op for op in predict.PURE_OPS.split() if op_def_registry.get(op).is_stateful}
    known = (
        "Assert Case CheckNumerics CheckNumericsV2 GuaranteeConst If While StatefulPartitionedCall FractionalAvgPool"
    )
    random = "RandomShuffle RandomStandardNormal RandomUniform RandomUniformInt TruncatedNormal"
    assert {op for op in stateful if not op.startswith("TensorArray")} <= {*known.split(), *random.split()}
    harmful = "ReadFile MatchingFiles ImmutableConst DebugIdentity PyFuncStateless XlaCustomCall XlaCustomCallV2"
    assert not {*harmful.split()} & set(predict.PURE_OPS.split())
