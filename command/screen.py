"""What a run shows while it goes on: text on stdout; prompt, rounds and account on stderr."""
import codecs
import contextlib
import itertools
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

from command.cli import is_screen, note, waiting
from command.job import Job
from command.report import fates, figures, ids_of, summary
from speculative import Chance, Round, Tensor
from text.tokenizer import Tokenizer

BAR = 32                     # layers that one line shows, on a narrow terminal a quarter of them


class Watched(Chance):
    """Draws as every Chance does, and tells of each token."""

    def __init__(self, chance: Chance, tell: Callable[[int], None]) -> None:
        self.generator = chance.generator
        self.tell = tell

    def draw(self, p: Tensor) -> Tensor:
        token = super().draw(p)
        self.tell(int(token))                          # a GPU is waited for
        return token


class Terminal:
    """A stream to watch a run on. Colour only where someone looks, and never with NO_COLOR; lines
    of 79 columns, or of all but the last that a terminal has."""
    CODES = dict(kept="32", rejected="9;31", own="1;34", dim="2")
    MARKS = dict(rejected="~{}~", own="[{}]")          # without colour

    def __init__(self, stream: TextIO) -> None:
        self.is_screen = is_screen(stream)
        self.colour = self.is_screen and not os.environ.get("NO_COLOR")
        self.width = 79
        with contextlib.suppress(OSError, AttributeError):             # no terminal
            self.width = (os.get_terminal_size(stream.fileno()).columns or 80) - 1
        self.bar = BAR if self.width > 2 * BAR else BAR // 4
        self.cells = "█░" if "utf" in (stream.encoding or "").lower() else "#."

    def paint(self, kind: str, text: str) -> str:
        code = self.CODES.get(kind)
        return f"\033[{code}m{text}\033[0m" if self.colour and code and text else text

    def folded(self, pieces: Iterable[tuple[str, str]], width: int) -> list[str]:
        """Texts of a kind each, painted or marked, in lines of at most `width` columns."""
        lines = [""]
        used = 0
        for kind, text in pieces:
            if not self.colour:
                text = self.MARKS.get(kind, "{}").format(text)
            part = ""                                  # painted whole: no code within a character
            for c in text:
                if not c.isprintable():
                    c = repr(c)[1:-1]
                columns = len(c) + (unicodedata.east_asian_width(c[0]) in "WF")
                if used + columns > width:
                    lines[-1] += self.paint(kind, part)
                    lines.append("")
                    part = ""
                    used = 0
                part += c
                used += columns
            lines[-1] += self.paint(kind, part)
        return lines

    def legend(self) -> str:
        run, left_out = self.cells
        return "\n".join(self.folded([
            ("kept", "kept"), ("", " "), ("rejected", "rejected"), ("", " "),
            ("own", "the model's own"),
            ("", f"  {run} layer run, {left_out} left out  * chosen anew")], self.width))

    def round(self, n: int, r: Round, spelled: Callable, anew: bool = False) -> str:
        """Round n: a cell per layer, light where left out, after a * where they were chosen anew;
        kept/drafted; the tokens. What does not fit goes on below."""
        bar = "".join(self.cells[left_out] for left_out in r.skip)
        tokens = [(kind, spelled(ids)) for kind, ids in fates(r).items() if ids]
        sums = f" {r.accepted:2}/{len(r.drafted):<2} "
        return "\n".join(self.beside(f"{n:4}{'*' if anew else ' '}", bar, sums, tokens))

    def drawing(self, n: int, L: int, text: str) -> str:
        """A line for the time in which round n goes on: what was drawn, where it is to stand."""
        return self.beside(f"{n:4} ", " " * L, " " * len(" 12/12 "), [("dim", text)])[0]

    def beside(self, number: str, bar: str, sums: str, tokens: list[tuple[str, str]]) -> list[str]:
        """Lines of four columns: a round's number, bar and sums, and its tokens."""
        bars = [bar[i:i + self.bar] for i in range(0, len(bar), self.bar)]
        folded = self.folded(tokens, self.width - len(number + bars[0] + sums))
        lines = []
        for cells, text in itertools.zip_longest(bars, folded, fillvalue=""):
            lines.append(f"{number}{cells:{len(bars[0])}}{sums}{text}".rstrip())
            number = " " * len(number)
            sums = " " * len(sums)
        return lines


