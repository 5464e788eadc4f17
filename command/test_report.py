"""What is said of a run, held against rounds whose counts and times are known."""
import json
import sys
from types import SimpleNamespace

import pytest

import clasp_mini
from speculative import Round, Settings, Verdict
from test_clasp import DEMO, altered
from command import report
from command.cli import UsageError
from command.report import Terminal, Text, compared, summary
from text.tokenizer import Tokenizer


def a_round(drafted, accepted, emitted, seconds, choice=None, skip=(True, False)):
    verdict = Verdict([], [], [], accepted, emitted[-1])
    return Round(0, skip, drafted, [], verdict, emitted, choice, seconds)


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


def test_figures_count_each_thing_once(module=report):
    """Rejects a prefill counted as decoding, a token counted twice, a token per round assumed where
    a stop token has cut the last; by hand: a prefill, a round of 3 drafted with 2 kept, one of 2
    that ends with a stop token."""
    f = module.figures(CUT)
    want = dict(drafted=5, accepted=4, emitted=6, verifies=2, tokens_per_verify=2.5, acceptance=0.8,
                seconds=3.0, prefill_seconds=1.0, decode_seconds=2.0, tokens_per_second=2.5,
                draft_step_seconds=0.1, verify_seconds=0.25, optimise_seconds=0.5, optimisations=2)
    assert {k: f[k] for k in want} == pytest.approx(want) and f["skip_set"] == [0]
    assert f["shares"] == pytest.approx(dict(draft=0.25, verify=0.25, optimise=0.5))
    assert module.ideal_speedup(f, dict(verify_seconds=0.2)) == pytest.approx(5 / (5 / 2 + 2))
    nothing = module.figures([])
    assert nothing["emitted"] == 0 and nothing["tokens_per_second"] is None


def test_a_comparison_is_of_clasp_with_plain_decoding(module=report):
    """Rejects a speed-up upside down or against itself, the ideal of the other side, counts of one
    pair for all, equality of some pair for that of all, and equality claimed of samples."""
    # 6 decoded tokens per pair: plain in 6 steps of 1 s, CLaSp in 2 rounds of 3 * .2 + 1.2 s and a
    # layer optimisation of .4: 6 / 4 tokens/s. Ideal: 6 / (6 * .2 + 2). The pair in the middle is
    # slow on both sides, and no median.
    pairs = [(plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2)),
             (plain_run(IDS, 5.0), clasp_run(IDS, 2.0, 6.0)),
             (plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2))]
    c = module.comparison(pairs, greedy=True)
    assert c["tokens_per_second"] == pytest.approx([1, 1.5])
    assert c["speedup"] == pytest.approx(1.5) and c["ideal_speedup"] == pytest.approx(6 / 3.2)
    assert c["equal"] is True and module.comparison(pairs, greedy=False)["equal"] is None
    assert c["costs"] == pytest.approx(dict(draft_step=0.2, verify=1.2, optimise=0.4))
    assert c["tokens_per_verify"] == 3 and c["acceptance"] == pytest.approx(2 / 3)
    assert c["stats"]["drafted"] == 6 and c["plain_stats"]["drafted"] == 0
    other = [0, 1, 2, 30, 4, 5, 6]
    pairs[1] = plain_run(IDS, 5.0), clasp_run(other, 2.0, 6.0)
    c = module.comparison(pairs, greedy=True)
    assert c["equal"] is False
    assert "DIFFERENT from token 3 on: a tie within the rounding of float32?" in module.compared(
        c, pairs, "float32")
    longer = [(plain_run([*range(13)], 1.0), clasp_run([*range(13)], 0.2, 1.2)),
              (CUT[:1], CUT)]
    c = module.comparison(longer, greedy=False)
    assert c["tokens_per_verify"] == pytest.approx((12 + 5) / (4 + 2))
    assert c["acceptance"] == pytest.approx((8 + 4) / (12 + 5))


@pytest.mark.parametrize("right, wrong", [
    ("rate[1] / rate[0]", "rate[0] / rate[1]"), ("rate[1] / rate[0]", "rate[1] / rate[1]"),
    ("map(ideal_speedup, clasp, plain)", "map(ideal_speedup, plain, clasp)"),
    ("equal=all(", "equal=any("), ("if greedy else None", "if not greedy else None"),
    ("(f[key] for f in clasp)", "(f[key] for f in clasp[:1])"),
    ('f["emitted"] - 1 for', 'f["emitted"] for'),
    ("stats=clasp[0], plain_stats=plain[0]", "stats=plain[0], plain_stats=clasp[0]"),
    ("emitted - len(rounds[0].emitted)", "accepted + verifies"),
    ("emitted - len(rounds[0].emitted)", "emitted"),
    ("draft + verify + optimise - prefill", "draft + verify + optimise"),
    ("draft + verify + optimise - prefill", "draft + verify - prefill"),
    ("for r in rounds[1:])", "for r in rounds)"),
    ('clasp["drafted"] * c + clasp["verifies"]', 'clasp["drafted"] * c'),
    ('"draft_step_seconds"] or 0.0) / plain', '"draft_step_seconds"] or 0.0) / clasp')])
