"""The command: what it prints and where, how it ends, that every flag does what it says and that
whatever is wrong is said in one line. Then what the teaching files print, and what the documents
promise. The command runs in this process wherever it can; a process of its own costs two seconds.
"""
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import clasp_mini
import dp_layer_skip
import llama
import speculative
from dp_layer_skip import choose_skip, torch
from tests.slow_llama import BASE, random_checkpoint
from speculative import Adaptive, Settings
from command.cli import interruptible
from command.flags import DEMO
from text.safetensors_file import save
from text.tokenizer import EOT, Tokenizer

ROOT = DEMO.parent
# All four numbers of a draft: nothing is measured then, and a seed means one text.
PAPER = ("--skip-layers", 22, "--draft-length", 12, "--draft-exit-threshold", 0.3, "--interval", 64)
SHORT = ("--max-new-tokens", 24, *PAPER)
LONG = ("--prompt", "x = ", "--max-new-tokens", 1000, "--temperature", 1, "--strategy", "ar")
QUESTIONS = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit status, stdout, stderr), in this process."""
    def call(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(ROOT / "clasp_mini.py")])
            try:
                status = clasp_mini.main([*map(str, arguments)])
            except SystemExit as e:                    # --help and --version end by themselves
                status = e.code
        out = capsys.readouterr()
        return status, out.out, out.err
    return call


@pytest.fixture
def result(run):
    """result(*arguments) -> the object that --json prints."""
    def call(*arguments):
        status, out, err = run(*arguments, "--json")
        assert (status, err, out.count("\n")) == (0, "", 1), (status, err)
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return call


@pytest.fixture
def terminal(run, monkeypatch):
    """terminal(*arguments) -> what appears on a terminal; `streams` are those that lead there."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def everything(end):
        seen = b""
        with contextlib.suppress(OSError):             # so Linux says that the other end is closed
            while part := os.read(end, 4096):
                seen += part
        return seen.decode().replace("\r\n", "\n")

    def call(*arguments, streams=("stdout", "stderr")):
        ours, theirs = os.openpty()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            seen = pool.submit(everything, ours)
            with monkeypatch.context() as patch, open(theirs, "w", encoding="utf-8") as screen:
                for name in streams:
                    patch.setattr(sys, name, screen)
                assert run(*arguments)[0] == 0
        os.close(ours)
        return seen.result()
    return call


def process(*arguments, **options):
    """The command in a process of its own, which Ctrl-C can reach even where it is ignored here,
    and whose output is buffered even where Python is told not to."""
    command = [sys.executable, ROOT / "clasp_mini.py", *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
                                **options)
    finally:
        signal.signal(signal.SIGINT, before)


