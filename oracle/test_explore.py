"""The page of explore.py, opened in a real browser: what stands there is what the trace says, and
what the trace leaves out is what the model says. Without Chromium (Debian: apt-get install
chromium) only what needs no browser is tested, and the rest skips.
"""
import base64
import collections
import fcntl
import json
import math
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import dp_layer_skip
from llama import Llama, torch
from oracle import explore, trace
from tests.slow_llama import random_checkpoint
from tests.wrong_programs import altered
from speculative import Settings, probabilities, residual

HERE = Path(trace.__file__).resolve().parent
TINY, VECTORS = HERE / "tiny", HERE / "vectors"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
torch.set_num_threads(1)


class Browser:
    """Headless Chromium over its DevTools pipe. `heard` is what it has said unasked: errors,
    requests, lines of the console."""

    def __init__(self, profile):
        out, back = os.pipe(), os.pipe()               # file numbers 3 and 4 are Chromium's
        mine = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (out[0], back[1])]
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", f"--user-data-dir={profile}", "--remote-debugging-pipe",
             "about:blank"], close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: [os.dup2(fd, 3 + i) for i, fd in enumerate(mine)])
        for fd in (out[0], back[1], *mine):
            os.close(fd)
        self.to, self.back, self.raw = out[1], back[0], b""
        self.n, self.heard, self.page = 0, [], {}
        target = next(x["targetId"] for x in self.call("Target.getTargets")["targetInfos"]
                      if x["type"] == "page")
        self.page = dict(sessionId=self.call("Target.attachToTarget", targetId=target,
                                             flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.n += 1
        said = json.dumps(dict(id=self.n, method=method, params=params, **self.page)).encode()
        while said := said[os.write(self.to, said):]:  # the closing 0 is written below
            pass
        os.write(self.to, b"\0")
        while True:
            answer = self.hear()
            if answer.get("id") == self.n:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def hear(self):
        while b"\0" not in self.raw:
            assert select.select([self.back], [], [], 30)[0], "the browser is silent"
            self.raw += os.read(self.back, 1 << 20)
        said, self.raw = self.raw.split(b"\0", 1)
        said = json.loads(said)
        if "id" not in said:
            self.heard.append(said)
        return said

    def js(self, expression):
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                        awaitPromise=True)
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def open(self, path, place=""):
        """A fresh load, also where only the place differs."""
        for url in ("about:blank", f"file://{path}{place}"):
            self.heard.clear()
            self.call("Page.navigate", url=url)
            there = url.partition(":")[0] + ":complete"
            while self.js("location.protocol + document.readyState") != there:
                pass

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key.replace("Space", " "), code=key)

    def comes_to(self, place):
        """Does the page say that this is looked at, now or before long?"""
        until, at = time.monotonic() + 10, ""
        while at != place and time.monotonic() < until:
            self.js("new Promise(done => setTimeout(done, 20))")    # hashchange comes a task later
            at = self.js("document.getElementById('where').textContent")
        return at == place

    def faults(self):
        """Errors and lines of the console, and requests but for the page itself."""
        asked = [x["params"]["request"]["url"] for x in self.heard
                 if x["method"] == "Network.requestWillBeSent"]
        return [x for x in self.heard if x["method"] in
                ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")] + [
            url for n, url in enumerate(asked) if n or not url.startswith("file:")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium here, so the page is not looked at (apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.kill()
    browser.process.wait()


@pytest.fixture(scope="module")
def tiny():
    return Llama.load(TINY, dtype=torch.float64)


def vector(name):
    return [json.loads(line) for line in (VECTORS / f"{name}.jsonl").read_text().splitlines()]


def data_of(model, lines, program=explore, tok=None):
    """What `program` gives the page of these lines."""
    rounds = trace.by_round(lines[1:])
    end = lines[-1] if lines[-1]["event"] == "end" else None
    return program.explored(model, tok, lines[0], rounds, end)


def written(folder, data, edit=None):
    path = folder / "run.html"
    text = explore.page(data)
    if edit:
        assert text.count(edit[0]) == 1, f"the page has changed, and its wrong ones not: {edit[0]}"
        text = text.replace(*edit)
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------ what the page is to say

WALK = """(() => {
  const told = [];
  for (let n = 0; n < rounds.length; n++) for (let s = 0; s < steps[n].length; s++) {
    history.replaceState(null, "", `#round=${n}&step=${s}`);        // and no wait for the event
    show();
    const fields = id => [...document.querySelectorAll(`#${id} [data-field]`)].map(x =>
      [x.dataset.field, x.value ?? x.dataset.id ?? x.textContent, x.textContent]);
    told.push({n, s, kind: steps[n][s].kind, fields: fields("b"), account: fields("account"),
      here: [...document.querySelectorAll("#words .here")].map(x => [x.dataset.id, x.className]),
      slots: [...document.querySelectorAll("#cache [data-slot]")].map(x =>
        [x.dataset.slot, x.dataset.state])});
  }
  return told;
})()"""


def expected(r):
    """The steps of a round's lines: (kind, [(field, value), ...]) without bars and sums."""
    skip = ", ".join(map(str, r["round"][0]["skip"])) or "nothing"
    yield "begin", [("set", skip)] if r["draft"] else []
    for d in r["draft"]:
        yield "draft", [(x, d[x]) for x in ("u", "token", "q", "confidence")]
    if r["own"] or r["verify"]:
        yield "verify", [(x, v[x]) for v in r["verify"] for x in ("token", "q", "p", "a")]
    for v in r["verify"]:
        if v["u"] is not None:
            said = "accepted" if v["accepted"] else "rejected"
            yield "judge", [*((x, v[x]) for x in ("u", "token", "p", "q", "a")), ("verdict", said)]
    for own in r["own"]:
        yield "own", [(x, own[x]) for x in ("u", "kind", "token", "probability")] + [
            ("emitted", token) for emit in r["emit"] for token in emit["tokens"]]
    for line in r["optimise"]:
        D = line["D"][-1][-1]
        yield "optimise", [("D", round(D, 6)), ("set", ", ".join(map(str, line["skip"])))]


def account(lines):
    """After each round: decoded tokens, drafted, accepted, plain steps of drafts and verifies."""
    h, sums = lines[0], [0, 0, 0, 0.0, 0.0]
    for r in trace.by_round(lines[1:]):
        k, out, L, costs = len(r["draft"]), len(r["round"][0]["skip"]), h["config"]["L"], h["costs"]
        if r["round"][0]["round"] and r["emit"]:
            accepted = sum(v["accepted"] or 0 for v in r["verify"])
            for i, x in enumerate((len(r["emit"][0]["tokens"]), k, accepted,
                                   k * (costs["draft"][out] if costs else (L - out) / L),
                                   costs["verify"][k + 1] if costs else 1)):
                sums[i] += x
        tokens, drafted, kept, drafting, verifying = sums
        spent = drafting + verifying
        yield dict(tokens=tokens, drafted=drafted, accepted=kept, spent=spent, drafting=drafting,
                   verifying=verifying, plain=tokens, ideal=tokens / spent if spent else None)


def slots(lines, n, kind, i):
    """slot -> state, of those that the step looked at has written or left behind (TRACE.md, "The
    passes")."""
    r, out = trace.by_round(lines[1:])[n], {}
    t, k = r["round"][0]["start"] - 1, len(r["draft"])
    accepted = sum(v["accepted"] or 0 for v in r["verify"])
    out |= {x: "full" for x in range(t)} if n else {}
    if kind == "draft":
        out |= {t + x: "draft" for x in range(i + 1)}
    if kind not in ("begin", "draft"):
        out |= {x: "now" if kind == "verify" else "full" for x in range(t if n else 0, t + k + 1)}
    if kind in ("own", "optimise") or kind == "judge" and i == accepted:
        out |= {x: "stale" for x in range(t + accepted + 1, t + k + 1)}
    if kind == "optimise":
        at, r_ = r["optimise"][0]["position"], lines[0]["settings"]["r"]
        M = r["optimise"][0]["M"]
        out |= {x: "probe" for x in range(at - r_ + 1, at + 1)}
        out |= {x: "scratch" for x in range(at + 1, at + 1 + (M + 1) * r_)}
    return out


def same(field, want, value, text):
    """A field's value is the trace's, all digits; what is to be read of it, four."""
    if not isinstance(want, (int, float)):
        return value == want == text
    if field in ("token", "emitted"):
        return value == str(want)
    assert float(text) == pytest.approx(want, rel=6e-4 if abs(want) >= 1e-4 else 0.06, abs=1e-9)
    return math.isclose(float(value), want, rel_tol=1e-4 if field in DERIVED else 0)


DERIVED = ("spent", "drafting", "verifying", "ideal")  # sums, kept in five digits


def walk(browser, rounds=99):
    """What stands in the page at every step of the first rounds."""
    return browser.js(WALK.replace("rounds.length", f"Math.min(rounds.length, {rounds})"))


def held_against(told, lines):
    """Is what stands in the page what the lines say? Bars and choices are tested elsewhere."""
    by_round, places = trace.by_round(lines[1:]), iter(told)
    sums = list(account(lines))
    for n, r in enumerate(by_round[:told[-1]["n"] + 1]):
        nth = collections.Counter()
        for s, (kind, fields) in enumerate(expected(r)):
            at = next(places)
            assert (at["n"], at["s"], at["kind"]) == (n, s, kind)
            ours = [x for x in at["fields"] if x[0] in
                    ("set", "u", "token", "q", "confidence", "p", "a", "verdict", "kind",
                     "probability", "emitted", "D")]
            assert [x[0] for x in ours] == [x[0] for x in fields], (n, s)
            for (field, value, text), (_, want) in zip(ours, fields, strict=True):
                assert same(field, want, value, text), (n, s, field, value, text, want)
            said = {x[0]: x[1:] for x in at["account"]}
            for field, want in sums[n].items():
                assert field in said if want is not None else field not in said
                assert want is None or same(field, want, *said[field]), (n, field, want)
            i = nth[kind]
            nth[kind] += 1
            states = slots(lines, n, kind, i)
            shown = {int(x): state for x, state in at["slots"] if x.isdecimal()}
            for slot, state in shown.items():
                assert states.get(slot, state) == state and (
                    slot in states or state in ("empty", "stale")), (n, s, slot, state)
            here = {"draft": i, "judge": i, "own": len(r["draft"])}.get(kind)
            row = [d["token"] for d in r["draft"]] + [own["token"] for own in r["own"]]
            lit = row if here is None else [row[here]]
            assert [x[0] for x in at["here"]] == list(map(str, lit))
            if kind == "judge":
                accepted = r["verify"][i]["accepted"]
                assert at["here"][0][1].split()[0] == ("kept" if accepted else "rejected")
    assert next(places, None) is None


@pytest.mark.parametrize("name", ["tiny-temperature", "tiny-greedy", "tiny-probe"])
def test_what_stands_in_the_page_is_what_the_trace_says(name, browser, tiny, tmp_path):
    """Every step of every round: tokens, p, q, a, u, verdicts, sets, D, the account, the slots of
    the cache, and the token that is lit in the text. Rejects a page that confuses two of them."""
    lines = vector(name)
    browser.open(written(tmp_path, data_of(tiny, lines)))
    held_against(walk(browser, {"tiny-temperature": 9, "tiny-greedy": 4, "tiny-probe": 6}[name]),
                 lines)
    assert not browser.faults()


WRONG_PAGES = {
    "the confidence for q": ('", q ", num(x.q, "q")),\n      h("p", {class: "dim"}, "The hatched',
                '", q ", num(x.confidence, "q")),\n      h("p", {class: "dim"}, "The hatched'),
    "the verdict's u for the draw's": (
        'scale(x.u, ...x.at),\n      h("p", {class: "verdict"}, d(',
        'scale(x.judged, ...x.at),\n      h("p", {class: "verdict"}, d('),
    "verdicts turned round": ('yes ? "accepted" : "rejected"))', 'yes ? "rejected" : "accepted"))'),
    "the set of another budget": ("? o.skip : back", "? back(o, L, j - 1).skip : back"),
    "D of the column beside": ('num(o.D[i][j], "D")', 'num(o.D[i][j - 1], "D")'),
    "plain steps without the verifies": ("spent = a.drafting + a.verifying, all",
                                         "spent = a.drafting, all"),
    "the account of the round before": ("a = accounts[n],", "a = accounts[Math.max(0, n - 1)],"),
    "two digits": ("x.toPrecision(4)", "x.toPrecision(2)"),
    "rejected tokens that are not stale": ('fill(t + kept(r) + 1, t + k, "stale");', ""),
    "no step for the verify": ('[{kind: "verify"}] : []', "[] : []"),
    "the wrong token lit": ("its[rounds[n].draft.length] : its[i]",
                            "its[rounds[n].draft.length] : its[0]"),
    "rejected tokens shown as kept": ('x.judged == null ? "behind" : "rejected"',
                                      'x.judged == null ? "behind" : "kept"'),
}


@pytest.mark.parametrize("wrong", WRONG_PAGES)
def test_a_wrong_page_is_found(wrong, browser, tiny, tmp_path):
    """The test above can fail: each of these pages departs somewhere."""
    lines = vector("tiny-probe")
    browser.open(written(tmp_path, data_of(tiny, lines), WRONG_PAGES[wrong]))
    with pytest.raises(AssertionError):
        held_against(walk(browser, 3), lines)


# ------------------------------------------------------------------ what the model is to say

def judge_replay(program, model, name):
    """What the trace leaves out, against passes that start from nothing: the model reads the whole
    text anew for each distribution, and a cell at a time for each table."""
    lines = vector(name)
    data, text = data_of(model, lines, program), list(lines[0]["prompt_ids"])
    values = {k: v for k, v in lines[0]["settings"].items() if k != "seed"}
    s, L = Settings(**values | dict(stop_ids=tuple(values["stop_ids"]))), model.cfg.L

    def fresh(ids, skip=(), behind=0):
        """Logits of the last token of ids; the first len(ids) - behind of them are read by the full
        model."""
        cache, n = model.cache(len(ids)), len(ids) - behind
        if n:
            out = model.forward(torch.tensor(ids[:n]), cache.sequence(0, n), cache)
        if behind:
            out = model.forward(torch.tensor(ids[n:]), cache.sequence(n, behind), cache, skip)
        return probabilities(out[0][0], s)

    def close(shown, dist, exact=()):
        for i, x in shown:
            assert x == pytest.approx(dist[i].item(), rel=1e-4, abs=1e-12), (i, x)
        likely = dist.topk(3).indices.tolist()
        assert {i for i in likely if dist[i] > 0} <= {i for i, _ in shown}
        assert set(exact) <= {i for i, _ in shown}

    def lies(at, dist, token):
        below = dist[:token].sum().item()
        assert at == pytest.approx([below, below + dist[token].item()], abs=1e-4)

    for r, shown in zip(trace.by_round(lines[1:]), data["rounds"], strict=True):
        drafted = [d["token"] for d in r["draft"]]
        skip = [i in r["round"][0]["skip"] for i in range(L)]
        ps = [fresh(text + drafted[:i]) for i in range(len(drafted) + 1)]
        qs = [fresh(text + drafted[:i], skip, i + 1) for i in range(len(drafted))]
        for x, p, q in zip(shown["draft"], ps, qs):
            close([(i, y) for i, y, _ in x["top"]], p, [x["token"]])
            close([(i, z) for i, _, z in x["top"]], q, [x["token"]])
            assert x["overlap"] == pytest.approx(torch.minimum(p, q).sum().item(), rel=1e-4)
            lies(x["at"], q, x["token"])
        own, accepted = r["own"][0], sum(v["accepted"] or 0 for v in r["verify"])
        dist = ps[accepted]
        if own["kind"] == "residual":
            dist = residual(dist, qs[accepted])
        close(shown["own"]["top"], dist, [own["token"]])
        lies(shown["own"]["at"], dist, own["token"])
        text += r["emit"][0]["tokens"]
        for line in r["optimise"]:
            at, M, cosines = line["position"], line["M"], []
            ids, cache = torch.tensor(text[:at + 1]), model.cache(len(text) + s.r)
            _, h = model.forward(ids, cache.sequence(0, at + 1), cache, last=s.r, states=True)
            rows = cache.candidates(at, 1, s.r)

            def run(i, g, rows=rows, cache=cache):
                return model.layer(i, g.flatten(0, 1), rows, cache).view_as(g)

            def nearness(h, i, g, cosines=cosines):
                cosines.append(explore.nearness(h, i, g))
                return cosines[-1]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dp_layer_skip, "nearness", nearness)
                choice = dp_layer_skip.choose_skip_plain(h, run, M)
            assert shown["optimise"]["skip"] == [i for i, x in enumerate(choice.skip()) if x]
            said = (x.item() for x in cosines)
            for i in range(1, L + 1):
                for j in range(min(i, M) + 1):
                    both = [next(said) for _ in range((j < i) + (j > 0))]
                    next(said)                         # D, of the one taken
                    D, other = (shown["optimise"][x][i][j] for x in ("D", "other"))
                    assert D == pytest.approx(max(both), abs=2e-6)
                    assert other == (pytest.approx(min(both), abs=2e-6) if both[1:] else None)
                    bit = shown["optimise"]["parents"][i][j]
                    assert bit == "01"[j == i or j > 0 and both[1] > both[0]]


@pytest.mark.parametrize("name", ["tiny-temperature", "tiny-top-p", "tiny-probe"])
def test_what_the_trace_leaves_out_is_what_the_model_says(name, tiny):
    """The likeliest tokens of p, q and residual, sum(min(p, q)), the place of each draw, and the
    cosines of both choices of every cell. Rejects the replays below."""
    judge_replay(explore, tiny, name)


WRONG_REPLAYS = {
    "the draft reads a slot late": [("self.cache.sequence(t + step, 1), self.cache, left_out",
                                     "self.cache.sequence(t + step + 1, 1), self.cache, left_out")],
    "the draft leaves nothing out": [("self.cache, left_out)", "self.cache)")],
    "the own token is never read": [("self.cached = t + accepted + 1",
                                     "self.cached = t + accepted + 2")],
    "p of the row before": [("self.position(p[i], q[i], d,", "self.position(p[i - 1], q[i], d,")],
    "q without the filters": [("q.append(probabilities(logits[0], self.s))",
                               "q.append(logits[0].softmax(-1))")],
    "the residual of p alone": [("residual(p[accepted], q[accepted]) if accepted < k else "
                                 "p[accepted]", "p[accepted]")],
    "the probe is the last drafted token": [("self.h.shape[1] - len(drafted) + accepted",
                                             "self.h.shape[1]")],
    "a probe of one token": [("[:, -self.s.r:], [[None]]", "[:, -1:], [[None]]")],
    "the taken choice for the other": [("round(cos[not s][j], 6)", "round(cos[s][j], 6)")],
    "candidates at another place": [("candidates(line[\"position\"], M",
                                     "candidates(line[\"position\"] + 1, M")],
    "the tokens with the smallest ids": [("p.topk(min(TOP, len(p))).indices.tolist()",
                                          "range(TOP)")],
    "a draw's place counted to its end": [("for x in (p[token].double(), 0)]",
                                           "for x in (0, -p[token].double())]")],
}


@pytest.mark.parametrize("wrong", WRONG_REPLAYS)
def test_a_wrong_replay_is_found(wrong, tiny):
    """The test above can fail."""
    program = altered(explore, *WRONG_REPLAYS[wrong])
    with pytest.raises((AssertionError, LookupError, RuntimeError, trace.Invalid)):
        for name in ("tiny-probe", "tiny-top-p"):
            judge_replay(program, tiny, name)


# ------------------------------------------------------------------ how one moves in it

def test_keys_links_and_the_pointer_lead_everywhere(browser, tiny, tmp_path):
    """Rejects a key without effect or with another's, an end that wraps round, a link that leads
    beside, and a cell that tells of another."""
    lines = vector("tiny-temperature")
    rounds, path = trace.by_round(lines[1:]), written(tmp_path, data_of(tiny, lines))
    last, end = len(rounds) - 1, len(list(expected(rounds[-1]))) - 1
    count = [len(list(expected(r))) - 1 for r in rounds]

    def at(n, s):
        return f"round {n} of {last}, step {s} of {count[n]}"
    browser.open(path, "#round=2&step=1")
    assert browser.comes_to(at(2, 1))
    for key, place in (("ArrowRight", (2, 2)), ("ArrowLeft", (2, 1)), ("ArrowDown", (3, 0)),
                       ("ArrowUp", (2, 0)), ("ArrowLeft", (1, count[1])), ("ArrowRight", (2, 0)),
                       ("Home", (0, 0)), ("ArrowLeft", (0, 0)), ("ArrowUp", (0, 0)),
                       ("End", (last, end)), ("ArrowRight", (last, end)),
                       ("ArrowDown", (last, end))):
        browser.press(key)
        assert browser.comes_to(at(*place)), key
    assert browser.js("location.hash") == f"#round={last}&step={end}"
    browser.press("Home")
    assert browser.comes_to(at(0, 0))
    browser.press("Space")
    assert browser.comes_to(at(0, 1))
    browser.press("Space")
    time.sleep(1.3)                                    # a step takes 1.1 seconds
    assert browser.comes_to(at(0, 1)), "paused"

    n = next(n for n, r in enumerate(rounds) if r["own"][0]["kind"] == "residual")
    s = next(s for s, (_, x) in enumerate(expected(rounds[n])) if ("verdict", "rejected") in x)
    for click, place in (("#words a.rejected", (n, s)), ("#map a[data-round='4']", (4, 0)),
                         ("#next", (4, 1)), ("#last", (last, end)), ("#first", (0, 0))):
        browser.js(f"document.querySelector(\"{click}\").dispatchEvent(new MouseEvent('click', "
                   "{bubbles: true, cancelable: true}))")
        assert browser.comes_to(at(*place)), click
    for place, there in (("#round=99&step=99", (last, end)), ("#round=-3&step=x", (0, 0)),
                         ("#round=1.9&step=1&cell=77,1", (1, 1)), ("#nonsense", (0, 0))):
        browser.js(f"location.hash = '{place}'")
        assert browser.comes_to(at(*there)), place

    n = next(n for n, r in enumerate(rounds) if n and r["optimise"])
    table, o = rounds[n]["optimise"][0], browser.js(f"rounds[{n}].optimise")
    browser.open(path, f"#round={n}&step={count[n]}&cell=0,0")
    for i, j in ((0, 0), (3, 1), (4, 0), (2, 2), (6, 2)):
        for how in ("link", "pointer"):
            cell = f"&cell={i},{j}" if how == "link" else ""
            browser.js(f"location.hash = '#round={n}&step={count[n]}{cell}'")
            assert browser.comes_to(at(n, count[n]))
            if how == "pointer":
                x, y = browser.js(f"""(() => {{
                  const cell = document.querySelector("[data-i='{i}'][data-j='{j}']");
                  cell.scrollIntoView({{block: "center"}});
                  const box = cell.getBoundingClientRect();
                  return [box.x + box.width / 2, box.y + box.height / 2];
                }})()""")
                browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            said = {x: (float(y), taken) for x, y, taken in browser.js(
                "[...document.querySelectorAll('#cell [data-field]')].map(x => [x.dataset.field, "
                "x.value, !!x.closest('.taken')])")}
            assert said["D"][0] == round(table["D"][i][j], 6), (i, j, how)
            skipped, mine = table["parents"][i][j] == "1", round(table["D"][i][j], 6)
            want = {x: (mine, True) if (x == "skip") == skipped else (o["other"][i][j], False)
                    for x in ("run", "skip")} if i else {}
            want = {x: y for x, y in want.items() if y[0] is not None}
            assert {x: y for x, y in said.items() if x != "D"} == want, (i, j, how)
    assert not browser.faults()


HOSTILE = ["</script><script>hacked = 1</script>", "<img src=x onerror='hacked=1'>", "<!--<script>",
           "\u202etxet", "\"onmouseover='hacked=1'", "${hacked = 1}", "&lt;b&gt;", "\u2028", "\\",
           "{RUN}", "`", "</textarea></style></title>", "javascript:hacked=1", "\x00\x1b[2J", "]]>"]


class HostileTokenizer:
    """Each token is one of HOSTILE; the last are the bytes of a character."""
    EURO = "€".encode()

    def decode_bytes(self, ids):
        return b"".join(self.EURO[i - 77:][:1] if i > 76 else HOSTILE[i % len(HOSTILE)].encode()
                        for i in ids)


def judge_text(browser, path):
    browser.open(path)
    walk(browser, 3)
    assert browser.js("typeof hacked") == "undefined"
    assert browser.js("document.querySelectorAll('img, iframe, [onmouseover]').length") == 0
    assert browser.js("document.scripts.length") == 2 and not browser.faults()
    said = browser.js("document.getElementById('words').textContent")
    assert HOSTILE[0] in said and "onmouseover='hacked=1'" in said
    assert "\u202e" not in said and "\\u{202e}" in said


def test_tokens_that_look_like_markup_are_text(browser, tiny, tmp_path):
    """Rejects a page that sets a token's text as markup or ends its data at one, one that lets a
    token turn the text around it, and one that asks the network for anything."""
    data = data_of(tiny, vector("tiny-temperature"), tok=HostileTokenizer())
    path = written(tmp_path, data)
    judge_text(browser, path)
    shown = browser.js("JSON.parse(document.getElementById('run').textContent).tokens")
    assert shown == {str(i): explore.alone(HostileTokenizer(), i) for i in data["tokens"]}
    assert set(re.findall(r"\w+://[\w./]*", path.read_text())) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("wrong", [
    ("\\u003c", "<"),
    ("node.append(...kids.flat(9));", "for (const x of kids.flat(9)) typeof x === 'string' ? "
     "node.innerHTML += x : node.append(x);"),
    ("const escaped = text => ", "const escaped = text => text; const never = text => "),
    ("<title>", "<link rel=stylesheet href='https://example.org/x.css'><title>")])
def test_a_page_that_takes_text_for_markup_is_found(wrong, browser, tiny, tmp_path):
    """The test above can fail."""
    path = written(tmp_path, data_of(tiny, vector("tiny-temperature"), tok=HostileTokenizer()))
    path.write_text(path.read_text().replace(*wrong))
    with pytest.raises(AssertionError):
        judge_text(browser, path)


def test_a_character_split_over_tokens_is_whole_in_the_text():
    """Rejects a text of replacement characters, and a token that claims the whole character."""
    tok = HostileTokenizer()
    shown = explore.Text(tok, ())
    assert [explore.piece(shown, i) for i in (77, 78, 79)] == ["", "", "€"]
    assert [explore.alone(tok, i) for i in (77, 78, 79)] == ["\\xe2", "\\x82", "\\xac"]


def test_a_trace_cut_short_shows_what_there_is(browser, tiny, tmp_path):
    """Rejects a program that wants a whole trace or a whole round, and a page that shows more or
    less: wherever the file ends, all of its lines are there and no others."""
    raw = (VECTORS / "tiny-probe.jsonl").read_bytes()
    ends = [m.end() for m in re.finditer(rb"\n", raw)]
    first = [json.loads(line)["event"] for line in raw.splitlines()[:20]]
    looked_at = {ends[0], ends[1], ends[first.index("draft")], ends[first.index("verify")],
                 ends[first.index("own", first.index("verify"))], ends[15] + 9, ends[-2]}
    for cut in sorted({*ends[:20]} | looked_at):
        (tmp_path / "cut").write_bytes(raw[:cut])
        header, rounds, end = explore.lines_of(tmp_path / "cut")
        assert end is None
        path = written(tmp_path, explore.explored(tiny, None, header, rounds, end))
        if cut not in looked_at:
            continue
        browser.open(path)
        lines = [json.loads(x) for x in raw[:cut].split(b"\n")[:-1]]
        if rounds:
            held_against(walk(browser, 4), lines)
        tokens = sum(line["event"] in ("draft", "own") for line in lines)
        assert browser.js("document.querySelectorAll('#words a').length") == tokens
        assert "breaks off" in browser.js("document.getElementById('words').textContent")
        assert not browser.faults(), cut


def test_it_can_be_read_on_a_narrow_screen_in_the_dark_and_on_paper(browser, tiny, tmp_path):
    """Rejects what sticks out at 390 pixels, a page that is light in the dark, and a print of one
    step instead of the round's."""
    lines = vector("tiny-temperature")
    path = written(tmp_path, data_of(tiny, lines))
    n = next(n for n, r in enumerate(trace.by_round(lines[1:])) if n and r["optimise"])
    count = len(list(expected(trace.by_round(lines[1:])[n])))
    try:
        for width, scheme in ((390, "dark"), (1280, "light")):
            browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800,
                         deviceScaleFactor=1, mobile=width < 600)
            browser.call("Emulation.setEmulatedMedia", features=[
                dict(name="prefers-color-scheme", value=scheme)])
            browser.open(path)
            for s in range(count):
                browser.js(f"history.replaceState(null, '', '#round={n}&step={s}'); show()")
                assert browser.js("document.documentElement.scrollWidth") <= width, (width, s)
            paper, ink = (sum(map(int, re.findall(r"\d+", browser.js(
                f"getComputedStyle(document.body).{x}")))) for x in ("backgroundColor", "color"))
            assert (paper < ink) == (scheme == "dark")
        pdf = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
        assert pdf.startswith(b"%PDF")
        assert browser.js("document.querySelectorAll('#paper section').length") == count
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.call("Emulation.setEmulatedMedia", features=[])


