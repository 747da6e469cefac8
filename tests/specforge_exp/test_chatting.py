"""chat.py: in a pseudo-terminal, with piped text, and with a server on loopback."""

import socket
import subprocess
import sys
import time
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
from chat_screen import TerminalScreen, prompts, waiting
from chat_shapes import SHAPES
from chat_templates import tokenizer_of
from conftest import REPOSITORY, TINY, make_config
from test_server_engine import free_port
from tokenizers import decoders

from specforge_exp import paths
from specforge_exp.bench.asking import heading_of
from specforge_exp.bench.speculative import Decoding, Generation, generate
from specforge_exp.chat import local
from specforge_exp.chat.dialogue import Dialogue, Spoken
from specforge_exp.chat.local import LocalModel
from specforge_exp.config import ChatConfig, Config, Source
from specforge_exp.data import synthetic
from specforge_exp.data.conversations import asks_of
from specforge_exp.data.rendering import Spelling, prompt_ids
from specforge_exp.errors import InputError
from specforge_exp.stages.chat import draft_folder, who_answers
from specforge_exp.stages.export import export
from specforge_exp.stages.prep import prep
from specforge_exp.stages.preprocess import preprocess
from specforge_exp.stages.train import train

QUESTIONS = [asks_of(record)[0][0]["content"] for record in synthetic.generate("bench", 40)][::13]
LONG = "/temperature 5"
"""The answer is then gibberish without an end."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose draft has learnt enough to be accepted now and then, exported."""
    cfg = make_config(tmp_path_factory.mktemp("chat"))
    cfg.data.train = [Source(path="synthetic:train", limit=80)]
    cfg.preprocess.source, cfg.target.cache, cfg.export.dtype = "prep", "memory", "float32"
    cfg.max_steps, cfg.epochs, cfg.lr, cfg.trainer.batch_size = 40, 2, 8e-3, 4
    cfg.chat.temperature, cfg.chat.max_tokens = 0.0, 60
    prep(cfg)
    preprocess(cfg)
    train(cfg)
    export(cfg)
    cfg.max_length = 500
    return cfg


@pytest.fixture(scope="module")
def with_draft(trained: Config) -> LocalModel:
    return LocalModel(trained, paths.export_dir(trained))


@pytest.fixture(scope="module")
def alone(trained: Config) -> LocalModel:
    return LocalModel(trained, None)


def begun(*messages: dict[str, str], **settings: Any) -> Dialogue:
    """A dialogue with these messages; greedy, at most 60 tokens an answer."""
    greedy = ChatConfig(**{"temperature": 0.0, "max_tokens": 60} | settings)
    return Dialogue("m", greedy, [*messages])


def talk(model: LocalModel, questions: list[str], **settings: Any) -> tuple[Dialogue, Spoken]:
    """The dialogue after these questions, and the last answer."""
    dialogue, spoken = begun(**settings), Spoken()
    for question in questions:
        dialogue.messages.append(asked(question))
        *_, spoken = model.answer(dialogue)
        dialogue.messages.append({"role": "assistant", "content": spoken.text})
    return dialogue, spoken


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_the_draft_changes_no_word(with_draft: LocalModel, alone: LocalModel) -> None:
    """Three turns, with the past kept, are what the target says to each prompt by itself."""
    dialogue, spoken = talk(with_draft, QUESTIONS[:3], system="Be kind.")
    assert dialogue == talk(alone, QUESTIONS[:3], system="Be kind.")[0]
    assert spoken.gained and max(spoken.gained) > 1
    tokenizer = with_draft.tokenizer
    for turn in (1, 3, 5):
        prompt = prompt_ids(tokenizer, dialogue.whole[: turn + 1], {})  # system, and up to it
        said = generate(alone.target, prompt, Decoding(60, eos=alone.eos)).tokens
        text = tokenizer.decode(said, skip_special_tokens=True)
        assert dialogue.messages[turn]["content"] == text


