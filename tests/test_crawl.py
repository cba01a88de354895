"""Crawl: the names, the sources, good manners, bad servers, whole runs that are killed, resumed and trained on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import PIL.Image
import pytest
from conftest import ROOT, run_script
from crawl_server import BAD, ENDINGS, GALLERY_PATHS, GOOD, PASSING, TWINS, CrawlServer, Result, Traffic, file_of, plant

import retrain

POSIX = pytest.mark.skipif(os.name == "nt", reason="it is about signals and terminals of POSIX systems")
LOCAL = retrain.ip_networks("127.0.0.1")
# retrain.py, with shorter pauses between the tries of an address, and less patience with a slow answer.
HASTY = f"""import sys; sys.path.insert(0, {str(ROOT)!r}); import retrain
retrain.CRAWL_PAUSES, retrain.PATIENCE = (0.1, 0.3), 3
sys.exit(retrain.main(sys.argv[1:]))"""
# The same, with eyes that are slow, so that there is always a thread in the middle of native code.
SLOW_EYES = f"""import sys; sys.path.insert(0, {str(ROOT)!r}); import imagehash, numpy, retrain, scipy.fftpack
phash = imagehash.phash
def slow_phash(*arguments, **options):
    for _ in range(150):
        scipy.fftpack.dct(numpy.zeros((300, 300)))
    return phash(*arguments, **options)
imagehash.phash = slow_phash
sys.exit(retrain.main(sys.argv[1:]))"""
# Fetches one address, told of in argv, and prints what came of it and by how many MB memory grew at most.
WEIGH = f"""import sys; sys.path.insert(0, {str(ROOT)!r}); import resource, retrain
def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
retrain.CRAWL_PAUSES, local = (), retrain.ip_networks("127.0.0.1")
web = retrain.Web(retrain.CrawlSettings(count=1, host_delay=0, timeout=5, allow_private=local))
web.get(sys.argv[1], 20_000_000)
for url in sys.argv[2:]:
    before = most()
    try:
        print("came", len(web.get(url, 20_000_000).body), sep=",")
    except retrain.Refusal as refusal:
        print(refusal, int(most() - before), sep=",")"""
FIELDS = {"url", "page", "source", "licence", "title", "creator", "time", "outcome"}


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy of this machine, and no key, has a part in the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENVERSE_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hasty(monkeypatch):
    """Short pauses between the tries of an address, and less patience with a slow answer."""
    monkeypatch.setattr(retrain, "CRAWL_PAUSES", (0.05, 0.1))
    monkeypatch.setattr(retrain, "PATIENCE", 3)


@pytest.fixture
def server():
    """A server of one test's own."""
    with CrawlServer() as running:
        yield running


def web(**settings) -> retrain.Web:
    """Return what fetches, with settings for the local server."""
    usual = {"count": 1, "host_delay": 0, "timeout": 1, "allow_private": LOCAL, "max_bytes": 300_000}
    return retrain.Web(retrain.CrawlSettings(**{**usual, **settings}))


def flags_of(folder: Path, sources: Sequence[str], count: int) -> list[str]:
    """Return the flags of a crawl of names.txt into `folder`/pictures from the local server."""
    flags = ["--crawl", folder / "names.txt", "--crawl_dir", folder / "pictures", "--crawl_count", count]
    flags += ["--crawl_only", "--crawl_host_delay", 0, "--crawl_timeout", 1.5, "--crawl_max_bytes", 300_000]
    return list(map(str, [*flags, "--crawl_allow_private", "127.0.0.1", "--crawl_source", *sources]))


@pytest.fixture
def crawl(tmp_path, server, monkeypatch, capsys, hasty):
    """A function that crawls the classes of `names` into tmp_path/pictures; returns the exit code and what was said."""
    monkeypatch.setattr(retrain.log, "handlers", [])  # main's write to the stdout of one test

    def run(names: str, *flags, source: Sequence[str] = (), count: int = 10) -> tuple[int, str]:
        (tmp_path / "names.txt").write_text(names, "utf-8")
        usual = flags_of(tmp_path, source or [server.source("openverse")], count)
        code = retrain.main([*usual, *map(str, flags)])
        return code, "".join(capsys.readouterr())

    run.pictures = tmp_path / "pictures"
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
    """Return the name under which a good picture is to be kept."""
    kind = result.kind if result.kind in ENDINGS else "good"
    return hashlib.sha256(file_of(kind, result.seed)).hexdigest() + ENDINGS.get(result.kind, ".jpg")


def good(seeds: Sequence[int], kind: str = "good") -> list[Result]:
    """Return results that are all to be kept."""
    return [Result(kind, seed) for seed in seeds]


# The file of names.


def read_names(folder: Path, text: str | bytes) -> dict[str, str]:
    """Return what a file of names says for the class folders in `folder`/pictures."""
    path = folder / "names.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return retrain.read_names(str(path), folder / "pictures")


def test_names_are_folders_and_search_words(tmp_path):
    text = (
        "\ufeff# pets\ncat\n\n  guinea pig  \nBig Dogs: great dane: puppy  # the large ones\nптица\nC#: c sharp note\n"
    )
    expected = {"cat": "cat", "guinea pig": "guinea pig", "Big Dogs": "great dane: puppy", "птица": "птица"}
    names = read_names(tmp_path, text)
    assert {name: names[name] for name in expected} == expected
    assert list(names)[:4] == list(expected)
    assert read_names(tmp_path, b"cat\r\ndog : a dog\r\n") == {"cat": "cat", "dog": "a dog"}


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../up", "a/b", "a\\b", "/etc", "nul", "CON", "com1.txt", "lpt9 .x", "aux.", "a.", ".hidden",
     ": words", "a\tb\x07", "what?", "a*", "<a>", "a|b", '"a"', "---", "x" * 201, "prn : printer", "COM¹"],
)  # fmt: skip
def test_names_that_can_be_no_folder_are_refused(tmp_path, name):
    with pytest.raises(retrain.UserError) as caught:
        read_names(tmp_path, f"fine\n{name}\n")
    assert re.match(r"--crawl .*names\.txt, line 2: .* can't be the name of a folder", str(caught.value))
    assert "\x07" not in str(caught.value)


@pytest.mark.parametrize(
    "two", [("Cat", "cat"), ("guinea pig", "guinea-pig"), ("a b", "a  b"), ("ﬁsh", "fish"), ("straße", "STRASSE")]
)
def test_names_that_are_one_folder_or_one_label_are_refused(tmp_path, two):
    with pytest.raises(retrain.UserError, match="line 2: .* are one folder on some systems; rename one of them"):
        read_names(tmp_path, "\n".join(two))
    (tmp_path / "pictures" / two[0]).mkdir(parents=True)
    with pytest.raises(retrain.UserError, match="line 1: .* are one folder on some systems"):
        read_names(tmp_path, two[1])
    assert read_names(tmp_path, two[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"caf\xe9\n", "could not be read (it is not in UTF-8)"),
        (b"# nobody\n\n", "it names no class"),
        (b"cat\ndog\ncat: kitten\n", "line 3: 'cat' is there twice"),
    ],
)
def test_files_of_names_that_are_no_use(tmp_path, text, message):
    with pytest.raises(retrain.UserError, match=re.escape(message)):
        read_names(tmp_path, text)


def test_a_missing_file_of_names_is_said(tmp_path):
    with pytest.raises(retrain.UserError, match="--crawl .*none.txt could not be read"):
        retrain.read_names(str(tmp_path / "none.txt"), tmp_path)


# The sources.


def results(argument: str, words: str, **settings) -> tuple[list[retrain.Found], list[retrain.SourceError]]:
    """Return what one --crawl_source finds, and its problems."""
    name, argument = retrain.source_named(argument)
    problems = []
    source = retrain.SOURCES[name](name, argument, web(**settings))
    return [found for page in retrain.pages_of([source], words, problems) for found in page], problems


WORDS = "Straße & 日本 + café"


