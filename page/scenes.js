"use strict";
// The scenes of the page: each asks one question and says what was seen. Every number is made here
// and now by engine.js. Nothing of a text becomes markup: texts are text nodes and attributes.

const $ = id => document.getElementById(id);
const build = (node, props, kids) => {
  for (const [name, value] of Object.entries(props))
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...kids.flat(9));
  return node;
};
const h = (tag, props, ...kids) => build(document.createElement(tag), props, kids);
const v = (tag, props, ...kids) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), props, kids);
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const sum = list => list.reduce((a, b) => a + b, 0);
const pause = () => new Promise(done => setTimeout(done));
const short = x => x === 0 || x === 1 ? `${x}` : Math.abs(x) < 1e-4 ? x.toExponential(1) :
  `${Number(x.toPrecision(4))}`;
const num = (x, field) => x === undefined ? "…" :
  h("data", {value: x, title: x, "data-field": field ?? false}, short(x));

// ------------------------------------------------------------------------- the address and the run

// Numbers that the form has, their names in Settings, and what they are if the address is silent.
const NAMES = {T: "temperature", K: "K", M: "M", x: "exit_threshold", I: "interval", N: "N",
  seed: "seed"};
const DEFAULTS = {T: 0.6, K: 8, M: 22, x: 0.3, I: 8, N: 96, seed: 1};      // and prompt
const NOWHERE = {round: undefined, step: undefined, cell: undefined};
let model, tokenizer, costs, about;                    // of the demo's files
let run = null;                                        // {key, s, prompt, rounds, whole, known}

const at = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const link = changes => "#" + new URLSearchParams(Object.entries({...at(), ...changes})
  .filter(([name, x]) => x !== undefined && `${x}` !== `${DEFAULTS[name]}`));
const go = changes => location.replace(link(changes));
const skipOf = list => Array.from({length: model.cfg.L}, (_, i) => list.includes(i));

function settings() {
  const s = {stop_ids: [tokenizer.bos + 1]};
  for (const [id, name] of Object.entries(NAMES)) {
    const {min, max} = $(id);
    const x = clamp(Number(at()[id] ?? DEFAULTS[id]) || 0, Number(min), Number(max));
    s[name] = id === "T" || id === "x" ? x : Math.trunc(x);
  }
  return s;
}

// The run that the address asks for, unless it is there already.
function follow() {
  const s = settings();
  const text = at().prompt ?? DEFAULTS.prompt;
  const key = JSON.stringify([s, text]);
  $("fault").hidden = true;
  if (run?.key === key) return show();
  const prompt = [tokenizer.bos, ...tokenizer.encode(text)];
  if (prompt.length + s.N > model.cfg.context)
    throw new Error(`${prompt.length} tokens and N more: ${model.cfg.context} is what the model reads`);
  return grow({key, s, prompt}, new Chance(seeded(s.seed)));
}

// It grows round by round, unless another takes its place.
async function grow(its, chance, policy) {
  const mine = run = {...its, rounds: [], whole: false, known: new Map()};
  for (const [id, name] of Object.entries(NAMES)) $(id).value = run.s[name] ?? "";
  $("prompt").value = tokenizer.pieces(run.prompt).join("");
  for (const r of generate(model, run.prompt, run.s, chance, policy)) {
    await pause();
    if (run !== mine) return;
    run.rounds.push(r);
    run.ids = [...run.prompt, ...run.rounds.flatMap(each => each.emitted)];
    run.pieces = tokenizer.pieces(run.ids);
    run.whole = r.done;
    show();
  }
}

// What a task makes of this run, by name; undefined while it is being made, one at a time.
let queue = Promise.resolve();
function known(name, task) {
  const its = run;
  if (!its.known.has(name)) {
    its.known.set(name, undefined);
    queue = queue.then(pause).then(() => {
      if (run !== its) return;
      its.known.set(name, task());
      show();
    }).catch(fault);
  }
  return its.known.get(name);
}

// ---------------------------------------------------------------------------------- small pictures

// Format characters could turn the page's own text around; joiners belong to their letters.
const escaped = text => text.replace(/(?![\n\t\u200c\u200d])[\p{C}\p{Zl}\p{Zp}]/gu,
  c => `\\u{${c.codePointAt(0).toString(16)}}`);
const spelled = id => {
  const bytes = [...tokenizer.bytes(id)];
  const text = tokenizer.pieces([id])[0];
  if (!bytes.length) return `[${id}]`;
  if (!text || text.includes("\ufffd")) return bytes.map(b => `\\x${b.toString(16)}`).join("");
  return escaped(text).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
};
const tok = (id, field) => h("span", {class: "tok", title: `token ${id}`, "data-id": id,
  "data-field": field ?? false}, spelled(id));

const FATES = {prompt: "the beginning", kept: "drafted and kept", rejected: "drafted and rejected",
  behind: "drafted behind it, not judged", own: "the full model's own"};
const SIGNS = {kept: "●", rejected: "×", behind: "·", own: "◻"};

// What became of each token of a round, in the order of the text.
function fates(r) {
  const drafted = r.drafted.map((id, i) => ({id, at: r.start + i,
    fate: i < r.accepted ? "kept" : i === r.accepted ? "rejected" : "behind"}));
  const own = {id: r.own, at: r.start + r.accepted, fate: "own"};
  return r.emitted.length > r.accepted ? [...drafted, own] : drafted;
}

function words(last, [n, step] = []) {                 // the text up to a round
  const one = r => fates(r).map(({id, fate, at: place}, i) => {
    const text = fate === "kept" || fate === "own" ? escaped(run.pieces[place]) : spelled(id);
    const here = r.n === n && i === step ? " here" : "";
    return [h("a", {class: fate + here, href: link({scene: 1, round: r.n, step: i}), tabindex: -1,
      title: FATES[fate], "data-id": id}, text.replaceAll("\n", "↵\n").replace(/\n$/, "")),
    text.endsWith("\n") ? "\n" : ""];
  });
  const prompt = run.pieces.slice(0, run.prompt.length).map(escaped).join("");
  return [h("div", {class: "words", "data-pane": "words"}, h("span", {class: "prompt"}, prompt),
    run.rounds.slice(0, last + 1).map(one)), h("div", {class: "legend"},
    Object.entries(FATES).map(([fate, said]) => h("span", {class: fate}, said)))];
}

