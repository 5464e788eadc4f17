"""Serve the page and the demo's files to a browser on this machine.

    python page/serve.py [PORT]
"""
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """Quietly."""


def main() -> int:
    port = sys.argv[1] if len(sys.argv) > 1 else "8000"
    try:
        server = ThreadingHTTPServer(("127.0.0.1", int(port)), partial(Files, directory=ROOT))
    except (ValueError, OverflowError, OSError) as e:
        print(f"serve.py: port {port}: {e}; try python page/serve.py 8001", file=sys.stderr)
        return 2
    print(f"http://127.0.0.1:{server.server_port}/page/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
