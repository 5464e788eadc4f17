"""The page with its scripts and the demo's files in one HTML file, for a USB stick.

    python page/build.py lesson.html
"""
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
    try:
        _, out = sys.argv
        Path(out).write_text(whole(), encoding="utf-8")
    except (ValueError, OSError) as e:
        print(f"build.py: {e}; usage: python page/build.py FILE", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
