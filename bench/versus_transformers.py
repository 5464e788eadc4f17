"""Our plain greedy decoding against Hugging Face `generate`: same weights, one process, in turn. It
needs more than this project's packages, so an environment of its own:

    python3 -m venv hf && hf/bin/pip install torch==2.13.0 transformers safetensors tiktoken numpy
    hf/bin/python bench/versus_transformers.py demo      # float32, one thread
    hf/bin/python bench/versus_transformers.py DIR       # any other model: on a CUDA GPU, bfloat16
"""
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from llama import Llama, torch  # noqa: E402
from speculative import Chance, Settings, generate  # noqa: E402

try:
    import transformers
except ImportError as e:
    sys.exit(f"{Path(__file__).name}: {e}: this one needs an environment of its own\n\n{__doc__}")


def main(folder: str, N: int = 128, repeats: int = 9) -> None:
    device = "cpu" if Path(folder).name == "demo" else "cuda"
    torch.set_num_threads(1)
    model = Llama.load(folder, device)
    ids = torch.randint(model.cfg.V // 2, (1, 24), generator=torch.Generator().manual_seed(0))
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    hf = hf.eval().to(device)
    hf.generation_config.eos_token_id = None           # as ours: N tokens, whatever they are
    how = dict(do_sample=False, max_new_tokens=N, pad_token_id=0)
    if device == "cuda":
        from gpu.replay import recorded
        model, _ = recorded(model, 0, 0, 1)
        how["cache_implementation"] = "static"         # which `generate` compiles there

    def ours() -> list[int]:
        rounds = generate(model, ids[0].tolist(), Settings(N=N), Chance(0), None)
        return [token for r in rounds for token in r.emitted]

    @torch.inference_mode()
    def theirs() -> list[int]:
        prompt = ids.to(device)
        return hf.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0, 24:].tolist()

    times = {ours: [], theirs: []}
    texts = {}
    for _ in range(1 + repeats):                       # the first is a warm-up
        for run, of in times.items():
            began = time.perf_counter()
            texts[run] = run()
            of.append(time.perf_counter() - began)
    mine, other = (N / statistics.median(of[1:]) for of in times.values())
    print(f"{device}, {model.dtype}, 24 random tokens, then {N}; tokens/s: ours {mine:.1f}, "
          f"transformers {transformers.__version__} {other:.1f}, {mine / other:.2f} x as fast; "
          f"texts {'equal' if texts[ours] == texts[theirs] else 'DIFFERENT'}")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["demo"])
