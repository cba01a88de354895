"""The report: what its files say, that it stays small, and that it works in a browser, whatever the names."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import retrain
from retrain import Diagnostics, Doubt, HeldOut, Image, LearningCurve, NearDuplicate, Scores

HOSTILE = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "שלום\u202e{{ 7*7 }}"]
CHROMIUM = "/usr/bin/chromium"


def made_up(folder: Path, names: list[str], count: int = 20, file_name: str = "image{}.jpg") -> Diagnostics:
    """Return diagnostics of `count` images of each class, of which every fifth is taken for the next class."""
    random, images = np.random.default_rng(0), []
    for name in names:
        for i in range(count):
            path = folder / name.replace("/", "∕") / file_name.format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8)).save(path, "JPEG")
            images.append(Image(path, name, "training" if i % 4 else "testing"))
    classes = np.repeat(np.arange(len(names)), count)
    named = np.where(np.arange(len(classes)) % 5 == 0, (classes + 1) % len(names), classes)
    logits = np.zeros((len(classes), len(names)), np.float32)
    logits[np.arange(len(classes)), named] = 3 + random.random(len(classes))
    rows = np.arange(len(classes))
    held_out = HeldOut(rows, classes, logits, rows // 2, rows % 5).cooled(1.2)
    curve = LearningCurve([20, 40], [held_out.accuracy, held_out.accuracy], (0.0, 0.03))
    history = [Scores(step, split, 0.8, 0.5) for step in range(0, 50, 10) for split in ("train", "validation")]
    doubts = [Doubt(0, 1, 0.9, 0.05, f"looks like {names[1]}"), Doubt(3, 0, 0.0, 0.0, "blurred")]
    pairs = [NearDuplicate(1, 2, 1.0)]
    return Diagnostics(
        labels=names, images=images, groups=rows // 2, validated=held_out, test=None,
        classic_accuracy=0.9, test_duplicates=0, curve=curve, temperature=1.2,
        doubts=doubts, pairs=pairs, cue="", cue_accuracy=0.0, histories={"head": history},
    )  # fmt: skip


def write(found: Diagnostics, folder: Path) -> Path:
    page = folder / "out" / "report.html"
    retrain.write_report(found, page, {"Base model": "starter"})
    return page


def test_numbers_come_with_their_interval_and_what_they_are_worth(tmp_path):
    found = made_up(tmp_path, ["ants", "bees", "cats"])
    numbers = json.loads(write(found, tmp_path).with_suffix(".json").read_text("utf-8"))
    accuracy = found.validated.accuracy
    assert numbers["believe"] == "cross-validation"
    assert numbers["cross_validation"]["accuracy"] == dataclasses.asdict(accuracy)
    assert numbers["cross_validation"]["confusion"][0] == {"label": "ants", "named": "ants", "images": 16}
    assert len(numbers["cross_validation"]["confusion"]) == 6  # no zeros
    assert len(numbers["mistakes"]) == 12
    assert numbers["duplicates"][0]["first"] == "ants/image1.jpg"
    assert numbers["training"]["head"][0] == {"step": 0, "split": "train", "accuracy": 0.8, "cross_entropy": 0.5}


def test_the_list_is_what_exclude_and_relabel_read(tmp_path):
    lines = (
        write(made_up(tmp_path, ["ants", "bees", "cats"]), tmp_path).with_suffix(".tsv").read_text("utf-8").splitlines()
    )
    assert [line.split("\t")[:2] for line in lines if not line.startswith("# ")] == [
        ["ants/image0.jpg", "bees"],
        ["ants/image3.jpg", "ants"],
    ]


def test_the_list_names_files_with_quotes(tmp_path):
    found = made_up(tmp_path, ['"quoted" ants', "bees"])
    left = retrain.leave_out(found.images, str(write(found, tmp_path).with_suffix(".tsv")))
    assert left == [image for row, image in enumerate(found.images) if row not in (0, 3)]


def test_the_page_shows_all_classes_the_worst_recall_first(tmp_path):
    found = made_up(tmp_path, [f"class {c:02}" for c in range(40)], count=5)
    logits = found.validated.logits.copy()
    logits[33 * 5 : 34 * 5, 0] = 9
    worst = dataclasses.replace(found.validated, logits=logits)
    page = write(dataclasses.replace(found, validated=worst), tmp_path).read_text("utf-8")
    table = page.partition('<table class="classes">')[2]
    names = re.findall(r'<th scope="row"><bdi>(.*?)</bdi>', table)
    assert names[0] == "class 33"
    assert sorted(names) == found.labels


def test_the_page_asks_for_nothing_and_escapes_names(tmp_path):
    page = write(made_up(tmp_path, HOSTILE), tmp_path).read_text("utf-8")
    assert "alert(1)</script>" not in page
    assert "<img src=x" not in page
    assert html.escape(HOSTILE[0]).replace("&#x27;", "&#39;") in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_names_that_are_no_text_and_images_that_are_gone(tmp_path):
    found = made_up(tmp_path, ["ants", "bees", "cats"])
    odd = dataclasses.replace(found.images[0], path=tmp_path / "ants" / "lone\udcff\n.jpg")
    page = write(dataclasses.replace(found, images=[odd, *found.images[1:]]), tmp_path)
    assert "ants/lone\\udcff\\n.jpg" in page.read_text("utf-8")
    assert page.with_suffix(".tsv").read_text("utf-8").splitlines()[3].startswith("ants/lone\\udcff\\n.jpg\tbees")


def test_a_page_of_many_images_can_be_mailed(tmp_path, monkeypatch):
    found = made_up(tmp_path, ["ants", "bees"], count=2)
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    monkeypatch.setattr(retrain, "thumbnails_of", lambda images, rows: dict.fromkeys(rows, noise))
    rows = np.arange(10_000)
    many = HeldOut(rows, rows % 2, np.eye(2, dtype=np.float32)[(rows // 2) % 2], rows, rows % 5)
    images = [Image(Path(f"folder/{'x' * 50}{i}.jpg"), "ants" if i % 2 == 0 else "bees") for i in rows]
    doubts = [Doubt(i, 1 - i % 2, 0.9, 0.1, "looks like") for i in range(1000)]
    pairs = [NearDuplicate(i, i + 1, 0.9) for i in range(1000)]
    large = dataclasses.replace(found, images=images, groups=rows, validated=many, doubts=doubts, pairs=pairs)
    page = write(large, tmp_path).read_text("utf-8")
    assert page.count("data:image/jpeg") <= retrain.MOST_THUMBNAILS
    assert len(re.sub('data:image/jpeg[^"]*', "", page)) < 2_500_000  # and 9 KB for each of those, of photographs


def test_without_anything_held_out_it_says_so(tmp_path):
    found = dataclasses.replace(made_up(tmp_path, ["ants", "bees"]), validated=None, curve=None, doubts=[])
    page = write(found, tmp_path).read_text("utf-8")
    assert "Nobody knows" in page
    assert "too few images" in page


def test_an_axis_makes_no_drama_of_noise():
    used = []
    retrain.drawn(lambda axes, values: used.append((axes, axes.plot(values, label="noise"))), [97.0, 99.0])
    assert used[0][0].get_ylim() == (80, 101)


def test_tensorboard_reads_mistakes_and_projector(tmp_path, capfd):
    from tensorboardX.proto.event_pb2 import Event

    found, folder = made_up(tmp_path, ["ants", "bees", "cats"]), tmp_path / "logs"
    for _ in range(2):  # the second in place of the first
        retrain.write_evaluation_summaries(found, np.random.default_rng(0).normal(size=(60, 8)), folder)
    assert capfd.readouterr() == ("", "")
    (path,) = folder.glob("events.out.tfevents.*")
    data, tags = path.read_bytes(), []
    while data:  # length, its checksum, event, its checksum
        size = int.from_bytes(data[:8], "little")
        tags += [value.tag for value in Event.FromString(data[12 : 12 + size]).summary.value]
        data = data[16 + size :]
    assert len(tags) == 12
    assert tags[0].startswith("mistakes/")
    assert (folder / "projector_config.pbtxt").read_text().count("tensor_path") == 1
    assert len((folder / "00000/features/metadata.tsv").read_text("utf-8").splitlines()) == 61


# In a browser


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM} (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options = [*quiet.split(), "--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that writes a report and opens it; afterwards it has asked for nothing and complained of nothing."""
    page, told = browser.new_page(viewport={"width": 400, "height": 900}), []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or told.append(request.url))

    def open_report(found: Diagnostics):
        page.goto(write(found, tmp_path).as_uri())
        return page

    yield open_report
    page.close()
    assert told == []


