"""Answers known by heart for a fake group: what a client says first decides the conversation, what was answered last
decides the turn.

A fake group knows token ids only (see `worker/src/backend/fake.rs`): a rule holds where the prompt contains some ids. The
first turn of a conversation is recognised by its `opening`, a text that the client sends; each later turn by the ids of the
answer before it, which the client sends back. Later turns come first in the script, so that the last answer decides. An
opening that stands within a longer message does not end in punctuation, which would become one token with a line's end.
"""

import json
import subprocess

from cluster import BORA

BEGIN_INST, END_INST, TOOL_CALLS, ARGS = 3, 4, 9, 32


def encode_all(tokenizer, texts):
    """text -> its token ids, by `bora tokenize`."""
    lines = "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in texts)
    run = subprocess.run([BORA, "tokenize", "--tokenizer", str(tokenizer)], input=lines, capture_output=True, text=True, check=True, timeout=120)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    ids = {}
    for text, answer in zip(texts, answers, strict=True):
        tokens = answer["token_ids"]
        assert tokens[1] == BEGIN_INST and tokens[-1] == END_INST, answer
        ids[text] = tokens[2:-1]
    return ids


class Call:
    """A tool call that the fake makes. Arguments are written as the reference writes them, so that they come back as the
    same ids."""

    def __init__(self, name, **arguments):
        self.name, self.arguments = name, json.dumps(arguments, ensure_ascii=False)


class Turn:
    """One answer: text, calls, or both. With `after`, it follows wherever the prompt holds that text, instead of the answer before it."""

    def __init__(self, text="", *calls, after=None):
        self.text, self.calls, self.after = text, calls, after

    def texts(self):
        return [part for part in (self.text, self.after, *(part for call in self.calls for part in (call.name, call.arguments))) if part]

    def call_ids(self, ids):
        return [i for call in self.calls for i in (TOOL_CALLS, *ids[call.name], ARGS, *ids[call.arguments])]

    def ids(self, ids):
        return [*(ids[self.text] if self.text else []), *self.call_ids(ids)]

    def trace(self, ids):
        """What of this answer every client sends back as it was: the calls, or else the text."""
        return self.call_ids(ids) or ids[self.text]


def script(tokenizer, conversations):
    """The rules of conversations: opening -> turns."""
    texts = {text for opening, turns in conversations.items() for text in (opening, *(t for turn in turns for t in turn.texts()))}
    ids = encode_all(tokenizer, sorted(texts))
    rules = []
    for opening, turns in conversations.items():
        for number, turn in reversed(list(enumerate(turns))):
            contains = ids[turn.after or opening] if turn.after or not number else turns[number - 1].trace(ids)
            rules.append((number, {"contains": contains, "emit": turn.ids(ids)}))
    # a later turn's prompt holds the opening too
    return [rule for _, rule in sorted(rules, key=lambda rule: -rule[0])]
