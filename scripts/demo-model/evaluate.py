"""Asks running Bora servers what the model must be able to do, on words, schemas and values it never saw.

    python3 evaluate.py NAME=URL [NAME=URL ...] [--scale 1.0] [--out FILE]
    python3 evaluate.py tp1=URL tp2=URL tp4=URL --same     # the same greedy answers?
    python3 evaluate.py NAME=URL --only recall --lengths 8192,16384,32768
    python3 evaluate.py --save-recall FILE --lengths 8192,16384,32768       # the questions, for a machine without tiktoken:
    python3 evaluate.py NAME=URL --recall FILE --out FILE                   # asks these alone

Every assistant message of a generated conversation is one question: the server gets what stands before it and
answers greedily. A call is valid if it names a tool of the request and its arguments fit the tool's schema; it is
right if names and arguments are exactly what was asked for. Only the server is used, over HTTP.
"""

import argparse
import concurrent.futures
import json
import time
import urllib.request

import conversations as c
import values
from encoder import Encoder

MODEL = "bora-demo"
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}

# name: (kind of episode, conversations, whether its words, whether its phrases are ones that training never uses);
# schemas and values are new everywhere
SETS = {
    "one call": (c.one_call, 120, False, False), "one call, words never seen": (c.one_call, 120, True, False),
    "one call, words and phrases never seen": (c.one_call, 40, True, True),
    "calls in sequence": (c.several_steps, 25, False, False), "parallel calls": (c.parallel, 40, False, False),
    "second call from the first's result": (c.chained, 25, False, False), "file edits": (c.edit, 25, False, False), "no tool fits": (c.no_such_tool, 40, False, False),
    "JSON answers": (c.as_json, 40, True, False), "identity": (c.identity, 50, True, True),
}
RECALL = {1024: 40, 4096: 40, 8192: 40, 16384: 40, 32768: 40}  # questions by length
RECALL_ANSWER = 80  # tokens, the most that an answer about a fact may take


def ask(url, messages, tools, tokens=400):
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": tokens}
    if tools:
        body["tools"] = tools
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=1800) as response:
        choice = json.load(response)["choices"][0]
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    return message.get("content") or "", calls, choice["finish_reason"]


