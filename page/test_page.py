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

from llama import torch
from oracle import check_trace
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


def look(folder, page, script):
    """What `script` returns once a page is open in Chromium; a fault of either leaves the title as
    it was, which is no JSON. Time is the browser's own: nobody waits for it."""
    told = f"(async () => {{{script}}})().then(x => {{document.title = JSON.stringify(x); " \
           "document.querySelectorAll('script').forEach(each => each.remove())})"
    (folder / "look.html").write_text(f"{page}<script>{told}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/chrome",
             "--virtual-time-budget=999999", "--timeout=600000", "--dump-dom"]
    p = subprocess.run([CHROMIUM, *flags, f"file://{folder}/look.html"], capture_output=True,
                       text=True, timeout=600)
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
    p = subprocess.run([NODE, "-"], input=body + told, capture_output=True, text=True, timeout=600)
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
    draw, and text behind a stop token."""
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
        exact = {k: v for k, v in want.items() if type(v) is not float and k != "D"}
        assert exact.items() <= got.items()
        assert all(got[k] == pytest.approx(want[k], abs=2e-5) for k in want.keys() - exact.keys()
                   if k != "D")


@in_javascript
def test_at_its_edge_a_number_draws_and_judges_as_here(tmp_path):
    """Rejects a token of no probability drawn or accepted at u = 0, >= for >, and a residual of no
    mass that is no number."""
    assert run(tmp_path, """
      const always = u => new Chance(() => u);
      return [always(0).draw([0, .5, .5]), always(.5).draw([0, .5, .5]), always(0).accept(0),
        always(.5).accept(.5), residual([.5, .5], [.5, .5])];""") == [1, 2, False, False, [.5, .5]]


TEXTS = ["def f(x):\n    return 'it''s'", "I'VE they'll 12345", "  \n\n \t x\r\n", "naïve ſ's 東京 🙂",
         "\u0085\ufeff\u00a0 x", "<|end_of_text|>", "", "—…“quoted”"]


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
