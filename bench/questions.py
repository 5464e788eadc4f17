"""The prompts of a measurement: a file in Spec-Bench's format, or of token ids, as every tool here
reads it."""
import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from command.cli import Parser, UsageError
from command.flags import DEMO
from command.flags import parser as main_parser
from command.job import Job

Questions = list[tuple[str, list[str] | list[list[int]]]]   # the category and the turns of each


def parser(usage: str, description: str) -> Parser:
    """The flags of the main command, for prompts that are not the model's own."""
    p = main_parser()
    p.usage = f"python bench/%(prog)s {usage}"
    p.description = description
    p.set_defaults(temperature=0.0, seed=0)
    return p


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


def job_for(a: argparse.Namespace, questions: Questions) -> Job:
    """The model, which needs a tokenizer if some question is a text."""
    if not a.chat and all(is_ids(turn) for _, turns in questions for turn in turns):
        a.prompt_ids = [0]
    return Job(a)


def encoded(job: Job, messages: list[dict]) -> list[int]:
    """A conversation up to the last turn, checked; where that is ids, these."""
    last = messages[-1]["content"]
    return job.fits(last if isinstance(last, list) else job.encode(messages))


def first_turns(job: Job, questions: Questions) -> list[tuple[str, list[int]]]:
    """(category, ids) of each question's first turn."""
    return [(category, encoded(job, [dict(role="user", content=turns[0])]))
            for category, turns in questions if turns]


def opened(p: Parser, argv: Sequence[str] | None) -> tuple[Job, list[tuple[str, list[int]]]]:
    """A model whose weights are not yet read, and the first turns: for tools that have no use for
    recorded passes, which are of one setting alone."""
    p.add_argument("--questions", default=DEMO / "prompts.jsonl", metavar="FILE",
                   help="in Spec-Bench's format, or token ids (the demo's)")
    a = p.parse_args(argv)
    a.eager = True
    questions = read_questions(a.questions)
    job = job_for(a, questions)
    return job, first_turns(job, questions)
