"""Messages and tools to token ids in the layout of Tekken v13, for training where there is no `bora`.

The ids are those of `bora tokenize`: `check_encoder.py` compares them line by line. Only what the generator
makes is covered: text messages, tool calls and results in order, no images.
"""

import base64
import functools
import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "fixtures" / "tokenizers" / "tekken-v13-8k.json"

BOS, EOS, INST, INST_END, TOOLS, TOOLS_END, RESULT, RESULT_END, CALL = 1, 2, 3, 4, 5, 6, 7, 8, 9
PAD, SYSTEM, SYSTEM_END, ARGS = 11, 17, 18, 32
SPECIAL_IDS = 1000


@functools.lru_cache
def ordinary_words():
    """The vocabulary's entries that are plain lower-case words or pieces of words."""
    table = json.loads(TOKENIZER.read_text())
    texts = {base64.b64decode(entry["token_bytes"]).decode("utf-8", "ignore").strip().lower() for entry in table["vocab"][:8192]}
    return sorted(text for text in texts if text.isascii() and text.isalpha() and len(text) > 2)


class Encoder:
    """Tekken's byte-level BPE over the ranks of `path`, and the conversation layout on top of it."""

    def __init__(self, path=TOKENIZER):
        import tiktoken  # here, so that prepared questions need no more than the standard library

        table = json.loads(pathlib.Path(path).read_text())
        count = table["config"]["default_vocab_size"] - table["config"]["default_num_special_tokens"]
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in table["vocab"][:count]}
        self.bpe = tiktoken.Encoding("tekken", pat_str=table["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = table["config"]["default_vocab_size"]

    def text(self, text):
        return [rank + SPECIAL_IDS for rank in self.bpe.encode_ordinary(text)]

    def decode(self, ids):
        return self.bpe.decode([i - SPECIAL_IDS for i in ids if i >= SPECIAL_IDS])

    def random_text(self, rng):
        """A function that makes text of so many ordinary tokens, drawn evenly from the whole vocabulary."""
        def make(count):
            pieces = []
            while len(pieces) < count:
                piece = self.bpe.decode_single_token_bytes(rng.randrange(self.vocab_size - SPECIAL_IDS)).decode("utf-8", "ignore")
                if piece.isprintable() and piece.strip():
                    pieces.append(piece)
            return "".join(pieces).strip()
        return make

    def tools(self, tools):
        return [TOOLS, *self.text(json.dumps(tools, ensure_ascii=False)), TOOLS_END] if tools else []

    def message(self, message):
        """(ids, whether the model writes them) of one message that is not the first user message's tools block."""
        role = message["role"]
        if role == "system":
            return [SYSTEM, *self.text(message["content"]), SYSTEM_END], False
        if role == "user":
            return [INST, *self.text(message["content"]), INST_END], False
        if role == "tool":
            return [RESULT, *self.text(message["content"]), RESULT_END], False
        ids = self.text(message.get("content") or "")
        for call in message.get("tool_calls") or []:
            function = call["function"]
            ids += [CALL, *self.text(function["name"]), ARGS, *self.text(function["arguments"])]
        return [*ids, EOS], True

    def conversation(self, request):
        """(ids, mask) of a request; the mask is 1 on what the assistant writes."""
        ids, mask, tools = [BOS], [0], self.tools(request.get("tools"))
        for message in request["messages"]:
            if message["role"] == "user" and tools:
                ids += tools
                mask += [0] * len(tools)
                tools = []
            part, written = self.message(message)
            ids += part
            mask += [int(written)] * len(part)
        return ids, mask
