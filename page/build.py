"""The page with its scripts and the demo's files in one HTML file, for a USB stick.

    python page/build.py --out lesson.html
"""
import argparse
import base64
import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent
DEMO = PAGE.parent / "demo"
FILES = ("config.json", "model.safetensors", "tokenizer.model", "clasp.json")


def whole() -> str:
    """The page as one text."""
    def script(match: re.Match) -> str:
        return f"<script>\n{(PAGE / match[1]).read_text(encoding='utf-8')}</script>"
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    text = re.sub(r'<script src="(\w+\.js)"></script>', script, text)
    data = "".join(f'<script type="text/plain" id="{name}">'
                   f"{base64.b64encode((DEMO / name).read_bytes()).decode()}</script>\n"
                   for name in FILES)
    return text.replace("<script>", data + "<script>", 1)


def main() -> int:
    p = argparse.ArgumentParser(description="The page and its model as one file.")
    p.add_argument("--out", metavar="FILE", required=True, help="the HTML file to write")
    a = p.parse_args()
    try:
        size = Path(a.out).write_text(whole(), encoding="utf-8")
    except OSError as e:
        print(f"build.py: {e.filename}: {e.strerror}", file=sys.stderr)
        return 1
    print(f"{a.out}: {size / 1e6:.0f} MB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
