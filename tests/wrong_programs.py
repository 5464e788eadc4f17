"""Deliberately wrong programs: the text of a module with edits, as errors are really written, some
of them met in real repositories. The tests, and the checker of traces, are held against them: each
must be rejected by something.
"""
import inspect
import re
import types

import dp_layer_skip
import llama
import speculative


def altered(module, *edits):
    """`module` as it would be with each (right, wrong) edit of its text: a wrong program, as one is
    really written. It detects changes as well: an edit whose place is gone fails."""
    text = inspect.getsource(module)
    for right, wrong in edits:
        pattern = r"\s+".join(map(re.escape, right.split(" ")))            # also across line breaks
        text, n = re.subn(pattern, lambda _: wrong, text)
        assert n, f"{module.__name__} has changed, and the table of wrong programs not: {right!r}"
    out = types.ModuleType(module.__name__)
    exec(compile(text, f"wrong_{module.__name__}", "exec"), out.__dict__)
    return out



DRAW, P = "drafted.append(chance.draw(q[-1]))", "p = probabilities(logits[-k - 1:], s)"
EXIT = "if not policy.goes_on(confidence[-1]) or drafted[-1] in s.stop_ids:"
EMITTED = "emitted = drafted[:verdict.accepted] + [verdict.token]"
VERIFY, DONE = "k = len(drafted) todo", "done = bool(stops)"
LATE = [("text, end, choice = list(prompt), len(prompt) + s.N, None",
         "text, end, choice, late = list(prompt), len(prompt) + s.N, None, 0"),
        ("read(model, todo, cached, cache,", "read(model, todo, cached + late, cache,"),
        ("model.cache(end +", "model.cache(end + 99 +")]
