"""``userllm serve``: the answers of the other commands, over HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient

from userllm import Event, UserHistory, UserLLM
from userllm.service import MOST_BYTES, MOST_EVENTS, AskedToRecommend, Service, build_app

HISTORY = [{"item": "6", "rating": 5, "time": 978300760}, {"item": "Babe (1995)", "time": 978300761}]


@pytest.fixture(scope="module")
def model(finished):
    return UserLLM.from_pretrained(finished / "runs" / "demo" / "contextualize" / "model")


@pytest.fixture
def store(userllm, tmp_path):
    assert userllm("embed", "runs/demo", "--out", tmp_path / "store").code == 0
    return tmp_path / "store"


@pytest.fixture
def client(model, store):
    return TestClient(build_app(Service(model, store)))


def answered(client, path, **asked):
    answer = client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_user_of_the_store_gets_what_the_commands_say(client, userllm):
    said = json.loads(userllm("recommend", "runs/demo", "--user", "6", "-k", "5", "--json").out)
    found = answered(client, "/recommend", user="6", k=5)
    assert (found["task"], found["events"], found["unread"]) == (said["task"], said["events"], None)
    assert [one["item"] for one in found["answers"]] == [one["item"] for one in said["with_user"]]
    assert [one["log_likelihood"] for one in found["answers"]] == pytest.approx(
        [one["log_likelihood"] for one in said["with_user"]], abs=1e-4
    )
    said = json.loads(userllm("score", "runs/demo", "--user", "6", "--items", "1", "34", "--json").out)
    found = answered(client, "/score", user="6", items=["1", "34"])
    assert {one["item"]: one["log_likelihood"] for one in found["answers"]} == pytest.approx(
        {one["item"]: one["log_likelihood"] for one in said["answers"]}, abs=1e-4
    )
    said = userllm("generate", "runs/demo", "--user", "6", "--prompt", "Tonight", "--max-new-tokens", "4")
    found = answered(client, "/generate", user="6", prompt="Tonight", max_new_tokens=4)
    assert found["text"] == said.out.removesuffix("\n")


def test_a_history_comes_along(client, model):
    history = UserHistory([Event("6", 978300760, {"rating": 5}), Event("34", 978300761)])
    found = answered(client, "/recommend", history=HISTORY, k=3)
    assert [one["item"] for one in found["answers"]] == [one.item for one in model.recommend(history, 3)]
    found = answered(client, "/recommend", history=[{"item": "Nobody saw this"}], k=1)
    assert found["unread"] == "items that the model has never seen are read as unknown: Nobody saw this"
    nobody = answered(client, "/recommend", history=[], k=2)
    assert [one["item"] for one in nobody["answers"]] == [
        one.item for one in model.recommend(UserHistory([]), 2)
    ]
    seen = answered(client, "/recommend", history=HISTORY, k=24, exclude_seen=False)
    assert {"6", "34"} <= {one["item"] for one in seen["answers"]}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/recommend", {"user": "nobody"}, 404, "no user 'nobody' in the store"),
        ("/recommend", {}, 422, 'give "user" (of the store) or "history"'),
        ("/recommend", {"user": "6", "history": []}, 422, 'give "user" (of the store) or "history"'),
        ("/recommend", {"user": "6", "k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ("/recommend", {"user": "6", "k": "5"}, 422, "k: Input should be a valid integer"),
        ("/recommend", {"user": "6", "kk": 5}, 422, "kk: Extra inputs are not permitted"),
        ("/recommend", {"user": "6", "task": "genre"}, 422, "this model was not trained for a task 'genre'"),
        ("/recommend", {"history": [{"itme": "6"}]}, 422, "history event 1: unknown field 'itme'"),
        ("/recommend", {"history": {"item": "6"}}, 422, "history: Input should be a valid list"),
        (
            "/recommend",
            {"history": [{"item": "6"}] * (MOST_EVENTS + 1)},
            422,
            f"history: List should have at most {MOST_EVENTS} items",
        ),
        ("/score", {"user": "6", "items": ["6", "no film"]}, 422, "unknown to task next_item: no film"),
        ("/score", {"user": "6"}, 422, "items: Field required"),
        ("/generate", {"user": "6", "prompt": ""}, 422, "prompt: String should have at least 1 character"),
        ("/generate", {"user": "6", "prompt": "x", "chat": True}, 422, "has no chat template"),
    ],
)
def test_what_cannot_be_answered(client, path, body, status, said):
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert said in answer.json()["error"] and len(answer.json()) == 1


def test_a_body_that_is_no_json(client):
    answer = client.post("/recommend", content=b'{"user": ', headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and answer.json()["error"].startswith("the body: ")


def test_what_answers_and_its_users(client, model, store, userllm, tmp_path):
    about = client.get("/").json()
    assert about["users"] == 12 and about["tasks"]["next_item"] == "next_item"
    without = TestClient(build_app(Service(model)))
    assert without.get("/").json()["users"] == 0
    assert "has no store" in without.post("/recommend", json={"user": "6"}).json()["error"]
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/", "/recommend", "/score", "/generate", "/reload"}


def test_the_store_is_read_again_when_asked_to(model, store, userllm, tmp_path):
    some = tmp_path / "users.txt"
    some.write_text("6\n")
    assert userllm("embed", "runs/demo", "--out", tmp_path / "part", "--users", some).code == 0
    client = TestClient(build_app(Service(model, tmp_path / "part")))
    assert client.post("/recommend", json={"user": "7"}).status_code == 404
    assert userllm("embed", "runs/demo", "--out", tmp_path / "part").code == 0
    assert client.post("/reload").json() == {"users": 12}
    assert client.post("/recommend", json={"user": "7"}).status_code == 200


@contextmanager
def ended(server):
    try:
        yield
    finally:
        if server.poll() is None and sys.exc_info()[0] is not None:
            server.kill()


def test_what_is_no_request_is_told_alike(client):
    assert client.get("/nowhere").json() == {"error": "Not Found"}
    assert client.get("/recommend").status_code == 405 and "error" in client.get("/recommend").json()
    answer = client.post("/recommend", content=b'{"user": "' + b"6" * MOST_BYTES + b'"}')
    assert answer.status_code == 413 and "at most 1,048,576 bytes" in answer.json()["error"]
    answer = client.post("/recommend", content=iter([b"{}"]))  # of unknown length
    assert answer.status_code == 413
    half = b'{"history": [{"item": "\\ud800"}]}'
    answer = client.post("/recommend", content=half, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and "half a character" in answer.json()["error"]


def test_names_of_others_are_not_answered_to(model):
    app = build_app(Service(model), ["localhost"])
    assert TestClient(app, base_url="http://localhost:8000").get("/").status_code == 200
    assert TestClient(app, base_url="http://evil.example").get("/").status_code == 400


def test_who_comes_when_too_many_wait_is_sent_away(model, store, monkeypatch):
    """And who asks what answers here is not."""
    service, go_on, at_work = Service(model, store), threading.Event(), threading.Semaphore(0)

    def recommend(self, asked: AskedToRecommend):
        at_work.release()
        go_on.wait(60)
        return {}

    monkeypatch.setattr(Service, "recommend", recommend)
    monkeypatch.setattr("userllm.service.WAITING", 2)
    with TestClient(build_app(service)) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.post, "/recommend", json={"user": "6"}) for _ in range(2)]
        try:
            for _ in waiting:
                assert at_work.acquire(timeout=60)
            answer = client.post("/recommend", json={"user": "6"})
            assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
            assert answer.json() == {"error": "busy; come back later"}
            assert client.get("/").status_code == 200
        finally:
            go_on.set()
        assert [one.result().status_code for one in waiting] == [200, 200]


@pytest.mark.slow  # a process that serves
def test_the_command(finished, store):
    command = [sys.executable, "-m", "userllm", "serve", "runs/demo", "--store", str(store), "--port", "0"]
    with subprocess.Popen(command, cwd=finished, stdout=subprocess.PIPE, text=True) as server, ended(server):
        assert server.stdout is not None
        said = next(line for line in server.stdout if "http://" in line)
        assert "12 users" in said
        url = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert url is not None
        asked = urllib.request.Request(
            f"{url[0]}/recommend",
            json.dumps({"user": "6", "k": 2}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert len(json.load(answer)["answers"]) == 2
        os.kill(server.pid, signal.SIGINT)
    assert server.returncode == 0


def test_bad_input_is_told_before_the_model_is_loaded(userllm, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = userllm("serve", "runs/demo", "--port", str(port))
        assert said.code == 2 and f"--port {port}: cannot be listened at" in said.err
    said = userllm("serve", "runs/demo", "--port", "0", "--store", tmp_path)
    assert said.code == 2 and "no store of users" in said.err and "language model" not in said.out
    assert userllm("serve", "runs/demo", "--host", "a..b").code == 2
    assert userllm("serve", "runs/demo", "--port", "70000").code == 2
