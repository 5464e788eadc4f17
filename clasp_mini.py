"""clasp-mini: self-speculative decoding with layers chosen in context (CLaSp, Chen et al., ACL
2025). The command. It holds no algorithm; it joins the others in one direction: config and weights
(llama.py) -> rounds (speculative.py, which is handed the chooser of dp_layer_skip.py) -> text.

    python clasp_mini.py                                      # the model and a prompt that ship
    python clasp_mini.py --prompt "class Stack:" --compare    # against plain decoding
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until the weights are read Ctrl-C just ends us: C code would make errors of its own of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from pathlib import Path  # noqa: E402

from dp_layer_skip import choose_skip, torch  # noqa: E402
from llama import Config, Llama, ModelError  # noqa: E402
from speculative import Adaptive, Chance, Round, Settings, generate  # noqa: E402
from text import costs  # noqa: E402
from text.cli import UsageError, answer, interruptible, saved  # noqa: E402
from text.flags import DEMO, DTYPES, VERSION, parser  # noqa: E402, F401
from text.report import Terminal, Text, compared, comparison, figures, ids_of, summary  # noqa: E402
from text.tokenizer import EOT, Tokenizer, stop_ids  # noqa: E402

PLAIN = dict(K=0, M=0, exit_threshold=0.0, interval=1)


class Job:
    """A model and what is to be done with it. What can be wrong with a command is found before
    `load` reads the weights."""

    Model = Llama                                      # of several GPUs: gpu/ranks.py

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.folder = a, Path(a.model)
        if not self.folder.is_dir():
            raise ModelError(f"{self.folder}: no such folder")
        self.cfg, self.stops = Config.load(self.folder), stop_ids(self.folder)
        # What the user left open: as a file in the model's folder says.
        own = dict(device="cuda" if torch.cuda.is_available() else "cpu", prompt=None, costs=None,
                   skip_layers=None, draft_length=None, draft_exit_threshold=None, interval=None,
                   probe=None)
        own |= saved(self.folder / "clasp.json", parser(), own)
        for name in own:
            if getattr(a, name) is None:
                setattr(a, name, own[name])
        L, small = self.cfg.L, self.cfg.L * self.cfg.D * self.cfg.ffn < 1e7
        if (a.skip_layers or 0) > L:
            raise UsageError(f"--skip-layers {a.skip_layers}: the model has {L} layers")
        self.device, gpus = torch.device(a.device), torch.cuda.device_count()
        if self.device.type == "cuda" and (self.device.index or 0) >= gpus:
            raise UsageError(f"--device {a.device}: PyTorch sees {gpus} CUDA GPUs here; "
                             "use --device cpu")
        try:
            self.tokenizer = Tokenizer(self.folder)
        except ModelError:
            if a.prompt_ids is None:                   # ids need none; one makes them readable
                raise
            self.tokenizer = None
        if self.tokenizer and max(self.tokenizer.special.values()) >= self.cfg.V:
            raise ModelError(f"{self.folder}: the tokenizer has more tokens than the model's "
                             f"{self.cfg.V}")
        if a.chat and self.tokenizer.special[EOT] not in self.stops:
            print("clasp_mini.py: note: <|eot_id|> does not stop this model, so it was hardly "
                  "trained on --chat", file=sys.stderr)
        if a.threads or small:                         # small matrices: a second thread costs
            torch.set_num_threads(a.threads or 1)
        # A large model's rows are much cheaper in bfloat16, if the processor has its instructions.
        cuda, dtype = self.device.type == "cuda", a.dtype or "float32"
        if not a.dtype and (cuda or not small and torch.cpu._is_avx512_bf16_supported()):
            dtype = "bfloat16"
            print(f"clasp_mini.py: note: computing in bfloat16 on {a.device}"
                  f"{'' if cuda else f', {torch.get_num_threads()} threads'} (--dtype, --threads)",
                  file=sys.stderr)
        self.dtype = DTYPES[dtype]
        self.K = 12 if a.draft_length is None else a.draft_length        # at most, whoever decides
        self.M = Adaptive.budgets(L)[-1] if a.skip_layers is None else a.skip_layers
        draft = PLAIN if a.strategy == "ar" else dict(
            K=a.draft_length, M=a.skip_layers, exit_threshold=a.draft_exit_threshold,
            interval=a.interval)
        self.settings = Settings(a.temperature, a.top_k, a.top_p, a.max_new_tokens, self.stops,
                                 r=a.probe or (4 if cuda else 1), **draft)
        self.adaptive, self.costs = None in draft.values(), None
        if self.adaptive and a.costs:
            self.costs = costs.load(a.costs, L, self.K)

    def load(self) -> "Job":
        """Read the weights; on a GPU also record the passes."""
        self.model, self.choose = self.Model.load(self.folder, self.device, self.dtype), choose_skip
        if self.device.type == "cuda" and not self.a.eager:
            from gpu.replay import recorded
            self.model, self.choose = recorded(self.model, self.K, self.M, self.settings.r,
                                               not self.a.no_compile)
        if self.adaptive and not self.costs:
            self.costs = costs.measure(self.model, self.choose, self.K, self.M, self.settings.r)
        interruptible()                                # from here on the text is kept
        return self

    def prompt(self) -> list[int]:
        """The user's prompt as ids, checked against the model."""
        if self.a.prompt_ids is not None:
            return self.fits(self.a.prompt_ids)
        try:
            text = sys.stdin.buffer.read().decode() if self.a.prompt == "-" else self.a.prompt
            (text or "").encode()
        except UnicodeError:
            raise UsageError("the prompt is not valid UTF-8") from None
        if not text:
            raise UsageError("--prompt is missing or empty; give at least one character")
        return self.fits(self.encode([dict(role="user", content=text)]))

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Turns -> ids: the chat format with --chat, else their bare text after the begin token."""
        if self.a.chat:
            system = [dict(role="system", content=self.a.system)] if self.a.system else []
            return self.tokenizer.chat(system + messages)
        text = "".join(m["content"] for m in messages)
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def fits(self, ids: list[int]) -> list[int]:
        """`ids`, if the model can read them and then write what is asked for."""
        V, context, N = self.cfg.V, self.cfg.context, self.settings.N
        if max(ids) >= V:
            raise UsageError(f"token {max(ids)} is not in the model's vocabulary of {V}")
        if len(ids) + N > context:
            fit = f": --max-new-tokens {context - len(ids)} fits" if len(ids) < context else ""
            raise UsageError(f"{len(ids)} prompt tokens and {N} new ones exceed the model's "
                             f"context of {context}{fit}")
        return ids

    def run(self, ids: list[int], s: Settings, seed: int) -> Iterator[Round]:
        """Rounds, by the paper's policy where the settings name all four of its numbers."""
        if self.a.trace:
            from oracle.trace import record
            return record(self, ids, self.a.trace)
        policy = None
        if None in (s.K, s.M, s.exit_threshold, s.interval):
            policy = Adaptive(s, **self.costs)
        return generate(self.model, ids, s, Chance(seed), self.choose, policy)

    def pair(self, ids: list[int], seed: int) -> tuple[list[Round], list[Round]]:
        """The same prompt plainly and with CLaSp, one after the other."""
        return (list(self.run(ids, replace(self.settings, **PLAIN), seed)),
                list(self.run(ids, self.settings, seed)))

    def report(self) -> dict:
        """The settings as --json prints them."""
        return dict(model=str(self.folder), device=str(self.device), strategy=self.a.strategy,
                    seed=self.a.seed, dtype=str(self.model.dtype).removeprefix("torch."),
                    threads=torch.get_num_threads(), **asdict(self.settings), costs=self.costs)


