"""A model and what is to be done with it: every check that can be made before the weights are read,
then the weights. What the user left open is decided here, and said where it is not obvious.
"""
import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from command.cli import UsageError, note, out_of_memory, reading, waiting
from command.flags import DTYPES, parser
from dp_layer_skip import choose_skip
from llama import Llama, ModelError, read_config, read_json
from policy import costs
from policy.adaptive import budgets
from speculative import Round, Settings
from text.tokenizer import EOT, Tokenizer, has_other_template, stop_ids

MUCH = 0.3                   # GB of weights that are not read in a moment


class Job:
    """What the flags `a` ask for. Raises ModelError, UsageError.

    strategy  who decides
    numbers   the paper's K, M, exit_threshold and interval. None: left open, for our policy
    K, M      the largest that may come of them
    costs     what passes cost, if that policy decides; costs_guessed: nobody has measured them
    """

    def __init__(self, a: argparse.Namespace) -> None:
        # The user waits since the process began, if this is its first and only job.
        start = sys.modules.pop("command.start", None)
        self.began = start.BEGAN if start else time.perf_counter()
        self.flags = a
        self.folder = Path(a.model).expanduser()
        if not self.folder.is_dir():
            what = "no such folder; of a model on the hub, `hf download NAME` prints it"
            if self.folder.exists():
                what = f"a file; give its folder, {self.folder.parent}"
            raise ModelError(f"{self.folder}: {what}")
        with reading(self.folder):
            self.cfg = read_config(self.folder)
            self.stops = stop_ids(self.folder)
            self.tokenizer = self.checked_tokenizer()
        self.take_saved_flags()
        self.device = self.checked_device()
        self.dtype = self.chosen_dtype()
        c = self.cfg
        weights = c.L * costs.layer_weights(c) + (2 - c.tied) * c.V * c.D
        self.weights = weights * self.dtype.itemsize / 1e9     # GB of matrices, not of vectors
        flags = dict(K=a.draft_length, M=a.skip_layers, exit_threshold=a.draft_exit_threshold,
                     interval=a.interval)
        named = {name: value for name, value in flags.items() if value is not None}
        self.strategy = a.strategy
        if a.strategy == "ar":
            if named or a.probe:
                note("--strategy ar drafts nothing, so the flags of how it is drafted do nothing")
            named = dict(K=0, M=0, exit_threshold=0.0, interval=1)
        elif a.strategy == "paper":
            named = paper_numbers(c.L) | named
        elif len(named) == len(flags):
            self.strategy = "paper"                    # nothing is left to decide
        ours = self.strategy == "clasp"
        self.numbers = dict.fromkeys(flags) | named
        self.K = named.get("K", 12)
        self.M = named.get("M", budgets(c.L)[-1])
        if self.M > c.L:
            raise UsageError(f"--skip-layers {self.M}: the model has {c.L} layers")
        self.probe = a.probe or 1
        N = a.max_new_tokens or 128
        self.settings = Settings(a.temperature, a.top_k, a.top_p, N, self.stops,
                                 **({} if ours else named))
        self.length = N                                # of a text and its prompt
        self.load_seconds = 0.0
        self.measure_seconds = 0.0
        self.costs_guessed = False
        self.costs = self.known_costs() if ours else None

    # ------------------------------------------------------------------ what is found beforehand

    def take_saved_flags(self) -> None:
        """What the user left open is as clasp.json in the model's folder says, where it is checked
        by the flags it stands for; its temperature and seed go with its prompt."""
        own_prompt = self.flags.prompt is None and self.flags.prompt_ids is None
        default = dict(device=None, prompt=None, temperature=0.0, seed=0, costs=None)
        path = self.folder / "clasp.json"
        own = read_json(path) if path.exists() else {}
        flags = [f"--{name}={value}" for name, value in own.items() if name != "costs"]
        try:
            for name in own.keys() - default.keys():
                raise UsageError(f"{name} is not one of {', '.join(default)}")
            saved = vars(parser().parse_args(flags))
        except UsageError as e:
            raise ModelError(f"{path}: {e}") from None
        saved["costs"] = own.get("costs")              # checked by who uses them
        for name, value in default.items():
            if saved[name] is not None and (own_prompt or name in ("device", "costs")):
                value = saved[name]
            if getattr(self.flags, name) is None:
                setattr(self.flags, name, value)

    def checked_device(self) -> torch.device:
        if self.flags.device is None:
            from gpu.replay import unusable
            amiss = unusable()
            if amiss:
                note(f"{amiss}; computing on the CPU")
            self.flags.device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(self.flags.device)
        gpus = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= gpus:
            raise UsageError(f"--device {self.flags.device}: PyTorch sees {gpus} CUDA GPUs here; "
                             "use --device cpu")
        return device

    def checked_tokenizer(self) -> Tokenizer | None:
        """None where only ids are given and none can be read."""
        try:
            tokenizer = Tokenizer(self.folder)
        except ModelError:
            if self.flags.prompt_ids is None:          # ids need none; one makes them readable
                raise
            return None
        if not self.stops:
            note("the model's files name no token that ends a text (eos_token_id): it goes on to "
                 "--max-new-tokens")
        for i in self.stops:
            if i not in tokenizer.special.values():
                note(f"an ordinary token ends the text, as the model's files say: {i}, "
                     f"{tokenizer.decode([i])!r}")
        if self.flags.chat and has_other_template(self.folder):
            note("the folder's chat template is not followed: --chat writes LLaMA-3's first "
                 "format, without what later models add (--prompt-ids takes any tokens)")
        if self.flags.chat and tokenizer.special.get(EOT) not in self.stops:
            note("<|eot_id|> does not stop this model, so it was hardly trained on --chat")
        return tokenizer

    def chosen_dtype(self) -> torch.dtype:
        """A large model's rows are much cheaper in bfloat16, if the processor has its instructions;
        for small matrices a second thread costs more than it brings."""
        small = self.cfg.L * self.cfg.D * self.cfg.ffn < 1e7
        if self.flags.threads or small:
            torch.set_num_threads(self.flags.threads or 1)
        cuda = self.device.type == "cuda"
        if self.flags.dtype:
            return DTYPES[self.flags.dtype]
        if not cuda and (small or not torch.cpu._is_avx512_bf16_supported()):
            return torch.float32
        threads = "" if cuda else f", {torch.get_num_threads()} threads"
        note(f"bfloat16 on {self.flags.device}{threads} (--dtype, --threads)")
        return torch.bfloat16

    def known_costs(self) -> dict[str, Any]:
        """What passes cost: as a file says, or an earlier run measured, or else a guess."""
        if self.flags.costs:
            return costs.load(self.flags.costs, self.cfg.L, self.K)
        self.shelf = costs.shelf(self.folder, self.dtype, self.device, torch.get_num_threads())
        with contextlib.suppress(ModelError):          # there is none, or it was cut short
            return costs.load(str(self.shelf), self.cfg.L, self.K)
        self.costs_guessed = True
        return costs.guess(self.cfg, self.K)

    # -------------------------------------------------------------------------------- the model

    def load(self, model: type[Llama] = Llama, choose: Callable = choose_skip) -> "Job":
        """Read the weights; on a GPU also record the passes."""
        with self.enough_memory(), reading(self.folder):
            self.model = model.load(self.folder, self.device, self.dtype, part=self.progress())
            self.choose = choose
            if self.device.type == "cuda" and not self.flags.eager:
                from gpu.replay import recorded
                self.model, self.choose = recorded(self.model, self.K, self.M, self.probe,
                                                   not self.flags.no_compile)
        waiting("")
        self.load_seconds = time.perf_counter() - self.began
        # From here on Ctrl-C is an exception, so that the text is kept. Before, it just ended the
        # process (command/start.py). Ignored, as under nohup, it stays.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    @contextlib.contextmanager
    def enough_memory(self) -> Iterator[None]:
        """For what weights and cache do not fit into, found beforehand or by who allocates."""
        c = self.cfg
        cache = 2 * c.L * c.G * c.hd * self.length * self.dtype.itemsize / 1e9
        short = ModelError(f"out of memory: the weights take {self.weights:.1f} GB in "
                           f"{str(self.dtype).removeprefix('torch.')}, the cache of {self.length} "
                           f"tokens {cache:.1f} GB; take fewer --max-new-tokens or a smaller model")
        if self.device.type == "cpu" and 1e9 * (self.weights + cache) > memory_here():
            raise short
        try:
            yield
        except (MemoryError, RuntimeError) as e:
            if not out_of_memory(e):
                raise
            raise short from None

    def progress(self) -> Callable[[str, Tensor], Tensor]:
        """Says of a large model how much is read: in a log once, on a terminal as it comes."""
        done = 0.0
        if self.weights > MUCH and not sys.stderr.isatty():
            note(f"loading {self.weights:.1f} GB")

        def part(_: str, x: Tensor) -> Tensor:
            nonlocal done
            done += x.numel() * self.dtype.itemsize / 1e9
            if self.weights > MUCH:
                waiting(f"loading: {done:.1f} of {self.weights:.1f} GB")
            return x
        return part

    @property
    def known(self) -> dict:
        """What our policy is told. If costs are guessed it may measure what a verify costs."""
        measure = self.measure if self.costs_guessed else None
        return dict(self.costs, **self.numbers, probe=self.probe, measure=measure)

    def measure(self, model: Any, cache: Any, text: list[int]) -> list[float]:
        """What a verify costs here: measured once, kept for later runs."""
        if self.weights > MUCH:
            note("timing passes, which is kept for later runs")
        began = time.perf_counter()
        self.costs["verify"] = costs.measure(model, cache, text, self.K)
        self.costs_guessed = False
        kept = costs.keep(self.shelf, self.costs)
        self.measure_seconds += time.perf_counter() - began
        if self.flags.temperature:
            note("costs were measured in this run, so its seed may give another text next time; "
                 + (f"from then on one: {self.shelf}" if kept else "they could not be kept"))
        return self.costs["verify"]

    def guarded(self, rounds: Iterator[Round]) -> Iterator[Round]:
        """The rounds of a run, while there is memory and, of several processes, all agree."""
        with self.enough_memory():
            yield from rounds

    @property
    def plain(self) -> Settings:
        """The settings of plain decoding."""
        return replace(self.settings, K=0, M=0)

    def report(self) -> dict:
        """The settings as --json prints them."""
        return dict(model=str(self.folder), device=str(self.device), strategy=self.flags.strategy,
                    seed=self.flags.seed, dtype=str(self.model.dtype).removeprefix("torch."),
                    threads=torch.get_num_threads(), **asdict(self.settings) | self.numbers,
                    r=self.probe, costs=self.costs)

    # ------------------------------------------------------------------------------- the prompt

    def prompt(self) -> list[int]:
        """The user's prompt as ids, checked against the model."""
        if self.flags.prompt_ids is not None:
            return self.fits(self.flags.prompt_ids)
        try:
            # Whatever the locale took the bytes of the command line for, they are UTF-8.
            said = (self.flags.prompt or "", self.flags.system or "")
            text, self.flags.system = (word.encode("utf-8", "surrogateescape").decode()
                                       for word in said)
            if text == "-":
                text = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeError:
            raise UsageError("the prompt is not valid UTF-8") from None
        if not text:
            raise UsageError("--prompt is missing or empty; give at least one character")
        if self.flags.chat:
            text = text.strip()                        # as its format wants it
        least = len(text.encode()) // self.tokenizer.longest
        if least >= self.cfg.context:                  # to make tokens of 100 MB takes a while
            raise UsageError(f"at least {least} prompt tokens exceed the model's context of "
                             f"{self.cfg.context}")
        spelled = [name for name in self.tokenizer.special if name in text]
        if spelled:
            note(f"{spelled[0]} in the prompt is text, not that special token (--chat writes its "
                 "own, --prompt-ids takes any)")
        return self.fits(self.encode([dict(role="user", content=text)]))

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Turns -> ids: the chat format with --chat, else their bare text after the begin token."""
        if self.flags.chat:
            system = [dict(role="system", content=self.flags.system)] if self.flags.system else []
            return self.tokenizer.chat(system + messages)
        text = "".join(m["content"] for m in messages)
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def fits(self, ids: list[int]) -> list[int]:
        """`ids`, if the model can read them and then write what is asked for; if nothing is, what
        the context leaves."""
        V = self.cfg.V
        context = self.cfg.context
        N = self.settings.N
        if self.flags.max_new_tokens is None:
            N = max(1, min(N, context - len(ids)))
            self.settings = replace(self.settings, N=N)
        if max(ids) >= V:
            raise UsageError(f"token {max(ids)} is not in the model's vocabulary of {V}")
        if len(ids) + N > context:
            fit = f": --max-new-tokens {context - len(ids)} fits" if len(ids) < context else ""
            raise UsageError(f"{len(ids)} prompt tokens and {N} new ones exceed the model's "
                             f"context of {context}{fit}")
        self.length = len(ids) + N
        return ids


def memory_here() -> float:
    """Bytes of memory that this machine has, where that is known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return float("inf")


def paper_numbers(L: int) -> dict[str, float]:
    """The paper's: 44 of the 70B's 80 layers left out, an exit threshold of 0.7, and up to 128
    verifications between two choices of layers, of which 64 is taken here. K is not stated."""
    return dict(K=12, M=round(0.55 * L), exit_threshold=0.7, interval=64)