def test_openverse_gives_licence_creator_page_and_title(server):
    server.results[WORDS], server.throttled = good(range(45)), 1
    found, problems = results(server.source("openverse"), WORDS)
    assert not problems
    assert [one.url for one in found] == [server.site + result.path for result in server.results[WORDS]]
    assert found[21].title == server.results[WORDS][21].title
    assert (found[21].licence, found[21].creator, found[21].source) == ("by-sa 2.0", "Zoë Ünal", "openverse")
    assert found[21].page == f"{server.site}/photos/21?a=1&b=2"
    assert server.traffic.counts["/v1/images/"] == 4  # three pages, and one that was refused
    first, second = server.traffic.starts["/v1/images/"][:2]
    assert second - first > 0.9  # as the Retry-After said


def test_openverse_without_results_is_no_problem(server):
    assert results(server.source("openverse"), "nothing") == ([], [])


def test_openverse_token_goes_to_openverse_alone(server, monkeypatch, crawl):
    monkeypatch.setenv("OPENVERSE_TOKEN", "secret")
    server.results["cat"] = good(range(3)) + good([3], "hops5")
    assert crawl("cat", count=4)[0] == 0
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.traffic.headers["/v1/images/"])
    assert server.traffic.counts["/v1/images/"] == 1
    for path in server.traffic.pictures():
        assert not any("Authorization" in headers for headers in server.traffic.headers[path])


def test_bing_pages_until_it_repeats_itself(server):
    server.results[WORDS] = good(range(80))
    found, problems = results(server.source("bing"), WORDS)
    assert not problems
    assert [one.url for one in found] == [server.site + result.path for result in server.results[WORDS]]
    assert found[40].title == server.results[WORDS][40].title
    assert found[40].page == f"{server.site}/seite/5?x=1&y=ä"
    assert (found[40].licence, found[40].source) == (None, "bing")
    assert server.traffic.counts["/images/async"] == 4


def test_baidu_pages_by_sixty_and_offers_related_searches(server):
    server.results[WORDS] = good(range(130))
    name, argument = retrain.source_named(server.source("baidu"))
    source = retrain.SOURCES[name](name, argument, web())
    problems = []
    found = [found for page in retrain.pages_of([source], WORDS, problems) for found in page]
    assert not problems
    assert [one.url for one in found] == [server.site + result.path for result in server.results[WORDS]]
    assert found[1].title == server.results[WORDS][1].title
    assert {one.page for one in found} == {None}  # enciphered
    assert source.related == [f"{WORDS} 甲", f"{WORDS} 乙"]
    assert server.traffic.counts["/search/flip"] == 4  # the last one is empty


def test_a_page_gives_each_picture_in_its_largest_form(server):
    found, problems = results(f"page:{server.site}/gallery.html", "x")
    assert not problems
    assert [one.url.removeprefix(server.site) for one in found] == GALLERY_PATHS
    assert {one.page for one in found} == {f"{server.site}/gallery.html"}
    titles = {one.url.rsplit("/")[-1]: one.title for one in found}
    assert titles["plain.jpg"] == "Un éléphant"
    assert titles["x3.jpg"] == "Café & compagnie"


def test_a_page_for_each_class(server, crawl):
    server.results["red cat"], server.results["Straße"] = good(range(10)), good(range(10, 16))
    code, said = crawl("cat: red cat\nStraße\n", source=[server.source("page")])
    assert code == 0
    assert files_in(crawl.pictures / "cat") == {name_of(result) for result in server.results["red cat"]}
    assert files_in(crawl.pictures / "Straße") == {name_of(result) for result in server.results["Straße"]}
    assert not any(path.startswith(("/small", "/middle")) for path in server.traffic.counts)
    thumbs = {path: entry["reason"] for path, entry in records(crawl.pictures / "cat").items() if "thumb" in path}
    assert thumbs == {"/thumb/p/good/4.jpg": BAD["smaller"]}  # the tenth picture was enough


def test_a_picture_in_a_link_to_a_page_about_it_is_kept(server, crawl):
    """As in Wikipedia, whose pages about pictures have the names of pictures."""
    server.bodies["/cats.html"] = b'<a href="/wiki/File:Cat.jpg"><img src="/thumb/p/good/3.jpg" alt="Cat"></a>'
    server.bodies["/wiki/File:Cat.jpg"] = b"<!DOCTYPE html><html><title>File:Cat.jpg</title></html>"
    assert crawl("cat", source=[f"page:{server.site}/cats.html"])[0] == 0
    entries = records(crawl.pictures / "cat")
    assert {path: entry.get("reason") for path, entry in entries.items()} == {
        "/wiki/File:Cat.jpg": "a web page",
        "/thumb/p/good/3.jpg": None,
    }
    assert files_in(crawl.pictures / "cat") == {entries["/thumb/p/good/3.jpg"]["file"]}


def test_a_list_for_each_class(server, crawl, tmp_path):
    lines = [f"{server.site}{result.path}" for result in good(range(3))]
    (tmp_path / "list of cat.txt").write_text("\ufeff# mine\n" + "\r\n".join([*lines, "", "not an address"]), "utf-8")
    code, said = crawl("cat\ndog\n", source=[f"list:{tmp_path}/list of {{}}.txt"])
    assert code == 0
    assert len(files_in(crawl.pictures / "cat")) == 3
    assert "1 no http or https address" in said
    assert re.search(r"--crawl_source list:.*list of dog\.txt could not be read", said)


@pytest.mark.parametrize("name", ["openverse", "bing", "baidu", "page"])
def test_a_source_that_changed_is_named_and_the_next_goes_on(server, crawl, tmp_path, name):
    address = server.source(name).partition(":")[2].replace("{}", "cat")
    server.bodies[urllib.parse.urlsplit(address).path] = b"<html><body>Something else altogether</body></html>"
    (tmp_path / "rest.txt").write_text(f"{server.site}/p/good/1.jpg\n")
    code, said = crawl("cat", source=[server.source(name).replace("{}", "cat"), f"list:{tmp_path}/rest.txt"])
    assert code == 0
    told = [line for line in said.splitlines() if f"--crawl_source {name}" in line]
    assert len(told) == 1
    assert address in told[0] and "changed" in told[0]
    assert files_in(crawl.pictures / "cat") == {name_of(Result("good", 1))}


def test_a_second_source_gives_what_the_first_lacks(server, crawl):
    server.results["cat"] = good(range(4))
    with CrawlServer() as other:
        other.results["cat"] = good(range(2, 8))
        code, said = crawl("cat", source=[server.source("bing"), other.source("baidu")], count=6)
    assert code == 0
    assert files_in(crawl.pictures / "cat") == {name_of(result) for result in good(range(6))}
    lines = (crawl.pictures / "cat" / "crawl.jsonl").read_text("utf-8").splitlines()
    outcomes = Counter((json.loads(line)["source"].partition(":")[0], json.loads(line)["outcome"]) for line in lines)
    assert outcomes == {("bing", "kept"): 4, ("baidu", "refused"): 2, ("baidu", "kept"): 2}


def test_a_second_source_whose_first_page_is_known_already_is_read_on(server, crawl):
    server.results["cat"] = good(range(20))
    listed = crawl.pictures.parent / "list.txt"
    listed.write_text("\n".join(server.site + result.path for result in good(range(20))))
    server.results["cat"] += good(range(20, 25))
    code, said = crawl("cat", source=[f"list:{listed}", server.source("openverse")], count=25)
    assert len(files_in(crawl.pictures / "cat")) == 25


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("flickr", "'flickr' is not known; choose openverse, bing, baidu, page, list"),
        ("page:", "page:URL"),
        ("list", "list:FILE"),
        ("page:ftp://host/x", "no http or https address"),
        ("openverse:host", "no http or https address"),
    ],
)
def test_sources_that_are_none(source, message, capsys):
    with pytest.raises(SystemExit) as caught:
        retrain.main(["--crawl", "names.txt", "--crawl_count", "1", "--crawl_source", source])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("source", ["page:http://127.0.0.1:9/x.html", "list:x.txt"])
def test_a_source_without_words_is_for_one_class_only(crawl, source):
    code, said = crawl("cat\ndog", source=[source])
    assert code == 1
    assert f"--crawl_source {source} would give every class the same pictures" in said


