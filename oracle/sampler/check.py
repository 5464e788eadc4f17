"""Does this sampler emit what the full model says? Asks a program, in any language, for texts.

    python oracle/sampler/check.py --program "./mine"
    python oracle/sampler/check.py --requests > requests.jsonl    (elsewhere: ./mine < ... > ...)
    python oracle/sampler/check.py --answers answers.jsonl
    python oracle/sampler/check.py --power

A test by betting. Who bets on texts at the odds of the right law, and begins with 1, owns
wrong(text) / right(text) times as much after each text. If the program is right nobody expects to
gain, so to own a million has a chance of one in a million at most (Markov's inequality: nothing is
approximate). If it is wrong as one of wrong.py is, who bets by that law grows rich fast, and the
richest names the fault. Some more bettors learn as they go, for faults without a name: the
logarithm of what they own is half the G of a G-test, less the price of learning.

Exit status: 0 no fault found, 1 fault, 2 the program did not answer as oracle/README.md says.
"""
import argparse
import json
import math
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from oracle.sampler.law import CASES, RIGHT, Law, law, target  # noqa: E402
from oracle.sampler.wrong import WRONG  # noqa: E402

TEXTS = 1000                 # of each case
FALSE_ALARM = 1e-8           # how likely a right program is called wrong, in a whole run
MISSED = 1e-6                # how likely a fault of wrong.py is missed, in a whole run
TRUSTS = (100.0, 1000.0, 10000.0)


class Refused(Exception):
    """The program, or a file, does not answer as oracle/README.md says; in one line."""


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


# ------------------------------------------------------------------------------- the statistics

@cache
def laws(name: str) -> tuple[Law, dict[str, Law]]:
    """Of a case: the right law and the wrong ones."""
    case = CASES[name]
    return target(case), {fault: law(sampler, case)[0] for fault, sampler in WRONG.items()}


def likelihood(counts: Counter, of: Law) -> float:
    """ln of how likely these texts are by a law."""
    if any(of.get(text, 0.0) == 0 for text in counts):
        return -math.inf
    return sum(n * math.log(of[text]) for text, n in counts.items())


def learned(counts: Counter, of: Law, trust: float) -> float:
    """ln of what is owned, after betting against a law, by who believes in it as if `trust` texts
    of it had been seen, and then in what is seen (a Dirichlet prior)."""
    if any(of.get(text, 0.0) == 0 for text in counts):
        return math.inf
    owned = math.lgamma(trust) - math.lgamma(trust + counts.total())
    for text, n in counts.items():
        before = trust * of[text]
        owned += math.lgamma(before + n) - math.lgamma(before) - n * math.log(of[text])
    return owned


def ln_mean(values: Iterable[float]) -> float:
    """ln of the mean of e^values."""
    values = list(values)
    most = max(values)
    if math.isinf(most):
        return most
    return most + math.log(sum(math.exp(v - most) for v in values) / len(values))


Seen = dict[str, Counter]    # of cases: how often each text came


def wealth(seen: Seen) -> float:
    """ln of what the bettors own, on average, after betting against the right laws."""
    right = sum(likelihood(counts, laws(name)[0]) for name, counts in seen.items())
    if right == -math.inf:
        return math.inf
    owned = [ln - right for ln in by_fault(seen).values()]
    owned += [sum(learned(counts, laws(name)[0], trust) for name, counts in seen.items())
              for trust in TRUSTS]
    return ln_mean(owned)


def by_fault(seen: Seen) -> dict[str, float]:
    """ln of how likely each wrong sampler makes these texts."""
    return {fault: sum(likelihood(counts, laws(name)[1][fault]) for name, counts in seen.items())
            for fault in WRONG}


def alarm(cases: int) -> float:
    """ln of the wealth that calls a program wrong. Each case is a test, and all together."""
    return math.log((cases + 1) / FALSE_ALARM)


def nearest(seen: Seen) -> str:
    """The likeliest fault in words, unless it is then judged wrong itself."""
    ln = by_fault(seen)
    first, second = sorted(ln, key=ln.get, reverse=True)[:2]
    doubt = ln_mean(sum(learned(counts, laws(name)[1][first], trust)
                        for name, counts in seen.items()) for trust in TRUSTS)
    if doubt > alarm(0):
        return "a fault without a name" + (f"; next to it: {first}" if ln[first] > -1e9 else "")
    return f"{first} (next, e^{ln[first] - ln[second]:.0f} times less likely: {second})"


def missed(fault: str, names: Sequence[str], texts: int = TEXTS) -> float:
    """How likely, at most, so many texts of each case do not call a program with this fault wrong:
    Chernoff's bound of the wealth of the one who bets on it."""
    barrier = alarm(len(names)) + math.log(len(WRONG) + len(TRUSTS))
    bounds = [0.0]
    for s in (n / 20 for n in range(1, 20)):
        bound = s * barrier
        for name in names:
            right, wrong = laws(name)[0], laws(name)[1][fault]
            common = sum(w ** (1 - s) * right.get(text, 0.0) ** s for text, w in wrong.items())
            bound += texts / len(CASES[name]["prompts"]) * math.log(common or 1e-300)
        bounds.append(bound)
    return math.exp(min(bounds))


# ------------------------------------------------------------------------------ asking a program

