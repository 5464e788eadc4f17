"""What makes a polite command of a script: whatever the user did wrong is one line with the flag's
own name, and every end has its exit status. Serves the main command and those of bench/, oracle/.
"""
import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from llama import ModelError, read_json, torch


class UsageError(Exception):
    """What the user asked for that cannot be done, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line instead of the whole usage."""

    def error(self, message: str) -> None:
        raise UsageError(message.removeprefix("argument ") + " (--help lists the flags)")


def number(kind: type, wanted: str, ok: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a number of `kind` for which `ok` holds, in words `wanted`."""
    def parse(text: str) -> float:
        try:
            if ok(value := kind(text)):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return parse


def numbers(text: str) -> list[int]:
    """A type for argparse: whole numbers, separated by commas or blanks."""
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2,3")
    return [int(part) for part in parts]


def saved(path: Path, p: Parser, names: Iterable[str]) -> dict:
    """Defaults for `names` from a JSON file, checked by the flags they stand for; none, no file. An
    object (of costs) is checked by who uses it."""
    own = read_json(path) if path.exists() else {}
    try:
        for name in own:
            if name not in names:
                raise UsageError(f"{name} is not one of {', '.join(names)}")
        a = p.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in own.items()
                          if name != "costs" or not isinstance(value, dict)])
    except UsageError as e:
        raise ModelError(f"{path}: {e}") from None
    return {name: value if name == "costs" and isinstance(value, dict) else getattr(a, name)
            for name, value in own.items()}


def interruptible() -> None:
    """From here on Ctrl-C is an exception, so that what was made can be kept. Before (see
    command/start.py) it just ended the process. Ignored, as under nohup, it stays."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def answer(work: Callable[[], int]) -> int:
    """Run a command; its exit status, or for what stopped it one line and 1 (model, memory, file),
    2 (usage), 130 (Ctrl-C) or 141 (the reader of our output has gone)."""
    name = Path(sys.argv[0]).name
    try:
        if hasattr(sys.stdout, "reconfigure"):         # a notebook's has not
            sys.stdout.reconfigure(errors="replace")   # for a terminal that lacks characters
        status = work()
        sys.stdout.flush()                             # here, where a fault of it is answered for
        return status
    except (UsageError, ModelError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as e:
        line = str(e).strip().replace("\n", " ")
        print(f"{name}: {line or 'out of memory'}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:                               # a file of the user's, or a full disk
        print(f"{name}: {e.filename or 'output'}: {e.strerror}", file=sys.stderr)
        return 1