// list: [label or id, value, ..], a value for each name; what two have in common is hatched.
function bars(list, names, marked) {
  const full = Math.max(...list.flatMap(([, ...values]) => values), 1e-9);
  const wide = part => `width: ${clamp(part, 0, 1) * 100}%`;
  return h("div", {class: "bars"}, list.map(([label, ...values]) => {
    const common = names.length > 1 ? Math.min(...values) : 0;
    return [h("div", {class: label === marked ? "name it" : "name"},
      typeof label === "number" ? tok(label) : label),
    h("div", {}, values.map((x, i) => h("div", {class: `bar ${names[i]}`, style: wide(x / full)},
      h("i", {style: wide(common / x || 0)})))),
    h("div", {class: "n"}, values.map((x, i) => h("div", {}, `${names[i]} `, num(x))))];
  }));
}

// The six likeliest tokens of both, and `also`.
function likeliest(p, q, also) {
  const most = i => Math.max(p[i], q[i]);
  const order = [...p.keys()].filter(i => most(i) > 0.002).sort((a, b) => most(b) - most(a));
  return [...new Set([...order.slice(0, 6), also])];
}

// A uniform number, and the part of 0 .. 1 that says yes.
function scale(u, from, to, said) {
  const side = u < 0.1 ? "left" : u > 0.9 ? "right" : "";
  return h("div", {role: "img", "aria-label": `u = ${short(u)}; ${said}`},
    h("div", {class: "scale"}, h("i", {style: `left: ${from * 100}%; right: ${100 - to * 100}%`}),
      h("b", {class: side, style: `left: ${u * 100}%`}, "u = ", num(u, "u"))),
    h("div", {class: "ends"}, h("small", {}, "0"), h("small", {}, said), h("small", {}, "1")));
}

const layers = (skip, click) => h("div", {class: "layers"}, skip.map((out, i) =>
  h(click ? "button" : "span", {id: `layer${i}`, class: out ? "out" : "",
    "aria-pressed": click ? `${out}` : false, click: () => click?.(i),
    "aria-label": `layer ${i}, ${out ? "left out" : "run"}`}, i)));

const numbered = list => h("section", {}, h("dl", {class: "numbers"}, list.map(([said, ...x]) =>
  h("div", {}, h("dt", {}, said), h("dd", {}, x)))));
const dim = (...said) => h("p", {class: "dim"}, said);
const pane = (name, ...kids) => h("div", {class: "scroll", "data-pane": name}, kids);
const drawing = (said, props, ...kids) =>
  v("svg", {role: "img", "aria-label": said, ...props}, kids);
const path = points => points.map(([x, y], n) => `${n ? "L" : "M"}${x} ${y}`).join("");

// -------------------------------------------------------------------------------- what passes cost

// In plain steps: a draft step without j layers and a verify of T rows, as points [j or T, cost] of
// straight lines, and a choice of layers. The GPU's are milliseconds of gpu/README.md, an estimate.
const GPU = {draft: [[0, 1], [22, 2.6 / 6.6]], verify: [[1, 1], [13, 7.8 / 6.6]],
  choice: 8.3 / 6.6};
const costOf = (points, x) => {
  const beyond = points.findIndex(([to]) => to >= x);
  const n = beyond < 0 ? points.length - 1 : Math.max(1, beyond);
  const [[x0, y0], [x1, y1]] = [points[n - 1], points[n]];
  return y0 + (y1 - y0) * (x - x0) / (x1 - x0);
};
const counted = () => ({draft: [[0, 1], [model.cfg.L, 0]], verify: [[1, 1], [13, 1]], choice: 1});
const lists = () => ({"layers counted": counted(), "a GPU, by an estimate": GPU,
  "PyTorch on a laptop": {draft: [...costs.draft.entries()], choice: costs.optimise,
    verify: [...costs.verify.entries()].slice(1)},
  "this browser, now": known("prices", measure)});

function measure() {
  const {L, D} = model.cfg;
  const t = 100;
  const cache = new Cache(model.cfg, t + L);
  const pass = (rows, skip) =>
    model.head(model.forward(rows.map(() => 5), rows, cache, skip).at(-1));
  const states = split(new Float32Array(D * (L + 1)).fill(1), D);
  const time = task => Math.min(...[1, 2, 3].map(() => {
    const began = performance.now();
    task();
    return Math.max(0.01, performance.now() - began);  // coarse clocks may say 0
  }));
  const step = time(() => pass(sequence(t, 1)));
  const draft = [0, 22].map(j =>
    [j, time(() => pass(sequence(t, 1), skipOf([...Array(j).keys()]))) / step]);
  const verify = [1, 5, 9, 13].map(T => [T, time(() => pass(sequence(t, T))) / step]);
  const choice = time(() => new Paper({M: 22}, L).optimise(model, cache, t, states)) / step;
  return {seconds: step / 1000, draft, verify, choice};
}

function account(rounds, price) {                      // after the prefill, in plain steps
  const later = rounds.slice(1);
  const drafts = later.map(r =>
    r.drafted.length * costOf(price.draft, indices(r.skip).length));
  const verifies = later.map(r => costOf(price.verify, r.drafted.length + 1));
  const choices = rounds.map(r => r.choice ? price.choice : 0);
  return {tokens: sum(later.map(r => r.emitted.length)), passes: later.length,
    drafted: sum(later.map(r => r.drafted.length)), kept: sum(later.map(r => r.accepted)),
    spent: sum([...drafts, ...verifies, ...choices]), drafts, verifies, choices};
}

// -------------------------------------------------------------------------------------- the scenes

// Of each: its name, its question, what is to be done; `places`, the rounds and steps that it can
// show; `view`, what was seen at one of them, and what is to be seen there.

