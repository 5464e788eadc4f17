"""What is said of a run, held against rounds whose counts and times are known."""
import json
import os
from types import SimpleNamespace

import pytest

import command.compare
from command.cli import UsageError
from command.compare import compare, compared, comparison
from command.flags import DEMO
from command.report import figures, ideal_speedup, summary
from command.screen import Terminal, Text
from speculative import Round
from text.tokenizer import Tokenizer

TOK = Tokenizer(DEMO)


def a_round(drafted, accepted, emitted, seconds=(0, 0, 0), choice=None, skip=(True, False)):
    return Round(0, skip, drafted, [], accepted, emitted, choice, seconds)


def plain_run(ids, step):
    """A token per pass, `step` seconds each after a prefill of one."""
    return [a_round([], 0, [i], (0, step if n else 1.0, 0)) for n, i in enumerate(ids)]


def clasp_run(ids, draft, verify):
    """Two of three drafted tokens kept in every round, `draft` seconds each."""
    return [a_round([], 0, ids[:1], (0, 1.0, 0.4), "set")] + [
        a_round([*ids[n:n + 2], 99], 2, ids[n:n + 3], (3 * draft, verify, 0))
        for n in range(1, len(ids), 3)]


IDS = [*range(7)]
CUT = [a_round([], 0, [7], (0, 1.0, 0.5), "set"), a_round([1, 2, 3], 2, [1, 2, 9], (0.3, 0.2, 0)),
       a_round([4, 5], 2, [4, 5], (0.2, 0.3, 0.5), "set")]                # 5 stops: no own token


def test_an_account_counts_each_thing_once_and_says_so_in_two_short_lines():
    """Rejects a prefill counted as decoding, a token counted twice, a token per round assumed where
    a stop token has cut the last; by hand: a prefill, a round of 3 drafted with 2 kept, one of 2
    that ends with a stop token. Rejects shares and rates where nothing was drafted or decoded, a
    division by 0, a line of more than 79 columns for a text of a thousand tokens."""
    f = figures(CUT, load=2.0, measure=0.5)
    assert summary(f, "clasp") == (
        "clasp: 6 tokens in 5.0 s: load 2.0, prefill 1.0, measure 0.50, decode 1.5\n"
        "decoding 2.5 tokens/s, 2.50 per verify; 4 of 5 kept; layers chosen 2x")
    want = dict(verifies=2, acceptance=0.8, decode_seconds=2.0, draft_step_seconds=0.1,
                verify_seconds=0.25, optimise_seconds=0.5)
    assert {key: f[key] for key in want} == pytest.approx(want) and f["skip_set"] == [0]
    assert ideal_speedup(f, dict(verify_seconds=0.2)) == pytest.approx(5 / (5 / 2 + 2))
    plain = figures(plain_run(IDS, 1.0))
    of_it = "7 tokens in 7.0 s: prefill 1.0, decode 6.0\ndecoding 1.0 tokens/s"
    assert [summary(plain, ran) for ran in ("ar", "paper")] == [f"ar: {of_it}", f"paper: {of_it}"]
    assert summary(plain, "clasp") == f"clasp: {of_it}; nothing drafted: it would hardly pay"
    one = summary(figures(CUT[:1]), "paper")
    assert one.endswith("prefill 1.0, decode 0.50\nonly the prefill's")
    assert summary(figures([]), "ar").startswith("ar: 0 tokens")
    long = [CUT[0]] + 99 * [a_round([1] * 12, 12, [1] * 13, (1.3, 0.9, 0.5), "set")]
    said = summary(figures(long, load=99.99, measure=12.34), "clasp")
    assert max(map(len, said.split("\n"))) < 80