def test_sources_add_up():
    flags = [
        "--crawl",
        "x",
        "--crawl_count",
        "5",
        "--crawl_source",
        "bing",
        "--crawl_source",
        "page:http://h/",
        "baidu",
    ]
    assert retrain.parse_flags(flags).crawl_source == [("bing", ""), ("page", "http://h/"), ("baidu", "")]


# What the sources may come up with.


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ('<img src="a" srcset="a.jpg 1.2.3w, b.jpg 2w">', ["b.jpg"]),
        ('<img src="a" srcset="a.jpg 1x,b.jpg 2x">', ["b.jpg"]),
        ('<img src="a" srcset="a.jpg,b.jpg 2x">', ["a.jpg,b.jpg"]),  # as browsers read it
        ('<img src="a" srcset="w_1,h_1/a.jpg 300w,w_2,h_2/a.jpg 900w, w_3,/a.jpg 2w">', ["w_2,h_2/a.jpg"]),
        ('<img src="a" srcset=",, , a.jpg  ,">', ["a.jpg"]),
        ('<img src="data:image/gif;base64,R0lG" srcset="data:image/gif;base64,R0lG 9x" data-src="a.jpg">', ["a.jpg"]),
        ('<img src="http://[x"><img src="a.jpg">', ["a.jpg"]),
        ('<img src="a.jpg"><a href="http://[x/y.jpg">y</a>', ["a.jpg"]),
        pytest.param('<base href="http://[x"><img src="a.jpg">', ["a.jpg"], id="base"),
        ('<picture><img src="a.jpg" srcset></picture><img src=""><img srcset="">', ["a.jpg"]),
        *((f'<img src="a.jpg" srcset="{text}">', None) for text in ("a," * 20_000, "a 1x," * 8000, "1" * 40_000 + "w")),
        *((f'<img srcset="a.jpg {text}">', None) for text in ("1" * 40_000 + "w", "1." * 20_000 + "x", " 2x ," * 8000)),
    ],
)
def test_odd_markup_of_pictures(server, html, expected):
    server.bodies["/odd.html"] = f'<meta charset="utf-8">{html}'.encode()
    found, problems = results(f"page:{server.site}/odd.html", "x")
    assert not problems
    assert (
        len(found) == 1 if expected is None else [one.url for one in found] == [f"{server.site}/{e}" for e in expected]
    )


DEEP = b"[" * 100_000
ODD_BODIES = {
    "base": ("page", b'<base href="http://[x"><img src="a.jpg">'),
    "markup": ("page", b"<html><![foo"),
    "declaration": ("page", b"<!\xff[[<!--"),
    "nothing": ("page", b""),
    "deep": ("openverse", b'{"page_count":1,"results":' + DEEP),
    "deep result": ("openverse", b'{"page_count":1,"results":[' + DEEP),
    "endless number": ("openverse", b'{"results":[],"page_count":' + b"9" * 5000 + b"}"),
    "infinite": ("openverse", b'{"results":[],"page_count":Infinity}'),
    "no object": ("openverse", b"[]"),
    "number": ("openverse", b'{"results":7,"page_count":1}'),
    "odd result": ("openverse", b'{"results":[7,null,{"url":[],"license":7}],"page_count":1}'),
    "deep title": ("bing", b'<a class=iusc m=\'{"murl":"x","t":' + DEEP + b"'></a>"),
    "m": ("bing", b'<a class=iusc m=\'{"murl":7,"t":[]}\'></a><a class=iusc m></a>'),
    "surrogate": ("bing", b'<a class=iusc m=\'{"murl":"http://\\ud800/","t":"\\udc00","purl":{}}\'></a>'),
    "entry": ("baidu", b'"objURL":"http://[x","objURL":7,"objURL":"\\ud800","objURL":"' + b"\\" * 9999),
}


@pytest.mark.parametrize("name", ODD_BODIES)
def test_an_odd_page_of_results_does_not_end_the_run(server, crawl, tmp_path, name):
    source, body = ODD_BODIES[name]
    (tmp_path / "rest.txt").write_text(f"{server.site}{Result('good', 1).path}\n")
    address = server.source(source).replace("{}", "cat")
    server.bodies[urllib.parse.urlsplit(address.partition(":")[2]).path] = body
    code, said = crawl("cat", source=[address, f"list:{tmp_path}/rest.txt"])
    assert code == 0, said
    assert files_in(crawl.pictures / "cat") == {name_of(Result("good", 1))}
    assert "Traceback" not in said


def test_a_deep_entry_costs_only_itself(server):
    tiles = ('{"murl":"http://a/1.jpg"}', '{"murl":"x","t":' + DEEP.decode(), '{"murl":"http://a/2.jpg"}')
    server.bodies["/images/async"] = "".join(f"<a class=iusc m='{tile}'></a>" for tile in tiles).encode()
    found, problems = results(server.source("bing"), "x")
    assert [one.url for one in found] == ["http://a/1.jpg", "http://a/2.jpg"] and not problems


ODD_ADDRESSES = {
    "http://h\0st/x.jpg": "no http or https address",
    "{site}/p/good/2.jpg?\0": None,  # which requests turns into %00
    "http://u%5B@{host}/p/good/3.jpg": "no http or https address",
    "{site}/p/good/4.jpg?\ud800": "no http or https address",
    "http://\ud800/x.jpg": "unknown host",
    "http://[::1/x.jpg": "no http or https address",
    "http://[v1.x]/x.jpg": "unknown host",
    "http://a..b/x.jpg": "unknown host",
    "http://{host}:/x.jpg": "no http or https address",
    "{site}/p/good/5.jpg?" + "x" * 100_000: "HTTP 414",
    "": "no http or https address",
}


def test_odd_addresses_do_not_end_the_run(server, crawl):
    addresses = [address.format(site=server.site, host=server.site[7:]) for address in ODD_ADDRESSES]
    entries = [{"url": url, "license": "by", "title": "\udc00\0", "creator": [7]} for url in [*addresses, None, 7, {}]]
    last = {"url": server.site + Result("good", 1).path, "license": "by"}
    body = json.dumps({"page_count": 1, "results": [*entries, last]})
    server.bodies["/v1/images/"] = body.encode()
    code, said = crawl("cat")
    assert code == 0, said
    assert name_of(Result("good", 1)) in files_in(crawl.pictures / "cat")
    lines = (crawl.pictures / "cat" / "crawl.jsonl").read_bytes().splitlines()
    reasons = [json.loads(line).get("reason") for line in lines]
    assert reasons.count("no http or https address") == [*ODD_ADDRESSES.values()].count("no http or https address")
    server.traffic.reset()
    assert crawl("cat")[0] == 0  # which reads that record
    assert "/p/good/1.jpg" not in server.traffic.pictures()


# Good manners.


def fetch_all(fetcher: retrain.Web, addresses: Sequence[str]) -> list[str]:
    """Fetch all addresses at once, as far as the fetcher lets them; return what each came to: '' or why not."""

    def fetch(url: str) -> str:
        try:
            fetcher.get(url, 300_000)
        except retrain.Refusal as refusal:
            return str(refusal)
        return ""

    jobs = [retrain.in_background(fetch, url) for url in addresses]
    return [job.result(timeout=60) for job in jobs]


def test_so_many_at_once_and_no_more():
    traffic = Traffic()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(CrawlServer(latency=0.1, traffic=traffic)) for _ in range(5)]
        addresses = [f"{one.site}/p/good/{seed}.jpg" for seed in range(6) for one in servers]
        assert set(fetch_all(web(host_parallel=2, parallel=8), addresses)) == {""}
    assert traffic.peak == 8
    assert set(traffic.peaks.values()) == {2}


def test_defaults_are_the_promised_ones():
    settings = retrain.CrawlSettings(count=1)
    gate = retrain.Web(settings).gate
    assert (gate.parallel, gate.host_parallel, gate.delay) == (8, 2, 1)
    assert (settings.max_bytes, settings.min_side, settings.allow_private) == (20_000_000, 100, ())
    assert retrain.Web(retrain.CrawlSettings(count=1, host_delay=0)).gate.host_parallel == 8
    flags = retrain.parse_flags(["--crawl", "x", "--crawl_count", "5"])
    assert flags.crawl_source is None  # which is openverse
    assert (flags.crawl_parallel, flags.crawl_host_delay, flags.crawl_max_bytes) == (8, 1, 20_000_000)