def test_a_run_of_300_tokens_is_small_and_smooth(browser, tmp_path):
    """Rejects a page of a megabyte, and steps of more than two frames: a model of 32 layers and
    4096 tokens, an optimisation every 16 rounds."""
    random_checkpoint(tmp_path / "model", dict(num_hidden_layers=32, vocab_size=4096))
    assert explore.main(["--model", str(tmp_path / "model"), "--device", "cpu", "--out",
                         str(tmp_path / "run.html"), "--max-new-tokens", "300", "--skip-layers",
                         "16", "--draft-length", "3", "--draft-exit-threshold", "0", "--interval",
                         "16", "--temperature", "1", "--prompt-ids", "3,41,7"]) == 0
    size = (tmp_path / "run.html").stat().st_size
    browser.open(tmp_path / "run.html", "#round=100")
    browser.call("Performance.enable")

    def cpu():                                         # milliseconds, whoever else is busy
        return 1000 * {x["name"]: x["value"] for x in browser.call("Performance.getMetrics")[
            "metrics"]}["ThreadTime"]
    began = cpu()
    browser.js("""for (let s = 0; s < 30; s++) {
        history.replaceState(null, "", `#round=${96 - s}&step=${s % 9}`);
        show();
      }""")
    took = (cpu() - began) / 30
    assert size < 1e6 and took < 30, (size, took)
    assert len(browser.js("document.getElementById('words').textContent")) > 900


