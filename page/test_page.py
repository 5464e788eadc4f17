"""The page's engine is a second implementation: it is held against the first one, as anybody's
would be. It runs in node, or in Chromium; the scenes in Chromium alone (Debian: apt-get install
chromium). Each is visited once, and the tests read what was told.
"""
import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dp_layer_skip import choose_skip
from llama import Llama, torch
from oracle import check_trace
from page.build import whole
from speculative import acceptance, residual
from text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ROOT / "oracle/vectors"
MODELS = {"demo": ROOT / "demo", "tiny": ROOT / "oracle/tiny"}
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def opened(folder, page, script, address=""):
    """Chromium, in which a page is open and `script` runs. Time is the browser's own: nobody waits
    for it."""
    told = f"(async () => {{{script}}})().then(x => {{document.title = JSON.stringify(x); " \
           "document.querySelectorAll('script').forEach(each => each.remove())})"
    (folder / "look.html").write_text(f"{page}<script>{told}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={folder}/chrome", "--virtual-time-budget=999999", "--dump-dom"]
    return subprocess.Popen([CHROMIUM, *flags, f"file://{folder}/look.html{address}"], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def returned(chromium):
    """What the script returned. A fault of it leaves the title as it was, which is no JSON."""
    out, err = chromium.communicate(timeout=600)
    assert "CONSOLE" not in err, err[-2000:]
    return json.loads(html.unescape(re.search("(?s)<title>(.*?)</title>", out)[1]))


def vector(name):
    return [json.loads(line) for line in (VECTORS / f"{name}.jsonl").open(encoding="utf-8")]


FORWARDS = ["forward", "forward-skip", "tiny-forward", "tiny-forward-skip"]
RUNS = ["temperature", "stop-in-draft", "tiny-greedy", "tiny-temperature"]
TEXTS = ["def f(x):\n    return 'it''s'", "I'VE they'll 12345", "  \n\n \t x\r\n",
         "naïve ſ's 東京 🙂", "\u0085\ufeff\u00a0 x", "<|end_of_text|>", "", "—…“quoted”"]
TEXTS += [json.loads(line)["turns"][0]
          for line in (ROOT / "demo/prompts.jsonl").read_text("utf-8").splitlines()]
ENGINE = """
  const said = file => new TextDecoder().decode(bytesOf(atob(files[file])));
  const models = {};
  for (const name of ["demo", "tiny"])
    models[name] = new Llama(JSON.parse(said(`${name}/config.json`)),
      readSafetensors(bytesOf(atob(files[`${name}/model.safetensors`])).buffer));
  const modelOf = name => models[name.startsWith("tiny") ? "tiny" : "demo"];
  const told = {forwards: {}, runs: {}};

  const list = arrays => arrays.map(x => [...x]);
  for (const [name, [ids, skip]] of Object.entries(given.forwards)) {
    const model = modelOf(name);
    const cache = new Cache(model.cfg, ids.length);
    const h = model.forward(ids, sequence(0, ids.length), cache, skip);
    told.forwards[name] = {hidden: list(h), keys: list(cache.keys), values: list(cache.values),
      logits: list(model.head(h.at(-1)))};
  }

  for (const [name, [header, ...lines]] of Object.entries(given.runs)) {
    const model = modelOf(name);
    const policy = new Recorded(model.cfg.L, lines);
    const chance = new Chance(() => policy.numbers.shift());
    const rounds = [...generate(model, header.prompt_ids, header.settings, chance, policy)];
    told.runs[name] = rounds.flatMap(events);
  }

  const always = u => new Chance(() => u);
  told.edges = [always(0).draw([0, .5, .5]), always(.5).draw([0, .5, .5]), always(0).accept([0]),
    always(.5).accept([.6, .5, .6]), always(.5).accept([.6, .6]), residual([.5, .5], [.5, .5])];

  const tokenizer = new Tokenizer(said("demo/tokenizer.model"));
  told.texts = given.texts.map(text => tokenizer.encode(text))
    .map(ids => [ids, tokenizer.pieces(ids).join("")]);
  return told;"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """What ENGINE tells."""
    if not (NODE or CHROMIUM):
        pytest.skip("neither node nor Chromium")
    files = {f"{name}/{path.name}": base64.b64encode(path.read_bytes()).decode()
             for name, folder in MODELS.items() for path in folder.iterdir()
             if path.name in ("config.json", "model.safetensors", "tokenizer.model")}
    given = {"forwards": {}, "runs": {name: vector(name) for name in RUNS}, "texts": TEXTS}
    for name in FORWARDS:
        theirs = load_file(VECTORS / f"{name}.safetensors")
        h = theirs["hidden"]
        same = (h[1:] == h[:-1]).flatten(1).all(1).tolist()
        given["forwards"][name] = theirs["prompt_ids"].tolist(), same
    body = (ROOT / "page/engine.js").read_text(encoding="utf-8")
    body += f"\nconst [files, given] = {json.dumps([files, given])};\n"
    if not NODE:
        page = f"<title></title><script>{body}</script>"
        return returned(opened(tmp_path_factory.mktemp("engine"), page, ENGINE))
    body += f"console.log(JSON.stringify((() => {{{ENGINE}}})()))"
    p = subprocess.run([NODE, "-"], input=body, check=False, capture_output=True, text=True,
                       timeout=600)
    assert p.returncode == 0, p.stderr[-2000:]
    return json.loads(p.stdout)


@pytest.mark.parametrize("name", FORWARDS)
def test_the_engines_forward_pass_is_that_of_the_vectors(name, engine):
    """Rejects another rotary layout, grouping of heads, norm, mask or stretching, bfloat16 read
    wrongly, a skipped layer that writes, and other layers left out."""
    theirs = load_file(VECTORS / f"{name}.safetensors")
    for part, x in engine["forwards"][name].items():
        want = theirs[part].double()
        got = torch.tensor(x, dtype=torch.float64).view(want.shape)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), part


@pytest.mark.parametrize("name", RUNS)
def test_with_the_numbers_of_a_vector_the_engine_makes_its_run_again(name, engine):
    """Rejects numbers taken in another order, tokens after a rejection judged, another edge of a
    draw, and text after a stop token. (Tables are the checker's: rounding may decide a tie.)"""
    theirs = [line for line in vector(name)[1:-1] if line["event"] != "times"]
    for got, want in zip(engine["runs"][name], theirs, strict=True):
        for part in want.keys() - {"D", "skipped"} - ({"skip"} if "D" in want else set()):
            near = pytest.approx(want[part], abs=2e-5) if type(want[part]) is float else want[part]
            assert got[part] == near, (want["event"], want["round"], part)


def test_at_its_edge_a_number_draws_and_judges_as_here(engine):
    """Rejects a token of no probability drawn or accepted at u = 0, >= for >, acceptance that goes
    on after a rejection, and a residual of no mass that is no number."""
    assert engine["edges"] == [1, 2, 0, 1, 2, [.5, .5]]


def test_the_engine_reads_text_as_the_tokenizer_does(engine):
    """Rejects another way to split or to merge, a special token that a text can spell, and a
    character lost at the border of tokens."""
    tok = Tokenizer(ROOT / "demo")
    assert engine["texts"] == [[tok.encode(text), text] for text in TEXTS]


# The scenes, opened one after another on one run, then keys and a trace on another; what is read is
# what stands there.
SCENES = """
  const sleep = time => new Promise(done => setTimeout(done, time));
  const open = async address => {
    location.hash = address;
    do await sleep(50); while (!run?.whole || !$("busy").hidden);
  };
  const stage = selector => [...document.querySelectorAll(`#stage ${selector}`)];
  const shown = () => Object.fromEntries(stage("[data-field]")
    .map(x => [x.dataset.field, x.value ?? x.dataset.id ?? x.textContent]));
  const busy = new Set();
  new MutationObserver(() => busy.add($("busy").textContent)).observe($("busy"), {childList: true});
  let base = location.hash.slice(1);
  await open(base);
  const trace = () => traceOf(model.cfg, run.s, run.prompt, run.rounds, about);
  const told = {traces: [trace()], watch: shown(), tokens: [], cells: []};

  for (const r of run.rounds)
    for (const step of fates(r).keys()) {
      await open(`${base}&scene=1&round=${r.n}&step=${step}`);
      told.tokens.push([r.n, step, shown()]);
    }
  await open(base + "&scene=2&off=2,3,4,9,20");
  const its = run.known.get("reading the text");
  told.shares = stage(".n data").map(x => x.value);
  told.passage = [its.ids, its.from, its.size];
  told.program = indices(program(its, 5));
  for (const cell of ["32,22", "32,5", "17,9", "3,3", "1,0"]) {
    await open(`${base}&scene=3&round=9999&step=33&cell=${cell}`);
    told.cells.push([cell, shown()]);
  }
  await open(base + "&scene=4");
  told.talk = [shown(), talk().rounds.map(r =>
    ({part: r.part, chosen: !!r.choice, kept: r.accepted}))];
  await open(base + "&scene=5");
  told.speeds = stage("tr").slice(1).map(tr =>
    [...tr.querySelectorAll("data")].map(x => Number(x.value)));
  told.points = [...run.known].filter(([name]) => name.startsWith("a draft without"))
    .map(([name, x]) => [(name.match(/\\d+/g) ?? []).length, x]);
  told.busy = [...busy];
  const [p, q] = [[.5, .25, .15, .07, .03], [.2, .4, .15, .05, .2]];
  told.samplers = Object.values(SAMPLERS).map(make => [...outcome(make(p, q))]);
  await open(base + "&scene=6");
  $("draw1000").click();
  told.exam = [$("seen").textContent, stage("tr").slice(1).map(tr =>
    [tr.querySelector("[data-id]")?.dataset.id, tr.children[1].textContent,
      tr.children[2].textContent, tr.querySelectorAll(".far").length])];
  const [, n, i] = run.known.get("looking for a guess that shows the faults");
  told.guess = [[...run.rounds[n].q[i]], [...run.rounds[n].p[i]]];

  base = given.other;
  await open(base);
  told.traces.push(trace());
  told.safe = [typeof hacked, document.querySelectorAll("img").length,
    stage(".words")[0].textContent.split("\\\\u{202e}").length];
  const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown",
    {key, bubbles: true}));
  told.where = [];
  for (const key of given.keys) {
    const [, how, id, then] = key.match(/^(click|focus) (\\w+) ?(.*)/) ?? [];
    if (key === " ") document.activeElement.blur();            // else it presses the button
    if (key[0] === "#") location.hash = `${base}&${key.slice(1)}`;
    else if (!how) press(key);
    else {
      $(id).focus();
      if (how === "click") $(id).click();
      else press(then);
    }
    await sleep(key === " " ? 1500 : 100);
    told.where.push([at().scene, $("where").textContent, at().cell].join(" ").trim());
  }
  press(" ");
  told.carried = $("carried").textContent;
  await openTrace(new File([given.trace], "run.jsonl"));
  told.recorded = [run.rounds.map(r => r.emitted), $("fault").hidden, $("carried").textContent];
  $("default").click();
  told.back = location.hash;
  location.hash = base;                                // a shorter run
  return told;"""
KEYS = ["#scene=3&round=2&step=2", "ArrowRight", "ArrowUp", "ArrowLeft", "Home", "ArrowLeft",
        "ArrowDown", "#scene=3&round=2&step=33", "focus grid ArrowLeft", "End", "click back",
        "ArrowLeft", "1", " "]


def visit(folder):
    """Chromium, in which SCENES runs."""
    hostile = "%3Cimg+src=x+onerror='hacked=1'%3E%E2%80%AEx"
    given = {"trace": (VECTORS / "temperature.jsonl").read_text(), "keys": KEYS,
             "other": f"N=20&K=4&interval=2&temperature=0&seed=abc&prompt={hostile}"}
    script = f"const given = {json.dumps(given)};\n{SCENES}"
    return opened(folder, whole(), script,
                  "#N=20&K=4&temperature=1&exit_threshold=0&seed=4&interval=3&prompt=class+A%3A%0A"
                  "&text0=class+A%3A%0A&text1=%0AThe+server+&text2=%0Aimport+os%0A")


@pytest.fixture(scope="module")
def told(request):
    """What SCENES tells."""
    if not CHROMIUM:
        pytest.skip("no Chromium (apt-get install chromium)")
    return returned(request.config.visit)


def test_the_numbers_of_the_run_are_those_of_its_trace(told, tmp_path, capsys):
    """Watch, guess and check, and the table. Rejects another token's p, q, u or verdict, the u of
    the draw for the verdict's, a cell that shows the way not taken as taken, drafts that cost
    nothing, choices that are not counted; and an engine whose trace the checker does not pass."""
    for text in told["traces"]:                        # sampled, then greedy
        (tmp_path / "t").write_text(text)
        assert check_trace.main([str(tmp_path / "t")]) == 0, capsys.readouterr().out
        assert '"residual"' in text and '"optimise"' in text
    lines = [json.loads(line) for line in told["traces"][0].splitlines()]
    by = {(x["event"], x.get("round"), x.get("step")): x for x in lines}
    drafts = [x for x in lines if x["event"] == "draft"]
    tables = [x for x in lines if x["event"] == "optimise"]
    rounds = [x for x in lines if x["event"] == "round" and x["round"] > 0]
    cost = sum(1 - len(by["round", x["round"], None]["skip"]) / 32 for x in drafts)
    kept = sum(x.get("accepted") is True for x in lines)
    watch = {name: float(value) for name, value in told["watch"].items()}
    assert (watch["kept"], watch["drafted"]) == (kept, len(drafts)) and kept < len(drafts) > 12
    assert watch["per pass"] == pytest.approx(19 / len(rounds))
    assert watch["saved"] == pytest.approx(19 - cost - len(rounds) - len(tables))
    for n, step, shown in told["tokens"]:
        own = ("draft", n, step) not in by
        line = by["own", n, None] if own else by["verify", n, step]
        want = {k: line[k] for k in (("token", "probability") if own else ("token", "p", "q", "a"))}
        assert {k: float(shown[k]) for k in want} == pytest.approx(want), (n, step)
        verdict = {True: "kept", False: "rejected", None: "not judged"}
        assert shown["kind" if own else "verdict"] == (
            line["kind"] if own else verdict[line["accepted"]])
        judged = own or line["accepted"] is not None
        last = line["u"] if judged else by["draft", n, step]["u"]
        assert float(shown["u"]) == last                # of two scales the lower one's
    for cell, shown in told["cells"]:
        i, j = map(int, cell.split(","))
        D = tables[-1]["D"][i][j]
        assert float(shown["D"]) == D
        assert float(shown["skip" if tables[-1]["skipped"][i][j] == "1" else "run"]) == D


def test_the_shares_of_scene_2_are_those_of_the_python_model(told):
    """Rejects a draft that reads its own entries of earlier tokens, p of another row, and sets that
    are chosen by another token."""
    ids, t, size = told["passage"]
    model = Llama.load(ROOT / "demo")
    cache = model.cache(len(ids) + size)
    with torch.inference_mode():
        h = model.forward(torch.tensor(ids[:t]), cache.sequence(0, t), cache)
        rows = cache.candidates(t - 1, 6)
        choice = choose_skip(torch.stack([x[-1] for x in h]),
                             lambda i, g: model.layer(i, g, rows.first(len(g)), cache), 5)
        assert [i for i, out in enumerate(choice.skip()) if out] == told["program"]
        some = torch.tensor(ids[t:t + size])
        p = model.head(model.forward(some, cache.sequence(t, size), cache)[-1]).softmax(-1)
        position = torch.arange(t, t + size)
        slots = torch.arange(len(ids), len(ids) + size)
        may_read = (cache.all_slots < position[:, None]) | (cache.all_slots == slots[:, None])
        rows = cache.rows(position, slots, may_read)
        for off, x in (([2, 3, 4, 9, 20], told["shares"][0]), (told["program"], told["shares"][1])):
            skip = [i in off for i in range(32)]
            q = model.head(model.forward(some, rows, cache, skip)[-1]).softmax(-1)
            assert float(x) == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), abs=1e-4)