def test_a_pause_between_two_requests_to_a_host(server):
    with CrawlServer() as other:
        addresses = [f"{one.site}/p/good/{seed}.jpg" for seed in range(5) for one in (server, other)]
        assert set(fetch_all(web(host_delay=0.2), addresses)) == {""}
        for one in (server, other):
            times = sorted(time for times in one.traffic.starts.values() for time in times)
            assert len(times) == 6  # robots.txt and five pictures
            assert times[-1] - times[0] > 5 * 0.2 - 0.1  # as they arrive, which may be later than they start


def test_robots_txt_is_asked_once_and_obeyed(server):
    addresses = [f"{server.site}/p/{kind}/{seed}.jpg" for seed in range(5) for kind in ("good", "forbidden")]
    assert fetch_all(web(), addresses) == ["", "forbidden by robots.txt"] * 5
    assert server.traffic.robots() == 1
    assert all("/p/good/" in path for path in server.traffic.pictures())
    assert "retrain.py" in server.traffic.headers["/p/good/1.jpg"][0]["User-Agent"]


def test_robots_txt_can_speak_to_us_by_name(server):
    server.robots = "\ufeffUser-agent: retrain.py\nDisallow: /p/png/\n\nUser-agent: *\nDisallow: /\n"
    addresses = [f"{server.site}/p/{kind}/1.jpg" for kind in ("good", "png")]
    assert fetch_all(web(), addresses) == ["", "forbidden by robots.txt"]


def test_robots_txt_rules_where_a_redirect_leads(server):
    with CrawlServer() as other:
        other.robots = "User-agent: *\nDisallow: /p/hops1/1.jpg?left=0\n"
        assert fetch_all(web(), [f"{other.site}/p/hops1/1.jpg"]) == ["forbidden by robots.txt"]


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("User-agent: *\nDisallow: //[\n", "robots.txt can't be read"),
        ("User-agent: *\nCrawl-delay: ²\n", "robots.txt can't be read"),
        (f"User-agent: *\nCrawl-delay: {'9' * 400}\n", "robots.txt can't be read"),
        (f"User-agent: *\nCrawl-delay: {'9' * 5000}\n", "robots.txt can't be read"),
        ("User-agent: *\nCrawl-delay: 100\n", "the host wants a long pause"),
        ("User-agent: *\nDisallow: /private/\n" + "#" * 512_000, "robots.txt can't be read"),
    ],
    ids=["path", "digit", "400 digits", "5000 digits", "long", "large"],
)
def test_robots_txt_that_is_hostile_ends_no_run(server, crawl, rules, reason):
    with CrawlServer() as other:
        other.robots = rules
        addresses = [f"{one.site}{Result('good', seed).path}" for seed, one in enumerate((other, server, other))]
        (crawl.pictures.parent / "list.txt").write_text("\n".join(addresses))
        code, said = crawl("cat", source=[f"list:{crawl.pictures.parent}/list.txt"])
        assert code == 0, said
        assert f"2 {reason}" in said
        assert set(other.traffic.counts) == {"/robots.txt"}
        assert files_in(crawl.pictures / "cat") == {name_of(Result("good", 1))}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (404, ""),
        (410, ""),
        (401, "forbidden by robots.txt"),
        (403, "forbidden by robots.txt"),
        ("<html>no such page</html>", ""),
        ("", ""),
        (503, "HTTP 503"),
    ],
)
def test_robots_txt_that_is_none(server, hasty, answer, expected):
    server.robots = answer
    told = fetch_all(web(), [f"{server.site}/p/good/{seed}.jpg" for seed in range(3)])
    assert set(told) == {expected}
    assert server.traffic.robots() == (3 if answer == 503 else 1)


def test_crawl_delay_is_kept(server):
    server.robots = "User-agent: *\nCrawl-delay: 1\n"
    assert fetch_all(web(), [f"{server.site}/p/good/{seed}.jpg" for seed in range(3)]) == [""] * 3
    times = sorted(times[0] for path, times in server.traffic.starts.items() if path.startswith("/p/"))
    assert times[-1] - times[0] > 1.9


def test_retry_after_is_waited_for(server):
    assert fetch_all(web(), [f"{server.site}/p/429/1.jpg"]) == [""]
    first, second = server.traffic.starts["/p/429/1.jpg"]
    assert second - first > 0.9


@pytest.mark.parametrize(("kind", "asked"), [("throttled", 3), ("stall", 3), ("drip", 1)])
def test_a_host_that_only_costs_time_is_left_alone(server, hasty, monkeypatch, kind, asked):
    """Though each of its answers alone could be waited for; another host isn't concerned."""
    monkeypatch.setattr(retrain, "MOST_TROUBLE", 2.5 if kind == "throttled" else 0.9)
    monkeypatch.setattr(retrain, "LONGEST_WAIT", 2)
    fetcher = web(timeout=0.4, parallel=1)
    with CrawlServer() as other:
        told = [fetch_all(fetcher, [server.site + Result(kind, seed).path])[0] for seed in range(6)]
        assert set(told[1:]) == {"the host gives no answers"}
        assert server.traffic.pictures().total() == asked
        fetcher.settings = web().settings  # whose patience is for a machine with more to do
        assert fetch_all(fetcher, [other.site + Result("good", 1).path]) == [""]


def test_a_host_that_wants_a_long_pause_gets_it(server, hasty, monkeypatch):
    monkeypatch.setattr(retrain, "LONGEST_WAIT", 0.5)
    told = [fetch_all(fetcher, [server.site + Result("throttled", 1).path]) for fetcher in [web()] * 3]
    assert told == [["HTTP 429"], ["the host wants a long pause"], ["the host wants a long pause"]]
    assert server.traffic.pictures().total() == 1


def test_a_slow_host_does_not_hold_up_another(server, crawl, monkeypatch):
    """Its results come first, and are more than are ever under way."""
    monkeypatch.setattr(retrain, "LOOKAHEAD", 6)
    monkeypatch.setattr(retrain, "LOOKAHEAD_HOST", 4)
    with CrawlServer() as other:
        slow, fast = good(range(10)), good(range(10, 13))
        addresses = [server.site + result.path for result in slow] + [other.site + result.path for result in fast]
        (crawl.pictures.parent / "list.txt").write_text("\n".join(addresses))
        source = f"list:{crawl.pictures.parent}/list.txt"
        assert crawl("cat", "--crawl_host_delay", 0.4, source=[source], count=13)[0] == 0
        assert len(files_in(crawl.pictures / "cat")) == 13
        first, second = (
            sorted(times[0] for path, times in one.traffic.starts.items() if path.startswith("/p/"))
            for one in (server, other)
        )
        assert second[-1] < first[6]


@pytest.mark.parametrize(("text", "seconds"), [("120", 120), ("", 0), ("soon", 0), ("-5", 0), ("1.5", 0)])
def test_retry_after_in_seconds(text, seconds):
    assert retrain.seconds_of(text) == seconds


def test_retry_after_as_a_date():
    assert retrain.seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 50 < retrain.seconds_of(in_a_minute) <= 61


def test_what_failed_is_tried_again_after_longer_and_longer_pauses(server, monkeypatch):
    monkeypatch.setattr(retrain, "CRAWL_PAUSES", (0.2, 0.8))
    assert fetch_all(web(), [f"{server.site}/p/500/1.jpg"]) == ["HTTP 500"]
    first, second, third = server.traffic.starts["/p/500/1.jpg"]
    assert second - first > 0.09
    assert third - second > 0.39
    assert fetch_all(web(), [f"{server.site}/p/500_once/1.jpg", f"{server.site}/p/404/1.jpg"]) == ["", "HTTP 404"]
    assert server.traffic.counts["/p/404/1.jpg"] == 1