const watch = {
  name: "Watch",
  question: "Can a model guess its own next words with two thirds of itself missing?",
  todo: "Write a beginning, press Run, and watch what becomes of the guesses.",
  places: () => run.rounds.map(r => [r.n, 0]),
  view(n) {
    const a = account(run.rounds.slice(0, n + 1), counted());
    return [`Without ${run.s.M} of its ${model.cfg.L} layers it guessed ${a.drafted} tokens:
      ${a.kept} were kept, and ${a.passes} full passes made ${a.tokens} tokens. No guess has changed what
      the full model would say, or how often.`,
    h("section", {}, words(n)),
    numbered([["drafted tokens kept", num(a.kept, "kept"), " of ", num(a.drafted, "drafted")],
      ["tokens per full pass", num(a.passes ? a.tokens / a.passes : 0, "per pass")],
      ["plain steps saved", num(a.tokens - a.spent, "saved")]]),
    h("section", {}, lanes(a)),
    h("section", {class: "controls"},
      h("button", {id: "save", click: save, disabled: !run.whole}, "Save this run as a trace"),
      h("label", {}, "Show a trace of the demo (or drop it here)", h("input", {id: "open",
        type: "file", change: e => openTrace(e.target.files[0]).catch(fault)})))];
  },
};

function lanes(a) {
  const all = Math.max(a.tokens, a.spent, 1);
  const lane = blocks => {
    let x = 0;
    return drawing(`${short(sum(blocks.map(([, wide]) => wide)))} plain steps`, {class: "lane",
      viewBox: `0 0 ${all} 1`, preserveAspectRatio: "none"}, blocks.map(([kind, wide]) => {
      x += wide;
      return v("rect", {class: kind, x: x - wide, width: Math.max(0, wide - all / 900), height: 1});
    }));
  };
  const ours = a.drafts.flatMap((draft, n) =>
    [["draft", draft], ["verify", a.verifies[n]], ["choose", a.choices[n + 1]]]);
  return [h("h3", {}, "Plain decoding: ", num(a.tokens), " tokens, a full pass each"),
    lane(Array(a.tokens).fill(["verify", 1])),
    h("h3", {}, "CLaSp: ", num(a.spent, "spent"), " plain steps for as many tokens"),
    lane([["choose", a.choices[0] ?? 0], ...ours]),
    dim(`Orange: drafting. Blue: a full pass. Green: choosing layers. Drawn to scale by the layers
      that are read: a pass over one token or over nine reads every weight once. Whether a machine's
      time goes so, scene 5 asks.`)];
}

const guessAndCheck = {
  name: "Guess and check",
  question: "Which guesses are kept, and why is the text still the full model's?",
  todo: "Click a token of the text, or step with ← and →. Then change K, temperature, threshold.",
  places: () => run.rounds.flatMap(r => fates(r).map((_, step) => [r.n, step])),
  start: () => guessAndCheck.places().findIndex(([n, step]) =>
    run.rounds[n].kind === "residual" && step === run.rounds[n].accepted),
  view(n, step) {
    const r = run.rounds[n];
    const [seen, ...shown] = step < r.drafted.length ? guess(r, step) : own(r);
    return [seen, h("div", {class: "two"}, h("section", {}, words(run.rounds.length, [n, step])),
      h("section", {}, shown))];
  },
};

function guess(r, i) {
  const [token, p, q, draw, verdict] = [r.drafted[i], r.p[i], r.q[i], r.draws[i], r.verdicts[i]];
  const a = acceptance(p[token], q[token]);
  const [word, said] = !verdict ? ["not judged", "a token before it was rejected."] :
    verdict.accepted ? ["kept", `u is below a = min(1, p/q) = ${short(a)}.`] :
      ["rejected", `u is not below a = p/q = ${short(a)}. What stands behind it is not judged.`];
  return [`Guess ${i + 1} of round ${r.n} is ${word}: ${said}`,
    h("h3", {}, "Guess ", i + 1, " of round ", r.n, ": ", tok(token, "token")),
    bars(likeliest(p, q, token).map(id => [id, q[id], p[id]]), ["q", "p"], token),
    h("small", {}, h("span", {class: "key q"}), "q, the draft ", h("span", {class: "key p"}),
      "p, the full model ", h("span", {class: "key cut"}), "min(p, q), paid by drafting"),
    h("h3", {}, "The draft draws from q"),
    scale(draw.u, draw.from, draw.to, "hatched: this token's part of q"),
    verdict ? [h("h3", {}, "The full model judges"),
      scale(verdict.u, 0, a, "hatched: u < a, kept")] : "",
    h("p", {}, "a = min(1, ", num(p[token], "p"), " / ", num(q[token], "q"), ") = ", num(a, "a"),
      ": ", h("b", {"data-field": "verdict"}, word)),
    dim("Whatever is drafted from this q is kept with probability ∑ min(p, q) = ",
      num(overlap(p, q), "overlap"))];
}

function own(r) {
  const [k, draw] = [r.accepted, r.draws.at(-1)];
  const [name, dist] = r.kind === "residual" ? ["owed", residual(r.p[k], r.q[k])] : ["p", r.p[k]];
  const why = {residual: `After a rejection the full model draws from norm(max(0, p - q)), what is
      still owed. With min(p, q), which drafting has paid, that makes p, whatever q was.`,
  bonus: "All guesses were kept, and the full pass has said already what follows: one more from p.",
  plain: "Nothing was drafted, so the token is drawn from p, as in plain decoding."}[r.kind];
  return [why, h("h3", {}, "The full model's own: ", tok(r.own, "token")),
    bars(likeliest(dist, dist, r.own).map(id => [id, dist[id]]), [name], r.own),
    scale(draw.u, draw.from, draw.to, "hatched: this token's part"),
    h("p", {}, h("b", {"data-field": "kind"}, r.kind), ", probability ",
      num(draw.probability, "probability"))];
}