def test_a_comparison_is_of_clasp_with_plain_decoding():
    """Rejects a speed-up upside down or against itself, the ideal of the other side, counts of one
    pair for all, equality of some pair for that of all, and equality claimed of samples; in words a
    figure in the place of another; a line of more than 79 columns."""
    # 6 decoded tokens per pair: plain in 6 steps of 1 s, CLaSp in 2 rounds of 3 * .2 + 1.2 s and a
    # layer optimisation of .4: 6 / 4 tokens/s. Ideal: 6 / (6 * .2 + 2). The pair in the middle is
    # slow on both sides, and no median.
    pairs = [(plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2)),
             (plain_run(IDS, 5.0), clasp_run(IDS, 2.0, 6.0)),
             (plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2))]
    c = comparison(pairs, greedy=True)
    lines = compared(c, pairs, "float32").split("\n")
    assert [" ".join(line.split()) for line in lines] == [
        "plain decoding 1.0 tokens/s 7 tokens, median of 3 runs, interleaved",
        "CLaSp 1.5 tokens/s 3.00 tokens per verify, acceptance 0.67",
        "speed-up 1.50 80% of 1.88, the ideal for these drafts",
        "in plain steps a draft step 0.20, a verify 1.20, a layer optimisation 0.40",
        "texts equal"]
    assert c["equal"] is True
    assert (c["stats"]["drafted"], c["plain_stats"]["drafted"]) == (6, 0)
    pairs[1] = plain_run(IDS, 5.0), clasp_run([0, 1, 2, 30, 4, 5, 6], 2.0, 6.0)
    c = comparison(pairs, greedy=True)
    assert c["equal"] is False
    lines += compared(c, pairs, "float32").split("\n")
    assert lines[-1].endswith(" DIFFERENT from token 3 on: a tie, by the rounding of float32?")
    assert max(map(len, lines)) < 80
    c = comparison([pairs[0], (CUT[:1], CUT)], greedy=False)
    assert c["equal"] is None and "two samples" in compared(c, pairs, "float32")
    assert c["tokens_per_verify"] == pytest.approx((6 + 5) / (2 + 2))
    assert c["acceptance"] == pytest.approx((4 + 4) / (6 + 5))


def a_job(json=False):
    """What `compare` asks of a Job."""
    return SimpleNamespace(flags=SimpleNamespace(json=json, seed=7, repeats=3), tokenizer=TOK,
                           stops=(5,), load_seconds=0.0, measure_seconds=0.0,
                           settings=SimpleNamespace(temperature=0),
                           report=lambda: dict(dtype="float32"))


def test_every_pair_has_a_seed_of_its_own_the_first_is_a_warm_up_and_ctrl_c_keeps_what_is_whole(
        capsys, monkeypatch):
    """Rejects one seed for all repeats, a warm-up that is counted, the text of another pair, a
    division by zero where there was nothing to do. Of a comparison that is broken off: work that is
    lost, an exit status of success, a pair that is half done, a table of no pair."""
    def pair(job, ids, seed, run):
        seeds.append(seed)                             # the warm-up is 100 times as slow
        if len(seeds) == last:
            raise KeyboardInterrupt
        slow = 100.0 if len(seeds) == 1 else 1.0
        ids = [len(seeds), 1, 2, 3, 4, 9, 5]
        return plain_run(ids, 1.0), clasp_run(ids, 0.2 * slow, 1.2 * slow)

    monkeypatch.setattr(command.compare, "pair", pair)
    seeds, last = [], None
    assert compare(a_job(json=True), [1], run=None) == 0
    out, err = capsys.readouterr()
    c = json.loads(out)
    assert seeds == [7, 7, 8, 9] and c["stats"]["decode_seconds"] == pytest.approx(4.0)
    assert c["ids"] == [2, 1, 2, 3, 4, 9, 5] and c["prompt_ids"] == [1] and c["equal"] is True
    assert c["text"] == TOK.decode([2, 1, 2, 3, 4, 9]) and err == ""       # no progress in a log
    seeds, last = [], 4
    assert compare(a_job(), [1], run=None) == 130
    assert "median of 2 runs" in capsys.readouterr().out
    seeds, last = [], 2
    with pytest.raises(KeyboardInterrupt):
        compare(a_job(), [1], run=None)
    monkeypatch.setattr(command.compare, "pair", lambda *_: (CUT[:1], CUT[:1]))
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(a_job(), [1], run=None)


def stream(tty, encoding="utf-8", number=-1):
    return SimpleNamespace(isatty=lambda: tty, encoding=encoding, fileno=lambda: number)


@pytest.mark.parametrize("tty, env, coloured", [
    (True, {}, True), (True, dict(NO_COLOR=""), True), (True, dict(NO_COLOR="1"), False),
    (True, dict(TERM="dumb"), False), (False, {}, False)])
