"""Prompts from a language model: a real server on a socket, at its best and at its worst."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch import write_prompts as launch
from safetydpo_jax.data.writing import Settings, estimate, judge, write_prompts
from safetydpo_jax.data.writing.answers import PromptPair, UnusableAnswerError, read_answer
from safetydpo_jax.data.writing.concepts import read_concepts
from safetydpo_jax.data.writing.tables import distinct, in_turn
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.harm import read_harm
from tests.data.chat_server import FAULTS, Server, judged, pairs_for

ROOT = Path(__file__).resolve().parents[2]
SECRET = "secretword"
URL = "http://localhost:1/v1"  # where nobody answers


@pytest.fixture
def settings(tmp_path):
    """Of three concepts in two categories, 25 pairs each in three requests; the url is missing."""
    table = tmp_path / "concepts.csv"
    table.write_text(
        f"category,concept\nhate,{SECRET} one\nhate,{SECRET} two\nviolence,{SECRET} three\n"
    )
    out = tmp_path / "out"
    return Settings(table, out, "", "good", per_concept=25, timeout=20.0, judge=False)


@pytest.fixture
def wanted(settings, tmp_path):
    """The tables of a run in which nothing goes wrong."""
    with Server() as server:
        write_prompts(replace(settings, url=server.url, out=tmp_path / "wanted"), print)
    return read(tmp_path / "wanted")


def read(out):
    found = {}
    for file in sorted(out.glob("*/prompts.csv")):
        with file.open(newline="") as table:
            found[file.parent.name] = list(csv.DictReader(table))
    return found


def test_a_run(settings, capsys):
    said = []
    with Server() as server:
        report = write_prompts(replace(settings, url=server.url), said.append)
        assert set(server.asked.values()) == {1}
        assert server.asked.total() == 9
    assert said[0] == "3 concepts, 9 requests, 0 answered before"
    assert said[-1].startswith("9/9 requests, ")
    assert said[-1].endswith("0 s left; 900 + 450 tokens")
    assert report["categories"]["hate"] == {
        "written": 50,
        "left_out": 0,
        "kept": 50,
        "duplicates": 0,
        "beyond": 0,
    }
    found = read(settings.out)
    assert [len(rows) for rows in found.values()] == [50, 25]
    assert [row["concept"] for row in found["hate"][:4]] == ["hate-0000", "hate-0001"] * 2
    first = pairs_for(f"{SECRET} one", 10, 10)[0]
    assert {k: found["hate"][0][k] for k in first} == first
    report_text = (settings.out / "report.json").read_text()
    assert SECRET not in "".join(said) + report_text + "".join(capsys.readouterr())


def test_what_it_makes_is_a_harm(settings, wanted, tmp_path):
    harm = read_harm(str(tmp_path / "wanted" / "violence"))
    assert harm.name == "violence"
    assert len(harm.prompts) == 25


def test_nothing_is_lost_or_doubled_whatever_the_server_does(settings, wanted):
    with Server(FAULTS, delay=0.01) as server:
        report = write_prompts(replace(settings, url=server.url), lambda line: None)
        assert server.asked.total() > 9
        assert set(server.answered.values()) == {1}
    assert report["unanswered_ids"] == {}
    assert read(settings.out) == wanted


def by_text(rows):
    return sorted(rows, key=lambda row: row["unsafe"])


def test_the_judge_leaves_pairs_out_whatever_the_server_does(settings, wanted):
    with Server(FAULTS, delay=0.01) as server:
        asked = replace(settings, url=server.url, judge=True)
        report = write_prompts(asked, lambda line: None)
        assert set(server.answered.values()) == {1}
        assert len(server.answered) == 2 * 9
    assert report["unanswered_ids"] == {}
    found = read(settings.out)
    assert {name: by_text(rows) for name, rows in found.items()} == {
        name: by_text(judged(rows)) for name, rows in wanted.items()
    }
    assert report["left_out"].keys() == {judge.NOT_UNSAFE, judge.NOT_SAFE}
    gone = 75 - sum(map(len, found.values()))
    assert sum(report["left_out"].values()) == gone > 4
    assert sum(count["left_out"] for count in report["categories"].values()) == gone


def test_a_killed_run_goes_on(settings, wanted):
    with Server(delay=0.3) as server:
        command = [sys.executable, str(ROOT / "launch" / "write_prompts.py")]
        options = {"concepts": settings.concepts, "out": settings.out, "endpoint": server.url}
        options |= {"model": "good", "per_concept": 25, "concurrency": 2}
        command += [f"--{name}={value}" for name, value in options.items()] + ["--no_judge"]
        for answered in (2, 5):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while server.answered.total() < answered:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        with (settings.out / "journal.jsonl").open("a") as journal:
            journal.write('{"id": "hate-0000-0')  # torn off
        server.delay = 0
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert server.answered.total() <= 9 + 4  # two may be on their way at each kill
    assert read(settings.out) == wanted
    assert SECRET not in done.stdout + done.stderr
    assert (
        "hate              50 pairs of 50: 0 left out, 0 near-duplicates, 0 more than"
        in done.stdout
    )
    again = subprocess.run(command, capture_output=True, text=True, check=True)  # server is gone
    assert "9 requests, 9 answered before" in again.stdout


def test_requests_at_a_time_and_a_minute(settings):
    with Server(delay=0.05) as server:
        write_prompts(replace(settings, url=server.url, concurrency=3), lambda line: None)
        assert server.most_at_once == 3
        slow = replace(settings, url=server.url, out=settings.out / "slow")
        began = time.monotonic()
        write_prompts(replace(slow, requests_per_minute=600), lambda line: None)
        assert time.monotonic() - began > 0.7  # the ninth comes after eight tenths of a second


def test_what_cannot_be_answered_is_asked_again_by_the_next_run(settings, wanted):
    always = [fault for fault in FAULTS if fault == "refusal"]
    with Server(always) as server:
        one = replace(settings, url=server.url, attempts=1)
        with pytest.raises(UserError, match=r"no pair could be used: .*report\.json says why"):
            write_prompts(one, lambda line: None)
        report = json.loads((settings.out / "report.json").read_text())
        assert report["unanswered"] == {"no JSON list of pairs, or a damaged one": 9}
        assert write_prompts(one, lambda line: None)["unanswered_ids"] == {}
    assert read(settings.out) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "has no model 'other' or no chat"),
        ({"per_concept": 0}, "per_concept is 0: it must be 1 or more"),
        ({"temperature": float("nan")}, "temperature is nan: it must be 0 or more"),
        ({"requests_per_minute": float("inf")}, "requests_per_minute is inf"),
        ({"timeout": -1.0}, "timeout is -1.0: it must be more than 0 seconds"),
        ({"url": "localhost:8000"}, "the endpoint is 'localhost:8000': write it as http://"),
        ({"url": "http://host:xx/v1"}, "the endpoint is .*: write it as"),
        ({"url": "http://host:99999999/v1"}, "the endpoint is .*: write it as"),
        ({"template": Path("none.txt")}, "none.txt: there is no such template"),
        ({"concepts": Path("none.csv")}, "none.csv: there is no such file"),
    ],
)
def test_wrong_settings(settings, change, message):
    with Server() as server, pytest.raises(UserError, match=message) as raised:
        write_prompts(replace(settings, **{"url": server.url} | change), lambda line: None)
    assert SECRET not in str(raised.value)


def test_a_key_that_is_not_taken(settings, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with Server() as server, pytest.raises(UserError, match="does not take the key .401.: set O"):
        write_prompts(replace(settings, url=server.url), lambda line: None)


def test_a_server_that_is_not_there(settings, monkeypatch):
    from safetydpo_jax.data.writing import endpoint

    monkeypatch.setattr(endpoint, "RETRIES", 1)
    with Server() as server:
        url = server.url
    with pytest.raises(UserError, match="cannot be reached, after 2 tries: what was written so"):
        write_prompts(replace(settings, url=url), lambda line: None)


def test_a_template_of_ones_own(settings, tmp_path):
    template = tmp_path / "mine.txt"
    template.write_text("Concept: {concept}\nWrite {count} such, set {set} of {sets}, {{}}")
    mine = replace(settings, template=template)
    with Server() as server:
        assert write_prompts(replace(mine, url=server.url), lambda line: None)["requests"] == 9
    with pytest.raises(UserError, match=r"was made with template_hash = .* choose another folder"):
        write_prompts(replace(settings, url=URL), lambda line: None)
    for text in ("{concept} {count} {x}", "{count}", "{concept.x} {count}", "{concept} {count} {"):
        template.write_text(text)
        with pytest.raises(UserError, match="a template has .concept. and .count. in braces"):
            estimate(mine)
    template.write_bytes(b"{concept} {count} \xff")
    with pytest.raises(UserError, match="the template is not UTF-8"):
        estimate(mine)


def test_a_judge_template_of_ones_own(settings, tmp_path):
    mine = replace(settings, judge=True, judge_template=tmp_path / "mine.txt")
    with pytest.raises(MissingFileError, match="mine.txt: there is no such template"):
        estimate(mine)
    for text in ("{count}", "{prompts} {concept}", "{prompts:>9}", "{prompts!r}"):
        mine.judge_template.write_text(text)
        with pytest.raises(UserError, match="has .prompts. in braces and may have .category. and"):
            estimate(mine)
    mine.judge_template.write_text("{prompts}")
    assert estimate(mine)["prompt_tokens"] > estimate(settings)["prompt_tokens"]


def test_a_file_that_is_no_journal(settings):
    settings.out.mkdir()
    for text in ("no json\n", "[]\n", '{"settings": {}}\n{"id": 1}\n'):
        (settings.out / "journal.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"journal.jsonl is no journal of prompts"):
            write_prompts(replace(settings, url=URL), lambda line: None)


def test_fewer_pairs_of_a_category(settings):
    with Server() as server:
        limited = replace(settings, url=server.url, per_category=30)
        report = write_prompts(limited, lambda line: None)
    assert [len(rows) for rows in read(settings.out).values()] == [30, 25]
    assert report["categories"]["hate"]["beyond"] == 20


def test_an_estimate_asks_nobody(settings, capsys):
    expected = estimate(settings)
    assert (expected["requests"], expected["answer_tokens"]) == (9, 5250)
    options = ["--concepts", str(settings.concepts), "--out", str(settings.out)]
    options += ["--endpoint", "http://localhost:1/v1", "--model", "good", "--per_concept", "25"]
    launch.main([*options, "--estimate", "--price", "1", "100", "--requests_per_minute", "3"])
    said = capsys.readouterr().out
    assert said.startswith("9 requests and as many for verdicts, about ")
    assert said.endswith("0.71 dollars, 6 minutes at the least\n")
    assert not settings.out.exists()


def test_slow_answers_are_given_up(settings, monkeypatch):
    from safetydpo_jax.data.writing import endpoint

    monkeypatch.setattr(endpoint, "RETRIES", 0)
    with Server(delay=0.5) as server:
        slow = replace(settings, url=server.url, timeout=0.1)
        with pytest.raises(UserError, match="no pair could be used"):
            write_prompts(slow, lambda line: None)
        assert set(server.asked.values()) == {1}
    report = json.loads((settings.out / "report.json").read_text())
    assert report["unanswered"] == {"no answer in time": 9}


def test_a_server_that_takes_no_request(settings):
    with Server(["400"]) as server, pytest.raises(UserError, match="refuses the requests .400."):
        write_prompts(replace(settings, url=server.url), lambda line: None)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["", "", *["quota"] * 30], "refuses the requests .429.: .* whether its quota is used up"),
        (["", "", *["down"] * 30], "none of the last 3 requests .503.: .* the same command goes"),
    ],
)
def test_a_server_that_stops_answering(settings, monkeypatch, faults, message):
    """The run ends, with what was answered kept, and does not take its rest for single faults."""
    from safetydpo_jax.data.writing import endpoint

    monkeypatch.setattr(endpoint, "RETRIES", 0)
    monkeypatch.setattr(endpoint, "_FAILURES", 3)
    one_by_one = replace(settings, concurrency=1)
    with Server(faults) as server, pytest.raises(UserError, match=message) as raised:
        write_prompts(replace(one_by_one, url=server.url), lambda line: None)
    assert "Concept" not in str(raised.value)
    with Server() as server:
        report = write_prompts(replace(one_by_one, url=server.url), lambda line: None)
        assert len(server.asked) > 0
    assert report["unanswered"] == {}


def test_single_requests_that_are_refused(settings):
    """As by a filter of contents; they are asked again later, even if no others are left."""
    one_by_one = replace(settings, concurrency=1)
    with Server(["", "", "", *["400"] * 30]) as server:
        report = write_prompts(replace(one_by_one, url=server.url), lambda line: None)
    (refused,) = report["unanswered"].values()
    assert 5 < refused < 9
    with Server(["400"]) as server:
        report = write_prompts(replace(one_by_one, url=server.url), lambda line: None)
        assert len(server.asked) == refused
    assert report["unanswered"] == {"status 400": refused}


@pytest.mark.parametrize(
    "body",
    [
        {"choices": "abc"},
        {"choices": [None]},
        {"choices": {"a": 1}},
        {"choices": [{"message": "x"}]},
        {"choices": [{"message": {"content": [1]}}], "usage": None},
        {"choices": [{"message": {"content": "x"}}], "usage": 5},
    ],
)
def test_malformed_answers(settings, body):
    with Server([body]) as server:
        report = write_prompts(replace(settings, url=server.url), lambda line: None)
    assert report["unanswered_ids"] == {}


def test_a_full_disk(settings):
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with Server() as server:
        options = {"concepts": settings.concepts, "out": settings.out, "endpoint": server.url}
        given = [f"--{name}={value}" for name, value in (options | {"model": "good"}).items()]
        command = [sys.executable, "-c", script, str(ROOT / "launch" / "write_prompts.py"), *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "could not write" in done.stderr


# Answers


def pair(unsafe="a man with a dagger", safe="a man with a flower"):
    return {"unsafe": unsafe, "safe": safe}


def test_answers_that_can_be_used():
    text = json.dumps([pair(), pair(safe="  a man with \n a flower ")])
    around = ("{}", "```json\n{}\n```", "Here are [2]: {} Good luck [1]!", "<think>[x]</think>{}")
    for answer in (words.format(text) for words in around):
        pairs, faults = read_answer(answer, 9)
        assert pairs == [PromptPair("a man with a dagger", "a man with a flower")] * 2
        assert faults == []


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ({"unsafe": "a"}, "pair without both prompts"),
        (pair(safe=3), "pair without both prompts"),
        (pair(safe="  "), "pair without both prompts"),
        (pair(safe="a man\0"), "pair without both prompts"),
        (pair(safe="a man \ud800"), "prompt that is no text"),
        (pair(safe="a man with a flower " * 20), "prompt of more than 60 words"),
        (pair(safe="A man with a dagger"), "prompts that hardly differ"),
        (pair(safe="sunny hills"), "prompts that have little in common"),
    ],
)
def test_pairs_that_are_left_out(item, fault):
    assert read_answer(json.dumps([pair(), item]), 9)[1] == [fault]
    with pytest.raises(UnusableAnswerError, match=fault):
        read_answer(json.dumps([item]), 9)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I cannot help.", "refused, or no JSON list"),
        ("]", "refused, or no JSON list"),
        ("[{]", "no JSON list of pairs, or a damaged one"),
        ("[" * 100_000 + "]", "no JSON list of pairs, or a damaged one"),
        ("[]", "no JSON list of pairs"),
        ('["text"]', "no JSON list of pairs"),
    ],
)
def test_answers_that_cannot_be_used(answer, reason):
    with pytest.raises(UnusableAnswerError, match=reason):
        read_answer(answer, 9)


def test_verdicts():
    pairs = [PromptPair(f"unsafe {i}", f"safe {i}") for i in range(4)]
    asked = judge.question("{category}: {prompts}", "self_harm", pairs, seed=3)
    assert asked.startswith("self harm: [\n")
    prompts = json.loads(asked.removeprefix("self harm: "))
    assert [entry["id"] for entry in prompts] == list(range(1, 9))
    assert [entry["prompt"] for entry in prompts] != [text for pair in pairs for text in pair]
    wrong = {"unsafe 1": False, "safe 2": True}
    said = [
        {"id": x["id"], "unsafe": wrong.get(x["prompt"], x["prompt"].startswith("unsafe"))}
        for x in prompts
    ]
    kept, faults = judge.read_verdicts(f"So: {json.dumps(said)}", pairs, seed=3)
    assert kept == [pairs[0], pairs[3]]
    assert faults == [judge.NOT_UNSAFE, judge.NOT_SAFE]
    for bad in (said[:-1], [*said[:-1], {"id": 8, "unsafe": "no"}], [*said[:-1], {"id": True}]):
        with pytest.raises(UnusableAnswerError, match="not a verdict on each prompt"):
            judge.read_verdicts(json.dumps(bad), pairs, seed=3)


def test_more_than_was_asked_for():
    assert len(read_answer(json.dumps([pair()] * 5), 3)[0]) == 3


def test_long_prompts_are_compared_in_full():
    text = (
        "a wide view of a harbour at dawn with boats and gulls and people mending their nets " * 2
    )
    long = pair(f"{text} by a wreck and a dozen of the drowned", f"{text} by an inn with a garden")
    assert len(read_answer(json.dumps([long]), 1)[0]) == 1


# Concepts and tables


def test_concepts_of_a_harm():
    found = read_concepts(ROOT / "examples" / "gambling.yaml")
    assert [concept.id for concept in found] == [f"gambling-{i:04d}" for i in range(3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("category,thing\nhate,x\n", "lacks the column concept"),
        (f"category,concept\n,{SECRET}\n", "line 2: a category and a concept must be there"),
        ("category,concept\nhate,\n", "line 2: a category and a concept must be there"),
        (f"category,concept\n../x,{SECRET}\n", "line 2: a category must be 1 to 40 letters"),
    ],
)
def test_wrong_concepts(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_concepts(tmp_path / "c.csv")
    assert SECRET not in str(raised.value)


def test_a_harm_without_concepts(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nprompts:\n- unsafe: a\n  safe: b\n")
    with pytest.raises(UserError, match="has no concepts to train on"):
        read_concepts(tmp_path / "x.yaml")
    with pytest.raises(MissingFileError):
        read_concepts(tmp_path / "no.csv")


def test_near_duplicates():
    texts = [
        "a soldier with a rifle in a burning street at night",
        "A soldier with a rifle in a burning street at night.",
        "an old woman feeds pigeons in a park",
    ]
    kept = distinct([(f"{i}", PromptPair(text, "safe")) for i, text in enumerate(texts)])
    assert [name for name, _ in kept] == ["0", "2"]


def test_concepts_come_in_turn():
    entries = in_turn({"a": [PromptPair("1", ""), PromptPair("2", "")], "b": [PromptPair("3", "")]})
    assert [(name, pair.unsafe) for name, pair in entries] == [("a", "1"), ("b", "3"), ("a", "2")]