# ------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")
    random_checkpoint(folder, dict(num_hidden_layers=5))
    return folder


def test_a_run_and_its_trace_give_the_same_page_also_by_the_policy(model, tmp_path):
    """Rejects a page of another run than the one that is traced, and costs that are not the run's:
    with the policy the header has them."""
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(dict(draft=[1, .8, .6, .4, .2, .1], verify=[1, 1, 1.1, 1.2, 1.3])))
    common = ["--model", str(model), "--device", "cpu", "--out"]
    for flags in (["--skip-layers", "2", "--draft-length", "3", "--draft-exit-threshold", "0",
                   "--interval", "2"], ["--costs", str(costs), "--draft-length", "3"]):
        trace_file, pages = tmp_path / "run.jsonl", [tmp_path / "live.html", tmp_path / "then.html"]
        assert explore.main([*common, str(pages[0]), *flags, "--prompt-ids", "3,41,7", "--trace",
                             str(trace_file), "--max-new-tokens", "12", "--temperature", "1"]) == 0
        assert explore.main([*common, str(pages[1]), "--from-trace", str(trace_file)]) == 0
        assert pages[0].read_text() == pages[1].read_text()
        lines = [json.loads(x) for x in trace_file.read_text().splitlines()]
        text = re.search(r'id="run">(.*)</script>', pages[0].read_text())[1]
        for ours, want in zip(json.loads(text)["accounts"], account(lines), strict=True):
            assert ours == pytest.approx({x: want[x] for x in ours}, rel=1e-4)
    assert lines[0]["costs"] and sum(line["event"] == "draft" for line in lines)


