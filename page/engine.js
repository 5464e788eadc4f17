"use strict";
// CLaSp in plain JavaScript: model, dynamic program, sampler, loop, with the names and letters of
// llama.py, dp_layer_skip.py and speculative.py. oracle/check_trace.py passes the traces it writes.
//
// States and logits are flat Float32Arrays, a row after the other. Sums are float64, as all numbers
// of JavaScript are.

// ------------------------------------------------------------------------------------------ files

// A safetensors file -> name: {shape, data}. A bfloat16 is the upper half of a float32.
function readSafetensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, {dtype, shape, data_offsets: [from, to]}] of Object.entries(header)) {
    if (dtype !== "BF16") throw new Error(`${name} is ${dtype}; BF16 can be read`);
    const halves = new Uint16Array(buffer.slice(8 + size + from, 8 + size + to));
    const wide = new Uint32Array(halves).map(bits => bits << 16);
    tensors[name] = {shape, data: new Float32Array(wide.buffer)};
  }
  return tensors;
}

// config.json -> the letters of llama.Config.
function readConfig(c) {
  const r = c.rope_scaling;
  const scaling = r ? [r.factor, r.low_freq_factor, r.high_freq_factor,
    r.original_max_position_embeddings] : null;
  const H = c.num_attention_heads;
  return {L: c.num_hidden_layers, D: c.hidden_size, H, G: c.num_key_value_heads ?? H,
    hd: c.head_dim ?? c.hidden_size / H, ffn: c.intermediate_size, V: c.vocab_size,
    context: c.max_position_embeddings, eps: c.rms_norm_eps, theta: c.rope_theta,
    tied: c.tie_word_embeddings ?? false, scaling};
}

// ------------------------------------------------------------------------------------------ LLaMA

// A row of a pass is {position, slot}: it writes its slot of the cache, and reads the slots before
// its position and its own. That is all that decoding, verifying and trying out differ in.
const sequence = (t, T) => Array.from({length: T}, (_, n) => ({position: t + n, slot: t + n}));
const candidates = (t, J) => Array.from({length: J}, (_, n) => ({position: t, slot: t + 1 + n}));

// Radians per position; LLaMA-3.1 stretches the slow ones.
function ropeFrequencies({hd, theta, scaling}) {
  return Array.from({length: hd / 2}, (_, k) => {
    const f = theta ** (-2 * k / hd);
    if (!scaling) return f;
    const [factor, low, high, original] = scaling;
    const turns = original * f / (2 * Math.PI);
    const keep = Math.min(1, Math.max(0, (turns - low) / (high - low)));
    return keep * f + (1 - keep) * f / factor;
  });
}

class Cache {                                          // keys and values of S slots for each layer
  constructor({L, G, hd}, S) {
    const layers = () => Array.from({length: L}, () => new Float32Array(S * G * hd));
    this.keys = layers();
    this.values = layers();
  }
}

const sum = list => list.reduce((a, b) => a + b, 0);
const split = (x, width) => Array.from({length: x.length / width},
  (_, t) => x.subarray(t * width, (t + 1) * width));

// The inner product of x[i ..] and y[j ..], n long. Four sums need not wait for one another.
function dot(x, i, y, j, n) {
  let a = 0, b = 0, c = 0, d = 0;
  for (const end = i + n; i < end; i += 4, j += 4) {
    a += x[i] * y[j];
    b += x[i + 1] * y[j + 1];
    c += x[i + 2] * y[j + 2];
    d += x[i + 3] * y[j + 3];
  }
  return a + b + c + d;
}

// x (T, in) and a matrix of the file, (out, in) -> (T, out). Its rows are read once for all of x.
function linear(x, {shape: [out, n], data}) {
  const T = x.length / n;
  const y = new Float32Array(T * out);
  for (let o = 0; o < out; o++)
    for (let t = 0; t < T; t++) y[t * out + o] = dot(x, t * n, data, o * n, n);
  return y;
}

// x / sqrt(mean(x^2) + eps) * weight, for each row.
function rmsNorm(x, {data: weight}, eps) {
  const D = weight.length;
  const scale = split(x, D).map(row => 1 / Math.sqrt(dot(row, 0, row, 0, D) / D + eps));
  return x.map((value, i) => value * scale[Math.floor(i / D)] * weight[i % D]);
}

// Rotary embedding in place: element k turns with element k + hd/2, not with its neighbour.
function rotate(x, rows, hd, frequencies) {
  const width = x.length / rows.length;
  rows.forEach(({position}, t) => frequencies.forEach((f, k) => {
    const cos = Math.cos(position * f);
    const sin = Math.sin(position * f);
    for (let i = t * width + k; i < (t + 1) * width; i += hd) {
      const a = x[i];
      const b = x[i + hd / 2];
      x[i] = a * cos - b * sin;
      x[i + hd / 2] = b * cos + a * sin;
    }
  }));
}

