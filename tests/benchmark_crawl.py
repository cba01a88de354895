#!/usr/bin/env python3
"""Measure --crawl with its defaults against one download at a time, from a server that takes 100 ms to answer.

    python tests/benchmark_crawl.py [--count 500]

The exit code is 1 if it is not at least 6 times as fast.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BAR = 6  # times as fast


def seconds(site: str, count: int, *flags: str) -> float:
    """Return how long a whole crawl of `count` pictures into an empty folder takes."""
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder, "names.txt")
        names.write_text("anything\n")
        command = [
            sys.executable, HERE.parent / "retrain.py", "--crawl", names, "--crawl_dir", folder, "--crawl_only",
            "--crawl_count", str(count), "--crawl_source", f"bing:{site}/images/async", "--crawl_host_delay", "0",
            "--crawl_allow_private", "127.0.0.1", "--logging_verbosity", "ERROR", *flags,
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        taken = time.perf_counter() - start
        kept = len([*Path(folder, "anything").glob("*.jpg")])
        if kept != count:
            raise SystemExit(f"{kept} pictures were kept instead of {count}")
        return taken


def main() -> int:
    """Print both times and their ratio; return the exit code, 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="pictures, of about 50 KB each")
    count = parser.parse_args().count
    serve = [sys.executable, HERE / "crawl_server.py", "--port", "0", "--latency", "0.1", "--kind", "big"]
    server = subprocess.Popen([*serve, "--count", str(count)], stdout=subprocess.PIPE, text=True)
    try:
        site = server.stdout.readline().strip()
        together = seconds(site, count)
        print(f"{count} pictures, as many at once as by default: {together:.1f} s")
        alone = seconds(site, count, "--crawl_parallel", "1")
        print(f"{count} pictures, one at a time: {alone:.1f} s")
        print(f"ratio: {alone / together:.1f}, which should be {BAR} or more")
        return int(alone / together < BAR)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
