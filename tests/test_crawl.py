"""Crawl: the names, the sources, good manners, bad servers, whole runs that are killed, resumed and trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from crawl_server import BAD, ENDINGS, GALLERY_PATHS, GOOD, PASSING, TWINS, CrawlServer, Result, file_of

import retrain

POSIX = pytest.mark.skipif(os.name == "nt", reason="it is about signals of POSIX systems")
HASTE = {"TIMEOUT": 1.0, "MOST_SECONDS": 3.0, "BACKOFF": 0.05, "MOST_CRAWL_BYTES": 300_000}
# retrain.py with less patience, in a process of its own.
HASTY = f"""import os, sys; sys.path.insert(0, {str(ROOT)!r}); import retrain
vars(retrain).update({HASTE!r})
os._exit(retrain.main(sys.argv[1:]))"""


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Little patience, and no proxy nor key of this machine."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENVERSE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in HASTE.items():
        monkeypatch.setattr(retrain, name, value)


@pytest.fixture
def server():
    """A server of one test's own."""
    with CrawlServer() as running:
        yield running


def flags_of(folder: Path, sources: Sequence[str], count: int) -> list[str]:
    """Return the flags of a crawl of names.txt into `folder`/images from the local server, without a pause."""
    flags = ["--crawl", folder / "names.txt", "--crawl_dir", folder / "images", "--crawl_count", count, "--crawl_only"]
    flags += ["--crawl_host_delay", 0, "--crawl_allow_private", "127.0.0.1", "--crawl_source", *sources]
    return list(map(str, flags))


def web(*flags: object) -> retrain.Web:
    """Return what fetches from the local server."""
    return retrain.Web(retrain.parse_flags([*flags_of(Path(), ["bing"], 1), *map(str, flags)]))


@pytest.fixture
def crawl(tmp_path, server, monkeypatch, capsys):
    """A function that crawls the classes of `names` into tmp_path/images; returns the exit code and what was said."""
    monkeypatch.setattr(retrain.log, "handlers", [])  # main's write to the stdout of one test

    def run(names: str, *flags, source: Sequence[str] = (), count: int = 10) -> tuple[int, str]:
        (tmp_path / "names.txt").write_text(names, "utf-8")
        usual = flags_of(tmp_path, source or [server.source("openverse")], count)
        code = retrain.main([*usual, *map(str, flags)])
        return code, "".join(capsys.readouterr())

    run.images = tmp_path / "images"
    return run


def records(class_folder: Path) -> dict[str, dict]:
    """Return the lines of a crawl.jsonl, the last one of each address, by the path of the address."""
    entries = {}
    path = class_folder / "crawl.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a line that a killed run was writing
            entry = json.loads(line)
            entries[urllib.parse.urlsplit(entry["url"]).path] = entry
    return entries


def files_in(class_folder: Path) -> set[str]:
    """Return the names of the files of a class folder, without its record."""
    return {path.name for path in class_folder.iterdir() if path.is_file()} - {"crawl.jsonl"}


def name_of(result: Result) -> str:
    """Return the name under which a good image is to be kept."""
    return hashlib.sha256(file_of(result.kind, result.seed)).hexdigest() + ENDINGS.get(result.kind, ".jpg")


def good(seeds: Sequence[int], kind: str = "good") -> list[Result]:
    """Return results that are all to be kept."""
    return [Result(kind, seed) for seed in seeds]


# The file of names.


def read_names(folder: Path, text: str | bytes) -> dict[str, str]:
    """Return what a file of names says for the class folders in `folder`/images."""
    path = folder / "names.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return retrain.read_names(str(path), folder / "images")


def test_names_are_folders_and_search_words(tmp_path):
    text = "\ufeff# pets\ncat\n\n  guinea pig  \nBig Dogs: great dane: puppy  # the large ones\nптица\n"
    expected = {"cat": "cat", "guinea pig": "guinea pig", "Big Dogs": "great dane: puppy", "птица": "птица"}
    assert read_names(tmp_path, text) == expected


