"""The page of explore.py, opened in a real browser: what stands there is what the trace says.
Without Chromium (Debian: apt-get install chromium) only what needs no browser is tested.
"""
import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from oracle import explore
from oracle.make_vectors import by_round
from oracle.test_oracle import RUNS, TINY, find, jsonl, with_line

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium (apt-get install chromium)")
FLAGS = ["--model", str(TINY), "--device", "cpu", "--prompt-ids", "3,41,7", "--temperature", "0.2"]


def paged(folder, lines):
    """The page of a trace."""
    (folder / "t").write_bytes(jsonl(*lines))
    assert explore.main(["--from-trace", str(folder / "t"), "--model", str(TINY), "--out",
                         str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text()


def data_of(text):
    """What the page is given."""
    return json.loads(re.search(r'id="run">(.*)</script>', text)[1])


def look(folder, text, script):
    """What `script` returns once the page is open; a fault of either leaves the title as it was,
    which is no JSON. Time is the browser's own: nobody waits for it."""
    told = f"(async () => {{{script}}})().then(x => document.title = JSON.stringify(x))"
    (folder / "look.html").write_text(f"{text}<script>{told}</script>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/chrome",
             "--virtual-time-budget=99999", "--dump-dom"]
    p = subprocess.run([CHROMIUM, *flags, f"file://{folder}/look.html"], capture_output=True,
                       text=True, timeout=120)
    return json.loads(html.unescape(re.search("(?s)<title>(.*?)</title>", p.stdout)[1]))


WALK = """
  const told = [];
  for (let n = 0; n < Math.min(rounds.length, 5); n++) for (let s = 0; s < steps[n].length; s++) {
    history.replaceState(null, "", `#round=${n}&step=${s}`);        // and no wait for the event
    show();
    const fields = id => [...document.querySelectorAll(`#${id} [data-field]`)].map(x =>
      [x.dataset.field, x.value ?? x.dataset.id ?? x.textContent, x.textContent]);
    told.push({n, s, kind: steps[n][s].kind, fields: fields("b"), account: fields("account"),
      here: [...document.querySelectorAll("#words .here")].map(x => [x.dataset.id, x.className]),
      slots: [...document.querySelectorAll("#cache [data-slot]")].map(x =>
        [x.dataset.slot, x.dataset.state])});
  }
  return told;"""


def expected(r):
    """The steps of a round's lines: (kind, [(field, value), ...]) without bars and sums."""
    skip = ", ".join(map(str, r["round"][0]["skip"])) or "nothing"
    yield "begin", [("set", skip)] if r["draft"] else []
    for d in r["draft"]:
        yield "draft", [(x, d[x]) for x in ("u", "token", "q", "confidence")]
    yield "verify", [(x, v[x]) for v in r["verify"] for x in ("token", "q", "p", "a")]
    for v in r["verify"]:
        if v["u"] is not None:
            said = "accepted" if v["accepted"] else "rejected"
            yield "judge", [*((x, v[x]) for x in ("u", "token", "p", "q", "a")), ("verdict", said)]
    yield "own", [(x, r["own"][0][x]) for x in ("u", "kind", "token", "probability")] + [
        ("emitted", token) for token in r["emit"][0]["tokens"]]
    for line in r["optimise"]:
        yield "optimise", [("D", round(line["D"][-1][-1], 6)), ("set", ", ".join(map(
            str, line["skip"])))]


def same(field, want, value, text):
    """A field's value is the trace's, all digits; what is to be read of it, four."""
    if field in ("token", "emitted") or isinstance(want, str):
        return value == str(want)
    digits = 6e-4 if abs(want) >= 1e-4 else 0.06
    return float(value) == want and float(text) == pytest.approx(want, rel=digits, abs=1e-9)


def held_against(told, lines, accounts):
    """Is what stands in the page what the lines and the accounts say?"""
    places = iter(told)
    for n, r in enumerate(by_round(lines)[:told[-1]["n"] + 1]):
        row = [x["token"] for x in r["draft"] + r["own"]]
        accepted = sum(v["accepted"] or 0 for v in r["verify"])
        nth = dict(draft=0, judge=0, own=len(r["draft"]))
        t = r["round"][0]["start"] - 1
        for s, (kind, fields) in enumerate(expected(r)):
            at = next(places)
            assert (at["n"], at["s"], at["kind"]) == (n, s, kind)
            ours = [x for x in at["fields"] if x[0] in dict(fields)]
            assert [x[0] for x in ours] == [field for field, _ in fields]
            assert all(same(field, want, *x[1:]) for x, (field, want) in zip(ours, fields))
            said = {field: float(value) for field, value, _ in at["account"]}
            spent = accounts[n]["drafting"] + accounts[n]["verifying"]
            assert said["spent"] == pytest.approx(spent) and accounts[n].items() <= said.items()
            lit = [row[nth[kind]]] if kind in nth else row
            assert [x[0] for x in at["here"]] == list(map(str, lit))
            if kind == "judge":
                accepted_it = r["verify"][nth[kind]]["accepted"]
                assert at["here"][0][1].startswith("kept" if accepted_it else "rejected")
            if kind == "own":                          # what a rejection leaves in the cache
                for slot, state in at["slots"]:
                    if slot.isdecimal() and int(slot) <= t + len(r["draft"]):
                        assert state == ("full" if int(slot) <= t + accepted else "stale")
            if kind in nth:
                nth[kind] += 1
    assert next(places, None) is None


@in_a_browser
@pytest.mark.parametrize("name", ["tiny-temperature", "tiny-probe"])
def test_what_stands_in_the_page_is_what_the_trace_says(name, tmp_path):
    """Every step of five rounds: tokens, p, q, a, u, verdicts, sets, D, the account, the token that
    is lit in the text. Rejects a page that confuses two of them."""
    text = paged(tmp_path, RUNS[name])
    held_against(look(tmp_path, text, WALK), RUNS[name], data_of(text)["accounts"])


@in_a_browser
def test_a_wrong_page_is_found(tmp_path):
    """The test above can fail."""
    right, wrong = "scale(x.judged, 0, x.a)", "scale(x.u, 0, x.a)"
    text = paged(tmp_path, RUNS["tiny-probe"])
    assert right in text
    told = look(tmp_path, text.replace(right, wrong), WALK)
    with pytest.raises(AssertionError):
        held_against(told, RUNS["tiny-probe"], data_of(text)["accounts"])


@pytest.mark.parametrize("name", ["tiny-temperature", "tiny-top-p", "tiny-probe"])
def test_what_the_trace_leaves_out_fits_what_it_says(name, tmp_path):
    """Rejects distributions of another row, of the full model for the draft's, unfiltered, or p for
    the residual; a draw's place of another token; and of a cell the choice that it took."""
    data = data_of(paged(tmp_path, RUNS[name]))
    unlike = 0
    for r in data["rounds"]:
        for x in r["draft"]:
            p, q = next(row[1:] for row in x["top"] if row[0] == x["token"])
            assert (p, q) == (pytest.approx(x["p"], rel=1e-4), pytest.approx(x["q"], rel=1e-4))
            assert x["at"][0] - 1e-5 <= x["u"] <= x["at"][1] + 1e-5
        own = r["own"]
        assert dict(own["top"])[own["token"]] == pytest.approx(own["probability"], rel=1e-4)
        assert own["at"][0] - 1e-5 <= own["u"] <= own["at"][1] + 1e-5
        for o in [r["optimise"]] if "optimise" in r else []:
            for i, row in enumerate(o["D"]):
                for j, D in enumerate(row):
                    other = o["other"][i][j]
                    assert (other is None) == (j in (0, i)) and (other is None or other <= D)
                    unlike += other is not None and other < D
    assert unlike > 20


def test_the_likeliest_tokens_and_the_place_of_a_draw_by_hand():
    """Rejects fewer than six, the least likely first, tokens of no probability, the token itself
    left out, and a place counted to its end."""
    p = torch.tensor([0, 0.05, 0.3, 0.1, 0.15, 0.2, 0.2, 0])
    q = torch.tensor([0.9, 0, 0, 0, 0, 0, 0, 0.1])
    assert [row[0] for row in explore.top(p, q, 1)] == [0, 2, 5, 6, 4, 3, 7, 1]
    assert [row[0] for row in explore.top(q, q, 3)] == [0, 7, 3]
    assert explore.top(p, q, 2)[1] == [2, pytest.approx(0.3), 0]
    assert explore.bounds(p, 2) == pytest.approx([0.05, 0.35], abs=1e-5)


@in_a_browser
def test_keys_links_and_the_play_button_lead_on_and_not_beyond_the_ends(tmp_path):
    """Rejects a key without effect or with another's, an end that wraps round, and a link that
    leads beside."""
    rounds = by_round(RUNS["tiny-temperature"])
    count = [len(list(expected(r))) - 1 for r in rounds]
    end = (len(rounds) - 1, count[-1])
    moves = [("#round=2&step=1", (2, 1)), ("ArrowRight", (2, 2)), ("ArrowDown", (3, 0)),
             ("ArrowUp", (2, 0)), ("ArrowLeft", (1, count[1])), ("Home", (0, 0)),
             ("ArrowLeft", (0, 0)), ("End", end), ("ArrowRight", end), ("#round=-3&step=x", (0, 0)),
             (" ", (0, 1)), (" ", (0, 1)), (".#map a[data-round='4']", (4, 0)), (".#next", (4, 1))]
    told = look(tmp_path, paged(tmp_path, RUNS["tiny-temperature"]), """
      const told = [], wait = ms => new Promise(done => setTimeout(done, ms));
      for (const move of MOVES) {
        if (move[0] === "#") location.hash = move;
        else if (move[0] === ".") document.querySelector(move.slice(1)).dispatchEvent(
          new MouseEvent("click", {bubbles: true, cancelable: true}));
        else document.body.dispatchEvent(new KeyboardEvent("keydown", {key: move, bubbles: true}));
        await wait(move === " " ? 1500 : 50);          // playing, a step takes 1.1 seconds
        told.push(document.getElementById("where").textContent);
      }
      return told;""".replace("MOVES", json.dumps([move for move, _ in moves])))
    for (move, (n, s)), said in zip(moves, told, strict=True):
        assert said == f"round {n} of {end[0]}, step {s} of {count[n]}", move


HOSTILE = ["</script><script>hacked = 1</script>", "<img src=x onerror='hacked=1'>", "<!--<script>",
           "\u202etxet", "\"onmouseover='hacked=1'", "${hacked = 1}", "\u2028", "\\", "{RUN}", "`"]


class HostileTokenizer:
    """Each token is one of HOSTILE; the last are the bytes of a character."""

    def __init__(self, folder=None):
        pass

    def decode_bytes(self, ids):
        return b"".join("€".encode()[i - 77:i - 76] if i > 76 else HOSTILE[i % 10].encode()
                        for i in ids)


@in_a_browser
def test_tokens_that_look_like_markup_are_text(tmp_path, monkeypatch):
    """Rejects a page that sets a token's text as markup or ends its data at one, one that lets a
    token turn the text around it, and any address in it."""
    monkeypatch.setattr(explore, "Tokenizer", HostileTokenizer)
    text = paged(tmp_path, RUNS["tiny-temperature"])
    assert set(re.findall(r"\w+://[\w./]*", text)) == {"http://www.w3.org/2000/svg"}
    script = WALK.replace("return told;", """return [typeof hacked, document.querySelectorAll(
      "img, iframe, [onmouseover]").length, document.getElementById("words").textContent];""")
    hacked, foreign, words = look(tmp_path, text, script)
    assert (hacked, foreign) == ("undefined", 0) and "\u202e" not in words
    assert "\\u{202e}" in words and HOSTILE[0] in words and "onmouseover='hacked=1'" in words


def test_a_character_split_over_tokens_is_whole_in_the_text():
    """Rejects a text of replacement characters, and a token that claims the whole character."""
    shown = explore.Text(HostileTokenizer(), ())
    assert [explore.piece(shown, i) for i in (77, 78, 79)] == ["", "", "€"]
    alone = [explore.alone(HostileTokenizer(), i) for i in (77, 78, 79)]
    assert alone == ["\\xe2", "\\x82", "\\xac"]


def test_a_trace_cut_short_is_shown_as_far_as_its_rounds_are_whole(tmp_path):
    """Rejects a program that wants a whole trace, and one that shows half of a round, or less."""
    lines = RUNS["tiny-probe"]
    for n, whole in ((1, 0), (3, 0), (find(lines, "round", 3), 3), (find(lines, "own", 3), 3),
                     (len(lines) - 1, len(by_round(lines)))):
        data = data_of(paged(tmp_path, lines[:n]))
        assert len(data["rounds"]) == whole and data["end"] is None


def test_a_run_and_its_trace_give_the_same_page_also_by_the_policy_or_broken_off(
        tmp_path, monkeypatch):
    """Rejects a page of another run than the one that is traced, costs that are not the run's, and
    what has been made lost by Ctrl-C."""
    costs = dict(draft=[1, .8, .6, .4, .2, .1, .1], verify=[1, 1, 1.1, 1.2, 1.3], optimise=0)
    (tmp_path / "costs").write_text(json.dumps(costs))
    pages, path = [tmp_path / "live.html", tmp_path / "then.html"], str(tmp_path / "run.jsonl")

    def interrupted(*job, right=explore.record):
        yield from (r for _, r in zip(range(6), right(*job)))
        raise KeyboardInterrupt
    for record in (explore.record, interrupted):
        monkeypatch.setattr(explore, "record", record)
        assert explore.main([*FLAGS, "--out", str(pages[0]), "--trace", path, "--draft-length", "3",
                             "--costs", str(tmp_path / "costs"), "--dtype", "float64"]) == 0
        assert explore.main([*FLAGS[:4], "--out", str(pages[1]), "--from-trace", path]) == 0
        data = data_of(pages[0].read_text())
        assert pages[0].read_text() == pages[1].read_text() and data["dtype"] == "float64"
    assert len(data["rounds"]) == 6 and data["end"] is None
    later = data["rounds"][1:]
    spent = [len(r["draft"]) * costs["draft"][len(r["skip"])] for r in later]
    verify = [costs["verify"][len(r["draft"]) + 1] for r in later]
    assert sum(spent) > 0 and data["accounts"][-1] == pytest.approx(dict(
        tokens=sum(len(r["emit"]) for r in later), drafted=sum(len(r["draft"]) for r in later),
        accepted=sum(x["accepted"] is True for r in later for x in r["draft"]),
        drafting=sum(spent), verifying=sum(verify)), rel=1e-4)


GIVEN = ["--from-trace", "t", "--model", str(TINY), "--out", "page"]


@pytest.mark.parametrize("edit, flags, status, said", [
    (lambda x: [*x[:3], x[2], *x[3:]], GIVEN, 2, "event: trace 'own'"),           # two own tokens
    (lambda x: with_line(x, 0, costs=dict(draft=[1], verify=[1])), GIVEN, 2, "has no costs"),
    (lambda x: with_line(x, 0, costs=dict(draft=[float("nan")] * 9, verify=[1] * 9)), GIVEN, 2,
     "has no costs"),
    (list, ["--from-trace", "t", "--out", "page"], 2, "another model"),
    (list, [], 2, "--out"), (list, ["--out", "/no/such/folder/x.html"], 2, "no such folder"),
    (list, [*GIVEN, "--compare"], 2, "without --compare"),
    (list, [*GIVEN, "--prompt", "x"], 2, "--from-trace goes without"),
    (list, ["--out", "page", "--from-trace", "/no/trace"], 1, "No such file"),
    (list, ["--out", "page", "--model", "/no/such/model"], 1, "no such folder")])
def test_what_cannot_be_shown_gets_one_line(edit, flags, status, said, capsys, tmp_path,
                                            monkeypatch):
    """Rejects a traceback, a page that is made nonetheless, and a flag silently without effect."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_bytes(jsonl(*edit(RUNS["tiny-temperature"])))
    assert explore.main(flags) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "page").exists(), err
