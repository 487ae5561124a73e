"""Prints generated conversations: python3 show.py LENGTH COUNT [held]"""

import sys

import conversations
import values
from encoder import Encoder

encoder = Encoder()
for index in range(int(sys.argv[2])):
    request, ids, mask = conversations.make(encoder, values.generator("show", index), int(sys.argv[1]), held="held" in sys.argv)
    print(f"==== {len(ids)} tokens, {sum(mask)} written; tools {[t['function']['name'] for t in request.get('tools', [])]}")
    for message in request["messages"]:
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
        print(f"{message['role']:>10} {message['content'][:300]!r} {calls or ''}")