def test_a_name_whose_label_is_there_is_that_folder(tmp_path):
    (tmp_path / "images" / "Guinea pig").mkdir(parents=True)
    assert read_names(tmp_path, "guinea-pig\n") == {"Guinea pig": "guinea-pig"}


NO_FOLDER = "names no folder; write `folder: words`, in UTF-8"


@pytest.mark.parametrize(
    ("text", "message"),
    [(f"fine\n{name}\n", NO_FOLDER) for name in (
        "..", "../up", "a/b", "a\\b", ".hidden", ": words", "a\tb\x07", "what?", "---",
    )] + [
        (b"caf\xe9\n", f"'caf\ufffd' {NO_FOLDER}"),
        ("cat\ndog\ncat: kitten\n", "'cat' and 'cat' are one class; remove one"),
        ("Cat\ncat", "'cat' and 'Cat' are one class; remove one"),
    ],
)  # fmt: skip
def test_names_that_are_no_use(tmp_path, text, message):
    with pytest.raises(retrain.UserError, match=message):
        read_names(tmp_path, text)


# The sources.

WORDS = "Straße & 日本 + café"


def results(source: str, words: str, *flags: object) -> list[dict]:
    """Return what one --crawl_source finds, each address once, as a crawl asks for it."""
    found = retrain.candidates_of([retrain.source_named(source)], words, web(*flags))
    return list({one["url"]: one for one in found}.values())


def entry(url: str, page: str, licence: str, title: str, creator: str, source: str) -> dict:
    """Return what is found, as it is written into crawl.jsonl."""
    return {"url": url, "page": page, "licence": licence, "title": title, "creator": creator, "source": source}


def answer_with(server: CrawlServer, path: str, *answers: object) -> str:
    """Let the server answer a path with these, one after the other, as JSON; return the address."""
    server.bodies[path] = [json.dumps(answer).encode() for answer in answers]
    return server.site + path


# One answer of each API, written by hand with the fields that its documentation gives.


def commons_page(index: int, name: str, **told: str) -> dict:
    """Return a file among the results of Wikimedia Commons."""
    image = {
        "url": f"https://upload.wikimedia.org/{name}", "descriptionurl": f"https://commons.wikimedia.org/wiki/{name}",
        "thumburl": f"https://upload.wikimedia.org/960px-{name}", "thumbwidth": 960,
        "extmetadata": {field: {"value": value, "source": "commons-desc-page"} for field, value in told.items()},
    }  # fmt: skip
    return {"pageid": 9 - index, "ns": 6, "title": f"File:{name}", "index": index, "imageinfo": [image]}


SECOND = commons_page(2, "Second.png", License="pd", LicenseShortName="Public domain")
ARTIST = '<a href="//commons.wikimedia.org">Zoë &amp; Co</a>'
FIRST = commons_page(1, "First.jpg", License="cc-by-sa-4.0", LicenseShortName="CC BY-SA 4.0", Artist=ARTIST)
COMMONS = {"batchcomplete": True, "query": {"pages": [SECOND, {"title": "File:Gone.jpg", "index": 3}, FIRST]}}
PHOTO = {
    "id": 11, "license_code": "cc-by", "attribution": "(c) zoe, some rights reserved (CC BY)", "hidden": False,
    "url": "https://inaturalist-open-data.s3.amazonaws.com/photos/11/square.jpg",
}  # fmt: skip
OBSERVATION = {
    "id": 7, "quality_grade": "research", "uri": "https://www.inaturalist.org/observations/7",
    "taxon": {"id": 3, "name": "Lasius niger", "rank": "species", "preferred_common_name": "Black Garden Ant"},
    "user": {"id": 5, "login": "zoe", "name": None}, "photos": [PHOTO, {**PHOTO, "license_code": None}],
}  # fmt: skip
INATURALIST = {"total_results": 1, "page": 1, "per_page": 200, "results": [OBSERVATION]}