def test_prices_samplers_and_sets_are_what_they_are_called(told):
    """Context, prices, the exam: rejects a price list that is not that of its source, a curve by
    another formula, a set called new that is the old one, and a fault that is another one."""
    costs = json.loads((ROOT / "demo/clasp.json").read_text())["costs"]
    readme = (ROOT / "gpu/README.md").read_text("utf-8")
    plain, draft, verify, choice = (float(re.search(
        rf"(?m)^\| {name}[^|]*\| [\d.]+ \| ([\d.]+)", readme)[1])
        for name in ("plain step", "draft, 22 left out", "verify of 13 rows", "choice, M = 22"))
    speeds = told["speeds"]
    assert speeds[0][:3] == pytest.approx([1 - 22 / 32, 1, 1])
    five = 1 + (verify / plain - 1) * 4 / 12           # rows, between one and thirteen
    assert speeds[1][:3] == pytest.approx([draft / plain, five, choice / plain])
    assert speeds[2][:3] == pytest.approx([costs["draft"][22], costs["verify"][5],
                                           costs["optimise"]])
    counted = [sum(x ** n for n in range(5)) / (4 * (1 - M / 32) + 1 + 1 / 3)
               for M, x in told["points"] if M % 2 == 0]
    assert speeds[0][3] == pytest.approx(max(counted), rel=1e-6)
    shown, rounds = told["talk"]
    old, new = [], []                                  # until, of a part, layers are chosen
    for part in (1, 2):
        its = [r for r in rounds if r["part"] == part]
        n = next((n for n, r in enumerate(its) if r["chosen"]), len(its))
        old += [r["kept"] for r in its[:n + 1]]
        new += [r["kept"] for r in its[n + 1:]]
    assert int(shown["kept after a change, by the old set"]) == sum(old) > 0
    assert int(shown["kept by the set chosen since"]) == sum(new) > 0
    p, q = torch.tensor([[.50, .25, .15, .07, .03], [.20, .40, .15, .05, .20]]).double()
    a, owed, most = acceptance(p, q), residual(p, q), torch.eye(5).double()[1]
    for (drafts, kept, own), ours in zip(((q, a, owed), (q, a, p), (q, a, (p - q).softmax(0)),
                                       (most, a, owed), (q, acceptance(1.3 * p, q), owed)),
                                      told["samplers"], strict=True):
        want = drafts * kept + (drafts * (1 - kept)).sum() * own
        assert ours == pytest.approx(want.tolist())
    seen, rows = told["exam"]
    (q, p), far = told["guess"], sum(row[3] for row in rows)
    assert seen.startswith("1000 draws") and far > 3
    for token, *shown, _ in rows[:-1]:
        assert [float(x) for x in shown] == pytest.approx([q[int(token)], p[int(token)]], abs=6e-4)


def test_keys_links_traces_and_texts_that_look_like_markup(told):
    """Rejects a key without effect or with another's, keys that a clicked button keeps, an end that
    wraps round, a recorded run that is shown as another, a run that does not say that it is not the
    default, long work that does not say what it is, and a text that becomes markup."""
    where = told["where"]
    assert where[:6] == ["3 round 2, step 2", "3 round 2, step 3", *["3 round 0, step 0"] * 4]
    assert where[6:9] == ["3 round 2, step 0", "3 round 2, step 33", "3 round 2, step 33 32,21"]
    assert len({*where[9:12]}) == 3                    # a key, a click, a key
    assert where[12].startswith("1 ") and where[13] != where[12]
    assert told["safe"] == ["undefined", 0, 2]
    assert "measuring a verify of 13" in "".join(told["busy"])
    assert "temperature 0, K 4" in told["carried"] and told["back"] == "#scene=1"
    emitted, hidden, name = told["recorded"]
    assert emitted == [line["tokens"] for line in vector("temperature") if line["event"] == "emit"]
    assert hidden and "run.jsonl" in name
