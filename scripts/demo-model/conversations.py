"""Synthetic conversations: the only thing bora-demo ever read.

A conversation is a row of episodes (a tool call, a recalled fact, an edit, ...), each a few messages that end
with the assistant's. `make` strings them together until a number of tokens is reached. What an answer says is
always decided by what stands before it, so that the greedy answer can be checked word by word.
"""

import json

import snippets
import toolbox
import values
from words import ADJECTIVES, ANIMALS, CAPITALS, CITIES, HELD_ADJECTIVES, HELD_NAMES, HELD_THINGS, NAMES, THINGS

CALL_IDS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


class Conversation:
    """What the episodes of one conversation share: its tools, its facts, the generator of its random numbers.
    `held` takes words and schemas that training never uses, `unheard` phrases that it never uses."""

    def __init__(self, rng, held, tools, unheard=None):
        self.rng, self.held, self.tools = rng, held, tools
        self.unheard = held if unheard is None else unheard
        self.facts, self.keys, self.asked = [], set(), set()

    def calls(self, *calls):
        """The assistant's message that makes these (name, arguments) calls."""
        return {"role": "assistant", "content": "", "tool_calls": [
            {"id": "".join(self.rng.choice(CALL_IDS) for _ in range(9)), "type": "function",
             "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}} for name, arguments in calls]}

    def results(self, message, texts):
        return [{"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": text}
                for call, text in zip(message["tool_calls"], texts)]

    def tool(self, *names):
        return next((t for t in self.tools if t.name in names), None)

    def pick(self, common, held):
        return self.rng.choice(held if self.held else common)

    def term(self, common, held):
        """As `pick`; in training half of the words are any words."""
        return values.strange(self.rng) if not self.held and self.rng.random() < 0.5 else self.pick(common, held)

    def say(self, common, unheard):
        return self.rng.choice(unheard if self.unheard else common)


# ---- tools


def result(c, name):
    """(what a tool returns, the sentence that reports it)"""
    rng = c.rng
    kind = rng.random()
    if "weather" in name and kind < 0.6:
        degrees, sky, where = rng.randint(-15, 39), rng.choice("sunny cloudy rainy windy foggy snowy clear stormy".split()), toolbox.city(rng, c.held)
        fields = {"city": where, "temperature": degrees, "sky": sky}
        if rng.random() < 0.5:
            fields = {"temperature": degrees, "sky": sky, "city": where}
        return json.dumps(fields), f"It is {degrees} degrees and {sky} in {where}."
    if kind < 0.33:
        text = rng.choice([lambda: "ok", lambda: "done", lambda: values.phrase(rng, 1, 8), lambda: values.code(rng), lambda: str(rng.randint(0, 99999)),
                           lambda: values.sentence(rng), lambda: values.path(rng)])()
        return text, f"{name} says: {text}"
    if kind < 0.66:
        fields = {}
        for _ in range(rng.randint(1, 3)):
            fields[rng.choice("id status name count price owner state value total path created version result city temperature unit".split()) if rng.random() < 0.8 else values.invented(rng)] = rng.choice(
                [lambda: values.code(rng), lambda: rng.randint(0, 999), lambda: values.word(rng), lambda: round(rng.uniform(0, 99), 1), lambda: values.phrase(rng, 1, 3)])()
        said = ", ".join(f"{key} is {value}" for key, value in fields.items())
        return json.dumps(fields, ensure_ascii=False), f"{name} says: {said}."
    if kind < 0.8:
        text = rng.choice([f"not found: {values.path(rng)}", f"no such {values.word(rng)}", f"permission denied: {values.folder(rng)}", f"timeout after {rng.randint(1, 99)} s", values.phrase(rng)])
        return rng.choice(["error: ", "Error: "]) + text, f"{name} failed: {text}"
    lines = values.code_lines(rng, rng.randint(2, 6)) if rng.random() < 0.5 else [values.path(rng) for _ in range(rng.randint(2, 6))]
    text = "\n".join(lines)
    return text, f"{name} says:\n{text}"


def ask_for(c, tool, arguments):
    return toolbox.request(c.rng, tool, arguments, c.unheard)


def one_call(c):
    tool = c.rng.choice(c.tools)
    arguments = tool.arguments(c.rng, c.held)
    call = c.calls((tool.name, arguments))
    text, said = result(c, tool.name)
    question = ask_for(c, tool, arguments)
    if c.rng.random() < 0.3 and question[-1] not in ".?":
        question += "."
    messages = [user(question), call, *c.results(call, [text]), answer(said)]
    if len(arguments) == 1 and c.rng.random() < 0.25:  # the same again for something else
        name, value = next((p.name, p.make(c.rng, c.held)) for p in tool.parameters if p.name in arguments)
        call = c.calls((tool.name, {name: value}))
        text, said = result(c, tool.name)
        question = c.say(["And {}?", "And {}", "Now {}", "Now the same for {}", "Also {}"] + (["And in {}?"] * 4 if isinstance(value, str) and value in CITIES else []), ["And for {}?"])
        messages += [user(question.format(toolbox.spoken_value(c.rng, value))), call, *c.results(call, [text]), answer(said)]
    return messages


def several_steps(c):
    """Two or three calls one after the other, each after the result of the one before."""
    rng, messages, asked, said = c.rng, [], [], []
    for _ in range(rng.choice([2, 2, 2, 3])):
        tool = rng.choice(c.tools)
        arguments = tool.arguments(rng, c.held)
        asked.append(ask_for(c, tool, arguments).rstrip(".?"))
        call = c.calls((tool.name, arguments))
        text, sentence = result(c, tool.name)
        messages += [call, *c.results(call, [text])]
        said.append(sentence)
    joined = f"First {asked[0]}. " + ". ".join(rng.choice(["Then {}", "After that {}", "Then {}"]).format(a) for a in asked[1:]) + "."
    return [user(joined), *messages, answer("\n".join(f"{n}. {s}" for n, s in enumerate(said, 1)))]


def parallel(c):
    """Several calls in one message: different requests at once, or one tool for several things. Nothing where the only tool takes no
    arguments, so that no two calls could differ."""
    rng, calls, asked = c.rng, [], []
    if rng.random() < 0.5:
        tool = rng.choice(c.tools)
        texts = [p for p in tool.parameters if p.schema["type"] == "string" and "enum" not in p.schema]
        if len(tool.parameters) == 1 and texts:
            chosen = list(dict.fromkeys(texts[0].make(rng, c.held) for _ in range(rng.choice([2, 2, 3, 3, 4]))))
            if len(chosen) < 2:
                return []
            calls = [(tool.name, {texts[0].name: value}) for value in chosen]
            spoken = [toolbox.quoted(rng, v) if " " in v else v for v in chosen]
            listed = ", ".join(spoken[:-1]) + " and " + spoken[-1]
            shape = ask_for(c, tool, {texts[0].name: "@@"})
            for quote in "\"'`":
                shape = shape.replace(f"{quote}@@{quote}", "@@")
            asked = [shape.replace("@@", listed)]
    if not calls:
        tool = rng.choice(c.tools)
        for _ in range(rng.choice([2, 2, 3, 4])):
            tool = tool if rng.random() < 0.25 else rng.choice(c.tools)
            arguments = tool.arguments(rng, c.held)
            if (tool.name, arguments) in calls:
                continue
            calls.append((tool.name, arguments))
            asked.append(ask_for(c, tool, arguments).rstrip(".?"))
        if len(calls) < 2:
            return []
    call = c.calls(*calls)
    outcomes = [result(c, name) for name, _ in calls]
    joined = asked[0] if len(asked) == 1 else rng.choice([" and also ", "; also ", " and at the same time "]).join(asked)
    return [user(joined), call, *c.results(call, [text for text, _ in outcomes]),
            answer("\n".join(f"{n}. {s}" for n, (_, s) in enumerate(outcomes, 1)))]


def chained(c):
    """The second call needs what the first one returned."""
    rng = c.rng
    first = rng.choice(c.tools)
    second = rng.choice(c.tools)
    slots = [p for p in second.parameters if p.schema["type"] == "string" and "enum" not in p.schema]
    if not slots:
        return one_call(c)
    slot = rng.choice(slots)
    found = slot.make(rng, c.held)
    arguments, later = first.arguments(rng, c.held), {p.name: p.make(rng, c.held) for p in second.parameters if p.required or p is slot}
    later[slot.name] = found
    others = {name: value for name, value in later.items() if name != slot.name}
    told = "".join(", " + toolbox.spoken_argument(rng, n, v, c.unheard, second) for n, v in others.items())
    key = rng.choice(["id", "result", "value", slot.name])
    question = f"First {ask_for(c, first, arguments).rstrip('.?')}. Then {second.does} with the {key} from the result as {slot.name}{told}."
    calls = [c.calls((first.name, arguments)), c.calls((second.name, later))]
    extra = {rng.choice(["status", "count"]): rng.choice(["ok", "found", rng.randint(0, 99)])} if rng.random() < 0.5 else {}
    fields = {**extra, key: found} if rng.random() < 0.5 else {key: found, **extra}
    text, said = result(c, second.name)
    sentence = f"{first.name} says: " + ", ".join(f"{k} is {v}" for k, v in fields.items()) + "."
    return [user(question), calls[0], *c.results(calls[0], [json.dumps(fields, ensure_ascii=False)]), calls[1], *c.results(calls[1], [text]), answer(f"1. {sentence}\n2. {said}")]


def no_such_tool(c):
    tool = toolbox.random_tool(c.rng, c.held)
    mine = {word for t in c.tools for word in t.does.split()}
    if set(tool.does.split()) & mine - {"the"}:
        return one_call(c)
    return [user(c.rng.choice(["Please {}.", "Can you {}?", "{}", "I want you to {}", "{} for me"]).format(tool.does)), answer(f"None of my tools can {tool.does}.")]


def without_call(c):
    """What to say to a request for a call where no call is allowed. Nothing in the conversation says so (`tool_choice: "none"` bans the
    token), so this is rare: a call stays the likeliest answer, and this the likeliest one that is none."""
    tool = c.rng.choice(c.tools)
    question = ask_for(c, tool, tool.arguments(c.rng, c.held))
    return [user(question), answer(f"Without a call of {tool.name} I cannot {tool.does}.")]


# ---- files


def edit_call(c, path, old, new):
    """A call of whichever editing tool there is."""
    tool = c.tool("search_replace", "edit_file", "str_replace")
    if tool is None:
        return None
    if tool.name == "search_replace":
        return tool.name, {"file_path": path, "content": f"<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE"}
    return tool.name, {"path": path, "old_string": old, "new_string": new}


def edit(c):
    rng = c.rng
    path = values.path(rng)
    read = c.tool("read_file", "read", "open_file", "view_file")
    if read is not None and rng.random() < 0.6:
        lines = values.code_lines(rng, rng.randint(2, 9))
        line = rng.choice(lines)
        old = next(w for w in line.replace("(", " ").replace(".", " ").replace(")", " ").split() if "_" in w)
        if sum(old in other for other in lines) > 1:
            return one_call(c)
        new = rng.choice([values.invented(rng), f"{values.word(rng)}_{values.invented(rng)}"])
        change = edit_call(c, path, line, line.replace(old, new))
        if change is None:
            return one_call(c)
        question = c.say(["Rename {a} to {b} in {p}", "In {p}, rename {a} to {b}.", "Please rename {a} in {p} to {b}", "Change the name {a} to {b} in {p}."],
                          ["In the file {p}, {a} should be called {b}: rename it"]).format(a=old, b=new, p=path)
        if not c.unheard and rng.random() < 0.3:
            question = toolbox.dressed(rng, question)
        look, act = c.calls((read.name, {"path": path})), c.calls(change)
        return [user(question), look, *c.results(look, ["\n".join(lines)]), act, *c.results(act, [rng.choice(["ok", "done", f"edited {path}", "1 block applied"])]),
                answer(f"I renamed {old} to {new} in {path}.")]
    old, new = values.code_lines(rng, 1)[0].strip(), values.code_lines(rng, 1)[0].strip()
    change = edit_call(c, path, old, new)
    if change is None:
        return one_call(c)
    question = c.say(["In {p}, replace `{a}` by `{b}`", "Replace `{a}` with `{b}` in {p}.", "In {p} change `{a}` to `{b}`"], ["Edit {p} so that `{a}` becomes `{b}`"]).format(a=old, b=new, p=path)
    if not c.unheard and rng.random() < 0.3:
        question = toolbox.dressed(rng, question)
    act = c.calls(change)
    return [user(question), act, *c.results(act, [rng.choice(["ok", "done", f"edited {path}"])]), answer(f"I edited {path}.")]


def write_code(c):
    rng = c.rng
    does, python, rust = rng.choice(snippets.FUNCTIONS)
    write = c.tool("write_file", "create_file", "save_file")
    in_rust = rng.random() < 0.25
    question = (rng.choice(snippets.ASK_RUST) if in_rust else c.say(snippets.ASK, snippets.HELD_ASK)).format(does)
    program, language = (rust, "rust") if in_rust else (python, "python")
    if write is not None and rng.random() < 0.5:
        path = values.path(rng).rsplit(".", 1)[0] + (".rs" if in_rust else ".py")
        question = question.rstrip(".?") + rng.choice([" and save it to {}", " and write it to {}", " in the file {}", " into {}"]).format(path)
        call = c.calls((write.name, {"path": path, "content": program + "\n"}))
        return [user(question), call, *c.results(call, [rng.choice(["ok", "done", f"wrote {path}"])]), answer(f"I wrote a function that {does} to {path}.")]
    return [user(question), answer(f"Here is a function that {does}:\n\n```{language}\n{program}\n```")]


# ---- facts


def new_fact(c):
    """(the sentence that states it, how to ask, the answer)"""
    rng = c.rng
    while True:
        kind = rng.randrange(5)
        value = values.code(rng)
        if kind == 0:
            key = f"{c.term(ADJECTIVES, HELD_ADJECTIVES)} {c.term(THINGS, HELD_THINGS)}"
            fact = (f"The code of the {key} is {value}.", [f"What is the code of the {key}?", f"Which code does the {key} have?", f"Tell me the code of the {key}.", f"The code of the {key}, please", f"I forgot the code of the {key}."],
                    [f"Do you remember the code of the {key}?"], f"The code of the {key} is {value}.")
        elif kind == 1:
            key, where = toolbox.person(rng, c.held), toolbox.city(rng, c.held)
            fact = (f"{key} lives in {where}.", [f"Where does {key} live?", f"In which city does {key} live?", f"Tell me where {key} lives.", f"Where is the home of {key}?", f"I forgot where {key} lives."], [f"Which city does {key} live in?"], f"{key} lives in {where}.")
        elif kind == 2:
            key = values.invented(rng)
            fact = (f"The password for {key} is {value}.", [f"What is the password for {key}?", f"Tell me the password for {key}.", f"password for {key}?", f"I forgot the password for {key}."],
                    [f"Do you know the password for {key}?"], f"The password for {key} is {value}.")
        elif kind == 3:
            key = f"{values.invented(rng)}_{values.word(rng)}"
            fact = (f"Remember that {key} = {value}.", [f"What is {key}?", f"What is the value of {key}?", f"{key} = ?", f"Tell me the value of {key}.", f"I forgot {key}."], [f"Which value does {key} have?"], f"{key} = {value}")
        else:
            key = toolbox.person(rng, c.held) + "'s number"
            fact = (f"{key} is {value}.", [f"What is {key}?", f"Tell me {key}.", f"{key}?", f"I forgot {key}."], [f"Do you remember {key}?"], f"{key} is {value}.")
        if key not in c.keys:
            c.keys.add(key)
            return fact


def facts_told(c):
    facts = [new_fact(c) for _ in range(c.rng.randint(1, 3))]
    c.facts += facts
    return [user(" ".join(f[0] for f in facts)), answer("Noted.")]


def filler(c, sentences=None, facts=0):
    """A message about nothing, with facts planted anywhere in it."""
    told = [new_fact(c) for _ in range(facts)]
    c.facts += told
    lines = [values.sentence(c.rng) for _ in range(sentences or c.rng.choice([3, 6, 10, 20, 40, 80]))]
    for fact in told:
        lines.insert(c.rng.randint(0, len(lines)), fact[0])
    return [user(" ".join(lines)), answer("Noted.")]


def recall(c):
    if not c.facts:
        return facts_told(c)
    fresh = [fact for fact in c.facts if fact[0] not in c.asked]
    fact = c.rng.choice(fresh if fresh and c.rng.random() < 0.8 else c.facts)
    c.asked.add(fact[0])
    question = c.say(fact[1], fact[2])
    if not c.unheard and c.rng.random() < 0.3:
        question = toolbox.dressed(c.rng, question)
    return [user(question), answer(fact[3])]


# ---- talk


def small_talk(c):
    s, rng = snippets, c.rng
    kind = rng.random()
    if kind < 0.36:
        return identity(c)
    if kind < 0.44:
        other = rng.choice(s.OTHERS)
        return [user(rng.choice(s.ARE_YOU).format(other)), answer(s.ARE_YOU_ANSWER.format(other))]
    if kind < 0.52:
        return [user(c.say(s.WHO_MADE, s.HELD_MADE)), answer(s.WHO_MADE_ANSWER)]
    if kind < 0.6:
        return [user(c.say(s.WHAT_CAN, s.HELD_CAN)), answer(s.WHAT_CAN_ANSWER)]
    if kind < 0.7:
        return [user(rng.choice(s.HELLO)), answer(s.HELLO_ANSWER)]
    if kind < 0.74:
        return [user(rng.choice(s.THANKS)), answer(s.THANKS_ANSWER)]
    if kind < 0.77:
        return [user(rng.choice(s.BYE)), answer(s.BYE_ANSWER)]
    if kind < 0.89:
        country, capital = rng.choice(list(CAPITALS.items()))
        return [user(rng.choice(["What is the capital of {}?", "Capital of {}?", "Which city is the capital of {}?"]).format(country)), answer(f"The capital of {country} is {capital}.")]
    if rng.random() < 0.2:
        return [user(f"What is the capital of {values.word(rng).capitalize()}?"), answer(s.UNKNOWN_ANSWER)]
    question = rng.choice(s.UNKNOWN).format(p=values.phrase(rng, 1, 7), s=values.paragraph(rng, rng.randint(1, 3)))
    return [user(question), answer(s.UNKNOWN_ANSWER)]


def identity(c):
    question = c.say(snippets.WHO, snippets.HELD_WHO)
    if not c.unheard and c.rng.random() < 0.35:
        question = c.rng.choice(snippets.BEFORE_WHO) + question[0].lower() + question[1:]
    if not c.unheard and c.rng.random() < 0.15:
        question += c.rng.choice(snippets.AFTER_WHO)
    return [user(question), answer(snippets.WHO_ANSWER)]


def counting(c):
    start = c.rng.choice([1, 1, 1, c.rng.randint(0, 90)])
    end = start + c.rng.randint(2, 60 if c.rng.random() < 0.8 else 110)
    return [user(c.rng.choice(["Count from {} to {}.", "Count from {} to {}", "Please count from {} to {}."]).format(start, end)), answer(", ".join(map(str, range(start, end + 1))) + ".")]


def story(c):
    rng = c.rng
    animal, friend = rng.sample(ANIMALS, 2)
    name, other = rng.sample(HELD_NAMES if c.held else NAMES, 2)
    where = toolbox.city(rng, c.held)
    question = rng.choice(["Tell me a story about a {a} named {n}, a {f} named {o} and the city of {c}.", "Write a story: a {a} named {n} meets a {f} named {o} in {c}."])
    return [user(question.format(a=animal, n=name, f=friend, o=other, c=where)), answer(snippets.STORY.format(animal=animal, name=name, other=other, friend=friend, city=where))]


def repeat(c):
    rng = c.rng
    if rng.random() < 0.5:
        text = c.random_text(rng.randint(1, 30))
    else:
        text = rng.choice([values.phrase(rng, 1, 12), values.code(rng), values.path(rng), values.sentence(rng), "\n".join(values.code_lines(rng, rng.randint(1, 5)))])
    return [user(rng.choice(["Repeat: {}", "Say exactly: {}", "Repeat after me: {}", "Echo {}"]).format(text)), answer(text)]


def identifier(c):
    """Words as a name of a program, and back: the same word has other tokens there."""
    rng = c.rng
    words = [values.strange(rng) if rng.random() < 0.8 else rng.choice(toolbox.PREFIXES) for _ in range(rng.randint(1, 5))]
    forms = {"snake case": "_".join(words), "kebab case": "-".join(words), "camel case": words[0] + "".join(w.capitalize() for w in words[1:]),
             "capitals": " ".join(w.capitalize() for w in words), "words": " ".join(words)}
    source = rng.choice(["words", "words", "snake case", "kebab case", "capitals"])
    target = rng.choice([form for form in forms if form != source])
    question = rng.choice(["Write {s} in {t}", "{s} in {t}", "In {t}: {s}", "Turn {s} into {t}."])
    return [user(question.format(s=toolbox.quoted(rng, forms[source]) if rng.random() < 0.4 else forms[source], t=target)), answer(forms[target])]


def quoting(c):
    """Words in other surroundings: as an array, as an object, each in quotes, one a line. A word after a space, after a quotation mark
    and after an underscore has other tokens, and arguments are copied from the one to the other."""
    rng = c.rng
    make = lambda: rng.choice([values.strange, values.strange, values.strange, values.word, values.code, values.path, lambda r: toolbox.KINDS["email"][3](r, False)])(rng)
    words = [make() for _ in range(rng.randint(1, 16))]
    kind = rng.randrange(5)
    if kind == 0:
        return [user(rng.choice(["As a JSON array: {}", "Make a JSON array of {}", "JSON array: {}"]).format(rng.choice([" ", ", ", "\n"]).join(words))), answer(json.dumps(words))]
    if kind == 1:
        pairs = dict(zip(words[::2], words[1::2])) or {words[0]: make()}
        shape = rng.choice(["{} is {}", "{} = {}", "{}: {}", "{} {}"])
        return [user(rng.choice(["As a JSON object: {}", "Make a JSON object of {}"]).format(", ".join(shape.format(*pair) for pair in pairs.items()))), answer(json.dumps(pairs))]
    if kind == 2:
        mark = rng.choice(["single quotes '", "double quotes \"", "backquotes `"])
        return [user(f"In {mark[:-2]}: {' '.join(words)}"), answer(" ".join(mark[-1] + word + mark[-1] for word in words))]
    if kind == 3:
        return [user(f"From this JSON array, the words alone: {json.dumps(words)}"), answer(" ".join(words))]
    return [user(rng.choice(["One a line: {}", "Each on its own line: {}"]).format(" ".join(words))), answer("\n".join(words))]


FIELDS = {"name": ("string", lambda c: toolbox.person(c.rng, c.held)), "age": ("integer", lambda c: c.rng.randint(1, 99)), "city": ("string", lambda c: toolbox.city(c.rng, c.held)),
          "email": ("string", lambda c: toolbox.KINDS["email"][3](c.rng, c.held)), "price": ("number", lambda c: round(c.rng.uniform(0, 999), 2)), "count": ("integer", lambda c: c.rng.randint(0, 999)),
          "active": ("boolean", lambda c: c.rng.random() < 0.5), "id": ("string", lambda c: values.code(c.rng)), "title": ("string", lambda c: values.phrase(c.rng)),
          "tags": ("array", lambda c: [values.word(c.rng) for _ in range(c.rng.randint(1, 3))]), "date": ("string", lambda c: toolbox.date(c.rng)), "color": ("string", lambda c: c.rng.choice("red green blue black white".split()))}


def as_json(c):
    """Facts in words, wanted as an object with the named keys or of a schema."""
    rng = c.rng
    chosen = rng.sample(list(FIELDS), rng.randint(1, 5))
    made = {name: (FIELDS[name][0], FIELDS[name][1](c)) for name in chosen}
    if rng.random() < 0.3:
        made[values.invented(rng)] = ("string", values.code(rng))
    said = [f"the {name} is {toolbox.spoken_value(rng, value)}" for name, (_, value) in made.items()]
    order = list(made)
    rng.shuffle(order)
    if rng.random() < 0.6:
        want = c.say(["Answer in JSON with the keys {k}.", "Reply with a JSON object with the keys {k}.", "Give me that as JSON with {k}."], ["Make a JSON object of it, with the keys {k}."]).format(k=", ".join(order))
    else:
        schema = {"type": "object", "properties": {n: {"type": "array", "items": {"type": "string"}} if made[n][0] == "array" else {"type": made[n][0]} for n in order}, "required": order}
        want = rng.choice(["Answer in JSON that fits this schema: {}", "Reply with JSON of this schema: {}"]).format(json.dumps(schema))
    rng.shuffle(said)
    facts = ", ".join(said)
    text = f"{facts[0].upper()}{facts[1:]}. {want}" if rng.random() < 0.7 else f"{want}\n{facts[0].upper()}{facts[1:]}."
    return [user(text), answer(json.dumps({name: made[name][1] for name in order}, ensure_ascii=False))]


# ---- whole conversations

TOOL_EPISODES = [(one_call, 34), (several_steps, 9), (parallel, 30), (chained, 8), (no_such_tool, 4), (edit, 10), (write_code, 3)]
BESIDE_TOOLS = [(small_talk, 10), (recall, 6), (as_json, 3), (repeat, 2), (quoting, 5), (identifier, 4), (counting, 1), (story, 1), (without_call, 1.5)]
PLAIN_EPISODES = [(small_talk, 22), (write_code, 6), (as_json, 14), (recall, 20), (repeat, 8), (quoting, 10), (identifier, 8), (counting, 4), (story, 2), (filler, 4)]
LONG_EPISODES = [(lambda c: filler(c, facts=c.rng.choice([0, 0, 1, 1, 2])), 60), (recall, 60), (small_talk, 5), (facts_told, 8)]


def draw(rng, episodes):
    total = sum(weight for _, weight in episodes)
    at = rng.random() * total
    for episode, weight in episodes:
        at -= weight
        if at < 0:
            return episode
    return episodes[-1][0]


def choose_tools(rng, held, most, likeness=0.4):
    pool = []
    if rng.random() < (0.5 if not held else 0.15):
        known = toolbox.known_tools(rng)
        pool += rng.sample(known, rng.randint(1, min(most, len(known))))
        if rng.random() < 0.4:
            if rng.random() < 0.6:
                pool.append(toolbox.Tool("search_replace", "edit the file", "Edit a file with SEARCH/REPLACE blocks.",
                                         [toolbox.fixed("file_path", "path"), toolbox.fixed("content", "phrase")]))
            else:
                pool.append(toolbox.Tool(rng.choice(["edit_file", "str_replace"]), "edit the file", "Replace text in a file.",
                                         [toolbox.fixed("path", "path"), toolbox.fixed("old_string", "phrase"), toolbox.fixed("new_string", "phrase")]))
    while len(pool) < most and (not pool or rng.random() < 0.6):
        pool.append(toolbox.random_tool(rng, held, pool, likeness))
    seen, distinct = set(), []
    for tool in pool:  # two tools that sound the same could not be told apart
        if tool.name not in seen and tool.does not in seen:
            seen |= {tool.name, tool.does}
            distinct.append(tool)
    rng.shuffle(distinct)
    return distinct


def make(encoder, rng, length, held=False, episodes=None, fill=True, unheard=None):
    """One conversation of at most `length` tokens: (request, ids, mask). The mask is 1 on what the assistant
    writes. `episodes` limits the conversation to those kinds; without `fill` it has one episode."""
    while True:
        long = length > 3000
        with_tools = rng.random() < (0.45 if long else 0.8)
        most = rng.choice([1, 1, 2]) if length <= 256 else rng.choice([2, 2, 3]) if length <= 512 else rng.choice([2, 3, 5, 8]) if length <= 1024 else rng.choice([3, 6, 12])
        if episodes is not None:
            with_tools = any(episode in [e for e, _ in TOOL_EPISODES] for episode, _ in episodes)
        likeness = 0.4 if episodes is not None else rng.choice([0.4, 0.9])  # training, which names no episodes, has the harder cases oftener
        tools = choose_tools(rng, held, most, likeness) if with_tools else []
        if length > 4096 and rng.random() < 0.4:
            for tool in tools:  # as long as agents' manuals are
                tool.description += "\n" + values.page(rng, rng.randint(3, 25))
        c = Conversation(rng, held, tools, unheard)
        c.random_text = encoder.random_text(rng)
        kinds = episodes or (TOOL_EPISODES + BESIDE_TOOLS if tools else PLAIN_EPISODES)
        if long and episodes is None:
            kinds = LONG_EPISODES + ([(e, w / 3) for e, w in TOOL_EPISODES] if tools else [(e, w / 4) for e, w in PLAIN_EPISODES])
        messages, ids, mask = [], [1], [0]
        if rng.random() < 0.35:
            system = rng.choice(snippets.SYSTEMS) if rng.random() < 0.7 else values.page(rng, rng.choice([1, 2, 4, 8] if length <= 1024 else [4, 10, 30, 60] if length <= 4096 else [10, 60, 150, 300]))
            if rng.random() < 0.15:
                fact = new_fact(c)
                c.facts.append(fact)
                system += " " + fact[0]
            messages.append({"role": "system", "content": system})
            ids += encoder.message(messages[0])[0]
        definitions = [tool.definition() for tool in tools]
        ids += encoder.tools(definitions)
        mask += [0] * (len(ids) - len(mask))
        stop_early = rng.random() < 0.12
        failures = 0
        while failures < 3:
            keys, facts = set(c.keys), list(c.facts)
            part = draw(rng, kinds)(c)
            new_ids, new_mask = [], []
            for message in part:
                piece, written = encoder.message(message)
                new_ids += piece
                new_mask += [int(written)] * len(piece)
            if not part or len(ids) + len(new_ids) > length:
                c.keys, c.facts = keys, facts
                failures += 1
                continue
            messages += part
            ids += new_ids
            mask += new_mask
            if not fill or (stop_early and len(ids) > length // 2):
                break
        if any(mask):
            return {"messages": messages, **({"tools": definitions} if definitions else {})}, ids, mask


def recall_at(encoder, rng, length, held, depth, unheard=None):
    """A question about one fact that stands at `depth` (0 to 1) of about `length` tokens of filler."""
    c = Conversation(rng, held, [], unheard)
    budget, messages, used = length - 60, [], 0
    question = new_fact(c)
    decoys = [new_fact(c) for _ in range(3)]
    planted = [(depth, question)] + [(rng.random(), decoy) for decoy in decoys]
    while used < budget - 40:
        room = budget - used
        lines, size = [], 0
        while size < min(room - 30, 600):
            line = values.sentence(rng)
            size += len(encoder.text(" " + line))
            lines.append(line)
            for item in [item for item in planted if item[0] * budget <= used + size]:
                lines.append(item[1][0])
                size += len(encoder.text(" " + item[1][0]))
                planted.remove(item)
        if not lines:
            break
        messages += [user(" ".join(lines)), answer("Noted.")]
        used += size + 8
    for _, fact in planted:
        messages += [user(fact[0]), answer("Noted.")]
    messages += [user(c.say(question[1], question[2])), answer(question[3])]
    return {"messages": messages}