def write(job: Job, ids: list[int]) -> int:
    """Text to stdout as it is made, rounds and the account to stderr; the exit status."""
    a, tok, rounds, shown, status = job.a, job.tokenizer, [], [], 0
    text, err, run = Text(tok, job.stops), Terminal(sys.stderr), job.run(ids, job.settings, a.seed)
    one_screen = sys.stdout.isatty() and sys.stderr.isatty()
    if one_screen and tok and not (a.json or a.verbose or a.chat):
        prompt = tok.decode(ids[ids[0] == tok.bos:])
        print(err.paint("dim", prompt), end="", file=sys.stderr, flush=True)
    try:
        for n, r in enumerate(run):
            rounds.append(r)
            shown.append(text.add(r.emitted))
            if a.verbose:
                print(err.round(n, r, tok), file=sys.stderr, flush=True)
            elif not a.json:
                print(shown[-1], end="", flush=True)
    except KeyboardInterrupt:                          # what has been made so far is kept
        status = 130
    shown.append(text.add([], final=True))
    if a.json:
        print(json.dumps(dict(prompt_ids=ids, ids=ids_of(rounds), settings=job.report(),
                              text="".join(shown) if tok else None, stats=figures(rounds))))
        return status
    if a.verbose and not one_screen:                   # on one screen the rounds hold the text
        shown = ["".join(shown)]
    print(shown[-1], end="\n" if sys.stdout.isatty() else "", flush=True)
    print(err.paint("dim", summary(figures(rounds), job.settings)), file=sys.stderr)
    return status


def compare(job: Job, ids: list[int]) -> int:
    """Plain and CLaSp in turn on one prompt; the exit status."""
    pairs = []
    for n in range(-1, job.a.repeats):                 # the first is a warm-up, not counted
        if sys.stderr.isatty():
            print(f"\rpair {n + 1} of {job.a.repeats}", end="\r" * (n + 1 == job.a.repeats),
                  file=sys.stderr, flush=True)
        pairs.append(job.pair(ids, job.a.seed + max(0, n)))
    c = comparison(pairs[1:], greedy=job.settings.temperature == 0)
    if c["ideal_speedup"] is None:
        raise UsageError("nothing to compare, the prefill gave all tokens: allow more of them, or "
                         "take a prompt that does not end at once")
    if job.a.json:
        out = ids_of(pairs[1][1])
        text = job.tokenizer and job.tokenizer.decode([i for i in out if i not in job.stops])
        print(json.dumps(dict(prompt_ids=ids, ids=out, text=text, settings=job.report(), **c)))
    else:
        print(compared(c, pairs[1:], job.report()["dtype"]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 (a file, memory), 2 (usage), 130 (Ctrl-C)."""
    def work(kind: type[Job] = Job) -> int:
        a = parser().parse_args(argv)
        if a.system is not None and not a.chat:
            raise UsageError("--system goes with --chat")
        if a.prompt_ids is not None and (a.chat or a.prompt is not None):
            raise UsageError("--prompt-ids goes without --prompt and --chat")
        if a.compare and (a.strategy == "ar" or a.verbose or a.trace):
            raise UsageError("--compare runs plain decoding too: without --strategy ar, --verbose "
                             "and --trace")
        own = a.prompt is not None or a.prompt_ids is not None
        job = kind(a)
        ids = job.prompt()
        status = (compare if a.compare else write)(job.load(), ids)
        if not own and sys.stderr.isatty():
            print("Next: --prompt TEXT; --verbose to watch the rounds; --compare to time them; "
                  "--help", file=sys.stderr)
        return status
    if "LOCAL_RANK" in os.environ:                     # torchrun has started several of us
        from gpu.ranks import together
        return answer(lambda: together(work, Job))
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
