"""predict.py: what it names, what it prints and writes, and that the graph with and without TensorFlow say the same."""

from __future__ import annotations

import csv
import io
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
from conftest import ROOT, picture, run_script

import predict
import retrain

LINE = r"[\w ]+ \(score = [01]\.\d{5}\)"
RED, GREEN, BLUE = (200, 40, 40), (40, 180, 60), (40, 60, 210)


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """The working folder: a copy of what retrain.py wrote, and no pictures."""
    for name in ("output_graph.pb", "output_graph.tflite", "output_graph.json", "output_labels.txt"):
        shutil.copy(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_tensorflow(monkeypatch):
    """TensorFlow is not to be used."""

    def fail():
        raise AssertionError("TensorFlow was loaded")

    monkeypatch.setattr(predict, "import_tensorflow", fail)


@pytest.fixture
def no_lite(monkeypatch):
    """LiteRT is not to be used."""

    def fail(*arguments):
        raise AssertionError("LiteRT was loaded")

    monkeypatch.setattr(predict, "LiteModel", fail)


def save(path: str | Path, colour: tuple[int, int, int] = RED, seed: int = 50, **options) -> Path:
    """Write a picture, with the folders above it, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour, seed).save(path, **options)
    return path


def scores_of(*flags) -> dict[str, dict[str, float]]:
    """Run predict.py, and return what it gives each label for each picture, out of its JSON."""
    assert predict.main([*map(str, flags), "--json", "scores.json", "--top_k", "1000"]) == 0
    entries = json.loads(Path("scores.json").read_text("utf-8"))
    return {entry["image"]: {named["label"]: named["score"] for named in entry["predictions"]} for entry in entries}


def assert_same_scores(one: dict, other: dict, within: float = 1e-3) -> None:
    """Assert that two answers of `scores_of` are of the same pictures and labels, and agree."""
    assert one.keys() == other.keys()
    for image, scores in one.items():
        assert scores == pytest.approx(other[image], abs=within)


def one_sentence(capsys) -> str:
    """Return the one line that stderr must hold, which must tell of an error of predict.py; stdout must be empty."""
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("predict.py: error: ")
    assert said.out == ""
    return line


# What it prints


def test_classic_lines_of_one_picture(folder, capsys, no_tensorflow):
    save("red.jpg")
    assert predict.main(["--image", "red.jpg"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err == ""
    assert len(lines) == 3 and all(re.fullmatch(LINE, line) for line in lines)
    assert lines[0].startswith("red things (score = ")
    scores = [float(line.split(" = ")[1].rstrip(")")) for line in lines]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("top_k, lines", [(1, 1), (2, 2), (99, 3)])
def test_top_k(folder, capsys, top_k, lines):
    save("red.jpg")
    assert predict.main(["--image", "red.jpg", "--top_k", str(top_k), "--json", "out.json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == lines
    (entry,) = json.loads(Path("out.json").read_text())
    assert len(entry["predictions"]) == lines


def test_several_pictures_have_headers(folder, capsys):
    for name, colour in {"r.jpg": RED, "g.png": GREEN, "b.webp": BLUE}.items():
        save(name, colour)
    assert predict.main(["--image", "r.jpg", "g.png", "b.webp", "--top_k", "1"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [re.sub(r"\d\.\d{5}", "X", block) for block in blocks] == [
        "r.jpg\nred things (score = X)", "g.png\ngreen (score = X)", "b.webp\nblue (score = X)", ""
    ]  # fmt: skip


def test_default_is_the_folder_test_images(folder, capsys):
    save("test_images/a.jpg")
    save("test_images/deep/b.jpg", GREEN)
    assert predict.main([]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line and "score" not in line]
    assert [Path(head) for head in heads] == [Path("test_images/a.jpg"), Path("test_images/deep/b.jpg")]


@pytest.mark.parametrize(
    "asked, found",
    [
        (["p/a.jpg"], ["p/a.jpg"]),
        (["p"], ["p/a.jpg", "p/b.png", "p/sub/c.jpg", "p/sub/sub/[d].jpg"]),
        (["p/sub"], ["p/sub/c.jpg", "p/sub/sub/[d].jpg"]),
        (["p/*.jpg"], ["p/a.jpg"]),
        (["p/**/*.jpg"], ["p/a.jpg", "p/sub/c.jpg", "p/sub/sub/[d].jpg"]),
        (["p/s*"], ["p/sub/c.jpg", "p/sub/sub/[d].jpg"]),
        (["p/sub/sub/[d].jpg"], ["p/sub/sub/[d].jpg"]),
        (["p/b.png", "p/a.jpg"], ["p/b.png", "p/a.jpg"]),
        (["p/a.jpg", "p/*.jpg", "p/a.jpg"], ["p/a.jpg"]),
        (["p/*"], ["p/a.jpg", "p/b.png", "p/sub/c.jpg", "p/sub/sub/[d].jpg"]),
    ],
    ids=lambda names: " ".join(names),
)
def test_files_folders_and_globs(folder, asked, found):
    for name in ("a.jpg", "b.png", "sub/c.jpg", "sub/sub/[d].jpg", ".hidden/e.jpg"):
        save(f"p/{name}")
    Path("p/Thumbs.db").write_bytes(b"not ours")
    Path("p/.DS_Store").write_bytes(b"nor this")
    Path("p/empty").mkdir()
    if asked == ["p/*"]:
        Path("p/Thumbs.db").unlink()  # whoever names it by a glob has asked for it
    assert predict.find_images(asked) == [Path(name) for name in found]


@pytest.mark.parametrize("asked", ["no.jpg", "*.jpg", "empty", "no/such/folder"])
def test_nothing_to_name(folder, capsys, asked):
    Path("empty").mkdir()
    assert predict.main(["--image", asked]) == 1
    assert asked in one_sentence(capsys)


def test_order_is_that_of_the_arguments(folder, capsys):
    """Pictures of very different sizes, which are done at different speeds on several cores."""
    names = []
    for i in range(12):
        side = 1500 if i % 3 == 0 else 40
        picture(GREEN, i, (side, side)).save(f"{i:02}.png")
        names.append(f"{i:02}.png")
    assert list(scores_of("--image", *names)) == names


# What it writes


def test_csv_and_json(folder, capsys):
    save("r.jpg")
    Path("broken.jpg").write_bytes(b"no picture")
    flags = ["--image", "r.jpg", "broken.jpg", "--csv", "new/out.csv", "--json", "new/out.json"]
    assert predict.main(flags) == 1
    printed = re.findall(r"(.*) \(score = (.*)\)", capsys.readouterr().out)
    with open("new/out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "score", "error", "red things", "blue", "green", "unsure"]
    assert [row["image"] for row in rows] == ["r.jpg", "broken.jpg"]
    assert (rows[0]["label"], rows[0]["error"]) == ("red things", "")
    assert {label: f"{float(rows[0][label]):.5f}" for label, _ in printed} == dict(printed)
    assert rows[0]["score"] == rows[0]["red things"]
    reason = "not an image in JPEG, PNG, GIF, BMP or WebP format"
    assert list(rows[1].values()) == ["broken.jpg", "", "", reason, "", "", "", ""]

    good, bad = json.loads(Path("new/out.json").read_text("utf-8"))
    assert (good["image"], good["error"]) == ("r.jpg", None)
    assert [(named["label"], f"{named['score']:.5f}") for named in good["predictions"]] == printed
    assert bad == {"image": "broken.jpg", "predictions": [], "unsure": False, "error": reason}


def test_csv_quotes_what_needs_it(folder):
    name = 'a,b"c d.jpg'
    save(name)
    assert predict.main(["--image", name, "--csv", "out.csv"]) == 0
    with open("out.csv", encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["image"] == name


@pytest.mark.parametrize("flag", ["--csv", "--json"])
def test_table_that_can_not_be_written(folder, capsys, flag):
    save("r.jpg")
    Path("file").write_text("mine")
    assert predict.main(["--image", "r.jpg", flag, "file/out"]) == 1
    said = capsys.readouterr()
    out, file = (Path(name).resolve() for name in ("file/out", "file"))
    assert said.err == f"predict.py: error: {flag} {out}: {file} is a file, not a folder; name another place.\n"
    assert said.out == ""


# What goes wrong


def test_unreadable_pictures_are_told_and_the_others_go_on(folder, capsys):
    good = save("b.jpg").read_bytes()
    bad = {
        "a.jpg": (b"", "the file is empty"),
        "c.jpg": (good[:-600], "the file is truncated"),
        "d.txt": (b"hello", "not an image in JPEG, PNG, GIF, BMP or WebP format"),
    }
    for name, (data, _) in bad.items():
        Path(name).write_bytes(data)
    save("e.jpg", BLUE)
    assert predict.main(["--image", "a.jpg", "b.jpg", "c.jpg", "d.txt", "e.jpg", "--top_k", "1"]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"predict.py: error: {name}: {reason}" for name, (_, reason) in bad.items()]
    assert re.findall(r"^(?:\w\..*|.*(?= \())", said.out, re.MULTILINE) == ["b.jpg", "red things", "e.jpg", "blue"]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--graph", "no.pb"], "no.pb"),
        (["--graph", "no.tflite"], "no.pb"),
        (["--labels", "no.txt"], "no.txt"),
        (["--labels", "."], "--labels ."),
        (["--labels", "latin.txt"], "latin.txt"),
        (["--labels", "few.txt"], "few.txt"),
        (["--graph", "words.pb"], "words.pb"),
        (["--graph", "empty.pb"], "empty.pb"),
        (["--graph", "red.jpg"], "red.jpg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_files_that_are_missing_or_wrong(folder, capsys, flags, named):
    save("red.jpg")
    Path("latin.txt").write_bytes("é\nb\nc\n".encode("latin-1"))
    Path("few.txt").write_text("red things\nblue\n")
    Path("words.pb").write_text("hello")
    Path("empty.pb").write_bytes(b"")
    assert predict.main(["--image", "red.jpg", *flags]) == 1
    assert named in one_sentence(capsys)


def test_labels_may_be_put_into_other_words(folder, capsys):
    save("red.jpg")
    Path("translated.txt").write_text("rouge\nbleu\nvert\n")
    expected = scores_of("--image", "red.jpg")["red.jpg"]
    capsys.readouterr()
    found = scores_of("--image", "red.jpg", "--labels", "translated.txt")["red.jpg"]
    assert found == {"rouge": expected["red things"], "bleu": expected["blue"], "vert": expected["green"]}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("predict.py: translated.txt ")


@pytest.mark.parametrize("labels, count", [("a\nb\n", 2), ("a\nb\nc\nd\n", 4), ("", 0)])
def test_labels_that_do_not_fit_a_bare_graph(folder, capsys, labels, count):
    save("red.jpg")
    Path("output_graph.json").unlink()
    Path("output_labels.txt").write_text(labels)
    assert predict.main(["--image", "red.jpg"]) == 1
    assert f"3 classes but --labels names {count}" in one_sentence(capsys)


def test_base_model_is_no_trained_graph(folder, capsys, small_graph):
    """It ends in a softmax, of other classes; only the labels can tell."""
    save("red.jpg")
    assert predict.main(["--image", "red.jpg", "--graph", str(small_graph)]) == 1
    assert "4 classes but --labels names 3" in one_sentence(capsys)


@pytest.mark.parametrize("name", ["\x1b[31mred\x1b[0m.jpg", "a\nb.jpg", "a\rb.jpg", b"\xff.jpg", "bell\a.jpg"])
@pytest.mark.parametrize("broken", [False, True], ids=["good", "broken"])
def test_names_can_not_play_tricks_on_the_terminal(folder, capsys, name, broken):
    path = Path(os.fsdecode(name))
    save("other.jpg")
    if broken:
        path.write_bytes(b"no picture")
    else:
        path.write_bytes(Path("other.jpg").read_bytes())
    flags = ["--csv", "out.csv", "--json", "out.json"]
    assert predict.main(["--image", str(path), "other.jpg", *flags]) == int(broken)
    said = capsys.readouterr()
    shown = said.err if broken else said.out
    escaped = retrain.printable(path)
    assert escaped in shown and escaped.isprintable()
    assert not re.search(r"[^\x20-\x7e\n]", shown)
    assert len(said.err.splitlines()) == int(broken)
    (first, _) = json.loads(Path("out.json").read_text("utf-8"))
    assert first["image"] == os.fsencode(path).decode("utf-8", "backslashreplace")  # the path itself, where it is text


def test_labels_can_not_either(folder, capsys):
    save("red.jpg")
    Path("output_graph.json").unlink()
    Path("output_labels.txt").write_text("\x1b[2Jx\nb\nc\n")
    assert predict.main(["--image", "red.jpg"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--top_k", "0"], ["--top_k", "x"], ["--imag", "a.jpg"]], ids=" ".join)
def test_wrong_flags(folder, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        predict.main(flags)
    assert ended.value.code == 2
    one_sentence(capsys)


# Which engine answers, and that they agree


@pytest.fixture
def varied(folder) -> list[str]:
    """Pictures of several formats, one of them a photograph taken with the phone turned."""
    colours = PIL.Image.fromarray(np.repeat(np.linspace(0, 255, 48, dtype=np.uint8)[:, None, None], 60, 1).repeat(3, 2))
    names = []
    for orientation in (1, 3, 6):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        names.append(f"turned{orientation}.jpg")
        both = PIL.Image.blend(colours, picture(GREEN, 3), 0.4)
        both.save(names[-1], exif=exif, quality=95)
    for name, mode in {"a.png": "RGB", "b.png": "RGBA", "c.png": "P", "d.webp": "RGB", "e.bmp": "RGB"}.items():
        picture(BLUE, 8).convert(mode).save(name)
        names.append(name)
    return names


def test_bare_graph_gives_the_same_scores(varied, no_lite, monkeypatch):
    with monkeypatch.context() as allowed:
        allowed.setattr(predict, "LiteModel", retrain.LiteModel)
        expected = scores_of("--image", *varied)
    (Path("bare")).mkdir()
    shutil.copy("output_graph.pb", "bare/output_graph.pb")
    shutil.copy("output_labels.txt", "bare/output_labels.txt")
    found = scores_of("--image", *varied, "--graph", "bare/output_graph.pb", "--labels", "bare/output_labels.txt")
    assert_same_scores(found, expected)
    # The orientation counts: the same pixels, differently turned, are different pictures.
    turned = [np.array(list(expected[f"turned{value}.jpg"].values())) for value in (1, 3, 6)]
    assert np.abs(turned[0] - turned[1]).max() > 1e-4 and np.abs(turned[0] - turned[2]).max() > 1e-4


def test_reading_flags_of_the_training_are_followed(train, tmp_path, varied):
    turned = [name for name in varied if name.startswith("turned")]
    assert train("--ignore_exif_orientation") == 0
    first, *others = scores_of("--image", *turned).values()
    assert_same_scores({"": first, " ": first}, dict(zip(("", " "), others, strict=True)), 1e-6)


def test_lone_tflite_needs_neither_the_graph_nor_tensorflow(folder, no_tensorflow):
    save("red.jpg")
    expected = scores_of("--image", "red.jpg")
    Path("output_graph.pb").unlink()
    assert scores_of("--image", "red.jpg") == expected
    assert scores_of("--image", "red.jpg", "--graph", "output_graph.tflite") == expected


@pytest.mark.parametrize("pictures", [1, 7])
def test_one_picture_and_many_get_the_same_scores(folder, no_tensorflow, pictures):
    names = [str(save(f"{i}.jpg", seed=i)) for i in range(pictures)]
    together = scores_of("--image", *names)
    for name in names:
        assert_same_scores(scores_of("--image", name), {name: together[name]}, 1e-5)


def test_other_graph_than_the_tflites_is_run_itself(folder, trained, no_lite):
    """A stale .tflite is not used once the graph was replaced, as by the classic script."""
    save("red.jpg")
    shutil.copy(trained / "intermediate_graph/intermediate_100.pb", "output_graph.pb")
    found = scores_of("--image", "red.jpg")
    Path("output_graph.tflite").unlink()
    assert scores_of("--image", "red.jpg") == found


@pytest.mark.parametrize("spoilt", ["output_graph.tflite", "output_graph.json"])
@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"damaged"])
def test_damaged_tflite_or_facts_are_not_used(folder, no_lite, spoilt, data):
    save("red.jpg")
    Path(spoilt).write_bytes(data)
    assert max(scores_of("--image", "red.jpg")["red.jpg"].items(), key=lambda pair: pair[1])[0] == "red things"


def test_needs_no_tensorflow_on_the_machine(folder):
    (folder / "broken").mkdir()
    (folder / "broken/tensorflow.py").write_text("raise ImportError('TensorFlow is not here')\n")
    environment = os.environ | {"PYTHONPATH": str(folder / "broken")}
    save("red.jpg")
    save("green.png", GREEN)

    def run(*flags) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "predict.py", *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60)

    done = run("--image", "red.jpg", "green.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"red\.jpg\nred things \(score.*green\.png\ngreen \(score", done.stdout, re.DOTALL)
    (folder / "output_graph.tflite").unlink()
    done = run("--image", "red.jpg")
    assert done.returncode == 1
    assert re.fullmatch(r"predict\.py: error: TensorFlow can't be loaded .*\n", done.stderr)


def test_classic_graph_runs(folder, small_graph, no_lite):
    """A graph as the classic script froze it: batch norm unfolded, producer 8, the bytes a constant, "Add"."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    graph = tf.compat.v1.GraphDef.FromString(small_graph.read_bytes())
    graph = tf.compat.v1.graph_util.extract_sub_graph(graph, ["pool_3/_reshape"])
    float32, scope = tf.float32.as_datatype_enum, "final_training_ops"

    def add(op: str, name: str, *inputs: str, kind: str = "T"):
        node = graph.node.add(op=op, name=name, input=inputs)
        node.attr[kind].type = float32
        return node

    fed = add("PlaceholderWithDefault", "input/BottleneckInputPlaceholder", "pool_3/_reshape", kind="dtype")
    fed.attr["shape"].shape.dim.add(size=-1)
    fed.attr["shape"].shape.dim.add(size=16)
    for name, values in (("weights", random.normal(size=(16, 2))), ("biases", random.normal(size=2))):
        constant = add("Const", f"{scope}/{name}/final_{name}", kind="dtype")
        constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values, tf.float32))
        add("Identity", f"{scope}/{name}/final_{name}/read", constant.name)
    add("MatMul", f"{scope}/Wx_plus_b/MatMul", fed.name, f"{scope}/weights/final_weights/read")
    add("Add", f"{scope}/Wx_plus_b/add", f"{scope}/Wx_plus_b/MatMul", f"{scope}/biases/final_biases/read")
    add("Softmax", "final_result", f"{scope}/Wx_plus_b/add")
    assert graph.versions.producer == 8
    assert "BatchNormWithGlobalNormalization" in {node.op for node in graph.node}
    Path("classic.pb").write_bytes(graph.SerializeToString())
    Path("classic.txt").write_text("one\ntwo\n")

    names = [str(save(f"{i}.jpg", colour)) for i, colour in enumerate((RED, GREEN, BLUE))]
    found = scores_of("--image", *names, "--graph", "classic.pb", "--labels", "classic.txt")
    with tf.Graph().as_default() as imported, tf.compat.v1.Session(graph=imported) as session:
        tf.import_graph_def(graph, name="")
        for name in names:
            scores = session.run("final_result:0", {"DecodeJpeg/contents:0": Path(name).read_bytes()})[0]
            assert [found[name]["one"], found[name]["two"]] == pytest.approx(scores.tolist(), abs=1e-3)