def test_no_cookies_and_no_passwords_are_sent(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\ndefault login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetcher = web()
    with_password = server.site.replace("//", "//me:secret@")
    for address in (server.site, server.site, with_password):
        for kind in ("good", "hops5"):
            assert fetcher.get(f"{address}/p/{kind}/1.jpg", 300_000).body == file_of("good", 1)
    sent = [headers for many in server.traffic.headers.values() for headers in many]
    assert len(sent) > 6
    assert not any({"cookie", "authorization"} & {name.lower() for name in headers} for headers in sent)


def test_a_key_is_not_taken_along_to_where_a_redirect_leads(server):
    web().get(f"{server.site}/p/hops1/1.jpg", 300_000, headers={"Authorization": "Bearer secret"})
    first, second = server.traffic.headers["/p/hops1/1.jpg"]
    assert first["Authorization"] == "Bearer secret"
    assert "Authorization" not in second


# Bad servers: each way, by itself.


@pytest.fixture
def fetch_picture(tmp_path, hasty):
    """A function that fetches one picture; returns what came of it, a Picture or the reason, and the record."""
    manifest = retrain.Manifest(tmp_path / "cat", retrain.CrawlSettings(count=1))
    manifest.folder.mkdir()
    decode = functools.partial(retrain.decode_image, reading=retrain.Reading(), input_size=(299, 299))

    def fetch(url: str, **settings):
        found = retrain.Found(url, "test")
        look = functools.partial(retrain.look_at, min_side=100, decode=decode)
        timeout = 0.3 if any(kind in url for kind in ("/stall/", "/drip")) else 2
        picture = retrain.fetch_picture(found, manifest, web(**{"timeout": timeout, **settings}), look)
        assert picture or not [*manifest.staging.glob("*")]
        return picture or (manifest.entries[url]["reason"], manifest.entries[url]["outcome"])

    return fetch


@pytest.mark.parametrize("kind", sorted(set(BAD) - TWINS))
def test_each_misbehaviour_is_refused_for_its_reason(server, fetch_picture, kind):
    """The picture behind it is a good one, so only the behaviour can be why."""
    assert fetch_picture(server.site + Result(kind, 1).path) == (BAD[kind], "failed" if kind in PASSING else "refused")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of the machine")
@pytest.mark.parametrize("kind", ["to_loopback", "to_decimal"])
def test_nobody_comes_to_where_a_redirect_to_a_private_address_leads(server, fetch_picture, kind):
    with CrawlServer(server.server_port, host="127.0.0.2") as other:
        assert fetch_picture(server.site + Result(kind, 1).path) == ("private address", "refused")
        assert not other.traffic.counts
        everywhere = retrain.ip_networks("127.0.0.0/8")
        assert fetch_picture(server.site + Result(kind, 1).path, allow_private=everywhere).size == (320, 240)
        assert set(other.traffic.counts) == {"/robots.txt", "/p/good/1.jpg"}


@POSIX
def test_no_answer_takes_much_memory(server):
    kinds = ("chunk_negative", "chunk_line", "trailers", "gzip_bomb", "gzip_twice", "endless", "digits")
    addresses = [server.site + Result(kind, 1).path for kind in ("good", *kinds)]
    done = subprocess.run([sys.executable, "-c", WEIGH, *addresses], capture_output=True, text=True, timeout=120)
    told = [line.split(",") for line in done.stdout.splitlines()]
    assert [reason for reason, _ in told] == [BAD[kind] for kind in kinds], done.stderr
    assert sum(int(grown) for _, grown in told) < 150, done.stdout


@pytest.mark.parametrize("kind", GOOD)
def test_each_odd_but_good_picture_is_taken(server, fetch_picture, kind):
    result = Result(kind, 1)
    picture = fetch_picture(server.site + result.path)
    assert picture.sha256 + picture.ending == name_of(result)
    assert picture.size == (320, 240)
    assert picture.path.read_bytes() == file_of(kind if kind in ENDINGS else "good", 1)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://10.1.2.3/x.jpg", "private address"),
        ("http://192.168.1.1/x.jpg", "private address"),
        ("http://172.16.0.1:8080/x.jpg", "private address"),
        ("http://100.64.0.1/x.jpg", "private address"),
        ("http://0.0.0.0/x.jpg", "private address"),
        ("http://224.0.0.1/x.jpg", "private address"),
        ("http://[::1]/x.jpg", "private address"),
        ("http://[fe80::1]/x.jpg", "private address"),
        ("http://[fd00::1]/x.jpg", "private address"),
        ("http://[::ffff:127.0.0.1]/x.jpg", "private address"),
        ("http://[::ffff:10.0.0.1]/x.jpg", "private address"),
        ("http://[2002:7f00:1::]/x.jpg", "private address"),  # 6to4 of 127.0.0.1
        ("http://[64:ff9b::7f00:1]/x.jpg", "private address"),  # NAT64 of 127.0.0.1
        ("http://127.0.0.1/x.jpg", "private address"),
        ("http://localhost/x.jpg", "private address"),
        ("file:///etc/passwd", "no http or https address"),
        ("ftp://127.0.0.1/x.jpg", "no http or https address"),
        ("data:image/png;base64,AAAA", "no http or https address"),
        ("javascript:alert(1)", "no http or https address"),
        ("http://", "no http or https address"),
        ("http:///x.jpg", "no http or https address"),
        ("http://host:99999/x.jpg", "no http or https address"),
        ("http://[::1/x.jpg", "no http or https address"),
        ("http://127.0.0.1\\@example.com/x.jpg", "no http or https address"),
        ("//127.0.0.1/x.jpg", "no http or https address"),
        ("x.jpg", "no http or https address"),
    ],
)
def test_addresses_that_are_not_asked(fetch_picture, address, reason):
    assert fetch_picture(address, allow_private=()) == (reason, "refused")


def test_a_host_that_is_not_there(server, fetch_picture):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/x.jpg"
        assert fetch_picture(address) == ("out of reach", "failed")


def test_a_name_that_turns_private_after_the_check_is_refused(server, fetch_picture, monkeypatch):
    """The name server says 93.184.216.34 to the check, and 127.0.0.1 to the connection."""
    real, asked = socket.getaddrinfo, []

    def resolve(host, port, *arguments, **options):
        if host != "rebind.test":
            return real(host, port, *arguments, **options)
        connecting = sys._getframe(1).f_globals["__name__"].startswith("urllib3")
        asked.append(connecting)
        place = "127.0.0.1" if connecting else "93.184.216.34"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    address = f"http://rebind.test:{server.server_port}/p/good/1.jpg"
    assert fetch_picture(address, allow_private=()) == ("private address", "refused")
    assert {False, True} <= set(asked)
    assert not server.traffic.counts
    assert fetch_picture(address, allow_private=LOCAL).size == (320, 240)  # only the address was wrong


# Whole runs.

CLASSES = {"first": 0, "Second Class": 1000}


@pytest.fixture(scope="module")
def planted():
    """A server with 200 results for each of two classes, 40 % of them bad in all ways; the second repeats the first."""
    with CrawlServer() as running:
        for words, seed in CLASSES.items():
            running.results[words] = plant(seed, 200, shuffle=seed)
        shown = sorted(result.seed for result in running.results["first"] if result.kind == "good")
        for seed, kind in zip(shown[-3:], ("copy", "smaller", "poorer"), strict=True):
            again = Result(kind, seed, f"{BAD[kind]} in another class")
            running.results["Second Class"].insert(7 * seed % 200, again)
        yield running


