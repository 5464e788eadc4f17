"""The two files that another implementation can be held against: a trace of a run, and a dump of
one forward pass. TRACE.md is their contract; here they are written, and a trace is read back.

`HEADER` and `schema` are the grammar of a trace: what may stand in each field of each line. Whether
the values are *right* is the business of check_trace.py.
"""
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from safetensors import TensorSpec, serialize_file
from torch import Tensor

from llama import Config, Llama, tensor_files, need_memory
from speculative import Recording, Round, Settings, generate, in_parts

VERSION = 1
LONGEST = 1 << 20            # bytes of a line: a prompt of 100,000 tokens, a table of 126 layers
PROGRAM = "clasp-mini"


class Invalid(Exception):
    """Why a file is not a trace that can be checked, in one line for its user."""


class Incomplete(Exception):
    """The file ends, in whole lines, before the trace does."""


# ------------------------------------------------------------------------------------ writing

def fingerprint(folder: str | Path) -> dict[str, str]:
    """name -> SHA-256 (hex) of every file that determines the model's numbers."""
    folder = Path(folder)
    names = {"config.json", *(os.path.relpath(p, folder) for p in tensor_files(folder).values())}
    if "model.safetensors" not in names:
        names.add("model.safetensors.index.json")
    out = {}
    for name in sorted(names):
        with open(folder / name, "rb") as f:
            digest = hashlib.sha256()
            while part := f.read(1 << 20):
                digest.update(part)
        out[name] = digest.hexdigest()
    return out


def record(model: Llama, prompt: Sequence[int], s: Settings, seed: int, choose: Callable[..., Any],
           out: TextIO, about: dict) -> Iterator[Round]:
    """`generate` with `Chance(seed)`, each round written to `out` before it is yielded. `about` is
    the header's `model` (see `fingerprint`) and `versions`. If the run is broken off, what has been
    written is whole rounds, without the line `end`."""
    def write(lines: list[dict]) -> None:
        out.write("".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
                          for line in lines))
        out.flush()

    write([dict(event="header", schema="clasp-trace", version=VERSION, program=PROGRAM, **about,
                config=asdict(model.cfg), dtype=str(model.dtype).removeprefix("torch."),
                settings=dict(asdict(s), seed=seed), prompt_ids=list(prompt))])
    chance, emitted, last = Recording(seed), 0, None
    for n, r in enumerate(generate(model, prompt, s, chance, choose)):
        write([dict(event=event, round=n, **fields) for event, fields in _events(r, chance.log)])
        chance.log.clear()             # its distributions have V entries: one round of them at most
        emitted, last = emitted + len(r.emitted), r.emitted[-1]
        yield r
    write([dict(event="end", reason="stop" if last in s.stop_ids else "length", emitted=emitted)])


def _events(r: Round, log: list) -> Iterator[tuple[str, dict]]:
    """A round's lines. Its log: a draw for each drafted token, the verdicts up to the first
    refusal, and the draw of the full model's own token."""
    v, k = r.verdict, len(r.drafted)
    draws, verdicts, (_, drawn_from, u_own, own) = log[:k], log[k:-1], log[-1]
    yield "round", dict(start=r.start, skip=[i for i, s in enumerate(r.skip) if s])
    for step, token in enumerate(r.drafted):
        yield "draft", dict(step=step, token=token, q=v.q[step], confidence=r.confidence[step],
                            u=draws[step][2])
    for step, token in enumerate(r.drafted):
        _, _, u, accepted = verdicts[step] if step < len(verdicts) else (None,) * 4
        yield "verify", dict(step=step, token=token, p=v.p[step], q=v.q[step], a=v.a[step], u=u,
                             accepted=accepted)
    yield "own", dict(kind="plain" if k == 0 else "bonus" if r.accepted == k else "residual",
                      token=own, probability=drawn_from[own].item(), u=u_own)
    yield "emit", dict(tokens=r.emitted)
    if r.choice:
        M = len(r.choice.D[0]) - 1
        yield "optimise", dict(
            position=r.start - 1 + r.accepted, M=M,
            D=[line[:min(i, M) + 1] for i, line in enumerate(r.choice.D)],
            parents=["".join("01"[bit] for bit in line[:min(i, M) + 1])
                     for i, line in enumerate(r.choice.parents)],
            skip=[i for i, s in enumerate(r.choice.skip()) if s], cosine=r.choice.cosine)
    yield "times", dict(zip(("draft", "verify", "optimise"), r.seconds))


DUMP = dict(
    prompt_ids="(T,) the tokens",
    logits="(T, V) row t scores what follows token t; before temperature",
    hidden="(L+1, T, D) the residual stream: 0 the embedding, i what layer i receives, L the last "
           "layer's output before the final norm; over a skipped layer it does not change",
    keys="(L, T, G, hd) as cached, after the rotary embedding; zeros for a skipped layer",
    values="(L, T, G, hd) as cached; zeros for a skipped layer")


