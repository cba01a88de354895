"""A web site for the tests of --crawl: images, the pages of every source, and all kinds of misbehaviour.

In a test, `with CrawlServer() as server:` and `server.results[words]`.

An image lies at /p/<kind>/<seed>.jpg: the seed tells what it shows, the kind how the server behaves. What was asked
for is noted in `server.traffic`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import html
import http.server
import io
import json
import struct
import threading
import time
import urllib.parse
import zlib
from collections import Counter, defaultdict

import numpy as np
import PIL.Image

# What a crawl with --crawl_allow_private 127.0.0.1, at most 300,000 bytes and a short time-out says to each kind.
BAD = {
    "404": "HTTP 404",
    "500": "HTTP 500",
    "stall": "no answer (ReadTimeout)",
    "drip": "too slow",
    "cut": "no answer (ProtocolError)",
    "truncated": "the file is truncated",
    "empty": "the file is empty",
    "text": "not an image in JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC format",
    "endless": "too many bytes",
    "gzip_bomb": "too many bytes",
    "loop": "too many redirects",
    "to_10": "private address, see --crawl_allow_private",
    "to_loopback": "private address, see --crawl_allow_private",
    "to_file": "no http or https address",
    "bomb": "more pixels than any honest image has",
    "small": "too small, see --crawl_min_side",
    "forbidden": "forbidden by robots.txt",
    "copy": "already in",
    "smaller": "already in",
    "larger": "already in",
    "poorer": "already in",
}
# Another time they might go well, or with another flag.
PASSING = {"500", "stall", "cut", "drip", "small", "to_10", "to_loopback"}
TWINS = {"copy", "smaller", "larger", "poorer"}  # of the good image of the same seed
GOOD = ("good", "png", "gif", "bmp", "webp", "429", "500_once", "hops5", "gzip", "mislabelled", "chunked", "unlengthed")
ENDINGS = {"png": ".png", "gif": ".gif", "bmp": ".bmp", "webp": ".webp", "mislabelled": ".png"}  # else .jpg
DRAWN = {*ENDINGS, "red", "blue", "small", "smaller", "larger", "poorer"}  # behind all others is the good image
ROBOTS = "# two groups\nUser-agent: *\nDisallow: /private/\nDisallow: /p/forbidden/\n\nUser-agent: other\nDisallow: /\n"
REDIRECTS = {
    "to_10": "http://10.0.0.1/{seed}.jpg",
    "to_loopback": "http://127.0.0.2:{port}/p/good/{seed}.jpg",
    "to_file": "file:///etc/passwd",
    "loop": "/p/loop/{seed}.jpg",
}
# 50 MB of nothing, packed: members of a gzip file may follow each other.
GZIP_BOMB = gzip.compress(bytes(1_000_000)) * 50
BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


@dataclasses.dataclass(frozen=True)
class Result:
    """An image that the sources tell of: how the server behaves, what it shows; drawn before anybody asks for it."""

    kind: str
    seed: int

    def __post_init__(self):
        file_of(self.kind, self.seed)

    @property
    def path(self) -> str:
        return f"/p/{self.kind}/{self.seed}.jpg"

    @property
    def title(self) -> str:
        return f'{self.kind} „Straße & 日本 №{self.seed}" <3'


# The images.


def draw(seed: int, size: tuple[int, int] = (320, 240), tint: tuple[int, int, int] | None = None) -> PIL.Image.Image:
    """Return a smooth random texture, which looks like no other seed's; mostly of one colour if there is a `tint`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (18, 24, 3))
    if tint:
        pixels = pixels.mean(axis=2, keepdims=True) * 0.5 + np.asarray(tint) * 0.5
    return PIL.Image.fromarray(pixels.astype(np.uint8)).resize(size, PIL.Image.Resampling.BICUBIC)


