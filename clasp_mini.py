"""clasp-mini: self-speculative decoding with layers chosen in context (CLaSp, Chen et al., ACL
2025). The command.

    python clasp_mini.py --prompt "def fibonacci(n):"              # the model that ships with it
    python clasp_mini.py --prompt "def fibonacci(n):" --compare    # against plain decoding

This file holds no algorithm. It joins the others in one direction: config and weights (llama.py) ->
rounds (speculative.py, which is handed the chooser of dp_layer_skip.py) -> text, figures, and for
other implementations a trace (oracle/).
"""
import signal

if __name__ == "__main__":
    # Importing torch and reading weights take seconds, and the C code there turns a pending
    # KeyboardInterrupt into errors of its own; until then Ctrl-C just ends us, unless it was
    # ignored from the start (nohup, a script's background job).
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse  # noqa: E402
import codecs  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import stat  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterable, Iterator, Sequence  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TextIO  # noqa: E402

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # nothing here needs it
import torch  # noqa: E402

from safetensors import SafetensorError  # noqa: E402

from dp_layer_skip import Choice, choose_skip, table  # noqa: E402
from llama import (  # noqa: E402
    NAMED, Cache, Config, Llama, ModelError, Progress, Replay, Tokenizer, stop_ids)
from oracle.trace import dump_forward, fingerprint, record  # noqa: E402
from speculative import Chance, Round, Settings, generate, in_parts  # noqa: E402

VERSION = "0.1.0"
DEMO = Path(__file__).resolve().parent / "demo"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# The defaults, in one place. For the demo, which is too small to gain from a GPU, the best of a
# sweep (README, "How fast is it?"). For other models the paper's threshold and the lower end of its
# "50 to 60 %" of the layers; it does not state K and the interval for the 8B: these are ours.
TUNED = {"demo": dict(device="cpu", skip=0.69, K=12, exit_threshold=0.3, interval=64),
         "other": dict(device="cuda" if torch.cuda.is_available() else "cpu",
                       skip=0.5, K=6, exit_threshold=0.7, interval=16)}


class UsageError(Exception):
    """What the user asked for that cannot be done, in one line."""


# -------------------------------------------------------------------------------------- figures

def figures(rounds: Sequence[Round]) -> dict:
    """A run's statistics; times in seconds. Round 0 is the prefill: its pass over the prompt counts
    as prefill, and the token it emits as emitted but not as decoded. All that follows, the first
    layer optimisation included, is decoding."""
    drafted, accepted = sum(len(r.drafted) for r in rounds), sum(r.accepted for r in rounds)
    emitted, verifies = sum(len(r.emitted) for r in rounds), max(0, len(rounds) - 1)
    decoded = emitted - len(rounds[0].emitted) if rounds else 0
    prefill = rounds[0].seconds[1] if rounds else 0.0
    draft, verify, optimise = (sum(r.seconds[i] for r in rounds) for i in range(3))
    decoding = draft + verify + optimise - prefill
    updates = [r.seconds[2] for r in rounds if r.choice]
    return dict(
        drafted=drafted, accepted=accepted, emitted=emitted, verifies=verifies,
        tokens_per_verify=decoded / verifies if verifies else None,
        acceptance=accepted / drafted if drafted else None,
        seconds=prefill + decoding, prefill_seconds=prefill, decode_seconds=decoding,
        tokens_per_second=decoded / decoding if decoded else None,
        shares=dict(draft=draft / decoding, verify=(verify - prefill) / decoding,
                    optimise=optimise / decoding) if decoded else None,
        draft_step_seconds=_median(r.seconds[0] / len(r.drafted) for r in rounds if r.drafted),
        verify_seconds=_median(r.seconds[1] for r in rounds[1:]),
        optimise_seconds=_median(updates), optimisations=len(updates),
        skip_set=[i for i, s in enumerate(rounds[-1].skip) if s] if rounds else [])


def _median(values: Iterable[float | None]) -> float | None:
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


def ideal_speedup(clasp: dict, plain: dict) -> float | None:
    """Decoded tokens over the passes they took, in plain steps: decoded / (drafted * c + verifies),
    with c the measured cost of a draft step (after Leviathan et al. 2023, §3.3, with counts for
    expectations). A verify counts as one plain step, a layer optimisation as nothing: what a run
    falls short of this is overhead."""
    if not clasp["verifies"] or not plain["verify_seconds"]:
        return None
    c = (clasp["draft_step_seconds"] or 0.0) / plain["verify_seconds"]
    return (clasp["emitted"] - 1) / (clasp["drafted"] * c + clasp["verifies"])


# --------------------------------------------------------------------------------------- output