def ask(program: str, requests: Sequence[dict], seconds: float = 600) -> list[dict]:
    """Its answers, one for each request: JSON objects, a line each, through stdin and stdout."""
    text = "".join(json.dumps(request) + "\n" for request in requests)
    try:
        done = subprocess.run(shlex.split(program), input=text, stdout=subprocess.PIPE, text=True,
                              timeout=seconds)
    except (OSError, ValueError) as e:
        raise Refused(f"{program}: cannot be run: {e}") from None
    except subprocess.TimeoutExpired:
        raise Refused(f"{program}: not done after {seconds:g} seconds") from None
    if done.returncode:
        raise Refused(f"{program}: ended with exit status {done.returncode}")
    return read(done.stdout, program, len(requests))


def read(text: str, source: str, wanted: int) -> list[dict]:
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != wanted:
        raise Refused(f"{source}: {len(lines)} lines, {wanted} wanted: one for each request")
    out = []
    for number, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line))
        except ValueError:
            out.append(None)
        if not isinstance(out[-1], dict):
            raise Refused(f"{source}: line {number} is no JSON object: {line[:60]}")
    return out


def counted(case: dict, answer: dict) -> tuple[Counter, float]:
    """How often each text came (those of a batch are one), and the rounds per text: nan if the
    answer does not say."""
    B = len(case["prompts"])
    rounds = math.nan
    try:
        if "counts" in answer:
            texts = {tuple(map(int, text.split())): n for text, n in answer["counts"].items()}
            if B * sum(texts.values()) != case["texts"]:
                raise ValueError
            return Counter(texts), rounds
        texts = answer["texts"]
        if len(texts) != case["texts"]:
            raise ValueError
        if isinstance(texts[0][0], list):
            rounds = sum(map(len, texts)) / len(texts)
            texts = [[x for part in text for x in part] for text in texts]
        texts = [tuple(map(int, text)) for text in texts]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise Refused(f"{case['case']}: no \"texts\": a list of just {case['texts']} texts, each a "
                      "list of tokens or of rounds, which are lists of tokens") from None
    return Counter(sum(texts[n:n + B], ()) for n in range(0, len(texts), B)), rounds


# ------------------------------------------------------------------------------------ the report

def requests(names: Iterable[str], texts: int = TEXTS, seed: int = 1) -> list[dict]:
    return [dict(CASES[name], level=1, texts=texts, seed=seed + n) for n, name in enumerate(names)]


def describe(case: dict, counts: Counter, rounds: float, wrong: bool) -> str:
    name = case["case"]
    right = laws(name)[0]
    said = []
    if len(counts) == 1 < len(right):
        said.append("all texts are the same: is the generator seeded anew for each?")
    elif impossible := [text for text in counts if right.get(text, 0.0) == 0]:
        said.append(f"{' '.join(map(str, impossible[0]))} cannot be")
    if wrong:
        said.append(nearest({name: counts}))
    if not math.isnan(rounds):
        usual = ", ".join(f"{rule} {law(RIGHT[rule], case)[1]:.2f}" for rule in list(RIGHT)[:4])
        said.append(f"{rounds:.2f} rounds per text ({usual})")
    return "; ".join(said)


def judge(asked: list[dict], told: list[dict]) -> tuple[list[tuple[str, bool, str]], str]:
    """-> of each case its name, whether it is wrong, and words; and the fault of all together, or
    nothing."""
    seen = {}
    lines = []
    for case, answer in zip(asked, told):
        if "skip" in answer:
            lines.append((case["case"], False, f"skipped: {answer['skip']}"))
            continue
        counts, rounds = counted(case, answer)
        seen[case["case"]] = counts
        wrong = wealth({case["case"]: counts}) >= alarm(len(asked))
        lines.append((case["case"], wrong, describe(case, counts, rounds, wrong)))
    if any(wrong for _, wrong, _ in lines) or seen and wealth(seen) >= alarm(len(asked)):
        return lines, nearest(seen)
    return lines, ""


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(description="Does a sampler emit what the full model says?")
    p.add_argument("--program", metavar="COMMAND", help="reads requests, writes answers")
    p.add_argument("--answers", metavar="FILE", help="its answers, or counts, made elsewhere")
    p.add_argument("--requests", action="store_true", help="print the requests")
    p.add_argument("--power", action="store_true", help="print how surely each fault is found")
    p.add_argument("--texts", type=int, default=TEXTS, metavar="N", help=f"of a case ({TEXTS})")
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args(argv)
    if a.texts < 2 or a.texts % 2:
        p.error(f"--texts {a.texts}: an even number above 0 is wanted")
    asked = requests(CASES, a.texts, a.seed)
    if a.requests:
        print("\n".join(map(json.dumps, asked)))
    elif a.power:
        print(f"How likely {a.texts} texts of each case miss a fault; the case that shows it best:")
        for fault in WRONG:
            best = min(CASES, key=lambda name: missed(fault, [name], a.texts))
            print(f"{fault:42}{missed(fault, list(CASES), a.texts):9.0e}   {best}")
    elif not a.program and not a.answers:
        p.error("--program COMMAND, --answers FILE, --requests or --power")
    else:
        try:
            if a.program:
                told = ask(a.program, asked)
            else:
                told = read(Path(a.answers).read_text(), a.answers, len(asked))
            lines, fault = judge(asked, told)
        except (Refused, OSError) as e:
            print(f"check.py: {e}", file=sys.stderr)
            return 2
        for name, wrong, words in lines:
            print(f"{name:16}{'WRONG' if wrong else 'ok':7}{words}")
        print(f"wrong: {fault}" if fault else "no fault found", end="; ")
        print(f"a right program is called wrong in one of {1 / FALSE_ALARM:,.0f} runs")
        return 1 if fault else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
