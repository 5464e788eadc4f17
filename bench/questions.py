"""What the tools here have in common: a file of prompts, the model that answers them, and how far
the work is."""
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from command.cli import Parser, UsageError
from command.flags import DEMO, parsed
from command.flags import parser as main_parser
from command.job import Job

Questions = list[tuple[str, list[str] | list[list[int]]]]   # the category and the turns of each


def parser(description: str) -> Parser:
    """The flags of the main command, for prompts that are not the model's own."""
    p = main_parser()
    p.usage = "python bench/%(prog)s [FILE] [flags]"
    p.description = description
    p.add_argument("file", nargs="?", default=DEMO / "prompts.jsonl", metavar="FILE",
                   help="questions in Spec-Bench's format, or token ids")
    p.set_defaults(temperature=0.0, seed=0)
    return p


def opened(p: Parser, argv: Sequence[str] | None) -> tuple[Job, Questions]:
    """A model whose weights are not yet read, and the questions for it. Where all are token ids it
    needs no tokenizer."""
    a = parsed(argv, p)
    if a.prompt is not None or a.prompt_ids or a.compare or a.verbose or a.trace:
        raise UsageError("a file holds the prompts, and no text is shown: without --prompt, "
                         "--prompt-ids, --compare, --verbose, --trace")
    questions = read_questions(a.file) if a.file else []
    if not a.chat and all(is_ids(turn) for _, turns in questions for turn in turns):
        a.prompt_ids = [0]
    return Job(a), questions


def read_questions(path: str | Path) -> Questions:
    """A JSON object with `category` and `turns` per line; or `ids`, one turn of token ids."""
    questions = []
    try:
        # split, as splitlines would also break a line at U+2028 and U+0085, which JSON leaves as is
        for line in Path(path).read_text(encoding="utf-8-sig").split("\n"):
            if line.strip():
                q = json.loads(line)
                turns = [q["ids"]] if "ids" in q else q["turns"]
                if not isinstance(turns, list) or not all(
                        isinstance(turn, str) or is_ids(turn) for turn in turns):
                    raise TypeError("turns is not a list of texts, nor ids one of token ids")
                questions.append((str(q["category"]), turns))
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path}: not a Spec-Bench file, a JSON object with category and turns "
                         f"per line ({e!r})") from None
    if not any(turns for _, turns in questions):
        raise UsageError(f"{path}: no questions")
    return questions


def is_ids(turn: object) -> bool:
    return isinstance(turn, list) and turn and all(type(i) is int and i >= 0 for i in turn)


def encoded(job: Job, messages: list[dict]) -> list[int]:
    """A conversation up to the last turn, checked; where that is ids, these."""
    last = messages[-1]["content"]
    return job.fits(last if isinstance(last, list) else job.encode(messages))


def first_turns(job: Job, questions: Questions) -> list[tuple[str, list[int]]]:
    """(category, ids) of each question's first turn."""
    return [(category, encoded(job, [dict(role="user", content=turns[0])]))
            for category, turns in questions if turns]


def told(items: Sequence, what: str) -> Iterator:
    """The items; a terminal shows which of how many is at work."""
    tty = sys.stderr.isatty()
    try:
        for n, item in enumerate(items, 1):
            if tty:
                print(f"\r{what} {n} of {len(items)}", end="", file=sys.stderr, flush=True)
            yield item
    finally:                                           # also if Ctrl-C ends it
        if tty:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