def test_one_of_the_two_rejects(right, wrong):
    """Each wrong text of the program in the place of the right one."""
    module, failed = altered(report, (right, wrong)), 0
    for test in (test_figures_count_each_thing_once,
                 test_a_comparison_is_of_clasp_with_plain_decoding):
        try:
            test(module)
        except (AssertionError, KeyError, TypeError):
            failed += 1
    assert failed


def test_a_comparison_says_in_words_what_it_found():
    """Rejects a figure in the place of another."""
    pairs = [(plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2))]
    said = compared(report.comparison(pairs, greedy=True), pairs, "float32").split("\n")
    assert [" ".join(line.split()) for line in said] == [
        "plain decoding 1.0 tokens/s 7 tokens, median of 1 runs, interleaved",
        "CLaSp 1.5 tokens/s 3.00 tokens per verify, acceptance 0.67",
        "speed-up 1.50 80% of 1.88, the ideal for these drafts and this acceptance",
        "in plain steps a draft step 0.20, a verify 1.20, a layer optimisation 0.40",
        "texts equal"]
    assert "two samples" in compared(report.comparison(pairs, greedy=False), pairs, "float32")


def test_a_summary_says_what_there_is_to_say():
    """Rejects shares, rates and sets where nothing was drafted or decoded, and a division by 0."""
    f = report.figures(CUT)
    assert summary(f, Settings(K=3, M=1)) == (
        "6 tokens in 3.00 s: prefill 1.00 s, then 2.5 tokens/s | 2.50 tokens per verify | "
        "acceptance 0.80 (4 of 5 drafted) | draft 25%, verify 25%, optimise 50% | left out at "
        "last: 0")
    plain = report.figures(plain_run(IDS, 1.0))
    assert summary(plain, Settings()).endswith("1.0 tokens/s | plain decoding")
    assert summary(plain, Settings(K=3)).endswith("1.0 tokens/s | nothing drafted")
    assert summary(report.figures(CUT[:1]), Settings()) == "1 token(s), the prefill's, in 1.00 s"
    assert summary(report.figures([]), Settings()).startswith("0 token")


class Screen:
    """A stream that may be a terminal."""
    def __init__(self, tty=True, encoding="utf-8"):
        self.tty, self.encoding = tty, encoding

    def isatty(self):
        return self.tty


class Letters:
    """A tokenizer of one token per character."""
    bos, special = 0, {}

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("tty, env, coloured", [
    (True, {}, True), (True, dict(NO_COLOR=""), True), (True, dict(NO_COLOR="1"), False),
    (True, dict(TERM="dumb"), False), (False, {}, False)])