def test_commons_gives_thumbnails_in_order_with_license_and_creator(server):
    more = {**COMMONS, "continue": {"gsroffset": 50, "continue": "gsroffset||"}}
    source = f"commons:{answer_with(server, '/w/api.php', more, COMMONS)}"
    first, second = results(source, WORDS)
    image, page = "https://upload.wikimedia.org/960px-First.jpg", "https://commons.wikimedia.org/wiki/First.jpg"
    assert first == entry(image, page, "CC BY-SA 4.0", "File:First.jpg", "Zoë & Co", "commons")
    assert (second["title"], second["licence"], second["creator"]) == ("File:Second.png", "Public domain", "")
    assert [query.get("gsroffset") for query in server.traffic.queries["/w/api.php"]] == ["0", "50"]
    assert results(source, WORDS, "--crawl_license", "by-sa,cc0") == [first]
    assert results(source, WORDS, "--crawl_license", "pdm") == [second]


def test_inaturalist_gives_large_photographs_that_are_licensed(server):
    source = f"inaturalist:{answer_with(server, '/v1/observations', INATURALIST, {**INATURALIST, 'results': []})}"
    image = "https://inaturalist-open-data.s3.amazonaws.com/photos/11/large.jpg"
    expected = entry(image, OBSERVATION["uri"], "cc-by", "Lasius niger", PHOTO["attribution"], "inaturalist")
    assert results(source, "ants") == [expected]
    assert server.traffic.queries["/v1/observations"][1]["id_below"] == "7"


def test_openverse_gives_license_creator_page_and_title(server):
    server.results[WORDS], server.throttled = good(range(45)), 1
    found = results(server.source("openverse"), WORDS, "--crawl_license", "by, CC0,")
    assert [one["url"] for one in found] == [server.site + result.path for result in server.results[WORDS]]
    url, page, title = found[21]["url"], f"{server.site}/photos/21?a=1&b=2", server.results[WORDS][21].title
    assert found[21] == entry(url, page, "by-sa 2.0", title, "Zoë Ünal", "openverse")
    assert server.traffic.counts["/v1/images/"] == 4  # three pages, and one that was refused
    assert {query["license"] for query in server.traffic.queries["/v1/images/"]} == {"by,cc0"}
    first, second = server.traffic.starts["/v1/images/"][:2]
    assert second - first > 0.9  # as the Retry-After said


def test_a_key_for_openverse_goes_nowhere_else(server, monkeypatch):
    monkeypatch.setenv("OPENVERSE_TOKEN", "secret")
    server.results["cat"], fetcher = good([0]), web()
    found = list(retrain.candidates_of([retrain.source_named(server.source("openverse"))], "cat", fetcher))
    fetcher.get(found[0]["url"], robots=True)
    assert [headers["Authorization"] for headers in server.traffic.headers["/v1/images/"]] == ["Bearer secret"]
    assert not any("Authorization" in headers for headers in server.traffic.headers["/p/good/0.jpg"])


@pytest.mark.parametrize("name", ["bing", "baidu"])
def test_search_engines_are_asked_page_by_page(server, name):
    """Bing repeats its last page for ever."""
    server.results[WORDS] = good(range(130))
    found = results(server.source(name), WORDS, "--crawl_license", "by")  # which they can't tell
    assert [one["url"] for one in found] == [server.site + result.path for result in server.results[WORDS]]
    if name == "bing":
        assert found[40]["page"] == f"{server.site}/seite/5?x=1&y=ä"


def test_a_page_gives_each_image_in_its_largest_form(server):
    found = results(f"page:{server.site}/{{}}/", "gallery")
    assert [one["url"].removeprefix(server.site) for one in found] == GALLERY_PATHS
    assert {one["page"] for one in found} == {f"{server.site}/gallery/"}