def test_no_picture_is_changed(folder):
    path = save("red.jpg")
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    scores_of("--image", "red.jpg")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_picture_may_be_a_stream_of_another_ending(folder):
    """Formats are told by content: a PNG that is called .jpg, and one without an ending."""
    data = io.BytesIO()
    picture(BLUE, 4).save(data, "PNG")
    for name in ("wrong.jpg", "none"):
        Path(name).write_bytes(data.getvalue())
    first, second = scores_of("--image", "wrong.jpg", "none").values()
    assert first == pytest.approx(second) and max(first, key=first.get) == "blue"


def test_pictures_need_no_flag_and_flags_may_be_repeated(folder, capsys):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save(name)
    assert predict.main(["a.jpg", "--image", "b.jpg", "--image", "c.jpg", "--top_k", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[::3] == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_missing_picture_does_not_keep_the_others_from_being_named(folder, capsys):
    save("a.jpg")
    assert predict.main(["--image", "nosuch.jpg", "a.jpg", "--top_k", "1"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("a.jpg\n")
    assert said.err == "predict.py: error: nosuch.jpg: there is no such image, or none in that folder\n"


def test_what_is_not_found_is_told_with_the_likely_cause(folder, capsys):
    save("more/red/a.jpg")
    Path("empty/red").mkdir(parents=True)
    for arguments, said in (
        (["my", "photos"], "--image my, photos: there is no such image; put a name that has spaces into quotes."),
        (["empty"], "--image empty: there is no file in that folder, nor in those in it"),
        (["nosuch.jpg"], "--image nosuch.jpg: there is no such image."),
        (["more/red/a.jpg", "--csv", "more"], f"--csv {Path('more').resolve()}: a folder of that name lies there"),
    ):
        assert predict.main(arguments) == 1
        assert f"predict.py: error: {said}" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is limited for the trial on Linux only")
def test_a_limit_of_memory_that_is_there_already_is_kept(folder):
    import resource

    save("a.jpg")
    limit = (4 << 30, 4 << 30)
    done = run_script(
        "predict.py", "a.jpg", cwd=Path.cwd(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit)
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_among_the_pictures_is_told_and_not_waited_for(folder, capsys):
    save("pictures/a.jpg")
    os.mkfifo("pictures/pipe")
    assert predict.main(["--image", "pictures", "--top_k", "1"]) == 1
    assert "pictures/pipe: there is no such image" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="there is no /dev/stdout")
def test_a_device_is_written_to_and_not_replaced(folder, tmp_path):
    save("a.jpg")
    Path("link.csv").symlink_to("real.csv")
    done = run_script("predict.py", "a.jpg", "--csv", "link.csv", "--json", "/dev/null", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert Path("link.csv").is_symlink() and Path("real.csv").read_text("utf-8").startswith("image,label,score")
    assert not Path("/dev/null").is_file()


def test_a_tflite_without_its_json_is_told(folder, capsys):
    save("a.jpg")
    Path("lone.tflite").write_bytes(Path("output_graph.tflite").read_bytes())
    assert predict.main(["--image", "a.jpg", "--graph", "lone.tflite"]) == 1
    assert "the .json that belongs to it is not beside it" in one_sentence(capsys)


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_reader_that_has_seen_enough_ends_it_quietly(folder):
    for i in range(40):
        save(f"many/{i}.jpg")
    command = f'"{sys.executable}" "{ROOT / "predict.py"}" --image many | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("many/0.jpg\n", "")
