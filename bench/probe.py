"""How likely the first drafted token is kept, by who chose the layers: the dynamic program, by
probes of several lengths, one set for every text, or chance.

    python bench/probe.py --model DIR --questions FILE --layers 4,8

The full model continues each prompt greedily and at temperature 1. For every token of its texts the
one drafted next is held against what the full model has to say: sum(min(p, q)), greedily 1 or 0.
The dynamic program chooses anew every 16 tokens. Every third prompt is kept back for the one set:
from it, the layer whose loss costs least is left out, then the next, until there are enough.
"""
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import clasp_mini  # noqa: E402
from bench.spec_bench import first_turns, job_for, read_questions  # noqa: E402
from dp_layer_skip import choose_skip, torch  # noqa: E402
from llama import Cache, Llama  # noqa: E402
from speculative import Settings, overlap, probabilities, read  # noqa: E402
from command.cli import UsageError, answer, numbers  # noqa: E402
from text.costs import chosen  # noqa: E402
from command.report import ids_of  # noqa: E402
from torch import Tensor  # noqa: E402

PROBES, EVERY, RANDOM = (1, 4, 16, 64), 16, 8          # tokens, tokens between two, sets
Skip = tuple[bool, ...]


def first_tokens(model: Llama, cache: Cache, ids: Tensor, t: int
                 ) -> tuple[Tensor, Tensor, Callable[[Skip], Tensor]]:
    """The full model's logits (n, V) and states (L+1, n, D) at n tokens of a text from t on, and
    for any set the logits (n, V) of a draft that begins with each. Such a token reads the full
    model's entries of those before it, and its own: as one candidate of the dynamic program."""
    n = len(ids)
    p, h = model.forward(ids, cache.sequence(t, n), cache, last=n, states=True)
    return p, h, lambda skip: model.forward(
        ids, cache.candidates(t + n - 1, 1, n), cache, skip, last=n)[0]


def one_set(model: Llama, texts: Sequence[tuple[list[int], list[int]]], M: int,
            s: Settings) -> list[int]:
    """M layers in the order in which they are left out; texts are (prompt, its continuation)."""
    kept, out = [], []
    for prompt, new in texts:
        cache, ids = model.cache(len(prompt) + 2 * len(new)), torch.tensor(new)
        read(model, prompt, 0, cache)
        p, _, draft = first_tokens(model, cache, ids, len(prompt))
        kept.append(lambda skip, p=probabilities(p, s), draft=draft:
                    overlap(p, probabilities(draft(skip), s)).mean().item())

    def score(i: int) -> float:
        return sum(of(flags(model.cfg.L, [*out, i])) for of in kept)
    while len(out) < M:
        out.append(max((i for i in range(model.cfg.L) if i not in out), key=score))
    return out


def flags(L: int, out: Sequence[int]) -> Skip:
    return tuple(i in out for i in range(L))


def walk(model: Llama, prompt: list[int], new: list[int], budgets: Sequence[int], s: Settings,
         sets: dict[str, dict[int, list[Skip]]]) -> Iterator[tuple[str, int, list[float]]]:
    """(who, budget, a value per token and set), for the dynamic program and for `sets`, of each who
    by budget."""
    r, M, t = max(PROBES), max(budgets), len(prompt)
    cache = model.cache(t + len(new) + (M + 1) * r)
    _, h = read(model, prompt, 0, cache, r, states=True)
    for ids in torch.tensor(new).split(EVERY):
        choices = {r: chosen(model, choose_skip, cache, h[:, -r:], t - 1, M) for r in PROBES}
        programs = {f"the dynamic program, {r} token(s)": {j: [c.skip(j)] for j in budgets}
                    for r, c in choices.items()}
        p, states, draft = first_tokens(model, cache, ids, t)
        p = probabilities(p, s)
        for who, by_budget in (programs | sets).items():
            for j in budgets:
                yield who, j, [x for skip in by_budget[j] for x in
                               overlap(p, probabilities(draft(skip), s)).tolist()]
        h, t = torch.cat((h, states), 1)[:, -max(PROBES):], t + len(ids)


@torch.inference_mode()
def measured(job: clasp_mini.Job, prompts: list[list[int]], budgets: Sequence[int]
             ) -> dict[str, dict[int, tuple[list[float], list[float]]]]:
    """who -> budget -> its values greedily and at temperature 1, one per token and set."""
    L, model, found = job.cfg.L, job.model, {}

    def texts(prompts: list[list[int]], s: Settings) -> list[tuple[list[int], list[int]]]:
        return [(ids, ids_of(job.run(ids, s, job.a.seed))) for ids in prompts]

    greedy, sampled = (replace(job.settings, temperature=t) for t in (0.0, 1.0))
    calibration = texts(prompts[2::3], sampled)
    order = one_set(model, calibration, max(budgets), sampled)
    print(f"one set, in this order: {','.join(map(str, order))}", file=sys.stderr, flush=True)
    drawn = {j: [flags(L, random.Random(n).sample(range(L), j)) for n in range(RANDOM)]
             for j in budgets}
    sets = {"one set": {j: [flags(L, order[:j])] for j in budgets}, f"{RANDOM} random sets": drawn}
    for column, s in enumerate((greedy, sampled)):
        for prompt, new in texts([ids for n, ids in enumerate(prompts) if n % 3 != 2], s):
            for who, j, values in walk(model, prompt, new, budgets, s, sets):
                found.setdefault(who, {}).setdefault(j, ([], []))[column].extend(values)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = clasp_mini.parser()
        p.usage, p.description = "python bench/%(prog)s [flags]", __doc__.partition(":")[0]
        p.add_argument("--layers", type=numbers, metavar="M,..", help="left out (L/8 and L/4)")
        p.add_argument("--questions", default=clasp_mini.DEMO / "prompts.jsonl", metavar="FILE",
                       help="in Spec-Bench's format, or token ids (the demo's)")
        a = p.parse_args(argv)
        a.eager, a.strategy = True, "ar"               # the texts are the full model's
        questions = read_questions(a.questions)
        job = job_for(a, questions)
        budgets = sorted(set(a.layers or (job.cfg.L // 8, job.cfg.L // 4)))
        if not 0 < budgets[0] <= budgets[-1] <= job.cfg.L:
            raise UsageError(f"--layers: the model has {job.cfg.L}")
        prompts = first_turns(job, questions)
        if len(prompts) < 3:
            raise UsageError(f"{a.questions}: three questions at least, one is for the one set")
        found = measured(job.load(), prompts, budgets)
        print(f"{'left out of ' + str(job.cfg.L):<34}" + "".join(f"{j:>15}" for j in budgets))
        for who, by in found.items():
            cells = (["%.3f" % statistics.mean(values) for values in by[j]] for j in budgets)
            print(f"{who:<34}" + "".join(f"{'/'.join(cell):>15}" for cell in cells))
        greedy, sampled = map(len, found["one set"][budgets[0]])
        print(f"means over {greedy} tokens written greedily and {sampled} at temperature 1")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
