"""How often the host waits for a GPU: counted without one, on PyTorch's device `meta`."""
import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dp_layer_skip import choose_skip, torch
from gpu.stand_in import moved, replayed
from policy.adaptive import Adaptive
from speculative import Chance, Settings, generate
from tests.helpers import tiny_llama


class Far(TorchDispatchMode):
    """A GPU that computes nothing. What the host asks it for is counted, and answered with ones, in
    several numbers the first with 0: so no token is accepted, and all logits are finite. What
    mixes devices fails, and what would first have to know how many there are."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            out = call.decompose(*args, **kwargs)      # until it is what a device can be asked for
        if out is not NotImplemented:
            return out
        name = call.name().removeprefix("aten::").partition(".")[0]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        far = [x for x in given if x.device.type == "meta"]
        here = [x for x in given if x.device.type == "cpu" and x.dim() > 0]
        if far and name == "_local_scalar_dense":
            self.reads += 1
            return 1
        if far and name == "_to_copy" and str(kwargs.get("device")) == "cpu":
            self.reads += 1
            out = torch.ones(far[0].shape, dtype=kwargs.get("dtype") or far[0].dtype)
            if out.numel() > 1:
                out.view(-1)[0] = 0
            return out
        assert not (far and here), f"{name} of two devices"
        masks = [x for x in given[1:] if x.dtype == torch.bool]
        assert not (masks and name in ("index", "index_put_")), f"{name} by a mask"
        return call(*args, **kwargs)


@pytest.mark.parametrize("ask, read", [
    (bool, True), (float, True), (lambda x: x.tolist(), True), (lambda x: x.cpu(), True),
    (lambda x: x[x > 0], False), (lambda x: x.index_put_((x > 0,), x[0, 0]), False),
    (lambda x: x.nonzero(), False), (lambda x: x + torch.ones(1), False)])
def test_who_asks_a_gpu_is_seen(ask, read):
    """Rejects a count that misses a way to wait for a GPU, or a call of two devices."""
    with Far() as far:
        x = torch.ones(1, 1, device="meta")
        if read:
            ask(x)
        else:
            with pytest.raises((AssertionError, NotImplementedError)):
                ask(x)
    assert far.reads == read


@pytest.mark.parametrize("how, ours", [
    (dict(), False), (dict(K=3, M=2, interval=1), False), (dict(), True),
    (dict(K=3, M=2, interval=1, temperature=0.8, top_k=5, top_p=0.9), False)])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_gpu_is_waited_for_once_per_drafted_token_and_once_per_verify(
        monkeypatch, how, ours, graphs):
    """Rejects a read more: of a token and its confidence apart, of a verdict, the own token and
    whether the logits are numbers apart, of what a mask selects; ids that come back before the
    next step, or are made on another device; and a read inside a recording, which a graph cannot
    hold. A choice of layers is waited for twice, for its two tables. Our policy also asks how near
    p and q are: once per verify of a draft, and once per choice."""
    s = Settings(N=6, **how)
    policy = None
    if ours:
        policy = Adaptive(s, [1, 0.8, 0.6, 0.4], [1.0] * 5, M=2, interval=1)
    made = []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *of, **on: made.append(of) or tensor(*of, **on))
    with Far() as far:
        model = moved(tiny_llama(V=9, L=3), "meta")
        choose = choose_skip
        if graphs:
            model = replayed(model, 3, 2)
            choose = model.choose
            model.cache(40)
            assert far.reads == 0
        made.clear()
        rounds = list(generate(model, [1, 2], s, Chance(0), choose, policy))
    drafted = sum(len(r.drafted) for r in rounds)
    judged = sum(len(r.drafted) > 0 for r in rounds)
    choices = sum(r.choice is not None for r in rounds)
    assert (drafted > 5, choices > 1) == (bool(how) or ours,) * 2
    assert far.reads <= drafted + len(rounds) + ours * judged + (2 + ours) * choices
    # Of each round the last token, the verify's, the draft's and the numbers for its verdicts.
    assert len(made) <= 4 * len(rounds)
