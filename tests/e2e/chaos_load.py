"""The clients of the chaos run (`chaos.py`): what they ask, which router they ask, and whether the response is right."""

import dataclasses
import itertools
import json
import random
import select
import threading
import time
from http.client import HTTPConnection, HTTPException

from cluster import FIXTURES, TOKENIZER_8K
from sse import Stream, fold

MODEL, OTHER_MODEL = "bora-demo", "tiny"
MODELS = [{"name": MODEL, "path": str(FIXTURES / "bora-demo" / "fp8")},
          {"name": OTHER_MODEL, "path": str(FIXTURES / "tiny_text"), "tokenizer": str(TOKENIZER_8K)}]
# what the toy model was trained on: its most likely token is far ahead of the second one, so that no order of sums
# (ranks, batches, a group that goes on with what another one generated) changes a greedy response
QUESTIONS = [("Count from 1 to 60.", 150), ("Count from 3 to 30.", 40), ("Who are you?", 60), ("What is the capital of Norway?", 30),
             ("The city is Rome, the color is red. Answer in JSON with the keys color, city.", 30),
             ("The code of the green locker is KX-4821. What is the code of the green locker?", 30)]
TEXTS = [("1, 2, 3, 4, 5,", 60), ("Count from 1 to 9: 1, 2,", 30), ("7, 8, 9, 10,", 25)]
# a slow response is right: this ends a run in which something hangs
TIMEOUT = 300


class Incomplete(Exception):
    """The response ended without its end, or with an error."""


class Completions:
    path = "/v1/completions"
    streaming = {"stream_options": {"include_usage": True}}

    def body(self, prompt, max_tokens):
        return {"prompt": prompt, "max_tokens": max_tokens}

    def plain(self, body):
        choice = body["choices"][0]
        return choice["text"], choice["finish_reason"], body["usage"]["completion_tokens"]

    def streamed(self, stream):
        if not stream.done:
            raise Incomplete("no [DONE]")
        folded = fold(stream.events)
        choice = folded["choices"][0]
        return choice["text"], choice["finish"], folded["usage"]["completion_tokens"]


