"""predict.py: what it names, what it prints and writes, and that the graph with and without TensorFlow say the same."""

from __future__ import annotations

import ast
import base64
import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, GraphBuilder, make_image

import predict

RED, GREEN, BLUE = (200, 40, 40), (40, 180, 60), (40, 60, 210)


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """The working folder: a copy of what retrain.py wrote, and no images."""
    for name in ("output_graph.pb", "output_graph.tflite", "output_graph.json", "output_labels.txt"):
        shutil.copy(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setattr(predict, "import_tensorflow", None)


@pytest.fixture
def no_lite(monkeypatch):
    monkeypatch.setattr(predict, "LiteModel", None)


def save(path: str | Path, colour: tuple[int, int, int] = RED, seed: int = 50, **options) -> Path:
    """Write an image, with the folders above it, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(colour, seed).save(path, **options)
    return path


def rows_of(path: str) -> list[dict]:
    """Return the rows of a table that predict.py wrote."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def scores_of(*flags: str) -> np.ndarray:
    """Run predict.py, and return its scores [images, labels] out of its CSV, with labels in the order of training."""
    assert predict.main([*flags, "--csv", "scores.csv"]) == 0
    return np.array([list(row.values())[4:-3] for row in rows_of("scores.csv")], float)


def one_sentence(capsys) -> str:
    """Return the one line that stderr must hold, which must tell of an error of predict.py; stdout must be empty."""
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("predict.py: error: ")
    assert said.out == ""
    return line


def test_classic_lines_of_one_image(folder, capsys, no_tensorflow):
    save("red.jpg")
    assert predict.main(["--image", "red.jpg"]) == 0
    said = capsys.readouterr()
    lines = re.findall(r"^([\w ]+) \(score = ([01]\.\d{5})\)$", said.out, re.MULTILINE)
    assert said.err == "" and len(lines) == len(said.out.splitlines()) == 3 and lines[0][0] == "red things"
    scores = [float(score) for _, score in lines]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=2e-5)


def test_default_is_the_folder_test_images(folder, capsys):
    save("test_images/deep/b.jpg", GREEN)
    assert predict.main([]) == 0
    assert capsys.readouterr().out.startswith("green (score = ")


@pytest.mark.parametrize(
    "asked, found",
    [
        (["p"], ["p/a.jpg", "p/b.png", "p/sub/c.jpg", "p/sub/sub/[d].jpg"]),
        (["p/**/*.jpg"], ["p/a.jpg", "p/sub/c.jpg", "p/sub/sub/[d].jpg"]),
        (["p/s*"], ["p/sub/c.jpg", "p/sub/sub/[d].jpg"]),
        (["p/sub/sub/[d].jpg"], ["p/sub/sub/[d].jpg"]),
        (["p/b.png", "p/a.jpg"], ["p/b.png", "p/a.jpg"]),
        (["p/a.jpg", "p/*.jpg", "p/a.jpg"], ["p/a.jpg"]),
        (["p/[ab]*", "p/e*"], ["p/a.jpg", "p/b.png", "p/e*"]),
    ],
)
def test_files_folders_and_globs(folder, asked, found):
    for name in ("a.jpg", "b.png", "sub/c.jpg", "sub/sub/[d].jpg", ".hidden/e.jpg"):
        save(f"p/{name}")
    Path("p/Thumbs.db").write_bytes(b"not ours")
    Path("p/.DS_Store").write_bytes(b"nor this")
    assert predict.find_images(asked) == [Path(name) for name in found]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--graph", "no.pb"], "no.pb: there is no such file"),
        (["--graph", "lone.tflite"], "or neither lone.json nor lone_labels.txt that belongs to it"),
        (["--labels", "no.txt"], "no.txt: No such file or directory"),
        (["--labels", "few.txt"], "--labels: there are 2 for the 3 classes"),
        (["--graph", "words.pb", "--labels", "output_labels.txt"], "words.pb"),
        (["--graph", "red.jpg"], "nor red.jpg_labels.txt"),
    ],
)
def test_files_that_are_missing_or_wrong(folder, capsys, flags, named):
    save("red.jpg")
    Path("few.txt").write_text("red things\n\nblue\n")
    Path("words.pb").write_text("hello")
    shutil.copy("output_graph.tflite", "lone.tflite")
    assert predict.main(["--image", "red.jpg", *flags]) == 1
    assert named in one_sentence(capsys)