def test_a_page_may_say_what_its_addresses_begin_with(server):
    server.bodies["/based"] = [b'<base href="/else/"><img src="one.jpg"><img src="">']
    assert [one["url"] for one in results(f"page:{server.site}/based", "any")] == [f"{server.site}/else/one.jpg"]


def test_a_list_for_each_class(server, crawl, tmp_path):
    lines = [f"{server.site}{result.path}" for result in good(range(3))]
    (tmp_path / "list of cat.txt").write_text("\ufeff# mine\n" + "\n".join([*lines, "", "not an address"]), "utf-8")
    code, said = crawl("cat\ndog\n", source=[f"list:{tmp_path}/list of {{}}.txt"])
    assert code == 0 and "1 no http or https address" in said
    assert len(files_in(crawl.images / "cat")) == 3
    assert re.search(r"--crawl_source list:.*No such file or directory: .*list of dog\.txt", said)
    code, said = crawl("cat\ndog\n", source=[f"list:{tmp_path}/list of cat.txt"])
    assert code == 1 and "all classes get the same" in said


ODD_BODIES = {
    "markup": ("page", b"<html><![foo"),
    "nothing": ("page", b""),
    "deep": ("openverse", b'{"page_count":1,"results":' + b"[" * 100_000),
    "odd results": ("openverse", b'{"results":[7,null,{"url":[],"license":7}],"page_count":1}'),
    "no JSON": ("inaturalist", b"<html>Please log in</html>"),
    "error": ("commons", b'{"error":{"code":"maxlag"}}'),
    "another form": ("baidu", b"<html>Something else altogether</html>"),
}


@pytest.mark.parametrize("name", ODD_BODIES)
def test_an_odd_page_of_results_is_told_and_does_not_end_the_run(server, crawl, tmp_path, name):
    source, body = ODD_BODIES[name]
    (tmp_path / "rest.txt").write_text(f"{server.site}{Result('good', 1).path}\n")
    server.bodies["/odd"] = [body]
    code, said = crawl("cat", source=[f"{source}:{server.site}/odd", f"list:{tmp_path}/rest.txt"])
    assert code == 0, said
    assert files_in(crawl.images / "cat") == {name_of(Result("good", 1))}
    assert re.search(f"--crawl_source {source}:.*its form has changed", said) and "Traceback" not in said


# Good manners.

FORBIDDEN = "forbidden by robots.txt"


def fetch_all(fetcher: retrain.Web, addresses: Sequence[str]) -> list[str]:
    """Fetch all addresses at once; return what each came to: '' or why not."""

    def fetch(url: str) -> str:
        try:
            fetcher.get(url, robots=True)
        except (retrain.ImageError, retrain.Failure) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(addresses)) as pool:
        return [*pool.map(fetch, addresses)]


def test_a_pause_between_two_requests_to_a_host(server):
    """Tries, redirects and robots.txt are requests, too."""
    with CrawlServer() as other:
        kinds = ("good", "500_once", "hops5")
        addresses = [f"{one.site}/p/{kind}/1.jpg" for kind in kinds for one in (server, other)]
        assert set(fetch_all(web("--crawl_host_delay", 0.2), addresses)) == {""}
        for one in (server, other):
            times = sorted(time for times in one.traffic.starts.values() for time in times)
            assert len(times) == 10  # robots.txt, one, two and six
            assert times[-1] - times[0] > 9 * 0.2 - 0.1  # as they arrive, which may be later than they start


def test_a_host_is_one_however_its_address_is_written(server):
    fetcher, site = web(), server.site.partition("://")[2]
    hosts = [fetcher.prepare(f"http://{user}{site}/x", False, {})[1] for user in ("", "a@", "b:c@")]
    assert hosts[0] is hosts[1] is hosts[2]


def test_robots_txt_is_asked_once_and_obeyed(server):
    addresses = [f"{server.site}/p/{kind}/{seed}.jpg" for seed in range(5) for kind in ("good", "forbidden")]
    assert fetch_all(web(), addresses) == ["", FORBIDDEN] * 5
    assert server.traffic.counts["/robots.txt"] == 1
    assert "retrain.py" in server.traffic.headers["/p/good/1.jpg"][0]["User-Agent"]