def start(folder: Path, *sources: str, count: int = 200, names: Sequence[str] = tuple(CLASSES)) -> subprocess.Popen:
    """Start a hasty crawl into `folder`, in a process of its own; what it says is in the file `said` there."""
    folder.mkdir(exist_ok=True)
    (folder / "names.txt").write_text("\n".join(names), "utf-8")
    command = [sys.executable, "-c", HASTY, *flags_of(folder, sources, count), "--crawl_parallel", "40"]
    with open(folder / "said", "w") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def undisturbed(planted, tmp_path_factory) -> Path:
    """A folder in which the planted classes were crawled without any disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    planted.traffic.reset()
    assert start(folder, planted.source("openverse")).wait(timeout=120) == 0, (folder / "said").read_text()
    return folder


def test_every_good_picture_is_kept_and_every_bad_one_refused_for_its_reason(planted, undisturbed):
    table = (undisturbed / "said").read_text()
    for words in CLASSES:
        folder, expected = undisturbed / "pictures" / words, planted.results[words]
        wrong = [result for result in expected if result.reason]
        assert len(wrong) >= 80 and {result.kind for result in wrong} >= set(BAD)
        assert files_in(folder) == {name_of(result) for result in expected if not result.reason}
        entries = records(folder)
        assert {path: entry["reason"] for path, entry in entries.items() if entry["outcome"] != "kept"} == {
            result.path: result.reason for result in wrong
        }
        failed = {path.split("/")[2] for path, entry in entries.items() if entry["outcome"] == "failed"}
        assert failed == PASSING
        row = next(line for line in table.splitlines() if re.match(rf"{words} +\d", line))
        assert re.search(rf"{len(expected) - len(wrong)} +200 +{len(wrong)} ", row)
        for reason, count in Counter(result.reason for result in wrong).items():
            assert f"{count} {reason}" in row
        assert f"{words} stayed {200 - len(expected) + len(wrong)} short" in table
    assert "Second Class: 3 of its pictures were kept for another class before it (first)" in table


def test_files_are_whole_and_bear_the_names_of_their_content(undisturbed):
    for words in CLASSES:
        folder = undisturbed / "pictures" / words
        for name in files_in(folder):
            data = (folder / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == name.partition(".")[0]
            with PIL.Image.open(folder / name) as image:
                image.load()
                assert "." + image.format.lower().replace("jpeg", "jpg") == Path(name).suffix
        assert {path.name for path in folder.iterdir() if not path.is_file()} == set()


def test_the_record_tells_all_of_every_picture(planted, undisturbed):
    for words in CLASSES:
        folder = undisturbed / "pictures" / words
        entries = records(folder)
        assert len(entries) == len(planted.results[words])
        for path, entry in entries.items():
            result = next(result for result in planted.results[words] if result.path == path)
            assert entry.keys() >= FIELDS
            assert (entry["title"], entry["licence"], entry["creator"]) == (result.title, "by-sa 2.0", "Zoë Ünal")
            assert entry["page"].startswith(f"{planted.site}/photos/")
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", entry["time"])
            if entry["outcome"] == "kept":
                assert entry["file"].startswith(entry["sha256"]) and (folder / entry["file"]).is_file()
                assert (entry["width"], entry["height"]) == (320, 240)
            elif result.kind in TWINS:
                assert (undisturbed / "pictures" / entry["twin"]).is_file()
            if result.kind in TWINS | {"small"}:
                data = file_of(result.kind, result.seed)
                assert entry["sha256"] == hashlib.sha256(data).hexdigest()
                assert (entry["width"], entry["height"]) == PIL.Image.open(io.BytesIO(data)).size


def finished(class_folder: Path, server: CrawlServer) -> set[str]:
    """Return the paths of the pictures that a run was done with, or had fetched whole, when it ended."""
    staged = {path.name for path in class_folder.glob(".crawl/*")}
    waiting = {
        result.path
        for result in server.results[class_folder.name]
        if hashlib.sha256((server.site + result.path).encode()).hexdigest() in staged
    }
    return waiting | {path for path, entry in records(class_folder).items() if entry["outcome"] != "failed"}


def test_a_run_that_is_killed_five_times_comes_to_the_same(planted, undisturbed, tmp_path):
    """By SIGKILL, at random moments, told by how much was asked for; nothing that was finished is fetched again."""
    seed = random.SystemRandom().randrange(2**32)
    folder, moments, snapshots = tmp_path / "killed", random.Random(seed), []
    planted.traffic.reset()
    for _ in range(5):
        process = start(folder, planted.source("openverse"))
        last = planted.traffic.pictures().total() + moments.randint(15, 70)
        while planted.traffic.pictures().total() < last:
            assert process.poll() is None, f"seed {seed}: it ended by itself: {(folder / 'said').read_text()}"
            time.sleep(moments.uniform(0.005, 0.02))
        process.kill()
        process.wait()
        done = set().union(*(finished(folder / "pictures" / words, planted) for words in CLASSES))
        snapshots.append({path: planted.traffic.counts[path] for path in done})
    assert start(folder, planted.source("openverse")).wait(timeout=120) == 0, f"seed {seed}"
    assert len(snapshots[-1]) > 60, f"seed {seed}"
    for counts in snapshots:
        assert {path: planted.traffic.counts[path] for path in counts} == counts, f"seed {seed}"
    for words in CLASSES:
        kept, undisturbed_kept = (files_in(base / "pictures" / words) for base in (folder, undisturbed))
        assert kept == undisturbed_kept, f"seed {seed}"
        reasons, undisturbed_reasons = (
            {path: entry.get("reason") for path, entry in records(base / "pictures" / words).items()}
            for base in (folder, undisturbed)
        )
        assert reasons == undisturbed_reasons, f"seed {seed}"


def test_an_address_known_from_another_class_is_not_fetched_again(server, crawl):
    server.results["cat"], server.results["dog"] = good(range(5)), good(range(3, 8))
    code, said = crawl("cat\ndog", count=5)
    assert code == 0
    assert files_in(crawl.pictures / "dog") == {name_of(result) for result in good(range(5, 8))}
    assert set(server.traffic.pictures().values()) == {1}
    reasons = Counter(entry.get("reason") for entry in records(crawl.pictures / "dog").values())
    assert reasons == {None: 3, "the same file is there already in another class": 2}
    assert "dog: 2 of its pictures were kept for another class before it (cat)" in said


def test_a_second_run_asks_for_nothing_and_a_higher_count_for_the_rest(server, crawl):
    server.results["cat"] = good(range(4)) + [Result("404", 50, BAD["404"])] + good(range(4, 40))
    assert crawl("cat", count=10)[0] == 0
    assert len(files_in(crawl.pictures / "cat")) == 10
    assert server.traffic.pictures().total() == 11  # not one in vain
    server.traffic.reset()
    code, said = crawl("cat", count=10)
    assert code == 0 and re.search(r"cat +10 +10 +1 +1 HTTP 404", said)
    assert not server.traffic.counts
    assert crawl("cat", count=15)[0] == 0
    assert len(files_in(crawl.pictures / "cat")) == 15
    assert set(server.traffic.pictures().values()) == {1}
    assert set(server.traffic.pictures()) == {result.path for result in good(range(10, 15))}


def test_a_deleted_picture_stays_away_and_is_replaced(server, crawl):
    server.results["cat"] = good(range(9)) + [Result("smaller", 2)] + good(range(10, 20))
    crawl("cat", count=5)
    deleted = crawl.pictures / "cat" / name_of(Result("good", 2))
    deleted.unlink()
    server.traffic.reset()
    crawl("cat", count=9)  # which comes by the deleted one's smaller twin
    assert not deleted.exists()
    assert len(files_in(crawl.pictures / "cat")) == 9
    assert server.traffic.counts["/p/good/2.jpg"] == 0
    assert records(crawl.pictures / "cat")["/p/smaller/2.jpg"]["reason"] == BAD["smaller"]


def test_what_failed_is_tried_again_by_the_next_run(server, crawl):
    server.results["cat"] = good(range(3)) + [Result("500", 3)]
    code, said = crawl("cat")
    assert code == 0 and "run the same command again, which tries 1 that failed once more" in said
    server.traffic.reset()
    crawl("cat")
    assert set(server.traffic.pictures()) == {"/p/500/3.jpg"}


def test_the_users_own_pictures_are_left_alone_and_not_doubled(server, crawl):
    server.results["cat"] = good(range(6))
    (crawl.pictures / "cat").mkdir(parents=True)
    own = {"mine.jpg": file_of("good", 1), "Mine 2.JPEG": file_of("smaller", 2), "notes.txt": b"not a picture"}
    for name, data in own.items():
        (crawl.pictures / "cat" / name).write_bytes(data)
    code, said = crawl("cat")
    assert code == 0
    for name, data in own.items():
        assert (crawl.pictures / "cat" / name).read_bytes() == data
    expected = {name_of(result) for result in good([0, 3, 4, 5])}
    assert files_in(crawl.pictures / "cat") == expected | set(own)
    reasons = {path: entry.get("reason") for path, entry in records(crawl.pictures / "cat").items()}
    assert reasons["/p/good/1.jpg"] == "the same file is there already"
    assert reasons["/p/good/2.jpg"] == "the same picture is there already"


def test_a_torn_last_line_of_the_record_is_passed_over(server, crawl):
    server.results["cat"] = good(range(8))
    crawl("cat", count=4)
    record = crawl.pictures / "cat" / "crawl.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    (crawl.pictures / "cat" / json.loads(lines[-1])["file"]).unlink()  # it was not moved there yet
    record.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    assert crawl("cat", count=5)[0] == 0
    assert files_in(crawl.pictures / "cat") == {name_of(result) for result in good(range(5))}
    assert len(records(crawl.pictures / "cat")) == 5


def test_a_picture_that_was_recorded_and_not_yet_named_gets_its_name(server, crawl):
    """A run was killed between the two."""
    server.results["cat"] = good(range(4))
    crawl("cat", count=3)
    folder, path = crawl.pictures / "cat", "/p/good/1.jpg"
    (folder / ".crawl").mkdir(exist_ok=True)
    staged = hashlib.sha256((server.site + path).encode()).hexdigest()
    (folder / records(folder)[path]["file"]).rename(folder / ".crawl" / staged)
    server.traffic.reset()
    assert crawl("cat", count=3)[0] == 0
    assert files_in(folder) == {name_of(result) for result in good(range(3))}
    assert not server.traffic.pictures()


LIMITED = [
    ("small", "--crawl_min_side", 300, 90, "too small"),
    ("bmp", "--crawl_max_bytes", 100_000, 250_000, "too many bytes"),
    ("good", "--crawl_allow_private", "10.0.0.0/8", "127.0.0.1", "private address"),
]


@pytest.mark.parametrize(("kind", "flag", "before", "after", "reason"), LIMITED)
def test_a_flag_that_changes_its_mind_is_heard(server, crawl, kind, flag, before, after, reason):
    """What was refused by the limits of the last run is asked for again by others, and by the same ones is not."""
    result, folder, other = Result(kind, 1), crawl.pictures / "cat", Result("404", 2)
    listed = crawl.pictures.parent / "list.txt"
    listed.write_text(f"{server.site}{result.path}\n{server.site}{other.path}\n")
    for _ in range(2):
        code, said = crawl("cat", flag, before, source=[f"list:{listed}"])
        assert code == 1 and reason in said
        assert records(folder)[result.path]["reason"] == reason and not files_in(folder)
        assert server.traffic.pictures()[result.path] == (flag != "--crawl_allow_private")
    server.traffic.reset()
    assert crawl("cat", flag, after, source=[f"list:{listed}"])[0] == 0
    assert len(files_in(folder)) == 1 and records(folder)[result.path]["outcome"] == "kept"
    assert server.traffic.pictures()[result.path] == 1
    server.traffic.reset()
    crawl("cat", flag, before, source=[f"list:{listed}"])
    assert len(files_in(folder)) == 1 and result.path not in server.traffic.pictures()


def hostile_lines(url: str) -> Iterator[str]:
    """Yield lines that somebody else may have written into a crawl.jsonl, one of them about `url`."""
    kept = {"url": url, "outcome": "kept", "sha256": "0" * 64, "file": "0" * 64 + ".jpg", "looks": "0" * 64}
    for name in ("../../../OWNED", "../OWNED.jpg", "/tmp/OWNED", "OWNED", "a/../../OWNED.jpg", "", None, ["OWNED"], 7):
        yield json.dumps({**kept, "file": name})
    for name in kept:
        yield json.dumps({key: value for key, value in kept.items() if key != name})
        yield json.dumps({**kept, name: {}})
    for looks in ("", "0" * 63, "x" * 64, "0" * 128, None):
        yield json.dumps({**kept, "looks": looks})
    yield from ('{"url":"x"}', "[]", "7", "null", '"kept"', "{", "[" * 100_000, '{"url":' + "9" * 5000 + "}", "\0", "")
    yield json.dumps({"url": "x", "outcome": "refused", "reason": ["too small"]})
    yield json.dumps({"url": ["x"], "outcome": "refused", "reason": "too small"})
    yield json.dumps({"url": "y", "outcome": "refused", "reason": "too small", "limit": ["100"], "sha256": 7})


def test_a_hostile_record_writes_nothing_outside_and_ends_no_run(server, crawl, tmp_path):
    """A staged file waits to be moved to where the record says."""
    result, folder = Result("good", 1), crawl.pictures / "cat"
    server.results["cat"] = good(range(3))
    lines = [*hostile_lines(server.site + result.path)]
    for record in (lines[0], lines[2], lines[9], "\n".join(lines)):
        shutil.rmtree(crawl.pictures, ignore_errors=True)
        (folder / ".crawl").mkdir(parents=True)
        staged = folder / ".crawl" / hashlib.sha256((server.site + result.path).encode()).hexdigest()
        staged.write_bytes(file_of("good", 1))
        (folder / "crawl.jsonl").write_text(record + "\n")
        code, said = crawl("cat", count=3)
        assert code == 0, (record[:200], said)
        assert files_in(folder) == {name_of(result) for result in good(range(3))}, record[:200]
        assert not [*tmp_path.rglob("*OWNED*")] and not Path("/tmp/OWNED").exists()


def test_a_kept_line_without_looks_costs_only_itself(server, crawl):
    server.results["cat"], folder = good(range(4)), crawl.pictures / "cat"
    crawl("cat", count=3)
    entries = [json.loads(line) for line in (folder / "crawl.jsonl").read_text("utf-8").splitlines()]
    del entries[1]["looks"]
    (folder / "crawl.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert crawl("cat", count=3)[0] == 0
    assert files_in(folder) == {name_of(result) for result in good(range(4))}  # its file is one of the user's own now


@pytest.mark.parametrize("twin", [{}, {"twin": 7}, {"twin": "nowhere"}])
def test_a_record_of_an_odd_twin_ends_no_run(server, crawl, twin):
    server.results["cat"], folder = good(range(2)), crawl.pictures / "cat"
    folder.mkdir(parents=True)
    reason = "the same file is there already in another class"
    (folder / "crawl.jsonl").write_text(json.dumps({"url": "x", "outcome": "refused", "reason": reason, **twin}) + "\n")
    code, said = crawl("cat")
    assert code == 0, said
    assert files_in(folder) == {name_of(result) for result in good(range(2))}


def test_two_runs_at_a_time_in_one_folder_are_one_too_many(server, crawl):
    server.results["cat"] = good(range(2))
    with retrain.only_run(crawl.pictures):
        code, said = crawl("cat")
        assert code == 1 and not server.traffic.counts
        assert said.count("\n") == 1 and f"Another run is crawling into {crawl.pictures}" in said
    assert crawl("cat")[0] == 0


@POSIX
def test_a_run_in_another_process_counts_too_until_it_is_killed(server, crawl, tmp_path):
    server.results["cat"] = [*good(range(2)), Result("stall", 3)]
    process = start(tmp_path, server.source("openverse"), count=3, names=["cat"])
    while server.traffic.pictures().total() < 3:
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.01)
    code, said = crawl("cat")
    process.kill()
    process.wait()
    assert code == 1 and "Another run is crawling into" in said
    assert crawl("cat", count=2)[0] == 0
    assert len(files_in(crawl.pictures / "cat")) == 2


def test_related_searches_are_offered_when_results_run_out(server, crawl):
    server.results["cat"] = good(range(3))
    code, said = crawl("cat", source=[server.source("baidu")])
    assert code == 0
    assert "cat stayed 7 short" in said and "cat 甲, cat 乙" in said


def test_a_limit_on_pixels_and_bytes_of_ones_own(server, crawl):
    server.results["cat"] = good([1]) + good([2], "bmp")
    code, said = crawl("cat", "--crawl_min_side", 241)
    assert "too small" in said and not files_in(crawl.pictures / "cat")
    assert code == 1 and "--crawl_min_side" in said
    server.results["dog"] = server.results["cat"]
    crawl("dog", "--crawl_max_bytes", 100_000)
    assert files_in(crawl.pictures / "dog") == {name_of(Result("good", 1))}


# Errors are sentences, and stops are orderly.


def test_pictures_that_nobody_trains_on_are_an_error_of_the_flags(capsys):
    flags = ["--crawl", "names.txt", "--crawl_count", "1", "--crawl_dir", "elsewhere", "--image_dir", "pictures"]
    with pytest.raises(SystemExit) as caught:
        retrain.main(flags)
    assert caught.value.code == 2
    assert "--crawl_dir" in capsys.readouterr().err
    for more in (["--crawl_only"], ["--crawl_dir", "pictures"]):
        retrain.parse_flags([*flags, *more])


def test_a_count_is_needed_off_a_terminal(tmp_path):
    done = run_script("retrain.py", "--crawl", "names.txt", cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "--crawl_count" in done.stderr and "Traceback" not in done.stderr


@POSIX
def test_a_count_is_needed_without_a_stdin(tmp_path):
    shell = 'exec "$0" "$@" <&-'  # as some services start what they start
    command = ["sh", "-c", shell, sys.executable, str(ROOT / "retrain.py"), "--crawl", "names.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2
    assert "--crawl_count" in done.stderr and "Traceback" not in done.stderr


@POSIX
def test_a_count_is_asked_for_on_a_terminal(server, tmp_path):
    import pty

    server.results["cat"] = good(range(9))
    (tmp_path / "names.txt").write_text("cat\n")
    flags = flags_of(tmp_path, [server.source("openverse")], 1)
    at = flags.index("--crawl_count")
    parent, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "retrain.py"), *flags[:at], *flags[at + 2 :]]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.write(parent, b"many\n0\n4\n")
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while block := os.read(parent, 4096):
            said += block
    os.close(parent)
    assert process.wait(timeout=30) == 0, said.decode()
    assert said.count(b"How many pictures") == 3
    assert len(files_in(tmp_path / "pictures" / "cat")) == 4


@pytest.mark.parametrize("blocked", ["", "cat", "cat/crawl.jsonl", "cat/.crawl"])
def test_a_place_that_cannot_be_written_is_said_in_a_sentence(server, crawl, blocked):
    """Something else lies where a folder or file should be (the user may be root, whom no permission stops)."""
    server.results["cat"] = good(range(4))
    place = crawl.pictures / blocked
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if blocked.endswith("jsonl") else place.write_text("here I am")
    code, said = crawl("cat")
    assert code == 1
    told = [line for line in said.splitlines() if line.startswith("retrain.py: error: ")]
    assert len(told) == 1 and str(crawl.pictures) in told[0]
    assert "Traceback" not in said
    assert not list(crawl.pictures.glob("cat/*.jpg"))


def test_nothing_found_is_an_error(server, crawl):
    code, said = crawl("cat")
    assert code == 1
    assert "--crawl found no picture" in said


def test_a_source_out_of_reach_is_an_error_that_names_it(crawl):
    code, said = crawl("cat", source=["openverse:http://127.0.0.1:9/v1/images/"])
    assert code == 1
    assert "http://127.0.0.1:9/v1/images/" in said.splitlines()[-1]


def test_the_error_is_about_the_source_out_of_reach_and_no_other(server, crawl, tmp_path):
    (tmp_path / "list.txt").write_text(f"{server.site}{Result('good', 1).path}\n")
    server.bodies["/images/async"] = b"<html>something else</html>"
    away = "baidu:http://127.0.0.1:9/search/flip"
    code, said = crawl("cat", source=["list:none.txt", server.source("bing"), away, f"list:{tmp_path}/list.txt"])
    last = said.splitlines()[-1]
    assert code == 1 and f"--crawl_source {away}: " in last
    assert "none.txt" not in last and "bing" not in last
    assert files_in(crawl.pictures / "cat") == {name_of(Result("good", 1))}
    assert crawl("cat", source=[away, f"list:{tmp_path}/list.txt"], count=1)[0] == 0  # nothing is missing


def test_private_addresses_are_refused_unless_allowed(server, crawl):
    listed = crawl.pictures.parent / "list.txt"
    listed.write_text(f"{server.site}/p/good/1.jpg\n")
    code, said = crawl("cat", "--crawl_allow_private", "10.0.0.0/8,127.0.0.2", source=[f"list:{listed}"])
    assert code == 1 and "1 private address" in said and "--crawl_allow_private" in said
    assert not server.traffic.counts


@POSIX
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_leaves_a_consistent_state_and_says_how_far_it_got(tmp_path, sent, code):
    with CrawlServer(latency=0.1) as server:
        server.results["cat"] = [Result("stall", 0, BAD["stall"]), *good(range(1, 60))]
        server.results["dog"] = good(range(60, 70))
        (tmp_path / "names.txt").write_text("cat\ndog\n")
        flags = flags_of(tmp_path, [server.source("openverse")], 30)
        flags[flags.index("--crawl_timeout") + 1] = "20"  # so that it is waiting for the stalled one
        command = [sys.executable, str(ROOT / "retrain.py"), *flags]
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while server.traffic.pictures().total() < 24 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        asked = time.monotonic()
        assert process.wait(timeout=30) == code
        assert time.monotonic() - asked < 3
        text = (tmp_path / "said").read_text()
        assert re.search(r"cat +\d+ +30 +\d+", text) and re.search(r"dog +0 +30 +0", text)
        assert "stopped" in text.splitlines()[-1] and "Traceback" not in text and "Fatal" not in text
        folder = tmp_path / "pictures" / "cat"
        assert files_in(folder) == {entry["file"] for entry in records(folder).values() if entry["outcome"] == "kept"}
        done = {path: server.traffic.counts[path] for path in finished(folder, server)}
        assert len(done) > 10  # the good ones wait for the stalled one's turn
        server.results["cat"] = good(range(1, 30))
        flags = flags_of(tmp_path, [server.source("openverse")], 29)
        (tmp_path / "names.txt").write_text("cat\n")
        assert run_script("retrain.py", *flags, cwd=tmp_path, stdin=subprocess.DEVNULL).returncode == 0
        assert files_in(folder) == {name_of(result) for result in good(range(1, 30))}
        assert {path: server.traffic.counts[path] for path in done} == done


@POSIX
def test_a_stop_in_the_middle_of_native_code_is_orderly(server, tmp_path):
    server.results["cat"] = good(range(40))
    (tmp_path / "names.txt").write_text("cat\n")
    command = [sys.executable, "-c", SLOW_EYES, *flags_of(tmp_path, [server.source("openverse")], 40)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
    while server.traffic.pictures().total() < 20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert process.wait(timeout=30) == 143, (tmp_path / "said").read_text()
    assert time.monotonic() - asked < 3  # it doesn't look at all that was fetched before it ends
    assert (tmp_path / "said").read_text().splitlines()[-1].startswith("retrain.py: stopped")


# And straight into training.


def test_from_names_to_a_graph_that_names_pictures(tmp_path):
    with CrawlServer() as server:
        server.results["fire engine"], server.results["sea"] = good(range(20), "red"), good(range(20, 40), "blue")
        server.results["sea"].insert(3, Result("html", 41, BAD["html"]))
        (tmp_path / "names.txt").write_text("Red: fire engine\nblue: sea\n")
        done = run_script(
            "retrain.py", "--crawl", "names.txt", "--crawl_count", 12, "--crawl_source", server.source("bing"),
            "--crawl_host_delay", 0, "--crawl_allow_private", "127.0.0.1", "--image_dir", "pictures",
            "--architecture", "efficientnet_lite0", "--model_dir", ROOT / "inception_model",
            "--how_many_training_steps", 100,
            "--learning_rate", 0.1, "--random_seed", 1, cwd=tmp_path, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Final test accuracy" in done.stdout
        assert "crawl.jsonl" not in done.stdout + done.stderr
        assert (tmp_path / "output_labels.txt").read_text().split() == ["red", "blue"]
        (tmp_path / "new.jpg").write_bytes(file_of("red", 35))
        named = run_script("predict.py", "--image", "new.jpg", cwd=tmp_path)
        scores = [line for line in named.stdout.splitlines() if "(score" in line]  # it may well be unsure of so few
        assert scores[0].startswith("red (score = "), named.stdout + named.stderr