def copy_of_the_demo(folder, **files):
    """A folder with the demo's model; files=contents, a JSON value each, or None: left out."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.model"):
        (folder / name).symlink_to(DEMO / name)
    for stem, content in files.items():
        name = next((p.name for p in folder.iterdir() if p.stem == stem), f"{stem}.json")
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def job(*arguments):
    """The command as far as it comes without reading weights."""
    return clasp_mini.Job(clasp_mini.parser().parse_args([*map(str, arguments)]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of 3 layers and 50 tokens, without tokenizer, which reads 20 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    random_checkpoint(folder, dict(max_position_embeddings=20))
    return folder


# ============================================================================== what it prints

def test_clasp_writes_what_plain_decoding_writes(result):
    """Rejects a demo on which greedy text depends on the strategy: every fourth question, in
    float32."""
    for line in QUESTIONS[::4]:
        prompt = ("--prompt", json.loads(line)["turns"][0], *SHORT)
        clasp, plain = result(*prompt), result(*prompt, "--strategy", "ar")
        assert clasp["ids"] == plain["ids"] and clasp["text"] == plain["text"]
        assert clasp["stats"]["drafted"] > 0 == plain["stats"]["drafted"]
    decided = result(*prompt[:4])                      # by itself, and by what passes cost here
    assert decided["ids"] == plain["ids"] and decided["settings"]["costs"]


def test_text_alone_is_on_standard_output_and_one_summary_on_standard_error(run, result):
    """Rejects a prompt, a newline, a colour or a figure in what a pipe receives; a hint or a figure
    that --json leaves in a log."""
    status, out, err = run("--prompt", "def f(x):", *SHORT)
    r = result("--prompt", "def f(x):", *SHORT)
    assert status == 0 and out == r["text"] == Tokenizer(DEMO).decode(r["ids"])
    assert err.count("\n") == 1 and "tokens/s" in err and "\033" not in out + err


def test_json_is_one_object_with_the_documented_fields(result):
    """Rejects a field that is missing or does not mean what its name says, a seed without effect
    and one that does not give the same text again, ids that something is added to."""
    sampled = (*SHORT, "--temperature", 1)
    r = result("--prompt", "class A:", *sampled, "--seed", 5)
    assert r.keys() == {"prompt_ids", "ids", "text", "settings", "stats"}
    assert r["stats"].keys() >= {"drafted", "accepted", "emitted", "verifies", "seconds",
                                 "tokens_per_second", "tokens_per_verify", "acceptance", "skip_set"}
    assert r["stats"]["emitted"] == len(r["ids"]) and len(r["stats"]["skip_set"]) == 22
    ids = ",".join(map(str, r["prompt_ids"]))
    assert result("--prompt-ids", ids, *sampled, "--seed", 5)["ids"] == r["ids"]
    assert result("--prompt", "class A:", *sampled, "--seed", 6)["ids"] != r["ids"]


def test_every_flag_arrives_where_it_belongs(tiny, result, monkeypatch):
    """Rejects a flag without effect or with another's, a seed or a dtype that stays behind, a
    report of other settings than those used, ar with drafts; a policy that decides where all is
    named, or none where something is open."""
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return speculative.generate(*arguments)

    monkeypatch.setattr(clasp_mini, "generate", spy)
    of_this = ("--model", tiny, "--device", "cpu", "--prompt-ids", "1,2")
    odd = ("--temperature", 0.7, "--top-k", 9, "--top-p", 0.8, "--max-new-tokens", 5,
           "--draft-length", 3, "--skip-layers", 2, "--draft-exit-threshold", 0.25, "--probe", 3)
    seed = 2 ** 32 - 1
    try:
        said = result(*of_this, *odd, "--interval", 4, "--seed", seed, "--dtype", "float64",
                      "--threads", 2)
    finally:
        torch.set_num_threads(1)
    want = Settings(temperature=0.7, top_k=9, top_p=0.8, N=5, K=3, M=2, exit_threshold=0.25,
                    interval=4, r=3)
    model, ids, s, chance, choose, policy = calls[0]
    assert (ids, s, choose, model.dtype) == ([1, 2], want, choose_skip, torch.float64)
    assert chance.generator.initial_seed() == seed and policy is None
    assert said["settings"] == dict(
        dataclasses.asdict(want), stop_ids=[], model=str(tiny), device="cpu", strategy="clasp",
        seed=seed, dtype="float64", threads=2, costs=None)
    plain = result(*of_this, *odd, "--strategy", "ar")["settings"]
    assert (calls[1][2].K, calls[1][2].M, calls[1][5], plain["costs"]) == (0, 0, None, None)
    assert [plain[name] for name in ("threads", "seed", "strategy", "dtype")] == [
        1, 0, "ar", "float32"]
    costs = result(*of_this, *odd)["settings"]["costs"]
    s, policy = calls[2][2], calls[2][5]
    assert s == dataclasses.replace(want, interval=None) and isinstance(policy, Adaptive)
    assert (policy.s, policy.c, policy.v) == (s, costs["draft"], costs["verify"])
    result(*of_this, *odd, "--compare", "--repeats", 1)
    assert [(call[2].K, call[5] is None) for call in calls[3:]] == [(0, True), (3, False)] * 2


def test_a_text_ends_at_a_stop_token_which_is_not_printed(run, result, tmp_path):
    """Rejects a command that never stops, or prints what it stops at: a copy of the demo that says
    that a text ends at a token which the demo writes in the middle."""
    prompt = ("--prompt", "import os\n\ndef find_files(root, suffix):\n", *SHORT)
    ids = result(*prompt)["ids"]
    end = next(n for n in range(5, 20) if ids[n] not in ids[:n])
    text = Tokenizer(DEMO).decode(ids[:end])
    folder = copy_of_the_demo(tmp_path, generation_config=dict(eos_token_id=[3841, ids[end]]))
    prompt = ("--model", folder, "--device", "cpu", *prompt)
    for how in ((), ("--strategy", "ar"), ("--compare", "--repeats", 1)):
        r = result(*prompt, *how)
        assert (r["ids"], r["text"]) == (ids[:end + 1], text), how
    assert r["settings"]["stop_ids"] == [3841, ids[end]]
    assert run(*prompt)[:2] == (0, text)


def test_prompts_become_ids_as_the_tokenizer_says(run, tmp_path, capsys):
    """Rejects --chat ignored, a system turn that is dropped or comes last, chat format without
    --chat, a missing begin token; and a note on a model that <|eot_id|> does stop."""
    tok, q = Tokenizer(DEMO), dict(role="user", content=" Why? ")
    system = dict(role="system", content="Be brief.")
    for how, want in (([], [tok.bos, *tok.encode(" Why? ")]), (["--chat"], tok.chat([q])),
                      (["--chat", "--system", "Be brief."], tok.chat([system, q])),
                      (["--chat", "--system", ""], tok.chat([q]))):
        status, out, err = run("--prompt", " Why? ", *how, *PAPER, "--max-new-tokens", 1, "--json")
        assert status == 0 and json.loads(out)["prompt_ids"] == want
        assert ("note: <|eot_id|>" in err, err.count("\n")) == (bool(how),) * 2
    copy_of_the_demo(tmp_path, generation_config=dict(eos_token_id=[3841, tok.special[EOT]]))
    job("--model", tmp_path, "--chat", "--prompt", "x")
    assert capsys.readouterr().err == ""


def test_prompt_ids_need_no_tokenizer_and_get_nothing_added(run, result, tmp_path):
    """Rejects a begin-of-text that nobody asked for, and a tokenizer that nobody needs."""
    few = ("--model", copy_of_the_demo(tmp_path, tokenizer=None), "--device", "cpu", *SHORT)
    r = result(*few, "--prompt-ids", "3840, 5 6")
    assert r["prompt_ids"] == [3840, 5, 6] and r["text"] is None
    assert run(*few, "--prompt-ids", "3840,5,6")[:2] == (0, ",".join(map(str, r["ids"])))


def test_compare_runs_both_and_says_what_it_saw(run, result):
    """Rejects a comparison of one side with itself, and equality claimed of two samples."""
    few = ("--prompt", "def f(x):", *SHORT, "--compare", "--repeats", 2)
    r = result(*few)
    assert r["equal"] is True and r["speedup"] > 0 and r["ideal_speedup"] > 0
    assert r["stats"]["drafted"] > 0 == r["plain_stats"]["drafted"]
    assert r["prompt_ids"] and r["settings"]["K"] and r["text"] == Tokenizer(DEMO).decode(r["ids"])
    assert result(*few, "--temperature", 1)["equal"] is None
    status, out, err = run(*few)
    assert (status, err) == (0, "") and re.search("^speed-up .*^texts +equal$", out, re.M | re.S)


def test_on_a_terminal_the_prompt_stands_dim_before_the_text(terminal, result, monkeypatch):
    """Rejects a text without its beginning, a begin-of-text in it, a prompt glued to a text that a
    pipe receives, colours with NO_COLOR, progress of --compare that is not shown."""
    prompt = ("--prompt", "def f(x):", *SHORT)
    text = result(*prompt)["text"]
    screen = terminal(*prompt)
    assert screen.startswith(f"\033[2mdef f(x):\033[0m{text}\n\033[2m24 tokens in ")
    assert terminal(*prompt, streams=["stdout"]) == text + "\n"
    assert text not in terminal(*prompt, "--json", streams=["stderr"])
    assert "def" not in terminal(*prompt, streams=["stderr"])
    assert "pair 1 of 1\r" in terminal(*prompt, "--compare", "--repeats", 1)
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal(*prompt).startswith(f"def f(x):{text}\n24 tokens in ")


def test_verbose_is_a_line_per_round_and_the_text_once(terminal, run, result):
    """Rejects a bar of another skip set, rounds that are not shown, rounds among the text that a
    pipe receives, and on a terminal a text that stands between its rounds a second time."""
    prompt = ("--prompt", "import os\n", *SHORT)
    r = result(*prompt)
    rounds = r["stats"]["verifies"] + 1
    status, out, err = run(*prompt, "--verbose")
    *lines, summary = err.splitlines()
    assert status == 0 and out == r["text"] and len(lines) == rounds and "tokens/s" in summary
    assert all(re.match(r" *\d+ [█░]{32} ", line) for line in lines)
    assert lines[0].count("░") == 0 and lines[1].count("░") == r["settings"]["M"]
    screen = re.sub(r"\033\[[\d;]*m", "", terminal(*prompt, "--verbose"))
    *lines, summary = filter(None, screen.splitlines())
    assert len(lines) == rounds and "tokens/s" in summary
    assert all(re.match(r" *\d+ [█░]{32} ", line) for line in lines)
    assert terminal(*prompt, "--verbose", streams=["stdout"]) == r["text"] + "\n"


def test_without_arguments_the_model_runs_a_prompt_of_its_own(result, terminal):
    """Rejects a usage error for a first try, another prompt than the model's clasp.json holds, and
    a hint at what to do next for those who know it already or read no screen."""
    own = json.loads((DEMO / "clasp.json").read_text(encoding="utf-8"))
    r, tok = result("--max-new-tokens", 2), Tokenizer(DEMO)
    assert r["prompt_ids"] == [tok.bos, *tok.encode(own["prompt"])]
    assert r["settings"]["device"] == own["device"]
    hint = "Next: --prompt TEXT"
    assert terminal("--max-new-tokens", 2).count(hint) == 1
    assert hint not in terminal("--max-new-tokens", 2, "--prompt", "x")
    assert hint not in terminal("--max-new-tokens", 2, streams=["stdout"])


def test_a_models_own_settings_are_read_however_its_folder_is_spelled(tmp_path, monkeypatch):
    """Rejects defaults that go by the name of the folder, that beat a flag, or a flag of 0; and
    numbers that are not left open where there is no such file."""
    costs = dict(draft=[1.0] + [0.5] * 32, verify=[1.0] * 14)
    folder = copy_of_the_demo(tmp_path / "m", clasp=dict(
        device="cpu", draft_length=5, skip_layers=7, draft_exit_threshold=0.5, interval=9, probe=2))
    own = Settings(stop_ids=(3841,), K=5, M=7, exit_threshold=0.5, interval=9, r=2)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for model in ("m", "./m/", folder, "link", tmp_path / "link", "m/../m"):
        assert job("--model", model, "--prompt", "x").settings == own, model
    zero = ("--draft-length", 0, "--skip-layers", 0, "--draft-exit-threshold", 0, "--interval", 1)
    assert job("--model", folder, *zero, "--probe", 1).settings == dataclasses.replace(
        own, K=0, M=0, exit_threshold=0, interval=1, r=1)
    (folder / "clasp.json").write_text(json.dumps(dict(costs=costs)))
    left = job("--model", folder, "--device", "cpu", "--prompt", "x")
    assert left.settings == dataclasses.replace(
        own, K=None, M=None, exit_threshold=None, interval=None, r=1)
    assert left.costs == costs


def test_costs_that_are_kept_give_the_same_text_again(result, tmp_path):
    """Rejects costs that are measured anew where a file says them, or that --json leaves out."""
    prompt = ("--prompt", "x = ", "--max-new-tokens", 24, "--temperature", 1, "--seed", 3)
    r, path = result(*prompt), tmp_path / "costs.json"
    path.write_text(json.dumps(r))
    again = result(*prompt, "--costs", path)
    assert again["settings"] == r["settings"] and again["settings"]["costs"]["verify"][1] == 1
    assert again["ids"] == r["ids"] and again["stats"]["drafted"] == r["stats"]["drafted"]


def test_a_large_model_is_bfloat16_where_that_is_fast_and_says_so(tmp_path, monkeypatch, capsys):
    """Rejects rounding that is not announced, that --dtype does not prevent, or that is slow; a
    small model on many threads and a large one on one."""
    for name, size in (("large", 512), ("small", 128)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dict(
            BASE, num_hidden_layers=16, hidden_size=size, intermediate_size=4 * size)))
    for name, supported, how, dtype in (
            ("large", True, [], torch.bfloat16), ("large", False, [], torch.float32),
            ("large", True, ["--dtype", "float32"], torch.float32),
            ("large", False, ["--dtype", "bfloat16"], torch.bfloat16),
            ("small", True, [], torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda said=supported: said)
        this = ("--model", tmp_path / name, "--device", "cpu", "--prompt-ids", 1)
        assert job(*this, *how).dtype == dtype
        assert ("note: computing in bfloat16 on cpu" in capsys.readouterr().err) == (
            dtype == torch.bfloat16 and not how)
    for name, how, threads in (("small", [], 1), ("large", ["--threads", 2], 2), ("large", [], 2),
                               ("small", ["--threads", 2], 2), ("small", [], 1)):
        job("--model", tmp_path / name, "--device", "cpu", "--prompt-ids", 1, *how)
        assert torch.get_num_threads() == threads


def test_the_trace_flag_leaves_the_text_alone(run, tmp_path):
    """Rejects a trace of another run than the one that is printed, and an unfinished one."""
    prompt, path = ("--prompt", "x = ", *SHORT, "--temperature", 1), tmp_path / "t"
    assert run(*prompt, "--trace", path)[:2] == run(*prompt)[:2]
    assert json.loads(path.read_text().splitlines()[-1])["event"] == "end"


def test_help_fits_a_screen_and_names_every_flag(run, monkeypatch):
    """Rejects a help text that argparse cannot print, or that nobody reads."""
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run("--help")
    assert (status, err) == (0, "") and out.count("\n") <= 45
    assert all(f"--{name.replace('_', '-')} " in out
               for name in vars(clasp_mini.parser().parse_args([])))
    assert run("--version")[:2] == (0, f"clasp-mini {clasp_mini.VERSION}\n")


# ============================================================================== how it ends

def test_the_prompt_can_come_through_a_pipe_and_from_any_folder(tmp_path):
    """Rejects - read as a prompt, a model looked for in the working folder, and anything but the
    object on a --json run's streams."""
    p = process("--prompt", "-", "--max-new-tokens", 5, "--json", stdin=subprocess.PIPE,
                cwd=tmp_path)
    out, err = p.communicate(b"def f(x):", timeout=60)
    assert (p.returncode, err) == (0, b"")
    assert json.loads(out)["prompt_ids"][1:] == Tokenizer(DEMO).encode("def f(x):")