@pytest.mark.parametrize(
    ("answer", "good", "png"),
    [
        ("\ufeffUser-agent: retrain.py\nDisallow: /p/png/\n\nUser-agent: *\nDisallow: /\n", "", FORBIDDEN),
        ("User-agent: *\nAllow: /\nDisallow: /p/png/\n", "", FORBIDDEN),  # the longest rule counts
        ("User-agent: *\nDisallow: /*/png/*.jpg$\n", "", FORBIDDEN),
        ("User-agent: *\nCrawl-delay: 100\n", FORBIDDEN, FORBIDDEN),  # which nobody waits for
        ("<html>no such page</html>", "", ""),
        (404, "", ""),
        (403, "", ""),  # none that we may read is none, as RFC 9309 has it
        (503, "HTTP 503", "HTTP 503"),
    ],
)
def test_what_robots_txt_may_say(server, answer, good, png):
    server.robots = answer
    assert fetch_all(web(), [f"{server.site}/p/{kind}/1.jpg" for kind in ("good", "png")]) == [good, png]


def test_what_failed_is_tried_again_after_the_pause_asked_for(server):
    assert fetch_all(web(), [f"{server.site}/p/429/1.jpg"]) == [""]
    first, second = server.traffic.starts["/p/429/1.jpg"]
    assert second - first > 0.9
    assert fetch_all(web(), [f"{server.site}/p/500/1.jpg", f"{server.site}/p/404/1.jpg"]) == ["HTTP 500", "HTTP 404"]
    assert (server.traffic.counts["/p/500/1.jpg"], server.traffic.counts["/p/404/1.jpg"]) == (3, 1)


@pytest.mark.parametrize("kind", ["stall", "throttled"])
def test_a_host_that_only_costs_time_is_left_alone(server, monkeypatch, kind):
    """Though each of its answers alone could be waited for; another host isn't concerned."""
    monkeypatch.setattr(retrain, "MOST_LOST", 1.5)
    fetcher = web()
    with CrawlServer() as other:
        told = [fetch_all(fetcher, [server.site + Result(kind, seed).path])[0] for seed in range(6)]
        assert set(told) == {"the host gives no answers"}
        assert server.traffic.images().total() == 2
        assert fetch_all(fetcher, [other.site + Result("good", 1).path]) == [""]


