"""What a run shows while it goes on: text on stdout; prompt, rounds and account on stderr."""
import json
import os
import sys
from typing import TextIO

from command.job import Job
from command.report import fates, figures, ids_of, summary
from speculative import Round
from text.stream import Text
from text.tokenizer import Tokenizer


class Terminal:
    """Colour only where someone looks: on a terminal, and never with NO_COLOR."""
    CODES = dict(kept="32", rejected="9;31", own="1;34", dim="2")

    def __init__(self, stream: TextIO) -> None:
        self.colour = (stream.isatty() and not os.environ.get("NO_COLOR")
                       and os.environ.get("TERM") != "dumb")
        try:
            "█░".encode(stream.encoding or "ascii")
            self.cells = "█░"
        except UnicodeEncodeError:
            self.cells = "#."

    def paint(self, kind: str, text: str) -> str:
        if self.colour:
            return f"\033[{self.CODES[kind]}m{text}\033[0m"
        return {"rejected": f"~{text}~", "own": f"[{text}]"}.get(kind, text)

    def round(self, n: int, r: Round, tokenizer: Tokenizer | None) -> str:
        """Round n in a line: a cell per layer, light where skipped; kept/drafted; the tokens."""
        def spell(i: int) -> str:
            text = tokenizer.decode([i]) if tokenizer else f"{i} "
            return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

        bar = "".join(self.cells[s] for s in r.skip)
        parts = (self.paint(kind, spell(i)) for kind, ids in fates(r).items() for i in ids)
        return f"{n:4} {bar} {r.accepted:2}/{len(r.drafted):<2} {''.join(parts)}"


class Screen:
    """One run of a job, as its flags want it shown."""

    def __init__(self, job: Job, ids: list[int]) -> None:
        self.job = job
        self.ids = ids
        self.rounds: list[Round] = []
        self.text = Text(job.tokenizer, job.stops)
        self.shown: list[str] = []
        self.err = Terminal(sys.stderr)
        self.one = sys.stdout.isatty() and sys.stderr.isatty()      # text and rounds on one screen
        tok = job.tokenizer
        if self.one and tok and not (job.a.json or job.a.verbose or job.a.chat):
            prompt = tok.decode(ids[ids[0] == tok.bos:])
            print(self.err.paint("dim", prompt), end="", file=sys.stderr, flush=True)

    def show(self, r: Round) -> None:
        """A round has ended."""
        self.shown.append(self.text.add(r.emitted))
        if self.job.a.verbose:
            line = self.err.round(len(self.rounds), r, self.job.tokenizer)
            print(line, file=sys.stderr, flush=True)
        elif not self.job.a.json:
            print(self.shown[-1], end="", flush=True)
        self.rounds.append(r)

    def end(self) -> None:
        """The run has ended, or was interrupted: what was made so far is kept."""
        a = self.job.a
        self.shown.append(self.text.add([], final=True))
        whole = "".join(self.shown)
        if a.json:
            print(json.dumps(dict(prompt_ids=self.ids, ids=ids_of(self.rounds),
                                  settings=self.job.report(), stats=figures(self.rounds),
                                  text=whole if self.job.tokenizer else None)))
            return
        rest = self.shown[-1]
        if a.verbose and not self.one:                 # on one screen the rounds hold the text
            rest = whole
        newline = "\n" if sys.stdout.isatty() else ""
        print(rest, end=newline, flush=True)
        account = summary(figures(self.rounds), a.strategy)
        print(self.err.paint("dim", account), file=sys.stderr)
