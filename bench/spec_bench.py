"""Plain decoding and CLaSp on every question of a file in Spec-Bench's format: a line per category,
as in the paper's Table 1. Takes every flag of the main command that says how to decode.

    python bench/spec_bench.py                                      # the demo and its prompts
    python bench/spec_bench.py question.jsonl --model Meta-Llama-3-8B-Instruct --chat

Later turns of a question see the earlier ones and plain decoding's answers to them. What does not
fit into the model's context is left out and named. Ctrl-C ends with the table so far.
"""
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from clasp_mini import run  # noqa: E402
from command.cli import UsageError, answered, say, told  # noqa: E402
from command.compare import pair  # noqa: E402
from command.flags import DEMO, parsed, parser  # noqa: E402
from command.job import Job  # noqa: E402
from command.report import figures, ideal_speedup, ids_of  # noqa: E402
from policy import costs  # noqa: E402
from speculative import Round  # noqa: E402

Questions = list[tuple[str, list[str] | list[list[int]]]]   # the category and the turns of each
COLUMNS = dict(tokens_per_verify="tokens/verify", acceptance="acceptance", speedup="speed-up",
               ideal_speedup=" ideal", counted="counted")               # what a line says


# ------------------------------------------------------ a file of questions, for all tools here

def opened(description: str, argv: Sequence[str] | None, **defaults: Any) -> tuple[Job, Questions]:
    """A model whose weights are not yet read, and the questions for it, by the main command's flags
    and a file. Where all questions are token ids it needs no tokenizer."""
    p = parser()
    p.usage = "python bench/%(prog)s [FILE] [flags]"
    p.description = description
    p.add_argument("file", nargs="?", default=DEMO / "prompts.jsonl", metavar="FILE",
                   help="questions in Spec-Bench's format, or token ids")
    p.set_defaults(temperature=0.0, seed=0, **defaults)     # the prompts are not the model's own
    a = parsed(argv, p)
    if a.prompt is not None or a.prompt_ids or a.compare or a.verbose or a.trace:
        raise UsageError("a file holds the prompts, and no text is shown: without --prompt, "
                         "--prompt-ids, --compare, --verbose, --trace")
    questions = read_questions(a.file) if a.file else []
    if not a.chat and all(is_ids(turn) for _, turns in questions for turn in turns):
        a.prompt_ids = [0]
    return Job(a), questions


def read_questions(path: str | Path) -> Questions:
    """A JSON object with `category` and `turns` per line; or `ids`, one turn of token ids."""
    questions = []
    try:
        # split, as splitlines would also break a line at U+2028 and U+0085, which JSON leaves as is
        for line in Path(path).read_text(encoding="utf-8-sig").split("\n"):
            if line.strip():
                q = json.loads(line)
                turns = [q["ids"]] if "ids" in q else q["turns"]
                if not isinstance(turns, list) or not all(
                        isinstance(turn, str) or is_ids(turn) for turn in turns):
                    raise TypeError("turns is not a list of texts, nor ids one of token ids")
                questions.append((str(q["category"]), turns))
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path}: not a Spec-Bench file, a JSON object with category and turns "
                         f"per line ({e!r})") from None
    if not any(turns for _, turns in questions):
        raise UsageError(f"{path}: no questions")
    return questions


def is_ids(turn: object) -> bool:
    return isinstance(turn, list) and turn and all(type(i) is int and i >= 0 for i in turn)


def encoded(job: Job, messages: list[dict]) -> list[int]:
    """A conversation up to the last turn, checked; where that is ids, these."""
    last = messages[-1]["content"]
    return job.fits(last if isinstance(last, list) else job.encode(messages))


def first_turns(job: Job, questions: Questions) -> list[tuple[str, list[int]]]:
    """(category, ids) of each question's first turn."""
    return [(category, encoded(job, [dict(role="user", content=turns[0])]))
            for category, turns in questions if turns]


# ------------------------------------------------------------------------------ the bench