def test_no_cookies_and_no_passwords_are_sent(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetcher = web()
    for _ in range(2):
        assert fetcher.get(f"{server.site}/p/hops5/1.jpg").content == file_of("good", 1)
    sent = [headers for many in server.traffic.headers.values() for headers in many]
    assert not any({"cookie", "authorization"} & {name.lower() for name in headers} for headers in sent)


# Bad servers: each way, by itself.


@pytest.mark.parametrize("kind", sorted(set(BAD) - TWINS))
def test_each_misbehaviour_is_refused_for_its_reason(server, kind):
    """The image behind it is a good one, so only the behaviour can be why."""
    with pytest.raises(retrain.Failure if kind in PASSING else retrain.ImageError) as caught:
        retrain.fetch_image(server.site + Result(kind, 1).path, web())
    assert str(caught.value) == BAD[kind]


@pytest.mark.parametrize("kind", GOOD)
def test_each_odd_but_good_image_is_taken(server, kind):
    data, _, name = retrain.fetch_image(server.site + Result(kind, 1).path, web())
    assert (data, name) == (file_of(kind, 1), name_of(Result(kind, 1)))


@pytest.mark.parametrize(
    ("address", "reason"),
    [(f"http://{host}/x.jpg", "private address") for host in (
        "10.1.2.3", "172.16.0.1:8080", "100.64.0.1", "0.0.0.0", "[::1]", "[fe80::1]", "[fd00::1]", "[::ffff:10.0.0.1]",
        "localhost", "127.0.0.1\\@example.com",
    )] + [(address, "no http or https address") for address in (
        "file:///etc/passwd", "data:image/png;base64,AAAA", "http:///x.jpg", "http://host:99999/x.jpg",
        "http://[::1/x.jpg", "x.jpg",
    )],
)  # fmt: skip
def test_addresses_that_are_not_asked(address, reason):
    with pytest.raises((retrain.ImageError, retrain.Failure), match=reason):
        web("--crawl_allow_private", "192.0.2.1").get(address)


# Whole runs.


def start(folder: Path, source: str, count: int, names: str) -> subprocess.Popen:
    """Start a hasty crawl into `folder`, in a process of its own; what it says is in the file `said` there."""
    (folder / "names.txt").write_text(names, "utf-8")
    command = [sys.executable, "-c", HASTY, *flags_of(folder, [source], count), "--crawl_parallel", "40"]
    with open(folder / "said", "w") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def wait_for_images(process: subprocess.Popen, server: CrawlServer, count: int) -> None:
    """Wait until so many images were asked for, or the process has ended."""
    while server.traffic.images().total() < count and process.poll() is None:
        time.sleep(0.005)


@POSIX
def test_a_run_that_is_killed_ten_times_loses_nothing_and_keeps_nothing_twice(server, tmp_path):
    """By SIGKILL, at random moments, told by how much was asked for; in the end every good image is there once."""
    seed = random.SystemRandom().randrange(2**32)
    moments, classes = random.Random(seed), {"first": 0, "second": 1000}
    for name, least in classes.items():
        kinds = [*GOOD, *(BAD.keys() - TWINS)] * 3
        server.results[name] = [Result(kind, number) for number, kind in enumerate(kinds, least)]
        server.results[name] += [Result(kind, number) for number, kind in enumerate(TWINS, kinds.index("good") + least)]
        moments.shuffle(server.results[name])
    server.results["second"] += [Result("poorer", 0), Result("copy", 0)]
    for _ in range(10):
        process = start(tmp_path, server.source("openverse"), 200, "first\nsecond")
        wait_for_images(process, server, server.traffic.images().total() + moments.randint(5, 30))
        process.kill()
        process.wait()
    assert start(tmp_path, server.source("openverse"), 200, "first\nsecond").wait(timeout=120) == 0, f"seed {seed}"
    for name, least in classes.items():
        folder = tmp_path / "images" / name
        entries = records(folder)
        kept = {entry["file"]: path for path, entry in entries.items() if entry["outcome"] == "kept"}
        files = {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")} - {"crawl.jsonl"}
        assert files <= set(kept) and len(kept) - len(files) <= 10  # one that a kill came between
        assert {(entry["licence"], entry["creator"]) for entry in entries.values()} == {("by-sa 2.0", "Zoë Ünal")}
        for file in files:
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == file.partition(".")[0]
        wanted = [one.seed for one in server.results[name] if one.seed >= least and one.kind in (*GOOD, *TWINS)]
        assert sorted(int(Path(path).stem) for path in kept.values()) == sorted(set(wanted)), f"seed {seed}"
    assert "first, second stayed short" in (tmp_path / "said").read_text()


def test_what_a_killed_run_had_begun_is_in_nobodys_way(server, crawl):
    """It left a record without its image, half an image, and half a record."""
    server.results["cat"], folder = good(range(5)), crawl.images / "cat"
    crawl("cat", count=3)
    (folder / name_of(good([2])[0])).unlink()
    half = folder / ".retrain-unknown.tmp"
    half.write_bytes(file_of("good", 4))
    os.utime(half, (0, 0))
    with open(folder / "crawl.jsonl", "a") as record:
        record.write('{}\n7\n{"url":')
    server.traffic.reset()
    assert crawl("cat", count=4)[0] == 0
    assert set(server.traffic.images()) == {"/p/good/3.jpg", "/p/good/4.jpg"}
    assert {path.name for path in folder.iterdir()} == {"crawl.jsonl", *map(name_of, good([0, 1, 3, 4]))}


def test_a_second_run_asks_for_nothing_and_a_higher_count_for_the_rest(server, crawl):
    server.results["cat"] = good(range(4)) + [Result("404", 50)] + good(range(4, 40))
    assert crawl("cat", count=10)[0] == 0
    assert len(files_in(crawl.images / "cat")) == 10
    assert server.traffic.images().total() == 11  # not one in vain
    server.traffic.reset()
    code, said = crawl("cat", count=10)
    assert code == 0 and re.search(r"cat +10 kept; refused: 1 HTTP 404", said)
    assert not server.traffic.counts
    assert crawl("cat", count=15)[0] == 0
    assert len(files_in(crawl.images / "cat")) == 15
    assert set(server.traffic.images()) == {result.path for result in good(range(10, 15))}


def test_a_deleted_image_stays_away_and_is_replaced(server, crawl):
    server.results["cat"] = good(range(9)) + [Result("smaller", 2)] + good(range(10, 20))
    crawl("cat", count=5)
    deleted = crawl.images / "cat" / name_of(Result("good", 2))
    deleted.unlink()
    server.traffic.reset()
    crawl("cat", count=9)  # which comes by the deleted one's smaller twin
    assert not deleted.exists()
    assert len(files_in(crawl.images / "cat")) == 9
    assert server.traffic.counts["/p/good/2.jpg"] == 0


def test_duplicates_within_and_across_classes_are_refused(server, crawl):
    server.results["cat"] = [*good(range(5)), Result("smaller", 2), Result("copy", 3)]
    server.results["dog"] = [*good(range(3, 8)), Result("poorer", 1)]
    code, said = crawl("cat\ndog", "--crawl_parallel", 1)
    assert code == 0
    assert files_in(crawl.images / "cat") == {name_of(result) for result in good(range(5))}
    assert files_in(crawl.images / "dog") == {name_of(result) for result in good(range(5, 8))}
    reasons = Counter(entry.get("reason") for entry in records(crawl.images / "dog").values())
    assert reasons == {None: 3, "already in cat": 3}
    assert "3 already in cat" in said


def test_no_copy_of_the_users_own_images_is_kept(server, crawl):
    server.results["cat"], folder = good(range(3)), crawl.images / "cat"
    folder.mkdir(parents=True)
    (folder / "mine.jpg").write_bytes(file_of("smaller", 1))
    (folder / "notes.txt").write_text("no image")
    assert "1 already in cat" in crawl("cat")[1]
    assert files_in(folder) == {"mine.jpg", "notes.txt", *map(name_of, good([0, 2]))}


def test_what_failed_is_tried_again_by_the_next_run(server, crawl):
    server.results["cat"] = good(range(3)) + [Result("500", 3)]
    assert "cat stayed short; run it again with" in crawl("cat")[1]
    server.traffic.reset()
    crawl("cat")
    assert set(server.traffic.images()) == {"/p/500/3.jpg"}


def test_the_table_gives_advice_that_fits_and_a_flag_lets_more_pass(server, crawl, tmp_path):
    kinds = ("good", "small", "forbidden")
    (tmp_path / "list.txt").write_text("\n".join(server.site + Result(kind, 3 * len(kind)).path for kind in kinds))
    source = [f"list:{tmp_path}/list.txt"]
    code, said = crawl("cat", "--crawl_allow_private", "192.0.2.1", source=source)
    assert (
        code == 1 and "--crawl found no usable image" in said and "3 private address, see --crawl_allow_private" in said
    )
    said = crawl("cat", source=source)[1]
    assert "--crawl_allow_private" not in said
    assert "1 too small, see --crawl_min_side" in said and "1 forbidden by robots.txt" in said
    server.traffic.reset()
    crawl("cat", "--crawl_min_side", 50, source=source)
    assert len(files_in(crawl.images / "cat")) == 2
    assert list(server.traffic.images()) == ["/p/small/15.jpg"]


# Errors are sentences, and stops are orderly.


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--crawl_license", "by,cc-by"], "'by,cc-by'"),
     (["--crawl_source", "list:"], "list:FILE"), (["--crawl_source", "page"], "page:URL"),
     (["--crawl_source", "flickr"], "'flickr'")],
)  # fmt: skip
def test_flags_that_do_not_fit(capsys, more, message):
    with pytest.raises(SystemExit):
        retrain.parse_flags(["--crawl", "names.txt", "--crawl_dir", "elsewhere", "--image_dir", "images", *more])
    assert message in capsys.readouterr().err


