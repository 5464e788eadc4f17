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
const pause = () => new Promise(done => setTimeout(done));
const short = x => x === 0 || x === 1 ? `${x}` : Math.abs(x) < 1e-4 ? x.toExponential(1) :
  `${Number(x.toPrecision(4))}`;
const num = (x, field) => x === undefined ? "…" :
  h("data", {value: x, title: x, "data-field": field ?? false}, short(x));

// ------------------------------------------------------------------------- the address and the run

// Where we are stands in the address, and so does what the form holds, if it is not the default.
const fields = [...document.querySelectorAll("#form :is(input, select, textarea)")];
const numbers = fields.filter(field => field.type === "number");           // named as in Settings
const NOWHERE = {round: undefined, step: undefined, cell: undefined};
let model, tokenizer, costs, about;                    // of the demo's files
let defaults;                                          // of the fields
let run = null;                                        // {key, s, prompt, rounds, whole, known}
let filled;                                            // what the address last put into the form

const at = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const asked = id => at()[id] ?? defaults[id];
const link = changes => "#" + new URLSearchParams(Object.entries({...at(), ...changes})
  .filter(([name, x]) => x !== undefined && `${x}` !== defaults[name]));
const go = changes => location.replace(link(changes));
const skipOf = list => flags(list, model.cfg.L);

// The run that the address asks for, unless it is there already.
function follow() {
  $("fault").hidden = true;
  const said = JSON.stringify([at().scene, ...fields.map(field => asked(field.id))]);
  if (said === filled) return show();                  // and what is being typed stays
  filled = said;
  for (const field of fields) {
    const wrong = field.type === "number" && Number.isNaN(Number(asked(field.id)));
    field.value = wrong ? "" : asked(field.id);
    if (!field.checkValidity()) field.value = defaults[field.id];
  }
  const s = {stop_ids: [tokenizer.bos + 1]};
  for (const {id, value} of numbers) s[id] = Number(value);
  const key = JSON.stringify([s, $("prompt").value]);
  if (run?.key === key) return show();
  const prompt = [tokenizer.bos, ...tokenizer.encode($("prompt").value)];
  if (prompt.length + s.N > model.cfg.context)
    throw new Error(`${prompt.length} tokens and N more: the model reads ${model.cfg.context}`);
  return grow({key, s, prompt}, new Chance(seeded(s.seed)));
}

const followed = () => Promise.resolve().then(follow).catch(fault);

// It grows round by round, unless another takes its place.
async function grow(its, chance, policy) {
  const mine = run = {...its, ids: its.prompt, rounds: [], whole: false, known: new Map()};
  for (const r of generate(model, run.prompt, run.s, chance, policy)) {
    await pause();
    if (run !== mine) return;
    run.rounds.push(r);
    run.ids = [...run.ids, ...r.emitted];
    run.pieces = tokenizer.pieces(run.ids);
    run.whole = r.done;
    show();
  }
}

// What a task makes of this run or of this browser, by name; undefined while it is being made. They
// are made one at a time, and `work` counts them.
const browser = new Map();
const work = {asked: 0, done: 0, name: "", queue: Promise.resolve()};
function known(name, task, of = run.known) {
  if (!of.has(name)) {
    of.set(name, undefined);
    work.asked++;
    work.queue = work.queue.then(() => {
      work.name = name;
      progress();
      return pause();
    }).then(() => {
      if (of === run.known || of === browser) of.set(name, task());
    }).finally(() => work.done++).then(show).catch(fault);
  }
  return of.get(name);
}

function progress() {
  const busy = run.whole && work.done < work.asked;
  if (!busy) Object.assign(work, {asked: 0, done: 0});
  const [value, max, what] = busy ? [work.done, work.asked, work.name] :
    [run.ids.length - run.prompt.length, run.s.N, "tokens of the run"];
  $("busy").hidden = run.whole && !busy;
  $("busy").replaceChildren(h("progress", {value, max}),
    ` ${value} of ${max}: ${what.slice(0, 48)} …`);
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
  behind: "drafted after it, not judged", own: "the full model's own"};
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
function scale(u, [from, to], said) {
  const side = u < 0.1 ? "left" : u > 0.9 ? "right" : "";
  return h("div", {role: "img", "aria-label": `u = ${short(u)}; ${said}`},
    h("div", {class: "scale"}, h("i", {style: `left: ${from * 100}%; right: ${100 - to * 100}%`}),
      h("b", {class: side, style: `left: ${u * 100}%`}, "u = ", num(u, "u"))),
    h("div", {class: "ends"}, h("small", {}, "0"), h("small", {}, said), h("small", {}, "1")));
}

