"""The judge against a real server on the loopback, which answers, delays, fails, lies and hangs."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest
import torch
from judge_server import JudgeServer, Reply, Request

from g2rpo.errors import ConfigurationError
from g2rpo.rewards import Reward, score
from g2rpo.rewards.judge import Judge, OutOfRange, parse_score

KEY = "sk-local-5d1f"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """A machine behind a proxy still reaches its own loopback."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def images(count: int, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 3, side, side, generator=generator)


def make(server: JudgeServer, **arguments) -> Judge:
    """A judge that is quick to try again and says nothing."""
    arguments = {"backoff": 0.01, "timeout": 5.0, "on_message": lambda text: None, **arguments}
    return Judge(server.endpoint, "a-judge", **arguments)


def ask(answer: Callable[[Request, int], Reply] | Reply, count: int = 1, **arguments):
    """Scores, the judge and the server after one call on `count` images."""
    reply = (lambda request, number: answer) if isinstance(answer, Reply) else answer
    with JudgeServer(reply) as server:
        judge = make(server, **arguments)
        scores = judge(images(count), [f"prompt {row}" for row in range(count)])
    return scores, judge, server


# Scores and requests


def test_each_image_gets_the_score_of_its_own_answer():
    def answer(request: Request, number: int) -> Reply:
        row = int(request.text.rpartition("prompt ")[2].split()[0])
        return Reply(f"Score: {row}", delay=0.02 * (10 - row))  # the last asked answers first

    scores, judge, server = ask(answer, 10)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    torch.testing.assert_close(scores, torch.arange(10) / 10)
    assert not judge.failures and judge.retries == 0 and len(server.requests) == 10


def test_the_request_is_the_documented_one():
    picture = images(1, 16)
    with JudgeServer(lambda request, number: Reply()) as server:
        judge = make(server, seed=7, score_range=(1, 5), body={"top_k": 1, "max_tokens": None})
        judge(picture, ["a {low} fox, {prompt}"])
        judge(picture, ["a {low} fox, {prompt}"])
    first, second = server.requests
    assert first.content == second.content  # to the byte
    assert first.path == "/v1/chat/completions" and "Authorization" not in first.headers
    body = first.body
    assert body["model"] == "a-judge" and body["temperature"] == 0 and body["seed"] == 7
    assert body["top_k"] == 1 and "max_tokens" not in body
    assert "a {low} fox, {prompt}\n" in first.text and "from 1 (worst) to 5 (best)" in first.text
    # lossless: every pixel arrives as the nearest of 256 values
    torch.testing.assert_close(first.image, (picture[0] * 255).round().to(torch.uint8))


def test_no_more_requests_than_concurrency_at_a_time():
    scores, _, server = ask(Reply(delay=0.05), 12, concurrency=3)
    assert server.most == 3 and scores.isfinite().all()


def test_it_works_inside_a_running_event_loop():
    async def caller(judge: Judge) -> torch.Tensor:
        return judge(images(2), ["a", "b"])

    with JudgeServer(lambda request, number: Reply("Score: 4")) as server:
        scores = asyncio.run(caller(make(server)))
    torch.testing.assert_close(scores, torch.tensor([0.4, 0.4]))


def test_it_is_a_reward_of_this_package_and_leaves_the_random_state_alone():
    before, state = random.getstate(), torch.get_rng_state()
    with JudgeServer(lambda request, number: Reply(status=500 if number == 0 else 200)) as server:
        judge = make(server)
        scores = score(Reward("judge", judge), images(2), ["a", "b"])
    assert judge.retries == 1 and scores.tolist() == pytest.approx([0.8, 0.8])
    assert random.getstate() == before and torch.equal(torch.get_rng_state(), state)


def test_broken_images_are_nan_without_a_request():
    batch = images(3)
    batch[1, 0, 0, 0] = math.nan
    with JudgeServer(lambda request, number: Reply()) as server:
        judge = make(server)
        scores = judge(batch, ["a", "b", "c"])
        nothing = judge(batch[:0], [])
    assert scores.isnan().tolist() == [False, True, False]
    assert sorted(r.text.split("Prompt: ")[1][0] for r in server.requests) == ["a", "c"]
    assert not judge.failures and nothing.shape == (0,)