def test_a_slash_behind_the_folder_makes_it_no_other():
    flags = retrain.parse_flags(["--crawl", "names.txt", "--crawl_dir", "images/", "--image_dir", "images"])
    assert flags.crawl_count == 100


@pytest.mark.parametrize("blocked", ["", "cat", "cat/crawl.jsonl"])
def test_a_place_that_cannot_be_written_is_said_in_a_sentence(crawl, blocked):
    """Something else lies where a folder or file should be (the user may be root, whom no permission stops)."""
    place = crawl.images / blocked
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if blocked.endswith("jsonl") else place.write_text("here I am")
    code, said = crawl("cat")
    told = [line for line in said.splitlines() if line.startswith("retrain.py: error: ")]
    assert code == 1 and len(told) == 1 and str(crawl.images) in told[0] and "Traceback" not in said


def test_a_source_out_of_reach_is_told_for_each_class(server, crawl, tmp_path):
    away = "openverse:http://127.0.0.1:9/v1/images/"
    (tmp_path / "list.txt").write_text(f"{server.site}{Result('good', 1).path}\n")
    code, said = crawl("cat\ndog", source=["list:{}.txt", away])
    assert code == 1 and "--crawl found no usable image" in said.splitlines()[-1]
    assert said.count(f"{away}: no answer (") == 2
    assert crawl("cat", source=[away, f"list:{tmp_path}/list.txt"], count=1)[0] == 0  # nothing is missing


