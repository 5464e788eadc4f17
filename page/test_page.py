"""The page's engine is a second implementation: it is held against the first one, as anybody's
would be. It runs in node, or in Chromium; the scenes in Chromium alone (Debian: apt-get install
chromium).
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
VECTORS = ROOT / "oracle" / "vectors"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium (apt-get install chromium)")
in_javascript = pytest.mark.skipif(not (NODE or CHROMIUM), reason="neither node nor Chromium")

LOAD = """
  const bytes = name => Uint8Array.from(atob(files[name]), ch => ch.charCodeAt(0));
  const said = name => new TextDecoder().decode(bytes(name));
  const model = new Llama(JSON.parse(said("config.json")),
    readSafetensors(bytes("model.safetensors").buffer));
"""


def look(folder, page, script, address=""):
    """What `script` returns once a page is open in Chromium; a fault of either leaves the title as
    it was, which is no JSON. Time is the browser's own: nobody waits for it."""
    told = f"(async () => {{{script}}})().then(x => {{document.title = JSON.stringify(x); " \
           "document.querySelectorAll('script').forEach(each => each.remove())})"
    (folder / "look.html").write_text(f"{page}<script>{told}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={folder}/chrome", "--virtual-time-budget=999999", "--dump-dom"]
    p = subprocess.run([CHROMIUM, *flags, f"file://{folder}/look.html{address}"],
                       check=False, capture_output=True, text=True, timeout=600)
    assert "CONSOLE" not in p.stderr, p.stderr[-2000:]
    return json.loads(html.unescape(re.search("(?s)<title>(.*?)</title>", p.stdout)[1]))


def run(folder, script, model=ROOT / "demo"):
    """What `script` returns, with the engine and the files of a model."""
    files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in model.iterdir()
             if path.suffix in (".json", ".safetensors", ".model")}
    engine = (ROOT / "page/engine.js").read_text(encoding="utf-8")
    body = f"{engine}\nconst files = {json.dumps(files)};\n"
    if not NODE:
        return look(folder, f"<title></title><script>{body}</script>", LOAD + script)
    told = f"console.log(JSON.stringify((() => {{{LOAD}{script}}})()))"
    p = subprocess.run([NODE, "-"], input=body + told, check=False, capture_output=True,
                       text=True, timeout=600)
    assert p.returncode == 0, p.stderr[-2000:]
    return json.loads(p.stdout)


@in_javascript
@pytest.mark.parametrize("name", ["forward", "forward-skip", "tiny-forward", "tiny-forward-skip"])
def test_the_engines_forward_pass_is_that_of_the_vectors(name, tmp_path):
    """Rejects another rotary layout, grouping of heads, norm, mask or stretching, bfloat16 read
    wrongly, a skipped layer that writes, and other layers left out."""
    theirs = load_file(VECTORS / f"{name}.safetensors")
    ids = theirs["prompt_ids"].tolist()
    same = (theirs["hidden"][1:] == theirs["hidden"][:-1]).flatten(1).all(1).tolist()
    ours = run(tmp_path, f"""
      const cache = new Cache(model.cfg, {len(ids)});
      const h = model.forward({ids}, sequence(0, {len(ids)}), cache, {json.dumps(same)});
      const list = arrays => arrays.map(x => [...x]);
      return {{hidden: list(h), keys: list(cache.keys), values: list(cache.values),
        logits: list(model.head(h.at(-1)))}};""",
               ROOT / ("oracle/tiny" if "tiny" in name else "demo"))
    for part, x in ours.items():
        want = theirs[part].double()
        got = torch.tensor(x, dtype=torch.float64).view(want.shape)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), part


RUN = """
  const tokenizer = new Tokenizer(said("tokenizer.model"));
  const s = {temperature: T, N: 60, stop_ids: [tokenizer.bos + 1], K: 4, M: 26, seed: 5,
    exit_threshold: 0.1, interval: 4};
  const prompt = [tokenizer.bos, ...tokenizer.encode("import os\\n")];
  const rounds = [...generate(model, prompt, s, new Chance(seeded(s.seed)))];
  return traceOf(model.cfg, s, prompt, rounds, ABOUT);"""


@in_javascript
@pytest.mark.parametrize("T", [0, 1])
def test_the_checker_passes_a_trace_of_the_engine(T, tmp_path, capsys):
    """Greedy and sampled, with rejections and tables after them. Rejects whatever the checker
    rejects; and the engine with a wrong residual is caught, so that the test can fail."""
    about = json.dumps(json.loads((VECTORS / "greedy.jsonl").open().readline())["model"])
    script = RUN.replace("T,", f"{T},", 1).replace("ABOUT", about)
    (tmp_path / "right").write_text(run(tmp_path, script))
    assert check_trace.main([str(tmp_path / "right")]) == 0, capsys.readouterr().out
    lines = (tmp_path / "right").read_text().splitlines()
    assert sum('"residual"' in line for line in lines) > 3
    if T == 1:
        wrong = "residual = (p, q) => p;\n" + script
        (tmp_path / "wrong").write_text(run(tmp_path, wrong))
        assert check_trace.main([str(tmp_path / "wrong")]) == 1


