"""Our plain greedy decoding against Hugging Face `generate`: same weights, one process, in turn; in
float32 on one thread for the demo, in bfloat16 on a GPU for a model named. It needs more than this
project's packages, so an environment of its own:

    python3 -m venv hf && hf/bin/pip install torch==2.13.0 transformers safetensors tiktoken numpy
    hf/bin/python bench/versus_transformers.py
    hf/bin/python bench/versus_transformers.py Meta-Llama-3-8B-Instruct      # on a CUDA GPU

Every contestant holds the weights: four times 16 GB for the 8B.
"""
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from llama import Llama, torch  # noqa: E402
from speculative import Chance, Settings, generate  # noqa: E402

try:
    import transformers
except ImportError as e:
    sys.exit(f"{Path(__file__).name}: {e}: this one needs an environment of its own\n\n{__doc__}")

DEMO, N, REPEATS = Path(__file__).resolve().parent.parent / "demo", 128, 9


def main() -> None:
    folder, device = (sys.argv[1], "cuda") if sys.argv[1:] else (DEMO, "cpu")
    torch.set_num_threads(1)
    model, settings = Llama.load(folder, device), Settings(N=N)
    ids = torch.randint(model.cfg.V // 2, (24,), generator=torch.Generator().manual_seed(0))
    fast = model
    if device == "cuda":
        from gpu.replay import recorded
        fast, _ = recorded(model, settings.K, settings.M, settings.r)

    def ours() -> list[int]:
        return [t for r in generate(fast, ids.tolist(), settings, Chance(0)) for t in r.emitted]

    def theirs(attention: str, **how: object) -> Callable[[], list[int]]:
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, attn_implementation=attention).eval().to(device)
        hf.generation_config.eos_token_id = None       # as ours: N tokens, whatever they are
        prompt = ids[None].to(device)

        @torch.inference_mode()
        def run() -> list[int]:
            out = hf.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                              max_new_tokens=N, pad_token_id=0, **how)
            return out[0, ids.numel():].tolist()
        return run

    contestants = {"ours": ours, "generate, sdpa": theirs("sdpa"),
                   "generate, eager": theirs("eager")}
    if device == "cuda":                               # generate compiles a static cache there
        contestants["generate, static cache"] = theirs("sdpa", cache_implementation="static")
    times, texts = {name: [] for name in contestants}, {}
    for repeat in range(REPEATS + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            texts[name] = run()
            if repeat:                                 # the first is the warm-up
                times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(t) for name, t in times.items()}
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device}, {dtype}, "
          f"1 thread; {len(ids)} random prompt tokens, {N} new, median of {REPEATS}")
    for name, t in median.items():
        print(f"{name:22} {N / t:6.1f} tokens/s, ours is {t / median['ours']:.2f} x as fast; text "
              f"{'equal' if texts[name] == texts['ours'] else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
