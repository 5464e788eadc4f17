"""What the oracle promises: right traces pass, wrong ones are found where they are wrong, and the
vectors show what TRACE.md says they do. Most traces are of the tiny model that ships.
"""
import copy
import io
import itertools
import json
import math
import re
import runpy
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import clasp_mini
import dp_layer_skip
import llama
import speculative
from command.flags import DEMO, DTYPES
from llama import Cache, Llama, read_config
from oracle import allowed, check_trace, conformance, dumps, greedy, make_vectors, ours, trace
from oracle.check_trace import NUMERIC, TOLERANCE
from oracle.diagnosis import RULES, correlated, repeated
from oracle.ours import traced as run
from oracle.sampler import check as sampler_check
from oracle.sampler.law import ALONE, CASES
from oracle.trace import Recording, write_trace
from policy import probe
from speculative import Chance, Paper, Settings
from tests.helpers import full_model
from tests.slow_llama import random_checkpoint
from tests.wrong_programs import WRONG, dp, edit, put, running, sp
from text.safetensors_file import save

HERE = Path(trace.__file__).resolve().parent
ROOT = HERE.parent
VECTORS = HERE / "vectors"
TINY = HERE / "tiny"
RUNS = {p.stem: conformance.read(p) for p in sorted(VECTORS.glob("*.jsonl"))}
S = Settings(temperature=0.2, top_k=20, top_p=0.9, N=14, K=4, M=2, exit_threshold=0.05, interval=2)


