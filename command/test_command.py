"""The command: what it prints and where, how it ends, that every flag does what it says and that
whatever is wrong is said in one line. It runs in this process wherever it can; a process of its own
costs more than a second.
"""
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import clasp_mini
import command.compare
import llama
import speculative
from command.cli import answer
from command.flags import DEMO, VERSION, parsed, parser
from command.job import Job
from command.screen import Screen
from command.test_report import a_round
from dp_layer_skip import choose_skip, torch
from policy.adaptive import Adaptive
from policy.probe import PaperByProbe
from speculative import Paper, Settings
from tests.helpers import put
from tests.slow_llama import BASE, random_checkpoint
from text.tokenizer import Tokenizer

ROOT = DEMO.parent
TOK = Tokenizer(DEMO)
CONFIG = json.loads((DEMO / "config.json").read_text())
V = CONFIG["vocab_size"]
CHATS = {"config.json": CONFIG | dict(vocab_size=4096)}     # has a row for every special token
# All four numbers: nothing is measured then, and a seed means one text.
NAMED = ("--skip-layers", 22, "--draft-length", 12, "--draft-exit-threshold", 0.3, "--interval", 64)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """The same wherever the tests run, also under nohup."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))                     # costs that are kept
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit status, stdout, stderr), in this process."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "clasp_mini.py")])

    def call(*arguments):
        status = clasp_mini.main([*map(str, arguments)])
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
def complaint(run, monkeypatch):
    """complaint(*arguments) -> exit status and the one line that says what is wrong, without the
    command's name. It must be found before weights are read."""
    monkeypatch.setattr(llama.Llama, "load", lambda *_, part: pytest.fail("the weights were read"))

    def call(*arguments):
        status, out, err = run(*arguments)
        assert (out, err.count("\n")) == ("", 1), (arguments, out, err)
        assert err.startswith("clasp_mini.py: "), err
        return status, err.removeprefix("clasp_mini.py: ").rstrip()
    return call


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(run, monkeypatch):
    """terminal(*arguments) -> what stays on a terminal to which `streams` lead, and the lines that
    stood there until another took their place."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def call(*arguments, streams=("stdout", "stderr"), status=0):
        screen = Terminal()
        with monkeypatch.context() as patch:
            for name in streams:
                patch.setattr(sys, name, screen)
            assert run(*arguments)[0] == status
        stays, *rest = screen.getvalue().split("\r\033[K")
        stood = []
        for part in rest:
            assert stays.endswith("\n") or not stays, "a text was taken away"
            line, more = part.split("\r")
            assert not (line and more), "written over a line that stands"
            stood.append(line)
            stays += more
        assert not stood or not stood[-1], "left standing"
        return stays, stood
    return call


def process(*arguments, python=(), **options):
    """The command in a process of its own."""
    command = [sys.executable, *python, ROOT / "clasp_mini.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def copy_of_the_demo(folder, files):
    """A folder with the demo's model, but of some files what `put` is to write."""
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.model"):
        (folder / name).symlink_to(DEMO / name)
    return put(folder, files)