@pytest.mark.parametrize("labels, count", [("a\nb\n", 2), ("a\nb\nc\nd\n", 4), ("", 0)])
def test_labels_that_do_not_fit_a_bare_graph(folder, capsys, labels, count):
    save("red.jpg")
    Path("output_graph.json").unlink()
    Path("output_labels.txt").write_text(labels)
    assert predict.main(["--image", "red.jpg"]) == 1
    assert f"there are {count} for the 3 classes" in one_sentence(capsys)


@pytest.mark.parametrize("name", ["\x1b[31mred\x1b[0m.jpg", "a\nb\rc.jpg", b"\xff.jpg"])
@pytest.mark.parametrize("broken", [False, True], ids=["good", "broken"])
def test_names_can_not_play_tricks_on_the_terminal(folder, capsys, name, broken):
    path = Path(os.fsdecode(name))
    save("other.jpg")
    path.write_bytes(b"no image" if broken else Path("other.jpg").read_bytes())
    assert predict.main(["--image", str(path), "other.jpg", "--csv", "out.csv", "--json", "out.json"]) == int(broken)
    said = capsys.readouterr()
    shown, escaped = said.err if broken else said.out, predict.printable(path)
    assert escaped in shown and escaped.isprintable()
    assert not re.search(r"[^\x20-\x7e\n]", shown)
    assert len(said.err.splitlines()) == int(broken)
    assert rows_of("out.csv")[0]["image"] == str(path).encode("utf-8", "backslashreplace").decode()
    assert json.loads(Path("out.json").read_text("utf-8"))[0]["image"] == str(path)