WRONG = {
    dp_layer_skip: {
        # Wrong ideas go into both versions, so that their being equal is no defence.
        "the worse choice wins": [("cos.max(0)", "cos.min(0)"), ("max(choi", "min(choi"),
                                  ("= -INF", "= INF")],
        "the target is always h[L]": [("cosine(h[i], ", "cosine(h[-1], ")],
        "the target is the layer's input": [("cosine(h[i], ", "cosine(h[i - 1], ")],
        "several tokens are held against h[i]": [("if h.shape[1] == 1:", "if True:")],
        "an error is added to a state that has it already": [
            ("end + (g.to(end.dtype) - h[i])", "end + g.to(end.dtype)")],
        "errors ride along in the states' dtype": [
            ("end = h[-1].to(torch.promote_types(h.dtype, torch.float32))", "end = h[-1]")],
        "the way back reads one row early": [
            ("j - self.parents[i][j]", "j - self.parents[i - 1][j]")],
        "the way back names the next layer": [("self.path(j)[-2::-1]", "self.path(j)[::-1][:-1]")],
        "ties are skipped": [
            ("cos.max(0)", "(cos + torch.tensor([[0.0], [1e-15]])).max(0)"),
            ("max(choices", "max(choices[::-1]")],
        "cell (i,i) does not know it skipped": [
            ("in ((best, NAN), (skipped, 0))", "in ((best, NAN), (skipped * (skipped.cumsum(0) < i"
             "), 0))"), ("append((True, g", "append((j < i, g")],
        "skipping spends nothing": [
            ("torch.cat((g[:1], g))[:M + 1]", "torch.cat((g, g[-1:]))[:M + 1]"),
            ("g[i - 1, j - 1])", "g[i - 1, min(j, i - 1)])")],
        "g[i,0] is one layer late": [("g[0] = h[i]", "g[0] = h[i - 1]"),
                                     ("g[i, 0] = h[i]", "g[i, 0] = h[i - 1]")],
        "the losing state is kept": [("both[skipped,", "both[1 - skipped,")],
        "the losing cosine is told": [("best, skipped = cos.max(0)",
                                       "(best, _), (_, skipped) = cos.min(0), cos.max(0)")],
        "the cosine is bfloat16": [
            ("torch.promote_types(a.dtype, torch.float32)", "torch.bfloat16")],
        "the cosine is as wide as the states": [
            ("promote_types(a.dtype, torch.float32)", "promote_types(a.dtype, b.dtype)")],
        "a zero state has no cosine": [("/ norms.clamp_min(torch.finfo(wide).tiny)", "/ norms")],
        "several tokens are compared by their mean state": [
            ("cosine(end, end + (g.to(end.dtype) - h[i])).mean(-1)",
             "cosine(end.mean(0), (end + (g.to(end.dtype) - h[i])).mean(-2))")],
        "several tokens are compared by the last": [
            ("cosine(end, end + (g.to(end.dtype) - h[i])).mean(-1)",
             "cosine(end, end + (g.to(end.dtype) - h[i]))[..., -1]")],
        "the host waits for every layer": [("both = torch.stack", "assert g.isfinite().all()\n"
                                            "        both = torch.stack")],
    },
    speculative: {
        "residual = p": [("owed = (p - q).clamp(min=0)", "owed = p")],
        "residual through a softmax": [
            ("return torch.where(mass > 0, owed / mass, p)", "return (p - q).softmax(-1)")],
        "residual without max(0, .)": [("owed = (p - q).clamp(min=0)", "owed = (p - q).abs()")],
        "lenient acceptance": [(".clamp(max=1)", ".mul(1.3).clamp(max=1)")],
        "acceptance the wrong way up": [("(p.double() / q.double())", "(q.double() / p.double())")],
        "accepts at u = a": [("self.uniform() < a", "self.uniform() <= a")],
        "draws at u = the running sum": [("(cdf > self.uniform()", "(cdf >= self.uniform()")],
        "the correction is drawn with the uniform that rejected": [
            ("return self.uniform() < a", "self.u = self.uniform()\n        return self.u < a"),
            ("(cdf > self.uniform()", "(cdf > (self.__dict__.pop('u', 0) or self.uniform())")],
        "argmax draft scored with a softmax q": [(DRAW, "drafted.append(int(q[-1].argmax()))")],
        "q at temperature 1": [(DRAW, DRAW + "\n                q[-1] = logits[0].softmax(-1)")],
        "bonus from unfiltered logits": [
            (P, P + "\n        p[-1] = logits[-1].softmax(-1)")],
        "bonus from the row before": [("chance.draw(p[k])", "chance.draw(p[max(k - 1, 0)])")],
        "correction from the row before": [
            ("residual(p[r], q[r])", "residual(p[max(r - 1, 0)], q[max(r - 1, 0)])")],
        "p without the filters": [(P, P.replace(", s)", ", Settings(temperature=s.temperature))"))],
        "top-p before temperature": [
            ("logits / max(s.temperature, torch.finfo(logits.dtype).tiny)", "logits"),
            ("p / p.sum(-1, keepdim=True))",
             "torch.nn.functional.normalize(p ** (1 / (s.temperature or 1)), 1, -1))")],
        "top-p keeps one more where the mass is reached": [
            ("p.cumsum(-1) - p < max", "p.cumsum(-1) - p <= max")],
        "doubtful tokens are thrown away": [
            (EXIT, "if q[-1][drafted[-1]] < (s.exit_threshold or 0):\n                    drafted"
                   ".pop(), q.pop()\n                    break\n                if False:")],
        "a policy drops what it would not draft on from": [
            (EXIT, EXIT + "\n                    if drafted[-1] not in s.stop_ids:\n"
                          "                        drafted.pop(), q.pop(), confidence.pop()")],
        "a policy looks at p before a token is judged": [
            ("verdict = judge(p, q, drafted, chance)",
             "while drafted and p[len(drafted) - 1, drafted[-1]] < 0.2:\n            drafted.pop()"
             ", q.pop()\n        p, k = p[:len(drafted) + 1], len(drafted)\n"
             "        verdict = judge(p, q, drafted, chance)")],
        "drafting goes on behind a stop token": [(EXIT, EXIT.replace(" or drafted[-1] in s.stop_id"
                                                                     "s", ""))],
        "drafting ends at the threshold": [("confidence >= self.s.exit",
                                               "confidence > self.s.exit")],
        "the drafts' keys stay after a verify": [
            (VERIFY, "k = len(drafted)\n        was = cache.k[:, :, t:t + k + 1].clone()\n"
                     "        todo"),
            (DONE, "if k:\n            cache.k[:, :, t:t + k + 1] = was\n        " + DONE)],
        "a rejected draft's slots are not given back": [
            *LATE, (DONE, "late += k - verdict.accepted\n        " + DONE)],
        "position off by one after full acceptance": [
            *LATE, (DONE, "late += 0 < k == verdict.accepted\n        " + DONE)],
        "token 0 is no token": [
            (EMITTED, "emitted = [d for d in drafted[:verdict.accepted] + [verdict.token] if d]"
                      " or [1]")],
        "the text goes on after an accepted stop": [
            ("emitted = emitted[:stops[0] + 1]", "stops = []")],
        "layers are optimised a round late": [
            ("n % self.s.interval == 0", "n % self.s.interval == 1 % self.s.interval")],
        "the verify's seconds are the draft's too": [
            ("verifying - drafting,", "verifying - began,")],
    },
    llama: {
        "candidates see one another": [("(seen == slots[:, None])", "(seen > position)")],
        "candidates of a token see those of another": [
            ("(seen == slots[:, None])", "(seen == slots[:, None]) | (seen > t) & (seen < slots[:, "
             "None])")],
        "one position too far": [("return self.rows(position[:, 0], slots,",
                                  "return self.rows(position[:, 0] + 1, slots,")],
        "one position for all tokens": [("return self.rows(position[:, 0],",
                                         "return self.rows(0 * position[:, 0] + t,")],
        "each candidate has its own position": [
            ("return self.rows(position[:, 0],", "return self.rows(slots - 1,")],
        "the token's own entry is seen": [("(seen < position) |", "(seen <= position) |")],
        "the token before it is not seen": [("(seen < position) |", "(seen < position - 1) |")],
        "scratch begins at the probe": [("slots = seen[t + 1:]", "slots = seen[t:-1]")],
        "h[L] comes after the final norm": [
            ("[x[tail] for x in h]", "[x[tail] for x in h[:-1]] + [rms_norm(h[-1][tail], self.norm"
             ", self.eps)]")],
        "the interleaved rotary layout": [
            ("x.roll(x.shape[-1] // 2, -1)", "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)"),
            ("torch.cat((angle.cos(), angle.cos()), 1)", "angle.cos().repeat_interleave(2, 1)"),
            ("torch.cat((-angle.sin(), angle.sin()), 1)",
             "torch.stack((-angle.sin(), angle.sin()), 2).flatten(1)")],
        "decoding one position late": [("self.rows(slots, slots,",
                                        "self.rows(slots + (T == 1), slots,")],
        "LLaMA-3.1's stretching left out": [("if cfg.scaling:", "if None:")],
        "Transformers 5 not understood": [('c.get("rope_parameters", {})', '{}')],
        "the mask without + t": [("self.slot[:t + T] <= slots[:, None]",
                                  "self.slot[:t + T] <= self.slot[:T, None]")],
        "no causal mask": [("self.slot[:t + T] <= slots[:, None]",
                            "self.slot[:t + T] <= slots[-1] + 0 * slots[:, None]")],
        "scores divided by the root of D": [("c.hd ** -0.5", "c.D ** -0.5")],
        "query heads dealt to kv heads in turn": [
            ("q.reshape(T, c.G, R, c.hd)", "q.reshape(T, R, c.G, c.hd).transpose(1, 2)")],
        "a norm without eps": [("torch.add(eps,", "torch.add(0 * eps,")],
        "norms in bfloat16": [("wide = x.type(eps.dtype)", "wide, eps = x, eps.type(x.dtype)")],
        "rotary tables in bfloat16": [("wide = torch.promote_types(dtype, torch.float32)",
                                       "wide = dtype")],
    },
}