def jsonl(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture
def check(capsys, tmp_path):
    """check(lines or bytes, *arguments) -> the checker's exit status and what it said: on standard
    output; of what is no trace one line of ASCII on standard error."""
    def call(lines, *arguments, model=TINY):
        path = tmp_path / "checked.jsonl"
        path.write_bytes(lines if isinstance(lines, bytes) else jsonl(*lines))
        capsys.readouterr()
        status = check_trace.main([str(path), "--model", str(model), *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (err.count("\n"), out == "") == ((1, True) if status == 2 else (0, False))
        assert err.isascii() and len(err) < 500
        return status, (out + err).replace(f"{path}: ", "")
    return call


@pytest.fixture
def traced(tmp_path):
    """traced(flags) -> the lines that the command writes, told these costs."""
    def call(flags):
        L = read_config(TINY).L
        costs, path = tmp_path / "costs", tmp_path / "trace"
        costs.write_text(json.dumps(dict(draft=[1] + [0.1] * L, verify=[1] * 14, optimise=0)))
        assert clasp_mini.main(["--model", str(TINY), "--device", "cpu", "--trace", str(path),
                                "--costs", str(costs), *flags.split()]) == 0
        return conformance.read(path)
    return call


def find(lines, event, n=0, **want):
    """The index of the n-th such line; a wanted value may be a function that says yes."""
    fit = [i for i, line in enumerate(lines) if line["event"] == event and all(
        w(line[k]) if callable(w) else line[k] == w for k, w in want.items())]
    return fit[n] if fit[n:] else None


def confidences(lines, event):
    """Of the drafts after which such a line stands."""
    return [line["confidence"] for line, then in zip(lines, lines[1:])
            if line["event"] == "draft" and then["event"] == event]


def with_line(lines, i, **changes):
    return [*lines[:i], lines[i] | changes, *lines[i + 1:]]


def with_settings(lines, **changes):
    return with_line(lines, 0, settings=lines[0]["settings"] | changes)


LIVELY = replace(S, N=16, interval=3, temperature=0.5, top_k=0, top_p=1.0)
JUDGED = dict(accepted=lambda v: v is not None, a=lambda a: a < 0.9)
UNJUDGED = dict(accepted=None)
THIRD = dict(round=3)                  # has a table


@pytest.fixture(scope="module")
def lively():
    """The lines of a sampled trace in which everything happens."""
    situations = [("own", dict(kind="residual")), ("own", dict(kind="bonus")), ("verify", JUDGED),
                  ("optimise", THIRD), ("verify", UNJUDGED), ("draft", dict(step=3))]
    runs = (run(TINY, [3, 41, 7], LIVELY, seed, dtype=torch.float32) for seed in range(50))
    return next(lines for lines in runs if all(
        find(lines, event, **want) is not None for event, want in situations))


def numbers(of_draw=None, of_rejected=None):
    """A change: a verdict's number is made of its draw's, a correction's of the rejection's."""
    right = Recording.uniform

    def uniform(self):
        n = len(self.u)
        k = len(self.a)                                # 0 until all k are drawn
        rejected = [u for u, a in zip(self.u[k:], self.a) if u >= a]
        if of_draw and k <= n < 2 * k:
            self.u.append(of_draw(self.u[n - k]))
        elif of_rejected and n == 2 * k and rejected:
            self.u.append(of_rejected(rejected[0]))
        else:
            right(self)
        return self.u[-1]
    return put(Recording, "uniform", uniform)


# ---------------------------------------------------------------- what is right passes

OPEN = "--prompt-ids 3,41,7 --max-new-tokens 30 --temperature 0.2"
LONG = "--prompt-ids " + "3,41,7," * 60


@pytest.mark.parametrize("flags", [
    OPEN, f"{OPEN} --skip-layers 0", f"{OPEN} --skip-layers 5 --probe 5 --interval 3",
    f"{OPEN} --top-k 3 --top-p 0.9 --draft-exit-threshold 0.7 --dtype float64",
    f"{OPEN} --strategy paper --temperature 1 --top-k 20 --top-p 0.9 --interval 1",
    f"{OPEN} --strategy paper --temperature 1 --dtype bfloat16 --probe 2 --interval 5",
    f"{OPEN} --strategy ar", "--prompt-ids 3 --max-new-tokens 1 --draft-length 4",
    f"{LONG} --max-new-tokens 4 --skip-layers 5 --probe 64"], ids=lambda flags: flags[-50:])
def test_own_traces_check_clean_at_every_setting(flags, check, traced):
    """Rejects a rule that is too strict for some sampler, policy, dtype or long prompt, and a cache
    without room for the candidates of a probe of several tokens. With `--skip-layers 0` a policy
    once wrote tables that nobody had asked for."""
    lines = traced(flags)
    assert check(lines)[0] == 0
    if lines[0]["dtype"] == "float32":
        assert check(lines, "--dtype", "float64")[0] == 0
    if flags == OPEN:
        assert lines[0]["costs"] and lines[0]["settings"]["K"] is None and find(lines, "draft")


def test_a_trace_has_whole_rounds_whenever_it_is_broken_off(tmp_path):
    """Rejects lines that wait in a buffer, a round that is yielded first and written then, and an
    `end` that was not reached."""
    path = tmp_path / "t"
    with open(path, "w") as out:
        rounds = write_trace(out, Llama.load(TINY), [3], LIVELY,
                             Recording(Chance(0).uniform), dp_layer_skip.choose_skip,
                             Paper(LIVELY, 5), {}, dict(r=1, seed=0))
        for n in range(4):
            next(rounds)
            last = json.loads(path.read_text().splitlines()[-1])
            assert (last["event"], last["round"]) == ("times", n)
        rounds.close()
    assert json.loads(path.read_text().splitlines()[-1]) == last


def test_what_a_policy_says_must_be_so_and_what_the_settings_name_holds(check, traced):
    """Rejects a checker that lets a policy skip a set of no table, claim an end that was none, or
    depart from a K, an M, a threshold or an interval that the settings name."""
    lines = traced(f"{OPEN} --interval 4")
    i = find(lines, "round", skip=lambda layers: layers, ended="policy")
    for n, rule, field, value in (
            (i, "skip", "skip", [0, 5]), (i, "exit", "ended", "N"), (1, "exit", "ended", "policy"),
            (i, "exit", "ended", "confidence"), (i, "exit", "ended", "stop")):
        said = check(with_line(lines, n, **{field: value}))[1]
        assert f"line {n + 1}, " in said and f"rule {rule}" in said, said
    k = max(line.get("step", 0) for line in lines)
    least = min(confidences(lines, "draft"))
    for rule, field, value in (("exit", "K", k), ("exit", "exit_threshold", least + 1e-3),
                               ("(skip|shape)", "M", 5), ("interval", "interval", 50)):
        said = check(with_settings(lines, **{field: value}))[1]
        assert re.search(f"rule {rule}", said), (field, said)


# ---------------------------------------------------------------- what is wrong is found

RULE_OF = dict(      # what is said of a line in which this field alone is wrong
    round=dict(round="order", start="start", skip="skip", ended="exit"),
    draft=dict(round="order", step="order", token="q", q="q", confidence="confidence", u="draw"),
    verify=dict(round="order", step="order", token="order", p="p", q="ratio", a="ratio",
                accepted="verdict"),
    own=dict(round="order", kind="kind", token="own", probability="residual", u="draw", p="own",
             q="own", mass="own"),
    emit=dict(round="order", tokens="emit"), end=dict(reason="end", emitted="end"),
    optimise=dict(round="order", position="probe", M="shape", D="shape", skip="path"))


def other(event, field, value):
    """Another value, near to this one."""
    if field == "u":
        return (value + 0.5) % 1
    if isinstance(value, str):
        return next(word for word in trace.EVENTS[event][field] if word != value)
    if field == "skip":
        return sorted([*value[1:], next(i for i in range(6) if i not in value)])
    if isinstance(value, list):
        return value[:-1]
    if isinstance(value, bool) or value is None:
        return not value
    return (value + 1) % 80 if isinstance(value, int) else value + 1e-3


def test_every_wrong_value_is_found_where_it_is(check, lively):
    """Rejects a checker that overlooks a field, blames another line, or another rule."""
    for event, wheres in dict(
            round=[dict(round=2)], draft=[dict(step=0), dict(step=1)],
            verify=[JUDGED, UNJUDGED, dict(a=1.0)], emit=[dict(round=2)], end=[{}],
            own=[dict(kind=kind) for kind in ("plain", "residual", "bonus")],
            optimise=[dict(round=3)]).items():
        for i in [find(lively, event, **where) for where in wheres]:
            for field, rule in RULE_OF[event].items():
                value = other(event, field, lively[i][field])
                until = f"0-{lively[i].get('round', 99)}"
                status, said = check(with_line(lively, i, **{field: value}), "--rounds", until)
                place = rf"line {i + 1}, round \d+.*: .*: trace .*, ours .*\nrule {rule}:.*\n"
                assert status == 1 and re.match(place + "look at: the ", said), (field, said)


def verify_first(lines, i):
    """A verdict on each token before the next is drafted."""
    lines.insert(i, lines.pop(i + find(lines[i:], "verify")))


gone = list.__delitem__
CORRUPTIONS = [                        # rule, of which line, what is done there, how much later
    ("verdict", "verify", JUDGED, lambda x, i: x[i].update(u=x[i]["a"], accepted=True), 0),
    ("verdict", "verify", JUDGED, lambda x, i: x[i].update(u=None), 0),
    ("verdict", "verify", UNJUDGED, lambda x, i: x[i].update(accepted=True), 0),
    ("order", "verify", {}, gone, 0),
    ("exit", "draft", dict(step=1), verify_first, 0),
    ("exit", "draft", dict(step=3), lambda x, i: x.insert(i + 1, dict(x[i])), 1),
    ("exit", "draft", dict(step=3), gone, 0),
    ("interval", "optimise", THIRD, gone, 0),
    ("interval", "emit", dict(round=1), lambda x, i: x.insert(i + 1, x[4] | dict(round=1)), 1),
    ("interval", "optimise", {}, lambda x, i: x[0]["settings"].update(stop_ids=x[3]["tokens"]), 0),
    ("shape", "optimise", THIRD, lambda x, i: x[i]["skipped"].__setitem__(4, "110"), 0),
    ("shape", "optimise", THIRD, lambda x, i: x[i]["skipped"].__setitem__(1, "0 "), 0),
    ("end", "end", {}, lambda x, i: x.append(x[1]), 1),
    ("header", "header", {}, lambda x, i: x[0]["config"].update(eps=1.00001e-5), 0),
]


@pytest.mark.parametrize("rule, event, where, harm, later", CORRUPTIONS)
def test_every_corruption_is_found_where_it_is(rule, event, where, harm, later, check, lively):
    """Rejects a checker that overlooks what is missing, too much or against the settings."""
    i = find(lively, event, **where)
    harm(lines := copy.deepcopy(lively), i)
    status, said = check(lines)
    assert status == 1 and re.match(rf"line {i + 1 + later}, .*\nrule {rule}:", said), said


# ---------------------------------------------------------------- tolerances, from both sides

def nudged(lines, rule, by):
    """Lines changed by so much, consistent in itself: other rules have nothing to say to it."""
    lines = copy.deepcopy(lines)
    if rule in ("p", "q", "ratio"):        # of a token that was never judged
        line = lines[find(lines, "verify", accepted=None, a=lambda a: a < 1)]
        line["p"] += by * (rule == "p")
        line["q"] += by * (rule == "q")
        line["a"] = min(1.0, line["p"] / line["q"]) + by * (rule == "ratio")
        lines[find(lines, "draft", round=line["round"], step=line["step"])]["q"] = line["q"]
    elif rule == "confidence":
        lines[find(lines, "draft")]["confidence"] += by
    elif rule in ("column", "table"):
        lines[find(lines, "optimise")]["D"][3][rule == "table"] -= by
    else:
        line = lines[find(lines, "own", kind="plain")]
        line["p"] += by * (rule == "own")
        line["probability"] = line["p"] + by * (rule == "residual")
    return lines


@pytest.mark.parametrize("dtype, X, temperature", [("float64", 1e-9, 0.5), ("float32", 2e-5, 2.0)])
def test_what_is_allowed_ends_where_trace_md_says(dtype, X, temperature, check):
    """Rejects a tolerance four times too wide or too narrow, one that does not grow below
    temperature 1, one that shrinks above it, and one that --tolerance does not set."""
    s = replace(LIVELY, temperature=temperature, M=5, N=8, exit_threshold=0.0)
    runs = (run(TINY, [3, 41, 7], s, seed, dtype=DTYPES[dtype]) for seed in range(50))
    lines = next(x for x in runs if find(x, "verify", accepted=None, a=lambda a: a < 1))
    slack = dict.fromkeys(("q", "p", "own"), X / min(1, temperature))
    slack |= dict(confidence=X, column=X / 4, table=X / 4, ratio=1e-9)
    slack["residual"] = 1e-6 * lines[find(lines, "own")]["p"]
    for rule, most in slack.items():
        for by, status in ((0.9, 0), (1.1, 1)):
            got, said = check(nudged(lines, rule, by * most))
            assert got == status and (got == 0 or f"rule {rule}:" in said), said
    i = find(lines, "own")
    logits = full_model(Llama.load(TINY, dtype=DTYPES[dtype]), [3, 41, 7])
    end = speculative.probabilities(logits, s)[:lines[i]["token"] + 1].sum().item()
    for by, status in ((0.9, 0), (1.1, 1)):
        assert check(with_line(lines, i, u=end + by * slack["q"]))[0] == status
    for tolerance, status in ((1.2 * X, 0), (X, 1), (0, 2)):
        assert check(nudged(lines, "q", 1.1 * slack["q"]), "--tolerance", tolerance)[0] == status


def test_what_a_float32_or_a_greedy_program_writes_and_its_times_are_read(check, lively):
    """Rejects a comparison of eps and theta to the last bit, an alarm for a probability that a
    softmax in float32 gives, the demand that a greedy program draw at all, but a wrong token that
    u = 0 lets through; "length" where the last token is a stop token; and seconds that may be
    anything, in any round."""
    config = {k: torch.tensor(v).item() if type(v) is float else v
              for k, v in lively[0]["config"].items()}
    assert config != lively[0]["config"] and check(with_line(lively, 0, config=config))[0] == 0
    greedy = [line | dict(u=0) if line.get("u") is not None else line
              for line in RUNS["tiny-greedy"]]
    assert check(with_line(greedy, 2, probability=1 + 1e-10, p=1 + 1e-10))[0] == 0
    said = check(with_line(greedy, 2, token=0))[1]
    assert "rule own" in said and f"ours draws token {greedy[2]['token']} by this u" in said
    stopped = run(TINY, [3], replace(S, N=1, stop_ids=tuple(range(80))), 0)
    assert stopped[-1]["reason"] == "stop" and check(stopped)[0] == 0
    for fields, status in (dict(), 0), (dict(draft=-1.0), 2), (dict(round=1), 1):
        times = dict(event="times", round=0, draft=0.0, verify=0.1, optimise=0.0) | fields
        assert check([*lively[:5], times, *lively[5:]])[0] == status


def test_a_tie_decided_the_other_way_is_no_departure(check, tmp_path):
    """Rejects a checker that asks for our choice between states that are equally near: of a model
    whose layers 2 and 3 do nothing. (Of logits that tie: the next but one.)"""
    w = random_checkpoint(tmp_path / "tied", dict(num_hidden_layers=5))[1]
    for name in w:
        if re.search(r"layers\.[23]\..*(o_proj|down_proj)", name):
            w[name].zero_()
    save({name: x.float() for name, x in w.items()}, tmp_path / "tied" / "model.safetensors", {})
    right = run(tmp_path / "tied", [3, 41, 7], S, 0)
    with running("ties are run"):
        other = run(tmp_path / "tied", [3, 41, 7], S, 0)
    i = find(right, "optimise")
    assert right[i]["skipped"] != other[i]["skipped"]
    assert check(other, model=tmp_path / "tied")[0] == 0


def test_a_rejection_that_only_rounding_explains_is_no_departure(check):
    """Rejects a residual compared as if it were exact: here next to nothing is owed, and which
    token it falls to differs with the precision."""
    other = Chance(1)
    for M, dtype in itertools.product((0, 1), ("float32", "float64")):
        with running(numbers(lambda _: 1 - 1e-12 * other.uniform())):
            lines = run(TINY, [3, 41, 7], replace(LIVELY, M=M), 0, dtype=torch.float32)
        assert find(lines, "own", kind="residual")
        assert check(lines, "--dtype", dtype)[0] == 0


def test_tokens_at_an_edge_within_the_tolerance_may_stand_on_either_side():
    """Rejects one distribution where rounding decides between several, several where it does not,
    and a token asked about that is lost among its equals."""
    def kept(p, s, about=(), X=1e-6):
        logits = torch.tensor(p, dtype=torch.float64).log()
        options = allowed.allowed(logits, s, X, about)
        assert torch.equal(options[0], allowed.distribution(logits, s))
        return {tuple((q > 0).nonzero()[:, 0].tolist()) for q in options}

    hot = Settings(temperature=1.0)
    two = replace(hot, top_k=2)
    for top_p in (0.8 - 1e-7, 0.8 + 1e-7):
        assert kept([0.5, 0.3, 0.2], replace(hot, top_p=top_p)) == {(0, 1), (0, 1, 2)}
    for tie in (0, 1e-8):
        assert kept([0.4, 0.2, 0.2 + tie, 0.1], two) == {(0, 1), (0, 2), (0, 1, 2)}
    assert kept([0.4, 0.2, 0.2, 0.2], two) == {(0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3)}
    assert kept([0.4, 0.25, 0.2, 0.15], two) == kept([0.5, 0.3, 0.2], replace(hot, top_p=0.79))
    assert kept([0.3, 0.3 + 1e-7, 0.2, 0.2], Settings()) == {(0,), (1,)}
    assert (7,) in kept([0.1] * 10, Settings(), about=[7]) >= {(0,)}


def test_a_confidence_within_the_tolerance_of_the_threshold_may_go_either_way(check, lively):
    """Rejects a threshold taken more exactly than confidences are known, and one not taken."""
    ended = {line["round"] for line in lively if line.get("ended") == "confidence"}
    low = min(confidences(lively, "draft"))
    high = max(confidences([x for x in lively if x.get("round") in ended], "verify"))
    for threshold, status in ((low + 1e-6, 0), (low + 1e-3, 1), (high - 1e-6, 0), (high - 1e-3, 1)):
        got, said = check(with_settings(lively, exit_threshold=threshold))
        assert got == status and (got == 0 or "rule exit" in said)


# ---------------------------------------------------------------- wrong programs

def throwing_away(*how):
    """A draft that ends before a token that seems unlikely, though it was drawn."""
    drafted, q, confidence = sp.draft(*how)
    k = next((k for k, (token, p) in enumerate(zip(drafted, q)) if p[token] < 0.02), len(drafted))
    del how[-1].draws[k:], how[-1].u[k:]
    return drafted[:k], q[:k], confidence[:k]


draw = Chance.draw
NINE = itertools.cycle(n * 0.618 % 1 for n in range(9))
HOT = replace(S, top_k=0, top_p=1.0, N=50, M=5)
PLANTED = {        # a change by name: where the first message must send
    "caches by turn": (edit(Llama, "forward", (
        "self.layer(i, h[i], rows, cache)", "self.block(self.layers[i], h[i], rows, "
        "*cache.layers[i - sum(skip[:i])], self.cfg)")), "the draft"),
    "no final norm": (put(Llama, "head", lambda self, x: (x @ self.lm_head.T)), "the forward pass"),
    "no upper limit": (put(speculative, "acceptance", lambda p, q: p.double() / q), "the verdict"),
    "|p - q|": (put(speculative, "residual", lambda p, q: (p - q).abs() / (p - q).abs().sum()),
                "the residual"),
    "the row before": (put(speculative, "judge", lambda p, q, drafted, chance: sp.judge(
        p[[0, *range(len(drafted))]], q, drafted, chance)), "the (verdict|bonus token|residual)"),
    "rows one late": (put(speculative, "probabilities", lambda logits, s: sp.probabilities(
        logits if logits.dim() == 1 else logits[[0, *range(len(logits) - 1)]], s)),
        "the verify's rows"),
    "cosines of bfloat16": (put(dp_layer_skip, "cosine", lambda a, b: dp.cosine(
        a.bfloat16(), b.bfloat16())), "the table: how near"),
    "a mask without the token before": (
        edit(Cache, "candidates", ("window < t", "window < t - 1")), "the candidates"),
    "no causal mask": (edit(Cache, "sequence", (
        "<= slots[:, None]", "<= slots[-1] + 0 * slots[:, None]")), "the forward pass"),
    "draws from the last id on": (put(
        Chance, "draw", lambda self, p: len(p) - 1 - draw(self, p.flip(0))), "the draw"),
    "the q before": (put(speculative, "judge", lambda p, q, drafted, chance: sp.judge(
        p, [x + 1e-300 for x in (*q[:1], *q[:-1])], drafted, chance)), "the (verdict|residual)"),
    "a draft without filters": (edit(speculative, "draft", ("probabilities(logits, s)",
        "probabilities(logits, Settings(temperature=s.temperature))")), "the filters.* the draft"),
    "residual = p": ("residual = p", "the residual: the token was drawn from p"),
    "bonus from the row before": ("bonus from the row before", "the bonus token"),
    "confidence of the filters": (edit(speculative, "draft", (
        "logits.softmax(-1).amax", "q[-1].amax")), "the confidence"),
    "the largest for the mass": (edit(trace, "events", (".sum().item() if", ".amax().item() if")),
                                 "the residual: norm"),
    "one number draws and judges": (numbers(lambda u: u), "the generator"),
    "a verdict by the mirrored number": (numbers(lambda u: 1 - u), "the generator"),
    "a rejected number draws": (numbers(None, lambda u: u), "the generator"),
    "a rejected number draws mirrored": (numbers(None, lambda u: 1 - u), "the generator"),
    "numbers begin again": (put(Chance, "uniform", lambda self: next(NINE)), "the generator")}
# Of the table of wrong programs: in which part those of a module are.
PART_OF = {dp_layer_skip: "the table", llama: "the (forward pass|cache|draft|candidates)",
           probe: "the (candidates|table: how near|table: what states)",
           speculative: "the (filters|verdict|residual|draw|draft|bonus token|verify's rows|loop|"
                        "cache|table: (what states|h)|candidates: their position)"}
# What is as right, up to rounding, or in no trace; what takes a u of 0, a number just at an edge or
# none, or what this model or policy has not; what writes no trace or other numbers.
UNSEEN = {
    "ties are run", "top-k cuts ties by id", "uniforms of 24 bits", "scratch begins at the probe",
    "a skipped layer writes", "a call for every cell", "g[i,0] is computed again",
    "the host waits for every layer", "the stars stand one row early",
    "the printed case is another", "the verify's seconds are the draft's too",
    "a stop in a draft is told twice", "the cosine is as wide as the states", "norms in bfloat16",
    "rotary tables in bfloat16", "errors ride along in the states' dtype",
    "the running sum is float32", "accepts at u = a", "draws at u = the running sum",
    "drafting ends at the threshold", "top-p keeps one more where the mass is reached",
    "a residual of no mass is no number", "a zero state has no cosine",
    "a row at a time runs what is no number", "infinite logits are numbers",
    "only the prompt's logits are looked at",
    "Transformers 5 not understood", "one token is compared as several are",
    "argmax draft scored with a softmax q", "a cache begins uninitialised",
    "a probe longer than the text", "the correction is drawn with the number that rejected"}


def first_message(change, part, check):
    """What the checker says of the trace of a wrong program, on the first of forty prompts on which
    it says anything. (From 20 on rare tokens come soon; of numbers the first trace shows it.)"""
    for seed in range(20, 21 if part == "the generator" else 60):
        s = replace(S, N=8, exit_threshold=0.05 * (seed % 2),
                    stop_ids=tuple(range(40, 46 + seed % 9)))
        with running(change):
            lines = run(TINY, [seed, 41, 7], HOT if part == "the generator" else s, seed,
                        (1, 2, 9)[(seed + 1) % 3])
        status, said = check(lines)
        if status > 0:
            return re.search("look at: (.*)", said)[1]
    return None


def test_every_wrong_program_is_found_at_the_right_place(check):
    """Rejects a checker that any of the wrong programs would satisfy, and one that leads astray: no
    first message names a part where the error is not."""
    faults = {name: (name, PART_OF[module]) for module, names in WRONG.items()
              for name in names if name not in UNSEEN} | PLANTED
    said = {wrong: first_message(*how, check) for wrong, how in faults.items()}
    missed = [wrong for wrong in faults if said[wrong] is None]
    astray = [(wrong, said[wrong]) for wrong, (_, part) in faults.items()
              if said[wrong] and not re.search(part, said[wrong])]
    assert not missed and not astray and len(faults) > 50, (missed, astray)


def test_drafted_tokens_that_were_thrown_away_are_missed(check):
    """Rejects a checker that believes a policy, of open settings, which drafts only what it likes;
    and one that suspects a policy that ends a draft early."""
    s = replace(HOT, temperature=0.5, N=80, exit_threshold=0.0, K=3)
    for changes, status in (([], 0), ([put(speculative, "draft", throwing_away)], 1)):
        with running(*changes):
            lines = run(TINY, [3, 41, 7], s, 0)
        lines = [line | dict(ended="policy") if line.get("ended") == "K" else line
                 for line in with_settings(lines, K=None)]
        got, said = check(lines)
        assert got == status and (got == 0 or "rule kept" in said), said


def test_numbers_that_repeat_or_follow_from_one_another_are_told_from_chance():
    """Rejects an alarm for the repeats that float32's 2^24 numbers, or 2^32, must have in a long
    trace, or for one of them in a short one; silence about few repeats in a short one, about one of
    53 bits, and about zeros alone; a correlation that is not in standard deviations, and an alarm
    for few numbers or equal ones."""
    narrow = torch.rand(6000, generator=torch.Generator().manual_seed(0)).tolist()
    wide = [Chance(0).uniform() + n / 2 ** 14 for n in range(6000)]
    middle = [math.floor(u * 2 ** 32) / 2 ** 32 for u in wide]
    assert len(set(narrow)) < 6000 and len(set(narrow[:1800])) == 1800
    for fine in (narrow, [*narrow[:1800], narrow[0]], [*narrow[:90], narrow[0]],
                 [*middle, middle[0]], wide, [], [0.0]):
        assert repeated(fine) == 0
    for numbers, again in (([*wide, wide[0]], 1), ([*narrow[:60], *narrow[50:60]], 10),
                           ([0.0] * 200, 199), (narrow[:600] * 2, 600)):
        assert repeated(numbers) == again
    x = torch.rand(200, 100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = torch.tensor([correlated(pairs.tolist()) for pairs in x])
    assert 0.8 < sums.std() < 1.2 and sums.abs().max() < 4
    assert correlated([(u, 1 - u) for u in x[0, :100, 0].tolist()]) == pytest.approx(-10)
    assert correlated([(0.1, 0.9)] * 2) == correlated([(0.5, 0.5)] * 99) == correlated([]) == 0


def test_the_check_goes_on_after_departures_in_numbers_and_counts_them(check, lively):
    """Rejects a count of the first alone, a place that is the last one's, and one that goes on
    where the trace does not say how."""
    i = find(lively, "draft", 2)
    lines = copy.deepcopy(lively)
    for n in (2, 3):
        lines[find(lines, "draft", n)]["confidence"] += 1e-3
    out = check(lines)[1]
    assert out.startswith(f"line {i + 1}, ") and "it ends" not in out
    assert re.search(r"departures in \d+ rounds, .*: confidence 2 of \d+; none in q, p, ", out)
    end = find(lines, "emit", -1)
    out = check(with_line(lines, end, tokens=[0]))[1]
    assert out.startswith(f"line {i + 1}, ") and f"it ends in line {end + 1}" in out


# ---------------------------------------------------------------- files from other programs

NO_TRACES = [                          # what is in the file, what is said
    (lambda x: b"", "empty"), (lambda x: b"hello\n", "line 1: b'hello"),
    (lambda x: b"[" * 10 ** 6 + b"\n", "a JSON object"), (lambda x: jsonl(*x)[:-5], "line {n}: b'"),
    (lambda x: jsonl(*x[1:]), "whose event is one of header"),
    (lambda x: with_line(x, 0, version=4), "version is 4; (5,) wanted"),
    (lambda x: with_line(x, 0, prompt_ids=[80]), "prompt_ids"),
    (lambda x: with_line(x, 0, model=x[0]["model"] | {"\n": ""}), "SHA-256 of '\\n'"),
    (lambda x: with_settings(x, N=10 ** 8), "the model's context of 256"),
    (lambda x: with_settings(x, M=7), "M is 7; the model has 6 layers"),
    (lambda x: with_settings(x, K=1.0), "K is 1.0"), (lambda x: with_settings(x, r=0), "r is 0"),
    (lambda x: with_settings(x, temperature=1e-30), "checks nothing"),
    (lambda x: with_settings(x, temperature=math.nan), "temperature is nan"),
    (lambda x: with_line(x, 2, u=1.0), "u is 1.0"), (lambda x: with_line(x, 2, kind=[]), "kind is"),
    (lambda x: with_line(x, 2, token=80), "line 3, own: token 80 of 80"),
    (lambda x: with_line(x, 2, p=math.inf), "p is inf; number wanted"),
    (lambda x: with_line(x, 2, **{"\n\ud800": 1}), "unknown field '\\n\\ud800'"),
    (lambda x: jsonl(x[0], x[1], {"event": "own"}), "line 3, own: missing field 'round'")]


@pytest.mark.parametrize("make, said", NO_TRACES)
def test_a_file_that_is_no_trace_gets_one_clear_line(make, said, check, lively):
    """Rejects a traceback, a guess, and a message without the line's number."""
    status, line = check(make(lively))
    assert status == 2 and said.replace("{n}", str(len(lively))) in line


def test_what_cannot_be_done_is_named(capsys, lively, tmp_path, monkeypatch):
    """Rejects a traceback or a status of 1, which is a departure, for what is no trace; a layer
    that is silently not skipped; and `--device cuda` refused where there is a GPU."""
    right = tmp_path / "t"
    right.write_bytes(jsonl(*lively))
    for gpu, said, program, *arguments in (
            (0, "directory", check_trace, DEMO), (0, "another model", check_trace, right),
            (0, "config.json", check_trace, right, "--model", "/no"),
            (0, "--skip 6: the model has layers", dumps, tmp_path / "d", "--model", TINY,
             "--prompt-ids", "3", "--skip", "1,6"),
            (0, "--device: invalid choice", check_trace, right, "--device", "cuda"),
            (0, "--device: invalid choice", greedy, right, right, "--device", "cuda"),
            (1, "No such file", greedy, "/no", right, "--device", "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
        assert program.main(list(map(str, arguments))) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err, err


def test_a_trace_that_breaks_off_is_checked_as_far_as_it_goes(check, lively):
    """Rejects success for a run without its end, and silence about an error before the break."""
    for n in (1, 3, 4, 9, len(lively) - 1):
        status, said = check(lively[:n])
        assert status == 3 and f"incomplete: no departure in {n} lines" in said
    assert check([*lively[:2], lively[2] | dict(token=0), lively[3]])[0] == 1


@pytest.mark.parametrize("name", ["check_trace", "conformance", "dumps", "greedy", "sampler/exact",
                                  "ours"])
def test_a_script_looks_in_the_right_folder_and_names_a_wrong_flag(name, monkeypatch, capsys):
    """Rejects a script that finds its own folder alone, whose trace.py is not Python's; a status
    that is lost on the way, and the whole usage for a slip."""
    script = HERE / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--no-flag"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    try:
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert str(ROOT) in sys.path[:2] and str(script.parent) not in sys.path[:2]
    assert (status, err.count("\n")) == ((0, 0) if name == "ours" else (2, 1))
    assert err == "" or err.startswith(f"{script.name}: ")


# ---------------------------------------------------------------- forward dumps

def test_fingerprints_are_of_every_file_that_is_read_and_of_no_other(tmp_path):
    """Rejects a shard, or the index, that could change unnoticed; and a file beside them that makes
    another model of it, of which llama.tensors reads nothing."""
    random_checkpoint(tmp_path, shards=2)
    before = trace.fingerprint(tmp_path)
    assert before.keys() == {p.name for p in tmp_path.iterdir()} and len(before) == 4
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert trace.fingerprint(tmp_path) == before
    for name in before:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")
        assert trace.fingerprint(tmp_path)[name] != before[name]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert trace.fingerprint(tmp_path).keys() == {"config.json", "model.safetensors"}


PLACES = [         # what is changed: where it departs, what is said
    (lambda d: d["hidden"][0].mul_(1.1), r"the embedding, hidden\[0\], token 0 ", "the embedding"),
    (lambda d: d["values"][0].mul_(1.1), r"layer 0, values\[0\], token 0 ", "eps inside the root"),
    (lambda d: d["keys"][0, 1:].neg_(), r"layer 0, keys\[0\], token 1 ", "the rotary embedding"),
    (lambda d: d["keys"][2].mul_(1.1), r"layer 2, keys\[2\], token 0 ", "the keys' matrix"),
    (lambda d: d["keys"][2].copy_(d["keys"][2].unflatten(-1, (2, -1)).mT.flatten(-2)),
     r"layer 2, keys\[2\], token 0 ", "in another order"),
    (lambda d: d["hidden"][1, 1:].mul_(1.1), r"layer 0, its output hidden\[1\], token 1 ",
     r"queries .* h // \(H/G\)|which query head"),
    (lambda d: d["hidden"][1].mul_(1.1), "layer 0, .* token 0 ", "the feed-forward part"),
    (lambda d: d["hidden"][3, :-1].add_(0.1), "layer 2, .* token 0 ", "the causal mask"),
    (lambda d: d["hidden"][4, 2, 7].add_(1e-5), r"layer 3, .* hidden\[4\], token 2 of", "queries"),
    (lambda d: d["hidden"][4, 2, 7].fill_(math.nan), r"layer 3, .* token 2 of 0..11:", "queries"),
    (lambda d: d["logits"].mul_(1.1), "the logits, token 0 ", "the final norm"),
    (lambda d: d["values"][2, 5].zero_(), "layer 2, .* token 5 ", "entries that were not written")]


def test_two_dumps_are_compared_in_the_order_of_computation_and_what_agrees_is_excluded():
    """Rejects a comparison that names a later place than the first, or sends to another part; a
    fault in one entry that a part's mean would hide; and what is no number taken for equal."""
    ours = dumps.read(VECTORS / "tiny-forward.safetensors")
    for change, place, said in PLACES:
        theirs = {name: x.clone() for name, x in ours.items()}
        change(theirs)
        status, out = dumps.compare(ours, theirs)
        assert status == 1 and re.match(place, out) and re.search("look at: .*" + said, out), out


def test_dumps_that_are_alike_or_cannot_be_compared_are_told_apart(tmp_path, capsys):
    """Rejects rounding called a fault, another text called one, and a traceback for no dump."""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for path, ids, dtype, status, said in (
            (a, "3,41,7", "float64", 0, "alike"), (b, "3,41,7", "float32", 0, "alike"),
            (b, "3,41,7", "bfloat16", 0, "alike"), (b, "3,41", "float32", 2, "shapes"),
            (b, "3,41,8", "float32", 2, "different tokens")):
        assert dumps.main([path, "--model", str(TINY), "--device", "cpu",
                                  "--prompt-ids", ids, "--dtype", dtype]) == 0
        assert dumps.read(path)["keys"].dtype == DTYPES[dtype]
        assert dumps.main([a, "--against", path]) == status
        assert said in "".join(capsys.readouterr())
    (tmp_path / "b").write_bytes(b"no dump")
    for path in (b, "/nowhere", tmp_path, DEMO / "model.safetensors"):
        assert dumps.main([a, "--against", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_checkers_own_filters_are_those_of_the_program():
    """Rejects a checker that judges by other filters, residuals or draws than the program's, at
    logits that tie and at any settings. (It has its own, so as not to judge by what it judges.)
    How far a draw is off is not seen from one end of its interval alone, nor of a residual that is
    normalised; and a token without probability cannot be drawn."""
    generator = torch.Generator().manual_seed(0)
    for n, (T, top_k, top_p) in enumerate(itertools.product(
            (0, 1e-3, 0.7, 1, 9), (0, 1, 3, 60), (1e-9, 0.5, 0.9, 1))):
        logits = torch.randn(2, 40, generator=generator, dtype=torch.float64)
        logits[:, 20:] = logits[:, :20]
        s = Settings(temperature=T, top_k=top_k, top_p=top_p)
        p = speculative.probabilities(logits, s)
        ours = torch.stack([allowed.distribution(x, s) for x in logits])
        assert torch.equal(p > 0, ours > 0) and torch.allclose(p, ours, 1e-12, 0)
        owed = speculative.residual(*p)
        mass = allowed.owed(*ours).sum()
        assert torch.allclose(mass * owed, allowed.owed(*ours), 1e-9, 1e-15)
        for of_p, of_q, dist in ((ours[0], None, p[0]), (*ours, owed)):
            token = int(Recording(Chance(n).uniform).draw(dist))
            assert allowed.distance(of_p, of_q, token, Chance(n).uniform()) == 0
            assert allowed.drawn_by(dist, Chance(n).uniform()) == token
    p = torch.tensor([0.2, 0.3, 0.0, 0.5])
    q = torch.tensor([0.0, 0.7, 0.0, 0.3])
    for u, of_q, token, off in ((0.1, None, 1, 0.1), (0.6, None, 1, 0.1), (0.6, None, 2, math.inf),
                                (0.75, q, 0, 0.1), (0.25, q, 3, 0.1)):
        assert allowed.distance(p, of_q, token, u) == pytest.approx(off)


def test_a_part_of_a_trace_is_checked_by_itself(check, lively):
    """Rejects a part that begins with another text, set or cache than the whole has there, that is
    cut off a round early or late, and one that is not there."""
    last = lively[find(lively, "emit", -1)]["round"]
    for part in ("0-1", f"2-{last - 1}", f"3-{last + 9}"):
        assert check(lively, "--rounds", part)[0] == 0
    wrong = with_line(lively, find(lively, "draft", round=3), confidence=0.9)
    for part, status in (("1-2", 0), ("3-3", 1), ("2-5", 1), ("4-6", 0)):
        got, said = check(wrong, "--rounds", part)
        assert got == status and (status == 1 or f"rounds {part[0]} to {part[-1]}; " in said), said
    for lines, part in ((lively, "9-2"), (lively, "x"), (lively, f"{last + 1}-{last + 2}"),
                        (lively[:9], "9-9")):
        assert check(lines, "--rounds", part)[0] == 2
    for n, status in ((0, 1), (9, 2)):                 # its text is lost, or longer than N
        other = [x for x in lively for _ in range(n if x["event"] == "emit" else 1)]
        assert check(other, "--rounds", "2-3")[0] == status


def test_where_two_greedy_texts_part_a_tie_is_told_from_a_bug(tmp_path, capsys, monkeypatch):
    """Rejects a verdict on the parting alone, one that knows no type's rounding, and a text that is
    taken for greedy because the other is."""
    monkeypatch.setattr(dumps, "CHUNK", 7)
    lines = RUNS["tiny-greedy"]
    text = lines[0]["prompt_ids"] + [t for line in lines for t in line.get("tokens", ())]
    model = Llama.load(TINY, dtype=torch.float64)
    t = len(text) - 9
    highest, ids = full_model(model, text[:t]).topk(2)
    gap = (highest[0] - highest[1]).item()
    parted = [*text[:t], int(ids[1])]
    while len(parted) < len(text):
        parted.append(int(full_model(model, parted).argmax()))
    files = dict(a=text, b=parted, c=[*parted[:-1], 0 if parted[-1] else 1], d=text[:-1], e=[1, 2],
                 f=[*text[:t], 80])
    for name, ids in files.items():
        (tmp_path / name).write_text(",".join(map(str, ids)))
    (tmp_path / "json").write_text(json.dumps(dict(
        prompt_ids=parted[:3], ids=parted[3:], settings=dict(temperature=0.0, dtype="float32"))))
    greedily, hot = (VECTORS / f"tiny-{name}.jsonl" for name in ("greedy", "temperature"))
    for a, b, X, status, said in (
            ("a", greedily, None, 0, f"equal: {len(text)} tokens"), ("json", "b", None, 0, "equal"),
            ("a", "b", gap, 0, "a tie, not a bug"), ("a", "b", gap / 5, 1, "not a tie"),
            (greedily, "b", None, 1, "rounding in float64 explains up to 4e-09"),
            (greedily, "json", None, 1, "rounding in float32 explains up to 8e-05"),
            ("a", "c", gap, 1, f"but token {len(text) - 1} is "), ("d", "a", None, 3, "a goes on"),
            ("a", "e", None, 2, "two prompts"), ("a", "f", None, 2, "not the model of these texts"),
            ("a", hot, None, 2, "sampled"), ("a", "no", None, 2, "No such file"),
            ("a", "/dev/null", None, 2, "neither a trace")):
        with monkeypatch.context() as patch:
            if X:
                patch.setitem(TOLERANCE, "bfloat16", X / 4 * 1.01)
            got = greedy.main([str(tmp_path / a), str(tmp_path / b), "--model", str(TINY)])
        out = "".join(capsys.readouterr())
        assert got == status and said in out, (a, b, out)


# ---------------------------------------------------------------- levels and vectors

def faults(level, folder, answer):
    """Of each case that `answer` (a function of a request) gets wrong."""
    return (why for verdict, _, why in conformance.LEVELS[level](partial(map, answer), folder)
            if verdict == "WRONG")


def test_make_vectors_makes_what_is_here(tmp_path, monkeypatch):
    """Rejects vectors of other weights, numbers or an older program, another tiny model, and a dump
    by chunks that differs; and a level too strict for what is right."""
    monkeypatch.setattr(dumps, "CHUNK", 7)
    make_vectors.tiny_model(tmp_path / "tiny")
    make_vectors.make(tmp_path)
    for path in TINY.iterdir():
        assert path.read_bytes() == (tmp_path / "tiny" / path.name).read_bytes()
    for name, lines in RUNS.items():
        header = json.loads((tmp_path / f"{name}.jsonl").read_text().partition("\n")[0])
        assert header | dict(versions=0) == lines[0] | dict(versions=0)
    for level in (3, 4, 5):
        assert not list(faults(level, tmp_path, lambda request: {}))


LEVELS = [         # level, of which cases, what does not reach it
    (0, "", None), (2, "", None), (3, "tiny", None), (4, "tiny", None),     # our own program does
    (4, "tiny", edit(ours, "traced", ('!= "times"]', '!= "times"] + [dict(event="end")]'))),
    (0, "", "accepts at u = a"), (0, "", "draws at u = the running sum"),
    (0, "", "top-p before temperature"), (2, "", "ties are run"),
    (2, "", "the target is always h[L]"), (2, "", "g[i,0] is computed again"),
    (2, "", "the losing state is kept"), (2, "", "the way back reads one row early"),
    (2, "", "several tokens are held against h[i]"), (2, "", "cosines of bfloat16"),
    (3, "tiny", "the interleaved rotary layout"), (3, "tiny", "a norm without eps"),
    (4, "tiny", "one position too far"), (4, "zero-verdict", "accepts at u = a"),
    (4, "zero-draw", "draws at u = the running sum"), (4, "top-p", "residual = p"),
    (4, "stop-in-draft", "the text goes on after an accepted stop"),
    (4, "tiny-greedy", "the probe is the last drafted token"),
    (4, "tiny-probe", "one position for all tokens"),
    (4, "short-interval", "the probe is the token before the round"),
    (4, "tiny-temperature", "layers are optimised a round late"),
    (4, "top-p", "p without the filters")]


@pytest.mark.parametrize("level, cases, wrong", LEVELS)
def test_our_own_program_reaches_a_level_and_a_wrong_one_does_not(level, cases, wrong, tmp_path):
    """Rejects an example, ours.py, that does not answer what it is asked; tables and vectors too
    tame to tell; a level that does not look, at lines after the end for instance."""
    def answer(request):
        asked = request["case"].startswith(cases)
        return ours.ANSWERS[level](request) if asked else dict(skip="not asked")
    with running(*[PLANTED.get(wrong, [wrong])[0]] * bool(wrong)):
        assert any(faults(level, tmp_path, answer)) == bool(wrong)


def test_the_hall_of_bugs_names_wrong_programs_that_its_check_finds():
    """Rejects a row whose program is gone, or whose check does not find it; and another number of
    rounds than the right rules take."""
    hall, slow, _ = (HERE / "BUGS.md").read_text().split("\n## ")
    rows = [line.split("|") for line in hall.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    found = {(f"level {level}", wrong) for level, _, wrong in LEVELS}
    for row in rows:
        program, finder = (re.search(r"`(.+)`", cell)[1] for cell in row[3:5])
        cases = list(CASES) if finder == "level 1" else [finder]
        assert (finder, program) in found or sampler_check.missed(program, cases) <= 0.01, row
    _, _, taken = sampler_check.speed(dict.fromkeys(ALONE, 0.0)).partition("; ")
    slower = re.findall(r"^\| (.+?) \| (\d\S+) ", slow, re.M)
    assert slower and {f"{rule} {number}" for rule, number in slower} <= {*taken.split(", ")}


def test_the_vectors_show_what_trace_md_says():
    """Rejects a vector that has become too tame: other weights or another order of the uniform
    numbers may do that. (What a wrong program of LEVELS changes in it, it shows.)"""
    def rejected(name, **what):
        return [line for line in RUNS[name] if line["event"] == "verify"
                and line.items() >= dict(what, accepted=False).items()]

    for name, least in (("temperature", 2), ("tiny-greedy", 5), ("tiny-temperature", 5),
                        ("tiny-probe", 5)):
        rounds = {line["round"] for line in rejected(name)}
        tables = [line for line in RUNS[name] if line["event"] == "optimise"]
        assert len(rounds) >= least and rounds & {line["round"] for line in tables}, name
        assert len({tuple(line["skip"]) for line in tables}) > 1, name
    assert {"K", "confidence"} <= {line.get("ended") for line in RUNS["temperature"]}
    assert len(rejected("top-p", p=0)) > 1 and rejected("zero-verdict", a=0, u=0)
    assert not rejected("full-draft") and RUNS["full-draft"][-1]["reason"] == "length"
    own, emit, _ = RUNS["tiny-stops"][-3:]
    assert rejected("tiny-stops", token=61) and own["token"] == emit["tokens"][-1] == 9


# ---------------------------------------------------------------- the documents

def test_the_contract_names_every_field_rule_tolerance_and_vector():
    """Rejects a TRACE.md that has drifted from the grammar, the rules, the tolerances, the dumps or
    the vectors."""
    text = (HERE / "TRACE.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([A-Za-z0-9_.-]+)`", text))
    grammar = trace.EVENTS | dict(header=trace.HEADER | trace.SETTINGS | trace.CONFIG)
    assert words >= grammar.keys() | {name for fields in grammar.values() for name in fields}
    assert words >= dumps.TENSORS.keys() | {p.name for p in VECTORS.iterdir()}
    assert f"version {trace.VERSION}\n" in text
    rules = text.partition("## Rules")[2].partition("##")[0]
    exact, _, rest = rules.partition("The others")
    loose = {rule for row in re.findall(r"^\| (`.*?) \|", rest, re.M)
             for rule in re.findall("`([a-z]+)`", row)}
    assert loose - {"exit"} == NUMERIC
    assert loose | set(re.findall("`([a-z]+)`", exact)) - {"ended"} == RULES.keys()
    assert all(f"| {name} | {x:g} |" in text for name, x in TOLERANCE.items())
    known = re.findall(r"([0-9][0-9.e-]*) in\s+(float64|float32|bfloat16)", text)
    assert {DTYPES[name]: float(x) for x, name in known} == dumps.TOLERANCE
    for line in map(json.loads, re.findall(r"^\{.*\}$", text, re.M)[1:]):
        trace.match(line, trace.EVENTS[line["event"]], "the example")


def test_the_commands_of_the_readme_run(monkeypatch, tmp_path):
    """Rejects a command that fails, a vector that is not there, and a tolerance below what rounding
    does over the demo's layers."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    mains = {"clasp_mini": clasp_mini.main, "oracle/check_trace": check_trace.main}
    for program, arguments in re.findall(r"^python (\S+)\.py (.*)$", text, re.M):
        assert program not in mains or mains[program](shlex.split(arguments)) == 0
    assert check_trace.main(["run.jsonl", "--dtype", "float64", "--rounds", "0-5"]) == 0
    names = re.findall(r"`([a-z-]+\.(?:jsonl|safetensors))`", text)
    assert set(names) <= {p.name for p in VECTORS.iterdir()}