def answers(job: Job, questions: Questions) -> Iterator[tuple[str, list[Round], list[Round]]]:
    """The category, the plain run and CLaSp's of every turn that fits."""
    warm = False
    for n, (category, turns) in enumerate(told(questions, "question"), 1):
        messages: list[dict] = []
        for turn in turns:
            messages.append(dict(role="user", content=turn))
            try:
                ids = encoded(job, messages)
            except UsageError as e:
                say(f"question {n} left out: {e}")
                break
            if not warm:
                pair(job, ids, job.flags.seed, run)        # not counted
                warm = True
            plain, clasp = pair(job, ids, job.flags.seed, run)
            yield category, plain, clasp
            if isinstance(turn, str):                  # ids are all of their question
                said = job.tokenizer.decode([i for i in ids_of(plain) if i not in job.stops])
                messages.append(dict(role="assistant", content=said))


def plain_steps(rounds: Sequence[Round], table: dict[str, Any]) -> float:
    """What a run's passes come to by a table of costs. Of the prefill its choice alone counts."""
    steps = 0.0
    for n, r in enumerate(rounds):
        if n > 0:
            k = len(r.drafted)
            steps += k * table["draft"][sum(r.skip)] + table["verify"][k + 1]
        if r.choice:
            steps += table["optimise"]
    return steps


def line(pairs: Sequence[tuple[dict, dict]]) -> dict:
    """What (plain, CLaSp) figures of some answers come to: counts over all tokens, the speed-up and
    its ideal as ratios of rates over all. The prefill's token, one per answer, is not decoded."""
    def total(side: int, key: str) -> float:
        return sum(pair[side][key] for pair in pairs)

    decoded = [total(side, "emitted") - len(pairs) for side in range(2)]
    rate = [over(decoded[side], total(side, "decode_seconds")) for side in range(2)]
    ideal = [(clasp["emitted"] - 1, ideal_speedup(clasp, plain)) for plain, clasp in pairs]
    tokens = sum(n for n, x in ideal if x)
    steps = sum(n / x for n, x in ideal if x)          # plain steps that the ideal runs take
    return dict(answers=len(pairs), tokens_per_verify=over(decoded[1], total(1, "verifies")),
                acceptance=over(total(1, "accepted"), total(1, "drafted")),
                speedup=over(rate[1], rate[0]), ideal_speedup=over(tokens, steps),
                counted=over(decoded[1], total(1, "plain_steps")))


def over(x: float | None, y: float | None) -> float | None:
    return x / y if x is not None and y else None


def table(lines: dict[str, dict]) -> str:
    """The lines in columns; - where nothing was decoded or drafted, or no costs are known."""
    out = [f"{'category':<18} answers {' '.join(COLUMNS.values())}"]
    for name, of in lines.items():
        values = {key: "-" if of[key] is None else f"{of[key]:.2f}" for key in COLUMNS}
        cells = " ".join(f"{values[key]:>{len(title)}}" for key, title in COLUMNS.items())
        out.append(f"{name:<18} {of['answers']:7} {cells}")
    return "\n".join(out)


def bench(job: Job, questions: Questions) -> int:
    """Ask, and print the table; the exit status."""
    known = job.costs or job.known_costs()
    weights = None if job.costs_guessed else costs.load(known, job.cfg.L, job.K)
    pairs: dict[str, list[tuple[dict, dict]]] = {}
    status = 0
    try:
        for category, plain, clasp in answers(job, questions):
            steps = plain_steps(clasp, weights) if weights else 0.0
            pairs.setdefault(category, []).append(
                (figures(plain), figures(clasp) | dict(plain_steps=steps)))
    except KeyboardInterrupt:                          # what has been measured so far is kept
        if not pairs:
            raise
        status = 130
    if not pairs:
        raise UsageError("no question fits")
    lines = {category: line(of) for category, of in pairs.items()}
    lines["overall"] = line([pair for of in pairs.values() for pair in of])
    if job.flags.json:
        print(json.dumps(dict(settings=job.report(), categories=lines)))
    else:
        print(table(lines))
    return status


@answered
def main(argv: Sequence[str] | None = None) -> int:
    job, questions = opened(__doc__.partition(":")[0], argv)
    if job.flags.strategy == "ar":
        raise UsageError("both kinds of decoding are run: without --strategy ar")
    return bench(job.load(), questions)


if __name__ == "__main__":
    sys.exit(main())
