"""--architecture vgg16, with random weights: features as Keras' own, and from photographs to predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_export import FEATURES, FINAL, bytes_of, predicted, served, session_run

import retrain

FULL, NOTOP = (f"vgg16_weights_tf_dim_ordering_tf_kernels{end}.h5" for end in ("", "_notop"))


def vgg16(include_top: bool):
    """Return Keras' VGG16 with random weights, of the size at which a signal neither fades nor grows."""
    keras = retrain.import_tensorflow().keras
    keras.utils.set_random_seed(0)
    model = keras.applications.VGG16(include_top=include_top, weights=None, input_shape=(224, 224, 3))
    for layer in model.layers:
        if layer.name.startswith("block"):
            layer.set_weights([values * np.float32(np.sqrt(2)) for values in layer.get_weights()])
    return model


def kept_features(layer: str, paths: list[Path]) -> np.ndarray:
    """Return what the bottleneck files of images hold, float32 [paths, n]."""
    kept = [Path("bottleneck", path.parent.name, f"{path.name}_vgg16_{layer}.txt") for path in paths]
    return np.array([np.loadtxt(path, delimiter=",") for path in kept])


def keras_features(model, layer: str, paths: list[Path]) -> np.ndarray:
    """Return what Keras itself makes of images, float32 [paths, n]."""
    keras = retrain.import_tensorflow().keras
    pixels = [retrain.read_image(path, retrain.Reading(), (224, 224)) for path in paths]
    resized = np.stack([retrain.resize_bilinear(each, (224, 224)) for each in pixels])
    kept = keras.Model(model.inputs, model.get_layer("fc2" if layer == "fc2" else "block5_pool").output)
    made = kept.predict(keras.applications.vgg16.preprocess_input(resized), verbose=0)
    return made.mean((1, 2)) if layer == "avg_pool" else made.reshape(len(paths), -1)


@pytest.fixture
def few(image_dir) -> list[Path]:
    """Leave three images of each of two classes in the folder."""
    shutil.rmtree(image_dir / "blue")
    for path in set(image_dir.glob("*/*")) - set(image_dir.glob("*/*_0[012].jpg")):
        path.unlink()
    return sorted(image_dir.glob("*/*"))


@pytest.mark.parametrize(
    "flags, layer, size", [((), "avg_pool", 512), (("--bottleneck_layer", "block5_pool"), "block5_pool", 25088)]
)
def test_from_photographs_to_predictions(train, few, tmp_path, flags, layer, size):
    model = vgg16(include_top=False)
    model.save(tmp_path / NOTOP)
    usual = ["--architecture", "vgg16", "--model_dir", tmp_path, "--saved_model_dir", "saved"]
    assert train(*usual, *flags, "--learning_rate", 0.0001) == 0
    expected, features = keras_features(model, layer, few), kept_features(layer, few)
    assert features.shape == (6, size)
    np.testing.assert_allclose(features, expected, atol=1e-3)
    assert expected.std() > 1
    np.testing.assert_allclose(session_run(Path("output_graph.pb"), FEATURES, bytes_of(few)), expected, atol=1e-3)
    scores = session_run(Path("output_graph.pb"), FINAL, bytes_of(few))
    np.testing.assert_allclose(predicted(tmp_path, few), scores, atol=1e-3)
    np.testing.assert_allclose(served(Path("saved"), few), scores, atol=1e-3)


def test_fc2_from_the_full_weights(train, few, tmp_path, monkeypatch):
    """With 64 units in its fully-connected layers: with 4,096 the test would take two minutes and three gigabytes."""
    from keras.src.applications import vgg16 as application

    dense = application.layers.Dense
    monkeypatch.setattr(application.layers, "Dense", lambda units, **more: dense(min(units, 64), **more))
    model = vgg16(include_top=True)
    model.save(tmp_path / FULL)
    assert train("--architecture", "vgg16", "--bottleneck_layer", "fc2", "--model_dir", tmp_path) == 0
    expected = keras_features(model, "fc2", few)
    np.testing.assert_allclose(kept_features("fc2", few), expected, atol=1e-3)
    assert expected.std() > 0.1
    scores = session_run(Path("output_graph.pb"), FINAL, bytes_of(few))
    np.testing.assert_allclose(predicted(tmp_path, few), scores, atol=1e-3)


@pytest.mark.parametrize("content", [b"<html>not found</html>", None], ids=["damaged", "missing"])
def test_weights_that_can_not_be_had_get_one_sentence(train, few, tmp_path, capsys, monkeypatch, content):
    """Missing, they are Keras' to download, which can't."""

    def fails(*arguments, **more):
        raise Exception("URL fetch failure on https://storage.googleapis.com/x: None")

    from keras.src.applications import vgg16 as application

    monkeypatch.setattr(application.file_utils, "get_file", fails)
    if content:
        (tmp_path / NOTOP).write_bytes(content)
    assert train("--architecture", "vgg16", "--model_dir", tmp_path, "--logging_verbosity", "ERROR") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / NOTOP} is damaged, or can't be downloaded: put it there from any machine (" in said