def encoded(image: PIL.Image.Image, form: str = "JPEG", **options) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def bomb() -> bytes:
    """Return a PNG of 50,000 x 50,000 pixels as its header says, and next to no data."""
    data = encoded(PIL.Image.new("L", (1, 1)), "PNG")
    header = data[12:16] + struct.pack(">II", 50_000, 50_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def file_of(kind: str, seed: int) -> bytes:
    """Return the file that lies at /p/<kind>/<seed>.jpg, or behind the misbehaviour there."""
    return drawn(kind if kind in DRAWN else "good", seed)


@functools.lru_cache(maxsize=4096)
def drawn(kind: str, seed: int) -> bytes:
    """Return the file of a kind of its own."""
    if kind in ("red", "blue"):
        return encoded(draw(seed, tint=(200, 30, 30) if kind == "red" else (30, 30, 200)), quality=90)
    image = draw(seed)
    if kind in ENDINGS:
        return encoded(image, ENDINGS[kind][1:].upper())
    sizes = {"small": (320, 99), "smaller": (200, 150), "larger": (480, 360)}
    return encoded(image.resize(sizes.get(kind, image.size)), quality={"poorer": 30, "smaller": 70}.get(kind, 90))


# The pages of the sources, with the fields that we read and some others; `results` are (address, title) here.


def openverse_page(results: list[tuple[str, str]], page: int, size: int, site: str) -> dict:
    """Return a page of the JSON API of Openverse."""
    shown = enumerate(results[(page - 1) * size : page * size], (page - 1) * size)
    found = [
        {
            "id": f"36537842-b067-4ca0-ad67-{number:012}",
            "title": title,
            "foreign_landing_url": f"{site}/photos/{number}?a=1&b=2",
            "url": url,
            "creator": "Zoë Ünal",
            "license": "by-sa",
            "license_version": "2.0",
            "provider": "flickr",
            "filesize": None,
            "tags": [{"accuracy": None, "name": "птица", "unstable__provider": "flickr"}],
            "thumbnail": f"{site}/thumb/{number}",
        }
        for number, (url, title) in shown
    ]
    return {"result_count": len(results), "page_count": -(-len(results) // size), "page": page, "results": found}


def bing_page(results: list[tuple[str, str]], first: int, count: int, site: str) -> str:
    """Return the HTML of images/async; behind the end it repeats the last page for ever."""
    pages = [results[i : i + count] for i in range(0, len(results), count)] or [[]]
    shown = pages[min(first // count, len(pages) - 1)]
    facts = [
        {"purl": f"{site}/seite/{number}?x=1&y=ä", "murl": url, "md5": "eeb66c", "t": f"\ue000{title}\ue001"}
        for number, (url, title) in enumerate(shown)
    ]
    facts.insert(1, {"t": "a tile without an image", "purl": f"{site}/film"})
    tiles = (html.escape(json.dumps(fact, ensure_ascii=False)) for fact in facts)
    items = (
        f'<li class="dgControl_item"><div class="imgpt"><a class="iusc" m="{tile}" href="/images/search?id=1">'
        f'<img class="mimg" src="{site}/th?id=1&amp;w=240"></a></div></li>'
        for tile in tiles
    )
    more = '<div class="suggestion"><a class="iusc" href="/images/search?q=more" m="{not json">more</a></div>'
    return f'<div class="dgControl">{more}<ul class="dgControl_list">{"".join(items)}</ul></div>'


def baidu_page(results: list[tuple[str, str]], first: int) -> str:
    """Return Baidu's flip page: 60 results in a script that is no proper JSON, and an empty entry behind them."""
    entries = [
        {
            "objURL": url,
            "fromURL": f"ippr_z2C$qAzdH3FAzdH3Fooo_z&e3B{number}",
            "replaceUrl": [{"ObjURL": "https://never.example/1.jpg", "ObjUrl": "https://never.example/2.jpg"}],
            "fromPageTitle": f"<strong>{title}</strong>",
        }
        for number, (url, title) in enumerate(results[first : first + 60])
    ]
    data = ",".join(json.dumps(entry, ensure_ascii=False).replace("/", "\\/") for entry in entries)
    data = data.replace("<strong>", "it\\'s <strong>") + ',{"thumbURL":"","objURL":"","fromURL":""}'
    script = f'flip.setData(\'imgData\', {{"queryEnc":"%E7","displayNum":60,"data":[{data}]}});'
    return f"<!DOCTYPE html>\n<!--STATUS OK--><html><body><script>{script}</script></body></html>"


GALLERY = """<!DOCTYPE html>
<html lang="fr"><head>
<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">
<title>Caf\xe9 &amp; compagnie</title>
<link rel="icon" href="/favicon.ico">
</head><body>
<img src="plain.jpg" alt="Un \xe9l\xe9phant">
<p>again: <img src="plain.jpg" alt="Un \xe9l\xe9phant"></p>
<img src="../up/one.jpg?a=1&amp;b=2" alt="">
<img src="w320.jpg" srcset="w320.jpg 320w,
    w1280.jpg 1280w, w640.jpg 640w" sizes="50vw">
<img src="x1.jpg" srcset="x1.jpg, x15.jpg 1.5x, x3.jpg 3x">
<img src="/c_fill,w_300/a.jpg" srcset="/c_fill,w_300/a.jpg 300w, /c_fill,w_900/a.jpg 900w">
<picture><source type="image/webp" srcset="pic-800.webp 800w, pic-1600.webp 1600w"><img src="pic.jpg"></picture>
<img class="lazy" src="{blank}" data-src="lazy.jpg"><noscript><img src="lazy.jpg"></noscript>
<img class="lazy" src="{blank}" data-srcset="lz-1.jpg 1x, lz-2.jpg 2x">
<a href="full.JPG"><img src="thumb.jpg" alt="large"></a>
<a href="page2.html"><img src="linked.jpg"></a>
<a href="alone.png">the image</a> <a href="mailto:x@example.com">write</a>
<img src="//{host}/scheme.jpg">
<img src="{blank}"><img alt="nothing">
</body></html>"""
# The addresses in it that are images, each in its largest form.
GALLERY_PATHS = [
    "/gallery/plain.jpg", "/up/one.jpg?a=1&b=2", "/gallery/w1280.jpg", "/gallery/x3.jpg", "/c_fill,w_900/a.jpg",
    "/gallery/pic-1600.webp", "/gallery/pic.jpg", "/gallery/lazy.jpg", "/gallery/lz-2.jpg", "/gallery/full.JPG",
    "/gallery/thumb.jpg", "/gallery/linked.jpg", "/gallery/alone.png", "/scheme.jpg",
]  # fmt: skip


class Traffic:
    """What was asked for, by path: how often, when, with which headers and queries."""

    def __init__(self):
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget what was."""
        self.counts, self.starts = Counter(), defaultdict(list)
        self.headers, self.queries = defaultdict(list), defaultdict(list)

    def note(self, path: str, headers: dict, query: dict) -> int:
        """Note a request; return how many came before it for the same path."""
        with self.lock:
            self.counts[path] += 1
            self.starts[path].append(time.monotonic())
            self.headers[path].append(headers)
            self.queries[path].append(query)
            return self.counts[path] - 1

    def images(self) -> Counter:
        """Return how often each image was asked for."""
        with self.lock:
            return Counter({path: count for path, count in self.counts.items() if path.startswith("/p/")})


class CrawlServer(http.server.ThreadingHTTPServer):
    """The site. `results`: what each search finds; `bodies`: what some paths answer instead, one after the other.

    A context manager: it answers, in threads of this process, while the block runs.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.traffic, self.robots = Traffic(), ROBOTS
        self.results: dict[str, list[Result]] = defaultdict(list)
        self.bodies: dict[str, list[bytes]] = {}
        self.throttled = 0  # throttled: so many requests of the API are answered with 429
        self.ended = threading.Event()

    @property
    def site(self) -> str:
        return "http://{}:{}".format(*self.server_address)

    def source(self, name: str) -> str:
        """Return the value of --crawl_source that points a source at this server."""
        paths = {"openverse": "/v1/images/", "bing": "/images/async", "baidu": "/search/flip"}
        return f"{name}:{self.site}{paths[name]}"

    def found(self, words: str) -> list[tuple[str, str]]:
        """Return (address, title) of each result."""
        return [(self.site + result.path, result.title) for result in self.results[words]]

    def __enter__(self) -> CrawlServer:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Say nothing about clients that hang up."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: CrawlServer

    def log_message(self, *_) -> None:
        """Print nothing."""

    def head(self, kind: str = "image/jpeg", status: int = 200, **headers: object) -> None:
        """Send the head of an answer."""
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Set-Cookie": "track=me; Path=/", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def answer(self, body: bytes, kind: str = "image/jpeg", status: int = 200, **headers: object) -> None:
        """Send an answer, its length included; 429 asks for a pause."""
        pause = {"Retry-After": 1} if status == 429 else {}
        self.head(kind, status, Content_Length=len(body), **pause, **headers)
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Answer a request."""
        server, parts = self.server, urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(parts.query).items()}
        before = server.traffic.note(parts.path, dict(self.headers), query)
        if parts.path in server.bodies:
            bodies = server.bodies[parts.path]
            self.answer(bodies[min(before, len(bodies) - 1)], "text/html")
        elif parts.path.startswith("/p/"):
            _, _, kind, name = parts.path.split("/")
            self.image(kind, int(name.split(".")[0]), before, query)
        elif parts.path == "/robots.txt" and isinstance(server.robots, int):
            self.answer(b"no", "text/plain", server.robots)
        elif parts.path == "/robots.txt":
            self.answer(server.robots.encode(), "text/plain")
        elif parts.path == "/v1/images/":
            self.openverse(query)
        elif parts.path == "/images/async":
            page = bing_page(server.found(query["q"]), int(query["first"]), int(query["count"]), server.site)
            self.answer(page.encode(), "text/html; charset=utf-8")
        elif parts.path == "/search/flip":
            self.answer(baidu_page(server.found(query["word"]), int(query["pn"])).encode(), "text/html; charset=utf-8")
        elif parts.path == "/gallery/":
            text = GALLERY.replace("{blank}", BLANK).replace("{host}", server.site.partition("//")[2])
            self.answer(text.encode("latin-1"), "text/html")
        else:
            self.answer(b"nothing here", "text/plain", 404)

    def openverse(self, query: dict) -> None:
        """Answer as api.openverse.org does, which also has limits."""
        found = self.server.found(query["q"])
        if self.server.throttled:
            self.server.throttled -= 1
            self.answer(b'{"detail":"Request was throttled."}', "application/json", 429)
        else:
            page = openverse_page(found, int(query["page"]), 20, self.server.site)
            self.answer(json.dumps(page, ensure_ascii=False).encode(), "application/json")

    def image(self, kind: str, seed: int, before: int, query: dict) -> None:
        """Answer for an image, as its kind behaves; `before`: how often it was asked for already."""
        statuses = {"404": 404, "500": 500, "throttled": 429}
        statuses |= {} if before else {"429": 429, "500_once": 500}
        hops = int(query.get("left", 5)) if kind == "hops5" else 0
        data = file_of(kind, seed)
        bodies = {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "text": b"hotlinking is not allowed",
            "bomb": bomb(),
        }
        if kind in statuses:
            self.answer(b"<html>no</html>", "text/html", statuses[kind])
        elif kind in REDIRECTS or hops:
            target = REDIRECTS.get(kind, "{seed}.jpg?left={left}")
            target = target.format(seed=seed, port=self.server.server_port, left=hops - 1)
            self.answer(b"over there", "text/plain", 302, Location=target)
        elif hasattr(self, f"send_{kind}"):
            with contextlib.suppress(OSError):  # they hang up on us, and are right
                getattr(self, f"send_{kind}")(data)
            self.close_connection = True
        else:
            self.answer(bodies.get(kind, data))

    def send_stall(self, _: bytes) -> None:
        self.server.ended.wait(30)

    def send_drip(self, data: bytes) -> None:
        """Send a byte now and then, for as long as anybody reads."""
        self.head()
        for byte in data:
            self.wfile.write(bytes([byte]))
            if self.server.ended.wait(0.05):
                return

    def send_cut(self, data: bytes) -> None:
        self.head(Content_Length=len(data))
        self.wfile.write(data[: len(data) // 2])

    def send_endless(self, data: bytes) -> None:
        self.head()
        self.wfile.write(data)
        while not self.server.ended.is_set():
            self.wfile.write(bytes(1 << 14))

    def send_gzip_bomb(self, _: bytes) -> None:
        self.answer(GZIP_BOMB, Content_Encoding="gzip")

    def send_gzip(self, data: bytes) -> None:
        self.answer(gzip.compress(data), Content_Encoding="gzip")

    def send_chunked(self, data: bytes) -> None:
        self.head(Transfer_Encoding="chunked")
        for start in range(0, len(data), 5000):
            chunk = data[start : start + 5000]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def send_unlengthed(self, data: bytes) -> None:
        self.head(Connection="close")
        self.wfile.write(data)
