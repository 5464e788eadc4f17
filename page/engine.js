"use strict";
// CLaSp in plain JavaScript: model, dynamic program, sampler, loop, with the names and letters of
// llama.py, dp_layer_skip.py and speculative.py. oracle/check_trace.py passes the traces it writes.
//
// States and logits are flat Float32Arrays, a row after the other. Sums are float64, as all numbers
// of JavaScript are.

// ------------------------------------------------------------------------------------------ files

const READ = {
  F32: bytes => new Float32Array(bytes),
  BF16: bytes => {                                     // the upper half of a float32
    const half = new Uint16Array(bytes);
    const wide = new Uint32Array(half.length);
    for (let i = 0; i < half.length; i++) wide[i] = half[i] << 16;
    return new Float32Array(wide.buffer);
  },
};

// The bytes of a safetensors file -> name: {shape, data}.
function readSafetensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, {dtype, shape, data_offsets: [from, to]}] of Object.entries(header)) {
    if (!READ[dtype]) throw new Error(`${name} is ${dtype}; F32 and BF16 can be read`);
    const data = READ[dtype](buffer.slice(8 + size + from, 8 + size + to));
    tensors[name] = {shape, data};
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

// x (T, in) and a matrix of the file, (out, in) -> (T, out). Its rows are read once for all of x.
function linear(x, {shape: [out, n], data}) {
  const T = x.length / n;
  const y = new Float32Array(T * out);
  for (let o = 0; o < out; o++)
    for (let t = 0; t < T; t++) {
      let a = 0, b = 0, c = 0, d = 0;
      for (let i = t * n, j = o * n, end = i + n; i < end; i += 4, j += 4) {
        a += x[i] * data[j];
        b += x[i + 1] * data[j + 1];
        c += x[i + 2] * data[j + 2];
        d += x[i + 3] * data[j + 3];
      }
      y[t * out + o] = a + b + c + d;
    }
  return y;
}

// x / sqrt(mean(x^2) + eps) * weight, for each row.
function rmsNorm(x, weight, eps) {
  const D = weight.length;
  const y = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += D) {
    let sum = 0;
    for (let i = 0; i < D; i++) sum += x[row + i] ** 2;
    const scale = 1 / Math.sqrt(sum / D + eps);
    for (let i = 0; i < D; i++) y[row + i] = x[row + i] * scale * weight[i];
  }
  return y;
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
  rows.forEach(({slot}, t) => {
    keys.set(k.subarray(t * width, (t + 1) * width), slot * width);
    values.set(v.subarray(t * width, (t + 1) * width), slot * width);
  });
  const mixed = new Float32Array(q.length);
  rows.forEach(({position, slot}, t) => {
    for (let head = 0; head < H; head++) {
      const at = (t * H + head) * hd;
      const shift = Math.floor(head / (H / G)) * hd;   // H / G query heads share a kv head
      const place = n => (n < position ? n : slot) * width + shift;
      const scores = new Float64Array(position + 1);
      for (let n = 0; n <= position; n++) {
        let sum = 0;
        for (let i = 0, key = place(n); i < hd; i++) sum += q[at + i] * keys[key + i];
        scores[n] = sum / Math.sqrt(hd);
      }
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
    const take = (name, ...shape) => {
      const tensor = tensors[name];
      if (`${tensor?.shape}` !== `${shape}`)
        throw new Error(`${name} is not of shape ${shape}, which config.json says`);
      return tensor;
    };
    const c = this.cfg = readConfig(config);
    c.frequencies = ropeFrequencies(c);
    const {D, ffn, V} = c;
    const [Q, KV] = [c.H * c.hd, c.G * c.hd];
    this.embed = take("model.embed_tokens.weight", V, D);
    this.norm = take("model.norm.weight", D).data;
    this.lmHead = c.tied ? this.embed : take("lm_head.weight", V, D);
    this.layers = Array.from({length: c.L}, (_, i) => {
      const part = (name, ...shape) => take(`model.layers.${i}.${name}.weight`, ...shape);
      return {attnNorm: part("input_layernorm", D).data, q: part("self_attn.q_proj", Q, D),
        k: part("self_attn.k_proj", KV, D), v: part("self_attn.v_proj", KV, D),
        out: part("self_attn.o_proj", D, Q), mlpNorm: part("post_attention_layernorm", D).data,
        gate: part("mlp.gate_proj", ffn, D), up: part("mlp.up_proj", ffn, D),
        down: part("mlp.down_proj", D, ffn)};
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

const split = (x, width) => Array.from({length: x.length / width},
  (_, t) => x.subarray(t * width, (t + 1) * width));

// -------------------------------------------------------------------------------- dynamic program

function cosine(a, b) {
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return ab / Math.max(Math.sqrt(aa) * Math.sqrt(bb), Number.MIN_VALUE);
}

// h: L+1 states (D,). runLayer(i, [g, ..]) -> [g, ..], each as if alone. In a cell of `ways` stand
// both cosines, [run, skip], -Infinity where a way is closed; the nearer one is taken, and of equal
// ones to skip.
function chooseSkip(h, runLayer, M) {
  const L = h.length - 1;
  const ways = [[[1, -Infinity]]];
  let g = [h[0]];
  for (let i = 1; i <= L; i++) {
    const after = runLayer(i - 1, g);
    const row = [];
    const states = [];
    for (let j = 0; j <= Math.min(i, M); j++) {
      const run = j < i ? cosine(after[j], h[i]) : -Infinity;
      const skip = j > 0 ? cosine(g[j - 1], h[i]) : -Infinity;
      row.push([run, skip]);
      states.push(run > skip ? after[j] : g[j - 1]);
    }
    states[0] = h[i];                                  // nothing skipped: the full model's own
    ways.push(row);
    g = states;
  }
  return new Choice(ways);
}

class Choice {
  constructor(ways) {
    this.ways = ways;
    this.D = ways.map(row => row.map(([run, skip]) => Math.max(run, skip)));
    this.skipped = ways.map(row => row.map(([run, skip]) => !(run > skip)));
    this.M = ways.at(-1).length - 1;
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
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map(value => value / sum);
}

function probabilities(logits, {temperature}) {        // (V,) -> (V,); greedy is one-hot
  if (temperature > 0) return softmax(logits, temperature);
  const p = new Float64Array(logits.length);
  p[logits.indexOf(Math.max(...logits))] = 1;
  return p;
}

const acceptance = (p, q) => Math.min(1, p / q);

const owedMass = (p, q) => p.reduce((sum, value, i) => sum + Math.max(0, value - q[i]), 0);

function residual(p, q) {                              // norm(max(0, p - q))
  const mass = owedMass(p, q);
  return mass > 0 ? p.map((value, i) => Math.max(0, value - q[i]) / mass) : p;
}

const overlap = (p, q) => p.reduce((sum, value, i) => sum + Math.min(value, q[i]), 0);

// A chance answers from `uniform`, and keeps its answers: draws {token, probability, u}, and
// verdicts {a, u, accepted}.
class Chance {
  constructor(uniform) {
    this.uniform = uniform;
    this.forget();
  }

  forget() {
    this.draws = [];
    this.verdicts = [];
  }

  accept(a) {
    const u = this.uniform();
    this.verdicts.push({a, u, accepted: u < a});
    return u < a;
  }

  draw(p) {
    const u = this.uniform();
    const total = p.reduce((a, b) => a + b, 0);
    let sum = 0;
    const token = p.findIndex(value => value > 0 && (sum += value) > u * total);
    if (token < 0) throw new Error("the logits are not finite numbers: damaged weights?");
    this.draws.push({token, probability: p[token], u, from: sum - p[token], to: sum});
    return token;
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

// -> how many are accepted, and the full model's own token behind them.
function judge(p, q, drafted, chance) {
  const k = drafted.length;
  let accepted = 0;
  while (accepted < k) {
    const token = drafted[accepted];
    if (!chance.accept(acceptance(p[accepted][token], q[accepted][token]))) break;
    accepted++;
  }
  const owed = accepted < k ? residual(p[accepted], q[accepted]) : p[k];
  return [accepted, chance.draw(owed)];
}

// -------------------------------------------------------------------------- the paper's loop

// The paper's fixed numbers. With a set to begin with, layers are not chosen after the prefill.
class Paper {
  constructor(s, L, skip) {
    this.s = s;
    this.first = skip ? s.interval : 0;
    this.skip = skip ?? Array(L).fill(false);
  }

  goesOn(confidence) {
    const k = confidence.length;
    return k < this.s.K && (k === 0 || confidence[k - 1] >= this.s.exit_threshold);
  }

  due(n) {
    return n >= this.first && n % this.s.interval === 0 && this.s.K > 0 && this.s.M > 0;
  }

  optimise(model, cache, position, h) {
    const D = model.cfg.D;
    const rows = candidates(position, this.s.M + 1);
    const runLayer = (i, g) => {
      const x = new Float32Array(g.length * D);
      g.forEach((state, j) => x.set(state, j * D));
      return split(model.layer(i, x, rows.slice(0, g.length), cache), D);
    };
    const choice = chooseSkip(h, runLayer, this.s.M);
    this.skip = choice.back().skip;
    return choice;
  }
}

// Continue `prompt` by s.N tokens, or to a stop token; yields each round as it ends. Beside what
// speculative.Round has, a round keeps p and q, and its draws and verdicts.
function* generate(model, prompt, s, chance, policy = new Paper(s, model.cfg.L)) {
  const text = [...prompt];
  const end = text.length + s.N;
  const cache = new Cache(model.cfg, end + s.M + 1);
  for (let n = 0, done = false; !done; n++) {
    chance.forget();
    const clock = [performance.now()];
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
    clock.push(performance.now());

    // 2. Verify: one full pass over the last token and the draft (at first, the prompt).
    const k = drafted.length;
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
    clock.push(performance.now());

    // 3. Choose layers anew, by the states of the last token that was read and kept.
    const states = h.map(x => x.subarray(accepted * D, (accepted + 1) * D));
    const position = start - 1 + accepted;
    const choice = !done && policy.due(n) ? policy.optimise(model, cache, position, states) : null;
    clock.push(performance.now());
    const seconds = [0, 1, 2].map(i => (clock[i + 1] - clock[i]) / 1000);
    yield {n, start, skip, drafted, q, p, confidence, accepted, own, kind, emitted, choice,
      position, done, seconds, draws: chance.draws, verdicts: chance.verdicts,
      ended: ended(n, s, drafted, confidence, end - start)};
  }
}

function ended(n, s, drafted, confidence, left) {      // why no more was drafted
  const k = drafted.length;
  if (n === 0) return "prefill";
  if (k === s.K) return "K";
  if (k === left - 1) return "N";
  if (k > 0 && s.stop_ids.includes(drafted[k - 1])) return "stop";
  return k > 0 && confidence[k - 1] < s.exit_threshold ? "confidence" : "policy";
}

// How much of what a draft without these layers says would be kept, were each of the tokens
// ids[from ..] the first of a draft: the mean of sum(min(p, q)). `cache` has the full model's
// entries of all ids, p its distributions. A row's own entry lies behind the text.
function agreement(model, cache, ids, from, skip, p, s) {
  const rows = p.map((_, n) => ({position: from + n, slot: ids.length + n}));
  const h = model.forward(ids.slice(from, from + p.length), rows, cache, skip);
  const shares = model.head(h.at(-1)).map((logits, n) => overlap(p[n], probabilities(logits, s)));
  return shares.reduce((a, b) => a + b, 0) / shares.length;
}

// ----------------------------------------------------------------------------------------- traces

const indices = flags => flags.flatMap((flag, i) => flag ? [i] : []);

// The lines of a round (oracle/TRACE.md).
function events(r) {
  const k = r.drafted.length;
  const line = (event, fields) => ({event, round: r.n, ...fields});
  const never = {u: null, accepted: null};
  const of = (token, step) => ({p: r.p[step][token], q: r.q[step][token]});
  const {token, probability, u} = r.draws[k];
  const whole = {p: r.p[r.accepted][token], q: 0, mass: 1};
  const part = () => ({...of(token, r.accepted), mass: owedMass(r.p[r.accepted], r.q[r.accepted])});
  const lines = [
    line("round", {start: r.start, skip: indices(r.skip), ended: r.ended}),
    ...r.drafted.map((id, step) => line("draft", {step, token: id, q: of(id, step).q,
      confidence: r.confidence[step], u: r.draws[step].u})),
    ...r.drafted.map((id, step) => line("verify", {step, token: id, ...of(id, step),
      a: acceptance(of(id, step).p, of(id, step).q), ...never, ...r.verdicts[step]})),
    line("own", {kind: r.kind, token, probability, u, ...r.kind === "residual" ? part() : whole}),
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
  const header = {event: "header", schema: "clasp-trace", version: 4, program: "clasp-mini page",
    model: about, versions: {}, config, dtype: "float32",
    settings: {...s, top_k: 0, top_p: 1, r: 1}, costs: null, prompt_ids: prompt};
  const tokens = rounds.flatMap(r => r.emitted);
  const reason = s.stop_ids.includes(tokens.at(-1)) ? "stop" : "length";
  const end = {event: "end", reason, emitted: tokens.length};
  return [header, ...rounds.flatMap(events), end].map(line => JSON.stringify(line) + "\n").join("");
}

// What a trace decided, decided again: `uniform` are its numbers in their order, and drafts are as
// long, without the same layers, and layers chosen after the same rounds.
class Recorded extends Paper {
  constructor(s, L, lines) {
    super(s, L);
    this.n = 0;
    this.rounds = [];
    const numbers = [];
    for (const line of lines) {
      if (line.event === "round") this.rounds.push({k: 0, M: 0, skip: line.skip});
      if (line.event === "draft") this.rounds.at(-1).k++;
      if (line.event === "optimise") this.rounds.at(-1).M = line.M;
      if (typeof line.u === "number") numbers.push(line.u);
    }
    this.uniform = () => numbers.shift();
  }

  goesOn(confidence) {
    return confidence.length < this.rounds[this.n].k;
  }

  due(n) {
    this.n = n + 1;
    const next = this.rounds[this.n]?.skip ?? [];
    this.skip = this.skip.map((_, i) => next.includes(i));
    return this.rounds[n].M > 0;
  }

  optimise(...how) {
    const skip = this.skip;
    this.s = {...this.s, M: this.rounds[this.n - 1].M};
    const choice = super.optimise(...how);
    this.skip = skip;
    return choice;
  }
}

// ------------------------------------------------------------------------------------------ text

const latin1 = bytes => String.fromCharCode(...bytes); // a string with a character per byte
function bytesOf(text) {
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
    const parts = [...latin1(new TextEncoder().encode(piece))];
    if (this.ranks.has(parts.join(""))) return [this.ranks.get(parts.join(""))];
    for (;;) {
      let best = -1;
      let lowest = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
        if (rank < lowest) [best, lowest] = [i, rank];
      }
      if (best < 0) return parts.map(part => this.ranks.get(part));
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