def test_labels_can_not_either(folder, capsys):
    save("red.jpg")
    Path("output_graph.json").unlink()
    Path("output_labels.txt").write_text("\x1b[2Jx\nb\nc\n")
    assert predict.main(["--image", "red.jpg"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.fixture
def varied(folder) -> list[str]:
    """Images of several formats, and a photograph taken with the phone turned."""
    slope = np.linspace(0, 150, 48)[:, None, None] + np.asarray(make_image(GREEN, 3)) * 0.4
    for orientation in (1, 3, 6):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        PIL.Image.fromarray(slope.astype(np.uint8)).save(f"turned{orientation}.jpg", exif=exif, quality=95)
    for name, mode in {"a.png": "RGBA", "b.png": "P", "c.webp": "RGB", "d.bmp": "RGB"}.items():
        make_image(BLUE, 8).convert(mode).save(name)
    return ["turned1.jpg", "turned3.jpg", "turned6.jpg", "a.png", "b.png", "c.webp", "d.bmp"]


def test_bare_graph_gives_the_same_scores(varied, monkeypatch):
    expected = scores_of(*varied)
    monkeypatch.setattr(predict, "LiteModel", None)
    Path("output_graph.json").unlink()
    np.testing.assert_allclose(scores_of(*varied), expected, atol=1e-3)
    # The orientation counts: the same pixels, differently turned, are different images.
    assert (np.abs(expected[0] - expected[1:3]).max(axis=1) > 1e-4).all()


def test_reading_flags_of_the_training_are_followed(train, tmp_path, varied):
    assert train("--ignore_exif_orientation") == 0
    scores = scores_of(*varied[:3])
    assert (scores == scores[0]).all()


def test_lone_tflite_needs_neither_the_graph_nor_tensorflow(folder, no_tensorflow):
    save("red.jpg")
    expected = scores_of("red.jpg")
    Path("output_graph.pb").unlink()
    assert (scores_of("red.jpg") == expected).all()
    assert (scores_of("red.jpg", "--graph", "output_graph.tflite") == expected).all()


def test_one_image_and_many_get_the_same_scores(folder, no_tensorflow):
    names = [str(save(f"{i}.jpg", seed=i)) for i in range(7)]
    np.testing.assert_allclose(scores_of(names[6])[0], scores_of(*names)[6], atol=1e-5)
    classifier = predict.Classifier("output_graph.pb")
    twice = [Path(names[0])] * 2
    assert [prediction.path for prediction in predict.predict(classifier, twice)] == twice


def test_other_graph_than_the_tflites_is_run_itself(folder, trained, no_lite):
    """A stale .tflite is not used once the graph was replaced, as by the classic script."""
    save("red.jpg")
    shutil.copy(trained / "intermediate_graph/intermediate_100.pb", "output_graph.pb")
    found = scores_of("red.jpg")
    Path("output_graph.tflite").unlink()
    assert (scores_of("red.jpg") == found).all()


@pytest.mark.parametrize(
    "spoilt, data", [("tflite", b""), *(("json", data) for data in (b"", b"{}", b"[]", b'{"labels": 3}'))]
)
def test_damaged_tflite_or_facts_are_not_used(folder, no_lite, spoilt, data):
    save("red.jpg")
    Path(f"output_graph.{spoilt}").write_bytes(data)
    assert scores_of("red.jpg").argmax() == 0


def test_classic_graph_runs(folder, small_graph, no_lite):
    """A graph as the classic script froze it: batch norm unfolded, producer 8, the bytes a constant, "Add"."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    builder = GraphBuilder(0)
    whole = tf.compat.v1.GraphDef.FromString(small_graph.read_bytes())
    graph = builder.graph = tf.compat.v1.graph_util.extract_sub_graph(whole, ["pool_3/_reshape"])
    float32, scope = tf.float32, "final_training_ops"
    fed = builder.add("PlaceholderWithDefault", "input/BottleneckInputPlaceholder", "pool_3/_reshape", dtype=float32)
    fed_shape = graph.node[-1].attr["shape"].shape.dim
    fed_shape.add(size=-1), fed_shape.add(size=16)
    for name, size in (("weights", (16, 2)), ("biases", 2)):
        constant = builder.const(f"{scope}/{name}/final_{name}", random.normal(size=size))
        builder.add("Identity", f"{constant}/read", constant, T=float32)
    product = builder.add("MatMul", f"{scope}/Wx_plus_b/MatMul", fed, f"{scope}/weights/final_weights/read", T=float32)
    logits = builder.add("Add", f"{scope}/Wx_plus_b/add", product, f"{scope}/biases/final_biases/read", T=float32)
    builder.add("Softmax", "final_result", logits, T=float32)
    assert graph.versions.producer == 8
    assert "BatchNormWithGlobalNormalization" in {node.op for node in graph.node}
    Path("classic.pb").write_bytes(graph.SerializeToString())
    Path("classic.txt").write_text("one\ntwo\n")

    names = [str(save(f"{i}.jpg", colour)) for i, colour in enumerate((RED, GREEN, BLUE))]
    found = scores_of(*names, "--graph", "classic.pb", "--labels", "classic.txt")
    with tf.Graph().as_default() as imported, tf.compat.v1.Session(graph=imported) as session:
        tf.import_graph_def(graph, name="")
        for name, scores in zip(names, found, strict=True):
            expected = session.run("final_result:0", {"DecodeJpeg/contents:0": Path(name).read_bytes()})[0]
            np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_what_is_not_found_is_told_with_the_likely_cause(folder, capsys):
    save("more/red/a.jpg")
    Path("empty/red").mkdir(parents=True)
    Path("file").write_text("mine")
    for arguments, said in (
        (["my", "photos"], "--image my, photos: there is no such image, nor a folder with any; put a name that has"),
        ([], "--image test_images: there is no such image"),
        (["empty"], "--image empty: there is no such image, nor a folder with any"),
        (["more/red/a.jpg", "--csv", "more"], "--csv more: what lies there must not be"),
        (["more/red/a.jpg", "--json", os.devnull], f"--json {os.devnull}: what lies there must not be"),
    ):
        assert predict.main(arguments) == 1
        assert f"predict.py: error: {said}" in capsys.readouterr().err
    assert predict.main(["more/red/a.jpg", "--json", "file/out"]) == 1  # named, but not kept
    assert "predict.py: error: file/out could not be written (File exists)." in capsys.readouterr().err


def test_images_may_stand_before_and_after_flags(folder, capsys):
    images = [str(save(f"{name}.jpg")) for name in "abcd"]
    assert predict.main([images[0], "--top_k", "1", images[1], "--image", *images[2:]]) == 0
    assert "4 images: red things 4." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        predict.main([*images, "--cvs", "out.csv"])
    assert "predict.py: error: unrecognized arguments: --cvs" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="making links needs rights there")
def test_a_link_is_written_through_and_not_replaced(folder):
    save("a.jpg")
    Path("link.csv").symlink_to("real.csv")
    assert predict.main(["a.jpg", "--csv", "link.csv"]) == 0
    assert Path("link.csv").is_symlink() and Path("real.csv").read_text("utf-8-sig").startswith("image,label,score")


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_reader_that_has_seen_enough_ends_it_quietly(folder):
    for i in range(40):
        save(f"many/{i:02}.jpg")
    command = f'"{sys.executable}" "{ROOT / "predict.py"}" --image many --csv many.csv '
    done = subprocess.run(command + "| head -n 1", shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("many/00.jpg\n", "")
    done = subprocess.run(command + ">&-", shell=True, capture_output=True, text=True)  # or wants to see nothing
    assert (done.returncode, done.stderr, len(rows_of("many.csv"))) == (0, "", 40)


def test_several_images_have_headers_and_a_summary(folder, capsys):
    for name, colour in {"r.jpg": RED, "g.png": GREEN, "b.webp": BLUE}.items():
        save(name, colour)
    assert predict.main(["r.jpg", "--image", "g.png", "--image", "b.webp", "--top_k", "1"]) == 0
    assert re.sub(r"\d\.\d{5}", "X", capsys.readouterr().out).split("\n\n") == [
        "r.jpg\nred things (score = X)", "g.png\ngreen (score = X)", "b.webp\nblue (score = X)",
        "3 images: red things 1, green 1, blue 1.\n",
    ]  # fmt: skip


def test_csv_and_json(folder, capsys):
    save("=r,1.jpg")  # begins like a formula, and needs quotes
    Path("broken.jpg").write_bytes(b"no image")
    flags = ["--csv", "new/out.csv", "--json", "new/out.json"]
    assert predict.main(["--image", "nosuch.jpg", "=r,1.jpg", "broken.jpg", *flags]) == 1
    said = capsys.readouterr()
    printed = re.findall(r"(.*) \(score = (.*)\)", said.out)
    reason = "not an image in JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC format"
    missing = f"it can't be read ({os.strerror(errno.ENOENT)})"
    told = [f"predict.py: error: {name}" for name in (f"nosuch.jpg: {missing}", f"broken.jpg: {reason}")]
    assert said.err.splitlines() == told
    assert said.out.splitlines()[-1] == "Wrote new/out.csv, new/out.json."
    assert Path("new/out.csv").read_bytes().startswith(b"\xef\xbb\xbfimage,")  # Excel takes it for UTF-8
    _, good, bad = rows_of("new/out.csv")
    classes = ["red things", "blue", "green"]
    assert list(good) == ["image", "label", "score", "error", *classes, "unsure", "reason", "likeness"]
    assert (good["image"], good["label"], good["error"]) == ("'=r,1.jpg", "red things", "")
    assert {label: f"{float(good[label]):.5f}" for label, _ in printed} == dict(printed)
    assert 0.5 < float(good["likeness"]) <= 1
    assert list(bad.values()) == ["broken.jpg", "", "", reason, "", "", "", "", "", ""]
    _, good, bad = json.loads(Path("new/out.json").read_text("utf-8"))
    assert [(named["label"], f"{named['score']:.5f}") for named in good["predictions"]] == printed
    assert (good["unsure"], good["reason"], good["error"]) == (False, "", None)
    assert bad == {
        "image": "broken.jpg", "predictions": [], "unsure": False, "reason": "", "likeness": None, "error": reason
    }  # fmt: skip


def familiar(**limits) -> None:
    """Change the thresholds of `unsure` in output_graph.json."""
    facts = json.loads(Path("output_graph.json").read_text("utf-8"))
    facts["familiar"] |= limits
    Path("output_graph.json").write_text(json.dumps(facts), "utf-8")


@pytest.mark.parametrize(
    "limits, reason",
    [
        ({"least_similarity": 2}, "unlike the training images"),
        ({"least_similarity": -1, "least_score": 2}, "between red things and (green|blue)"),
    ],
)
def test_unsure_says_why(folder, capsys, limits, reason):
    save("red.jpg")
    familiar(**limits)
    assert predict.main(["red.jpg", "--csv", "out.csv"]) == 0
    assert re.match(f"unsure: {reason}; the best guesses are\nred things ", capsys.readouterr().out)
    (row,) = rows_of("out.csv")
    assert row["unsure"] == "unsure" and re.fullmatch(reason, row["reason"])


def test_folders_named_like_classes_give_the_accuracy(folder, capsys):
    images = {"Red-Things/a.jpg": RED, "green/b.jpg": GREEN, "blue/c.jpg": RED, "others/d.jpg": BLUE}
    for name, colour in images.items():
        save(f"photos/{name}", colour)
    assert predict.main(["photos"]) == 0
    assert capsys.readouterr().out.endswith(
        "\n4 images: red things 2, green 1, blue 1.\nAccuracy on the 3 in folders named like classes: 66.7%.\n"
    )


def test_images_are_sorted_into_folders_and_nothing_is_overwritten(folder):
    save("p/a.jpg")
    save("q/a.jpg", seed=51)
    save("p/b.jpg", GREEN)
    for _ in range(2):  # the second time, all are there already
        assert predict.main(["p", "q", "--sort_into", "sorted"]) == 0
        copies = {path.relative_to("sorted").as_posix() for path in Path("sorted").rglob("*.*")}
        (other,) = copies - {"red things/a.jpg", "green/b.jpg"}
        assert re.fullmatch(r"red things/a_[0-9a-f]{8}\.jpg", other)
    assert Path("sorted", other).read_bytes() == Path("q/a.jpg").read_bytes()
    familiar(least_similarity=2)
    assert predict.main(["p", "--sort_into", "doubtful"]) == 0
    assert sorted(path.name for path in Path("doubtful/unsure").iterdir()) == ["a.jpg", "b.jpg"]


def test_what_was_named_before_a_stop_is_kept(folder, capsys, monkeypatch):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save(name)
    whole = predict.predict

    def stopped(classifier, paths):
        yield from whole(classifier, paths[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict", stopped)
    assert predict.main(["a.jpg", "b.jpg", "c.jpg", "--csv", "out.csv", "--json", "out.json"]) == 130
    said = capsys.readouterr()
    assert "2 images: red things 2." in said.out and said.err == "predict.py: stopped; what is done is kept.\n"
    assert len(Path("out.csv").read_text("utf-8-sig").splitlines()) == 3
    assert len(json.loads(Path("out.json").read_text())) == 2


def test_labels_are_those_of_the_training_or_given(folder, capsys):
    save("red.jpg")
    expected = scores_of("red.jpg")
    Path("output_labels.txt").write_text("of\nanother\ntraining\n")
    assert (scores_of("red.jpg") == expected).all()
    assert capsys.readouterr().err == ""
    Path("translated.txt").write_text("rouge\nbleu\nvert\n")
    assert (scores_of("red.jpg", "--labels", "translated.txt") == expected).all()
    assert list(rows_of("scores.csv")[0])[4:7] == ["rouge", "bleu", "vert"]


def test_names_are_derived_from_the_graphs():
    files = predict.OutputFiles("birds/ants.pb")
    names = [path.name for path in (files.graph, files.lite, files.facts, files.labels, files.report)]
    assert names == ["ants.pb", "ants.tflite", "ants.json", "ants_labels.txt", "ants_report.html"]
    assert predict.OutputFiles("output_graph.tflite").graph.name == "output_graph.pb"
    assert predict.OutputFiles("output_graph.pb").labels.name == "output_labels.txt"


# A HEIC file as a phone turned by a quarter writes it: 96 x 64, the left half red.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAaFtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAA"
    "AAAERAAAIAAQAAAAABxQABAAAAAAAAACgAAgAAAAAB7QABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVp"
    "bmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAAA4GlwcnAAAADAaXBjbwAAAHhodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGE"
    "ABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoDCBBZbqSSmubgIaDAgAAAMAyAAAAwAIQGIAAQAHRAHBcrAi"
    "QAAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABgAAAAQAAAABBwaXhpAAAAAAMICAgAAAAJaXJvdAMAAAAYaXBtYQAAAAAAAAABAA"
    "EFgQIDBIUAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEAAQAAAFRtZGF0AAAAJCgBrxmA93yFN//3Dmf9TYv+F4LtP//JRB2Vif1/0gB7HSv/gAAA"
    "AAZFeGlmAABNTQAqAAAACAABARIAAwAAAAEABgAAAAAAAA=="
)


@pytest.mark.parametrize("form", ["HEIC", "AVIF", "TIFF", "PNG"])
def test_formats_of_phones_and_scanners_are_read_upright(tmp_path, form):
    """The left half of what is stored is red; turned by a quarter as orientation 6 says, the top is."""
    pixels, exif, path = np.zeros((64, 96, 3), np.uint8), PIL.Image.Exif(), tmp_path / "image"
    pixels[:, :48], exif[0x0112] = RED, 6
    if form == "HEIC":
        pytest.importorskip("pi_heif", reason="pi-heif is not installed")
        path.write_bytes(HEIC)
    else:
        PIL.Image.fromarray(pixels).save(path, form, exif=exif)
    read = predict.read_image(path, predict.Reading(), (33, 33)).astype(int)
    assert read.shape == (96, 64, 3)
    assert abs(read[:40, :, 0] - 200).max() < 40 and read[56:, :, 0].max() < 40


@pytest.mark.parametrize("name", ["a.NEF", "b.dng"])
def test_raw_photographs_are_refused_by_name(tmp_path, name):
    make_image(RED, 1).save(tmp_path / name, "TIFF")
    with pytest.raises(predict.ImageError, match="a raw photograph"):
        predict.read_image(tmp_path / name, predict.Reading(), (33, 33))


BLOCKED = """import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        allowed = {"numpy", "PIL", "simplejpeg", "ai_edge_litert"} | set(sys.stdlib_module_names)
        if name.partition(".")[0] not in allowed and not name.startswith(("_", "site", "encodings")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv[0] = __file__ = "predict.py"
exec(compile(open("predict.py").read(), "predict.py", "exec"))
"""


def test_works_alone_with_four_packages(folder, trained):
    alone = folder / "alone"
    alone.mkdir()
    for path in (ROOT / "predict.py", trained / "output_graph.tflite", trained / "output_graph.json"):
        shutil.copy(path, alone)
    save("alone/red.jpg")
    Path("alone/phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    for flags, printed, told in (
        (
            ["red.jpg", "phone.heic"],
            "red.jpg\nred things (score = ",
            "phone.heic: .* pi-heif: .* install pi-heif",
        ),
        (["--page"], "", "No module named 'gradio'; .*install gradio, or all .*"),
    ):
        command = [sys.executable, "-c", BLOCKED, *flags]
        done = subprocess.run(command, cwd=alone, capture_output=True, text=True, encoding="utf-8")
        assert done.stdout.startswith(printed)
        assert re.fullmatch(rf"predict\.py: error: {told}\n", done.stderr)
    command = [sys.executable, "-c", BLOCKED.replace('"PIL", ', ""), "red.jpg"]
    done = subprocess.run(command, cwd=alone, capture_output=True, text=True, encoding="utf-8")
    assert "-m pip install numpy pillow simplejpeg ai-edge-litert; " in done.stderr


@pytest.mark.parametrize("script", ["predict.py", "retrain.py"])
def test_an_old_python_gets_far_enough_to_be_told(script):
    ast.parse((ROOT / script).read_text("utf-8"), feature_version=(3, 8))


# What a browser hands over when a file is dropped.
DROPPED = """data => {
  const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "red.jpg", {type: "image/jpeg"}));
  return transfer;
}"""


def test_an_image_dropped_on_the_page_is_named(folder):
    pytest.importorskip("gradio", reason="gradio is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("there is no Chromium")
    image, command = save("red.jpg").resolve(), [sys.executable, ROOT / "predict.py", "--page"]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "BROWSER": "true"})
    try:
        address = re.match(r"The page is at (http://127\.0\.0\.1:\d+/)", served.stdout.readline())[1]
        with playwright.sync_playwright() as browsers:
            switches = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
            browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=switches.split())
            page, asked = browser.new_page(), []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            data = base64.b64encode(image.read_bytes()).decode()
            dropped = page.evaluate_handle(DROPPED, data)
            page.locator("button:has(input[type=file])").dispatch_event("drop", {"dataTransfer": dropped})
            playwright.expect(page.get_by_test_id("label-output-value")).to_have_text("red things", timeout=30_000)
            browser.close()
        assert [url for url in asked if not url.startswith((address, "blob:", "data:"))] == []
    finally:
        served.terminate()
    assert served.wait() == 130


def test_what_litert_can_not_run_is_named(folder):
    Path("x.tflite").write_bytes(b"hello")
    with pytest.raises(predict.UserError, match=r"x\.tflite is no model that LiteRT can run \("):
        predict.LiteModel(Path("x.tflite"))


def test_no_image_is_written_over(folder, capsys):
    before = save("a.jpg").read_bytes()
    for flag in ("--csv", "--json"):
        assert predict.main(["a.jpg", flag, "a.jpg"]) == 1
        assert f"{flag} a.jpg: what lies there must not be written over; name another." in capsys.readouterr().err
    assert Path("a.jpg").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_to_its_own_folder_is_not_followed(folder):
    save("a/b/red.jpg")
    Path("a/loop").symlink_to(Path("a").resolve())
    Path("a/gone.jpg").symlink_to("nowhere.jpg")
    Path("a/itself.jpg").symlink_to("itself.jpg")
    os.mkfifo("a/pipe")  # to read it would take for ever
    assert predict.find_images(["a"]) == [Path("a/b/red.jpg")]
