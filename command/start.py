"""What has to come before the imports, which take a second: clock, Ctrl-C, missing packages."""
import importlib.util
import signal
import sys
import time

BEGAN = time.perf_counter()
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until the weights are read Ctrl-C just ends the process. As an exception it would come out of
    # C code as some other error.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
LACKING = [name for name in ("torch", "safetensors", "tiktoken")
           if not importlib.util.find_spec(name)]
if LACKING:
    sys.exit(f"clasp_mini.py: not installed for {sys.executable}: {', '.join(LACKING)}.\n"
             "In this folder:\n"
             "  python3 -m venv .venv && .venv/bin/pip install -r requirements.txt\n"
             "  .venv/bin/python clasp_mini.py")