def test_a_reader_that_leaves_early_is_no_fault():
    """Rejects the traceback that `| head` would show."""
    p = process(*LONG)
    p.stdout.read(1)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(60) == 141 and b"Traceback" not in err and b"Exception" not in err


def test_ctrl_c_ends_with_the_summary_so_far():
    """Rejects a traceback, a lost summary, an exit status of success, a text that comes in lumps
    or when it is whole."""
    p = process(*LONG)
    p.stdout.read(1)
    time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and err.count(b"\n") == 1 and b"tokens" in err
    assert len(out) < 4000                             # no buffer had to fill before any was seen


def test_ctrl_c_before_there_is_a_text_just_ends_it():
    """Rejects the traceback of an import that was broken off; it waits for a prompt at the latest,
    so that however fast the machine is, there is no text yet."""
    p = process("--prompt", "-", stdin=subprocess.PIPE)
    time.sleep(0.6)                                    # Python itself has started by then
    p.send_signal(signal.SIGINT)
    p.wait(60)
    assert p.returncode == -signal.SIGINT and p.communicate() == (b"", b"")


def test_where_ctrl_c_is_ignored_it_stays_ignored():
    """Rejects a run under nohup that a Ctrl-C meant for another program ends."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for was, will in ((signal.SIG_IGN, signal.SIG_IGN),
                          (signal.SIG_DFL, signal.default_int_handler)):
            signal.signal(signal.SIGINT, was)
            interruptible()
            assert signal.getsignal(signal.SIGINT) is will
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("raised, status, said", [
    (MemoryError(), 1, "out of memory"), (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), 1,
     "CUDA out of memory. Tried to allocate 2 GiB"),
    (llama.ModelError("a\nb: broken"), 1, "a b: broken"),
    (PermissionError(13, "Permission denied", "w.safetensors"), 1,
     "w.safetensors: Permission denied")], ids=lambda x: type(x).__name__)
def test_what_stops_it_while_it_loads_is_one_line(run, monkeypatch, raised, status, said):
    """Rejects a traceback, success, a line without words, two lines."""
    def load(*_):
        raise raised
    monkeypatch.setattr(llama.Llama, "load", load)
    assert run("--prompt", "x") == (status, "", f"clasp_mini.py: {said}\n")


def test_a_model_whose_numbers_overflow_writes_no_text(run, tmp_path):
    """Rejects token 0, which is the argmax of what is not a number, for an answer."""
    _, w = random_checkpoint(tmp_path)
    w = {name: t.float() for name, t in w.items()}
    w["model.layers.1.input_layernorm.weight"][0] = 1e30
    save(w, tmp_path / "model.safetensors", {"format": "pt"})
    for how in ((), ("--json",)):
        status, out, err = run("--model", tmp_path, "--device", "cpu", "--prompt-ids", "1,2", *how)
        assert (status, out, err.count("\n")) == (1, "", 1) and "not finite" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_output_that_cannot_be_written_is_said_in_one_line(run, monkeypatch):
    """Rejects a traceback, and success reported for a text that is lost."""
    for how in ((), ("--json",)):
        full = open("/dev/full", "w")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            status, _, err = run("--prompt", "x", "--max-new-tokens", 4, *how)
        with contextlib.suppress(OSError):
            full.close()
        assert (status, err) == (1, "clasp_mini.py: output: No space left on device\n")


def test_a_terminal_that_lacks_characters_gets_question_marks(run, monkeypatch, capsys):
    """Rejects a UnicodeEncodeError in the middle of a text."""
    def said(*_):
        ids = Tokenizer(DEMO).encode("a日b")
        yield speculative.Round(1, (), [], [], speculative.Verdict([], [], [], 0, 1), ids, None,
                                (0, 1, 0))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(clasp_mini, "generate", said)
    monkeypatch.setattr(sys, "stdout", out)
    assert run("--prompt", "x")[0] == 0 and out.buffer.getvalue() == b"a?b"


# ============================================================================== what is wrong

LIMITS = {              # flag: what it takes, at the ends; what it does not take
    "--prompt-ids": (["0", "4095", "1 2,3"], ["", ",", "1,x", "-1", "1.5", "1;2"]),
    "--device": (["cpu"], ["abacus", "cuda:", "cuda:x", "CPU", ""]),
    "--dtype": (["float32", "float64", "bfloat16"], ["int3", "float16", ""]),
    "--threads": (["1"], ["0", "-1", "x", "1.5", "1e12", "1000000000000"]),
    "--repeats": (["1"], ["0", "x"]),
    "--max-new-tokens": (["1"], ["0", "-1", "x", "1.5", "", "nan"]),
    "--temperature": (["0", "1e-300", "5"], ["-1", "nan", "inf", "hot", ""]),
    "--top-k": (["0", "4097"], ["-3", "2.5", "x"]),
    "--top-p": (["1e-300", "1"], ["0", "1.1", "-1", "nan", "x"]),
    "--seed": (["0", "4294967295"], ["-1", "4294967296", "x", "0.5"]),
    "--strategy": (["ar", "clasp"], ["draft", ""]),
    "--skip-layers": (["0", "32"], ["-1", "33", "1.5", "half"]),
    "--draft-length": (["0", "511"], ["-1", "512", "x"]),
    "--draft-exit-threshold": (["0", "1"], ["1.5", "-0.1", "nan", "x"]),
    "--interval": (["1"], ["0", "-1", "x"]),
    "--probe": (["1", "64"], ["0", "65", "x"])}
FREE = {"--prompt", "--system", "--model", "--trace", "--costs"}


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever is wrong with the command must be found before weights are read."""
    monkeypatch.setattr(llama.Llama, "load", lambda *_: pytest.fail("the weights were read"))