function part(p, token) {                              // of 0 .. 1, that draws it
  const before = sum(p.slice(0, token));
  return [before / sum(p), (before + p[token]) / sum(p)];
}

const layers = (skip, click) => h("div", {class: "layers"}, skip.map((out, i) =>
  h(click ? "button" : "span", {id: `layer${i}`, class: out ? "out" : "",
    "aria-pressed": click ? `${out}` : false, click: () => click?.(i),
    "aria-label": `layer ${i}, ${out ? "left out" : "run"}`}, i)));

const section = (...kids) => h("section", {}, kids);
const pane = (name, ...kids) => h("div", {class: "scroll", "data-pane": name}, kids);
const button = (id, click, said, props) => h("button", {id, click, ...props}, said);
const numbered = list => section(h("dl", {class: "numbers"}, list.map(([said, ...x]) =>
  h("div", {}, h("dt", {}, said), h("dd", {}, x)))));
const grid = (name, head, rows) => pane(name, h("table", {},
  h("tr", {}, head.map(x => h("th", {}, x))),
  rows.map(([chosen, ...cells]) => h("tr", {class: chosen && "chosen"},
    cells.map(x => h("td", {}, x))))));
const drawing = (said, props, ...kids) => v("svg", {role: "img", "aria-label": said,
  viewBox: `0 0 ${props.width} ${props.height}`, ...props}, kids);
const write = (kind, x, y, said) => v("text", {class: kind, x, y}, said);
const path = points => points.map(([x, y], n) => `${n ? "L" : "M"}${x} ${y}`).join("");

// -------------------------------------------------------------------------------- what passes cost

// In plain steps: a draft step without j layers, a verify of T rows, a choice of layers. The GPU's
// are milliseconds of gpu/README.md, an estimate.
const line = (x0, y0, x1, y1) => x => y0 + (y1 - y0) * (x - x0) / (x1 - x0);
const GPU = {draft: line(0, 1, 22, 2.6 / 6.6), verify: line(1, 1, 13, 7.8 / 6.6),
  choice: 8.3 / 6.6};
const lists = () => ({
  "layers counted": {draft: j => 1 - j / model.cfg.L, verify: () => 1, choice: 1},
  "a GPU, by an estimate": GPU,
  "PyTorch on a laptop": {draft: j => costs.draft[j], choice: costs.optimise,
    verify: T => costs.verify[T] ?? line(1, 1, 13, costs.verify[13])(T)},
  "this browser, now": measured()});

// The best of three times of each pass; undefined until all were measured.
function measured() {
  const {L, D} = model.cfg;
  const t = 100;
  const time = (name, task) => known(`measuring ${name}`, () => {
    const cache = new Cache(model.cfg, t + L);
    return Math.min(...[1, 2, 3].map(() => {
      const began = performance.now();
      task(cache);
      return Math.max(0.01, performance.now() - began);  // coarse clocks may say 0
    }));
  }, browser);
  const pass = (T, skip) => cache =>
    model.head(model.forward(Array(T).fill(5), sequence(t, T), cache, skip).at(-1));
  const states = split(new Float32Array(D * (L + 1)).fill(1), D);
  const step = time("a plain step", pass(1));
  const draft = time("a draft step", pass(1, skipOf([...Array(22).keys()])));
  const verify = time("a verify of 13", pass(13));
  const choice = time("a choice of layers", cache => choose(model, cache, t, states, 22));
  return choice && {seconds: step / 1000, draft: line(0, 1, 22, draft / step),
    verify: line(1, 1, 13, verify / step), choice: choice / step};
}

// -------------------------------------------------------------------------------------- the scenes

// Their questions are in index.html. `places` are the rounds and steps that a scene can show;
// `view` is what was seen at one of them, and what is to be seen there.