def job(*arguments):
    """The command as far as it comes without reading weights."""
    return Job(parsed([*map(str, arguments)]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of 3 layers and 50 tokens, without tokenizer, which reads 20 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    random_checkpoint(folder, dict(max_position_embeddings=20))
    return folder


# ============================================================================== what it prints

def test_every_strategy_writes_the_text_of_plain_decoding_and_says_that_it_ran(run, result):
    """Rejects a greedy text that depends on the strategy; a prompt, a newline, a colour or a figure
    in what a pipe receives, or in a log beside --json; a documented field of --json that is missing
    or does not mean what it says; an account without its strategy."""
    prompt = ("--prompt", "The following functions ", "--max-new-tokens", 24)
    plain = result(*prompt, "--strategy", "ar")
    assert plain.keys() == {"prompt_ids", "ids", "text", "settings", "stats"}
    assert plain["stats"].keys() >= {
        "drafted", "accepted", "emitted", "verifies", "seconds", "tokens_per_second",
        "tokens_per_verify", "acceptance", "skip_set"}
    assert (plain["stats"]["drafted"], plain["stats"]["emitted"]) == (0, len(plain["ids"]))
    assert plain["text"] == TOK.decode(plain["ids"])
    for how, ran in (((), "clasp"), (("--strategy", "paper"), "paper"), (NAMED, "paper")):
        r = result(*prompt, *how)
        assert (r["ids"], r["text"]) == (plain["ids"], plain["text"])
        assert how == () or r["stats"]["drafted"] > 0
        assert how != NAMED or len(r["stats"]["skip_set"]) == 22
        status, out, err = run(*prompt, *how)
        assert (status, out) == (0, plain["text"])
        assert re.fullmatch(rf"\n{ran}: 24 tokens in .*\ndecoding .*\n", err) and "\033" not in err


def test_every_flag_arrives_where_it_belongs(tiny, result, monkeypatch):
    """Rejects a flag without effect or with another's, a seed or a dtype that stays behind, a
    report of other settings than those used, ar with drafts; a policy that decides where all is
    named, or none where something is open; a comparison of one side with itself; ids that need a
    tokenizer, or to which something is added."""
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return speculative.generate(*arguments)

    for module in (clasp_mini, command.compare):
        monkeypatch.setattr(module, "generate", spy)
    of_this = ("--model", tiny, "--device", "cpu", "--prompt-ids", "1,2", "--top-k", 9, "--top-p",
               0.8, "--max-new-tokens", 5)
    odd = ("--draft-length", 3, "--skip-layers", 2, "--draft-exit-threshold", 0.25, "--probe", 3)
    seed = 2 ** 32 - 1
    said = result(*of_this, *odd, "--interval", 4, "--temperature", 0.7, "--seed", seed,
                  "--dtype", "float64", "--threads", 2)
    want = Settings(temperature=0.7, top_k=9, top_p=0.8, N=5, K=3, M=2, exit_threshold=0.25,
                    interval=4)
    model, ids, s, chance, choose, policy = calls[0]
    assert (ids, s, choose, model.dtype) == ([1, 2], want, choose_skip, torch.float64)
    assert chance.generator.initial_seed() == seed
    assert isinstance(policy, PaperByProbe) and policy.r == 3
    assert said["settings"] == dict(
        dataclasses.asdict(want), stop_ids=[], model=str(tiny), device="cpu", strategy="clasp",
        seed=seed, dtype="float64", threads=2, r=3, costs=None)
    assert (said["prompt_ids"], said["text"]) == ([1, 2], None)             # nothing is added
    plain = dict(K=0, M=0, seed=0, strategy="ar", dtype="float32", threads=1, costs=None)
    assert result(*of_this, "--strategy", "ar")["settings"].items() >= plain.items()
    left = result(*of_this, *odd)["settings"]
    assert left.items() >= dict(K=3, M=2, exit_threshold=0.25, interval=None).items()
    policy = calls[2][5]
    assert isinstance(policy, Adaptive) and policy.probe == 3
    assert (policy.c, policy.v) == (left["costs"]["draft"], left["costs"]["verify"])
    r = result(*of_this, *odd, "--interval", 1, "--compare", "--repeats", 1, "--seed", 8)
    assert [(call[2].K, call[3].generator.initial_seed()) for call in calls[3:]] == [
        (0, 8), (3, 8)] * 2
    assert r["equal"] and r["stats"]["drafted"] > 0 == r["plain_stats"]["drafted"]
    assert job("--compare").flags.repeats == 5


def test_the_papers_loop_is_one_flag_or_four_numbers():
    """Rejects other numbers than the paper's 44 of 80 layers, 0.7 and 64, and flags that do not
    replace them; another loop by the default strategy where all four are named."""
    by_name = ("--strategy", "paper")
    for how, want in ((by_name, (12, 18, 0.7, 64)), (NAMED, (12, 22, 0.3, 64)),
                      ((*by_name, "--skip-layers", 5, "--interval", 8), (12, 5, 0.7, 8))):
        policy = clasp_mini.policy_of(job("--prompt", "x", *how))
        assert type(policy) is Paper
        assert (policy.s.K, policy.s.M, policy.s.exit_threshold, policy.s.interval) == want


def test_prompts_become_ids_as_the_tokenizer_says(tmp_path, monkeypatch):
    """Rejects --chat ignored, a system turn that is dropped or comes last, chat format without
    --chat, a missing begin token; other ids for "é" where the locale lacks it, and a byte order
    mark as a part of a text."""
    q = dict(role="user", content=" Why? ")
    system = dict(role="system", content="Be brief.")
    this = ("--model", copy_of_the_demo(tmp_path, CHATS), "--prompt", " Why? ")
    for how, want in (([], [TOK.bos, *TOK.encode(" Why? ")]), (["--chat"], TOK.chat([q])),
                      (["--chat", "--system", "Be brief."], TOK.chat([system, q])),
                      (["--chat", "--system", ""], TOK.chat([q]))):
        assert job(*this, *how).prompt() == want
    for text in ("é", "\udcc3\udca9"):
        assert job("--prompt", text).prompt() == [TOK.bos, *TOK.encode("é")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfx\r\n")))
    assert job("--prompt", "-").prompt() == [TOK.bos, *TOK.encode("x\r\n")]


def test_a_prompt_is_refused_unread_if_no_tokens_are_long_enough_for_it(complaint, tmp_path,
                                                                        monkeypatch):
    """Rejects half a minute for 100 MB; a bound that refuses what would fit, though it is of the
    longest tokens, which stand for 49 bytes in the demo, or though --chat takes its blanks away."""
    line = "+" + 48 * "-"
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("it was read"))
        for text in (line * 1024, "x" + " " * (49 * 1024)):
            assert complaint("--prompt", text) == (
                2, "at least 1024 prompt tokens exceed the model's context of 1024")
    assert len(job("--prompt", line * 1022, "--max-new-tokens", 1).prompt()) == 1023
    chatty = copy_of_the_demo(tmp_path, CHATS)
    assert job("--chat", "--prompt", "x" + " " * 900_000, "--model", chatty).prompt()


def test_on_a_terminal_the_prompt_stands_dim_before_the_text(terminal, result, monkeypatch):
    """Rejects a text without its beginning, a begin-of-text in it, a prompt glued to a text that a
    pipe receives, an account glued to a text, colours with NO_COLOR, waiting that is not shown."""
    prompt = ("--prompt", "def f(x):", *NAMED, "--max-new-tokens", 6)
    text = result(*prompt)["text"]
    stays, stood = terminal(*prompt)
    assert stays.startswith(f"\033[2mdef f(x):\033[0m{text}\n\033[2mpaper: 6 tokens in ")
    assert stood == ["reading 5 tokens", ""]
    with monkeypatch.context() as patch:
        patch.setattr("command.job.MUCH", 0)
        assert terminal(*prompt)[1][0] == "loading: 0.0 of 0.0 GB"
    assert terminal(*prompt, streams=["stdout"]) == (text + "\n", [])
    assert terminal(*prompt, "--json")[0].startswith("{")
    assert "def" not in terminal(*prompt, streams=["stderr"])[0]
    stays, stood = terminal(*prompt, "--compare", "--repeats", 1)
    assert re.search("^texts +equal$", stays, re.M)
    assert stood == ["pair 1 of 2", "pair 2 of 2", ""]
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal(*prompt)[0].startswith(f"def f(x):{text}\npaper: 6 tokens in ")


CODE = r"\033\[[\d;]*m"
REJECTED = r"\033\[9;31m.*?\033\[0m"


def test_verbose_is_a_legend_the_prompt_a_line_per_round_and_the_text_once(terminal, run, result,
                                                                           tmp_path):
    """Rejects a bar of another skip set, rounds that are not shown, rounds among the text that a
    pipe receives, and on a terminal a text that stands between its rounds a second time; a choice
    of layers that is not marked; a line of more than 79 columns. Of what is drawn: a token that is
    shown late, twice or elsewhere than where it stays, struck or kept, numbers that showing it uses
    up, a GPU that is waited for where nobody looks. A trace of another run than the one that is
    shown, and an unfinished one."""
    how = ("--prompt", "import os\n", "--max-new-tokens", 24, "--strategy", "paper", "--interval",
           2, "--temperature", 1, "--seed", 6)
    r = result(*how)
    n = r["stats"]["verifies"] + 1
    path = tmp_path / "trace"
    status, out, err = run(*how, "--verbose", "--trace", path)
    assert status == 0 and out == r["text"]
    assert json.loads(path.read_text().splitlines()[-1])["event"] == "end"
    painted, stood = terminal(*how, "--verbose")
    for shown in (err, re.sub(CODE, "", painted)):
        legend, first, *lines, head, rate = shown.splitlines()
        assert re.match(r"kept .*rejected.* .*the model's own.* chosen anew$", legend)
        assert first == "import os" and head.startswith("paper: 24 tokens in ")
        assert max(map(len, shown.splitlines())) < 80
        lines = [line for line in lines if line[:4].strip()]
        assert [int(line[:4]) for line in lines] == list(range(n))
        assert [line[4] == "*" for line in lines] == [i % 2 == 1 for i in range(n)]
        assert [line[5:37].count("░") for line in lines] == [0] + [18] * (n - 1)
    rounds = painted.splitlines()[2:-2]
    assert "".join(re.sub(f"{REJECTED}|{CODE}", "", line)[44:] for line in rounds) == "".join(
        c if c.isprintable() else repr(c)[1:-1] for c in r["text"])
    chance = speculative.Chance(7)
    assert Screen(job(*how, "--verbose"), [1]).watched(chance) is chance
    for line, end in list(zip(lines, re.findall(r" \d+/(\d+) +", "\n".join(lines))))[1:]:
        drawn = [re.sub(CODE, "", words) for words in stood if words.startswith(f"{line[:4]}  ")]
        assert len(drawn) == int(end) + 1              # the model's own is drawn after them
        assert all(line[44:].startswith(words[44:].rstrip()) for words in drawn)
        assert sorted(drawn, key=len) == drawn and drawn[-1][44:].rstrip() == line[44:].rstrip()


def test_what_a_model_holds_for_itself_is_the_default(result, tmp_path):
    """Rejects a usage error for a first try; another prompt, temperature or seed than the folder's
    clasp.json holds, these for another prompt, one of its numbers that beats a flag of 0."""
    costs = dict(draft=[1.0] + [0.5] * 32, verify=[1.0] * 14)
    own = dict(device="cpu", prompt="class A:", temperature=0.75, seed=3, costs=costs)
    this = ("--model", copy_of_the_demo(tmp_path, {"clasp.json": own}), "--max-new-tokens", 2)
    r = result(*this)
    assert r["prompt_ids"] == [TOK.bos, *TOK.encode("class A:")]
    assert r["settings"].items() >= dict(temperature=0.75, seed=3, costs=costs, r=1,
                                         device="cpu").items()
    for how, want in ((("--prompt", "class A:"), (0, 0)), (("--prompt-ids", 1), (0, 0)),
                      (("--seed", 0), (0.75, 0)), (("--temperature", 0), (0, 3))):
        s = job(*this, *how)
        assert (s.settings.temperature, s.flags.seed) == want
    put(tmp_path, {"kept.json": dict(settings=dict(costs=dict(costs, optimise=2.0)))})
    assert job(*this, "--costs", tmp_path / "kept.json").costs == dict(costs, optimise=2.0)


@pytest.mark.parametrize("much, said", [(0.3, []), (0.0, ["loading 0.0 GB", "timing passes"])])
def test_a_large_model_says_what_it_takes_its_time_for(tiny, monkeypatch, capsys, much, said):
    """Rejects a log that is silent while weights are read or passes timed, and one that a small
    model fills; an account that begins later than the process or leaves the timing out; a seed that
    may give another text next time without a word, and times that are not kept."""
    monkeypatch.setattr("command.job.MUCH", much)
    monkeypatch.setitem(sys.modules, "command.start", SimpleNamespace(BEGAN=-1e6))
    how = ("--model", tiny, "--device", "cpu", "--prompt-ids", 1, "--temperature", 1)
    this = job(*how)
    this.load().measure(this.model, this.model.cache(20), [1])
    assert this.load_seconds > 1e6 and this.measure_seconds > 0
    notes = re.findall("loading 0.0 GB|timing passes|from then on one: ", capsys.readouterr().err)
    assert notes == [*said, "from then on one: "]
    assert job(*how).costs == this.costs


def of_size(folder, width, **config):
    """A folder with a config.json alone, of 16 layers."""
    sizes = dict(num_hidden_layers=16, hidden_size=width, intermediate_size=4 * width)
    put(folder, {"config.json": BASE | sizes | config})
    return "--model", folder, "--device", "cpu", "--prompt-ids", 1


@pytest.mark.parametrize("width, fast, how, dtype, threads, said", [
    (128, True, [], torch.float32, 1, False), (512, True, [], torch.bfloat16, 2, True),
    (128, True, ["--threads", 2], torch.float32, 2, False),
    (512, False, [], torch.float32, 2, False),
    (512, True, ["--dtype", "float32"], torch.float32, 2, False),
    (512, False, ["--dtype", "bfloat16"], torch.bfloat16, 2, False)])
def test_a_large_model_is_bfloat16_where_that_is_fast_and_says_so(
        tmp_path, monkeypatch, capsys, width, fast, how, dtype, threads, said):
    """Rejects rounding that is not announced, that --dtype does not prevent, or that is slow; a
    small model on many threads and a large one on one."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    torch.set_num_threads(2)
    this = job(*of_size(tmp_path, width), *how)
    assert (this.dtype, torch.get_num_threads()) == (dtype, threads)
    assert ("note: bfloat16 on cpu" in capsys.readouterr().err) == said


def test_help_fits_a_screen_and_names_every_flag(run, monkeypatch):
    """Rejects a help text that argparse cannot print, or that nobody reads, and an exit status that
    is lost."""
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run("--help")
    assert (status, err) == (0, "") and out.count("\n") <= 45
    assert all(f"--{name.replace('_', '-')} " in out for name in vars(parser().parse_args([])))
    assert all(f"{name}: " in out for name in ("clasp", "paper", "ar"))
    assert run("--version")[:2] == (0, f"clasp-mini {VERSION}\n")
    with pytest.raises(SystemExit, match="3"):         # what else exits says how
        answer(lambda: sys.exit(3))


# ============================================================================== how it ends

def test_ctrl_c_ends_with_the_account_so_far(tmp_path):
    """Rejects a model looked for in the working folder, a prompt that does not come through a pipe;
    a traceback, a lost account, an exit status of success, a text that comes in lumps or when it is
    whole."""
    p = process("--prompt", "-", "--max-new-tokens", 1000, "--temperature", 1, "--strategy", "ar",
                stdin=subprocess.PIPE, cwd=tmp_path)
    p.stdin.write(b"x = ")
    p.stdin.close()
    p.stdout.read(1)
    p.send_signal(signal.SIGINT)
    out = p.stdout.read()
    err = p.stderr.read()
    assert p.wait(60) == 130 and b"Traceback" not in err and err.lstrip().startswith(b"ar: ")
    assert len(out) < 4000                             # no buffer had to fill before any was seen


@pytest.mark.parametrize("stop, status", [(KeyboardInterrupt, 130), (FloatingPointError, 1)])
def test_what_was_drawn_in_a_round_that_never_ends_is_taken_away(terminal, monkeypatch, stop,
                                                                 status):
    """Rejects an account or a complaint after tokens that were never judged."""
    def run(job, ids, chance):
        yield a_round([], 0, [9])
        chance.draw(torch.eye(V)[97])
        raise stop("not finite")
    monkeypatch.setattr(clasp_mini, "run", run)
    stays, stood = terminal("--prompt", "x", "--verbose", status=status)
    assert re.sub(CODE, "", stood[-2]) == "   1" + " " * 10 + "a" and stood[-1] == ""


def test_what_was_written_before_ctrl_c_is_kept_and_summed_up(run, monkeypatch):
    """Rejects a half character at the end that is dropped, in the text or in the object, and an
    account that is glued to the text."""
    half = TOK.encode("日")[:-1]

    def rounds(*_):
        yield a_round([], 0, [7])
        yield a_round([], 0, half, (0, 1, 0))
        raise KeyboardInterrupt
    monkeypatch.setattr(clasp_mini, "run", rounds)
    status, out, err = run("--prompt", "x")
    assert (status, out) == (130, TOK.decode([7, *half])) and out.endswith("\ufffd")
    assert err.startswith(f"\nclasp: {1 + len(half)} tokens in ")
    assert json.loads(run("--prompt", "x", "--json")[1])["text"] == out


def test_ctrl_c_before_there_is_a_text_just_ends_it():
    """Rejects the traceback of an import that was broken off: of PyTorch's, which has begun."""
    p = process(python=["-X", "importtime"])
    while b" torch." not in p.stderr.readline():
        pass
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == -signal.SIGINT and out == b"" and b"Traceback" not in err


def test_without_its_packages_it_says_how_to_install_them():
    """Rejects a traceback."""
    p = process(python=["-S"])                         # which looks for no packages
    out, err = p.communicate(timeout=60)
    assert (p.returncode, out) == (1, b"")
    assert re.fullmatch(rb"clasp_mini.py: not installed for .*: torch, safetensors, tiktoken.\n"
                        rb"In this folder:\n.* -m venv .* -r requirements.txt\n.*mini.py\n", err)


def test_where_ctrl_c_is_ignored_it_stays_ignored(tiny):
    """Rejects a run under nohup that a Ctrl-C meant for another program ends."""
    for was, will in ((signal.SIG_IGN, signal.SIG_IGN),
                      (signal.SIG_DFL, signal.default_int_handler)):
        signal.signal(signal.SIGINT, was)
        job("--model", tiny, "--prompt-ids", 1).load()
        assert signal.getsignal(signal.SIGINT) is will


class Full(io.StringIO):
    """A stream without what only files have, and without room."""
    def flush(self):
        raise OSError(28, "No space left on device")


def abandoned():
    """A pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("name, stream, status, said", [
    ("stdout", lambda: None, 1, "output: closed"), ("stdout", abandoned, 141, ""),
    ("stdout", Full, 1, "output: No space left on device"), ("stdout", io.StringIO, 0, ""),
    ("stderr", lambda: None, 0, ""), ("stdin", lambda: None, 2, "--prompt is missing or empty")])
def test_streams_may_be_missing_full_or_a_notebooks(run, monkeypatch, name, stream, status, said):
    """Rejects a traceback, and success reported for a text that is lost; a word where `| head` has
    seen enough."""
    stream = stream()
    monkeypatch.setattr(sys, name, stream)
    prompt = "-" if name == "stdin" else "x"
    got, out, err = run("--prompt", prompt, "--max-new-tokens", 2, "--json")
    assert got == status and err.startswith(f"clasp_mini.py: {said}" if said else "")
    assert err.count("\n") == bool(said)
    assert type(stream) is not io.StringIO or json.loads(stream.getvalue())["ids"]


def test_a_file_gets_utf_8_and_a_terminal_what_it_can_show(run, monkeypatch):
    """Rejects a UnicodeEncodeError in the middle of a text, and characters that are lost in a file,
    or on a terminal without a word; after a text that has ended its line, an empty one."""
    monkeypatch.setattr(clasp_mini, "run", lambda *_: [a_round([], 0, TOK.encode("a日b\n"))])
    for tty, seen, said in ((False, "a日b\n", "clasp: "), (True, "a?b\n", "clasp_mini.py: note: ")):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        out.isatty = lambda: tty
        monkeypatch.setattr(sys, "stdout", out)
        status, _, err = run("--prompt", "x")
        assert (status, out.buffer.getvalue()) == (0, seen.encode()) and err.startswith(said)
        assert ("encoding, ascii" in err) == tty


NO_ROOM = ("out of memory: the weights take 0.0 GB in float32, the cache of 130 tokens 0.0 GB; "
           "take fewer --max-new-tokens or a smaller model")


@pytest.mark.parametrize("raised, status, said", [
    (MemoryError(), 1, NO_ROOM), (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), 1, NO_ROOM),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 1, NO_ROOM),
    (llama.ModelError("a\nb: broken"), 1, "a b: broken"),
    (FloatingPointError("not finite"), 1, "not finite"),
    (PermissionError(13, "Permission denied", "w.safetensors"), 1,
     "w.safetensors: Permission denied")], ids=lambda x: type(x).__name__)
def test_what_stops_it_is_one_line(run, monkeypatch, raised, status, said):
    """Rejects a traceback, success, a line without words, two lines."""
    def stop(*_, **how):
        raise raised
    for where in ("load", "cache") if status == 1 else ("load",):
        with monkeypatch.context() as patch:
            patch.setattr(llama.Llama, where, stop)
            assert run("--prompt", "x", "--json") == (status, "", f"clasp_mini.py: {said}\n")


@pytest.mark.parametrize("tied, weights, room", [(False, "16.1", 17.13e9), (True, "15.0", 16.08e9)])
def test_what_cannot_fit_into_memory_is_said_with_its_sizes_beforehand(monkeypatch, tmp_path, tied,
                                                                       weights, room):
    """Rejects a limit for the weights or the cache alone, a tied head counted twice, other sizes:
    of the 8B with its whole context, whose cache is 2 * 32 * 8 * 128 * 8192 numbers of 2 bytes."""
    sizes = dict(num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                 intermediate_size=14336, num_hidden_layers=32, max_position_embeddings=8192)
    of_it = job(*of_size(tmp_path, 4096, **sizes, tie_word_embeddings=tied), "--dtype", "bfloat16",
                "--max-new-tokens", 8191)
    of_it.prompt()
    model = SimpleNamespace(load=lambda *_, part: None)
    monkeypatch.setattr("command.job.memory_here", lambda: room)
    said = f"{weights} GB in bfloat16, the cache of 8192 tokens 1.1 GB"
    with pytest.raises(llama.ModelError, match=said):
        of_it.load(model)
    monkeypatch.setattr("command.job.memory_here", lambda: room + 2e7)
    of_it.load(model)


# ============================================================================== what is wrong

LIMITS = {              # flag: what it takes, at the ends; what it does not take
    "--prompt-ids": (["0", str(V - 1), "1 2,3"], ["", ",", "1,x", "-1", "1.5", "1;2"]),
    "--device": (["cpu"], ["abacus", "cuda:", "cuda:x", "CPU", ""]),
    "--dtype": (["float32", "float64", "bfloat16"], ["int3", "float16", ""]),
    "--threads": (["1"], ["0", "1025", "x", "1.5", "1e12"]),
    "--repeats": (["1"], ["0", "x"]),
    "--max-new-tokens": (["1"], ["0", "-1", "x", "1.5", "", "nan"]),
    "--temperature": (["0", "1e-300", "5"], ["-1", "nan", "inf", "hot", ""]),
    "--top-k": (["0", "4097"], ["-3", "2.5", "x", "1" + 30 * "0"]),
    "--top-p": (["1e-300", "1"], ["0", "1.1", "-1", "nan", "x"]),
    "--seed": (["0", "4294967295"], ["-1", "4294967296", "x", "0.5"]),
    "--strategy": (["paper", "ar", "clasp"], ["draft", ""]),
    "--skip-layers": (["0", "32"], ["-1", "33", "1.5", "half"]),
    "--draft-length": (["0", "511"], ["-1", "512", "x"]),
    "--draft-exit-threshold": (["0", "1"], ["1.5", "-0.1", "nan", "x"]),
    "--interval": (["1"], ["0", "-1", "x"]),
    "--probe": (["1", "64"], ["0", "65", "x"])}
FREE = {"--prompt", "--system", "--model", "--trace", "--costs"}


def test_every_flag_takes_what_it_can_and_nothing_else(complaint, tiny):
    """Rejects a limit that is off by one, a traceback, a value that is guessed, and a complaint
    that does not name the flag and the value; of a small context, one token less than it leaves."""
    with_value = set(re.findall(r"(--[a-z-]+) [A-Z1]", parser().format_help()))
    assert with_value == {*LIMITS, *FREE}, "a new flag needs its limits here"
    for flag, (right, wrong) in LIMITS.items():
        prompt = () if flag == "--prompt-ids" else ("--prompt", "x")
        if flag == "--repeats":
            prompt += ("--compare",)
        for value in right:
            assert job(*prompt, f"{flag}={value}").prompt()
        for value in wrong:
            status, said = complaint(*prompt, f"{flag}={value}")
            assert status == 2 and said.startswith(flag) and value in said, said
    for how in (("--max-new-tokens", 5), ()):          # 128 do not fit
        this = job("--model", tiny, "--prompt-ids", "49 " * 15, *how)
        assert this.prompt() and this.settings.N == this.plain.N == 5


TINY = ("--model", "TINY", "--device", "cpu", "--max-new-tokens")
WRONG_INPUTS = [        # arguments, exit status, what is said
    (["--prompt", ""], 2, "--prompt is missing or empty"), (["--prompt", b""], 2, "is missing"),
    (["--prompt"], 2, "--prompt: expected one argument; one that begins with - is written after"),
    (["--max=3"], 2, "--max=3; did you mean --max-new-tokens?"),
    (["--max-tokens", "3"], 2, "--max-tokens 3; did you mean --max-new-tokens?"),
    (["--zzz"], 2, "unrecognized arguments: --zzz (--help"),
    (["hello"], 2, "hello; a prompt stands after --prompt, in quotes"),
    (["--prompt", "\udc80"], 2, "not valid UTF-8"), (["--prompt", b"\xff"], 2, "not valid UTF-8"),
    (["--prompt-ids", V], 2, f"token {V} is not in the model's vocabulary of {V}"),
    (["--prompt-ids", "1", "--prompt", "x"], 2, "--prompt-ids goes without --prompt and --chat"),
    (["--prompt-ids", "1", "--chat"], 2, "--prompt-ids goes without --prompt and --chat"),
    (["--prompt", "x", "--system", "y"], 2, "--system goes with --chat"),
    (["--model", "/nowhere", "--prompt", "x"], 1, "/nowhere: no such folder"),
    (["--model", "meta-llama/Llama-3.2-1B"], 1, "of a model on the hub, `hf download NAME`"),
    (["--model", DEMO / "config.json"], 1, f"a file; give its folder, {DEMO}"),
    (["--model", "a\nb"], 1, "a b: no such folder"),
    (["--prompt", "xyz " * 2_000], 2, "prompt tokens and 1 new ones exceed the model's context"),
    (["--device", "cuda:77"], 2, "--device cuda:77: PyTorch sees"),
    ([*TINY, 6, "--prompt-ids", "7 " * 15], 2, "15 prompt tokens and 6 new ones exceed the model's "
     "context of 20: --max-new-tokens 5 fits"),
    ([*TINY, 1, "--prompt-ids", "7 " * 20], 2, "20 prompt tokens and 1 new ones exceed the model's "
     "context of 20"),
    ([*TINY, 1, "--prompt-ids", 50], 2, "token 50 is not in the model's vocabulary of 50"),
    ([*TINY, 1, "--prompt", "x"], 1, "no tokenizer.model"),
    (["--compare", "--strategy", "ar"], 2, "--compare runs plain decoding too"),
    (["--compare", "--verbose"], 2, "without"), (["--compare", "--trace", "t"], 2, "without"),
    (["--repeats", 3], 2, "--repeats goes with --compare"),
    (["--costs", "/nowhere"], 1, "/nowhere: cannot be read"),
    (["--costs", DEMO / "config.json"], 1, "config.json: costs are ")]


WRONG_FOLDERS = [       # what differs from the demo's, what is said
    ({"clasp.json": [1]}, "clasp.json: cannot be read as a JSON object"),
    ({"clasp.json": dict(skip_layers=3)}, "clasp.json: skip_layers is not one of"),
    ({"clasp.json": dict(seed=True)}, "clasp.json: --seed: 'True' is not"),
    ({"clasp.json": dict(costs=dict(draft=[1] * 33, verify=[1, 1], risk=[0.1]))}, "33 chances"),
    ({"config.json": None, "snapshots/0a1b/config.json": 0},
     "snapshots/0a1b/config.json, of a hub cache"),
    ({"config.json": None, "consolidated.00.pth": 0, "params.json": 0},
     "of Meta's own files: take Hugging Face's"),
    ({"config.json": None, "m.gguf": 0}, "there is m.gguf, which is not read"),
    ({"tokenizer.model": "version https://git-lfs.github.com/spec/v1\n"},
     "; tokenizer.model is a pointer of Git LFS: git lfs pull"),
    ({"config.json": None}, "config.json: cannot be read")]


@pytest.mark.parametrize("arguments, status, words", WRONG_INPUTS + [
    (["--prompt", "x", "--model", files], 1, words) for files, words in WRONG_FOLDERS])
def test_wrong_input_gets_one_clear_line(complaint, tiny, tmp_path, monkeypatch, arguments, status,
                                         words):
    """Rejects a traceback, a guess, an error that does not name what is wrong or does not end with
    the advice that helps; of a folder: a name that is passed over, a value that its flag does not
    take, "no such file" where a model lies in another form; of a pipe: bytes that are no text, and
    an empty one as a prompt."""
    def given(x):
        if isinstance(x, bytes):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(x)))
            return "-"
        if isinstance(x, dict):
            return copy_of_the_demo(tmp_path, x)
        return tiny if x == "TINY" else x
    got, said = complaint(*map(given, arguments))
    assert got == status and words in said and said.endswith("of 20") == words.endswith("of 20")


TURN = ("'<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + content | trim + '<|eot_id|>'"
        " + '<|start_header_id|>assistant<|end_header_id|>'")
IM_START = "{% if m %}<|im_start|>{{ m['role'] }}{% endif %}"
DATES = "{{ 'Cutting Knowledge Date' + " + TURN + " }}"
NOT_FOLLOWED = "the folder's chat template is not followed"


def template(text):
    return {"tokenizer_config.json": dict(chat_template=text)}


def ends(ids):
    return {"generation_config.json": dict(eos_token_id=ids)}


@pytest.mark.parametrize("files, how, words", [
    ({}, ["--prompt", "a <|eot_id|>"], "<|eot_id|> in the prompt is text"),
    (ends([3841, 97]), [], "ends the text, as the model's files say: 97, 'a'"),
    (ends([]), [], "the model's files name no token that ends a text"),
    ({}, ["--strategy", "ar", "--draft-length", 8], "--strategy ar drafts nothing"),
    (ends([3841]), ["--chat"], "<|eot_id|> does not stop this model"), ({}, ["--chat"], None),
    ({"clasp.json": {}}, [], "there seems to be a GPU; computing on the CPU"),
    (template(DATES), ["--chat"], NOT_FOLLOWED), (template(IM_START), ["--chat"], NOT_FOLLOWED),
    ({"chat_template.jinja": DATES}, ["--chat"], NOT_FOLLOWED),
    (template(DATES), [], None), (template("{{" + TURN + "}}"), ["--chat"], None)])
def test_what_departs_from_what_was_asked_is_said_once(tmp_path, monkeypatch, capsys, files, how,
                                                       words):
    """Rejects silence, and a note for the template that is followed, the model that is stopped, the
    device that was named; an 8B that runs on the CPU without a word."""
    monkeypatch.setattr("gpu.replay.unusable", lambda: "there seems to be a GPU")
    own = {"clasp.json": dict(device="cpu")}
    folder = copy_of_the_demo(tmp_path, CHATS | ends([3841, 3849]) | own | files)
    job("--model", folder, "--prompt", "x", *how).prompt()
    err = capsys.readouterr().err
    assert err == "" if words is None else err.count("note: ") == 1 and words in err