// The last 64 tokens of the run, each as the first of a draft, and the program's sets for every
// number of layers, chosen by the token before them.
function passage() {
  const {L, D} = model.cfg;
  const ids = run.ids;
  const size = Math.min(64, ids.length - 2);
  const from = ids.length - 1 - size;
  const cache = new Cache(model.cfg, ids.length + Math.max(size, L));
  const before = model.forward(ids.slice(0, from), sequence(0, from), cache);
  const choice = new Paper({M: L - 4}, L)
    .optimise(model, cache, from - 1, before.map(x => x.subarray(-D)));
  const states = model.forward(ids.slice(from), sequence(from, size + 1), cache);
  const p = model.head(states.at(-1)).slice(0, size).map(x => probabilities(x, run.s));
  return {ids, from, size, cache, p, choice, best: new Map()};
}

const program = (its, j) => its.choice.back(model.cfg.L, Math.min(j, its.choice.M)).skip;

// The share of what a draft says that would be kept; the best of each number of layers is kept too.
function share(its, skip) {
  return known(`share ${indices(skip)}`, () => {
    const x = agreement(model, its.cache, its.ids, its.from, skip, its.p, run.s);
    const j = indices(skip).length;
    if (!(its.best.get(j)?.x >= x)) its.best.set(j, {x, skip});
    return x;
  });
}

function randomSets(j) {
  const uniform = seeded(j);
  return Array.from({length: 6}, () => {
    const order = skipOf([]).map((_, i) => [uniform(), i]).sort((a, b) => a[0] - b[0]);
    return skipOf(order.slice(0, j).map(([, i]) => i));
  });
}

const leaveOut = {
  name: "Leave out",
  question: "Which layers would you leave out?",
  todo: "Switch layers off, as many as you can, and keep the guesses good. Beat the program.",
  view() {
    const its = run.whole && known("passage", passage);
    if (!its) return ["Reading the text …"];
    const skip = skipOf((at().off ?? "").split(",").filter(Boolean).map(Number));
    const j = indices(skip).length;
    const set = flags => go({off: indices(flags).join(",") || undefined});
    const theirs = program(its, j || 22);
    const random = randomSets(j || 22).map(each => share(its, each));
    const J = indices(theirs).length;
    const rows = [["yours", share(its, skip)], [`the program's ${J}`, share(its, theirs)],
      [`${j || 22} at random, mean of 6`, random.includes(undefined) ? undefined : sum(random) / 6],
      ["one layer, the program's", share(its, program(its, 1))],
      [`the best known of ${j || 22}`, its.best.get(j || 22)?.x]];
    const [[, mine], [, others]] = rows;
    const beaten = j > 0 && j === J && mine > others;
    const button = (id, said, flags) => h("button", {id, click: () => set(flags)}, said);
    return [mine === undefined || others === undefined ? "The drafts are running …" :
      `Without your ${j} layers a draft keeps ${short(mine)} of its tokens, without the program's
      ${J} ${short(others)}.${beaten ? " You beat it: it looks at states, not at tokens." : ""}`,
    h("section", {}, layers(skip, i => set(skip.map((out, n) => n === i ? !out : out))),
      h("div", {class: "controls"}, button("none", "run all", skipOf([])),
        button("program", `the program's ${J}`, theirs),
        button("best", "the best known", its.best.get(j || 22)?.skip ?? skip))),
    h("section", {}, h("h3", {}, `Share of drafted tokens kept, over ${its.size} of the run`),
      bars(rows.map(([name, x]) => [name, x ?? 0]), ["share"], "yours")),
    dim("Filled layers run. Each token counts as the first of a draft: the mean of ∑ min(p, q).")];
  },
};

const theProgram = {
  name: "The program",
  question: "How does the program find them?",
  todo: "Press play to let the table grow; then click its cells.",
  // A row each, then the way back.
  places: () => run.rounds.filter(r => r.choice).flatMap(r =>
    Array.from({length: model.cfg.L + 2}, (_, step) => [r.n, step])),
  view(n, step) {
    const r = run.rounds[n];
    if (!r?.choice) return ["No layers were chosen: K or M is 0."];
    const [o, L, whole] = [r.choice, model.cfg.L, step > model.cfg.L];
    const last = Math.min(step, L);
    const [i, j] = (at().cell ?? "").split(",").map(Number);
    const cell = i <= last && j in o.D[i] ? [i, j] : [last, Math.min(last, o.M)];
    const skip = o.back().skip;
    const out = indices(skip).join(", ");
    return [whole ? `The way back from D[${L},${o.M}] = ${short(o.D[L][o.M])} leaves out ${out}.` :
      last === 0 ? "D[0,0] is the embedding: nothing was run yet, and nothing left out." :
        `Row ${last}: each cell has run layer ${last - 1} or skipped it, which comes nearer to
        h[${last}].`,
    h("section", {}, h("p", {}, "After round ", n, ", by the states h of the token ",
      tok(run.ids[r.position]), ` at position ${r.position}. D[i,j] is the best cosine with h[i]
      after the first i layers, j of them left out.`), bothWays(o, cell),
    pane("table", table(o, last, cell, whole)),
    dim(`The stronger a colour, the more nines the cosine has. A thin line leads to where the
      state came from: straight up, the layer was run; to the left, skipped. Thick: the way back.
      Dashed: that of your cell.`)),
    whole ? h("section", {}, h("h3", {}, "The set for the next drafts"), layers(skip),
      h("button", {id: "try", click: () => go({...NOWHERE, scene: 2, off: `${indices(skip)}`})},
        "Put it into the switches of scene 2")) : ""];
  },
};

function bothWays(o, [i, j]) {
  const way = (name, x, taken, said) => h("div", {class: taken ? "it" : ""}, said,
    x === -Infinity ? "not possible here" : num(x, name), taken ? ", taken" : "");
  const [run, skip] = o.ways[i][j];
  return h("div", {id: "cell", "aria-live": "polite"},
    h("b", {}, `D[${i},${j}] = `, num(o.D[i][j], "D")), i === 0 ? "" : [
      way("run", run, !o.skipped[i][j], `run layer ${i - 1} on g[${i - 1},${j}]: `),
      way("skip", skip, o.skipped[i][j], `skip it, from g[${i - 1},${j - 1}]: `)]);
}

