"""What a user reads of a run: its text, its rounds in colour, the account of what it took. Counts
and formats; decides nothing.
"""
import codecs
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import TextIO

from speculative import Round, Settings
from text.tokenizer import Tokenizer


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
        draft_step_seconds=median(r.seconds[0] / len(r.drafted) for r in rounds if r.drafted),
        verify_seconds=median(r.seconds[1] for r in rounds[1:]),
        optimise_seconds=median(updates), optimisations=len(updates),
        skip_set=[i for i, s in enumerate(rounds[-1].skip) if s] if rounds else [])


def median(values: Iterable[float | None]) -> float | None:
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


def comparison(pairs: Sequence[tuple[list[Round], list[Round]]], greedy: bool) -> dict:
    """Of runs of one prompt, (plain, CLaSp) each: medians over the pairs, sums for what is counted;
    `stats` of the first pair. `equal` is None for samples: two of one distribution may differ."""
    plain, clasp = ([figures(pair[side]) for pair in pairs] for side in range(2))
    step = median(f["verify_seconds"] for f in plain)
    rate = [median(f["tokens_per_second"] for f in side) for side in (plain, clasp)]
    drafted, verifies = (sum(f[key] for f in clasp) for key in ("drafted", "verifies"))
    decoded = sum(f["emitted"] - 1 for f in clasp)
    return dict(
        stats=clasp[0], plain_stats=plain[0], tokens_per_second=rate,
        speedup=rate[1] / rate[0] if all(rate) else None,
        ideal_speedup=median(map(ideal_speedup, clasp, plain)),
        equal=all(ids_of(a) == ids_of(b) for a, b in pairs) if greedy else None,
        tokens_per_verify=decoded / verifies if verifies else None,
        acceptance=sum(f["accepted"] for f in clasp) / drafted if drafted else 0.0,
        costs={name: (median(f[f"{name}_seconds"] for f in clasp) or 0.0) / step if step else None
               for name in ("draft_step", "verify", "optimise")})


def ids_of(rounds: Sequence[Round]) -> list[int]:
    """The tokens that a run emitted."""
    return [i for r in rounds for i in r.emitted]


def fates(r: Round) -> dict[str, list[int]]:
    """A round's tokens by what became of them: "kept", "rejected", the full model's "own"."""
    return dict(kept=r.emitted[:r.accepted], rejected=r.drafted[r.accepted:],
                own=r.emitted[r.accepted:])


# --------------------------------------------------------------------------------------- in words

def summary(f: dict, s: Settings) -> str:
    """One compact account of a run."""
    if not f["verifies"]:
        return f"{f['emitted']} token(s), the prefill's, in {f['prefill_seconds']:.2f} s"
    head = (f"{f['emitted']} tokens in {f['seconds']:.2f} s: prefill {f['prefill_seconds']:.2f} s, "
            f"then {f['tokens_per_second']:.1f} tokens/s")
    if not f["drafted"]:
        said = {0: "plain decoding", None: "nothing drafted: it would hardly pay"}
        return f"{head} | {said.get(s.K, 'nothing drafted')}"
    share = ", ".join(f"{name} {part:.0%}" for name, part in f["shares"].items())
    return (f"{head} | {f['tokens_per_verify']:.2f} tokens per verify | acceptance "
            f"{f['acceptance']:.2f} ({f['accepted']} of {f['drafted']} drafted) | {share} | left "
            f"out at last: {','.join(map(str, f['skip_set'])) or 'nothing'}")


def compared(c: dict, pairs: Sequence[tuple[list[Round], list[Round]]], dtype: str) -> str:
    """A comparison in five lines."""
    texts = "two samples of one distribution, not to be compared token by token"
    if c["equal"] is not None:
        texts = "equal"
    if c["equal"] is False:
        x, y = next(t for a, b in pairs if (t := (ids_of(a), ids_of(b)))[0] != t[1])
        where = next((n for n, (i, j) in enumerate(zip(x, y)) if i != j), min(len(x), len(y)))
        texts = f"DIFFERENT from token {where} on: a tie within the rounding of {dtype}?"
    plain, clasp = c["tokens_per_second"]
    return (f"plain decoding  {plain:8.1f} tokens/s   {c['plain_stats']['emitted']} tokens, median "
            f"of {len(pairs)} runs, interleaved\n"
            f"CLaSp           {clasp:8.1f} tokens/s   {c['tokens_per_verify']:.2f} tokens per "
            f"verify, acceptance {c['acceptance']:.2f}\n"
            f"speed-up        {c['speedup']:8.2f}            "
            f"{c['speedup'] / c['ideal_speedup']:.0%} of {c['ideal_speedup']:.2f}, the ideal for "
            "these drafts and this acceptance\n"
            f"in plain steps  a draft step {c['costs']['draft_step']:.2f}, a verify "
            f"{c['costs']['verify']:.2f}, a layer optimisation {c['costs']['optimise']:.2f}\n"
            f"texts           {texts}")


# ------------------------------------------------------------------------------------ as it comes

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


class Text:
    """ids -> text as it comes; a character split over tokens waits for its last byte. Without a
    tokenizer, the ids."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[int]) -> None:
        self.tokenizer, self.stops, self.comma = tokenizer, stops, ""
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: Sequence[int], final: bool = False) -> str:
        ids = [i for i in ids if i not in self.stops]
        if self.tokenizer:
            return self.utf8.decode(self.tokenizer.decode_bytes(ids), final)
        out = (self.comma if ids else "") + ",".join(map(str, ids))
        self.comma = "," if self.comma or ids else ""
        return out
