"""The flags of the main command; those of bench/ and oracle/ add their own."""
import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from command.cli import Parser, UsageError, number, numbers
from llama import torch

VERSION = "0.4.0"
DEMO = Path(__file__).resolve().parent.parent / "demo"
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16)}


def parser() -> Parser:
    """All flags, in groups; their defaults are None where the model's folder or the run decides."""
    positive = number(int, "1 or more", lambda v: 1 <= v < 2 ** 31)
    natural = number(int, "0 or more", lambda v: 0 <= v < 2 ** 31)
    part = number(float, "0 to 1", lambda v: 0 <= v <= 1)
    p = Parser(allow_abbrev=False, usage="python %(prog)s [--prompt TEXT] [flags]",
               description="Self-speculative decoding with layers chosen in context (CLaSp). "
               "However it is drafted, the text has exactly the full model's distribution.",
               epilog="What clasp leaves open it decides while it runs, by what passes cost and "
               "what was accepted; where drafting would not pay, it decodes plainly.")
    add = p.add_argument
    add("--prompt", metavar="TEXT", help="text to continue; with --chat a question; -: stdin")
    add("--prompt-ids", metavar="1,2,3", type=numbers, help="token ids, nothing added")
    add("--chat", action="store_true", help="the chat format of the Instruct models")
    add("--system", metavar="TEXT", help="system turn, with --chat")
    add("--model", metavar="DIR", default=str(DEMO), help="a Hugging Face folder (the demo)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N", type=number(
        str, "cpu, cuda or cuda:N", lambda v: re.fullmatch(r"cpu|cuda(:\d{1,3})?", v)))
    add("--dtype", choices=list(DTYPES), metavar="TYPE", help="float32, float64 or bfloat16")
    add("--threads", type=number(int, "1 to 1024", lambda v: 1 <= v <= 1024), metavar="N",
        help="CPU threads (1 for a small model)")
    add("--eager", action="store_true", help="GPU: no CUDA graphs")
    add("--no-compile", action="store_true", help="GPU: graphs of plain kernels")
    add("--trace", metavar="FILE", help="write every draw, verdict and table (oracle/TRACE.md)")
    add("--compare", action="store_true", help="time plain decoding and CLaSp, interleaved")
    add("--repeats", type=positive, metavar="N", help="pairs that --compare runs (5)")
    add("--verbose", action="store_true", help="a line per round: skip map, what became of tokens")
    add("--json", action="store_true", help="one JSON object on standard output")
    add("--version", action="version", version=f"clasp-mini {VERSION}")
    add = p.add_argument_group("what is written").add_argument
    add("--max-new-tokens", type=positive, metavar="N", help="128, or what the context leaves")
    add("--temperature", type=number(float, "0 or more", lambda v: 0 <= v < float("inf")),
        metavar="T", help="0, greedy")
    add("--top-k", type=natural, default=0, metavar="N", help="0, off")
    add("--top-p", type=number(float, "above 0, at most 1", lambda v: 0 < v <= 1), default=1.0,
        metavar="P", help="1, off")
    add("--seed", type=number(int, "0 to 2**32 - 1", lambda v: 0 <= v < 2 ** 32), metavar="N",
        help="0; one text for given --costs")
    add = p.add_argument_group("how it is drafted (speed alone)").add_argument
    add("--strategy", choices=["clasp", "paper", "ar"], default="clasp", metavar="NAME",
        help="clasp: our policy decides what is not named below; paper: its fixed numbers do; "
        "ar: plain decoding")
    add("--skip-layers", type=natural, metavar="M", help="layers that the draft leaves out")
    add("--draft-length", type=number(int, "0 to 511", lambda v: 0 <= v < 512), metavar="K",
        help="most tokens drafted per round")
    add("--draft-exit-threshold", type=part, metavar="P", help="no draft after a lower confidence")
    add("--interval", type=positive, metavar="N", help="rounds between two choices of layers")
    add("--probe", type=number(int, "1 to 64", lambda v: 1 <= v <= 64), metavar="R",
        help="tokens that choose the layers (1, as the paper)")
    add("--costs", metavar="FILE", help="as --json printed them; else clasp.json's, or measured")
    return p


def parsed(argv: Sequence[str] | None, p: Parser | None = None) -> argparse.Namespace:
    """The flags of the main command, or of a parser that adds to them, held against one another.
    Raises UsageError."""
    p = p or parser()
    a = p.parse_args(argv)
    if a.system is not None and not a.chat:
        raise UsageError("--system goes with --chat")
    if a.prompt_ids is not None and (a.chat or a.prompt is not None):
        raise UsageError("--prompt-ids goes without --prompt and --chat")
    if a.compare and (a.strategy == "ar" or a.verbose or a.trace):
        raise UsageError("--compare runs plain decoding too: without --strategy ar, --verbose "
                         "and --trace")
    if a.repeats and not (a.compare or p.get_default("repeats")):
        raise UsageError("--repeats goes with --compare")
    a.repeats = a.repeats or 5
    return a