function table(o, last, cell, whole) {
  const [W, H, L] = [30, 22, model.cfg.L];
  const [x, y] = [j => 30 + j * W, i => 18 + i * H];
  const line = cells => path(cells.map(([i, j]) => [x(j) + W / 2, y(i) + H / 2]));
  // Most cells are near 1, where a small difference should show: 0.9 is a quarter, 0.99 a half.
  const heat = c => Math.max(0, -Math.log10(Math.max(1e-4, 1 - c)) / 4);
  const rows = o.D.slice(0, last + 1);
  const left = o.back().skip;
  return drawing(`the table up to row ${last} of ${L}`, {width: x(o.M + 1) + 120, height: y(L + 1)},
    o.D[L].map((_, j) => v("text", {class: "soft", x: x(j) + 10, y: 12}, j)),
    rows.map((row, i) => [v("text", {class: "soft end", x: 24, y: y(i) + 15}, i),
      row.map((c, j) => [v("rect", {class: "heat", x: x(j) + 1, y: y(i) + 1, width: W - 2,
        height: H - 2, "fill-opacity": 0.04 + 0.86 * heat(c),
        click: () => go({cell: `${i},${j}`})}),
      i ? v("path", {class: "edge", d: line([[i, j], [i - 1, j - o.skipped[i][j]]])}) : ""]),
      whole && i ? v("text", {x: x(o.M + 1) + 6, y: y(i) + 15},
        `layer ${i - 1} ${left[i - 1] ? "left out" : "run"}`) : ""]),
    v("path", {class: "back", d: line(o.back(...cell).cells)}),
    whole ? v("path", {class: "way", d: line(o.back().cells)}) : "",
    v("rect", {class: "pick", x: x(cell[1]), y: y(cell[0]), width: W, height: H}));
}

// One text that is begun, continued, interrupted, continued, and interrupted again.
const talk = {rounds: [], busy: false, texts: [
  "import os\n\ndef find_files(root, suffix):\n    for name in os.listdir(root):\n",
  "\n\nThe server\n==========\n\nThe server waits for a connection and sends back what it has "
    + "received. ",
  "\n\n.. code::\n\n   import socket\n\ndef main():\n    server = socket.socket()\n"]};

async function interrupt() {
  const mine = talk.rounds = [];
  const s = {...run.s, N: 40, K: 6, M: 22, exit_threshold: 0, interval: 6, seed: 3};
  const chance = new Chance(seeded(s.seed));
  const text = [tokenizer.bos];
  let policy;
  talk.busy = true;
  for (const [part, said] of talk.texts.entries()) {
    text.push(...tokenizer.encode(said));
    const old = policy?.skip;
    policy = new Paper(s, model.cfg.L, old);
    for (const r of generate(model, [...text], s, chance, policy)) {
      await pause();
      if (talk.rounds !== mine) return;
      mine.push({...r, part, old: r.skip === old});
      text.push(...r.emitted);
      talk.busy = part < 2 || !r.done;
      show();
    }
  }
}

const inContext = {
  name: "Context",
  question: "Does the best set depend on the text?",
  todo: `Watch code that is interrupted by prose, and by code again. Layers are chosen after the
    beginning, then after every 6 verifications. Try other texts.`,
  places: () => talk.rounds.map((_, n) => [n, 0]),
  view(last) {
    if (!run.whole) return ["The first run has to end."];
    if (!talk.rounds.length && !talk.busy) interrupt().catch(fault);
    const rounds = talk.rounds.slice(0, last + 1);
    const later = rounds.filter(r => r.part > 0 && r.drafted.length);
    const [one, two] = [0, 1].map(part => talk.rounds.findLast(r => r.part === part)?.skip);
    const apart = two ? indices(one.map((out, i) => out && !two[i])).length : 0;
    const kept = (said, list) => [said, num(sum(list.map(r => r.accepted)), said), " of ",
      num(sum(list.map(r => r.drafted.length)))];
    const box = (said, n) => h("label", {}, said, h("textarea", {id: `text${n}`, rows: 4,
      maxlength: 800, spellcheck: "false", input: e => { talk.texts[n] = e.target.value; }},
    talk.texts[n]));
    return [talk.busy ? "Running …" : later.every(r => r.old) ?
      "The first set goes on, whatever the text is by now." : `The sets of the first two texts
      differ in ${apart} of 22 layers.${apart > 0 ? ` Just after a change of text the old set
      misses; then the program has seen the new one.` : ""}`,
    numbered([kept("kept after a change, by the old set", later.filter(r => r.old)),
      kept("kept by the set chosen since", later.filter(r => !r.old))]),
    h("section", {}, pane("map", map(rounds)), dim(`A row is a round, a cell a layer: the draft runs
      filled ones and leaves hollow ones out. ● kept, × rejected, · not judged, ◻ the full model's
      own. ◆ and a line: layers were chosen anew.`)),
    h("section", {}, box("a beginning", 0), box("what interrupts it", 1), box("and then", 2),
      h("button", {id: "again", click: () => interrupt().catch(fault)}, "Run"))];
  },
};

function map(rounds) {
  const [w, H, x0, L] = [innerWidth < 700 ? 7 : 11, 16, 46, model.cfg.L];
  const told = r => `round ${r.n}: ${r.accepted} of ${r.drafted.length} kept`;
  const size = {width: x0 + L * w + 70, height: rounds.length * H + 8};
  return drawing(rounds.map(told).join("; "), size,
    rounds.map((r, n) => {
      const cell = i => `M${x0 + i * w + 1} ${n * H + 3}h${w - 2}v${H - 6}h${2 - w}z`;
      const cells = wanted => r.skip.map((out, i) => out === wanted && r.n ? cell(i) : "").join("");
      return [v("text", {class: "soft end", x: 40, y: n * H + 13}, r.n || "read"),
        v("path", {class: "run", d: cells(false)}), v("path", {class: "hole", d: cells(true)}),
        v("text", {x: x0 + L * w + 8, y: n * H + 13}, fates(r).map(x => SIGNS[x.fate]).join("")),
        r.choice ? [v("path", {class: "way", d: `M${x0} ${n * H + H}h${L * w}`}),
          v("text", {class: "mark", x: 2, y: n * H + H + 4}, "◆")] : ""];
    }));
}

