"""A web site of its own for the tests of --crawl: pictures, the pages of every source, and all kinds of misbehaviour.

In a test, `with CrawlServer() as server:` and `server.results[words]`.

A picture lies at /p/<kind>/<seed>.jpg: the seed tells what it shows, the kind how the server behaves. What was asked
for is counted in `server.traffic`.
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
import random
import struct
import threading
import time
import urllib.parse
import zlib
from collections import Counter, defaultdict

import numpy as np
import PIL.Image

# What a crawl with --crawl_allow_private 127.0.0.1, --crawl_max_bytes 300000 and a short time-out says to each kind.
BAD = {
    "404": "HTTP 404",
    "500": "HTTP 500",
    "stall": "timed out",
    "drip": "too slow",
    "cut": "broke off",
    "truncated": "the file is truncated",
    "empty": "the file is empty",
    "html": "a web page",
    "text": "not an image in JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or HEIC format",
    "endless": "too many bytes",
    "long": "broke off",
    "gzip_bomb": "too many bytes",
    "loop": "too many redirects",
    "to_10": "private address",
    "to_loopback": "private address",
    "to_ipv6": "private address",
    "to_file": "no http or https address",
    "to_bracket": "no http or https address",
    "bomb": "too many pixels",
    "small": "too small",
    "forbidden": "forbidden by robots.txt",
    "copy": "the same file is there already",
    "smaller": "the same picture is there already",
    "larger": "the same picture is there already",
    "poorer": "the same picture is there already",
}
PASSING = {"500", "stall", "cut", "drip", "long"}  # another time they might go well
TWINS = {"copy", "smaller", "larger", "poorer"}  # of the good picture of the same seed
GOOD = ("good", "png", "gif", "bmp", "webp", "429", "500_once", "hops5", "gzip", "mislabelled", "chunked", "unlengthed")
ENDINGS = {"png": ".png", "gif": ".gif", "bmp": ".bmp", "webp": ".webp", "mislabelled": ".png"}  # else .jpg
DRAWN = {
    *ENDINGS,
    "big",
    "red",
    "blue",
    "small",
    "smaller",
    "larger",
    "poorer",
}  # behind all others is the good picture
ROBOTS = "# two groups\nUser-agent: *\nDisallow: /private/\nDisallow: /p/forbidden/\n\nUser-agent: other\nDisallow: /\n"
REDIRECTS = {
    "to_10": "http://10.0.0.1/{seed}.jpg",
    "to_loopback": "http://127.0.0.2:{port}/p/good/{seed}.jpg",
    "to_ipv6": "http://[::1]:{port}/p/good/{seed}.jpg",
    "to_file": "file:///etc/passwd",
    "to_bracket": "http://[::1/{seed}.jpg",
    "loop": "/p/loop/{seed}.jpg",
}
# 50 MB of nothing, packed: members of a gzip file may follow each other.
GZIP_BOMB = gzip.compress(bytes(1_000_000)) * 50
BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


@dataclasses.dataclass(frozen=True)
class Result:
    """A picture that the sources tell of: how the server behaves, what it shows, and why it is to be refused.

    It is drawn at once, so that whoever asks for it later never waits for that.
    """

    kind: str
    seed: int
    reason: str = ""  # for a picture to be kept

    def __post_init__(self):
        file_of(self.kind, self.seed)

    @property
    def path(self) -> str:
        return f"/p/{self.kind}/{self.seed}.jpg"

    @property
    def title(self) -> str:
        return f'{self.kind} „Straße & 日本 №{self.seed}" <3'


def plant(first_seed: int, count: int, bad_share: float = 0.4, shuffle: int = 0) -> list[Result]:
    """Return `count` results of which a share is bad, in all the ways there are; twins come after the good ones."""
    bad = round(count * bad_share)
    seeds = iter(range(first_seed, first_seed + count))
    good = [Result(GOOD[i % len(GOOD)] if i < 2 * len(GOOD) else "good", next(seeds)) for i in range(count - bad)]
    originals = [result for result in good if result.kind == "good"]
    kinds = [kind for _, kind in zip(range(bad), [*BAD] * bad, strict=False)]
    refused = [Result(kind, next(seeds), BAD[kind]) for kind in kinds if kind not in TWINS]
    twins = [Result(kind, originals[i].seed, BAD[kind]) for i, kind in enumerate(k for k in kinds if k in TWINS)]
    mixed = good + refused
    random.Random(shuffle).shuffle(mixed)
    for twin in twins:
        after = next(i for i, result in enumerate(mixed) if (result.kind, result.seed) == ("good", twin.seed))
        mixed.insert(random.Random(f"{shuffle} {twin}").randint(after + 1, len(mixed)), twin)
    return mixed


# The pictures.


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

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def file_of(kind: str, seed: int) -> bytes:
    """Return the file that lies at /p/<kind>/<seed>.jpg, or behind the misbehaviour there."""
    return drawn(kind if kind in DRAWN else "good", seed)


@functools.lru_cache(maxsize=4096)
def drawn(kind: str, seed: int) -> bytes:
    """Return the file of a kind of its own."""
    if kind == "big":  # about 50 KB
        return encoded(draw(seed, (640, 480)), quality=92)
    if kind in ("red", "blue"):
        return encoded(draw(seed, tint=(200, 30, 30) if kind == "red" else (30, 30, 200)), quality=90)
    image = draw(seed)
    if kind in ENDINGS:
        return encoded(image, ENDINGS[kind][1:].upper())
    if kind == "small":
        return encoded(image.resize((320, 99)), quality=90)
    if kind == "smaller":
        return encoded(image.resize((200, 150), PIL.Image.Resampling.LANCZOS), quality=70)
    if kind == "larger":
        return encoded(image.resize((480, 360), PIL.Image.Resampling.LANCZOS), quality=85)
    if kind == "poorer":
        return encoded(image, quality=30)
    return encoded(image, quality=90)


# The pages of the sources; `results` are (address, title) here.


def openverse_page(results: list[tuple[str, str]], page: int, size: int, site: str) -> dict:
    """Return a page of the JSON API of Openverse."""
    shown = results[(page - 1) * size : page * size]
    return {
        "result_count": len(results),
        "page_count": -(-len(results) // size),
        "page_size": size,
        "page": page,
        "results": [
            {
                "id": f"36537842-b067-4ca0-ad67-{abs(hash(url)) % 10**12:012}",
                "title": title,
                "indexed_on": "2024-05-20T09:32:33.157432Z",
                "foreign_landing_url": f"{site}/photos/{number}?a=1&b=2",
                "url": url,
                "creator": "Zoë Ünal",
                "creator_url": f"{site}/people/zoe",
                "license": "by-sa",
                "license_version": "2.0",
                "license_url": "https://creativecommons.org/licenses/by-sa/2.0/",
                "provider": "flickr",
                "source": "flickr",
                "category": None,
                "filesize": None,
                "filetype": None,
                "tags": [{"accuracy": None, "name": "птица", "unstable__provider": "flickr"}],
                "attribution": f'"{title}" by Zoë Ünal is licensed under CC BY-SA 2.0.',
                "fields_matched": ["description", "title"],
                "mature": False,
                "height": 240,
                "width": 320,
                "thumbnail": f"{site}/thumb/{number}",
                "unstable__sensitivity": [],
            }
            for number, (url, title) in enumerate(shown, (page - 1) * size)
        ],
    }


def bing_page(results: list[tuple[str, str]], first: int, count: int, site: str) -> str:
    """Return the HTML of images/async; behind the end it repeats the last page for ever."""
    pages = [results[i : i + count] for i in range(0, len(results), count)] or [[]]
    shown = pages[min(first // count, len(pages) - 1)]
    items = []
    for number, (url, title) in enumerate(shown):
        words = title.split(" ")
        facts = {
            "sid": "", "cturl": "", "cid": "7rZsT2Mr", "purl": f"{site}/seite/{number}?x=1&y=ä", "murl": url,
            "turl": f"{site}/th?id=OIP.{number}&pid=15.1", "md5": "eeb66c4f632b", "shkey": "", "t": " ".join(
                [f"\ue000{words[0]}\ue001", *words[1:]]
            ), "mid": "3B84E5D9A1C7", "desc": "",
        }  # fmt: skip
        items.append(
            f'<li data-idx="{number}" class="dgControl_item"><div class="iuscp isv"><div class="imgpt"><a class="iusc" '
            f'style="height:180px;width:240px" m="{html.escape(json.dumps(facts, ensure_ascii=False))}" '
            f"onclick=\"sj_evt.fire('IFrame.Navigate', this.href); return false;\" "
            f'href="/images/search?view=detailV2&amp;id={number}" h="ID=images,{number}.1"><div class="img_cont hoff">'
            f'<img class="mimg" src="{site}/th?id=OIP.{number}&amp;w=240&amp;h=180" alt="{html.escape(title)}"></div>'
            f'</a><div class="infopt"><a class="inflnk" href="#" aria-label="{html.escape(title)}"></a></div></div>'
            "</div></li>"
        )
    odd = html.escape(json.dumps({"t": "a tile without a picture", "purl": f"{site}/film"}))
    items.insert(1, f'<li data-idx="x"><div class="iuscp"><a class="iusc" m="{odd}" href="#"></a></div></li>')
    suggestions = '<div class="suggestion"><a class="iuscx" href="/images/search?q=more" m="{not json">more</a></div>'
    columns = f'<ul class="dgControl_list" data-row="0">{"".join(items)}</ul>'
    return (
        f'<div class="dg_b"><div class="dgControl hover" data-tags="" data-iid="images.{first}">{suggestions}{columns}'
        '</div></div><div id="mmComponent_images_as_1" data-nextUrl="/images/async?q=x&amp;first=35"></div>'
    )


def baidu_page(results: list[tuple[str, str]], first: int, words: str, site: str) -> str:
    """Return Baidu's flip page: 60 results in a script, an empty entry behind them, and related searches."""
    entries = []
    for number, (url, title) in enumerate(results[first : first + 60], first):
        entry = {
            "thumbURL": f"{site}/it/u={number},1&fm=26", "middleURL": f"{site}/it/u={number},2&fm=26",
            "largeTnImageUrl": "", "hasLarge": 0, "hoverURL": f"{site}/it/u={number},3", "pageNum": number,
            "objURL": url, "fromURL": "ippr_z2C$qAzdH3FAzdH3Fooo_z&e3Bfrti_z&e3Bv54AzdH3F" + str(number),
            "fromURLHost": "www.example.com", "currentIndex": "", "width": 320, "height": 240, "type": "jpg",
            "filesize": "", "bdSrcType": "0", "di": "7136", "pi": "0", "is": "0,0", "imgCollectionWord": "",
            "replaceUrl": [{"ObjURL": "https://never.example/1.jpg", "ObjUrl": "https://never.example/2.jpg"}],
            "hasThumbData": "0", "fromPageTitle": f"<strong>{title.split(' ')[0]}</strong> {title.partition(' ')[2]}",
            "fromPageTitleEnc": title, "bdSourceName": "", "isAspDianjing": 0, "token": "",
        }  # fmt: skip
        entries.append(json.dumps(entry, ensure_ascii=False, separators=(",", ":")).replace("/", "\\/"))
    entries[:1] = [entry.replace('"fromPageTitle":"', '"fromPageTitle":"it\\\'s ') for entry in entries[:1]]  # no JSON
    entries.append('{"thumbURL":"","middleURL":"","objURL":"","fromURL":"","fromPageTitle":""}')
    related = "".join(
        f'<a href="/search/index?word={i}" class="rs" title="{i}">{html.escape(words)} {i}</a>\n' for i in "甲乙"
    )
    return f"""<!DOCTYPE html>
<!--STATUS OK-->
<html><head><meta http-equiv="content-type" content="text/html;charset=utf-8">
<title>{html.escape(words)}_百度图片搜索</title>
<script>var bdImgStat = {{"objUrlKey": "x"}};</script></head>
<body><div id="wrapper"><div id="topRS"><span>相关搜索：</span>{related}</div>
<script type="text/javascript">
flip.setData('imgTotal', {len(results)});
flip.setData('imgData', {{"queryEnc":"%E7","queryExt":"{words}","listNum":{len(results)},"displayNum":60,"gsm":"3c",
"bdFmtDispNum":"约","bdSearchTime":"","isNeedAsyncRequest":0,"data":[{",".join(entries)}]}});
flip.setData('fcadData', null);
</script><div id="page"><strong><span class="pc">1</span></strong></div></div></body></html>
"""