@torch.inference_mode()
def dump_forward(model: Llama, prompt: Sequence[int], skip: Sequence[int], path: str | Path,
                 about: dict) -> dict[str, Tensor]:
    """One forward pass over `prompt`, without the layers `skip`, into a safetensors file: the
    tensors of `DUMP`, logits in float32 or wider, the others in the model's dtype. Returns them.
    Raises llama.ModelError if they do not fit into memory."""
    c, T, one = model.cfg, len(prompt), model.embed.element_size()
    size = T * (c.V * torch.finfo(model.wide).bits // 8 + (c.L + 1) * c.D * one
                + 2 * c.L * c.G * c.hd * one)
    need_memory(torch.device("cpu"), size, f"the dump of {T} tokens")
    out = dict(prompt_ids=torch.tensor(prompt), logits=torch.empty(T, c.V, dtype=model.wide),
               hidden=torch.empty(c.L + 1, T, c.D, dtype=model.dtype))
    cache, left_out = model.cache(T), [i in skip for i in range(c.L)]
    ids, t = out["prompt_ids"].to(model.device), 0
    for x, h in in_parts(model, ids, 0, cache, skip=left_out, states=slice(None)):
        part, t = slice(t, t + len(x)), t + len(x)
        out["logits"][part], out["hidden"][:, part] = model.head(x).cpu(), h.cpu()
    out["keys"], out["values"] = (x.transpose(1, 2).cpu().contiguous() for x in (cache.k, cache.v))
    meta = dict(version=VERSION, program=PROGRAM, tensors=DUMP, skip=sorted(skip), config=asdict(c),
                dtype=str(model.dtype).removeprefix("torch."), **about)
    save(out, path, {"clasp-forward": json.dumps(meta)})     # several entries come in any order
    return out