def fits(calls, tools):
    """Whether every call names a tool and its arguments are an object of the tool's schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for name, text in calls:
        try:
            arguments = json.loads(text)
        except ValueError:
            return False
        if name not in schemas or not isinstance(arguments, dict):
            return False
        properties = schemas[name].get("properties", {})
        if any(key not in arguments for key in schemas[name].get("required", [])):
            return False
        for key, value in arguments.items():
            if key not in properties or not isinstance(value, TYPES[properties[key]["type"]]):
                return False
            if isinstance(value, bool) != (properties[key]["type"] == "boolean") or value not in properties[key].get("enum", [value]):
                return False
    return True


class Score:
    def __init__(self):
        self.calls = self.valid = self.right_calls = self.answers = self.right_answers = self.conversations = self.whole = 0

    def row(self):
        share = lambda part, all: round(part / all, 4) if all else None
        return {"conversations": self.conversations, "turns with calls": self.calls, "valid": share(self.valid, self.calls),
                "right arguments": share(self.right_calls, self.calls), "answers": self.answers, "right answers": share(self.right_answers, self.answers),
                "whole conversation right": share(self.whole, self.conversations)}


def judge(url, request, score, wrong, last_only=False, tokens=400):
    messages, tools, whole = request["messages"], request.get("tools", []), True
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or (last_only and index + 1 < len(messages)):
            continue
        content, calls, _ = ask(url, messages[:index], tools, tokens)
        expected = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
        if expected:
            valid = bool(calls) and fits(calls, tools)
            right = valid and [(n, json.loads(a)) for n, a in calls] == [(n, json.loads(a)) for n, a in expected]
            score.calls, score.valid, score.right_calls = score.calls + 1, score.valid + valid, score.right_calls + right
        else:
            right = not calls and content == message["content"]
            score.answers, score.right_answers = score.answers + 1, score.right_answers + right
        if not right:
            print("wrong:", json.dumps({"asked": messages[index - 1]["content"][-200:], "expected": expected or message["content"], "got": calls or content}, ensure_ascii=False), flush=True)
            wrong.append({"asked": messages[index - 1]["content"][-300:], "expected": expected or message["content"], "got": calls or content})
        whole = whole and right
    score.conversations, score.whole = score.conversations + 1, score.whole + whole


def recall_questions(encoder, scale, lengths):
    """length: conversations that end with a question about one fact, at evenly spaced depths, and its answer"""
    questions = {}
    for length in lengths:
        count = max(1, round(RECALL[length] * scale))
        questions[length] = [c.recall_at(encoder, values.generator("evaluate recall", length, i), length, True, (i + 0.5) / count, unheard=False) for i in range(count)]
    return questions


def evaluate(url, encoder, scale, only, recall):
    table, wrong = {}, {}
    for name, (episode, count, held, unheard) in SETS.items():
        if (only and name not in only) or encoder is None:
            continue
        score, wrong[name], started = Score(), [], time.monotonic()
        for i in range(max(1, round(count * scale))):
            request, _, _ = c.make(encoder, values.generator("evaluate", name, i), 1024, held, [(episode, 1)], fill=False, unheard=unheard)
            judge(url, request, score, wrong[name])
        table[name] = score.row()
        print(name, table[name], f"{time.monotonic() - started:.0f} s", flush=True)
    for length, requests in recall.items():
        name = f"recall at {length}"
        if only and name not in only and "recall" not in only:
            continue
        score, wrong[name], started = Score(), [], time.monotonic()
        for request in requests:
            judge(url, request, score, wrong[name], last_only=True, tokens=RECALL_ANSWER)
        table[name] = score.row()
        print(name, table[name], f"{time.monotonic() - started:.0f} s", flush=True)
    return {"scores": table, "wrong": wrong}


def compare(urls, encoder, count):
    """Asks every server the same; says how many answers are the same to the last character."""
    kinds, same, differ = [row[0] for row in SETS.values()], 0, []
    for i in range(count):
        request, _, _ = c.make(encoder, values.generator("same", i), 1024, True, [(kinds[i % len(kinds)], 1)], fill=False, unheard=i % 2 == 1)
        last = max(index for index, message in enumerate(request["messages"]) if message["role"] == "assistant")
        answers = [ask(url, request["messages"][:last], request.get("tools", [])) for url in urls.values()]
        same += all(answer == answers[0] for answer in answers)
        if any(answer != answers[0] for answer in answers):
            differ.append(answers)
    print(f"{' = '.join(urls)}: {same} of {count} greedy answers are the same")
    return {"servers": list(urls), "questions": count, "same": same, "differ": differ}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("servers", nargs="*", help="NAME=URL")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the conversations")
    parser.add_argument("--only", action="append", help="a set's name, or recall for all of its lengths")
    parser.add_argument("--lengths", default="1024,4096", help="tokens before a question of recall, with commas")
    parser.add_argument("--save-recall", help="write the questions of recall to this file and ask nothing")
    parser.add_argument("--recall", help="ask only the questions of this file")
    parser.add_argument("--same", action="store_true", help="compare the servers' answers instead")
    parser.add_argument("--out")
    options = parser.parse_args()
    urls = dict(server.split("=", 1) for server in options.servers)
    encoder = None if options.recall else Encoder()
    if options.recall:
        with open(options.recall) as file:
            recall = json.load(file)
    else:
        recall = recall_questions(encoder, options.scale, [int(length) for length in options.lengths.split(",")])
    if options.save_recall:
        with open(options.save_recall, "w") as file:
            json.dump(recall, file)
        return
    if not urls:
        parser.error("no server is named")
    if options.same:
        report = compare(urls, encoder, max(1, round(100 * options.scale)))
    else:
        with concurrent.futures.ThreadPoolExecutor(len(urls)) as pool:
            report = dict(zip(urls, pool.map(lambda url: evaluate(url, encoder, options.scale, options.only, recall), urls.values())))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
            file.write("\n")


if __name__ == "__main__":
    main()