const watch = {
  places: () => run.rounds.map(r => [r.n, 0]),
  view(last) {
    const rounds = run.rounds.slice(0, last + 1);
    const passes = last;                               // after the prefill
    const tokens = sum(rounds.map(r => r.emitted.length)) - 1;
    const drafted = sum(rounds.map(r => r.drafted.length));
    const kept = sum(rounds.map(r => r.accepted));
    const L = model.cfg.L;
    const ours = rounds.flatMap(r => [
      ["draft", r.drafted.length * (1 - indices(r.skip).length / L)],
      ["verify", r.n > 0 ? 1 : 0],
      ["choose", r.choice ? 1 : 0]]);
    const spent = sum(ours.map(([, steps]) => steps));
    const all = Math.max(tokens, spent, 1);
    return [`Without ${run.s.M} of its ${L} layers it guessed ${drafted} tokens: ${kept} were kept,
      and ${passes} full passes made ${tokens} tokens. No guess has changed what the full model
      would say, or how often.`,
    section(words(last)),
    numbered([["drafted tokens kept", num(kept, "kept"), " of ", num(drafted, "drafted")],
      ["tokens per full pass", num(passes ? tokens / passes : 0, "per pass")],
      ["plain steps saved", num(tokens - spent, "saved")]]),
    section(h("h3", {}, "Plain decoding: ", num(tokens), " tokens, a full pass each"),
      lane(Array(tokens).fill(["verify", 1]), all),
      h("h3", {}, "CLaSp: ", num(spent, "spent"), " plain steps for as many tokens"),
      lane(ours, all))];
  },
};

function lane(blocks, all) {                           // blocks: [what, plain steps]
  let x = 0;
  return drawing(`${short(sum(blocks.map(([, wide]) => wide)))} plain steps`, {class: "lane",
    viewBox: `0 0 ${all} 1`, preserveAspectRatio: "none"}, blocks.map(([kind, wide]) => {
    x += wide;
    return v("rect", {class: kind, x: x - wide, width: Math.max(0, wide - all / 900), height: 1});
  }));
}

const guessAndCheck = {
  places: () => run.rounds.flatMap(r => fates(r).map((_, step) => [r.n, step])),
  start: () => guessAndCheck.places().findIndex(([n, step]) =>
    run.rounds[n].kind === "residual" && step === run.rounds[n].accepted),
  view(n, step) {
    const r = run.rounds[n];
    const [seen, ...shown] = step < r.drafted.length ? guess(r, step) : own(r);
    return [seen, h("div", {class: "two"}, section(words(run.rounds.length, [n, step])),
      section(shown))];
  },
};

function guess(r, i) {
  const [token, p, q, k] = [r.drafted[i], r.p[i], r.q[i], r.drafted.length];
  const a = acceptance(p[token], q[token]);
  const [word, said] = {
    true: ["kept", `u is below a = min(1, p/q) = ${short(a)}.`],
    false: ["rejected", `u is not below a = p/q = ${short(a)}. Nothing after it is judged.`],
    null: ["not judged", "a token before it was rejected."]}[verdict(r, i)];
  return [`Guess ${i + 1} of round ${r.n} is ${word}: ${said}`,
    h("h3", {}, `Guess ${i + 1} of round ${r.n}: `, tok(token, "token")),
    bars(likeliest(p, q, token).map(id => [id, q[id], p[id]]), ["q", "p"], token),
    h("small", {}, h("span", {class: "key q"}), "q, the draft ", h("span", {class: "key p"}),
      "p, the full model ", h("span", {class: "key cut"}), "min(p, q), paid by drafting"),
    h("h3", {}, "The draft draws from q"),
    scale(r.u[i], part(q, token), "hatched: this token's part of q"),
    verdict(r, i) === null ? "" : [h("h3", {}, "The full model judges"),
      scale(r.u[k + i], [0, a], "hatched: u < a, kept")],
    h("p", {}, "a = min(1, ", num(p[token], "p"), " / ", num(q[token], "q"), ") = ", num(a, "a"),
      ": ", h("b", {"data-field": "verdict"}, word)),
    h("p", {class: "dim"}, "Whatever is drafted from this q is kept with probability ",
      "∑ min(p, q) = ", num(overlap(p, q)))];
}