function attention(w, x, rows, keys, values, c) {      // (T, D) -> (T, D)
  const {H, G, hd} = c;
  const normed = rmsNorm(x, w.attnNorm, c.eps);
  const [q, k, v] = [w.q, w.k, w.v].map(matrix => linear(normed, matrix));
  rotate(q, rows, hd, c.frequencies);
  rotate(k, rows, hd, c.frequencies);
  const width = G * hd;
  split(k, width).forEach((row, t) => keys.set(row, rows[t].slot * width));
  split(v, width).forEach((row, t) => values.set(row, rows[t].slot * width));
  const mixed = new Float32Array(q.length);
  rows.forEach(({position, slot}, t) => {
    for (let head = 0; head < H; head++) {
      const at = (t * H + head) * hd;
      const shift = Math.floor(head / (H / G)) * hd;   // H / G query heads share a kv head
      const place = n => (n < position ? n : slot) * width + shift;
      const scores = new Float64Array(position + 1)
        .map((_, n) => dot(q, at, keys, place(n), hd) / Math.sqrt(hd));
      softmax(scores).forEach((weight, n) => {
        for (let i = 0, value = place(n); i < hd; i++) mixed[at + i] += weight * values[value + i];
      });
    }
  });
  return linear(mixed, w.out);
}

function feedForward(w, x, eps) {                      // (T, D) -> (T, D)
  const normed = rmsNorm(x, w.mlpNorm, eps);
  const up = linear(normed, w.up);
  const gated = linear(normed, w.gate).map((gate, i) => gate / (1 + Math.exp(-gate)) * up[i]);
  return linear(gated, w.down);
}

const plus = (x, y) => x.map((value, i) => value + y[i]);

class Llama {
  constructor(config, tensors) {
    const c = this.cfg = readConfig(config);
    c.frequencies = ropeFrequencies(c);
    this.embed = tensors["model.embed_tokens.weight"];
    this.norm = tensors["model.norm.weight"];
    this.lmHead = c.tied ? this.embed : tensors["lm_head.weight"];
    this.layers = Array.from({length: c.L}, (_, i) => {
      const part = name => tensors[`model.layers.${i}.${name}.weight`];
      return {attnNorm: part("input_layernorm"), q: part("self_attn.q_proj"),
        k: part("self_attn.k_proj"), v: part("self_attn.v_proj"), out: part("self_attn.o_proj"),
        mlpNorm: part("post_attention_layernorm"), gate: part("mlp.gate_proj"),
        up: part("mlp.up_proj"), down: part("mlp.down_proj")};
    });
  }

  // The states h[0..L], (T, D) each. A layer that is skipped hands its input on, writing nothing.
  forward(ids, rows, cache, skip = []) {
    const D = this.cfg.D;
    const h = [new Float32Array(ids.length * D)];
    ids.forEach((id, t) => h[0].set(this.embed.data.subarray(id * D, (id + 1) * D), t * D));
    this.layers.forEach((_, i) => h.push(skip[i] ? h[i] : this.layer(i, h[i], rows, cache)));
    return h;
  }

  // h[i+1] = f_i(h[i])
  layer(i, x, rows, cache) {
    const w = this.layers[i];
    x = plus(x, attention(w, x, rows, cache.keys[i], cache.values[i], this.cfg));
    return plus(x, feedForward(w, x, this.cfg.eps));
  }

  // h[L] -> logits, a (V,) for each row.
  head(x) {
    return split(linear(rmsNorm(x, this.norm, this.cfg.eps), this.lmHead), this.cfg.V);
  }
}

// -------------------------------------------------------------------------------- dynamic program

function cosine(x, y) {
  const product = (a, b) => dot(a, 0, b, 0, a.length);
  const lengths = Math.sqrt(product(x, x)) * Math.sqrt(product(y, y));
  return product(x, y) / Math.max(lengths, Number.MIN_VALUE);
}