def test_colour_is_for_terminals_and_never_with_no_color(monkeypatch, tty, env, coloured):
    """Rejects escape codes where none are wanted, and an empty NO_COLOR, which is none."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    painted, = Terminal(stream(tty)).folded(
        [(kind, "x") for kind in ("kept", "rejected", "own", "dim")], 79)
    codes = "\033[32mx\033[0m\033[9;31mx\033[0m\033[1;34mx\033[0m\033[2mx\033[0m"
    assert painted == (codes if coloured else "x~x~[x]x")


def letters(ids):
    return "".join(map(chr, ids))


def test_a_round_is_a_line_of_its_layers_its_sums_and_its_tokens():
    """Rejects a bar of the layers that run, sums of something else than kept / drafted, a token in
    the wrong place or twice, a line broken by the text, cells that an encoding does not have; a
    character counted as one column that takes two; a bar of 80 layers in one line."""
    t, skip = Terminal(stream(tty=False)), (True, False, False, True)
    r = a_round([97, 10, 99], 2, [97, 10, 100], skip=skip)
    assert t.round(7, r, letters) == "   7 ░██░  2/3  a\\n~c~[d]"
    all_kept = a_round([97] * 12, 12, [97] * 12 + [98], skip=skip)
    assert t.round(12, all_kept, letters, anew=True) == f"  12*░██░ 12/12 {'a' * 12}[b]"
    stopped = a_round([97, 98], 2, [97, 98], skip=skip)
    assert Terminal(stream(False, "ascii")).round(3, stopped, letters) == "   3 .##.  2/2  ab"
    skip = (False,) * 31 + (True,) + (False,) * 47 + (True,)
    r = a_round([*b"abc" * 20, *map(ord, "日" * 19)], 60, [*b"abc" * 20, 100], skip=skip)
    assert t.round(3, r, letters).split("\n") == [
        "   3 " + "█" * 31 + "░ 60/79 " + "abc" * 11 + "ab",
        "     " + "█" * 32 + "       c" + "abc" * 8 + "~" + "日" * 4,
        "     " + "█" * 15 + "░" + " " * 23 + "日" * 15 + "~[d]"]


@pytest.mark.parametrize("columns, width, bar", [(200, 199, 32), (40, 39, 8), (0, 79, 32)])
def test_what_is_shown_on_a_terminal_is_no_wider(monkeypatch, columns, width, bar):
    """Rejects a line that the terminal would break, of a round or of what is drawn in it, and one
    of 79 columns on a wide terminal or one that does not know its width."""
    monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((number, 24)))
    monkeypatch.setenv("NO_COLOR", "1")
    t = Terminal(stream(True, number=columns))
    r = a_round([97] * 99, 99, [97] * 99, skip=(True,) * 32)
    lines = t.round(1, r, lambda ids: "b" * 9 * len(ids)).split("\n")
    drawing = t.drawing(1, 32, "日" * 200)
    assert max(map(len, [*lines, *t.legend().split("\n")])) == len(lines[0]) == width
    assert lines[0].count("░") == bar and drawing.index("日") == lines[0].index("b")
    assert width - 1 <= len(drawing) + drawing.count("日") <= width and "\n" not in drawing


def test_a_character_split_over_tokens_is_shown_when_it_is_whole():
    """Rejects decoding token by token, which shows U+FFFD for every half, and a half character at
    the end that is not shown at all; a stop token is not shown. Without a tokenizer: ids that run
    together."""
    text = "naïve 🦙 日本"
    ids, shown = TOK.encode(text), Text(TOK, (5,))
    parts = [shown.add([i]) for i in [*ids[:3], 5, *ids[3:]]]
    assert "" in parts and "".join(parts) + shown.add([], final=True) == text
    shown = Text(TOK, ())
    assert "\ufffd" not in shown.add(ids[:-1]) and shown.add([], final=True) == "\ufffd"
    shown = Text(None, (5,))
    parts = [shown.add(ids) for ids in ([], [1, 2], [], [5], [3])]
    assert "".join(parts) + shown.add([], final=True) == "1 2 3 "
