// A sampler in another language, to show what levels 0 and 1 ask for.
//     python oracle/conformance.py --level 1 --program "node oracle/sampler/sampler.js"

function filtered(row, c) {
  const order = row.map((_, x) => x).sort((x, y) => row[y] - row[x] || x - y);
  if (c.temperature === 0) return row.map((_, x) => (x === order[0] ? 1 : 0));
  const kept = order.slice(0, c.top_k || row.length);
  const scaled = row.map((v, x) => (kept.includes(x) ? v ** (1 / c.temperature) : 0));
  const total = scaled.reduce((a, b) => a + b);
  let before = 0;
  for (const x of kept) {
    const share = scaled[x] / total;
    if (before >= c.top_p) scaled[x] = 0;              // the token that reaches top_p is kept
    before += share;
  }
  const mass = scaled.reduce((a, b) => a + b);
  return scaled.map((v) => v / mass);
}

function generator(seed) {                             // mulberry32
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), a | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function draw(weights, uniform) {                      // the first whose running sum exceeds u
  const u = uniform() * weights.reduce((a, b) => a + b);
  let sum = 0, drawn = 0;
  for (let x = 0; x < weights.length; x++) {
    sum += weights[x];
    if (weights[x] > 0) drawn = x;
    if (weights[x] > 0 && sum > u) break;
  }
  return drawn;
}

function round(c, p, q, last, room, uniform) {
  const read = [last];
  let sure = true;
  while (read.length <= Math.min(c.K, room - 1) && !c.stop.includes(last) && sure) {
    sure = Math.max(...c.q[last]) >= c.exit;
    last = draw(q[last], uniform);
    read.push(last);
  }
  const d = read.slice(1);
  const verdicts = d.map(uniform);                     // all of them, also after a rejection
  for (let s = 0; s < d.length; s++) {
    const now = p[read[s]], was = q[read[s]];
    if (verdicts[s] < Math.min(1, now[d[s]] / was[d[s]])) continue;
    const owed = now.map((v, x) => Math.max(0, v - was[x]));
    return [...d.slice(0, s), draw(owed.some((v) => v > 0) ? owed : now, uniform)];
  }
  return [...d, draw(p[last], uniform)];
}

function text(c, p, q, last, uniform) {
  const out = [];
  let room = c.N, rounds = 0;
  for (; room > 0 && !c.stop.includes(last); rounds++) {
    let emitted = round(c, p, q, last, room, uniform);
    const end = emitted.findIndex((x) => c.stop.includes(x));
    if (end >= 0) emitted = emitted.slice(0, end + 1);
    out.push(...emitted);
    room -= emitted.length;
    last = emitted[emitted.length - 1];
  }
  return [out, rounds];
}

for (const line of require("fs").readFileSync(0, "utf8").split("\n").filter(Boolean)) {
  const c = JSON.parse(line);
  const p = c.p.map((row) => filtered(row, c)), q = c.q.map((row) => filtered(row, c));
  const given = (c.u || []).values();                  // level 0: these, in their order
  const uniform = c.u ? () => given.next().value : generator(c.seed);
  const texts = [], rounds = [];
  for (let n = 0; n < c.texts; n++) {
    const rows = [c.prompt].flat().map((last) => text(c, p, q, last, uniform));
    texts.push(Array.isArray(c.prompt) ? rows.map((row) => row[0]) : rows[0][0]);
    rounds.push(rows[0][1]);
  }
  console.log(JSON.stringify({ texts, rounds }));
}