// h: L+1 states (D,). runLayer(i, [g, ..]) -> [g, ..], each as if alone. In a cell of `ways` stand
// both cosines, [run, skip], -Infinity where a way is closed; the nearer one is taken, and of equal
// ones to skip.
class Choice {
  constructor(h, runLayer, M) {
    this.M = M;
    this.ways = [[[1, -Infinity]]];
    let g = [h[0]];
    for (let i = 1; i < h.length; i++) {
      const after = runLayer(i - 1, g);
      const row = [];
      for (let j = 0; j <= Math.min(i, M); j++) {
        const run = j < i ? cosine(after[j], h[i]) : -Infinity;
        const skip = j > 0 ? cosine(g[j - 1], h[i]) : -Infinity;
        row.push([run, skip]);
      }
      g = row.map(([run, skip], j) => run > skip ? after[j] : g[j - 1]);
      g[0] = h[i];                                     // nothing skipped: the full model's own
      this.ways.push(row);
    }
    this.D = this.ways.map(row => row.map(([run, skip]) => Math.max(run, skip)));
    this.skipped = this.ways.map(row => row.map(([run, skip]) => !(run > skip)));
  }

  // The cells of the way back from (i, j), and which layers it leaves out.
  back(i = this.ways.length - 1, j = this.M) {
    const skip = Array(this.ways.length - 1).fill(false);
    const cells = [[i, j]];
    for (; i > 0; i--) {
      skip[i - 1] = this.skipped[i][j];
      if (skip[i - 1]) j--;
      cells.push([i - 1, j]);
    }
    return {cells, skip};
  }
}

// ---------------------------------------------------------------------------------------- sampler

function softmax(x, temperature = 1) {
  const top = x.reduce((a, b) => Math.max(a, b), -Infinity);
  const e = Float64Array.from(x, value => Math.exp((value - top) / temperature));
  const total = sum(e);
  return e.map(value => value / total);
}

function probabilities(logits, {temperature}) {        // (V,) -> (V,); greedy is one-hot
  if (temperature > 0) return softmax(logits, temperature);
  const p = new Float64Array(logits.length);
  p[logits.indexOf(Math.max(...logits))] = 1;
  return p;
}

const acceptance = (p, q) => Math.min(1, p / q);
const overlap = (p, q) => sum(p.map((x, i) => Math.min(x, q[i])));

// max(0, p - q), and norm of it. Behind the draft there is no q: all of p is owed.
const owed = (p, q) => p.map((x, i) => Math.max(0, x - (q?.[i] ?? 0)));
function residual(p, q) {
  const mass = sum(owed(p, q));
  return mass > 0 ? owed(p, q).map(x => x / mass) : p;
}

// From `source` come uniform numbers. `u` holds those of a round: one for each drafted token, one
// for the verdict on each, one for the own token.
class Chance {
  constructor(source) {
    this.source = source;
    this.u = [];
  }

  uniform() {
    this.u.push(this.source());
    return this.u.at(-1);
  }

  // Each token is accepted with its probability a, until one is not: how many.
  accept(a) {
    const kept = a.map(x => this.uniform() < x);
    return kept.includes(false) ? kept.indexOf(false) : a.length;
  }

  // The first token at which the running sum exceeds u times the total.
  draw(p) {
    const limit = this.uniform() * sum(p);
    let before = 0;
    for (const [token, x] of p.entries()) {
      if (x > 0 && before + x > limit) return token;
      before += x;
    }
    throw new Error("the logits are not finite numbers: damaged weights?");
  }
}

// Uniform numbers of 53 bits from a seed (Steele's splitmix, 32 bits of state).
function seeded(seed) {
  const bits = () => {
    let z = seed = (seed + 0x9e3779b9) | 0;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (z ^ (z >>> 15)) >>> 0;
  };
  return () => ((bits() >>> 5) * 2 ** 26 + (bits() >>> 6)) / 2 ** 53;
}

// -> how many are accepted, and the full model's own token after them.
function judge(p, q, drafted, chance) {
  const a = drafted.map((token, i) => acceptance(p[i][token], q[i][token]));
  const accepted = chance.accept(a);
  return [accepted, chance.draw(residual(p[accepted], q[accepted]))];
}

// -------------------------------------------------------------------------------------- the loop

// The table for up to M layers, by the states h of the token at `position`. What its candidates
// write lies after that position.
function choose(model, cache, position, h, M) {
  const D = model.cfg.D;
  const rows = candidates(position, M + 1);
  const runLayer = (i, g) => {
    const x = new Float32Array(g.length * D);
    g.forEach((state, j) => x.set(state, j * D));
    return split(model.layer(i, x, rows.slice(0, g.length), cache), D);
  };
  return new Choice(h, runLayer, M);
}

// The paper's fixed numbers. With a set to begin with, layers are not chosen after the prefill.
class Paper {
  constructor(s, L, skip) {
    this.s = s;
    this.first = skip ? s.interval : 0;
    this.skip = skip ?? flags([], L);
  }