def test_drafted_text_is_what_was_accepted(with_draft: LocalModel) -> None:
    """Every verification has at least one token of the target's own, whose text is not shaded."""
    *_, spoken = with_draft.answer(begun(asked(QUESTIONS[0])))
    drafted = [piece for piece in spoken.pieces if piece.kind == "drafted"]
    assert 0 < len(drafted) <= spoken.tokens - 1 - len(spoken.gained) + 1
    assert len(spoken.pieces) - len(drafted) >= len(spoken.gained) - 1
    assert sum(spoken.gained) == spoken.tokens - 1


def test_what_stands_before_the_header_is_no_answer(
    trained: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of gpt-oss's channels do not come into the next prompt."""
    model, shape = LocalModel(trained, None), next(s for s in SHAPES if s.name == "gpt-oss")
    tokenizer = model.tokenizer = tokenizer_of(shape)
    model.heading = heading_of(tokenizer, {})
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Y."
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    told = [Generation(tokens[:end], 1.0, [], [], 0.5) for end in (3, len(tokens) - 1, len(tokens))]
    monkeypatch.setattr(local, "generating", lambda *_: iter(told))
    texts = [spoken.text for spoken in model.answer(begun(asked("Hi")))]
    assert [texts[0], texts[-1]] == ["", "Y."]
    *_, spoken = model.answer(begun(asked("Hi")))
    assert "".join(piece.text for piece in spoken.pieces) == "analysisHm.assistantfinalY."


def test_sampled_answers_follow_seed_and_top_p(trained: Config, alone: LocalModel) -> None:
    """As little as possible is the best token; and one seed gives one talk."""
    tight = talk(alone, QUESTIONS[:1], temperature=1.0, top_p=1e-6)[0]
    assert tight.messages == talk(alone, QUESTIONS[:1])[0].messages
    models = [LocalModel(trained, paths.export_dir(trained)) for _ in range(2)]
    first, second = (talk(model, QUESTIONS[:1], temperature=1.0)[0] for model in models)
    assert first == second and first.messages != tight.messages


def test_a_stopped_answer_leaves_a_past_that_is_right(
    with_draft: LocalModel, alone: LocalModel
) -> None:
    messages = [asked(QUESTIONS[1])]
    stopped = with_draft.answer(begun(*messages))
    spoken = Spoken()
    for spoken in stopped:
        if spoken.tokens > 5:
            break
    stopped.close()
    messages += [{"role": "assistant", "content": spoken.text}, asked(QUESTIONS[2])]
    assert with_draft.past is not None
    before = [*with_draft.past.ids]
    texts = []
    for model in (with_draft, alone):
        *_, spoken = model.answer(begun(*messages))
        texts.append(spoken.text)
    assert texts[0] == texts[1]
    assert with_draft.past.ids[:20] == before[:20]


def test_no_room(trained: Config, with_draft: LocalModel) -> None:
    with pytest.raises(InputError, match=r"max_length=500 leaves none for an answer: /reset"):
        talk(with_draft, ["word " * 400])
    _, spoken = talk(with_draft, QUESTIONS[:1])
    assert (spoken.tokens, spoken.end) == (60, "cut at 60 tokens")
    small = copy(with_draft)
    small.cfg = replace(trained, max_length=len(small.prompt(begun(asked(QUESTIONS[0])))) + 7)
    _, spoken = talk(small, QUESTIONS[:1])
    assert (spoken.tokens, spoken.end) == (7, f"cut at max_length={small.cfg.max_length}")


@pytest.mark.parametrize("text", ["Grüße, 世界! 👩‍👩‍👧 naïve café\n\n  x", "\x00\x1b[31m", " "])
def test_spelling_is_the_whole_text_in_pieces(tiny_tokenizer: Any, text: str) -> None:
    """Also where a tokenizer leaves the blank of a text's first word out."""
    mixtral = next(shape for shape in SHAPES if shape.name == "Mixtral")
    llama = deepcopy(tokenizer_of(mixtral))
    backend = llama.backend_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    for tokenizer in (tiny_tokenizer, llama):
        spelling, ids = Spelling(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [spelling.add(token) for token in ids]
        said = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) + spelling.rest() == said
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text


def test_which_draft(trained: Config, tmp_path: Path) -> None:
    def chosen(draft: str, **changes: Any) -> Path | None:
        return draft_folder(replace(trained, chat=replace(trained.chat, draft=draft), **changes))

    export_dir = paths.export_dir(trained)
    assert chosen("auto") == chosen("True") == chosen(str(export_dir)) == export_dir
    assert chosen("False") is None and chosen("auto", run_name="other") is None
    with pytest.raises(InputError, match=r"python export\.py"):
        chosen("true", run_name="other")
    with pytest.raises(InputError, match="cannot be read as an exported draft"):
        LocalModel(trained, chosen(str(tmp_path)))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"url": "localhost:1"}, "chat.url=localhost:1 must begin with http"),
        ({"url": "http://x/v1", "draft": "false"}, "chat.draft=false needs chat.url=null"),
        ({"top_p": 2.0}, r"chat.top_p=2.0 must be in \(0, 1\]"),
        ({"temperature": float("inf")}, "chat.temperature=inf must be a finite number"),
    ],
)
def test_options_that_do_not_fit(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        ChatConfig(**wrong)


def test_a_model_for_a_gpu_is_refused_with_two_ways_out(cfg: Config) -> None:
    cfg.device, cfg.model.gpu = "auto", "H100"
    with pytest.raises(InputError, match=r"chat\.url=.*device=cpu"):
        who_answers(cfg)


def command(cfg: Config, *more: str) -> list[str]:
    """chat.py on the run of `trained`."""
    return [
        sys.executable, str(REPOSITORY / "chat.py"), "model=tiny", "run_name=test", "device=cpu",
        f"paths.checkpoints={Path(cfg.paths.checkpoints).absolute()}", "max_length=4000",
        "draft.draft_vocab_size=512", "draft.ttt_length=3", "threads=1", *more,
    ]  # fmt: skip


def test_a_chat_in_a_terminal(trained: Config, alone: LocalModel, tmp_path: Path) -> None:
    """Typed, streamed, stopped, gone on with, every command, saved and loaded."""
    words = command(trained, "chat.temperature=0", "chat.max_tokens=3000", "chat.history=typed")
    with TerminalScreen(words, tmp_path) as here:
        assert "tiny with test · temperature 0 · top_p 1 · /help" in here.until(waiting)
        here.ask(QUESTIONS[0].replace(" ", "\n", 1))  # Ctrl-J: another line, not the end
        answer = whole_answer(alone, QUESTIONS[0].replace(" ", "\n", 1))
        assert squeezed(answer) in squeezed(here.text)
        assert "τ " in here.text and " tokens/s · " in here.text
        shaded = squeezed(here.shaded())
        assert 5 < len(shaded) < len(squeezed(answer))
        assert "top_p 1 · τ " in here.text.splitlines()[-1]

        assert "temperature 5\n" in here.ask(LONG)
        stop(here, QUESTIONS[1])
        here.type("half a line\x03/temperature 0\r")  # Ctrl-C gives up a line; typed ahead
        here.until(lambda text: waiting(text) and "temperature 0 ·" in text)
        before = prompts(here.text)
        here.type(QUESTIONS[2] + "\r")
        here.until(lambda text: streaming(text) or prompts(text) > before)
        here.type("/top_p 0.9\r")  # while it answers, unless that is over already
        here.until(lambda text: waiting(text) and "top_p 0.9 ·" in text)

        assert "system: Be kind.\n" in here.ask("/system Be kind.")
        assert "chat.jsonl: 6 messages\n" in here.ask("/save chat.jsonl")
        assert "nothing was said\n" in here.ask("/reset")
        assert "error: /tempo is no command" in here.ask("/tempo")
        assert "Ctrl-C stops an answer" in here.ask("/help")
        assert "No such file or directory: 'none.jsonl'" in here.ask("/load none.jsonl")
        assert "chat.jsonl: 6 messages\n" in here.ask("/load chat.jsonl")
        assert f"> {QUESTIONS[2]}"[:60] in here.text
        here.type("/exit\r")
        assert here.end() == 0
    assert (tmp_path / "typed").stat().st_mode & 0o777 == 0o600
    assert "Traceback" not in here.raw.decode()


def whole_answer(model: LocalModel, question: str) -> str:
    """What a program of `command` says at temperature 0."""
    model = copy(model)
    model.cfg = replace(model.cfg, max_length=4000)
    return talk(model, [question], max_tokens=3000)[1].text


def stop(chat: TerminalScreen, question: str) -> None:
    """Ask and stop the answer with Ctrl-C; again, should it have been over before."""
    while "· stopped" not in chat.text:
        before = prompts(chat.text)
        chat.type(question + "\r")
        chat.until(lambda text: streaming(text) or (waiting(text) and prompts(text) > before))  # noqa: B023
        chat.type("\x03")  # at a prompt it makes another one
        chat.until(
            lambda text: waiting(text) and ("· stopped" in text or prompts(text) > before + 1)  # noqa: B023
        )


def streaming(text: str) -> bool:
    """Whether the last line is the status of an answer that has begun, not the toolbar."""
    last = text.splitlines()[-1]
    return last.endswith((" tokens", " pieces")) and "top_p" not in last


def squeezed(text: str) -> str:
    """Without what a screen may put elsewhere."""
    return "".join(text.split())


def run(words: list[str], text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return warm.run(words, cwd, timeout=240, kind="stages", typed=text)


@pytest.mark.slow
def test_piped_text_gets_one_plain_answer(
    trained: Config, alone: LocalModel, tmp_path: Path
) -> None:
    """The same with the draft as without it, in float32."""
    question = "\n".join(QUESTIONS[:2])
    answer = whole_answer(alone, question)
    words = command(trained, "chat.temperature=0", "chat.max_tokens=3000")
    done, plain = (run([*words, *more], question + "\n", tmp_path) for more in ([], ["--no-draft"]))
    assert done.stdout == plain.stdout == answer + "\n"
    assert "τ" in done.stderr and "tokens/s" in plain.stderr and "τ" not in plain.stderr


@pytest.mark.slow
def test_errors_before_a_word_are_one_line(tmp_path: Path) -> None:
    for words, text, reason in [
        (["model=local", "model.path=none/here"], "hi", "none/here is not in the cache"),
        (["model=tiny", "-m"], "hi", "chat takes no -m"),
        (["chat.url=http://127.0.0.1:9/v1"], "hi", "/v1/models cannot be reached"),
        (["chat.url=http://127.0.0.1:9/v1"], " ", "there is no question"),
    ]:
        done = run([sys.executable, str(REPOSITORY / "chat.py"), *words], text, tmp_path)
        assert done.returncode == 1 and reason in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""


def wait_until_it_listens(port: int, served: subprocess.Popen[str]) -> None:
    """Until something accepts connections there; a server that ends is an error."""
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        assert served.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_that_speculates_and_dies(
    trained: Config, alone: LocalModel, tmp_path: Path
) -> None:
    """A chat with a real one: stopped, gone on with; when it dies, a line, and the chat goes on."""
    port = free_port()
    served = subprocess.Popen(
        [
            warm.python("speculating_server.py"),
            str(REPOSITORY / "tests" / "speculating_server.py"),
            "--model", TINY.path, "--draft", str(paths.export_dir(trained)),
            "--port", str(port), "--fails", "midway",
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert served.stdout
    pids = [int(word) for word in served.stdout.readline().split()[1:]]
    try:
        url = f"chat.url=http://127.0.0.1:{port}/v1"
        words = [sys.executable, str(REPOSITORY / "chat.py"), url, "chat.temperature=0"]
        with TerminalScreen([*words, "chat.max_tokens=3000"], tmp_path) as here:
            here.until(waiting)
            here.ask(QUESTIONS[0])  # it may not be up yet, and the chat goes on
            wait_until_it_listens(port, served)
            here.ask(QUESTIONS[0])
            answer = whole_answer(alone, QUESTIONS[0])
            assert squeezed(answer) in squeezed(here.text)
            here.ask(LONG)
            stop(here, QUESTIONS[1])
            here.ask("/temperature 0")
            here.ask("die")
            assert "error: http" in here.text
            served.wait()
            assert "cannot be reached" in here.ask("hello?")
            here.type("\x04")
            assert here.end() == 0
        assert "Traceback" not in here.raw.decode()
    finally:
        for pid in pids:
            subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)
        served.wait()