// If each of K drafted tokens is kept with probability `kept`: tokens per round, by its cost.
function speedUp(kept, K, M, price, interval) {
  const tokens = kept < 1 ? (1 - kept ** (K + 1)) / (1 - kept) : K + 1;
  const passes = K * costOf(price.draft, M) + costOf(price.verify, K + 1);
  return tokens / (passes + price.choice / interval);
}

const doesItPay = {
  name: "Does it pay?",
  question: "Does it pay?",
  todo: "First write down: where does it pay, and where not? Then choose what passes cost.",
  view() {
    const its = run.whole && known("passage", passage);
    if (!its) return ["Reading the text …"];
    const K = run.s.K || 8;
    const budgets = Array.from({length: its.choice.M / 2 + 1}, (_, n) => its.choice.M - 2 * n);
    const points = budgets.map(M => [M, share(its, program(its, M))])
      .filter(([, x]) => x !== undefined);
    const rows = Object.entries(lists()).filter(([, price]) => price).map(([name, price]) => {
      const curve = points.map(([M, x]) => [M, speedUp(x, K, M, price, run.s.interval)]);
      return {name, price, curve, best: curve.reduce((a, b) => b[1] > a[1] ? b : a, [0, 0])};
    });
    const one = rows.find(r => r.name === at().price) ?? rows[0];
    const here = known("prices", measure);
    const took = sum(run.rounds.map((r, n) => n ? sum(r.seconds) : r.seconds[2]));
    const plain = here?.seconds * account(run.rounds, one.price).tokens;
    const pays = one.best[1] > 1 ? "pays" : "does not pay";
    const cells = r => [costOf(r.price.draft, 22), costOf(r.price.verify, K + 1), r.price.choice,
      r.best[1], r.best[0]];
    return [`By the prices of "${one.name}" it ${pays}: ${short(one.best[1])} times as fast as plain
      decoding with the best M, ${one.best[0]}. ${here ? `In this browser the run took
      ${short(took)} s after its prefill, and as many plain steps take ${short(plain)} s.` : ""}`,
    h("section", {class: "controls"}, h("label", {}, "what passes cost",
      h("select", {id: "price", change: e => go({price: e.target.value})}, rows.map(r =>
        h("option", {selected: r === one}, r.name)))), h("label", {}, "K, drafted",
      h("input", {id: "k", type: "number", min: 1, max: 12, value: K,
        change: e => go({K: e.target.value})}))),
    h("section", {}, curves(rows, one, its.choice.M)),
    h("section", {}, pane("prices", h("table", {}, h("tr", {}, ["in plain steps", "draft, 22 out",
      `verify of ${K + 1}`, "choice", "best speed-up", "at M"].map(x => h("th", {}, x))),
    rows.map(r => h("tr", {class: r === one ? "chosen" : ""}, h("td", {}, r.name),
      cells(r).map(x => h("td", {}, num(x)))))))),
    dim(`The curve is tokens per round, if each of K guesses is kept with the share of scene 2
      for the program's M layers, by what K drafts, a verify and a part of a choice cost. Plain
      JavaScript computes row after row, so that a verify of nine tokens takes nearly nine steps; a
      GPU waits for its memory, and reads the weights once for all nine. (The run does not always
      draft K: it ends a draft behind a doubtful token.)`)];
  },
};

function curves(rows, one, most) {
  const [W, H] = [560, 260];
  const high = Math.max(1.5, ...rows.flatMap(r => r.curve.map(([, speed]) => speed))) * 1.1;
  const x = M => 40 + M / most * (W - 60);
  const y = speed => H - 25 - speed / high * (H - 40);
  const said = one.curve.map(([M, speed]) => `${short(speed)} at ${M}`).join(", ");
  return drawing(`speed-up by M: ${said}`, {viewBox: `0 0 ${W} ${H}`, width: W},
    v("path", {class: "hole", d: `M40 10V${H - 25}H${W - 20}`}),
    v("path", {class: "back", d: `M40 ${y(1)}H${W - 20}`}),
    [0, 0.5, 1, 1.5, 2, 2.5, 3].filter(s => s < high).map(s =>
      v("text", {class: "soft end", x: 34, y: y(s) + 4}, s)),
    [0, 4, 8, 12, 16, 20, 24, 28].map(M => v("text", {class: "soft", x: x(M) - 6, y: H - 8}, M)),
    v("text", {class: "soft", x: 44, y: 18}, "speed-up; dashed at 1: plain decoding"),
    v("text", {class: "soft end", x: W - 20, y: H - 30}, "M, layers left out"),
    rows.map(r => v("path", {class: r === one ? "curve chosen" : "curve",
      d: path(r.curve.map(([M, speed]) => [x(M), y(speed)]))})));
}

// How a token comes about: `draft` and `own` are distributions, `a` the chances of acceptance.
const ratio = (p, q) => p.map((x, i) => acceptance(x, q[i] || 1));
const rightly = (p, q) => ({draft: q, a: ratio(p, q), own: residual(p, q)});
const SAMPLERS = {
  "right": rightly,
  "own = p": (p, q) => ({...rightly(p, q), own: p}),
  "own = softmax(p - q)": (p, q) => ({...rightly(p, q), own: softmax(p.map((x, i) => x - q[i]))}),
  "argmax drafts, judged by q": (p, q) =>
    ({...rightly(p, q), draft: probabilities(q, {temperature: 0})}),
  "lenient: a = min(1, 1.3 p/q)": (p, q) => ({...rightly(p, q), a: ratio(p.map(x => 1.3 * x), q)}),
};