  goesOn(confidence) {
    const k = confidence.length;
    return k < this.s.K && (k === 0 || confidence[k - 1] >= this.s.exit_threshold);
  }

  // How many layers at most are to be chosen after verification n; 0: none.
  due(n) {
    return n >= this.first && n % this.s.interval === 0 && this.s.K > 0 ? this.s.M : 0;
  }
}

// Continue `prompt` by s.N tokens, or to a stop token; yields each round as it ends. Beside what
// speculative.Round has, a round keeps p, q and its uniform numbers.
function* generate(model, prompt, s, chance, policy = new Paper(s, model.cfg.L)) {
  const text = [...prompt];
  const end = text.length + s.N;
  const cache = new Cache(model.cfg, end + s.M + 1);
  for (let n = 0, done = false; !done; n++) {
    chance.u = [];
    const began = performance.now();
    const start = text.length;
    const cached = n > 0 ? start - 1 : 0;              // slots that hold the full model's entries
    const most = n > 0 ? end - start - 1 : 0;

    // 1. Draft: one token by one, without some layers.
    const skip = policy.skip;
    const [drafted, q, confidence] = [[], [], []];
    let last = text.at(-1);
    while (drafted.length < most && !s.stop_ids.includes(last) && policy.goesOn(confidence)) {
      const t = start - 1 + drafted.length;
      const logits = model.head(model.forward([last], sequence(t, 1), cache, skip).at(-1))[0];
      q.push(probabilities(logits, s));
      last = chance.draw(q.at(-1));
      drafted.push(last);
      confidence.push(Math.max(...softmax(logits)));
    }
    const k = drafted.length;
    const why = {prefill: n === 0, K: k === s.K, N: k === most, stop: s.stop_ids.includes(last),
      confidence: confidence[k - 1] < s.exit_threshold, policy: true};
    const ended = Object.keys(why).find(reason => why[reason]);

    // 2. Verify: one full pass over the last token and the draft (at first, the prompt).
    const ids = [...text.slice(cached), ...drafted];
    const D = model.cfg.D;
    const h = model.forward(ids, sequence(cached, ids.length), cache)
      .map(x => x.subarray(-(k + 1) * D));             // L+1 times the last token, d1 .. dk
    const p = model.head(h.at(-1)).map(logits => probabilities(logits, s));
    const [accepted, own] = judge(p, q, drafted, chance);
    const kind = k === 0 ? "plain" : accepted < k ? "residual" : "bonus";
    const emitted = [...drafted.slice(0, accepted), own];
    const stop = emitted.findIndex(token => s.stop_ids.includes(token));
    if (stop >= 0) emitted.length = stop + 1;
    text.push(...emitted);
    done = stop >= 0 || text.length === end;

    // 3. Choose layers anew, by the states of the last token that was read and kept.
    const states = h.map(x => x.subarray(accepted * D, (accepted + 1) * D));
    const position = start - 1 + accepted;
    const M = done ? 0 : policy.due(n);
    const choice = M > 0 ? choose(model, cache, position, states, M) : null;
    if (choice) policy.skip = choice.back().skip;
    const seconds = (performance.now() - began) / 1000;
    yield {n, start, skip, drafted, q, p, u: chance.u, confidence, ended, accepted, own, kind,
      emitted, choice, position, done, seconds};
  }
}

// Is a drafted token of the round accepted? null: it stands after a rejection.
const verdict = (r, step) => step > r.accepted ? null : step < r.accepted;

// How much of what a draft without these layers says would be kept, were each of the tokens
// ids[from ..] the first of a draft: the mean of sum(min(p, q)). `cache` has the full model's
// entries of all ids, p its distributions. A row's own entry lies after the text.
function agreement(model, cache, ids, from, skip, p, s) {
  const rows = p.map((_, n) => ({position: from + n, slot: ids.length + n}));
  const h = model.forward(ids.slice(from, from + p.length), rows, cache, skip);
  const shares = model.head(h.at(-1)).map((logits, n) => overlap(p[n], probabilities(logits, s)));
  return sum(shares) / shares.length;
}

// ----------------------------------------------------------------------------------------- traces

const flags = (list, L) => Array.from({length: L}, (_, i) => list.includes(i));
const indices = skip => skip.flatMap((out, i) => out ? [i] : []);