@in_javascript
@pytest.mark.parametrize("name", ["greedy", "temperature", "stop-in-draft", "tiny-temperature"])
def test_with_the_numbers_of_a_vector_the_engine_makes_its_run_again(name, tmp_path):
    """Rejects numbers taken in another order, tokens behind a rejection judged, another edge of a
    draw, and text behind a stop token. (Tables are the checker's: rounding may decide a tie.)"""
    text = (VECTORS / f"{name}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    ours = run(tmp_path, f"""
      const [header, ...lines] = {json.dumps(lines)};
      const s = header.settings;
      const policy = new Recorded(s, model.cfg.L, lines);
      const chance = new Chance(policy.uniform);
      const rounds = [...generate(model, header.prompt_ids, s, chance, policy)];
      return rounds.flatMap(events);""", ROOT / ("oracle/tiny" if "tiny" in name else "demo"))
    theirs = [line for line in lines[1:-1] if line["event"] != "times"]
    for got, want in zip(ours, theirs, strict=True):
        for name in want.keys() - {"D", "skipped"} - ({"skip"} if "D" in want else set()):
            near = pytest.approx(want[name], abs=2e-5) if type(want[name]) is float else want[name]
            assert got[name] == near, (want["event"], want["round"], name)


@in_javascript
def test_at_its_edge_a_number_draws_and_judges_as_here(tmp_path):
    """Rejects a token of no probability drawn or accepted at u = 0, >= for >, and a residual of no
    mass that is no number."""
    assert run(tmp_path, """
      const always = u => new Chance(() => u);
      return [always(0).draw([0, .5, .5]), always(.5).draw([0, .5, .5]), always(0).accept(0),
        always(.5).accept(.5), residual([.5, .5], [.5, .5])];""") == [1, 2, False, False, [.5, .5]]


TEXTS = ["def f(x):\n    return 'it''s'", "I'VE they'll 12345", "  \n\n \t x\r\n",
         "naïve ſ's 東京 🙂", "\u0085\ufeff\u00a0 x", "<|end_of_text|>", "", "—…“quoted”"]


@in_javascript
def test_the_engine_reads_text_as_the_tokenizer_does(tmp_path):
    """Rejects another way to split or to merge, a special token that a text can spell, and a
    character lost at the border of tokens."""
    tok = Tokenizer(ROOT / "demo")
    texts = TEXTS + [json.loads(line)["turns"][0] for line in
                     (ROOT / "demo/prompts.jsonl").read_text("utf-8").splitlines()]
    told = run(tmp_path, f"""
      const tokenizer = new Tokenizer(said("tokenizer.model"));
      return {json.dumps(texts)}.map(text => {{
        const ids = tokenizer.encode(text);
        return [ids, tokenizer.pieces(ids).join("")];
      }});""")
    assert told == [[tok.encode(text), text] for text in texts]


# The scenes, opened one after another on one run; what is read is what stands there.
WALK = """
  const wait = async until => {
    do await new Promise(done => setTimeout(done, 50)); while (!until());
  };
  const open = async (address, until = () => true) => {
    location.hash = address;
    await wait(() => run.whole && ![...run.known.values()].includes(undefined) && until());
    show();
  };
  const fields = () => Object.fromEntries([...document.querySelectorAll("#stage [data-field]")]
    .map(x => [x.dataset.field, x.value ?? x.dataset.id ?? x.textContent]));
  await wait(() => run?.whole);
  const told = {trace: traceOf(model.cfg, run.s, run.prompt, run.rounds, about), watch: fields()};
  const base = location.hash;
  const at_ = more => `${base}&${more}`;
"""
SCENES = WALK + """
  told.tokens = [];
  for (const r of run.rounds)
    for (const step of fates(r).keys()) {
      await open(at_(`scene=1&round=${r.n}&step=${step}`));
      told.tokens.push([r.n, step, fields()]);
    }
  await open(at_("scene=2&off=2,3,4,9,20"));
  await open(at_("scene=2&off=2,3,4,9,20"));
  const its = run.known.get("passage");
  told.shares = [...document.querySelectorAll("#stage .n data")].map(x => x.value);
  told.passage = [its.ids, its.from, its.size];
  told.program = indices(program(its, 5));
  told.cells = [];
  for (const cell of ["32,22", "32,5", "17,9", "3,3", "1,0"]) {
    await open(at_(`scene=3&round=9999&step=33&cell=${cell}`));
    told.cells.push([cell, fields()]);
  }
  await open(at_("scene=4"), () => talk.rounds.length && !talk.busy);
  told.talk = [fields(), talk.rounds.map(r =>
    ({part: r.part, chosen: !!r.choice, kept: r.accepted}))];
  await open(at_("scene=5"));
  told.prices = lists();
  told.speeds = [...document.querySelectorAll("#stage tr")].slice(1, 4).map(tr =>
    [...tr.querySelectorAll("data")].map(x => Number(x.value)));
  told.points = [...run.known].filter(x => x[0].startsWith("share ")).map(([name, x]) =>
    [name.slice(6).split(",").length, x]);
  const [p, q] = [[.5, .25, .15, .07, .03], [.2, .4, .15, .05, .2]];
  told.samplers = Object.values(SAMPLERS).map(make => [...outcome(make(p, q))]);
  await open(at_("scene=6"));
  $("draw1000").click();
  told.exam = [$("seen").textContent, document.querySelectorAll("td.far").length];
  return told;"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return look(tmp_path_factory.mktemp("page"), whole(), SCENES,
                "#N=40&K=5&T=1&x=0&seed=4&I=3")