def test_every_flag_takes_what_it_can_and_nothing_else(run, no_weights):
    """Rejects a limit that is off by one, a traceback, a value that is guessed, and a complaint
    that does not name the flag and the value."""
    with_value = set(re.findall(r"(--[a-z-]+) [A-Z1]", clasp_mini.parser().format_help()))
    assert with_value == {*LIMITS, *FREE}, "a new flag needs its limits here"
    for flag, (right, wrong) in LIMITS.items():
        prompt = () if flag == "--prompt-ids" else ("--prompt", "x")
        for value in right:
            assert job(*prompt, f"{flag}={value}").prompt()
        for value in wrong:
            status, out, err = run(*prompt, f"{flag}={value}")
            assert (status, out, err.count("\n")) == (2, "", 1), (flag, value, err)
            assert err.startswith(f"clasp_mini.py: {flag}") and value in err, err


WRONG_INPUTS = [        # arguments, exit status, what is said
    (["--prompt", ""], 2, "--prompt is missing or empty"),
    (["--prompt"], 2, "--prompt: expected one argument"),
    (["--promt", "x"], 2, "--promt"), (["hello"], 2, "hello"), (["--max", "3"], 2, "--max"),
    (["--chat=yes"], 2, "--chat"), (["--prompt", "\udc80"], 2, "not valid UTF-8"),
    (["--prompt-ids", "4096"], 2, "token 4096 is not in the model's vocabulary of 4096"),
    (["--prompt-ids", "3,9" + "9" * 30], 2, "vocabulary"),
    (["--prompt-ids", "1", "--prompt", "x"], 2, "--prompt-ids goes without --prompt and --chat"),
    (["--prompt-ids", "1", "--chat"], 2, "--prompt-ids goes without --prompt and --chat"),
    (["--prompt", "x", "--system", "y"], 2, "--system goes with --chat"),
    (["--model", "/nowhere", "--prompt", "x"], 1, "/nowhere: no such folder"),
    (["--model", DEMO / "config.json"], 1, "config.json: no such folder"),
    (["--model", DEMO.parent / "text"], 1, "config.json: cannot be read"),
    (["--model", "a\nb"], 1, "a b: no such folder"),
    (["--device", "cuda:77"], 2, "--device cuda:77: PyTorch sees"),
    (["--skip-layers", 33], 2, "--skip-layers 33: the model has 32 layers"),
    (["--prompt", "x", "--max-new-tokens", 9999], 2, "of 1024: --max-new-tokens 1022 fits"),
    (["--compare", "--strategy", "ar"], 2, "--compare runs plain decoding too"),
    (["--compare", "--verbose"], 2, "without"), (["--compare", "--trace", "t"], 2, "without"),
    (["--costs", "/nowhere"], 1, "/nowhere: cannot be read"),
    (["--costs", DEMO / "config.json"], 1, "config.json: costs are "),
    (["--bench", "f"], 2, "--bench"), (["--dump-forward", "f"], 2, "--dump-forward")]


