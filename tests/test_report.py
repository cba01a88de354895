"""What the diagnostics are for: lists that can be left out, `unsure`, and a temperature that goes into the graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import picture

import predict
import retrain
from retrain import Image


def test_exclude_leaves_out_what_a_list_names(tmp_path, caplog):
    images = [Image(tmp_path / name, "x") for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/\u8349 x.jpg")]
    listed = tmp_path / "list.tsv"
    listed.write_text("# a comment\nsome/where/a/2.jpg\tb\t0.9\nb/\u8349 x.jpg\n\nb/9.jpg\n", "utf-8")
    assert retrain.leave_out(images, listed) == [images[0], images[2]]
    listed.write_text("c/1.jpg\n")
    with pytest.raises(retrain.UserError, match="names none of the pictures"):
        retrain.leave_out(images, listed)
    with pytest.raises(retrain.UserError, match="No such file"):
        retrain.leave_out(images, tmp_path / "none")


def test_predict_says_unsure_of_another_thing(train, tmp_path, capsys):
    assert train("--how_many_training_steps", 200, "--random_seed", 1) == 0
    noise = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    picture((200, 40, 40), 99).save(tmp_path / "red.jpg", quality=95)
    capsys.readouterr()
    assert predict.main(["--image", "noise.png", "red.jpg", "--json", "named.json", "--csv", "named.csv"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[:2]
    assert first.splitlines()[1].startswith("unsure: ")
    assert second.splitlines()[1].startswith("red things (score = ")
    assert [entry["unsure"] for entry in json.loads(Path("named.json").read_text())] == [True, False]
    assert Path("named.csv").read_text().splitlines()[1].endswith(",unsure")

    (tmp_path / "output_graph.tflite").unlink()  # the frozen graph alone is as doubtful
    predict.main(["--image", "noise.png", "red.jpg", "--json", "named.json"])
    assert [entry["unsure"] for entry in json.loads(Path("named.json").read_text())] == [True, False]


@pytest.mark.parametrize(
    "change",
    [{"exemplars_shape": [0, 2]}, {"exemplars_float16": "!"}, {"least_score": "a"}, {"coverage": None}, None],
)
def test_a_damaged_measure_of_the_familiar_gets_one_sentence(train, tmp_path, capsys, change):
    assert train("--how_many_training_steps", 20) == 0
    facts = json.loads(Path("output_graph.json").read_text("utf-8"))
    facts["familiar"] = facts["familiar"] | change if change else "odd"
    Path("output_graph.json").write_text(json.dumps(facts), "utf-8")
    picture((200, 40, 40), 99).save(tmp_path / "red.jpg")
    capsys.readouterr()
    assert predict.main(["--image", "red.jpg"]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "output_graph.json is damaged" in sentence


def test_temperature_leaves_the_classes_and_no_report_the_classic_graph(train, tmp_path):
    flags = "--random_seed", 3, "--head", "softmax"
    assert train(*flags, "--no_report") == 0
    plain, facts = Path("output_graph.pb").read_bytes(), json.loads(Path("output_graph.json").read_text())
    assert (facts["temperature"], facts["familiar"]) == (1.0, None)
    assert train(*flags, "--output_graph", "other.pb") == 0
    temperature = json.loads(Path("other.json").read_text())["temperature"]
    assert temperature != 1
    assert Path("other.pb").read_bytes() != plain
    paths = sorted(Path("pictures/green").iterdir())[:5]
    for path in paths:
        pixels = retrain.resize_bilinear(retrain.read_image(path, retrain.Reading(), (33, 33)), (33, 33))
        before, after = (retrain.LiteModel(Path(name))(pixels) for name in ("output_graph.tflite", "other.tflite"))
        cooled = before ** (1 / temperature)
        np.testing.assert_allclose(after, cooled / cooled.sum(), atol=1e-4)
        assert before.argmax() == after.argmax()