class Text:
    """ids -> text as it comes; a split character waits for its last byte. No tokenizer: the ids."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: Sequence[int], final: bool = False) -> str:
        ids = [i for i in ids if i not in self.stops]
        if self.tokenizer:
            return self.utf8.decode(self.tokenizer.decode_bytes(ids), final)
        return self.spelled(ids)

    def spelled(self, ids: Sequence[int]) -> str:
        """These alone, with the tokens that end a text."""
        return self.tokenizer.decode(ids) if self.tokenizer else "".join(f"{i} " for i in ids)


class Screen:
    """One run of a job, as its flags want it shown."""

    def __init__(self, job: Job, ids: list[int]) -> None:
        self.job = job
        self.ids = ids
        self.rounds: list[Round] = []
        self.drawn: list[int] = []                     # in the round that goes on
        self.text = Text(job.tokenizer, job.stops)
        self.whole = ""                                # the text so far
        self.open = False                              # does the text's last line go on?
        self.err = Terminal(sys.stderr)
        self.one = sys.stdout.isatty() and sys.stderr.isatty()      # text and rounds on one screen
        waiting(f"reading {len(ids)} tokens")

    def watched(self, chance: Chance) -> Chance:
        """The same numbers. Where rounds are watched, what is drawn is seen at once."""
        if self.job.flags.verbose and self.err.is_screen:
            return Watched(chance, self.draw)
        return chance

    def draw(self, token: int) -> None:
        """A token was drawn. It stands there until its round has ended and its fate is known."""
        self.drawn.append(token)
        if self.rounds:
            L = len(self.rounds[0].skip)
            waiting(self.err.drawing(len(self.rounds), L, self.text.spelled(self.drawn)))

    def put(self, text: str, stream: TextIO) -> None:
        print(text, end="", file=stream, flush=True)
        if text:
            self.open = not text.endswith("\n")

    def add(self, ids: list[int], final: bool = False) -> None:
        """More of the text, shown at once, unless rounds or an object are."""
        text = self.text.add(ids, final)
        self.whole += text
        if not (self.job.flags.verbose or self.job.flags.json):
            self.put(text, sys.stdout)

    def begin(self) -> None:
        """The prompt, and what the marks of rounds mean."""
        a = self.job.flags
        tok = self.job.tokenizer
        prompt = tok.decode(self.ids[self.ids[0] == tok.bos:]) if tok else ""
        if a.verbose:
            lines = [self.err.legend()]
            for line in prompt.splitlines():
                lines += self.err.folded([("dim", line)], self.err.width)
            print(*lines, sep="\n", file=sys.stderr, flush=True)
        elif self.one and not (a.json or a.chat):
            self.put(self.err.paint("dim", prompt), sys.stderr)

    def show(self, r: Round) -> None:
        """A round has ended."""
        waiting("")
        if not self.rounds:
            self.begin()
        self.drawn = []
        self.add(r.emitted)
        if self.job.flags.verbose:
            anew = bool(self.rounds) and self.rounds[-1].choice is not None
            line = self.err.round(len(self.rounds), r, self.text.spelled, anew)
            print(line, file=sys.stderr, flush=True)
        self.rounds.append(r)

    def end(self) -> None:
        """The run has ended, or was interrupted: what was made so far is kept."""
        waiting("")
        a = self.job.flags
        self.add([], final=True)
        stats = figures(self.rounds, self.job.load_seconds, self.job.measure_seconds)
        if a.json:
            print(json.dumps(dict(prompt_ids=self.ids, ids=ids_of(self.rounds),
                                  settings=self.job.report(), stats=stats,
                                  text=self.whole if self.job.tokenizer else None)))
            return
        if a.verbose and not self.one:                 # on one screen the rounds hold the text
            self.put(self.whole, sys.stdout)
        if self.open:
            print(file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        if self.whole.encode(encoding, "ignore").decode(encoding) != self.whole:
            note(f"this terminal's encoding, {encoding}, lacks characters of the text, which are ?")
        print(self.err.paint("dim", summary(stats, self.job.strategy)), file=sys.stderr)