// The lines of a round (oracle/TRACE.md).
function events(r) {
  const k = r.drafted.length;
  const [p, q] = [r.p[r.accepted], r.q[r.accepted]];
  const line = (event, fields) => ({event, round: r.n, ...fields});
  const judged = (token, step) => {
    const [x, y] = [r.p[step][token], r.q[step][token]];
    return {step, token, p: x, q: y, a: acceptance(x, y), u: r.u[k + step],
      accepted: verdict(r, step)};
  };
  const lines = [
    line("round", {start: r.start, skip: indices(r.skip), ended: r.ended}),
    ...r.drafted.map((token, step) => line("draft", {step, token, q: r.q[step][token],
      confidence: r.confidence[step], u: r.u[step]})),
    ...r.drafted.map((token, step) => line("verify", judged(token, step))),
    line("own", {kind: r.kind, token: r.own, probability: residual(p, q)[r.own], u: r.u[2 * k],
      p: p[r.own], q: q?.[r.own] ?? 0, mass: q ? sum(owed(p, q)) : 1}),
    line("emit", {tokens: r.emitted})];
  if (r.choice)
    lines.push(line("optimise", {position: r.position, M: r.choice.M, D: r.choice.D,
      skipped: r.choice.skipped.map(row => row.map(Number).join("")),
      skip: indices(r.choice.back().skip)}));
  return lines;
}

// A whole run as text. `about`: the SHA-256 of the model's files.
function traceOf(cfg, s, prompt, rounds, about) {
  const {frequencies, ...config} = cfg;
  const header = {event: "header", schema: "clasp-trace", version: 5, program: "clasp-mini page",
    model: about, versions: {}, config, dtype: "float32",
    settings: {...s, top_k: 0, top_p: 1, r: 1}, costs: null, prompt_ids: prompt};
  const tokens = rounds.flatMap(r => r.emitted);
  const reason = s.stop_ids.includes(tokens.at(-1)) ? "stop" : "length";
  const end = {event: "end", reason, emitted: tokens.length};
  return [header, ...rounds.flatMap(events), end].map(line => JSON.stringify(line) + "\n").join("");
}

// The policy that decides what the lines of a trace say was decided; `numbers` are theirs.
class Recorded {
  constructor(L, lines) {
    const of = event => lines.filter(line => line.event === event);
    this.n = 0;
    this.sets = of("round").map(line => flags(line.skip, L));
    this.drafts = of("draft");
    this.choices = of("optimise");
    // Of a token that is not judged the number may be missing, and any will do.
    this.numbers = lines.filter(line => "u" in line).map(line => line.u ?? 0);
  }

  get skip() {
    return this.sets[this.n];
  }

  goesOn(confidence) {
    return confidence.length < this.drafts.filter(line => line.round === this.n).length;
  }

  due(n) {
    this.n = n + 1;
    return this.choices.find(line => line.round === n)?.M ?? 0;
  }

  set skip(_) {}                                       // rounding may have chosen others
}

// ------------------------------------------------------------------------------------------ text

function bytesOf(text) {                               // a byte for each character
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const SPLIT = new RegExp([                             // text/tokenizer.py, SPLIT
  /'(?:[sSſ]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])/u,
  /[^\r\n\p{L}\p{N}]?\p{L}+/u,
  /\p{N}{1,3}/u,
  / ?[^\p{White_Space}\p{L}\p{N}]+[\r\n]*/u,
  /\p{White_Space}*[\r\n]+/u,
  /\p{White_Space}+(?!\P{White_Space})/u,
  /\p{White_Space}+/u].map(each => each.source).join("|"), "gu");

// Byte-pair encoding by a tokenizer.model: lines "base64(bytes) rank".
class Tokenizer {
  constructor(file) {
    this.tokens = [];
    this.ranks = new Map();
    for (const line of file.trim().split("\n")) {
      const [token, rank] = line.split(" ");
      this.tokens[rank] = atob(token);
      this.ranks.set(atob(token), Number(rank));
    }
    this.bos = this.tokens.length;
  }

  encode(text) {
    return (text.match(SPLIT) ?? []).flatMap(piece => this.merge(piece));
  }

  // Of all neighbours the two of the lowest rank are joined, until none are a token.
  merge(piece) {
    const parts = Array.from(new TextEncoder().encode(piece), b => String.fromCharCode(b));
    for (;;) {
      const ranks = parts.slice(1).map((part, i) => this.ranks.get(parts[i] + part) ?? Infinity);
      const lowest = Math.min(...ranks);
      if (lowest === Infinity) return parts.map(part => this.ranks.get(part));
      const best = ranks.indexOf(lowest);
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }

  bytes(id) {
    return bytesOf(this.tokens[id] ?? "");             // special tokens have no text
  }

  // The texts of tokens in a row; a character that is split over several is the last one's.
  pieces(ids) {
    const decoder = new TextDecoder();
    return ids.map(id => decoder.decode(this.bytes(id), {stream: true}));
  }
}