def ordinary_page(results: list[tuple[str, str]]) -> str:
    """Return a web page that shows its pictures in all the ways that pages do, in turn."""
    forms = (
        '<img src="{url}" alt="{title}">',
        '<img src="/small{path}" srcset="/small{path} 320w, {url} 1280w, /middle{path} 640w" alt="{title}">',
        '<picture><source srcset="/small{path}, {url} 2x"><img src="/middle{path}" alt="{title}"></picture>',
        f'<img src="{BLANK}" data-src="{{url}}" alt="{{title}}"><noscript><img src="{{url}}" alt="x"></noscript>',
        '<a href="{url}"><img src="/thumb{path}" alt="{title}"></a>',
    )
    shown = []
    for number, (url, title) in enumerate(results):
        path = urllib.parse.urlsplit(url).path
        values = {"url": html.escape(url), "title": html.escape(title), "path": html.escape(path)}
        shown.append(f"<li>{forms[number % len(forms)].format(**values)}</li>")
    return f"<!DOCTYPE html><title>All of it</title><body><ul>{''.join(shown)}</ul><a href='/about'>us</a></body>"


GALLERY = """<!DOCTYPE html>
<html lang="fr"><head>
<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">
<base href="/gallery/">
<title>Caf\xe9 &amp; compagnie</title>
<meta property="og:image" content="/og.jpg">
<link rel="icon" href="/favicon.ico">
</head><body>
<img src="plain.jpg" alt="Un \xe9l\xe9phant">
<p>again: <img src="plain.jpg" alt="Un \xe9l\xe9phant"></p>
<img src="../up/one.jpg?a=1&amp;b=2#top" alt="">
<img src="w320.jpg" srcset="w320.jpg 320w,
    w1280.jpg 1280w, w640.jpg 640w" sizes="50vw">
<img src="x1.jpg" srcset="x1.jpg, x15.jpg 1.5x, x3.jpg 3x">
<img src="/c_fill,w_300/a.jpg" srcset="/c_fill,w_300/a.jpg 300w, /c_fill,w_900/a.jpg 900w">
<picture><source type="image/webp" srcset="pic-800.webp 800w, pic-1600.webp 1600w"><img src="pic.jpg"></picture>
<img class="lazy" src="{blank}" data-src="lazy.jpg"><noscript><img src="lazy.jpg"></noscript>
<img class="lazy" src="{blank}" data-srcset="lz-1.jpg 1x, lz-2.jpg 2x">
<img class="lazy" src="blank.gif" data-original="original.jpg">
<a href="full.JPG"><img src="thumb.jpg" alt="large"></a>
<a href="page2.html"><img src="linked.jpg"></a>
<a href="alone.png">the picture</a> <a href="mailto:x@example.com">write</a>
<img src="//{host}/scheme.jpg">
<img src="{blank}"><img alt="nothing">
</body></html>"""
# The addresses in it that are pictures, each in its largest form.
GALLERY_PATHS = [
    "/og.jpg",
    "/gallery/plain.jpg",
    "/up/one.jpg?a=1&b=2",
    "/gallery/w1280.jpg",
    "/gallery/x3.jpg",
    "/c_fill,w_900/a.jpg",
    "/gallery/pic-1600.webp",
    "/gallery/lazy.jpg",
    "/gallery/lz-2.jpg",
    "/gallery/original.jpg",
    "/gallery/full.JPG",
    "/gallery/thumb.jpg",  # in case that the link leads to a page about the picture
    "/gallery/linked.jpg",
    "/gallery/alone.png",
    "/scheme.jpg",
]


