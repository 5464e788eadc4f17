"""Plain decoding and CLaSp in turn on one prompt: the question of --compare."""
import json
import os
from collections.abc import Callable, Iterable, Sequence

from command.cli import UsageError, told
from command.job import Job
from command.report import brief, figures, ideal_speedup, ids_of, median
from speculative import Chance, Round, generate

Pair = tuple[list[Round], list[Round]]                 # the plain run, and CLaSp's
Run = Callable[[Job, list[int], Chance], Iterable[Round]]  # clasp_mini.run


def pair(job: Job, ids: list[int], seed: int, run: Run) -> Pair:
    """The prompt plainly, then with CLaSp."""
    plain = generate(job.model, ids, job.plain, Chance(seed), job.choose)
    return list(job.guarded(plain)), list(run(job, ids, Chance(seed)))


def compare(job: Job, ids: list[int], run: Run) -> int:
    """As many pairs as were asked for, and what came of them; the exit status. Of pairs that Ctrl-C
    leaves, those that are whole count."""
    pairs = []
    status = 0
    try:
        for n in told(range(-1, job.flags.repeats), "pair"):   # the first, a warm-up, never counts
            pairs.append(pair(job, ids, job.flags.seed + max(0, n), run))
    except KeyboardInterrupt:
        if len(pairs) < 2:
            raise
        status = 130
    c = comparison(pairs[1:], greedy=job.settings.temperature == 0)
    if c["ideal_speedup"] is None:
        raise UsageError("nothing to compare, the prefill gave all tokens: allow more of them, or "
                         "take a prompt that does not end at once")
    if job.flags.json:
        out = ids_of(pairs[1][1])
        text = job.tokenizer and job.tokenizer.decode([i for i in out if i not in job.stops])
        print(json.dumps(dict(prompt_ids=ids, ids=out, text=text, settings=job.report(), **c,
                              load_seconds=job.load_seconds, measure_seconds=job.measure_seconds)))
    else:
        print(compared(c, pairs[1:], job.report()["dtype"]))
        print(f"once before     loading {brief(job.load_seconds)} s, measuring costs "
              f"{brief(job.measure_seconds)} s: in none of these rates")
    return status


def comparison(pairs: Sequence[Pair], greedy: bool) -> dict:
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


def compared(c: dict, pairs: Sequence[Pair], dtype: str) -> str:
    """A comparison in five lines."""
    texts = "two samples of one distribution: not to be compared by token"
    if c["equal"]:
        texts = "equal"
    elif c["equal"] is False:
        both = [(ids_of(a), ids_of(b)) for a, b in pairs]
        where = min(len(os.path.commonprefix([x, y])) for x, y in both if x != y)
        texts = f"DIFFERENT from token {where} on: a tie, by the rounding of {dtype}?"
    plain, clasp = c["tokens_per_second"]
    return (f"plain decoding  {plain:8.1f} tokens/s   {c['plain_stats']['emitted']} tokens, median "
            f"of {len(pairs)} runs, interleaved\n"
            f"CLaSp           {clasp:8.1f} tokens/s   {c['tokens_per_verify']:.2f} tokens per "
            f"verify, acceptance {c['acceptance']:.2f}\n"
            f"speed-up        {c['speedup']:8.2f}            "
            f"{c['speedup'] / c['ideal_speedup']:.0%} of {c['ideal_speedup']:.2f}, the ideal for "
            "these drafts\n"
            f"in plain steps  a draft step {c['costs']['draft_step']:.2f}, a verify "
            f"{c['costs']['verify']:.2f}, a layer optimisation {c['costs']['optimise']:.2f}\n"
            f"texts           {texts}")