const WHY = {
  residual: `After a rejection the full model draws from norm(max(0, p - q)), what is still owed.
    With min(p, q), which drafting has paid, that makes p, whatever q was.`,
  bonus: "All guesses were kept, and the full pass has said already what follows: one more from p.",
  plain: "Nothing was drafted, so the token is drawn from p, as in plain decoding.",
};

function own(r) {
  const dist = residual(r.p[r.accepted], r.q[r.accepted]);
  const name = r.kind === "residual" ? "owed" : "p";
  return [WHY[r.kind], h("h3", {}, "The full model's own: ", tok(r.own, "token")),
    bars(likeliest(dist, dist, r.own).map(id => [id, dist[id]]), [name], r.own),
    scale(r.u.at(-1), part(dist, r.own), "hatched: this token's part"),
    h("p", {}, h("b", {"data-field": "kind"}, r.kind), ", probability ",
      num(dist[r.own], "probability"))];
}

// The last 64 tokens of the run, each as the first of a draft, and the program's sets for every
// number of layers, chosen by the token before them.
function readPassage() {
  const {L, D} = model.cfg;
  const ids = run.ids;
  const size = Math.min(64, ids.length - 2);
  const from = ids.length - 1 - size;
  const cache = new Cache(model.cfg, ids.length + Math.max(size, L));
  const before = model.forward(ids.slice(0, from), sequence(0, from), cache);
  const choice = choose(model, cache, from - 1, before.map(x => x.subarray(-D)), L - 4);
  const states = model.forward(ids.slice(from), sequence(from, size + 1), cache);
  const p = model.head(states.at(-1)).slice(0, size).map(x => probabilities(x, run.s));
  return {ids, from, size, cache, p, choice, best: []};
}

const passage = () => run.whole && known("reading the text", readPassage);

const program = (its, j) => its.choice.back(model.cfg.L, Math.min(j, its.choice.M)).skip;

// The share of what a draft says that would be kept; the best of each number of layers is kept too.
function share(its, skip) {
  return known(`a draft without ${indices(skip)}`, () => {
    const x = agreement(model, its.cache, its.ids, its.from, skip, its.p, run.s);
    const j = indices(skip).length;
    its.best[j] = Math.max(x, its.best[j] ?? 0);
    return x;
  });
}

const shuffled = (list, uniform) =>
  list.map(x => [uniform(), x]).sort((a, b) => a[0] - b[0]).map(([, x]) => x);

const leaveOut = {
  view() {
    const its = passage();
    if (!its) return ["Reading the text …"];
    const skip = skipOf((at().off ?? "").split(",").filter(Boolean).map(Number));
    const set = list => go({off: indices(list).join(",") || undefined});
    const mine = indices(skip).length;
    const j = mine || 22;
    const theirs = program(its, j);
    const J = indices(theirs).length;
    const uniform = seeded(j);
    const random = [1, 2, 3, 4, 5, 6].map(() =>
      share(its, skipOf(shuffled([...skip.keys()], uniform).slice(0, j))));
    const [yours, programs] = [share(its, skip), share(its, theirs)];
    const rows = [["yours", yours], [`the program's ${J}`, programs],
      [`${j} at random, mean of 6`, sum(random) / 6],
      ["one layer, the program's", share(its, program(its, 1))],
      [`the best known of ${j}`, its.best[j]]];
    const beaten = mine === J && yours > programs;
    return [yours === undefined || programs === undefined ? "The drafts are running …" :
      `Without your ${mine} layers a draft keeps ${short(yours)} of its tokens, without the
      program's ${J} ${short(programs)}.
      ${beaten ? "You beat it: it looks at states, not at tokens." : ""}`,
    section(layers(skip, i => set(skip.map((out, n) => n === i ? !out : out))),
      h("div", {class: "controls"}, button("none", () => set([]), "run all"),
        button("program", () => set(theirs), `the program's ${J}`))),
    section(h("h3", {}, `Share of drafted tokens kept, over ${its.size} of the run`),
      bars(rows.map(([name, x]) => [name, x || 0]), ["share"], "yours"))];
  },
};