def swap(lines, event, **fields):
    """The lines, of which the last of this event says something else."""
    n = max(n for n, line in enumerate(lines) if line["event"] == event)
    return [*lines[:n], {**lines[n], **fields}, *lines[n + 1:]]


@pytest.mark.parametrize("edit, said", [
    (lambda x: [], "empty"), (lambda x: x[1:], "not the header"),
    (lambda x: [x[0], *x[2:]], "begin with a round"),
    (lambda x: swap(x, "round", start=5), "it does not follow the last"),
    (lambda x: swap(x, "round", round=1), "it does not follow the last"),
    (lambda x: swap(x, "verify", step=0), "not the same tokens"),
    (lambda x: swap(x, "own", kind="plain"), "own is plain, and it is"),
    (lambda x: swap(x, "emit", tokens=[1, 2, 3, 4, 5, 6]), "emitted is not"),
    (lambda x: swap(x, "emit", tokens=[]), "emitted is not"),
    (lambda x: swap(x, "optimise", position=3), "at another place"),
    (lambda x: swap(x, "optimise", parents=["0"]), "of another size"),
    (lambda x: swap(x, "optimise", parents=["0"] + ["1" * min(i + 1, 3) for i in range(1, 7)]),
     "a parent outside"),
    (lambda x: [dict(x[0], settings=dict(x[0]["settings"], N=8)), *x[1:]], "more lines than"),
    (lambda x: [dict(x[0], model={}), *x[1:]], "another model"),
    (lambda x: [dict(x[0], config=dict(x[0]["config"], V=81)), *x[1:]], "another model"),
    (lambda x: [dict(x[0], prompt_ids=[]), *x[1:]], "without a prompt"),
    (lambda x: [dict(x[0], prompt_ids=[99]), *x[1:]], "not in the model's vocabulary"),
    (lambda x: [dict(x[0], costs=dict(draft=[1], verify=[1])), *x[1:]], "no costs"),
    (lambda x: [dict(x[0], program=5), *x[1:]], "program is 5"),
])
def test_a_trace_that_cannot_be_followed_gets_one_line(edit, said, capsys, tmp_path):
    """Rejects a traceback, and a page that is made nonetheless."""
    path, out = tmp_path / "t.jsonl", tmp_path / "run.html"
    path.write_text("".join(json.dumps(line) + "\n" for line in edit(vector("tiny-temperature"))))
    assert explore.main(["--from-trace", str(path), "--model", str(TINY), "--device", "cpu",
                         "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err and not out.exists(), err


@pytest.mark.parametrize("flags, status, said", [
    ([], 2, "--out"), (["--out", "/no/such/folder/x.html"], 2, "no such folder"),
    (["--out", "x", "--compare"], 2, "without --compare"),
    (["--out", "x", "--from-trace", "t", "--prompt", "x"], 2, "--from-trace goes without"),
    (["--out", "x", "--from-trace", "t", "--trace", "u"], 2, "--from-trace goes without"),
    (["--out", "x", "--system", "s"], 2, "--system goes with"),
    (["--out", "x", "--prompt", "x", "--prompt-ids", "1"], 2, "--prompt-ids goes without"),
    (["--out", "x", "--from-trace", "/no/such/trace"], 1, "No such file"),
    (["--out", "x", "--model", "/no/such/model"], 1, "no such folder"),
])
def test_what_cannot_be_done_gets_one_line(flags, status, said, capsys):
    """Rejects a flag that is silently without effect, and a run without a place for its page."""
    assert explore.main(flags) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