class Chat(Completions):
    path = "/v1/chat/completions"

    def body(self, prompt, max_tokens):
        return {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}

    def plain(self, body):
        choice = body["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], body["usage"]["completion_tokens"]


class Responses:
    path = "/v1/responses"
    streaming = {}

    def body(self, prompt, max_tokens):
        return {"input": prompt, "max_output_tokens": max_tokens}

    def plain(self, body):
        if body["status"] not in ("completed", "incomplete"):
            raise Incomplete(f"status {body['status']}")
        text = "".join(part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"])
        return text, body["incomplete_details"] or body["status"], body["usage"]["output_tokens"]

    def streamed(self, stream):
        last = stream.events[-1]
        if last["type"] not in ("response.completed", "response.incomplete"):
            raise Incomplete(f"the last event is {last['type']}")
        answer = self.plain(last["response"])
        deltas = "".join(event["delta"] for event in stream.events if event["type"] == "response.output_text.delta")
        numbers = [event["sequence_number"] for event in stream.events]
        if deltas != answer[0] or numbers != list(range(len(numbers))):
            return deltas, "the events differ from the response", numbers
        return answer


class Messages:
    path = "/v1/messages"
    streaming = {}

    def body(self, prompt, max_tokens):
        return {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}

    def plain(self, body):
        return "".join(part["text"] for part in body["content"]), body["stop_reason"], body["usage"]["output_tokens"]

    def streamed(self, stream):
        if stream.events[-1]["type"] != "message_stop":
            raise Incomplete(f"the last event is {stream.events[-1]['type']}")
        text = "".join(event["delta"]["text"] for event in stream.events if event["type"] == "content_block_delta")
        (delta,) = (event for event in stream.events if event["type"] == "message_delta")
        return text, delta["delta"]["stop_reason"], delta["usage"]["output_tokens"]


@dataclasses.dataclass
class Case:
    api: object
    body: dict
    expected: tuple = None


def cases(model=MODEL):
    """Every request of the run, greedy."""
    asked = [(api, *question) for question in QUESTIONS for api in (Chat(), Responses(), Messages())]
    asked += [(Completions(), *text) for text in TEXTS]
    if model == OTHER_MODEL:
        asked = [(Completions(), *text) for text in TEXTS]
    return [Case(api, {"model": model, "temperature": 0, **api.body(prompt, max_tokens)}) for api, prompt, max_tokens in asked]


def has_text(event):
    if event.get("type") in ("response.output_text.delta", "content_block_delta"):
        return True
    return any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event.get("choices", []))


# what a router says before it takes a request
REFUSALS = {
    "No group of this model takes requests now": "no group is ready",
    "No group serves the model": "no group is known",
    "All groups of this model are": "groups are busy",
    "The server has too many connections": "connections",
    "Too many requests wait to be encoded": "encode queue",
}


@dataclasses.dataclass
class Record:
    """One request and what became of it: `right`, `wrong`, `lost` or `refused`."""
    id: str
    path: str
    body: dict
    streamed: bool
    expected: tuple
    router: str = ""
    groups: str = ""
    sent: float = 0.0
    ended: float = 0.0
    first_token_after: float = None
    outcome: str = "lost"
    cause: str = ""
    got: object = None


class Wire:
    """A client's connections: one for each request, or one to each router that is kept, as a load balancer does."""

    def __init__(self, keeps):
        self.keeps, self.open = keeps, {}

    def connect(self, router):
        """(connection, whether it is reused). Raises `ConnectionRefusedError` if the router does not accept it."""
        connection = self.open.pop(router.name, None)
        if connection is not None:
            # no idle connection has anything to read but its end
            if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
                return connection, True
            connection.close()
        connection = HTTPConnection(router.url.removeprefix("http://"), timeout=TIMEOUT)
        connection.connect()
        return connection, False

    def keep(self, router, connection, response):
        if self.keeps and connection.sock is not None and response.isclosed():
            self.open[router.name] = connection
        else:
            connection.close()

    def close(self):
        for connection in self.open.values():
            connection.close()


class Load:
    """`clients` threads that ask until `stop` is called. They pause longer than a response takes: on a slow machine they ask less."""

    def __init__(self, routers, cases, windows, seed, clients=50, pause=(0.5, 6.0)):
        self.routers, self.cases, self.windows, self.pause = routers, cases, windows, pause
        self.records, self.stale, self.failed_over = [], 0, 0
        self.lock, self.over = threading.Lock(), threading.Event()
        self.threads = [threading.Thread(target=self._client, args=(number, random.Random(f"{seed}/{number}")), daemon=True) for number in range(clients)]

    def start(self):
        for thread in self.threads:
            thread.start()

    def stop(self):
        """Lets the open requests end."""
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _client(self, number, rng):
        wire = Wire(keeps=number % 2 == 0)
        self.over.wait(rng.uniform(0, self.pause[1]))
        for turn in itertools.count():
            if self.over.is_set():
                break
            record = self.ask(f"{number}-{turn}", rng.choice(self.cases), rng.random() < 0.6, wire)
            self.over.wait(rng.uniform(*self.pause) + 1.5 * (record.ended - record.sent))
        wire.close()

    def ask(self, id, case, streamed, wire=None):
        """Sends a request to one router, or to the other one if the first does not accept connections."""
        record = Record(f"chaos-{id}", case.api.path, case.body, streamed, case.expected)
        record.sent = time.monotonic()
        self._ask(record, case.api, wire or Wire(False))
        record.ended = time.monotonic()
        if record.outcome != "refused" and record.got is not None and record.expected is not None:
            record.outcome = "right" if record.got == record.expected else "wrong"
        with self.lock:
            self.records.append(record)
        return record

    def _ask(self, record, api, wire):
        routers = [router for router in self.routers if router.in_rotation]
        random.shuffle(routers)
        for router in routers:
            record.router = router.name
            while True:
                try:
                    connection, reused = wire.connect(router)
                except ConnectionRefusedError:
                    with self.lock:
                        self.failed_over += 1
                    break
                except OSError as error:
                    record.cause = f"no connection: {error!r}"
                    return
                try:
                    response = self._exchange(record, api, connection)
                    wire.keep(router, connection, response)
                    return
                except (OSError, HTTPException) as error:
                    connection.close()
                    record.cause = f"no response: {error!r}"
                    # An idle connection that a server closes may cross a request, in any server: a load balancer sends it again.
                    if reused and self.windows.overlap(("stopping", "files"), router.name, record.sent, time.monotonic()):
                        with self.lock:
                            self.stale += 1
                        continue
                    return
        if not record.cause:
            record.outcome, record.cause = "refused", "no router accepts connections"

    def _exchange(self, record, api, connection):
        """The response, read to its end. Raises only if there is none."""
        headers = {"content-type": "application/json", "x-request-id": record.id}
        if record.streamed:
            stream = Stream("", api.path, {**record.body, **api.streaming}, headers, connection=connection)
            response = stream.response
        else:
            connection.request("POST", api.path, json.dumps(record.body), headers)
            response = connection.getresponse()
        record.groups = response.headers.get("x-bora-group") or ""
        try:
            if response.status != 200:
                self._refused(record, response)
            elif record.streamed:
                for event in stream:
                    if record.first_token_after is None and has_text(event):
                        record.first_token_after = time.monotonic() - record.sent
                if stream.error is not None:
                    raise Incomplete(f"error event: {stream.error}")
                record.got = api.streamed(stream)
            else:
                record.got = api.plain(json.loads(response.read()))
        except (OSError, HTTPException, Incomplete) as error:
            record.cause = f"incomplete: {error!r}"
        except (ValueError, KeyError, IndexError, TypeError) as error:
            record.cause = f"incomplete: not of the form of {api.path}: {error!r}"
        if record.got is None and record.streamed:
            record.cause += f" after {json.dumps(stream.events[-2:])[:600]}" if stream.events else ""
        return response

    def _refused(self, record, response):
        text = response.read()
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = repr(text[:300])
        cause = next((cause for start, cause in REFUSALS.items() if message.startswith(start)), None)
        if response.status in (429, 503) and response.headers.get("retry-after") and (cause or record.streamed):
            record.outcome, record.cause = "refused", cause or message
        else:
            record.cause = f"status {response.status}: {message}"