@POSIX
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_consistent_state_and_says_how_far_it_got(server, tmp_path, sent):
    server.results["cat"] = [Result("stall", 99), *good(range(60))]  # it can't be done before the signal
    process = start(tmp_path, server.source("openverse"), 100, "cat\ndog")
    while not list(tmp_path.glob("images/cat/*.*g")) and process.poll() is None:  # one image at least is kept
        time.sleep(0.005)
    process.send_signal(sent)
    assert process.wait(timeout=30) == 130
    text, folder = (tmp_path / "said").read_text(), tmp_path / "images" / "cat"
    assert re.search(r"cat +\d+ kept", text) and re.search(r"dog +0 kept", text)
    assert "stopped" in text.splitlines()[-1] and "Traceback" not in text and "Fatal" not in text
    assert files_in(folder) == {entry["file"] for entry in records(folder).values() if entry["outcome"] == "kept"}


# And straight into training.


def test_from_names_to_a_graph_that_names_images(server, tmp_path, model_dir):
    server.results["fire engine"], server.results["sea"] = good(range(20), "red"), good(range(20, 40), "blue")
    (tmp_path / "names.txt").write_text("Red: fire engine\nblue: sea\n")
    flags = ["--crawl_count", 12, "--crawl_host_delay", 0, "--crawl_allow_private", "127.0.0.1", "--random_seed", 1]
    flags += ["--crawl_source", server.source("bing"), "--how_many_training_steps", 99, "--image_dir", "images"]
    flags += ["--architecture", "inception_v3", "--model_dir", model_dir, "--trust_model"]
    done = run_script("retrain.py", "--crawl", "names.txt", *flags, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "Final test accuracy" in done.stdout and "crawl.jsonl" not in done.stdout + done.stderr
    assert (tmp_path / "output_labels.txt").read_text().split() == ["red", "blue"]
