"""What the oracle promises: right traces pass, wrong ones are found where they are wrong, and the
vectors show what TRACE.md says they do.

Traces are written by the command and judged by the checker's own `main`. Most are of a random model
of five layers, whose seeds are looked for until all that can happen in a round happens.
"""
import gc
import inspect
import io
import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import clasp_mini
import dp_layer_skip
import llama
import speculative
from dp_layer_skip import choose_skip, torch
from llama import Config, Llama, Tensor, safe_open
from oracle import check_trace, compare_dumps, dump_forward, make_vectors, trace
from oracle.check_trace import NUMERIC, TOLERANCE
from tests.slow_llama import (IDS, INDEX, random_checkpoint, reference, reference_frequencies,
                               reference_norm, sizes)
from oracle.survey import repeated
from oracle.trace import Recording, by_round, write_trace
from tests.wrong_programs import WRONG, altered
from speculative import Chance, Settings
from text.safetensors_file import save

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
ROOT, VECTORS, TINY = HERE.parent, HERE / "vectors", HERE / "tiny"
DEMO = ROOT / "demo"
RUNS = {p.stem: [json.loads(x) for x in p.read_text().splitlines()]
        for p in sorted(VECTORS.glob("*.jsonl"))}


def source(name):
    """The model that a vector is of."""
    return TINY if name.startswith("tiny") else DEMO


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    random_checkpoint(folder, dict(num_hidden_layers=5))
    return folder


@pytest.fixture
def check(capsys, random_model, tmp_path):
    """check(lines or bytes, *arguments) -> (exit status, stdout, stderr) of the checker."""
    def call(lines, *arguments, model=random_model):
        path = tmp_path / "checked.jsonl"
        path.write_bytes(lines if isinstance(lines, bytes) else jsonl(*lines))
        capsys.readouterr()
        status = check_trace.main([str(path), "--model", str(model), *map(str, arguments)])
        out = capsys.readouterr()
        return status, out.out.replace(f"{path}: ", ""), out.err
    return call


