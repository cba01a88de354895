"""--tfhub_module: modules of both formats, made here, from photographs to predictions; and handles that are none."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from test_export import FEATURES, FINAL, bytes_of, predicted, served, session_run

import retrain

SIDE, SIZE = 20, 7
WEIGHTS, OFFSET = (
    np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed, shape in enumerate([(3, 3, 3, 7), (7,)])
)


@pytest.fixture(scope="module")
def tf():
    return retrain.import_tensorflow()


def network(tf, pixels, weights, offset):
    """Return the features [n, SIZE] of pixels in [0, 1]: a convolution, batch normalisation, a mean."""
    maps, one, zero = tf.nn.conv2d(pixels, weights, 2, "SAME"), tf.ones([SIZE]), tf.zeros([SIZE])
    maps, *_ = tf.compat.v1.nn.fused_batch_norm(maps, one, offset, zero, one, is_training=False)
    return tf.reduce_mean(tf.nn.relu(maps), [1, 2])


def save_call(tf, folder: Path, call, *specs) -> None:
    """Write a TF2 module of one function."""
    module = tf.Module()
    module.__call__ = tf.function(call, input_signature=specs)
    tf.saved_model.save(module, str(folder))


def make_tf2(tf, folder: Path, side: int | None = SIDE) -> Path:
    """Write a module of the TF2 format, called with images and whether it trains."""
    module = tf.Module()
    module.kept = [tf.Variable(WEIGHTS), tf.Variable(OFFSET)]

    @tf.function
    def call(images, training=False):
        return network(tf, images, *module.kept) + (100 if training else 0)

    module.__call__ = call
    for training in (True, False):
        call.get_concrete_function(tf.TensorSpec([None, side, side, 3], tf.float32), training=training)
    tf.saved_model.save(module, str(folder))
    return folder


def make_tf1(tf, folder: Path, signature: str = "default") -> None:
    """Write a module of the TF1 Hub format: variables, one graph to train and one without a tag, and its mark."""
    v1 = tf.compat.v1
    builder = v1.saved_model.Builder(str(folder))
    for tags in ([], ["train"]):
        with tf.Graph().as_default(), v1.Session() as session:
            images = v1.placeholder(tf.float32, [None, SIDE, SIDE, 3])
            variables = [v1.Variable(values, use_resource=True) for values in (WEIGHTS, OFFSET)]
            features = network(tf, images, *variables)
            session.run(v1.global_variables_initializer())
            outputs = {"default": features + 100 if tags else features, "other": features * 2}
            signatures = {signature: v1.saved_model.predict_signature_def({"images": images}, outputs)}
            if tags:
                builder.add_meta_graph(tags, signatures)
            else:
                builder.add_meta_graph_and_variables(session, tags, signatures)
    builder.save()
    (folder / "tfhub_module.pb").write_bytes(b"\x08\x03")  # FORMAT_SAVEDMODEL_V2


def make_exported(tf, folder: Path, called: bool = False) -> None:
    """Write what keras.Model.export writes, signatures only, the first without images; or a call without."""
    module = tf.Module()
    module.kept = [tf.Variable(WEIGHTS), tf.Variable(OFFSET)]
    spec = tf.TensorSpec([None, SIDE, SIDE, 3], tf.float32, name="images")
    serve = tf.function(lambda images: network(tf, images, *module.kept), input_signature=[spec])
    other = tf.function(lambda vector: 2 * vector, input_signature=[tf.TensorSpec([3], tf.float32, name="vector")])
    if called:
        module.__call__ = other
    tf.saved_model.save(module, str(folder), signatures={"default": other, "serving_default": serve})


MAKERS = {
    "TF2": make_tf2,
    "TF2, any size": lambda tf, folder: make_tf2(tf, folder, None),
    "signatures only": make_exported,
    "called without images": lambda tf, folder: make_exported(tf, folder, called=True),
    "TF1": make_tf1,
    "TF1, image_feature_vector": lambda tf, folder: make_tf1(tf, folder, "image_feature_vector"),
}


@pytest.mark.parametrize("kind, engine", [*((kind, "litert") for kind in MAKERS), ("TF2", "tensorflow")])
def test_from_photographs_to_predictions(tf, train, image_dir, tmp_path, kind, engine):
    MAKERS[kind](tf, tmp_path / "modules/some_net")
    size = ["--image_size", SIDE] if "any" in kind else []
    flags = ["--model_dir", tmp_path / "kept", "--saved_model_dir", "saved", "--learning_rate", 1, "--engine", engine]
    assert train("--tfhub_module", "modules/some_net", *size, *flags) == 0
    paths = sorted(image_dir.glob("*/*_0[0-3].jpg"))
    pixels = [retrain.read_image(path, retrain.Reading(), (SIDE, SIDE)) for path in paths]
    resized = np.stack([retrain.resize_bilinear(each, (SIDE, SIDE)) for each in pixels]) / 255
    expected = network(tf, resized, WEIGHTS, OFFSET).numpy()
    kept = [Path("bottleneck", path.parent.name, f"{path.name}_modules~some_net.txt") for path in paths]
    np.testing.assert_allclose([np.loadtxt(path, delimiter=",") for path in kept], expected, atol=1e-4)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(session_run(Path("output_graph.pb"), FEATURES, bytes_of(paths)), expected, atol=1e-3)
    scores = session_run(Path("output_graph.pb"), FINAL, bytes_of(paths))
    np.testing.assert_allclose(predicted(tmp_path, paths), scores, atol=1e-3)
    np.testing.assert_allclose(served(Path("saved"), paths), scores, atol=1e-3)


def test_operators_that_litert_lacks_are_run_by_tensorflow(tf, train, image_dir, tmp_path, capsys):
    def call(images):
        brightness = tf.reduce_mean(images, [1, 2, 3])[:, None]
        small = tf.compat.v1.image.resize(images, [2, 2], "area")
        return tf.concat([brightness, tf.reshape(small, [-1, 12])], 1)

    save_call(tf, tmp_path / "net", call, tf.TensorSpec([None, 8, 8, 3], tf.float32))
    Path("output_graph.tflite").write_bytes(b"an earlier run's")
    assert train("--tfhub_module", "net", "--model_dir", "kept", "--engine", "litert", "--random_seed", 1) == 0
    said = capsys.readouterr()
    assert said.err.count("WARNING: LiteRT can't run net (") == 1
    assert "output_graph.tflite" not in said.out and not Path("output_graph.tflite").exists()
    paths = sorted(image_dir.glob("*/*_00.jpg"))
    scores = session_run(Path("output_graph.pb"), FINAL, bytes_of(paths))
    np.testing.assert_allclose(predicted(tmp_path, paths), scores, atol=0.01)  # with TensorFlow's own decoder


@pytest.mark.parametrize(
    "make, flags, said",
    [
        (lambda tf, net: net.mkdir(), (), "net is no SavedModel (SavedModel file does not exist"),
        (lambda tf, net: save_call(tf, net, tf.identity, tf.TensorSpec([None], tf.string)), (), "(it takes no images"),
        (
            lambda tf, net: save_call(tf, net, tf.identity, tf.TensorSpec([None, 8, 8, 3])),
            (),
            "it gives float32 (None, 8, 8, 3)",
        ),
        (lambda tf, net: tf.saved_model.save(tf.Module(), str(net)), (), "nor does a signature default or"),
        (MAKERS["TF2, any size"], (), "it takes images of any size; name one with --image_size)."),
    ],
    ids=["empty", "text", "maps", "silent", "any size"],
)
def test_a_folder_that_is_no_image_feature_model_gets_one_sentence(tf, train, tmp_path, capsys, make, flags, said):
    make(tf, tmp_path / "net")
    assert train("--tfhub_module", "net", "--logging_verbosity", "ERROR", "--model_dir", tmp_path, *flags) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("retrain.py: error: net is no ") and said in sentence
    assert not list(tmp_path.glob("*.tflite"))


@pytest.mark.parametrize(
    "handle, said", [("nowhere/at/all", "SavedModel file does not exist"), ("https://x/1", "can't be downloaded (")]
)
def test_a_handle_that_leads_nowhere_gets_one_sentence(train, capsys, monkeypatch, handle, said):
    monkeypatch.setitem(sys.modules, "tensorflow_hub", types.SimpleNamespace(resolve=open))  # which fails
    assert train("--tfhub_module", handle, "--logging_verbosity", "ERROR") == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert handle in sentence and said in sentence


def test_an_address_is_resolved_by_tensorflow_hub(tf, train, tmp_path, monkeypatch):
    hub = types.SimpleNamespace(resolve=lambda handle: make_tf2(tf, tmp_path / "fetched"))
    monkeypatch.setitem(sys.modules, "tensorflow_hub", hub)
    assert train("--tfhub_module", "https://tfhub.dev/google/net/feature_vector/5", "--model_dir", tmp_path) == 0
    names = {path.name.partition(".jpg_")[2] for path in Path("bottleneck").glob("*/*.txt")}
    assert names == {"https~tfhub.dev~google~net~feature_vector~5.txt"}  # as the classic script named them


def test_an_average_pool_before_a_narrow_convolution_is_no_stumbling_block(tf, train, tmp_path):
    """As Keras' InceptionV3 has it in a tf.Module."""

    def call(images):
        return tf.reduce_mean(tf.nn.conv2d(tf.nn.avg_pool2d(images, 3, 1, "SAME"), WEIGHTS[:1, :1], 1, "SAME"), [1, 2])

    save_call(tf, tmp_path / "net", call, tf.TensorSpec([None, SIDE, SIDE, 3], tf.float32))
    assert train("--tfhub_module", "net", "--model_dir", "kept", "--no_report") == 0