class Terminal:
    """Colour only where someone looks: on a terminal, and never with NO_COLOR."""
    CODES = dict(kept="32", refused="9;31", own="1;34", dim="2")

    def __init__(self, stream: TextIO) -> None:
        self.colour = (stream.isatty() and not os.environ.get("NO_COLOR")
                       and os.environ.get("TERM") != "dumb")
        try:
            "█░".encode(stream.encoding or "ascii")
            self.cells = "█░"
        except (UnicodeEncodeError, LookupError):
            self.cells = "#."

    def paint(self, kind: str, text: str) -> str:
        if self.colour:
            return f"\033[{self.CODES[kind]}m{text}\033[0m"
        return {"refused": f"~{text}~", "own": f"[{text}]"}.get(kind, text)

    def bar(self, skip: Sequence[bool]) -> str:
        """One cell per layer: full where it runs, light where it is skipped."""
        return "".join(self.cells[s] for s in skip)


class Text:
    """ids -> text as it comes; a character split over tokens waits for its last byte. Without a
    tokenizer, the ids."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[int]) -> None:
        self.tokenizer, self.stops, self.any = tokenizer, stops, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: Sequence[int], final: bool = False) -> str:
        ids = [i for i in ids if i not in self.stops]
        if self.tokenizer:
            return self.utf8.decode(self.tokenizer.decode_bytes(ids), final)
        out = "".join(f"{',' if self.any or n else ''}{i}" for n, i in enumerate(ids))
        self.any = self.any or bool(ids)
        return out


def round_line(n: int, r: Round, tokenizer: Tokenizer | None, t: Terminal) -> str:
    """--verbose: round, skip map, kept/drafted, and the tokens: kept, refused, the full model's."""
    def spell(i: int) -> str:
        text = tokenizer.decode([i]) if tokenizer else f"{i} "
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    parts = [t.paint(kind, spell(i)) for kind, ids in r.parts().items() for i in ids]
    return f"{n:4} {t.bar(r.skip)} {r.accepted:2}/{len(r.drafted):<2} {''.join(parts)}"


def summary(f: dict, s: Settings) -> str:
    """One compact account of a run."""
    if not f["verifies"]:
        return f"{f['emitted']} token(s), the prefill's, in {f['prefill_seconds']:.2f} s"
    head = (f"{f['emitted']} tokens in {f['seconds']:.2f} s: prefill {f['prefill_seconds']:.2f} s, "
            f"then {f['tokens_per_second']:.1f} tokens/s")
    if s.K == 0:
        return f"{head} | plain decoding"
    if not f["drafted"]:
        return f"{head} | nothing drafted"
    share = ", ".join(f"{name} {part:.0%}" for name, part in f["shares"].items())
    return (f"{head} | {f['tokens_per_verify']:.2f} tokens per verify | acceptance "
            f"{f['acceptance']:.2f} ({f['accepted']} of {f['drafted']} drafted) | {share} | skips "
            f"{s.M} layers, at last {','.join(map(str, f['skip_set'])) or 'none'}")


# --------------------------------------------------------------------- what the command can do