function outcome({draft, a, own}) {                    // how likely each token comes out
  const rejected = sum(draft.map((x, i) => x * (1 - a[i])));
  return own.map((x, i) => draft[i] * a[i] + rejected * x);
}

// How far from p the best hidden fault leads, in standard deviations of a draw.
function plainness(p, q) {
  return Math.min(...Object.values(SAMPLERS).slice(1).map(make => {
    const out = outcome(make(p, q));
    return Math.max(...p.map((x, i) => Math.abs(out[i] - x) / Math.sqrt(x * (1 - x) + 1e-6)));
  }));
}

function drawn({draft, a, own}, count, uniform) {      // tokens that came out
  const chance = new Chance(uniform);
  return Array.from({length: count}, () => {
    const token = chance.draw(draft);
    return chance.accept(a[token]) ? token : chance.draw(own);
  });
}

const exam = {key: "", n: 0, counts: {}, named: {}};

const isItExact = {
  name: "Is it exact?",
  question: "Is it exact?",
  todo: `One of these five samplers is right, four have faults that were met in real programs. Draw,
    compare with p, and name the fault of each.`,
  view() {
    if (!run.whole) return ["The run has to end first."];
    const found = known("exam", () => run.rounds.flatMap(r => r.drafted.map((_, k) =>
      [plainness(r.p[k], r.q[k]), r.n, k])).sort((a, b) => b[0] - a[0])[0] ?? [0]);
    if (!found) return ["Looking for a guess at which the faults can be seen …"];
    const [plain, n, i] = found;
    if (plain < 0.02) return ["Here p and q agree: take a higher temperature, or a greater K."];
    const [p, q] = [run.rounds[n].p[i], run.rounds[n].q[i]];
    if (exam.key !== run.key) Object.assign(exam, {key: run.key, n: 0, counts: {}, named: {}});
    const mixed = seeded(run.s.seed);
    const order = Object.keys(SAMPLERS).map(name => [mixed(), name]).sort().map(x => x[1]);
    const draw = count => {
      const uniform = seeded(run.s.seed + exam.n);
      for (const name of order)
        for (const token of drawn(SAMPLERS[name](p, q), count, uniform)) {
          const counts = exam.counts[name] ??= new Map();
          counts.set(token, (counts.get(token) ?? 0) + 1);
        }
      exam.n += count;
      show();
    };
    const tokens = likeliest(p, q, p.indexOf(Math.max(...p)));
    const often = (name, token) => (exam.counts[name]?.get(token) ?? 0) / exam.n;
    const row = (said, x, freq) => h("tr", {}, h("td", {}, said), h("td", {}, x.toFixed(3)),
      order.map(name => {
        const far = Math.abs(freq(name) - x) > 4 * Math.sqrt((x * (1 - x) + 1e-6) / exam.n);
        return h("td", {class: far ? "far" : ""}, exam.n ? freq(name).toFixed(3) : "–");
      }));
    const rest = f => 1 - sum(tokens.map(f));
    const right = order.filter(name => exam.named[name] === name).length;
    const pick = (name, k) => h("label", {}, `${"ABCDE"[k]} is `, h("select", {id: `name${k}`,
      change: e => { exam.named[name] = e.target.value; show(); }}, ["", ...Object.keys(SAMPLERS)]
      .map(each => h("option", {selected: exam.named[name] === each}, each))),
    exam.named[name] ? exam.named[name] === name ? "✓ so it is" : "✗ it is not" : "");
    return [exam.n ? `${exam.n} draws of each; ${right} of 5 named. Underlined: so far from p comes
      chance alone once in 16 000 times.` : "Nothing is drawn yet.",
    h("section", {}, h("p", {}, `Guess ${i + 1} of round ${n}: ∑ min(p, q) = `, num(overlap(p, q))),
      h("div", {class: "controls"}, [100, 1000, 5000].map(count =>
        h("button", {id: `draw${count}`, click: () => draw(count)}, `Draw ${count}`))),
      pane("exam", h("table", {}, h("tr", {}, ["token", "p", ..."ABCDE"].map(x => h("th", {}, x))),
        tokens.map(token => row(tok(token), p[token], name => often(name, token))),
        row("all others", rest(token => p[token]), name => rest(token => often(name, token)))))),
    h("section", {class: "controls"}, order.map(pick)),
    dim("Exactly, without a draw, for another p and q: python speculative.py")];
  },
};

const SCENES = [watch, guessAndCheck, leaveOut, theProgram, inContext, doesItPay, isItExact];

// ------------------------------------------------------------------------------------------ traces

function save() {
  const text = traceOf(model.cfg, run.s, run.prompt, run.rounds, about);
  const href = URL.createObjectURL(new Blob([text]));
  h("a", {href, download: "run.jsonl"}).click();
  URL.revokeObjectURL(href);
}

// A run that was recorded is made again by its own numbers and sets, and so all scenes show it.
async function openTrace(file) {
  const text = await file.text();
  if (!text.startsWith('{"event":"header","schema":"clasp-trace"'))
    throw new Error(`${file.name} is no trace of a run`);
  const [header, ...lines] = text.trim().split("\n").map(line => JSON.parse(line));
  const s = header.settings;
  const weights = "model.safetensors";
  if (header.model[weights] !== about[weights] || s.top_k || s.top_p !== 1 || s.r !== 1)
    throw new Error("only traces of this model without top-k, top-p and --probe can be shown");
  const most = name => Math.max(0, ...lines.map(line => line[name] ?? 0));
  const policy = new Recorded(s, model.cfg.L, lines);
  const open = {M: s.M ?? most("M"), K: s.K ?? most("step") + 1, interval: s.interval ?? 16};
  const its = {key: run.key, s: {...s, ...open}, prompt: header.prompt_ids};
  await grow(its, new Chance(policy.uniform), policy);
  const told = lines.filter(line => line.event === "emit");
  const other = run.rounds.find(r => `${r.emitted}` !== `${told[r.n].tokens}`);
  if (other) throw new Error(`round ${other.n} is not the trace's: rounding, or an error`);
}

