"""The page's visit begins before the first test of all: a browser keeps a second core busy."""
import tempfile
from pathlib import Path


def pytest_collection_finish(session):
    from page import test_page
    wanted = any("told" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and test_page.CHROMIUM and not session.config.option.collectonly:
        session.config.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        session.config.visit = test_page.visit(Path(session.config.folder.name))