class Traffic:
    """What was asked for, by path, and when."""

    def __init__(self):
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget what was."""
        with self.lock:
            self.counts, self.starts, self.headers = Counter(), defaultdict(list), defaultdict(list)

    def note(self, host: str, path: str, headers: dict) -> int:
        """Note a request; return how many came before it for the same path."""
        with self.lock:
            self.counts[path] += 1
            self.starts[path].append(time.monotonic())
            self.headers[path].append(headers)
            return self.counts[path] - 1

    def pictures(self) -> Counter:
        """Return how often each picture was asked for."""
        with self.lock:
            return Counter({path: count for path, count in self.counts.items() if path.startswith("/p/")})

    def robots(self) -> int:
        """Return how often robots.txt was asked for."""
        return self.counts["/robots.txt"]


class CrawlServer(http.server.ThreadingHTTPServer):
    """The site. `results`: what each search finds; `bodies`: what lies at some paths instead of what should.

    A context manager: it answers, in threads of this process, while the block runs.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, port: int = 0, latency: float = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.latency, self.traffic, self.robots = latency, Traffic(), ROBOTS
        self.results: dict[str, list[Result]] = defaultdict(list)
        self.bodies, self.throttled = {}, 0  # throttled: so many requests of the API are answered with 429
        self.ended = threading.Event()

    @property
    def site(self) -> str:
        return "http://{}:{}".format(*self.server_address)

    def source(self, name: str) -> str:
        """Return the value of --crawl_source that points a source at this server."""
        paths = {
            "openverse": "/v1/images/",
            "bing": "/images/async",
            "baidu": "/search/flip?tn=baiduimage",
            "page": "/pages/{}.html",
        }
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

    def do_GET(self) -> None:
        """Answer a request, after the latency."""
        parts = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(parts.query).items()}
        before = self.server.traffic.note(self.server.site, parts.path, dict(self.headers))
        self.server.ended.wait(self.server.latency)
        if parts.path in self.server.bodies:
            return self.answer(self.server.bodies[parts.path], "text/html")
        if parts.path.startswith("/thumb/p/"):
            return self.answer(file_of("smaller", int(parts.path.split("/")[4].split(".")[0])))
        if parts.path.startswith("/p/"):
            _, _, kind, name = parts.path.split("/")
            return self.picture(kind, int(name.split(".")[0]), before, query)
        if parts.path == "/robots.txt":
            return self.robots()
        if parts.path == "/v1/images/":
            return self.openverse(query)
        return self.page(parts.path, query)

    def answer(self, body: bytes, kind: str = "image/jpeg", status: int = 200, **headers) -> None:
        """Send an answer, its length included."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Set-Cookie", "track=me; Path=/")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def page(self, path: str, query: dict) -> None:
        """Answer with a page of HTML."""
        server, site = self.server, self.server.site
        if path == "/images/async":
            results = server.found(query["q"])
            text = bing_page(results, int(query["first"]), int(query["count"]), site) if results else "<div></div>"
        elif path == "/search/flip":
            text = baidu_page(server.found(query["word"]), int(query["pn"]), query["word"], site)
        elif path == "/gallery.html":
            text = GALLERY.replace("{blank}", BLANK).replace("{host}", site.partition("//")[2])
            return self.answer(text.encode("latin-1"), "text/html")
        elif path.startswith("/pages/"):
            text = ordinary_page(server.found(urllib.parse.unquote(path[7:].removesuffix(".html"))))
        else:
            return self.answer(b"nothing here", "text/plain", 404)
        self.answer(text.encode(), "text/html; charset=utf-8")

    def openverse(self, query: dict) -> None:
        """Answer as api.openverse.org does, which also has limits."""
        page, size = int(query["page"]), int(query["page_size"])
        if self.server.throttled:
            self.server.throttled -= 1
            return self.answer(b'{"detail":"Request was throttled."}', "application/json", 429, Retry_After=1)
        results = self.server.found(query["q"])
        if size > (50 if "Authorization" in self.headers else 20):
            return self.answer(b'{"detail":"Authentication credentials"}', "application/json", 401)
        if page > max(1, -(-len(results) // size)):
            return self.answer(b'{"detail":"Invalid page."}', "application/json", 404)
        body = json.dumps(openverse_page(results, page, size, self.server.site), ensure_ascii=False)
        self.answer(body.encode(), "application/json")

    def robots(self) -> None:
        """Answer with robots.txt, or with what `server.robots` is if it is no text: a status."""
        rules = self.server.robots
        if isinstance(rules, int):
            self.answer(b"no", "text/plain", rules)
        else:
            self.answer(rules.encode(), "text/plain")

    def picture(self, kind: str, seed: int, before: int, query: dict) -> None:
        """Answer for a picture, as its kind behaves; `before`: how often it was asked for already."""
        if kind in REDIRECTS:
            return self.redirect(REDIRECTS[kind].format(seed=seed, port=self.server.server_port))
        if kind.startswith("hops"):
            left = int(query.get("left", kind[4:]))
            return self.redirect(f"{seed}.jpg?left={left - 1}") if left else self.answer(file_of("good", seed))
        if kind in ("404", "500"):
            return self.answer(b"<html>no</html>", "text/html", int(kind))
        if kind == "throttled" or (kind == "429" and not before):
            return self.answer(b"slowly", "text/plain", 429, Retry_After=1)
        if kind == "500_once" and not before:
            return self.answer(b"oops", "text/plain", 500)
        special = getattr(self, f"send_{kind}", None)
        if special:
            with contextlib.suppress(OSError):  # they hang up on us, and are right
                special(file_of("good", seed))
            self.close_connection = True
            return None
        return self.answer(file_of(kind, seed))

    def redirect(self, target: str) -> None:
        """Answer with another address."""
        self.answer(b"over there", "text/plain", 302, Location=target)

    def begin(self, length: int | str | None = None, **headers) -> None:
        """Send the head of an answer of a picture."""
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send_stall(self, _: bytes) -> None:
        self.server.ended.wait(30)

    def send_drip(self, data: bytes) -> None:
        """Send a byte now and then, for as long as anybody reads."""
        self.begin()
        for byte in data:
            self.wfile.write(bytes([byte]))
            if self.server.ended.wait(0.05):
                return

    def send_cut(self, data: bytes) -> None:
        self.begin(len(data))
        self.wfile.write(data[: len(data) // 2])

    def send_truncated(self, data: bytes) -> None:
        self.answer(data[: len(data) // 2])

    def send_empty(self, _: bytes) -> None:
        self.answer(b"")

    def send_html(self, _: bytes) -> None:
        self.answer(b"\n<!DOCTYPE html><html><body>Please accept our cookies</body></html>")

    def send_text(self, _: bytes) -> None:
        self.answer(b"hotlinking is not allowed")

    def send_endless(self, data: bytes) -> None:
        self.begin()
        self.wfile.write(data)
        while not self.server.ended.is_set():
            self.wfile.write(bytes(1 << 14))

    def send_long(self, data: bytes) -> None:
        """Tell of a length beyond all measure, and send a good picture."""
        self.begin(10**12)
        self.wfile.write(data)

    def send_gzip_bomb(self, _: bytes) -> None:
        self.answer(GZIP_BOMB, Content_Encoding="gzip")

    def send_bomb(self, _: bytes) -> None:
        self.answer(bomb(), "image/png")

    def send_gzip(self, data: bytes) -> None:
        self.answer(gzip.compress(data), Content_Encoding="gzip")

    def send_chunked(self, data: bytes) -> None:
        self.begin(Transfer_Encoding="chunked")
        for start in range(0, len(data), 5000):
            chunk = data[start : start + 5000]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def send_unlengthed(self, data: bytes) -> None:
        self.begin(Connection="close")
        self.wfile.write(data)
