"""What makes a polite command of a script: whatever the user did wrong is one line with the flag's
own name, and every end has its exit status. Serves the main command and those of bench/, oracle/.
"""
import argparse
import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from llama import ModelError


class UsageError(Exception):
    """What the user asked for that cannot be done, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line instead of the whole usage."""

    def error(self, message: str) -> None:
        if "expected one argument" in message:
            message += "; one that begins with - is written after =, as in --prompt=-x"
        if message.startswith("unrecognized"):
            message += self.meant(message.split()[2].partition("=")[0])
        raise UsageError(message.removeprefix("argument ") + " (--help lists the flags)")

    def meant(self, word: str) -> str:
        """A hint at the flag that was meant by an unknown word."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        if not word.startswith("-"):
            return "; a prompt stands after --prompt, in quotes" if "--prompt" in flags else ""
        near = [flag for flag in flags if flag.startswith(word)]
        near += difflib.get_close_matches(word, flags, 1)
        return f"; did you mean {near[0]}?" if near else ""


def number(kind: type, wanted: str, ok: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a number of `kind` for which `ok` holds, in words `wanted`."""
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if ok(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return parse


def numbers(text: str) -> list[int]:
    """A type for argparse: whole numbers, separated by commas or blanks."""
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2,3")
    return [int(part) for part in parts]


def out_of_memory(e: BaseException) -> bool:
    """PyTorch says so in a RuntimeError: on a GPU in one of its own, on a CPU in any."""
    words = str(e)
    return isinstance(e, MemoryError) or "memory" in words and "alloc" in words


def open_streams() -> None:
    """Make the three streams such as the rest may use. What is read by a program is UTF-8; only a
    terminal, which may lack characters, knows better."""
    for name, mode in (("stdin", "r"), ("stderr", "w"), ("stdout", "w")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, mode))
            if name == "stdout":
                raise OSError(errno.EBADF, "closed")
    if hasattr(sys.stdout, "reconfigure"):             # a notebook's has not
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")


def is_screen(stream: TextIO) -> bool:
    """Does someone look, and understand escape codes?"""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


stands = False                                         # does a line of `waiting`?


def waiting(what: str) -> None:
    """On a terminal, a line that stands until the next one takes its place. "" takes it away."""
    global stands
    if (what or stands) and is_screen(sys.stderr):
        print(f"\r\033[K{what}\r", end="", file=sys.stderr, flush=True)
    stands = bool(what)


def told(items: Sequence, what: str) -> Iterator:
    """The items; a terminal shows which of how many is at work."""
    try:
        for n, item in enumerate(items, 1):
            waiting(f"{what} {n} of {len(items)}")
            yield item
    finally:                                           # also if Ctrl-C ends it
        waiting("")


# What may lie in a folder in the place of what is read: Hugging Face's files, of safetensors.
INSTEAD = {"snapshots/*/config.json": "of a hub cache: take the folder that it is in",
           "params.json": "of Meta's own files: take Hugging Face's",
           "*.gguf": "which is not read: take a folder of safetensors",
           "pytorch_model*.bin": "which is not read: convert it to safetensors"}


def instead(folder: Path) -> str:
    """What stands in a folder in the place of what is read, in words to add; "" if unknown."""
    with contextlib.suppress(OSError):
        for path in filter(Path.is_file, sorted(folder.iterdir())):
            with path.open("rb") as file:
                if file.read(23) == b"version https://git-lfs":
                    return f"; {path.name} is a pointer of Git LFS: git lfs pull"
        if any(folder.glob("config.json")) and any(folder.glob("*.safetensors")):
            return ""
        for pattern, what in INSTEAD.items():
            for other in sorted(folder.glob(pattern))[:1]:
                return f"; there is {other.relative_to(folder)}, {what}"
    return ""


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """For what reads a model's folder: where it fails, what lies there instead is said."""
    try:
        yield
    except ModelError as e:
        raise ModelError(f"{e}{instead(folder)}") from None


def say(what: str) -> None:
    """One line on stderr, in this program's name."""
    waiting("")
    print(f"{Path(sys.argv[0]).name}: {what}", file=sys.stderr)


def note(what: str) -> None:
    say(f"note: {what}")


def answer(work: Callable[[], int]) -> int:
    """Run a command; its exit status, or for what stopped it one line and 1 (model, memory, file),
    2 (usage), 130 (Ctrl-C) or 141 (the reader of our output has gone)."""
    try:
        open_streams()
        try:
            status = work()
        except SystemExit as e:
            if e.code:
                raise
            status = 0                                 # --help, --version
        sys.stdout.flush()                             # here, where a fault of it is answered for
        return status
    except (UsageError, ModelError, FloatingPointError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not out_of_memory(e):
            raise
        say(str(e).strip().replace("\n", " ") or "out of memory")
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:                               # a file of the user's, or a full disk
        say(f"{e.filename or 'output'}: {e.strerror}")
        return 1


def answered(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """The main(argv) of a script, with `answer` for whatever ends it."""
    return lambda argv=None: answer(lambda: main(argv))
