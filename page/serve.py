"""Serve the page and the demo's files to a browser on this machine, and nothing else of the folder.

    python page/serve.py [PORT]
"""
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Files(SimpleHTTPRequestHandler):
    def send_head(self):
        if self.path == "/":
            self.path = "/page/index.html"
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return None
        if not Path(self.translate_path(self.path)).parent in (ROOT / "page", ROOT / "demo"):
            self.send_error(404)
            return None
        return super().send_head()

    def log_message(self, *_) -> None:
        pass


def main() -> int:
    try:
        port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Files, directory=ROOT))
    except (ValueError, OverflowError, OSError) as e:
        print(f"serve.py: {e}; another port: python page/serve.py 8001", file=sys.stderr)
        return 2
    print(f"http://127.0.0.1:{server.server_port}/   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