class Job:
    """A model and what is to be done with it: what `main` hands to its modes. All that can be
    wrong with the command is found before `load` reads the weights."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, folder = a, Path(a.model)
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder")
        tuned = TUNED["demo" if folder.resolve() == DEMO else "other"]
        self.device, self.cfg = _device(a.device or tuned["device"]), Config.load(folder)
        try:
            self.tokenizer = Tokenizer(folder)
        except ModelError:
            if not (a.prompt_ids or a.bench_passes):   # ids need none; one makes them readable
                raise
            self.tokenizer = None
        self.graphs = self.device.type == "cuda" and not a.eager
        self.stops, cfg = stop_ids(folder), self.cfg
        if self.tokenizer and max(self.tokenizer.special.values()) >= cfg.V:
            raise ModelError(f"{folder}: the tokenizer has more tokens than the model's {cfg.V}")
        weights = cfg.L * cfg.D * (cfg.hd * 2 * (cfg.H + cfg.G) + 3 * cfg.ffn)
        if a.threads or weights < 100e6:               # small matrices gain nothing from a second
            torch.set_num_threads(a.threads or 1)
        if a.skip_layers is None:
            a.skip_layers = round(tuned["skip"] * cfg.L)
        for name, default in (("draft_length", tuned["K"]), ("interval", tuned["interval"]),
                              ("draft_exit_threshold", tuned["exit_threshold"])):
            if getattr(a, name) is None:
                setattr(a, name, default)
        plain = a.strategy == "ar"
        self.settings = Settings(
            temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, N=a.max_new_tokens,
            stop_ids=self.stops, K=0 if plain else a.draft_length, M=0 if plain else a.skip_layers,
            exit_threshold=a.draft_exit_threshold, interval=a.interval)
        complaint = self.settings.check(cfg.L)
        if complaint:
            raise UsageError(complaint)
        self.skip = self.parse_skip(a.skip) if a.skip is not None else []
        if a.chat and self.tokenizer.special[NAMED[9]] not in self.stops:
            print("clasp_mini.py: note: <|eot_id|> does not stop this model, so it was hardly "
                  "trained on --chat", file=sys.stderr)

    def load(self) -> None:
        if self.device.type == "cuda" and self.device.index is not None:   # some calls name none
            torch.cuda.set_device(self.device)
        self.plain = Llama.load(self.a.model, self.device, DTYPES.get(self.a.dtype), _progress())
        self.model, self.choose = self.plain, choose_skip
        if self.graphs and self.a.dump_forward is None:
            if sys.stderr.isatty():
                print("clasp_mini.py: compiling and recording passes, which takes long the first "
                      "time (--no-compile, --eager)", file=sys.stderr)
            self.fuse = (lambda f: f) if self.a.no_compile else fusing(self.device)
            self.model = self.replay(self.settings.K, self.settings.M)
            self.choose = lambda h, run_layer, M: Choice.read(*self.model.choose(h))

    def replay(self, K: int, M: int) -> Replay:
        """The model by CUDA graphs, for rounds of up to K drafts that leave M layers out."""
        return Replay(self.plain, K, M, table, self.fuse)

    def prompt(self) -> list[int]:
        """The user's prompt as ids, checked against the model."""
        if self.a.prompt_ids is not None:
            try:
                return self.fits([int(i) for i in self.a.prompt_ids.replace(",", " ").split()])
            except ValueError:
                raise UsageError(f"--prompt-ids {self.a.prompt_ids!r}: whole numbers wanted, "
                                 "separated by commas") from None
        text = self.a.prompt
        if text == "-":
            try:
                text = (sys.stdin.buffer.read() or b"").decode()
            except UnicodeDecodeError as e:
                raise UsageError(f"standard input is not UTF-8 (byte {e.start})") from None
            except OSError as e:
                raise UsageError(f"standard input cannot be read: {e.strerror}") from None
        if not text:
            raise UsageError("the prompt is empty; give at least one character")
        return self.fits(self.encode([dict(role="user", content=text)]))

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Turns -> ids: the chat format with --chat, else their bare text after
        <|begin_of_text|>."""
        system = [dict(role="system", content=self.a.system)] if self.a.system else []
        text = "".join(m["content"] for m in system + messages)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("the prompt is not valid UTF-8") from None
        if any(len(run) >= 100_000 for run in re.findall(r"\s+", text)):
            raise UsageError("the prompt has 100,000 blanks in a row, too many for the tokenizer")
        if self.a.chat:
            return self.tokenizer.chat(system + messages)
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def parse_skip(self, text: str) -> list[int]:
        """--skip as layer numbers."""
        try:
            out = [int(i) for i in text.replace(",", " ").split()]
        except ValueError:
            out = []
        if not out:
            raise UsageError(f"--skip {text!r}: layer numbers wanted, separated by commas")
        bad = [i for n, i in enumerate(out) if not 0 <= i < self.cfg.L or i in out[:n]]
        if bad:
            raise UsageError(f"--skip: layer {bad[0]} is named twice or is not one of the model's, "
                             f"0 to {self.cfg.L - 1}")
        return out

    def writable(self, path: str) -> TextIO:
        """The file of --trace or --dump-forward, opened before seconds go into loading."""
        # A file of the model itself must survive a slip of the hand.
        if os.path.exists(path) and any(file.exists() and os.path.samefile(path, file)
                                        for file in Path(self.a.model).rglob("*")):
            raise UsageError(f"{path}: exists in the model's folder; name another file")
        if self.a.dump_forward and os.path.exists(path) and not os.path.isfile(path):
            raise UsageError(f"{path}: not a regular file, which a dump has to be")
        try:
            file = open(path, "a", encoding="utf-8", newline="\n")      # emptied later
        except OSError as e:
            raise UsageError(f"{path}: cannot be written: {e.strerror}") from None
        ours = os.fstat(file.fileno())
        if not stat.S_ISCHR(ours.st_mode) and any(os.path.samestat(ours, os.fstat(n))
                                                  for n in (1, 2)):     # a terminal may mix them
            raise UsageError(f"{path}: text or summary are written there; name another file")
        return file

    def fits(self, ids: list[int]) -> list[int]:
        cfg, N = self.cfg, 0 if self.a.dump_forward is not None else self.settings.N
        if not ids:
            raise UsageError("the prompt is empty; give at least one token")
        bad = [i for i in ids if not 0 <= i < cfg.V]
        if bad:
            raise UsageError(f"token {bad[0]} is not in the model's vocabulary of {cfg.V}")
        if len(ids) + N > cfg.context:
            raise UsageError(f"{len(ids)} prompt tokens and {N} new ones exceed the model's "
                             f"context of {cfg.context}; {max(0, cfg.context - len(ids))} fit")
        return ids

    def run(self, ids: list[int], s: Settings, seed: int) -> Iterator[Round]:
        return generate(self.model, ids, s, Chance(seed), self.choose)

    def pair(self, ids: list[int], seed: int) -> tuple[list[Round], list[Round]]:
        """The same prompt plainly and with CLaSp, one after the other."""
        return (list(self.run(ids, replace(self.settings, K=0, M=0), seed)),
                list(self.run(ids, self.settings, seed)))

    def text(self, ids: Sequence[int]) -> str | None:
        return self.tokenizer and self.tokenizer.decode([i for i in ids if i not in self.stops])

    def report(self) -> dict:
        """The settings as --json prints them."""
        a, model = self.a, self.model
        return dict(model=str(a.model), device=str(model.device), strategy=a.strategy, seed=a.seed,
                    graphs=self.graphs,
                    dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
                    **asdict(self.settings))


def fusing(device: torch.device) -> Callable[[Callable], Callable]:
    """torch.compile for Replay, tried out; where it cannot work, the identity, and a line that says
    so."""
    def fuse(f: Callable) -> Callable:
        # Tuned, a product with one row becomes a kernel of its own that the parts around it join.
        return torch.compile(f, fullgraph=True, dynamic=False,
                             options=dict(coordinate_descent_tuning=True))
    try:
        torch._dynamo.config.recompile_limit = 64      # per row count and size of the cache
        fuse(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as e:  # whatever a compiler may say: without it all works, only slower
        print(f"clasp_mini.py: note: no fused kernels, torch.compile fails here: "
              f"{type(e).__name__} {str(e).strip().partition(chr(10))[0]}", file=sys.stderr)
        return lambda f: f
    return fuse


def about(folder: str | Path) -> dict:
    """What a trace or a dump says of the model in `folder` and of the programs that ran it."""
    return dict(model=fingerprint(folder), versions={
        "clasp-mini": VERSION, "torch": torch.__version__, "python": platform.python_version()})


def ids_of(rounds: Sequence[Round]) -> list[int]:
    return [i for r in rounds for i in r.emitted]


def generate_text(job: Job, ids: list[int], trace: TextIO | None = None) -> int:
    """The main job: text to stdout as it is made, a summary to stderr, a trace to its file. Returns
    the exit status."""
    a, s, tok = job.a, job.settings, job.tokenizer
    text, err, rounds, shown = Text(tok, s.stop_ids), Terminal(sys.stderr), [], []
    if sys.stdout.isatty() and sys.stderr.isatty() and not (a.json or a.verbose or a.chat) and tok:
        prompt = tok.decode(ids[1:] if ids[0] == tok.bos else ids)
        print(err.paint("dim", prompt), end="", file=sys.stderr, flush=True)

    status, run = 0, job.run(ids, s, a.seed)
    if trace:
        if os.path.isfile(a.trace):
            trace.truncate(0)
        run = record(job.model, ids, s, a.seed, job.choose, trace, about(a.model))
    try:
        for r in run:
            rounds.append(r)
            shown.append(text.add(r.emitted))
            if a.verbose:
                line = round_line(len(rounds) - 1, r, tok, err)
                print(line, file=sys.stderr, flush=True)
            elif not a.json:
                print(shown[-1], end="", flush=True)
    except KeyboardInterrupt:                          # what has been made so far is kept
        status = 130
    shown.append(text.add([], final=True))
    if a.json:
        print(json.dumps(dict(prompt_ids=ids, ids=ids_of(rounds), settings=job.report(),
                              text="".join(shown) if tok else None, stats=figures(rounds))))
    else:
        print("".join(shown) if a.verbose else shown[-1], end="\n" if sys.stdout.isatty() else "",
              flush=True)
        if not sys.stdout.isatty() and not a.verbose and sys.stderr.isatty():
            print(file=sys.stderr)                     # `| cat`: the text need not end its line
        print(err.paint("dim", summary(figures(rounds), s)), file=sys.stderr)
    return status


def dump(job: Job, ids: list[int]) -> int:
    """One pass over the prompt into a file, an account of it to stderr. Returns the exit status."""
    path = job.a.dump_forward
    try:
        out = dump_forward(job.plain, ids, job.skip, path, about(job.a.model))
    except SafetensorError as e:
        raise UsageError(f"{path}: cannot be written: {e}") from None
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in out.items())
    print(f"{path}: {shapes}, {sum(x.nbytes for x in out.values()) / 1e6:.1f} MB", file=sys.stderr)
    return 0


def compare(job: Job, ids: list[int]) -> int:
    """Plain and CLaSp in turn on one prompt; medians over the pairs. Returns the exit status."""
    job.pair(ids, job.a.seed)                          # warm-up, not counted
    pairs = [job.pair(ids, job.a.seed + n) for n in range(job.a.repeats)]
    plain, clasp = ([figures(p[side]) for p in pairs] for side in range(2))
    texts = [(ids_of(a), ids_of(b)) for a, b in pairs]
    if any(f["tokens_per_second"] is None for f in plain + clasp):
        raise UsageError("nothing to compare, the prefill gave all tokens: allow more of them, or "
                         "take a prompt that does not end at once")
    rate = [_median(f["tokens_per_second"] for f in side) for side in (plain, clasp)]
    speedup, ideal = rate[1] / rate[0], _median(map(ideal_speedup, clasp, plain))
    step = _median(f["verify_seconds"] for f in plain)
    costs = {name: (_median(f[f"{name}_seconds"] for f in clasp) or 0) / step
             for name in ("draft_step", "verify", "optimise")}
    # Two samples of one distribution need not be equal; two greedy texts must be, but for ties
    # within rounding.
    equal = all(x == y for x, y in texts) if job.settings.temperature == 0 else None
    if job.a.json:
        print(json.dumps(dict(
            prompt_ids=ids, ids=texts[0][1], text=job.text(texts[0][1]), settings=job.report(),
            stats=clasp[0], plain_stats=plain[0], speedup=speedup, ideal_speedup=ideal,
            equal=equal, costs=costs)))
        return 0
    total = {k: sum(f[k] for f in clasp) for k in ("drafted", "accepted", "emitted", "verifies")}
    per_verify = (total["emitted"] - len(pairs)) / total["verifies"]
    acceptance = total["accepted"] / total["drafted"] if total["drafted"] else 0
    print(f"plain decoding  {rate[0]:8.1f} tokens/s   {len(texts[0][0])} tokens, median of "
          f"{len(pairs)} runs, interleaved")
    print(f"CLaSp           {rate[1]:8.1f} tokens/s   {per_verify:.2f} tokens per verify, "
          f"acceptance {acceptance:.2f}")
    print(f"speed-up        {speedup:8.2f}            {speedup / ideal:.0%} of {ideal:.2f}, the "
          "ideal for these drafts and this acceptance")
    print(f"in plain steps  a draft step {costs['draft_step']:.2f}, a verify "
          f"{costs['verify']:.2f}, a layer optimisation {costs['optimise']:.2f}")
    if equal is None:
        print("texts           two samples of one distribution, not to be compared token by token")
    elif equal:
        print("texts           equal")
    else:
        x, y = next(t for t in texts if t[0] != t[1])
        where = next((n for n, (i, j) in enumerate(zip(x, y)) if i != j), min(len(x), len(y)))
        print(f"texts           DIFFERENT from token {where} on: a tie within the rounding of "
              f"{job.report()['dtype']}?")
    return 0


Questions = list[tuple[str, list[str]]]                             # (category, turns) of each


def read_questions(path: str) -> Questions:
    """A file in Spec-Bench's format: a JSON object with `category` and `turns` per line."""
    try:
        # split, as splitlines would also break a line at U+2028 and U+0085, which JSON leaves as is
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        questions = [json.loads(line) for line in lines if line.strip()]
        questions = [(str(q["category"]), q["turns"]) for q in questions]
        for category, turns in questions:
            if category == "overall":
                raise ValueError("'overall' is the table's last line, not a category")
            if not isinstance(turns, list) or not all(isinstance(t, str) for t in turns):
                raise TypeError("turns is not a list of texts")
    except OSError as e:
        raise UsageError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UsageError(f"{path}: not a Spec-Bench file, a JSON object with category and turns "
                         f"per line ({e!r})") from None
    if not any(turns for _, turns in questions):
        raise UsageError(f"{path}: no questions")
    return questions