def test_a_click_on_a_cell_shows_its_images_the_surest_first_and_names_the_rest(opened, tmp_path):
    page = opened(made_up(tmp_path, ["ants", "bees", "cats"], count=100))
    page.locator('table.confusion [data-cell="0,1"]').click()
    cell = page.locator("#cell")
    assert cell.locator("h3").inner_text() == "20 of ants taken for bees"
    assert cell.locator(".card").count() == 12
    scores = [int(text.split()[0]) for text in cell.locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert cell.locator(".rest bdi").count() == 8
    assert cell.locator(".card img").evaluate_all("all => all.every(image => image.naturalWidth > 0)")


def test_what_is_ticked_is_saved_for_exclude_and_for_relabel(opened, tmp_path):
    page = opened(made_up(tmp_path, ["ants", "bees", "cats"]))
    assert not page.locator(".bar").is_visible()
    first, second = page.locator('#doubtful [data-row="0"]'), page.locator('#doubtful [data-row="3"]')
    first.locator("input").check()
    second.locator("input").check()
    second.locator("select").select_option("cats")
    for flag in ("exclude", "relabel"):
        with page.expect_download() as saved:
            page.locator(f'[data-save="{flag}"]').click()
        comment, *lines = Path(saved.value.path()).read_text("utf-8").splitlines()
        assert comment.startswith("# ")
        assert saved.value.suggested_filename == f"{flag}.tsv"
        assert lines == ["ants/image0.jpg\tbees", "ants/image3.jpg\tcats"]
    page.locator("#none").click()
    assert not first.locator("input").is_checked()


def test_hostile_names_are_only_names(opened, tmp_path):
    found = made_up(tmp_path, HOSTILE, file_name='"><script>alert(3)<\u2215script>{}.jpg')
    page = opened(found)
    page.locator('table.confusion [data-cell="0,1"]').click()
    page.locator("#cell .card input").first.check()
    with page.expect_download() as saved:
        page.locator('[data-save="exclude"]').click()
    assert len(retrain.leave_out(found.images, str(saved.value.path()))) == len(found.images) - 1
    assert page.locator("#cell h3 bdi").all_inner_texts() == HOSTILE[:2]
    assert page.locator("#classes th bdi").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") == 400  # nothing is wider than a phone