def save(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. The library's own `save_file` does the same, but asks for NumPy,
    and a new file in the place of the old ends a symbolic link and narrows the permissions."""
    assert all(t.is_contiguous() for t in tensors.values())
    path = Path(path).resolve()
    path.touch()
    mode = path.stat().st_mode
    specs = {name: TensorSpec(dtype=str(t.dtype).removeprefix("torch."), shape=list(t.shape),
                              data_ptr=t.data_ptr(), data_len=t.nbytes)
             for name, t in tensors.items()}
    serialize_file(specs, str(path), metadata)
    path.chmod(mode)


# ------------------------------------------------------------------------------------ reading

Field = tuple[str, Callable[[Any], bool]]              # what is wanted, in words; whether it is


def whole(low: int, high: int) -> Field:
    # A JSON true is no number here, though Python's True is an int.
    return f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def real(low: float, high: float) -> Field:
    return (f"a number from {low:g} to {high:g}",
            lambda v: type(v) in (int, float) and low <= v <= high)


def some(item: Field) -> Field:
    return f"a list, each {item[0]}", lambda v: type(v) is list and all(map(item[1], v))


def maybe(item: Field) -> Field:
    return f"{item[0]}, or null", lambda v: v is None or item[1](v)


def word(*allowed: str) -> Field:
    return " or ".join(allowed), lambda v: v in allowed


COUNT, SIZE = whole(0, 2 ** 53), whole(1, 2 ** 53)     # JSON's doubles hold no more exactly
TEXT = ("a text", lambda v: type(v) is str)
FLAG, NOT_NEGATIVE = ("true or false", lambda v: type(v) is bool), real(0, 1e300)
TEXTS = ("an object of texts", lambda v: type(v) is dict and all(map(TEXT[1], v.values())))
CHANCE = ("a number from 0 up to, but not, 1", lambda v: type(v) in (int, float) and 0 <= v < 1)
PROBABILITY = real(0, 1 + 1e-6)        # a float32 softmax may exceed 1 by a rounding
COSINE = real(-1 - 1e-3, 1 + 1e-3)

HEADER: dict[str, Any] = dict(
    event=word("header"), schema=word("clasp-trace"), version=whole(VERSION, VERSION),
    program=TEXT, model=TEXTS, versions=TEXTS,
    config=dict(dict.fromkeys(("L", "D", "H", "G", "hd", "ffn", "V", "context"), SIZE),
                eps=NOT_NEGATIVE, tied=FLAG, theta=NOT_NEGATIVE, scaling=maybe(some(NOT_NEGATIVE))),
    dtype=word("float32", "float64", "bfloat16"),
    settings=dict(temperature=NOT_NEGATIVE, top_k=COUNT, top_p=real(0, 1), N=SIZE,
                  stop_ids=some(COUNT), K=COUNT, M=COUNT,
                  exit_threshold=real(0, 1), interval=SIZE, seed=maybe(whole(0, 2 ** 64))),
    prompt_ids=some(COUNT))


def schema(cfg: Config) -> dict[str, dict[str, Field]]:
    """event -> field -> what may stand there, in a trace of a model of these sizes."""
    token, count, layers = whole(0, cfg.V - 1), whole(0, cfg.context), some(whole(0, cfg.L - 1))
    bits = ("a text of 0 and 1", lambda v: type(v) is str and not v.strip("01"))
    return {event: dict(event=word(event), round=count, **fields) for event, fields in dict(
        round=dict(start=count, skip=layers),
        draft=dict(step=count, token=token, q=PROBABILITY, confidence=PROBABILITY, u=CHANCE),
        verify=dict(step=count, token=token, p=PROBABILITY, q=PROBABILITY, a=PROBABILITY,
                    u=maybe(CHANCE), accepted=maybe(FLAG)),
        own=dict(kind=word("plain", "residual", "bonus"), token=token, probability=PROBABILITY,
                 u=CHANCE),
        emit=dict(tokens=some(token)),
        optimise=dict(position=count, M=count, D=some(some(COSINE)), parents=some(bits),
                      skip=layers, cosine=some(COSINE)),
        times=dict(draft=NOT_NEGATIVE, verify=NOT_NEGATIVE, optimise=NOT_NEGATIVE)).items()} | dict(
            end=dict(event=word("end"), reason=word("stop", "length"), emitted=count))


def short(value: Any) -> str:
    """A value from a file as a message may show it: on one line, of a bounded length."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def match(line: dict, fields: dict, where: str) -> None:
    """Raise Invalid unless `line` has exactly these fields and each holds what it may."""
    for wrong, names in (("unknown", line.keys() - fields.keys()),
                         ("missing", fields.keys() - line.keys())):
        if names:
            raise Invalid(f"{where}: {wrong} field {short(min(names))}")
    for name, field in fields.items():
        if isinstance(field, dict):
            if type(line[name]) is not dict:
                raise Invalid(f"{where}: {name} is {short(line[name])}; an object wanted")
            match(line[name], field, f"{where}, {name}")
        elif not field[1](line[name]):
            raise Invalid(f"{where}: {name} is {short(line[name])}; {field[0]} wanted")


def read(file: BinaryIO) -> Iterator[dict]:
    """The objects of a file of JSON lines, one at a time, each a dict with a text `event`. Raises
    Invalid, with the line number: these files come from strangers."""
    def number(kind: type) -> Callable[[str], Any]:
        def parse(text: str) -> Any:
            if len(text) > 100 or not math.isfinite(float(text)):
                raise ValueError(f"the number {text[:20]}... is too long or too large")
            return kind(text)
        return parse

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        out = {}
        for name, value in pairs:
            if name in out:
                raise ValueError(f"{short(name)} stands there twice")
            out[name] = value
        return out

    n = 0
    while raw := file.readline(LONGEST + 1):
        n += 1
        if len(raw) > LONGEST:
            raise Invalid(f"line {n}: longer than {LONGEST} bytes")
        if not raw.endswith(b"\n"):
            raise Invalid(f"line {n}: cut short, it does not end with a newline")
        try:
            line = json.loads(raw.decode(), parse_int=number(int), parse_float=number(float),
                              parse_constant=constant, object_pairs_hook=unique)
        except RecursionError:
            raise Invalid(f"line {n}: nested too deeply") from None
        except UnicodeDecodeError:
            raise Invalid(f"line {n}: not UTF-8") from None
        except ValueError as e:
            raise Invalid(f"line {n}: not JSON: {getattr(e, 'msg', e)}") from None
        if type(line) is not dict or type(line.get("event")) is not str:
            raise Invalid(f"line {n}: a JSON object with a text \"event\" wanted")
        yield line


class Lines:
    """A trace as a cursor: `now` is the line looked at, line `number` of the file, checked against
    the grammar alone: HEADER, then `schema` once the sizes are known."""

    def __init__(self, file: BinaryIO) -> None:
        self.lines, self.number, self.now, self.schema = read(file), 0, {}, {}

    def advance(self) -> None:
        """To the next line. Raises Incomplete if there is none, or Invalid."""
        self.now, self.number = next(self.lines, None), self.number + 1
        if self.now is None:
            raise Incomplete
        if self.schema:
            event = self.now["event"]
            if event not in self.schema:
                raise Invalid(f"line {self.number}: no such event: {short(event)}")
            match(self.now, self.schema[event], f"line {self.number}, {event}")

    def header(self) -> dict:
        try:
            self.advance()
        except Incomplete:
            raise Invalid("empty; a trace begins with a header") from None
        h = self.now
        if h["event"] != "header" or h.get("schema") != "clasp-trace":
            raise Invalid("line 1: not the header of a clasp-trace")
        if h.get("version") != VERSION:
            raise Invalid(f"line 1: version {short(h.get('version'))} of the format; this program "
                          f"reads version {VERSION}")
        match(h, HEADER, "line 1, header")
        return h