@in_a_browser
def test_the_numbers_of_the_run_are_those_of_its_trace(told, tmp_path, capsys):
    """Watch, guess and check, and the table. Rejects another token's p, q, u or verdict, the u of
    the draw for the verdict's, a cell that shows the way not taken as taken, drafts that cost
    nothing, choices that are not counted; and a page whose trace the checker does not pass."""
    (tmp_path / "t").write_text(told["trace"])
    assert check_trace.main([str(tmp_path / "t")]) == 0, capsys.readouterr().out
    lines = [json.loads(line) for line in told["trace"].splitlines()]
    by = {(x["event"], x.get("round"), x.get("step")): x for x in lines}
    drafts = [x for x in lines if x["event"] == "draft"]
    tables = [x for x in lines if x["event"] == "optimise"]
    rounds = [x for x in lines if x["event"] == "round" and x["round"] > 0]
    cost = sum(1 - len(by["round", x["round"], None]["skip"]) / 32 for x in drafts)
    kept = sum(x.get("accepted") is True for x in lines)
    watch = {name: float(value) for name, value in told["watch"].items()}
    assert (watch["kept"], watch["drafted"]) == (kept, len(drafts)) and kept < len(drafts) > 20
    assert watch["per pass"] == pytest.approx(39 / len(rounds))
    assert watch["saved"] == pytest.approx(39 - cost - len(rounds) - len(tables))
    for n, step, shown in told["tokens"]:
        own = ("draft", n, step) not in by
        line = by["own", n, None] if own else by["verify", n, step]
        want = {k: line[k] for k in (("token", "probability") if own else ("token", "p", "q", "a"))}
        assert {k: float(shown[k]) for k in want} == pytest.approx(want), (n, step)
        verdict = {True: "kept", False: "rejected", None: "not judged"}
        assert shown["kind" if own else "verdict"] == (
            line["kind"] if own else verdict[line["accepted"]])
        last = line["u"] if own or line["u"] is not None else by["draft", n, step]["u"]
        assert float(shown["u"]) == last                # of two scales the lower one's
    for cell, shown in told["cells"]:
        i, j = map(int, cell.split(","))
        D = tables[-1]["D"][i][j]
        assert float(shown["D"]) == D
        assert float(shown["skip" if tables[-1]["skipped"][i][j] == "1" else "run"]) == D


@in_a_browser
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
        may_read = (cache.slot < position[:, None]) | (cache.slot == slots[:, None])
        rows = cache.rows(position, slots, may_read)
        for off, x in (([2, 3, 4, 9, 20], told["shares"][0]), (told["program"], told["shares"][1])):
            skip = [i in off for i in range(32)]
            q = model.head(model.forward(some, rows, cache, skip)[-1]).softmax(-1)
            assert float(x) == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), abs=1e-4)