@pytest.mark.parametrize("arguments, status, said", WRONG_INPUTS)
def test_wrong_input_gets_one_clear_line(run, no_weights, arguments, status, said):
    """Rejects a traceback, a guess, and an error that does not name what is wrong."""
    got, out, err = run(*arguments)
    assert (got, out, err.count("\n")) == (status, "", 1), (got, out, err)
    assert err.startswith("clasp_mini.py: ") and said in err, err


@pytest.mark.parametrize("content, said", [
    ([1], "cannot be read as a JSON object"), (dict(draft_lenght=3), "draft_lenght is not one of"),
    (dict(temperature=1), "temperature is not one of"), (dict(interval=0), "'0' is not 1 or more"),
    (dict(skip_layers="many"), "--skip-layers: 'many' is not"), (dict(device="gpu"), "'gpu' is"),
    (dict(skip_layers=True), "'True' is not 0 or more"), (dict(draft_length=None), "'None' is"),
    (dict(draft_exit_threshold=30), "'30' is not 0 to 1"),
    (dict(costs=dict(draft=[1], verify=[1, 1, 1])), ": costs are "),
    (dict(costs=dict(draft=[1] * 33, verify=[1])), ": costs are "),
    (dict(costs=dict(draft=[1] * 33, verify=[1, 1, 0.9])), "above 0"),
    (dict(costs=dict(draft=[1] * 33, verify=[1, 1], risk=[0.1])), "33 chances")], ids=str)
