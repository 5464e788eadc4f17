"""Plain decoding and CLaSp on every question of a file in Spec-Bench's format: a line per category,
as in the paper's Table 1. Takes every flag of the main command that says how to decode.

    python bench/spec_bench.py demo/prompts.jsonl
    python bench/spec_bench.py question.jsonl --model Meta-Llama-3-8B-Instruct --chat

Later turns of a question see the earlier ones and plain decoding's answers to them. What does not
fit into the model's context is left out and named. Ctrl-C ends with the table so far.
"""
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench.questions import Questions, encoded, job_for, parser, read_questions  # noqa: E402
from clasp_mini import pair  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.job import Job  # noqa: E402
from command.report import figures, ideal_speedup, ids_of  # noqa: E402
from speculative import Round  # noqa: E402


def answers(job: Job, questions: Questions) -> Iterator[tuple[str, list[Round], list[Round]]]:
    """The category, the plain run and CLaSp's of every turn that fits."""
    warm = False
    for n, (category, turns) in enumerate(questions, 1):
        messages: list[dict] = []
        for turn in turns:
            messages.append(dict(role="user", content=turn))
            try:
                ids = encoded(job, messages)
            except UsageError as e:
                print(f"question {n} left out: {e}", file=sys.stderr)
                break
            if not warm:
                pair(job, ids, job.a.seed)             # not counted
                warm = True
            plain, clasp = pair(job, ids, job.a.seed)
            yield category, plain, clasp
            if isinstance(turn, str):                  # ids are all of their question
                said = job.tokenizer.decode([i for i in ids_of(plain) if i not in job.stops])
                messages.append(dict(role="assistant", content=said))


def line(pairs: Sequence[tuple[dict, dict]]) -> dict:
    """What (plain, CLaSp) figures of some answers come to: counts over all their tokens, the
    speed-up and its ideal as ratios of the rates over all of them. The token of the prefill, one
    per answer, is not decoded."""
    def total(side: int, key: str) -> float:
        return sum(pair[side][key] for pair in pairs)

    decoded = [total(side, "emitted") - len(pairs) for side in range(2)]
    rate = [over(decoded[side], total(side, "decode_seconds")) for side in range(2)]
    ideal = [(clasp["emitted"] - 1, ideal_speedup(clasp, plain)) for plain, clasp in pairs]
    tokens = sum(n for n, x in ideal if x)
    steps = sum(n / x for n, x in ideal if x)          # plain steps that the ideal runs take
    return dict(answers=len(pairs), tokens_per_verify=over(decoded[1], total(1, "verifies")),
                acceptance=over(total(1, "accepted"), total(1, "drafted")),
                speedup=over(rate[1], rate[0]), ideal_speedup=over(tokens, steps))


def over(x: float | None, y: float | None) -> float | None:
    return x / y if x is not None and y else None


def table(lines: dict[str, dict]) -> str:
    """The lines in columns; - where nothing was decoded or drafted."""
    widths = dict(tokens_per_verify=13, acceptance=10, speedup=8, ideal_speedup=6)
    out = [f"{'category':<16} answers tokens/verify acceptance speed-up  ideal"]
    for name, of in lines.items():
        values = {key: "-" if of[key] is None else f"{of[key]:.2f}" for key in widths}
        cells = "".join(f" {values[key]:>{width}}" for key, width in widths.items())
        out.append(f"{name:<16} {of['answers']:7}{cells}")
    return "\n".join(out)


def bench(job: Job, questions: Questions) -> int:
    """Ask, and print the table; the exit status."""
    pairs: dict[str, list[tuple[dict, dict]]] = {}
    status = 0
    try:
        for category, plain, clasp in answers(job, questions):
            pairs.setdefault(category, []).append((figures(plain), figures(clasp)))
    except KeyboardInterrupt:                          # what has been measured so far is kept
        if not pairs:
            raise
        status = 130
    if not pairs:
        raise UsageError("no question fits")
    lines = {category: line(of) for category, of in pairs.items()}
    lines["overall"] = line([pair for of in pairs.values() for pair in of])
    print(json.dumps(dict(settings=job.report(), categories=lines)) if job.a.json else table(lines))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = parser("FILE [flags]", __doc__.partition(":")[0])
        p.add_argument("file", metavar="FILE", help="questions in Spec-Bench's format")
        a = p.parse_args(argv)
        if a.system is not None and not a.chat:
            raise UsageError("--system goes with --chat")
        if a.prompt is not None or a.prompt_ids or a.strategy == "ar" or a.verbose or a.trace:
            raise UsageError("the file holds the prompts, and both kinds of decoding are run: "
                             "without --prompt, --prompt-ids, --strategy ar, --verbose, --trace")
        questions = read_questions(a.file)
        return bench(job_for(a, questions).load(), questions)
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