def test_colour_is_for_terminals_and_never_with_no_color(monkeypatch, tty, env, coloured):
    """Rejects escape codes where none are wanted, and an empty NO_COLOR, which is none."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    t = Terminal(Screen(tty))
    painted = [t.paint(kind, "x") for kind in ("kept", "rejected", "own", "dim")]
    if coloured:
        assert painted == [f"\033[{code}mx\033[0m" for code in ("32", "9;31", "1;34", "2")]
    else:
        assert painted == ["x", "~x~", "[x]", "x"]


def test_a_round_is_a_line_of_its_layers_its_sums_and_its_tokens():
    """Rejects a bar of the layers that run, sums of something else than kept / drafted, a token in
    the wrong place, a line broken by the text, and cells that an encoding does not have."""
    t, skip = Terminal(Screen(tty=False)), (True, False, False, True)
    r = a_round([97, 10, 99], 2, [97, 10, 100], (0, 0, 0), skip=skip)
    assert t.round(7, r, Letters()) == "   7 ░██░  2/3  a\\n~c~[d]"
    assert t.round(7, r, None) == "   7 ░██░  2/3  97 10 ~99 ~[100 ]"
    all_kept = a_round([97] * 12, 12, [97] * 12 + [98], (0, 0, 0), skip=skip)
    assert t.round(12, all_kept, Letters()) == f"  12 ░██░ 12/12 {'a' * 12}[b]"
    plain = a_round([], 0, [98], (0, 0, 0), skip=(False,) * 4)
    assert Terminal(Screen(False, "ascii")).round(0, plain, Letters()) == "   0 ####  0/0  [b]"


def test_a_character_split_over_tokens_is_shown_when_it_is_whole():
    """Rejects decoding token by token, which shows U+FFFD for every half, and a half character at
    the end that is not shown at all; a stop token is not shown."""
    tok, text = Tokenizer(DEMO), "naïve 🦙 日本"
    ids, stream = tok.encode(text), Text(tok, (5,))
    parts = [stream.add([i]) for i in [*ids[:3], 5, *ids[3:]]]
    assert "" in parts and "".join(parts) + stream.add([], final=True) == text
    stream = Text(tok, ())
    assert "\ufffd" not in stream.add(ids[:-1]) and stream.add([], final=True) == "\ufffd"


def test_without_a_tokenizer_the_text_is_ids_with_commas_between():
    """Rejects a comma lost or doubled between rounds, at a stop token, or at the end."""
    stream = Text(None, (5,))
    parts = [stream.add(ids) for ids in ([], [1, 2], [], [5], [3])] + [stream.add([], final=True)]
    assert "".join(parts) == "1,2,3"


def a_job(rounds, **flags):
    """What `write` and `compare` ask of a Job, with runs as given by the seed."""
    a = SimpleNamespace(**dict(json=False, verbose=False, chat=False, trace=None, seed=7,
                               repeats=3) | flags)
    return SimpleNamespace(
        a=a, tokenizer=Tokenizer(DEMO), stops=(5,), settings=Settings(K=3, M=1),
        report=lambda: dict(dtype="float32"), run=lambda ids, s, seed: iter(rounds(seed)),
        pair=lambda ids, seed: rounds(seed))


def test_a_half_character_at_the_end_of_a_text_is_shown(capsys):
    """Rejects a command that drops what waits for its last byte, in the text or in the object."""
    half = Tokenizer(DEMO).encode("日")[:-1]
    assert half

    def rounds(seed):
        return [a_round([], 0, [97], (0, 1.0, 0)), a_round([], 0, half, (0, 1.0, 0))]
    assert clasp_mini.write(a_job(rounds), [1]) == 0
    text = capsys.readouterr().out
    assert text.endswith("\ufffd") and text.count("\ufffd") == 1
    assert clasp_mini.write(a_job(rounds, json=True), [1]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text


def test_what_was_written_before_ctrl_c_is_kept_and_summed_up(capsys):
    """Rejects a traceback, a lost summary and an exit status of success."""
    def rounds(seed):
        yield from CUT[:2]
        raise KeyboardInterrupt
    assert clasp_mini.write(a_job(rounds), [1]) == 130
    out, err = capsys.readouterr()
    assert out == Tokenizer(DEMO).decode([7, 1, 2, 9]) and err.startswith("4 tokens in ")


def test_every_pair_of_a_comparison_has_a_seed_of_its_own_and_the_first_is_a_warm_up(capsys):
    """Rejects one seed for all repeats, a warm-up that is counted, and the text of another pair."""
    seeds = []

    def pair(seed):
        seeds.append(seed)                             # the warm-up is 100 times as slow
        slow = 100.0 if len(seeds) == 1 else 1.0
        ids = [seed, 1, 2, 3, 4, 9, 5]
        return plain_run(ids, 1.0), clasp_run(ids, 0.2 * slow, 1.2 * slow)
    assert clasp_mini.compare(a_job(pair, json=True, seed=7), [1]) == 0
    c = json.loads(capsys.readouterr().out)
    assert seeds == [7, 7, 8, 9] and c["stats"]["decode_seconds"] == pytest.approx(4.0)
    assert c["ids"] == [7, 1, 2, 3, 4, 9, 5] and c["prompt_ids"] == [1]
    assert c["text"] == Tokenizer(DEMO).decode([7, 1, 2, 3, 4, 9]) and c["equal"] is True
    assert clasp_mini.compare(a_job(pair), [1]) == 0
    assert "speed-up            1.50" in capsys.readouterr().out


def test_where_the_prefill_gave_all_tokens_there_is_nothing_to_compare():
    """Rejects a division by zero, and a speed-up of a run without a step."""
    with pytest.raises(UsageError, match="nothing to compare"):
        clasp_mini.compare(a_job(lambda seed: (CUT[:1], CUT[:1])), [1])


def test_progress_is_for_terminals_alone(capsys, monkeypatch):
    """Rejects control characters in a log file."""
    def pair(seed):
        return plain_run(IDS, 1.0), clasp_run(IDS, 0.2, 1.2)
    clasp_mini.compare(a_job(pair), [1])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    clasp_mini.compare(a_job(pair), [1])
    assert "pair 2 of 3" in capsys.readouterr().err