@pytest.mark.parametrize(
    "batch, message",
    [
        (torch.rand(2, 1, 4, 4), r"\(2, 1, 4, 4\)"),
        (torch.rand(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.full((2, 3, 4, 4), 1.01), "1.01"),
        (torch.full((2, 3, 4, 4), -0.01), "-0.01"),
        (torch.rand(1, 3, 4, 4), "prompts has 2 entries"),
    ],
)
def test_images_outside_the_contract_are_refused(batch, message):
    judge = Judge("http://127.0.0.1:9/v1", "a-judge")
    with pytest.raises(ValueError, match=message):
        judge(batch, ["a", "b"])


# Failures


def test_two_failures_and_then_a_score():
    scores, judge, server = ask(lambda request, number: Reply(status=500 if number < 2 else 200))
    assert scores.tolist() == pytest.approx([0.8])
    assert len(server.requests) == 3 and judge.retries == 2 and not judge.failures


@pytest.mark.parametrize(
    "reply, reason, requests",
    [
        (Reply(status=500), "server error", 3),
        (Reply(status=429), "rate limited", 3),
        (Reply(close=True), "disconnected", 3),
        (Reply(hang=True), "timeout", 3),
        (Reply(delay=0.5), "timeout", 3),
        (Reply(trickle=0.02), "timeout", 3),  # a byte now and then is no answer either
        (Reply(status=400), "rejected", 1),
        (Reply(status=302, headers={"Location": "/v1/chat/completions"}), "rejected", 1),
        (Reply("a lovely picture"), "bad answer", 1),
        (Reply(content=None), "bad answer", 1),
        (Reply(raw=b"<html>"), "bad answer", 1),
        (Reply(raw=b'{"choices": []}'), "bad answer", 1),
        (Reply(raw=b"[1]"), "bad answer", 1),
        (Reply(raw=b"\xff", headers={"Content-Encoding": "gzip"}), "bad answer", 1),
        (Reply("Score: 11"), "out of range", 1),
        (Reply("Score: 1", finish="length"), "cut off", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_scored_is_nan_and_counted(reply, reason, requests):
    told = []
    timeout = 0.1 if reason == "timeout" else 10.0
    scores, judge, server = ask(reply, timeout=timeout, on_message=told.append)
    assert scores.isnan().all() and judge.failures == {reason: 1}
    assert len(server.requests) == requests and judge.retries == requests - 1
    assert len(told) == 1 and reason in told[0] and "a-judge" in told[0]
    assert server.endpoint in told[0]


def test_nobody_listening_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}/v1"  # bound, but not listening
        judge = Judge(endpoint, "a-judge", backoff=0.01, on_message=lambda text: None)
        assert judge(images(2), ["a", "b"]).isnan().all()
    assert judge.failures == {"refused": 2} and judge.retries == 4


def test_the_other_images_keep_their_scores_and_a_reason_is_told_once():
    told = []

    def answer(request: Request, number: int) -> Reply:
        return Reply("no idea" if request.text.count("prompt 1") else "Score: 10")

    with JudgeServer(answer) as server:
        judge = make(server, on_message=told.append)
        scores = judge(images(3), ["prompt 0", "prompt 1", "prompt 2"])
        judge(images(2), ["prompt 1", "prompt 1"])
    assert scores[[0, 2]].tolist() == [1.0, 1.0] and scores[1].isnan()
    assert judge.failures == {"bad answer": 3} and len(told) == 1 and "no idea" in told[0]


def test_back_off_doubles():
    _, _, server = ask(Reply(status=503), attempts=4, backoff=0.04)
    times = [request.time for request in server.requests]
    pauses = [after - before for before, after in zip(times, times[1:])]
    for attempt, pause in enumerate(pauses):
        assert pause >= 0.5 * 0.04 * 2**attempt  # half at least; a busy machine adds what it likes
    assert len(pauses) == 3


def test_retry_after_is_waited_for():
    def answer(request: Request, number: int) -> Reply:
        status = (429, 503, 200, 200)[number]
        return Reply(status=status, headers={} if status == 200 else {"Retry-After": "1"})

    scores, judge, server = ask(answer, 2)  # one image gets the 429, the other the 503
    times = {text: [r.time for r in server.requests if text in r.text] for text in ("t 0", "t 1")}
    assert scores.isfinite().all() and judge.retries == 2
    assert all(second - first >= 1.0 for first, second in times.values())


def test_retry_after_as_a_date_and_as_nonsense():
    def answer(request: Request, number: int) -> Reply:
        later = (formatdate(time.time() + 3600, usegmt=True), "soon")[number]
        return Reply(status=429, headers={"Retry-After": later})

    _, judge, server = ask(answer, deadline=60.0)  # an hour is past the deadline: nobody waits
    assert judge.failures == {"rate limited": 1} and len(server.requests) == 1
    _, judge, server = ask(lambda request, number: answer(request, 1), attempts=2)
    assert judge.failures == {"rate limited": 1} and len(server.requests) == 2


def test_a_call_ends_at_its_deadline():
    start = time.monotonic()
    scores, judge, _ = ask(
        lambda request, number: Reply(hang="prompt 0" not in request.text), 4, deadline=0.8
    )
    assert time.monotonic() - start < 3.0
    assert scores.isnan().tolist() == [False, True, True, True]
    assert judge.failures == {"deadline": 3}


def test_an_interrupt_ends_a_call():
    main = threading.main_thread()
    assert threading.current_thread() is main

    def answer(request: Request, number: int) -> Reply:
        signal.pthread_kill(main.ident, signal.SIGINT)
        return Reply(hang=True)

    # A shell's background jobs begin with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        with JudgeServer(answer) as server, pytest.raises(KeyboardInterrupt):
            make(server, timeout=60.0)(images(1), ["a"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 3.0


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_all_is_a_fault_of_the_configuration(status, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    told = []
    reply = Reply(raw=f"no access with {KEY}".encode(), status=status)
    with JudgeServer(lambda request, number: reply) as server:
        judge = make(server, api_key_env="MY_KEY", on_message=told.append)
        with pytest.raises(ConfigurationError) as error:
            judge(images(2), ["a", "b"])
    for part in (server.endpoint, "'a-judge'", f"status {status}", "no access with ***", "MY_KEY"):
        assert part in str(error.value)
    assert judge.failures == {"rejected": 2} and len(server.requests) == 2
    assert KEY not in str(error.value) + "".join(told)


def test_one_refusal_among_scores_is_nan():
    scores, judge, _ = ask(lambda request, number: Reply(status=404 if number == 0 else 200), 3)
    assert scores.isnan().sum() == 1 and judge.failures == {"rejected": 1}


# The key


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog, capsys):
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    told = []
    reply = Reply(raw=f"{KEY} is over its limit".encode(), status=429)
    _, judge, server = ask(reply, api_key_env="MY_KEY", on_message=told.append, attempts=1)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert "*** is over its limit" in told[0]
    shown = [*told, repr(judge), repr(vars(judge)), caplog.text, *capsys.readouterr()]
    assert KEY not in "".join(shown)


def test_a_key_that_is_not_there_is_named(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    judge = Judge("http://127.0.0.1:9/v1", "a-judge", api_key_env="MY_KEY")
    with pytest.raises(ConfigurationError, match="MY_KEY.*not set"):
        judge(images(1), ["a"])
    monkeypatch.setenv("MY_KEY", "schlüssel")
    with pytest.raises(ConfigurationError, match="MY_KEY") as error:
        judge(images(1), ["a"])
    assert "schlüssel" not in str(error.value)


# Arguments and answers


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"endpoint": "gpu-2:8000/v1"}, "endpoint is 'gpu-2:8000/v1'"),
        ({"endpoint": "https://"}, "endpoint"),
        ({"template": "how good is it?"}, r"template is .*\{prompt\}"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"attempts": 1.5}, "attempts is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"deadline": math.nan}, "deadline is nan"),
        ({"backoff": -1}, "backoff is -1"),
        ({"score_range": (5, 1)}, r"score_range is \(5, 1\)"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Judge(**{"endpoint": "http://127.0.0.1:9/v1", "model": "a-judge", **arguments})


def test_a_password_in_the_endpoint_is_refused_unseen():
    with pytest.raises(ConfigurationError, match="password") as error:
        Judge(f"https://me:{KEY}@judge.example/v1", "a-judge")
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Score: 8", 0.8),
        ("score = 8.5.", 0.85),
        ("**Final Score:** 7/10, well done", 0.7),
        ('{"score": 2.5, "why": "blurred"}', 0.25),
        ('```json\n{"reason": "good", "score": "9"}\n```', 0.9),
        ("Overall Score (0-10): 3\n", 0.3),
        ("<think>Score: 2, no</think>\nScore: 5", 0.5),
        ("Score: 1e1", 1.0),
        ("Score: 0", 0.0),
    ],
)
def test_scores_that_are_read(answer, expected):
    assert parse_score(answer, 0, 10) == pytest.approx(expected)
    assert parse_score("Score: 2", 1, 5) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "answer", ["", "8", "great", "Score: high", "Score: 80%", "Score: 4,5", "Score: 3x",
               "score: nan", "Score: inf", "underscore: 3", "Score: 1.2.3", "Score:"],
)  # fmt: skip
def test_answers_without_a_score(answer):
    with pytest.raises(ValueError) as error:
        parse_score(answer, 0, 10)
    assert not isinstance(error.value, OutOfRange)


@pytest.mark.parametrize("answer", ["Score: 10.5", "Score: -1", "Score: 4/5", "Score: 1e999"])
def test_scores_out_of_range(answer):
    with pytest.raises(OutOfRange, match="0 to 10"):
        parse_score(answer, 0, 10)


def test_a_parser_of_the_users_own():
    answers = {"yes": -3.5, "nan": math.nan}

    def parse(answer: str) -> float:
        if answer not in answers:
            raise ValueError(f"neither yes nor nan but {answer}")
        return answers[answer]

    words = ["yes", "nan", "perhaps"]
    scores, judge, _ = ask(lambda r, number: Reply(words[number]), 3, parse=parse, concurrency=1)
    assert scores[0] == -3.5 and scores[1:].isnan().all()  # as it is: neither scaled nor clamped
    assert judge.failures == {"bad answer": 2}

    def broken(answer: str) -> float:
        return json.loads("{}")["score"]

    with pytest.raises(KeyError):  # a fault of the parser, not of the answer
        ask(Reply(), parse=broken)
