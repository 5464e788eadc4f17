"""Plain decoding and CLaSp on every question of a file in Spec-Bench's format: a line per category,
as in the paper's Table 1. Takes every flag of the main command that says how to decode.

    python bench/spec_bench.py demo/prompts.jsonl
    python bench/spec_bench.py question.jsonl --model Meta-Llama-3-8B-Instruct --chat

Later turns of a question see the earlier ones and plain decoding's answers to them. What does not
fit into the model's context is left out and named. Ctrl-C ends with the table so far.
"""
import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import clasp_mini  # noqa: E402
from speculative import Round  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.report import figures, ideal_speedup, ids_of  # noqa: E402

Questions = list[tuple[str, list[str] | list[list[int]]]]  # (category, turns) of each


def read_questions(path: str | Path) -> Questions:
    """A JSON object with `category` and `turns` per line; or `ids`, one turn of token ids."""
    try:
        # split, as splitlines would also break a line at U+2028 and U+0085, which JSON leaves as is
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        questions = [json.loads(line) for line in lines if line.strip()]
        questions = [(str(q["category"]), [q["ids"]] if "ids" in q else q["turns"])
                     for q in questions]
        if not all(isinstance(turns, list) and all(isinstance(turn, str) or is_ids(turn)
                                                   for turn in turns) for _, turns in questions):
            raise TypeError("turns is not a list of texts")
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path}: not a Spec-Bench file, a JSON object with category and turns "
                         f"per line ({e!r})") from None
    if not any(turns for _, turns in questions):
        raise UsageError(f"{path}: no questions")
    return questions


def is_ids(turn: object) -> bool:
    return isinstance(turn, list) and turn and all(type(i) is int and i >= 0 for i in turn)


def job_for(a: argparse.Namespace, questions: Questions) -> clasp_mini.Job:
    """The model, which needs a tokenizer if some question is a text."""
    if not a.chat and all(is_ids(turn) for _, turns in questions for turn in turns):
        a.prompt_ids = [0]
    return clasp_mini.Job(a)


def encoded(job: clasp_mini.Job, messages: list[dict]) -> list[int]:
    """A conversation up to the last turn, checked; where that is ids, these."""
    last = messages[-1]["content"]
    return job.fits(last if isinstance(last, list) else job.encode(messages))


def first_turns(job: clasp_mini.Job, questions: Questions) -> list[list[int]]:
    """The ids of each question's first turn."""
    return [encoded(job, [dict(role="user", content=turns[0])]) for _, turns in questions if turns]


def answers(job: clasp_mini.Job, questions: Questions
            ) -> Iterator[tuple[str, list[Round], list[Round]]]:
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
                job.pair(ids, job.a.seed)              # not counted
                warm = True
            plain, clasp = job.pair(ids, job.a.seed)
            yield category, plain, clasp
            if isinstance(turn, str):                  # ids are all of their question
                said = job.tokenizer.decode([i for i in ids_of(plain) if i not in job.stops])
                messages.append(dict(role="assistant", content=said))
        if sys.stderr.isatty():
            print(f"\r{n} of {len(questions)}", end="\n" * (n == len(questions)), file=sys.stderr,
                  flush=True)


def line(pairs: Sequence[tuple[dict, dict]]) -> dict:
    """What (plain, CLaSp) figures of some answers come to: counts over all their tokens, the
    speed-up and its ideal as ratios of the rates over all of them. The token of the prefill, one
    per answer, is not decoded."""
    def total(side: int, key: str) -> float:
        return sum(pair[side][key] for pair in pairs)

    def over(x: float | None, y: float | None) -> float | None:
        return x / y if x is not None and y else None

    decoded = [total(side, "emitted") - len(pairs) for side in range(2)]
    rate = [over(decoded[side], total(side, "decode_seconds")) for side in range(2)]
    ideal = [(clasp["emitted"] - 1, i) for plain, clasp in pairs
             if (i := ideal_speedup(clasp, plain))]
    return dict(answers=len(pairs), tokens_per_verify=over(decoded[1], total(1, "verifies")),
                acceptance=over(total(1, "accepted"), total(1, "drafted")),
                speedup=over(rate[1], rate[0]),
                ideal_speedup=over(sum(w for w, _ in ideal), sum(w / i for w, i in ideal)))


def table(lines: dict[str, dict]) -> str:
    """The lines in columns; - where nothing was decoded or drafted."""
    out = [f"{'category':<16} answers tokens/verify acceptance speed-up  ideal"]
    for name, of in lines.items():
        cells = (f" {'-' if of[key] is None else format(of[key], '.2f'):>{width}}"
                 for key, width in dict(tokens_per_verify=13, acceptance=10, speedup=8,
                                        ideal_speedup=6).items())
        out.append(f"{name:<16} {of['answers']:7}{''.join(cells)}")
    return "\n".join(out)


def bench(job: clasp_mini.Job, questions: Questions) -> int:
    """Ask, and print the table; the exit status."""
    pairs: dict[str, list[tuple[dict, dict]]] = {}
    status = 0
    try:
        for category, plain, clasp in answers(job, questions):
            pairs.setdefault(category, []).append((figures(plain), figures(clasp)))
    except KeyboardInterrupt:                          # what has been measured so far is kept
        status = 130
    if not pairs:
        if status:
            raise KeyboardInterrupt
        raise UsageError("no question fits")
    lines = {category: line(of) for category, of in pairs.items()}
    lines["overall"] = line([pair for of in pairs.values() for pair in of])
    print(json.dumps(dict(settings=job.report(), categories=lines)) if job.a.json else table(lines))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = clasp_mini.parser()
        p.usage, p.description = "python bench/%(prog)s FILE [flags]", __doc__.partition(":")[0]
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
