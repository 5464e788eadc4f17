"""The account of a run: what was counted and timed, and that in words. Decides nothing."""
import statistics
from collections.abc import Iterable, Sequence

from speculative import Round


def figures(rounds: Sequence[Round], load: float = 0.0, measure: float = 0.0) -> dict:
    """A run's statistics; times in seconds. Round 0 is the prefill: its pass over the prompt counts
    as prefill, and the token it emits as emitted but not as decoded. All that follows, the first
    layer optimisation included, is decoding; so is `measure`, what it took to time passes. `load`
    is all that the user waited for before the first round."""
    drafted = sum(len(r.drafted) for r in rounds)
    accepted = sum(r.accepted for r in rounds)
    emitted = sum(len(r.emitted) for r in rounds)
    verifies = max(0, len(rounds) - 1)
    decoded = emitted - len(rounds[0].emitted) if rounds else 0
    prefill = rounds[0].seconds[1] if rounds else 0.0
    draft, verify, optimise = (sum(r.seconds[step] for r in rounds) for step in range(3))
    decoding = draft + verify + optimise - prefill
    updates = [r.seconds[2] for r in rounds if r.choice]
    return dict(
        drafted=drafted, accepted=accepted, emitted=emitted, verifies=verifies,
        tokens_per_verify=decoded / verifies if verifies else None,
        acceptance=accepted / drafted if drafted else None,
        seconds=load + prefill + decoding, load_seconds=load, measure_seconds=measure,
        prefill_seconds=prefill, decode_seconds=decoding,
        tokens_per_second=decoded / decoding if decoded else None,
        draft_step_seconds=median(r.seconds[0] / len(r.drafted) for r in rounds if r.drafted),
        verify_seconds=median(r.seconds[1] for r in rounds[1:]),
        optimise_seconds=median(updates), optimisations=len(updates),
        skip_set=[i for i, left_out in enumerate(rounds[-1].skip) if left_out] if rounds else [])


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


def ids_of(rounds: Sequence[Round]) -> list[int]:
    """The tokens that a run emitted."""
    return [i for r in rounds for i in r.emitted]


def fates(r: Round) -> dict[str, list[int]]:
    """A round's tokens by what became of them: "kept", "rejected", the full model's "own"."""
    return dict(kept=r.emitted[:r.accepted], rejected=r.drafted[r.accepted:],
                own=r.emitted[r.accepted:])


def summary(f: dict, ran: str) -> str:
    """One account of a run, in two short lines. `ran` is the strategy."""
    spent = dict(load=f["load_seconds"], prefill=f["prefill_seconds"], measure=f["measure_seconds"],
                 decode=f["decode_seconds"] - f["measure_seconds"])
    parts = ", ".join(f"{name} {brief(seconds)}" for name, seconds in spent.items() if seconds)
    head = f"{ran}: {f['emitted']} tokens in {brief(f['seconds'])} s: {parts}"
    if not f["verifies"]:
        return f"{head}\nonly the prefill's"
    more = "; nothing drafted: it would hardly pay" if ran == "clasp" else ""
    if f["drafted"]:
        more = (f", {f['tokens_per_verify']:.2f} per verify; {f['accepted']} of {f['drafted']} "
                f"kept; layers chosen {f['optimisations']}x")
    return f"{head}\ndecoding {brief(f['tokens_per_second'])} tokens/s{more}"


def brief(x: float) -> str:
    digits = 2 if x < 1 else 1 if x < 100 else 0
    return f"{x:.{digits}f}"