def test_wrong_settings_in_a_models_folder_are_named_with_the_file(run, no_weights, tmp_path,
                                                                   content, said):
    """Rejects a traceback, a misspelled name that is passed over, a value that no flag takes."""
    folder = copy_of_the_demo(tmp_path, clasp=content)
    status, out, err = run("--model", folder, "--prompt", "x")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("clasp_mini.py: ") and "clasp.json: " in err and said in err


def test_a_prompt_fits_if_it_and_what_is_asked_for_fill_the_context(run, result, tiny):
    """Rejects a limit that is off by one to either side, and the advice to write 0 tokens."""
    of_this = ("--model", tiny, "--device", "cpu", "--prompt-ids")
    fifteen, most = ",".join("7" * 15), "new ones exceed the model's context of 20"
    assert len(result(*of_this, fifteen, "--max-new-tokens", 5)["ids"]) == 5
    for ids, N, said in ((fifteen, 6, f"15 prompt tokens and 6 {most}: --max-new-tokens 5 fits"),
                         (f"{fifteen},1,2,3,4,5", 1, f"20 prompt tokens and 1 {most}")):
        status, out, err = run(*of_this, ids, "--max-new-tokens", N)
        assert (status, out, err) == (2, "", f"clasp_mini.py: {said}\n")