@in_a_browser
def test_prices_samplers_and_sets_are_what_they_are_called(told):
    """Context, prices, the exam: rejects a price list that is not that of its source, a curve by
    another formula, a set called new that is the old one, and a fault that is another one."""
    costs = json.loads((ROOT / "demo/clasp.json").read_text())["costs"]
    laptop, gpu = told["prices"]["PyTorch on a laptop"], told["prices"]["a GPU, by an estimate"]
    assert [x for _, x in laptop["draft"]] == costs["draft"]
    assert laptop["choice"] == costs["optimise"]
    assert dict(map(tuple, laptop["verify"]))[6] == costs["verify"][6]
    readme = (ROOT / "gpu/README.md").read_text("utf-8")
    plain, draft, verify, choice = (float(re.search(
        rf"(?m)^\| {name}[^|]*\| [\d.]+ \| ([\d.]+)", readme)[1])
        for name in ("plain step", "draft, 22 left out", "verify of 13 rows", "choice, M = 22"))
    assert gpu == dict(draft=[[0, 1], [22, draft / plain]], verify=[[1, 1], [13, verify / plain]],
                       choice=choice / plain)
    speeds = told["speeds"]
    assert speeds[0][:3] == pytest.approx([1 - 22 / 32, 1, 1])
    assert speeds[1][::2][:2] == pytest.approx([draft / plain, choice / plain])
    assert speeds[2][:3] == pytest.approx([costs["draft"][22], costs["verify"][6],
                                           costs["optimise"]])
    counted = [sum(x ** n for n in range(6)) / (5 * (1 - M / 32) + 1 + 1 / 3)
               for M, x in told["points"] if M % 2 == 0]
    assert speeds[0][3] == pytest.approx(max(counted), rel=1e-6)
    shown, rounds = told["talk"]
    old = []                                           # until, of a part, layers are chosen
    for part in (1, 2):
        its = [r for r in rounds if r["part"] == part]
        chosen = [n for n, r in enumerate(its) if r["chosen"]] or [len(its)]
        old += [r["kept"] for r in its[:chosen[0] + 1]]
    assert int(shown["kept after a change, by the old set"]) == sum(old) > 0
    p, q = torch.tensor([[.50, .25, .15, .07, .03], [.20, .40, .15, .05, .20]]).double()
    a, owed, most = acceptance(p, q), residual(p, q), torch.eye(5).double()[1]
    for (drafts, kept, own), ours in zip(((q, a, owed), (q, a, p), (q, a, (p - q).softmax(0)),
                                       (most, a, owed), (q, acceptance(1.3 * p, q), owed)),
                                      told["samplers"], strict=True):
        want = drafts * kept + (drafts * (1 - kept)).sum() * own
        assert ours == pytest.approx(want.tolist())
    assert told["exam"][0].startswith("1000 draws") and told["exam"][1] > 3


@in_a_browser
def test_keys_links_traces_and_texts_that_look_like_markup(tmp_path):
    """Rejects a key without effect or with another's, keys that a clicked button keeps, an end that
    wraps round, a recorded run that is shown as another, and a text that becomes markup."""
    vector = (VECTORS / "temperature.jsonl").read_text()
    hostile = "%3Cimg+src=x+onerror='hacked=1'%3E%E2%80%AEx"
    told = look(tmp_path, whole(), WALK + f"""
      const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown",
        {{key, bubbles: true}}));
      const where = [];
      for (const key of ["#scene=3&round=3&step=2", "ArrowRight", "ArrowUp", "ArrowLeft", "Home",
                         "ArrowLeft", "ArrowDown", "End", "ArrowRight", "click", "ArrowLeft", "1",
                         " "]) {{
        if (key === " ") document.activeElement.blur();        // else it presses the button
        if (key[0] === "#") location.hash = base + "&" + key.slice(1);
        else if (key === "click") {{ $("back").focus(); $("back").click(); }}
        else press(key);
        await new Promise(done => setTimeout(done, key === " " ? 1500 : 100));
        where.push(`${{at().scene}} ${{$("where").textContent}}`);
      }}
      press(" ");
      await open(base + "&scene=0");
      const safe = [typeof hacked, document.querySelectorAll("img").length,
        document.querySelector(".words").textContent.split("\\\\u{{202e}}").length];
      await openTrace(new File([{json.dumps(vector)}], "x"));
      return [where, safe, run.rounds.map(r => r.emitted), $("fault").hidden];""",
                f"#N=30&K=4&I=3&prompt={hostile}")
    where, safe, emitted, hidden = told
    assert where[:6] == ["3 round 3, step 2", "3 round 3, step 3", "3 round 0, step 0",
                         "3 round 0, step 0", "3 round 0, step 0", "3 round 0, step 0"]
    assert where[6] == "3 round 3, step 0" and where[7] == where[8]
    assert len({*where[8:11]}) == 3                    # the end, a click, a key
    assert where[11].startswith("1 ") and where[12] != where[11]
    assert safe == ["undefined", 0, 2] and hidden
    assert emitted == [json.loads(x)["tokens"] for x in vector.splitlines() if '"emit"' in x]