// ----------------------------------------------------------------------------------- where we are

// The scene; all its places; which of them the address means.
function place() {
  const n = clamp(Math.trunc(at().scene) || 0, 0, SCENES.length - 1);
  const scene = SCENES[n];
  const places = scene.places?.() ?? [];
  const [round, step] = [Number(at().round), Number(at().step ?? 0)];
  const asked = places.findLastIndex(([r, s]) => r < round || r === round && s <= step);
  const k = at().round === undefined ? scene.start?.() ?? -1 : Math.max(0, asked);
  return {n, scene, places, k: k < 0 ? places.length - 1 : k};
}

function moves() {
  const {places, k} = place();
  const round = places[k]?.[0];
  const before = places.findLast(([r]) => r < round)?.[0];
  const to = {first: 0, last: places.length - 1, back: k - 1, next: k + 1,
    up: places.findIndex(([r]) => r === before), down: places.findIndex(([r]) => r > round)};
  return name => places[to[name]];
}

function move(name) {
  const to = moves()(name);
  if (to) go({...NOWHERE, round: to[0], step: to[1]});
  return to;
}

function show() {
  const {n, scene, places, k} = place();
  const [round, step] = places[k] ?? [0, 0];
  const focus = document.activeElement?.id;
  const panes = document.querySelectorAll("[data-pane]");
  const scrolled = [...panes].map(x => [x.dataset.pane, x.scrollTop, x.scrollLeft]);
  const [seen, ...shown] = run.rounds.length ? scene.view(round, step) : ["Reading the prompt …"];
  $("question").textContent = scene.question;
  $("todo").textContent = scene.todo;
  if ($("seen").textContent !== seen) $("seen").textContent = seen;
  $("form").hidden = n > 1;
  $("beginning").hidden = n > 0;
  $("stage").replaceChildren(...shown);
  for (const [i, a] of [...$("tabs").children].entries()) {
    a.href = link({...NOWHERE, scene: i});
    a.setAttribute("aria-current", i === n ? "page" : "false");
  }
  for (const [name, y, x] of scrolled)
    document.querySelector(`[data-pane="${name}"]`)?.scrollTo(x, y);
  const mark = document.querySelector(".words .here");
  mark?.parentElement.scrollTo(0, mark.offsetTop - mark.parentElement.clientHeight / 2);
  $(focus)?.focus({preventScroll: true});
  $("bar").hidden = places.length < 2;
  $("where").textContent = `round ${round}, step ${step}`;
  for (const name of ["up", "back", "next", "down"]) $(name).disabled = !moves()(name);
}

let timer = null;
function play(on) {
  clearInterval(timer);
  if (on && !moves()("next")) move("first");
  timer = on ? setInterval(() => move("next") || play(false), Number($("speed").value)) : null;
  $("play").textContent = on ? "pause" : "play";
}

const KEYS = {ArrowLeft: "back", ArrowRight: "next", ArrowUp: "up", ArrowDown: "down",
  Home: "first", End: "last"};
function pressed(e) {
  if (e.ctrlKey || e.altKey || e.metaKey || e.target.closest("input, textarea, select")) return;
  if (e.key === " " && !e.target.closest("button")) play(timer === null);
  else if (/^[0-6]$/.test(e.key)) go({...NOWHERE, scene: e.key});
  else if (KEYS[e.key]) move(KEYS[e.key]);
  else return;
  e.preventDefault();
}

function listen() {
  $("tabs").append(...SCENES.map((scene, n) => h("a", {}, `${n} ${scene.name}`)));
  addEventListener("hashchange", () => Promise.resolve().then(follow).catch(fault));
  addEventListener("keydown", pressed);
  // A button that was clicked by a pointer gives the keys back.
  $("bar").addEventListener("click", e => e.detail && document.activeElement.blur());
  for (const name of ["up", "back", "next", "down"])
    $(name).addEventListener("click", () => move(name));
  $("play").addEventListener("click", () => play(timer === null));
  $("speed").addEventListener("change", () => play(timer !== null));
  $("form").addEventListener("submit", e => {
    e.preventDefault();
    const said = ["prompt", ...Object.keys(NAMES)].map(id => [id, $(id).value]);
    go({...NOWHERE, ...Object.fromEntries(said)});
  });
  addEventListener("dragover", e => e.preventDefault());
  addEventListener("drop", e => {
    e.preventDefault();
    openTrace(e.dataTransfer.files[0]).catch(fault);
  });
}

function fault(e) {
  $("fault").hidden = false;
  $("fault").textContent = `${e.message}.`;
}

// ------------------------------------------------------------------------------------------- begin

async function read(name) {                            // a file, which build.py may have put inside
  if ($(name)) return bytesOf(atob($(name).textContent)).buffer;
  const answer = await fetch(`../demo/${name}`);
  if (!answer.ok) throw new Error(`demo/${name}: ${answer.status}`);
  return answer.arrayBuffer();
}

async function begin() {
  const files = {};
  try {
    for (const name of ["config.json", "model.safetensors", "tokenizer.model", "clasp.json"])
      files[name] = await read(name);
  } catch (e) {
    throw new Error(`The model's files cannot be read (${e.message}). Start page/serve.py, or make `
      + "one file of all by python page/build.py --out lesson.html");
  }
  const text = name => new TextDecoder().decode(files[name]);
  about = {};
  for (const name of ["config.json", "model.safetensors"]) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", files[name]));
    about[name] = [...digest].map(b => b.toString(16).padStart(2, "0")).join("");
  }
  model = new Llama(JSON.parse(text("config.json")), readSafetensors(files["model.safetensors"]));
  tokenizer = new Tokenizer(text("tokenizer.model"));
  ({costs, prompt: DEFAULTS.prompt} = JSON.parse(text("clasp.json")));
  $("M").max = model.cfg.L;
  listen();
  await follow();
}

begin().catch(fault);
