"""Our plain greedy decoding against Hugging Face `generate`: same weights, float32, one thread, one
process, in turn. In an environment of its own, for transformers is needed here and nowhere else:

    python3 -m venv hf && hf/bin/pip install torch==2.13.0 transformers safetensors tiktoken numpy
    hf/bin/python demo/versus_transformers.py
"""
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import transformers  # noqa: E402

from llama import Llama, Tokenizer  # noqa: E402
from speculative import Chance, Settings, generate  # noqa: E402

DEMO, N, REPEATS = Path(__file__).resolve().parent, 128, 9


def main() -> None:
    torch.set_num_threads(1)
    tok, model = Tokenizer(DEMO), Llama.load(DEMO)
    ids = [tok.bos, *tok.encode('def load(path):\n    """Read a file and return its lines."""\n')]

    def ours() -> list[int]:
        rounds = generate(model, ids, Settings(N=N, K=0), Chance(0))
        return [t for r in rounds for t in r.emitted]

    def theirs(attention: str) -> Callable[[], list[int]]:
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            DEMO, dtype=torch.float32, attn_implementation=attention).eval()
        hf.generation_config.eos_token_id = None       # as ours: N tokens, whatever they are
        prompt = torch.tensor([ids])

        @torch.inference_mode()
        def run() -> list[int]:
            out = hf.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                              max_new_tokens=N, pad_token_id=0)
            return out[0, len(ids):].tolist()
        return run

    contestants = {"ours": ours, "generate, sdpa": theirs("sdpa"),
                   "generate, eager": theirs("eager")}
    times, texts = {name: [] for name in contestants}, {}
    for repeat in range(REPEATS + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            texts[name] = run()
            if repeat:                                 # the first is the warm-up
                times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(t) for name, t in times.items()}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32, 1 thread; "
          f"{len(ids)} prompt tokens, {N} new, median of {REPEATS}")
    for name, t in median.items():
        print(f"{name:16} {N / t:6.1f} tokens/s, ours is {t / median['ours']:.2f} x as fast; text "
              f"{'equal' if texts[name] == texts['ours'] else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