def jsonl(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def traced(folder, path, *arguments):
    """The lines of a trace, without those of times."""
    assert clasp_mini.main(["--model", str(folder), "--device", "cpu", "--trace", str(path),
                            *map(str, arguments)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] != "times"]


def find(lines, event, n=0, **want):
    """The index of the n-th such line; a wanted value may be a function that says yes."""
    fit = [i for i, line in enumerate(lines) if line["event"] == event and all(
        w(line[k]) if callable(w) else line[k] == w for k, w in want.items())]
    return fit[n] if fit[n:] else None


def copied(lines):
    return json.loads(json.dumps(lines))


FOURTH = dict(step=3, confidence=lambda c: c > 0.06, round=lambda n: n < 4)    # K ends the draft
SITUATIONS = [("own", dict(kind="residual")), ("own", dict(kind="bonus")),
              ("optimise", dict(round=3)), ("verify", dict(accepted=None)),
              ("draft", FOURTH), ("verify", dict(accepted=True, a=lambda a: a < 0.9))]
LIVELY = ("--max-new-tokens", 24, "--skip-layers", 2, "--draft-length", 4, "--interval", 3,
          "--draft-exit-threshold", 0.05, "--temperature", 0.5, "--prompt-ids", "3,41,7")
KNOBS = ("--skip-layers", 2, "--draft-length", 4, "--interval", 16, "--draft-exit-threshold", 0.1)


@pytest.fixture(scope="module")
def lively(random_model, tmp_path_factory):
    """The lines of a sampled trace in which everything happens."""
    path = tmp_path_factory.mktemp("lively") / "t"
    for seed in range(50):
        lines = traced(random_model, path, *LIVELY, "--seed", seed)
        if all(find(lines, event, **want) is not None for event, want in SITUATIONS):
            return lines
    raise AssertionError("50 seeds without a lively run")


# ---------------------------------------------------------------- what is right passes

@pytest.mark.parametrize("sampled", [[], ["--temperature", 1, "--top-k", 40, "--top-p", 0.9]],
                         ids=["greedy", "sampled"])
def test_a_trace_of_the_demo_checks_clean_in_its_precision_and_in_a_wider_one(
        sampled, check, tmp_path):
    """Rejects a checker that raises false alarms, and a tolerance below what rounding does."""
    lines = traced(DEMO, tmp_path / "t", "--prompt", "class A:", "--max-new-tokens", 24, *sampled)
    for dtype in ("float32", "float64"):
        status, out, err = check(lines, "--dtype", dtype, model=DEMO)
        assert (status, err) == (0, "") and re.match("no departure in [0-9]+ rounds, 24 tok", out)


@pytest.mark.parametrize("flags", [
    ("--temperature", 1, "--top-k", 5), ("--temperature", 0.7, "--top-p", 0.6), (),
    ("--strategy", "ar", "--temperature", 1), ("--temperature", 1, "--skip-layers", 0),
    ("--temperature", 1, "--skip-layers", 5, "--interval", 1), ("--dtype", "float64"),
    ("--dtype", "bfloat16", "--temperature", 1, "--top-p", 0.9),
    ("--dtype", "bfloat16", "--temperature", 0.6), ("--prompt-ids", "3,41,7," * 200)],
    ids=lambda flags: " ".join(map(str, flags))[:40])
def test_traces_check_clean_at_every_setting(flags, check, tmp_path, random_model):
    """Rejects a rule that is too strict for some sampler, K, M, dtype or long prompt."""
    base = ("--prompt-ids", "3,41,7", "--max-new-tokens", 30, *KNOBS)
    lines = traced(random_model, tmp_path / "t", *base, *flags, "--seed", 2)
    assert check(lines)[::2] == check(lines, "--dtype", "float64")[::2] == (0, "")


COSTS = dict(draft=[1.0] + [0.1] * 6, verify=[1.0] * 8)
OPEN = dict.fromkeys(("K", "M", "exit_threshold", "interval"))


@pytest.mark.parametrize("named", [{}, dict(K=3), dict(M=2), dict(exit_threshold=0.1),
                                   dict(interval=3)], ids=str)
def test_traces_of_a_policy_check_clean(named, check):
    """Rejects a checker that knows the paper's loop alone."""
    s = Settings(N=60, temperature=0.2, **OPEN | named)
    out = trace_of((trace, choose_skip, Llama), TINY, [3, 41, 7], s, costs=COSTS)
    for dtype in ("float32", "float64"):
        assert check(out, "--dtype", dtype, model=TINY)[::2] == (0, "")


def test_what_a_policy_says_must_be_so_and_what_the_settings_name_holds(check):
    """Rejects a checker that lets a policy skip a set of no table, claim an end that was none, or
    depart from a K, an M, a threshold or an interval that the settings name."""
    s = Settings(N=60, temperature=0.2, **OPEN | dict(interval=4))
    out = trace_of((trace, choose_skip, Llama), TINY, [3, 41, 7], s, costs=COSTS)
    lines = [x for x in map(json.loads, out.splitlines()) if x["event"] != "times"]
    i = find(lines, "round", skip=lambda layers: layers, ended="policy")
    for rule, field, value in (
            ("skip", "skip", another(lines[i]["skip"])), ("exit", "ended", "N"),
            ("exit", "ended", "confidence"), ("exit", "ended", "stop")):
        said = check([*lines[:i], lines[i] | {field: value}, *lines[i + 1:]], model=TINY)[1]
        assert f"line {i + 1}, " in said and f"rule {rule}" in said, said
    rounds = by_round(lines)
    longest = max(len(r["draft"]) for r in rounds)
    least = max(d["confidence"] for r in rounds for d in r["draft"][:-1])
    assert longest > 2 and sum(bool(r["optimise"]) for r in rounds) > 1
    for rule, field, value in (("exit", "K", longest - 1), ("exit", "exit_threshold", least - 1e-3),
                               ("(skip|table)", "M", 5), ("interval", "interval", 50)):
        settings = lines[0]["settings"] | {field: value}
        said = check([lines[0] | dict(settings=settings), *lines[1:]], model=TINY)[1]
        assert re.search(f"rule {rule}", said), (field, said)


@pytest.mark.parametrize("prompt, r", [([3, 41, 7], 2), ([3], 5), ([3, 41] * 257, 3)], ids=str)
def test_traces_of_a_probe_of_several_tokens_check_clean(prompt, r, check, random_model):
    """Rejects a checker that takes other tokens than the last r accepted ones, or r of them where
    the text, or the last part of a long prompt, has fewer."""
    s = Settings(N=20, K=3, M=2, interval=2, r=r, temperature=0.5)
    out = trace_of((trace, choose_skip, Llama), random_model, prompt, s)
    assert check(out)[::2] == check(out, "--dtype", "float64")[::2] == (0, "")


def test_a_set_of_another_budget_is_a_departure_where_m_is_given(check, lively):
    """Rejects a checker that takes any set of the last table, as of a policy's."""
    i = find(lively, "round", skip=lambda layers: layers)
    parents, j, skip = lively[find(lively, "optimise")]["parents"], 1, []
    for layer in range(4, -1, -1):
        skip, j = ([layer], 0) if parents[layer + 1][j] == "1" and j else (skip, j)
    status, out, _ = check([*lively[:i], lively[i] | dict(skip=skip), *lively[i + 1:]])
    assert status == 1 and f"line {i + 1}, " in out and "rule skip" in out


def test_the_trace_that_is_corrupted_below_is_clean_and_lively(check, lively):
    """Rejects a table of corruptions whose every line fails for another reason."""
    assert check(lively)[::2] == (0, "")
    assert check(lively, "--dtype", "float64")[::2] == (0, "")


def test_one_seed_gives_the_same_bytes_but_for_the_times(random_model, tmp_path):
    """Rejects a date, an address or an unordered set in a trace."""
    texts = []
    for name in ("a", "b"):
        traced(random_model, tmp_path / name, *LIVELY)
        lines = (tmp_path / name).read_bytes().splitlines()
        texts.append([line for line in lines if b'"event":"times"' not in line])
        assert len(lines) > len(texts[-1])
    assert texts[0] == texts[1]


def test_tracing_changes_no_token(random_model, lively):
    """Rejects a recording that draws, or asks chance, once more."""
    s = lively[0]["settings"] | dict(stop_ids=())
    chance, s = Chance(s["seed"]), Settings(**{k: s[k] for k in s if k != "seed"})
    run = speculative.generate(Llama.load(random_model), [3, 41, 7], s, chance, choose_skip)
    assert [x["tokens"] for x in lively if x["event"] == "emit"] == [r.emitted for r in run]


def test_a_trace_is_whole_lines_after_every_round_and_keeps_no_distributions(random_model,
                                                                             tmp_path):
    """Rejects lines that wait in a buffer, and a log that grows with the run: the vectors of p and
    q must go with their round."""
    model, sizes, path = Llama.load(random_model), [], tmp_path / "t"
    s = Settings(N=200, K=4, M=2, temperature=1.0)
    with open(path, "w") as out:
        run = write_trace(model, [3], s, Recording(Chance(0).uniform), choose_skip, out,
                          dict(model={}, versions={}))
        for n, r in enumerate(run):
            if n in (5, 40):
                sizes.append(sum(type(o) is Tensor for o in gc.get_objects()))
            if n == 5:
                text = path.read_text()
                last = [json.loads(x) for x in text.splitlines()][-2:]
                assert text.endswith("\n") and [x["event"] for x in last][-1] == "times"
                assert all(x["round"] == n for x in last)
    assert sizes[1] - sizes[0] < 40


@pytest.mark.parametrize("where", ["at N", "drafted, before a stop as bonus"])
def test_a_stop_token_ends_the_text_for_that_reason_wherever_it_stands(where, check, random_model,
                                                                       tmp_path):
    """Rejects "length" for a stop that is the N-th token, in a trace and in the checker, and a
    false alarm where both an accepted token and the bonus after it are stops."""
    def run(**fields):
        out = io.StringIO()
        s = Settings(**dict(temperature=0.5, N=12) | fields)
        for _ in write_trace(model, [3, 41, 7], s, Recording(Chance(0).uniform), choose_skip, out,
                             about):
            pass
        lines = [json.loads(x) for x in out.getvalue().splitlines()]
        return lines, [i for r in by_round(lines) for i in r["emit"][0]["tokens"]]

    model, about = Llama.load(random_model), trace.about(random_model)
    if where == "at N":
        text = run()[1]
        N = text.index(text[-1]) + 1
        lines, text = run(N=N, stop_ids=(text[-1],))
        assert len(text) == N
        assert "rule end" in check([*lines[:-1], lines[-1] | dict(reason="length")])[1]
    else:      # a round's last draft and its bonus, neither of which had occurred before
        lines, text = run(K=4)
        for r in by_round(lines)[1:]:
            before, pair = text[:r["round"][0]["start"] - 3], r["emit"][0]["tokens"][-2:]
            before += r["emit"][0]["tokens"][:-2]
            if len(pair) == 2 and not set(pair) & set(before):
                break
        lines, text = run(K=4, stop_ids=tuple(pair))
        assert text == [*before, pair[0]] and find(lines, "own", token=pair[1]) is not None
    assert lines[-1]["reason"] == "stop" and check(lines)[::2] == (0, "")


# ---------------------------------------------------------------- what is wrong is found

def change(event, n=0, where=None, line=None, **fields):
    """A corruption: `fields` of the n-th such line set; a function is given the old value."""
    def edit(lines):
        i = find(lines, event, n, **(where or {}))
        for name, new in fields.items():
            lines[i][name] = new(lines[i][name]) if callable(new) else new
        return line or i + 1
    return edit


def setting(name, new, line):
    """... of the header's settings; the line where it shows is another."""
    def edit(lines):
        old = lines[0]["settings"][name]
        lines[0]["settings"][name] = new(lines) if callable(new) else new
        assert lines[0]["settings"][name] != old
        return line(lines) if callable(line) else line
    return edit


def remove(event, n=0, **where):
    def edit(lines):
        i = find(lines, event, n, **where)
        del lines[i]
        return i + 1
    return edit


def insert(event, after, **where):
    """... a copy of the first line `event` after the first line `after` that is so."""
    def edit(lines):
        i = find(lines, after, **where)
        new = dict(lines[find(lines, event)])
        if "round" in new and "round" in lines[i]:
            new["round"] = lines[i]["round"]
        lines.insert(i + 1, new)
        return i + 2
    return edit


def in_table(edit):
    """... of the second table."""
    def harm(lines):
        i = find(lines, "optimise", 1)
        edit(lines[i])
        return i + 1
    return harm


def flip_parent(line):
    row = line["parents"][3]
    line["parents"][3] = row[0] + "10"[int(row[1])] + row[2:]


def another(layers):
    return sorted([*layers[1:], next(i for i in range(5) if i not in layers)])


def next_token(token):
    return (token + 1) % 50


def interleave(lines):
    """... draft and verify lines taken in turn, in a round with two drafts or more."""
    i = find(lines, "draft", step=1) - 1
    k = next(n for n, x in enumerate(lines[i:]) if x["event"] == "verify")
    lines[i:i + 2 * k] = [x for pair in zip(lines[i:i + k], lines[i + k:i + 2 * k]) for x in pair]
    return i + 2


JUDGED = dict(accepted=lambda v: v is not None, a=lambda a: a < 0.9)
UNJUDGED, RESIDUAL, BONUS = dict(accepted=None), dict(kind="residual"), dict(kind="bonus")
CORRUPTIONS = [                        # rule, what is done to the lines
    ("verdict", change("verify", where=JUDGED, accepted=lambda v: not v)),
    ("verdict", change("verify", where=dict(accepted=True), u=None)),
    ("verdict", change("verify", where=UNJUDGED, accepted=True, u=0.0)),
    ("verdict", change("verify", where=UNJUDGED, u=0.5)),
    ("q", change("draft", token=next_token)),
    ("draw", change("draft", 2, u=lambda u: (u + 0.5) % 1)),
    ("own", change("own", where=RESIDUAL, token=next_token)),
    ("draw", change("own", where=BONUS, u=lambda u: (u + 0.5) % 1)),
    ("draw", change("own", where=dict(kind="plain"), u=lambda u: (u + 0.5) % 1)),
    ("ratio", change("verify", where=JUDGED, a=lambda a: a * 0.999)),
    ("ratio", change("verify", where=dict(a=1.0), a=1.7)),
    ("ratio", change("verify", where=dict(a=1.0), q=lambda q: q * 0.999)),
    ("own", change("own", where=RESIDUAL, probability=lambda p: p + 1e-3)),
    ("own", change("own", where=BONUS, probability=lambda p: p + 1e-3)),
    ("kind", change("own", where=RESIDUAL, kind="bonus")),
    ("kind", change("own", where=BONUS, kind="plain")),
    ("skip", change("round", 2, skip=another)), ("skip", change("round", skip=[1])),
    ("start", change("round", 3, start=lambda n: n + 1)),
    ("order", change("draft", 2, step=lambda n: n + 1)),
    ("order", change("round", 2, round=lambda n: n + 1)),
    ("order", change("verify", 1, token=next_token)),
    ("order", remove("verify")), ("order", remove("own", 2)), ("order", remove("emit")),
    ("order", insert("own", "own")), ("order", interleave),
    ("exit", remove("draft", step=3)), ("exit", insert("draft", "draft", step=3)),
    ("emit", change("emit", 1, tokens=lambda t: [*t, 1])),
    ("emit", change("emit", where=dict(tokens=lambda t: len(t) > 1), tokens=lambda t: t[:-1])),
    ("interval", remove("optimise")), ("interval", remove("optimise", 1)),
    ("interval", insert("optimise", "emit", round=1)),
    ("probe", change("optimise", 1, position=lambda t: t + 1)),
    ("probe", change("optimise", position=lambda t: t - 1)),
    ("column", in_table(lambda x: x["D"][2].__setitem__(0, 0.999))),
    ("table", in_table(lambda x: x["D"].insert(3, x["D"].pop(4)))),
    ("table", in_table(lambda x: x["D"][3].pop())), ("table", change("optimise", M=3)),
    ("parent", in_table(lambda x: x["parents"].__setitem__(4, "1" + x["parents"][4][1:]))),
    ("path", change("optimise", 1, skip=another)),
    ("end", change("end", reason="stop")), ("end", change("end", emitted=23)),
    ("end", insert("round", "end")), ("end", insert("end", "emit", round=2)),
    ("own", setting("temperature", 0.6, 3)), ("own", setting("top_p", 0.5, 3)),
    ("own", change("header", line=3, prompt_ids=[3, 40, 7])),
    ("exit", setting("K", 3, lambda lines: find(lines, "draft", step=3) + 1)),
    ("exit", setting("K", 5, lambda lines: find(lines, "draft", **FOURTH) + 2)),
    ("exit", setting("exit_threshold", 0.9, lambda lines: find(lines, "draft", step=1) + 1)),
    ("interval", setting("interval", 2, lambda lines: find(lines, "emit", round=2) + 2)),
    ("interval", setting("stop_ids", lambda lines: lines[3]["tokens"], 5)),
    ("table", setting("M", 1, 5)),
    ("header", change("header", config=lambda c: c | dict(eps=1.00001e-5))),
    ("header", change("header", config=lambda c: c | dict(scaling=[8.0, 1.0, 4.0, 64]))),
]


@pytest.mark.parametrize("n", range(len(CORRUPTIONS)), ids=lambda n: f"{CORRUPTIONS[n][0]}-{n}")
def test_every_corruption_is_found_where_it_is(n, check, lively):
    """Rejects a checker that overlooks one wrong value, blames another line, or another rule."""
    (rule, corrupt), lines = CORRUPTIONS[n], copied(lively)
    where = corrupt(lines)
    status, out, err = check(lines)
    assert (status, err, out.count("\n")) == (1, "", 2)
    assert re.match(rf"line {where}, round \d+.*: .*: trace .*, ours .*\nrule {rule}", out), out


def test_a_departure_says_what_is_needed_to_understand_it(check, lively):
    """Rejects "here", of which nobody knows whose it is, a draft's end without its state, a wrong
    probability without what ours would draw, and interleaved lines called a draft's end."""
    def said(corrupt):
        corrupt(lines := copied(lively))
        return check(lines)[1]

    assert re.search(r"trace 'verify', ours 'draft' \(3 of at most 4 drafted, token \d+, "
                     r"confidence 0\.\d+, threshold 0.05\)", said(remove("draft", step=3)))
    assert re.search(r"q: trace 0\.\d+, ours 0\.\d+ \(tolerance 4e-05; ours draws token \d+ by thi",
                     said(change("draft", token=next_token)))
    assert "stand before its verify lines" in said(interleave)
    assert "sees" not in said(in_table(flip_parent))
    out = said(change("own", where=RESIDUAL, probability=lambda p: p + 1e-3))
    assert float(re.search("tolerance ([0-9.e-]+)", out)[1]) > 8.1e-5      # 2 X / T over its mass
    assert "does not see what the verify saw" in said(
        in_table(lambda x: x["D"][2].__setitem__(0, 0.999)))


def test_header_floats_may_be_those_of_a_float32_program(check, lively):
    """Rejects a comparison of eps and theta to the last bit."""
    config = {k: torch.tensor(v).item() if type(v) is float else v
              for k, v in lively[0]["config"].items()}
    assert config["eps"] != lively[0]["config"]["eps"]
    assert check([lively[0] | dict(config=config), *lively[1:]])[0] == 0


# ---------------------------------------------------------------- tolerances, from both sides

def nudge(rule, by, slack):
    """A corruption of the lines by `by` times what is allowed, consistent in itself: other rules
    have nothing to say to it."""
    def edit(lines):
        if rule in ("p", "q"):         # of a token that was never judged
            i = find(lines, "verify", accepted=None)
            line, draft = lines[i], lines[find(lines, "draft", round=lines[i]["round"],
                                               step=lines[i]["step"])]
            line[rule] += by * slack
            draft["q"] = line["q"]
            line["a"] = min(1.0, line["p"] / line["q"])
        elif rule == "confidence":
            line = lines[find(lines, "draft", confidence=lambda c: c > 0.06)]
            line["confidence"] += by * slack
        elif rule == "own":
            lines[find(lines, "own", kind="plain")]["probability"] += by * slack
        elif rule == "draw":           # u beyond the upper end of the token's interval
            line = lines[find(lines, "own", kind="plain")]
            line["u"] = upper_end(lines, line) + by * slack
        else:
            lines[find(lines, "optimise")]["D"][3][rule == "table"] -= by * slack
    return edit


def upper_end(lines, line):
    """Where in [0, 1) the interval of the first own token ends, by the slow reference."""
    c, w = random_checkpoint(Path(lines[0]["folder"]), dict(num_hidden_layers=5))
    logits = reference(c, w, torch.tensor(lines[0]["prompt_ids"]))[0][-1]
    p = (logits / lines[0]["settings"]["temperature"]).softmax(-1)
    return p[:line["token"] + 1].sum().item()


@pytest.mark.parametrize("rule", ["confidence", "q", "p", "own", "draw", "column", "table"])
@pytest.mark.parametrize("dtype, X, temperature", [("float64", 1e-9, 0.5), ("float32", 2e-5, 0.5),
                                                   ("float32", 2e-5, 2)])
def test_what_is_allowed_ends_where_trace_md_says(rule, dtype, X, temperature, check, random_model,
                                                  tmp_path):
    """Rejects a tolerance four times too wide or too narrow, one that does not grow below
    temperature 1, and one that shrinks above it."""
    for seed in range(50):
        lines = traced(random_model, tmp_path / "t", *LIVELY, "--temperature", temperature,
                       "--dtype", dtype, "--seed", seed, "--skip-layers", 4)
        if find(lines, "verify", accepted=None):
            break
    slack = X / min(1, temperature)
    slack = dict(confidence=X, column=X / 4, table=X / 4).get(rule, slack)
    for by, status in ((0.9, 0), (1.1, 1)):
        changed = copied(lines)
        changed[0]["folder"] = str(tmp_path / "m")
        nudge(rule, by, slack)(changed)
        del changed[0]["folder"]
        got, out, err = check(changed)
        assert (got, err) == (status, "") and (not got or f"rule {rule}" in out), (by, out)


def test_the_tolerance_can_be_narrowed_and_widened_and_is_never_0(check, lively):
    """Rejects --tolerance as a lower bound, and one that compares nothing."""
    assert check(lively, "--dtype", "float64", "--tolerance", 1e-12)[0] == 1
    (lines := copied(lively))[find(lively, "draft")]["confidence"] += 1e-3
    assert check(lines)[0] == 1 and check(lines, "--tolerance", 0.01)[0] == 0
    status, _, err = check(lively, "--tolerance", 0)
    assert status == 2 and "--tolerance" in err and err.count("\n") == 1
    assert TOLERANCE["bfloat16"] == 0.1


def test_lines_of_times_are_read_and_a_float32_probability_may_exceed_1(check, random_model,
                                                                        tmp_path):
    """Rejects seconds that may be anything, in any round, and an alarm for what a softmax in
    float32 gives."""
    lines = traced(random_model, tmp_path / "t", "--prompt-ids", "3,41,7", "--max-new-tokens", 3,
                   *KNOBS)
    i = find(lines, "own")
    lines[i]["probability"] = 1 + 1e-7
    end = find(lines, "optimise") + 1
    for fields, status in ((dict(), 0), (dict(draft=-1.0), 2), (dict(verify="1"), 2),
                           (dict(round=1), 1), (dict(other=1), 2)):
        times = dict(event="times", round=0, draft=0.0, verify=0.1, optimise=0.0) | fields
        assert check([*lines[:end], times, *lines[end:]])[0] == status


# ---------------------------------------------------------------- wrong programs

class Reusing(Recording):
    """A chance that answers some questions with a uniform it has had before."""

    def again(self, u, ask, x):
        own, self.source = self.source, lambda: u
        answer, self.source = ask(x), own
        return answer


class OneForBoth(Reusing):
    """The uniform that drew a token judges it too."""

    def accept(self, a):
        judged = sum(question == "accept" for question, *_ in self.log)
        return self.again(self.log[judged][2], super().accept, a)


class RejectedAgain(Reusing):
    """The uniform that rejected draws the correction too."""

    def draw(self, p):
        if self.log and self.log[-1][0] == "accept" and not self.log[-1][3]:
            return self.again(self.log[-1][2], super().draw, p)
        return super().draw(p)


def reseeding(seed):
    """A chance that begins anew each round: the log is empty there."""
    class Reseeding(Recording):
        def uniform(self):
            if not self.log:
                self.source = Chance(seed).uniform
            return super().uniform()
    return Reseeding(None)


class NarrowSum(Recording):
    """A running sum in bfloat16."""

    def draw(self, p):
        u, cdf = self.uniform(), p.bfloat16().cumsum(0)
        token = int((cdf > u * cdf[-1]).int().argmax())
        self.log.append(("draw", p, u, token))
        return token


class Backwards(Recording):
    """A running sum from the last token on."""

    def draw(self, p):
        token = len(p) - 1 - super().draw(p.flip(0))
        self.log[-1] = ("draw", p, self.last, token)
        return token


def wrong_program(monkeypatch, module=None, edits=()):
    """(write_trace's module on top of the wrong one, choose_skip, Llama)"""
    wrong = altered(module, *edits) if module else None
    sampler, dp, ll = (wrong if m is module else m for m in (speculative, dp_layer_skip, llama))
    monkeypatch.setitem(sys.modules, "speculative", sampler)
    return altered(trace), dp.choose_skip, ll.Llama


def trace_of(program, folder, prompt, s, chance=None, seed=0, **more):
    """The bytes that a program writes."""
    module, choose, model = program
    out = io.StringIO()
    for _ in module.write_trace(model.load(folder), prompt, s,
                                chance or module.Recording(module.Chance(seed).uniform), choose,
                                out, trace.about(folder), **more):
        pass
    return out.getvalue().encode()


# Those an independent implementation was planted with and that were missed, or misreported, once.
# What is wrong: the module of that row of WRONG, (module, edits) or a chance; the rule expected,
# and what a survey says.
FAULTS = {
    "one uniform draws and judges": (OneForBoth, "warning: [0-9]+ of [0-9]+ uniform numbers", ""),
    "a rejected uniform is used again": (RejectedAgain, "warning", ""),
    "the generator is seeded anew each round": (reseeding, "warning", ""),
    "u is 0 always": (lambda _: Recording(lambda: 0.0), "warning", ""),
    "a narrow running sum": (NarrowSum, "rule draw", "a few draws and nothing else"),
    "a running sum from the end": (Backwards, "rule draw", "by id, that exceeds u times the sum"),
    "the drafts' keys stay after a verify": (speculative, "rule confidence", "all is right befo"),
    "a rejected draft's slots are not given back": (
        speculative, "rule (confidence|p|q|own)", "the first after a rejection"),
    "position off by one after full acceptance": (
        speculative, "rule (confidence|p|q|own)", "the first after a round with all accepted"),
    "residual = p": (speculative, "rule own", "only residuals"),
    "residual through a softmax": (speculative, "rule own", "only resid"),
    "bonus from unfiltered logits": (speculative, "rule own", "only the bonus"),
    "the draft skips another set": (
        (speculative, [("cache.sequence(t + len(drafted), 1), cache, skip)",
                        "cache.sequence(t + len(drafted), 1), cache, skip[::-1])")]),
        "rule confidence", "only the draft is wrong"),
    "q is unfiltered": (
        (speculative, [("q.append(probabilities(logits[0], s))",
                        "q.append(logits[0].softmax(-1))")]), "rule q", "filters alone"),
    "the verify judges with the row before": (
        (speculative, [("p[:k].gather(1, at)", "p.roll(1, 0)[:k].gather(1, at)")]), "rule p",
        "the verify alone"),
    "top-p before temperature": (speculative, "rule own", "the draft's logits agree"),
    "the forward has another eps": (
        (llama, [("eps=number(\"rms_norm_eps\", 1e-6, float)", "eps=1e-3"),]), "rule header", ""),
    "scores are not scaled": (
        (llama, [("alpha=c.hd ** -0.5", "alpha=1.0")]), "rule own", "compare forward dumps"),
    "a has no upper limit": ((speculative, [(".clamp(max=1)", "")]), "rule ratio", "a is not min"),
    "one position too far": (llama, "rule column", "column 0: the candidate"),
    "the token's own entry is seen": (llama, "rule column", "column 0: the candidate"),
    "candidates see one another": (llama, "rule (table|column)", "column 0"),
    "the worse choice wins": (dp_layer_skip, "rule parent", "column 0 agrees"),
    "the cosine is bfloat16": (dp_layer_skip, "rule (column|table)", ""),
    "drafting goes on behind a stop token": (speculative, "rule exit", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_this_fault_is_found_by_its_rule_and_a_survey_says_what_it_means(fault, check, monkeypatch):
    """Rejects a checker that misses faults, or leads astray, as it once did: each row is a program
    with one."""
    wrong, rule, meaning = FAULTS[fault]
    if inspect.ismodule(wrong):
        wrong = wrong, WRONG[wrong][fault]
    program = wrong_program(monkeypatch, *(wrong if type(wrong) is tuple else ()))
    s = Settings(temperature=0.2, top_k=20, top_p=0.9, N=30, K=4, M=2, interval=2,
                 stop_ids=tuple(range(40, 46)) if "stop" in fault else ())
    for seed in range(60):
        chance = None
        if type(wrong) is not tuple:
            chance = wrong(seed if wrong is reseeding else Chance(seed).uniform)
            monkeypatch.setattr(program[0], "generate", speculative.generate)
        lines = trace_of(program, TINY, [seed, 41, 7], s, chance, seed)
        status, said, err = check(lines, model=TINY)
        assert err == ""
        if status or "warning" in said:
            assert re.search(rule, said), said
            said = check(lines, "--survey", model=TINY)[1]
            if re.search(meaning, said):
                return
    raise AssertionError(f"nothing departs, or the survey does not say why: {said}")


# A tie is no departure, float32 states have float32 cosines, errors and norms, the candidate that
# skips nothing writes over the probe what stands there, and waiting, seconds and what is shown are
# in no trace or not checked. Only u = 0 shows the two strict
# comparisons (the vectors have it), only a sum that is exactly top-p, a confidence that is exactly
# the threshold or a config of Transformers 5 the other three. The last three write no trace: a
# cosine is infinite, and not every drafted token has its draw in the log.
UNSEEN = {"ties are skipped", "the cosine is as wide as the states", "a zero state has no cosine",
          "the host waits for every layer", "an accepted stop is shown twice",
          "the verify's seconds are the draft's too", "norms in bfloat16",
          "rotary tables in bfloat16", "accepts at u = a", "draws at u = the running sum",
          "drafting ends at the threshold", "top-p keeps one more where the mass is reached",
          "scratch begins at the probe", "the losing cosine is told",
          "errors ride along in the states' dtype",
          "Transformers 5 not understood", "argmax draft scored with a softmax q",
          "doubtful tokens are thrown away"}


@pytest.mark.parametrize("module, wrong", [
    (module, wrong) for module in WRONG for wrong in WRONG[module]
    if wrong not in UNSEEN | FAULTS.keys()],
    ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_the_trace_of_a_wrong_program_departs(module, wrong, check, monkeypatch):
    """Rejects a checker that any of the wrong programs would satisfy, on forty prompts."""
    program = wrong_program(monkeypatch, module, WRONG[module][wrong])
    s = Settings(temperature=0.2, top_k=20, top_p=0.9, N=20, stop_ids=tuple(range(40, 46)), K=4,
                 M=2, exit_threshold=0.05, interval=2)
    for seed in range(40):
        lines = trace_of(program, TINY, [seed, 41, 7], replace(s, r=1 + seed % 2), seed=seed)
        status, said, err = check(lines, model=TINY)
        assert err == "" and status in (0, 1)
        if status == 1 or "warning" in said:
            return
    raise AssertionError(f"nothing departs: {wrong}")


# ---------------------------------------------------------------- uniform numbers, surveys

def test_repeated_uniforms_are_told_from_chance():
    """Rejects an alarm for the repeats that float32's 2^24 numbers must have in a long trace, and
    silence about few repeats in a short one, about one of 53 bits, and about zeros alone."""
    gen = torch.Generator().manual_seed(0)
    narrow = torch.rand(6000, generator=gen).tolist()
    wide = torch.rand(6000, generator=gen, dtype=torch.float64).tolist()
    assert len(set(narrow)) < 6000 and repeated(narrow) == repeated(wide) == repeated([]) == []
    assert repeated([0.0]) == []
    for numbers, again in (([*wide, wide[0]], 1), ([*narrow[:60], *narrow[50:60]], 10),
                           ([0.0] * 200, 199), (narrow[:600] * 2, 600)):
        warning, = repeated(numbers)
        assert warning.startswith(f"warning: {again} of {len(numbers)} uniform numbers repeat")


def test_a_survey_of_a_right_trace_finds_nothing_and_counts_everything(check, lively):
    """Rejects a survey that invents, and one that stops counting."""
    status, out, err = check(lively, "--survey")
    drafted = sum(x["event"] == "draft" for x in lively)
    assert (status, err) == (0, "") and "no rule departed from" in out
    for rule in ("confidence", "q", "p"):
        assert re.search(rf"^ +{rule} +0 of +{drafted}, largest", out, re.M)


def test_a_survey_counts_departures_in_numbers_and_ends_at_others(check, lively):
    """Rejects a count of the first alone, a place that is the last one's, and a survey that goes on
    where the trace does not say how."""
    lines = copied(lively)
    places = [i for i, x in enumerate(lines) if x["event"] == "draft"][2:5]
    for i in places:
        lines[i]["confidence"] += 1e-3
    status, out, _ = check(lines, "--survey")
    assert status == 1 and "1 of 21 rules departed from" in out and re.search(
        rf"confidence +3 of +\d+, largest difference 1\.0e-03, first in line {places[0] + 1},", out)
    assert "only the draft is wrong" in out
    end = find(lines, "emit", -1)
    lines[end]["tokens"] = [0]
    out = check(lines, "--survey")[1]
    assert f"line {end + 1}, " in out and "rule emit" in out
    assert re.search("confidence +3 of", out) and "it ends there" in out


# ---------------------------------------------------------------- ties and edges

def test_a_greedy_trace_needs_no_uniforms_but_the_right_tokens(check, tmp_path, random_model):
    """Rejects the demand that a greedy program draw at all, a warning that it does not, and a wrong
    token that u = 0 lets through."""
    lines = traced(random_model, tmp_path / "t", "--prompt-ids", "3,41,7", "--max-new-tokens", 9,
                   *KNOBS, "--draft-exit-threshold", 0)
    for line in lines:
        if line.get("u") is not None:
            line["u"] = 0
    status, out, _ = check(lines)
    assert status == 0 and "warning" not in out
    for event, rule in (("own", "own"), ("draft", "q")):
        for token in (0, 49):                          # before and behind the right one
            i = find(lines, event)
            wrong = [*lines[:i], lines[i] | dict(token=token), *lines[i + 1:]]
            out = check(wrong)[1]
            assert lines[i]["token"] != token and f"rule {rule}" in out
            assert f"ours draws token {lines[i]['token']} by this u" in out


TIES_UP = [("logits.argmax(-1, keepdim=True)",                     # the larger id first
            "logits.shape[-1] - 1 - logits.flip(-1).argmax(-1, keepdim=True)"),
           ("logits, order = logits.sort(dim=-1, descending=True, stable=True)",
            "logits, order = logits.flip(-1).sort(dim=-1, descending=True, stable=True)\n"
            "    order = order.shape[-1] - 1 - order")]


@pytest.fixture
def tied_model(tmp_path):
    """A model that finds tokens 2n and 2n + 1 equally likely; its layers 2 and 3 do nothing."""
    folder = tmp_path / "tied"
    w = random_checkpoint(folder, dict(num_hidden_layers=5))[1]
    w["lm_head.weight"][1::2] = w["lm_head.weight"][::2]
    for i in (2, 3):
        w[f"model.layers.{i}.self_attn.o_proj.weight"].zero_()
        w[f"model.layers.{i}.mlp.down_proj.weight"].zero_()
    save({name: x.float() for name, x in w.items()}, folder / "model.safetensors",
         {"format": "pt"})
    return folder


@pytest.mark.parametrize("sampler", [dict(), dict(temperature=1.0, top_k=3),
                                     dict(temperature=1.0, top_p=0.11)], ids=str)
def test_a_tie_decided_the_other_way_is_no_departure(sampler, check, tied_model, monkeypatch):
    """Rejects a checker that asks for our order among logits, or cosines, that rounding decides."""
    s = Settings(N=20, K=3, M=2, interval=2, **sampler)
    right = trace_of((trace, choose_skip, Llama), tied_model, [3, 41, 7], s)
    module, _, _ = wrong_program(monkeypatch, speculative, TIES_UP)
    skips = altered(dp_layer_skip, ("best, skipped = cos.max(0)", "best, skipped = cos.amax(0), "
                                    "(cos[1] >= cos[0]).long()"))
    other = trace_of((module, skips.choose_skip, Llama), tied_model, [3, 41, 7], s)

    def parts(text, name):
        return [x[name] for x in map(json.loads, text.splitlines()) if name in x]

    assert parts(right, "tokens") != parts(other, "tokens")
    assert parts(right, "parents")[0] != parts(other, "parents")[0]
    assert check(other, model=tied_model)[::2] == (0, "")


@pytest.mark.parametrize("M", [0, 1])
def test_a_rejection_that_only_rounding_explains_is_no_departure(M, check, random_model):
    """Rejects a residual compared as if it were exact: here next to nothing is owed, and which
    token it falls to differs with the precision."""
    class Unlucky(Recording):
        def accept(self, a):
            self.log.append(("accept", a, 1 - 1e-12, 1 - 1e-12 < a))
            return self.log[-1][-1]

    s = Settings(N=24, K=4, M=M, interval=3, exit_threshold=0.05, temperature=0.5)
    text = trace_of((trace, choose_skip, Llama), random_model, [3, 41, 7], s,
                    Unlucky(Chance(0).uniform))
    assert b'"kind":"residual"' in text
    for dtype in ("float32", "float64"):
        assert check(text, "--dtype", dtype)[::2] == (0, "")


def test_below_temperature_1_probabilities_may_differ_more(check, tmp_path):
    """Rejects one tolerance for all temperatures: at 0.02 a logit's rounding counts fiftyfold."""
    for seed in range(12):
        ids = ",".join(map(str, random.Random(seed).sample(range(3840), 6)))      # it is unsure
        lines = traced(DEMO, tmp_path / "t", "--prompt-ids", ids, "--temperature", 0.02,
                       "--max-new-tokens", 16, "--seed", seed, *KNOBS)
        status, out, _ = check(lines, "--dtype", "float64", model=DEMO)
        assert status == 0
        if max(map(float, re.search("in p ([^,]+), q ([^,]+),", out).groups())) > 2e-5:
            return
    raise AssertionError("twelve runs without a difference that needs the wider tolerance")


def test_tokens_at_an_edge_within_the_tolerance_may_stand_on_either_side():
    """Rejects one distribution where rounding decides between several, several where it does not,
    and a token asked about that is lost among its equals."""
    def kept(p, s, about=(), X=1e-6):
        logits = torch.tensor(p, dtype=torch.float64).log()
        return {tuple((q > 0).nonzero()[:, 0].tolist())
                for q in check_trace.allowed(logits, s, X, about)}

    hot = Settings(temperature=1.0)
    for top_p in (0.8 - 1e-7, 0.8 + 1e-7):
        assert kept([0.5, 0.3, 0.2], replace(hot, top_p=top_p)) == {(0, 1), (0, 1, 2)}
    assert kept([0.5, 0.3, 0.2], replace(hot, top_p=0.79)) == {(0, 1)}
    assert kept([0.4, 0.2, 0.2, 0.2], replace(hot, top_k=2)) == {(0, 1), (0, 2), (0, 3)}
    assert kept([0.4, 0.25, 0.2, 0.15], replace(hot, top_k=2)) == {(0, 1)}
    assert kept([0.3, 0.3 + 1e-7, 0.2, 0.2], Settings()) == {(0,), (1,)}
    assert (7,) in kept([0.1] * 10, Settings(), about=[7]) >= {(0,)}


def test_a_confidence_within_the_tolerance_of_the_threshold_may_go_either_way(check, lively):
    """Rejects a threshold taken more exactly than confidences are known, and one not taken."""
    low = min(x["confidence"] for x, then in zip(lively, lively[1:])
              if x["event"] == then["event"] == "draft")
    for beyond, status in ((1e-6, 0), (1e-3, 1)):
        changed = lively[0]["settings"] | dict(exit_threshold=low + beyond)
        got, out, _ = check([lively[0] | dict(settings=changed), *lively[1:]])
        assert got == status and (got == 0 or "rule exit" in out)
    high = max(r["draft"][-1]["confidence"] for r in by_round(lively)
               if r["round"][0]["ended"] == "confidence")
    for below, status in ((1e-6, 0), (1e-3, 1)):
        changed = lively[0]["settings"] | dict(exit_threshold=high - below)
        got, out, _ = check([lively[0] | dict(settings=changed), *lively[1:]])
        assert got == status and (got == 0 or "rule exit" in out)


def test_the_verdict_is_strict(check, lively):
    """Rejects u <= a: at u = a the token is rejected."""
    lines = copied(lively)
    i = find(lines, "verify", **JUDGED, u=lambda u: u is not None)
    lines[i].update(u=lines[i]["a"], accepted=True)
    assert "rule verdict" in check(lines)[1]


# ---------------------------------------------------------------- files from other programs

def header(lines, **changes):
    return jsonl({**lines[0], **changes}, *lines[1:])


def settings(lines, **changes):
    return header(lines, settings=lines[0]["settings"] | changes)


def patched(lines, at, **changes):
    i = find(lines, at)
    return jsonl(*lines[:i], lines[i] | changes, *lines[i + 1:])


NO_TRACES = [                          # what is in the file, what is said
    (lambda x: b"", "empty"), (lambda x: b"hello\n", "line 1: not JSON"),
    (lambda x: b"[1]\n", "\"event\" wanted"), (lambda x: b"\xff\xfe\n", "line 1: not JSON"),
    (lambda x: b"[" * 10 ** 6 + b"\n", "line 1: not JSON"),
    (lambda x: jsonl(*x)[:-5], "line {n}: cut short"),
    (lambda x: jsonl(*x[:4]) + b'{"event":"ro\n', "line 5: not JSON"),
    (lambda x: jsonl(*x[1:]), "line 1: not the header"),
    (lambda x: header(x, schema="other"), "line 1: not the header"),
    (lambda x: header(x, version=1), "version 1 of the format; this program reads version 2"),
    (lambda x: header(x, version=2.0), "version is 2.0"),
    (lambda x: header(x, extra=1), "unknown field 'extra'"),
    (lambda x: header(x, config=x[0]["config"] | dict(event=1)), "unknown field 'event'"),
    (lambda x: header(x, model={"config.json": "00"}), "a trace of another model"),
    (lambda x: header(x, model=7), "model is 7"), (lambda x: header(x, config=[]), "an object"),
    (lambda x: header(x, prompt_ids=[]), "prompt_ids"),
    (lambda x: header(x, prompt_ids=[50]), "prompt_ids"),
    (lambda x: header(x, prompt_ids=[True]), "a whole number"),
    (lambda x: header(x, prompt_ids=[3] * 3000), "the model's context of 2048"),
    (lambda x: settings(x, N=10 ** 8), "the model's context of 2048"),
    (lambda x: settings(x, N=10 ** 40), "N is 1000"), (lambda x: settings(x, K=512), "K is 512"),
    (lambda x: settings(x, K=1.0), "K is 1.0"), (lambda x: settings(x, r=0), "r is 0"),
    (lambda x: settings(x, M=6), "M is 6; the model has 5 layers"),
    (lambda x: settings(x, top_p=0), "top_p is 0"), (lambda x: settings(x, interval=0), "interval"),
    (lambda x: settings(x, other=0), "field 'other'"),
    (lambda x: settings(x, temperature=1e-30), "checks nothing"),
    (lambda x: settings(x, temperature=math.nan), "NaN is not JSON"),
    (lambda x: jsonl(*x).replace(b'"temperature": 0.5', b'"temperature": 1e999'), "temperature is"),
    (lambda x: jsonl(*x).replace(b'"N": 24', b'"N": ' + b"9" * 10 ** 6), "line 1: not JSON"),
    (lambda x: patched(x, "round", event="circle"), "line 2: no such event: 'circle'"),
    (lambda x: patched(x, "own", u=1.0), "u is 1.0"), (lambda x: patched(x, "own", u="0"), "u is"),
    (lambda x: patched(x, "own", token=50), "token is 50"),
    (lambda x: patched(x, "own", token=True), "token is True"),
    (lambda x: patched(x, "own", kind=[]), "kind is []"),
    (lambda x: patched(x, "own", **{"\n\ud800": 1}), "unknown field '\\n\\ud800'"),
    (lambda x: jsonl(x[0], x[1], {"event": "own"}), "line 3, own: missing field 'kind'"),
    (lambda x: patched(x, "verify", accepted=1), "accepted is 1"),
    (lambda x: patched(x, "verify", p=10 ** 400), "p is 1000"),
    (lambda x: patched(x, "optimise", D=[[[]]]), "D is"),
    (lambda x: patched(x, "optimise", parents=["02"]), "parents is"),
    (lambda x: patched(x, "optimise", skip=[5]), "skip is [5]"),
]


@pytest.mark.parametrize("n", range(len(NO_TRACES)))
def test_a_file_that_is_no_trace_gets_one_clear_line(n, check, lively):
    """Rejects a traceback, a guess, a hang, and a message without the line's number."""
    make, said = NO_TRACES[n]
    began = time.perf_counter()
    status, out, err = check(make(lively))
    assert (status, out, err.count("\n")) == (2, "", 1) and time.perf_counter() - began < 5
    assert said.replace("{n}", str(len(lively))) in err and err.isascii()


def test_a_folder_a_missing_file_a_wrong_model_and_wrong_flags_are_named(capsys, check, lively,
                                                                         tmp_path):
    """Rejects a traceback or a status of 1, which is a departure, for what is no trace; and a
    comparison with another model's numbers."""
    (right := tmp_path / "t").write_bytes(jsonl(*lively))
    for said, *arguments in (
            ("directory", DEMO), ("/nowhere", "/nowhere"), ("not JSON", DEMO / "config.json"),
            ("config.json", right, "--model", "/no"), ("--device", right, "--device", "tpu"),
            ("--device", right, "--device", "cuda:99"), ("--out", right, "--dump-at", "1,2"),
            ("--dump-at", right, "--dump-at", "x", "--out", "y"), ("FILE",)):
        assert check_trace.main(list(map(str, arguments))) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err, err
    status, _, err = check(lively, model=DEMO)
    assert status == 2 and "another model" in err and "config.json" in err


def test_a_trace_that_breaks_off_is_checked_as_far_as_it_goes(check, lively):
    """Rejects success for a run without its end, and silence about an error before the break."""
    for n in (1, 3, 4, 9, len(lively) - 1):
        status, out, err = check(lively[:n])
        assert status == 3 and f"incomplete: no departure in {n} lines" in out and err == ""
        status, out, _ = check(lively[:n], "--survey")
        assert status == 3 and f"incomplete: a survey of {n} lines" in out
    broken = [*lively[:2], lively[2] | dict(token=0, u=0.99), *lively[3:5]]
    assert check(broken)[0] == check(broken, "--survey")[0] == 1


def test_ctrl_c_leaves_whole_lines(check, tmp_path):
    """Rejects a half-written line, and an `end` that was not reached."""
    path = tmp_path / "broken"
    p = subprocess.Popen(
        [sys.executable, str(ROOT / "clasp_mini.py"), "--prompt", "x = ", "--max-new-tokens", "900",
         "--trace", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    p.stdout.read(1)
    time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    assert b"Traceback" not in p.communicate(timeout=60)[1] and p.returncode == 130
    lines = path.read_bytes().splitlines(True)
    assert len(lines) > 2 and all(json.loads(x)["event"] != "end" for x in lines)
    assert lines[-1].endswith(b"\n") and b'"event":"times"' in lines[-1]
    assert check(b"".join(lines[:4]), model=DEMO)[0] == 3


# ---------------------------------------------------------------- forward dumps

def dumped(folder, path, *arguments):
    """(the tensors, the metadata) of a dump of the command."""
    assert dump_forward.main([str(path), "--model", str(folder), "--device", "cpu",
                              *map(str, arguments)]) == 0
    with safe_open(path, framework="pt") as f:
        return compare_dumps.read(path), json.loads(f.metadata()["clasp-forward"])


def near(got, want):
    return ((got.double() - want.double()).abs().max() / want.abs().max()).item() < 1e-12


@pytest.mark.parametrize("skip", [(), (0, 3)], ids=str)
def test_a_dump_is_what_a_slow_llama_computes(skip, tmp_path, monkeypatch):
    """Rejects states after the final norm, keys before the rotary embedding, a wrong chunk, and a
    skipped layer that leaves something in the cache."""
    c, w = random_checkpoint(tmp_path / "model", dict(num_hidden_layers=5))
    monkeypatch.setattr(dump_forward, "CHUNK", 7)
    got, meta = dumped(tmp_path / "model", tmp_path / "d", "--dtype", "float64", "--prompt-ids",
                       ",".join(map(str, IDS.tolist())),
                       *(["--skip", ",".join(map(str, skip))] if skip else []))
    logits, h = reference(c, w, IDS, skip)
    (_, G, hd), eps = sizes(c), c["rms_norm_eps"]
    turn = torch.exp(1j * torch.outer(torch.arange(len(IDS)), torch.tensor(
        reference_frequencies(c), dtype=torch.float64)))[:, None]                  # (T, 1, hd/2)
    for i in range(5):
        p = f"model.layers.{i}."
        a = reference_norm(h[i], w[p + "input_layernorm.weight"], eps)
        k, v = ((a @ w[f"{p}self_attn.{x}_proj.weight"].T).view(-1, G, hd) for x in "kv")
        z = torch.complex(k[..., :hd // 2], k[..., hd // 2:]) * turn
        k = torch.cat((z.real, z.imag), -1)
        if i in skip:
            assert not got["keys"][i].any() and not got["values"][i].any()
        else:
            assert near(got["keys"][i], k) and near(got["values"][i], v)
    assert near(got["logits"], logits) and near(got["hidden"], h)
    assert got["prompt_ids"].tolist() == IDS.tolist() and got["prompt_ids"].dtype == torch.int64
    assert meta["skip"] == list(skip) and meta["dtype"] == "float64"
    assert meta["model"] == trace.fingerprint(tmp_path / "model")
    assert meta["tensors"].keys() == got.keys()


def test_a_dump_keeps_its_dtype_and_needs_no_room_for_new_tokens(random_model, tmp_path, capsys):
    """Rejects a dtype that is lost on the way, a prompt that fits exactly and is refused, and
    layers that there are not."""
    for dtype in clasp_mini.DTYPES.values():
        got, _ = dumped(random_model, tmp_path / "d", "--dtype", str(dtype)[6:],
                        "--prompt-ids", ",".join(["3"] * 2048 if dtype == torch.float32 else "37"))
        assert {got[name].dtype for name in ("keys", "values", "hidden")} == {dtype}
    capsys.readouterr()
    for arguments, said in (("--prompt-ids 3 --skip 1,5".split(), "--skip 5: the model has layers"),
                            (["--prompt-ids", ",".join("3" * 2049)], "context of 2048")):
        assert dump_forward.main([str(tmp_path / "d"), "--model", str(random_model),
                                  *arguments]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_fingerprints_are_of_every_file_that_holds_numbers(tmp_path):
    """Rejects a shard, or the index, that could change unnoticed."""
    random_checkpoint(tmp_path, shards=2)
    before, shard = trace.fingerprint(tmp_path), "model-2-of-2.safetensors"
    assert before.keys() == {"config.json", INDEX, shard, shard.replace("2-of", "1-of")}
    (tmp_path / shard).write_bytes((tmp_path / shard).read_bytes() + b" ")
    after = trace.fingerprint(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {shard}


@pytest.mark.parametrize("step", [0, 2, None])
def test_the_dump_at_a_place_of_a_trace_is_what_fresh_passes_have_there(step, check, tmp_path):
    """Rejects a cache with what rejected drafts left, entries of the full model where the draft
    has its own, a token too many, and a dump after another pass than the one asked for."""
    lines, model = RUNS["tiny-temperature"], Llama.load(TINY, dtype=torch.float64)
    rounds = by_round(lines)
    n = next(n for n, r in enumerate(rounds) if n > 3 and len(r["draft"]) > 2 and
             rounds[n - 1]["own"][0]["kind"] == "residual")
    drafts = [d["token"] for d in rounds[n]["draft"]]
    text = lines[0]["prompt_ids"] + [i for r in rounds[:n] for i in r["emit"][0]["tokens"]]
    place = f"{n}" if step is None else f"{n},{step}"
    status, out, err = check(jsonl(*lines), "--dump-at", place, "--out", tmp_path / "d", model=TINY)
    assert (status, err) == (0, "") and out.startswith(f"round {n}, "), out
    got, t = compare_dumps.read(tmp_path / "d"), len(text) - 1
    cache, skip = model.cache(64), [i in rounds[n]["round"][0]["skip"] for i in range(6)]
    if step is None:
        ids = torch.tensor(text + drafts)
        logits, h = model.forward(ids, cache.sequence(0, len(ids)), cache, (),
                                  len(drafts) + 1, True)
    else:
        ids = torch.tensor(text + drafts[:step])
        model.forward(ids[:t], cache.sequence(0, t), cache)
        for i in range(t, len(ids)):
            logits, h = model.forward(ids[i:i + 1], cache.sequence(i, 1), cache, skip, 1, True)
        assert not got["keys"][skip, t:].any() and got["keys"][skip, :t].all()
    assert got["prompt_ids"].tolist() == ids.tolist()
    assert near(got["logits"], logits) and near(got["hidden"], h)
    for name, x in (("keys", cache.k), ("values", cache.v)):
        assert near(got[name], x[:, :, :len(ids)].transpose(1, 2))


def test_a_place_that_does_not_come_is_said_and_a_wrong_number_before_it_is_passed_over(
        check, lively, tmp_path):
    """Rejects an empty file, and a departure in the way to the place where it can be looked at."""
    status, out, err = check(lively, "--dump-at", "99,1", "--out", tmp_path / "d")
    assert (status, out) == (2, "") and "does not come to round 99, step 1" in err
    (lines := copied(lively))[find(lively, "draft")]["confidence"] += 1e-3
    n = lively[find(lively, "draft", -1)]["round"]
    assert check(lines, "--dump-at", n, "--out", tmp_path / "d")[0] == 0
    lines[find(lines, "emit", round=1)]["tokens"] = [0]
    assert "rule" not in check(lines, "--dump-at", n, "--out", tmp_path / "d")[2]


DEPARTING = {      # a forward pass with a fault: its text, where it departs, what is said of it
    "eps outside the root": (
        [("(wide * mean.rsqrt())", "(wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps))")],
        r"layer 0, values\[0\], token 0 ", "the norm before attention"),
    "the interleaved rotary layout": (
        WRONG[llama]["the interleaved rotary layout"], r"layer 0, keys\[0\], token 1 ", "rotary"),
    "3.1's scaling left out": (
        WRONG[llama]["LLaMA-3.1's stretching left out"], r"layer 0, keys\[0\], token 1 ", "rotary"),
    "scores not scaled": ([("alpha=c.hd ** -0.5", "alpha=1.0")],
                          r"layer 0, its output hidden\[1\], token 1 ", "the scale"),
    "query heads dealt in turn": (
        WRONG[llama]["query heads dealt to kv heads in turn"],
        r"layer 0, its output hidden\[1\], token 1 ", r"h // \(H/G\)"),
    "no final norm": ([("rms_norm(x, self.norm, self.eps), self.lm_head", "x, self.lm_head")],
                      "the logits, token 0 ", "the final norm"),
    "a layer's weight": ([("head = embed if c.tied", "layers[3].down.mul_(1.01)\n"
                           "        head = embed if c.tied")],
                         r"layer 3, its output hidden\[4\], token 0 ", "the feed-forward part"),
    "embeddings scaled": ([("[F.embedding(ids, self.embed)]",
                            "[1.001 * F.embedding(ids, self.embed)]")],
                          r"the embedding, hidden\[0\], token 0 ", "the embedding"),
}


@pytest.mark.parametrize("fault", DEPARTING)
def test_two_dumps_are_compared_in_the_order_of_computation(fault, tmp_path, capsys):
    """Rejects a comparison that names a later place than the first, or sends to another part."""
    edits, place, said = DEPARTING[fault]
    about, ids = trace.about(TINY), [3, 41, 7, 19, 5]
    for name, module in (("ours", llama), ("theirs", altered(llama, *edits))):
        dump_forward.dump_forward(module.Llama.load(TINY, dtype=torch.float64), ids, [],
                                  tmp_path / name, about)
    assert compare_dumps.main([str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 1
    out = capsys.readouterr().out
    assert re.match(place, out) and re.search("look at: .*" + said, out), out


def test_dumps_that_are_alike_or_cannot_be_compared_are_told_apart(tmp_path, capsys):
    """Rejects rounding called a fault, another text called one, and a fault in one entry that a
    whole part's mean would hide; what is not a number departs as well."""
    ours = dumped(TINY, tmp_path / "a", "--prompt-ids", "3,41,7", "--dtype", "float64")[0]
    for name, flags, status, said in (
            ("b", ("--prompt-ids", "3,41,7"), 0, "alike"),
            ("b", ("--prompt-ids", "3,41,7", "--dtype", "bfloat16"), 0, "alike"),
            ("b", ("--prompt-ids", "3,41,8"), 2, "different tokens"),
            ("b", ("--prompt-ids", "3,41"), 2, "shapes")):
        dumped(TINY, tmp_path / name, *flags)
        capsys.readouterr()
        assert compare_dumps.main([str(tmp_path / "a"), str(tmp_path / name)]) == status
        assert said in "".join(capsys.readouterr())
    rows = {name: x[-2:] if name == "logits" else x[:, -2:] if name == "hidden" else x
            for name, x in ours.items()}               # as of a verify
    theirs = dict(rows, hidden=rows["hidden"].clone())
    theirs["hidden"][4, 0, 7] += 1
    assert "token 1 of 0..2" in compare_dumps.compare(rows, theirs)[1]
    for value in (1e-5, math.nan):
        theirs = {name: x.clone() for name, x in ours.items()}
        theirs["hidden"][4, 2, 7] += value
        status, said = compare_dumps.compare(ours, theirs)
        assert status == 1 and said.startswith("layer 3, its output hidden[4], token 2 of 0..2")
    (tmp_path / "b").write_bytes(b"no dump")
    for path in (tmp_path / "b", "/nowhere", DEMO / "model.safetensors"):
        assert compare_dumps.main([str(tmp_path / "a"), str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- the vectors

def alike(a, b):
    """Equal, but for floats, which may be 1e-9 apart, and versions of programs."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k == "versions" or alike(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and (abs(a - b) < 1e-9 if type(a) is float else a == b)


def reproduced(name, program=(trace, choose_skip, Llama)):
    """The lines that a program writes for a vector's header and uniforms."""
    lines, (module, choose, model), out = RUNS[name], program, io.StringIO()
    fields = dict(lines[0]["settings"], stop_ids=tuple(lines[0]["settings"]["stop_ids"]))
    seed = fields.pop("seed")
    uniforms = [x["u"] for x in lines if x.get("u") is not None]
    for _ in module.write_trace(model.load(source(name), dtype=torch.float64),
                                lines[0]["prompt_ids"], Settings(**fields),
                                module.Recording(iter(uniforms).__next__), choose, out,
                                trace.about(source(name)), seed):
        pass
    return [x for x in map(json.loads, out.getvalue().splitlines()) if x["event"] != "times"]


@pytest.mark.parametrize("name", RUNS)
def test_a_vector_is_what_this_program_makes_of_its_uniforms_and_checks_clean(name, check):
    """Rejects vectors of other weights or of an older program, and uniforms in another order than
    that of their lines."""
    assert alike(RUNS[name], reproduced(name))
    if source(name) == DEMO and name not in ("greedy", "top-p", "zero-verdict"):
        return                                         # their tables are long, and tell no more
    status, out, err = check(jsonl(*RUNS[name]), model=source(name))
    assert (status, err) == (0, "") and "warning" not in out


def test_make_vectors_is_all_it_takes(tmp_path, monkeypatch):
    """Rejects vectors or a tiny model that the script does not make, and a file too many or too few
    (of the demo's runs, a second each, one is searched for here)."""
    monkeypatch.setattr(make_vectors.Maker, "zero", lambda *_: [])
    monkeypatch.setattr(make_vectors.Maker, "stop_in_draft", lambda *_: [])
    skipped = [name for name in make_vectors.DEMO if name != "plain"]
    monkeypatch.setattr(make_vectors, "DEMO", {"plain": make_vectors.DEMO["plain"]})
    make_vectors.main(tmp_path)
    made = {p.name for p in (tmp_path / "vectors").iterdir()} | {f"{n}.jsonl" for n in skipped}
    assert made == {p.name for p in VECTORS.iterdir()}
    for name in ("plain", *make_vectors.TINY):
        new = (tmp_path / "vectors" / f"{name}.jsonl").read_text().splitlines()
        assert alike(RUNS[name], list(map(json.loads, new))), name
    for path in TINY.iterdir():
        assert path.read_bytes() == (tmp_path / "tiny" / path.name).read_bytes()
    assert (TINY / "model.safetensors").stat().st_size < 150_000
    lengths = dict(forward=3, **{"forward-skip": 2, "tiny-forward": 12, "tiny-forward-skip": 2})
    for path in VECTORS.glob("*.safetensors"):
        assert len(compare_dumps.read(path)["prompt_ids"]) == lengths[path.stem]
        old, new = compare_dumps.read(path), compare_dumps.read(tmp_path / "vectors" / path.name)
        assert compare_dumps.compare(old, new)[0] == 0


def count(rounds, what):
    return sum(1 for r in rounds[1:] if what(r))


def rejected(r):
    return r["own"][0]["kind"] == "residual"


def ended(by, K, threshold):
    """Did this end the draft, and nothing else that would have?"""
    def is_so(r):
        d = r["draft"]
        sure = d and d[-1]["confidence"] >= threshold
        return bool(d) and (sure and len(d) == K if by == "K" else not sure and len(d) < K)
    return is_so


CLAIMS = {         # what TRACE.md says of a vector, of its rounds
    "greedy": lambda r: count(r, rejected) >= 3 and count(r, ended("K", 4, 0.15)) and count(
        r, ended("confidence", 4, 0.15)) and count(r, lambda x: rejected(x) and x["optimise"]) >= 2
    and {v["p"] for x in r for v in x["verify"]} == {0.0, 1.0},
    "temperature": lambda r: count(r, rejected) >= 3 and count(r, ended("K", 3, 0.1)) and count(
        r, ended("confidence", 3, 0.1)) and count(r, lambda x: rejected(x) and x["optimise"])
    and any(v["accepted"] and v["a"] < 1 for x in r for v in x["verify"]),
    "top-p": lambda r: count(r, rejected) >= 2 and any(
        v["p"] == 0 and v["accepted"] is False for x in r for v in x["verify"]),
    "full-draft": lambda r: {x["own"][0]["kind"] for x in r[1:-1]} == {"bonus"} and not any(
        x["optimise"] for x in r) and len(r[-1]["draft"]) < 6 and r[-1]["draft"][-1]["confidence"]
    >= 0.3,
    "plain": lambda r: len(r) == 20 and not any(x["draft"] for x in r),
    "short-interval": lambda r: len({str(x["optimise"][0]["skip"]) for x in r if x["optimise"]})
    >= 2 and [bool(x["optimise"]) for x in r[:-1]] == [n % 2 == 0 for n in range(len(r) - 1)],
    "stop-in-draft": lambda r: r[-1]["emit"][0]["tokens"][-1] == r[-1]["draft"][-1]["token"]
    and r[-1]["draft"][-1]["confidence"] >= 0.3 and len(r[-1]["draft"]) < 6
    and r[-1]["own"][0]["kind"] == "bonus",
    "zero-verdict": lambda r: [(v["a"], v["accepted"]) for x in r for v in x["verify"]
                               if v["u"] == 0] == [(0, False)],
    "zero-draw": lambda r: [d["token"] > 0 and d["q"] > 0 for x in r for d in x["draft"]
                            if d["u"] == 0] == [True],
    "tiny-greedy": lambda r: count(r, rejected) >= 3,
    "tiny-probe": lambda r: count(r, lambda x: rejected(x) and x["optimise"]) >= 2,
    "tiny-temperature": lambda r: count(r, rejected) >= 3 and count(
        r, lambda x: rejected(x) and x["optimise"]) >= 2,
    "tiny-top-p": lambda r: count(r, rejected) >= 3 and any(
        v["p"] == 0 and v["accepted"] is False for x in r for v in x["verify"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_vector_shows_what_it_is_there_for(name):
    """Rejects a vector from which its situation has gone, whatever the others show."""
    assert CLAIMS.keys() == RUNS.keys() and CLAIMS[name](by_round(RUNS[name]))
    assert RUNS[name][-1]["reason"] == ("stop" if name == "stop-in-draft" else "length")


POSITION, STATES = "cache.candidates(t + verdict.accepted,", "h[:, :rows - k + verdict.accepted]"
CHANGING = {       # a wrong program, the vector that it cannot reproduce
    "accepts at u = a": (speculative, "zero-verdict"),
    "draws at u = the running sum": (speculative, "zero-draw"),
    "drafting goes on behind a stop token": (speculative, "stop-in-draft"),
    "the text goes on after an accepted stop": (speculative, "stop-in-draft"),
    "K counts the model's own token": (
        (speculative, [("return self.s.K def", "return self.s.K - 1\n\n    def")]), "greedy"),
    "the probe is the last drafted token": (
        (speculative, [(STATES, "h"), (POSITION, "cache.candidates(t + k,")]), "greedy"),
    "the probe is told the last draft's position": (
        (speculative, [(POSITION, "cache.candidates(t + k,")]), "temperature"),
    "the probe is the token before the round": (
        (speculative, [(STATES, "h[:, :rows - k]"), (POSITION, "cache.candidates(t,")]),
        "short-interval"),
    "the probe keeps states of rejected tokens": ((speculative, [(STATES, "h")]), "tiny-probe"),
    "several tokens are compared by the last": (dp_layer_skip, "tiny-probe"),
    "one position for all tokens": (llama, "tiny-probe"),
    "a rejection draws from p": (
        (speculative, [("chance.draw(residual(p[r], q[r]))", "chance.draw(p[r])")]), "top-p"),
    "query heads dealt to kv heads in turn": (llama, "tiny-greedy"),
    "LLaMA-3.1's stretching left out": (llama, "tiny-greedy"),
    "scores divided by the root of D": (llama, "tiny-temperature"),
    "the head is the embedding": (
        (llama, [("return cls(c, embed, layers, norm, head)",
                  "return cls(c, embed, layers, norm, embed)")]), "tiny-top-p"),
}


@pytest.mark.parametrize("wrong", CHANGING)
def test_a_wrong_program_does_not_reproduce_the_vectors(wrong, monkeypatch):
    """Rejects vectors too tame to tell: each of these programs must come to other lines, or ask for
    more uniforms than there are."""
    program, name = CHANGING[wrong]
    module, edits = program if type(program) is tuple else (program, WRONG[program][wrong])
    try:
        lines = reproduced(name, wrong_program(monkeypatch, module, edits))
    except (RuntimeError, ValueError):                 # no uniform left; no number
        return
    assert not alike(RUNS[name], lines)


# ---------------------------------------------------------------- the documents

def test_the_contract_names_every_field_rule_tolerance_and_vector():
    """Rejects a TRACE.md that has drifted from the schema, the rules, the tolerances, the dumps or
    the vectors."""
    text = (HERE / "TRACE.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([A-Za-z0-9_.-]+)`", text))
    events = trace.schema(Config.load(DEMO))
    fields = {name for line in [trace.HEADER, *events.values()] for name in line}
    assert words >= fields | events.keys() | trace.HEADER["settings"].keys()
    assert words >= trace.HEADER["config"].keys() | dump_forward.TENSORS.keys()
    assert words >= {p.name for p in VECTORS.iterdir()}
    assert f"version {trace.VERSION}\n" in text
    rules = re.findall(r"^\| `([a-z]+)` \|", text.partition("## Rules")[2].partition("##")[0],
                       re.M)
    assert rules == list(check_trace.RULES)
    survey = text.partition("`--survey` goes on after a departure from ")[2].partition("counts")[0]
    assert set(re.findall("`([a-z]+)`", survey)) == NUMERIC
    assert all(f"| {name} | {x:g} |" in text for name, x in TOLERANCE.items())
    dumps = dict(re.findall(r"([0-9][0-9.e-]*) in\s+(float64|float32|bfloat16)", text))
    assert {float(x): f"torch.{name}" for x, name in dumps.items()} == {
        x: str(dtype) for dtype, x in compare_dumps.TOLERANCE.items()}
    example = re.findall(r"^\{.*\}$", text, re.M)
    for line in example[1:]:
        line = json.loads(line)
        trace.match(line, events[line["event"]], "the example")
    assert [json.loads(x)["event"] for x in example[1:]] == [
        "round", "draft", "draft", "verify", "verify", "own", "emit"]


def test_the_commands_of_the_readme_run(monkeypatch, tmp_path, capsys):
    """Rejects a command or a flag that does not exist, a vector or file that is not there, and
    messages that have drifted."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    mains = dict(clasp_mini=clasp_mini, check_trace=check_trace, dump_forward=dump_forward,
                 compare_dumps=compare_dumps)
    said = []
    for line in re.search(r"```sh\n(.*?)```", text, re.S)[1].splitlines():
        _, program, *arguments = shlex.split(line)
        assert (ROOT / program).exists() and mains[Path(program).stem].main(arguments) == 0
        said += capsys.readouterr().out.splitlines()

    def form(line):
        return re.sub(r"[0-9.e+-]+", "0", line)

    assert form(re.search("^run.jsonl: no departure.*", text, re.M)[0]) in map(form, said)
    shown = re.search(r"^run.jsonl: \d+ of \d+ rules.*?```", text, re.S | re.M)[0]
    assert f"of {len(check_trace.RULES)} rules" in shown
    assert check_trace.RULES["own"] in text
    names = re.findall(r"`([a-z-]+\.(?:jsonl|safetensors))`", text)
    assert set(names) == {p.name for p in VECTORS.iterdir()} - {"tiny-forward-skip.safetensors"}
    assert all((HERE / name).exists() for name in re.findall(r"`([a-z_]+\.py)`", text))
    assert len(text.splitlines()) < 80
