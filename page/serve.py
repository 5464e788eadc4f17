"""Serve the page and the demo's files to a browser on this machine.

    python page/serve.py [PORT]
"""
import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """Quietly."""


def main() -> int:
    p = argparse.ArgumentParser(description="Serve the page to a browser on this machine.")
    p.add_argument("port", nargs="?", type=int, default=8000, metavar="PORT")
    port = p.parse_args().port
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Files, directory=ROOT))
    except (OverflowError, OSError) as e:
        p.error(f"port {port}: {e}; try python page/serve.py 8001")
    print(f"http://127.0.0.1:{server.server_port}/page/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