const theProgram = {
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
    return [whole ? `The way back from D[${L},${o.M}] = ${short(o.D[L][o.M])} leaves out
      ${indices(skip).join(", ")}.` :
      last === 0 ? "D[0,0] is the embedding: nothing was run yet, and nothing left out." :
        `Row ${last}: each cell has run layer ${last - 1} or skipped it, which comes nearer to
        h[${last}].`,
    section(h("p", {}, "After round ", n, ", by the states h of the token ",
      tok(run.ids[r.position]), ` at position ${r.position}.`), bothWays(o, cell),
    pane("table", table(o, last, cell, whole))),
    whole ? section(h("h3", {}, "The set for the next drafts"), layers(skip),
      button("try", () => go({...NOWHERE, scene: 2, off: `${indices(skip)}`}),
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

const STEPS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};

function table(o, last, cell, whole) {
  const [W, H, L] = [30, 22, model.cfg.L];
  const [x, y] = [j => 30 + j * W, i => 18 + i * H];
  const line = cells => path(cells.map(([i, j]) => [x(j) + W / 2, y(i) + H / 2]));
  // Most cells are near 1, where a small difference should show: 0.9 is a quarter, 0.99 a half.
  const heat = c => Math.max(0, -Math.log10(Math.max(1e-4, 1 - c)) / 4);
  const rows = o.D.slice(0, last + 1);
  const pick = (i, j) => j in (rows[i] ?? {}) && go({cell: `${i},${j}`});
  const keydown = e => {
    if (!STEPS[e.key]) return;
    const [down, right] = STEPS[e.key];
    pick(cell[0] + down, cell[1] + right);
    e.preventDefault();
    e.stopPropagation();
  };
  return drawing(`the table up to row ${last} of ${L}; arrow keys choose a cell`, {id: "grid",
    role: "application", tabindex: 0, keydown, width: x(o.M + 1) + 2, height: y(L + 1)},
  o.D[L].map((_, j) => write("soft", x(j) + 10, 12, j)),
  rows.map((row, i) => [write("soft end", 24, y(i) + 15, i),
    row.map((c, j) => [v("rect", {class: "heat", x: x(j) + 1, y: y(i) + 1, width: W - 2,
      height: H - 2, "fill-opacity": 0.04 + 0.86 * heat(c), click: () => pick(i, j)}),
    i ? v("path", {class: "edge", d: line([[i, j], [i - 1, j - o.skipped[i][j]]])}) : ""])]),
  v("path", {class: "back", d: line(o.back(...cell).cells)}),
  whole ? v("path", {class: "way", d: line(o.back().cells)}) : "",
  v("rect", {class: "here", x: x(cell[1]), y: y(cell[0]), width: W, height: H}));
}

// One text that is begun, interrupted by another, and by a third: what was made of it so far. After
// a change the old set stays until layers are due.
function talk() {
  const s = {...run.s, temperature: 0, N: Math.min(40, run.s.N), K: 6, M: 22, exit_threshold: 0,
    interval: 6};
  let its = {ids: [tokenizer.bos], rounds: [], said: ""};
  for (const part of [0, 1, 2]) {
    const before = its;
    const more = asked(`text${part}`);
    const said = `${before.said} + ${more}`;
    its = run.whole && known(`text ${part + 1}${said}`, () => {
      const ids = [...before.ids, ...tokenizer.encode(more)];
      const policy = new Paper(s, model.cfg.L, before.skip);
      const rounds = [...generate(model, ids, s, new Chance(seeded(part)), policy)]
        .map(r => ({...r, part, old: r.skip === before.skip}));
      return {ids: [...ids, ...rounds.flatMap(r => r.emitted)], said, skip: policy.skip,
        rounds: [...before.rounds, ...rounds]};
    });
    if (!its) return before;
  }
  return its;
}

const inContext = {
  places: () => talk().rounds.map((_, n) => [n, 0]),
  view(last) {
    const all = talk().rounds;
    const rounds = all.slice(0, last + 1);
    const later = rounds.filter(r => r.part > 0 && r.drafted.length);
    const [one, two] = [0, 1].map(part => all.findLast(r => r.part === part)?.skip);
    const apart = two ? indices(one.map((out, i) => out && !two[i])).length : 0;
    const kept = (said, list) => [said, num(sum(list.map(r => r.accepted)), said), " of ",
      num(sum(list.map(r => r.drafted.length)))];
    return [all.at(-1)?.part !== 2 ? "Running …" : later.every(r => r.old) ?
      "The first set goes on, whatever the text is by now." : `The sets of the first two texts
      differ in ${apart} of 22 layers.${apart > 0 ? ` Just after a change of text the old set
      misses; then the program has seen the new one.` : ""}`,
    numbered([kept("kept after a change, by the old set", later.filter(r => r.old)),
      kept("kept by the set chosen since", later.filter(r => !r.old))]),
    section(pane("map", map(rounds)))];
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
      return [write("soft end", 40, n * H + 13, r.n || "read"),
        v("path", {class: "run", d: cells(false)}), v("path", {class: "hole", d: cells(true)}),
        write("", x0 + L * w + 8, n * H + 13, fates(r).map(x => SIGNS[x.fate]).join("")),
        r.choice ? [v("path", {class: "way", d: `M${x0} ${n * H + H}h${L * w}`}),
          write("mark", 2, n * H + H + 4, "◆")] : ""];
    }));
}

// If each of K drafted tokens is kept with probability `kept`: tokens per round, by its cost.
function speedUp(kept, K, M, price, interval) {
  const tokens = kept < 1 ? (1 - kept ** (K + 1)) / (1 - kept) : K + 1;
  const passes = K * price.draft(M) + price.verify(K + 1);
  return tokens / (passes + price.choice / interval);
}

const doesItPay = {
  view() {
    const its = passage();
    if (!its) return ["Reading the text …"];
    const K = run.s.K || 8;
    const budgets = Array.from({length: its.choice.M / 2 + 1}, (_, n) => its.choice.M - 2 * n);
    const points = budgets.map(M => [M, share(its, program(its, M))])
      .filter(([, x]) => x !== undefined);
    const prices = lists();
    const rows = Object.entries(prices).map(([name, price]) => {
      if (!price) return {name, curve: [], cells: Array(5).fill()};
      const curve = points.map(([M, x]) => [M, speedUp(x, K, M, price, run.s.interval)]);
      const [M, best] = curve.reduce((a, b) => b[1] > a[1] ? b : a, [0, 0]);
      return {name, curve, cells: [price.draft(22), price.verify(K + 1),
        price.choice, best, M]};
    });
    const one = rows.find(r => r.name === $("price").value);
    const [, , , best, M] = one.cells;
    const here = prices["this browser, now"];
    const took = sum(run.rounds.slice(1).map(r => r.seconds));
    const plain = here?.seconds * (run.ids.length - run.prompt.length - 1);
    return [!best ? "What passes cost in this browser is being measured …" :
      `By the prices of "${one.name}" it ${best > 1 ? "pays" : "does not pay"}: ${short(best)} times
      as fast as plain decoding with the best M, ${M}. ${here ? `In this browser the run took
      ${short(took)} s after its prefill, and as many plain steps take ${short(plain)} s.` : ""}`,
    section(curves(rows, one, its.choice.M)),
    section(grid("prices", ["in plain steps", "draft, 22 out", `verify of ${K + 1}`, "choice",
      "best speed-up", "at M"], rows.map(r => [r === one, r.name, ...r.cells.map(x => num(x))])))];
  },
};

function curves(rows, one, most) {
  const [W, H] = [clamp(innerWidth - 60, 280, 640), 260];
  const high = Math.max(1.5, ...rows.flatMap(r => r.curve.map(([, speed]) => speed))) * 1.1;
  const x = M => 40 + M / most * (W - 60);
  const y = speed => H - 25 - speed / high * (H - 40);
  const said = one.curve.map(([M, speed]) => `${short(speed)} at ${M}`).join(", ");
  return drawing(`speed-up by M: ${said}`, {width: W, height: H},
    v("path", {class: "hole", d: `M40 10V${H - 25}H${W - 20}`}),
    v("path", {class: "back", d: `M40 ${y(1)}H${W - 20}`}),
    [0, 0.5, 1, 1.5, 2, 2.5, 3].filter(s => s < high).map(s => write("soft end", 34, y(s) + 4, s)),
    [0, 4, 8, 12, 16, 20, 24, 28].map(M => write("soft", x(M) - 6, H - 8, M)),
    write("soft", 44, 18, "speed-up; dashed at 1: plain decoding"),
    write("soft end", W - 20, H - 30, "M, layers left out"),
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

// In which order the samplers stand, how often each token came out of each in n draws, and how the
// samplers were named.
function newExam() {
  const uniform = seeded(run.s.seed);
  const order = shuffled(Object.keys(SAMPLERS), uniform);
  const counts = order.map(() => new Uint32Array(model.cfg.V));
  return {chance: new Chance(uniform), order, counts, n: 0, named: []};
}

function draw(exam, p, q, count) {
  for (const [k, name] of exam.order.entries()) {
    const {draft, a, own} = SAMPLERS[name](p, q);
    for (let i = 0; i < count; i++) {
      const token = exam.chance.draw(draft);
      const kept = exam.chance.accept([a[token]]) === 1;
      exam.counts[k][kept ? token : exam.chance.draw(own)]++;
    }
  }
  exam.n += count;
  show();
}

const isItExact = {
  view() {
    const found = run.whole && known("looking for a guess that shows the faults", () =>
      run.rounds.flatMap(r => r.drafted.map((_, i) => [plainness(r.p[i], r.q[i]), r.n, i]))
        .sort((a, b) => b[0] - a[0])[0] ?? [0]);
    if (!found) return ["Looking for a guess at which the faults can be seen …"];
    const [plain, n, i] = found;
    if (plain < 0.02) return ["Here p and q agree: take a higher temperature, or a greater K."];
    run.exam ??= newExam();
    const exam = run.exam;
    const [p, q] = [run.rounds[n].p[i], run.rounds[n].q[i]];
    const tokens = likeliest(p, q, p.indexOf(Math.max(...p)));
    const places = x => x.toFixed(3).replace(/^0/, "");
    // What stands in a row: f(p), f(q) and f of what each sampler gave.
    const row = (said, f) => {
      const x = f(p);
      const far = y => Math.abs(y - x) > 4 * Math.sqrt((x * (1 - x) + 1e-6) / exam.n);
      const given = exam.counts.map(counts => f(counts) / exam.n);
      return [false, said, places(f(q)), places(x), ...given.map(y =>
        exam.n ? h("span", {class: far(y) ? "far" : ""}, places(y)) : "–")];
    };
    const rest = list => sum(list) - sum(tokens.map(token => list[token]));
    const right = exam.order.filter((name, k) => exam.named[k] === name).length;
    const choose = (name, k) => h("label", {}, `${"ABCDE"[k]} is `, h("select", {id: `name${k}`,
      change: e => { exam.named[k] = e.target.value; show(); }}, ["", ...Object.keys(SAMPLERS)]
      .map(each => h("option", {selected: exam.named[k] === each}, each))),
    exam.named[k] ? exam.named[k] === name ? "✓ so it is" : "✗ it is not" : "");
    return [exam.n ? `${exam.n} draws of each; ${right} of 5 named. Underlined: so far from p comes
      chance alone once in 16 000 times.` : "Nothing is drawn yet.",
    section(h("p", {}, `Guess ${i + 1} of round ${n}: ∑ min(p, q) = `, num(overlap(p, q))),
      h("div", {class: "controls"}, [100, 1000, 5000].map(count =>
        button(`draw${count}`, () => draw(exam, p, q, count), `Draw ${count}`))),
      grid("exam", ["token", "q", "p", ..."ABCDE"],
        [...tokens.map(token => row(tok(token), list => list[token])), row("all others", rest)])),
    h("section", {class: "controls"}, exam.order.map(choose))];
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
  const policy = new Recorded(model.cfg.L, lines);
  const open = {M: s.M ?? most("M"), K: s.K ?? most("step") + 1, interval: s.interval ?? 16};
  const its = {key: run.key, trace: `recorded in ${file.name}`, s: {...s, ...open},
    prompt: header.prompt_ids};
  await grow(its, new Chance(() => policy.numbers.shift()), policy);
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
  const meant = places.findLastIndex(([r, s]) => r < round || r === round && s <= step);
  const k = at().round === undefined ? scene.start?.() ?? -1 : Math.max(0, meant);
  return {n, scene, places, k: k < 0 ? places.length - 1 : k};
}

function target(name) {                                // the place where a move leads, if to any
  const {places, k} = place();
  const round = places[k]?.[0];
  const before = places.findLast(([r]) => r < round)?.[0];
  const to = {first: 0, last: places.length - 1, back: k - 1, next: k + 1,
    up: places.findIndex(([r]) => r === before), down: places.findIndex(([r]) => r > round)};
  return places[to[name]];
}

function move(name) {
  const to = target(name);
  if (to) go({...NOWHERE, round: to[0], step: to[1]});
  return to;
}

function show() {
  const {n, scene, places, k} = place();
  const [round, step] = places[k] ?? [0, 0];
  const focus = document.activeElement?.id;
  const panes = () => [...document.querySelectorAll("[data-pane]")];
  const scrolled = panes().map(x => [x.dataset.pane, x.scrollTop, x.scrollLeft]);
  const [seen, ...shown] = run.rounds.length ? scene.view(round, step) : ["Reading the prompt …"];
  $("main").dataset.now = n;
  if ($("seen").textContent !== seen) $("seen").textContent = seen;
  $("save").disabled = !run.whole;
  $("stage").replaceChildren(...shown);
  carried();
  progress();
  for (const [i, a] of [...$("tabs").children].entries()) {
    a.href = link({...NOWHERE, scene: i});
    a.setAttribute("aria-current", i === n ? "page" : "false");
  }
  for (const [name, y, x] of scrolled) panes().find(x => x.dataset.pane === name)?.scrollTo(x, y);
  for (const x of panes()) x.classList.toggle("wider", x.scrollWidth > x.clientWidth);
  bringIntoView(document.querySelector(".here"));
  $(focus)?.focus({preventScroll: true});
  $("bar").hidden = places.length < 2;
  $("where").textContent = `round ${round}, step ${step}`;
  for (const name of ["up", "back", "next", "down"]) $(name).disabled = !target(name);
}

// In the pane that scrolls, not the page.
function bringIntoView(mark) {
  if (!mark) return;
  const its = mark.closest("[data-pane]");
  const [a, b] = [mark.getBoundingClientRect(), its.getBoundingClientRect()];
  const inside = a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;
  if (!inside) its.scrollBy(a.left - b.left - b.width / 2, a.top - b.top - b.height / 2);
}

// All scenes but 4 show the same run: which, and the way back to the default.
function carried() {
  const all = ["prompt", ...numbers.map(field => field.id)];
  const values = all.filter(id => id in at())
    .map(id => id === "prompt" ? "another beginning" : `${id} ${run.s[id]}`);
  const said = run.trace ?? (values.length > 0 ? `with ${values.join(", ")}` : "");
  const back = () => {
    run.key = null;
    filled = null;
    go({...NOWHERE, ...Object.fromEntries(all.map(id => [id, undefined]))});
    followed();
  };
  $("carried").replaceChildren(`All scenes but 4 show one run, ${said || "with the default settings"}. `,
    said ? button("default", back, "Back to the default") : "");
}

let timer = null;
function play(on) {
  clearInterval(timer);
  if (on && !target("next")) move("first");
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
  addEventListener("hashchange", followed);
  addEventListener("resize", () => run && show());
  addEventListener("keydown", pressed);
  // A button that was clicked by a pointer gives the keys back.
  $("bar").addEventListener("click", e => e.detail && document.activeElement.blur());
  for (const name of ["up", "back", "next", "down"])
    $(name).addEventListener("click", () => move(name));
  $("play").addEventListener("click", () => play(timer === null));
  $("speed").addEventListener("change", () => play(timer !== null));
  $("save").addEventListener("click", save);
  $("open").addEventListener("change", e => openTrace(e.target.files[0]).catch(fault));
  $("price").addEventListener("change", () => $("form").requestSubmit());
  $("form").addEventListener("submit", e => {
    e.preventDefault();
    go({...NOWHERE, ...Object.fromEntries(fields.map(({id, value}) => [id, value]))});
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
  costs = JSON.parse(text("clasp.json")).costs;
  defaults = Object.fromEntries(fields.map(({id, value}) => [id, value]));
  listen();
  await follow();
}

begin().catch(fault);