def bench(job: Job, questions: Questions) -> int:
    """Every question plainly and with CLaSp; a line per category, as in the paper's Table 1. Later
    turns see the earlier ones and plain decoding's answers to them. What does not fit into the
    context is left out and named; Ctrl-C ends with the table so far."""
    results: dict[str, list[tuple[dict, dict]]] = {}
    status = 0
    try:
        for n, (category, turns) in enumerate(questions):
            messages: list[dict[str, str]] = []
            for turn in turns:
                messages.append(dict(role="user", content=turn))
                try:
                    ids = job.fits(job.encode(messages))
                except UsageError as e:
                    print(f"clasp_mini.py: question {n + 1} left out: {e}", file=sys.stderr)
                    break
                if not results:
                    job.pair(ids, job.a.seed)          # warm-up, not counted
                plain, clasp = job.pair(ids, job.a.seed)
                messages.append(dict(role="assistant", content=job.text(ids_of(plain))))
                results.setdefault(category, []).append((figures(plain), figures(clasp)))
            if sys.stderr.isatty():
                print(f"\r{n + 1} of {len(questions)}", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        status = 130
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if not results:
        if status:
            raise KeyboardInterrupt
        raise UsageError("no question could be asked")
    lines = {name: _bench_line(pairs) for name, pairs in results.items()}
    lines["overall"] = _bench_line([p for pairs in results.values() for p in pairs])
    if job.a.json:
        print(json.dumps(dict(settings=job.report(), categories=lines)))
        return status
    print(f"{'category':<16} answers tokens/verify acceptance speed-up  ideal")
    for name, line in lines.items():
        print(f"{name:<16} {line['answers']:7}" + "".join(
            f" {'-' if line[key] is None else format(line[key], '.2f'):>{width}}" for key, width in
            dict(tokens_per_verify=13, acceptance=10, speedup=8, ideal_speedup=6).items()))
    return status


def _bench_line(pairs: list[tuple[dict, dict]]) -> dict:
    """Tokens per verify and acceptance over all tokens; speed-up and its ideal as ratios of the
    rates over all answers."""
    def total(side: int, key: str) -> float:
        return sum(p[side][key] for p in pairs)

    def over(x: float | None, y: float | None) -> float | None:
        return x / y if x is not None and y else None

    decoded = [total(side, "emitted") - len(pairs) for side in range(2)]
    rate = [over(decoded[side], total(side, "decode_seconds")) for side in range(2)]
    ideal = [(p[1]["emitted"] - 1, i) for p in pairs if (i := ideal_speedup(p[1], p[0]))]
    return dict(answers=len(pairs), tokens_per_verify=over(decoded[1], total(1, "verifies")),
                acceptance=over(total(1, "accepted"), total(1, "drafted")),
                speedup=over(rate[1], rate[0]),
                ideal_speedup=over(sum(w for w, _ in ideal), sum(w / i for w, i in ideal)))


@torch.inference_mode()
def bench_passes(job: Job) -> int:
    """What each kind of pass costs after some 1000 random tokens, against the bytes it must read:
    the weights of its layers, the head, the cached keys and values. Passes are queued one behind
    another and waited for once."""
    cfg, s, plain, model = job.cfg, job.settings, job.plain, job.model
    t = max(1, min(1000, cfg.context - s.N))
    prompt = torch.randint(cfg.V, (t,), generator=torch.Generator().manual_seed(job.a.seed))
    ids = prompt.to(job.device)
    layer = sum(w.nbytes for w in plain.layers[0]) + 2 * t * cfg.G * cfg.hd * plain.embed.itemsize
    passes: dict[str, tuple[int, Callable[[], object]]] = {}                # (bytes, what to time)

    def filled(model: Llama | Replay) -> Cache | Replay:
        cache = model.cache(t + max(16, s.K + 1, s.N) + s.M)          # room for the run below, too
        for _ in in_parts(model, ids, 0, cache):
            pass
        return cache

    def add(name: str, layers: int, model: Llama | Replay, cache: Cache | Replay, T: int,
            **how: object) -> None:
        passes[name] = layers * layer + plain.lm_head.nbytes, lambda: model.head(
            model.forward(ids[:T], cache.sequence(t, T), cache, **how)[0])

    cache = filled(model)
    add("plain step", cfg.L, model, cache, 1)
    for m in sorted({cfg.L // 4, cfg.L // 2, 3 * cfg.L // 4, s.M} - {0}):
        skip = [(i + 1) * m // cfg.L > i * m // cfg.L for i in range(cfg.L)]         # evenly spread
        add(f"draft step, {m} of {cfg.L} skipped", cfg.L - m, model, cache, 1, skip=skip)
    for T in sorted({1, 4, 8, 16, s.K + 1}):
        other = job.replay(T - 1, 0) if job.graphs else model
        add(f"verify, {T} rows", cfg.L, other, filled(other) if job.graphs else cache, T,
            states=slice(None))
    if s.M:
        h = model.forward(ids[:1], cache.sequence(t, 1), cache, states=slice(None))[1][:, 0].clone()

        def optimise() -> object:
            rows = cache.versions(t, s.M)
            return job.choose(h, lambda i, x: model.layer(i, x, rows, cache), s.M)
        passes[f"layer optimisation, M = {s.M}"] = (cfg.L - 1) * layer, optimise
    a = torch.ones(2 ** (30 if job.device.type == "cuda" else 28), device=job.device,
                   dtype=torch.int8)
    b = torch.empty_like(a)
    passes["copy of memory"] = 2 * a.nbytes, lambda: b.copy_(a)

    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(1 + job.a.repeats):                                     # the first is a warm-up
        for name, (_, f) in passes.items():
            times[name].append(_seconds(f, job.device))
    took = {name: statistics.median(v[1:]) for name, v in times.items()}
    rate = {name: n / took[name] for name, (n, _) in passes.items()}
    lines = {name: dict(seconds=took[name], bytes=n, bytes_per_second=rate[name],
                        of_copy=rate[name] / rate["copy of memory"],
                        plain_steps=took[name] / took["plain step"])
             for name, (n, _) in passes.items()}
    beyond = None
    if job.graphs and s.K and s.M:                     # without graphs a verify is of any length
        run = [figures(list(job.run(prompt.tolist(), s, job.a.seed))) for _ in range(2)][1]
        beyond = 1 - (run["drafted"] * took[f"draft step, {s.M} of {cfg.L} skipped"]
                      + run["verifies"] * took[f"verify, {s.K + 1} rows"] + run["optimisations"]
                      * took[f"layer optimisation, M = {s.M}"]) / run["decode_seconds"]
    if job.a.json:
        print(json.dumps(dict(settings=job.report(), context=t, passes=lines,
                              outside_passes=beyond)))
        return 0
    print(f"{'after ' + str(t) + ' tokens':<32} {'ms':>9} {'GB to read':>11} {'GB/s':>8} "
          f"{'of copy':>8} {'plain steps':>12}")
    for name, v in lines.items():
        print(f"{name:<32} {1e3 * v['seconds']:9.3f} {v['bytes'] / 1e9:11.4f} "
              f"{v['bytes_per_second'] / 1e9:8.1f} {v['of_copy']:8.0%} {v['plain_steps']:12.2f}")
    if beyond is not None:
        print(f"outside the passes (sampling, copies, waiting): {beyond:.1%} of a run of "
              f"{run['emitted']} tokens")
    return 0


def _seconds(f: Callable[[], object], device: torch.device) -> float:
    """Of one call, from as many as fill a fiftieth of a second, 1 to 100."""
    def clock(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / n
    return clock(max(1, min(100, int(0.02 / clock(1)))))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: cpu, cuda or cuda:N wanted")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs "
                         "here; use --device cpu")
    return device


def _progress() -> Progress | None:
    """A line that grows with the load, on a terminal, once a second has passed."""
    if not sys.stderr.isatty():
        return None
    began, shown = time.perf_counter(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        t = time.perf_counter() - began
        if total > 1e9 and t > 1 and (t - shown > 0.2 or done == total):
            shown = t
            print(f"\rloading {done / 1e9:.1f} of {total / 1e9:.1f} GB, {done / 1e9 / t:.1f} GB/s ",
                  end="\n" if done == total else "", file=sys.stderr, flush=True)
    return show


# ---------------------------------------------------------------------------- the command line

def parser() -> argparse.ArgumentParser:
    demo, other = TUNED["demo"], TUNED["other"]
    p = argparse.ArgumentParser(
        prog="clasp_mini.py", allow_abbrev=False,
        description="Self-speculative decoding with layers chosen in context (CLaSp). The output "
        "has exactly the full model's distribution, whatever the settings of the draft.")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT",
                      help="text to continue, or with --chat a question; - reads standard input")
    what.add_argument("--prompt-ids", metavar="1,2,3",
                      help="token ids to continue, nothing added; needs no tokenizer")
    what.add_argument("--bench", metavar="FILE",
                      help="plain and CLaSp on every question of a Spec-Bench file")
    what.add_argument("--bench-passes", action="store_true",
                      help="what each kind of pass costs, against the bytes it must read")
    p.add_argument("--chat", action="store_true", help="the chat format of the Instruct models")
    p.add_argument("--system", metavar="TEXT", help="system turn, with --chat")
    p.add_argument("--model", metavar="DIR", default=str(DEMO),
                   help="Hugging Face folder of a LLaMA-3 (default: the demo)")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: for the demo "
                   "cpu, else cuda where there is one)")
    p.add_argument("--dtype", choices=list(DTYPES),
                   help="default: float32 on a CPU, bfloat16 on a GPU")
    p.add_argument("--threads", type=int, metavar="N",
                   help="CPU threads (default: 1 for a model as small as the demo)")
    p.add_argument("--eager", action="store_true",
                   help="on a GPU: launch every kernel by itself, without CUDA graphs")
    p.add_argument("--no-compile", action="store_true",
                   help="on a GPU: CUDA graphs of plain kernels, without torch.compile")
    g = p.add_argument_group("what is written (the distribution)")
    g.add_argument("--max-new-tokens", type=int, default=128, metavar="N",
                   help="default: %(default)s")
    g.add_argument("--temperature", type=float, default=0.0, metavar="T",
                   help="default: 0, greedy")
    g.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, off")
    g.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, off")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    g = p.add_argument_group("how it is drafted (speed alone)")
    g.add_argument("--strategy", choices=["clasp", "ar"], default="clasp",
                   help="ar is plain decoding, one token per pass")
    g.add_argument("--skip-layers", type=int, metavar="M", help="layers the draft leaves out "
                   f"(default: demo {demo['skip']:.0%}%, else {other['skip']:.0%}% of them)")
    g.add_argument("--draft-length", type=int, metavar="K", help="most tokens drafted per round "
                   f"(default: demo {demo['K']}, else {other['K']})")
    g.add_argument("--draft-exit-threshold", type=float, metavar="P",
                   help="draft no further after a token of lower confidence "
                   f"(default: demo {demo['exit_threshold']}, else {other['exit_threshold']})")
    g.add_argument("--interval", type=int, metavar="N",
                   help="verifications between two layer optimisations "
                   f"(default: demo {demo['interval']}, else {other['interval']})")
    g = p.add_argument_group("as an oracle (README, \"Use it as an oracle\")")
    g.add_argument("--trace", metavar="FILE",
                   help="write each draw, verdict and table of the run, with its probabilities")
    g.add_argument("--dump-forward", metavar="FILE", help="no text, but the logits, states, keys "
                   "and values of one pass over the prompt, as safetensors")
    g.add_argument("--skip", metavar="3,7,...", help="layers that --dump-forward leaves out")
    g = p.add_argument_group("what is shown")
    g.add_argument("--compare", action="store_true",
                   help="plain and CLaSp interleaved: speed-up, ideal, whether the texts are equal")
    g.add_argument("--repeats", type=int, default=5, metavar="N",
                   help="pairs of runs that --compare, and passes that --bench-passes, takes "
                   "medians of (default: %(default)s)")
    g.add_argument("--verbose", action="store_true",
                   help="a line per round: skip map; tokens kept, refused, the full model's own")
    g.add_argument("--json", action="store_true", help="one JSON object on standard output")
    g.add_argument("--version", action="version", version=f"clasp-mini {VERSION}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 1 (model, memory), 2 (usage), 130 (Ctrl-C), 141
    (the reader of our output has gone)."""
    p = parser()
    a = p.parse_args(argv)
    if a.prompt is None and a.prompt_ids is None and a.bench is None and not a.bench_passes:
        p.error("one of --prompt, --prompt-ids, --bench and --bench-passes is needed")
    if a.system is not None and not a.chat:
        p.error("--system goes with --chat")
    if a.chat and (a.prompt_ids is not None or a.bench_passes):
        p.error("--chat goes with --prompt or --bench, not with --prompt-ids or --bench-passes")
    if a.repeats < 1 or (a.threads is not None and not 1 <= a.threads <= 1024):
        p.error("--repeats takes 1 or more, --threads 1 to 1024")
    if not 0 <= a.seed < 2 ** 62:
        p.error("--seed takes 0 to 2**62 - 1")
    if (a.compare or a.bench is not None) and (a.strategy == "ar" or a.verbose):
        p.error("--compare and --bench run plain decoding too, without --strategy ar or --verbose")
    if a.compare and (a.bench is not None or a.bench_passes):
        p.error("--compare goes with a prompt; --bench compares by itself")
    oracle = a.trace if a.dump_forward is None else a.dump_forward
    if oracle is not None and (a.compare or a.bench is not None or a.bench_passes):
        p.error("--trace and --dump-forward go with a prompt, without --compare, --bench or "
                "--bench-passes")
    if a.dump_forward is not None and (a.trace is not None or a.json or a.verbose):
        p.error("--dump-forward writes no text: without --trace, --json or --verbose")
    if a.skip is not None and a.dump_forward is None:
        p.error("--skip goes with --dump-forward; drafts choose their layers (--skip-layers)")
    try:
        job = Job(a)
        if a.bench_passes:
            work = job.fits([0])
        else:
            work = job.prompt() if a.bench is None else read_questions(a.bench)
        file = None if oracle is None else job.writable(oracle)
        job.load()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # from here the text is kept
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if a.bench_passes:
            status = bench_passes(job)
        elif a.bench is not None:
            status = bench(job, work)
        elif a.dump_forward is not None:
            status = dump(job, work)
        else:
            status = compare(job, work) if a.compare else generate_text(job, work, file)
        sys.stdout.flush()                             # here, where a fault of it is answered for
        return status
    except (UsageError, ModelError, FloatingPointError) as e:
        line = str(e).replace("\n", "\\n")            # in the name of a file, say
        print(f"clasp_mini.py: {line}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    except (MemoryError, RuntimeError) as e:           # OutOfMemoryError is a RuntimeError
        # On a CPU PyTorch has no type for it, only a text.
        if not (isinstance(e, (MemoryError, torch.OutOfMemoryError))
                or "DefaultCPUAllocator" in str(e)):
            raise
        print(f"clasp_mini.py: out of memory, try a narrower --dtype or fewer tokens: "
              f"{str(e).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clasp_mini.py: interrupted", file=sys.stderr)
        return 130
    except OSError as e:                # the reader has gone, as `head` does, or the disk is full
        if e.filename:
            print(f"clasp_mini.py: {e.filename}: {e.strerror}", file=sys.stderr)
            return 1
        if not isinstance(e, BrokenPipeError):
            print(f"clasp_mini.py: the output cannot be written: {e.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if isinstance(e, BrokenPipeError) else 1


def mend_streams() -> None:
    """For a process that was started with closed streams, or an encoding that lacks characters."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:                 # closed by the caller, as `>&-` does
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


if __name__ == "__main__":
    mend_streams()
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # a second Ctrl-C, while Python is leaving
    sys.exit(status)