def test_ids_and_tokenizer_must_be_within_the_vocabulary(run, tiny, tmp_path):
    """Rejects limits that are off by one; an index out of range, which on a GPU ends all; without a
    tokenizer a complaint about it where the ids are wrong."""
    job("--model", tiny, "--prompt-ids", 49, "--max-new-tokens", 1).prompt()
    for ids, said in (("50", "token 50 is not in the model's vocabulary of 50"),
                      ("", "--prompt-ids: '' is not a list of numbers")):
        status, out, err = run("--model", tiny, "--prompt-ids", ids, "--max-new-tokens", 1)
        assert (status, out, err.count("\n")) == (2, "", 1) and said in err
    status, _, err = run("--model", tiny, "--prompt", "x")
    assert (status, err.count("\n")) == (1, 1) and "no tokenizer.model" in err
    c = json.loads((DEMO / "config.json").read_text())
    folder = copy_of_the_demo(tmp_path, config=dict(c, vocab_size=4095))
    status, _, err = run("--model", folder, "--prompt", "x")
    assert (status, err.count("\n")) == (1, 1)
    assert "the tokenizer has more tokens than the model's 4095" in err


def test_a_pipe_that_is_not_text_is_said_to_be_none(run, no_weights, monkeypatch):
    """Rejects a traceback for a file of another kind, and an empty pipe as a prompt."""
    for sent, said in ((b"\xff", "the prompt is not valid UTF-8"), (b"", "is missing or empty")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
        status, out, err = run("--prompt", "-")
        assert (status, out, err.count("\n")) == (2, "", 1) and said in err


# ============================================================================== teaching files

def test_the_demonstration_runs_alone_and_what_it_prints_is_so():
    """Rejects a crash, colours in a pipe, and words that its own figures do not bear out: the path,
    the layers named, the rank."""
    run = subprocess.run([sys.executable, dp_layer_skip.__file__], capture_output=True, text=True,
                         timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert "\033" not in run.stdout and "Left out: [1, 4, 7]" in run.stdout
    lines = re.findall(r"^  i = +(\d+) .*?\*.*?(?:layer +(\d+) (run|SKIPPED))?$", run.stdout, re.M)
    skipped = [int(layer) for _, layer, did in lines[4:] if did == "SKIPPED"]
    assert len(lines) == 4 + 10 and skipped == [1, 4, 7]
    assert [layer for _, layer, did in lines[:4] if did == "SKIPPED"] == ["1", "2"]
    rows = re.findall(r"^ +\d +12 +5 +(.+?) +(.+?) +(.+?) +(\d+) of 792$", run.stdout, re.M)
    assert len(rows) == 6 and all(float(m) < float(r) <= float(b) for r, b, m, _ in rows)
    net = dp_layer_skip.toy(12, 24, 1)                 # the second toy, over again
    every = sorted((dp_layer_skip.run_set(*net, tuple(i in s for i in range(12)))
                    for s in itertools.combinations(range(12), 5)), reverse=True)
    real, best, mean, rank = map(float, rows[1])
    assert [best, mean] == [round(x, 4) for x in (every[0], sum(every) / 792)]
    assert round(every[int(rank) - 1], 4) == real < best


def test_the_demonstration_of_the_sampler_prints_p_for_the_right_one_alone(capsys):
    """Rejects a demonstration whose right sampler is not exact, or whose wrong ones are."""
    speculative.main()
    out = capsys.readouterr().out
    p, q, right, *wrong = (float(line.split()[-1]) for line in out.splitlines()[2:])
    assert p == 0 and q > 0.1 and right < 1e-15 and len(wrong) == 3 and min(wrong) > 0.1


def test_the_drawing_shows_the_rows_as_they_are(capsys):
    """Rejects a picture of another mask: counted by hand."""
    llama.main()
    lines = re.findall(r"^ +(\d+) +(\d+)   (.+)$", capsys.readouterr().out, re.M)
    assert [(int(at), int(slot), marks.count("#")) for at, slot, marks in lines] == [
        (6, 6, 6), *((6 + r, 6 + r, 6 + r) for r in range(5)), *((6, 7 + r, 6) for r in range(5))]
    assert all(marks.replace(" ", "").index("w") == int(slot) for _, slot, marks in lines)


# ============================================================================== the documents

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/*.md"))]
PROGRAMS = {*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")}
TESTS = {path for path in PROGRAMS if path.name.startswith("test_")}


def flags_of(path):
    """The flags that a program here takes: its own, and where it adds to them the command's."""
    source, main = path.read_text(encoding="utf-8"), ROOT / "text" / "flags.py"
    inherits = path != main and re.search(r"clasp_mini\.parser\(\)|text\.flags import", source)
    return {*re.findall(r'"(--[a-z-]+)"', source), "--help", *(flags_of(main) if inherits else ())}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_only_what_exists(document):
    """Rejects a command that does not run, a flag that is gone, a -k that selects nothing, a link
    to nowhere."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, arguments in re.findall(r"python ([\w/]+\.py)([^`\n|#]*)", text):
        assert (ROOT / name).exists(), name
        assert {*re.findall(r"(?<=\s)--[a-z-]+", arguments)} <= flags_of(ROOT / name), arguments
    every = set().union(*map(flags_of, PROGRAMS - TESTS))
    assert {*re.findall(r"`(--[a-z-]+)", text)} <= every
    names = " ".join(re.findall(r"^def (test_\w+)", "".join(
        path.read_text(encoding="utf-8") for path in TESTS), re.M))
    chosen = " ".join(map("".join, re.findall(r'pytest[^`\n]* -k (?:"(.+?)"|(\w+))', text)))
    assert [w for w in re.findall(r"\w+", chosen)
            if w not in ("or", "and", "not") and w.lower() not in names.lower()] == []
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose)
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_library_example_of_the_readme_runs_as_it_stands(monkeypatch, capsys):
    """Rejects an example that has drifted from the code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example, = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    monkeypatch.chdir(ROOT)
    exec(example, {"__name__": "example"})
    out, err = capsys.readouterr()
    assert len(out.splitlines()) > 3 and err == ""


def test_the_algorithm_in_the_readme_chooses_what_the_program_chooses():
    """Rejects a listing that has drifted from the recurrence, or never was it."""
    listing, = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    for seed in range(8):
        h, run_layer = dp_layer_skip.toy(9, 16, seed)
        names = dict(h=h, L=9, M=4, layer=lambda i, x: run_layer(i, x[None])[0],
                     cos=lambda a, b: dp_layer_skip.cosine(a, b).item())
        exec(listing, names)
        chosen = dp_layer_skip.choose_skip(h, run_layer, 4).skip()
        assert names["left_out"] == {i for i, s in enumerate(chosen) if s}
