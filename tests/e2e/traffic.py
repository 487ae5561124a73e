"""Clients that go on asking while a test breaks something, each answer compared with that of an undisturbed run."""

import itertools
import random
import threading
import time

from sse import Stream, ask


def digest_requests(count=12, seed=5, max_tokens=(8, 24)):
    """Short requests for groups of mode `digest`: every id depends on all before it and on the seed."""
    rng = random.Random(seed)
    return [{"prompt": [rng.randrange(1000, 8000) for _ in range(rng.randrange(10, 400))], "temperature": 0.7 if number % 2 else 0,
             "seed": number, "max_tokens": rng.randrange(*max_tokens), "ignore_eos": True, "return_token_ids": True}
            for number in range(count)]


class Traffic:
    """`with Traffic(urls, requests): ...` fails at its end if any answer was not that of before."""

    def __init__(self, urls, requests, clients=4, pause=0.02, path="/v1/completions"):
        self.urls, self.requests, self.path, self.pause = urls, requests, path, pause
        self.wanted = [ask(urls[0], path, body) for body in requests]
        assert all("error" not in one for one in self.wanted), self.wanted
        self.answered, self.wrong, self.slowest_first_event = 0, [], 0.0
        self.lock, self.over = threading.Lock(), threading.Event()
        self.threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()
        if kind is None:
            assert not self.wrong, (len(self.wrong), self.answered, self.wrong[:3])
            assert self.answered > 0

    def wait_for(self, more, seconds=60):
        """Waits until so many more were answered."""
        goal, end = self.answered + more, time.monotonic() + seconds
        while self.answered < goal:
            assert time.monotonic() < end, f"{self.answered} of {goal} answers within {seconds} s"
            time.sleep(0.02)

    def _client(self, first):
        for turn in itertools.count(first):
            if self.over.wait(self.pause):
                return
            number = turn % len(self.requests)
            got, first_event_after = self._ask(turn, self.requests[number])
            with self.lock:
                self.answered += 1
                self.slowest_first_event = max(self.slowest_first_event, first_event_after)
                if got != self.wanted[number]:
                    self.wrong.append((got, self.wanted[number]))

    def _ask(self, turn, body):
        """As behind a load balancer: who does not accept a connection is passed over."""
        urls = list(self.urls)
        for attempt in range(len(urls)):
            try:
                stream = Stream(urls[(turn + attempt) % len(urls)], self.path, body)
            except ConnectionRefusedError:
                continue
            except OSError as error:
                return {"error": repr(error)}, 0.0
            with stream:
                try:
                    return stream.answer(), stream.first_event_after or 0.0
                except OSError as error:
                    return {"error": repr(error)}, 0.0
        return {"error": "no router accepts connections"}, 0.0
